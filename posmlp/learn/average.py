"""An exponential moving average of the weights, which is what gets evaluated and saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class WeightAverage:
    """The average of a model's parameters and buffers over the steps.

    Update t (from 0) keeps the share ``min(decay, (1 + t) / (10 + t))`` of the average, so that a short run is not held
    back by its first weights (the rule of TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``). Of a sharded
    model (FSDP2) each worker averages its own shard.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.live = tensors_of(model)
        self.average = [x.detach().clone() for x in self.live]
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        floats = [(a, x) for a, x in zip(self.average, self.live, strict=True) if x.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floats], [x for _, x in floats], 1 - keep)
        for a, x in zip(self.average, self.live, strict=True):
            if not x.is_floating_point():  # a counter
                a.copy_(x)
        self.updates += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average's values, for a while."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the values of the model and the average."""
        for a, x in zip(self.average, self.live, strict=True):
            held = x.clone()
            x.copy_(a)
            a.copy_(held)


def tensors_of(model: nn.Module) -> list[Tensor]:
    """All parameters and buffers; of sharded ones this worker's shard."""
    named: Mapping[str, Tensor] = model.state_dict()
    return [x.to_local() if isinstance(x, DTensor) else x for x in named.values()]
