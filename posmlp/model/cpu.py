"""A step of a block on a CPU in eager mode: what ``Block.run_step`` computes, with a hand-written backward pass.

Most of the time goes into memory traffic. So this path works on a few windows at a time (as many as fill
``CHUNK_BYTES``), which stay in cache from the norm to the residual, and uses kernels that PyTorch has:

- Tokens are stored window by window, ``[B, W, C, T, N]``, so that all products of a window are on views.
- The bias of a linear layer is part of its matrix product: one more column of the weight, against a row of ones. Its
  gradient comes out of the matrix product of the backward pass.
- The norm over channels is the batch-norm kernel on the transposed view: one pass for the statistics and one for the
  result, where operations on whole tensors take six.
- Whatever one pass over a chunk can compute again (GELU, the product with v) is not kept for the backward pass.
- A gate's bias and the residual are added by the matrix product itself (``baddbmm``), into memory that exists already.
- What depends on parameters alone (``Operands``) is computed once for a model whose weights are frozen.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import flop_registry, register_flop_formula

from posmlp.model.gates import joint_backward, joint_product

TYPES = (torch.float32, torch.bfloat16)
CHUNK_BYTES = 4 * 2**20  # of hidden activations at once; a chunk is at least one window
JOINT_CHUNK_BYTES = 64 * 2**20  # the same for joint windows, whose maps are computed again for each chunk


WINDOW_ELEMENTS = 2**17  # activations of a window from which a call for each window is faster than a copy of them all


def on_amd() -> bool:
    """Return whether the processor is an AMD one; False where the system does not say."""
    with suppress(OSError):
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    return False


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES = 2**30


def keep_freed_memory() -> None:
    """Let this process keep up to ``KEPT_BYTES`` of freed memory for its next tensors; only glibc needs to be told.

    By default glibc returns the memory of large tensors to the system. Each forward pass then gets it back page by
    page, which takes longer than the norms, most of all in a virtual machine (``benchmarks/frozen.py``).
    """
    with suppress(AttributeError, OSError, TypeError):  # other C libraries, other systems
        mallopt = ctypes.CDLL(None).mallopt
        for threshold in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(threshold, KEPT_BYTES)


# PyTorch sends fp32 products on CPUs to MKL, which does not use AVX-512 on AMD processors. oneDNN, which PyTorch also
# ships, does: up to twice the speed there, with equal results (benchmarks/model.py). This op calls its linear kernel.
ONEDNN = on_amd() and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# Multiply-adds from which one matrix product is worth a call to oneDNN; MKL runs batches of smaller ones at once.
ONEDNN_MIN_MACS = 2**24


def supports(x: Tensor) -> bool:
    """Return whether this path handles ``x``: on a CPU, in a dtype with fast kernels, neither compiled nor exported."""
    return x.device.type == "cpu" and {x.dtype, compute_dtype(x)} <= {*TYPES} and not torch.compiler.is_compiling()


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype of the matrix products: that of autocast if enabled, otherwise that of ``x``."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class Operands(NamedTuple):
    """What a step multiplies activations with, in the dtype of the matrix products.

    Attributes:
        w1, w2: fc1 and fc2 of all units, ``[units * 2C, C + 1]`` and ``[C, units * C + 1]``; biases are the last
            columns.
        weights, biases: ``PositionGate.mixing_weights`` and bias, ``[T or 1, N or 1]``, of each unit.
    """

    w1: Tensor
    w2: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]


def make_operands(dtype: torch.dtype, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *gates: Tensor) -> Operands:
    """Combine the parameters of a step, as in ``run_step``."""
    w1, w2 = (torch.cat([w, b[:, None]], 1).to(dtype) for w, b in ((w1, b1), (w2, b2)))
    return Operands(w1, w2, gates[::2], tuple(bias.to(dtype) for bias in gates[1::2]))


def run_step(x: Tensor, mask: Tensor | None, keep_scale: Tensor | None, *parameters: Tensor) -> Tensor:
    """Add the outputs of a step's units to ``x``; in place unless an input requires gradients.

    Args:
        x: ``[C, B, W, T, N]``, best stored as ``[B, W, C, T, N]``, as the result is.
        mask: ``[W, T, N]``, 0 at padded tokens; None if there are none.
        keep_scale: ``[B]``, factor of the units' outputs for each clip; None: 1.
        parameters: weight and bias of fc1 of all units with the norms folded in, ``[units * 2C, C]`` and
            ``[units * 2C]``: u and v of the first unit, then of the second. Weight of fc2 of all units next to each
            other, ``[C, units * C]``, and the sum of their biases, ``[C]``. Then for each unit its
            ``PositionGate.mixing_weights``, in the dtype of the matrix products, and its bias, ``[T or 1, N or 1]``.
    """
    dtype = compute_dtype(x)
    if torch.is_grad_enabled() and any(each.requires_grad for each in (x, *parameters)):
        mask, keep_scale = by_window_of_clips(x, mask, keep_scale)
        with torch.autocast("cpu", enabled=False):
            return StepFunction.apply(dtype, x, mask, keep_scale, *parameters)
    with torch.autocast("cpu", enabled=False):
        operands = make_operands(dtype, *parameters)
    return run_operands(x, mask, keep_scale, operands)


def run_operands(x: Tensor, mask: Tensor | None, keep_scale: Tensor | None, operands: Operands) -> Tensor:
    """``run_step`` without gradients."""
    mask, keep_scale = by_window_of_clips(x, mask, keep_scale)
    with torch.autocast("cpu", enabled=False):
        return forward(x, mask, keep_scale, operands, train=False)[0]


def by_window_of_clips(
    x: Tensor, mask: Tensor | None, keep_scale: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Repeat ``mask`` and ``keep_scale`` for each window of each clip, in the dtype of the matrix products."""
    dtype, (_, clips, windows, *_) = compute_dtype(x), x.shape
    return (
        None if mask is None else mask.to(dtype).repeat(clips, 1, 1),
        None if keep_scale is None else keep_scale.to(dtype).repeat_interleave(windows),
    )


