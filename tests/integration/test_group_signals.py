"""Signals to a command's whole process group, as ``timeout``, Slurm, systemd and some shells send them, and to all its
processes wherever they are, as systemd sends them by default: the command saves and stops, and leaves nothing running.

Each command starts a Ray of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
from mlflow import MlflowClient

from pipelines.runs import checkpoints
from pipelines.tracking.uris import tracking_uri
from tests.helpers.small_runs import log_of, recipe_for, run_of, study_for, wait_for_step
from tests.helpers.untrained_run import write_untrained_run
from tests.helpers.waiting import until

pytestmark = [pytest.mark.ray, pytest.mark.skipif(sys.platform != "linux", reason="Ray is shielded on Linux only")]

LONG = ["train.epochs=500", "scaling.threads_per_worker=1", "train.checkpoint_every_steps=1000"]
STEPS = 4  # of an epoch
DRIVER = """
import time, ray
from pipelines.cluster.session import start_ray
start_ray(num_cpus=1)

@ray.remote(num_cpus=0)
class Worker:
    def answer(self):
        return "ready"

worker = Worker.remote()
print(ray.get(worker.answer.remote()), flush=True)
while input() == "ask":
    print(ray.get(worker.answer.remote()), flush=True)
"""


class Command:
    """A command in a new session, with its own Ray; ``with`` kills what is left of it.

    Attributes:
        folder: has the output, in log.txt.
        process: the command itself.
        tree: all processes that it was seen to have, by id.
    """

    def __init__(self, folder, *words, code=None, **pipes):
        self.folder = folder
        command = [sys.executable, *(["-c", code] if code else ["-m", "pipelines.cli", *map(str, words)])]
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        env |= {"RAY_ADDRESS": "local", "PYTHONPATH": os.getcwd(), "RAY_USAGE_STATS_ENABLED": "0"}
        with open(folder / "log.txt", "a") as log:
            streams = {"stdout": log, "stderr": log, "stdin": subprocess.DEVNULL} | pipes
            self.process = subprocess.Popen(command, env=env, cwd=folder, start_new_session=True, text=True, **streams)
        self.tree = {self.process.pid: psutil.Process(self.process.pid)}  # psutil notices when a pid is another's

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.look():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def look(self):
        """The processes that it is seen to have; a later call finds them even if they have lost their parents."""
        with suppress(psutil.NoSuchProcess):
            self.tree |= {each.pid: each for each in self.tree[self.process.pid].children(recursive=True)}
        return [each for each in self.tree.values() if runs(each)]

    def log(self):
        return log_of(self.folder)

    def wait_for(self, text, count=1, seconds=120):
        """Wait until the output has a text so many times."""
        until(lambda: self.process.poll() is not None or len(re.findall(text, self.log(), re.M)) >= count, seconds)
        assert self.process.poll() is None, self.log()

    def signal_group(self, signum):
        self.look()
        os.killpg(self.process.pid, signum)

    def signal_all(self, signum):
        for process in self.look():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signum)

    def check_end(self, code, seconds=90):
        """It ends with this exit code, without a traceback, and none of its processes lives on."""
        assert self.process.wait(seconds) == code, self.log()
        assert "Traceback" not in self.log() and "*** SIG" not in self.log(), self.log()
        self.check_nothing_is_left()

    def check_nothing_is_left(self, seconds=15):
        until(lambda: not self.look(), seconds)


def runs(process):
    """Whether a process runs; one that has ended and was not collected does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def command_of(process):
    """The command line of a process; empty if it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def train(folder, motion_set, *overrides):
    """Start ``posmlp train``; returns its recipe and the command."""
    config = recipe_for(folder, motion_set, *LONG, *overrides)
    recipe = folder / "recipe.yaml"
    recipe.write_text(config.to_yaml())
    return config, Command(folder, "train", recipe)


def saved_position(folder):
    """Step of the newest checkpoint, and the step at which the log says that the run stopped."""
    (epoch, step) = re.findall(r"^stopped after epoch (\d+)(?:, step (\d+))?$", log_of(folder), re.M)[-1]
    newest = [found.info.step for found in checkpoints.find(str(folder / "small"), check=True) if found.info][-1]
    return newest, STEPS * int(epoch) + int(step or 0)


def test_ray_started_here_is_not_reached_by_signals_and_ends_with_its_driver(tmp_path):
    """Signals to each of its processes are what systemd sends; ``kill -9`` of the driver lets it do nothing."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with Command(tmp_path, code=DRIVER, **pipes) as command:
        assert command.process.stdout.readline() == "ready\n", command.log()
        of_ray = [each for each in command.look() if each.pid != command.process.pid]
        assert {"raylet", "gcs_server"} <= {each.name() for each in of_ray}
        assert all(os.getsid(each.pid) != command.process.pid for each in of_ray)
        needed = [each for each in of_ray if "dashboard" not in command_of(each).lower()]
        for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            for each in of_ray:
                with suppress(psutil.NoSuchProcess):
                    each.send_signal(signum)
        time.sleep(1)
        print("ask", file=command.process.stdin, flush=True)
        assert command.process.stdout.readline() == "ready\n", command.log()
        assert all(each.is_running() for each in needed if each.name() in ("raylet", "gcs_server", "ray::Worker"))
        command.process.kill()
        command.process.wait()
        command.check_nothing_is_left()


