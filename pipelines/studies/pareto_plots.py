"""Figures of Pareto fronts (top-1 against each cost, as a PNG image and as an interactive page) and of a search."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.path import Path
from matplotlib.ticker import LogLocator, MaxNLocator
from plotly.subplots import make_subplots

from pipelines.tracking.plots import to_png
from posmlp.metrics import COSTS

COST_LABELS = {"latency": "ms per clip", "gmacs": "GMACs", "params": "M parameters"}
BLOCK_COLOURS = {
    "parallel": "#1b6ca8",
    "cascade_ts": "#e07b1a",
    "cascade_st": "#b8a100",
    "joint": "#2c9c5a",
    "spatial": "#8c6bb1",
    "mixed": "#8a8a8a",
}
FRONT_COLOURS = ("#222222", "#c23b75", "#3b77c2", "#7a9a01")  # by study
STUDY_SYMBOLS = ("circle", "square", "triangle-up", "diamond")  # by study
LOG_SCALE_RATIO = 5.0  # an axis is logarithmic if the largest cost is more than this multiple of the smallest
MARK_FACTOR = 3.0  # a published variant is marked if its cost is within this factor of the trials' costs


@dataclass(frozen=True)
class TrialPoint:
    """A trial as it is drawn.

    Attributes:
        top1: top-1 of the first seed, which gives the point's position.
        mean, deviation, seeds: mean and standard deviation of top-1 over all seeds, and their number. The deviation of
            one seed is None.
        costs: by the names of ``COST_LABELS``; NaN if a cost is not known.
        blocks: block type of each stage.
        label: the member in words.
    """

    number: int
    top1: float
    mean: float
    deviation: float | None
    seeds: int
    costs: Mapping[str, float]
    blocks: tuple[str, ...]
    label: str

    @property
    def main_block(self) -> str:
        """The block type of more stages than any other, or ``mixed``."""
        (block, most), *others = Counter(self.blocks).most_common()
        return block if all(count < most for _, count in others) else "mixed"


StudyPoints = Mapping[str, Sequence[TrialPoint]]  # by study
StudyFronts = Mapping[str, Mapping[str, Sequence[int]]]  # by study and cost: the front's trials, cheapest first
VariantCosts = Mapping[str, Mapping[str, float]]  # by variant and metric name


def front_image(studies: StudyPoints, fronts: StudyFronts, variants: VariantCosts) -> bytes:
    """Draw top-1 against each cost, one panel per cost, as PNG.

    Args:
        variants: the costs of published variants; those near the trials are marked.
    """
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    costs = known_costs(studies)
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axes, cost in zip(panels, costs, strict=True):
        for index, (name, points) in enumerate(studies.items()):
            draw_points(axes, points, cost, "white" if len(studies) == 1 else FRONT_COLOURS[index % 4])
            x, y = front_line(points, fronts[name][cost], cost)
            axes.plot(x, y, color=FRONT_COLOURS[index % 4], drawstyle="steps-post", linewidth=1.2, zorder=1)
        values = finite_costs(studies, cost)
        if axis_scale(values) == "log":
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
        for variant, value in variants_in_range(variants, cost, values):
            axes.axvline(value, color="#999999", linestyle=":", linewidth=1)
            position = (value, 0.02)
            axes.annotate(
                f" {variant}", position, xycoords=("data", "axes fraction"), color="#777777", rotation=90, fontsize=8
            )
        axes.set_xlabel(COST_LABELS[cost])
        axes.grid(alpha=0.25, which="both")
    panels[0].set_ylabel("validation top-1, %")
    mixed = any(map(mixes_blocks, studies.values()))
    sectors = "; sectors: the stages' blocks, clockwise from the top" if mixed else ""
    figure.suptitle(figure_title(studies) + sectors, fontsize=11)
    used = [block for block in BLOCK_COLOURS if any(block in p.blocks for points in studies.values() for p in points)]
    handles = [Line2D([], [], linestyle="", marker="o", color=BLOCK_COLOURS[block], label=block) for block in used]
    for index, name in enumerate(studies):
        label = f"Pareto front of {name}" if len(studies) > 1 else "Pareto front"
        handles.append(Line2D([], [], color=FRONT_COLOURS[index % 4], label=label))
    if any(p.deviation is not None for points in studies.values() for p in points):
        label = "mean ± standard deviation over seeds"
        handles.append(Line2D([], [], linestyle="", marker="_", color="black", label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    return to_png(figure)


def draw_points(axes: Axes, points: Sequence[TrialPoint], cost: str, edge: str) -> None:
    """Draw a study's trials: a disc with one sector per stage, clockwise from the top, and the spread over seeds."""
    for point in points:
        value, share = point.costs[cost], 360 / len(point.blocks)
        if point.deviation is not None:
            mean, spread = 100 * point.mean, 100 * point.deviation
            axes.errorbar(
                value, mean, yerr=spread, color="black", fmt="_", markersize=8, capsize=3, linewidth=1, zorder=2
            )
        axes.scatter(value, 100 * point.top1, s=95, color=edge, zorder=3, linewidths=0)
        for stage, block in enumerate(point.blocks):
            sector = Path.wedge(90 - share * (stage + 1), 90 - share * stage)
            colour = BLOCK_COLOURS.get(block, BLOCK_COLOURS["mixed"])
            axes.scatter(value, 100 * point.top1, s=75, marker=sector, color=colour, zorder=4, linewidths=0)


