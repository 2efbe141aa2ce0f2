"""Figures of Pareto fronts (main metric against each cost, as a PNG image and an interactive page) and of a search."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.path import Path
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator
from matplotlib.transforms import IdentityTransform
from plotly.subplots import make_subplots

from pipelines.tracking.plots import to_png
from posmlp.metrics import COSTS, MainMetric
from posmlp.text import quantity

COST_LABELS = {"latency": "ms per clip", "gmacs": "GMACs", "params": "M parameters"}
BLOCK_COLOURS = {
    "parallel": "#1b6ca8",
    "cascade_ts": "#e07b1a",
    "cascade_st": "#b8a100",
    "joint": "#2c9c5a",
    "spatial": "#8c6bb1",
    "temporal": "#c0504d",
    "mixed": "#8a8a8a",
}
FRONT_COLOURS = ("#222222", "#c23b75", "#3b77c2", "#7a9a01")  # by study
STUDY_SYMBOLS = ("circle", "square", "triangle-up", "diamond")  # by study
LOG_SCALE_RATIO = 5.0  # an axis is logarithmic if the largest cost is more than this multiple of the smallest
FIRST, LAST = 1, 2000  # ranks in the page's legend, whose other entries are in the order in which they are drawn
INTERVAL_COLOUR = "#8a8a8a"
INTERVAL_OPACITY, INTERVAL_WIDTH = 0.6, 3.0  # in the image; wider than the front's line, which may run along them
MINOR_COLOUR = "#b5b5b5"  # of members without fresh seeds, where others have some
LEGEND_COLUMNS = 7  # at most, in the image
LABEL_SIZE = 8  # of a number in the image, in points
DISC_RADIUS = 5.0  # in points
# Where a number may be, best first: horizontally and vertically from the point, in points. No other member of the front
# is to the upper left of one.
LABEL_OFFSETS = ((-6, 5), (6, 5), (6, -12), (-6, -12), (-6, 15), (6, 15))
MIN_OPACITY = 0.25  # of a member that is certainly not on the front
MARK_FACTOR = 3.0  # a published variant is marked if its cost is within this factor of the trials' costs


@dataclass(frozen=True)
class TrialPoint:
    """A member as it is drawn.

    Attributes:
        number: of its first trial.
        first: main metric of the first seed.
        fresh: its mean over the fresh seeds; None if it has none.
        interval: 95 % interval of the drawn value; None: not known.
        seeds: number of fresh seeds.
        probability: of being on the front, by cost; empty if it is not known.
        repeated_study: its study has fresh seeds. Then members without are drawn small and grey.
        costs: by the names of ``COST_LABELS``; NaN if a cost is not known.
        blocks: block type of each stage.
        label: the member in words.
    """

    number: int
    first: float
    fresh: float | None
    interval: tuple[float, float] | None
    seeds: int
    probability: Mapping[str, float]
    repeated_study: bool
    costs: Mapping[str, float]
    blocks: tuple[str, ...]
    label: str

    @property
    def value(self) -> float:
        """The drawn value: of the fresh seeds, else of the first seed."""
        return self.first if self.fresh is None else self.fresh

    @property
    def minor(self) -> bool:
        """Return whether the member cannot be on the front, because others have fresh seeds and it has none."""
        return self.repeated_study and self.fresh is None

    def opacity(self, cost: str) -> float:
        """Opacity in the panel of a cost: pale if the member is hardly on the front."""
        return MIN_OPACITY + (1 - MIN_OPACITY) * self.probability.get(cost, 1.0)

    @property
    def main_block(self) -> str:
        """The block type of more stages than any other, or ``mixed``."""
        (block, most), *others = Counter(self.blocks).most_common()
        return block if all(count < most for _, count in others) else "mixed"


StudyPoints = Mapping[str, Sequence[TrialPoint]]  # by study
StudyFronts = Mapping[str, Mapping[str, Sequence[int]]]  # by study and cost: the front's trials, cheapest first
VariantCosts = Mapping[str, Mapping[str, float]]  # by variant and metric name


def front_image(
    studies: StudyPoints, fronts: StudyFronts, variants: VariantCosts, title: str, main: MainMetric
) -> bytes:
    """Draw the main metric against each cost, one panel per cost, as PNG.

    Args:
        variants: the costs of published variants; those near the trials are marked.
        main: of all studies.
    """
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    costs = known_costs(studies)
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axes, cost in zip(panels, costs, strict=True):
        for index, (name, points) in enumerate(studies.items()):
            colour = FRONT_COLOURS[index % 4]
            draw_points(axes, points, cost, "white" if len(studies) == 1 else colour)
            x, y = front_line(points, fronts[name][cost], cost)
            axes.plot(x, y, color=colour, drawstyle="steps-post", linewidth=1.2, zorder=1)
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
    panels[0].set_ylabel(f"validation {main.title}, %")
    for axes, cost in zip(panels, costs, strict=True):  # once all limits are known
        number_points(axes, studies, fronts, cost)
    mixed = any(map(mixes_blocks, studies.values()))
    sectors = "; sectors: the stages' blocks, clockwise from the top" if mixed else ""
    figure.suptitle(title + sectors, fontsize=11)
    drawn = [point for points in studies.values() for point in points]
    used = [block for block in BLOCK_COLOURS if any(block in p.blocks for p in drawn if not p.minor)]
    handles = [Line2D([], [], linestyle="", marker="o", color=BLOCK_COLOURS[block], label=block) for block in used]
    for index, name in enumerate(studies):
        if not any(fronts[name].values()):
            continue
        label = "Pareto front" + f" of {name}" * (len(studies) > 1)
        label += " (trial, probability)" if any(p.probability for p in studies[name]) else " (trial)"
        handles.append(Line2D([], [], color=FRONT_COLOURS[index % 4], label=label))
    if any(p.interval for p in drawn):
        sources = ["seeds"] * any(p.fresh is not None for p in drawn) + [main.unit] * main.is_mean
        label = f"95 % interval ({' and '.join(sources)}{' alone' * (len(sources) == 1)})"
        handles.append(
            Line2D(
                [], [], linestyle="", marker="|", markersize=11, markeredgewidth=INTERVAL_WIDTH, color=INTERVAL_COLOUR,
                alpha=INTERVAL_OPACITY, label=label,
            )
        )  # fmt: skip
    if any(p.probability for p in drawn):
        label = "pale: hardly on this front"
        handles.append(Line2D([], [], linestyle="", marker="o", color="black", alpha=MIN_OPACITY, label=label))
    if any(p.minor for p in drawn):
        label = "first seed alone"
        handles.append(Line2D([], [], linestyle="", marker="o", markersize=4, color=MINOR_COLOUR, label=label))
    rows = math.ceil(len(handles) / LEGEND_COLUMNS)
    columns = math.ceil(len(handles) / rows) if handles else 1
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    return to_png(figure)


def draw_points(axes: Axes, points: Sequence[TrialPoint], cost: str, edge: str) -> None:
    """Draw a study's members: a disc with one sector per stage, clockwise from the top, and its interval."""
    minor = [point for point in points if point.minor]
    x, y = [point.costs[cost] for point in minor], [100 * point.value for point in minor]
    axes.scatter(x, y, s=16, color=MINOR_COLOUR, zorder=1.5, linewidths=0)
    parts: list[tuple[Path, float, tuple[float, float], tuple[float, ...]]] = []  # outline, size, place, colour
    lines, line_colours = [], []
    for point in points:
        if point.minor or not math.isfinite(point.costs[cost]):
            continue
        place, share, opacity = (point.costs[cost], 100 * point.value), 360 / len(point.blocks), point.opacity(cost)
        if point.interval is not None:
            lines.append([(place[0], 100 * end) for end in point.interval])
            line_colours.append(to_rgba(INTERVAL_COLOUR, INTERVAL_OPACITY * opacity))
        parts.append((Path.unit_circle(), 95, place, to_rgba(edge)))
        for stage, block in enumerate(point.blocks):
            sector = Path.wedge(90 - share * (stage + 1), 90 - share * stage)
            colour = to_rgba(BLOCK_COLOURS.get(block, BLOCK_COLOURS["mixed"]), opacity)
            parts.append((sector, 75, place, colour))
    if not parts:
        return
    # Two collections for all members: an artist for each sector takes minutes for a thousand members.
    axes.add_collection(LineCollection(lines, colors=line_colours, linewidths=INTERVAL_WIDTH, zorder=0.9))
    outlines, sizes, places, colours = zip(*parts, strict=True)
    scales = [size / 4 for size in sizes]  # as of ``scatter``: a circle's diameter is the root of its size
    discs = PathCollection(
        outlines, scales, offsets=places, offset_transform=axes.transData, facecolors=colours, linewidths=0, zorder=3
    )
    discs.set_transform(IdentityTransform())
    axes.add_collection(discs)
    axes.autoscale_view()


