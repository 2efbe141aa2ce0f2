"""What a searcher does over a whole study, simulated: its trials end as a known function of the member says."""

import math
import re
import shutil
from dataclasses import replace
from unittest.mock import MagicMock

import numpy as np
import optuna
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from scipy import stats

from pipelines.cli import main
from pipelines.studies import prior
from pipelines.studies import study as records
from pipelines.studies.costs import static_costs
from pipelines.studies.study import Study, StudyError, Trial, TrialState
from pipelines.tuning import controller, samplers
from pipelines.tuning.samplers import ACQUISITION, TPE_STARTUP_TRIALS
from pipelines.tuning.search import Searcher, check_space, member_key, space_size
from posmlp.config import RecipeError, load_recipe
from posmlp.metrics import COST_GMACS, COST_LATENCY_MS, COST_PARAMS_M, VAL_TOP1
from tests.helpers.batches import DETECTION
from tests.helpers.tasks import of_task
from tune_spaces import Range, Space, load_space

BASE = load_recipe("demo")
BLOCKS = load_space("block_types", BASE)
LEARNERS = [("tpe", None), ("tpe", "latency"), ("nsga2", "latency")]


def study_of(searcher, against=None, **settings):
    return Study(name="s", recipe=BASE, space="simulated", searcher=searcher, against=against, **settings)


def no_keys(member):
    return {}


def finish(trial, top1, latency=1.0):
    metrics = {VAL_TOP1: top1, COST_LATENCY_MS: latency, COST_GMACS: 1.0, "epoch": 24.0}
    return replace(trial, state=TrialState.FINISHED, metrics=metrics)


def additive(seed, space=BLOCKS):
    """A function of a member: each value of each dimension adds a random amount."""
    rng = np.random.default_rng(seed)
    parts = {name: dict(zip(v, rng.normal(size=len(v)), strict=True)) for name, v in space.dimensions.items()}
    return lambda member: sum(parts[name][value] for name, value in member.items())


def all_members(space):
    grid, trials = study_of("grid"), []
    searcher = Searcher(grid, space)
    while trial := searcher.propose(trials):
        trials.append(trial)
    return [trial.member for trial in trials]


# Small spaces -----------------------------------------------------------------------------------------------------


def trials_to_the_best(searcher, seed, noise):
    """Number of trials until the best of 256 members is trained."""
    score = additive(seed)
    best = max(map(score, all_members(BLOCKS)))
    searching, trials = Searcher(study_of(searcher, seed=seed), BLOCKS), []
    rng = np.random.default_rng(seed)
    while not trials or score(trials[-1].member) < best - 1e-9:
        trial = searching.propose(trials)
        trials.append(finish(trial, score(trial.member) + noise * rng.normal()))
    return len(trials)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_tpe_finds_the_best_of_256_members_in_a_third_of_the_trials_that_random_needs(noise):
    """Random needs 128.5 on average. A search that drew at random after 50 known suggestions needed 40 with noise."""
    counts = [trials_to_the_best("tpe", seed, noise) for seed in range(12)]
    assert np.mean(counts) < 35
    assert max(counts) < 80


def parzen(members, index, weights):
    """The Parzen estimator of multivariate TPE over choices, in logarithms: the sum over kernels, one of them flat."""
    kernels = len(members) + 1
    density = np.zeros(len(index))
    for weight, centre in [*zip(weights, members, strict=True), (1.0, None)]:
        product = np.ones(len(index))
        for name, values in BLOCKS.dimensions.items():
            mass = np.full(len(values), 1 / kernels)
            if centre is not None:
                mass[values.index(centre[name])] += 1
            product *= (mass / mass.sum())[[values.index(member[name]) for member in index]]
        density += weight / (sum(weights) + 1) * (product if centre is not None else 1 / 256)
    return np.log(density)


