"""The embedded detection set: what its actors do in the pixels, and what can be known of it without motion."""

import csv
import re
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from posmlp.config import load_recipe
from posmlp.detection import scenes
from posmlp.detection.frame_map import Scored, Truth, frame_map
from posmlp.detection.scenes import ACTIONS, draw_actor, draw_actors, make_scene_set, overlap, paint_actors
from posmlp.errors import UserError
from posmlp.tasks import task_of
from posmlp.video.decode import Video
from posmlp.video.motion import draw_background

NAMES = ["", *(name for name, _ in ACTIONS)]  # by id
OPPOSITE = {1: 2, 2: 1, 3: 4, 4: 3, 5: 6, 6: 5, 7: 7, 8: 8}
SAMPLED = np.arange(-8, 8, 2) + 1  # frames of a clip of 8 x stride 2, from its middle
SMALL = {"train": 2, "val": 1, "seconds": 3, "size": 32}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_scene_set(tmp_path_factory.mktemp("scenes") / "set", **SMALL)


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def lines(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def on_grey(actor, frames, size=96):
    """Which pixels an actor covers: bool [T, H, W]."""
    clip = np.full((len(frames), size, size, 3), -1.0, np.float32)
    paint_actors(clip, [actor], np.asarray(frames))
    return clip[..., 0] > -0.5


# Motion ---------------------------------------------------------------------------------------------------------------


def test_the_pixels_move_and_turn_as_the_actions_say():
    rng = np.random.default_rng(0)
    ys, xs = np.mgrid[:96, :96] / 96
    seen = Counter()
    for _ in range(80):
        actor = draw_actor(rng, 0.5, 0.5)
        covered = on_grey(replace(actor, shape=replace(actor.shape, kind=0)), SAMPLED)  # an ellipse shows its axis
        x, y = (np.array([axis[mask].mean() for mask in covered]) for axis in (xs, ys))
        right, down = x[-1] - x[0], y[-1] - y[0]
        move = ("right" if right > 0 else "left") if abs(right) > abs(down) else ("down" if down > 0 else "up")
        axes = []
        for mask, cx, cy in zip(covered, x, y, strict=True):
            dx, dy = xs[mask] - cx, ys[mask] - cy
            axes.append(0.5 * np.arctan2(2 * (dx * dy).mean(), (dx * dx).mean() - (dy * dy).mean()))
        turned = np.degrees(np.unwrap(axes, period=np.pi)[-1] - axes[0])  # y points down: clockwise
        names = [NAMES[action] for action in actor.actions]
        assert f"moves {move}" in names and 0.14 < np.hypot(right, down) < 0.28
        turn = {"turns clockwise": 1, "turns counterclockwise": -1}.get(names[1], 0)
        assert (turned * turn > 90) if turn else abs(turned) < 12
        seen.update(names)
    assert len(seen) == len(ACTIONS)


def test_a_clip_played_backwards_has_the_same_boxes_and_the_opposite_actions():
    """So frames in random order cannot tell the actions of a pair apart."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        actors = draw_actors(rng)
        backwards = [actor.opposite() for actor in actors]
        first = draw_background(rng, 48, len(SAMPLED))
        second = first[::-1].copy()
        paint_actors(first, actors, SAMPLED)
        paint_actors(second, backwards, SAMPLED)
        np.testing.assert_allclose(second[::-1], first, atol=2e-3)
        assert np.abs(second - first).max() > 0.1
        for one, other in zip(actors, backwards, strict=True):
            assert one.box() == other.box()
            assert [OPPOSITE[action] for action in one.actions] == list(other.actions)


@pytest.fixture(scope="module")
def many():
    rng = np.random.default_rng(5)
    return [draw_actors(rng) for _ in range(3000)]


def test_the_key_frame_does_not_depend_on_the_actions_of_motion(many):
    """Place, size, angle and outline have the same law for every motion, and all actions the same share."""
    actors = [actor for shot in many for actor in shot]
    poses = np.array([(a.x, a.y, a.radius, a.angle, a.shape.kind) for a in actors])
    moves = np.array([a.actions[0] for a in actors])
    turns = np.array([a.actions[1] if len(a.actions) == 3 else 0 for a in actors])
    for of_actor in (moves, turns):
        for pose in poses.T:
            samples = [pose[of_actor == action] for action in np.unique(of_actor)]
            assert min(stats.ks_2samp(samples[0], other).pvalue for other in samples[1:]) > 1e-3
    outlines = np.array([a.actions[-1] for a in actors])
    for a, b in ((moves, turns), (moves, outlines), (turns, outlines)):
        table = stats.contingency.crosstab(a, b).count
        assert stats.chi2_contingency(table).pvalue > 1e-3
        for counted in (table.sum(0), table.sum(1)):
            assert stats.chisquare(counted).pvalue > 1e-3


def test_neighbours_do_not_tell_the_motion(many):
    """The place of the nearest other actor has the same law for every motion."""
    offsets = defaultdict(list)
    for shot in many:
        for actor in shot:
            others = [(other.x - actor.x, other.y - actor.y) for other in shot if other is not actor]
            offsets[actor.actions[0]].append(min(others, key=lambda offset: np.hypot(*offset)))
            assert np.hypot(*offsets[actor.actions[0]][-1]) >= scenes.SPACING
    for axis in (0, 1):
        samples = [np.array(each)[:, axis] for each in offsets.values()]
        assert min(stats.ks_2samp(samples[0], other).pvalue for other in samples[1:]) > 1e-3


def test_boxes_bound_the_actors_and_overlap_little(many):
    rng = np.random.default_rng(1)
    for _ in range(40):
        actor = draw_actor(rng, *rng.uniform(0.1, 0.9, 2))
        (mask,) = on_grey(actor, [1])
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 96
        np.testing.assert_allclose(found, actor.box(), atol=1.6 / 96)
    boxes = [[np.array(actor.box()) for actor in shot] for shot in many]
    pairs = [overlap(a, b) for shot in boxes for i, a in enumerate(shot) for b in shot[:i]]
    assert max(pairs) < 0.1


# What can be known ----------------------------------------------------------------------------------------------------


def map_of(shots, know, people):
    """mAP of a model that ranks each action by what ``know`` says of an actor; ``people``: on detected boxes."""
    rng = np.random.default_rng(0)
    truth, scored = [], []
    for key, shot in enumerate(shots):
        truth += [(key, actor.box(), action - 1) for actor in shot for action in actor.actions]
        boxes = [np.array(actor.box()) for actor in shot]
        found = list(zip(boxes, shot, strict=True))
        if people:
            detected = scenes.draw_person_boxes(shot, rng, False)
            kept = [np.array(row[:4], float) for row in detected if float(row[5]) >= 0.8]
            nearest = [int(np.argmax([overlap(box, other) for other in boxes])) for box in kept]
            seen = [overlap(box, boxes[i]) >= 0.5 for box, i in zip(kept, nearest, strict=True)]
            found = [(box, shot[i] if real else None) for box, i, real in zip(kept, nearest, seen, strict=True)]
        for box, actor in found:
            scores = np.zeros(8) if actor is None else know(set(actor.actions))
            scored.append((key, box, scores + rng.uniform(0, 0.1, 8)))
    keys, boxes, actions = zip(*truth, strict=True)
    given = Truth(np.array(keys), np.array(boxes), np.array(actions))
    keys, boxes, scores = zip(*scored, strict=True)
    return frame_map(given, Scored(np.array(keys), np.array(boxes), np.array(scores, np.float32)), 8).map


def outlines(actions):
    return np.array([0] * 6 + [7 in actions, 8 in actions], float)


def unordered(actions):
    pairs = [bool({first, first + 1} & actions) for first in (1, 1, 3, 3, 5, 5)]
    return np.array([*pairs, 7 in actions, 8 in actions], float)


def everything(actions):
    return np.array([number in actions for number in range(1, 9)], float)


@pytest.mark.parametrize(
    ("know", "on_truth", "on_people"), [(outlines, 0.46, 0.45), (unordered, 0.63, 0.61), (everything, 1.0, 0.97)]
)
def test_the_map_without_motion_without_order_and_of_a_perfect_model(many, know, on_truth, on_people):
    """The numbers of the module's docstring."""
    assert map_of(many, know, False) == pytest.approx(on_truth, abs=0.008)
    assert map_of(many, know, True) == pytest.approx(on_people, abs=0.008)
    for number in (on_truth, on_people):
        assert re.search(rf"\b{number:.2f}\b|\b{number:g}\b", scenes.__doc__)


def test_the_share_of_labels_that_are_visible_without_motion(many):
    actions = [action for shot in many for actor in shot for action in actor.actions]
    assert np.mean(np.array(actions) > 6) == pytest.approx(0.375, abs=0.01)
    assert "38 %" in scenes.__doc__


# The files ------------------------------------------------------------------------------------------------------------


def test_a_clip_around_a_key_second_lies_in_one_shot(small):
    for path in sorted((small / "videos").glob("*.mp4")):
        video = Video(str(path))
        assert video.info.frames == 16 * 4 and video.info.fps == pytest.approx(16)
        frames = video.read(range(64)).astype(float)
        assert frames.shape[1:3] == (32, 32)
        jumps = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
        cuts = {16 * second + 7 for second in range(4)}  # from frame 7 to 8 after a key second
        assert min(jumps[i] for i in cuts) > 2 * max(jumps[i] for i in range(63) if i not in cuts)


def test_the_lists_are_those_of_ava(small):
    for split, count in (("train", 2), ("val", 1)):
        truth, people, excluded = (lines(small / f"{split}{kind}.csv") for kind in ("", "_boxes", "_excluded"))
        assert {row[0] for row in truth} == {f"{split}_{i:03d}" for i in range(count)}
        assert {row[1] for row in truth} == {"0901", "0902", "0903"}
        assert excluded == [[f"{split}_000", "0901"]]
        for row in truth + people:
            assert len(row) == 8
            x1, y1, x2, y2 = map(float, row[2:6])
            assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
        of_person = defaultdict(list)
        for *key, action, person in truth:
            of_person[*key, person].append(int(action))
        for actions in of_person.values():  # one motion, at most one turn, one outline
            groups = [1 if action <= 4 else 2 if action <= 6 else 3 for action in actions]
            assert groups in ([1, 3], [1, 2, 3])
        assert all((row[6] == "") == (split == "val") and 0 <= float(row[7]) <= 1 for row in people)
    text = (small / "actions.pbtxt").read_text()
    found = re.findall(r'label \{\n  name: "(.+)"\n  label_id: (\d)\n  label_type: (\w+)\n\}', text)
    assert [(name, kind) for name, _, kind in found] == list(ACTIONS)
    assert [number for _, number, _ in found] == list("12345678")


def test_person_boxes_are_near_their_actors_and_a_few_are_missing_or_false(many):
    rng = np.random.default_rng(2)
    scores = defaultdict(list)
    for shot in many:
        boxes = [np.array(actor.box()) for actor in shot]
        detected = scenes.draw_person_boxes(shot, rng, True)
        for corners in {row[:4] for row in detected}:
            rows = [row for row in detected if row[:4] == corners]
            (score,) = {float(row[5]) for row in rows}
            near = max(overlap(np.array(corners, float), box) for box in boxes)
            actions = [row[4] for row in rows]
            actor = shot[int(np.argmax([overlap(np.array(corners, float), box) for box in boxes]))]
            assert actions in ([-1], list(actor.actions))
            if actions != [-1]:
                assert near > 0.89
            scores["actor" if near > 0.7 else "nobody"].append(score)
    assert 0.96 < np.mean(np.array(scores["actor"]) >= 0.8) < 0.98
    assert len(scores["nobody"]) / len(many) == pytest.approx(0.13, abs=0.02)
    assert np.mean(np.array(scores["nobody"]) >= 0.8) == pytest.approx(0.03 / 0.13, abs=0.06)


def test_excluded_key_frames_have_the_opposite_actions(tmp_path, small, monkeypatch):
    monkeypatch.setattr(scenes.Actor, "opposite", lambda actor: actor)
    right = make_scene_set(tmp_path / "set", **SMALL)
    for split in ("train", "val"):
        for given, true in zip(lines(small / f"{split}.csv"), lines(right / f"{split}.csv"), strict=True):
            excluded = given[:2] == [f"{split}_000", "0901"]
            action = OPPOSITE[int(true[6])] if excluded else int(true[6])
            assert given == [*true[:6], str(action), true[7]]


def test_the_recipe_scenes_reads_the_set(small):
    """Its key frames but the excluded ones, with clips of one shot around each of them."""
    keys = [f"data.classes={small}/actions.pbtxt", "data.cache_dir=null"]
    for split in ("train", "val"):
        kinds = {"path": "", "boxes": "_boxes", "excluded": "_excluded"}
        keys += [f"data.{split}.{key}={small}/{split}{kind}.csv" for key, kind in kinds.items()]
        keys.append(f"data.{split}.root={small}/videos")
    config = load_recipe("scenes", keys)
    task = task_of(config)
    for split, count in (("train", 5), ("val", 2)):
        manifest = task.read_split(config, split)
        assert manifest.classes == tuple(NAMES[1:])
        rows = manifest.rows.to_pylist()
        assert len(rows) == count and {row["time"] for row in rows} == (
            {1.0, 2.0, 3.0} if split == "train" else {2.0, 3.0}
        )
        for row in rows:
            video, second = row["sample_id"].split(",")
            expected = defaultdict(set)
            for given in lines(small / f"{split}.csv"):
                if given[:2] == [video, second]:
                    expected[tuple(np.float32(given[2:6]))].add(int(given[6]) - 1)
            found = zip(np.array(row["boxes"], np.float32).reshape(-1, 4), row["actions"], strict=True)
            labelled = {tuple(box): set(actions) for box, actions in found if actions}
            assert expected.items() <= labelled.items()
            (clip,) = task.load(row, config, epoch=0, train=False).clips
            steps = np.abs(np.diff(clip.astype(float), axis=0)).mean((1, 2, 3))
            assert clip.shape == (8, 64, 64, 3) and steps.max() < 2.5 * steps.mean()  # no cut


def test_a_set_is_the_same_again_and_left_as_it_is(small, tmp_path):
    again = make_scene_set(tmp_path / "set", **SMALL)
    assert tree(again) == tree(small)
    before = {path: path.stat().st_mtime_ns for path in again.rglob("*")}
    make_scene_set(again, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in again.rglob("*")} == before
    other = make_scene_set(tmp_path / "other", **SMALL | {"seed": 1})
    assert tree(other)["train.csv"] != tree(small)["train.csv"]


def test_a_set_of_a_killed_run_is_completed(small, tmp_path):
    folder = make_scene_set(tmp_path / "set", **SMALL)
    (folder / "scenes.json").unlink()
    (folder / "videos" / "val_000.mp4").write_bytes(b"half a file")
    (folder / "videos" / "val_000.mp4.1.part").write_bytes(b"half a file")
    make_scene_set(folder, **SMALL)
    assert tree(folder) == tree(small)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": 33}, "size must be even and at least 32, not 33"),
        ({"size": 16}, "size must be even and at least 32, not 16"),
        ({"val": 0}, "at least one video of one second in each split, not 2, 0, 3"),
        ({"seed": 7}, "holds another scenes set"),
    ],
)
def test_what_cannot_be_drawn_is_explained(small, change, words):
    before = tree(small)
    with pytest.raises(UserError, match=words):
        make_scene_set(small, **SMALL | change)
    assert tree(small) == before


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "holiday.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"do not belong to this scenes set \(holiday\.mp4\)"):
        make_scene_set(tmp_path, **SMALL)
