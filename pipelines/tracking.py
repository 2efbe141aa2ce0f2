"""The only place that talks to MLflow. One process, the run's driver, writes.

Everything that a run tells MLflow goes through a journal on the driver's disk, and a thread delivers it in order. So
training neither waits for MLflow nor ends with it: what MLflow does not take now is delivered later, by the same
driver, by the one that resumes the run, or by :func:`sync`. Delivering twice what was delivered before a kill does no
harm: MLflow's databases keep one of two metrics with the same key, time, step and value.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import ray
import requests
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Metric, Param, RunTag
from mlflow.environment_variables import (
    MLFLOW_SYSTEM_METRICS_NODE_ID,
    MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL,
    MLFLOW_TRACKING_TOKEN,
)
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.utils.credentials import read_mlflow_creds

from pipelines.journal import Entry, Journal, Op, move_away, read
from pipelines.machines import Machine, Nodes
from posmlp.config import Config
from posmlp.errors import UserError

# What one MLflow call takes, and how long a value may be.
MAX_METRICS = 1000
MAX_PARAMS = 100
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 8000

EPOCH_KEY = "train/loss"  # every epoch has it, so it tells which epochs are logged
SYSTEM = "system/"
PARENT = "mlflow.parentRunId"  # the tag by which MLflow nests a run
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between two tries
ASIDE_PAUSE = 60.0  # seconds between two tries of what was put aside
CLOSE_WAIT = 20.0  # seconds that the end of a run waits for MLflow, and
KNOWN_AWAY_WAIT = 5.0  # where it did not answer before
BAD_REQUESTS = 3  # tries of something that MLflow calls bad, before it is believed
MODEL_WAIT = 600.0  # seconds that may go into the upload of a model to an MLflow that answers
# MLflow itself tries 8 times with 120 s each; here the journal waits, and a try should end soon.
HTTP_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
# What is said of the long texts in which these stand.
REASONS = {
    "Connection refused": "connection refused",
    "timed out": "timed out",
    "Failed to resolve": "its name cannot be resolved",
}


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


def scrub(text: str, uri: str) -> str:
    """Text, with the tracking URI's secrets taken out."""
    text = text.replace(uri, without_secrets(uri))
    if (found := re.match(r"^[\w+.-]+://(.*)@", uri)) and not uri.startswith("sqlite:"):
        text = text.replace(found[1], "***")
    return text


class Tracker:
    """One MLflow run. Nothing here waits for MLflow, except :meth:`open`, :meth:`log_model` and :meth:`close`."""

    def __init__(self, journal: Journal, courier: Courier, epochs: int, system_step: int, nodes: bool = True):
        """
        Args:
            nodes: sample the cluster's other nodes too.
        """
        self.journal, self.courier = journal, courier
        self.run_id, self.uri = courier.run_id, courier.uri
        self.epochs = epochs
        self.machine = MachineMetrics(self, system_step, Nodes() if nodes else None)
        courier.start()
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
        past = Past.of(journal)
        if past.run_id not in (None, run_id):  # an earlier run of this name: its lines stay its own
            move_away(journal, past.run_id)
            past = Past()
        blind = stored_epochs is None
        book = Journal(journal, echo)
        book.append({"op": "open", "uri": without_secrets(uri), "run_id": run_id, "blind": blind})
        courier = Courier(book, uri, run_id, past.blind or blind, echo)
        # A trial leaves the cluster's nodes to its study's own run: else each node would be sampled for each of them.
        return cls(book, courier, max(past.epochs, stored_epochs or 0), past.system_step, PARENT not in tags)

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
        self.courier.flush(MODEL_WAIT)

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
        self.courier.flush(wait_s)
        return self.courier.stop()


