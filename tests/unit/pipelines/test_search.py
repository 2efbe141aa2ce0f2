"""The trials that searchers propose, without training: top-1 is a function of the member."""

import json
from dataclasses import replace

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.studies import study as records
from pipelines.studies.costs import static_costs
from pipelines.studies.study import Study, StudyError, Trial, TrialState, over_budget
from pipelines.tuning.samplers import (
    Sampler,
    objectives,
    tell_trial,
    to_distribution,
)
from pipelines.tuning.search import Searcher, check_space, space_size
from pipelines.tuning.tune import tune
from posmlp import create_model
from posmlp.config import load_recipe
from posmlp.metrics import COSTS, VAL_TOP1
from posmlp.model.cost import cost
from tests.helpers.tasks import OVERRIDES, TASKS, of_task
from tune_spaces import Range, Space

BASE = load_recipe("demo")
FOUR = Space(
    {"a": (1, 2, 3, 4), "b": ("x", "y", "z"), "c": (0.5, 1.0, 2.0), "d": (0, 1)}, lambda member: {"train.seed": 1}
)


def study_of(searcher, against=None, recipe=BASE, **settings):
    return Study(name="s", recipe=recipe, space="none", searcher=searcher, against=against, **settings)


def score(member):
    """A top-1 that is highest for a=4, b=z; c and d do not matter."""
    return member["a"] / 8 + "xyz".index(member["b"]) / 4


def search(study, count, space=FOUR, trials=()):
    """Propose trials one after the other, and finish each at once."""
    trials = list(trials)
    while len(trials) < count:
        trial = Searcher(study, space).propose(trials)
        metrics = {VAL_TOP1: score(trial.member), COSTS["gmacs"]: 5.0 - trial.member["a"], "epoch": 3.0}
        trials.append(replace(trial, state=TrialState.FINISHED, metrics=metrics))
    return trials


ALL = [("grid", None), ("random", None), ("tpe", None), ("tpe", "gmacs"), ("nsga2", "gmacs")]


@pytest.mark.parametrize(("searcher", "against"), ALL)
def test_a_seeded_search_repeats_and_another_seed_differs(searcher, against):
    one, again = (search(study_of(searcher, against, seed=3), 20) for _ in range(2))
    assert one == again
    other = search(study_of(searcher, against, seed=4), 20)
    assert (other == one) == (searcher == "grid")


@pytest.mark.parametrize(("searcher", "against"), ALL)
def test_an_interrupted_search_resumes_as_if_it_had_not_been(searcher, against, tmp_path):
    """The trials are written to the study's folder and read back, as after a kill."""
    recipe = BASE.model_copy(update={"train": BASE.train.model_copy(update={"storage": str(tmp_path)})})
    study = study_of(searcher, against).model_copy(update={"recipe": recipe})
    whole = search(study, 24)
    for trial in whole[:17]:
        records.write_trial(study, trial)
    assert search(study, 24, trials=records.read_trials(study.folder)) == whole


@pytest.mark.parametrize(("searcher", "against"), ALL)
def test_no_member_is_proposed_twice_and_a_space_ends(searcher, against):
    study, trials = study_of(searcher, against), []
    space = Space({"a": (1, 2, 3, 4), "b": ("x", "y", "z")}, FOUR.keys)
    while (trial := Searcher(study, space).propose(trials)) is not None:
        trials.append(
            replace(trial, state=TrialState.FINISHED, metrics={VAL_TOP1: score(trial.member), COSTS["gmacs"]: 1.0})
        )
    assert len(trials) == space_size(space) == 12
    assert len({tuple(trial.member.items()) for trial in trials}) == 12
    assert [trial.number for trial in trials] == list(range(12))


def test_a_grid_is_every_combination_in_order():
    members = [tuple(trial.member.values()) for trial in search(study_of("grid"), 72)]
    assert members == [(a, b, c, d) for a in (1, 2, 3, 4) for b in "xyz" for c in (0.5, 1.0, 2.0) for d in (0, 1)]
    assert Searcher(study_of("grid"), FOUR).propose(search(study_of("grid"), 72)) is None


