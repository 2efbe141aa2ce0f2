"""A new block type is one entry in ``spec.BLOCKS``, a new unit kind one in ``spec.UNITS``; the rest follows."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.floors import minimum_work
from posmlp import create_model, load_published
from posmlp.config import load_recipe
from posmlp.learn.learner import Learner
from posmlp.model import cpu, spec
from posmlp.model.backbone import from_windows, padding_mask, to_windows
from posmlp.model.cost import count_macs
from posmlp.model.gates import PositionGate
from posmlp.model.spec import model_variant, unit_window
from tests.helpers import oracle
from tests.helpers.batches import make_batch

UNITS = {"rows": "w", "columns": "h", "time_rows": "tw", "time_columns": "th"}
BLOCKS = {
    "spatial_joint": (("spatial",), ("joint",)),  # of units that there are
    "axial": (("rows", "columns"), ("temporal",)),  # the rest are of new ones
    "joint_axial": (("time_rows",), ("time_columns",)),
}
WINDOWS = (8, (3, 5), (2, 4, 4), 2)
SIZES = [(4, 64, 64), (5, 50, 70), (1, 20, 33)]  # frames, height, width: whole windows, padded, smaller than windows


@pytest.fixture(autouse=True, scope="module")
def entries():
    with pytest.MonkeyPatch.context() as patch:
        for table, new in ((spec.UNITS, UNITS), (spec.BLOCKS, BLOCKS)):
            for name, entry in new.items():
                patch.setitem(table, name, entry)
        yield


def random_model(blocks):
    torch.manual_seed(0)
    model = create_model("tiny", num_classes=7, blocks=blocks, windows=WINDOWS).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("size", SIZES)
def test_it_runs_at_any_size_as_fast_as_any_other(blocks, size, monkeypatch):
    model, served = random_model(blocks), []
    clip = torch.randn(2, 3, *size)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "forward", lambda *a, whole=cpu.forward, **k: served.append(1) or whole(*a, **k))
        with torch.no_grad():
            actual = model(clip)
    assert served
    expected = copy.deepcopy(model).double()(clip.double())  # the reference: the CPU path does not serve fp64
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_its_gradients_are_those_of_the_reference(blocks):
    model, clip = random_model(blocks), torch.randn(2, 3, 5, 50, 70)
    exact = copy.deepcopy(model).double()
    model(clip).square().sum().backward()
    exact(clip.double()).square().sum().backward()
    largest = max(p.grad.norm() for p in exact.parameters())
    for (name, p), truth in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (p.grad - truth.grad).norm() <= 1e-3 * (truth.grad.norm() + 1e-3 * largest), name


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("size", SIZES)
def test_its_arithmetic_is_counted(blocks, size):
    model, (frames, height, width) = random_model(blocks).to("meta"), size
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, *size, device="meta"))
    variant = model_variant("tiny", num_classes=7, blocks=blocks, windows=WINDOWS)
    assert count_macs(variant, frames, (height, width)) == counter.get_total_flops() / 2
    floor = sum(work.flops for work in minimum_work(variant, torch.float32, train=False).values())
    assert floor == 2 * (count_macs(variant) - variant.dims[-1] * variant.num_classes)


@pytest.mark.parametrize("supernet", [False, True])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_a_recipe_trains_it_alone_and_in_a_supernet(blocks, supernet):
    keys = ["model.frames=4", "model.image_size=32", "model.num_classes=8", "train.global_batch=8"]
    keys += [f"model.blocks={blocks}", "optim.warmup_epochs=0"]
    config = load_recipe("demo", keys)
    alone = create_model(config.model.name, **config.model.overrides())
    if supernet:
        config = load_recipe("demo", [*keys, "model.choices={groups: [[1, 4], [], [], []]}"])
    model = create_model(config.model.name, **config.model.overrides())
    if supernet:
        assert model.member(model.own).state_dict().keys() == alone.state_dict().keys()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Learner(model, config, steps_per_epoch=5).train_step(make_batch())
    trained = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    for kind in spec.block_units(blocks):
        assert any(f".units.{kind}.gate.table" in name for name in trained), kind


@settings(max_examples=40)
@given(
    kind=st.sampled_from(sorted(UNITS)),
    window=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    size=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 5)),
    seed=st.integers(0, 99),
)
def test_a_gate_of_a_new_kind_equals_the_formula(kind, window, size, seed):
    torch.manual_seed(seed)
    gate = PositionGate(2, unit_window(kind, window)).double()
    torch.nn.init.normal_(gate.table)
    torch.nn.init.normal_(gate.bias)
    u, v = torch.randn(2, 2, 4, *size, dtype=torch.float64)
    extent = tuple(map(min, size, window))
    real = padding_mask(size, extent, u.device)
    tokens = to_windows(u, extent)
    actual = gate(tokens if real is None else tokens * real, to_windows(v, extent), extent)
    expected = oracle.gate(*(each.detach().numpy() for each in (u, v, gate.table, gate.bias)), gate.window)
    torch.testing.assert_close(from_windows(actual, extent, size), torch.from_numpy(expected), rtol=0, atol=1e-12)


def test_weights_for_other_windows_are_resized_along_the_axes_that_a_unit_mixes():
    small, large = (create_model("tiny", blocks="axial", windows=windows) for windows in ((4, 4, 4, 2), (8, 4, 4, 2)))
    report = load_published(large, small.state_dict())
    assert any("window (1, 4, 1) resized to (1, 8, 1)" in text for text in report.adapted)
    assert any("window (1, 1, 4) resized to (1, 1, 8)" in text for text in report.adapted)
