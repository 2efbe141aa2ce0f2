"""Connect to a Ray cluster or start a local one, and handle stop signals."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray.train
from ray._private import ray_constants

# glibc gives every large block back to the system and takes a fresh one for the next: a quarter of a training step on
# the CPU is then page faults. Workers keep what they have, in one arena: the training thread's own would give it back.
WORKER_ENV = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_ARENA_MAX": "1",
}


CUBLAS_ENV = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # cuBLAS repeats itself only with it (train.deterministic)


def start_ray(**options: Any) -> None:
    """Connect to the cluster (``RAY_ADDRESS``, or one on this machine), else start a local Ray with ``options``.

    All of a Ray started here listens on loopback alone. By itself Ray does so on macOS and Windows only, and it takes
    an address of this machine for the one that others see, which nothing here listens on.
    """
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # a report waits for it
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process more; a lost node is met anyway
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # runs on Ray's dashboard; an actor for all of them
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="WARNING", **options)


@contextmanager
def stop_on_signal(stop: Callable[[], object], echo: Callable[[str], None]) -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM calls ``stop``, a second one interrupts; yields what has come.

    Only the main thread gets signals; elsewhere this does nothing.
    """
    caught: list[int] = []

    def handle(signum: int, _: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(signum)
        stop()
        echo(f"{signal.Signals(signum).name}: saving and stopping; once more to leave at once")

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