def test_tpe_finds_what_is_good_and_random_does_not():
    space = Space(FOUR.dimensions | {"c": tuple(range(12)), "d": tuple(range(6))}, FOUR.keys)

    def late(searcher):
        trials = [trial for seed in range(3) for trial in search(study_of(searcher, seed=seed), 30, space)[15:]]
        return sum(trial.metrics[VAL_TOP1] for trial in trials) / len(trials)

    assert late("tpe") > late("random") + 0.05


def test_tpe_learns_from_trials_that_were_stopped_and_not_from_failed_ones():
    study = study_of("tpe")
    bad = [trial for trial in search(study_of("grid"), 72) if trial.member["b"] == "x"][:16]
    good = [trial for trial in search(study_of("grid"), 72) if trial.member["b"] == "z"][:16]
    both = [replace(trial, number=i, suggestion=i) for i, trial in enumerate(bad + good)]

    def share(state):
        sampler, trials = Sampler(study, FOUR), [replace(trial, state=state) for trial in both]
        told = [told for t in trials if (told := tell_trial(study, t, sampler.distributions, objectives(study, t)))]
        return sum(sampler.suggest(told, number).member["b"] == "z" for number in range(40)) / 40

    assert share(TrialState.STOPPED) > 0.6
    assert share(TrialState.FAILED) < 0.5


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("searcher", "against", "directions"),
    [
        ("tpe", None, ["MAXIMIZE"]),
        ("tpe", "gmacs", ["MAXIMIZE", "MINIMIZE"]),
        ("nsga2", "gmacs", ["MAXIMIZE", "MINIMIZE"]),
    ],
)
def test_the_main_metric_is_maximised_and_the_cost_minimised(searcher, against, directions, task, monkeypatch):
    """What Optuna gets: the directions of its study, and the values of each trial in the same order."""
    created, create = [], optuna.create_study

    def record(**options):
        created.append(create(**options))
        return created[-1]

    monkeypatch.setattr(optuna, "create_study", record)
    member = {"a": 1, "b": "x", "c": 0.5, "d": 0}
    metrics = {VAL_TOP1: 0.7, COSTS["gmacs"]: 3.5, COSTS["params"]: 8.0, "epoch": 3.0}
    trials = of_task([Trial(0, member, state=TrialState.FINISHED, metrics=metrics)], task)
    recipe = load_recipe("demo", OVERRIDES[task])
    Searcher(study_of(searcher, against, recipe), FOUR).propose(trials)
    (study,) = created
    assert [direction.name for direction in study.directions] == directions
    assert study.trials[0].values == [0.7, 3.5][: len(directions)]
    assert study.trials[0].params == member
    assert study.trials[0].state.name == "COMPLETE"


@pytest.mark.parametrize("searcher", ["tpe", "nsga2"])
@pytest.mark.parametrize("better", ["cost", "top1"])
def test_a_search_of_a_front_moves_to_cheap_and_to_accurate_members(searcher, better):
    """One of the two is the same for all members. The mean of a random choice is 5.5."""
    space = Space({name: tuple(range(12)) for name in "abcd"}, FOUR.keys)
    trials, study = [], study_of(searcher, "gmacs")
    while len(trials) < 48:
        trial = Searcher(study, space).propose(trials)
        a = float(trial.member["a"])
        cost, top1 = (a, 0.5) if better == "cost" else (1.0, a / 12)
        metrics = {VAL_TOP1: top1, COSTS["gmacs"]: cost, "epoch": 3.0}
        trials.append(replace(trial, state=TrialState.FINISHED, metrics=metrics))
    mean = sum(trial.member["a"] for trial in trials[24:]) / 24
    assert mean < 4.5 if better == "cost" else mean > 6.5


def test_concurrent_trials_differ():
    study, trials = study_of("tpe"), search(study_of("tpe"), 12)
    for _ in range(4):
        trials.append(Searcher(study, FOUR).propose(trials))
        assert trials[-1].state == TrialState.RUNNING
    assert len({tuple(trial.member.items()) for trial in trials}) == 16


