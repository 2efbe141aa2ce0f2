"""What a study found: its front of speed and accuracy, as numbers, tables and pictures.

A study's trials come from its driver, or from MLflow alone (:func:`read_front`); the rest is the same for both. A front
goes by each trial's first seed. The mean and the standard deviation over the seeds are shown beside it, as error bars.
"""

from __future__ import annotations

import csv
import html
import io
import itertools
import math
import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import plotly.graph_objects as go
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator
from plotly.subplots import make_subplots
from pydantic import ValidationError

from pipelines.figures import png
from pipelines.search import static_costs
from pipelines.study import COSTS, FAILED, FINISHED, OVER, RUNNING, STOPPED, STUDY_FILE, TOP1, UNITS
from pipelines.study import Study, StudyError, Trial, explain, full
from posmlp.config import Config, ModelSection
from posmlp.errors import UserError
from posmlp.model.backbone import BLOCKS
from posmlp.model.variants import VARIANTS, suggest
from tune_spaces import Range, Value

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Dimensions = Mapping[str, tuple[Value, ...] | Range]
Published = Mapping[str, Mapping[str, float]]  # variant -> metric -> value

ENOUGH = 4  # trials from which shares of variance mean something
MANY = 10  # values of a dimension from which it is taken for a range
LOG_SPAN = 5  # costs that span more are on a logarithmic axis
NEAR = 3  # how far beyond the trials' costs a published variant is still shown
NUMBERED = 15  # points of a front up to which each has its trial's number
PAGE = 1000  # runs of one MLflow answer
MIXED = "mixed"
LABELS = {"latency": "latency of a clip (ms)", "gmacs": "arithmetic of a clip (GMACs)", "params": "parameters (M)"}
# A colour and a marker for each block type, told apart without colours and by the colour-blind.
LOOKS = dict(
    zip(
        [*BLOCKS, MIXED],
        [("#0072B2", "o"), ("#D55E00", "^"), ("#E69F00", "v"), ("#009E73", "s"), ("#7A6A9B", "D")],
        strict=True,
    )
)
OTHER = ("#555555", "X")
SYMBOLS = {"o": "circle", "^": "triangle-up", "v": "triangle-down", "s": "square", "D": "diamond", "X": "x"}  # plotly's
STUDY_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

optuna.logging.set_verbosity(optuna.logging.WARNING)


# --- numbers


def measured(trials: Iterable[Trial], against: str) -> list[Trial]:
    """Of the full trials those that have both a finite top-1 and the cost, by number."""
    names = (TOP1, COSTS[against])
    found = [t for t in full(trials) if all(math.isfinite(t.metrics.get(name, math.nan)) for name in names)]
    return sorted(found, key=lambda trial: trial.number)


def front(trials: Iterable[Trial], against: str) -> list[Trial]:
    """The full trials that no other beats: no other is as accurate and as cheap, and better in one of the two.

    Args:
        against: a key of ``COSTS``.

    Returns:
        the trials by rising cost; of several that are equal in both the one with the lowest number. Trials without a
        finite top-1 and cost do not count.
    """
    cost, best = COSTS[against], -math.inf
    found = []
    for trial in sorted(measured(trials, against), key=lambda t: (t.metrics[cost], -t.metrics[TOP1], t.number)):
        if trial.metrics[TOP1] > best:
            best = trial.metrics[TOP1]
            found.append(trial)
    return found


def accuracy(trial: Trial, trials: Iterable[Trial]) -> tuple[float, float | None, int]:
    """Top-1 over a trial's seeds.

    Args:
        trials: of the study; those that repeat the trial are taken from them.

    Returns:
        mean and sample standard deviation of the shares in 0..1, and the number of seeds. The deviation is None with
        one seed, the mean NaN with none.
    """
    seeds = [trial, *(other for other in trials if other.repeats == trial.number and other.state == FINISHED)]
    values = [value for seed in seeds if math.isfinite(value := seed.metrics.get(TOP1, math.nan))]
    mean = statistics.fmean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else None, len(values)


def hypervolume(points: Iterable[tuple[float, float]], reference: float) -> float:
    """The area of what some point beats: accuracies from 0 up to its own, costs from its own up to ``reference``.

    Args:
        points: cost and accuracy of each.
    """
    area = best = 0.0
    for cost, value in sorted(points):
        if cost < reference and value > best:
            area += (reference - cost) * (value - best)
            best = value
    return area


