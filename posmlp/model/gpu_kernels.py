"""Triton kernels of the gate on CUDA devices, and their launches; ``gpu.py`` makes operators of them.

The kernels treat all kinds of window alike: as a *line* of L tokens that mix, ``inner`` elements apart in memory. In
``[C, B, W, T, N]`` the lines of a spatial window are its time steps (L = N, inner 1), those of a joint window are the
windows (L = T * N, inner 1), and those of a temporal window are the positions (L = T, inner N). The lines of a group
are the columns of a matrix ``X [L, columns]``, where token n of column j is element
``j // inner * (L * inner) + n * inner + j % inner``. The gate is ``(P X + b) * v``.

P is gathered from the table, tile by tile, and never stored. A token at (t, y, x) has the code
``(t (2h-1) + y) (2w-1) + x`` for a window (t, h, w), so the offset between two tokens is the difference of their codes.

Memory traffic, where u has E elements of e bytes: forward 3Ee (u, v, result). Backward 5Ee for lines of up to
``SHORT`` tokens (u, v, gradient; gradients of u and v) and 9Ee for longer ones, which need one kernel for each of three
gradients. The backward pass computes P X again: to keep it would cost Ee to write and Ee to read in place of u, the
same traffic, plus the memory of one more u for every gate. Tiles of the same lines run next to each other, so that they
share data in the L2 cache.

The shapes alone determine how sums over columns are split into parts. The parts are added in order, without atomics, so
results are the same from run to run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

SHORT = 64  # most tokens of a line that the backward pass handles as one tile
PROGRAMS = 512  # target number of programs, over all groups and tiles, that share a sum over columns


class Lines(NamedTuple):
    """Layout of the lines: compile-time constants of the kernels.

    Attributes:
        L: tokens of a line.
        PLANE, WIDTH: tokens of one time step of a line, and of one row in it.
        INNER: elements from one token to the next.
        WIN_T, WIN_H, WIN_W: the window (t, h, w) to which table and bias belong.
    """

    L: int
    PLANE: int
    WIDTH: int
    INNER: int
    WIN_T: int
    WIN_H: int
    WIN_W: int


def find_lines(window: tuple[int, ...], extent: tuple[int, ...]) -> Lines:
    """The lines of a gate with ``window`` on windows of ``extent`` tokens."""
    t, h, w = (min(n, m) for n, m in zip(extent, window, strict=True))
    if window[1:] == (1, 1):  # one row of time steps, each N elements after the one before
        return Lines(t, t, t, extent[1] * extent[2], 1, 1, window[0])
    return Lines(t * h * w, h * w, w, 1, *window)


@triton.jit
def token_code(
    token, L: tl.constexpr, PLANE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Index of a token in a box of planes with ROWS x COLS tokens each; past the line's end, that of the last token."""
    token = tl.minimum(token, L - 1)
    return (token // PLANE * ROWS + token % PLANE // WIDTH) * COLS + token % WIDTH


@triton.jit
def group_table(table, group, WIN_T: tl.constexpr, WIN_H: tl.constexpr, WIN_W: tl.constexpr):
    """Pointer to the entry of offset zero in a group's table."""
    middle: tl.constexpr = ((WIN_T - 1) * (2 * WIN_H - 1) + WIN_H - 1) * (2 * WIN_W - 1) + WIN_W - 1
    return table + group * (2 * middle + 1) + middle


@triton.jit
def columns(first, rows, group, L: tl.constexpr, INNER: tl.constexpr, BJ: tl.constexpr):
    """For BJ columns of a group: element index of the first token, and whether the column exists."""
    j = first + tl.arange(0, BJ)
    row = j // INNER  # compare row, not j: the compiler then knows which neighbours are valid together
    return (group.to(tl.int64) * rows + row) * (L * INNER) + j % INNER, row < rows


@triton.jit(do_not_specialize=["rows"])
def mix(
    u,
    v,
    table,
    bias,
    out,
    rows,
    L: tl.constexpr,
    PLANE: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    WIN_T: tl.constexpr,
    WIN_H: tl.constexpr,
    WIN_W: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BJ: tl.constexpr,
):
    """Compute out = (P u + bias) * v for a tile of BM tokens and BJ columns.

    With the gradient of out as v, the result is the gradient of v.
    """
    tiles: tl.constexpr = (L + BM - 1) // BM
    group = tl.program_id(1)
    start, valid = columns(tl.program_id(0) // tiles * BJ, rows, group, L, INNER, BJ)
    m = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    entries = group_table(table, group, WIN_T, WIN_H, WIN_W) + token_code(
        m, L, PLANE, WIDTH, 2 * WIN_H - 1, 2 * WIN_W - 1
    )
    mixed = tl.zeros((BM, BJ), tl.float32)
    for first in range(0, L, BN):
        n = first + tl.arange(0, BN)
        x = tl.load(u + start[None, :] + n[:, None] * INNER, (n < L)[:, None] & valid[None, :], 0)
        p = tl.load(entries[:, None] - token_code(n, L, PLANE, WIDTH, 2 * WIN_H - 1, 2 * WIN_W - 1)[None, :])
        mixed = tl.dot(p.to(x.dtype), x, mixed, input_precision="ieee")
    mixed += tl.load(bias + token_code(m, L, PLANE, WIDTH, WIN_H, WIN_W)).to(tl.float32)[:, None]
    at, inside = start[None, :] + m[:, None] * INNER, (m < L)[:, None] & valid[None, :]
    tl.store(out + at, mixed * tl.load(v + at, inside, 0).to(tl.float32), inside)


@triton.jit(do_not_specialize=["rows"])
def unmix(
    v,
    grad,
    table,
    d_u,
    d_bias,
    rows,
    L: tl.constexpr,
    PLANE: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    WIN_T: tl.constexpr,
    WIN_H: tl.constexpr,
    WIN_W: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BJ: tl.constexpr,
):
    """Compute d_u = P^T (grad * v) for a tile as in ``mix``; the first tile of a line also sums the bias' gradient.

    d_bias, the sum over the tile's columns, is ``[groups, tiles of columns, L]``.
    """
    tiles: tl.constexpr = (L + BM - 1) // BM
    tile, part, group = tl.program_id(0) % tiles, tl.program_id(0) // tiles, tl.program_id(1)
    start, valid = columns(part * BJ, rows, group, L, INNER, BJ)
    m = tile * BM + tl.arange(0, BM)
    entries = group_table(table, group, WIN_T, WIN_H, WIN_W) - token_code(
        m, L, PLANE, WIDTH, 2 * WIN_H - 1, 2 * WIN_W - 1
    )
    d_bias += (group * tl.cdiv(rows * INNER, BJ) + part).to(tl.int64) * L
    total = tl.zeros((BM, BJ), tl.float32)
    for first in range(0, L, BN):
        n = first + tl.arange(0, BN)
        at, inside = start[None, :] + n[:, None] * INNER, (n < L)[:, None] & valid[None, :]
        y = tl.load(v + at, inside, 0)
        d_mixed = y.to(tl.float32) * tl.load(grad + at, inside, 0).to(tl.float32)
        p = tl.load(entries[:, None] + token_code(n, L, PLANE, WIDTH, 2 * WIN_H - 1, 2 * WIN_W - 1)[None, :])
        total = tl.dot(p.to(y.dtype), d_mixed.to(y.dtype), total, input_precision="ieee")
        if tile == 0:
            tl.store(d_bias + n, tl.sum(d_mixed, 1), n < L)
    tl.store(d_u + start[None, :] + m[:, None] * INNER, total, (m < L)[:, None] & valid[None, :])


@triton.jit(do_not_specialize=["rows", "parts"])
def correlate(
    u,
    v,
    grad,
    pairs,
    rows,
    parts,
    L: tl.constexpr,
    PLANE: tl.constexpr,
    INNER: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BJ: tl.constexpr,
):
    """Gradients of token pairs: a tile of BM x BN positions of a plane, one shift in time, one part of the columns.

    pairs is ``[parts, groups, shifts, PLANE (of the output), PLANE (of the input)]``, with the 2F - 1 shifts of F time
    steps in rising order: pairs of tokens with equal shift share an entry of the table for all F time steps.
    """
    planes: tl.constexpr = L // PLANE
    tiles: tl.constexpr = (PLANE + BN - 1) // BN
    part, tile = tl.program_id(0) % parts, tl.program_id(0) // parts
    group, shift = tl.program_id(2), tl.program_id(1) - (planes - 1)
    m = tile // tiles * BM + tl.arange(0, BM)
    n = tile % tiles * BN + tl.arange(0, BN)
    overlap = planes - tl.abs(shift)  # time steps that have a partner at this shift
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(part * BJ, rows * overlap * INNER, parts * BJ):
        j = first + tl.arange(0, BJ)
        row, plane = j // INNER // overlap, j // INNER % overlap
        valid, start = row < rows, (group.to(tl.int64) * rows + row) * (L * INNER) + j % INNER
        to = start + (plane + tl.maximum(shift, 0)) * (PLANE * INNER)
        of = start + (plane + tl.maximum(-shift, 0)) * (PLANE * INNER)
        x = tl.load(u + of[:, None] + n[None, :] * INNER, (n < PLANE)[None, :] & valid[:, None], 0)
        at, inside = to[None, :] + m[:, None] * INNER, (m < PLANE)[:, None] & valid[None, :]
        d_mixed = tl.load(v + at, inside, 0).to(tl.float32) * tl.load(grad + at, inside, 0).to(tl.float32)
        total = tl.dot(d_mixed.to(x.dtype), x, total, input_precision="ieee")
    pairs += ((part * tl.num_programs(2) + group) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * PLANE * PLANE
    inside = (m < PLANE)[:, None] & (n < PLANE)[None, :]
    tl.store(pairs + m[:, None] * PLANE + n[None, :], total, inside)


@triton.jit(do_not_specialize=["rows"])
def unmix_short(
    u,
    v,
    grad,
    table,
    bias,
    d_u,
    d_v,
    pairs,
    d_bias,
    rows,
    L: tl.constexpr,
    PLANE: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    WIN_T: tl.constexpr,
    WIN_H: tl.constexpr,
    WIN_W: tl.constexpr,
    BM: tl.constexpr,
    BJ: tl.constexpr,
):
    """All gradients of lines that fit one tile; each program handles one part of a group's columns.

    pairs is ``[parts, groups, L (of the output), L (of the input)]``, d_bias ``[parts, groups, L]``.
    """
    part, group = tl.program_id(0), tl.program_id(1)
    n = tl.arange(0, BM)
    code = token_code(n, L, PLANE, WIDTH, 2 * WIN_H - 1, 2 * WIN_W - 1)
    entries = group_table(table, group, WIN_T, WIN_H, WIN_W)
    p = tl.load(entries + code[:, None] - code[None, :]).to(u.dtype.element_ty)
    p_transposed = tl.load(entries + code[None, :] - code[:, None]).to(u.dtype.element_ty)
    b = tl.load(bias + token_code(n, L, PLANE, WIDTH, WIN_H, WIN_W)).to(tl.float32)
    total, total_bias = tl.zeros((BM, BM), tl.float32), tl.zeros((BM,), tl.float32)
    for first in range(part * BJ, rows * INNER, tl.num_programs(0) * BJ):
        start, valid = columns(first, rows, group, L, INNER, BJ)
        at, inside = start[None, :] + n[:, None] * INNER, (n < L)[:, None] & valid[None, :]
        x, g = tl.load(u + at, inside, 0), tl.load(grad + at, inside, 0).to(tl.float32)
        d_mixed = tl.load(v + at, inside, 0).to(tl.float32) * g
        total_bias += tl.sum(d_mixed, 1)
        d_mixed = d_mixed.to(x.dtype)
        tl.store(d_v + at, (tl.dot(p, x, input_precision="ieee") + b[:, None]) * g, inside)
        tl.store(d_u + at, tl.dot(p_transposed, d_mixed, input_precision="ieee"), inside)
        total = tl.dot(d_mixed, tl.trans(x), total, input_precision="ieee")
    part = (part * tl.num_programs(1) + group).to(tl.int64)
    tl.store(pairs + part * L * L + n[:, None] * L + n[None, :], total, (n < L)[:, None] & (n < L)[None, :])
    tl.store(d_bias + part * L + n, total_bias, n < L)


@triton.jit(do_not_specialize=["parts"])
def fold(
    pairs,
    d_table,
    parts,
    L: tl.constexpr,
    PLANE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIN_T: tl.constexpr,
    WIN_H: tl.constexpr,
    WIN_W: tl.constexpr,
    BM: tl.constexpr,
    BO: tl.constexpr,
):
    """Gradient of BO table entries of a group: the sums of ``pairs`` (see ``correlate``) over equal offsets."""
    planes: tl.constexpr = L // PLANE
    height: tl.constexpr = PLANE // WIDTH
    sides: tl.constexpr = 2 * WIN_W - 1
    table_plane: tl.constexpr = (2 * WIN_H - 1) * sides
    entries: tl.constexpr = (2 * WIN_T - 1) * table_plane
    group, groups = tl.program_id(1), tl.num_programs(1)
    entry = tl.program_id(0) * BO + tl.arange(0, BO)
    shift = entry // table_plane - (WIN_T - planes)  # index along the shifts of pairs
    down, right = entry % table_plane // sides - (WIN_H - 1), entry % sides - (WIN_W - 1)
    known = (shift >= 0) & (shift < 2 * planes - 1) & (entry < entries)
    total = tl.zeros((BO,), tl.float32)
    for step in range(0, parts * tl.cdiv(PLANE, BM)):
        part, m = step // tl.cdiv(PLANE, BM), step % tl.cdiv(PLANE, BM) * BM + tl.arange(0, BM)
        y, x = m[:, None] // WIDTH - down[None, :], m[:, None] % WIDTH - right[None, :]  # of the input's token
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < WIDTH) & (m < PLANE)[:, None] & known[None, :]
        at = (part * groups + group).to(tl.int64) * (2 * planes - 1) + shift
        total += tl.sum(tl.load(pairs + (at[None, :] * PLANE + m[:, None]) * PLANE + y * WIDTH + x, inside, 0), 0)
    tl.store(d_table + group * entries + entry, total, entry < entries)


# Tile sizes are the largest with which a multiprocessor of sm_90 holds two programs without spilling registers, as
# compiled by Triton (benchmarks/kernels.py). fp32 products need more registers, because they run outside tensor cores.


def tile(size: int, largest: int) -> int:
    """Side of a tile that holds ``size``: a power of two, at least 16 (for tensor cores) and at most ``largest``."""
    return min(largest, max(16, triton.next_power_of_2(size)))


def parts(programs: int, tiles: int) -> int:
    """Number of parts for a sum over ``tiles`` tiles, where each part needs ``programs`` programs."""
    return max(1, min(PROGRAMS // programs, tiles))


def forward(u: Tensor, v: Tensor, table: Tensor, bias: Tensor, lines: Lines) -> Tensor:
    """Compute ``(P u + bias) * v``, contiguous, in the dtype of u and v.

    Args:
        u, v: ``[C, ...]``, contiguous, of one dtype.
        table: ``[S, offsets]``, contiguous.
        bias: ``[tokens of the window]``, contiguous.
    """
    out, half, rows = torch.empty_like(v), u.element_size() == 2, rows_of(u, table, lines)
    largest = 128 if half else 64
    bm = tile(lines.L, largest)
    bj = tile(rows * lines.INNER, 128 if half and bm <= 32 else 64)
    grid = (triton.cdiv(lines.L, bm) * triton.cdiv(rows * lines.INNER, bj), len(table))
    sides = {"BM": bm, "BN": tile(lines.L, 32 if half else 16), "BJ": bj}
    mix[grid](u, v, table, bias, out, rows, **lines._asdict(), **sides, num_warps=8 if bm == largest else 4)
    return out


def rows_of(u: Tensor, table: Tensor, lines: Lines) -> int:
    """Number of rows of lines in a group; a row is ``INNER`` adjacent lines."""
    return u.numel() // (len(table) * lines.L * lines.INNER)


def backward(
    grad: Tensor, u: Tensor, v: Tensor, table: Tensor, bias: Tensor, lines: Lines
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, v, table and bias, each in its own dtype; ``grad``, contiguous, is that of the result."""
    if lines.L <= SHORT and lines.L == lines.PLANE:
        d_u, d_v, pairs, d_bias = short_gradients(grad, u, v, table, bias, lines)
    else:
        d_v = forward(u, grad, table, bias, lines)
        d_u, d_bias = input_gradient(grad, v, table, lines)
        pairs = pair_gradients(grad, u, v, table, lines)
    d_table, sides = torch.empty_like(table), {"BM": tile(lines.PLANE, 64), "BO": 32}
    shape = {name: size for name, size in lines._asdict().items() if name != "INNER"}
    grid = (triton.cdiv(table.shape[1], sides["BO"]), len(table))
    fold[grid](pairs, d_table, len(pairs), **shape, **sides, num_warps=8)
    t, h, w = lines.L // lines.PLANE, lines.PLANE // lines.WIDTH, lines.WIDTH
    unused = (0, lines.WIN_W - w, 0, lines.WIN_H - h, 0, lines.WIN_T - t)  # tokens of the window beyond the extent
    return d_u, d_v, d_table, F.pad(d_bias.sum((0, 1)).view(t, h, w), unused).flatten().to(bias.dtype)


def short_gradients(
    grad: Tensor, u: Tensor, v: Tensor, table: Tensor, bias: Tensor, lines: Lines
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run ``unmix_short``: gradients of u and v, and its partial sums of pairs and bias."""
    groups, half, rows = len(table), u.element_size() == 2, rows_of(u, table, lines)
    bm, bj = tile(lines.L, SHORT), 32 if half else 16
    num_parts = parts(groups, triton.cdiv(rows * lines.INNER, bj))
    d_u, d_v = torch.empty_like(u), torch.empty_like(v)
    pairs = u.new_empty(num_parts, groups, 1, lines.L, lines.L, dtype=torch.float32)
    d_bias = u.new_empty(num_parts, groups, lines.L, dtype=torch.float32)
    sides, warps = {"BM": bm, "BJ": bj}, min(8, bm // (8 if half else 4))
    results = d_u, d_v, pairs, d_bias
    unmix_short[(num_parts, groups)](
        u, v, grad, table, bias, *results, rows, **lines._asdict(), **sides, num_warps=warps
    )
    return results


def input_gradient(grad: Tensor, v: Tensor, table: Tensor, lines: Lines) -> tuple[Tensor, Tensor]:
    """Run ``unmix``: gradient of u, and partial sums of the bias' gradient, ``[S, parts, L]``."""
    groups, half, rows = len(table), v.element_size() == 2, rows_of(v, table, lines)
    largest = 128 if half else 64
    bm, bj = tile(lines.L, largest), tile(rows * lines.INNER, 64 if half else 32)
    d_u, num_parts = torch.empty_like(v), triton.cdiv(rows * lines.INNER, bj)
    d_bias = v.new_empty(groups, num_parts, lines.L, dtype=torch.float32)
    grid = (triton.cdiv(lines.L, bm) * num_parts, groups)
    sides = {"BM": bm, "BN": tile(lines.L, 32 if half else 16), "BJ": bj}
    unmix[grid](v, grad, table, d_u, d_bias, rows, **lines._asdict(), **sides, num_warps=8 if bm == largest else 4)
    return d_u, d_bias


def pair_gradients(grad: Tensor, u: Tensor, v: Tensor, table: Tensor, lines: Lines) -> Tensor:
    """Run ``correlate``: partial sums of the gradients of token pairs."""
    groups, half, rows = len(table), u.element_size() == 2, rows_of(u, table, lines)
    largest, shifts = 128 if half else 64, 2 * (lines.L // lines.PLANE) - 1
    side = tile(lines.PLANE, largest)
    tiles, bj = triton.cdiv(lines.PLANE, side) ** 2, 32
    num_parts = parts(tiles * shifts * groups, triton.cdiv(rows * lines.INNER, bj))
    pairs = u.new_empty(num_parts, groups, shifts, lines.PLANE, lines.PLANE, dtype=torch.float32)
    sizes = {"L": lines.L, "PLANE": lines.PLANE, "INNER": lines.INNER, "BM": side, "BN": side, "BJ": bj}
    grid = (num_parts * tiles, shifts, groups)
    correlate[grid](u, v, grad, pairs, rows, num_parts, **sizes, num_warps=8 if side == largest else 4)
    return pairs
