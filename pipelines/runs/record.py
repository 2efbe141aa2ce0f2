"""A run's folder, ``train.storage/name`` on any storage, and what is noted in it: ``run.json`` and checkpoints."""

from __future__ import annotations

import json
from typing import Any

from posmlp import storage
from posmlp.config import Config
from posmlp.errors import UserError

RUN_FILE = "run.json"
JOB_FOLDER = "/runtime_resources/working_dir_files/"  # where Ray unpacks a job's working directory


def run_folder(config: Config) -> str:
    """An absolute path or a URI."""
    return storage.join(config.train.storage, config.name)


def read_record(run: str) -> dict[str, Any] | None:
    """What is noted of a run; None if there is no such run.

    Returns:
        ``config`` (a recipe as plain data), ``lists`` (what tells whether the lists of videos are still the same),
        ``mlflow_run_id``, and ``metrics``: those of the last epoch of a finished run, else None.

    Raises:
        UserError: it cannot be read.
    """
    return read_json(storage.join(run, RUN_FILE))


def write_record(
    run: str, config: Config, lists: dict[str, str], mlflow_run_id: str, metrics: dict[str, float] | None
) -> None:
    """Note a run's recipe, its lists of videos, its MLflow run and, at the end, its metrics; atomically.

    Raises:
        UserError: it cannot be written.
    """
    record = {"config": config.model_dump(mode="json"), "lists": lists, "mlflow_run_id": mlflow_run_id}
    record["metrics"] = metrics
    write_json(storage.join(run, RUN_FILE), record)


def read_json(uri: str) -> dict[str, Any] | None:
    """A note; None if there is none.

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
    """Write a note; atomically.

    Raises:
        UserError: it cannot be written.
    """
    try:
        storage.write_bytes(uri, json.dumps(tree, indent=1).encode())
    except OSError as error:
        raise UserError(f"{uri} cannot be written, see train.storage: {error}") from error


def check_writable(run: str) -> None:
    """Try to write into a run's folder.

    Raises:
        UserError: it cannot be written, or would not last.
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
    """The folder of a run that is given by its folder or, below ``runs``, by its name.

    Raises:
        UserError: there is none.
    """
    for run in (storage.join(".", text), storage.join("runs", text)):
        if storage.are_files([storage.join(run, RUN_FILE)])[0]:
            return run
    raise UserError(
        f"no run {text}: neither {text} nor runs/{text} has a {RUN_FILE}; give the folder train.storage/name"
    )
