"""What an evaluation of key frames writes: read back, it gives the logged metrics by the rule in plain loops."""

import csv
import io
import math

import numpy as np
import pytest
import torch

from pipelines.inference import detection_results as module
from pipelines.inference.detection_results import detection_results
from pipelines.inference.scoring import Scorer, decode
from posmlp.detection.clips import load_key_clip
from posmlp.detection.frame_map import Scored, Truth
from posmlp.errors import UserError
from posmlp.tasks import task_of
from posmlp.tasks.detection import ListedBoxes
from posmlp.video.augment import to_input
from posmlp.video.views import with_views
from tests.helpers.key_frames import (
    ACTIONS,
    EVALUATED,
    GROUPS,
    RATE,
    detection_recipe,
    manifest_of,
    some_people,
    write_videos,
)
from tests.helpers.plain_map import plain_map
from tests.helpers.random_models import random_model
from tests.helpers.videos import number


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_videos(tmp_path_factory.mktemp("videos"))


def blocks_of(manifest, seed=0):
    """Logits of all boxes, two key frames a block, whose probabilities differ in their first four decimals."""
    counts = [len(each) for each in manifest.rows["scores"].to_pylist()]
    total = sum(counts) * len(ACTIONS)
    shares = np.random.default_rng(seed).permutation(np.arange(1, total + 1) * (9000 // total) + 500) / 1e4
    logits = np.log(shares / (1 - shares)).astype(np.float32).reshape(-1, len(ACTIONS))
    of_rows = np.split(logits, np.cumsum(counts)[:-1])
    return logits, [(np.arange(i, min(i + 2, len(counts))), of_rows[i : i + 2]) for i in range(0, len(counts), 2)]


@pytest.fixture(scope="module")
def found(videos, tmp_path_factory):
    """The people, the logits of their boxes, the lines of the result, and the findings."""
    people = some_people()
    manifest = manifest_of(people, videos)
    logits, blocks = blocks_of(manifest)
    folder = tmp_path_factory.mktemp("results")
    config = task_of(detection_recipe()).for_evaluation(detection_recipe())
    findings = detection_results(str(folder), iter(blocks), manifest, ACTIONS, config)
    with open(folder / findings.scores, newline="") as file:
        lines = list(csv.reader(file))
    return people, logits, lines, findings


def keyed(video, second):
    return ("wide", "tall").index(video) * 1000 + int(second)


def test_the_file_read_back_has_the_logged_map(found):
    people, _, lines, findings = found
    truth = [(keyed(p.video, p.second), p.box, a) for p in people for a in p.actions]
    boxes = {}
    for video, second, *corners, action, score in lines:
        box = boxes.setdefault((keyed(video, second), *map(float, corners)), np.zeros(len(ACTIONS), np.float32))
        box[int(action) - 1] = float(score)
    scored = Scored(
        np.array([key for key, *_ in boxes]), np.array([b[1:] for b in boxes]), np.array(list(boxes.values()))
    )
    truth = Truth(*(np.array(column) for column in zip(*truth, strict=True)))
    for name, most, by_score in (("map", 50, True), ("map_slowfast", None, False)):
        values = np.array(plain_map(truth, scored, len(ACTIONS), EVALUATED, most, by_score))
        assert 0.05 < np.nanmean(values) < 0.95
        assert findings.metrics[name] == pytest.approx(np.nanmean(values))
        if by_score:
            for group, classes in GROUPS.items():
                assert findings.metrics[f"map_{group}"] == pytest.approx(np.nanmean(values[classes]))
            table = list(csv.DictReader(io.StringIO(findings.files["per_class.csv"].decode())))
            assert [row["class"] for row in table] == list(ACTIONS)
            of_class = [float(row["average_precision"] or "nan") for row in table]
            np.testing.assert_allclose(of_class, values)
            assert [int(row["boxes"]) for row in table] == [sum(c in p.actions for p in people) for c in range(6)]


def test_the_file_has_the_boxes_of_the_list_and_the_evaluated_classes(found):
    people, logits, lines, findings = found
    expected = [
        [p.video, f"{p.second:04d}", *(f"{x:.3f}" for x in p.box), str(action + 1), f"{1 / (1 + math.exp(-x)):.4f}"]
        for p, row in zip(people, logits.tolist(), strict=True)
        for action, x in enumerate(row)
        if p.score is not None and action in EVALUATED
    ]
    assert lines == expected
    assert findings.metrics["boxes"] == sum(p.score is not None for p in people)
    assert findings.metrics["key_frames"] == len({(p.video, p.second) for p in people})


def losses_of(people, logits):
    """The loss of each box with actions, the mean over classes, in plain floats."""
    losses = []
    for person, row in zip(people, logits.tolist(), strict=True):
        parts = [math.log1p(math.exp(-x if c in person.actions else x)) for c, x in enumerate(row)]
        losses.append(sum(parts) / len(parts) if person.actions else None)
    return losses


def test_the_loss_is_the_mean_over_boxes_with_actions(found):
    people, logits, _, findings = found
    assert findings.metrics["loss"] == pytest.approx(np.mean([x for x in losses_of(people, logits) if x is not None]))


def test_the_worst_key_frames_have_the_highest_sum_of_losses(found, videos, monkeypatch):
    people, logits, _, findings = found
    assert findings.files["worst.png"][:4] == b"\x89PNG"
    shown = []
    monkeypatch.setattr(module, "key_frames", lambda frames: shown.extend(frames) or b"")
    monkeypatch.setattr(module, "WORST_KEY_FRAMES_SHOWN", 4)
    manifest = manifest_of(people, videos)
    listed = ListedBoxes.of_table(manifest.rows)
    config = task_of(detection_recipe()).for_evaluation(detection_recipe(data={"frame_order": "shuffled"}))
    module.worst_key_frames(manifest, listed, np.arange(len(people)), logits, ACTIONS, config)
    sums = {}
    for person, loss in zip(people, losses_of(people, logits), strict=True):
        key = f"{person.video},{person.second:04d}"
        sums[key] = sums.get(key, 0) + (loss or 0)
    expected = sorted(sums, key=lambda key: -sums[key])[:4]
    assert [frame.title for frame in shown] == [f"{key}   loss {sums[key]:.2f}" for key in expected]
    for frame, key in zip(shown, expected, strict=True):
        video, _, second = key.rpartition(",")
        assert number(frame.picture) == int(second) * RATE
        here = [p for p in people if (p.video, p.second) == (video, int(second)) and p.actions]
        assert sorted(map(tuple, frame.boxes.round(3).tolist())) == sorted(
            tuple(np.float32(p.box).round(3).tolist()) for p in here
        )
        truth = {", ".join(ACTIONS[a] for a in p.actions) for p in here}
        assert {text.partition(" | predicted ")[0] for text in frame.texts} <= truth


def test_a_key_frame_that_cannot_be_read_again_is_no_error(found, videos, tmp_path):
    people, logits, _, _ = found
    gone = {name: str(tmp_path / "gone.mp4") for name in videos}
    manifest = manifest_of(people, gone)
    listed = ListedBoxes.of_table(manifest.rows)
    config = detection_recipe(detection={"whole_frame": True})
    files = module.worst_key_frames(manifest, listed, np.arange(len(people)), logits, ACTIONS, config)
    assert files["worst.png"][:4] == b"\x89PNG"


def test_a_list_without_actions_has_no_worst_key_frame_and_no_metric(videos, tmp_path):
    people = [p for p in some_people() if p.score is not None]
    manifest = manifest_of(people, videos)
    _, blocks = blocks_of(manifest)
    findings = detection_results(str(tmp_path), iter(blocks), manifest, ACTIONS, detection_recipe())
    assert math.isnan(findings.metrics["map"]) and "loss" not in findings.metrics
    assert "worst.png" not in findings.files
    assert len((tmp_path / "detections.csv").read_text().splitlines()) == len(people) * len(EVALUATED)


def test_an_evaluation_that_fails_half_way_leaves_no_file(videos, tmp_path):
    manifest = manifest_of(some_people(), videos)

    def blocks():
        yield blocks_of(manifest)[1][0]
        raise UserError("a worker is lost")

    with pytest.raises(UserError, match="a worker is lost"):
        detection_results(str(tmp_path), blocks(), manifest, ACTIONS, detection_recipe())
    assert list(tmp_path.iterdir()) == []


def test_scores_of_whole_frames_of_any_size_are_those_of_one_at_a_time(videos):
    config = detection_recipe()
    config = task_of(config).for_evaluation(config)
    manifest, model = manifest_of(some_people(), videos), random_model(config)
    scorer = Scorer(config.model_dump())
    scorer.model = random_model(config).freeze()
    found = scorer.score(decode(manifest.rows, config.model_dump()), [])
    assert len(found["scores"]) == len(manifest.rows)
    for row, scores in zip(manifest.rows.to_pylist(), found["scores"], strict=True):
        loaded = load_key_clip(row["uri"], row["sample_id"], row["time"], config, epoch=0, train=False)
        assert loaded.clips.shape[2:4] == ((32, 48) if "wide" in row["uri"] else (53, 32))
        boxes = torch.tensor(row["boxes"]).reshape(-1, 4)
        with torch.no_grad():
            clip = to_input(torch.from_numpy(loaded.clips[0])[None], config)
            expected = model(clip, boxes, torch.zeros(len(boxes), dtype=torch.int64)).numpy()
        np.testing.assert_allclose(scores, expected, atol=1e-4 * np.abs(expected).max())
    spread = np.concatenate(found["scores"]).std(0)
    assert (spread > 1e-3).all()  # boxes differ


def test_a_key_frame_has_one_view():
    config = detection_recipe()
    assert with_views(config, (1, 1)) == config
    with pytest.raises(UserError, match="views 4x1: a key frame has one view"):
        with_views(config, (4, 1))
