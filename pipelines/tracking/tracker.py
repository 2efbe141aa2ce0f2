"""The only place that talks to MLflow. One process, the run's driver, writes.

Everything that a run tells MLflow goes through a journal on the driver's disk, and a thread delivers it in order. So
training neither waits for MLflow nor ends with it: what MLflow does not take now is delivered later, by the same
driver, by the one that resumes the run, or by :func:`sync`. Delivering twice what was delivered before a kill does no
harm: MLflow's databases keep one of two metrics with the same key, time, step and value.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow import MlflowClient
from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_NODE_ID, MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL
from mlflow.exceptions import MlflowException

from pipelines.tracking.delivery import SYSTEM, DeliveryWorker, JournalState
from pipelines.tracking.journal import Journal, move_away
from pipelines.tracking.mlflow_client import (
    MAX_TAG_LENGTH,
    PARENT,
    create_run,
    epochs_stored,
    now_ms,
    prepare_mlflow,
    shorten,
)
from pipelines.tracking.node_monitors import Machine, Nodes
from pipelines.tracking.uris import scrub, tracking_uri, without_secrets
from posmlp.config import Config
from posmlp.errors import UserError

CLOSE_WAIT = 20.0  # seconds that the end of a run waits for MLflow, and
MODEL_WAIT = 600.0  # seconds that may go into the upload of a model to an MLflow that answers


class Tracker:
    """One MLflow run. Nothing here waits for MLflow, except :meth:`open`, :meth:`log_model` and :meth:`close`."""

    def __init__(self, journal: Journal, delivery: DeliveryWorker, epochs: int, system_step: int, nodes: bool = True):
        """
        Args:
            nodes: sample the cluster's other nodes too.
        """
        self.journal, self.delivery = journal, delivery
        self.run_id, self.uri = delivery.run_id, delivery.uri
        self.epochs = epochs
        self.machine = SystemMetrics(self, system_step, Nodes() if nodes else None)
        delivery.start()
        self.machine.start()

    @classmethod
    def open(
        cls,
        config: Config,
        tags: Mapping[str, str],
        run_id: str | None = None,
        *,
        journal: Path,
        params: Mapping[str, Any] | None = None,
        echo: Callable[[str], None] = print,
    ) -> Tracker:
        """Start a run, or go on with ``run_id``, which needs no MLflow that answers.

        Args:
            params: of a new run, beside the recipe's keys.
            journal: the file for what waits for MLflow, on this machine's disk.
            echo: takes what the user should know: that MLflow does not answer, and that it is back.

        Raises:
            UserError: a new run's store cannot be reached or written, the store has no run ``run_id``, or another
                process is at this run.
        """
        prepare_mlflow()
        uri = tracking_uri(config)
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        if journal.exists():
            Journal(journal, echo).close()  # refuses where another process is at this run
        stored_epochs = None
        try:
            client = MlflowClient(uri)
            if run_id is None:
                run_id = create_run(client, config, tags, params)
            client.get_run(run_id)  # a store without it has no epochs either
            stored_epochs = epochs_stored(client, run_id)
        except Exception as error:  # of a network, a database or an artifact store, in their many kinds
            unknown = isinstance(error, MlflowException) and error.error_code == "RESOURCE_DOES_NOT_EXIST"
            if run_id is None or unknown:
                raise UserError(
                    f"MLflow at {without_secrets(uri)} cannot be written, see tracking.uri and MLFLOW_TRACKING_URI: "
                    f"{scrub(str(error), uri)}"
                ) from error
        past = JournalState.of(journal)
        if past.run_id not in (None, run_id):  # an earlier run of this name: its lines stay its own
            move_away(journal, past.run_id)
            past = JournalState()
        blind = stored_epochs is None
        book = Journal(journal, echo)
        book.append({"op": "open", "uri": without_secrets(uri), "run_id": run_id, "blind": blind})
        delivery = DeliveryWorker(book, uri, run_id, past.blind or blind, echo)
        # A trial leaves the cluster's nodes to its study's own run: else each node would be sampled for each of them.
        return cls(book, delivery, max(past.epochs, stored_epochs or 0), past.system_step, PARENT not in tags)

    def log(self, metrics: Mapping[str, float], step: int, *, sync: bool = True) -> None:
        """Write one set of metrics; without ``sync`` a power cut of the next seconds may take it."""
        values = {k: float(v) for k, v in metrics.items()}
        self.journal.append({"op": "metrics", "time": now_ms(), "step": step, "values": values}, sync=sync)

    def log_tags(self, tags: Mapping[str, str], run_id: str | None = None) -> None:
        """Set tags of the run, or of another, such as a trial of this study."""
        values = {k: shorten(scrub(str(v), self.uri), MAX_TAG_LENGTH) for k, v in tags.items()}
        self.journal.append({"op": "tags", "tags": values, "of": run_id or self.run_id})

    def log_of(self, run_id: str, metrics: Mapping[str, float], step: int) -> None:
        """Write one set of metrics of another run."""
        values = {k: float(v) for k, v in metrics.items()}
        self.journal.append({"op": "metrics of", "of": run_id, "time": now_ms(), "step": step, "values": values})

    def end_run(self, run_id: str, status: str) -> None:
        """End another run, whose own driver has died."""
        self.journal.append({"op": "status", "status": status, "time": now_ms(), "of": run_id})

    def log_file(self, path: str, content: bytes) -> None:
        """Store an artifact. The same path again replaces it; of several that wait only the latest is delivered."""
        self.journal.append_file({"op": "file", "path": path}, path, content)

    def log_table(self, rows: Iterable[Mapping[str, Any]], path: str) -> None:
        """Store rows as a JSON artifact."""
        self.log_file(path, json.dumps(list(rows), indent=1).encode())

    def log_model(self, model: torch.nn.Module, example: torch.Tensor) -> None:
        """Store the trained model, loadable with ``mlflow.pytorch.load_model(f"runs:/{run_id}/model")``.

        It is written to this machine's disk first, and waits there if MLflow does not answer.
        """
        folder = self.journal.files / "exported"
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            mlflow.pytorch.save_model(
                model.eval(),
                str(folder),
                input_example=example.numpy(),
                pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}", f"numpy=={np.__version__}"],
            )
        except OSError as error:
            self.journal.tell(error)
            return
        self.journal.append_file({"op": "model", "time": now_ms()}, "model", folder)
        self.delivery.flush(MODEL_WAIT)

    def epochs_logged(self) -> int:
        """Epochs whose metrics are delivered, or wait in the journal, as this driver found it."""
        return self.epochs

    def close(self, status: str, wait_s: float = CLOSE_WAIT) -> int:
        """End the run as FINISHED, FAILED or KILLED.

        Args:
            wait_s: seconds that delivery may take; an MLflow that does not answer is waited for less.

        Returns:
            the operations that are not delivered: ``journal.path`` has them, and :func:`sync` delivers them.
        """
        self.machine.stop()
        self.journal.append({"op": "status", "status": status, "time": now_ms()})
        self.delivery.flush(wait_s)
        return self.delivery.stop()


class SystemMetrics(threading.Thread):
    """CPU, memory, disk, network and GPU of the driver's machine, as MLflow's system metrics; on a cluster of several
    nodes, those of each node beside them.

    MLflow's own monitor ends for good with the first call that MLflow does not answer; this one writes to the journal.
    """

    def __init__(self, tracker: Tracker, step: int, nodes: Nodes | None):
        super().__init__(daemon=True, name="machine-metrics")
        self.tracker, self.step = tracker, step
        self.interval = MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or 10.0
        node = MLFLOW_SYSTEM_METRICS_NODE_ID.get()
        self.prefix = f"{SYSTEM}{node}/" if node else SYSTEM
        self.machine, self.nodes = Machine(), nodes
        self.told = False  # that other nodes' are missing
        self.stopping = threading.Event()

    def run(self) -> None:
        try:
            while not self.stopping.wait(self.interval):
                self.sample()
            self.sample()
        except Exception as error:  # of a driver or of psutil; the run matters more than these
            self.tracker.delivery.tell(f"system metrics end here: {error}")
        finally:
            if self.nodes:
                self.nodes.close()

    def sample(self) -> None:
        own = self.machine.sample()
        values = {self.prefix + key: value for key, value in own.items()}
        if self.nodes and not self.stopping.is_set():
            try:
                values |= {SYSTEM + key: value for key, value in self.nodes.sample(own, self.stopping).items()}
            except Exception as error:  # of a cluster that does not answer: this machine still does
                if not self.told:
                    self.told = True
                    self.tracker.delivery.tell(f"system metrics of other nodes are missing: {error}")
        self.tracker.log(values, self.step, sync=False)
        self.step += 1

    def stop(self) -> None:
        self.stopping.set()
        self.join(timeout=5.0)
