"""Complete runs that end early, start from another run's weights, or have several lists; the test split."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file

from pipelines.inference.evaluate import evaluate
from pipelines.runs import checkpoints
from pipelines.runs.errors import RunError
from pipelines.training.train import train
from posmlp.errors import UserError
from posmlp.metrics import VAL_TOP1
from tests.helpers.log_lines import log_lines
from tests.helpers.small_runs import QUICK, recipe_for, run_of

pytestmark = pytest.mark.ray


def test_a_run_that_ends_early_is_finished(local_ray, motion_set, tmp_path):
    """A rate of almost 0 keeps the accuracy, so patience 1 ends the run after epoch 2 of 9."""
    # the test list does not exist: training never looks at it
    keys = [*QUICK, "train.epochs=9", "train.patience=1", "optim.lr=1e-12", "optim.min_lr=0", "data.test.path=/no.csv"]
    config = recipe_for(tmp_path, motion_set, *keys)
    with log_lines() as lines:
        result = train(config)
    reason = f"val/top1 is not better than {result.metrics[VAL_TOP1]:.4g} of epoch 1 for 1 epochs (train.patience)"
    assert result.metrics["epoch"] == 2 and result.ended_early == reason
    assert f"ended early after epoch 2: {reason}" in lines
    _, run = run_of(config)
    assert (run.info.status, run.data.tags["ended_early"]) == ("FINISHED", reason)
    with open(f"{result.path}/per_class.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(result.classes) and len(rows) == 8
    right = sum(float(row["top1"]) * int(row["videos"]) for row in rows if row["top1"])
    assert sum(int(row["videos"]) for row in rows) == 16
    assert right / 16 == pytest.approx(result.metrics[VAL_TOP1])
    with pytest.raises(RunError, match="is finished"):
        train(config)

    # as if the driver had died before it recorded the end: the run is finished, not trained on
    record = json.loads((tmp_path / "small/run.json").read_text())
    (tmp_path / "small/run.json").write_text(json.dumps(record | {"metrics": None}))
    again = train(config)
    assert (again.metrics["epoch"], again.ended_early) == (2, reason)


@pytest.mark.slow
def test_a_linear_probe_of_two_lists_leaves_the_backbone_as_it_was(local_ray, untrained_run, motion_set, tmp_path):
    lists = f"[{motion_set}/val.csv, {{path: {motion_set}/train.csv, weight: 0.5}}]"
    keys = [*QUICK, "train.epochs=1", "optim.freeze=all", f"model.weights={untrained_run['run']}"]
    with log_lines() as lines:
        probe = train(recipe_for(tmp_path, motion_set, *keys, f"data.train={lists}", "data.balance=sampling"))
    assert any("optim.freeze all: 520 of " in line for line in lines)  # 64 channels and a bias, for 8 classes
    *_, newest = checkpoints.find(probe.path)
    assert newest.info.step == (16 + 32 // 2) // 8
    before, after = (load_file(f"{place}/weights.safetensors") for place in (untrained_run["checkpoint"], newest.uri))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}


@pytest.mark.slow
def test_the_test_split_is_evaluated_with_metrics_of_its_own(local_ray, untrained_run, tmp_path):
    """The test list is the validation list, so the figures are the same."""
    path, config = untrained_run["config"].data.val.path, untrained_run["config"]
    keys = [f"data.test.path={path}", "data.test.root=/"]
    found = evaluate(untrained_run["run"], split="test", overrides=keys, out=str(tmp_path / "test"))
    same = evaluate(untrained_run["run"], split="val", out=str(tmp_path / "val"))
    assert found.metrics == pytest.approx(same.metrics)
    assert found.name.startswith("test-1x1-step")
    _, run = run_of(config)
    for prefix, result in (("held_out/", found), ("test/", same)):
        logged = {name.removeprefix(prefix): x for name, x in run.data.metrics.items() if name.startswith(prefix)}
        assert logged == pytest.approx(result.metrics)
    with pytest.raises(
        UserError, match=r"the recipe has no data\.test; name the list, as in data\.test\.path=test\.csv"
    ):
        evaluate(untrained_run["run"], split="test")