def test_after_its_startup_tpe_proposes_the_best_unseen_member_of_its_model():
    """Against the formulas of the papers, over all unseen members: no proposal is random, up to the last one."""
    score, members, trials = additive(5), all_members(BLOCKS), []
    searcher = Searcher(study_of("tpe", trials=256), BLOCKS)
    while (trial := searcher.propose(trials)) is not None:
        if len(trials) >= TPE_STARTUP_TRIALS and len(trials) % 5 == 0:
            count = min(math.ceil(0.1 * len(trials)), 25)
            ranking = sorted(trials, key=lambda each: -each.metrics[VAL_TOP1])
            good = {each.number for each in ranking[:count]}
            below = [each.member for each in trials if each.number in good]
            above = [each.member for each in trials if each.number not in good]
            old = max(0, len(above) - 25)
            ramp = [*np.linspace(1 / len(above), 1, old), *[1.0] * (len(above) - old)]
            unseen = [member for member in members if member not in [each.member for each in trials]]
            value = parzen(below, unseen, [1.0] * len(below)) - parzen(above, unseen, ramp)
            assert value[unseen.index(trial.member)] > value.max() - 1e-9
        trials.append(finish(trial, score(trial.member)))
    assert len(trials) == 256
    assert searcher.why_none.endswith("it has looked at all 256") and not searcher.found_none


def test_nsga2_proposes_the_unseen_member_that_is_nearest_to_its_child():
    score, members, trials = additive(3), all_members(BLOCKS), []
    searcher = Searcher(study_of("nsga2", "latency", seed=2), BLOCKS)
    replaced = 0
    for _ in range(120):
        trial = searcher.propose(trials)
        child = searcher.sampler.suggest(searcher.tell(trials), trial.suggestion).member
        known = [each.member for each in trials]

        def changes(member, child=child):
            return sum(member[name] != child[name] for name in child)

        assert changes(trial.member) == min(changes(member) for member in members if member not in known)
        replaced += trial.member != child
        trials.append(finish(trial, score(trial.member), latency=len(str(trial.member))))
    assert replaced > 10


def test_a_known_suggestion_of_a_large_space_is_replaced_by_its_best_neighbour():
    """Six dimensions with 6 values have 46,656 members. The next suggestion is made known, and so may neighbours be."""
    space = Space({name: tuple(range(6)) for name in "abcdef"}, no_keys)
    study = study_of("tpe", seed=1)
    trials = []
    for _ in range(15):
        trial = Searcher(study, space).propose(trials)
        trials.append(finish(trial, -sum(trial.member.values())))
    searcher = Searcher(study, space)
    suggestion = searcher.sampler.suggest(searcher.tell(trials), 15)
    known = Trial(15, suggestion.member, suggestion=14, state=TrialState.FAILED)  # the sampler learns nothing from it
    trial = Searcher(study, space).propose([*trials, known])
    different = [name for name in "abcdef" if trial.member[name] != suggestion.member[name]]
    assert trial.suggestion == 15 and len(different) == 1
    near = [suggestion.member | {name: value} for name in "abcdef" for value in range(6)]
    unseen = [member for member in near if member not in [each.member for each in (*trials, known)]]
    scores = suggestion.acquisition({name: np.array([member[name] for member in unseen]) for name in "abcdef"})
    assert scores[unseen.index(trial.member)] == scores.max()


def test_the_private_name_of_optuna_is_where_it_was():
    """If not: give TPE's score of members another way, or known suggestions are replaced by the nearest unseen one."""
    assert callable(getattr(optuna.samplers.TPESampler, ACQUISITION, None)), (
        f"Optuna has moved TPESampler.{ACQUISITION}"
    )
    assert ACQUISITION in vars(samplers.RankingTPESampler)


def test_without_the_private_name_a_search_goes_on_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(samplers.RankingTPESampler, "acquisition", lambda self: None)
    samplers.warn_without_acquisition.cache_clear()
    trials, searcher = [], Searcher(study_of("tpe"), BLOCKS)
    for _ in range(40):
        trials.append(finish(searcher.propose(trials), len(trials)))
    assert len({member_key(trial.member) for trial in trials}) == 40
    assert sum(ACQUISITION in record.message for record in caplog.records) == 1


# Spaces that list their members ---------------------------------------------------------------------------------------

CHOICES = load_space("same_width", BASE)


