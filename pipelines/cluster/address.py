"""Which Ray a command uses: one that runs already, or one that it starts; and why Ray cannot be used, in one line.

``RAY_ADDRESS`` chooses: ``HOST:PORT`` is a cluster, ``auto`` is the Ray on this machine, ``local`` starts one. Without
it, a Ray that this user has started here with ``ray start`` is used, and otherwise one is started.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipelines.cluster.ray_internals import recorded_address
from posmlp.errors import UserError

CONNECT_S = 10.0  # until the head must accept a connection
START_HERE = "unset RAY_ADDRESS to start a Ray for this command"
SHM = "/dev/shm"
GIB = 2**30


class RayUnavailable(UserError):
    """Ray cannot be started or joined; the message says what to change."""


@dataclass(frozen=True)
class RayChoice:
    """The Ray that a command uses.

    Attributes:
        address: ``HOST:PORT`` or another address of Ray's, of a cluster to join; None: start a Ray.
        source: what names the address: ``RAY_ADDRESS``, ``RAY_ADDRESS=auto``, ``--address`` or ``ray start``; empty
            if the process is connected already.
        notice: what the user must know of the choice; empty if it is the obvious one.
    """

    address: str | None = None
    source: str = ""
    notice: str = ""

    @property
    def init_address(self) -> str | None:
        """The ``address`` of ``ray.init``. For a Ray found here it is None or ``auto``: then Ray reads its token."""
        if self.address is None:
            return "local"
        return {"ray start": None, "RAY_ADDRESS=auto": "auto"}.get(self.source, self.address)


def choose_ray(address: str | None = None) -> RayChoice:
    """Decide which Ray to use, without a connection to one.

    Args:
        address: an address that comes before ``RAY_ADDRESS``.

    Raises:
        RayUnavailable: the address names no Ray that this process can join.
    """
    source = "--address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address == "local":
        return RayChoice()
    if address is None:
        return choose_recorded(rays_on_this_machine(), recorded_address())
    if address == "auto":
        recorded = recorded_address()
        found = choose_auto(rays_on_this_machine(), recorded)
        private = f"the Ray at {found} is another program's own and ends with it; RAY_ADDRESS=local starts one"
        return RayChoice(found, "RAY_ADDRESS=auto", notice="" if found == recorded else private)
    check_address(address, source)
    return RayChoice(address, source)


def choose_recorded(running: Mapping[str, str], recorded: str | None) -> RayChoice:
    """The Ray of ``ray start`` if it is this user's and still runs, else one to start.

    Args:
        running: address and owner of each Ray on this machine.
        recorded: the address of the last ``ray start``.
    """
    if recorded is None:
        return RayChoice()
    owner = running.get(recorded)
    if owner is None:
        return RayChoice(notice=f"the Ray that `ray start` started at {recorded} does not run any more")
    if owner != user_name():
        return RayChoice(
            notice=f"the Ray at {recorded} belongs to user {owner} and is not used (RAY_ADDRESS={recorded} joins it)"
        )
    return RayChoice(recorded, "ray start")


def choose_auto(running: Mapping[str, str], recorded: str | None) -> str:
    """The address of the Ray that ``RAY_ADDRESS=auto`` means. Arguments are as for ``choose_recorded``.

    Raises:
        RayUnavailable: there is none, there are several, or it belongs to another user.
    """
    if not running:
        raise RayUnavailable(
            f"RAY_ADDRESS=auto: no Ray runs on this machine; start a cluster with `ray start --head`, or {START_HERE}"
        )
    if recorded not in running and len(running) > 1:
        raise RayUnavailable(
            "RAY_ADDRESS=auto: several Rays run on this machine; set RAY_ADDRESS to one of "
            f"{', '.join(sorted(running))}, or {START_HERE}"
        )
    found = recorded if recorded in running else next(iter(running))
    assert found is not None
    if running[found] != user_name():
        raise RayUnavailable(
            f"RAY_ADDRESS=auto: the Ray on this machine, at {found}, belongs to user {running[found]}; {START_HERE}, "
            f"or set RAY_ADDRESS={found} if you may use it"
        )
    return found


def check_address(address: str, source: str) -> None:
    """Check that a cluster answers at an address, and that this machine is one of its nodes, as Ray requires.

    Args:
        source: what names the address, for the message.

    Raises:
        RayUnavailable: it cannot be joined.
    """
    if "://" in address:  # a client of Ray's: only Ray can check it
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise RayUnavailable(
            f"{source}={address} is no address of a Ray; expected HOST:PORT, auto or local; {START_HERE}"
        )
    if not accepts_connections(address):  # Ray itself would try for many minutes
        raise RayUnavailable(
            f"{source}={address}: nothing answers there; check it with `ray status --address={address}`, "
            f"or {START_HERE}"
        )
    if not rays_on_this_machine():  # Ray itself would look for a minute
        raise RayUnavailable(
            f"{source}={address}: this machine is no node of a cluster; join it with `ray start --address={address}`, "
            f"submit the command with `ray job submit`, or {START_HERE}"
        )


def accepts_connections(address: str) -> bool:
    """Return whether ``HOST:PORT`` accepts connections. True for addresses of other forms, which only Ray can check."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError):  # OverflowError: a port above 65535
        return False
    return True


