"""The closed form of the arithmetic against PyTorch's own counter, and measurements that make sense."""

import dataclasses
import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import posmlp
from posmlp.model.cost import Cost, cost, count_macs, count_params, format_cost, measure
from posmlp.model.spec import BLOCKS, model_variant


def counted_macs(model, frames, height, width):
    """Multiply-accumulates that PyTorch counts, on a device without data."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval().to("meta")(torch.empty(1, 3, frames, height, width, device="meta"))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(("name", "gmacs"), [("s8", None), ("s16", 40.17), ("s32", None), ("b16", None), ("l16", None)])
def test_macs_of_the_variants_equal_the_flop_counter(name, gmacs):
    variant = model_variant(name, num_classes=174)
    size = variant.image_size
    macs = count_macs(variant)
    assert macs == counted_macs(posmlp.create_model(name, num_classes=174), variant.frames, size, size)
    assert gmacs is None or round(macs / 1e9, 2) == gmacs


sides = st.integers(1, 90)
blocks = st.sampled_from(sorted(BLOCKS))


@settings(max_examples=25, deadline=None)
@given(st.tuples(blocks, blocks, blocks, blocks), st.integers(1, 9), sides, sides, st.sampled_from([16, 32]))
def test_macs_equal_the_flop_counter_at_any_size(blocks, frames, height, width, stage4_stride):
    overrides = {"blocks": blocks, "windows": (8, (3, 5), (2, 4, 4), 2), "stage4_stride": stage4_stride}
    macs = count_macs(model_variant("tiny", **overrides), frames, (height, width))
    assert macs == counted_macs(posmlp.create_model("tiny", **overrides), frames, height, width)


def test_macs_of_a_temporal_model_by_hand():
    convolutions = 9 * (3 * 8 * 32**2 + 8 * 16 * 16**2 + 16 * 32 * 8**2 + 32 * 48 * 4**2 + 48 * 64 * 2**2)
    channels = [16, 32, 32, 48, 64]  # of the blocks: 1, 2, 1 and 1 in the four stages
    places = [16**2, 8**2, 8**2, 4**2, 2**2]
    # A place has fc1 (C to 2C), a sum over the 4 frames for each channel, and fc2 (C to C).
    blocks = sum(n * (c * 2 * c + 4 * c + c * c) for c, n in zip(channels, places, strict=True))
    assert count_macs(model_variant("tiny", blocks="temporal", num_classes=7)) == 4 * (convolutions + blocks) + 64 * 7


def test_cpu_kernels_do_the_counted_arithmetic():
    variant = model_variant("tiny")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        posmlp.create_model("tiny")(torch.zeros(1, 3, variant.frames, variant.image_size, variant.image_size))
    # The biases of linear layers are counted there: a column of the weight.
    assert count_macs(variant) <= counter.get_total_flops() / 2 <= 1.02 * count_macs(variant)


def test_parameters():
    model = posmlp.create_model("tiny")
    count = count_params(model)
    assert count == sum(p.numel() for p in model.state_dict(keep_vars=True).values() if p.requires_grad)
    assert count_params(model.requires_grad_(False)) == count


def test_measure():
    model = posmlp.create_model("tiny").train()
    model.stem.eval()  # as when its statistics are frozen
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    found = measure(model, (3, 4, 128, 128), repeats=2, batch=16)
    assert found.latency_ms > 0
    assert found.clips_per_s > 0
    if sys.platform.startswith("linux"):
        widest = 4 * 16 * (16 * 4 * 32 * 32) * 4  # u and v of both units of stage 1: [4C, tokens] in fp32
        assert 1 <= found.peak_mb * 1e6 / widest < 8
    assert model.training
    assert not model.stem.training
    assert not model.stem.norm1.training
    assert model.stages[0].training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="at least 1"):
        measure(model, (3, 4, 64, 64), repeats=0)


class Clocked(torch.nn.Module):
    """Takes 20 ms and 10 ms for each clip, on a clock of its own; the first passes and one later take long."""

    def __init__(self, slow):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.slow, self.now, self.batches = slow, 1000.0, []

    def forward(self, clips):
        self.batches.append(len(clips))
        self.now += 7.0 if len(self.batches) in self.slow else 0.020 + 0.010 * len(clips)


@pytest.mark.parametrize(("batch", "clips_per_s"), [(1, 1 / 0.030), (4, 4 / 0.060), (8, 8 / 0.100)])
def test_latency_is_in_milliseconds_of_one_clip_and_throughput_in_clips_per_second(monkeypatch, batch, clips_per_s):
    """The two passes for warm-up do not count, and of the others the median does."""
    module = importlib.import_module("posmlp.model.cost")
    model = Clocked(slow=(1, 2, 4, 6, 7, 9))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: model.now))
    found = measure(model, (3, 2, 4, 4), repeats=3, batch=batch)
    assert found.latency_ms == pytest.approx(30.0)
    assert found.clips_per_s == pytest.approx(clips_per_s)
    assert model.batches[:5] == [1] * 5 and set(model.batches[5:]) == {batch}


def test_units_of_the_cost_metrics():
    found = Cost(2_500_000, 40_000_000_000, 12.5, 80.0, 350.0, "any", 1, 4, 8, 64, "tiny")
    expected = {"params_m": 2.5, "gmacs": 40.0, "latency_ms": 12.5, "clips_per_s": 80.0, "peak_mb": 350.0}
    assert found.metrics() == {f"cost/{name}": value for name, value in expected.items()}
    text = format_cost(found)
    assert all(f" {number}" in text for number in ("2.5 M", "40 GMACs", "12.5 ms", "80.00 clips/s", "350 MB"))


def test_cost_of_a_named_model():
    state = torch.get_rng_state()
    found = cost("tiny", batch=2, repeats=1, device="cpu", num_classes=7, frames=3, image_size=50)
    assert torch.equal(state, torch.get_rng_state())
    model = posmlp.create_model("tiny", num_classes=7, frames=3, image_size=50)
    assert found.params == count_params(model)
    assert found.macs == counted_macs(model, 3, 50, 50)
    assert (found.name, found.batch, found.frames, found.image_size) == ("tiny", 2, 3, 50)
    assert found.device
    assert found.threads == torch.get_num_threads()
    metrics = found.metrics()
    assert metrics["cost/params_m"] == found.params / 1e6
    assert metrics["cost/gmacs"] == found.macs / 1e9
    assert {"cost/latency_ms", "cost/clips_per_s"} < metrics.keys()
    unknown = dataclasses.replace(found, peak_mb=None)
    assert "cost/peak_mb" not in unknown.metrics()
    assert "peak memory" not in format_cost(unknown)
    assert "3 frames of 50 x 50" in format_cost(found)
    json.dumps(dataclasses.asdict(found))
