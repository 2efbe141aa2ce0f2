"""The tracker of a run or a study: the driver's way to write to MLflow.

One process, the driver, writes. Each write is appended to a journal in the run's folder
(``pipelines.tracking.journal``), and a thread delivers the journal to MLflow in order
(``pipelines.tracking.delivery``). So training neither waits for MLflow nor fails with it. What MLflow does not accept
now is delivered later: by the same driver, by the driver that resumes the run, or by ``posmlp sync``. Operations that
are delivered twice after a kill do no harm: MLflow's databases store a metric with the same key, time, step and value
once.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from pipelines.registry.logged_models import CheckpointLink
from pipelines.runs.lease import Lease
from pipelines.tracking.delivery import DeliveryWorker
from pipelines.tracking.journal import Journal
from pipelines.tracking.mlflow_client import (
    MAX_PARAM_LENGTH,
    MAX_TAG_LENGTH,
    check_schema,
    create_run,
    error_code,
    explain_deleted,
    explain_moved,
    explain_store_error,
    last_epoch_stored,
    last_step_stored,
    now_ms,
    prepare_mlflow,
    prepare_sqlite,
    share_view,
)
from pipelines.tracking.node_monitors import ClusterMonitor, SystemMetrics
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
    SetTags,
)
from pipelines.tracking.uris import (
    PARENT,
    RUNS_VIEW,
    run_link,
    runs_view,
    scrub,
    tracking_uri,
    view_link,
    without_secrets,
)
from posmlp.config import Config
from posmlp.errors import UserError
from posmlp.metrics import BY_STEP, MAIN_METRICS
from posmlp.text import shorten

logger = logging.getLogger(__name__)

CLOSE_WAIT = 20.0  # seconds that close() waits for the delivery of the last operations
MODEL_WAIT = 600.0  # seconds that log_model() waits for the upload of a model


@dataclass
class RunEnd:
    """How a run has ended in MLflow.

    Attributes:
        undelivered: number of operations that MLflow has not received; ``posmlp sync`` delivers them.
    """

    undelivered: int = 0


class Tracker:
    """Writes to one MLflow run. Only ``open``, ``log_model`` and ``close`` wait for MLflow.

    Attributes:
        run_id: the MLflow run.
        uri: the tracking URI, with user and password if it has them.
        place: the experiment, the store and the run, for a log line; without secrets.
        experiment_id: the MLflow experiment; None if MLflow did not answer.
        journal: what is not delivered yet.
        delivery: the thread that delivers the journal.
        system_metrics: the thread that samples CPU, memory, disk, network and GPU.
    """

    def __init__(
        self,
        journal: Journal,
        delivery: DeliveryWorker,
        last_epoch: int,
        next_system_step: int,
        place: str,
        monitor_cluster: bool = True,
        last_step: int = 0,
        experiment_id: str | None = None,
    ):
        """
        Args:
            last_epoch: the last epoch whose metrics MLflow or the journal already has.
            next_system_step: MLflow step of the first system metrics.
            place: see above.
            monitor_cluster: sample all nodes of the cluster, not only the driver's.
            last_step: the last optimizer step whose metrics MLflow or the journal already has.
            experiment_id: see above.
        """
        self.journal, self.delivery = journal, delivery
        self.run_id, self.uri = delivery.run_id, delivery.uri
        self.last_epoch, self.last_step = last_epoch, last_step
        self.place, self.experiment_id = place, experiment_id
        cluster = ClusterMonitor() if monitor_cluster else None
        self.system_metrics = SystemMetrics(self.log_system_metrics, next_system_step, cluster)
        delivery.start()
        self.system_metrics.start()

    @classmethod
    def open(
        cls,
        config: Config,
        tags: Mapping[str, str],
        run_id: str | None = None,
        *,
        journal: Journal,
        params: Mapping[str, Any] | None = None,
    ) -> Tracker:
        """Start a new MLflow run, or resume the run ``run_id``. Resuming works while MLflow is down.

        Args:
            tags: tags of a new run.
            journal: of the run or the study, open, so that no other process opens the same run. It is closed together
                with the tracker, and if this fails.
            params: further params of a new run, next to the keys of the recipe.

        Raises:
            UserError: MLflow cannot be reached or written for a new run, or it has no run ``run_id``.
        """
        try:
            return cls.open_run(config, tags, run_id, journal, params)
        except BaseException:
            journal.finish()
            journal.close()
            raise

    @classmethod
    def open_run(
        cls,
        config: Config,
        tags: Mapping[str, str],
        run_id: str | None,
        journal: Journal,
        params: Mapping[str, Any] | None,
    ) -> Tracker:
        """As ``open``; the journal stays open if it fails."""
        prepare_mlflow()
        uri = tracking_uri(config)
        store = f"MLflow at {without_secrets(uri)}"
        check_schema(uri)
        if run_id is None:
            prepare_sqlite(uri)
        if journal.state.run_id not in (None, run_id):  # it is that of an earlier run of this name
            journal.archive()
        state = journal.state
        stored_epochs, stored_steps, experiment, experiment_id = None, 0, config.tracking.experiment, None
        try:
            client = MlflowClient(uri)
            if run_id is None:
                run_id = create_run(client, config, tags, params)
            run = client.get_run(run_id)  # fails for an unknown run; the last call would return no epochs
            found = client.get_experiment(run.info.experiment_id)
            if deleted := explain_deleted(run, found, uri):
                raise UserError(f"{store}: {deleted}, or choose another name for a new run (name=...)")
            experiment, experiment_id = found.name, found.experiment_id
            if moved := explain_moved(found, uri):
                logger.warning("%s", moved)
            share_view(client, found, RUNS_VIEW, runs_view(MAIN_METRICS[config.task]))
            stored_epochs, stored_steps = last_epoch_stored(client, run_id), last_step_stored(client, run_id)
        except UserError:
            raise
        except Exception as error:  # networks, databases and artifact stores raise many types
            problem, see = explain_store_error(error, uri), "see tracking.uri and MLFLOW_TRACKING_URI"
            if error_code(error) == "RESOURCE_DOES_NOT_EXIST":
                raise UserError(
                    f"{store} cannot be written, {see}: {problem}. If another store has the run, name that one; "
                    "otherwise choose another name for a new run (name=...)"
                ) from error
            if run_id is None:
                hint = f" (experiment {experiment!r})" if problem.advice else f", {see}"
                raise UserError(f"{store} cannot be written{hint}: {problem}") from error
        offline = stored_epochs is None
        journal.append(OpenRun(without_secrets(uri), run_id, offline))
        delivery = DeliveryWorker(journal, uri, run_id, check_stored_epochs=state.opened_offline or offline)
        # The trials of a study share the cluster: only the study's own run samples all nodes.
        is_trial = PARENT in tags
        last_epoch = max(state.last_epoch, stored_epochs or 0)
        place = f"experiment {experiment!r} at {without_secrets(uri)}, run {run_id}"
        return cls(
            journal,
            delivery,
            last_epoch,
            state.next_system_step,
            place,
            monitor_cluster=not is_trial,
            last_step=max(state.last_step, stored_steps),
            experiment_id=experiment_id,
        )

    def log_metrics(self, metrics: Mapping[str, float], step: int, run_id: str | None = None) -> None:
        """Log one set of metrics of this run, or of another one, such as a trial of this study."""
        self.journal.append(LogMetrics(now_ms(), step, as_floats(metrics), run_id))

    def log_system_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log a sample of system metrics. A power cut may lose the last ones: they are not forced to the disk."""
        self.journal.append(LogMetrics(now_ms(), step, as_floats(metrics)), durable=False)

    def log_steps(self, rows: Sequence[Sequence[float]]) -> None:
        """Log metrics of optimizer steps (``posmlp.metrics.BY_STEP``), except of steps that were logged before.

        A power cut may lose the last ones: they are not forced to the disk.

        Args:
            rows: for each point, milliseconds since 1970, the optimizer step, and a value per metric.
        """
        new = [row for row in rows if row[1] > self.last_step]
        if new:
            self.last_step = int(new[-1][1])
            self.journal.append(LogSeries(BY_STEP, new), durable=False)

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log params of this run. A param that it already has keeps its value."""
        self.journal.append(LogParams({name: shorten(str(value), MAX_PARAM_LENGTH) for name, value in params.items()}))

    def log_tags(self, tags: Mapping[str, str], run_id: str | None = None) -> None:
        """Set tags of this run, or of another one, such as a trial of this study."""
        texts = {name: shorten(scrub(str(text), self.uri), MAX_TAG_LENGTH) for name, text in tags.items()}
        self.journal.append(SetTags(texts, run_id or self.run_id))

    def end_run(self, run_id: str, status: str) -> None:
        """End another run, whose own driver died."""
        self.journal.append(EndRun(status, now_ms(), run_id))

    def log_file(self, path: str, content: bytes) -> None:
        """Store an artifact. The same path again replaces it; versions that were not delivered yet are skipped."""
        self.journal.append_file(LogFile(path), path, content)

    def log_table(self, rows: Iterable[Mapping[str, Any]], path: str) -> None:
        """Store rows as a JSON artifact."""
        self.log_file(path, json.dumps(list(rows), indent=1).encode())

    def log_model(self, write: Callable[[Path], None], checkpoint: CheckpointLink) -> None:
        """Store the model of a checkpoint, as ``runs:/RUN_ID/model`` in MLflow.

        The model is written to the disk of this node first, and stays there while MLflow does not answer.

        Args:
            write: writes MLflow's files of the model into a new folder.
            checkpoint: whose model it is.
        """
        folder = self.journal.files_folder / "exported"
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            write(folder)
        except OSError as error:
            self.journal.warn_unwritable(error)
            return
        self.journal.append_file(LogModel(now_ms(), checkpoint=checkpoint), "model", folder)
        self.delivery.flush(MODEL_WAIT)

    def link_checkpoints(self, links: Sequence[CheckpointLink], *, finished: bool) -> None:
        """Make the run's logged models those of these checkpoints: links, without files."""
        self.journal.append(LinkCheckpoints(links, finished))

    def log_inputs(self, datasets: Sequence[Mapping[str, str]]) -> None:
        """Log the run's lists of videos, as ``pipelines.registry.datasets.describe_list`` describes them."""
        self.journal.append(LogInputs(datasets))

    def share_view(self, name: str, view: Mapping[str, Any]) -> None:
        """Store a view of MLflow's pages in the experiment. Without it, a link that names the view works too."""
        if self.experiment_id is not None:
            with suppress(Exception):  # MLflow is down again
                client = MlflowClient(self.uri)
                share_view(client, client.get_experiment(self.experiment_id), name, view)

    def links(self) -> dict[str, str]:
        """Links into MLflow's pages, by what they show; empty if MLflow did not answer when the run was opened."""
        if self.experiment_id is None:
            return {}
        runs = view_link(self.uri, self.experiment_id, RUNS_VIEW)
        return {"this run": run_link(self.uri, self.experiment_id, self.run_id), "all runs": runs}

    def epochs_logged(self) -> int:
        """Return the number of epochs whose metrics MLflow or the journal had when this tracker was opened."""
        return self.last_epoch

    def close(self, status: str, wait_s: float = CLOSE_WAIT) -> int:
        """End the run.

        Args:
            status: FINISHED, FAILED or KILLED.
            wait_s: longest time for the delivery, in seconds; shorter if MLflow does not answer.

        Returns:
            The number of operations that are not delivered. They stay in the journal for ``posmlp sync``.
        """
        self.system_metrics.stop()
        self.journal.append(EndRun(status, now_ms()))
        self.delivery.flush(wait_s)
        left = self.delivery.stop()
        self.journal.finish()
        return left

    @contextmanager
    def ending(self, folder: str, lease: Lease | None) -> Iterator[RunEnd]:
        """End the run with the block: as FINISHED, as KILLED by a signal, and as FAILED by another exception.

        Args:
            folder: of the run or the study, for a message.
            lease: of the folder; if it is lost, another process drives the run, and nothing more is sent.
        """
        end, status = RunEnd(), "FAILED"
        try:
            yield end
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            if lease and lease.lost:
                self.abandon()
            elif left := self.close(status):
                end.undelivered = left
                logger.warning("%d operations wait for MLflow; `posmlp sync %s` delivers them", left, folder)

    def abandon(self) -> None:
        """Send nothing more: another process drives the run now, and continues its MLflow run."""
        self.system_metrics.stop()
        self.delivery.stop()
        self.journal.finish()


def as_floats(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics with plain floats for NumPy's and torch's."""
    return {name: float(value) for name, value in metrics.items()}
