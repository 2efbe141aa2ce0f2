"""Test a trained model on a split, with many views a video: ``posmlp evaluate``.

Ray tasks anywhere in the cluster decode a block of videos each, as in training (``pipelines.data.loader``), actors score the
blocks, the driver collects. The actors know nothing of each other: one that dies costs its block, which Ray scores
again, and nothing is padded as in training: every video is in one block. (Ray Data's pool of actors would do; but it
restarts a dying one for ever.)
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException
from pydantic import ValidationError

from pipelines.cluster.capacity import wait_for_room
from pipelines.cluster.session import start_ray
from pipelines.data.scan import parquet
from pipelines.inference.scoring import SHOWN, Scores, score_split
from pipelines.inference.views import with_views
from pipelines.runs import checkpoints
from pipelines.runs.errors import BadVideo
from pipelines.runs.models import class_names, find_checkpoint
from pipelines.runs.record import read_record
from pipelines.tracking import plots
from pipelines.tracking.mlflow_client import create_run, now_ms, prepare_mlflow
from pipelines.tracking.uris import refuse_strangers, scrub, tracking_uri, without_password, without_secrets
from posmlp import storage
from posmlp.config import Config, RecipeError, describe, set_key
from posmlp.errors import UserError
from posmlp.learn.evaluation import ClassificationMetrics, video_scores
from posmlp.video.manifest import Manifest, read_split

FOLDER = "evaluations"  # in the run's folder
ARTIFACTS = "evaluation"  # of the MLflow run
CHANGEABLE = ("data.", "eval.", "scaling.", "tracking.", "train.precision")  # by overrides
# Of these, what changes no score, or is in the evaluation's name anyway.
NEUTRAL = ("eval.", "scaling.", "tracking.", "data.cache_dir", "data.rows_per_block", "data.decode_timeout_s")
NEUTRAL += ("data.max_bad_fraction",)


@dataclass(frozen=True)
class ClassResult:
    """One class of the split.

    Attributes:
        videos: that were scored.
        top1, top5: shares of them; None without videos.
        confused_with, confused: the wrong class that they are most often taken for, and how many are; "" and 0 without.
    """

    name: str
    videos: int
    top1: float | None
    top5: float | None
    confused_with: str
    confused: int


@dataclass
class Evaluation:
    """What an evaluation found and left.

    Attributes:
        name: split, views and step.
        path: the folder of its files, a path or a URI.
        checkpoint, step, epoch: what was evaluated.
        split: ``train`` or ``val``.
        views: clips in time, and squares of each.
        metrics: ``top1``, ``top5``, ``class_mean``, ``loss``, ``videos`` that were scored.
        classes: each class's own figures, by label.
        bad: videos that could not be decoded, and count for nothing.
        mlflow_run_id: where it is logged; None if MLflow did not take it.
    """

    name: str
    path: str
    checkpoint: str
    step: int
    epoch: int
    split: str
    views: tuple[int, int]
    metrics: dict[str, float]
    classes: list[ClassResult]
    bad: list[BadVideo]
    mlflow_run_id: str | None = None

    def __str__(self) -> str:
        """A table, the worst classes, and the bad videos."""
        metrics = self.metrics
        rows = [
            ("top-1", f"{metrics['top1']:.2%} of {metrics['videos']:.0f} videos"),
            ("top-5", f"{metrics['top5']:.2%}"),
            ("mean over classes", f"{metrics['class_mean']:.2%}"),
            ("loss", f"{metrics['loss']:.4f}"),
            ("bad videos", str(len(self.bad))),
            ("results", self.path),
            ("MLflow", f"run {self.mlflow_run_id}" if self.mlflow_run_id else "not logged"),
        ]
        lines = [f"  {name:<19}{value}" for name, value in rows]
        wrong = sorted((c for c in self.classes if c.top1 is not None and c.top1 < 1), key=lambda c: c.top1 or 0.0)
        wrong = wrong[:SHOWN]
        width = max((len(c.name) for c in wrong), default=0)
        lines += [""] * bool(wrong)
        for c in wrong:
            often = f"; {c.confused} taken for {c.confused_with}" if c.confused else ""
            lines.append(f"  {c.name:<{width}}  {c.top1:>6.1%} of {c.videos}{often}")
        lines += [f"  {video.uri}: {video.reason}" for video in self.bad[:SHOWN]]
        if len(self.bad) > SHOWN:
            lines.append(f"  ... and {len(self.bad) - SHOWN} more bad videos in summary.json")
        return "\n".join(lines)


def evaluate(
    uri: str,
    views: tuple[int, int] | None = None,
    split: Literal["train", "val"] = "val",
    overrides: Sequence[str] = (),
    workers: int | None = None,
    out: str | None = None,
    echo: Callable[[str], None] = print,
) -> Evaluation:
    """Score every video of a split with a checkpoint, write down the results and log them to the checkpoint's run.

    Args:
        uri: a run's name or folder, which stands for its best checkpoint, or a checkpoint's folder.
        views: clips in time and squares of each (``pipelines.inference.views.parse_views``); None: the recipe's.
        split: which of the recipe's lists of videos.
        overrides: ``section.key=value`` each, of ``CHANGEABLE``.
        workers: actors that score; None: ``scaling.workers``.
        out: the folder for the results; None: ``evaluations/NAME`` in the run's folder.
        echo: takes lines of progress.

    Raises:
        UserError: what was given cannot be used, more videos are bad than ``data.max_bad_fraction`` allows, the workers
            fail, or the results cannot be written.
    """
    checkpoint = find_checkpoint(uri)
    try:
        about, contents = checkpoints.load(checkpoint, [checkpoints.WEIGHTS])
    except OSError as error:
        raise UserError(f"{checkpoint} cannot be read: {error}") from error
    run = storage.parent(storage.parent(checkpoint))
    record = read_record(run)
    config = recipe_of(about, overrides, run if record else None)
    config = with_workers(with_views(config, views), workers)
    tracking_uri(config)  # refuses now what it would refuse when all is scored
    if not any(override.strip().startswith("tracking.uri") for override in overrides):
        refuse_strangers(config)
    manifest = read_split(config.data, split)
    check_classes(manifest.classes, about.classes, getattr(config.data, split).path)
    name = name_of(split, config, about, overrides)
    place = storage.join(".", out) if out else storage.join(run if record else checkpoint, f"{FOLDER}/{name}")
    start_ray()
    wait_for_room(config.scaling, echo)
    clips, crops = config.eval.clips, config.eval.crops
    what = f"{split}, {len(manifest.rows)} videos x {clips}x{crops} views, workers: {config.scaling.workers}"
    echo(f"{checkpoint} (step {about.step}, epoch {about.epoch}): {what}")
    scores = score_split(manifest, config, contents[checkpoints.WEIGHTS], echo)

    names = class_names(about.classes, config.model.variant().num_classes)
    tally, classes = summarise(scores, manifest.rows["label"].to_numpy(), names)
    metrics = {key.removeprefix("val/"): value for key, value in tally.metrics().items()}
    metrics["videos"] = metrics.pop("clips")
    found = Evaluation(
        name, place, checkpoint, about.step, about.epoch, split, (clips, crops), metrics, classes, scores.bad
    )
    files = {
        "summary.json": summary(found, without_password(config)),
        "per_class.csv": class_table(classes),
        "confusion.png": plots.confusion(tally.confusion.numpy(), names),
        "scores.parquet": score_table(scores, manifest, names, crops),
    }
    write(place, files)
    found.mlflow_run_id = log(found, files, config, record and record["mlflow_run_id"], echo)
    return found


# --- what is evaluated -------------------------------------------------------------------------------------------


def recipe_of(about: checkpoints.CheckpointInfo, overrides: Sequence[str], run: str | None) -> Config:
    """A checkpoint's recipe with overrides; for a checkpoint of a run, ``train.storage`` is where that lies now.

    Raises:
        RecipeError: an override changes what the checkpoint fixes, or the result is no recipe.
    """
    tree = json.loads(json.dumps(about.config))
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key == "scaling.workers":
            raise RecipeError("override scaling.workers: say --workers; the recipe's belong to its batch")
        if not key.startswith(CHANGEABLE):
            allowed = ", ".join(prefix + "*" * prefix.endswith(".") for prefix in CHANGEABLE)
            raise RecipeError(f"override {override!r}: a trained model's {key} is fixed; what can change is {allowed}")
        set_key(tree, override)
    if run:
        tree["train"]["storage"] = storage.parent(run)
    if cache := tree["data"].get("cache_dir"):
        tree["data"]["cache_dir"] = os.path.abspath(cache)  # tasks run elsewhere
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = [describe(problem) for problem in error.errors()]
        raise RecipeError("the checkpoint's recipe cannot be run:\n  " + "\n  ".join(problems)) from error


def with_workers(config: Config, workers: int | None) -> Config:
    """The recipe with another number of workers, into which the global batch need not divide."""
    if workers is None:
        return config
    return config.model_copy(update={"scaling": config.scaling.model_copy(update={"workers": workers})})


def check_classes(found: Sequence[str], expected: Sequence[str], path: str) -> None:
    """Refuse a split whose labels mean something else than the model's.

    Raises:
        UserError: names the first difference.
    """
    if len(found) != len(expected):
        raise UserError(
            f"{path} has {len(found)} classes, the checkpoint {len(expected)}; name all in a file (data.classes)"
        )
    for label, (here, there) in enumerate(zip(found, expected, strict=True)):
        if here != there:
            raise UserError(f"label {label} is class {here!r} in {path}, but {there!r} in the checkpoint")


def name_of(split: str, config: Config, about: checkpoints.CheckpointInfo, overrides: Sequence[str]) -> str:
    """Split, views and step; with other data than the recipe's also a mark of the overrides that made it so."""
    name = f"{split}-{config.eval.clips}x{config.eval.crops}-step{about.step:010d}"
    telling = sorted(override for override in overrides if not override.strip().startswith(NEUTRAL))
    return name + (f"-{hashlib.sha256(chr(0).join(telling).encode()).hexdigest()[:8]}" if telling else "")


