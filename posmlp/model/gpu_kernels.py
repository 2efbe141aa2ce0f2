"""Triton kernels of the gate on CUDA devices, and how they are launched; ``gpu.py`` makes operators of it.

All kinds of window are one thing here: a *line* of L tokens that mix, ``inner`` elements apart in memory, and many such
lines. In ``[C, B, W, T, N]`` the lines of a spatial window are its moments (L = N, inner 1), of a joint one the windows
(L = T * N, inner 1), of a temporal one the places (L = T, inner N). The lines of a group are the columns of a matrix
``X [L, columns]`` with the token n of column j at ``j // inner * (L * inner) + n * inner + j % inner``, and the gate is
``(P X + b) * v``.

P is gathered from the table, tile by tile, and never stored. As a token at (t, y, x) has the code
``(t (2h-1) + y) (2w-1) + x`` for a window (t, h, w), its offset from another is the difference of two codes.

Bytes through memory, where u has E elements of e bytes: forward 3Ee (u, v, result). Backward 5Ee for lines of up to
``SHORT`` tokens (u, v, gradient; gradients of u and v) and 9Ee for longer ones, which take a kernel for each of three
gradients. P X is computed again there: to have kept it would cost Ee to write and Ee to read in place of u, the same
traffic, and the memory of one more u for every gate. Tiles of the same lines run side by side, so that what they share
comes from the L2 cache.

Sums over columns are cut into parts by the shapes alone, and their parts are added in order, without atomics: results
are the same from run to run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

SHORT = 64  # most tokens of a line that is one tile in the backward pass
PROGRAMS = 512  # about how many programs, of all groups and tiles, share a sum over columns


class Lines(NamedTuple):
    """What the kernels know of the lines when they are compiled.

    Attributes:
        L: tokens of a line.
        PLANE, WIDTH: tokens of one moment of it, and of a row of that.
        INNER: elements from one token to the next.
        TIME, HEIGHT, SIDE: the window (t, h, w) that table and bias are made for.
    """

    L: int
    PLANE: int
    WIDTH: int
    INNER: int
    TIME: int
    HEIGHT: int
    SIDE: int


def lines(window: tuple[int, ...], extent: tuple[int, ...]) -> Lines:
    """The lines of a gate's window on tokens of ``extent``."""
    t, h, w = (min(n, m) for n, m in zip(extent, window, strict=True))
    if window[1:] == (1, 1):  # moments in a row, each as many elements further as it has places
        return Lines(t, t, t, extent[1] * extent[2], 1, 1, window[0])
    return Lines(t * h * w, h * w, w, 1, *window)


