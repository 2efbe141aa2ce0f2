"""The clips of a video, from its manifest row: which frames, which box, at which size."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from posmlp.config import Config, DataSection
from posmlp.errors import UserError
from posmlp.video.cache import CachedVideo, cache_path, cache_write_error, write_cache_file
from posmlp.video.decode import MAX_FRAMES, DecodeError, Decoder, Frames, Span, VideoInfo
from posmlp.video.isolated import IsolatedVideo, call_isolated, open_isolated
from posmlp.video.sampling import (
    Box,
    dense_indices,
    fixed_crop,
    fps_indices,
    paced_indices,
    random_resized_crop,
    sample_rng,
    scaled_to_short_side,
    slowfast_dense_indices,
    slowfast_uniform_indices,
    square_crop,
    uniform_indices,
)


@dataclass(frozen=True)
class View:
    """One clip of a video, before the video is decoded.

    Attributes:
        indices: int64 ``[T]``, frame numbers.
        rng: for the remaining random choices of a training clip, its box and frame order; None for a validation view.
        crop, crops: the number of a validation view's square, and how many squares there are.
    """

    indices: NDArray[np.int64]
    rng: np.random.Generator | None
    crop: int = 0
    crops: int = 1


@dataclass(frozen=True)
class LoadedClips:
    """The views of a row.

    Attributes:
        clips: uint8 ``[V, T, H, W, 3]``, RGB.
        shown: float32 ``[V, 4]``, the part of the frame that each view shows: x1, y1, x2, y2 as fractions of it. Only
            boxes need it.
        decoder: the decoder used.
    """

    clips: Frames
    shown: NDArray[np.float32]
    decoder: Decoder


class Cut(NamedTuple):
    """How a view is cut from decoded frames.

    Attributes:
        frame: height and width to which frames are scaled first.
        box: what the view shows of such a frame.
        size: height and width of the clip; after scaling, those of the box.
    """

    frame: tuple[int, int]
    box: Box
    size: tuple[int, int]


Opened = tuple[IsolatedVideo | CachedVideo, Callable[[list[int]], Frames]]  # a video, and a function that reads frames


def views_per_video(config: Config, train: bool) -> int:
    """The number of clips that ``load_clips`` returns for a video, V."""
    return config.data.repeats if train else config.eval.clips * config.eval.crops


def load_clips(
    uri: str,
    sample_id: str,
    config: Config,
    *,
    epoch: int,
    train: bool,
    images: int | None = None,
    span: Span | None = None,
    first_view: int = 0,
) -> tuple[Frames, Decoder]:
    """All views of one video, decoded once. Every random choice derives from ``(train.seed, epoch, sample_id, view)``.

    In training, each of the ``data.repeats`` views draws its frames at random and one random box for all of them. In
    validation, view ``clip * eval.crops + crop`` has the frames of that clip and the square of that crop, independent
    of seed and epoch. With ``data.frame_order == "shuffled"`` a clip has the same frames and box as the ordered clip,
    in random order (in validation, always the same order for a sample and view).

    Args:
        uri, sample_id, images: from the manifest row; ``images`` is its ``frames``.
        span: the part of the video that clips are taken from (``span_of``).
        first_view: number of the first training view; above 0 where an epoch draws the video again.

    Returns:
        uint8 ``[V, T, H, W, 3]`` RGB with ``T = model.frames`` and ``H = W = model.image_size``; and the decoder used.

    Raises:
        DecodeError: the video cannot be read.
        UserError: the cache cannot be written.
    """
    variant, data = config.model.variant(), config.data
    with open_frames(uri, images, data, data.short_side or -(-variant.image_size * 8 // 7), span) as opened:
        info = opened[0].info
        if data.fps is not None and info.times is None:
            raise DecodeError(uri, "data.fps needs frame times, but a frame folder has none; leave data.fps out")
        views = list(choose_views(uri, info, variant.frames, sample_id, config, epoch, train, first_view))
        loaded = cut_views(opened, views, sample_id, config, choose_cut)
    return loaded.clips, loaded.decoder


def cut_views(
    opened: Opened,
    views: Sequence[View],
    sample_id: str,
    config: Config,
    choose: Callable[[int, int, View, Config], Cut],
) -> LoadedClips:
    """Read the frames of all views of a video once, and cut the clips from them.

    Args:
        opened: from ``open_frames``.
        choose: returns how a view is cut from decoded frames of a height and width. It draws from the view's generator
            before the order of shuffled frames is drawn.
    """
    video, read = opened
    wanted, positions = np.unique(np.concatenate([view.indices for view in views]), return_inverse=True)
    pictures = read(wanted.tolist())
    clips: list[Frames] = []
    shown = np.empty((len(views), 4), np.float32)
    for number, (view, order) in enumerate(zip(views, np.split(positions, len(views)), strict=True)):
        (height, width), box, size = choose(pictures.shape[1], pictures.shape[2], view, config)
        if config.data.frame_order == "shuffled":  # drawn last, so that frames and box are those of the ordered clip
            order = order[(view.rng or sample_rng(0, 0, sample_id, number)).permutation(len(order))]
        used, inverse = np.unique(order, return_inverse=True)  # short videos repeat frames: resize each once
        if (height, width) == pictures.shape[1:3]:
            clips.append(resize(crop_frames(pictures, box)[used], *size)[inverse])
        else:
            clips.append(crop_frames(scale(pictures[used], height, width), box)[inverse])
        left, top, right, bottom = box.left, box.top, box.left + box.width, box.top + box.height
        shown[number] = left / width, top / height, right / width, bottom / height
    return LoadedClips(np.stack(clips), shown, video.info.decoder)  # known now: PyAV takes over where decord fails


def choose_views(
    uri: str, info: VideoInfo, count: int, sample_id: str, config: Config, epoch: int, train: bool, first_view: int = 0
) -> Iterator[View]:
    """The views of a video, each of ``count`` frames.

    Raises:
        DecodeError: the frame times are implausible.
    """
    data = config.data
    numbers = frame_numbers(uri, info, data.fps)

    def pick(rng: np.random.Generator | None, clip: int = 0, clips: int = 1) -> NDArray[np.int64]:
        slowfast = rng is None and config.eval.clip_positions == "slowfast"
        if data.sampling == "dense" and slowfast:  # among the video's own frames: the target rate sets the span
            return slowfast_dense_indices(info.frames, count, count * data.stride * rate_ratio(info, data), clip, clips)
        if data.sampling == "dense":
            return numbers[dense_indices(len(numbers), count, data.stride, rng, clip, clips)]
        if slowfast:
            return numbers[slowfast_uniform_indices(len(numbers), count, clip, clips)]
        if rng is not None and (data.clip_share != (1, 1) or data.pace):
            return numbers[paced_indices(len(numbers), count, data.clip_share, data.pace, rng)]
        return numbers[uniform_indices(len(numbers), count, rng, clip, clips)]

    if train:
        for view in range(first_view, first_view + data.repeats):
            rng = sample_rng(config.train.seed, epoch, sample_id, view)
            yield View(pick(rng), rng)
    else:
        for clip, crop in itertools.product(range(config.eval.clips), range(config.eval.crops)):
            yield View(pick(None, clip, config.eval.clips), None, crop, config.eval.crops)


def frame_numbers(uri: str, info: VideoInfo, fps: float | None) -> NDArray[np.int64]:
    """The frames to sample from: all, or with ``fps`` those of a video resampled to it (``fps_indices``).

    Raises:
        DecodeError: the frame times are implausible.
    """
    if fps is None or info.times is None:
        return np.arange(info.frames)
    if info.times[-1] * fps > MAX_FRAMES:
        seconds = info.times[-1]
        raise DecodeError(uri, f"its frame times span {seconds:.0f} s, which is implausible; repair or remove it")
    return fps_indices(info.times, fps)


def rate_ratio(info: VideoInfo, data: DataSection) -> float:
    """A video's mean frame rate over ``data.fps``; 1 without it."""
    if data.fps is None or info.times is None or len(info.times) == 1:
        return 1.0
    return (len(info.times) - 1) / float(info.times[-1]) / data.fps


