"""Connect to a Ray cluster or start a local one."""

from __future__ import annotations

import atexit
import logging
import os
import signal
from contextlib import suppress
from typing import Any

import ray

from pipelines.cluster.address import (
    RayChoice,
    choose_ray,
    describe,
    explain_ray_error,
    free_shared_memory,
    shared_memory_warning,
    start_timed_out,
    token_without_home,
)
from pipelines.cluster.ray_internals import listen_on_loopback, shielded_start, silence_start
from pipelines.cluster.signals import hold_signals, raise_held

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

    One line says which. All processes of a Ray started here listen on loopback only. Ray's default does this on macOS
    and Windows only, and it advertises an external address of this machine, on which nothing of this Ray listens.

    Raises:
        RayUnavailable: there is no such cluster, it cannot be joined, or Ray cannot be started here.
        SignalInterrupt: a signal came while Ray started.
    """
    listen_on_loopback()
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # saves a process; lost nodes are noticed anyway
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # runs on Ray's dashboard; one actor for all runs
    if ray.is_initialized():
        announce(RayChoice(ray.get_runtime_context().gcs_address))
        return
    choice = choose_ray(options.pop("address", None))
    if choice.notice:
        logger.warning("Ray: %s", choice.notice)
    if choice.address is None:
        token_without_home()
    free = free_shared_memory()
    silence_start()  # the lines below say the same
    with hold_signals() as held:
        for attempt in (1, 2):
            try:
                with shielded_start():
                    ray.init(address=choice.init_address, log_to_driver=False, logging_level=logging.WARNING, **options)
                break
            except Exception as error:  # of the network, the token, the versions, the disk
                with suppress(Exception):  # what has started of it ends
                    ray.shutdown()
                raise_held(held)
                if choice.address is not None or attempt == 2 or not start_timed_out(error):
                    raise explain_ray_error(error, choice) from error
                logger.warning("Ray did not start in time on this machine; it is tried once more")
    for signum in (signal.SIGINT, signal.SIGTERM):  # Ray's end, at exit, takes seconds: a signal then ends this at once
        atexit.register(signal.signal, signum, signal.SIG_DFL)
    raise_held(held)
    announce(choice)
    store = ray.cluster_resources().get("object_store_memory", 0.0)
    if choice.address is None and (warning := shared_memory_warning(free, store)):
        logger.warning("%s", warning)


announced: set[str] = set()  # addresses of the Rays that this process has named in its log


def announce(choice: RayChoice) -> None:
    """Log which Ray this process uses, once."""
    address = ray.get_runtime_context().gcs_address
    if address not in announced:
        announced.add(address)
        logger.info("%s", describe(choice, ray.nodes()))
