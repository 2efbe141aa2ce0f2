"""Distributed training of a model: DDP or FSDP2, synchronised batch norm, activation recomputation, ``torch.compile``.

Uses ``torch.distributed`` where it is initialised, and never Ray.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from posmlp.learn.finetune import freeze_parts
from posmlp.model.backbone import PosMLPVideo, Stage
from posmlp.model.supernet import Supernet

if TYPE_CHECKING:  # it needs pydantic
    from posmlp.config import Config


def world_size() -> int:
    """Number of training workers; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This worker's rank, from 0; 0 without ``torch.distributed``."""
    return dist.get_rank() if dist.is_initialized() else 0


def mean_over_workers(values: Iterable[float]) -> list[float]:
    """Average each number over all workers. Collective: call it on every rank."""
    return cast(list[float], average_over_workers(torch.tensor(list(values), dtype=torch.float64)).tolist())


def average_over_workers(numbers: Tensor) -> Tensor:
    """Average a tensor over all workers, in place. Collective: call it on every rank.

    With NCCL the host only starts it; with gloo it waits for the other workers.
    """
    if world_size() > 1:
        dist.all_reduce(numbers)
        numbers /= world_size()
    return numbers


def parallelise(model: PosMLPVideo, config: Config, device: torch.device) -> nn.Module:
    """Move the model to the device and wrap it for training. Load its weights before: FSDP shards the parameters.

    Args:
        model: has the same weights on all workers.
        config: the recipe, for ``train.compile``, ``.recompute``, ``.sync_batch_norm``, ``scaling.parallel`` and
            ``optim.freeze``.
        device: this worker's device.

    Returns:
        The model itself, with FSDP a sharded one, or ``DistributedDataParallel`` around it.
    """
    distributed = world_size() > 1
    freeze_parts(model, config.optim.freeze)  # before the wrappers look at the parameters
    model.to(device)
    if distributed and config.train.sync_batch_norm:
        if device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        else:
            for module in model.modules():
                if isinstance(module, nn.BatchNorm3d):
                    module.__class__ = SyncBatchNorm
    for stage in model.stages:
        cast(Stage, stage).recompute = config.train.recompute
    if config.train.compile:
        model.compile()
    if not distributed:
        return model
    if config.scaling.parallel == "fsdp":
        mesh = dist.init_device_mesh(device.type, (world_size(),))
        for stage in model.stages:
            fully_shard(stage, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    # A supernet's step uses the parameters of its paths alone.
    unused = isinstance(model, Supernet)
    return DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=unused)


def gradient_sync(model: nn.Module, enabled: bool) -> AbstractContextManager[None]:
    """Context for one backward pass. Where disabled, gradients are not reduced over workers but accumulate locally.

    With gradient accumulation only the last micro-batch of a step has it enabled.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    elif isinstance(model, DistributedDataParallel) and not enabled:
        return model.no_sync()
    return nullcontext()


class SumOverWorkers(torch.autograd.Function):
    """Sum a tensor over all workers; the gradient is summed over all workers too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorm(nn.BatchNorm3d):
    """Batch norm over the clips of all workers, for devices that ``nn.SyncBatchNorm`` does not support (CPU)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[B, C, T, H, W]``; the shape stays."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        values = x.float()
        axes, count = (0, 2, 3, 4), SumOverWorkers.apply(torch.tensor(float(x.numel() // x.shape[1])))
        mean = SumOverWorkers.apply(values.sum(axes)) / count
        centred = values - mean.view(-1, 1, 1, 1)
        variance = SumOverWorkers.apply(centred.square().sum(axes)) / count  # of the centred values: no cancellation
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(variance * (count / (count - 1)), share)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return torch.addcmul(self.bias.view(-1, 1, 1, 1), centred, scale.view(-1, 1, 1, 1)).to(x.dtype)


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients together, over all shards; a scalar."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, dist.tensor.DTensor) else norm
