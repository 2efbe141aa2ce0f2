"""The journal on a remote storage: whatever is killed when, MLflow gets every metric once, and in order."""

import json
import sqlite3
import tempfile
import uuid
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient

from pipelines.runs import lease as lease_module
from pipelines.runs.lease import Holder, RunInUse, leased, write_holder
from pipelines.tracking import journal as journal_module
from pipelines.tracking.delivery import DeliveryWorker, sync_journals
from pipelines.tracking.journal import JournalInUse, find_journals, is_held, open_journal
from pipelines.tracking.mlflow_client import prepare_mlflow, prepare_sqlite
from pipelines.tracking.operations import LogFile, LogMetrics, LogModel, OpenRun
from pipelines.tracking.tracker import Tracker
from posmlp import storage
from posmlp.errors import UserError
from tests.helpers.tracker_runs import once, recipe, rows
from tests.helpers.waiting import until

LONG = 1000.0


@pytest.fixture(autouse=True, scope="module")
def working_copies(tmp_path_factory):
    """Where the killed journals of these tests leave their working copies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("working_copies")))
        yield


@pytest.fixture(autouse=True)
def no_uploads_of_their_own(monkeypatch, short_pauses):
    monkeypatch.setattr(journal_module, "FLUSH_S", LONG)


@pytest.fixture
def run():
    """A run's folder, in memory."""
    return f"memory://{uuid.uuid4().hex}/run"


@pytest.fixture
def s3_run(s3, monkeypatch):
    """A run's folder on a server that speaks S3; the times of its lease are short."""
    for name, seconds in {"RENEW_S": 0.2, "EXPIRY_S": 3.0, "SETTLE_S": 0.3, "POLL_S": 0.1}.items():
        monkeypatch.setattr(lease_module, name, seconds)
    return f"s3://videos/{uuid.uuid4().hex}/run"


def epoch(number, time=0):
    return LogMetrics(time, number, {"train/loss": 0.5})


def steps(entries):
    return [entry.operation.step for entry in entries]


def leave(journal):
    """What a ``kill -9`` leaves of a journal: what is on the storage."""
    journal.ended.set()
    journal.thread.join()


# Any kill point ---------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a process in a test."""


class KillSwitch:
    """Raises ``Killed`` in place of one of the next changes of the storage.

    Attributes:
        changes: that still succeed; None: all.
    """

    def __init__(self, patch):
        self.changes = None
        for name in ("write_bytes", "copy_file", "remove"):
            patch.setattr(storage, name, self.guard(getattr(storage, name)))

    def guard(self, change):
        def changed(*args):
            if self.changes == 0:
                self.changes = None
                raise Killed
            if self.changes is not None:
                self.changes -= 1
            return change(*args)

        return changed


class Drivers:
    """Drivers of one run, one after the other. As in training, each logs the epochs that its journal does not have.

    Attributes:
        epochs: that the present driver has logged or found.
        saved: that were logged when an upload ended; none of them may be lost.
        former: the journal of the process before.
    """

    def __init__(self, client, experiment, patch):
        self.run, self.client = f"memory://{uuid.uuid4().hex}/run", client
        self.run_id = client.create_run(experiment).info.run_id
        self.switch = KillSwitch(patch)
        self.time = self.saved = 0
        self.former = None
        patch.setattr(journal_module, "PART_BYTES", 100)  # a line has about as many
        patch.setattr(journal_module, "FLUSH_S", LONG)
        self.open()

    def open(self):
        self.journal = open_journal(self.run)
        self.worker = DeliveryWorker(self.journal, "unused", self.run_id, check_stored_epochs=False)
        self.worker.connection = self.client
        self.epochs = self.journal.state.last_epoch
        assert self.epochs >= self.saved

    def act(self, name, *arguments):
        try:
            getattr(self, name)(*arguments)
        except Killed:
            self.kill()

    def append(self, with_file):
        self.time, self.epochs = self.time + 1, self.epochs + 1
        if with_file:
            self.journal.append_file(LogFile("last.txt"), "last.txt", str(self.epochs).encode())
        self.journal.append(epoch(self.epochs, self.time))

    def upload(self):
        self.journal.upload()
        self.saved = self.epochs

    def deliver(self, and_die):
        if entries := self.worker.next_entries():
            if and_die:
                self.worker.deliver(entries)
                self.kill()
            else:
                assert self.worker.attempt(entries) is None
                assert not self.journal.rejected_path.exists()

    def kill(self):
        leave(self.journal)
        self.former = self.journal
        while True:
            try:
                return self.open()
            except Killed:  # this one too
                continue

    def kill_at(self, changes):
        self.switch.changes = changes

    def upload_late(self):
        """The process that was taken for dead writes what it has not written yet."""
        if self.former:
            with suppress(Killed):
                self.former.upload()

    def check(self, database):
        """The last driver comes to its end, and MLflow has every epoch once, in order."""
        self.switch.changes = None
        self.append(with_file=True)
        self.upload()
        self.kill()
        while self.worker.next_entries():
            self.deliver(and_die=False)
        self.upload()
        leave(self.journal)
        assert self.epochs == self.saved
        assert rows(database, self.run_id) == once(*range(1, self.epochs + 1))
        with sqlite3.connect(database) as connection:
            found = connection.execute("SELECT step FROM metrics WHERE run_uuid = ? ORDER BY rowid", (self.run_id,))
            assert [step for (step,) in found] == list(range(1, self.epochs + 1))
        artifacts = self.client.get_run(self.run_id).info.artifact_uri
        assert storage.read_bytes(f"{artifacts}/last.txt") == b"%d" % self.epochs
        left = open_journal(self.run)
        leave(left)
        assert not left.pending_count() and not list(left.files_folder.glob("*/*.txt"))


