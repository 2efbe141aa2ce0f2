"""The recipe of a run: one typed, validated tree of all settings.

A recipe is a YAML file (``posmlp/recipes/*.yaml`` or the user's own). ``load_recipe`` reads it, applies
``section.key=value`` overrides and returns a frozen ``Config``. Unknown keys, wrong types and impossible combinations
raise one ``RecipeError`` that lists every problem. A key that was renamed is still read by its old name
(``RENAMED_KEYS``). This module imports neither PyTorch nor NumPy, so that it is quick to import.

Text is read as it is written: for a key that takes text, ``001``, ``1.50``, ``2024-01-01`` and ``yes`` are text, in a
recipe and in an override, although YAML by itself reads a number, a date or a truth value. This includes the keys and
values of mappings such as ``data.train.where``. Where a key can be null, ``null`` and ``~`` are null; in quotes
(``"null"``) they are text.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from posmlp import storage
from posmlp.errors import UserError
from posmlp.model.spec import Variant, model_variant, suggest

RECIPES = Path(__file__).parent / "recipes"
RENAMED_KEYS = {  # old name -> present name; recipes, overrides and stored configs may have either
    "scaling.device_batch": "scaling.micro_batch",
    "data.whole": "data.full_frame",
}

SPLITS = ("train", "val", "test")
# Keys of the model that are null where the recipe leaves them to the model's name
ARCHITECTURE_KEYS = ("frames", "image_size", "dims", "depths", "groups", "windows", "blocks", "init")

logger = logging.getLogger(__name__)

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # of a run or a study, which is the name of its folder too
Label = Annotated[str, Field(pattern=r"^([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")]  # of a Ray node
LabelValue = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")]
Fusion = Literal["probabilities", "logits"]
Task = Literal["recognition", "detection"]
FrameOrder = Literal["ordered", "shuffled"]
MicroFormat = Literal["casme2", "samm", "smic", "megc"]  # micro-expressions
Format = Literal[
    "auto", "csv", "folder", "images", "parquet", "kinetics", "ssv1", "ssv2", "ucf101", "hmdb51", MicroFormat, "ava"
]
Values = str | tuple[str, ...]  # a value, or several
# The condition of each column: a value, [one, of, these], or {not: a value or a list}
Where = dict[str, Values | dict[Literal["not"], Values]]


class RecipeError(UserError):
    """A recipe is not valid. The message lists every problem, one per line."""


@dataclass(frozen=True)
class Scalar:
    """A YAML value that YAML does not read as a string, such as ``001``: its source text and its parsed value."""

    text: str
    value: Any

    def __repr__(self) -> str:
        return repr(self.value)


class Section(BaseModel):
    """Base class of the sections: immutable; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ChoicesSection(Section):
    """What a supernet's stages can have (``posmlp.model.supernet``); without choices, a stage has the model's value."""

    blocks: tuple[tuple[str, ...], ...] = ((),) * 4
    groups: tuple[tuple[Positive, ...], ...] = ((),) * 4
    depths: tuple[tuple[Positive, ...], ...] = ((),) * 4


class ModelSection(Section):
    """The backbone: a variant's name, and what differs from that variant (see ``posmlp.create_model``)."""

    name: str = "tiny"
    num_classes: Positive | None = None  # None: the number of classes of the data set
    frames: Positive | None = None
    image_size: Positive | None = None
    dims: tuple[Positive, ...] | None = None
    depths: tuple[Positive, ...] | None = None
    groups: tuple[Positive, ...] | None = None
    windows: tuple[Positive | tuple[Positive, ...], ...] | None = None
    blocks: str | tuple[str, ...] | None = None
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # before the classifier
    stage4_stride: Literal[16, 32] = 32  # pixels from one token of stage 4 to the next; 16: as large as stage 3
    # Size of fresh weights: as published, or scaled to width, depth and windows; None: the variant's, scaled for tiny
    init: Literal["published", "scaled"] | None = None
    choices: ChoicesSection | None = None  # train a supernet: all of these with shared weights (`posmlp supernet`)
    weights: str | None = None  # initial weights: a run, a checkpoint, a file, or posmlp:motion

    def overrides(self) -> dict[str, Any]:
        """Keyword arguments of ``posmlp.create_model(self.name, ...)``."""
        return self.model_dump(exclude={"name", "weights"}, exclude_none=True)

    def variant(self) -> Variant:
        """The model as checked plain data. Its ``frames`` and ``image_size`` are the size of a clip."""
        return model_variant(self.name, **self.overrides())

    def resolved(self) -> ModelSection:
        """The same model with the values that its name stands for in place of null."""
        variant = self.variant()
        return self.model_copy(update={key: getattr(variant, key) for key in ARCHITECTURE_KEYS})


