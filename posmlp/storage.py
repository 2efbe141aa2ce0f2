"""Files wherever they lie: a local path, an object store's URI, or a row of a Parquet file.

A URI such as ``s3://bucket/key`` is opened by PyArrow's own file systems (local, S3, GCS, Azure, HDFS) and any other
scheme by fsspec, if the package for it is installed. Credentials and endpoints come from the environment that these
libraries read (for S3 ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``, or
``?endpoint_override=...&scheme=http`` behind the URI). ``FILE.parquet#7`` is the value of column ``data`` in row 7.
"""

import bisect
import contextlib
import functools
import itertools
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from posmlp.errors import UserError

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
FILE = "file://"
PASSWORD = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+://)[^/]*:[^/]*@")
# The question mark before a store's options, as PyArrow names them; one in a file name (``watch?v=1.mp4``) is not it.
OPTIONS = re.compile(r"\?(?=(?:region|scheme|user|replication|[a-z]+_[a-z_]+)=[^?]*$)")
OBJECT_STORES = ("s3", "gs", "gcs", "abfs", "abfss", "az", "memory")  # show what is written when it is closed
PARQUET_ROW = re.compile(r"(.+\.parquet)#(\d+)$", re.DOTALL)
REQUESTS = 32  # to a store at a time
LOOKS = 64  # at local files in one task of a thread, which costs ten times what a look does
BYTES_COLUMN = "data"  # of a Parquet file with inline videos


class StorageError(UserError):
    """A URI that no file system here can open."""


def is_remote(uri: str) -> bool:
    """Whether it has a scheme other than ``file``; everything else is a path of this machine."""
    return bool(SCHEME.match(uri)) and not uri.startswith(FILE)


def local_path(uri: str) -> str:
    """The absolute path of what is not remote."""
    return os.path.abspath(uri.removeprefix(FILE))


def _split(uri: str) -> tuple[str, str]:
    """A remote URI and its options, which are kept apart from the path."""
    location, *options = OPTIONS.split(uri, maxsplit=1)
    return location, "?" + options[0] if options else ""


def parquet_row(uri: str) -> tuple[str, int] | None:
    """File and row of ``FILE.parquet#ROW``; None for any other URI."""
    match = PARQUET_ROW.match(uri)
    return (match[1], int(match[2])) if match else None


def join(base: str, relative: str) -> str:
    """``relative`` below the folder ``base``, or as it is where absolute or a URI; local paths become absolute."""
    if SCHEME.match(relative):
        return relative if is_remote(relative) else local_path(relative)
    if is_remote(base) and not relative.startswith("/"):
        folder, options = _split(base)
        return f"{folder.rstrip('/')}/{relative}{options}"
    return local_path(os.path.join(base, relative))


def is_inside(uri: str, folder: str) -> bool:
    """Whether a place lies in a folder, both as ``join`` gives them, by name: what links lead to counts as inside.

    In a store the options, such as the server that answers, must be the folder's too.
    """
    if not is_remote(uri):
        return not is_remote(folder) and uri.startswith(os.path.join(folder, ""))
    if not is_remote(folder):
        return False
    (place, options), (base, expected) = _split(uri), _split(folder)
    below = place.removeprefix(base.rstrip("/") + "/")
    return below not in ("", place) and options == expected and not {"..", "."} & {*below.split("/")}


def without_password(uri: str) -> str:
    """A URI to be shown."""
    return PASSWORD.sub(r"\1", uri)


def refuse_password(uri: str) -> None:
    """What names a place is written down and printed in many places.

    Raises:
        StorageError: there is a password in the URI.
    """
    if PASSWORD.match(uri):
        raise StorageError(f"{without_password(uri)}: leave user and password out; the environment has them")


def parent(uri: str) -> str:
    """The folder that a file lies in."""
    if not is_remote(uri):
        return os.path.dirname(local_path(uri))
    path, options = _split(uri)
    return path.rpartition("/")[0] + options


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a path or URI, and the path in it.

    Raises:
        StorageError: unknown scheme, a malformed URI, or a missing package.
    """
    if not is_remote(uri):
        return _local(), local_path(uri)
    refuse_password(uri)
    location, options = _split(uri)
    scheme, _, path = location.partition("://")
    root = f"{scheme}://{path.partition('/')[0]}{options}"
    system, base = _remote(root)
    rest = path.partition("/")[2]
    return system, f"{base.rstrip('/')}/{rest}" if base and rest else base or path


@functools.cache
def _local() -> pafs.FileSystem:
    return pafs.LocalFileSystem()


@functools.lru_cache(maxsize=32)  # a client holds connections: one for each bucket, not one for each file
def _remote(root: str) -> tuple[pafs.FileSystem, str]:
    try:
        return pafs.FileSystem.from_uri(root)
    except (pa.ArrowException, ValueError) as error:  # a scheme that PyArrow does not know, or a URI it cannot parse
        return _by_fsspec(root, error)


def _by_fsspec(root: str, why: Exception) -> tuple[pafs.FileSystem, str]:
    """What PyArrow does not know, through fsspec."""
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(root)
    except (ImportError, ValueError, OSError) as error:
        raise StorageError(
            f"{root}: no file system for it ({why}; fsspec: {error}); check the scheme, or install its fsspec package"
        ) from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(system)), path


def read_bytes(uri: str) -> bytes:
    """A whole file, or one row's video of a Parquet file.

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
    """Write a file that appears only when complete; folders are made.

    Raises:
        OSError: it cannot be written.
    """
    system, path = resolve(uri)
    temporary = f"{path}.{os.getpid()}-{os.urandom(4).hex()}.tmp"
    if is_remote(uri):
        whole = uri.partition("://")[0] in OBJECT_STORES
        with system.open_output_stream(path if whole else temporary, compression=None) as file:
            file.write(content)
        if not whole:
            system.move(temporary, path)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):  # it has its final name, or was never made
            os.unlink(temporary)


