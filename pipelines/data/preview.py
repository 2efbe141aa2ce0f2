"""A contact sheet of clips as the model will see them: sampled, cropped, augmented, mixed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from pipelines.data.loader import decode_rows, global_order, rows_per_step
from posmlp.config import Config
from posmlp.errors import UserError
from posmlp.tasks import task_of
from posmlp.tasks.detection import augment_boxes
from posmlp.video.augment import NORMALISATIONS, flip_labels, to_input, to_train_input
from posmlp.video.batch import Batch, Boxes
from posmlp.video.clip import views_per_video
from posmlp.video.draws import epoch_draws

matplotlib.use("Agg")

WIDTH = 10.0  # inches of the sheet
COLUMNS = 16  # pictures in a row; longer clips show every second, third, ... frame
TRAINED, NEGATIVE, TRUTH = "trained on", "trained on, without an action", "truth, not scored"
SCORED, SCORED_TRUTH = "scored", "scored, and the truth"
COLOURS = {TRAINED: "lime", NEGATIVE: "orange", TRUTH: "lime", SCORED: "orange", SCORED_TRUTH: "cyan"}  # of boxes


class Mark(NamedTuple):
    """A box on the key frame of a clip.

    Attributes:
        corners: x1, y1, x2, y2 as fractions of the picture.
        kind: a key of ``COLOURS``.
        text: the names of its actions.
    """

    corners: tuple[float, ...]
    kind: str
    text: str


class Shown(NamedTuple):
    """What the sheet shows of the clips of a batch.

    Attributes:
        x: model input, float32 ``[B, 3, T, H, W]``.
        labels: what stands above each clip.
        marks: the boxes of each clip's key frame; None: clips have no key frame.
    """

    x: Tensor
    labels: list[str]
    marks: list[list[Mark]] | None


def preview(config: Config, out: Path, *, train: bool, epoch: int, videos: int) -> None:
    """Draw the first ``videos`` of an epoch, one clip a row.

    Pixels are decoded, augmented and mixed by the code and the random numbers of a run; differences of frames
    (``data.modality``) are shown around grey. A bad video shows its reason. In detection the key frame is twice as
    large, with its boxes and their actions.

    Raises:
        ManifestError: the data set's list is wrong.
        UserError: ``out`` cannot be written.
    """
    section = config.detection.model_copy(update={"whole_frame": False})  # one size for all clips
    config = config.model_copy(update={"detection": section})
    task = task_of(config)
    known = None if train else task.training_classes(config)
    manifest = task.read_split(config, "train" if train else "val", known)
    count = len(manifest.rows)
    draws = epoch_draws(manifest.rows, config.data.balance) if train else None
    if train and (draws.total if draws else count) < rows_per_step(config, train=True):
        raise UserError(
            f"{config.data.train.path} has {count} {'key frames' if config.task == 'detection' else 'videos'}, fewer "
            "than a batch takes; lower train.global_batch"
        )
    order = global_order(count, config, epoch, train=True, draws=draws) if train else np.arange(count)
    repeats, rows = np.divmod(order[: videos + videos % 2], count)  # mixed in pairs
    table = manifest.rows.take(rows)
    columns = decode_rows(table, np.ones(len(rows), bool), config, epoch, train, repeats)
    batch = task.collate(columns, table, config, train=train)
    views = views_per_video(config, train)
    shown = SHOW[config.task](batch, table, config, manifest.classes, train=train)
    titles = []
    for clip, label in enumerate(shown.labels):
        row, view = divmod(clip, views)
        video = columns["sample_id"][row] + (f"  view {view}" if views > 1 else "")
        titles.append("    ".join([*([label] if label else []), video, columns["reason"][row]]))
    kind = "training" if train else "validation"
    x = shown.x
    head = (
        f"{config.name}, {kind}, epoch {epoch}: {config.model.name}, {x.shape[2]} frames of {x.shape[4]}x{x.shape[3]}"
    )
    if shown.marks is not None:
        kinds = dict.fromkeys(mark.kind for marks in shown.marks[: videos * views] for mark in marks)
        head += "".join(f"; {COLOURS[kind]}: {kind}" for kind in kinds)
        if config.data.frame_order == "shuffled":
            head += "; frames are shuffled, boxes are those of the key frame"
    try:
        sheet(to_pictures(x, config)[: videos * views], titles[: videos * views], head, out, shown.marks)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know, or too many clips
        raise UserError(f"{out} cannot be written ({error}); see --out") from error


def show_classes(batch: Batch, table: pa.Table, config: Config, classes: Sequence[str], *, train: bool) -> Shown:
    """Clips of recognition: the share of each class."""
    if train:
        x, targets = to_train_input(batch, config, flip_labels(config.augment.flip_classes, classes, len(classes)))
    else:
        x, targets = to_input(batch.clips, config), torch.nn.functional.one_hot(batch.labels, len(classes)).float()
    labels = []
    for of_clip in targets.tolist():
        shares = sorted(((share, name) for share, name in zip(of_clip, classes, strict=True) if share), reverse=True)
        labels.append(" + ".join(name if share == 1 else f"{share:.0%} {name}" for share, name in shares))
    return Shown(x, labels, None)


def show_boxes(batch: Batch, table: pa.Table, config: Config, classes: Sequence[str], *, train: bool) -> Shown:
    """Clips of detection: the boxes of the key frame, each with its actions."""
    boxes = cast(Boxes, batch.boxes)
    if train:
        flipped = flip_labels(config.augment.flip_classes, classes, len(classes))
        x, corners, labels = augment_boxes(batch, config, flipped)
    else:
        x, corners, labels = to_input(batch.clips, config), boxes.corners, batch.labels
    scores, views = table["scores"].to_pylist(), len(x) // len(table)
    marks: list[list[Mark]] = [[] for _ in x]
    for corner, label, clip, number in zip(
        corners.tolist(), labels, boxes.clip.tolist(), boxes.number.tolist(), strict=True
    ):
        named = [classes[i] for i in label.nonzero().flatten().tolist()]
        score = scores[clip // views][number]
        if train:
            kind = TRAINED if named else NEGATIVE
        else:
            kind = TRUTH if math.isnan(score) else SCORED_TRUTH if named else SCORED
        text = ", ".join(named) or ("" if train else f"{score:.2f}")
        marks[clip].append(Mark(tuple(corner), kind, text))
    return Shown(x, [""] * len(x), marks)


SHOW = {"recognition": show_classes, "detection": show_boxes}  # by task


def to_pictures(x: Tensor, config: Config) -> Tensor:
    """Model input ``[B, 3, T, H, W]`` as colours in 0..1, ``[B, T, H, W, 3]``."""
    x = x.permute(0, 2, 3, 4, 1)
    mean, std = map(torch.tensor, NORMALISATIONS[config.data.normalisation])
    if config.data.modality == "rgb_difference":
        return (0.5 + x * std).clamp(0, 1)
    return (x * std + mean).clamp(0, 1)


def sheet(
    clips: Tensor, titles: list[str], head: str, out: Path, marks: Sequence[Sequence[Mark]] | None = None
) -> None:
    """A PNG with a clip a row: its frames side by side, its title above.

    Args:
        clips: as of ``to_pictures``.
        marks: boxes of each clip's key frame, number T / 2, which then stands left of the others, twice as large.
    """
    count, _, height, width = clips.shape[:4]
    strips = side_by_side(clips) if marks is None else with_key_frame(clips)
    line = 0.25  # inches of a title
    high = WIDTH * strips.shape[1] / strips.shape[2]
    total = line + count * (high + line)
    figure = plt.figure(figsize=(WIDTH, total))
    figure.text(0.003, 1 - 0.7 * line / total, head, fontsize=9)
    for row, (strip, title) in enumerate(zip(strips, titles, strict=True)):
        bottom = 1 - (line + (row + 1) * (high + line)) / total
        axis = figure.add_axes((0.003, bottom, 0.997, high / total))
        axis.imshow(strip.numpy(), interpolation="nearest", aspect="auto")
        axis.set_axis_off()
        for mark in marks[row] if marks else ():
            draw_mark(axis, mark, 2 * width, 2 * height)
        figure.text(0.003, bottom + (high + 0.06) / total, title, fontsize=8)
    figure.savefig(out, dpi=100)
    plt.close(figure)


def side_by_side(clips: Tensor, first: int = 0, rows: int = 1) -> Tensor:
    """At most ``COLUMNS`` frames of each clip from frame ``first`` on, in ``rows``: ``[B, height, width, 3]``."""
    shown = clips[:, first :: -(-clips.shape[1] // COLUMNS)]
    gap = max(1, clips.shape[3] // 16)
    missing = -shown.shape[1] % rows
    below = gap if rows > 1 else 0
    shown = torch.nn.functional.pad(shown, (0, 0, 0, gap, 0, below, 0, missing), value=1.0)
    return shown.unflatten(1, (rows, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [B, rows * H, n * W, 3]


def with_key_frame(clips: Tensor) -> Tensor:
    """The key frame of each clip, twice as large, and two rows of frames, of which it is one; as ``side_by_side``."""
    key, gap = clips.shape[1] // 2, max(1, clips.shape[3] // 16)
    large = clips[:, key].repeat_interleave(2, 1).repeat_interleave(2, 2)
    large = torch.nn.functional.pad(large, (0, 0, 0, gap, 0, 2 * gap), value=1.0)
    return torch.cat([large, side_by_side(clips, key % -(-clips.shape[1] // COLUMNS), 2)], 2)


def draw_mark(axis: Axes, mark: Mark, width: int, height: int) -> None:
    """Draw a box and its text on a picture of a width and height, which begins at the axis's top left corner."""
    left, top, right, bottom = np.array(mark.corners) * (width, height, width, height) - 0.5
    colour = COLOURS[mark.kind]
    axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=colour, linewidth=1.2))
    box = {"facecolor": "black", "alpha": 0.6, "pad": 0.8, "linewidth": 0}
    apart = mark.kind == SCORED  # from the text of the truth
    axis.text(
        right if apart else left,
        bottom if apart else top,
        mark.text.replace(", ", "\n"),
        fontsize=6,
        color=colour,
        bbox=box if mark.text else None,
        clip_on=True,
        ha="right" if apart else "left",
        va="bottom" if apart else "top",
    )
