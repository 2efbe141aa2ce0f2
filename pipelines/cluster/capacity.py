"""Check that the cluster has room for a run, and wait for nodes that its autoscaler may start."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import ray
from ray.util import placement_group, remove_placement_group
from ray.util.state import list_actors, list_jobs, list_placement_groups

from pipelines.cluster.ray_internals import draining_nodes, place_ray_data_actors
from posmlp.config import Config, ScalingSection
from posmlp.errors import UserError
from posmlp.text import quantity, shorten

logger = logging.getLogger(__name__)

RUN_ACTOR = "posmlp-run-"  # how the name of the actor begins that each run has while it trains
WARN_AFTER_S = (30.0, 300.0, 1800.0, 7200.0)  # of a wait for the cluster: then the user is told what it waits for
# Of Ray's state API, which needs the dashboard's process; the timeout is in seconds.
STATE_OPTIONS: dict[str, Any] = {"detail": True, "limit": 10_000, "timeout": 5, "raise_on_missing_output": False}
THIS_JOB = "this job"
HOLDERS_SHOWN = 5
MIN_DECODING_CPUS = 1.0  # that training must leave free; with less, Ray Data waits forever and reports nothing


class NoRoomError(UserError):
    """A run does not fit on the cluster; the message says what to change."""


def wait_for_room(scaling: ScalingSection) -> None:
    """Return once the live nodes have room for a run's workers and for decoding; ``scaling.wait_s`` limits the wait.

    Then the actors that Ray Data shares across the cluster run on this process's node, and keep no other node alive.

    Raises:
        NoRoomError: the nodes have no room.
    """
    problem = why_run_cannot_fit(scaling)
    if problem and scaling.wait_s:
        logger.info("%s. Waiting for nodes, at most %g s (scaling.wait_s)", problem, scaling.wait_s)
        request_nodes(scaling)
        problem = why_run_cannot_fit(scaling)
    if problem:
        raise NoRoomError(f"{problem}. If an autoscaler can start nodes, scaling.wait_s=900 waits for them")
    place_ray_data_actors()


def choose_device(config: Config) -> Config:
    """Replace ``scaling.use_gpu: auto`` by true or false, and log which device the workers use.

    The workers use GPUs if the cluster has one for each of them (for each of ``scaling.min_workers``, if that is set).
    """
    gpus, scaling = ray.cluster_resources().get("GPU", 0.0), config.scaling
    use_gpu, line = device_for(scaling, gpus)
    idle_gpus = gpus - (scaling.workers * scaling.gpus_per_worker if use_gpu else 0)
    logger.log(logging.WARNING if idle_gpus >= 1 else logging.INFO, "%s", line)
    return config.model_copy(update={"scaling": scaling.model_copy(update={"use_gpu": use_gpu})})


def device_for(scaling: ScalingSection, gpus: float) -> tuple[bool, str]:
    """Return whether the workers use GPUs, and a line that says why.

    Args:
        gpus: number of GPUs of the cluster.
    """
    fewest, share = scaling.fewest_workers, scaling.gpus_per_worker
    use_gpu = 0 < fewest * share <= gpus if scaling.use_gpu == "auto" else scaling.use_gpu
    there = f"the cluster has {quantity(gpus, 'GPU')}"
    if use_gpu:
        each = "one" if share == 1 else f"{share:g} of one (scaling.gpus_per_worker)"
        line = f"device: GPU, {each} for each of {quantity(scaling.workers, 'worker')}; {there}"
        if share == 1 and gpus >= scaling.workers + 1:
            line += f". The others stay idle: scaling.workers={gpus:g} uses them all"
    elif gpus < 1:
        line = f"device: CPU; {there}"
    elif scaling.use_gpu == "auto":
        line = f"device: CPU; {there}, too few for {fewest} workers: scaling.workers={gpus:g} uses them"
    else:
        line = f"device: CPU; {there}, idle because of scaling.use_gpu=false: scaling.use_gpu=auto uses them"
    return use_gpu, line


def request_nodes(scaling: ScalingSection) -> None:
    """Wait until a run would fit. An autoscaler starts nodes for the pending placement group."""
    fewest = scaling.fewest_workers
    bundles, labels = [worker_resources(scaling)] * fewest, [dict(scaling.train_on)] * fewest
    request = placement_group([*bundles, {"CPU": MIN_DECODING_CPUS}], bundle_label_selector=[*labels, {}])
    try:
        request.wait(timeout_seconds=scaling.wait_s)
    finally:
        remove_placement_group(request)


def why_run_cannot_fit(scaling: ScalingSection) -> str:
    """Why the run cannot fit on the cluster, ignoring its current load. Empty if it fits.

    Ray starts nothing on machines that are about to be taken away, so they are no room.
    """
    leaving = draining_nodes()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    problem = why_nodes_have_no_room([(node["Resources"], node.get("Labels", {})) for node in nodes], scaling)
    if problem and leaving:
        problem += f". Not counted: {quantity(len(leaving), 'machine')} about to be taken away"
    return problem


def why_nodes_have_no_room(
    nodes: Sequence[tuple[Mapping[str, float], Mapping[str, str]]], scaling: ScalingSection
) -> str:
    """Why a run cannot fit on nodes that do nothing else; empty if it fits.

    Args:
        nodes: the resources and the labels of each node.
    """
    cpus, gpus = (sum(resources.get(kind, 0) for resources, _ in nodes) for kind in ("CPU", "GPU"))
    fitting, fewest = workers_that_fit(nodes, scaling), scaling.fewest_workers
    workers = min(max(fitting, fewest), scaling.workers)  # that Ray would start
    left = cpus - workers * scaling.cpus_per_worker
    if left < MIN_DECODING_CPUS:
        most = max(0, cpus - MIN_DECODING_CPUS) / workers
        return (
            f"{workers} workers x {scaling.cpus_per_worker:g} CPUs leave {left:g} of {cpus:g} CPUs for decoding, which "
            f"needs at least {MIN_DECODING_CPUS:g}. Lower scaling.workers, or scaling.cpus_per_worker to at most "
            f"{most:g} (it reserves CPUs; scaling.threads_per_worker sets the number of threads)"
        )
    if scaling.use_gpu is True and gpus < fewest * scaling.gpus_per_worker:
        each = "a GPU" if scaling.gpus_per_worker == 1 else f"{scaling.gpus_per_worker:g} of a GPU"
        return f"{fewest} workers (scaling.workers) need {each} each, and the cluster has {gpus:g}"
    if scaling.min_workers and (anywhere := workers_that_fit(nodes, scaling, {})) > fitting:
        return (
            f"{anywhere - fitting} workers would fit on nodes without the labels {dict(scaling.train_on)} "
            "(scaling.train_on), and Ray counts these nodes as room for a run with scaling.min_workers. Raise "
            "scaling.cpus_per_worker above the number of CPUs of these nodes, or leave scaling.min_workers out"
        )
    if fitting < fewest:
        where = f" with the labels {dict(scaling.train_on)} (scaling.train_on)" if scaling.train_on else ""
        return f"the nodes{where} have room for {fitting} of {fewest} workers of {describe_worker(scaling)} each"
    return ""


def explain_start_wait(scaling: ScalingSection, seconds: float) -> str:
    """Say what a run waits for whose workers fit on the cluster, but have not started.

    Args:
        seconds: since it waits.
    """
    fewest = scaling.fewest_workers
    need = quantity(fewest, "worker") + f" of {describe_worker(scaling)}" + " each" * (scaling.workers > 1)
    wait = f"waiting for {seconds:.0f} s to start {need}"
    if have_room({kind: fewest * amount for kind, amount in worker_resources(scaling).items()}):
        return f"{wait}: there is room on the cluster, and the processes start; Ctrl-C ends the wait"
    return f"{wait}: {describe_use(find_holders())}. The run starts when there is room; Ctrl-C ends the wait"


def explain_task_wait(what: str, scaling: ScalingSection, seconds: float) -> str:
    """Say that the result of a task which needs the resources of a training worker is not there yet.

    Args:
        what: the result.
        seconds: since the task was submitted.
    """
    task = f"the task needs {describe_worker(scaling)}, and runs or waits for them"
    return f"waiting for {seconds:.0f} s for {what}: {task}; {describe_use(find_holders())}"


def describe_use(holders: Mapping[str, Counter[str]] | None) -> str:
    """What of the cluster's CPUs and GPUs is free, and which jobs hold the others.

    Args:
        holders: of ``find_holders``.
    """
    total, free = ray.cluster_resources(), ray.available_resources()
    kinds = [kind for kind in ("CPU", "GPU") if kind in total]
    text = " and ".join(f"{free.get(kind, 0):g} of {total[kind]:g} {kind}s" for kind in kinds) + " are free"
    if holders is None:
        return f"{text}; `ray status` and `ray list actors --detail` tell what holds the rest"
    largest = sorted(holders.items(), key=lambda held: held[1].total(), reverse=True)
    parts = [
        f"{job} holds " + " and ".join(quantity(amounts[kind], kind) for kind in kinds if amounts[kind])
        for job, amounts in largest[:HOLDERS_SHOWN]
        if any(amounts[kind] for kind in kinds)
    ]
    return "; ".join([text, *parts, "`ray status` shows the tasks too" if parts else "`ray status` tells more"])


def find_holders() -> dict[str, Counter[str]] | None:
    """``held_by_jobs``, or None if the dashboard does not answer, or is off."""
    try:
        return held_by_jobs()
    except Exception:  # of any kind (see there); ``describe_use`` then names the commands that tell
        return None


def have_room(needed: Mapping[str, float]) -> bool:
    """Return whether this job's placement groups hold the resources of its workers, and none of them waits for room.

    Returns:
        False if Ray's state API does not answer.
    """
    job, held = ray.get_runtime_context().get_job_id(), Counter[str]()
    try:
        groups = list_placement_groups(here(), **STATE_OPTIONS)
    except Exception:  # as in find_holders
        return False
    own = [group for group in groups if group.creator_job_id == job]
    for bundle in (bundle for group in own if group.state == "CREATED" for bundle in group.bundles or []):
        held.update(bundle["unit_resources"])
    return all(group.state != "PENDING" for group in own) and all(held[k] >= n - 1e-6 for k, n in needed.items())


def here() -> str:
    """Address of this process's Ray, for its state API, which refuses to choose where several run on a machine."""
    return ray.get_runtime_context().gcs_address


