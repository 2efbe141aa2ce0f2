"""The results of a study of folds: the predictions of all folds are pooled, and scored once per seed.

A metric of a single fold is no basis for a mean of F1: folds lack classes. So UF1 and UAR are only computed of pooled
predictions; of a fold alone there is its accuracy.
"""

from __future__ import annotations

import io
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from pipelines.runs.predictions import PREDICTIONS_FILE, SCORES, read_predictions
from pipelines.studies.report import to_csv
from pipelines.studies.study import FoldStudy, Trial, TrialState, trial_folder
from pipelines.tracking.plots import validation_files
from posmlp.learn.evaluation import ClassificationMetrics
from posmlp.metrics import ACCURACY, ACCURACY_SHUFFLED, FOLDS, FOLDS_FINISHED, FOLDS_MEAN_ACCURACY, UAR, UF1
from posmlp.text import quantity

ALL = "all"  # the scope of all videos
TITLES = {ACCURACY: "accuracy", UF1: "UF1", UAR: "UAR", ACCURACY_SHUFFLED: "shuffled"}
RESAMPLES, RESAMPLES_AT_A_TIME = 2000, 50
MIN_FOLDS = 10  # with fewer, resamples of folds say little
FOLDS_PRINTED = 30
NOT_SCORED_SHOWN = 10


