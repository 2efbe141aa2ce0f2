"""The channel between a run's driver and its workers: an actor on the driver's node that ends with the driver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.training.messages import WorkerEvent


@dataclass(frozen=True)
class Registration:
    """What a new worker group learns when it registers.

    Attributes:
        previous_world_size: of the worker group before it; 0 for the first group.
        losses: the number of restarts after a loss of workers.
        ended: the run has failed or was asked to stop, so the group must not train.
    """

    previous_world_size: int
    losses: int
    ended: bool


class RunChannel:
    """Carries events to the driver, and stop requests and failures between the driver and the workers."""

    def __init__(self) -> None:
        self.events: list[WorkerEvent] = []
        self.stopping = False
        self.reason = ""
        self.losses = 0
        self.world_size = 0

    def register_workers(self, world_size: int) -> Registration:
        """Register a new worker group, and count a loss if it is not larger than the previous one.

        Ray does not report why it restarts workers. A larger group means that the cluster has grown.
        """
        previous, self.world_size = self.world_size, world_size
        self.losses += 0 < world_size <= previous
        return Registration(previous, self.losses, self.stopping or bool(self.reason))

    def send(self, event: WorkerEvent) -> None:
        """Queue an event for the driver."""
        self.events.append(event)

    def receive(self) -> list[WorkerEvent]:
        """Return and remove all queued events."""
        events, self.events = self.events, []
        return events

    def fail(self, reason: str) -> None:
        """Mark the run as failed for good: no restart would help. The first reason is kept."""
        self.reason = self.reason or reason

    def failure(self) -> str:
        """The reason why the run has failed; empty if it has not."""
        return self.reason

    def request_stop(self) -> None:
        """Ask the workers to save a checkpoint and stop."""
        self.stopping = True

    def stop_requested(self) -> bool:
        """Return whether the workers should save a checkpoint and stop."""
        return self.stopping


def open_channel() -> ActorHandle:
    """Start a ``RunChannel`` actor on this node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(RunChannel)
    return actor.options(num_cpus=0, scheduling_strategy=here).remote()