class SplitSection(Section):
    """One split of a data set: its list of videos, and the rows of it to use. Paths may be URIs (``s3://...``).

    A path alone stands for a section with this path.
    """

    SHORT_FORMS: ClassVar[str] = "the path of a list"  # for messages

    path: str  # the list's file, or a folder, see ``posmlp.video.manifest``
    root: str | None = None  # folder of the videos; None: the list's folder
    where: Where = {}  # keep only the rows that meet the condition of each column
    boxes: str | None = None  # detection: CSV of a person detector's boxes
    excluded: str | None = None  # detection: CSV of key frames to leave out

    @property
    def lists(self) -> tuple[SplitSection, ...]:
        """All lists of the split."""
        return (self,)

    @field_validator("where", mode="before")
    @classmethod
    def check_where(cls, where: Any) -> Any:
        """Refuse a condition of another form with one message in place of one for each form."""
        for column, condition in where.items() if isinstance(where, Mapping) else ():
            values = condition
            if isinstance(condition, Mapping):
                values = condition["not"] if [*condition] == ["not"] else None
            texts = [values] if isinstance(values, str) else values
            if not (isinstance(texts, list | tuple) and texts and all(isinstance(text, str) for text in texts)):
                forms = "a value, a list of values, or {not: a value or a list}"
                raise ValueError(f"column {column}: expected {forms}")
        return where

    @model_validator(mode="before")
    @classmethod
    def read_short_form(cls, value: Any) -> Any:
        """Read the short form too, see ``expand``."""
        if isinstance(value, SplitSection) and not isinstance(value, cls):
            return value.model_dump()
        value = cls.expand(value)
        if not isinstance(value, Mapping | SplitSection):
            raise ValueError(f"expected {cls.SHORT_FORMS}, or a section with the key path")
        return value

    @classmethod
    def expand(cls, value: Any) -> Any:
        """The section that a value stands for, as a mapping: a path alone. Other values are returned as they are."""
        is_path = isinstance(value, str) or (isinstance(value, Scalar) and value.value is not None)
        return {"path": value} if is_path else value


class WeightedSplitSection(SplitSection):
    """A list of training videos, and how often an epoch draws each of them."""

    weight: Annotated[float, Field(gt=0)] = 1.0  # expected draws of each video in an epoch


class TrainSplitSection(WeightedSplitSection):
    """The training split, of one list or several. A list of sections stands for the first with the ``others``."""

    SHORT_FORMS: ClassVar[str] = "the path of a list, several of them"

    others: tuple[WeightedSplitSection, ...] = ()  # further lists, whose labels refer to the classes of the first

    @property
    def lists(self) -> tuple[SplitSection, ...]:
        return (self, *self.others)

    @classmethod
    def expand(cls, value: Any) -> Any:
        """As of ``SplitSection``, and a list of paths or sections."""
        if isinstance(value, list | tuple) and value:
            first, *others = value
            first = super().expand(first)
            return {**first, "others": others} if isinstance(first, dict) else value
        return super().expand(value)


class ValSplitSection(SplitSection):
    """The validation split: a list of its own, or training videos that are held out. A number alone is a share.

    Without a path, ``where`` says which training videos are held out: those with these values in these columns.
    """

    SHORT_FORMS: ClassVar[str] = "the path of a list, a share of the training videos such as 0.2"

    path: str = ""  # with a share: the training list; empty with where: training videos are held out
    share: float | None = None  # of the training videos, between 0 and 1, see ``posmlp.video.holdout``
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # of the choice of these videos

    @field_validator("share")
    @classmethod
    def check_share(cls, share: float | None) -> float | None:
        """Refuse a share that leaves no videos on one side."""
        if share is not None and not 0 < share < 1:
            raise ValueError("expected a share of the training videos, more than 0 and less than 1, such as 0.2")
        return share

    @classmethod
    def expand(cls, value: Any) -> Any:
        """As of ``SplitSection``, and a number."""
        number = value.value if isinstance(value, Scalar) else value
        if isinstance(number, int | float) and not isinstance(number, bool):
            return {"share": value}
        return super().expand(value)


class DataSection(Section):
    """Where the videos are, and how a clip is cut from a video."""

    format: Format = "auto"  # format of the lists; auto: a CSV file, a Parquet file or a class-per-folder tree
    classes: str | None = None  # file of class names, for formats with a separate one
    # File names of a frame folder's images, numbered from 1 (ssv1); elsewhere, which of several series in a folder
    template: str = "{:05d}.jpg"
    train: TrainSplitSection  # a path, a section, or a list of them
    val: ValSplitSection  # a path, a section, or a share of the training videos such as 0.2
    group_by: str | None = None  # column of the training list (or `folder`); a share never parts videos of one group
    test: SplitSection | None = None  # videos that only `posmlp evaluate --split test` sees
    # So that rare classes count as much as frequent ones; weights: in the loss; sampling: draw their videos more often.
    balance: Literal["none", "weights", "sampling"] = "none"
    modality: Literal["rgb", "rgb_difference"] = "rgb"  # rgb_difference: each frame minus the previous one
    # Mean and standard deviation of the pixels (``posmlp.video.augment.NORMALISATIONS``); slowfast: published code
    normalisation: Literal["imagenet", "slowfast"] = "imagenet"
    sampling: Literal["uniform", "dense"] = "uniform"
    stride: Positive = 1  # video frames from one sampled frame to the next; dense only
    # Training clips, uniform only: the share of the video that a clip covers, and how much its speed varies within it
    clip_share: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (1.0, 1.0)
    pace: Annotated[float, Field(ge=0, lt=1)] = 0.0
    fps: Annotated[float, Field(gt=0)] | None = None  # sample as if every video had this frame rate
    frame_order: FrameOrder = "ordered"  # shuffled: a control experiment without motion
    short_side: Positive | None = None  # pixels of decoded frames' short side; None: 8/7 of the image size
    crop_scale: tuple[Fraction, Fraction] = (0.6, 1.0)  # area of the training crop, as a share of the frame
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # width : height of the training crop
    full_frame: bool = False  # evaluate on the full frame, squeezed to a square, instead of on a square crop
    repeats: Positive = 1  # training clips per decoded video (repeated augmentation)
    decoder: Literal["pyav", "decord"] = "pyav"  # decord: PyAV decodes the videos that decord would decode wrongly
    decode_timeout_s: Annotated[float, Field(gt=0)] = 60.0  # seconds; a video that takes longer is bad
    cache_dir: str | None = None  # store all decoded frames here, so that each video is decoded once
    max_bad_fraction: Fraction = 0.05  # fail if a larger share of an epoch's videos cannot be decoded
    rows_per_block: Positive = 16  # videos per Ray Data task

    @property
    def holds_out(self) -> bool:
        """Whether the validation videos are training videos that are held out, so that no model learns from them."""
        return self.val.share is not None or not self.val.path

    def list_of(self, split: str) -> str:
        """The path of a split's list; of several the first."""
        return self.train.path if split == "val" and self.holds_out else str(getattr(self, split).path)

    @field_validator("val")
    @classmethod
    def name_the_list(cls, val: ValSplitSection, info: ValidationInfo) -> ValSplitSection:
        """Give a share the path of the list that it is a share of."""
        train = info.data.get("train")
        return val.model_copy(update={"path": train.path}) if val.share and not val.path and train else val


