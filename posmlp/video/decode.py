"""From a video file to a clip: decode the frames asked for (once only, with a cache), crop and resize them."""

import contextlib
import hashlib
import os
import re
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import decord
import numpy as np
import torch
from numpy.typing import NDArray

from posmlp.config import DataSection
from posmlp.errors import UserError
from posmlp.video.sampling import centre_crop, dense_indices, random_resized_crop, sample_rng, uniform_indices

Frames = NDArray[np.uint8]  # [T, H, W, 3] RGB, or one frame [H, W, 3]
Choose = Callable[[int], NDArray[np.int64]]  # number of frames of a video -> indices wanted

CACHE_VERSION = 1  # raise it when decoding or resizing changes, so that old cache files are not used
DECORD_ERRORS = (decord.DECORDError, RuntimeError, AssertionError, IndexError, StopIteration, ValueError)

# How video files begin (MP4, Matroska, AVI, FLV, Ogg, GIF, WMV, MPEG): tells a damaged video from something else.
VIDEO_HEAD = re.compile(
    rb".{4}(?:ftyp|moov|mdat|wide|free|skip)|\x1aE\xdf\xa3|RIFF|FLV|OggS|GIF8|\x30\x26\xb2\x75|\x00\x00\x01[\xb3\xba]",
    re.DOTALL,
)

decord.logging.set_level(decord.logging.QUIET)  # failures are raised; FFmpeg's own lines would only flood the log


class DecodeError(Exception):
    """A video that cannot be read.

    Attributes:
        uri: the file.
        reason: what is wrong with it and what to do.
    """

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(uri, reason)  # the arguments as they came, so that the error can be pickled
        self.uri = uri
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.uri}: {self.reason}"


def load_clip(
    uri: str,
    sample_id: str,
    data: DataSection,
    *,
    frames: int,
    size: int,
    seed: int,
    epoch: int,
    view: int = 0,
    train: bool,
) -> Frames:
    """One clip of a video. Every random choice derives from ``(seed, epoch, sample_id, view)``.

    For training, frames are drawn at random and one random box crops them all; for validation, both are centred and
    nothing depends on ``seed`` or ``epoch``. With ``data.frame_order == "shuffled"`` the clip has the same frames and
    the same crop as the ordered one, in a random order (for validation, always the same one for a sample and view).

    Returns:
        uint8 ``[T, H, W, 3]`` RGB with ``T = frames`` and ``H = W = size``.

    Raises:
        DecodeError: the video cannot be read.
        UserError: the cache cannot be written.
    """
    rng = sample_rng(seed, epoch, sample_id, view) if train else None

    def choose(num_frames: int) -> NDArray[np.int64]:
        if data.sampling == "dense":
            return dense_indices(num_frames, frames, data.stride, rng)
        return uniform_indices(num_frames, frames, rng)

    short_side = data.short_side or -(-size * 8 // 7)
    if data.cache_dir:
        clip = cached_frames(uri, choose, short_side, data.cache_dir)
    else:
        clip = read_frames(uri, choose, short_side)

    height, width = clip.shape[1:3]
    box = (
        random_resized_crop(height, width, data.crop_scale, data.crop_ratio, rng) if rng else centre_crop(height, width)
    )
    clip = clip[:, box.top : box.top + box.height, box.left : box.left + box.width]
    if data.frame_order == "shuffled":  # drawn last: the other choices stay those of the ordered clip
        clip = clip[(rng or sample_rng(0, 0, sample_id, view)).permutation(frames)]
    return _resize(clip, size, size)


def read_frames(uri: str, choose: Choose, short_side: int | None) -> Frames:
    """The frames of a video that ``choose`` picks.

    Args:
        uri: path of a video file.
        choose: given the number of frames N, returns int ``[T]`` in ``[0, N)``, in any order, repeats allowed.
        short_side: the frames are scaled to it, aspect kept, never upscaled; None keeps their size.

    Returns:
        uint8 ``[T, H, W, 3]`` RGB.

    Raises:
        DecodeError: the video cannot be read.
        ValueError: ``choose`` picks no frames or some outside the video.
    """
    reader = _open(uri)  # one reader per call: memory grows in readers that are kept
    indices = _chosen(choose, len(reader))
    wanted, back = np.unique(indices, return_inverse=True)
    clip: Frames = np.stack(list(_decode(reader, uri, set(wanted.tolist()), short_side)))[back]
    return clip


def cached_frames(uri: str, choose: Choose, short_side: int | None, cache_dir: str | Path) -> Frames:
    """``read_frames`` through a cache: the first call decodes the whole video, later ones only read its frames.

    A video's frames lie in one ``.npy`` file, uint8 ``[N, H, W, 3]``, named after the video's path, size and time of
    change, so a replaced video is decoded anew. Any number of processes may share the folder. Because every frame is
    decoded, a video with a damaged end always fails here, where ``read_frames`` may get by without the end.

    Raises:
        DecodeError: the video cannot be read.
        UserError: the cache cannot be written.
        ValueError: ``choose`` picks no frames or some outside the video.
    """
    try:
        stat = os.stat(uri)
    except (OSError, ValueError):
        _open(uri)  # raises, with the reason
        raise
    key = f"{CACHE_VERSION}|{short_side}|{stat.st_size}|{stat.st_mtime_ns}|{os.path.abspath(uri)}"
    path = Path(cache_dir) / f"{hashlib.blake2b(os.fsencode(key), digest_size=16).hexdigest()}.npy"
    try:
        video = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # not there yet, or cut short when the machine stopped
        _store(uri, short_side, path)
        video = np.load(path, mmap_mode="r")
    clip: Frames = video[_chosen(choose, len(video))]
    return clip


def _store(uri: str, short_side: int | None, path: Path) -> None:
    """Decode the whole video into ``path``, which appears only when complete."""
    reader = _open(uri)
    frames = _decode(reader, uri, range(len(reader)), short_side)
    first = next(frames)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.tmp")
        try:
            with open(temporary, "xb") as file:  # not a memory map: a full disk would kill the process there
                shape = (len(reader), *first.shape)
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                file.write(first.tobytes())
                for frame in frames:
                    file.write(frame.tobytes())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path.parent}: cannot write decoded videos there ({reason}); see data.cache_dir") from error


