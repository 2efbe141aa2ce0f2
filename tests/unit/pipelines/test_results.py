"""A study's results are drawn by a process of their own: what is drawn when, and what happens when that fails."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from pipelines.runs.record import write_record
from pipelines.studies.study import Study, trial_folder
from pipelines.tracking.uris import tracking_uri
from pipelines.tuning import results
from pipelines.tuning.results import DrawingProcess, ResultsPublisher, Snapshot
from posmlp.config import load_recipe
from posmlp.metrics import STUDY_FINISHED
from tests.helpers import tracker_runs
from tests.helpers.finished_trials import trials_of
from tests.helpers.log_lines import log_lines
from tests.helpers.waiting import until

FILES = {"front.html", "front.png", "progress.png", "trials.csv"}


class Recorder:
    """Stands for a tracker: keeps what it is given, in order."""

    def __init__(self):
        self.files, self.metrics, self.tags = [], [], []

    def log_file(self, path, content):
        self.files.append(path)

    def log_metrics(self, metrics, step, run_id=None):
        self.metrics.append((step, metrics))

    def log_tags(self, tags):
        self.tags.append(tags)


@pytest.fixture
def study(tmp_path):
    recipe = load_recipe("demo", [f"train.storage={tmp_path}"])
    return Study(name="look", recipe=recipe, space="block_types", against="gmacs")


def drawn(study):
    return {path.name for path in Path(study.folder).glob("*.*")}


def rows_drawn(study):
    table = Path(study.folder, "trials.csv")
    return len(table.read_text().splitlines()) - 1 if table.exists() else 0


def finished(recorder):
    """The number of finished trials of each drawing."""
    return [int(metrics[STUDY_FINISHED]) for _, metrics in recorder.metrics if STUDY_FINISHED in metrics]


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_of_several_states_the_newest_is_drawn(study):
    recorder = Recorder()
    with ResultsPublisher(study, recorder, interval_s=1.0) as publisher:
        for count in range(1, 8):
            publisher.update(trials_of(count), {})
        until(lambda: finished(recorder))
        until(lambda: drawn(study) >= FILES)
        assert finished(recorder) == [7] and rows_drawn(study) == 7
        publisher.update(trials_of(8), {})
        publisher.finish(trials_of(9), {})
        assert finished(recorder) == [7, 9] and rows_drawn(study) == 9


def test_the_end_writes_everything_to_the_folder_and_to_mlflow(study, tmp_path):
    for number in range(5):
        config = study.recipe.model_copy(update={"name": f"trial-{number:03d}"})
        write_record(trial_folder(study, number), config, {}, "none", None)
    tracker = tracker_runs.start(tmp_path)
    with ResultsPublisher(study, tracker) as publisher:
        publisher.finish(trials_of(5), {"tiny": {"cost/gmacs": 4.0}})
        pid = publisher.process.process.pid
        assert psutil.Process(pid).nice() >= results.NICENESS
    assert gone(pid)
    assert tracker.close("FINISHED") == 0
    assert drawn(study) >= FILES
    client = MlflowClient(tracking_uri(study.recipe))
    assert {item.path for item in client.list_artifacts(tracker.run_id)} >= FILES
    assert len(client.list_artifacts(tracker.run_id, "recipes")) == 5
    path = client.download_artifacts(tracker.run_id, "recipes/trial-003.yaml", str(tmp_path))
    assert load_recipe(path).name == "look-trial-003"
    run = client.get_run(tracker.run_id)
    assert run.data.metrics[STUDY_FINISHED] == 5
    assert "5 finished" in run.data.tags["mlflow.note.content"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_study_that_stops_leaves_its_newest_state(study, error, monkeypatch):
    monkeypatch.setattr(results, "STOP_LIMIT_S", 120.0)  # other tests may run at the same time
    recorder = Recorder()
    with pytest.raises(error), ResultsPublisher(study, recorder) as publisher:
        publisher.update(trials_of(6), {})
        raise error
    assert finished(recorder) == [6]
    assert drawn(study) >= FILES
    assert gone(publisher.process.process.pid)


def test_an_error_of_a_drawing_is_one_line_and_the_next_one_works(study):
    run = Path(trial_folder(study, 2))
    run.mkdir(parents=True)
    (run / "run.json").write_text("{")
    with log_lines() as lines, ResultsPublisher(study, Recorder(), interval_s=0.0) as publisher:
        publisher.update(trials_of(4), {})
        until(lambda: lines)
        assert "could not be drawn (UserError: " in lines[0] and "run.json cannot be read" in lines[0]
        assert "\n" not in lines[0]
        (run / "run.json").unlink()
        publisher.finish(trials_of(4), {})
        assert drawn(study) >= FILES
    assert len(lines) == 1


def test_a_tracker_that_fails_does_not_mix_two_drawings(study):
    class Failing(Recorder):
        def log_metrics(self, metrics, step, run_id=None):
            super().log_metrics(metrics, step)
            if step == 3:
                raise OSError("no space left")

    recorder = Failing()
    with log_lines() as lines, ResultsPublisher(study, recorder) as publisher:
        publisher.publish(Snapshot(trials_of(3), {}), time.monotonic() + 60)
        assert "no space left" in lines[0]
        publisher.finish(trials_of(4), {})
        assert finished(recorder) == [3, 4] and rows_drawn(study) == 4


def test_a_process_that_is_killed_while_it_draws_is_replaced(study):
    recorder = Recorder()
    with log_lines() as lines, ResultsPublisher(study, recorder, interval_s=0.0) as publisher:
        publisher.process = DrawingProcess(study)
        os.kill(publisher.process.process.pid, signal.SIGSTOP)  # so that it cannot end before it is killed
        publisher.update(trials_of(3), {})
        until(lambda: publisher.publishing.locked())
        os.kill(publisher.process.process.pid, signal.SIGKILL)
        until(lambda: lines)
        assert "the process that draws has died, exit code -9" in lines[0]
        publisher.finish(trials_of(4), {})
        assert finished(recorder) == [4]


def test_a_process_that_hangs_does_not_hold_up_a_study_that_stops(study, monkeypatch):
    monkeypatch.setattr(results, "STOP_LIMIT_S", 0.5)
    with log_lines() as lines, pytest.raises(KeyboardInterrupt), ResultsPublisher(study, Recorder()) as publisher:
        publisher.process = DrawingProcess(study)
        os.kill(publisher.process.process.pid, signal.SIGSTOP)
        publisher.update(trials_of(3), {})
        raise KeyboardInterrupt
    assert "could not be drawn (it takes too long)" in lines[0]
    assert gone(publisher.process.process.pid)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_all_processes_of_the_command_does_not_end_the_drawing(study, signum):
    process = DrawingProcess(study)
    os.kill(process.process.pid, signum)
    parts = [*process.draw(Snapshot(trials_of(3), {}), time.monotonic() + 60)]
    process.kill()
    assert {name for part in parts for name in part.files} == FILES


DRIVER = """
import sys, time
from tests.helpers.finished_trials import trials_of
from pipelines.studies.study import Study
from pipelines.tuning.results import DrawingProcess, Snapshot
from posmlp.config import load_recipe

