"""The host waits for nothing in a training step.

PyTorch's own dispatch is watched for reads of values. And a step runs on the meta device, whose tensors have shapes but
no values: whatever asks for one raises an error, and whatever moves between it and the CPU is seen.
"""

import pytest
import torch

from posmlp import create_model
from posmlp.config import load_recipe
from posmlp.learn.learner import Learner
from tests.helpers.batches import DETECTION, make_batch, make_box_batch
from tests.helpers.host_waits import Copies, HostReads, allow_meta_steps

SMALL = ["model.frames=4", "model.image_size=32", "model.num_classes=8", "train.global_batch=8"]
KINETICS = ("flip=0.5", "randaug_layers=4", "erasing=0.5", "mixup=0.8", "cutmix=1", "brightness=0.3", "saturation=0.3")


def make_learner(*overrides):
    augment = [f"augment.{each}" for each in KINETICS]
    config = load_recipe("demo", [*SMALL, *augment, "optim.ema=0.9", "optim.clip_grad=1", *overrides])
    torch.manual_seed(0)
    return Learner(create_model(config.model.name, **config.model.overrides()), config, 5)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.precision=bf16", "model.drop_path=0.3", "model.dropout=0.2", "train.recompute=true"),
        ("train.precision=fp16", "scaling.micro_batch=4", "data.repeats=2"),
        ("optim.freeze=2", "optim.layer_decay=0.7", "model.weights=given"),
        ("data.modality=rgb_difference",),
    ],
)
def test_a_step_reads_nothing_back(overrides):
    """Augmentation, forward and backward pass, clipping, optimizer and EMA; every augmentation is met."""
    learner = make_learner(*overrides)
    for seed in range(4):
        with HostReads() as seen:
            started = learner.start_step(make_batch(seed=seed))
        assert seen.operators > 500
        assert seen.reads == []
        started.result()


def test_a_step_of_detection_reads_nothing_back():
    config = load_recipe("demo", [*SMALL, *DETECTION, "augment.flip=0.5", "augment.erasing=0.5", "optim.ema=0.9"])
    learner = Learner(create_model(config.model.name, **config.model.overrides()), config, 5)
    for seed in range(4):
        batch = make_box_batch(seed=seed)
        with HostReads() as seen:
            started = learner.start_step(batch)
        assert seen.operators > 500
        assert seen.reads == []
        started.result()


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.mean()),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: torch.tensor([1.0, 2.0]),
        lambda x: (x > 0).nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: torch.bincount(x.long()),
        lambda x: torch.repeat_interleave(x, torch.ones(len(x), dtype=torch.int64)),
        lambda x: torch.nn.functional.one_hot(x.long()),
    ],
)
def test_reads_are_seen(read):
    with HostReads() as seen:
        read(torch.arange(3.0))
    assert seen.reads


@pytest.mark.parametrize("overrides", [(), ("optim.layer_decay=0.7", "data.repeats=2", "model.dropout=0.2")])
def test_a_step_makes_one_copy_to_the_device_and_one_back(overrides, monkeypatch):
    """Of the random parameters, and of loss, gradient norm and verdict; the host waits for neither."""
    allow_meta_steps(monkeypatch)
    config = make_learner(*overrides).config
    meta = torch.device("meta")
    learner = Learner(create_model(config.model.name, **config.model.overrides()).to(meta), config, 5)
    for seed in range(4):
        batch = make_batch(seed=seed).to(meta)
        with Copies() as seen:
            learner.start_step(batch)
        assert seen.found == [("cpu", "meta", False), ("meta", "cpu", False)]
        assert torch.ops.aten._fused_adamw_.default in seen.optimizers
        assert seen.optimizers[-1] is torch.ops.aten._fused_sgd_.default  # of the EMA


@pytest.mark.parametrize(
    ("copy", "expected"),
    [
        (lambda x: torch.ones(3).to(x.device), [("cpu", "meta", True)]),
        (lambda x: x.cpu(), [("meta", "cpu", True)]),
        (lambda x: torch.ones(3).copy_(x, non_blocking=True), [("meta", "cpu", False)]),
        (lambda x: x + 1, []),
    ],
)
def test_copies_are_seen(copy, expected):
    with Copies() as seen:
        try:
            copy(torch.ones(3, device="meta"))
        except NotImplementedError:  # a meta tensor has no values to copy
            assert expected == [("meta", "cpu", True)]
            return
    assert seen.found == expected


def test_a_batch_on_the_device_keeps_only_its_seeds_on_the_cpu():
    there = make_batch().to(torch.device("meta"))
    assert {name: tensor.device.type for name, tensor in there.tensors().items()} == {
        "clips": "meta",
        "labels": "meta",
        "weights": "meta",
        "seeds": "cpu",
    }
