"""Early stopping in a study: what the controller hands out, records and rebuilds. Ray and the training are made up."""

import random
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from pipelines.runs import checkpoints
from pipelines.runs.checkpoints import CheckpointInfo
from pipelines.studies.study import Study, Trial, TrialState, read_trials, study_space, trial_folder, write_trial
from pipelines.tuning.controller import StudyController, successive_halving
from pipelines.tuning.ray_tune import SearcherAdapter, StudyScheduler
from pipelines.tuning.samplers import objectives, tell_trial
from pipelines.tuning.trial import TrialEvent
from posmlp.config import load_recipe
from tests.helpers.tasks import OVERRIDES, TASKS

CONTINUE, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP


def study_in(folder, epochs=9, task="recognition", **settings):
    own = [f"train.epochs={epochs}", f"train.storage={folder}", "optim.warmup_epochs=0.5"]
    recipe = load_recipe("demo", [*own, *OVERRIDES[task]])
    settings = {"space": "block_types", "searcher": "random", "asha": True, "trials": 6} | settings
    return Study(name="look", recipe=recipe, **settings)


@pytest.mark.parametrize(
    ("epochs", "every", "warmup", "stops"),
    [
        (1, 1, 0, ""),
        (2, 1, 0, "epoch 1"),
        (9, 1, 0, "epoch 1 and epoch 3"),
        (9, 1, 1, "epoch 3"),
        (9, 1, 3.5, ""),
        (9, 2, 0, "epoch 2 and epoch 4"),
        (9, 2, 2, "epoch 4"),
        (9, 5, 0, ""),
    ],
)
def test_a_study_says_after_which_validated_epochs_it_may_stop_a_trial(epochs, every, warmup, stops, tmp_path, caplog):
    """These are the epochs whose results the rungs take."""
    study = study_in(tmp_path, epochs)
    own = [f"train.epochs={epochs}", f"eval.every={every}", f"optim.warmup_epochs={warmup}"]
    recipe = load_recipe("demo", [f"train.storage={tmp_path}", *own])
    search = Search(study.model_copy(update={"recipe": recipe}))
    with caplog.at_level("INFO"):
        search.controller.log_start()
    warning = (
        f"no trial is stopped early: of {epochs} epochs none in the first half is validated after the warm-up "
        f"(eval.every={every}, optim.warmup_epochs={warmup:g})"
    )
    assert (warning in caplog.text) == (not stops and epochs > 1)
    assert (f"trials may be stopped after {stops}; --no-asha trains all" in caplog.text) == bool(stops)
    halving = search.controller.halving
    taken = [f"epoch {epoch}" for epoch in range(every, epochs, every) if halving.add(0, epoch, [0.5])]
    assert " and ".join(taken) == stops


@pytest.mark.parametrize(
    ("searcher", "against", "early"),
    [
        *[(searcher, "gmacs", True) for searcher in ("random", "tpe", "nsga2", None)],
        *[(searcher, None, False) for searcher in ("random", "tpe", None)],
        ("grid", "latency", False),
    ],
)
def test_searches_of_a_front_stop_trials_early_by_default_and_a_grid_does_not(searcher, against, early):
    """Without a cost to compare, cheap members would be stopped, and the front of all costs would lack them."""
    settings = {"name": "look", "recipe": load_recipe("demo"), "space": "block_types", "against": against}
    settings |= {"searcher": searcher} if searcher else {}
    assert Study(**settings).asha == early
    assert not Study(**settings, asha=False).asha and Study(**settings, asha=True).asha


@pytest.mark.parametrize("repeat_of", [None, 0])
def test_a_trials_costs_are_measured_once_and_its_repeats_have_no_budget(repeat_of, tmp_path):
    controller = Search(study_in(tmp_path, budget_ms=10.0)).controller
    costs = {"cost/latency_ms": 9.0, "cost/gmacs": 1.0}
    trial = replace(controller.next_trial(), metrics=costs | {"val/top1": 0.5}, repeat_of=repeat_of)
    job = controller.trial_job(trial)
    assert job.costs == costs
    assert job.budgets == ({"cost/latency_ms": 10.0} if repeat_of is None else {})
    assert type(job).from_json(job.to_json()) == job