class DetectionSection(Section):
    """Action detection (``task: detection``): which boxes are used, and how they lie in a clip."""

    min_score: Fraction = 0.8  # of a person detector's box, to be used
    negatives: bool = True  # train on boxes of the detector that have no action, as negatives of all classes
    first_second: float = 0.0  # the lists' second at which the video files start; 900 for AVA's films cut there
    box_share: Fraction = 0.25  # smallest share of a box's area that a crop must leave
    # Short side of training frames, in model.image_size: drawn between the two, uniform in its inverse
    scale: tuple[Annotated[float, Field(ge=1)], Annotated[float, Field(ge=1)]] = (8 / 7, 10 / 7)
    focal_gamma: Annotated[float, Field(gt=0)] | None = None  # focal loss (arXiv:1708.02002); None: cross-entropy
    val_every: Positive = 1  # validation after an epoch uses the key frames whose second is divisible by it
    evaluated: str | None = None  # label map of the classes that the metric counts; None: all
    whole_frame: bool = False  # evaluate on the whole frame, at its aspect, in place of the centre square


class AugmentSection(Section):
    """Augmentation on the device, the same for all frames of a clip. 0 switches an augmentation off."""

    flip: Fraction = 0.0  # probability of a horizontal flip; keep 0 where direction determines the class
    flip_classes: dict[str, str] = {}  # classes that a flip exchanges, as {left: right}
    brightness: Fraction = 0.0  # largest relative change, as for contrast and saturation
    contrast: Fraction = 0.0
    saturation: Fraction = 0.0
    randaug_layers: Annotated[int, Field(ge=0)] = 0  # RandAugment: operations per clip
    randaug_magnitude: Annotated[float, Field(ge=0, le=10)] = 7.0
    erasing: Fraction = 0.0  # probability of filling a random box with noise
    mixup: Annotated[float, Field(ge=0)] = 0.0  # parameter of the Beta distribution; blends pairs of clips
    cutmix: Annotated[float, Field(ge=0)] = 0.0  # likewise; pastes a box of one clip into the other


class OptimSection(Section):
    """AdamW with a learning rate that warms up linearly and then decays along a cosine, or in steps.

    ``lr`` and ``min_lr`` are for a global batch of ``lr_batch`` clips, and scale in proportion to
    ``train.global_batch``. Without ``lr_batch`` they are not scaled.
    """

    lr: Annotated[float, Field(gt=0)] = 1e-3  # peak learning rate
    min_lr: Annotated[float, Field(ge=0)] = 1e-6  # learning rate at the end of the cosine; steps: the lowest
    lr_batch: Positive | None = None  # global batch that the rates are for
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    schedule: Literal["cosine", "steps"] = "cosine"  # after the warm-up
    step_epochs: tuple[Annotated[float, Field(gt=0)], ...] = ()  # steps: the epochs after which the rate drops
    step_factor: Annotated[float, Field(gt=0, lt=1)] = 0.1  # steps: what each drop multiplies the rate by
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_grad: Annotated[float, Field(gt=0)] | None = None  # clip the gradient to this 2-norm
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None  # decay of the weights' EMA, which is evaluated and saved
    # Fine-tuning: parts that do not learn. 2: the stem and the first two stages; all: everything but the classifier.
    freeze: Annotated[int, Field(ge=0, le=4)] | Literal["all"] | None = None
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None  # factor of the rate from a layer to the one before

    @field_validator("freeze", mode="before")
    @classmethod
    def read_freeze(cls, value: Any) -> Any:
        """Refuse another value with one message in place of one for each kind of value."""
        if value is None or str(value) == "all" or str(value) in set("01234"):
            return value
        raise ValueError("expected a number of stages from 0 to 4, or all")