def interactive_page(studies: StudyPoints, fronts: StudyFronts, variants: VariantCosts) -> bytes:
    """Draw the figure of ``front_image`` as one HTML page that describes each trial on hover. It needs no network."""
    costs = known_costs(studies)
    figure = make_subplots(1, len(costs), shared_yaxes=True, horizontal_spacing=0.03)
    for column, cost in enumerate(costs, start=1):
        values = finite_costs(studies, cost)
        for index, (name, points) in enumerate(studies.items()):
            x, y = front_line(points, fronts[name][cost], cost)
            line = {"shape": "hv", "color": FRONT_COLOURS[index % 4], "width": 1.5}
            figure.add_scatter(
                x=x, y=y, mode="lines", line=line, name=f"Pareto front of {name}", legendgroup=name, hoverinfo="skip",
                showlegend=column == 1, row=1, col=column,
            )  # fmt: skip
            for block in dict.fromkeys(point.main_block for point in points):
                with_block = [point for point in points if point.main_block == block]
                add_points(figure, with_block, cost, name, index, column)
        number = "" if column == 1 else str(column)
        for variant, value in variants_in_range(variants, cost, values):
            figure.add_vline(x=value, line={"dash": "dot", "color": "#999999"}, row=1, col=column)
            x_at = math.log10(value) if axis_scale(values) == "log" else value  # Plotly expects the exponent
            figure.add_annotation(
                x=x_at, y=1, xref=f"x{number}", yref=f"y{number} domain", text=variant, showarrow=False,
                yanchor="bottom", font={"color": "#777777", "size": 11},
            )  # fmt: skip
        axis = {"title": COST_LABELS[cost], "type": axis_scale(values), "tickvals": axis_ticks(values)}
        figure.update_xaxes(**axis, row=1, col=column)
    figure.update_yaxes(title="validation top-1, %", row=1, col=1)
    figure.update_layout(title=figure_title(studies), template="plotly_white", height=560, hovermode="closest")
    html: str = figure.to_html(include_plotlyjs=True, full_html=True, config={"displaylogo": False})
    return html.encode()


def add_points(figure: go.Figure, points: Sequence[TrialPoint], cost: str, study: str, index: int, column: int) -> None:
    """Add the points of one study and one main block type to one panel of the page.

    Args:
        index: the study's position among the studies, from 0.
        column: the panel, from 1.
    """
    texts = [
        f"<b>{study}, trial {p.number}</b><br>{p.label.replace('; ', '<br>')}<br>top-1 {p.top1:.1%}"
        + ("" if p.deviation is None else f"<br>over {p.seeds} seeds {p.mean:.1%} ± {100 * p.deviation:.1f}")
        + "".join(f"<br>{value:.4g} {COST_LABELS[name]}" for name, value in p.costs.items() if math.isfinite(value))
        for p in points
    ]
    block = points[0].main_block
    repeated = [p for p in points if p.deviation is not None]
    if repeated:
        spread = {"type": "data", "array": [100 * (p.deviation or 0) for p in repeated], "thickness": 1}
        figure.add_scatter(
            x=[p.costs[cost] for p in repeated], y=[100 * p.mean for p in repeated], error_y=spread, mode="lines",
            line={"width": 0, "color": "black"}, hoverinfo="skip", showlegend=False, row=1, col=column,
        )  # fmt: skip
    colour, symbol = BLOCK_COLOURS.get(block, BLOCK_COLOURS["mixed"]), STUDY_SYMBOLS[index % 4]
    figure.add_scatter(
        x=[p.costs[cost] for p in points],
        y=[100 * p.top1 for p in points],
        mode="markers",
        marker={"color": colour, "size": 10, "symbol": symbol},
        name=(f"mostly {block}" if mixes_blocks(points) and block != "mixed" else block) + f", {study}" * (index > 0),
        legendgroup=f"{study} {block}",
        showlegend=column == 1,
        text=texts,
        hovertemplate="%{text}<extra></extra>",
        row=1,
        col=column,
    )


