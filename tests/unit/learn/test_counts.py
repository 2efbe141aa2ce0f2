"""Counts of predictions over many batches and several workers, against plain counting."""

import numpy as np
import pytest
import torch

from posmlp.learn.evaluation import ClassificationMetrics, video_scores


def predictions(count, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(count, classes, generator=generator).log_softmax(1)
    labels = torch.randint(classes, (count,), generator=generator)
    return scores, labels, (torch.rand(count, generator=generator) < 0.8).float()


def counted(*batches, classes=7):
    counts = ClassificationMetrics.empty(classes)
    for batch in batches:
        counts.add(*batch)
    return counts


def test_batches_add_up():
    batches = [predictions(count, 7, seed=count) for count in (5, 1, 9)]
    counts = counted(*batches)
    confusion, loss, top5 = np.zeros((7, 7)), 0.0, 0
    for scores, labels, weights in batches:
        for score, label, weight in zip(scores.tolist(), labels.tolist(), weights.tolist(), strict=True):
            if weight:
                order = sorted(range(7), key=lambda k, score=score: -score[k])
                confusion[label, order[0]] += 1
                loss -= score[label]
                top5 += label in order[:5]
    assert counts.confusion.tolist() == confusion.tolist()
    assert counts.videos == confusion.sum() == sum(int(weights.sum()) for *_, weights in batches)
    assert counts.loss.item() == pytest.approx(loss)
    assert counts.top5.item() == top5
    assert 0 < top5 < counts.videos


def test_counts_stay_exact_when_they_are_large():
    """16,777,217 is the first whole number that float32 does not have."""
    counts = counted(predictions(1, 2), classes=2)
    for tensor in (counts.confusion, counts.loss, counts.top5):
        tensor.fill_(2**24)
    counts.add(torch.tensor([[0.0, -1e4]]), torch.tensor([0]), torch.ones(1))
    assert counts.confusion[0, 0].item() == counts.top5.item() == 16_777_217
    counts.add(torch.tensor([[0.0, -1.0]]), torch.tensor([1]), torch.ones(1))
    assert counts.loss.item() == 16_777_217


def test_with_fewer_than_five_classes_every_video_is_in_the_top_5():
    counts = counted(predictions(20, 3), classes=3)
    assert counts.top5.item() == counts.videos > 10


def test_the_sum_over_workers_is_of_every_count(monkeypatch):
    """The other worker is made up: it has the same counts twice more."""
    counts = counted(predictions(12, 7))
    before = [x.clone() for x in (counts.confusion, counts.loss, counts.top5)]
    assert counts.sum_over_workers() is counts, "alone"
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(3))
    found = counts.sum_over_workers()
    for now, then in zip((found.confusion, found.loss, found.top5), before, strict=True):
        torch.testing.assert_close(now, 3 * then)
    assert found.videos == 3 * counts.videos
    assert len({found.loss.item(), found.top5.item(), found.videos}) == 3


def test_the_views_of_a_video_are_averaged_as_probabilities():
    views = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.7, 0.2]]]).log()
    torch.testing.assert_close(video_scores(views).exp(), torch.tensor([[0.3, 0.5, 0.2]]))