def number_points(axes: Axes, studies: StudyPoints, fronts: StudyFronts, cost: str) -> None:
    """Write the numbers of the fronts' trials next to their points, and how likely each is on the front.

    A number keeps off the edges, the other numbers and, if it can, the points. One without such a place is left out.
    """
    edges = np.array([*axes.get_xlim(), *axes.get_ylim()])  # this also brings the axes' transformation up to date
    figure = axes.get_figure(root=True)
    assert figure is not None
    to_points = 72 / figure.dpi
    (left, bottom), (right, top) = axes.transData.transform(edges.reshape(2, 2).T) * to_points
    major = [(p.costs[cost], 100 * p.value) for points in studies.values() for p in points if not p.minor]
    discs = axes.transData.transform([each for each in major if math.isfinite(each[0])] or np.empty((0, 2))) * to_points
    taken: list[tuple[float, float, float, float]] = []  # left, bottom, right, top of the numbers so far
    for index, (name, points) in enumerate(studies.items()):
        by_number = {point.number: point for point in points}
        for point in (by_number[number] for number in fronts[name][cost] if number in by_number):
            share = f", {point.probability[cost]:.0%}" if cost in point.probability else ""
            text, place = f"{point.number}{share}", (point.costs[cost], 100 * point.value)
            x, y = axes.transData.transform(place) * to_points
            width, free = 0.65 * LABEL_SIZE * len(text), []
            for rank, (across, up) in enumerate(LABEL_OFFSETS):
                start = x + across - (width if across < 0 else 0)
                box = (start, y + up, start + width, y + up + LABEL_SIZE)
                inside = left <= box[0] and box[2] <= right and bottom <= box[1] and box[3] <= top
                if inside and not any(map(partial(overlap, box), taken)):
                    near = np.abs(discs - ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
                    covered = (near < (width / 2 + DISC_RADIUS, LABEL_SIZE / 2 + DISC_RADIUS)).all(1).sum()
                    free.append((int(covered), rank, box))
            if not free:
                continue
            _, rank, box = min(free)
            taken.append(box)
            axes.annotate(
                text, place, LABEL_OFFSETS[rank], textcoords="offset points", fontsize=LABEL_SIZE,
                ha="right" if LABEL_OFFSETS[rank][0] < 0 else "left", color=FRONT_COLOURS[index % 4], zorder=5,
                path_effects=[withStroke(linewidth=2.5, foreground="white")], in_layout=False,
            )  # fmt: skip


def overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    """Return whether two boxes (left, bottom, right, top) overlap."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def interactive_page(
    studies: StudyPoints, fronts: StudyFronts, variants: VariantCosts, title: str, main: MainMetric
) -> bytes:
    """Draw the figure of ``front_image`` as one HTML page that describes each trial on hover. It needs no network."""
    costs = known_costs(studies)
    figure = make_subplots(1, len(costs), shared_yaxes=True, horizontal_spacing=0.03)
    # The first panel in which each study has a front: its entry in the legend is from there.
    drawn = {name: next((cost for cost in costs if fronts[name][cost]), None) for name in studies}
    for column, cost in enumerate(costs, start=1):
        values = finite_costs(studies, cost)
        for index, (name, points) in enumerate(studies.items()):
            major = [point for point in points if not point.minor]
            if minor := [point for point in points if point.minor]:
                add_points(figure, minor, main, cost, name, index, column, "first seed alone")
            add_intervals(figure, major, cost, column, name, index)
            x, y = front_line(points, fronts[name][cost], cost)
            line = {"shape": "hv", "color": FRONT_COLOURS[index % 4], "width": 1.5}
            figure.add_scatter(
                x=x, y=y, mode="lines", line=line, name=f"Pareto front of {name}", legendgroup=name, hoverinfo="skip",
                showlegend=cost == drawn.get(name), legendrank=FIRST, row=1, col=column,
            )  # fmt: skip
            for block in dict.fromkeys(point.main_block for point in major):
                with_block = [point for point in major if point.main_block == block]
                label = f"mostly {block}" if mixes_blocks(with_block) and block != "mixed" else block
                add_points(figure, with_block, main, cost, name, index, column, label)
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
    figure.update_yaxes(title=f"validation {main.title}, %", row=1, col=1)
    figure.update_layout(title=title, template="plotly_white", height=560, hovermode="closest")
    html: str = figure.to_html(include_plotlyjs=True, full_html=True, config={"displaylogo": False})
    return html.encode()


def add_intervals(
    figure: go.Figure, points: Sequence[TrialPoint], cost: str, column: int, study: str, index: int
) -> None:
    """Add the intervals of a study's members to one panel of the page, as one line with gaps.

    Args:
        column: the panel, from 1.
        index: the study's position among the studies, from 0.
    """
    x: list[float | None] = []
    y: list[float | None] = []
    for point in points:
        if point.interval is not None:
            x += [point.costs[cost], point.costs[cost], None]
            y += [100 * point.interval[0], 100 * point.interval[1], None]
    figure.add_scatter(
        x=x, y=y, mode="lines", line={"color": INTERVAL_COLOUR, "width": 1}, hoverinfo="skip",
        name="95 % interval" + f", {study}" * (index > 0), legendgroup=f"{study} interval",
        showlegend=column == 1 and bool(x), legendrank=LAST, row=1, col=column,
    )  # fmt: skip


def add_points(
    figure: go.Figure,
    points: Sequence[TrialPoint],
    main: MainMetric,
    cost: str,
    study: str,
    index: int,
    column: int,
    label: str,
) -> None:
    """Add some points of one study to one panel of the page.

    Args:
        index: the study's position among the studies, from 0.
        column: the panel, from 1.
        label: in the legend.
    """
    block, minor = points[0].main_block, points[0].minor
    colour = MINOR_COLOUR if minor else BLOCK_COLOURS.get(block, BLOCK_COLOURS["mixed"])
    points = sorted(points, key=lambda p: -p.opacity(cost))  # the legend has the opacity of the first one
    marker = {"color": colour, "size": 6 if minor else 10, "symbol": STUDY_SYMBOLS[index % 4]}
    figure.add_scatter(
        x=[p.costs[cost] for p in points],
        y=[100 * p.value for p in points],
        mode="markers",
        marker=marker | {"opacity": [p.opacity(cost) for p in points]},
        name=label + f", {study}" * (index > 0),
        legendgroup=f"{study} {label}",
        showlegend=column == 1,
        legendrank=LAST if minor else None,
        text=[hover_text(p, study, main) for p in points],
        hovertemplate="%{text}<extra></extra>",
        row=1,
        col=column,
    )


def hover_text(point: TrialPoint, study: str, main: MainMetric) -> str:
    """The description of a member that the page shows on hover."""
    lines = [f"<b>{study}, trial {point.number}</b>", *point.label.split("; ")]
    if point.fresh is not None:
        lines.append(f"{main.title} {point.fresh:.1%}, mean over {quantity(point.seeds, 'fresh seed')}")
    interval = "" if point.interval is None else f"95 % interval {point.interval[0]:.1%} to {point.interval[1]:.1%}"
    lines += [interval] if interval else []
    lines.append(f"{main.title} {point.first:.1%}, first seed")
    for name, value in point.costs.items():
        if math.isfinite(value):
            share = f", on this front {point.probability[name]:.0%}" if name in point.probability else ""
            lines.append(f"{value:.4g} {COST_LABELS[name]}{share}")
    return "<br>".join(lines)


def search_progress(
    volumes: Sequence[float], shares: Mapping[str, Mapping[str, float]], main: MainMetric, against: str
) -> bytes:
    """Draw the hypervolume over the trials, and how much each dimension matters, as PNG.

    Args:
        volumes: the hypervolume after each finished trial.
        shares: for each metric, each dimension's share of its variance; empty: only the hypervolume is drawn.
        main, against: the main metric of the study, and the name of the cost.
    """
    figure = Figure(figsize=(4.5 * (1 + len(shares)), 3.8), layout="constrained")
    curve, *bars = figure.subplots(1, 1 + len(shares), squeeze=False)[0]
    curve.plot(range(1, len(volumes) + 1), volumes, marker="o", markersize=3, color=FRONT_COLOURS[0])
    curve.set_xlabel("finished trials")
    curve.set_ylabel(f"hypervolume of the first seeds\n({main.title} against {against})")
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


def figure_title(studies: StudyPoints, inherited: bool = False) -> str:
    """The names of the studies, how many of their trials are drawn, and which studies are not repeated.

    Args:
        inherited: the trials are members of a supernet, which have no seed of their own.
    """
    texts = []
    for name, points in studies.items():
        single = bool(points) and not inherited and not any(point.fresh is not None for point in points)
        texts.append(f"{name}: {len(points)} trials" + ", one seed each, not repeated" * single)
    return "; ".join(texts)


def front_line(points: Sequence[TrialPoint], numbers: Sequence[int], cost: str) -> tuple[list[float], list[float]]:
    """The corners of a front's line: costs, and the main metric in percent.

    Args:
        numbers: the trials of the front, cheapest first.
    """
    by_number = {point.number: point for point in points}
    on_front = [by_number[number] for number in numbers if number in by_number]
    return [point.costs[cost] for point in on_front], [100 * point.value for point in on_front]


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