def forward(
    x: Tensor, mask: Tensor | None, keep_scale: Tensor | None, operands: Operands, train: bool
) -> tuple[Tensor, list[Tensor]]:
    """``run_step`` with ``mask`` and ``keep_scale`` of ``by_window_of_clips``.

    Returns:
        The result, and the tensors that the backward pass needs (empty unless ``train``).
    """
    w1, w2, weights, biases = operands
    dtype, tokens = w1.dtype, by_window(x).contiguous()
    out = torch.empty_like(tokens) if train else tokens
    saved = []
    for chunk in chunks(tokens, len(w1), weights):
        normed, rstd = channel_norm(tokens[chunk].flatten(2), dtype)
        z = product(w1, normed)  # [windows, units * 2C, T*N]
        hidden = F.gelu(z) if train else torch.ops.aten.gelu_(z)
        gated = with_ones(w2, z)
        if train:
            saved += [normed, rstd, z]
        of_units = zip(split_uv(hidden, tokens), split_units(gated, tokens), weights, biases, strict=True)
        for (u, v), unit_gated, unit_weights, bias in of_units:
            if mask is not None:
                u.mul_(mask[chunk, None])
            mixed = torch.empty_like(unit_gated) if train else unit_gated
            mix(unit_weights, u, bias, mixed)
            torch.mul(mixed, v, out=unit_gated)
            if train:
                saved.append(mixed)
        if keep_scale is None and tokens.dtype == dtype:
            add_product(tokens[chunk].flatten(2), w2.expand(len(gated), -1, -1), gated, out[chunk].flatten(2))
            continue
        residual = product(w2, gated).view(tokens[chunk].shape)
        if keep_scale is not None:
            residual.mul_(keep_scale[chunk, None, None, None])
        torch.add(tokens[chunk], residual, out=out[chunk])
    return from_windows(out, x), [w1, w2, *saved] if train else []


