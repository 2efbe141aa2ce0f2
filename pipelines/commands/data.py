"""``posmlp data motion|scenes|faces|check|shard|preview``: make, check, pack and look at data sets."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError

from pipelines.commands.options import (
    Commands,
    add_command,
    add_overrides,
    add_recipe,
    load_recipe_and_data,
    not_negative,
    positive,
    positive_float,
)
from posmlp.config import Config, Format, SplitSection, Where, list_recipes, set_key
from posmlp.errors import UserError

if TYPE_CHECKING:
    from posmlp.video.manifest import Manifest, Split


def add_commands(commands: Commands) -> None:
    data = commands.add_parser(
        "data",
        help="make, check, pack and look at data sets",
        description="Make, check, pack and look at data sets. `posmlp data SUBCOMMAND --help` describes the options.",
    )
    subcommands = data.add_subparsers(required=True, metavar="SUBCOMMAND")
    add_motion(subcommands)
    add_scenes(subcommands)
    add_faces(subcommands)
    add_check(subcommands)
    add_shard(subcommands)
    add_preview(subcommands)


def add_motion(commands: Commands) -> None:
    motion = add_command(
        commands, "motion", run_motion, "make the embedded motion set: 8 classes that only motion separates"
    )
    motion.add_argument(
        "--out", type=Path, default=Path("data/motion"), help="folder for the data set (default: %(default)s)"
    )
    motion.add_argument(
        "--kind",
        choices=["motion", "strokes", "turns"],
        default="motion",
        help="motion: 8 classes of moving shapes; strokes: 82 classes of paths that an arm draws; turns: 16 classes of "
        "shapes that move in one direction and then in another (default: %(default)s)",
    )
    motion.add_argument("--train", type=int, default=640, help="number of training clips (default: %(default)s)")
    motion.add_argument("--val", type=int, default=160, help="number of validation clips (default: %(default)s)")
    motion.add_argument("--size", type=int, default=64, help="height and width in pixels (default: %(default)s)")
    motion.add_argument("--seed", type=not_negative, default=0, help="seed of the drawing (default: %(default)s)")


def run_motion(args: argparse.Namespace) -> None:
    from posmlp.video.motion import make_motion_set

    folder = make_motion_set(args.out, kind=args.kind, train=args.train, val=args.val, size=args.size, seed=args.seed)
    print(f"{args.train} training and {args.val} validation clips: {folder}/train.csv, {folder}/val.csv")


def add_scenes(commands: Commands) -> None:
    scenes = add_command(
        commands, "scenes", run_scenes, "make the embedded detection set: actors whose actions mostly motion separates"
    )
    scenes.add_argument(
        "--out", type=Path, default=Path("data/scenes"), help="folder for the data set (default: %(default)s)"
    )
    scenes.add_argument("--train", type=int, default=40, help="number of training videos (default: %(default)s)")
    scenes.add_argument("--val", type=int, default=10, help="number of validation videos (default: %(default)s)")
    scenes.add_argument("--seconds", type=int, default=20, help="key seconds of a video (default: %(default)s)")
    scenes.add_argument("--size", type=int, default=80, help="height and width in pixels (default: %(default)s)")
    scenes.add_argument("--seed", type=not_negative, default=0, help="seed of the drawing (default: %(default)s)")


def run_scenes(args: argparse.Namespace) -> None:
    from posmlp.detection.scenes import FIRST_SECOND, make_scene_set

    counts = {"train": args.train, "val": args.val, "seconds": args.seconds}
    folder = make_scene_set(args.out, **counts, size=args.size, seed=args.seed)
    print(
        f"{args.train} training and {args.val} validation videos of {args.seconds} key seconds: {folder}/train.csv, "
        f"{folder}/val.csv, {folder}/actions.pbtxt; detection.first_second={FIRST_SECOND}"
    )


def add_faces(commands: Commands) -> None:
    faces = add_command(
        commands, "faces", run_faces, "make the embedded set of faces: micro-expressions that only motion separates"
    )
    faces.add_argument(
        "--out", type=Path, default=Path("data/faces"), help="folder for the data set (default: %(default)s)"
    )
    faces.add_argument("--subjects", type=int, default=3, help="subjects of each of the 3 parts (default: %(default)s)")
    faces.add_argument("--clips", type=int, default=24, help="clips of a subject (default: %(default)s)")
    faces.add_argument("--size", type=int, default=64, help="height and width in pixels (default: %(default)s)")
    faces.add_argument("--seed", type=not_negative, default=0, help="seed of the drawing (default: %(default)s)")


def run_faces(args: argparse.Namespace) -> None:
    from posmlp.video.faces import CASME2_CODING, SAMM_CODING, make_face_set

    counts = {"subjects": args.subjects, "clips": args.clips}
    folder = make_face_set(args.out, **counts, size=args.size, seed=args.seed)
    print(
        f"3 x {args.subjects} subjects with {args.clips} clips each in the classes of the composite: "
        f"{folder}/{CASME2_CODING}, {folder}/{SAMM_CODING}, {folder}/SMIC/HS"
    )


def add_manifest(command: argparse.ArgumentParser) -> None:
    """Add the arguments that name a list of videos, as ``data.*`` does in a recipe."""
    command.add_argument(
        "manifest",
        metavar="LIST|RECIPE",
        help="list of videos, or a folder with one subfolder per class (a path or a URI); for detection, the recipe",
    )
    add_overrides(command, "data.train.root=videos")
    command.add_argument("--split", choices=("train", "val", "test"), help="lists of the recipe (default: train)")
    command.add_argument("--out", required=True, help="folder for the results; a path or a URI")
    command.add_argument(
        "--format", choices=get_args(Format), default="auto", help="format of the list (default: %(default)s)"
    )
    command.add_argument("--root", help="folder that holds the videos (default: the folder of the list)")
    command.add_argument("--classes", help="file of class names, for formats that have one")
    command.add_argument(
        "--template", default="{:05d}.jpg", help="file names of a frame folder's images (default: %(default)s)"
    )
    command.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="use only the rows whose column has this value (COLUMN=[A, B]: one of these; COLUMN.not=A: another); "
        "may be given several times",
    )


def read_listed(args: argparse.Namespace, missing_ok: bool) -> tuple[Manifest, Config | None]:
    """Read the manifest that the arguments of ``add_manifest`` name, and the recipe, if they name one.

    Raises:
        UserError: the arguments do not fit, ``--where`` is malformed, or the list is.
    """
    from posmlp.video.manifest import read_manifest

    if is_recipe(args.manifest):
        return read_key_frames(args, missing_ok)
    if args.overrides or args.split:
        what = args.overrides[0] if args.overrides else "--split"
        raise UserError(f"{what} changes a recipe of action detection, but {args.manifest} is not a recipe")
    if args.format == "ava":
        raise UserError("lists of boxes are read with their recipe, as in `posmlp data check ava_s16 --split val`")
    where = read_conditions(args.where)
    options = {key: getattr(args, key) for key in ("format", "root", "classes", "template")}
    return read_manifest(args.manifest, where, **options, missing_ok=missing_ok), None


def read_conditions(items: Sequence[str]) -> Where:
    """Read ``COLUMN=VALUE``, ``COLUMN=[A, B]`` and ``COLUMN.not=VALUE``, as overrides of a recipe's ``where``.

    Raises:
        UserError: one is malformed.
    """
    where: Where = {}
    for item in items:
        column, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--where {item!r}: expected COLUMN=VALUE, COLUMN=[VALUE, VALUE] or COLUMN.not=VALUE")
        column, excluded = column.removesuffix(".not"), ".not" * column.endswith(".not")
        tree: dict[str, Any] = {}
        set_key(tree, f"data.train.where.column{excluded}={value}")
        where[column] = tree["data"]["train"]["where"]["column"]
    try:
        return SplitSection(path="", where=where).where
    except ValidationError as error:
        raise UserError(f"--where: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error


def is_recipe(name: str) -> bool:
    """Whether an argument is a recipe: a YAML file, or the name of a shipped one and of nothing in this folder."""
    return name.endswith((".yaml", ".yml")) or (name in list_recipes() and not Path(name).exists())


def read_key_frames(args: argparse.Namespace, missing_ok: bool) -> tuple[Manifest, Config]:
    """Read all key frames of a split of a recipe; their metadata says how a written list is read.

    Raises:
        UserError: the recipe is not of detection, or its lists have problems.
    """
    from dataclasses import replace

    from posmlp.detection.lists import list_metadata, read_detection_split

    for option, default in {"format": "auto", "root": None, "classes": None, "template": "{:05d}.jpg"}.items():
        if getattr(args, option) != default:
            raise UserError(f"--{option} is for a list; {args.manifest} is a recipe: set its keys data.*")
    if args.where:
        raise UserError(f"--where is for a list of videos; {args.manifest} is a recipe")
    config = load_recipe_and_data(args.manifest, args.overrides)
    if config.task != "detection":
        raise UserError(
            f"{args.manifest} is a recipe of recognition: name its list in place of it, as {config.data.train.path}"
        )
    split: Split = args.split or "train"
    manifest = read_detection_split(config.data, config.detection, split, missing_ok=missing_ok)
    told = list_metadata(manifest.classes, getattr(config.data, split), config.detection, split)
    rows = manifest.rows.replace_schema_metadata((manifest.rows.schema.metadata or {}) | told)
    return replace(manifest, rows=rows), config


def add_timeout(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--timeout",
        type=positive_float,
        default=300.0,
        help="seconds after which a video counts as bad (default: %(default)g)",
    )


def add_check(commands: Commands) -> None:
    check = add_command(
        commands,
        "check",
        run_check,
        "decode every video of a list, or of a recipe of action detection, and report the bad ones",
    )
    add_manifest(check)
    add_timeout(check)


def run_check(args: argparse.Namespace) -> int:
    """Return exit code 1 if there is a bad video, or a key frame beyond the end of its video."""
    from pipelines.cluster.session import start_ray
    from pipelines.data.check import check

    manifest, config = read_listed(args, missing_ok=True)
    start_ray()
    result = check(
        manifest, args.out, args.timeout, key_frames=config is not None, fps=config.data.fps if config else None
    )
    print(result.summary, end="")
    good = f" and good.parquet (a list of the good ones; its root is {manifest.root})" if result.has_list else ""
    if config and result.has_list:
        good = (
            f" and good.parquet (data.{args.split or 'train'}={{path: {args.out}/good.parquet, root: {manifest.root}}})"
        )
    print(f"{args.out} has report.parquet, summary.txt{good}")
    return int(result.bad > 0 or result.beyond > 0)


def add_shard(commands: Commands) -> None:
    shard = add_command(
        commands,
        "shard",
        run_shard,
        "pack the videos of a list into Parquet files; for action detection, a segment around each key frame",
        after_interrupt="the same command resumes after the last finished shard",
    )
    add_manifest(shard)
    shard.add_argument(
        "--rows-per-shard", type=positive, default=256, help="videos or key frames per file (default: %(default)s)"
    )
    shard.add_argument(
        "--short-side", type=positive, metavar="PIXELS", help="encode the videos again with this short side"
    )
    shard.add_argument(
        "--keyframe-interval",
        type=positive,
        metavar="FRAMES",
        help="encode the videos again with a key frame every FRAMES frames",
    )
    add_timeout(shard)


def run_shard(args: argparse.Namespace) -> None:
    from pipelines.cluster.session import start_ray
    from pipelines.data.shard import ShardSettings, shard
    from posmlp.detection.segments import SegmentClip

    manifest, config = read_listed(args, missing_ok=False)
    clip = SegmentClip.of_recipe(config) if config else None
    settings = ShardSettings(args.rows_per_shard, args.short_side, args.keyframe_interval, args.timeout, clip)
    start_ray()
    result = shard(manifest, args.out, settings)
    what, use = "videos", f"train on {result.manifest}"
    if clip:
        what, use = f"key frames, for clips of {clip},", f"use data.{args.split or 'train'}={result.manifest}"
    print(f"{result.videos} {what} in {result.shards} shards, {result.bytes / 1e6:.1f} MB; {use}")
    if result.bad:
        print(f"{result.bad} {what.partition(',')[0]} could not be packed; bad.parquet in the same folder lists them")


def add_preview(commands: Commands) -> None:
    preview = add_command(commands, "preview", run_preview, "draw a batch as the model sees it")
    add_recipe(preview, "augment.flip=0.5")
    preview.add_argument(
        "--out", type=Path, default=Path("preview.png"), help="file for the picture (default: %(default)s)"
    )
    preview.add_argument("--split", choices=("train", "val"), default="train", help="split (default: %(default)s)")
    preview.add_argument("--epoch", type=not_negative, default=0, help="epoch, counted from 0 (default: %(default)s)")
    preview.add_argument("--videos", type=positive, default=8, help="number of videos to draw (default: %(default)s)")


def run_preview(args: argparse.Namespace) -> None:
    from pipelines.data.preview import preview

    config = load_recipe_and_data(args.recipe, args.overrides)
    preview(config, args.out, train=args.split == "train", epoch=args.epoch, videos=args.videos)
    print(args.out)
