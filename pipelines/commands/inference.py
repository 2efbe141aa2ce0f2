"""``posmlp evaluate``, ``predict``, ``export`` and ``import``: trained models at work."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pipelines.commands.options import (
    Commands,
    add_command,
    add_overrides,
    add_recipe,
    add_trained_model,
    add_views,
    positive,
)
from posmlp.config import load_recipe
from posmlp.errors import UserError

CLASSES_SHOWN = 5  # in the summary of predictions


def add_commands(commands: Commands) -> None:
    add_evaluate(commands)
    add_predict(commands)
    add_export(commands)
    add_import(commands)


def add_evaluate(commands: Commands) -> None:
    evaluate = add_command(
        commands, "evaluate", run_evaluate, "test a trained model on a split, with several views per video"
    )
    add_trained_model(evaluate)
    add_views(evaluate)
    add_overrides(evaluate, "data.val.path=test.csv")
    splits = ("val", "train", "test")
    evaluate.add_argument("--split", choices=splits, default="val", help="split (default: %(default)s)")
    evaluate.add_argument("--workers", type=positive, help="number of workers (default: scaling.workers of the recipe)")
    evaluate.add_argument("--out", help="folder for the results, a path or a URI (default: RUN/evaluations/NAME)")


def run_evaluate(args: argparse.Namespace) -> None:
    from posmlp.video.views import parse_views

    views = parse_views(args.views) if args.views else None  # before a slow import: a typo is reported at once
    from pipelines.inference.evaluate import evaluate

    result = evaluate(args.model, views, split=args.split, overrides=args.overrides, workers=args.workers, out=args.out)
    print(f"\n{result}")


def add_predict(commands: Commands) -> None:
    predict = add_command(
        commands, "predict", run_predict, "print the most likely classes of videos, or actions of people in them"
    )
    add_trained_model(predict)
    add_views(predict)
    predict.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="a video or an image (a path or a URI), or a local folder of frames or with videos in it",
    )
    predict.add_argument("--top", type=positive, default=5, help="classes per file, or per box (default: %(default)s)")
    predict.add_argument("--json", action="store_true", help="print one line of JSON per file, or per box")
    boxes = predict.add_argument_group("for a detection model")
    boxes.add_argument(
        "--boxes", metavar="CSV", help="list of people's boxes: lines of video,second,x1,y1,x2,y2[,action,score]"
    )
    boxes.add_argument("--threshold", type=float, help="smallest probability of a printed action (default: 0)")
    boxes.add_argument(
        "--first-second",
        type=float,
        metavar="S",
        help="second of the list at which the files start (default: detection.first_second of the recipe)",
    )
    boxes.add_argument("--video", metavar="MP4", help="write a copy of the file with boxes and actions drawn in it")


def run_predict(args: argparse.Namespace) -> int:
    """Return exit code 1 if a file could not be read."""
    files = [file for given in args.files for file in videos_in(given) or [given]]
    if args.boxes:
        return predict_people(args, files)
    for option in ("threshold", "first_second", "video"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option.replace('_', '-')} is for a detection model, with --boxes")
    from pipelines.inference.predict import predict
    from posmlp.video.views import parse_views

    first, unreadable = Counter[str](), 0
    for prediction in predict(args.model, files, args.top, parse_views(args.views) if args.views else None):
        unreadable += bool(prediction.error)
        first.update(name for name, _ in prediction.top[:1])
        if args.json:
            print(prediction.json(), flush=True)
        elif prediction.error:
            print(f"posmlp: {prediction.file}: {prediction.error}", file=sys.stderr, flush=True)
        else:
            print(prediction, flush=True)
    if len(files) > 1 and not args.json:
        print(f"\n{summarise_predictions(first, unreadable)}")
    return int(unreadable > 0)


def predict_people(args: argparse.Namespace, files: Sequence[str]) -> int:
    """Print the actions of the boxes, and draw them. Return exit code 1 if a file or a second could not be read."""
    if args.views:
        raise UserError("--views: a key frame has one view; leave it out with --boxes")
    if args.video and len(files) > 1:
        raise UserError(f"--video {args.video} is a copy of one file; give one, not {len(files)}")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold:g}: expected a probability from 0 to 1")
    from pipelines.inference.predict_boxes import BoxPredictor, annotate, check_output
    from posmlp.video.decode import DecodeError

    if args.video:
        check_output(args.video, files[0])
    predictor = BoxPredictor(args.model, args.boxes, args.first_second)
    if note := predictor.left_out(files):
        print(f"posmlp: {note}", file=sys.stderr)
    unreadable, found = 0, []
    for prediction in predictor.predict(files, args.top, args.threshold or 0.0):
        unreadable += bool(prediction.error)
        if args.json:
            print(prediction.json(), flush=True)
        elif prediction.error:
            print(f"posmlp: {prediction.place}: {prediction.error}", file=sys.stderr, flush=True)
        else:
            print(prediction, flush=True)
        if args.video and not prediction.error:
            found.append(prediction)
    if found:
        try:
            annotate(files[0], args.video, found, predictor.config)
        except DecodeError as error:
            raise UserError(f"{args.video} was not written: {files[0]}: {error.reason}") from error
    return int(unreadable > 0)


def videos_in(folder: str) -> Sequence[str]:
    """List the videos in a local folder and in the folders below it. Empty for a file or a folder of frames."""
    from posmlp.video.manifest import VIDEO_SUFFIXES

    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    return [str(path) for path in files if path.is_file() and not path.name.startswith(".")]


def summarise_predictions(first: Counter[str], unreadable: int) -> str:
    """Format how many files were predicted, and how often each class came first, the most frequent five."""
    classes = ", ".join(f"{name} {files}" for name, files in first.most_common(CLASSES_SHOWN))
    more = f" and {len(first) - CLASSES_SHOWN} more classes" if len(first) > CLASSES_SHOWN else ""
    problems = f"; {unreadable} could not be read" if unreadable else ""
    return f"{first.total() + unreadable} files: {classes or 'none'}{more}{problems}"


def add_export(commands: Commands) -> None:
    export = add_command(
        commands, "export", run_export, "write a trained model as one file that runs without this project"
    )
    add_trained_model(export)
    export.add_argument(
        "--out", metavar="FILE", help="FILE.pt2 for PyTorch or FILE.onnx, a path or a URI (default: RUN.pt2)"
    )
    export.add_argument("--int8", action="store_true", help="store the weights of linear layers in 8 bits (ONNX only)")


def run_export(args: argparse.Namespace) -> None:
    from pipelines.inference.export import export

    print(export(args.model, args.out, int8=args.int8))


def add_import(commands: Commands) -> None:
    importing = add_command(
        commands,
        "import",
        run_import,
        "make a run of a model that other code has trained",
        description="Read weights of the published code, or of any trainer, and write the folder of a run with them, "
        "which evaluate, predict, export and model.weights take as any other.",
    )
    importing.add_argument("file", metavar="FILE", help="the file of weights, a path or a URI")
    add_recipe(importing, "data.val.path=test.csv")
    importing.add_argument("--out", metavar="FOLDER", help="the run's folder, a path or a URI (default: runs/NAME)")


def run_import(args: argparse.Namespace) -> None:
    config = load_recipe(args.recipe, args.overrides)
    from pipelines.inference.importing import import_model

    print(import_model(args.file, config, args.out))
