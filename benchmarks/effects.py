"""How much each dimension of a tabular benchmark matters, and what each of its values adds.

    python benchmarks/effects.py
    python benchmarks/effects.py benchmarks/reference.parquet

A functional ANOVA of main effects: least squares explain a value of each member after the last epoch by one effect of
each dimension. The value is the median over the member's seeds, its typical run, and then the mean, in which a run that
has stayed on a plateau counts in full. An effect of words (the block types) has a value of its own for each word. One
of numbers (groups and depths) is a parabola in their logarithm, which has a best value between others if there is one.
Effects are measured from the mean of all members, so they add up.

The standard errors are those of noise that is alike for all members: what is left over, from seeds and interactions. A
share of the variance is corrected for what noise alone would explain, so it may come out below 0.

The figure has the effects on the median of top-1. Further tables add up a choice for all stages, such as one block type
everywhere, and compare it with that of member 0, the recipe's own model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats
from table import OUT, read_table

from pipelines.tracking.plots import to_png
from posmlp.errors import UserError
from posmlp.metrics import VAL_LOSS, VAL_TOP1
from tune_spaces import Value

FIGURE = Path(__file__).parents[1] / "docs" / "effects.png"
DRAWS = 2000
DEGREE = 2  # of the polynomial in the logarithm of numbers


@dataclass(frozen=True)
class Effect:
    """The main effect of a dimension. Errors are standard errors.

    Attributes:
        values: what the dimension's values add to the mean, by value.
        errors: of these, likewise.
        drawn: the values as other noise of the same size would have shown them: float64 ``[draws, values]``.
        share: of the variance of the members' means.
        share_error: of this share.
    """

    values: dict[Value, float]
    errors: dict[Value, float]
    drawn: np.ndarray
    share: float
    share_error: float


@dataclass(frozen=True)
class Effects:
    """The main effects of all dimensions.

    Attributes:
        by_dimension: by its name.
        seeds: the share of the variance of the members' means that is noise of their seeds; None: not of means.
        freedom: degrees of freedom of what is left over.
    """

    by_dimension: dict[str, Effect]
    seeds: float | None
    freedom: int

    @property
    def times(self) -> float:
        """The multiple of a standard error that makes a 95 % interval."""
        return float(stats.t.ppf(0.975, self.freedom))

    @property
    def rest(self) -> float:
        """The share that is neither of a dimension alone nor of the seeds: interactions, and what parabolas miss.

        It is of the seeds too if theirs is not known.
        """
        return 1 - (self.seeds or 0.0) - sum(effect.share for effect in self.by_dimension.values())

    def sum_of(self, choice: Mapping[str, Value], instead: Mapping[str, Value] | None = None) -> tuple[float, float]:
        """What the values of some dimensions add together, in place of others if given, and its standard error."""
        value, drawn = 0.0, np.zeros(DRAWS)
        for sign, values in ((1, choice), (-1, instead or {})):
            for name, chosen in values.items():
                effect = self.by_dimension[name]
                value += sign * effect.values[chosen]
                drawn += sign * effect.drawn[:, list(effect.values).index(chosen)]
        return value, float(drawn.std())


def main_effects(
    members: Sequence[dict[str, Value]], values: np.ndarray, seed: int = 0, over_seeds: Callable[..., Any] = np.mean
) -> Effects:
    """Estimate the main effect of each dimension.

    Args:
        values: a metric of each member by seed: float64 ``[members, seeds]``.
        seed: of the draws for the standard errors.
        over_seeds: gives a member's value, ``np.mean`` or ``np.median``.

    Raises:
        UserError: there are too few members for the effects, or the members do not differ.
    """
    means, count = over_seeds(values, axis=1), len(members)
    columns, choices = {}, {}
    for name in members[0]:
        own = [member[name] for member in members]
        choices[name] = sorted(set(own), key=lambda value: (isinstance(value, str), value))
        places = np.array([choices[name].index(value) for value in own])
        curve = basis(choices[name])
        curve = curve - curve[places].mean(axis=0)  # the effect's mean over the members is 0
        columns[name] = places, curve
    design = np.hstack([np.ones((count, 1)), *(curve[places] for places, curve in columns.values())])
    freedom = count - design.shape[1]
    if freedom < 1 or np.linalg.matrix_rank(design) < design.shape[1]:
        raise UserError(
            f"{count} members are too few for {design.shape[1]} coefficients of {len(columns)} dimensions; train more, "
            "or other members"
        )
    solve = np.linalg.pinv(design)  # coefficients from means: [coefficients, members]
    fitted = design @ solve @ means
    noise = ((means - fitted) ** 2).sum() / freedom
    if not means.var():
        raise UserError("all members are equal: there is nothing to explain")
    drawn = fitted + np.sqrt(noise) * np.random.default_rng(seed).normal(size=(DRAWS, count))
    samples = np.vstack([means, drawn])  # the first one is what was measured
    coefficients = samples @ solve.T  # [samples, coefficients]
    residual = ((samples - coefficients @ design.T) ** 2).sum(axis=1) / freedom
    total = samples.var(axis=1)
    found, start = {}, 1
    for name, (places, curve) in columns.items():
        part = slice(start, start + curve.shape[1])
        start = part.stop
        effects = coefficients[:, part] @ curve.T  # [samples, values]
        by_chance = ((curve[places] @ solve[part]) ** 2).sum() / count  # of noise with variance 1
        shares = (effects[:, places].var(axis=1) - residual * by_chance) / total
        deviations = effects[1:].std(axis=0)
        found[name] = Effect(
            dict(zip(choices[name], effects[0].tolist(), strict=True)),
            dict(zip(choices[name], deviations.tolist(), strict=True)),
            effects[1:],
            float(shares[0]),
            float(shares[1:].std()),
        )
    if over_seeds is not np.mean:
        return Effects(found, None, freedom)
    of_seeds = values.var(axis=1, ddof=1).mean() / values.shape[1] if values.shape[1] > 1 else 0.0
    return Effects(found, float(of_seeds / total[0]), freedom)


def basis(values: Sequence[Value]) -> np.ndarray:
    """The functions of which an effect is made, at each value: float64 ``[values, functions]``."""
    if any(isinstance(value, str) for value in values):
        return np.eye(len(values))[:, 1:]
    size = np.log(np.array(values, dtype=float))
    size = (size - size.mean()) / (size.std() or 1.0)
    return size[:, None] ** np.arange(1, min(DEGREE, len(values) - 1) + 1)


def describe(effects: Effects, scale: float, digits: int) -> str:
    """Effects as a Markdown table, the largest share first; values are multiplied by a scale."""
    times = effects.times
    lines = ["| dimension | share of the variance | what its values add, with 95 % intervals |", "|---|---|---|"]
    for name, effect in sorted(effects.by_dimension.items(), key=lambda item: -item[1].share):
        parts = [
            f"{value} {scale * effect.values[value]:+.{digits}f} ± {scale * times * effect.errors[value]:.{digits}f}"
            for value in effect.values
        ]
        lines.append(f"| {name} | {effect.share:.0%} ± {times * effect.share_error:.0%} | {', '.join(parts)} |")
    if effects.seeds is None:
        return "\n".join([*lines, f"| seeds, interactions and the rest | {effects.rest:.0%} | |"])
    lines.append(f"| seeds | {effects.seeds:.0%} | |")
    return "\n".join([*lines, f"| interactions and the rest | {effects.rest:.0%} | |"])


def whole_choices(effects: Effects, own: Mapping[str, Value]) -> dict[str, dict[str, Value]]:
    """Choices for all stages, by name: each word everywhere; of numbers the least, the recipe's and the most.

    Args:
        own: the recipe's model.
    """
    kinds: dict[str, list[str]] = {}  # dimensions, one of each stage
    for name in effects.by_dimension:
        kinds.setdefault(name.rstrip("0123456789"), []).append(name)
    found: dict[str, dict[str, Value]] = {}
    for kind, names in kinds.items():
        values = {name: list(effects.by_dimension[name].values) for name in names}
        if isinstance(own[names[0]], str):
            for word in sorted(set.intersection(*map(set, values.values()))):
                found[f"{kind} {word}"] = dict.fromkeys(names, word)
            continue
        least, most = ({name: values[name][end] for name in names} for end in (0, -1))
        for choice in (least, {name: own[name] for name in names}, most):
            found[f"{kind} {', '.join(str(value) for value in choice.values())}"] = choice
    return found


def describe_choices(effects: Effects, own: Mapping[str, Value], scale: float, digits: int) -> str:
    """What choices for all stages add, as a Markdown table; arguments as of ``whole_choices`` and ``describe``."""

    def shown(choice: Mapping[str, Value], instead: Mapping[str, Value] | None = None) -> str:
        value, error = effects.sum_of(choice, instead)
        return f"{scale * value:+.{digits}f} ± {scale * effects.times * error:.{digits}f}"

    lines = ["| all stages | adds to the mean | in place of the recipe's |", "|---|---|---|"]
    for name, choice in whole_choices(effects, own).items():
        recipes = {dimension: own[dimension] for dimension in choice}
        lines.append(f"| {name} | {shown(choice)} | {shown(choice, recipes) if choice != recipes else ''} |")
    lines.append(f"| the recipe's model | {shown(own)} | |")
    return "\n".join(lines)


def draw(effects: Effects) -> bytes:
    """Draw what each value of each dimension adds to the median of top-1, as PNG.

    A row is a kind of dimension, such as block types, and a column a stage.
    """
    kinds: dict[str, list[str]] = {}
    for name in effects.by_dimension:
        kinds.setdefault(name.rstrip("0123456789"), []).append(name)
    columns = max(map(len, kinds.values()))
    figure = Figure(figsize=(2.6 * columns, 2.2 * len(kinds)), layout="constrained")
    grid = figure.subplots(len(kinds), columns, sharey=True, squeeze=False)
    for row, names in zip(grid, kinds.values(), strict=True):
        for axes in row[len(names) :]:
            axes.set_axis_off()
        for axes, name in zip(row, names, strict=False):
            effect = effects.by_dimension[name]
            values = [100 * value for value in effect.values.values()]
            bars = [100 * effects.times * error for error in effect.errors.values()]
            places = range(len(bars))
            axes.axhline(0, color="#999999", linewidth=0.8)
            axes.errorbar(places, values, bars, fmt="o", markersize=4, color="#3b77c2", capsize=2)
            axes.set_xticks(places, [str(value).replace("cascade_", "casc. ") for value in effect.values], fontsize=7)
            axes.set_title(name, fontsize=9)
            axes.grid(axis="y", alpha=0.25)
    figure.supylabel("points of top-1 (median over seeds), with 95 % intervals", fontsize=9)
    return to_png(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", type=Path, default=OUT, help="of table.py (default: %(default)s)")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="(default: %(default)s)")
    args = parser.parse_args()
    try:
        table = read_table(args.table)
        for name, values, how, unit in (
            (VAL_TOP1, table.top1, (100, 2), "points"),
            (VAL_LOSS, table.loss, (1, 3), "nats"),
        ):
            for over_seeds, title in ((np.median, "median"), (np.mean, "mean")):
                found = main_effects(table.members, values[:, :, -1], over_seeds=over_seeds)
                print(f"{name}, {title} over seeds, {unit}\n\n{describe(found, *how)}\n")
                print(f"{describe_choices(found, table.members[0], *how)}\n")
                if (name, title) == (VAL_TOP1, "median"):
                    args.figure.write_bytes(draw(found))
    except UserError as error:
        raise SystemExit(str(error)) from error
    last = table.top1[:, :, -1]
    for title, truth in (("median", np.median(last, axis=1)), ("mean", last.mean(axis=1))):
        rank = 1 + int((truth > truth[0]).sum())
        print(f"member 0, the recipe's own model: {title} of {VAL_TOP1} {truth[0]:.1%}, number {rank} of {len(truth)}")
    print(args.figure)


if __name__ == "__main__":
    main()
