"""Decode every video of a list and report the bad ones: ``posmlp data check``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import ray

from pipelines.data.scan import (
    MANIFEST,
    ROW_FIELDS,
    VIDEO_FIELDS,
    ScanProgress,
    run_blocks,
    to_parquet,
    with_classes,
    write_output,
)
from posmlp import storage
from posmlp.detection.clips import find_key_frame
from posmlp.video.decode import DecodeError, VideoInfo, span_of
from posmlp.video.isolated import open_isolated
from posmlp.video.manifest import SPAN_COLUMNS, Manifest
from posmlp.video.orientation import NAMES

ROWS_PER_TASK = 8  # videos that one task decodes
FILMS_PER_TASK = 1  # of key frames, which are many in a long video
EXAMPLES = 20  # bad videos that a summary lists
REPORT = pa.schema(
    [
        *ROW_FIELDS,
        ("good", pa.bool_()),
        ("reason", pa.string()),
        *VIDEO_FIELDS,
        ("decord_agrees", pa.bool_()),
        ("orientation", pa.string()),
        ("stream", pa.int32()),
        ("video_streams", pa.int32()),
        ("stream_choice", pa.string()),
    ]
)
# Of each video that has key frames: how many, and which of them it does not reach.
KEY_FRAMES_REPORT = REPORT.append(pa.field("listed", pa.int32())).append(pa.field("beyond", pa.list_(pa.string())))


@dataclass(frozen=True)
class CheckResult:
    """The result of a check.

    Attributes:
        report: one row per video, in the order of the manifest; the schema is ``REPORT``, of key frames
            ``KEY_FRAMES_REPORT``. Rows that are parts of videos have their first and last frame too.
        summary: the same as text.
        has_list: whether ``good.parquet`` was written. Frame folders have none, as they have no file to name.
    """

    report: pa.Table
    summary: str
    has_list: bool

    @property
    def bad(self) -> int:
        """Return the number of bad videos."""
        return len(self.report) - int(np.count_nonzero(self.report["good"]))

    @property
    def beyond(self) -> int:
        """Return the number of key frames that good videos do not reach."""
        return sum(map(len, self.report["beyond"].to_pylist())) if "beyond" in self.report.column_names else 0


def check(
    manifest: Manifest, out: str, timeout_s: float, *, key_frames: bool = False, fps: float | None = None
) -> CheckResult:
    """Decode every frame of every video, in parallel.

    Writes ``report.parquet`` (one row per video), ``summary.txt`` and ``good.parquet``, a list of the good videos to
    train on.

    Args:
        out: folder for the results, a path or a URI.
        timeout_s: seconds after which a video counts as bad.
        key_frames: the rows are those of ``posmlp.detection.lists``, many of a video. Each video is decoded once, and
            ``good.parquet`` has the key frames that lie in a good video, with their boxes.
        fps: ``data.fps``, for the times of key frames.

    Raises:
        ScanError: ``out`` cannot be written.
    """
    write_output(storage.join(out, "summary.txt"), b"the check has not ended\n")  # fail now, not after hours
    videos = videos_of(manifest.rows) if key_frames else manifest.rows
    size = FILMS_PER_TASK if key_frames else ROWS_PER_TASK
    progress = ScanProgress(len(videos), "checked")
    tables = []
    options = {"rows": ray.put(videos), "timeout_s": timeout_s, "size": size, "fps": fps}
    for table in run_blocks(check_block, -(-len(videos) // size), **options):
        tables.append(table)
        progress.add(len(table))
    report = pa.concat_tables(tables)
    spans = [name for name in SPAN_COLUMNS if name in videos.column_names]
    for name in spans:
        report = report.append_column(name, videos[name])
    has_list = videos["frames"].null_count == len(videos)
    result = CheckResult(report, format_summary(report, manifest.classes, progress.seconds), has_list)
    if has_list:
        good = report.filter(report["good"])
        listed = with_classes(good.select([*MANIFEST.names, *spans]), manifest.classes)
        write_output(
            storage.join(out, "good.parquet"),
            to_parquet(good_key_frames(manifest.rows, good) if key_frames else listed),
        )
    write_output(storage.join(out, "report.parquet"), to_parquet(report))
    write_output(storage.join(out, "summary.txt"), result.summary.encode())
    return result


def videos_of(rows: pa.Table) -> pa.Table:
    """The videos of key frames in order: as rows of a manifest with the ids and times of their key frames."""
    videos: dict[str, dict[str, Any]] = {}
    for row in rows.select(["sample_id", "uri", "frames", "time"]).to_pylist():
        name = row["sample_id"].rpartition(",")[0]
        video = videos.setdefault(row["uri"], {"sample_id": name, "uri": row["uri"], "label": None})
        video["frames"] = row["frames"]
        video.setdefault("key_ids", []).append(row["sample_id"])
        video.setdefault("key_times", []).append(row["time"])
    keys = [("key_ids", pa.list_(pa.string())), ("key_times", pa.list_(pa.float64()))]
    return pa.Table.from_pylist([*videos.values()], schema=pa.schema([*ROW_FIELDS, ("frames", pa.int32()), *keys]))


def good_key_frames(rows: pa.Table, good: pa.Table) -> pa.Table:
    """The key frames that lie in one of the good videos."""
    beyond = {key for keys in good["beyond"].to_pylist() for key in keys}
    kept = pa.array(key not in beyond for key in rows["sample_id"].to_pylist())
    return rows.filter(pa.compute.and_(kept, pa.compute.is_in(rows["uri"], good["uri"].combine_chunks())))


def not_reached(video: dict[str, Any], info: VideoInfo, fps: float | None) -> list[str]:
    """The ids of the key frames that are not in their video."""
    beyond = []
    for key, time in zip(video["key_ids"], video["key_times"], strict=True):
        try:
            find_key_frame(video["uri"], info, time, fps)
        except DecodeError:
            beyond.append(key)
    return beyond


def check_block(
    block: dict[str, np.ndarray], rows: ray.ObjectRef, timeout_s: float, size: int, fps: float | None
) -> pa.Table:
    """Ray Data task: decode the videos of one block; returns their rows of the report."""
    (number,) = block["id"]
    lines = []
    table = ray.get(rows)
    key_frames = "key_times" in table.column_names
    for row in table.slice(number * size, size).to_pylist():
        line = {name: row[name] for name, _ in ROW_FIELDS} | {"good": True, "reason": ""}
        if key_frames:
            line |= {"listed": len(row["key_ids"]), "beyond": []}
        try:
            span = span_of(row)
            with open_isolated(row["uri"], row["frames"], "decord", timeout_s=timeout_s, span=span) as video:
                info = video.info
                line["height"], line["width"], line["orientation"] = video.inspect()
                line |= {"num_frames": info.frames, "fps": info.fps, "codec": info.codec, "key_frames": info.key_frames}
                if key_frames:
                    line["beyond"] = not_reached(row, info, fps)
                if info.stream is not None:
                    line["decord_agrees"] = info.decoder == "decord"
                    line |= {name: getattr(info, name) for name in ("stream", "video_streams", "stream_choice")}
        except DecodeError as error:
            line |= {"good": False, "reason": error.reason}
        lines.append(line)
    return pa.Table.from_pylist(lines, schema=KEY_FRAMES_REPORT if key_frames else REPORT)


def format_summary(report: pa.Table, classes: tuple[str, ...], seconds: float) -> str:
    """Format the report as a page of text."""
    good = report.filter(report["good"])
    bad = report.filter(pa.compute.invert(report["good"]))
    lines = [f"{len(report)} videos of {len(classes)} classes: {len(good)} good, {len(bad)} bad ({seconds:.0f} s)"]
    key_frames = "listed" in report.column_names
    if key_frames:
        lost, beyond = (sum(values) for values in (bad["listed"].to_pylist(), map(len, good["beyond"].to_pylist())))
        total = sum(report["listed"].to_pylist())
        lines[0] = f"{total} key frames: {lost} in bad videos, {beyond} beyond the end of good ones\n" + lines[0]
    if len(good):
        for name, unit in (("num_frames", "frames"), ("fps", "frames/s"), ("height", "high"), ("width", "wide")):
            values = good[name].drop_null().to_numpy()
            if len(values):
                lines.append(f"  {unit:<9}{values.min():>8.5g} to {values.max():<8.5g} median {np.median(values):.5g}")
        codecs = Counter(good["codec"].to_pylist()).most_common()
        lines.append("  codecs   " + ", ".join(f"{codec} {count}" for codec, count in codecs))
        differ = good.filter(pa.compute.invert(good["decord_agrees"]))
        lines.append(f"  data.decoder=decord leaves {len(differ)} of them to PyAV")
        turned = Counter(name for name in good["orientation"].to_pylist() if name != NAMES[1]).most_common()
        if turned:
            counts = ", ".join(f"{name} {count}" for name, count in turned[:EXAMPLES])
            lines.append(f"  stored otherwise than upright: {counts}" + (", ..." if len(turned) > EXAMPLES else ""))
        several = good.filter(pa.compute.greater(good["video_streams"], 1))
        if len(several):
            choices = Counter(several["stream_choice"].to_pylist()).most_common()
            counts = ", ".join(f"{choice} {count}" for choice, count in choices)
            lines.append(f"  {len(several)} with several video streams, decoded by: {counts}")
    empty = [] if key_frames else sorted(set(range(len(classes))) - set(good["label"].to_pylist()))
    if empty:
        names = ", ".join(classes[label] for label in empty[:EXAMPLES]) + (", ..." if len(empty) > EXAMPLES else "")
        lines.append(f"  classes without a good video: {names}")
    short = good.filter(pa.compute.greater(pa.compute.list_value_length(good["beyond"]), 0)) if key_frames else bad[:0]
    if len(short):
        lines.append("videos that end before some of their key frames (see detection.first_second):")
        for row in short.slice(0, EXAMPLES).to_pylist():
            ends = "" if row["fps"] is None else f", ends after {row['num_frames'] / row['fps']:.1f} s"
            lines.append(f"  {row['uri']}{ends}: {row['beyond'][0]} and {len(row['beyond']) - 1} more")
        if len(short) > EXAMPLES:
            lines.append(f"  ... and {len(short) - EXAMPLES} more, see report.parquet")
    if len(bad):
        lines.append("bad videos:")
        lines += [f"  {row['uri']}: {row['reason']}" for row in bad.slice(0, EXAMPLES).to_pylist()]
        if len(bad) > EXAMPLES:
            lines.append(f"  ... and {len(bad) - EXAMPLES} more, see report.parquet")
    return "\n".join(lines) + "\n"
