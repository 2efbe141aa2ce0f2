"""The recipe: one typed, validated tree that says everything about a run.

A recipe is a YAML file (``posmlp/recipes/*.yaml`` or the user's own). ``load_recipe`` reads it, applies
``key.path=value`` overrides and returns a frozen ``Config``. Unknown keys, wrong types and impossible combinations are
refused with one ``RecipeError`` that lists every problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from posmlp import storage
from posmlp.errors import UserError
from posmlp.model.spec import Variant, model_variant, suggest

RECIPES = Path(__file__).parent / "recipes"

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Label = Annotated[str, Field(pattern=r"^([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")]  # of a Ray node
LabelValue = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")]
Format = Literal["auto", "csv", "folder", "images", "parquet", "kinetics", "ssv1", "ssv2", "ucf101", "hmdb51"]


class RecipeError(UserError):
    """A recipe that cannot be run; the message lists every problem, one a line."""


class Section(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ChoicesSection(Section):
    """What each stage can have, for a model that holds many (``posmlp.model.supernet``); none: what the model has."""

    blocks: tuple[tuple[str, ...], ...] = ((),) * 4
    groups: tuple[tuple[Positive, ...], ...] = ((),) * 4
    depths: tuple[tuple[Positive, ...], ...] = ((),) * 4


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
    choices: ChoicesSection | None = None  # train all of these at once, with shared weights (`posmlp supernet`)
    weights: str | None = None  # where to start from: a run's folder, a checkpoint, or a file of weights

    def overrides(self) -> dict[str, Any]:
        """What ``posmlp.create_model(self.name, ...)`` takes."""
        return self.model_dump(exclude={"name", "weights"}, exclude_none=True)

    def variant(self) -> Variant:
        """The checked plain data of the model; its ``frames`` and ``image_size`` are those of the clips."""
        return model_variant(self.name, **self.overrides())


class SplitSection(Section):
    """One split of a data set: its list, and which of the list's rows to take. Paths may be URIs (``s3://...``)."""

    path: str  # the list's file, or a folder, see ``posmlp.video.manifest``
    root: str | None = None  # the folder that holds the videos; None: that of the list
    where: dict[str, str] = {}  # keep the rows whose columns have these values


class DataSection(Section):
    """Where the videos are, and how a clip is cut from one."""

    format: Format = "auto"  # of the lists; auto: a CSV file, a Parquet file or a class-per-folder tree
    classes: str | None = None  # the file of class names, for formats that have one apart
    template: str = "{:05d}.jpg"  # names of a frame folder's images, counted from 1 (ssv1)
    train: SplitSection
    val: SplitSection
    modality: Literal["rgb", "rgb_difference"] = "rgb"  # rgb_difference: each frame minus the one before
    sampling: Literal["uniform", "dense"] = "uniform"
    stride: Positive = 1  # frames between two samples; dense only
    fps: Annotated[float, Field(gt=0)] | None = None  # sample as if every video had this frame rate
    frame_order: Literal["ordered", "shuffled"] = "ordered"  # shuffled: a control that destroys motion
    short_side: Positive | None = None  # frames are decoded at this short side; None: 8/7 of the image size
    crop_scale: tuple[Fraction, Fraction] = (0.6, 1.0)  # area of the training crop, as a share of the frame
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # width : height of the training crop
    whole: bool = False  # test clips show whole frames, squeezed to a square, where the middle alone would not do
    repeats: Positive = 1  # training clips cut from a video each time it is decoded (repeated augmentation)
    decoder: Literal["pyav", "decord"] = "pyav"  # decord: PyAV takes over where decord would be wrong
    decode_timeout_s: Annotated[float, Field(gt=0)] = 60.0  # a video that takes longer is bad
    cache_dir: str | None = None  # keep every decoded frame here, so that each video is decoded once
    max_bad_fraction: Fraction = 0.05  # share of an epoch's videos that may fail to decode
    rows_per_block: Positive = 16  # videos decoded by one Ray Data task


