"""A journal that buffers MLflow operations until they are delivered. It lies in the folder of its run or study.

MLflow may be slow, down or gone. A journal ``tracking/journal.jsonl`` holds one operation per line
(``pipelines.tracking.operations``) and is only ever appended to. Next to it lie

- ``journal.done``: how far delivery got, replaced atomically;
- ``journal.rejected``: operations that MLflow refused, each with the reason, for a human to read;
- ``journal.files/``: the files of operations that carry one, until they are delivered.

One process at a time holds a journal. The lock is the kernel's, which releases it however the process ends.

An object store has neither appends nor locks. There the journal is a folder ``tracking/journal`` (``RemoteJournal``).
It holds a folder for each process that has opened it, of which the newest with a ``head.json`` counts:

- ``lines-000000.jsonl``, ...: the lines, in parts of ``PART_BYTES``, of which only the last one changes;
- ``head.json``: how far delivery got, and the state of the run, written last;
- ``rejected.jsonl`` and ``files/``: as above.

The run's lease (``pipelines.runs.lease``) keeps a second process out. A process that has lost it, and notices late,
writes only into its own folder, which no longer counts.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import uuid
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.runs.lease import Lease, LeaseLost, is_driven
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
from posmlp import storage
from posmlp.errors import UserError
from posmlp.metrics import BY_STEP_TRAIN_LOSS, SYSTEM, TRAIN_LOSS

logger = logging.getLogger(__name__)

FOLDER = "tracking"  # of journals, in the folder of a run or a study
FILE = "journal.jsonl"
REMOTE = "journal"
FLUSH_S = 5.0  # between two uploads of a remote journal
PART_BYTES = 256 * 2**10  # of a remote journal's lines
PART = re.compile(r"lines-([0-9]{6})\.jsonl")  # name of a part
SESSION = re.compile(r"[0-9]{6}-[0-9a-f]{8}")  # name of the folder of a process in a remote journal


class JournalInUse(UserError):
    """Another process holds the journal."""


def is_held(run: str) -> bool:
    """Return whether a process holds the journal of a run or a study, on a local storage one of this machine.

    Nothing is written.

    Raises:
        OSError: a remote storage does not answer.
    """
    if storage.is_remote(run):
        return is_driven(run)
    try:
        with open(storage.join(run, f"{FOLDER}/{FILE}"), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no journal, or the file system has no locks
        pass
    return False


def open_journal(run: str, lease: Lease | None = None) -> Journal:
    """Open the journal of a run or a study, or create it.

    Args:
        run: the folder of the run or the study.
        lease: of the run, if the storage is remote: it is checked before each upload.

    Raises:
        JournalInUse: another process holds it.
        UserError: a remote storage does not answer.
    """
    if storage.is_remote(run):
        return RemoteJournal(storage.join(run, f"{FOLDER}/{REMOTE}"), lease)
    return Journal(Path(storage.join(run, f"{FOLDER}/{FILE}")))


def find_journals(folder: str) -> list[str]:
    """The journals of a run or a study, and those of earlier runs of its name.

    Args:
        folder: of the run or the study; on a local storage also its ``tracking`` folder, or a journal file.

    Raises:
        OSError: a remote storage does not answer.
    """
    if storage.is_remote(folder):
        found = storage.list_folders(storage.join(folder, FOLDER))
        return [each for each in found if storage.base_name(each).split(".")[0] == REMOTE]
    path = Path(folder)
    if path.is_file():
        return [folder]
    return [str(each) for each in sorted([*path.glob("*.jsonl"), *path.glob(f"{FOLDER}/*.jsonl")])]


def open_locked(path: Path) -> int:
    """Open a journal file, or create it, and lock it. Returns its handle.

    Raises:
        JournalInUse: another process holds it.
        OSError: it cannot be opened.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise JournalInUse(
                f"{path} is in use: either its run is still active and delivers it, or another `posmlp sync` does"
            ) from error
        except OSError:
            pass  # the file system has no locks: continue without one
        if is_file_at(handle, path):
            return handle
        os.close(handle)  # the process that held it has just removed or renamed it


