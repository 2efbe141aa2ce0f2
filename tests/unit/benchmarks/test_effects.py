"""Main effects of the dimensions of a tabular benchmark, on tables whose effects are known."""

from pathlib import Path

import effects
import numpy as np
import pytest
from effects import main_effects
from PIL import Image
from scipy import stats

from posmlp.config import load_recipe
from posmlp.errors import UserError
from tests.helpers.tables import all_blocks, made_up, write_table
from tune_spaces import load_space

SPACE = load_space(str(Path(__file__).parents[3] / "benchmarks/reference_space.py"), load_recipe("demo"))
MEMBERS = list(SPACE.members)


def true_effects(seed):
    """What each value of each dimension adds, as the script models it: words freely, numbers as a parabola."""
    rng, found = np.random.default_rng(seed), {}
    for name, values in SPACE.dimensions.items():
        if isinstance(values[0], str):
            added = rng.normal(size=len(values))
        else:
            size = np.log2(np.array(values))
            added = rng.normal() * size - 0.3 * (size - 2) ** 2
        own = np.array([added[values.index(member[name])] for member in MEMBERS])
        found[name] = dict(zip(values, added - own.mean(), strict=True))
    return found


def values_of(true, seeds=3, noise=0.0, seed=0):
    means = np.array([5 + sum(true[name][value] for name, value in member.items()) for member in MEMBERS])
    return means[:, None] + noise * np.random.default_rng(seed).normal(size=(len(MEMBERS), seeds))


def test_effects_of_a_table_without_noise_are_exact():
    true = true_effects(0)
    values = values_of(true)
    found = main_effects(MEMBERS, values)
    for name, effect in found.by_dimension.items():
        assert effect.values == pytest.approx(true[name])
        assert max(effect.errors.values()) < 1e-9
        own = np.var([true[name][member[name]] for member in MEMBERS])
        assert effect.share == pytest.approx(own / values[:, 0].var())
    assert found.seeds == pytest.approx(0)
    assert found.rest == pytest.approx(1 - sum(effect.share for effect in found.by_dimension.values()))


def test_shares_add_up_where_dimensions_are_independent():
    """In a full grid the dimensions have nothing in common, so nothing is left over."""
    members = all_blocks(3)
    added = {"parallel": 0.0, "joint": 1.0, "cascade_ts": 3.0}
    values = np.array([[sum(int(k[5:]) * added[v] for k, v in member.items())] for member in members])
    found = main_effects(members, values)
    assert {name: effect.share for name, effect in found.by_dimension.items()} == pytest.approx(
        {"block1": 1 / 14, "block2": 4 / 14, "block3": 9 / 14}
    )
    assert found.rest == pytest.approx(0)


def test_intervals_contain_the_truth_and_shares_have_no_bias():
    """Of 200 noisy tables; the noise is that of the members' means, over three seeds."""
    true = true_effects(1)
    true["depth3"] = dict.fromkeys(true["depth3"], 0.0)  # explains nothing
    inside, shares = [], []
    for seed in range(200):
        values = values_of(true, noise=2.0, seed=seed)
        found = main_effects(MEMBERS, values, seed=seed)
        times = stats.t.ppf(0.975, found.freedom)
        for name, effect in found.by_dimension.items():
            errors = effect.errors
            inside += [abs(effect.values[v] - true[name][v]) < times * errors[v] for v in effect.values]
        shares.append([found.by_dimension[name].share for name in ("depth3", "groups4")] + [found.seeds])
    assert 0.93 < np.mean(inside) < 0.97
    noise = 4 / 3
    total = np.var(values_of(true)[:, 0]) + noise
    own = np.var([true["groups4"][member["groups4"]] for member in MEMBERS])
    assert np.mean(shares, axis=0) == pytest.approx([0, own / total, noise / total], abs=0.02)


def test_too_few_and_equal_members_are_refused():
    with pytest.raises(UserError, match=r"20 members are too few for .* coefficients of 12 dimensions; train more"):
        main_effects(MEMBERS[:20], values_of(true_effects(0))[:20])
    with pytest.raises(UserError, match="all members are equal"):
        main_effects(all_blocks(3), np.ones((27, 3)))


def test_the_command_prints_dimensions_by_share_and_the_place_of_the_recipes_model(tmp_path, monkeypatch, capsys):
    members = all_blocks(3)
    top1 = made_up(members, lambda m: 0.2 + 0.2 * (m["block2"] == "joint") + 0.1 * (m["block1"] == "joint"))
    path = write_table(tmp_path / "t.parquet", members, top1, [1.0] * 27)
    monkeypatch.setattr("sys.argv", ["effects.py", str(path), "--figure", str(tmp_path / "effects.png")])
    effects.main()
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| block")]
    assert [row.split(" | ")[0] for row in rows[:3]] == ["| block2", "| block1", "| block3"]
    assert "80%" in rows[0] and "joint +13.31 ± 0.00" in rows[0]
    for title in ("median", "mean"):
        assert f"member 0, the recipe's own model: {title} of val/top1 20.0%, number 16 of 27" in printed
    assert Image.open(tmp_path / "effects.png").width > 500


def test_a_stuck_run_changes_the_effects_of_means_and_not_those_of_medians():
    true = true_effects(2)
    values = values_of(true)
    values[7, 1] -= 50
    of_means, of_medians = (main_effects(MEMBERS, values, over_seeds=over) for over in (np.mean, np.median))
    for name, effect in of_medians.by_dimension.items():
        assert effect.values == pytest.approx(true[name])
    assert max(abs(of_means.by_dimension["depth3"].values[v] - true["depth3"][v]) for v in true["depth3"]) > 0.1
    assert of_medians.seeds is None and of_means.seeds > 0.1


def test_choices_of_all_stages_add_up_and_are_compared_with_the_recipes_model():
    true, own = true_effects(3), MEMBERS[0]
    found = main_effects(MEMBERS, values_of(true, noise=0.1))
    exact = main_effects(MEMBERS, values_of(true))
    choices = effects.whole_choices(found, own)
    assert choices["block joint"] == {f"block{stage}": "joint" for stage in (1, 2, 3, 4)}
    assert {name.split()[0] for name in choices} == {"block", "groups", "depth"} and len(choices) == 4 + 3 + 3
    for choice in choices.values():
        instead = {name: own[name] for name in choice}
        added, before = (sum(true[name][value] for name, value in each.items()) for each in (choice, instead))
        assert exact.sum_of(choice)[0] == pytest.approx(added)
        assert exact.sum_of(choice, instead)[0] == pytest.approx(added - before)
        assert found.sum_of(choice)[0] == pytest.approx(added, abs=5 * found.sum_of(choice)[1])
        assert (found.sum_of(choice, instead)[1] > 1e-9) == (choice != instead)
