"""A run's checkpoints: written whole or not at all, and checked when they are read.

A checkpoint is a folder ``RUN/checkpoints/step-0000001234`` on any storage (``posmlp.storage``):

- ``weights.safetensors``: the weights that count (the average, if there is one), by name;
- ``state.pt``: what else training needs to go on; tensors and plain data, read with ``weights_only``;
- ``checkpoint.json``: what it is, and the size and SHA-256 of the others. It is written last: a checkpoint without it
  is unfinished and does not count.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from posmlp import storage
from posmlp.config import Config, describe
from posmlp.errors import UserError
from posmlp.metrics import VAL_TOP1

FOLDER = "checkpoints"
WEIGHTS, STATE, ABOUT = "weights.safetensors", "state.pt", "checkpoint.json"


class DamagedError(UserError):
    """A checkpoint whose files are not what was written."""


class UnfinishedError(DamagedError):
    """A checkpoint without ``checkpoint.json``: whoever wrote it did not get to the end."""


class UnwritableError(UserError):
    """Storage that does not take a checkpoint."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is, its ``checkpoint.json``.

    Attributes:
        step: optimizer steps done.
        epoch: whole epochs done.
        metrics: of the epoch just done; empty within an epoch.
        classes: the class names.
        config: the run's whole recipe.
        progress: how far the run is (``pipelines.training.progress.Progress``).
        time: when it was written, ISO 8601.
        files: bytes and SHA-256 of each file.
    """

    step: int
    epoch: int
    metrics: Mapping[str, float]
    classes: Sequence[str]
    config: Mapping[str, Any]
    progress: Mapping[str, Any] = field(default_factory=dict)
    time: str = ""
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(file["bytes"] for file in self.files.values())

    def recipe(self) -> Config:
        """The run's recipe.

        Raises:
            UserError: this version does not take it.
        """
        try:
            return Config.model_validate(self.config)
        except ValidationError as error:
            problems = "\n  ".join(describe(problem) for problem in error.errors())
            raise UserError(f"the checkpoint's recipe is of another version of this project:\n  {problems}") from error


@dataclass(frozen=True)
class CheckpointEntry:
    """A checkpoint's place, and what is wrong with it, if anything."""

    uri: str
    about: CheckpointInfo | None
    problem: str = ""