def rays_on_this_machine() -> dict[str, str]:
    """The address of each Ray that has a node on this machine, and the user who owns that node's raylet."""
    found = {}
    for process in psutil.process_iter(["cmdline", "username"]):
        words = " ".join(process.info["cmdline"] or ()).split(" ")  # a process may keep its whole command in one word
        if os.path.basename(words[0]) == "raylet":
            for word in words:
                if word.startswith("--gcs-address=") and (address := word.partition("=")[2]):
                    found[address] = str(process.info["username"])
    return found


def user_name() -> str:
    """The name of this process's user, as ``rays_on_this_machine`` gives it."""
    return psutil.Process().username()


# A Ray that is started here -------------------------------------------------------------------------------------------


def token_without_home() -> None:
    """Make a token for a Ray that this process starts if Ray cannot keep one in the home folder, ``~/.ray``."""
    if any(os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    try:
        folder = Path.home() / ".ray"
        if (folder / "auth_token").is_file():
            return
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError):  # RuntimeError: the user has no home folder
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # Ray's processes inherit it


def free_shared_memory() -> int | None:
    """Free bytes of ``/dev/shm``; None if there is none, as on macOS."""
    try:
        return shutil.disk_usage(SHM).free
    except OSError:
        return None


def shared_memory_warning(free: int | None, store: float) -> str:
    """What to do if Ray's object store did not fit into ``/dev/shm``; empty if it did.

    Args:
        free: bytes that were free before Ray started.
        store: size of the object store, in bytes.
    """
    if free is None or free >= store:
        return ""
    return (
        f"{SHM} has {free / GIB:.2f} GiB free, and Ray's object store needs {store / GIB:.2f} GiB: Ray keeps it in "
        f"{ray_tmpdir()[1]} instead, which is slow if that is a disk. Enlarge {SHM} (docker run "
        f"--shm-size={store * 1.1 / GIB:.1f}g)"
    )


def ray_tmpdir() -> tuple[str, str]:
    """The variable that names the folder of Ray's files (``TMPDIR`` also if none is set), and the folder."""
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    return name, os.environ.get(name, "/tmp")


# Errors ---------------------------------------------------------------------------------------------------------------


def explain_ray_error(error: Exception, choice: RayChoice) -> RayUnavailable:
    """The error of ``ray.init`` as one line that says what to change."""
    return RayUnavailable(explain_start(error) if choice.address is None else explain_join(error, choice))


