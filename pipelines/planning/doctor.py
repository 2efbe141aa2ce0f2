"""``posmlp doctor``: find what would stop or slow a run before it starts.

A task on every node reports the installed versions, reads and writes the storage, and decodes a video, as a run will.
The driver tries MLflow. Each check is one line: ok, warn (the run works, but not well) or fail (the run would end),
with what to do.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import time
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
from mlflow import MlflowClient
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.cluster.capacity import device_for, matches_labels, worker_resources, workers_that_fit
from pipelines.cluster.session import start_ray
from pipelines.data.loader import OBJECT_STORE_SHARE, decode_rows, rows_per_block
from pipelines.runs.lease import submission_id
from pipelines.runs.record import JOB_FOLDER
from pipelines.tracking.mlflow_client import (
    explain_store_error,
    find_experiment,
    prepare_mlflow,
    prepare_sqlite,
)
from pipelines.tracking.uris import tracking_uri, without_secrets
from posmlp import storage
from posmlp.config import Config
from posmlp.errors import UserError
from posmlp.tasks import task_of
from posmlp.text import shorten
from posmlp.video.clip import views_per_video
from posmlp.video.manifest import Split

PACKAGES = ("ray", "torch", "mlflow", "av", "decord2", "numpy", "pyarrow")
ANSWER_S = 120.0  # until a node must have started a process and answered
SKEW_S = 2.0  # clocks that differ by more make times of different nodes incomparable
BLOCKS_AHEAD = 4  # fewest decoded blocks in the object store, so that decoding and training overlap
MIB = 2**20
UPLOAD_MIB = 50  # a larger upload contains data by mistake


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: ``ok``; ``warn``: a run works, but not well; ``fail``: a run would end.
        what: what was found.
        advice: what to do; empty for ``ok``.
    """

    level: Literal["ok", "warn", "fail"]
    what: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.level:<5} {self.what}" + (f"\n      -> {self.advice}" if self.advice else "")


ORDER: tuple[Literal["fail", "warn", "ok"], ...] = ("fail", "warn", "ok")


@dataclass(frozen=True)
class Node:
    """A node of the cluster, as Ray and a task on it report.

    Attributes:
        name: address, and the node group if there is one.
        resources: CPU, GPU, memory and object_store_memory (bytes).
        report: the result of ``probe``; empty if the node did not answer.
        trouble: why it did not answer.
    """

    id: str
    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    report: Mapping[str, Any]
    trouble: str = ""


def doctor(config: Config | None, address: str | None = None) -> Iterator[Finding]:
    """Check a cluster, and with a recipe also what a run of it needs. Yields each finding as soon as it is made.

    Args:
        config: recipe of the planned run.
        address: address of the cluster; None: as for ``posmlp train``.
    """
    try:
        start_ray(**({"address": address} if address else {}))
    except UserError as error:  # a network, authentication, or two versions that do not match
        advice = "see RAY_ADDRESS and RAY_AUTH_MODE, and `ray status` on the head"
        yield Finding("fail", f"Ray: {error}", advice)
        return
    yield from check_job(submission_id())
    yield from check_upload(Path.cwd())
    marker = storage.join(config.train.storage, f".doctor-{uuid.uuid4().hex}") if config else None
    if marker:
        yield from check_storage(marker)
    row = None
    if config:
        row = yield from check_lists(config)
    try:
        nodes = probe_nodes(marker, row, config)
    finally:
        if marker:
            remove_marker(marker)
    yield from check_nodes(nodes)
    if config:
        yield from check_room(nodes, config)
    yield from check_stores(nodes, config)
    yield from check_mlflow(config)


def check_job(submission: str) -> Iterator[Finding]:
    """Tell how a job that ends early is repeated; outside a job there is nothing to tell.

    Args:
        submission: id of the job.
    """
    if submission:
        yield Finding("ok", f"Ray job {submission}; Ray takes an id once, so a repeat needs another --submission-id")


