"""The driver of one training run, from its recipe to its result.

The driver checks the recipe and its data first (``pipelines.training.preflight``). Then it starts Ray Train workers
(``pipelines.training.worker``) and receives their events through a channel (``pipelines.training.channel``). Only the
driver logs lines and writes to MLflow. The run of a study's trial may train in the driver's own process instead: Ray
Train would start five helper processes for it.

A run lives in ``train.storage/name``. Training again under the same name resumes from the newest checkpoint
(``pipelines.runs.checkpoints``). Ray Train's own checkpoints are not used: Ray resumes only from checkpoints that it
has recorded itself, and a kill can prevent that.
"""

from __future__ import annotations

import logging
import shutil
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from pipelines.cluster.capacity import LongWait, choose_device, explain_start_wait, wait_for_room, worker_resources
from pipelines.cluster.preemption import PreemptionWatch
from pipelines.cluster.ray_internals import warn_about_worker_features
from pipelines.cluster.session import CUBLAS_ENV, WORKER_ENV, start_ray
from pipelines.cluster.signals import exit_despite, hold_signals, raise_held, stop_on_signal
from pipelines.registry.datasets import datasets_of_metrics, describe_splits
from pipelines.registry.logged_models import link_to
from pipelines.registry.model_files import save_model_files
from pipelines.runs import checkpoints
from pipelines.runs.errors import BadVideo, PreemptedError, RunError, StoppedError
from pipelines.runs.lease import Lease, leased
from pipelines.runs.record import HITS_FILE, check_writable, read_record, run_folder, write_files, write_record
from pipelines.tracking import plots, prometheus
from pipelines.tracking.journal import open_journal
from pipelines.tracking.mlflow_client import source_tags
from pipelines.tracking.tracker import Tracker
from pipelines.tracking.uris import NOTE, links_text, recipe_without_password
from pipelines.training.channel import Channel, RunChannel, WorkersState, open_channel
from pipelines.training.messages import (
    ArtifactFile,
    BadVideosFound,
    CostMeasured,
    EpochMetrics,
    ProgressLine,
    StepMetrics,
    ValidationDetails,
    WorkerEvent,
    WorkerJob,
)
from pipelines.training.preflight import check_data, check_record, find_weights, list_fingerprint, read_splits
from pipelines.training.process_group import ProcessGroupConfig
from pipelines.training.progress import describe_overrides, describe_result, describe_run, early_stop
from pipelines.training.worker import train_here, train_worker
from posmlp.config import Config, FrameOrder
from posmlp.metrics import COST_GMACS, COST_PARAMS_M, EPOCH, main_metric
from posmlp.text import shorten

logger = logging.getLogger(__name__)

POLL_S = 0.2  # seconds between two polls for events of the workers
# Seconds between two checks whether an elastic run can grow. Growing restarts the run, and nodes join one by one.
GROW_S = 60.0


