"""Classes of single files: the same as a plain loop's, bad files apart, and what is refused."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imsave

from pipelines.cli import main
from pipelines.inference.predict import predict
from pipelines.runs.models import find_checkpoint
from posmlp.errors import UserError
from posmlp.video.views import parse_views
from tests.helpers.random_models import CLASSES, plain_shares, videos_of, write_checkpoint
from tests.helpers.small_runs import recipe_for


@pytest.fixture(scope="module")
def trained(motion_set, tmp_path_factory):
    """A run's folder with one checkpoint, its recipe, and its model."""
    folder = tmp_path_factory.mktemp("runs")
    config = recipe_for(folder, motion_set, "model.num_classes=8")
    run = folder / "small"
    _, model = write_checkpoint(run, config)
    return run, config, model


@pytest.mark.parametrize(("clips", "crops"), [(1, 1), (2, 3)])
def test_probabilities_are_those_of_a_plain_loop(trained, motion_set, clips, crops):
    run, config, model = trained
    files = videos_of(motion_set, 5)
    found = list(predict(str(run), files, top=8, views=(clips, crops)))
    assert [p.file for p in found] == files
    for prediction in found:
        expected = plain_shares(model, config, prediction.file, clips, crops)
        assert [name for name, _ in prediction.top] == [CLASSES[i] for i in np.argsort(-expected)]
        np.testing.assert_allclose([share for _, share in prediction.top], np.sort(expected)[::-1], atol=1e-5)


def test_a_bad_file_is_told_and_costs_the_others_nothing(trained, motion_set, tmp_path):
    run, _, _ = trained
    good = videos_of(motion_set, 2)
    (tmp_path / "broken.mp4").write_bytes(Path(good[0]).read_bytes()[:200])
    files = [good[0], str(tmp_path / "broken.mp4"), str(tmp_path / "absent.mp4"), good[1]]
    found = list(predict(str(run), files, top=3))
    assert [bool(p.error) for p in found] == [False, True, True, False]
    assert "missing" in found[2].error
    assert [len(p.top) for p in found] == [3, 0, 0, 3]
    assert [p.top for p in found[::3]] == [p.top for p in predict(str(run), good, top=3)]


def test_a_line_of_json_is_the_file_and_its_classes_or_the_error(trained, motion_set):
    run, _, _ = trained
    (file,) = videos_of(motion_set, 1)
    good, bad = predict(str(run), [file, "absent.mp4"], top=2)
    assert json.loads(good.json()) == {
        "file": file,
        "top": [{"class": name, "probability": share} for name, share in good.top],
    }
    assert json.loads(bad.json()) == {"file": "absent.mp4", "error": bad.error}
    assert str(good).splitlines()[0] == file
    assert good.top[0][0] in str(good).splitlines()[1]


def test_the_cache_of_the_recipe_is_left_alone(motion_set, tmp_path):
    config = recipe_for(tmp_path, motion_set, "model.num_classes=8", f"data.cache_dir={tmp_path}/cache")
    checkpoint, _ = write_checkpoint(tmp_path / "small", config)
    (found,) = predict(checkpoint, videos_of(motion_set, 1))
    assert found.top
    assert not (tmp_path / "cache").exists()


def test_a_folder_of_frames_and_an_image(trained, motion_set, tmp_path):
    run, config, model = trained
    folder = tmp_path / "frames {0}"
    folder.mkdir()
    frames = np.random.default_rng(0).random((6, 40, 48, 3))
    for number, frame in enumerate(frames, 1):
        imsave(folder / f"{number:05d}.jpg", frame)
    (of_folder,) = predict(str(run), [str(folder)], top=1)
    template = str(folder).replace("{0}", "{{0}}") + "/{:05d}.jpg"
    expected = plain_shares(model, config, template, 1, 1, images=len(frames))
    assert of_folder.top[0] == (CLASSES[expected.argmax()], pytest.approx(expected.max(), abs=1e-5))
    image = str(folder / "00001.jpg")
    (refused,) = predict(str(run), [image])
    assert "clips of 4 frames" in refused.error
    still = recipe_for(tmp_path, motion_set, "model.num_classes=8", "model.frames=1", "data.modality=rgb")
    checkpoint, model = write_checkpoint(tmp_path / "still", still)
    (of_image,) = predict(checkpoint, [image], top=1)
    expected = plain_shares(model, still, image.replace("{0}", "{{0}}"), 1, 1, images=1)
    assert of_image.top[0] == (CLASSES[expected.argmax()], pytest.approx(expected.max(), abs=1e-5))
    (empty,) = predict(str(run), [str(tmp_path)])
    assert "no numbered images" in empty.error


def test_a_run_means_its_best_checkpoint_and_may_be_named(motion_set, tmp_path, monkeypatch):
    config = recipe_for(tmp_path / "runs", motion_set, "model.num_classes=8")
    run = tmp_path / "runs" / "small"
    best, _ = write_checkpoint(run, config, step=3, metrics={"val/top1": 0.9})
    newest, _ = write_checkpoint(run, config, step=9, metrics={"val/top1": 0.4})
    (run / "run.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("small") == find_checkpoint("runs/small") == find_checkpoint(str(run)) == best
    assert find_checkpoint(newest) == newest


def test_what_is_no_checkpoint_is_refused_at_once(trained, tmp_path):
    with pytest.raises(UserError, match="no run nowhere"):
        predict("nowhere", [])
    copy = tmp_path / "step-0000000003"
    shutil.copytree(find_checkpoint(str(trained[0])), copy)
    weights = bytearray((copy / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "weights.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"weights\.safetensors does not match its checksum"):
        predict(str(copy), [])
    (copy / "checkpoint.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint .*step-0000000003.*incomplete"):
        predict(str(copy), [])


@pytest.mark.parametrize("text", ["4by3", "4x2", "0x1", "x3", "4x3x1", "-1x3", ""])
def test_views_that_cannot_be_are_refused(text):
    with pytest.raises(UserError, match="as in 4x3"):
        parse_views(text)


def test_views_are_clips_and_crops():
    assert parse_views("10x1") == (10, 1)


def test_a_folder_of_videos_is_all_its_videos_and_a_summary(trained, motion_set, tmp_path, capsys):
    run, _, _ = trained
    good = videos_of(motion_set, 3)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    names = ["a.MP4", "deep/b.mp4", "deep/er/c.mp4"]
    for source, name in zip(good, names, strict=True):
        shutil.copy(source, tmp_path / name)
    (tmp_path / "deep" / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "notes.txt").write_text("no video")
    (tmp_path / "._a.mp4").write_bytes(b"")  # macOS writes such files
    assert main(["predict", str(run), str(tmp_path), "--top", "1"]) == 1
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line.startswith("/")] == [str(tmp_path / name) for name in names]
    first = Counter(p.top[0][0] for p in predict(str(run), good, top=1))
    (summary,) = (line for line in out.splitlines() if " files: " in line)
    assert summary.startswith("4 files: ") and summary.endswith("; 1 could not be read")
    assert all(f"{name} {files}" in summary for name, files in first.items())
    assert f"{tmp_path}/deep/broken.mp4: " in err

    assert main(["predict", str(run), good[0]]) == 0
    assert " files: " not in capsys.readouterr().out
    assert main(["predict", str(run), *good, "--json"]) == 0
    assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == 3
