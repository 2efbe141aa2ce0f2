"""Floors and times of a model's parts (``benchmarks/floors.py``), and stored ratios (``benchmarks/ratios.py``)."""

import pytest
import torch

import posmlp
from benchmarks.floors import PARTS, DevicePeak, Work, linear_part, measure_parts, minimum_work
from benchmarks.ratios import record_or_compare
from posmlp.model.cost import count_macs
from posmlp.model.spec import model_variant


@pytest.mark.parametrize("blocks", ["parallel", "cascade_ts", "joint", "spatial"])
@pytest.mark.parametrize("name", ["tiny", "s16", "b32"])
def test_products_are_those_that_count_macs_counts(name, blocks):
    variant = model_variant(name, blocks=blocks)
    macs = count_macs(variant) - variant.dims[-1] * variant.num_classes  # without the head
    forward, step = (sum(minimum_work(variant, torch.float32, train).values(), Work()) for train in (False, True))
    assert forward.flops == 2 * macs
    size, frames = variant.image_size, variant.frames
    first = 2 * 9 * 3 * variant.dims[0] // 2 * frames * size**2 // 4  # the clip has no gradient
    assert step.flops == 3 * forward.flops - first


def test_bytes_by_hand():
    few, more = ({"dims": (8, 16, 32, 64), "depths": (d, 1, 1, 1), "frames": 2, "image_size": 32} for d in (1, 2))
    clip, inner, x = 2 * 32 * 32 * 3, 2 * 16 * 16 * 4, 2 * 8 * 8 * 8  # before, in and after the stem
    stem, fc1 = 4 * 9 * (3 * 4 + 4 * 8), 4 * 2 * 2 * 8 * 8  # bytes of weights

    def of_stem_and_a_block(train: bool) -> tuple[float, dict[str, float]]:
        a, b = (minimum_work(model_variant("tiny", **each), torch.bfloat16, train) for each in (few, more))
        return a["stem"].bytes, {part: b[part].bytes - a[part].bytes for part in PARTS}

    of_stem, of_block = of_stem_and_a_block(train=False)
    assert of_stem == 2 * (clip + 2 * inner + x) + stem
    assert (of_block["norms"], of_block["fc1"], of_block["elementwise"]) == (2 * x, fc1, 2 * x)
    of_stem, of_block = of_stem_and_a_block(train=True)
    assert of_stem == 2 * (2 * clip + 5 * inner + 2 * x) + 3 * stem
    assert (of_block["norms"], of_block["elementwise"]) == (2 * 2 * x, 2 * 3 * x)
    assert of_block["fc1"] == 3 * fc1 + 2 * 2 * 4 * x  # the hidden layer is kept and read


def test_a_floor_is_the_slower_of_arithmetic_and_memory():
    assert Work(6, 1).floor_seconds(DevicePeak(2, 1)) == 3
    assert Work(6, 4).floor_seconds(DevicePeak(2, 1)) == 4


@pytest.mark.parametrize("step", [False, True])
def test_every_operation_that_takes_time_has_a_part(step):
    model = posmlp.create_model("tiny").train(step)
    clip = torch.randn(2, 3, 8, 32, 32)

    def run() -> None:
        with torch.set_grad_enabled(step):
            loss = model(clip).sum()
        if step:
            loss.backward()

    run()
    found = measure_parts(run, model_variant("tiny").dims, torch.device("cpu"))
    assert set(found) == set(PARTS)
    assert all(found.values())


def test_products_are_identified_by_their_shapes():
    dims = (72, 144, 288, 576)
    assert linear_part([[1, 288, 73], [1, 73, 3136]], dims) == "fc1"
    assert linear_part([[1, 288, 3136], [1, 3136, 73]], dims) == "fc1"
    assert linear_part([[72, 145], [145, 3136]], dims) == "fc2"
    assert linear_part([[1, 288, 144], [1, 144, 784]], dims) == "fc2"  # backward, of the second stage
    assert linear_part([[8, 144, 196], [8, 196, 196]], dims) is None
    assert linear_part([], dims) is None


def test_ratios_are_stored_and_compared(tmp_path, capsys):
    path = tmp_path / "ratios.json"
    record_or_compare("here", {"step": 2.0, "forward": 1.5, "failed": float("nan")}, record=True, path=path)
    record_or_compare("here", {"step": 1.85}, record=False, path=path)  # one row, a little slower
    record_or_compare("elsewhere", {"step": 0.1}, record=False, path=path)
    assert "nothing recorded for: elsewhere" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"here: step is 1\.70, recorded 2\.00"):
        record_or_compare("here", {"step": 1.7, "forward": 1.5, "failed": 0.1}, record=False, path=path)
    with pytest.raises(SystemExit, match="forward is nan"):
        record_or_compare("here", {"forward": float("nan")}, record=False, path=path)
