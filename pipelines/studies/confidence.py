"""How certain means over seeds are: intervals, and probabilities of being on a Pareto front.

The main metric of a member is measured with some seeds on some validation videos. Both are samples, so both are drawn
again (Efron and Tibshirani, An Introduction to the Bootstrap, 1993):

- Videos are resampled with replacement, once per draw for all members, because all members are measured on the same
  videos: what a hard video takes from one member it takes from others too.
- One to five seeds are too few to resample. Their noise is normal, with one standard deviation for all members, which
  is pooled over the members' seeds. Each draw also draws the deviation itself (scaled inverse chi-square with the
  pooled degrees of freedom), so that intervals are as wide as those of Student's t.

A seed also decides single videos at random, and resampling videos repeats that part of its noise already. It is taken
off the seeds' deviation, else it would count twice (Owen, The pigeonhole bootstrap, Ann. Appl. Stat. 2007).

An mAP is no mean over videos or key frames: of detection only the seeds are drawn.

Costs count as exact. Everything here is NumPy on plain arrays, and deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
MIN_FREEDOM = 3  # degrees of freedom below which the seeds that selected the members are used as well
MAX_GROUPS = 20_000  # videos are resampled in as many groups at most
COUNTS_AT_A_TIME = 2**22  # entries of the matrix of counts: 32 MB
TIE = 1e-9  # equal values are ordered at random, by differences far below that of one video
INTERVAL = (2.5, 97.5)  # percent

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SeedDeviation:
    """The standard deviation of the main metric between seeds of one member, the same for all members.

    Attributes:
        value: 0 to 1.
        freedom: degrees of freedom of the estimate.
    """

    value: float
    freedom: int


@dataclass(frozen=True)
class Measured:
    """The results of one member.

    Attributes:
        values: the main metric of each of its seeds, at least one.
        hits: int8 ``[seeds, videos]``: 1 a hit, 0 a miss, -1 a bad video; None: not known.
        videos: number of videos that a seed was scored on; None: not known.
    """

    values: Sequence[float]
    hits: NDArray[np.int8] | None = None
    videos: int | None = None

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return float(np.mean(self.values))


def parse_hits(text: bytes) -> NDArray[np.int8]:
    """The results of a validation's videos from the content of ``val_hits.txt``, int8 ``[videos]`` as in ``Measured``.

    Raises:
        ValueError: there is another character than ``1``, ``0`` and ``-``.
    """
    codes = np.frombuffer(text.strip(), np.uint8)
    if not np.isin(codes, list(b"10-")).all():
        raise ValueError("a validation's results have another character than 1, 0 and -")
    return np.where(codes == ord("-"), -1, codes == ord("1")).astype(np.int8)


def seed_deviation(fresh: Sequence[Sequence[float]], first: Sequence[float]) -> SeedDeviation | None:
    """Estimate the standard deviation between seeds, pooled over members; None if no member has two seeds.

    With fewer than ``MIN_FREEDOM`` degrees of freedom, the first seeds count as well. As they have selected the
    members, they are too high on average, and the deviation is rather too large than too small.

    Args:
        fresh: the main metric of each member's fresh seeds.
        first: that of each member's first seed.
    """
    groups = [np.asarray(values) for values in fresh if len(values)]
    if sum(len(values) - 1 for values in groups) < MIN_FREEDOM:
        groups = [np.array([value, *values]) for value, values in zip(first, fresh, strict=True) if len(values)]
    freedom = sum(len(values) - 1 for values in groups)
    if not freedom:
        return None
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in groups)
    return SeedDeviation(float(np.sqrt(squares / freedom)), freedom)


def resample(members: Sequence[Measured], deviation: SeedDeviation | None) -> Floats:
    """Draw the members' means as other seeds and other validation videos would have given them.

    Without per-video results, each member's videos are drawn from a binomial distribution; without their number, or
    without a deviation, the draws lack that part.

    Returns:
        float64 ``[DRAWS, members]``.
    """
    rng = np.random.default_rng(0)
    if have_hits(members):
        draws, flips = resample_videos(members, rng), seed_variance_of_videos(members)
    else:
        draws, flips = draw_binomial(members, rng), 0.0
    if deviation is not None:
        spread = deviation.value * np.sqrt(deviation.freedom / rng.chisquare(deviation.freedom, (DRAWS, 1)))
        if deviation.value:
            spread = spread * np.sqrt(max(0.0, 1 - flips / deviation.value**2))
        seeds = np.array([len(member.values) for member in members])
        draws = draws + spread * rng.standard_normal(draws.shape) / np.sqrt(seeds)
    return draws + TIE * rng.standard_normal(draws.shape)


def have_hits(members: Sequence[Measured]) -> bool:
    """Return whether the per-video results of all members are known, of the same videos."""
    return len({None if member.hits is None else member.hits.shape[1] for member in members} | {None}) == 2 and all(
        member.hits is not None for member in members
    )


def resample_videos(members: Sequence[Measured], rng: np.random.Generator) -> Floats:
    """Draw the members' means over resampled videos, float64 ``[DRAWS, members]``.

    Each draw is a vector of counts of the videos, and its product with the hits of all runs is their numbers of hits.
    """
    runs = np.concatenate([member.hits for member in members if member.hits is not None])  # [runs, videos]
    good, hit = group_videos(runs >= 0), group_videos(runs == 1)
    groups, owner = good.shape[1], np.repeat(np.arange(len(members)), [len(member.values) for member in members])
    averaging = np.equal.outer(owner, np.arange(len(members))) / np.bincount(owner)  # [runs, members]
    draws = np.empty((DRAWS, len(members)))
    size = max(1, COUNTS_AT_A_TIME // groups)
    all_good = bool((runs >= 0).all()) and runs.shape[1] == groups
    for start in range(0, DRAWS, size):
        count = min(size, DRAWS - start)
        drawn = rng.integers(groups, size=(count, groups)) + groups * np.arange(count)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=count * groups).reshape(count, groups).astype(np.float32)
        scored = groups if all_good else np.maximum(counts @ good.T, 1)
        draws[start : start + count] = (counts @ hit.T / scored) @ averaging
    return draws


def group_videos(flags: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Count flags ``[runs, videos]`` in at most ``MAX_GROUPS`` groups of videos, float32 ``[runs, groups]``.

    Neighbours in a list may be alike, so each group has videos from all over the list.
    """
    runs, videos = flags.shape
    if videos <= MAX_GROUPS:
        return flags.astype(np.float32)
    padded = np.pad(flags, ((0, 0), (0, -videos % MAX_GROUPS)))
    return padded.reshape(runs, -1, MAX_GROUPS).sum(1, dtype=np.float32)


