"""The tabular benchmark: its members, its collection from trials, its file, and the page that says how to use it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from reference_space import balanced_draw, dimensions_of, in_common
from scipy import stats
from table import OWN_KEYS, collect, deviations, main, rank_agreement, read_table

from pipelines.runs import checkpoints
from pipelines.runs.checkpoints import CheckpointInfo
from pipelines.studies.study import Study, Trial, TrialState, trial_folder, write_study, write_trial
from posmlp.config import load_recipe
from posmlp.errors import UserError
from tests.helpers.tables import all_blocks, made_up, write_table
from tune_spaces import load_space

ROOT = Path(__file__).parents[3]
SPACE = str(ROOT / "benchmarks/reference_space.py")
PAGE = ROOT / "docs/tabular_benchmark.md"
EPOCHS = 3


# --- the members -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["demo", "small_data"])
def test_the_members_are_different_balanced_and_begin_with_the_recipes_own(recipe):
    base = load_recipe(recipe)
    space = load_space(SPACE, base)
    own = base.model.variant()
    assert space.recipe(base, space.members[0]).model.variant().architecture() == own.architecture()
    assert [space.members[0][f"block{stage}"] for stage in range(1, 5)] == ["parallel"] * 4
    assert len({tuple(member.items()) for member in space.members}) == len(space.members) == 48
    for name, values in space.dimensions.items():
        counts = [sum(member[name] == value for member in space.members) for value in values]
        assert min(counts) > 0 and max(counts) - min(counts) <= 1, name
    for member in space.members:
        assert dimensions_of(space.recipe(base, member).model.variant().architecture()) == member
    assert load_space(SPACE, base).members == space.members


def test_all_main_effects_of_the_demos_members_can_be_told():
    """A column for each value of each dimension but the first: none is a sum of others."""
    space = load_space(SPACE, load_recipe("demo"))
    columns = [
        [member[name] == value for member in space.members]
        for name, values in space.dimensions.items()
        for value in values[1:]
    ]
    assert np.linalg.matrix_rank(np.array([[True] * len(space.members), *columns], dtype=float)) == len(columns) + 1


def test_dimensions_have_less_in_common_than_in_plain_draws():
    space = load_space("same_width", load_recipe("demo"))
    first = space.random(np.random.default_rng(0))

    def contingency(members):
        total = 0.0
        names = list(space.dimensions)
        for i, one in enumerate(names):
            for other in names[:i]:
                pairs = [(member[one], member[other]) for member in members]
                counts = [[pairs.count((a, b)) for b in space.dimensions[other]] for a in space.dimensions[one]]
                found = np.array(counts)
                found = found[found.any(1)][:, found.any(0)]
                total += stats.chi2_contingency(found, correction=False).statistic / len(members)
        return total

    drawn = balanced_draw(space, first, 48)
    indices = {name: np.array([values.index(m[name]) for m in drawn]) for name, values in space.dimensions.items()}
    columns = list(indices.values())
    assert sum(in_common(column, columns[:i]) for i, column in enumerate(columns)) == pytest.approx(contingency(drawn))
    rng = np.random.default_rng(1)
    plain = [contingency([space.random(rng) for _ in range(48)]) for _ in range(5)]
    assert contingency(drawn) < 0.8 * min(plain)


# --- the trials of studies -------------------------------------------------------------------------------------------


def top1_of(member, seed, epoch):
    return (member["groups1"] + 10 * member["depth2"] + seed / 4 + epoch / 16) / 1000


def write_studies(folder, seeds=(0, 1), count=3, lists=None):
    """A study for each seed, whose trials have made-up metrics. Returns the studies' folders."""
    found = []
    for seed in seeds:
        overrides = [f"train.storage={folder}/runs", f"train.seed={seed}", f"train.epochs={EPOCHS}"]
        recipe = load_recipe("demo", [*overrides, f"data.train.path={lists or folder}/train.csv"])
        study = Study(name=f"s{seed}", recipe=recipe, space=SPACE, searcher="grid", trials=count)
        write_study(study, "abc")
        space = load_space(SPACE, recipe)
        for number, member in enumerate(space.members[:count]):
            trial = Trial(number, dict(member), seed, suggestion=number, state=TrialState.FINISHED)
            write_finished(study, space, trial)
        found.append(study.folder)
    return found


