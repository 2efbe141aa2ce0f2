"""``posmlp``: the one command. Each verb is a function below; heavy imports wait until a verb needs them."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from posmlp.config import Format, load_recipe
from posmlp.errors import UserError

AGAIN = "the same command goes on from the last checkpoint"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns:
        The exit code: 0 done, 1 failed or refused, 2 wrong usage, 130 stopped by Ctrl-C, 143 by SIGTERM.
    """
    top = parser()
    args, rest = top.parse_known_args(argv)
    if rest and ("overrides" not in args or any(item.startswith("-") or "=" not in item for item in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides behind an option; argparse takes them only in one piece
        args.overrides += rest
    try:
        return args.run(args) or 0
    except KeyboardInterrupt as stop:
        print(f"\ninterrupted; {getattr(args, 'again', 'nothing is left to go on from')}", file=sys.stderr)
        return 128 + getattr(stop, "signum", signal.SIGINT)
    except (UserError, OSError) as error:  # OSError: a disk or a store that does not answer
        print(f"posmlp: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="posmlp", description="Train and search PosMLP-Video.")
    verbs = top.add_subparsers(required=True, metavar="VERB")

    demo = verbs.add_parser("demo", help="make the embedded data set and train a small model on it")
    demo.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe 'demo'")
    add_train_options(demo)
    demo.set_defaults(run=run_demo, again=AGAIN)

    train = verbs.add_parser("train", help="train one model from a recipe")
    train.add_argument("recipe", help="a YAML file, or the name of one in posmlp/recipes")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.epochs=20")
    add_train_options(train)
    train.set_defaults(run=run_train, again=AGAIN)

    tune = verbs.add_parser("tune", help="search: train many members of a space, and draw their front")
    tune.add_argument("recipe", nargs="?", help="a YAML file, or the name of one in posmlp/recipes")
    tune.add_argument("overrides", nargs="*", metavar="key=value", help="of every trial's recipe")
    tune.add_argument("--space", help="a name in tune_spaces, or a Python file")
    tune.add_argument("--name", help="of the study; RECIPE-SPACE if not given")
    tune.add_argument(
        "--resume", metavar="STUDY", help="go on with a study, given by its folder or its name below runs/"
    )
    tune.add_argument("--trials", type=positive, help="to be trained; 20 if not given")
    tune.add_argument("--searcher", choices=("grid", "random", "tpe", "nsga2"), help="tpe if not given")
    tune.add_argument("--against", choices=("latency", "gmacs", "params"), help="a cost to be low beside high accuracy")
    tune.add_argument("--asha", action="store_true", default=None, help="stop trials early that are behind the others")
    tune.add_argument("--seed", type=not_negative, help="of the search; 0 if not given")
    tune.add_argument("--concurrent", type=positive, help="trials at a time; as many as there is room for if not given")
    tune.add_argument(
        "--repeats", type=positive, help="seeds with which the front's trials are trained; 1 if not given"
    )
    tune.add_argument("--budget-gmacs", type=above_zero, metavar="X", help="the most GMACs of a clip")
    tune.add_argument("--budget-ms", type=above_zero, metavar="X", help="the most milliseconds of a clip, as measured")
    tune.add_argument("--budget-params", type=above_zero, metavar="X", help="the most millions of parameters")
    tune.set_defaults(run=run_tune, again="posmlp tune --resume STUDY goes on")

    supernet = verbs.add_parser(
        "supernet", help="train a whole space at once, with shared weights, and rank its members"
    )
    supernet.add_argument("recipe", help="a YAML file, or the name of one in posmlp/recipes")
    supernet.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of the training, for example train.epochs=100"
    )
    supernet.add_argument("--space", required=True, help="same_width, or another whose members differ in no more")
    supernet.add_argument("--name", help="of the run; RECIPE-SPACE-supernet if not given")
    supernet.add_argument("--members", type=positive, default=100, help="to score: all, or so many (%(default)s)")
    supernet.add_argument("--seed", type=not_negative, default=0, help="of that choice (%(default)s)")
    supernet.add_argument("--study", help="compare with the trials of a study, given by its folder or name below runs/")
    supernet.set_defaults(run=run_supernet, again=AGAIN)

    front = verbs.add_parser("front", help="the speed-accuracy front of studies, from MLflow alone")
    front.add_argument("studies", nargs="+", metavar="STUDY", help="names of studies, to be laid over each other")
    front.add_argument("--against", choices=("latency", "gmacs", "params"), default="gmacs", help="(%(default)s)")
    front.add_argument("--out", type=Path, default=Path("front"), help="folder for pictures and tables (%(default)s)")
    front.add_argument("--uri", help="of MLflow; MLFLOW_TRACKING_URI, else runs/mlflow.db, if not given")
    front.set_defaults(run=run_front)

    evaluate = verbs.add_parser("evaluate", help="test a trained model on a split, with many views a video")
    add_trained(evaluate)
    add_views(evaluate)
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="for example data.val.path=test.csv")
    evaluate.add_argument("--split", choices=("val", "train"), default="val", help="which list (%(default)s)")
    evaluate.add_argument("--workers", type=positive, help="that score; the recipe's scaling.workers if not given")
    evaluate.add_argument("--out", help="folder for the results, a path or a URI; RUN/evaluations/NAME if not given")
    evaluate.set_defaults(run=run_evaluate)

    predict = verbs.add_parser("predict", help="the classes that a trained model sees in videos")
    add_trained(predict)
    add_views(predict)
    predict.add_argument("files", nargs="+", metavar="FILE", help="a video, an image or a folder of frames; or a URI")
    predict.add_argument("--top", type=positive, default=5, help="classes of each file (%(default)s)")
    predict.add_argument("--json", action="store_true", help="print a line of JSON for each file")
    predict.set_defaults(run=run_predict)

    export = verbs.add_parser("export", help="a trained model as one file that runs without this project")
    add_trained(export)
    export.add_argument("--out", metavar="FILE", help="FILE.pt2 or FILE.onnx, a path or a URI; RUN.pt2 if not given")
    export.add_argument("--int8", action="store_true", help="weights of linear layers in 8 bits; ONNX alone")
    export.set_defaults(run=run_export)

    listing = verbs.add_parser("checkpoints", help="list a run's checkpoints, each read through")
    listing.add_argument("run_folder", metavar="RUN", help="a run's folder, or its name below runs/")
    listing.set_defaults(run=run_checkpoints)

    sync = verbs.add_parser("sync", help="deliver to MLflow what runs could not while it was away")
    sync.add_argument(
        "run_folders", nargs="+", metavar="RUN", help="the folder of a run or a study, or its name in runs/"
    )
    sync.set_defaults(run=run_sync, again="the same command delivers the rest")

    doctor = verbs.add_parser("doctor", help="what would stop or slow a run on this cluster, found before it starts")
    doctor.add_argument("recipe", nargs="?", help="a YAML file, or the name of one in posmlp/recipes; none: Ray alone")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="for example scaling.workers=8")
    doctor.add_argument("--address", help="of the cluster; as for posmlp train if not given")
    doctor.set_defaults(run=run_doctor)

    data = verbs.add_parser("data", help="make, check, pack and look at data sets")
    data = data.add_subparsers(required=True, metavar="WHAT")
    motion = data.add_parser("motion", help="the embedded data set: 8 classes that only motion separates")
    motion.add_argument("--out", type=Path, default=Path("data/motion"))
    motion.add_argument(
        "--kind", choices=["motion", "strokes"], default="motion", help="strokes: 42 classes of drawn paths"
    )
    motion.add_argument("--train", type=int, default=640, help="training clips (%(default)s)")
    motion.add_argument("--val", type=int, default=160, help="validation clips (%(default)s)")
    motion.add_argument("--size", type=int, default=64, help="height and width in pixels (%(default)s)")
    motion.add_argument("--seed", type=int, default=0)
    motion.set_defaults(run=run_motion)

    check = data.add_parser("check", help="decode every video of a list and report the bad ones")
    add_manifest(check)
    check.add_argument("--timeout", type=above_zero, default=300.0, help="seconds a video may take (%(default)g)")
    check.set_defaults(run=run_check)

    shard = data.add_parser("shard", help="pack the videos of a list into Parquet files")
    add_manifest(shard)
    shard.add_argument("--rows-per-shard", type=positive, default=256, help="videos in a file (%(default)s)")
    shard.add_argument("--short-side", type=positive, help="encode anew at this short side in pixels")
    shard.add_argument("--keyframe-interval", type=positive, help="encode anew with a key frame every so many frames")
    shard.add_argument("--timeout", type=above_zero, default=300.0, help="seconds a video may take (%(default)g)")
    shard.set_defaults(run=run_shard, again="the same command goes on after the last finished shard")

    preview = data.add_parser("preview", help="a picture of a batch as the model will see it")
    preview.add_argument("recipe", help="a YAML file, or the name of one in posmlp/recipes")
    preview.add_argument("overrides", nargs="*", metavar="key=value", help="for example augment.flip=0.5")
    preview.add_argument("--out", type=Path, default=Path("preview.png"))
    preview.add_argument("--split", choices=("train", "val"), default="train")
    preview.add_argument("--epoch", type=not_negative, default=0, help="from 0 (%(default)s)")
    preview.add_argument("--videos", type=positive, default=8, help="of the epoch's first (%(default)s)")
    preview.set_defaults(run=run_preview)

    cost = verbs.add_parser("cost", help="parameters, MACs, memory and speed of a model on this machine")
    cost.add_argument("--model", required=True)
    cost.add_argument("--num-classes", type=int, default=400)
    cost.add_argument("--frames", type=int)
    cost.add_argument("--image-size", type=int)
    cost.add_argument("--batch", type=int, default=4, help="batch of the throughput measurement (%(default)s)")
    cost.add_argument("--json", action="store_true", help="print JSON instead of a table")
    cost.set_defaults(run=run_cost)

    plan = verbs.add_parser("plan", help="what a recipe would take on a cluster: rates, cores, bytes, the bottleneck")
    plan.add_argument("recipe", help="a YAML file, or the name of one in posmlp/recipes")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.global_batch=1024")
    plan.add_argument("--gpus", type=positive, required=True, help="one training worker each")
    nodes = plan.add_mutually_exclusive_group()
    nodes.add_argument("--gpus-per-node", type=positive, help="8, or all if there are fewer, if not given")
    nodes.add_argument("--nodes", type=positive, help="with GPUs")
    plan.add_argument("--gpu", default="H100", help="a name in posmlp.model.cost.PEAKS (%(default)s)")
    plan.add_argument("--tflops", type=above_zero, help="peak of a GPU, in place of --gpu's data sheet")
    plan.add_argument("--mfu", type=above_zero, help="share of the peak that training reaches; a guess if not given")
    plan.add_argument("--cores", type=positive, default=96, help="of a GPU node (%(default)s)")
    plan.add_argument("--decode-nodes", type=not_negative, default=0, help="without GPUs (%(default)s)")
    plan.add_argument("--decode-cores", type=positive, default=64, help="of a decode node (%(default)s)")
    plan.add_argument("--gbit", type=above_zero, default=100.0, help="network of a node, Gbit/s (%(default)g)")
    plan.add_argument("--memory-gb", type=above_zero, default=256.0, help="of a node (%(default)g)")
    plan.add_argument("--store-share", type=above_zero, default=0.3, help="of it, the object store (%(default)g)")
    plan.add_argument("--videos", type=positive, help="for training; as many as the recipe's list has if not given")
    plan.add_argument("--val-videos", type=positive, help="likewise, for validation")
    plan.add_argument("--source", default="as-is", help="how videos are stored, see docs/scale.md (%(default)s)")
    plan.add_argument("--decode-ms", type=above_zero, help="of a core for a clip, in place of --source's")
    plan.add_argument("--video-kb", type=above_zero, help="of a video, in place of --source's")
    plan.set_defaults(run=run_plan)
    return top


