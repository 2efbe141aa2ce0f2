"""One training run: a driver that checks, reports and tracks, and Ray Train workers that learn (``pipelines.training.worker``).

The driver validates everything first, starts the workers and takes from its channel what the first of them tells; the
driver alone prints and writes to MLflow. A run lives in ``train.storage/name``; the same name goes on from its newest
checkpoint (``pipelines.runs.checkpoints``). Ray Train's own checkpoints are not used: it resumes only those that it has
noted itself, which a kill can prevent.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import ray.train
from ray.actor import ActorHandle
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from pipelines.cluster.capacity import bundle, wait_for_room
from pipelines.cluster.session import CUBLAS_ENV, WORKER_ENV, start_ray, stop_on_signal
from pipelines.runs import checkpoints
from pipelines.runs.errors import BadVideo, RunError, StoppedError
from pipelines.runs.models import example_input, last_model
from pipelines.runs.record import check_writable, read_record, run_folder, write_record
from pipelines.tracking import plots, prometheus
from pipelines.tracking.mlflow_client import source_tags
from pipelines.tracking.tracker import Tracker
from pipelines.tracking.uris import journal_path, without_password
from pipelines.training.channel import open_channel
from pipelines.training.preflight import check_data, check_record, find_weights, fingerprint, read_splits
from pipelines.training.process_group import ProcessGroupConfig
from pipelines.training.worker import train_worker
from posmlp.config import Config
from posmlp.video.manifest import Manifest

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
class TrialHooks:
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


# --- on the driver -----------------------------------------------------------------------------------------------


def train(
    config: Config,
    echo: Callable[[str], None] = print,
    *,
    profile: bool = False,
    allow_changes: bool = False,
    part: TrialHooks | None = None,
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
    part = part or TrialHooks()
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
    channel, scaling = open_channel(), config.scaling
    rows = {"train_rows": ray.put(train_set.rows), "val_rows": ray.put(val_set.rows)}
    own = tempfile.mkdtemp(prefix="ray-train-")  # for Ray Train's notes, which nothing reads
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=job | rows | {"channel": channel},
        torch_config=ProcessGroupConfig(backend="cpu:gloo,cuda:nccl" if scaling.use_gpu else "gloo"),
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
        with stop_on_signal(lambda: channel.stop.remote(), report.echo) as caught:
            fitting.start()
            while fitting.is_alive():
                fitting.join(POLL_S)
                report.take(channel)
                if stop.is_set():
                    channel.stop.remote()
            report.take(channel)  # what came just before the end
        reason = ray.get(channel.reason.remote())
        ray.kill(channel)
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

    def take(self, channel: ActorHandle) -> None:
        """All that has come since the last call."""
        for event in ray.get(channel.take.remote()):
            self.handle(**event)
        self.show()

    def show(self) -> None:
        """How far the run is, as prometheus."""
        values = {"epoch": float(len(self.history)), "bad_videos": float(len(self.bad))}
        for metrics in self.history:
            if "val/top1" in metrics:
                values["val_top1"] = metrics["val/top1"]
        prometheus.show(self.run, **values)

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
        self.tracker.log_file("learning_curves.png", plots.learning_curves(self.history))
        if self.confusion is not None:
            self.tracker.log_file("confusion.png", plots.confusion(self.confusion, classes))


def log_model(run: str, config: Config, tracker: Tracker, echo: Callable[[str], None]) -> None:
    """The model of the run's newest checkpoint into MLflow; a failure costs the run nothing."""
    try:
        tracker.log_model(last_model(run), example_input(config))
    except Exception as error:  # of the export, which may fail for a model that trains well; the user is told
        echo(f"the model is not in MLflow, as it could not be exported ({type(error).__name__}: {error})")
