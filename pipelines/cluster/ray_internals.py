"""Private names of Ray. This is the only module that uses them.

Each name is imported when its feature is needed. A Ray release that moved a name costs that feature, and a warning says
so once; everything else still works. The test of this module says which name has moved.
"""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import ray

from posmlp.processes import shielded_children

logger = logging.getLogger(__name__)

# Each private name, and what happens without it.
WITHOUT = {
    "ray._private.utils.read_ray_address": "the Ray of `ray start` is used only if RAY_ADDRESS names it",
    "ray._private.ray_constants.ENABLE_RAY_CLUSTER": "a local Ray may listen on all network interfaces",
    "ray._private.services.ConsolePopen": "a signal to the command's process group ends Ray before a run is saved",
    "ray._private.utils.set_sigterm_handler": "SIGTERM while Ray starts ends the command with exit code 15",
    "ray._private.state.available_resources_per_node": "MLflow gets no system metrics of the cluster's other nodes",
    "ray._private.state.state": "a run learns that a machine is taken away only when it is gone",
    "ray._private.internal_api.get_state_from_address": "data/object_store_mb and data/spilled_mb are NaN",
    "ray._private.internal_api.get_memory_info_reply": "data/object_store_mb and data/spilled_mb are NaN",
    "ray.data._internal.stats.get_or_create_stats_actor": "Ray Data's stats actor may keep an autoscaled node alive",
    "ray.data._internal.cluster_autoscaler.get_or_create_autoscaling_coordinator": (
        "Ray Data's autoscaling coordinator may keep an autoscaled node alive"
    ),
    "ray.data._internal.usage.collector.usage_collection_disabled": (
        "Ray Data's usage statistics actor may keep an autoscaled node alive"
    ),
    "ray.data._internal.usage.actor.get_or_create_usage_collection_actor": (
        "Ray Data's usage statistics actor may keep an autoscaled node alive"
    ),
    "ray.tune.execution.class_cache.ENV_VARS_TO_PROPAGATE": (
        "Ray Tune copies S3 credentials into the runtime environments of its actors, which Ray logs and lists, and "
        "their C library returns memory that the next training step needs"
    ),
}

WORKER_NAMES = (
    "ray._private.internal_api.get_state_from_address",
    "ray._private.internal_api.get_memory_info_reply",
)

QUIET: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
sweepers: list[subprocess.Popen[bytes]] = []  # kept, as Python warns about a forgotten process

# Loggers that report every execution of Ray Data. An unknown logger name does no harm.
DATA_LOGGERS = ("ray.data", "ray.data._internal.progress")


@cache
def private_name(path: str) -> Any | None:
    """Import a name of ``WITHOUT``. Returns None, and warns the first time, if this Ray does not have it."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        logger.warning("Ray %s has no %s: %s", ray.__version__, path, WITHOUT[path])
        return None


def warn_about_worker_features() -> None:
    """Warn in this process about names that only workers use, because their own warnings stay in Ray's logs."""
    for path in WORKER_NAMES:
        private_name(path)


def listen_on_loopback() -> None:
    """Make a Ray that this process starts listen on loopback only, as Ray itself does on macOS and Windows."""
    if private_name("ray._private.ray_constants.ENABLE_RAY_CLUSTER") is not None:
        constants: Any = importlib.import_module("ray._private.ray_constants")
        constants.ENABLE_RAY_CLUSTER = False


@contextmanager
def shielded_start() -> Iterator[None]:
    """In the block, ``ray.init`` starts processes that signals to this command do not reach, and sets no handler here.

    Each of Ray's processes gets a session of its own, and it and the workers that it starts block the signals that ask
    to stop. Linux kills it when this process ends, whatever ends it. On macOS Ray does that with a process that signals
    the group of this one, so Ray's processes stay in that group there.
    """
    popen: Any = private_name("ray._private.services.ConsolePopen")
    set_handler = private_name("ray._private.utils.set_sigterm_handler")

    def start(command: Sequence[str], **options: Any) -> Any:
        with shielded_children():
            process = popen(command, start_new_session=True, **options)
            if os.path.basename(command[0]) == "raylet":
                sweeper = [sys.executable, "-IS", str(Path(__file__).with_name("sweeper.py")), str(process.pid)]
                sweepers.append(subprocess.Popen(sweeper, start_new_session=True, **QUIET))
        process.terminate = process.kill  # SIGTERM would be blocked
        return process

    with ExitStack() as restore:
        if popen is not None and sys.platform == "linux":
            services: Any = importlib.import_module("ray._private.services")
            services.ConsolePopen = start
            restore.callback(setattr, services, "ConsolePopen", popen)
        if set_handler is not None:
            utils: Any = importlib.import_module("ray._private.utils")
            utils.set_sigterm_handler = lambda handler: None
            restore.callback(setattr, utils, "set_sigterm_handler", set_handler)
        yield


