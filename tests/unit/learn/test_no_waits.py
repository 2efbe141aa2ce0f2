"""The host waits for nothing in a training step.

PyTorch's own dispatch is watched for reads of values. And a step runs on the meta device, whose tensors have shapes but
no values: whatever asks for one raises an error, and whatever moves between it and the CPU is seen.
"""

import sys
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from posmlp import create_model
from posmlp.config import load_recipe
from posmlp.learn.learner import Learner
from posmlp.tasks import recognition
from tests.helpers.batches import DETECTION, make_batch, make_box_batch

SMALL = ["model.frames=4", "model.image_size=32", "model.num_classes=8", "train.global_batch=8"]
KINETICS = ("flip=0.5", "randaug_layers=4", "erasing=0.5", "mixup=0.8", "cutmix=1", "brightness=0.3", "saturation=0.3")
# On a GPU the host waits for the result of each of these. Below, ``lift_fresh`` is ``torch.tensor(...)``, whose copy it
# waits for too; the meta device does not show it.
READS = {
    *("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "allclose", "masked_select", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive", "histc", "histogram", "_assert_async"),
}


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device, and the operators in all."""

    def __init__(self):
        super().__init__()
        self.reads, self.operators = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators += 1
        name = function.overloadpacket.__name__
        indices = args[1] if name.startswith(("index", "_index", "_unsafe_index")) and len(args) > 1 else ()
        by_mask = isinstance(indices, list) and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices
        )
        unsized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        constant = (
            name == "lift_fresh" and args[0].ndim > 0
        )  # a single number is also lifted by x[0] = 1, which is no copy
        if name in READS or by_mask or unsized or constant:
            self.reads.append(str(function))
        return function(*args, **(kwargs or {}))


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


class Copies(TorchDispatchMode):
    """Records the copies between devices. A copy from the meta device gives zeros; fused optimizers do nothing."""

    def __init__(self):
        super().__init__()
        self.found, self.optimizers = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten, kwargs = torch.ops.aten, kwargs or {}
        if function in (aten._fused_adamw_.default, aten._fused_sgd_.default):  # not defined for meta tensors
            assert kwargs["found_inf"].device.type == "meta"
            self.optimizers.append(function)
            return None
        if function is aten.copy_.default:
            there, here = args[:2]
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            result = there.zero_() if (there.device.type, here.device.type) == ("cpu", "meta") else function(*args)
        else:
            result = function(*args, **kwargs)
            if function is not aten._to_copy.default:
                return result
            here, waits = args[0], not kwargs.get("non_blocking", False)
        if here.device != result.device:
            self.found.append((here.device.type, result.device.type, waits))
        return result


@pytest.mark.parametrize("overrides", [(), ("optim.layer_decay=0.7", "data.repeats=2", "model.dropout=0.2")])
def test_a_step_makes_one_copy_to_the_device_and_one_back(overrides, monkeypatch):
    """Of the random parameters, and of loss, gradient norm and verdict; the host waits for neither."""
    monkeypatch.setattr(recognition, "autocast", lambda *_: nullcontext())  # which the meta device does not have
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_, **__: None)
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
