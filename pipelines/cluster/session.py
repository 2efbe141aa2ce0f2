"""Connect to a Ray cluster or start a local one, and handle stop signals."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from pipelines.cluster.ray_internals import listen_on_loopback

logger = logging.getLogger(__name__)

# By default glibc returns every large block to the system and requests a new one for the next tensor. A quarter of a
# training step on the CPU is then page faults. With these settings workers keep freed memory. One arena, because the
# training thread's own arena would return it.
WORKER_ENV = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_ARENA_MAX": "1",
}


CUBLAS_ENV = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # cuBLAS is deterministic only with it (train.deterministic)


def start_ray(**options: Any) -> None:
    """Connect to the cluster (``RAY_ADDRESS``, or one on this machine), else start a local Ray with ``options``.

    All processes of a Ray started here listen on loopback only. Ray's default does this on macOS and Windows only, and
    it advertises an external address of this machine, on which nothing of this Ray listens.
    """
    listen_on_loopback()
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # a report waits for the next health check
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # saves a process; lost nodes are noticed anyway
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # runs on Ray's dashboard; one actor for all runs
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.WARNING, **options)


@contextmanager
def stop_on_signal(stop: Callable[[], object]) -> Iterator[list[int]]:
    """Call ``stop`` on the first SIGINT or SIGTERM, and raise ``KeyboardInterrupt`` on the second.

    Only the main thread receives signals; in another thread this does nothing.

    Yields:
        the signals received so far.
    """
    received: list[int] = []

    def handle(signum: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signum)
        stop()
        logger.warning("%s: saving and stopping; send it again to exit at once", signal.Signals(signum).name)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
