"""The lease of a run on a remote storage: it keeps a second driver out, where files have no locks.

``RUN/tracking/lease.json`` names the process that drives the run. The process renews it every ``RENEW_S`` seconds. A
lease that nobody renews for ``EXPIRY_S`` seconds has lapsed, and the next driver takes it over. Its age is the
difference of two times of the storage, so the clocks of the machines do not matter.

PyArrow's file systems cannot write on the condition that nobody else has written. A taker therefore writes its own id,
waits ``SETTLE_S`` seconds and reads back: of several takers the last writer holds the lease, and the others see it.
This needs a storage that returns what was written last (S3, Google Cloud and Azure do). Its limit: a taker that sleeps
for longer than ``SETTLE_S`` between its last look and its write may take a lease that another taker has just got. The
other one learns it when it next reads the lease, at a renewal or before a checkpoint. So two processes may both train
for up to ``RENEW_S`` seconds, but only one goes on.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from pipelines.runs.errors import RunError
from posmlp import storage

logger = logging.getLogger(__name__)

FILE = "tracking/lease.json"
RENEW_S = 10.0  # between two renewals
EXPIRY_S = 60.0  # without a renewal, after which another process may take the lease
SETTLE_S = 2.0  # between writing a new lease and reading it back
POLL_S = 1.0  # between two looks at the lease of a process that may have died
CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # it also counts while the machine is suspended


class RunInUse(RunError):
    """Another process drives the run."""


class LeaseLost(RunError):
    """Another process has taken the run over, or the lease cannot be read before something is written."""


@dataclass(frozen=True)
class Holder:
    """The content of a lease: who drives the run.

    Attributes:
        id: unique to this taking of the lease.
        host, pid: the process.
        job: submission id of its Ray job; empty if it is none.
        since, renewed: when it took and last renewed the lease, by its own clock, ISO 8601.
    """

    id: str
    host: str
    pid: int
    job: str
    since: str
    renewed: str

    @classmethod
    def here(cls) -> Holder:
        """This process, as a new holder."""
        return cls(uuid.uuid4().hex, socket.gethostname(), os.getpid(), submission_id(), now(), now())

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"host {self.host}{job}, process {self.pid}, since {self.since}, last renewed {self.renewed}"


class Lease:
    """A lease that this process holds. A thread renews it until it is released or lost.

    Attributes:
        run: the run's folder.
        holder: this process.
        lost: why this process no longer holds it; empty while it does.
    """

    def __init__(self, run: str):
        """Take the lease of a run. Waits up to ``EXPIRY_S`` seconds for a process that may have died.

        Raises:
            RunInUse: another process holds it; the message says who, and what to do.
            OSError: the storage does not answer.
        """
        self.run, self.holder, self.lost = run, Holder.here(), ""
        self.ended = threading.Event()
        wait_until_free(run)
        write_holder(run, self.holder)
        time.sleep(SETTLE_S)
        found = read_holder(run)
        if found is None or found.id != self.holder.id:
            raise RunInUse(explain_use(run, found))
        self.thread = threading.Thread(target=self.renew_until_end, daemon=True, name="lease")
        self.thread.start()

    def renew_until_end(self) -> None:
        while not self.ended.wait(RENEW_S):
            try:
                self.check()
                write_holder(self.run, replace(self.holder, renewed=now()))
            except LeaseLost:
                return
            except OSError as error:  # the storage may answer next time
                logger.debug("the lease of %s cannot be renewed: %s", self.run, error)

    def check(self) -> None:
        """Ask the storage whether this process still holds the lease.

        Raises:
            LeaseLost: it does not; ``lost`` says why.
            OSError: the storage does not answer.
        """
        found = read_holder(self.run)
        if found is None or found.id != self.holder.id:
            self.lost = explain_loss(self.run, found)
            raise LeaseLost(self.lost)

    def release(self) -> None:
        """End the renewals, and remove the lease if this process still holds it."""
        self.ended.set()
        self.thread.join()  # it must not write the lease again
        with suppress(OSError, LeaseLost):  # the lease then lapses by itself
            self.check()
            storage.remove(storage.join(self.run, FILE))


@contextmanager
def leased(run: str) -> Iterator[Lease | None]:
    """Context in which this process holds the lease of a run; None on a local storage, where the journal is locked.

    Raises:
        RunInUse: another process holds it.
        OSError: the storage does not answer.
    """
    lease = Lease(run) if storage.is_remote(run) else None
    try:
        yield lease
    finally:
        if lease:
            lease.release()


def is_driven(run: str) -> bool:
    """Return whether a process drives a run on a remote storage, as far as this machine's clock can tell.

    Nothing is written.

    Raises:
        OSError: the storage does not answer.
    """
    try:
        written = storage.modified_at(storage.join(run, FILE))
    except FileNotFoundError:
        return False
    return written is None or time.time() - written < EXPIRY_S


def wait_until_free(run: str) -> None:
    """Return when nobody holds the lease of a run.

    Raises:
        RunInUse: its holder renews it.
        OSError: the storage does not answer.
    """
    found = read_holder(run)
    if found is None:
        return
    start, age = clock(), lease_age(run)
    if age < EXPIRY_S:
        logger.warning(
            "%s may be in use: %s. Waiting up to %.0f s for a sign of life.", run, found, EXPIRY_S - max(age, 0)
        )
    while age + clock() - start < EXPIRY_S:
        time.sleep(POLL_S)
        current = read_holder(run)
        if current is None:
            return
        if current != found:
            raise RunInUse(explain_use(run, current))


def lease_age(run: str) -> float:
    """Seconds since the lease was written, by the storage's clock; 0 if the storage keeps no times.

    Raises:
        OSError: the storage does not answer.
    """
    probe = storage.join(run, f"{FILE}.{uuid.uuid4().hex}")
    storage.write_bytes(probe, b"")
    try:
        written, present = storage.modified_at(storage.join(run, FILE)), storage.modified_at(probe)
    finally:
        storage.remove(probe)
    return present - written if written is not None and present is not None else 0.0


def check_lease(run: str, holder: str) -> None:
    """Check, in any process of a run, that its driver still holds the lease.

    Args:
        holder: ``Holder.id`` of the driver; empty: the run has no lease.

    Raises:
        LeaseLost: it does not hold it, or the storage does not answer.
    """
    if not holder:
        return
    try:
        found = read_holder(run)
    except OSError as error:
        raise LeaseLost(f"{storage.join(run, FILE)} cannot be read, so nothing more is written: {error}") from error
    if found is None or found.id != holder:
        raise LeaseLost(explain_loss(run, found))


def read_holder(run: str) -> Holder | None:
    """The process that a run's lease names; None if there is no lease.

    Raises:
        OSError: it cannot be read.
    """
    uri = storage.join(run, FILE)
    try:
        return Holder(**json.loads(storage.read_bytes(uri)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise OSError(f"{uri} is no lease: {error}; remove it if no process drives the run") from error


def write_holder(run: str, holder: Holder) -> None:
    storage.write_bytes(storage.join(run, FILE), json.dumps(asdict(holder)).encode())


def explain_use(run: str, holder: Holder | None) -> str:
    """Say who drives a run, and what to do."""
    stop = f"stop it (`ray job stop {holder.job}`)" if holder and holder.job else "stop it"
    return (
        f"{run} is in use by another process: {holder or 'it has ended just now'}. Wait for its end, {stop}, or choose "
        f"another name (name=...). If its machine is lost, the same command works {EXPIRY_S:g} s after its last renewal"
    )


def explain_loss(run: str, holder: Holder | None) -> str:
    """Say why a process no longer drives a run."""
    who = f"another process has taken it over: {holder}" if holder else "its lease was removed"
    return (
        f"{run} no longer belongs to this process: {who}. This one could not renew its lease for {EXPIRY_S:g} s "
        "(paused, or cut off from the storage), so it stops and writes nothing more"
    )


def submission_id() -> str:
    """Submission id of the Ray job whose entry point this process is; empty if it is none."""
    with suppress(ValueError, AttributeError):
        config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        return str(config.get("metadata", {}).get("job_submission_id", ""))
    return ""


def clock() -> float:
    """Seconds of a clock that no one sets."""
    return time.clock_gettime(CLOCK)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
