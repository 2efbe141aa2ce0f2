"""The journal alone: what it keeps, hands out, and survives."""

import json
import resource

import pytest

from pipelines.tracking.journal import Journal, JournalInUse, move_away, read


def ops(journal):
    return [entry.op["n"] for entry in journal.queue]


def filled(path, count, echo=print):
    journal = Journal(path, echo)
    for n in range(count):
        journal.append({"op": "x", "n": n})
    return journal


def test_what_was_not_ticked_off_comes_again_in_order(tmp_path):
    journal = filled(tmp_path / "deep" / "journal.jsonl", 4)
    journal.done(journal.queue[0])
    journal.put_aside(journal.queue[0])
    journal.close()
    journal = Journal(journal.path, print)
    assert ops(journal) == [2, 3]
    assert [e.op["n"] for e in journal.aside] == [1]
    assert journal.waiting() == 3
    journal.done(journal.aside[0])
    journal.close()
    assert Journal(journal.path, print).waiting() == 2


def test_a_torn_last_line_is_cut_off(tmp_path):
    path = tmp_path / "journal.jsonl"
    filled(path, 3).close()
    with open(path, "a") as file:
        file.write('{"op": "x", "n"')
    journal = Journal(path, print)
    journal.append({"op": "x", "n": 3})
    assert ops(journal) == [0, 1, 2, 3]
    assert [e.op["n"] for e in read(path)] == [0, 1, 2, 3]


def test_a_garbled_line_and_a_lost_note_lose_nothing_else(tmp_path):
    path = tmp_path / "journal.jsonl"
    filled(path, 3).close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0\0\0\0\n5\n" + lines[2])
    path.with_suffix(".done").write_text("")
    journal = Journal(path, print)
    assert [e.op["op"] for e in journal.queue] == ["x", "unreadable", "unreadable", "x"]


def test_one_process_at_a_time_holds_a_journal(tmp_path):
    journal = filled(tmp_path / "journal.jsonl", 1)
    with pytest.raises(JournalInUse, match=r"journal\.jsonl is in use: a run that is still going"):
        Journal(journal.path, print)
    journal.close()
    assert Journal(journal.path, print).waiting() == 1


def test_the_latest_content_of_a_file_counts_and_goes_with_its_last_operation(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", print)
    for text in (b"old", b"new"):
        journal.append_file({"op": "file"}, "a/table.json", text)
    first, second = journal.queue
    assert journal.superseded(first)
    journal.done(first)
    file = journal.files / second.op["file"]
    assert file.name == "table.json"
    assert file.read_bytes() == b"new"
    assert not journal.superseded(second)
    journal.done(second)
    assert not file.exists()


def test_a_folder_can_be_carried_and_replaced(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", print)
    for text in ("old", "new"):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / text).write_text(text)
        journal.append_file({"op": "model"}, "model", tmp_path / "model")
    folder = journal.files / journal.queue[0].op["file"]
    assert [p.name for p in folder.iterdir()] == ["new"]
    assert not (tmp_path / "model").exists()


def test_a_full_disk_is_told_once_and_lines_are_written_when_there_is_room(tmp_path):
    told = []
    path = tmp_path / "journal.jsonl"
    journal = filled(path, 2, told.append)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (journal.size + 5, hard))  # in the middle of the next line
        for n in (2, 3):
            journal.append({"op": "x", "n": n})
        journal.append_file({"op": "file"}, "a.png", bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(told) == 1
    assert "cannot be written" in told[0]
    assert ops(journal) == [0, 1, 2, 3]
    assert [e.op["n"] for e in read(path)] == [0, 1]
    journal.done(journal.queue[0])
    journal.append({"op": "x", "n": 4})
    assert [e.op["n"] for e in read(path)] == [0, 1, 2, 3, 4]
    journal.close()
    assert ops(Journal(path, print)) == [1, 2, 3, 4]


def test_a_folder_that_cannot_be_written_leaves_the_memory(tmp_path):
    told = []
    (tmp_path / "file").touch()
    journal = filled(tmp_path / "file" / "journal.jsonl", 3, told.append)
    journal.done(journal.queue[0])
    assert ops(journal) == [1, 2]
    assert len(told) == 1
    journal.close()


def test_an_older_journal_makes_room_with_all_that_belongs_to_it(tmp_path):
    journal = filled(tmp_path / "journal.jsonl", 2)
    journal.append_file({"op": "file", "n": 2}, "a.png", b"picture")
    journal.done(journal.queue[0])
    journal.reject(journal.queue[0], "no")
    journal.close()
    move_away(journal.path, "abc")
    assert not list(tmp_path.glob("journal.[jdrf]*"))
    moved = Journal(tmp_path / "journal.abc.jsonl", print)
    assert ops(moved) == [1, 2]
    assert (moved.files / moved.queue[1].op["file"]).read_bytes() == b"picture"
    assert json.loads(moved.rejected.read_text())["reason"] == "no"
