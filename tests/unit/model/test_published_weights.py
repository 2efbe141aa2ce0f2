"""Weights from files: the release's names and channel order, what is adapted, and what is refused."""

import importlib.util
import math
import pickle
import re
from pathlib import Path

import fsspec
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import posmlp
from posmlp.errors import UserError
from posmlp.model.backbone import Block
from posmlp.model.checkpoint import CheckpointError, canonical, resize_offsets, resize_tokens
from posmlp.model.gates import PositionGate
from tests.helpers import oracle

PARITY = Path(__file__).parents[2] / "parity"
MIXED = ("joint", "spatial", "parallel", "cascade_ts")
spec = importlib.util.spec_from_file_location("fill", PARITY / "fill.py")
fill = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fill)


def release_state(name="tiny"):
    """A checkpoint as the release writes it, with the position index that it stores."""
    state = {k: torch.from_numpy(v) for k, v in fill.state(PARITY / f"layout_{name}.json").items()}
    tables = [k for k in state if k.endswith("bias_table")]
    index = {k.removesuffix("bias_table") + "index": torch.zeros(4, 4, dtype=torch.long) for k in tables}
    return state | index


def release_image_state():
    """The same without temporal units and with 2-D convolutions, as an image model has."""
    state = {k: v for k, v in release_state().items() if ".t_fc." not in k}
    return {k: v.squeeze(2) if v.ndim == 5 else v for k, v in state.items()}


def tiny(**overrides):
    torch.manual_seed(0)
    return posmlp.create_model("tiny", **({"num_classes": 7} | overrides)).eval()


def copy_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same_state(model, state):
    return all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if "num_batches" not in k)


def logits(model, clip):
    with torch.no_grad():
        return model(clip)


@pytest.fixture
def save(tmp_path):
    def to_file(content):
        torch.save(content, tmp_path / "weights.pt")
        return tmp_path / "weights.pt"

    return to_file


# --- normalisation -------------------------------------------------------------------------------------------------


def test_a_video_model_of_the_release_tells_its_normalisation(save):
    """Its images' models were trained by other code, and this project's own tensors do not say."""
    for state, model, expected in (
        (release_state(), tiny(), "slowfast"),
        (release_image_state(), tiny(), None),
        (canonical(release_state()), tiny(), None),
        (release_state(), tiny(frames=8, num_classes=5), "slowfast"),  # adapted
    ):
        report = posmlp.load_published(model, save({"model_state": {f"module.{k}": v for k, v in state.items()}}))
        assert report.normalisation == expected


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"weights": s, "model": None},
        lambda s: {"state_dict": s, "optimizer": {"lr": 0.1}},
        lambda s: {"module." + k: v for k, v in s.items()},
        lambda s: {"model": {"module." + k: v for k, v in s.items()}},
    ],
    ids=["bare", "model", "weights", "state_dict", "module.", "model of module."],
)
def test_the_release_loads_however_it_is_wrapped(save, wrap):
    model, expected = tiny(), tiny()
    posmlp.load_published(expected, canonical(release_state()))
    report = posmlp.load_published(model, save(wrap(release_state())))
    floats = sum(v.is_floating_point() for v in release_state().values())
    assert (report.loaded, report.adapted) == (floats, ())
    assert same_state(model, expected.state_dict())
    assert not same_state(tiny(), expected.state_dict())


@pytest.mark.parametrize("blocks", ["parallel", "cascade_ts", "joint", "spatial"])
def test_our_own_checkpoints_round_trip(save, blocks):
    model, other = tiny(blocks=blocks), posmlp.create_model("tiny", num_classes=7, blocks=blocks).eval()
    clip = torch.randn(1, 3, 4, 64, 64)
    assert not torch.equal(logits(model, clip), logits(other, clip))
    assert posmlp.load_published(other, str(save(model.state_dict()))).adapted == ()
    assert torch.equal(logits(model, clip), logits(other, clip))


def test_another_number_of_classes_keeps_the_fresh_head():
    model = tiny(num_classes=5)
    head = model.head.weight.clone(), model.head.bias.clone()
    state = release_state()
    report = posmlp.load_published(model, state)
    assert report.adapted == ("head: fresh, as the checkpoint has 7 classes and the model 5",)
    assert report.loaded == sum(v.is_floating_point() for v in state.values()) - 2
    assert torch.equal(model.head.weight, head[0])
    assert torch.equal(model.head.bias, head[1])
    assert torch.equal(model.norm.weight, state["norm.weight"])


