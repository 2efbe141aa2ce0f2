"""Models of trained runs: find the checkpoint that a user names, and load its model."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from pipelines.runs import checkpoints
from pipelines.runs.record import find_run
from posmlp import create_model, storage
from posmlp.config import Config
from posmlp.errors import UserError


def trained_model(uri: str) -> tuple[torch.nn.Module, checkpoints.CheckpointInfo]:
    """The model of a checkpoint, or of a run's best one, on the CPU, in eval mode, and what the checkpoint says.

    Raises:
        UserError: there is none, or it is damaged.
    """
    about, contents = checkpoints.load(checkpoints.choose(uri), [checkpoints.WEIGHTS])
    section = about.recipe().model
    model = create_model(section.name, **section.overrides())
    model.load_state_dict(contents[checkpoints.WEIGHTS])
    return model.eval(), about


def last_model(run: str) -> torch.nn.Module:
    """The model of a run's newest checkpoint."""
    whole = [found for found in checkpoints.find(run) if found.about]
    model, _ = trained_model(whole[-1].uri)
    return model


def example_input(config: Config) -> torch.Tensor:
    """Zeros of the shape the model takes: ``[1, 3, T, H, W]``."""
    variant = config.model.variant()
    return torch.zeros(1, 3, variant.frames, variant.image_size, variant.image_size)


def find_checkpoint(text: str) -> str:
    """The checkpoint's folder that a user means: a checkpoint, or the best one (else the newest) of a run.

    Args:
        text: a checkpoint's folder, a run's, or a run's name below ``runs``.

    Raises:
        UserError: there is none.
    """
    given = storage.join(".", text.rstrip("/") or text)
    try:
        is_checkpoint = storage.are_files([storage.join(given, checkpoints.ABOUT)])[0]
        has_checkpoints = bool(storage.list_folders(storage.join(given, checkpoints.FOLDER)))
    except OSError as error:
        raise UserError(f"{text} cannot be read: {error}") from error
    if is_checkpoint or has_checkpoints:
        return checkpoints.choose(given)
    if re.fullmatch(r"step-\d+", given.rpartition("/")[2]):
        raise UserError(f"no checkpoint {text}: it has no {checkpoints.ABOUT}, so it is missing or unfinished")
    return checkpoints.choose(find_run(text))


def class_names(classes: Sequence[str], count: int) -> list[str]:
    """A name for each of the model's outputs; those beyond the data set's classes are called by their labels."""
    return [*classes, *map(str, range(len(classes), count))]
