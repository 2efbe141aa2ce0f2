"""Plots of a run, as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from posmlp.metrics import EPOCH, TRAIN_LOSS, VAL_LOSS, VAL_MAP, VAL_TOP1, VAL_TOP5

if TYPE_CHECKING:  # they import PyTorch, which a study's figures do without
    from posmlp.learn.evaluation import ClassificationMetrics
    from posmlp.tasks.detection import DetectionSummary

MAX_NAMED_CLASSES = 40  # up to this number the axes have class names
MAX_NUMBERED_CLASSES = 20  # up to this number each cell has its count
AXIS_NAME_LENGTH, LIST_NAME_LENGTH = 40, 56  # characters of a class name
KEY_FRAME_TEXT_LENGTH = 85  # characters of what a picture says of a box
KEY_FRAMES_IN_A_ROW = 3
MAX_LISTED_CONFUSIONS = 32  # in the list next to a matrix without class names


def learning_curves(history: Sequence[Mapping[str, float]]) -> bytes:
    """Plot loss and accuracy, or mAP, over the epochs.

    Args:
        history: metrics of each epoch; some epochs may have no ``val/`` metrics.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    of_detection = any(VAL_MAP in metrics for metrics in history)
    curves = (VAL_MAP,) if of_detection else (VAL_TOP1, VAL_TOP5)
    for axes, names in ((loss, (TRAIN_LOSS, VAL_LOSS)), (accuracy, curves)):
        for name in names:
            points = np.array([(m[EPOCH], m[name]) for m in history if name in m]).reshape(-1, 2)
            axes.plot(*points.T, label=name, marker="o" if len(points) < 20 else "")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend()
    loss.set_ylabel("loss")
    accuracy.set_ylabel("frame mAP at IoU 0.5" if of_detection else "share of videos")
    accuracy.set_ylim(0, 1.02)
    return to_png(figure)


def validation_files(summary: ClassificationMetrics | DetectionSummary, classes: Sequence[str]) -> dict[str, bytes]:
    """The table and the picture of a validation's classes, by file name.

    Args:
        summary: of the task's results.
        classes: class names; classes without one are named by their labels.
    """
    from posmlp.learn.evaluation import class_results, per_class_csv
    from posmlp.tasks.detection import DetectionSummary

    outputs = len(summary.boxes) if isinstance(summary, DetectionSummary) else len(summary.confusion)
    names = [*classes, *map(str, range(len(classes), outputs))]
    if isinstance(summary, DetectionSummary):
        return {
            "per_class.csv": summary.csv(names),
            "average_precision.png": average_precision(summary.average_precision, summary.boxes, names),
        }
    counts = summary.confusion.numpy()
    return {
        "confusion.png": confusion_matrix(counts, names),
        "per_class.csv": per_class_csv(class_results(summary.confusion, summary.top5, names)),
    }


def average_precision(values: NDArray[np.float64], boxes: NDArray[np.int64], classes: Sequence[str]) -> bytes:
    """Plot the average precision of each class that has ground truth, the class with the most boxes first.

    Args:
        values, boxes: as of ``DetectionSummary``.
        classes: class names.
    """
    order = [i for i in np.argsort(-boxes, kind="stable") if not np.isnan(values[i])]
    figure = Figure(figsize=(8, 1.5 + 0.22 * len(order)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(order)), values[order], color="tab:blue")
    axes.set_yticks(range(len(order)), [f"{display_name(classes[i], AXIS_NAME_LENGTH)} ({boxes[i]})" for i in order])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("average precision at IoU 0.5")
    axes.set_ylabel("class (number of boxes)")
    axes.grid(alpha=0.3, axis="x")
    return to_png(figure)


@dataclass(frozen=True)
class KeyFrame:
    """A key frame with its boxes, to be drawn.

    Attributes:
        picture: uint8 ``[H, W, 3]``; None if it cannot be read.
        boxes: float ``[N, 4]``, x1 y1 x2 y2 as fractions of the picture.
        texts: of the first boxes.
    """

    title: str
    picture: NDArray[np.uint8] | None
    boxes: NDArray[np.floating]
    texts: Sequence[str]


