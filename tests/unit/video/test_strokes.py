"""Drawn strokes to pretrain on: each class has its motion, measured from the path and from the pixels."""

import csv
import math

import numpy as np
import pytest

from posmlp.video.motion import make_motion_set
from posmlp.video.strokes import COMPASS, PATHS, STROKE_CLASSES, _draw_path, render_stroke


def headings(path: np.ndarray, strokes: int) -> list[str]:
    """The compass point of each part between two of the path's sharpest bends."""
    path = path[np.r_[True, np.hypot(*np.diff(path, axis=0).T) > 1e-9]]  # without rests
    steps = np.diff(path, axis=0)
    turns = np.abs(np.angle(np.exp(1j * np.diff(np.arctan2(steps[:, 1], steps[:, 0])))))
    corners = np.sort(np.argsort(turns)[len(turns) - (strokes - 1) :]) + 1
    ends = path[[0, *corners, -1]]
    angles = np.arctan2(*np.diff(ends, axis=0).T[::-1])
    return [COMPASS[round(angle / (math.pi / 4)) % 8] for angle in angles]


@pytest.mark.parametrize("label", range(len(PATHS)))
def test_a_path_goes_where_its_class_says(label):
    rng = np.random.default_rng(label)
    wanted = STROKE_CLASSES[label].split("-")
    right = [headings(_draw_path(label, rng, 400)[0], len(wanted)) == wanted for _ in range(20)]
    assert np.mean(right) > 0.7  # a start that is cut off can leave a stroke short


@pytest.mark.parametrize("name, sign", [("clockwise", 1), ("counterclockwise", -1)])
def test_a_circle_turns_as_its_class_says(name, sign):
    steps = np.diff(_draw_path(STROKE_CLASSES.index(name), np.random.default_rng(0), 400)[0], axis=0)
    steps = steps[np.hypot(*steps.T) > 1e-9]
    turned = np.angle(np.exp(1j * np.diff(np.arctan2(steps[:, 1], steps[:, 0])))).sum()
    assert sign * turned > math.pi


def test_an_arm_that_moves_right_changes_pixels_further_and_further_right():
    found = []
    for seed in range(12):
        clip = render_stroke(STROKE_CLASSES.index("e"), np.random.default_rng(seed)).astype(float)
        change = (np.diff(clip, axis=0) ** 2).sum(-1)  # [T, H, W]
        places = (change * np.arange(64)).sum((1, 2)) / change.sum((1, 2))
        found.append(places[-8:].mean() > places[:8].mean())
    assert np.mean(found) > 0.7


def test_an_arm_comes_and_leaves_only_while_it_rests_on_the_path():
    seen = 0
    for seed in range(60):
        path, away = _draw_path(seed % len(STROKE_CLASSES), np.random.default_rng(seed), 400)
        assert away.min() == 0 and away.max() <= 1
        moves = np.hypot(*np.diff(path, axis=0).T) > 1e-9
        assert not (moves & (away[1:] > 0) & (away[:-1] > 0)).any()
        seen += (away[0] > 0.9) + (away[-1] > 0.9)
    assert 10 < seen < 90


def test_two_strokes_bend_by_every_angle_but_a_slight_one():
    bends = {(path[1] - path[0]) % 8 for path in PATHS if len(path) == 2}
    assert bends == {2, 3, 4, 5, 6} and len(STROKE_CLASSES) == len(set(STROKE_CLASSES)) == 8 + 8 * 5 + 8 * 4 + 2


def test_a_seed_makes_one_clip():
    one, again, other = (render_stroke(9, np.random.default_rng(seed), size=32, frames=5) for seed in (3, 3, 4))
    assert one.shape == (5, 32, 32, 3) and one.dtype == np.uint8
    assert np.array_equal(one, again) and not np.array_equal(one, other)


@pytest.mark.parametrize("label", [-1, len(STROKE_CLASSES)])
def test_an_unknown_label_is_refused(label):
    with pytest.raises(ValueError, match="not a class of strokes"):
        render_stroke(label, np.random.default_rng(0))


def test_the_set_has_every_class(tmp_path):
    make_motion_set(tmp_path, kind="strokes", train=len(STROKE_CLASSES), val=2, size=32, processes=1)
    with open(tmp_path / "train.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(STROKE_CLASSES)
    assert all((tmp_path / row["path"]).stat().st_size for row in rows)