def scores_of(counts: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Accuracy, UF1 and UAR as of the Facial Micro-Expressions Grand Challenge of 2019, each float64 ``[...]``.

    For class c with N videos, TP of them right, and FP other videos taken for it: F1 = 2 TP / (2 TP + FP + FN) with
    FN = N - TP, and recall = TP / N. UF1 and UAR are their means over the classes that have videos.

    Args:
        counts: ``[..., classes, classes]``, number of videos by true class (row) and predicted class (column).
    """
    right, of_class, predicted = np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1), counts.sum(-2)
    occurs = of_class > 0
    f1 = 2 * right / np.maximum(of_class + predicted, 1)
    recall = right / np.maximum(of_class, 1)
    return {
        ACCURACY: right.sum(-1) / of_class.sum(-1),
        UF1: (f1 * occurs).sum(-1) / occurs.sum(-1),
        UAR: recall.sum(-1) / occurs.sum(-1),
    }


@dataclass(frozen=True)
class Figure:
    """A figure with its uncertainty.

    Attributes:
        values: one for each seed.
        interval: 95 % interval of their mean over other choices of folds, by bootstrap; None: not computed.
    """

    values: tuple[float, ...]
    interval: tuple[float, float] | None = None

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.mean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds; None of a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        """As percentages: ``90.4 ± 2.2 [85.1, 94.0]``."""
        text = f"{100 * self.mean:.1f}" + ("" if self.deviation is None else f" ± {100 * self.deviation:.1f}")
        return text + (f" [{100 * self.interval[0]:.1f}, {100 * self.interval[1]:.1f}]" if self.interval else "")

    def to_json(self) -> dict[str, Any]:
        """The figure as plain data."""
        return {"mean": self.mean, "deviation": self.deviation, "interval": self.interval, "seeds": list(self.values)}


@dataclass(frozen=True)
class PooledResults:
    """The predictions of a study's finished trials, and what follows from them.

    Attributes:
        study: its settings.
        trials: all of its trials, ordered by number.
        predictions: one row for each held-out video and seed: ``sample_id``, ``fold``, ``seed``, ``dataset``, ``label``
            and ``scores`` (log-probabilities; null: not decoded), with ``scores_shuffled`` if the study has them.
        classes: the class names.
    """

    study: FoldStudy
    trials: Sequence[Trial]
    predictions: pa.Table
    classes: tuple[str, ...]

    @cached_property
    def seeds(self) -> list[int]:
        """The seeds with which every fold is finished: those that are scored."""
        done = {(trial.seed, trial.member["fold"]) for trial in self.trials if trial.state == TrialState.FINISHED}
        first = self.study.recipe.train.seed
        every = range(first, first + self.study.seeds)
        return [seed for seed in every if all((seed, fold) in done for fold in self.study.values)]

    @cached_property
    def unfinished(self) -> list[Trial]:
        """The trials that are not finished."""
        known = {trial.number: trial for trial in self.trials}
        every = [known.get(trial.number, trial) for trial in self.study.all_trials()]
        return [trial for trial in every if trial.state != TrialState.FINISHED]

    @cached_property
    def columns(self) -> dict[str, NDArray[Any]]:
        """``label``, ``seed``, ``fold``, ``dataset`` and each metric's ``predicted`` label (-1: not scored) by row."""
        found = {name: np.array(self.predictions[name].to_pylist()) for name in ("label", "seed", "fold", "dataset")}
        own = SCORES[self.study.recipe.data.frame_order]
        found[ACCURACY] = likeliest(self.predictions[own].to_pylist())
        if self.study.shuffled:
            found[ACCURACY_SHUFFLED] = likeliest(self.predictions[SCORES["shuffled"]].to_pylist())
        return found

    @cached_property
    def datasets(self) -> list[str]:
        """The data sets, if there are several."""
        names = sorted(set(self.columns["dataset"].tolist()))
        return names if len(names) > 1 else []

    def counts(self, seed: int, fold: str, dataset: str = ALL, metric: str = ACCURACY) -> NDArray[np.float64]:
        """Number of videos of a fold by true class (row) and predicted class (column), with the models of a seed."""
        found, number = self.columns, self.width
        chosen = (found["seed"] == seed) & (found["fold"] == fold) & (found[metric] >= 0)
        if dataset != ALL:
            chosen &= found["dataset"] == dataset
        pairs = found["label"][chosen] * number + found[metric][chosen]
        return np.bincount(pairs, minlength=number**2).reshape(number, number).astype(np.float64)

    @property
    def width(self) -> int:
        """Number of classes of the models."""
        return max(len(self.classes), self.study.recipe.model.num_classes or 0)

    @cached_property
    def pooled(self) -> dict[str, dict[str, Figure]]:
        """The figures by scope (all videos, then each data set) and metric; empty if no seed has all folds."""
        if not self.seeds:
            return {}
        return {scope: self.figures(scope) for scope in (ALL, *self.datasets)}

    def figures(self, scope: str) -> dict[str, Figure]:
        """The figures of a scope, by metric; empty if none of its videos is scored."""
        counts = np.array([[self.counts(seed, fold, scope) for fold in self.study.values] for seed in self.seeds])
        counts = counts[:, counts.sum((0, 2, 3)) > 0]  # the folds that have videos of the scope
        if not counts.size:
            return {}
        intervals = bootstrap(counts)
        values = scores_of(counts.sum(1))
        found = {name: Figure(tuple(map(float, values[name])), intervals.get(name)) for name in values}
        if self.study.shuffled:
            folds = [[self.counts(s, fold, scope, ACCURACY_SHUFFLED) for fold in self.study.values] for s in self.seeds]
            found[ACCURACY_SHUFFLED] = Figure(tuple(map(float, scores_of(np.array(folds).sum(1))[ACCURACY])))
        return found

    def videos(self, fold: str | None = None, scope: str = ALL) -> int:
        """Number of scored videos with the first seed that has them.

        Args:
            fold: None: of all folds, with a seed that has all of them if there is one.
        """
        found = self.columns
        chosen = found[ACCURACY] >= 0
        if fold is None and self.seeds:
            chosen &= np.isin(found["seed"], self.seeds)
        chosen &= (found["fold"] == fold) if fold is not None else True
        chosen &= (found["dataset"] == scope) if scope != ALL else True
        seeds = found["seed"][chosen]
        return int((seeds == seeds.min()).sum()) if len(seeds) else 0

    @cached_property
    def folds(self) -> dict[str, dict[str, Figure]]:
        """The accuracies of each fold over the seeds with which it is finished, by fold and metric."""
        metrics = [ACCURACY, *([ACCURACY_SHUFFLED] if self.study.shuffled else [])]
        found: dict[str, dict[str, Figure]] = {}
        for fold in self.study.values:
            done = [t.seed for t in self.trials if t.member["fold"] == fold and t.state == TrialState.FINISHED]
            if done:
                values = {name: tuple(self.accuracy(seed, fold, name) for seed in done) for name in metrics}
                found[fold] = {name: Figure(values[name]) for name in metrics}
        return found

    @cached_property
    def mean_of_folds(self) -> dict[str, Figure]:
        """The mean over folds of their accuracies, over the seeds with which all are finished, by metric."""
        metrics = [ACCURACY, *([ACCURACY_SHUFFLED] if self.study.shuffled else [])]
        if not self.seeds:
            return {}
        of_seed = lambda seed, name: [self.accuracy(seed, fold, name) for fold in self.study.values]  # noqa: E731
        return {name: Figure(tuple(statistics.mean(of_seed(seed, name)) for seed in self.seeds)) for name in metrics}

    def accuracy(self, seed: int, fold: str, metric: str = ACCURACY) -> float:
        """The accuracy of one fold with one seed."""
        return float(scores_of(self.counts(seed, fold, metric=metric))[ACCURACY])

    @cached_property
    def not_scored(self) -> list[str]:
        """The videos that could not be decoded: in no figure."""
        bad = self.columns[ACCURACY] < 0
        return list(dict.fromkeys(self.predictions.filter(pa.array(bad))["sample_id"].to_pylist()))

    # --- what is shown -------------------------------------------------------------------------------------------

    def tables(self) -> list[list[list[str]]]:
        """The tables of the pooled figures and of the folds: rows of cells, the first of which is the header."""
        tables = []
        if self.pooled:
            names = list(next(iter(self.pooled.values())))
            rows = [["pooled over folds", "videos", *(TITLES[name] for name in names)]]
            for scope, figures in self.pooled.items():
                rows.append([scope, str(self.videos(scope=scope)), *(str(figures.get(name, "-")) for name in names)])
            tables.append(rows)
        if self.folds:
            names = list(next(iter(self.folds.values())))
            rows = [[f"held out: {self.study.by}", "videos", *(TITLES[name] for name in names)]]
            for fold, figures in self.folds.items():
                rows.append([fold, str(self.videos(fold)), *(str(figures[name]) for name in names)])
            if self.mean_of_folds:
                rows.append(["mean of folds", "", *(str(self.mean_of_folds[name]) for name in names)])
            tables.append(rows)
        return tables

    def title(self) -> str:
        """What the study does, in one line."""
        study = self.study
        size = f"{study.describe()}, {len(self.classes)} classes"
        return f"{study.name}: {size}; models of the last epoch ({study.recipe.train.epochs})"

    def notes(self) -> list[str]:
        """What is to be known of the tables, in sentences."""
        lines = ["Percentages. Each video is predicted by the model that was trained without its fold."]
        if len(self.seeds) > 1:
            lines.append(f"±: standard deviation over {len(self.seeds)} seeds.")
        if any(figure.interval for figures in self.pooled.values() for figure in figures.values()):
            lines.append(f"[low, high]: 95 % interval of the mean over other choices of {self.study.by}, by bootstrap.")
        if self.study.shuffled:
            lines.append("shuffled: accuracy of the same models on clips whose frames are shuffled.")
        if self.not_scored:
            shown = ", ".join(self.not_scored[:NOT_SCORED_SHOWN])
            more = ", ..." if len(self.not_scored) > NOT_SCORED_SHOWN else ""
            lines.append(f"Not decoded, and in no figure: {quantity(len(self.not_scored), 'video')} ({shown}{more}).")
        for trial in self.unfinished:
            why = f": {trial.reason}" if trial.reason else ""
            lines.append(f"Not finished: fold {trial.member['fold']}, seed {trial.seed} ({trial.state}){why}")
        if self.unfinished:
            left_out = self.study.seeds - len(self.seeds)
            lines.append(
                f"Figures over all folds leave out {quantity(left_out, 'seed')} of {self.study.seeds}. "
                f"`posmlp folds --resume {self.study.folder}` trains what is missing."
            )
        return lines

    def describe(self) -> str:
        """The tables as text."""
        parts = [self.title()]
        for rows in self.tables():
            if len(rows) > FOLDS_PRINTED + 1:
                rows = [*rows[:FOLDS_PRINTED], [f"... {len(rows) - FOLDS_PRINTED - 1} more in folds.csv"], rows[-1]]
            widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
            lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)) for row in rows]
            parts.append("\n".join(f"  {line.rstrip()}" for line in lines))
        return "\n\n".join([*parts, "\n".join(f"  {line}" for line in self.notes())])

    def markdown(self) -> str:
        """The tables in Markdown."""
        parts = [self.title()]
        for header, *rows in self.tables():
            safe = [[cell.replace("|", r"\|") for cell in row] for row in (header, ["---"] * len(header), *rows)]
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in safe))
        return "\n\n".join([*parts, "\n".join(f"- {line}" for line in self.notes())]) + "\n"

    def metrics(self) -> dict[str, float]:
        """The metrics of the study's MLflow run (``posmlp.metrics.FOLDS``)."""
        figures = {FOLDS_MEAN_ACCURACY: self.mean_of_folds[ACCURACY]} if self.mean_of_folds else {}
        for scope, found in self.pooled.items():
            prefix = FOLDS if scope == ALL else f"{FOLDS}{re.sub(r'[^A-Za-z0-9_. -]', '_', scope)}/"
            figures |= {f"{prefix}{name}": figure for name, figure in found.items()}
        values = {FOLDS_FINISHED: float(sum(trial.state == TrialState.FINISHED for trial in self.trials))}
        for name, figure in figures.items():
            values[name] = figure.mean
            if figure.deviation is not None:
                values[f"{name}_deviation"] = figure.deviation
        return values

    def files(self) -> dict[str, bytes]:
        """The files of the study's folder, by name."""
        buffer = io.BytesIO()
        pq.write_table(self.predictions, buffer, compression="zstd")
        files = {
            PREDICTIONS_FILE: buffer.getvalue(),
            "folds.md": self.markdown().encode(),
            "folds.csv": to_csv(self.fold_rows()),
            "pooled.csv": to_csv(self.pooled_rows()),
            "folds.json": json.dumps(self.to_json(), indent=1).encode(),
        }
        if self.seeds:
            files |= validation_files(self.summary(), self.classes)
        return files

    def fold_rows(self) -> list[dict[str, Any]]:
        """A row for each trial."""
        rows = []
        for trial in self.trials:
            fold = str(trial.member["fold"])
            row: dict[str, Any] = {"trial": trial.number, "fold": fold, "seed": trial.seed}
            row |= {"state": trial.state, "reason": trial.reason}
            if trial.state == TrialState.FINISHED:
                row |= {"videos": int(self.counts(trial.seed, fold).sum())}
                row |= {name: self.accuracy(trial.seed, fold, name) for name in self.folds[fold]}
            rows.append(row)
        return rows

    def pooled_rows(self) -> list[dict[str, Any]]:
        """A row for each scope and seed."""
        return [
            {"videos_of": scope, "seed": seed, "videos": self.videos(scope=scope)}
            | {name: figure.values[i] for name, figure in figures.items()}
            for scope, figures in self.pooled.items()
            for i, seed in enumerate(self.seeds)
        ]

    def to_json(self) -> dict[str, Any]:
        """All figures as plain data."""

        def plain(groups: Mapping[str, Mapping[str, Figure]]) -> dict[str, Any]:
            return {key: {name: each.to_json() for name, each in figures.items()} for key, figures in groups.items()}

        return {
            "study": self.study.name,
            "by": self.study.by,
            "seeds": self.seeds,
            "pooled": plain(self.pooled),
            "folds": plain(self.folds),
            "mean_of_folds": plain({"": self.mean_of_folds})[""],
            "not_decoded": self.not_scored,
        }

    def summary(self) -> ClassificationMetrics:
        """The counts over all scored videos of all complete seeds, for the picture and the table of the classes."""
        own = SCORES[self.study.recipe.data.frame_order]
        chosen = (self.columns[ACCURACY] >= 0) & np.isin(self.columns["seed"], self.seeds)
        table = self.predictions.filter(pa.array(chosen))
        counts = ClassificationMetrics.empty(self.width)
        labels = torch.from_numpy(self.columns["label"][chosen].astype(np.int64))
        counts.add(torch.tensor(table[own].to_pylist()), labels, torch.ones(len(labels)))
        return counts


