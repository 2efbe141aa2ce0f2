"""The gate on CUDA devices: a differentiable operator that fuses the several kernels of ``PositionGate`` into one.

``PositionGate.forward`` calls ``gate`` wherever ``supports`` is true. As a custom operator it causes no graph break in
``torch.compile``, and works with autocast, activation checkpointing and DDP like PyTorch's own operators. The kernels
are in ``gpu_kernels.py``, which needs Triton and is imported when the first gate runs.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, library

TYPES = (torch.float32, torch.bfloat16, torch.float16)
HAS_TRITON = importlib.util.find_spec("triton") is not None


def supports(u: Tensor, v: Tensor) -> bool:
    """Return whether ``gate`` accepts these inputs: one dtype, fp32 or half precision, on a device with the kernels."""
    return u.dtype == v.dtype and u.dtype in TYPES and has_kernels(u.device)


def has_kernels(device: torch.device) -> bool:
    """Return whether the kernels run on a device: an NVIDIA GPU of compute capability 8.0 or later, with Triton."""
    if device.type != "cuda" or torch.version.cuda is None or not HAS_TRITON:
        return False
    return torch.cuda.get_device_properties(device).major >= 8  # a constant to torch.compile


@library.custom_op("posmlp::gate", mutates_args=())
def gate(u: Tensor, v: Tensor, table: Tensor, bias: Tensor, window: list[int], extent: list[int]) -> Tensor:
    """Compute ``(P u + bias) * v`` with P gathered from the table inside the kernel, summed in fp32.

    Args:
        u, v: ``[C, B, W, T, N]``, T and N the tokens of ``extent``; two contiguous halves of one tensor are not copied.
            Padded tokens must be zero in u.
        table: ``[S, (2t-1)(2h-1)(2w-1)]`` for the window (t, h, w); S divides C.
        bias: ``[t*h*w]``.
        window: tokens (t, h, w) to which table and bias belong.
        extent: tokens along time, height, width that a window of the input has.

    Returns:
        Same shape and dtype as u, contiguous. Gradients of table and bias have the dtypes of table and bias. There are
        no second derivatives.
    """
    from posmlp.model import gpu_kernels

    with torch.cuda.device_of(u):
        lines = gpu_kernels.find_lines(tuple(window), tuple(extent))
        return gpu_kernels.forward(u.contiguous(), v.contiguous(), table.contiguous(), bias.contiguous(), lines)


@gate.register_fake
def _(u: Tensor, v: Tensor, table: Tensor, bias: Tensor, window: list[int], extent: list[int]) -> Tensor:
    return u.new_empty(u.shape)


@library.custom_op("posmlp::gate_backward", mutates_args=())
def gate_backward(
    grad: Tensor, u: Tensor, v: Tensor, table: Tensor, bias: Tensor, window: list[int], extent: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, v, table and bias; ``grad`` is the gradient of the result of ``gate`` for the other arguments."""
    from posmlp.model import gpu_kernels

    with torch.cuda.device_of(u):
        lines = gpu_kernels.find_lines(tuple(window), tuple(extent))
        grad, u, v, table, bias = (each.contiguous() for each in (grad, u, v, table, bias))
        return gpu_kernels.backward(grad, u, v, table, bias, lines)


@gate_backward.register_fake
def _(
    grad: Tensor, u: Tensor, v: Tensor, table: Tensor, bias: Tensor, window: list[int], extent: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    u, v, table, bias = (each.new_empty(each.shape) for each in (u, v, table, bias))
    return u, v, table, bias


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save the inputs of ``gate`` for the backward pass."""
    *tensors, ctx.window, ctx.extent = inputs
    ctx.save_for_backward(*tensors)


def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments of ``gate``; None for the last two."""
    return *gate_backward(grad, *ctx.saved_tensors, ctx.window, ctx.extent), None, None


gate.register_autograd(gradients, setup_context=save_for_backward)
