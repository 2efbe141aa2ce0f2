"""How many blocks each stage has: from one to about twice as many as the recipe's model."""

from posmlp.config import Config
from tune_spaces import Space, stages_of


def space(base: Config) -> Space:
    """Every combination over the four stages."""
    depths = base.model.variant().depths
    return Space(
        {f"depth{stage}": counts(depth) for stage, depth in enumerate(depths, start=1)},
        lambda member: {"model.depths": stages_of(member, "depth")},
    )


def counts(depth: int) -> tuple[int, ...]:
    """One, half the depth, the depth, and one and a half and two times it; 3 at least is among them."""
    half = -(-depth // 2)
    return tuple(sorted({1, half, depth, depth + half, max(3, 2 * depth)}))
