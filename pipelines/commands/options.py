"""Arguments that several commands share, and how a command is added."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from posmlp.config import Config, load_recipe

Handler = Callable[[argparse.Namespace], int | None]
Commands = argparse._SubParsersAction  # what add_subparsers returns; argparse has no public name for it

RESUME_HINT = "the same command resumes from the last checkpoint"


def add_command(
    commands: Commands,
    name: str,
    run: Handler,
    help: str,
    *,
    after_interrupt: str = "there is nothing to resume",
    description: str = "",
) -> argparse.ArgumentParser:
    """Add a command to the command line.

    Args:
        run: its handler; the result is the exit code, None for 0.
        help: one line for ``posmlp --help``.
        after_interrupt: what a user is told after Ctrl-C.
        description: a longer text for the command's own help.
    """
    text = description or help[:1].upper() + help[1:] + "."
    command: argparse.ArgumentParser = commands.add_parser(name, help=help, description=text)
    add_verbosity(command)
    command.set_defaults(run=run, after_interrupt=after_interrupt)
    return command


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """Add ``--quiet`` and ``--verbose``, which are valid before and after the command."""
    either = parser.add_mutually_exclusive_group()
    for option, level, text in (
        ("--quiet", "WARNING", "print results and warnings, but no progress"),
        ("--verbose", "DEBUG", "print more, with times and module names"),
    ):
        either.add_argument(
            option, action="store_const", const=level, dest="log_level", default=argparse.SUPPRESS, help=text
        )


def add_recipe(command: argparse.ArgumentParser, example: str, *, required: bool = True) -> None:
    """Add the recipe and its overrides."""
    text = "recipe: a YAML file, or a name that `posmlp recipes` lists"
    command.add_argument("recipe", nargs=None if required else "?", help=text)
    add_overrides(command, example)


def load_recipe_and_data(recipe: str, overrides: list[str]) -> Config:
    """Load a recipe. For a recipe of an embedded set the set is drawn, unless there is a list already."""
    config = load_recipe(recipe, overrides)
    draw_data_of(recipe, config)
    return config


def draw_data_of(recipe: str, config: Config) -> None:
    """Draw the embedded set of a recipe such as ``demo`` with its own data, unless there is a list already."""
    draw = {"demo": draw_motion, "reference": draw_turns, "scenes": draw_scenes, "faces": draw_faces}.get(recipe)
    train_list = Path(config.data.train.path)
    if draw and config.data.train.path == load_recipe(recipe).data.train.path and not train_list.exists():
        draw_and_tell(draw, train_list.parents[1] if recipe == "faces" else train_list.parent)


def draw_and_tell(draw: Callable[[Path], str], folder: Path) -> None:
    """Draw an embedded set, unless the folder holds it, and say where it is."""
    start = time.perf_counter()
    what = draw(folder)
    print(f"embedded {what}: {folder} ({time.perf_counter() - start:.0f} s)", flush=True)


def draw_motion(folder: Path) -> str:
    """Draw the motion set; returns what it is."""
    from posmlp.video.motion import make_motion_set

    make_motion_set(folder)
    return "motion set"


def draw_turns(folder: Path) -> str:
    """Draw the set of turns of the recipe ``reference``; returns what it is."""
    from posmlp.video.motion import make_motion_set

    make_motion_set(folder, kind="turns", train=1280, val=1024, size=24)
    return "set of turns"


def draw_scenes(folder: Path) -> str:
    """Draw the detection set; returns what it is."""
    from posmlp.detection.scenes import make_scene_set

    make_scene_set(folder)
    return "detection set"


def draw_faces(folder: Path) -> str:
    """Draw the set of faces; returns what it is."""
    from posmlp.video.faces import make_face_set

    make_face_set(folder)
    return "set of faces"


def add_overrides(command: argparse.ArgumentParser, example: str) -> None:
    """Add overrides of recipe keys."""
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help=f"optional: recipe keys to change, for example {example}"
    )


def add_train_options(command: argparse.ArgumentParser) -> None:
    """Add the options of commands that train one model."""
    command.add_argument(
        "--profile", action="store_true", help="trace a few steps with torch.profiler and log the trace to MLflow"
    )
    command.add_argument(
        "--allow-changes", action="store_true", help="resume although the recipe differs from the run's first one"
    )


def add_trained_model(command: argparse.ArgumentParser) -> None:
    """Add the argument that names a trained model."""
    command.add_argument(
        "model", metavar="RUN|CHECKPOINT", help="name or folder of a run (its best checkpoint), or a checkpoint folder"
    )


def add_views(command: argparse.ArgumentParser) -> None:
    """Add the views of a video that are averaged."""
    command.add_argument(
        "--views",
        metavar="CLIPSxCROPS",
        help="views of each video, for example 4x3 (default: eval.clips x eval.crops of the recipe)",
    )


def positive(text: str) -> int:
    """Parse a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def not_negative(text: str) -> int:
    """Parse a whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def positive_float(text: str) -> float:
    """Parse a number above 0."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value
