"""What passes between a run's driver and its workers: an actor on the driver's node, gone with the driver."""

from __future__ import annotations

from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class RunChannel:
    """Events for the driver, and the driver's wish to stop for the workers."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.stopping = False
        self.failure = ""
        self.losses = 0
        self.world = 0

    def begin(self, world: int) -> tuple[int, int, bool]:
        """A set of so many workers has started; returns how many there were before it, how often workers were lost, and
        whether there is nothing left to do.

        Ray does not tell why it starts anew: more workers than before mean that the cluster has grown.
        """
        before, self.world = self.world, world
        self.losses += 0 < world <= before
        return before, self.losses, bool(self.failure)

    def tell(self, event: dict[str, Any]) -> None:
        """Something for the driver: its ``kind`` and what belongs to it."""
        self.events.append(event)

    def take(self) -> list[dict[str, Any]]:
        """All events since the last call."""
        events, self.events = self.events, []
        return events

    def fail(self, reason: str) -> None:
        """The run cannot go on, whoever tries; the first reason counts."""
        self.failure = self.failure or reason

    def reason(self) -> str:
        """Why the run cannot go on; empty if nothing is wrong."""
        return self.failure

    def stop(self) -> None:
        """The workers shall save and end."""
        self.stopping = True

    def shall_stop(self) -> bool:
        """Whether ``stop`` was called."""
        return self.stopping


def open_channel() -> ActorHandle:
    """A channel on this node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(RunChannel).remote()
