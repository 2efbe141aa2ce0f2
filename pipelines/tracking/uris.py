"""The tracking URI, URIs without secrets, and the path of the journal."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mlflow.environment_variables import MLFLOW_TRACKING_TOKEN
from mlflow.utils.credentials import read_mlflow_creds

from posmlp import storage
from posmlp.config import Config
from posmlp.errors import UserError


def tracking_uri(config: Config) -> str:
    """The recipe's ``tracking.uri``, else ``MLFLOW_TRACKING_URI``, else a SQLite file in ``train.storage``.

    Raises:
        UserError: neither is set, and the storage is remote, where SQLite does not work.
    """
    if uri := config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    if "://" in str(config.train.storage):
        raise UserError(
            f"train.storage {config.train.storage} is not on this machine, so it cannot hold MLflow's SQLite file; "
            "set tracking.uri (or MLFLOW_TRACKING_URI) to an MLflow server, or to sqlite:////a/local/path/mlflow.db"
        )
    return f"sqlite:///{Path(config.train.storage).resolve() / 'mlflow.db'}"


def sqlite_path(uri: str) -> Path | None:
    """The absolute path of a SQLite store; None for other stores, and for SQLite's own URIs and stores in memory."""
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    return (
        Path(path).resolve() if uri.startswith("sqlite:///") and path and not path.startswith(("file:", ":")) else None
    )


def without_secrets(uri: str) -> str:
    """A tracking URI without user, password and query, safe to store and print."""
    if uri.startswith(("sqlite:", "file:")):
        return uri.partition("?")[0]
    return re.sub(r"^([\w+.-]+://).*@", r"\1", uri).partition("?")[0]


def scrub(text: str, uri: str) -> str:
    """Remove the secrets of a tracking URI from a text."""
    text = text.replace(uri, without_secrets(uri))
    if (found := re.match(r"^[\w+.-]+://(.*)@", uri)) and not uri.startswith("sqlite:"):
        text = text.replace(found[1], "***")
    return text


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


def recipe_without_password(config: Config) -> Config:
    """The recipe without the user and password of ``tracking.uri``, safe to store."""
    uri = config.tracking.uri and without_secrets(config.tracking.uri)
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})


def journal_path(run: str) -> Path:
    """Path of the local journal that buffers MLflow writes: in the run's folder; below ``runs`` if that is remote."""
    folder = Path("runs", run.rstrip("/").rpartition("/")[2]).resolve() if storage.is_remote(run) else Path(run)
    return folder / "tracking" / "journal.jsonl"