@triton.jit
def place(token, L: tl.constexpr, PLANE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, SIDE: tl.constexpr):
    """Where a token is in a box of any number of planes, of ROWS x SIDE each; past the line's end as the last token."""
    token = tl.minimum(token, L - 1)
    return (token // PLANE * ROWS + token % PLANE // WIDTH) * SIDE + token % WIDTH


@triton.jit
def group_table(table, group, TIME: tl.constexpr, HEIGHT: tl.constexpr, SIDE: tl.constexpr):
    """The entry of offset zero in a group's table."""
    middle: tl.constexpr = ((TIME - 1) * (2 * HEIGHT - 1) + HEIGHT - 1) * (2 * SIDE - 1) + SIDE - 1
    return table + group * (2 * middle + 1) + middle


@triton.jit
def columns(first, rows, group, L: tl.constexpr, INNER: tl.constexpr, BJ: tl.constexpr):
    """Elements from the tensor's start to the first token of BJ columns of a group, and which columns there are."""
    j = first + tl.arange(0, BJ)
    row = j // INNER  # compared in place of j, it tells the compiler which neighbours are there together
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
    TIME: tl.constexpr,
    HEIGHT: tl.constexpr,
    SIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BJ: tl.constexpr,
):
    """out = (P u + bias) * v, a tile of BM tokens and BJ columns; also the gradient of v, where v is that of out."""
    tiles: tl.constexpr = (L + BM - 1) // BM
    group = tl.program_id(1)
    start, real = columns(tl.program_id(0) // tiles * BJ, rows, group, L, INNER, BJ)
    m = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    entries = group_table(table, group, TIME, HEIGHT, SIDE) + place(m, L, PLANE, WIDTH, 2 * HEIGHT - 1, 2 * SIDE - 1)
    mixed = tl.zeros((BM, BJ), tl.float32)
    for first in range(0, L, BN):
        n = first + tl.arange(0, BN)
        x = tl.load(u + start[None, :] + n[:, None] * INNER, (n < L)[:, None] & real[None, :], 0)
        p = tl.load(entries[:, None] - place(n, L, PLANE, WIDTH, 2 * HEIGHT - 1, 2 * SIDE - 1)[None, :])
        mixed = tl.dot(p.to(x.dtype), x, mixed, input_precision="ieee")
    mixed += tl.load(bias + place(m, L, PLANE, WIDTH, HEIGHT, SIDE)).to(tl.float32)[:, None]
    at, inside = start[None, :] + m[:, None] * INNER, (m < L)[:, None] & real[None, :]
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
    TIME: tl.constexpr,
    HEIGHT: tl.constexpr,
    SIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BJ: tl.constexpr,
):
    """d_u = P^T (grad * v), a tile as in ``mix``; the first tile of a line adds up the bias' gradient over its columns.

    d_bias is ``[groups, tiles of columns, L]``.
    """
    tiles: tl.constexpr = (L + BM - 1) // BM
    tile, part, group = tl.program_id(0) % tiles, tl.program_id(0) // tiles, tl.program_id(1)
    start, real = columns(part * BJ, rows, group, L, INNER, BJ)
    m = tile * BM + tl.arange(0, BM)
    entries = group_table(table, group, TIME, HEIGHT, SIDE) - place(m, L, PLANE, WIDTH, 2 * HEIGHT - 1, 2 * SIDE - 1)
    d_bias += (group * tl.cdiv(rows * INNER, BJ) + part).to(tl.int64) * L
    total = tl.zeros((BM, BJ), tl.float32)
    for first in range(0, L, BN):
        n = first + tl.arange(0, BN)
        at, inside = start[None, :] + n[:, None] * INNER, (n < L)[:, None] & real[None, :]
        y = tl.load(v + at, inside, 0)
        d_mixed = y.to(tl.float32) * tl.load(grad + at, inside, 0).to(tl.float32)
        p = tl.load(entries[:, None] + place(n, L, PLANE, WIDTH, 2 * HEIGHT - 1, 2 * SIDE - 1)[None, :])
        total = tl.dot(p.to(y.dtype), d_mixed.to(y.dtype), total, input_precision="ieee")
        if tile == 0:
            tl.store(d_bias + n, tl.sum(d_mixed, 1), n < L)
    tl.store(d_u + start[None, :] + m[:, None] * INNER, total, (m < L)[:, None] & real[None, :])


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
    """Gradients of pairs of tokens: a tile of BM x BN places in the plane, a distance in time, a part of the columns.

    pairs is ``[parts, groups, distances, PLANE (of the output), PLANE (of the input)]``, with the 2F - 1 distances of F
    moments in rising order: pairs of tokens as far apart in time share an entry of the table for all F moments.
    """
    moments: tl.constexpr = L // PLANE
    tiles: tl.constexpr = (PLANE + BN - 1) // BN
    part, tile = tl.program_id(0) % parts, tl.program_id(0) // parts
    group, later = tl.program_id(2), tl.program_id(1) - (moments - 1)
    m = tile // tiles * BM + tl.arange(0, BM)
    n = tile % tiles * BN + tl.arange(0, BN)
    both = moments - tl.abs(later)  # moments that have another one so much later
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(part * BJ, rows * both * INNER, parts * BJ):
        j = first + tl.arange(0, BJ)
        row, moment = j // INNER // both, j // INNER % both
        real, start = row < rows, (group.to(tl.int64) * rows + row) * (L * INNER) + j % INNER
        to = start + (moment + tl.maximum(later, 0)) * (PLANE * INNER)
        of = start + (moment + tl.maximum(-later, 0)) * (PLANE * INNER)
        x = tl.load(u + of[:, None] + n[None, :] * INNER, (n < PLANE)[None, :] & real[:, None], 0)
        at, inside = to[None, :] + m[:, None] * INNER, (m < PLANE)[:, None] & real[None, :]
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
    TIME: tl.constexpr,
    HEIGHT: tl.constexpr,
    SIDE: tl.constexpr,
    BM: tl.constexpr,
    BJ: tl.constexpr,
):
    """All gradients of lines that fit one tile, each program for one part of a group's columns.

    pairs is ``[parts, groups, L (of the output), L (of the input)]``, d_bias ``[parts, groups, L]``.
    """
    part, group = tl.program_id(0), tl.program_id(1)
    n = tl.arange(0, BM)
    code = place(n, L, PLANE, WIDTH, 2 * HEIGHT - 1, 2 * SIDE - 1)
    entries = group_table(table, group, TIME, HEIGHT, SIDE)
    p = tl.load(entries + code[:, None] - code[None, :]).to(u.dtype.element_ty)
    p_back = tl.load(entries + code[None, :] - code[:, None]).to(u.dtype.element_ty)
    b = tl.load(bias + place(n, L, PLANE, WIDTH, HEIGHT, SIDE)).to(tl.float32)
    total, total_bias = tl.zeros((BM, BM), tl.float32), tl.zeros((BM,), tl.float32)
    for first in range(part * BJ, rows * INNER, tl.num_programs(0) * BJ):
        start, real = columns(first, rows, group, L, INNER, BJ)
        at, inside = start[None, :] + n[:, None] * INNER, (n < L)[:, None] & real[None, :]
        x, g = tl.load(u + at, inside, 0), tl.load(grad + at, inside, 0).to(tl.float32)
        d_mixed = tl.load(v + at, inside, 0).to(tl.float32) * g
        total_bias += tl.sum(d_mixed, 1)
        d_mixed = d_mixed.to(x.dtype)
        tl.store(d_v + at, (tl.dot(p, x, input_precision="ieee") + b[:, None]) * g, inside)
        tl.store(d_u + at, tl.dot(p_back, d_mixed, input_precision="ieee"), inside)
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
    TIME: tl.constexpr,
    HEIGHT: tl.constexpr,
    SIDE: tl.constexpr,
    BM: tl.constexpr,
    BO: tl.constexpr,
):
    """The table's gradient, BO entries of a group: sums of ``pairs``, as of ``correlate``, over equal offsets."""
    moments: tl.constexpr = L // PLANE
    height: tl.constexpr = PLANE // WIDTH
    sides: tl.constexpr = 2 * SIDE - 1
    plane: tl.constexpr = (2 * HEIGHT - 1) * sides
    entries: tl.constexpr = (2 * TIME - 1) * plane
    group, groups = tl.program_id(1), tl.num_programs(1)
    entry = tl.program_id(0) * BO + tl.arange(0, BO)
    later = entry // plane - (TIME - moments)  # in the order of pairs
    down, right = entry % plane // sides - (HEIGHT - 1), entry % sides - (SIDE - 1)
    known = (later >= 0) & (later < 2 * moments - 1) & (entry < entries)
    total = tl.zeros((BO,), tl.float32)
    for step in range(0, parts * tl.cdiv(PLANE, BM)):
        part, m = step // tl.cdiv(PLANE, BM), step % tl.cdiv(PLANE, BM) * BM + tl.arange(0, BM)
        y, x = m[:, None] // WIDTH - down[None, :], m[:, None] % WIDTH - right[None, :]  # of the input's token
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < WIDTH) & (m < PLANE)[:, None] & known[None, :]
        at = (part * groups + group).to(tl.int64) * (2 * moments - 1) + later
        total += tl.sum(tl.load(pairs + (at[None, :] * PLANE + m[:, None]) * PLANE + y * WIDTH + x, inside, 0), 0)
    tl.store(d_table + group * entries + entry, total, entry < entries)


