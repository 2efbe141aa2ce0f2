"""CPU, memory, disk, network and GPU of the driver's machine and of the cluster's other nodes, by MLflow's monitors."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor
from ray._private.state import available_resources_per_node
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ANSWER_S = 2.0  # for all nodes to answer, once
UNUSED_S = 60.0  # after which a node of which nothing is used is left alone
LOOK_S = 0.1  # between two looks at whether the run ends


class Machine:
    """The machine that this process is on: a thread's in the driver, or an actor on another node."""

    def __init__(self) -> None:
        self.monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        for gpu in (GPUMonitor, ROCMMonitor):
            with suppress(Exception):  # raises what it likes where there is no such GPU
                self.monitors.append(gpu())
                break

    def sample(self) -> dict[str, float]:
        """MLflow's names and values, as of now; what went over the network, since this began."""
        values: dict[str, float] = {}
        for monitor in self.monitors:
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return values


class Nodes:
    """An actor on each node of the cluster but the driver's, which takes no CPU to speak of; on one machine, none.

    An actor keeps an autoscaler from ending its node, and so would any task now and then. So nodes are sampled while
    something of them is used, and left alone after a minute of which that is not so.
    """

    def __init__(self) -> None:
        self.samplers: dict[str, ActorHandle] = {}
        self.asked: dict[str, ray.ObjectRef] = {}  # a node that hangs is asked once
        self.used: dict[str, float] = {}  # when something of each was last used; the nodes that are there

    def watch(self) -> list[dict[str, Any]]:
        """Start actors where nodes have come, and forget those that have gone; returns the live nodes."""
        alive = [node for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else []
        available = available_resources_per_node() if len(alive) > 1 else {}
        now, before = time.monotonic(), self.used
        self.used = {}
        for node in alive:
            id = node["NodeID"]
            self.used[id] = now if in_use(node["Resources"], available.get(id, {})) else before.get(id, now)
        wanted = {id for id, used in self.used.items() if now - used < UNUSED_S} if len(alive) > 1 else set()
        wanted -= {ray.get_runtime_context().get_node_id()} if wanted else set()
        for id in self.samplers.keys() - wanted:
            self.forget(id)
        for id in wanted - self.samplers.keys():
            there = NodeAffinitySchedulingStrategy(id, soft=False)
            self.samplers[id] = ray.remote(num_cpus=0, scheduling_strategy=there)(Machine).remote()
        return alive

    def sample(self, own: Mapping[str, float], ending: threading.Event) -> dict[str, float]:
        """``NODE/METRIC`` and its value, for every node that answers now, where there are several.

        Args:
            own: of the driver's machine.
            ending: once it is set, no answer is waited for.
        """
        alive = self.watch()
        if len(alive) < 2:
            return {}
        new = [id for id in self.samplers if id not in self.asked]
        self.asked |= {id: self.samplers[id].sample.remote() for id in new}
        deadline, waiting = time.monotonic() + ANSWER_S, [self.asked[id] for id in new]
        while waiting and time.monotonic() < deadline and not ending.is_set():
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=LOOK_S, fetch_local=False)
        found = {ray.get_runtime_context().get_node_id(): own}
        for id, answer in [*self.asked.items()]:
            if not ray.wait([answer], timeout=0)[0]:
                continue
            del self.asked[id]
            try:
                found[id] = ray.get(answer, timeout=ANSWER_S)
            except Exception:  # of a node that is lost, or cannot import this: if it is there next time, it is new
                self.forget(id)
        called = names(alive)
        return {f"{called[id]}/{key}": value for id, values in found.items() for key, value in values.items()}

    def forget(self, id: str) -> None:
        """An actor ends with the last that is known of it."""
        self.samplers.pop(id, None)
        self.asked.pop(id, None)

    def close(self) -> None:
        """End all actors, without waiting for them."""
        self.samplers.clear()
        self.asked.clear()


def in_use(total: Mapping[str, float], available: Mapping[str, float]) -> bool:
    """Whether tasks or actors have some of a node's CPUs, GPUs and the like; what objects take does not count."""
    return any(available.get(name, 0.0) < count for name, count in total.items() if name != "object_store_memory")


def names(nodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What each node is called, by its id: its group, where it has one, and its host; a part of its id where others
    are called so too."""
    called = {}
    for node in nodes:
        group = node.get("Labels", {}).get("ray.io/node-group", "")
        called[node["NodeID"]] = "-".join(filter(None, (group, node["NodeManagerHostname"])))
    counts = Counter(called.values())
    return {id: name if counts[name] == 1 else f"{name}-{id[:6]}" for id, name in called.items()}
