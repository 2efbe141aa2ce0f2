"""Faults that a run survives, with real processes, signals and file systems; docs/training.md has the table."""

import json
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time

import psutil
import pytest
import ray
import torch
from mlflow import MlflowClient
from ray.util.state import list_actors
from safetensors.torch import load_file

from pipelines.cli import main
from pipelines.runs import checkpoints
from pipelines.runs.errors import RunError
from pipelines.tracking.journal import JournalState
from pipelines.tracking.operations import from_json
from pipelines.training.train import train
from posmlp import storage
from posmlp.errors import UserError
from tests.helpers.mlflow_server import MlflowServer
from tests.helpers.small_runs import log_of, recipe_for, run_of, start_cli, wait_for_step
from tests.helpers.tracker_runs import rows
from tests.helpers.waiting import until

pytestmark = pytest.mark.ray

EXACT = ["train.epochs=10", "model.drop_path=0.2", "scaling.threads_per_worker=1", "train.checkpoint_every_steps=1"]
LAST_STEP = 40


def final_weights(run):
    """The weights at the end of a run of ``EXACT``."""
    found = checkpoints.find(str(run))[-1]
    assert found.info.step == LAST_STEP
    return load_file(f"{found.uri}/{checkpoints.WEIGHTS}")


def same(one, other):
    return all(torch.equal(one[k], other[k]) for k in one)


def distance(one, other):
    """The distance of two sets of weights, relative to their size."""
    apart, size = (sum(float(x.double().square().sum()) for x in t) for t in (
        [one[k] - other[k] for k in one], list(other.values())))  # fmt: skip
    return math.sqrt(apart / size)


@pytest.fixture(scope="module")
def straight(local_ray, motion_set, tmp_path_factory):
    """The final weights of an uninterrupted run on one worker."""
    folder = tmp_path_factory.mktemp("straight")
    return final_weights(train(recipe_for(folder, motion_set, *EXACT)).path)


@pytest.fixture(scope="module")
def straight_of_detection(local_ray, scene_set, tmp_path_factory):
    """The final weights of an uninterrupted run of detection."""
    folder = tmp_path_factory.mktemp("straight")
    return final_weights(train(recipe_for(folder, scene_set, *EXACT)).path)


@pytest.fixture(params=["recognition", pytest.param("detection", marks=pytest.mark.slow)])
def task(request):
    """The data set of a task, and the final weights of its uninterrupted run."""
    of_task = {"recognition": ("motion_set", "straight"), "detection": ("scene_set", "straight_of_detection")}
    return tuple(request.getfixturevalue(name) for name in of_task[request.param])


