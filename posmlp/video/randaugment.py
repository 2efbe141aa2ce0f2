"""RandAugment (arXiv:1909.13719) for a batch of clips, on their device.

Operations, strengths and probabilities are those of timm's ``rand-m{magnitude}-n{layers}-mstd0.5-inc1``, which MViT
(arXiv:2104.11227) trains with. Results equal Pillow's on the same 8-bit levels, with two differences. Statistics that
an operation reads (a histogram, a mean) come from the whole clip, so all frames change alike. Pixels are always
interpolated bilinearly.

Eight operations map levels through a lookup table, and five resample along an affine map. So a layer takes at most four
passes, each over the clips that drew one of its operations. Sums are over integers and the rest is computed per pixel,
so the result of a clip is exactly the same in any batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

HISTOGRAM_OPERATIONS = ("autocontrast", "equalize", "contrast")  # their tables depend on the clip's histogram
TABLE_OPERATIONS = (*HISTOGRAM_OPERATIONS, "invert", "posterize", "solarize", "solarize_add", "brightness")
AFFINE_OPERATIONS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPERATIONS = (*TABLE_OPERATIONS, *AFFINE_OPERATIONS, "color", "sharpness")
APPLY_PROBABILITY = 0.5  # of an operation that was drawn
MAGNITUDE_STD = 0.5
FILL = 128  # grey, for pixels of a resampled clip that come from outside the frame
LUMA_WEIGHTS = (19595, 38470, 7471)  # of R, G, B in 1/65536 (ITU-R BT.601), as Pillow computes grey


class AugmentOperation(NamedTuple):
    """One operation on one clip.

    ``strength`` is in -1..1. Its sign is the direction of operations that have two (rotate, shear, brightness, ...).
    """

    name: str
    strength: float


def draw_operations(rng: np.random.Generator, layers: int, magnitude: float) -> list[AugmentOperation | None]:
    """Draw the operations of one clip, one per layer; None for a layer that leaves the clip unchanged."""
    operations: list[AugmentOperation | None] = []
    for _ in range(layers):
        name = OPERATIONS[rng.integers(len(OPERATIONS))]
        applied, sign = rng.random() < APPLY_PROBABILITY, -1 if rng.random() < 0.5 else 1
        strength = min(max(rng.normal(magnitude, MAGNITUDE_STD), 0.0), 10.0) / 10
        operations.append(AugmentOperation(name, sign * strength) if applied else None)
    return operations


def randaugment(x: Tensor, operations: Sequence[Sequence[AugmentOperation | None]]) -> Tensor:
    """Apply each clip's operations, in place.

    Args:
        x: uint8 ``[B, 3, T, H, W]``.
        operations: those of each of the B clips, as from ``draw_operations``; the same number for every clip.

    Returns:
        ``x``.
    """
    families: tuple[tuple[tuple[str, ...], Callable[[Tensor, Sequence[AugmentOperation]], Tensor]], ...] = (
        (TABLE_OPERATIONS, apply_tables),
        (AFFINE_OPERATIONS, apply_affine),
        (("color",), adjust_color),
        (("sharpness",), adjust_sharpness),
    )
    for layer in zip(*operations, strict=True):
        for names, function in families:
            drawn = [(i, operation) for i, operation in enumerate(layer) if operation and operation.name in names]
            if drawn:
                index = torch.tensor([i for i, _ in drawn], device=x.device)
                x.index_copy_(0, index, function(x.index_select(0, index), [operation for _, operation in drawn]))
    return x


def enhancement_factor(strength: float) -> float:
    """The factor of an enhancement, 0.1..1.9; 1 changes nothing."""
    return max(0.1, 1 + 0.9 * strength)


def apply_tables(x: Tensor, operations: Sequence[AugmentOperation]) -> Tensor:
    """Map the levels of each channel through a lookup table: uint8 ``[n, 3, T, H, W]`` to the same."""
    shift = 256 * torch.arange(len(x) * 3, dtype=torch.int32, device=x.device)
    index = (x.int() + shift.view(len(x), 3, 1, 1, 1)).flatten()  # into the concatenated tables of all channels
    counts: Sequence[NDArray[np.int64] | None] = [None] * len(x)
    if any(operation.name in HISTOGRAM_OPERATIONS for operation in operations):
        counts = list(torch.bincount(index, minlength=len(x) * 768).view(-1, 3, 256).cpu().numpy())
    built = [lookup_table(operation, count) for operation, count in zip(operations, counts, strict=True)]
    tables = torch.from_numpy(np.stack(built)).to(x.device)  # [n, 3, 256]
    return tables.flatten().index_select(0, index).view_as(x)


def lookup_table(operation: AugmentOperation, counts: NDArray[np.int64] | None) -> NDArray[np.uint8]:
    """The new levels ``[3, 256]`` of one clip; ``counts`` is its histogram ``[3, 256]``, if the operation reads it."""
    level, amount = np.arange(256), abs(operation.strength)
    new: NDArray[np.integer] | NDArray[np.floating]
    match operation.name:
        case "invert":
            new = 255 - level
        case "posterize":  # keep 4 bits, or fewer the stronger it is
            new = level & -(1 << (4 + int(amount * 4)))
        case "solarize":
            new = np.where(level < 256 - int(amount * 256), level, 255 - level)
        case "solarize_add":
            new = np.where(level < 128, level + int(amount * 110), level)
        case "brightness":
            new = level * enhancement_factor(operation.strength)
        case _:
            assert counts is not None
            new = histogram_table(operation, counts)
    return np.broadcast_to(new.clip(0, 255).astype(np.uint8), (3, 256))


def histogram_table(operation: AugmentOperation, counts: NDArray[np.int64]) -> NDArray[np.floating]:
    """``lookup_table`` of the operations that depend on the clip's histogram ``[3, 256]``."""
    level = np.arange(256.0)
    if operation.name == "contrast":  # scales the distance from the mean grey
        mean = int(np.dot(LUMA_WEIGHTS, counts @ level) / (65536 * counts[0].sum()) + 0.5)
        return np.tile(mean + (level - mean) * enhancement_factor(operation.strength), (3, 1))
    new = np.tile(level, (3, 1))
    for channel, count in enumerate(counts):
        present = np.flatnonzero(count)
        low, high = present[0], present[-1]
        if operation.name == "autocontrast" and high > low:
            scale = 255.0 / (high - low)
            new[channel] = level * scale - low * scale
        elif operation.name == "equalize" and (width := (count.sum() - count[high]) // 255):
            new[channel] = (width // 2 + np.cumsum(count) - count) // width
    return new


def apply_affine(x: Tensor, operations: Sequence[AugmentOperation]) -> Tensor:
    """Rotate, shear or translate clips: uint8 ``[n, 3, T, H, W]`` to the same."""
    height, width = x.shape[-2:]
    maps = torch.tensor([affine_map(operation, height, width) for operation in operations], device=x.device)
    a, b, c, d, e, f = maps.view(-1, 6, 1, 1).unbind(1)  # each [n, 1, 1]
    across = torch.arange(width, device=x.device) + 0.5
    down = torch.arange(height, device=x.device).unsqueeze(1) + 0.5
    u, v = a * across + b * down + c, d * across + e * down + f  # where each pixel comes from, [n, H, W]
    grid = torch.stack([u * (2 / width) - 1, v * (2 / height) - 1], -1)
    # One grid serves all frames of a clip, as channels: [n, 3, T, H, W] -> [n, 3*T, H, W]
    moved = F.grid_sample(x.flatten(1, 2).float(), grid, "bilinear", "border", align_corners=False)
    outside = (u < 0) | (u >= width) | (v < 0) | (v >= height)
    return moved.add_(0.5).masked_fill_(outside.unsqueeze(1), FILL).byte().view_as(x)


def affine_map(operation: AugmentOperation, height: int, width: int) -> tuple[float, ...]:
    """Coefficients ``(a, b, c, d, e, f)``: the pixel at (x, y) comes from (a x + b y + c, d x + e y + f)."""
    s = operation.strength
    match operation.name:
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


def adjust_color(x: Tensor, operations: Sequence[AugmentOperation]) -> Tensor:
    """Scale each pixel's distance from its grey: uint8 ``[n, 3, T, H, W]`` to the same."""
    values = x.float()
    red, green, blue = (values[:, i : i + 1] * weight for i, weight in enumerate(LUMA_WEIGHTS))
    grey = red.add_(green).add_(blue).add_(32768).div_(65536).floor_()  # integers below 2**24: exact in float32
    return extrapolate(values, grey, operations)


def adjust_sharpness(x: Tensor, operations: Sequence[AugmentOperation]) -> Tensor:
    """Scale each pixel's distance from the smoothed frame: uint8 ``[n, 3, T, H, W]`` to the same.

    The outermost pixels of a frame are not smoothed and so stay unchanged.
    """
    values = x.float()
    middle = values[..., 1:-1, 1:-1]
    rows = values[..., :-2, :] + values[..., 1:-1, :] + values[..., 2:, :]
    smooth = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]  # 3x3 sum; the centre counts five times, so 13 in all
    smooth = smooth.add_(middle, alpha=4).add_(6.5).div_(13).floor_()
    out = x.clone()
    out[..., 1:-1, 1:-1] = extrapolate(middle, smooth, operations)
    return out


def extrapolate(values: Tensor, base: Tensor, operations: Sequence[AugmentOperation]) -> Tensor:
    """Move from ``base`` towards or past ``values`` by each clip's factor; clip and truncate levels, as Pillow does."""
    factors = torch.tensor([enhancement_factor(operation.strength) for operation in operations], device=values.device)
    return ((values - base).mul_(factors.view(-1, 1, 1, 1, 1)).add_(base)).clamp_(0, 255).byte()
