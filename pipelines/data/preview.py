"""A contact sheet of clips as the model will see them: sampled, cropped, augmented, mixed."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from pipelines.data.loader import decode_rows, global_order, rows_per_step
from posmlp.config import Config
from posmlp.errors import UserError
from posmlp.tasks import task_of
from posmlp.video.augment import NORMALISATIONS, flip_labels, to_input, to_train_input
from posmlp.video.clip import views_per_video
from posmlp.video.draws import epoch_draws

matplotlib.use("Agg")


WIDTH = 10.0  # inches of the sheet
COLUMNS = 16  # pictures in a row; longer clips show every second, third, ... frame


def preview(config: Config, out: Path, *, train: bool, epoch: int, videos: int) -> None:
    """Draw the first ``videos`` of an epoch, one clip a row.

    Pixels are decoded, augmented and mixed by the code and the random numbers of a run; differences of frames
    (``data.modality``) are shown around grey. A bad video shows its reason.

    Raises:
        ManifestError: the data set's list is wrong.
        UserError: ``out`` cannot be written.
    """
    task = task_of(config)
    known = None if train else task.training_classes(config)
    manifest = task.read_split(config, "train" if train else "val", known)
    count = len(manifest.rows)
    draws = epoch_draws(manifest.rows, config.data.balance) if train else None
    if train and (draws.total if draws else count) < rows_per_step(config, train=True):
        raise UserError(
            f"{config.data.train.path} has {count} videos, fewer than a batch takes; lower train.global_batch"
        )
    order = global_order(count, config, epoch, train=True, draws=draws) if train else np.arange(count)
    repeats, rows = np.divmod(order[: videos + videos % 2], count)  # mixed in pairs
    columns = decode_rows(manifest.rows.take(rows), np.ones(len(rows), bool), config, epoch, train, repeats)
    batch = task.collate(columns, manifest.rows.take(rows), config, train=train)
    views = views_per_video(config, train)
    classes = manifest.classes
    if train:
        x, targets = to_train_input(batch, config, flip_labels(config.augment.flip_classes, classes, len(classes)))
    else:
        x, targets = to_input(batch.clips, config), torch.nn.functional.one_hot(batch.labels, len(classes)).float()
    titles = []
    for clip in range(len(x)):
        row, view = divmod(clip, views)
        shares = [(share, name) for share, name in zip(targets[clip].tolist(), classes, strict=True) if share]
        label = " + ".join(name if share == 1 else f"{share:.0%} {name}" for share, name in sorted(shares)[::-1])
        video = columns["sample_id"][row] + (f"  view {view}" if views > 1 else "")
        titles.append(f"{label}    {video}    {columns['reason'][row]}")
    kind = "training" if train else "validation"
    head = (
        f"{config.name}, {kind}, epoch {epoch}: {config.model.name}, {x.shape[2]} frames of {x.shape[4]}x{x.shape[3]}"
    )
    try:
        sheet(to_pictures(x, config)[: videos * views], titles[: videos * views], head, out)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know, or too many clips
        raise UserError(f"{out} cannot be written ({error}); see --out") from error


def to_pictures(x: Tensor, config: Config) -> Tensor:
    """Model input ``[B, 3, T, H, W]`` as colours in 0..1, ``[B, T, H, W, 3]``."""
    x = x.permute(0, 2, 3, 4, 1)
    mean, std = map(torch.tensor, NORMALISATIONS[config.data.normalisation])
    if config.data.modality == "rgb_difference":
        return (0.5 + x * std).clamp(0, 1)
    return (x * std + mean).clamp(0, 1)


def sheet(clips: Tensor, titles: list[str], head: str, out: Path) -> None:
    """A PNG with a clip a row: its frames side by side, its title above."""
    count, frames, height, width = clips.shape[:4]
    shown = clips[:, :: -(-frames // COLUMNS)]
    gap = max(1, width // 16)
    strips = (
        torch.nn.functional.pad(shown, (0, 0, 0, gap), value=1.0).transpose(1, 2).flatten(2, 3)
    )  # [B, H, T*(W+gap), 3]
    line = 0.25  # inches of a title
    high = WIDTH * height / strips.shape[2]
    total = line + count * (high + line)
    figure = plt.figure(figsize=(WIDTH, total))
    figure.text(0.003, 1 - 0.7 * line / total, head, fontsize=9)
    for row, (strip, title) in enumerate(zip(strips, titles, strict=True)):
        bottom = 1 - (line + (row + 1) * (high + line)) / total
        axis = figure.add_axes((0.003, bottom, 0.997, high / total))
        axis.imshow(strip.numpy(), interpolation="nearest", aspect="auto")
        axis.set_axis_off()
        figure.text(0.003, bottom + (high + 0.06) / total, title, fontsize=8)
    figure.savefig(out, dpi=100)
    plt.close(figure)
