"""Evaluation over the cluster: equal to a plain loop, every video once, written down, logged, and what is refused."""

import csv
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient

from pipelines.inference import evaluate as module
from pipelines.inference.evaluate import Evaluation, evaluate, log, summarise
from pipelines.inference.scoring import Scores, score_split
from pipelines.runs.record import write_record
from pipelines.tracking.mlflow_client import create_run
from pipelines.tracking.uris import tracking_uri
from posmlp.errors import UserError
from posmlp.video.manifest import read_split
from tests.helpers.random_models import plain_shares, write_checkpoint
from tests.helpers.small_runs import recipe_for

CLASSES = ["down", "left", "right", "up", "zoom in", "zoom out", "turn", "absent"]


@pytest.fixture(scope="module")
def subject(motion_set, tmp_path_factory):
    """A finished run with one checkpoint, whose val split has a broken video, and none of the last class."""
    folder = tmp_path_factory.mktemp("subject")
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    for name in ("train", "val"):
        with open(motion_set / f"{name}.csv") as file:
            rows = [row for row in csv.DictReader(file) if int(row["label"]) != 7]
        lines = ["path,label", *(f"{motion_set / row['path']},{row['label']}" for row in rows)]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    broken = folder / "broken.mp4"
    broken.write_bytes((motion_set / rows[0]["path"]).read_bytes()[:200])
    (folder / "val.csv").write_text(
        (folder / "val.csv").read_text().replace(str(motion_set / rows[0]["path"]), str(broken))
    )
    config = recipe_for(
        folder / "runs",
        motion_set,
        f"data.train.path={folder}/train.csv",
        f"data.val.path={folder}/val.csv",
        *(f"data.{split}.root=/" for split in ("train", "val")),
        f"data.classes={folder}/classes.txt",
        "data.max_bad_fraction=0.1",
        "data.cache_dir=null",
        "model.num_classes=8",
    )
    run = folder / "runs" / "small"
    checkpoint, model = write_checkpoint(run, config, step=12, classes=CLASSES)
    client = MlflowClient(tracking_uri(config))
    run_id = create_run(client, config, {})
    client.set_terminated(run_id, "FINISHED", end_time=123456789)
    write_record(str(run), config, {}, run_id, {"val/top1": 0.5})
    return {"run": str(run), "checkpoint": checkpoint, "config": config, "model": model, "broken": str(broken)}


@pytest.fixture(scope="module")
def found(local_ray, subject):
    """The evaluation with 2 x 3 views on 2 workers, its printed lines, and a plain loop's probabilities by sample."""
    lines = []
    result = evaluate(subject["run"], (2, 3), workers=2, echo=lines.append)
    rows = [r for r in read_split(subject["config"].data, "val").rows.to_pylist() if r["uri"] != subject["broken"]]
    plain = [plain_shares(subject["model"], subject["config"], row["uri"], 2, 3) for row in rows]
    return result, lines, rows, np.array(plain)


@pytest.mark.ray
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


@pytest.mark.ray
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


@pytest.mark.ray
def test_what_is_written_says_what_was_evaluated(found, subject):
    result, lines, _, _ = found
    assert result.path == f"{subject['run']}/evaluations/val-2x3-step0000000012"
    folder = Path(result.path)
    noted = json.loads((folder / "summary.json").read_text())
    assert (noted["checkpoint"], noted["step"], noted["epoch"]) == (subject["checkpoint"], 12, 1)
    assert (noted["split"], noted["views"], noted["metrics"]) == ("val", [2, 3], result.metrics)
    assert [video["uri"] for video in noted["bad"]] == [subject["broken"]] == [video.uri for video in result.bad]
    assert noted["bad"][0]["reason"]
    table = list(csv.DictReader((folder / "per_class.csv").read_text().splitlines()))
    assert [row["class"] for row in table] == CLASSES
    assert (table[7]["videos"], table[7]["top1"]) == ("0", "")
    assert (folder / "confusion.png").read_bytes()[:4] == b"\x89PNG"
    assert f"{subject['checkpoint']} (step 12, epoch 1): val, 14 videos x 2x3 views, workers: 2" in lines[0]
    assert subject["broken"] in str(result)


@pytest.mark.ray
def test_the_mlflow_run_gets_the_results_and_keeps_its_status(found, subject):
    result, _, _, _ = found
    client = MlflowClient(tracking_uri(subject["config"]))
    (run,) = client.search_runs(["1"])
    assert run.info.run_id == result.mlflow_run_id
    assert (run.info.status, run.info.end_time) == ("FINISHED", 123456789)
    logged = {k: v for k, v in run.data.metrics.items() if k.startswith("test/")}
    assert logged == {f"test/{k}": v for k, v in result.metrics.items()}
    assert [m.step for m in client.get_metric_history(run.info.run_id, "test/top1")] == [12]
    assert run.data.tags["evaluation.test"] == result.name
    names = {f.path for f in client.list_artifacts(run.info.run_id, f"evaluation/{result.name}")}
    assert {name.rpartition("/")[2] for name in names} == set(os.listdir(result.path))


