"""Which Ray a command uses, and errors of its start as one line. tests/integration/test_which_ray.py has real Rays."""

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.cluster import address as module
from pipelines.cluster import session
from pipelines.cluster.address import (
    RayChoice,
    RayUnavailable,
    accepts_connections,
    choose_ray,
    describe,
    explain_ray_error,
    rays_on_this_machine,
    shared_memory_warning,
    token_without_home,
    user_name,
)
from tests.helpers.log_lines import log_lines

ME, A, B = user_name(), "10.0.0.1:6379", "10.0.0.2:6380"


@pytest.fixture
def machine(monkeypatch):
    """Set which Rays run here, which one ``ray start`` has recorded, and RAY_ADDRESS."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def prepare(running, recorded=None, variable=None):
        monkeypatch.setattr(module, "rays_on_this_machine", lambda: running)
        monkeypatch.setattr(module, "recorded_address", lambda: recorded)
        if variable is not None:
            monkeypatch.setenv("RAY_ADDRESS", variable)

    return prepare


@pytest.mark.parametrize(
    ("running", "recorded", "variable", "address", "init", "notice"),
    [
        ({}, None, None, None, "local", ""),
        ({}, None, "", None, "local", ""),
        ({A: ME}, None, "local", None, "local", ""),
        ({A: ME}, None, None, None, "local", ""),  # another run's own Ray
        ({A: ME}, A, None, A, None, ""),
        ({A: ME, B: ME}, A, None, A, None, ""),
        ({}, A, None, None, "local", f"started at {A} does not run any more"),  # killed, not stopped
        ({A: "zoe"}, A, None, None, "local", f"{A} belongs to user zoe and is not used (RAY_ADDRESS={A} joins it)"),
        ({A: ME}, A, "auto", A, "auto", ""),
        ({A: ME}, None, "auto", A, "auto", f"{A} is another program's own and ends with it"),
        ({A: ME, B: "zoe"}, A, "auto", A, "auto", ""),
    ],
)
def test_the_ray_that_is_used(machine, running, recorded, variable, address, init, notice):
    machine(running, recorded, variable)
    choice = choose_ray()
    assert (choice.address, choice.init_address) == (address, init)
    assert notice in choice.notice and bool(notice) == bool(choice.notice)


@pytest.mark.parametrize(
    ("running", "recorded", "variable", "parts"),
    [
        ({}, None, "auto", ["no Ray runs on this machine", "ray start --head"]),
        ({}, A, "auto", ["no Ray runs on this machine"]),
        ({A: "zoe"}, A, "auto", [A, "belongs to user zoe", f"RAY_ADDRESS={A}"]),
        ({A: ME, B: ME}, None, "auto", ["several Rays", f"{A}, {B}"]),
        ({}, None, "127.0.0.1:1", ["nothing answers there"]),
        ({}, None, "[::1]:99999", ["nothing answers there"]),
        ({}, None, "head", ["RAY_ADDRESS=head is no address of a Ray; expected HOST:PORT, auto or local;"]),
        ({}, None, "head:six", ["is no address of a Ray"]),
    ],
)
def test_an_address_without_a_ray_is_refused_in_one_line(machine, running, recorded, variable, parts):
    machine(running, recorded, variable)
    with pytest.raises(RayUnavailable) as refused:
        choose_ray()
    text = str(refused.value)
    assert "\n" not in text
    for part in ["RAY_ADDRESS", "unset RAY_ADDRESS", *parts]:
        assert part in text


def test_a_cluster_without_a_node_on_this_machine_is_refused_at_once(machine):
    with socket.create_server(("127.0.0.1", 0)) as head:
        place = f"127.0.0.1:{head.getsockname()[1]}"
        assert accepts_connections(place)
        machine({}, None, place)
        with pytest.raises(RayUnavailable, match=rf"no node of a cluster; join it with `ray start --address={place}`"):
            choose_ray()
        machine({B: "zoe"}, None, place)  # the node may belong to that cluster: Ray compares them
        assert choose_ray() == RayChoice(place, "RAY_ADDRESS")
        assert choose_ray("local") == RayChoice()


def test_the_rays_of_this_machine_are_found_by_their_processes(tmp_path):
    raylet = tmp_path / "raylet"
    raylet.symlink_to(sys.executable)
    process = subprocess.Popen([raylet, "-c", "input()", "--gcs-address=10.1.2.3:77"], stdin=subprocess.PIPE)
    try:
        assert rays_on_this_machine()["10.1.2.3:77"] == ME
    finally:
        process.communicate(b"\n")
    assert "10.1.2.3:77" not in rays_on_this_machine()


MISMATCH = """Version mismatch: The cluster was started with:
    Ray: 2.50.1
    Python: 3.12.4
This process on node 10.0.0.7 was started with:
    Ray: 2.60.0
    Python: 3.11.7
