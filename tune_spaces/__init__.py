"""Search spaces. Each module here is a space with the module's name; a Python file elsewhere works too.

A module has one function, ``space(base)``. It takes a recipe and returns a ``Space``: the dimensions that differ from
trial to trial, and a function that turns a choice of values into recipe keys. ``tune_spaces/block_types.py`` is a short
example. A space need not leave out impossible combinations, such as channels that are not divisible by their groups.
The search skips members whose recipe is refused. A space refuses a member itself, such as one that is the same model as
another, with a ``RecipeError`` from its function of keys.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from posmlp.config import Config, RecipeError, describe, set_value
from posmlp.errors import UserError
from posmlp.model.spec import STAGES, suggest

if TYPE_CHECKING:
    import numpy as np

Value = str | int | float
Member = Mapping[str, Value]  # dimension -> value


@dataclass(frozen=True)
class Range:
    """A dimension of all numbers from ``low`` to ``high``, uniform, or log-uniform with ``log``."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise UserError(f"{self}: low must be less than high, and above 0 with log")


@dataclass(frozen=True)
class Space:
    """A search space.

    Attributes:
        dimensions: dimension name -> the values to choose from, in their natural order, or a ``Range``.
        keys: function from a member (a value for each dimension) to recipe keys (``model.blocks``) and their values.
        members: the only members, if not every combination of values is one, in their order; None: all combinations.
    """

    dimensions: dict[str, tuple[Value, ...] | Range]
    keys: Callable[[Member], dict[str, Any]]
    members: tuple[Member, ...] | None = None

    def __post_init__(self) -> None:
        for name, values in self.dimensions.items():
            choice = isinstance(values, tuple) and values and all(isinstance(v, str | int | float) for v in values)
            if not choice and not isinstance(values, Range):
                raise UserError(f"dimension {name}: {values!r} must be a tuple of numbers or words, or a Range")
        choices = {name: values if isinstance(values, tuple) else () for name, values in self.dimensions.items()}
        for member in self.members or ():
            if member.keys() != choices.keys() or any(member[name] not in values for name, values in choices.items()):
                raise UserError(f"member {dict(member)} must have one of the values of each dimension, and no Range")

    def recipe(self, base: Config, member: Member) -> Config:
        """The recipe of a member: the base recipe with the keys that the member sets.

        Raises:
            RecipeError: the recipe cannot be run; the message says why.
            UserError: the space itself is wrong.
        """
        tree = base.model_dump(mode="json")
        try:
            keys = self.keys(member)
        except RecipeError:  # the space refuses this member
            raise
        except Exception as error:  # any error of the user's function is reported in one line
            raise UserError(f"the space's keys({dict(member)}) failed: {type(error).__name__}: {error}") from error
        for key, value in keys.items():
            set_value(tree, key, value)
        try:
            return Config.model_validate(tree)
        except ValidationError as error:
            raise RecipeError("; ".join(describe(problem) for problem in error.errors())) from error

    def all_members(self) -> Iterator[dict[str, Value]]:
        """Yield the listed members, or all combinations, the last dimension first. No dimension may be a ``Range``."""
        if self.members is not None:
            yield from map(dict, self.members)
            return
        for values in itertools.product(*(cast(tuple[Value, ...], each) for each in self.dimensions.values())):
            yield dict(zip(self.dimensions, values, strict=True))

    def random(self, rng: np.random.Generator) -> dict[str, Value]:
        """Draw a member uniformly. Its recipe may be refused."""
        if self.members is not None:
            return dict(self.members[rng.integers(len(self.members))])
        return {name: draw_value(values, rng) for name, values in self.dimensions.items()}


def draw_value(values: tuple[Value, ...] | Range, rng: np.random.Generator) -> Value:
    """Draw one value of a dimension."""
    if isinstance(values, tuple):
        return values[rng.integers(len(values))]
    if values.log:
        return math.exp(rng.uniform(math.log(values.low), math.log(values.high)))
    return float(rng.uniform(values.low, values.high))


def list_spaces() -> list[str]:
    """Names of the spaces in this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_space(name: str, base: Config) -> Space:
    """Load a space and apply it to a recipe.

    Args:
        name: one of ``list_spaces()``, or a Python file.
        base: the recipe that the members vary.

    Raises:
        UserError: there is no such space, it fails, or it has no dimensions.
    """
    module = import_space(name)
    if not hasattr(module, "space"):
        raise UserError(f"space {name}: {module.__file__} has no function space(base), see tune_spaces/block_types.py")
    try:
        space = module.space(base)
    except UserError as error:
        raise UserError(f"space {name}: {error}") from error
    except Exception as error:  # any error of the user's function is reported in one line
        raise UserError(f"space {name}: space(base) failed: {type(error).__name__}: {error}") from error
    if not isinstance(space, Space) or not space.dimensions:
        raise UserError(f"space {name}: space(base) must return a tune_spaces.Space with at least one dimension")
    return space


def import_space(name: str) -> ModuleType:
    """Import the module of a space.

    Raises:
        UserError: there is no such space, or it cannot be imported.
    """
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise UserError(f"space {name}: no such file")
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # any error of the user's file is reported in one line
            raise UserError(f"space {name} cannot be imported: {type(error).__name__}: {error}") from error
        return module
    if name not in list_spaces():
        known = ", ".join(list_spaces())
        raise UserError(f"no space {name!r}{suggest(name, list_spaces())}; known: {known}; or give a Python file")
    return importlib.import_module(f"tune_spaces.{name}")


def per_stage(name: str, values: tuple[Value, ...], stages: int = STAGES) -> dict[str, tuple[Value, ...] | Range]:
    """Dimensions ``NAME1``, ``NAME2``, ..., one for each stage, with the same values to choose from."""
    return {f"{name}{stage}": values for stage in range(1, stages + 1)}


def stages_of(member: Member, name: str, stages: int = STAGES) -> list[Value]:
    """A member's values of the dimensions ``NAME1``, ``NAME2``, ..., one for each stage."""
    return [member[f"{name}{stage}"] for stage in range(1, stages + 1)]
