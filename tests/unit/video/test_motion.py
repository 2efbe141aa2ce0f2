"""The embedded motion set. The motion of a class is measured from pixels alone, independent of the drawing code."""

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from posmlp.video import motion
from posmlp.video.motion import MOTION_CLASSES, make_motion_set, render_motion, write_video

SMALL = {"train": 16, "val": 8, "size": 32, "processes": 1}


def measure_motion(clip: np.ndarray) -> np.ndarray:
    """Motion over the clip, [4]: to the right and down in frame sizes, log of growth, clockwise rotation in radians.

    Least-squares optical flow: each pixel gives one equation of constant brightness, -d/dt = (d/dx, d/dy) . flow, for
    the common flow (right + grow x - turn y, down + grow y + turn x) around the centre of the pixels that change.
    """
    video = clip.astype(np.float64)
    for axis in (1, 1, 2, 2):  # smooth a little, on a torus like the picture
        video = (np.roll(video, 1, axis) + 2 * video + np.roll(video, -1, axis)) / 4
    video /= video.mean((1, 2), keepdims=True)  # undo changes of light
    size = video.shape[1]
    columns, lines = np.meshgrid((np.arange(size) + 0.5) / size, (np.arange(size) + 0.5) / size)
    total = np.zeros(4)
    for before, after in pairwise(video):
        middle, dt = (before + after) / 2, after - before
        dx, dy = ((np.roll(middle, -1, axis) - np.roll(middle, 1, axis)) * size / 2 for axis in (1, 0))
        change = (dt**2).sum(-1)
        moving = change > np.quantile(change, 0.8)
        centre = [np.angle(np.exp(2j * np.pi * z[moving]) @ change[moving]) / (2 * np.pi) for z in (columns, lines)]
        x, y = (((z[moving] - c + 0.5) % 1 - 0.5)[:, None] for z, c in zip((columns, lines), centre, strict=True))
        dx, dy, dt = dx[moving], dy[moving], dt[moving]  # [pixels, 3]
        system = np.stack([dx, dy, dx * x + dy * y, dy * x - dx * y], axis=-1).reshape(-1, 4)
        total += np.linalg.lstsq(system, -dt.ravel(), rcond=None)[0]
    return total


def guess_label(clip: np.ndarray) -> int:
    """The class whose typical motion is nearest to the strongest measured one."""
    right, down, grow, clockwise = measure_motion(clip) / (0.4, 0.4, 0.65, 0.9)
    strength = dict(zip(MOTION_CLASSES, (-right, right, -down, down, grow, -grow, clockwise, -clockwise), strict=True))
    return MOTION_CLASSES.index(max(strength, key=strength.get))


