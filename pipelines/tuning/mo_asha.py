"""Early stopping for several objectives: multi-objective asynchronous successive halving (MO-ASHA) for Ray Tune.

MO-ASHA is from Schmucker et al. 2021, https://arxiv.org/abs/2106.12639. With one objective it is ASHA (Li et al. 2020,
https://arxiv.org/abs/1810.05934). The module needs only Ray Tune and NumPy: import it, or copy the file.

Use with any trainable of Ray Tune::

    from ray import tune
    from pipelines.tuning.mo_asha import MOASHAScheduler

    def train(config):
        for epoch in range(1, 28):
            accuracy = 1 - 1 / (1 + epoch * config["width"] * config["lr"])
            tune.report({"epoch": epoch, "accuracy": accuracy, "cost": config["width"] ** 2})

    scheduler = MOASHAScheduler({"accuracy": "max", "cost": "min"}, max_t=27, time_attr="epoch")
    tune_config = tune.TuneConfig(scheduler=scheduler, num_samples=12)
    space = {"width": tune.randint(1, 9), "lr": tune.uniform(0, 1)}
    results = tune.Tuner(train, param_space=space, tune_config=tune_config).fit()

Rungs lie at max_t / eta and max_t / eta^2, where eta is the reduction factor (``rung_times``). A trial reaches a rung
with its first result there, and is compared with all trials that have reached the rung before it, also with those that
have ended:

1. Trials are ordered by non-dominated rank. Rank 0 is the Pareto front of the rung, rank 1 the front of the rest, ...
2. Within a rank, an epsilon-net orders them: first the best one in the first objective, then again and again the one
   that is farthest from those before it. So the first few cover the whole front.
3. The first floor(n / eta) of n trials continue, and so do all of rank 0; the others are stopped.

That all of rank 0 continue differs from the paper: what no trial beats is never stopped. With one objective these are
the best trial and its equals.

A trial that was stopped may belong to the first floor(n / eta) later, when more trials have reached its rung.
``SuccessiveHalving.promotable`` names such trials. The scheduler does not restart them: who can resume a trial from a
checkpoint may start it again under the same key.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

Key = Any  # of a trial: hashable; keys can be ordered among each other


# --- the order of trials at a rung -------------------------------------------------------------------------------


def rung_times(max_t: float, reduction_factor: float = 3, count: int = 2, warmup: float = 0) -> list[int]:
    """The times of the rungs: ``max_t / reduction_factor**k`` for k = 1 to ``count``, rounded.

    Each is at least 1. Those beyond half of ``max_t`` are left out: there, a stop would save less than it has cost. So
    are those until the end of the warm-up, as results say little by then.

    Returns:
        The times, increasing, without doubles: 1 and 3 for ``max_t=10``; none for ``max_t=1``.
    """
    times = {max(1, round(max_t / reduction_factor**k)) for k in range(1, count + 1)}
    return sorted(t for t in times if warmup < t and 2 * t <= max_t)


def non_dominated_ranks(points: np.ndarray) -> np.ndarray:
    """Non-dominated rank of each point (Deb et al. 2002, NSGA-II, section III.A).

    A point dominates another if it is at least as large in all objectives and larger in one. Equal points have equal
    ranks.

    Args:
        points: ``float [n, objectives]``, finite; larger is better.

    Returns:
        ``int [n]``: 0 for points that none dominates, 1 for those that only points of rank 0 dominate, and so on.
    """
    at_least: np.ndarray = np.asarray((points[:, None] >= points[None]).all(axis=-1))
    dominates = at_least & ~at_least.T  # [i, j]: i dominates j
    dominators = dominates.sum(axis=0)  # of each point, among those without a rank
    ranks = np.zeros(len(points), dtype=int)
    rank = 0
    while (front := np.flatnonzero(dominators == 0)).size:
        ranks[front] = rank
        dominators -= dominates[front].sum(axis=0)
        dominators[front] = -1
        rank += 1
    return ranks


def epsilon_net(points: np.ndarray) -> list[int]:
    """Order points so that the first few cover all of them (Schmucker et al. 2021, section 3).

    The first is the best in the first objective (ties: the next objectives). Each further one is the point with the
    largest Euclidean distance to its nearest predecessor. Ties go to the lower index.

    Args:
        points: ``float [n, objectives]``, finite, of comparable scales; larger is better.

    Returns:
        The indices of the points in this order.
    """
    if not len(points):
        return []
    nearest = np.full(len(points), np.inf)  # distance to the nearest point in the order; -1 for those in it
    order = [max(range(len(points)), key=lambda i: (*points[i], -i))]
    while len(order) < len(points):
        last = order[-1]
        nearest = np.minimum(nearest, np.linalg.norm(points - points[last], axis=1))
        nearest[last] = -1
        order.append(int(nearest.argmax()))
    return order


def order_points(points: np.ndarray) -> tuple[list[int], int]:
    """Order points from best to worst: by non-dominated rank, within a rank by ``epsilon_net``.

    Distances are measured after each objective is scaled to its range over all points.

    Args:
        points: ``float [n, objectives]``; larger is better. Points with a value that is not finite come last.

    Returns:
        The indices of the points, and how many of them, the first ones, have rank 0.
    """
    finite = np.flatnonzero(np.isfinite(points).all(axis=1))
    halved = points[finite] / 2  # the difference of two floats may overflow; that of their halves does not
    low, high = (halved.min(axis=0), halved.max(axis=0)) if finite.size else (0.0, 0.0)
    scaled = (halved - low) / np.where(high > low, high - low, 1.0)
    ranks = non_dominated_ranks(points[finite])
    order: list[int] = []
    for rank in range(ranks.max(initial=-1) + 1):
        front = np.flatnonzero(ranks == rank)
        order += [int(finite[front[i]]) for i in epsilon_net(scaled[front])]
    rest = sorted(set(range(len(points))) - set(order))
    return order + rest, int((ranks == 0).sum())


class SuccessiveHalving:
    """The rungs, and which trials may continue beyond them. Pure Python and NumPy, without Ray.

    Decisions depend only on which trials have reached the rungs with which values, not on their order in time. So a
    search that resumes calls ``add`` with earlier results, and decides as if it had never stopped.

    Attributes:
        max_t: the time at which a trial ends.
        rungs: by time, increasing: the values of the trials that have reached the rung, by key; larger is better.
        continuing: by time of the rung: the keys of the trials that may continue, best first.
    """

    def __init__(
        self, modes: Sequence[str], max_t: float, reduction_factor: float = 3, count: int = 2, warmup: float = 0
    ):
        """
        Args:
            modes: ``"max"`` or ``"min"`` for each objective.
            max_t: the time at which a trial ends.
            reduction_factor: eta; about one in eta trials continues at a rung. At least 2.
            count: the largest number of rungs.
            warmup: no rung lies until then, such as until the learning rate's warm-up ends.

        Raises:
            ValueError: a value is out of its range.
        """
        if not modes or any(mode not in ("max", "min") for mode in modes):
            raise ValueError(f"modes are max or min, one for each objective, not {list(modes)}")
        if not reduction_factor >= 2 or not max_t > 0 or count < 0:
            raise ValueError(
                f"reduction_factor must be at least 2, max_t above 0, count at least 0, not {reduction_factor}, "
                f"{max_t}, {count}"
            )
        self.signs = np.array([1.0 if mode == "max" else -1.0 for mode in modes])
        self.max_t, self.reduction_factor = max_t, reduction_factor
        self.rungs: dict[int, dict[Key, np.ndarray]] = {
            t: {} for t in rung_times(max_t, reduction_factor, count, warmup)
        }
        self.continuing: dict[int, list[Key]] = {t: [] for t in self.rungs}

    def rung_at(self, t: float) -> int | None:
        """The rung for which a result at time ``t`` counts: the last one until then. None beyond half of ``max_t``."""
        return max((rung for rung in self.rungs if rung <= t and 2 * t <= self.max_t), default=None)

    def rung_of(self, key: Key) -> int | None:
        """The highest rung that a trial has reached; None if it has reached none."""
        return max((rung for rung, values in self.rungs.items() if key in values), default=None)

    def add(self, key: Key, t: float, values: Sequence[float]) -> bool:
        """Add a trial's result, if it is its first one at a rung. Results may be repeated, as after a resume.

        Args:
            values: one for each objective.

        Returns:
            Whether it is the first one at a rung, so that ``may_continue`` says what becomes of the trial.
        """
        rung, reached = self.rung_at(t), self.rung_of(key)
        if rung is None or (reached is not None and reached >= rung):
            return False
        members = self.rungs[rung]
        members[key] = self.signs * np.asarray(values, dtype=float)
        keys = sorted(members)  # ties do not depend on the order in time
        order, best = order_points(np.stack([members[each] for each in keys]))
        finite = [i for i in order if np.isfinite(members[keys[i]]).all()]
        count = max(best, math.floor(len(keys) / self.reduction_factor))
        self.continuing[rung] = [keys[i] for i in finite[:count]]
        return True

    def may_continue(self, key: Key) -> bool:
        """Whether a trial may continue beyond the highest rung that it has reached."""
        rung = self.rung_of(key)
        return rung is None or key in self.continuing[rung]

    def promotable(self, stopped: Iterable[Key]) -> list[Key]:
        """The stopped trials that may continue by now: highest rung first, within a rung the best first."""
        waiting = {key: self.rung_of(key) for key in stopped}
        rungs = sorted(self.continuing, reverse=True)
        return [key for rung in rungs for key in self.continuing[rung] if waiting.get(key) == rung]


# --- Ray Tune ----------------------------------------------------------------------------------------------------


class MOASHAScheduler(FIFOScheduler):
    """Ray Tune's scheduler for MO-ASHA: stops trials at rungs; see the module.

    A result counts if it has the time and all objectives. Metrics that are known from the start, such as costs, are
    part of each result. A trial whose objectives are not finite at a rung is stopped there.

    Results of an earlier search can be given to ``halving.add``. ``Tuner.restore`` does not restore schedulers.

    Attributes:
        halving: the rungs and the trials that have reached them.
    """

    def __init__(
        self,
        objectives: Mapping[str, str],
        max_t: float = 100,
        time_attr: str = "training_iteration",
        reduction_factor: float = 3,
        halving: SuccessiveHalving | None = None,
    ):
        """
        Args:
            objectives: ``"max"`` or ``"min"`` by the name of the metric. The order matters only for ``epsilon_net``.
            max_t: a trial ends at this time.
            time_attr: the metric that is the time, such as epochs.
            reduction_factor: as for ``SuccessiveHalving``.
            halving: rungs that have members already, in place of new ones of ``max_t`` and ``reduction_factor``.

        Raises:
            ValueError: a value is out of its range.
        """
        super().__init__()
        self.objectives, self.time_attr = dict(objectives), time_attr
        self.halving = halving or SuccessiveHalving([*objectives.values()], max_t, reduction_factor)
        self.stopped = 0

    def key(self, trial: Any) -> Hashable | None:
        """The key of a Tune trial at the rungs; None: the trial is never stopped. May be overridden."""
        return trial.trial_id

    def metrics(self, result: Mapping[str, Any]) -> Mapping[str, Any]:
        """The time and the objectives of a result. May be overridden."""
        return result

    def add(self, trial: Any, result: Mapping[str, Any]) -> bool:
        """Add a result to the rungs; returns whether it is the trial's first one at a rung."""
        key, metrics = self.key(trial), self.metrics(result)
        if key is None or not all(name in metrics for name in (self.time_attr, *self.objectives)):
            return False
        return self.halving.add(key, metrics[self.time_attr], [metrics[name] for name in self.objectives])

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if self.key(trial) is None:
            return TrialScheduler.CONTINUE
        if self.metrics(result).get(self.time_attr, 0) >= self.halving.max_t:
            return TrialScheduler.STOP
        if not self.add(trial, result) or self.halving.may_continue(self.key(trial)):
            return TrialScheduler.CONTINUE
        self.stopped += 1
        return TrialScheduler.STOP

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self.add(trial, result)

    def debug_string(self) -> str:
        rungs = ", ".join(f"{len(members)} at {t}" for t, members in self.halving.rungs.items())
        return f"MO-ASHA: {self.stopped} trials stopped; trials at rungs: {rungs or 'no rungs'}"
