"""RoIAlign (Mask R-CNN, arXiv:1703.06870), from matrix products alone.

The samples of a box are a grid, and a bilinear weight is a product of two: one along the height, one along the width.
So the average of the samples in each bin is ``A_y @ map @ A_x^T``, with a small matrix for each box and axis.
"""

from __future__ import annotations

import torch
from torch import Tensor


def roi_align(maps: Tensor, boxes: Tensor, box_clip: Tensor, size: int = 7) -> Tensor:
    """Average the map of a box in ``size x size`` bins, with the map's values at the centres of its cells.

    A bin has ``ceil(s / size)`` samples along an axis where the box covers ``s`` cells, the adaptive rule of the
    published detectors (``aligned=True``, ``sampling_ratio=0``). Samples are bilinear; those more than a cell outside
    count as 0. An empty box takes one sample in each bin.

    It reads no value of its arguments, so it can be compiled and exported, and works on the meta device. Gradients flow
    to the maps.

    Args:
        maps: ``[B, C, H, W]``.
        boxes: ``[N, 4]``, x1 y1 x2 y2 as fractions of the picture, at most as large as the picture. They may lie partly
            outside.
        box_clip: int64 ``[N]``, the map of each box.
        size: bins along each axis.

    Returns:
        ``[N, C, size, size]`` in the dtype of the maps.
    """
    height, width = maps.shape[2:]
    boxes = boxes.to(torch.promote_types(maps.dtype, torch.float32))
    x1, y1, x2, y2 = boxes.unbind(1)
    down = bin_weights(y1 * height, y2 * height, height, size).to(maps.dtype)
    across = bin_weights(x1 * width, x2 * width, width, size).to(maps.dtype)
    return down[:, None] @ maps[box_clip] @ across.mT[:, None]


def bin_weights(start: Tensor, end: Tensor, cells: int, size: int) -> Tensor:
    """Weight of each cell of an axis in each bin: ``[N, size, cells]``.

    Args:
        start, end: ``[N]``, of the boxes along the axis, in cells from the map's edge.
    """
    most = -(-cells // size)  # samples in a bin of a box as large as the picture
    length = (end - start)[:, None, None]
    samples = (length / size).ceil().clamp(1, most)
    bins, number = (torch.arange(n, device=start.device) for n in (size, most))
    share = (bins[:, None] + (number + 0.5) / samples) / size  # [N, size, most]: place of a sample in the box
    place = start[:, None, None] + length * share - 0.5  # in cells from the centre of the first
    used = (number < samples) & (place >= -1) & (place <= cells)
    place = place.clamp(0, cells - 1)[..., None]
    weights = (1 - (place - torch.arange(cells, device=start.device)).abs()).clamp(min=0)  # [N, size, most, cells]
    return (weights * used[..., None]).sum(2) / samples
