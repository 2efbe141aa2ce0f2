"""Replay the searchers and early stopping of ``posmlp tune`` on a tabular benchmark, without training and without Ray.

    python benchmarks/searchers.py
    python benchmarks/searchers.py benchmarks/reference.parquet --searches 200 --trials 48 --prior members.csv

A search has the table's members and one of their seeds each, drawn at random; the same for all searchers. It ends when
it has spent the epochs of ``--trials`` whole trials, or has seen all members. It trains one trial at a time, as the
study does with ``--against gmacs --concurrent 1``: the same searcher, told the same of each trial, and with early
stopping the same rungs and promotions. TPE scores the members that it has not seen and takes the best one; NSGA-II
takes the unseen member that differs from its child in the fewest dimensions. An epoch counts when it is trained, and
only once: a promoted trial continues.

What a search has found is the Pareto front, and the best, of its finished trials by the seed that it saw. They are
judged by the truth, the members' mean over all seeds after the last epoch: the hypervolume of these members' truth, as
a share of that of the table's true front, and by how much the best one's truth is below the table's best (regret).

The figure has the mean over searches and half of them around it, against epochs spent. A search that has seen all
members keeps its last value. "to random's" are the epochs after which the mean hypervolume is that of random search
without early stopping at its end. ``--prior`` gives TPE and NSGA-II a score of each member, such as its accuracy with a
supernet's weights: the ``members.csv`` of ``posmlp supernet``, told as ``posmlp tune --prior`` tells an earlier study.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial
from table import OUT, Table, read_scores, read_table

from pipelines.commands.options import positive
from pipelines.studies.pareto import hypervolume
from pipelines.studies.pareto_plots import FRONT_COLOURS
from pipelines.studies.study import Study, Trial, TrialState
from pipelines.tracking.plots import to_png
from pipelines.tuning.controller import successive_halving
from pipelines.tuning.samplers import tell_complete
from pipelines.tuning.search import Check, Searcher, member_key, scale_of, standardise
from posmlp.config import load_recipe
from posmlp.errors import UserError
from posmlp.metrics import COST_GMACS, EPOCH, VAL_TOP1
from tune_spaces import Space

FIGURE = Path(__file__).parents[1] / "docs" / "searchers.png"
NAMES = {"random": "random", "tpe": "TPE", "nsga2": "NSGA-II"}
COLOURS = {"random": FRONT_COLOURS[0], "TPE": FRONT_COLOURS[1], "NSGA-II": FRONT_COLOURS[2]}
COLOURS |= {"TPE, prior": FRONT_COLOURS[3], "NSGA-II, prior": "#e07b1a"}
BAND = (25, 75)  # percentiles over searches


@dataclass(frozen=True)
class Search:
    """What a search has found, after each of its finished trials.

    Attributes:
        spent: epochs trained so far, of all trials: int64 ``[finished]``.
        volume: hypervolume, 1: that of the table's true front: float64 ``[finished]``.
        regret: of the best member, as a share of all videos: float64 ``[finished]``.
        epochs: trained in all.
    """

    spent: np.ndarray
    volume: np.ndarray
    regret: np.ndarray
    epochs: int


class Replay:
    """Searches on a table.

    Attributes:
        truth: top-1 of each member after the last epoch, the mean over its seeds: float64 ``[members]``.
    """

    def __init__(self, table: Table, trials: int, prior: np.ndarray | None = None):
        """
        Args:
            trials: a search may spend the epochs of this number of whole trials.
            prior: a score of each member, higher is better: float64 ``[members]``.
        """
        self.table, self.prior = table, prior
        self.truth = table.top1[:, :, -1].mean(axis=1)
        self.budget = trials * table.top1.shape[2]
        names = table.members[0].keys()
        values = {name: tuple(sorted({member[name] for member in table.members}, key=order)) for name in names}
        self.space = Space(values, lambda member: {}, tuple(table.members))
        self.numbers = {member_key(member): number for number, member in enumerate(table.members)}
        # Of the recipe, a search sees the task, the epochs, the warm-up and the seed alone.
        recipe = load_recipe("reference", [f"train.epochs={table.top1.shape[2]}"])
        self.study = Study(name="replay", recipe=recipe, space="table", trials=len(self.truth), against="gmacs")
        self.true_volume = self.volume_of(range(len(self.truth)), self.truth)

    def searcher(self, kind: str, asha: bool, with_prior: bool, seed: int) -> Searcher:
        """A new searcher of the project's own."""
        study = self.study.model_copy(update={"searcher": kind, "asha": asha, "seed": seed})
        searcher = Searcher(study, self.space)
        searcher.checks = {key: Check({}) for key in self.numbers}  # all members of a table could be built
        if with_prior and self.prior is not None:
            searcher.prior = {"prior": self.tell_prior(searcher, self.prior)}
        return searcher

    def tell_prior(self, searcher: Searcher, scores: np.ndarray) -> list[FrozenTrial]:
        """The members with their scores as a sampler sees them: as an earlier study, with the costs of the table."""
        values = [list(each) for each in zip(scores.tolist(), self.table.gmacs.tolist(), strict=True)]
        scale, sampler = scale_of(searcher.study, values), searcher.sampler
        return [
            tell_complete(member, standardise(each, scale), {}, sampler.distributions, sampler.first_attrs())
            for member, each in zip(self.table.members, values, strict=True)
        ]

    def run(self, searcher: Searcher) -> Search:
        """Run a search, as a study with ``--concurrent 1`` would; its seed also draws the seed of each member."""
        study, table = searcher.study, self.table
        members, seeds, epochs = table.top1.shape
        curves = table.top1[np.arange(members), np.random.default_rng(study.seed).integers(seeds, size=members)]
        halving = successive_halving(study, []) if study.asha else None
        trials: list[Trial] = []
        trained: dict[int, int] = {}  # epochs, by number of the trial
        finished: list[int] = []  # members
        spent: list[int] = []
        while sum(trained.values()) < self.budget:
            stopped = [trial.number for trial in trials if trial.state == TrialState.STOPPED]
            if halving and (promoted := halving.promotable(stopped)):
                number = promoted[0]
            elif proposed := searcher.propose(trials):
                number = proposed.number
                trials.append(proposed)
            else:
                break
            member = self.numbers[member_key(trials[number].member)]
            state, gmacs, epoch = TrialState.FINISHED, float(table.gmacs[member]), trained.get(number, 0)
            while epoch < epochs and state == TrialState.FINISHED:
                epoch += 1
                if halving and epoch < epochs and halving.add(number, epoch, [curves[member, epoch - 1], gmacs]):
                    state = TrialState.FINISHED if halving.may_continue(number) else TrialState.STOPPED
            trained[number] = epoch
            metrics = {EPOCH: float(epoch), VAL_TOP1: float(curves[member, epoch - 1]), COST_GMACS: gmacs}
            trials[number] = replace(trials[number], state=state, metrics=metrics)
            if state == TrialState.FINISHED:
                finished.append(member)
                spent.append(sum(trained.values()))
        found = [self.judge(finished[: count + 1], curves[:, -1]) for count in range(len(finished))]
        volume, regret = np.array(found).T
        return Search(np.array(spent), volume, regret, sum(trained.values()))

    def judge(self, finished: Sequence[int], seen: np.ndarray) -> tuple[float, float]:
        """The hypervolume and the regret of what a search would choose.

        Args:
            finished: members that it has trained to the end.
            seen: their top-1 as it has seen it, float64 ``[members]``.
        """
        best = max(finished, key=lambda member: (seen[member], -self.table.gmacs[member]))
        return self.volume_of(finished, seen) / self.true_volume, float(self.truth.max() - self.truth[best])

    def volume_of(self, members: Sequence[int], seen: np.ndarray) -> float:
        """The hypervolume of the truth of those members that are on the front as seen."""
        gmacs = self.table.gmacs
        front: list[int] = []
        for member in sorted(members, key=lambda member: (gmacs[member], -seen[member])):
            if not front or seen[member] > seen[front[-1]]:
                front.append(member)
        return hypervolume([(float(self.truth[m]), float(gmacs[m])) for m in front], float(gmacs.max()))


