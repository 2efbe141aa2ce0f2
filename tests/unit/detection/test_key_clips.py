"""Clips around key frames: the right frames, one square for all of them, and boxes that lie where their people are."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from posmlp.config import Config
from posmlp.detection.clips import choose_key_cut, key_indices, load_key_clip, mirror, visible_boxes
from posmlp.video.clip import View, load_clips
from posmlp.video.decode import DecodeError
from tests.helpers.videos import numbers, picture, write_video


def make_config(frames=8, *, stride=2, seed=0, detection=None, short_side=None, size=32, **data):
    split = {"path": "unused"}
    return Config.model_validate(
        {
            "name": "t",
            "task": "detection",
            "model": {"frames": frames, "image_size": size},
            "data": {"format": "ava", "classes": "unused", "train": split, "val": split, "stride": stride} | data,
            "detection": detection or {},
            "train": {"seed": seed, "global_batch": 32 * data.get("repeats", 1)},
            "eval": {"short_side": short_side},
        }
    )


def load(video, time=2.0, config=None, *, train=False, epoch=0, sample_id="v,0902", **options):
    config = config or make_config()
    return load_key_clip(str(video), sample_id, time, config, epoch=epoch, train=train, **options)


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    """4 s of 10 frames a second; a clip of the whole of it says the numbers of its frames."""
    return write_video(tmp_path_factory.mktemp("square") / "v.mp4", 144, 144, options={"g": "12", "bf": "2"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 pictures of 144 x 144, as a template."""
    path = tmp_path_factory.mktemp("folder")
    for i in range(40):
        Image.fromarray(picture(i, 144, 144)).save(path / f"{i + 1:05d}.png")
    return f"{path}/{{:05d}}.png"


# Frames ---------------------------------------------------------------------------------------------------------------


def test_frames_around_a_key_frame_by_hand():
    assert key_indices(100, 50, 4, 3).tolist() == [44, 47, 50, 53]
    assert key_indices(100, 2, 4, 3).tolist() == [0, 0, 2, 5]
    assert key_indices(100, 98, 4, 3).tolist() == [92, 95, 98, 99]
    assert key_indices(1, 0, 3, 1).tolist() == [0, 0, 0]
    assert key_indices(900, 60, 16, 4)[[0, 8, 15]].tolist() == [28, 60, 88]  # c - 32 to c + 28


