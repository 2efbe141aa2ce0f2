"""Messages between a run's driver and its workers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from pipelines.runs.errors import BadVideo
from posmlp.config import FrameOrder

if TYPE_CHECKING:  # the channel carries these messages
    from pipelines.training.channel import Channel

# --- from the driver to every worker -----------------------------------------------------------------------------


@dataclass(frozen=True)
class WorkerJob:
    """What a worker needs to train.

    Attributes:
        config: the recipe as plain data.
        run: the run's folder, a path or a URI.
        weights: a file of weights to start from; None: random weights, or the run's checkpoint.
        train_rows, val_rows: references to the manifest rows of the splits (Arrow tables).
        classes: the class names.
        channel: carries events to the driver, and its stop requests to the worker.
        profile: trace some steps of the first epoch.
        measure_cost: measure the model's cost before the first step.
        sharing: number of trials that train at the same time, this one included.
        lease: id of the driver's lease (``pipelines.runs.lease``); empty if the run needs none.
        predicted: orders of the frames, as of ``TrialContext``.
    """

    config: Mapping[str, Any]
    run: str
    weights: str | None
    train_rows: ray.ObjectRef
    val_rows: ray.ObjectRef
    classes: Sequence[str]
    channel: Channel
    profile: bool
    measure_cost: bool
    sharing: int = 1
    lease: str = ""
    predicted: Sequence[FrameOrder] = ()


# --- from the first worker to the driver -------------------------------------------------------------------------


@dataclass(frozen=True)
class ProgressLine:
    """A line for the user.

    Attributes:
        level: of ``logging``; ``WARNING`` if the user should act.
        live: on a terminal the next line replaces it.
    """

    text: str
    level: int = logging.INFO
    live: bool = False


@dataclass(frozen=True)
class CostMeasured:
    """The cost metrics of the model, by name."""

    metrics: Mapping[str, float]


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of optimizer steps since the last message: rows as for ``Tracker.log_steps``."""

    rows: Sequence[Sequence[float]]


@dataclass(frozen=True)
class EpochMetrics:
    """The metrics of consecutive finished epochs: of the newest, or of all epochs so far when workers start."""

    epochs: Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class BadVideosFound:
    """Videos of one epoch that could not be decoded."""

    videos: Sequence[BadVideo]


@dataclass(frozen=True)
class ValidationDetails:
    """What a validation has found besides its metrics.

    Attributes:
        summary: of the task's results (``posmlp.tasks``).
        hits: the content of the run's ``HITS_FILE`` (``pipelines.runs.record``); None if the task has none.
    """

    summary: Any
    hits: bytes | None = None


@dataclass(frozen=True)
class ArtifactFile:
    """A file for the run's MLflow artifacts."""

    path: str
    content: bytes


WorkerEvent = (
    ProgressLine | CostMeasured | StepMetrics | EpochMetrics | BadVideosFound | ValidationDetails | ArtifactFile
)