def test_members_over_a_budget_are_left_out():
    space = records.study_space(study_of("grid").model_copy(update={"space": "widths"}))
    study = study_of("grid", budget_gmacs=0.02).model_copy(update={"space": "widths"})
    trials = []
    while (trial := Searcher(study, space).propose(trials)) is not None:
        trials.append(replace(trial, state=TrialState.FINISHED))
    costs = {width: static_costs(space.recipe(BASE, {"width": width}))[COSTS["gmacs"]] for width in (0.5, 0.75, 1.0)}
    assert costs[0.75] < 0.02 < costs[1.0]
    assert [trial.member["width"] for trial in trials] == [0.5, 0.75]


def test_static_costs_are_those_of_the_built_model():
    config = load_recipe("demo", ["model.blocks=joint", "model.frames=4"])
    measured = cost(config.model.name, repeats=1, **config.model.overrides())
    model = create_model(config.model.name, **config.model.overrides())
    assert static_costs(config) == {
        COSTS["gmacs"]: measured.macs / 1e9,
        COSTS["params"]: sum(p.numel() for p in model.parameters()) / 1e6,
    }


@given(st.dictionaries(st.sampled_from(list(COSTS.values())), st.floats(0.1, 10)), st.floats(0.1, 10))
def test_a_budget_is_kept_or_the_reason_names_it(costs, budget):
    reason = over_budget({COSTS["latency"]: budget}, costs)
    assert bool(reason) == (costs.get(COSTS["latency"], 0) > budget)
    assert not reason or f"latency {costs[COSTS['latency']]:.4g} ms is over --budget-ms {budget:g}" == reason


def test_a_trial_without_a_finite_result_has_no_objectives():
    study = study_of("tpe", "gmacs")
    assert objectives(study, Trial(0, {}, metrics={VAL_TOP1: 0.5, COSTS["gmacs"]: 2.0})) == [0.5, 2.0]
    assert objectives(study, Trial(0, {}, metrics={VAL_TOP1: float("nan"), COSTS["gmacs"]: 2.0})) is None
    assert objectives(study, Trial(0, {}, metrics={VAL_TOP1: 0.5})) is None


def test_settings_that_cannot_go_together_are_refused():
    with pytest.raises(ValueError, match="nsga2 searches a Pareto front"):
        study_of("nsga2")
    ranged = Space({"lr": Range(1e-4, 1e-2)}, lambda member: {})
    with pytest.raises(StudyError, match=r"has ranges \(lr\)"):
        check_space(study_of("grid"), ranged, [])


@pytest.mark.parametrize("member", [{"lr": 1.0}, {"lr": 1e-3, "more": 1}, {}, {"lr": "x"}])
def test_a_space_that_is_not_that_of_the_trials_is_refused(member):
    space = Space({"lr": Range(1e-4, 1e-2)}, lambda member: {})
    check_space(study_of("tpe"), space, [Trial(0, {"lr": 1e-3})])
    with pytest.raises(StudyError, match=r"has changed since trial 3 of s, which is .*; restore it"):
        check_space(study_of("tpe"), space, [Trial(3, member)])


def test_the_record_of_a_study_is_read_back(tmp_path):
    recipe = load_recipe("demo", [f"train.storage={tmp_path}"])
    study = Study(name="s", recipe=recipe, space="depths", against="latency", budget_ms=5)
    records.write_study(study, "abc")
    assert records.find_study(str(tmp_path / "s"), records.Study) == (study, "abc")
    (tmp_path / "s" / "study.json").write_text('{"name": "s"}')
    with pytest.raises(StudyError, match=r"study\.json is not a study"):
        records.find_study(str(tmp_path / "s"), records.Study)
    with pytest.raises(StudyError, match="no study nowhere"):
        records.find_study("nowhere", records.Study)


