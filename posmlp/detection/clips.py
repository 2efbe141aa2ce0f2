"""The clips of a key frame of a video, and where its boxes lie in them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from posmlp.config import Config
from posmlp.video.clip import Cut, LoadedClips, View, choose_cut, cut_views, frame_numbers, open_frames
from posmlp.video.decode import DecodeError, Span, VideoInfo
from posmlp.video.sampling import ROUNDING_S, Box, sample_rng, scaled_to_short_side


def load_key_clip(
    uri: str,
    sample_id: str,
    time: float,
    config: Config,
    *,
    epoch: int,
    train: bool,
    images: int | None = None,
    span: Span | None = None,
    first_view: int = 0,
) -> LoadedClips:
    """The views around a key frame. Every random choice derives from ``(train.seed, epoch, sample_id, view)``.

    All views have the frames of ``key_indices``. In training, each of the ``data.repeats`` views draws the short side
    of the frames (``detection.scale``) and a square of ``model.image_size`` in them. In validation there is one view:
    the centre square as in ``posmlp.video.clip.load_clips``, or with ``detection.whole_frame`` the whole frame with its
    short side at ``eval.short_side`` (None: ``model.image_size``). ``data.frame_order`` acts as in ``load_clips``.

    Args:
        uri, sample_id, time, images: from the manifest row; ``images`` is its ``frames``, and ``time`` the seconds from
            the start of the video to the key frame.
        span: the part of the video to read (``posmlp.video.decode.open_video``); times count from its start.
        first_view: number of the first training view; above 0 where an epoch draws the key frame again.

    Returns:
        Clips ``[V, T, H, W, 3]`` with ``T = model.frames`` and ``H = W = model.image_size``; of whole frames, H and W
        follow from the video.

    Raises:
        DecodeError: the video cannot be read, or does not reach the key frame.
        UserError: the cache cannot be written.
    """
    variant, data = config.model.variant(), config.data
    with open_frames(uri, images, data, decoded_short_side(config), span) as opened:
        numbers, centre = find_key_frame(uri, opened[0].info, time, data.fps)
        indices = numbers[key_indices(len(numbers), centre, variant.frames, data.stride)]
        if train:
            numbered = range(first_view, first_view + data.repeats)
            views = [View(indices, sample_rng(config.train.seed, epoch, sample_id, view)) for view in numbered]
        else:
            views = [View(indices, None)]
        return cut_views(opened, views, sample_id, config, choose_key_cut)


def decoded_short_side(config: Config) -> int:
    """Short side of decoded frames in pixels, the same in training and validation, so that both share a cache."""
    largest = round(config.model.variant().image_size * config.detection.scale[1])
    return config.data.short_side or max(largest, config.eval.short_side or 0)


def find_key_frame(uri: str, info: VideoInfo, time: float, fps: float | None) -> tuple[NDArray[np.int64], int]:
    """The frames to sample from, int64 ``[N]``, and which of them is the key frame: the one shown at ``time``.

    Raises:
        DecodeError: the video does not reach it, or a frame folder has no frame rate (``data.fps``).
    """
    if info.times is None and fps is None:
        raise DecodeError(uri, f"a frame folder has no times to find the key frame at {time:g} s; set data.fps to its")
    numbers = frame_numbers(uri, info, fps)
    if fps is not None:
        centre, end = round(time * fps), len(numbers) / fps
    else:
        assert info.times is not None
        centre = int(np.searchsorted(info.times, time + ROUNDING_S, side="right")) - 1
        end = float(info.times[-1]) * len(numbers) / max(len(numbers) - 1, 1)  # the last one lasts as long as others
    if not -ROUNDING_S <= time <= end + ROUNDING_S:
        raise DecodeError(
            uri,
            f"the key frame at {time:g} s is not in the video, which lasts {end:.2f} s; set detection.first_second to "
            "the second of the lists at which the video files start, or remove it from the list",
        )
    return numbers, min(max(centre, 0), len(numbers) - 1)


def key_indices(frames: int, centre: int, count: int, stride: int) -> NDArray[np.int64]:
    """``count`` frames, ``stride`` apart, around a key frame (SlowFast, arXiv:1812.03982): int64 ``[T]``.

    With an even ``count``, the key frame is number ``count / 2``. Beyond its ends, the video's first and last frame
    repeat.
    """
    first = centre - count * stride // 2
    return np.clip(first + stride * np.arange(count, dtype=np.int64), 0, frames - 1)


def choose_key_cut(height: int, width: int, view: View, config: Config) -> Cut:
    """How a view is cut from decoded frames of a height and width."""
    size = config.model.variant().image_size
    if view.rng is not None:
        low, high = config.detection.scale
        side = max(1, round(min(height, width) * view.rng.uniform(1 / high, 1 / low)))
        top, left = (int(view.rng.integers(extent - side + 1)) for extent in (height, width))
        return Cut((height, width), Box(top, left, side, side), (size, size))
    if config.detection.whole_frame:
        short_side = config.eval.short_side or size
        return Cut((height, width), Box(0, 0, height, width), scaled_to_short_side(height, width, short_side))
    return choose_cut(height, width, view, config)


def visible_boxes(
    boxes: NDArray[np.float32], shown: NDArray[np.float32], share: float
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Move boxes into the picture of a view.

    Args:
        boxes: float32 ``[n, 4]``, x1 y1 x2 y2 as fractions of the frame.
        shown: float32 ``[4]``, what the view shows, as of ``LoadedClips``.
        share: smallest share of a box's area that the view must show.

    Returns:
        float32 ``[n, 4]``, the boxes as fractions of what is shown, clipped to it; and bool ``[n]``, which of them the
        view shows to that share. A box of which it shows nothing is none of them, for any share.
    """
    low, extent = np.tile(shown[:2], 2), np.tile(shown[2:] - shown[:2], 2)
    moved = (boxes - low) / extent
    clipped = moved.clip(0, 1)
    area, visible = (np.prod(each[:, 2:] - each[:, :2], axis=1) for each in (moved, clipped))
    return clipped, (visible > 0) & (visible >= share * area * (1 - 1e-5))  # float32: a box at the edge is all there


def mirror(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Boxes ``[n, 4]`` of the mirrored picture, whose left is the right of this one."""
    return np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], axis=1)
