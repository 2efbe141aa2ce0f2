"""Frame indices, crops and the per-sample generator: valid ranges for any input, and the documented rules."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posmlp.video.sampling import (
    Box,
    dense_indices,
    fixed_crop,
    fps_indices,
    paced_indices,
    random_resized_crop,
    sample_rng,
    sample_seed,
    scaled_to_short_side,
    slowfast_dense_indices,
    slowfast_uniform_indices,
    square_crop,
    uniform_indices,
)

CLIPS = st.integers(1, 12).flatmap(lambda clips: st.tuples(st.integers(0, clips - 1), st.just(clips)))
SIZE = st.integers(1, 2000)
RNG = st.none() | st.integers(0, 2**32).map(np.random.default_rng)


def rng(seed=0):
    return np.random.default_rng(seed)


def check_indices(indices, num_frames, count):
    assert indices.dtype == np.int64
    assert indices.shape == (count,)
    assert indices.min() >= 0
    assert indices.max() < num_frames
    assert (np.diff(indices) >= 0).all()


@given(SIZE, st.integers(1, 64), RNG)
def test_uniform_takes_one_frame_of_each_segment(num_frames, count, generator):
    indices = uniform_indices(num_frames, count, generator)
    check_indices(indices, num_frames, count)
    edges = np.arange(count + 1) * num_frames / count
    assert (indices >= np.floor(edges[:-1])).all()
    assert (indices < np.ceil(edges[1:])).all()


@given(SIZE, st.integers(1, 64), CLIPS)
def test_uniform_clips_take_the_centre_of_their_part_of_each_segment(num_frames, count, clip_of):
    clip, clips = clip_of
    indices = uniform_indices(num_frames, count, None, clip, clips)
    check_indices(indices, num_frames, count)
    # the centre, in whole numbers: (segment + (2 clip + 1) / (2 clips)) * num_frames / count
    exact = [((2 * clips * t + 2 * clip + 1) * num_frames) // (2 * clips * count) for t in range(count)]
    assert (np.abs(indices - exact) <= 1).all()
    assert (indices == exact).mean() > 0.5 or count < 4
    edges = (np.arange(count) + clip / clips) * num_frames / count
    assert (indices >= np.floor(edges - 1e-9)).all()
    assert (indices <= np.ceil(edges + num_frames / count / clips)).all()


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 8))
def test_uniform_clips_together_are_one_longer_clip(count, clips, part):
    """If every part has whole frames, the interleaved clips are the one clip of all parts' centres."""
    num_frames = count * clips * (2 * part - 1)
    together = [uniform_indices(num_frames, count, None, clip, clips) for clip in range(clips)]
    merged = np.stack(together, axis=1).ravel()
    np.testing.assert_array_equal(merged, part - 1 + np.arange(count * clips) * (2 * part - 1))


def test_uniform_takes_the_centre_without_a_generator():
    assert uniform_indices(40, 4, None).tolist() == [5, 15, 25, 35]
    assert uniform_indices(3, 6, None).tolist() == [0, 0, 1, 1, 2, 2]


def test_uniform_stays_inside_when_the_last_draw_rounds_up():
    class Highest:
        def random(self, count):
            return np.full(count, np.nextafter(1.0, 0.0))

    assert uniform_indices(40, 4, Highest()).max() == 39


def test_uniform_can_reach_every_frame():
    generator = rng()
    assert {i for _ in range(300) for i in uniform_indices(12, 3, generator).tolist()} == set(range(12))


@given(SIZE, st.integers(1, 64), st.floats(0.1, 1), st.floats(1, 3), st.floats(0, 0.99), st.integers(0, 2**32))
def test_a_paced_clip_is_in_the_order_of_the_video(num_frames, count, shortest, longest, pace, seed):
    check_indices(paced_indices(num_frames, count, (shortest, longest), pace, rng(seed)), num_frames, count)


@given(SIZE, st.integers(1, 64), st.integers(0, 2**32))
def test_a_paced_clip_of_the_whole_video_at_one_speed_has_a_frame_of_each_segment(num_frames, count, seed):
    indices = paced_indices(num_frames, count, (1, 1), 0, rng(seed))
    edges = np.arange(count + 1) * num_frames / count
    assert (indices >= np.floor(edges[:-1])).all() and (indices < np.ceil(edges[1:])).all()


