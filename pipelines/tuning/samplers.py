"""Optuna's samplers: what they are told of trials, and what they suggest. Nothing here runs on Ray.

A suggestion is a function of the told trials and of its own number, which seeds its random numbers. So it does not
matter whether the trials were told one by one or were read from a study's records after a kill.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from pipelines.studies.study import Study, Trial, TrialState
from posmlp.metrics import COSTS, EPOCH
from tune_spaces import Range, Space, Value

TPE_STARTUP_TRIALS = 8  # random trials before TPE models anything; those that are known to be over a budget count
NSGA2_POPULATION = 12  # studies have tens of trials, not thousands
ACQUISITION = "_compute_acquisition_func"  # the only private name of Optuna: TPESampler's l(x) / g(x), in logarithms
UNFINISHED = "unfinished"  # the constraint that a stopped trial of a search for two objectives breaks

Columns = Mapping[str, np.ndarray]  # dimension -> its values of several members, as Optuna has them inside: [members]
Distributions = dict[str, BaseDistribution]

optuna.logging.set_verbosity(optuna.logging.WARNING)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Suggestion:
    """A member that a sampler suggests.

    Attributes:
        number: number of the suggestion in the study, from 0.
        member: the value of each dimension.
        sampler_attrs: what Optuna's sampler stored with the suggestion.
        at_random: it is drawn uniformly: by the searcher ``random``, or before TPE has enough trials.
        acquisition: TPE's score of any members, ``[members]``, higher is better; None for other samplers.
    """

    number: int
    member: dict[str, Value]
    sampler_attrs: dict[str, Any]
    at_random: bool
    acquisition: Callable[[Columns], np.ndarray] | None


class Sampler:
    """The sampler of a study's searcher."""

    def __init__(self, study: Study, space: Space):
        self.study = study
        self.distributions: Distributions = {name: to_distribution(values) for name, values in space.dimensions.items()}
        self.directions = [StudyDirection.MAXIMIZE] + [StudyDirection.MINIMIZE] * bool(study.against)
        self.parents: Parents = {}

    def first_attrs(self) -> dict[str, Any]:
        """What Optuna's sampler stores with the trials of its first generation; empty if it has no generations."""
        return {"NSGAIISampler:generation": 0} if self.study.searcher == "nsga2" else {}

    def suggest(self, told: Sequence[FrozenTrial], number: int) -> Suggestion:
        """Suggest a member. It may be known, impossible to build, or over a budget.

        Args:
            told: all that the sampler knows, in the order of the trials.
            number: number of the suggestion.
        """
        sampler = self.make_sampler(number)
        storage = ToldTrials(told)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            asked = optuna.create_study(storage=storage, sampler=sampler, directions=self.directions).ask(
                self.distributions
            )
        attrs = {k: v for k, v in storage.asked().system_attrs.items() if k.endswith(":generation")}
        known = sum(trial.state in (OptunaState.COMPLETE, OptunaState.PRUNED) for trial in told)
        at_random = isinstance(sampler, RandomSampler)
        acquisition = None
        if isinstance(sampler, RankingTPESampler):
            at_random, acquisition = known < TPE_STARTUP_TRIALS, sampler.acquisition()
            if acquisition is None and not at_random:
                warn_without_acquisition()
        return Suggestion(number, dict(asked.params), attrs, at_random, acquisition)

    def make_sampler(self, number: int) -> BaseSampler:
        """Optuna's sampler for the study's searcher, with the random numbers of suggestion ``number``."""
        seed = int(np.random.SeedSequence([self.study.seed, number]).generate_state(1)[0])
        if self.study.searcher == "random":
            return RandomSampler(seed)
        if self.study.searcher == "nsga2":
            return NSGAIISampler(self.distributions, self.parents, seed)
        return RankingTPESampler(self.distributions, seed)


class ToldTrials(InMemoryStorage):
    """Optuna's storage whose trials are a given list, so that nothing is copied when one more suggestion is wanted.

    The trial that is being asked for has number 0 and is not among them.
    """

    def __init__(self, told: Sequence[FrozenTrial]):
        super().__init__()
        self.told = told
        for number, trial in enumerate(told, 1):
            trial.number = number

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[OptunaState] | None = None
    ) -> list[FrozenTrial]:
        """The told trials, never copied: samplers only read them."""
        return [trial for trial in self.told if states is None or trial.state in states]

    def asked(self) -> FrozenTrial:
        """The trial that was asked for."""
        return super().get_all_trials(0, deepcopy=False)[-1]


