"""Block type, groups and depth of each stage at the recipe's width: the dimensions that a supernet supports."""

from posmlp.config import Config
from tune_spaces import Space, block_types, depths, group_counts


def space(base: Config) -> Space:
    """All combinations of the members of the three spaces."""
    parts = [module.space(base) for module in (block_types, group_counts, depths)]
    dimensions = {name: values for part in parts for name, values in part.dimensions.items()}
    return Space(dimensions, lambda member: {key: value for part in parts for key, value in part.keys(member).items()})
