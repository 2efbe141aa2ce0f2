"""Studies of folds with real Ray Tune and MLflow: what a fold learns from, results, failures, and a killed driver."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import ray
from mlflow import MlflowClient

from pipelines.cli import main
from pipelines.folds.cross_validate import cross_validate
from pipelines.runs import checkpoints
from pipelines.runs.predictions import read_predictions
from pipelines.runs.record import read_record
from pipelines.studies.study import FoldStudy, TrialState, read_trials, trial_folder
from pipelines.tracking.uris import PARENT, tracking_uri
from pipelines.training.train import TrialContext, train
from posmlp.metrics import VAL_TOP1
from tests.helpers.small_runs import QUICK, log_of, recipe_for

pytestmark = pytest.mark.ray

SUBJECTS = [*["s1"] * 12, *["s2"] * 18, *["s3"] * 2]  # of the motion set's 32 training clips


@pytest.fixture(scope="module")
def subjects(motion_set, tmp_path_factory):
    """A copy of the motion set with subjects; the videos of the last one are truncated."""
    folder = tmp_path_factory.mktemp("subjects")
    shutil.copytree(motion_set, folder, dirs_exist_ok=True)
    rows = list(csv.DictReader(io.StringIO((motion_set / "train.csv").read_text())))
    write_list(folder, rows, SUBJECTS)
    for row in rows[30:]:
        video = folder / row["path"]
        video.write_bytes(video.read_bytes()[:200])
    return folder


def write_list(folder, rows, subjects):
    lines = ["path,label,class,subject"]
    lines += [f"{row['path']},{row['label']},{row['class']},{who}" for row, who in zip(rows, subjects, strict=True)]
    (folder / "train.csv").write_text("\n".join(lines) + "\n")


def study_of(folder, subjects, *overrides, **settings):
    recipe = recipe_for(folder, subjects, *QUICK, "data.max_bad_fraction=0.2", *overrides)
    return FoldStudy(recipe=recipe, **{"name": "loso", "by": "subject", "shuffled": True, "concurrent": 2} | settings)


@pytest.fixture(scope="module")
def finished_folds(local_ray, subjects, tmp_path_factory):
    """A study of three folds, of which the last fails: none of its videos can be decoded."""
    return cross_validate(study_of(tmp_path_factory.mktemp("folds"), subjects))


def weights_of(run):
    """The weights of a run's only checkpoints: those of the newest steps."""
    newest, _ = checkpoints.newest(run)
    info, contents = checkpoints.load(newest, [checkpoints.WEIGHTS])
    return info, contents[checkpoints.WEIGHTS]


def test_a_fold_that_fails_is_named_and_costs_no_other(finished_folds):
    results = finished_folds.results
    assert [trial.state for trial in results.trials] == [TrialState.FINISHED, TrialState.FINISHED, TrialState.FAILED]
    assert [trial.member["fold"] for trial in results.trials] == ["s1", "s2", "s3"]
    text = results.describe()
    assert "Not finished: fold s3, seed 0 (failed): no validation video could be decoded" in text
    assert set(results.folds) == {"s1", "s2"} and results.pooled == {}


def test_a_fold_is_tested_once_with_the_last_weights_and_its_predictions_are_those_of_its_metrics(finished_folds):
    study, results = finished_folds.study, finished_folds.results
    for trial, videos in zip(results.trials[:2], (12, 18), strict=True):
        run = trial_folder(study, trial.number)
        table = read_predictions(run)
        assert table.num_rows == videos and table.column_names[2:] == ["scores", "scores_shuffled"]
        assert table["scores"] != table["scores_shuffled"]
        record = read_record(run)
        assert results.folds[trial.member["fold"]]["accuracy"].values == (record["metrics"][VAL_TOP1],)
        found = [entry.info for entry in checkpoints.find(run)]
        assert all(VAL_TOP1 not in info.metrics for info in found[:-1]), "no epoch but the last one was validated"
        assert (found[-1].epoch, VAL_TOP1 in found[-1].metrics) == (2, True)


