"""Simulate searches with and without early stopping (MO-ASHA), with made-up learning curves whose truth is known.

    python benchmarks/early_stopping.py
    python benchmarks/early_stopping.py --epochs 10 --noise 0.05

A search has some members with random costs. The true top-1 of a member in the end grows with its cost and has a random
part. It is approached from chance level, by expensive members more slowly, and validation adds noise. The workers train
some members at a time; as in a study, a stopped member that is promotable comes before a new one.

The table has, over all searches: the epochs that were trained, as a share of training all members to the end; how many
members were trained to the end; the mean hypervolume of their front in true top-1, as a share of that of all members;
the share of the true front's members that were trained to the end; and how often a stopped member was promoted.
"whole" trains all members; "fewer" trains whole members until it has spent as many epochs as MO-ASHA; "top-1 alone" is
ASHA, which ignores the cost. Needs no Ray and takes about 10 s.
"""

from __future__ import annotations

import argparse
import heapq
from dataclasses import dataclass

import numpy as np

from pipelines.studies.pareto import hypervolume
from pipelines.tuning.mo_asha import SuccessiveHalving, non_dominated_ranks

CHANCE = 0.1  # top-1 before the first epoch


@dataclass
class Members:
    """Members of a made-up space.

    Attributes:
        cost: ``float [members]``, 0 to 1.
        top1: ``float [members]``, the true value at the end.
        seen: ``float [members, epochs]``, top-1 as validated after each epoch.
    """

    cost: np.ndarray
    top1: np.ndarray
    seen: np.ndarray


def make_members(count: int, epochs: int, noise: float, seed: int) -> Members:
    """Make members up.

    Args:
        noise: standard deviation of a validation, around the learning curve.
    """
    rng = np.random.default_rng(seed)
    cost = rng.uniform(0.05, 1, count)
    top1 = 0.4 + 0.4 * cost**0.5 + rng.normal(0, 0.08, count)
    half_way = epochs * (0.05 + 0.15 * cost) * rng.uniform(0.7, 1.4, count)  # epochs to half of the way
    progress = 1 - 0.5 ** (np.arange(1, epochs + 1) / half_way[:, None])
    curve = CHANCE + (top1[:, None] - CHANCE) * progress / progress[:, -1:]
    return Members(cost, top1, curve + rng.normal(0, noise, curve.shape))


def search(members: Members, halving: SuccessiveHalving, with_cost: bool, workers: int) -> tuple[set[int], int, int]:
    """Train members with early stopping, as a study does.

    Args:
        with_cost: whether the rungs see the cost, too.
        workers: number of members that are trained at a time.

    Returns:
        The members that were trained to the end, the epochs that were trained, and the number of promotions.
    """
    count, epochs = members.seen.shape
    done = np.zeros(count, dtype=int)  # epochs of each member
    finished: set[int] = set()
    stopped: set[int] = set()
    following, promotions, trained = 0, 0, 0
    running: list[tuple[float, int]] = []  # heap: when a member ends its next epoch, and the member
    now = 0.0
    while True:
        while len(running) < workers:
            if promoted := halving.promotable(sorted(stopped)):
                number = promoted[0]
                stopped.remove(number)
                promotions += 1
            elif following < count:
                number, following = following, following + 1
            else:
                break
            heapq.heappush(running, (now + 1 + members.cost[number], number))
        if not running:
            return finished, trained, promotions
        now, number = heapq.heappop(running)
        done[number] += 1
        trained += 1
        values = [members.seen[number, done[number] - 1], *([members.cost[number]] if with_cost else [])]
        if done[number] == epochs:
            finished.add(number)
        elif halving.add(number, int(done[number]), values) and not halving.may_continue(number):
            stopped.add(number)
        else:  # an expensive member's epoch takes longer
            heapq.heappush(running, (now + 1 + members.cost[number], number))


def front_share(members: Members, finished: set[int]) -> tuple[float, float]:
    """Hypervolume of the finished members, and how many members of the true front are finished, both as shares."""

    def volume(numbers: list[int]) -> float:
        return hypervolume([(members.top1[i], members.cost[i]) for i in numbers], reference=1.0)

    everyone = list(range(len(members.cost)))
    front = np.flatnonzero(non_dominated_ranks(np.stack([members.top1, -members.cost], axis=1)) == 0)
    return volume(sorted(finished)) / volume(everyone), float(np.mean([number in finished for number in front]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=48, help="of a search (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=27, help="of a member (default: %(default)s)")
    parser.add_argument("--noise", type=float, default=0.03, help="deviation of a validation (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="members trained at a time (default: %(default)s)")
    parser.add_argument("--searches", type=int, default=100, help="number of searches, seeds 0, 1, ...; %(default)s")
    args = parser.parse_args()
    rows: dict[str, list[tuple[float, ...]]] = {"whole": [], "MO-ASHA": [], "fewer": [], "top-1 alone": []}
    whole = args.members * args.epochs
    for seed in range(args.searches):
        members = make_members(args.members, args.epochs, args.noise, seed)
        rows["whole"].append((1.0, args.members, *front_share(members, set(range(args.members))), 0))
        for name, modes in (("MO-ASHA", ["max", "min"]), ("top-1 alone", ["max"])):
            halving = SuccessiveHalving(modes, args.epochs)
            finished, trained, promotions = search(members, halving, len(modes) == 2, args.workers)
            rows[name].append((trained / whole, len(finished), *front_share(members, finished), promotions))
        fewer = round(rows["MO-ASHA"][-1][0] * args.members)
        rows["fewer"].append((fewer / args.members, fewer, *front_share(members, set(range(fewer))), 0))
    print(f"{args.searches} searches of {args.members} members, {args.epochs} epochs, noise {args.noise:g}")
    print(f"{'':<12} {'epochs':>8} {'finished':>9} {'hypervolume':>12} {'of the front':>13} {'promotions':>11}")
    for name, values in rows.items():
        share, finished, volume, front, promotions = np.mean(values, axis=0)
        print(f"{name:<12} {share:>8.0%} {finished:>9.1f} {volume:>12.1%} {front:>13.0%} {promotions:>11.1f}")


if __name__ == "__main__":
    main()
