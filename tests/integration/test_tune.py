"""Studies with real Ray Tune, Ray Train and MLflow: their results, and the faults they survive."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from unittest.mock import MagicMock

import psutil
import pytest
import ray
import torch
from mlflow import MlflowClient
from ray.util import placement_group_table
from ray.util.state import list_actors

from pipelines.cli import main
from pipelines.cluster import capacity
from pipelines.cluster.session import WORKER_ENV
from pipelines.runs import checkpoints
from pipelines.runs.record import read_json, read_record
from pipelines.studies import logged_study, pareto, report
from pipelines.studies.costs import static_costs
from pipelines.studies.study import StudyError, TrialState, read_study_hits, read_trials, study_space, trial_folder
from pipelines.tracking.uris import PARENT, study_view, tracking_uri, view_text
from pipelines.training.train import train
from pipelines.tuning import mo_asha
from pipelines.tuning import tune as tune_module
from pipelines.tuning.controller import StudyController
from pipelines.tuning.search import Searcher
from pipelines.tuning.tune import tune
from posmlp.config import ScalingSection, load_recipe
from posmlp.errors import UserError
from posmlp.metrics import COSTS, VAL_TOP1
from tests.helpers.small_runs import QUICK, log_of, recipe_for, study_for

pytestmark = pytest.mark.ray


def mlflow_runs(study):
    """An MLflow client, the study's own runs, and its trials' runs."""
    client = MlflowClient(tracking_uri(study.recipe))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments)
    children = [run for run in runs if PARENT in run.data.tags]
    return client, [run for run in runs if PARENT not in run.data.tags], children


def alive():
    """The actors of trials that are alive, and the placement groups that are left."""
    here = ray.get_runtime_context().gcs_address
    ours = ("Trainable", "TrialRun", "TrainController", "RayTrainWorker", "RunChannel", "Synchronization", "Dataset")
    actors = [a.class_name for a in list_actors(address=here, filters=[("state", "=", "ALIVE")], limit=1000)]
    groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    return [name for name in actors if any(part in name for part in ours)], groups


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_study_trains_and_records_every_trial(finished_study):
    result, lines = finished_study
    first = [trial for trial in result.trials if trial.repeat_of is None]
    assert [trial.state for trial in result.trials] == [TrialState.FINISHED] * len(result.trials)
    assert [trial.number for trial in first] == [0, 1, 2]
    assert len({tuple(trial.member.items()) for trial in first}) == 3
    assert read_trials(result.study.folder) == result.trials
    space = study_space(result.study)
    for trial in result.trials:
        run = f"{result.study.folder}/trial-{trial.number:03d}"
        record = read_record(run)
        assert record["config"]["model"]["blocks"] == [trial.member[f"block{stage}"] for stage in (1, 2, 3, 4)]
        assert record["metrics"][VAL_TOP1] == trial.metrics[VAL_TOP1]
        assert [f.info.epoch for f in checkpoints.find(run) if f.info][-1] == 2
        costs = static_costs(space.recipe(result.study.recipe, trial.member))
        assert {name: trial.metrics[name] for name in costs} == costs
        assert trial.metrics[COSTS["latency"]] > 0
    assert any("trial 2: finished" in line for line in lines)


def test_the_front_of_the_first_seeds_is_repeated_with_a_fresh_seed(finished_study):
    result, lines = finished_study
    first = [trial for trial in result.trials if trial.repeat_of is None]
    again = [trial for trial in result.trials if trial.repeat_of is not None]
    assert {t.number for t in pareto.pareto_front(first, "gmacs")} <= {trial.repeat_of for trial in again}
    assert len({trial.repeat_of for trial in again}) == len(again)  # racing may open another member's place
    for trial in again:
        assert trial.seed == 1
        assert trial.member == result.trials[trial.repeat_of].member
    assert any(f"(trial {again[0].repeat_of}: on the front of the first seeds; seed 1)" in line for line in lines)
    top1 = {trial.repeat_of: trial.metrics[VAL_TOP1] for trial in again}
    assert pareto.reported_values(result.trials) == top1
    assert {t.number for t in pareto.pareto_front(result.trials, "gmacs")} <= set(top1)


def test_mlflow_has_one_parent_run_and_one_child_run_per_trial(finished_study):
    result, _ = finished_study
    client, parents, children = mlflow_runs(result.study)
    (parent,) = parents
    assert parent.info.run_id == result.mlflow_run_id
    assert (parent.info.run_name, parent.info.status, parent.data.tags["study"]) == ("look", "FINISHED", "look")
    assert parent.data.params["study.space"] == "block_types"
    assert {run.data.tags[PARENT] for run in children} == {parent.info.run_id}
    assert sorted(run.info.run_name for run in children) == [report.trial_name(trial) for trial in result.trials]
    best = f"; {report.describe_best(result.trials, result.study.main)}"
    assert "(mean over 1 fresh seed)" in best
    assert parent.data.tags["mlflow.note.content"].endswith(best)
    experiment = client.get_experiment(parent.info.experiment_id)
    view = study_view("look", [f"block{stage}" for stage in (1, 2, 3, 4)], result.study.main)
    assert experiment.tags[f"mlflow.sharedViewState.study-{result.mlflow_run_id}"] == view_text(view)
    assert {"front.html", "front.png", "trials.csv"} <= set(os.listdir(result.study.folder))
    own = ("system/", "study/")
    assert len({frozenset(k for k in run.data.metrics if not k.startswith(own)) for run in children}) == 1
    found = pareto.assess(result.trials, read_study_hits(result.study, result.trials))
    assert found.paired and found.repeated
    members = report.member_metrics(found, result.study.main, "gmacs")
    assert parent.data.metrics["study/best_top1"] == max(found.values.values())
    for run in children:
        trial = result.trials[int(run.data.tags["trial"])]
        assert {k: run.data.params[f"search.{k}"] for k in trial.member} == trial.member
        assert run.data.metrics[VAL_TOP1] == trial.metrics[VAL_TOP1]
        logged = {k: v for k, v in run.data.metrics.items() if k.startswith("study/")}
        assert logged == pytest.approx(members.get(trial.number, {}))
        for cost in ("cost/gmacs", "cost/params_m"):  # as of any run
            assert float(run.data.params[cost]) == pytest.approx(trial.metrics[cost], rel=1e-5)
        first = client.get_metric_history(run.info.run_id, "train/loss")[0].timestamp
        for cost in COSTS.values():  # known before the first epoch; latency once more, in turns with the others
            history = client.get_metric_history(run.info.run_id, cost)
            assert history[0].step == 0 and history[0].timestamp < first
        assert len(client.get_metric_history(run.info.run_id, COSTS["latency"])) == 1 + (trial.repeat_of is None)


def test_the_front_is_read_from_mlflow_alone(finished_study, tmp_path, capsys):
    result, _ = finished_study
    uri = tracking_uri(result.study.recipe)
    logged = logged_study.read_study_from_mlflow("look", uri)
    assert logged.study == result.study
    assert logged.variant_latencies == read_json(f"{result.study.folder}/published.json")
    assert logged.variant_latencies["tiny"] > 0
    for trial, seen in zip(result.trials, logged.trials, strict=True):
        assert (seen.member, seen.state, seen.repeat_of, seen.seed) == (
            trial.member,
            trial.state,
            trial.repeat_of,
            trial.seed,
        )
        assert {k: seen.metrics[k] for k in trial.metrics} == trial.metrics
    assert main(["front", "look", "--uri", uri, "--out", str(tmp_path)]) == 0
    hits = read_study_hits(result.study, result.trials)
    assert logged.hits == hits and len(hits) == sum(trial.repeat_of is not None for trial in result.trials)
    main_metric = result.study.main
    assert report.describe_study("look", result.trials, main_metric, "gmacs", hits=hits) in capsys.readouterr().out
    assert {"front.html", "front.png", "trials.csv", "progress.png"} <= {path.name for path in tmp_path.iterdir()}


def test_every_point_of_the_front_has_a_recipe_that_trains(finished_study, tmp_path):
    result, _ = finished_study
    client, (parent,), _ = mlflow_runs(result.study)
    names = {item.path for item in client.list_artifacts(parent.info.run_id, "recipes")}
    for trial in pareto.pareto_front(result.trials, "gmacs"):
        path = f"recipes/trial-{trial.number:03d}.yaml"
        assert path in names
        config = load_recipe(client.download_artifacts(parent.info.run_id, path, str(tmp_path)))
    short = config.model_copy(update={"tracking": config.tracking.model_copy(update={"log_model": False})})
    again = train(short)  # the last one: the same training, once more
    assert again.name == f"look-trial-{trial.number:03d}"
    assert again.metrics["train/loss"] == pytest.approx(trial.metrics["train/loss"], rel=1e-4)
    assert not any(run.info.run_name == again.name for run in mlflow_runs(result.study)[2])


def test_the_best_model_is_registered(finished_study):
    result, lines = finished_study
    client, _, _ = mlflow_runs(result.study)
    version = client.get_model_version_by_alias("look", "best")
    fresh = next(trial for trial in result.trials if trial.repeat_of == result.best.number)
    assert (version.tags["trial"], version.tags["member"]) == (str(fresh.number), str(result.best.number))
    assert version.tags["seeds"] == "1" and "first fresh seed" in version.tags["rule"]
    assert float(version.tags["top1"]) == pytest.approx(fresh.metrics[VAL_TOP1], abs=1e-4)
    assert any("has the alias best" in line for line in lines)
    best = checkpoints.choose(trial_folder(result.study, fresh.number))
    (model,) = client.search_logged_models(["1"], f"tags.checkpoint = '{best}' AND name = 'model'")
    assert (version.source, model.source_run_id) == (model.artifact_location, result.mlflow_run_id)
    assert {m.key: m.value for m in model.metrics}["val/top1"] == checkpoints.read_info(best).metrics["val/top1"]
    assert {m.run_id for m in model.metrics} == {fresh.mlflow_run_id}


def test_a_finished_study_is_not_repeated(finished_study, capsys):
    result, _ = finished_study
    with pytest.raises(StudyError, match=f"exists already: resume it with posmlp tune --resume {result.study.folder}"):
        tune(result.study)
    before = [(run.info.run_id, run.info.end_time) for run in mlflow_runs(result.study)[2]]
    assert main(["tune", "--resume", result.study.folder]) == 0
    text = report.describe_study("look", result.trials, result.study.main, "gmacs")
    assert text.split("\n")[0].split(";")[0] in capsys.readouterr().out
    assert [(run.info.run_id, run.info.end_time) for run in mlflow_runs(result.study)[2]] == before


def test_one_sync_delivers_what_a_study_and_its_trials_could_not(finished_study, capsys):
    result, _ = finished_study
    assert main(["sync", result.study.folder]) == 0
    assert capsys.readouterr().out.count(" delivered to MLflow run ") == 1 + len(result.trials)


def test_a_comparison_of_latencies_that_gets_no_place_in_time_is_left_out(finished_study, lines, monkeypatch):
    """As when other jobs hold the GPUs: the user learns what it waits for, and the study goes on."""
    result, _ = finished_study
    monkeypatch.setattr(tune_module, "LATENCY_LIMIT_S", 1.0)
    monkeypatch.setattr(capacity, "WARN_AFTER_S", (0.5,))
    study = result.study.model_copy(
        update={"recipe": result.study.recipe.model_copy(update={"scaling": ScalingSection(cpus_per_worker=100)})}
    )
    trials = [replace(trial, timed=False) for trial in result.trials]
    controller = StudyController(study, study_space(study), trials, MagicMock(), 1)
    tune_module.compare_latencies(controller)
    assert controller.in_order() == trials
    assert any(
        re.search(r"waiting for [01] s for the latencies of \d+ models: the task needs 100 CPU", line) for line in lines
    )
    assert "latencies could not be compared within 1 s, so those from before training are kept" in lines


def test_a_study_leaves_nothing_behind(finished_study):
    actors, groups = alive()
    assert (actors, groups) == ([], [])


# --- trials that do not end well -----------------------------------------------------------------------------------

WEIGHTS = '''
from tune_spaces import Space


def space(base):
    """One starts from trained weights, the others from random ones."""
    return Space(
        {"decay": (0.05, 0.06, 0.07, 0.08, 0.09, 0.1)},
        lambda m: {"model.weights": RUN if m["decay"] == 0.05 else None, "optim.weight_decay": m["decay"]},
    )
'''


@pytest.mark.slow
def test_asha_stops_what_is_dominated_promotes_and_resumes(local_ray, motion_set, tmp_path):
    """The first trial starts from weights that know the validation clips. The others cost as much: it dominates them.

    One runs at a time, so that the first is at the rung before the others. The only rung is after epoch 1.
    """
    seen = [f"data.val.path={motion_set}/train.csv", "optim.lr=1e-5"]
    taught = recipe_for(
        tmp_path, motion_set, "name=taught", seen[0], "train.epochs=30", "optim.lr=5e-3", "eval.every=30", *QUICK
    )
    result = train(taught)
    assert result.metrics[VAL_TOP1] > 0.5
    space = tmp_path / "starts.py"
    space.write_text(f"RUN = {result.path!r}\n{WEIGHTS}")
    settings = {"space": str(space), "searcher": "grid", "asha": True, "against": "gmacs", "concurrent": 1}
    study = study_for(tmp_path, motion_set, *seen, "train.epochs=3", trials=5, **settings)
    first = tune(study).trials
    assert [trial.state for trial in first] == [TrialState.FINISHED] + [TrialState.STOPPED] * 4
    assert [set(trial.curve) for trial in first] == [{1, 2, 3}] + [{1}] * 4
    for trial in first[1:]:
        assert read_record(f"{study.folder}/trial-{trial.number:03d}")["metrics"] is None
    states = {run.data.tags["trial"]: (run.data.tags["trial.state"], run.info.status) for run in mlflow_runs(study)[2]}
    assert states["0"] == (TrialState.FINISHED, "FINISHED")
    assert states["4"] == (TrialState.STOPPED, "KILLED")

    # With a sixth trial, the better two of six pass: the sixth is stopped, and the best of the others is promoted.
    ended = tune(study.model_copy(update={"trials": 6}), resume=True).trials
    best = max(ended[1:], key=lambda trial: (trial.curve[1], -trial.number))
    assert [t.number for t in ended if t.state == TrialState.FINISHED] == [0, best.number]
    assert [t.number for t in ended if t.state == TrialState.STOPPED] == [n for n in range(1, 6) if n != best.number]
    assert best.number != 5 and best.curve[1] == first[best.number].curve[1]
    assert (ended[0].curve, ended[0].state) == (first[0].curve, TrialState.FINISHED)
    client, _, children = mlflow_runs(study)
    (run,) = [run for run in children if run.data.tags["trial"] == str(best.number)]  # the same run goes on
    assert (run.data.tags["trial.state"], run.data.tags["trial.reason"]) == (TrialState.FINISHED, "")
    assert [m.step for m in client.get_metric_history(run.info.run_id, VAL_TOP1)] == [1, 2, 3]
    wait_until(lambda: alive() == ([], []))


@pytest.mark.slow
def test_the_scheduler_works_with_a_plain_trainable(local_ray, tmp_path):
    """The example of the module, as it stands there: only trials that others dominate are stopped."""
    code = mo_asha.__doc__.partition("Tune::\n")[2].partition("\nRungs lie")[0]
    here = code.replace(
        "tune_config=tune_config", "tune_config=tune_config, run_config=tune.RunConfig(storage_path=FOLDER)"
    )
    found = {}
    exec(textwrap.dedent(here.replace("FOLDER", repr(str(tmp_path)))), found)
    ended = [result.metrics for result in found["results"]]
    assert len(ended) == 12 and found["results"].num_errors == 0
    stopped = [metrics for metrics in ended if metrics["epoch"] < 27]
    assert len(stopped) == found["scheduler"].stopped > 0
    assert {metrics["epoch"] for metrics in stopped} <= {3, 9}
    rungs = found["scheduler"].halving.rungs
    assert len(rungs[3]) == 12
    for metrics in stopped:
        mine = (metrics["accuracy"], -metrics["cost"])
        others = [tuple(values) for values in rungs[metrics["epoch"]].values() if tuple(values) != mine]
        assert any(a >= mine[0] and c >= mine[1] for a, c in others)


BROKEN = '''
from tune_spaces import Space


def space(base):
    """The first one explodes."""
    return Space({"lr": (1e30, 1e-3)}, lambda m: {"optim.lr": m["lr"], "optim.warmup_epochs": 0.0})
'''


def test_a_trial_that_fails_is_one_failed_child_with_its_reason(local_ray, motion_set, tmp_path):
    space = tmp_path / "broken.py"
    space.write_text(BROKEN)
    study = study_for(tmp_path, motion_set, "train.epochs=1", space=str(space), searcher="grid", trials=2)
    result = tune(study)
    assert [trial.state for trial in result.trials] == [TrialState.FAILED, TrialState.FINISHED]
    assert "exploded" in result.trials[0].reason
    (failed,) = [run for run in mlflow_runs(study)[2] if run.info.status == "FAILED"]
    assert failed.data.tags["trial"] == "0"
    assert "exploded" in failed.data.tags["trial.reason"]
    assert result.best.number == 1


def test_members_over_the_latency_budget_are_not_trained(local_ray, motion_set, tmp_path):
    space = tmp_path / "broken.py"
    space.write_text(BROKEN)
    study = study_for(tmp_path, motion_set, space=str(space), searcher="grid", budget_ms=1e-3)
    with pytest.raises(
        StudyError, match=r"looked at all 2\. The nearest is lr .*latency .* ms is over --budget-ms 0\.001"
    ):
        tune(study)
    trials = read_trials(study.folder)
    assert [trial.state for trial in trials] == [TrialState.OVER_BUDGET] * 2
    assert all("latency" in trial.reason and "ms is over --budget-ms 0.001" in trial.reason for trial in trials)
    assert mlflow_runs(study)[2] == []
    assert not any("checkpoints" in folders for _, folders, _ in os.walk(study.folder))


# --- faults ------------------------------------------------------------------------------------------------------


def start_tune(folder, study, resume=False):
    """Start ``posmlp tune`` in another process, on the tests' Ray."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(study.recipe.to_yaml())
    command = [sys.executable, "-m", "pipelines.cli", "tune"]
    if resume:
        command += ["--resume", study.folder]
    else:
        command += [str(recipe), "--space", study.space, "--trials", str(study.trials), "--searcher", study.searcher]
        command += ["--name", study.name, "--concurrent", str(study.concurrent)]
        command += ["--asha" if study.asha else "--no-asha"]
    env = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=log, text=True)


