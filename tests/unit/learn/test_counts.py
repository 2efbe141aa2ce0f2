"""Counts of predictions over many batches and several workers, against plain counting."""

import numpy as np
import pytest
import torch

from posmlp.learn.evaluation import (
    ClassificationMetrics,
    ClassResult,
    best_and_worst,
    class_results,
    per_class_csv,
    video_scores,
)


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
    assert counts.top5.sum().item() == top5
    assert 0 < top5 < counts.videos


def test_counts_stay_exact_when_they_are_large():
    """16,777,217 is the first whole number that float32 does not have."""
    counts = counted(predictions(1, 2), classes=2)
    for tensor in (counts.confusion, counts.loss, counts.top5):
        tensor.fill_(2**24)
    counts.add(torch.tensor([[0.0, -1e4]]), torch.tensor([0]), torch.ones(1))
    assert counts.confusion[0, 0].item() == counts.top5[0].item() == 16_777_217
    counts.add(torch.tensor([[0.0, -1.0]]), torch.tensor([1]), torch.ones(1))
    assert counts.loss.item() == 16_777_217


def test_with_fewer_than_five_classes_every_video_is_in_the_top_5():
    counts = counted(predictions(20, 3), classes=3)
    assert counts.top5.sum().item() == counts.videos > 10


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
    assert len({found.loss.item(), found.top5.sum().item(), found.videos}) == 3


def test_the_views_of_a_video_are_averaged_as_probabilities():
    views = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.7, 0.2]]]).log()
    torch.testing.assert_close(video_scores(views, "probabilities").exp(), torch.tensor([[0.3, 0.5, 0.2]]))


def test_the_logits_of_a_videos_views_are_averaged_on_request():
    logits = torch.randn(5, 3, 7, generator=torch.manual_seed(0))
    found = video_scores(logits.log_softmax(2), "logits")
    torch.testing.assert_close(found, logits.sum(1).div(3).log_softmax(1))
    assert found.argmax(1).tolist() == logits.numpy().sum(1).argmax(1).tolist()


# --- per class --------------------------------------------------------------------------------------------------


def test_the_figures_of_each_class_equal_plain_counting():
    batches = [predictions(40, 7, seed=seed) for seed in (1, 2)]
    counts = counted(*batches)
    names = list("abcdefg")
    for label, found in enumerate(class_results(counts.confusion, counts.top5, names)):
        mine = [
            sorted(range(7), key=lambda k, score=score: -score[k])
            for scores, labels, weights in batches
            for score, each, weight in zip(scores.tolist(), labels.tolist(), weights.tolist(), strict=True)
            if weight and each == label
        ]
        wrong = [order[0] for order in mine if order[0] != label]
        assert found.videos == len(mine) > 0
        assert found.top1 == pytest.approx(sum(order[0] == label for order in mine) / len(mine))
        assert found.top5 == pytest.approx(sum(label in order[:5] for order in mine) / len(mine))
        assert found.confused == max(wrong.count(k) for k in range(7))
        assert wrong.count(names.index(found.confused_with)) == found.confused


def test_the_table_of_classes():
    confusion = torch.tensor([[3.0, 1, 0], [0, 0, 0], [0, 0, 2]], dtype=torch.float64)
    results = class_results(confusion, torch.tensor([4.0, 0, 2]), ["run, fast", "walk", "jump"])
    assert per_class_csv(results).decode() == (
        "label,class,videos,top1,top5,confused_with,confused\n"
        '0,"run, fast",4,0.75,1.0,walk,1\n'
        "1,walk,0,,,,0\n"
        "2,jump,2,1.0,1.0,,0\n"
    )


@pytest.mark.parametrize(
    ("shares", "best", "worst"),
    [
        ([0.5, None, 0.9, 0.1, 0.7, 0.3, 0.8, 0.2], [2, 6, 4], [3, 7, 5]),
        ([0.5, 0.9, 0.1], [1, 0], [2]),
        ([1.0, 1.0, 0.5, 1.0], [0, 1], [2]),
        ([None, 0.4], [1], []),
        ([0.0, 0.3, 0.0, 0.0], [1], [0, 2, 3]),
        ([0.0, 0.0, None], [], [0, 1]),
        ([], [], []),
    ],
)
def test_the_best_and_the_worst_classes(shares, best, worst):
    classes = [ClassResult(str(i), 10 * (x is not None), x, x, "", 0) for i, x in enumerate(shares)]
    found = best_and_worst(classes)
    assert [[int(c.name) for c in part] for part in found] == [best, worst]
