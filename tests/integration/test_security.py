"""What a run opens and writes, looked at from outside: sockets beyond loopback, and secrets anywhere."""

import json
import secrets
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.runs.record import read_record
from tests.helpers.mlflow_server import MlflowServer
from tests.helpers.ray_nodes import RAY, RayNodes
from tests.helpers.small_runs import QUICK, recipe_for

pytestmark = pytest.mark.ray
HERE = Path(__file__).parents[2]


# Sockets --------------------------------------------------------------------------------------------------------------


def test_a_local_run_listens_on_loopback_alone(finished_run):
    *_, found = finished_run
    names = {name for _, name in found}
    assert {"gcs_server", "raylet"} <= names and any("RayTrainWorker" in name for name in names)
    assert not {(ip, name) for ip, name in found if ip not in ("127.0.0.1", "::1")}


# Secrets --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    """A secret for each way in which one comes to a run; none is like another."""
    ways = ("environment's URI", "recipe's URI", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
    return {way: secrets.token_hex(16) for way in (*ways, "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def cluster(planted, server, tmp_path_factory):
    """A cluster whose processes all have the secrets in their environment."""
    with pytest.MonkeyPatch.context() as patch:
        for way, secret in planted.items():
            if way.isupper():
                patch.setenv(way, secret)
        patch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        patch.setenv("MLFLOW_TRACKING_URI", with_password(server, planted["environment's URI"]))
        nodes = RayNodes(tmp_path_factory.mktemp("n"))
    nodes.add("one", "--num-cpus=3")
    nodes.wait()
    yield nodes
    nodes.stop()


def with_password(server, secret):
    return server.uri.replace("//", f"//me:{secret}@")


def test_no_secret_is_written_anywhere(cluster, server, planted, motion_set, tmp_path):
    """A study and an evaluation as a job: all that they, Ray and MLflow have written and tell is searched."""
    uri = with_password(server, planted["recipe's URI"])
    more = ["train.epochs=1", f"tracking.uri={uri}", f"data.cache_dir={tmp_path}/runs/cache", "tracking.log_model=true"]
    recipe = recipe_for(tmp_path / "runs", motion_set, *QUICK, *more)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    posmlp = shlex.join([sys.executable, "-m", "pipelines.cli"])
    study = f"{posmlp} tune {tmp_path}/recipe.yaml --space block_types --name look --trials 1 --searcher random"
    work = f"{study} && {posmlp} evaluate {tmp_path}/runs/look/trial-000 tracking.uri=$MLFLOW_TRACKING_URI"
    submit = [RAY, "job", "submit", "--address", cluster.jobs, "--working-dir", str(HERE), "--", "sh", "-c", work]
    job = subprocess.run(submit, env=cluster.env, cwd=HERE, capture_output=True, text=True, timeout=400)
    assert job.returncode == 0 and "top-1" in job.stdout, job.stdout + job.stderr
    assert read_record(f"{tmp_path}/runs/look/trial-000")["metrics"]
    kinds = ("actors", "tasks", "jobs", "workers", "runtime_envs")
    told = {"the job's output": job.stdout + job.stderr, "the job server": json.dumps(cluster.ask("/api/jobs/"))}
    told |= {f"Ray's {kind}": json.dumps(cluster.listing(kind)) for kind in kinds}
    texts = {name: text.encode() for name, text in told.items()}
    for folder in (tmp_path / "runs", cluster.folder, server.folder):
        texts |= {
            str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()
        }
    assert "look" in told["the job server"] and "ResourceTrainable" in told["Ray's actors"]
    assert any(name.endswith("config.yaml") for name in texts) and f"{server.database}" in texts
    assert any("/logs/" in name for name in texts) and any(name.endswith("summary.json") for name in texts)
    looked_for = planted | {"RAY_AUTH_TOKEN": cluster.env["RAY_AUTH_TOKEN"]}
    leaks = [(way, name) for way, secret in looked_for.items() for name in texts if secret.encode() in texts[name]]
    assert not leaks, "\n".join(f"{way}: {name}" for way, name in leaks)
