"""What a single training step gets: its learning rate and its random numbers."""

import math

import numpy as np
import pytest
import torch

from posmlp import create_model
from posmlp.config import load_recipe
from posmlp.learn import learner as learner_module
from posmlp.learn.learner import ExplodedError, Learner, StepResult, micro_batch_size
from posmlp.learn.optim import learning_rate
from posmlp.learn.precision import autocast
from posmlp.tasks import recognition
from tests.helpers.batches import DETECTION, make_batch, make_box_batch

SMALL = ["model.frames=4", "model.image_size=32", "model.num_classes=8", "train.global_batch=8"]


def make_learner(*overrides, steps=5, class_weights=None):
    config = load_recipe("demo", [*SMALL, *overrides])
    torch.manual_seed(0)
    model = create_model(config.model.name, **config.model.overrides())
    return Learner(model, config, steps, class_weights=class_weights)


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


def test_the_random_numbers_of_a_step_stay_the_same(monkeypatch):
    """A run that resumes under a newer version continues with them: (seed * 1,000,003 + step) * 1,009 + rank."""
    monkeypatch.setattr(learner_module, "rank", lambda: 3)
    learner, seeds = make_learner("train.seed=2"), []
    learner.step = 5
    learner.model.register_forward_pre_hook(lambda *_: seeds.append(torch.initial_seed()))
    learner.train_step(make_batch())
    assert seeds == [2_018_011_102]


@pytest.mark.parametrize("task", ["recognition", "detection"])
@pytest.mark.parametrize(("size", "synced"), [(8, [True]), (4, [False, True]), (2, [False] * 3 + [True])])
def test_gradients_are_exchanged_with_the_last_micro_batch(size, synced, task, monkeypatch):
    """And the loss is that of all of them. In eval mode, as batch norm would see other clips together."""
    seen, sync = [], learner_module.gradient_sync

    def record(model, *, enabled):
        seen.append(enabled)
        return sync(model, enabled=enabled)

    monkeypatch.setattr(learner_module, "gradient_sync", record)
    results = []
    for micro_batch in (size, 8):
        learner = make_learner(f"scaling.micro_batch={micro_batch}", *(DETECTION if task == "detection" else ()))
        learner.module.eval()
        batch = make_box_batch() if task == "detection" else make_batch()
        results.append([each.item() for each in learner.backward(batch)])
    assert seen == [*synced, True]
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_a_workers_loss_is_scaled_to_the_global_batch(monkeypatch):
    """The mean over 4 workers of 8 / 4 clips each is the mean over the global batch of 8."""
    alone, norm = make_learner().backward(make_batch())
    monkeypatch.setattr(recognition, "world_size", lambda: 4)
    shared, shared_norm = make_learner().backward(make_batch())
    assert shared.item() == pytest.approx(4 * alone.item())
    assert shared_norm.item() == pytest.approx(4 * norm.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("precision", "scale", "loss", "norm", "refused"),
    [
        ("fp32", 1.0, 2.0, 1e30, False),
        ("fp32", 1.0, 2.0, math.inf, True),
        ("fp16", 2.0, 2.0, math.inf, False),  # the scaler skips the step and lowers the scale
        ("fp16", 1.0, 2.0, math.inf, True),  # it was not the scale
        ("fp16", 2.0, 20.9, 1.0, True),
        ("fp32", 1.0, 20.7, 1.0, False),  # 10 times ln 8 is 20.79
        ("fp32", 1.0, 20.9, 1.0, True),
        ("fp32", 1.0, math.nan, 1.0, True),
        ("fp32", 1.0, 2.0, math.nan, True),
    ],
)
def test_which_steps_are_refused(precision, scale, loss, norm, refused):
    learner = make_learner(f"train.precision={precision}")
    learner.step = 3
    if precision == "fp16":
        learner.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    report(learner, loss, norm)
    if not refused:
        assert learner.train_step(make_batch()) == StepResult(pytest.approx(loss), pytest.approx(norm))
        assert learner.step == 4
        return
    with pytest.raises(ExplodedError) as error:
        learner.train_step(make_batch())
    expected = f"step 3 exploded: loss {loss:.4g} (a random guess has 2.08), gradient norm {norm:.4g}"
    assert str(error.value) == expected
    assert learner.step == 3