def test_mlflow_has_a_run_for_each_fold_and_the_results(finished_folds):
    study, client = finished_folds.study, MlflowClient(tracking_uri(finished_folds.study.recipe))
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (parent,) = [run for run in runs if PARENT not in run.data.tags]
    children = {run.data.params["search.fold"]: run for run in runs if PARENT in run.data.tags}
    assert (parent.info.status, parent.data.params["folds.by"]) == ("FINISHED", "subject")
    assert {fold: run.info.status for fold, run in children.items()} == {
        "s1": "FINISHED",
        "s2": "FINISHED",
        "s3": "FAILED",
    }
    assert children["s1"].info.run_name == "trial-000 fold s1; seed 0"
    names = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"folds.md", "folds.csv", "folds.json", "predictions.parquet", "study.json"} <= names
    assert names - {"config.yaml"} <= {*os.listdir(study.folder)}
    assert parent.data.metrics["folds/finished"] == 2


def test_nothing_of_the_held_out_subject_reaches_the_weights(finished_folds, subjects, tmp_path):
    """With other labels and other pixels of the subject s1, the weights of its fold are the same, bit for bit."""
    study, other = finished_folds.study, tmp_path / "other"
    shutil.copytree(subjects, other)
    rows = list(csv.DictReader(io.StringIO((subjects / "train.csv").read_text())))
    held_out = [row for row in rows if row["subject"] == "s1"]
    labels = [(row["label"], row["class"]) for row in held_out[1:] + held_out[:1]]
    assert labels != [(row["label"], row["class"]) for row in held_out]
    for row, (label, name) in zip(held_out, labels, strict=True):
        shutil.copy(subjects / rows[20]["path"], other / row["path"])
        row["label"], row["class"] = label, name
    write_list(other, rows, SUBJECTS)
    recipe = study_of(tmp_path, other).fold_recipe("s1", 0, 0)
    result = train(recipe, trial=TrialContext(tags={"folds": "other"}, here=True, predicted=("ordered",)))
    before, after = weights_of(trial_folder(study, 0)), weights_of(result.path)
    assert before[0].step == after[0].step == 4 and before[1].keys() == after[1].keys()
    assert all((before[1][name] == after[1][name]).all() for name in before[1])
    assert read_predictions(result.path)["label"] != read_predictions(trial_folder(study, 0))["label"]


@pytest.mark.slow
def test_a_killed_driver_is_resumed_and_the_predictions_are_the_same(finished_folds, subjects, tmp_path, capsys):
    """Within the second fold. The third fails again, until its videos are repaired."""
    study = study_of(tmp_path, subjects, concurrent=1)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(study.recipe.to_yaml())
    command = [sys.executable, "-m", "pipelines.cli", "folds", str(recipe), "--by", "subject", "--name", "loso"]
    command += ["--shuffled", "--concurrent", "1"]
    env = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with open(tmp_path / "log.txt", "a") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, text=True)
    deadline = time.monotonic() + 180
    while not any(entry.info and entry.info.step >= 1 for entry in checkpoints.find(trial_folder(study, 1))):
        assert process.poll() is None and time.monotonic() < deadline, log_of(tmp_path)
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert [trial.state for trial in read_trials(study.folder)] == [TrialState.FINISHED, TrialState.RUNNING]
    first = os.stat(f"{study.folder}/trial-000/run.json").st_mtime_ns
    assert main(["folds", "--resume", study.folder]) == 1
    assert "Not finished: fold s3, seed 0" in capsys.readouterr().out
    assert os.stat(f"{study.folder}/trial-000/run.json").st_mtime_ns == first
    for number in (0, 1):
        before, after = (read_predictions(trial_folder(each, number)) for each in (finished_folds.study, study))
        assert before == after

    rows = list(csv.DictReader(io.StringIO((subjects / "train.csv").read_text())))
    for row in rows[30:]:
        shutil.copy(subjects / rows[0]["path"], subjects / row["path"])
    assert main(["folds", "--resume", study.folder]) == 0
    assert {trial.state for trial in read_trials(study.folder)} == {TrialState.FINISHED}
    tree = json.loads((tmp_path / "loso" / "folds.json").read_text())
    assert set(tree["folds"]) == {"s1", "s2", "s3"} and "uf1" in tree["pooled"]["all"]
    assert {"confusion.png", "per_class.csv", "pooled.csv"} <= set(os.listdir(study.folder))
    capsys.readouterr()
    assert main(["folds", "--resume", study.folder]) == 0, "a finished study shows its tables again"
    assert "pooled over folds" in capsys.readouterr().out
