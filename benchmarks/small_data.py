"""Measure top-1 on small data: train on one group of a manifest, validate on the other, with an ablation of the recipe.

    python benchmarks/small_data.py MANIFEST A C
    python benchmarks/small_data.py MANIFEST A C --seeds 1 --only full centre --out table.md train.storage=other

Each variant is the recipe ``small_data`` with the change that its name states. It is trained in both directions, A to
C and C to A, with every seed. Its weights come from two runs on drawn clips, first of single motions, then of strokes;
the seeds share these weights. All runs are ordinary runs of ``posmlp train`` in MLflow, with names like
``full-A-to-C-seed0``. A finished run is not repeated, so the same command resumes after a stop. The table has all
finished runs in ``train.storage``. The manifest needs a column ``group``.

The accuracy is that of the last epoch; no epoch is picked. "full, frames shuffled" tests the models of "full" on
shuffled frames. The difference to "full" is what these models know of motion.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from frame_order import validation_logits

from pipelines.runs.record import read_record, run_folder
from pipelines.training.train import train
from posmlp.config import Config, load_recipe
from posmlp.metrics import VAL_TOP1
from posmlp.video.motion import make_motion_set

FULL, CONTROL = "full", "full, frames shuffled"
NO_STROKES, NO_PRETRAINING = "no-strokes", "no-pretraining"
VARIANTS: dict[str, list[str]] = {  # changes to the recipe, in the order of training
    FULL: [],
    NO_STROKES: [],
    NO_PRETRAINING: [],
    "no-mixup": ["augment.mixup=0"],
    "no-ema": ["optim.ema=null"],
    "no-pace": ["data.clip_share=[1, 1]", "data.pace=0"],
    "centre": ["data.full_frame=false"],
    # Architectures start from random weights; compare them with NO_PRETRAINING. Each would need its own pretraining.
    "no-pretraining-spatial": ["model.blocks=spatial"],
    "no-pretraining-joint": ["model.blocks=joint"],
    "no-pretraining-cascade_ts": ["model.blocks=cascade_ts"],
    "no-pretraining-cascade_st": ["model.blocks=cascade_st"],
    "no-pretraining-groups-1": ["model.groups=[1, 1, 1, 1]"],
    "no-pretraining-groups-x2": ["model.groups=[16, 16, 16, 32]"],
}
CLIP_COUNTS: dict[str, dict[str, int]] = {"motion": {"train": 640, "val": 160}, "strokes": {"train": 4920, "val": 410}}
DRAWN_CLIPS = [
    "train.global_batch=16",
    "data.full_frame=false",
    "data.clip_share=[1, 1]",
    "augment.mixup=0",
    "optim.label_smoothing=0",
]
PRETRAINING = {  # changes to the recipe for pretraining: there are many clips, and stretching would blur them
    "motion": [
        *DRAWN_CLIPS,
        "train.epochs=10",
        "optim.lr=3e-3",
        "optim.warmup_epochs=2",
        "data.crop_scale=[0.9, 1.0]",
        "data.crop_ratio=[0.9, 1.1]",
    ],
    "strokes": [
        *DRAWN_CLIPS,
        "train.epochs=5",
        "optim.lr=2e-3",
        "optim.warmup_epochs=0.2",
        "data.crop_scale=[0.7, 1.0]",
        "data.crop_ratio=[0.85, 1.18]",
        "data.short_side=64",
    ],
}
SHARED_OVERRIDES = ("model.", "train.storage=", "data.cache_dir=", "tracking.", "scaling.")  # also for pretraining


def small_data_recipe(name: str, overrides: Sequence[str]) -> Config:
    """Return the recipe with overrides. It validates only at the end, so the best checkpoint is the last one."""
    config = load_recipe("small_data", [*overrides, f"name={name}"])
    return config.model_copy(update={"eval": config.eval.model_copy(update={"every": config.train.epochs})})


def finish_run(config: Config) -> str:
    """Start or resume a run unless it is finished, and return its folder."""
    folder = run_folder(config)
    record = read_record(folder)
    if record is None or record["metrics"] is None:
        start = time.perf_counter()
        result = train(config)
        seconds = time.perf_counter() - start
        print(f"== {config.name}: {result.metrics[VAL_TOP1]:.1%} in {seconds:.0f} s", flush=True)
    return folder


def pretrain(variant: str, data: Path, overrides: Sequence[str], start: str | None = None) -> str:
    """Train a variant on its sets of drawn clips, each run from the weights of the run before.

    Args:
        start: weights to train further, on strokes alone; None: random ones, which see single motions first.

    Returns:
        the folder of the last run, a value for ``model.weights``; "null" without pretraining.
    """
    weights = start or "null"
    model = load_recipe("small_data", overrides).model
    shared = [override for override in overrides if override.startswith(SHARED_OVERRIDES)]
    for kind, counts in CLIP_COUNTS.items():
        if start and kind != "strokes":
            continue
        if variant.startswith(NO_PRETRAINING) or (variant == NO_STROKES and kind == "strokes"):
            break
        drawn = make_motion_set(data / kind, kind=kind, **counts)
        splits = [f"data.{split}.path={drawn / split}.csv" for split in ("train", "val")]
        name = f"{kind}-{model.blocks or 'parallel'}-groups-{'-'.join(map(str, model.groups or ()))}"
        weights = finish_run(
            small_data_recipe(name, [*shared, *splits, *PRETRAINING[kind], f"model.weights={weights}"])
        )
    return weights


def run_config(
    variant: str, train_group: str, val_group: str, seed: int, manifest: str, overrides: Sequence[str]
) -> Config:
    """Return the recipe of one run."""
    splits = [f"data.train.path={manifest}", f"data.val.path={manifest}"]
    splits += [f"data.train.where.group={train_group}", f"data.val.where.group={val_group}", f"train.seed={seed}"]
    return small_data_recipe(f"{variant}-{train_group}-to-{val_group}-seed{seed}", [*splits, *overrides])


def final_top1(run: str) -> float | None:
    """Return the validation top-1 of the last epoch, or None if the run is not finished."""
    record = read_record(run)
    return record["metrics"][VAL_TOP1] if record and record["metrics"] else None


def shuffled_top1(run: str) -> float:
    """Return the validation top-1 of a run's model with the frames of each clip in random order."""
    logits, labels, _ = validation_logits(run, "shuffled")
    return float((logits.argmax(1) == labels).double().mean())


