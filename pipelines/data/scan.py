"""Run a function over every video of a list with Ray Data; what ``check`` and ``shard`` share."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import DataContext, ExecutionOptions
from ray.exceptions import RayError

from pipelines.cluster.ray_internals import DATA_LOGGERS
from pipelines.data.loader import SEGMENT_BLOCKS, chain_segments
from posmlp import storage
from posmlp.errors import UserError

logger = logging.getLogger(__name__)

PROGRESS_S = 5.0  # between two lines of progress
ROW_GROUP_BYTES = 16 * 2**20  # of a Parquet file that is written as its rows come
ROW_FIELDS = [("sample_id", pa.string()), ("uri", pa.string()), ("label", pa.int32())]
VIDEO_FIELDS = [  # what is known of a good video
    ("num_frames", pa.int32()),
    ("height", pa.int32()),
    ("width", pa.int32()),
    ("fps", pa.float32()),
    ("codec", pa.string()),
    ("key_frames", pa.int32()),
]
MANIFEST = pa.schema([*ROW_FIELDS, *VIDEO_FIELDS])


class ScanError(UserError):
    """A data set cannot be checked or packed; the message is for the user."""


class ScanProgress:
    """Logs a line of progress every few seconds: videos done, rate, time left.

    Args:
        total: number of videos.
        verb: what is done to them, as in "checked".
        unit: what is counted.
    """

    def __init__(self, total: int, verb: str, unit: str = "videos"):
        self.total, self.verb, self.unit = total, verb, unit
        self.done, self.start, self.last_line = 0, time.perf_counter(), time.perf_counter()

    @property
    def seconds(self) -> float:
        """Return the time since the start."""
        return time.perf_counter() - self.start

    def add(self, count: int) -> None:
        """Count videos that are done."""
        self.done += count
        if time.perf_counter() - self.last_line > PROGRESS_S:
            self.last_line = time.perf_counter()
            rate = self.done / self.seconds
            left = max(0, self.total - self.done) / rate
            logger.info(f"{self.verb} {self.done} of {self.total} {self.unit}, {rate:.1f}/s, {left:.0f} s left")


def run_blocks(function: Callable[..., pa.Table], blocks: int, **arguments: Any) -> Iterator[pa.Table]:
    """Run ``function`` on blocks 0, 1, ... anywhere in the cluster, and yield the results in order.

    Args:
        function: takes ``{"id": int64 [1]}``, the number of the block, and the arguments.
        blocks: number of blocks.
    """
    if not blocks:
        return
    for noisy in DATA_LOGGERS:
        logging.getLogger(noisy).setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options = ExecutionOptions(preserve_order=True)

    def run_segment(first: int, count: int) -> Iterator[pa.Table]:
        dataset = ray.data.range(count, override_num_blocks=count).map_batches(
            run_block,  # type: ignore[arg-type]  # Ray's type knows no fn_kwargs
            batch_size=None,
            fn_kwargs={"function": function, "first": first, "arguments": arguments},
        )
        return iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))

    starts = range(0, blocks, SEGMENT_BLOCKS)
    lengths = [min(SEGMENT_BLOCKS, blocks - first) for first in starts]
    yield from chain_segments((run_segment(*each), each[1]) for each in zip(starts, lengths, strict=True))


def run_block(block: dict[str, np.ndarray], function: Callable[..., pa.Table], first: int, arguments: dict) -> pa.Table:
    """Ray Data task: run ``function`` on a block that is counted from the first block of its segment."""
    return function({"id": block["id"] + first}, **arguments)


def with_classes(table: pa.Table, classes: tuple[str, ...]) -> pa.Table:
    """Return a manifest that names its classes in its metadata (``posmlp.video.formats``)."""
    return table.replace_schema_metadata({"classes": json.dumps(classes)})


def to_parquet(table: pa.Table, **options: Any) -> bytes:
    """Return a table as the content of a Parquet file.

    Args:
        options: of ``pyarrow.parquet.write_table``.
    """
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


class ParquetStream:
    """Collects tables and writes them to an open Parquet file, in row groups of about ``ROW_GROUP_BYTES``."""

    def __init__(self, writer: pq.ParquetWriter):
        self.writer, self.tables, self.bytes = writer, list[pa.Table](), 0

    def write(self, table: pa.Table) -> None:
        """Add rows."""
        self.tables.append(table)
        self.bytes += table.nbytes
        if self.bytes >= ROW_GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the collected rows as a row group."""
        if self.tables:
            self.writer.write_table(pa.concat_tables(self.tables))
        self.tables, self.bytes = [], 0


@contextlib.contextmanager
def open_parquet(uri: str, schema: pa.Schema, **options: Any) -> Iterator[ParquetStream]:
    """Write a Parquet file that need not fit in memory, as of ``open_output``.

    Args:
        options: of ``pyarrow.parquet.ParquetWriter``.
    """
    with open_output(uri) as file, pq.ParquetWriter(file, schema, **options) as writer:
        stream = ParquetStream(writer)
        yield stream
        stream.flush()


@contextlib.contextmanager
def open_output(uri: str) -> Iterator[BinaryIO]:
    """Write a file piece by piece. It appears when the block ends; a block that raises leaves none.

    Raises:
        ScanError: it cannot be written.
    """
    try:
        with storage.output_stream(uri) as file:
            yield file
    except RayError:  # one that wraps an OSError of a task is an OSError too
        raise
    except OSError as error:
        raise ScanError(f"{uri} cannot be written ({error}); see --out") from error


def write_output(uri: str, content: bytes | memoryview) -> None:
    """Write a file; it appears only when it is complete.

    Raises:
        ScanError: it cannot be written.
    """
    try:
        storage.write_bytes(uri, content)
    except OSError as error:
        raise ScanError(f"{uri} cannot be written ({error}); see --out") from error
