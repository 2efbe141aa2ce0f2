"""Jobs as users submit them, on a cluster started with ``ray start``: their logs, exit codes and stops, the nodes that
they use, and what can be monitored."""

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections import defaultdict
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from pipelines.runs import checkpoints
from pipelines.runs.record import read_record
from pipelines.tracking import prometheus
from tests.helpers.dashboard import expressions, metrics_of
from tests.helpers.ray_nodes import RAY, RayNodes, free_port
from tests.helpers.small_runs import QUICK, recipe_for, run_of, with_broken

pytestmark = pytest.mark.ray
HERE = Path(__file__).parents[2]
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
    """Submit a job; returns a process that follows its log."""
    submit = [RAY, "job", "submit", "--address", cluster.jobs, "--working-dir", str(HERE), *options, "--", *command]
    return subprocess.Popen(
        submit, env=cluster.env, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run_job(cluster, *command, options=()):
    """Submit a job and wait for it; returns its exit code and output."""
    process = job(cluster, *command, options=options)
    out, _ = process.communicate(timeout=300)
    return process.returncode, out


POSMLP = (sys.executable, "-m", "pipelines.cli")


def recipe_file(folder, motion_set, *overrides):
    recipe = recipe_for(folder, motion_set, *QUICK, f"data.cache_dir={folder}/cache", *overrides)
    path = folder / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    return recipe, str(path)


def nodes_used(cluster, kind, name):
    """The nodes that tasks or actors of a name have used."""
    rows, names = cluster.listing(kind), cluster.names()
    named = [row for row in rows if name in f"{row.get('name')} {row.get('class_name')}" and row["node_id"]]
    return {names[row["node_id"]] for row in named}


def test_the_doctor_finds_no_problem_and_the_upload_is_small(cluster, motion_set, tmp_path):
    """A job uploads the source, without data, runs and environments."""
    _, path = recipe_file(tmp_path, motion_set, *PLACED)
    look = "import pathlib; files = [path for path in pathlib.Path().rglob('*') if path.is_file()]\n"
    look += "print('THERE', *{path.parts[0] for path in files})\nprint('BYTES', sum(p.stat().st_size for p in files))"
    work = f"{shlex.join([sys.executable, '-c', look])} && {shlex.join([*POSMLP, 'doctor', path])}"
    code, out = run_job(cluster, "sh", "-c", work)
    assert code == 0 and "nodes that answer: 3 of 3, 4 CPUs" in out and "ready: 0 fail, 0 warn" in out, out
    assert float(re.search(r"the job's working directory: \d+ files, ([\d.]+) MiB", out)[1]) < 8
    printed = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith(("THERE", "BYTES"))}
    assert int(printed["BYTES"][0]) < 8e6, printed
    assert {"posmlp", "pipelines", "tune_spaces", "cluster.yaml"} <= {*printed["THERE"]}
    # An earlier job may have left its cache of clips, data/.
    assert not {".venv", ".git", "mlruns"} & {*printed["THERE"]}


@contextmanager
def prometheus_server(cluster, folder):
    """Prometheus with the project's settings, a short scrape interval and this cluster's nodes; yields its address."""
    settings = yaml.safe_load((HERE / "deploy" / "prometheus.yml").read_text())
    settings["global"]["scrape_interval"] = "1s"
    settings["scrape_configs"][0]["file_sd_configs"][0]["files"] = [str(cluster.discovery)]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    place = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
    with open(folder / "prometheus.log", "w") as log:
        server = subprocess.Popen([*command, f"--web.listen-address={place}"], stdout=log, stderr=log)
    yield place
    server.terminate()
    server.wait()


