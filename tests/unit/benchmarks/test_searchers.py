"""Searches that are replayed on a made-up table: which is best, what they spend, and how they are judged."""

from itertools import pairwise
from pathlib import Path

import early_stopping
import numpy as np
import pytest
import searchers
from searchers import Replay, epochs_to, sample
from table import read_scores, read_table

from pipelines.studies.pareto import hypervolume
from pipelines.tuning.controller import successive_halving
from pipelines.tuning.mo_asha import SuccessiveHalving
from posmlp.errors import UserError
from tests.helpers.tables import all_blocks, made_up, write_table

MEMBERS = all_blocks(4)  # 81
EPOCHS = 9


def value_of(member):
    """More joint stages are better, the later ones most."""
    return 0.2 + 0.03 * sum(int(block[5:]) * (member[block] == "joint") for block in member)


def gmacs_of(member):
    return 1.0 + sum(("parallel", "cascade_ts", "joint").index(block) for block in member.values())


def table_of(folder, value=value_of, gmacs=gmacs_of, **how):
    top1 = made_up(MEMBERS, value, epochs=EPOCHS, **how)
    return read_table(write_table(Path(folder, "t.parquet"), MEMBERS, top1, [gmacs(member) for member in MEMBERS]))


def run(table, kind, asha=False, with_prior=False, seed=0, trials=30, prior=None):
    replay = Replay(table, trials, prior)
    return replay.run(replay.searcher(kind, asha, with_prior, seed))


# --- which searcher is best ------------------------------------------------------------------------------------------


def area(search):
    """The mean hypervolume over the finished trials of a search."""
    return search.volume.mean()


def test_tpe_is_better_than_random_where_stages_add_up(tmp_path):
    table = table_of(tmp_path)
    found = {kind: [area(run(table, kind, seed=seed)) for seed in range(6)] for kind in ("random", "tpe")}
    assert np.mean(found["tpe"]) > np.mean(found["random"]) + 0.01
    last = {kind: np.mean([run(table, kind, seed=seed).regret[-1] for seed in range(6)]) for kind in found}
    assert last["tpe"] < last["random"]


def test_a_prior_that_is_the_truth_is_best_and_a_reversed_one_is_worst(tmp_path):
    table = table_of(tmp_path)
    truth = table.top1[:, 0, -1]
    found = {
        name: np.mean(
            [area(run(table, "tpe", seed=seed, trials=10, with_prior=True, prior=prior)) for seed in range(4)]
        )
        for name, prior in (("truth", truth), ("none", None), ("reversed", -truth))
    }
    assert found["truth"] > found["none"] + 0.02
    assert found["reversed"] < found["none"]


@pytest.mark.parametrize("kind", ["random", "tpe", "nsga2"])
@pytest.mark.parametrize("asha", [False, True])
def test_a_search_trains_each_member_once_and_ends_when_all_are_known(tmp_path, kind, asha):
    """With enough trials all members are seen, so without noise and without early stopping all is found."""
    search = run(table_of(tmp_path), kind, asha, trials=200)
    if not asha:
        assert len(search.spent) == len(MEMBERS) and search.epochs == EPOCHS * len(MEMBERS)
        assert search.volume[-1] == pytest.approx(1) and search.regret[-1] == 0
    assert search.spent[0] == EPOCHS  # the first is never stopped
    assert (np.diff(search.volume) >= -1e-12).all() and search.volume[-1] > 0.9


def test_a_search_with_a_seed_repeats(tmp_path):
    table = table_of(tmp_path, noise=0.05)
    one, other = (run(table, "tpe", True, seed=3) for _ in range(2))
    assert one.spent.tolist() == other.spent.tolist() and one.volume.tolist() == other.volume.tolist()
    assert run(table, "tpe", True, seed=4).volume.tolist() != one.volume.tolist()


# --- epochs ----------------------------------------------------------------------------------------------------------


def test_without_early_stopping_each_trial_costs_its_epochs(tmp_path):
    search = run(table_of(tmp_path, noise=0.05), "random", trials=12)
    assert search.spent.tolist() == [EPOCHS * number for number in range(1, 13)] and search.epochs == 12 * EPOCHS


