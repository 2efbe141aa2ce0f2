"""Test a trained model on a split: ``posmlp evaluate``.

``pipelines.inference.scoring`` scores the videos or key frames, and the task's module of results computes the metrics.
This module checks the input, writes the results and logs them to the MLflow run of the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Metric, RunTag
from mlflow.exceptions import MlflowException
from pydantic import ValidationError

from pipelines.cluster.capacity import choose_device, wait_for_room
from pipelines.cluster.session import start_ray
from pipelines.cluster.signals import hold_signals, raise_held
from pipelines.inference.detection_results import detection_results
from pipelines.inference.recognition_results import recognition_results
from pipelines.inference.scoring import BAD_VIDEOS_SHOWN, score_good_videos
from pipelines.registry.datasets import list_digest, list_name
from pipelines.registry.logged_models import CheckpointLink, checkpoint_model, link_to
from pipelines.runs import checkpoints
from pipelines.runs.errors import BadVideo
from pipelines.runs.models import find_checkpoint, known_classes, output_names
from pipelines.runs.record import read_record
from pipelines.tracking.mlflow_client import (
    as_metrics,
    create_run,
    explain_store_error,
    infinite_tags,
    now_ms,
    prepare_mlflow,
    prepare_sqlite,
    refuse_foreign_server,
)
from pipelines.tracking.uris import (
    links_text,
    recipe_without_password,
    run_link,
    scrub,
    tracking_uri,
    without_secrets,
)
from pipelines.training.preflight import list_fingerprint
from posmlp import storage
from posmlp.config import Config, DataSection, RecipeError, describe, set_key
from posmlp.errors import UserError
from posmlp.learn.evaluation import ClassResult
from posmlp.metrics import HELD_OUT, MAIN_METRICS, TEST, TEST_TRAIN
from posmlp.tasks import task_of
from posmlp.tasks.detection import DetectionSummary
from posmlp.video.manifest import Split
from posmlp.video.views import with_views

logger = logging.getLogger(__name__)

RESULTS = {"recognition": recognition_results, "detection": detection_results}  # by the recipe's task
LARGEST_ARTIFACT = 2**30  # bytes; MLflow and its server are not made for larger files
FOLDER = "evaluations"  # in the run's folder
ARTIFACTS = "evaluation"  # among the artifacts of the MLflow run
KEYS_OVERRIDABLE = ("data.", "detection.", "eval.", "scaling.", "tracking.", "train.precision")
KEYS_OF_EVALUATION = ("detection.val_every", "detection.whole_frame")  # Detection.for_evaluation sets them
KEYS_OF_PIXELS = ("data.normalisation", "data.modality")  # what a trained model's first layer expects
# Overrides of these do not change the scores, or are part of the evaluation's name anyway.
KEYS_NOT_IN_NAME = (
    *(
        "eval.every",
        "eval.clips",
        "eval.crops",
        "scaling.",
        "tracking.",
        "data.cache_dir",
        "data.rows_per_block",
        "data.decode_timeout_s",
    ),
    "data.max_bad_fraction",
)
PREFIXES = {"val": TEST, "train": TEST_TRAIN, "test": HELD_OUT}  # of the metrics, by split


@dataclass
class Evaluation:
    """The result of an evaluation.

    Attributes:
        name: split, views and step.
        path: folder of the result files, a path or a URI.
        checkpoint, step, epoch: the model that was evaluated.
        split: ``train``, ``val`` or ``test``.
        views: clips per video, and crops per clip.
        metrics: of recognition ``top1``, ``top5``, ``class_mean``, ``loss``, and ``videos``, the number of scored
            videos; of detection ``map``, ``map_GROUP``, ``map_slowfast``, ``loss``, ``key_frames`` and ``boxes``.
        classes: the figures of each class, by label.
        bad: videos that could not be decoded, or of detection key frames; they are in no metric.
        table, worst: what is printed of the metrics and of the worst classes.
        unit: what is scored, such as ``videos``.
        mlflow_run_id: the MLflow run that has the evaluation; None if MLflow did not accept it.
        pages: how to open that run in MLflow's pages; empty likewise.
    """

    name: str
    path: str
    checkpoint: str
    step: int
    epoch: int
    split: str
    views: tuple[int, int]
    metrics: dict[str, float]
    classes: list[ClassResult] | DetectionSummary
    bad: list[BadVideo]
    table: list[tuple[str, str]] = field(default_factory=list)
    worst: list[str] = field(default_factory=list)
    unit: str = "videos"
    mlflow_run_id: str | None = None
    pages: str = ""

    def __str__(self) -> str:
        """Format as a table, followed by the worst classes and what could not be decoded."""
        rows = [
            *self.table,
            (f"bad {self.unit}", str(len(self.bad))),
            ("results", self.path),
            ("MLflow", f"run {self.mlflow_run_id}" if self.mlflow_run_id else "not logged"),
        ]
        lines = [f"  {name:<19}{value}" for name, value in rows]
        lines += ["", *(f"  {line}" for line in self.worst)] if self.worst else []
        lines += [f"  {video.uri}: {video.reason}" for video in self.bad[:BAD_VIDEOS_SHOWN]]
        if len(self.bad) > BAD_VIDEOS_SHOWN:
            lines.append(f"  ... and {len(self.bad) - BAD_VIDEOS_SHOWN} more bad {self.unit} in summary.json")
        lines += ["", f"  {self.pages}"] if self.pages else []
        return "\n".join(lines)


def evaluate(
    uri: str,
    views: tuple[int, int] | None = None,
    split: Split = "val",
    overrides: Sequence[str] = (),
    workers: int | None = None,
    out: str | None = None,
) -> Evaluation:
    """Score a split with a checkpoint, write the results, and log them to the checkpoint's MLflow run.

    Args:
        uri: name or folder of a run (its best checkpoint is used), or folder of a checkpoint.
        views: clips per video and crops per clip (``posmlp.video.views.parse_views``); None: the recipe's.
        split: which of the recipe's lists of videos.
        overrides: each is ``section.key=value``, with a key of ``KEYS_OVERRIDABLE`` that is not in ``KEYS_OF_PIXELS``
            or ``KEYS_OF_EVALUATION``.
        workers: number of actors that score; None: ``scaling.workers``.
        out: folder for the results; None: ``evaluations/NAME`` in the run's folder.

    Raises:
        UserError: an argument cannot be used, more videos are bad than ``data.max_bad_fraction`` allows, the workers
            fail, or the results cannot be written.
    """
    checkpoint = find_checkpoint(uri)
    try:
        info, contents = checkpoints.load(checkpoint, [checkpoints.WEIGHTS])
    except OSError as error:
        raise UserError(f"{checkpoint} cannot be read: {error}") from error
    run = storage.parent(storage.parent(checkpoint))
    record = read_record(run)
    config = recipe_of(info, overrides, run if record else None)
    task = task_of(config)
    config = task.for_evaluation(with_workers(with_views(config, views), workers))
    tracking_uri(config)  # raises now what it would raise after scoring
    if not any(override.strip().startswith("tracking.uri") for override in overrides):
        refuse_foreign_server(config)
    manifest = task.read_split(config, split, known_classes(info))
    name = evaluation_name(split, config, info, overrides)
    folder = storage.join(".", out) if out else storage.join(run if record else checkpoint, f"{FOLDER}/{name}")
    start_ray()
    config = choose_device(config)
    wait_for_room(config.scaling)
    clips, crops, unit = config.eval.clips, config.eval.crops, MAIN_METRICS[config.task].unit
    what = f"{split}, {len(manifest.rows)} {unit} x {clips}x{crops} views, workers: {config.scaling.workers}"
    logger.info(f"{checkpoint} (step {info.step}, epoch {info.epoch}): {what}")
    names, bad = output_names(info.classes, config.model.variant().num_classes), list[BadVideo]()
    blocks = score_good_videos(manifest, config, contents[checkpoints.WEIGHTS], bad)
    found = RESULTS[config.task](folder, blocks, manifest, names, config)
    about = found.metrics, found.classes, bad, found.table, found.worst, unit
    result = Evaluation(name, folder, checkpoint, info.step, info.epoch, split, (clips, crops), *about)
    # The summary is the last file: with it, all are there.
    files = found.files | {"summary.json": summary_json(result, recipe_without_password(config))}
    with hold_signals() as held:
        write_results(folder, files)
        path = config.data.list_of(split)
        dataset = list_name(path), list_digest(list_fingerprint(manifest))
        run_id = record["mlflow_run_id"] if record else None
        link = link_to(checkpoint, info, run_id, {}) if run_id else None
        scores = storage.join(folder, found.scores)
        result.mlflow_run_id = log_evaluation(result, files, config, run_id, link, dataset, scores)
    raise_held(held)
    return result


# --- input -------------------------------------------------------------------------------------------


def recipe_of(info: checkpoints.CheckpointInfo, overrides: Sequence[str], run: str | None) -> Config:
    """Return a checkpoint's recipe with ``scaling.use_gpu: auto``, and with overrides.

    Args:
        run: folder of the checkpoint's run, which may have moved since: it gives ``train.storage``.

    Raises:
        RecipeError: an override changes a key that the checkpoint fixes, or the result is not a valid recipe.
    """
    tree = json.loads(json.dumps(info.config))
    tree["scaling"]["use_gpu"] = "auto"  # the run may have used another machine
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key == "scaling.workers":
            raise RecipeError("override scaling.workers: use --workers; the recipe's key belongs to its batch")
        if not key.startswith(KEYS_OVERRIDABLE):
            allowed = ", ".join(prefix + "*" * prefix.endswith(".") for prefix in KEYS_OVERRIDABLE)
            raise RecipeError(f"override {override!r}: {key} of a trained model is fixed; these can change: {allowed}")
        if key in KEYS_OF_PIXELS:
            name = key.removeprefix("data.")
            trained = tree["data"].get(name, DataSection.model_fields[name].default)
            raise RecipeError(f"override {override!r}: the model was trained with {key} {trained}; leave it out")
        if key in KEYS_OF_EVALUATION:
            raise RecipeError(f"override {override!r}: an evaluation scores all key frames, whole; leave it out")
        set_key(tree, override)
    if run:
        tree["train"]["storage"] = storage.parent(run)
    if cache := tree["data"].get("cache_dir"):
        tree["data"]["cache_dir"] = storage.local_path(cache)  # tasks run in other folders
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = [describe(problem) for problem in error.errors()]
        raise RecipeError("the checkpoint's recipe cannot be run:\n  " + "\n  ".join(problems)) from error


def with_workers(config: Config, workers: int | None) -> Config:
    """Return the recipe with this number of workers. The global batch need not be divisible by it."""
    if workers is None:
        return config
    scaling = config.scaling.model_copy(update={"workers": workers, "min_workers": None})
    return config.model_copy(update={"scaling": scaling})


def evaluation_name(split: str, config: Config, info: checkpoints.CheckpointInfo, overrides: Sequence[str]) -> str:
    """Return split, views and step; where overrides change the data, also a hash of these overrides."""
    name = f"{split}-{config.eval.clips}x{config.eval.crops}-step{info.step:010d}"
    named = sorted(override for override in overrides if not override.strip().startswith(KEYS_NOT_IN_NAME))
    return name + (f"-{hashlib.sha256(chr(0).join(named).encode()).hexdigest()[:8]}" if named else "")


# --- results -----------------------------------------------------------------------------------------------------


def summary_json(result: Evaluation, config: Config) -> bytes:
    """Return ``summary.json``: the evaluation without the figures of its classes, and its recipe without secrets."""
    tree = asdict(result)
    for key in ("classes", "table", "worst", "unit", "path", "mlflow_run_id", "pages"):
        del tree[key]
    tree |= {"time": datetime.now(UTC).isoformat(timespec="seconds"), "config": config.model_dump(mode="json")}
    return scrub(json.dumps(tree, indent=1), tracking_uri(config)).encode()


def write_results(folder: str, files: Mapping[str, bytes]) -> None:
    """Write the result files into a folder.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        for name, content in files.items():
            storage.write_bytes(storage.join(folder, name), content)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}; choose another folder with --out") from error


