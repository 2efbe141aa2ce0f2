"""``posmlp recipes``: list the recipes, print one in full, copy one to start from."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipelines.commands.options import Commands, add_command, add_overrides
from posmlp.config import find_recipe, list_recipes, load_recipe
from posmlp.errors import UserError


def add_commands(commands: Commands) -> None:
    recipes = add_command(
        commands,
        "recipes",
        run_list,
        "list the recipes, print one in full, or copy one",
        description="Without a subcommand: list the recipes, one line each.",
    )
    subcommands = recipes.add_subparsers(metavar="SUBCOMMAND")
    add_show(subcommands)
    add_copy(subcommands)


def run_list(args: argparse.Namespace) -> None:
    """Print the name of each recipe with the first line of its file."""
    names = list_recipes()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {summary_of(find_recipe(name))}")


def summary_of(path: Path) -> str:
    """Return the first sentence of the comment that a recipe file starts with; empty if it starts with none."""
    first = path.read_text().partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def add_show(commands: Commands) -> None:
    show = add_command(commands, "show", run_show, "print a recipe with every key and its effective value, as YAML")
    show.add_argument("recipe", help="a YAML file, or a name that `posmlp recipes` lists")
    add_overrides(show, "train.epochs=20")


def run_show(args: argparse.Namespace) -> None:
    print(load_recipe(args.recipe, args.overrides).to_yaml(), end="")


def add_copy(commands: Commands) -> None:
    copy = add_command(commands, "copy", run_copy, "copy a recipe, with its comments, to a file of your own")
    copy.add_argument("recipe", help="a name that `posmlp recipes` lists")
    copy.add_argument("file", type=Path, metavar="FILE", help="the new file; it must not exist")


def run_copy(args: argparse.Namespace) -> None:
    text = find_recipe(args.recipe).read_text()
    try:
        with args.file.open("x") as file:
            file.write(text)
    except FileExistsError as error:
        raise UserError(f"{args.file} exists; choose another file") from error
    print(f"{args.file} is a copy of {args.recipe}; `posmlp train {args.file}` trains it")