"""


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (RuntimeError(MISMATCH), ["Ray 2.50.1 on Python 3.12.4", "Ray 2.60.0 on Python 3.11.7", "same versions"]),
        (ConnectionError("UNAUTHENTICATED: invalid token"), ["does not accept this command's token", "RAY_AUTH_TOKEN"]),
        (PermissionError(13, "Permission denied", "/tmp/ray/x"), ["belongs to another user", "/tmp/ray/x"]),
        (ConnectionError("Failed to\nconnect"), ["cannot be joined (Failed to connect)"]),
    ],
)
def test_why_a_ray_cannot_be_joined(error, parts):
    outer = ConnectionError("Failed to connect to Ray cluster")  # Ray wraps what happened
    outer.__cause__ = error
    for raised in (error, outer):
        text = str(explain_ray_error(raised, RayChoice(A, "RAY_ADDRESS=auto")))
        assert "\n" not in text
        for part in [A, "RAY_ADDRESS=auto", "unset RAY_ADDRESS", *parts]:
            assert part in text or (raised is outer and part.startswith("cannot be joined"))
    assert "RAY_ADDRESS=local" in str(explain_ray_error(error, RayChoice(A, "ray start")))


def test_why_a_ray_cannot_be_started(monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    folder = "/scratch/" + "x" * 100
    monkeypatch.setenv("TMPDIR", folder)

    def explained(error):
        return str(explain_ray_error(error, RayChoice()))

    path = f"{folder}/ray/session_2026-01-02_03-04-05_678901_2345/sockets/plasma_store"
    text = explained(OSError(f"validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: {path}"))
    assert f"TMPDIR={folder} is too long" in text and f"{len(path)} bytes" in text and "such as /tmp" in text
    text = explained(PermissionError(13, "Permission denied", f"{folder}/ray"))
    assert f"cannot write its files to {folder}/ray (Permission denied); set TMPDIR" in text
    monkeypatch.setenv("RAY_TMPDIR", "/short")
    assert "RAY_TMPDIR=/short" in explained(PermissionError(13, "Permission denied", "/short/ray"))
    text = explained(ValueError("The configured object store size (20.0 GB) exceeds /dev/shm size (0.06 GB). This"))
    assert "--shm-size" in text and "20.0 GB" in text
    assert explained(ValueError("no\nroom")) == "Ray cannot be started on this machine: no room"


def test_a_current_folder_that_is_gone_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    text = str(explain_ray_error(FileNotFoundError(2, "No such file or directory"), RayChoice()))
    assert text.startswith("the current folder does not exist any more")


def test_a_small_shared_memory_is_said_with_the_size_that_is_needed(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/scratch")
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    text = shared_memory_warning(64 * 2**20, 10 * 2**30)
    for part in ("0.06 GiB free", "needs 10.00 GiB", "/scratch", "--shm-size=11.0g"):
        assert part in text
    assert not shared_memory_warning(10 * 2**30, 10 * 2**30)
    assert not shared_memory_warning(None, 10 * 2**30)


def test_a_home_that_cannot_be_written_needs_no_token_file(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "file").touch()
    for home in ("/proc", str(tmp_path / "file")):  # not even root can make a folder there
        monkeypatch.setenv("HOME", home)
        token_without_home()
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
        monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setattr(Path, "home", lambda: 1 / 0)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    token_without_home()  # the user has decided
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_a_home_that_can_be_written_gets_rays_own_token(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    token_without_home()
    assert "RAY_AUTH_TOKEN" not in os.environ


def node(alive, **resources):
    return {"Alive": alive, "Resources": resources}


def test_the_line_names_the_ray_and_its_size():
    nodes = [node(True, CPU=8.0), node(True, CPU=4.0, GPU=2.0), node(False, CPU=64.0)]
    assert (
        describe(RayChoice(A, "RAY_ADDRESS"), nodes) == f"Ray: joined {A} (from RAY_ADDRESS): 2 nodes, 12 CPUs, 2 GPUs"
    )
    assert describe(RayChoice(), nodes[:1]) == "Ray: started on this machine (8 CPUs, 0 GPUs)"
    one = describe(RayChoice(A), [node(True, CPU=1.0, GPU=1.0)])
    assert one == f"Ray: connected to {A}: 1 node, 1 CPU, 1 GPU"
    assert describe(RayChoice(A), nodes[:1]) == f"Ray: connected to {A}: 1 node, 8 CPUs, 0 GPUs"


# What Ray 2.60's node.py says when its processes take longer than its limit.
SLOW = "The current node timed out during startup. This could happen because some of the raylet failed to startup."


@pytest.mark.parametrize(
    ("errors", "starts", "refused"),
    [
        ([Exception(SLOW), None], 2, ""),
        ([TimeoutError("Timed out after 30 seconds"), Exception(SLOW)], 2, "RAY_raylet_start_wait_time_s=120"),
        ([ValueError("num_cpus -1")], 1, "Ray cannot be started on this machine: num_cpus -1"),
    ],
)
def test_a_ray_that_starts_too_slowly_is_tried_once_more(monkeypatch, errors, starts, refused):
    results = iter(errors)
    calls = []

    def init(**options):
        calls.append(options)
        if error := next(results):
            raise error

    for name, value in {
        "init": init,
        "shutdown": lambda: None,
        "is_initialized": lambda: False,
        "cluster_resources": dict,
    }.items():
        monkeypatch.setattr(f"ray.{name}", value)
    monkeypatch.setattr(session, "choose_ray", lambda address: RayChoice())
    monkeypatch.setattr(session, "announce", lambda choice: None)
    with log_lines(logging.WARNING) as lines:
        if refused:
            with pytest.raises(RayUnavailable) as found:
                session.start_ray()
            assert refused in str(found.value) and "\n" not in str(found.value)
        else:
            session.start_ray()
    assert len(calls) == starts
    assert [line for line in lines if "tried once more" in line] == [
        "Ray did not start in time on this machine; it is tried once more"
    ] * (starts - 1)
