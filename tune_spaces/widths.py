"""Number of channels: the recipe's model as a whole, narrower or wider."""

from posmlp.config import Config
from tune_spaces import Space

FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


def space(base: Config) -> Space:
    """One factor for all stages; channels are rounded to multiples of the stage's groups."""
    return Space({"width": FACTORS}, lambda member: {"model.dims": scaled_dims(base, float(member["width"]))})


def scaled_dims(base: Config, factor: float, groups: tuple[int, ...] | None = None) -> list[int]:
    """The model's channels times a factor, each rounded to a multiple of its groups and of 2, at least one multiple."""
    variant = base.model.variant()
    steps = [count if count % 2 == 0 else 2 * count for count in groups or variant.groups]
    return [max(step, round(dim * factor / step) * step) for dim, step in zip(variant.dims, steps, strict=True)]