def held_by_jobs() -> dict[str, Counter[str]]:
    """The resources that each job's placement groups and other actors hold, by a description of the job.

    Raises:
        Exception: of any kind: Ray's state API does not answer.
    """
    groups = list_placement_groups(here(), filters=[("state", "=", "CREATED")], **STATE_OPTIONS)
    actors = list_actors(here(), filters=[("state", "=", "ALIVE")], **STATE_OPTIONS)
    jobs = list_jobs(here(), **STATE_OPTIONS)
    entries = {job.job_id: " ".join((job.submission_id or job.entrypoint or "").split()) for job in jobs}
    own, held = ray.get_runtime_context().get_job_id(), dict[str, Counter[str]]()
    in_groups = ((group.creator_job_id, bundle["unit_resources"]) for group in groups for bundle in group.bundles or [])
    alone = ((actor.job_id, actor.required_resources or {}) for actor in actors if not actor.placement_group_id)
    for job, resources in chain(in_groups, alone):
        name = THIS_JOB if job == own else f"job {job} ({shorten(entries.get(job) or 'ended', 60)})"
        held.setdefault(name, Counter()).update(resources)
    return held


class LongWait:
    """Warns the user, now and then, that a wait for the cluster has become long."""

    def __init__(self) -> None:
        self.left = list(WARN_AFTER_S)

    def check(self, seconds: float, explain: Callable[[float], str]) -> None:
        """Log a warning if the wait has come to the next of ``WARN_AFTER_S``.

        Args:
            seconds: how long the wait is; after a wait that is over it begins at 0 again.
            explain: the warning, from these seconds.
        """
        if seconds < WARN_AFTER_S[0]:
            self.left = list(WARN_AFTER_S)
        elif self.left and seconds >= self.left[0]:
            self.left = [later for later in self.left if later > seconds]
            logger.warning("%s", explain(seconds))


