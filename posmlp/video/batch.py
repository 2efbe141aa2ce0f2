"""A batch of decoded clips: what one training or evaluation step works on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """The clips of one step on one worker.

    The clips of one video are adjacent: in training its ``data.repeats`` clips, in validation its ``eval.clips`` x
    ``eval.crops`` views.

    Attributes:
        clips: uint8 ``[B, T, H, W, 3]``, RGB.
        labels: int64 ``[B]``.
        weights: float32 ``[B]``, 1 for a clip that counts, 0 for padding (a bad video, or the rest of the last batch).
        seeds: int64 ``[B]``, not negative; a clip's random numbers come from its seed (``posmlp.video.augment``).
    """

    clips: Tensor
    labels: Tensor
    weights: Tensor
    seeds: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on the device; seeds stay on the CPU, where they are read."""
        clips, labels, weights = (x.to(device, non_blocking=True) for x in (self.clips, self.labels, self.weights))
        return replace(self, clips=clips, labels=labels, weights=weights)

    def micro_batches(self, size: int) -> Iterator[Batch]:
        """Split the batch, in order, into micro-batches of ``size`` clips; the last may be smaller."""
        columns = (x.split(size) for x in (self.clips, self.labels, self.weights, self.seeds))
        for columns_of_one in zip(*columns, strict=True):
            yield Batch(*columns_of_one)
