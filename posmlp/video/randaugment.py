"""RandAugment (arXiv:1909.13719) for a batch of clips, on their device.

The operations, their strengths and their chances are those of timm's ``rand-m{magnitude}-n{layers}-mstd0.5-inc1``,
with which MViT (arXiv:2104.11227) trains, and the results are Pillow's on the same 8-bit levels. Two things differ:
what an operation reads from its image (a histogram, a mean) it reads from the whole clip, so that all frames change
alike; and pixels are always interpolated bilinearly.

Eight operations look every level up in a table, and five resample along an affine map. So a layer takes at most four
passes, each over the clips that drew it. Sums are of whole numbers and everything else is done a pixel at a time, which
makes a clip's result exactly the same in any batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

MEASURED = ("autocontrast", "equalize", "contrast")  # tables that depend on the clip's histogram
TABLES = (*MEASURED, "invert", "posterize", "solarize", "solarize_add", "brightness")
MAPS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPERATIONS = (*TABLES, *MAPS, "color", "sharpness")
CHANCE = 0.5  # that a drawn operation is applied
SPREAD = 0.5  # standard deviation of the magnitude
FILL = 128  # grey where a resampled clip shows what lay outside
LUMA = (19595, 38470, 7471)  # ITU-R BT.601 in 1/65536, as Pillow computes grey


class Step(NamedTuple):
    """One operation on one clip; its strength is in -1..1, and the sign is that of what goes both ways."""

    name: str
    strength: float


def draw_steps(rng: np.random.Generator, layers: int, magnitude: float) -> list[Step | None]:
    """The operations of one clip, one a layer, None where the layer leaves the clip as it is."""
    steps: list[Step | None] = []
    for _ in range(layers):
        name = OPERATIONS[rng.integers(len(OPERATIONS))]
        applied, sign = rng.random() < CHANCE, -1 if rng.random() < 0.5 else 1
        strength = min(max(rng.normal(magnitude, SPREAD), 0.0), 10.0) / 10
        steps.append(Step(name, sign * strength) if applied else None)
    return steps


def randaugment(x: Tensor, plans: Sequence[Sequence[Step | None]]) -> Tensor:
    """Apply each clip's steps, in place.

    Args:
        x: uint8 ``[B, 3, T, H, W]``.
        plans: the steps of each of the B clips, equally many.

    Returns:
        ``x``.
    """
    for layer in zip(*plans, strict=True):
        for family, function in ((TABLES, look_up), (MAPS, resample), (("color",), color), (("sharpness",), sharpness)):
            chosen = [(i, step) for i, step in enumerate(layer) if step is not None and step.name in family]
            if chosen:
                index = torch.tensor([i for i, _ in chosen], device=x.device)
                x.index_copy_(0, index, function(x.index_select(0, index), [step for _, step in chosen]))
    return x


def factor(strength: float) -> float:
    """What an enhancement multiplies by, 0.1..1.9; 1 changes nothing."""
    return max(0.1, 1 + 0.9 * strength)


def look_up(x: Tensor, steps: Sequence[Step]) -> Tensor:
    """Every level of a clip's channel becomes another: uint8 ``[n, 3, T, H, W]`` to the same."""
    shift = 256 * torch.arange(len(x) * 3, dtype=torch.int32, device=x.device)
    index = (x.int() + shift.view(len(x), 3, 1, 1, 1)).flatten()  # into the channels' tables, one after another
    counts: Sequence[NDArray[np.int64] | None] = [None] * len(x)
    if any(step.name in MEASURED for step in steps):
        counts = list(torch.bincount(index, minlength=len(x) * 768).view(-1, 3, 256).cpu().numpy())
    made = [table(step, count) for step, count in zip(steps, counts, strict=True)]
    tables = torch.from_numpy(np.stack(made)).to(x.device)  # [n, 3, 256]
    return tables.flatten().index_select(0, index).view_as(x)


def table(step: Step, counts: NDArray[np.int64] | None) -> NDArray[np.uint8]:
    """The new levels ``[3, 256]`` of one clip; ``counts`` is its histogram ``[3, 256]``, if the operation reads it."""
    level, amount = np.arange(256), abs(step.strength)
    new: NDArray[np.integer] | NDArray[np.floating]
    match step.name:
        case "invert":
            new = 255 - level
        case "posterize":  # keep 4 bits, down to none
            new = level & -(1 << (4 + int(amount * 4)))
        case "solarize":
            new = np.where(level < 256 - int(amount * 256), level, 255 - level)
        case "solarize_add":
            new = np.where(level < 128, level + int(amount * 110), level)
        case "brightness":
            new = level * factor(step.strength)
        case _:
            assert counts is not None
            new = measured_table(step, counts)
    return np.broadcast_to(new.clip(0, 255).astype(np.uint8), (3, 256))


