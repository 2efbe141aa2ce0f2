"""The whole model: every variant and block type, against an independent reference, at any size."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import posmlp
from benchmarks import plain
from posmlp.model.backbone import Block, Downsample, Stage
from posmlp.model.spec import BLOCKS, model_variant

MIXED = ("joint", "cascade_ts", "parallel", "spatial")


def random_model(**overrides):
    """The tiny variant in fp64 with every parameter and statistic random: nothing is zero, one or symmetric."""
    torch.manual_seed(0)
    model = posmlp.create_model("tiny", num_classes=7, **overrides).double().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var") or ("norm" in name and name.endswith("weight")):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.normal_(std=tensor[0].numel() ** -0.5 if tensor.ndim > 1 and "table" not in name else 0.2)
    return model


def logits(model, clip):
    with torch.no_grad():
        return model(clip)


# --- variants ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", posmlp.list_models())
def test_every_variant_builds_and_runs_at_its_own_size(name):
    variant = model_variant(name)
    with torch.device("meta"):
        model = posmlp.create_model(name)
        clip = torch.empty(2, 3, variant.frames, variant.image_size, variant.image_size)
        features, out = model.features(clip), model(clip)
    assert sum(p.numel() for p in model.parameters()) > 0
    assert [len(stage.blocks) for stage in model.stages] == list(variant.depths)
    side = variant.image_size
    assert [tuple(f.shape) for f in features] == [
        (2, dim, variant.frames, side // stride, side // stride)
        for dim, stride in zip(variant.dims, (4, 8, 16, 32), strict=True)
    ]
    assert out.shape == (2, 400)


def test_larger_variants_are_larger():
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in posmlp.create_model(name).parameters()) for name in ("tiny", "s", "b", "l")]
    assert sizes == sorted(set(sizes))


def test_the_published_parameter_count():
    with torch.device("meta"):
        model = posmlp.create_model("s16", num_classes=174)
    assert sum(p.numel() for p in model.parameters()) == 13_509_537


@pytest.mark.parametrize(
    ("name", "overrides", "says"),
    [
        ("s17", {}, ["'s17'", "did you mean 's1", "known: tiny, s, b, l"]),
        ("tiny", {"dim": (8, 8, 8, 8)}, ["'dim'", "did you mean 'dims'"]),
        ("tiny", {"dims": (16, 32, 50, 64)}, ["stage 3", "50 channels", "8 groups"]),
        ("tiny", {"dims": (15, 32, 48, 64), "groups": (5, 8, 8, 16)}, ["stage 1", "15 channels must be even"]),
        ("tiny", {"dims": (16, 32, 64)}, ["dims (16, 32, 64)", "3 entries", "4 stages"]),
        ("tiny", {"depths": [1, 1, 1, 1, 1]}, ["depths (1, 1, 1, 1, 1)", "5 entries"]),
        ("tiny", {"blocks": ("joint", "spatial")}, ["blocks ('joint', 'spatial')", "2 entries"]),
        ("tiny", {"windows": 7}, ["windows 7", "4 stages"]),
        ("tiny", {"depths": (1, 0, 1, 1)}, ["depths (1, 0, 1, 1)", "positive"]),
        ("tiny", {"blocks": "paralel"}, ["'paralel'", "did you mean 'parallel'"]),
        ("tiny", {"windows": (8, 0, 4, 2)}, ["window 0"]),
        ("tiny", {"windows": (8, (4, -4), 4, 2)}, ["window (4, -4)"]),
        ("tiny", {"windows": (8, (4,), 4, 2)}, ["window (4,)"]),
        ("tiny", {"windows": (8, (1, 2, 3, 4), 4, 2)}, ["window (1, 2, 3, 4)"]),
        ("tiny", {"windows": (8, 3.5, 4, 2)}, ["window 3.5"]),
        ("tiny", {"windows": (8, None, 4, 2)}, ["window None"]),
        ("tiny", {"frames": 0}, ["frames 0"]),
        ("tiny", {"num_classes": 2.5}, ["num_classes 2.5"]),
        ("tiny", {"drop_path": 1.0}, ["drop_path 1.0"]),
        ("tiny", {"dropout": -0.1}, ["dropout -0.1"]),
        ("tiny", {"stage4_stride": 8}, ["stage4_stride 8", "32 or 16"]),
        ("tiny", {"dims": (16, 32, 64), "blocks": "x", "frames": 0}, ["dims", "'x'", "frames 0"]),  # all at once
    ],
)
def test_what_cannot_be_built_is_explained(name, overrides, says):
    with pytest.raises(ValueError) as error:
        posmlp.create_model(name, **overrides)
    for words in says:
        assert words in str(error.value)


def test_a_window_is_a_side_a_pair_or_a_triple():
    variant = model_variant("tiny", windows=[8, [4, 2], (2, 4, 3), 1], frames=5)
    assert variant.full_windows() == [(5, 8, 8), (5, 4, 2), (2, 4, 3), (5, 1, 1)]


# --- the reference -------------------------------------------------------------------------------------------------


class PaddedUnit(plain.PlainUnit):
    """The plain unit at any size: zeros after the GELU fill up the last windows, and what they give is cut off."""

    def split_windows(self, x):
        sides = zip(reversed(x.shape[1:4]), reversed(self.window), strict=True)
        return super().split_windows(F.pad(x, [0, 0, *(p for n, side in sides for p in (0, -n % side))]))

    def join_windows(self, x, shape):
        b, *size, c = shape
        whole = [math.ceil(n / side) * side for n, side in zip(size, self.window, strict=True)]
        return super().join_windows(x, (b, *whole, c))[:, : size[0], : size[1], : size[2]]


@pytest.mark.parametrize("blocks", [*BLOCKS, MIXED], ids=[*BLOCKS, "mixed"])
@pytest.mark.parametrize(
    ("frames", "size"),
    [(4, (4, 64, 64)), (4, (6, 65, 47)), (16, (5, 33, 20)), (16, (20, 40, 20))],
    ids=["whole", "odd", "short", "long"],
)
def test_logits_and_gradients_equal_the_plain_model(monkeypatch, blocks, frames, size):
    monkeypatch.setattr(plain, "PlainUnit", PaddedUnit)
    model = random_model(blocks=blocks, frames=frames)
    reference = plain.PlainModel(model).eval()
    clip = torch.randn(2, 3, *size, dtype=torch.float64)
    actual, expected = model(clip), reference(clip)
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(logits(model, clip), expected, rtol=0, atol=1e-10)  # works in place
    parameters = dict(model.named_parameters())
    weight = torch.linspace(-1, 1, 14, dtype=torch.float64).view(2, 7)
    gradients = [torch.autograd.grad((out * weight).sum(), parameters.values()) for out in (actual, expected)]
    for name, a, b in zip(parameters, *gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
        assert b.abs().max() > 0, name


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("windows", [(1, 1, 1, 1), ((1, 3, 2), (3, 1, 1), (2, 1, 3), (9, 9, 9))])
def test_windows_may_have_sides_of_one_or_more_than_the_input(monkeypatch, blocks, windows):
    monkeypatch.setattr(plain, "PlainUnit", PaddedUnit)
    model = random_model(blocks=blocks, windows=windows)
    clip = torch.randn(1, 3, 4, 32, 40, dtype=torch.float64)
    torch.testing.assert_close(logits(model, clip), logits(plain.PlainModel(model), clip), rtol=0, atol=1e-10)


# --- properties ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", BLOCKS)
def test_a_clip_does_not_see_the_others_of_its_batch(blocks):
    model = random_model(blocks=blocks)
    clips, others = torch.randn(2, 3, 3, 5, 40, 40, dtype=torch.float64)
    others[1] = clips[1]
    assert torch.equal(logits(model, clips)[1], logits(model, others)[1])
    torch.testing.assert_close(logits(model, clips)[1:2], logits(model, clips[1:2]), rtol=0, atol=1e-12)


def test_spatial_blocks_never_mix_frames_and_the_others_do():
    clip = torch.randn(1, 3, 4, 64, 64, dtype=torch.float64)
    order = [2, 0, 3, 1]
    for blocks in BLOCKS:
        model = random_model(blocks=blocks)
        with torch.no_grad():
            maps, permuted = model.features(clip), model.features(clip[:, :, order])
        same = [torch.allclose(a[:, :, order], b, rtol=0, atol=1e-12) for a, b in zip(maps, permuted, strict=True)]
        assert same == [blocks == "spatial"] * 4, blocks


def test_temporal_blocks_never_mix_places_and_the_others_do():
    """Within a stage: moving the places of all frames around moves the result around."""
    order = torch.randperm(8 * 8, generator=torch.Generator().manual_seed(0))

    def move(x):
        return x.flatten(3)[..., order].view_as(x)

    for blocks in BLOCKS:
        stage = random_model(blocks=blocks, windows=(4, 4, 4, 2)).stages[0]
        x = torch.randn(2, 16, 6, 8, 8, dtype=torch.float64)  # 4 windows in each frame, and a half one in time
        with torch.no_grad():
            same = torch.allclose(stage(move(x)), move(stage(x)), rtol=0, atol=1e-12)
        assert same == (blocks == "temporal"), blocks


def test_a_temporal_model_sees_as_far_in_a_frame_as_its_convolutions():
    """The last stage's place (0, 0) is of two stem and three downsampling convolutions of 3 x 3 and stride 2."""
    model = random_model(blocks="temporal")
    clip = torch.randn(1, 3, 4, 96, 96, dtype=torch.float64, requires_grad=True)
    model.features(clip)[-1][:, :, 1, 0, 0].square().sum().backward()
    seen = clip.grad.abs().amax((0, 1)) > 0  # [T, H, W]
    reach = 0
    for _ in range(5):
        reach = 2 * reach + 1  # the last input pixel of a convolution with padding 1
    expected = torch.zeros(96, 96, dtype=torch.bool)
    expected[: reach + 1, : reach + 1] = True
    assert torch.equal(seen, expected.expand(4, -1, -1))  # and all frames


