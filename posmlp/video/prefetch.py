"""Batches ahead of their use: a thread makes each batch and copies it to the device while earlier steps run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from queue import Empty, SimpleQueue
from typing import NamedTuple, TypeVar

import torch

from posmlp.video.batch import Batch

T = TypeVar("T")
POLL_S = 1.0  # between two calls of ``waiting``
CLOSE_S = 1.0  # how long a close waits for the thread


class Copied(NamedTuple):
    """A batch on the device, and the event after its copy; None: the batch is complete."""

    batch: Batch
    event: torch.cuda.Event | None


def prefetch(
    batches: Iterator[Batch], device: torch.device, ahead: int = 2, waiting: Callable[[float], object] | None = None
) -> Generator[Batch, None, None]:
    """Yield the batches of an iterator in order, on a device.

    From the first ``next`` on, a daemon thread takes the batches from the iterator. For a GPU it pins them and copies
    them on a stream of its own. The stream that is current here when a batch is yielded waits for the copy; the host
    does not. Up to ``ahead`` batches are in work or ready, besides the one that was yielded last.

    The thread closes the iterator. If the iterator is inside its ``next`` when this generator is closed, the thread
    ends after that; neither the close nor the end of the process waits for it.

    Args:
        batches: on the CPU. It is used on the thread alone.
        waiting: called about every second while no batch is ready, with the seconds waited for this one. What it raises
            ends the generator.

    Raises:
        BaseException: what the iterator raises, in place of its batch.
    """
    slots, closed = threading.Semaphore(ahead), threading.Event()
    ready: SimpleQueue[Copied | BaseException | None] = SimpleQueue()
    thread = threading.Thread(
        target=produce, args=(batches, device, slots, closed, ready), name="prefetch", daemon=True
    )
    thread.start()
    try:
        while (found := wait_for(ready, waiting)) is not None:
            if isinstance(found, BaseException):
                raise found
            slots.release()
            if found.event is not None:
                hand_over(found.batch, found.event, device)
            last, found = [found.batch], None
            yield last.pop()  # so that its memory is free as soon as the consumer drops it
    finally:
        closed.set()
        slots.release()
        thread.join(CLOSE_S)


def produce(
    batches: Iterator[Batch],
    device: torch.device,
    slots: threading.Semaphore,
    closed: threading.Event,
    ready: SimpleQueue[Copied | BaseException | None],
) -> None:
    """The thread of ``prefetch``: put each batch, then None or the error that ended the iterator."""
    error = None
    try:
        with side_stream(device):
            while slots.acquire() and not closed.is_set():
                batch = next(batches, None)
                if batch is None:
                    break
                ready.put(copied(batch, device))
                del batch
    except BaseException as problem:
        error = problem
    ready.put(error)
    if isinstance(batches, Generator):
        with suppress(Exception):  # its batches are no longer wanted
            batches.close()


def side_stream(device: torch.device) -> AbstractContextManager[object]:
    """A new stream of a GPU, and that GPU, as the current ones of this thread."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def copied(batch: Batch, device: torch.device) -> Copied:
    """Queue the copy of a batch on the current stream."""
    if device.type != "cuda":
        return Copied(batch.to(device), None)
    # PyTorch uses the pinned memory again only after the copy.
    return Copied(batch.pin_memory().to(device), torch.cuda.current_stream(device).record_event())


def hand_over(batch: Batch, event: torch.cuda.Event, device: torch.device) -> None:
    """Make the current stream wait for the copy of a batch."""
    current = torch.cuda.current_stream(device)
    current.wait_event(event)
    for tensor in batch.tensors().values():
        if tensor.device.type == "cuda":
            tensor.record_stream(current)  # its memory is used again only after this stream's work


def wait_for(ready: SimpleQueue[T], waiting: Callable[[float], object] | None) -> T:
    """The next item of a queue."""
    if waiting is None:
        return ready.get()
    start = time.monotonic()
    while True:
        try:
            return ready.get(timeout=POLL_S)
        except Empty:
            waiting(time.monotonic() - start)


def in_background(function: Callable[[], T]) -> Future[T]:
    """Call a function on a daemon thread, for which the end of the process does not wait."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, name="background", daemon=True).start()
    return future
