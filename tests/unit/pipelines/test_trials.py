"""What a trial of a study reports of its run; Ray and the training itself are made up."""

import pickle
import signal
from unittest.mock import MagicMock

import pytest
import torch
from ray.exceptions import RayActorError, RayTaskError
from ray.tune.experiment import Trial

from pipelines.runs.errors import PreemptedError, RunError
from pipelines.studies.study import TrialState
from pipelines.training.train import RunResult
from pipelines.tuning import trial
from pipelines.tuning.trial import TrialEvent, TrialJob, TrialRun, actor_resources, trains_here
from posmlp import storage
from posmlp.errors import UserError
from tests.helpers.small_runs import recipe_for


@pytest.mark.parametrize("key", ["val/top1", "val/map"])
@pytest.mark.parametrize("ended_early", ["", "val/top1 is not better than 0.5 of epoch 1 for 1 epochs"])
def test_a_trial_that_ends_early_is_finished_and_says_why(motion_set, tmp_path, monkeypatch, ended_early, key):
    """ASHA sees each epoch once before the end, and the end itself as done."""
    config = recipe_for(tmp_path, motion_set, "train.epochs=3")
    epochs = [{"epoch": float(n), key: 0.5} for n in range(1, 3 if ended_early else 4)]

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


SERVER = "tracking.uri=http://mlflow:5000"


