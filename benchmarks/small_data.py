"""Leave one group out, both ways: train on one group of a manifest, validate on the other; and what each part brings.

    python benchmarks/small_data.py MANIFEST A C
    python benchmarks/small_data.py MANIFEST A C --seeds 1 --only full joint --out table.md train.storage=other

Each variant is the recipe ``small_data`` but for what its name says, trained in both directions with every seed. Its
weights come from two runs on drawn clips, first of single motions, then of strokes, which its seeds share. All are runs
as ``posmlp train`` makes them, in MLflow, named such as ``full-A-to-C-seed0``; a finished one is not repeated, so the
same command goes on where it was stopped, and the table is of all that ``train.storage`` holds. The manifest needs a
column ``group``.

The accuracy is that of the last epoch, none is picked. "full, frames shuffled" is that of the models of "full", tested
on shuffled frames: what they then lose is what they knew of motion.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from order import validation_logits

from pipelines.runs.record import read_record, run_folder
from pipelines.training.train import train
from posmlp.config import Config, load_recipe
from posmlp.metrics import VAL_TOP1
from posmlp.video.motion import make_motion_set

FULL, CONTROL = "full", "full, frames shuffled"
NO_STROKES, NO_PRETRAINING = "no-strokes", "no-pretraining"
VARIANTS: dict[str, list[str]] = {  # what differs from the recipe, in the order in which they are trained
    FULL: [],
    NO_STROKES: [],
    NO_PRETRAINING: [],
    "no-mixup": ["augment.mixup=0"],
    "no-ema": ["optim.ema=null"],
    "centre": ["data.full_frame=false"],
    # Architectures start from random weights, to compare with NO_PRETRAINING; each would need drawn clips of its own.
    "no-pretraining-spatial": ["model.blocks=spatial"],
    "no-pretraining-joint": ["model.blocks=joint"],
    "no-pretraining-cascade_ts": ["model.blocks=cascade_ts"],
    "no-pretraining-cascade_st": ["model.blocks=cascade_st"],
    "no-pretraining-groups-1": ["model.groups=[1, 1, 1, 1]"],
    "no-pretraining-groups-x2": ["model.groups=[16, 16, 16, 32]"],
}
SETS: dict[str, dict[str, int]] = {"motion": {"train": 640, "val": 160}, "strokes": {"train": 2520, "val": 210}}
DRAWN = ["train.global_batch=16", "data.full_frame=false", "augment.mixup=0", "optim.label_smoothing=0"]
PRETRAINING = {  # what differs from the recipe there: many clips, which stretching would blur
    "motion": [
        *DRAWN,
        "train.epochs=10",
        "optim.lr=3e-3",
        "optim.warmup_epochs=2",
        "data.crop_scale=[0.9, 1.0]",
        "data.crop_ratio=[0.9, 1.1]",
    ],
    "strokes": [
        *DRAWN,
        "train.epochs=8",
        "optim.lr=2e-3",
        "optim.warmup_epochs=0.5",
        "data.crop_scale=[0.7, 1.0]",
        "data.crop_ratio=[0.85, 1.18]",
        "data.short_side=64",
    ],
}
SHARED = ("model.", "train.storage=", "data.cache_dir=", "tracking.", "scaling.")  # overrides that hold there too


def recipe(name: str, overrides: Sequence[str]) -> Config:
    """The recipe with overrides, validated only at its end: so its best checkpoint is its last."""
    config = load_recipe("small_data", [*overrides, f"name={name}"])
    return config.model_copy(update={"eval": config.eval.model_copy(update={"every": config.train.epochs})})


def finish(config: Config) -> str:
    """A run's folder; the run is made, or goes on, if need be."""
    folder = run_folder(config)
    record = read_record(folder)
    if record is None or record["metrics"] is None:
        start = time.perf_counter()
        result = train(config, echo=lambda line: print(line, flush=True))
        seconds = time.perf_counter() - start
        print(f"== {config.name}: {result.metrics[VAL_TOP1]:.1%} in {seconds:.0f} s", flush=True)
    return folder


def pretrained(variant: str, data: Path, overrides: Sequence[str]) -> str:
    """Where a variant's weights come from: the last of its runs on drawn clips, each of which starts from the last.

    Returns:
        the run's folder, or "null".
    """
    weights = "null"
    model = load_recipe("small_data", overrides).model
    shared = [override for override in overrides if override.startswith(SHARED)]
    for kind, counts in SETS.items():
        if variant.startswith(NO_PRETRAINING) or (variant == NO_STROKES and kind == "strokes"):
            break
        drawn = make_motion_set(data / kind, kind=kind, **counts)
        splits = [f"data.{split}.path={drawn / split}.csv" for split in ("train", "val")]
        name = f"{kind}-{model.blocks or 'parallel'}-groups-{'-'.join(map(str, model.groups or ()))}"
        weights = finish(recipe(name, [*shared, *splits, *PRETRAINING[kind], f"model.weights={weights}"]))
    return weights


def run_of(variant: str, source: str, target: str, seed: int, manifest: str, overrides: Sequence[str]) -> Config:
    """The recipe of one run."""
    splits = [f"data.train.path={manifest}", f"data.val.path={manifest}"]
    splits += [f"data.train.where.group={source}", f"data.val.where.group={target}", f"train.seed={seed}"]
    return recipe(f"{variant}-{source}-to-{target}-seed{seed}", [*splits, *overrides])


def top1(run: str) -> float | None:
    """Validation top-1 of a finished run's last epoch."""
    record = read_record(run)
    return record["metrics"][VAL_TOP1] if record and record["metrics"] else None


def shuffled_top1(run: str) -> float:
    """Validation top-1 of a run's model where the frames of each clip come in random order."""
    logits, labels, _ = validation_logits(run, "shuffled")
    return float((logits.argmax(1) == labels).double().mean())


def table(results: dict[str, list[tuple[float, float]]], groups: Sequence[str]) -> str:
    """Markdown: of both directions and their mean, the mean and the standard deviation over the seeds."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest")
    parser.add_argument("groups", nargs=2, metavar="GROUP")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=[*VARIANTS], metavar="VARIANT")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where the drawn sets are, or get")
    parser.add_argument("--out", type=Path, help="a file for the table")
    args = parser.parse_intermixed_args()
    directions = (args.groups, args.groups[::-1])

    def configs(variant: str, seed: int, changes: Sequence[str]) -> list[Config]:
        return [run_of(variant, *direction, seed, args.manifest, changes) for direction in directions]

    for variant in args.only:
        changes = [*args.overrides, *VARIANTS[variant]]
        changes.append(f"model.weights={pretrained(variant, args.data, changes)}")
        for seed in range(args.seeds):
            for config in configs(variant, seed, changes):
                finish(config)
    results: dict[str, list[tuple[float, float]]] = {}
    for variant in VARIANTS:
        for seed in count():
            runs = [run_folder(config) for config in configs(variant, seed, args.overrides)]
            one, other = map(top1, runs)
            if one is None or other is None:
                break
            results.setdefault(variant, []).append((one, other))
            if variant == FULL:
                results.setdefault(CONTROL, []).append((shuffled_top1(runs[0]), shuffled_top1(runs[1])))
    text = table(results, args.groups)
    print("\n" + text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
