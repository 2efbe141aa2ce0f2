"""What runs on each training worker: steps, validation and checkpoints, from where the run's last checkpoint is.

All workers do the same at the same step; what one alone knows (that the user wants to stop, that its disk is full) is
agreed on before the next step, so that none waits for another that has left. The first worker writes the checkpoints
and tells the driver of the progress through the channel.
"""

from __future__ import annotations

import gzip
import math
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from ray.train.torch import get_device
from safetensors.torch import save as save_safetensors

from pipelines.data.loader import Split, object_store
from pipelines.runs import checkpoints
from pipelines.runs.errors import AgreedError, BadVideo, RunError
from pipelines.tracking import prometheus
from pipelines.training.progress import Progress, advise, describe_epoch, minutes
from posmlp import create_model, load_published, storage
from posmlp.config import Config
from posmlp.errors import UserError
from posmlp.learn.evaluation import ClassificationMetrics, video_scores
from posmlp.learn.learner import ExplodedError, Learner
from posmlp.learn.parallel import mean_over_workers, parallelise
from posmlp.metrics import (
    DATA_BAD,
    DATA_DECODED_BY_PYAV,
    DATA_OBJECT_STORE_MB,
    DATA_SPILLED_MB,
    EPOCH,
    PERF_CLIPS_PER_S,
    PERF_DATA_WAIT_FRAC,
    PERF_EPOCH_S,
    PERF_FIRST_BATCH_S,
    PERF_MEMORY_MB,
    PERF_MFU,
    PERF_STEPS_PER_S,
    PERF_TFLOPS,
    TRAIN_GRAD_NORM,
    TRAIN_LOSS,
    TRAIN_LR,
    TRAIN_WORKERS,
)
from posmlp.model.cost import cost, count_macs, peak_flops
from posmlp.video.batch import Batch

SPEAK_S = 5.0  # between two lines of progress
ASK_S = 0.5  # between two questions to the driver whether to stop
GO_ON, STOP, FAIL = 0, 1, 2  # what the workers agree on before a step
PROFILED = 3  # steps in a trace, after as many that warm up
TRACE = "profile/trace.json.gz"


def train_worker(job: dict[str, Any]) -> None:
    """Ray Train's loop. What the user can mend ends the run on all workers, without a new try.

    Args:
        job: ``config`` (a recipe as plain data), ``run`` (the run's folder), ``weights`` (a file to start from, or
            None), ``train_rows`` and ``val_rows`` (references), ``classes``, ``channel``, ``profile``, and ``measure``:
            whether the model's cost is not known yet.
    """
    try:
        Worker(job).work()
    except UserError as error:
        ray.get(job["channel"].fail.remote(str(error)))
        if not isinstance(error, AgreedError) and ray.train.get_context().get_world_size() > 1:
            raise  # the others do not know: Ray ends them, and the next set of workers finds that the run has failed