def check_upload(folder: Path) -> Iterator[Finding]:
    """Check the size of a job's upload to the cluster; outside a job there is nothing to check."""
    if JOB_FOLDER not in f"{folder}/":
        return
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    small = sum(sizes.values()) < UPLOAD_MIB * MIB
    largest = max(sizes, key=sizes.__getitem__).relative_to(folder)
    what = f"the job's working directory: {len(sizes)} files, {sum(sizes.values()) / MIB:.1f} MiB"
    advice = (
        f"each change uploads all of it again; list what is not source in .rayignore (the largest file is {largest})"
    )
    yield Finding("ok" if small else "warn", what, "" if small else advice)


# --- on every node -----------------------------------------------------------------------------------------------


def probe(marker: str | None, row: pa.Table | None, config: dict[str, Any] | None) -> dict[str, Any]:
    """Ray task: report what this node has, and whether the actions of a run work there.

    Args:
        marker: a file on the run's storage that the driver has written.
        row: one manifest row, to decode.
    """
    shm = "/dev/shm"
    report: dict[str, Any] = {"versions": versions(), "storage": "", "video": ""}
    report["shm"] = shutil.disk_usage(shm).total if os.path.isdir(shm) else 0
    if marker:
        try:
            storage.read_bytes(marker)
            name = f"{storage.base_name(marker)}-{ray.get_runtime_context().get_node_id()}"
            mine = storage.join(storage.parent(marker), name)
            storage.write_bytes(mine, b"")
            storage.remove(mine)
        except (OSError, UserError) as error:
            report["storage"] = one_line(error)
    if row is not None and config is not None:
        decoded = decode_rows(row, np.ones(len(row), bool), Config.model_validate(config), 0, False)
        report["video"] = str(decoded["fatal"][0] or decoded["reason"][0])
    return report


def clock() -> float:
    """Ray task: return this node's time, seconds since 1970."""
    return time.time()


def versions() -> dict[str, str]:
    """Return the versions of the packages that must be the same on all nodes; ``none`` for a missing one."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "none"
    return installed


def probe_nodes(marker: str | None, row: pa.Table | None, config: Config | None) -> list[Node]:
    """Run ``probe`` on every live node, on all at the same time."""
    task: Any = ray.remote(num_cpus=0, max_retries=0)(probe)
    recipe = config.model_dump() if config else None
    alive = [node for node in ray.nodes() if node["Alive"]]
    on_node = [{"scheduling_strategy": NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)} for n in alive]
    answers = [task.options(**options).remote(marker, row, recipe) for options in on_node]
    ray.wait(answers, num_returns=len(answers), timeout=ANSWER_S)
    nodes = []
    for node, options, answer in zip(alive, on_node, answers, strict=True):
        report: dict[str, Any] = {}
        trouble = ""
        try:
            report = dict(ray.get(answer, timeout=0))
            before = time.time()
            theirs = ray.get(ray.remote(num_cpus=0)(clock).options(**options).remote(), timeout=ANSWER_S)
            # A lower bound of the difference: the node read its clock after ``before`` and before now.
            report["skew"] = max(before - theirs, theirs - time.time(), 0.0)
        except Exception as error:  # anything can keep a node from answering
            trouble = one_line(getattr(error, "cause", None) or error)
        labels = node.get("Labels", {})
        group = labels.get("ray.io/node-group", "")
        name = node["NodeManagerAddress"] + (f" ({group})" if group else "")
        nodes.append(Node(node["NodeID"], name, node["Resources"], labels, report, trouble))
    return nodes


def check_nodes(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Check which nodes answer, their versions and clocks, and whether they reach the storage and a video."""
    own, answered = versions(), [node for node in nodes if node.report]
    for node in nodes:
        if not node.report:
            yield Finding(
                "fail",
                f"node {node.name} does not answer: {node.trouble}",
                "install this project there (cluster.yaml, setup_commands), or submit with --working-dir .",
            )
    kinds = "".join(f", {count:g} {kind}s" for kind in ("CPU", "GPU") if (count := total(nodes, kind)))
    yield Finding("ok", f"Ray {own['ray']}, nodes that answer: {len(answered)} of {len(nodes)}{kinds}")
    for node in answered:
        theirs = node.report["versions"]
        different = [f"{name} {theirs[name]} (here {own[name]})" for name in own if theirs[name] != own[name]]
        if different:
            yield Finding(
                "fail",
                f"node {node.name} has {', '.join(different)}",
                "install the versions of constraints.txt everywhere",
            )
    for key, what, advice in (
        (
            "storage",
            "train.storage",
            "it must be storage that all nodes share, a mount or a URI (train.storage=s3://...)",
        ),
        (
            "video",
            "the first video",
            "videos must be at the same place on every node, or at a URI, and data.cache_dir a folder on every node",
        ),
    ):
        for node in answered:
            if node.report[key]:
                yield Finding("fail", f"node {node.name}: {what}: {node.report[key]}", advice)
    yield from check_clocks(answered)