class StepFunction(torch.autograd.Function):
    """``run_step`` with gradients."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *inputs: Any) -> Tensor:
        x, mask, keep_scale, *parameters = inputs
        out, saved = forward(x, mask, keep_scale, make_operands(dtype, *parameters), train=True)
        ctx.inputs = len(inputs)
        ctx.save_for_backward(None, *inputs[1:], *saved)  # all but x
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # read once only: activation checkpointing allows no second read
        _, mask, keep_scale, _, _, _, _, *gates = tensors[: ctx.inputs]
        w1, w2, *saved = tensors[ctx.inputs :]
        dtype, next_saved, weights = w1.dtype, iter(saved), gates[::2]
        d_w1, d_w2, *d_gates = (torch.zeros_like(each, dtype=torch.float32) for each in (w1, w2, *gates))
        w1_transposed, w2_transposed = (w[:, :-1].mT.contiguous() for w in (w1, w2))
        d_out = by_window(grad)
        d_x = torch.empty_like(d_out, memory_format=torch.contiguous_format)
        for chunk in chunks(d_out, len(w1), weights):
            normed, rstd, z = next(next_saved), next(next_saved), next(next_saved)
            d_residual = d_out[chunk].to(dtype).flatten(2).contiguous()
            if keep_scale is not None:
                d_residual = d_residual * keep_scale[chunk, None, None]
            hidden, d_hidden, d_gated = F.gelu(z), torch.empty_like(z), product(w2_transposed, d_residual)
            gated = with_ones(w2, z)
            of_units = zip(
                split_uv(hidden, d_out),
                split_uv(d_hidden, d_out),
                split_units(gated, d_out),
                split_units(d_gated, d_out),
                weights,
                d_gates[::2],
                d_gates[1::2],
                strict=True,
            )
            for (u, v), (d_u, d_v), unit_gated, d_unit_gated, unit_weights, d_weights, d_bias in of_units:
                if mask is not None:
                    u.mul_(mask[chunk, None])
                mixed = next(next_saved)
                torch.mul(mixed, v, out=unit_gated)
                torch.mul(mixed, d_unit_gated, out=d_v)
                d_mixed = d_unit_gated.mul_(v)
                d_u_chunk, d_weights_chunk = mix_backward(unit_weights, u, d_mixed)
                d_u.copy_(d_u_chunk)
                d_weights += d_weights_chunk
                if mask is not None:
                    d_u.mul_(mask[chunk, None])
                d_bias += d_mixed.sum((0, 1)).sum_to_size(d_bias.shape)
            d_z = torch.ops.aten.gelu_backward.grad_input(d_hidden, z, grad_input=d_hidden)
            d_w1 += sum_of_windows(product(d_z, normed.mT))
            d_w2 += sum_of_windows(product(d_residual, gated.mT))
            d_normed = channel_norm_backward(product(w1_transposed, d_z), normed, rstd)
            torch.add(d_out[chunk], d_normed.view(d_out[chunk].shape), out=d_x[chunk])
        d_x = from_windows(d_x, grad)
        return None, d_x, None, None, d_w1[:, :-1], d_w1[:, -1], d_w2[:, :-1], d_w2[:, -1], *d_gates


def by_window(x: Tensor) -> Tensor:
    """``[C, B, W, T, N]`` as ``[windows, C, T, N]``, the windows of all clips; a view if stored in that order."""
    return x.permute(1, 2, 0, 3, 4).flatten(0, 1)


def from_windows(tokens: Tensor, like: Tensor) -> Tensor:
    """Undo ``by_window`` for a tensor of the shape of ``like``."""
    return tokens.unflatten(0, like.shape[1:3]).permute(2, 0, 1, 3, 4)


def chunks(tokens: Tensor, hidden: int, weights: Sequence[Tensor]) -> Iterator[slice]:
    """Yield slices of the windows to work on at once.

    Args:
        tokens: ``[windows, C, T, N]``.
        hidden: number of hidden channels of a token.
        weights: the mixing weights of each unit.
    """
    most_bytes = JOINT_CHUNK_BYTES if any(each.ndim == 5 for each in weights) else CHUNK_BYTES
    windows_per_chunk = max(1, most_bytes // (hidden * tokens[0, 0].numel() * tokens.element_size()))
    for first in range(0, len(tokens), windows_per_chunk):
        yield slice(first, min(first + windows_per_chunk, len(tokens)))


def split_uv(hidden: Tensor, tokens: Tensor) -> Iterator[Tensor]:
    """Yield each unit's u and v, ``[2, windows, C, T, N]``, of ``[windows, units * 2C, T*N]``."""
    yield from hidden.unflatten(2, tokens.shape[2:]).unflatten(1, (-1, 2, tokens.shape[1])).permute(1, 2, 0, 3, 4, 5)