def choose_cut(height: int, width: int, view: View, config: Config) -> Cut:
    """How a view is cut from decoded frames of a height and width; ``eval.short_side`` scales those of validation."""
    size = config.model.variant().image_size
    if view.rng is None and config.eval.short_side:
        height, width = scaled_to_short_side(height, width, config.eval.short_side)
    return Cut((height, width), choose_box(height, width, view, config), (size, size))


def choose_box(height: int, width: int, view: View, config: Config) -> Box:
    """The box of the frames that a view shows.

    Args:
        height, width: of the frames; with ``eval.short_side``, of the scaled ones.
    """
    data = config.data
    if view.rng is not None:
        return random_resized_crop(height, width, data.crop_scale, data.crop_ratio, view.rng)
    if data.full_frame:
        return Box(0, 0, height, width)
    if config.eval.short_side:
        return fixed_crop(height, width, config.model.variant().image_size, view.crop, view.crops)
    return square_crop(height, width, view.crop, view.crops)


def crop_frames(frames: Frames, box: Box) -> Frames:
    """A view of the box in all frames: ``[T, h, w, 3]`` of ``[T, H, W, 3]``."""
    return frames[:, box.top : box.top + box.height, box.left : box.left + box.width]


def scale(frames: Frames, height: int, width: int) -> Frames:
    """uint8 ``[T, H, W, 3]`` to ``[T, height, width, 3]``, bilinear without antialiasing, as in PySlowFast."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    pixels = torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear")
    scaled: Frames = pixels.round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    return scaled


def resize(frames: Frames, height: int, width: int) -> Frames:
    """uint8 ``[T, H, W, 3]`` to ``[T, height, width, 3]``, bilinear with antialiasing."""
    if frames.shape[1:3] == (height, width):
        return frames
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)  # a view: channels stay last in memory
    pixels = torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    resized: Frames = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    return resized


@contextmanager
def open_frames(
    uri: str, images: int | None, data: DataSection, short_side: int, span: Span | None = None
) -> Iterator[Opened]:
    """Open a video, or its cache file. Yields it and a function that reads frames, scaled to the short side."""
    if data.cache_dir is None:
        with open_isolated(uri, images, data.decoder, timeout_s=data.decode_timeout_s, span=span) as video:
            yield video, lambda indices: video.read(indices, short_side)
        return
    limit = data.decode_timeout_s
    path: Path = call_isolated(uri, cache_path, uri, images, short_side, data.cache_dir, span, timeout_s=limit)
    try:
        cached = CachedVideo(path)
    except OSError:  # it does not exist yet, or is incomplete because a machine stopped
        with cache_file_lock(path):
            try:
                cached = CachedVideo(path)  # another process has decoded it meanwhile
            except OSError:
                cached = decode_to_cache(path, uri, images, short_side, limit, span)
    yield cached, cached.read


def decode_to_cache(
    path: Path, uri: str, images: int | None, short_side: int, limit: float, span: Span | None = None
) -> CachedVideo:
    """Decode a whole video, or a whole part of one, into its cache file, within ``limit`` seconds."""
    temporary = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.tmp")
    try:
        with open_isolated(uri, images, timeout_s=limit, span=span) as video:
            video.run(write_cache_file, short_side, temporary)
        temporary.replace(path)
    except OSError as error:
        raise cache_write_error(path, error) from error
    finally:  # in this process, because the decoding process may have been killed
        with contextlib.suppress(OSError):
            temporary.unlink()
    try:
        return CachedVideo(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read the cache file that was just written ({error})") from error


@contextmanager
def cache_file_lock(path: Path) -> Iterator[None]:
    """Lock a cache file, so that only one process of this machine writes it.

    The kernel frees the lock of a process that dies. On a file system without locks, no process waits.
    """
    lock = path.with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise cache_write_error(path, error) from error
    with file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:  # waiting processes have the lock file open, and find the cache file complete
            lock.unlink(missing_ok=True)
