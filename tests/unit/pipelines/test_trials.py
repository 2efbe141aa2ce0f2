"""What a trial of a study reports of its run; Ray and the training itself are made up."""

from unittest.mock import MagicMock

import pytest

from pipelines.studies.study import TrialState
from pipelines.training.train import RunResult
from pipelines.tuning import trial
from pipelines.tuning.trial import TrialEvent, TrialJob, TrialRun
from tests.helpers.small_runs import recipe_for


@pytest.mark.parametrize("ended_early", ["", "val/top1 is not better than 0.5 of epoch 1 for 1 epochs"])
def test_a_trial_that_ends_early_is_finished_and_says_why(motion_set, tmp_path, monkeypatch, ended_early):
    """ASHA sees each epoch once before the end, and the end itself as done."""
    config = recipe_for(tmp_path, motion_set, "train.epochs=3")
    epochs = [{"epoch": float(n), "val/top1": 0.5} for n in range(1, 3 if ended_early else 4)]

    def train(config, trial):
        for metrics in epochs:
            trial.on_epoch(metrics)
        return RunResult("small", "runs/small", "id", epochs[-1], ended_early=ended_early)

    monkeypatch.setattr(trial, "start_ray", lambda: None)
    monkeypatch.setattr(trial, "on_training_worker", MagicMock())
    monkeypatch.setattr(trial, "ray", MagicMock(get=lambda reference: {"cost/gmacs": 1.0}))
    monkeypatch.setattr(trial, "train", train)
    run = TrialRun.__new__(TrialRun)
    run.here, run.sharing = False, 1
    run.events, run.ending = trial.queue.Queue(), trial.threading.Event()
    run.run_job(TrialJob(config, {}, {}, {}).to_json())
    sent = [run.events.get_nowait() for _ in range(run.events.qsize())]
    assert [(each["epoch"], each["done"]) for each in sent] == [(1, False), (2, False), (len(epochs), True)]
    event = TrialEvent.from_json(sent[-1]["event"])
    assert (event.state, event.reason) == (TrialState.FINISHED, ended_early)
    assert event.metrics == {"cost/gmacs": 1.0, **epochs[-1]}
