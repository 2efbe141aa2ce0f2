"""Models of trained runs: find the checkpoint that a user names, and load its model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from pipelines.runs import checkpoints
from pipelines.runs.record import find_run
from posmlp import create_model, storage
from posmlp.config import Config
from posmlp.detection.clips import decoded_short_side
from posmlp.errors import UserError
from posmlp.model.backbone import PosMLPVideo
from posmlp.video.augment import NORMALISATIONS
from posmlp.video.classes import KnownClasses


def find_checkpoint(text: str) -> str:
    """The folder of the checkpoint that a user names on the command line; of a run the best one, else the newest.

    Args:
        text: the folder of a checkpoint or of a run, or the name of a run below ``runs``.

    Raises:
        UserError: there is none.
    """
    uri = storage.join(".", text.rstrip("/") or text)
    try:
        is_checkpoint = storage.are_files([storage.join(uri, checkpoints.INFO)])[0]
        has_checkpoints = bool(storage.list_folders(storage.join(uri, checkpoints.FOLDER)))
    except OSError as error:
        raise UserError(f"{text} cannot be read: {error}") from error
    if is_checkpoint or has_checkpoints:
        return checkpoints.choose(uri)
    if re.fullmatch(r"step-\d+", uri.rpartition("/")[2]):
        raise UserError(f"no checkpoint {text}: it has no {checkpoints.INFO}, so it is missing or incomplete")
    return checkpoints.choose(find_run(text))


def load_trained_model(uri: str) -> tuple[PosMLPVideo, checkpoints.CheckpointInfo]:
    """Load the model of a checkpoint with its evaluation weights, on the CPU and in eval mode.

    Args:
        uri: the folder of a checkpoint, or of a run for its best checkpoint (else its newest).

    Returns:
        The model, and what the checkpoint holds.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    info, contents = checkpoints.load(checkpoints.choose(uri), [checkpoints.WEIGHTS])
    section = info.recipe().model
    model = create_model(section.name, **section.overrides())
    model.load_state_dict(contents[checkpoints.WEIGHTS])
    return model.eval(), info


def example_input(config: Config) -> torch.Tensor:
    """A clip of zeros with the shape that the recipe's model takes: float32 ``[1, 3, T, H, W]``."""
    variant = config.model.variant()
    return torch.zeros(1, 3, variant.frames, variant.image_size, variant.image_size)


def known_classes(info: checkpoints.CheckpointInfo) -> KnownClasses:
    """The classes of a checkpoint, which the labels of a list refer to when its model is tested."""
    advice = (
        "correct the names, leave these videos out, or, if labels are numbers, name them in a file (`data.classes`)"
    )
    return KnownClasses(tuple(info.classes), "the checkpoint", advice)


def output_names(classes: Sequence[str], count: int) -> list[str]:
    """A name for each of a model's ``count`` outputs: the class names, then the labels of outputs without a class."""
    return [*classes, *map(str, range(len(classes), count))]


def describe_model(info: checkpoints.CheckpointInfo) -> dict[str, Any]:
    """Return what a user of an exported model must know, as plain data: classes, inputs, output, sampling."""
    config = info.recipe()
    variant, data = config.model.variant(), config.data
    mean, std = NORMALISATIONS[data.normalisation]
    output: dict[str, Any] = {"name": "logits", "shape": [None, variant.num_classes], "type": "float32, before softmax"}
    boxes: dict[str, Any] = {}
    if config.task == "detection":
        output["type"] = "float32, a row for each box, before a sigmoid for each class"
        corners = "float32, x1 y1 x2 y2 as fractions of the clip's picture"
        of_box = "int64, the number of each box's clip in the batch, from 0"
        boxes["boxes"] = {"name": "boxes", "axes": "N 4", "shape": [None, 4], "type": corners}
        boxes["box_clip"] = {"name": "box_clip", "axes": "N", "shape": [None], "type": of_box}
    else:
        output["fusion"] = config.eval.fusion
    return {
        "run": config.name,
        "step": info.step,
        "metrics": dict(info.metrics),
        "classes": output_names(info.classes, variant.num_classes),
        "input": {
            "name": "clips",
            "axes": "B T H W C",
            "shape": [None, variant.frames, variant.image_size, variant.image_size, 3],
            "type": "uint8, RGB",
        },
        **boxes,
        "output": output,
        "done_inside": {"mean": mean, "std": std, "modality": data.modality},
        "sampling": describe_sampling(config),
    }


def describe_sampling(config: Config) -> dict[str, Any]:
    """Return how the frames of a clip and their square are chosen, as plain data.

    For detection ``first_frame`` is the place of a clip's first frame, in frames from the key frame.
    """
    variant, data = config.model.variant(), config.data
    square = f"centre, at a short side of {config.eval.short_side}" if config.eval.short_side else "centre"
    common = {"fps": data.fps, "frame_order": data.frame_order}
    if config.task == "detection":
        return {
            "frames": "around the key frame",
            "first_frame": -(variant.frames * data.stride // 2),
            "stride": data.stride,
            "short_side": decoded_short_side(config),
            "square": square,
            **common,
        }
    return {
        "frames": data.sampling,
        "stride": data.stride if data.sampling == "dense" else None,
        "short_side": data.short_side or -(-variant.image_size * 8 // 7),
        "clip_positions": config.eval.clip_positions,
        "square": "whole frame, squeezed" if data.full_frame else square,
        **common,
    }
