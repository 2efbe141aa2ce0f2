"""Checkpoints of a run: written atomically, verified by checksums when they are read.

A checkpoint is a folder ``RUN/checkpoints/step-0000001234`` on any storage (``posmlp.storage``):

- ``weights.safetensors``: the evaluation weights (EMA if enabled), by name;
- ``state.pt``: everything else that training needs to resume: tensors and plain data, read with ``weights_only``;
- ``checkpoint.json``: a ``CheckpointInfo``, with size and SHA-256 of the other files. It is written last. A checkpoint
  without it is incomplete and is ignored.
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
from posmlp.metrics import main_metric

FOLDER = "checkpoints"
WEIGHTS, STATE, INFO = "weights.safetensors", "state.pt", "checkpoint.json"


class DamagedError(UserError):
    """A file of a checkpoint is missing, or differs from what was written."""


class IncompleteError(DamagedError):
    """A checkpoint has no ``checkpoint.json``: its writer was interrupted, or it was marked as incomplete."""


class UnwritableError(UserError):
    """A checkpoint cannot be written to the storage."""


@dataclass(frozen=True)
class CheckpointInfo:
    """The content of ``checkpoint.json``.

    Attributes:
        step: number of optimizer steps.
        epoch: number of finished epochs.
        metrics: metrics of the last epoch; empty in the middle of an epoch.
        classes: the class names.
        config: the full recipe of the run, as plain data.
        progress: state of the training loop (``pipelines.training.progress.RunProgress``), as plain data.
        time: when the checkpoint was written, ISO 8601.
        files: for each file by name, ``bytes`` (its size) and ``sha256``.
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
        """Total size of all files."""
        return sum(file["bytes"] for file in self.files.values())

    def recipe(self) -> Config:
        """The run's recipe.

        Raises:
            UserError: this version of the project cannot read it.
        """
        try:
            return Config.model_validate(self.config)
        except ValidationError as error:
            problems = "\n  ".join(describe(problem) for problem in error.errors())
            raise UserError(f"the checkpoint's recipe is of another version of this project:\n  {problems}") from error


@dataclass(frozen=True)
class CheckpointEntry:
    """A checkpoint in a run's folder.

    Attributes:
        uri: the checkpoint's folder.
        info: None if the checkpoint is incomplete or damaged.
        problem: what is wrong with it; empty if nothing is.
    """

    uri: str
    info: CheckpointInfo | None
    problem: str = ""


