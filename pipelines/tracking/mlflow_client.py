"""Calls to MLflow: create runs and experiments, store models, register them."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow
import ray
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Param
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from pipelines.tracking.uris import scrub, tracking_uri
from posmlp.config import Config
from posmlp.errors import UserError

MAX_PARAMS = 100


MAX_PARAM_LENGTH = 6000


MAX_TAG_LENGTH = 8000


EPOCH_KEY = "train/loss"  # every epoch has it, so it tells which epochs are logged


PARENT = "mlflow.parentRunId"  # the tag by which MLflow nests a run


# MLflow itself tries 8 times with 120 s each; here the journal waits, and a try should end soon.
HTTP_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


def prepare_mlflow() -> None:
    """Keep MLflow quiet, and a call that fails short; what the user has set counts."""
    for noisy in ("alembic", "mlflow.store.db.utils", "urllib3.connectionpool", "torch._export"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # what fails is told in one line
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # it prints passwords, too
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name, value in HTTP_LIMITS.items():
        os.environ.setdefault(name, value)


def create_run(
    client: MlflowClient, config: Config, tags: Mapping[str, str], params: Mapping[str, Any] | None = None
) -> str:
    """A new run with its recipe as params and as an artifact; returns its id.

    A trial's run that is there already, as its driver was killed before it could note the id, is taken again.
    """
    uri, experiment = tracking_uri(config), experiment_id(client, config)
    tags = {k: shorten(v, MAX_TAG_LENGTH) for k, v in tags.items()}
    run_id = find_trial_run(client, experiment, tags)
    run_id = run_id or client.create_run(experiment, run_name=config.name, tags=tags).info.run_id
    texts = {k: shorten(scrub(str(v), uri), MAX_PARAM_LENGTH) for k, v in (config.flat() | dict(params or {})).items()}
    entries = [Param(k, text) for k, text in texts.items()]
    for i in range(0, len(entries), MAX_PARAMS):
        client.log_batch(run_id, params=entries[i : i + MAX_PARAMS])
    client.log_text(run_id, scrub(config.to_yaml(), uri), "config.yaml")
    return run_id


def find_trial_run(client: MlflowClient, experiment: str, tags: Mapping[str, str]) -> str | None:
    """The run of a study's trial, by the tags that name both; None if there is none, or they name none."""
    if PARENT not in tags:
        return None
    wanted = f"tags.`{PARENT}` = '{tags[PARENT]}' AND tags.trial = '{tags['trial']}'"
    found = client.search_runs([experiment], wanted, max_results=1)
    return found[0].info.run_id if found else None


def experiment_id(client: MlflowClient, config: Config) -> str:
    """The experiment's id; made if there is none. With SQLite its artifacts lie beside the database."""
    name = config.tracking.experiment
    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    uri, location = tracking_uri(config), None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()
    kind = {"mlflow.experimentKind": "custom_model_development"}  # else MLflow's pages first show what agents need
    try:
        return client.create_experiment(name, artifact_location=location, tags=kind)
    except MlflowException as error:
        found = client.get_experiment_by_name(name)
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
            raise
        return found.experiment_id  # another driver was faster


def source_tags() -> dict[str, str]:
    """What code made the run: versions, and the git commit where there is one."""
    tags = {"python": platform.python_version(), "torch": torch.__version__, "ray": ray.__version__}
    tags["mlflow"] = mlflow.__version__
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if commit.returncode == 0:
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
        tags["mlflow.source.git.commit"] = commit.stdout.strip()
        tags["git.dirty"] = str(bool(dirty.stdout.strip())).lower()
    return tags


def epochs_stored(client: MlflowClient, run_id: str) -> int:
    """The last epoch whose metrics MLflow has."""
    return max((m.step for m in client.get_metric_history(run_id, EPOCH_KEY)), default=0)


def deliver_model(client: MlflowClient, run_id: str, folder: Path) -> None:
    """Make a saved model a logged model of the run: what ``mlflow.pytorch.log_model`` does, from a folder.

    A try that was cut off goes on with the logged model which it had made.
    """
    run = client.get_run(run_id)
    found = client.search_logged_models([run.info.experiment_id], f"source_run_id='{run_id}' AND name='model'")
    if found:
        logged = found[0]
    else:
        logged = client.create_logged_model(run.info.experiment_id, "model", run_id, params=dict(run.data.params))
    if logged.model_id not in [m.model_id for m in (run.outputs.model_outputs if run.outputs else [])]:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    card = Model.load(str(folder))
    card.run_id, card.model_id, card.model_uuid = run_id, logged.model_id, logged.model_id
    card.artifact_path = logged.artifact_location
    card.save(str(folder / "MLmodel"))
    client.log_model_artifacts(logged.model_id, str(folder))
    client.finalize_logged_model(logged.model_id, "READY")


def register_model(uri: str, run_id: str, name: str, tags: Mapping[str, str]) -> str:
    """Make the model that a run has logged a version of a registered one, with the alias ``best``; returns its number.

    A model that is a version already stays that one.

    Raises:
        MlflowException, UserError: MLflow did not take it, or does not have the model yet.
    """
    client = MlflowClient(uri, uri)
    run = client.get_run(run_id)
    found = client.search_logged_models([run.info.experiment_id], f"source_run_id='{run_id}'")
    if not found:
        raise UserError("MLflow does not have the model yet")
    with suppress(MlflowException):  # it exists, or the next call tells
        client.create_registered_model(name)
    versions = client.search_model_versions(f"name='{name}' AND run_id='{run_id}'")
    newest = max(versions, key=lambda version: int(version.version), default=None)
    if newest is None or dict(newest.tags).get("trial") != tags.get("trial"):
        model = found[0]
        place = model.artifact_location  # models:/ID would be looked up in another MLflow, if the process has one
        newest = client.create_model_version(name, place, run_id, tags=dict(tags), model_id=model.model_id)
    client.set_registered_model_alias(name, "best", newest.version)
    return str(newest.version)


def error_code(error: Exception) -> str:
    """MLflow's code, such as ``BAD_REQUEST``; empty for other errors."""
    return str(error.error_code) if isinstance(error, MlflowException) else ""


def now_ms() -> int:
    """MLflow's time: milliseconds since 1970."""
    return int(time.time() * 1000)


def shorten(text: str, length: int) -> str:
    """At most so many characters, with "..." for what is left out."""
    text = str(text)
    return text if len(text) <= length else text[: length - 3] + "..."
