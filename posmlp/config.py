"""The recipe: one typed, validated tree that says everything about a run.

A recipe is a YAML file (``posmlp/recipes/*.yaml`` or the user's own). ``load_recipe`` reads it, applies
``key.path=value`` overrides and returns a frozen ``Config``. Unknown keys, wrong types and impossible combinations are
refused with one ``RecipeError`` that lists every problem.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

RECIPES = Path(__file__).parent / "recipes"

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]


class RecipeError(ValueError):
    """A recipe that cannot be run; the message lists every problem, one a line."""


class Section(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """Which backbone to build: a variant's name and what differs from it (see ``posmlp.create_model``)."""

    name: str = "tiny"
    num_classes: Positive | None = None  # None: as many as the data set has
    frames: Positive | None = None
    image_size: Positive | None = None
    dims: tuple[Positive, ...] | None = None
    depths: tuple[Positive, ...] | None = None
    groups: tuple[Positive, ...] | None = None
    windows: tuple[Positive | tuple[Positive, ...], ...] | None = None
    blocks: str | tuple[str, ...] | None = None
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # before the classifier
    weights: str | None = None  # a published (or saved) checkpoint to start from


class SplitSection(Section):
    """One split of a data set: a manifest CSV or a class-per-folder tree, and which of its rows to take."""

    path: str
    where: dict[str, str] = {}  # keep the rows whose CSV columns have these values


class DataSection(Section):
    """Where the videos are, and how a clip is cut from one."""

    train: SplitSection
    val: SplitSection
    sampling: Literal["uniform", "dense"] = "uniform"
    stride: Positive = 1  # frames between two samples; dense only
    frame_order: Literal["ordered", "shuffled"] = "ordered"  # shuffled: a control that destroys motion
    short_side: Positive | None = None  # frames are decoded at this short side; None: 8/7 of the image size
    crop_scale: tuple[Fraction, Fraction] = (0.6, 1.0)  # area of the training crop, as a share of the frame
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # width : height of the training crop
    cache_dir: str | None = None  # keep every decoded frame here, so that each video is decoded once
    max_bad_fraction: Fraction = 0.05  # share of an epoch's videos that may fail to decode
    rows_per_block: Positive = 16  # videos decoded by one Ray Data task


class AugmentSection(Section):
    """Augmentation on the device; each strength is the largest relative change, 0 switches it off."""

    flip: Fraction = 0.0  # probability of a horizontal flip; leave at 0 where direction tells the class
    brightness: Fraction = 0.0
    contrast: Fraction = 0.0
    saturation: Fraction = 0.0


class OptimSection(Section):
    """AdamW, linear warm-up, then cosine. ``lr`` is the peak rate at the recipe's global batch."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    min_lr: Annotated[float, Field(ge=0)] = 1e-6
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_grad: Annotated[float, Field(gt=0)] | None = None  # largest gradient norm
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None  # decay of the weight average that is evaluated


class TrainSection(Section):
    """Length, batch and numerics of a run."""

    epochs: Positive = 10
    global_batch: Positive = 32  # clips a step over all workers
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    storage: str = "runs"  # the run's folder is storage/name


class EvalSection(Section):
    """Validation after each epoch."""

    every: Positive = 1  # epochs between validations; the last epoch is always validated


class ScalingSection(Section):
    """How many training workers, and what each takes of the cluster."""

    workers: Positive = 1
    use_gpu: bool = False
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    threads_per_worker: Positive | None = None  # PyTorch threads; None: the node's cores shared by its workers


class TrackingSection(Section):
    """Where MLflow writes. None: ``MLFLOW_TRACKING_URI``, else SQLite in ``train.storage``."""

    uri: str | None = None
    experiment: str = "posmlp"
    log_model: bool = True  # store the final model in MLflow


class Config(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    model: ModelSection = ModelSection()
    data: DataSection
    augment: AugmentSection = AugmentSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    scaling: ScalingSection = ScalingSection()
    tracking: TrackingSection = TrackingSection()
