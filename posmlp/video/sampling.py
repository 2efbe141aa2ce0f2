"""Choice of the frames and the rectangle of a clip: pure functions of sizes and a random generator.

``uniform_indices``, ``dense_indices`` and ``square_crop`` are this project's rules. ``slowfast_uniform_indices``,
``slowfast_dense_indices`` and ``fixed_crop`` are those of the published code, for tests alone (``eval.clip_positions``,
``eval.short_side``).
"""

import hashlib
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ROUNDING_S = 1.5e-3  # times of a frame and of the first frame may each be rounded to a millisecond (Matroska, FLV)


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


def sample_rng(seed: int, epoch: int, sample_id: str, view: int = 0) -> np.random.Generator:
    """The generator for the random choices of one sample.

    It depends on the four values alone (through a BLAKE2b hash), so a clip does not depend on the number or order of
    workers, or on where a run resumes.
    """
    key = f"{seed}/{epoch}/{view}/{sample_id}"  # numbers first, so that keys differ for any id
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "big"))


def sample_seed(seed: int, epoch: int, sample_id: str, view: int = 0) -> int:
    """63-bit seed of a clip's augmentation after decoding, independent of the choices from ``sample_rng``."""
    key = f"after/{seed}/{epoch}/{view}/{sample_id}"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def uniform_indices(
    num_frames: int, count: int, rng: np.random.Generator | None, clip: int = 0, clips: int = 1
) -> NDArray[np.int64]:
    """One frame from each of ``count`` equal segments of the video (Temporal Segment Networks, arXiv:1608.00859).

    With ``rng``, a random frame of each segment. Without it, the centre of the segment, or with several ``clips`` per
    video the centre of the ``clip``-th of ``clips`` equal parts of each segment. A video with fewer frames than
    ``count`` repeats frames. Positions are rounded down to whole frames.

    Returns:
        int64 ``[T]`` with ``T = count``, non-decreasing, each in ``[0, num_frames)``.

    Raises:
        ValueError: ``num_frames`` or ``count`` is below 1, or ``clip`` is not one of ``clips``.
    """
    _check_positive(num_frames=num_frames, count=count)
    _check_clip(clip, clips)
    offset = (clip + 0.5) / clips if rng is None else rng.random(count)  # within the segment, as a share of it
    indices = ((np.arange(count) + offset) * num_frames / count).astype(np.int64)
    return np.minimum(indices, num_frames - 1)  # rounding can reach num_frames


