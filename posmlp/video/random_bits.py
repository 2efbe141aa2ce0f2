"""Random numbers that are a function of a key and a counter, the same on every device.

Number n of a key is SplitMix64's n-th output from that state (Steele, Lea and Flood, OOPSLA 2014,
https://doi.org/10.1145/2660193.2660195). There is no generator with a state, so all numbers of all clips are computed
at once, and a clip's numbers depend neither on its place in the batch nor on the kind of device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# SplitMix64's shifts, and its factors as signed integers. Products wrap around at 64 bits.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))


def scramble(state: Tensor) -> Tensor:
    """Turn states of SplitMix64 into its outputs: int64, in place."""
    for shift, factor in ROUNDS:
        high = (state >> shift).bitwise_and_(2 ** (64 - shift) - 1)  # >> copies the sign bit; the mask drops the copies
        state.bitwise_xor_(high).mul_(factor)
    return state


def random_bits(keys: Tensor, count: int) -> Tensor:
    """The first ``count`` numbers of each key: int64 ``[...]`` to int64 ``[..., count]``."""
    counters = torch.arange(1, count + 1, device=keys.device)
    return scramble(keys.unsqueeze(-1) + counters.mul_(GOLDEN))


def uniforms(keys: Tensor, count: int) -> Tensor:
    """The first ``count`` numbers of each key, uniform in [0, 1) with 53 bits: float64 ``[..., count]``."""
    return (random_bits(keys, count) >> 11).bitwise_and_(2**53 - 1).double().mul_(2.0**-53)


def normals(keys: Sequence[int], counts: Sequence[int], device: torch.device) -> Tensor:
    """The first numbers of some keys, from N(0, 1): float32 ``[sum(counts)]``, the keys one after the other.

    By the Box-Muller transform, from 40 bits for the radius and 24 for the angle. Devices differ in the last digits.

    Args:
        keys: int64 values.
        counts: how many numbers of each key.
    """
    state = torch.arange(1, sum(counts) + 1, device=device).mul_(GOLDEN)
    start = 0
    for key, count in zip(keys, counts, strict=True):
        state[start : start + count] += signed(key - start * GOLDEN)  # each key counts from 1
        start += count
    bits = scramble(state)
    radius = (bits >> 24).bitwise_and_(2**40 - 1).float().add_(0.5).mul_(2.0**-40).log_().mul_(-2).sqrt_()
    return radius.mul_(bits.bitwise_and_(2**24 - 1).float().mul_(math.tau / 2**24).cos_())


def signed(number: int) -> int:
    """The int64 with the last 64 bits of a number."""
    return (number + 2**63) % 2**64 - 2**63
