"""MLflow's logged models and data sets of a run: one a checkpoint, once, with the metrics of its step."""

import json
import math
import sqlite3

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND

from pipelines.registry.datasets import datasets_of_metrics, describe_splits
from pipelines.registry.logged_models import CheckpointLink
from pipelines.tracking.delivery import sync_journals
from pipelines.training.preflight import list_fingerprint, read_splits
from tests.helpers.small_runs import active_uri, recipe_for
from tests.helpers.tracker_runs import link, once, rows, start, write_linear

pytestmark = pytest.mark.usefixtures("short_pauses")


def models_of(folder, run_id):
    """The logged models of a run by name."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_run(run_id).info.experiment_id
    return {m.name: m for m in client.search_logged_models([experiment], f"source_run_id='{run_id}'")}


def deliver_again(folder):
    """As if the process was killed after the delivery and before its record."""
    (folder / "journal.done").unlink()
    assert sync_journals(folder) == 0


def test_each_checkpoint_is_one_logged_model_with_the_metrics_of_its_epoch(tmp_path):
    tracker = start(tmp_path)
    for epoch, top1 in ((1, 0.25), (2, 0.75)):
        tracker.log_metrics({"train/loss": 1 / epoch, "val/top1": top1, "val/loss": math.nan}, step=epoch)
    links = [
        CheckpointLink(
            f"/runs/small/checkpoints/step-{step:010d}",
            step,
            epoch,
            {"train/loss": 1 / epoch, "val/top1": top1, "val/loss": math.nan},
            tracker.run_id,
            {"val/": ["motion/val.csv", "abc"]},
        )
        for step, epoch, top1 in ((12, 1, 0.25), (24, 2, 0.75))
    ]
    tracker.link_checkpoints([*links, link(tracker.run_id, step=30, epoch=2)], finished=True)
    assert tracker.close("FINISHED") == 0
    deliver_again(tmp_path)

    found = models_of(tmp_path, tracker.run_id)
    assert [*sorted(found)] == ["step-0000000012", "step-0000000024", "step-0000000030"]
    best = found["step-0000000024"]
    assert best.tags == {"checkpoint": "/runs/small/checkpoints/step-0000000024", "step": "24", "epoch": "2"}
    assert (str(best.status), best.params["model.name"]) == ("READY", "tiny")
    values = {m.key: (m.value, m.step, m.dataset_name, m.dataset_digest) for m in best.metrics}
    assert values == {"train/loss": (0.5, 2, None, None), "val/top1": (0.75, 2, "motion/val.csv", "abc")}
    assert not found["step-0000000030"].metrics  # saved within an epoch
    outputs = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(tracker.run_id).outputs.model_outputs
    assert sorted((each.model_id, each.step) for each in outputs) == sorted(
        (found[name].model_id, step)
        for name, step in (("step-0000000012", 1), ("step-0000000024", 2), ("step-0000000030", 2))
    )
    for key in ("train/loss", "val/top1", "val/loss"):  # the run's own points are not doubled
        assert rows(tmp_path / "mlflow.db", tracker.run_id, key) == once(1, 2)
    with active_uri(f"sqlite:///{tmp_path}/mlflow.db"):
        order = [{"field_name": "metrics.val/top1", "ascending": False}]
        table = mlflow.search_logged_models(["1"], order_by=order, output_format="list")
    assert table[0].tags["checkpoint"] == "/runs/small/checkpoints/step-0000000024"


def test_links_follow_the_checkpoints_that_are_kept(tmp_path):
    tracker = start(tmp_path)
    tracker.link_checkpoints([link(tracker.run_id, 12), link(tracker.run_id, 24)], finished=False)
    assert tracker.close("KILLED") == 0
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert not client.get_run(tracker.run_id).outputs.model_outputs  # one may be removed when the run is resumed
    first = models_of(tmp_path, tracker.run_id)["step-0000000024"]

    tracker = start(tmp_path, run_id=tracker.run_id)
    tracker.link_checkpoints([link(tracker.run_id, 24), link(tracker.run_id, 36, 3)], finished=False)
    assert tracker.close("FINISHED") == 0
    deliver_again(tmp_path)
    found = models_of(tmp_path, tracker.run_id)
    assert [*sorted(found)] == ["step-0000000024", "step-0000000036"]
    assert found["step-0000000024"].model_id == first.model_id


def test_the_model_with_files_stands_for_its_checkpoint(tmp_path):
    tracker = start(tmp_path)
    tracker.log_metrics({"train/loss": 1.0, "val/top1": 0.5}, step=1)
    best = CheckpointLink("/best", 12, 1, {"train/loss": 1.0, "val/top1": 0.5}, tracker.run_id)
    tracker.link_checkpoints([best], finished=False)  # as if the run had been stopped before its end
    tracker.log_model(write_linear, best)
    tracker.link_checkpoints([best, link(tracker.run_id, 24, 2)], finished=True)
    assert tracker.close("FINISHED") == 0
    found = models_of(tmp_path, tracker.run_id)
    assert [*sorted(found)] == ["model", "step-0000000024"]
    assert (found["model"].tags["checkpoint"], found["model"].tags["step"]) == ("/best", "12")
    assert {m.key: m.value for m in found["model"].metrics} == {"train/loss": 1.0, "val/top1": 0.5}
    assert rows(tmp_path / "mlflow.db", tracker.run_id, "val/top1") == once(1)


def test_a_server_without_logged_models_costs_one_warning(tmp_path, lines):
    tracker = start(tmp_path)
    client = tracker.delivery.client()

    class Old:
        def __getattr__(self, name):
            if "logged_model" in name:
                raise MlflowException("failed with error code 404 != 200", error_code=ENDPOINT_NOT_FOUND)
            return getattr(client, name)

    tracker.delivery.connection = Old()
    tracker.link_checkpoints([link(tracker.run_id)], finished=True)
    tracker.log_model(write_linear, link(tracker.run_id))
    tracker.log_metrics({"train/loss": 1.0}, step=1)
    assert tracker.close("FINISHED") == 0
    assert rows(tmp_path / "mlflow.db", tracker.run_id) == once(1)
    assert len(lines) == 1 and "MLflow refuses an operation" in lines[0]


def test_the_lists_of_a_run_are_its_data_sets(motion_set, tmp_path):
    config = recipe_for(tmp_path, motion_set, "model.num_classes=8")
    train_set, val_set = read_splits(config)
    lists = {"train": list_fingerprint(train_set), "val": list_fingerprint(val_set)}
    described = describe_splits(config.data, train_set, val_set, lists)
    tracker = start(tmp_path)
    tracker.log_inputs(described)
    assert tracker.close("FINISHED") == 0
    deliver_again(tmp_path)

    run = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(tracker.run_id)
    training, validation = sorted(run.inputs.dataset_inputs, key=lambda each: each.tags[0].value)
    assert [(each.key, each.value) for each in (*training.tags, *validation.tags)] == [
        ("mlflow.data.context", "training"),
        ("mlflow.data.context", "validation"),
    ]
    assert validation.dataset.name == f"{motion_set.name}/val.csv"
    assert lists["val"].endswith(validation.dataset.digest) and len(validation.dataset.digest) == 16
    assert json.loads(validation.dataset.profile) == {
        "num_rows": 16,
        "videos_by_class": dict.fromkeys(val_set.classes, 2),
    }
    assert [each["name"] for each in json.loads(training.dataset.schema)["mlflow_colspec"]] == [
        "sample_id",
        "uri",
        "label",
    ]
    assert mlflow.data.get_source(training).load() == str(motion_set / "train.csv")
    assert datasets_of_metrics(described)["val/"] == [validation.dataset.name, validation.dataset.digest]
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        assert connection.execute("SELECT count(*) FROM datasets").fetchone() == (2,)
