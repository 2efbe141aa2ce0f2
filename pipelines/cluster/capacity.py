"""Check that the cluster has room for a run, and wait for nodes that its autoscaler may start."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import ray
from ray.util import placement_group, remove_placement_group

from pipelines.cluster.ray_internals import place_ray_data_actors
from posmlp.config import Config, ScalingSection
from posmlp.errors import UserError
from posmlp.text import quantity

logger = logging.getLogger(__name__)

RUN_ACTOR = "posmlp-run-"  # how the name of the actor begins that each run has while it trains
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
    fewest, share = scaling.min_workers or scaling.workers, scaling.gpus_per_worker
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
    fewest = scaling.min_workers or scaling.workers
    bundles, labels = [worker_resources(scaling)] * fewest, [dict(scaling.train_on)] * fewest
    request = placement_group([*bundles, {"CPU": MIN_DECODING_CPUS}], bundle_label_selector=[*labels, {}])
    try:
        request.wait(timeout_seconds=scaling.wait_s)
    finally:
        remove_placement_group(request)


def why_run_cannot_fit(scaling: ScalingSection) -> str:
    """Why the run cannot fit on the cluster, ignoring its current load. Empty if it fits."""
    nodes = [(node["Resources"], node.get("Labels", {})) for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (sum(resources.get(kind, 0) for resources, _ in nodes) for kind in ("CPU", "GPU"))
    fitting, fewest = workers_that_fit(nodes, scaling), scaling.min_workers or scaling.workers
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
        each = " and ".join(f"{amount:g} {kind}" for kind, amount in worker_resources(scaling).items())
        where = f" with the labels {dict(scaling.train_on)} (scaling.train_on)" if scaling.train_on else ""
        return f"the nodes{where} have room for {fitting} of {fewest} workers of {each} each"
    return ""


def explain_start_wait(scaling: ScalingSection, seconds: float) -> str:
    """Say what a run waits for whose workers fit on the cluster, but do not start.

    Args:
        seconds: since it waits.
    """
    total, free = ray.cluster_resources(), ray.available_resources()
    left = " and ".join(f"{free.get(kind, 0):g} of {total[kind]:g} {kind}s" for kind in ("CPU", "GPU") if kind in total)
    each = " and ".join(f"{amount:g} {kind}" for kind, amount in worker_resources(scaling).items())
    need = f"{quantity(scaling.min_workers or scaling.workers, 'worker')} of {each}" + " each" * (scaling.workers > 1)
    return (
        f"waiting for {seconds:.0f} s to start {need}: {left} are free, and other runs hold the rest. `ray status` and "
        "`ray list actors --detail` tell which. The run starts when there is room; Ctrl-C ends the wait"
    )


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


def live_runs() -> int:
    """The number of runs of all jobs that train on this cluster now. Trials in a study's own processes do not count."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return sum(actor["name"].startswith(RUN_ACTOR) for actor in actors)


def worker_resources(scaling: ScalingSection) -> dict[str, float]:
    """The resources that one training worker reserves on its node. ``scaling.use_gpu`` is true or false."""
    return {"CPU": scaling.cpus_per_worker} | ({"GPU": scaling.gpus_per_worker} if scaling.use_gpu is True else {})


def matches_labels(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Return whether a node's labels include all the wanted ones."""
    return all(labels.get(key) == value for key, value in wanted.items())
