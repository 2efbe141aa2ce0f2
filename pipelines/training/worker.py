"""A training worker: training steps, validation and checkpoints, from the run's newest checkpoint on.

All workers do the same thing at the same step: they agree on stops, checkpoints and failures that only one of them
knows of (``pipelines.training.agreement``). The result of a step is read when the next one has started, so the device
always has work. The first worker writes the checkpoints and sends the driver events through the channel.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device
from safetensors.torch import save as save_safetensors

from pipelines.cluster.capacity import live_runs
from pipelines.data.loader import SplitLoader
from pipelines.data.object_store import StoreMonitor
from pipelines.runs import checkpoints
from pipelines.runs.errors import AgreedError, BadVideo, RunError
from pipelines.runs.lease import LeaseLost, check_lease
from pipelines.runs.predictions import write_predictions
from pipelines.tracking import prometheus
from pipelines.training.agreement import Action, AgreedBatches, Vote, on_first_worker
from pipelines.training.channel import Registration, RunChannel
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
from pipelines.training.profiling import TRACE_FILE, TRACED_STEPS, peak_memory_mb, reset_peak_memory, start_profiler
from pipelines.training.progress import (
    EpochMeter,
    RunProgress,
    StepSeries,
    advise,
    best_so_far,
    describe_epoch,
    describe_steps,
    early_stop,
)
from posmlp import create_model, load_published, storage
from posmlp import metrics as names
from posmlp.config import Config
from posmlp.errors import UserError
from posmlp.learn.finetune import describe_frozen
from posmlp.learn.learner import ExplodedError, HostCopy, Learner, StartedStep
from posmlp.learn.parallel import mean_over_workers, parallelise
from posmlp.model.cost import TRAIN_FLOPS_PER_MAC, cost, count_macs, peak_flops, trim_heap
from posmlp.tasks.base import Results
from posmlp.video.batch import Batch
from posmlp.video.draws import class_weights
from posmlp.video.prefetch import POLL_S, prefetch

SECONDS_WITHOUT_BATCH = (60, 300, 900)  # after which the user is told
BATCH_LIMIT_S = 1800  # for the next batch; gloo ends a collective of several workers after as long


def train_worker(fields: dict[str, Any]) -> None:
    """The training loop that Ray Train runs on each worker.

    A ``UserError`` marks the run as failed on all workers, and Ray does not restart them.

    Args:
        fields: those of a ``WorkerJob``.
    """
    job, context = WorkerJob(**fields), ray.train.get_context()
    place = WorkerPlace(
        get_device(), context.get_world_rank(), context.get_world_size(), context.get_local_world_size()
    )
    try:
        Worker(job, place).work()
    except UserError as error:
        job.channel.fail(str(error))
        if not isinstance(error, AgreedError) and place.world_size > 1:
            # The other workers have not seen this error: let Ray end them. The next worker group sees that the run has
            # failed.
            raise


def train_here(job: WorkerJob) -> None:
    """The training loop of a run with one worker, in this process and without Ray Train.

    After ``forget_run``, a later run in the same process starts as in a new one: each sets its threads and its seed.
    """
    config = Config.model_validate(job.config)
    device = torch.device("cuda" if config.scaling.use_gpu is True else "cpu")
    reset_peak_memory(device)
    try:
        Worker(job, WorkerPlace(device)).work()
    except UserError as error:
        job.channel.fail(str(error))


def forget_run() -> None:
    """Free all that a run has left in this process: models, Ray Data executions, compiled code, allocators' caches.

    PyTorch's settings are its defaults again.
    """
    torch.use_deterministic_algorithms(False)
    if "torch._dynamo" in sys.modules:  # a limit on compiled versions of a function holds for the whole process
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim_heap()


@dataclass(frozen=True)
class WorkerPlace:
    """A worker's place in its group. The defaults are those of a worker that trains alone.

    Attributes:
        device: the training device.
        rank, world_size: its number, from 0, and the number of workers.
        local_world_size: the number of workers on its node.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1


@dataclass(frozen=True)
class PendingStep:
    """A training step that has started and whose result was not read yet.

    Attributes:
        batch: of the step, on the device.
        rate: its learning rate.
    """

    batch: Batch
    started: StartedStep
    rate: float


