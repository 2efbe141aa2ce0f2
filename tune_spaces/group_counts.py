"""Number of channel groups of each stage, which is the number of position tables: from 1 to 64."""

from posmlp.config import Config
from tune_spaces import Space, stages_of

GROUPS = (1, 2, 4, 8, 16, 32, 64)


def space(base: Config) -> Space:
    """All combinations over the four stages, of counts that divide the stage's channels."""
    return Space(
        {
            f"groups{stage}": tuple(count for count in GROUPS if dim % count == 0)
            for stage, dim in enumerate(base.model.variant().dims, start=1)
        },
        lambda member: {"model.groups": stages_of(member, "groups")},
    )
