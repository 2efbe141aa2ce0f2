"""The journal alone: the format of its lines, what it stores and returns, and which failures it survives."""

import json
import os
import resource
import stat
from pathlib import Path

import pytest

from pipelines.registry.logged_models import CheckpointLink
from pipelines.tracking import journal as journal_module
from pipelines.tracking.journal import Journal, JournalInUse, JournalState, archive_journal, is_held, read_entries
from pipelines.tracking.operations import (
    EndRun,
    LinkCheckpoints,
    LogFile,
    LogInputs,
    LogMetrics,
    LogModel,
    LogParams,
    LogSeries,
    OpenRun,
    SetTags,
    Unreadable,
    from_json,
    to_json,
)
from tests.helpers.log_lines import log_lines

LINK = '{"uri": "/runs/a", "step": 12, "epoch": 1, "metrics": {"val/top1": 0.5}, "run_id": "abc", '
LINK += '"datasets": {"val/": ["motion/val.csv", "0a1b"]}}'
CHECKPOINT = CheckpointLink("/runs/a", 12, 1, {"val/top1": 0.5}, "abc", {"val/": ["motion/val.csv", "0a1b"]})

# Lines as earlier versions of this project wrote them, one for each kind of operation.
LINES = [
    (
        '{"op": "open", "uri": "sqlite:////runs/mlflow.db", "run_id": "abc", "blind": false}',
        OpenRun("sqlite:////runs/mlflow.db", "abc", offline=False),
    ),
    (
        '{"op": "open", "uri": "http://a", "run_id": "abc", "blind": true}',
        OpenRun("http://a", "abc", offline=True),
    ),
    (
        '{"op": "metrics", "time": 1700000000123, "step": 3, "values": {"train/loss": 0.1, "val/top1": NaN}}',
        LogMetrics(1700000000123, 3, {"train/loss": 0.1, "val/top1": float("nan")}),
    ),
    (
        '{"op": "metrics of", "of": "def", "time": 1700000000123, "step": 2, "values": {"cost/latency_ms": 1e-07}}',
        LogMetrics(1700000000123, 2, {"cost/latency_ms": 1e-07}, run_id="def"),
    ),
    (
        '{"op": "series", "names": ["by_step/train_loss", "by_step/lr"], "rows": [[1700000000123, 8, 0.5, 0.001]]}',
        LogSeries(["by_step/train_loss", "by_step/lr"], [[1700000000123, 8, 0.5, 0.001]]),
    ),
    ('{"op": "params", "params": {"cost/gmacs": "0.5"}}', LogParams({"cost/gmacs": "0.5"})),
    ('{"op": "tags", "tags": {"trial": "3"}, "of": "def"}', SetTags({"trial": "3"}, run_id="def")),
    ('{"op": "tags", "tags": {"colour": "gr\\u00fcn"}}', SetTags({"colour": "grün"})),
    ('{"op": "status", "status": "FINISHED", "time": 1700000000123}', EndRun("FINISHED", 1700000000123)),
    (
        '{"op": "status", "status": "FAILED", "time": 1700000000123, "of": "def"}',
        EndRun("FAILED", 1700000000123, run_id="def"),
    ),
    (
        '{"op": "file", "path": "recipes/trial-003.yaml", "file": "0a1b2c3d4e5f/trial-003.yaml"}',
        LogFile("recipes/trial-003.yaml", "0a1b2c3d4e5f/trial-003.yaml"),
    ),
    (
        '{"op": "model", "time": 1700000000123, "file": "e6dd4c4f3ac3/model"}',
        LogModel(1700000000123, "e6dd4c4f3ac3/model"),
    ),
    (
        '{"op": "model", "time": 1700000000123, "file": "e6dd4c4f3ac3/model", "checkpoint": ' + LINK + "}",
        LogModel(1700000000123, "e6dd4c4f3ac3/model", CHECKPOINT),
    ),
    ('{"op": "checkpoints", "links": [' + LINK + '], "finished": true}', LinkCheckpoints([CHECKPOINT], finished=True)),
    ('{"op": "inputs", "datasets": [{"name": "motion/val.csv"}]}', LogInputs([{"name": "motion/val.csv"}])),
    ('{"op": "unreadable", "line": "\\u0000\\n"}', Unreadable("\0\n")),  # in journal.rejected
]


