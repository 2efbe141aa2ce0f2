"""Plots show the right data, read from the figures before they become PNG."""

import numpy as np
import pytest

from pipelines.tracking import plots


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are made. Each is still rendered in full."""
    figures, to_png = [], plots.to_png
    monkeypatch.setattr(plots, "to_png", lambda figure: (figures.append(figure), to_png(figure))[1])
    return figures


def history(epochs, every=1):
    rows = [{"epoch": float(e), "train/loss": 1 / e} for e in range(1, epochs + 1)]
    for row in rows[every - 1 :: every]:
        row |= {"val/loss": 2 / row["epoch"], "val/top1": 0.5, "val/top5": 0.9}
    return rows


@pytest.mark.parametrize(("epochs", "every"), [(1, 1), (2, 1), (2, 2), (200, 5), (3, 9)])
def test_learning_curves_have_every_epoch_with_the_metric(drawn, epochs, every):
    assert plots.learning_curves(history(epochs, every))[:4] == b"\x89PNG"
    lines = {line.get_label(): line for axes in drawn[0].axes for line in axes.get_lines()}
    assert list(lines["train/loss"].get_xdata()) == list(range(1, epochs + 1))
    for name in ("val/loss", "val/top1", "val/top5"):
        assert list(lines[name].get_xdata()) == list(range(every, epochs + 1, every))
    for axes in drawn[0].axes:  # there is no epoch 1.5
        assert all(tick == int(tick) for tick in axes.get_xticks())


@pytest.mark.parametrize("classes", [1, 2, 8, 40, 174])
def test_a_confusion_matrix_has_the_shares_of_each_true_class(drawn, classes):
    counts = np.random.default_rng(0).integers(0, 9, (classes, classes)).astype(float)
    counts[0] = 0  # a class without videos
    assert plots.confusion_matrix(counts, [f"class {i}" for i in range(classes)])[:4] == b"\x89PNG"
    (image,) = drawn[0].axes[0].get_images()
    shown = np.asarray(image.get_array())
    np.testing.assert_allclose(shown[1:].sum(1), 1)
    assert not shown[0].any()
    np.testing.assert_allclose(shown[-1] * counts[-1].sum(), counts[-1])


def test_a_small_confusion_matrix_has_class_names_and_counts(drawn):
    plots.confusion_matrix(np.array([[3.0, 1.0], [0.0, 7.0]]), ["left"])
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["left", "1"]
    assert sorted(text.get_text() for text in axes.texts) == ["1", "3", "7"]


def test_with_many_classes_the_most_frequent_confusions_are_listed(drawn):
    counts = np.eye(50) * 10
    counts[4, 9], counts[7, 2] = 30, 10  # 75 % and 50 % of their classes
    plots.confusion_matrix(counts, [f"price in ${i}$ {'x' * i * 2}" for i in range(50)])
    (text,) = drawn[0].axes[1].texts
    lines = text.get_text().splitlines()[3:]
    assert [line.split()[0] for line in lines[::2]] == ["75%", "50%"]
    assert [line.rpartition("(")[2] for line in lines] == ["4)", "9)", "7)", "2)"]
    assert all(len(line) < 80 for line in lines)