def test_a_study_whose_folder_was_moved_is_not_taken_for_an_empty_one(tmp_path):
    study = Study(name="s", recipe=load_recipe("demo", [f"train.storage={tmp_path}/old"]), space="depths")
    records.write_study(study, "abc")
    (tmp_path / "old" / "s").rename(tmp_path / "s")
    with pytest.raises(StudyError, match=rf"{tmp_path}/s was moved from {tmp_path}/old/s; move it back"):
        records.find_study(str(tmp_path / "s"), records.Study)


def test_a_new_study_of_a_taken_name_is_told_so_whatever_its_space(tmp_path):
    recipe = load_recipe("demo", [f"train.storage={tmp_path}"])
    records.write_study(Study(name="s", recipe=recipe, space="depths"), "abc")
    records.write_trial(Study(name="s", recipe=recipe, space="depths"), Trial(0, {"depth1": 1}))
    with pytest.raises(StudyError, match=rf"s exists already: resume it with posmlp tune --resume {tmp_path}/s, or"):
        tune(Study(name="s", recipe=recipe, space="widths"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"later": 1}, "KeyError: 'later'"), ({"state": "asleep"}, "'asleep' is not a valid"), ({"curve": [1]}, "list")],
)
def test_a_trial_that_is_not_understood_is_named(tmp_path, change, reason):
    study = Study(name="s", recipe=load_recipe("demo", [f"train.storage={tmp_path}"]), space="depths")
    records.write_trial(study, Trial(0, {"depth1": 1}))
    path = tmp_path / "s" / "trial-000" / "trial.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(StudyError, match=rf"trial-000/trial\.json is not a trial of this version .*{reason}"):
        records.read_trials(study.folder)


# What Optuna gets, as literals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("searcher", "kind", "options"),
    [
        ("tpe", "TPESampler", {"n_startup_trials": 8, "multivariate": True, "constant_liar": True}),
        ("nsga2", "NSGAIISampler", {"population_size": 12}),
        ("random", "RandomSampler", {}),
    ],
)
def test_the_samplers_of_optuna_and_their_settings(searcher, kind, options, monkeypatch):
    """The seed is numpy.random.SeedSequence([3, 5]).generate_state(1), as printed by NumPy 2."""
    made, base = [], getattr(optuna.samplers, kind)
    init = base.__init__

    def record(self, *args, seed=None, **given):
        made.append((seed if seed is not None else args[0], given))
        init(self, *args, seed=seed, **given) if seed is not None else init(self, *args, **given)

    monkeypatch.setattr(base, "__init__", record)
    sampler = Sampler(study_of(searcher, "gmacs" if searcher == "nsga2" else None, seed=3), FOUR).make_sampler(5)
    assert isinstance(sampler, base)
    assert made[0] == (3746004709, options)


def test_the_generation_of_nsga2_is_stored_with_the_trial():
    """After a population of 12 the next is bred; a suggestion without the generations of the others is not."""
    trials = search(study_of("nsga2", "gmacs"), 14)
    generations = [list(trial.sampler_attrs.values()) for trial in trials]
    assert generations == [[0]] * 12 + [[1]] * 2
    assert all(name.endswith(":generation") for trial in trials for name in trial.sampler_attrs)
    assert search(study_of("tpe"), 1)[0].sampler_attrs == {}