def wait_for_trial(folder, study, process, number, step):
    """Wait until a trial has a checkpoint of at least that step."""

    def there():
        assert process.poll() is None, log_of(folder)
        found = checkpoints.find(f"{study.folder}/trial-{number:03d}")
        return any(f.info and f.info.step >= step for f in found)

    wait_until(there, 180)


def actors_of(part):
    """The processes of the tests' Ray whose actor class name contains the text."""
    here = ray.get_runtime_context().gcs_address
    found = list_actors(address=here, filters=[("state", "=", "ALIVE")], limit=1000)
    return [psutil.Process(actor.pid) for actor in found if part in actor.class_name]


def check_whole(study, count):
    """Check that all trials are finished, each with one MLflow run, and equal those of an undisturbed search."""
    trials = read_trials(study.folder)
    assert [trial.state for trial in trials] == [TrialState.FINISHED] * count
    undisturbed = []
    for trial in trials:
        undisturbed.append(Searcher(study, study_space(study)).propose(undisturbed))
        assert undisturbed[-1].member == trial.member
    _, parents, children = mlflow_runs(study)
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert sorted(run.data.tags["trial"] for run in children) == [str(n) for n in range(count)]
    assert {run.info.status for run in children} == {"FINISHED"}
    for run in children:
        steps = [m.step for m in MlflowClient(tracking_uri(study.recipe)).get_metric_history(run.info.run_id, VAL_TOP1)]
        assert steps == list(range(1, study.recipe.train.epochs + 1))


