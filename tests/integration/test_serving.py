"""A study's registered model, served by MLflow in an environment that has only the model's requirements."""

import base64
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import pytest

from pipelines.inference.predict import predict
from pipelines.registry.logged_models import link_to
from pipelines.registry.model_files import save_model_files
from pipelines.runs import checkpoints
from pipelines.tracking.mlflow_client import register_model
from tests.helpers.tracker_runs import start
from tests.helpers.waiting import until

pytestmark = pytest.mark.slow  # installs torch and MLflow


@pytest.fixture(scope="module")
def clean_environment(untrained_run, tmp_path_factory):
    """The bin folder of a new virtual environment with what the registered model requires."""
    folder = tmp_path_factory.mktemp("clean")
    save_model_files(untrained_run["run"], folder / "model")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, env=own_variables())
    install = [folder / "venv" / "bin" / "pip", "install", "-q", "-r", folder / "model" / "requirements.txt"]
    done = subprocess.run(install, env=own_variables(), capture_output=True, text=True, check=False)
    if done.returncode and "Could not find a version" in done.stderr:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    return folder / "venv" / "bin"


def own_variables(**more):
    """The environment without what belongs to the project's Python."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
    return kept | more


@pytest.fixture(scope="module")
def server(untrained_run, clean_environment, tmp_path_factory):
    """The URL of ``mlflow models serve -m models:/small@best``."""
    folder = tmp_path_factory.mktemp("served")
    tracker = start(folder)
    best = checkpoints.choose(untrained_run["run"])
    link = link_to(best, checkpoints.read_info(best), tracker.run_id, {})
    tracker.log_model(partial(save_model_files, best), link)
    assert tracker.close("FINISHED") == 0
    register_model(tracker.uri, tracker.run_id, "small", {})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = f"{clean_environment}{os.pathsep}{os.defpath}"
    options = ["models", "serve", "-m", "models:/small@best", "--env-manager", "local", "-p", str(port)]
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(
            [clean_environment / "mlflow", *options],
            env=own_variables(PATH=path, MLFLOW_TRACKING_URI=tracker.uri),
            cwd=tmp_path_factory.mktemp("elsewhere"),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def answers():
        assert process.poll() is None, (folder / "log.txt").read_text()
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
        except OSError:
            return False

    try:
        until(answers, 300)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def post(server, videos, **params):
    """The status and the answer to a request."""
    body = {"dataframe_records": [{"video": video} for video in videos], "params": params}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server}/invocations", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_environment_has_nothing_of_the_project(clean_environment):
    listed = subprocess.run([clean_environment / "pip", "list"], env=own_variables(), capture_output=True, text=True)
    names = {line.split()[0].lower() for line in listed.stdout.splitlines() if line}
    assert {"torch", "mlflow", "av"} <= names
    assert not {"ray", "posmlp-video"} & names


def test_videos_are_classified_by_path_and_by_bytes(server, untrained_run):
    with open(untrained_run["config"].data.val.path) as file:
        paths = [row["path"] for row in csv.DictReader(file) if row["path"] != untrained_run["broken"]][:2]
    encoded = base64.b64encode(Path(paths[1]).read_bytes()).decode()
    status, answer = post(server, [paths[0], encoded], top=3, views="2x3")
    assert status == 200
    for found, expected in zip(answer["predictions"], predict(untrained_run["run"], paths, 3, (2, 3)), strict=True):
        assert [each["class"] for each in found["top"]] == [name for name, _ in expected.top]
        shares = [each["probability"] for each in found["top"]]
        assert shares == pytest.approx([share for _, share in expected.top], abs=1e-5)


def test_a_bad_video_is_an_error_and_the_server_goes_on(server, untrained_run):
    status, answer = post(server, [untrained_run["broken"]])
    assert status == 400
    assert f"row 1 of 1 ({untrained_run['broken']}): " in answer["message"]
    assert post(server, ["/nowhere.mp4"])[0] == 400
    test_videos_are_classified_by_path_and_by_bytes(server, untrained_run)