class RankingTPESampler(TPESampler):
    """TPE that also scores members which it has not drawn.

    TPE (Bergstra et al. 2011) models the good trials by a density l(x) and the others by g(x), draws some members from
    l(x), and suggests the one with the largest l(x) / g(x).
    """

    def __init__(self, distributions: Distributions, seed: int):
        # constant_liar: running trials count as bad, so that concurrent trials differ.
        super().__init__(n_startup_trials=TPE_STARTUP_TRIALS, multivariate=True, constant_liar=True, seed=seed)
        self.varied = varied(distributions)
        self.estimators: tuple[Any, Any] | None = None

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Distributions:
        """All dimensions: Optuna would look through all trials for those that they have in common."""
        return self.varied

    def _compute_acquisition_func(self, samples: Any, mpe_below: Any, mpe_above: Any) -> np.ndarray:
        self.estimators = (mpe_below, mpe_above)
        return super()._compute_acquisition_func(samples, mpe_below, mpe_above)

    def acquisition(self) -> Callable[[Columns], np.ndarray] | None:
        """The score log l(x) - log g(x) of any members; None if nothing was modelled."""
        if self.estimators is None:
            return None
        below, above = self.estimators
        score = super()._compute_acquisition_func
        return lambda columns: score(dict(columns), below, above)