def listed(count, seed=0):
    """A space of some members of a space of 29 million."""
    rng = np.random.default_rng(seed)
    return replace(CHOICES, keys=no_keys, members=tuple(CHOICES.random(rng) for _ in range(count)))


@pytest.mark.parametrize(
    ("searcher", "against"), [("grid", None), ("random", None), ("tpe", None), ("tpe", "gmacs"), ("nsga2", "gmacs")]
)
def test_only_listed_members_are_proposed_each_once(searcher, against):
    space, trials = listed(30), []
    score = additive(0, space)
    searching = Searcher(study_of(searcher, against, trials=100), space)
    while trial := searching.propose(trials):
        trials.append(finish(trial, score(trial.member)))
        assert searcher == "grid" or Searcher(study_of(searcher, against, trials=100), space).size == 30
    proposed = [trial.member for trial in trials]
    assert sorted(map(member_key, proposed)) == sorted(map(member_key, space.members))
    assert (proposed == list(space.members)) == (searcher == "grid")
    assert searching.why_none.endswith("it has looked at all 30")


def test_random_proposes_listed_members_uniformly():
    space = listed(10)
    firsts = [Searcher(study_of("random", seed=seed), space).propose([]).member for seed in range(300)]
    counts = [firsts.count(member) for member in space.members]
    assert sum(counts) == 300 and stats.chisquare(counts).pvalue > 0.01


def test_learning_searchers_take_the_best_and_the_nearest_listed_member():
    space = listed(60)
    score, trials = additive(1, space), {"tpe": [], "nsga2": []}
    for name, against in (("tpe", None), ("nsga2", "gmacs")):
        searching = Searcher(study_of(name, against, trials=60), space)
        for number in range(40):
            trial = searching.propose(trials[name])
            unseen = [m for m in space.members if m not in [each.member for each in trials[name]]]
            suggestion = searching.sampler.suggest(searching.tell(trials[name]), trial.suggestion)
            if name == "tpe" and number >= TPE_STARTUP_TRIALS:
                scores = suggestion.acquisition(searching.columns(unseen))
                assert scores[unseen.index(trial.member)] == pytest.approx(scores.max())
            elif name == "nsga2":
                changes = [sum(m[key] != suggestion.member[key] for key in m) for m in unseen]
                assert changes[unseen.index(trial.member)] == min(changes)
            trials[name].append(finish(trial, score(trial.member)))
    values = {name: np.mean([score(trial.member) for trial in each[20:]]) for name, each in trials.items()}
    assert values["tpe"] > np.mean([score(member) for member in space.members])


def test_a_study_whose_trial_is_not_listed_any_more_is_refused():
    space = listed(5)
    known = [Trial(0, dict(space.members[1]))]
    check_space(study_of("tpe"), space, known)
    with pytest.raises(StudyError, match="space simulated has changed since trial 0 of s"):
        check_space(study_of("tpe"), replace(space, members=space.members[2:]), known)


# A searcher that lives and one that is made anew ---------------------------------------------------------------------


def events(study, space, seed, count=60, concurrent=4):
    """Trials as a study makes them, concurrent ones too: after each change, yield all of them."""
    rng, searcher, trials = np.random.default_rng(seed), Searcher(study, space), []
    score = additive(seed, space)
    while len(trials) < count:
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        stopped = [trial for trial in trials if trial.state == TrialState.STOPPED]
        if len(running) >= concurrent:
            trial = running[rng.integers(len(running))]
            done = finish(trial, score(trial.member), latency=1 + len(str(trial.member)))
            kind = rng.integers(6)
            if kind == 0:
                done = replace(done, state=TrialState.STOPPED, metrics=done.metrics | {"epoch": 3.0})
            elif kind == 1:
                done = replace(done, state=TrialState.OVER_BUDGET, metrics={COST_LATENCY_MS: 70.0})
            elif kind == 2:
                done = replace(done, state=TrialState.FAILED, metrics={})
            trials[trial.number] = done
        elif stopped and rng.integers(3) == 0:  # it is promoted
            trials[stopped[0].number] = replace(stopped[0], state=TrialState.RUNNING)
        else:
            yield trials, searcher.propose(trials)
            trials.append(searcher.propose(trials))