def hypervolumes(trials: Iterable[Trial], against: str, reference: float | None = None) -> list[float]:
    """How the front grew: the hypervolume after each full trial, by number, as a share in 0..1.

    Args:
        reference: the cost that it is measured to and divided by; None: the largest of the trials. Studies that are
            compared need the same.

    Returns:
        a value for each full trial; one without a finite top-1 and cost leaves it as it was.
    """
    trials = sorted(full(trials), key=lambda trial: trial.number)
    counted = {trial.number for trial in measured(trials, against)}
    if reference is None:
        reference = largest(trials, against)
    points: list[tuple[float, float]] = []
    values = []
    for trial in trials:
        if trial.number in counted:
            points.append((trial.metrics[COSTS[against]], trial.metrics[TOP1]))
        values.append(hypervolume(points, reference) / reference if reference > 0 else 0.0)
    return values


def largest(trials: Iterable[Trial], against: str) -> float:
    """The largest cost of the trials that count; 0 without any."""
    return max((trial.metrics[COSTS[against]] for trial in measured(trials, against)), default=0.0)


def importance(dimensions: Dimensions, trials: Iterable[Trial], metric: str) -> dict[str, float]:
    """How much of a metric's variance each dimension explains alone, by functional ANOVA over a random forest.

    Args:
        dimensions: of the space; trials whose members are not in it do not count.

    Returns:
        a share in 0..1 for each dimension, the largest first. What is missing to 1 is due to combinations. Empty with
        fewer than ``ENOUGH`` full trials, or where all have the same value.
    """
    found = [
        trial
        for trial in full(trials)
        if math.isfinite(trial.metrics.get(metric, math.nan))
        and all(name in trial.member and holds(values, trial.member[name]) for name, values in dimensions.items())
    ]
    if len(found) < ENOUGH or len({trial.metrics[metric] for trial in found}) == 1:
        return {}
    known = optuna.create_study()
    for trial in found:
        placed = {name: place(values, trial.member[name]) for name, values in dimensions.items()}
        known.add_trial(
            optuna.trial.create_trial(
                params={name: value for name, (value, _) in placed.items()},
                distributions={name: distribution for name, (_, distribution) in placed.items()},
                value=trial.metrics[metric],
            )
        )
    shares = FanovaImportanceEvaluator(seed=0).evaluate(known, params=list(dimensions))
    return {name: float(share) for name, share in shares.items()}


def holds(values: tuple[Value, ...] | Range, value: Value) -> bool:
    """Whether a dimension has a value."""
    if isinstance(values, tuple):
        return value in values
    return not isinstance(value, str) and values.low <= value <= values.high


def place(values: tuple[Value, ...] | Range, value: Value) -> tuple[Value, BaseDistribution]:
    """A value and its dimension for the analysis of variance, which knows no logarithms: they are taken here."""
    if isinstance(values, tuple):
        return value, CategoricalDistribution(values)
    if not values.log:
        return value, FloatDistribution(values.low, values.high)
    low, high = math.log(values.low), math.log(values.high)
    return min(max(math.log(value), low), high), FloatDistribution(low, high)


def dimensions_of(trials: Iterable[Trial]) -> dict[str, tuple[Value, ...] | Range]:
    """The dimensions as far as the trials show them, for a space that is not at hand."""
    seen: dict[str, set[Value]] = {}
    for trial in trials:
        for name, value in trial.member.items():
            seen.setdefault(name, set()).add(value)
    dimensions: dict[str, tuple[Value, ...] | Range] = {}
    for name, values in seen.items():
        numbers = [value for value in values if not isinstance(value, str)]
        if len(numbers) == len(values) > MANY:
            low, high = min(numbers), max(numbers)
            dimensions[name] = Range(low, high, log=low > 0 and high > 10 * low)
        else:
            dimensions[name] = tuple(sorted(values, key=lambda value: (isinstance(value, str), value)))
    return dimensions


def published(recipe: Config, latency: Mapping[str, float] | None = None) -> dict[str, dict[str, float]]:
    """What the named variants cost on a recipe's clips, with as many classes as its model has.

    Args:
        latency: milliseconds of a clip by variant, where they are known.

    Returns:
        for each variant its metrics, by the names of ``COSTS``.
    """
    clip = recipe.model.variant()
    costs = {}
    for name in VARIANTS:
        model = ModelSection(name=name, frames=clip.frames, image_size=clip.image_size, num_classes=clip.num_classes)
        costs[name] = static_costs(recipe.model_copy(update={"model": model}))
        if latency and name in latency:
            costs[name][COSTS["latency"]] = latency[name]
    return costs


# --- tables


