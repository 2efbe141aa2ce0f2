"""Evaluation over the cluster: equal to a plain loop, every video once, written down, logged, and what is refused."""

import csv
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient

from pipelines.inference import scoring
from pipelines.inference.evaluate import evaluate
from pipelines.inference.export import export
from pipelines.inference.predict import predict
from pipelines.registry.model_files import save_model_files
from pipelines.tracking.uris import tracking_uri
from posmlp.errors import UserError
from posmlp.export import load_exported
from posmlp.video.clip import load_clips
from posmlp.video.manifest import read_split
from tests.helpers.log_lines import log_lines
from tests.helpers.published_model import published_logits, write_imported_run
from tests.helpers.random_models import plain_shares
from tests.helpers.untrained_run import CLASSES

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def found(local_ray, untrained_run):
    """The evaluation with 2 x 3 views on 2 workers, its printed lines, and a plain loop's probabilities by sample."""
    with log_lines() as lines:
        result = evaluate(untrained_run["run"], (2, 3), workers=2)
    rows = [
        r
        for r in read_split(untrained_run["config"].data, "val").rows.to_pylist()
        if r["uri"] != untrained_run["broken"]
    ]
    plain = [plain_shares(untrained_run["model"], untrained_run["config"], row["uri"], 2, 3) for row in rows]
    return result, lines, rows, np.array(plain)


def test_the_figures_are_those_of_a_plain_loop(found):
    result, _, rows, plain = found
    labels = np.array([row["label"] for row in rows])
    right = plain.argmax(1) == labels
    top5 = (np.argsort(-plain)[:, :5] == labels[:, None]).any(1)
    assert result.metrics["videos"] == len(rows) == 13
    assert result.metrics["top1"] == pytest.approx(right.mean())
    assert result.metrics["top5"] == pytest.approx(top5.mean())
    assert result.metrics["class_mean"] == pytest.approx(np.mean([right[labels == c].mean() for c in set(labels)]))
    losses = -np.log(plain[np.arange(len(labels)), labels])
    assert result.metrics["loss"] == pytest.approx(losses.mean(), rel=1e-4)
    for label, c in enumerate(result.classes):
        mine = labels == label
        assert (c.name, c.videos) == (CLASSES[label], mine.sum())
        assert c.top1 == (pytest.approx(right[mine].mean()) if mine.any() else None)
        assert c.top5 == (pytest.approx(top5[mine].mean()) if mine.any() else None)


def test_every_view_of_every_good_video_is_written_once(found):
    result, _, rows, plain = found
    table = pq.read_table(f"{result.path}/scores.parquet")
    assert json.loads(table.schema.metadata[b"classes"]) == CLASSES
    assert table["sample_id"].to_pylist() == [row["sample_id"] for row in rows for _ in range(6)]
    assert table["label"].to_pylist() == [row["label"] for row in rows for _ in range(6)]
    assert table["uri"].to_pylist() == [row["uri"] for row in rows for _ in range(6)]
    assert table["view"].to_pylist() == list(range(6)) * 13
    assert table["clip"].to_pylist() == [0, 0, 0, 1, 1, 1] * 13
    assert table["crop"].to_pylist() == [0, 1, 2] * 26
    shares = np.exp(np.array(table["scores"].to_pylist())).reshape(13, 6, 8)
    np.testing.assert_allclose(shares.mean(1), plain, atol=1e-5)
    assert shares.std(1).max() > 1e-3  # the views differ


def test_what_is_written_says_what_was_evaluated(found, untrained_run):
    result, lines, _, _ = found
    assert result.path == f"{untrained_run['run']}/evaluations/val-2x3-step0000000012"
    folder = Path(result.path)
    noted = json.loads((folder / "summary.json").read_text())
    assert (noted["checkpoint"], noted["step"], noted["epoch"]) == (untrained_run["checkpoint"], 12, 1)
    assert (noted["split"], noted["views"], noted["metrics"]) == ("val", [2, 3], result.metrics)
    assert [video["uri"] for video in noted["bad"]] == [untrained_run["broken"]] == [video.uri for video in result.bad]
    assert noted["bad"][0]["reason"]
    table = list(csv.DictReader((folder / "per_class.csv").read_text().splitlines()))
    assert [row["class"] for row in table] == CLASSES
    assert (table[7]["videos"], table[7]["top1"]) == ("0", "")
    assert (folder / "confusion.png").read_bytes()[:4] == b"\x89PNG"
    assert f"{untrained_run['checkpoint']} (step 12, epoch 1): val, 14 videos x 2x3 views, workers: 2" in lines[1]
    assert untrained_run["broken"] in str(result)


def test_the_mlflow_run_gets_the_results_and_keeps_its_status(found, untrained_run):
    result, _, _, _ = found
    client = MlflowClient(tracking_uri(untrained_run["config"]))
    (run,) = client.search_runs(["1"])
    assert run.info.run_id == result.mlflow_run_id
    assert (run.info.status, run.info.end_time) == ("FINISHED", 123456789)
    logged = {k: v for k, v in run.data.metrics.items() if k.startswith("test/")}
    assert logged == {f"test/{k}": v for k, v in result.metrics.items()}
    assert [m.step for m in client.get_metric_history(run.info.run_id, "test/top1")] == [12]
    assert run.data.tags["evaluation.test"] == result.name
    names = {f.path for f in client.list_artifacts(run.info.run_id, f"evaluation/{result.name}")}
    assert {name.rpartition("/")[2] for name in names} == set(os.listdir(result.path))


