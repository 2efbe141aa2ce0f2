"""MLflow's logged models of a run's checkpoints.

A logged model is a row in MLflow with params, tags and metrics, which ``mlflow.search_logged_models`` finds over all
runs. Here it is a link: the checkpoint's files stay in the run's folder, which the tag ``checkpoint`` names. Only the
model with the name ``model`` also has files in MLflow (``pipelines.registry.model_files``).

MLflow stores a metric of a model twice: with the model, and with the run that measured it. The copy in the run is the
run's own point, and no second one, if it has the same time. So these functions ask the run for the times.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, Metric, Run

from pipelines.runs.checkpoints import CheckpointInfo
from posmlp.metrics import TRAIN_LOSS

UPLOADED = "model"  # name of the logged model that has files in MLflow
CHECKPOINT, STEP, EPOCH = "checkpoint", "step", "epoch"  # tags of a checkpoint's logged model


@dataclass(frozen=True)
class CheckpointLink:
    """A checkpoint, as MLflow should know it.

    Attributes:
        uri: the checkpoint's folder.
        step: number of optimizer steps.
        epoch: number of finished epochs, MLflow's step of the metrics.
        metrics: of that epoch.
        run_id: the MLflow run that has these metrics.
        datasets: name and digest of the data set by the prefix of the metrics that were measured on it.
    """

    uri: str
    step: int
    epoch: int
    metrics: Mapping[str, float]
    run_id: str
    datasets: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its logged model: that of its folder."""
        return f"step-{self.step:010d}"

    @property
    def tags(self) -> dict[str, str]:
        """The tags of its logged model."""
        return {CHECKPOINT: self.uri, STEP: str(self.step), EPOCH: str(self.epoch)}


def link_to(uri: str, info: CheckpointInfo, run_id: str, datasets: Mapping[str, Sequence[str]]) -> CheckpointLink:
    """The link to a checkpoint.

    Args:
        uri: its folder.
        run_id, datasets: as in ``CheckpointLink``.
    """
    return CheckpointLink(uri, info.step, info.epoch, dict(info.metrics), run_id, datasets)


def link_checkpoints(client: MlflowClient, run_id: str, links: Iterable[CheckpointLink], finished: bool) -> None:
    """Make the logged models of a run those of these checkpoints, one each. It can be repeated.

    The model with files stands for its checkpoint, too. The other logged models of the run's checkpoints are deleted.

    Args:
        finished: the run is finished, so that no checkpoint will be removed: list the models as the run's outputs.
    """
    run, wanted, models = client.get_run(run_id), {link.step: link for link in links}, []
    existing = models_of_run(client, run)
    uploaded = {model.tags.get(STEP) for model in existing if model.name == UPLOADED}
    for model in existing:
        tag = model.tags.get(STEP)
        if model.name != UPLOADED and tag is not None and (tag in uploaded or int(tag) not in wanted):
            client.delete_logged_model(model.model_id)
    for step, link in wanted.items():
        found = [model for model in existing if model.tags.get(STEP) == str(step)]
        found.sort(key=lambda model: model.name != UPLOADED)
        model = found[0] if found else create_link(client, run, link)
        log_checkpoint_metrics(client, model, link)
        models.append((model.model_id, link.epoch))
    if finished:
        add_outputs(client, run, models)


def models_of_run(client: MlflowClient, run: Run, condition: str = "") -> list[LoggedModel]:
    """The logged models that a run made.

    Args:
        condition: a further condition, as in ``AND name = 'model'``.
    """
    found: list[LoggedModel] = []
    token: str | None = None
    where = f"source_run_id = '{run.info.run_id}' {condition}".strip()
    while True:
        page = client.search_logged_models([run.info.experiment_id], where, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def create_link(client: MlflowClient, run: Run, link: CheckpointLink) -> LoggedModel:
    """Create the logged model of a checkpoint, with the params of its run."""
    model = client.create_logged_model(
        run.info.experiment_id, link.name, run.info.run_id, tags=link.tags, params=dict(run.data.params)
    )
    return client.finalize_logged_model(model.model_id, "READY")


def checkpoint_model(client: MlflowClient, run_id: str, link: CheckpointLink) -> LoggedModel:
    """The logged model of a run's checkpoint; it is created if there is none."""
    run = client.get_run(run_id)
    found = models_of_run(client, run, f"AND tags.{STEP} = '{link.step}'")
    if found:
        return min(found, key=lambda model: model.name != UPLOADED)
    model = create_link(client, run, link)
    log_checkpoint_metrics(client, model, link)
    return model


def log_checkpoint_metrics(client: MlflowClient, model: LoggedModel, link: CheckpointLink) -> None:
    """Link the metrics of a checkpoint's epoch to its logged model, each once.

    Those that are not finite are left out: MLflow would store a NaN as 0.
    """
    known = {(metric.key, metric.step) for metric in model.metrics or []}
    values = {
        key: value for key, value in link.metrics.items() if math.isfinite(value) and (key, link.epoch) not in known
    }
    if values:
        at = time_of_epoch(client, link)
        client.log_batch(link.run_id, metrics=[as_model_metric(model, link, key, values[key], at) for key in values])


def time_of_epoch(client: MlflowClient, link: CheckpointLink) -> int:
    """When the run logged the metrics of the link's epoch, in milliseconds since 1970; now, if it has not."""
    history = client.get_metric_history(link.run_id, TRAIN_LOSS) if TRAIN_LOSS in link.metrics else []
    times = [m.timestamp for m in history if m.step == link.epoch and m.value == link.metrics[TRAIN_LOSS]]
    return times[-1] if times else int(time.time() * 1000)


def as_model_metric(model: LoggedModel, link: CheckpointLink, key: str, value: float, at: int) -> Metric:
    """A metric of a checkpoint's logged model, with the data set that it was measured on, if that is known."""
    name, digest = next((each for prefix, each in link.datasets.items() if key.startswith(prefix)), (None, None))
    return Metric(key, value, at, link.epoch, model.model_id, dataset_name=name, dataset_digest=digest)


def add_outputs(client: MlflowClient, run: Run, models: Iterable[tuple[str, int]]) -> None:
    """List logged models as a run's outputs, each once.

    Args:
        models: their ids, and MLflow's step for each.
    """
    known = {output.model_id for output in (run.outputs.model_outputs if run.outputs else [])}
    if new := [LoggedModelOutput(model_id, step=step) for model_id, step in models if model_id not in known]:
        client.log_outputs(run.info.run_id, new)
