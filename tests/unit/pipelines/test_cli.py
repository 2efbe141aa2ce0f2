"""The command line as a user types it."""

import io
import json
import logging
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
import yaml

from pipelines.cli import LineHandler, main
from pipelines.commands import recipes
from pipelines.commands.options import load_recipe_and_data
from pipelines.data.loader import global_order
from pipelines.runs.record import write_record
from pipelines.studies.study import Study, Trial, TrialState, write_study, write_trial
from pipelines.tracking.journal import open_journal
from posmlp.config import RECIPES, load_recipe
from posmlp.model.cost import count_macs
from posmlp.model.spec import model_variant
from posmlp.video.augment import to_train_input
from posmlp.video.batch import Batch
from posmlp.video.clip import load_clips
from posmlp.video.manifest import read_manifest
from posmlp.video.sampling import sample_seed
from tests.helpers.random_models import write_checkpoint


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


def test_data_scenes_says_where_the_set_is(capsys, tmp_path):
    counts = ["--train", "1", "--val", "1", "--seconds", "1", "--size", "32"]
    assert main(["data", "scenes", "--out", str(tmp_path / "s"), *counts]) == 0
    out = capsys.readouterr().out
    assert f"1 training and 1 validation videos of 1 key seconds: {tmp_path}/s/train.csv" in out
    assert "detection.first_second=900" in out and (tmp_path / "s" / "scenes.json").is_file()


def test_data_faces_says_where_the_set_is(capsys, tmp_path):
    counts = ["--subjects", "1", "--clips", "4", "--size", "32"]
    assert main(["data", "faces", "--out", str(tmp_path / "f"), *counts]) == 0
    out = capsys.readouterr().out
    assert "3 x 1 subjects with 4 clips each" in out and f"{tmp_path}/f/CASME2/CASME2-coding-20140508.xlsx" in out
    assert f"{tmp_path}/f/SMIC/HS" in out and (tmp_path / "f" / "faces.json").is_file()


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


