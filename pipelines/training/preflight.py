"""Checks of the recipe, the lists, the weights and the run's record: may a run start or resume? Ray is not needed.

Whether the run fits on the cluster and can write its storage is checked once Ray runs (``pipelines.training.train``).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError

from pipelines.runs import checkpoints
from pipelines.runs.errors import RunError
from pipelines.tracking.uris import tracking_uri
from posmlp import create_model, storage
from posmlp.config import Config, SplitSection, current_keys, flatten
from posmlp.errors import UserError
from posmlp.metrics import MAIN_METRICS
from posmlp.model.checkpoint import CheckpointError, fit_published
from posmlp.tasks import task_of
from posmlp.video.augment import flip_labels
from posmlp.video.draws import epoch_length
from posmlp.video.manifest import SPAN_COLUMNS, Manifest, ManifestError, Split
from posmlp.weights import NORMALISATION, is_packaged, packaged_file

# Prefixes of keys that a resumed run may change freely: they do not affect what it learns from good videos.
KEYS_FREE_ON_RESUME = (
    "scaling.",
    "tracking.",
    "data.max_bad_fraction",
    "data.decode_timeout_s",
    "data.cache_dir",
    "data.rows_per_block",
    "data.decoder",
    "data.train.root",
    "data.val.root",
    "data.test",
    "train.checkpoint_every_minutes",
    "train.checkpoint_every_steps",
    "train.keep_last",
    "train.keep_best",
    "train.storage",
)

# Prefixes of keys that a resumed run can never change: a checkpoint does not fit another model or other batches.
# All other keys may change with --allow-changes.
KEYS_FIXED_ON_RESUME = (
    "model.name",
    "model.num_classes",
    "model.frames",
    "model.image_size",
    "model.dims",
    "model.depths",
    "model.groups",
    "model.windows",
    "model.blocks",
    "model.stage4_stride",
    "model.choices",
    "optim.freeze",
    "optim.layer_decay",
    "train.global_batch",
    "train.seed",
    "data.repeats",
    "data.balance",
    "data.train.",
    "data.format",
    "list.train",
)


def read_splits(config: Config) -> tuple[Manifest, Manifest]:
    """Read the lists of both splits, training first.

    The training list defines the classes: the labels of both splits refer to them. The validation list may lack some.

    Raises:
        ManifestError: a list is wrong, or the validation list has a class that the training list lacks; the message has
            the problems of both.
    """
    manifests, problems, known, task = [], [], None, task_of(config)
    names: tuple[Split, ...] = ("train", "val")
    for name in names:
        try:
            manifests.append(task.read_split(config, name, known))
            if name == "train":
                known = task.training_classes(config, manifests[0])
        except ManifestError as error:
            problems += error.problems
    if problems:
        raise ManifestError(list(dict.fromkeys(problems)))
    return manifests[0], manifests[1]


def check_data(config: Config, train_set: Manifest, val_set: Manifest) -> Config:
    """Check that the splits fit the recipe: batch size, frame rate, number and names of the classes.

    Args:
        train_set, val_set: as ``read_splits`` returns them.

    Returns:
        The recipe with the number of classes filled in, and with absolute paths of the cache and of ``model.weights``.

    Raises:
        RunError: they do not fit; the message names the key to change.
    """
    clips = epoch_length(train_set.rows, config.data.balance) * config.data.repeats
    if clips < config.train.global_batch:
        raise RunError(
            f"train.global_batch {config.train.global_batch} is more than the {clips} training clips "
            f"of an epoch of {config.data.train.path}; give that or less"
        )
    if task_of(config).needs_frame_times(config):
        for split, manifest in (("train", train_set), ("val", val_set)):
            if manifest.rows["frames"].null_count < len(manifest.rows):
                path = config.data.list_of(split)
                raise RunError(
                    f"data.fps {config.data.fps:g} needs frame times, but {path} lists frame folders, which have "
                    "none; leave data.fps out"
                )
    flip_labels(config.augment.flip_classes, train_set.classes, len(train_set.classes))
    classes = config.model.num_classes or len(train_set.classes)
    if classes < len(train_set.classes):
        raise RunError(f"model.num_classes {classes} is less than the data set's {len(train_set.classes)} classes")
    cache = config.data.cache_dir
    # Tasks run in other folders.
    data = config.data.model_copy(update={"cache_dir": cache and storage.local_path(cache)})
    weights = config.model.weights
    if weights and not is_packaged(weights):
        weights = storage.join(".", weights)
    update = {"num_classes": classes, "weights": weights}
    model = config.model.model_copy(update=update)
    return config.model_copy(update={"model": model, "data": data})


def check_record(
    run: str, record: dict[str, Any], config: Config, lists: dict[str, str], epochs_done: int, allow_changes: bool
) -> dict[str, str]:
    """Refuse to repeat a finished run, or to resume a run with another recipe unless that is allowed.

    Args:
        run: the run's folder.
        record: its ``run.json`` (``pipelines.runs.record.read_record``).
        lists: the present fingerprint of each split's list (``list_fingerprint``).
        epochs_done: the number of finished epochs.
        allow_changes: accept changes of keys that are not in ``KEYS_FIXED_ON_RESUME``.

    Returns:
        The changed keys (``changed_keys``).

    Raises:
        RunError: the run is finished, or its recipe has changed; the message lists the changes.
    """
    if record["metrics"] == {}:
        raise RunError(
            f"{run} holds an imported model, not a run to resume. Choose another name (name=...), and start from the "
            f"model with model.weights={run}"
        )
    if record["metrics"] is not None:
        key = MAIN_METRICS[config.task].key
        raise RunError(
            f"run {config.name!r} is finished ({key} {record['metrics'].get(key, float('nan')):.1%}, "
            f"{run}). Choose another name (name=...), or delete that folder to train it again."
        )
    changed = changed_keys(record, config, lists)
    fixed = [k for k in changed if k.startswith(KEYS_FIXED_ON_RESUME)]
    if changed and (fixed or not allow_changes):
        way = "choose another name, delete that folder, "
        way += "or restore" if fixed else "accept the changes with --allow-changes, or restore"
        raise RunError(
            f"run {config.name!r} ({run}) was started with another recipe; {way}:"
            + "".join(f"\n  {k}: {change}" for k, change in changed.items() if not fixed or k in fixed)
        )
    if "train.epochs" in changed and config.train.epochs <= epochs_done:
        raise RunError(
            f"train.epochs {config.train.epochs}: run {config.name!r} has done {epochs_done} epochs already; raise it"
        )
    return changed


def changed_keys(record: dict[str, Any], config: Config, lists: dict[str, str]) -> dict[str, str]:
    """Compare a recipe and its lists with those of a run, without ``KEYS_FREE_ON_RESUME``.

    Architectures are compared as resolved (``ModelSection.resolved``); earlier versions stored null.

    Returns:
        For each changed key, its old and its new value as text.
    """
    before = stored_keys(record["config"]) | {f"list.{split}": text for split, text in record["lists"].items()}
    now = config.resolved().flat() | {f"list.{split}": text for split, text in lists.items()}
    changed = {k: f"was {before.get(k)!r}, is {now.get(k)!r}" for k in before | now if before.get(k) != now.get(k)}
    return {k: change for k, change in changed.items() if not k.startswith(KEYS_FREE_ON_RESUME)}


def stored_keys(tree: Mapping[str, Any]) -> dict[str, Any]:
    """All values of a stored recipe by their full key; keys that are newer than the recipe have their defaults."""
    try:
        return Config.model_validate(tree).resolved().flat()
    except ValidationError:  # a recipe of a version with other keys: the comparison names them
        return flatten(current_keys(tree))


def with_absolute_paths(recipe: Config) -> Config:
    """A recipe with absolute paths and its MLflow store, because trials run in other working directories."""

    def absolute(path: str | None) -> str | None:
        return path and storage.join(".", path)

    def moved(split: SplitSection) -> SplitSection:
        return split.model_copy(
            update={key: absolute(getattr(split, key)) for key in ("path", "root", "boxes", "excluded")}
        )

    others = tuple(map(moved, recipe.data.train.others))
    splits: dict[str, SplitSection | None] = {
        "train": moved(recipe.data.train).model_copy(update={"others": others}),
        "val": moved(recipe.data.val),
        "test": recipe.data.test and moved(recipe.data.test),
    }
    data = recipe.data.model_copy(update={**splits, "classes": absolute(recipe.data.classes)})
    detection = recipe.detection.model_copy(update={"evaluated": absolute(recipe.detection.evaluated)})
    train = recipe.train.model_copy(update={"storage": absolute(recipe.train.storage)})
    uri = recipe.tracking.uri or (None if os.environ.get("MLFLOW_TRACKING_URI") else tracking_uri(recipe))
    tracking = recipe.tracking.model_copy(update={"uri": uri})
    return recipe.model_copy(update={"data": data, "detection": detection, "train": train, "tracking": tracking})


BOX_COLUMNS = ("time", "boxes", "actions", "scores")  # of key frames


def list_fingerprint(manifest: Manifest) -> str:
    """A text that changes when a list's videos, labels or classes change, but not when the videos move."""
    optional = (*BOX_COLUMNS, *SPAN_COLUMNS)
    columns = ["sample_id", "label", *(name for name in optional if name in manifest.rows.column_names)]
    rows = manifest.rows.select(columns).to_pydict()
    text = json.dumps([rows, manifest.classes])
    return f"{len(manifest.rows)} videos, {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def find_weights(config: Config) -> str | None:
    """Resolve ``model.weights``, which names a file of weights, a run or a checkpoint, to a file, and check that file.

    Returns:
        The file's path or URI; None if the recipe starts from random weights.

    Raises:
        UserError: it names neither a file nor a run with a checkpoint, the weights do not fit the recipe's model, or
            they are of a video model that was trained with another ``data.normalisation``.
    """
    if config.model.weights is None:
        return None
    file, normalisation = find_weight_file(config.model.weights)
    with torch.device("meta"):  # the model itself takes no memory
        model = create_model(config.model.name, **config.model.overrides())
    try:
        _, report = fit_published(model, file)
    except (CheckpointError, FileNotFoundError) as error:
        separator = "\n" if "\n" in str(error) else "; "
        raise UserError(f"model.weights: {error}{separator}model.weights=null starts from random weights") from error
    trained, own = normalisation or report.normalisation, config.data.normalisation
    if trained not in (None, own):
        raise UserError(
            f"data.normalisation is {own}, but the model of model.weights ({storage.without_password(file)}) was "
            f"trained with {trained}: its first layer expects such pixels; set data.normalisation={trained}"
        )
    return file


