"""The Pareto front of a study: the members that no other member beats in both the main metric and a cost.

Everything here works on trials alone. A member is named by its first trial, which was trained to the end. The first
seed selects members, and fresh seeds (repeats) report them: the highest of many single values is mostly luck, so the
value that has selected a member says little about it. As soon as a study has repeats, only members with fresh seeds are
on its fronts, by the mean of these seeds alone. Without any repeat, fronts are those of the first seed.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipelines.studies import confidence
from pipelines.studies.confidence import Measured, SeedDeviation
from pipelines.studies.study import Trial, TrialState, fully_trained
from posmlp.metrics import COST_GMACS, COSTS, main_metric
from tune_spaces import Value

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

MIN_IMPORTANCE_TRIALS = 4  # fewest finished trials for which importance is estimated


def comparable_trials(trials: Sequence[Trial], against: str) -> list[Trial]:
    """The fully trained trials whose main metric and cost are finite.

    Args:
        against: the cost, a name in ``COSTS``.
    """
    found = [(trial, trial.metrics.get(COSTS[against], math.nan)) for trial in fully_trained(trials)]
    return [trial for trial, cost in found if math.isfinite(trial.value) and math.isfinite(cost)]


def fresh_seeds(trials: Sequence[Trial]) -> dict[int, list[Trial]]:
    """The finished repeats of each fully trained trial that has some, by its number; ordered by seed."""
    firsts = {trial.number for trial in comparable_trials(trials, "gmacs")}
    found: dict[int, list[Trial]] = {}
    for trial in sorted(trials, key=lambda t: t.seed):
        first, finished = trial.repeat_of, trial.state == TrialState.FINISHED
        if first in firsts and finished and math.isfinite(trial.value):
            found.setdefault(first, []).append(trial)
    return {number: found[number] for number in sorted(found)}


def reported_runs(trials: Sequence[Trial]) -> dict[int, list[Trial]]:
    """The runs that report each member, by the number of its first trial: its fresh seeds.

    Members without a fresh seed are left out, unless the whole study has none: then each trial reports itself.
    """
    return fresh_seeds(trials) or {trial.number: [trial] for trial in comparable_trials(trials, "gmacs")}


def reported_values(trials: Sequence[Trial]) -> dict[int, float]:
    """The mean main metric of each member's ``reported_runs``."""
    runs = reported_runs(trials)
    return {number: statistics.mean(run.value for run in seeds) for number, seeds in runs.items()}


def pareto_front(trials: Sequence[Trial], against: str) -> list[Trial]:
    """The members that no other beats by ``reported_values``: none is as accurate and cheaper, or as cheap and better.

    Of several members with the same value and cost, only the first is on the front.

    Args:
        against: the cost, a name in ``COSTS``.

    Returns:
        The members' first trials, cheapest first.
    """
    values, cost = reported_values(trials), COSTS[against]
    members = [trial for trial in comparable_trials(trials, against) if trial.number in values]
    front: list[Trial] = []
    for trial in sorted(members, key=lambda t: (t.metrics[cost], -values[t.number], t.number)):
        if not front or values[trial.number] > values[front[-1].number]:
            front.append(trial)
    return front


