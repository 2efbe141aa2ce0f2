"""Delivery of a journal's operations to MLflow, in order, with retries until MLflow accepts or refuses them."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

import requests
from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException

from pipelines.registry.datasets import as_dataset_input
from pipelines.registry.logged_models import link_checkpoints
from pipelines.runs.lease import leased
from pipelines.tracking.journal import FILE, FOLDER, Entry, Journal, JournalState, RemoteJournal, find_journals
from pipelines.tracking.mlflow_client import (
    StoreProblem,
    as_metrics,
    error_code,
    explain_deleted,
    explain_store_error,
    infinite_tags,
    last_epoch_stored,
    last_step_stored,
    log_new_params,
    prepare_mlflow,
    prepare_sqlite,
    upload_model,
)
from pipelines.tracking.operations import (
    EndRun,
    LinkCheckpoints,
    LogFile,
    LogInputs,
    LogMetrics,
    LogModel,
    LogParams,
    LogSeries,
    OpenRun,
    Operation,
    SetTags,
    Unreadable,
)
from pipelines.tracking.uris import without_secrets
from posmlp import storage
from posmlp.errors import UserError
from posmlp.metrics import TRAIN_LOSS

logger = logging.getLogger(__name__)

MAX_METRICS = 1000  # per call of MLflow's log_batch
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between two attempts
POSTPONED_PAUSE = 60.0  # seconds between two attempts of what was postponed
FLUSH_WAIT_WHEN_DOWN = 5.0  # longest wait of a flush, in seconds, if the last attempt failed
MAX_BAD_REQUESTS = 3  # attempts of an operation after which MLflow's BAD_REQUEST is final


class LostError(Exception):
    """The disk no longer has an operation, or its file, as it was written."""


class DeliveryWorker(threading.Thread):
    """Delivers the operations of a journal to MLflow: continuously as a thread, or once with ``deliver_all``.

    - MLflow, or the network to it, is down: the operation is tried again until it succeeds, and later ones wait. The
      same holds for a store that accepts nothing now: an expired token, a read-only file, a deleted experiment.
    - MLflow refuses an operation for its content: it moves to the journal's ``rejected_path``.
    - Only the artifact store fails (it is a separate service): operations with files are postponed, others continue.
    """

    def __init__(self, journal: Journal, uri: str, run_id: str, *, check_stored_epochs: bool):
        """
        Args:
            uri: the tracking URI, with user and password if it has them.
            check_stored_epochs: the journal may hold epochs that another driver has already sent to MLflow; ask MLflow
                and skip them.
        """
        super().__init__(daemon=True, name="mlflow-delivery")
        self.journal, self.uri, self.run_id = journal, uri, run_id
        self.connection: MlflowClient | None = None
        self.failures = 0  # attempts that failed in a row
        self.bad_requests = 0  # attempts in a row that MLflow called a BAD_REQUEST
        self.attempts = 0  # attempts that ended, failed ones too
        self.refusal_reported = self.postponement_reported = False
        self.next_retry = time.monotonic() + POSTPONED_PAUSE  # of what was postponed
        self.stopping = threading.Event()
        self.retry_now = threading.Event()  # ends the pause after a failure
        self.check_stored_epochs = check_stored_epochs
        self.stored_epochs: int | None = None  # the last epoch that MLflow has; None until MLflow is asked
        self.stored_steps: int | None = None  # the last optimizer step, likewise

    # The thread -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        while not self.stopping.is_set():
            if entries := self.next_entries():
                error = self.attempt(entries)
                self.report_connection(error)
                if error:
                    self.retry_now.wait(min(FIRST_PAUSE * 2 ** min(self.failures - 1, 10), LONGEST_PAUSE))
                    self.retry_now.clear()
            elif self.journal.postponed and time.monotonic() > self.next_retry:
                self.retry_postponed()
            else:
                with self.journal.changed:
                    if not self.next_entries() and not self.stopping.is_set():
                        self.journal.changed.wait(1.0)
        self.journal.close()

    def report_connection(self, error: StoreProblem | None) -> None:
        """Log when MLflow stops answering or accepting, and when it answers again."""
        server = f"MLflow at {without_secrets(self.uri)}"
        if error and not self.failures:
            logger.warning("%s. The run continues; operations wait in %s.", self.no_delivery(error), self.journal.place)
        elif not error and self.failures:
            logger.info("%s answers again. Delivering the operations that waited.", server)
        with self.journal.changed:
            self.failures = self.failures + 1 if error else 0
            self.attempts += 1
            self.journal.changed.notify_all()

    def no_delivery(self, problem: StoreProblem) -> str:
        """Say that nothing can be delivered now, and why."""
        verb = "does not accept the run's metrics and files" if problem.advice else "does not answer"
        return f"MLflow at {without_secrets(self.uri)} {verb} ({problem})"

    def flush(self, wait_s: float) -> None:
        """Wait until the queue is empty, at most ``wait_s`` seconds. Return early if MLflow does not answer."""
        if not self.journal.save():
            return
        with self.journal.changed:
            wait_s = min(wait_s, FLUSH_WAIT_WHEN_DOWN) if self.failures else wait_s
            deadline, attempts = time.monotonic() + wait_s, self.attempts
            self.retry_now.set()
            while self.journal.queue and (left := deadline - time.monotonic()) > 0:
                if self.failures and self.attempts > attempts:
                    return
                self.journal.changed.wait(left)

    def stop(self) -> int:
        """End the thread after the current call to MLflow. Returns the number of operations that are not delivered."""
        self.stopping.set()
        self.retry_now.set()
        with self.journal.changed:
            self.journal.changed.notify_all()
        self.join(timeout=1.0)  # a call that hangs keeps the journal locked until it, or this process, ends
        return self.journal.pending_count()

    # Delivery ---------------------------------------------------------------------------------------------------------

    def deliver_all(self) -> int:
        """Deliver all pending operations. Returns how many were delivered or rejected.

        Raises:
            UserError: MLflow does not answer.
        """
        before = self.journal.pending_count()
        while entries := self.next_entries():
            error = self.attempt(entries)
            if error and self.bad_requests:  # attempt() rejects it in the end, or all that waits behind it would stay
                time.sleep(FIRST_PAUSE)
            elif error:
                waiting = f"{self.journal.pending_count()} operations still wait in {self.journal.place}"
                raise UserError(f"{self.no_delivery(error)}; {waiting}")
        self.retry_postponed()
        return before - self.journal.pending_count()

    def next_entries(self) -> list[Entry]:
        """Return the queue's first entries that fit into one call: several with metrics, or one of another kind."""
        with self.journal.changed:
            entries: list[Entry] = []
            count = 0
            for entry in islice(self.journal.queue, MAX_METRICS):
                if not self.journal.may_deliver(entry):
                    break
                match entry.operation:
                    case LogMetrics(run_id=None) | LogSeries():
                        count += count_values(entry.operation)
                        if entries and count > MAX_METRICS:
                            break
                        entries.append(entry)
                    case _:
                        return entries or [entry]
            return entries

    def attempt(self, entries: Sequence[Entry]) -> StoreProblem | None:
        """Try to deliver the first entries of the queue.

        Returns:
            The reason if MLflow does not answer, or accepts nothing now; None if the entries are delivered, rejected or
            postponed.
        """
        keep_file = False
        try:
            self.deliver(entries)
        except Exception as error:  # networks, databases and artifact stores raise many types; no operation is lost
            problem, operation = self.explain(error), entries[0].operation
            if (
                self.is_refusal(error)
                or self.is_of_missing_run(operation, error)
                or self.is_unknown_to_server(operation, error)
            ):
                self.reject(entries[0], problem.reason)
                keep_file = True
            elif isinstance(operation, LogFile | LogModel) and self.run_is_readable():
                self.postpone(entries[0], str(problem))
                return None
            else:
                self.bad_requests = self.bad_requests + 1 if error_code(error) == "BAD_REQUEST" else 0
                return problem
        self.bad_requests = 0
        for entry in entries:
            self.journal.mark_done(entry, keep_file=keep_file)
        return None

    def retry_postponed(self) -> None:
        """Try each postponed operation once more. One that fails again stays postponed."""
        for entry in list(self.journal.postponed):
            try:
                self.deliver([entry])
            except Exception as error:  # as in attempt(); the first failure was logged
                if self.is_refusal(error):
                    self.reject(entry, self.explain(error).reason)
                    self.journal.mark_done(entry, keep_file=True)
            else:
                self.journal.mark_done(entry)
        self.next_retry = time.monotonic() + POSTPONED_PAUSE

    def deliver(self, entries: Sequence[Entry]) -> None:
        """Send entries to MLflow, as ``next_entries`` returns them.

        Raises:
            LostError: the line cannot be read, or its file is missing.
            Exception: any error of MLflow's client or of the artifact store.
        """
        entry, client = entries[0], self.client()
        file = self.journal.files_folder / entry.file
        if entry.file and not file.exists():
            raise LostError(f"{file} is missing")
        match entry.operation:
            case LogMetrics(run_id=None) | LogSeries():
                points = [point for each in entries for point in self.points_to_send(each.operation)]
                metrics = [metric for point in points for metric in as_metrics(point.values, point.time, point.step)]
                for i in range(0, len(metrics), MAX_METRICS):
                    self.deliver_metrics(metrics[i : i + MAX_METRICS])
                if tags := [tag for point in points for tag in infinite_tags(point.values, point.step)]:
                    client.log_batch(self.run_id, tags=tags)
            case LogParams(params):
                log_new_params(client, self.run_id, params)
            case LogMetrics(time, step, values, str(run_id)):
                client.log_batch(run_id, metrics=as_metrics(values, time, step), tags=infinite_tags(values, step))
            case OpenRun():
                client.update_run(self.run_id, status="RUNNING")
            case EndRun(status, end_time, run_id):
                client.set_terminated(run_id or self.run_id, status, end_time=end_time)
            case SetTags(tags, run_id):
                client.log_batch(run_id or self.run_id, tags=[RunTag(k, v) for k, v in tags.items()])
            case LogFile(path):
                if not self.journal.is_superseded(entry):
                    client.log_artifact(self.run_id, str(file), os.path.dirname(path) or None)
            case LogModel(checkpoint=checkpoint):
                upload_model(client, self.run_id, file, checkpoint)
            case LinkCheckpoints(links, finished):
                link_checkpoints(client, self.run_id, links, finished)
            case LogInputs(datasets):
                client.log_inputs(self.run_id, [as_dataset_input(each) for each in datasets])
            case Unreadable():
                raise LostError("the line is not an operation in JSON")

    def points_to_send(self, operation: Operation) -> list[LogMetrics]:
        """The points of an operation with metrics, without those that another driver has sent.

        MLflow is asked for these only if a driver opened the journal offline.
        """
        match operation:
            case LogMetrics(step=step, values=values):
                if self.check_stored_epochs and TRAIN_LOSS in values:
                    if self.stored_epochs is None:
                        self.stored_epochs = last_epoch_stored(self.client(), self.run_id)
                    if step <= self.stored_epochs:
                        return []
                return [operation]
            case LogSeries(names, rows):
                if self.check_stored_epochs and self.stored_steps is None:
                    self.stored_steps = last_step_stored(self.client(), self.run_id)
                return [
                    LogMetrics(int(time), int(step), dict(zip(names, values, strict=True)))
                    for time, step, *values in rows
                    if step > (self.stored_steps or 0)
                ]
        return []

    def deliver_metrics(self, metrics: list[Metric]) -> None:
        """Send metrics in one call. If MLflow refuses it, send halves, so that only the bad metrics are rejected."""
        if not metrics:
            return
        try:
            self.client().log_batch(self.run_id, metrics=metrics)
        except MlflowException as error:
            if not self.is_refusal(error):
                raise
            half = len(metrics) // 2
            if half:
                self.deliver_metrics(metrics[:half])
                self.deliver_metrics(metrics[half:])
                return
            (metric,) = metrics
            reason = self.explain(error).reason
            self.report_refusal(reason)
            refused = LogMetrics(metric.timestamp, metric.step, {metric.key: metric.value})
            self.journal.reject(refused, reason)

    def is_refusal(self, error: Exception) -> bool:
        """Return whether MLflow will never accept the operation, however often it is sent."""
        if isinstance(error, requests.HTTPError) and error.response is not None:
            return error.response.status_code in (400, 413)
        code = error_code(error)
        if code == "BAD_REQUEST":  # MLflow reports a lost database connection this way too; the next attempt reconnects
            return self.bad_requests >= MAX_BAD_REQUESTS
        if code == "INVALID_PARAMETER_VALUE":  # also the answer to all operations of a run that is deleted
            return self.deleted_run() is None
        return isinstance(error, LostError) or code == "RESOURCE_ALREADY_EXISTS"

    def is_of_missing_run(self, operation: Operation, error: Exception) -> bool:
        """Return whether an operation failed because it is for another run, such as a trial, that MLflow has not."""
        other = getattr(operation, "run_id", self.run_id) not in (None, self.run_id)
        return other and error_code(error) == "RESOURCE_DOES_NOT_EXIST" and self.run_is_readable()

    def is_unknown_to_server(self, operation: Operation, error: Exception) -> bool:
        """Return whether the server is of an older MLflow, which has no logged models."""
        new = isinstance(operation, LogModel | LinkCheckpoints | LogInputs)
        return new and error_code(error) == "ENDPOINT_NOT_FOUND" and self.run_is_readable()

    def deleted_run(self) -> StoreProblem | None:
        """Explain that this run or its experiment is deleted in MLflow; None if it is not, or is not known."""
        with suppress(Exception):  # what is wrong shows in the error that led here
            run = self.client().get_run(self.run_id)
            return explain_deleted(run, self.client().get_experiment(run.info.experiment_id), self.uri)
        return None

    def client(self) -> MlflowClient:
        """Return the client. It is created on first use, because creating it for a database already connects."""
        self.connection = self.connection or MlflowClient(self.uri)
        return self.connection

    def run_is_readable(self) -> bool:
        """Return whether MLflow answers now and has the run."""
        try:
            self.client().get_run(self.run_id)
        except Exception:  # any failure means no; the caller reports it
            return False
        return True

    def postpone(self, entry: Entry, reason: str) -> None:
        if not self.postponement_reported:
            self.postponement_reported = True
            operation = entry.operation
            logger.warning(
                "MLflow does not store %s (%s). It is kept with %s and tried again.",
                operation.path if isinstance(operation, LogFile) else "the model",
                reason,
                self.journal.place,
            )
        self.journal.postpone(entry)

    def reject(self, entry: Entry, reason: str) -> None:
        self.report_refusal(reason)
        self.journal.reject(entry.operation, reason)

    def report_refusal(self, reason: str) -> None:
        """Log the first refusal."""
        if not self.refusal_reported:
            self.refusal_reported = True
            logger.warning(
                "MLflow refuses an operation (%s). Refused operations are kept in %s.",
                reason,
                self.journal.rejected_place,
            )

    def explain(self, error: Exception) -> StoreProblem:
        """Explain an error in one line without secrets."""
        deleted = self.deleted_run() if error_code(error) == "INVALID_PARAMETER_VALUE" else None
        return deleted or explain_store_error(error, self.uri)