def test_a_killed_driver_is_resumed_without_doubles(local_ray, motion_set, tmp_path):
    """Within an epoch of the second trial: the first is kept, the second resumes from its checkpoint."""
    study = study_for(tmp_path, motion_set, "train.epochs=3", concurrent=1, trials=2)
    process = start_tune(tmp_path, study)
    wait_for_trial(tmp_path, study, process, 1, step=5)
    first = (tmp_path / "look" / "trial-000" / "run.json").stat().st_mtime_ns
    process.kill()
    process.wait()
    assert [trial.state for trial in read_trials(study.folder)] == [TrialState.FINISHED, TrialState.RUNNING]
    assert start_tune(tmp_path, study, resume=True).wait(timeout=300) == 0, log_of(tmp_path)
    assert "resuming; trials finished: 1, trials to resume: 1" in log_of(tmp_path)
    assert (tmp_path / "look" / "trial-000" / "run.json").stat().st_mtime_ns == first
    check_whole(study, 2)


SAME_AGAIN = '''
from tune_spaces import Space


def space(base):
    """The first and the last train the same, the one between something else."""
    return Space({"place": ("first", "between", "last")}, lambda m: BETWEEN if m["place"] == "between" else {})


BETWEEN = {"model.blocks": ["joint"] * 4, "train.deterministic": True, "optim.lr": 1e-2, "optim.ema": 0.9}
'''


