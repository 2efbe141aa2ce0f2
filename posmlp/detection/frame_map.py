"""Frame mAP at IoU 0.5, the metric of AVA, by the rule of the ActivityNet evaluation.

A labelled box is a box with one class and its score: a scored box is one labelled box of each class.

1. Classes that are not evaluated are left out.
2. Each key frame keeps its 50 labelled boxes of the highest scores. Then those of empty boxes are left out.
3. Within a key frame and a class, each labelled box belongs to the truth box that it overlaps most. By falling score,
   the first one with an IoU of at least 0.5 is the truth box's true positive. All others are false positives; none
   gets a second choice. Boxes are not suppressed.
4. The labelled boxes of a class in all key frames, by falling score, have a precision and a recall after each one. The
   average precision is the area under the curve of the highest precision at this recall or a greater one.
5. mAP is the mean over the evaluated classes that have ground truth. One without a labelled box counts 0.

The evaluation code of SlowFast leaves out the sorting in step 3, which then goes by the order of the boxes, and keeps
all boxes in step 2. With one scored box for each person, the orders agree.

Of equal scores, the smaller key comes first, then the order of the boxes, then the lower class, so the same boxes
always have the same mAP. The rule itself leaves these open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_IOU = 0.5
MOST = 50  # labelled boxes of a key frame


@dataclass(frozen=True)
class Truth:
    """Ground truth: one entry for each action of each box. A box with several actions is repeated.

    Attributes:
        key: int64 ``[M]``, number of the key frame.
        boxes: float ``[M, 4]``, x1 y1 x2 y2 in any unit, the same as ``Scored.boxes``.
        action: int64 ``[M]``, class.
    """

    key: NDArray[np.int64]
    boxes: NDArray[np.floating]
    action: NDArray[np.int64]


@dataclass(frozen=True)
class Scored:
    """Boxes with the model's scores.

    Attributes:
        key: int64 ``[N]``, number of the key frame.
        boxes: float ``[N, 4]``, x1 y1 x2 y2.
        scores: float32 ``[N, classes]``, higher is likelier. NaN counts as minus infinity.
    """

    key: NDArray[np.int64]
    boxes: NDArray[np.floating]
    scores: NDArray[np.float32]


@dataclass(frozen=True)
class FrameMap:
    """Average precision of each class.

    Attributes:
        average_precision: float64 ``[classes]``, 0 to 1. NaN if the class has no ground truth or is not evaluated.
    """

    average_precision: NDArray[np.float64]

    @property
    def map(self) -> float:
        """The mean over all classes that are not NaN; NaN if there are none."""
        return self.mean_of(range(len(self.average_precision)))

    def mean_of(self, classes: Sequence[int]) -> float:
        """The mean over some classes, without those that are NaN; NaN if there are none."""
        values = self.average_precision[np.asarray(classes, np.int64)]
        return float(np.mean(values[~np.isnan(values)])) if not np.isnan(values).all() else float("nan")


def frame_map(
    truth: Truth,
    scored: Scored,
    num_classes: int,
    evaluated: Sequence[int] | None = None,
    *,
    most: int | None = MOST,
    by_score: bool = True,
) -> FrameMap:
    """Compute the average precision of each class, see the module.

    Args:
        truth: the ground truth. Key frames that are excluded are in neither ``truth`` nor ``scored``.
        scored: the boxes and their scores.
        num_classes: number of classes, the width of ``scored.scores``.
        evaluated: the classes that are evaluated; None: all.
        most: labelled boxes that a key frame keeps, at least 1; None: all.
        by_score: match by falling score; otherwise in the order of the boxes.

    Raises:
        ValueError: the width of the scores, or a class, does not agree with ``num_classes``.
    """
    classes = np.arange(num_classes) if evaluated is None else np.unique(np.asarray(evaluated, np.int64))
    if scored.scores.shape != (len(scored.key), num_classes):
        raise ValueError(f"scores are {scored.scores.shape}, expected {(len(scored.key), num_classes)}")
    for what, values in ("class of the ground truth", truth.action), ("evaluated class", classes):
        if len(values) and not 0 <= values.min() <= values.max() < num_classes:
            raise ValueError(f"{what} out of range; there are {num_classes} classes: {values.min()} to {values.max()}")

    # Columns are the evaluated classes from here on; rows are in the order of keys.
    column = np.full(num_classes, -1)
    column[classes] = np.arange(len(classes))
    used = np.flatnonzero(column[truth.action] >= 0)
    truth = Truth(truth.key[used], truth.boxes[used].astype(np.float64), column[truth.action[used]])
    order = np.argsort(scored.key, kind="stable")
    scores = scored.scores[order] if evaluated is None else scored.scores[order[:, None], classes]
    scores = np.where(np.isnan(scores), -np.inf, scores).astype(scores.dtype)
    scored = Scored(scored.key[order], scored.boxes[order].astype(np.float64), scores)

    kept = np.ones(scored.scores.shape, bool) if most is None else _highest(scored, most)
    empty = (scored.boxes[:, :2] >= scored.boxes[:, 2:]).any(1)
    kept[empty] = False
    hits = _true_positives(truth, scored, kept, by_score)
    counts = np.bincount(truth.action, minlength=len(classes))
    precision = np.full(num_classes, np.nan)
    for i, label in enumerate(classes):
        if counts[i]:
            rows = np.flatnonzero(kept[:, i])
            precision[label] = _average_precision(scored.scores[rows, i], hits[rows, i], counts[i])
    return FrameMap(precision)


def _highest(scored: Scored, most: int) -> NDArray[np.bool_]:
    """Return which labelled boxes are among the ``most`` highest of their key frame: bool ``[N, classes]``."""
    width = scored.scores.shape[1]
    kept = np.ones(scored.scores.shape, bool)
    starts = np.flatnonzero(np.diff(scored.key, prepend=scored.key[:1] - 1))
    boxes = np.diff(starts, append=len(scored.key))
    for count in np.unique(boxes[boxes * width > most]):  # key frames with the same number of boxes, at once
        rows = starts[boxes == count, None] + np.arange(count)  # [keys, boxes]
        flat = scored.scores[rows].reshape(len(rows), count * width)
        place = count * width - most
        last = np.partition(flat, place, axis=1)[:, place, None]  # the lowest score that is kept
        above, equal = flat > last, flat == last
        room = most - above.sum(1, keepdims=True)
        kept[rows] = (above | (equal & (equal.cumsum(1) <= room))).reshape(len(rows), count, width)
    return kept


def _true_positives(truth: Truth, scored: Scored, kept: NDArray[np.bool_], by_score: bool) -> NDArray[np.bool_]:
    """Return which labelled boxes are true positives: bool ``[N, classes]``. ``scored`` is in the order of keys."""
    # Every labelled box that is kept, with every truth box of its key frame and class.
    start, end = (np.searchsorted(scored.key, truth.key, side) for side in ("left", "right"))
    of = np.repeat(np.arange(len(truth.key)), end - start)  # [pairs], index of the truth box
    box = np.arange(len(of)) - np.repeat(np.cumsum(end - start) - end, end - start)  # [pairs], index of the scored box
    pairs = kept[box, truth.action[of]]
    of, box = of[pairs], box[pairs]
    action, overlap = truth.action[of], _iou(truth.boxes[of], scored.boxes[box])

    best = _first_of_each(box * kept.shape[1] + action, (of, -overlap))
    best = best[overlap[best] >= MIN_IOU]
    of, box, action = of[best], box[best], action[best]
    falling = (-scored.scores[box, action],) if by_score else ()
    first = _first_of_each(of, (box, *falling))
    hits = np.zeros(kept.shape, bool)
    hits[box[first], action[first]] = True
    return hits


def _first_of_each(group: NDArray[np.int64], keys: tuple[NDArray, ...]) -> NDArray[np.int64]:
    """The index of the first member of each group by ``keys``, the last of which counts most (as in ``lexsort``)."""
    order = np.lexsort((*keys, group))
    return order[np.diff(group[order], prepend=-1) != 0]


def _iou(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.floating]:
    """Intersection over union of the boxes in each row, ``[pairs, 4]`` each. One of the two has an area."""
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    shared = np.maximum(sides, 0).prod(1)
    return shared / (np.maximum(a[:, 2:] - a[:, :2], 0).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - shared)


def _average_precision(scores: NDArray[np.float32], hits: NDArray[np.bool_], boxes: int) -> float:
    """The area under the envelope of precision. The curve rises at true positives only, so it needs only those."""
    ranks = np.flatnonzero(hits[np.argsort(-scores, kind="stable")]) + 1
    precision = np.arange(1, len(ranks) + 1) / ranks
    return float(np.maximum.accumulate(precision[::-1]).sum() / boxes)