def explain_start(error: Exception) -> str:
    """Why a Ray could not be started on this machine."""
    text, (variable, folder) = one_line(error), ray_tmpdir()
    if isinstance(error, FileNotFoundError) and not has_current_folder():
        return "the current folder does not exist any more, and Ray needs one: change to another folder"
    shown = f"{variable}={folder}"
    if "AF_UNIX" in text:
        socket_path = text.rpartition(" ")[2]
        return (
            f"{shown} is too long for the sockets of Ray, whose paths would have {len(os.fsencode(socket_path))} bytes "
            "(the system allows 107, on macOS 103); set TMPDIR or RAY_TMPDIR to a short folder, such as /tmp"
        )
    if start_timed_out(error):
        return (
            "Ray did not start in time on this machine, though it was tried twice. Close other programs, or let Ray "
            "wait longer: RAY_raylet_start_wait_time_s=120"
        )
    if SHM in text:
        return f"Ray's object store does not fit into {SHM}: enlarge it (docker run --shm-size=...). Ray says: {text}"
    if isinstance(error, OSError) and str(error.filename or "").startswith(folder):
        reason = error.strerror or text
        return f"{shown}: Ray cannot write its files to {error.filename} ({reason}); set TMPDIR to a folder that exists"
    return f"Ray cannot be started on this machine: {text}"


def start_timed_out(error: Exception) -> bool:
    """Return whether ``ray.init`` gave up waiting for the processes that it started."""
    return isinstance(error, TimeoutError) or bool(re.search(r"timed out|deadline exceeded", str(error), re.IGNORECASE))


def has_current_folder() -> bool:
    """Return whether this process's current folder still exists."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def explain_join(error: Exception, choice: RayChoice) -> str:
    """Why a running Ray could not be joined."""
    chain = [error, *causes(error)]
    text = " ".join(one_line(each) for each in chain)
    where, way = f"the Ray at {choice.address} ({choice.source})", START_HERE
    if choice.source == "ray start":
        way = "set RAY_ADDRESS=local to start a Ray for this command"
    if found := re.search(r"Version mismatch.*?Ray: (\S+)\s+Python: (\S+).*?Ray: (\S+)\s+Python: (\S+)", text):
        theirs, their_python, ours, our_python = found.groups()
        return (
            f"{where} has Ray {theirs} on Python {their_python}, and this command has Ray {ours} on Python {our_python}"
            f": install the same versions, or {way}"
        )
    if re.search(r"unauthenticated|authentication|auth_?token|invalid token", text, re.IGNORECASE):
        return (
            f"{where} does not accept this command's token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or "
            f"RAY_AUTH_TOKEN_PATH) to the cluster's, or {way}"
        )
    if any(isinstance(each, PermissionError) for each in chain):
        return f"{where} belongs to another user, and its files cannot be opened ({one_line(chain[-1])}): {way}"
    return f"{where} cannot be joined ({text[:300]}): check it with `ray status`, or {way}"


def causes(error: BaseException) -> list[BaseException]:
    """The errors that led to an error, from the last to the first."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while (current := current.__cause__ or current.__context__ if current else None) and current not in found:
        found.append(current)
    return found


def one_line(error: BaseException) -> str:
    """The text of an error on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


# The line in a run's log ----------------------------------------------------------------------------------------------


def describe(choice: RayChoice, nodes: list[dict[str, Any]]) -> str:
    """Which Ray is used, with its size, as one line.

    Args:
        nodes: the result of ``ray.nodes()``.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    cpus, gpus = (sum(resources.get(kind, 0) for resources in alive) for kind in ("CPU", "GPU"))
    size = f"{count(cpus, 'CPU')}, {count(gpus, 'GPU')}"
    if choice.address is None:
        return f"Ray: started on this machine ({size})"
    verb = f"joined {choice.address} (from {choice.source})" if choice.source else f"connected to {choice.address}"
    return f"Ray: {verb}: {count(len(alive), 'node')}, {size}"


def count(number: float, what: str) -> str:
    """A number of things in words, such as ``1 node`` and ``2 nodes``."""
    return f"{number:g} {what}{'' if number == 1 else 's'}"