def write_finished(study, space, trial, epochs=range(1, EPOCHS + 1), without=(), **settings):
    """Write a trial's record and checkpoint.

    Args:
        epochs: that its history has.
        without: metrics that the first epoch lacks.
        settings: other values of its recipe's training section.
    """
    config = study.trial_recipe(space, trial.member, trial.number, trial.seed)
    config = config.model_copy(update={"train": config.train.model_copy(update=settings)})
    history = [
        {
            "epoch": float(epoch),
            "val/top1": top1_of(trial.member, trial.seed, epoch),
            "val/loss": 1.0 / epoch,
            "train/loss": 2.0 / epoch,
            "perf/epoch_s": 7.0,
        }
        for epoch in epochs
    ]
    history[0] = {name: value for name, value in history[0].items() if name not in without}
    info = CheckpointInfo(
        EPOCHS, EPOCHS, history[-1], ["a"], config.model_dump(mode="json"), progress={"history": history}
    )
    run = trial_folder(study, trial.number)
    checkpoints.save(run, replace(info, step=1, progress={"history": history[:1]}), {"x": torch.zeros(1)}, {})
    checkpoints.save(run, info, {"x": torch.zeros(1)}, {})
    costs = {"cost/gmacs": float(trial.member["depth1"]), "cost/params_m": float(trial.member["depth3"])}
    write_trial(study, replace(trial, metrics=history[-1] | costs))


def test_a_table_has_a_row_for_each_member_seed_and_epoch(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders, out = write_studies(tmp_path), tmp_path / "out.parquet"
    monkeypatch.setattr("sys.argv", ["table.py", *folders, "--out", str(out)])
    main()
    members = load_space(SPACE, load_recipe("demo")).members[:3]
    rows = pq.read_table(out).to_pylist()
    keys = [(m, seed, epoch) for m in range(3) for seed in (0, 1) for epoch in (1, 2, 3)]
    assert [(row["member"], row["seed"], row["epoch"]) for row in rows] == keys
    for row in rows:
        member = members[row["member"]]
        assert {name: row[name] for name in member} == member
        assert row["val/top1"] == top1_of(member, row["seed"], row["epoch"])
        assert (row["val/loss"], row["train/loss"]) == (1 / row["epoch"], 2 / row["epoch"])
        assert (row["perf/epoch_s"], row["cost/gmacs"], row["cost/params_m"]) == (7, member["depth1"], member["depth3"])
    table = read_table(out)
    assert table.members == list(members)
    assert table.top1[2, 1, 0] == top1_of(members[2], 1, 1) and table.gmacs.tolist() == [m["depth1"] for m in members]
    printed = capsys.readouterr().out
    assert "3 members, 2 seeds, 3 epochs" in printed and "val/loss: deviation over seeds 0 nats" in printed


def test_the_page_lists_the_columns(tmp_path):
    table = collect(write_studies(tmp_path))
    listed = re.findall(r"^\| `([^`]+)`(?: to `([^`]+)`)? \|", PAGE.read_text(), re.M)
    names = [f"{first[:-1]}{stage}" for first, last in listed if last for stage in range(1, 5)]
    assert sorted(table.column_names) == sorted([first for first, last in listed if not last] + names)


def test_the_file_has_the_shared_recipe_and_the_versions_and_no_place_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metadata = collect(write_studies(tmp_path)).schema.metadata
    recipe = yaml.safe_load(metadata[b"recipe"])
    assert (recipe["train"]["epochs"], recipe["data"]["train"]["path"]) == (EPOCHS, "train.csv")
    flat = load_recipe("demo", []).model_validate(recipe | {"name": "x"}).flat()
    assert all(flat[key] is None for key in OWN_KEYS if key.startswith("model."))
    assert str(tmp_path).encode() not in metadata[b"recipe"]
    assert torch.__version__.startswith(json.loads(metadata[b"versions"])["torch"].partition("+")[0])


def change(folders, number=1, **how):
    """Write a trial of the second study again. ``state`` replaces its state, all else is for ``write_finished``."""
    from pipelines.studies.study import find_study, read_trials

    study, _ = find_study(folders[1], Study)
    trial = read_trials(study.folder)[number]
    if "state" in how:
        write_trial(study, replace(trial, state=how["state"], reason="out of memory"))
    else:
        write_finished(study, load_space(SPACE, study.recipe), trial, **how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"state": TrialState.STOPPED},
            r"trial 1 of \S+/s1 was stopped early; train all .* posmlp tune --resume \S+/s1 --no-asha",
        ),
        ({"state": TrialState.RUNNING}, r"trial 1 of \S+/s1 is running: out of memory, not finished; finish the study"),
        ({"epochs": (1, 3)}, r"trial 1 of \S+/s1 lacks epoch 2 of 3; train it without train.patience"),
        ({"without": ("val/loss", "val/top1")}, r"no val/top1, val/loss of epoch 1; train it with eval.every=1"),
        ({"global_batch": 99}, r"trial 1 of \S+/s1 has train.global_batch 99, the first trial 16; trials of a table"),
    ],
)
def test_what_is_missing_or_different_is_named(tmp_path, how, message):
    folders = write_studies(tmp_path)
    change(folders, **how)
    with pytest.raises(UserError, match=message):
        collect(folders)