def test_nothing_of_a_trial_is_left_for_the_next_one_in_its_process(local_ray, motion_set, tmp_path):
    space = tmp_path / "same.py"
    space.write_text(SAME_AGAIN)
    here = ray.get_runtime_context().gcs_address
    before = {actor.actor_id for actor in list_actors(address=here, limit=1000)}
    study = study_for(tmp_path, motion_set, space=str(space), searcher="grid", concurrent=1)
    trials = tune(study).trials
    assert [trial.state for trial in trials] == [TrialState.FINISHED] * 3
    started = [actor for actor in list_actors(address=here, limit=1000) if actor.actor_id not in before]
    assert sum("ResourceTrainable" in actor.class_name for actor in started) == 1  # all trials had the same process
    assert not any("RayTrainWorker" in actor.class_name for actor in started)
    first, between, last = (
        checkpoints.load(checkpoints.newest(trial_folder(study, trial.number))[0])[1][checkpoints.WEIGHTS]
        for trial in trials
    )
    assert first.keys() == last.keys() != between.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)
    alone = train(recipe_for(tmp_path, motion_set, *QUICK, f"data.cache_dir={tmp_path}/cache", "name=alone"))
    trained = checkpoints.load(checkpoints.newest(alone.path)[0])[1][checkpoints.WEIGHTS]
    assert all(torch.equal(first[name], trained[name]) for name in first)  # a worker of Ray Train