@pytest.mark.parametrize(("searcher", "against"), LEARNERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_searcher_made_anew_proposes_the_same_at_each_point(searcher, against, seed):
    """Trials run at the same time, end in any order and way, and are promoted."""
    study = study_of(searcher, against, budget_ms=60, seed=seed)
    for trials, proposed in events(study, BLOCKS, seed):
        assert Searcher(study, BLOCKS).propose(trials) == proposed


@pytest.mark.parametrize(("searcher", "against"), [("tpe", None), ("nsga2", "gmacs")])
def test_refused_suggestions_are_recorded_so_that_a_resume_knows_them(searcher, against, tmp_path):
    """Of real models, 1 in 10 is within the budget. The records alone give the same proposals."""
    recipe = BASE.model_copy(update={"train": BASE.train.model_copy(update={"storage": str(tmp_path)})})
    space = load_space("depths", recipe)
    costs = Searcher(study_of("tpe", budget_gmacs=1.0), space)
    budget = float(np.quantile([costs.check(member).costs[COST_GMACS] for member in all_members(space)], 0.1))
    study = Study(name="s", recipe=recipe, space="depths", searcher=searcher, against=against, budget_gmacs=budget)
    living, trials = Searcher(study, space), []
    while (proposed := living.propose(trials)) and len(trials) < 9:
        assert Searcher(study, space).propose(records.read_trials(study.folder)) == proposed
        assert costs.check(proposed.member).costs[COST_GMACS] <= budget
        trial = finish(proposed, sum(proposed.member.values()))
        trials.append(replace(trial, metrics=trial.metrics | costs.check(trial.member).costs))
        records.write_trial(study, trials[-1])
    assert any(trial.rejected for trial in trials)
    for trial in trials:
        assert all(costs.check(each["member"]).costs[COST_GMACS] > budget for each in trial.rejected)


# Budgets ------------------------------------------------------------------------------------------------------------

WIDE = Space({name: tuple(range(8)) for name in "abcde"}, no_keys)  # 32,768 members


def latency_of(member):
    return 1.0 + sum(member.values())


def search_with_budget(searcher, against, count, budget, seed):
    study, trials = study_of(searcher, against, budget_ms=budget, trials=1000, seed=seed), []
    searching = Searcher(study, WIDE)
    while len(trials) < count:
        trial = searching.propose(trials)
        latency = latency_of(trial.member)
        done = finish(trial, trial.member["a"] / 8, latency)
        if latency > budget:
            done = replace(done, state=TrialState.OVER_BUDGET, metrics={COST_LATENCY_MS: latency})
        trials.append(done)
    return [trial.state == TrialState.FINISHED for trial in trials]


@pytest.mark.parametrize(("searcher", "against"), LEARNERS)
def test_samplers_learn_from_members_over_a_budget(searcher, against):
    """1 member in 20 is within the budget: random search and samplers that are told nothing of it find as many."""
    rng = np.random.default_rng(0)
    budget = float(np.quantile(rng.integers(8, size=(20000, 5)).sum(axis=1) + 1.0, 0.05))
    within = [search_with_budget(searcher, against, 80, budget, seed) for seed in range(3)]
    at_random = [search_with_budget("random", None, 80, budget, seed) for seed in range(3)]
    assert np.mean(at_random) < 0.1
    assert np.mean([each[40:] for each in within]) > 0.35


def test_a_search_without_any_member_within_a_measured_budget_ends_and_names_the_nearest():
    study, trials = study_of("tpe", trials=2, budget_ms=0.5), []
    searcher = Searcher(study, WIDE)
    while (trial := searcher.propose(trials)) is not None:
        metrics = {COST_LATENCY_MS: latency_of(trial.member)}
        trials.append(replace(trial, state=TrialState.OVER_BUDGET, metrics=metrics))
        assert len(trials) <= 20
    assert len(trials) == 20 and searcher.found_none
    nearest = min(trials, key=lambda trial: latency_of(trial.member))
    member = "; ".join(f"{name} {value}" for name, value in nearest.member.items())
    cost = latency_of(nearest.member)
    assert f"The nearest is {member}: latency {cost:g} ms is over --budget-ms 0.5" in searcher.why_none
    assert f"--budget-ms {cost:g} or more" in searcher.why_none


def test_a_search_ends_after_many_members_in_a_row_over_the_budget_but_keeps_those_within_it():
    study = study_of("random", trials=30, budget_ms=0.5)
    trials = [finish(Trial(0, dict.fromkeys("abcde", 0), suggestion=0), 0.5)]
    searcher = Searcher(study, WIDE)
    while (trial := searcher.propose(trials)) is not None:
        trials.append(replace(trial, state=TrialState.OVER_BUDGET, metrics={COST_LATENCY_MS: 1.0}))
    assert len(trials) == 31 and not searcher.found_none
    assert "the last 30 that were measured are over the budget" in searcher.why_none
    assert searcher.propose(trials) is None and "the last 30" in searcher.why_none
    running = Trial(31, dict.fromkeys("abcde", 7), suggestion=31)
    assert searcher.propose([*trials, running]) is None
    assert searcher.propose([*trials, finish(running, 0.5)]) is not None


@pytest.mark.parametrize("searcher", ["grid", "random", "tpe"])
def test_the_member_nearest_to_static_budgets_is_named(searcher):
    space = load_space("widths", BASE)
    study = Study(name="s", recipe=BASE, space="widths", searcher=searcher, budget_gmacs=1e-3, budget_params=1e-2)
    searching = Searcher(study, space)
    assert searching.propose([]) is None and searching.found_none
    costs = static_costs(space.recipe(BASE, {"width": 0.5}))
    gmacs, params = (f"{costs[name]:.4g}" for name in (COST_GMACS, COST_PARAMS_M))
    values = f"{gmacs} GMACs are over --budget-gmacs 0.001; {params} M parameters are over --budget-params 0.01"
    assert f"The nearest is width 0.5: {values}. Start" in searching.why_none
    assert "--budget-gmacs " in searching.why_none and " and --budget-params " in searching.why_none
    assert space_size(space) == 6 and "it has looked at all 6" in searching.why_none


@pytest.mark.parametrize("searcher", ["grid", "random", "tpe"])
def test_a_space_whose_members_cannot_be_built_says_why_of_one(searcher):
    space = Space({"block1": ("joint",), "groups": (2, 4)}, lambda member: {"model.windws": member["groups"]})
    searching = Searcher(study_of(searcher), space)
    assert searching.propose([]) is None and searching.found_none
    with pytest.raises(RecipeError) as refused:
        space.recipe(BASE, {"block1": "joint", "groups": 2})
    assert "windws" in str(refused.value)
    groups = r"block joint; groups [24]"
    expected = rf"no member that can be built .* all 2; for example {groups}: {re.escape(str(refused.value))}$"
    assert re.search(expected, searching.why_none)


# Ranges ----------------------------------------------------------------------------------------------------


def test_a_range_and_a_search_that_never_ends_are_possible():
    """A space of ranges has no neighbours; each suggestion is another member."""
    space = Space({"lr": Range(1e-4, 1e-2, log=True), "decay": Range(0, 1)}, no_keys)
    for searcher, against in LEARNERS:
        trials, living = [], Searcher(study_of(searcher, against), space)
        for _ in range(30):
            trials.append(finish(living.propose(trials), -abs(math.log10(len(trials) + 1))))
        assert len({member_key(trial.member) for trial in trials}) == 30


# Earlier studies ----------------------------------------------------------------------------------------------------


def earlier_study(folder, score, count=40, name="earlier", space="block_types", change=dict):
    """A study on disk whose trials are finished."""
    recipe = BASE.model_copy(update={"train": BASE.train.model_copy(update={"storage": str(folder)})})
    study = Study(name=name, recipe=recipe, space=space, searcher="random", seed=99)
    records.write_study(study, "run")
    trials = []
    for _ in range(count):
        trial = Searcher(study, BLOCKS).propose(trials)
        trials.append(finish(trial, score(trial.member)))
        records.write_trial(study, replace(trials[-1], member=change(trial.member)))
    return study


def with_prior(folder, *names, searcher="tpe", against=None, **settings):
    recipe = BASE.model_copy(update={"train": BASE.train.model_copy(update={"storage": str(folder)})})
    settings = {"space": "block_types", "searcher": searcher, "against": against, "prior": names} | settings
    return Study(name="new", recipe=recipe, **settings)


@pytest.mark.parametrize(("searcher", "against"), [("tpe", None), ("tpe", "gmacs"), ("nsga2", "gmacs")])
def test_an_earlier_study_makes_the_first_proposals_good(searcher, against, tmp_path):
    """It knows the truth on another scale: its top-1 differ a tenth as much, and are higher."""
    wins = []
    for seed in range(4):
        score = additive(seed)
        earlier_study(tmp_path / str(seed), lambda member, score=score: 0.8 + score(member) / 10)
        study = with_prior(tmp_path / str(seed), "earlier", searcher=searcher, against=against, seed=seed)
        searching, trials = Searcher(study, BLOCKS, prior.find_priors(study, BLOCKS)), []
        while len(trials) < TPE_STARTUP_TRIALS:
            trial = searching.propose(trials)
            trials.append(finish(trial, score(trial.member)))
        everywhere = [score(member) for member in all_members(BLOCKS)]
        wins += [(score(trial.member) - np.mean(everywhere)) / np.std(everywhere) for trial in trials]
    assert np.mean(wins) > 0.5  # in standard deviations of the space; random members have 0


@pytest.mark.parametrize("against", [None, "gmacs"])
def test_with_an_earlier_study_the_searcher_knows_stopped_trials_from_the_first_on(against, tmp_path):
    """A finished trial is standardised, which takes two of them; of a stopped one no value is compared."""
    earlier_study(tmp_path, additive(1))
    study = with_prior(tmp_path, "earlier", against=against)
    searcher = Searcher(study, BLOCKS, prior.find_priors(study, BLOCKS))
    (first, second), epoch = [searcher.propose([]) for _ in range(2)], {"epoch": 1.0, "cost/gmacs": 1.0}
    stopped = replace(first, state=TrialState.STOPPED, metrics={"val/top1": 0.3, **epoch})
    assert len(searcher.tell([stopped])) == len(searcher.tell([])) + 1
    assert len(searcher.tell([stopped, replace(finish(second, 0.4), number=1)])) == len(searcher.tell([])) + 1


def test_what_an_earlier_study_knows_is_stored_with_the_new_one(tmp_path):
    """The proposals from the stored copy are the same, also once the study has trials of its own."""
    score = additive(1)
    earlier_study(tmp_path, score)
    study = with_prior(tmp_path, "earlier", str(tmp_path / "earlier"))
    found = prior.find_priors(study, BLOCKS)
    assert [(each.name, len(each.trials)) for each in found] == [("earlier", 40), (str(tmp_path / "earlier"), 40)]
    prior.write_priors(study, found)
    shutil.rmtree(tmp_path / "earlier")
    living, trials = Searcher(study, BLOCKS, found), []
    for _ in range(12):
        trial = living.propose(trials)
        assert Searcher(study, BLOCKS, prior.read_priors(study)).propose(trials) == trial
        trials.append(finish(trial, score(trial.member)))
    (tmp_path / "new" / "prior.json").unlink()
    with pytest.raises(StudyError, match=r"prior\.json; restore it, or start a new study"):
        prior.read_priors(study)
    assert prior.read_priors(with_prior(tmp_path)) == []


def test_an_earlier_study_of_another_task_is_refused(tmp_path):
    """A study of detection learns from one of detection, by its mAP."""
    study = earlier_study(tmp_path, additive(1), count=9)
    new = with_prior(tmp_path, "earlier")
    (known,) = prior.find_priors(new, BLOCKS)
    detection = load_recipe("demo", [f"train.storage={tmp_path}", *DETECTION])
    earlier, later = (each.model_copy(update={"recipe": detection}) for each in (study, new))
    records.write_study(earlier, "run")
    for each in of_task(known.trials, "detection"):
        records.write_trial(earlier, each)
    with pytest.raises(
        StudyError, match=r"earlier is a study of detection and this one of recognition: its mAP cannot"
    ):
        prior.find_priors(new, BLOCKS)
    (found,) = prior.find_priors(later, BLOCKS)
    assert [trial.value for trial in found.trials] == [trial.metrics[VAL_TOP1] for trial in known.trials]
    told = [Searcher(s, BLOCKS, [p]).prior["earlier"] for s, p in ((new, known), (later, found))]
    assert [t.values for t in told[0]] == [t.values for t in told[1]] and len(told[0]) == 9


def log_of_the_start(study, space, priors, caplog):
    caplog.clear()
    with caplog.at_level("INFO"):
        controller.StudyController(study, space, [], MagicMock(run_id="run"), 2, priors).log_start()
    return [(record.levelname, record.message) for record in caplog.records]


def test_a_study_logs_what_it_learns_from_each_earlier_study(tmp_path, caplog):
    """One member of the second one cannot be built with the new recipe."""
    for name, count in (("one", 3), ("two", 5)):
        earlier_study(tmp_path, additive(0), count=count, name=name)
    study = with_prior(tmp_path, "one", "two")
    priors = prior.find_priors(study, BLOCKS)
    bad = priors[1].trials[0].member
    keys = BLOCKS.keys
    refusing = Space(BLOCKS.dimensions, lambda member: {"model.windws": 1} if member == bad else keys(member))
    priors[0].trials[:] = [trial for trial in priors[0].trials if trial.member != bad]
    one = len(priors[0].trials)
    lines = log_of_the_start(study, refusing, priors, caplog)
    assert ("INFO", f"--prior one: the searcher learns from {one} of {one} fully trained trials") in lines
    assert ("INFO", "--prior two: the searcher learns from 4 of 5 fully trained trials") in lines
    lines = log_of_the_start(with_prior(tmp_path, "one", searcher="random"), BLOCKS, priors[:1], caplog)
    assert ("WARNING", "--prior one is not used: searcher random does not learn from trials") in lines
    assert not any("--prior" in text for _, text in log_of_the_start(with_prior(tmp_path), BLOCKS, [], caplog))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"block3": "mlp"}, "trial 0 has block3 mlp, which is none of parallel, cascade_ts, cascade_st"),
        (lambda m: {"block1": "joint"}, "trial 0 has no dimension block2"),
        (lambda m: m | {"width": 2}, "trial 0 has a dimension width more"),
    ],
)
def test_an_earlier_study_of_another_space_is_refused(change, message, tmp_path):
    earlier_study(tmp_path, additive(0), count=2, change=change)
    with pytest.raises(StudyError, match=f"--prior earlier searched another space than block_types: {message}"):
        prior.find_priors(with_prior(tmp_path, "earlier"), BLOCKS)


