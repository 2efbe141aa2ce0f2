"""How well does a supernet rank the members of a tabular benchmark?

    python benchmarks/supernet.py runs/motion-supernet benchmarks/reference.parquet

The table has members of the supernet, each trained alone with several seeds. The script scores these members on the
run's validation split, with the weights that they inherit from the run's newest checkpoint. It compares this top-1 with
the mean top-1 of a member's seeds after the last epoch: Spearman's and Kendall's rank correlation.

A mean of few seeds is noisy, so even a second table would not rank the members alike. The ceiling is the Spearman
correlation that is expected between the means of this table and those of another one with as many seeds. With one seed
it is r, the mean over pairs of this table's seeds. With S seeds it is S r / (1 + (S - 1) r) (Spearman-Brown). The
intervals are of 95 %, by a bootstrap over members.

The table is a Parquet file with a row for each member, seed and epoch. Its columns are member, seed, epoch, block1 to
block4, groups1 to groups4, depth1 to depth4 (one for each stage), and val/top1 (0 to 1).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy import stats

from pipelines.cluster.capacity import choose_device, wait_for_room
from pipelines.cluster.session import start_ray
from pipelines.runs.record import find_run, read_record
from pipelines.tuning.supernet import score_members
from posmlp.config import Config
from posmlp.errors import UserError
from posmlp.metrics import VAL_TOP1
from posmlp.model.spec import STAGES, Architecture

DRAWS = 1000  # of the bootstrap
COLUMNS = {"blocks": "block", "groups": "groups", "depths": "depth"}  # key of an architecture -> columns of the table

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """The members of a tabular benchmark, trained alone.

    Attributes:
        members: their architectures.
        top1: ``[members, seeds]``, top-1 after the last epoch, 0 to 1.
    """

    members: list[Architecture]
    top1: Floats


def read_table(path: str) -> Table:
    """Read a tabular benchmark.

    Raises:
        UserError: a column is missing, or the members differ in the number of seeds or of epochs.
    """
    table = pq.read_table(path)
    columns = [f"{column}{stage}" for column in COLUMNS.values() for stage in range(1, STAGES + 1)]
    if missing := sorted({"member", "seed", "epoch", VAL_TOP1, *columns} - set(table.column_names)):
        raise UserError(f"{path} has no column {', '.join(missing)}; see benchmarks/supernet.py for those it needs")
    rows = sorted(table.to_pylist(), key=lambda row: (row["member"], row["seed"], row["epoch"]))
    runs = [list(run) for _, run in itertools.groupby(rows, lambda row: (row["member"], row["seed"]))]
    if len(epochs := {run[-1]["epoch"] for run in runs}) > 1:
        raise UserError(f"{path}: the last epoch of some members is {min(epochs)}, of others {max(epochs)}")
    members, top1 = [], []
    for _, same in itertools.groupby((run[-1] for run in runs), lambda row: row["member"]):
        seeds = list(same)
        stages = {key: [seeds[0][f"{name}{stage + 1}"] for stage in range(STAGES)] for key, name in COLUMNS.items()}
        members.append(Architecture(**{key: tuple(values) for key, values in stages.items()}))
        top1.append([row[VAL_TOP1] for row in seeds])
    if len(counts := {len(seeds) for seeds in top1}) > 1 or min(counts) < 2:
        raise UserError(f"{path}: members have {sorted(counts)} seeds; all must have the same number, at least 2")
    return Table(members, np.array(top1, float))


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


def mean_by_value(table: Table, inherited: Floats) -> list[str]:
    """A line for each value of each column: mean top-1 of its members, inherited and alone."""
    lines, alone = [f"{'':<24}{'members':>8}{'inherited':>11}{'alone':>9}"], table.top1.mean(1)
    for key, stage in itertools.product(COLUMNS, range(STAGES)):
        values = [getattr(member, key)[stage] for member in table.members]
        for value in sorted(set(values)):
            own = np.array([each == value for each in values])
            means = f"{inherited[own].mean():>11.1%}{alone[own].mean():>9.1%}"
            lines.append(f"{f'{COLUMNS[key]}{stage + 1} {value}':<24}{own.sum():>8}{means}")
    return lines


def score(run: str, members: Sequence[Architecture]) -> Floats:
    """Top-1 of members with the weights of a supernet's run, ``[members]``.

    Raises:
        UserError: the run is not of a supernet with these members, or too many of its videos are bad.
    """
    record = read_record(find_run(run))
    assert record is not None
    config = Config.model_validate(record["config"])
    choices = config.model.variant().choices
    if choices is None:
        raise UserError(f"{run} is not the run of a supernet; train one with posmlp supernet")
    own = choices.with_defaults(config.model.variant().architecture())
    if others := [member for member in members if not own.contains(member)]:
        raise UserError(f"{len(others)} members of the table are not of the supernet {run}, such as {others[0]}")
    start_ray()
    config = choose_device(config)
    wait_for_room(config.scaling)
    return np.array(score_members(find_run(run), config.scaling, members)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a supernet's run")
    parser.add_argument("table", help="Parquet file of the tabular benchmark")
    args = parser.parse_args()
    table = read_table(args.table)
    inherited = score(args.run, table.members)
    intervals = bootstrap(inherited, table.top1)
    print("\n".join(mean_by_value(table, inherited)))
    print(f"\n{len(table.members)} members with {table.top1.shape[1]} seeds each")
    for name, value in agreement(inherited, table.top1).items():
        low, high = intervals[name]
        print(f"{name:<20}{value:>7.2f}  [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    main()