def table(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """A row for each trial, by number, with the same columns in all.

    Dimensions are called ``search.NAME``, as in MLflow. ``front_latency`` and so on are 1 for a trial on that front.
    Top-1 is a share in 0..1: ``top1`` that of the trial itself, the mean, standard deviation and count those of all
    seeds, in the row of the first. What a trial does not have is None.
    """
    names = list(dict.fromkeys(name for trial in trials for name in trial.member))
    costs = sorted({name for trial in trials for name in trial.metrics if name.startswith("cost/")} | {*COSTS.values()})
    fronts = {against: {trial.number for trial in front(trials, against)} for against in COSTS}
    counted = {trial.number for trial in full(trials)}
    rows = []
    for trial in sorted(trials, key=lambda trial: trial.number):
        row: dict[str, Any] = {"number": trial.number, "state": trial.state, "reason": trial.reason}
        row |= {"seed": trial.seed, "repeats": trial.repeats}
        row |= {f"search.{name}": trial.member.get(name) for name in names}
        row |= {f"front_{against}": int(trial.number in numbers) for against, numbers in fronts.items()}
        mean, deviation, count = accuracy(trial, trials) if trial.number in counted else (None, None, None)
        row |= {"top1": trial.metrics.get(TOP1), "top1_mean": mean, "top1_std": deviation, "top1_count": count}
        rows.append(row | {name: trial.metrics.get(name) for name in costs})
    return rows


def to_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as CSV in UTF-8, under a line with all their columns; None is an empty field."""
    text = io.StringIO(newline="")
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def short(value: Value) -> str:
    """A value of a dimension, to be read."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def compact(member: Mapping[str, Value]) -> str:
    """A member in a line, what is chosen for each stage together: ``block joint,joint,parallel,joint; width 1.5``."""
    groups: dict[str, list[str]] = {}
    for name, value in member.items():
        stem = name.rstrip("0123456789")
        groups.setdefault(stem if stem and f"{stem}1" in member else name, []).append(short(value))
    return "; ".join(f"{name} {','.join(values)}" for name, values in groups.items())


def summary(trials: Sequence[Trial]) -> str:
    """How many trials ended how: ``25 trained, 2 failed``; repeats are not trials of their own."""
    counts = Counter(trial.state for trial in trials if trial.repeats is None)
    parts = [f"{counts[FINISHED]} trained"]
    parts += [f"{counts[state]} {state}" for state in (STOPPED, FAILED, OVER, RUNNING) if counts[state]]
    if repeats := sum(trial.repeats is not None for trial in trials):
        parts.append(f"{repeats} more {'seed' if repeats == 1 else 'seeds'}")
    return ", ".join(parts)


# --- pictures


def recipe_kind(recipe: Config) -> str:
    """The block type of a recipe's model, ``mixed`` where its stages differ."""
    blocks = recipe.model.variant().blocks
    return common([blocks] if isinstance(blocks, str) else list(blocks))


def kind(trial: Trial, otherwise: str = MIXED) -> str:
    """The block type of a trial's model, ``mixed`` where its stages differ.

    Args:
        otherwise: the recipe's, for a space that has no dimensions ``block`` or ``block1``, ``block2``, ...
    """
    chosen = [str(value) for name, value in trial.member.items() if re.fullmatch(r"block\d*", name)]
    return common(chosen) if chosen else otherwise


def common(blocks: Sequence[str]) -> str:
    return blocks[0] if len(set(blocks)) == 1 else MIXED


@dataclass(frozen=True)
class Panel:
    """What one cost's panel shows.

    Attributes:
        points: of each study, the trials that have this cost.
        lines: published variants within reach of the points, and their cost.
        log: whether the axis of costs is logarithmic.
    """

    against: str
    points: dict[str, list[Trial]]
    lines: dict[str, float]
    log: bool


def panels(studies: Mapping[str, Sequence[Trial]], published: Published) -> Iterator[Panel]:
    """A panel for each cost."""
    for against, metric in COSTS.items():
        points = {name: measured(trials, against) for name, trials in studies.items()}
        costs = [trial.metrics[metric] for trials in points.values() for trial in trials]
        low, high = min(costs, default=0.0), max(costs, default=0.0)
        known = {name: values[metric] for name, values in published.items() if metric in values}
        lines = {name: cost for name, cost in known.items() if low / NEAR <= cost <= high * NEAR}
        shown = [*costs, *lines.values()]
        log = bool(shown) and min(shown) > 0 and max(shown) > LOG_SPAN * min(shown)
        yield Panel(against, points, lines, log)


def looks(studies: Mapping[str, Any], name: str, kind: str) -> tuple[str, str]:
    """Colour and marker of a point. One study's colours tell the block types, those of several tell the studies."""
    colour, marker = LOOKS.get(kind, OTHER)
    return (line_colour(studies, name) if len(studies) > 1 else colour), marker


def line_colour(studies: Mapping[str, Any], name: str) -> str:
    if len(studies) == 1:
        return "#444444"
    return STUDY_COLOURS[list(studies).index(name) % len(STUDY_COLOURS)]


def by_kind(trials: Sequence[Trial], otherwise: str) -> dict[str, list[Trial]]:
    """Trials by block type, in the order of the legend."""
    kinds: dict[str, list[Trial]] = {}
    for trial in trials:
        kinds.setdefault(kind(trial, otherwise), []).append(trial)
    order = list(LOOKS)
    return dict(sorted(kinds.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def title(studies: Mapping[str, Sequence[Trial]]) -> str:
    return " | ".join(f"{name}: {summary(trials)}" for name, trials in studies.items())


def picture(
    studies: Mapping[str, Sequence[Trial]], published: Published, blocks: Mapping[str, str] | None = None
) -> bytes:
    """Top-1 over each of the three costs, with the front of each, as PNG.

    Args:
        studies: trials by the study's name; several are laid over each other.
        published: costs of the named variants, marked where they lie near those of the trials.
        blocks: by the study's name, the block type of its recipe, for spaces that have no dimension of it.
    """
    figure = Figure(figsize=(13, 4.9), layout="constrained")
    figure.suptitle(title(studies), fontsize=12)
    kinds: dict[str, None] = {}
    repeated = False
    all_axes = figure.subplots(1, 3, sharey=True)
    for axes, panel in zip(all_axes, panels(studies, published), strict=True):
        for name, points in panel.points.items():
            groups = by_kind(points, (blocks or {}).get(name, MIXED))
            kinds |= dict.fromkeys(groups)
            for group, members in groups.items():
                draw_points(axes, panel.against, members, front(points, panel.against), looks(studies, name, group))
            draw_front(axes, panel, points, line_colour(studies, name))
            repeated |= draw_seeds(axes, panel.against, points, studies[name], line_colour(studies, name))
        draw_frame(axes, panel)
    all_axes[0].set_ylabel("top-1 (%)")
    handles = legend(studies, [name for name in LOOKS if name in kinds] + [k for k in kinds if k not in LOOKS])
    if repeated:
        handles.append(Line2D([], [], color="#444444", marker="_", label="mean ± std of the seeds", linewidth=1.2))
    if published:
        handles.append(Line2D([], [], color="#999999", linestyle=":", label="named variant's cost"))
    if kinds:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    return png(figure)


def draw_points(
    axes: Axes, against: str, trials: Sequence[Trial], best: Sequence[Trial], look: tuple[str, str]
) -> None:
    """The trials of one look; those on the front stand out."""
    colour, marker = look
    numbers = {trial.number for trial in best}
    for on_front, size, alpha, edge in ((False, 26, 0.45, "none"), (True, 52, 1.0, "black")):
        shown = [trial for trial in trials if (trial.number in numbers) == on_front]
        x, y = [t.metrics[COSTS[against]] for t in shown], [100 * t.metrics[TOP1] for t in shown]
        axes.scatter(
            x, y, size, color=colour, marker=marker, alpha=alpha, edgecolors=edge, linewidths=0.8, zorder=3 + on_front
        )


def draw_front(axes: Axes, panel: Panel, points: Sequence[Trial], colour: str) -> None:
    """What accuracy each cost buys, as steps, up to the dearest trial of all."""
    best = front(points, panel.against)
    if not best:
        return
    end = max(largest(trials, panel.against) for trials in panel.points.values())
    x = [*(trial.metrics[COSTS[panel.against]] for trial in best), end]
    y = [*(100 * trial.metrics[TOP1] for trial in best), 100 * best[-1].metrics[TOP1]]
    axes.step(x, y, where="post", color=colour, linewidth=1.5, zorder=2)
    if len(best) <= NUMBERED and len(panel.points) == 1:
        for trial, across, up in zip(best, x, y, strict=False):
            axes.annotate(
                str(trial.number),
                (across, up),
                xytext=(-5, 4),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color="#222222",
                zorder=6,
            )


def draw_seeds(axes: Axes, against: str, points: Sequence[Trial], trials: Sequence[Trial], colour: str) -> bool:
    """Mean and standard deviation of the trials that have more than one seed; returns whether there are any."""
    any_drawn = False
    for trial in points:
        mean, deviation, _ = accuracy(trial, trials)
        if deviation is not None:
            any_drawn = True
            axes.errorbar(
                trial.metrics[COSTS[against]],
                100 * mean,
                100 * deviation,
                color=colour,
                marker="_",
                markersize=9,
                capsize=3,
                linewidth=1.2,
                zorder=5,
            )
    return any_drawn


def draw_frame(axes: Axes, panel: Panel) -> None:
    """A panel's axis of costs, grid, published variants, and a note where there is nothing to show."""
    axes.set_xlabel(LABELS[panel.against])
    axes.spines[["top", "right"]].set_visible(False)
    if not any(panel.points.values()):
        note(axes, "no finished trial has this cost yet")
        return
    if panel.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.margins(x=0.07, y=0.1)
    for name, cost in panel.lines.items():
        axes.axvline(cost, color="#999999", linestyle=":", linewidth=1.3, zorder=1)
        axes.text(
            cost,
            0.02,
            f"{name} ",
            transform=axes.get_xaxis_transform(),
            ha="right",
            va="bottom",
            color="#666666",
            style="italic",
            fontsize=9,
        )


def note(axes: Axes, text: str) -> None:
    """A few words in place of a plot."""
    axes.set_xticks([])
    axes.tick_params(left=False, labelleft=False)
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#666666")


def legend(studies: Mapping[str, Any], kinds: Iterable[str]) -> list[Line2D]:
    """Block types and fronts."""
    handles = []
    for name in kinds:
        colour, marker = LOOKS.get(name, OTHER)
        colour = "#777777" if len(studies) > 1 else colour
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="none", label=name.replace("$", r"\$")))
    for name in studies:
        label = "front" if len(studies) == 1 else name
        handles.append(Line2D([], [], color=line_colour(studies, name), linewidth=1.5, label=label))
    return handles


def interactive(
    studies: Mapping[str, Sequence[Trial]], published: Published, blocks: Mapping[str, str] | None = None
) -> bytes:
    """The same as :func:`picture` as an HTML page that needs no network; the pointer on a trial shows all of it."""
    figure = make_subplots(1, 3, shared_yaxes=True, horizontal_spacing=0.03)
    legends: set[tuple[str, str]] = set()
    for column, panel in enumerate(panels(studies, published), start=1):
        metric = COSTS[panel.against]
        heights = [100 * trial.metrics[TOP1] for trials in panel.points.values() for trial in trials]
        for name, points in panel.points.items():
            best = front(points, panel.against)
            numbers = {trial.number for trial in best}
            prefix = f"{name}: " if len(studies) > 1 else ""
            if best:
                end = max(largest(trials, panel.against) for trials in panel.points.values())
                figure.add_scatter(
                    x=[*(t.metrics[metric] for t in best), end],
                    y=[100 * t.metrics[TOP1] for t in (*best, best[-1])],
                    mode="lines",
                    line={"shape": "hv", "color": line_colour(studies, name), "width": 2},
                    hoverinfo="skip",
                    row=1,
                    col=column,
                    **entry(legends, name, f"{prefix}front"),
                )
            for group, members in by_kind(points, (blocks or {}).get(name, MIXED)).items():
                colour, marker = looks(studies, name, group)
                spread = [accuracy(trial, studies[name])[:2] for trial in members]
                # The bar is about the mean, the point at the first seed's value.
                values = [100 * trial.metrics[TOP1] for trial in members]
                ups = [
                    0.0 if std is None else 100 * (mean + std) - value
                    for (mean, std), value in zip(spread, values, strict=True)
                ]
                downs = [
                    0.0 if std is None else value - 100 * (mean - std)
                    for (mean, std), value in zip(spread, values, strict=True)
                ]
                figure.add_scatter(
                    x=[trial.metrics[metric] for trial in members],
                    y=values,
                    error_y={"type": "data", "array": ups, "arrayminus": downs, "visible": any(map(any, (ups, downs)))},
                    mode="markers",
                    marker={
                        "color": colour,
                        "symbol": SYMBOLS[marker],
                        "size": [11 if trial.number in numbers else 7 for trial in members],
                        "opacity": [1.0 if trial.number in numbers else 0.45 for trial in members],
                        "line": {"color": "black", "width": [1 if t.number in numbers else 0 for t in members]},
                    },
                    text=[hover(name, trial, studies[name]) for trial in members],
                    hovertemplate="%{text}<extra></extra>",
                    row=1,
                    col=column,
                    **entry(legends, name, f"{prefix}{group}"),
                )
        for variant, cost in panel.lines.items():
            figure.add_scatter(
                x=[cost, cost],
                y=[min(heights), max(heights)],
                mode="lines+text",
                text=[variant, ""],
                textposition="bottom center",
                line={"dash": "dot", "color": "#999999"},
                hovertemplate=f"{variant}: {cost:.4g} {UNITS[panel.against]}<extra></extra>",
                showlegend=False,
                row=1,
                col=column,
            )
        label = LABELS[panel.against] if heights else f"{LABELS[panel.against]}: no finished trial has it yet"
        figure.update_xaxes(title_text=label, type="log" if panel.log else "linear", row=1, col=column)
    figure.update_yaxes(title_text="top-1 (%)", row=1, col=1)
    heading = html.escape(title(studies))
    figure.update_layout(title_text=heading, template="plotly_white", legend_title_text="block type", height=620)
    page = str(figure.to_html(include_plotlyjs=True, full_html=True))
    return page.replace("<head>", f"<head><title>{heading}</title>", 1).encode()


def entry(known: set[tuple[str, str]], study: str, label: str) -> dict[str, Any]:
    """The legend's part of a trace: the panels' traces of one label are switched together by one entry."""
    first = (study, label) not in known
    known.add((study, label))
    return {"name": label, "legendgroup": f"{study} {label}", "showlegend": first}


def hover(study: str, trial: Trial, trials: Sequence[Trial]) -> str:
    """All of a trial in a few lines of plotly's HTML."""
    mean, deviation, count = accuracy(trial, trials)
    lines = [f"{study}, trial {trial.number}", f"top-1 {100 * trial.metrics[TOP1]:.2f} %"]
    if deviation is not None:
        lines.append(f"{100 * mean:.2f} ± {100 * deviation:.2f} % over {count} seeds")
    lines += [f"{name} = {short(value)}" for name, value in trial.member.items()]
    lines += [f"{name} = {value:.4g}" for name, value in sorted(trial.metrics.items()) if name.startswith("cost/")]
    return "<br>".join(map(html.escape, lines))


def progress_picture(trials: Sequence[Trial], dimensions: Dimensions, against: str) -> bytes:
    """How the front grew trial by trial, and which dimensions matter for top-1 and for the cost, as PNG."""
    shares = {
        label: importance(dimensions, trials, metric) for label, metric in (("top-1", TOP1), (against, COSTS[against]))
    }
    names = sorted(dimensions, key=lambda name: [values.get(name, 0.0) for values in shares.values()])
    figure = Figure(figsize=(11, max(3.8, 1.4 + 0.32 * len(names))), layout="constrained")
    growth, bars = figure.subplots(1, 2)
    growth.set_title("growth of the front", fontsize=11)
    bars.set_title("what each dimension explains alone", fontsize=11)
    for axes in (growth, bars):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    values = hypervolumes(trials, against)
    numbers = sorted(trial.number for trial in full(trials))
    growth.set_xlabel("trial")
    growth.set_ylabel(f"hypervolume of top-1 and {against}")
    if measured(trials, against):
        growth.step(numbers, values, where="post", color="#0072B2", marker="o", markersize=3.5)
        growth.set_ylim(bottom=0)
        growth.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    else:
        note(growth, "no finished trial has this cost yet")
    bars.set_xlabel("share of the variance")
    if any(shares.values()):
        for (label, found), offset, colour in zip(shares.items(), (0.19, -0.19), ("#0072B2", "#E69F00"), strict=True):
            places = [place + offset for place in range(len(names))]
            bars.barh(places, [found.get(name, 0.0) for name in names], 0.36, color=colour, label=label)
        bars.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names])
        bars.set_xlim(0, 1)
        bars.grid(visible=False, axis="y")
        bars.legend(loc="lower right", frameon=False)
    else:
        note(bars, f"needs {ENOUGH} finished trials that differ")
    return png(figure)


