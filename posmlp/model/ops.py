"""Matrix products by the fastest exact kernel of the machine; the one place that chooses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

# PyTorch sends fp32 products on CPUs to MKL, which runs without AVX-512 on AMD processors. oneDNN, which PyTorch ships
# too, uses it: twice the speed there, at equal results (benchmarks/layout.py). This op reaches its linear kernel.
ONEDNN_FROM = 2**20  # multiply-adds of one product; a batch of smaller ones is faster as one call of PyTorch's
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` for ``[M, K]`` and ``[K, N]``, or for a batch ``[S, M, K]`` and ``[S, K, N]``."""
    fp32_on_cpu = a.device.type == "cpu" and a.dtype == b.dtype == torch.float32
    eager = not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    large = a.shape[-2] * a.shape[-1] * b.shape[-1] >= ONEDNN_FROM
    if HAS_ONEDNN and fp32_on_cpu and eager and large:
        return OneDnnMatmul.apply(a, b)
    return a @ b


class OneDnnMatmul(torch.autograd.Function):
    """``matmul`` in fp32 by oneDNN, forward and backward."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return onednn_product(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        return (
            onednn_product(grad, b.mT) if ctx.needs_input_grad[0] else None,
            onednn_product(a.mT, grad) if ctx.needs_input_grad[1] else None,
        )


def onednn_product(a: Tensor, b: Tensor) -> Tensor:
    """``matmul`` without autograd."""
    if a.ndim == 2:
        return torch.ops.mkldnn._linear_pointwise(a, b.mT, None, "none", [], "")
    return torch.stack([onednn_product(x, y) for x, y in zip(a, b, strict=True)])


if HAS_ONEDNN and torch.ops.mkldnn._linear_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def linear_flops(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any) -> int:
        """Lets ``torch.utils.flop_counter`` count the op: a multiply and an add for each of [.., K] x [N, K]."""
        return 2 * x_shape.numel() * weight_shape[0]
