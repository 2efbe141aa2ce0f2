"""A journal on disk that buffers MLflow operations until they are delivered.

MLflow may be slow, down or gone. A journal ``journal.jsonl`` holds one operation per line
(``pipelines.tracking.operations``) and is only ever appended to. Next to it lie

- ``journal.done``: how far delivery got, replaced atomically;
- ``journal.rejected``: operations that MLflow refused, each with the reason, for a human to read;
- ``journal.files/``: the files of operations that carry one, until they are delivered.

One process at a time holds a journal. The lock is the kernel's, which releases it however the process ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.tracking.operations import (
    LogFile,
    LogMetrics,
    LogModel,
    LogSeries,
    OpenRun,
    Operation,
    Unreadable,
    from_json,
    to_json,
)
from posmlp.errors import UserError
from posmlp.metrics import BY_STEP_TRAIN_LOSS, SYSTEM, TRAIN_LOSS

logger = logging.getLogger(__name__)


class JournalInUse(UserError):
    """Another process holds the journal."""


def is_held(path: Path) -> bool:
    """Return whether another process of this machine holds a journal. Nothing is written."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no journal, or the file system has no locks
        pass
    return False


@dataclass(eq=False)
class Entry:
    """One operation of a journal.

    Attributes:
        start, end: byte offsets of its line in the file; None while the line is only in memory.
    """

    operation: Operation
    start: int | None = None
    end: int | None = None

    @property
    def file(self) -> str:
        """Path of the file that the operation carries, below ``Journal.files_folder``; empty if it carries none."""
        return self.operation.file if isinstance(self.operation, LogFile | LogModel) else ""


def read_entries(path: Path) -> Iterator[Entry]:
    """Yield the entries of a journal file. A line that is not an operation becomes ``Unreadable``.

    A last line without a line break is left out: its writer was killed while writing it.

    Raises:
        OSError: the file is missing or cannot be read.
    """
    start = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            operation = None
            with suppress(ValueError):
                operation = from_json(json.loads(line))
            yield Entry(operation or Unreadable(line.decode(errors="replace")), start, start + len(line))
            start += len(line)