@dataclass
class RunResult:
    """The result of a finished run.

    Attributes:
        path: the run's folder, a path or a URI.
        metrics: of the last epoch.
        bad: all bad videos of the run, each once.
        undelivered: the number of operations that MLflow has not received yet (``posmlp sync`` delivers them).
        links: into MLflow's pages, by what they show.
        classes: the class names.
        summary: of the last validation, as of ``posmlp.tasks``; None if another driver has seen it.
        ended_early: why the run ended before its last epoch (``train.patience``); empty if it did not.
    """

    name: str
    path: str
    mlflow_run_id: str
    metrics: dict[str, float]
    bad: list[BadVideo] = field(default_factory=list)
    undelivered: int = 0
    links: dict[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    summary: Any = None
    ended_early: str = ""


@dataclass(frozen=True)
class TrialContext:
    """What a study adds to a run that is one of its trials.

    Attributes:
        tags, params: for the run's MLflow run, in addition to its own.
        costs: cost metrics of the model; the workers then do not measure them.
        on_epoch: called with the metrics of each finished epoch.
        stop: when it is set, the run saves a checkpoint and raises ``StoppedError``.
        here: train in this process, which holds the resources of the run's only worker.
        sharing: number of trials that share the cluster's object store and decoding CPUs.
        predicted: store what the model of the last epoch predicts of the validation videos with the frames of each clip
            in these orders (``pipelines.runs.predictions``).
    """

    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    on_epoch: Callable[[Mapping[str, float]], None] = lambda metrics: None
    stop: threading.Event = field(default_factory=threading.Event)
    here: bool = False
    sharing: int = 1
    predicted: Sequence[FrameOrder] = ()


def train(
    config: Config, *, profile: bool = False, allow_changes: bool = False, trial: TrialContext | None = None
) -> RunResult:
    """Train a run to its end, from the start or from the newest checkpoint of the run of this name.

    Args:
        config: the recipe.
        profile: trace some steps, into the run's MLflow artifacts.
        allow_changes: resume although the recipe differs from the one that the run was started with.
        trial: what a study adds, if the run is one of its trials.

    Raises:
        ManifestError: the list of a split is wrong.
        RunError: the run cannot start (the message says what to change), or has failed.
        StoppedError: a signal (SIGINT, SIGTERM or SIGHUP) or the study stopped the run; the same call resumes it.
        KeyboardInterrupt: a signal came before the training, or a second one; the same call resumes the run from its
            last checkpoint.
    """
    trial = trial or TrialContext()
    run = run_folder(config)

    # Validate the recipe, its data and the run's record, before anything is started or written.
    train_set, val_set = read_splits(config)
    config = check_data(config, train_set, val_set).resolved()
    record, lists = read_record(run), {"train": list_fingerprint(train_set), "val": list_fingerprint(val_set)}
    datasets = describe_splits(config.data, train_set, val_set, lists)
    saved = [entry.info for entry in checkpoints.find(run) if entry.info]
    epochs_done = max((info.epoch for info in saved), default=0)
    changed = check_record(run, record, config, lists, epochs_done, allow_changes) if record else {}
    weights = None if saved else find_weights(config)

    # Start Ray, check room and storage, and open the tracker.
    start_ray()
    warn_about_worker_features()
    config = choose_device(config)
    wait_for_room(config.scaling)
    check_writable(run)
    with leased(run) as lease:
        with ExitStack() as on_error:
            journal = open_journal(run, lease)  # on a local storage it is the lock
            on_error.callback(journal.close)
            if read_record(run) != record:
                raise RunError(f"another process has changed {run} while this one waited; the same command resumes it")
            saved = [entry.info for entry in checkpoints.find(run) if entry.info]
            weights = None if saved else weights
            on_error.pop_all()
        run_id = record["mlflow_run_id"] if record else None
        about = describe_run(config, train_set, val_set)
        tags = {**source_tags(), "run": run, "overrides": describe_overrides(config), NOTE: about, **trial.tags}
        with hold_signals() as held:  # it makes MLflow's tables and run
            tracker = Tracker.open(config, tags, run_id, journal=journal, params=trial.params)
        logger.info("MLflow: %s", tracker.place)
        if not trial.tags:
            logger.info("%s", links_text(tracker.uri, tracker.links()))
        epochs = config.train.epochs
        reporter = RunReporter(config.name, tracker, trial.on_epoch, folder=run, about=about, epochs=epochs)
        if trial.costs and not saved:
            tracker.log_metrics(trial.costs, step=0)  # not only params: a study measures latency again at its end
            tracker.log_params({name: f"{trial.costs[name]:.6g}" for name in (COST_GMACS, COST_PARAMS_M)})

        status, undelivered = "FAILED", 0
        try:
            config = recipe_without_password(config)  # the recipe is stored and sent from here on
            if changed:
                tracker.log_tags({f"changed.{key}": change for key, change in changed.items()})
                tracker.log_file("config.yaml", config.to_yaml().encode())
            write_record(run, config, lists, tracker.run_id, None)
            tracker.log_inputs(datasets)
            raise_held(held)

            # Fit.
            channel = RunChannel() if trial.here else open_channel()
            job = WorkerJob(
                config=config.model_dump(),
                run=run,
                weights=weights,
                train_rows=ray.put(train_set.rows),
                val_rows=ray.put(val_set.rows),
                classes=train_set.classes,
                channel=channel,
                profile=profile,
                measure_cost=not trial.costs,
                sharing=trial.sharing,
                lease=lease.holder.id if lease else "",
                predicted=trial.predicted,
            )
            fit(job, config, reporter, trial, lease)

            # Record the result.
            if lease:
                lease.check()
            metrics = reporter.history[-1]
            reporter.log_plots(train_set.classes)
            ended_early = early_stop(reporter.history, config) if len(reporter.history) < config.train.epochs else ""
            if ended_early:
                tracker.log_tags({"ended_early": ended_early})
            write_record(run, config, lists, tracker.run_id, metrics)
            status = "FINISHED"
            if config.tracking.log_model:
                log_model(run, tracker, datasets_of_metrics(datasets))
        except KeyboardInterrupt:
            status = "KILLED" if status == "FAILED" else status  # a finished run is not trained again
            raise
        finally:
            if lease and lease.lost:
                tracker.abandon()
            else:
                reporter.describe_result(status)
                link_checkpoints(run, tracker, datasets_of_metrics(datasets), finished=status == "FINISHED")
                undelivered = tracker.close(status)
                if undelivered:
                    logger.warning("%d operations wait for MLflow; `posmlp sync %s` delivers them", undelivered, run)
        bad, links, summary = list(reporter.bad.values()), tracker.links(), reporter.validation.summary
        found: dict[str, Any] = {
            "bad": bad,
            "classes": train_set.classes,
            "summary": summary,
            "ended_early": ended_early,
        }
        return RunResult(config.name, run, tracker.run_id, metrics, undelivered=undelivered, links=links, **found)


def fit(job: WorkerJob, config: Config, reporter: RunReporter, trial: TrialContext, lease: Lease | None) -> None:
    """Run the workers and report their events, until they have finished, or have stopped because the trial ends.

    Raises:
        RunError: the run has failed.
        StoppedError, KeyboardInterrupt: as ``train``.
        Exception: of training in this process; it is not known whether a repetition would help.
    """
    try:
        while True:
            received = fit_group(job, config, reporter, trial, lease)
            if reporter.is_complete(config):
                return
            if received or trial.stop.is_set() or not job.channel.state().preempted:
                raise StoppedError(received or signal.SIGTERM)
            logger.info("%s: starting again on the machines that are left, or when there are new ones", config.name)
    finally:
        with suppress(ray.exceptions.RayError):
            job.channel.close()


def fit_group(job: WorkerJob, config: Config, reporter: RunReporter, trial: TrialContext, lease: Lease | None) -> int:
    """Run workers until they end, and report their events. They end early if one of their machines is taken away.

    Returns:
        The signal that asked to stop; 0 if there was none.

    Raises:
        PreemptedError: the machine of this process is taken away.
        RunError, KeyboardInterrupt, Exception: as ``fit``.
    """
    channel = job.channel
    own = tempfile.mkdtemp(prefix="ray-train-")  # for Ray Train's own records, which nothing reads
    failures: list[Exception] = []
    losses, watch, leaving, losing = channel.state().losses, PreemptionWatch(), False, False
    silence = LongWait()
    work = partial(train_here, job) if trial.here else worker_group(job, config, own, losses).fit
    # In a thread, because Ray Train would otherwise handle Ctrl-C itself and exit without a checkpoint.
    fitting = threading.Thread(target=run_until_end, args=(work, failures), daemon=True)
    try:
        with stop_on_signal(channel.request_stop) as received:
            fitting.start()
            while fitting.is_alive():
                fitting.join(POLL_S)
                reporter.receive(channel)
                if trial.stop.is_set():
                    channel.request_stop()
                if lease and lease.lost:
                    channel.fail(lease.lost)
                    channel.request_stop()
                if not trial.here:
                    state = channel.state()
                    silence.check(state.silent_s, partial(explain_silence, config, state))
                notices = watch.poll()
                if watch.own in notices and not leaving:
                    leaving = True
                    logger.warning("%s, and it drives the run; the run saves a checkpoint and ends", notices[watch.own])
                    channel.request_stop()
                elif notices and (nodes := channel.preempt(notices)):
                    losing = True
                    logger.warning("%s; the workers save a checkpoint and end", "; ".join(notices[n] for n in nodes))
            reporter.receive(channel)  # events that came just before the end
        state = channel.state()
    except KeyboardInterrupt as interrupt:  # the second signal
        exit_despite(fitting, interrupt)
        raise
    except ray.exceptions.RayError as error:
        raise RunError(f"the Ray cluster does not answer any more: {error}; the same call resumes the run") from error
    finally:
        shutil.rmtree(own, ignore_errors=True)
    if state.failure:
        raise RunError(state.failure)
    if failures and (leaving or (losing and state.preempted)):
        logger.warning("not all workers had ended before their machine did: %s", shorten(str(failures[0]), 200))
    elif failures and trial.here:
        raise failures[0]
    elif failures:
        raise RunError(f"training failed: {failures[0]}") from failures[0]
    if leaving and not reporter.is_complete(config):
        raise PreemptedError(signal.SIGTERM)
    return received[0] if received else 0


def explain_silence(config: Config, state: WorkersState, seconds: float) -> str:
    """Say that no worker has started, or that none answers any more.

    Args:
        seconds: since the first worker was heard of, or since the run waits for it.
    """
    lost = f"the first worker has not answered for {seconds:.0f} s: it, or its machine, may be lost. "
    gone = lost if state.started and not state.preempted else ""
    return f"{config.name}: {gone}{explain_start_wait(config.scaling, seconds)}"


def worker_group(job: WorkerJob, config: Config, folder: str, losses: int) -> TorchTrainer:
    """Ray Train's worker group for a run.

    Args:
        folder: for Ray Train's own records.
        losses: of workers so far, in groups before this one.
    """
    scaling = config.scaling
    workers = (scaling.min_workers, scaling.workers) if scaling.min_workers else scaling.workers
    return TorchTrainer(
        train_worker,
        train_loop_config=dict(vars(job)),
        torch_config=ProcessGroupConfig(backend="cpu:gloo,cuda:nccl" if scaling.use_gpu is True else "gloo"),
        scaling_config=ScalingConfig(  # type: ignore[call-arg] # the type stubs are those of Ray Train V1
            num_workers=workers,  # type: ignore[arg-type]
            use_gpu=scaling.use_gpu is True,
            resources_per_worker=worker_resources(scaling),
            label_selector=scaling.train_on or None,
            elastic_resize_monitor_interval_s=GROW_S,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=f"{config.name}-{uuid.uuid4().hex[:8]}",
            storage_path=folder,
            failure_config=FailureConfig(max_failures=max(0, scaling.max_failures - losses)),
            worker_runtime_env={"env_vars": WORKER_ENV | (CUBLAS_ENV if config.train.deterministic else {})},
        ),
    )


def run_until_end(work: Callable[[], object], failures: list[Exception]) -> None:
    """Call a function and append its exception, if any, to the list."""
    try:
        work()
    except Exception as error:  # an exception in a thread would be lost
        failures.append(error)


class RunReporter:
    """Logs and tracks the events of a run's workers.

    Attributes:
        folder: the run's folder, which gets the plots too; None: only MLflow gets them.
        about: what the run does, the first line of its description in MLflow.
        epochs: of the whole run.
        history: metrics of each finished epoch.
        bad: all bad videos, by sample id.
        validation: details of the last validation.
    """

    def __init__(
        self,
        run: str,
        tracker: Tracker,
        on_epoch: Callable[[Mapping[str, float]], None],
        *,
        folder: str | None = None,
        about: str = "",
        epochs: int = 0,
    ):
        self.run, self.tracker, self.on_epoch = run, tracker, on_epoch
        self.folder, self.about, self.epochs = folder, about, epochs
        self.history: list[dict[str, float]] = []
        self.bad: dict[tuple[str, str], BadVideo] = {}  # by sample id and file; lists may share sample ids
        self.validation = ValidationDetails(None)
        self.epochs_logged, self.epochs_reported = tracker.epochs_logged(), 0

    def receive(self, channel: Channel) -> None:
        """Handle all events since the last call, and publish the run's progress to Prometheus."""
        for event in channel.receive():
            self.handle(event)
        self.publish_progress()

    def handle(self, event: WorkerEvent) -> None:
        """Log and track one event."""
        match event:
            case ProgressLine(text, level, live):
                logger.log(level, "%s", text, extra={"live": live})
            case CostMeasured(metrics):
                self.tracker.log_params({name: f"{value:.6g}" for name, value in metrics.items()})
            case StepMetrics(rows):
                self.tracker.log_steps(rows)
            case EpochMetrics(epochs):
                for metrics in epochs:
                    self.add_epoch(dict(metrics))
            case BadVideosFound(videos):
                self.bad |= {(video.sample_id, video.uri): video for video in videos}
                self.tracker.log_table([asdict(video) for video in self.bad.values()], "quarantine.json")
            case ValidationDetails():
                self.validation = event
            case ArtifactFile(path, content):
                self.tracker.log_file(path, content)

    def add_epoch(self, metrics: dict[str, float]) -> None:
        """Add the metrics of a finished epoch; workers that resume send those of earlier epochs again."""
        epoch = int(metrics[EPOCH])
        if epoch > self.epochs_reported:
            self.epochs_reported = epoch
            self.on_epoch(metrics)
        self.history[epoch - 1 :] = [metrics]
        if epoch > self.epochs_logged:
            self.epochs_logged = epoch
            self.tracker.log_metrics(metrics, step=epoch)
            self.describe_result("RUNNING")

    def is_complete(self, config: Config) -> bool:
        """Whether the run has had its last epoch, or has ended before it (``train.patience``)."""
        return len(self.history) == config.train.epochs or bool(early_stop(self.history, config))

    def publish_progress(self) -> None:
        """Set the Prometheus metrics of the run's progress."""
        values = {"epoch": float(len(self.history)), "bad_videos": float(len(self.bad))}
        for metrics in self.history:
            if main := main_metric(metrics):
                values[main.key.replace("/", "_")] = metrics[main.key]
        prometheus.publish(self.run, **values)

    def describe_result(self, status: str) -> None:
        """Write the run's description in MLflow: what it does, and how far it is.

        Args:
            status: of the MLflow run.
        """
        result = describe_result(self.history, self.epochs, status)
        self.tracker.log_tags({NOTE: f"{self.about}\n\n{result}"})

    def log_plots(self, classes: tuple[str, ...]) -> None:
        """Log the plots, the classes' table and the videos' results of a finished run, and write them to its folder."""
        files = {"learning_curves.png": plots.learning_curves(self.history)}
        if self.validation.summary is not None:
            files |= plots.validation_files(self.validation.summary, classes)
        if self.validation.hits is not None:
            files[HITS_FILE] = self.validation.hits
        for name, content in files.items():
            self.tracker.log_file(name, content)
        if self.folder is not None:
            write_files(self.folder, files)


def log_model(run: str, tracker: Tracker, datasets: Mapping[str, Sequence[str]]) -> None:
    """Log the model of the run's best checkpoint to MLflow. If that fails the run still counts as finished.

    Args:
        datasets: as in ``CheckpointLink``.
    """
    try:
        best = checkpoints.choose(run)
        link = link_to(best, checkpoints.read_info(best), tracker.run_id, datasets)
        tracker.log_model(partial(save_model_files, best), link)
    except Exception as error:  # the export may fail for a model that trains well
        logger.warning("MLflow has no model of this run: the export failed (%s: %s)", type(error).__name__, error)


def link_checkpoints(run: str, tracker: Tracker, datasets: Mapping[str, Sequence[str]], *, finished: bool) -> None:
    """Give MLflow a link to each checkpoint of the run, with its metrics.

    Args:
        datasets: as in ``CheckpointLink``.
    """
    with suppress(OSError):  # the storage does not answer, which ends the run with a message of its own
        entries = checkpoints.find(run)
        links = [link_to(each.uri, each.info, tracker.run_id, datasets) for each in entries if each.info]
        if links:
            tracker.link_checkpoints(links, finished=finished)
