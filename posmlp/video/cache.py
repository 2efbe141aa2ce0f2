"""Cache of decoded videos as Arrow files: each video is decoded once, for any number of processes and runs.

Each video has one file with its frames, uncompressed, at the short side that clips are cropped from. The cache is meant
for data sets that fit on a disk (a 10 s video at 128 pixels takes about 20 MB). Each frame is a record batch, so a clip
reads only its own frames.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from posmlp import storage
from posmlp.errors import UserError
from posmlp.video.decode import DecodeError, Frames, ImageFolder, Span, Video, VideoInfo, VideoPart, cannot_open

MAX_FILE_BYTES = 2**33  # of one cache file: a small video file may decode to any number of frames
CACHE_VERSION = 5  # increase it when decoding or scaling changes, so that old cache files are not used


def cache_path(uri: str, images: int | None, short_side: int | None, cache_dir: str, span: Span | None = None) -> Path:
    """Path of the cache file of a video, or of a part of it.

    Its name is a hash of the video's location, size and modification time, so a replaced video is decoded again. A
    frame folder is represented by the size and time of its first picture.

    Raises:
        DecodeError: the video is missing.
    """
    location = storage.local_path(uri) if not storage.is_remote(uri) else uri
    try:
        version = storage.version(uri if images is None else uri.format(span[0] if span else 1))
    except (OSError, ValueError) as error:
        raise cannot_open(uri, error) from error
    key = f"{CACHE_VERSION}|{short_side}|{images}|{version}|{location}" + (f"|{span}" if span else "")
    return Path(cache_dir) / f"{hashlib.blake2b(os.fsencode(key), digest_size=16).hexdigest()}.arrow"


class CachedVideo:
    """A video in the cache.

    Attributes:
        info: properties of the video that was decoded.

    Raises:
        OSError: the file does not exist, or is incomplete because a machine stopped while writing it.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = pa.ipc.open_file(pa.memory_map(str(path)))
        except pa.ArrowInvalid as error:
            raise OSError(f"{path} is not a complete Arrow file") from error
        meta = self._file.schema.metadata
        self._shape = (int(meta[b"height"]), int(meta[b"width"]), 3)
        times = np.frombuffer(meta[b"times"]) if meta[b"times"] else None
        self.info = VideoInfo(self._file.num_record_batches, meta[b"codec"].decode(), times, 0, "pyav")

    def read(self, indices: Sequence[int]) -> Frames:
        """Read frames by number: uint8 ``[len(indices), H, W, 3]``."""
        out = np.empty((len(indices), *self._shape), np.uint8)
        for i, index in enumerate(indices):
            pixels = self._file.get_batch(index).column(0).buffers()[1]
            out[i] = np.frombuffer(pixels, np.uint8, out[i].size).reshape(self._shape)
        return out


def write_cache_file(video: Video | VideoPart | ImageFolder, short_side: int | None, path: Path) -> None:
    """Decode a whole video, or a whole part of one, into ``path``, a temporary name that the caller renames afterwards.

    Raises:
        DecodeError: the video is too long, or damaged. Every frame is decoded, so damage at the end fails here too.
        UserError: the file cannot be written.
    """
    frames = video.all_frames(short_side)
    first = next(frames)
    size = first.size * video.info.frames
    if size > MAX_FILE_BYTES:
        reason = f"its decoded frames take {size / 1e9:.0f} GB; leave out data.cache_dir, or cut the video"
        raise DecodeError(video.uri, reason)
    times = b"" if video.info.times is None else video.info.times.tobytes()
    shape = {"height": str(first.shape[0]), "width": str(first.shape[1])}
    meta = shape | {"times": times, "codec": video.info.codec, "uri": video.uri}
    schema = pa.schema([pa.field("pixels", pa.binary(first.size))], metadata=meta)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # not a memory map, because there a full disk kills the process
        with open(path, "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for frame in itertools.chain([first], frames):
                pixels = pa.py_buffer(np.ascontiguousarray(frame))
                column = pa.Array.from_buffers(schema.field(0).type, 1, [None, pixels])
                writer.write_batch(pa.record_batch([column], schema=schema))
        with open(path, "rb") as written:
            os.fsync(written.fileno())  # else a power cut may leave half a file under the final name
    except OSError as error:
        raise cache_write_error(path, error) from error


def cache_write_error(path: Path, error: OSError) -> UserError:
    """The error to raise when a file cannot be added to the cache."""
    reason = error.strerror or error
    return UserError(f"{path.parent}: cannot write decoded videos there ({reason}); see data.cache_dir")
