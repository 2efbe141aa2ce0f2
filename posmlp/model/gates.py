"""The windowed relative-position gate, the one operation that mixes tokens in PosMLP-Video.

    gate(u, v)[m] = (sum_n P[m, n] u[n] + b[m]) * v[m]        P[m, n] = table[offset from token n to token m]

``m`` and ``n`` run over the tokens of a window (t, h, w). Each of S channel groups has its own table, with one entry
for each of the (2t-1)(2h-1)(2w-1) offsets; ``b`` is one bias per token. A window of (t, 1, 1) makes the temporal unit
PoTGU, (1, h, w) the spatial unit PoSGU, (t, h, w) the joint unit PoSTGU (arXiv:2407.02934, section 3).

Tokens are stored in *window order* and *channels first*, ``[C, B, W, T, N]``: channel, clip, window, time step in the
window, position in the frame (row-major). Each channel group, each half of a projection and each window is then a
contiguous block, so gates and linear layers are plain matrix products on views, without a copy. (``posmlp.model.cpu``
uses the same axes in another memory order.)

The *extent* of an input is the number of tokens (t, h, w) that one window of it has: those of the stage's window or,
along an axis where the whole input is smaller, the input's size. A gate then uses the window's first tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posmlp.model import gpu
from posmlp.model.spec import Window

INIT_STD = 0.02  # deviation of fresh position tables, and of fresh linear layers
# Bytes of the maps of a joint window that exist at once: what fits a CPU's caches, and a small share of a GPU's memory.
JOINT_MAP_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}


class ExpandTable(torch.autograd.Function):
    """``expand_table`` with its gradient."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.like = table.shape, table.dtype
        return expand_table(table, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (*_, table_height, table_width), dtype = ctx.like
        return sum_by_offset(grad, table_height, table_width).to(dtype), None


def expand_table(table: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Expand tables to maps: ``[.., 2h-1, 2w-1]`` -> ``[.., hw, hw']`` in ``dtype``, written into ``out`` if given.

    The entry of output (y, x) and input (y', x') is the table's entry of the offsets y - y' and x - x'. Whole rows are
    copied at a time.
    """
    h, w = ((n + 1) // 2 for n in table.shape[-2:])
    flipped = table.to(dtype).flip(-1, -2)  # entry (y', x') of output (y, x) is at (h-1-y + y', w-1-x + x')
    rows = torch.stack([flipped.narrow(-1, w - 1 - x, w) for x in range(w)], -3)  # [.., w, 2h-1, w']
    if out is None:
        maps = torch.stack([rows.narrow(-2, h - 1 - y, h) for y in range(h)], -4)  # [.., h, w, h', w']
        return maps.view(*table.shape[:-2], h * w, h * w)
    for y in range(h):
        out.view(*table.shape[:-2], h, w, h, w).select(-4, y).copy_(rows.narrow(-2, h - 1 - y, h))
    return out


def sum_by_offset(maps: Tensor, table_height: int, table_width: int) -> Tensor:
    """Sum the entries of maps that have equal offsets, in fp32 or better: the adjoint of ``expand_table``.

    Args:
        maps: ``[.., hw, hw']``.
        table_height, table_width: 2h-1 and 2w-1.

    Returns:
        ``[.., 2h-1, 2w-1]``.
    """
    batch, h, w = maps.shape[:-2], (table_height + 1) // 2, (table_width + 1) // 2
    maps = maps.reshape(*batch, h, w, h, w)
    rows = maps.new_zeros(*batch, w, table_height, w, dtype=torch.promote_types(maps.dtype, torch.float32))
    for y in range(h):
        rows.narrow(-2, h - 1 - y, h).add_(maps.select(-4, y))
    flipped = rows.new_zeros(*batch, table_height, table_width)
    for x in range(w):
        flipped.narrow(-1, w - 1 - x, w).add_(rows.select(-3, x))
    return flipped.flip(-1, -2)


def map_window(window: Window, extent: Window) -> Window:
    """The gate's window, widened so that it mixes both height and width if it mixes either.

    The widened axis has the length of ``extent``.
    """
    t, h, w = window
    if (h == 1) == (w == 1):
        return window
    return t, max(h, extent[1]), max(w, extent[2])


class PositionGate(nn.Module):
    """One gate with its tables and token bias.

    Args:
        groups: number of channel groups S; group s is the s-th contiguous block of channels.
        window: tokens (t, h, w) of a window; methods get the extent of the input at hand.

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

        The published release leaves its tables at zero, as its initialiser matches no parameter. Starting at zero here
        as well would only delay learning: with zero tables no gradient reaches ``u`` in the first steps.
        """
        nn.init.trunc_normal_(self.table, std=INIT_STD)
        nn.init.ones_(self.bias)

    def map_parameters(self, extent: Window) -> tuple[Tensor, Tensor, Window]:
        """Table, bias and window of the gate, widened so that it mixes both height and width if it mixes either.

        In a wider window the table is 0 at offsets along the axis that the gate does not mix, and the bias is constant
        along it (``map_window``).
        """
        window = map_window(self.window, extent)
        if window == self.window:
            return self.table, self.bias, window
        (t, h, w), (_, height, width) = self.window, window
        narrow = self.table.view(-1, 2 * t - 1, 2 * h - 1, 2 * w - 1)
        table = F.pad(narrow, (width - w, width - w, height - h, height - h)).flatten(1)
        return table, self.bias.view(self.window).expand(window).flatten(), window

    def mixing_weights(self, extent: Window, dtype: torch.dtype) -> Tensor:
        """What mixes the tokens of an extent: position maps or, for a joint window, Fourier components of the table.

        Returns:
            For a window without time, the maps ``[S, hw, hw']`` (output, input) in ``dtype``. For a window of time
            alone, the maps ``[S, 1, t, t']`` in ``dtype``. For a joint window, whose maps would be large, the Fourier
            components of the table over the temporal offsets, ``[2t-1, S, 1, 2h-1, 2w-1]`` in the table's dtype (see
            ``joint_product``).
        """
        table, _, window = self.map_parameters(extent)
        sides = [min(n, m) for n, m in zip(extent, window, strict=True)]  # 1 along an axis that the gate does not mix
        entries = table.view(-1, *(2 * n - 1 for n in window))
        for axis, (side, full) in enumerate(zip(sides, window, strict=True), start=1):
            entries = entries.narrow(axis, full - side, 2 * side - 1)  # a smaller extent never uses the other offsets
        if window[0] == 1:
            return ExpandTable.apply(entries.squeeze(1), dtype)
        if window[1:] == (1, 1):
            return ExpandTable.apply(entries.transpose(1, 3), dtype)
        _, _, offset_dft = dft_matrices(sides[0], entries)
        components = torch.tensordot(offset_dft, entries, ([1], [1]))  # [2t-1, S, 2h-1, 2w-1]
        return components.unsqueeze(2)

    def token_bias(self, extent: Window) -> Tensor:
        """The bias of the first ``extent`` tokens, ``[t or 1, hw or 1]``."""
        _, bias, window = self.map_parameters(extent)
        t, h, w = extent
        return bias.view(window)[:t, :h, :w].flatten(1)

    def forward(self, u: Tensor, v: Tensor, extent: Window) -> Tensor:
        """Gate ``v`` by the mixed ``u``, both ``[C, B, W, T, N]`` with T, N the tokens of ``extent``; same shape out.

        Padded tokens must be zero in ``u``.
        """
        if gpu.supports(u, v):
            return gpu.gate(u, v, *self.map_parameters(extent), extent)
        weights = self.mixing_weights(extent, u.dtype)
        if weights.ndim == 3:
            mixed = u.contiguous().view(len(weights), -1, weights.shape[-1]) @ weights.mT
        else:
            x = u.contiguous().view(self.table.shape[0], -1, *u.shape[-2:])
            mixed = weights @ x if weights.ndim == 4 else JointProduct.apply(weights, x)
        mixed = mixed.contiguous().view(u.shape)  # only the joint product returns a strided tensor
        return (mixed + self.token_bias(extent).to(mixed.dtype)) * v


def dft_matrices(t: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Real matrices of a discrete Fourier transform over time, in the dtype and on the device of ``like``.

    The transform has 2t-1 points, long enough for a circular correlation to equal a plain one. A component is the real
    or imaginary part of one frequency, in this order: the constant, the real parts of frequencies 1..t-1, their
    imaginary parts.

    Returns:
        dft: ``[2t-1, t]``, time steps -> components.
        idft: ``[t, 2t-1]``, components -> time steps.
        offset_dft: ``[2t-1, 2t-1]``, temporal offsets -(t-1)..t-1 -> components.
    """
    count = 2 * t - 1
    angle = 2 * math.pi / count * torch.arange(t, dtype=torch.float64)[:, None]  # of each frequency, per time step

    def components(steps: Tensor) -> Tensor:
        return torch.cat([torch.cos(angle * steps), -torch.sin(angle[1:] * steps)])

    inverse = components(torch.arange(t)).T * 2 / count
    inverse[:, 0] /= 2
    matrices = components(torch.arange(t)), inverse, components(torch.arange(1 - t, t))
    dft, idft, offset_dft = (each.to(like) for each in matrices)
    return dft, idft, offset_dft


class JointProduct(torch.autograd.Function):
    """``joint_product`` with its gradients."""

    @staticmethod
    def forward(ctx: Any, components: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(components, u)
        return joint_product(components, u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        components, u = ctx.saved_tensors
        return joint_backward(components, u, grad)


def joint_product(components: Tensor, u: Tensor) -> Tensor:
    """Product with the map of a joint window by a Fourier transform over time.

    It takes 4t-3 spatial products, instead of the t^2 that one product per pair of time steps would take. Over time a
    joint map is Toeplitz, so the transform makes it diagonal: each frequency of the input is mixed in space by the same
    frequency of the table. The transforms are small matrix products, for any t. The spatial maps of the frequencies are
    made for a few groups at a time, because all of them together would be larger than everything else.

    Args:
        components: ``[2t-1, S, 1, 2h-1, 2w-1]``, from ``PositionGate.mixing_weights``.
        u: ``[S, X, t, hw']``; X are the channels of a group times clips times windows.

    Returns:
        ``[S, X, t, hw]``, strided.
    """
    t = u.shape[2]
    dft, idft, _ = dft_matrices(t, u)
    constant, waves = apply_dft(dft, u)
    constants, mixed = [], []
    for group_slice, maps in group_maps(components, u):
        constants.append(constant[group_slice] @ maps[0].mT)
        mixed.append(complex_sum(waves[:, group_slice] @ maps[1:t].mT, waves[:, group_slice] @ maps[t:].mT))
    return apply_idft(idft, torch.cat(constants), torch.cat(mixed, 1))


def joint_backward(components: Tensor, u: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of components and u, where ``grad`` is the gradient of ``joint_product``'s result."""
    t = u.shape[2]
    dft, idft, _ = dft_matrices(t, u)
    constant, waves = apply_dft(dft, u)
    d_constant, d_re = apply_dft(idft.mT, grad)  # d_re: gradient of the products with the maps' real parts
    d_im = torch.cat([d_re[:, :, d_re.shape[2] // 2 :], -d_re[:, :, : d_re.shape[2] // 2]], 2)
    d_components = torch.empty_like(components)
    for group_slice, maps in group_maps(components, u):
        left = (d_constant[None, group_slice], d_re[:, group_slice], d_im[:, group_slice])
        right = (constant[None, group_slice], waves[:, group_slice], waves[:, group_slice])
        d_maps = torch.cat([a.mT @ b for a, b in zip(left, right, strict=True)])
        d_components[:, group_slice, 0] = sum_by_offset(d_maps, *components.shape[-2:]).to(components.dtype)
        d_constant[group_slice] = d_constant[group_slice] @ maps[0]
        d_re[:, group_slice] = d_re[:, group_slice] @ maps[1:t] + d_im[:, group_slice] @ maps[t:]
    return d_components, apply_idft(dft.mT, d_constant, d_re)


def group_maps(components: Tensor, u: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield chunks of channel groups: a slice of the groups and their maps ``[2t-1, chunk, hw, hw']``.

    All chunks use the same memory, so a chunk's maps are valid until the next one.
    """
    if torch.compiler.is_exporting():  # an exported graph cannot reuse memory
        yield slice(None), expand_table(components[:, :, 0], u.dtype)
        return
    count, positions = len(components), u.shape[-1]
    most_bytes = JOINT_MAP_BYTES.get(u.device.type, JOINT_MAP_BYTES["cuda"])
    groups_per_chunk = max(1, most_bytes // (count * positions**2 * u.element_size()))
    memory = u.new_empty(count, min(groups_per_chunk, len(u)), positions, positions)
    for first in range(0, len(u), groups_per_chunk):
        group_slice = slice(first, min(first + groups_per_chunk, len(u)))
        chunk = components[:, group_slice, 0]
        yield group_slice, expand_table(chunk, u.dtype, memory if chunk.shape[1] == memory.shape[1] else None)


def complex_sum(by_re: Tensor, by_im: Tensor) -> Tensor:
    """Combine products with real and with imaginary parts to complex ones; rows: X real parts, then X imaginary."""
    (a, b), (c, d) = (each.unflatten(2, (2, -1)).unbind(2) for each in (by_re, by_im))
    return torch.cat([a - d, b + c], 2)


def apply_dft(matrix: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Transform ``u`` ``[S, X, t, N]`` over time by ``matrix`` ``[2t-1, t]``.

    Returns:
        The constant, ``[S, X, N]``, and the other frequencies, ``[t-1, S, 2X, N]`` (real parts, then imaginary parts).
    """
    (s, x, t, n) = u.shape
    transformed = (matrix @ u.permute(2, 0, 1, 3).reshape(t, -1)).view(-1, s, x, n)
    return transformed[0], transformed[1:].view(2, t - 1, s, x, n).permute(1, 2, 0, 3, 4).reshape(t - 1, s, 2 * x, n)


def apply_idft(matrix: Tensor, constant: Tensor, waves: Tensor) -> Tensor:
    """Transform the result of ``apply_dft`` by ``matrix`` ``[t, 2t-1]`` to time steps ``[S, X, t, N]``, strided."""
    (s, x, n), t = constant.shape, len(matrix)
    waves = waves.view(t - 1, s, 2, x, n).permute(2, 0, 1, 3, 4).reshape(2 * t - 2, s * x * n)
    steps = matrix @ torch.cat([constant.reshape(1, -1), waves])
    return steps.view(t, s, x, n).permute(1, 2, 0, 3)