class Search:
    """A study as Ray Tune runs it, without Ray: each trial's epochs come from the test.

    Attributes:
        running: Tune's trial id of each running trial, by number.
    """

    def __init__(self, study, trials=()):
        self.study, self.running = study, {}
        self.controller = StudyController(study, study_space(study), trials, MagicMock(run_id="run"), concurrent=3)
        self.controller.results = MagicMock()
        self.adapter = SearcherAdapter(self.controller)
        self.scheduler = StudyScheduler(self.controller, self.adapter.numbers)

    def start(self):
        """Ask for a trial; returns its number, None (ask again later) or ``Searcher.FINISHED``."""
        name = f"tune-{len(self.adapter.numbers)}"
        given = self.adapter.suggest(name)
        if given in (None, Searcher.FINISHED):
            return given
        number = self.adapter.numbers[name]
        self.running[number] = name
        return number

    def send(self, number, epoch, value, gmacs=1.0, keep=True):
        """The end of a trial's epoch; returns the decision. The trial leaves a checkpoint unless ``keep`` is false."""
        key = {"recognition": "val/top1", "detection": "val/map"}[self.study.recipe.task]
        metrics = {"epoch": float(epoch), key: value, "cost/gmacs": gmacs, "cost/latency_ms": 5.0}
        last = epoch == self.study.recipe.train.epochs
        event = TrialEvent(TrialState.FINISHED if last else TrialState.RUNNING, metrics)
        result, name = {"event": event.to_json(), "epoch": epoch}, self.running[number]
        tune_trial = SimpleNamespace(trial_id=name)
        decision = STOP if last else self.scheduler.on_trial_result(None, tune_trial, result)
        if decision == CONTINUE:
            self.adapter.on_trial_result(name, result)
            return decision
        if keep:
            save_checkpoint(self.study, number, epoch)
        self.scheduler.on_trial_complete(None, tune_trial, result)
        self.adapter.on_trial_complete(name, result)
        del self.running[number]
        return decision


def save_checkpoint(study, number, epoch):
    info = CheckpointInfo(step=epoch, epoch=epoch, metrics={}, classes=["a"], config={})
    checkpoints.save(trial_folder(study, number), info, {"x": torch.zeros(1)}, {})


def stop_second(folder, keep=True, **settings):
    """A search with three trials at the first rung: 0 is better than 1, which is stopped, and 2 has not reached it."""
    search = Search(study_in(folder, **settings))
    assert [search.start() for _ in range(3)] == [0, 1, 2]
    assert search.send(0, 1, 0.9) == CONTINUE
    assert search.send(1, 1, 0.5, keep=keep) == STOP
    return search