def training_workers():
    """The training worker processes of the tests' Ray."""
    here = ray.get_runtime_context().gcs_address
    alive = list_actors(address=here, filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")])
    return [psutil.Process(actor.pid) for actor in alive]


def check_every_epoch_once(config):
    """The one MLflow run is finished and has every epoch once."""
    client, run = run_of(config)
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == list(range(1, 11))
    assert run.info.status == "FINISHED"


def test_a_run_that_is_stopped_killed_and_damaged_loses_nothing(task, tmp_path, capsys):
    """Ctrl-C in mid-epoch, ``kill -9`` in another, and then the newest checkpoint is damaged; it resumes each time."""
    data_set, straight = task
    run, dice = str(tmp_path / "small"), random.Random(os.getpid())
    _, process = start_cli(tmp_path, data_set, *EXACT[:-1], "train.checkpoint_every_steps=1000")
    wait_for_step(tmp_path, process, 4)  # the first epoch's
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, log_of(tmp_path)
    config, process = start_cli(tmp_path, data_set, *EXACT)
    assert run_of(config)[1].info.status == "KILLED"
    stopped = checkpoints.find(run)[-1].info.step
    assert 4 <= stopped < 30
    wait_for_step(tmp_path, process, stopped + dice.randint(1, 8))
    workers = training_workers()
    process.kill()
    _, alive = psutil.wait_procs(workers, timeout=60)  # they live a little longer than the driver, and save
    assert not alive
    newest = [found for found in checkpoints.find(run) if found.info][-1].uri
    with open(f"{newest}/{checkpoints.STATE}", "r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    assert main(["checkpoints", run]) == 1
    assert f"{newest} is damaged: state.pt does not match its checksum" in capsys.readouterr().out
    assert start_cli(tmp_path, data_set, *EXACT)[1].wait(timeout=300) == 0, log_of(tmp_path)
    log = log_of(tmp_path)
    assert log.count("resuming after epoch") == 2 and f"skipped checkpoint: {newest} is damaged" in log
    assert "Traceback" not in log
    check_every_epoch_once(config)
    assert same(final_weights(run), straight)


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_nothing_is_lost(task, tmp_path):
    data_set, straight = task
    config, process = start_cli(tmp_path, data_set, *EXACT)
    wait_for_step(tmp_path, process, 6)
    (worker,) = training_workers()
    worker.kill()
    assert process.wait(timeout=300) == 0, log_of(tmp_path)
    assert "workers were lost (1 of 3 times); resuming after epoch" in log_of(tmp_path)
    check_every_epoch_once(config)
    assert same(final_weights(tmp_path / "small"), straight)


@pytest.mark.slow
@pytest.mark.parametrize("victims", [1, 2], ids=["one", "all"])
def test_killed_workers_of_two_are_replaced_and_nothing_is_lost(straight, motion_set, tmp_path, victims):
    config, process = start_cli(tmp_path, motion_set, *EXACT, "scaling.workers=2", "model.drop_path=0")
    wait_for_step(tmp_path, process, 6)
    workers = training_workers()
    assert len(workers) == 2
    for worker in workers[:victims]:
        worker.kill()
    assert process.wait(timeout=300) == 0, log_of(tmp_path)
    assert "workers were lost" in log_of(tmp_path)
    check_every_epoch_once(config)
    uninterrupted = train(recipe_for(tmp_path / "two", motion_set, *EXACT, "scaling.workers=2", "model.drop_path=0"))
    assert same(final_weights(tmp_path / "small"), final_weights(uninterrupted.path))


@pytest.mark.slow
def test_more_worker_losses_than_allowed_end_the_run(local_ray, motion_set, tmp_path):
    _, process = start_cli(tmp_path, motion_set, *EXACT, "scaling.max_failures=0")
    wait_for_step(tmp_path, process, 2)
    (worker,) = training_workers()
    worker.kill()
    assert process.wait(timeout=300) == 1
    assert "training failed" in log_of(tmp_path)
    assert "Traceback" not in log_of(tmp_path)


@pytest.mark.slow
def test_sigterm_saves_and_stops_with_its_exit_code(task, tmp_path):
    data_set, straight = task
    overrides = [*EXACT[:-1], "train.checkpoint_every_steps=1000"]
    config, process = start_cli(tmp_path, data_set, *overrides, "train.epochs=10")
    wait_for_step(tmp_path, process, 4)  # after the first epoch
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143, log_of(tmp_path)
    log = log_of(tmp_path)
    assert "SIGTERM: saving and stopping" in log
    assert "stopped after epoch" in log
    assert "the same command resumes from the last checkpoint" in log
    assert "Traceback" not in log
    assert run_of(config)[1].info.status == "KILLED"
    assert start_cli(tmp_path, data_set, *overrides)[1].wait(timeout=300) == 0
    assert same(final_weights(tmp_path / "small"), straight)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def on_disk(tmp_path, small_disk):
    """A run on the small disk, whose MLflow store is elsewhere."""
    (tmp_path / "mlflow").mkdir(exist_ok=True)
    return [*EXACT, f"train.storage={small_disk}", f"tracking.uri=sqlite:///{tmp_path}/mlflow/mlflow.db"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_cannot_be_written_ends_the_run_clearly(straight, motion_set, tmp_path, small_disk, fault):
    """The last checkpoint is intact, and the run resumes from it when there is room again."""
    overrides = on_disk(tmp_path, small_disk)
    _config, process = start_cli(tmp_path, motion_set, *overrides)
    wait_for_step(tmp_path, process, 3, storage=small_disk)
    if fault == "full":
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))
    else:  # only this folder, as files of the run are open
        folder = str(small_disk / "small" / "checkpoints")
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
    assert process.wait(timeout=300) == 1, log_of(tmp_path)
    log = log_of(tmp_path)
    assert {"full": "No space left", "read-only": "Read-only file system"}[fault] in log
    assert "checkpoints before it are intact" in log.lower()
    assert "Traceback" not in log
    run = str(small_disk / "small")
    assert [f.info.step for f in checkpoints.find(run, check=True) if f.info]
    if fault == "full":
        filler.unlink()
    else:
        subprocess.run(["umount", folder], check=True)
    train(recipe_for(tmp_path, motion_set, *overrides))
    assert same(final_weights(run), straight)


def test_storage_that_cannot_be_written_is_refused_at_the_start(local_ray, motion_set, tmp_path, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    overrides = [*on_disk(tmp_path, small_disk), "train.epochs=1"]
    with pytest.raises(UserError, match=r"small cannot be written, see train\.storage: .*Read-only"):
        train(recipe_for(tmp_path, motion_set, *overrides))


@pytest.mark.slow
def test_a_step_that_explodes_ends_the_run_and_is_saved(local_ray, motion_set, tmp_path):
    config = recipe_for(tmp_path, motion_set, "optim.lr=1e30", "optim.warmup_epochs=0", "scaling.workers=2")
    with pytest.raises(RunError, match=r"step \d+ exploded: loss .* its batch, are in .*Lower optim\.lr") as error:
        train(config)
    (step,) = (tmp_path / "small" / "exploded" / "checkpoints").iterdir()
    assert str(step) in str(error.value)
    about, contents = checkpoints.load(str(step))
    assert all(v.isfinite().all() for v in contents[checkpoints.WEIGHTS].values())  # the batch norms' statistics too
    assert about.step == int(step.name.removeprefix("step-"))
    for rank in (0, 1):
        assert load_file(step / f"batch-{rank}.safetensors")["clips"].shape == (4, 4, 32, 32, 3)


@pytest.mark.slow
def test_a_changed_recipe_is_refused_on_resume_unless_changes_are_allowed(local_ray, motion_set, tmp_path, capsys):
    _, process = start_cli(tmp_path, motion_set, *EXACT)
    wait_for_step(tmp_path, process, 2)
    process.kill()
    process.wait()
    changed = recipe_for(tmp_path, motion_set, *EXACT, "optim.lr=1e-4", "scaling.max_failures=1")
    with pytest.raises(RunError, match=r"(?s)--allow-changes.*optim\.lr: was 0\.003, is 0\.0001") as error:
        train(changed)
    assert "max_failures" not in str(error.value)
    train(changed, allow_changes=True)
    _, run = run_of(changed)
    assert run.data.tags["changed.optim.lr"] == "was 0.003, is 0.0001"


@pytest.mark.slow
def test_another_number_of_workers_resumes_with_the_same_batches(straight, motion_set, tmp_path):
    """Equal up to rounding, which ten epochs of AdamW amplify. Drop path is off, as each worker draws its own."""
    overrides = [*EXACT, "model.drop_path=0"]
    _config, process = start_cli(tmp_path, motion_set, *overrides, "scaling.workers=2")
    wait_for_step(tmp_path, process, 7)
    process.kill()
    process.wait()
    train(recipe_for(tmp_path, motion_set, *overrides, "scaling.workers=1"))
    one = train(recipe_for(tmp_path / "one", motion_set, *overrides))
    apart = distance(final_weights(tmp_path / "small"), final_weights(one.path))
    assert apart < 0.02
    assert distance(straight, final_weights(one.path)) > 5 * apart  # other noise moves the weights much further


NODE_KILLED = """
import logging
import sys

import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from pipelines.training.train import train
from posmlp.config import load_recipe

# The driver's node has no CPUs, so that the worker and the decoders are on the others.
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 2**28})
nodes = [cluster.add_node(num_cpus=2, object_store_memory=2**28) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False, logging_level="WARNING")
killed = []


class KillNode(logging.StreamHandler):
    def emit(self, record):
        super().emit(record)
        if record.getMessage().startswith("epoch 3/") and not killed:
            (group,) = [g for g in placement_group_table().values() if g["state"] == "CREATED"]
            (worker_node,) = group["bundles_to_node_id"].values()
            (node,) = [n for n in nodes if n.node_id == worker_node]
            cluster.remove_node(node, allow_graceful=False)
            killed.append(node)


logging.getLogger("pipelines").addHandler(KillNode(sys.stdout))
logging.getLogger("pipelines").setLevel(logging.INFO)
try:
    train(load_recipe(sys.argv[1]))
finally:
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.slow
def test_a_run_survives_a_killed_node(straight, motion_set, tmp_path):
    """A raylet with all its processes: the worker, the decoders and their part of the object store."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_for(tmp_path, motion_set, *EXACT).to_yaml())
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, "-c", NODE_KILLED, str(recipe)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "workers were lost (1 of 3 times)" in done.stdout
    assert same(final_weights(tmp_path / "small"), straight)


@pytest.mark.slow
def test_a_run_on_an_object_store_is_resumed(straight, s3, motion_set, tmp_path):
    """With its own Ray, whose workers find the store through their environment."""
    place, uri = f"s3://videos/{tmp_path.name}", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_for(tmp_path, motion_set, *EXACT, f"train.storage={place}", uri).to_yaml())
    env = os.environ | {"RAY_ADDRESS": "local", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "pipelines.cli", "train", str(recipe)]
    with open(tmp_path / "log.txt", "a") as log:
        process = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while not any(f.info and f.info.step >= 5 for f in checkpoints.find(f"{place}/small")):
            assert process.poll() is None and time.monotonic() < deadline, log_of(tmp_path)
            time.sleep(0.2)
        process.kill()
        process.wait()
        assert subprocess.run(command, env=env, cwd=tmp_path, stdout=log, stderr=log, timeout=400).returncode == 0
    assert "resuming after epoch" in log_of(tmp_path)
    _, contents = checkpoints.load(checkpoints.find(f"{place}/small")[-1].uri)
    assert same(contents[checkpoints.WEIGHTS], straight)


@pytest.mark.slow
def test_a_second_driver_of_a_run_on_an_object_store_is_refused(s3, motion_set, tmp_path):
    place, uri = f"s3://videos/{tmp_path.name}", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    recipe = tmp_path / "recipe.yaml"
    keys = [*EXACT, "train.epochs=5000", f"train.storage={place}", uri]
    recipe.write_text(recipe_for(tmp_path, motion_set, *keys).to_yaml())
    env = os.environ | {"RAY_ADDRESS": "local", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "pipelines.cli", "train", str(recipe)]
    with open(tmp_path / "log.txt", "a") as log:
        first = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 300
            while not any(f.info and f.info.step >= 5 for f in checkpoints.find(f"{place}/small")):
                assert first.poll() is None and time.monotonic() < deadline, log_of(tmp_path)
                time.sleep(0.2)
            second = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200)
            assert second.returncode == 1
            assert f"{place}/small is in use by another process: host " in second.stderr
            assert f"process {first.pid}" in second.stderr and "Traceback" not in second.stderr
            assert first.poll() is None
            first.terminate()
            assert first.wait(timeout=60) == 128 + 15
        finally:
            first.kill()
            first.wait()
    assert len(mlflow_runs(tmp_path)) == 1


