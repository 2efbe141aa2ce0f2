"""A batch of decoded clips: what one training or evaluation step works on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from posmlp.errors import BadVideo


@dataclass(frozen=True)
class Boxes:
    """The boxes of a batch of key frames, those of a clip after each other and in the order of the clips.

    Attributes:
        corners: float32 ``[N, 4]``, x1, y1, x2, y2 as fractions of the clip's picture.
        clip: int64 ``[N]``, number of each box's clip in the batch.
        number: int64 ``[N]``, number of each box in its row of the list; on the CPU.
        counts: int64 ``[B]``, number of boxes of each clip; on the CPU.
    """

    corners: Tensor
    clip: Tensor
    number: Tensor
    counts: Tensor

    def of_clips(self, start: int, stop: int) -> tuple[Boxes, slice]:
        """The boxes of the clips from ``start`` to before ``stop``, and where they are."""
        ends = np.cumsum([0, *self.counts.tolist()])
        place = slice(int(ends[start]), int(ends[min(stop, len(self.counts))]))
        own = (self.number[place], self.counts[start:stop])
        return Boxes(self.corners[place], self.clip[place] - start, *own), place


@dataclass(frozen=True)
class Batch:
    """The clips of one step on one worker.

    The clips of one video are adjacent: in training its ``data.repeats`` clips, in validation its ``eval.clips`` x
    ``eval.crops`` views.

    Attributes:
        clips: uint8 ``[B, T, H, W, 3]``, RGB.
        labels: of recognition, int64 ``[B]``; of detection, float32 ``[N, classes]``, 1 for each action of a box.
        weights: float32 ``[B]``, 1 for a clip that counts, 0 for padding (a bad video, or the rest of the last batch).
        seeds: int64 ``[B]``, not negative; a clip's random numbers come from its seed (``posmlp.video.augment``).
        rows: int64 ``[B]``, the row of each clip in the list; on the CPU. None: not known.
        boxes: of detection.
        bad: the videos of the batch that could not be decoded.
        decoded_by_pyav: number of its videos that PyAV had to decode in place of decord.
    """

    clips: Tensor
    labels: Tensor
    weights: Tensor
    seeds: Tensor
    rows: Tensor | None = None
    boxes: Boxes | None = None
    bad: tuple[BadVideo, ...] = ()
    decoded_by_pyav: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, by name."""
        tensors = {"clips": self.clips, "labels": self.labels, "weights": self.weights, "seeds": self.seeds}
        if self.rows is not None:
            tensors["rows"] = self.rows
        if self.boxes is not None:
            tensors |= {f"boxes.{name}": tensor for name, tensor in vars(self.boxes).items()}
        return tensors

    def to(self, device: torch.device) -> Batch:
        """The batch on the device; seeds, rows and numbers stay on the CPU, where they are read."""
        return self.with_tensors(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in pinned memory, from which a GPU copies while the host goes on; what is pinned stays."""
        return self.with_tensors(Tensor.pin_memory)

    def with_tensors(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with a function's results in place of the tensors that the device reads."""
        clips, labels, weights = map(function, (self.clips, self.labels, self.weights))
        boxes = self.boxes
        if boxes is not None:
            boxes = replace(boxes, corners=function(boxes.corners), clip=function(boxes.clip))
        return replace(self, clips=clips, labels=labels, weights=weights, boxes=boxes)

    def micro_batches(self, size: int) -> Iterator[Batch]:
        """Split the batch, in order, into micro-batches of ``size`` clips; the last may be smaller."""
        for start in range(0, len(self.clips), size):
            yield self.slice(start, start + size)

    def slice(self, start: int, stop: int) -> Batch:
        """The clips from ``start`` to before ``stop``."""
        own = slice(start, stop)
        labels, boxes = self.labels[own], self.boxes
        if boxes is not None:
            boxes, place = boxes.of_clips(start, stop)
            labels = self.labels[place]
        rows = None if self.rows is None else self.rows[own]
        return Batch(self.clips[own], labels, self.weights[own], self.seeds[own], rows, boxes)
