"""Calls to MLflow's client: create experiments and runs, upload models, register them."""

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
from posmlp.metrics import TRAIN_LOSS

MAX_PARAMS = 100  # per call of MLflow's log_batch
MAX_PARAM_LENGTH = 6000  # characters of a value
MAX_TAG_LENGTH = 8000  # characters of a value
PARENT = "mlflow.parentRunId"  # the tag with the run below which MLflow's pages show this run

# MLflow's defaults are 7 retries of 120 s each. The journal retries anyway, so a call should fail soon.
HTTP_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


def prepare_mlflow() -> None:
    """Silence MLflow's own output and shorten its timeouts, unless the user has set them in the environment."""
    for noisy in ("alembic", "mlflow.store.db.utils", "urllib3.connectionpool", "torch._export"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # callers report a failure in one line
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the URL may hold a password
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name, value in HTTP_LIMITS.items():
        os.environ.setdefault(name, value)


def create_run(
    client: MlflowClient, config: Config, tags: Mapping[str, str], params: Mapping[str, Any] | None = None
) -> str:
    """Create a run with the recipe as params and as the artifact ``config.yaml``. Returns its id.

    If MLflow already has a run for the trial that ``tags`` names, that run is used: its driver was killed before it
    could store the id.

    Args:
        params: further params of the run.
    """
    uri, experiment = tracking_uri(config), get_or_create_experiment(client, config)
    tags = {k: shorten(v, MAX_TAG_LENGTH) for k, v in tags.items()}
    run_id = find_trial_run(client, experiment, tags)
    run_id = run_id or client.create_run(experiment, run_name=config.name, tags=tags).info.run_id
    texts = {k: shorten(scrub(str(v), uri), MAX_PARAM_LENGTH) for k, v in (config.flat() | dict(params or {})).items()}
    all_params = [Param(k, text) for k, text in texts.items()]
    for i in range(0, len(all_params), MAX_PARAMS):
        client.log_batch(run_id, params=all_params[i : i + MAX_PARAMS])
    client.log_text(run_id, scrub(config.to_yaml(), uri), "config.yaml")
    return run_id


def find_trial_run(client: MlflowClient, experiment: str, tags: Mapping[str, str]) -> str | None:
    """The id of the run of the trial that ``tags`` name; None if there is no run, or the tags name no trial."""
    if PARENT not in tags:
        return None
    wanted = f"tags.`{PARENT}` = '{tags[PARENT]}' AND tags.trial = '{tags['trial']}'"
    found = client.search_runs([experiment], wanted, max_results=1)
    return found[0].info.run_id if found else None


def get_or_create_experiment(client: MlflowClient, config: Config) -> str:
    """The id of the recipe's experiment. With SQLite its artifacts lie next to the database."""
    name = config.tracking.experiment
    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    uri, location = tracking_uri(config), None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()
    # Without this tag MLflow's pages open with views for language-model agents.
    kind = {"mlflow.experimentKind": "custom_model_development"}
    try:
        return client.create_experiment(name, artifact_location=location, tags=kind)
    except MlflowException as error:
        found = client.get_experiment_by_name(name)
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
            raise
        return found.experiment_id  # another driver created it in the meantime


def source_tags() -> dict[str, str]:
    """Tags with the versions of Python, torch, Ray and MLflow, and the git commit if the code is in a repository."""
    tags = {"python": platform.python_version(), "torch": torch.__version__, "ray": ray.__version__}
    tags["mlflow"] = mlflow.__version__
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if commit.returncode == 0:
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
        tags["mlflow.source.git.commit"] = commit.stdout.strip()
        tags["git.dirty"] = str(bool(dirty.stdout.strip())).lower()
    return tags


def last_epoch_stored(client: MlflowClient, run_id: str) -> int:
    """The last epoch whose metrics MLflow has; 0 for none."""
    return max((m.step for m in client.get_metric_history(run_id, TRAIN_LOSS)), default=0)  # every epoch has it


def upload_model(client: MlflowClient, run_id: str, folder: Path) -> None:
    """Upload a saved model as the run's logged model, as ``mlflow.pytorch.log_model`` does with a model in memory.

    A repeated call after an interrupted upload uses the logged model that the first call created.

    Args:
        folder: what ``mlflow.pytorch.save_model`` wrote. Its ``MLmodel`` file gets the ids of the run and the model.
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
    """Register a run's logged model as a version of the model ``name``, with the alias ``best``.

    If the newest version of this run has the same ``trial`` tag, that version is used.

    Returns:
        the version's number.

    Raises:
        UserError: MLflow does not have the model yet.
        MlflowException: MLflow refuses the call.
    """
    client = MlflowClient(uri, uri)
    run = client.get_run(run_id)
    found = client.search_logged_models([run.info.experiment_id], f"source_run_id='{run_id}'")
    if not found:
        raise UserError("MLflow does not have the model yet")
    with suppress(MlflowException):  # it exists already; any other problem fails the next call
        client.create_registered_model(name)
    versions = client.search_model_versions(f"name='{name}' AND run_id='{run_id}'")
    newest = max(versions, key=lambda version: int(version.version), default=None)
    if newest is None or dict(newest.tags).get("trial") != tags.get("trial"):
        model = found[0]
        source = model.artifact_location  # models:/ID would be looked up in the process's default MLflow
        newest = client.create_model_version(name, source, run_id, tags=dict(tags), model_id=model.model_id)
    client.set_registered_model_alias(name, "best", newest.version)
    return str(newest.version)


def error_code(error: Exception) -> str:
    """The code of an MLflow error, such as ``BAD_REQUEST``; empty for other errors."""
    return str(error.error_code) if isinstance(error, MlflowException) else ""


def now_ms() -> int:
    """The current time as MLflow writes it: milliseconds since 1970."""
    return int(time.time() * 1000)


def shorten(text: str, length: int) -> str:
    """Cut a text to at most ``length`` characters, the last three of which are "..." if it was longer."""
    text = str(text)
    return text if len(text) <= length else text[: length - 3] + "..."
