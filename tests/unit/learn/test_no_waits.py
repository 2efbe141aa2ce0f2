"""The host waits for nothing in a training step: PyTorch's own dispatch is watched for reads of values."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from posmlp import create_model
from posmlp.config import load_recipe
from posmlp.learn.learner import Learner
from posmlp.video.batch import Batch
from tests.helpers.batches import make_batch

SMALL = ["model.frames=4", "model.image_size=32", "model.num_classes=8", "train.global_batch=8"]
KINETICS = ("flip=0.5", "randaug_layers=4", "erasing=0.5", "mixup=0.8", "cutmix=1", "brightness=0.3", "saturation=0.3")
# On a GPU the host waits for the result of each of these.
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
        if name in READS or by_mask or unsized:
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


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.mean()),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
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


def test_a_batch_on_the_device_keeps_only_its_seeds_on_the_cpu():
    there = make_batch().to(torch.device("meta"))
    assert {name: getattr(there, name).device.type for name in Batch.__annotations__} == {
        "clips": "meta",
        "labels": "meta",
        "weights": "meta",
        "seeds": "cpu",
    }
