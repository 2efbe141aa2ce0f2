"""System metrics of this node, the names of nodes, and which of them a run samples."""

import socket

import psutil
import pytest
from mlflow import MlflowClient

from pipelines.tracking.journal import Journal
from pipelines.tracking.node_monitors import NodeMonitor, in_use, node_names
from pipelines.tracking.tracker import Tracker
from pipelines.tracking.uris import PARENT
from posmlp.config import load_recipe


def test_a_monitor_agrees_with_the_operating_system():
    """Other processes of this machine may use memory and network too, so its counters are read before and after."""
    monitor, memory, begun = NodeMonitor(), psutil.virtual_memory(), psutil.net_io_counters().bytes_sent
    found = monitor.sample()
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
    after = psutil.net_io_counters().bytes_sent
    sent = monitor.sample()["network_transmit_megabytes"] - found["network_transmit_megabytes"]
    ended = psutil.net_io_counters().bytes_sent
    assert after - before >= 2e6
    assert (after - before) / 1e6 - 1e-6 <= sent <= (ended - begun) / 1e6 + 1e-6


def node(id, host, **labels):
    return {"NodeID": id, "NodeManagerHostname": host, "Labels": {f"ray.io/{k}": v for k, v in labels.items()}}


def test_a_node_is_named_by_its_group_and_host():
    one = [node("abcdef01", "gpu07"), node("bbcdef01", "gpu08")]
    assert node_names(one) == {"abcdef01": "gpu07", "bbcdef01": "gpu08"}
    grouped = [{**n, "Labels": {"ray.io/node-group": "decode"}} for n in one]
    assert node_names(grouped) == {"abcdef01": "decode-gpu07", "bbcdef01": "decode-gpu08"}
    same = [*one, node("123456789", "gpu07")]
    assert node_names(same) == {"abcdef01": "gpu07-abcdef", "bbcdef01": "gpu08", "123456789": "gpu07-123456"}


def test_memory_of_the_object_store_does_not_count_as_use():
    total = {"CPU": 4.0, "GPU": 1.0, "object_store_memory": 100.0, "node:10.0.0.1": 1.0}
    assert not in_use(total, total | {"object_store_memory": 3.0})
    assert in_use(total, total | {"CPU": 3.5})
    assert in_use(total, {k: v for k, v in total.items() if k != "GPU"})  # all GPUs are taken


def test_only_the_study_samples_the_other_nodes_not_its_trials(tmp_path):
    config = load_recipe("demo", ["name=small", f"train.storage={tmp_path}"])
    trackers = [
        Tracker.open(config, tags, journal=Journal(tmp_path / f"{number}.jsonl"))
        for number, tags in enumerate(({}, {PARENT: "parent", "trial": "0"}))
    ]
    assert [tracker.system_metrics.cluster is not None for tracker in trackers] == [True, False]
    for tracker in trackers:
        assert tracker.close("FINISHED") == 0
        found = MlflowClient(tracker.uri).get_run(tracker.run_id).data.metrics
        assert "system/cpu_utilization_percentage" in found
        assert {key.count("/") for key in found} == {1}  # a single node: no node names