def artifacts(study: Study, trials: Sequence[Trial], dimensions: Dimensions, published: Published) -> dict[str, bytes]:
    """What a study shows in MLflow, by file name; there may be no finished trial yet.

    Args:
        published: costs of the named variants, see :func:`published`.
    """
    studies, blocks = {study.name: trials}, {study.name: recipe_kind(study.recipe)}
    return {
        "front.html": interactive(studies, published, blocks),
        "front.png": picture(studies, published, blocks),
        "progress.png": progress_picture(trials, dimensions, study.against or "latency"),
        "trials.csv": to_csv([{"study": study.name} | row for row in table(trials)]),
    }


# --- from MLflow


@dataclass(frozen=True)
class View:
    """A study as MLflow has it.

    Attributes:
        trials: those that trained, by number; what only the searcher needs (``ask``, ``notes``) is not in them.
        recipe: gives the full recipe of a trial's run, as YAML; raises UserError where MLflow does not give it.
    """

    name: str
    study: Study
    trials: list[Trial]
    recipe: Callable[[int], str]


def read_front(name: str, uri: str) -> View:
    """A study from MLflow alone, whichever experiment it is in; of several of the name the newest.

    Args:
        uri: MLflow's tracking URI.

    Raises:
        UserError: MLflow does not answer, has no such study, or its artifacts cannot be read.
    """
    from mlflow import MlflowClient  # takes seconds, and pictures need none of it

    from pipelines.tracking import prepare_mlflow, without_secrets

    prepare_mlflow()
    database = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    if uri.startswith("sqlite:///") and not database.exists():  # which MLflow would make
        raise UserError(f"no study {name!r}: there is no {database}; set MLFLOW_TRACKING_URI to where the study wrote")
    try:
        client = MlflowClient(uri)
        quoted = name.replace("'", "")  # of which no study's name has one
        runs = list(search(client, f"tags.study = '{quoted}'")) if quoted == name else []
        parents = [run for run in runs if "trial" not in run.data.tags]
        known = [] if parents else known_studies(client)
    except Exception as error:  # of a network or a database, in their many kinds
        raise unreachable(uri, error) from error
    if not parents:
        listed = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "") if known else "none"
        raise UserError(
            f"MLflow at {without_secrets(uri)} has no study {name!r}{suggest(name, known)}; it has: {listed}. "
            "Give one of them, or set MLFLOW_TRACKING_URI to another MLflow"
        )
    parent = max(parents, key=lambda run: run.info.start_time)
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    # A trial that was started anew has the newest of its runs.
    latest = {int(run.data.tags["trial"]): run for run in sorted(children, key=lambda run: run.info.start_time)}
    tree = yaml.safe_load(artifact(client, uri, parent.info.run_id, STUDY_FILE))
    try:
        study = Study.model_validate({key: value for key, value in tree.items() if key != "mlflow_run_id"})
    except (AttributeError, ValidationError) as error:
        raise StudyError(
            f"{STUDY_FILE} of study {name} in MLflow is not a study, or one of another version: {explain(error)}"
        ) from error

    def recipe(number: int) -> str:
        return artifact(client, uri, latest[number].info.run_id, "config.yaml")

    return View(name, study, [trial_of(latest[number]) for number in sorted(latest)], recipe)