QUICK_UPLOADS = """
import sys
from pipelines.cli import main
from pipelines.tracking import journal
journal.FLUSH_S = 0.5
sys.exit(main(["train", sys.argv[1]]))
"""


def journal_on(run):
    """The state of a run, as the journal on its storage tells it."""
    lines = []
    for session in storage.list_folders(f"{run}/tracking/journal")[-1:]:
        files = [name for name in storage.list_files(session) if name.startswith("lines-")]
        lines = b"".join(storage.read_bytes(f"{session}/{name}") for name in files).splitlines()
    state = JournalState()
    for line in lines:
        state.apply(from_json(json.loads(line)))
    return state


@pytest.mark.slow
def test_a_driver_killed_while_mlflow_is_down_is_resumed_elsewhere_and_mlflow_gets_all_once(s3, motion_set, tmp_path):
    """The second driver starts on a machine that has nothing, and MLflow comes back while it trains."""
    (tmp_path / "mlflow").mkdir()
    server, run = MlflowServer(tmp_path / "mlflow"), f"s3://videos/{tmp_path.name}/small"
    keys = [*EXACT, "train.epochs=30", f"train.storage=s3://videos/{tmp_path.name}", f"tracking.uri={server.uri}"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_for(tmp_path, motion_set, *keys).to_yaml())
    env = os.environ | {"RAY_ADDRESS": "local", "PYTHONPATH": os.getcwd()}

    def start_on(machine):
        (tmp_path / machine).mkdir()
        command = [sys.executable, "-c", QUICK_UPLOADS, str(recipe)]
        with open(tmp_path / "log.txt", "a") as log:
            return subprocess.Popen(command, env=env, cwd=tmp_path / machine, stdout=log, stderr=log)

    server.start()
    process = start_on("one")
    try:
        until(lambda: process.poll() is not None or journal_on(run).last_epoch >= 2, 300)
        assert process.poll() is None, log_of(tmp_path)
        server.kill()
        down = journal_on(run).last_epoch
        until(lambda: process.poll() is not None or journal_on(run).last_epoch >= down + 3, 300)
        assert process.poll() is None, log_of(tmp_path)
        process.kill()
        process.wait()
        left = journal_on(run)
        assert 0 < len(rows(server.database, left.run_id)) < left.last_epoch < 30
        process = start_on("two")
        until(lambda: process.poll() is not None or journal_on(run).last_epoch > left.last_epoch, 240)
        assert process.poll() is None, log_of(tmp_path)
        server.start()
        assert process.wait(timeout=240) == 0, log_of(tmp_path)
        assert "resuming after epoch" in log_of(tmp_path) and "Traceback" not in log_of(tmp_path)
        assert main(["sync", run]) == 0
        with sqlite3.connect(server.database) as connection:
            points = connection.execute("SELECT key, step FROM metrics WHERE run_uuid = ?", (left.run_id,)).fetchall()
        assert len(points) == len(set(points))
        for name in ("train/loss", "val/top1"):
            assert sorted(step for key, step in points if key == name) == list(range(1, 31))
        assert {step for key, step in points if key == "by_step/train_loss"} >= {4 * 30}
        client = MlflowClient(server.uri)
        (found,) = client.search_runs([client.get_experiment_by_name("posmlp").experiment_id])
        assert (found.info.run_id, found.info.status) == (left.run_id, "FINISHED")
        assert "confusion.png" in {file.path for file in client.list_artifacts(left.run_id)}
        assert not (tmp_path / "two" / "runs").exists()
    finally:
        process.kill()
        process.wait()
        server.kill()


