"""The gate on CUDA devices: an operator with gradients that does in one kernel what ``PositionGate`` does in several.

``PositionGate.forward`` calls it wherever ``serves`` says so. As a custom operator it goes through ``torch.compile``
unbroken, and autocast, checkpointing and DDP meet it like any of PyTorch's own. The kernels are in ``gpu_kernels.py``,
which needs Triton and is imported when the first gate runs.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, library

TYPES = (torch.float32, torch.bfloat16, torch.float16)
HAS_TRITON = importlib.util.find_spec("triton") is not None


def serves(u: Tensor, v: Tensor) -> bool:
    """Whether ``gate`` takes these two: of one type, fp32 or in half precision, on a device that it is made for."""
    return u.dtype == v.dtype and u.dtype in TYPES and capable(u.device)


def capable(device: torch.device) -> bool:
    """Whether the kernels run there: on NVIDIA's from compute capability 8.0, where there is Triton."""
    if device.type != "cuda" or torch.version.cuda is None or not HAS_TRITON:
        return False
    return torch.cuda.get_device_properties(device).major >= 8  # which a compiler knows as a constant


@library.custom_op("posmlp::gate", mutates_args=())
def gate(u: Tensor, v: Tensor, table: Tensor, bias: Tensor, window: list[int], extent: list[int]) -> Tensor:
    """``(P u + bias) * v`` with P gathered from the table on the way, summed in fp32.

    Args:
        u, v: ``[C, B, W, T, N]``, T and N the tokens of ``extent``; halves of one tensor are not copied. Padded tokens
            are zero in u.
        table: ``[S, (2t-1)(2h-1)(2w-1)]`` for the window (t, h, w); S divides C.
        bias: ``[t*h*w]``.
        window: tokens (t, h, w) that table and bias are made for.
        extent: tokens along time, height, width that a window of the input has.

    Returns:
        As u, contiguous. Gradients of table and bias are in their own types. Gradients of gradients are not known.
    """
    from posmlp.model import gpu_kernels

    with torch.cuda.device_of(u):
        line = gpu_kernels.lines(tuple(window), tuple(extent))
        return gpu_kernels.forward(u.contiguous(), v.contiguous(), table.contiguous(), bias.contiguous(), line)


@gate.register_fake
def _(u: Tensor, v: Tensor, table: Tensor, bias: Tensor, window: list[int], extent: list[int]) -> Tensor:
    return u.new_empty(u.shape)


@library.custom_op("posmlp::gate_backward", mutates_args=())
def gate_backward(
    grad: Tensor, u: Tensor, v: Tensor, table: Tensor, bias: Tensor, window: list[int], extent: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, v, table and bias, where ``grad`` is that of what ``gate`` gives for the other arguments."""
    from posmlp.model import gpu_kernels

    with torch.cuda.device_of(u):
        line = gpu_kernels.lines(tuple(window), tuple(extent))
        grad, u, v, table, bias = (each.contiguous() for each in (grad, u, v, table, bias))
        return gpu_kernels.backward(grad, u, v, table, bias, line)


@gate_backward.register_fake
def _(
    grad: Tensor, u: Tensor, v: Tensor, table: Tensor, bias: Tensor, window: list[int], extent: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    u, v, table, bias = (each.new_empty(each.shape) for each in (u, v, table, bias))
    return u, v, table, bias


def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What the backward pass needs."""
    *tensors, ctx.window, ctx.extent = inputs
    ctx.save_for_backward(*tensors)


def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the arguments of ``gate``."""
    return *gate_backward(grad, *ctx.saved_tensors, ctx.window, ctx.extent), None, None


gate.register_autograd(gradients, setup_context=keep)