# --- rungs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "decided"), [(10, [1, 3]), (60, [7, 20]), (1, [])])
def test_trials_are_stopped_at_a_ninth_and_a_third_and_never_near_their_end(tmp_path, epochs, decided):
    """One trial is the best at each epoch, and another one the worst."""
    stops = []
    for worst_from in range(1, epochs, max(1, epochs // 10)):  # from this epoch on, the second trial is worse
        search = Search(study_in(tmp_path / str(worst_from), epochs=epochs))
        search.start(), search.start()
        for epoch in range(1, epochs):
            search.send(0, epoch, 0.5)
            if search.send(1, epoch, 0.4 if epoch >= worst_from else 0.5) == STOP:
                stops.append(epoch)
                break
    assert sorted(set(stops)) == decided


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("against", [None, "gmacs"])
def test_with_a_cost_only_what_is_dominated_is_stopped(tmp_path, against, task):
    search = Search(study_in(tmp_path, against=against, task=task))
    for number, (value, gmacs, dominated) in enumerate([(0.5, 2.0, False), (0.4, 1.0, False), (0.3, 1.5, True)]):
        assert search.start() == number
        expected = STOP if dominated or (against is None and number) else CONTINUE
        assert search.send(number, 1, value, gmacs) == expected


def test_repeats_are_not_stopped_and_are_no_members_of_a_rung(tmp_path):
    study = study_in(tmp_path)
    member = {f"block{stage}": "joint" for stage in (1, 2, 3, 4)}
    first = Trial(0, member, state=TrialState.FINISHED, curve={1: 0.9}, metrics={"val/top1": 0.9})
    repeat = Trial(1, member, seed=1, repeat_of=0, curve={1: 0.1}, metrics={"val/top1": 0.1})
    search = Search(study, [first, repeat])
    assert [*search.controller.halving.rungs[1]] == [0]
    assert search.start() == 1
    assert search.send(1, 1, 0.1) == search.send(1, 3, 0.1) == CONTINUE
    assert [*search.controller.halving.rungs[1]] == [0]


# --- records -----------------------------------------------------------------------------------------------------


def test_a_record_is_written_at_each_rung_and_survives_as_json(tmp_path):
    search = Search(study_in(tmp_path, epochs=20))  # rungs after epochs 2 and 7
    search.start()
    for epoch in range(1, 20):
        search.send(0, epoch, epoch / 100)
        (trial,) = read_trials(search.study.folder)
        reached = 0 if epoch < 2 else 2 if epoch < 7 else 7
        assert trial.curve == {e: e / 100 for e in range(1, reached + 1)}
        assert trial.state == TrialState.RUNNING
    search.send(0, 20, 0.2)
    (trial,) = read_trials(search.study.folder)
    assert trial.curve == {e: e / 100 for e in range(1, 21)}
    assert trial == search.controller.trials[0]


def test_a_record_without_a_curve_is_as_it_was(tmp_path):
    study = study_in(tmp_path)
    write_trial(study, Trial(0, {"block1": "joint"}))
    (trial,) = read_trials(study.folder)
    assert trial.curve == {} and "curve" not in trial.to_record()


def test_a_trial_that_fails_keeps_what_it_has_reached(tmp_path):
    """It was compared with others, so it stays a member of the rung."""
    search = stop_second(tmp_path)
    search.controller.record_result(0, TrialEvent(TrialState.FAILED, reason="lost"))
    again = Search(search.study, read_trials(search.study.folder))
    assert {n: v.tolist() for n, v in again.controller.halving.rungs[1].items()} == {0: [0.9], 1: [0.5]}


def play(folder, seed, kills):
    """Run a search to its end, with a made-up learning curve for each trial.

    Args:
        kills: share of the steps at which the driver is killed: all but the records and the checkpoints is lost.

    Returns:
        Each epoch with its decision, each start, and the trials in the end.
    """
    chance, killer = random.Random(seed), random.Random(seed)
    study = study_in(folder, epochs=chance.choice([4, 9, 12]), trials=12, against=chance.choice([None, "gmacs"]))
    values = random.Random(seed)
    gmacs = [values.randint(1, 4) / 4 for _ in range(12)]
    curves = [[values.randint(0, 6) / 8 for _ in range(12)] for _ in range(12)]
    search, done, log = Search(study), dict.fromkeys(range(12), 0), []
    while True:
        while len(search.running) < 3 and (number := search.start()) not in (None, Searcher.FINISHED):
            log.append(("start", number))
            for epoch in range(1, done[number] + 1):  # a promoted trial sends its earlier epochs again
                assert search.send(number, epoch, 0.0, 9.0) == CONTINUE
        if not search.running:
            return log, search.controller.in_order()
        number = chance.choice(sorted(search.running))
        done[number] += 1
        decision = search.send(number, done[number], curves[number][done[number] - 1], gmacs[number])
        log.append((number, done[number], decision))
        if killer.random() < kills:
            before = set(search.running)
            search = Search(study, read_trials(study.folder))
            assert {search.start() for _ in before} == before
            for resumed in before:
                for epoch in range(1, done[resumed] + 1):
                    assert search.send(resumed, epoch, curves[resumed][epoch - 1], gmacs[resumed]) == CONTINUE


@pytest.mark.parametrize("seed", range(8))
def test_a_search_that_is_killed_and_resumed_decides_as_one_that_is_not(tmp_path, seed):
    log, trials = play(tmp_path / "whole", seed, kills=0)
    killed_log, killed_trials = play(tmp_path / "killed", seed, kills=0.3)
    assert killed_log == log
    assert [(t.state, t.reason, t.curve) for t in killed_trials] == [(t.state, t.reason, t.curve) for t in trials]
    assert TrialState.STOPPED in {trial.state for trial in trials}


def test_such_searches_promote(tmp_path):
    """So that the test above sees promotions too."""
    starts = [entry[1] for seed in range(8) for entry in play(tmp_path / str(seed), seed, 0)[0] if entry[0] == "start"]
    assert len(starts) > 8 * 12


# --- promotion ---------------------------------------------------------------------------------------------------


def test_a_stopped_trial_is_promoted_before_a_new_member_starts(tmp_path):
    search = stop_second(tmp_path)
    assert search.start() == 3
    for number, top1 in [(2, 0.4), (3, 0.3)]:
        assert search.send(number, 1, top1) == STOP
    for number in (4, 5):
        assert search.start() == number
        assert search.send(number, 1, 0.1) == STOP
    assert search.start() == 1  # the better two of six continue
    trial = search.controller.trials[1]
    assert (trial.state, trial.reason) == (TrialState.RUNNING, "")
    assert read_trials(search.study.folder)[1] == trial
    assert search.send(1, 1, 0.5) == CONTINUE  # its earlier epoch again
    assert search.send(1, 2, 0.6) == CONTINUE
    assert len(search.controller.halving.rungs[1]) == 6
    assert search.start() is None  # 0 and 1 are not yet at the second rung
    assert search.send(1, 3, 0.6) == search.send(0, 3, 0.7) == CONTINUE
    assert search.start() == Searcher.FINISHED


def promotable(folder, **settings):
    """A search that can promote trial 1: six trials have reached the first rung."""
    search = stop_second(folder, **settings)
    search.send(2, 1, 0.4)
    for number in (3, 4, 5):
        assert search.controller.next_trial().number == number
        search.running[number] = f"late-{number}"
        search.adapter.numbers[f"late-{number}"] = number
        search.send(number, 1, 0.1)
    return search


def test_a_trial_without_a_checkpoint_is_not_promoted(tmp_path):
    search = promotable(tmp_path, keep=False)
    assert search.controller.halving.promotable([1]) == [1]
    assert search.start() is None
    search.send(0, 3, 0.9)
    assert search.start() == Searcher.FINISHED
    assert search.controller.trials[1].state == TrialState.STOPPED


def test_a_trial_is_not_promoted_while_its_run_still_saves_its_state(tmp_path):
    """Two processes would write to the same run."""
    search = promotable(tmp_path)
    search.controller.saving.add(1)
    search.send(0, 3, 0.9)
    assert search.start() is None
    search.controller.saving.clear()
    assert search.start() == 1


def test_a_resumed_study_promotes_what_more_trials_let_pass(tmp_path):
    search = stop_second(tmp_path, trials=3)
    assert search.send(2, 1, 0.4) == STOP
    search.send(0, 9, 0.9)
    assert search.start() == Searcher.FINISHED
    more = search.study.model_copy(update={"trials": 6})
    again = Search(more, read_trials(search.study.folder))
    for number in (3, 4, 5):
        assert again.start() == number
        assert again.send(number, 1, 0.1) == STOP
    assert again.start() == 1
    assert again.controller.trials[1].curve == {1: 0.5}


def test_a_study_that_resumes_without_early_stopping_trains_all_trials_to_the_end(tmp_path):
    search = stop_second(tmp_path, trials=3)
    assert search.send(2, 1, 0.4) == STOP
    search.send(0, 9, 0.9)
    assert search.start() == Searcher.FINISHED
    again = Search(search.study.model_copy(update={"asha": False}), read_trials(search.study.folder))
    for number in (1, 2):
        assert again.start() == number
        again.send(number, 9, 0.8)
    assert again.start() == Searcher.FINISHED
    assert [trial.state for trial in again.controller.in_order()] == [TrialState.FINISHED] * 3


def test_trials_with_epochs_of_their_own_are_not_compared_at_the_rungs(tmp_path):
    """Their learning rates fall at another time; one with more epochs than the recipe would not get them."""
    path = tmp_path / "epochs.py"
    path.write_text(
        "from tune_spaces import Space\n\n\ndef space(base):\n"
        "    return Space({'epochs': (9, 12)}, lambda member: {'train.epochs': member['epochs']})\n"
    )
    search = Search(study_in(tmp_path, space=str(path), searcher="grid", trials=2))
    assert search.start() == 0 and search.start() == 1
    assert search.send(0, 1, 0.5) == CONTINUE and search.send(1, 1, 0.1) == CONTINUE
    assert [search.controller.halving.rung_of(number) for number in (0, 1)] == [1, None]
    assert search.send(1, 10, 0.2) == CONTINUE  # beyond the epochs of the others
    again = Search(search.study, read_trials(search.study.folder))
    assert [again.controller.halving.rung_of(number) for number in (0, 1)] == [1, None]


def test_latencies_that_are_measured_after_the_search_do_not_change_what_it_compares(tmp_path):
    """They are of fully trained trials alone, and here of another order; then more trials follow."""
    study = study_in(tmp_path, against="latency", budget_ms=8)
    tops = {0: (0.4, 0.5), 1: (0.3, 0.6), 2: (0.2, 0.7)}
    for number, (early, late) in tops.items():
        metrics = {"epoch": 9.0, "val/top1": late, "cost/gmacs": 1.0, "cost/latency_ms": 5.0 - number}
        curve = {1: early, 3: early, 9: late}
        member = {f"block{stage}": "joint" for stage in (1, 2, 3, 4)}
        trial = Trial(number, member, state=TrialState.FINISHED, metrics=metrics, curve=curve)
        write_trial(study, trial)
    before = read_trials(study.folder)
    controller = Search(study, before).controller
    for trial in before:
        controller.record_latency(trial, 10.0 + trial.number)
    for trial in controller.in_order():  # as after a resume with more trials
        controller.record_latency(trial, 20.0 + trial.number)
    after = read_trials(study.folder)
    assert [trial.metrics["cost/latency_ms"] for trial in after] == [20.0, 21.0, 22.0]
    halving, resumed = (successive_halving(study, trials) for trials in (before, after))
    assert halving.continuing == resumed.continuing == {1: [0, 2, 1], 3: [0, 2, 1]}
    for one, other in zip(before, after, strict=True):
        assert objectives(study, one) == objectives(study, other) == [tops[one.number][1], 5.0 - one.number]
        told = [tell_trial(study, replace(each, member={}), {}, [0.5, 1.0]).constraints for each in (one, other)]
        assert told[0] == told[1] and told[0]["cost/latency_ms"] < 0


def test_no_trial_is_promoted_once_the_search_is_over_or_stops(tmp_path):
    search = promotable(tmp_path)
    assert search.controller.may_have_more()
    search.controller.searching = False
    running = [search.controller.trials[0]]
    assert search.controller.peek_trial() is None and not search.controller.may_promote(running)
    search.controller.searching = True
    search.controller.stopping.set()
    assert search.controller.next_trial() is None and not search.controller.may_have_more()


def test_mlflow_shows_a_promoted_trial_as_running(tmp_path):
    search = promotable(tmp_path)
    stopped = search.controller.trials[1]
    search.controller.trials[1] = Trial(**vars(stopped) | {"mlflow_run_id": "run1"})
    search.start()
    search.controller.tracker.log_tags.assert_called_with({"trial.state": "running", "trial.reason": ""}, "run1")


def test_a_study_without_early_stopping_trains_every_trial_to_its_end(tmp_path):
    study = study_in(tmp_path, asha=False)
    controller = StudyController(study, study_space(study), [], MagicMock(run_id="run"), concurrent=1)
    assert controller.halving is None
    assert controller.next_trial().number == 0
    controller.record_epoch(0, {"epoch": 1.0, "val/top1": 0.1})
    assert not controller.may_have_more()
    assert [trial.curve for trial in read_trials(study.folder)] == [{}]