@pytest.mark.slow
def test_killed_processes_of_trials_are_replaced(local_ray, motion_set, tmp_path):
    """The processes that train two trials; they have started with the allocator's settings."""
    study = study_for(tmp_path, motion_set, "train.epochs=4", concurrent=1, trials=2)
    process = start_tune(tmp_path, study)
    for number in range(2):
        wait_for_trial(tmp_path, study, process, number, step=3)
        (trial,) = actors_of("ResourceTrainable")
        assert WORKER_ENV.items() <= trial.environ().items()
        trial.kill()
    assert process.wait(timeout=300) == 0, log_of(tmp_path)
    check_whole(study, 2)


@pytest.mark.slow
def test_killed_workers_and_drivers_of_trials_are_replaced(local_ray, motion_set, tmp_path):
    """A training worker of the first trial, then the process that drives the second: trials of two workers."""
    study = study_for(tmp_path, motion_set, "train.epochs=4", "scaling.workers=2", concurrent=1, trials=2)
    process = start_tune(tmp_path, study)
    wait_for_trial(tmp_path, study, process, 0, step=3)
    actors_of("RayTrainWorker")[0].kill()
    wait_for_trial(tmp_path, study, process, 1, step=3)
    for driver in actors_of("TrialRun") + actors_of("Trainable"):
        driver.kill()
    assert process.wait(timeout=300) == 0, log_of(tmp_path)
    check_whole(study, 2)


