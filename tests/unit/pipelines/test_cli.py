"""The command line as a user types it."""

import json
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
import torch

from pipelines.cli import main
from pipelines.data.loader import global_order
from posmlp.config import load_recipe
from posmlp.model.cost import count_macs
from posmlp.model.spec import model_variant
from posmlp.video.augment import to_train_input
from posmlp.video.batch import Batch
from posmlp.video.clip import load_clips
from posmlp.video.manifest import read_manifest
from posmlp.video.sampling import sample_seed


def test_cost_as_json_and_as_a_table(capsys):
    assert main(["cost", "--model", "tiny", "--num-classes", "7", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["params"] == 105_343
    assert measured["macs"] == count_macs(model_variant("tiny", num_classes=7))
    assert measured["latency_ms"] > 0
    assert main(["cost", "--model", "tiny", "--frames", "8"]) == 0
    table = capsys.readouterr().out
    assert "8 frames of 64 x 64" in table
    assert "GMACs" in table


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["cost", "--model", "s61"], "did you mean 's16'"),
        (["train", "demo", "train.epoch=3"], "did you mean 'epochs'"),
        (["train", "demos"], "no recipe demos"),
        (["train", "demo", "data.train.path=nowhere.csv"], "nowhere.csv"),
        (["data", "motion", "--size", "33", "--out", "unused"], "33"),
        (["data", "check", "nowhere.csv", "--out", "unused"], "nowhere.csv"),
        (["data", "shard", "nowhere.csv", "--out", "unused", "--where", "group"], "expected COLUMN=VALUE"),
        (["data", "preview", "demo", "data.format=ssv3"], "data.format"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_1(capsys, tmp_path, monkeypatch, command, expected):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("posmlp: ")
    assert expected in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())  # nothing was started or left behind


def test_data_motion_says_where_the_set_is(capsys, tmp_path):
    assert main(["data", "motion", "--out", str(tmp_path / "m"), "--train", "8", "--val", "8", "--size", "32"]) == 0
    assert f"{tmp_path}/m/train.csv" in capsys.readouterr().out
    assert len((tmp_path / "m" / "train.csv").read_text().splitlines()) == 9


def test_a_preview_is_a_picture_of_the_batch(capsys, tmp_path, motion_set):
    out = tmp_path / "p.png"
    paths = [f"data.train.path={motion_set}/train.csv", f"data.val.path={motion_set}/val.csv", "data.cache_dir=null"]
    for split, views, more in [("train", 2, ["data.repeats=2", "augment.mixup=0.8"]), ("val", 3, ["eval.crops=3"])]:
        assert (
            main(["data", "preview", "demo", *paths, "--out", str(out), "--split", split, "--videos", "3", *more]) == 0
        )
        assert str(out) in capsys.readouterr().out
        assert out.read_bytes().startswith(b"\x89PNG")
        pixels = plt.imread(out)
        assert pixels.shape[0] > 3 * views * 60  # a row a clip
        assert pixels[..., :3].std() > 0.1
    assert main(["data", "preview", "demo", *paths, "--out", str(tmp_path / "no" / "p.png")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_a_preview_is_what_the_run_will_see(motion_set, monkeypatch, tmp_path):
    """The first videos of the sheet are those of the first batch, decoded and augmented with its numbers."""
    from pipelines.data import preview

    keys = ["train.epochs=3", "train.global_batch=4", "augment.brightness=0.5", "data.cache_dir=null"]
    config = load_recipe(
        "demo", [f"data.train.path={motion_set}/train.csv", f"data.val.path={motion_set}/val.csv", *keys]
    )
    drawn = {}
    monkeypatch.setattr(preview, "sheet", lambda clips, titles, *_: drawn.update(clips=clips, titles=titles))
    preview.preview(config, tmp_path / "p.png", train=True, epoch=1, videos=4)
    rows = read_manifest(motion_set / "train.csv").rows
    for i, row in enumerate(rows.take(global_order(len(rows), config, 1, train=True)[:4]).to_pylist()):
        assert row["sample_id"] in drawn["titles"][i]
        clips, _ = load_clips(row["uri"], row["sample_id"], config, epoch=1, train=True)
        seeds = torch.tensor([sample_seed(0, 1, row["sample_id"])])
        batch = Batch(torch.from_numpy(clips), torch.tensor([row["label"]]), torch.ones(1), seeds)
        x, _ = to_train_input(batch, config, torch.arange(8))
        torch.testing.assert_close(drawn["clips"][i], preview.to_pictures(x, config)[0])


@pytest.mark.parametrize("argument", ["--bogus", "stray"])
def test_stray_arguments_are_refused(capsys, argument):
    with pytest.raises(SystemExit) as stop:
        main(["data", "preview", "demo", "--split", "val", argument])
    assert stop.value.code == 2
    assert argument in capsys.readouterr().err


def test_usage_errors_exit_with_2():
    done = subprocess.run([sys.executable, "-m", "pipelines.cli", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "invalid choice" in done.stderr
