"""What a study shows: its trials and its Pareto front as tables, text and figures, by file name."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from pipelines.studies import pareto_plots
from pipelines.studies.pareto import (
    Assessment,
    assess,
    best_trial,
    comparable_trials,
    dimension_importance,
    fresh_seeds,
    front_hypervolume,
    hypervolume_curve,
    pareto_front,
    reported_runs,
    reported_values,
)
from pipelines.studies.study import Study, Trial, TrialState
from pipelines.tracking.uris import SEARCH_PARAM
from posmlp.config import Config
from posmlp.metrics import (
    COST,
    COSTS,
    MAIN_METRICS,
    STUDY_FRESH,
    STUDY_FRESH_HIGH,
    STUDY_FRESH_LOW,
    STUDY_FRESH_SEEDS,
    STUDY_FRONT_PROBABILITY,
    MainMetric,
    main_metric,
)
from posmlp.text import quantity, shorten
from tune_spaces import Member

# Block types in the names of trials' runs; others are as they are
BLOCK_LETTERS = {"parallel": "P", "cascade_ts": "TS", "cascade_st": "ST", "joint": "J", "spatial": "S", "temporal": "T"}
MAX_TRIAL_NAME = 120  # characters of the name of a trial's MLflow run
SURE = 0.95  # from this share of the draws on, one member counts as more accurate than another
POSSIBLE = 0.1  # from this probability on, a member off the front is named
MAX_SENTENCES = 5  # about pairs of members


def trial_rows(trials: Sequence[Trial], assessment: Assessment | None = None) -> list[dict[str, Any]]:
    """One row per trial.

    Columns:
        trial, state, reason, seed: of the trial.
        repeats: the number of the member's first trial, if this is not it.
        search.DIMENSION: the member.
        top1 or map: the main metric (``MainMetric.name``) of this trial alone, 0 to 1.
        fresh_mean, fresh_low, fresh_high, fresh_seeds: for the first trial of a member with fresh seeds, the mean over
            these (without the first seed), its 95 % interval, and their number.
        cost/NAME: the costs, see ``posmlp.metrics``.
        front_COST: 1 if the member is on the reported front of the main metric and this cost, else 0.
        probability_COST: of being on that front; empty for a member without fresh seeds.

    Args:
        assessment: of these trials; None: without per-video results.
    """
    found = assessment or assess(trials)
    fronts = {name: {trial.number for trial in pareto_front(trials, name)} for name in COSTS}
    rows = []
    for trial in trials:
        row: dict[str, Any] = {"trial": trial.number, "state": trial.state, "reason": trial.reason, "seed": trial.seed}
        row["repeats"] = "" if trial.repeat_of is None else trial.repeat_of
        row |= {f"{SEARCH_PARAM}{name}": value for name, value in trial.member.items()}
        if main := main_metric(trial.metrics):
            row[main.name] = trial.value
        if found.repeated and trial.number in found.values:
            number = trial.number
            row |= {
                "fresh_mean": found.values[number],
                "fresh_low": found.low[number],
                "fresh_high": found.high[number],
            }
            row["fresh_seeds"] = len(found.runs[number])
        row |= {name: value for name, value in trial.metrics.items() if name.startswith(COST)}
        row |= {f"front_{name}": int(trial.number in numbers) for name, numbers in fronts.items()}
        for name, shares in found.probability.items():
            if trial.number in shares:
                row[f"probability_{name}"] = shares[trial.number]
        rows.append(row)
    return rows


def member_metrics(assessment: Assessment, main: MainMetric, against: str) -> dict[int, dict[str, float]]:
    """Metrics for the MLflow runs of members with fresh seeds, by the number of a member's first trial.

    Args:
        main: of the study.
        against: the cost of the front, a name in ``COSTS``.
    """
    if not assessment.repeated:
        return {}
    shares = assessment.probability[against]
    return {
        number: {
            f"{STUDY_FRESH}{main.name}": value,
            STUDY_FRESH_LOW: assessment.low[number],
            STUDY_FRESH_HIGH: assessment.high[number],
            STUDY_FRESH_SEEDS: float(len(assessment.runs[number])),
        }
        | ({STUDY_FRONT_PROBABILITY: shares[number]} if number in shares else {})
        for number, value in assessment.values.items()
    }


def to_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as CSV, with a column for every key that any row has."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def describe_study(
    name: str,
    trials: Sequence[Trial],
    main: MainMetric,
    against: str,
    reference: float | None = None,
    hits: Mapping[int, bytes] | None = None,
    inherited: bool = False,
    study: Study | None = None,
) -> str:
    """Describe a study and its Pareto front as text: a table, and what the seeds allow to say about it.

    Args:
        main: by which the trials are compared.
        against: the cost, a name in ``COSTS``.
        reference: the reference cost of the hypervolume, see ``hypervolume_curve``.
        hits: per-video results, as for ``assess``.
        inherited: the trials are members of a supernet, scored with its weights: none has a seed of its own.
        study: its settings, for what to do if repeats were asked for and none was trained.
    """
    order = (TrialState.FINISHED, TrialState.STOPPED, TrialState.FAILED, TrialState.OVER_BUDGET, TrialState.RUNNING)
    counts = [(state, sum(t.state == state for t in trials)) for state in order]
    volume = front_hypervolume(trials, against, reference)
    head = f"{name}: {', '.join(f'{count} {state}' for state, count in counts if count) or 'no trials'}"
    stopped = sum(trial.state == TrialState.STOPPED for trial in trials)
    advice = []
    if stopped and study is not None:
        what = "The trial that was" if stopped == 1 else f"The {stopped} trials that were"
        command = f"`{study.resume_command} --no-asha`"
        advice = ["", f"{what} stopped early cannot be compared; {command} trains all to the end."]
    if volume is None:
        return "\n".join([head, *advice])
    found, front = assess(trials, hits), pareto_front(trials, against)
    lines = [f"{head}; hypervolume {volume:.3f} ({main.title} against {against})", ""]
    columns = f"{main.title:>8}{'95 % interval':>17}{'seeds':>7}{'on front':>10}"
    lines.append(f"{'trial':>7}{columns}{'ms':>9}{'GMACs':>10}{'M params':>10}  member")
    shares = found.probability.get(against, {})
    for trial in front:
        number = trial.number
        interval = f"{100 * found.low[number]:.1f} to {100 * found.high[number]:.1f}" if number in found.low else ""
        share = f"{shares[number]:.0%}" if number in shares else ""
        share = "-" if share and len(found.values) == 1 else share  # nothing to compare it with
        value = f"{found.values[number]:>8.1%}{interval:>17}{len(found.runs[number]):>7}{share:>10}"
        costs = [trial.metrics.get(COSTS[key]) for key in ("latency", "gmacs", "params")]
        shown = ["" if cost is None else f"{cost:.4g}" for cost in costs]
        numbers = f"{shown[0]:>9}{shown[1]:>10}{shown[2]:>10}"
        lines.append(f"{number:>7}{value}{numbers}  {describe_member(trial.member)}")
    if not inherited:
        members = len(comparable_trials(trials, "gmacs"))
        lines += ["", *describe_certainty(found, [t.number for t in front], main, against, members, study)]
    lines += advice
    return "\n".join(lines)


def describe_best(trials: Sequence[Trial], main: MainMetric) -> str:
    """The best member and its reported value in words; empty if there is none."""
    best, runs = best_trial(trials), reported_runs(trials)
    if best is None:
        return ""
    count = len(runs[best.number])
    seeds = f"mean over {quantity(count, 'fresh seed')}" if fresh_seeds(trials) else "one seed, not repeated"
    return f"best: {trial_name(best)}, {main.key} {reported_values(trials)[best.number]:.1%} ({seeds})"


def describe_certainty(
    found: Assessment,
    front: Sequence[int],
    main: MainMetric,
    against: str,
    members: int,
    study: Study | None = None,
) -> list[str]:
    """What the seeds and videos allow to say about a front, in sentences.

    Args:
        front: numbers of its members' first trials, cheapest first.
        main: by which they are compared.
        against: its cost, a name in ``COSTS``.
        members: number of all members that are trained to the end.
        study: as for ``describe_study``.
    """
    if not found.repeated:
        intervals = ["The intervals are those of the validation videos alone."] if found.low else []
        return [
            "One seed each, not repeated: another seed may give another front.",
            *intervals,
            missing_repeats(study),
        ]
    lines = [f"Each {main.title} is the mean over fresh seeds; the seed that selected a member is not among them."]
    if len(found.values) < members:
        have = "has" if len(found.values) == 1 else "have"
        lines.append(f"{len(found.values)} of {members} members {have} fresh seeds; the others are not compared.")
    if found.deviation:
        spread, freedom = f"{100 * found.deviation.value:.1f} points", found.deviation.freedom
        source = quantity(freedom, "difference") + " between seeds"
        if freedom > sum(len(runs) - 1 for runs in found.runs.values()):  # fresh seeds alone are too few
            source += ", selecting seeds included"
        lines.append(
            f"The standard deviation of one seed is {spread} (from {source}); it is taken as equal for all members."
        )
    if not main.is_mean:
        lines.append(
            f"Intervals and shares are over seeds alone. {main.title} is no mean over {main.unit}: how much it would "
            f"differ with other {main.unit} is not known."
        )
    elif not found.paired:
        lines.append("Per-video results are missing, so members count as scored on independent videos.")
    if len(found.values) > 1:
        luck = f"{100 * found.luck_of_the_best():.1f} points"
        lines.append(
            f"The highest mean is the highest of {len(found.values)}: about {luck} of it are luck of that choice."
        )
    pairs = [(one, other, found.better(other, one)) for one, other in pairwise(front)]
    close = [(one, other, share) for one, other, share in pairs if share < SURE]
    for one, other, share in close[:MAX_SENTENCES]:
        pair = f"Trials {one} and {other} cannot be told apart"
        lines.append(f"{pair}: trial {other} is more accurate in {below_sure(share)} of resamples.")
    if len(close) > MAX_SENTENCES:
        lines.append(f"Nor can {len(close) - MAX_SENTENCES} other pairs of neighbours on the front.")
    if pairs and not close:
        lines.append(f"Each member is more accurate than the next cheaper one in at least {SURE:.0%} of resamples.")
    shares = found.probability.get(against, {})
    others = sorted((n for n, share in shares.items() if n not in front and share > POSSIBLE), key=lambda n: -shares[n])
    if others:
        names = ", ".join(f"trial {number} ({shares[number]:.0%})" for number in others)
        lines.append(f"Not on this front, but on it in the given share of resamples: {names}.")
    return lines


def missing_repeats(study: Study | None) -> str:
    """What to do about a front without fresh seeds, in a sentence."""
    if study is None or not study.repeats:
        return "--repeats N trains the members of the front with fresh seeds."
    hours = " --hours H" if study.hours else ""
    command = f"posmlp tune --resume {study.folder}{hours}"
    return f"No repeat was trained, although the study has --repeats {study.repeats}: `{command}` trains them."


def below_sure(share: float) -> str:
    """A share below ``SURE`` as a percentage that is below it as well: ``94.6%`` instead of ``95%``."""
    return f"{share:.0%}" if round(share, 2) < SURE else f"{math.floor(1000 * share + 1e-6) / 10:.1f}%"


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
    variants: pareto_plots.VariantCosts | None = None,
    importance: bool = True,
    hits: Mapping[str, Mapping[int, bytes]] | None = None,
    inherited: bool = False,
) -> dict[str, bytes]:
    """The figures and tables of studies by file name; all studies are in the same figure.

    Args:
        base: recipe of the studies, for their task, and the block types that are not searched.
        against: the cost, a name in ``COSTS``.
        variants: costs of published variants, which figures mark; None marks none.
        importance: show how much each dimension matters, which takes longer than all else.
        hits: per-video results by study, as for ``assess``.
        inherited: as for ``describe_study``.
    """
    variants, blocks, main = variants or {}, base.model.blocks or "parallel", MAIN_METRICS[base.task]
    found = {name: assess(trials, (hits or {}).get(name)) for name, trials in studies.items()}
    points = {
        name: [trial_point(t, found[name], blocks) for t in comparable_trials(trials, "gmacs")]
        for name, trials in studies.items()
    }
    fronts = {
        name: {cost: [t.number for t in pareto_front(trials, cost)] for cost in COSTS}
        for name, trials in studies.items()
    }
    title = pareto_plots.figure_title(points, inherited)
    files = {
        "front.html": pareto_plots.interactive_page(points, fronts, variants, title, main),
        "front.png": pareto_plots.front_image(points, fronts, variants, title, main),
    }
    for name, trials in studies.items():
        prefix = f"{name}-" if len(studies) > 1 else ""
        files[f"{prefix}trials.csv"] = to_csv(trial_rows(trials, found[name]))
        metrics = {main.title: main.key, against: COSTS[against]} if importance else {}
        shares = {label: dimension_importance(trials, metric) for label, metric in metrics.items()}
        volumes = hypervolume_curve(trials, against)
        files[f"{prefix}progress.png"] = pareto_plots.search_progress(volumes, shares, main, against)
    return files


def trial_point(trial: Trial, found: Assessment, blocks: str | Sequence[str]) -> pareto_plots.TrialPoint:
    """The member of a trial as it is drawn.

    Args:
        found: the assessment of its study.
        blocks: the block types if the study does not search them.
    """
    searched = tuple(str(v) for k, v in sorted(trial.member.items()) if re.fullmatch(r"block\d*", k))
    number, fresh = trial.number, found.repeated and trial.number in found.values
    return pareto_plots.TrialPoint(
        number=number,
        first=trial.value,
        fresh=found.values[number] if fresh else None,
        interval=(found.low[number], found.high[number]) if number in found.low else None,
        seeds=len(found.runs[number]) if fresh else 0,
        probability={name: shares[number] for name, shares in found.probability.items() if number in shares},
        repeated_study=found.repeated,
        costs={name: trial.metrics.get(metric, math.nan) for name, metric in COSTS.items()},
        blocks=searched or ((blocks,) if isinstance(blocks, str) else tuple(blocks)),
        label=describe_member(trial.member),
    )