@pytest.mark.slow
def test_ctrl_c_leaves_a_study_that_resumes(local_ray, motion_set, tmp_path):
    study = study_for(tmp_path, motion_set, "train.epochs=3", concurrent=2, trials=2)
    process = start_tune(tmp_path, study)
    wait_for_trial(tmp_path, study, process, 0, step=2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130, log_of(tmp_path)
    assert "posmlp tune --resume" in log_of(tmp_path)
    assert "Traceback" not in log_of(tmp_path)
    assert {run.info.status for run in mlflow_runs(study)[1]} == {"KILLED"}
    wait_until(lambda: alive() == ([], []))
    assert start_tune(tmp_path, study, resume=True).wait(timeout=300) == 0, log_of(tmp_path)
    check_whole(study, 2)


NODE_KILLED = """
import json, sys, threading, time

import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from pipelines.runs import checkpoints
from pipelines.studies.study import Study
from pipelines.tuning.tune import tune

# The driver's node has no CPUs, so that workers and decoders are on the others.
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 2**28})
nodes = [cluster.add_node(num_cpus=2, object_store_memory=2**28) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False, logging_level="WARNING")
study = Study.model_validate_json(open(sys.argv[1]).read())


def kill():
    while not any(f.info and f.info.step >= 3 for f in checkpoints.find(f"{study.folder}/trial-000")):
        time.sleep(0.1)
    here = ray.get_runtime_context().get_node_id()
    groups = [g for g in placement_group_table().values() if g["state"] == "CREATED"]
    places = {node for group in groups for node in group["bundles_to_node_id"].values()} - {here}
    cluster.remove_node(next(n for n in nodes if n.node_id in places), allow_graceful=False)
    print("killed", flush=True)


threading.Thread(target=kill, daemon=True).start()
try:
    tune(study)
finally:
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.slow
def test_a_killed_node_is_survived(motion_set, tmp_path):
    study = study_for(tmp_path, motion_set, "train.epochs=4", concurrent=1, trials=2)
    (tmp_path / "study.json").write_text(study.model_dump_json())
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, "-c", NODE_KILLED, str(tmp_path / "study.json")]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "killed" in ended.stdout
    check_whole(study, 2)


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_cluster_without_room_for_decoding_is_refused(local_ray, motion_set, tmp_path):
    recipe = recipe_for(tmp_path, motion_set, "scaling.cpus_per_worker=1")
    assert capacity.max_concurrent_trials(recipe) == 3  # of four CPUs, one decodes
    with pytest.raises(UserError, match="1 workers x 4 CPUs leave 0 of 4 CPUs for decoding"):
        tune(study_for(tmp_path, motion_set, "scaling.cpus_per_worker=4"))