def test_sigterm_to_the_group_of_a_run_is_a_clean_stop(motion_set, tmp_path):
    """Twice at once, as ``timeout`` sends it. It saves the step that it is in, and the run can be resumed."""
    config, command = train(tmp_path, motion_set)
    with command:
        wait_for_step(tmp_path, command.process, STEPS)
        command.process.send_signal(signal.SIGTERM)
        command.signal_group(signal.SIGTERM)
        command.check_end(143)
    newest, stopped = saved_position(tmp_path)
    assert newest == stopped >= STEPS
    assert "interrupted; the same command resumes from the last checkpoint" in command.log()
    assert run_of(config)[1].info.status == "KILLED"


@pytest.mark.slow
def test_a_run_resumes_after_each_signal(motion_set, tmp_path):
    """Ctrl-C to the group, then SIGTERM to all processes wherever they are, then ``kill -9`` of the driver."""
    steps = []
    for count, (signum, code) in enumerate([(signal.SIGINT, 130), (signal.SIGTERM, 143)]):
        config, command = train(tmp_path, motion_set)
        with command:
            wait_for_step(tmp_path, command.process, (steps or [0])[-1] + STEPS)
            (command.signal_all if count else command.signal_group)(signum)
            command.check_end(code)
        newest, stopped = saved_position(tmp_path)
        assert newest == stopped
        steps.append(newest)
        assert run_of(config)[1].info.status == "KILLED"
    assert steps[1] > steps[0]
    with train(tmp_path, motion_set)[1] as command:
        command.wait_for("resuming after", 2)
        command.look()
        command.process.kill()
        command.process.wait()
        command.check_nothing_is_left()
    with train(tmp_path, motion_set, "train.epochs=20")[1] as command:  # shorter than it was: refused, so all is read
        assert command.process.wait(120) == 1
        assert "train.epochs" in command.log()


