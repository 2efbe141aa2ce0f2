"""Exported detection models: they score boxes as the model does, alone and in MLflow."""

import json
import sys

import mlflow
import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException

from pipelines.cli import main
from pipelines.registry.model_files import save_model_files
from posmlp import export as exporting
from posmlp.detection.clips import key_indices
from posmlp.export import METADATA_NAME, export, load_exported, load_exported_file
from posmlp.video.augment import to_input
from tests.helpers.key_frames import ACTIONS, detection_recipe
from tests.helpers.random_models import random_model, write_checkpoint

onnx = pytest.importorskip("onnx")
CASES = {  # clips, and the clip of each box
    "several boxes, one clip without": (4, [3, 0, 0, 2, 3, 3, 0]),
    "one box": (1, [0]),
    "one box in the last clip": (2, [1]),
    "as many boxes as clips": (2, [1, 0]),
    "no box": (2, []),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The recipe, its random model, and a folder with ``model/`` (MLflow's files), ``boxes.onnx``, ``int8.onnx``."""
    folder = tmp_path_factory.mktemp("boxes")
    config = detection_recipe(model={"depths": [1, 1, 1, 1]})
    checkpoint, model = write_checkpoint(folder / "boxes", config, classes=ACTIONS)
    save_model_files(checkpoint, folder / "model")
    assert main(["export", checkpoint, "--out", str(folder / "boxes.onnx")]) == 0
    assert main(["export", checkpoint, "--out", str(folder / "int8.onnx"), "--int8"]) == 0
    return config, model, folder


def path_of(folder, suffix):
    return folder / "model" / "data" / "model" / "model.pt2" if suffix == ".pt2" else folder / "boxes.onnx"


def some_inputs(clips, of_boxes):
    """Noise, and boxes of which some lie partly outside; the last one is empty."""
    rng = np.random.default_rng(len(of_boxes))
    pixels = rng.integers(256, size=(clips, 4, 32, 32, 3), dtype=np.uint8)
    corner, size = rng.uniform(-0.1, 0.7, (len(of_boxes), 2)), rng.uniform(0.05, 0.9, (len(of_boxes), 2))
    size[6:] = 0
    boxes = np.concatenate([corner, corner + size], 1).astype(np.float32)
    return torch.from_numpy(pixels), torch.from_numpy(boxes), torch.tensor(of_boxes, dtype=torch.int64)


def one_by_one(model, config, clips, boxes, box_clip):
    """The logits of each box alone with its clip, in fp64."""
    model = model.double()
    first, logits = torch.zeros(1, dtype=torch.int64), torch.zeros(len(boxes), len(ACTIONS), dtype=torch.float64)
    with torch.no_grad():
        for i, clip in enumerate(box_clip.tolist()):
            logits[i] = model(to_input(clips[clip : clip + 1], config).double(), boxes[i : i + 1].double(), first)[0]
    model.float()
    return logits


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_file_scores_each_box_as_the_model_does(saved, suffix, case):
    config, model, folder = saved
    inputs = some_inputs(*CASES[case])
    expected = one_by_one(model, config, *inputs)
    found = load_exported(path_of(folder, suffix).read_bytes(), suffix)(*inputs)
    assert found.dtype == torch.float32 and found.shape == (len(CASES[case][1]), len(ACTIONS))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


def test_int8_is_smaller_and_about_the_same(saved):
    config, model, folder = saved
    content = (folder / "int8.onnx").read_bytes()
    inputs = some_inputs(*CASES["several boxes, one clip without"])
    expected = one_by_one(model, config, *inputs)
    difference = (load_exported(content, ".onnx")(*inputs).double() - expected).abs().max()
    assert 0 < difference < 0.2 * expected.abs().max()
    assert len(content) < (folder / "boxes.onnx").stat().st_size


def test_an_onnx_file_names_its_inputs(saved):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(saved[-1] / "boxes.onnx"), providers=["CPUExecutionProvider"])
    found = [(each.name, each.type, each.shape) for each in (*session.get_inputs(), *session.get_outputs())]
    assert found == [
        ("clips", "tensor(uint8)", ["batch", 4, 32, 32, 3]),
        ("boxes", "tensor(float)", ["boxes", 4]),
        ("box_clip", "tensor(int64)", ["boxes"]),
        ("logits", "tensor(float)", ["boxes", len(ACTIONS)]),
    ]
    about = json.loads(session.get_modelmeta().custom_metadata_map[METADATA_NAME])
    assert about == load_exported_file(str(path_of(saved[-1], ".pt2")))[1]


def test_the_metadata_say_what_goes_in_and_out_and_which_frames(saved):
    config, _, folder = saved
    about = mlflow.models.get_model_info(str(folder / "model")).metadata
    assert about == load_exported_file(str(path_of(folder, ".pt2")))[1]
    assert about["classes"] == list(ACTIONS)
    parts = [about[key] for key in ("input", "boxes", "box_clip", "output")]
    assert [(part["name"], part["shape"], part["type"].partition(",")[0]) for part in parts] == [
        ("clips", [None, 4, 32, 32, 3], "uint8"),
        ("boxes", [None, 4], "float32"),
        ("box_clip", [None], "int64"),
        ("logits", [None, len(ACTIONS)], "float32"),
    ]
    assert "fusion" not in about["output"] and "sigmoid" in about["output"]["type"]
    sampling, key_frame = about["sampling"], 500
    frames = key_frame + sampling["first_frame"] + sampling["stride"] * np.arange(4)
    assert frames.tolist() == key_indices(1000, key_frame, 4, config.data.stride).tolist()


def test_both_flavours_in_mlflow_score_boxes(saved, monkeypatch):
    config, model, folder = saved
    monkeypatch.setattr(sys, "path", [*sys.path])  # MLflow puts the model's code first
    inputs = some_inputs(*CASES["several boxes, one clip without"])
    expected = one_by_one(model, config, *inputs)
    with torch.no_grad():
        module = mlflow.pytorch.load_model(str(folder / "model"))
        torch.testing.assert_close(module(*inputs).double(), expected, rtol=0, atol=1e-4)
    pyfunc = mlflow.pyfunc.load_model(str(folder / "model"))
    table = dict(zip(("clips", "boxes", "box_clip"), (each.numpy() for each in inputs), strict=True))
    np.testing.assert_allclose(pyfunc.predict(table), expected.numpy(), rtol=0, atol=1e-4)
    for wrong, message in (
        (table["box_clip"][:-1], "box_clip has 6 numbers, expected 7"),
        (table["box_clip"] + 1, "box_clip has 4, expected the number of a clip, 0 to 3"),
    ):
        with pytest.raises(MlflowException, match=message):
            pyfunc.predict(table | {"box_clip": wrong})


def test_a_file_that_mixes_up_the_clips_of_boxes_is_found_out(saved, monkeypatch):
    config, _, folder = saved
    run = load_exported(path_of(folder, ".pt2").read_bytes(), ".pt2")
    monkeypatch.setattr(
        exporting, "load_exported", lambda *_: lambda clips, boxes, box_clip: run(clips, boxes, box_clip.flip(0))
    )
    found = export(random_model(config, seed=3), config, {}, ".pt2")
    assert found.largest > 0 and not found.matches_model
