"""The channel between a run's driver and its workers.

Workers in other processes reach it through an actor on the driver's node, which ends with the driver. A worker in the
driver's own process shares the object.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.training.messages import WorkerEvent

STOP_POLL_S = 0.5  # between two questions of a worker to another process, whether a stop is requested


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
    """Carries events to the driver, and stop requests and failures between the driver and the workers.

    The driver and a worker may use it from two threads of a process.
    """

    def __init__(self) -> None:
        self.events: deque[WorkerEvent] = deque()
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
        return [self.events.popleft() for _ in range(len(self.events))]

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

    def close(self) -> None:
        """End the channel: nothing is left to end."""


class RemoteChannel:
    """A ``RunChannel`` in an actor, with the same methods. It can be sent to workers in other processes."""

    def __init__(self, actor: ActorHandle):
        self.actor = actor
        self.stop_reply: ray.ObjectRef | None = None  # of the question that is not answered yet
        self.stop_asked_at = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteChannel, (self.actor,)

    def register_workers(self, world_size: int) -> Registration:
        return cast(Registration, ray.get(self.actor.register_workers.remote(world_size)))

    def send(self, event: WorkerEvent) -> None:
        ray.get(self.actor.send.remote(event))

    def receive(self) -> list[WorkerEvent]:
        return cast(list[WorkerEvent], ray.get(self.actor.receive.remote()))

    def fail(self, reason: str) -> None:
        ray.get(self.actor.fail.remote(reason))

    def failure(self) -> str:
        return str(ray.get(self.actor.failure.remote()))

    def request_stop(self) -> None:
        self.actor.request_stop.remote()  # a signal's handler calls this, so it does not wait

    def stop_requested(self) -> bool:
        """As ``RunChannel.stop_requested``. Asks the actor now and then, and does not wait for the answer."""
        if self.stop_reply is None and time.perf_counter() - self.stop_asked_at > STOP_POLL_S:
            self.stop_reply, self.stop_asked_at = self.actor.stop_requested.remote(), time.perf_counter()
        if self.stop_reply is None or not ray.wait([self.stop_reply], timeout=0)[0]:
            return False
        answer, self.stop_reply = ray.get(self.stop_reply), None
        return bool(answer)

    def close(self) -> None:
        ray.kill(self.actor)


Channel = RunChannel | RemoteChannel


def open_channel() -> RemoteChannel:
    """Start a ``RunChannel`` actor on this node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(RunChannel)
    return RemoteChannel(actor.options(num_cpus=0, scheduling_strategy=here).remote())
