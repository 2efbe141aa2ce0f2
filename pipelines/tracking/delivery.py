"""Deliver the operations of a journal to MLflow, in order, for as long as it takes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import requests
from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException

from pipelines.tracking.journal import Entry, Journal, Op, read
from pipelines.tracking.mlflow_client import (
    EPOCH_KEY,
    deliver_model,
    epochs_stored,
    error_code,
    prepare_mlflow,
    shorten,
)
from pipelines.tracking.uris import scrub, without_secrets
from posmlp.errors import UserError

# What one MLflow call takes, and how long a value may be.
MAX_METRICS = 1000


SYSTEM = "system/"


FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between two tries


ASIDE_PAUSE = 60.0  # seconds between two tries of what was put aside


KNOWN_AWAY_WAIT = 5.0  # where it did not answer before


BAD_REQUESTS = 3  # tries of something that MLflow calls bad, before it is believed


# What is said of the long texts in which these stand.
REASONS = {
    "Connection refused": "connection refused",
    "timed out": "timed out",
    "Failed to resolve": "its name cannot be resolved",
}


class DeliveryWorker(threading.Thread):
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
        super().__init__(daemon=True, name="mlflow-delivery")
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


@dataclass
class JournalState:
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
    def of(cls, journal: Path) -> JournalState:
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
        past = JournalState.of(file)
        if past.run_id is None or past.uri is None:
            raise UserError(f"{file} is no tracking journal: no line of it names an MLflow run")
        journal = Journal(file, echo)
        try:
            given = os.environ.get("MLFLOW_TRACKING_URI", "")
            target = uri or (given if without_secrets(given) == past.uri else past.uri)
            count = DeliveryWorker(journal, target, past.run_id, past.blind, echo).deliver_all()
            echo(f"{file}: {count} operations delivered to MLflow run {past.run_id}, {journal.waiting()} left")
            left += journal.waiting()
        finally:
            journal.close()
    return left
