"""What a study shows: its trials and its Pareto front as tables, text and figures, by file name."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.studies import pareto_plots
from pipelines.studies.logged_study import LoggedStudy
from pipelines.studies.pareto import (
    comparable_trials,
    dimension_importance,
    hypervolume_curve,
    largest_cost,
    pareto_front,
    published_variant_costs,
    top1_over_seeds,
)
from pipelines.studies.study import Trial, TrialState
from pipelines.tracking.mlflow_client import shorten
from pipelines.tracking.uris import SEARCH_PARAM
from posmlp.config import Config
from posmlp.metrics import COST, COSTS, VAL_TOP1
from tune_spaces import Member

# Block types in the names of trials' runs; others are as they are
BLOCK_LETTERS = {"parallel": "P", "cascade_ts": "TS", "cascade_st": "ST", "joint": "J", "spatial": "S"}
MAX_TRIAL_NAME = 120  # characters of the name of a trial's MLflow run


def trial_rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """One row per trial: how it ended, its member, its top-1 over the seeds, its costs, and the fronts it is on."""
    fronts = {name: {trial.number for trial in pareto_front(trials, name)} for name in COSTS}
    rows = []
    for trial in trials:
        row: dict[str, Any] = {"trial": trial.number, "state": trial.state, "reason": trial.reason, "seed": trial.seed}
        row["repeats"] = "" if trial.repeat_of is None else trial.repeat_of
        row |= {f"{SEARCH_PARAM}{name}": value for name, value in trial.member.items()}
        if VAL_TOP1 in trial.metrics:
            mean, deviation, seeds = top1_over_seeds(trial, trials)
            row |= {"top1": trial.metrics[VAL_TOP1], "top1_mean": mean, "top1_std": deviation, "seeds": seeds}
        row |= {name: value for name, value in trial.metrics.items() if name.startswith(COST)}
        row |= {f"front_{name}": int(trial.number in numbers) for name, numbers in fronts.items()}
        rows.append(row)
    return rows


def to_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as CSV, with a column for every key that any row has."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def describe_study(name: str, trials: Sequence[Trial], against: str, reference: float | None = None) -> str:
    """Describe a study and its Pareto front as text.

    Args:
        against: the cost, a name in ``COSTS``.
        reference: the reference cost of the hypervolume, see ``hypervolume_curve``.
    """
    order = (TrialState.FINISHED, TrialState.STOPPED, TrialState.FAILED, TrialState.OVER_BUDGET, TrialState.RUNNING)
    counts = [(state, sum(t.state == state for t in trials)) for state in order]
    volumes = hypervolume_curve(trials, against, reference)
    head = f"{name}: {', '.join(f'{count} {state}' for state, count in counts if count) or 'no trials'}"
    if not volumes:
        return head
    lines = [f"{head}; hypervolume {volumes[-1]:.3f} (top-1 against {against})", ""]
    lines.append(f"{'trial':>7}{'top-1':>8}{'over seeds':>18}{'ms':>9}{'GMACs':>10}{'M params':>10}  member")
    for trial in pareto_front(trials, against):
        mean, deviation, seeds = top1_over_seeds(trial, trials)
        spread = "" if deviation is None else f"{mean:.1%} ± {100 * deviation:.1f} ({seeds})"
        costs = [trial.metrics.get(COSTS[key]) for key in ("latency", "gmacs", "params")]
        shown = ["" if cost is None else f"{cost:.4g}" for cost in costs]
        numbers = f"{shown[0]:>9}{shown[1]:>10}{shown[2]:>10}"
        lines.append(
            f"{trial.number:>7}{trial.metrics[VAL_TOP1]:>8.1%}{spread:>18}{numbers}  {describe_member(trial.member)}"
        )
    return "\n".join(lines)


def describe_member(member: Member) -> str:
    """A member in words, the values of all stages together: ``block parallel,joint,joint,joint; width 1.5``."""
    groups: dict[str, list[str]] = {}
    for name, value in member.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        groups.setdefault(name.rstrip("0123456789"), []).append(text)
    return "; ".join(f"{name} {','.join(values)}" for name, values in groups.items())


def trial_name(trial: Trial) -> str:
    """The name of a trial's MLflow run, with its member in short: ``trial-007 joint; width 1.5``.

    A value that all stages have is once; block types that differ are abbreviated (``BLOCK_LETTERS``).
    """
    parts = []
    for part in describe_member(trial.member).split("; "):
        name, _, text = part.partition(" ")
        values = text.split(",")
        if len(set(values)) == 1:
            text = values[0]
        elif name == "block":
            text = ",".join(BLOCK_LETTERS.get(value, value) for value in values)
        parts.append(text if name == "block" else f"{name} {text}")
    if trial.repeat_of is not None:
        parts.append(f"seed {trial.seed}")
    return shorten(f"trial-{trial.number:03d} {'; '.join(parts)}", MAX_TRIAL_NAME)


def pareto_files(
    studies: Mapping[str, Sequence[Trial]],
    base: Config,
    against: str,
    latencies: Mapping[str, float] | None = None,
    importance: bool = True,
) -> dict[str, bytes]:
    """The figures and tables of studies by file name; all studies are in the same figure.

    Args:
        base: recipe of the studies, for the published variants and the block types that are not searched.
        against: the cost, a name in ``COSTS``.
        latencies: as for ``published_variant_costs``.
        importance: show how much each dimension matters, which takes longer than all else.
    """
    variants, blocks = published_variant_costs(base, latencies or {}), base.model.blocks or "parallel"
    points = {
        name: [trial_point(t, trials, blocks) for t in comparable_trials(trials, "gmacs")]
        for name, trials in studies.items()
    }
    fronts = {
        name: {cost: [t.number for t in pareto_front(trials, cost)] for cost in COSTS}
        for name, trials in studies.items()
    }
    files = {
        "front.html": pareto_plots.interactive_page(points, fronts, variants),
        "front.png": pareto_plots.front_image(points, fronts, variants),
    }
    for name, trials in studies.items():
        prefix = f"{name}-" if len(studies) > 1 else ""
        files[f"{prefix}trials.csv"] = to_csv(trial_rows(trials))
        metrics = {"top-1": VAL_TOP1, against: COSTS[against]} if importance else {}
        shares = {label: dimension_importance(trials, metric) for label, metric in metrics.items()}
        volumes = hypervolume_curve(trials, against)
        files[f"{prefix}progress.png"] = pareto_plots.search_progress(volumes, shares, against)
    return files


def trial_point(trial: Trial, trials: Sequence[Trial], blocks: str | Sequence[str]) -> pareto_plots.TrialPoint:
    """A trial as it is drawn.

    Args:
        blocks: the block types if the study does not search them.
    """
    searched = tuple(str(v) for k, v in sorted(trial.member.items()) if re.fullmatch(r"block\d*", k))
    mean, deviation, seeds = top1_over_seeds(trial, trials)
    return pareto_plots.TrialPoint(
        number=trial.number,
        top1=trial.metrics[VAL_TOP1],
        mean=mean,
        deviation=deviation,
        seeds=seeds,
        costs={name: trial.metrics.get(metric, math.nan) for name, metric in COSTS.items()},
        blocks=searched or ((blocks,) if isinstance(blocks, str) else tuple(blocks)),
        label=describe_member(trial.member),
    )


def write_studies(studies: Sequence[LoggedStudy], against: str, out: Path) -> str:
    """Write the figures, tables and recipes of studies into a folder; returns a description of the studies."""
    out.mkdir(parents=True, exist_ok=True)
    trials_by_study = {logged.study.name: logged.trials for logged in studies}
    first = studies[0]
    files = pareto_files(trials_by_study, first.study.recipe, against, first.variant_latencies)
    for name, content in files.items():
        (out / name).write_bytes(content)
    for logged in studies:
        folder = out / "recipes"
        folder.mkdir(exist_ok=True)
        for number, text in logged.recipes.items():
            (folder / f"{logged.study.name}-trial-{number:03d}.yaml").write_text(text)
    # One reference for all studies, so that their hypervolumes can be compared.
    reference = max(largest_cost(trials, against) for trials in trials_by_study.values())
    return "\n\n".join(describe_study(name, trials, against, reference) for name, trials in trials_by_study.items())