def format_results(results: dict[str, list[tuple[float, float]]], groups: Sequence[str]) -> str:
    """Return a Markdown table: mean and standard deviation over the seeds, of both directions and of their mean."""
    one, other = groups
    lines = [f"| variant | {one} to {other} | {other} to {one} | mean of both | seeds |", "|---|---|---|---|---|"]
    for name, pairs in results.items():
        columns = [[pair[0] for pair in pairs], [pair[1] for pair in pairs], [sum(pair) / 2 for pair in pairs]]
        cells = [f"{100 * statistics.mean(c):.1f}" for c in columns]
        if len(pairs) > 1:
            cells = [f"{cell} ± {100 * statistics.stdev(c):.1f}" for cell, c in zip(cells, columns, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(pairs)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest")
    parser.add_argument("groups", nargs=2, metavar="GROUP")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=[*VARIANTS], metavar="VARIANT")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder for the sets of drawn clips")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_intermixed_args()
    directions = (args.groups, args.groups[::-1])

    def configs(variant: str, seed: int, changes: Sequence[str]) -> list[Config]:
        return [run_config(variant, *direction, seed, args.manifest, changes) for direction in directions]

    for variant in args.only:
        changes = [*args.overrides, *VARIANTS[variant]]
        changes.append(f"model.weights={pretrain(variant, args.data, changes)}")
        for seed in range(args.seeds):
            for config in configs(variant, seed, changes):
                finish_run(config)
    results: dict[str, list[tuple[float, float]]] = {}
    for variant in VARIANTS:
        for seed in count():
            runs = [run_folder(config) for config in configs(variant, seed, args.overrides)]
            one, other = map(final_top1, runs)
            if one is None or other is None:
                break
            results.setdefault(variant, []).append((one, other))
            if variant == FULL:
                results.setdefault(CONTROL, []).append((shuffled_top1(runs[0]), shuffled_top1(runs[1])))
    text = format_results(results, args.groups)
    print("\n" + text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
