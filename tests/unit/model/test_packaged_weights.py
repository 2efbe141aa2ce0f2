"""Weights of the package: they are small, fit the recipe small_data, and know motions by the order of frames."""

import json

import pytest
import torch
from safetensors import safe_open

from pipelines.training.preflight import check_data, find_weights, read_splits
from posmlp import create_model
from posmlp.config import load_recipe
from posmlp.errors import UserError
from posmlp.model.checkpoint import load_published
from posmlp.video.augment import to_input
from posmlp.video.clip import load_clips
from posmlp.video.manifest import read_manifest
from posmlp.video.motion import make_motion_set
from posmlp.video.strokes import STROKE_CLASSES
from posmlp.weights import packaged_file

MOTION = packaged_file("posmlp:motion")


@pytest.fixture(scope="module")
def strokes(tmp_path_factory):
    """Strokes of another seed than those of the training: two clips of each class."""
    return make_motion_set(tmp_path_factory.mktemp("strokes"), kind="strokes", train=82, val=164, seed=5)


def top1(model, config, rows):
    hits = 0
    for row in rows.to_pylist():
        clips, _ = load_clips(row["uri"], row["sample_id"], config, epoch=0, train=False)
        with torch.no_grad():
            hits += int(model(to_input(torch.from_numpy(clips), config)).argmax() == row["label"])
    return hits / len(rows)


def test_the_file_is_small_and_says_how_it_was_made():
    with open(MOTION, "rb") as file:
        assert len(file.read()) < 2e6
    with safe_open(MOTION, "pt") as file:
        assert "benchmarks/packaged_weights.py" in file.metadata()["made by"]
        assert json.loads(file.metadata()["classes"]) == list(STROKE_CLASSES)


def test_they_know_strokes_that_they_have_not_seen_by_the_order_of_frames(strokes):
    config = load_recipe("small_data", ["data.cache_dir=null", "data.full_frame=false", "data.short_side=64"])
    model = create_model(config.model.name, **config.model.overrides() | {"num_classes": len(STROKE_CLASSES)}).eval()
    assert not load_published(model, MOTION).adapted
    rows = read_manifest(strokes / "val.csv").rows
    assert top1(model, config, rows) > 0.12  # chance is 1.2 %
    shuffled = config.model_copy(update={"data": config.data.model_copy(update={"frame_order": "shuffled"})})
    assert top1(model, shuffled, rows) < 0.08


def test_the_recipe_small_data_starts_from_them(strokes):
    paths = [f"data.{split}.path={strokes}/{split}.csv" for split in ("train", "val")]
    config = load_recipe("small_data", paths)
    assert config.model.weights == "posmlp:motion"
    assert find_weights(check_data(config, *read_splits(config))) == MOTION
    deeper = load_recipe("small_data", [*paths, "model.depths=[2, 2, 2, 2]"])
    with pytest.raises(UserError, match=r"(?s)missing: .*model\.weights=null starts from random weights"):
        find_weights(deeper)


def test_another_name_is_refused_with_the_names_that_there_are():
    with pytest.raises(UserError, match=r"model\.weights posmlp:ssv1: the package has only the weights motion"):
        find_weights(load_recipe("small_data", ["model.weights=posmlp:ssv1"]))
