"""What to search: each module here is a space, found by its name. One of your own is one file more, here or anywhere.

A module has one function, ``space(base)``: from a recipe to the dimensions that differ from trial to trial, and to what
a choice of them means as recipe keys. ``tune_spaces/block_types.py`` is a short one to start from. What no model can be
built of (channels that do not divide by groups) need not be left out by hand: the search asks the recipe.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from pydantic import ValidationError

from posmlp.config import Config, RecipeError, describe, set_value
from posmlp.errors import UserError
from posmlp.model.spec import suggest

Value = str | int | float
Member = Mapping[str, Value]  # a value for each dimension


@dataclass(frozen=True)
class Range:
    """A dimension of all numbers from ``low`` to ``high``; with ``log`` each decade is as likely as another."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise UserError(f"{self}: low must be less than high, and above 0 with log")


@dataclass(frozen=True)
class Space:
    """What differs between trials.

    Attributes:
        dimensions: by name: the values to choose from, in their natural order, or a ``Range``.
        keys: what a member means: recipe keys (``model.blocks``) and their values.
    """

    dimensions: dict[str, tuple[Value, ...] | Range]
    keys: Callable[[Member], dict[str, Any]]

    def __post_init__(self) -> None:
        for name, values in self.dimensions.items():
            choice = isinstance(values, tuple) and values and all(isinstance(v, str | int | float) for v in values)
            if not choice and not isinstance(values, Range):
                raise UserError(f"dimension {name}: {values!r} must be a tuple of numbers or words, or a Range")

    def recipe(self, base: Config, member: Member) -> Config:
        """The recipe of a member: the base but for what the member says.

        Raises:
            RecipeError: it cannot be run; the message says why.
            UserError: the space itself is wrong.
        """
        tree = base.model_dump(mode="json")
        try:
            keys = self.keys(member)
        except Exception as error:  # whatever the user's function raises is told in a line
            raise UserError(f"the space's keys({dict(member)}) failed: {type(error).__name__}: {error}") from error
        for key, value in keys.items():
            set_value(tree, key, value)
        try:
            return Config.model_validate(tree)
        except ValidationError as error:
            raise RecipeError("; ".join(describe(problem) for problem in error.errors())) from error

    def random(self, rng: np.random.Generator) -> dict[str, Value]:
        """A member, any as likely as another; it may be impossible to build."""
        return {name: draw(values, rng) for name, values in self.dimensions.items()}


def draw(values: tuple[Value, ...] | Range, rng: np.random.Generator) -> Value:
    """One value of a dimension."""
    if isinstance(values, tuple):
        return values[rng.integers(len(values))]
    if values.log:
        return math.exp(rng.uniform(math.log(values.low), math.log(values.high)))
    return float(rng.uniform(values.low, values.high))


def list_spaces() -> list[str]:
    """Names of the spaces here."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_space(name: str, base: Config) -> Space:
    """A space around a recipe.

    Args:
        name: one of ``list_spaces()``, or a Python file.

    Raises:
        UserError: there is none, or it has no dimensions.
    """
    module = import_space(name)
    if not hasattr(module, "space"):
        raise UserError(f"space {name}: {module.__file__} has no function space(base), see tune_spaces/block_types.py")
    try:
        space = module.space(base)
    except UserError as error:
        raise UserError(f"space {name}: {error}") from error
    except Exception as error:  # likewise
        raise UserError(f"space {name}: space(base) failed: {type(error).__name__}: {error}") from error
    if not isinstance(space, Space) or not space.dimensions:
        raise UserError(f"space {name}: space(base) must return a tune_spaces.Space with at least one dimension")
    return space


def import_space(name: str) -> ModuleType:
    """The module of a space.

    Raises:
        UserError: there is none, or it cannot be imported.
    """
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise UserError(f"space {name}: no such file")
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # likewise
            raise UserError(f"space {name} cannot be imported: {type(error).__name__}: {error}") from error
        return module
    if name not in list_spaces():
        known = ", ".join(list_spaces())
        raise UserError(f"no space {name!r}{suggest(name, list_spaces())}; known: {known}; or give a Python file")
    return importlib.import_module(f"tune_spaces.{name}")


def per_stage(name: str, values: tuple[Value, ...], stages: int = 4) -> dict[str, tuple[Value, ...] | Range]:
    """The same values to choose from for each stage, as dimensions ``NAME1``, ``NAME2``, ..."""
    return {f"{name}{stage}": values for stage in range(1, stages + 1)}


def stages_of(member: Member, name: str, stages: int = 4) -> list[Value]:
    """What a member chose for each stage."""
    return [member[f"{name}{stage}"] for stage in range(1, stages + 1)]
