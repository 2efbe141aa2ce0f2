"""Two well-known video models in plain PyTorch, written from their papers, for ``benchmarks/peers.py``. Not a command.

``VideoSwin`` is Video Swin-T (Liu et al., Video Swin Transformer, 2022), ``R2Plus1D`` is R(2+1)D-18 (Tran et al., A
Closer Look at Spatiotemporal Convolutions, 2018). Both take ``[B, 3, T, H, W]``. Drop path is left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Size = tuple[int, int, int]


def split_windows(x: Tensor, window: Size) -> Tensor:
    """Return ``[B, T, H, W, C]`` as ``[B * windows, tokens, C]``. The sizes must be multiples of the window."""
    (b, t, h, w, c), (wt, wh, ww) = x.shape, window
    x = x.view(b, t // wt, wt, h // wh, wh, w // ww, ww, c).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(-1, wt * wh * ww, c)


def join_windows(x: Tensor, window: Size, shape: torch.Size) -> Tensor:
    """Invert ``split_windows``; ``shape`` is that of its input."""
    (b, t, h, w, c), (wt, wh, ww) = shape, window
    x = x.view(b, t // wt, h // wh, w // ww, wt, wh, ww, c).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(shape)


class WindowAttention(nn.Module):
    """Multi-head attention in (shifted) windows, with a learned bias for each relative position."""

    def __init__(self, dim: int, heads: int, full: Size, grid: Size, shift: bool):
        super().__init__()
        # An axis that one window fills is neither split nor shifted.
        self.window: Size = tuple(min(w, g) for w, g in zip(full, grid, strict=True))  # type: ignore[assignment]
        self.shift = tuple(w // 2 if shift and g > w else 0 for w, g in zip(full, grid, strict=True))
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        spans = [2 * w - 1 for w in full]
        self.table = nn.Parameter(0.02 * torch.randn(spans[0] * spans[1] * spans[2], heads))
        place = torch.stack(torch.meshgrid(*map(torch.arange, self.window), indexing="ij"), -1).view(-1, 3)
        dt, dy, dx = (place[:, None] - place[None] + torch.tensor(full) - 1).unbind(-1)
        self.register_buffer("index", (dt * spans[1] + dy) * spans[2] + dx, persistent=False)
        self.register_buffer("mask", self.shift_mask(grid), persistent=False)

    def shift_mask(self, grid: Size) -> Tensor | None:
        """Return the mask ``[windows, 1, N, N]``: -100 between tokens that are neighbours only because of the roll."""
        if not any(self.shift):
            return None
        region = torch.zeros(grid, dtype=torch.long)
        for axis, (w, s) in enumerate(zip(self.window, self.shift, strict=True)):
            place = torch.arange(grid[axis])
            part = (place >= grid[axis] - w).long() + (place >= grid[axis] - s) if s else 0 * place
            region = 3 * region + part.view([-1 if i == axis else 1 for i in range(3)])
        tokens = split_windows(region[None, ..., None], self.window).squeeze(-1)
        return -100.0 * (tokens[:, None, :, None] != tokens[:, None, None, :]).float()

    def forward(self, x: Tensor) -> Tensor:
        shape, batch = x.shape, x.shape[0]
        if any(self.shift):
            x = x.roll([-s for s in self.shift], (1, 2, 3))
        x = split_windows(x, self.window)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(batch).to(q.dtype))
        x = join_windows(self.proj(x.transpose(1, 2).flatten(2)), self.window, shape)
        return x.roll(self.shift, (1, 2, 3)) if any(self.shift) else x

    def bias(self, batch: int) -> Tensor:
        """Return the bias of the scores, ``[1 or B * windows, heads, N, N]``."""
        bias = self.table[self.index].permute(2, 0, 1)[None]
        if self.mask is None:
            return bias
        return (bias + self.mask)[None].expand(batch, -1, -1, -1, -1).flatten(0, 1)


class SwinBlock(nn.Module):
    """Window attention and a two-layer MLP, each with a LayerNorm before it and a residual."""

    def __init__(self, dim: int, heads: int, window: Size, grid: Size, shift: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, heads, window, grid, shift)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """Merge 2 x 2 tokens of a frame into one token of twice the width."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.proj(self.norm(x))


class VideoSwin(nn.Module):
    """Video Swin-T for clips of one size. The tokens must fill whole windows."""

    def __init__(self, frames: int = 16, size: int = 224, num_classes: int = 400, window: Size = (8, 7, 7)):
        super().__init__()
        dim, grid = 96, (frames // 2, size // 4, size // 4)
        self.patch, self.patch_norm = nn.Conv3d(3, dim, (2, 4, 4), (2, 4, 4)), nn.LayerNorm(dim)
        layers: list[nn.Module] = []
        for depth, heads in zip((2, 2, 6, 2), (3, 6, 12, 24), strict=True):
            if layers:
                layers.append(PatchMerging(dim))
                dim, grid = 2 * dim, (grid[0], grid[1] // 2, grid[2] // 2)
            layers += [SwinBlock(dim, heads, window, grid, shift=i % 2 == 1) for i in range(depth)]
        self.layers, self.norm, self.head = nn.Sequential(*layers), nn.LayerNorm(dim), nn.Linear(dim, num_classes)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.patch_norm(self.patch(clip).permute(0, 2, 3, 4, 1))
        return self.head(self.norm(self.layers(x)).mean((1, 2, 3)))


def factorised_conv(
    dim_in: int, mid: int, dim: int, stride: int = 1, size: int = 3, stride_t: int = 1
) -> nn.Sequential:
    """Return a convolution over space, followed by one over time."""
    return nn.Sequential(
        nn.Conv3d(dim_in, mid, (1, size, size), (1, stride, stride), (0, size // 2, size // 2), bias=False),
        nn.BatchNorm3d(mid),
        nn.ReLU(inplace=True),
        nn.Conv3d(mid, dim, (3, 1, 1), (stride_t, 1, 1), (1, 0, 0), bias=False),
        nn.BatchNorm3d(dim),
    )


class ResidualBlock(nn.Module):
    """Two factorised convolutions with a residual."""

    def __init__(self, dim_in: int, dim: int, stride: int):
        super().__init__()
        mid = 27 * dim_in * dim // (9 * dim_in + 3 * dim)  # as many weights as a 3 x 3 x 3 convolution
        self.conv1 = factorised_conv(dim_in, mid, dim, stride, stride_t=stride)
        self.conv2 = factorised_conv(dim, mid, dim)
        self.skip = nn.Sequential()
        if stride > 1:
            self.skip = nn.Sequential(nn.Conv3d(dim_in, dim, 1, stride, bias=False), nn.BatchNorm3d(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.conv2(F.relu(self.conv1(x))))


class R2Plus1D(nn.Module):
    """R(2+1)D-18."""

    def __init__(self, num_classes: int = 400):
        super().__init__()
        layers: list[nn.Module] = [factorised_conv(3, 45, 64, stride=2, size=7), nn.ReLU(inplace=True)]
        for before, dim in zip((64, 64, 128, 256), (64, 128, 256, 512), strict=True):
            layers += [ResidualBlock(before, dim, 1 if before == dim else 2), ResidualBlock(dim, dim, 1)]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(512, num_classes)

    def forward(self, clip: Tensor) -> Tensor:
        return self.head(self.layers(clip).mean((2, 3, 4)))


def count_torch_macs(model: nn.Module, clip: Tensor) -> int:
    """Return the multiply-accumulates of convolutions and matrix products, including those of attention."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:  # the counter misses fused attention on some devices
        model.eval()(clip)
    return counter.get_total_flops() // 2
