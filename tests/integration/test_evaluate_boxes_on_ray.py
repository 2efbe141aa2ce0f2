"""Evaluation of a detection model over the cluster: equal to a plain loop over the lists as they are written."""

import csv
import json
import os

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from pipelines.inference.evaluate import evaluate
from pipelines.tracking.uris import tracking_uri
from posmlp.detection.clips import load_key_clip
from posmlp.detection.frame_map import Scored, Truth
from posmlp.detection.scenes import ACTIONS, FIRST_SECOND
from posmlp.errors import UserError
from posmlp.tasks import task_of
from posmlp.video.augment import to_input
from tests.helpers.key_frames import write_untrained_detection_run
from tests.helpers.plain_map import plain_map

pytestmark = pytest.mark.ray


def read_lines(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return write_untrained_detection_run(tmp_path_factory.mktemp("boxes"))


@pytest.fixture(scope="module")
def found(local_ray, trained):
    return evaluate(trained["run"], workers=2)


def key_frames_of(trained, videos):
    """The lines of both lists of these videos, without the excluded key frames: those of the truth, and of people."""
    excluded = {tuple(line) for line in read_lines(trained["set"] / "val_excluded.csv")}
    assert excluded
    lists = (read_lines(trained["set"] / f"val{kind}.csv") for kind in ("", "_boxes"))
    truth, people = ([x for x in lines if x[0] in videos and (*x[:2],) not in excluded] for lines in lists)
    return truth, [line for line in people if float(line[7]) >= 0.8]


def test_the_boxes_and_their_scores_are_those_of_a_plain_loop(found, trained):
    _, people = key_frames_of(trained, ("val_000", "val_001"))
    config, lines = task_of(trained["config"]).for_evaluation(trained["config"]), []
    for video, second, *corners, _, _ in people:
        path, time = f"{trained['set']}/videos/{video}.mp4", int(second) - FIRST_SECOND
        clip = load_key_clip(path, f"{video},{second}", time, config, epoch=0, train=False).clips
        box = torch.tensor([[float(x) for x in corners]])
        with torch.no_grad():
            logits = trained["model"](to_input(torch.from_numpy(clip[0])[None], config), box, torch.zeros(1).long())
        lines += [[video, second, *corners, str(i + 1), p] for i, p in enumerate(logits[0].sigmoid().tolist())]
    written = read_lines(f"{found.path}/detections.csv")
    order = sorted(range(len(lines)), key=lambda i: (lines[i][:2], i))  # the list of a split is sorted by key frame
    assert [line[:7] for line in written] == [lines[i][:7] for i in order]
    np.testing.assert_allclose([float(line[7]) for line in written], [lines[i][7] for i in order], atol=2e-4)
    assert np.std([line[7] for line in lines]) > 0.02


def test_the_metrics_are_those_of_the_written_file(found, trained):
    truth, people = key_frames_of(trained, ("val_000", "val_001"))
    keys = sorted({tuple(line[:2]) for line in truth + people})
    written = read_lines(f"{found.path}/detections.csv")
    boxes = {}
    for video, second, *corners, action, score in written:
        scores = boxes.setdefault((keys.index((video, second)), *map(float, corners)), np.zeros(8, np.float32))
        scores[int(action) - 1] = float(score)
    scored = Scored(
        np.array([key for key, *_ in boxes]), np.array([b[1:] for b in boxes]), np.array(list(boxes.values()))
    )
    entries = [(keys.index((*line[:2],)), [float(x) for x in line[2:6]], int(line[6]) - 1) for line in truth]
    expected = plain_map(Truth(*map(np.array, zip(*entries, strict=True))), scored, 8, None, 50, True)
    # the file has four decimals of a score: two that differ by less may change places
    assert found.metrics["map"] == pytest.approx(np.mean(expected), abs=0.03)
    for group, classes in (("pose", range(4)), ("object", range(4, 6)), ("person", range(6, 8))):
        assert found.metrics[f"map_{group}"] == pytest.approx(np.mean([expected[c] for c in classes]), abs=0.06)
    assert found.metrics["key_frames"] == len({tuple(line[:2]) for line in truth + people})
    assert found.metrics["boxes"] == len(people) == len(written) / 8


def test_the_key_frames_of_a_broken_video_are_in_no_metric(found, trained):
    truth, _ = key_frames_of(trained, ("val_002",))
    assert [each.sample_id for each in found.bad] == sorted({",".join(line[:2]) for line in truth})
    assert f"bad key frames     {len(found.bad)}" in str(found)


def test_files_and_metrics_are_in_mlflow(found, trained):
    client = MlflowClient(tracking_uri(trained["config"]))
    run = client.get_run(found.mlflow_run_id)
    logged = {key: value for key, value in run.data.metrics.items() if key.startswith("test/")}
    assert logged == {f"test/{key}": value for key, value in found.metrics.items()}
    names = {f.path.rpartition("/")[2] for f in client.list_artifacts(found.mlflow_run_id, f"evaluation/{found.name}")}
    expected = {"detections.csv", "per_class.csv", "average_precision.png", "worst.png", "summary.json"}
    assert names == set(os.listdir(found.path)) == expected
    with open(f"{found.path}/summary.json") as file:
        noted = json.load(file)
    assert noted["metrics"] == found.metrics and noted["config"]["detection"]["whole_frame"]
    with open(f"{found.path}/per_class.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["class"] for row in table] == [name for name, _ in ACTIONS]


def test_the_boxes_of_the_truth_are_scored_without_a_person_list(local_ray, trained, tmp_path):
    overrides = ["data.val.boxes=null", "detection.min_score=0.9"]
    found = evaluate(trained["run"], overrides=overrides, out=str(tmp_path / "out"))
    truth, _ = key_frames_of(trained, ("val_000", "val_001"))
    people = {tuple(line[:6]) for line in truth}
    assert {tuple(line[:6]) for line in read_lines(f"{found.path}/detections.csv")} == people


def test_several_views_of_a_key_frame_are_refused(trained):
    with pytest.raises(UserError, match="views 4x1: a key frame has one view"):
        evaluate(trained["run"], (4, 1))
    with pytest.raises(UserError, match=r"detection\.min_score"):
        evaluate(trained["run"], overrides=["detection.min_score=2"])
