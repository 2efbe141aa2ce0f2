"""The whole architecture at once, from much cheaper to much more expensive than the recipe's model."""

from posmlp.config import Config
from tune_spaces import Member, Space, block_types, depths, per_stage, stages_of, widths

GROUPS = (1, 4, 16)
FACTORS = (0.5, 1.0, 1.5)


def space(base: Config) -> Space:
    """Block type, groups and depth of each stage, and one width factor for all stages."""

    def keys(member: Member) -> dict[str, object]:
        groups = tuple(int(count) for count in stages_of(member, "groups"))
        return {
            "model.blocks": stages_of(member, "block"),
            "model.groups": groups,
            "model.depths": stages_of(member, "depth"),
            "model.dims": widths.scaled_dims(base, float(member["width"]), groups),
        }

    dimensions = per_stage("block", block_types.BLOCK_TYPES) | per_stage("groups", GROUPS)
    return Space(dimensions | depths.space(base).dimensions | {"width": FACTORS}, keys)
