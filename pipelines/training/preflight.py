"""Whether a run may start or resume: every check that comes before Ray starts."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from pipelines.runs import checkpoints
from pipelines.runs.errors import RunError
from posmlp import storage
from posmlp.config import Config, current_keys, flatten
from posmlp.errors import UserError
from posmlp.video.augment import flip_labels
from posmlp.video.manifest import Manifest, ManifestError, read_split

# Keys that a run which goes on may change: they are not what it learns from a good video.
FREE = ("scaling.", "tracking.", "data.max_bad_fraction", "data.decode_timeout_s")


FREE += ("data.cache_dir", "data.rows_per_block", "data.decoder", "data.train.root", "data.val.root")


FREE += ("train.checkpoint_every_steps", "train.keep_last", "train.keep_best", "train.storage")


# And keys that it can never change: with another model or other batches there is nothing to go on with.
FIXED = ("model.name", "model.num_classes", "model.frames", "model.image_size", "model.dims", "model.depths")


FIXED += (
    "model.groups",
    "model.windows",
    "model.blocks",
    "model.choices",
    "train.global_batch",
    "train.seed",
    "data.repeats",
)


FIXED += ("data.train.", "data.format", "list.train")


def read_splits(config: Config) -> tuple[Manifest, Manifest]:
    """Both splits' lists; what is wrong with either is told at once."""
    found, problems = [], []
    for name in ("train", "val"):
        try:
            found.append(read_split(config.data, name))
        except ManifestError as error:
            problems += error.problems
    if problems:
        raise ManifestError(list(dict.fromkeys(problems)))
    return found[0], found[1]


def check_data(config: Config, train_set: Manifest, val_set: Manifest) -> Config:
    """Fill in the number of classes and where the cache is; refuse splits that do not fit together or the batch."""
    if train_set.classes != val_set.classes:
        raise RunError(
            f"the splits name different classes: {config.data.train.path} has {list(train_set.classes)}, "
            f"{config.data.val.path} has {list(val_set.classes)}"
        )
    clips = len(train_set.rows) * config.data.repeats
    if clips < config.train.global_batch:
        raise RunError(
            f"train.global_batch {config.train.global_batch} is more than the {clips} training clips "
            f"of {config.data.train.path}; lower it"
        )
    if config.data.fps is not None:
        for split, manifest in ((config.data.train, train_set), (config.data.val, val_set)):
            if manifest.rows["frames"].null_count < len(manifest.rows):
                raise RunError(
                    f"data.fps {config.data.fps:g} needs frame times, but {split.path} lists frame folders, which have "
                    "none; leave data.fps out"
                )
    flip_labels(config.augment.flip_classes, train_set.classes, len(train_set.classes))
    classes = config.model.num_classes or len(train_set.classes)
    if classes < len(train_set.classes):
        raise RunError(f"model.num_classes {classes} is less than the data set's {len(train_set.classes)} classes")
    cache = config.data.cache_dir
    data = config.data.model_copy(update={"cache_dir": cache and os.path.abspath(cache)})  # tasks run elsewhere
    weights = config.model.weights
    update = {"num_classes": classes, "weights": weights and storage.join(".", weights)}
    model = config.model.model_copy(update=update)
    return config.model_copy(update={"model": model, "data": data})


def check_record(
    run: str, record: dict[str, Any], config: Config, lists: dict[str, str], done: int, allow_changes: bool
) -> dict[str, str]:
    """Refuse to redo a finished run, and to go on with another recipe unless that is wanted; returns the changes.

    Args:
        lists: what the splits' lists are now (``fingerprint``).
        done: whole epochs done.
    """
    if record["metrics"] is not None:
        raise RunError(
            f"run {config.name!r} is finished (val/top1 {record['metrics'].get('val/top1', float('nan')):.1%}, "
            f"{run}). Choose another name (name=...), or delete that folder to train it again."
        )
    changed = changes(record, config, lists)
    fixed = [k for k in changed if k.startswith(FIXED)]
    if changed and (fixed or not allow_changes):
        way = "choose another name, delete that folder, "
        way += "or restore" if fixed else "go on all the same with --allow-changes, or restore"
        raise RunError(
            f"run {config.name!r} ({run}) was started with another recipe; {way}:"
            + "".join(f"\n  {k}: {change}" for k, change in changed.items() if not fixed or k in fixed)
        )
    if "train.epochs" in changed and config.train.epochs <= done:
        raise RunError(f"train.epochs {config.train.epochs}: run {config.name!r} has done {done} epochs already")
    return changed


def changes(record: dict[str, Any], config: Config, lists: dict[str, str]) -> dict[str, str]:
    """What differs, by key, between a recipe and that of a run, of what matters to what is learned."""
    before = flatten(current_keys(record["config"])) | {f"list.{split}": text for split, text in record["lists"].items()}
    now = config.flat() | {f"list.{split}": text for split, text in lists.items()}
    changed = {k: f"was {before.get(k)!r}, is {now.get(k)!r}" for k in before | now if before.get(k) != now.get(k)}
    return {k: change for k, change in changed.items() if not k.startswith(FREE)}


def fingerprint(manifest: Manifest) -> str:
    """Tells whether a list is still the same: its videos, labels and classes, wherever the videos lie now."""
    rows = manifest.rows.select(["sample_id", "label"]).to_pydict()
    text = json.dumps([rows, manifest.classes])
    return f"{len(manifest.rows)} videos, {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def find_weights(config: Config) -> str | None:
    """The file that ``model.weights`` stands for.

    Raises:
        UserError: there is none.
    """
    weights = config.model.weights
    if weights is None or storage.are_files([weights])[0]:
        return weights
    try:
        checkpoint = checkpoints.choose(weights)
        checkpoints.checked(checkpoint, checkpoints.WEIGHTS, checkpoints.read_info(checkpoint))
    except UserError as error:
        raise UserError(
            f"model.weights is neither a file of weights nor a run: {error}. Train that run first, or start from "
            "random weights with model.weights=null"
        ) from error
    return storage.join(checkpoint, checkpoints.WEIGHTS)
