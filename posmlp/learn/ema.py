"""The exponential moving average (EMA) of a model's weights. It is evaluated and saved instead of the live weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class WeightEMA:
    """The moving average of a model's parameters and buffers over the training steps.

    Update t (from 0) keeps the share ``min(decay, (1 + t) / (10 + t))`` of the average, so that the first weights do
    not dominate a short run (the rule of TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``). Each worker
    of a sharded model (FSDP2) averages its own shard.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.live = local_tensors(model)
        self.average = [x.detach().clone() for x in self.live]
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, refused: Tensor | None = None) -> None:
        """Add the model's live weights to the average.

        Args:
            refused: float32 scalar on the model's device; 1 leaves the average as it is, whatever the weights hold.
        """
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = list(zip(self.average, self.live, strict=True))
        averages = [a for a, _ in pairs if a.is_floating_point()]
        away = torch._foreach_sub(averages, [x for _, x in pairs if x.is_floating_point()])
        # a - (1 - keep) * (a - x) is a step of SGD. Its kernel is the one that a number on the device can skip.
        torch._fused_sgd_(
            averages,
            away,
            [],
            lr=1 - keep,
            weight_decay=0.0,
            momentum=0.0,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            found_inf=refused,
        )
        for a, x in pairs:
            if not x.is_floating_point():  # a counter
                a.copy_(x if refused is None else torch.where(refused > 0, a, x))
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the model holds the average; on exit it gets its live weights back."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the values of the model and the average."""
        if isinstance(self.model, FSDPModule):  # the whole parameters that it may have gathered are not exchanged
            self.model.reshard()
        for a, x in zip(self.average, self.live, strict=True):
            held = x.clone()
            x.copy_(a)
            a.copy_(held)


def local_tensors(model: nn.Module) -> list[Tensor]:
    """All parameters and buffers; this worker's shard of those that are sharded."""
    named: Mapping[str, Tensor] = model.state_dict()
    return [x.to_local() if isinstance(x, DTensor) else x for x in named.values()]
