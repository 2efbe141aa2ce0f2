"""Predictions for labelled videos: combine the scores of a video's views, and compute the metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from posmlp.metrics import VAL_CLASS_MEAN, VAL_LOSS, VAL_TOP1, VAL_TOP5, VAL_VIDEOS


def video_scores(view_scores: Tensor) -> Tensor:
    """Average the probabilities of each video's views.

    Args:
        view_scores: float ``[videos, views, classes]``, log-probabilities.

    Returns:
        float ``[videos, classes]``, log-probabilities, in which small probabilities keep their order.
    """
    return view_scores.logsumexp(1) - math.log(view_scores.shape[1])


@dataclass
class ClassificationMetrics:
    """Counts over videos, from which accuracies follow. Counts of several workers add up.

    Attributes:
        confusion: float64 ``[classes, classes]``, number of videos by true class (row) and predicted class (column).
        loss: float64 scalar, sum of the videos' losses.
        top5: float64 scalar, number of videos whose class is among the five likeliest.
    """

    confusion: Tensor
    loss: Tensor
    top5: Tensor

    @classmethod
    def empty(cls, classes: int) -> ClassificationMetrics:
        """Counts of no videos yet."""
        zero = torch.zeros((), dtype=torch.float64)
        return cls(torch.zeros(classes, classes, dtype=torch.float64), zero, zero.clone())

    def add(self, scores: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Count a batch of videos.

        Args:
            scores: float ``[videos, classes]``, log-probabilities.
            labels: int64 ``[videos]``.
            weights: ``[videos]``, 1 for a video, 0 for padding.
        """
        counted = weights.cpu() > 0
        scores, labels = scores.cpu()[counted].double(), labels.cpu()[counted]
        ranked = scores.topk(min(5, scores.shape[1]), dim=1).indices
        classes = scores.shape[1]
        pairs = torch.bincount(labels * classes + ranked[:, 0], minlength=classes**2)
        self.confusion += pairs.view(classes, classes)
        self.loss += F.nll_loss(scores, labels, reduction="sum")
        self.top5 += (ranked == labels[:, None]).sum()

    def sum_over_workers(self) -> ClassificationMetrics:
        """Sum the counts of all workers. Collective: call it on every rank."""
        if not dist.is_initialized():
            return self
        sums = torch.cat([self.confusion.flatten(), self.loss.view(1), self.top5.view(1)])
        dist.all_reduce(sums)
        return ClassificationMetrics(sums[:-2].view_as(self.confusion), sums[-2], sums[-1])

    @property
    def videos(self) -> int:
        """Number of videos counted."""
        return int(self.confusion.sum())

    def metrics(self) -> dict[str, float]:
        """Compute the ``val/*`` metrics (``posmlp.metrics``); the class mean is over the classes that occur."""
        videos, of_class, hits = self.videos, self.confusion.sum(1), self.confusion.diag()
        present = of_class > 0
        return {
            VAL_LOSS: float(self.loss) / videos,
            VAL_TOP1: float(hits.sum()) / videos,
            VAL_TOP5: float(self.top5) / videos,
            VAL_CLASS_MEAN: float((hits[present] / of_class[present]).mean()),
            VAL_VIDEOS: float(videos),
        }