def decode(path: Path) -> tuple[np.ndarray, float]:
    """uint8 [T, H, W, 3] and frames per second."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)]), float(stream.average_rate)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows(table: Path) -> list[dict[str, str]]:
    with open(table, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def small_set(tmp_path_factory) -> Path:
    return make_motion_set(tmp_path_factory.mktemp("motion") / "set", **SMALL)


# What a clip shows


def test_the_motion_in_the_pixels_is_that_of_the_class():
    labels = [i % 8 for i in range(64)]
    clips = [render_motion(label, np.random.default_rng([1, i])) for i, label in enumerate(labels)]
    right = np.mean([guess_label(clip) == label for clip, label in zip(clips, labels, strict=True)])
    # Played backwards, a clip belongs to the other class of its pair.
    reversed_right = np.mean([guess_label(clip[::-1]) == label ^ 1 for clip, label in zip(clips, labels, strict=True)])
    assert right >= 0.95 and reversed_right >= 0.95


def test_the_motion_survives_encoding(tmp_path):
    for label in range(8):
        write_video(tmp_path / "clip.mp4", render_motion(label, np.random.default_rng(label + 8)))
        assert guess_label(decode(tmp_path / "clip.mp4")[0]) == label


@pytest.mark.parametrize("label", range(0, 8, 2))
def test_a_pair_differs_by_the_order_of_frames_alone(label):
    for seed in range(3):
        first = render_motion(label, np.random.default_rng(seed), size=32)
        second = render_motion(label + 1, np.random.default_rng(seed), size=32)
        assert not np.array_equal(first, second)
        np.testing.assert_array_equal(first, second[::-1])


def test_a_random_frame_has_the_same_position_size_and_angle_in_every_class():
    """The exception is the position of rotating shapes, which are near the middle."""
    rng = np.random.default_rng(0)
    samples = [draw_poses(pair, rng, lambda: rng.integers(24)) for pair in range(4)]
    for pair in range(1, 4):
        same = [same_law(a, b) for a, b in zip(samples[0], samples[pair], strict=True)]
        assert same == [pair != 3, pair != 3, True, True]


@pytest.mark.parametrize("pair", range(4))
def test_the_first_frame_does_not_tell_where_the_shape_goes_or_how_it_turns(pair):
    """The last frame is the first of the other class of the pair. Only an approaching shape may differ in size."""
    rng = np.random.default_rng(pair)
    first, last = (draw_poses(pair, rng, lambda t=t: t) for t in (0, -1))
    assert [same_law(a, b) for a, b in zip(first, last, strict=True)] == [True, True, pair != 2, True]


def draw_poses(pair: int, rng: np.random.Generator, frame: Callable[[], int], draws: int = 2000) -> np.ndarray:
    """[4, draws]: x, y, radius and angle of many shapes, each in frame number `frame()`."""
    poses = [(motion._draw_trajectory(pair, rng, 24), frame()) for _ in range(draws)]
    return np.array([(p.x[t] % 1, p.y[t] % 1, p.radius[t], p.angle[t] % (2 * np.pi)) for p, t in poses]).T


def same_law(a: np.ndarray, b: np.ndarray) -> bool:
    """Kolmogorov-Smirnov test of two equally large samples at the 0.1 % level."""
    points = np.concatenate([a, b])
    share = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (a, b)]
    return np.abs(share[0] - share[1]).max() < 1.95 * np.sqrt(2 / len(a))


def test_a_turning_shape_moves_in_one_direction_and_then_in_another():
    labels = [i % 16 for i in range(64)]
    clips = [motion.render_turn(label, np.random.default_rng([2, i])) for i, label in enumerate(labels)]
    seen = [(guess_direction(clip[:10]), guess_direction(clip[-10:])) for clip in clips]
    wanted = [divmod(label, 4) for label in labels]
    right = np.mean([found == legs for found, legs in zip(seen, wanted, strict=True)])
    swapped = np.mean([found[::-1] == legs for found, legs in zip(seen, wanted, strict=True)])
    assert right >= 0.75 and swapped < 0.4  # directions may be nearly half-way between two; a quarter repeat the first


def guess_direction(clip: np.ndarray) -> int:
    """The direction of the measured motion: 0 right, 1 down, 2 left, 3 up."""
    right, down, *_ = measure_motion(clip)
    return round(np.arctan2(down, right) / (np.pi / 2)) % 4


@pytest.mark.parametrize("label", range(16))
def test_the_path_of_a_turn_lies_in_the_picture_and_has_the_legs_of_its_class(label):
    first, second = (motion.DIRECTIONS.index(name) for name in motion.TURN_CLASSES[label].split("-"))
    for seed in range(20):
        path = motion._draw_turn(label, np.random.default_rng(seed), 25)
        for leg, ends in ((first, (0, 10)), (second, (15, 24))):
            x, y = (np.diff(axis[list(ends)])[0] for axis in (path.x, path.y))
            off = (np.arctan2(y, x) - leg * np.pi / 2 + np.pi) % (2 * np.pi) - np.pi
            assert abs(off) <= motion.LEG_AIM + 1e-4
        assert min(path.x.min(), path.y.min()) > 0 and max(path.x.max(), path.y.max()) < 1


@pytest.mark.parametrize("size, frames", [(16, 2), (33, 20), (96, 28)])
def test_a_clip_is_bytes_of_the_asked_size(size, frames):
    clip = render_motion(5, np.random.default_rng(0), size=size, frames=frames)
    assert clip.shape == (frames, size, size, 3) and clip.dtype == np.uint8 and clip.flags.c_contiguous


def test_the_same_scene_at_another_size():
    """Sizes, positions and speeds are relative to the frame; only the noise differs."""
    small, large = (render_motion(6, np.random.default_rng(3), size=size).astype(np.float64) for size in (32, 64))
    halved = large.reshape(24, 32, 2, 32, 2, 3).mean((2, 4))
    assert np.abs(small - halved).mean() < 8


def test_an_unknown_label_is_refused():
    for label in (-1, 8):
        with pytest.raises(ValueError, match=f"label {label} is not a motion class"):
            render_motion(label, np.random.default_rng(0))
    with pytest.raises(ValueError, match="label 16 is not a class of turns"):
        motion.render_turn(16, np.random.default_rng(0))


# A file


def test_a_file_shows_the_drawn_pixels(tmp_path):
    for label in range(8):
        clip = render_motion(label, np.random.default_rng(label), frames=20 + label)
        write_video(tmp_path / "clip.mp4", clip, fps=10)
        seen, fps = decode(tmp_path / "clip.mp4")
        assert seen.shape == clip.shape and fps == 10
        # 4:2:0 keeps a quarter of the colour samples: judge brightness sharply and colour leniently.
        assert psnr(seen.mean(-1), clip.mean(-1)) > 32 and psnr(seen, clip) > 25


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))


def test_decord_reads_the_files(small_set):
    decord = pytest.importorskip("decord")
    path = next((small_set / "train").iterdir())
    assert len(decord.VideoReader(str(path))) == len(decode(path)[0])


@pytest.mark.parametrize("height, width", [(31, 32), (32, 31)])
def test_an_odd_size_is_refused(tmp_path, height, width):
    with pytest.raises(ValueError, match=f"even height and width, not {height}x{width}"):
        write_video(tmp_path / "clip.mp4", np.zeros((4, height, width, 3), np.uint8))
    with pytest.raises(ValueError, match="size must be even"):
        make_motion_set(tmp_path / "set", size=31)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "clip", [np.zeros((4, 32, 32, 3)), np.zeros((32, 32, 3), np.uint8), np.zeros((0, 32, 32, 3), np.uint8)]
)
def test_an_array_that_is_not_a_clip_is_refused(tmp_path, clip):
    with pytest.raises(ValueError, match="a clip is uint8"):
        write_video(tmp_path / "clip.mp4", clip)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(motion.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_video(path, np.zeros((4, 32, 32, 3), np.uint8))
    assert tree(tmp_path) == {"clip.mp4": b"old"}


# The set


def test_a_set_is_balanced_and_described_by_its_tables(small_set):
    seen = set()
    for split, count in (("train", 16), ("val", 8)):
        table = rows(small_set / f"{split}.csv")
        assert Counter(int(row["label"]) for row in table) == dict.fromkeys(range(8), count // 8)
        for row in table:
            assert row["class"] == MOTION_CLASSES[int(row["label"])] == Path(row["path"]).name.rsplit("_", 1)[0]
            clip, _ = decode(small_set / row["path"])
            assert 20 <= len(clip) <= 28 and clip.shape[1:] == (32, 32, 3)
            seen.add(clip.tobytes())
    assert len(seen) == 24  # no clip twice, in one split or in both
    assert len({len(clip) for clip in seen}) > 3  # lengths vary
    assert len(tree(small_set)) == 24 + 3


def test_the_same_seed_gives_the_same_bytes_for_any_number_of_processes(small_set, tmp_path):
    again = make_motion_set(tmp_path / "again", **{**SMALL, "processes": 2})
    assert tree(again) == tree(small_set)


SCRIPT = """
from posmlp.video.motion import make_motion_set
print(make_motion_set({folder!r}, train=16, val=8, size=32, processes=2))
"""


@pytest.mark.parametrize("how", ["from a pipe", "without a guard", "as an argument"])
def test_a_script_can_make_a_set_at_its_top_level(small_set, tmp_path, how):
    """Processes that import the caller's script fail for the first, and start without end for the second."""
    folder, script = tmp_path / "set", tmp_path / "script.py"
    text = SCRIPT.format(folder=str(folder))
    script.write_text(text)
    arguments = {"from a pipe": ["-"], "without a guard": [str(script)], "as an argument": ["-c", text]}[how]
    done = subprocess.run(
        [sys.executable, *arguments],
        input=text,
        text=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(Path(motion.__file__).parents[2])},
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{folder}\n", "")
    assert tree(folder) == tree(small_set)