def log_evaluation(
    result: Evaluation,
    files: Mapping[str, bytes],
    config: Config,
    run_id: str | None,
    checkpoint: CheckpointLink | None = None,
    dataset: tuple[str, str] | None = None,
    scores: str | None = None,
) -> str | None:
    """Add an evaluation to an MLflow run, whose status does not change.

    Metrics are those of ``PREFIXES`` at the checkpoint's step. The files are artifacts
    in ``evaluation/NAME``. The tag ``evaluation.test`` names the last evaluation.

    Args:
        run_id: None, or one that MLflow does not know: the evaluation gets a new run.
        checkpoint: whose logged model in the run gets the metrics too.
        dataset: name and digest of the list of videos.
        scores: path or URI of the file of all scores, which becomes an artifact too unless it is large.

    Returns:
        The id of the MLflow run; None if MLflow did not accept the evaluation.
    """
    uri, prefix = tracking_uri(config), PREFIXES[result.split]
    server = f"MLflow at {without_secrets(uri)}"
    prepare_mlflow()
    try:
        prepare_sqlite(uri)
        client = MlflowClient(uri)
        known = run_id if run_id and run_exists(client, run_id) else None
        if run_id and not known:
            logger.warning(f"{server} has no run {run_id}, or it is deleted; the evaluation gets a run of its own")
        target = known or create_run(
            client,
            config.model_copy(update={"name": f"{config.name}-{result.name}"}),
            {"checkpoint": result.checkpoint},
        )
        values = {f"{prefix}{name}": value for name, value in result.metrics.items()}
        tags = [RunTag(f"evaluation.{prefix.removesuffix('/')}", result.name), *infinite_tags(values, result.step)]
        metrics = as_metrics(values, now_ms(), result.step)
        if known and checkpoint:
            metrics = with_model(metrics, find_logged_model(client, known, checkpoint, server), dataset)
        client.log_batch(target, metrics=metrics, tags=tags)
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            client.log_artifacts(target, folder, f"{ARTIFACTS}/{result.name}")
        if scores:
            log_scores(client, target, scores, f"{ARTIFACTS}/{result.name}")
        if not known:
            client.set_terminated(target)
        link = run_link(uri, client.get_run(target).info.experiment_id, target)
        result.pages = links_text(uri, {"this run": link})
    except Exception as error:  # networks, databases and artifact stores raise many kinds; the results are on disk
        problem = explain_store_error(error, uri)
        logger.warning(f"{server} does not accept the evaluation ({problem}); its files are in {result.path}")
        return None
    return target