def test_a_paced_clip_covers_its_share_of_the_video_at_any_place():
    clips = np.stack([paced_indices(100_000, 1000, (0.5, 0.5), 0, rng(seed)) for seed in range(200)])
    assert (np.abs(clips[:, -1] - clips[:, 0] - 50_000) < 200).all()
    assert clips[:, 0].min() < 2_000 and clips[:, 0].max() > 48_000
    longer = np.stack([paced_indices(1000, 100, (2, 2), 0, rng(seed)) for seed in range(50)])
    repeated = (longer == 0).sum(1) + (longer == 999).sum(1)
    assert (np.abs(repeated - 50) <= 2).all()  # half of a clip of twice the length has the video


@pytest.mark.parametrize("pace", [0.3, 0.9])
def test_the_speed_of_a_paced_clip_varies_by_the_pace_and_its_mean_stays(pace):
    speeds = []
    for seed in range(200):
        indices = paced_indices(10_000_000, 400, (1, 1), pace, rng(seed))
        assert indices[0] < 100_000 and indices[-1] > 9_900_000  # from the first to the last of 400 segments
        speeds.append((indices[20:] - indices[:-20]) / 20 * 400 / 10_000_000)
    assert 1 - pace - 0.1 < np.min(speeds) < 1 - 0.8 * pace
    assert 1 + 0.8 * pace < np.max(speeds) < 1 + pace + 0.1


@pytest.mark.parametrize("share, pace", [((0, 1), 0), ((2, 1), 0), ((1, 1), 1), ((1, 1), -0.1)])
def test_a_paced_clip_refuses_impossible_shares_and_paces(share, pace):
    with pytest.raises(ValueError, match="share"):
        paced_indices(10, 4, share, pace, rng())


@given(SIZE, st.integers(1, 64), st.integers(1, 16), RNG)
def test_dense_keeps_the_stride_and_repeats_the_last_frame(num_frames, count, stride, generator):
    indices = dense_indices(num_frames, count, stride, generator)
    check_indices(indices, num_frames, count)
    whole = indices[indices < num_frames - 1]
    assert (np.diff(whole) == stride).all()
    if num_frames > (count - 1) * stride:
        assert (np.diff(indices) == stride).all()
    else:
        assert indices[0] == 0


@given(SIZE, st.integers(1, 64), st.integers(1, 16), st.integers(1, 12))
def test_dense_clips_reach_from_the_first_frame_to_the_last(num_frames, count, stride, clips):
    found = [dense_indices(num_frames, count, stride, None, clip, clips) for clip in range(clips)]
    for indices in found:
        check_indices(indices, num_frames, count)
    starts = np.array([int(indices[0]) for indices in found])
    spare = max(0, num_frames - (count - 1) * stride - 1)
    if clips == 1:
        assert abs(2 * starts[0] - spare) <= 1
        return
    assert starts[0] == 0
    assert found[-1][-1] == num_frames - 1
    assert (np.abs(starts - np.arange(clips) * spare / (clips - 1)) <= 0.5).all()


def test_dense_is_centred_without_a_generator():
    assert dense_indices(11, 3, 2, None).tolist() == [3, 5, 7]
    assert dense_indices(4, 4, 2, None).tolist() == [0, 2, 3, 3]


def test_dense_clips_that_start_between_two_frames_start_at_the_later():
    """Of three clips of 4 frames in 5, the second would start at 0.5; of five in 9, others at 1.25, 2.5 and 3.75."""
    assert [dense_indices(5, 4, 1, None, clip, 3)[0] for clip in range(3)] == [0, 1, 1]
    assert [dense_indices(9, 4, 1, None, clip, 5)[0] for clip in range(5)] == [0, 1, 3, 4, 5]


def test_dense_can_start_anywhere_that_fits():
    generator = rng()
    assert {int(dense_indices(10, 3, 2, generator)[0]) for _ in range(200)} == set(range(6))


RANGE = st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)).map(sorted).map(tuple)
RATIO = st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(sorted).map(tuple)


@given(SIZE, SIZE, RANGE, RATIO, st.integers(0, 2**32))
def test_a_crop_is_always_inside(height, width, scale, ratio, seed):
    box = random_resized_crop(height, width, scale, ratio, rng(seed))
    assert all(isinstance(value, int) for value in box)
    assert box.top >= 0
    assert box.left >= 0
    assert box.height >= 1
    assert box.width >= 1
    assert box.top + box.height <= height
    assert box.left + box.width <= width


