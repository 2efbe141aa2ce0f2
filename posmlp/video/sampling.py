"""Which frames and which rectangle of a video become a clip: pure functions of sizes and a random generator."""

import hashlib
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ROUNDING_S = 1.5e-3  # a frame's time and the first one's may each be rounded to a millisecond (Matroska, FLV)


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


def sample_rng(seed: int, epoch: int, sample_id: str, view: int = 0) -> np.random.Generator:
    """The generator of one sample's random choices.

    It depends on the four values alone (a BLAKE2b hash of them), so a clip is the same whatever the number of workers,
    their order, or where a run resumes.
    """
    key = f"{seed}/{epoch}/{view}/{sample_id}"  # numbers first: whatever the id holds, no two keys look alike
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "big"))


def sample_seed(seed: int, epoch: int, sample_id: str, view: int = 0) -> int:
    """63 bits that seed what happens to a clip after it is decoded, apart from ``sample_rng``'s choices before."""
    key = f"after/{seed}/{epoch}/{view}/{sample_id}"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def uniform_indices(
    num_frames: int, count: int, rng: np.random.Generator | None, clip: int = 0, clips: int = 1
) -> NDArray[np.int64]:
    """One frame from each of ``count`` equal segments of the video (Temporal Segment Networks, arXiv:1608.00859).

    With ``rng`` a random frame of each segment. Without it the segment's centre, or, where several clips of a video
    are tested, the centre of the ``clip``-th of ``clips`` equal parts of each segment. A video with fewer frames than
    ``count`` repeats frames. Places are rounded down to whole frames.

    Returns:
        int64 ``[T]`` with ``T = count``, never decreasing, each in ``[0, num_frames)``.

    Raises:
        ValueError: ``num_frames`` or ``count`` is below 1, or ``clip`` is not one of ``clips``.
    """
    _check(num_frames=num_frames, count=count)
    _check_clip(clip, clips)
    place = (clip + 0.5) / clips if rng is None else rng.random(count)  # inside the segment, as a share of it
    indices = ((np.arange(count) + place) * num_frames / count).astype(np.int64)
    return np.minimum(indices, num_frames - 1)  # rounding can reach num_frames


def dense_indices(
    num_frames: int, count: int, stride: int, rng: np.random.Generator | None, clip: int = 0, clips: int = 1
) -> NDArray[np.int64]:
    """``count`` frames, ``stride`` apart, from one window of the video (I3D, arXiv:1705.07750; SlowFast, 1812.03982).

    The window starts at random with ``rng``. Without it, it lies in the video's middle, or, where several clips are
    tested, the windows of the ``clips`` are spread evenly from the video's first frame to its last (starts rounded to
    the nearest frame). A video shorter than the window is read from its first frame, and its last frame repeats (as in
    SlowFast), which adds no jump as looping would.

    Returns:
        int64 ``[T]`` with ``T = count``, never decreasing, each in ``[0, num_frames)``.

    Raises:
        ValueError: ``num_frames``, ``count`` or ``stride`` is below 1, or ``clip`` is not one of ``clips``.
    """
    _check(num_frames=num_frames, count=count, stride=stride)
    _check_clip(clip, clips)
    spare = max(num_frames - ((count - 1) * stride + 1), 0)
    if rng is not None:
        start = int(rng.integers(spare + 1))
    else:
        start = spare // 2 if clips == 1 else (2 * spare * clip + clips - 1) // (2 * (clips - 1))
    return np.minimum(start + stride * np.arange(count, dtype=np.int64), num_frames - 1)


def fps_indices(times: NDArray[np.float64], fps: float) -> NDArray[np.int64]:
    """The frames of a video as if it had ``fps`` frames a second (SlowFast's target fps, arXiv:1812.03982).

    At each moment 0, 1/fps, 2/fps, ... the frame that is shown then, also where the frame rate varies; the last frame
    is shown as long as frames are on average. Sampling then picks from what is returned instead of from all frames.

    Args:
        times: ``[N]``, rising: seconds from the first frame to each.
        fps: frames a second wanted.

    Returns:
        int64 ``[M]``, never decreasing, from 0 up; M is the video's duration times ``fps``, rounded, at least 1.

    Raises:
        ValueError: no times, or ``fps`` is not positive.
    """
    _check(num_frames=len(times))
    if not fps > 0:
        raise ValueError(f"fps must be positive, not {fps}")
    if len(times) == 1:
        return np.zeros(1, np.int64)
    duration = times[-1] * len(times) / (len(times) - 1)
    moments = np.arange(max(1, round(duration * fps))) / fps
    return np.searchsorted(times, moments + ROUNDING_S, side="right") - 1


def random_resized_crop(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """A box of random area, shape and place (Inception, arXiv:1409.4842; the same rule as torchvision's).

    Args:
        scale: least and greatest area, as a share of the frame.
        ratio: least and greatest width : height.

    Returns:
        A box of at least 1x1 pixel inside the frame. When ten draws do not fit, the largest centred box with an allowed
        ratio, whose area may then lie outside ``scale``.

    Raises:
        ValueError: ``height`` or ``width`` is below 1, or a range is not positive and rising.
    """
    _check(height=height, width=width)
    if not (0 <= scale[0] <= scale[1] and 0 < ratio[0] <= ratio[1]):
        raise ValueError(f"crop ranges must be positive (least, greatest), not scale {scale}, ratio {ratio}")
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(area / shape)), round(math.sqrt(area * shape))
        if 0 < h <= height and 0 < w <= width:
            return Box(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)
    shape = min(max(width / height, ratio[0]), ratio[1])
    return _centred(height, width, max(1, min(height, round(width / shape))), max(1, min(width, round(height * shape))))


def square_crop(height: int, width: int, crop: int = 0, crops: int = 1) -> Box:
    """The largest square, in the centre; of three ``crops`` the ``crop``-th from one end of the longer side to the
    other (SlowFast's three-crop testing, arXiv:1812.03982).

    Raises:
        ValueError: ``height`` or ``width`` is below 1, or ``crops`` is neither 1 nor 3, or ``crop`` not one of them.
    """
    _check(height=height, width=width)
    if crops not in (1, 3) or not 0 <= crop < crops:
        raise ValueError(f"crops must be 1 or 3 and crop below it, not crop {crop} of {crops}")
    side = min(height, width)
    if crops == 1 or crop == 1:
        return _centred(height, width, side, side)
    return Box((height - side) * crop // 2, (width - side) * crop // 2, side, side)


def _centred(height: int, width: int, h: int, w: int) -> Box:
    return Box((height - h) // 2, (width - w) // 2, h, w)


def _check_clip(clip: int, clips: int) -> None:
    if not 0 <= clip < clips:
        raise ValueError(f"clip must be one of clips, not {clip} of {clips}")


def _check(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
