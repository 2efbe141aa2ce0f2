"""Views of a video in a multi-view test, as in 4x3: clips at different times, crops of each clip."""

from __future__ import annotations

import re

from posmlp.config import Config
from posmlp.errors import UserError
from posmlp.video.clip import views_per_video

CLIPS_PER_PASS = 32  # on the device at once, if ``scaling.micro_batch`` does not say


def parse_views(text: str) -> tuple[int, int]:
    """Parse ``CLIPSxCROPS``, for example ``4x3``; crops are 1 or 3.

    Raises:
        UserError: the text has another form.
    """
    match = re.fullmatch(r"([1-9]\d*)x([13])", text.strip())
    if not match:
        raise UserError(f"views {text!r}: expected CLIPSxCROPS with 1 or 3 crops, as in 4x3")
    return int(match[1]), int(match[2])


def format_views(config: Config) -> str:
    """The recipe's views, in the form that ``parse_views`` reads."""
    return f"{config.eval.clips}x{config.eval.crops}"


def with_views(config: Config, views: tuple[int, int] | None) -> Config:
    """Return the recipe with these views as ``eval.clips`` and ``eval.crops``; None: the recipe unchanged.

    Raises:
        UserError: there are three crops, but the recipe's clips show full frames; or several views of a key frame.
    """
    if views is None:
        return config
    if config.task == "detection" and views != (1, 1):
        raise UserError(f"views {views[0]}x{views[1]}: a key frame has one view; leave them out for a detection model")
    if config.data.full_frame and views[1] > 1:
        raise UserError(
            f"views {views[0]}x{views[1]}: the recipe's clips show whole frames (data.full_frame), so there is one "
            f"crop; use {views[0]}x1"
        )
    section = config.eval.model_copy(update={"clips": views[0], "crops": views[1]})
    return config.model_copy(update={"eval": section})


def videos_per_pass(config: Config) -> int:
    """Return how many videos go through the model together: as many as fit on the device, at least one."""
    return max(1, (config.scaling.micro_batch or CLIPS_PER_PASS) // views_per_video(config, False))
