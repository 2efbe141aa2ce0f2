"""Files on a local path, in an object store, or in a row of a Parquet file.

PyArrow's own file systems (local, S3, GCS, Azure, HDFS) open URIs such as ``s3://bucket/key``. fsspec opens any other
scheme if the package for it is installed. Both read credentials and endpoints from the environment (for S3
``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``); options may also follow the
URI, as in ``?endpoint_override=...&scheme=http``. ``FILE.parquet#7`` is the value of column ``data`` in row 7.

Functions that open files import PyArrow when they are called, so that importing this module is cheap: the recipe and
the command line need only the functions on names.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, BinaryIO

from posmlp.errors import UserError

if TYPE_CHECKING:
    import pyarrow.fs as pafs
    import pyarrow.parquet as pq

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
FILE = "file://"
PASSWORD = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+://)[^/]*:[^/]*@")
# The question mark before the options of a store, by their PyArrow names. One in a file name (``watch?v=1.mp4``) does
# not match.
OPTIONS = re.compile(r"\?(?=(?:region|scheme|user|replication|[a-z]+_[a-z_]+)=[^?]*$)")
OBJECT_STORES = ("s3", "gs", "gcs", "abfs", "abfss", "az", "memory")  # a file appears there when it is closed
PARQUET_ROW = re.compile(r"(.+\.parquet)#(\d+)$", re.DOTALL)
MAX_REQUESTS = 32  # in flight at a time
LOCAL_CHECKS_PER_TASK = 64  # a task of the thread pool costs ten times what checking one local file does
COPY_BYTES = 8 * 2**20  # in memory at a time
BYTES_COLUMN = "data"  # column of a Parquet file with the bytes of inline videos


class StorageError(UserError):
    """A URI that no file system here can open."""


# Names: no file is opened ---------------------------------------------------------------------------------------------


def is_remote(uri: str) -> bool:
    """Return whether a URI has a scheme other than ``file``. Anything else is a path on this machine."""
    return bool(SCHEME.match(uri)) and not uri.startswith(FILE)


def local_path(uri: str) -> str:
    """The absolute path of a local path or a ``file://`` URI.

    Raises:
        StorageError: the path is relative, and the current folder does not exist any more.
    """
    try:
        return os.path.abspath(uri.removeprefix(FILE))
    except FileNotFoundError as error:
        raise StorageError(
            f"{uri} is a relative path, and the current folder does not exist any more; change to another folder, or "
            "give an absolute path"
        ) from error


def _split_options(uri: str) -> tuple[str, str]:
    """Split a remote URI into its location and its options (``?...``, or empty)."""
    location, *options = OPTIONS.split(uri, maxsplit=1)
    return location, "?" + options[0] if options else ""


def parquet_row(uri: str) -> tuple[str, int] | None:
    """File and row of ``FILE.parquet#ROW``; None for any other URI."""
    match = PARQUET_ROW.match(uri)
    return (match[1], int(match[2])) if match else None


def join(base: str, relative: str) -> str:
    """Join a path to the folder ``base``. A URI or an absolute path ignores the base. Local paths become absolute."""
    if SCHEME.match(relative):
        return relative if is_remote(relative) else local_path(relative)
    if is_remote(base) and not relative.startswith("/"):
        folder, options = _split_options(base)
        return f"{folder.rstrip('/')}/{relative}{options}"
    return local_path(os.path.join(base, relative))


def is_inside(uri: str, folder: str) -> bool:
    """Return whether a file lies in a folder, judged by name alone; links are not followed.

    Both must be as ``join`` returns them. In a store the options, such as the server's address, must be equal too.
    """
    if not is_remote(uri):
        return not is_remote(folder) and uri.startswith(os.path.join(folder, ""))
    if not is_remote(folder):
        return False
    (location, options), (base, expected) = _split_options(uri), _split_options(folder)
    below = location.removeprefix(base.rstrip("/") + "/")
    return below not in ("", location) and options == expected and not {"..", "."} & {*below.split("/")}


def without_password(uri: str) -> str:
    """The URI without user and password, for messages."""
    return PASSWORD.sub(r"\1", uri)


def refuse_password(uri: str) -> None:
    """Refuse a URI with a password, because URIs are stored and printed in many places.

    Raises:
        StorageError: the URI has a password.
    """
    if PASSWORD.match(uri):
        raise StorageError(f"{without_password(uri)}: leave user and password out; set them in the environment")


def parent(uri: str) -> str:
    """The folder that holds a file."""
    if not is_remote(uri):
        return os.path.dirname(local_path(uri))
    location, options = _split_options(uri)
    return location.rpartition("/")[0] + options