def save(run: str, about: CheckpointInfo, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> str:
    """Write a checkpoint of a run's folder; returns its URI.

    Raises:
        UnwritableError: it could not be written; those before it are untouched.
    """
    uri = place(run, about.step)
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    contents = {WEIGHTS: save_safetensors(dict(weights)), STATE: buffer.getvalue()}
    files = {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in contents.items()}
    try:
        unmark(uri)  # a damaged one of the same step
        for name, content in contents.items():
            storage.write_bytes(storage.join(uri, name), content)
    except OSError as error:
        with contextlib.suppress(OSError):  # what is left has no checkpoint.json, so it does not count
            storage.remove(uri)
        raise UnwritableError(f"{uri} cannot be written: {error}") from error
    rewrite_info(run, replace(about, files=files, time=datetime.now(UTC).isoformat(timespec="seconds")))
    return uri


def rewrite_info(run: str, about: CheckpointInfo) -> None:
    """Write the ``checkpoint.json`` of a checkpoint whose other files are there; at once, or not at all.

    Raises:
        UnwritableError: it could not be written; what was there before still is.
    """
    written = asdict(about)
    text = json.dumps(written | {"sha256": digest(written)}, indent=1)
    uri = storage.join(place(run, about.step), ABOUT)
    try:
        storage.write_bytes(uri, text.encode())
    except OSError as error:
        raise UnwritableError(f"{uri} cannot be written: {error}") from error


def unmark(uri: str) -> None:
    """A checkpoint does not count any more; its other files stay.

    Raises:
        OSError: it cannot be changed.
    """
    storage.remove(storage.join(uri, ABOUT))


def place(run: str, step: int) -> str:
    """Where a run's checkpoint of a step is."""
    return storage.join(run, f"{FOLDER}/step-{step:010d}")


def digest(about: Mapping[str, Any]) -> str:
    """The checksum of ``checkpoint.json`` itself."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def read_info(uri: str) -> CheckpointInfo:
    """What a checkpoint says of itself.

    Raises:
        DamagedError: it is unfinished or damaged.
        OSError: the storage does not answer.
    """
    try:
        about = json.loads(storage.read_bytes(storage.join(uri, ABOUT)))
        if about.pop("sha256") != digest(about):
            raise ValueError("its checksum is another")
        return CheckpointInfo(**about)
    except FileNotFoundError as error:
        raise UnfinishedError(f"{uri} is unfinished: it has no {ABOUT}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"{uri} is damaged: {ABOUT}: {error}") from error


def load(uri: str, names: Sequence[str] = (WEIGHTS, STATE)) -> tuple[CheckpointInfo, dict[str, Any]]:
    """A checkpoint and the contents of its files, on the CPU, checked.

    Raises:
        DamagedError: it is unfinished or damaged.
        OSError: the storage does not answer.
    """
    about, contents = read_info(uri), {}
    for name in names:
        content = checked(uri, name, about)
        try:
            if name == WEIGHTS:
                contents[name] = load_safetensors(content)
            else:
                contents[name] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (SafetensorError, pickle.UnpicklingError, RuntimeError) as error:  # written like that, by someone else
            raise DamagedError(f"{uri} is damaged: {name} cannot be read: {error}") from error
    return about, contents


def checked(uri: str, name: str, about: CheckpointInfo) -> bytes:
    """One file's bytes.

    Raises:
        DamagedError: they are not those that were written.
    """
    try:
        content = storage.read_bytes(storage.join(uri, name))
    except FileNotFoundError as error:
        raise DamagedError(f"{uri} is damaged: {name} is missing") from error
    expected = about.files[name]
    if len(content) != expected["bytes"]:
        raise DamagedError(f"{uri} is damaged: {name} has {len(content)} bytes, expected {expected['bytes']}")
    if hashlib.sha256(content).hexdigest() != expected["sha256"]:
        raise DamagedError(f"{uri} is damaged: {name} does not match its checksum")
    return content


def find(run: str, *, check: bool = False) -> list[CheckpointEntry]:
    """A run's checkpoints, the oldest first.

    Args:
        run: the run's folder.
        check: read all files through; otherwise only ``checkpoint.json`` is.

    Raises:
        OSError: the storage does not answer.
    """
    found = []
    for uri in storage.list_folders(storage.join(run, FOLDER)):
        try:
            about = read_info(uri)
            if check:
                for name in about.files:
                    checked(uri, name, about)
            found.append(CheckpointEntry(uri, about))
        except DamagedError as error:
            found.append(CheckpointEntry(uri, None, str(error)))
    return found


def newest(run: str) -> tuple[str | None, list[DamagedError]]:
    """The newest checkpoint that is whole, read through; None if there is none. And what is wrong with newer ones,
    which do not count from now on.

    Raises:
        DamagedError: there are checkpoints, and none is whole. (Unfinished ones are none.)
        OSError: the storage does not answer.
    """
    problems: list[DamagedError] = []
    damaged: list[str] = []
    for uri in reversed(storage.list_folders(storage.join(run, FOLDER))):
        try:
            about = read_info(uri)
            for name in about.files:
                checked(uri, name, about)
        except DamagedError as error:
            problems.append(error)
            damaged += [] if isinstance(error, UnfinishedError) else [uri]
            continue
        for bad in damaged:  # else it would be taken for the newest, or the best, when others are removed
            unmark(bad)
        return uri, problems
    if damaged:
        lines = "\n".join(map(str, problems))
        raise DamagedError(f"{lines}\nno checkpoint of {run} is whole; delete the folder to start again")
    return None, problems


def best(found: Sequence[CheckpointEntry], count: int) -> list[CheckpointEntry]:
    """Those with the highest ``val/top1``, the best first; of equals the newer."""
    rated = [f for f in found if f.about and VAL_TOP1 in f.about.metrics]
    rated.sort(key=lambda f: (f.about.metrics[VAL_TOP1], f.about.step) if f.about else (), reverse=True)
    return rated[:count]


def prune(run: str, keep_last: int, keep_best: int) -> None:
    """Remove all checkpoints but the newest and the best, and what is unfinished or damaged and older than the newest.

    Raises:
        OSError: the storage does not answer, or does not let go.
    """
    found = find(run)
    whole = [f for f in found if f.about]
    kept = {f.uri for f in [*whole[-keep_last:], *best(whole, keep_best)]}
    for checkpoint in found:
        if checkpoint.uri not in kept and whole and checkpoint.uri < whole[-1].uri:
            unmark(checkpoint.uri)  # first: a folder that is half removed must not look damaged
            storage.remove(checkpoint.uri)


def choose(uri: str) -> str:
    """The checkpoint that a run's or a checkpoint's folder stands for: the best one, else the newest.

    Raises:
        UserError: there is none.
    """
    if storage.are_files([storage.join(uri, ABOUT)])[0]:
        return uri
    try:
        found = [f for f in find(uri) if f.about]
    except OSError as error:
        raise UserError(f"{uri} cannot be read: {error}") from error
    if not found:
        raise UserError(f"{uri} holds no checkpoint; expected the folder of a run (train.storage/name) or a checkpoint")
    return (best(found, 1) or found[-1:])[0].uri
