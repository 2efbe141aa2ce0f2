"""Optimizer, schedule and steps."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from posmlp import create_model
from posmlp.config import OptimSection, load_recipe
from posmlp.errors import UserError
from posmlp.learn.learner import Batch, Learner
from posmlp.learn.optim import build_optimizer, learning_rate
from posmlp.video.augment import to_input, to_train_input

SMALL = ["model.frames=4", "model.image_size=32", "model.num_classes=8", "train.global_batch=8"]


def make_learner(*overrides, steps=5, classes=()):
    config = load_recipe("demo", [*SMALL, *overrides])
    torch.manual_seed(0)
    return Learner(create_model(config.model.name, **config.model.overrides()), config, steps, classes)


def make_batch(count=8, seed=0, classes=8):
    g = torch.Generator().manual_seed(seed)
    return Batch(
        clips=torch.randint(0, 256, (count, 4, 32, 32, 3), dtype=torch.uint8, generator=g),
        labels=torch.arange(count) % classes,
        weights=torch.ones(count),
        seeds=torch.randint(0, 2**63 - 1, (count,), generator=g),
    )


def test_rate_warms_up_linearly_then_follows_half_a_cosine():
    config = OptimSection(lr=1.0, min_lr=0.1, warmup_epochs=2)
    assert learning_rate(0, 10, config) == 0
    assert learning_rate(1, 10, config) == pytest.approx(0.5)
    assert learning_rate(2, 10, config) == pytest.approx(1.0)
    assert learning_rate(6, 10, config) == pytest.approx(0.55)  # half-way: the mean of both ends
    assert learning_rate(10, 10, config) == pytest.approx(0.1)
    assert learning_rate(4, 10, config) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


@given(st.floats(0, 60), st.floats(0, 20))
def test_rate_stays_within_its_bounds(epoch, warmup):
    config = OptimSection(lr=1e-3, min_lr=1e-6, warmup_epochs=warmup)
    assert 0 <= learning_rate(epoch, 60, config) <= 1e-3


def test_only_matrices_decay():
    model = create_model("tiny")
    decayed, free = build_optimizer(model, OptimSection(weight_decay=0.05)).param_groups
    assert decayed["weight_decay"] == 0.05
    assert free["weight_decay"] == 0
    named = {id(p): name for name, p in model.named_parameters()}
    assert all(named[id(p)].endswith(("bias", "norm.weight", "norm1.weight", "norm2.weight")) for p in free["params"])
    assert sum(len(g["params"]) for g in (decayed, free)) == len(named)


def test_a_step_is_adamw_on_the_mean_loss():
    """Against the same step written out with PyTorch's own pieces; targets are mixed one-hot vectors, smoothed."""
    mixing = ("augment.mixup=0.8", "augment.cutmix=1", "augment.erasing=0.5", "augment.randaug_layers=2")
    learner = make_learner("optim.label_smoothing=0.1", "optim.warmup_epochs=0", "optim.clip_grad=0.5", *mixing)
    twin = make_learner().raw
    twin.load_state_dict(learner.raw.state_dict())
    config, batch = learner.config, make_batch()
    optimizer = build_optimizer(twin, config.optim)
    twin.train()
    clips, targets = to_train_input(batch, config, torch.arange(8))
    assert not torch.equal(targets, F.one_hot(batch.labels, 8).float())
    loss = -((0.9 * targets + 0.1 / 8) * twin(clips).log_softmax(1)).sum(1).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    optimizer.step()
    assert learner.train_step(batch).item() == pytest.approx(loss.item())
    for a, b in zip(learner.raw.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_clips_of_weight_zero_do_not_train_and_do_not_count():
    batch = make_batch()
    weights = batch.weights.clone()
    weights[5:] = 0
    other = batch.labels.clone()
    other[5:] = 7 - other[5:]
    results = []
    for labels in (batch.labels, other):
        learner = make_learner()
        loss = learner.train_step(Batch(batch.clips, labels, weights, batch.seeds))
        results.append(
            (loss, learner.eval_step(Batch(batch.clips, labels, weights, batch.seeds)), learner.raw.head.bias)
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert results[0][1][3] == 5


def test_eval_sums_equal_a_plain_count():
    learner, batch = make_learner(), make_batch(16)
    sums = learner.eval_step(batch)
    with torch.no_grad():
        logits = learner.raw.eval()(to_input(batch.clips, learner.config)).numpy()
    order = np.argsort(-logits, axis=1)
    labels = batch.labels.numpy()
    assert sums[1] == (order[:, 0] == labels).sum()
    assert sums[2] == (order[:, :5] == labels[:, None]).any(1).sum()
    assert sums[0].item() == pytest.approx(
        F.cross_entropy(torch.from_numpy(logits), batch.labels).item() * 16, rel=1e-5
    )


@pytest.mark.parametrize(("clips", "crops"), [(1, 1), (2, 1), (2, 3)])
def test_the_views_of_a_video_are_averaged_as_probabilities(clips, crops):
    learner, views = make_learner(f"eval.clips={clips}", f"eval.crops={crops}"), clips * crops
    with torch.no_grad():
        learner.raw.head.weight.mul_(30)  # sure of itself, so that averages of logits would rank otherwise
    batch = make_batch(6 * views)
    labels, weights = torch.tensor([0, 3, 5, 1, 7, 2]), torch.tensor([1.0, 1, 0, 1, 1, 0])
    sums = learner.eval_step(
        Batch(batch.clips, labels.repeat_interleave(views), weights.repeat_interleave(views), batch.seeds)
    )
    expected = torch.zeros(4, dtype=torch.float64)
    for i in (0, 1, 3, 4):
        with torch.no_grad():
            logits = learner.raw.eval()(to_input(batch.clips[i * views : (i + 1) * views], learner.config))
        mean = logits.double().softmax(1).mean(0)
        place = int((mean > mean[labels[i]]).sum())
        expected += torch.tensor([-mean[labels[i]].log(), place == 0, place < 5, 1])
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-4)


def test_the_learner_flips_classes_by_name():
    names = [f"class {i}" for i in range(6)] + ["left", "right"]
    learner = make_learner("augment.flip_classes={left: right}", classes=names)
    assert learner.flipped.tolist() == [0, 1, 2, 3, 4, 5, 7, 6]
    assert make_learner("augment.flip_classes={'1': '0'}").flipped.tolist() == [1, 0, 2, 3, 4, 5, 6, 7]
    with pytest.raises(UserError, match=r"augment\.flip_classes.*'rihgt' \(did you mean 'right'\?\)"):
        make_learner("augment.flip_classes={left: rihgt}", classes=names)


def test_learning_goes_on_from_its_state_bit_for_bit(tmp_path):
    straight = make_learner("optim.ema=0.9", "model.drop_path=0.3")
    resumed = make_learner("optim.ema=0.9", "model.drop_path=0.3")
    for i in range(4):
        torch.manual_seed(i)
        straight.train_step(make_batch(seed=i))
        if i == 1:
            torch.save(straight.state_dict(), tmp_path / "state.pt")
            resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        if i > 1:
            torch.manual_seed(i)
            resumed.train_step(make_batch(seed=i))
    for part in ("raw", "evaluated"):
        a, b = getattr(straight, part).state_dict(), getattr(resumed, part).state_dict()
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_weight_average_is_evaluated():
    learner = make_learner("optim.ema=0.5", "optim.warmup_epochs=0")
    before = learner.raw.head.bias.detach().clone()
    learner.train_step(make_batch())
    first = learner.raw.head.bias.detach().clone()
    learner.train_step(make_batch(seed=1))
    assert not torch.equal(before, first)
    torch.testing.assert_close(learner.evaluated.head.bias, 0.5 * first + 0.5 * learner.raw.head.bias)


def test_bf16_learns_to_the_same_loss():
    losses = []
    for precision in ("fp32", "bf16"):
        learner = make_learner(f"train.precision={precision}", "optim.warmup_epochs=0")
        for _ in range(20):
            loss = learner.train_step(make_batch())
        losses.append(loss.item())
        assert all(p.dtype == torch.float32 for p in learner.raw.parameters())
    assert losses[0] < 1.5
    assert losses[1] == pytest.approx(losses[0], abs=0.3)
