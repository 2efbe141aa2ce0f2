"""The paper's questions: one block type for all stages, the scale of the groups, the windows and the clip length."""

import math

from posmlp.config import Config, RecipeError
from posmlp.model.spec import BLOCKS, UNITS, block_units
from tune_spaces import Member, Space

GROUP_FACTORS = (0.25, 0.5, 1.0, 2.0)
WINDOW_FACTORS = (0.25, 0.5, 1.0)
FRAME_FACTORS = (0.5, 1.0)


def space(base: Config) -> Space:
    """All combinations of a block type, and of factors of the recipe's groups, windows and frames for all stages.

    A temporal window keeps its share of the clip when the clip is shorter. A factor of a window that the blocks do not
    mix is refused, as it would be the same model again; so are windows of less than a frame.
    """
    variant = base.model.variant()
    windows, clips = variant.full_windows(), {math.ceil(factor * variant.frames) for factor in FRAME_FACTORS}

    def keys(member: Member) -> dict[str, object]:
        block, frames = str(member["block"]), int(member["frames"])
        in_time, in_space = float(member["temporal_window"]), float(member["spatial_window"])
        mixed = {axis for unit in block_units(block) for axis in UNITS[unit]}
        for name, factor, axis in (("temporal_window", in_time, "t"), ("spatial_window", in_space, "h")):
            if factor != 1 and axis not in mixed:
                raise RecipeError(
                    f"{name} {factor:g}: {block} blocks mix nothing along it; only 1 is a model of its own"
                )
        shares = [in_time * frames / variant.frames * t for t, _, _ in windows]
        if min(shares) < 1:
            raise RecipeError(f"temporal_window {in_time:g} of {frames} frames is less than a frame")
        return {
            "model.blocks": block,
            "model.groups": scaled_groups(variant.groups, float(member["group_scale"])),
            "model.windows": [
                [math.ceil(share), math.ceil(in_space * h), math.ceil(in_space * w)]
                for share, (_, h, w) in zip(shares, windows, strict=True)
            ],
            "model.frames": frames,
        }

    return Space(
        {
            "block": tuple(BLOCKS),
            "group_scale": tuple(factor for factor in GROUP_FACTORS if fits(variant.dims, variant.groups, factor)),
            "spatial_window": WINDOW_FACTORS,
            "temporal_window": WINDOW_FACTORS,
            "frames": tuple(sorted(clips)),
        },
        keys,
    )


def fits(dims: tuple[int, ...], groups: tuple[int, ...], factor: float) -> bool:
    """Return whether every stage's groups times a factor are a whole number that divides the stage's channels."""
    scaled = [factor * count for count in groups]
    return all(count >= 1 and count.is_integer() and dim % count == 0 for dim, count in zip(dims, scaled, strict=True))


def scaled_groups(groups: tuple[int, ...], factor: float) -> list[int]:
    """Every stage's groups times a factor that fits."""
    return [int(factor * count) for count in groups]
