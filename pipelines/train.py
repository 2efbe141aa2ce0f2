"""One training run: a driver that checks, reports and tracks, and Ray Train workers that learn (``pipelines.worker``).

The driver validates everything first, starts the workers and takes from its mailbox what the first of them tells; the
driver alone prints and writes to MLflow. A run lives in ``train.storage/name``; the same name goes on from its newest
checkpoint (``pipelines.checkpoints``). Ray Train's own checkpoints are not used: it resumes only those that it has
noted itself, which a kill can prevent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray._private import ray_constants
from ray.actor import ActorHandle
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from pipelines import checkpoints, figures, gauges
from pipelines.cluster import bundle, wait_for_room
from pipelines.group import GroupConfig
from pipelines.ingest import BadVideo
from pipelines.mailbox import open_mailbox
from pipelines.runs import check_writable, read_record, run_folder, trained_model, write_record
from pipelines.tracking import Tracker, source_tags, without_secrets
from pipelines.worker import RunError, train_worker
from posmlp import storage
from posmlp.config import Config, flatten
from posmlp.errors import UserError
from posmlp.video.augment import flip_labels
from posmlp.video.manifest import Manifest, ManifestError, read_split

# glibc gives every large block back to the system and takes a fresh one for the next: a quarter of a training step on
# the CPU is then page faults. Workers keep what they have, in one arena: the training thread's own would give it back.
WORKER_ENV = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_ARENA_MAX": "1",
}
CUBLAS_ENV = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # cuBLAS repeats itself only with it (train.deterministic)
# Keys that a run which goes on may change: they are not what it learns from a good video.
FREE = ("scaling.", "tracking.", "data.max_bad_fraction", "data.decode_timeout_s")
FREE += ("data.cache_dir", "data.rows_per_block", "data.decoder", "data.train.root", "data.val.root")
FREE += ("train.checkpoint_every_steps", "train.keep_last", "train.keep_best", "train.storage")
# And keys that it can never change: with another model or other batches there is nothing to go on with.
FIXED = ("model.name", "model.num_classes", "model.frames", "model.image_size", "model.dims", "model.depths")
FIXED += (
    "model.groups",
    "model.windows",
    "model.blocks",
    "model.choices",
    "train.global_batch",
    "train.seed",
    "data.repeats",
)
FIXED += ("data.train.", "data.format", "list.train")
POLL_S = 0.2
GROW_S = 60.0  # between two looks whether an elastic run has room to grow: it restarts, and nodes come one by one


@dataclass
class RunResult:
    """What a finished run leaves.

    Attributes:
        path: the run's folder, a path or a URI.
        metrics: those of the last epoch.
        bad: every bad video, once.
        undelivered: what MLflow has not taken yet (``posmlp sync``).
    """

    name: str
    path: str
    mlflow_run_id: str
    metrics: dict[str, float]
    bad: list[BadVideo] = field(default_factory=list)
    undelivered: int = 0


@dataclass(frozen=True)
class Part:
    """What a study has to say to a run that is one of its trials.

    Attributes:
        tags, params: for the run's MLflow run, beside its own.
        costs: metrics of the model's cost, which the workers need not measure then.
        on_epoch: is told the metrics of each epoch that ends.
        stop: once it is set, the run saves its state and raises ``StoppedError``.
    """

    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    on_epoch: Callable[[Mapping[str, float]], None] = lambda metrics: None
    stop: threading.Event = field(default_factory=threading.Event)


class StoppedError(KeyboardInterrupt):
    """A run that was asked to stop by a signal, or by its study, and has saved its state."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


# --- on the driver -----------------------------------------------------------------------------------------------