study = Study(name="look", recipe=load_recipe("demo", [f"train.storage={sys.argv[1]}"]), space="block_types")
process = DrawingProcess(study)
if sys.argv[2] == "drawing":
    drawing = process.draw(Snapshot(trials_of(300), {}, final=True), time.monotonic() + 600)
    next(drawing)  # the figures, which take seconds, are under way
print(process.process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("state", ["starting", "drawing"])
def test_a_driver_that_is_killed_leaves_no_process(tmp_path, state):
    command = [sys.executable, "-c", DRIVER, str(tmp_path), state]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        pid = int(driver.stdout.readline())
        assert not gone(pid)
        driver.kill()
        driver.wait()
    until(lambda: gone(pid), 30)


LEAN = """
import sys
from pipelines.studies.study import Study
from pipelines.tuning.results import Snapshot, draw_results
from posmlp.config import load_recipe
from tests.helpers.finished_trials import trials_of

study = Study(name="look", recipe=load_recipe("demo", [f"train.storage={sys.argv[1]}"]), space="block_types")
drawn = {name for results in draw_results(study, Snapshot(trials_of(5), {})) for name in results.files}
print(sorted(drawn), sorted({"ray", "mlflow", "torch", "optuna", "sklearn", "scipy", "pandas"} & sys.modules.keys()))
"""


def test_a_drawing_imports_no_large_package(tmp_path):
    """Until the importance of dimensions is asked for, which needs scikit-learn."""
    command = [sys.executable, "-c", LEAN, str(tmp_path)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout == f"{sorted(FILES)} []\n"
