"""Whole data sets at once, by Ray Data: check every video, or pack them into Parquet shards."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import DataContext, ExecutionOptions

from pipelines.data.loader import SEGMENT_BLOCKS, chained
from posmlp import storage
from posmlp.errors import UserError
from posmlp.video.decode import DecodeError
from posmlp.video.isolated import open_isolated
from posmlp.video.manifest import Manifest
from posmlp.video.pack import pack

ROWS_PER_TASK = 8  # videos that one task of a check decodes
EXAMPLES = 20  # bad videos that a summary lists

FACTS = [  # what is known of a good video
    ("num_frames", pa.int32()),
    ("height", pa.int32()),
    ("width", pa.int32()),
    ("fps", pa.float32()),
    ("codec", pa.string()),
    ("key_frames", pa.int32()),
]
ROW = [("sample_id", pa.string()), ("uri", pa.string()), ("label", pa.int32())]
REPORT = pa.schema([*ROW, ("good", pa.bool_()), ("reason", pa.string()), *FACTS, ("decord_agrees", pa.bool_())])
SHARD = pa.schema([("sample_id", pa.string()), ("label", pa.int32()), *FACTS, ("data", pa.large_binary())])
MANIFEST = pa.schema([*ROW, *FACTS])
BAD = pa.schema([*ROW, ("reason", pa.string())])


class ScanError(UserError):
    """A data set cannot be checked or packed; the message is for the user."""


# --- check ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckResult:
    """What a check found.

    Attributes:
        report: a row a video, in the manifest's order; ``REPORT``.
        summary: the same for reading.
        has_list: whether ``good.parquet`` was written; of frame folders, which have no file to name, it is not.
    """

    report: pa.Table
    summary: str
    has_list: bool

    @property
    def bad(self) -> int:
        """How many videos are bad."""
        return len(self.report) - int(np.count_nonzero(self.report["good"]))


def check(manifest: Manifest, out: str, timeout_s: float, echo: Callable[[str], None] = print) -> CheckResult:
    """Decode every frame of every video, in parallel.

    Writes to the folder ``out`` (any place): ``report.parquet`` (a row a video), ``summary.txt``, and
    ``good.parquet``, a list of the good videos to train on.

    Raises:
        ScanError: ``out`` cannot be written.
    """
    write(storage.join(out, "summary.txt"), b"the check has not ended\n")  # now, and not after hours, if it fails
    blocks = -(-len(manifest.rows) // ROWS_PER_TASK)
    progress = Progress(len(manifest.rows), "checked", echo)
    tables = []
    for table in run_tasks(check_block, blocks, rows=ray.put(manifest.rows), timeout_s=timeout_s):
        tables.append(table)
        progress.add(len(table))
    report = pa.concat_tables(tables)
    has_list = manifest.rows["frames"].null_count == len(manifest.rows)
    result = CheckResult(report, summarise(report, manifest.classes, progress.seconds), has_list)
    good = report.filter(report["good"]).select([*MANIFEST.names])
    if has_list:
        write(storage.join(out, "good.parquet"), parquet(with_classes(good, manifest.classes)))
    write(storage.join(out, "report.parquet"), parquet(report))
    write(storage.join(out, "summary.txt"), result.summary.encode())
    return result


def check_block(block: dict[str, np.ndarray], rows: ray.ObjectRef, timeout_s: float) -> pa.Table:
    """Ray Data task: some rows of the report."""
    (number,) = block["id"]
    found = []
    for row in ray.get(rows).slice(number * ROWS_PER_TASK, ROWS_PER_TASK).to_pylist():
        line = {name: row[name] for name, _ in ROW} | {"good": True, "reason": ""}
        try:
            with open_isolated(row["uri"], row["frames"], "decord", timeout_s=timeout_s) as video:
                info = video.info
                line["height"], line["width"] = video.verify()
                line |= {"num_frames": info.frames, "fps": info.fps, "codec": info.codec, "key_frames": info.key_frames}
                line["decord_agrees"] = info.decoder == "decord" if row["frames"] is None else None
        except DecodeError as error:
            line |= {"good": False, "reason": error.reason}
        found.append(line)
    return pa.Table.from_pylist(found, schema=REPORT)


def summarise(report: pa.Table, classes: tuple[str, ...], seconds: float) -> str:
    """The report as a page of text."""
    good = report.filter(report["good"])
    bad = report.filter(pa.compute.invert(report["good"]))
    lines = [f"{len(report)} videos of {len(classes)} classes: {len(good)} good, {len(bad)} bad ({seconds:.0f} s)"]
    if len(good):
        for name, unit in (("num_frames", "frames"), ("fps", "frames/s"), ("height", "high"), ("width", "wide")):
            values = good[name].drop_null().to_numpy()
            if len(values):
                lines.append(f"  {unit:<9}{values.min():>8.5g} to {values.max():<8.5g} median {np.median(values):.5g}")
        codecs = Counter(good["codec"].to_pylist()).most_common()
        lines.append("  codecs   " + ", ".join(f"{codec} {count}" for codec, count in codecs))
        differ = good.filter(pa.compute.invert(good["decord_agrees"]))
        lines.append(f"  decord would find other frames in {len(differ)} of them")
    empty = sorted(set(range(len(classes))) - set(good["label"].to_pylist()))
    if empty:
        names = ", ".join(classes[label] for label in empty[:EXAMPLES]) + (", ..." if len(empty) > EXAMPLES else "")
        lines.append(f"  classes without a good video: {names}")
    if len(bad):
        lines.append("bad videos:")
        lines += [f"  {row['uri']}: {row['reason']}" for row in bad.slice(0, EXAMPLES).to_pylist()]
        if len(bad) > EXAMPLES:
            lines.append(f"  ... and {len(bad) - EXAMPLES} more, see report.parquet")
    return "\n".join(lines) + "\n"


# --- shard ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardSettings:
    """How videos are packed; the same settings and the same list give the same shards.

    Attributes:
        rows_per_shard: videos in a file.
        short_side, keyframe_interval: encode anew, see ``posmlp.video.pack.pack``.
        timeout_s: seconds that one video may take.
    """

    rows_per_shard: int = 256
    short_side: int | None = None
    keyframe_interval: int | None = None
    timeout_s: float = 300.0


@dataclass(frozen=True)
class ShardResult:
    """What was packed.

    Attributes:
        manifest: URI of the list to train on.
        videos, bad: how many were packed, and how many were not.
    """

    manifest: str
    videos: int
    bad: int
    shards: int
    bytes: int


def shard(manifest: Manifest, out: str, settings: ShardSettings, echo: Callable[[str], None] = print) -> ShardResult:
    """Pack a data set into Parquet files of encoded videos, in parallel.

    Writes to the folder ``out`` (any place) ``shards/00000.parquet``, ... (``SHARD``, a row group a video, so that any
    one can be read alone), then ``bad.parquet`` (``BAD``) and last ``manifest.parquet`` (``MANIFEST``), the list to
    train on: its ``uri`` is ``shards/00000.parquet#ROW``. A shard appears when it is complete, and a call that was
    killed goes on where it stopped.

    Raises:
        ScanError: ``out`` holds another data set's shards, or cannot be written.
    """
    plan = asdict(settings) | {"videos": len(manifest.rows), "rows": fingerprint(manifest)}
    begin(out, plan)
    names = [f"shards/{i:05d}.parquet" for i in range(-(-len(manifest.rows) // settings.rows_per_shard))]
    uris = [storage.join(out, name) for name in names]
    todo = [i for i, there in enumerate(storage.are_files(uris)) if not there]
    if len(todo) < len(uris):
        echo(f"{len(uris) - len(todo)} of {len(uris)} shards are there already")
    progress = Progress(len(todo) * settings.rows_per_shard, "packed", echo)
    arguments = {"rows": ray.put(manifest.rows), "uris": [uris[i] for i in todo], "numbers": todo, "settings": settings}
    for table in run_tasks(write_shard, len(todo), **arguments):
        (row,) = table.to_pylist()
        if row["failure"]:
            raise ScanError(row["failure"])
        progress.add(row["videos"])
    try:
        return finish(manifest, out, names, uris)
    except (OSError, pa.ArrowException) as error:
        raise ScanError(f"{out}: its shards cannot be read ({error}); remove the damaged ones and try again") from error


def begin(out: str, plan: dict[str, Any]) -> None:
    """Note what is packed, or see that it is the same as before."""
    uri = storage.join(out, "shards.json")
    try:
        before = json.loads(storage.read_bytes(uri))
    except FileNotFoundError:
        write(uri, json.dumps(plan, indent=1).encode())
        return
    except (OSError, ValueError) as error:
        raise ScanError(f"{uri} cannot be read ({error}); choose another --out, or remove it") from error
    plan = json.loads(json.dumps(plan))
    differ = [key for key in plan if before.get(key) != plan[key]]
    if differ:
        changes = "".join(f"\n  {key}: {before.get(key)} there, {plan[key]} now" for key in differ)
        raise ScanError(f"{out} holds shards of another list or with other settings; choose another --out:{changes}")


def write_shard(
    block: dict[str, np.ndarray],
    rows: ray.ObjectRef,
    uris: list[str],
    numbers: list[int],
    settings: ShardSettings,
) -> pa.Table:
    """Ray Data task: one shard; the videos that cannot be packed are listed in its metadata."""
    (place,) = block["id"]
    mine = ray.get(rows).slice(numbers[place] * settings.rows_per_shard, settings.rows_per_shard)
    bad = []
    file = io.BytesIO()
    with pq.ParquetWriter(file, SHARD, compression="none") as writer:
        for row in mine.to_pylist():
            try:
                with open_isolated(row["uri"], row["frames"], timeout_s=settings.timeout_s) as video:
                    packed = video.run(pack, settings.short_side, settings.keyframe_interval)
            except DecodeError as error:
                bad.append({name: row[name] for name, _ in ROW} | {"reason": error.reason})
                continue
            named = {"sample_id": row["sample_id"], "label": row["label"]}
            writer.write_table(pa.Table.from_pylist([named | packed], schema=SHARD))  # a row group
        writer.add_key_value_metadata({"bad": json.dumps(bad)})
    failure = ""
    try:
        write(uris[place], file.getbuffer())
    except ScanError as error:  # as data: Ray would bury it in tracebacks of its own
        failure = str(error)
    return pa.table({"videos": [len(mine)], "failure": [failure]})


def finish(manifest: Manifest, out: str, names: list[str], uris: list[str]) -> ShardResult:
    """Write the lists of the good and the bad videos from what the shards say."""
    good, bad, size = [], [], 0
    for name, uri in zip(names, uris, strict=True):
        system, path = storage.resolve(uri)
        size += system.get_file_info(path).size
        with system.open_input_file(path) as file, pq.ParquetFile(file) as shard_file:
            table = shard_file.read(columns=[field for field in SHARD.names if field != "data"])
            bad += json.loads(shard_file.metadata.metadata[b"bad"])
        places = pa.array([f"{name}#{row}" for row in range(len(table))], pa.string())
        good.append(table.append_column("uri", places).select(MANIFEST.names))
    packed = pa.concat_tables(good).replace_schema_metadata(None)
    write(storage.join(out, "bad.parquet"), parquet(pa.Table.from_pylist(bad, schema=BAD)))
    uri = storage.join(out, "manifest.parquet")
    write(uri, parquet(with_classes(packed, manifest.classes)))
    if not storage.is_remote(out):  # what a killed call left
        for litter in Path(storage.local_path(out), "shards").glob("*.tmp"):
            with contextlib.suppress(OSError):
                litter.unlink()
    return ShardResult(uri, len(packed), len(bad), len(uris), size)


def fingerprint(manifest: Manifest) -> str:
    """Of the rows and the classes, in order."""
    digest = hashlib.blake2b(json.dumps(manifest.classes).encode(), digest_size=16)
    for row in manifest.rows.to_pylist():
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


# --- shared --------------------------------------------------------------------------------------------------------


class Progress:
    """Says now and then how far a scan is."""

    def __init__(self, total: int, verb: str, echo: Callable[[str], None]):
        self.total, self.verb, self.echo = total, verb, echo
        self.done, self.start, self.spoken = 0, time.perf_counter(), time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.start

    def add(self, count: int) -> None:
        """Count some more videos."""
        self.done += count
        if time.perf_counter() - self.spoken > 5:
            self.spoken = time.perf_counter()
            rate = self.done / self.seconds
            left = max(0, self.total - self.done) / rate
            self.echo(f"{self.verb} {self.done} of {self.total} videos, {rate:.1f}/s, {left:.0f} s left")


def run_tasks(function: Callable[..., pa.Table], blocks: int, **arguments: Any) -> Iterator[pa.Table]:
    """``function`` on blocks 0, 1, ... anywhere in the cluster; results in order."""
    if not blocks:
        return
    for noisy in ("ray.data", "ray.data._internal.progress"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options = ExecutionOptions(preserve_order=True)

    def plan(first: int, count: int) -> Iterator[pa.Table]:
        dataset = ray.data.range(count, override_num_blocks=count).map_batches(
            shifted, batch_size=None, fn_kwargs={"function": function, "first": first, "arguments": arguments}
        )
        return iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))

    starts = range(0, blocks, SEGMENT_BLOCKS)
    lengths = [min(SEGMENT_BLOCKS, blocks - first) for first in starts]
    yield from chained((plan(first, length), length) for first, length in zip(starts, lengths, strict=True))


def shifted(block: dict[str, np.ndarray], function: Callable[..., pa.Table], first: int, arguments: dict) -> pa.Table:
    """Ray Data task: ``function`` on a block that is counted from the segment's first."""
    return function({"id": block["id"] + first}, **arguments)


def with_classes(table: pa.Table, classes: tuple[str, ...]) -> pa.Table:
    """A manifest that names its classes (``posmlp.video.formats``)."""
    return table.replace_schema_metadata({"classes": json.dumps(classes)})


def parquet(table: pa.Table, **options: Any) -> bytes:
    """A Parquet file."""
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def write(uri: str, content: bytes | memoryview) -> None:
    """Write a file that appears only when complete.

    Raises:
        ScanError: it cannot be written.
    """
    try:
        storage.write_bytes(uri, content)
    except OSError as error:
        raise ScanError(f"{uri} cannot be written ({error}); see --out") from error
