"""A step of a block on a CPU without a compiler: what ``Block`` computes, with the backward pass written out.

The time goes into memory, so it works on one window after the other (or as many as fill ``CHUNK``), which stay in
cache from the norm to the residual, by kernels that PyTorch has:

- tokens lie in memory window by window, ``[B, W, C, T, N]``, so that all products of a window are on views;
- the bias of a linear layer rides in its matrix product, as one more column of the weight against a row of ones, and
  its gradient in the product of the backward pass;
- the norm over channels is the kernel of batch norm on the transposed view: one pass for the statistics and one for
  the result, where operations on whole tensors take six;
- what one pass over a chunk gives again (GELU, the product with v) is not kept for the backward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import flop_registry, register_flop_formula

from posmlp.model.gates import joint_backward, joint_product

TYPES = (torch.float32, torch.bfloat16)
CHUNK = 4 * 2**20  # bytes of hidden activations at once, at least a window
JOINT_CHUNK = 64 * 2**20  # the same for joint windows, whose maps are made anew for each chunk


def on_amd() -> bool:
    """Whether the processor is one of AMD's; where the system does not tell, no."""
    with suppress(OSError):
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    return False


# PyTorch sends fp32 products on CPUs to MKL, which runs without AVX-512 on AMD processors. oneDNN, which PyTorch ships
# too, uses it: up to twice the speed there, at equal results (benchmarks/model.py). This op reaches its linear kernel.
ONEDNN = on_amd() and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
LARGE = 2**24  # multiply-adds of a matrix from which that is worth a call; MKL takes batches of small ones at once


def serves(x: Tensor) -> bool:
    """Whether ``x`` can be worked on here: on a CPU, in a type of its fast kernels, neither compiled nor exported."""
    return x.device.type == "cpu" and {x.dtype, work_type(x)} <= {*TYPES} and not torch.compiler.is_compiling()