def train(
    config: Config,
    echo: Callable[[str], None] = print,
    *,
    profile: bool = False,
    allow_changes: bool = False,
    part: Part | None = None,
) -> RunResult:
    """Run to the end, from the start or from where a run of this name stopped.

    Args:
        config: the recipe.
        echo: takes lines of progress.
        profile: trace some steps, into the run's MLflow artifacts.
        allow_changes: go on with another recipe than the run was started with.
        part: of a study.

    Raises:
        ManifestError: the data set's list is wrong.
        RunError: the run cannot start (the message says what to change), or has failed.
        StoppedError: a signal (SIGINT or SIGTERM) or the study asked it to stop; the same call goes on from there.
        KeyboardInterrupt: a second signal; the same call goes on from the last checkpoint.
    """
    part = part or Part()
    run = run_folder(config)
    train_set, val_set = read_splits(config)
    config = check_data(config, train_set, val_set)
    record, lists = read_record(run), {"train": fingerprint(train_set), "val": fingerprint(val_set)}
    whole = [found.about for found in checkpoints.find(run) if found.about]
    done = max((about.epoch for about in whole), default=0)
    changed = check_record(run, record, config, lists, done, allow_changes) if record else {}
    weights = None if whole else find_weights(config)
    start_ray()
    wait_for_room(config.scaling, echo)
    check_writable(run)
    run_id = record["mlflow_run_id"] if record else None
    tags = source_tags() | {"run": run} | part.tags
    tracker = Tracker.open(config, tags, run_id, journal=journal_path(run), params=part.params, echo=echo)
    status = "FAILED"
    report = Report(config.name, tracker, echo, part.on_epoch)
    if part.costs and not whole:
        tracker.log(part.costs, step=0)
    try:
        config = without_password(config)  # from here on it is written down
        if changed:
            tracker.log_tags({f"changed.{key}": change for key, change in changed.items()})
            tracker.log_file("config.yaml", config.to_yaml().encode())
        write_record(run, config, lists, tracker.run_id, None)
        job = {"config": config.model_dump(), "run": run, "weights": weights, "classes": train_set.classes}
        fit(job | {"profile": profile, "measure": not part.costs}, train_set, val_set, config, report, part.stop)
        metrics = report.history[-1]
        report.draw(train_set.classes)
        write_record(run, config, lists, tracker.run_id, metrics)
        status = "FINISHED"
        if config.tracking.log_model:
            log_model(run, config, tracker, echo)
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        undelivered = tracker.close(status)
        if undelivered:
            echo(f"{undelivered} notes wait for MLflow; `posmlp sync {run}` delivers them")
    return RunResult(config.name, run, tracker.run_id, metrics, list(report.bad.values()), undelivered)


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


def check_record(
    run: str, record: dict[str, Any], config: Config, lists: dict[str, str], done: int, allow_changes: bool
) -> dict[str, str]:
    """Refuse to redo a finished run, and to go on with another recipe unless that is wanted; returns the changes.

    Args:
        lists: what the splits' lists are now (``fingerprint``).
        done: whole epochs done.
    """
    if record["metrics"] is not None:
        raise RunError(
            f"run {config.name!r} is finished (val/top1 {record['metrics'].get('val/top1', float('nan')):.1%}, "
            f"{run}). Choose another name (name=...), or delete that folder to train it again."
        )
    changed = changes(record, config, lists)
    fixed = [k for k in changed if k.startswith(FIXED)]
    if changed and (fixed or not allow_changes):
        way = "choose another name, delete that folder, "
        way += "or restore" if fixed else "go on all the same with --allow-changes, or restore"
        raise RunError(
            f"run {config.name!r} ({run}) was started with another recipe; {way}:"
            + "".join(f"\n  {k}: {change}" for k, change in changed.items() if not fixed or k in fixed)
        )
    if "train.epochs" in changed and config.train.epochs <= done:
        raise RunError(f"train.epochs {config.train.epochs}: run {config.name!r} has done {done} epochs already")
    return changed


def changes(record: dict[str, Any], config: Config, lists: dict[str, str]) -> dict[str, str]:
    """What differs, by key, between a recipe and that of a run, of what matters to what is learned."""
    before = flatten(record["config"]) | {f"list.{split}": text for split, text in record["lists"].items()}
    now = config.flat() | {f"list.{split}": text for split, text in lists.items()}
    changed = {k: f"was {before.get(k)!r}, is {now.get(k)!r}" for k in before | now if before.get(k) != now.get(k)}
    return {k: change for k, change in changed.items() if not k.startswith(FREE)}


def fingerprint(manifest: Manifest) -> str:
    """Tells whether a list is still the same: its videos, labels and classes, wherever the videos lie now."""
    rows = manifest.rows.select(["sample_id", "label"]).to_pydict()
    text = json.dumps([rows, manifest.classes])
    return f"{len(manifest.rows)} videos, {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def find_weights(config: Config) -> str | None:
    """The file that ``model.weights`` stands for.

    Raises:
        UserError: there is none.
    """
    weights = config.model.weights
    if weights is None or storage.are_files([weights])[0]:
        return weights
    try:
        checkpoint = checkpoints.choose(weights)
        checkpoints.checked(checkpoint, checkpoints.WEIGHTS, checkpoints.read_about(checkpoint))
    except UserError as error:
        raise UserError(
            f"model.weights is neither a file of weights nor a run: {error}. Train that run first, or start from "
            "random weights with model.weights=null"
        ) from error
    return storage.join(checkpoint, checkpoints.WEIGHTS)


