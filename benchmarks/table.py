"""Collect the trials of studies in one Parquet file: a tabular benchmark (docs/tabular_benchmark.md has the columns).

    python benchmarks/table.py runs/reference-0 runs/reference-1 runs/reference-2 --out benchmarks/reference.parquet

The studies train the same members by the same recipe, each with another ``train.seed``;
``benchmarks/reference_space.py`` has the commands. Every member needs every seed and every epoch; the error names what
is missing. A STUDY may also be a Parquet file that this script has written, to add seeds to a table. The script prints
by how much the seeds and the members deviate after the last epoch.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from reference_space import dimensions_of
from scipy.stats import rankdata

from pipelines.runs import checkpoints
from pipelines.runs.checkpoints import CheckpointInfo
from pipelines.studies.study import Study, Trial, TrialState, find_study, read_trials, trial_folder
from pipelines.tracking.uris import SEARCH_PARAM
from posmlp.config import Config
from posmlp.errors import UserError
from posmlp.metrics import COST_GMACS, COST_PARAMS_M, EPOCH, PERF_EPOCH_S, TRAIN_LOSS, VAL_LOSS, VAL_TOP1
from tune_spaces import Value

OUT = Path(__file__).parent / "reference.parquet"
INDEX = ("member", "seed", "epoch")
COSTS = (COST_GMACS, COST_PARAMS_M)
CURVES = (VAL_TOP1, VAL_LOSS, TRAIN_LOSS, PERF_EPOCH_S)
OWN_KEYS = ("name", "model.blocks", "model.groups", "model.depths", "train.seed", "train.storage")  # of a trial
LOWEST = 6  # runs that are named
PACKAGES = ("posmlp-video", "torch", "numpy", "ray")


@dataclass(frozen=True)
class Table:
    """A tabular benchmark.

    Attributes:
        members: the value of each dimension, by member.
        top1: ``val/top1``, 0 to 1: float64 ``[members, seeds, epochs]``.
        loss: ``val/loss``, nats: float64 ``[members, seeds, epochs]``.
        gmacs: of each member: float64 ``[members]``.
    """

    members: list[dict[str, Value]]
    top1: np.ndarray
    loss: np.ndarray
    gmacs: np.ndarray


def read_table(path: Path) -> Table:
    """Read a tabular benchmark.

    Raises:
        UserError: there is none, it is not a Parquet file, a column is missing, or a member lacks a seed or an epoch.
    """
    if not path.is_file():
        raise UserError(f"no table {path}; make it with python benchmarks/table.py STUDY ...")
    try:
        rows = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{path} is not a Parquet file ({error}); make one with python benchmarks/table.py STUDY ..."
        ) from error
    if missing := [name for name in (*INDEX, VAL_TOP1, VAL_LOSS, COST_GMACS) if name not in rows.column_names]:
        raise UserError(f"{path} has no column {', '.join(missing)}; make it with python benchmarks/table.py")
    rows = rows.sort_by([(name, "ascending") for name in INDEX])
    shape = [len(rows[name].unique()) for name in INDEX]
    if rows.num_rows != np.prod(shape):
        counts = ", ".join(f"{count} {name}s" for count, name in zip(shape, INDEX, strict=True))
        raise UserError(
            f"{path} has {rows.num_rows} rows for {counts}; each member needs each seed and each epoch once"
        )
    firsts = rows.select(dimensions(rows)).take(np.arange(shape[0]) * (shape[1] * shape[2]))
    top1, loss, gmacs = (rows[name].to_numpy().reshape(shape) for name in (VAL_TOP1, VAL_LOSS, COST_GMACS))
    return Table(firsts.to_pylist(), top1, loss, gmacs[:, 0, 0])


def read_scores(path: Path, table: Table) -> np.ndarray:
    """The top-1 of each member of a table in the ``members.csv`` of a supernet: float64 ``[members]``.

    Raises:
        UserError: there is no such file, a column or a member is missing, or a top-1 is not a number.
    """
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the members.csv of posmlp supernet") from error
    columns = [f"{SEARCH_PARAM}{name}" for name in table.members[0]]
    if missing := [name for name in (*columns, "top1") if not rows or name not in rows[0]]:
        raise UserError(f"{path} has no column {', '.join(missing)}; give the members.csv of posmlp supernet")
    try:
        scores = {tuple(row[name] for name in columns): float(row["top1"]) for row in rows}
    except ValueError as error:
        raise UserError(f"{path}: top1 of a row is not a number ({error})") from error
    keys = [tuple(map(str, member.values())) for member in table.members]
    if absent := [number for number, key in enumerate(keys) if key not in scores]:
        raise UserError(
            f"{path} lacks members {', '.join(map(str, absent))} of the table; score them with posmlp supernet "
            "RECIPE --space benchmarks/reference_space.py"
        )
    return np.array([scores[key] for key in keys])


# --- the trials of studies -------------------------------------------------------------------------------------------


def collect(names: Sequence[str]) -> pa.Table:
    """The table of the trials of studies, sorted by member, seed and epoch.

    Members are numbered in the order of the first study's trials.

    Args:
        names: the studies, by folder or name, and tables of this script, files that end in ``.parquet``.

    Raises:
        UserError: a trial is not finished or lacks an epoch, recipes differ, or a member lacks a seed.
    """
    members: dict[tuple[Value, ...], int] = {}
    rows: dict[tuple[int, int], list[dict[str, Any]]] = {}  # by member and seed
    tables = [Path(name) for name in names if name.endswith(".parquet")]
    recipes = {str(path): add_table(path, members, rows) for path in tables}
    first: Config | None = None
    for study, trial in trials_of([name for name in names if not name.endswith(".parquet")]):
        what = f"trial {trial.number} of {study.folder}"
        info = last_checkpoint(study, trial, what)
        config = info.recipe()
        first = first or config
        refuse_differences(first, config, what)
        member = dimensions_of(config.model.variant().architecture())
        key = members.setdefault(tuple(member.values()), len(members)), trial.seed
        if key in rows:
            raise UserError(f"{what}: member {key[0]} has another trial with seed {trial.seed}; leave one of them out")
        if missing := [name for name in COSTS if name not in trial.metrics]:
            raise UserError(f"{what} has no {', '.join(missing)} in its trial.json; train it again")
        costs = {name: trial.metrics[name] for name in COSTS}
        known = {"member": key[0], "seed": trial.seed} | member | costs
        rows[key] = [known | epoch for epoch in curve(info, config.train.epochs, what)]
    if first is None and not tables:
        raise UserError(f"{', '.join(names)} has no trials; train some")
    if first is not None:
        recipes[", ".join(names)] = shared_recipe(first)
    (one, recipe), *others = recipes.items()
    for name, text in others:
        if text != recipe:
            lines = [line for line in text.splitlines() if line not in recipe.splitlines()] or recipe.splitlines()
            raise UserError(
                f"{name} has another recipe than {one}, from {lines[0].strip()!r} on; collect tables and studies of "
                "one recipe, in the folder where the studies were started: paths below it are compared"
            )
    seeds = {seed for _, seed in rows}
    if missing := [f"member {m} seed {s}" for m in members.values() for s in sorted(seeds) if (m, s) not in rows]:
        raise UserError(f"{', '.join(names)}: each member needs each seed; missing: {', '.join(missing)}; train them")
    table = pa.Table.from_pylist([row for key in sorted(rows) for row in rows[key]])
    return table.replace_schema_metadata({"recipe": recipe, "versions": json.dumps(versions())})


def add_table(
    path: Path, members: dict[tuple[Value, ...], int], rows: dict[tuple[int, int], list[dict[str, Any]]]
) -> str:
    """Add the rows of a table to those of ``collect``; returns its recipe.

    Raises:
        UserError: it is not a table of this script, or has a member and seed that are there already.
    """
    read_table(path)  # refuses what is not one
    table = pq.read_table(path)
    names = dimensions(table)
    of_table: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        number = members.setdefault(tuple(row[name] for name in names), len(members))
        of_table.setdefault((number, row["seed"]), []).append(row | {"member": number})
    if known := sorted(of_table.keys() & rows.keys()):
        raise UserError(f"{path} has member {known[0][0]} seed {known[0][1]} again; leave one of the tables out")
    rows.update(of_table)
    return (table.schema.metadata or {}).get(b"recipe", b"").decode()


def dimensions(table: pa.Table) -> list[str]:
    """The columns of a table that say which architecture a member is."""
    return [name for name in table.column_names if name.rstrip("0123456789") in ("block", "groups", "depth")]


def trials_of(names: Sequence[str]) -> Iterator[tuple[Study, Trial]]:
    """Yield the trials of studies.

    Raises:
        UserError: there is no such study, or a trial is not finished.
    """
    for name in names:
        study, _ = find_study(name, Study)
        for trial in read_trials(study.folder):
            if trial.state == TrialState.STOPPED:
                raise UserError(
                    f"trial {trial.number} of {study.folder} was stopped early; train all trials to the end with "
                    f"posmlp tune --resume {study.folder} --no-asha"
                )
            if trial.state != TrialState.FINISHED:
                reason = f": {trial.reason}" if trial.reason else ""
                raise UserError(
                    f"trial {trial.number} of {study.folder} is {trial.state}{reason}, not finished; finish the study "
                    f"with posmlp tune --resume {study.folder}, or remove the trial's folder and resume it"
                )
            yield study, trial


def last_checkpoint(study: Study, trial: Trial, what: str) -> CheckpointInfo:
    """What the newest checkpoint of a trial says of it, its metrics of all epochs among it.

    Raises:
        UserError: it has none.
    """
    folder = trial_folder(study, trial.number)
    found = [entry.info for entry in checkpoints.find(folder) if entry.info]
    if not found:
        raise UserError(f"{what} has no intact checkpoint in {folder}, which has the metrics of its epochs; restore it")
    return found[-1]


def curve(info: CheckpointInfo, epochs: int, what: str) -> list[dict[str, float | None]]:
    """The epoch's number and the metrics ``CURVES`` of each epoch, from the newest checkpoint; None: not measured.

    Raises:
        UserError: an epoch, or its validation, is missing.
    """
    history: dict[int, dict[str, float]] = {int(each[EPOCH]): each for each in info.progress.get("history", [])}
    if missing := [epoch for epoch in range(1, epochs + 1) if epoch not in history]:
        raise UserError(f"{what} lacks epoch {missing[0]} of {epochs}; train it without train.patience")
    for epoch in range(1, epochs + 1):
        if lacking := [name for name in CURVES if name not in history[epoch] and name != PERF_EPOCH_S]:
            raise UserError(f"{what} has no {', '.join(lacking)} of epoch {epoch}; train it with eval.every=1")
    return [{EPOCH: epoch} | {name: history[epoch].get(name) for name in CURVES} for epoch in range(1, epochs + 1)]


def refuse_differences(first: Config, other: Config, what: str) -> None:
    """Refuse a trial whose recipe differs in more than its architecture and seed.

    Raises:
        UserError: names the first such key.
    """
    before, now = first.flat(), other.flat()
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key not in OWN_KEYS:
            raise UserError(
                f"{what} has {key} {now.get(key)!r}, the first trial {before.get(key)!r}; trials of a table differ in "
                f"{', '.join(OWN_KEYS)} alone; train it again, or leave its study out"
            )


def shared_recipe(config: Config) -> str:
    """What the recipes of all trials have in common, as YAML; paths below the working directory are relative."""
    tree = config.model_dump(mode="json", exclude={"tracking": True, "name": True, "train": {"seed", "storage"}})
    tree["model"] = {key: value for key, value in tree["model"].items() if f"model.{key}" not in OWN_KEYS}
    return yaml.safe_dump(tree, sort_keys=False).replace(f"{Path.cwd()}/", "")


def versions() -> dict[str, str]:
    """Versions of this environment's Python and packages, and its processor's architecture."""
    return {name: version(name) for name in PACKAGES} | {"python": platform.python_version(), "on": platform.machine()}


# --- seeds against members -------------------------------------------------------------------------------------------


def deviations(values: np.ndarray) -> tuple[float, float]:
    """Standard deviations over seeds and over members.

    Args:
        values: ``[members, seeds]``, at least 2 of each.

    Returns:
        The deviation over seeds, pooled within members. The deviation of the members' expected values: the part of
        the deviation of their means that the seeds do not explain; 0 if there is none.
    """
    seeds = values.var(axis=1, ddof=1).mean()
    members = values.mean(axis=1).var(ddof=1) - seeds / values.shape[1]
    return float(np.sqrt(seeds)), float(np.sqrt(max(members, 0.0)))


def rank_agreement(values: np.ndarray) -> float:
    """How two seeds rank the members alike: Spearman's correlation, the mean over pairs of seeds.

    Args:
        values: ``[members, seeds]``, at least 2 of each.
    """
    ranks = [rankdata(column) for column in values.T]
    return float(np.mean([np.corrcoef(one, other)[0, 1] for one, other in itertools.combinations(ranks, 2)]))


def describe(table: Table) -> str:
    """The size of a table, how far seeds and members deviate after the last epoch, and the lowest top-1."""
    members, seeds, epochs = table.top1.shape
    lines = [f"{members} members, {seeds} seeds, {epochs} epochs"]
    if members < 2 or seeds < 2:
        return f"{lines[0]}; deviations need 2 members and 2 seeds"
    for name, values, scale, unit in ((VAL_TOP1, table.top1, 100, "points"), (VAL_LOSS, table.loss, 1, "nats")):
        seed, member = deviations(values[:, :, -1])
        ratio = seed / member if member else np.inf
        verdict = "at most a third" if ratio <= 1 / 3 else "more than a third"
        lines.append(
            f"{name}: deviation over seeds {scale * seed:.3g} {unit}, over members {scale * member:.3g} {unit}; "
            f"ratio {ratio:.2f}, {verdict}; the ranks of two seeds correlate by {rank_agreement(values[:, :, -1]):.2f}"
        )
    runs = np.sort(100 * table.top1[:, :, -1].ravel())
    lowest = ", ".join(f"{value:.1f}" for value in runs[:LOWEST])
    lines.append(f"{VAL_TOP1} of all {len(runs)} runs: median {np.median(runs):.1f} %, the lowest {lowest}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", metavar="STUDY", help="folders or names of studies")
    parser.add_argument("--out", type=Path, default=OUT, help="the Parquet file (default: %(default)s)")
    args = parser.parse_args()
    if not args.out.absolute().parent.is_dir():
        parser.error(f"argument --out: there is no folder {args.out.absolute().parent}; make it, or name another file")
    try:
        table = collect(args.studies)
        pq.write_table(table, args.out, compression="zstd")
        print(f"{args.out}: {table.num_rows} rows, {args.out.stat().st_size / 1e3:.0f} kB")
        print(describe(read_table(args.out)))
    except UserError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