def report(learner, loss, norm):
    """Let the learner's steps have this loss and gradient norm, whatever they are."""
    backward = type(learner).backward

    def reported(batch):
        backward(learner, batch)
        return torch.tensor(loss), torch.tensor(norm)

    learner.backward = reported


def test_heavy_classes_may_have_a_higher_loss():
    """With weights up to 3, up to 3 times 20.79; weights below 1 do not lower the limit; two classes have ln 2 < 1."""
    for weights, limit in [([0.5, 3.0, *[1.0] * 6], 62.38), ([0.5] * 8, 20.79)]:
        learner = make_learner(class_weights=np.array(weights))
        report(learner, limit - 0.01, 1.0)
        learner.train_step(make_batch())
        report(learner, limit + 0.01, 1.0)
        with pytest.raises(ExplodedError):
            learner.train_step(make_batch())
    learner = make_learner("model.num_classes=2")
    report(learner, 9.9, 1.0)
    learner.train_step(make_batch(classes=2))
    report(learner, 10.1, 1.0)
    with pytest.raises(ExplodedError, match=r"a random guess has 0\.693"):
        learner.train_step(make_batch(classes=2))


@pytest.mark.parametrize(
    ("count", "micro_batch", "together", "size"),
    [
        (8, None, [], 8),
        (8, 8, [], 8),
        (8, 3, [], 3),  # 3 micro-batches of at most 3
        (9, 4, [], 3),
        (8, 4, ["augment.mixup=0.2"], 4),
        (10, 4, ["augment.mixup=0.2"], 4),  # 3 micro-batches of at least 10 / 3, in pairs
        (12, 6, ["data.repeats=3"], 6),
        (12, 6, ["data.repeats=3", "augment.cutmix=1"], 6),
        (24, 18, ["data.repeats=3", "augment.cutmix=1"], 12),
    ],
)
def test_the_size_of_micro_batches(count, micro_batch, together, size):
    overrides = [f"train.global_batch={12 * count}", f"scaling.micro_batch={micro_batch or 'null'}", *together]
    assert micro_batch_size(count, load_recipe("demo", [*SMALL, *overrides])) == size


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_type_of_autocast(precision, dtype):
    config = load_recipe("demo", [*SMALL, f"train.precision={precision}"])
    with autocast(torch.device("cpu"), config):
        assert torch.is_autocast_enabled("cpu") == (dtype is not None)
        assert dtype is None or torch.get_autocast_dtype("cpu") == dtype


def test_the_state_is_whole_on_the_cpu_and_loads_by_any_number_of_workers(monkeypatch):
    """What PyTorch's distributed state dicts are asked for; with shards, the tests of two processes need it."""
    asked = []
    for name in (
        "get_model_state_dict",
        "get_optimizer_state_dict",
        "set_model_state_dict",
        "set_optimizer_state_dict",
    ):
        function = getattr(learner_module, name)

        def record(*given, options, _name=name, _function=function):
            asked.append((_name, options.full_state_dict, options.cpu_offload, options.strict))
            return _function(*given, options=options)

        monkeypatch.setattr(learner_module, name, record)
    learner = make_learner("optim.ema=0.5")
    learner.train_step(make_batch())
    weights, state = learner.weights(), learner.state_dict()
    assert asked == [
        ("get_model_state_dict", True, True, True),
        ("get_model_state_dict", True, True, True),
        ("get_optimizer_state_dict", True, True, True),
    ]
    asked.clear()
    make_learner("optim.ema=0.5").load_state_dict(weights, state)
    assert asked == [
        ("set_model_state_dict", True, False, True),
        ("set_model_state_dict", True, False, True),
        ("set_optimizer_state_dict", True, False, False),
    ]
    assert (state["step"], state["ema_updates"]) == (1, 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_only_fp16_scales_the_loss(precision):
    learner = make_learner(f"train.precision={precision}")
    assert learner.scaler.is_enabled() == (precision == "fp16")
    assert learner.scaler.get_scale() == (2.0**16 if precision == "fp16" else 1.0)  # PyTorch's first scale