@pytest.fixture(scope="module")
def trained(cluster, motion_set, tmp_path_factory):
    """A run as a job, on the nodes that the recipe names, with two broken videos. The decoding node always has room for
    one block. MLflow gets system metrics of each node every second.

    Its recipe, its record, its output, the values of its Prometheus metrics in order, its states on Ray's dashboard,
    and the address of Prometheus if it is installed.
    """
    folder = tmp_path_factory.mktemp("trained")
    broken = [f"data.val.path={with_broken(motion_set, folder, 2)}", "data.val.root=/", "data.max_bad_fraction=0.2"]
    recipe, path = recipe_file(folder, motion_set, *PLACED, *broken, "data.rows_per_block=32", "train.epochs=4")
    often = '--runtime-env-json={"env_vars": {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1"}}'
    shown, states = defaultdict(list), []
    with prometheus_server(cluster, folder) if shutil.which("prometheus") else nullcontext() as server:
        process = job(cluster, *POSMLP, "train", path, options=[often])
        ended = False
        while not ended:
            with suppress(subprocess.TimeoutExpired):
                process.wait(1)
                ended = True
            for sample in cluster.scrape():
                if sample.labels.get("run") == recipe.name:
                    shown[sample.name].append(sample.value)
            with suppress(OSError):  # until Ray Train has a run
                states += [run["status"] for run in cluster.ask("/api/train/v2/runs/v1")["train_runs"]]
        out, _ = process.communicate()
        assert process.returncode == 0, out
        yield recipe, read_record(f"{folder}/{recipe.name}"), out, shown, states, server


def test_a_run_is_trained_by_a_job(cluster, trained):
    recipe, record, out, *_ = trained
    _, run = run_of(recipe)
    sampled = {key.split("/")[1] for key in run.data.metrics if re.match(r"system/.+/cpu_utilization_percentage", key)}
    assert sampled == {f"{socket.gethostname()}-{id[:6]}" for id in cluster.names()}
    assert nodes_used(cluster, "actors", "RayTrainWorker") == {"two"}
    assert nodes_used(cluster, "tasks", "decode_block") == {"one"}
    assert "epoch 4/4" in out and "validation top-1" in out
    assert record["metrics"]


def test_the_nodes_export_prometheus_metrics_of_a_run(trained):
    """The last value of each. What the worker sets in its last second may be lost with the worker."""
    _, record, _, shown, *_ = trained
    metrics = record["metrics"]
    last = {name.removeprefix("ray_posmlp_"): values[-1] for name, values in shown.items()}
    assert last["epoch"] == metrics["epoch"] == 4
    assert last["val_top1"] == metrics["val/top1"]
    assert last["bad_videos"] == metrics["data/bad"] == 2
    assert 2 <= last["decode_errors_total"] <= 2 * 4
    assert last["clips_per_second"] > 0 and 0 <= last["data_wait_fraction"] <= 1
    assert 0 < last["train_loss"] < 3  # a random guess has ln 8
    of_recognition = {*prometheus.GAUGES} - {"val_map"}
    assert {*last} == {*of_recognition, *(f"{name}_total" for name in prometheus.COUNTERS)}


def test_the_dashboard_shows_a_runs_state(trained):
    *_, states, _ = trained
    assert "RUNNING" in states
    assert states[-1] == "FINISHED"


def test_ray_exports_what_the_grafana_dashboard_draws(cluster):
    """Except for GPUs, which this machine may not have: Ray defines those metrics."""
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    wanted = {name for name in metrics_of(expressions()) if not name.startswith("ray_posmlp_")}
    gpus = {name for name in wanted if name.startswith(("ray_node_gpus", "ray_node_gram"))}
    assert {name.removeprefix("ray_") for name in gpus} <= {*METRICS_GAUGES}
    assert wanted - gpus and wanted - gpus <= {sample.name for sample in cluster.scrape()}


def test_the_dashboard_lists_the_nodes_for_prometheus(cluster):
    """For a Prometheus that cannot read the head's file; the request needs the token."""
    listed = cluster.ask("/api/prometheus/sd")
    assert len(listed[0]["targets"]) >= 3
    assert listed == json.loads(cluster.discovery.read_text())


