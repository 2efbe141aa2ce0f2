"""Block type of each stage: temporal and spatial unit in parallel or one after the other, or one joint unit."""

from posmlp.config import Config
from tune_spaces import Space, per_stage, stages_of

BLOCK_TYPES = ("parallel", "cascade_ts", "cascade_st", "joint")


def space(base: Config) -> Space:
    """All combinations over the four stages."""
    return Space(per_stage("block", BLOCK_TYPES), lambda member: {"model.blocks": stages_of(member, "block")})
