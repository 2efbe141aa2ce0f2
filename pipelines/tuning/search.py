"""Which member of a search space to train next, given the trials so far. Nothing here runs on Ray.

Optuna's samplers suggest one member at a time. Each suggestion has its own random numbers, seeded by the study's seed
and the suggestion's number, and the sampler is given all trials again. So a suggestion depends on nothing else, and a
study that resumes after a kill continues with the suggestions that it would have had without.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from pipelines.studies.study import Study, StudyError, Trial, TrialState, over_budget
from posmlp import create_model
from posmlp.config import Config, RecipeError
from posmlp.metrics import COST_GMACS, COST_PARAMS_M, COSTS, EPOCH, VAL_TOP1
from posmlp.model.cost import count_macs, count_params
from tune_spaces import Range, Space, Value

MAX_SUGGESTIONS = 2000  # in a row that are known, impossible or over a budget: then the space counts as exhausted
OWN_SUGGESTIONS = 50  # of them by the study's searcher, which may repeat what it knows; the others are random
TPE_STARTUP_TRIALS = 8  # random trials before TPE models anything
NSGA2_POPULATION = 12  # studies have tens of trials, not thousands
OPTUNA_STATES = {
    TrialState.RUNNING: OptunaState.RUNNING,
    TrialState.FINISHED: OptunaState.COMPLETE,
    TrialState.STOPPED: OptunaState.PRUNED,
    TrialState.FAILED: OptunaState.FAIL,
    TrialState.OVER_BUDGET: OptunaState.FAIL,
}

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Suggestion:
    """A member that a searcher suggests.

    Attributes:
        number: number of the suggestion in the study, from 0.
        member: the value of each dimension.
        sampler_attrs: what Optuna's sampler stored with the suggestion.
    """

    number: int
    member: dict[str, Value]
    sampler_attrs: dict[str, Any]


def propose_trial(study: Study, space: Space, trials: Sequence[Trial]) -> Trial | None:
    """Propose the next trial: its member is new, can be built, and is within the budgets that need no measurement.

    Args:
        trials: all trials so far, including those that run.

    Returns:
        The trial; None if the space has no such member left, as far as ``MAX_SUGGESTIONS`` suggestions show.
    """
    known = {member_key(trial.member) for trial in trials}
    first_seeds = [trial for trial in trials if trial.repeat_of is None]
    number = max((trial.number for trial in trials), default=-1) + 1
    start = max((trial.suggestion for trial in trials), default=-1) + 1
    for suggestion in itertools.islice(suggest_members(study, space, first_seeds, start), MAX_SUGGESTIONS):
        if len(known) == space_size(space):
            return None
        if member_key(suggestion.member) in known:
            continue
        known.add(member_key(suggestion.member))
        try:
            config = space.recipe(study.recipe, suggestion.member)
        except RecipeError:
            continue
        if not over_budget(study.budgets(), static_costs(config)):
            seed, attrs = study.recipe.train.seed, suggestion.sampler_attrs
            return Trial(number, suggestion.member, seed, suggestion.number, sampler_attrs=attrs)
    return None


def check_space(study: Study, space: Space, trials: Sequence[Trial]) -> None:
    """Refuse a grid over a space with ranges, and a space that has changed since the trials were made.

    Raises:
        StudyError: one of these is so.
    """
    ranges = [name for name, values in space.dimensions.items() if isinstance(values, Range)]
    if study.searcher == "grid" and ranges:
        raise StudyError(
            f"searcher grid needs values to choose from, but space {study.space} has ranges ({', '.join(ranges)}); "
            "use another searcher"
        )
    for trial in trials:
        same_names = trial.member.keys() == space.dimensions.keys()
        if not same_names or not all(
            is_value_of(space.dimensions[name], value) for name, value in trial.member.items()
        ):
            raise StudyError(
                f"space {study.space} has changed since trial {trial.number} of {study.name}, which is {trial.member}; "
                "restore it, or start a new study"
            )


def is_value_of(values: tuple[Value, ...] | Range, value: Value) -> bool:
    """Return whether a dimension has a value."""
    if isinstance(values, Range):
        return isinstance(value, int | float) and values.low <= value <= values.high
    return value in values


def suggest_members(study: Study, space: Space, trials: Sequence[Trial], start: int) -> Iterator[Suggestion]:
    """Yield the suggestions of the study's searcher from number ``start`` on, including known and impossible members.

    Args:
        trials: the trials that the searcher learns from.
    """
    if study.searcher == "grid":
        grid = itertools.product(*(cast(tuple[Value, ...], values) for values in space.dimensions.values()))
        for number, values in enumerate(itertools.islice(grid, start, None), start):
            yield Suggestion(number, dict(zip(space.dimensions, values, strict=True)), {})
        return
    distributions = {name: to_distribution(values) for name, values in space.dimensions.items()}
    directions = [StudyDirection.MAXIMIZE] + [StudyDirection.MINIMIZE] * bool(study.against)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna_study = optuna.create_study(directions=directions)
        for trial in trials:
            optuna_study.add_trial(to_optuna_trial(study, trial, distributions))
        for number in itertools.count(start):
            optuna_study.sampler = make_sampler(study, number, number - start >= OWN_SUGGESTIONS)
            asked = optuna_study.ask(distributions)
            attrs = {k: v for k, v in optuna_study.trials[-1].system_attrs.items() if k.endswith(":generation")}
            yield Suggestion(number, dict(asked.params), attrs)
            optuna_study.tell(asked, state=OptunaState.FAIL)  # the caller wants another: this one was not used


def space_size(space: Space) -> float:
    """Number of members of a space, also of those that cannot be built; infinite if it has a range."""
    return math.prod(math.inf if isinstance(values, Range) else len(values) for values in space.dimensions.values())


def make_sampler(study: Study, number: int, at_random: bool) -> BaseSampler:
    """Optuna's sampler for the study's searcher, or a random one, with the random numbers of suggestion ``number``."""
    seed = int(np.random.SeedSequence([study.seed, number]).generate_state(1)[0])
    if at_random or study.searcher == "random":
        return RandomSampler(seed)
    if study.searcher == "nsga2":
        return NSGAIISampler(population_size=NSGA2_POPULATION, seed=seed)
    # constant_liar: running trials count as bad, so that concurrent trials differ.
    return TPESampler(n_startup_trials=TPE_STARTUP_TRIALS, multivariate=True, constant_liar=True, seed=seed)


def to_distribution(values: tuple[Value, ...] | Range) -> BaseDistribution:
    """A dimension as an Optuna distribution."""
    if isinstance(values, Range):
        return FloatDistribution(values.low, values.high, log=values.log)
    return CategoricalDistribution(values)


def to_optuna_trial(study: Study, trial: Trial, distributions: dict[str, BaseDistribution]) -> FrozenTrial:
    """A trial as Optuna's samplers see it. They learn nothing from one that failed or has no finite result."""
    values, state = objectives(study, trial), OPTUNA_STATES[trial.state]
    if values is None and state in (OptunaState.COMPLETE, OptunaState.PRUNED):
        state = OptunaState.FAIL
    curve = {int(trial.metrics[EPOCH]): values[0]} if state == OptunaState.PRUNED and values else {}
    return create_trial(
        state=state,
        values=values if state == OptunaState.COMPLETE else None,
        params=dict(trial.member),
        distributions=distributions,
        system_attrs=trial.sampler_attrs,
        intermediate_values=curve,
    )


def objectives(study: Study, trial: Trial) -> list[float] | None:
    """The values that the study optimises: top-1 and, if it has one, the cost; None if one is unknown or not finite."""
    names = [VAL_TOP1, COSTS[study.against]] if study.against else [VAL_TOP1]
    values = [trial.metrics.get(name, math.nan) for name in names]
    return values if all(map(math.isfinite, values)) else None


def static_costs(config: Config) -> dict[str, float]:
    """The costs of a recipe's model that need no measurement, by metric name."""
    with torch.device("meta"):  # no memory, no random numbers
        params = count_params(create_model(config.model.name, **config.model.overrides()))
    return {COST_GMACS: count_macs(config.model.variant()) / 1e9, COST_PARAMS_M: params / 1e6}


def member_key(member: dict[str, Value]) -> tuple[tuple[str, Value], ...]:
    """A hashable value that is equal for equal members."""
    return tuple(sorted(member.items()))
