"""Calls to MLflow's client: create experiments and runs, upload models, register them."""

from __future__ import annotations

import getpass
import logging
import math
import os
import platform
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import torch
from mlflow import MlflowClient
from mlflow.entities import Experiment, LifecycleStage, Metric, Param, Run, RunTag
from mlflow.environment_variables import MLFLOW_TRACKING_TOKEN
from mlflow.exceptions import MlflowException, RestException
from mlflow.models import Model
from mlflow.utils.credentials import read_mlflow_creds
from mlflow.utils.file_utils import local_file_uri_to_path

from pipelines.registry.logged_models import UPLOADED, CheckpointLink, add_outputs, log_checkpoint_metrics
from pipelines.tracking.uris import (
    NOTE,
    PARENT,
    RUN_NAME,
    VIEW_TAG,
    scrub,
    sqlite_path,
    tracking_uri,
    view_text,
    without_secrets,
)
from posmlp.config import Config
from posmlp.errors import UserError
from posmlp.metrics import BY_STEP_TRAIN_LOSS, TRAIN_LOSS
from posmlp.text import shorten

MAX_PARAMS = 100  # per call of MLflow's log_batch
MAX_PARAM_LENGTH = 6000  # characters of a value
MAX_TAG_LENGTH = 8000  # characters of a value
INFINITE = "infinite."  # prefix of the tags that name infinite metrics

EXPERIMENT_NOTE = "Model training (top left, next to GenAI) shows the runs of PosMLP-Video."

LOGIN = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
OTHER_STORE = "choose another store with tracking.uri or MLFLOW_TRACKING_URI"
OTHER_EXPERIMENT = "choose another experiment with tracking.experiment=NAME"

ARTIFACTS = "mlartifacts"  # folder next to a SQLite database
OURS = f"artifact_location LIKE 'file://%/{ARTIFACTS}'"  # experiments whose artifacts are in such a folder
# Columns with paths of artifacts, in MLflow's databases
LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)

MIGRATIONS = Path(mlflow.__file__).parent / "store" / "db_migrations"  # of the tables of MLflow's databases

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


def prepare_sqlite(uri: str) -> None:
    """Make the folder of a SQLite store, and check that MLflow can use it as it is. Nothing for other stores.

    MLflow itself tries a file that cannot be opened for minutes. SQLite writes a journal into the folder.

    Raises:
        UserError: the file or the folder cannot be written, or its tables are of another MLflow.
    """
    path = sqlite_path(uri)
    if path is None:
        return
    what = path.parent
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.exists():
            what = path
            open(path, "r+b").close()
    except OSError as error:
        raise UserError(
            f"MLflow at {without_secrets(uri)} cannot be written: {what}: {error.strerror or error}; make it writable "
            f"for this user, or {OTHER_STORE}"
        ) from error
    check_schema(uri)