def paced_indices(
    num_frames: int, count: int, share: tuple[float, float], pace: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """The frames of a training clip with ``uniform`` sampling that covers a share of the video, at a speed that varies.

    As ``uniform_indices`` it takes a random moment of each of ``count`` equal segments of the clip. The clip covers a
    share of the video that is uniform between the two numbers of ``share``, at a random place. Where it is longer than
    the video, the first and the last frame repeat. At time t of the clip, from 0 to 1, its speed is
    ``1 + pace (u cos(pi t) + (1 - |u|) v cos(2 pi t))`` of the mean, for u and v uniform in [-1, 1]: slower at the
    start, at the end or in the middle.

    Returns:
        int64 ``[T]`` with ``T = count``, non-decreasing, each in ``[0, num_frames)``.

    Raises:
        ValueError: ``num_frames`` or ``count`` is below 1, ``share`` is not positive and increasing, or ``pace`` is not
            in [0, 1).
    """
    _check_positive(num_frames=num_frames, count=count)
    if not (0 < share[0] <= share[1] and 0 <= pace < 1):
        raise ValueError(f"share {share} must be positive (smallest, largest), and pace {pace} from 0 to below 1")
    length, (u, v) = rng.uniform(*share), rng.uniform(-1, 1, 2)
    start = rng.random() * (1 - length)  # negative where the clip is longer than the video
    time = (np.arange(count) + rng.random(count)) / count
    time += pace * (u * np.sin(np.pi * time) / np.pi + (1 - abs(u)) * v * np.sin(2 * np.pi * time) / (2 * np.pi))
    return np.clip(((start + length * time) * num_frames).astype(np.int64), 0, num_frames - 1)


def dense_indices(
    num_frames: int, count: int, stride: int, rng: np.random.Generator | None, clip: int = 0, clips: int = 1
) -> NDArray[np.int64]:
    """``count`` frames, ``stride`` apart, from one window of the video (I3D, arXiv:1705.07750; SlowFast, 1812.03982).

    With ``rng``, the window starts at random. Without it, the window is in the middle of the video, or with several
    ``clips`` per video their windows are spread evenly from the first frame to the last (starts rounded to the nearest
    frame). A video shorter than the window is read from its first frame, and its last frame repeats (as in SlowFast);
    looping would add a jump.

    Returns:
        int64 ``[T]`` with ``T = count``, non-decreasing, each in ``[0, num_frames)``.

    Raises:
        ValueError: ``num_frames``, ``count`` or ``stride`` is below 1, or ``clip`` is not one of ``clips``.
    """
    _check_positive(num_frames=num_frames, count=count, stride=stride)
    _check_clip(clip, clips)
    spare = max(num_frames - ((count - 1) * stride + 1), 0)
    if rng is not None:
        start = int(rng.integers(spare + 1))
    else:
        start = spare // 2 if clips == 1 else (2 * spare * clip + clips - 1) // (2 * (clips - 1))
    return np.minimum(start + stride * np.arange(count, dtype=np.int64), num_frames - 1)


def slowfast_uniform_indices(num_frames: int, count: int, clip: int = 0, clips: int = 1) -> NDArray[np.int64]:
    """The frames of a test clip with ``uniform`` sampling, as the published code chooses them.

    This is the rule of its loader for Something-Something, which UniFormer and MorphMLP have too. With segments of
    ``s = (num_frames - 1) / count`` frames, frame ``i`` is ``round(i s)``, a half to the even number, plus
    ``s (clip + 1) / (clips + 1)``, rounded down.

    Returns:
        int64 ``[T]`` with ``T = count``, non-decreasing, each in ``[0, num_frames)``.

    Raises:
        ValueError: ``num_frames`` or ``count`` is below 1, or ``clip`` is not one of ``clips``.
    """
    _check_positive(num_frames=num_frames, count=count)
    _check_clip(clip, clips)
    segment = (num_frames - 1) / count
    starts = np.rint(segment * np.arange(count)).astype(np.int64)
    return starts + int(segment / (clips + 1) * (clip + 1))


def slowfast_dense_indices(
    num_frames: int, count: int, span: float, clip: int = 0, clips: int = 1
) -> NDArray[np.int64]:
    """The frames of a test clip with ``dense`` sampling, as in PySlowFast and the published code.

    The clips begin at multiples of ``spare / (clips - 1)``, rounded down, where ``spare`` is the number of frames that
    a clip does not cover; a single clip begins at ``spare / 2`` (``DATA.USE_OFFSET_SAMPLING``, which the published
    recipes set). The frames are spread evenly from the first to the last that the clip covers, so that their distance
    is ``(span - 1) / (count - 1)`` and not the stride, and rounded down. Beyond the video's end its last frame repeats.

    Args:
        span: video frames that a clip covers: ``count`` times the stride, times the video's frame rate over the target.

    Returns:
        int64 ``[T]`` with ``T = count``, non-decreasing, each in ``[0, num_frames)``.

    Raises:
        ValueError: ``num_frames`` or ``count`` is below 1, ``span`` is not positive, or ``clip`` is not one of
            ``clips``.
    """
    _check_positive(num_frames=num_frames, count=count)
    _check_clip(clip, clips)
    if not span > 0:
        raise ValueError(f"span must be positive, not {span}")
    spare = max(num_frames - span, 0.0)
    start = math.floor(spare / 2) if clips == 1 else clip * math.floor(spare / (clips - 1))
    offsets = (max(span, 1.0) - 1) * np.arange(count) / max(count - 1, 1)
    return np.minimum(start + np.floor(offsets).astype(np.int64), num_frames - 1)


def fps_indices(times: NDArray[np.float64], fps: float) -> NDArray[np.int64]:
    """The frame numbers of a video resampled to ``fps`` frames per second (SlowFast's target fps, arXiv:1812.03982).

    For each moment 0, 1/fps, 2/fps, ... this is the frame on screen then, also where the frame rate varies. The last
    frame lasts as long as frames do on average. Sampling then chooses from the result instead of from all frames.

    Args:
        times: ``[N]``, increasing: seconds from the first frame to each frame.
        fps: the target frame rate, in frames per second.

    Returns:
        int64 ``[M]``, non-decreasing, from 0 up; M is the video's duration times ``fps``, rounded, at least 1.

    Raises:
        ValueError: ``times`` is empty, or ``fps`` is not positive.
    """
    _check_positive(num_frames=len(times))
    if not fps > 0:
        raise ValueError(f"fps must be positive, not {fps}")
    if len(times) == 1:
        return np.zeros(1, np.int64)
    duration = times[-1] * len(times) / (len(times) - 1)
    moments = np.arange(max(1, round(duration * fps))) / fps
    tolerance = min(ROUNDING_S, duration / len(times) / 2)  # of high-speed cameras, less than a frame
    return np.searchsorted(times, moments + tolerance, side="right") - 1


def random_resized_crop(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """A box of random area, aspect ratio and position (Inception, arXiv:1409.4842; same rule as torchvision's).

    Args:
        scale: smallest and largest area, as a share of the frame.
        ratio: smallest and largest width : height.

    Returns:
        A box of at least 1x1 pixel inside the frame. If ten draws do not fit, the largest centred box with an allowed
        ratio; its area may be outside ``scale``.

    Raises:
        ValueError: ``height`` or ``width`` is below 1, or a range is not positive and increasing.
    """
    _check_positive(height=height, width=width)
    if not (0 <= scale[0] <= scale[1] and 0 < ratio[0] <= ratio[1]):
        raise ValueError(f"crop ranges must be positive (smallest, largest), not scale {scale}, ratio {ratio}")
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(area / shape)), round(math.sqrt(area * shape))
        if 0 < h <= height and 0 < w <= width:
            return Box(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)
    shape = min(max(width / height, ratio[0]), ratio[1])
    return _centred(height, width, max(1, min(height, round(width / shape))), max(1, min(width, round(height * shape))))


def square_crop(height: int, width: int, crop: int = 0, crops: int = 1) -> Box:
    """The largest square in the frame.

    With one crop it is centred. With three, the ``crop``-th is at the start, centre or end of the longer side
    (SlowFast's three-crop testing, arXiv:1812.03982).

    Raises:
        ValueError: ``height`` or ``width`` is below 1, ``crops`` is neither 1 nor 3, or ``crop`` is not one of them.
    """
    _check_positive(height=height, width=width)
    _check_crop(crop, crops)
    side = min(height, width)
    if crops == 1 or crop == 1:
        return _centred(height, width, side, side)
    return Box((height - side) * crop // 2, (width - side) * crop // 2, side, side)


def fixed_crop(height: int, width: int, size: int, crop: int = 0, crops: int = 1) -> Box:
    """A square of ``size`` pixels in a frame (``uniform_crop`` of PySlowFast, arXiv:1812.03982).

    With one crop it is in the middle, rounded up to whole pixels. With three, the ``crop``-th is at the start, middle
    or end of the longer side.

    Raises:
        ValueError: the square is larger than the frame, a size is below 1, ``crops`` is neither 1 nor 3, or ``crop`` is
            not one of them.
    """
    _check_positive(height=height, width=width, size=size)
    _check_crop(crop, crops)
    if size > min(height, width):
        raise ValueError(f"size {size} must be at most the frame's short side, {min(height, width)}")
    top, left = ((side - size + 1) // 2 for side in (height, width))
    if crops == 3 and crop != 1:
        top, left = ((height - size) * crop // 2, left) if height > width else (top, (width - size) * crop // 2)
    return Box(top, left, size, size)


def scaled_to_short_side(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width of a frame that is scaled to a short side; the longer one is rounded down, as in PySlowFast."""
    _check_positive(height=height, width=width, short_side=short_side)
    if width < height:
        return math.floor(height / width * short_side), short_side
    return short_side, math.floor(width / height * short_side)


def _centred(height: int, width: int, h: int, w: int) -> Box:
    return Box((height - h) // 2, (width - w) // 2, h, w)


def _check_clip(clip: int, clips: int) -> None:
    if not 0 <= clip < clips:
        raise ValueError(f"clip must be from 0 to clips - 1, not {clip} of {clips}")


def _check_crop(crop: int, crops: int) -> None:
    if crops not in (1, 3) or not 0 <= crop < crops:
        raise ValueError(f"crops must be 1 or 3 and crop must be less, not crop {crop} of {crops}")


def _check_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