def test_a_clip_that_cannot_be_written_is_named_by_its_process(tmp_path):
    (tmp_path / "train" / "right_00001.mp4").mkdir(parents=True)
    with pytest.raises(OSError, match=rf"the clips of {tmp_path} cannot be drawn: IsADirectoryError.*right_00001\.mp4"):
        make_motion_set(tmp_path, **{**SMALL, "processes": 2})
    assert not (tmp_path / "motion.json").exists()


def test_a_larger_set_begins_with_the_smaller_and_another_seed_gives_another(small_set, tmp_path):
    larger = tree(make_motion_set(tmp_path / "larger", **{**SMALL, "train": 17}))
    other = tree(make_motion_set(tmp_path / "other", **{**SMALL, "seed": 1}))
    for name, content in tree(small_set).items():
        if name.endswith(".mp4"):
            assert larger[name] == content != other[name]


def test_a_complete_set_is_left_unchanged(small_set, monkeypatch):
    monkeypatch.setattr(motion, "write_video", None)  # would fail if called
    assert make_motion_set(str(small_set), **SMALL) == small_set


def test_a_set_of_a_killed_run_is_completed(small_set, tmp_path, monkeypatch):
    folder, calls = tmp_path / "set", []

    def killed(path, clip, fps=12):
        calls.append(path)
        if len(calls) == 5:
            path.with_name(f"{path.name}.1.part").write_bytes(b"half a file")  # as a kill leaves it
            raise KeyboardInterrupt
        write_video(path, clip, fps)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(motion, "write_video", killed)
        make_motion_set(folder, **SMALL)
    assert not (folder / "motion.json").exists()
    assert tree(make_motion_set(folder, **SMALL)) == tree(small_set)

    os.remove(folder / rows(folder / "train.csv")[3]["path"])  # also a set that lost a file
    assert tree(make_motion_set(folder, **SMALL)) == tree(small_set)