def find_weight_file(weights: str) -> tuple[str, str | None]:
    """Resolve weights of the package, a file of weights, a run or a checkpoint to a file of weights.

    Returns:
        The file, and the ``data.normalisation`` of the run that trained a video model. None: only the file itself may
        tell, or it is an image model, which published code too trains on videos of another normalisation.

    Raises:
        UserError: it is none of them.
    """
    if is_packaged(weights):
        return packaged_file(weights), NORMALISATION
    try:
        if storage.are_files([weights])[0]:
            return weights, None
    except OSError as error:
        raise UserError(f"model.weights: {weights} cannot be read: {' '.join(str(error).split())}") from error
    try:
        checkpoint = checkpoints.choose(weights)
        info = checkpoints.read_info(checkpoint)
        checkpoints.read_verified(checkpoint, checkpoints.WEIGHTS, info)
    except UserError as error:
        raise UserError(
            f"model.weights is neither a file of weights nor a run: {error}. Train that run first, or start from "
            "random weights with model.weights=null"
        ) from error
    return storage.join(checkpoint, checkpoints.WEIGHTS), run_normalisation(info)


def run_normalisation(info: checkpoints.CheckpointInfo) -> str | None:
    """``data.normalisation`` of a checkpoint's run; None for an image model, and for recipes of other versions."""
    try:
        recipe = info.recipe()
    except UserError:
        return None
    return None if recipe.model.variant().frames == 1 else recipe.data.normalisation
