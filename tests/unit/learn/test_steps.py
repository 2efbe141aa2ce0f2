"""What a single training step gets: its learning rate and its random numbers."""

import math

import pytest
import torch

from posmlp import create_model
from posmlp.config import load_recipe
from posmlp.learn.learner import Learner
from posmlp.learn.optim import learning_rate
from tests.helpers.batches import make_batch

SMALL = ["model.frames=4", "model.image_size=32", "model.num_classes=8", "train.global_batch=8"]


def make_learner(*overrides, steps=5):
    config = load_recipe("demo", [*SMALL, *overrides])
    torch.manual_seed(0)
    return Learner(create_model(config.model.name, **config.model.overrides()), config, steps)


def test_the_optimizer_gets_the_rate_of_each_step_within_an_epoch():
    """Warm-up over 2 of 4 epochs of 5 steps, then half a cosine; both rates are for half of this global batch."""
    rates = ["optim.lr=0.01", "optim.min_lr=0.001", "optim.lr_batch=4", "optim.warmup_epochs=2", "train.epochs=4"]
    learner, seen = make_learner(*rates), []

    def record(optimizer, *_):
        seen.append([group["lr"] for group in optimizer.param_groups])

    learner.optimizer.register_step_pre_hook(record)
    for step in range(20):
        learner.train_step(make_batch(seed=step))
    warmup = [0.02 * step / 10 for step in range(10)]
    decay = [0.002 + 0.018 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]
    assert seen == [pytest.approx([rate, rate]) for rate in warmup + decay]


def test_the_first_step_moves_the_weights_by_the_rate():
    """AdamW's first step has the length of the rate in each direction, wherever the gradient is not tiny."""
    learner = make_learner("optim.lr=0.004", "optim.lr_batch=16", "optim.warmup_epochs=0")
    bias = learner.optimizer.param_groups[1]["params"][-1]
    before = bias.detach().clone()
    learner.train_step(make_batch())
    moved = (bias.detach() - before).abs()
    assert moved.max().item() == pytest.approx(0.002, rel=1e-3)  # half of the batch, half of the rate


def dropped(monkeypatch, rank, step=0, seed=0):
    """Which features dropout sets to zero in a step of a worker."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 1)
    learner, masks = make_learner("model.dropout=0.5", f"train.seed={seed}"), []
    learner.step = step
    learner.model.dropout.register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    learner.train_step(make_batch())
    (mask,) = masks
    assert 0.3 < mask.float().mean().item() < 0.7
    return mask


def test_dropout_differs_between_workers_steps_and_seeds_and_repeats(monkeypatch):
    choices = [{"rank": 0}, {"rank": 1}, {"rank": 2}, {"rank": 0, "step": 1}, {"rank": 0, "seed": 1}]
    masks = [dropped(monkeypatch, **choice) for choice in choices]
    assert all(not torch.equal(masks[i], masks[j]) for i in range(len(masks)) for j in range(i))
    assert torch.equal(dropped(monkeypatch, rank=1), masks[1])
    assert torch.equal(dropped(monkeypatch, rank=0, step=1), masks[3])


def test_the_rate_stays_at_its_end_and_a_short_decay_is_a_whole_one():
    def rate(epoch, epochs, warmup):
        config = load_recipe("demo", [f"train.epochs={epochs}", f"optim.warmup_epochs={warmup}", "optim.min_lr=0.001"])
        return learning_rate(epoch, config.train, config.optim)

    assert rate(2.5, 2, 1) == rate(9, 2, 1) == pytest.approx(0.001)  # resumed with fewer epochs
    assert rate(1.75, 2, 1.5) == pytest.approx(0.002)  # half-way between 0.003 and 0.001
    assert rate(2, 2, 1.5) == pytest.approx(0.001)
    assert rate(1.999, 2, 2) == pytest.approx(0.003 * 0.9995)