def on_any_front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials on the front of any cost, ordered by number."""
    found = {trial.number: trial for cost in COSTS for trial in pareto_front(trials, cost)}
    return [found[number] for number in sorted(found)]


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """The first trial of the member with the highest reported value; ties go to the fewest GMACs. None: no member."""
    values = reported_values(trials)
    members = [trial for trial in comparable_trials(trials, "gmacs") if trial.number in values]
    return max(members, key=lambda t: (values[t.number], -t.metrics[COST_GMACS], -t.number), default=None)


@dataclass(frozen=True)
class Assessment:
    """How certain a study's reported values are. All mappings are by the number of a member's first trial.

    Attributes:
        repeated: the study has fresh seeds. Without, intervals are those of the videos alone.
        values: the reported values (``reported_values``); without fresh seeds, of the members on a front.
        low, high: the ends of their 95 % intervals; none of a single seed of detection, or whose number of
            videos is not known.
        runs: the runs that report each member.
        deviation: of the seeds; None: not known.
        paired: per-video results of all these runs are known, so that members are compared on the same videos.
        probability: of being on the front, by cost; empty without fresh seeds.
        draws: float64 ``[DRAWS, members]`` (``confidence.resample``); columns as in ``values``.
    """

    repeated: bool
    values: dict[int, float]
    low: dict[int, float]
    high: dict[int, float]
    runs: dict[int, list[Trial]]
    deviation: SeedDeviation | None
    paired: bool
    probability: dict[str, dict[int, float]]
    draws: NDArray[np.float64] = field(repr=False)

    def better(self, one: int, other: int) -> float:
        """The probability that one member is more accurate than another."""
        columns = list(self.values)
        return float((self.draws[:, columns.index(one)] > self.draws[:, columns.index(other)]).mean())

    def luck_of_the_best(self) -> float:
        """How much of the highest value is luck, because it is the highest of several: estimated by the draws.

        In each draw the highest member is chosen again; the mean excess of its drawn value over its own mean is the
        bias of such a choice (Sun and Bull, Genet. Epidemiol. 2005).
        """
        if len(self.values) < 2:
            return 0.0
        chosen = self.draws.argmax(1)
        means = np.array(list(self.values.values()))
        return float((self.draws.max(1) - means[chosen]).mean())


def assess(trials: Sequence[Trial], hits: Mapping[int, bytes] | None = None) -> Assessment:
    """Estimate how certain a study's reported values and fronts are.

    Args:
        hits: content of ``val_hits.txt`` of runs, by trial number. If a run of ``hits_needed`` lacks it, each member's
            videos count as independent of the others'.
    """
    runs, repeated = reported_runs(trials), bool(fresh_seeds(trials))
    if not repeated:
        runs = {trial.number: [trial] for trial in on_any_front(trials)}
    known = {number: confidence.parse_hits(text) for number, text in (hits or {}).items()}
    members = [measured(seeds, known) for seeds in runs.values()]
    firsts = {trial.number: trial for trial in trials}
    deviation = None
    if repeated:
        deviation = confidence.seed_deviation([m.values for m in members], [firsts[n].value for n in runs])
    draws = confidence.resample(members, deviation)
    low, high = np.percentile(draws.clip(0, 1), confidence.INTERVAL, axis=0) if members else ([], [])
    probability: dict[str, dict[int, float]] = {}
    for cost, metric in COSTS.items() if repeated else ():
        costs = np.array([firsts[number].metrics.get(metric, math.nan) for number in runs])
        finite = np.flatnonzero(np.isfinite(costs))
        shares = confidence.on_front(draws[:, finite], costs[finite]).mean(0)
        numbers = [list(runs)[index] for index in finite]
        probability[cost] = dict(zip(numbers, shares.tolist(), strict=True))
    spread = [repeated or member.videos is not None for member in members]  # else all draws are the mean
    return Assessment(
        repeated=repeated,
        values={number: member.mean for number, member in zip(runs, members, strict=True)},
        low={number: float(value) for number, value, known in zip(runs, low, spread, strict=True) if known},
        high={number: float(value) for number, value, known in zip(runs, high, spread, strict=True) if known},
        runs=runs,
        deviation=deviation,
        paired=repeated and confidence.have_hits(members),
        probability=probability,
        draws=draws,
    )


def hits_needed(trials: Sequence[Trial]) -> list[Trial]:
    """The runs whose per-video results ``assess`` uses: the fresh seeds. A single seed's interval needs no more than
    its top-1 and the number of videos."""
    return [run for seeds in fresh_seeds(trials).values() for run in seeds]


def measured(seeds: Sequence[Trial], hits: Mapping[int, NDArray[np.int8]]) -> Measured:
    """The results of a member from its runs.

    Args:
        hits: per-video results by trial number. A member's are used if all its runs have them, of the same videos.
    """
    rows = [hits[run.number] for run in seeds if run.number in hits]
    same = len(rows) == len(seeds) and len({len(row) for row in rows}) == 1 and len(rows[0]) > 0
    main = main_metric(seeds[0].metrics)
    videos = int(min(run.metrics.get(main.samples, 0) for run in seeds)) if main and main.is_mean else 0
    return Measured([run.value for run in seeds], np.stack(rows) if same else None, videos or None)


def hypervolume(points: Sequence[tuple[float, float]], reference: float) -> float:
    """The area that some point dominates, for values from 0 up and costs up to the reference.

    Args:
        points: main metric and cost of each trial.
        reference: the reference cost.
    """
    area, height = 0.0, 0.0
    for value, cost in sorted(points, key=lambda point: point[1]):
        if value > height and cost < reference:
            area += (value - height) * (reference - cost)
            height = value
    return area


def front_hypervolume(trials: Sequence[Trial], against: str, reference: float | None = None) -> float | None:
    """The hypervolume of the reported front, as ``hypervolume_curve`` counts it; None without a front."""
    values, front = reported_values(trials), pareto_front(trials, against)
    reference = reference or largest_cost(trials, against)
    points = [(values[trial.number], trial.metrics[COSTS[against]]) for trial in front]
    return hypervolume(points, reference) / reference if front else None


def hypervolume_curve(trials: Sequence[Trial], against: str, reference: float | None = None) -> list[float]:
    """The hypervolume after each finished trial, as a share of the reference cost: 1 is a perfect model at no cost.

    It is that of the first seeds, and shows how the search proceeds.

    Args:
        against: the cost, a name in ``COSTS``.
        reference: the reference cost, above 0; None: the largest cost of these trials.
    """
    reference = reference or largest_cost(trials, against)
    front: list[tuple[float, float]] = []  # of the points so far
    curve: list[float] = []
    for trial in comparable_trials(trials, against):
        value, cost = trial.value, trial.metrics[COSTS[against]]
        if any(best >= value and least <= cost for best, least in front):
            curve.append(curve[-1])
            continue
        front = [point for point in front if point[0] > value or point[1] < cost] + [(value, cost)]
        curve.append(hypervolume(front, reference) / reference)
    return curve


def largest_cost(trials: Sequence[Trial], against: str) -> float:
    """The largest cost of the comparable trials; 1 if there is none, or if it is 0."""
    return max((trial.metrics[COSTS[against]] for trial in comparable_trials(trials, against)), default=0.0) or 1.0


def dimension_importance(trials: Sequence[Trial], metric: str) -> dict[str, float]:
    """The share of a metric's variance that each dimension explains (functional ANOVA), largest first.

    Empty if fewer than ``MIN_IMPORTANCE_TRIALS`` are finished, or if they do not differ.
    """
    finite = [trial for trial in fully_trained(trials) if math.isfinite(trial.metrics.get(metric, math.nan))]
    if len(finite) < MIN_IMPORTANCE_TRIALS or len({trial.metrics[metric] for trial in finite}) == 1:
        return {}
    names = [name for name in finite[0].member if all(name in trial.member for trial in finite)]
    distributions = {name: infer_distribution([trial.member[name] for trial in finite]) for name in names}
    varied = {name: d for name, d in distributions.items() if not d.single()}
    if not varied:
        return {}
    # Optuna's importance needs scikit-learn: 100 MB and seconds, which only a process that asks for it pays.
    import optuna
    from optuna.importance import FanovaImportanceEvaluator

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    optuna_study = optuna.create_study()
    for trial in finite:
        params = {name: trial.member[name] for name in varied}
        value = trial.metrics[metric]
        optuna_study.add_trial(optuna.trial.create_trial(params=params, distributions=varied, value=value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Not normalised: noise, and what dimensions explain only together, belongs to no dimension.
        shares = FanovaImportanceEvaluator(seed=0).evaluate(optuna_study)
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def infer_distribution(values: Sequence[Value]) -> BaseDistribution:
    """A dimension's distribution from its values: more than 8 different floats are a range, all else is a choice."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    different = sorted(set(values), key=str)
    if len(different) > 8 and all(isinstance(value, float) for value in different):
        return FloatDistribution(min(map(float, different)), max(map(float, different)))
    return CategoricalDistribution(different)