class NSGAIISampler(optuna.samplers.NSGAIISampler):
    """NSGA-II (Deb et al. 2002) that recomputes the parents of a generation only if trials of an earlier one changed.

    It has the name of Optuna's, under which Optuna stores a trial's generation, as records of earlier studies do.
    Optuna keeps the parents that it has once chosen, although trials of the same generation that still ran then may
    have ended since. After a resume it would choose others.

    Args:
        parents: what the samplers of earlier suggestions have computed; it is updated.
    """

    def __init__(self, distributions: Distributions, parents: Parents, seed: int):
        super().__init__(population_size=NSGA2_POPULATION, seed=seed)
        self.varied, self.parents = varied(distributions), parents
        self.populations: dict[int, list[FrozenTrial]] = {}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Distributions:
        """All dimensions: Optuna would look through all trials for those that they have in common."""
        return self.varied

    def get_population(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        """The complete trials of a generation."""
        if not self.populations:
            self.populations = defaultdict(list)
            for trial in study.get_trials(deepcopy=False, states=[OptunaState.COMPLETE]):
                self.populations[generation_of(trial)].append(trial)
        return self.populations[generation]

    def get_parent_population(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        """The parents of a generation: the best of the one before and of its own parents."""
        chosen: list[FrozenTrial] = []
        for each in range(1, generation + 1):
            candidates = [*self.get_population(study, each - 1), *chosen]
            found = self.parents.get(each)
            if found is None or len(found[0]) != len(candidates) or any(map(is_not, found[0], candidates)):
                found = self.parents[each] = candidates, self.select_parent(study, each)
            chosen = found[1]
        return chosen


# Of each generation: the trials that its parents were chosen from, and the parents.
Parents = dict[int, tuple[list[FrozenTrial], list[FrozenTrial]]]


def is_not(one: object, other: object) -> bool:
    return one is not other


def generation_of(trial: FrozenTrial) -> int:
    """The generation of NSGA-II that a trial belongs to; -1 if none is recorded."""
    return next((value for key, value in trial.system_attrs.items() if key.endswith(":generation")), -1)


def varied(distributions: Distributions) -> Distributions:
    """The dimensions with more than one value, in a fixed order."""
    return {name: distributions[name] for name in sorted(distributions) if not distributions[name].single()}


@cache
def warn_without_acquisition() -> None:
    """Warn once that known suggestions are not replaced by the best unseen member."""
    logger.warning(
        "Optuna %s has no TPESampler.%s: a suggestion of TPE that is known is replaced by the nearest unseen member",
        optuna.__version__,
        ACQUISITION,
    )


# --- what a sampler is told -----------------------------------------------------------------------------------------


def to_distribution(values: tuple[Value, ...] | Range) -> BaseDistribution:
    """A dimension as an Optuna distribution."""
    if isinstance(values, Range):
        return FloatDistribution(values.low, values.high, log=values.log)
    return CategoricalDistribution(values)


def tell_trial(
    study: Study, trial: Trial, distributions: Distributions, values: Sequence[float] | None
) -> FrozenTrial | None:
    """A trial as a sampler sees it; None if it learns nothing from it, as from one that failed.

    - A fully trained trial is complete. The constraints are its budgets, and their values how far it is over them,
      relative to the budget (0.1: a tenth over it).
    - A trial over a budget is complete too and breaks a constraint. Optuna orders such trials by the sum of what they
      are over, after all others, and never reads their values.
    - A trial that was stopped early is pruned if there is one objective alone: Optuna orders such trials by their last
      epoch, then by its value, after all complete ones. For two objectives TPE has no such order and NSGA-II leaves
      pruned trials out. So it is told as one that breaks a constraint, by the share of the epochs that it lacks: it
      comes after all fully trained trials, and its partial value is never compared with theirs.
    - A running trial is running: TPE counts it as a bad one.

    Args:
        values: its objectives as the sampler shall see them; None if one is unknown.
    """
    member, attrs, constraints = trial.member, trial.sampler_attrs, excess(study.budgets(), trial.search_metrics)
    if trial.state == TrialState.RUNNING:
        return create_trial(
            state=OptunaState.RUNNING, params=dict(member), distributions=distributions, system_attrs=dict(attrs)
        )
    if trial.state == TrialState.OVER_BUDGET:
        return tell_over_budget(study, member, constraints, distributions, attrs)
    if values is None or trial.state == TrialState.FAILED:
        return None
    if trial.state == TrialState.FINISHED:
        return tell_complete(member, values, constraints, distributions, attrs)
    epoch = int(trial.metrics[EPOCH])
    if study.against:
        constraints[UNFINISHED] = 1 - epoch / max(study.recipe.train.epochs, epoch + 1)
        return tell_over_budget(study, member, constraints, distributions, attrs)
    return create_trial(
        state=OptunaState.PRUNED,
        params=dict(member),
        distributions=distributions,
        system_attrs=dict(attrs),
        intermediate_values={epoch: trial.value},
        constraints=constraints,
    )


def tell_over_budget(
    study: Study,
    member: Mapping[str, Value],
    constraints: Mapping[str, float],
    distributions: Distributions,
    sampler_attrs: Mapping[str, Any],
) -> FrozenTrial:
    """A member that breaks a constraint as a sampler sees it. Its values stand for nothing, and no sampler reads them.

    Args:
        constraints: by name, how far it breaks each of them; those that it keeps are at most 0.
    """
    values = [0.0, 0.0] if study.against else [0.0]
    return tell_complete(member, values, constraints, distributions, sampler_attrs)


def tell_complete(
    member: Mapping[str, Value],
    values: Sequence[float],
    constraints: Mapping[str, float],
    distributions: Distributions,
    sampler_attrs: Mapping[str, Any],
) -> FrozenTrial:
    """A member whose objectives are known as a sampler sees it."""
    return create_trial(
        values=values,
        params=dict(member),
        distributions=distributions,
        system_attrs=dict(sampler_attrs),
        constraints=dict(constraints),
    )


def excess(budgets: Mapping[str, float], costs: Mapping[str, float]) -> dict[str, float]:
    """How far costs are over their budgets, relative to the budget; negative below it; unknown costs are left out."""
    known = {name: costs.get(name, math.nan) for name in budgets}
    return {name: cost / budgets[name] - 1 for name, cost in known.items() if math.isfinite(cost)}


def objectives(study: Study, trial: Trial) -> list[float] | None:
    """The values that the study optimises: the main metric and, with one, the cost; None if one is not finite."""
    costs = [COSTS[study.against]] if study.against else []
    values = [trial.value, *(trial.search_metrics.get(name, math.nan) for name in costs)]
    return values if all(map(math.isfinite, values)) else None