def silence_start() -> None:
    """Suppress Ray's long warnings about its start: a small ``/dev/shm``, several Rays on a machine, a token in use."""
    logging.getLogger("ray._private.services").setLevel(logging.ERROR)  # an unknown logger name does no harm
    logging.getLogger("ray._private.authentication.authentication_token_setup").addFilter(is_no_token_notice)


def is_no_token_notice(record: logging.LogRecord) -> bool:
    """Return False for the record which says that token authentication is on, as Ray's default is."""
    return "Token authentication is enabled" not in record.getMessage()


def recorded_address() -> str | None:
    """The address that the last ``ray start`` on this machine has recorded; None if there is none."""
    function = private_name("ray._private.utils.read_ray_address")
    try:
        return (function() or None) if function else None
    except OSError:  # the file is another user's
        return None


def available_resources_per_node() -> dict[str, dict[str, float]] | None:
    """The unused resources of each node, by node id. None if this Ray does not report them."""
    function = private_name("ray._private.state.available_resources_per_node")
    return None if function is None else function()


def draining_nodes() -> dict[str, int]:
    """The nodes that are about to be taken away, by node id, with their deadlines.

    Ray calls this draining: it starts nothing on these nodes any more. A deadline is UNIX time in milliseconds, 0 if it
    is not known.
    """
    state = private_name("ray._private.state.state")
    return {} if state is None else state.get_draining_nodes()


def object_store_stats() -> Any | None:
    """Statistics of the cluster's object store (Ray's ``ObjectStoreStats``). None if this Ray does not report them.

    Raises:
        Exception: of any kind; the call asks every node.
    """
    state_of, reply_of = map(private_name, WORKER_NAMES)
    if state_of is None or reply_of is None:
        return None
    return reply_of(state_of(ray.get_runtime_context().gcs_address)).store_stats


def place_ray_data_actors() -> None:
    """Start the actors that all Ray Data executions of a cluster share on this process's node, which submits the run.

    These actors start on the first node that needs them and outlive every run, and an autoscaler does not remove a node
    with an actor on it. Without this call they could keep a training node alive, and paid for, forever. Ray 2.60 has no
    public way to place them.
    """
    if stats := private_name("ray.data._internal.stats.get_or_create_stats_actor"):
        stats()
    if coordinator := private_name("ray.data._internal.cluster_autoscaler.get_or_create_autoscaling_coordinator"):
        coordinator()
    disabled = private_name("ray.data._internal.usage.collector.usage_collection_disabled")
    usage = private_name("ray.data._internal.usage.actor.get_or_create_usage_collection_actor")
    if disabled and usage and not disabled():
        usage()


def withhold_from_tune_actors(variables: Iterable[str]) -> None:
    """Stop Ray Tune from copying these environment variables into the runtime environments of its actors."""
    propagated = private_name("ray.tune.execution.class_cache.ENV_VARS_TO_PROPAGATE")
    if propagated is not None:
        propagated.difference_update(variables)


@contextmanager
def give_to_tune_actors(variables: Mapping[str, str]) -> Iterator[None]:
    """In the block, the processes of Ray Tune's new actors start with these environment variables.

    Ray Tune has no public way to set them, and a C library reads its own when the process starts.
    """
    propagated: set[str] = private_name("ray.tune.execution.class_cache.ENV_VARS_TO_PROPAGATE") or set()
    added, before = set(variables) - propagated, {name: os.environ.get(name) for name in variables}
    propagated.update(added)
    os.environ.update(variables)
    try:
        yield
    finally:
        propagated.difference_update(added)
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