def add_train_options(verb: argparse.ArgumentParser) -> None:
    """The options of what trains."""
    verb.add_argument("--profile", action="store_true", help="trace some steps (torch profiler) into MLflow")
    verb.add_argument(
        "--allow-changes", action="store_true", help="go on with another recipe than the run was started with"
    )


def add_trained(verb: argparse.ArgumentParser) -> None:
    """The argument that names a trained model."""
    verb.add_argument("subject", metavar="RUN|CHECKPOINT", help="a run's name or folder (its best), or a checkpoint's")


def add_views(verb: argparse.ArgumentParser) -> None:
    """How a trained model looks at a video."""
    verb.add_argument("--views", help="CLIPSxCROPS, as in 4x3; the recipe's eval.clips x eval.crops if not given")


def add_manifest(verb: argparse.ArgumentParser) -> None:
    """The arguments that name a list of videos, as ``data.*`` does in a recipe."""
    verb.add_argument("manifest", help="the list, or a folder with one subfolder a class; a path or a URI")
    verb.add_argument("--out", required=True, help="folder for the results; a path or a URI")
    verb.add_argument("--format", choices=get_args(Format), default="auto", help="of the list (%(default)s)")
    verb.add_argument("--root", help="where the videos lie, if not beside the list")
    verb.add_argument("--classes", help="the file of class names, for formats that have one")
    verb.add_argument("--template", default="{:05d}.jpg", help="names of a frame folder's images (%(default)s)")
    verb.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE", help="take these rows alone")


