"""Operations that wait on disk for a receiver that may be slow, away or gone.

A journal ``journal.jsonl`` holds one operation a line and is only ever appended to. Beside it lie

- ``journal.done``: how far the receiver got, replaced atomically;
- ``journal.rejected``: operations that the receiver refused, with its reason, for a human;
- ``journal.files/``: files that operations carry, until they are delivered.

One process at a time holds a journal, by a lock that the kernel gives back when the process dies, however it dies.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posmlp.errors import UserError

Op = dict[str, Any]


class JournalInUse(UserError):
    """Another process holds the journal."""


@dataclass(eq=False)
class Entry:
    """One operation that waits.

    Attributes:
        start, end: the bytes of its line in the file; None while the disk does not take it.
    """

    op: Op
    start: int | None = None
    end: int | None = None


def read(path: Path) -> Iterator[Entry]:
    """The whole lines of a journal. One that cannot be read (a disk that lost power) is ``{"op": "unreadable"}``."""
    start = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):  # torn: the writer died in the middle of it
                return
            op = None
            with suppress(ValueError):
                op = json.loads(line)
            if not isinstance(op, dict) or "op" not in op:
                op = {"op": "unreadable", "line": line.decode(errors="replace")}
            yield Entry(op, start, start + len(line))
            start += len(line)


class Journal:
    """The operations of one file that are still to be delivered.

    Any thread may append; one thread delivers. A disk that does not take a line or a file is told of once and stops
    nobody: lines are then kept in memory and written when the disk takes them again.

    Attributes:
        queue: what waits, in order.
        aside: what was put off, to be tried again when nothing else waits.
        changed: notified when something was appended or delivered; its lock guards the above.
    """

    def __init__(self, path: Path, echo: Callable[[str], None]):
        """Open, or create, with what an earlier process left undelivered.

        Raises:
            JournalInUse: another process holds it.
        """
        self.path, self.echo = path, echo
        self.state, self.rejected = path.with_suffix(".done"), path.with_suffix(".rejected")
        self.files = path.with_suffix(".files")
        self.changed = threading.Condition()
        self.queue: deque[Entry] = deque()
        self.aside: list[Entry] = []
        self.unwritten: deque[Entry] = deque()
        self.carried: Counter[str] = Counter()  # waiting operations for each file of theirs
        self.offset = self.size = 0
        self.told = False
        self.handle = -1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            self.lock()
            self.load()
        except OSError as error:
            self.tell(error)

    def lock(self) -> None:
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self.handle)
            raise JournalInUse(
                f"{self.path} is in use: a run that is still going delivers it by itself, or another sync is at it"
            ) from error
        except OSError:
            pass  # a file system without locks: then nobody is kept out

    def load(self) -> None:
        """Queue the lines that are not ticked off, and cut off a torn last one."""
        note: dict[str, Any] = {}
        with suppress(OSError, ValueError):  # none yet, or torn by a power cut: deliver all of it again
            note = json.loads(self.state.read_text())
        aside = set(note.get("aside", []))
        self.offset = note.get("offset", 0)
        for entry in read(self.path):
            assert entry.start is not None and entry.end is not None
            self.size = entry.end
            if entry.start >= self.offset or entry.start in aside:
                (self.aside if entry.start in aside else self.queue).append(entry)
                self.carried[entry.op.get("file", "")] += 1
        os.ftruncate(self.handle, self.size)

    def append(self, op: Op, *, sync: bool = True) -> None:
        """Queue an operation and write it down.

        Args:
            sync: force it to the disk, so that it also survives a power cut, not only the end of the process.
        """
        with self.changed:
            entry = Entry(op)
            self.queue.append(entry)
            self.unwritten.append(entry)
            self.carried[op.get("file", "")] += 1
            self.write(sync)
            self.changed.notify_all()

    def append_file(self, op: Op, name: str, content: bytes | Path) -> None:
        """Queue an operation that carries a file or folder: bytes, or a path, which is moved here.

        The same ``name`` again replaces the content of the operations that still wait with it: the latest counts.
        The operation's ``file`` is the path below ``files``; its last part is that of ``name``.
        """
        with self.changed:
            file = f"{hashlib.sha1(name.encode()).hexdigest()[:12]}/{Path(name).name}"
            target = self.files / file
            fresh = target.with_name(f"{target.name}.new")
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, bytes):
                    fresh.write_bytes(content)
                else:
                    remove(fresh)
                    shutil.move(content, fresh)
                if fresh.is_dir():  # only a file is replaced in one step
                    remove(target)
                fresh.replace(target)
            except OSError as error:
                with suppress(OSError):
                    remove(fresh)
                self.tell(error)
                return
            self.append(op | {"file": file})

    def write(self, sync: bool) -> None:
        """Bring to the disk what it has not taken yet, in order."""
        while self.unwritten:
            entry = self.unwritten[0]
            line = json.dumps(entry.op).encode() + b"\n"
            try:
                if os.write(self.handle, line) < len(line):
                    raise OSError("the disk took only a part of it")
                if sync:
                    os.fsync(self.handle)
            except OSError as error:
                with suppress(OSError):  # no torn line in the middle
                    os.ftruncate(self.handle, self.size)
                self.tell(error)
                return
            entry.start, entry.end = self.size, self.size + len(line)
            self.size = entry.end
            self.unwritten.popleft()

    def tell(self, error: OSError) -> None:
        if not self.told:
            self.told = True
            with suppress(OSError):  # the terminal may be gone, too
                self.echo(
                    f"{self.path} cannot be written ({error.strerror or error}); the run goes on, but what MLflow does "
                    "not take at once waits in memory only, and files are not logged"
                )

    def waiting(self) -> int:
        """Operations that are not delivered."""
        with self.changed:
            return len(self.queue) + len(self.aside)

    def superseded(self, entry: Entry) -> bool:
        """Whether a later operation carries the same file."""
        with self.changed:
            return "file" in entry.op and self.carried[entry.op["file"]] > 1

    def done(self, entry: Entry, *, keep_file: bool = False) -> None:
        """Tick off: the queue's first entry, or one that was put aside."""
        with self.changed:
            if self.queue and entry is self.queue[0]:
                self.pop()
            else:
                self.aside.remove(entry)
            self.note()
            file = entry.op.get("file", "")
            self.carried[file] -= 1
            if file and not self.carried[file] and not keep_file:
                with suppress(OSError):  # it only takes up space
                    remove((self.files / file).parent)
            self.changed.notify_all()

    def put_aside(self, entry: Entry) -> None:
        """Put the queue's first entry off."""
        with self.changed:
            self.pop()
            self.aside.append(entry)
            self.note()
            self.changed.notify_all()

    def reject(self, entry: Entry, reason: str, part: Op | None = None) -> None:
        """Write down what the receiver refused, an entry or the ``part`` of it. It still has to be ticked off."""
        try:
            with open(self.rejected, "a") as file:
                file.write(json.dumps((part or entry.op) | {"reason": reason}) + "\n")
        except OSError as error:
            self.tell(error)

    def pop(self) -> None:
        entry = self.queue.popleft()
        if entry.end is None:
            self.unwritten.remove(entry)
        else:
            self.offset = entry.end

    def note(self) -> None:
        """Write down how far the receiver got. No fsync: what is delivered twice for a lost note is merged there."""
        text = json.dumps({"offset": self.offset, "aside": [e.start for e in self.aside if e.start is not None]})
        fresh = self.state.with_suffix(".done.new")
        try:
            fresh.write_text(text)
            fresh.replace(self.state)
        except OSError as error:
            self.tell(error)

    def close(self) -> None:
        """Give the file back, with a last try to write what the disk did not take."""
        with self.changed:
            self.write(sync=True)
            if self.handle >= 0:
                os.close(self.handle)
                self.handle = -1
            self.told = True  # nobody waits for what comes later


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def move_away(path: Path, mark: str) -> None:
    """Rename a journal and what lies beside it, ``journal.jsonl`` to ``journal.MARK.jsonl``, to make room."""
    for suffix in (".done", ".rejected", ".files", path.suffix):
        old = path.with_suffix(suffix)
        if old.exists():
            old.rename(path.with_name(f"{path.stem}.{mark}{suffix}"))