def test_dimensions_as_optuna_has_them():
    assert to_distribution((1, "x", 0.5)) == optuna.distributions.CategoricalDistribution((1, "x", 0.5))
    assert to_distribution(Range(0.25, 2.0)) == optuna.distributions.FloatDistribution(0.25, 2.0, log=False)
    assert to_distribution(Range(0.25, 2.0, log=True)) == optuna.distributions.FloatDistribution(0.25, 2.0, log=True)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("state", "top1", "expected"),
    [
        (TrialState.FINISHED, 0.7, ("COMPLETE", [0.7], {}, {"cost/gmacs": -0.5})),
        (TrialState.STOPPED, 0.7, ("PRUNED", None, {3: 0.7}, {"cost/gmacs": -0.5})),
        (TrialState.RUNNING, 0.7, ("RUNNING", None, {}, {})),
        (TrialState.FAILED, 0.7, None),
        (TrialState.OVER_BUDGET, 0.7, ("COMPLETE", [0.0], {}, {"cost/gmacs": -0.5, "cost/latency_ms": 0.25})),
        (TrialState.FINISHED, float("inf"), None),
        (TrialState.STOPPED, float("nan"), None),
        (TrialState.RUNNING, None, ("RUNNING", None, {}, {})),
    ],
)
def test_a_trial_as_optuna_has_it(state, top1, expected, task):
    """Budgets of 4 GMACs and 8 ms; the member has 2 GMACs and, if it is over a budget, 10 ms."""
    metrics = {"epoch": 3.0, "cost/gmacs": 2.0} | ({} if top1 is None else {VAL_TOP1: top1})
    metrics |= {"cost/latency_ms": 10.0} if state == TrialState.OVER_BUDGET else {}
    member, space = {"a": 2, "c": 0.25}, {"a": to_distribution((1, 2)), "c": to_distribution(Range(0.1, 1.0))}
    trials = [Trial(4, member, state=state, metrics=metrics, sampler_attrs={"x:generation": 2})]
    (trial,) = of_task(trials, task)
    study = study_of("tpe", recipe=load_recipe("demo", OVERRIDES[task]), budget_gmacs=4, budget_ms=8)
    made = tell_trial(study, trial, space, objectives(study, trial))
    if expected is None:
        assert made is None
        return
    assert (made.state.name, made.values, made.intermediate_values, made.constraints) == expected
    assert (made.params, made.distributions, made.system_attrs["x:generation"]) == (member, space, 2)


def test_a_stopped_trial_of_two_objectives_lacks_epochs_and_no_value_of_it_counts():
    recipe = BASE.model_copy(update={"train": BASE.train.model_copy(update={"epochs": 12})})
    study = study_of("tpe", "gmacs").model_copy(update={"recipe": recipe})
    metrics = {"epoch": 3.0, "cost/gmacs": 2.0, VAL_TOP1: 0.9}
    trial = Trial(4, {"a": 2}, state=TrialState.STOPPED, metrics=metrics)
    made = tell_trial(study, trial, {"a": to_distribution((1, 2))}, objectives(study, trial))
    assert (made.state.name, made.values, made.constraints) == ("COMPLETE", [0.0, 0.0], {"unfinished": 0.75})


