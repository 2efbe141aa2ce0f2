"""How often an epoch draws each training video: lists with weights, balanced classes. And the weights of classes.

Usually an epoch is a permutation of the rows. With weights of lists (``data.train.weight``) or balanced sampling
(``data.balance: sampling``) each row has an expected number of draws instead, such as 0.5 or 2.3. ``Draws.order`` draws
it the two whole numbers of times around that, at random, so that the mean over epochs is the expected number. Nothing
but the generator is random, so the order of an epoch follows from seed and epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

WEIGHT = "weight"  # column of manifest rows: expected draws of the row's list; rows without it have 1


@dataclass(frozen=True)
class Draws:
    """The expected draws of an epoch's rows.

    Attributes:
        expected: float64 ``[rows]``; the sum is a whole number, the length of an epoch.
        groups: int64 ``[rows]``; the draws of each group are within one of the group's expected number.
    """

    expected: NDArray[np.float64]
    groups: NDArray[np.int64]

    @property
    def total(self) -> int:
        """Number of draws in an epoch."""
        return round(float(self.expected.sum()))

    def order(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """The draws of an epoch in random order, int64 ``[total]``.

        Draw k (from 0) of row i is ``k * rows + i``. So a plain permutation is the case where every k is 0, and the
        loader can give each draw of a video a clip of its own.
        """
        rows = len(self.expected)
        shuffled = np.lexsort((rng.random(rows), self.groups))  # groups one after another, random within
        edges = np.floor(np.cumsum(self.expected[shuffled]) + rng.random()).astype(np.int64)
        edges[-1] = self.total  # the sum of many floats may be a little off
        counts = np.diff(edges, prepend=0)
        copies = np.arange(self.total) - np.repeat(edges - counts, counts)
        return rng.permutation(np.repeat(shuffled, counts) + rows * copies)


def epoch_draws(rows: pa.Table, balance: str) -> Draws | None:
    """The expected draws of a training split's rows; None if an epoch has each row once.

    Args:
        rows: manifest rows, with ``WEIGHT`` if lists have weights.
        balance: ``data.balance``; with ``sampling``, every class that occurs has the same share of the draws.
    """
    weights = list_weights(rows)
    total = round(float(weights.sum()))
    if balance != "sampling":
        if np.all(weights == 1):
            return None
        _, groups = np.unique(weights, return_inverse=True)
        return Draws(weights * (total / weights.sum()), groups)
    _, classes = np.unique(rows["label"].to_numpy(), return_inverse=True)
    of_class = np.bincount(classes, weights)
    return Draws(weights * (total / len(of_class) / of_class)[classes], classes)


def epoch_length(rows: pa.Table, balance: str) -> int:
    """Number of videos that an epoch draws from a training split's rows."""
    draws = epoch_draws(rows, balance)
    return draws.total if draws else len(rows)


def class_weights(rows: pa.Table, num_classes: int) -> NDArray[np.float64]:
    """Weights of the classes' losses with which every class counts the same in an epoch, float64 ``[num_classes]``.

    The weight of a class is the mean number of draws of a class over its own. So the mean weight of a draw is 1.
    Classes that do not occur have weight 1.
    """
    draws = np.bincount(rows["label"].to_numpy(), list_weights(rows), num_classes)
    present = draws > 0
    return np.where(present, draws.sum() / present.sum() / np.where(present, draws, 1.0), 1.0)


def list_weights(rows: pa.Table) -> NDArray[np.float64]:
    """The weight of each row's list, float64 ``[rows]``."""
    return rows[WEIGHT].to_numpy() if WEIGHT in rows.column_names else np.ones(len(rows))