def _open(uri: str) -> decord.VideoReader:
    try:
        with open(uri, "rb") as file:
            head = file.read(16)
    except FileNotFoundError as error:
        raise DecodeError(uri, "the file is missing; check the path in the manifest") from error
    except IsADirectoryError as error:
        raise DecodeError(uri, "this is a folder; expected a video file") from error
    except (OSError, ValueError) as error:
        raise DecodeError(uri, f"the file cannot be opened ({error})") from error
    if not head:
        raise DecodeError(uri, "the file is empty (0 bytes); fetch it again")
    try:
        # an absolute path, because FFmpeg takes what stands before a colon for a protocol
        return decord.VideoReader(os.path.abspath(uri), num_threads=1)
    except DECORD_ERRORS as error:
        if "cannot find video stream" in str(error):
            reason = "no video stream in the file (only sound or other data); remove it from the manifest"
        elif "Invalid frame count" in str(error):
            reason = "no frames in the video stream; fetch the file again, or remove it from the manifest"
        elif VIDEO_HEAD.match(head):
            reason = "the video is truncated or corrupt, it cannot be opened; fetch it again"
        else:
            reason = "not a video, or of a format that FFmpeg does not know; convert it, or remove it from the manifest"
        raise DecodeError(uri, reason) from error


def _decode(reader: decord.VideoReader, uri: str, wanted: Collection[int], short_side: int | None) -> Iterator[Frames]:
    """The ``wanted`` frames, one by one in rising order: each uint8 ``[H, W, 3]``.

    All frames before the last one wanted are decoded. Seeking would be faster for a clip from the end of a long video,
    yet where frames refer across a key frame (open GOPs, usual in HEVC and MPEG) decord then delivers a neighbour of
    the frame, and the cache would differ from the file.
    """
    height = width = 0
    for index in range(max(wanted) + 1):
        try:
            decoded = reader.next()
        except DECORD_ERRORS as error:
            # not which frame: decord works ahead, so the error comes somewhere before it, and not always at the same
            reason = f"the video is truncated or corrupt, not all of its {len(reader)} frames decode; fetch it again"
            raise DecodeError(uri, reason) from error
        if index not in wanted:
            continue
        frame: Frames = decoded.asnumpy()
        h, w = frame.shape[:2]
        # FFmpeg pads each line of pixels. Where the padded line is a multiple of the width (8, 16, 96, 144, ...),
        # decord takes the padding for more channels and gives [H, W, 4] or beyond (and its batches fail): cut it off.
        frame = frame.reshape(h, -1)[:, : 3 * w].reshape(h, w, 3)
        if not height:  # the first frame sets the size: a stream may change it halfway
            scale = min(1.0, short_side / min(h, w)) if short_side else 1.0
            height, width = max(1, round(h * scale)), max(1, round(w * scale))
        yield _resize(frame[None], height, width)[0]


def _resize(frames: Frames, height: int, width: int) -> Frames:
    """uint8 ``[T, H, W, 3]`` to ``[T, height, width, 3]``, bilinear with antialiasing."""
    frames = np.ascontiguousarray(frames)
    if frames.shape[1:3] == (height, width):
        return frames
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)  # [T, 3, H, W], a view: channels stay last in memory
    pixels = torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def _chosen(choose: Choose, num_frames: int) -> NDArray[np.int64]:
    indices = np.asarray(choose(num_frames))
    if indices.ndim != 1 or not len(indices) or indices.min() < 0 or indices.max() >= num_frames:
        raise ValueError(f"frames {indices} were chosen from a video of {num_frames}; expected one or more in range")
    return indices