def key_frames(shown: Sequence[KeyFrame]) -> bytes:
    """Draw key frames with their boxes, which have the numbers of the texts below."""
    columns = min(KEY_FRAMES_IN_A_ROW, len(shown))
    figure = Figure(figsize=(5.5 * columns, 4.6 * -(-len(shown) // columns)), layout="constrained")
    for number, each in enumerate(shown, 1):
        axes = figure.add_subplot(-(-len(shown) // columns), columns, number)
        axes.set_title(display_name(each.title, LIST_NAME_LENGTH), fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
        if each.picture is None:
            axes.text(0.5, 0.5, "cannot be read", ha="center", va="center")
            continue
        height, width = each.picture.shape[:2]
        axes.imshow(each.picture)
        axes.set_anchor("W")  # leaves the width of its place to the texts
        for i, (left, top, right, bottom) in enumerate(each.boxes * [width, height, width, height]):
            colour, named = f"C{i}", i < len(each.texts)
            axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, lw=2))
            if named:
                axes.text(left, top, str(i + 1), va="top", fontsize=8, color="white", backgroundcolor=colour)
        texts = [f"{i}: {display_name(text, KEY_FRAME_TEXT_LENGTH)}" for i, text in enumerate(each.texts, 1)]
        axes.set_xlabel("\n".join(texts), fontsize=7.5, loc="left")
    return to_png(figure)


def confusion_matrix(counts: NDArray[np.float64], classes: Sequence[str]) -> bytes:
    """Plot a confusion matrix. With many classes, list the most frequent confusions next to it.

    Args:
        counts: ``[classes, classes]``, number of videos per true (row) and predicted (column) class.
        classes: class names; classes without one are named by their labels.
    """
    n = len(counts)
    names = [*classes, *map(str, range(len(classes), n))]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side, many = min(12.0, 3.5 + 0.4 * n), n > MAX_NAMED_CLASSES
    figure = Figure(figsize=(side + (6 if many else 1), side), layout="constrained")
    axes, *list_axes = figure.subplots(1, 2, width_ratios=[2, 1]) if many else [figure.subplots()]
    # With many classes a cell is two pixels wide and must not be pale: a share of 10 % gets a third of the full colour.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5 if many else 1.0, vmin=0, vmax=1))
    figure.colorbar(image, ax=axes, label="share of the class", shrink=0.5)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if list_axes:
        list_confusions(list_axes[0], shares, names)
    else:
        labels = [display_name(name, AXIS_NAME_LENGTH) for name in names]
        axes.set_xticks(range(n), labels, rotation=90)
        axes.set_yticks(range(n), labels)
    if n <= MAX_NUMBERED_CLASSES:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", color=colour)
    return to_png(figure)


def list_confusions(axes: Axes, shares: NDArray[np.float64], names: Sequence[str]) -> None:
    """Write the largest off-diagonal shares as text into the axes, the largest first."""
    wrong = shares * ~np.eye(len(shares), dtype=bool)
    lines = ["Most frequent confusions:", "share of the true class (label), predicted class (label)", ""]
    for index in np.argsort(-wrong, axis=None, kind="stable")[:MAX_LISTED_CONFUSIONS]:
        row, column = divmod(int(index), len(shares))
        if wrong[row, column]:
            lines.append(f"{wrong[row, column]:4.0%}  {display_name(names[row], LIST_NAME_LENGTH)} ({row})")
            lines.append(f"      {display_name(names[column], LIST_NAME_LENGTH)} ({column})")
    axes.axis("off")
    axes.text(0, 1, "\n".join(lines), va="top", family="monospace", fontsize=8.5, linespacing=1.3)


def display_name(name: str, length: int) -> str:
    """Cut a class name to ``length`` characters and escape dollar signs, which Matplotlib would read as a formula."""
    return (name if len(name) <= length else name[: length - 3] + "...").replace("$", r"\$")


def to_png(figure: Figure) -> bytes:
    """Render a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
