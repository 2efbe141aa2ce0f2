"""The results of an evaluation of videos with one class each: accuracies, confusions, and the scores of all views."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import torch

from pipelines.data.scan import ROW_FIELDS, open_parquet
from pipelines.inference.results import Findings
from pipelines.tracking.plots import validation_files
from posmlp import storage
from posmlp.config import Config
from posmlp.learn.evaluation import ClassificationMetrics, class_results, video_scores
from posmlp.metrics import VAL
from posmlp.video.manifest import Manifest

SCORES = "scores.parquet"
SCORED_FIELDS = [*ROW_FIELDS, ("view", pa.int32()), ("clip", pa.int32()), ("crop", pa.int32())]
WORST_CLASSES_SHOWN = 5


def recognition_results(
    folder: str,
    blocks: Iterable[tuple[np.ndarray, Sequence[np.ndarray]]],
    manifest: Manifest,
    names: Sequence[str],
    config: Config,
) -> Findings:
    """Write the scores into the folder as they come, and compute the metrics.

    Args:
        blocks, names, config: as of ``write_scores``.
    """
    counts = write_scores(storage.join(folder, SCORES), blocks, manifest, names, config)
    metrics = {key.removeprefix(VAL): value for key, value in counts.metrics().items()}
    metrics["videos"] = metrics.pop("clips")
    classes = class_results(counts.confusion, counts.top5, names)
    table = [
        ("top-1", f"{metrics['top1']:.2%} of {metrics['videos']:.0f} videos"),
        *([("top-5", f"{metrics['top5']:.2%}")] if len(classes) > 5 else []),
        ("mean over classes", f"{metrics['class_mean']:.2%}"),
        ("loss", f"{metrics['loss']:.4f}"),
    ]
    wrong = sorted((c for c in classes if c.top1 is not None and c.top1 < 1), key=lambda c: c.top1 or 0.0)
    wrong = wrong[:WORST_CLASSES_SHOWN]
    width, worst = max((len(c.name) for c in wrong), default=0), []
    for c in wrong:
        often = f"; {c.confused} predicted as {c.confused_with}" if c.confused else ""
        worst.append(f"{c.name:<{width}}  {c.top1:>6.1%} of {c.videos}{often}")
    return Findings(metrics, classes, table, worst, SCORES, validation_files(counts, names))


def write_scores(
    uri: str,
    blocks: Iterable[tuple[np.ndarray, Sequence[np.ndarray]]],
    manifest: Manifest,
    names: Sequence[str],
    config: Config,
) -> ClassificationMetrics:
    """Write ``scores.parquet`` block by block, and count right and wrong predictions.

    The file has one row per view of each scored video. The column ``scores`` has the log-probabilities by label;
    ``classes`` in the schema's metadata has their names. It appears when all blocks are there.

    Args:
        blocks: as of ``score_good_videos``: rows, and the scores of each, float32 ``[views, classes]``.
        names: of the classes, by label.
        config: the recipe, for ``eval.crops`` and ``eval.fusion``.

    Raises:
        UserError: the file cannot be written.
    """
    crops = config.eval.crops
    labels, counts = manifest.rows["label"].to_numpy(), ClassificationMetrics.empty(len(names))
    fields = [*SCORED_FIELDS, ("scores", pa.list_(pa.float32(), len(names)))]
    schema = pa.schema(fields, metadata={"classes": json.dumps(list(names))})
    with open_parquet(uri, schema, compression="zstd") as file:
        for rows, of_rows in blocks:
            scores = np.stack(of_rows)
            truth = torch.from_numpy(labels[rows].astype(np.int64))
            counts.add(video_scores(torch.from_numpy(scores), config.eval.fusion), truth, torch.ones(len(rows)))
            view = np.tile(np.arange(scores.shape[1], dtype=np.int32), len(rows))
            about = manifest.rows.select(["sample_id", "uri", "label"]).take(np.repeat(rows, scores.shape[1]))
            columns = [view, view // crops, view % crops]
            values = pa.FixedSizeListArray.from_arrays(pa.array(scores.reshape(-1)), len(names))
            file.write(pa.Table.from_arrays([*about.columns, *map(pa.array, columns), values], schema=schema))
    return counts
