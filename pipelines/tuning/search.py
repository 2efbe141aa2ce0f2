"""Which member of a space to train next, given the trials so far. Nothing here runs on Ray.

Optuna's samplers choose, one member at a time. Each choice has random numbers of its own, by the study's seed and the
number of the choice, and the sampler is told all trials anew: what is chosen depends on nothing else, so a study that
goes on after a kill chooses as it would have without.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from pipelines.tuning.study import (
    COSTS,
    FAILED,
    FINISHED,
    OVER,
    RUNNING,
    STOPPED,
    TOP1,
    Study,
    StudyError,
    Trial,
    over_budget,
)
from posmlp import create_model
from posmlp.config import Config, RecipeError
from posmlp.model.cost import count_macs, count_params
from tune_spaces import Range, Space, Value

ASKS = 2000  # choices in a row that are known, impossible or over a budget, before the space is taken for exhausted
OWN_ASKS = 50  # of them by the study's searcher, which may be set on what it knows; then at random
RANDOM_FIRST = 8  # trials before TPE has enough to go by
POPULATION = 12  # of NSGA-II: studies have tens of trials, not thousands
STATES = {
    RUNNING: TrialState.RUNNING,
    FINISHED: TrialState.COMPLETE,
    STOPPED: TrialState.PRUNED,
    FAILED: TrialState.FAIL,
    OVER: TrialState.FAIL,
}

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Choice:
    """What a sampler chose: its number, the member, and the sampler's notes of it."""

    number: int
    member: dict[str, Value]
    notes: dict[str, Any]


def propose(study: Study, space: Space, trials: Sequence[Trial]) -> Trial | None:
    """The next trial: a member that is new, can be built, and is within the budgets that need no measurement.

    Args:
        trials: all so far, those that run among them.

    Returns:
        the trial; None where the space has no such member left, as far as ``ASKS`` choices show.
    """
    known = {identity(trial.member) for trial in trials}
    first = [trial for trial in trials if trial.repeats is None]
    number = max((trial.number for trial in trials), default=-1) + 1
    start = max((trial.ask for trial in trials), default=-1) + 1
    for choice in itertools.islice(choices(study, space, first, start), ASKS):
        if len(known) == size(space):
            return None
        if identity(choice.member) in known:
            continue
        known.add(identity(choice.member))
        try:
            config = space.recipe(study.recipe, choice.member)
        except RecipeError:
            continue
        if not over_budget(study.budgets(), static_costs(config)):
            return Trial(number, choice.member, study.recipe.train.seed, choice.number, notes=choice.notes)
    return None


def check_space(study: Study, space: Space, trials: Sequence[Trial]) -> None:
    """Refuse a grid over a space that has ranges, and a space that is not that of the trials.

    Raises:
        StudyError: it is one of these.
    """
    ranges = [name for name, values in space.dimensions.items() if isinstance(values, Range)]
    if study.searcher == "grid" and ranges:
        raise StudyError(
            f"a grid needs values to choose from, and space {study.space} has ranges ({', '.join(ranges)}); "
            "take another searcher"
        )
    for trial in trials:
        known = trial.member.keys() == space.dimensions.keys()
        if not known or not all(holds(space.dimensions[name], value) for name, value in trial.member.items()):
            raise StudyError(
                f"space {study.space} has changed since trial {trial.number} of {study.name}, which is "
                f"{trial.member}; restore it, or start a new study"
            )


def holds(values: tuple[Value, ...] | Range, value: Value) -> bool:
    """Whether a dimension has a value."""
    if isinstance(values, Range):
        return isinstance(value, int | float) and values.low <= value <= values.high
    return value in values


def choices(study: Study, space: Space, trials: Sequence[Trial], start: int) -> Iterator[Choice]:
    """What the study's searcher chooses, from choice ``start`` on, whatever it is."""
    if study.searcher == "grid":
        grid = itertools.product(*(tuple(values) for values in space.dimensions.values()))
        for number, values in enumerate(itertools.islice(grid, start, None), start):
            yield Choice(number, dict(zip(space.dimensions, values, strict=True)), {})
        return
    distributions = {name: distribution(values) for name, values in space.dimensions.items()}
    directions = ["maximize", "minimize"] if study.against else ["maximize"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        known = optuna.create_study(directions=directions)
        for trial in trials:
            known.add_trial(told(study, trial, distributions))
        for number in itertools.count(start):
            known.sampler = sampler(study, number, number - start >= OWN_ASKS)
            asked = known.ask(distributions)
            notes = known.trials[-1].system_attrs
            yield Choice(number, dict(asked.params), {k: v for k, v in notes.items() if k.endswith(":generation")})
            known.tell(asked, state=TrialState.FAIL)  # it was left out


def size(space: Space) -> float:
    """How many members a space has."""
    return math.prod(math.inf if isinstance(values, Range) else len(values) for values in space.dimensions.values())


def sampler(study: Study, number: int, at_random: bool) -> BaseSampler:
    """The study's searcher, or another that chooses at random, with the random numbers of one choice."""
    seed = int(np.random.SeedSequence([study.seed, number]).generate_state(1)[0])
    if at_random or study.searcher == "random":
        return RandomSampler(seed)
    if study.searcher == "nsga2":
        return NSGAIISampler(population_size=POPULATION, seed=seed)
    # Trials that run count as bad, so that two at a time differ.
    return TPESampler(n_startup_trials=RANDOM_FIRST, multivariate=True, constant_liar=True, seed=seed)


def distribution(values: tuple[Value, ...] | Range) -> BaseDistribution:
    """A dimension as Optuna knows it."""
    if isinstance(values, Range):
        return FloatDistribution(values.low, values.high, log=values.log)
    return CategoricalDistribution(values)


def told(study: Study, trial: Trial, distributions: dict[str, BaseDistribution]) -> FrozenTrial:
    """A trial as the samplers see it. One that failed, or has no finite result, tells them nothing."""
    values, state = objectives(study, trial), STATES[trial.state]
    if values is None and state in (TrialState.COMPLETE, TrialState.PRUNED):
        state = TrialState.FAIL
    curve = {int(trial.metrics["epoch"]): values[0]} if state == TrialState.PRUNED and values else {}
    return create_trial(
        state=state,
        values=values if state == TrialState.COMPLETE else None,
        params=dict(trial.member),
        distributions=distributions,
        system_attrs=trial.notes,
        intermediate_values=curve,
    )


def objectives(study: Study, trial: Trial) -> list[float] | None:
    """What the search wants of a trial: top-1, and the cost that the study goes against; None if they are not known."""
    names = [TOP1, COSTS[study.against]] if study.against else [TOP1]
    values = [trial.metrics.get(name, math.nan) for name in names]
    return values if all(map(math.isfinite, values)) else None


def static_costs(config: Config) -> dict[str, float]:
    """The costs of a recipe's model that need no measurement."""
    with torch.device("meta"):  # no memory, no random numbers
        params = count_params(create_model(config.model.name, **config.model.overrides()))
    return {"cost/gmacs": count_macs(config.model.variant()) / 1e9, "cost/params_m": params / 1e6}


def identity(member: dict[str, Value]) -> tuple[tuple[str, Value], ...]:
    """Tells whether two members are the same."""
    return tuple(sorted(member.items()))