class Worker:
    """One of a run's training workers."""

    def __init__(self, job: dict[str, Any]):
        self.job = job
        self.config = Config.model_validate(job["config"])
        self.run: str = job["run"]
        self.channel: ActorHandle = job["channel"]
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        threads = self.config.scaling.threads_per_worker
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
        if self.config.train.deterministic:
            torch.use_deterministic_algorithms(True)
        self.asked: ray.ObjectRef | None = None
        self.asked_at = 0.0

    def tell(self, kind: str, **event: Any) -> None:
        """Pass something on to the driver; the first worker speaks for all."""
        if self.rank == 0:
            ray.get(self.channel.tell.remote({"kind": kind, **event}))

    def say(self, text: str) -> None:
        """A line for the user."""
        self.tell("line", text=text)

    def work(self) -> None:
        """From the last checkpoint to the end of the run, or until it is asked to stop."""
        before, losses, ended = from_first(lambda: ray.get(self.channel.begin.remote(self.world)))
        if ended:  # for a reason that another try would meet again
            return
        config = self.config
        self.train_split, self.val_split = (
            Split(self.job[f"{name}_rows"], config, name == "train", self.rank, self.world) for name in ("train", "val")
        )
        self.start(before, losses)
        self.saved = self.learner.step
        self.first = len(self.progress.history)
        told: set[str] = set()
        batches = self.train_split.batches(self.first, self.progress.steps, until=config.train.epochs)
        for epoch in range(self.first, config.train.epochs):
            metrics = self.epoch(batches, epoch)
            if metrics is None:
                where = f"epoch {epoch}" + f", step {self.progress.steps}" * bool(self.progress.steps)
                self.say(f"stopped after {where}")
                return
            self.tell("metrics", history=[metrics])
            self.say(describe_epoch(metrics, config))
            for kind, text in advise(metrics, config).items():
                if kind not in told:  # once is enough
                    told.add(kind)
                    self.say(text)
            ray.train.report(metrics)

    # --- start ---------------------------------------------------------------------------------------------------

    def start(self, before: int, losses: int) -> None:
        """The learner and the progress, new or from the run's last whole checkpoint."""
        config = self.config
        torch.manual_seed(config.train.seed)
        model = create_model(config.model.name, **config.model.overrides())
        self.macs = count_macs(config.model.variant())
        found = from_first(self.find_checkpoint)
        notes: list[str] = []
        if found is None and self.job["weights"]:
            report = load_published(model, self.job["weights"])
            notes = [f"start from {self.job['weights']}: {report.loaded} tensors", *report.adapted]
        learner = Learner(parallelise(model, config, get_device()), config, self.train_split.steps, self.job["classes"])
        self.learner, self.progress = learner, Progress()
        if found is not None:
            uri, notes = found
            about, contents = checkpoints.load(uri)
            learner.load_state_dict(contents[checkpoints.WEIGHTS], contents[checkpoints.STATE])
            self.progress = Progress(**about.progress)
        if self.rank:
            return
        if not learner.step and self.job["measure"]:
            measured = cost(config.model.name, device=learner.device, **config.model.overrides())
            self.tell("cost", metrics=measured.metrics())
        self.tell("metrics", history=self.progress.history)
        params = sum(p.numel() for p in model.parameters())
        what = f"{config.model.name}, {params / 1e6:.2f} M parameters, {self.macs / 1e9:.2f} GMACs"
        self.say(f"{config.name}: {what}; {self.describe_place()}; {self.describe_start(before, losses)}")
        for note in notes:
            self.say(f"  {note}")

    def find_checkpoint(self) -> tuple[str, list[str]] | None:
        """The newest whole checkpoint and what was wrong with newer ones; the first worker looks for all."""
        try:
            uri, problems = checkpoints.newest(self.run)
        except OSError as error:
            raise RunError(f"{self.run} cannot be read: {error}") from error
        return (uri, [f"passed over: {problem}" for problem in problems]) if uri else None

    def describe_place(self) -> str:
        """Where it trains, for the first line."""
        learner, threads = self.learner, torch.get_num_threads()
        device = torch.cuda.get_device_name(learner.device) if learner.device.type == "cuda" else "CPU"
        text = f"{self.world} worker{'s' * (self.world > 1)} on {device}, {threads} thread{'s' * (threads > 1)} each"
        local = math.ceil(self.config.train.global_batch / self.world)
        if (limit := self.config.scaling.micro_batch) and limit < local:
            text += f", {local} clips in {math.ceil(local / limit)} parts"
        return text

    def describe_start(self, before: int, losses: int) -> str:
        """Where it starts, for the first line.

        Args:
            before: workers that there were; 0 for none yet.
            losses: times that workers were lost.
        """
        text = "starting"
        if self.learner.step:
            epoch, step = len(self.progress.history), self.progress.steps
            text = f"going on after epoch {epoch}" + (f", step {step}" if step else "")
        if self.world > before > 0:
            text = f"the cluster has room for {self.world} workers in place of {before}; {text}"
        elif before:
            text = f"workers were lost ({losses} of {self.config.scaling.max_failures} times); {text}"
        return text

    # --- an epoch ------------------------------------------------------------------------------------------------

    def epoch(self, batches: Iterator[Batch], epoch: int) -> dict[str, float] | None:
        """What is left of an epoch; returns its metrics, or None if the run shall stop and its state is saved."""
        config = self.config
        if not self.progress.trained:
            metrics = self.train_epoch(batches, epoch)
            if metrics is None:
                if self.learner.step > self.saved:
                    self.save()
                return None
            self.progress.trained = metrics
            self.save()  # before validation, which takes its time
        metrics, rows = dict(self.progress.trained), self.train_split.count
        if (epoch + 1) % config.eval.every == 0 or epoch + 1 == config.train.epochs:
            validation = self.validate()
            if validation is None:
                return None
            metrics |= validation
            rows += self.val_split.count
            self.collect_bad()
        if config.data.decoder == "decord":
            metrics[DATA_DECODED_BY_PYAV] = float(self.progress.taken_over)
        bad = [BadVideo(**video) for video in self.progress.bad]
        metrics |= {DATA_BAD: float(len(bad)), EPOCH: float(epoch + 1)}
        if bad:
            self.tell("bad", videos=bad)
        check_bad(bad, rows, config)
        self.progress = self.progress.next_epoch(metrics)
        self.finish_epoch(metrics)
        return metrics

    def train_epoch(self, batches: Iterator[Batch], epoch: int) -> dict[str, float] | None:
        """The training steps that are left of an epoch; returns its metrics so far, or None if the run shall stop."""
        config, learner, progress, split = self.config, self.learner, self.progress, self.train_split
        steps, every = split.steps, config.train.checkpoint_every_steps
        waited, first, began = 0.0, 0.0, progress.steps
        pace = prometheus.Pace(config.name, config.train.global_batch)
        start = spoken = time.perf_counter()
        watch = object_store if self.rank == 0 else lambda: (math.nan, math.nan)
        store, spilled_before = watch()
        profiler = self.profiler(steps - began) if self.job["profile"] and epoch == self.first else None
        while progress.steps < steps:
            before = time.perf_counter()
            batch = self.next_batch(batches)
            waited += time.perf_counter() - before
            first = first or waited
            if batch is None:
                return None
            try:
                step = learner.train_step(batch.to(learner.device))
            except ExplodedError as error:
                raise self.saved_explosion(batch, error) from error
            progress.steps += 1
            progress.loss += step.loss
            if math.isfinite(step.grad_norm):
                progress.grad_norm += step.grad_norm
                progress.norms += 1
            if profiler:
                profiler.step()
            if every and learner.step % every == 0 and progress.steps < steps:
                self.save()
            now = time.perf_counter()
            if now - spoken > SPEAK_S:
                spoken = now
                store = max(store, watch()[0])
                rate = (progress.steps - began) / (now - start)
                left = (steps * (config.train.epochs - epoch) - progress.steps) / rate
                text = f"epoch {epoch + 1}/{config.train.epochs}  step {progress.steps}/{steps}  "
                text += f"loss {progress.loss / progress.steps:.3f}  {rate * config.train.global_batch:.1f} clips/s  "
                self.say(f"{text}data wait {waited / (now - start):.0%}  left {minutes(left)}")
                self.show(pace, now - start, progress.steps - began, waited)
        if profiler:
            profiler.stop()
        seconds = time.perf_counter() - start
        if spoken == start:  # a short epoch
            self.show(pace, seconds, steps - began, waited)
        used, spilled = watch()
        (waited_share,) = mean_over_workers([waited / seconds])
        metrics = {
            TRAIN_LOSS: progress.loss / steps,
            TRAIN_GRAD_NORM: progress.grad_norm / max(1, progress.norms),
            TRAIN_WORKERS: float(self.world),
            TRAIN_LR: learner.optimizer.param_groups[0]["lr"],
            PERF_DATA_WAIT_FRAC: waited_share,
            PERF_FIRST_BATCH_S: first,
            PERF_EPOCH_S: seconds,
            DATA_OBJECT_STORE_MB: max(store, used),
            DATA_SPILLED_MB: spilled - spilled_before,
        }
        return metrics | self.speed((steps - began) / seconds)

    def show(self, pace: prometheus.Pace, seconds: float, steps: int, waited: float) -> None:
        """How training goes now, as gauges; the first worker's."""
        if self.rank == 0:
            pace.show(seconds, steps, waited)
            prometheus.show(self.config.name, train_loss=self.progress.loss / self.progress.steps)

    def speed(self, steps_per_s: float) -> dict[str, float]:
        """Rates over all workers, the share of the devices' peak where it is known, and the memory of one worker.

        A training step takes three times the multiply-accumulates of a forward pass, and two operations each.
        """
        clips = steps_per_s * self.config.train.global_batch
        flops = clips * 6 * self.macs
        metrics = {
            PERF_STEPS_PER_S: steps_per_s,
            PERF_CLIPS_PER_S: clips,
            PERF_TFLOPS: flops / 1e12,
            PERF_MEMORY_MB: memory_mb(self.learner.device),
        }
        if peak := peak_flops(self.learner.device, self.config.train.precision):
            metrics[PERF_MFU] = flops / self.world / peak
        return metrics

    def next_batch(self, batches: Iterator[Batch]) -> Batch | None:
        """The next batch; None, for all workers at the same step, if the run shall stop.

        Raises:
            AgreedError: a worker cannot go on; on all workers.
        """
        batch, error, wish = None, None, GO_ON
        if self.rank == 0 and self.wants_stop():
            wish = STOP
        else:
            try:
                batch = next(batches)
            except UserError as problem:
                error, wish = problem, FAIL
        return batch if self.agree(wish, error) == GO_ON else None

    def agree(self, wish: int, error: UserError | None = None) -> int:
        """All workers do what the worst off needs, which is returned.

        Raises:
            AgreedError: a worker has failed.
        """
        if error:
            ray.get(self.channel.fail.remote(str(error)))  # first: the others only know that one has failed
        if self.world > 1:
            worst = torch.tensor(wish)
            dist.all_reduce(worst, dist.ReduceOp.MAX)
            wish = int(worst)
        if wish == FAIL:
            raise AgreedError(str(error) if error else "another worker failed") from error
        return wish

    def wants_stop(self) -> bool:
        """Whether the driver has asked to stop; costs no wait."""
        if self.asked is None and time.perf_counter() - self.asked_at > ASK_S:
            self.asked, self.asked_at = self.channel.shall_stop.remote(), time.perf_counter()
        if self.asked is None or not ray.wait([self.asked], timeout=0)[0]:
            return False
        answer, self.asked = ray.get(self.asked), None
        return answer

    def validate(self) -> dict[str, float] | None:
        """Metrics over the whole split, every good video once; None if the run shall stop."""
        learner, views = self.learner, self.config.eval.clips * self.config.eval.crops
        tally, batches = ClassificationMetrics.empty(learner.classes), self.val_split.batches(0)
        with learner.evaluation_weights():
            share_buffers(learner.raw)
            for _ in range(self.val_split.steps):
                batch = self.next_batch(batches)
                if batch is None:
                    return None
                scores = video_scores(learner.score(batch.to(learner.device)))
                tally.add(scores, batch.labels[::views], batch.weights[::views])
        tally = tally.sum_over_workers()
        if not tally.videos:
            raise AgreedError("no validation video could be decoded")
        self.tell("confusion", counts=tally.confusion.numpy())
        return tally.metrics()

    def collect_bad(self) -> None:
        """Add what any worker found bad since the last call, each video once."""
        taken_over = self.train_split.taken_over + self.val_split.taken_over
        mine = [asdict(video) for video in self.train_split.take_bad() + self.val_split.take_bad()]
        parts: list[tuple[list[dict[str, str]], int]] = [(mine, taken_over)] * self.world
        if self.world > 1:
            dist.all_gather_object(parts, (mine, taken_over))
        known = {video["sample_id"] for video in self.progress.bad}
        for found, count in parts:
            self.progress.bad += [video for video in found if video["sample_id"] not in known]
            self.progress.taken_over += count

    # --- what it writes ------------------------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint of this step.

        Raises:
            AgreedError: it cannot be written; on all workers.
        """
        self.collect_bad()
        weights, state = self.learner.weights(), self.learner.state_dict()
        self.write(lambda: checkpoints.save(self.run, self.about({}), weights, state))
        self.saved = self.learner.step

    def finish_epoch(self, metrics: dict[str, float]) -> None:
        """The checkpoint of this step is that of a finished epoch.

        Raises:
            AgreedError: it cannot be written; on all workers.
        """

        def mark() -> None:
            written = checkpoints.read_info(checkpoints.place(self.run, self.learner.step))
            about = replace(self.about(metrics), files=written.files, time=written.time)
            checkpoints.rewrite_info(self.run, about)

        self.write(mark)

    def write(self, function: Callable[[], object]) -> None:
        """The first worker writes; checkpoints that nobody needs any more go.

        Raises:
            AgreedError: it could not; on all workers.
        """
        error: UserError | None = None
        if self.rank == 0:
            try:
                function()
                checkpoints.prune(self.run, self.config.train.keep_last, self.config.train.keep_best)
            except checkpoints.UnwritableError as problem:
                error = RunError(f"{problem}. Checkpoints before it are intact: make room, and start the run again")
            except OSError as problem:
                self.say(f"an old checkpoint cannot be removed: {problem}")
        self.agree(FAIL if error else GO_ON, error)

    def about(self, metrics: dict[str, float]) -> checkpoints.CheckpointInfo:
        """What a checkpoint of this moment says of itself."""
        epoch, config = len(self.progress.history), self.config.model_dump(mode="json")
        progress = asdict(self.progress)
        return checkpoints.CheckpointInfo(
            self.learner.step, epoch, metrics, list(self.job["classes"]), config, progress
        )

    def saved_explosion(self, batch: Batch, error: ExplodedError) -> AgreedError:
        """The error with what to do; the weights before the step, and its batch, are kept for a closer look."""
        folder = storage.join(self.run, "exploded")
        weights, state = self.learner.weights(), self.learner.state_dict()
        try:
            step = storage.join(folder, f"checkpoints/step-{self.learner.step:010d}")
            if self.rank == 0:
                step = checkpoints.save(folder, self.about({}), weights, state)
            content = save_safetensors({key: getattr(batch, key).contiguous() for key in Batch.__annotations__})
            storage.write_bytes(storage.join(step, f"batch-{self.rank}.safetensors"), content)
            where = f"the weights before it, and its batch, are in {step}"
        except (checkpoints.UnwritableError, OSError) as problem:
            where = f"they could not be kept ({problem})"
        advice = "Lower optim.lr, lengthen optim.warmup_epochs or set optim.clip_grad, and go on with --allow-changes"
        return AgreedError(f"{error}; {where}. {advice}")

    def profiler(self, steps: int) -> torch.profiler.profile | None:
        """Traces some of the next steps on the first worker, and hands the trace to the driver.

        Args:
            steps: left of the epoch.
        """
        if steps < 2 * PROFILED:
            self.say(f"no trace: it needs {2 * PROFILED} steps, and {steps} are left of this epoch")
        if self.rank or steps < 2 * PROFILED:
            return None

        def keep(profile: torch.profiler.profile) -> None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "trace.json")
                profile.export_chrome_trace(str(path))
                content = gzip.compress(path.read_bytes())
            self.tell("file", path=TRACE, content=content)
            self.say(f"a trace of {PROFILED} steps is in {TRACE}; open it in https://ui.perfetto.dev")

        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.learner.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        schedule = torch.profiler.schedule(wait=0, warmup=PROFILED, active=PROFILED, repeat=1)
        profiler = torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=keep)
        profiler.start()
        return profiler


def from_first(function: Any) -> Any:
    """What a function returns on the first worker, on all.

    Raises:
        AgreedError: it raised a ``UserError``; on all workers.
    """
    result: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result[0] = function()
        except UserError as error:
            result[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    if result[1]:
        raise AgreedError(result[1])
    return result[0]


def check_bad(bad: list[BadVideo], rows: int, config: Config) -> None:
    """End the run when too many of an epoch's videos are bad."""
    fraction, limit = len(bad) / rows, config.data.max_bad_fraction
    if fraction > limit:
        examples = "".join(f"\n  {v.uri}: {v.reason}" for v in bad[:5])
        raise AgreedError(
            f"{len(bad)} of {rows} videos ({fraction:.1%}) could not be decoded, more than data.max_bad_fraction "
            f"{limit:.1%} allows. Mend them, or raise the limit and go on. The first ones:{examples}"
        )


def share_buffers(model: torch.nn.Module) -> None:
    """All workers get the first one's statistics, which are those that are saved."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def memory_mb(device: torch.device) -> float:
    """The most memory that training has taken, MB (1e6 bytes): of the device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