def search_progress(volumes: Sequence[float], shares: Mapping[str, Mapping[str, float]], against: str) -> bytes:
    """Draw the hypervolume over the trials, and how much each dimension matters, as PNG.

    Args:
        volumes: the hypervolume after each finished trial.
        shares: for each metric, each dimension's share of its variance; empty: only the hypervolume is drawn.
        against: name of the cost.
    """
    figure = Figure(figsize=(4.5 * (1 + len(shares)), 3.8), layout="constrained")
    curve, *bars = figure.subplots(1, 1 + len(shares), squeeze=False)[0]
    curve.plot(range(1, len(volumes) + 1), volumes, marker="o", markersize=3, color=FRONT_COLOURS[0])
    curve.set_xlabel("finished trials")
    curve.set_ylabel(f"hypervolume (top-1 against {against})")
    curve.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    curve.grid(alpha=0.25)
    for axes, (metric, values) in zip(bars, shares.items(), strict=True):
        names = list(values)[::-1]
        axes.barh(names, [values[name] for name in names], color="#1b6ca8")
        axes.set_xlim(0, 1)
        axes.set_xlabel(f"share of the variance of {metric}")
        if not names:
            axes.text(0.5, 0.5, "too few trials", ha="center", va="center", transform=axes.transAxes, color="#777777")
            axes.set_yticks([])
    return to_png(figure)


def rank_agreement_image(inherited: Sequence[float], alone: Sequence[float]) -> bytes:
    """Draw the top-1 of members trained alone against their top-1 with a supernet's weights, as PNG."""
    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.scatter([100 * top1 for top1 in inherited], [100 * top1 for top1 in alone], color=BLOCK_COLOURS["parallel"])
    axes.set_xlabel("validation top-1 with inherited weights, %")
    axes.set_ylabel("trained alone, %")
    axes.grid(alpha=0.25)
    return to_png(figure)


def mixes_blocks(points: Sequence[TrialPoint]) -> bool:
    """Return whether any model has more than one block type."""
    return any(len(set(point.blocks)) > 1 for point in points)


def figure_title(studies: StudyPoints) -> str:
    """The names of the studies, and how many of their trials are drawn."""
    return "; ".join(f"{name}: {len(points)} trials" for name, points in studies.items())


def front_line(points: Sequence[TrialPoint], numbers: Sequence[int], cost: str) -> tuple[list[float], list[float]]:
    """The corners of a front's line: costs, and top-1 in percent.

    Args:
        numbers: the trials of the front, cheapest first.
    """
    by_number = {point.number: point for point in points}
    on_front = [by_number[number] for number in numbers if number in by_number]
    return [point.costs[cost] for point in on_front], [100 * point.top1 for point in on_front]


def known_costs(studies: StudyPoints) -> list[str]:
    """The costs that any trial has; all of them if there is no trial."""
    return [cost for cost in COST_LABELS if finite_costs(studies, cost)] or list(COST_LABELS)


def finite_costs(studies: StudyPoints, cost: str) -> list[float]:
    """All finite values of a cost."""
    return [v for points in studies.values() for point in points if math.isfinite(v := point.costs[cost])]


def axis_scale(values: Sequence[float]) -> str:
    """The type of an axis with these values, ``log`` or ``linear``."""
    return "log" if values and min(values) > 0 and max(values) > LOG_SCALE_RATIO * min(values) else "linear"


def axis_ticks(values: Sequence[float]) -> list[float] | None:
    """Round numbers for a logarithmic axis; None lets Plotly choose."""
    if axis_scale(values) != "log":
        return None
    powers = range(math.floor(math.log10(min(values))) - 1, math.ceil(math.log10(max(values))) + 1)
    return [step * 10.0**power for power in powers for step in (1, 2, 5)]


def variants_in_range(variants: VariantCosts, cost: str, values: Sequence[float]) -> list[tuple[str, float]]:
    """The published variants whose cost is within ``MARK_FACTOR`` of the given values, with that cost."""
    known = [(name, costs[COSTS[cost]]) for name, costs in variants.items() if COSTS[cost] in costs]
    return [(name, v) for name, v in known if values and min(values) / MARK_FACTOR <= v <= max(values) * MARK_FACTOR]
