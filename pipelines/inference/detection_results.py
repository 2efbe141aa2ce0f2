"""The results of an evaluation of key frames: frame mAP, all boxes with their scores, and the worst key frames."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.data.loader import decode_rows
from pipelines.data.scan import open_output
from pipelines.inference.results import Findings
from pipelines.tracking.plots import KeyFrame, key_frames, validation_files
from posmlp import storage
from posmlp.config import Config
from posmlp.metrics import VAL, VAL_BOXES, VAL_KEY_FRAMES, VAL_LOSS, VAL_MAP, VAL_MAP_OF, VAL_MAP_SLOWFAST
from posmlp.tasks.detection import ListedBoxes, evaluated_classes, known_losses, measure
from posmlp.video.manifest import Manifest

DETECTIONS = "detections.csv"
WORST = "worst.png"
WORST_CLASSES_SHOWN = 5
WORST_KEY_FRAMES_SHOWN = 9
WORST_BOXES_SHOWN = 3  # of a key frame, with their actions
LIKELY = 0.5  # probability from which on a picture shows a class; if none has it, it shows the likeliest


def detection_results(
    folder: str,
    blocks: Iterable[tuple[np.ndarray, Sequence[np.ndarray]]],
    manifest: Manifest,
    names: Sequence[str],
    config: Config,
) -> Findings:
    """Write the boxes with their scores into the folder as they come, and compute the metrics.

    The metrics need all scores at once: they stay in memory, 4 bytes for each box and class.

    Args:
        blocks: as of ``score_good_videos``: rows, and the logits of all boxes of each, float32 ``[boxes, classes]``.
        names: of the classes, by label.
        config: the recipe, to decode the worst key frames.
    """
    listed, sample_ids = ListedBoxes.of_table(manifest.rows), manifest.rows["sample_id"].to_pylist()
    written = evaluated_classes(manifest.rows) or range(len(names))
    boxes, logits, rows = list[NDArray[np.int64]](), list[NDArray[np.float32]](), 0
    with open_output(storage.join(folder, DETECTIONS)) as file:
        for numbers, of_rows in blocks:
            for row, scores in zip(numbers.tolist(), of_rows, strict=True):
                own = np.arange(listed.first[row], listed.first[row + 1])
                given = ~np.isnan(listed.scores[own])  # the others are only compared with
                lines = detection_lines(sample_ids[row], listed.corners[own[given]], scores[given], written)
                file.write(lines.encode())
                boxes.append(own)
                logits.append(scores)
            rows += len(numbers)
    scored, values = np.concatenate(boxes), np.concatenate(logits)
    measured, classes = measure(manifest.rows, listed, scored, values, slowfast=True)
    metrics = {key.removeprefix(VAL): value for key, value in (measured | {VAL_KEY_FRAMES: float(rows)}).items()}
    _, worst = classes.best_and_worst(names, WORST_CLASSES_SHOWN)
    files = validation_files(classes, names) | worst_key_frames(manifest, listed, scored, values, names, config)
    return Findings(metrics, classes, metric_table(measured, rows), worst, DETECTIONS, files)


def metric_table(metrics: dict[str, float], key_frames: int) -> list[tuple[str, str]]:
    """The metrics as names and values for the user."""
    other = (VAL_MAP, VAL_MAP_SLOWFAST)
    groups = {key: value for key, value in metrics.items() if key.startswith(VAL_MAP_OF) and key not in other}
    counted = f"of {metrics[VAL_BOXES]:.0f} boxes in {key_frames} key frames"
    return [
        ("mAP at IoU 0.5", f"{metrics[VAL_MAP]:.2%} {counted}"),
        *((f"  {key.removeprefix(VAL_MAP_OF)}", f"{value:.2%}") for key, value in groups.items()),
        ("SlowFast's rule", f"{metrics[VAL_MAP_SLOWFAST]:.2%}"),
        *([("loss", f"{metrics[VAL_LOSS]:.4f}")] if VAL_LOSS in metrics else []),
    ]


def detection_lines(
    sample_id: str, corners: NDArray[np.float32], logits: NDArray[np.float32], classes: Sequence[int]
) -> str:
    """The lines of a key frame in AVA's format of results: ``video,second,x1,y1,x2,y2,action,score``.

    Each of these classes has a line for each box. The action is its id, from 1.

    Args:
        sample_id: of the key frame, its video and second.
        corners: float32 ``[boxes, 4]``.
        logits: float32 ``[boxes, classes]``.
    """
    probabilities = torch.from_numpy(logits).double().sigmoid().numpy()[:, classes].tolist()
    lines = []
    for box, of_classes in zip(corners.tolist(), probabilities, strict=True):
        head = f"{sample_id},{','.join(f'{value:.3f}' for value in box)}"
        lines += [f"{head},{c + 1},{value:.4f}\n" for c, value in zip(classes, of_classes, strict=True)]
    return "".join(lines)


def worst_key_frames(
    manifest: Manifest,
    listed: ListedBoxes,
    boxes: NDArray[np.int64],
    logits: NDArray[np.float32],
    names: Sequence[str],
    config: Config,
) -> dict[str, bytes]:
    """``WORST``, the key frames with the highest sum of the losses of their boxes with known actions.

    Args:
        boxes, logits: the scored boxes, as of ``posmlp.tasks.detection.measure``.

    Returns:
        The picture by its file's name; empty if no box has a known action.
    """
    losses = known_losses(listed, boxes, logits)
    row = listed.row[boxes]
    sums = np.bincount(row, np.nan_to_num(losses), len(manifest.rows))
    worst = np.argsort(-sums, kind="stable")[:WORST_KEY_FRAMES_SHOWN]
    worst = worst[sums[worst] > 0]
    if not len(worst):
        return {}
    plain = config.model_copy(update={"data": config.data.model_copy(update={"frame_order": "ordered"})})
    columns = decode_rows(manifest.rows.take(worst), np.ones(len(worst), bool), plain, 0, False)
    shown = []
    for place, number in enumerate(worst.tolist()):
        own = np.flatnonzero((row == number) & ~np.isnan(losses))
        own = own[np.argsort(-losses[own], kind="stable")]
        texts = list(described(listed, boxes[own], logits[own], names))[:WORST_BOXES_SHOWN]
        clip = None if columns["reason"][place] else columns["clip"][place][0]
        picture = None if clip is None else clip[len(clip) // 2]  # the key frame is the middle of its clip
        title = f"{columns['sample_id'][place]}   loss {sums[number]:.2f}"
        shown.append(KeyFrame(title, picture, listed.corners[boxes[own]], texts))
    return {WORST: key_frames(shown)}


def described(
    listed: ListedBoxes, boxes: NDArray[np.int64], logits: NDArray[np.float32], names: Sequence[str]
) -> Iterator[str]:
    """Yield the true and the predicted actions of each box."""
    for box, scores in zip(boxes, torch.from_numpy(logits).sigmoid().numpy(), strict=True):
        truth = ", ".join(names[c] for c in listed.action[listed.box == box])
        order = np.argsort(-scores, kind="stable")
        likely = [c for c in order if scores[c] >= LIKELY] or order[:1]
        yield f"{truth} | predicted {', '.join(f'{names[c]} {scores[c]:.0%}' for c in likely)}"
