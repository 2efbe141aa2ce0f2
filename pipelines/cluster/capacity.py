"""Whether the cluster has room for a run, and the wait for nodes that its autoscaler is to bring."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import ray
from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
from ray.data._internal.stats import get_or_create_stats_actor
from ray.data._internal.usage.actor import get_or_create_usage_collection_actor
from ray.data._internal.usage.collector import usage_collection_disabled
from ray.util import placement_group, remove_placement_group

from posmlp.config import ScalingSection
from posmlp.errors import UserError

DECODING = 1.0  # CPUs that training leaves to decoding, at least: else Ray Data would wait for ever without a word


class NoRoomError(UserError):
    """A run that does not fit into the cluster; the message says what to change."""


def wait_for_room(scaling: ScalingSection, echo: Callable[[str], None]) -> None:
    """Return once the live nodes have room for a run's workers and for decoding; ``scaling.wait_s`` limits the wait.

    What Ray Data keeps for the whole cluster is then on this process's node, and holds none that could go.

    Raises:
        NoRoomError: they do not.
    """
    lacking = shortage(scaling)
    if lacking and scaling.wait_s:
        echo(f"{lacking}. Waiting for nodes, at most {scaling.wait_s:g} s (scaling.wait_s)")
        ask_for_nodes(scaling)
        lacking = shortage(scaling)
    if lacking:
        raise NoRoomError(f"{lacking}. If nodes are to come (an autoscaler), scaling.wait_s=900 waits for them")
    place_ray_data_actors()


def place_ray_data_actors() -> None:
    """Start the actors that all of a cluster's Ray Data share on this process's node, which submits the run.

    They outlive every run, on the node that asks for them first, and an autoscaler does not end a node with an actor on
    it: left to themselves they would keep a training node up (and paid for) for ever. Ray 2.60 has no public way.
    """
    get_or_create_stats_actor()
    get_or_create_autoscaling_coordinator()
    if not usage_collection_disabled():
        get_or_create_usage_collection_actor()


def ask_for_nodes(scaling: ScalingSection) -> None:
    """Wait until a run would fit. What waits for its place is what an autoscaler brings nodes for."""
    fewest = scaling.min_workers or scaling.workers
    bundles, labels = [bundle(scaling)] * fewest, [dict(scaling.train_on)] * fewest
    wish = placement_group([*bundles, {"CPU": DECODING}], bundle_label_selector=[*labels, {}])
    try:
        wish.wait(timeout_seconds=scaling.wait_s)
    finally:
        remove_placement_group(wish)


def shortage(scaling: ScalingSection) -> str:
    """Why the live nodes have no room for a run, whatever else they are at; empty if they have."""
    nodes = [(node["Resources"], node.get("Labels", {})) for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (sum(resources.get(kind, 0) for resources, _ in nodes) for kind in ("CPU", "GPU"))
    there, fewest = places(nodes, scaling), scaling.min_workers or scaling.workers
    workers = min(max(there, fewest), scaling.workers)  # that Ray would start
    left = cpus - workers * scaling.cpus_per_worker
    if left < DECODING:
        most = max(0, cpus - DECODING) / workers
        return (
            f"{workers} workers x {scaling.cpus_per_worker:g} CPUs leave {left:g} of {cpus:g} CPUs for decoding, which "
            f"needs at least {DECODING:g}. Lower scaling.workers, or scaling.cpus_per_worker to at most {most:g} (it "
            "reserves CPUs; threads are scaling.threads_per_worker)"
        )
    if scaling.use_gpu and gpus < fewest:
        return f"scaling.workers {fewest} need a GPU each, and the cluster has {gpus:g}"
    if scaling.min_workers and (everywhere := places(nodes, scaling, {})) > there:
        return (
            f"{everywhere - there} workers would fit on nodes without the labels {dict(scaling.train_on)} "
            "(scaling.train_on), and Ray counts them as room for a run with scaling.min_workers. Raise "
            "scaling.cpus_per_worker above the CPUs of these nodes, or leave scaling.min_workers out"
        )
    if there < fewest:
        what = " and ".join(f"{amount:g} {kind}" for kind, amount in bundle(scaling).items())
        where = f" with the labels {dict(scaling.train_on)} (scaling.train_on)" if scaling.train_on else ""
        return f"the nodes{where} have room for {there} of {fewest} workers of {what} each"
    return ""


def places(
    nodes: Iterable[tuple[Mapping[str, float], Mapping[str, str]]],
    scaling: ScalingSection,
    labels: Mapping[str, str] | None = None,
) -> int:
    """Training workers that fit into nodes, each given by its resources and its labels.

    Args:
        labels: that a node needs; None: ``scaling.train_on``.
    """
    need, wanted = bundle(scaling), scaling.train_on if labels is None else labels
    return sum(
        int(min(resources.get(kind, 0) / amount for kind, amount in need.items()) + 1e-6)
        for resources, present in nodes
        if has_labels(present, wanted)
    )


def bundle(scaling: ScalingSection) -> dict[str, float]:
    """What one training worker takes of a node."""
    return {"CPU": scaling.cpus_per_worker} | ({"GPU": 1.0} if scaling.use_gpu else {})


def has_labels(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether a node's labels have all that are wanted."""
    return all(labels.get(key) == value for key, value in wanted.items())
