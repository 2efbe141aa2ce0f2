"""Fresh seeds after a search: what the controller hands out while repeats run, and after a kill. Nothing trains."""

from unittest.mock import MagicMock

import pytest
from ray.tune.search import Searcher

from pipelines.studies import pareto
from pipelines.studies.study import Study, TrialState, read_trials, study_space
from pipelines.tuning.controller import StudyController
from pipelines.tuning.ray_tune import SearcherAdapter
from pipelines.tuning.trial import TrialEvent
from posmlp.config import load_recipe
from tests.helpers.log_lines import log_lines
from tests.helpers.tasks import OVERRIDES, TASKS

VALUES = {0: 0.8, 1: 0.78, 2: 0.4}  # of the first seeds; trial 1 is cheaper
FRESH = {0: [0.60, 0.62, 0.61], 1: [0.7, 0.6, 0.65], 2: [0.4, 0.4, 0.4]}
GMACS = {0: 2.0, 1: 1.0, 2: 3.0}


def controller_of(folder, repeats, trials=(), task="recognition"):
    recipe = load_recipe("demo", [f"train.storage={folder}", "train.epochs=1", *OVERRIDES[task]])
    settings = {"space": "block_types", "searcher": "random", "trials": 3, "against": "gmacs", "repeats": repeats}
    study = Study(name="look", recipe=recipe, **settings)
    controller = StudyController(study, study_space(study), trials, MagicMock(run_id="run"), concurrent=2)
    controller.results = MagicMock()
    return controller


def finish(controller, number):
    """The end of a trial, with the value of its member and seed."""
    trial = controller.trials[number]
    first = number if trial.repeat_of is None else trial.repeat_of
    value = VALUES[first] if trial.repeat_of is None else FRESH[first][trial.seed - 1]
    key = {"recognition": "val/top1", "detection": "val/map"}[controller.study.recipe.task]
    metrics = {"epoch": 1.0, key: value, "cost/gmacs": GMACS[first], "cost/latency_ms": 5.0, "cost/params_m": 1.0}
    controller.record_result(number, TrialEvent(TrialState.FINISHED, metrics))


@pytest.fixture(params=TASKS)
def searched(tmp_path, request):
    """A controller whose search is over, with at most two fresh seeds for each member."""
    controller = controller_of(tmp_path, 2, task=request.param)
    for _ in range(3):
        finish(controller, controller.next_trial().number)
    assert controller.next_trial() is None
    controller.start_repeats()
    return controller


def test_repeats_start_when_results_ask_for_them(searched):
    adapter = SearcherAdapter(searched)
    with log_lines() as lines:
        assert adapter.suggest("a") and adapter.suggest("b")
    assert [(t.repeat_of, t.seed) for t in searched.in_order()[3:]] == [(0, 1), (1, 1)]
    assert any("trial 3 (trial 0: on the front of the first seeds; seed 1): " in line for line in lines)
    assert adapter.suggest("c") is None and searched.may_have_more()  # later: a running seed may open a place
    finish(searched, 3)
    finish(searched, 4)
    assert adapter.suggest("c")
    chosen = searched.trials[5]
    assert (chosen.repeat_of, chosen.seed) == (1, 2)  # trial 1 is the front of the fresh seeds, and has one of them
    finish(searched, 5)
    while (given := adapter.suggest("more")) != Searcher.FINISHED:
        assert given is not None
        finish(searched, max(searched.trials))
    assert [t.number for t in pareto.pareto_front(searched.in_order(), "gmacs")] == [1]


def test_a_killed_study_resumes_its_repeats(searched, tmp_path):
    for _ in range(2):
        searched.next_trial()
    finish(searched, 3)
    again = controller_of(tmp_path, 2, read_trials(searched.study.folder), searched.study.recipe.task)
    assert again.next_trial().number == 4  # the one that was running
    finish(again, 4)
    assert again.next_trial() is None  # the search is over
    again.start_repeats()
    resumed = again.next_trial()
    finish(searched, 4)
    expected = searched.next_trial()
    assert (resumed.repeat_of, resumed.seed) == (expected.repeat_of, expected.seed)


def test_without_repeats_nothing_follows_the_search(tmp_path):
    controller = controller_of(tmp_path, 0)
    for _ in range(3):
        finish(controller, controller.next_trial().number)
    controller.start_repeats()
    assert controller.next_trial() is None and not controller.may_have_more()


def test_repeats_may_be_none_and_not_negative(tmp_path):
    assert controller_of(tmp_path, 0).study.repeats == 0
    with pytest.raises(ValueError, match="repeats"):
        controller_of(tmp_path, -1)
