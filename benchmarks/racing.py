"""Fresh seeds by racing against N seeds for each member of the first seeds' front: how many, and how good is the front?

Simulated studies with known true values: members' true top-1 rises with cost and scatters around that curve, and each
seed adds normal noise. Run: python benchmarks/racing.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from pipelines.studies import pareto, racing
from pipelines.studies.study import Trial, TrialState
from posmlp.metrics import COSTS, VAL_TOP1


def simulated_study(rng: np.random.Generator, members: int, deviation: float) -> tuple[list[Trial], np.ndarray]:
    """The first trials of a study, and the members' true top-1.

    Args:
        deviation: of one seed, 0 to 1.
    """
    costs = np.sort(rng.uniform(1, 4, members))
    true = 0.55 + 0.06 * np.log2(costs) - np.abs(rng.normal(0, 0.06, members))
    return [trial(i, true[i] + rng.normal(0, deviation), costs[i]) for i in range(members)], true


def trial(number: int, top1: float, cost: float, repeat_of: int | None = None, seed: int = 0) -> Trial:
    """A finished trial."""
    metrics = {VAL_TOP1: float(top1)} | {name: float(cost) for name in COSTS.values()}
    return Trial(number, {}, seed, repeat_of=repeat_of, state=TrialState.FINISHED, metrics=metrics)


def race(
    trials: list[Trial], true: np.ndarray, deviation: float, repeats: int, rng: np.random.Generator
) -> list[Trial]:
    """The trials with the repeats of racing, one at a time."""
    while following := racing.next_repeat(trials, ["gmacs"], repeats):
        trials = [*trials, repeated(trials, following.first, following.seed, true, deviation, rng)]
    return trials


def repeat_front(
    trials: list[Trial], true: np.ndarray, deviation: float, repeats: int, rng: np.random.Generator
) -> list[Trial]:
    """The trials with ``repeats`` fresh seeds for each member of the first seeds' front."""
    for first in pareto.pareto_front(trials, "gmacs"):
        for seed in range(1, repeats + 1):
            trials = [*trials, repeated(trials, first, seed, true, deviation, rng)]
    return trials


def repeated(
    trials: Sequence[Trial], first: Trial, seed: int, true: np.ndarray, deviation: float, rng: np.random.Generator
) -> Trial:
    """A finished repeat of a member."""
    top1 = true[first.number] + rng.normal(0, deviation)
    return trial(len(trials), top1, first.metrics[COSTS["gmacs"]], first.number, seed)


def wrong_members(trials: Sequence[Trial], true: np.ndarray) -> tuple[int, int]:
    """Numbers of members that are on the reported front and not on the true one, and the other way round."""
    firsts = [t for t in trials if t.repeat_of is None]
    exact = [trial(t.number, true[t.number], t.metrics[COSTS["gmacs"]]) for t in firsts]
    found, right = ({t.number for t in pareto.pareto_front(each, "gmacs")} for each in (trials, exact))
    return len(found - right), len(right - found)


def loss(trials: Sequence[Trial], true: np.ndarray) -> float:
    """How much true hypervolume the reported front lacks, as a share of that of the true front."""
    firsts = [t for t in trials if t.repeat_of is None]
    points = {t.number: (float(true[t.number]), t.metrics[COSTS["gmacs"]]) for t in firsts}
    whole = pareto.hypervolume(list(points.values()), 4.0)
    return 1 - pareto.hypervolume([points[t.number] for t in pareto.pareto_front(trials, "gmacs")], 4.0) / whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=100, help="simulated studies for each row")
    parser.add_argument("--members", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"{'deviation':>10}{'':>16}{'seeds':>8}{'wrong on':>10}{'missing':>9}{'lost volume':>13}{'front bias':>12}")
    for deviation in (0.01, 0.05, 0.15):
        for name, method in (("first front x N", repeat_front), ("racing", race)):
            rng, rows = np.random.default_rng(0), []
            for _ in range(args.studies):
                trials, true = simulated_study(rng, args.members, deviation)
                done = method(trials, true, deviation, args.repeats, rng)
                reported = pareto.reported_values(done)
                bias = np.mean([reported[t.number] - true[t.number] for t in pareto.pareto_front(done, "gmacs")])
                rows.append((len(done) - len(trials), *wrong_members(done, true), loss(done, true), bias))
            seeds, wrong, missing, lost, bias = np.mean(rows, axis=0)
            print(f"{deviation:>10.0%}{name:>16}{seeds:>8.1f}{wrong:>10.2f}{missing:>9.2f}{lost:>13.2%}{bias:>12.2%}")


if __name__ == "__main__":
    main()
