"""System metrics: CPU, memory, disk, network and GPU of the driver's node and of the cluster's other nodes.

MLflow's own monitors do the measuring. The names are MLflow's, behind the prefix ``system/`` or, for a node of a
cluster, ``system/NODE/``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_NODE_ID, MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.cluster.ray_internals import available_resources_per_node
from posmlp.metrics import SYSTEM

logger = logging.getLogger(__name__)

DEFAULT_INTERVAL_S = 10.0  # between two samples; MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL overrides it
ANSWER_TIMEOUT_S = 2.0  # for the answers of all nodes together
UNUSED_S = 60.0  # a node without tasks and actors is sampled for this long
POLL_S = 0.1  # between two checks whether the run ends


class NodeMonitor:
    """Measures the node of this process: in a thread of the driver, or as an actor on another node."""

    def __init__(self) -> None:
        self.monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        for gpu_monitor in (GPUMonitor, ROCMMonitor):
            with suppress(Exception):  # without such a GPU the constructor raises, and not always the same type
                self.monitors.append(gpu_monitor())
                break

    def sample(self) -> dict[str, float]:
        """Return the current value of each of MLflow's metrics. Network traffic counts from the monitor's start."""
        values: dict[str, float] = {}
        for monitor in self.monitors:
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return values


class ClusterMonitor:
    """Measures the other nodes of a cluster with a ``NodeMonitor`` actor on each. The actors reserve no CPU.

    An actor, or a task now and then, keeps an autoscaler from removing its node. So a node has an actor only while
    something else uses the node, and for ``UNUSED_S`` seconds after that.

    Attributes:
        samplers: the actor of each watched node, by node id.
        requests: the sample that each node still owes. A node that hangs gets no second request.
        last_used: when each live node last had tasks or actors, in seconds of ``time.monotonic``.
    """

    def __init__(self) -> None:
        self.samplers: dict[str, ActorHandle] = {}
        self.requests: dict[str, ray.ObjectRef] = {}
        self.last_used: dict[str, float] = {}

    def update_samplers(self) -> list[dict[str, Any]]:
        """Start actors on nodes that joined or are used again, drop the unused and the lost. Returns the live nodes."""
        alive = [node for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else []
        available = available_resources_per_node() if len(alive) > 1 else None
        now, before = time.monotonic(), self.last_used
        self.last_used = {}
        for node in alive:
            id = node["NodeID"]
            is_used = in_use(node["Resources"], (available or {}).get(id, {}))
            self.last_used[id] = now if is_used else before.get(id, now)
        wanted: set[str] = set()
        if available is not None:  # there are other nodes, and this Ray reports what they do
            own = ray.get_runtime_context().get_node_id()
            wanted = {id for id, used in self.last_used.items() if now - used < UNUSED_S} - {own}
        for id in self.samplers.keys() - wanted:
            self.drop(id)
        monitor_class: Any = ray.remote(NodeMonitor)
        for id in wanted - self.samplers.keys():
            on_node = NodeAffinitySchedulingStrategy(id, soft=False)
            self.samplers[id] = monitor_class.options(num_cpus=0, scheduling_strategy=on_node).remote()
        return alive

    def sample(self, own: Mapping[str, float], stopping: threading.Event) -> dict[str, float]:
        """Return ``NODE/METRIC`` and its value for each node that answers in time; nothing if there is only one node.

        Args:
            own: values of the driver's node.
            stopping: once it is set, the call no longer waits for answers.
        """
        alive = self.update_samplers()
        if len(alive) < 2:
            return {}
        new = [id for id in self.samplers if id not in self.requests]
        self.requests |= {id: self.samplers[id].sample.remote() for id in new}
        deadline, waiting = time.monotonic() + ANSWER_TIMEOUT_S, [self.requests[id] for id in new]
        while waiting and time.monotonic() < deadline and not stopping.is_set():
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S, fetch_local=False)
        samples = {ray.get_runtime_context().get_node_id(): own}
        for id, request in [*self.requests.items()]:
            if not ray.wait([request], timeout=0)[0]:
                continue
            del self.requests[id]
            try:
                samples[id] = ray.get(request, timeout=ANSWER_TIMEOUT_S)
            except Exception:  # the node is lost or cannot import this module; it gets a new actor if it is alive
                self.drop(id)
        names = node_names(alive)
        return {f"{names[id]}/{key}": value for id, values in samples.items() for key, value in values.items()}

    def drop(self, id: str) -> None:
        """Forget a node. Its actor ends, because this was the last reference to it."""
        self.samplers.pop(id, None)
        self.requests.pop(id, None)

    def close(self) -> None:
        """End all actors without waiting for them."""
        self.samplers.clear()
        self.requests.clear()


class SystemMetrics(threading.Thread):
    """Samples the driver's node and, in a cluster, all nodes, and logs the values at a fixed interval.

    MLflow's own thread for this ends when MLflow once does not answer. This one only needs ``log``.
    """

    def __init__(
        self, log: Callable[[Mapping[str, float], int], None], first_step: int, cluster: ClusterMonitor | None
    ):
        """
        Args:
            log: takes the values by metric name, and their MLflow step.
            first_step: step of the first sample.
            cluster: the other nodes; None to sample only the driver's node.
        """
        super().__init__(daemon=True, name="system-metrics")
        self.log, self.step = log, first_step
        self.interval = MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or DEFAULT_INTERVAL_S
        node = MLFLOW_SYSTEM_METRICS_NODE_ID.get()
        self.prefix = f"{SYSTEM}{node}/" if node else SYSTEM
        self.node, self.cluster = NodeMonitor(), cluster
        self.warned = False
        self.stopping = threading.Event()

    def run(self) -> None:
        try:
            while not self.stopping.wait(self.interval):
                self.sample()
            self.sample()
        except Exception as error:  # from a GPU driver or psutil; the run must not fail for its system metrics
            logger.warning("System metrics end here: %s", error)
        finally:
            if self.cluster:
                self.cluster.close()

    def sample(self) -> None:
        own = self.node.sample()
        values = {self.prefix + key: value for key, value in own.items()}
        if self.cluster and not self.stopping.is_set():
            try:
                values |= {SYSTEM + key: value for key, value in self.cluster.sample(own, self.stopping).items()}
            except Exception as error:  # the cluster does not answer; the driver's own values are still good
                if not self.warned:
                    self.warned = True
                    logger.warning("System metrics of the other nodes are missing: %s", error)
        self.log(values, self.step)
        self.step += 1

    def stop(self) -> None:
        """Take a last sample of the driver's node and end the thread."""
        self.stopping.set()
        self.join(timeout=5.0)


def in_use(total: Mapping[str, float], available: Mapping[str, float]) -> bool:
    """Return whether tasks or actors hold resources of a node. Memory of the object store does not count."""
    return any(available.get(name, 0.0) < amount for name, amount in total.items() if name != "object_store_memory")


def node_names(nodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return a name for each node id: ``GROUP-HOST`` or ``HOST``, and the start of the id if two nodes share a name."""
    names = {}
    for node in nodes:
        group = node.get("Labels", {}).get("ray.io/node-group", "")
        names[node["NodeID"]] = "-".join(filter(None, (group, node["NodeManagerHostname"])))
    counts = Counter(names.values())
    return {id: name if counts[name] == 1 else f"{name}-{id[:6]}" for id, name in names.items()}