def not_negative(text: str) -> int:
    """A whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def positive(text: str) -> int:
    """A whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def above_zero(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def manifest_of(args: argparse.Namespace, missing_ok: bool):
    from posmlp.video.manifest import read_manifest

    where = {}
    for item in args.where:
        column, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--where {item!r}: expected COLUMN=VALUE")
        where[column] = value
    options = {key: getattr(args, key) for key in ("format", "root", "classes", "template")}
    return read_manifest(args.manifest, where, **options, missing_ok=missing_ok)


def run_demo(args: argparse.Namespace) -> None:
    """Data, training, result table, and how to open the MLflow UI."""
    from posmlp.video.motion import make_motion_set

    config = load_recipe("demo", args.overrides)
    start = time.perf_counter()
    folder = make_motion_set(Path(config.data.train.path).parent)
    print(f"embedded data set: {folder} ({time.perf_counter() - start:.0f} s)", flush=True)
    report(config, args)


def run_train(args: argparse.Namespace) -> None:
    report(load_recipe(args.recipe, args.overrides), args)


def run_tune(args: argparse.Namespace) -> None:
    """A new study, or the rest of one; then its front."""
    from pydantic import ValidationError

    from pipelines.tuning.study import Study, StudyError, explain, find_study

    fields = ("space", "trials", "searcher", "against", "asha", "seed", "concurrent", "repeats")
    fields += ("budget_gmacs", "budget_ms", "budget_params")
    given = {key: value for key in fields if (value := getattr(args, key)) is not None}
    if args.resume:
        fixed = sorted(given.keys() - {"trials", "concurrent", "repeats"})
        if args.recipe or args.overrides or args.name or fixed:
            raise StudyError(
                "--resume goes on with the study as it was started; only --trials, --concurrent and --repeats may be "
                f"given, not {', '.join(['RECIPE'] * bool(args.recipe) + ['--name'] * bool(args.name) + fixed)}"
            )
        study, _ = find_study(args.resume)
        study = study.model_copy(update=given)
    else:
        if not args.recipe or not args.space:
            raise StudyError("give a recipe and --space, or --resume STUDY; see posmlp tune --help")
        recipe = load_recipe(args.recipe, args.overrides)
        name = args.name or f"{recipe.name}-{Path(args.space).stem}"
        try:
            study = Study(name=name, recipe=recipe, **given)
        except ValidationError as error:
            raise StudyError(f"study {name}: {explain(error)}") from error
    from pipelines.tracking.uris import tracking_uri
    from pipelines.tuning import pareto as fronts
    from pipelines.tuning.tune import tune

    args.again = f"posmlp tune --resume {study.folder} goes on"
    start = time.perf_counter()
    result = tune(study, echo=lambda line: print(line, flush=True), resume=bool(args.resume))
    print(f"\n{fronts.describe(result.study.name, result.trials, result.study.against or 'gmacs')}")
    seconds = time.perf_counter() - start
    print(
        f"\n  {result.study.folder}, {seconds:.0f} s; MLflow run {result.mlflow_run_id} has front.html, tables, recipes"
    )
    print(f"  {see(tracking_uri(study.recipe))}")


def run_supernet(args: argparse.Namespace) -> None:
    from pipelines.tracking.uris import tracking_uri
    from pipelines.tuning import pareto as fronts
    from pipelines.tuning.supernet import supernet

    recipe = load_recipe(args.recipe, args.overrides)
    options = {"name": args.name, "count": args.members, "seed": args.seed, "study": args.study}
    found = supernet(recipe, args.space, **options, echo=lambda line: print(line, flush=True))
    print(f"\n{fronts.describe(Path(found.run).name, found.members, 'gmacs')}")
    if found.agreement:
        print(f"\n{found.agreement}")
    for video in found.bad:
        print(f"  not scored: {video.uri}: {video.reason}")
    print(f"\n  {found.run}/members has front.html, members.csv and the front's recipes; so has MLflow")
    print(f"  {see(tracking_uri(recipe))}")


def run_front(args: argparse.Namespace) -> None:
    from pipelines.tuning.pareto import read_view, write_views

    uri = args.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('runs/mlflow.db').resolve()}"
    views = [read_view(name, uri) for name in args.studies]
    print(write_views(views, args.against, args.out))
    print(f"\n{args.out} has front.html, front.png, trials.csv and the recipes of the fronts")


