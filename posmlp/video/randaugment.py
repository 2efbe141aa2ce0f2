"""RandAugment (arXiv:1909.13719) for a batch of clips, on their device.

Operations, strengths and probabilities are those of timm's ``rand-m{magnitude}-n{layers}-mstd0.5-inc1``, which MViT
(arXiv:2104.11227) trains with. Results equal Pillow's on the same 8-bit levels, with two differences. Statistics that
an operation reads (a histogram, a mean) come from the whole clip, so all frames change alike. Pixels are always
interpolated bilinearly.

The host draws each clip's operations and plans passes: what one function does to the clips of a layer that drew one of
its operations. Eight operations map levels through a lookup table, and five resample along an affine map, so a layer
takes at most seven passes. The host never reads a result back: histograms and the tables from them stay on the device.
Sums are over integers and the rest is computed per pixel, so the result of a clip is exactly the same in any batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

AFFINE_OPERATIONS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
TABLE_OPERATIONS = ("invert", "posterize", "solarize", "solarize_add", "brightness")  # whatever the clip is
HISTOGRAM_OPERATIONS = ("autocontrast", "equalize", "contrast")  # their tables depend on the clip
OPERATIONS = (*HISTOGRAM_OPERATIONS, *TABLE_OPERATIONS, *AFFINE_OPERATIONS, "color", "sharpness")
APPLY_PROBABILITY = 0.5  # of an operation that was drawn
MAGNITUDE_STD = 0.5
NUMBERS_PER_LAYER = 4  # random numbers of a clip: operation, whether applied, direction, strength
FILL = 128  # grey, for pixels of a resampled clip that come from outside the frame
LUMA_WEIGHTS = (19595, 38470, 7471)  # of R, G, B in 1/65536 (ITU-R BT.601), as Pillow computes grey

A = TypeVar("A")


class AugmentOperation(NamedTuple):
    """One operation on one clip.

    ``strength`` is in -1..1. Its sign is the direction of operations that have two (rotate, shear, brightness, ...).
    """

    name: str
    strength: float


class Pass(NamedTuple, Generic[A]):
    """What a function does to some clips of a layer; with arrays where it is planned, with tensors on the device.

    Attributes:
        function: takes uint8 ``[n, 3, T, H, W]`` and ``values``, returns the changed clips.
        clips: int64 ``[n]``, which clips of the batch.
        values: ``[n, ...]``, of each clip's operation: a table, an affine map or a factor.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    clips: A
    values: A


def draw_operations(numbers: Tensor, magnitude: float) -> list[list[AugmentOperation | None]]:
    """Draw the operations of each clip, one per layer; None for a layer that leaves the clip unchanged.

    Args:
        numbers: float64 ``[B, layers, NUMBERS_PER_LAYER]``, uniform in [0, 1), on the CPU.
    """
    which, applied, direction, quantile = numbers.unbind(-1)
    strength = (magnitude + MAGNITUDE_STD * torch.special.ndtri(quantile)).clamp_(0, 10) / 10
    index = torch.where(applied < APPLY_PROBABILITY, (which * len(OPERATIONS)).long(), -1).tolist()
    strengths = torch.where(direction < 0.5, -strength, strength).tolist()
    return [
        [AugmentOperation(OPERATIONS[i], s) if i >= 0 else None for i, s in zip(*clip, strict=True)]
        for clip in zip(index, strengths, strict=True)
    ]


def plan_passes(
    operations: Sequence[Sequence[AugmentOperation | None]], height: int, width: int
) -> list[Pass[NDArray[np.generic]]]:
    """The passes of all layers, in order.

    Args:
        operations: those of each clip, as from ``draw_operations``; the same number for every clip.
        height, width: of the frames, in pixels.
    """
    passes = []
    for layer in zip(*operations, strict=True):
        drawn: dict[Callable[[Tensor, Tensor], Tensor], dict[int, NDArray[np.generic]]] = {}
        for clip, operation in enumerate(layer):
            if operation:
                function, value = function_and_value(operation, height, width)
                drawn.setdefault(function, {})[clip] = value
        passes += [
            Pass(function, np.array(list(values)), np.stack(list(values.values())))
            for function, values in drawn.items()
        ]
    return passes


def function_and_value(
    operation: AugmentOperation, height: int, width: int
) -> tuple[Callable[[Tensor, Tensor], Tensor], NDArray[np.generic]]:
    """The function of an operation's pass, and the operation's part of the pass's ``values``."""
    name, factor = operation.name, enhancement_factor(operation.strength)
    if name in TABLE_OPERATIONS:
        return apply_tables, lookup_table(operation)
    if name in AFFINE_OPERATIONS:
        return apply_affine, np.array(affine_map(operation, height, width), np.float32)
    match name:
        case "autocontrast":
            return autocontrast, np.empty(0)
        case "equalize":
            return equalize, np.empty(0)
        case "contrast":
            return adjust_contrast, np.array(factor)
        case "color":
            return adjust_color, np.array(factor, np.float32)
        case _:
            return adjust_sharpness, np.array(factor, np.float32)


def randaugment(x: Tensor, passes: Sequence[Pass[Tensor]]) -> None:
    """Apply passes to uint8 ``[B, 3, T, H, W]``, in place; their arrays are tensors on the device of ``x``."""
    for function, clips, values in passes:
        x.index_copy_(0, clips, function(x.index_select(0, clips), values))


def enhancement_factor(strength: float) -> float:
    """The factor of an enhancement, 0.1..1.9; 1 changes nothing."""
    return max(0.1, 1 + 0.9 * strength)