@pytest.mark.slow
def test_a_stop_during_validation_postpones_it(motion_set, tmp_path):
    config, command = train(tmp_path, motion_set, "eval.clips=60", "eval.crops=3")
    with command:
        wait_for_step(tmp_path, command.process, STEPS)  # saved before validation
        command.signal_group(signal.SIGTERM)
        command.check_end(143)
    assert saved_position(tmp_path) == (STEPS, STEPS)
    assert "val top-1" not in command.log()
    assert run_of(config)[1].info.status == "KILLED"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "signum", "code"),
    [
        ("imports", signal.SIGTERM, 143),
        ("raylet", signal.SIGINT, 130),
        ("raylet", signal.SIGTERM, 143),
        ("^Ray: started", signal.SIGTERM, 143),
        ("^MLflow:", signal.SIGINT, 130),
        ("RayTrainWorker", signal.SIGTERM, 143),
    ],
)
def test_a_stop_while_a_run_starts_is_clean(motion_set, tmp_path, moment, signum, code):
    config, command = train(tmp_path, motion_set)

    def seen():
        assert command.process.poll() is None, command.log()
        if moment == "imports":
            with open(f"/proc/{command.process.pid}/maps") as file:
                return "numpy" in file.read()
        if moment.startswith("^"):
            return re.search(moment, command.log(), re.M)
        return any(moment in command_of(each) for each in command.look())

    with command:
        until(seen, 120)
        command.signal_group(signum)
        command.check_end(code)
    if (tmp_path / "mlflow.db").exists():
        assert run_of(config)[1].info.status == "KILLED"
    with train(tmp_path, motion_set)[1] as command:  # nothing that the first one left is in the way
        wait_for_step(tmp_path, command.process, 2 * STEPS)


@pytest.mark.slow
def test_a_second_signal_to_the_group_ends_a_run_at_once(motion_set, tmp_path):
    config, command = train(tmp_path, motion_set)
    with command:
        command.wait_for("; starting$")  # the first step is seconds away
        command.signal_group(signal.SIGTERM)
        command.wait_for("send it again")
        time.sleep(1.2)
        if command.process.poll() is None:
            command.signal_group(signal.SIGTERM)
        assert command.process.wait(30) in (143, -15), command.log()
        assert "Traceback" not in command.log()
        command.check_nothing_is_left()
    assert run_of(config)[1].info.status == "KILLED"


@pytest.mark.slow
def test_sigterm_to_the_group_of_a_study_is_a_clean_stop(motion_set, tmp_path):
    """The trial saves its state, and the study resumes."""
    study = study_for(tmp_path, motion_set, "train.epochs=100", concurrent=1, trials=1)
    (tmp_path / "recipe.yaml").write_text(study.recipe.to_yaml())
    with Command(tmp_path, "tune", "recipe.yaml", "--space", "block_types", "--name", "look", "--trials", 1) as command:
        run = f"{study.folder}/trial-000"
        until(lambda: any(f.info and f.info.step >= 2 for f in checkpoints.find(run)) or command.process.poll(), 180)
        command.signal_group(signal.SIGTERM)
        command.check_end(143)
    assert "posmlp tune --resume" in command.log()
    client = MlflowClient(tracking_uri(study.recipe))
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])  # its own and the trial's
    assert sorted(run.info.status for run in runs) == ["KILLED", "KILLED"]
    step = [f.info.step for f in checkpoints.find(run, check=True) if f.info][-1]
    with Command(tmp_path, "tune", "--resume", study.folder) as command:
        until(lambda: any(f.info and f.info.step > step for f in checkpoints.find(run)) or command.process.poll(), 180)
        assert command.process.poll() is None, command.log()


@pytest.mark.slow
def test_sigterm_to_the_group_of_shard_check_and_evaluate_is_a_clean_stop(motion_set, tmp_path):
    words = ["data", "shard", motion_set / "train.csv", "--out", "out", "--rows-per-shard", 1, "--short-side", 24]
    with Command(tmp_path, *words) as command:
        until(lambda: len(list(tmp_path.glob("out/shards/*.parquet"))) >= 2 or command.process.poll(), 120)
        command.signal_group(signal.SIGTERM)
        command.check_end(143)
    assert "the same command resumes after the last finished shard" in command.log()
    assert not (tmp_path / "out" / "manifest.parquet").exists()
    with Command(tmp_path, *words) as command:
        assert command.process.wait(180) == 0, command.log()
    assert "shards exist already" in command.log() and (tmp_path / "out" / "manifest.parquet").exists()

    (tmp_path / "r").mkdir()
    untrained = write_untrained_run(tmp_path / "r", motion_set)
    with Command(tmp_path, "evaluate", untrained["run"], "eval.clips=60", "eval.crops=3") as command:
        command.wait_for("^Ray: started", 3)
        time.sleep(2)
        command.signal_group(signal.SIGINT)
        command.check_end(130)
