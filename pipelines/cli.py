"""``posmlp``: the one command. Each verb is a function below; heavy imports wait until a verb needs them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from posmlp.config import load_recipe
from posmlp.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 failed or refused, 2 wrong usage, 130 interrupted."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last finished epoch", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"posmlp: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="posmlp", description="Train and search PosMLP-Video.")
    verbs = top.add_subparsers(required=True, metavar="VERB")

    demo = verbs.add_parser("demo", help="make the embedded data set and train a small model on it")
    demo.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe 'demo'")
    demo.set_defaults(run=run_demo)

    train = verbs.add_parser("train", help="train one model from a recipe")
    train.add_argument("recipe", help="a YAML file, or the name of one in posmlp/recipes")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.epochs=20")
    train.set_defaults(run=run_train)

    data = verbs.add_parser("data", help="make data sets").add_subparsers(required=True, metavar="WHAT")
    motion = data.add_parser("motion", help="the embedded data set: 8 classes that only motion separates")
    motion.add_argument("--out", type=Path, default=Path("data/motion"))
    motion.add_argument("--train", type=int, default=640, help="training clips (%(default)s)")
    motion.add_argument("--val", type=int, default=160, help="validation clips (%(default)s)")
    motion.add_argument("--size", type=int, default=64, help="height and width in pixels (%(default)s)")
    motion.add_argument("--seed", type=int, default=0)
    motion.set_defaults(run=run_motion)

    cost = verbs.add_parser("cost", help="parameters, MACs, memory and speed of a model on this machine")
    cost.add_argument("--model", required=True)
    cost.add_argument("--num-classes", type=int, default=400)
    cost.add_argument("--frames", type=int)
    cost.add_argument("--image-size", type=int)
    cost.add_argument("--batch", type=int, default=4, help="batch of the throughput measurement (%(default)s)")
    cost.add_argument("--json", action="store_true", help="print JSON instead of a table")
    cost.set_defaults(run=run_cost)
    return top


def run_demo(args: argparse.Namespace) -> None:
    """Data, training, result table, and how to open the MLflow UI."""
    from posmlp.video.motion import make_motion_set

    config = load_recipe("demo", args.overrides)
    start = time.perf_counter()
    folder = make_motion_set(Path(config.data.train.path).parent)
    print(f"embedded data set: {folder} ({time.perf_counter() - start:.0f} s)", flush=True)
    report(config)


def run_train(args: argparse.Namespace) -> None:
    report(load_recipe(args.recipe, args.overrides))


def report(config) -> None:
    """Train, then print the result."""
    from pipelines.tracking import tracking_uri
    from pipelines.train import train

    start = time.perf_counter()
    result = train(config, echo=lambda line: print(line, flush=True))
    seconds = time.perf_counter() - start
    rows = [
        ("validation top-1", f"{result.metrics['val/top1']:.1%} of {result.metrics['val/clips']:.0f} videos"),
        ("validation top-5", f"{result.metrics['val/top5']:.1%}"),
        ("throughput", f"{result.metrics['perf/clips_per_s']:.1f} clips/s"),
        ("time", f"{seconds:.0f} s, with start-up"),
        ("bad videos", str(len(result.bad))),
        ("run", f"{result.path} (MLflow {result.mlflow_run_id})"),
    ]
    print()
    for name, value in rows:
        print(f"  {name:<18}{value}")
    for video in result.bad[:10]:
        print(f"    {video.uri}: {video.reason}")
    if len(result.bad) > 10:
        print(f"    ... and {len(result.bad) - 10} more in the run's quarantine.json")
    uri = tracking_uri(config)
    if uri.startswith("sqlite:"):
        print(f"\n  see it in MLflow:  {Path(sys.executable).parent / 'mlflow'} ui --backend-store-uri {uri}")
    else:
        print(f"\n  see it in MLflow:  {uri}")


def run_motion(args: argparse.Namespace) -> None:
    from posmlp.video.motion import make_motion_set

    folder = make_motion_set(args.out, train=args.train, val=args.val, size=args.size, seed=args.seed)
    print(f"{args.train} training and {args.val} validation clips: {folder}/train.csv, {folder}/val.csv")


def run_cost(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from posmlp.model.cost import cost, format_cost

    sizes = {"frames": args.frames, "image_size": args.image_size}
    overrides = {k: v for k, v in sizes.items() if v is not None}
    measured = cost(args.model, batch=args.batch, num_classes=args.num_classes, **overrides)
    print(json.dumps(asdict(measured), indent=1) if args.json else format_cost(measured))


if __name__ == "__main__":
    sys.exit(main())
