"""Pictures of fronts: accuracy against each cost, as PNG and as a page to point at; and how a search went."""

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

from pipelines.tracking.plots import png

AXES = {"latency": "ms a clip", "gmacs": "GMACs", "params": "M parameters"}
COLOURS = {
    "parallel": "#1b6ca8",
    "cascade_ts": "#e07b1a",
    "cascade_st": "#b8a100",
    "joint": "#2c9c5a",
    "spatial": "#8c6bb1",
    "mixed": "#8a8a8a",
}
LINES = ("#222222", "#c23b75", "#3b77c2", "#7a9a01")  # of the studies' fronts
SYMBOLS = ("circle", "square", "triangle-up", "diamond")
LOG_FROM = 5.0  # times that the dearest costs the cheapest, from which an axis is logarithmic
NEAR = 3.0  # a published variant is marked if it is within this factor of what was trained


@dataclass(frozen=True)
class Point:
    """A trial as it is drawn.

    Attributes:
        top1: of the first seed, by which it is placed.
        mean, deviation, seeds: of the top-1 over all seeds.
        costs: by the names of ``AXES``.
        blocks: the block type of each stage.
        label: its member, in words.
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
    def kind(self) -> str:
        """The block type of more stages than any other, or ``mixed``."""
        (kind, most), *others = Counter(self.blocks).most_common()
        return kind if all(count < most for _, count in others) else "mixed"


Layers = Mapping[str, Sequence[Point]]  # by study
Steps = Mapping[str, Mapping[str, Sequence[int]]]  # by study and cost: the numbers of the front's trials, by cost
Marks = Mapping[str, Mapping[str, float]]  # by variant: its costs as metrics
METRICS = {"gmacs": "cost/gmacs", "params": "cost/params_m", "latency": "cost/latency_ms"}


def picture(layers: Layers, steps: Steps, marks: Marks) -> bytes:
    """Accuracy against each cost, a panel a cost, as PNG."""
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    costs = known_costs(layers)
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axes, cost in zip(panels, costs, strict=True):
        for place, (name, points) in enumerate(layers.items()):
            draw_points(axes, points, cost, "white" if len(layers) == 1 else LINES[place % 4])
            line = stairs(points, steps[name][cost], cost)
            axes.plot(*line, color=LINES[place % 4], drawstyle="steps-post", linewidth=1.2, zorder=1)
        values = costs_of(layers, cost)
        if scale(values) == "log":
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
        for variant, value in near(marks, cost, values):
            axes.axvline(value, color="#999999", linestyle=":", linewidth=1)
            place_at = (value, 0.02)
            axes.annotate(
                f" {variant}", place_at, xycoords=("data", "axes fraction"), color="#777777", rotation=90, fontsize=8
            )
        axes.set_xlabel(AXES[cost])
        axes.grid(alpha=0.25, which="both")
    panels[0].set_ylabel("validation top-1, %")
    sectors = "; sectors: the stages' blocks, clockwise from the top" if any(map(mixed, layers.values())) else ""
    figure.suptitle(title(layers) + sectors, fontsize=11)
    kinds = [kind for kind in COLOURS if any(kind in p.blocks for points in layers.values() for p in points)]
    handles = [Line2D([], [], linestyle="", marker="o", color=COLOURS[kind], label=kind) for kind in kinds]
    for place, name in enumerate(layers):
        label = f"front of {name}" if len(layers) > 1 else "front"
        handles.append(Line2D([], [], color=LINES[place % 4], label=label))
    if any(p.deviation is not None for points in layers.values() for p in points):
        handles.append(Line2D([], [], linestyle="", marker="_", color="black", label="over seeds: mean ± deviation"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    return png(figure)


def draw_points(axes: Axes, points: Sequence[Point], cost: str, edge: str) -> None:
    """The trials of a study, each a disc with a sector a stage, clockwise from the top; and the spread over seeds."""
    for point in points:
        value, share = point.costs[cost], 360 / len(point.blocks)
        if point.deviation is not None:
            style = {"color": "black", "fmt": "_", "markersize": 8, "capsize": 3, "linewidth": 1, "zorder": 2}
            axes.errorbar(value, 100 * point.mean, yerr=100 * point.deviation, **style)
        axes.scatter(value, 100 * point.top1, s=95, color=edge, zorder=3, linewidths=0)
        for stage, kind in enumerate(point.blocks):
            sector = Path.wedge(90 - share * (stage + 1), 90 - share * stage)
            colour = COLOURS.get(kind, COLOURS["mixed"])
            axes.scatter(value, 100 * point.top1, s=75, marker=sector, color=colour, zorder=4, linewidths=0)


def page(layers: Layers, steps: Steps, marks: Marks) -> bytes:
    """The same as one HTML page, which tells of each point when it is pointed at. It needs no network."""
    costs = known_costs(layers)
    figure = make_subplots(1, len(costs), shared_yaxes=True, horizontal_spacing=0.03)
    for column, cost in enumerate(costs, start=1):
        values = costs_of(layers, cost)
        for place, (name, points) in enumerate(layers.items()):
            x, y = stairs(points, steps[name][cost], cost)
            line = {"shape": "hv", "color": LINES[place % 4], "width": 1.5}
            figure.add_scatter(
                x=x, y=y, mode="lines", line=line, name=f"front of {name}", legendgroup=name, hoverinfo="skip",
                showlegend=column == 1, row=1, col=column,
            )  # fmt: skip
            for kind in dict.fromkeys(point.kind for point in points):
                of_kind = [point for point in points if point.kind == kind]
                add_kind(figure, of_kind, cost, name, place, column)
        number = "" if column == 1 else str(column)
        for variant, value in near(marks, cost, values):
            figure.add_vline(x=value, line={"dash": "dot", "color": "#999999"}, row=1, col=column)
            at = math.log10(value) if scale(values) == "log" else value  # annotations on log axes are given as powers
            figure.add_annotation(
                x=at, y=1, xref=f"x{number}", yref=f"y{number} domain", text=variant, showarrow=False,
                yanchor="bottom", font={"color": "#777777", "size": 11},
            )  # fmt: skip
        figure.update_xaxes(title=AXES[cost], type=scale(values), tickvals=ticks(values), row=1, col=column)
    figure.update_yaxes(title="validation top-1, %", row=1, col=1)
    figure.update_layout(title=title(layers), template="plotly_white", height=560, hovermode="closest")
    html: str = figure.to_html(include_plotlyjs=True, full_html=True, config={"displaylogo": False})
    return html.encode()


def add_kind(figure: go.Figure, points: Sequence[Point], cost: str, study: str, place: int, column: int) -> None:
    """The points of one study and block type, in one panel of the page."""
    texts = [
        f"<b>{study}, trial {p.number}</b><br>{p.label.replace('; ', '<br>')}<br>top-1 {p.top1:.1%}"
        + ("" if p.deviation is None else f"<br>over {p.seeds} seeds {p.mean:.1%} ± {100 * p.deviation:.1f}")
        + "".join(f"<br>{value:.4g} {AXES[name]}" for name, value in p.costs.items() if math.isfinite(value))
        for p in points
    ]
    kind = points[0].kind
    repeated = [p for p in points if p.deviation is not None]
    if repeated:
        spread = {"type": "data", "array": [100 * (p.deviation or 0) for p in repeated], "thickness": 1}
        figure.add_scatter(
            x=[p.costs[cost] for p in repeated], y=[100 * p.mean for p in repeated], error_y=spread, mode="lines",
            line={"width": 0, "color": "black"}, hoverinfo="skip", showlegend=False, row=1, col=column,
        )  # fmt: skip
    figure.add_scatter(
        x=[p.costs[cost] for p in points],
        y=[100 * p.top1 for p in points],
        mode="markers",
        marker={"color": COLOURS.get(kind, COLOURS["mixed"]), "size": 10, "symbol": SYMBOLS[place % 4]},
        name=(f"mostly {kind}" if mixed(points) and kind != "mixed" else kind) + f", {study}" * (place > 0),
        legendgroup=f"{study} {kind}",
        showlegend=column == 1,
        text=texts,
        hovertemplate="%{text}<extra></extra>",
        row=1,
        col=column,
    )


def progress(volumes: Sequence[float], shares: Mapping[str, Mapping[str, float]], against: str) -> bytes:
    """The hypervolume over the trials, and how much each dimension matters for the accuracy and for the cost."""
    figure = Figure(figsize=(13.5, 3.8), layout="constrained")
    grown, *bars = figure.subplots(1, 1 + len(shares))
    grown.plot(range(1, len(volumes) + 1), volumes, marker="o", markersize=3, color=LINES[0])
    grown.set_xlabel("finished trials")
    grown.set_ylabel(f"hypervolume (top-1 against {against})")
    grown.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    grown.grid(alpha=0.25)
    for axes, (what, values) in zip(bars, shares.items(), strict=True):
        names = list(values)[::-1]
        axes.barh(names, [values[name] for name in names], color="#1b6ca8")
        axes.set_xlim(0, 1)
        axes.set_xlabel(f"share of the variance of {what}")
        if not names:
            axes.text(0.5, 0.5, "too few trials", ha="center", va="center", transform=axes.transAxes, color="#777777")
            axes.set_yticks([])
    return png(figure)


def mixed(points: Sequence[Point]) -> bool:
    """Whether some model has more than one block type."""
    return any(len(set(point.blocks)) > 1 for point in points)


def title(layers: Layers) -> str:
    """The studies and how many of their trials are drawn."""
    return "; ".join(f"{name}: {len(points)} trials" for name, points in layers.items())


def stairs(points: Sequence[Point], numbers: Sequence[int], cost: str) -> tuple[list[float], list[float]]:
    """The front as corners: costs, and accuracies in percent."""
    places = {point.number: point for point in points}
    chosen = [places[number] for number in numbers if number in places]
    return [point.costs[cost] for point in chosen], [100 * point.top1 for point in chosen]


def known_costs(layers: Layers) -> list[str]:
    """The costs that any trial has; all while there is none."""
    return [cost for cost in AXES if costs_of(layers, cost)] or list(AXES)


def costs_of(layers: Layers, cost: str) -> list[float]:
    """All finite costs in a panel."""
    return [v for points in layers.values() for point in points if math.isfinite(v := point.costs[cost])]


def scale(values: Sequence[float]) -> str:
    """The kind of axis for some costs."""
    return "log" if values and min(values) > 0 and max(values) > LOG_FROM * min(values) else "linear"


def ticks(values: Sequence[float]) -> list[float] | None:
    """Round numbers on a logarithmic axis; None: as the axis likes."""
    if scale(values) != "log":
        return None
    powers = range(math.floor(math.log10(min(values))) - 1, math.ceil(math.log10(max(values))) + 1)
    return [step * 10.0**power for power in powers for step in (1, 2, 5)]


def near(marks: Marks, cost: str, values: Sequence[float]) -> list[tuple[str, float]]:
    """The variants whose cost is not far from what was trained."""
    known = [(name, costs[METRICS[cost]]) for name, costs in marks.items() if METRICS[cost] in costs]
    return [(name, v) for name, v in known if values and min(values) / NEAR <= v <= max(values) * NEAR]


def agreement(inherited: Sequence[float], alone: Sequence[float]) -> bytes:
    """The accuracy of a supernet's members with inherited weights against that trained alone, as PNG."""
    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.scatter([100 * value for value in inherited], [100 * value for value in alone], color=COLOURS["parallel"])
    axes.set_xlabel("validation top-1 with inherited weights, %")
    axes.set_ylabel("trained alone, %")
    axes.grid(alpha=0.25)
    return png(figure)