@pytest.fixture(scope="module")
def mlflow_store(tmp_path_factory):
    """A client of an MLflow store, its SQLite file, and an experiment."""
    folder = tmp_path_factory.mktemp("mlflow")
    prepare_mlflow()
    prepare_sqlite(f"sqlite:///{folder}/mlflow.db")
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    return client, folder / "mlflow.db", client.create_experiment("kills", artifact_location=str(folder / "artifacts"))


STORY = [
    *[("append", True), ("append", False), ("upload",), ("deliver", False), ("upload",), ("deliver", False)],
    *[("append", True), ("append", True), ("upload",), ("deliver", False), ("append", True), ("upload",), ("kill",)],
    *[("deliver", False), ("deliver", False), ("append", True), ("upload",), ("deliver", True), ("upload",)],
]


def test_a_kill_at_any_change_of_the_storage_costs_nothing(mlflow_store, monkeypatch):
    client, database, experiment = mlflow_store
    for changes in range(100):
        with monkeypatch.context() as patch:
            drivers = Drivers(client, experiment, patch)
            drivers.kill_at(changes)
            for action in STORY:
                drivers.act(*action)
            if drivers.switch.changes is not None:  # the story has no more of them
                break
            drivers.check(database)
    assert 20 < changes < 100


ACTION = st.one_of(
    st.tuples(st.just("append"), st.booleans()),
    st.tuples(st.just("append"), st.booleans()),
    st.tuples(st.just("upload")),
    st.tuples(st.just("deliver"), st.booleans()),
    st.tuples(st.just("kill")),
    st.tuples(st.just("kill_at"), st.integers(0, 9)),
    st.tuples(st.just("upload_late")),
)


@settings(max_examples=60)
@given(st.lists(ACTION, max_size=30))
def test_every_epoch_arrives_once_whatever_is_killed_when(mlflow_store, actions):
    client, database, experiment = mlflow_store
    with pytest.MonkeyPatch.context() as patch:
        drivers = Drivers(client, experiment, patch)
        for action in actions:
            drivers.act(*action)
        drivers.check(database)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(journal_module, "PART_BYTES", 100)


# What lies on the storage -----------------------------------------------------------------------------------------


def test_a_journal_is_continued_on_another_machine(s3_run, tmp_path):
    journal = open_journal(s3_run)
    for number in range(4):
        journal.append(epoch(number))
    for text in (b"old", b"new"):
        journal.append_file(LogFile("a/table.json"), "a/table.json", text)
    (tmp_path / "model" / "data").mkdir(parents=True)
    (tmp_path / "model" / "data" / "weights").write_bytes(b"1")
    journal.append_file(LogModel(0), "model", tmp_path / "model")
    journal.reject(journal.queue[0].operation, "no")
    journal.mark_done(journal.queue[0])
    journal.postpone(journal.queue[0])
    assert journal.save()
    leave(journal)
    other = open_journal(s3_run)
    assert steps(other.postponed) == [1] and steps(list(other.queue)[:2]) == [2, 3]
    *_, old, new, model = other.queue
    assert other.is_superseded(old) and (other.files_folder / new.file).read_bytes() == b"new"
    assert (other.files_folder / model.file / "data" / "weights").read_bytes() == b"1"
    assert json.loads(other.rejected_path.read_text())["reason"] == "no"
    while other.queue:
        other.mark_done(other.queue[0])
    other.finish()
    other.close()
    assert not other.path.parent.exists()
    (session,) = storage.list_folders(f"{s3_run}/tracking/journal")
    assert storage.base_name(session).startswith("000002-")
    assert storage.list_files(session) == ["head.json", "lines-000000.jsonl", "rejected.jsonl"]


