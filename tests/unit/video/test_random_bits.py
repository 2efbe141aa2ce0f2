"""Random numbers by counting, against published outputs, the formula in plain Python, and their distributions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from posmlp.video.random_bits import normals, random_bits, signed, uniforms

CPU = torch.device("cpu")
int64s = st.integers(-(2**63), 2**63 - 1)


def splitmix64(key, count):
    """The first outputs, in Python's integers."""
    outputs, mask = [], 2**64 - 1
    for n in range(1, count + 1):
        z = (key + n * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        outputs.append(z ^ (z >> 31))
    return outputs


def test_the_bits_are_those_that_are_published():
    """Of the state 1234567, as in the tests of other implementations."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [x % 2**64 for x in random_bits(torch.tensor(1234567), 4).tolist()] == published == splitmix64(1234567, 4)


@given(st.lists(int64s, min_size=1, max_size=3), st.integers(0, 40))
def test_bits_and_uniforms_follow_the_formula(keys, count):
    bits = [[signed(x) for x in splitmix64(key, count)] for key in keys]
    assert random_bits(torch.tensor(keys), count).tolist() == bits
    expected = [[(x % 2**64 >> 11) / 2**53 for x in row] for row in bits]
    assert uniforms(torch.tensor(keys), count).tolist() == expected


@given(st.lists(st.tuples(int64s, st.integers(0, 70)), min_size=1, max_size=4))
def test_normals_are_the_box_muller_transform_of_the_bits(wanted):
    """And those of a key are the same bit for bit whatever stands before them."""
    keys, counts = zip(*wanted, strict=True)
    found = normals(keys, counts, CPU)
    expected = [
        math.sqrt(-2 * math.log(((x >> 24) + 0.5) / 2**40)) * math.cos(math.tau * (x % 2**24) / 2**24)
        for key, count in wanted
        for x in splitmix64(key, count)
    ]
    np.testing.assert_allclose(found, expected, atol=2e-3, rtol=0)  # near a radius of 0 float32 has 7 digits of 1
    alone = [normals([key], [count], CPU) for key, count in wanted]
    assert torch.equal(found, torch.cat(alone))


def test_uniforms_are_uniform_and_independent():
    """Of seeds that follow each other, across seeds and within."""
    numbers = uniforms(torch.arange(500), 100).numpy()
    assert stats.kstest(numbers.flatten(), "uniform").pvalue > 0.01
    for table in (numbers, numbers.T):
        off_diagonal = np.corrcoef(table)[~np.eye(len(table), dtype=bool)] * math.sqrt(table.shape[1])
        assert off_diagonal.std() == pytest.approx(1, abs=0.03)
        assert np.abs(off_diagonal).max() < 6


def test_normals_are_normal():
    values = normals([3, 4], [200_000, 200_000], CPU).double()
    assert stats.kstest(values.numpy(), "norm").pvalue > 0.01
    assert values.mean().item() == pytest.approx(0, abs=0.006)
    assert values.var().item() == pytest.approx(1, abs=0.01)
    assert stats.skew(values) == pytest.approx(0, abs=0.02)
    assert stats.kurtosis(values) == pytest.approx(0, abs=0.04)
    one, other = values.view(2, -1)
    assert torch.corrcoef(torch.stack([one, other]))[0, 1].item() == pytest.approx(0, abs=0.01)
    assert torch.corrcoef(torch.stack([one[1:], one[:-1]]))[0, 1].item() == pytest.approx(0, abs=0.01)
    assert 4 < values.abs().max().item() < 7.5