def pool(study: FoldStudy, trials: Sequence[Trial], dataset_of: Mapping[str, str]) -> PooledResults:
    """Read the predictions of a study's finished trials.

    Args:
        dataset_of: the data set of each video, by ``sample_id``; empty if its list names none.

    Raises:
        UserError: a trial's predictions cannot be read.
    """
    tables, classes = [], ()
    for trial in trials:
        if trial.state != TrialState.FINISHED:
            continue
        table = read_predictions(trial_folder(study, trial.number))
        classes = tuple(json.loads(table.schema.metadata[b"classes"]))
        ids = table["sample_id"].to_pylist()
        about = {
            "sample_id": table["sample_id"],
            "fold": pa.array([str(trial.member["fold"])] * len(ids)),
            "seed": pa.array([trial.seed] * len(ids), pa.int64()),
            "dataset": pa.array([dataset_of[each] for each in ids]),
        }
        tables.append(pa.table(about | {name: table[name] for name in table.column_names[1:]}))
    return PooledResults(study, trials, pa.concat_tables(tables) if tables else NOTHING, classes)


NOTHING = pa.table({name: [] for name in ("sample_id", "fold", "seed", "dataset", "label", *SCORES.values())})


def likeliest(scores: Sequence[Sequence[float] | None]) -> NDArray[np.int64]:
    """The label with the highest score of each row; -1 for None."""
    return np.array([-1 if row is None else int(np.argmax(row)) for row in scores], np.int64)


def bootstrap(counts: NDArray[np.float64]) -> dict[str, tuple[float, float]]:
    """95 % intervals of the means over seeds of ``scores_of``, by metric; empty if there are fewer than ``MIN_FOLDS``.

    Whole folds are resampled, because the videos of a subject are not independent. The seeds share a resample.

    Args:
        counts: ``[seeds, folds, classes, classes]``.
    """
    folds = counts.shape[1]
    if folds < MIN_FOLDS:
        return {}
    rng, means = np.random.default_rng(0), list[dict[str, NDArray[np.float64]]]()
    for _ in range(RESAMPLES // RESAMPLES_AT_A_TIME):
        times = rng.multinomial(folds, [1 / folds] * folds, RESAMPLES_AT_A_TIME).astype(np.float64)
        means.append({k: v.mean(1) for k, v in scores_of(np.einsum("rf,sfij->rsij", times, counts)).items()})
    found = {name: np.concatenate([each[name] for each in means]) for name in means[0]}
    return {name: (float(np.quantile(v, 0.025)), float(np.quantile(v, 0.975))) for name, v in found.items()}
