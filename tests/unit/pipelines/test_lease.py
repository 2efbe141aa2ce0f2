"""The lease of a run on an object store, against a real server that speaks S3."""

import threading
import uuid

import pytest

from pipelines.runs import lease
from pipelines.runs.lease import Holder, Lease, LeaseLost, RunInUse, check_lease, leased
from posmlp import storage

pytestmark = pytest.mark.usefixtures("s3")


@pytest.fixture
def run(monkeypatch):
    """A run's folder; times are short."""
    for name, seconds in {"RENEW_S": 0.2, "EXPIRY_S": 3.0, "SETTLE_S": 0.3, "POLL_S": 0.1}.items():
        monkeypatch.setattr(lease, name, seconds)
    return f"s3://videos/{uuid.uuid4().hex}"


def test_a_second_driver_is_refused_while_the_first_renews(run):
    with leased(run) as held, pytest.raises(RunInUse) as refused:
        Lease(run)
    assert f"{run} is in use by another process: host {held.holder.host}, process {held.holder.pid}" in str(
        refused.value
    )
    Lease(run).release()  # at once, as the first has ended


def test_of_two_drivers_at_once_one_gets_the_lease(run):
    start, results = threading.Barrier(2), []

    def take():
        start.wait()
        try:
            results.append(Lease(run))
        except RunInUse as error:
            results.append(error)

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = (result for result in results if isinstance(result, Lease))
    assert lease.read_holder(run).id == winner.holder.id
    winner.release()
    assert lease.read_holder(run) is None


def test_a_lease_that_nobody_renews_is_taken_over(run):
    lease.write_holder(run, Holder.here())  # its process was killed
    taken = Lease(run)
    assert lease.read_holder(run).id == taken.holder.id
    taken.release()


def test_a_driver_whose_lease_was_taken_writes_nothing_more(run):
    first = Lease(run)
    other = Holder.here()
    lease.write_holder(run, other)
    with pytest.raises(LeaseLost, match="no longer belongs to this process: another process has taken it over: host"):
        check_lease(run, first.holder.id)
    first.thread.join(5)
    assert "has taken it over" in first.lost
    first.release()
    assert lease.read_holder(run).id == other.id  # the other's lease stays


def test_a_local_run_needs_no_lease(tmp_path):
    with leased(str(tmp_path)) as held:
        assert held is None
    check_lease(str(tmp_path), "")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_lease_is_named(run):
    storage.write_bytes(f"{run}/{lease.FILE}", b"{")
    with pytest.raises(OSError, match=r"lease\.json is no lease: .*; remove it if no process drives the run"):
        Lease(run)
