"""Frame indices, crops and the per-sample generator: ranges for any input, and what the rules promise."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posmlp.video.sampling import (
    Box,
    centre_crop,
    dense_indices,
    random_resized_crop,
    sample_rng,
    uniform_indices,
)

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


def test_dense_is_centred_without_a_generator():
    assert dense_indices(11, 3, 2, None).tolist() == [3, 5, 7]
    assert dense_indices(4, 4, 2, None).tolist() == [0, 2, 3, 3]


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


def test_the_shape_of_a_crop_is_not_biased():
    boxes = [random_resized_crop(1000, 1000, (0.1, 0.3), (0.5, 2.0), rng(seed)) for seed in range(2000)]
    assert abs(np.mean([math.log(box.width / box.height) for box in boxes])) < 0.05


@given(SIZE, SIZE)
def test_the_centre_crop_is_a_centred_square(height, width):
    box = centre_crop(height, width)
    assert box.height == box.width == min(height, width)
    assert abs(height - box.height - 2 * box.top) <= 1
    assert abs(width - box.width - 2 * box.left) <= 1


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


def test_the_generator_stays_the_same_over_releases():
    """A change here changes every training clip: resumed runs would no longer see what they would have seen."""
    assert sample_rng(7, 3, "walk/é 1.mp4", 2).integers(1000, size=4).tolist() == [708, 285, 914, 658]


@pytest.mark.parametrize(
    "call",
    [
        lambda: uniform_indices(0, 4, None),
        lambda: uniform_indices(4, 0, None),
        lambda: dense_indices(4, 4, 0, None),
        lambda: centre_crop(0, 4),
        lambda: random_resized_crop(4, 4, (0.9, 0.1), (1.0, 1.0), rng()),
        lambda: random_resized_crop(4, 4, (0.1, 0.9), (0.0, 1.0), rng()),
    ],
)
def test_impossible_sizes_are_refused(call):
    with pytest.raises(ValueError, match="must be"):
        call()
