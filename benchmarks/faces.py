"""Draw what moves in the embedded faces, and what the temporal tables of a trained model make of it.

    python benchmarks/faces.py                                   # docs/faces.png, without a model
    python benchmarks/faces.py runs/faces-by-subject/trial-000   # docs/faces_tables.png too

The second picture has the learned temporal tables of each stage, next to those that training started from, and where
the temporal gate of the first stage carries the movements of three clips to other frames.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import SubFigure
from position_tables import draw_map

from pipelines.runs.models import load_trained_model
from posmlp import create_model
from posmlp.config import Config
from posmlp.model.backbone import PosMLPVideo, from_windows
from posmlp.video.augment import to_input
from posmlp.video.clip import resize
from posmlp.video.faces import FIRST_PART, PARTS, Face, FaceClip, render_face
from posmlp.video.sampling import uniform_indices

ACT = 10  # frames of a part's movement
GAIN = 2  # of differences, in the first picture
SUBJECT, SCENE = 3, 5  # seeds


def draw_clip(kind: str, size: int) -> FaceClip:
    """A clip of a class; all classes have the same face and the same movements."""
    first = FIRST_PART[kind]
    order = [first, *(part for part in PARTS if part != first)]
    face, rng = Face.draw(np.random.default_rng(SUBJECT)), np.random.default_rng(SCENE)
    return render_face(face, order, rng, size=size, act=ACT)


def draw_motion(out: Path) -> None:
    """Draw the first frame of each class and the middle of each movement, with its difference from the first."""
    figure, axes = plt.subplots(2 * len(FIRST_PART), 1 + len(PARTS), figsize=(7.5, 11.5), layout="constrained")
    for row, kind in enumerate(FIRST_PART):
        frames = draw_clip(kind, 160).frames
        for column, moment in enumerate([0, *(3 * ACT // 4 + ACT * k for k in range(len(PARTS)))]):
            above, below = axes[2 * row, column], axes[2 * row + 1, column]
            above.imshow(frames[moment])
            above.set_title(f"frame {moment}", fontsize=9)
            if moment:
                below.imshow(np.clip(128 + GAIN * (frames[moment].astype(float) - frames[0]), 0, 255).astype(np.uint8))
            else:
                below.text(1, 0.5, f"difference\nfrom frame 0, x {GAIN}", ha="right", va="center", fontsize=9)
                below.set_frame_on(False)
            for ax in (above, below):
                ax.set_xticks([])
                ax.set_yticks([])
        axes[2 * row, 0].set_ylabel(kind, fontsize=11)
    figure.savefig(out, dpi=75)
    print(out)


def temporal_tables(model: PosMLPVideo) -> list[np.ndarray]:
    """The temporal table of each stage's last block: ``[groups, 2T-1]``."""
    return [stage.blocks[-1].units["temporal"].gate.table.detach().numpy() for stage in model.stages]


def draw_tables(figure: SubFigure, before: PosMLPVideo, after: PosMLPVideo) -> None:
    """Draw the temporal tables of each stage at the start and after training, with one scale for both."""
    figure.suptitle("temporal tables, one line a channel group", fontsize=10)
    axes = figure.subplots(len(after.stages), 2, sharex=True, gridspec_kw={"left": 0.12, "right": 0.97, "bottom": 0.09})
    for stage, pair in enumerate(zip(temporal_tables(before), temporal_tables(after), strict=True)):
        limit, t = max(np.abs(table).max() for table in pair), (pair[0].shape[1] + 1) // 2
        for ax, table, when in zip(axes[stage], pair, ("at the start", "after training"), strict=True):
            draw_map(ax, table, limit, extent=(-t + 0.5, t - 0.5, len(table) - 0.5, -0.5))
            ax.set_yticks([])
            ax.set_xticks(range(1 - t, t))
            ax.tick_params(labelsize=7)
            if not stage:
                ax.set_title(when, fontsize=9)
        axes[stage, 0].set_ylabel(f"stage {stage + 1}", fontsize=8)
    for ax in axes[-1]:
        ax.set_xlabel("frames from input to output", fontsize=8)


@torch.no_grad()
def mixed(model: PosMLPVideo, x: torch.Tensor) -> torch.Tensor:
    """What the temporal gate of the first stage's last block passes on of other frames: ``[C, T, H, W]``, fp64.

    The gate passes on v times (the mixed u + bias); this is v times the mixed u, at the tokens of the stage.
    """
    model, x = deepcopy(model).double(), x.double()  # in fp64 each gate runs as a module of its own
    gate, found = model.stages[0].blocks[-1].units["temporal"].gate, []

    def keep(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        _, v, extent = inputs
        found.append(output - v * gate.token_bias(extent))  # [C, B, W, T, N]

    handle = gate.register_forward_hook(keep)
    maps = model.features(x)[0]
    handle.remove()
    extent = (maps.shape[2], *(min(n, w) for n, w in zip(maps.shape[3:], model.stages[0].window[1:], strict=True)))
    return from_windows(found[0], extent, maps.shape[2:])[0]


def draw_responses(figure: SubFigure, model: PosMLPVideo, config: Config) -> None:
    """Draw the sampled frames of a clip of each class, under what the temporal gate makes of its movements."""
    figure.suptitle("what the temporal gate of stage 1 passes on, against a clip at rest", fontsize=10)
    variant = config.model.variant()
    layout = {"left": 0.05, "right": 0.99, "wspace": 0.05, "hspace": 0.05, "bottom": 0.09}
    axes = figure.subplots(len(FIRST_PART), variant.frames, gridspec_kw=layout)
    for row, kind in zip(axes, FIRST_PART, strict=True):
        frames = draw_clip(kind, 64).frames
        frames = resize(frames[uniform_indices(len(frames), variant.frames, None)], *(variant.image_size,) * 2)
        inputs = (to_input(torch.from_numpy(clip)[None], config) for clip in (frames, frames[[0] * len(frames)]))
        moving, still = (mixed(model, x) for x in inputs)
        response = (moving - still).abs().mean(0).numpy()
        for ax, frame, image in zip(row, frames, response, strict=True):
            ax.imshow(frame.mean(-1), cmap="gray", extent=(0, 1, 1, 0))
            ax.imshow(image, cmap="inferno", alpha=0.65, vmin=0, vmax=response.max(), extent=(0, 1, 1, 0))
            ax.set_xticks([])
            ax.set_yticks([])
        row[0].set_ylabel(kind, fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="folder of a run of the recipe faces, or of a fold of it")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for the pictures (default: %(default)s)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    draw_motion(args.out / "faces.png")
    if args.run:
        after, info = load_trained_model(args.run)
        config = info.recipe()
        torch.manual_seed(config.train.seed)  # as the run did
        before = create_model(config.model.name, **config.model.overrides())
        figure = plt.figure(figsize=(11, 5.2))
        left, right = figure.subfigures(1, 2, width_ratios=[2, 3])
        draw_tables(left, before, after)
        draw_responses(right, after, config)
        figure.savefig(args.out / "faces_tables.png", dpi=110)
        print(args.out / "faces_tables.png")


if __name__ == "__main__":
    main()
