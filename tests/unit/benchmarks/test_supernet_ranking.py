"""The statistics of ``benchmarks/supernet.py``, against formulas written out and simulated tables."""

import itertools
import math

import numpy as np
import pytest
from reference_space import dimensions_of
from table import read_table

from benchmarks import supernet
from benchmarks.supernet import agreement, bootstrap, ceiling, mean_by_value
from posmlp.model.spec import Architecture
from tests.helpers.tables import all_blocks, write_table


def table_of(rng, members, seeds, deviation):
    """True values of members, and a table of seeds with normal noise."""
    true = rng.normal(size=members)
    return true, true[:, None] + deviation * rng.normal(size=(members, seeds))


def ranks(values):
    """Ranks by counting; equal values share their mean rank."""
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


def test_correlations_by_their_formulas():
    """With ties: Spearman is Pearson of the ranks, Kendall is tau-b over all pairs."""
    rng = np.random.default_rng(0)
    top1 = rng.integers(0, 8, (20, 3)) / 8
    inherited = np.round(top1.mean(1) + rng.normal(0, 0.2, 20), 1)
    alone = top1.mean(1)
    x, y = (each - each.mean() for each in (ranks(inherited), ranks(alone)))
    found = agreement(inherited, top1)
    assert found["Spearman"] == pytest.approx((x * y).sum() / math.sqrt((x**2).sum() * (y**2).sum()))
    signs = [
        (np.sign(inherited[i] - inherited[j]), np.sign(alone[i] - alone[j]))
        for i, j in itertools.combinations(range(20), 2)
    ]
    untied = [sum(s[k] != 0 for s in signs) for k in (0, 1)]
    assert found["Kendall"] == pytest.approx(sum(a * b for a, b in signs) / math.sqrt(math.prod(untied)))
    assert found["Spearman / ceiling"] == pytest.approx(found["Spearman"] / found["ceiling"])


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("deviation", [0.5, 1.5])
def test_the_ceiling_is_the_correlation_with_a_second_table(seeds, deviation):
    """The mean over 40 pairs of simulated tables of the same members."""
    rng, found, expected = np.random.default_rng(0), [], []
    for _ in range(40):
        true, top1 = table_of(rng, 200, seeds, deviation)
        second = true[:, None] + deviation * rng.normal(size=top1.shape)
        found.append(ceiling(top1))
        expected.append(np.corrcoef(ranks(top1.mean(1)), ranks(second.mean(1)))[0, 1])
    assert np.mean(found) == pytest.approx(np.mean(expected), abs=0.015)


def test_the_ceiling_without_noise_is_1_and_of_noise_alone_0():
    rng = np.random.default_rng(0)
    assert ceiling(table_of(rng, 50, 3, 0.0)[1]) == pytest.approx(1)
    assert np.mean([ceiling(rng.normal(size=(200, 3))) for _ in range(40)]) == pytest.approx(0, abs=0.05)


def test_intervals_have_the_width_of_the_large_sample_formula(monkeypatch):
    """Of Spearman: standard error of Fisher's z is sqrt((1 + r^2 / 2) / (n - 3)) (Bonett and Wright, 2000)."""
    monkeypatch.setattr(supernet, "DRAWS", 400)
    true, top1 = table_of(np.random.default_rng(1), 300, 3, 0.5)
    inherited = true + np.random.default_rng(2).normal(size=300)
    low, high = bootstrap(inherited, top1)["Spearman"]
    r = agreement(inherited, top1)["Spearman"]
    half = 1.96 * math.sqrt((1 + r**2 / 2) / 297)
    expected = math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)
    assert (low, high) == pytest.approx(expected, abs=0.25 * (expected[1] - expected[0]))


def test_members_of_a_table_are_architectures_and_are_told_by_value(tmp_path):
    members = [
        {f"block{i}": ("joint", "parallel")[number % 2] for i in range(1, 5)}
        | {f"groups{i}": 2**i for i in range(1, 5)}
        | {f"depth{i}": 1 + number for i in range(1, 5)}
        for number in range(4)
    ]
    last = np.arange(12).reshape(4, 3, 1) / 12
    path = write_table(tmp_path / "t.parquet", members, np.concatenate([0 * last, last], 2), np.ones(4))
    table = read_table(path)
    assert dimensions_of(Architecture(("joint",) * 4, (2, 4, 8, 16), (3, 3, 3, 3))) == table.members[2]
    alone = table.top1[:, :, -1].mean(1)
    lines = [line.split() for line in mean_by_value(table.members, np.array([0.1, 0.2, 0.3, 0.4]), alone)]
    assert ["block4", "joint", "2", "20.0%", "33.3%"] in lines  # members 0 and 2: (1 + 7) / 12 / 2
    assert ["depth1", "4", "1", "40.0%", "83.3%"] in lines


def test_a_table_of_one_seed_is_refused(tmp_path, monkeypatch):
    path = write_table(tmp_path / "t.parquet", all_blocks()[:2], np.ones((2, 1, 2)), np.ones(2))
    monkeypatch.setattr("sys.argv", ["supernet.py", "runs/none", "--table", str(path)])
    with pytest.raises(SystemExit, match="has one seed of each member; the ceiling needs at least 2"):
        supernet.main()


def test_the_command_compares_runs_with_the_table_and_with_each_other(tmp_path, monkeypatch, capsys):
    """One run ranks as the table does, the other one the other way round."""
    monkeypatch.setattr(supernet, "DRAWS", 20)
    members = all_blocks()[:12]
    top1 = np.repeat(np.arange(12)[:, None, None] / 12, 2, axis=1)
    path = write_table(tmp_path / "t.parquet", members, top1, np.arange(12) ** 2)
    for run, sign in (("same", 1), ("reversed", -1)):
        (tmp_path / run / "members").mkdir(parents=True)
        head = ",".join([*(f"search.{name}" for name in members[0]), "top1"])
        rows = [",".join([*map(str, member.values()), str(0.5 + sign * i / 100)]) for i, member in enumerate(members)]
        (tmp_path / run / "members" / "members.csv").write_text("\n".join([head, *rows]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["supernet.py", "same", "reversed", "--table", str(path)])
    supernet.main()
    out = capsys.readouterr().out
    assert "reversed: inherited 44.5%, from 39.0% to 50.0%" in out
    found = {line.split("  ")[-1]: float(line.split()[0]) for line in out[out.index("\nSpearman\n") :].splitlines()[2:]}
    assert found == {
        "alone and same": 1,
        "alone and reversed": -1,
        "alone and GMACs": 1,
        "same and reversed": -1,
        "same and GMACs": 1,
        "reversed and GMACs": -1,
    }
