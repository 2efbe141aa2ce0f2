"""A step of a block on a CPU without a compiler: what ``Block.mix`` computes, with the backward pass written out.

The time goes into memory, so it works on chunks of whole windows that stay in cache, by kernels that PyTorch has:

- the bias of a linear layer rides in its matrix product, as one more column of the weight against a row of ones, and
  its gradient in the product of the backward pass;
- the norm over channels is the kernel of batch norm on the transposed view: one pass for the statistics and one for
  the result, where operations on whole tensors take six;
- what one pass over a chunk gives again (GELU, the product with v) is not kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import flop_registry, register_flop_formula

from posmlp.model.gates import by_group, over_time, toeplitz_backward, toeplitz_product

TYPES = (torch.float32, torch.bfloat16)

# PyTorch sends fp32 products on CPUs to MKL, which runs without AVX-512 on AMD processors. oneDNN, which PyTorch ships
# too, uses it: twice the speed there, at equal results (benchmarks/model.py). This op reaches its linear kernel.
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
CHUNK = 16 * 2**20  # bytes of hidden activations at once, at least a window
# Multiply-adds of one group's gate from which groups run one by one; smaller ones are faster in one batched product.
LARGE = {torch.float32: 2**20, torch.bfloat16: 2**24}


def serves(x: Tensor) -> bool:
    """Whether ``x`` can be worked on here: on a CPU, in a type of its fast kernels, neither compiled nor exported."""
    return x.device.type == "cpu" and {x.dtype, work_type(x)} <= {*TYPES} and not torch.compiler.is_compiling()


def work_type(x: Tensor) -> torch.dtype:
    """The type of the matrix products: autocast's, else that of ``x``."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def step(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, real: Tensor | None, *gates: Tensor) -> Tensor:
    """Sum of the branches of a step's units.

    Args:
        x: ``[C, B, W, T, N]``.
        w1, b1: of all units' fc1 with the norms folded in, ``[units * 2C, C]`` and ``[units * 2C]``: u and v of the
            first unit, then of the second.
        w2, b2: of all units' fc2 side by side, ``[C, units * C]``, and the sum of their biases, ``[C]``.
        real: ``[W, T, N]``, 0 at padded tokens; None if there are none.
        gates: for each unit its maps, as of ``PositionGate.position_map``, and its bias, ``[T or 1, N or 1]``.

    Returns:
        ``[C, B, W, T, N]`` in the type of the matrix products.
    """
    dtype, learned = work_type(x), (x, w1, b1, w2, b2, *gates)
    with torch.autocast("cpu", enabled=False):
        if torch.is_grad_enabled() and any(each.requires_grad for each in learned):
            return Step.apply(dtype, x, w1, b1, w2, b2, real, *gates)
        return forward(dtype, x, w1, b1, w2, b2, real, *gates, keep=False)[0]


