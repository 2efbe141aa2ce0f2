"""Main effects of the dimensions of a tabular benchmark, on tables whose effects are known."""

from pathlib import Path

import effects
import numpy as np
import pytest
from effects import main_effects
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
    monkeypatch.setattr("sys.argv", ["effects.py", str(path)])
    effects.main()
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| block")]
    assert [row.split(" | ")[0] for row in rows[:3]] == ["| block2", "| block1", "| block3"]
    assert "80%" in rows[0] and "joint +13.31 ± 0.00" in rows[0]
    assert "member 0, the recipe's own model: val/top1 20.0%, number 16 of 27" in printed
