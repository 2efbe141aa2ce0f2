"""Jobs as users submit them, to a cluster that ``ray start`` has made: their logs, exit codes and ends, and where their
work goes."""

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from ray_nodes import RAY, RayNodes
from small_runs import QUICK, recipe_for, run_of

from pipelines import checkpoints
from pipelines.runs import read_record

pytestmark = pytest.mark.ray
HERE = Path(__file__).parents[1]
PLACED = ["scaling.train_on={group: two}", "scaling.decode_on={group: one}"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    nodes = RayNodes(tmp_path_factory.mktemp("n"))
    for name in ("one", "two"):
        nodes.add(name, "--num-cpus=2")
    nodes.wait()
    yield nodes
    nodes.stop()


def job(cluster, *command, options=()):
    """A submitted job, as a process that follows its log."""
    submit = [RAY, "job", "submit", "--address", cluster.jobs, "--working-dir", str(HERE), *options, "--", *command]
    return subprocess.Popen(
        submit, env=cluster.env, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run_job(cluster, *command, options=()):
    """Its exit code and output."""
    process = job(cluster, *command, options=options)
    out, _ = process.communicate(timeout=300)
    return process.returncode, out


POSMLP = (sys.executable, "-m", "pipelines.cli")


def recipe_file(folder, motion_set, *overrides):
    recipe = recipe_for(folder, motion_set, *QUICK, *overrides)
    path = folder / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    return recipe, str(path)


def places(cluster, kind, name):
    """The nodes on which tasks or actors of a name have been."""
    rows, names = cluster.listing(kind), cluster.names()
    named = [row for row in rows if name in f"{row.get('name')} {row.get('class_name')}" and row["node_id"]]
    return {names[row["node_id"]] for row in named}


def test_the_doctor_is_content_with_the_cluster(cluster, motion_set, tmp_path):
    _, path = recipe_file(tmp_path, motion_set, *PLACED)
    code, out = run_job(cluster, *POSMLP, "doctor", path)
    assert code == 0 and "nodes that answer: 3 of 3, 4 CPUs" in out and "0 warn, 0 fail" in out, out
    assert float(re.search(r"the job's working directory: \d+ files, ([\d.]+) MiB", out)[1]) < 8


def test_a_run_is_trained_and_tested_by_jobs(cluster, motion_set, tmp_path):
    """On the nodes that the recipe names; there is always room for one block where decoding is wanted. What each node
    does meanwhile is in MLflow."""
    recipe, path = recipe_file(tmp_path, motion_set, *PLACED, "data.rows_per_block=16")
    often = '--runtime-env-json={"env_vars": {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1"}}'
    code, out = run_job(cluster, *POSMLP, "train", path, options=[often])
    assert code == 0, out
    _, run = run_of(recipe)
    sampled = {key.split("/")[1] for key in run.data.metrics if re.match(r"system/.+/cpu_utilization_percentage", key)}
    assert sampled == {f"{socket.gethostname()}-{id[:6]}" for id in cluster.names()}
    assert places(cluster, "actors", "RayTrainWorker") == {"two"}
    assert places(cluster, "tasks", "decode_block") == {"one"}
    assert "epoch 2/2" in out and "validation top-1" in out
    assert read_record(f"{tmp_path}/{recipe.name}")["metrics"]
    code, out = run_job(cluster, *POSMLP, "evaluate", f"{tmp_path}/{recipe.name}")
    assert code == 0 and "top-1" in out, out


@pytest.mark.slow
def test_a_study_is_a_job(cluster, motion_set, tmp_path):
    """Two trials, trained on the node that the recipe names."""
    _, path = recipe_file(tmp_path, motion_set, *PLACED, "name=look", f"data.cache_dir={tmp_path}/cache")
    code, out = run_job(cluster, *POSMLP, "tune", path, "--space", "block_types", "--trials", "2")
    assert code == 0, out
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("posmlp").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 3
    assert sum("mlflow.parentRunId" in run.data.tags for run in runs) == 2
    assert places(cluster, "actors", "RayTrainWorker") == {"two"}


def test_what_would_be_lost_with_the_job_is_refused(cluster, motion_set, tmp_path):
    _, path = recipe_file(tmp_path, motion_set)
    code, out = run_job(cluster, *POSMLP, "train", path, "train.storage=runs")
    assert code == 1 and "which Ray deletes after the job; give train.storage as an absolute path" in out, out


def test_a_job_that_fails_says_why_in_its_last_lines(cluster, motion_set, tmp_path):
    _, path = recipe_file(tmp_path, motion_set, "data.train.path=/nowhere/train.csv")
    code, out = run_job(cluster, *POSMLP, "train", path)
    assert code == 1
    last = [line for line in out.splitlines() if line.strip()][-8:]
    assert any("/nowhere/train.csv" in line for line in last), out


@pytest.mark.slow
def test_a_stopped_job_goes_on_with_the_next(cluster, motion_set, tmp_path):
    recipe, path = recipe_file(tmp_path, motion_set, "train.epochs=30")
    process = job(cluster, *POSMLP, "train", path, options=("--submission-id", "stop-me"))
    deadline = time.monotonic() + 120
    while not any(f.about and f.about.step >= 8 for f in checkpoints.find(f"{tmp_path}/{recipe.name}")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    stop = subprocess.run([RAY, "job", "stop", "--address", cluster.jobs, "stop-me"], env=cluster.env, timeout=120)
    assert stop.returncode == 0
    out, _ = process.communicate(timeout=120)
    assert "STOPPED" in out or "stopped" in out, out
    done = [f.about.epoch for f in checkpoints.find(f"{tmp_path}/{recipe.name}") if f.about][-1]
    code, out = run_job(cluster, *POSMLP, "train", path, "train.epochs=30")
    assert code == 0, out
    assert re.search(r"going on after epoch \d+", out) and 1 <= done < 30


def test_a_job_without_the_token_is_refused(cluster):
    env = {k: v for k, v in cluster.env.items() if k != "RAY_AUTH_TOKEN"} | {"HOME": "/nonexistent"}
    command = [RAY, "job", "list", "--address", cluster.jobs]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0 and "oken" in ended.stderr + ended.stdout


def test_the_upload_is_small(cluster):
    """What a job's working directory is packed to: the source, without data, runs and environments."""
    look = "import pathlib; files = [path for path in pathlib.Path().rglob('*') if path.is_file()]\n"
    look += "print('THERE', *{path.parts[0] for path in files})\nprint('BYTES', sum(p.stat().st_size for p in files))"
    code, out = run_job(cluster, sys.executable, "-c", look)
    assert code == 0, out
    told = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith(("THERE", "BYTES"))}
    assert int(told["BYTES"][0]) < 8e6, told
    assert {"posmlp", "pipelines", "tune_spaces", "cluster.yaml"} <= {*told["THERE"]}
    assert not {".venv", ".git", "runs", "data", "mlruns"} & {*told["THERE"]}