def search(client: MlflowClient, condition: str) -> Iterator[Run]:
    """All runs of all experiments that meet a condition."""
    token, experiments = None, []
    while token or not experiments:
        found = client.search_experiments(page_token=token)
        experiments += [experiment.experiment_id for experiment in found]
        token = found.token
        if not token:
            break
    token = None
    while experiments:
        runs = client.search_runs(experiments, condition, max_results=PAGE, page_token=token)
        yield from runs
        token = runs.token
        if not token:
            break


def known_studies(client: MlflowClient) -> list[str]:
    """Names of the studies that MLflow has."""
    runs = search(client, "tags.study LIKE '%'")
    return sorted({run.data.tags["study"] for run in runs if "trial" not in run.data.tags})


def artifact(client: MlflowClient, uri: str, run_id: str, path: str) -> str:
    """The text of a run's artifact.

    Raises:
        UserError: it cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            return Path(client.download_artifacts(run_id, path, folder)).read_text()
        except Exception as error:  # of an artifact store, in their many kinds
            raise unreachable(uri, error, f"gives no {path} of run {run_id}") from error


def unreachable(uri: str, error: Exception, what: str = "does not answer") -> UserError:
    """An error of MLflow in one line, without secrets."""
    from pipelines.tracking import REASONS, scrub, shorten, without_secrets

    text = " ".join(str(error).split()) or type(error).__name__
    reason = next((reason for sign, reason in REASONS.items() if sign in text), shorten(scrub(text, uri), 200))
    return UserError(f"MLflow at {without_secrets(uri)} {what} ({reason}); see MLFLOW_TRACKING_URI")


def trial_of(run: Run) -> Trial:
    """A trial from its MLflow run."""
    tags, params = run.data.tags, run.data.params
    dimensions = {key.removeprefix("search."): text for key, text in params.items() if key.startswith("search.")}
    return Trial(
        number=int(tags["trial"]),
        member={name: value_of(text) for name, text in dimensions.items()},
        seed=int(params.get("train.seed", 0)),
        repeats=int(tags["trial.repeats"]) if "trial.repeats" in tags else None,
        state=tags.get("trial.state", RUNNING),
        reason=tags.get("trial.reason", ""),
        metrics={key: value for key, value in run.data.metrics.items() if not key.startswith("system/")},
        mlflow_run_id=run.info.run_id,
    )


def value_of(text: str) -> Value:
    """A dimension's value from its text: a whole number, a number, or a word."""
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def recipe_of(config_yaml: str, study_name: str, number: int, storage: str, log_model: bool = True) -> str:
    """The recipe, as YAML, that trains a trial's member alone, with ``posmlp train``.

    Args:
        config_yaml: the recipe of the trial's run.
        storage, log_model: ``train.storage`` and ``tracking.log_model`` of the study's recipe; the trial has others.

    Raises:
        UserError: it is not a recipe.
    """
    try:
        config = Config.model_validate(yaml.safe_load(config_yaml))
    except (yaml.YAMLError, ValidationError) as error:
        raise UserError(
            f"the recipe of trial {number} of study {study_name} cannot be run, it may be of another version: "
            f"{explain(error)}"
        ) from error
    train = config.train.model_copy(update={"storage": storage})
    tracking = config.tracking.model_copy(update={"log_model": log_model})
    name = f"{study_name}-trial-{number:03d}"
    return config.model_copy(update={"name": name, "train": train, "tracking": tracking}).to_yaml()