@pytest.mark.parametrize(
    ("overrides", "nodes", "here", "anywhere"),
    [
        ([], 1, True, False),
        ([], 2, False, None),  # MLflow's SQLite file would have writers on both
        ([SERVER], 2, True, True),
        ([SERVER, "train.storage=s3://videos/runs"], 2, True, True),
        (["tracking.uri=sqlite:////runs/mlflow.db", "train.storage=s3://videos/runs"], 1, True, False),
        (["tracking.uri=sqlite:////runs/mlflow.db", "train.storage=s3://videos/runs"], 2, False, None),
        ([SERVER, "scaling.workers=2"], 1, False, None),
    ],
)
def test_a_trial_trains_in_its_actor_where_mlflow_is(
    motion_set, tmp_path, monkeypatch, overrides, nodes, here, anywhere
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(trial.ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    config = recipe_for(tmp_path, motion_set, "scaling.use_gpu=true", "scaling.train_on={group: gpu}", *overrides)
    assert trains_here(config, nodes) is here
    resources, this_node = actor_resources(config, here), {"node:10.0.0.1": 0.001}
    if not here:
        assert resources.bundles == [this_node]
        return
    assert resources.bundles == [{"CPU": 0.5, "GPU": 1.0} | ({} if anywhere else this_node)]
    assert resources._bound.kwargs["bundle_label_selector"] == [{"group": "gpu"}]
    assert resources == actor_resources(config, here) and hash(resources) == hash(actor_resources(config, here))


@pytest.mark.parametrize("remote", [True, False])
def test_a_trial_ends_when_the_stop_file_appears(tmp_path, monkeypatch, remote):
    monkeypatch.setattr(trial, "REMOTE_POLL_S", 0.01)
    run = TrialRun.__new__(TrialRun)
    run.stop_file = f"memory://{tmp_path.name}/stop" if remote else str(tmp_path / "stop")
    run.events, run.ending = trial.queue.Queue(), trial.threading.Event()
    stepping = trial.threading.Thread(target=run.step)
    stepping.start()
    assert not run.ending.wait(0.5)
    storage.write_bytes(run.stop_file, b"")
    assert run.ending.wait(30)
    run.events.put({"done": True})
    stepping.join(30)
    assert not stepping.is_alive()


def test_a_trial_ends_when_the_stop_file_appears_although_epochs_end_all_the_time(tmp_path):
    run = TrialRun.__new__(TrialRun)
    run.stop_file = str(tmp_path / "stop")
    run.events, run.ending = trial.queue.Queue(), trial.threading.Event()
    storage.write_bytes(run.stop_file, b"")
    run.events.put({"done": False})
    assert run.step() == {"done": False} and run.ending.is_set()


@pytest.mark.parametrize(
    ("known", "record", "state"),
    [
        ({}, None, TrialState.OVER_BUDGET),
        ({"cost/latency_ms": 9.0}, None, TrialState.FINISHED),
        ({}, {"metrics": None}, TrialState.FINISHED),  # it has begun to train
        ({}, {"metrics": {"val/top1": 0.5}}, TrialState.FINISHED),  # it was not recorded that it is finished
    ],
)
def test_a_budget_decides_before_the_first_epoch_alone(motion_set, tmp_path, monkeypatch, known, record, state):
    """A second measurement of the latency, 10.2 ms, must not end a trial that was within 10 ms."""
    monkeypatch.setattr(trial, "start_ray", lambda: None)
    monkeypatch.setattr(trial, "measure_costs", lambda recipe: {"cost/latency_ms": 10.2})
    monkeypatch.setattr(trial, "read_record", lambda folder: record)
    result = RunResult("small", "runs/small", "id", {"val/top1": 0.5}, ended_early="")
    monkeypatch.setattr(trial, "train", lambda config, trial: result)
    run = TrialRun.__new__(TrialRun)
    run.here, run.sharing, run.stop_file = True, 1, ""
    run.events, run.ending = trial.queue.Queue(), trial.threading.Event()
    job = TrialJob(recipe_for(tmp_path, motion_set), {}, {}, {"cost/latency_ms": 10.0}, costs=known)
    run.run_job(job.to_json())
    event = TrialEvent.from_json(run.events.get_nowait()["event"])
    assert event.state == state
    assert event.metrics["cost/latency_ms"] == known.get("cost/latency_ms", 10.2)


def test_each_model_is_timed_with_a_clip_of_its_own_size(motion_set, tmp_path, monkeypatch):
    timed = set()

    def seconds(forward, device):
        timed.add((forward.func, tuple(forward.args[0].shape[2:])))
        return 1e-3

    monkeypatch.setattr(trial, "seconds", seconds)
    sizes = [(4, 64), (8, 64), (4, 32)]
    keys = [[f"model.frames={frames}", f"model.image_size={size}"] for frames, size in sizes]
    recipes = [recipe_for(tmp_path, motion_set, *each).model_dump(mode="json") for each in keys]
    threads = torch.get_num_threads()
    try:
        assert trial.measure_latencies(recipes) == [1.0] * 3
    finally:
        torch.set_num_threads(threads)
    assert len(timed) == 3 and {shape for _, shape in timed} == {(frames, size, size) for frames, size in sizes}


def run_that_ends(monkeypatch, motion_set, tmp_path, error, ending=None):
    """A trial whose training raises an error."""
    monkeypatch.setattr(trial, "start_ray", lambda: None)
    monkeypatch.setattr(trial, "measure_costs", lambda recipe: {})
    monkeypatch.setattr(trial, "train", MagicMock(side_effect=error))
    run = TrialRun.__new__(TrialRun)
    run.here, run.sharing, run.stop_file = True, 1, ""
    run.events, run.ending = trial.queue.Queue(), ending or trial.threading.Event()
    run.run_job(TrialJob(recipe_for(tmp_path, motion_set), {}, {}, {}).to_json())
    return run


@pytest.mark.parametrize("error", [UserError("too few videos"), torch.OutOfMemoryError("20 GiB")])
def test_what_would_come_again_ends_the_trial_alone(motion_set, tmp_path, monkeypatch, error):
    result = run_that_ends(monkeypatch, motion_set, tmp_path, error).step()
    event = TrialEvent.from_json(result["event"])
    assert result["done"] and event.state == TrialState.FAILED and str(error) in event.reason


def test_after_an_unknown_error_the_trial_resumes_in_a_new_process(motion_set, tmp_path, monkeypatch):
    """Tune replaces the actor of a step that raises."""
    run = run_that_ends(monkeypatch, motion_set, tmp_path, RuntimeError("an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal"):
        run.step()


def test_a_trial_whose_machine_is_taken_away_resumes_on_another_at_once(motion_set, tmp_path, monkeypatch):
    """For Tune the process is lost with its machine, which is no failure of the trial."""
    run = run_that_ends(monkeypatch, motion_set, tmp_path, PreemptedError(signal.SIGTERM))
    with pytest.raises(RayActorError, match="taken away") as lost:
        run.step()
    sent = pickle.loads(pickle.dumps(lost.value))
    tunes = Trial("TrialRun", stub=True, storage=MagicMock(trial_driver_staging_path=str(tmp_path)))
    tunes.handle_error(RayTaskError("step", "", sent).as_instanceof_cause())
    assert tunes.run_metadata.num_failures == 0
    tunes.handle_error(RayTaskError("step", "", RuntimeError()).as_instanceof_cause())
    assert tunes.run_metadata.num_failures == 1


def test_a_machine_that_is_taken_away_while_the_study_ends_is_a_trial_to_resume(motion_set, tmp_path, monkeypatch):
    ending = trial.threading.Event()
    ending.set()
    run = run_that_ends(monkeypatch, motion_set, tmp_path, PreemptedError(signal.SIGTERM), ending)
    event = run.events.get_nowait()
    assert event["done"] and TrialEvent.from_json(event["event"]) == TrialEvent(TrialState.RUNNING)


def test_a_study_that_ends_does_not_wait_for_the_costs_of_a_trial(motion_set, tmp_path, monkeypatch):
    """The task that measures them may wait long for its resources."""
    ray = MagicMock(wait=lambda tasks, timeout: ([], tasks))
    monkeypatch.setattr(trial, "start_ray", lambda: None)
    monkeypatch.setattr(trial, "on_training_worker", MagicMock())
    monkeypatch.setattr(trial, "ray", ray)
    run = TrialRun.__new__(TrialRun)
    run.here, run.sharing, run.stop_file = False, 1, ""
    run.events, run.ending = trial.queue.Queue(), trial.threading.Event()
    run.ending.set()
    run.run_job(TrialJob(recipe_for(tmp_path, motion_set), {}, {}, {}).to_json())
    assert TrialEvent.from_json(run.events.get_nowait()["event"]).state == TrialState.RUNNING
    ray.cancel.assert_called_once()


def test_a_run_that_does_not_end_does_not_hold_up_the_study(monkeypatch):
    monkeypatch.setattr(trial, "END_LIMIT_S", 0.1)
    run, never = TrialRun.__new__(TrialRun), trial.threading.Event()
    run.ending, run.thread = trial.threading.Event(), trial.threading.Thread(target=never.wait, daemon=True)
    run.thread.start()
    with pytest.raises(RunError, match=r"has not ended 0\.1 s"):
        run.cleanup()
    never.set()
    run.thread.join()
    run.cleanup()
