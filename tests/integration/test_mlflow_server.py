"""The tracking server of a cluster as ``deploy/mlflow_server.sh`` starts it: PostgreSQL, an object store, passwords."""

import multiprocessing
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.tracking.journal import Journal
from pipelines.tracking.tracker import Tracker
from posmlp.config import load_recipe
from tests.helpers.waiting import until

SCRIPT = Path(__file__).parents[2] / "deploy" / "mlflow_server.sh"
SECRET = "an-open-sesame"
DRIVERS, EPOCHS = 16, 20


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A PostgreSQL of its own, on a socket in a folder; its URI."""
    found = shutil.which("initdb") or next(map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
    if found is None:
        pytest.skip("no PostgreSQL: there is no initdb")
    binaries, folder, port = Path(found).resolve().parent, tmp_path_factory.mktemp("postgres"), free_port()
    user = None
    if os.geteuid() == 0:  # which PostgreSQL refuses
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        user = "postgres"
        for place in (folder, *folder.parents):
            if place.owner() == "root" and place != Path("/tmp") and str(place).startswith("/tmp/"):
                place.chmod(0o755)
        shutil.chown(folder, "postgres")
    data = folder / "data"
    make = [str(binaries / "initdb"), "-D", str(data), "-U", "mlflow", "--auth=trust", "-E", "UTF8"]
    subprocess.run(make, check=True, capture_output=True, user=user, cwd="/")
    with open(folder / "log.txt", "w") as log:
        options = ["-D", str(data), "-p", str(port), "-h", "127.0.0.1", "-k", str(folder), "-c", "max_connections=200"]
        command = [str(binaries / "postgres"), *options]
        server = subprocess.Popen(command, stdout=log, stderr=log, user=user, cwd="/")
    psycopg = pytest.importorskip("psycopg")
    uri = f"postgresql://mlflow:{SECRET}@127.0.0.1:{port}"

    def connect():
        try:
            return psycopg.connect(f"{uri}/postgres")
        except psycopg.OperationalError:
            assert server.poll() is None, (folder / "log.txt").read_text()
            return None

    link = until(connect, 60)
    link.autocommit = True
    with link.cursor() as cursor:
        cursor.execute("CREATE DATABASE mlflow")
    link.close()
    yield f"{uri}/mlflow"
    server.send_signal(signal.SIGINT)
    server.wait(timeout=30)


@pytest.fixture(scope="module")
def server(database, s3, tmp_path_factory):
    """A running server; its address, and the log of what it printed."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    env = os.environ | {"MLFLOW_BACKEND_STORE_URI": database, "MLFLOW_ARTIFACTS_DESTINATION": "s3://videos/mlflow"}
    env |= {"MLFLOW_AUTH_ADMIN_PASSWORD": SECRET, "TMPDIR": str(folder)}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    log = folder / "log.txt"
    with open(log, "w") as file:
        command = [str(SCRIPT), "--port", str(port), "--workers", "2"]
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file)

    def answers():
        assert process.poll() is None, log.read_text()
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
        except OSError:
            return False

    until(answers, 120)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        patch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
        yield f"http://127.0.0.1:{port}", log
    process.terminate()
    process.wait(timeout=60)
    assert not list(folder.glob("*/auth.ini")), "the file with the password stayed"


def drive(number, uri, folder):
    """What the driver of a trial writes, in a process of its own."""
    config = load_recipe("demo", [f"tracking.uri={uri}", f"name=trial-{number}", f"train.storage={folder}"])
    tracker = Tracker.open(config, {"number": str(number)}, journal=Journal(Path(folder, f"{number}.jsonl")))
    for epoch in range(1, EPOCHS + 1):
        tracker.log_metrics({"train/loss": 1 / epoch, "val/top1": epoch / EPOCHS}, step=epoch)
    tracker.log_file("notes.txt", b"of trial %d" % number)
    return tracker.close("FINISHED", wait_s=300)


@pytest.mark.slow
def test_sixteen_drivers_at_a_time_lose_nothing(server, database, tmp_path):
    """Counted in the database itself."""
    import psycopg

    uri, log = server
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipelines.tracking.tracker", "pytest"])  # imported once, not by each
    with context.Pool(DRIVERS) as pool:
        left = pool.starmap(drive, [(number, uri, str(tmp_path)) for number in range(DRIVERS)])
    assert left == [0] * DRIVERS
    with psycopg.connect(database) as link, link.cursor() as cursor:
        cursor.execute("SELECT status, count(*) FROM runs GROUP BY status")
        assert cursor.fetchall() == [("FINISHED", DRIVERS)]
        cursor.execute("SELECT key, count(*), count(DISTINCT (run_uuid, step)) FROM metrics GROUP BY key")
        counts = {key: rest for key, *rest in cursor.fetchall()}
        assert counts["train/loss"] == counts["val/top1"] == [DRIVERS * EPOCHS] * 2
    client = MlflowClient(uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "posmlp"]
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    assert len(runs) == DRIVERS
    for run in runs:
        path = client.download_artifacts(run.info.run_id, "notes.txt", str(tmp_path))
        assert Path(path).read_text() == f"of trial {run.data.tags['number']}"
        assert run.info.artifact_uri.startswith("mlflow-artifacts:")  # through the server: nodes need no S3 credentials
    written = [log, *tmp_path.glob("*.jsonl")]
    assert not [path for path in written if SECRET in path.read_text()]


def test_nobody_gets_in_without_a_password(server):
    uri, _ = server
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{uri}/api/2.0/mlflow/experiments/search?max_results=1", timeout=30)


def test_a_server_without_a_store_is_refused_in_a_line():
    env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    ended = subprocess.run([str(SCRIPT)], env=env, capture_output=True, text=True)
    assert ended.returncode == 2 and "MLFLOW_BACKEND_STORE_URI is not set" in ended.stderr
