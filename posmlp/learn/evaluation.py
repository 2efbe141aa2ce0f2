"""What a model makes of labelled videos: scores of their views, and the figures that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def video_scores(view_scores: Tensor) -> Tensor:
    """A video's prediction is the mean of its views' probabilities.

    Args:
        view_scores: float ``[videos, views, classes]``, logarithms of probabilities.

    Returns:
        float ``[videos, classes]``, logarithms: as these, small probabilities keep their order.
    """
    return view_scores.logsumexp(1) - math.log(view_scores.shape[1])


@dataclass
class Tally:
    """Counts over videos; those of several workers add up.

    Attributes:
        confusion: float64 ``[classes, classes]``, videos by true (row) and predicted (column) class.
        loss, top5: float64 scalars, sums over videos of the loss, and of hits among the five likeliest.
    """

    confusion: Tensor
    loss: Tensor
    top5: Tensor

    @classmethod
    def empty(cls, classes: int) -> Tally:
        """Nothing counted yet."""
        zero = torch.zeros((), dtype=torch.float64)
        return cls(torch.zeros(classes, classes, dtype=torch.float64), zero, zero.clone())

    def add(self, scores: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Count some videos.

        Args:
            scores: float ``[videos, classes]``, logarithms of probabilities.
            labels: int64 ``[videos]``.
            weights: ``[videos]``, 0 for a video that does not count, else 1.
        """
        counted = weights.cpu() > 0
        scores, labels = scores.cpu()[counted].double(), labels.cpu()[counted]
        ranked = scores.topk(min(5, scores.shape[1]), dim=1).indices
        classes = scores.shape[1]
        pairs = torch.bincount(labels * classes + ranked[:, 0], minlength=classes**2)
        self.confusion += pairs.view(classes, classes)
        self.loss += F.nll_loss(scores, labels, reduction="sum")
        self.top5 += (ranked == labels[:, None]).sum()

    def over_workers(self) -> Tally:
        """The sum of all workers' tallies. Every worker must call."""
        if not dist.is_initialized():
            return self
        sums = torch.cat([self.confusion.flatten(), self.loss.view(1), self.top5.view(1)])
        dist.all_reduce(sums)
        return Tally(sums[:-2].view_as(self.confusion), sums[-2], sums[-1])

    @property
    def videos(self) -> int:
        """Videos counted."""
        return int(self.confusion.sum())

    def metrics(self) -> dict[str, float]:
        """``val/*``: shares of the videos, and the mean of the classes' own shares, over classes that occur."""
        videos, of_class, hits = self.videos, self.confusion.sum(1), self.confusion.diag()
        present = of_class > 0
        return {
            "val/loss": float(self.loss) / videos,
            "val/top1": float(hits.sum()) / videos,
            "val/top5": float(self.top5) / videos,
            "val/class_mean": float((hits[present] / of_class[present]).mean()),
            "val/clips": float(videos),
        }