class TrainSection(Section):
    """Length, batch size, numerics and checkpoints of a run."""

    epochs: Positive = 10
    patience: Positive | None = None  # end the run if the monitored metric is not better for this many epochs
    # The metric of patience; None: the task's main metric
    monitor: Literal["val/top1", "val/top5", "val/class_mean", "val/map", "val/loss"] | None = None
    global_batch: Positive = 32  # clips per optimizer step, over all workers
    paths: Positive = 3  # of a supernet: architectures in each training step, see ``posmlp.model.supernet``
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of activations; weights and accumulations stay fp32
    compile: bool = False  # torch.compile
    recompute: bool = False  # activation checkpointing: compute activations again in the backward pass; saves memory
    sync_batch_norm: bool = True  # the stem's batch statistics are over the clips of all workers
    deterministic: bool = False  # fail on operations that may differ between two runs
    # Checkpoints within an epoch; each epoch ends with one anyway. Each of the two keys adds its own.
    checkpoint_every_minutes: Annotated[float, Field(gt=0)] | None = 10.0
    checkpoint_every_steps: Positive | None = None
    keep_last: Positive = 2  # number of newest checkpoints to keep
    keep_best: Annotated[int, Field(ge=0)] = 1  # number of checkpoints with the highest main metric to keep
    storage: str = "runs"  # the run's folder is storage/name; a path or URI that all nodes share


class EvalSection(Section):
    """Validation after each epoch, and the views of a video in any test or prediction."""

    every: Positive = 1  # epochs between validations; the last epoch is always validated
    clips: Positive = 1  # clips per video, at different times
    crops: Literal[1, 3] = 1  # square crops per clip: the centre; 3: and both ends of the longer side
    clip_positions: Literal["even", "slowfast"] = "even"  # where clips lie in a video, see ``posmlp.video.sampling``
    short_side: Positive | None = None  # scale frames to it, and crop squares of the image size; None: largest squares
    fusion: Fusion = "probabilities"  # what is averaged over the views of a video


class ScalingSection(Section):
    """Number of training workers, their resources, and the nodes that they and the decoders run on."""

    workers: Positive = 1
    min_workers: Positive | None = None  # minimum number of workers when nodes are lost; None: all
    use_gpu: Literal["auto"] | bool = "auto"  # a GPU for each worker; auto: if the cluster has enough GPUs
    gpus_per_worker: Annotated[float, Field(gt=0, le=1)] = 1.0  # below 1, several trials or runs share a GPU
    parallel: Literal["ddp", "fsdp"] = "ddp"  # fsdp: weights and optimizer state are sharded
    micro_batch: Positive | None = None  # maximum clips per forward pass; gradients accumulate over a worker's share
    max_failures: Annotated[int, Field(ge=0)] = 3  # number of times to replace lost workers
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    threads_per_worker: Positive | None = None  # PyTorch threads; None: the node's cores, split among its workers
    train_on: dict[Label, LabelValue] = {}  # labels of the nodes for workers, as in {ray.io/node-group: gpu}
    wait_s: Annotated[float, Field(ge=0)] = 0.0  # maximum seconds to wait at the start for nodes to join
    decode_on: dict[Label, LabelValue] = {}  # labels of the nodes that decode first; others help when busy
    # Each training worker decodes its own clips, without Ray Data: for small videos in data.cache_dir, which are read
    # in less time than a task takes.
    decode_in_worker: bool = False

    @property
    def fewest_workers(self) -> int:
        """The number of workers without which a run does not start: ``min_workers``, or all of them."""
        return self.min_workers or self.workers


class TrackingSection(Section):
    """Where and what to log with MLflow."""

    uri: str | None = None  # None: ``MLFLOW_TRACKING_URI`` if it is set, otherwise SQLite in ``train.storage``
    experiment: str = "posmlp"
    log_model: bool = True  # store the trained model in MLflow


