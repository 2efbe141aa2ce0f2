"""Which member of a search space to train next, given the trials so far. Nothing here runs on Ray.

The searcher suggests one member at a time. A suggestion depends on the study, its prior studies, the trials so far and
the suggestion's number, and on nothing else. So a study that resumes after a kill continues with the suggestions that
it would have had without.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from optuna.trial import FrozenTrial

from pipelines.studies import report
from pipelines.studies.costs import static_costs
from pipelines.studies.prior import Prior, is_value_of
from pipelines.studies.study import BUDGET_OPTIONS, Study, StudyError, Trial, TrialState, over_budget
from pipelines.tuning.samplers import (
    Columns,
    Sampler,
    Suggestion,
    excess,
    objectives,
    tell_complete,
    tell_over_budget,
    tell_trial,
)
from posmlp.config import RecipeError
from posmlp.metrics import COST_LATENCY_MS, COSTS
from tune_spaces import Range, Space, Value

LARGEST_ENUMERATED = 10_000  # members of a space: up to here, each suggestion is the best of all unseen members
MOST_LOOKS = 2000  # members that one proposal looks at in a larger space before the search ends
MOST_REJECTED = 20  # of a proposal: members over a budget that the sampler is told of
MIN_OVER_BUDGET = 20  # trials in a row whose measured cost is over a budget: then the search ends, at the earliest


@dataclass(frozen=True)
class Check:
    """What is known of a member before it is trained.

    Attributes:
        costs: the costs that need no measurement, by metric name; empty if no budget needs them.
        refused: why it cannot be built; None if it can.
        excess: how far it is over the budgets in all, relative to each; 0 if it is within them.
    """

    costs: dict[str, float]
    refused: str | None = None
    excess: float = 0.0


class Searcher:
    """Proposes the members of a study, one at a time.

    It keeps what it has told Optuna's sampler, and adds what is new, so that a proposal stays fast in a long study. A
    searcher that is made again from the study's records proposes the same.

    Attributes:
        prior: what the sampler is told of each earlier study, by its name; empty if it does not learn.
        why_none: why the last call of ``propose`` returned None; empty if it did not.
        found_none: it returned None although no trial is within the budgets.
    """

    def __init__(self, study: Study, space: Space, prior: Sequence[Prior] = ()):
        """
        Args:
            prior: earlier studies of the same space.
        """
        self.study, self.space = study, space
        self.size = space_size(space)
        self.sampler = Sampler(study, space)
        self.learns = study.searcher in ("tpe", "nsga2")
        self.checks: dict[Key, Check] = {}
        self.trial_keys: dict[int, tuple[dict[str, Value], list[dict[str, Any]], list[Key]]] = {}  # by trial number
        self.positions: dict[Key, int] = {}
        self.grid: np.ndarray | None = None  # [members, dimensions]: index of each value
        if study.searcher != "grid" and space.members is not None:
            self.grid = np.stack([self.indices(member) for member in space.all_members()])
            self.positions = {member_key(member): row for row, member in enumerate(space.all_members())}
        elif study.searcher != "grid" and self.size <= LARGEST_ENUMERATED:
            counts = [len(cast(tuple[Value, ...], values)) for values in space.dimensions.values()]
            self.grid = np.indices(counts).reshape(len(counts), -1).T
        self.prior = {each.name: self.tell_prior(each) for each in prior if self.learns}
        self.scale: Scale = []
        self.told: dict[int, tuple[Trial, list[FrozenTrial]]] = {}  # by number of the trial
        self.why_none, self.found_none = "", False
        self.last_states: list[tuple[int, TrialState]] = []  # of the trials of the last call

    def propose(self, trials: Sequence[Trial]) -> Trial | None:
        """Propose the next trial: its member is new, can be built, and is within the budgets that need no measurement.

        Args:
            trials: all trials so far, including those that run.

        Returns:
            The trial; None if the search is at its end, see ``why_none``.
        """
        first_seeds = [trial for trial in trials if trial.repeat_of is None]
        states = [(trial.number, trial.state) for trial in first_seeds]
        if self.why_none and states == self.last_states:  # Tune asks often
            return None
        self.why_none, self.found_none, self.last_states = "", False, states
        in_a_row = over_budget_in_a_row(first_seeds)
        if in_a_row >= max(MIN_OVER_BUDGET, self.study.trials):
            self.end(first_seeds, f"the last {in_a_row} that were measured are over the budget")
            return None
        start = max((trial.suggestion for trial in trials), default=-1) + 1
        rejected: list[dict[str, Any]] = []
        suggestion, member = self.find(first_seeds, start, rejected)
        if suggestion is None:
            return None
        number, seed = max((trial.number for trial in trials), default=-1) + 1, self.study.recipe.train.seed
        attrs = suggestion.sampler_attrs
        return Trial(number, member, seed, suggestion.number, sampler_attrs=attrs, rejected=rejected)

    def find(
        self, trials: Sequence[Trial], start: int, rejected: list[dict[str, Any]]
    ) -> tuple[Suggestion | None, dict[str, Value]]:
        """Find a new member that can be built and is within the budgets that need no measurement.

        Args:
            trials: those with the first seed.
            start: number of the first suggestion.
            rejected: receives the members over a budget of which the sampler was told (``Trial.rejected``).

        Returns:
            The suggestion, and the member that stands for it; None if the search is at its end.
        """
        known = {key for trial in trials for key in self.keys_of(trial)}
        told = self.tell(trials)
        looks = 0
        for suggestion in self.suggestions(told, start):
            for member in self.ranked(suggestion, known):
                looks += 1
                key = member_key(member)
                check = None if key in known else self.check(member)
                if check is None or check.refused is not None:
                    continue
                if not check.excess:
                    return suggestion, member
                if self.learns and len(rejected) < MOST_REJECTED:
                    known.add(key)
                    rejected.append({"member": member, "sampler_attrs": suggestion.sampler_attrs})
                    told.append(self.tell_rejected(rejected[-1]))
                    break  # the sampler knows more now, and suggests another
            else:
                if self.grid is not None:
                    break
                if looks >= MOST_LOOKS:
                    self.end(trials, f"the last {looks} that it looked at are known, over a budget or cannot be built")
                    return None, {}
        self.end(trials, f"it has looked at all {self.size:.0f}")
        return None, {}

    def end(self, trials: Sequence[Trial], reason: str) -> None:
        """Record why the search ends, and which member comes nearest to the budgets if none is within them."""
        name, budgets = self.study.space, self.study.budgets()
        self.why_none = f"the search finds no further member of space {name} to train: {reason}"
        if any(trial.state != TrialState.OVER_BUDGET for trial in trials):
            return
        self.found_none = True
        measured = [(sum_over(excess(budgets, trial.metrics)), trial.member, trial.metrics) for trial in trials]
        checked = [(check.excess, dict(key), check.costs) for key, check in self.checks.items() if check.excess]
        near = min(measured + checked, key=lambda each: each[0], default=None)
        if near is None:
            refused = ((dict(key), check.refused) for key, check in self.checks.items() if check.refused is not None)
            example = next((f"; for example {report.describe_member(member)}: {why}" for member, why in refused), "")
            self.why_none = f"space {name} has no member that can be built with this recipe: {reason}{example}"
            return
        _, member, costs = near
        over = {metric: budget for metric, budget in budgets.items() if costs.get(metric, 0) > budget}
        values = "; ".join(over_budget({metric: budget}, costs) for metric, budget in over.items())
        options = " and ".join(f"{BUDGET_OPTIONS[metric]} {round_up(costs[metric]):g}" for metric in over)
        self.why_none = (
            f"the search finds no member of space {name} within the budgets: {reason}. The nearest is "
            f"{report.describe_member(member)}: {values}. Start a new study with {options} or more, or with a space of "
            "smaller members"
        )

    # --- suggestions ---------------------------------------------------------------------------------------------

    def suggestions(self, told: Sequence[FrozenTrial], start: int) -> Iterator[Suggestion]:
        """Yield the suggestions of the study's searcher from number ``start`` on, including known members.

        Args:
            told: what the sampler knows; the caller may add to it between two suggestions.
        """
        if self.study.searcher != "grid":
            for number in itertools.count(start):
                yield self.sampler.suggest(told, number)
        for number, member in enumerate(itertools.islice(self.space.all_members(), start, None), start):
            yield Suggestion(number, member, {}, at_random=False, acquisition=None)

    def ranked(self, suggestion: Suggestion, known: Iterable[Key]) -> Iterator[dict[str, Value]]:
        """Yield the members that may stand for a suggestion, best first.

        In a space that lists its members, or has at most ``LARGEST_ENUMERATED``, these are all but the known ones. In
        another they are the suggestion and its neighbours, which differ in one dimension. TPE ranks them by its
        acquisition. For NSGA-II those that differ in the fewest dimensions come first. A random suggestion is followed
        by all members in random order, or in a large space by none: the next suggestion is random too. One that is not
        listed is left out. Ties are in random order.
        """
        if self.study.searcher == "grid":
            yield suggestion.member
            return
        rng = np.random.default_rng([self.study.seed, suggestion.number, 1])
        if self.grid is None:
            yield suggestion.member
            if suggestion.at_random:
                return
            members = neighbours(self.space, suggestion.member)
            order = rng.permutation(len(members))
            if suggestion.acquisition and members:
                order = order[np.argsort(-suggestion.acquisition(self.columns(members))[order], kind="stable")]
            yield from (members[index] for index in order)
            return
        order = rng.permutation(len(self.grid))
        unknown = np.ones(len(self.grid), dtype=bool)
        unknown[[self.position(key) for key in known]] = False
        order = order[unknown[order]]  # a score takes time
        unseen = self.grid[order]
        if suggestion.acquisition and len(unseen):
            score = suggestion.acquisition(dict(zip(self.space.dimensions, unseen.T, strict=True)))
        elif suggestion.at_random:
            if self.space.members is None:
                yield suggestion.member
            score = np.zeros(len(unseen))
        else:
            score = -(unseen != self.indices(suggestion.member)).sum(axis=1)
        for index in order[np.argsort(-score, kind="stable")].tolist():
            yield self.member_at(index)

    def member_at(self, index: int) -> dict[str, Value]:
        """A member of an enumerated space."""
        assert self.grid is not None
        choices = cast(dict[str, tuple[Value, ...]], self.space.dimensions)
        return {name: values[at] for (name, values), at in zip(choices.items(), self.grid[index], strict=True)}

    def position(self, key: Key) -> int:
        """The row of a member in ``grid``. The result is remembered."""
        if key not in self.positions:
            counts = [len(cast(tuple[Value, ...], values)) for values in self.space.dimensions.values()]
            self.positions[key] = int(np.ravel_multi_index(tuple(self.indices(dict(key))), counts))
        return self.positions[key]

    def keys_of(self, trial: Trial) -> list[Key]:
        """The keys of a trial's member and of those that were rejected before it. The result is remembered."""
        found = self.trial_keys.get(trial.number)
        if found is None or found[0] is not trial.member or found[1] is not trial.rejected:
            keys = [member_key(member) for member in (trial.member, *rejected_members(trial))]
            found = self.trial_keys[trial.number] = trial.member, trial.rejected, keys
        return found[2]

    def indices(self, member: dict[str, Value]) -> np.ndarray:
        """Index of each value of a member: ``[dimensions]``."""
        return np.array([cast(tuple[Value, ...], v).index(member[name]) for name, v in self.space.dimensions.items()])

    def columns(self, members: Sequence[dict[str, Value]]) -> Columns:
        """Members as Optuna has them inside."""
        distributions = self.sampler.distributions
        return {
            name: np.array([each.to_internal_repr(member[name]) for member in members])
            for name, each in distributions.items()
        }

    # --- what the sampler knows ----------------------------------------------------------------------------------

    def tell(self, trials: Sequence[Trial]) -> list[FrozenTrial]:
        """What the sampler knows, in the order of the trials: only new and changed ones are converted."""
        if not self.learns:
            return []
        scale = own_scale(self.study, trials) if self.prior else []
        if scale != self.scale:
            self.scale = scale
            self.told.clear()
        told = list(itertools.chain.from_iterable(self.prior.values()))
        for trial in sorted(trials, key=lambda trial: trial.number):
            found = self.told.get(trial.number)
            if found is None or (found[0] is not trial and found[0] != trial):
                found = self.told[trial.number] = trial, self.convert(trial)
            told += found[1]
        return told

    def convert(self, trial: Trial) -> list[FrozenTrial]:
        """A trial as the sampler sees it, after the members that were rejected before it."""
        values = objectives(self.study, trial)
        if self.prior and values and trial.state == TrialState.FINISHED:  # of the others no value is read
            values = standardise(values, self.scale) if self.scale else None
        told = tell_trial(self.study, trial, self.sampler.distributions, values)
        return [*map(self.tell_rejected, trial.rejected), *([told] if told else [])]

    def tell_rejected(self, rejected: dict[str, Any]) -> FrozenTrial:
        """A member that was rejected for its static costs, as the sampler sees it."""
        member = rejected["member"]
        over = excess(self.study.budgets(), self.check(member).costs)
        return tell_over_budget(self.study, member, over, self.sampler.distributions, rejected["sampler_attrs"])

    def tell_prior(self, prior: Prior) -> list[FrozenTrial]:
        """An earlier study as the sampler sees it: its values are standardised, as its epochs and data may differ.

        GMACs and parameters are computed for this study's recipe. A measured latency is that of the earlier study, and
        says nothing about this study's budget.
        """
        against, budgets = self.study.against, self.study.budgets()
        known = []
        for trial in prior.trials:
            try:
                costs = static_costs(self.space.recipe(self.study.recipe, trial.member))
            except RecipeError:
                continue
            costs |= {COST_LATENCY_MS: trial.metrics[COST_LATENCY_MS]} if COST_LATENCY_MS in trial.metrics else {}
            values = [trial.value, *([costs.get(COSTS[against], math.nan)] if against else [])]
            costs.pop(COST_LATENCY_MS, None)
            if all(map(math.isfinite, values)):
                known.append((trial.member, values, excess(budgets, costs)))
        scale = scale_of(self.study, [values for _, values, _ in known])
        distributions, attrs = self.sampler.distributions, self.sampler.first_attrs()
        return [
            tell_complete(member, standardise(values, scale), over, distributions, attrs)
            for member, values, over in known
        ]

    def check(self, member: dict[str, Value]) -> Check:
        """Build a member's recipe and compute its costs, as far as budgets need them. The result is remembered."""
        key = member_key(member)
        if key not in self.checks:
            self.checks[key] = self.check_anew(member)
        return self.checks[key]

    def check_anew(self, member: dict[str, Value]) -> Check:
        """What is known of a member before it is trained."""
        try:
            config = self.space.recipe(self.study.recipe, member)
        except RecipeError as error:
            return Check({}, refused=str(error))
        budgets = self.study.budgets()
        costs = static_costs(config) if budgets.keys() - {COST_LATENCY_MS} else {}
        return Check(costs, excess=sum_over(excess(budgets, costs)))


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
    listed = None if space.members is None else set(map(member_key, space.all_members()))
    for trial in trials:
        same_names = trial.member.keys() == space.dimensions.keys()
        known = same_names and all(is_value_of(space.dimensions[name], value) for name, value in trial.member.items())
        if not known or (listed is not None and member_key(trial.member) not in listed):
            raise StudyError(
                f"space {study.space} has changed since trial {trial.number} of {study.name}, which is {trial.member}; "
                "restore it, or start a new study"
            )