# Tiles are the largest of which a multiprocessor of sm_90 holds two programs, without spilled registers, by what Triton
# compiles (benchmarks/kernels.py). Products in fp32 take more registers, as they run outside the tensor cores.


def tile(size: int, most: int) -> int:
    """Side of a tile that holds ``size``, at least 16, as tensor cores want it, and at most ``most``."""
    return min(most, max(16, triton.next_power_of_2(size)))


def parts(programs: int, steps: int) -> int:
    """Parts of a sum of ``steps`` tiles, where each part takes ``programs`` programs."""
    return max(1, min(PROGRAMS // programs, steps))


def forward(u: Tensor, v: Tensor, table: Tensor, bias: Tensor, line: Lines) -> Tensor:
    """``(P u + bias) * v``, contiguous and of their type.

    Args:
        u, v: ``[C, ...]``, contiguous, in one type.
        table: ``[S, offsets]``, contiguous.
        bias: ``[tokens of the window]``, contiguous.
    """
    out, half, rows = torch.empty_like(v), u.element_size() == 2, rows_of(u, table, line)
    most = 128 if half else 64
    bm = tile(line.L, most)
    bj = tile(rows * line.INNER, 128 if half and bm <= 32 else 64)
    grid = (triton.cdiv(line.L, bm) * triton.cdiv(rows * line.INNER, bj), len(table))
    sides = {"BM": bm, "BN": tile(line.L, 32 if half else 16), "BJ": bj}
    mix[grid](u, v, table, bias, out, rows, **line._asdict(), **sides, num_warps=8 if bm == most else 4)
    return out


def rows_of(u: Tensor, table: Tensor, line: Lines) -> int:
    """Rows of lines in a group: its lines are ``INNER`` a row, side by side."""
    return u.numel() // (len(table) * line.L * line.INNER)


def backward(
    grad: Tensor, u: Tensor, v: Tensor, table: Tensor, bias: Tensor, line: Lines
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, v, table and bias, each in its type; ``grad`` is that of ``forward``, contiguous."""
    if line.L <= SHORT and line.L == line.PLANE:
        d_u, d_v, pairs, d_bias = short_gradients(grad, u, v, table, bias, line)
    else:
        d_v = forward(u, grad, table, bias, line)
        d_u, d_bias = input_gradient(grad, v, table, line)
        pairs = pair_gradients(grad, u, v, table, line)
    d_table, sides = torch.empty_like(table), {"BM": tile(line.PLANE, 64), "BO": 32}
    shape = {name: size for name, size in line._asdict().items() if name != "INNER"}
    grid = (triton.cdiv(table.shape[1], sides["BO"]), len(table))
    fold[grid](pairs, d_table, len(pairs), **shape, **sides, num_warps=8)
    t, h, w = line.L // line.PLANE, line.PLANE // line.WIDTH, line.WIDTH
    rest = (0, line.SIDE - w, 0, line.HEIGHT - h, 0, line.TIME - t)  # tokens of the window that the input has not
    return d_u, d_v, d_table, F.pad(d_bias.sum((0, 1)).view(t, h, w), rest).flatten().to(bias.dtype)


def short_gradients(
    grad: Tensor, u: Tensor, v: Tensor, table: Tensor, bias: Tensor, line: Lines
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All four by ``unmix_short``; the last two as its parts."""
    groups, half, rows = len(table), u.element_size() == 2, rows_of(u, table, line)
    bm, bj = tile(line.L, SHORT), 32 if half else 16
    many = parts(groups, triton.cdiv(rows * line.INNER, bj))
    d_u, d_v = torch.empty_like(u), torch.empty_like(v)
    pairs = u.new_empty(many, groups, 1, line.L, line.L, dtype=torch.float32)
    d_bias = u.new_empty(many, groups, line.L, dtype=torch.float32)
    sides, warps = {"BM": bm, "BJ": bj}, min(8, bm // (8 if half else 4))
    results = d_u, d_v, pairs, d_bias
    unmix_short[(many, groups)](u, v, grad, table, bias, *results, rows, **line._asdict(), **sides, num_warps=warps)
    return results


def input_gradient(grad: Tensor, v: Tensor, table: Tensor, line: Lines) -> tuple[Tensor, Tensor]:
    """Gradient of u, and of the bias in parts, ``[S, parts, L]``."""
    groups, half, rows = len(table), v.element_size() == 2, rows_of(v, table, line)
    most = 128 if half else 64
    bm, bj = tile(line.L, most), tile(rows * line.INNER, 64 if half else 32)
    d_u, many = torch.empty_like(v), triton.cdiv(rows * line.INNER, bj)
    d_bias = v.new_empty(groups, many, line.L, dtype=torch.float32)
    grid, sides = (triton.cdiv(line.L, bm) * many, groups), {"BM": bm, "BN": tile(line.L, 32 if half else 16), "BJ": bj}
    unmix[grid](v, grad, table, d_u, d_bias, rows, **line._asdict(), **sides, num_warps=8 if bm == most else 4)
    return d_u, d_bias


def pair_gradients(grad: Tensor, u: Tensor, v: Tensor, table: Tensor, line: Lines) -> Tensor:
    """Gradients of pairs of tokens in parts, as ``correlate`` gives them."""
    groups, half, rows = len(table), u.element_size() == 2, rows_of(u, table, line)
    most, distances = 128 if half else 64, 2 * (line.L // line.PLANE) - 1
    side = tile(line.PLANE, most)
    tiles, bj = triton.cdiv(line.PLANE, side) ** 2, 32
    many = parts(tiles * distances * groups, triton.cdiv(rows * line.INNER, bj))
    pairs = u.new_empty(many, groups, distances, line.PLANE, line.PLANE, dtype=torch.float32)
    sizes = {"L": line.L, "PLANE": line.PLANE, "INNER": line.INNER, "BM": side, "BN": side, "BJ": bj}
    grid = (many * tiles, distances, groups)
    correlate[grid](u, v, grad, pairs, rows, many, **sizes, num_warps=8 if side == most else 4)
    return pairs