def test_a_current_folder_that_is_gone_is_one_line(tmp_path):
    """PyTorch ends the process there when it is imported."""
    folder = tmp_path / "gone"
    folder.mkdir()
    script = f"rmdir {folder} && exec {sys.executable} -m pipelines.cli train demo train.storage={tmp_path}/runs"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(["sh", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    text = "posmlp: the current folder does not exist any more; change to another folder\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", text)
    assert not (tmp_path / "runs").exists()


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


HEAVY = {"torch", "ray", "mlflow", "numpy", "pyarrow", "matplotlib", "av", "optuna"}


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["--help"], 0),
        (["tune", "--help"], 0),
        (["--version"], 0),
        (["recipes"], 0),
        (["recipes", "show", "demo"], 0),
        (["train", "demo", "train.epoch=3"], 1),
        (["train", "demos"], 1),
    ],
)
def test_help_recipes_and_refused_recipes_load_no_heavy_library(command, code):
    program = (
        "import sys\n"
        "from pipelines.cli import main\n"
        "code = 0\n"
        "try:\n"
        "    code = main(sys.argv[1:])\n"
        "except SystemExit as end:\n"
        "    code = end.code or 0\n"
        f"print('loaded:', sorted({HEAVY!r} & sys.modules.keys()), 'code:', code)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"loaded: [] code: {code}", done.stdout + done.stderr


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"posmlp {version('posmlp-video')}\n"


def test_recipes_lists_every_recipe_with_a_line(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = sorted(RECIPES.glob("*.yaml"))
    assert [line.split()[0] for line in lines] == [path.stem for path in files]
    for line, path in zip(lines, files, strict=True):
        assert line.split(maxsplit=1)[1] in path.read_text()


def test_a_shown_recipe_is_complete_and_is_the_same_recipe(capsys, tmp_path):
    assert main(["recipes", "show", "ssv1_s16", "train.epochs=7"]) == 0
    text = capsys.readouterr().out
    tree = yaml.safe_load(text)
    assert tree["train"]["epochs"] == 7
    assert tree["scaling"]["max_failures"] == 3  # a default that the file leaves out
    path = tmp_path / "shown.yaml"
    path.write_text(text)
    assert load_recipe(path) == load_recipe("ssv1_s16", ["train.epochs=7"])


def test_a_copied_recipe_keeps_its_comments_and_overwrites_nothing(capsys, tmp_path):
    path = tmp_path / "mine.yaml"
    assert main(["recipes", "copy", "demo", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    assert path.read_bytes() == (RECIPES / "demo.yaml").read_bytes()
    path.write_text("name: mine\n")
    assert main(["recipes", "copy", "demo", str(path)]) == 1
    assert "choose another file" in capsys.readouterr().err
    assert path.read_text() == "name: mine\n"
    assert main(["recipes", "copy", "demos", str(tmp_path / "new.yaml")]) == 1
    assert "no recipe demos" in capsys.readouterr().err
    assert not (tmp_path / "new.yaml").exists()


@pytest.fixture
def talking_verb(monkeypatch):
    """``posmlp recipes`` logs at three levels and prints its result."""

    def run(args):
        logger = logging.getLogger("pipelines.data.check")
        logger.debug("detail")
        logger.info("progress")
        logger.warning("problem")
        print("result")

    monkeypatch.setattr(recipes, "run_list", run)


@pytest.mark.parametrize(
    ("options", "out", "err"),
    [
        ([], "progress\nresult\n", "problem\n"),
        (["--quiet"], "result\n", "problem\n"),
    ],
)
def test_progress_goes_to_stdout_and_warnings_to_stderr(capsys, talking_verb, options, out, err):
    for command in ([*options, "recipes"], ["recipes", *options]):
        assert main(command) == 0
        assert capsys.readouterr() == (out, err)
    assert not logging.getLogger("pipelines").handlers


def test_verbose_lines_have_their_time_and_module(capsys, talking_verb):
    assert main(["--verbose", "recipes"]) == 0
    out, err = capsys.readouterr()
    assert re.match(r"\d{4}-\d\d-\d\d \S+ DEBUG pipelines\.data\.check: detail\n", out)
    assert err.endswith("WARNING pipelines.data.check: problem\n")


def test_help_shows_overrides_as_optional(capsys):
    for verb in ("train", "demo", "evaluate", "tune"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        text = capsys.readouterr().out
        assert "[key=value ...]" in " ".join(text.split())
        assert "optional: recipe keys to change" in " ".join(text.split())


def test_runs_lists_runs_and_studies_with_their_state_and_result(capsys, tmp_path):
    small = ["train.epochs=4", f"train.storage={tmp_path}"]
    early = {"val/top1": 0.5, "epoch": 2.0}
    for name, metrics in (("done", {"val/top1": 0.5}), ("early", early), ("half", None), ("held", None)):
        config = load_recipe("demo", [f"name={name}", *small])
        write_checkpoint(tmp_path / name, config, metrics={"val/top1": 0.625})
        write_record(str(tmp_path / name), config, {}, "run", metrics)
    study = Study(name="search", recipe=load_recipe("demo", small), space="learning")
    write_study(study, "run")
    for number, (state, top1) in enumerate([("finished", 0.25), ("finished", 0.75), ("failed", 0.0), ("running", 0.0)]):
        metrics = {"val/top1": top1, "cost/gmacs": 1.0}
        write_trial(study, Trial(number, {}, state=TrialState(state), metrics=metrics))
    (tmp_path / "something else").mkdir()
    held = open_journal(str(tmp_path / "held"))
    try:
        assert main(["runs", str(tmp_path)]) == 0
    finally:
        held.close()
    lines = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["name", "state", "best validation"],
        ["done", "finished, 4 epochs", "62.5% top-1"],
        ["early", "ended early, 2 of 4 epochs", "62.5% top-1"],
        ["half", "not finished, 1 of 4 epochs", "62.5% top-1"],
        ["held", "running, 1 of 4 epochs", "62.5% top-1"],
        ["search", "study, trials: 2 finished, 1 failed, 1 not finished", "75.0% top-1, trial 1"],
    ]
    assert main(["runs", str(tmp_path / "something else")]) == 1
    assert "holds no run and no study" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "folder", "function", "words"),
    [
        ("demo", "data/motion", "posmlp.video.motion.make_motion_set", "embedded motion set"),
        ("scenes", "data/scenes", "posmlp.detection.scenes.make_scene_set", "embedded detection set"),
        ("faces", "data/faces", "posmlp.video.faces.make_face_set", "embedded set of faces"),
    ],
)
def test_a_recipe_of_an_embedded_set_draws_it_if_it_is_not_there(
    capsys, tmp_path, monkeypatch, recipe, folder, function, words
):
    monkeypatch.chdir(tmp_path)
    drawn = []
    monkeypatch.setattr(function, lambda folder: drawn.append(str(folder)))
    load_recipe_and_data(recipe, ["train.epochs=2"])
    assert drawn == [folder] and f"{words}: {folder}" in capsys.readouterr().out
    load_recipe_and_data(recipe, ["data.train.path=mine.csv"])
    load_recipe_and_data("small_data", [])
    train_list = Path(load_recipe(recipe).data.train.path)
    train_list.parent.mkdir(parents=True)
    train_list.write_text("path,label\n")  # another set, which is left alone
    load_recipe_and_data(recipe, [])
    assert drawn == [folder]


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self):
        return True

    def screen(self):
        """The lines that a terminal shows; CR returns to the start of a line, and ESC [K clears it."""
        return [line.rpartition("\r\x1b[K")[2] for line in self.getvalue().split("\n")]


@pytest.mark.parametrize(("out", "shown"), [(io.StringIO(), "12w3"), (Terminal(), "2w3")])
def test_a_terminal_shows_one_line_in_progress_and_a_file_gets_all(out, shown):
    err = out if isinstance(out, Terminal) else io.StringIO()
    progress = LineHandler(out)
    warnings = LineHandler(err, progress)
    for text, handler, live in (("1", progress, True), ("2", progress, True), ("w", warnings, False)):
        handler.emit(logging.makeLogRecord({"msg": text, "live": live}))
    progress.emit(logging.makeLogRecord({"msg": "3"}))
    lines = out.screen() if isinstance(out, Terminal) else (out.getvalue() + "w\n").split("\n")
    assert sorted(line for line in lines if line) == sorted(shown)
    if isinstance(out, Terminal):
        assert lines == ["2", "w", "3", ""]
        progress.emit(logging.makeLogRecord({"msg": "x" * 500, "live": True}))
        progress.end_live_line()
        assert (
            len(out.screen()[-2]) < 500 and out.screen()[-1] == ""
        )  # one row of the terminal, or it cannot be cleared
