"""Racing: which member of a study gets its next fresh seed, so that the place of each on the front is settled soonest.

Seeds are the expensive part of a report. They go to the members whose place is open, as in racing algorithms (Maron and
Moore, Hoeffding Races, NIPS 1994) and in ranking and selection with a knowledge gradient (Frazier et al., SIAM J.
Control Optim. 2008): a member that is on the front, or off it, almost surely gets no more.

The probabilities here are over seeds alone, on the same validation videos: more seeds do not make more videos. A choice
depends on the recorded trials only, so a resumed study goes on as it would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.studies import confidence, pareto
from pipelines.studies.study import Trial
from posmlp.metrics import COSTS

OPEN = (0.1, 0.9)  # a place is open if the probability of being on the front is between these
# A member that has only its first seed needs more than that: of many members some look good by luck, and every one more
# makes the front of the fresh seeds a choice among more values (benchmarks/racing.py).
OPENING = 0.4
SURE_SEEDS = 2  # each member of the reported front has as many fresh seeds, if it may


@dataclass(frozen=True)
class Repeat:
    """The next fresh seed.

    Attributes:
        first: the first trial of the member that gets it.
        seed: of its training.
        reason: why, in words.
    """

    first: Trial
    seed: int
    reason: str


def next_repeat(trials: Sequence[Trial], costs: Sequence[str], repeats: int) -> Repeat | None:
    """Choose the member that gets the next fresh seed; None if the front is settled as far as finished trials show.

    1. Each member on the front of the first seeds gets one.
    2. Each member on the reported front gets ``SURE_SEEDS``.
    3. Of the members whose place is open (``OPEN``, ``OPENING``), the one with the largest p (1 - p) / (n + 1) gets
       one: p is its probability of being on the front, the most open of all costs, and n its number of fresh seeds.

    Repeats that run or have failed count as given.

    Args:
        trials: all trials of the study, in any order.
        costs: names in ``COSTS``; a member counts if it may be on the front of any of them.
        repeats: the most fresh seeds of a member.
    """
    if repeats < 1:
        return None
    trials = sorted(trials, key=lambda trial: trial.number)
    firsts = {trial.number: trial for trial in pareto.comparable_trials(trials, "gmacs")}
    given = {number: [t.seed for t in trials if t.repeat_of == number] for number in firsts}
    for number in front_of(list(firsts.values()), costs):
        if not given[number]:
            return repeat(firsts[number], given[number], "on the front of the first seeds")
    fresh = pareto.fresh_seeds(trials)
    if not fresh:
        return None
    for number in front_of(trials, costs):
        if len(given[number]) < min(SURE_SEEDS, repeats):
            return repeat(firsts[number], given[number], "on the front of the fresh seeds")
    chances = front_chances(firsts, fresh, costs)
    worth = {
        number: chance * (1 - chance) / (len(given[number]) + 1)
        for number, chance in chances.items()
        if len(given[number]) < repeats and (OPEN[0] if given[number] else OPENING) < chance < OPEN[1]
    }
    if not worth:
        return None
    number = max(worth, key=lambda n: (worth[n], -n))
    return repeat(firsts[number], given[number], f"on the front with probability {chances[number]:.2f}")


def repeat(first: Trial, given: Sequence[int], reason: str) -> Repeat:
    """A member's next repeat.

    Args:
        given: the seeds of its repeats so far.
    """
    seed = first.seed + 1
    while seed in given:
        seed += 1
    return Repeat(first, seed, reason)


def front_of(trials: Sequence[Trial], costs: Sequence[str]) -> list[int]:
    """The numbers of the members on the reported front of any of the costs, ascending."""
    return sorted({trial.number for cost in costs for trial in pareto.pareto_front(trials, cost)})


def front_chances(firsts: dict[int, Trial], fresh: dict[int, list[Trial]], costs: Sequence[str]) -> dict[int, float]:
    """The probability of each member of being on the front, of all costs the one nearest to a half.

    A member with fresh seeds counts by their mean, another by its first seed.

    Args:
        firsts: first trials of all members by number.
        fresh: their finished fresh seeds, at least one of any member.
    """
    runs = {number: fresh.get(number, [first]) for number, first in firsts.items()}
    values = {number: [run.value for run in seeds] for number, seeds in runs.items()}
    deviation = confidence.seed_deviation(
        [values[number] if number in fresh else [] for number in firsts],
        [first.value for first in firsts.values()],
    )
    draws = confidence.resample([confidence.Measured(each) for each in values.values()], deviation)
    numbers, chances = np.array(list(firsts)), {number: 0.0 for number in firsts}
    for cost in costs:
        prices = np.array([first.metrics.get(COSTS[cost], np.nan) for first in firsts.values()])
        known = np.flatnonzero(np.isfinite(prices))
        shares = confidence.on_front(draws[:, known], prices[known]).mean(0)
        for number, share in zip(numbers[known].tolist(), shares.tolist(), strict=True):
            chances[number] = min(chances[number], share, key=lambda chance: abs(chance - 0.5))
    return chances