def count_values(operation: LogMetrics | LogSeries) -> int:
    """Return the number of values of an operation with metrics."""
    return len(operation.values) if isinstance(operation, LogMetrics) else len(operation.rows) * len(operation.names)


def sync_journals(folder: str | Path, uri: str | None = None) -> int:
    """Deliver the pending operations of all journals of a run or a study. It can be repeated at any time.

    Args:
        folder: of the run or the study; on a local storage also its ``tracking`` folder, or a journal file.
        uri: the tracking URI to use instead of the journal's. The journal's has no user and password: give them in
            ``MLFLOW_TRACKING_URI``, or in ``MLFLOW_TRACKING_USERNAME`` and ``MLFLOW_TRACKING_PASSWORD``.

    Returns:
        The number of operations that remain because MLflow's artifact store did not accept them.

    Raises:
        UserError: there is no journal, an active run holds it, or MLflow does not answer.
        OSError: a remote storage does not answer.
    """
    prepare_mlflow()
    folder = str(folder)
    found = find_journals(folder)
    if not found:
        raise UserError(f"{folder} holds no tracking journal; expected the folder of a run, or its {FOLDER}/{FILE}")
    if storage.is_remote(folder):
        with leased(folder) as lease:
            return sum(sync_journal(RemoteJournal(journal, lease), uri) for journal in found)
    left = 0
    for file in map(Path, found):
        if JournalState.read(file).run_id is None and file.stat().st_size:  # opening it would cut it off
            raise UserError(f"{file} is not a tracking journal: it names no MLflow run")
        left += sync_journal(Journal(file), uri)
    return left


def sync_journal(journal: Journal, uri: str | None) -> int:
    """Deliver the pending operations of an open journal, and close it. Returns the number of those that remain.

    Args:
        uri: as in ``sync_journals``.

    Raises:
        UserError: MLflow does not answer.
    """
    try:
        state = journal.state
        if state.run_id is None or state.uri is None:  # nothing was ever written to it
            return 0
        from_env = os.environ.get("MLFLOW_TRACKING_URI", "")
        target = uri or (from_env if without_secrets(from_env) == state.uri else state.uri)
        prepare_sqlite(target)
        journal.save()
        worker = DeliveryWorker(journal, target, state.run_id, check_stored_epochs=state.opened_offline)
        count = worker.deliver_all()
        left = journal.pending_count()
        logger.info("%s: %d operations delivered to MLflow run %s, %d left", journal.place, count, state.run_id, left)
        return left
    finally:
        journal.finish()
        journal.close()