def check_schema(uri: str) -> None:
    """Check that the tables of a SQLite store are those of this MLflow. Nothing for other and for new stores.

    MLflow would upgrade older tables without a word and without a backup, and older versions cannot read them then.

    Raises:
        UserError: they are of another MLflow.
    """
    path = sqlite_path(uri)
    if path is None or not path.is_file():
        return
    from alembic.script import ScriptDirectory  # slow to import, and only databases need it

    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
            (version,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
            ours = connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'experiments'").fetchone()[0]
    except (sqlite3.Error, TypeError):  # no such table, or no row in it: MLflow makes the tables, or says what is wrong
        return
    if version not in ScriptDirectory(str(MIGRATIONS)).get_heads():
        problem = explain_schema(str(version), without_secrets(uri))
        if not ours:
            problem = StoreProblem("its tables are of another program", OTHER_STORE)
        raise UserError(f"MLflow at {without_secrets(uri)} cannot be used: {problem}")


def refuse_foreign_server(config: Config) -> None:
    """Check that a checkpoint's recipe does not send this user's MLflow password to a foreign server.

    The recipe may come from someone else, so it must not choose who gets the password.

    Raises:
        UserError: there is a password for MLflow, and the recipe names another server than ``MLFLOW_TRACKING_URI``.
    """
    uri, own = config.tracking.uri or "", os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri.lower().startswith("http") or without_secrets(own).rstrip("/") == without_secrets(uri).rstrip("/"):
        return
    known = read_mlflow_creds()
    if known.username or known.password or MLFLOW_TRACKING_TOKEN.get():
        raise UserError(
            f"the checkpoint's recipe logs to {without_secrets(uri)}, which would get your password for MLflow; if "
            f"that is your server, add tracking.uri={without_secrets(uri)}, else add tracking.uri=null"
        )


def create_run(
    client: MlflowClient, config: Config, tags: Mapping[str, str], params: Mapping[str, Any] | None = None
) -> str:
    """Create a run with the recipe as params and as the artifact ``config.yaml``. Returns its id.

    If MLflow already has a run for the trial that ``tags`` names, that run is used: its driver was killed before it
    could store the id.

    Args:
        params: further params of the run.
    """
    uri = tracking_uri(config)
    experiment = experiment_of_study(client, tags.get(PARENT), uri) or get_or_create_experiment(client, config)
    tags = {k: shorten(scrub(v, uri), MAX_TAG_LENGTH) for k, v in tags.items()}
    run_id, logged = find_trial_run(client, experiment, tags), dict[str, str]()
    if run_id:
        logged = client.get_run(run_id).data.params
    else:
        run_id = client.create_run(experiment, run_name=tags.get(RUN_NAME, config.name), tags=tags).info.run_id
    texts = {k: shorten(scrub(str(v), uri), MAX_PARAM_LENGTH) for k, v in (config.flat() | dict(params or {})).items()}
    all_params = [Param(k, text) for k, text in texts.items() if k not in logged]  # MLflow refuses to change one
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


def find_experiment(client: MlflowClient, config: Config) -> str | None:
    """The id of the recipe's experiment; None if there is none.

    Raises:
        UserError: it is deleted.
    """
    name, uri = config.tracking.experiment, tracking_uri(config)
    found = client.get_experiment_by_name(name)
    if found and found.lifecycle_stage == LifecycleStage.DELETED:
        raise UserError(
            f"MLflow at {without_secrets(uri)}: the experiment {name!r} (tracking.experiment) is deleted; restore it "
            f"with `{restore_command(uri, found.experiment_id)}`, or {OTHER_EXPERIMENT}"
        )
    return found.experiment_id if found else None


def experiment_of_study(client: MlflowClient, study: str | None, uri: str) -> str | None:
    """The id of the experiment of a study's run, which may have been renamed since; None if there is no such run.

    Raises:
        UserError: the experiment or the run is deleted.
    """
    if study is None:
        return None
    try:
        run = client.get_run(study)
    except MlflowException as error:
        if error_code(error) == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    if deleted := explain_deleted(run, client.get_experiment(run.info.experiment_id), uri):
        raise UserError(f"MLflow at {without_secrets(uri)}: {deleted}")
    return run.info.experiment_id


def get_or_create_experiment(client: MlflowClient, config: Config) -> str:
    """The id of the recipe's experiment. With SQLite its artifacts lie next to the database.

    Raises:
        UserError: the experiment is deleted.
    """
    name, uri, location = config.tracking.experiment, tracking_uri(config), None
    if found := find_experiment(client, config):
        return found
    if path := sqlite_path(uri):
        location = (path.parent / ARTIFACTS).as_uri()
    # The kind has an effect before MLflow 3.17 only; the note is on MLflow's first page.
    tags = {"mlflow.experimentKind": "custom_model_development", NOTE: EXPERIMENT_NOTE}
    try:
        return client.create_experiment(name, artifact_location=location, tags=tags)
    except MlflowException as error:
        found = find_experiment(client, config)
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
            raise
        return found  # another driver created it in the meantime


def explain_moved(experiment: Experiment, uri: str) -> str:
    """Explain that a SQLite store was copied or moved, so that an experiment's artifacts are elsewhere; else empty.

    MLflow stores the absolute path of the artifacts. Only the folder that this project makes, next to the database,
    is checked: a user may have chosen another one.
    """
    path, location = sqlite_path(uri), experiment.artifact_location or ""
    if path is None or not location.startswith("file://"):
        return ""
    folder = Path(local_file_uri_to_path(location))
    here = path.parent / ARTIFACTS
    if folder.name != ARTIFACTS or folder.resolve() == here.resolve():
        return ""
    name = experiment.name
    return (
        f"{path} was copied or moved: MLflow stores the files of experiment {name!r} in {folder}, not next to it.\n"
        f"  If {here.name} was copied too: `posmlp relocate {path}`. Otherwise choose tracking.experiment=NAME."
    )


def relocate(database: Path) -> list[str]:
    """Make a copied or moved SQLite store name the artifacts next to it, in place of those in its former folder.

    Returns:
        The former folders of artifacts; empty if the store names no other than the one next to it.

    Raises:
        UserError: there is no such store, or it cannot be written.
    """
    uri, here = f"sqlite:///{database.resolve()}", (database.resolve().parent / ARTIFACTS).as_uri()
    if not database.is_file():
        raise UserError(f"no MLflow database {database}")
    prepare_sqlite(uri)
    try:
        with closing(sqlite3.connect(database)) as connection, connection:
            rows = connection.execute(f"SELECT DISTINCT artifact_location FROM experiments WHERE {OURS}").fetchall()
            former = [location for (location,) in rows if location != here]
            for location in former:
                for table, column in LOCATIONS:
                    change = f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                    where = f"WHERE {column} = ? OR substr({column}, 1, ?) = ?"
                    values = (here, len(location) + 1, location, len(location) + 1, f"{location}/")
                    connection.execute(f"{change} {where}", values)
    except sqlite3.Error as error:
        raise UserError(f"{database} cannot be changed: {error}") from error
    return former


def share_view(client: MlflowClient, experiment: Experiment, name: str, view: Mapping[str, Any]) -> None:
    """Store a view of MLflow's pages (``pipelines.tracking.uris``) in an experiment, unless it is there already.

    A failure is not reported: the link that names the view then shows MLflow's own columns and charts.
    """
    key, text = f"{VIEW_TAG}{name}", view_text(view)
    if experiment.tags.get(key) != text:
        with suppress(Exception):  # the user may not change the experiment, or the text is too long for this store
            client.set_experiment_tag(experiment.experiment_id, key, text)


def source_tags() -> dict[str, str]:
    """Tags with the command, the user, the versions of Python, torch, Ray and MLflow, and the git commit if known."""
    tags = {"python": platform.python_version(), "torch": torch.__version__, "ray": version("ray")}
    tags |= {"mlflow": mlflow.__version__, "mlflow.source.name": command_name(), "mlflow.source.type": "LOCAL"}
    with suppress(Exception):  # a container may have no name for the user
        tags["mlflow.user"] = os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if commit.returncode == 0:
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
        tags["mlflow.source.git.commit"] = commit.stdout.strip()
        tags["git.dirty"] = str(bool(dirty.stdout.strip())).lower()
    return tags


def command_name() -> str:
    """The command of this process in short, such as ``posmlp train``; the name of the program if it is another."""
    program, *arguments = [*sys.argv, ""]
    name = Path(program).name
    verb = next((word for word in arguments if word and not word.startswith("-")), "")
    return f"posmlp {verb}".strip() if name in ("posmlp", "cli.py") else name or "python"


def last_epoch_stored(client: MlflowClient, run_id: str) -> int:
    """The last epoch whose metrics MLflow has; 0 for none."""
    return max((m.step for m in client.get_metric_history(run_id, TRAIN_LOSS)), default=0)  # every epoch has it


def last_step_stored(client: MlflowClient, run_id: str) -> int:
    """The last optimizer step whose metrics MLflow has; 0 for none."""
    return max((m.step for m in client.get_metric_history(run_id, BY_STEP_TRAIN_LOSS)), default=0)


def log_new_params(client: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    """Log the params that a run does not have yet."""
    known = client.get_run(run_id).data.params
    if new := [Param(key, text) for key, text in params.items() if key not in known]:
        client.log_batch(run_id, params=new)


def upload_model(client: MlflowClient, run_id: str, folder: Path, checkpoint: CheckpointLink | None = None) -> None:
    """Upload a saved model as the run's logged model, as ``mlflow.pytorch.log_model`` does with a model in memory.

    A repeated call after an interrupted upload uses the logged model that the first call created.

    Args:
        folder: MLflow's files of the model. Its ``MLmodel`` file gets the ids of the run and the model.
        checkpoint: whose model it is; its metrics become those of the logged model.
    """
    run, tags = client.get_run(run_id), checkpoint.tags if checkpoint else {}
    found = client.search_logged_models([run.info.experiment_id], f"source_run_id='{run_id}' AND name='{UPLOADED}'")
    if found:
        logged = found[0]
        if tags:
            client.set_logged_model_tags(logged.model_id, tags)
    else:
        params = dict(run.data.params)
        logged = client.create_logged_model(run.info.experiment_id, UPLOADED, run_id, tags=tags, params=params)
    add_outputs(client, run, [(logged.model_id, checkpoint.epoch if checkpoint else 0)])
    card = Model.load(str(folder))
    card.run_id, card.model_id, card.model_uuid = run_id, logged.model_id, logged.model_id
    card.artifact_path = logged.artifact_location
    card.save(str(folder / "MLmodel"))
    client.log_model_artifacts(logged.model_id, str(folder))
    client.finalize_logged_model(logged.model_id, "READY")
    if checkpoint:
        log_checkpoint_metrics(client, logged, checkpoint)


def register_model(uri: str, run_id: str, name: str, tags: Mapping[str, str]) -> str:
    """Register a run's logged model as a version of the model ``name``, with the alias ``best``.

    If the newest version of this run has the same ``trial`` tag, that version is used.

    Returns:
        The version's number.

    Raises:
        UserError: MLflow does not have the model yet.
        MlflowException: MLflow refuses the call.
    """
    client = MlflowClient(uri, uri)
    run = client.get_run(run_id)
    found = client.search_logged_models([run.info.experiment_id], f"source_run_id='{run_id}' AND name='{UPLOADED}'")
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


# --- metrics that no database stores ---------------------------------------------------------------------------------


def as_metrics(values: Mapping[str, float], time: int, step: int) -> list[Metric]:
    """Return values as MLflow's metrics. Infinite ones become NaN, because MLflow's databases store them as 1.8e308.

    Args:
        time: milliseconds since 1970.
    """
    return [Metric(key, math.nan if math.isinf(value) else value, time, step) for key, value in values.items()]


def infinite_tags(values: Mapping[str, float], step: int) -> list[RunTag]:
    """Return a tag for each infinite value, such as ``infinite.train/loss``: ``inf at step 3``."""
    return [RunTag(f"{INFINITE}{key}", f"{value} at step {step}") for key, value in values.items() if math.isinf(value)]


def stored_metrics(run: Run) -> dict[str, float]:
    """Return the last value of each metric of a run. What MLflow's databases made of an infinite one is infinite."""
    return {
        key: math.copysign(math.inf, value) if abs(value) >= sys.float_info.max else value
        for key, value in run.data.metrics.items()
    }


# --- errors ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoreProblem:
    """Why MLflow does not do what it is asked, and what to do about it; texts of one line, without secrets.

    Attributes:
        reason: what is wrong.
        advice: what to do; empty if only waiting helps, as for a server that is down.
    """

    reason: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.reason}; {self.advice}" if self.advice else self.reason


SERVER_ERRORS = (429, 500, 502, 503, 504)  # answers after which MLflow's client tries again

# Parts of the long messages of the network, and short texts for them
NETWORK = {
    "Connection refused": StoreProblem("connection refused"),
    "timed out": StoreProblem("timed out"),
    "Failed to resolve": StoreProblem("its name cannot be resolved"),
    "CERTIFICATE_VERIFY_FAILED": StoreProblem(
        "its certificate is not trusted", "set MLFLOW_TRACKING_SERVER_CERT_PATH to a file with the authority's"
    ),
    "WRONG_VERSION_NUMBER": StoreProblem("it does not speak https", "use http:// in tracking.uri"),
}


def explain_store_error(error: Exception, uri: str) -> StoreProblem:
    """Explain an error of MLflow's client, its database or its artifact store.

    Args:
        uri: the tracking URI.
    """
    text = " ".join(str(error).split())
    store = without_secrets(uri)
    status = http_status(error, text)
    if status == 401:
        return StoreProblem("it refuses the user, password or token as wrong or expired (401)", LOGIN)
    if status == 403:
        return StoreProblem("this user may not do that (403)", f"ask for the permission EDIT, or {OTHER_EXPERIMENT}")
    if status == 407:
        return StoreProblem("a proxy asks for a login (407)", "see HTTPS_PROXY, or name the server in NO_PROXY")
    found = re.search(r"too many (\d+) error responses", text)  # before MLflow 3.18
    if found or (status in SERVER_ERRORS and not isinstance(error, RestException)):
        return StoreProblem(f"error {found[1] if found else status} of the server, or of a proxy before it")
    if re.search(r"<!doctype html|<html", text, re.IGNORECASE):
        page = f"a web page{f' ({status})' if status else ''} answers instead of MLflow, perhaps of a proxy or a login"
        return StoreProblem(page, "check the address in tracking.uri or MLFLOW_TRACKING_URI, and NO_PROXY")
    for part, problem in NETWORK.items():
        if part in text:
            return problem
    if found := re.search(r"found version (\w+), but expected", text):
        return explain_schema(found[1], store)
    if "readonly database" in text or "unable to open database file" in text:
        return StoreProblem("its file or folder cannot be written", f"make it writable for this user, or {OTHER_STORE}")
    if "database is locked" in text:
        return StoreProblem("another process locks its file", "end it, or let an MLflow server write the file")
    if "file is not a database" in text or "disk image is malformed" in text:
        return StoreProblem("its file is damaged or no SQLite database", f"restore a backup, or {OTHER_STORE}")
    if "filesystem tracking backend" in text:
        address = "give tracking.uri as sqlite:////PATH/mlflow.db or http://HOST:PORT"
        return StoreProblem("MLflow stores no runs in folders any more", address)
    if isinstance(error, ModuleNotFoundError):
        return StoreProblem(f"the package {error.name} is not installed", f"pip install {error.name}, or {OTHER_STORE}")
    text = re.split(r"\[SQL: |\(Background on this error", text)[0].strip() or type(error).__name__
    return StoreProblem(shorten(scrub(text, uri), 300))


def http_status(error: Exception, text: str) -> int | None:
    """The HTTP status of an answer that MLflow's client did not accept, if it is known."""
    if isinstance(error, RestException):
        return error.get_http_status_code()
    response = getattr(error, "response", None)  # of the package requests
    if response is not None:
        return int(response.status_code)
    found = re.search(r"failed with error code (\d{3}) ", text)
    return int(found[1]) if found else None


def explain_schema(version: str, store: str) -> StoreProblem:
    """Explain tables of another MLflow than this one.

    Args:
        version: the schema's revision in the database.
    """
    if any((MIGRATIONS / "versions").glob(f"{version}_*.py")):
        return StoreProblem(
            f"its tables are of an older MLflow (schema {version})",
            f"back it up, then run `mlflow db upgrade {store}`; or {OTHER_STORE}",
        )
    return StoreProblem(
        f"its tables are of a newer MLflow than {mlflow.__version__} (schema {version})",
        f"install that MLflow, or {OTHER_STORE}",
    )


def explain_deleted(run: Run, experiment: Experiment, uri: str) -> StoreProblem | None:
    """Explain that MLflow accepts nothing for a run because it, or its experiment, is deleted; None if it is not."""
    where, run_id = f"the experiment {experiment.name!r} (id {experiment.experiment_id})", run.info.run_id
    if experiment.lifecycle_stage == LifecycleStage.DELETED:
        command = restore_command(uri, experiment.experiment_id)
        return StoreProblem(f"{where} of run {run_id} is deleted", f"restore it with `{command}`")
    if run.info.lifecycle_stage == LifecycleStage.DELETED:
        command = f"MLFLOW_TRACKING_URI={without_secrets(uri)} mlflow runs restore --run-id {run_id}"
        return StoreProblem(f"the run {run_id} in {where} is deleted", f"restore it with `{command}`")
    return None


def restore_command(uri: str, experiment: str) -> str:
    """The command that restores a deleted experiment, without secrets."""
    return f"MLFLOW_TRACKING_URI={without_secrets(uri)} mlflow experiments restore --experiment-id {experiment}"


def error_code(error: Exception) -> str:
    """The code of an MLflow error, such as ``BAD_REQUEST``; empty for other errors."""
    return str(error.error_code) if isinstance(error, MlflowException) else ""


def now_ms() -> int:
    """The current time as MLflow writes it: milliseconds since 1970."""
    return int(time.time() * 1000)
