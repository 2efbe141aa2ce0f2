"""One driver per study on an object store, against a real server that speaks S3. Ray and the training are made up."""

import uuid
from contextlib import suppress
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from mlflow import MlflowClient

from pipelines.runs import lease
from pipelines.runs.lease import Holder, LeaseLost, RunInUse, leased, read_holder, write_holder
from pipelines.studies.study import StudyError, Trial, study_space, write_trial
from pipelines.tuning import ray_tune
from pipelines.tuning import tune as tune_module
from pipelines.tuning.controller import StudyController
from pipelines.tuning.ray_tune import run_trials
from pipelines.tuning.trial import is_file
from pipelines.tuning.tune import tune
from posmlp import storage
from tests.helpers.small_runs import study_for
from tests.helpers.waiting import until


@pytest.fixture
def study(s3, motion_set, tmp_path, monkeypatch):
    """A study on the store that needs no Ray until its first trial; times are short."""
    for name, seconds in {"RENEW_S": 0.2, "EXPIRY_S": 3.0, "SETTLE_S": 0.3, "POLL_S": 0.1}.items():
        monkeypatch.setattr(lease, name, seconds)
    for name, value in {"start_ray": None, "wait_for_room": None, "concurrent_trials": 1}.items():
        monkeypatch.setattr(tune_module, name, MagicMock(return_value=value))
    monkeypatch.setattr(tune_module, "choose_device", lambda recipe: recipe)
    keys = [f"train.storage=s3://videos/{uuid.uuid4().hex}", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    return study_for(tmp_path, motion_set, *keys)


def test_a_second_driver_is_refused_and_leaves_nothing(study, tmp_path):
    with leased(study.folder), pytest.raises(RunInUse, match=f"{study.folder} is in use by another process"):
        tune(study)
    assert not (tmp_path / "mlflow.db").exists() and storage.list_files(study.folder) == []


def test_a_driver_that_waited_sees_what_another_one_did_meanwhile(study, tmp_path, monkeypatch):
    monkeypatch.setattr(tune_module, "wait_for_room", lambda _: write_trial(study, Trial(0, {})))
    with pytest.raises(StudyError, match=r"another process has changed .* while this one waited; resume it with"):
        tune(study)
    assert not (tmp_path / "mlflow.db").exists()


def test_a_driver_whose_study_was_taken_over_leaves_it_to_the_other_one(study, tmp_path, monkeypatch):
    other = Holder.here()

    def lose(controller, held):
        while not held.lost:  # a renewal that has begun may still write this process's name
            write_holder(study.folder, other)
            with suppress(LeaseLost):
                held.check()
        raise StudyError(held.lost)

    monkeypatch.setattr(tune_module, "run_trials", lose)
    with pytest.raises(StudyError, match="another process has taken it over"):
        tune(study)
    (run,) = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["1"])
    assert run.info.status == "RUNNING" and read_holder(study.folder) == other


@pytest.mark.parametrize("remote", [True, False])
def test_a_driver_that_has_lost_its_lease_stops_its_own_trials(study, motion_set, tmp_path, monkeypatch, remote):
    if remote:
        server = study.recipe.tracking.model_copy(update={"uri": "http://mlflow:5000"})
        study = study.model_copy(update={"recipe": study.recipe.model_copy(update={"tracking": server})})
    held, seen = SimpleNamespace(lost=""), []

    def run_tuner(controller, scratch, stop_file, failures):
        held.lost = "taken over"
        until(lambda: is_file(stop_file))
        seen.append(stop_file)

    monkeypatch.setattr(ray_tune, "run_tuner", run_tuner)
    controller = StudyController(study, study_space(study), [], MagicMock(run_id="run"), concurrent=1)
    with pytest.raises(StudyError, match="taken over"):
        run_trials(controller, held)
    (stop_file,) = seen
    assert storage.is_inside(stop_file, study.folder) is remote and not is_file(stop_file)