@pytest.mark.parametrize("seed", range(3))
def test_each_epoch_counts_once_also_of_promoted_trials(tmp_path, monkeypatch, seed):
    """What the rungs are told is one epoch of one trial; the last epoch of a trial they are not told."""
    told = []

    class Spy(SuccessiveHalving):
        def add(self, key, t, values):
            told.append((key, t))
            return super().add(key, t, values)

    monkeypatch.setattr("pipelines.tuning.controller.SuccessiveHalving", Spy)
    search = run(table_of(tmp_path, noise=0.05), "tpe", True, seed=seed, trials=40)
    assert len(set(told)) == len(told) and {t for _, t in told} == set(range(1, EPOCHS))
    assert search.epochs == len(told) + len(search.spent)
    in_a_row = [key for i, (key, _) in enumerate(told) if i == 0 or told[i - 1][0] != key]
    assert len(in_a_row) > len(set(in_a_row))  # some were promoted
    for key in set(in_a_row):  # each continues where it was stopped
        assert [t for k, t in told if k == key] == list(range(1, 1 + sum(k == key for k, _ in told)))


@pytest.mark.parametrize("seed", range(3))
def test_early_stopping_is_that_of_the_simulation_of_early_stopping(tmp_path, seed):
    """``benchmarks/early_stopping.py`` trains the same members in the same order, one at a time."""
    table = table_of(tmp_path, noise=0.05)
    replay = Replay(table, len(MEMBERS))
    order = []
    searcher = replay.searcher("random", True, False, seed)
    trials = []
    while len(order) < len(MEMBERS):  # what random search proposes depends on nothing
        trials.append(searcher.propose(trials))
        order.append(MEMBERS.index(trials[-1].member))
    search = replay.run(replay.searcher("random", True, False, seed))
    seen = table.top1[np.arange(len(MEMBERS)), np.random.default_rng(seed).integers(3, size=len(MEMBERS))]
    same = early_stopping.Members(table.gmacs[order], seen[order, -1], seen[order])
    halving = successive_halving(searcher.study, [])
    finished, trained, promotions = early_stopping.search(same, halving, with_cost=True, workers=1)
    assert (search.epochs, len(search.spent)) == (trained, len(finished))
    assert promotions > 0 and trained < len(MEMBERS) * EPOCHS
    chosen = replay.judge([order[i] for i in sorted(finished)], seen[:, -1])
    assert (search.volume[-1], search.regret[-1]) == pytest.approx(chosen)


# --- how a search is judged ------------------------------------------------------------------------------------------


def judged(truth, seen, gmacs, members):
    """Hypervolume and regret of what the seen values choose among members, the naive way."""
    front = [
        m
        for m in members
        if not any(
            (seen[n], -gmacs[n]) != (seen[m], -gmacs[m]) and seen[n] >= seen[m] and gmacs[n] <= gmacs[m]
            for n in members
        )
    ]
    edges = sorted({*gmacs, gmacs.max()})
    volume = 0.0
    for left, right in pairwise(edges):
        volume += (right - left) * max([truth[m] for m in front if gmacs[m] <= left], default=0.0)
    return volume, truth.max() - truth[max(members, key=lambda m: seen[m])]


@pytest.mark.parametrize("seed", range(3))
def test_hypervolume_and_regret_are_those_of_the_truth_of_what_was_chosen(tmp_path, seed):
    rng = np.random.default_rng(seed)
    costs = dict(zip(map(str, MEMBERS), rng.uniform(1, 5, len(MEMBERS)), strict=True))
    table = table_of(tmp_path, gmacs=lambda member: costs[str(member)], noise=0.2, seed=seed)
    replay, truth = Replay(table, 30), table.top1[:, :, -1].mean(1)
    whole, _ = judged(truth, truth, table.gmacs, range(len(MEMBERS)))
    seen = table.top1[:, 1, -1]
    members = rng.permutation(len(MEMBERS))[:30].tolist()
    volume, regret = judged(truth, seen, table.gmacs, members)
    assert replay.judge(members, seen) == pytest.approx((volume / whole, regret))
    assert replay.judge(range(len(MEMBERS)), truth) == pytest.approx((1, 0))
    assert whole == pytest.approx(hypervolume(list(zip(truth, table.gmacs, strict=True)), table.gmacs.max()))