class Config(Section):
    """The whole recipe of a run."""

    name: Annotated[str, Field(pattern=NAME)]
    task: Task = "recognition"
    model: ModelSection = ModelSection()
    data: DataSection
    detection: DetectionSection = DetectionSection()
    augment: AugmentSection = AugmentSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    scaling: ScalingSection = ScalingSection()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="before")
    @classmethod
    def read_old_names(cls, tree: Any) -> Any:
        """Read keys by their old names too, see ``RENAMED_KEYS``."""
        return current_keys(tree) if isinstance(tree, Mapping) else tree

    @model_validator(mode="after")
    def check_together(self) -> Config:
        """Refuse combinations of keys that cannot work together."""
        self.model.variant()
        problems = [
            f"{key} {storage.without_password(value)}: leave user and password out; they belong in the environment"
            for key, value in (self.flat() | self.flat_lists()).items()
            if key != "tracking.uri" and isinstance(value, str) and storage.PASSWORD.match(value)
        ]
        if self.data.decoder == "decord" and self.data.cache_dir:
            problems.append(
                "data.decoder decord has no effect with data.cache_dir, which PyAV fills; remove one of them"
            )
        if self.data.cache_dir and storage.is_remote(self.data.cache_dir):
            place = storage.without_password(self.data.cache_dir)
            problems.append(f"data.cache_dir {place}: cached videos are read from a disk; give the path of a folder")
        if self.train.monitor and self.train.patience is None:
            problems.append(f"train.monitor {self.train.monitor} is for train.patience; set that too, or leave it out")
        val, train = self.data.val, self.data.train
        if not val.path and not val.where:
            problems.append(
                "data.val: missing; give a list (data.val.path), a share of the training videos (0.2), or the column "
                "and value of those that are held out (data.val.where.subject=s01)"
            )
        if not val.path and val.root:
            problems.append(
                f"data.val.root {val.root}: data.val.where without data.val.path holds out training videos, which have "
                "the root of their list; leave it out, or give a list (data.val.path)"
            )
        if val.share and (val.path != train.path or val.root or val.where):
            problems.append(
                f"data.val.share {val.share:g} is of the training list {train.path}, so data.val has no list, root or "
                "where of its own; leave them out, or set data.val.share=null"
            )
        if self.data.group_by and not val.share:
            problems.append(
                f"data.group_by {self.data.group_by} has an effect only where data.val is a share; leave it out"
            )
        if self.data.modality == "rgb_difference" and self.model.variant().frames < 2:
            problems.append("data.modality rgb_difference needs model.frames of at least 2")
        if self.data.full_frame and self.eval.crops > 1:
            problems.append(f"data.full_frame shows the whole frame, so eval.crops must be 1, not {self.eval.crops}")
        if self.eval.short_side and self.data.full_frame:
            problems.append(
                f"eval.short_side {self.eval.short_side} is for square crops, but data.full_frame shows the whole frame"
                "; leave one of them out"
            )
        size = self.model.variant().image_size
        if self.eval.short_side and self.eval.short_side < size:
            problems.append(
                f"eval.short_side {self.eval.short_side} is less than the crop's side, model.image_size {size}; use at "
                f"least {size}"
            )
        for key in ("crop_scale", "crop_ratio"):
            low, high = getattr(self.data, key)
            if not 0 < low <= high:
                problems.append(f"data.{key} ({low}, {high}) must be two positive numbers, the smaller one first")
        share, pace = self.data.clip_share, self.data.pace
        if share[0] > share[1]:
            problems.append(f"data.clip_share ({share[0]:g}, {share[1]:g}) must be two numbers, the smaller one first")
        if self.data.sampling == "dense" and (share != (1, 1) or pace):
            problems.append(
                "data.clip_share and data.pace are for data.sampling uniform; with dense, data.stride sets the length"
            )
        clips_per_step = self.data.repeats * self.scaling.workers
        if self.train.global_batch % clips_per_step:
            problems.append(
                f"train.global_batch {self.train.global_batch} must be divisible by scaling.workers "
                f"{self.scaling.workers} x data.repeats {self.data.repeats}"
            )
        elif (self.augment.mixup or self.augment.cutmix) and self.train.global_batch // clips_per_step % 2:
            problems.append(
                f"augment.mixup and augment.cutmix blend pairs: train.global_batch {self.train.global_batch} must "
                f"be divisible by 2 x scaling.workers x data.repeats = {2 * clips_per_step}"
            )
        if (self.scaling.min_workers or 1) > self.scaling.workers:
            problems.append(
                f"scaling.min_workers {self.scaling.min_workers} is more than scaling.workers {self.scaling.workers}"
            )
        if self.scaling.gpus_per_worker < 1 < self.scaling.workers:
            problems.append(
                f"scaling.gpus_per_worker {self.scaling.gpus_per_worker:g} could put several of the "
                f"{self.scaling.workers} workers (scaling.workers) on one GPU, which NCCL refuses; leave it at 1, or "
                "train with one worker"
            )
        if self.scaling.micro_batch and self.scaling.micro_batch % self.clips_together:
            problems.append(
                f"scaling.micro_batch {self.scaling.micro_batch} must be divisible by {self.clips_together}: the clips "
                "of a video (data.repeats), and with mixup or cutmix of two videos, stay together"
            )
        if self.train.precision == "fp16" and self.scaling.parallel == "fsdp":
            problems.append("train.precision fp16 does not work with scaling.parallel fsdp; use bf16 or ddp")
        if self.model.choices and (self.train.compile or self.scaling.parallel == "fsdp"):
            problems.append(
                "model.choices works neither with train.compile nor with scaling.parallel fsdp; leave them out"
            )
        if self.scaling.decode_in_worker and self.scaling.decode_on:
            problems.append("scaling.decode_on is for decode tasks; with scaling.decode_in_worker leave it out")
        if self.optim.freeze is not None and not self.model.weights:
            problems.append(
                f"optim.freeze {self.optim.freeze} keeps weights that are trained already: set model.weights, or leave "
                "optim.freeze out"
            )
        if self.optim.freeze is not None and self.model.choices:
            problems.append(f"optim.freeze {self.optim.freeze} does not work with model.choices; leave one of them out")
        problems += detection_problems(self) if self.task == "detection" else recognition_problems(self)
        if self.optim.min_lr > self.optim.lr:
            problems.append(
                f"optim.min_lr {self.optim.min_lr:g} is more than optim.lr {self.optim.lr:g}, the peak rate"
            )
        if self.optim.warmup_epochs > self.train.epochs:
            problems.append(
                f"optim.warmup_epochs {self.optim.warmup_epochs} is more than train.epochs {self.train.epochs}"
            )
        problems += schedule_problems(self.optim, self.train.epochs)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def clips_together(self) -> int:
        """Training clips that must be in one micro-batch: a video's repeats and, with mixup or cutmix, two videos."""
        return self.data.repeats * (2 if self.augment.mixup or self.augment.cutmix else 1)

    def flat(self) -> dict[str, Any]:
        """All values by their full key, ``section.key``."""
        return flatten(self.model_dump(mode="json"))

    def flat_lists(self) -> dict[str, Any]:
        """The values of the further training lists by their full key, as ``data.train.others.0.path``."""
        return flatten({f"data.train.others.{i}": each.model_dump() for i, each in enumerate(self.data.train.others)})

    def resolved(self) -> Config:
        """The same recipe with the architecture that the model's name stands for (``ModelSection.resolved``)."""
        return self.model_copy(update={"model": self.model.resolved()})

    def non_defaults(self) -> dict[str, Any]:
        """The values that differ from their defaults, by full key; ``name`` and the lists have no default.

        The default of an architecture's value is the one that ``model.name`` stands for.
        """
        lists = DataSection(train=self.data.train, val=self.data.val)
        # Not validated: lists of boxes alone, without their task, are no recipe.
        default = Config.model_construct(name=self.name, data=lists, model=ModelSection(name=self.model.name))
        own, usual = self.resolved().flat(), default.resolved().flat() | {"model.name": ModelSection().name}
        return {key: value for key, value in own.items() if key not in usual or usual[key] != value}

    def to_yaml(self) -> str:
        """The full effective recipe as YAML; ``load_recipe`` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def schedule_problems(optim: OptimSection, epochs: int) -> list[str]:
    """What is wrong with the steps of the learning rate of a run of some epochs."""
    steps = list(optim.step_epochs)
    if optim.schedule == "cosine":
        default = OptimSection()
        given = [key for key in ("step_epochs", "step_factor") if getattr(optim, key) != getattr(default, key)]
        return [f"optim.{key} is for optim.schedule steps; set that too, or leave it out" for key in given]
    if not steps:
        return ["optim.schedule steps needs optim.step_epochs, the epochs after which the rate drops, as in [10, 15]"]
    if steps != sorted(set(steps)) or not optim.warmup_epochs <= steps[0] <= steps[-1] < epochs:
        return [
            f"optim.step_epochs {steps} must increase, from optim.warmup_epochs {optim.warmup_epochs:g} on and before "
            f"train.epochs {epochs}"
        ]
    return []


def recognition_problems(config: Config) -> list[str]:
    """The keys that only detection has."""
    problems = [f"{key} is for task: detection" for key in ("detection",) if config.detection != DetectionSection()]
    if config.data.format == "ava":
        problems.append("data.format ava is for task: detection")
    for name in SPLITS:
        split = getattr(config.data, name)
        problems += [
            f"data.{name}.{key} is for task: detection"
            for key in ("boxes", "excluded")
            if split is not None and getattr(split, key)
        ]
    if config.train.monitor == "val/map":
        problems.append("train.monitor val/map is for task: detection")
    return problems


def detection_problems(config: Config) -> list[str]:
    """The combinations of keys with which action detection does not work."""
    data, augment = config.data, config.augment
    problems = []
    if data.format != "ava":
        problems.append(f"task detection reads lists of boxes: set data.format to ava, not {data.format}")
    if data.classes is None:
        problems.append("task detection needs the label map of the actions: set data.classes")
    if augment.mixup or augment.cutmix:
        problems.append(
            "augment.mixup and augment.cutmix blend clips, whose boxes differ; leave them out for detection"
        )
    if augment.randaug_layers:
        problems.append("augment.randaug_layers moves pixels away from their boxes; leave it out for detection")
    if config.optim.label_smoothing:
        problems.append("optim.label_smoothing is for one class of a clip; leave it out for detection")
    if data.balance != "none":
        problems.append(f"data.balance {data.balance} is for one class of a video; leave it out for detection")
    if data.clip_share != (1, 1) or data.pace:
        problems.append("data.clip_share and data.pace are for recognition; for detection, data.stride sets the length")
    if data.full_frame:
        problems.append("data.full_frame squeezes frames to squares; for detection use detection.whole_frame")
    if data.holds_out or data.group_by:
        problems.append("task detection needs a validation list of its own (data.val.path), not held-out videos")
    if data.train.others or data.train.weight != 1:
        problems.append("task detection takes one training list, without a weight")
    for name in SPLITS:
        split = getattr(data, name)
        if split is not None and split.where:
            problems.append(f"data.{name}.where filters lists of videos; leave it out for detection")
    if (config.eval.clips, config.eval.crops) != (1, 1):
        problems.append("a key frame has one view: set eval.clips and eval.crops to 1 for detection")
    if config.model.choices:
        problems.append("model.choices (a supernet) is for recognition; leave it out for detection")
    low, high = config.detection.scale
    if low > high:
        problems.append(f"detection.scale ({low:g}, {high:g}) must be two numbers, the smaller one first")
    if config.train.monitor not in (None, "val/map", "val/loss"):
        problems.append(f"train.monitor {config.train.monitor} is for recognition; use val/map or val/loss")
    return problems


def list_recipes() -> list[str]:
    """Return the names of the recipes in ``posmlp/recipes``, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(recipe: str | Path) -> Path:
    """Return the file of a recipe that is given by its path or its name.

    Raises:
        RecipeError: it is neither a file nor the name of one in ``posmlp/recipes``.
    """
    for path in (Path(recipe), RECIPES / f"{recipe}.yaml"):
        if path.is_file():
            return path
    raise RecipeError(f"no recipe {recipe}: it is neither a file nor one of {', '.join(list_recipes())}")


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply overrides.

    If an override of ``train.epochs`` makes the run shorter than its warm-up, the warm-up gets the same share of the
    epochs as in the recipe.

    Args:
        recipe: a YAML file, or the name of a file in ``posmlp/recipes``.
        overrides: each is ``section.key=value``, see ``set_key``.

    Raises:
        RecipeError: there is no such recipe, or it is not YAML or not a valid ``Config``; lists every problem.
    """
    path = find_recipe(recipe)
    try:
        tree = read_yaml(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        found = type(as_typed(tree, Any)).__name__
        raise RecipeError(f"{path}: expected sections such as 'model:' and 'data:', found {found}")
    tree = as_typed(current_keys(tree), Config)
    before = deepcopy(tree)
    for override in overrides:
        set_key(tree, override)
    if not any(override.partition("=")[0].strip() == "optim.warmup_epochs" for override in overrides):
        shorten_warmup(tree, before)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = [describe(problem) for problem in error.errors()]
        raise RecipeError(f"{path} cannot be run:\n  " + "\n  ".join(problems)) from error


def shorten_warmup(tree: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Scale a warm-up that is longer than the run, in place, if overrides changed the epochs and not the warm-up.

    Args:
        before: the tree without overrides.
    """
    try:
        was, now = (TrainSection.model_validate(each.get("train", {})).epochs for each in (before, tree))
        warmups = [OptimSection.model_validate(each.get("optim", {})).warmup_epochs for each in (before, tree)]
    except (ValidationError, AttributeError):
        return  # the caller lists the problems
    warmup = warmups[0]
    if warmups[1] == warmup and now <= warmup <= was and now < was:
        shorter = warmup * now / was
        tree["optim"] = {**tree.get("optim", {}), "warmup_epochs": shorter}
        logger.warning("optim.warmup_epochs %g becomes %.3g, because train.epochs=%d is shorter", warmup, shorter, now)