def forward(
    dtype: torch.dtype,
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    real: Tensor | None,
    *gates: Tensor,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    """``step`` in the given type, and what its backward pass needs (nothing unless ``keep``)."""
    normed, mean, rstd = channel_norm(x.flatten(1))
    normed = normed.to(dtype)
    w1, w2 = (torch.cat([w, b[:, None]], 1).to(dtype) for w, b in ((w1, b1), (w2, b2)))
    maps, biases = ([each.to(dtype) for each in gates[i::2]] for i in (0, 1))
    out = torch.empty_like(x, dtype=dtype)
    kept = []
    for span, shape, mask in chunks(x, len(w1), dtype, real):
        z = product(w1, with_ones(normed[:, span]), gelu=not keep)  # [units * 2C, tokens]
        hidden = F.gelu(z) if keep else z
        gated = torch.ones(w2.shape[1], z.shape[1], dtype=dtype)
        if keep:
            kept.append(z)
        for (u, v), to, of, bias in zip(uv(hidden, shape), by_unit(gated, shape), maps, biases, strict=True):
            if mask is not None:
                u.mul_(mask)
            for groups, rows in parts(of, u):
                mixed = mix(of[groups], u[rows], bias)
                torch.mul(mixed, v[rows], out=to[rows])
                if keep:
                    kept.append(mixed)
        out.flatten(1)[:, span] = product(w2, gated)
    return out, [normed, mean, rstd, w1, w2, *kept] if keep else []


class Step(torch.autograd.Function):
    """``step`` with gradients."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *inputs: Any) -> Tensor:
        out, kept = forward(dtype, *inputs, keep=True)
        ctx.inputs = len(inputs)
        ctx.save_for_backward(*inputs, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # to be read once only, for the sake of activation checkpointing
        x, _, _, _, _, real, *gates = saved[: ctx.inputs]
        normed, mean, rstd, w1, w2, *kept = saved[ctx.inputs :]
        waiting, grad, back = iter(kept), grad.flatten(1), w1[:, :-1].mT.contiguous()
        maps = [each.to(w1.dtype) for each in gates[::2]]
        d_w1, d_w2, *d_gates = (torch.zeros_like(each, dtype=torch.float32) for each in (w1, w2, *gates))
        d_normed = torch.empty_like(normed)
        for span, shape, mask in chunks(x, len(w1), w1.dtype, real):
            z, d_out = next(waiting), grad[:, span].contiguous()
            hidden, d_hidden, d_gated = F.gelu(z), torch.empty_like(z), product(w2.mT, d_out)
            gated = torch.ones_like(d_gated)
            of_units = zip(
                uv(hidden, shape),
                uv(d_hidden, shape),
                by_unit(gated, shape),
                by_unit(d_gated, shape),
                maps,
                d_gates[::2],
                d_gates[1::2],
                strict=True,
            )
            for (u, v), (d_u, d_v), to, d_to, of, d_maps, d_bias in of_units:
                if mask is not None:
                    u.mul_(mask)
                for groups, rows in parts(of, u):
                    mixed = next(waiting)
                    torch.mul(mixed, v[rows], out=to[rows])
                    torch.mul(mixed, d_to[rows], out=d_v[rows])
                    d_mixed = d_to[rows].mul_(v[rows])
                    d_u[rows], d_map = mix_backward(of[groups], u[rows], d_mixed)
                    d_maps[groups] += d_map
                if mask is not None:
                    d_u.mul_(mask)
                d_bias += d_to.sum((0, 1)).sum_to_size(d_bias.shape)
            d_z = torch.ops.aten.gelu_backward.grad_input(d_hidden, z, grad_input=d_hidden)
            d_w1 += product(d_z, with_ones(normed[:, span]).mT)
            d_w2 += product(d_out, gated.mT)
            d_normed[:, span] = product(back, d_z)
        d_x = channel_norm_backward(d_normed, x.flatten(1), mean, rstd)
        return None, d_x.view(x.shape), d_w1[:, :-1], d_w1[:, -1], d_w2[:, :-1], d_w2[:, -1], None, *d_gates


Shape = tuple[int, int, int, int]  # [C, windows, T, N]
Chunk = tuple[slice, Shape, Tensor | None]


def chunks(x: Tensor, hidden: int, dtype: torch.dtype, real: Tensor | None) -> Iterator[Chunk]:
    """Tokens to work on at once, whole windows: their span in ``[C, tokens]``, shape, and part of ``real``."""
    channels, clips, windows, t, n = x.shape
    many = max(1, CHUNK // (hidden * t * n * dtype.itemsize))
    if real is not None:
        real = real.to(dtype).repeat(clips, 1, 1)
    for first in range(0, clips * windows, many):
        count = min(many, clips * windows - first)
        mask = None if real is None else real[first : first + count]
        yield slice(first * t * n, (first + count) * t * n), (channels, count, t, n), mask


def uv(hidden: Tensor, shape: Shape) -> Tensor:
    """``[units * 2C, tokens]`` as u and v of each unit, ``[units, 2, C, windows, T, N]``."""
    return hidden.view(-1, 2, *shape)


def by_unit(gated: Tensor, shape: Shape) -> Tensor:
    """``[units * C + 1, tokens]`` with a last row of ones as what each unit gives, ``[units, C, windows, T, N]``."""
    return gated[:-1].view(-1, *shape)


def parts(maps: Tensor, u: Tensor) -> Iterator[tuple[slice, slice]]:
    """Groups to run at once, and their channels: large ones over space one by one, else all."""
    channels = len(u) // len(maps)
    if maps.ndim == 4 or u[:channels].numel() * maps.shape[-1] < LARGE[u.dtype]:
        yield slice(None), slice(None)
    else:
        for s in range(len(maps)):
            yield slice(s, s + 1), slice(s * channels, (s + 1) * channels)


def mix(maps: Tensor, u: Tensor, bias: Tensor) -> Tensor:
    """Tokens mixed by the maps of their groups, and the bias; a new tensor like ``u``, ``[C, W, T, N]``."""
    x = by_group(u, maps)
    if maps.ndim == 3 and len(maps) == 1:
        return product(x[0], maps[0].mT, bias[0]).view(u.shape)
    if maps.ndim == 3:
        return (x @ maps.mT).view(u.shape).add_(bias)
    mixed = maps @ x if over_time(maps) else toeplitz_product(maps, x)
    return mixed.view(u.shape).add_(bias)


def mix_backward(maps: Tensor, u: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``u`` and of ``maps``, where ``grad`` is that of ``mix``."""
    x, g = by_group(u, maps), by_group(grad, maps)
    if maps.ndim == 3 and len(maps) == 1:
        d_x, d_maps = product(g[0], maps[0]), product(g[0].mT, x[0])[None]
    elif maps.ndim == 3:
        d_x, d_maps = g @ maps, g.mT @ x
    elif over_time(maps):
        d_x, d_maps = maps.mT @ g, (g @ x.mT).sum(1, keepdim=True)
    else:
        d_maps, d_x = toeplitz_backward(maps, x, g)
    return d_x.view(u.shape), d_maps


def channel_norm(x: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm without its affine over the first axis of ``[C, tokens]``; also mean and 1 / deviation, in fp32."""
    ones = torch.ones(x.shape[1])  # a weight in fp32 keeps the statistics in fp32
    return torch.native_batch_norm(x, ones, torch.zeros_like(ones), None, None, True, 0.0, eps)


def channel_norm_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, eps: float = 1e-5) -> Tensor:
    """Gradient of ``x``, in its type."""
    ones, wanted = torch.ones(x.shape[1]), [True, False, False]
    return torch.ops.aten.native_batch_norm_backward(
        grad.to(x.dtype), x, ones, None, None, mean, rstd, True, eps, wanted
    )[0]


def with_ones(x: Tensor) -> Tensor:
    """``[K, N]`` as ``[K + 1, N]``; contiguous, as oneDNN falls back to a plain loop for other operands."""
    return F.pad(x, (0, 0, 0, 1), value=1)


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """``a @ b`` for ``[M, K]`` and ``[K, N]``, plus a bias ``[N]``, then GELU if wanted."""
    if HAS_ONEDNN:
        then, form = ("gelu", "none") if gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(a, b.mT, bias, then, [], form)
    out = F.linear(a, b.mT, bias)
    return F.gelu(out) if gelu else out


if HAS_ONEDNN and torch.ops.mkldnn._linear_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def linear_flops(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any) -> int:
        """Lets ``torch.utils.flop_counter`` count the op: a multiply and an add for each of [.., K] x [N, K]."""
        return 2 * x_shape.numel() * weight_shape[0]