def test_the_cascades_differ_in_their_order():
    model, other = random_model(blocks="cascade_ts"), random_model(blocks="cascade_st")
    other.load_state_dict(model.state_dict())
    clip = torch.randn(1, 3, 4, 64, 64, dtype=torch.float64)
    assert not torch.allclose(logits(model, clip), logits(other, clip))


def test_drop_path_is_off_in_eval_and_rises_with_depth():
    model, dropping = random_model(), random_model(drop_path=0.8)
    clip = torch.randn(1, 3, 4, 64, 64, dtype=torch.float64)
    assert torch.equal(logits(model, clip), logits(dropping, clip))
    rates = [block.drop_path for stage in dropping.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])


def test_drop_path_keeps_or_drops_whole_clips_and_is_unbiased():
    torch.manual_seed(0)
    rate, clips, extent = 0.3, 2000, (2, 2, 2)
    block = Block("parallel", 4, groups=2, window=extent, drop_path=rate).double()
    x = torch.randn(4, clips, 1, 2, 4, dtype=torch.float64)
    with torch.no_grad():
        residual = block.eval()(x.clone(), extent, None) - x
        dropped = block.train()(x.clone(), extent, None) - x
    kept = dropped.abs().amax((0, 2, 3, 4)) > 0
    torch.testing.assert_close(dropped, residual * kept.view(-1, 1, 1, 1) / (1 - rate), rtol=0, atol=1e-6)
    assert abs(kept.double().mean() - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / clips)


