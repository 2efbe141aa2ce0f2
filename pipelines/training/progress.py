"""The progress of a run, what is measured in an epoch, and the lines that describe both."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from posmlp.config import Config
from posmlp.metrics import (
    DATA_BAD,
    DATA_OBJECT_STORE_MB,
    DATA_SPILLED_MB,
    EPOCH,
    MAIN_METRICS,
    PERF_CLIPS_PER_S,
    PERF_DATA_WAIT_FRAC,
    TRAIN_LOSS,
    VAL_BEST_EPOCH,
    VAL_LOSS,
    main_metric,
)
from posmlp.video.manifest import Manifest

LINE_S = 5.0  # between two progress lines
SEND_STEPS_S = 3.0  # between two messages with metrics of steps
MAX_STEP_POINTS = 500  # of each metric of steps in a run: MLflow's charts show no more
# Not told in the tag ``overrides``: where a run lies, and what follows from the data
NOT_OVERRIDES = ("model.num_classes", "train.storage", "tracking.uri", "tracking.experiment", "data.cache_dir")
PROGRESS_KEYS = {"decoded_by_pyav": "taken_over", "training_metrics": "trained"}  # field -> key in checkpoint.json
MAX_DATA_WAIT = 0.2  # share of an epoch that may pass in waiting for clips before the run gives advice


@dataclass
class RunProgress:
    """What a checkpoint stores of a run's progress besides weights.

    The counts are those of the first worker, unless stated otherwise.

    Attributes:
        history: metrics of each finished epoch.
        steps: finished steps of the current epoch.
        loss, grad_norm: sums over these steps; a gradient that overflowed in fp16 is left out.
        norms: the number of gradients in the sum.
        bad: bad videos (``BadVideo``) of the current epoch so far, of all workers.
        decoded_by_pyav: videos of the current epoch that PyAV decoded in place of decord, of all workers.
        training_metrics: of the current epoch, once all its steps are done and only validation is left.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    loss: float = 0.0
    grad_norm: float = 0.0
    norms: int = 0
    bad: list[dict[str, str]] = field(default_factory=list)
    decoded_by_pyav: int = 0
    training_metrics: dict[str, float] = field(default_factory=dict)

    def add_step(self, loss: float, grad_norm: float) -> None:
        """Count a finished training step."""
        self.steps += 1
        self.loss += loss
        if math.isfinite(grad_norm):
            self.grad_norm += grad_norm
            self.norms += 1

    def next_epoch(self, metrics: dict[str, float]) -> RunProgress:
        """The progress at the start of the next epoch; ``metrics`` are those of the current one."""
        return RunProgress([*self.history, metrics])

    def to_record(self) -> dict[str, Any]:
        """The progress as plain data, as it is in ``checkpoint.json``."""
        return {PROGRESS_KEYS.get(each.name, each.name): getattr(self, each.name) for each in fields(self)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> RunProgress:
        """The progress in a ``checkpoint.json``; keys that are missing have their defaults."""
        names = {PROGRESS_KEYS.get(each.name, each.name): each.name for each in fields(cls)}
        return cls(**{names[key]: value for key, value in record.items()})


@dataclass
class EpochMeter:
    """What a worker measures while it does the training steps of an epoch.

    Attributes:
        start: when it began, in seconds of ``time.perf_counter``.
        max_store_mib: largest use of the cluster's object store that was seen; NaN if unknown.
        spilled_before_mib: what the object store had spilled before; NaN if unknown.
        steps: training steps since the start; after a resume fewer than the epoch has.
        seconds: from the start to the last progress line, or to the end.
        waited: seconds spent waiting for clips.
        first_batch_s: seconds spent waiting for the first batch.
        first_step_s: from the start to the end of the first step, which also starts decoders and compiles.
        lines: number of progress lines so far.
    """

    start: float
    max_store_mib: float
    spilled_before_mib: float
    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    first_batch_s: float = 0.0
    first_step_s: float = 0.0
    lines: int = 0

    def add_step(self) -> None:
        """Count a training step."""
        self.steps += 1
        if self.steps == 1:
            self.first_step_s = time.perf_counter() - self.start

    def step_s(self) -> float | None:
        """The mean time of a step without the first one, in seconds; None before the second."""
        return (self.seconds - self.first_step_s) / (self.steps - 1) if self.steps > 1 else None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context in which the worker waits for a batch."""
        before = time.perf_counter()
        yield
        self.waited += time.perf_counter() - before
        self.first_batch_s = self.first_batch_s or self.waited

    def data_wait(self) -> float:
        """The share of the time after the first batch in which the worker waited for clips."""
        after = self.seconds - self.first_batch_s
        return (self.waited - self.first_batch_s) / after if after > 0 else 0.0

    def line_is_due(self) -> bool:
        """Whether it is time for a progress line; if so, count it and set ``seconds``."""
        passed = time.perf_counter() - self.start
        if passed - self.seconds <= LINE_S:
            return False
        self.seconds = passed
        self.lines += 1
        return True

    def end(self) -> None:
        """Set ``seconds`` at the end of the training steps."""
        self.seconds = time.perf_counter() - self.start


@dataclass
class StepSeries:
    """The metrics of optimizer steps (``posmlp.metrics.BY_STEP``), one point every N steps, until they are sent.

    N depends on the length of the run alone: a run has at most ``MAX_STEP_POINTS`` points, however long it is, and one
    that resumes has them at the same steps.

    Attributes:
        every: N, the number of steps from one point to the next.
        global_batch: clips per step.
        rows: the points that are not sent yet, as for ``Tracker.log_steps``.
        loss, count: sum of the losses since the last point, and their number.
        since: when the steps since the last point began, in seconds of ``time.perf_counter``.
        sent: when points were sent last, likewise.
    """

    every: int
    global_batch: int
    rows: list[list[float]] = field(default_factory=list)
    loss: float = 0.0
    count: int = 0
    since: float = 0.0
    sent: float = 0.0

    @classmethod
    def for_run(cls, steps: int, global_batch: int) -> StepSeries:
        """An empty series for a run of this many optimizer steps."""
        return cls(-(-steps // MAX_STEP_POINTS), global_batch)

    def start(self, now: float | None = None) -> None:
        """Begin an epoch, or the steps of the next point: what is before, such as validation, is no time of a step.

        Args:
            now: when, in seconds of ``time.perf_counter``; None: now.
        """
        self.loss, self.count, self.since = 0.0, 0, time.perf_counter() if now is None else now

    def add(self, step: int, loss: float, rate: float, ended: float) -> None:
        """Add a finished step.

        Args:
            step: number of the optimizer step.
            rate: its learning rate.
            ended: when it ended, in seconds of ``time.perf_counter``.
        """
        self.loss += loss
        self.count += 1
        if step % self.every == 0:
            seconds = max(ended - self.since, 1e-9)
            clips_per_s = self.count * self.global_batch / seconds
            self.rows.append([int(time.time() * 1000), step, self.loss / self.count, rate, clips_per_s])
            self.start(ended)

    def take(self, at_once: bool) -> list[list[float]]:
        """Return and remove the points to send: all, if ``at_once`` or if the last time was ``SEND_STEPS_S`` ago."""
        now = time.perf_counter()
        if not self.rows or not (at_once or now - self.sent > SEND_STEPS_S):
            return []
        rows, self.rows, self.sent = self.rows, [], now
        return rows


def best_so_far(history: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The highest main metric of epochs, and the newest epoch that has it; empty if no epoch was validated."""
    validated = [(main, metrics) for metrics in history if (main := main_metric(metrics))]
    if not validated:
        return {}
    value, epoch = max((metrics[main.key], metrics[EPOCH]) for main, metrics in validated)
    return {validated[0][0].best: value, VAL_BEST_EPOCH: epoch}


def early_stop(history: Sequence[Mapping[str, float]], config: Config) -> str:
    """Why a run ends before its last epoch (``train.patience``); empty if it does not.

    It depends on the finished epochs alone, so a run that resumes decides as one that was not interrupted.

    Args:
        history: metrics of each finished epoch.
    """
    patience, monitor = config.train.patience, config.train.monitor or MAIN_METRICS[config.task].key
    validated = [(int(metrics[EPOCH]), metrics[monitor]) for metrics in history if monitor in metrics]
    if patience is None or not validated or monitor not in history[-1]:
        return ""
    sign = -1 if monitor == VAL_LOSS else 1
    best_epoch, best = validated[0]
    for epoch, value in validated:
        if sign * (value - best) > 0 or best != best:  # a NaN is worse than any number
            best_epoch, best = epoch, value
    waited = validated[-1][0] - best_epoch
    if waited < patience:
        return ""
    return f"{monitor} is not better than {best:.4g} of epoch {best_epoch} for {waited} epochs (train.patience)"


def describe_steps(progress: RunProgress, meter: EpochMeter, epoch: int, steps: int, config: Config) -> str:
    """The progress line within an epoch.

    Args:
        epoch: number of the epoch, from 0.
        steps: training steps in an epoch.
    """
    rate, step_s = meter.steps / meter.seconds, meter.step_s()
    text = f"epoch {epoch + 1}/{config.train.epochs}  step {progress.steps}/{steps}  "
    text += f"loss {progress.loss / progress.steps:.3f}  {rate * config.train.global_batch:.1f} clips/s  "
    text += f"data wait {meter.data_wait():.0%}"
    if step_s is None:
        return text
    left = (steps * (config.train.epochs - epoch) - progress.steps) * step_s
    return f"{text}  left {format_duration(left)}"


def describe_epoch(metrics: dict[str, float], config: Config) -> str:
    """The line for a finished epoch."""
    text = f"epoch {metrics[EPOCH]:.0f}/{config.train.epochs}  loss {metrics[TRAIN_LOSS]:.3f}"
    if main := main_metric(metrics):
        text += f"  val loss {metrics.get(VAL_LOSS, math.nan):.3f}  val {main.title} {metrics[main.key]:.1%}"
        best, epoch = metrics[main.best], int(metrics[VAL_BEST_EPOCH])
        text += " (best)" if epoch == metrics[EPOCH] else f" (best {best:.1%}, epoch {epoch})"
    text += f"  {metrics[PERF_CLIPS_PER_S]:.1f} clips/s  data wait {metrics[PERF_DATA_WAIT_FRAC]:.0%}"
    text += f"  object store {metrics[DATA_OBJECT_STORE_MB]:.0f} MiB"
    if metrics[DATA_SPILLED_MB] > 0:
        text += f", spilled {metrics[DATA_SPILLED_MB]:.0f} MiB"
    if metrics[DATA_BAD]:
        text += f"  bad videos {metrics[DATA_BAD]:.0f}"
    return text


def describe_run(config: Config, train_set: Manifest, val_set: Manifest) -> str:
    """The model of a run and its data, in one line."""
    model, blocks = config.model, dict.fromkeys(config.model.resolved().blocks or ())
    what = f"{model.name} with {' and '.join(blocks)} blocks, {model.variant().frames} frames"
    data = f"{len(train_set.rows)} videos of {len(train_set.classes)} classes from {config.data.train.path}"
    return (
        f"**{config.name}**: {what}, {config.train.epochs} epochs on {data}; validation on {len(val_set.rows)} videos"
    )


def describe_result(history: Sequence[Mapping[str, float]], epochs: int, status: str) -> str:
    """How far a run is and what it has reached, in one line.

    Args:
        epochs: of the whole run.
        status: of its MLflow run.
    """
    state = {"FINISHED": "Finished", "KILLED": "Stopped", "FAILED": "Failed", "RUNNING": "Running"}[status]
    text = f"{state} after epoch {len(history)} of {epochs}"
    last = next((metrics for metrics in reversed(history) if main_metric(metrics)), {})
    main, best = main_metric(last), best_so_far(history)
    if main is None:
        return text
    return f"{text}: {main.key} {last[main.key]:.1%}, best {best[main.best]:.1%} in epoch {best[VAL_BEST_EPOCH]:.0f}"


def describe_overrides(config: Config) -> str:
    """The keys that differ from their defaults, as in ``train.epochs=5, optim.lr=0.003``."""
    changed = {key: value for key, value in config.non_defaults().items() if key not in NOT_OVERRIDES}
    return ", ".join(
        f"{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in changed.items()
    )


def advise(metrics: dict[str, float], config: Config) -> dict[str, str]:
    """Recommend recipe keys to change when the device waits for clips or the object store spills.

    Returns:
        A text for each problem: ``wait`` (or ``cache`` while the cache is filled) and ``spill``.
    """
    data, texts = config.data, {}
    waited = metrics[PERF_DATA_WAIT_FRAC]
    if waited > MAX_DATA_WAIT:
        kind = "wait"
        knobs = [
            "decode on more CPUs (decoding cannot use the CPUs that scaling.cpus_per_worker reserves; nodes without a "
            "GPU decode too)"
        ]
        if config.scaling.decode_in_worker:
            knobs = ["decode in tasks of other CPUs (scaling.decode_in_worker=false)"]
        if data.cache_dir is None:
            side = data.short_side or -(-config.model.variant().image_size * 8 // 7)
            knobs.append("decode a small set once (data.cache_dir)")
            pack = f"`posmlp data shard LIST --out DIR --short-side {side} --keyframe-interval 12`"
            knobs.append(f"for the next run, pack the set ({pack})")
        elif metrics[EPOCH] == 1:
            kind, knobs = "cache", ["wait for the next epoch: the first epoch fills data.cache_dir"]
        if data.repeats == 1 and not data.cache_dir:
            knobs.append("for the next run, cut several clips from each decoded video (data.repeats)")
        texts[kind] = f"training waited for clips {waited:.0%} of the epoch. What helps: " + "; or ".join(knobs)
    if metrics[DATA_SPILLED_MB] > 0:
        texts["spill"] = (
            f"the object store spilled {metrics[DATA_SPILLED_MB]:.0f} MiB to disk. What helps: a smaller "
            "data.rows_per_block, or a larger object store (`ray start --object-store-memory`)"
        )
    return texts


def format_duration(seconds: float) -> str:
    """A duration in minutes, or in seconds below 90 s."""
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