class Courier(threading.Thread):
    """Takes a journal's operations to MLflow, in order: all the time as a thread, or once with :meth:`deliver_all`.

    What fails because MLflow, or the way to it, is down is tried again for as long as it takes. What MLflow refuses
    for what it is goes to the journal's ``rejected`` file. Files go to a store of their own: where only that fails,
    they are put aside, and hold up nothing.
    """

    def __init__(self, journal: Journal, uri: str, run_id: str, blind: bool, echo: Callable[[str], None]):
        """
        Args:
            blind: the journal may have epochs that MLflow got from another driver.
        """
        super().__init__(daemon=True, name="mlflow-courier")
        self.journal, self.uri, self.run_id, self.echo = journal, uri, run_id, echo
        self.connection: MlflowClient | None = None
        self.failures = 0  # in a row
        self.bad_requests = 0  # in a row
        self.tries = 0  # that have ended, well or not
        self.refused = self.put_off = False  # which the user was told
        self.next_aside = time.monotonic() + ASIDE_PAUSE
        self.stopping = threading.Event()
        self.hurry = threading.Event()
        self.blind = blind
        self.stored_epochs: int | None = None

    # --- as a thread

    def run(self) -> None:
        while not self.stopping.is_set():
            if entries := self.next_entries():
                error = self.attempt(entries)
                self.report(error)
                if error:
                    self.hurry.wait(min(FIRST_PAUSE * 2 ** min(self.failures - 1, 10), LONGEST_PAUSE))
                    self.hurry.clear()
            elif self.journal.aside and time.monotonic() > self.next_aside:
                self.retry_aside()
            else:
                with self.journal.changed:
                    if not self.journal.queue and not self.stopping.is_set():
                        self.journal.changed.wait(1.0)
        self.journal.close()

    def tell(self, text: str) -> None:
        with suppress(OSError):  # a terminal that is gone must not end the delivery
            self.echo(text)

    def report(self, error: str | None) -> None:
        """Tell the user of the first failure, and of its end."""
        place = f"MLflow at {without_secrets(self.uri)}"
        if error and not self.failures:
            self.tell(f"{place} does not answer ({error}); metrics wait in {self.journal.path}, the run goes on")
        elif not error and self.failures:
            self.tell(f"{place} is back; what waited is being delivered")
        with self.journal.changed:
            self.failures = self.failures + 1 if error else 0
            self.tries += 1
            self.journal.changed.notify_all()

    def flush(self, wait_s: float) -> None:
        """Wait until all is delivered or put aside, MLflow turns out not to answer, or ``wait_s`` seconds are over."""
        with self.journal.changed:
            wait_s = min(wait_s, KNOWN_AWAY_WAIT) if self.failures else wait_s
            deadline, tries = time.monotonic() + wait_s, self.tries
            self.hurry.set()
            while self.journal.queue and (left := deadline - time.monotonic()) > 0:
                if self.failures and self.tries > tries:
                    return
                self.journal.changed.wait(left)

    def stop(self) -> int:
        """End the thread after what it is at; returns how many operations are left."""
        self.stopping.set()
        self.hurry.set()
        with self.journal.changed:
            self.journal.changed.notify_all()
        self.join(timeout=1.0)  # one that hangs in a call gives the journal back when the call, or the process, ends
        return self.journal.waiting()

    # --- delivery

    def deliver_all(self) -> int:
        """Deliver what waits; returns how many operations were.

        Raises:
            UserError: MLflow does not answer.
        """
        before = self.journal.waiting()
        while entries := self.next_entries():
            if error := self.attempt(entries):
                raise UserError(
                    f"MLflow at {without_secrets(self.uri)} does not answer ({error}); "
                    f"{self.journal.waiting()} operations still wait in {self.journal.path}"
                )
        self.retry_aside()
        return before - self.journal.waiting()

    def next_entries(self) -> list[Entry]:
        """The first that wait: as many lines of metrics as fit into one call, or one of anything else."""
        with self.journal.changed:
            entries: list[Entry] = []
            count = 0
            for entry in islice(self.journal.queue, MAX_METRICS):
                count += len(entry.op.get("values", ()))
                if entries and (entry.op["op"] != "metrics" or count > MAX_METRICS):
                    break
                entries.append(entry)
                if entry.op["op"] != "metrics":
                    break
            return entries

    def attempt(self, entries: list[Entry]) -> str | None:
        """Try to deliver the queue's first entries; returns why MLflow did not take them, None if that is settled."""
        keep_file = False
        try:
            self.deliver(entries)
        except Exception as error:
            # Anything that a network, database or artifact store raises: the user is told, and nothing is dropped.
            reason = self.reason(error)
            if self.is_refusal(error):
                self.reject(entries[0], reason)
                keep_file = True
            elif "file" in entries[0].op and self.answers():
                if not self.put_off:
                    self.put_off = True
                    self.tell(
                        f"MLflow does not store {entries[0].op.get('path', 'the model')} ({reason}); it is kept "
                        f"in {self.journal.files} and tried again"
                    )
                self.journal.put_aside(entries[0])
                return None
            else:
                self.bad_requests = self.bad_requests + 1 if error_code(error) == "BAD_REQUEST" else 0
                return reason
        self.bad_requests = 0
        for entry in entries:
            self.journal.done(entry, keep_file=keep_file)
        return None

    def retry_aside(self) -> None:
        """Try once more what was put aside."""
        for entry in list(self.journal.aside):
            try:
                self.deliver([entry])
            except Exception as error:  # as before: the user knows of it, and nothing is dropped
                if self.is_refusal(error):
                    self.reject(entry, self.reason(error))
                    self.journal.done(entry, keep_file=True)
            else:
                self.journal.done(entry)
        self.next_aside = time.monotonic() + ASIDE_PAUSE

    def deliver(self, entries: list[Entry]) -> None:
        """Bring entries to MLflow: several lines of metrics, or one of anything else."""
        op = entries[0].op
        client = self.client()
        file = self.journal.files / op.get("file", "")
        if "file" in op and not file.exists():
            raise Lost(f"{file} is gone")
        if op["op"] == "metrics":
            metrics = [
                Metric(key, value, e.op["time"], e.op["step"])
                for e in entries
                if not self.stored_already(e.op)
                for key, value in e.op["values"].items()
            ]
            for i in range(0, len(metrics), MAX_METRICS):
                self.deliver_metrics(entries[0], metrics[i : i + MAX_METRICS])
        elif op["op"] == "metrics of":
            client.log_batch(op["of"], metrics=[Metric(k, v, op["time"], op["step"]) for k, v in op["values"].items()])
        elif op["op"] == "open":
            client.update_run(self.run_id, status="RUNNING")
        elif op["op"] == "status":
            client.set_terminated(op.get("of", self.run_id), op["status"], end_time=op["time"])
        elif op["op"] == "tags":
            client.log_batch(op.get("of", self.run_id), tags=[RunTag(k, v) for k, v in op["tags"].items()])
        elif op["op"] == "file" and not self.journal.superseded(entries[0]):
            client.log_artifact(self.run_id, str(file), os.path.dirname(op["path"]) or None)
        elif op["op"] == "model":
            deliver_model(client, self.run_id, file)
        elif op["op"] == "unreadable":
            raise Lost("the line is not JSON")

    def deliver_metrics(self, entry: Entry, metrics: list[Metric]) -> None:
        """One call; where MLflow refuses it, halves of it, so that only what is refused for itself stays behind."""
        if not metrics:
            return
        try:
            self.client().log_batch(self.run_id, metrics=metrics)
        except MlflowException as error:
            if not self.is_refusal(error):
                raise
            half = len(metrics) // 2
            if half:
                self.deliver_metrics(entry, metrics[:half])
                self.deliver_metrics(entry, metrics[half:])
                return
            (metric,) = metrics
            values = {metric.key: metric.value}
            part = {"op": "metrics", "time": metric.timestamp, "step": metric.step, "values": values}
            self.reject(entry, self.reason(error), part)

    def stored_already(self, op: Op) -> bool:
        """Whether an epoch's metrics came from another driver, where neither MLflow nor a journal could be asked."""
        if not self.blind or EPOCH_KEY not in op["values"]:
            return False
        if self.stored_epochs is None:
            self.stored_epochs = epochs_stored(self.client(), self.run_id)
        return op["step"] <= self.stored_epochs

    def is_refusal(self, error: Exception) -> bool:
        """Whether MLflow will never take this, however often it is sent."""
        if isinstance(error, requests.HTTPError) and error.response is not None:
            return error.response.status_code in (400, 413)
        code = error_code(error)
        if code == "BAD_REQUEST":  # which its databases also say of a connection that was cut: the next try repairs it
            return self.bad_requests >= BAD_REQUESTS
        return isinstance(error, Lost) or code in ("INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS")

    def client(self) -> MlflowClient:
        """Made when it is needed: for a database that already means to connect."""
        self.connection = self.connection or MlflowClient(self.uri)
        return self.connection

    def answers(self) -> bool:
        """Whether MLflow knows the run, now."""
        try:
            self.client().get_run(self.run_id)
        except Exception:  # of any kind: then the caller tells that MLflow does not answer
            return False
        return True

    def reject(self, entry: Entry, reason: str, part: Op | None = None) -> None:
        if not self.refused:
            self.refused = True
            self.tell(f"MLflow refuses what it is sent ({reason}); the refused is kept in {self.journal.rejected}")
        self.journal.reject(entry, reason, part)

    def reason(self, error: Exception) -> str:
        """One line, without secrets."""
        text = " ".join(str(error).split()) or type(error).__name__
        for sign, reason in REASONS.items():
            if sign in text:
                return reason
        return shorten(scrub(text, self.uri), 200)