def test_all_that_does_not_fit_is_listed_and_nothing_is_loaded():
    model = tiny()
    before = copy_of(model)
    state = release_state()
    del state["norm.weight"], state["blocks2.1.t_fc.encoder.fc1.bias"]
    state |= {"patch_embed1.extra": torch.zeros(3), "patch_embed3.proj.bias": torch.zeros(50)}
    with pytest.raises(CheckpointError) as error:
        posmlp.load_published(model, state)
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert lines == [
        "missing: norm.weight [64]",
        "missing: stages.1.blocks.1.units.temporal.fc1.bias [64]",
        "extra: stem.extra [3]",
        "wrong shape: stages.2.downsample.proj.bias is [50], expected [48]",
    ]
    assert same_state(model, before)


@pytest.mark.parametrize("shape", [(), (3,), (3, 5), (0, 4), (2, 3, 5)], ids=str)
def test_a_misshapen_tensor_is_named_whichever_it_is(shape):
    model = tiny()
    before = copy_of(model)
    for state in (release_state(), model.state_dict()):
        first = [k for k, v in state.items() if v.is_floating_point() and ("blocks1" in k or "stages.0" in k)]
        for key in [*first, "head.weight", "head.bias", "norm.weight"]:
            ours = list(canonical({"patch_embed": torch.zeros(1), key: torch.zeros(1)}))[1]
            with pytest.raises(CheckpointError, match=re.escape(ours)):
                posmlp.load_published(model, state | {key: torch.zeros(shape)})
    assert same_state(model, before)


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused_and_does_not_run(tmp_path, zipped):
    touched, path = tmp_path / "touched", tmp_path / "weights.pt"
    torch.save({**release_state(), "x": Malicious(touched)}, path, _use_new_zipfile_serialization=zipped)
    model = tiny()
    before = copy_of(model)
    with pytest.raises(CheckpointError, match=r"weights\.pt"):
        posmlp.load_published(model, path)
    assert not touched.exists()
    assert same_state(model, before)
    torch.load(path, weights_only=False)  # the trap was live
    assert touched.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"hello world", b"\x80\x02.", b"<html>404</html>", b"PK\x03\x04 cut", pickle.dumps([1], 2), bytes(99)],
    ids=["empty", "text", "empty pickle", "html", "zip head", "list", "zeros"],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        posmlp.load_published(tiny(), path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_is_refused(tmp_path, zipped):
    path = tmp_path / "weights.pt"
    torch.save(release_state(), path, _use_new_zipfile_serialization=zipped)
    whole, model = path.read_bytes(), tiny()
    for part in (0.01, 0.3, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(CheckpointError, match=r"weights\.pt"):
            posmlp.load_published(model, path)


@pytest.mark.parametrize("place", ["file", "file://", "memory://"])
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_files_of_any_kind_and_place(tmp_path, place, kind):
    """The content tells the kind, and not the name."""
    model, other = tiny(), posmlp.create_model("tiny", num_classes=7).eval()
    path = tmp_path / "weights"
    write = safetensors.torch.save_file if kind == "safetensors" else torch.save
    write(model.state_dict(), path)
    uri = {"file": str(path), "file://": f"file://{path}", "memory://": "memory://checkpoints/weights"}[place]
    if place == "memory://":
        fsspec.filesystem("memory").pipe_file("/checkpoints/weights", path.read_bytes())
    assert posmlp.load_published(other, uri).adapted == ()
    assert same_state(other, model.state_dict())


def test_a_damaged_safetensors_file_is_refused(tmp_path):
    path, model = tmp_path / "weights.safetensors", tiny()
    before = copy_of(model)
    whole = safetensors.torch.save(release_state())
    changed = whole.replace(b'"F32"', b'"F99"', 1)
    for content in (*(whole[: int(part * len(whole))] for part in (0.001, 0.3, 0.999)), whole + b"x", changed):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"weights\.safetensors: damaged"):
            posmlp.load_published(model, path)
    assert same_state(model, before)


def test_what_cannot_be_read_is_told(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot be read .*expected a file of weights"):
        posmlp.load_published(tiny(), tmp_path)
    with pytest.raises(UserError, match="nosuchscheme://bucket: no file system"):
        posmlp.load_published(tiny(), "nosuchscheme://bucket/weights.pt")
    with pytest.raises(FileNotFoundError):
        posmlp.load_published(tiny(), "memory://checkpoints/nowhere.safetensors")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], {"model": {"a": 1}}], ids=str)