def check_clocks(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Check the difference between the clocks of the nodes and of the driver."""
    wrong = [node for node in nodes if node.report["skew"] > SKEW_S]
    for node in wrong:
        what = f"node {node.name}: its clock is {node.report['skew']:.0f} s off"
        yield Finding("warn", what, "run an NTP client there: times of different nodes cannot be compared")
    if nodes and not wrong:
        yield Finding("ok", f"clocks agree within {SKEW_S:g} s")


# --- what a recipe needs -----------------------------------------------------------------------------------------


def check_storage(marker: str) -> Iterator[Finding]:
    """Write the file that the nodes have to find."""
    folder = storage.parent(marker)
    if JOB_FOLDER in marker:
        advice = "give an absolute path or a URI"
        yield Finding(
            "fail", f"train.storage {folder} is the job's own folder, which Ray deletes after the job", advice
        )
        return
    try:
        storage.write_bytes(marker, b"")
        yield Finding("ok", f"train.storage {folder} can be written from here")
    except (OSError, UserError) as error:
        yield Finding("fail", f"train.storage {folder}: {one_line(error)}", "give a folder that can be written")


def remove_marker(marker: str) -> None:
    """Remove the file that ``check_storage`` wrote."""
    with suppress(OSError, UserError):  # if it could not be written, a finding says so
        storage.remove(marker)


def check_lists(config: Config) -> Generator[Finding, None, pa.Table | None]:
    """Read both lists; the generator returns the first row of the training list, or None."""
    row, known, task = None, None, task_of(config)
    splits: tuple[Split, ...] = ("train", "val")
    for split in splits:
        path = config.data.list_of(split)
        try:
            manifest = task.read_split(config, split, known)
            known = task.training_classes(config, manifest) if split == "train" else known
        except (UserError, OSError) as error:
            what = f"data.{split}.path {path}: {shorten(str(error), 300)}"
            yield Finding("fail", what, "`posmlp data check` tells more")
            continue
        yield Finding("ok", f"data.{split}.path {path}: {len(manifest.rows)} videos, {len(manifest.classes)} classes")
        row = manifest.rows.slice(0, 1) if row is None else row
    return row


def check_room(nodes: Sequence[Node], config: Config) -> Iterator[Finding]:
    """Check whether the workers fit, and what they leave for decoding."""
    use_gpu, _ = device_for(config.scaling, total(nodes, "GPU"))
    scaling = config.scaling.model_copy(update={"use_gpu": use_gpu})
    labelled = [node for node in nodes if matches_labels(node.labels, scaling.train_on)]
    if scaling.train_on and not labelled:
        yield Finding(
            "warn",
            f"no node has the labels {dict(scaling.train_on)} of scaling.train_on",
            "if an autoscaler adds one, scaling.wait_s=900 waits for it",
        )
    fitting = workers_that_fit([(node.resources, node.labels) for node in nodes], scaling)
    what = " and ".join(f"{amount:g} {kind}" for kind, amount in worker_resources(scaling).items())
    fewest = scaling.fewest_workers
    starting = min(max(fitting, fewest), scaling.workers)  # as in capacity.why_nodes_have_no_room
    if fitting < scaling.workers:
        yield Finding(
            "fail" if labelled and fitting < fewest else "warn",
            f"room for {fitting} of {scaling.workers} training workers of {what}",
            "lower scaling.workers or scaling.cpus_per_worker, or add nodes (an autoscaler may add them)",
        )
    else:
        yield Finding("ok", f"room for {scaling.workers} training workers of {what}")
    left = total(nodes, "CPU") - starting * scaling.cpus_per_worker
    enough = left >= max(1.0, starting)
    yield Finding(
        "ok" if enough else "warn" if left >= 1 else "fail",
        f"{left:g} CPUs are left for decoding",
        "" if enough else "lower scaling.cpus_per_worker, or add CPU nodes; `posmlp plan` says how many",
    )
    if scaling.decode_on:
        named = sum(matches_labels(node.labels, scaling.decode_on) for node in nodes)
        advice = "" if named else "then any node decodes; label nodes with `ray start --labels`"
        yield Finding("ok" if named else "warn", f"{named} nodes have the labels of scaling.decode_on", advice)


def check_stores(nodes: Sequence[Node], config: Config | None) -> Iterator[Finding]:
    """Check that object stores are in memory, and large enough for the blocks that are decoded ahead."""
    for node in nodes:
        store = node.resources.get("object_store_memory", 0)
        if node.report and node.report["shm"] < store:
            sizes = f"/dev/shm has {node.report['shm'] / MIB:.0f} MiB, its object store {store / MIB:.0f} MiB"
            advice = "Ray then puts the store on a disk; start the container with a larger --shm-size"
            yield Finding("warn", f"node {node.name}: {sizes}", advice)
    stores = [node.resources["object_store_memory"] for node in nodes if node.resources.get("object_store_memory")]
    if config and stores:
        variant = config.model.variant()
        block = (
            rows_per_block(config, True) * views_per_video(config, True) * variant.frames * variant.image_size**2 * 3
        )
        room = OBJECT_STORE_SHARE * sum(stores) / config.scaling.workers
        if room < BLOCKS_AHEAD * block:
            rows = max(1, math.floor(config.data.rows_per_block * room / block / BLOCKS_AHEAD))
            what = f"object stores have room for {room / block:.1f} blocks of {block / MIB:.0f} MiB a worker"
            yield Finding("warn", what, f"lower data.rows_per_block to {rows}, or give Ray a larger object store")
            return
    if stores:
        yield Finding("ok", f"object stores of {statistics.median(stores) / MIB:.0f} MiB a node (median)")


def check_mlflow(config: Config | None) -> Iterator[Finding]:
    """Check that the tracking server or database answers, and has the schema of this MLflow."""
    try:
        uri = tracking_uri(config) if config else os.environ.get("MLFLOW_TRACKING_URI")
    except UserError as error:
        yield Finding("fail", str(error), "MLFLOW_TRACKING_URI=http://...")
        return
    if uri is None:
        return
    shown = without_secrets(uri)
    if uri.startswith("sqlite:///") and not os.path.exists(uri.removeprefix("sqlite:///")):
        yield Finding("ok", f"MLflow: {shown} will be created")
        return
    prepare_mlflow()
    try:
        prepare_sqlite(uri)
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
        if config:
            find_experiment(client, config)
    except UserError as error:  # it cannot be written
        yield Finding("fail", str(error), "MLflow must be writable before a run starts")
        return
    except Exception as error:  # networks and databases raise many kinds
        problem = explain_store_error(error, uri)
        advice = "start it, or see tracking.uri, MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and _PASSWORD"
        yield Finding("fail", f"MLflow at {shown}: {problem.reason}", problem.advice or advice)
        return
    yield Finding("ok", f"MLflow at {shown} answers, and its schema is current")


# --- helpers ------------------------------------------------------------------------------------------------


def total(nodes: Sequence[Node], kind: str) -> float:
    """Return the sum of a resource over all nodes."""
    return sum(node.resources.get(kind, 0) for node in nodes)


def one_line(error: BaseException) -> str:
    """Return an error's text as one line of at most 200 characters."""
    return shorten(" ".join(str(error).split()), 200)


def print_findings(findings: Iterator[Finding]) -> bool:
    """Print a verdict, then the findings, the worst first. Returns whether none is ``fail``."""
    found = sorted(findings, key=lambda finding: ORDER.index(finding.level))
    levels = [finding.level for finding in found]
    counts = ", ".join(f"{levels.count(level)} {level}" for level in ORDER)
    verdict = "a run would not work" if "fail" in levels else "ready, with warnings" if "warn" in levels else "ready"
    print("\n".join([f"{verdict}: {counts}\n", *map(str, found)]), flush=True)
    return "fail" not in levels