def test_the_best_of_a_search_is_chosen_by_the_seed_that_it_saw(tmp_path):
    """With one trial, regret is how much the truth of that member is below the best, not what the search saw."""
    table = table_of(tmp_path, noise=0.3)
    truth = table.top1[:, :, -1].mean(1)
    search = run(table, "random", seed=5, trials=1)
    assert truth.max() - search.regret[0] == pytest.approx(
        truth[np.abs(truth.max() - search.regret[0] - truth).argmin()]
    )
    assert search.regret[0] >= 0


def test_values_hold_until_the_next_trial_ends():
    search = searchers.Search(np.array([2, 5]), np.array([0.1, 0.4]), np.array([0.3, 0.2]), 6)
    assert sample([search], "volume", 2, 7).tolist() == [[0.1, 0.1, 0.1, 0.4, 0.4, 0.4]]
    assert sample([search], "regret", 2, 3).tolist() == [[0.3, 0.3]]


def test_epochs_to_a_hypervolume_are_those_of_the_mean():
    volume = np.array([[0.1, 0.3, 0.3, 0.5], [0.1, 0.1, 0.5, 0.5]])  # the mean: 0.1, 0.2, 0.4, 0.5; from epoch 2 on
    assert [epochs_to(target, volume, 2) for target in (0.05, 0.2, 0.3, 0.5, 0.6)] == [2, 3, 4, 5, None]


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_prior_is_read_by_member_and_what_it_lacks_is_named(tmp_path):
    table = table_of(tmp_path)
    names = list(MEMBERS[0])
    rows = [[*map(str, member.values()), str(number / 100)] for number, member in enumerate(MEMBERS)]
    head = ",".join([f"search.{name}" for name in names] + ["top1"])
    path = tmp_path / "members.csv"
    path.write_text("\n".join([head, *map(",".join, rows[::-1])]))
    assert read_scores(path, table).tolist() == [number / 100 for number in range(len(MEMBERS))]
    path.write_text("\n".join([head, *map(",".join, rows[3:])]))
    with pytest.raises(UserError, match="lacks members 0, 1, 2 of the table"):
        read_scores(path, table)
    path.write_text("\n".join([head.replace("top1", "score"), *map(",".join, rows)]))
    with pytest.raises(UserError, match=r"has no column top1; give the members\.csv of posmlp supernet"):
        read_scores(path, table)
    path.write_text("\n".join([head, *map(",".join, [[*rows[0][:-1], ""], *rows[1:]])]))
    with pytest.raises(UserError, match="top1 of a row is not a number"):
        read_scores(path, table)
    with pytest.raises(UserError, match=r"none\.csv cannot be read \(No such file or directory\)"):
        read_scores(tmp_path / "none.csv", table)


def test_the_command_prints_a_row_for_each_search_and_draws_the_figure(tmp_path, monkeypatch, capsys):
    table_of(tmp_path)
    figure = tmp_path / "figure.png"
    given = [str(tmp_path / "t.parquet"), "--searches", "2", "--trials", "10", "--figure", str(figure)]
    monkeypatch.setattr("sys.argv", ["searchers.py", *given])
    searchers.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    expected = [
        ("random", "no"),
        ("random", "yes"),
        ("TPE", "no"),
        ("TPE", "yes"),
        ("NSGA-II", "no"),
        ("NSGA-II", "yes"),
    ]
    assert [(row[0].strip("| "), row[1]) for row in rows] == expected
    assert rows[0][2:4] == ["90", "10.0"] and int(rows[0][7]) <= 90
    assert all(0 < float(row[4].rstrip("%")) <= float(row[5].rstrip("%")) + 5 for row in rows)
    assert all(90 <= int(row[2]) < 99 for row in rows[1::2])  # the last trial may end later
    assert figure.read_bytes().startswith(b"\x89PNG")