def measured_table(step: Step, counts: NDArray[np.int64]) -> NDArray[np.floating]:
    """``table`` of the operations that depend on the clip's histogram ``[3, 256]``."""
    level = np.arange(256.0)
    if step.name == "contrast":  # away from the mean grey
        mean = int(np.dot(LUMA, counts @ level) / (65536 * counts[0].sum()) + 0.5)
        return np.tile(mean + (level - mean) * factor(step.strength), (3, 1))
    new = np.tile(level, (3, 1))
    for channel, count in enumerate(counts):
        present = np.flatnonzero(count)
        low, high = present[0], present[-1]
        if step.name == "autocontrast" and high > low:
            scale = 255.0 / (high - low)
            new[channel] = level * scale - low * scale
        elif step.name == "equalize" and (width := (count.sum() - count[high]) // 255):
            new[channel] = (width // 2 + np.cumsum(count) - count) // width
    return new


def resample(x: Tensor, steps: Sequence[Step]) -> Tensor:
    """Turn, shear or move clips: uint8 ``[n, 3, T, H, W]`` to the same."""
    height, width = x.shape[-2:]
    maps = torch.tensor([affine(step, height, width) for step in steps], device=x.device)
    a, b, c, d, e, f = maps.view(-1, 6, 1, 1).unbind(1)  # each [n, 1, 1]
    across = torch.arange(width, device=x.device) + 0.5
    down = torch.arange(height, device=x.device).unsqueeze(1) + 0.5
    u, v = a * across + b * down + c, d * across + e * down + f  # where each pixel comes from, [n, H, W]
    grid = torch.stack([u * (2 / width) - 1, v * (2 / height) - 1], -1)
    # One grid serves all frames of a clip, as channels: [n, 3, T, H, W] -> [n, 3*T, H, W]
    moved = F.grid_sample(x.flatten(1, 2).float(), grid, "bilinear", "border", align_corners=False)
    outside = (u < 0) | (u >= width) | (v < 0) | (v >= height)
    return moved.add_(0.5).masked_fill_(outside.unsqueeze(1), FILL).byte().view_as(x)


def affine(step: Step, height: int, width: int) -> tuple[float, ...]:
    """``(a, b, c, d, e, f)``: the pixel at (x, y) comes from (a x + b y + c, d x + e y + f)."""
    s = step.strength
    match step.name:
        case "rotate":  # up to 30 degrees about the centre
            sin, cos = math.sin(math.radians(30 * s)), math.cos(math.radians(30 * s))
            x, y = width / 2, height / 2
            return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y
        case "shear_x":
            return 1.0, 0.3 * s, 0.0, 0.0, 1.0, 0.0
        case "shear_y":
            return 1.0, 0.0, 0.0, 0.3 * s, 1.0, 0.0
        case "translate_x":
            return 1.0, 0.0, 0.45 * s * width, 0.0, 1.0, 0.0
        case _:
            return 1.0, 0.0, 0.0, 0.0, 1.0, 0.45 * s * height


def color(x: Tensor, steps: Sequence[Step]) -> Tensor:
    """Away from the pixel's grey: uint8 ``[n, 3, T, H, W]`` to the same."""
    values = x.float()
    red, green, blue = (values[:, i : i + 1] * weight for i, weight in enumerate(LUMA))
    grey = red.add_(green).add_(blue).add_(32768).div_(65536).floor_()  # whole numbers below 2**24: exact
    return away(values, grey, steps)


def sharpness(x: Tensor, steps: Sequence[Step]) -> Tensor:
    """Away from the smoothed frame, which keeps its outermost pixels: uint8 ``[n, 3, T, H, W]`` to the same."""
    values = x.float()
    middle = values[..., 1:-1, 1:-1]
    rows = values[..., :-2, :] + values[..., 1:-1, :] + values[..., 2:, :]
    smooth = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]  # 3x3, then the middle four times more: 13 in all
    smooth = smooth.add_(middle, alpha=4).add_(6.5).div_(13).floor_()
    out = x.clone()
    out[..., 1:-1, 1:-1] = away(middle, smooth, steps)
    return out


def away(values: Tensor, base: Tensor, steps: Sequence[Step]) -> Tensor:
    """From ``base`` towards or past ``values``, by each clip's factor; levels are cut off, as Pillow does."""
    factors = torch.tensor([factor(step.strength) for step in steps], device=values.device).view(-1, 1, 1, 1, 1)
    return ((values - base).mul_(factors).add_(base)).clamp_(0, 255).byte()