def test_a_crop_keeps_to_its_ranges_and_reaches_the_edges():
    boxes = [random_resized_crop(240, 320, (0.3, 0.9), (0.75, 4 / 3), rng(seed)) for seed in range(400)]
    for box in boxes:
        assert 0.29 < box.height * box.width / (240 * 320) < 0.91
        assert 0.74 < box.width / box.height < 1.35
    assert min(box.top for box in boxes) == 0
    assert max(box.left + box.width for box in boxes) == 320


def test_a_crop_that_never_fits_is_the_largest_centred_one():
    assert random_resized_crop(10, 100, (1.0, 1.0), (1.0, 1.0), rng()) == Box(0, 45, 10, 10)
    assert random_resized_crop(100, 10, (1.0, 1.0), (0.5, 0.5), rng()) == Box(40, 0, 20, 10)


class Draws:
    """A generator whose shares of the area and ratios are given, and whose positions are the last possible."""

    def __init__(self, *areas_and_ratios):
        self.given, self.used = list(areas_and_ratios), 0

    def uniform(self, low, high):
        value = self.given[self.used % len(self.given)]
        self.used += 1
        return value if self.used % 2 else math.log(value)

    def integers(self, count):
        return count - 1


@pytest.mark.parametrize(
    ("height", "width", "area", "ratio", "box"),
    [
        (40, 100, 0.25, 2.5, Box(20, 50, 20, 50)),  # 1000 of 4000 pixels
        (40, 100, 0.4, 1.0, Box(0, 60, 40, 40)),  # as high as the frame
        (100, 40, 0.4, 1.0, Box(60, 0, 40, 40)),  # as wide as the frame
        (50, 50, 1.0, 1.0, Box(0, 0, 50, 50)),
        (100, 100, 0.0001, 1.0, Box(99, 99, 1, 1)),
        (100, 100, 0.0004, 4.0, Box(99, 96, 1, 4)),
        (100, 100, 0.0004, 0.25, Box(96, 99, 4, 1)),
    ],
)
def test_a_draw_that_fits_is_taken(height, width, area, ratio, box):
    draws = Draws(area, ratio)
    assert random_resized_crop(height, width, (0, 1), (0.1, 10), draws) == box
    assert draws.used == 2


@pytest.mark.parametrize(
    ("area", "ratio"), [(0.9, 9.0), (0.9, 1 / 9), (1e-9, 1.0), (2e-4, 9.0), (2e-4, 1 / 9)], ids=str
)
def test_after_ten_draws_that_do_not_fit_the_crop_is_the_largest_centred_one(area, ratio):
    """Too wide, too high, of no pixel, of no line, of no column."""
    draws = Draws(area, ratio)
    assert random_resized_crop(60, 60, (0, 1), (1.5, 2), draws) == Box(10, 0, 40, 60)
    assert draws.used == 20
    late = Draws(*[area, ratio] * 9, 0.25, 1.0)
    assert random_resized_crop(60, 60, (0, 1), (0.5, 2), late) == Box(30, 30, 30, 30)


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(10, 100, Box(0, 40, 10, 20)), (100, 10, Box(40, 0, 20, 10)), (60, 100, Box(0, 0, 60, 100))],
    ids=["too wide", "too high", "as allowed"],
)
def test_the_largest_centred_crop_has_the_nearest_allowed_shape(height, width, box):
    assert random_resized_crop(height, width, (4.0, 4.0), (0.5, 2.0), rng()) == box


def test_the_shape_of_a_crop_is_not_biased():
    boxes = [random_resized_crop(1000, 1000, (0.1, 0.3), (0.5, 2.0), rng(seed)) for seed in range(2000)]
    assert abs(np.mean([math.log(box.width / box.height) for box in boxes])) < 0.05


@given(SIZE, SIZE)
def test_one_square_is_centred(height, width):
    box = square_crop(height, width)
    assert box.height == box.width == min(height, width)
    assert abs(height - box.height - 2 * box.top) <= 1
    assert abs(width - box.width - 2 * box.left) <= 1
    assert square_crop(height, width, 1, 3) == box


@given(SIZE, SIZE)
def test_three_squares_reach_both_ends_of_the_longer_side(height, width):
    first, middle, last = (square_crop(height, width, crop, 3) for crop in range(3))
    side = min(height, width)
    for box in (first, middle, last):
        assert (box.height, box.width) == (side, side)
        assert 0 <= box.top <= height - side
        assert 0 <= box.left <= width - side
        assert all(isinstance(value, int) for value in box)
    assert (first.top, first.left) == (0, 0)
    assert (last.top, last.left) == (height - side, width - side)
    if max(height, width) <= 3 * side:  # then no pixel is left out
        assert max(middle.top, middle.left) <= side
        assert max(last.top - middle.top, last.left - middle.left) <= side


