"""Exported files: they compute what the model does, alone; and what is refused."""

import ast
import contextlib
import copy
import dataclasses
import functools
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.cli import main
from pipelines.inference import export as export_command
from pipelines.inference.predict import predict
from posmlp import create_model
from posmlp import export as exporting
from posmlp.export import METADATA_NAME, Exported, export, load_exported
from posmlp.model.supernet import Supernet
from posmlp.video.augment import to_input
from posmlp.video.clip import load_clips
from tests.helpers.random_models import CLASSES, random_model, videos_of, write_checkpoint
from tests.helpers.small_runs import recipe_for

onnx = pytest.importorskip("onnx")
DOCS = Path(__file__).parents[3] / "docs" / "export.md"
BLOCKS = ["model.blocks=[joint, cascade_ts, parallel, spatial]", "model.blocks=[parallel, joint, cascade_st, temporal]"]
# Of 10 x 10, 5 x 5, 3 x 3 and 2 x 2 tokens, windows of two moments or of all three: padded in space and in time.
PADDED = ["model.frames=3", "model.image_size=40", "model.windows=[[2, 4, 4], [2, 4, 4], 2, 2]"]
PADDED += ["data.modality=rgb"]
SHALLOW = "model.depths=[1, 1, 1, 1]"


def recipe(*overrides):
    return recipe_for("unused", "unused", "model.num_classes=8", SHALLOW, *overrides)


@functools.cache
def exported(overrides, suffix, int8=False):
    """A recipe, its random model, and the file exported from it: made once, as tracing takes seconds."""
    config = recipe(*overrides)
    model = random_model(config)
    return config, model, export(model, config, {"classes": CLASSES}, suffix, int8=int8)


