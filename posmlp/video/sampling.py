"""Which frames and which rectangle of a video become a clip: pure functions of sizes and a random generator."""

import hashlib
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


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


def uniform_indices(num_frames: int, count: int, rng: np.random.Generator | None) -> NDArray[np.int64]:
    """One frame from each of ``count`` equal segments of the video (Temporal Segment Networks, arXiv:1608.00859).

    With ``rng`` a random frame of each segment, without it the segment's centre. A video with fewer frames than
    ``count`` repeats frames.

    Returns:
        int64 ``[T]`` with ``T = count``, never decreasing, each in ``[0, num_frames)``.

    Raises:
        ValueError: ``num_frames`` or ``count`` is below 1.
    """
    _check(num_frames=num_frames, count=count)
    place = 0.5 if rng is None else rng.random(count)  # inside the segment, as a share of it
    indices = ((np.arange(count) + place) * num_frames / count).astype(np.int64)
    return np.minimum(indices, num_frames - 1)  # rounding can reach num_frames


def dense_indices(num_frames: int, count: int, stride: int, rng: np.random.Generator | None) -> NDArray[np.int64]:
    """``count`` frames, ``stride`` apart, from one window of the video (I3D, arXiv:1705.07750; SlowFast, 1812.03982).

    The window starts at random with ``rng`` and lies in the video's middle without. A video shorter than the window is
    read from its first frame, and its last frame repeats (as in SlowFast), which adds no jump as looping would.

    Returns:
        int64 ``[T]`` with ``T = count``, never decreasing, each in ``[0, num_frames)``.

    Raises:
        ValueError: ``num_frames``, ``count`` or ``stride`` is below 1.
    """
    _check(num_frames=num_frames, count=count, stride=stride)
    spare = max(num_frames - ((count - 1) * stride + 1), 0)
    start = spare // 2 if rng is None else int(rng.integers(spare + 1))
    return np.minimum(start + stride * np.arange(count, dtype=np.int64), num_frames - 1)


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


def centre_crop(height: int, width: int) -> Box:
    """The largest centred square.

    Raises:
        ValueError: ``height`` or ``width`` is below 1.
    """
    _check(height=height, width=width)
    side = min(height, width)
    return _centred(height, width, side, side)


def _centred(height: int, width: int, h: int, w: int) -> Box:
    return Box((height - h) // 2, (width - w) // 2, h, w)


def _check(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