@given(st.integers(1, 60), st.data(), st.integers(1, 12), st.integers(1, 6))
def test_frames_around_a_key_frame(frames, data, count, stride):
    centre = data.draw(st.integers(0, frames - 1))
    found = key_indices(frames, centre, count, stride)
    half = count * stride // 2
    expected = [min(max(i, 0), frames - 1) for i in range(centre - half, centre - half + count * stride, stride)]
    assert found.dtype == np.int64 and found.tolist() == expected
    if count % 2 == 0:
        assert found[count // 2] == centre


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("cached", [False, True])
def test_a_clip_has_the_frames_around_its_second(square, tmp_path, train, cached):
    config = make_config(detection={"scale": (1, 1)}, cache_dir=str(tmp_path) if cached else None)
    for time, centre in ((2.0, 20), (1.0, 10), (0.0, 0), (1.95, 19), (3.9, 39), (4.0, 39)):
        loaded = load(square, time, config, train=train)
        assert loaded.clips.shape == (1, 8, 32, 32, 3) and loaded.clips.dtype == np.uint8
        assert loaded.decoder == "pyav"
        assert loaded.shown.tolist() == [[0, 0, 1, 1]]
        assert numbers(loaded.clips[0]) == [min(max(centre + 2 * i, 0), 39) for i in range(-4, 4)]


@pytest.mark.parametrize("rate", [10, 20, 30])
def test_clips_of_one_rate_show_the_same_moments_of_videos_of_any(tmp_path, rate):
    path = write_video(tmp_path / "v.mp4", 144, 144, count=4 * rate, rate=rate)
    (clip,) = load(path, 2.0, make_config(4, fps=5.0)).clips
    assert numbers(clip) == [rate * (10 + 2 * i) // 5 for i in range(-2, 2)]


def test_the_key_frame_of_a_varying_rate_is_the_one_on_the_screen(tmp_path):
    times = [0, 100, 200, 300, 1300, 2300, 3300, 3400, 3500, 3600]
    path = write_video(tmp_path / "v.mkv", 144, 144, count=10, times=times, rate=30)
    for time, shown in ((1.0, 3), (2.0, 4), (3.0, 5), (3.4, 7)):
        assert numbers(load(path, time, make_config(1, stride=1)).clips[0]) == [shown]


def test_a_frame_folder_needs_its_rate(folder):
    (clip,) = load(folder, 2.0, make_config(fps=10.0), images=40).clips
    assert numbers(clip) == [12, 14, 16, 18, 20, 22, 24, 26]
    with pytest.raises(DecodeError, match=r"no times .* key frame at 2 s; set data\.fps"):
        load(folder, 2.0, images=40)


@pytest.mark.parametrize("time", [902.0, 4.2, -1.0])
def test_a_key_frame_that_the_video_does_not_have_is_an_error(square, folder, time):
    for uri, options in ((square, {}), (folder, {"images": 40, "config": make_config(fps=10.0)})):
        with pytest.raises(DecodeError) as error:
            load(uri, time, **options)
        words = f"key frame at {time:g} s is not in the video, which lasts 4.00 s; set detection.first_second"
        assert words in str(error.value)


@pytest.mark.parametrize("train", [True, False])
def test_shuffled_frames_are_the_ordered_ones_in_another_order(square, train):
    ordered = load(square, train=train).clips[0]
    shuffled = load(square, config=make_config(frame_order="shuffled"), train=train)
    again = load(square, config=make_config(frame_order="shuffled"), train=train)
    frames, others = ([frame.tobytes() for frame in clip] for clip in (ordered, shuffled.clips[0]))
    assert sorted(frames) == sorted(others) and frames != others
    np.testing.assert_array_equal(shuffled.clips, again.clips)


# What is shown --------------------------------------------------------------------------------------------------------


def test_a_training_clip_depends_on_seed_epoch_sample_and_view_alone(square):
    three = load(square, config=make_config(repeats=3), train=True)
    assert three.clips.shape[0] == len({each.tobytes() for each in three.shown}) == 3
    for view in range(3):
        alone = load(square, train=True, first_view=view)
        np.testing.assert_array_equal(alone.clips[0], three.clips[view])
        np.testing.assert_array_equal(alone.shown[0], three.shown[view])
    for options in ({"config": make_config(seed=1)}, {"epoch": 1}, {"sample_id": "v,0903"}):
        assert (load(square, train=True, **options).shown != three.shown[0]).any()


def test_validation_shows_the_centre_square_as_recognition_does(tmp_path):
    path = write_video(tmp_path / "v.mp4", 160, 120, count=1)
    loaded, scaled = (load(path, 0.0, make_config(1, short_side=side)) for side in (None, 40))
    np.testing.assert_allclose(loaded.shown, [[0.125, 0, 0.875, 1]], atol=0.02)
    np.testing.assert_allclose(scaled.shown, [[0.2, 0.1, 0.8, 0.9]], atol=0.02)  # 32 of 53 x 40 pixels
    tree = make_config(1).model_dump()
    tree["data"]["short_side"] = 46  # 10/7 of 32, as decoded for detection
    for section, found in ((None, loaded), (40, scaled)):
        config = Config.model_validate(tree | {"eval": {"short_side": section}})
        clips, _ = load_clips(path, "any", config, epoch=0, train=False)
        np.testing.assert_array_equal(found.clips, clips)


@pytest.mark.parametrize(("width", "height"), [(160, 120), (120, 160)])
@pytest.mark.parametrize(("short_side", "expected"), [(None, 32), (40, 40), (80, 80)])
def test_a_whole_frame_keeps_its_aspect(tmp_path, width, height, short_side, expected):
    path = write_video(tmp_path / "v.mp4", width, height, count=1)
    config = make_config(2, detection={"whole_frame": True}, short_side=short_side)
    loaded = load(path, 0.0, config)
    assert min(loaded.clips.shape[2:4]) == expected
    assert (loaded.clips.shape[3] > loaded.clips.shape[2]) == (width > height)
    assert max(loaded.clips.shape[2:4]) == pytest.approx(expected * 4 / 3, abs=1)
    assert loaded.shown.tolist() == [[0, 0, 1, 1]]
    assert load(path, 0.0, config, train=True).clips.shape == (1, 2, 32, 32, 3)


def test_training_squares_are_uniform_in_scale_and_place():
    """The crop's share of the short side is 1 / scale, uniform; every place is as likely as any other."""
    config, rng = make_config(detection={"scale": (1.25, 2.5)}), np.random.default_rng(0)
    cuts = [choose_key_cut(9000, 20000, View(np.zeros(1, np.int64), rng), config) for _ in range(2000)]
    sides = np.array([cut.box.width for cut in cuts]) / 9000
    assert all(cut.box.width == cut.box.height and cut.frame == (9000, 20000) for cut in cuts)
    assert all(cut.size == (32, 32) for cut in cuts)
    assert stats.kstest(sides, "uniform", (0.4, 0.4)).pvalue > 0.01
    for extent, starts in ((9000, [cut.box.top for cut in cuts]), (20000, [cut.box.left for cut in cuts])):
        places = np.array(starts) / (extent - 9000 * sides)
        assert stats.kstest(places, "uniform").pvalue > 0.01


# Boxes ----------------------------------------------------------------------------------------------------------------


def rectangles(count, rng, width, height):
    """Of each frame, a rectangle of whole pixels: x1, y1, x2, y2."""
    found = []
    for _ in range(count):
        w, h = int(rng.integers(12, width // 2)), int(rng.integers(12, height // 2))
        x, y = int(rng.integers(width - w)), int(rng.integers(height - h))
        found.append((x, y, x + w, y + h))
    return found


@pytest.fixture(scope="module", params=[(160, 96), (96, 128)])
def drawn(request, tmp_path_factory):
    """A video whose frame n has a bright rectangle on dark ground, and the rectangles as fractions: [40, 4]."""
    width, height = request.param
    boxes = rectangles(40, np.random.default_rng(width), width, height)

    def frame(picture_of_number):
        pixels = np.zeros_like(picture_of_number)
        x1, y1, x2, y2 = boxes[frame.number]
        pixels[y1:y2, x1:x2] = 255
        frame.number += 1
        return pixels

    frame.number = 0
    path = tmp_path_factory.mktemp("drawn") / "v.mp4"
    write_video(path, width, height, options={"crf": "2"}, change=frame)
    return path, np.array(boxes, np.float32) / np.array([width, height, width, height], np.float32)


@pytest.mark.parametrize(
    ("train", "options"),
    [
        (True, {}),
        (True, {"short_side": 80}),
        (False, {}),
        (False, {"short_side": 72}),
        (False, {"detection": {"whole_frame": True}}),
    ],
)
def test_a_bright_rectangle_lies_where_its_moved_box_says(drawn, train, options):
    path, boxes = drawn
    config, kept_ones = make_config(1, stride=1, size=64, **options), 0
    for number, box in enumerate(boxes):
        loaded = load(path, number / 10, config, train=train, sample_id=f"v,{number}")
        (clip,), (shown,) = loaded.clips, loaded.shown
        moved, kept = visible_boxes(box[None], shown, 0.0)
        bright = clip[0, ..., 0] > 127
        height, width = bright.shape
        for pixels, place in ((bright, moved), (bright[:, ::-1], mirror(moved))):
            if not kept[0]:
                assert pixels.mean() < 0.01
                continue
            x1, y1, x2, y2 = place[0] * (width, height, width, height)
            if min(x2 - x1, y2 - y1) < 3:  # a sliver at the border
                continue
            columns, rows = np.flatnonzero(pixels.any(0)), np.flatnonzero(pixels.any(1))
            found = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            np.testing.assert_allclose(found, (x1, y1, x2, y2), atol=1.5)
            kept_ones += 1
    assert kept_ones > 50


cells = st.integers(0, 12)
intervals = st.tuples(cells, cells).filter(lambda pair: pair[0] < pair[1])


@given(st.lists(st.tuples(intervals, intervals), max_size=4), st.tuples(intervals, intervals), st.floats(0, 1))
def test_the_visible_share_of_a_box_by_counting_cells(pairs, view, share):
    """Of a frame of 12 x 12 cells."""
    grid = np.zeros((12, 12), bool)
    (left, right), (top, bottom) = view
    grid[top:bottom, left:right] = True
    boxes = np.array([(x1, y1, x2, y2) for (x1, x2), (y1, y2) in pairs], np.float32).reshape(-1, 4) / 12
    shown = np.array([left, top, right, bottom], np.float32) / 12
    moved, kept = visible_boxes(boxes, shown, share)
    assert moved.dtype == np.float32 and moved.shape == boxes.shape and kept.dtype == bool
    for ((x1, x2), (y1, y2)), box, seen in zip(pairs, moved, kept, strict=True):
        inside = grid[y1:y2, x1:x2]
        if abs(inside.mean() - share) > 1e-4:
            assert seen == (inside.any() and inside.mean() > share)
        if inside.any():
            rows, columns = np.flatnonzero(inside.any(1)) + y1, np.flatnonzero(inside.any(0)) + x1
            corners = columns[0] - left, rows[0] - top, columns[-1] + 1 - left, rows[-1] + 1 - top
            sides = right - left, bottom - top, right - left, bottom - top
            np.testing.assert_allclose(box, np.divide(corners, sides), atol=1e-5)


def test_a_box_that_is_all_there_is_kept_at_any_share():
    generator = np.random.default_rng(0)
    corner, extent = generator.random((2000, 2)) * 0.5, generator.random((2000, 2)) * 0.5
    boxes = np.concatenate([corner, corner + extent], 1).astype(np.float32)
    for box in boxes:
        assert visible_boxes(box[None], box, 1.0)[1].all()
    assert not visible_boxes(np.array([[0.2, 0.2, 0.2, 0.6]], np.float32), np.array([0, 0, 1, 1], np.float32), 0)[1]


def test_mirrored_twice_is_the_same():
    boxes = np.array([[0.25, 0.125, 0.5, 0.75], [0, 0, 1, 1]], np.float32)
    assert mirror(boxes).tolist() == [[0.5, 0.125, 0.75, 0.75], [0, 0, 1, 1]]
    np.testing.assert_array_equal(mirror(mirror(boxes)), boxes)
