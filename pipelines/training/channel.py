"""The channel between a run's driver and its workers.

Workers in other processes reach it through an actor on the driver's node, which ends with the driver. A worker in the
driver's own process shares the object.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.cluster.capacity import RUN_ACTOR
from pipelines.runs.errors import RunError
from pipelines.training.messages import WorkerEvent

STOP_POLL_S = 0.5  # between two questions of a worker to another process, whether a stop is requested
START_LIMIT_S = 300.0  # for the channel's process on the driver's node, which starts in seconds


@dataclass(frozen=True)
class Registration:
    """What a new worker group learns when it registers.

    Attributes:
        previous_world_size: of the worker group before it; 0 for the first group.
        losses: the number of restarts after a loss of workers.
        ended: the run has failed or was asked to stop, so the group must not train.
        preempted: the group before it has ended because a machine of its workers was to be taken away.
    """

    previous_world_size: int
    losses: int
    ended: bool
    preempted: bool = False


@dataclass(frozen=True)
class WorkersState:
    """What the driver asks of its workers.

    Attributes:
        failure: why the run has failed; empty if it has not.
        preempted: the workers were asked to save and end because a machine is taken away, and no group has started
            since.
        losses: as in ``Registration``.
        started: a worker group has started.
        silent_s: seconds since the first worker was last heard of, or since the run began.
    """

    failure: str
    preempted: bool
    losses: int
    started: bool
    silent_s: float


class RunChannel:
    """Carries events to the driver, and stop requests and failures between the driver and the workers.

    The driver and a worker may use it from two threads of a process.
    """

    def __init__(self) -> None:
        self.events: deque[WorkerEvent] = deque()
        self.stopping = False
        self.preempted = False
        self.reason = ""
        self.losses = 0
        self.world_size = 0
        self.nodes: frozenset[str] = frozenset()
        self.heard_at = time.monotonic()

    def register_workers(self, world_size: int, nodes: Iterable[str] = ()) -> Registration:
        """Register a new worker group, and count a loss if it is not larger than the previous one.

        Ray does not report why it restarts workers. A larger group means that the cluster has grown. A group that was
        asked to end because a machine is taken away is no loss.

        Args:
            nodes: ids of the workers' nodes.
        """
        previous, self.world_size = self.world_size, world_size
        preempted, self.preempted = self.preempted, False
        self.losses += 0 < world_size <= previous and not preempted
        self.nodes, self.heard_at = frozenset(nodes), time.monotonic()
        return Registration(previous, self.losses, self.stopping or bool(self.reason), preempted)

    def preempt(self, nodes: Iterable[str]) -> list[str]:
        """Ask the workers to save a checkpoint and end if one of them is on a node that is about to be taken away.

        Args:
            nodes: ids of such nodes.

        Returns:
            those that have workers; empty if the workers were asked before.
        """
        losing = sorted(self.nodes.intersection(nodes))
        if losing:
            self.preempted, self.nodes = True, frozenset()
        return losing

    def send(self, event: WorkerEvent) -> None:
        """Queue an event for the driver."""
        self.events.append(event)

    def receive(self) -> list[WorkerEvent]:
        """Return and remove all queued events."""
        return [self.events.popleft() for _ in range(len(self.events))]

    def fail(self, reason: str) -> None:
        """Mark the run as failed for good: no restart would help. The first reason is kept."""
        self.reason = self.reason or reason

    def state(self) -> WorkersState:
        """How the workers are, for the driver."""
        silent_s = time.monotonic() - self.heard_at
        return WorkersState(self.reason, self.preempted, self.losses, self.world_size > 0, silent_s)

    def request_stop(self) -> None:
        """Ask the workers to save a checkpoint and stop."""
        self.stopping = True

    def stop_requested(self) -> bool:
        """Return whether the workers should save a checkpoint and end."""
        self.heard_at = time.monotonic()
        return self.stopping or self.preempted

    def close(self) -> None:
        """End the channel: nothing is left to end."""


class RemoteChannel:
    """A ``RunChannel`` in an actor, with the same methods. It can be sent to workers in other processes."""

    def __init__(self, actor: ActorHandle):
        self.actor = actor
        self.stopping = False  # the last answer to ``listen``

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteChannel, (self.actor,)

    def register_workers(self, world_size: int, nodes: Iterable[str] = ()) -> Registration:
        registration = cast(Registration, ray.get(self.actor.register_workers.remote(world_size, list(nodes))))
        threading.Thread(target=self.listen, daemon=True).start()
        return registration

    def listen(self) -> None:
        """Ask the driver again and again whether to stop, in a thread of the first worker.

        That also tells the driver that this process lives, whatever the training thread does. If the driver is gone,
        the workers save and end, as far as Ray lets them.
        """
        while True:
            try:
                self.stopping = bool(ray.get(self.actor.stop_requested.remote()))
            except ray.exceptions.ActorUnavailableError:
                pass  # the network; Ray says when the driver is gone
            except ray.exceptions.RayError:
                self.stopping = True
                return
            time.sleep(STOP_POLL_S)

    def preempt(self, nodes: Iterable[str]) -> list[str]:
        return cast(list[str], ray.get(self.actor.preempt.remote(list(nodes))))

    def send(self, event: WorkerEvent) -> None:
        ray.get(self.actor.send.remote(event))

    def receive(self) -> list[WorkerEvent]:
        return cast(list[WorkerEvent], ray.get(self.actor.receive.remote()))

    def fail(self, reason: str) -> None:
        ray.get(self.actor.fail.remote(reason))

    def state(self) -> WorkersState:
        return cast(WorkersState, ray.get(self.actor.state.remote()))

    def request_stop(self) -> None:
        self.actor.request_stop.remote()  # a signal's handler calls this, so it does not wait

    def stop_requested(self) -> bool:
        """As ``RunChannel.stop_requested``, at most ``STOP_POLL_S`` old; does not wait."""
        return self.stopping

    def close(self) -> None:
        ray.kill(self.actor)


Channel = RunChannel | RemoteChannel


def open_channel() -> RemoteChannel:
    """Start a ``RunChannel`` actor on this node.

    Raises:
        RunError: its process does not start.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(RunChannel)
    name = f"{RUN_ACTOR}{uuid.uuid4().hex}"
    channel = RemoteChannel(actor.options(name=name, num_cpus=0, scheduling_strategy=here).remote())
    try:
        ray.get(channel.actor.state.remote(), timeout=START_LIMIT_S)
    except ray.exceptions.GetTimeoutError as error:
        raise RunError(
            f"Ray has started no process on this machine for {START_LIMIT_S:g} s; its logs say why "
            "(`ray logs raylet.out`). Start Ray again, or free memory"
        ) from error
    return channel
