"""Segments of videos, one around each key frame: what a clip of it needs, so that a long film need not be opened."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from posmlp.config import Config
from posmlp.detection.clips import find_key_frame, key_indices
from posmlp.errors import UserError
from posmlp.video.decode import DecodeError, Frames, ImageFolder, Video
from posmlp.video.pack import KEYFRAME_INTERVAL, encode, properties, read_info

CLIP = b"clip"  # metadata of a list of segments: its ``SegmentClip``, as JSON


@dataclass(frozen=True)
class SegmentClip:
    """The clip that a segment is cut for.

    Attributes:
        frames, stride: ``model.frames`` and ``data.stride``.
        fps: ``data.fps``; the frames of a segment are then those of the video at this rate.
    """

    frames: int
    stride: int
    fps: float | None

    @classmethod
    def of_recipe(cls, config: Config) -> SegmentClip:
        """The clip of a recipe."""
        return cls(config.model.variant().frames, config.data.stride, config.data.fps)

    @property
    def reach(self) -> tuple[int, int]:
        """Frames before and after the key frame."""
        before = self.frames * self.stride // 2
        return before, max(0, (self.frames - 1) * self.stride - before)

    def __str__(self) -> str:
        rate = "" if self.fps is None else f" at {self.fps:g} frames a second"
        return f"{self.frames} frames x stride {self.stride}{rate}"


class Segment(NamedTuple):
    """A segment of a video.

    Attributes:
        numbers: int64 ``[n]``, its frames in the video, not decreasing.
        times: float64 ``[n]``, seconds from the first of them.
        key: which of them is the key frame.
    """

    numbers: NDArray[np.int64]
    times: NDArray[np.float64]
    key: int


def refuse_longer_clips(rows: pa.Table, path: str, config: Config) -> None:
    """Check that the segments of a list have all frames of a recipe's clips. Any other list passes.

    Raises:
        UserError: they have not, so that their ends would repeat.
    """
    if not (text := (rows.schema.metadata or {}).get(CLIP)):
        return
    packed, wanted = SegmentClip(**json.loads(text)), SegmentClip.of_recipe(config)
    short = any(a > b for a, b in zip(wanted.reach, packed.reach, strict=True))
    if short or wanted.fps != packed.fps:
        raise UserError(
            f"{path} has videos that are cut for clips of {packed}, but model.frames, data.stride and data.fps make "
            f"clips of {wanted}; pack them for these with `posmlp data shard`"
        )


def clip_metadata(clip: SegmentClip) -> dict[bytes, str]:
    """The metadata of a list of segments for ``refuse_longer_clips``."""
    return {CLIP: json.dumps(asdict(clip))}


def find_segment(video: Video | ImageFolder, time: float, clip: SegmentClip) -> Segment:
    """The segment around a key frame: from the first to the last frame of its clip.

    Raises:
        DecodeError: the video does not reach the key frame.
    """
    info = video.info
    numbers, centre = find_key_frame(video.uri, info, time, clip.fps)
    indices = key_indices(len(numbers), centre, clip.frames, clip.stride)
    first, last = min(int(indices[0]), centre), max(int(indices[-1]), centre)
    own = numbers[first : last + 1]
    if clip.fps is None:
        assert info.times is not None  # else the key frame is not found
        return Segment(own, info.times[own] - info.times[own[0]], centre - first)
    return Segment(own, np.arange(len(own)) / clip.fps, centre - first)


def pack_segments(
    video: Video | ImageFolder,
    key_times: Sequence[float],
    clip: SegmentClip,
    short_side: int | None,
    keyframe_interval: int | None,
) -> list[dict[str, object] | str]:
    """Encode the segments around key frames of a video. Runs in the decoding process.

    Neighbouring segments share frames, so all are decoded in one pass. If that fails, each is tried alone.

    Args:
        key_times: in seconds, increasing.
        short_side, keyframe_interval: as of ``posmlp.video.pack.pack``.

    Returns:
        For each key frame the properties as of ``pack`` and ``time``, that of the key frame in the segment; or why it
        is bad.
    """
    found: list[Segment | str] = []
    for time in key_times:
        try:
            found.append(find_segment(video, time, clip))
        except DecodeError as error:
            found.append(error.reason)
    segments = [each for each in found if isinstance(each, Segment)]
    options = (short_side, keyframe_interval or KEYFRAME_INTERVAL)
    packed: list[dict[str, object] | str] = []
    try:
        packed += _encode_segments(video, segments, *options)
    except DecodeError:
        for segment in segments:
            try:
                packed += _encode_segments(video, [segment], *options)
            except DecodeError as error:
                packed.append(error.reason)
    results = iter(packed)
    return [each if isinstance(each, str) else next(results) for each in found]


def _encode_segments(
    video: Video | ImageFolder, segments: Sequence[Segment], short_side: int | None, keyframe_interval: int
) -> list[dict[str, object]]:
    """Encode segments in the order of time; with seeks, or if key frames are marked wrongly, without."""
    try:
        return _encode_in_one_pass(video, segments, short_side, keyframe_interval, seek=True)
    except DecodeError:
        return _encode_in_one_pass(video, segments, short_side, keyframe_interval, seek=False)


def _encode_in_one_pass(
    video: Video | ImageFolder, segments: Sequence[Segment], short_side: int | None, interval: int, *, seek: bool
) -> list[dict[str, object]]:
    if not segments:
        return []
    wanted = np.unique(np.concatenate([segment.numbers for segment in segments])).tolist()
    window: dict[int, Frames] = {}
    packed: list[dict[str, object]] = []
    for number, frame in zip(wanted, video.frames(wanted, short_side, seek=seek), strict=True):
        window[number] = frame
        while len(packed) < len(segments) and segments[len(packed)].numbers[-1] <= number:
            packed.append(_encode_segment(video, segments[len(packed)], window, interval))
        if len(packed) < len(segments):
            first = segments[len(packed)].numbers[0]
            window = {i: kept for i, kept in window.items() if i >= first}
    return packed


def _encode_segment(
    video: Video | ImageFolder, segment: Segment, frames: dict[int, Frames], interval: int
) -> dict[str, object]:
    """Encode a segment. Where ``data.fps`` repeats a frame, the frame is there again."""
    steps = max(len(segment.times) - 1, 1)
    fps = steps / float(segment.times[-1]) if segment.times[-1] else 1.0
    pictures = (frames[i] for i in segment.numbers.tolist())
    data, height, width = encode(video.uri, pictures, segment.times, fps, interval)
    info = read_info(video.uri, data)
    assert info.times is not None
    return properties(data, info, height, width) | {"time": float(info.times[segment.key])}