def run_evaluate(args: argparse.Namespace) -> None:
    from pipelines.inference.views import parse_views

    views = parse_views(args.views) if args.views else None  # before a slow import: a typo is told at once
    from pipelines.inference.evaluate import evaluate

    options = {"split": args.split, "overrides": args.overrides, "workers": args.workers, "out": args.out}
    found = evaluate(args.subject, views, **options, echo=lambda line: print(line, flush=True))
    print(f"\n{found}")


def run_predict(args: argparse.Namespace) -> int:
    """Exit code 1 if a file could not be read."""
    from pipelines.inference.predict import predict
    from pipelines.inference.views import parse_views

    bad = 0
    for found in predict(args.subject, args.files, args.top, parse_views(args.views) if args.views else None):
        bad += bool(found.error)
        if args.json:
            print(found.json(), flush=True)
        elif found.error:
            print(f"posmlp: {found.file}: {found.error}", file=sys.stderr, flush=True)
        else:
            print(found, flush=True)
    return int(bad > 0)


def run_export(args: argparse.Namespace) -> None:
    from pipelines.inference.export import export

    print(export(args.subject, args.out, int8=args.int8))


def run_checkpoints(args: argparse.Namespace) -> int:
    """Exit code 1 if one is damaged."""
    from pipelines.runs import checkpoints
    from pipelines.runs.record import find_run

    run = find_run(args.run_folder)
    found = checkpoints.find(run, check=True)
    whole = [f for f in found if f.about]
    best = {f.uri for f in checkpoints.best(found, 1)}
    print(f"{'step':>10}{'epoch':>7}{'val top-1':>11}{'MB':>8}  {'written':<27}")
    for f in found:
        if f.about is None:
            print(f"  {f.problem}")
            continue
        marks = ["newest"] * (f is whole[-1]) + ["best"] * (f.uri in best)
        top1 = f.about.metrics.get("val/top1")
        columns = f"{f.about.step:>10}{f.about.epoch:>7}{'' if top1 is None else f'{top1:.1%}':>11}"
        print(f"{columns}{f.about.bytes / 1e6:>8.1f}  {f.about.time:<27}{', '.join(marks)}".rstrip())
    print(f"{len(whole)} checkpoints in {run}, all read through" + (", the damaged ones apart" * (whole != found)))
    return int(whole != found)


