"""Pack the videos of a list into Parquet files: ``posmlp data shard``."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from pipelines.data.scan import (
    MANIFEST,
    ROW_FIELDS,
    VIDEO_FIELDS,
    ScanError,
    ScanProgress,
    run_blocks,
    to_parquet,
    with_classes,
    write_output,
)
from posmlp import storage
from posmlp.detection.segments import SegmentClip, clip_metadata, pack_segments
from posmlp.video.decode import DecodeError, span_of
from posmlp.video.isolated import open_isolated
from posmlp.video.manifest import Manifest
from posmlp.video.pack import pack

logger = logging.getLogger(__name__)

SHARD = pa.schema([("sample_id", pa.string()), ("label", pa.int32()), *VIDEO_FIELDS, ("data", pa.large_binary())])
SEGMENTS = SHARD.append(pa.field("time", pa.float64()))  # of the key frame in the segment
ROWS_TOGETHER = 32  # key frames of a video that are decoded in one pass, within one time limit
BAD = pa.schema([*ROW_FIELDS, ("reason", pa.string())])


@dataclass(frozen=True)
class ShardSettings:
    """How videos are packed. The same settings and the same list give the same shards.

    Attributes:
        rows_per_shard: videos per file, or key frames.
        short_side, keyframe_interval: encode again, see ``posmlp.video.pack.pack``.
        timeout_s: seconds after which a video counts as bad.
        clip: of key frames (``posmlp.detection.lists``), what is cut from their videos.
    """

    rows_per_shard: int = 256
    short_side: int | None = None
    keyframe_interval: int | None = None
    timeout_s: float = 300.0
    clip: SegmentClip | None = None


@dataclass(frozen=True)
class ShardResult:
    """The result of packing.

    Attributes:
        manifest: URI of the list to train on.
        videos, bad: numbers of packed videos or key frames, and of those that could not be packed.
        shards: number of files.
        bytes: size of all files.
    """

    manifest: str
    videos: int
    bad: int
    shards: int
    bytes: int


def shard(manifest: Manifest, out: str, settings: ShardSettings) -> ShardResult:
    """Pack a data set into Parquet files of encoded videos, in parallel.

    Writes ``shards/00000.parquet``, ... (``SHARD``; one row group per video, so that each can be read alone), then
    ``bad.parquet`` (``BAD``), and last ``manifest.parquet`` (``MANIFEST``), the list to train on, whose ``uri`` is
    ``shards/00000.parquet#ROW``. Of key frames, the list has also their times in the segments and their boxes. A shard
    appears when it is complete. After a kill, the same call packs the rest.

    Args:
        out: folder for the results, a path or a URI.

    Raises:
        ScanError: ``out`` holds another data set's shards, or cannot be written.
    """
    plan = asdict(settings) | {"videos": len(manifest.rows), "rows": rows_digest(manifest)}
    record_settings(out, plan)
    names = [f"shards/{i:05d}.parquet" for i in range(-(-len(manifest.rows) // settings.rows_per_shard))]
    uris = [storage.join(out, name) for name in names]
    missing = [i for i, exists in enumerate(storage.are_files(uris)) if not exists]
    if len(missing) < len(uris):
        logger.info(f"{len(uris) - len(missing)} of {len(uris)} shards exist already")
    progress = ScanProgress(
        len(missing) * settings.rows_per_shard, "packed", "key frames" if settings.clip else "videos"
    )
    arguments = {
        "rows": ray.put(manifest.rows),
        "uris": [uris[i] for i in missing],
        "numbers": missing,
        "settings": settings,
    }
    for table in run_blocks(write_shard, len(missing), **arguments):
        (row,) = table.to_pylist()
        if row["failure"]:
            raise ScanError(row["failure"])
        progress.add(row["videos"])
    try:
        return write_lists(manifest, out, names, uris, settings.clip)
    except (OSError, pa.ArrowException) as error:
        raise ScanError(f"{out}: its shards cannot be read ({error}); remove the damaged ones and try again") from error


def record_settings(out: str, plan: dict[str, Any]) -> None:
    """Write what is packed to ``shards.json``, or check that it equals what is there.

    Raises:
        ScanError: it differs, or the file cannot be read or written.
    """
    uri = storage.join(out, "shards.json")
    try:
        before = json.loads(storage.read_bytes(uri))
    except FileNotFoundError:
        write_output(uri, json.dumps(plan, indent=1).encode())
        return
    except (OSError, ValueError) as error:
        raise ScanError(f"{uri} cannot be read ({error}); choose another --out, or remove it") from error
    plan = json.loads(json.dumps(plan))
    differ = [key for key in plan if before.get(key) != plan[key]]
    if differ:
        changes = "".join(f"\n  {key}: {before.get(key)} in the folder, {plan[key]} now" for key in differ)
        raise ScanError(f"{out} holds shards of another list or with other settings; choose another --out:{changes}")


def write_shard(
    block: dict[str, np.ndarray],
    rows: ray.ObjectRef,
    uris: list[str],
    numbers: list[int],
    settings: ShardSettings,
) -> pa.Table:
    """Ray Data task: write one shard. Its metadata lists the videos that cannot be packed."""
    (index,) = block["id"]
    mine = ray.get(rows).slice(numbers[index] * settings.rows_per_shard, settings.rows_per_shard)
    bad = []
    file = io.BytesIO()
    schema, pack_rows = (SEGMENTS, pack_key_frames) if settings.clip else (SHARD, pack_videos)
    with pq.ParquetWriter(file, schema, compression="none") as writer:
        for row, packed in pack_rows(mine.to_pylist(), settings):
            if isinstance(packed, str):
                bad.append({name: row[name] for name, _ in ROW_FIELDS} | {"reason": packed})
                continue
            named = {"sample_id": row["sample_id"], "label": row["label"]}
            writer.write_table(pa.Table.from_pylist([named | packed], schema=schema))  # a row group
        writer.add_key_value_metadata({"bad": json.dumps(bad)})
    failure = ""
    try:
        write_output(uris[index], file.getbuffer())
    except ScanError as error:  # returned as data, as Ray would wrap it in tracebacks of its own
        failure = str(error)
    return pa.table({"videos": [len(mine)], "failure": [failure]})


Row = dict[str, Any]
Packed = tuple[Row, Row | str]  # a row of a list, and its columns of a shard, or why it cannot be packed


def pack_videos(rows: Iterable[Row], settings: ShardSettings) -> Iterator[Packed]:
    """Pack the video of each row."""
    for row in rows:
        try:
            span = span_of(row)
            with open_isolated(row["uri"], row["frames"], timeout_s=settings.timeout_s, span=span) as video:
                yield row, video.run(pack, settings.short_side, settings.keyframe_interval)
        except DecodeError as error:
            yield row, error.reason


def pack_key_frames(rows: Iterable[Row], settings: ShardSettings) -> Iterator[Packed]:
    """Pack a segment of its video for each key frame."""
    for (uri, images), of_video in groupby(rows, key=lambda row: (row["uri"], row["frames"])):
        listed = [*of_video]
        for first in range(0, len(listed), ROWS_TOGETHER):
            group = listed[first : first + ROWS_TOGETHER]
            options = (settings.clip, settings.short_side, settings.keyframe_interval)
            try:
                with open_isolated(uri, images, timeout_s=settings.timeout_s) as video:
                    packed = video.run(pack_segments, [row["time"] for row in group], *options)
            except DecodeError as error:
                packed = [error.reason] * len(group)
            yield from zip(group, packed, strict=True)


def write_lists(
    manifest: Manifest, out: str, names: list[str], uris: list[str], clip: SegmentClip | None
) -> ShardResult:
    """Write the lists of the good and the bad videos, as the shards have them."""
    good, bad, size = [], [], 0
    for name, uri in zip(names, uris, strict=True):
        system, path = storage.resolve(uri)
        size += system.get_file_info(path).size
        with system.open_input_file(path) as file, pq.ParquetFile(file) as shard_file:
            columns = [field for field in shard_file.schema_arrow.names if field != "data"]
            table = shard_file.read(columns=columns)
            bad += json.loads(shard_file.metadata.metadata[b"bad"])
        uri_column = pa.array([f"{name}#{row}" for row in range(len(table))], pa.string())
        good.append(table.append_column("uri", uri_column))
    packed = pa.concat_tables(good).replace_schema_metadata(None)
    write_output(storage.join(out, "bad.parquet"), to_parquet(pa.Table.from_pylist(bad, schema=BAD)))
    uri = storage.join(out, "manifest.parquet")
    if clip:
        packed = with_boxes(packed, manifest.rows).replace_schema_metadata(manifest.rows.schema.metadata)
        packed = packed.replace_schema_metadata(packed.schema.metadata | clip_metadata(clip))
    else:
        packed = with_classes(packed.select(MANIFEST.names), manifest.classes)
    write_output(uri, to_parquet(packed))
    if not storage.is_remote(out):  # files that a killed call left
        for partial in Path(storage.local_path(out), "shards").glob("*.tmp"):
            with contextlib.suppress(OSError):
                partial.unlink()
    return ShardResult(uri, len(packed), len(bad), len(uris), size)


def with_boxes(packed: pa.Table, listed: pa.Table) -> pa.Table:
    """Rows of segments with the boxes that key frames have in the list."""
    number = {sample: i for i, sample in enumerate(listed["sample_id"].to_pylist())}
    own = listed.take([number[sample] for sample in packed["sample_id"].to_pylist()])
    for name in ("boxes", "actions", "scores"):
        packed = packed.append_column(name, own[name])
    return packed.drop_columns(["label"])


def rows_digest(manifest: Manifest) -> str:
    """Return a hash of the rows and the classes, in order."""
    digest = hashlib.blake2b(json.dumps(manifest.classes).encode(), digest_size=16)
    for row in manifest.rows.to_pylist():
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()