def base_name(uri: str) -> str:
    """The name of a file or a folder, without the folders that hold it."""
    location = _split_options(uri)[0] if is_remote(uri) else local_path(uri)
    return location.rstrip("/").rpartition("/")[2]


# Files ----------------------------------------------------------------------------------------------------------------


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a path or URI, and the path within it.

    Raises:
        StorageError: unknown scheme, a malformed URI, a URI with a password, or a missing package.
    """
    if not is_remote(uri):
        return _local_system(), local_path(uri)
    refuse_password(uri)
    location, options = _split_options(uri)
    scheme, _, path = location.partition("://")
    root = f"{scheme}://{path.partition('/')[0]}{options}"
    system, base = _remote_system(root)
    rest = path.partition("/")[2]
    return system, f"{base.rstrip('/')}/{rest}" if base and rest else base or path


@functools.cache
def _local_system() -> pafs.FileSystem:
    import pyarrow.fs as pafs

    return pafs.LocalFileSystem()


@functools.lru_cache(maxsize=32)  # a client holds connections: make one per bucket, not one per file
def _remote_system(root: str) -> tuple[pafs.FileSystem, str]:
    import pyarrow as pa
    import pyarrow.fs as pafs

    try:
        return pafs.FileSystem.from_uri(root)
    except (pa.ArrowException, ValueError) as error:  # a scheme that PyArrow does not know, or a URI it cannot parse
        return _fsspec_system(root, error)


def _fsspec_system(root: str, arrow_error: Exception) -> tuple[pafs.FileSystem, str]:
    """The file system of a URI that PyArrow cannot open, through fsspec."""
    import pyarrow.fs as pafs

    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(root)
    except (ImportError, ValueError, OSError) as error:
        raise StorageError(
            f"{root}: no file system for it ({arrow_error}; fsspec: {error}); "
            "check the scheme, or install its fsspec package"
        ) from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(system)), path


def read_bytes(uri: str) -> bytes:
    """Read a whole file, or the video in one row of a Parquet file.

    Raises:
        FileNotFoundError: no such file.
        OSError: it cannot be read (no permission, no connection, not Parquet, no such row or column).
        StorageError: no file system for the URI.
    """
    if row := parquet_row(uri):
        return _read_row(*row)
    system, path = resolve(uri)
    with system.open_input_stream(path, compression=None) as file:
        content: bytes = file.read()
    return content


def write_bytes(uri: str, content: bytes | memoryview) -> None:
    """Write a file, which appears only when it is complete. Missing folders are created.

    Raises:
        OSError: it cannot be written.
    """
    with output_stream(uri) as file:
        file.write(content)


@contextlib.contextmanager
def output_stream(uri: str) -> Iterator[BinaryIO]:
    """Open a file to write it piece by piece. It appears when the block ends; a block that raises leaves no file.

    Missing folders are created. A killed process leaves no file of this name, at most a ``.tmp`` file beside it. In an
    object store, a block that raises also removes an older file of this name: PyArrow can close a file there, and not
    abandon it.

    Raises:
        OSError: it cannot be written.
    """
    system, path = resolve(uri)
    temporary = f"{path}.{os.getpid()}-{os.urandom(4).hex()}.tmp"
    if is_remote(uri):
        written = path if uri.partition("://")[0] in OBJECT_STORES else temporary
        file = system.open_output_stream(written, compression=None)
        try:
            yield file
        except BaseException:
            with contextlib.suppress(OSError):
                file.close()
                system.delete_file(written)
            raise
        file.close()
        if written != path:
            system.move(written, path)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):  # it was renamed, or never created
            os.unlink(temporary)


def copy_file(source: str, target: str) -> None:
    """Copy a file piece by piece, whatever its size. The copy appears only when it is complete.

    Raises:
        OSError: one cannot be read, or the other not written.
    """
    system, path = resolve(source)
    with system.open_input_stream(path, compression=None) as file, output_stream(target) as copy:
        shutil.copyfileobj(file, copy, COPY_BYTES)


def file_size(uri: str) -> int:
    """The size of a file in bytes.

    Raises:
        FileNotFoundError: no such file.
        OSError: the store does not answer.
    """
    return int(version(uri).partition("|")[0])


def modified_at(uri: str) -> float | None:
    """When a file was written, by the storage's clock, in seconds of UNIX time; None if it keeps no times.

    Raises:
        FileNotFoundError: no such file.
        OSError: the store does not answer.
    """
    system, path = resolve(uri)
    info = system.get_file_info(path)
    if not info.is_file:
        raise FileNotFoundError(uri)
    return None if info.mtime_ns is None else info.mtime_ns / 1e9


def remove(uri: str) -> None:
    """Remove a file, or a folder with its content. A missing one is no error.

    Raises:
        OSError: it cannot be removed.
    """
    import pyarrow.fs as pafs

    system, path = resolve(uri)
    kind = system.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        system.delete_dir(path)
    elif kind != pafs.FileType.NotFound:
        system.delete_file(path)


def list_folders(uri: str) -> list[str]:
    """The folders in a folder, sorted by name; empty if the folder does not exist.

    Raises:
        OSError: it cannot be read.
    """
    import pyarrow.fs as pafs

    system, path = resolve(uri)
    entries = system.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(join(uri, entry.base_name) for entry in entries if entry.type == pafs.FileType.Directory)


def list_files(uri: str) -> list[str]:
    """The files in a folder and in the folders below it, as paths relative to it, sorted; empty if it does not exist.

    Raises:
        OSError: it cannot be read.
    """
    import pyarrow.fs as pafs

    system, path = resolve(uri)
    entries = system.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True))
    base = path.rstrip("/") + "/"
    return sorted(entry.path.removeprefix(base) for entry in entries if entry.type == pafs.FileType.File)


def are_files(uris: Sequence[str]) -> list[bool]:
    """Return whether each URI is an existing file; for ``FILE.parquet#ROW``, whether the Parquet file exists.

    Sends many requests at a time, because shared disks and stores answer each one slowly.
    """
    paths = [row[0] if (row := parquet_row(uri)) else uri for uri in uris]
    unique = list(dict.fromkeys(paths))
    remote = [uri for uri in unique if is_remote(uri)]
    resolved = [resolve(uri) for uri in remote]  # one client per bucket
    local = [uri for uri in unique if not is_remote(uri)] if remote else unique
    tasks = [local[i : i + LOCAL_CHECKS_PER_TASK] for i in range(0, len(local), LOCAL_CHECKS_PER_TASK)]
    with ThreadPoolExecutor(MAX_REQUESTS) as pool:
        exists = dict(zip(remote, pool.map(_is_remote_file, resolved), strict=True))
        for task, results in zip(tasks, pool.map(_are_local_files, tasks), strict=True):
            exists.update(zip(task, results, strict=True))
    return [exists[path] for path in paths]


def _is_remote_file(resolved: tuple[pafs.FileSystem, str]) -> bool:
    import pyarrow.fs as pafs

    system, path = resolved
    return bool(system.get_file_info(path).type == pafs.FileType.File)


def _are_local_files(paths: Sequence[str]) -> list[bool]:
    return [os.path.isfile(path.removeprefix(FILE)) for path in paths]


def version(uri: str) -> str:
    """Size and modification time of a file as one string, which changes when the file does.

    Raises:
        FileNotFoundError: no such file.
        OSError: the store does not answer.
    """
    import pyarrow.fs as pafs

    row = parquet_row(uri)
    system, path = resolve(row[0] if row else uri)
    info = system.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise FileNotFoundError(uri)
    return f"{info.size}|{info.mtime_ns}"


@functools.lru_cache(maxsize=16)  # reading a footer costs more than reading a row
def _open_parquet(uri: str, version: str) -> tuple[pq.ParquetFile, list[int]]:
    """An open Parquet file, and the first row of each row group followed by the number of rows."""
    import pyarrow.parquet as pq

    system, path = resolve(uri)
    file = pq.ParquetFile(system.open_input_file(path), pre_buffer=False)
    starts = [0]
    for group in range(file.num_row_groups):
        starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
    return file, starts


def _read_row(path: str, row: int) -> bytes:
    import pyarrow as pa

    current = version(path)
    try:
        file, starts = _open_parquet(path, current)
    except (pa.ArrowException, OSError) as error:
        raise OSError(f"{path} cannot be read as a Parquet file: {_one_line(error)}") from error
    if BYTES_COLUMN not in file.schema_arrow.names:
        raise OSError(f"{path} has no column {BYTES_COLUMN!r}")
    if row >= starts[-1]:
        raise OSError(f"{path} has {starts[-1]} rows, no row {row}")
    group = bisect.bisect_right(starts, row) - 1
    try:
        # page by page: a group may hold more videos than fit in memory (our shards have one video per group)
        batches = file.iter_batches(1, row_groups=[group], columns=[BYTES_COLUMN], use_threads=False)
        column = next(itertools.islice(batches, row - starts[group], None))[BYTES_COLUMN]
    except (pa.ArrowException, OSError) as error:
        raise OSError(f"row {row} of {path} cannot be read: {_one_line(error)}") from error
    content = column[0].as_py()
    if not isinstance(content, bytes):
        raise OSError(f"row {row} of {path} holds no bytes in column {BYTES_COLUMN!r}")
    return content


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