def split_units(gated: Tensor, tokens: Tensor) -> Iterator[Tensor]:
    """Yield each unit's part, ``[windows, C, T, N]``, of ``[windows, units * C, T*N]``; skip a last row of ones."""
    channels = tokens.shape[1]
    for first in range(0, gated.shape[1] // channels * channels, channels):
        yield gated[:, first : first + channels].unflatten(2, tokens.shape[2:])


def with_ones(weight: Tensor, z: Tensor) -> Tensor:
    """Allocate the operand of ``weight``, ``[windows, units * C + 1, T*N]``: ones in the last row, the rest unset."""
    gated = z.new_empty(len(z), weight.shape[1], z.shape[2])
    gated[:, -1] = 1
    return gated


def mix(weights: Tensor, u: Tensor, bias: Tensor, out: Tensor) -> None:
    """Mix tokens by mixing weights, and add a bias.

    Args:
        weights: one of ``Operands.weights``.
        u: ``[windows, C, T, N]``.
        bias: ``[T or 1, N or 1]``.
        out: gets the result; shaped as ``u``, each window contiguous.
    """
    if weights.ndim != 5 and u[0].numel() >= WINDOW_ELEMENTS:
        maps = weights
        if weights.ndim == 4:
            maps = weights.expand(-1, u.shape[1] // len(weights), -1, -1).flatten(0, 1)  # one for each channel
        for window, window_out in zip(u, out, strict=True):
            if weights.ndim == 4:
                add_product(bias, maps, window, window_out)
            else:
                of_groups = window_out.view(len(maps), -1, maps.shape[-1])
                add_product(bias, window.reshape(of_groups.shape), maps.mT, of_groups)
        return
    x = by_group(u, weights)
    if weights.ndim == 3:
        mixed = product(x, weights.mT)
    elif weights.ndim == 4:
        mixed = product(weights, x)
    else:
        mixed = joint_product(weights, x)
    torch.add(from_groups(mixed, u, weights), bias, out=out)


def mix_backward(weights: Tensor, u: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``u`` and of the mixing weights; ``grad`` is the gradient of the result of ``mix``."""
    x, g = by_group(u, weights), by_group(grad, weights)
    if weights.ndim == 3:
        d_x, d_weights = product(g, weights), sum_of_windows(product(g.mT, x))
    elif weights.ndim == 4:
        d_x, d_weights = product(weights.mT, g), product(g, x.mT).sum((0, 2)).unsqueeze(1)
    else:
        d_weights, d_x = joint_backward(weights, x, g)
    return from_groups(d_x, u, weights), d_weights


def by_group(u: Tensor, weights: Tensor) -> Tensor:
    """View ``[windows, C, T, N]`` as the operand of mixing weights; V are the channels of a group.

    Returns:
        ``[windows, S, V*T, N]`` for spatial gates, ``[windows, S, V, T, N]`` for temporal ones,
        ``[S, windows * V, T, N]`` for joint ones.
    """
    if weights.ndim == 3:
        x = u.unflatten(1, (len(weights), -1)).flatten(2)
        return x.unflatten(2, (-1, weights.shape[-1]))  # also right for the only position of a window of one token
    if weights.ndim == 4:
        return u.unflatten(1, (len(weights), -1))
    return u.unflatten(1, (weights.shape[1], -1)).transpose(0, 1).flatten(1, 2)


def from_groups(x: Tensor, like: Tensor, weights: Tensor) -> Tensor:
    """Undo ``by_group`` for a tensor of the shape of ``like``."""
    if weights.ndim == 5:
        x = x.unflatten(1, (len(like), -1)).transpose(0, 1)
    return x.reshape(like.shape)


def channel_norm(x: Tensor, dtype: torch.dtype, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """LayerNorm without its affine over the channels of ``[windows, C, tokens]``.

    Returns:
        The result, ``[windows, C + 1, tokens]`` in the given dtype with a last row of ones, and 1 / deviation, fp32
        ``[windows * tokens]``.
    """
    windows, channels, tokens = x.shape
    normed = torch.empty(windows, channels + 1, tokens, dtype=dtype)
    normed[:, -1] = 1
    # Batch norm of [C, tokens] takes its statistics over C, the axis of a batch. A weight in fp32 keeps them in fp32.
    if x.dtype == dtype and x[0].numel() >= WINDOW_ELEMENTS:
        ones, (mean, rstd) = torch.ones(tokens), torch.empty(2, windows, tokens)
        for i in range(windows):
            found = normed[i, :-1], mean[i], rstd[i]
            torch.native_batch_norm(x[i], ones, torch.zeros_like(ones), None, None, True, 0.0, eps, out=found)
        return normed, rstd.flatten()
    ones = torch.ones(windows * tokens)
    result, _, rstd = torch.native_batch_norm(columns(x), ones, torch.zeros_like(ones), None, None, True, 0.0, eps)
    normed[:, :-1] = result.view(channels, windows, tokens).transpose(0, 1)
    return normed, rstd


def channel_norm_backward(grad: Tensor, normed: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of the ``x`` of ``channel_norm``, ``[windows, C, tokens]``, from that of its result without the ones."""
    windows, channels, tokens = grad.shape
    mean, inverse_deviation, output_mask = torch.zeros_like(rstd), torch.ones_like(rstd), [True, False, False]
    # The normed tensor has mean 0 and deviation 1 already; the deviation of x enters as a weight.
    d_x, _, _ = torch.ops.aten.native_batch_norm_backward(
        columns(grad), columns(normed[:, :-1]), rstd, None, None, mean, inverse_deviation, True, 0.0, output_mask
    )
    return d_x.view(channels, windows, tokens).transpose(0, 1)


def sum_of_windows(x: Tensor) -> Tensor:
    """Sum over the first axis; no copy if there is one window."""
    return x[0] if len(x) == 1 else x.sum(0)


def columns(x: Tensor) -> Tensor:
    """``[windows, C, tokens]`` as ``[C, windows * tokens]``; a view if there is one window."""
    return x.transpose(0, 1).flatten(1)


def add_product(addend: Tensor, a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write ``addend + a @ b`` into ``out``, ``[batch, rows, columns]``; the addend broadcasts, or is ``out``."""
    if uses_onednn(a, b):
        torch.add(addend, product(a, b), out=out)
    else:
        torch.baddbmm(addend, a, b, out=out)


def uses_onednn(a: Tensor, b: Tensor) -> bool:
    """Return whether ``product`` calls oneDNN's linear kernel."""
    return ONEDNN and a.dtype == torch.float32 and a.shape[-2:].numel() * b.shape[-1] >= ONEDNN_MIN_MACS


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` for matrices, or for batches of matrices that broadcast."""
    if not uses_onednn(a, b):
        return a @ b
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = a.expand(*batch, -1, -1), b.expand(*batch, -1, -1)
    if batch.numel() == 1:  # saves a copy
        return onednn_product(a.flatten(0, -2), b.flatten(0, -2)).view(*batch, a.shape[-2], b.shape[-1])
    out = a.new_empty(*batch, a.shape[-2], b.shape[-1])
    for i in itertools.product(*map(range, batch)):
        out[i] = onednn_product(a[i], b[i])
    return out


def onednn_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` for two matrices."""
    return torch.ops.mkldnn._linear_pointwise(a, b.mT, None, "none", [], "")


if ONEDNN and torch.ops.mkldnn._linear_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def linear_flops(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any) -> int:
        """FLOPs of the op for ``torch.utils.flop_counter``: a multiply and an add for each of [.., K] x [N, K]."""
        return 2 * x_shape.numel() * weight_shape[0]
