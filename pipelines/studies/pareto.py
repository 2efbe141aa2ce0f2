"""The Pareto front of a study: the trials that no other trial beats in both top-1 and a cost.

Everything here works on trials alone. Only trials that were trained to the end with the first seed can be on a front.
Repeats with other seeds show how certain their top-1 is.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence

import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator

from pipelines.studies import pareto_plots
from pipelines.studies.study import Trial, TrialState, fully_trained
from posmlp import create_model
from posmlp.config import Config, ModelSection
from posmlp.metrics import COST_GMACS, COSTS, VAL_TOP1
from posmlp.model.cost import count_macs, count_params
from posmlp.model.spec import VARIANTS
from tune_spaces import Value

optuna.logging.set_verbosity(optuna.logging.WARNING)

MIN_IMPORTANCE_TRIALS = 4  # fewest finished trials for which importance is estimated


def comparable_trials(trials: Sequence[Trial], against: str) -> list[Trial]:
    """The fully trained trials whose top-1 and cost are finite.

    Args:
        against: the cost, a name in ``COSTS``.
    """
    names = (VAL_TOP1, COSTS[against])
    return [t for t in fully_trained(trials) if all(math.isfinite(t.metrics.get(name, math.nan)) for name in names)]


def pareto_front(trials: Sequence[Trial], against: str) -> list[Trial]:
    """The trials that no other trial beats: none is as accurate and cheaper, or as cheap and more accurate.

    Of several trials with the same top-1 and cost, only the first is on the front.

    Args:
        against: the cost, a name in ``COSTS``.

    Returns:
        The trials of the front, cheapest first.
    """
    by_cost = sorted(
        comparable_trials(trials, against), key=lambda t: (t.metrics[COSTS[against]], -t.metrics[VAL_TOP1], t.number)
    )
    front: list[Trial] = []
    for trial in by_cost:
        if not front or trial.metrics[VAL_TOP1] > front[-1].metrics[VAL_TOP1]:
            front.append(trial)
    return front


def on_any_front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials on the front of any cost, ordered by number."""
    found = {trial.number: trial for cost in COSTS for trial in pareto_front(trials, cost)}
    return [found[number] for number in sorted(found)]


def top1_over_seeds(trial: Trial, trials: Sequence[Trial]) -> tuple[float, float | None, int]:
    """Top-1 of a trial and its finished repeats: mean, standard deviation (None for one seed), number of seeds."""
    repeats = [t for t in trials if t.repeat_of == trial.number and t.state == TrialState.FINISHED]
    finite = filter(math.isfinite, (t.metrics.get(VAL_TOP1, math.nan) for t in repeats))
    values = [trial.metrics[VAL_TOP1], *finite]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """The fully trained trial with the highest top-1; ties go to the fewest GMACs. None if there is none.

    Where some trials were repeated with other seeds, it is one of these, chosen by mean top-1: the highest of many
    single values is mostly luck.
    """
    candidates = comparable_trials(trials, "gmacs")
    repeated = {trial.repeat_of for trial in trials if trial.state == TrialState.FINISHED}
    chosen = [trial for trial in candidates if trial.number in repeated] or candidates
    return max(chosen, key=lambda t: (top1_over_seeds(t, trials)[0], -t.metrics[COST_GMACS]), default=None)


def hypervolume(points: Sequence[tuple[float, float]], reference: float) -> float:
    """The area that some point dominates, for top-1 from 0 up and costs up to the reference.

    Args:
        points: top-1 and cost of each trial.
        reference: the reference cost.
    """
    area, height = 0.0, 0.0
    for top1, cost in sorted(points, key=lambda point: point[1]):
        if top1 > height and cost < reference:
            area += (top1 - height) * (reference - cost)
            height = top1
    return area


def hypervolume_curve(trials: Sequence[Trial], against: str, reference: float | None = None) -> list[float]:
    """The hypervolume after each finished trial, as a share of the reference cost: 1 is perfect top-1 at no cost.

    Args:
        against: the cost, a name in ``COSTS``.
        reference: the reference cost, above 0; None: the largest cost of these trials.
    """
    points = [(trial.metrics[VAL_TOP1], trial.metrics[COSTS[against]]) for trial in comparable_trials(trials, against)]
    reference = reference or largest_cost(trials, against)
    return [hypervolume(points[:count], reference) / reference for count in range(1, len(points) + 1)]


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
    different = sorted(set(values), key=str)
    if len(different) > 8 and all(isinstance(value, float) for value in different):
        return FloatDistribution(min(map(float, different)), max(map(float, different)))
    return CategoricalDistribution(different)


def published_variant_costs(recipe: Config, latencies: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The costs of the published variants (and ``tiny``) for a recipe's clips and classes, by name and metric.

    Args:
        latencies: milliseconds, by name, of the variants that were measured.
    """
    costs = {}
    for name in VARIANTS:
        model = published_variant_recipe(recipe, name).model
        with torch.device("meta"):
            params = count_params(create_model(name, **model.overrides()))
        costs[name] = {COST_GMACS: count_macs(model.variant()) / 1e9, COSTS["params"]: params / 1e6}
        if name in latencies:
            costs[name][COSTS["latency"]] = latencies[name]
    return costs


def published_variant_recipe(recipe: Config, name: str) -> Config:
    """A recipe with a published variant as its model, for the same clips and classes."""
    own = recipe.model.variant()
    model = ModelSection(name=name, frames=own.frames, image_size=own.image_size, num_classes=own.num_classes)
    return recipe.model_copy(update={"model": model})


def variants_to_mark(trials: Sequence[Trial], recipe: Config) -> list[str]:
    """The published variants whose GMACs are near those of the trials, so that figures mark them."""
    values = [trial.metrics[COST_GMACS] for trial in comparable_trials(trials, "gmacs")]
    return [name for name, _ in pareto_plots.variants_in_range(published_variant_costs(recipe, {}), "gmacs", values)]
