"""Views of a video in a multi-view test, as in 4x3."""

from __future__ import annotations

import re

from posmlp.config import Config
from posmlp.errors import UserError
from posmlp.video.clip import views_of

CLIPS = 32  # on the device at once, without ``scaling.micro_batch``


def parse_views(text: str) -> tuple[int, int]:
    """``4x3``: clips in time x squares of each, 1 or 3.

    Raises:
        UserError: it is something else.
    """
    match = re.fullmatch(r"([1-9]\d*)x([13])", text.strip())
    if not match:
        raise UserError(f"views {text!r}: expected CLIPSxCROPS with 1 or 3 crops, as in 4x3")
    return int(match[1]), int(match[2])


def with_views(config: Config, views: tuple[int, int] | None) -> Config:
    """The recipe with ``eval.clips`` and ``eval.crops`` of ``views``; None: as it is.

    Raises:
        UserError: the recipe's clips have no squares to choose from.
    """
    if views is None:
        return config
    if config.data.full_frame and views[1] > 1:
        raise UserError(f"views {views[0]}x{views[1]}: the recipe's clips show whole frames (data.full_frame); use x1")
    section = config.eval.model_copy(update={"clips": views[0], "crops": views[1]})
    return config.model_copy(update={"eval": section})


def scored_together(config: Config) -> int:
    """Videos that go through the model together: what has room on the device, but all views of one at least."""
    return max(1, (config.scaling.micro_batch or CLIPS) // views_of(config, False))
