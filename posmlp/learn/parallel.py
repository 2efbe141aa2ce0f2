"""A model on its device and over several workers: DDP or FSDP2, batch norm of all workers' clips, recomputation,
``torch.compile``. Nothing here needs Ray: only ``torch.distributed``, where it is initialised.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from posmlp.config import Config
from posmlp.model.backbone import PosMLPVideo, Stage
from posmlp.model.supernet import Supernet


def workers() -> int:
    """Number of workers that train together; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This worker's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def average(values: Iterable[float | Tensor]) -> list[float]:
    """Each number's mean over all workers. Every worker must call."""
    numbers = torch.tensor([float(v) for v in values], dtype=torch.float64)
    if workers() > 1:
        dist.all_reduce(numbers)
        numbers /= workers()
    return cast(list[float], numbers.tolist())


def parallelise(model: PosMLPVideo, config: Config, device: torch.device) -> nn.Module:
    """The model as it trains. Its parameters become the device's; weights must be loaded before.

    Args:
        model: all workers' have the same weights.
        config: the recipe, for ``train.compile``, ``.recompute``, ``.sync_batch_norm`` and ``scaling.parallel``.
        device: this worker's.
    """
    several = workers() > 1
    model.to(device)
    if several and config.train.sync_batch_norm:
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
    if not several:
        return model
    if config.scaling.parallel == "fsdp":
        mesh = dist.init_device_mesh(device.type, (workers(),))
        for stage in model.stages:
            fully_shard(stage, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    # A supernet's step leaves out what is not on its path.
    unused = isinstance(model, Supernet)
    return DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=unused)


def gradients_summed(model: nn.Module, now: bool) -> AbstractContextManager[None]:
    """Whether a backward pass adds up the workers' gradients, or leaves that to a later one of the same step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
    elif isinstance(model, DistributedDataParallel) and not now:
        return model.no_sync()
    return nullcontext()


class SumOverWorkers(torch.autograd.Function):
    """The sum of all workers' tensors; its gradient is the sum of theirs."""

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
    """Batch norm over the clips of all workers, for devices that ``nn.SyncBatchNorm`` does not know (CPU)."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W]`` to the same."""
        if not self.training or workers() == 1:
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
    """The 2-norm of all gradients together, a scalar; of all shards."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, dist.tensor.DTensor) else norm