def is_file_at(handle: int, path: Path) -> bool:
    """Return whether an open file still lies at a path."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
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


def read_progress(path: Path) -> dict[str, Any]:
    """How far the delivery of a journal file got, as ``Journal.progress`` gives it; empty if it is not known."""
    with suppress(OSError, ValueError):  # missing, or damaged by a power cut: everything is delivered again
        return dict(json.loads(path.with_suffix(".done").read_text()))
    return {}


def read_entries(path: Path, start: int = 0) -> Iterator[Entry]:
    """Yield the entries of a journal file. A line that is not an operation becomes ``Unreadable``.

    A last line without a line break is left out: its writer was killed while writing it.

    Args:
        start: bytes of the file before the first entry.

    Raises:
        OSError: the file is missing or cannot be read.
    """
    with open(path, "rb") as file:
        file.seek(start)
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
        place, rejected_place: where the journal and its refused operations lie, for messages.
        state: of the run, according to the lines that are written.
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
        self.path, self.place = path, str(path)
        self.progress_path, self.rejected_path = path.with_suffix(".done"), path.with_suffix(".rejected")
        self.rejected_place = str(self.rejected_path)
        self.files_folder = path.with_suffix(".files")
        self.changed = threading.Condition()
        self.warned = False
        self.handle = -1
        self.open_file()

    def open_file(self) -> None:
        self.state = JournalState()
        self.queue: deque[Entry] = deque()
        self.postponed: list[Entry] = []
        self.unwritten: deque[Entry] = deque()  # entries that are only in memory
        self.file_uses: Counter[str] = Counter()  # number of pending entries per carried file
        self.offset = 0  # bytes of the journal file before the first entry of the queue
        self.size = 0  # bytes of the journal file
        self.start = 0  # bytes of the journal file that are not here, because all of them is delivered
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.handle = open_locked(self.path)
            self.load()
        except OSError as error:
            self.warn_unwritable(error)

    def load(self) -> None:
        """Queue the entries that are not delivered yet. Cut off an incomplete last line."""
        progress = read_progress(self.path)
        postponed = set(progress.get("aside", []))
        self.offset, self.start = progress.get("offset", 0), progress.get("start", 0)
        self.size, self.state = self.start, JournalState.of(progress)
        for entry in read_entries(self.path, self.start):
            assert entry.start is not None and entry.end is not None
            self.size = entry.end
            self.state.apply(entry.operation)
            if entry.start >= self.offset or entry.start in postponed:
                (self.postponed if entry.start in postponed else self.queue).append(entry)
                self.file_uses[entry.file] += 1
        os.ftruncate(self.handle, self.size)

    def archive(self) -> None:
        """Keep the journal under the name of its MLflow run, and start an empty one.

        Raises:
            JournalInUse: another process holds the new one.
            OSError: it cannot be renamed.
        """
        handle = self.handle
        archive_journal(self.path, str(self.state.run_id))
        self.open_file()
        if handle >= 0:
            os.close(handle)

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
            self.state.apply(entry.operation)
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

    def progress(self) -> dict[str, Any]:
        """How far delivery got, as it is written."""
        return {"offset": self.offset, "aside": [entry.start for entry in self.postponed if entry.start is not None]}

    def write_progress(self) -> None:
        """Write how far delivery got. Without fsync: if a power cut loses it, MLflow ignores what it gets twice."""
        temporary = self.progress_path.with_suffix(".done.new")
        try:
            temporary.write_text(json.dumps(self.progress()))
            temporary.replace(self.progress_path)
        except OSError as error:
            self.warn_unwritable(error)

    def may_deliver(self, entry: Entry) -> bool:
        """Return whether an entry may be delivered now."""
        return True

    def save(self) -> bool:
        """Bring the storage up to date; a local journal always is. Returns False if this process may not write it."""
        return True

    def finish(self) -> None:
        """Bring the storage up to date for the last time. The delivery must have ended, or may wait for MLflow."""

    def close(self) -> None:
        """Write what is only in memory, if the disk accepts it now, and release the lock.

        A journal in which nothing was ever written leaves no file.
        """
        with self.changed:
            self.write_pending(durable=True)
            if self.handle >= 0:
                if not self.size and is_file_at(self.handle, self.path):
                    self.path.unlink()
                os.close(self.handle)
                self.handle = -1
            self.warned = True  # later failures concern nobody


class RemoteJournal(Journal):
    """A journal on a remote storage. A working copy on this node is uploaded every ``FLUSH_S`` seconds.

    An operation is delivered once it is on the storage. So whoever resumes after a ``kill -9`` finds all that MLflow
    has got, and delivers it a second time as it was, which MLflow ignores.

    Attributes:
        folder: of the journal, a URI.
        session: of this process, below ``folder``.
        earlier: sessions that were found, removed as soon as this one is complete.
        stored: bytes of the lines, progress, and bytes of the refused operations on the storage.
        stored_files: the carried files on the storage.
        changed_files: the carried files that are not, or with an older content.
        without_storage: deliver what is not on the storage too, because it cannot be written at the end of a run.
    """

    def __init__(self, folder: str, lease: Lease | None):
        """Copy the newest session, which is the journal as the last process has left it, to a newer one.

        Raises:
            LeaseLost: another process has taken the run over.
            UserError: the storage does not answer.
        """
        self.folder, self.lease = folder, lease
        scratch = Path(tempfile.mkdtemp(prefix="posmlp-journal-"))
        self.uploading = threading.Lock()
        self.ended = threading.Event()
        self.finished = self.without_storage = self.storage_warned = False
        try:
            self.earlier = [each for each in storage.list_folders(folder) if SESSION.fullmatch(storage.base_name(each))]
            self.fetch(scratch / FILE)
            self.session = self.next_session()
            super().__init__(scratch / FILE)
            self.upload()  # at once: from here on, what the last process may still write no longer counts
        except BaseException as error:
            shutil.rmtree(scratch, ignore_errors=True)
            if isinstance(error, OSError | json.JSONDecodeError | KeyError | TypeError):  # the others: a damaged head
                raise UserError(f"{folder} cannot be read or written, see train.storage: {error}") from error
            raise
        self.place = self.rejected_place = folder
        self.thread = threading.Thread(target=self.upload_until_finished, daemon=True, name="journal-upload")
        self.thread.start()

    def fetch(self, path: Path) -> None:
        """Copy the newest complete session to a journal file and what lies next to it, without what is delivered."""
        for session in reversed(self.earlier):
            files = storage.list_files(session)
            if "head.json" not in files:
                continue
            head = json.loads(storage.read_bytes(storage.join(session, "head.json")))
            head["start"] = min([head["offset"], *head["aside"]])
            path.with_suffix(".done").write_text(json.dumps(head))
            path.touch()
            for file in files:
                uri = storage.join(session, file)
                if part := PART.fullmatch(file):
                    if int(part[1]) >= head["start"] // PART_BYTES:
                        with open(path, "r+b") as lines:
                            lines.seek(int(part[1]) * PART_BYTES)
                            lines.write(storage.read_bytes(uri))
                elif file.startswith("files/"):
                    storage.copy_file(uri, str(path.with_suffix(".files") / file.removeprefix("files/")))
                elif file == "rejected.jsonl":
                    storage.copy_file(uri, str(path.with_suffix(".rejected")))
            return

    def progress(self) -> dict[str, Any]:
        return super().progress() | {"start": self.start, "state": asdict(self.state)}

    def next_session(self) -> str:
        """The folder of a session that is newer than those that were found."""
        newest = int(storage.base_name(self.earlier[-1])[:6]) if self.earlier else 0
        return storage.join(self.folder, f"{newest + 1:06d}-{uuid.uuid4().hex[:8]}")

    def open_file(self) -> None:
        super().open_file()
        self.start_session()

    def start_session(self) -> None:
        """Forget what is on the storage, so that the next upload writes everything."""
        self.stored = (self.start, "", 0)
        self.stored_files: set[str] = set()
        self.changed_files = {f"{each.parent.name}/{each.name}" for each in self.files_folder.glob("*/*")}

    def archive(self) -> None:
        with self.uploading:
            earlier = [*self.earlier, self.session]
            archived = storage.join(storage.parent(self.folder), f"{REMOTE}.{self.state.run_id}")
            self.session, self.earlier = storage.join(archived, storage.base_name(self.session)), []
            self.start_session()
            try:
                self.upload()
            finally:
                self.earlier = earlier
                self.session = self.next_session()
            super().archive()
            self.upload()

    def append(self, operation: Operation, *, durable: bool = True) -> None:
        with self.changed:
            super().append(operation, durable=False)  # the storage is what survives
            if file := self.queue[-1].file:
                self.changed_files.add(file)

    def may_deliver(self, entry: Entry) -> bool:
        return self.without_storage or (entry.end is not None and entry.end <= self.stored[0])

    def upload_until_finished(self) -> None:
        while not self.ended.wait(FLUSH_S):
            with self.uploading:
                try:
                    self.upload()
                except LeaseLost:
                    return
                except OSError as error:
                    self.warn_no_storage(error)

    def save(self) -> bool:
        with self.uploading:
            try:
                self.upload()
            except LeaseLost:
                return False
            except OSError as error:
                self.warn_no_storage(error)
                with self.changed:
                    self.without_storage = True
                    self.changed.notify_all()
        return True

    def upload(self) -> None:
        """Bring this process's session up to date. Whatever is interrupted, the newest complete session is whole.

        Raises:
            LeaseLost: another process has taken the run over.
            OSError: the storage does not answer.
        """
        with self.changed:
            self.write_pending(durable=False)
            rejected = self.rejected_path.stat().st_size if self.rejected_path.exists() else 0
            size, progress = self.size, json.dumps(self.progress())
            # One that is delivered without the storage is not here any more.
            files = {file for file in self.changed_files if (self.files_folder / file).exists()}
            gone = {file for file in self.stored_files - files if not (self.files_folder / file).exists()}
            if (size, progress, rejected) == self.stored and not files and not gone:
                return
            self.changed_files = set()
        try:
            if self.lease:
                self.lease.check()
            for file in sorted(files):  # before the lines that name them
                upload(self.files_folder / file, storage.join(self.session, f"files/{file}"))
            if size > self.stored[0]:
                self.upload_lines(size)
            if rejected != self.stored[2]:
                upload(self.rejected_path, storage.join(self.session, "rejected.jsonl"))
            storage.write_bytes(storage.join(self.session, "head.json"), progress.encode())
        except BaseException:
            with self.changed:
                self.changed_files |= files
            raise
        with self.changed:
            self.stored, self.stored_files = (size, progress, rejected), (self.stored_files | files) - gone
            self.without_storage = self.storage_warned = False
            self.changed.notify_all()
        for uri in [*(storage.join(self.session, f"files/{Path(file).parent}") for file in gone), *self.earlier]:
            storage.remove(uri)
        self.earlier = []

    def upload_lines(self, size: int) -> None:
        """Upload the lines up to a size in bytes: the parts that are new or longer."""
        with open(self.path, "rb") as lines:
            for number in range(self.stored[0] // PART_BYTES, -(-size // PART_BYTES)):
                lines.seek(number * PART_BYTES)
                part = lines.read(min(PART_BYTES, size - number * PART_BYTES))
                storage.write_bytes(storage.join(self.session, f"lines-{number:06d}.jsonl"), part)

    def warn_no_storage(self, error: OSError) -> None:
        """Log once that the storage does not answer."""
        if not self.storage_warned:
            self.storage_warned = True
            logger.warning("%s cannot be written (%s). What MLflow has yet to get waits for it.", self.folder, error)

    def finish(self) -> None:
        self.ended.set()
        self.thread.join()
        may_write = self.save()
        with self.changed:
            if may_write and self.without_storage and self.pending_count():
                copy = self.path.parent
                logger.warning("What MLflow has yet to get is in %s; `posmlp sync %s` delivers it.", copy, copy)
                return
            self.finished = True
            if may_write and not self.size:
                with suppress(OSError):  # a journal in which nothing was ever written leaves nothing
                    storage.remove(self.folder)
            if self.handle < 0:
                shutil.rmtree(self.path.parent, ignore_errors=True)

    def close(self) -> None:
        with self.changed:
            super().close()
            if self.finished:
                shutil.rmtree(self.path.parent, ignore_errors=True)


def upload(path: Path, uri: str) -> None:
    """Copy a file or a folder to the storage, in place of what is there."""
    if not path.is_dir():
        return storage.copy_file(str(path), uri)
    storage.remove(uri)
    for file in path.rglob("*"):
        if file.is_file():
            storage.copy_file(str(file), storage.join(uri, str(file.relative_to(path))))


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
    def of(cls, progress: Mapping[str, Any]) -> JournalState:
        """The state that a progress holds: that of a new run, unless the journal is remote."""
        return cls(**progress.get("state", {}))

    @classmethod
    def read(cls, path: Path) -> JournalState:
        """Read a journal file. If it is missing or cannot be read, the state is that of a new run."""
        progress = read_progress(path)
        state = cls.of(progress)
        with suppress(OSError):
            for entry in read_entries(path, progress.get("start", 0)):
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