@pytest.mark.parametrize(("line", "operation"), LINES)
def test_the_lines_on_disk_are_those_of_earlier_versions(line, operation):
    assert json.dumps(to_json(operation)) == line
    assert repr(from_json(json.loads(line))) == repr(operation)  # NaN does not equal itself


@pytest.mark.parametrize("tree", [5, None, [], {}, {"op": "metrics"}, {"op": "fly"}, {"op": "tags", "tags": 1}])
def test_other_json_is_no_operation(tree):
    assert from_json(tree) is None


def test_a_link_of_another_form_is_kept_as_an_unreadable_line(tmp_path):
    line = '{"op": "checkpoints", "links": [{"uri": "/runs/a"}], "finished": true}\n'
    (tmp_path / "journal.jsonl").write_text(line)
    (entry,) = read_entries(tmp_path / "journal.jsonl")
    assert entry.operation == Unreadable(line)


def test_a_journal_of_an_earlier_version_is_read_and_continued(tmp_path):
    path = tmp_path / "journal.jsonl"
    lines = [f"{line}\n" for line, _ in LINES]
    path.write_text("".join(lines))
    path.with_suffix(".done").write_text(f'{{"offset": {len("".join(lines[:3]))}, "aside": [{len(lines[0])}]}}')
    state = JournalState.read(path)
    assert (state.run_id, state.uri, state.last_epoch, state.opened_offline) == ("abc", "http://a", 3, True)
    journal = Journal(path)
    assert [entry.operation for entry in journal.queue] == [operation for _, operation in LINES[3:]]
    assert [entry.operation for entry in journal.postponed] == [LINES[1][1]]
    for _, operation in LINES:
        journal.append(operation)
    journal.close()
    assert path.read_text() == "".join([*lines, *lines])


def numbered(n):
    """An operation that is recognised by its number."""
    return LogMetrics(0, n, {"train/loss": 0.5})


def steps(entries):
    return [entry.operation.step for entry in entries]


def filled(path, count):
    journal = Journal(path)
    for n in range(count):
        journal.append(numbered(n))
    return journal


def test_operations_that_are_not_done_come_again_in_order(tmp_path):
    journal = filled(tmp_path / "deep" / "journal.jsonl", 4)
    journal.mark_done(journal.queue[0])
    journal.postpone(journal.queue[0])
    journal.close()
    journal = Journal(journal.path)
    assert steps(journal.queue) == [2, 3]
    assert steps(journal.postponed) == [1]
    assert journal.pending_count() == 3
    journal.mark_done(journal.postponed[0])
    journal.close()
    assert Journal(journal.path).pending_count() == 2


def test_an_incomplete_last_line_is_cut_off(tmp_path):
    path = tmp_path / "journal.jsonl"
    filled(path, 3).close()
    with open(path, "a") as file:
        file.write('{"op": "metrics", "ti')
    journal = Journal(path)
    journal.append(numbered(3))
    assert steps(journal.queue) == [0, 1, 2, 3]
    assert steps(read_entries(path)) == [0, 1, 2, 3]


def test_a_damaged_line_and_a_lost_progress_file_lose_nothing_else(tmp_path):
    path = tmp_path / "journal.jsonl"
    filled(path, 3).close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0\0\0\0\n5\n" + lines[2])
    path.with_suffix(".done").write_text("")
    journal = Journal(path)
    operations = [entry.operation for entry in journal.queue]
    assert operations == [numbered(0), Unreadable("\0\0\0\0\n"), Unreadable("5\n"), numbered(2)]


def test_one_process_at_a_time_holds_a_journal(tmp_path):
    journal = filled(tmp_path / "journal.jsonl", 1)
    with pytest.raises(JournalInUse, match=r"journal\.jsonl is in use: either its run is still active"):
        Journal(journal.path)
    journal.close()
    assert Journal(journal.path).pending_count() == 1