def test_an_earlier_study_without_trained_trials_is_refused(tmp_path):
    earlier_study(tmp_path, additive(0), count=0)
    with pytest.raises(StudyError, match="it has no fully trained trial"):
        prior.find_priors(with_prior(tmp_path, "earlier"), BLOCKS)


def test_an_earlier_study_is_found_in_mlflow_alone(tmp_path):
    """The study's folder is gone; its runs, their params and artifacts are in the store of the recipe."""
    study = earlier_study(tmp_path, additive(0), count=3)
    trials = records.read_trials(study.folder)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.create_experiment("posmlp", (tmp_path / "artifacts").as_uri())
    parent = client.create_run(experiment, tags={"study": "earlier"}).info.run_id
    client.log_text(parent, study.model_dump_json(), "study.json")
    for trial in trials:
        tags = {"study": "earlier", "trial": str(trial.number), "trial.state": "finished", "mlflow.parentRunId": parent}
        run = client.create_run(experiment, tags=tags).info.run_id
        client.log_batch(
            run,
            metrics=[Metric(name, value, 0, 0) for name, value in trial.metrics.items()],
            params=[Param(f"search.{name}", str(value)) for name, value in trial.member.items()],
        )
        recipe = study.trial_recipe(BLOCKS, trial.member, trial.number, 0)
        client.log_text(run, yaml.safe_dump(recipe.model_dump(mode="json")), "config.yaml")
    shutil.rmtree(tmp_path / "earlier")
    (found,) = prior.find_priors(with_prior(tmp_path, "earlier"), BLOCKS)
    assert [(trial.member, trial.metrics) for trial in found.trials] == [(t.member, t.metrics) for t in trials]
    with pytest.raises(StudyError, match=r"--prior other: neither other nor .* has no study 'other'; known: earlier"):
        prior.find_priors(with_prior(tmp_path, "other"), BLOCKS)