@pytest.mark.parametrize("searcher", ["tpe", "nsga2"])
def test_a_partial_accuracy_of_two_objectives_never_counts_as_a_final_one(searcher):
    """Trials that were stopped after one epoch have the best top-1, all with b = x; the search does not go there."""
    study, rows = study_of(searcher, "gmacs", seed=1), []
    for number, trial in enumerate(search(study_of("grid"), 72)[::2]):
        stopped = trial.member["b"] == "x"
        metrics = {VAL_TOP1: 0.99 if stopped else 0.2, COSTS["gmacs"]: 1.0, "epoch": 1.0 if stopped else 24.0}
        state = TrialState.STOPPED if stopped else TrialState.FINISHED
        attrs = {"NSGAIISampler:generation": number // 12} if searcher == "nsga2" else {}
        rows.append(replace(trial, number=number, suggestion=number, state=state, metrics=metrics, sampler_attrs=attrs))
    sampler = Sampler(study, FOUR)
    told = [tell_trial(study, trial, sampler.distributions, objectives(study, trial)) for trial in rows]
    share = sum(sampler.suggest(told, number).member["b"] == "x" for number in range(100, 200)) / 100
    assert share < 0.2


# Which trial is proposed ----------------------------------------------------------------------------------------------


def test_a_trial_has_the_next_numbers_and_the_seed_of_the_recipe():
    """Of the trials and of the suggestions; the searcher learns from the first seed of each member alone."""
    recipe = BASE.model_copy(update={"train": BASE.train.model_copy(update={"seed": 11})})
    study = study_of("grid").model_copy(update={"recipe": recipe})
    first = Searcher(study, FOUR).propose([])
    assert (first.number, first.suggestion, first.seed, first.repeat_of) == (0, 0, 11, None)
    earlier = [Trial(4, {"a": 1, "b": "x", "c": 0.5, "d": 0}, suggestion=2), Trial(6, {"a": 9}, repeat_of=4)]
    trial = Searcher(study, FOUR).propose(earlier)
    assert (trial.number, trial.suggestion, trial.seed, trial.state) == (7, 3, 11, TrialState.RUNNING)
    assert trial.member == {"a": 1, "b": "x", "c": 1.0, "d": 1}


@pytest.mark.parametrize("searcher", ["tpe", "random"])
def test_the_searcher_does_not_see_repeats(searcher):
    """A repeat changes neither the member nor the suggestion that follow, whatever its result."""
    study = study_of(searcher)
    trials = search(study, 12)
    following = Searcher(study, FOUR).propose(trials)
    best = max(trials, key=lambda trial: trial.metrics[VAL_TOP1])
    repeat = Trial(12, best.member, 1, repeat_of=best.number, state=TrialState.FINISHED, metrics={VAL_TOP1: 0.0})
    assert Searcher(study, FOUR).propose([*trials, repeat]) == replace(following, number=13)


def test_members_that_are_known_or_cannot_be_built_are_skipped():
    """Of (width, groups) in order: the first is known, the second is refused, as 16 channels have no 3 groups."""
    space = Space({"dim": (16,), "groups": (4, 3, 8)}, lambda m: {"model.groups": [m["groups"], 8, 8, 16]})
    known = Trial(0, {"groups": 4, "dim": 16}, suggestion=0)  # in another order
    trial = Searcher(study_of("grid"), space).propose([known])
    assert (trial.number, trial.suggestion, trial.member) == (1, 2, {"dim": 16, "groups": 8})
    assert Searcher(study_of("grid"), space).propose([known, trial]) is None


def test_a_search_of_a_large_space_gives_up_after_2000_members():
    """No member can be built: 16 channels have no 3 groups. The other dimensions change nothing."""
    space = Space({"groups": (3,), **{name: tuple(range(10)) for name in "abcde"}}, impossible)
    for searcher, against in [("random", None), ("tpe", None), ("nsga2", "gmacs")]:
        searcher = Searcher(study_of(searcher, against), space)
        assert searcher.propose([]) is None and searcher.found_none
        assert "no member that can be built" in searcher.why_none
        assert 1000 < len(searcher.checks) <= 2100


def impossible(member):
    return {"model.groups": [member["groups"], 8, 8, 16]}


def test_the_size_of_a_space():
    assert space_size(FOUR) == 72
    assert space_size(Space({"a": (1, 2), "lr": Range(0.1, 1.0)}, FOUR.keys)) == float("inf")


def test_values_are_compared_with_those_of_the_space():
    space = Space({"a": (1, 2), "lr": Range(0.25, 1.0)}, lambda member: {})
    for lr in (0.25, 0.5, 1.0, 1):
        check_space(study_of("tpe"), space, [Trial(0, {"a": 2, "lr": lr})])
    for member in ({"a": 3, "lr": 0.5}, {"a": 1, "lr": 0.24}, {"a": 1, "lr": 1.01}):
        with pytest.raises(StudyError, match="space none has changed since trial 5 of s, which is "):
            check_space(study_of("tpe"), space, [Trial(0, {"a": 2, "lr": 0.5}), Trial(5, member)])


def test_a_grid_names_all_ranges_of_the_space():
    space = Space({"lr": Range(1e-4, 1e-2), "a": (1, 2), "decay": Range(0, 1)}, lambda member: {})
    message = "searcher grid needs values to choose from, but space none has ranges (lr, decay); use another searcher"
    with pytest.raises(StudyError) as error:
        check_space(study_of("grid"), space, [])
    assert str(error.value) == message
    check_space(study_of("random"), space, [])
    check_space(study_of("grid"), FOUR, [])
