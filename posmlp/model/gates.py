"""The windowed relative-position gate, the one operation that mixes tokens in PosMLP-Video.

    gate(u, v)[m] = (sum_n P[m, n] u[n] + b[m]) * v[m]        P[m, n] = table[offset from token n to token m]

``m`` and ``n`` run over the tokens of a window (t, h, w). Each of S channel groups has a table of its own, with one
entry for each of the (2t-1)(2h-1)(2w-1) offsets; ``b`` is one bias per token. A window of (t, 1, 1) makes the temporal
unit PoTGU, (1, h, w) the spatial unit PoSGU, (t, h, w) the joint unit PoSTGU (arXiv:2407.02934, section 3).

Tokens are held in *window order* and *channels first*, ``[C, B, W, T, N]``: channel, clip, window, time in the window,
place in the window. Every group of channels, every half of a projection and every window is then a contiguous block, so
that gates and linear layers are plain matrix products on views, without a copy.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

Window = tuple[int, int, int]  # tokens along time, height, width


def unfold_offsets(x: Tensor, dim: int, tokens: int) -> Tensor:
    """Turn the axis ``dim`` of relative offsets into (output position, input position).

    The axis has 2n-1 entries, the offsets -(n-1)..n-1. It becomes the output position (``tokens`` long, in place) and a
    new last axis, the input position. ``tokens`` may be less than n: offsets too large for that extent are left out.
    """
    n = (x.shape[dim] + 1) // 2
    x = x.narrow(dim, n - tokens, 2 * tokens - 1)
    return x.unfold(dim, tokens, 1).flip(-1)  # [.., i, .., j] = x[i - j + tokens - 1]


class PositionGate(nn.Module):
    """One gate with its tables and token bias.

    Args:
        groups: number of channel groups S; group s is the s-th contiguous block of channels.
        window: tokens (t, h, w) of a window.

    Attributes:
        table: ``[S, (2t-1)(2h-1)(2w-1)]``, offsets in row-major order (dt, dy, dx), each output minus input position.
        bias: ``[t*h*w]``, row-major.
    """

    def __init__(self, groups: int, window: Window):
        super().__init__()
        self.window = window
        self.table = nn.Parameter(torch.empty(groups, math.prod(2 * n - 1 for n in window)))
        self.bias = nn.Parameter(torch.empty(math.prod(window)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small random tables and a bias of one, so that a gate starts near the identity on ``v`` (as in gMLP).

        The published release leaves its tables at zero, as its initialiser matches no parameter. Starting them at zero
        too would only delay learning: with zero tables no gradient reaches ``u`` in the first steps.
        """
        nn.init.trunc_normal_(self.table, std=0.02)
        nn.init.ones_(self.bias)

    def position_map(self, extent: Window) -> Tensor:
        """Position maps of the first ``extent`` tokens of the window along each axis.

        Returns:
            ``[S, 1, t, t']`` for a temporal window, ``[S, hw, hw']`` for a spatial one (output, input); for a joint
            window the block-Toeplitz form ``[S, hw, 2t-1, hw']`` with the temporal offsets in falling order.
        """
        t, h, w = (min(n, m) for n, m in zip(extent, self.window, strict=True))  # a spatial unit sees each moment alone
        offsets = self.table.view(-1, *(2 * n - 1 for n in self.window))
        if self.window[0] > 1 and self.window[1:] == (1, 1):
            return unfold_offsets(offsets[:, :, 0, 0], 1, t).unsqueeze(1)
        offsets = offsets.narrow(1, self.window[0] - t, 2 * t - 1).flip(1)
        maps = unfold_offsets(unfold_offsets(offsets, 2, h), 3, w)  # [S, 2t-1, h, w, h', w']
        if self.window[0] == 1:
            return maps.reshape(-1, h * w, h * w)
        return maps.permute(0, 2, 3, 1, 4, 5).reshape(-1, h * w, 2 * t - 1, h * w)

    def token_bias(self, extent: Window) -> Tensor:
        """The bias of the first ``extent`` tokens, ``[t or 1, hw or 1]``."""
        t, h, w = extent
        return self.bias.view(self.window)[:t, :h, :w].flatten(1)

    def forward(self, u: Tensor, v: Tensor, extent: Window) -> Tensor:
        """Gate ``v`` by the mixed ``u``, both ``[C, B, W, T, N]`` with T, N the tokens of ``extent``; same shape out.

        Padded tokens must be zero in ``u``.
        """
        maps = self.position_map(extent).to(u.dtype)
        x = by_group(u.contiguous(), maps)
        if maps.ndim == 3:
            mixed = x @ maps.mT
        elif over_time(maps):
            mixed = maps @ x
        else:
            mixed = ToeplitzProduct.apply(maps, x)
        mixed = mixed.view(u.shape)
        return (mixed + self.token_bias(extent).to(mixed.dtype)) * v


def by_group(u: Tensor, maps: Tensor) -> Tensor:
    """``[C, .., T, N]`` as what the maps of each group multiply: ``[S, X, T, N]``, over space ``[S, X, N]``."""
    return u.view(len(maps), -1, *(u.shape[-2:] if maps.ndim == 4 else maps.shape[-1:]))


def over_time(maps: Tensor) -> bool:
    """Whether four-dimensional position maps are of a temporal window, not of a joint one."""
    return maps.shape[1] == 1 and maps.shape[2] == maps.shape[3]


class ToeplitzProduct(torch.autograd.Function):
    """Joint window product from the block-Toeplitz maps, without the full (t*hw) x (t*hw) map.

    All weights of output moment i form a contiguous slice of the maps, so each moment is one strided matrix product.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, u: Tensor) -> Tensor:
        """maps ``[S, hw, 2t-1, hw']``, u ``[S, X, t, hw]`` -> ``[S, X, t, hw]``."""
        ctx.save_for_backward(maps, u)
        return toeplitz_product(maps, u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        maps, u = ctx.saved_tensors
        return toeplitz_backward(maps, u, grad)


def toeplitz_product(maps: Tensor, u: Tensor) -> Tensor:
    """``ToeplitzProduct`` without autograd."""
    if torch.compiler.is_exporting():  # a graph has no writing in place: each would copy the whole
        return torch.stack([u.flatten(2) @ moment_map(maps, i).mT for i in range(u.shape[2])], 2)
    out = torch.empty_like(u, memory_format=torch.contiguous_format)
    for i in range(u.shape[2]):
        out[:, :, i] = u.flatten(2) @ moment_map(maps, i).mT
    return out


def toeplitz_backward(maps: Tensor, u: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of maps and u."""
    grad_maps, grad_u = torch.zeros_like(maps), torch.zeros_like(u, memory_format=torch.contiguous_format)
    t = u.shape[2]
    for i in range(t):
        g = grad[:, :, i]  # [S, X, hw]
        grad_u.flatten(2).baddbmm_(g, moment_map(maps, i))
        grad_maps[:, :, t - 1 - i : 2 * t - 1 - i] += (g.mT @ u.flatten(2)).unflatten(2, (t, -1))
    return grad_maps, grad_u


def moment_map(maps: Tensor, i: int) -> Tensor:
    """Weights of output moment i, ``[S, hw, t*hw']``: a view of the maps ``[S, hw, 2t-1, hw']``."""
    t = (maps.shape[2] + 1) // 2
    return maps[:, :, t - 1 - i : 2 * t - 1 - i].flatten(2)
