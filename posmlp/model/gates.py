"""The windowed relative-position gate, the one operation that mixes tokens in PosMLP-Video.

    gate(u, v)[m] = (sum_n P[m, n] u[n] + b[m]) * v[m]        P[m, n] = table[offset from token n to token m]

``m`` and ``n`` run over the tokens of a window (t, h, w). Each of S channel groups has a table of its own, with one
entry for each of the (2t-1)(2h-1)(2w-1) offsets; ``b`` is one bias per token. A window of (t, 1, 1) makes the temporal
unit PoTGU, (1, h, w) the spatial unit PoSGU, (t, h, w) the joint unit PoSTGU (arXiv:2407.02934, section 3).

Tokens are held in *window order* and *channels first*, ``[C, B, W, T, N]``: channel, clip, window, time in the window,
place in the window. Every group of channels, every half of a projection and every window is then a contiguous block, so
that gates and linear layers are plain matrix products on views, without a copy. (``posmlp.model.cpu`` has the same axes
in another order in memory.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from posmlp.model import gpu
from posmlp.model.spec import Window

MAPS_AT_ONCE = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}  # bytes of a joint window's maps: what caches hold, or memory


class Unfold(torch.autograd.Function):
    """``unfold`` with its gradient."""

    @staticmethod
    def forward(ctx: Any, offsets: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.like = offsets.shape, offsets.dtype
        return unfold(offsets, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (*_, height, width), dtype = ctx.like
        return fold(grad, height, width).to(dtype), None


def unfold(offsets: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``[.., 2h-1, 2w-1]`` -> ``[.., hw, hw']`` in ``dtype``; the entry of output (y, x) and input (y', x') is that of
    the offsets y - y' and x - x'. By copies of whole rows; into ``out`` if given.
    """
    h, w = ((n + 1) // 2 for n in offsets.shape[-2:])
    falling = offsets.to(dtype).flip(-1, -2)  # entry y', x' of output (y, x) is that at h-1-y + y', w-1-x + x'
    rows = torch.stack([falling.narrow(-1, w - 1 - x, w) for x in range(w)], -3)  # [.., w, 2h-1, w']
    if out is None:
        maps = torch.stack([rows.narrow(-2, h - 1 - y, h) for y in range(h)], -4)  # [.., h, w, h', w']
        return maps.view(*offsets.shape[:-2], h * w, h * w)
    for y in range(h):
        out.view(*offsets.shape[:-2], h, w, h, w).select(-4, y).copy_(rows.narrow(-2, h - 1 - y, h))
    return out


def fold(maps: Tensor, height: int, width: int) -> Tensor:
    """Sums of the entries ``[.., hw, hw']`` of equal offset, ``[.., 2h-1, 2w-1]``, in fp32 or better."""
    batch, h, w = maps.shape[:-2], (height + 1) // 2, (width + 1) // 2
    maps = maps.reshape(*batch, h, w, h, w)
    rows = maps.new_zeros(*batch, w, height, w, dtype=torch.promote_types(maps.dtype, torch.float32))
    for y in range(h):
        rows.narrow(-2, h - 1 - y, h).add_(maps.select(-4, y))
    falling = rows.new_zeros(*batch, height, width)
    for x in range(w):
        falling.narrow(-1, w - 1 - x, w).add_(rows.select(-3, x))
    return falling.flip(-1, -2)


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

    def position_map(self, extent: Window, dtype: torch.dtype) -> Tensor:
        """Position maps of the first ``extent`` tokens of the window along each axis.

        Returns:
            In ``dtype``, ``[S, hw, hw']`` for a spatial window (output, input), ``[S, 1, t, t']`` for a temporal one.
            For a joint window, whose maps would be large, ``[2t-1, S, 1, 2h-1, 2w-1]`` in the table's type: the waves
            of the temporal offsets, see ``joint_product``.
        """
        sides = [min(n, m) for n, m in zip(extent, self.window, strict=True)]  # a spatial unit sees each moment alone
        offsets = self.table.view(-1, *(2 * n - 1 for n in self.window))
        for axis, (side, full) in enumerate(zip(sides, self.window, strict=True), start=1):
            offsets = offsets.narrow(axis, full - side, 2 * side - 1)  # a smaller extent has no use for the others
        if self.window[0] == 1:
            return Unfold.apply(offsets.squeeze(1), dtype)
        if self.window[1:] == (1, 1):
            return Unfold.apply(offsets.transpose(1, 3), dtype)
        waves = torch.tensordot(wave_matrices(sides[0], offsets)[2], offsets, ([1], [1]))  # [2t-1, S, 2h-1, 2w-1]
        return waves.unsqueeze(2)

    def token_bias(self, extent: Window) -> Tensor:
        """The bias of the first ``extent`` tokens, ``[t or 1, hw or 1]``."""
        t, h, w = extent
        return self.bias.view(self.window)[:t, :h, :w].flatten(1)

    def forward(self, u: Tensor, v: Tensor, extent: Window) -> Tensor:
        """Gate ``v`` by the mixed ``u``, both ``[C, B, W, T, N]`` with T, N the tokens of ``extent``; same shape out.

        Padded tokens must be zero in ``u``.
        """
        if gpu.serves(u, v):
            return gpu.gate(u, v, self.table, self.bias, self.window, extent)
        maps = self.position_map(extent, u.dtype)
        if maps.ndim == 3:
            mixed = u.contiguous().view(len(maps), -1, maps.shape[-1]) @ maps.mT
        else:
            x = u.contiguous().view(self.table.shape[0], -1, *u.shape[-2:])
            mixed = maps @ x if maps.ndim == 4 else JointProduct.apply(maps, x)
        mixed = mixed.contiguous().view(u.shape)  # strided only where joint
        return (mixed + self.token_bias(extent).to(mixed.dtype)) * v


def wave_matrices(t: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What turns t moments into waves ``[2t-1, t]``, waves into moments ``[t, 2t-1]``, offsets into waves.

    A wave is a real or imaginary part of the discrete Fourier transform over 2t-1 moments, long enough for a circular
    correlation to be a plain one. Order: the constant, the real parts of frequencies 1..t-1, their imaginary parts. The
    last matrix is ``[2t-1, 2t-1]``, for offsets -(t-1)..t-1.
    """
    count = 2 * t - 1
    turn = 2 * math.pi / count * torch.arange(t, dtype=torch.float64)[:, None]  # of each frequency

    def waves(moments: Tensor) -> Tensor:
        return torch.cat([torch.cos(turn * moments), -torch.sin(turn[1:] * moments)])

    back = waves(torch.arange(t)).T * 2 / count
    back[:, 0] /= 2
    found = waves(torch.arange(t)), back, waves(torch.arange(1 - t, t))
    a, b, c = (each.to(like) for each in found)
    return a, b, c


class JointProduct(torch.autograd.Function):
    """``joint_product`` with its gradients."""

    @staticmethod
    def forward(ctx: Any, offsets: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(offsets, u)
        return joint_product(offsets, u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        offsets, u = ctx.saved_tensors
        return joint_backward(offsets, u, grad)


def joint_product(offsets: Tensor, u: Tensor) -> Tensor:
    """Joint window product, wave by wave: (4t-3) spatial products in place of the t^2 of each moment with each.

    Over time a joint map is Toeplitz, so the Fourier transform makes it diagonal: each frequency of the input is mixed
    in space by that of the table. The transforms are small matrix products, for any t. The spatial maps of the
    frequencies are made for a few groups at a time, as together they would be larger than all else.

    Args:
        offsets: ``[2t-1, S, 1, 2h-1, 2w-1]``, as of ``PositionGate.position_map``.
        u: ``[S, X, t, hw']``.

    Returns:
        ``[S, X, t, hw]``, strided.
    """
    t = u.shape[2]
    there, back, _ = wave_matrices(t, u)
    constant, waves = to_waves(there, u)
    constants, mixed = [], []
    for some, maps in maps_of_groups(offsets, u):
        constants.append(constant[some] @ maps[0].mT)
        mixed.append(complex_sum(waves[:, some] @ maps[1:t].mT, waves[:, some] @ maps[t:].mT))
    return from_waves(back, torch.cat(constants), torch.cat(mixed, 1))


def joint_backward(offsets: Tensor, u: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of offsets and u, where ``grad`` is that of ``joint_product``."""
    t = u.shape[2]
    there, back, _ = wave_matrices(t, u)
    constant, waves = to_waves(there, u)
    d_constant, d_re = to_waves(back.mT, grad)  # d_re: of what was multiplied with the real parts
    d_im = torch.cat([d_re[:, :, d_re.shape[2] // 2 :], -d_re[:, :, : d_re.shape[2] // 2]], 2)
    d_offsets = torch.empty_like(offsets)
    for some, maps in maps_of_groups(offsets, u):
        left = (d_constant[None, some], d_re[:, some], d_im[:, some])
        right = (constant[None, some], waves[:, some], waves[:, some])
        d_maps = torch.cat([a.mT @ b for a, b in zip(left, right, strict=True)])
        d_offsets[:, some, 0] = fold(d_maps, *offsets.shape[-2:]).to(offsets.dtype)
        d_constant[some] = d_constant[some] @ maps[0]
        d_re[:, some] = d_re[:, some] @ maps[1:t] + d_im[:, some] @ maps[t:]
    return d_offsets, from_waves(there.mT, d_constant, d_re)


def maps_of_groups(offsets: Tensor, u: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some groups at a time, and their maps ``[2t-1, some, hw, hw']``, all in the same memory."""
    if torch.compiler.is_exporting():  # a graph has no memory to use again
        yield slice(None), unfold(offsets[:, :, 0], u.dtype)
        return
    waves, places = len(offsets), u.shape[-1]
    many = max(1, MAPS_AT_ONCE.get(u.device.type, MAPS_AT_ONCE["cuda"]) // (waves * places**2 * u.element_size()))
    memory = u.new_empty(waves, min(many, len(u)), places, places)
    for first in range(0, len(u), many):
        some = slice(first, min(first + many, len(u)))
        part = offsets[:, some, 0]
        yield some, unfold(part, u.dtype, memory if part.shape[1] == memory.shape[1] else None)


def complex_sum(by_re: Tensor, by_im: Tensor) -> Tensor:
    """Products with the real and with the imaginary parts as complex ones; rows are X real parts, then X imaginary."""
    (a, b), (c, d) = (each.unflatten(2, (2, -1)).unbind(2) for each in (by_re, by_im))
    return torch.cat([a - d, b + c], 2)


def to_waves(matrix: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """``[S, X, t, N]`` times ``[2t-1, t]``: the constant ``[S, X, N]``, the others ``[t-1, S, 2X, N]``."""
    (s, x, t, n) = u.shape
    waves = (matrix @ u.permute(2, 0, 1, 3).reshape(t, -1)).view(-1, s, x, n)
    return waves[0], waves[1:].view(2, t - 1, s, x, n).permute(1, 2, 0, 3, 4).reshape(t - 1, s, 2 * x, n)


def from_waves(matrix: Tensor, constant: Tensor, waves: Tensor) -> Tensor:
    """The waves of ``to_waves`` times ``[t, 2t-1]``, ``[S, X, t, N]``, strided."""
    (s, x, n), t = constant.shape, len(matrix)
    waves = waves.view(t - 1, s, 2, x, n).permute(2, 0, 1, 3, 4).reshape(2 * t - 2, s * x * n)
    moments = matrix @ torch.cat([constant.reshape(1, -1), waves])
    return moments.view(t, s, x, n).permute(1, 2, 0, 3)