def some_clips(config, batch, seed=0):
    variant = config.model.variant()
    shape = (batch, variant.frames, variant.image_size, variant.image_size, 3)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def exact_logits(model, config, clips):
    """In fp64, which the fast path on CPUs does not serve."""
    with torch.no_grad():
        return model.double()(to_input(clips, config).double())


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize(
    "overrides", [(BLOCKS[0],), (BLOCKS[1], *PADDED)], ids=["whole windows, frame differences", "padded, frames"]
)
def test_a_file_computes_what_the_model_does_for_any_batch(overrides, suffix):
    config, _, found = exported(overrides, suffix)
    assert found.matches_model and found.difference < 1e-4 * found.largest
    run = load_exported(found.content, suffix)
    for batch in (1, 2, 5):
        clips = some_clips(config, batch)
        expected = exact_logits(random_model(config), config, clips)
        torch.testing.assert_close(run(clips).double(), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_the_largest_published_windows_and_depths():
    """s16's own, at a fraction of its width and size: windows of 14, 14, 14 and 7 places, all blocks."""
    small = ["model.dims=[16, 32, 32, 64]", "model.groups=[4, 4, 8, 8]", "model.image_size=112", "model.frames=8"]
    config = recipe_for("unused", "unused", "model.name=s16", "model.num_classes=8", *small, "data.short_side=null")
    assert export(random_model(config), config, {}, ".pt2").matches_model


def test_a_supernet_stands_for_its_own_architecture():
    choices = "model.choices={blocks: [[parallel, joint], [], [], [spatial, parallel]], depths: [[1, 2], [], [], []]}"
    config = recipe(choices)
    model = random_model(config)
    assert isinstance(model, Supernet)
    run = load_exported(export(model, config, {}, ".pt2").content, ".pt2")
    member = create_model("tiny", **recipe().model.overrides())
    member.load_state_dict(model.member(model.own).state_dict())
    clips = some_clips(config, 2)
    expected = exact_logits(member.eval(), config, clips)
    torch.testing.assert_close(run(clips).double(), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_exporting_leaves_the_model_as_it_was():
    config, model, _ = exported((BLOCKS[0],), ".pt2")
    fresh, clips = random_model(config), some_clips(config, 2)
    assert list(model.state_dict()) == list(fresh.state_dict())
    expected = exact_logits(fresh, config, clips)
    torch.testing.assert_close(exact_logits(copy.deepcopy(model), config, clips), expected)


def test_int8_keeps_the_linear_weights_in_a_byte_and_about_the_scores():
    _, model, exact = exported((BLOCKS[0],), ".onnx")
    _, _, found = exported((BLOCKS[0],), ".onnx", int8=True)
    assert found.matches_model and found.difference > 0
    tensors = onnx.load(io.BytesIO(found.content)).graph.initializer
    weights = [onnx.numpy_helper.to_array(each) for each in tensors if each.name.endswith("weight_quantized")]
    steps = sum(len(block.steps) for stage in model.stages for block in stage.blocks)
    assert [weight.dtype for weight in weights] == [np.int8] * 2 * steps
    # Processors without VNNI add two products of a byte (0 to 255) and a weight in 16 bits, and cut larger sums.
    assert all(2 * 255 * np.abs(weight.astype(int)).max() < 2**15 for weight in weights)
    assert len(found.content) < len(exact.content)


ALONE = """
import json, sys
sys.modules.update(dict.fromkeys(["posmlp", "pipelines"]))  # importing them fails
import numpy as np, torch
extra = {"posmlp.json": ""}
model = torch.export.load(sys.argv[1], extra_files=extra).module()
about = json.loads(extra["posmlp.json"])
clips = torch.from_numpy(np.load(sys.argv[2]))
print(json.dumps([about["classes"], about["input"]["shape"], model(clips).softmax(1).tolist()]))
"""


@pytest.fixture(scope="module")
def exported_run(motion_set, tmp_path_factory):
    """A folder where ``posmlp export`` was called twice, with its run, the run's recipe, and what was printed.

    The best of the run's two checkpoints is in ``small.pt2``, which is the default name, and in ``made/demo.onnx``.
    """
    folder = tmp_path_factory.mktemp("exported")
    config = recipe_for(folder / "runs", motion_set, "model.num_classes=8", SHALLOW, "data.cache_dir=null")
    run = folder / "runs" / "small"
    write_checkpoint(run, config, step=3, metrics={"val/top1": 0.9})
    write_checkpoint(run, config, step=9, metrics={"val/top1": 0.4})
    (run / "run.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(folder)
        assert main(["export", "small"]) == 0
        assert main(["export", "small", "--out", "made/demo.onnx"]) == 0
    return folder, run, config, printed.getvalue()


def test_the_verb_writes_files_and_nothing_else(exported_run):
    folder, _, _, printed = exported_run
    for out in (folder / "small.pt2", folder / "made" / "demo.onnx"):
        assert f"{out}: " in printed
        assert {path.name for path in out.parent.iterdir()} <= {out.name, "made", "runs"}


def test_an_exported_file_works_alone(exported_run, motion_set, tmp_path):
    """Of the best checkpoint; its probabilities are those of `posmlp predict`."""
    folder, run, config, _ = exported_run
    (video,) = videos_of(motion_set, 1)
    clips, _ = load_clips(video, "any", config, epoch=0, train=False)
    np.save(tmp_path / "clips.npy", clips)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE, str(folder / "small.pt2"), str(tmp_path / "clips.npy")]
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    classes, shape, shares = json.loads(done.stdout)
    assert classes == CLASSES
    assert shape == [None, *clips.shape[1:]]
    (expected,) = predict(str(run), [video], top=8)
    assert dict(zip(classes, shares[0], strict=True)) == pytest.approx(dict(expected.top), abs=1e-5)


def test_an_onnx_file_says_what_it_is(tmp_path):
    import onnxruntime

    content = exported((BLOCKS[0],), ".onnx")[2].content
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map[METADATA_NAME]) == {"classes": CLASSES}
    (clips,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (clips.name, clips.type, clips.shape) == ("clips", "tensor(uint8)", ["batch", 4, 32, 32, 3])
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", 8])
    for place in (__file__.encode(), b"backbone.py", b"site-packages"):  # of the machine that made it
        assert place not in content


def test_the_files_are_used_as_the_docs_say(exported_run, tmp_path, monkeypatch, capsys):
    folder, *_ = exported_run
    shutil.copy(folder / "small.pt2", tmp_path / "demo.pt2")
    shutil.copy(folder / "made" / "demo.onnx", tmp_path)
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        capsys.readouterr()
        exec(snippet, {})
        first, second = ast.literal_eval(capsys.readouterr().out)
        assert first == second and first in CLASSES


@pytest.fixture(scope="module")
def run_folder(motion_set, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = recipe_for(folder, motion_set, "model.num_classes=8", SHALLOW)
    write_checkpoint(folder / "small", config)
    return folder / "small"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--out", "model.pth"], "unknown format '.pth': expected a file that ends in .pt2 or .onnx"),
        (["--out", "model"], "unknown format ''"),
        (["--out", "model.pt2", "--int8"], "--int8 writes ONNX files"),
        (["--int8"], "--int8 writes ONNX files"),
        (["--out", "file/model.pt2"], "cannot be written, see --out"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_1(run_folder, tmp_path, monkeypatch, capsys, options, expected):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run_folder), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("posmlp: ") and error.count("\n") == 1
    assert expected in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_uri_with_options_has_the_format_of_its_file(run_folder, monkeypatch):
    written = []
    monkeypatch.setattr(export_command.storage, "write_bytes", lambda uri, content: written.append(uri))
    monkeypatch.setattr(export_command.storage, "remove", lambda uri: None)
    export_command.export(str(run_folder), "s3://b/m.pt2?region=us-east-1")
    assert written == ["s3://b/m.pt2.part?region=us-east-1", "s3://b/m.pt2?region=us-east-1"]


def test_an_unknown_run_is_one_line_and_exit_code_1(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("posmlp: no run nowhere")


def test_missing_packages_are_named_with_what_installs_them(run_folder, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    assert main(["export", str(run_folder), "--out", str(tmp_path / "model.onnx")]) == 1
    assert capsys.readouterr().err == "posmlp: .onnx files need onnxscript: pip install onnxscript\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_a_file_that_computes_something_else_is_not_written(run_folder, tmp_path, monkeypatch, capsys, wrong):
    honest = exporting.load_exported

    def dishonest(*args):
        run = honest(*args)
        return lambda clips: run(clips) * (1 + wrong)

    monkeypatch.setattr(exporting, "load_exported", dishonest)
    assert main(["export", str(run_folder), "--out", str(tmp_path / "model.pt2")]) == 1
    assert "was not written: its logits differ" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("suffix", "int8", "tolerance"), [(".pt2", False, 1e-4), (".onnx", False, 1e-4), (".onnx", True, 0.2)]
)
def test_the_tolerance_of_a_format(suffix, int8, tolerance):
    """The shares of the largest logit that docs/export.md promises."""
    found = exported((BLOCKS[0],), suffix, int8)[2]
    for share, good in ((0.98, True), (1.02, False)):
        assert dataclasses.replace(found, difference=share * tolerance * found.largest).matches_model is good


@pytest.mark.parametrize("wrong", [0.5e-4, 1.5e-4])
def test_the_difference_is_the_largest_between_file_and_model(monkeypatch, wrong):
    """The file's logits are replaced by those of the model, one of them changed."""
    config, model, _ = exported((BLOCKS[0],), ".pt2")
    logits = []

    def load(*_):
        def run(clips):
            with torch.no_grad():
                logits.append(model(to_input(clips, config)))
            changed = logits[-1].clone()
            changed.view(-1)[changed.abs().argmax()] *= 1 + wrong
            return changed

        return run

    monkeypatch.setattr(exporting, "load_exported", load)
    found = export(model, config, {}, ".pt2")
    largest = max(float(each.abs().max()) for each in logits)
    assert found.largest == pytest.approx(largest)
    assert found.difference == pytest.approx(wrong * largest, rel=2e-2)
    assert found.matches_model == (wrong < 1e-4)


@pytest.mark.parametrize(("difference", "good"), [(0.0, True), (0.2, True), (0.21, False), (float("nan"), False)])
def test_what_is_good(difference, good):
    assert Exported(b"", difference, 2.0, 0.1).matches_model is good


def test_scores_of_int8_are_close_on_pictures(motion_set):
    """On drawn clips, not noise: the likeliest class of a model with clear scores stays."""
    config = recipe(BLOCKS[0], "data.cache_dir=null")
    run = load_exported(exported((BLOCKS[0],), ".onnx", int8=True)[2].content, ".onnx")
    clips = [load_clips(video, "any", config, epoch=0, train=False)[0] for video in videos_of(motion_set, 8)]
    clips = torch.from_numpy(np.concatenate(clips))
    expected = exact_logits(random_model(config), config, clips)
    difference = (run(clips).double() - expected).abs().max()
    assert difference < 0.1 * expected.abs().max()