def test_values_that_mlflow_has_as_text_are_those_of_the_space():
    space = Space({"a": ("1", "x"), "b": (0.5, 1), "lr": Range(0.1, 1.0)}, no_keys)
    member = prior.to_member(Trial(3, {"a": 1, "b": 1, "lr": 0.25}), "p", "s", space)
    assert member == {"a": "1", "b": 1, "lr": 0.25} and isinstance(member["a"], str)
    with pytest.raises(StudyError, match=r"trial 3 has lr 2, which is none of 0\.1 to 1\.0"):
        prior.to_member(Trial(3, {"a": 1, "b": 1, "lr": 2}), "p", "s", space)


# Hours, and the end of a search -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("repeats", "search_s"), [(0, 7200), (2, 4800)])
def test_no_trial_starts_after_the_hours(repeats, search_s, tmp_path, monkeypatch, caplog):
    """With repeats, the search has two thirds. A trial that ran before a resume continues all the same."""
    now = [1000.0]
    monkeypatch.setattr(controller.time, "monotonic", lambda: now[0])
    study = with_prior(tmp_path, hours=2, repeats=repeats, trials=50)
    running = Searcher(study, BLOCKS).propose([])
    search = controller.StudyController(study, BLOCKS, [running], MagicMock(run_id="run"), 2)
    now[0] += search_s - 1
    assert search.next_trial().number == 0 and search.next_trial().number == 1
    now[0] += 1
    with caplog.at_level("INFO"):
        assert search.next_trial() is None and not search.may_have_more()
    texts = [record.message for record in caplog.records if "2 hours are over: no more trials start" in record.message]
    assert len(texts) == 1
    search.pending = [running]
    assert search.next_trial().number == 0
    assert search.next_trial() is None
    search.searching = False
    assert search.time_is_up() == (repeats == 0)
    now[0] = 1000.0 + 7200
    assert search.time_is_up() and search.next_trial() is None


@pytest.mark.parametrize("hours", ["0", "-1", "x"])
def test_hours_that_are_no_positive_number_are_refused(hours, capsys):
    with pytest.raises(SystemExit):
        main(["tune", "demo", "--space", "widths", "--hours", hours])
    assert "argument --hours" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_study_says_why_its_search_ended_early(tmp_path, caplog):
    search = controller.StudyController(with_prior(tmp_path, trials=300), BLOCKS, [], MagicMock(run_id="run"), 2)
    trials = [finish(Trial(n, member, suggestion=n), 0.5) for n, member in enumerate(all_members(BLOCKS))]
    search.trials = {trial.number: trial for trial in trials}
    assert search.next_trial() is None
    search.check_search()
    assert "no further member of space block_types to train: it has looked at all 256" in caplog.text
    costly = {COST_LATENCY_MS: 3.0}
    search.trials = {t.number: replace(t, state=TrialState.OVER_BUDGET, metrics=costly) for t in trials}
    search.searcher = Searcher(with_prior(tmp_path, trials=300, budget_ms=2), BLOCKS)
    assert search.next_trial() is None
    with pytest.raises(StudyError, match=r"The nearest is .*: latency 3 ms is over --budget-ms 2\..*-ms 3 or more"):
        search.check_search()