def without_password(config: Config) -> Config:
    """The recipe as it may be stored: a password in ``tracking.uri`` is left out."""
    uri = config.tracking.uri and without_secrets(config.tracking.uri)
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})


def journal_path(run: str) -> Path:
    """Where what MLflow shall get is kept until it has it: on this machine, with the run if that is here too."""
    folder = Path("runs", run.rstrip("/").rpartition("/")[2]).resolve() if storage.is_remote(run) else Path(run)
    return folder / "tracking" / "journal.jsonl"


def read_splits(config: Config) -> tuple[Manifest, Manifest]:
    """Both splits' lists; what is wrong with either is told at once."""
    found, problems = [], []
    for name in ("train", "val"):
        try:
            found.append(read_split(config.data, name))
        except ManifestError as error:
            problems += error.problems
    if problems:
        raise ManifestError(list(dict.fromkeys(problems)))
    return found[0], found[1]


def check_data(config: Config, train_set: Manifest, val_set: Manifest) -> Config:
    """Fill in the number of classes and where the cache is; refuse splits that do not fit together or the batch."""
    if train_set.classes != val_set.classes:
        raise RunError(
            f"the splits name different classes: {config.data.train.path} has {list(train_set.classes)}, "
            f"{config.data.val.path} has {list(val_set.classes)}"
        )
    clips = len(train_set.rows) * config.data.repeats
    if clips < config.train.global_batch:
        raise RunError(
            f"train.global_batch {config.train.global_batch} is more than the {clips} training clips "
            f"of {config.data.train.path}; lower it"
        )
    if config.data.fps is not None:
        for split, manifest in ((config.data.train, train_set), (config.data.val, val_set)):
            if manifest.rows["frames"].null_count < len(manifest.rows):
                raise RunError(
                    f"data.fps {config.data.fps:g} needs frame times, but {split.path} lists frame folders, which have "
                    "none; leave data.fps out"
                )
    flip_labels(config.augment.flip_classes, train_set.classes, len(train_set.classes))
    classes = config.model.num_classes or len(train_set.classes)
    if classes < len(train_set.classes):
        raise RunError(f"model.num_classes {classes} is less than the data set's {len(train_set.classes)} classes")
    cache = config.data.cache_dir
    data = config.data.model_copy(update={"cache_dir": cache and os.path.abspath(cache)})  # tasks run elsewhere
    weights = config.model.weights
    update = {"num_classes": classes, "weights": weights and storage.join(".", weights)}
    model = config.model.model_copy(update=update)
    return config.model_copy(update={"model": model, "data": data})


def fit(
    job: dict[str, Any],
    train_set: Manifest,
    val_set: Manifest,
    config: Config,
    report: Report,
    stop: threading.Event,
) -> None:
    """Run the workers, and pass on what they tell, until they are done, or have saved when ``stop`` is set.

    Raises:
        RunError: the run has failed.
        StoppedError, KeyboardInterrupt: as ``train``.
    """
    mailbox, scaling = open_mailbox(), config.scaling
    rows = {"train_rows": ray.put(train_set.rows), "val_rows": ray.put(val_set.rows)}
    own = tempfile.mkdtemp(prefix="ray-train-")  # for Ray Train's notes, which nothing reads
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=job | rows | {"mailbox": mailbox},
        torch_config=GroupConfig(backend="cpu:gloo,cuda:nccl" if scaling.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(scaling.min_workers, scaling.workers) if scaling.min_workers else scaling.workers,
            use_gpu=scaling.use_gpu,
            resources_per_worker=bundle(scaling),
            label_selector=scaling.train_on or None,
            elastic_resize_monitor_interval_s=GROW_S,
        ),
        run_config=RunConfig(
            name=f"{config.name}-{uuid.uuid4().hex[:8]}",
            storage_path=own,
            failure_config=FailureConfig(max_failures=scaling.max_failures),
            worker_runtime_env={"env_vars": WORKER_ENV | (CUBLAS_ENV if config.train.deterministic else {})},
        ),
    )
    failures: list[Exception] = []
    # In a thread: Ray Train would make Ctrl-C its own, and end without a checkpoint.
    fitting = threading.Thread(target=run_trainer, args=(trainer, failures), daemon=True)
    try:
        with stop_on_signal(lambda: mailbox.stop.remote(), report.echo) as caught:
            fitting.start()
            while fitting.is_alive():
                fitting.join(POLL_S)
                report.take(mailbox)
                if stop.is_set():
                    mailbox.stop.remote()
            report.take(mailbox)  # what came just before the end
        reason = ray.get(mailbox.reason.remote())
        ray.kill(mailbox)
    except ray.exceptions.RayError as error:
        raise RunError(f"the Ray cluster does not answer any more: {error}; the same call goes on") from error
    finally:
        shutil.rmtree(own, ignore_errors=True)
    if reason:
        raise RunError(reason)
    if failures:
        raise RunError(f"training failed: {failures[0]}") from failures[0]
    if len(report.history) < config.train.epochs:
        raise StoppedError(caught[0] if caught else signal.SIGTERM)