def test_the_checkpoints_logged_model_gets_them_too(found, untrained_run):
    result, *_ = found
    client = MlflowClient(tracking_uri(untrained_run["config"]))
    (model,) = client.search_logged_models(["1"], f"source_run_id = '{result.mlflow_run_id}'")
    assert (model.tags["checkpoint"], model.tags["step"]) == (untrained_run["checkpoint"], "12")
    assert {m.key: m.value for m in model.metrics} == {f"test/{k}": v for k, v in result.metrics.items()}
    assert {m.dataset_name for m in model.metrics} == {"/".join(untrained_run["config"].data.val.path.split("/")[-2:])}


def test_the_model_for_mlflow_has_the_same_accuracy(found, untrained_run, tmp_path, monkeypatch):
    result, _, rows, plain = found
    monkeypatch.setattr(sys, "path", [*sys.path])
    save_model_files(untrained_run["run"], tmp_path / "model")
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    tops = model.predict(pd.DataFrame({"video": [r["uri"] for r in rows]}), params={"top": 8, "views": "2x3"})["top"]
    right = [CLASSES.index(top[0]["class"]) == row["label"] for top, row in zip(tops, rows, strict=True)]
    assert sum(right) / len(right) == result.metrics["top1"]
    shares = [{each["class"]: each["probability"] for each in top} for top in tops]
    np.testing.assert_allclose([[each[name] for name in CLASSES] for each in shares], plain, atol=1e-5)


def test_a_copied_checkpoint_is_evaluated_into_a_new_run_though_a_scorer_dies(
    local_ray, untrained_run, tmp_path, monkeypatch
):
    """The scorer kills itself at its first block; its successor finds the mark that it left."""
    mark = str(tmp_path / "mark")

    class Mortal(scoring.Scorer):
        def score(self, columns, weights):
            if not os.path.exists(mark):
                open(mark, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().score(columns, weights)

    monkeypatch.setattr(scoring, "Scorer", Mortal)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(untrained_run["checkpoint"], tmp_path / "copy")
    overrides = ["tracking.uri=sqlite:///" + str(tmp_path / "new" / "mlflow.db"), "data.rows_per_block=4"]
    result = evaluate("copy", (1, 1), "train", overrides, out="results")
    assert os.path.exists(mark)
    assert result.path == str(tmp_path / "results")
    assert result.metrics["videos"] == 28
    client = MlflowClient(overrides[0].partition("=")[2])
    run = client.get_run(result.mlflow_run_id)
    assert run.info.run_name == "small-train-1x1-step0000000012"
    assert run.data.tags["checkpoint"] == str(tmp_path / "copy")
    assert run.data.metrics["test_train/top1"] == result.metrics["top1"]


def test_a_scorer_that_always_dies_ends_it_plainly(local_ray, untrained_run, tmp_path, monkeypatch):
    class Mortal(scoring.Scorer):
        def score(self, columns, weights):
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(scoring, "Scorer", Mortal)
    overrides = ["scaling.max_failures=1"]
    with pytest.raises(UserError, match="scoring failed: ActorDiedError"):
        evaluate(untrained_run["run"], overrides=overrides, out=str(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


def test_an_imported_model_is_evaluated_as_published(local_ray, motion_set, tmp_path):
    """Every view's logits by the published code's rules, their sum over the views; predict and the file agree."""
    run, config, model = write_imported_run(tmp_path, motion_set)
    result = evaluate(run, workers=2)
    manifest = read_split(config.data, "val")
    rows = manifest.rows.to_pylist()
    clips = [load_clips(row["uri"], "any", config, epoch=0, train=False)[0] for row in rows]
    logits = np.stack([published_logits(model, views) for views in clips])  # [videos, views, classes]
    table = pq.read_table(f"{result.path}/scores.parquet")
    scores = np.array(table["scores"].to_pylist()).reshape(logits.shape)
    np.testing.assert_allclose(
        scores - scores.mean(-1, keepdims=True), logits - logits.mean(-1, keepdims=True), atol=1e-5
    )
    first = logits.sum(1).argmax(1)
    assert result.metrics["top1"] == pytest.approx(np.mean(first == [row["label"] for row in rows]))
    assert len(set(first)) > 1
    predictions = list(predict(run, [row["uri"] for row in rows]))
    assert [p.top[0][0] for p in predictions] == [manifest.classes[label] for label in first]
    content = Path(export(run, str(tmp_path / "model.pt2")).path).read_bytes()
    exported = load_exported(content, ".pt2")(torch.from_numpy(np.concatenate(clips))).double().numpy()
    np.testing.assert_allclose(exported.reshape(logits.shape), logits, atol=1e-5)
    client = MlflowClient(tracking_uri(config))
    assert client.get_run(result.mlflow_run_id).data.metrics["test/top1"] == result.metrics["top1"]