@pytest.mark.parametrize("change", [{"seed": 1}, {"size": 48}, {"train": 24}, {"val": 16}])
def test_another_set_in_the_folder_is_refused(small_set, change):
    before = tree(small_set)
    with pytest.raises(ValueError, match=f"{small_set} holds another motion set.*choose another folder"):
        make_motion_set(small_set, **{**SMALL, **change})
    assert tree(small_set) == before


@pytest.mark.parametrize("name", ["notes.txt", "train/holiday.mp4", "train/left_00001.mp4"])
def test_a_folder_with_foreign_files_is_refused(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match=f"{tmp_path} holds files that do not belong.*{name}"):
        make_motion_set(tmp_path, **SMALL)
    assert tree(tmp_path) == {name: b"mine"}


def test_a_set_needs_clips_and_a_folder(tmp_path):
    with pytest.raises(ValueError, match="at least one clip"):
        make_motion_set(tmp_path / "set", train=0)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not a folder"):
        make_motion_set(tmp_path / "file")


def test_a_set_of_turns_has_its_classes_and_says_so(tmp_path):
    folder = make_motion_set(tmp_path, kind="turns", train=16, val=1, size=24, processes=1)
    assert [row["class"] for row in rows(folder / "train.csv")] == list(motion.TURN_CLASSES)
    assert json.loads((folder / "motion.json").read_text())["kind"] == "turns"


def test_the_record_names_what_was_made(small_set):
    record = json.loads((small_set / "motion.json").read_text())
    assert record == {"version": motion.SET_VERSIONS["motion"], "train": 16, "val": 8, "size": 32, "seed": 0}
