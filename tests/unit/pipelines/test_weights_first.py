"""``model.weights`` is opened and checked before Ray, the run's folder and the MLflow run exist."""

import os

import pytest
import safetensors.torch
import torch

import posmlp
from pipelines.cluster import session
from pipelines.runs import checkpoints
from pipelines.studies.study import Study
from pipelines.training import train as training
from pipelines.training.preflight import check_data, find_weights, read_splits
from pipelines.tuning import supernet as supernets
from pipelines.tuning import tune as tuning
from posmlp.config import load_recipe
from posmlp.errors import UserError


class Started(Exception):
    """All checks have passed: Ray would start now."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory in which Ray must not start, nor an MLflow run."""

    def start(*args, **kwargs):
        raise Started

    for module in (session, training, tuning, supernets):
        monkeypatch.setattr(module, "start_ray", start)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recipe(folder, motion_set):
    def make(*overrides):
        splits = [f"data.{split}.path={motion_set}/{split}.csv" for split in ("train", "val")]
        sizes = ["model.frames=4", "model.image_size=32", "train.global_batch=8", "name=run"]
        return load_recipe("demo", [*splits, *sizes, "data.cache_dir=null", *overrides])

    return make


def weights_of(recipe, **overrides):
    config = recipe()
    train_set, val_set = read_splits(config)
    model = check_data(config, train_set, val_set).model
    return posmlp.create_model(model.name, **(model.overrides() | overrides)).state_dict()


def write_bad(kind, state, path):
    """Write a file that cannot be used. Returns what the message says about it."""
    if kind == "web page":
        path.write_text("<!DOCTYPE html>")
        return "a web page, not weights"
    if kind == "folder":
        path.mkdir()
        return "holds no checkpoint"
    if kind == "missing":
        return "holds no checkpoint"
    if kind == "NaN":
        state["norm.bias"][3] = torch.nan
    if kind == "ResNet":
        state = {f"layer{i}.0.conv1.weight": torch.ones(3) for i in range(9)}
    if kind == "other model":
        del state["norm.bias"]
    torch.save({"model_state": state}, path)
    return {
        "NaN": r"cannot be used: model_state\.norm\.bias holds 1 of \d+ values that are NaN",
        "ResNet": r"is of another architecture: it holds model_state\.layer0",
        "other model": r"does not fit the model \(1 problem\).*\n  missing: norm\.bias",
    }[kind]


KINDS = ["web page", "folder", "missing", "NaN", "ResNet", "other model"]


@pytest.mark.parametrize("verb", ["train", "tune", "supernet"])
@pytest.mark.parametrize("kind", KINDS)
def test_bad_weights_leave_nothing_behind(folder, recipe, kind, verb):
    path = folder / "w.pth"
    expected = write_bad(kind, weights_of(recipe), path)
    before = sorted(os.listdir(folder))
    config = recipe(f"model.weights={path}")
    run = {
        "train": lambda: training.train(config),
        "tune": lambda: tuning.tune(Study(recipe=config, name="look", space="learning", trials=2)),
        "supernet": lambda: supernets.supernet(config, "same_width", count=2),
    }[verb]
    if (kind, verb) == ("other model", "supernet"):
        expected = "does not fit the model"  # a supernet has other tables too
    with pytest.raises(UserError, match=rf"^model\.weights.*{path}.*{expected}") as error:
        run()
    assert "model.weights=null" in str(error.value)
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("kind", ["pth", "safetensors", "run"])
def test_good_weights_are_found(folder, recipe, kind):
    state = weights_of(recipe, num_classes=99)
    path = str(folder / "w.pth")
    if kind == "pth":
        torch.save({"model_state": state}, path)
    elif kind == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        info = checkpoints.CheckpointInfo(1, 1, {}, ["a"], recipe().model_dump(mode="json"))
        path = f"{checkpoints.save(str(folder / 'other'), info, state, {})}/{checkpoints.WEIGHTS}"
    config = recipe(f"model.weights={folder / 'other' if kind == 'run' else 'w.pth'}")
    with pytest.raises(Started):
        training.train(config)
    train_set, val_set = read_splits(config)
    assert find_weights(check_data(config, train_set, val_set)) == path


def test_a_run_that_resumes_does_not_need_its_weights_any_more(folder, recipe):
    config = recipe(f"model.weights={folder}/deleted.pth")
    with pytest.raises(UserError, match="holds no checkpoint"):
        training.train(config)
    info = checkpoints.CheckpointInfo(1, 1, {}, ["a"], config.model_dump(mode="json"))
    checkpoints.save(training.run_folder(config), info, weights_of(recipe), {})
    with pytest.raises(Started):
        training.train(config)


def test_a_space_that_chooses_the_weights_is_checked_with_its_own(folder, recipe):
    (folder / "space.py").write_text(
        "from tune_spaces import Space\n"
        "def space(recipe):\n"
        '    return Space({"from": ("good.pth", "bad.pth")}, lambda m: {"model.weights": m["from"]})\n'
    )
    torch.save(weights_of(recipe), folder / "good.pth")
    study = Study(recipe=recipe("model.weights=nowhere.pth"), name="look", space="space.py", searcher="grid")
    with pytest.raises(Started):
        tuning.tune(study)
    (folder / "good.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"model\.weights: good\.pth: empty"):
        tuning.tune(study.model_copy(update={"name": "other"}))
