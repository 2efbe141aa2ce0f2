"""Optimizer, schedule, steps, and what happens to pixels on the device."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from posmlp import create_model
from posmlp.config import OptimSection, load_recipe
from posmlp.learn.learner import Batch, Learner
from posmlp.learn.optim import build_optimizer, learning_rate
from posmlp.video.augment import MEAN, STD, to_input

SMALL = ["model.frames=4", "model.image_size=32", "model.num_classes=8", "train.global_batch=8"]


def make_learner(*overrides, steps=5):
    config = load_recipe("demo", [*SMALL, *overrides])
    torch.manual_seed(0)
    return Learner(create_model(config.model.name, **config.model.overrides()), config, steps)


def make_batch(count=8, seed=0, classes=8):
    g = torch.Generator().manual_seed(seed)
    return Batch(
        clips=torch.randint(0, 256, (count, 4, 32, 32, 3), dtype=torch.uint8, generator=g),
        labels=torch.arange(count) % classes,
        weights=torch.ones(count),
        draws=torch.rand(count, 4, generator=g),
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
    """Against the same step written out with PyTorch's own pieces."""
    learner = make_learner("optim.label_smoothing=0.1", "optim.warmup_epochs=0", "optim.clip_grad=0.5")
    twin = make_learner().raw
    twin.load_state_dict(learner.raw.state_dict())
    config, batch = learner.config, make_batch()
    optimizer = build_optimizer(twin, config.optim)
    twin.train()
    loss = F.cross_entropy(twin(to_input(batch.clips, batch.draws, config)), batch.labels, label_smoothing=0.1)
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
        loss = learner.train_step(Batch(batch.clips, labels, weights, batch.draws))
        results.append(
            (loss, learner.eval_step(Batch(batch.clips, labels, weights, batch.draws)), learner.raw.head.bias)
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert results[0][1][3] == 5


def test_eval_sums_equal_a_plain_count():
    learner, batch = make_learner(), make_batch(16)
    sums = learner.eval_step(batch)
    with torch.no_grad():
        logits = learner.raw.eval()(to_input(batch.clips, None, learner.config)).numpy()
    order = np.argsort(-logits, axis=1)
    labels = batch.labels.numpy()
    assert sums[1] == (order[:, 0] == labels).sum()
    assert sums[2] == (order[:, :5] == labels[:, None]).any(1).sum()
    assert sums[0].item() == pytest.approx(
        F.cross_entropy(torch.from_numpy(logits), batch.labels).item() * 16, rel=1e-5
    )


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


def recipe(modality="rgb", flip=0, brightness=0, contrast=0, saturation=0):
    augment = {"flip": flip, "brightness": brightness, "contrast": contrast, "saturation": saturation}
    return load_recipe("demo", [f"data.modality={modality}", *(f"augment.{k}={v}" for k, v in augment.items())])


def test_input_is_normalised_and_laid_out():
    clips = torch.randint(0, 256, (2, 3, 4, 5, 3), dtype=torch.uint8)
    x = to_input(clips, None, recipe())
    expected = (clips.numpy() / 255.0 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(x.numpy(), expected.transpose(0, 4, 1, 2, 3), atol=1e-5)


def test_augmentation_is_one_change_per_clip_and_off_at_zero():
    clips = torch.randint(40, 200, (2, 1, 6, 6, 3), dtype=torch.uint8).expand(-1, 3, -1, -1, -1)
    draws = torch.rand(2, 4, generator=torch.Generator().manual_seed(3))
    plain = to_input(clips, None, recipe())
    assert torch.equal(to_input(clips, draws, recipe()), plain)
    strong = recipe(flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4)
    x = to_input(clips, draws, strong)
    assert torch.equal(x[:, :, 0], x[:, :, 1])  # frames were equal and still are
    alone = to_input(clips[1:], draws[1:], strong)
    torch.testing.assert_close(x[1:], alone)  # a clip's change depends on its own draws alone
    assert not torch.allclose(x, plain, atol=0.05)


def test_each_augmentation_does_what_it_says():
    clips = torch.randint(60, 180, (1, 2, 8, 8, 3), dtype=torch.uint8)
    std, mean = torch.tensor(STD).view(3, 1, 1, 1), torch.tensor(MEAN).view(3, 1, 1, 1)

    def pixels(**strengths):
        return to_input(clips, torch.tensor([[0.0, 0.75, 0.75, 0.75]]), recipe(**strengths))[0] * std + mean

    plain = pixels()
    torch.testing.assert_close(pixels(flip=0.1), plain.flip(-1))
    torch.testing.assert_close(pixels(brightness=0.2), plain * 1.1)
    torch.testing.assert_close(pixels(contrast=0.2), (plain - plain.mean()) * 1.1 + plain.mean())
    grey = (plain * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1, 1)).sum(0)
    torch.testing.assert_close(pixels(saturation=0.2), (plain - grey) * 1.1 + grey)


def test_rgb_difference_is_each_frame_minus_the_one_before():
    clips = torch.randint(0, 256, (2, 4, 5, 5, 3), dtype=torch.uint8)
    x = to_input(clips, None, recipe("rgb_difference"))
    expected = np.diff(clips.numpy() / 255.0, axis=1).transpose(0, 4, 1, 2, 3) / np.array(STD).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(x[:, :, 1:].numpy(), expected, atol=1e-5)
    assert torch.equal(x[:, :, 0], x[:, :, 1])
    still = to_input(clips[:, :1].expand(-1, 4, -1, -1, -1), None, recipe("rgb_difference"))
    assert not still.any()
