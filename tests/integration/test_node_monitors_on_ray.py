"""System metrics of nodes that join, hang and are lost."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys

import psutil
import pytest

from tests.helpers.ray_nodes import RayNodes
from tests.helpers.waiting import until

DRIVER = """
import logging, os, sys, time
from pathlib import Path
ours = os.fdopen(os.dup(1), "w", 1)
os.dup2(2, 1)  # Ray prints about lost nodes at any time; keep that apart
import ray
from pipelines.tracking import node_monitors
from pipelines.tracking.journal import Journal
from pipelines.tracking.tracker import Tracker
from posmlp.config import load_recipe
folder = Path(sys.argv[1])
logging.getLogger("pipelines").setLevel(logging.INFO)
logging.getLogger("pipelines").addHandler(logging.StreamHandler(ours))
ray.init(log_to_driver=False)
config = load_recipe("demo", ["name=small", f"train.storage={folder}"])
node_monitors.UNUSED_S = 3600.0  # on a busy machine the first minute is over before all nodes are there
tracker = Tracker.open(config, {}, journal=Journal(folder / "journal.jsonl"))
print("STARTED", tracker.run_id, file=ours)
sys.stdin.readline()
node_monitors.UNUSED_S = 0.4
sys.stdin.readline()
work = ray.remote(lambda: time.sleep(600)).remote()
sys.stdin.readline()
begun = time.monotonic()
left = tracker.close("FINISHED")
print("ENDED", left, time.monotonic() - begun, tracker.system_metrics.is_alive(), file=ours)
sys.stdin.readline()
"""


def continue_driver(driver):
    driver.stdin.write("\n")
    driver.stdin.flush()


@pytest.mark.slow
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
            """Number and maximum of a node's values, by its name; None for the driver's own ``system/`` metrics."""
            assert driver.poll() is None
            ids = {group: id for id, group in known.items()}
            part = f"{socket.gethostname()}-{ids[name][:6]}/" if name else ""
            with sqlite3.connect(tmp_path / "mlflow.db") as connection:
                query = "SELECT COUNT(*), MAX(value) FROM metrics WHERE run_uuid = ? AND key = ?"
                return connection.execute(query, (run_id, f"system/{part}{key}")).fetchone()

        def samplers():
            return [row for row in cluster.listing("actors") if row["state"] == "ALIVE"]

        known = cluster.names()
        memory = []

        def sampled():
            memory.append(psutil.virtual_memory().used / psutil.virtual_memory().total)
            return count("one")[0] > 2 and count("head")[0] > 2

        until(sampled)
        for name in ("one", "head", None):  # other processes of this machine may need memory, or give it back
            used = count(name, "system_memory_usage_percentage")[1]
            assert 100 * min(memory) - 15 <= used <= 100 * max(memory) + 15
            assert count(name, "network_receive_megabytes")[0] and count(name, "disk_usage_percentage")[0]
        cluster.add("two", "--num-cpus=1")  # joins later
        cluster.wait()
        known = cluster.names()
        until(lambda: count("two")[0] > 2)
        actors = {known[row["node_id"]]: row for row in samplers()}
        assert set(actors) == {"one", "two"}  # none on the driver's node
        assert not any(row["required_resources"] for row in actors.values())

        os.kill(actors["one"]["pid"], signal.SIGSTOP)  # a node that hangs, and then is lost
        before = count("two")[0]
        until(lambda: count("two")[0] > before + 4)
        cluster.kill("one")
        os.kill(actors["one"]["pid"], signal.SIGKILL)
        before = count("two")[0]
        until(lambda: count("two")[0] > before + 4)  # values that were on their way to MLflow have arrived
        gone, before = count("one")[0], count("two")[0]
        until(lambda: count("two")[0] > before + 4)
        assert count("one")[0] == gone
        continue_driver(driver)  # an unused node is not sampled until it is used again
        until(lambda: not samplers())
        before = count("two")[0]
        continue_driver(driver)
        until(lambda: count("two")[0] > before)
        (sampler,) = samplers()
        os.kill(sampler["pid"], signal.SIGSTOP)  # a node that hangs as the run ends
        before = count(None)[0]
        until(lambda: count(None)[0] > before)
        continue_driver(driver)
        word, left, seconds, alive = driver.stdout.readline().split()  # nothing was logged before
        assert (word, left, alive) == ("ENDED", "0", "False") and float(seconds) < 4
        os.kill(sampler["pid"], signal.SIGCONT)
        until(lambda: not samplers())
        out, _ = driver.communicate("\n", timeout=60)
        assert driver.returncode == 0 and not out, out
    finally:
        driver.kill()
        cluster.stop()