def mlflow_runs(folder):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder}/mlflow.db").search_runs(["1"])


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_a_run_survives_an_mlflow_server_that_never_returns(straight, motion_set, tmp_path, capsys):
    port = free_port()
    store = [f"--backend-store-uri=sqlite:///{tmp_path}/server.db", f"--artifacts-destination={tmp_path}/artifacts"]
    command = [sys.executable, "-m", "mlflow", "server", f"--port={port}", "--workers=1", *store]
    env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # it triples the start time

    def serve():
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        server = subprocess.Popen(command, env=env, start_new_session=True, **quiet)
        while subprocess.run(["curl", "-sf", f"http://127.0.0.1:{port}/health"], capture_output=True).returncode:
            assert server.poll() is None
            time.sleep(0.3)
        return server

    server = serve()
    try:
        uri = f"tracking.uri=http://127.0.0.1:{port}"
        _config, process = start_cli(tmp_path, motion_set, *EXACT, uri)
        wait_for_step(tmp_path, process, 3)
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        assert process.wait(timeout=200) == 0, log_of(tmp_path)
        assert "does not answer" in log_of(tmp_path)
        assert "posmlp sync" in log_of(tmp_path)
        assert same(final_weights(tmp_path / "small"), straight)
        server = serve()
        assert main(["sync", str(tmp_path / "small")]) == 0, capsys.readouterr()
        client = MlflowClient(f"http://127.0.0.1:{port}")
        (run,) = client.search_runs([client.get_experiment_by_name("posmlp").experiment_id])
        assert [m.step for m in client.get_metric_history(run.info.run_id, "val/top1")] == list(range(1, 11))
        assert run.info.status == "FINISHED"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