# Frame rates ----------------------------------------------------------------------------------------------------------

RATES = st.sampled_from([1.0, 10.0, 12.5, 23.976, 24.0, 25.0, 30000 / 1001, 29.97, 30.0, 50.0, 59.94, 60.0, 120.0])


# Seconds: MPEG, microseconds, and Matroska and FLV, whose milliseconds are coarse for frames 33.4 apart
UNITS = st.sampled_from([0.0, 1e-6, 1 / 90000, 1e-3])


def constant(fps, count, unit, start=0.0):
    """Times of frames at a constant rate, as a stream stores them, relative to the first frame."""
    times = start + np.arange(count) / fps
    if unit:
        times = np.round(times / unit) * unit
    return times - times[0]


@given(RATES, st.integers(1, 2000), UNITS, st.floats(0, 1))
def test_the_videos_own_rate_takes_every_frame(fps, count, unit, start):
    times = constant(fps, count, unit, start)
    np.testing.assert_array_equal(fps_indices(times, fps), np.arange(count))


@given(RATES, st.integers(1, 600), st.integers(1, 6), UNITS, st.floats(0, 1))
def test_a_whole_part_of_the_rate_takes_every_nth_frame(fps, parts, divisor, unit, start):
    times = constant(fps, parts * divisor, unit, start)
    np.testing.assert_array_equal(fps_indices(times, fps / divisor), np.arange(parts) * divisor)


@given(RATES, st.integers(2, 500), st.integers(2, 6))
def test_a_multiple_of_the_rate_repeats_every_frame(fps, count, factor):
    times = np.arange(count) / fps
    if factor * fps < 600:  # moments further apart than times are rounded
        np.testing.assert_array_equal(fps_indices(times, fps * factor), np.repeat(np.arange(count), factor))


GAPS = st.lists(st.integers(2, 3000), max_size=60)  # thousandths of a second


@given(GAPS, st.floats(0.1, 100))
def test_the_frame_shown_at_each_moment_is_taken(gaps, fps):
    times = np.cumsum([0, *gaps]) / 1000
    indices = fps_indices(times, fps)
    assert indices.dtype == np.int64
    duration = times[-1] * len(times) / (len(times) - 1) if gaps else 0.0
    assert len(indices) == max(1, round(duration * fps))
    for i, index in enumerate(indices.tolist()):
        moment = i / fps + 0.0015  # times are rounded
        shown = max(frame for frame, time in enumerate(times) if time <= moment)
        assert index == shown
    assert indices[0] == 0
    assert (np.diff(indices) >= 0).all()


def test_fps_examples():
    even = np.arange(10) / 10
    assert fps_indices(even, 5).tolist() == [0, 2, 4, 6, 8]
    assert fps_indices(even, 20).tolist() == np.repeat(np.arange(10), 2).tolist()
    assert fps_indices(even, 4).tolist() == [0, 2, 5, 7]
    assert fps_indices(even, 0.01).tolist() == [0]
    assert fps_indices(np.zeros(1), 30).tolist() == [0]
    assert fps_indices(np.array([0.0, 0.5 + 0.0015]), 2).tolist() == [0, 1]  # as late as rounding makes it
    assert fps_indices(np.array([0.0, 0.1, 0.2, 1.2, 1.3, 1.4]), 2).tolist() == [0, 2, 2]


# The generator --------------------------------------------------------------------------------------------------------


def test_the_generator_depends_on_each_of_its_four_values_and_on_nothing_else():
    draws = {
        arguments: sample_rng(*arguments).integers(2**62)
        for arguments in [
            (0, 0, "a", 0),
            (1, 0, "a", 0),
            (0, 1, "a", 0),
            (0, 0, "b", 0),
            (0, 0, "a", 1),
            (0, 0, "0/a", 0),
        ]
    }
    assert len(set(draws.values())) == len(draws)
    assert sample_rng(0, 1, "a").integers(2**62) == draws[(0, 1, "a", 0)]