class Journal:
    """The pending operations of one journal file.

    Any thread may append; one thread delivers. If the disk is full or not writable, one warning is logged and the run
    continues: lines stay in memory and are written as soon as the disk accepts them again.

    Attributes:
        path: the journal file.
        files_folder: the files of operations that carry one.
        rejected_path: the file of refused operations.
        queue: entries to deliver, in order.
        postponed: entries that failed and are retried when the queue is empty.
        changed: notified after every append and every delivery; its lock guards the attributes above.
    """

    def __init__(self, path: Path):
        """Open the journal, or create it, and load the entries that an earlier process did not deliver.

        Raises:
            JournalInUse: another process holds it.
        """
        self.path = path
        self.progress_path, self.rejected_path = path.with_suffix(".done"), path.with_suffix(".rejected")
        self.files_folder = path.with_suffix(".files")
        self.changed = threading.Condition()
        self.queue: deque[Entry] = deque()
        self.postponed: list[Entry] = []
        self.unwritten: deque[Entry] = deque()  # entries that are only in memory
        self.file_uses: Counter[str] = Counter()  # number of pending entries per carried file
        self.offset = 0  # bytes of the journal file before the first entry of the queue
        self.size = 0  # bytes of the journal file
        self.warned = False
        self.handle = -1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            self.lock()
            self.load()
        except OSError as error:
            self.warn_unwritable(error)

    def lock(self) -> None:
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self.handle)
            raise JournalInUse(
                f"{self.path} is in use: either its run is still active and delivers it, or another `posmlp sync` does"
            ) from error
        except OSError:
            pass  # the file system has no locks: continue without one

    def load(self) -> None:
        """Queue the entries that are not delivered yet. Cut off an incomplete last line."""
        progress: dict[str, Any] = {}
        with suppress(OSError, ValueError):  # missing, or damaged by a power cut: deliver everything again
            progress = json.loads(self.progress_path.read_text())
        postponed = set(progress.get("aside", []))
        self.offset = progress.get("offset", 0)
        for entry in read_entries(self.path):
            assert entry.start is not None and entry.end is not None
            self.size = entry.end
            if entry.start >= self.offset or entry.start in postponed:
                (self.postponed if entry.start in postponed else self.queue).append(entry)
                self.file_uses[entry.file] += 1
        os.ftruncate(self.handle, self.size)

    def append(self, operation: Operation, *, durable: bool = True) -> None:
        """Queue an operation and write it to the file.

        Args:
            durable: force the line to the disk (fsync), so that it also survives a power cut and not only the end of
                the process.
        """
        with self.changed:
            entry = Entry(operation)
            self.queue.append(entry)
            self.unwritten.append(entry)
            self.file_uses[entry.file] += 1
            self.write_pending(durable)
            self.changed.notify_all()

    def append_file(self, operation: LogFile | LogModel, name: str, content: bytes | Path) -> None:
        """Queue an operation that carries a file or a folder.

        Args:
            operation: its ``file`` is set here: a path below ``files_folder`` whose last part is that of ``name``.
            name: the same name again replaces the content for all pending operations with that name.
            content: bytes, or the path of a file or folder, which is moved into ``files_folder``.
        """
        with self.changed:
            file = f"{hashlib.sha1(name.encode()).hexdigest()[:12]}/{Path(name).name}"
            target = self.files_folder / file
            temporary = target.with_name(f"{target.name}.new")
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, bytes):
                    temporary.write_bytes(content)
                else:
                    remove_path(temporary)
                    shutil.move(content, temporary)
                if temporary.is_dir():  # a folder cannot be replaced atomically, only a file can
                    remove_path(target)
                temporary.replace(target)
            except OSError as error:
                with suppress(OSError):
                    remove_path(temporary)
                self.warn_unwritable(error)
                return
            self.append(replace(operation, file=file))

    def write_pending(self, durable: bool) -> None:
        """Write the lines that are only in memory, in order, until one fails."""
        while self.unwritten:
            entry = self.unwritten[0]
            line = json.dumps(to_json(entry.operation)).encode() + b"\n"
            try:
                if os.write(self.handle, line) < len(line):
                    raise OSError("the disk took only a part of the line")
                if durable:
                    os.fsync(self.handle)
            except OSError as error:
                with suppress(OSError):  # remove the incomplete line
                    os.ftruncate(self.handle, self.size)
                self.warn_unwritable(error)
                return
            entry.start, entry.end = self.size, self.size + len(line)
            self.size = entry.end
            self.unwritten.popleft()

    def warn_unwritable(self, error: OSError) -> None:
        """Log once that the journal cannot be written."""
        if not self.warned:
            self.warned = True
            logger.warning(
                "%s cannot be written (%s). The run continues, but operations that MLflow does not accept at once are "
                "kept in memory only, and files are not logged.",
                self.path,
                error.strerror or error,
            )

    def pending_count(self) -> int:
        """Return the number of operations that are not delivered."""
        with self.changed:
            return len(self.queue) + len(self.postponed)

    def is_superseded(self, entry: Entry) -> bool:
        """Return whether another pending operation carries the same file."""
        with self.changed:
            return bool(entry.file) and self.file_uses[entry.file] > 1

    def mark_done(self, entry: Entry, *, keep_file: bool = False) -> None:
        """Remove an entry: the first one of the queue, or a postponed one.

        Args:
            keep_file: keep the file that it carries, although no other pending operation needs it.
        """
        with self.changed:
            if self.queue and entry is self.queue[0]:
                self.pop_first()
            else:
                self.postponed.remove(entry)
            self.write_progress()
            self.file_uses[entry.file] -= 1
            if entry.file and not self.file_uses[entry.file] and not keep_file:
                with suppress(OSError):  # a file that stays only takes up space
                    remove_path((self.files_folder / entry.file).parent)
            self.changed.notify_all()

    def postpone(self, entry: Entry) -> None:
        """Move the first entry of the queue to the postponed ones."""
        with self.changed:
            self.pop_first()
            self.postponed.append(entry)
            self.write_progress()
            self.changed.notify_all()

    def reject(self, operation: Operation, reason: str) -> None:
        """Write a refused operation to ``rejected_path``. Its entry must still be marked as done."""
        try:
            with open(self.rejected_path, "a") as file:
                file.write(json.dumps(to_json(operation) | {"reason": reason}) + "\n")
        except OSError as error:
            self.warn_unwritable(error)

    def pop_first(self) -> None:
        entry = self.queue.popleft()
        if entry.end is None:
            self.unwritten.remove(entry)
        else:
            self.offset = entry.end

    def write_progress(self) -> None:
        """Write how far delivery got. Without fsync: if a power cut loses it, MLflow ignores what it gets twice."""
        postponed = [entry.start for entry in self.postponed if entry.start is not None]
        text = json.dumps({"offset": self.offset, "aside": postponed})
        temporary = self.progress_path.with_suffix(".done.new")
        try:
            temporary.write_text(text)
            temporary.replace(self.progress_path)
        except OSError as error:
            self.warn_unwritable(error)

    def close(self) -> None:
        """Write what is only in memory, if the disk accepts it now, and release the lock."""
        with self.changed:
            self.write_pending(durable=True)
            if self.handle >= 0:
                os.close(self.handle)
                self.handle = -1
            self.warned = True  # later failures concern nobody


@dataclass
class JournalState:
    """The state of a run according to its journal.

    Attributes:
        run_id: the MLflow run; None if no line of the journal names one.
        uri: the tracking URI without secrets; None likewise.
        last_epoch: the last epoch whose metrics are in the journal; 0 for none.
        last_step: the last optimizer step whose metrics are in the journal; 0 for none.
        next_system_step: the MLflow step for the next system metrics.
        opened_offline: a driver opened the journal while MLflow did not answer.
    """

    run_id: str | None = None
    uri: str | None = None
    last_epoch: int = 0
    last_step: int = 0
    next_system_step: int = 0
    opened_offline: bool = False

    @classmethod
    def read(cls, path: Path) -> JournalState:
        """Read a journal file. If it is missing or cannot be read, the state is that of a new run."""
        state = cls()
        with suppress(OSError):
            for entry in read_entries(path):
                state.apply(entry.operation)
        return state

    def apply(self, operation: Operation) -> None:
        match operation:
            case OpenRun(uri, run_id, offline):
                self.run_id, self.uri, self.opened_offline = run_id, uri, self.opened_offline or offline
            case LogMetrics(step=step, values=values, run_id=None):
                if TRAIN_LOSS in values:  # every epoch has it
                    self.last_epoch = max(self.last_epoch, step)
                if any(name.startswith(SYSTEM) for name in values):
                    self.next_system_step = step + 1
            case LogSeries(names, rows) if BY_STEP_TRAIN_LOSS in names:
                self.last_step = max([self.last_step, *(int(row[1]) for row in rows)])


def remove_path(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def archive_journal(path: Path, label: str) -> None:
    """Rename a journal and the files next to it from ``journal.*`` to ``journal.LABEL.*``, to make room for another."""
    for suffix in (".done", ".rejected", ".files", path.suffix):
        old = path.with_suffix(suffix)
        if old.exists():
            old.rename(path.with_name(f"{path.stem}.{label}{suffix}"))
