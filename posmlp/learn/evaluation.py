"""Predictions for labelled videos: combine the scores of a video's views, and compute the metrics."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from posmlp.config import Fusion
from posmlp.metrics import VAL_CLASS_MEAN, VAL_LOSS, VAL_TOP1, VAL_TOP5, VAL_VIDEOS


def video_scores(view_scores: Tensor, fusion: Fusion) -> Tensor:
    """Average the probabilities, or the logits, of each video's views.

    The classes are in the order of the sum of the views' logits, if these are averaged: log-probabilities are logits
    but for a constant of each view.

    Args:
        view_scores: float ``[videos, views, classes]``, log-probabilities.
        fusion: ``eval.fusion``.

    Returns:
        float ``[videos, classes]``, log-probabilities, in which small probabilities keep their order.
    """
    if fusion == "logits":
        return view_scores.mean(1).log_softmax(1)
    return view_scores.logsumexp(1) - math.log(view_scores.shape[1])


@dataclass(frozen=True)
class ClassResult:
    """The figures of one class.

    Attributes:
        videos: number of scored videos.
        top1, top5: accuracies, 0 to 1; None if there are no videos.
        confused_with: the wrong class that is predicted most often; "" if there is none.
        confused: number of videos for which it is predicted.
    """

    name: str
    videos: int
    top1: float | None
    top5: float | None
    confused_with: str
    confused: int


@dataclass
class ClassificationMetrics:
    """Counts over videos, from which accuracies follow. Counts of several workers add up.

    Attributes:
        confusion: float64 ``[classes, classes]``, number of videos by true class (row) and predicted class (column).
        loss: float64 scalar, sum of the videos' losses.
        top5: float64 ``[classes]``, number of videos of each class that is among their five likeliest.
    """

    confusion: Tensor
    loss: Tensor
    top5: Tensor

    @classmethod
    def empty(cls, classes: int) -> ClassificationMetrics:
        """Counts of no videos yet."""
        zeros = torch.zeros(classes, classes, dtype=torch.float64)
        return cls(zeros, torch.zeros((), dtype=torch.float64), zeros[0].clone())

    def add(self, scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Count a batch of videos.

        Returns:
            int8 ``[videos]``, on the CPU: 1 if the likeliest class is right, 0 if it is wrong, -1 for padding.

        Args:
            scores: float ``[videos, classes]``, log-probabilities.
            labels: int64 ``[videos]``.
            weights: ``[videos]``, 1 for a video, 0 for padding.
        """
        counted = weights.cpu() > 0
        scores, labels = scores.cpu()[counted].double(), labels.cpu()[counted]
        ranked = scores.topk(min(5, scores.shape[1]), dim=1).indices
        ones = torch.ones(len(labels), dtype=torch.float64)
        self.confusion.index_put_((labels, ranked[:, 0]), ones, accumulate=True)
        self.loss += F.nll_loss(scores, labels, reduction="sum")
        self.top5.index_add_(0, labels, (ranked == labels[:, None]).any(1).double())
        hits = torch.full(counted.shape, -1, dtype=torch.int8)
        hits[counted] = (ranked[:, 0] == labels).to(torch.int8)
        return hits

    def sum_over_workers(self) -> ClassificationMetrics:
        """Sum the counts of all workers. Collective: call it on every rank."""
        if not dist.is_initialized():
            return self
        sums = torch.cat([self.loss.view(1), self.top5, self.confusion.flatten()])
        dist.all_reduce(sums)
        loss, top5, confusion = sums.split([1, len(self.top5), self.confusion.numel()])
        return ClassificationMetrics(confusion.view_as(self.confusion), loss[0], top5)

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
            VAL_TOP5: float(self.top5.sum()) / videos,
            VAL_CLASS_MEAN: float((hits[present] / of_class[present]).mean()),
            VAL_VIDEOS: float(videos),
        }


def class_results(confusion: Tensor, top5: Tensor, names: Sequence[str]) -> list[ClassResult]:
    """The figures of each class, by label.

    Args:
        confusion, top5: as of ``ClassificationMetrics``.
        names: of the classes, by label.
    """
    results = []
    for label, name in enumerate(names):
        row = confusion[label].clone()
        videos, right = int(row.sum()), float(row[label])
        row[label] = 0
        confused = int(row.max())
        top1_share, top5_share = (right / videos, float(top5[label]) / videos) if videos else (None, None)
        confused_with = names[int(row.argmax())] if confused else ""
        results.append(ClassResult(name, videos, top1_share, top5_share, confused_with, confused))
    return results


def per_class_csv(classes: Iterable[ClassResult]) -> bytes:
    """The content of ``per_class.csv``: one ``ClassResult`` per line, by label."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["label", "class", "videos", "top1", "top5", "confused_with", "confused"])
    for label, c in enumerate(classes):
        writer.writerow([label, c.name, c.videos, c.top1, c.top5, c.confused_with, c.confused])
    return text.getvalue().encode()


def best_and_worst(classes: Iterable[ClassResult], count: int = 3) -> tuple[list[ClassResult], list[ClassResult]]:
    """The classes with the highest top-1, the best first, and those with the lowest, the worst first.

    No class is in both. None without a hit is among the best, and none without a mistake among the worst; classes
    without videos are in neither. Of equal ones the larger class comes first.

    Args:
        count: the most classes in each.
    """
    ranked = sorted((c for c in classes if c.top1 is not None), key=lambda c: (-(c.top1 or 0.0), -c.videos))
    best = [c for c in ranked[: min(count, (len(ranked) + 1) // 2)] if c.top1]
    rest = [c for c in ranked[len(best) :] if c.top1 != 1]
    return best, sorted(rest, key=lambda c: (c.top1 or 0.0, -c.videos))[:count]