def run_sync(args: argparse.Namespace) -> int:
    """Exit code 1 if something is still to be delivered."""
    from pipelines.runs.record import find_run
    from pipelines.tracking.delivery import sync
    from pipelines.tracking.uris import journal_path
    from pipelines.tuning.study import StudyError, find_study, read_trials, trial_folder

    left = 0
    for name in args.run_folders:
        try:
            study, _ = find_study(name)
            trials = [trial_folder(study, trial.number) for trial in read_trials(study.folder)]
            journals = [path for run in (study.folder, *trials) if (path := journal_path(run)).exists()]
        except StudyError:  # a run, then
            journals = [journal_path(find_run(name))]
        for journal in journals:
            left += sync(journal.parent, echo=lambda line: print(line, flush=True))
    return int(left > 0)


def report(config, args: argparse.Namespace) -> None:
    """Train, then print the result."""
    from pipelines.tracking.uris import tracking_uri
    from pipelines.training.train import train

    start = time.perf_counter()
    options = {"profile": args.profile, "allow_changes": args.allow_changes}
    result = train(config, echo=lambda line: print(line, flush=True), **options)
    seconds = time.perf_counter() - start
    rows = [
        ("validation top-1", f"{result.metrics['val/top1']:.1%} of {result.metrics['val/clips']:.0f} videos"),
        ("validation top-5", f"{result.metrics['val/top5']:.1%}"),
        ("mean over classes", f"{result.metrics['val/class_mean']:.1%}"),
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
    print(f"\n  {see(tracking_uri(config))}")


def see(uri: str) -> str:
    """How to open MLflow."""
    from pipelines.tracking.uris import without_secrets

    uri = without_secrets(uri)
    if uri.startswith("sqlite:"):
        uri = f"{Path(sys.executable).parent / 'mlflow'} ui --backend-store-uri {uri}"
    return f"see it in MLflow:  {uri}"


def run_doctor(args: argparse.Namespace) -> int:
    """Exit code 1 if something would end a run."""
    if args.recipe and "=" in args.recipe:
        raise UserError(f"override {args.recipe!r} without a recipe; name one before it")
    config = load_recipe(args.recipe, args.overrides) if args.recipe else None
    from pipelines.planning.doctor import doctor, report

    return int(not report(doctor(config, args.address)))


def run_motion(args: argparse.Namespace) -> None:
    from posmlp.video.motion import make_motion_set

    folder = make_motion_set(args.out, kind=args.kind, train=args.train, val=args.val, size=args.size, seed=args.seed)
    print(f"{args.train} training and {args.val} validation clips: {folder}/train.csv, {folder}/val.csv")


def run_check(args: argparse.Namespace) -> int:
    """Exit code 1 if there is a bad video."""
    from pipelines.cluster.session import start_ray
    from pipelines.data.scan import check

    manifest = manifest_of(args, missing_ok=True)
    start_ray()
    result = check(manifest, args.out, args.timeout, echo=lambda line: print(line, flush=True))
    print(result.summary, end="")
    good = f" and good.parquet (a list of the good ones; its root is {manifest.root})" if result.has_list else ""
    print(f"{args.out} has report.parquet, summary.txt{good}")
    return int(result.bad > 0)


def run_shard(args: argparse.Namespace) -> None:
    from pipelines.cluster.session import start_ray
    from pipelines.data.scan import ShardSettings, shard

    manifest = manifest_of(args, missing_ok=False)
    settings = ShardSettings(args.rows_per_shard, args.short_side, args.keyframe_interval, args.timeout)
    start_ray()
    result = shard(manifest, args.out, settings, echo=lambda line: print(line, flush=True))
    print(f"{result.videos} videos in {result.shards} shards, {result.bytes / 1e6:.1f} MB; train on {result.manifest}")
    if result.bad:
        print(f"{result.bad} videos could not be packed, see bad.parquet beside it")


def run_preview(args: argparse.Namespace) -> None:
    from pipelines.data.preview import preview

    config = load_recipe(args.recipe, args.overrides)
    preview(config, args.out, train=args.split == "train", epoch=args.epoch, videos=args.videos)
    print(args.out)


def run_cost(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from posmlp.model.cost import cost, format_cost

    sizes = {"frames": args.frames, "image_size": args.image_size}
    overrides = {k: v for k, v in sizes.items() if v is not None}
    measured = cost(args.model, batch=args.batch, num_classes=args.num_classes, **overrides)
    print(json.dumps(asdict(measured), indent=1) if args.json else format_cost(measured))


def run_plan(args: argparse.Namespace) -> None:
    from pipelines.planning.plan import MFU, make_cluster, make_plan, table

    machines = {"nodes": args.nodes, "gpus_per_node": args.gpus_per_node, "gpu": args.gpu, "tflops": args.tflops}
    more = ("decode_nodes", "gbit", "memory_gb", "store_share")
    machines |= {"gpu_node_cores": args.cores, "decode_node_cores": args.decode_cores, "mfu": args.mfu or MFU}
    cluster = make_cluster(args.gpus, **machines, **{key: getattr(args, key) for key in more})
    keys = ("videos", "val_videos", "source", "decode_ms", "video_kb")
    print(table(make_plan(args.recipe, args.overrides, cluster, **{key: getattr(args, key) for key in keys})))


if __name__ == "__main__":
    sys.exit(main())