def write_front(views: Sequence[View], against: str, out: Path) -> str:
    """Write what studies found: pictures, a table, and a recipe for each point of a front.

    Args:
        against: the cost of the text and of progress.png, a key of ``COSTS``; the other files have all three.
        out: a folder, which is made: front.html, front.png, trials.csv and recipes/trial-007.yaml. Of one study there
            is also progress.png; of several the recipes are called recipes/NAME-trial-007.yaml.

    Returns:
        the fronts as text to print.

    Raises:
        UserError: no such cost, or MLflow does not give a recipe.
        OSError: the folder cannot be written.
    """
    if against not in COSTS:
        raise UserError(f"unknown cost {against!r}{suggest(against, list(COSTS))}; known: {', '.join(COSTS)}")
    studies = {view.name: view.trials for view in views}
    blocks = {view.name: recipe_kind(view.study.recipe) for view in views}
    variants = [published(view.study.recipe) for view in views]
    lines = variants[0] if all(costs == variants[0] for costs in variants) else {}  # on different clips none is right
    rows = [{"study": view.name} | row for view in views for row in table(view.trials)]
    files = {
        "front.html": interactive(studies, lines, blocks),
        "front.png": picture(studies, lines, blocks),
        "trials.csv": to_csv(rows),
    }
    if len(views) == 1:
        files["progress.png"] = progress_picture(views[0].trials, dimensions_of(views[0].trials), against)
    for view in views:
        base = view.study.recipe
        prefix = f"{view.name}-" if len(views) > 1 else ""
        for number in sorted({trial.number for cost in COSTS for trial in front(view.trials, cost)}):
            recipe = recipe_of(view.recipe(number), view.name, number, base.train.storage, base.tracking.log_model)
            files[f"recipes/{prefix}trial-{number:03d}.yaml"] = recipe.encode()
    for path, content in files.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes(content)
    reference = max((largest(view.trials, against) for view in views), default=0.0)
    return "\n\n".join(front_text(view.name, view.trials, against, reference) for view in views)


