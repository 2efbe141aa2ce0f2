"""Which Ray a command uses, with real ones: clusters that are joined, refused or gone, and surroundings of a start."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import ray

from tests.helpers.ray_nodes import RayNodes
from tests.helpers.waiting import until

pytestmark = pytest.mark.ray

COMMAND = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
logging.getLogger("ray").setLevel(logging.ERROR)
import ray
from pipelines.cluster.session import start_ray
from posmlp.errors import UserError
try:
    start_ray()
    start_ray()  # says it once
    assert ray.get(ray.remote(lambda: 7).remote()) == 7
except UserError as error:
    print("refused:", error)
"""

OTHER_VERSION = """
import json
import ray
from ray._private import ray_constants, worker
from ray._common.usage import usage_constants
ray.init(log_to_driver=False)
client = worker.global_worker.gcs_client
key, space = usage_constants.CLUSTER_METADATA_KEY, ray_constants.KV_NAMESPACE_CLUSTER
found = json.loads(client.internal_kv_get(key, space))
client.internal_kv_put(key, json.dumps(found | {"ray_version": VERSION}).encode(), True, space)
"""


def run(script, env, wrapper=()):
    """The lines that a script writes to stdout."""
    command = [*wrapper, sys.executable, "-c", script]
    env = env | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def short_folder():
    """Ray's sockets need a short path."""
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="r"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def clean():
    """The environment without a choice of Ray."""
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}


@pytest.mark.slow
def test_a_cluster_of_ray_start(short_folder):
    nodes = RayNodes(short_folder, cpus=1)
    try:
        nodes.wait()
        (short_folder / "tmp").mkdir()
        (short_folder / "tmp" / "ray").symlink_to(short_folder / "head")
        here = nodes.env | {"RAY_TMPDIR": str(short_folder / "tmp")}
        address, port = nodes.address, nodes.address.partition(":")[2]
        record = short_folder / "head" / "ray_current_cluster"
        recorded = until(lambda: record.exists() and record.read_text().strip())
        assert recorded.endswith(f":{port}")  # by its external address
        for variable, joined, source in (
            ({}, recorded, "ray start"),
            ({"RAY_ADDRESS": "auto"}, recorded, "RAY_ADDRESS=auto"),
            ({"RAY_ADDRESS": address}, address, "RAY_ADDRESS"),
        ):
            assert run(COMMAND, here | variable) == [f"Ray: joined {joined} (from {source}): 1 node, 1 CPU, 0 GPUs"]

        for token in ("0" * 64, ""):
            (line,) = run(COMMAND, here | {"RAY_ADDRESS": address, "RAY_AUTH_TOKEN": token, "HOME": str(short_folder)})
            assert line.startswith(f"refused: the Ray at {address} (RAY_ADDRESS) does not accept this command's token")
            assert "RAY_AUTH_TOKEN" in line and "unset RAY_ADDRESS" in line

        run(OTHER_VERSION.replace("VERSION", repr("2.9.3")), here | {"RAY_ADDRESS": address})
        (line,) = run(COMMAND, here | {"RAY_ADDRESS": "auto"})
        assert f"the Ray at {recorded} (RAY_ADDRESS=auto) has Ray 2.9.3 on Python" in line
        assert f"this command has Ray {ray.__version__}" in line and "unset RAY_ADDRESS" in line
    finally:
        nodes.stop()
    # Killed, not stopped: its address is still recorded.
    (first, second) = run(COMMAND, here)
    assert first == f"Ray: the Ray that `ray start` started at {recorded} does not run any more"
    assert second.startswith("Ray: started on this machine (")
    (line,) = run(COMMAND, here | {"RAY_ADDRESS": address})
    assert line.startswith(f"refused: RAY_ADDRESS={address}: nothing answers there")


@pytest.mark.slow
def test_a_start_without_a_home(clean):
    (line,) = run(COMMAND, clean | {"HOME": "/proc"})  # where not even root can make a folder
    assert line.startswith("Ray: started on this machine (")


def test_a_start_in_a_folder_that_is_too_long_or_cannot_be_made(clean, short_folder):
    long = f"{short_folder}/{'x' * 80}"
    (line,) = run(COMMAND, clean | {"TMPDIR": long})
    assert line.startswith(f"refused: TMPDIR={long} is too long for the sockets of Ray") and "such as /tmp" in line
    (short_folder / "file").touch()
    (line,) = run(COMMAND, clean | {"TMPDIR": f"{short_folder}/file"})
    assert line.startswith(f"refused: TMPDIR={short_folder}/file: Ray cannot write its files to {short_folder}/file")


@pytest.mark.slow
def test_a_start_with_a_small_shared_memory(clean):
    wrapper = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh"]
    try:
        allowed = subprocess.run([*wrapper, "true"], capture_output=True).returncode == 0
    except OSError:
        allowed = False
    if not allowed:
        pytest.skip("this user cannot make /dev/shm small")
    lines = run(COMMAND, clean, wrapper)
    assert lines[0].startswith("Ray: started on this machine (")
    assert lines[1].startswith("/dev/shm has 0.06 GiB free, and Ray's object store needs ")
    assert "--shm-size=" in lines[1]