def over_budget_in_a_row(trials: Sequence[Trial]) -> int:
    """Number of trials over a budget since the last one that is within all budgets, without those that run."""
    ended = [trial for trial in sorted(trials, key=lambda trial: -trial.number) if trial.state != TrialState.RUNNING]
    return sum(1 for _ in itertools.takewhile(lambda trial: trial.state == TrialState.OVER_BUDGET, ended))


def space_size(space: Space) -> float:
    """Number of members of a space, also of those that cannot be built; infinite if it has a range."""
    if space.members is not None:
        return len(space.members)
    return math.prod(math.inf if isinstance(values, Range) else len(values) for values in space.dimensions.values())


def neighbours(space: Space, member: dict[str, Value]) -> list[dict[str, Value]]:
    """The members that differ from a member in one choice."""
    choices = [(name, values) for name, values in space.dimensions.items() if isinstance(values, tuple)]
    return [member | {name: value} for name, values in choices for value in values if value != member[name]]


def sum_over(over: dict[str, float]) -> float:
    """How far costs are over their budgets in all: the sum of those that are."""
    return sum(value for value in over.values() if value > 0)


def round_up(cost: float) -> float:
    """A cost with two digits, rounded up."""
    step = 10.0 ** (math.floor(math.log10(cost)) - 1)
    return float(f"{math.ceil(cost / step) * step:.6g}")


