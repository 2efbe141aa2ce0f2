"""Pictures of a run, as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

NAMED = 40  # classes up to which each has its name at the axis
COUNTED = 20  # and each cell its number
AXIS_NAME, LISTED_NAME = 40, 56  # characters of a class name
LISTED = 32  # confusions that are listed where the axes have no names


def learning_curves(history: Sequence[Mapping[str, float]]) -> bytes:
    """Loss and accuracy over the epochs.

    Args:
        history: metrics of each epoch; ``val/*`` may be missing in some.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for axes, names in ((loss, ("train/loss", "val/loss")), (accuracy, ("val/top1", "val/top5"))):
        for name in names:
            points = np.array([(m["epoch"], m[name]) for m in history if name in m]).reshape(-1, 2)
            axes.plot(*points.T, label=name, marker="o" if len(points) < 20 else "")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend()
    loss.set_ylabel("loss")
    accuracy.set_ylabel("share of videos")
    accuracy.set_ylim(0, 1.02)
    return png(figure)


def confusion(counts: NDArray[np.float64], classes: Sequence[str]) -> bytes:
    """Which class is taken for which; of many classes, the most frequent confusions are listed beside it.

    Args:
        counts: ``[classes, classes]``, videos by true (row) and predicted (column) class.
        classes: their names; the rest are called by their labels.
    """
    n = len(counts)
    names = [*classes, *map(str, range(len(classes), n))]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side, many = min(12.0, 3.5 + 0.4 * n), n > NAMED
    figure = Figure(figsize=(side + (6 if many else 1), side), layout="constrained")
    axes, *beside = figure.subplots(1, 2, width_ratios=[2, 1]) if many else [figure.subplots()]
    # Cells of two pixels are seen only if they are not pale: of many classes a share of 10 % has a third of the colour.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5 if many else 1.0, vmin=0, vmax=1))
    figure.colorbar(image, ax=axes, label="share of the class", shrink=0.5)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if beside:
        list_confusions(beside[0], shares, names)
    else:
        labels = [shown(name, AXIS_NAME) for name in names]
        axes.set_xticks(range(n), labels, rotation=90)
        axes.set_yticks(range(n), labels)
    if n <= COUNTED:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", color=colour)
    return png(figure)


def list_confusions(axes: Axes, shares: NDArray[np.float64], names: Sequence[str]) -> None:
    """The largest shares beside the diagonal, as text in place of a plot."""
    wrong = shares * ~np.eye(len(shares), dtype=bool)
    lines = ["Most frequent confusions:", "share of the true class (label), and what it is taken for", ""]
    for place in np.argsort(-wrong, axis=None, kind="stable")[:LISTED]:
        row, column = divmod(int(place), len(shares))
        if wrong[row, column]:
            lines.append(f"{wrong[row, column]:4.0%}  {shown(names[row], LISTED_NAME)} ({row})")
            lines.append(f"      {shown(names[column], LISTED_NAME)} ({column})")
    axes.axis("off")
    axes.text(0, 1, "\n".join(lines), va="top", family="monospace", fontsize=8.5, linespacing=1.3)


def shown(name: str, length: int) -> str:
    """A class name in a picture: cut, as the whole name is in the tables, and its dollar signs no formula."""
    return (name if len(name) <= length else name[: length - 3] + "...").replace("$", r"\$")


def png(figure: Figure) -> bytes:
    """A figure's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