class AugmentSection(Section):
    """Augmentation on the device, the same for all frames of a clip; 0 switches a thing off."""

    flip: Fraction = 0.0  # probability of a horizontal flip; leave at 0 where direction tells the class
    flip_classes: dict[str, str] = {}  # classes that a flip turns into another, as {left: right}; works both ways
    brightness: Fraction = 0.0  # the largest relative change, of this and the next two
    contrast: Fraction = 0.0
    saturation: Fraction = 0.0
    randaug_layers: Annotated[int, Field(ge=0)] = 0  # RandAugment: operations a clip
    randaug_magnitude: Annotated[float, Field(ge=0, le=10)] = 7.0
    erasing: Fraction = 0.0  # probability that a random box is filled with noise
    mixup: Annotated[float, Field(ge=0)] = 0.0  # Beta distribution's parameter; pairs of clips are blended
    cutmix: Annotated[float, Field(ge=0)] = 0.0  # likewise; a box of one clip comes from the other


class OptimSection(Section):
    """AdamW, linear warm-up, then cosine.

    Both rates hold for a global batch of ``lr_batch`` clips and are scaled in proportion to ``train.global_batch``;
    without ``lr_batch`` they are taken as they are.
    """

    lr: Annotated[float, Field(gt=0)] = 1e-3  # the peak
    min_lr: Annotated[float, Field(ge=0)] = 1e-6
    lr_batch: Positive | None = None
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
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of activations; weights and their sums stay in fp32
    compile: bool = False  # torch.compile
    recompute: bool = False  # blocks compute their activations again in the backward pass: less memory, more time
    sync_batch_norm: bool = True  # the stem's statistics are those of all workers' clips
    deterministic: bool = False  # refuse operations that may differ between two runs
    checkpoint_every_steps: Positive | None = None  # within an epoch; there is one after each epoch anyway
    keep_last: Positive = 2  # newest checkpoints kept
    keep_best: Annotated[int, Field(ge=0)] = 1  # and those of the highest val/top1
    storage: str = "runs"  # the run's folder is storage/name; a path or a URI that all nodes share


class EvalSection(Section):
    """Validation after each epoch."""

    every: Positive = 1  # epochs between validations; the last epoch is always validated
    clips: Positive = 1  # clips of a video, at different times; predictions are averaged over all its views
    crops: Literal[1, 3] = 1  # squares of a clip: the centre, or both ends of the longer side too