def test_a_member_without_a_seed_and_a_seed_given_twice_are_named(tmp_path):
    first = write_studies(tmp_path / "a", lists=tmp_path)
    second = write_studies(tmp_path / "b", seeds=(1,), count=2, lists=tmp_path)
    with pytest.raises(UserError, match="each member needs each seed; missing: member 2 seed 1; train them"):
        collect([first[0], second[0]])
    with pytest.raises(UserError, match=r"trial 0 of \S+/s1: member 0 has another trial with seed 1; leave one"):
        collect([*first, second[0]])


def test_a_trial_without_a_checkpoint_is_named(tmp_path):
    folders = write_studies(tmp_path)
    for info in Path(folders[0], "trial-002").rglob("checkpoint.json"):
        info.unlink()
    with pytest.raises(UserError, match=r"trial 2 of \S+/s0 has no intact checkpoint in \S+/s0/trial-002"):
        collect(folders)


def test_seeds_can_be_added_to_a_table(tmp_path):
    folders = write_studies(tmp_path, seeds=(0, 1, 2))
    whole, first = collect(folders), str(tmp_path / "first.parquet")
    pq.write_table(collect(folders[:2]), first)
    assert collect([first, folders[2]]).equals(whole, check_metadata=True)
    assert collect([folders[2], first]).equals(whole, check_metadata=True)
    with pytest.raises(UserError, match=r"trial 0 of \S+/s1: member 0 has another trial with seed 1; leave one"):
        collect([first, folders[1]])
    twice = tmp_path / "twice.parquet"
    twice.write_bytes(Path(first).read_bytes())
    with pytest.raises(UserError, match=r"twice.parquet has member 0 seed 0 again; leave one of the tables out"):
        collect([first, str(twice)])


def test_a_table_of_another_recipe_is_not_extended(tmp_path):
    folders = write_studies(tmp_path)
    table = collect(folders[:1])
    other = tmp_path / "other.parquet"
    pq.write_table(table.replace_schema_metadata({"recipe": "name: other"}), other)
    with pytest.raises(UserError, match=r"s1 has another recipe than \S+other.parquet, from .* on; collect tables"):
        collect([str(other), folders[1]])


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_file_that_is_no_table_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no table \S+/none.parquet; make it with python benchmarks/table.py"):
        read_table(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("not a table")
    with pytest.raises(UserError, match=r"text\.parquet is not a Parquet file"):
        read_table(tmp_path / "text.parquet")
    members = all_blocks(1)
    path = write_table(tmp_path / "a.parquet", members, made_up(members, lambda m: 0.5), [1.0] * 3)
    whole = pq.read_table(path)
    pq.write_table(whole.drop_columns(["val/top1"]), path)
    with pytest.raises(UserError, match="has no column val/top1"):
        read_table(path)
    pq.write_table(whole.slice(1), path)
    with pytest.raises(UserError, match="has 80 rows for 3 members, 3 seeds, 9 epochs; each member needs each seed"):
        read_table(path)


def test_deviations_by_hand():
    """Within members the variance is 2. The means 2 and 6 have variance 8, of which 2 / 2 is that of the seeds."""
    assert deviations(np.array([[1.0, 3.0], [5.0, 7.0]])) == pytest.approx((2**0.5, 7**0.5))
    assert deviations(np.array([[1.0, 3.0], [3.0, 1.0]])) == pytest.approx((2**0.5, 0))


def test_ranks_of_seeds_are_compared_in_pairs():
    """Against SciPy; ties share their mean rank."""
    values = np.array([[1.0, 3.0, 2.0], [2.0, 1.0, 2.0], [4.0, 9.0, 0.5], [3.0, 2.0, 7.0]])
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = np.mean([stats.spearmanr(values[:, i], values[:, j]).statistic for i, j in pairs])
    assert rank_agreement(values) == pytest.approx(expected)


def test_deviations_are_those_that_values_were_drawn_with():
    rng = np.random.default_rng(0)
    values = 3 * rng.normal(size=(20000, 1)) + 2 * rng.normal(size=(20000, 3))
    assert deviations(values) == pytest.approx((2, 3), rel=0.03)


def test_the_searcher_of_the_page_counts_epochs_and_regret(tmp_path, monkeypatch, capsys):
    """Curves are in the order of their ends, and seeds are equal, so the best member is never stopped: no regret."""
    monkeypatch.chdir(tmp_path)
    members = all_blocks(3)
    top1 = made_up(members, lambda m: 0.1 + 0.02 * [*members].index(m), epochs=7)
    write_table(Path("benchmarks/reference.parquet"), members, top1, [1.0] * len(members))
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    exec(snippet, {})
    rng, seen, spent = np.random.default_rng(0), [], 0
    for member in rng.permutation(len(members)).tolist():
        rng.integers(3)
        seen.append(member)
        spent += 7 if member >= np.median(seen) else 3
    assert capsys.readouterr().out == f"{spent} epochs, member 26, regret 0.00 points\n"