# --- scoring -----------------------------------------------------------------------------------------------------


# --- results -----------------------------------------------------------------------------------------------------


def summarise(
    scores: Scores, labels: np.ndarray, names: Sequence[str]
) -> tuple[ClassificationMetrics, list[ClassResult]]:
    """The counts over all scored videos, and each class's plots.

    Args:
        labels: int ``[videos]``.
    """
    predicted = video_scores(torch.from_numpy(scores.views))  # [videos, classes]
    truth, counted = torch.from_numpy(labels.astype(np.int64)), torch.from_numpy(scores.scored)
    tally = ClassificationMetrics.empty(len(names))
    tally.add(predicted, truth, counted)
    hits = (predicted.topk(min(5, len(names)), dim=1).indices == truth[:, None]).any(1) & counted
    top5 = torch.bincount(truth[hits], minlength=len(names)).tolist()
    classes = []
    for label, name in enumerate(names):
        row = tally.confusion[label].clone()
        videos, right = int(row.sum()), float(row[label])
        row[label] = 0
        confused = int(row.max())
        shares = (right / videos, top5[label] / videos) if videos else (None, None)
        classes.append(ClassResult(name, videos, *shares, names[int(row.argmax())] if confused else "", confused))
    return tally, classes


def summary(found: Evaluation, config: Config) -> bytes:
    """``summary.json``: everything but the classes' figures, and the recipe that it was done with, without secrets."""
    tree = asdict(found)
    for key in ("classes", "path", "mlflow_run_id"):
        del tree[key]
    tree |= {"time": datetime.now(UTC).isoformat(timespec="seconds"), "config": config.model_dump(mode="json")}
    return scrub(json.dumps(tree, indent=1), tracking_uri(config)).encode()