def test_training_reaches_every_parameter():
    torch.manual_seed(0)
    model = posmlp.create_model("tiny", blocks=MIXED, drop_path=0.0, dropout=0.1).train()
    model(torch.randn(2, 3, 4, 65, 47)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


# --- precision, compiler, memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", ["parallel", "joint"])
def test_autocast_is_close_to_fp32(blocks):
    model = random_model(blocks=blocks).float()
    clip = torch.randn(2, 3, 5, 40, 40)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(clip)
        results.append((out.float(), *torch.autograd.grad(out.float().square().sum(), list(model.parameters()))))
    for a, b in zip(*results, strict=True):
        assert b.isfinite().all()
        assert (a - b).norm() < 0.05 * a.norm()
    assert not torch.equal(*(r[0] for r in results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_in_fp32_and_bf16_is_close_to_fp64(dtype):
    model = random_model()
    clip = torch.randn(2, 3, 5, 40, 40, dtype=torch.float64)
    expected = logits(model, clip)
    actual = logits(model.to(dtype), clip.to(dtype))
    assert actual.dtype == dtype
    assert (actual - expected).norm() < 20 * torch.finfo(dtype).eps * expected.norm()


def test_downsampling_keeps_the_type_of_autocast():
    """On a GPU, PyTorch computes the norm in fp32; the stage after it gets the type of the convolution."""
    x = torch.randn(1, 4, 2, 8, 8)
    for enabled, dtype in [(True, torch.bfloat16), (False, torch.float32)]:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert Downsample(4, 8)(x).dtype == dtype


def test_a_stage_that_recomputes_has_the_same_gradients_and_runs_its_blocks_twice():
    stage, x, calls = Stage(None, 4, "parallel", 2, 2, (2, 2, 2), [0.0, 0.0]), torch.randn(1, 4, 2, 4, 4), []
    stage.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for recompute, count in [(False, 1), (True, 2)]:
        stage.recompute = recompute
        clip = x.clone().requires_grad_()
        stage(clip).square().sum().backward()
        gradients.append(clip.grad)
        assert len(calls) == count
        calls.clear()
    torch.testing.assert_close(*gradients)


def test_the_compiler_traces_the_same_function():
    """Two padded stages; the one without gradients works in place."""
    torch.manual_seed(0)
    stages = nn.Sequential(
        Stage(None, 4, "joint", 1, 2, (3, 4, 4), [0.0]), Stage(4, 8, "parallel", 1, 2, (3, 2, 2), [0.0])
    )
    compiled = torch.compile(stages, backend="aot_eager", fullgraph=True)
    x, parameters = torch.randn(1, 4, 5, 10, 10), list(stages.parameters())
    torch.testing.assert_close(logits(compiled, x), logits(stages, x))
    gradients = [torch.autograd.grad(m(x).square().sum(), parameters) for m in (compiled, stages)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


JOINT_AT_FULL_SIZE = """
import torch, posmlp
from posmlp.model.cost import resident_peak
torch.set_num_threads(1)
model = posmlp.create_model("s16", depths=(3, 1, 1, 1), blocks=("joint", "parallel", "parallel", "parallel"))
start = resident_peak()
model(torch.randn(1, 3, 16, 224, 224)).sum().backward()
assert all(p.grad.isfinite().all() for p in model.parameters())
print((resident_peak() - start) / 1e9)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak on Linux alone")
def test_joint_windows_of_3136_tokens_train_in_little_memory():
    """It takes 1.1 GB; with the three full maps, [8, 3136, 3136] each, it would be 2.1 GB."""
    run = subprocess.run([sys.executable, "-c", JOINT_AT_FULL_SIZE], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert 0.5 < float(run.stdout) < 1.7


def test_the_joint_unit_never_holds_the_full_map():
    """Nothing kept for the backward pass of a long window comes near its full map in size."""
    stage = Stage(None, 2, "joint", 1, 1, (32, 4, 4), [0.0])
    tokens, largest = 32 * 16, 0

    def largest_saved(tensor):
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(largest_saved, lambda tensor: tensor):
        stage(torch.randn(1, 2, 32, 4, 4)).sum().backward()
    assert 0 < largest < tokens**2 / 8


@pytest.mark.parametrize("block", sorted(BLOCKS))
def test_gradients_of_parts_of_a_batch_add_up(block):
    """Gradients that shared memory would be added to, or scaled, twice."""
    model = posmlp.create_model("tiny", frames=4, image_size=32, blocks=block).double().eval()
    clips = torch.randn(4, 3, 4, 32, 32, dtype=torch.float64)
    results = []
    for size in (4, 1):
        model.zero_grad()
        for part in clips.split(size):
            model(part)[:, 0].sum().backward()
        results.append([p.grad.clone() for p in model.parameters()])
        assert len({p.grad.data_ptr() for p in model.parameters()}) == len(results[0])
    torch.testing.assert_close(*results)


# --- fresh weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", ["parallel", "joint", MIXED])
def test_scaled_weights_have_the_deviation_of_their_inputs(blocks):
    torch.manual_seed(0)
    size = {"dims": (64,) * 4, "groups": (16,) * 4, "windows": ((4, 4, 4),) * 4}
    model = posmlp.create_model("tiny", blocks=blocks, init="scaled", **size)
    steps = sum(depth * (2 if block.startswith("cascade") else 1) for depth, block in architecture_of(model))
    tokens = {"temporal": 4, "spatial": 16, "joint": 64}
    for name, unit in units_of(model):
        assert unit.fc1.weight.std().item() == pytest.approx(1 / 8, rel=0.05)
        assert unit.fc2.weight.std().item() == pytest.approx(1 / 8 / math.sqrt(steps), rel=0.05)
        assert unit.gate.table.std().item() == pytest.approx(2 / math.sqrt(tokens[name]), rel=0.3)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_published_weights_have_one_deviation():
    torch.manual_seed(0)
    for _, unit in units_of(posmlp.create_model("s8")):
        for weight in (unit.fc1.weight, unit.fc2.weight, unit.gate.table):
            assert weight.std().item() == pytest.approx(0.02, rel=0.35)


@pytest.mark.parametrize("depths", [(1, 1, 1, 1), (3, 6, 3, 3)])
def test_units_of_scaled_weights_change_their_input_by_as_much_at_any_depth(depths):
    """Published weights leave the input of a narrow unit all but unchanged; scaled ones must not explode."""
    torch.manual_seed(0)
    clip = torch.randn(2, 3, 4, 64, 64)
    changes = {}
    for init in ("scaled", "published"):
        model = posmlp.create_model("tiny", depths=depths, init=init).eval()
        stage = model.stages[2]
        x = torch.randn(2, 32, 4, 8, 8)
        with torch.no_grad():
            first = stage.downsample(x)
            changes[init] = ((stage(x) - first).std() / first.std()).item() * math.sqrt(sum(depths) / depths[2])
        assert torch.isfinite(model(clip)).all()
    assert 1.2 < changes["scaled"] < 1.9
    assert changes["published"] < 0.1


def test_small_models_start_scaled_and_published_ones_as_published():
    assert {name: model_variant(name).init for name in ("tiny", "s16", "b16", "l32")} == {
        "tiny": "scaled",
        "s16": "published",
        "b16": "published",
        "l32": "published",
    }


def architecture_of(model):
    return [(len(stage.blocks), block_of(stage.blocks[0])) for stage in model.stages]


def block_of(block):
    return next(kind for kind, steps in BLOCKS.items() if steps == block.steps)


def units_of(model):
    """Yield each unit with its kind."""
    for stage in model.stages:
        for block in stage.blocks:
            yield from block.units.items()