def remove(uri: str) -> None:
    """Remove a file, or a folder with all that is in it; what is not there is no error.

    Raises:
        OSError: it cannot be removed.
    """
    system, path = resolve(uri)
    kind = system.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        system.delete_dir(path)
    elif kind != pafs.FileType.NotFound:
        system.delete_file(path)


def folders(uri: str) -> list[str]:
    """The folders in a folder, by name; none if it is not there.

    Raises:
        OSError: it cannot be read.
    """
    system, path = resolve(uri)
    entries = system.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(join(uri, entry.base_name) for entry in entries if entry.type == pafs.FileType.Directory)


def are_files(uris: Sequence[str]) -> list[bool]:
    """Whether each is a file that exists (of ``FILE.parquet#ROW``, the file). Many requests at a time for a store."""
    paths = [row[0] if (row := parquet_row(uri)) else uri for uri in uris]
    different = list(dict.fromkeys(paths))
    remote = [uri for uri in different if is_remote(uri)]
    places = [resolve(uri) for uri in remote]  # a client a bucket
    local = [uri for uri in different if not is_remote(uri)] if remote else different
    parts = [local[i : i + LOOKS] for i in range(0, len(local), LOOKS)]
    with ThreadPoolExecutor(REQUESTS) as pool:  # shared disks and stores take their time for each
        found = dict(zip(remote, pool.map(_is_file, places), strict=True))
        for part, there in zip(parts, pool.map(_are_local_files, parts), strict=True):
            found.update(zip(part, there, strict=True))
    return [found[path] for path in paths]


def _is_file(place: tuple[pafs.FileSystem, str]) -> bool:
    system, path = place
    return bool(system.get_file_info(path).type == pafs.FileType.File)


def _are_local_files(paths: Sequence[str]) -> list[bool]:
    return [os.path.isfile(path.removeprefix(FILE)) for path in paths]


def version(uri: str) -> str:
    """Changes when the file does: its size and time of change.

    Raises:
        FileNotFoundError: no such file.
        OSError: the store does not answer.
    """
    row = parquet_row(uri)
    system, path = resolve(row[0] if row else uri)
    info = system.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise FileNotFoundError(uri)
    return f"{info.size}|{info.mtime_ns}"


@functools.lru_cache(maxsize=16)  # reading a footer costs more than reading a row
def _parquet(path: str, version: str) -> tuple[pq.ParquetFile, list[int]]:
    """An open file and the first row of each of its row groups."""
    system, place = resolve(path)
    file = pq.ParquetFile(system.open_input_file(place), pre_buffer=False)
    starts = [0]
    for group in range(file.num_row_groups):
        starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
    return file, starts


def _read_row(path: str, row: int) -> bytes:
    now = version(path)
    try:
        file, starts = _parquet(path, now)
    except (pa.ArrowException, OSError) as error:
        raise OSError(f"{path} cannot be read as a Parquet file: {_line(error)}") from error
    if BYTES_COLUMN not in file.schema_arrow.names:
        raise OSError(f"{path} has no column {BYTES_COLUMN!r}")
    if row >= starts[-1]:
        raise OSError(f"{path} has {starts[-1]} rows, no row {row}")
    group = bisect.bisect_right(starts, row) - 1
    try:
        # page by page, as a group may hold more videos than there is memory; shards have one video a group
        batches = file.iter_batches(1, row_groups=[group], columns=[BYTES_COLUMN], use_threads=False)
        column = next(itertools.islice(batches, row - starts[group], None))[BYTES_COLUMN]
    except (pa.ArrowException, OSError) as error:
        raise OSError(f"row {row} of {path} cannot be read: {_line(error)}") from error
    content = column[0].as_py()
    if not isinstance(content, bytes):
        raise OSError(f"row {row} of {path} holds no bytes in column {BYTES_COLUMN!r}")
    return content


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
