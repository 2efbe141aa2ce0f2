"""How well do supernets rank the members of a tabular benchmark?

    python benchmarks/supernet.py runs/three-paths runs/one-path

Each run is one of ``posmlp supernet --space benchmarks/reference_space.py --members 48``, which scores the table's
members with the weights that they inherit. The script compares this top-1 with the mean top-1 of a member's seeds after
the last epoch: Spearman's and Kendall's rank correlation.

A mean of few seeds is noisy, so even a second table would not rank the members alike. The ceiling is the Spearman
correlation that is expected between the means of this table and those of another one with as many seeds. With one seed
it is r, the mean over pairs of this table's seeds. With S seeds it is S r / (1 + (S - 1) r) (Spearman-Brown). The
intervals are of 95 %, by a bootstrap over members.

Of the costs of members and of several runs it prints Spearman's correlations, which tell whether supernets agree.

The table is that of ``benchmarks/table.py``; docs/tabular_benchmark.md has its columns.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from table import OUT, read_scores, read_table

from posmlp.errors import UserError
from tune_spaces import Value

DRAWS = 1000  # of the bootstrap

Floats = NDArray[np.float64]


def spearman(one: Floats, other: Floats) -> float:
    """Spearman's rank correlation."""
    return float(stats.spearmanr(one, other).statistic)


def ceiling(top1: Floats) -> float:
    """Spearman correlation expected between the members' means over these seeds and over as many other seeds.

    Args:
        top1: ``[members, seeds]``.
    """
    pairs = itertools.combinations(top1.T, 2)
    single, seeds = float(np.mean([spearman(*pair) for pair in pairs])), top1.shape[1]
    return seeds * single / (1 + (seeds - 1) * single)


def agreement(inherited: Floats, top1: Floats) -> dict[str, float]:
    """How the members' ranking by inherited top-1 agrees with that by the means over seeds.

    Args:
        inherited: ``[members]``.
        top1: ``[members, seeds]``.
    """
    alone, highest = top1.mean(1), ceiling(top1)
    found = spearman(inherited, alone)
    kendall = float(stats.kendalltau(inherited, alone).statistic)
    return {"Spearman": found, "Kendall": kendall, "ceiling": highest, "Spearman / ceiling": found / highest}


def bootstrap(inherited: Floats, top1: Floats) -> dict[str, tuple[float, float]]:
    """95 % intervals of ``agreement`` over other choices of members; same arguments."""
    rng, count = np.random.default_rng(0), len(inherited)
    drawn = (rng.integers(count, size=count) for _ in range(DRAWS))
    found = [agreement(inherited[members], top1[members]) for members in drawn]
    ends = {name: np.nanpercentile([each[name] for each in found], (2.5, 97.5)) for name in found[0]}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def mean_by_value(members: Sequence[Mapping[str, Value]], inherited: Floats, alone: Floats) -> list[str]:
    """A line for each value of each dimension: mean top-1 of its members, inherited and alone; both ``[members]``."""
    lines = [f"{'':<24}{'members':>8}{'inherited':>11}{'alone':>9}"]
    for name in members[0]:
        values = [member[name] for member in members]
        for value in sorted(set(values)):  # type: ignore[type-var]  # all words or all numbers
            own = np.array([each == value for each in values])
            means = f"{inherited[own].mean():>11.1%}{alone[own].mean():>9.1%}"
            lines.append(f"{f'{name} {value}':<24}{own.sum():>8}{means}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of supernets' runs")
    parser.add_argument("--table", type=Path, default=OUT, help="of table.py (default: %(default)s)")
    args = parser.parse_args()
    try:
        table = read_table(args.table)
        top1 = table.top1[:, :, -1]
        if top1.shape[1] < 2:
            raise UserError(f"{args.table} has one seed of each member; the ceiling needs at least 2")
        inherited = {str(run): read_scores(run / "members" / "members.csv", table) for run in args.runs}
    except UserError as error:
        raise SystemExit(str(error)) from error
    print(f"{len(table.members)} members with {top1.shape[1]} seeds each, alone {top1.mean():.1%}")
    for name, scores in inherited.items():
        intervals = bootstrap(scores, top1)
        print("\n".join(["", *mean_by_value(table.members, scores, top1.mean(1))]))
        print(f"\n{name}: inherited {scores.mean():.1%}, from {scores.min():.1%} to {scores.max():.1%}")
        for what, value in agreement(scores, top1).items():
            low, high = intervals[what]
            print(f"{what:<20}{value:>7.2f}  [{low:.2f}, {high:.2f}]")
    print("\nSpearman")
    rankings = {"alone": top1.mean(1)} | inherited | {"GMACs": table.gmacs}
    for (one, ranking), (other, second) in itertools.combinations(rankings.items(), 2):
        print(f"{spearman(ranking, second):>7.2f}  {one} and {other}")


if __name__ == "__main__":
    main()
