"""The command line as a user types it."""

import json
import subprocess
import sys

import pytest

from pipelines.cli import main
from posmlp.model.cost import count_macs
from posmlp.model.variants import model_variant


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


def test_usage_errors_exit_with_2():
    done = subprocess.run([sys.executable, "-m", "pipelines.cli", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "invalid choice" in done.stderr
