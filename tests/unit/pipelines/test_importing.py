"""``posmlp import``: the run that it writes is the file's model, and what it refuses."""

from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

import posmlp
from pipelines.cli import main
from pipelines.inference.importing import import_model
from pipelines.inference.predict import predict
from pipelines.runs import checkpoints
from pipelines.runs.models import find_checkpoint, load_trained_model
from pipelines.runs.record import read_record
from pipelines.training.preflight import check_data, check_record, find_weights, read_splits
from posmlp.config import load_recipe
from posmlp.errors import UserError
from posmlp.export import load_exported, load_exported_file
from posmlp.video.clip import load_clips
from posmlp.video.manifest import read_split
from tests.helpers.published_model import (
    CASE,
    PARITY,
    PUBLISHED,
    WINDOWS,
    fill,
    published_logits,
    release_state,
    write_imported_run,
)
from tests.helpers.random_models import videos_of
from tests.helpers.small_runs import recipe_for


@pytest.fixture
def file(tmp_path):
    """A checkpoint as the published trainer writes it, of the tiny model with 7 classes."""
    path = tmp_path / "checkpoint_epoch_00060.pyth"
    torch.save({"epoch": 59, "model_state": release_state(), "optimizer_state": {}, "cfg": "MODEL: {}"}, path)
    return str(path)


@pytest.fixture
def recipe(tmp_path):
    """The recipe of the tiny model: its windows and classes, the published pixels, and no list of videos."""

    def make(*overrides):
        size = ["model.frames=4", "model.image_size=64", WINDOWS, "model.num_classes=7"]
        lists = ["data.train.path=absent.csv", "data.val.path=absent.csv", f"train.storage={tmp_path}/runs"]
        return load_recipe("demo", ["name=imported", *size, *lists, *PUBLISHED, *overrides])

    return make


def test_an_imported_model_has_the_published_logits(file, recipe):
    """Golden numbers of the published implementation, from its own layout of weights."""
    found = import_model(file, recipe())
    assert (found.report.loaded, found.report.adapted) == (len(release_state()), ())
    model, info = load_trained_model(find_checkpoint(found.run))
    clip = torch.from_numpy(fill.clip((CASE["batch"], 3, CASE["frames"], CASE["size"], CASE["size"]))).float()
    with torch.no_grad():
        logits = model(clip).double().numpy()
    np.testing.assert_allclose(logits, np.load(PARITY / "golden_tiny.npz")["logits"], rtol=0, atol=1e-5)
    assert (info.step, info.epoch, info.metrics) == (0, 0, {})
    assert info.classes == ["0", "1", "2", "3", "4", "5", "6"]
    assert info.recipe().model.weights == file


def test_the_recipe_of_the_published_test_describes_the_released_model(tmp_path):
    """Its S/16 for Something-Something, at full size."""
    state = {k: torch.from_numpy(v) for k, v in fill.state(PARITY / "layout_s16.json").items()}
    torch.save({"model_state": state}, tmp_path / "w.pth")
    config = load_recipe("ssv1_published_test", ["data.classes=null", f"train.storage={tmp_path}/runs"])
    model, _ = load_trained_model(import_model(str(tmp_path / "w.pth"), config).run)
    with torch.no_grad():
        logits = model(torch.from_numpy(fill.clip((1, 3, 16, 224, 224))).float()).double().numpy()
    np.testing.assert_allclose(logits, np.load(PARITY / "golden_s16.npz")["logits"], rtol=0, atol=1e-5)


def test_files_and_runs_may_be_uris(file, recipe):
    fsspec.filesystem("memory").pipe_file("/imports/w.pth", Path(file).read_bytes())
    found = import_model("memory://imports/w.pth", recipe(), "memory://imports/run")
    assert load_trained_model(find_checkpoint("memory://imports/run"))[1].recipe() == found.config
    assert found.config.model.weights == "memory://imports/w.pth"


def test_an_import_is_for_recognition(file, recipe, tmp_path):
    with pytest.raises(UserError, match=r"task detection: .* model\.weights="):
        import_model(file, recipe().model_copy(update={"task": "detection"}))
    assert not (tmp_path / "runs").exists()