def set_key(tree: dict[str, Any], override: str) -> None:
    """Apply one override, ``section.key=value``, to the tree, in place.

    The value is YAML, so ``null``, ``[1, 2]`` and ``{a: b}`` work. A text key takes everything after the
    equals sign, even if it is not valid YAML, as in ``data.template={:05d}.jpg``. Surrounding quotes are removed.

    Raises:
        RecipeError: the override has no key, its value is not YAML, or a section of the key is a value.
    """
    key, equals, text = override.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise RecipeError(f"override {override!r}: expected section.key=value, as in train.epochs=20")
    key, text = key.strip(), text.strip()
    kind = kind_of(key)
    try:
        value = as_typed(read_yaml(text), kind)
    except yaml.YAMLError as error:
        if not accepts_text(kind) or text.startswith("!"):
            raise RecipeError(f"override {override!r}: the value is not YAML: {error}") from error
        value = text
    if accepts_text(kind) and text and not text.startswith(("'", '"', "!")):
        is_null = value is None and text.lower() in ("null", "~")
        if not (is_null or isinstance(value, list | dict)) or not accepts(kind, value):
            value = text  # YAML would drop a comment, or find an anchor or a mapping in it
    set_value(tree, key, value)


class RecipeLoader(yaml.SafeLoader):
    """Reads YAML. A value that is not a string becomes a ``Scalar``, which keeps its source text.

    A key that is there twice is an error; YAML would keep the last of its values alone.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    problem = f"the key {key.value} is there twice; keep one of them"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep)
        if node.tag == "tag:yaml.org,2002:value":  # an equals sign alone, which has no meaning here
            return node.value
        try:
            value = super().construct_object(node, deep)
        except ValueError:  # it has the form of a date or a number, but not a possible value, such as 2024-13-01
            self.recursive_objects.pop(node, None)  # an alias may refer to it
            return node.value
        return value if isinstance(value, str) else Scalar(node.value, value)


def read_yaml(text: str) -> Any:
    """Parse YAML. Values that are not strings are ``Scalar`` objects, which ``as_typed`` replaces.

    Raises:
        yaml.YAMLError: it is not YAML, or has tags of Python objects.
    """
    return yaml.load(text, RecipeLoader)


def as_typed(value: Any, kind: Any) -> Any:
    """Replace each ``Scalar`` by its text where the recipe expects text, and by its value elsewhere.

    Null stays null where the recipe accepts null, and where the YAML has no text. Unknown keys and values of the wrong
    kind are left unchanged; the validation rejects them.

    Args:
        value: as ``read_yaml`` returns it.
        kind: the expected type: a section, or the annotation of a field.
    """
    is_split = any(isinstance(option, type) and issubclass(option, SplitSection) for option in options_of(kind))
    if isinstance(value, Scalar) and (value.value is None or not is_split):
        is_null = value.value is None and (not value.text or accepts(kind, None))
        return value.text if accepts_text(kind) and not is_null else value.value
    for option in options_of(kind):
        origin, args = get_origin(option), get_args(option)
        if isinstance(option, type) and issubclass(option, SplitSection):
            value = option.expand(value)
        if isinstance(value, list) and origin is tuple:
            return [as_typed(item, args[0]) for item in value]
        if isinstance(value, dict) and origin is dict:
            return {as_typed(key, args[0]): as_typed(item, args[1]) for key, item in value.items()}
        if isinstance(value, dict) and isinstance(option, type) and issubclass(option, Section):
            names = {as_typed(key, str): item for key, item in value.items()}
            return {name: as_typed(item, field_kind(option, name)) for name, item in names.items()}
    return value


def options_of(kind: Any) -> list[Any]:
    """The types that a field's annotation accepts, without the conditions on their values."""
    if get_origin(kind) is Annotated:
        return options_of(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [option for part in get_args(kind) for option in options_of(part)]
    return [kind]


def accepts_text(kind: Any) -> bool:
    """Return whether a field accepts a string, or one of a set of strings."""
    return any(
        option is str or (get_origin(option) is Literal and all(isinstance(word, str) for word in get_args(option)))
        for option in options_of(kind)
    )


def accepts(kind: Any, value: Any) -> bool:
    """Return whether a field accepts a value of this type: null, a list or a mapping."""
    wanted = {NoneType: NoneType, list: tuple, dict: dict}.get(type(value))
    return any(wanted in (option, get_origin(option)) for option in options_of(kind))


def field_kind(kind: Any, name: Any) -> Any:
    """The type of a section's field or of a mapping's values; ``Any`` if there is no such field."""
    for option in options_of(kind):
        if isinstance(option, type) and issubclass(option, Section) and name in option.model_fields:
            return option.model_fields[name].annotation
        if get_origin(option) is dict:
            return get_args(option)[1]
    return Any


def kind_of(key: str) -> Any:
    """The type of ``section.key``, also by its old name; ``Any`` if the recipe does not have it."""
    kind: Any = Config
    for name in RENAMED_KEYS.get(key, key).split("."):
        kind = field_kind(kind, name)
    return kind


def set_value(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set ``section.key`` in the tree, in place. Missing sections are created; an old name sets the renamed key.

    Raises:
        RecipeError: a section of the key is a value.
    """
    for old, new in RENAMED_KEYS.items():
        if key == old:
            warn_renamed(old, new)
            key = new
        if key == new and (holder := holder_of(tree, old)):
            del holder[old.rpartition(".")[2]]  # the override replaces the tree's value, which has the old name
    *sections, last = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise RecipeError(f"{key}: {section!r} is a value, not a section")
    tree[last] = value


def current_keys(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a recipe's tree with renamed keys under their present names (``RENAMED_KEYS``).

    Use it to compare a stored config with a present one. A key that is given by both names keeps both, and is refused
    when the tree is validated.
    """
    current = dict(deepcopy(tree))
    for old, new in RENAMED_KEYS.items():
        if (holder := holder_of(current, old)) and not holder_of(current, new):
            warn_renamed(old, new)
            set_value(current, new, holder[old.rpartition(".")[2]])
    return current


def holder_of(tree: dict[str, Any], key: str) -> dict[str, Any] | None:
    """Return the part of the tree that directly holds ``section.key``; None if the tree does not have the key."""
    *sections, last = key.split(".")
    part: Any = tree
    for section in sections:
        part = part.get(section)
        if not isinstance(part, dict):
            return None
    return part if last in part else None


@cache  # once per process
def warn_renamed(old: str, new: str) -> None:
    """Log that a key has a new name."""
    logger.warning("%s is now called %s; the old name is still read", old, new)


def describe(problem: Any) -> str:
    """Describe one validation problem in a line: the key, what is wrong, and the value or a likely spelling."""
    key = ".".join(str(part) for part in problem["loc"] if isinstance(part, str) and "[" not in part)
    if problem["type"] == "extra_forbidden" and key in RENAMED_KEYS:
        new = RENAMED_KEYS[key]
        return f"{key}: this is the old name of {new}, which is given too; keep {new} alone"
    if problem["type"] == "extra_forbidden":
        section: Any = Config
        for part in problem["loc"][:-1]:
            if isinstance(part, str):  # else the number of an entry of a list
                section = section_in(section.model_fields[part].annotation)
        return f"{key}: unknown key{suggest(str(problem['loc'][-1]), list(section.model_fields))}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "string_pattern_mismatch" and problem["ctx"]["pattern"] == NAME:
        message = "use letters, digits, '.', '_' and '-', with a letter or a digit first"
    if problem["type"] == "missing":
        return f"{key}: missing, and it has no default"
    return f"{key}: {message}, not {problem['input']!r}" if key else message


def section_in(kind: Any) -> Any:
    """The section in a field's annotation, which may be optional or a tuple of them."""
    options = [inner for option in options_of(kind) for inner in (get_args(option) or (option,))]
    return next(option for option in options if isinstance(option, type) and issubclass(option, Section))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one; the keys are joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