def test_the_seed_depends_on_each_of_its_four_values():
    keys = [(0, 0, "a", 0), (1, 0, "a", 0), (0, 1, "a", 0), (0, 0, "b", 0), (0, 0, "a", 1), (0, 0, "0/a", 0)]
    seeds = {sample_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)  # what PyTorch takes, and int64 holds
    assert sample_seed(0, 0, "a") == sample_seed(0, 0, "a", 0)


def test_the_seed_stays_the_same_over_releases():
    assert sample_seed(7, 3, "walk/é 1.mp4", 2) == 5257217324274688114
    assert sample_seed(0, 0, "a") == 3757922900447577263


def test_the_generator_stays_the_same_over_releases():
    """A change here changes every training clip, so resumed runs would differ from uninterrupted ones."""
    assert sample_rng(7, 3, "walk/é 1.mp4", 2).integers(1000, size=4).tolist() == [708, 285, 914, 658]


@pytest.mark.parametrize(
    "call",
    [
        lambda: uniform_indices(0, 4, None),
        lambda: uniform_indices(4, 0, None),
        lambda: dense_indices(4, 4, 0, None),
        lambda: dense_indices(0, 4, 1, None),
        lambda: dense_indices(4, 0, 1, None),
        lambda: uniform_indices(4, 4, None, 2, 2),
        lambda: uniform_indices(4, 4, None, -1, 2),
        lambda: dense_indices(4, 4, 1, None, 3, 3),
        lambda: square_crop(0, 4),
        lambda: square_crop(4, 0),
        lambda: random_resized_crop(0, 4, (0.1, 0.9), (1.0, 1.0), rng()),
        lambda: random_resized_crop(4, 0, (0.1, 0.9), (1.0, 1.0), rng()),
        lambda: square_crop(4, 4, 0, 2),
        lambda: square_crop(4, 4, 3, 3),
        lambda: square_crop(4, 4, 1, 1),
        lambda: fps_indices(np.zeros(0), 1.0),
        lambda: fps_indices(np.zeros(3), 0.0),
        lambda: fps_indices(np.zeros(3), math.nan),
        lambda: random_resized_crop(4, 4, (0.9, 0.1), (1.0, 1.0), rng()),
        lambda: random_resized_crop(4, 4, (0.1, 0.9), (0.0, 1.0), rng()),
    ],
)
def test_impossible_sizes_are_refused(call):
    with pytest.raises(ValueError, match="must be"):
        call()


# The published code's rules --------------------------------------------------------------------------------------


@given(SIZE, SIZE, st.integers(1, 300), st.integers(0, 2))
def test_crops_of_the_published_code(height, width, size, crop):
    """PySlowFast's rule, written as its documentation says: centred, rounded up, and moved along the longer side."""
    size = min(size, height, width)
    top, left = math.ceil((height - size) / 2), math.ceil((width - size) / 2)
    assert fixed_crop(height, width, size) == Box(top, left, size, size)
    if height > width:
        top = (0, top, height - size)[crop]
    else:
        left = (0, left, width - size)[crop]
    assert fixed_crop(height, width, size, crop, 3) == Box(top, left, size, size)


def test_the_short_side_of_the_published_code():
    assert scaled_to_short_side(240, 320, 256) == (256, 341)
    assert scaled_to_short_side(320, 240, 256) == (341, 256)
    assert scaled_to_short_side(100, 100, 224) == (224, 224)


def test_frames_of_the_published_code():
    """Worked out by hand: 33 frames in 16 segments of 2; a clip of 64 of 300 frames, four positions."""
    assert slowfast_uniform_indices(33, 16).tolist() == [2 * i + 1 for i in range(16)]
    assert slowfast_uniform_indices(33, 16, 0, 2).tolist() == [2 * i for i in range(16)]
    starts = [slowfast_dense_indices(300, 16, 64.0, clip, 4)[0] for clip in range(4)]
    assert starts == [0, 78, 156, 234]
    assert slowfast_dense_indices(300, 16, 64.0)[0] == 118
    assert slowfast_dense_indices(300, 4, 64.0, 0, 4).tolist() == [0, 21, 42, 63]
    assert slowfast_dense_indices(10, 4, 64.0).tolist() == [0, 9, 9, 9]


@given(st.integers(1, 500), st.integers(1, 64), CLIPS)
def test_frames_of_the_published_code_are_in_the_video(frames, count, clip_of):
    check_indices(slowfast_uniform_indices(frames, count, *clip_of), frames, count)
    check_indices(slowfast_dense_indices(frames, count, count * 4.0, *clip_of), frames, count)
