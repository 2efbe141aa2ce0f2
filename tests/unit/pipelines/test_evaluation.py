"""What an evaluation refuses and how it counts, without Ray."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient

from pipelines.inference import evaluate as module
from pipelines.inference import scoring
from pipelines.inference.evaluate import Evaluation, evaluate, log_evaluation
from pipelines.inference.recognition_results import write_scores
from pipelines.inference.scoring import score_good_videos
from pipelines.runs.record import read_record
from pipelines.tracking.uris import tracking_uri
from posmlp.config import load_recipe
from posmlp.errors import UserError
from posmlp.learn.evaluation import ClassificationMetrics, class_results
from posmlp.video.manifest import read_split
from tests.helpers.log_lines import log_lines
from tests.helpers.random_models import write_checkpoint
from tests.helpers.untrained_run import CLASSES


def blocks_of(manifest, bad=()):
    """What scorers would deliver, two videos a block: a guess for each but the bad ones."""
    rows = manifest.rows.to_pylist()
    for first in range(0, len(rows), 2):
        two = rows[first : first + 2]
        reasons = ["cut short" if first + i in bad else "" for i in range(2)]
        ids, uris = ([row[key] for row in two] for key in ("sample_id", "uri"))
        columns = {"sample_id": ids, "uri": uris, "reason": reasons, "fatal": ["", ""]}
        scores = np.zeros((reasons.count(""), 1, 8), np.float32)
        yield first, {k: np.array(v, dtype=object) for k, v in columns.items()} | {"scores": scores}


def test_bad_videos_have_no_scores(untrained_run, monkeypatch):
    config, bad = untrained_run["config"], []
    manifest = read_split(config.data, "val")
    monkeypatch.setattr(scoring, "score_blocks", lambda *_: blocks_of(manifest, bad=(3,)))
    rows = [row for rows, _ in score_good_videos(manifest, config, {}, bad) for row in rows.tolist()]
    assert rows == [0, 1, 2, *range(4, 14)]
    assert [video.uri for video in bad] == [manifest.rows["uri"][3].as_py()]


def test_too_many_bad_videos_end_it_as_soon_as_that_is_certain(untrained_run, monkeypatch):
    config = untrained_run["config"]  # allows 10 % of 14 videos
    manifest = read_split(config.data, "val")
    blocks = blocks_of(manifest, bad=(0, 1, 10, 11))
    monkeypatch.setattr(scoring, "score_blocks", lambda *_: blocks)
    with pytest.raises(UserError, match=r"2 of 14 videos .*data\.max_bad_fraction 10\.0% .*\n.*cut short\n.*cut short"):
        list(score_good_videos(manifest, config, {}, []))
    assert len(list(blocks)) == 6


def test_a_split_without_a_good_video_is_refused(untrained_run, monkeypatch):
    config = untrained_run["config"]
    lenient = config.model_copy(update={"data": config.data.model_copy(update={"max_bad_fraction": 1.0})})
    manifest = read_split(config.data, "val")
    monkeypatch.setattr(scoring, "score_blocks", lambda *_: blocks_of(manifest, bad=range(14)))
    with pytest.raises(UserError, match=r"no video could be decoded; the first one, .*cut short"):
        list(score_good_videos(manifest, lenient, {}, []))


def test_an_mlflow_that_is_away_costs_only_itself(untrained_run):
    tracking = untrained_run["config"].tracking.model_copy(update={"uri": "http://127.0.0.1:9"})
    config = untrained_run["config"].model_copy(update={"tracking": tracking})
    found = Evaluation("name", "/here", "step-12", 12, 1, "val", (1, 1), {"top1": 0.5}, [], [])
    with log_lines() as lines:
        assert log_evaluation(found, {}, config, "some-run") is None
    (line,) = lines
    assert line.startswith("MLflow at http://127.0.0.1:9 does not accept the evaluation (")
    assert line.endswith("its files are in /here")


@pytest.mark.parametrize(("split", "metric"), [("train", "test_train/top1"), ("test", "held_out/top1")])
def test_a_run_that_mlflow_does_not_have_gets_a_new_one(untrained_run, tmp_path, split, metric):
    config = untrained_run["config"].model_copy(
        update={"tracking": untrained_run["config"].tracking.model_copy(update={"uri": f"sqlite:///{tmp_path}/db"})}
    )
    found = Evaluation("name", "/here", "step-12", 12, 1, split, (1, 1), {"top1": 0.5}, [], [])
    with log_lines() as lines:
        run_id = log_evaluation(found, {"a.txt": b"a"}, config, "some-run")
    run = MlflowClient(tracking_uri(config)).get_run(run_id)
    assert "has no run some-run" in lines[0]
    assert (run.info.run_name, run.info.status) == ("small-name", "FINISHED")
    assert run.data.metrics == {metric: 0.5}


def test_a_recipe_without_a_test_list_has_no_test_split(untrained_run):
    with pytest.raises(UserError, match=r"the recipe has no data\.test; name the list"):
        evaluate(untrained_run["run"], split="test")


def test_the_checkpoints_logged_model_gets_the_results(untrained_run):
    config = untrained_run["config"]
    client = MlflowClient(tracking_uri(config))
    run_id = read_record(untrained_run["run"])["mlflow_run_id"]
    info = module.checkpoints.read_info(untrained_run["checkpoint"])
    link = module.link_to(untrained_run["checkpoint"], info, run_id, {})
    for top1 in (0.5, 0.75):  # twice: the second time the model is there
        found = Evaluation("name", "/here", link.uri, 12, 1, "val", (1, 1), {"top1": top1, "loss": np.inf}, [], [])
        assert log_evaluation(found, {}, config, run_id, link, ("motion/val.csv", "abc")) == run_id
    (model,) = client.search_logged_models(["1"], f"source_run_id = '{run_id}' AND metrics.`test/top1` > 0.7")
    assert model.tags == {"checkpoint": link.uri, "step": "12", "epoch": "1"}
    logged = [(m.key, m.value, m.step, m.dataset_name, m.dataset_digest) for m in model.metrics]
    assert logged == [("test/top1", top1, 12, "motion/val.csv", "abc") for top1 in (0.5, 0.75)]
    assert [m.value for m in client.get_metric_history(run_id, "test/top1")] == [0.5, 0.75]


def test_the_number_of_workers_replaces_that_of_an_elastic_recipe():
    elastic = load_recipe("demo", ["scaling.workers=4", "scaling.min_workers=2"])
    assert module.with_workers(elastic, None) == elastic
    scaling = module.with_workers(elastic, 1).scaling
    assert (scaling.workers, scaling.min_workers) == (1, None)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.frames=8"], r"model\.frames of a trained model is fixed"),
        (["optim.lr=1"], r"optim\.lr of a trained model is fixed"),
        (["scaling.workers=2"], "--workers"),
        (["data.normalisation=slowfast"], r"the model was trained with data\.normalisation imagenet; leave it out"),
        (["data.modality=rgb"], r"the model was trained with data\.modality rgb_difference; leave it out"),
        (["detection.whole_frame=false"], r"an evaluation scores all key frames, whole; leave it out"),
        (["detection.val_every=4"], r"an evaluation scores all key frames, whole; leave it out"),
        (["data.val.path=nowhere.csv"], r"nowhere\.csv"),
        (["data.max_bad_fraction=2"], r"data\.max_bad_fraction: .*not 2"),
        (["data.classes=null"], r"val\.csv:2: 7 classes not in the checkpoint: '0', '1', '2', '3', '4' and 2 more; "),
    ],
)
def test_overrides_that_do_not_fit_are_refused(untrained_run, overrides, expected):
    with pytest.raises(UserError, match=expected):
        evaluate(untrained_run["run"], overrides=overrides)


def test_a_password_is_not_sent_where_the_checkpoint_says(untrained_run, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hushhush")
    tracking = untrained_run["config"].tracking.model_copy(update={"uri": "http://mlflow.example"})
    run = tmp_path / "theirs"
    write_checkpoint(run, untrained_run["config"].model_copy(update={"tracking": tracking}), classes=CLASSES)
    with pytest.raises(UserError, match=r"logs to http://mlflow\.example"):
        evaluate(str(run))
    with pytest.raises(UserError, match="nowhere"):  # the next thing that is wrong
        evaluate(str(run), overrides=["tracking.uri=null", "data.val.path=nowhere.csv"])


def test_another_class_list_is_refused_by_name(untrained_run, tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join(["down", "sideways", "left", *CLASSES[3:]]))
    with pytest.raises(UserError, match=r"val\.csv:\d+: 1 class not in the checkpoint: 'sideways'; correct the names"):
        evaluate(untrained_run["run"], overrides=[f"data.classes={tmp_path}/classes.txt"])


def test_a_damaged_checkpoint_is_refused_by_name(untrained_run, tmp_path):
    copy = tmp_path / "damaged"
    shutil.copytree(untrained_run["checkpoint"], copy)
    with open(copy / "weights.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"damaged is damaged: weights\.safetensors has"):
        evaluate(str(copy))


def test_other_data_get_a_name_of_their_own(untrained_run):
    config, info = untrained_run["config"], module.checkpoints.read_info(untrained_run["checkpoint"])
    names = [
        module.evaluation_name("val", config, info, overrides)
        for overrides in ([], ["data.cache_dir=x", "scaling.use_gpu=true"], ["data.val.path=a"], ["data.val.path=b"])
    ]
    assert names[0] == names[1] == "val-1x1-step0000000012"
    assert len(set(names)) == 3


def test_the_summary_tells_no_password(untrained_run):
    tracking = untrained_run["config"].tracking.model_copy(update={"uri": "http://me:geheim@mlflow.example"})
    config = untrained_run["config"].model_copy(update={"tracking": tracking})
    found = Evaluation("name", "/here", "step-12", 12, 1, "val", (1, 1), {"top1": 0.5}, [], [])
    text = module.summary_json(found, config).decode()
    assert "http://mlflow.example" in text
    assert "geheim" not in text


def write_two_blocks(folder, manifest, config, fail=False):
    """Scores of the first five rows but the second, two views each, in two blocks. Returns them with the counts."""
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"clips": 2})})
    scores = torch.randn(4, 2, 8, generator=torch.manual_seed(0)).log_softmax(2).numpy()

    def blocks():
        yield np.array([0, 2]), scores[:2]
        if fail:
            raise UserError("a worker is lost")
        yield np.array([3, 4]), scores[2:]

    return scores, write_scores(f"{folder}/scores.parquet", blocks(), manifest, CLASSES, config)


def test_scores_are_written_view_by_view_and_counted(untrained_run, tmp_path):
    manifest = read_split(untrained_run["config"].data, "val")
    scores, counts = write_two_blocks(tmp_path, manifest, untrained_run["config"])
    table = pq.read_table(tmp_path / "scores.parquet")
    rows = manifest.rows.to_pylist()
    assert table["sample_id"].to_pylist() == [rows[i]["sample_id"] for i in (0, 2, 3, 4) for _ in range(2)]
    assert list(zip(table["view"].to_pylist(), table["clip"].to_pylist(), strict=True)) == [(0, 0), (1, 1)] * 4
    np.testing.assert_array_equal(np.stack(table["scores"].to_pylist()), scores.reshape(8, 8))
    assert tuple(json.loads(table.schema.metadata[b"classes"])) == tuple(CLASSES)
    labels, predicted = [rows[i]["label"] for i in (0, 2, 3, 4)], np.exp(scores).mean(1).argmax(1)
    expected = np.zeros((8, 8))
    np.add.at(expected, (labels, predicted), 1)
    np.testing.assert_array_equal(counts.confusion, expected)


def test_an_evaluation_that_fails_half_way_leaves_no_scores(untrained_run, tmp_path):
    manifest = read_split(untrained_run["config"].data, "val")
    with pytest.raises(UserError, match="a worker is lost"):
        write_two_blocks(tmp_path, manifest, untrained_run["config"], fail=True)
    assert list(tmp_path.iterdir()) == []


MEMORY = """
import resource, sys
import numpy as np, pyarrow as pa
from pipelines.inference.recognition_results import write_scores
from posmlp.config import load_recipe
from posmlp.video.manifest import SCHEMA, Manifest