@pytest.mark.skipif(not shutil.which("prometheus"), reason="Prometheus is not installed")
def test_prometheus_answers_what_the_grafana_dashboard_asks(trained):
    recipe, record, *_, server = trained

    def ask(expression):
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"http://{server}/api/v1/query?{query}", timeout=30) as answer:
            return json.load(answer)["data"]["result"]

    (series,) = ask(f'max_over_time(ray_posmlp_epoch{{run="{recipe.name}"}}[10m])')
    assert float(series["value"][1]) == record["metrics"]["epoch"]
    for expression in expressions():
        found = ask(expression.replace("$run", recipe.name))
        assert found or "posmlp" in expression or "ray_node_g" in expression, expression  # an ended run has none


@pytest.mark.slow
def test_a_study_is_a_job(cluster, motion_set, tmp_path):
    """Two trials, trained on the node that the recipe names."""
    _, path = recipe_file(tmp_path, motion_set, *PLACED, "name=look", f"data.cache_dir={tmp_path}/cache")
    code, out = run_job(cluster, *POSMLP, "tune", path, "--space", "block_types", "--trials", "2", "--no-asha")
    assert code == 0, out
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("posmlp").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 3
    assert sum("mlflow.parentRunId" in run.data.tags for run in runs) == 2
    assert nodes_used(cluster, "actors", "RayTrainWorker") == {"two"}


def test_a_job_that_fails_says_why_in_its_last_lines(cluster, motion_set, tmp_path):
    """A storage folder that would be deleted with the job is refused, and so is a missing list."""
    _, path = recipe_file(tmp_path, motion_set)
    runs = [
        shlex.join([*POSMLP, "train", path, key]) for key in ("train.storage=runs", "data.train.path=/nowhere/a.csv")
    ]
    code, out = run_job(cluster, "sh", "-c", "; ".join(runs))
    assert code == 1
    assert "which Ray deletes after the job; give train.storage as an absolute path" in out, out
    last = [line for line in out.splitlines() if line.strip()][-8:]
    assert any("/nowhere/a.csv" in line for line in last), out


@pytest.mark.slow
def test_the_next_job_resumes_a_stopped_one(cluster, motion_set, tmp_path):
    recipe, path = recipe_file(tmp_path, motion_set, "train.epochs=30")
    process = job(cluster, *POSMLP, "train", path, options=("--submission-id", "stop-me"))
    deadline = time.monotonic() + 120
    while not any(f.info and f.info.step >= 8 for f in checkpoints.find(f"{tmp_path}/{recipe.name}")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    stop = subprocess.run([RAY, "job", "stop", "--address", cluster.jobs, "stop-me"], env=cluster.env, timeout=120)
    assert stop.returncode == 0
    out, _ = process.communicate(timeout=120)
    assert "STOPPED" in out or "stopped" in out, out
    done = [f.info.epoch for f in checkpoints.find(f"{tmp_path}/{recipe.name}") if f.info][-1]
    code, out = run_job(cluster, *POSMLP, "train", path, "train.epochs=30")
    assert code == 0, out
    assert re.search(r"resuming after epoch \d+", out) and 1 <= done < 30


def test_a_job_without_the_token_is_refused(cluster):
    env = {k: v for k, v in cluster.env.items() if k != "RAY_AUTH_TOKEN"} | {"HOME": "/nonexistent"}
    command = [RAY, "job", "list", "--address", cluster.jobs]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0 and "oken" in ended.stderr + ended.stdout


def test_the_metrics_of_an_ended_run_disappear(cluster, trained):
    """Ray exports gauges for another 20 seconds; counters stay."""
    deadline = time.monotonic() + 60
    names = {f"ray_posmlp_{name}" for name in prometheus.GAUGES}
    while names & {sample.name for sample in cluster.scrape()}:
        assert time.monotonic() < deadline
        time.sleep(0.5)