def test_the_weights_of_a_run_of_another_task_are_refused(recipe, scene_set, tmp_path):
    config = recipe_for(tmp_path / "runs", scene_set)
    info = checkpoints.CheckpointInfo(0, 0, {}, ["a"], config.model_dump(mode="json"))
    folder = checkpoints.save(f"{tmp_path}/runs/boxes", info, {"x": torch.zeros(1)}, {})
    with pytest.raises(UserError, match=r"weights\.safetensors is of a run for detection, and an import is of"):
        import_model(f"{folder}/{checkpoints.WEIGHTS}", recipe())


def test_a_command_imports_and_says_what_it_has_found(file, recipe, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(recipe().to_yaml())
    assert main(["import", file, str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "here")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"weights {len(release_state())} tensors of {file} classes 7, numbers, in the order" in printed
    assert "normalisation slowfast, as the file's" in printed
    assert find_checkpoint(str(tmp_path / "here")) == str(tmp_path / "here/checkpoints/step-0000000000")
    assert main(["runs", str(tmp_path)]) == 0
    assert "imported  imported" in capsys.readouterr().out  # name and state
    assert main(["checkpoints", str(tmp_path / "here")]) == 0


def test_the_classes_are_those_of_the_class_file_else_of_the_training_list(file, recipe, tmp_path):
    names = [f"class {letter}" for letter in "gfedcba"]
    (tmp_path / "classes.txt").write_text("\n".join(names))
    (tmp_path / "train.csv").write_text("path,label\n" + "\n".join(f"{n}.mp4,{n}" for n in names))  # no video is there
    named, listed = f"data.classes={tmp_path}/classes.txt", f"data.train.path={tmp_path}/train.csv"
    for number, (overrides, expected) in enumerate([((named, listed), names), ((listed,), sorted(names))]):
        found = import_model(file, recipe(*overrides, f"name=run{number}"))
        assert load_trained_model(found.run)[1].classes == expected
        found = import_model(file, recipe(*overrides, "model.num_classes=null", f"name=counted{number}"))
        assert found.config.model.num_classes == 7


def test_a_model_of_another_trainer_without_a_known_normalisation(recipe, tmp_path):
    config = recipe("data.normalisation=imagenet")
    model = posmlp.create_model(config.model.name, **config.model.overrides())
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "own.pt")
    found = import_model(str(tmp_path / "own.pt"), config)
    assert "imagenet, the recipe's; the file does not tell" in str(found)
    loaded = load_trained_model(found.run)[0].state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in model.state_dict().items())


def write(kind, path):
    state = release_state()
    if kind == "web page":
        path.write_text("<!DOCTYPE html>")
    elif kind == "folder":
        path.mkdir()
    elif kind == "ResNet":
        torch.save({f"layer{i}.0.conv1.weight": torch.ones(3) for i in range(9)}, path)
    elif kind == "cut":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-999])
    elif kind == "images":
        torch.save({k: v for k, v in state.items() if ".t_fc." not in k}, path)
    elif kind != "absent":
        torch.save(state, path)