@pytest.mark.ray
def test_a_copied_checkpoint_is_evaluated_into_a_new_run_though_a_scorer_dies(
    local_ray, subject, tmp_path, monkeypatch
):
    """The scorer kills itself at its first block; its successor finds the mark that it left."""
    mark = str(tmp_path / "mark")

    class Mortal(module.Scorer):
        def score(self, columns, weights):
            if not os.path.exists(mark):
                open(mark, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().score(columns, weights)

    monkeypatch.setattr(module, "Scorer", Mortal)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(subject["checkpoint"], tmp_path / "copy")
    overrides = ["tracking.uri=sqlite:///" + str(tmp_path / "new" / "mlflow.db"), "data.rows_per_block=4"]
    result = evaluate("copy", (1, 1), "train", overrides, out="results", echo=lambda line: None)
    assert os.path.exists(mark)
    assert result.path == str(tmp_path / "results")
    assert result.metrics["videos"] == 28
    client = MlflowClient(overrides[0].partition("=")[2])
    run = client.get_run(result.mlflow_run_id)
    assert run.info.run_name == "small-train-1x1-step0000000012"
    assert run.data.tags["checkpoint"] == str(tmp_path / "copy")
    assert run.data.metrics["test_train/top1"] == result.metrics["top1"]


@pytest.mark.ray
def test_a_scorer_that_always_dies_ends_it_plainly(local_ray, subject, tmp_path, monkeypatch):
    class Mortal(module.Scorer):
        def score(self, columns, weights):
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(module, "Scorer", Mortal)
    overrides = ["scaling.max_failures=1"]
    with pytest.raises(UserError, match="scoring failed: ActorDiedError"):
        evaluate(subject["run"], overrides=overrides, out=str(tmp_path / "out"), echo=lambda line: None)
    assert not (tmp_path / "out").exists()


def blocks_of(manifest, bad=()):
    """What scorers would deliver, two videos a block, the last first: a guess for each but the bad ones."""
    rows = manifest.rows.to_pylist()
    for first in range(len(rows) - 2, -1, -2):
        two = rows[first : first + 2]
        reasons = ["cut short" if first + i in bad else "" for i in range(2)]
        ids, uris = ([row[key] for row in two] for key in ("sample_id", "uri"))
        columns = {"sample_id": ids, "uri": uris, "reason": reasons, "fatal": ["", ""]}
        scores = np.zeros((reasons.count(""), 1, 8), np.float32)
        yield {k: np.array(v, dtype=object) for k, v in columns.items()} | {"scores": scores}


def test_scores_find_their_rows_in_whatever_order_blocks_come(subject, monkeypatch):
    config = subject["config"]
    manifest = read_split(config.data, "val")
    monkeypatch.setattr(module, "scored_blocks", lambda *_: blocks_of(manifest, bad=(3,)))
    scores = score_split(manifest, config, {}, lambda line: None)
    assert list(np.flatnonzero(~scores.scored)) == [3]
    assert [video.uri for video in scores.bad] == [manifest.rows["uri"][3].as_py()]


def test_too_many_bad_videos_end_it_as_soon_as_that_is_certain(subject, monkeypatch):
    config = subject["config"]  # allows 10 % of 14 videos
    manifest = read_split(config.data, "val")
    blocks = blocks_of(manifest, bad=(0, 1, 10, 11))
    monkeypatch.setattr(module, "scored_blocks", lambda *_: blocks)
    with pytest.raises(UserError, match=r"2 of 14 videos .*data\.max_bad_fraction 10\.0% .*\n.*cut short\n.*cut short"):
        score_split(manifest, config, {}, lambda line: None)
    assert len(list(blocks)) == 5


def test_a_split_without_a_good_video_is_refused(subject, monkeypatch):
    config = subject["config"]
    lenient = config.model_copy(update={"data": config.data.model_copy(update={"max_bad_fraction": 1.0})})
    manifest = read_split(config.data, "val")
    monkeypatch.setattr(module, "scored_blocks", lambda *_: blocks_of(manifest, bad=range(14)))
    with pytest.raises(UserError, match=r"no video could be decoded; the first one, .*cut short"):
        score_split(manifest, lenient, {}, lambda line: None)


def test_an_mlflow_that_is_away_costs_only_itself(subject):
    tracking = subject["config"].tracking.model_copy(update={"uri": "http://127.0.0.1:9"})
    config, lines = subject["config"].model_copy(update={"tracking": tracking}), []
    found = Evaluation("name", "/here", "step-12", 12, 1, "val", (1, 1), {"top1": 0.5}, [], [])
    assert log(found, {}, config, "some-run", lines.append) is None
    (line,) = lines
    assert line.startswith("MLflow at http://127.0.0.1:9 does not take the evaluation (")
    assert line.endswith("it is in /here all the same")


def test_a_run_that_mlflow_does_not_have_gets_a_new_one(subject, tmp_path):
    config = subject["config"].model_copy(
        update={"tracking": subject["config"].tracking.model_copy(update={"uri": f"sqlite:///{tmp_path}/db"})}
    )
    found, lines = Evaluation("name", "/here", "step-12", 12, 1, "train", (1, 1), {"top1": 0.5}, [], []), []
    run_id = log(found, {"a.txt": b"a"}, config, "some-run", lines.append)
    run = MlflowClient(tracking_uri(config)).get_run(run_id)
    assert "has no run some-run" in lines[0]
    assert (run.info.run_name, run.info.status) == ("small-name", "FINISHED")
    assert run.data.metrics == {"test_train/top1": 0.5}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.frames=8"], r"model\.frames is fixed"),
        (["optim.lr=1"], r"optim\.lr is fixed"),
        (["scaling.workers=2"], "--workers"),
        (["data.val.path=nowhere.csv"], r"nowhere\.csv"),
        (["data.max_bad_fraction=2"], r"data\.max_bad_fraction: .*not 2"),
        (["data.classes=null"], "val.csv has 7 classes, the checkpoint 8"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(subject, overrides, expected):
    with pytest.raises(UserError, match=expected):
        evaluate(subject["run"], overrides=overrides)


def test_a_password_is_not_sent_where_the_checkpoint_says(subject, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hushhush")
    tracking = subject["config"].tracking.model_copy(update={"uri": "http://mlflow.example"})
    run = tmp_path / "theirs"
    write_checkpoint(run, subject["config"].model_copy(update={"tracking": tracking}), classes=CLASSES)
    with pytest.raises(UserError, match=r"logs to http://mlflow\.example"):
        evaluate(str(run))
    with pytest.raises(UserError, match="nowhere"):  # the next thing that is wrong
        evaluate(str(run), overrides=["tracking.uri=null", "data.val.path=nowhere.csv"])


def test_another_class_list_is_refused_by_name(subject, tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join(["down", "right", "left", *CLASSES[3:]]))
    with pytest.raises(UserError, match=r"label 1 is class 'right' in .*val\.csv, but 'left' in the checkpoint"):
        evaluate(subject["run"], overrides=[f"data.classes={tmp_path}/classes.txt"])


def test_a_damaged_checkpoint_is_refused_by_name(subject, tmp_path):
    copy = tmp_path / "damaged"
    shutil.copytree(subject["checkpoint"], copy)
    with open(copy / "weights.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"damaged is damaged: weights\.safetensors has"):
        evaluate(str(copy))


def test_other_data_get_a_name_of_their_own(subject):
    config, about = subject["config"], module.checkpoints.read_about(subject["checkpoint"])
    names = [
        module.name_of("val", config, about, overrides)
        for overrides in ([], ["data.cache_dir=x", "scaling.use_gpu=true"], ["data.val.path=a"], ["data.val.path=b"])
    ]
    assert names[0] == names[1] == "val-1x1-step0000000012"
    assert len(set(names)) == 3


def test_the_summary_tells_no_password(subject):
    tracking = subject["config"].tracking.model_copy(update={"uri": "http://me:geheim@mlflow.example"})
    config = subject["config"].model_copy(update={"tracking": tracking})
    found = Evaluation("name", "/here", "step-12", 12, 1, "val", (1, 1), {"top1": 0.5}, [], [])
    text = module.summary(found, config).decode()
    assert "http://mlflow.example" in text
    assert "geheim" not in text


def test_the_most_frequent_confusion_of_each_class():
    shares = torch.eye(4)[[0, 1, 1, 2, 1]] * 0.8 + 0.05  # predicted: 0 1 1 2 1
    views = shares.log()[:, None].numpy()
    scored = np.array([True, True, True, True, False])
    _, classes = summarise(Scores(views, scored), np.array([0, 0, 0, 2, 3]), ["a", "b", "c", "d"])
    assert [(c.videos, c.top1, c.confused_with, c.confused) for c in classes] == [
        (3, pytest.approx(1 / 3), "b", 2),
        (0, None, "", 0),
        (1, 1.0, "", 0),
        (0, None, "", 0),
    ]
