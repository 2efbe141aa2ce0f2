"""Pictures of a run, as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

NAMED = 40  # classes up to which each has its name at the axis
COUNTED = 20  # and each cell its number


def learning_curves(history: Sequence[Mapping[str, float]]) -> bytes:
    """Loss and accuracy over the epochs.

    Args:
        history: metrics of each epoch; ``val/*`` may be missing in some.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for axes, names in ((loss, ("train/loss", "val/loss")), (accuracy, ("val/top1", "val/top5"))):
        for name in names:
            points = [(m["epoch"], m[name]) for m in history if name in m]
            axes.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 20 else "")
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    loss.set_ylabel("loss")
    accuracy.set_ylabel("share of videos")
    accuracy.set_ylim(0, 1.02)
    return png(figure)


def confusion(counts: NDArray[np.float64], classes: Sequence[str]) -> bytes:
    """Which class is taken for which.

    Args:
        counts: ``[classes, classes]``, videos by true (row) and predicted (column) class.
        classes: their names; the rest are called by their labels.
    """
    n = len(counts)
    names = [*classes, *map(str, range(len(classes), n))]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(12.0, 3.5 + 0.4 * n)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the class", shrink=0.8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if n <= NAMED:
        axes.set_xticks(range(n), names, rotation=90)
        axes.set_yticks(range(n), names)
    if n <= COUNTED:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", color=colour)
    return png(figure)


def png(figure: Figure) -> bytes:
    """A figure's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
