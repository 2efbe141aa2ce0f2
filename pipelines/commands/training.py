"""``posmlp demo`` and ``posmlp train``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.commands.options import (
    RESUME_HINT,
    Commands,
    add_command,
    add_overrides,
    add_recipe,
    add_train_options,
    draw_and_tell,
    draw_motion,
    load_recipe_and_data,
)
from posmlp import metrics as names
from posmlp.config import Config, load_recipe

if TYPE_CHECKING:
    from pipelines.training.train import RunResult

BAD_VIDEOS_SHOWN = 10


def add_commands(commands: Commands) -> None:
    add_demo(commands)
    add_train(commands)


def add_demo(commands: Commands) -> None:
    demo = add_command(
        commands,
        "demo",
        run_demo,
        "make the embedded motion set and train a small model on it",
        after_interrupt=RESUME_HINT,
    )
    add_overrides(demo, "train.epochs=5")
    add_train_options(demo)


def run_demo(args: argparse.Namespace) -> None:
    """Make the data set, train, print the result."""
    config = load_recipe("demo", args.overrides)
    draw_and_tell(draw_motion, Path(config.data.train.path).parent)
    train_and_print(config, args)


def add_train(commands: Commands) -> None:
    train = add_command(commands, "train", run_train, "train one model from a recipe", after_interrupt=RESUME_HINT)
    add_recipe(train, "train.epochs=20")
    add_train_options(train)


def run_train(args: argparse.Namespace) -> None:
    train_and_print(load_recipe_and_data(args.recipe, args.overrides), args)


def train_and_print(config: Config, args: argparse.Namespace) -> None:
    """Train, then print the result."""
    from pipelines.tracking.uris import links_text, tracking_uri
    from pipelines.training.train import train

    start = time.perf_counter()
    result = train(config, profile=args.profile, allow_changes=args.allow_changes)
    links = links_text(tracking_uri(config), result.links)
    print(f"\n{format_result(result, time.perf_counter() - start)}\n\n  {links}")


def format_result(result: RunResult, seconds: float) -> str:
    """Format a finished run as a table, with its bad videos below."""
    metrics = result.metrics
    rows = [
        *metric_rows(metrics, len(result.classes)),
        *class_rows(result),
        ("throughput", f"{metrics[names.PERF_CLIPS_PER_S]:.1f} clips/s"),
        ("time", f"{seconds:.0f} s, with start-up"),
        ("bad videos", str(len(result.bad))),
        *([("ended early", result.ended_early)] if result.ended_early else []),
        ("run", f"{result.path} (MLflow {result.mlflow_run_id})"),
    ]
    lines = [f"  {name:<18}{value}" for name, value in rows]
    lines += [f"    {video.uri}: {video.reason}" for video in result.bad[:BAD_VIDEOS_SHOWN]]
    if len(result.bad) > BAD_VIDEOS_SHOWN:
        lines.append(
            f"    ... and {len(result.bad) - BAD_VIDEOS_SHOWN} more: quarantine.json in MLflow lists all bad videos"
        )
    return "\n".join(lines)


def metric_rows(metrics: Mapping[str, float], classes: int) -> list[tuple[str, str]]:
    """The rows of a validation's metrics."""
    main = names.main_metric(metrics)
    if main is None:
        return []
    rows = [(f"validation {main.title}", f"{metrics[main.key]:.1%} of {metrics[main.samples]:.0f} {main.unit}")]
    if names.VAL_TOP5 in metrics and classes > 5:
        rows.append(("validation top-5", f"{metrics[names.VAL_TOP5]:.1%}"))
    if names.VAL_CLASS_MEAN in metrics:
        rows.append(("mean over classes", f"{metrics[names.VAL_CLASS_MEAN]:.1%}"))
    groups = {key.removeprefix(names.VAL_MAP_OF): v for key, v in metrics.items() if key.startswith(names.VAL_MAP_OF)}
    if groups:
        rows.append(("mAP by group", ", ".join(f"{name} {value:.1%}" for name, value in groups.items())))
    return rows


def class_rows(result: RunResult) -> list[tuple[str, str]]:
    """The rows of the best and the worst classes, each with its figures; per_class.csv has all."""
    from posmlp.learn.evaluation import ClassificationMetrics, best_and_worst, class_results
    from posmlp.tasks.detection import DetectionSummary

    if isinstance(result.summary, DetectionSummary):
        both = result.summary.best_and_worst(result.classes)
        kinds = zip(("best classes", "worst classes"), both, strict=True)
        return [(name, ", ".join(texts)) for name, texts in kinds if texts]
    if not isinstance(result.summary, ClassificationMetrics):
        return []
    labels = range(len(result.classes), len(result.summary.confusion))
    classes = class_results(result.summary.confusion, result.summary.top5, [*result.classes, *map(str, labels)])
    best, worst = best_and_worst(classes)
    rows = []
    for name, classes in (("best classes", best), ("worst classes", worst)):
        parts = [f"{c.name} {c.top1:.0%} of {c.videos}" for c in classes]
        if name == "worst classes":
            wrong = [f" ({c.confused} as {c.confused_with})" if c.confused else "" for c in classes]
            parts = [part + text for part, text in zip(parts, wrong, strict=True)]
        if parts:
            rows.append((name, ", ".join(parts)))
    return rows
