"""Number of blocks of each stage: from one to about twice as many as in the recipe's model."""

from posmlp.config import Config
from tune_spaces import Space, stages_of


def space(base: Config) -> Space:
    """All combinations over the four stages."""
    depths = base.model.variant().depths
    return Space(
        {f"depth{stage}": depth_values(depth) for stage, depth in enumerate(depths, start=1)},
        lambda member: {"model.depths": stages_of(member, "depth")},
    )


def depth_values(depth: int) -> tuple[int, ...]:
    """1, and 0.5, 1, 1.5 and 2 times the depth; the largest value is at least 3."""
    half = -(-depth // 2)
    return tuple(sorted({1, half, depth, depth + half, max(3, 2 * depth)}))
