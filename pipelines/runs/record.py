"""The folder of a run, ``train.storage/name`` on any storage, and its record ``run.json``."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from posmlp import storage
from posmlp.config import Config
from posmlp.errors import UserError

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
# The last validation of a finished run: one character per row of the list, in its order. 1: the likeliest class of the
# video (of all its views) is right; 0: it is wrong; -: the video could not be decoded.
HITS_FILE = "val_hits.txt"
JOB_FOLDER = "/runtime_resources/working_dir_files/"  # part of the path into which Ray unpacks a job's files


def run_folder(config: Config) -> str:
    """The folder of a recipe's run: an absolute path or a URI."""
    return storage.join(config.train.storage, config.name)


def read_record(run: str) -> dict[str, Any] | None:
    """Read the record of a run.

    Returns:
        None if there is no such run, else a dict with ``config`` (the recipe as plain data), ``lists`` (a fingerprint
        of each split's manifest), ``mlflow_run_id``, and ``metrics`` (of the last epoch; None until the run is
        finished). An imported model has no lists, ``mlflow_run_id`` None, and no metrics (``{}``).

    Raises:
        UserError: it cannot be read.
    """
    return read_json(storage.join(run, RUN_FILE))


def read_hits(run: str) -> bytes | None:
    """The content of a run's ``HITS_FILE``; None if it has none, as runs of earlier versions.

    Raises:
        UserError: it cannot be read.
    """
    uri = storage.join(run, HITS_FILE)
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{uri} cannot be read: {error}") from error


def write_record(
    run: str, config: Config, lists: dict[str, str], mlflow_run_id: str | None, metrics: dict[str, float] | None
) -> None:
    """Write the record of a run, atomically.

    Args:
        run: the run's folder.
        lists: a fingerprint of each split's manifest, by split.
        mlflow_run_id: None of an imported model.
        metrics: metrics of the last epoch of a finished run, else None; of an imported model empty.

    Raises:
        UserError: it cannot be written.
    """
    record = {
        "config": config.model_dump(mode="json"),
        "lists": lists,
        "mlflow_run_id": mlflow_run_id,
        "metrics": metrics,
    }
    write_json(storage.join(run, RUN_FILE), record)


def read_json(uri: str) -> dict[str, Any] | None:
    """Read a JSON file with an object. Returns None if there is no such file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return dict(json.loads(storage.read_bytes(uri)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{uri} cannot be read: {error}") from error


def write_json(uri: str, tree: dict[str, Any]) -> None:
    """Write a JSON file, atomically.

    Raises:
        UserError: it cannot be written.
    """
    try:
        storage.write_bytes(uri, json.dumps(tree, indent=1).encode())
    except OSError as error:
        raise UserError(f"{uri} cannot be written, see train.storage: {error}") from error


def write_files(folder: str, files: Mapping[str, bytes]) -> None:
    """Write files that are nice to have into the folder of a run or a study. A failure is only logged."""
    try:
        for name, content in files.items():
            storage.write_bytes(storage.join(folder, name), content)
    except OSError as error:
        logger.warning("%s cannot be written: %s", folder, error)


def check_writable(run: str) -> None:
    """Check that the run's folder can be written, by writing a small file.

    Raises:
        UserError: it cannot be written, or Ray would delete it.
    """
    if JOB_FOLDER in run:
        raise UserError(
            f"{run} lies in the folder of a Ray job, which Ray deletes after the job; give train.storage as an "
            "absolute path, or as a URI, that all nodes share"
        )
    probe = storage.join(run, ".probe")
    try:
        storage.write_bytes(probe, b"")
        storage.remove(probe)
    except OSError as error:
        raise UserError(f"{run} cannot be written, see train.storage: {error}") from error


def find_run(text: str) -> str:
    """The folder of the run that a user names on the command line.

    Args:
        text: the run's folder, or its name below ``runs``.

    Raises:
        UserError: there is none.
    """
    for run in (storage.join(".", text), storage.join("runs", text)):
        if storage.are_files([storage.join(run, RUN_FILE)])[0]:
            return run
    raise UserError(
        f"no run {text}: neither {text} nor runs/{text} has a {RUN_FILE}; give the folder train.storage/name"
    )
