"""PosMLP-Video as a plain PyTorch implementation: channels last, windows split in every unit, gates as einsum.

The baseline of ``benchmarks/model.py``, and an independent reference of the whole model in the tests; not a command.
``PlainModel(model)`` shares the parameters of a ``PosMLPVideo``, and none of its arithmetic. The sizes must be
multiples of the windows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posmlp.model.backbone import Block, PosMLPVideo


def position_index(window: tuple[int, int, int]) -> Tensor:
    """Return ``[N, N]``: the table row of the offset from each input token (axis 1) to each output token (axis 0)."""
    t, h, w = window
    place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in window), indexing="ij"), -1).view(-1, 3)
    dt, dy, dx = (place[:, None] - place[None]).unbind(-1)
    return ((dt + t - 1) * (2 * h - 1) + dy + h - 1) * (2 * w - 1) + dx + w - 1


class PlainUnit(nn.Module):
    """A unit on ``[B, T, H, W, C]``: LayerNorm, fc1, GELU, split windows, einsum gate, join windows, fc2."""

    def __init__(self, unit: nn.Module):
        super().__init__()
        self.norm, self.fc1, self.fc2 = unit.norm, unit.fc1, unit.fc2
        self.table, self.bias, self.window = unit.gate.table, unit.gate.bias, unit.gate.window
        self.register_buffer("index", position_index(self.window), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        u, v = F.gelu(self.fc1(self.norm(x))).chunk(2, -1)
        maps = self.table[:, self.index]  # [S, N, N]
        u = self.split_windows(u)  # [B, windows, N, C]
        u = u.view(*u.shape[:-1], maps.shape[0], -1)
        mixed = torch.einsum("smn,bwnsv->bwmsv", maps, u).flatten(-2) + self.bias[:, None]
        return self.fc2(self.join_windows(mixed, v.shape) * v)

    def split_windows(self, x: Tensor) -> Tensor:
        """Return ``[B, T, H, W, C]`` as ``[B, windows, N, C]``."""
        (b, t, h, w, c), (tt, wh, ww) = x.shape, self.window
        x = x.view(b, t // tt, tt, h // wh, wh, w // ww, ww, c).permute(0, 1, 3, 5, 2, 4, 6, 7)
        return x.reshape(b, -1, tt * wh * ww, c)

    def join_windows(self, x: Tensor, shape: torch.Size) -> Tensor:
        """Invert ``split_windows``; ``shape`` is that of its input."""
        (b, t, h, w, c), (tt, wh, ww) = shape, self.window
        x = x.view(b, t // tt, h // wh, w // ww, tt, wh, ww, c).permute(0, 1, 4, 2, 5, 3, 6, 7)
        return x.reshape(shape)


class PlainBlock(nn.Module):
    """A ``Block`` on ``[B, T, H, W, C]``: residual steps of units."""

    def __init__(self, block: Block):
        super().__init__()
        self.steps = nn.ModuleList(nn.ModuleList(PlainUnit(block.units[u]) for u in step) for step in block.steps)

    def forward(self, x: Tensor) -> Tensor:
        for units in self.steps:
            x = x + sum(unit(x) for unit in units)
        return x


class PlainModel(nn.Module):
    """The same function of ``[B, 3, T, H, W]`` as the ``PosMLPVideo`` whose parameters it shares, to logits."""

    def __init__(self, model: PosMLPVideo):
        super().__init__()
        self.stem, self.norm, self.head = model.stem, model.norm, model.head
        self.downsamples = nn.ModuleList(stage.downsample or nn.Identity() for stage in model.stages)
        self.stages = nn.ModuleList(nn.Sequential(*map(PlainBlock, stage.blocks)) for stage in model.stages)

    def forward(self, clip: Tensor) -> Tensor:
        stem = self.stem
        x = stem.norm2(stem.proj2(F.gelu(stem.norm1(stem.proj1(clip)))))
        for i, (downsample, blocks) in enumerate(zip(self.downsamples, self.stages, strict=True)):
            x = downsample.norm(downsample.proj(x).permute(0, 2, 3, 4, 1)) if i else x.permute(0, 2, 3, 4, 1)
            x = blocks(x).permute(0, 4, 1, 2, 3)
        return self.head(self.norm(x.flatten(2).mT).mean(1))