class ScalingSection(Section):
    """How many training workers, and what each takes of the cluster."""

    workers: Positive = 1
    min_workers: Positive | None = None  # fewest to go on with while nodes come and go; None: all
    use_gpu: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"  # fsdp: each worker holds a part of the weights and optimizer state
    device_batch: Positive | None = None  # most clips on a device at once; a larger share is accumulated
    max_failures: Annotated[int, Field(ge=0)] = 3  # times that dead workers are replaced
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    threads_per_worker: Positive | None = None  # PyTorch threads; None: the node's cores shared by its workers
    train_on: dict[Label, LabelValue] = {}  # labels of the nodes that workers need, as in {ray.io/node-group: gpu}
    wait_s: Annotated[float, Field(ge=0)] = 0.0  # most seconds to wait at the start for nodes that are still to come
    decode_on: dict[Label, LabelValue] = {}  # labels of the nodes that decode first; others help where these are busy


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

    @model_validator(mode="after")
    def check_together(self) -> Config:
        """Refuse what no single key shows to be impossible."""
        self.model.variant()
        problems = [
            f"{key} {storage.without_password(value)}: leave user and password out; the environment has them"
            for key, value in self.flat().items()
            if key != "tracking.uri" and isinstance(value, str) and storage.PASSWORD.match(value)
        ]
        if self.data.decoder == "decord" and self.data.cache_dir:
            problems.append("data.decoder decord has no effect with data.cache_dir, which PyAV fills; drop one of them")
        if self.data.modality == "rgb_difference" and self.model.variant().frames < 2:
            problems.append("data.modality rgb_difference needs model.frames of at least 2")
        if self.data.whole and self.eval.crops > 1:
            problems.append(f"data.whole leaves one view of a clip's frames, not eval.crops {self.eval.crops}; use 1")
        for key in ("crop_scale", "crop_ratio"):
            low, high = getattr(self.data, key)
            if not 0 < low <= high:
                problems.append(f"data.{key} ({low}, {high}) must be two positive numbers, the smaller first")
        clips_per_step = self.data.repeats * self.scaling.workers
        if self.train.global_batch % clips_per_step:
            problems.append(
                f"train.global_batch {self.train.global_batch} must divide by scaling.workers {self.scaling.workers} x "
                f"data.repeats {self.data.repeats}"
            )
        elif (self.augment.mixup or self.augment.cutmix) and self.train.global_batch // clips_per_step % 2:
            problems.append(
                f"augment.mixup and augment.cutmix blend pairs: train.global_batch {self.train.global_batch} must "
                f"divide by 2 x scaling.workers x data.repeats = {2 * clips_per_step}"
            )
        if (self.scaling.min_workers or 1) > self.scaling.workers:
            problems.append(
                f"scaling.min_workers {self.scaling.min_workers} is more than scaling.workers {self.scaling.workers}"
            )
        if self.scaling.device_batch and self.scaling.device_batch % self.clips_together:
            problems.append(
                f"scaling.device_batch {self.scaling.device_batch} must divide by {self.clips_together}: the clips of "
                "a video (data.repeats), and with mixup or cutmix of two videos, stay together"
            )
        if self.train.precision == "fp16" and self.scaling.parallel == "fsdp":
            problems.append("train.precision fp16 does not go with scaling.parallel fsdp; choose bf16 or ddp")
        if self.model.choices and (self.train.compile or self.scaling.parallel == "fsdp"):
            problems.append(
                "model.choices goes neither with train.compile nor with scaling.parallel fsdp; leave them out"
            )
        if self.optim.min_lr > self.optim.lr:
            problems.append(f"optim.min_lr {self.optim.min_lr:g} is more than optim.lr {self.optim.lr:g}, the peak")
        if self.optim.warmup_epochs > self.train.epochs:
            problems.append(
                f"optim.warmup_epochs {self.optim.warmup_epochs} is more than train.epochs {self.train.epochs}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def clips_together(self) -> int:
        """Training clips that must be on one device together: a video's repeats, and the videos of a mixing pair."""
        return self.data.repeats * (2 if self.augment.mixup or self.augment.cutmix else 1)

    def flat(self) -> dict[str, Any]:
        """Every key of the tree as ``section.key``."""
        return flatten(self.model_dump(mode="json"))

    def to_yaml(self) -> str:
        """The full effective recipe; ``load_recipe`` takes it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply overrides.

    Args:
        recipe: a YAML file, or the name of one in ``posmlp/recipes``.
        overrides: ``section.key=value`` each; the value is YAML, so ``null``, ``[1, 2]`` and ``{a: b}`` work.

    Raises:
        RecipeError: no such recipe, not YAML, or not a valid ``Config``; lists every problem.
    """
    path = Path(recipe)
    if not path.is_file():
        path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        raise RecipeError(f"no recipe {recipe}: neither a file nor one of {', '.join(known)}")
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: expected sections such as 'model:' and 'data:', found {type(tree).__name__}")
    for override in overrides:
        set_key(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = [describe(problem) for problem in error.errors()]
        raise RecipeError(f"{path} cannot be run:\n  " + "\n  ".join(problems)) from error


def set_key(tree: dict[str, Any], override: str) -> None:
    """Apply one ``section.key=value`` to the tree, in place."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise RecipeError(f"override {override!r}: expected section.key=value, as in train.epochs=20")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: the value is not YAML: {error}") from error
    set_value(tree, key.strip(), value)


def set_value(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set ``section.key`` of the tree, in place; sections that are missing are made.

    Raises:
        RecipeError: a section of the key is a value.
    """
    *sections, last = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise RecipeError(f"{key}: {section!r} is a value, not a section")
    tree[last] = value


def describe(problem: Any) -> str:
    """One validation problem as a line: the key, what is wrong, and the value or a likely spelling."""
    key = ".".join(str(part) for part in problem["loc"] if isinstance(part, str) and "[" not in part)
    if problem["type"] == "extra_forbidden":
        section: Any = Config
        for part in problem["loc"][:-1]:
            kind = section.model_fields[part].annotation  # a section, or a section or None
            section = next(c for c in (kind, *get_args(kind)) if isinstance(c, type) and issubclass(c, Section))
        return f"{key}: unknown key{suggest(str(problem['loc'][-1]), list(section.model_fields))}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{key}: missing, and it has no default"
    return f"{key}: {message}, not {problem['input']!r}" if key else message


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