def workers_that_fit(
    nodes: Iterable[tuple[Mapping[str, float], Mapping[str, str]]],
    scaling: ScalingSection,
    labels: Mapping[str, str] | None = None,
) -> int:
    """The number of training workers that fit on nodes.

    Args:
        nodes: the resources and the labels of each node.
        labels: only nodes with these labels count; None: ``scaling.train_on``.
    """
    need, wanted = worker_resources(scaling), scaling.train_on if labels is None else labels
    return sum(
        int(min(resources.get(kind, 0) / amount for kind, amount in need.items()) + 1e-6)
        for resources, present in nodes
        if matches_labels(present, wanted)
    )


def concurrent_trials(recipe: Config, wanted: int | None) -> int:
    """Number of a study's trials that run at a time: the user's, if the cluster has room for them or may grow.

    Args:
        recipe: of the trials.
        wanted: by the user; None: ``max_concurrent_trials``.
    """
    room = trials_that_fit(recipe)
    if wanted and wanted > room and not recipe.scaling.wait_s:
        # More would take the CPUs of the decoders, and all of them would wait for clips forever.
        logger.warning("--concurrent %d: the cluster has room for %d, so %d run", wanted, room, room)
        return room
    return wanted or max_concurrent_trials(recipe)


def max_concurrent_trials(recipe: Config) -> int:
    """Number of trials that run at a time unless the user says it: those that fit, each with cores for its threads."""
    room, scaling = trials_that_fit(recipe), recipe.scaling
    if scaling.threads_per_worker and scaling.use_gpu is not True:
        cpus = ray.cluster_resources().get("CPU", 0)
        room = min(room, int(cpus / (scaling.workers * scaling.threads_per_worker)))
    return max(1, room)


