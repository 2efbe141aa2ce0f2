"""Where MLflow writes, and URIs without their secrets."""

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
    """The recipe's URI, else ``MLFLOW_TRACKING_URI``, else SQLite in ``train.storage``.

    Raises:
        UserError: the storage is remote, where no SQLite file can lie.
    """
    if uri := config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    if "://" in str(config.train.storage):
        raise UserError(
            f"train.storage {config.train.storage} is not on this machine, so MLflow's database cannot lie in it; "
            "set tracking.uri (or MLFLOW_TRACKING_URI) to an MLflow server, or to sqlite:////a/local/path/mlflow.db"
        )
    return f"sqlite:///{Path(config.train.storage).resolve() / 'mlflow.db'}"


def without_secrets(uri: str) -> str:
    """A tracking URI without its user, password and query, to be written and printed."""
    if uri.startswith(("sqlite:", "file:")):
        return uri.partition("?")[0]
    return re.sub(r"^([\w+.-]+://).*@", r"\1", uri).partition("?")[0]


def scrub(text: str, uri: str) -> str:
    """Text, with the tracking URI's secrets taken out."""
    text = text.replace(uri, without_secrets(uri))
    if (found := re.match(r"^[\w+.-]+://(.*)@", uri)) and not uri.startswith("sqlite:"):
        text = text.replace(found[1], "***")
    return text


def refuse_strangers(config: Config) -> None:
    """The recipe of a checkpoint may be someone else's, so it does not choose who is sent this user's password.

    Raises:
        UserError: there is a password for MLflow, and the recipe names another server than ``MLFLOW_TRACKING_URI``.
    """
    uri, own = config.tracking.uri or "", os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri.lower().startswith("http") or without_secrets(own).rstrip("/") == without_secrets(uri).rstrip("/"):
        return
    known = read_mlflow_creds()
    if known.username or known.password or MLFLOW_TRACKING_TOKEN.get():
        raise UserError(
            f"the checkpoint's recipe logs to {without_secrets(uri)}, which would be sent your password for MLflow; if "
            f"that is your server, say tracking.uri={without_secrets(uri)}, else tracking.uri=null"
        )


def without_password(config: Config) -> Config:
    """The recipe as it may be stored: a password in ``tracking.uri`` is left out."""
    uri = config.tracking.uri and without_secrets(config.tracking.uri)
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})


def journal_path(run: str) -> Path:
    """Where what MLflow shall get is kept until it has it: on this machine, with the run if that is here too."""
    folder = Path("runs", run.rstrip("/").rpartition("/")[2]).resolve() if storage.is_remote(run) else Path(run)
    return folder / "tracking" / "journal.jsonl"