# --- scales of different studies --------------------------------------------------------------------------------

Scale = list[tuple[float, float]]  # of each objective: what is subtracted, and what the rest is divided by


def scale_of(study: Study, values: Sequence[Sequence[float]]) -> Scale:
    """Mean and standard deviation of the main metric and of a measured cost. Costs that are computed need no scale."""
    scale: Scale = []
    for index, column in enumerate(zip(*values, strict=True)):
        computed = index > 0 and study.against != "latency"
        scale.append((0.0, 1.0) if computed else (statistics.mean(column), statistics.pstdev(column) or 1.0))
    return scale


def standardise(values: Sequence[float], scale: Scale) -> list[float]:
    """Objectives in units of a study's own standard deviation."""
    return [(value - mean) / deviation for value, (mean, deviation) in zip(values, scale, strict=True)]


def own_scale(study: Study, trials: Sequence[Trial]) -> Scale:
    """The scale of a study's own trials; empty as long as fewer than two are fully trained."""
    found = [values for trial in trials if trial.state == TrialState.FINISHED and (values := objectives(study, trial))]
    return scale_of(study, found) if len(found) >= 2 else []


Key = tuple[tuple[str, Value], ...]


def member_key(member: dict[str, Value]) -> Key:
    """A hashable value that is equal for equal members."""
    return tuple(sorted(member.items()))


def rejected_members(trial: Trial) -> Iterator[dict[str, Value]]:
    """The members that a budget refused before a trial was proposed."""
    return (each["member"] for each in trial.rejected)