class Lost(Exception):
    """What the disk no longer has as it was written."""


def error_code(error: Exception) -> str:
    """MLflow's code, such as ``BAD_REQUEST``; empty for other errors."""
    return str(error.error_code) if isinstance(error, MlflowException) else ""


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


def register_model(tracker: Tracker, name: str, tags: Mapping[str, str]) -> str:
    """Make the model that a run has logged a version of a registered one, with the alias ``best``; returns its number.

    A model that is a version already stays that one.

    Raises:
        MlflowException, UserError: MLflow did not take it, or does not have the model yet.
    """
    client = MlflowClient(tracker.uri, tracker.uri)
    run = client.get_run(tracker.run_id)
    found = client.search_logged_models([run.info.experiment_id], f"source_run_id='{tracker.run_id}'")
    if not found:
        raise UserError("MLflow does not have the model yet")
    with suppress(MlflowException):  # it exists, or the next call tells
        client.create_registered_model(name)
    versions = client.search_model_versions(f"name='{name}' AND run_id='{tracker.run_id}'")
    newest = max(versions, key=lambda version: int(version.version), default=None)
    if newest is None or dict(newest.tags).get("trial") != tags.get("trial"):
        model = found[0]
        place = model.artifact_location  # models:/ID would be looked up in another MLflow, if the process has one
        newest = client.create_model_version(name, place, tracker.run_id, tags=dict(tags), model_id=model.model_id)
    client.set_registered_model_alias(name, "best", newest.version)
    return str(newest.version)