def run_trainer(trainer: TorchTrainer, failures: list[Exception]) -> None:
    """``trainer.fit()``; what it raises goes into the list."""
    try:
        trainer.fit()
    except Exception as error:  # of a thread, none would be seen
        failures.append(error)


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


class Report:
    """Prints and tracks what the workers tell.

    Attributes:
        history: metrics of each finished epoch.
        bad: every bad video, by its sample id.
        confusion: ``[classes, classes]``, of the last validation.
    """

    def __init__(
        self, run: str, tracker: Tracker, echo: Callable[[str], None], on_epoch: Callable[[Mapping[str, float]], None]
    ):
        self.run, self.tracker, self.echo, self.on_epoch = run, tracker, echo, on_epoch
        self.history: list[dict[str, float]] = []
        self.bad: dict[str, BadVideo] = {}
        self.confusion: np.ndarray | None = None
        self.logged = tracker.epochs_logged()

    def take(self, mailbox: ActorHandle) -> None:
        """All that has come since the last call."""
        for event in ray.get(mailbox.take.remote()):
            self.handle(**event)
        self.show()

    def show(self) -> None:
        """How far the run is, as gauges."""
        values = {"epoch": float(len(self.history)), "bad_videos": float(len(self.bad))}
        for metrics in self.history:
            if "val/top1" in metrics:
                values["val_top1"] = metrics["val/top1"]
        gauges.show(self.run, **values)

    def handle(self, kind: str, **event: Any) -> None:
        if kind == "line":
            self.echo(event["text"])
        elif kind == "cost":
            self.tracker.log(event["metrics"], step=0)
        elif kind == "metrics":
            for metrics in event["history"]:  # from the start, whenever workers start
                epoch = int(metrics["epoch"])
                if epoch > len(self.history):
                    self.on_epoch(metrics)
                self.history[epoch - 1 :] = [metrics]
                if epoch > self.logged:
                    self.logged = epoch
                    self.tracker.log(metrics, step=epoch)
        elif kind == "bad":
            self.bad |= {v.sample_id: v for v in event["videos"]}
            self.tracker.log_table([asdict(v) for v in self.bad.values()], "quarantine.json")
        elif kind == "confusion":
            self.confusion = event["counts"]
        elif kind == "file":
            self.tracker.log_file(event["path"], event["content"])

    def draw(self, classes: tuple[str, ...]) -> None:
        """The pictures of a finished run."""
        self.tracker.log_file("learning_curves.png", figures.learning_curves(self.history))
        if self.confusion is not None:
            self.tracker.log_file("confusion.png", figures.confusion(self.confusion, classes))


def log_model(run: str, config: Config, tracker: Tracker, echo: Callable[[str], None]) -> None:
    """The model of the run's newest checkpoint into MLflow; a failure costs the run nothing."""
    try:
        tracker.log_model(last_model(run), example_input(config))
    except Exception as error:  # of the export, which may fail for a model that trains well; the user is told
        echo(f"the model is not in MLflow, as it could not be exported ({type(error).__name__}: {error})")


def last_model(run: str) -> torch.nn.Module:
    """The model of a run's newest checkpoint."""
    whole = [found for found in checkpoints.find(run) if found.about]
    model, _ = trained_model(whole[-1].uri)
    return model


def example_input(config: Config) -> torch.Tensor:
    """Zeros of the shape the model takes: ``[1, 3, T, H, W]``."""
    variant = config.model.variant()
    return torch.zeros(1, 3, variant.frames, variant.image_size, variant.image_size)