def test_a_file_without_tensors_by_name_is_refused(save, content):
    with pytest.raises(CheckpointError, match="no named tensors"):
        posmlp.load_published(tiny(), save(content))


def test_a_missing_file_is_not_a_bad_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError):
        posmlp.load_published(tiny(), tmp_path / "nowhere.pt")


# --- the release's channel order -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "release", "window"), [("spatial", "fc", (1, 2, 3)), ("temporal", "t_fc", (4, 1, 1))])
def test_a_release_unit_computes_the_same(kind, release, window):
    """The release's unit written out: u and v are halves of fc1, and channel c uses table c mod S."""
    torch.manual_seed(0)
    dim, groups, offsets = 6, 2, math.prod(2 * n - 1 for n in window)
    shapes = {
        "norm.weight": (dim,),
        "norm.bias": (dim,),
        "fc1.weight": (2 * dim, dim),
        "fc1.bias": (2 * dim,),
        "gate_unit.pos.token_proj_n_bias": (1, math.prod(window), 1),
        "gate_unit.pos.window_relative_position_bias_table": (offsets, groups),
        "fc2.weight": (dim, dim),
        "fc2.bias": (dim,),
    }
    p = {k: torch.randn(shape, dtype=torch.float64) for k, shape in shapes.items()}
    x = torch.randn(2, *window, dim, dtype=torch.float64)  # [B, T, H, W, C], one window

    normed = F.layer_norm(x, (dim,), p["norm.weight"], p["norm.bias"])
    hidden = F.gelu(F.linear(normed, p["fc1.weight"], p["fc1.bias"]))
    u, v = hidden.permute(0, 4, 1, 2, 3).chunk(2, 1)  # [B, C, T, H, W]
    table, bias = p["gate_unit.pos.window_relative_position_bias_table"], p["gate_unit.pos.token_proj_n_bias"]
    gated = [
        torch.from_numpy(oracle.gate(u[:, [c]], v[:, [c]], table[:, c % groups][None], bias.flatten(), window))
        for c in range(dim)
    ]
    expected = x + F.linear(torch.cat(gated, 1).permute(0, 2, 3, 4, 1), p["fc2.weight"], p["fc2.bias"])

    block = Block("parallel", dim, groups, window, 0.0).double()
    state = canonical({f"blocks1.0.{release}.encoder.{k}": v for k, v in p.items()})
    unit = block.units[kind]
    unit.load_state_dict({k.removeprefix(f"stages.0.blocks.0.units.{kind}."): v for k, v in state.items()})
    block.steps = ((kind,),)  # this unit alone
    tokens = x.permute(4, 0, 1, 2, 3).reshape(dim, 2, 1, window[0], -1)
    with torch.no_grad():
        actual = block(tokens.clone(), window, None)
    torch.testing.assert_close(actual, expected.permute(4, 0, 1, 2, 3).reshape(tokens.shape), rtol=0, atol=1e-12)


