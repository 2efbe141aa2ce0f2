"""The only place that talks to MLflow. One process, the run's driver, writes."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import ray
import torch
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from posmlp.config import Config
from posmlp.errors import UserError

MAX_PARAMS = 100  # that one MLflow call takes


def tracking_uri(config: Config) -> str:
    """The recipe's URI, else ``MLFLOW_TRACKING_URI``, else SQLite in ``train.storage``."""
    if uri := config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    return f"sqlite:///{Path(config.train.storage).resolve() / 'mlflow.db'}"


class Tracker:
    """One MLflow run."""

    def __init__(self, client: MlflowClient, run_id: str):
        self.client = client
        self.run_id = run_id
        self.monitor: SystemMetricsMonitor | None = None

    @classmethod
    def open(cls, config: Config, tags: Mapping[str, str], run_id: str | None = None) -> Tracker:
        """Start a run, or go on with ``run_id``.

        Raises:
            UserError: the store cannot be reached or written.
        """
        for noisy in ("alembic", "mlflow.store.db.utils", "mlflow.system_metrics.system_metrics_monitor"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        uri = tracking_uri(config)
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        try:
            client = MlflowClient(uri)
            if run_id is None:
                run_id = create_run(client, config, tags)
            client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            raise UserError(
                f"MLflow at {uri} cannot be written, see tracking.uri and MLFLOW_TRACKING_URI: {error.message}"
            ) from error
        tracker = cls(client, run_id)
        tracker.monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=uri)
        tracker.monitor.start()
        return tracker

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one set of metrics."""
        now = int(time.time() * 1000)
        self.client.log_batch(self.run_id, metrics=[Metric(k, float(v), now, step) for k, v in metrics.items()])

    def epochs_logged(self) -> int:
        """Epochs whose metrics the store has."""
        return max((m.step for m in self.client.get_metric_history(self.run_id, "train/loss")), default=0)

    def log_table(self, rows: Iterable[Mapping[str, Any]], path: str) -> None:
        """Store rows as a JSON artifact."""
        self.client.log_text(self.run_id, json.dumps(list(rows), indent=1), path)

    def log_model(self, model: torch.nn.Module, example: torch.Tensor) -> None:
        """Store the trained model, loadable with ``mlflow.pytorch.load_model``."""
        with active_uri(self.client.tracking_uri), mlflow.start_run(run_id=self.run_id, log_system_metrics=False):
            mlflow.pytorch.log_model(
                model.eval(),
                name="model",
                input_example=example.numpy(),
                pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}", f"numpy=={np.__version__}"],
            )

    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        if self.monitor:
            self.monitor.finish()
        self.client.set_terminated(self.run_id, status)


@contextmanager
def active_uri(uri: str) -> Iterator[None]:
    """MLflow's global tracking URI for a while. Setting it also sets ``MLFLOW_TRACKING_URI``, which is the user's."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def create_run(client: MlflowClient, config: Config, tags: Mapping[str, str]) -> str:
    """A new run with its recipe as params and as an artifact; returns its id."""
    run_id = client.create_run(experiment_id(client, config), run_name=config.name, tags=dict(tags)).info.run_id
    params = [Param(k, str(v)) for k, v in config.flat().items()]
    for i in range(0, len(params), MAX_PARAMS):
        client.log_batch(run_id, params=params[i : i + MAX_PARAMS])
    client.log_text(run_id, config.to_yaml(), "config.yaml")
    return run_id


def experiment_id(client: MlflowClient, config: Config) -> str:
    """The experiment's id; made if there is none. With SQLite its artifacts lie beside the database."""
    name = config.tracking.experiment
    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    local = tracking_uri(config).startswith("sqlite:")
    location = (Path(config.train.storage).resolve() / "mlartifacts").as_uri() if local else None
    return client.create_experiment(name, artifact_location=location)


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