def front_text(name: str, trials: Sequence[Trial], against: str, reference: float) -> str:
    """A study's front as a table to read.

    Args:
        reference: the cost that the hypervolume is measured to, the same for all studies that are compared.
    """
    best = front(trials, against)
    if not best:
        return f"{name}: {summary(trials)}; no finished trial has {TOP1} and {COSTS[against]} yet"
    area = hypervolumes(trials, against, reference)[-1]
    head = f"{name}: {summary(trials)}; hypervolume {area:.3f} up to {reference:.4g} {UNITS[against]}"
    rows = [("trial", "top-1", "ms", "GMACs", "M params", "dimensions")]
    for trial in best:
        mean, deviation, count = accuracy(trial, trials)
        top1 = f"{100 * trial.metrics[TOP1]:.2f} %"
        if deviation is not None:
            top1 += f" ({100 * mean:.2f} ± {100 * deviation:.2f}, {count} seeds)"
        costs = [f"{trial.metrics[cost]:.4g}" if cost in trial.metrics else "-" for cost in COSTS.values()]
        rows.append((str(trial.number), top1, *costs, compact(trial.member)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = [head]
    for number, top1, *cells, dimensions in rows:
        aligned = [number.rjust(widths[0]), top1.ljust(widths[1])]
        aligned += [cell.rjust(width) for cell, width in zip(cells, widths[2:], strict=False)]
        text.append("  ".join([*aligned, dimensions]).rstrip())
    return "\n".join(text)
