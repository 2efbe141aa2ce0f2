"""How each stage combines the temporal and the spatial unit: side by side, one after the other, or one joint unit."""

from posmlp.config import Config
from tune_spaces import Space, per_stage, stages_of

BLOCKS = ("parallel", "cascade_ts", "cascade_st", "joint")


def space(base: Config) -> Space:
    """Every combination over the four stages."""
    return Space(per_stage("block", BLOCKS), lambda member: {"model.blocks": stages_of(member, "block")})