def lookup_table(operation: AugmentOperation) -> NDArray[np.uint8]:
    """The new levels ``[256]`` of an operation that changes all channels of any clip alike."""
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
        case _:  # brightness
            new = level * enhancement_factor(operation.strength)
    return new.clip(0, 255).astype(np.uint8)


def apply_tables(x: Tensor, tables: Tensor) -> Tensor:
    """Map the levels of all channels through each clip's table, uint8 ``[n, 256]``."""
    return map_levels(x, tables.unsqueeze(1).expand(-1, 3, -1))


def map_levels(x: Tensor, tables: Tensor) -> Tensor:
    """Map the levels of each channel through its table, uint8 ``[n, 3, 256]``."""
    shift = torch.arange(0, 256 * 3 * len(x), 256, dtype=torch.int32, device=x.device)
    index = x.int().add_(shift.view(len(x), 3, 1, 1, 1))  # into the concatenated tables of all channels
    return tables.flatten().index_select(0, index.flatten()).view_as(x)


def histogram(x: Tensor) -> Tensor:
    """Pixels of each channel by level: uint8 ``[n, 3, T, H, W]`` to int64 ``[n, 3, 256]``.

    Not by ``torch.bincount``, for which the host reads the largest level. Each frame has counters of its own, as adding
    to few counters is slow on GPUs.
    """
    channels = x.shape[:3]
    shift = torch.arange(0, 256 * channels.numel(), 256, dtype=torch.int32, device=x.device)
    index = x.int().add_(shift.view(*channels, 1, 1)).flatten()
    counts = torch.zeros(256 * channels.numel(), dtype=torch.int32, device=x.device)
    one = torch.ones((), dtype=torch.int32, device=x.device)
    return counts.index_add_(0, index, one.expand(len(index))).view(*channels, 256).sum(2)


def level_range(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest level of each channel: int64 ``[n, 3, 1]`` each, of ``[n, 3, 256]``."""
    present, level = counts > 0, torch.arange(256, device=counts.device)
    low = level.where(present, 255).amin(-1, keepdim=True)
    return low, (level * present).amax(-1, keepdim=True)


def autocontrast(x: Tensor, _: Tensor) -> Tensor:
    """Stretch the levels of each channel to 0..255."""
    low, high = level_range(histogram(x))
    level = torch.arange(256, dtype=torch.float64, device=x.device)
    span = (high - low).clamp(min=1).double()
    scale = torch.full_like(span, 255.0).div_(span)  # 255 / span would multiply by a rounded reciprocal
    new = (level * scale - low * scale).where(high > low, level)
    return map_levels(x, new.clamp_(0, 255).byte())


def equalize(x: Tensor, _: Tensor) -> Tensor:
    """Make the histogram of each channel as flat as its levels allow."""
    counts = histogram(x)
    _, high = level_range(counts)
    width = (counts.sum(-1, keepdim=True) - counts.gather(-1, high)) // 255
    new = (width // 2 + counts.cumsum(-1) - counts) // width.clamp(min=1)
    level = torch.arange(256, device=x.device)
    return map_levels(x, new.where(width > 0, level).clamp_(0, 255).byte())


def adjust_contrast(x: Tensor, factors: Tensor) -> Tensor:
    """Scale the distance from the clip's mean grey by each clip's factor, float64 ``[n]``."""
    level = torch.arange(256, device=x.device)
    red, green, blue = (histogram(x) * level).sum(-1).unbind(1)
    total = red * LUMA_WEIGHTS[0] + green * LUMA_WEIGHTS[1] + blue * LUMA_WEIGHTS[2]
    unit = 65536 * x[0, 0].numel()
    mean = ((total + unit // 2) // unit).unsqueeze(1)
    new = mean + (level - mean) * factors.unsqueeze(1)
    return apply_tables(x, new.clamp_(0, 255).byte())


def apply_affine(x: Tensor, maps: Tensor) -> Tensor:
    """Rotate, shear or translate each clip along its map, float32 ``[n, 6]`` (``affine_map``)."""
    height, width = x.shape[-2:]
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


def adjust_color(x: Tensor, factors: Tensor) -> Tensor:
    """Scale each pixel's distance from its grey by each clip's factor, float32 ``[n]``."""
    values = x.float()
    red, green, blue = (values[:, i : i + 1] * weight for i, weight in enumerate(LUMA_WEIGHTS))
    grey = red.add_(green).add_(blue).add_(32768).div_(65536).floor_()  # integers below 2**24: exact in float32
    return extrapolate(values, grey, factors)


def adjust_sharpness(x: Tensor, factors: Tensor) -> Tensor:
    """Scale each pixel's distance from the smoothed frame by each clip's factor, float32 ``[n]``.

    The outermost pixels of a frame are not smoothed and so stay unchanged.
    """
    values = x.float()
    middle = values[..., 1:-1, 1:-1]
    rows = values[..., :-2, :] + values[..., 1:-1, :] + values[..., 2:, :]
    smooth = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]  # 3x3 sum; the centre counts five times, so 13 in all
    smooth = smooth.add_(middle, alpha=4).add_(6.5).div_(13).floor_()
    out = x.clone()
    out[..., 1:-1, 1:-1] = extrapolate(middle, smooth, factors)
    return out


def extrapolate(values: Tensor, base: Tensor, factors: Tensor) -> Tensor:
    """Move from ``base`` towards or past ``values`` by each clip's factor; clip and truncate levels, as Pillow does."""
    return ((values - base).mul_(factors.view(-1, 1, 1, 1, 1)).add_(base)).clamp_(0, 255).byte()
