"""The members of the tabular benchmark: 48 of the space ``same_width``, drawn so that their main effects can be told.

    for seed in 0 1 2; do
        posmlp tune reference --name reference-$seed --space benchmarks/reference_space.py --searcher grid --trials 48 \
            train.seed=$seed
    done

Member 0 is the recipe's own model, the paper's choice: parallel blocks everywhere. Each dimension has each of its
values equally often, up to one, and no two have more in common than by chance. The draw depends on the recipe's
model alone. ``benchmarks/table.py`` collects the trials.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from posmlp.config import Config
from posmlp.model.spec import Architecture
from tune_spaces import Member, Space, Value, same_width

MEMBERS = 48
SHUFFLES = 100  # of each dimension's column, of which the one that has the least in common with the others is taken


def space(base: Config) -> Space:
    """``same_width`` with the drawn members alone."""
    whole = same_width.space(base)
    own = dimensions_of(base.model.variant().architecture())
    return replace(whole, members=tuple(balanced_draw(whole, own, MEMBERS)))


def dimensions_of(architecture: Architecture) -> dict[str, Value]:
    """An architecture as a member of ``same_width``."""
    named = {"block": architecture.blocks, "groups": architecture.groups, "depth": architecture.depths}
    return {f"{name}{stage}": value for name, values in named.items() for stage, value in enumerate(values, start=1)}


def balanced_draw(whole: Space, first: Member, count: int, seed: int = 0) -> list[dict[str, Value]]:
    """Draw members such that each value of a dimension occurs equally often, up to one.

    Args:
        whole: has choices alone.
        first: the first member.
        count: number of members, at least as many as a dimension has values.
    """
    rng = np.random.default_rng(seed)
    drawn: dict[str, np.ndarray] = {}  # index of each member's value, int64 [members]
    for name, values in whole.dimensions.items():
        assert isinstance(values, tuple)
        columns = [balanced_column(len(values), values.index(first[name]), count, rng) for _ in range(SHUFFLES)]
        drawn[name] = min(columns, key=lambda column: in_common(column, drawn.values()))
    return [{name: whole.dimensions[name][column[row]] for name, column in drawn.items()} for row in range(count)]


def balanced_column(values: int, first: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of values in random order, each equally often up to one, with a given one first: int64 ``[count]``."""
    rest = count % values
    column = rng.permutation(np.append(np.arange(count - rest) % values, rng.permutation(values)[:rest]))
    place = int(np.argmax(column == first))
    column[[0, place]] = column[[place, 0]]
    return column


def in_common(column: np.ndarray, others: Iterable[np.ndarray]) -> float:
    """How much a column has in common with others: the sum of their mean square contingencies (Pearson's phi^2)."""
    total = 0.0
    for other in others:
        counts = np.zeros((column.max() + 1, other.max() + 1))
        np.add.at(counts, (column, other), 1)
        total += (counts**2 / np.outer(counts.sum(1), counts.sum(0))).sum() - 1
    return total
