"""Decode every video of a list and report the bad ones: ``posmlp data check``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

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
from posmlp.video.decode import DecodeError
from posmlp.video.isolated import open_isolated
from posmlp.video.manifest import Manifest
from posmlp.video.orientation import NAMES

ROWS_PER_TASK = 8  # videos that one task decodes
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


@dataclass(frozen=True)
class CheckResult:
    """The result of a check.

    Attributes:
        report: one row per video, in the order of the manifest; the schema is ``REPORT``.
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


def check(manifest: Manifest, out: str, timeout_s: float) -> CheckResult:
    """Decode every frame of every video, in parallel.

    Writes ``report.parquet`` (one row per video), ``summary.txt`` and ``good.parquet``, a list of the good videos to
    train on.

    Args:
        out: folder for the results, a path or a URI.
        timeout_s: seconds after which a video counts as bad.

    Raises:
        ScanError: ``out`` cannot be written.
    """
    write_output(storage.join(out, "summary.txt"), b"the check has not ended\n")  # fail now, not after hours
    blocks = -(-len(manifest.rows) // ROWS_PER_TASK)
    progress = ScanProgress(len(manifest.rows), "checked")
    tables = []
    for table in run_blocks(check_block, blocks, rows=ray.put(manifest.rows), timeout_s=timeout_s):
        tables.append(table)
        progress.add(len(table))
    report = pa.concat_tables(tables)
    has_list = manifest.rows["frames"].null_count == len(manifest.rows)
    result = CheckResult(report, format_summary(report, manifest.classes, progress.seconds), has_list)
    good = report.filter(report["good"]).select([*MANIFEST.names])
    if has_list:
        write_output(storage.join(out, "good.parquet"), to_parquet(with_classes(good, manifest.classes)))
    write_output(storage.join(out, "report.parquet"), to_parquet(report))
    write_output(storage.join(out, "summary.txt"), result.summary.encode())
    return result


def check_block(block: dict[str, np.ndarray], rows: ray.ObjectRef, timeout_s: float) -> pa.Table:
    """Ray Data task: decode the videos of one block; returns their rows of the report."""
    (number,) = block["id"]
    lines = []
    for row in ray.get(rows).slice(number * ROWS_PER_TASK, ROWS_PER_TASK).to_pylist():
        line = {name: row[name] for name, _ in ROW_FIELDS} | {"good": True, "reason": ""}
        try:
            with open_isolated(row["uri"], row["frames"], "decord", timeout_s=timeout_s) as video:
                info = video.info
                line["height"], line["width"], line["orientation"] = video.inspect()
                line |= {"num_frames": info.frames, "fps": info.fps, "codec": info.codec, "key_frames": info.key_frames}
                if info.stream is not None:
                    line["decord_agrees"] = info.decoder == "decord"
                    line |= {name: getattr(info, name) for name in ("stream", "video_streams", "stream_choice")}
        except DecodeError as error:
            line |= {"good": False, "reason": error.reason}
        lines.append(line)
    return pa.Table.from_pylist(lines, schema=REPORT)


def format_summary(report: pa.Table, classes: tuple[str, ...], seconds: float) -> str:
    """Format the report as a page of text."""
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