def save(run: str, info: CheckpointInfo, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> str:
    """Write a checkpoint into a run's folder. Returns its URI.

    Args:
        info: ``files`` and ``time`` are filled in here.
        weights: the evaluation weights, by name.
        state: everything else that training needs to resume.

    Raises:
        UnwritableError: it could not be written. Earlier checkpoints are unchanged.
    """
    uri = checkpoint_uri(run, info.step)
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    contents = {WEIGHTS: save_safetensors(dict(weights)), STATE: buffer.getvalue()}
    files = {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in contents.items()}
    try:
        mark_incomplete(uri)  # an earlier attempt at this step may be there, damaged
        for name, content in contents.items():
            storage.write_bytes(storage.join(uri, name), content)
    except OSError as error:
        with contextlib.suppress(OSError):  # what remains has no checkpoint.json, so it is ignored
            storage.remove(uri)
        raise UnwritableError(f"{uri} cannot be written: {error}") from error
    rewrite_info(run, replace(info, files=files, time=datetime.now(UTC).isoformat(timespec="seconds")))
    return uri


def rewrite_info(run: str, info: CheckpointInfo) -> None:
    """Write or replace, atomically, the ``checkpoint.json`` of a checkpoint whose other files are written.

    Raises:
        UnwritableError: it could not be written. An earlier ``checkpoint.json`` is unchanged.
    """
    written = asdict(info)
    text = json.dumps(written | {"sha256": info_checksum(written)}, indent=1)
    uri = storage.join(checkpoint_uri(run, info.step), INFO)
    try:
        storage.write_bytes(uri, text.encode())
    except OSError as error:
        raise UnwritableError(f"{uri} cannot be written: {error}") from error


def mark_incomplete(uri: str) -> None:
    """Remove the ``checkpoint.json`` of a checkpoint, so that it is ignored. Its other files stay.

    Raises:
        OSError: the file cannot be removed.
    """
    storage.remove(storage.join(uri, INFO))


def checkpoint_uri(run: str, step: int) -> str:
    """The folder of a run's checkpoint at an optimizer step."""
    return storage.join(run, f"{FOLDER}/step-{step:010d}")


def info_checksum(info: Mapping[str, Any]) -> str:
    """The checksum of ``checkpoint.json`` itself: SHA-256 of its other keys, sorted."""
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()


def read_info(uri: str) -> CheckpointInfo:
    """Read the ``checkpoint.json`` of a checkpoint and verify its own checksum.

    Raises:
        IncompleteError: there is none.
        DamagedError: it is damaged.
        OSError: the storage does not answer.
    """
    try:
        tree = json.loads(storage.read_bytes(storage.join(uri, INFO)))
        if tree.pop("sha256") != info_checksum(tree):
            raise ValueError("the content does not match its checksum")
        return CheckpointInfo(**tree)
    except FileNotFoundError as error:
        raise IncompleteError(f"{uri} is incomplete: it has no {INFO}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"{uri} is damaged: {INFO}: {error}") from error


def load(uri: str, names: Sequence[str] = (WEIGHTS, STATE)) -> tuple[CheckpointInfo, dict[str, Any]]:
    """Load a checkpoint to the CPU and verify its checksums.

    Args:
        uri: the checkpoint's folder.
        names: the files to load.

    Returns:
        The info, and the content of each file by name: a dict of tensors for ``WEIGHTS``, of tensors and plain data
        for ``STATE``.

    Raises:
        DamagedError: it is incomplete or damaged.
        OSError: the storage does not answer.
    """
    info, contents = read_info(uri), {}
    for name in names:
        content = read_verified(uri, name, info)
        try:
            if name == WEIGHTS:
                contents[name] = load_safetensors(content)
            else:
                contents[name] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (SafetensorError, pickle.UnpicklingError, RuntimeError) as error:  # right checksums, but not our format
            raise DamagedError(f"{uri} is damaged: {name} cannot be read: {error}") from error
    return info, contents


def read_verified(uri: str, name: str, info: CheckpointInfo) -> bytes:
    """Read a file of a checkpoint and verify its size and checksum.

    Raises:
        DamagedError: the file is missing, or differs from what was written.
        OSError: the storage does not answer.
    """
    try:
        content = storage.read_bytes(storage.join(uri, name))
    except FileNotFoundError as error:
        raise DamagedError(f"{uri} is damaged: {name} is missing") from error
    expected = info.files[name]
    if len(content) != expected["bytes"]:
        raise DamagedError(f"{uri} is damaged: {name} has {len(content)} bytes, expected {expected['bytes']}")
    if hashlib.sha256(content).hexdigest() != expected["sha256"]:
        raise DamagedError(f"{uri} is damaged: {name} does not match its checksum")
    return content


def find(run: str, *, check: bool = False) -> list[CheckpointEntry]:
    """List a run's checkpoints, the oldest first, incomplete and damaged ones too.

    Args:
        run: the run's folder.
        check: read and verify all files; otherwise only ``checkpoint.json``.

    Raises:
        OSError: the storage does not answer.
    """
    entries = []
    for uri in storage.list_folders(storage.join(run, FOLDER)):
        try:
            info = read_info(uri)
            if check:
                for name in info.files:
                    read_verified(uri, name, info)
            entries.append(CheckpointEntry(uri, info))
        except DamagedError as error:
            entries.append(CheckpointEntry(uri, None, str(error)))
    return entries


def newest(run: str) -> tuple[str | None, list[DamagedError]]:
    """Find the newest intact checkpoint of a run. All its files are read and verified.

    Newer checkpoints that are damaged are marked as incomplete.

    Returns:
        Its URI, or None if the run has no checkpoints; and what is wrong with each newer one, the newest first.

    Raises:
        DamagedError: the run has damaged checkpoints and no intact one. (Incomplete ones are not counted.)
        OSError: the storage does not answer.
    """
    problems: list[DamagedError] = []
    damaged: list[str] = []
    for uri in reversed(storage.list_folders(storage.join(run, FOLDER))):
        try:
            info = read_info(uri)
            for name in info.files:
                read_verified(uri, name, info)
        except DamagedError as error:
            problems.append(error)
            damaged += [] if isinstance(error, IncompleteError) else [uri]
            continue
        for bad in damaged:  # otherwise prune() would keep it as the newest or the best and remove intact ones
            mark_incomplete(bad)
        return uri, problems
    if damaged:
        lines = "\n".join(map(str, problems))
        raise DamagedError(f"{lines}\nno checkpoint of {run} is intact; delete the folder to start again")
    return None, problems


def best(entries: Sequence[CheckpointEntry], count: int) -> list[CheckpointEntry]:
    """The ``count`` checkpoints with the highest main metric (``posmlp.metrics``), the best first.

    Between equals the newer one comes first.
    """
    found = [(main_metric(e.info.metrics), e.info, e) for e in entries if e.info]
    rated = [(info.metrics[main.key], info.step, entry) for main, info, entry in found if main]
    rated.sort(key=lambda each: each[:2], reverse=True)
    return [entry for _, _, entry in rated[:count]]


def prune(run: str, keep_last: int, keep_best: int) -> None:
    """Remove all checkpoints except the newest ones and the best ones.

    Incomplete and damaged ones that are older than the newest intact one are removed too.

    Raises:
        OSError: the storage does not answer, or refuses to remove files.
    """
    entries = find(run)
    intact = [entry for entry in entries if entry.info]
    kept = {entry.uri for entry in [*intact[-keep_last:], *best(intact, keep_best)]}
    for entry in entries:
        if entry.uri not in kept and intact and entry.uri < intact[-1].uri:
            mark_incomplete(entry.uri)  # first: a folder that is only partly removed must not look damaged
            storage.remove(entry.uri)


def choose(uri: str) -> str:
    """The checkpoint that a folder stands for: itself, or of a run the best checkpoint, or the newest if none is rated.

    Args:
        uri: the folder of a checkpoint or of a run.

    Raises:
        UserError: there is none.
    """
    if storage.are_files([storage.join(uri, INFO)])[0]:
        return uri
    try:
        entries = [entry for entry in find(uri) if entry.info]
    except OSError as error:
        raise UserError(f"{uri} cannot be read: {error}") from error
    if not entries:
        raise UserError(f"{uri} holds no checkpoint; expected the folder of a run (train.storage/name) or a checkpoint")
    return (best(entries, 1) or entries[-1:])[0].uri