def test_release_channel_c_goes_to_group_c_mod_s():
    """Four channels, two groups: 0 and 2 come first, in each half of fc1's outputs and in fc2's inputs."""
    unit = "blocks1.0.fc.encoder."
    state = canonical(
        {
            f"{unit}gate_unit.pos.window_relative_position_bias_table": torch.tensor([[10.0, 20.0]] * 9),
            f"{unit}fc1.weight": torch.arange(8.0)[:, None].expand(8, 4),
            f"{unit}fc1.bias": torch.arange(8.0),
            f"{unit}fc2.weight": torch.arange(4.0).expand(4, 4),
            f"{unit}fc2.bias": torch.arange(4.0),
        }
    )
    ours = {k.removeprefix("stages.0.blocks.0.units.spatial."): v for k, v in state.items()}
    assert ours["gate.table"].tolist() == [[10.0] * 9, [20.0] * 9]
    assert ours["fc1.bias"].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert ours["fc1.weight"][:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert ours["fc2.weight"][0].tolist() == [0, 2, 1, 3]
    assert ours["fc2.bias"].tolist() == [0, 1, 2, 3]


# --- other windows and clip lengths --------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [(16, 1, 1), (1, 14, 14), (4, 3, 5)])
def test_resizing_to_the_same_window_changes_nothing(window):
    table, bias = torch.randn(3, math.prod(2 * n - 1 for n in window)), torch.randn(math.prod(window))
    torch.testing.assert_close(resize_offsets(table, window, window), table, rtol=0, atol=1e-6)
    torch.testing.assert_close(resize_tokens(bias, window, window), bias, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("window", "new"), [((1, 14, 14), (1, 7, 7)), ((8, 1, 1), (16, 1, 1)), ((2, 7, 7), (3, 14, 4))]
)
def test_resizing_keeps_the_centre_the_ends_and_the_total(window, new):
    offsets, sizes = [2 * n - 1 for n in window], [2 * n - 1 for n in new]
    table, bias = torch.randn(2, *offsets), torch.randn(window)
    resized = resize_offsets(table.flatten(1), window, new).view(2, *sizes) * math.prod(new) / math.prod(window)
    middle, new_middle = ((slice(None), *(n - 1 for n in w)) for w in (window, new))
    torch.testing.assert_close(resized[new_middle], table[middle])
    for corner in ((0, 0, 0), (-1, -1, -1), (0, -1, 0), (-1, 0, -1)):
        torch.testing.assert_close(resized[(slice(None), *corner)], table[(slice(None), *corner)])
        torch.testing.assert_close(resize_tokens(bias.flatten(), window, new).view(new)[corner], bias[corner])
    constant = resize_offsets(torch.ones(1, math.prod(offsets)), window, new)
    torch.testing.assert_close(constant * math.prod(new), torch.full_like(constant, math.prod(window)))


@pytest.mark.parametrize(
    ("table", "tolerance"),
    [(lambda d: torch.ones_like(d), 1e-6), (lambda d: torch.exp(-((d / 8) ** 2)) + 0.3 * torch.sin(d / 8), 0.03)],
    ids=["constant", "smooth"],
)
def test_a_gate_resized_to_twice_the_frames_gives_each_frame_twice(table, tolerance):
    torch.manual_seed(0)
    t = 16
    gate, longer = PositionGate(1, (t, 1, 1)), PositionGate(1, (2 * t, 1, 1))
    with torch.no_grad():
        gate.table.copy_(table(torch.arange(1.0 - t, t))[None])
        gate.bias.fill_(0.5)
        longer.table.copy_(resize_offsets(gate.table, gate.window, longer.window))
        longer.bias.copy_(resize_tokens(gate.bias, gate.window, longer.window))
        u, v = 1 + 0.5 * torch.randn(2, 4, 1, 1, t, 1)
        expected = gate(u, v, gate.window).repeat_interleave(2, 3)
        actual = longer(u.repeat_interleave(2, 3), v.repeat_interleave(2, 3), longer.window)
    assert (actual - expected).norm() < tolerance * expected.norm()


def test_a_checkpoint_of_other_windows_and_frames_is_resized():
    model = tiny(windows=(7, 4, (3, 2), 2), frames=8)
    report = posmlp.load_published(model, release_state())
    spatial = [a for a in report.adapted if ".spatial." in a]
    assert spatial == [
        "stages.0.blocks.0.units.spatial.gate: window (1, 8, 8) resized to (1, 7, 7)",
        "stages.2.blocks.0.units.spatial.gate: window (1, 4, 4) resized to (1, 3, 2)",
    ]
    assert len(report.adapted) == 2 + 5
    assert all("(4, 1, 1) resized to (8, 1, 1)" in a for a in report.adapted if a not in spatial)
    state = canonical(release_state())
    key = "stages.0.blocks.0.units.temporal.gate."
    gate = model.stages[0].blocks[0].units["temporal"].gate
    assert torch.equal(gate.table, resize_offsets(state[key + "table"], (4, 1, 1), (8, 1, 1)))
    assert torch.equal(gate.bias, resize_tokens(state[key + "bias"], (4, 1, 1), (8, 1, 1)))


def test_a_joint_checkpoint_changes_its_clip_length_whatever_its_places(save):
    windows = ((4, 6), 4, (2, 3, 2), 2)
    model, longer = tiny(blocks="joint", windows=windows), tiny(blocks="joint", windows=windows, frames=8)
    report = posmlp.load_published(longer, save(model.state_dict()))
    assert "stages.0.blocks.0.units.joint.gate: window (4, 4, 6) resized to (8, 4, 6)" in report.adapted
    assert len(report.adapted) == 4  # the third stage has its own length


# --- image -> video ------------------------------------------------------------------------------------------------


def video_and_image_features(video, image, clip):
    with torch.no_grad():
        frames = [image.features(clip[:, :, [i]]) for i in range(clip.shape[2])]
        return video.features(clip), [torch.cat(maps, 2) for maps in zip(*frames, strict=True)]


@pytest.mark.parametrize("blocks", ["parallel", "cascade_ts", "cascade_st", "joint", MIXED], ids=str)
@pytest.mark.parametrize("origin", ["release", "ours"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_an_image_checkpoint_makes_a_video_model_that_sees_each_frame_the_same(blocks, origin, dtype, tolerance):
    image = tiny(blocks="spatial", frames=1)
    assert posmlp.load_published(image, release_image_state()).adapted == ()
    video = tiny(blocks=blocks, frames=4)
    source = release_image_state() if origin == "release" else image.state_dict()
    report = posmlp.load_published(video, source)
    assert report.loaded == len(image.state_dict()) - 2  # all but two counters
    assert any("temporal units: no-ops" in a or "joint units" in a for a in report.adapted)
    clip = torch.randn(2, 3, 6, 40, 40, dtype=dtype)  # longer than the window, and not whole windows
    for actual, expected in zip(*video_and_image_features(video.to(dtype), image.to(dtype), clip), strict=True):
        assert (actual - expected).abs().max() < tolerance * expected.abs().max()


def test_temporal_blocks_take_all_of_an_image_checkpoint_but_its_spatial_units():
    source = tiny(blocks="spatial", frames=1).state_dict()
    for state in (source, release_image_state()):
        video = tiny(blocks="temporal", frames=4)
        report = posmlp.load_published(video, state)
        shared = [k for k in video.state_dict() if ".units." not in k and "num_batches" not in k]
        assert report.loaded == len(shared)
        assert report.adapted == (
            "5 temporal units: no-ops at the start (fc2 = 0), as the checkpoint is an image model's",
            "5 spatial units of the image model: left out, as their blocks have only temporal ones",
        )
    posmlp.load_published(video, source)
    assert all(torch.equal(video.state_dict()[k], source[k]) for k in shared)
    with pytest.raises(CheckpointError, match=r"extra: stages\.0\.blocks\.0\.units\.spatial"):
        posmlp.load_published(video, tiny(blocks="parallel").state_dict())  # a video model of other blocks


@pytest.mark.parametrize("blocks", ["parallel", "joint", "temporal"])
def test_a_video_model_from_images_learns_in_time(blocks):
    """The units that start as no-ops get a gradient, so that training can bring time in."""
    video = tiny(blocks=blocks)
    posmlp.load_published(video, release_image_state())
    video(torch.randn(1, 3, 4, 64, 64)).square().sum().backward()
    for stage in video.stages:
        for block in stage.blocks:
            unit = block.units["joint" if blocks == "joint" else "temporal"]
            start = unit.gate.table if blocks == "joint" else unit.fc2.weight
            assert (start.grad != 0).float().mean() > 0.9


def test_an_image_checkpoint_of_other_windows_fits_a_joint_model():
    video = tiny(blocks="joint", windows=(6, 4, (2, 4), 2))
    report = posmlp.load_published(video, release_image_state())
    assert "stages.0.blocks.0.units.joint.gate: window (4, 8, 8) resized to (4, 6, 6)" in report.adapted
    gate = video.stages[0].blocks[0].units["joint"].gate
    maps = gate.table.view(4, 7, 11, 11)
    assert maps[:, 3].abs().min() > 0
    assert maps[:, [0, 1, 2, 4, 5, 6]].abs().max() == 0