def sync(path: Path, echo: Callable[[str], None] = print, uri: str | None = None) -> int:
    """Deliver what a run's journal, or each in a folder, still has. Safe to call again, and while the run goes on.

    Args:
        uri: where, in place of what the journal says, which has no user and password: give them with the URI in
            ``MLFLOW_TRACKING_URI``, or in ``MLFLOW_TRACKING_USERNAME`` and ``MLFLOW_TRACKING_PASSWORD``.

    Returns:
        the operations that are left, which MLflow's artifact store did not take.

    Raises:
        UserError: there is no journal, a live run holds it, or MLflow does not answer.
    """
    prepare_mlflow()
    path = Path(path)
    journals = [path] if path.is_file() else sorted([*path.glob("*.jsonl"), *path.glob("tracking/*.jsonl")])
    if not journals:
        raise UserError(f"{path} holds no tracking journal; expected a run's folder, or its tracking/journal.jsonl")
    left = 0
    for file in journals:
        past = Past.of(file)
        if past.run_id is None or past.uri is None:
            raise UserError(f"{file} is no tracking journal: no line of it names an MLflow run")
        journal = Journal(file, echo)
        try:
            given = os.environ.get("MLFLOW_TRACKING_URI", "")
            target = uri or (given if without_secrets(given) == past.uri else past.uri)
            count = Courier(journal, target, past.run_id, past.blind, echo).deliver_all()
            echo(f"{file}: {count} operations delivered to MLflow run {past.run_id}, {journal.waiting()} left")
            left += journal.waiting()
        finally:
            journal.close()
    return left


class MachineMetrics(threading.Thread):
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
            self.tracker.courier.tell(f"system metrics end here: {error}")
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
                    self.tracker.courier.tell(f"system metrics of other nodes are missing: {error}")
        self.tracker.log(values, self.step, sync=False)
        self.step += 1

    def stop(self) -> None:
        self.stopping.set()
        self.join(timeout=5.0)


def prepare_mlflow() -> None:
    """Keep MLflow quiet, and a call that fails short; what the user has set counts."""
    for noisy in ("alembic", "mlflow.store.db.utils", "urllib3.connectionpool", "torch._export"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # what fails is told in one line
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # it prints passwords, too
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name, value in HTTP_LIMITS.items():
        os.environ.setdefault(name, value)


@dataclass
class Past:
    """What a journal tells of its run.

    Attributes:
        run_id, uri: the MLflow run and where it is, without secrets; None in a journal that has no whole line.
        epochs: the last epoch in it.
        system_step: the next step of system metrics.
        blind: a driver has opened it when MLflow did not answer.
    """

    run_id: str | None = None
    uri: str | None = None
    epochs: int = 0
    system_step: int = 0
    blind: bool = False

    @classmethod
    def of(cls, journal: Path) -> Past:
        past = cls()
        with suppress(OSError):  # none yet, or a disk that fails: then there is nothing to go by
            for entry in read(journal):
                past.take(entry.op)
        return past

    def take(self, op: Op) -> None:
        if op["op"] == "open":
            self.run_id, self.uri, self.blind = op["run_id"], op["uri"], self.blind or op["blind"]
        elif op["op"] == "metrics":
            if EPOCH_KEY in op["values"]:
                self.epochs = max(self.epochs, op["step"])
            if any(key.startswith(SYSTEM) for key in op["values"]):
                self.system_step = op["step"] + 1


def now_ms() -> int:
    """MLflow's time: milliseconds since 1970."""
    return int(time.time() * 1000)


def shorten(text: str, length: int) -> str:
    """At most so many characters, with "..." for what is left out."""
    text = str(text)
    return text if len(text) <= length else text[: length - 3] + "..."


def epochs_stored(client: MlflowClient, run_id: str) -> int:
    """The last epoch whose metrics MLflow has."""
    return max((m.step for m in client.get_metric_history(run_id, EPOCH_KEY)), default=0)


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
