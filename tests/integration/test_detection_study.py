"""A study of detection with real Ray and MLflow: everything that a study does goes by mAP."""

import csv

import pytest
from mlflow import MlflowClient

from pipelines.cli import main
from pipelines.runs import checkpoints
from pipelines.runs.record import read_record
from pipelines.studies import logged_study, pareto
from pipelines.studies.study import TrialState, read_trials, trial_folder
from pipelines.tracking.uris import PARENT, tracking_uri
from pipelines.tuning.tune import tune
from posmlp.detection.scenes import FIRST_SECOND, make_scene_set
from tests.helpers.log_lines import log_lines
from tests.helpers.small_runs import study_for

pytestmark = pytest.mark.ray

SPLIT = {"path": "", "boxes": "_boxes", "excluded": "_excluded"}  # key of a split: end of its file's name


@pytest.fixture(scope="module")
def studied(local_ray, tmp_path_factory):
    """A study of two trials with early stopping that is resumed for a third one and a fresh seed; and its log lines."""
    folder = tmp_path_factory.mktemp("study")
    scenes = make_scene_set(folder / "scenes", train=2, val=1, seconds=6, size=32)
    lists = [f"data.{s}.{key}={scenes}/{s}{kind}.csv" for s in ("train", "val") for key, kind in SPLIT.items()]
    overrides = [
        *("task=detection", "data.format=ava", f"data.classes={scenes}/actions.pbtxt", "data.stride=2", *lists),
        *(f"data.train.root={scenes}/videos", f"data.val.root={scenes}/videos"),
        *(f"detection.first_second={FIRST_SECOND}", "train.global_batch=4"),
    ]
    study = study_for(folder, scenes, *overrides, against="gmacs", asha=True, trials=2)
    with log_lines() as lines:
        first = tune(study)
        return first, tune(study.model_copy(update={"trials": 3, "repeats": 1}), resume=True), lines


def test_trials_have_the_map_of_their_runs_and_a_resume_keeps_them(studied):
    first, result, lines = studied
    assert read_trials(result.study.folder) == result.trials
    assert len(first.trials) == 2 and len([t for t in result.trials if t.repeat_of is None]) == 3
    trained = [trial for trial in result.trials if trial.state == TrialState.FINISHED]
    assert {trial.number for trial in trained if trial.repeat_of is not None}
    for trial in trained:
        run = trial_folder(result.study, trial.number)
        assert trial.value == read_record(run)["metrics"]["val/map"] and "val/top1" not in trial.metrics
        by_epoch = {
            e.info.epoch: e.info.metrics["val/map"] for e in checkpoints.find(run) if "val/map" in e.info.metrics
        }
        assert by_epoch and by_epoch.items() <= trial.curve.items()
    for trial in first.trials:
        assert result.trials[trial.number].value == trial.value or trial.state == TrialState.STOPPED
    assert any("2 trials, random, mAP against gmacs" in line for line in lines)
    assert any("trial 0: finished, mAP " in line for line in lines) and not any("top-1" in line for line in lines)


def test_files_and_mlflow_name_the_map(studied, tmp_path, capsys):
    _, result, _ = studied
    client, study = MlflowClient(tracking_uri(result.study.recipe)), result.study
    values = pareto.reported_values(result.trials)
    with open(f"{study.folder}/trials.csv") as file:
        rows = list(csv.DictReader(file))
    assert {int(row["trial"]): float(row["map"]) for row in rows if row["map"]} == {
        trial.number: trial.value for trial in result.trials if "val/map" in trial.metrics
    }
    parent = client.get_run(result.mlflow_run_id)
    assert parent.data.metrics["study/best_map"] == max(values.values())
    assert f"val/map {max(values.values()):.1%} (mean over 1 fresh seed)" in parent.data.tags["mlflow.note.content"]
    runs = client.search_runs([parent.info.experiment_id])
    children = {int(run.data.tags["trial"]): run for run in runs if PARENT in run.data.tags}
    for number, value in values.items():
        assert children[number].data.metrics["study/fresh_map"] == pytest.approx(value)
    for trial in result.trials:
        assert children[trial.number].data.metrics["val/map"] == pytest.approx(trial.value)
    assert logged_study.read_study_from_mlflow("look", tracking_uri(study.recipe)).hits == {}
    assert main(["front", "look", "--uri", tracking_uri(study.recipe), "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "(mAP against gmacs)" in text and "Intervals and shares are over seeds alone." in text
    assert "validation mAP, %" in (tmp_path / "front.html").read_text()