def test_a_file_has_its_latest_content_until_its_last_operation_is_done(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    for text in (b"old", b"new"):
        journal.append_file(LogFile("a/table.json"), "a/table.json", text)
    first, second = journal.queue
    assert journal.is_superseded(first)
    journal.mark_done(first)
    file = journal.files_folder / second.operation.file
    assert file.name == "table.json"
    assert file.read_bytes() == b"new"
    assert not journal.is_superseded(second)
    journal.mark_done(second)
    assert not file.exists()


def test_a_folder_can_be_carried_and_replaced(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    for text in ("old", "new"):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / text).write_text(text)
        journal.append_file(LogModel(0), "model", tmp_path / "model")
    folder = journal.files_folder / journal.queue[0].operation.file
    assert [p.name for p in folder.iterdir()] == ["new"]
    assert not (tmp_path / "model").exists()


def test_a_full_disk_is_reported_once_and_lines_are_written_when_there_is_space(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = filled(path, 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with log_lines() as lines:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (journal.size + 5, hard))  # in the middle of the next line
            for n in (2, 3):
                journal.append(numbered(n))
            journal.append_file(LogFile("a.png"), "a.png", bytes(1000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(lines) == 1
    assert "cannot be written" in lines[0]
    assert steps(journal.queue) == [0, 1, 2, 3]
    assert steps(read_entries(path)) == [0, 1]
    journal.mark_done(journal.queue[0])
    journal.append(numbered(4))
    assert steps(read_entries(path)) == [0, 1, 2, 3, 4]
    journal.close()
    assert steps(Journal(path).queue) == [1, 2, 3, 4]


def test_without_a_writable_folder_operations_stay_in_memory(tmp_path):
    (tmp_path / "file").touch()
    with log_lines() as lines:
        journal = filled(tmp_path / "file" / "journal.jsonl", 3)
        journal.mark_done(journal.queue[0])
        assert steps(journal.queue) == [1, 2]
        assert len(lines) == 1
        journal.close()


def test_an_archived_journal_keeps_everything_that_belongs_to_it(tmp_path):
    journal = filled(tmp_path / "journal.jsonl", 2)
    journal.append_file(LogFile("a.png"), "a.png", b"picture")
    journal.mark_done(journal.queue[0])
    journal.reject(journal.queue[0].operation, "no")
    journal.close()
    archive_journal(journal.path, "abc")
    assert not list(tmp_path.glob("journal.[jdrf]*"))
    archived = Journal(tmp_path / "journal.abc.jsonl")
    assert archived.queue[0].operation == numbered(1)
    assert archived.queue[1].operation.path == "a.png"
    assert (archived.files_folder / archived.queue[1].operation.file).read_bytes() == b"picture"
    assert json.loads(archived.rejected_path.read_text())["reason"] == "no"


def test_a_journal_is_held_while_it_is_open(tmp_path):
    run, path = str(tmp_path), tmp_path / "tracking" / "journal.jsonl"
    assert not is_held(run)
    assert not path.exists()
    journal = filled(path, 1)
    assert is_held(run)
    journal.close()
    before = path.read_bytes()
    assert not is_held(run)
    assert path.read_bytes() == before
    Journal(path).close()  # to ask does not keep it


def test_bytes_that_are_no_text_are_kept_as_a_readable_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"\xff{}\n")
    assert [entry.operation for entry in read_entries(path)] == [Unreadable("\ufffd{}\n")]


def test_a_journal_makes_its_folders_and_others_may_read_it(tmp_path):
    before = os.umask(0o022)
    try:
        journal = filled(tmp_path / "several" / "folders" / "journal.jsonl", 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(journal.path.stat().st_mode) == 0o644
    assert journal.path.read_text() == '{"op": "metrics", "time": 0, "step": 0, "values": {"train/loss": 0.5}}\n'


def test_progress_as_it_lies_on_disk(tmp_path):
    """The offset after what is delivered, and where the lines begin that are tried again later."""
    journal = filled(tmp_path / "journal.jsonl", 3)
    size = journal.path.stat().st_size // 3
    journal.postpone(journal.queue[0])
    journal.mark_done(journal.queue[0])
    assert json.loads((tmp_path / "journal.done").read_text()) == {"offset": 2 * size, "aside": [0]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["journal.done", "journal.jsonl"]


def test_a_reopened_journal_knows_how_often_a_file_is_needed(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    for text in (b"old", b"new"):
        journal.append_file(LogFile("a/table.json"), "a/table.json", text)
    journal.append(numbered(0))
    journal.close()
    journal = Journal(journal.path)
    first, second, last = journal.queue
    assert journal.is_superseded(first) and not journal.is_superseded(last)
    journal.mark_done(first)
    file = journal.files_folder / second.operation.file
    assert file.read_bytes() == b"new" and not journal.is_superseded(second)
    journal.mark_done(second, keep_file=True)
    assert file.exists()


def test_the_folder_of_a_carried_file_follows_from_its_name(tmp_path):
    """The first 12 digits of sha1 of the name, as sha1sum prints it."""
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append_file(LogFile("x"), "a/table.json", b"1")
    assert journal.queue[0].operation == LogFile("x", "acf3565ebe93/table.json")
    assert (tmp_path / "journal.files" / "acf3565ebe93" / "table.json").read_bytes() == b"1"


@pytest.mark.parametrize("removable", [True, False])
def test_a_file_that_cannot_be_stored_is_reported_with_the_reason(tmp_path, monkeypatch, removable):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    if not removable:
        monkeypatch.setattr(journal_module, "remove_path", full)
    with log_lines() as lines:
        journal.append_file(LogFile("a.png"), "a.png", b"picture")
    assert not journal.queue
    assert lines == [
        f"{path} cannot be written (No space left on device). The run continues, but operations that MLflow does not "
        "accept at once are kept in memory only, and files are not logged."
    ]


def test_an_error_without_a_reason_of_the_system_is_reported_in_its_own_words(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "journal.jsonl")
    monkeypatch.setattr(os, "write", lambda handle, line: len(line) - 1)
    with log_lines() as lines:
        journal.append(numbered(0))
    assert len(lines) == 1 and "cannot be written (the disk took only a part of the line). The run" in lines[0]
    assert journal.pending_count() == 1 and journal.path.stat().st_size == 0


def test_lines_are_forced_to_the_disk_unless_they_need_not_be(tmp_path, monkeypatch):
    forced, write = [], os.write
    journal = Journal(tmp_path / "journal.jsonl")
    monkeypatch.setattr(os, "fsync", forced.append)
    journal.append(numbered(0), durable=False)
    assert forced == []
    journal.append(numbered(1))
    assert forced == [journal.handle]
    monkeypatch.setattr(os, "write", lambda *_: 0)
    journal.append(numbered(2), durable=False)
    monkeypatch.setattr(os, "write", write)
    handle = journal.handle
    journal.close()
    assert forced == [handle] * 2
    assert steps(read_entries(journal.path)) == [0, 1, 2]


def test_a_closed_journal_is_silent(tmp_path):
    journal = filled(tmp_path / "journal.jsonl", 1)
    journal.close()
    journal.close()
    with log_lines() as lines:
        journal.append(numbered(1))
    assert lines == []
    assert steps(read_entries(journal.path)) == [0]


def test_every_change_is_notified(tmp_path, monkeypatch):
    journal, told = Journal(tmp_path / "journal.jsonl"), []
    monkeypatch.setattr(journal.changed, "notify_all", lambda: told.append(journal.pending_count()))
    journal.append(numbered(0))
    journal.append(numbered(1))
    journal.postpone(journal.queue[0])
    journal.mark_done(journal.queue[0])
    assert told == [1, 2, 2, 1]


def test_the_state_of_a_run_by_hand(tmp_path):
    """Epochs by train/loss, steps by by_step/train_loss, and the next step of the system's metrics; other runs' not."""
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    assert JournalState.read(path) == JournalState.read(tmp_path / "missing") == JournalState()
    journal.append(OpenRun("http://a", "abc", offline=True))
    journal.append(LogMetrics(0, 7, {"train/loss": 1.0}))
    journal.append(LogMetrics(0, 6, {"train/loss": 1.0}))
    journal.append(LogMetrics(0, 9, {"val/top1": 1.0}))
    journal.append(LogMetrics(0, 9, {"train/loss": 1.0}, run_id="def"))
    journal.append(LogMetrics(0, 4, {"x": 1.0, "system/cpu": 1.0}))
    journal.append(LogSeries(["by_step/lr", "by_step/train_loss"], [[1000, 30, 0.1, 2.0], [2000, 20, 0.1, 2.0]]))
    journal.append(LogSeries(["by_step/train_loss"], [[3000, 25, 0.5]]))
    journal.append(LogSeries(["by_step/lr"], [[3000, 99, 0.5]]))
    journal.append(OpenRun("http://b", "abc", offline=False))
    journal.close()
    assert JournalState.read(path) == JournalState(
        run_id="abc", uri="http://b", last_epoch=7, last_step=30, next_system_step=5, opened_offline=True
    )