def log_scores(client: MlflowClient, run_id: str, uri: str, artifacts: str) -> None:
    """Add a file to the artifacts of a run, piece by piece, unless it is larger than ``LARGEST_ARTIFACT``.

    Args:
        uri: the file.
        artifacts: folder among the run's artifacts.
    """
    size = storage.file_size(uri)
    if size > LARGEST_ARTIFACT:
        logger.info(f"{uri} has {size / 2**30:.1f} GiB, more than MLflow takes well, so it is not among the artifacts")
    elif storage.is_remote(uri):
        with tempfile.TemporaryDirectory() as folder:
            copy = os.path.join(folder, storage.base_name(uri))
            storage.copy_file(uri, copy)
            client.log_artifact(run_id, copy, artifacts)
    else:
        client.log_artifact(run_id, uri, artifacts)


def find_logged_model(client: MlflowClient, run_id: str, link: CheckpointLink, server: str) -> str | None:
    """The id of a checkpoint's logged model; None if the server is of an older MLflow, which has none."""
    try:
        return checkpoint_model(client, run_id, link).model_id
    except MlflowException as error:
        if error.error_code != "ENDPOINT_NOT_FOUND":
            raise
        logger.warning(f"{server} is of an older version without logged models; the run alone gets the evaluation")
        return None


def with_model(metrics: Sequence[Metric], model_id: str | None, dataset: tuple[str, str] | None) -> list[Metric]:
    """Metrics that belong to a logged model and a data set too. MLflow would store a NaN of a model as 0.

    Args:
        dataset: name and digest.
    """
    name, digest = dataset or (None, None)
    return [
        Metric(m.key, m.value, m.timestamp, m.step, None if math.isnan(m.value) else model_id, name, digest)
        for m in metrics
    ]


def run_exists(client: MlflowClient, run_id: str) -> bool:
    """Return whether MLflow has a run that is not deleted."""
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == LifecycleStage.ACTIVE)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