def test_only_what_changes_is_uploaded(run, small_parts, monkeypatch):
    written, write = [], storage.write_bytes

    def record(uri, content):
        written.append((uri, len(content)))
        write(uri, content)

    def uploaded():
        journal.upload()
        sizes = {storage.base_name(uri): size for uri, size in written}
        written.clear()
        return sizes

    monkeypatch.setattr(storage, "write_bytes", record)
    journal = open_journal(run)
    assert list(uploaded()) == ["head.json"]
    for number in range(3):
        journal.append(epoch(number))
    line = journal.size // 3
    head = len(json.dumps(journal.progress()))
    assert uploaded() == {
        "lines-000000.jsonl": 100,
        "lines-000001.jsonl": 100,
        "lines-000002.jsonl": 3 * line - 200,
    } | {"head.json": head}
    assert uploaded() == {}
    journal.append(epoch(3))
    assert uploaded() == {"lines-000002.jsonl": 4 * line - 200, "head.json": head}
    for _ in range(3):
        journal.mark_done(journal.queue[0])
    assert list(uploaded()) == ["head.json"]
    leave(journal)
    journal = open_journal(run)
    assert steps(journal.queue) == [3] and journal.state.last_epoch == 3 and journal.size == 4 * line
    assert list(uploaded()) == ["lines-000002.jsonl", "head.json"]  # the copy: nothing of what is delivered
    leave(journal)
    journal = open_journal(run)
    assert steps(journal.queue) == [3] and journal.state.last_epoch == 3 and journal.size == 4 * line


def test_a_storage_that_failed_for_a_while_is_written_again(run, monkeypatch):
    """Meanwhile a file was delivered that the storage never had."""

    def fail(*_):
        raise OSError("no connection")

    journal = open_journal(run)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "copy_file", fail)
        journal.append_file(LogFile("a.txt"), "a.txt", b"a")
        assert not journal.may_deliver(journal.queue[0])
        assert journal.save() and journal.may_deliver(journal.queue[0])
        journal.mark_done(journal.queue[0])
    journal.append(epoch(1))
    assert journal.save() and not journal.without_storage
    leave(journal)
    other = open_journal(run)
    assert steps(other.queue) == [1]
    storage.write_bytes(f"{other.session}/head.json", b"{}")
    leave(other)
    with pytest.raises(
        UserError, match=f"{run}/tracking/journal cannot be read or written, see train.storage: 'offset'"
    ):
        open_journal(run)


def test_a_journal_in_which_nothing_was_written_leaves_nothing(run):
    journal = open_journal(run)
    journal.finish()
    journal.close()
    assert find_journals(run) == [] and not journal.path.parent.exists()


# With MLflow ------------------------------------------------------------------------------------------------------


def start(run, folder, lease=None, run_id=None):
    return Tracker.open(recipe(folder), {}, run_id, journal=open_journal(run, lease))


def test_nothing_is_delivered_before_it_is_on_the_storage(run, tmp_path, monkeypatch):
    tracker = start(run, tmp_path)
    tracker.log_metrics({"train/loss": 1.0}, step=1)
    assert not tracker.delivery.next_entries()
    tracker.delivery.flush(60)
    assert rows(tmp_path / "mlflow.db", tracker.run_id) == once(1)
    tracker.log_metrics({"train/loss": 0.5}, step=2)
    assert tracker.close("FINISHED") == 0
    assert rows(tmp_path / "mlflow.db", tracker.run_id) == once(1, 2)
    assert MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(tracker.run_id).info.status == "FINISHED"
    until(lambda: not tracker.journal.path.parent.exists())
    monkeypatch.setattr(journal_module, "FLUSH_S", 0.1)
    second = start(run, tmp_path, run_id=tracker.run_id)
    assert second.epochs_logged() == 2
    second.log_metrics({"train/loss": 0.25}, step=3)
    until(lambda: not second.journal.pending_count())  # by the thread
    assert second.close("FINISHED") == 0


