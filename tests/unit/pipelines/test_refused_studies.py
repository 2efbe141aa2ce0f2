"""Studies that cannot start are refused before Ray starts."""

import pytest

from pipelines.cli import main
from tests.helpers.batches import DETECTION


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo"], "give a recipe and --space, or --resume STUDY"),
        (["demo", "--space", "block_type"], "no space 'block_type' (did you mean 'block_types'?)"),
        (
            ["demo", "--space", "widths", "--name", "a/b"],
            "study a/b: name: use letters, digits, '.', '_' and '-', with a letter or a digit first, not 'a/b'",
        ),
        (["demo", "--space", "learning", "--searcher", "grid"], "searcher grid needs values to choose from"),
        (["demo", "--space", "depths", "--searcher", "nsga2"], "nsga2 searches a Pareto front"),
        (["--resume", "nowhere"], "no study nowhere"),
        (
            ["demo", "--resume", "nowhere"],
            "--repeats, --hours and --no-asha may be given, not RECIPE",
        ),
        (
            ["demo", "--space", "widths", "--budget-gmacs", "1e-6"],
            "no member of space widths within the budgets: it has looked at all 6. The nearest is width 0.5: ",
        ),
        (["demo", "--space", "widths", "--prior", "nowhere"], "--prior nowhere: neither nowhere nor"),
        (
            ["demo", "--space", "widths", "--prior", "nowhere"],
            "mlflow.db; give the right one with tracking.uri or MLFLOW_TRACKING_URI",
        ),
        (["demo", "--space", "widths", "data.train.path=nowhere.csv"], "nowhere.csv"),
    ],
)
def test_what_cannot_start_is_refused_in_one_line(motion_set, tmp_path, capsys, arguments, message):
    lists = [f"data.train.path={motion_set}/train.csv", f"data.val.path={motion_set}/val.csv"]
    if "--resume" not in arguments:
        arguments = [
            *arguments,
            f"train.storage={tmp_path}",
            *(k for k in lists if k.split("=")[0] not in str(arguments)),
        ]
    assert main(["tune", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        ["--space", "nonsense"],
        ["--space", "widths"],
        ["--space", "depths", "--name", "a/b"],
        ["--space", "depths", "--study", "no"],
    ],
)
def test_the_motion_set_is_not_drawn_for_a_supernet_that_is_refused(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    assert main(["supernet", "demo", *options]) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_supernet_of_detection_is_refused_before_data_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["supernet", "demo", "--space", "depths", *DETECTION]) == 1
    message = (
        "a supernet is for task: recognition alone, and the recipe demo has task: detection; search the space with"
    )
    assert f"{message} posmlp tune RECIPE --space depths" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [["--space", "nonsense"], ["--space", "mine.py"], ["--space", "widths", "--name", "a/b"]]
)
def test_the_motion_set_is_not_drawn_for_a_study_that_is_refused(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "demo", *options]) == 1
    assert list(tmp_path.iterdir()) == []