classes, config = [f"class {i}" for i in range(400)], load_recipe("k400_s16", ["eval.clips=4", "eval.crops=1"])
scores = np.random.default_rng(0).standard_normal((4, 4, 400), dtype=np.float32)

def grow(rows):
    names = [f"video-{i:08d}" for i in range(rows)]
    columns = {"sample_id": names, "uri": names, "label": [i % 400 for i in range(rows)], "frames": [None] * rows}
    manifest = Manifest(pa.table(columns, schema=SCHEMA), tuple(classes))
    blocks = ((np.arange(first, first + 4), scores) for first in range(0, rows, 4))
    assert write_scores(f"{sys.argv[1]}/{rows}.parquet", blocks, manifest, classes, config).videos == rows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

few, many = grow(6_000), grow(24_000)
print((many - few) / 1024)
"""


def test_the_memory_of_an_evaluation_does_not_grow_with_the_videos(tmp_path):
    """Scores of 18,000 further videos with 4 views have 115 MB; all in memory would be seen."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ | {"PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 40


def test_the_most_frequent_confusion_of_each_class():
    shares = torch.eye(4)[[0, 1, 1, 2]] * 0.8 + 0.05  # predicted: 0 1 1 2
    counts = ClassificationMetrics.empty(4)
    counts.add(shares.log(), torch.tensor([0, 0, 0, 2]), torch.ones(4))
    classes = class_results(counts.confusion, counts.top5, ["a", "b", "c", "d"])
    assert [(c.videos, c.top1, c.confused_with, c.confused) for c in classes] == [
        (3, pytest.approx(1 / 3), "b", 2),
        (0, None, "", 0),
        (1, 1.0, "", 0),
        (0, None, "", 0),
    ]