@pytest.mark.parametrize(
    ("kind", "overrides", "expected"),
    [
        ("absent", [], r"no file .*w\.pth; expected a file of weights"),
        ("web page", [], r"w\.pth: a web page, not weights"),
        ("folder", [], r"w\.pth: cannot be read \(Is a directory\); expected a file of weights"),
        ("cut", [], r"w\.pth: damaged or cut short"),
        ("ResNet", [], r"w\.pth is of another architecture: it holds layer0"),
        ("images", [], r"(?s)not the recipe's model as it is.*\n  5 temporal units: no-ops.*model\.weights="),
        ("good", ["model.depths=[1, 1, 1, 1]"], r"does not fit the model .*expected a checkpoint of the same variant"),
        ("good", ["model.num_classes=8"], r"(?s)as it is.*the checkpoint has 7 classes and the model 8.*num_classes"),
        ("good", ["model.frames=8"], r"(?s)window \(4, 1, 1\) resized to \(8, 1, 1\).*and 1 more.*model\.frames"),
        (
            "good",
            ["data.normalisation=imagenet"],
            r"data\.normalisation is imagenet, .*w\.pth was trained with slowfast; set data\.normalisation=slowfast",
        ),
        ("good", ["model.num_classes=null"], r"model\.num_classes is null, and neither data\.classes nor a training"),
        ("good", ["data.classes=absent.txt"], r"absent\.txt: no such file"),
        ("good", ["data.classes={}/eight.txt"], r"model\.num_classes is 7, but .*eight\.txt has 8 classes"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 12 else None,
)
def test_what_does_not_fit_is_one_message_and_writes_nothing(recipe, tmp_path, monkeypatch, kind, overrides, expected):
    monkeypatch.chdir(tmp_path)
    write(kind, tmp_path / "w.pth")
    (tmp_path / "eight.txt").write_text("\n".join("abcdefgh"))
    with pytest.raises(UserError, match=expected):
        import_model("w.pth", recipe(*(text.format(tmp_path) for text in overrides)))
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_holds_a_run_is_left_alone(file, recipe, tmp_path):
    found = import_model(file, recipe())
    before = Path(find_checkpoint(found.run), checkpoints.INFO).read_bytes()
    with pytest.raises(UserError, match=r"runs/imported exists already; choose another name"):
        import_model(file, recipe())
    assert Path(find_checkpoint(found.run), checkpoints.INFO).read_bytes() == before
    with pytest.raises(UserError, match=r"holds an imported model, .*model\.weights=.*runs/imported"):
        check_record(found.run, read_record(found.run), recipe(), {}, 0, False)


# --- at work -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def at_work(motion_set, tmp_path_factory):
    return write_imported_run(tmp_path_factory.mktemp("at_work"), motion_set)


def test_predictions_are_the_softmax_of_the_summed_logits(at_work, motion_set):
    run, config, model = at_work
    names = read_split(config.data, "train").classes
    files = videos_of(motion_set, 3)
    for prediction in list(predict(run, files, top=8)):  # one video is open at a time
        views, _ = load_clips(prediction.file, "any", config, epoch=0, train=False)
        assert views.shape == (6, 4, 32, 32, 3)
        logits = published_logits(model, views).sum(0)
        assert [name for name, _ in prediction.top] == [names[i] for i in np.argsort(-logits)]
        shares = np.exp(logits / 6 - logits.max() / 6)
        expected = np.sort(shares / shares.sum())[::-1]
        np.testing.assert_allclose([share for _, share in prediction.top], expected, atol=1e-5)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_an_exported_file_has_the_checkpoints_pixels(at_work, tmp_path, suffix):
    pytest.importorskip("onnx")
    run, _, model = at_work
    out = tmp_path / f"model{suffix}"
    assert main(["export", run, "--out", str(out)]) == 0
    clips = np.random.default_rng(0).integers(0, 256, (2, 4, 32, 32, 3), dtype=np.uint8)
    logits = load_exported(out.read_bytes(), suffix)(torch.from_numpy(clips)).double().numpy()
    np.testing.assert_allclose(logits, published_logits(model, clips), rtol=0, atol=1e-5)
    if suffix == ".pt2":
        about = load_exported_file(str(out))[1]
        assert (about["done_inside"]["mean"], about["output"]["fusion"]) == ([0.45] * 3, "logits")


def test_fine_tuning_starts_from_it_with_its_pixels_alone(at_work, motion_set, tmp_path):
    run, _, _ = at_work
    same = [WINDOWS, f"model.weights={run}", "data.modality=rgb"]
    for overrides in (same, [*same[:1], f"model.weights={Path(run).parent}/w.pth"]):
        config = recipe_for(tmp_path, motion_set, *overrides)
        with pytest.raises(UserError, match=r"data\.normalisation is imagenet, .* trained with slowfast.*=slowfast"):
            find_weights(check_data(config, *read_splits(config)))
        config = recipe_for(tmp_path, motion_set, *overrides, "data.normalisation=slowfast")
        assert find_weights(check_data(config, *read_splits(config)))