def work_type(x: Tensor) -> torch.dtype:
    """The type of the matrix products: autocast's, else that of ``x``."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def step(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, real: Tensor | None, keep: Tensor | None, *gates: Tensor
) -> Tensor:
    """``x`` plus the branches of a step's units; in ``x`` itself where nothing asks for gradients.

    Args:
        x: ``[C, B, W, T, N]``, best as ``[B, W, C, T, N]`` in memory, as the result is.
        w1, b1: of all units' fc1 with the norms folded in, ``[units * 2C, C]`` and ``[units * 2C]``: u and v of the
            first unit, then of the second.
        w2, b2: of all units' fc2 side by side, ``[C, units * C]``, and the sum of their biases, ``[C]``.
        real: ``[W, T, N]``, 0 at padded tokens; None if there are none.
        keep: ``[B]``, what the branches of a clip are multiplied with; None: 1.
        gates: for each unit its maps, as of ``PositionGate.position_map`` for the type of the matrix products, and
            its bias, ``[T or 1, N or 1]``.
    """
    dtype = work_type(x)
    _, clips, windows, *_ = x.shape
    if real is not None:
        real = real.to(dtype).repeat(clips, 1, 1)
    if keep is not None:
        keep = keep.to(dtype).repeat_interleave(windows)
    with torch.autocast("cpu", enabled=False):
        if torch.is_grad_enabled() and any(each.requires_grad for each in (x, w1, b1, w2, b2, *gates)):
            return Step.apply(dtype, x, w1, b1, w2, b2, real, keep, *gates)
        return forward(dtype, x, w1, b1, w2, b2, real, keep, *gates, train=False)[0]


def forward(
    dtype: torch.dtype,
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    real: Tensor | None,
    keep: Tensor | None,
    *gates: Tensor,
    train: bool,
) -> tuple[Tensor, list[Tensor]]:
    """``step`` in the given type, with ``real`` and ``keep`` for each window of each clip, and what its backward pass
    needs (only to ``train``)."""
    w1, w2 = (torch.cat([w, b[:, None]], 1).to(dtype) for w, b in ((w1, b1), (w2, b2)))
    maps, biases = gates[::2], [bias.to(dtype) for bias in gates[1::2]]
    tokens = by_window(x)
    out = torch.empty_like(tokens, memory_format=torch.contiguous_format) if train else tokens
    kept = []
    for span in spans(tokens, len(w1), maps):
        normed, rstd = channel_norm(tokens[span].flatten(2), dtype)
        z = product(w1, normed)  # [windows, units * 2C, T*N]
        hidden = F.gelu(z) if train else torch.ops.aten.gelu_(z)
        gated = with_ones(w2, z)
        if train:
            kept += [normed, rstd, z]
        for (u, v), to, of, bias in zip(uv(hidden, tokens), by_unit(gated, tokens), maps, biases, strict=True):
            if real is not None:
                u.mul_(real[span, None])
            mixed = mix(of, u).add_(bias)
            torch.mul(mixed, v, out=to)
            if train:
                kept.append(mixed)
        residual = product(w2, gated).view(tokens[span].shape)
        if keep is not None:
            residual.mul_(keep[span, None, None, None])
        torch.add(tokens[span], residual, out=out[span])
    return from_windows(out, x), [w1, w2, *kept] if train else []


class Step(torch.autograd.Function):
    """``step`` with gradients."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *inputs: Any) -> Tensor:
        out, kept = forward(dtype, *inputs, train=True)
        ctx.inputs = len(inputs)
        ctx.save_for_backward(None, *inputs[1:], *kept)  # all but x
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # to be read once only, for the sake of activation checkpointing
        _, _, _, _, _, real, keep, *gates = saved[: ctx.inputs]
        w1, w2, *kept = saved[ctx.inputs :]
        dtype, waiting, maps = w1.dtype, iter(kept), gates[::2]
        d_w1, d_w2, *d_gates = (torch.zeros_like(each, dtype=torch.float32) for each in (w1, w2, *gates))
        back1, back2 = (w[:, :-1].mT.contiguous() for w in (w1, w2))
        d_out = by_window(grad)
        d_x = torch.empty_like(d_out, memory_format=torch.contiguous_format)
        for span in spans(d_out, len(w1), maps):
            normed, rstd, z = next(waiting), next(waiting), next(waiting)
            d_residual = d_out[span].to(dtype).flatten(2).contiguous()
            if keep is not None:
                d_residual = d_residual * keep[span, None, None]
            hidden, d_hidden, d_gated = F.gelu(z), torch.empty_like(z), product(back2, d_residual)
            gated = with_ones(w2, z)
            of_units = zip(
                uv(hidden, d_out),
                uv(d_hidden, d_out),
                by_unit(gated, d_out),
                by_unit(d_gated, d_out),
                maps,
                d_gates[::2],
                d_gates[1::2],
                strict=True,
            )
            for (u, v), (d_u, d_v), to, d_to, of, d_maps, d_bias in of_units:
                if real is not None:
                    u.mul_(real[span, None])
                mixed = next(waiting)
                torch.mul(mixed, v, out=to)
                torch.mul(mixed, d_to, out=d_v)
                d_mixed = d_to.mul_(v)
                d_of, d_map = mix_backward(of, u, d_mixed)
                d_u.copy_(d_of)
                d_maps += d_map
                if real is not None:
                    d_u.mul_(real[span, None])
                d_bias += d_mixed.sum((0, 1)).sum_to_size(d_bias.shape)
            d_z = torch.ops.aten.gelu_backward.grad_input(d_hidden, z, grad_input=d_hidden)
            d_w1 += sum_of_windows(product(d_z, normed.mT))
            d_w2 += sum_of_windows(product(d_residual, gated.mT))
            d_normed = channel_norm_backward(product(back1, d_z), normed, rstd)
            torch.add(d_out[span], d_normed.view(d_out[span].shape), out=d_x[span])
        d_x = from_windows(d_x, grad)
        return None, d_x, d_w1[:, :-1], d_w1[:, -1], d_w2[:, :-1], d_w2[:, -1], None, None, *d_gates


def by_window(x: Tensor) -> Tensor:
    """``[C, B, W, T, N]`` as ``[windows, C, T, N]``, the windows of all clips; a view of what lies so in memory."""
    return x.permute(1, 2, 0, 3, 4).flatten(0, 1)


def from_windows(tokens: Tensor, like: Tensor) -> Tensor:
    """``by_window`` undone, for a tensor of the shape of ``like``."""
    return tokens.unflatten(0, like.shape[1:3]).permute(2, 0, 1, 3, 4)


