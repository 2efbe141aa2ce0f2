"""How a run's training workers agree: what they do before each step, and errors that only one of them has met.

A worker that stops or fails alone would leave the others in a collective for ever. So the workers vote on each step,
a step ahead (``AgreedBatches``). A vote is a reduction of one integer on the CPU (gloo). It runs while the device works
on the step before, and no worker waits for it in a steady run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pipelines.runs.errors import AgreedError
from posmlp.errors import UserError
from posmlp.learn.parallel import world_size
from posmlp.video.batch import Batch

T = TypeVar("T")


class Action(IntEnum):
    """What a worker wants to do before its next step. The workers do the largest of all requested actions."""

    CONTINUE = 0
    SAVE = 1  # a checkpoint, then go on
    STOP = 2  # a checkpoint, then end
    FAIL = 3


class Vote:
    """A vote of all workers. It starts here, and ends in the background. Collective: every rank starts the same votes.

    Args:
        action: what this worker requests.
        error: why, if it requests ``FAIL``.
    """

    def __init__(self, action: Action, error: UserError | None = None):
        self.error, self.largest = error, torch.tensor(int(action))
        self.work = dist.all_reduce(self.largest, dist.ReduceOp.MAX, async_op=True) if world_size() > 1 else None

    def result(self) -> Action:
        """The largest requested action, once all workers have started this vote.

        Raises:
            AgreedError: a worker requested ``FAIL``; on all workers.
        """
        if self.work:
            self.work.wait()
        action = Action(int(self.largest))
        if action == Action.FAIL:
            raise AgreedError(str(self.error) if self.error else "another worker failed") from self.error
        return action


class AgreedBatches:
    """A worker's batches, of which each is used by all workers or by none.

    A worker votes on a batch when it has the batch. It takes the batch of step k + 1 and starts the vote on it before
    step k starts. Call ``action`` and ``take`` in turn, and stop where ``action`` is ``STOP``.

    Args:
        batches: this worker's batches.
        count: how many batches to take, the same on all workers. What comes after them, such as an error, is not asked
            for: the others would not vote on it.
        request: what this worker wants to do before the next step.
        fail: called with the reason if this worker has no batch, before the others learn that it fails.
    """

    def __init__(
        self, batches: Iterator[Batch], count: int, request: Callable[[], Action], fail: Callable[[str], None]
    ):
        self.batches, self.count, self.request, self.fail = batches, count, request, fail
        self.following: tuple[Batch | None, Vote] | None = None  # None: not asked for yet, or there is none

    def action(self) -> Action:
        """What all workers do before the next step.

        Raises:
            AgreedError: a worker has failed; on all workers.
        """
        if self.following is None:
            self.prepare()
        if self.following is None:
            raise RuntimeError("there is no further batch to agree on")
        return self.following[1].result()

    def take(self) -> Batch:
        """The batch of the next step; it also prepares the one after it. Call ``action`` first."""
        if self.following is None or self.following[0] is None:
            raise RuntimeError("ask for the action before the batch")
        batch = self.following[0]
        self.prepare()
        return batch

    def prepare(self) -> None:
        """Take the following batch, and start the vote on it. Waits until the batch is there."""
        self.following = None
        if not self.count:
            return
        self.count -= 1
        try:
            batch = next(self.batches, None)
        except UserError as error:
            self.fail(str(error))  # first, as the other workers do not know the reason
            self.following = None, Vote(Action.FAIL, error)
            return
        if batch is not None:
            self.following = batch, Vote(self.request())


def on_first_worker(function: Callable[[], T]) -> T:
    """Call a function on the first worker, and return its result on all workers.

    Raises:
        AgreedError: the function raised a ``UserError``; on all workers.
    """
    result: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result[0] = function()
        except UserError as error:
            result[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    if result[1]:
        raise AgreedError(result[1])
    return result[0]
