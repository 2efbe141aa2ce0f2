"""A supernet that is trained on Ray, scored, and compared with a study."""

import numpy as np
import pytest

from pipelines.cli import main
from pipelines.studies.study import TrialState
from pipelines.tuning.supernet import score_members, supernet
from posmlp import create_model
from posmlp.config import load_recipe
from posmlp.metrics import VAL_TOP1
from posmlp.model.spec import Architecture
from tune_spaces import load_space


@pytest.mark.ray
def test_a_space_is_trained_and_ranked(finished_study, motion_set, tmp_path, capsys):
    """Train, score and compare with a study; then score again without training; another recipe is refused."""
    from pipelines.inference.scoring import score_good_videos
    from pipelines.runs import checkpoints
    from posmlp.video.manifest import read_split
    from tests.helpers.small_runs import QUICK, recipe_for, run_of

    study = finished_study[0].study
    recipe = recipe_for(tmp_path, motion_set, *QUICK, f"data.cache_dir={tmp_path}/cache")
    found = supernet(recipe, "block_types", "net", count=5, study=study.folder)
    assert [member.number for member in found.members] == list(range(5)) and not found.bad
    assert found.agreement.numbers == [
        t.number for t in finished_study[0].trials if t.repeat_of is None and t.state == TrialState.FINISHED
    ]

    # A member's accuracy is that of its own model, built alone and evaluated by itself.
    info, contents = checkpoints.load(checkpoints.newest(found.run)[0], [checkpoints.WEIGHTS])
    net = create_model(info.recipe().model.name, **info.recipe().model.overrides())
    net.load_state_dict(contents[checkpoints.WEIGHTS])
    manifest = read_split(recipe.data, "val")
    for member in found.members[:2]:
        config = load_space("block_types", recipe).recipe(info.recipe(), member.member)
        config = config.model_copy(update={"model": config.model.model_copy(update={"choices": None})})
        weights = net.member(config.model.variant().architecture()).state_dict()
        blocks = list(score_good_videos(manifest, config, weights, []))
        predicted = np.concatenate([np.stack(scores).mean(1).argmax(1) for _, scores in blocks])
        right = predicted == manifest.rows["label"].to_numpy()
        assert member.metrics[VAL_TOP1] == pytest.approx(right.mean())

    client, run = run_of(recipe)
    assert run.info.run_id == found.mlflow_run_id and run.info.status == "FINISHED"
    assert run.data.params["model.choices.depths"] == "[[1], [2], [1], [1]]"
    names = {file.path for file in client.list_artifacts(run.info.run_id, "members")}
    assert {f"members/{n}" for n in ("front.html", "front.png", "members.csv", "agreement.png", "recipes")} <= names
    recipes = sorted((tmp_path / "net" / "members" / "recipes").iterdir())
    assert recipes and load_recipe(str(recipes[0])).model.choices is None

    options = [str(tmp_path / "recipe.yaml"), "--space", "block_types", "--name", "net", "--members", "3"]
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert main(["supernet", *options]) == 0
    shown = capsys.readouterr().out
    assert "net is trained already" in shown and "3 finished" in shown
    assert main(["supernet", *options, "optim.lr=0.1"]) == 1
    assert "was trained with another recipe" in capsys.readouterr().err
    joint = Architecture(("joint",) * 4, (4, 8, 8, 16), (1, 2, 1, 1))
    assert score_members(found.run, recipe.scaling, [joint])[1] == []