def spans(tokens: Tensor, hidden: int, maps: Sequence[Tensor]) -> Iterator[slice]:
    """Windows to work on at once, where a token has so many hidden channels and the units have these maps."""
    chunk = JOINT_CHUNK if any(each.ndim == 5 for each in maps) else CHUNK
    many = max(1, chunk // (hidden * tokens[0, 0].numel() * tokens.element_size()))
    for first in range(0, len(tokens), many):
        yield slice(first, min(first + many, len(tokens)))


def uv(hidden: Tensor, tokens: Tensor) -> Iterator[Tensor]:
    """Of ``[windows, units * 2C, T*N]`` each unit's u and v, ``[2, windows, C, T, N]``."""
    yield from hidden.unflatten(2, tokens.shape[2:]).unflatten(1, (-1, 2, tokens.shape[1])).permute(1, 2, 0, 3, 4, 5)


def by_unit(gated: Tensor, tokens: Tensor) -> Iterator[Tensor]:
    """Of ``[windows, units * C, T*N]``, with or without a row of ones below, what each unit gives."""
    channels = tokens.shape[1]
    for first in range(0, gated.shape[1] // channels * channels, channels):
        yield gated[:, first : first + channels].unflatten(2, tokens.shape[2:])


def with_ones(weight: Tensor, z: Tensor) -> Tensor:
    """What ``weight`` is to multiply: ``[windows, units * C + 1, T*N]``, ones in the last row and the rest not set."""
    gated = z.new_empty(len(z), weight.shape[1], z.shape[2])
    gated[:, -1] = 1
    return gated


def mix(maps: Tensor, u: Tensor) -> Tensor:
    """Tokens mixed by the maps of their groups; a new tensor like ``u``, ``[windows, C, T, N]``."""
    x = by_group(u, maps)
    if maps.ndim == 3:
        mixed = product(x, maps.mT)
    elif maps.ndim == 4:
        mixed = product(maps, x)
    else:
        mixed = joint_product(maps, x)
    return from_groups(mixed, u, maps)


def mix_backward(maps: Tensor, u: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``u`` and of ``maps``, where ``grad`` is that of ``mix``."""
    x, g = by_group(u, maps), by_group(grad, maps)
    if maps.ndim == 3:
        d_x, d_maps = product(g, maps), sum_of_windows(product(g.mT, x))
    elif maps.ndim == 4:
        d_x, d_maps = product(maps.mT, g), product(g, x.mT).sum((0, 2)).unsqueeze(1)
    else:
        d_maps, d_x = joint_backward(maps, x, g)
    return from_groups(d_x, u, maps), d_maps


def by_group(u: Tensor, maps: Tensor) -> Tensor:
    """``[windows, C, T, N]`` as what the maps of each group multiply: over space ``[windows, S, V*T, N]``, over time
    ``[windows, S, V, T, N]``, over both ``[S, windows * V, T, N]``."""
    if maps.ndim == 3:
        x = u.unflatten(1, (len(maps), -1)).flatten(2)
        return x.unflatten(2, (-1, maps.shape[-1]))  # the one place in a window of one token, too
    if maps.ndim == 4:
        return u.unflatten(1, (len(maps), -1))
    return u.unflatten(1, (maps.shape[1], -1)).transpose(0, 1).flatten(1, 2)


def from_groups(x: Tensor, like: Tensor, maps: Tensor) -> Tensor:
    """``by_group`` undone, for a tensor of the shape of ``like``."""
    if maps.ndim == 5:
        x = x.unflatten(1, (len(like), -1)).transpose(0, 1)
    return x.reshape(like.shape)


def channel_norm(x: Tensor, dtype: torch.dtype, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """LayerNorm without its affine over the channels of ``[windows, C, tokens]``, and 1 / deviation.

    Returns:
        ``[windows, C + 1, tokens]`` in the given type with a last row of ones, and fp32 ``[windows * tokens]``.
    """
    windows, channels, tokens = x.shape
    ones = torch.ones(windows * tokens)  # a weight in fp32 keeps the statistics in fp32
    # As the statistics of batch norm: of the channels of each of [C, windows * tokens].
    found, _, rstd = torch.native_batch_norm(columns(x), ones, torch.zeros_like(ones), None, None, True, 0.0, eps)
    normed = torch.empty(windows, channels + 1, tokens, dtype=dtype)
    normed[:, :-1] = found.view(channels, windows, tokens).transpose(0, 1)
    normed[:, -1] = 1
    return normed, rstd


def channel_norm_backward(grad: Tensor, normed: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of the ``x`` of ``channel_norm``, from that of its result without the ones; ``[windows, C, tokens]``."""
    windows, channels, tokens = grad.shape
    none, one, wanted = torch.zeros_like(rstd), torch.ones_like(rstd), [True, False, False]
    # What is normed already has mean 0 and deviation 1; the deviation of x comes in as a weight.
    columns_of = columns(grad), columns(normed[:, :-1])
    d_x, _, _ = torch.ops.aten.native_batch_norm_backward(*columns_of, rstd, None, None, none, one, True, 0.0, wanted)
    return d_x.view(channels, windows, tokens).transpose(0, 1)


def sum_of_windows(x: Tensor) -> Tensor:
    """Over the first axis; where there is one window, no copy."""
    return x[0] if len(x) == 1 else x.sum(0)


def columns(x: Tensor) -> Tensor:
    """``[windows, C, tokens]`` as ``[C, windows * tokens]``; a view where there is one window."""
    return x.transpose(0, 1).flatten(1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` for matrices, or batches of them that broadcast."""
    if not ONEDNN or a.dtype != torch.float32 or a.shape[-2:].numel() * b.shape[-1] < LARGE:
        return a @ b
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = a.expand(*batch, -1, -1), b.expand(*batch, -1, -1)
    if batch.numel() == 1:  # spares a copy
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
        """Lets ``torch.utils.flop_counter`` count the op: a multiply and an add for each of [.., K] x [N, K]."""
        return 2 * x_shape.numel() * weight_shape[0]
