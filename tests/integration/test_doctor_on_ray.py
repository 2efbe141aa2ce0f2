"""The doctor on a local Ray."""

import pytest

from pipelines.cli import main
from tests.helpers.small_runs import QUICK, recipe_for


@pytest.mark.ray
def test_the_doctor_tries_what_a_run_will_do(local_ray, motion_set, tmp_path, capsys):
    recipe = recipe_for(tmp_path / "runs", motion_set, *QUICK)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert main(["doctor", str(tmp_path / "recipe.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "0 fail" in shown and "nodes that answer: 1 of 1" in shown and "32 videos, 8 classes" in shown
    assert not list((tmp_path / "runs").iterdir())

    (tmp_path / "file").write_text("")
    wrong = [f"train.storage={tmp_path}/file/runs", f"data.val.path={tmp_path}/none.csv", "scaling.workers=16"]
    wrong += ["train.global_batch=16"]
    assert main(["doctor", str(tmp_path / "recipe.yaml"), *wrong]) == 1
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fail")]
    assert [any(part in line for line in told) for part in ("train.storage", "none.csv", "room for")] == [True] * 3