def test_a_driver_that_has_lost_its_lease_writes_nothing_more(s3_run, tmp_path, monkeypatch):
    # A renewal in the middle of the take-over below would undo it, which no driver's take-over lets happen.
    for name in ("RENEW_S", "EXPIRY_S"):
        monkeypatch.setattr(lease_module, name, 60.0)
    with leased(s3_run) as lease:
        tracker = start(s3_run, tmp_path, lease)
        tracker.log_metrics({"train/loss": 1.0}, step=1)
        tracker.delivery.flush(60)
        names = [name for name in storage.list_files(s3_run) if "lease" not in name]
        before = {name: storage.read_bytes(f"{s3_run}/{name}") for name in names}
        write_holder(s3_run, Holder.here())
        tracker.log_metrics({"train/loss": 0.5}, step=2)
        assert tracker.close("FINISHED") >= 2  # the epoch and the end
        assert "another process has taken it over" in lease.lost
    assert rows(tmp_path / "mlflow.db", tracker.run_id) == once(1)
    assert before == {name: storage.read_bytes(f"{s3_run}/{name}") for name in before}
    assert MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(tracker.run_id).info.status == "RUNNING"


@pytest.mark.parametrize("mlflow_answers", [True, False])
def test_a_storage_that_fails_at_the_end_costs_mlflow_nothing(run, tmp_path, monkeypatch, lines, mlflow_answers):
    tracker = start(run, tmp_path)
    tracker.delivery.flush(60)
    tracker.log_metrics({"train/loss": 1.0}, step=1)

    def full(*_):
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", full)
        if not mlflow_answers:
            patch.setattr(MlflowClient, "log_batch", lambda *_, **__: 1 / 0)
        assert (tracker.close("FINISHED") == 0) is mlflow_answers
    tracker.delivery.join(30)
    copy = tracker.journal.path.parent
    assert lines[0] == f"{run}/tracking/journal cannot be written (no space). What MLflow has yet to get waits for it."
    assert copy.exists() is not mlflow_answers
    if not mlflow_answers:
        assert lines[-1] == f"What MLflow has yet to get is in {copy}; `posmlp sync {copy}` delivers it."
        assert sync_journals(copy) == 0
    assert rows(tmp_path / "mlflow.db", tracker.run_id) == once(1)


def test_a_run_on_s3_is_synced_unless_it_is_driven(s3_run, tmp_path, monkeypatch):
    with leased(s3_run) as lease:
        tracker = start(s3_run, tmp_path, lease)
        assert is_held(s3_run)
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "log_batch", lambda *_, **__: 1 / 0)
            tracker.log_metrics({"train/loss": 1.0}, step=1)
            with pytest.raises(RunInUse, match="in use by another process"):
                sync_journals(s3_run)
            assert tracker.close("FINISHED", wait_s=0.1) > 0
    assert not is_held(s3_run)
    assert sync_journals(s3_run) == 0
    assert rows(tmp_path / "mlflow.db", tracker.run_id) == once(1)
    with pytest.raises(UserError, match="holds no tracking journal"):
        sync_journals(f"{s3_run}-of-another-name")


def test_another_run_of_the_same_name_has_a_journal_of_its_own(run, tmp_path, monkeypatch):
    first = start(run, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", lambda *_, **__: 1 / 0)
        first.log_file("a.txt", b"a")
        assert first.close("FINISHED") == 1
    second = start(run, tmp_path)
    second.log_metrics({"train/loss": 1.0}, step=1)
    assert second.epochs_logged() == 0 and second.close("FINISHED") == 0
    names = {storage.base_name(each) for each in find_journals(run)}
    assert names == {"journal", f"journal.{first.run_id}"}
    pending = []
    for folder in find_journals(run):
        journal = journal_module.RemoteJournal(folder, None)
        pending += [(journal.state.run_id, entry.operation.path) for entry in [*journal.queue, *journal.postponed]]
        leave(journal)
    assert pending == [(first.run_id, "a.txt")]


def test_of_two_starts_of_a_new_run_one_makes_an_mlflow_run(tmp_path):
    """The journal is open before MLflow's run is made."""
    place = tmp_path / "small"
    first = start(str(place), tmp_path)
    with pytest.raises(JournalInUse):
        start(str(place), tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert [found.info.run_id for found in client.search_runs(["1"])] == [first.run_id]
    assert first.close("FINISHED") == 0


@pytest.mark.parametrize("remote", [True, False])
def test_a_start_that_mlflow_refuses_leaves_no_journal(run, tmp_path, remote):
    place = run if remote else str(tmp_path / "small")
    with pytest.raises(UserError, match="cannot be written, see tracking"):
        Tracker.open(recipe(tmp_path, "tracking.uri=http://127.0.0.1:9"), {}, journal=open_journal(place))
    assert find_journals(place) == []
    open_journal(place).append(OpenRun("a", "b", offline=False))  # it is not held