def order(value: object) -> tuple[bool, object]:
    """Sorts numbers by their size, before words."""
    return isinstance(value, str), value


def sample(searches: Sequence[Search], what: str, epochs: int, last: int) -> np.ndarray:
    """A value of searches after each number of epochs spent: float64 ``[searches, last - epochs + 1]``.

    Args:
        what: ``volume`` or ``regret``.
        epochs: of a trial: the first number, because the first trial is never stopped.
        last: the last number.
    """
    spent = np.arange(epochs, last + 1)
    return np.stack([getattr(s, what)[np.searchsorted(s.spent, spent, side="right") - 1] for s in searches])


def epochs_to(target: float, volume: np.ndarray, epochs: int) -> int | None:
    """The epochs after which the mean over searches first reaches a hypervolume; None: never.

    Args:
        volume, epochs: as ``sample`` returns and takes them.
    """
    reached = np.flatnonzero(volume.mean(axis=0) >= target - 1e-12)
    return epochs + int(reached[0]) if reached.size else None


def draw(found: Mapping[tuple[str, bool], Sequence[Search]], epochs: int, last: int) -> bytes:
    """Draw hypervolume and regret of searches against epochs spent, as PNG.

    Args:
        found: by the searcher's name, and whether it stops early.
        epochs, last: as of ``sample``.
    """
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, 2)
    labels = {"volume": "hypervolume, share of the table's true front", "regret": "regret, points of top-1"}
    for axes, (what, label) in zip(panels, labels.items(), strict=True):
        for (name, asha), searches in found.items():
            values = sample(searches, what, epochs, last) * (100 if what == "regret" else 1)
            style = {"color": COLOURS[name], "linestyle": "-" if asha else "--"}
            spent = np.arange(epochs, last + 1)
            axes.plot(spent, values.mean(axis=0), label=name + ", early stopping" * asha, linewidth=1.4, **style)
            axes.fill_between(
                spent, *np.percentile(values, BAND, axis=0), color=style["color"], alpha=0.06, linewidth=0
            )
        axes.set_xlabel("epochs spent")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
    panels[0].legend(fontsize=8)
    return to_png(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", type=Path, default=OUT, help="of table.py (default: %(default)s)")
    parser.add_argument(
        "--searches", type=positive, default=200, help="of each kind, seeds 0, 1, ... (default: %(default)s)"
    )
    parser.add_argument("--trials", type=positive, default=48, help="whole trials of a search (default: %(default)s)")
    parser.add_argument("--prior", type=Path, help="members.csv of a supernet that has scored the table's members")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="(default: %(default)s)")
    args = parser.parse_args()
    start = time.perf_counter()
    try:
        table = read_table(args.table)
        prior = read_scores(args.prior, table) if args.prior else None
    except UserError as error:
        raise SystemExit(str(error)) from error
    replay, epochs = Replay(table, args.trials, prior), table.top1.shape[2]
    found: dict[tuple[str, bool], list[Search]] = {}
    for kind, title in NAMES.items():
        for with_prior in (False, True) if prior is not None and kind != "random" else (False,):
            for asha in (False, True):
                name = title + ", prior" * with_prior
                found[name, asha] = [
                    replay.run(replay.searcher(kind, asha, with_prior, seed)) for seed in range(args.searches)
                ]
    last = min(args.trials, len(table.members)) * epochs
    target = sample(found["random", False], "volume", epochs, last)[:, -1].mean()
    print(f"{args.searches} searches of {last} epochs, {len(table.members)} members, {epochs} epochs\n")
    third = last // 3
    columns = [f"hypervolume after {third}", "at the end", "regret, points", "to random's", "of its epochs"]
    print(f"| searcher | early stopping | epochs | finished | {' | '.join(columns)} |\n{'|---' * 9}|")
    for (name, asha), searches in found.items():
        volume = sample(searches, "volume", epochs, last)
        regret = 100 * sample(searches, "regret", epochs, last)[:, -1].mean()
        reached = epochs_to(target, volume, epochs)
        shown = ["never", ""] if reached is None else [str(reached), f"{reached / last:.0%}"]
        means = [np.mean([each.epochs for each in searches]), np.mean([len(each.spent) for each in searches])]
        volumes = [f"{volume[:, at].mean():.1%}" for at in (max(0, third - epochs), -1)]
        values = [f"{means[0]:.0f}", f"{means[1]:.1f}", *volumes, f"{regret:.2f}", *shown]
        print(f"| {name} | {'yes' if asha else 'no'} | {' | '.join(values)} |")
    args.figure.write_bytes(draw(found, epochs, last))
    print(f"\n{args.figure}; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