def seed_variance_of_videos(members: Sequence[Measured]) -> float:
    """The variance of top-1 between seeds that comes from independent flips of single videos; 0 if it is not known."""
    total, freedom = 0.0, 0
    for member in members:
        if member.hits is not None and len(member.hits) > 1:
            hits = member.hits[:, (member.hits >= 0).all(0)]
            if hits.shape[1]:
                total += (len(hits) - 1) * float(hits.var(0, ddof=1).mean()) / hits.shape[1]
                freedom += len(hits) - 1
    return total / freedom if freedom else 0.0


def draw_binomial(members: Sequence[Measured], rng: np.random.Generator) -> Floats:
    """Draw the members' means with independent videos, float64 ``[DRAWS, members]``."""
    draws = np.empty((DRAWS, len(members)))
    for column, member in zip(draws.T, members, strict=True):
        share = min(1.0, max(0.0, member.mean))
        column[:] = rng.binomial(member.videos, share, DRAWS) / member.videos if member.videos else member.mean
    return draws


def on_front(values: Floats, costs: Floats) -> NDArray[np.bool_]:
    """Which members are on the Pareto front of each draw: none is as cheap and more accurate, or as accurate.

    Args:
        values: ``[draws, members]``.
        costs: of each member.

    Returns:
        bool ``[draws, members]``.
    """
    exact, found = np.asarray(costs, float), np.zeros(values.shape, bool)
    best = np.full(len(values), -np.inf)
    for cost in np.unique(exact):
        same = np.flatnonzero(exact == cost)
        here = values[:, same]
        highest = here.max(1)
        found[np.arange(len(values)), same[here.argmax(1)]] = highest > best
        best = np.maximum(best, highest)
    return found