def trials_that_fit(recipe: Config) -> int:
    """Number of trials whose resources the cluster has, with CPUs left to decode for them; at least 1."""
    cluster, scaling = ray.cluster_resources(), recipe.scaling
    room = int((cluster.get("CPU", 0) - MIN_DECODING_CPUS + 1e-6) / (scaling.workers * scaling.cpus_per_worker))
    if scaling.use_gpu is True:
        on_a_gpu = int(1 / scaling.gpus_per_worker + 1e-6)
        room = min(room, int(cluster.get("GPU", 0)) * on_a_gpu // scaling.workers)
    return max(1, room)


def live_runs() -> int:
    """The number of runs of all jobs that train on this cluster now. Trials in a study's own processes do not count."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return sum(actor["name"].startswith(RUN_ACTOR) for actor in actors)


def worker_resources(scaling: ScalingSection) -> dict[str, float]:
    """The resources that one training worker reserves on its node. ``scaling.use_gpu`` is true or false."""
    return {"CPU": scaling.cpus_per_worker} | ({"GPU": scaling.gpus_per_worker} if scaling.use_gpu is True else {})


def describe_worker(scaling: ScalingSection) -> str:
    """What one training worker reserves, as ``2 CPU and 1 GPU``."""
    return " and ".join(f"{amount:g} {kind}" for kind, amount in worker_resources(scaling).items())


def matches_labels(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Return whether a node's labels include all the wanted ones."""
    return all(labels.get(key) == value for key, value in wanted.items())
