"""Notices that a machine is about to be taken away: spot machines, and pods that Kubernetes evicts.

Ray marks such a node as draining: when Kubernetes ends its pod (the SIGTERM that ``ray start --block`` gets), and when
``ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION`` asks for it.

Ray Train has a watcher of its own, which costs a process in every run. It tells only Ray Train's workers, through a
collective that all of them must call equally often. A run's driver asks Ray itself, so trials that train in their own
process learn of it too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import ray

from pipelines.cluster.ray_internals import draining_nodes

POLL_S = 2.0  # a notice comes 25 to 120 s before the end


class PreemptionWatch:
    """Tells a driver which nodes are about to be taken away.

    Attributes:
        own: id of the driver's node.
    """

    def __init__(self) -> None:
        self.own = ray.get_runtime_context().get_node_id()
        self.next_poll = 0.0

    def poll(self) -> Mapping[str, str]:
        """The nodes that are about to be taken away: a description of each by node id. Asks Ray every ``POLL_S``."""
        if time.monotonic() < self.next_poll:
            return {}
        self.next_poll = time.monotonic() + POLL_S
        try:
            return describe_notices(draining_nodes(), time.time())
        except Exception:  # Ray's head does not answer at the moment; the next poll asks again
            return {}


def describe_notices(deadlines: Mapping[str, int], now: float) -> dict[str, str]:
    """Describe nodes that are about to be taken away: ``the machine 10.0.0.7 is taken away in 90 s``.

    Args:
        deadlines: as ``draining_nodes``.
        now: UNIX time in seconds.
    """
    if not deadlines:
        return {}
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    return {
        node: f"the machine {addresses.get(node, node)} is taken away"
        + (f" in {max(0.0, deadline / 1e3 - now):.0f} s" if deadline else " soon")
        for node, deadline in deadlines.items()
    }