class Worker:
    """One of a run's training workers."""

    def __init__(self, job: WorkerJob, place: WorkerPlace):
        self.job, self.run, self.channel, self.place = job, job.run, job.channel, place
        self.config = Config.model_validate(job.config)
        self.rank, self.world_size = place.rank, place.world_size
        threads = self.config.scaling.threads_per_worker
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // place.local_world_size))
        if self.config.train.deterministic:
            torch.use_deterministic_algorithms(True)
        self.bad: list[BadVideo] = []  # of the batches since the last ``collect_bad_videos``
        self.decoded_by_pyav = 0  # likewise
        self.saved_at = time.monotonic()  # when the last checkpoint was saved or requested

    def send(self, event: WorkerEvent) -> None:
        """Send the driver an event, if this is the first worker."""
        if self.rank == 0:
            self.channel.send(event)

    def send_line(self, text: str, level: int = logging.INFO) -> None:
        """Send the driver a line for the user."""
        self.send(ProgressLine(text, level))

    def work(self) -> None:
        """Train from the newest checkpoint to the end of the run, or until a stop is requested."""
        nodes = self.nodes()
        registration = on_first_worker(lambda: self.channel.register_workers(self.world_size, nodes))
        if registration.ended:  # there is nothing to save, and a restart would fail for the same reason
            return
        config, rows = self.config, {"train": self.job.train_rows, "val": self.job.val_rows}
        self.train_split, self.val_split = (
            SplitLoader(rows[name], config, name == "train", self.rank, self.world_size, self.sharing)
            for name in ("train", "val")
        )
        self.set_up(registration)
        self.saved_step = self.learner.step
        self.first_epoch = len(self.progress.history)
        self.series = StepSeries.for_run(self.train_split.steps * config.train.epochs, config.train.global_batch)
        decoded = self.train_split.batches(self.first_epoch, self.progress.steps, until=config.train.epochs)
        with (
            closing(StoreMonitor(enabled=self.rank == 0)) as self.store,
            closing(prefetch(decoded, self.learner.device, waiting=self.explain_wait)) as ahead,
        ):
            steps = self.train_split.steps * (config.train.epochs - self.first_epoch) - self.progress.steps
            self.run_epochs(AgreedBatches(ahead, steps, self.request, self.channel.fail))

    def run_epochs(self, batches: AgreedBatches) -> None:
        """Run the remaining epochs, or those until a stop is requested."""
        config, advised = self.config, set[str]()
        for epoch in range(self.first_epoch, config.train.epochs):
            if reason := early_stop(self.progress.history, config):
                self.send_line(f"ended early after epoch {epoch}: {reason}")
                return
            metrics = self.run_epoch(batches, epoch)
            if metrics is None:
                where = f"epoch {epoch}" + f", step {self.progress.steps}" * bool(self.progress.steps)
                self.send_line(f"stopped after {where}")
                return
            self.send(EpochMetrics([metrics]))
            self.send_line(describe_epoch(metrics, config))
            for problem, text in advise(metrics, config).items():
                if problem not in advised:  # the same advice once
                    advised.add(problem)
                    self.send_line(text, logging.WARNING)

    # --- start ---------------------------------------------------------------------------------------------------

    def sharing(self) -> int:
        """The number of runs that share the cluster's object store and decoding CPUs now."""
        own = self.job.sharing
        return own + live_runs() if isinstance(self.channel, RunChannel) else max(own, live_runs())

    def nodes(self) -> list[str]:
        """Ids of the nodes of all workers. Collective: call it on every rank."""
        own = ray.get_runtime_context().get_node_id()
        nodes = [own] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(nodes, own)
        return nodes

    def set_up(self, registration: Registration) -> None:
        """Create the learner and the progress, new or from the run's newest intact checkpoint."""
        config = self.config
        torch.manual_seed(config.train.seed)
        model = create_model(config.model.name, **config.model.overrides())
        self.macs = count_macs(config.model.variant())
        found = on_first_worker(self.find_checkpoint)
        notes: list[str] = []
        if found is None and self.job.weights:
            report = load_published(model, self.job.weights)
            notes = [f"start from {self.job.weights}: {report.loaded} tensors", report.choice, *report.adapted]
        weights = None
        if config.data.balance == "weights":
            weights = class_weights(ray.get(self.job.train_rows), config.model.variant().num_classes)
        parallel = parallelise(model, config, self.place.device)
        learner = Learner(parallel, config, self.train_split.steps, self.job.classes, weights)
        self.learner, self.progress = learner, RunProgress()
        if found is not None:
            uri, notes = found
            info, contents = checkpoints.load(uri)
            learner.load_state_dict(contents[checkpoints.WEIGHTS], contents[checkpoints.STATE])
            self.progress = RunProgress.from_record(info.progress)
        if self.rank:
            return
        if not learner.step and self.job.measure_cost:
            measured = cost(config.model.name, device=learner.device, **config.model.overrides())
            self.send(CostMeasured(measured.metrics()))
        self.send(EpochMetrics(self.progress.history))
        params = sum(p.numel() for p in model.parameters())
        what = f"{config.model.name}, {params / 1e6:.2f} M parameters, {self.macs / 1e9:.2f} GMACs"
        self.send_line(f"{config.name}: {what}; {self.describe_workers()}; {self.describe_start(registration)}")
        for note in filter(None, [*notes, describe_frozen(model, config.optim.freeze)]):
            self.send_line(f"  {note}", logging.WARNING if found else logging.INFO)

    def find_checkpoint(self) -> tuple[str, list[str]] | None:
        """The newest intact checkpoint, and a line for each newer one that is damaged. None if there is none."""
        try:
            uri, problems = checkpoints.newest(self.run)
        except OSError as error:
            raise RunError(f"{self.run} cannot be read: {error}") from error
        return (uri, [f"skipped checkpoint: {problem}" for problem in problems]) if uri else None

    def describe_workers(self) -> str:
        """Number of workers, device, threads and gradient accumulation, for the first line."""
        learner, threads, workers = self.learner, torch.get_num_threads(), self.world_size
        device = torch.cuda.get_device_name(learner.device) if learner.device.type == "cuda" else "CPU"
        text = f"{workers} worker{'s' * (workers > 1)} on {device}, {threads} thread{'s' * (threads > 1)} each"
        local = math.ceil(self.config.train.global_batch / workers)
        if (limit := self.config.scaling.micro_batch) and limit < local:
            text += f", {local} clips in {math.ceil(local / limit)} micro-batches"
        return text

    def describe_start(self, registration: Registration) -> str:
        """Where and why the workers start, for the first line."""
        text, previous = "starting", registration.previous_world_size
        if self.learner.step:
            epoch, step = len(self.progress.history), self.progress.steps
            text = f"resuming after epoch {epoch}" + (f", step {step}" if step else "")
        if self.world_size > previous > 0:
            text = f"the cluster has room for {self.world_size} workers instead of {previous}; {text}"
        elif registration.preempted:
            text = f"a machine was taken away; {text}"
        elif previous:
            limit = self.config.scaling.max_failures
            text = f"workers were lost ({registration.losses} of {limit} times); {text}"
        return text

    # --- an epoch ------------------------------------------------------------------------------------------------

    def run_epoch(self, batches: AgreedBatches, epoch: int) -> dict[str, float] | None:
        """Finish an epoch: the remaining training steps, validation and checkpoints.

        Returns the metrics, or None if a stop was requested (the checkpoint is saved).
        """
        config = self.config
        if not self.progress.training_metrics:
            metrics = self.train_epoch(batches, epoch)
            if metrics is None:
                if self.learner.step > self.saved_step:
                    self.save()
                return None
            self.progress.training_metrics = metrics
            self.save()  # before validation, which may take long
        metrics, rows = dict(self.progress.training_metrics), self.train_split.num_rows
        last = epoch + 1 == config.train.epochs
        validated = (epoch + 1) % config.eval.every == 0 or last
        if validated:
            validation = self.validate() if not (last and self.job.predicted) else self.predict()
            if validation is None:
                return None
            metrics |= validation
            rows += self.val_split.num_rows
            self.collect_bad_videos()
        if config.data.decoder == "decord":
            metrics[names.DATA_DECODED_BY_PYAV] = float(self.progress.decoded_by_pyav)
        bad = [BadVideo(**video) for video in self.progress.bad]
        metrics |= {names.DATA_BAD: float(len(bad)), names.EPOCH: float(epoch + 1)}
        if validated:
            metrics |= best_so_far([*self.progress.history, metrics])
        if bad:
            self.send(BadVideosFound(bad))
        check_bad_fraction(bad, rows, config)
        self.progress = self.progress.next_epoch(metrics)
        self.finish_epoch(metrics)
        return metrics

    def train_epoch(self, batches: AgreedBatches, epoch: int) -> dict[str, float] | None:
        """Do the remaining training steps of an epoch.

        Returns the training metrics, or None if a stop was requested (no checkpoint is saved yet).
        """
        config, learner, progress, steps = self.config, self.learner, self.progress, self.train_split.steps
        every = config.train.checkpoint_every_steps
        meter = EpochMeter(time.perf_counter(), *self.store.usage)
        throughput = prometheus.ThroughputGauge(config.name, config.train.global_batch)
        traced = self.job.profile and epoch == self.first_epoch
        profiler = self.start_profiler(steps - progress.steps) if traced else None
        self.series.start()
        first, pending = progress.steps, None
        for number in range(first, steps):  # of the step in its epoch
            if every and learner.step % every == 0:  # before the vote, which may end the run
                self.save_steps(pending, meter)
                pending = None
            with meter.waiting():
                action = batches.action()
                batch = batches.take() if action < Action.STOP else None
            if action == Action.SAVE:
                self.save_steps(pending, meter)
                pending = None
            if batch is None:
                if pending:
                    self.finish_step(pending, meter)
                self.send_steps(at_once=True)
                return None
            following = PendingStep(batch, learner.start_step(batch), self.learning_rate())
            if pending:
                self.finish_step(pending, meter)
            pending = following
            if number in (first, steps - 1):  # the first one is slow, and timed apart
                self.finish_step(pending, meter)
                pending = None
            if profiler:
                profiler.step()
            if meter.line_is_due():
                meter.max_store_mib = max(meter.max_store_mib, self.store.usage[0])
                self.send(ProgressLine(describe_steps(progress, meter, epoch, steps, config), live=True))
                self.publish_throughput(throughput, meter)
        if profiler:
            profiler.stop()
        meter.end()
        self.send_steps(at_once=True)
        if not meter.lines:  # a short epoch
            self.publish_throughput(throughput, meter)
        return self.training_metrics(meter)

    def save_steps(self, pending: PendingStep | None, meter: EpochMeter) -> None:
        """Save a checkpoint of all started steps, if there are any since the last one.

        Args:
            pending: the step that is not finished yet.
        """
        if pending:
            self.finish_step(pending, meter)
        if self.learner.step > self.saved_step:
            self.save()

    def finish_step(self, step: PendingStep, meter: EpochMeter) -> None:
        """Read the result of a step, and count it.

        Raises:
            AgreedError: it has exploded; on all workers.
        """
        try:
            result = step.started.result()
        except ExplodedError as error:
            self.send_steps(at_once=True)
            raise self.save_explosion(step.batch, error) from error
        self.note_bad_videos(step.batch)
        self.progress.add_step(result.loss, result.grad_norm)
        meter.add_step()
        self.series.add(step.started.step + 1, result.loss, step.rate, step.started.ended)
        self.send_steps()

    def training_metrics(self, meter: EpochMeter) -> dict[str, float]:
        """The metrics of an epoch's training steps. Collective: call it on every rank."""
        progress, (used, spilled) = self.progress, self.store.usage
        (waited_share,) = mean_over_workers([meter.data_wait()])
        metrics = {
            names.TRAIN_LOSS: progress.loss / progress.steps,
            names.TRAIN_GRAD_NORM: progress.grad_norm / max(1, progress.norms),
            names.TRAIN_WORKERS: float(self.world_size),
            names.TRAIN_LR: self.learning_rate(),
            names.PERF_DATA_WAIT_FRAC: waited_share,
            names.PERF_FIRST_BATCH_S: meter.first_batch_s,
            names.PERF_EPOCH_S: meter.seconds,
            names.DATA_OBJECT_STORE_MB: max(meter.max_store_mib, used),
            names.DATA_SPILLED_MB: spilled - meter.spilled_before_mib,
        }
        return metrics | self.throughput_metrics(meter.steps / meter.seconds)

    def learning_rate(self) -> float:
        """The learning rate of the last step, the largest of the optimizer's groups."""
        return float(max(group["lr"] for group in self.learner.optimizer.param_groups))

    def send_steps(self, at_once: bool = False) -> None:
        """Send the driver the metrics of steps, now and then or ``at_once``."""
        if rows := self.series.take(at_once):
            self.send(StepMetrics(rows))

    def publish_throughput(self, throughput: prometheus.ThroughputGauge, meter: EpochMeter) -> None:
        """Publish throughput and loss to Prometheus, on the first worker."""
        if self.rank == 0:
            throughput.publish(meter.seconds, meter.steps, meter.waited)
            prometheus.publish(self.config.name, train_loss=self.progress.loss / self.progress.steps)

    def throughput_metrics(self, steps_per_s: float) -> dict[str, float]:
        """Throughput over all workers, its share of the devices' peak if known, and the memory of one worker."""
        clips = steps_per_s * self.config.train.global_batch
        paths = self.config.train.paths if self.config.model.choices else 1  # each is counted as the model's own
        flops = clips * paths * TRAIN_FLOPS_PER_MAC * self.macs
        metrics = {
            names.PERF_STEPS_PER_S: steps_per_s,
            names.PERF_CLIPS_PER_S: clips,
            names.PERF_TFLOPS: flops / 1e12,
            names.PERF_MEMORY_MB: peak_memory_mb(self.learner.device),
        }
        if peak := peak_flops(self.learner.device, self.config.train.precision):
            metrics[names.PERF_MFU] = flops / self.world_size / peak
        return metrics

    def stop_request(self) -> Action:
        """What this worker wants to do before its next batch of any kind. It waits for nothing."""
        return Action.STOP if self.rank == 0 and self.channel.stop_requested() else Action.CONTINUE

    def request(self) -> Action:
        """What this worker wants to do before its next training step. It waits for nothing."""
        now, minutes = time.monotonic(), self.config.train.checkpoint_every_minutes
        if self.rank == 0 and minutes is not None and now - self.saved_at >= 60 * minutes:
            self.saved_at = now
            return max(Action.SAVE, self.stop_request())
        return self.stop_request()

    def explain_wait(self, seconds: float) -> None:
        """Tell the user that no batch comes.

        Raises:
            RunError: it has not come for ``BATCH_LIMIT_S`` seconds.
        """
        what = f"no batch of decoded clips for {seconds:.0f} s"
        where = "`ray status` shows whether the decoding tasks have CPUs, and the Ray dashboard what they do"
        if self.config.scaling.decode_in_worker:
            where = "the worker decodes them itself; check that the storage of the videos and of data.cache_dir answers"
        if seconds >= BATCH_LIMIT_S:
            raise RunError(f"{what}; {where}. The same command resumes the run from its last checkpoint")
        if any(limit <= seconds < limit + POLL_S for limit in SECONDS_WITHOUT_BATCH):
            self.send_line(f"{what}; {where}", logging.WARNING)

    def agree(self, action: Action, error: UserError | None = None) -> Action:
        """Max-reduce the requested action over ranks, and return it.

        Args:
            action: what this worker requests.
            error: why, if it requests ``FAIL``.

        Raises:
            AgreedError: a worker requested ``FAIL``.
        """
        if error:
            self.channel.fail(str(error))  # first, as the other workers do not know the reason
        return Vote(action, error).result()

    def validate(self) -> dict[str, float] | None:
        """Score the validation split, and send the driver the details.

        Returns the metrics, or None if a stop was requested.
        """
        results = self.score(self.val_split)
        return None if results is None else self.report_validation(results)

    def predict(self) -> dict[str, float] | None:
        """As ``validate``, and store the predictions, for each order of the frames that the driver wants.

        They are stored before the epoch counts as finished: a run that resumes makes those that are missing.
        """
        scores, metrics = {}, {}
        for order in self.job.predicted:
            data = self.config.data.model_copy(update={"frame_order": order})
            split = replace(self.val_split, config=self.config.model_copy(update={"data": data}))
            results = self.score(split, keep_scores=True)
            if results is None:
                return None
            scores[order] = results.predictions()
            if order == self.config.data.frame_order:
                metrics = self.report_validation(results)
        self.write(lambda: write_predictions(self.run, self.val_split.table, scores, self.job.classes))
        return metrics

    def report_validation(self, results: Results) -> dict[str, float]:
        """Send the driver the details of a validation, and return its metrics."""
        hits = results.hits()
        self.send(ValidationDetails(results.summary(), None if hits is None else hits_text(hits)))
        return results.metrics()

    def score(self, split: SplitLoader, keep_scores: bool = False) -> Results | None:
        """Score every good video of a split once, with the evaluation weights (EMA if enabled).

        Returns the results of all workers, or None if a stop was requested.
        """
        learner, decoded = self.learner, split.batches(0)
        results = learner.task.results(self.config, split.table, keep_scores)
        pending: tuple[Batch, list[HostCopy]] | None = None  # counted when the next batch is queued
        with (
            closing(prefetch(decoded, learner.device, waiting=self.explain_wait)) as ahead,
            learner.evaluation_weights(),
        ):
            broadcast_buffers(learner.module)
            batches = AgreedBatches(ahead, split.steps, self.stop_request, self.channel.fail)
            for _ in range(split.steps):
                if batches.action() == Action.STOP:
                    return None
                batch = batches.take()
                self.note_bad_videos(batch)
                scores = learner.score(batch)
                if pending:
                    results.add(pending[0], [copy.read() for copy in pending[1]])
                pending = batch, [HostCopy(x) for x in results.wanted(scores, batch)]
            if pending:
                results.add(pending[0], [copy.read() for copy in pending[1]])
        results.gather()
        if not results.samples:
            raise AgreedError("no validation video could be decoded")
        return results

    def note_bad_videos(self, batch: Batch) -> None:
        """Note the bad videos of a batch that a step has used."""
        self.bad += batch.bad
        self.decoded_by_pyav += batch.decoded_by_pyav

    def collect_bad_videos(self) -> None:
        """Add the bad videos that any worker noted since the last call to the progress, each video once."""
        own, decoded_by_pyav = [asdict(video) for video in self.bad], self.decoded_by_pyav
        self.bad, self.decoded_by_pyav = [], 0
        gathered: list[tuple[list[dict[str, str]], int]] = [(own, decoded_by_pyav)] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(gathered, (own, decoded_by_pyav))
        known = {(video["sample_id"], video["uri"]): video for video in self.progress.bad}
        for videos, count in gathered:
            known = {(video["sample_id"], video["uri"]): video for video in videos} | known
            self.progress.decoded_by_pyav += count
        self.progress.bad = list(known.values())

    # --- checkpoints and other files -----------------------------------------------------------------------------

    def save(self) -> None:
        """Save a checkpoint of this step.

        Raises:
            AgreedError: it cannot be written; on all workers.
        """
        self.collect_bad_videos()
        weights, state = self.learner.weights(), self.learner.state_dict()
        self.write(lambda: checkpoints.save(self.run, self.checkpoint_info({}), weights, state))
        self.saved_step, self.saved_at = self.learner.step, time.monotonic()

    def finish_epoch(self, metrics: dict[str, float]) -> None:
        """Record in the checkpoint of this step that the epoch is finished, with its metrics.

        Raises:
            AgreedError: it cannot be written; on all workers.
        """

        def rewrite() -> None:
            written = checkpoints.read_info(checkpoints.checkpoint_uri(self.run, self.learner.step))
            info = replace(self.checkpoint_info(metrics), files=written.files, time=written.time)
            checkpoints.rewrite_info(self.run, info)

        self.write(rewrite)

    def write(self, function: Callable[[], object]) -> None:
        """Write a checkpoint on the first worker, and remove the checkpoints that are no longer needed.

        Raises:
            AgreedError: it cannot be written; on all workers.
        """
        error: UserError | None = None
        if self.rank == 0:
            try:
                check_lease(self.run, self.job.lease)
                try:
                    function()
                except OSError as problem:
                    raise checkpoints.UnwritableError(f"{self.run} does not answer: {problem}") from problem
                checkpoints.prune(self.run, self.config.train.keep_last, self.config.train.keep_best)
            except checkpoints.UnwritableError as problem:
                error = RunError(f"{problem}. Checkpoints before it are intact: free space and start the run again")
            except LeaseLost as problem:
                error = problem
            except OSError as problem:
                self.send_line(f"an old checkpoint cannot be removed: {problem}", logging.WARNING)
        self.agree(Action.FAIL if error else Action.CONTINUE, error)

    def checkpoint_info(self, metrics: dict[str, float]) -> checkpoints.CheckpointInfo:
        """The description of a checkpoint of this step.

        Args:
            metrics: of the epoch that this step finishes; empty within an epoch.
        """
        epoch, config = len(self.progress.history), self.config.model_dump(mode="json")
        progress = self.progress.to_record()
        return checkpoints.CheckpointInfo(self.learner.step, epoch, metrics, list(self.job.classes), config, progress)

    def save_explosion(self, batch: Batch, error: ExplodedError) -> AgreedError:
        """Save the weights before an exploded step, and each worker's batch, for inspection.

        Returns the error with their place and advice.
        """
        folder = storage.join(self.run, "exploded")
        weights, state = self.learner.weights(), self.learner.state_dict()
        try:
            step = storage.join(folder, f"checkpoints/step-{self.learner.step:010d}")
            if self.rank == 0:
                step = checkpoints.save(folder, self.checkpoint_info({}), weights, state)
            content = save_safetensors({key: tensor.contiguous() for key, tensor in batch.tensors().items()})
            storage.write_bytes(storage.join(step, f"batch-{self.rank}.safetensors"), content)
            where = f"the weights before it, and its batch, are in {step}"
        except (checkpoints.UnwritableError, OSError) as problem:
            where = f"the weights before it and its batch could not be saved ({problem})"
        advice = "Lower optim.lr, lengthen optim.warmup_epochs or set optim.clip_grad, and resume with --allow-changes"
        return AgreedError(f"{error}; {where}. {advice}")

    def start_profiler(self, steps_left: int) -> torch.profiler.profile | None:
        """Trace some of the next steps on the first worker, and send the trace to the driver.

        Args:
            steps_left: remaining steps of the epoch.
        """
        needed = 2 * TRACED_STEPS
        if steps_left < needed:
            self.send_line(f"no trace: it needs {needed} steps, and this epoch has {steps_left} left", logging.WARNING)
        if self.rank or steps_left < needed:
            return None

        def send_trace(content: bytes) -> None:
            self.send(ArtifactFile(TRACE_FILE, content))
            self.send_line(f"a trace of {TRACED_STEPS} steps is in {TRACE_FILE}; open it in https://ui.perfetto.dev")

        return start_profiler(self.learner.device, send_trace)


def hits_text(hits: np.ndarray) -> bytes:
    """The results of all videos as one character per row of the list (``pipelines.runs.record.HITS_FILE``).

    Args:
        hits: int8 ``[rows]``, as of ``Results.hits``.
    """
    return np.frombuffer(b"01-", np.uint8)[hits].tobytes()


def check_bad_fraction(bad: list[BadVideo], rows: int, config: Config) -> None:
    """End the run if too many of an epoch's videos are bad.

    Raises:
        AgreedError: more than ``data.max_bad_fraction`` of the epoch's ``rows`` videos are bad.
    """
    fraction, limit = len(bad) / rows, config.data.max_bad_fraction
    if fraction > limit:
        examples = "".join(f"\n  {v.uri}: {v.reason}" for v in bad[:5])
        raise AgreedError(
            f"{len(bad)} of {rows} videos ({fraction:.1%}) could not be decoded, more than data.max_bad_fraction "
            f"{limit:.1%} allows. Repair them, or raise the limit and resume. Examples:{examples}"
        )


def broadcast_buffers(model: torch.nn.Module) -> None:
    """Give all workers the buffers (batch norm statistics) of the first worker, which are those that are saved."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
