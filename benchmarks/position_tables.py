"""Draw what training has added to a model's position tables, below the motions of the embedded motion set.

python benchmarks/position_tables.py runs/demo --out docs/tables.png

A run starts with random tables, which its seed gives again. They are subtracted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import SubFigure

from pipelines.runs.models import load_trained_model
from posmlp import create_model
from posmlp.model.backbone import PosMLPVideo
from posmlp.video.motion import MOTION_CLASSES, render_motion

SCENE = 2081  # a seed with which the shape stays inside the frame in all motions


def draw_motions(figure: SubFigure) -> None:
    """Draw each class as a strip of four moments of the same scene."""
    axes = figure.subplots(2, 4, gridspec_kw={"left": 0.02, "right": 0.98, "wspace": 0.06, "bottom": 0.02})
    figure.suptitle("eight motions: each of a pair is the other played backwards", fontsize=10, x=0.01, ha="left")
    for k, (ax, name) in enumerate(zip(axes.T.flatten(), MOTION_CLASSES, strict=True)):
        clip = render_motion(k, np.random.default_rng(SCENE))
        moments = np.linspace(0, len(clip) - 1, 4).round().astype(int)
        ax.imshow(np.concatenate(list(clip[moments]), axis=1))
        ax.set_title(name, fontsize=8, pad=2)
        ax.axis("off")


def learned_part(run: str) -> PosMLPVideo:
    """A run's model, with what training has added to its fresh weights in place of its weights.

    Raises:
        SystemExit: the run started with weights from a file.
    """
    model, info = load_trained_model(run)
    config = info.recipe()
    if config.model.weights:
        raise SystemExit(f"{run} started with the weights {config.model.weights}; give a run that started fresh")
    torch.manual_seed(config.train.seed)  # as a training worker does
    fresh = create_model(config.model.name, **config.model.overrides())
    with torch.no_grad():
        for weight, start in zip(model.parameters(), fresh.parameters(), strict=True):
            weight.sub_(start)
    return model


def draw_tables(figure: SubFigure, model: PosMLPVideo) -> None:
    """Draw a row for each stage: spatial tables as maps over (dy, dx), temporal tables as lines of a map over dt."""
    grids = figure.subfigures(1, 2, width_ratios=[3, 2])
    titles = ("added to spatial tables, one map a channel group", "added to temporal tables, one line a channel group")
    for grid, title in zip(grids, titles, strict=True):
        grid.suptitle(title, fontsize=10, x=0.02, ha="left")
    stages = [stage.blocks[-1] for stage in model.stages]
    columns = 8
    spatial = grids[0].subplots(len(stages), columns, gridspec_kw={"hspace": 0.12, "wspace": 0.08})
    temporal = grids[1].subplots(len(stages), 1, sharex=True, gridspec_kw={"hspace": 0.25})
    for i, block in enumerate(stages):
        gate = block.units["spatial"].gate
        _, h, w = gate.window
        maps = gate.table.detach().view(-1, 2 * h - 1, 2 * w - 1).numpy()
        for ax in spatial[i]:
            ax.axis("off")
        for ax, image in zip(spatial[i], maps[:columns], strict=False):
            draw_map(ax, image, np.abs(maps).max())
        table = block.units["temporal"].gate.table.detach().numpy()
        t = block.units["temporal"].gate.window[0]
        draw_map(temporal[i], table, np.abs(table).max(), extent=(-t + 0.5, t - 0.5, len(table) - 0.5, -0.5))
        temporal[i].set_yticks([])
        temporal[i].set_ylabel(f"stage {i + 1}", fontsize=8)
    temporal[-1].set_xlabel("frames from input to output", fontsize=8)
    temporal[-1].tick_params(labelsize=7)


def draw_map(ax: plt.Axes, image: np.ndarray, limit: float, **kwargs: object) -> None:
    """Draw a map; white is 0, red is positive and blue is negative."""
    ax.imshow(image, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest", **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run of parallel blocks, such as runs/demo")
    parser.add_argument("--out", type=Path, default=Path("docs/tables.png"))
    args = parser.parse_args()
    figure = plt.figure(figsize=(11, 7))
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.9])
    draw_motions(top)
    draw_tables(bottom, learned_part(str(args.run)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)
    print(args.out)


if __name__ == "__main__":
    main()
