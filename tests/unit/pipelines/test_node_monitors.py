"""What each machine of a cluster does is told apart, and a node that hangs or is lost costs the run nothing."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time

import psutil
import pytest
from mlflow import MlflowClient

from pipelines.tracking.mlflow_client import PARENT
from pipelines.tracking.node_monitors import Machine, in_use, names
from pipelines.tracking.tracker import Tracker
from posmlp.config import load_recipe
from tests.helpers.ray_nodes import RayNodes
from tests.helpers.waiting import until


def test_a_machine_tells_what_the_system_tells():
    machine, memory = Machine(), psutil.virtual_memory()
    found = machine.sample()
    assert found["system_memory_usage_percentage"] == pytest.approx(100 * memory.used / memory.total, abs=10)
    assert found["disk_usage_percentage"] == pytest.approx(psutil.disk_usage("/").percent, abs=5)
    assert 0 <= found["cpu_utilization_percentage"] <= 100
    before = psutil.net_io_counters().bytes_sent
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        receiver, _ = server.accept()
        with receiver:
            for _ in range(40):
                sender.sendall(bytes(50_000))
                receiver.recv(50_000, socket.MSG_WAITALL)
    sent = machine.sample()["network_transmit_megabytes"] - found["network_transmit_megabytes"]
    assert sent >= 2 and sent >= (psutil.net_io_counters().bytes_sent - before) / 1e6 - 1


def node(id, host, **labels):
    return {"NodeID": id, "NodeManagerHostname": host, "Labels": {f"ray.io/{k}": v for k, v in labels.items()}}


def test_nodes_have_names_that_a_reader_knows():
    one = [node("abcdef01", "gpu07"), node("bbcdef01", "gpu08")]
    assert names(one) == {"abcdef01": "gpu07", "bbcdef01": "gpu08"}
    grouped = [{**n, "Labels": {"ray.io/node-group": "decode"}} for n in one]
    assert names(grouped) == {"abcdef01": "decode-gpu07", "bbcdef01": "decode-gpu08"}
    same = [*one, node("123456789", "gpu07")]
    assert names(same) == {"abcdef01": "gpu07-abcdef", "bbcdef01": "gpu08", "123456789": "gpu07-123456"}


def test_what_objects_take_is_no_use():
    total = {"CPU": 4.0, "GPU": 1.0, "object_store_memory": 100.0, "node:10.0.0.1": 1.0}
    assert not in_use(total, total | {"object_store_memory": 3.0})
    assert in_use(total, total | {"CPU": 3.5})
    assert in_use(total, {k: v for k, v in total.items() if k != "GPU"})  # all of it is taken


def test_a_trial_leaves_the_nodes_to_its_study(tmp_path):
    config = load_recipe("demo", ["name=small", f"train.storage={tmp_path}"])
    trackers = [
        Tracker.open(config, tags, journal=tmp_path / f"{number}.jsonl")
        for number, tags in enumerate(({}, {PARENT: "parent", "trial": "0"}))
    ]
    assert [tracker.machine.nodes is not None for tracker in trackers] == [True, False]
    for tracker in trackers:
        assert tracker.close("FINISHED") == 0
        found = MlflowClient(tracker.uri).get_run(tracker.run_id).data.metrics
        assert "system/cpu_utilization_percentage" in found
        assert {key.count("/") for key in found} == {1}  # one machine: no names of nodes


DRIVER = """
import os, sys, time
from pathlib import Path
ours = os.fdopen(os.dup(1), "w", 1)
os.dup2(2, 1)  # what Ray tells of lost nodes, sooner or later, is none of ours
import ray
from pipelines.tracking.tracker import node_monitors as machines
from pipelines.tracking.tracker import Tracker
from posmlp.config import load_recipe
folder = Path(sys.argv[1])
ray.init(log_to_driver=False)
config = load_recipe("demo", ["name=small", f"train.storage={folder}"])
tracker = Tracker.open(config, {}, journal=folder / "journal.jsonl", echo=lambda line: print(line, file=ours))
print("STARTED", tracker.run_id, file=ours)
sys.stdin.readline()
machines.UNUSED_S = 0.4
sys.stdin.readline()
work = ray.remote(lambda: time.sleep(600)).remote()
sys.stdin.readline()
begun = time.monotonic()
left = tracker.close("FINISHED")
print("ENDED", left, time.monotonic() - begun, tracker.machine.is_alive(), file=ours)
sys.stdin.readline()
"""


def go_on(driver):
    driver.stdin.write("\n")
    driver.stdin.flush()


@pytest.mark.ray
def test_every_node_appears_and_one_that_hangs_or_is_lost_costs_nothing(tmp_path, tmp_path_factory):
    cluster = RayNodes(tmp_path_factory.mktemp("n"))
    try:
        cluster.add("one", "--num-cpus=1")
        cluster.wait()
        env = cluster.env | {"RAY_ADDRESS": cluster.address, "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.5"}
        command = [sys.executable, "-c", DRIVER, str(tmp_path)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        driver = subprocess.Popen(command, env=env, text=True, **pipes)
        run_id = driver.stdout.readline().split()[1]

        def count(name, key="cpu_utilization_percentage"):
            """Values that a node has given, by its name; of the driver's machine by none."""
            assert driver.poll() is None
            ids = {group: id for id, group in known.items()}
            part = f"{socket.gethostname()}-{ids[name][:6]}/" if name else ""
            with sqlite3.connect(tmp_path / "mlflow.db") as connection:
                query = "SELECT COUNT(*), MAX(value) FROM metrics WHERE run_uuid = ? AND key = ?"
                return connection.execute(query, (run_id, f"system/{part}{key}")).fetchone()

        def samplers():
            return [row for row in cluster.listing("actors") if row["state"] == "ALIVE"]

        known = cluster.names()
        until(lambda: count("one")[0] > 2 and count("head")[0] > 2)
        total = psutil.virtual_memory()
        for name in ("one", "head", None):
            used = count(name, "system_memory_usage_percentage")[1]
            assert used == pytest.approx(100 * total.used / total.total, abs=15)
            assert count(name, "network_receive_megabytes")[0] and count(name, "disk_usage_percentage")[0]
        cluster.add("two", "--num-cpus=1")  # joins later
        cluster.wait()
        known = cluster.names()
        until(lambda: count("two")[0] > 2)
        actors = {known[row["node_id"]]: row for row in samplers()}
        assert set(actors) == {"one", "two"}  # none on the driver's own
        assert not any(row["required_resources"] for row in actors.values())

        os.kill(actors["one"]["pid"], signal.SIGSTOP)  # a node that hangs, and then is lost
        before = count("two")[0]
        until(lambda: count("two")[0] > before + 4)
        cluster.kill("one")
        os.kill(actors["one"]["pid"], signal.SIGKILL)
        before = count("two")[0]
        until(lambda: count("two")[0] > before + 4)  # what was on its way to MLflow has arrived
        gone, before = count("one")[0], count("two")[0]
        until(lambda: count("two")[0] > before + 4)
        assert count("one")[0] == gone
        go_on(driver)  # what is not used is left alone, until it is used
        until(lambda: not samplers())
        before = count("two")[0]
        go_on(driver)
        until(lambda: count("two")[0] > before)
        (sampler,) = samplers()
        os.kill(sampler["pid"], signal.SIGSTOP)  # a node that hangs as the run ends
        before = count(None)[0]
        until(lambda: count(None)[0] > before)
        go_on(driver)
        word, left, seconds, alive = driver.stdout.readline().split()  # nothing was echoed before
        assert (word, left, alive) == ("ENDED", "0", "False") and float(seconds) < 4
        os.kill(sampler["pid"], signal.SIGCONT)
        until(lambda: not samplers())
        out, _ = driver.communicate("\n", timeout=60)
        assert driver.returncode == 0 and not out, out
    finally:
        driver.kill()
        cluster.stop()
