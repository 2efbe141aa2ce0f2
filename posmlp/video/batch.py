"""A batch of decoded clips: what one training or evaluation step works on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from posmlp.errors import BadVideo


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
        bad: the videos of the batch that could not be decoded.
        decoded_by_pyav: number of its videos that PyAV had to decode in place of decord.
    """

    clips: Tensor
    labels: Tensor
    weights: Tensor
    seeds: Tensor
    bad: tuple[BadVideo, ...] = ()
    decoded_by_pyav: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, by name."""
        return {"clips": self.clips, "labels": self.labels, "weights": self.weights, "seeds": self.seeds}

    def to(self, device: torch.device) -> Batch:
        """The batch on the device; seeds stay on the CPU, where they are read."""
        clips, labels, weights = (x.to(device, non_blocking=True) for x in (self.clips, self.labels, self.weights))
        return replace(self, clips=clips, labels=labels, weights=weights)

    def pin_memory(self) -> Batch:
        """The batch in pinned memory, from which a GPU copies while the host goes on; what is pinned stays."""
        clips, labels, weights = (x.pin_memory() for x in (self.clips, self.labels, self.weights))
        return replace(self, clips=clips, labels=labels, weights=weights)

    def micro_batches(self, size: int) -> Iterator[Batch]:
        """Split the batch, in order, into micro-batches of ``size`` clips; the last may be smaller."""
        columns = (x.split(size) for x in self.tensors().values())
        for columns_of_one in zip(*columns, strict=True):
            yield Batch(*columns_of_one)