def class_table(classes: Iterable[ClassResult]) -> bytes:
    """``per_class.csv``: a ``ClassResult`` a line, by label."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["label", "class", "videos", "top1", "top5", "confused_with", "confused"])
    for label, c in enumerate(classes):
        writer.writerow([label, c.name, c.videos, c.top1, c.top5, c.confused_with, c.confused])
    return text.getvalue().encode()


def score_table(scores: Scores, manifest: Manifest, names: Sequence[str], crops: int) -> bytes:
    """``scores.parquet``: a row a view of each scored video, its ``scores`` logarithms of probabilities by label; the
    schema's metadata ``classes`` names them."""
    rows = manifest.rows.filter(pa.array(scores.scored))
    kept = scores.views[scores.scored]  # [videos, views, classes]
    videos, views, classes = kept.shape
    view = np.tile(np.arange(views, dtype=np.int32), videos)
    table = rows.select(["sample_id", "uri", "label"]).take(np.repeat(np.arange(videos), views))
    for name, column in (("view", view), ("clip", view // crops), ("crop", view % crops)):
        table = table.append_column(name, pa.array(column))
    table = table.append_column("scores", pa.FixedSizeListArray.from_arrays(pa.array(kept.reshape(-1)), classes))
    return parquet(table.replace_schema_metadata({"classes": json.dumps(list(names))}), compression="zstd")


def write(place: str, files: Mapping[str, bytes]) -> None:
    """Write files into a folder.

    Raises:
        UserError: it cannot be written.
    """
    try:
        for name, content in files.items():
            storage.write_bytes(storage.join(place, name), content)
    except OSError as error:
        raise UserError(f"{place} cannot be written: {error}; choose another folder with --out") from error


def log(
    found: Evaluation, files: Mapping[str, bytes], config: Config, run_id: str | None, echo: Callable[[str], None]
) -> str | None:
    """Add an evaluation to an MLflow run, whose status stays; without one, or where MLflow does not have it, to a new
    run. Returns its id, None if MLflow does not take it.

    Metrics are ``test/*`` at the checkpoint's step (of the training split ``test_train/*``), files artifacts in
    ``evaluation/NAME``, and the tag ``evaluation.test`` names the one that was last.
    """
    uri, group = tracking_uri(config), "test" if found.split == "val" else "test_train"
    place = f"MLflow at {without_secrets(uri)}"
    prepare_mlflow()
    try:
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(uri)
        known = run_id if run_id and is_there(client, run_id) else None
        if run_id and not known:
            echo(f"{place} has no run {run_id}; the evaluation gets a run of its own")
        target = known or create_run(
            client, config.model_copy(update={"name": f"{config.name}-{found.name}"}), {"checkpoint": found.checkpoint}
        )
        metrics = [Metric(f"{group}/{k}", v, now_ms(), found.step) for k, v in found.metrics.items()]
        client.log_batch(target, metrics=metrics, tags=[RunTag(f"evaluation.{group}", found.name)])
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            client.log_artifacts(target, folder, f"{ARTIFACTS}/{found.name}")
        if not known:
            client.set_terminated(target)
    except Exception as error:  # of a network, database or artifact store, in their many kinds; the results are written
        reason = scrub(" ".join(str(error).split()), uri)[:200]
        echo(f"{place} does not take the evaluation ({reason}); it is in {found.path} all the same")
        return None
    return target


def is_there(client: MlflowClient, run_id: str) -> bool:
    """Whether MLflow has a run."""
    try:
        client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True
