"""Decoded videos, kept as Arrow files: each is decoded once, and any number of processes and runs read its frames.

One file a video, its frames uncompressed at the short side that clips are cut from: meant for sets that fit on a disk
(a 10 s video at 128 pixels takes about 20 MB). A record batch is a frame, so that a clip reads its own frames alone.
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
from posmlp.video.decode import DecodeError, Frames, ImageFolder, Video, VideoInfo, cannot_open

MOST_BYTES = 2**33  # of a video's file; a small video may have frames without end
CACHE_VERSION = 3  # raise it when decoding or scaling changes, so that old cache files are not used


def cache_path(uri: str, images: int | None, short_side: int | None, cache_dir: str) -> Path:
    """Where a video's frames lie: named after its place, size and time of change, so a replaced video is decoded anew.

    Of a frame folder the first picture's size and time stand for all.

    Raises:
        DecodeError: the video is missing.
    """
    place = storage.local_path(uri) if not storage.is_remote(uri) else uri
    try:
        version = storage.version(uri if images is None else uri.format(1))
    except (OSError, ValueError) as error:
        raise cannot_open(uri, error) from error
    key = f"{CACHE_VERSION}|{short_side}|{images}|{version}|{place}"
    return Path(cache_dir) / f"{hashlib.blake2b(os.fsencode(key), digest_size=16).hexdigest()}.arrow"


class CachedVideo:
    """A video's file in the cache.

    Attributes:
        info: what was known of the video that was decoded.

    Raises:
        OSError: it is not there, or was cut short when a machine stopped.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = pa.ipc.open_file(pa.memory_map(str(path)))
        except pa.ArrowInvalid as error:
            raise OSError(f"{path} is not a whole Arrow file") from error
        meta = self._file.schema.metadata
        self._shape = (int(meta[b"height"]), int(meta[b"width"]), 3)
        times = np.frombuffer(meta[b"times"]) if meta[b"times"] else None
        self.info = VideoInfo(self._file.num_record_batches, meta[b"codec"].decode(), times, 0, "pyav")

    def read(self, indices: Sequence[int]) -> Frames:
        """Some frames: uint8 ``[len(indices), H, W, 3]``."""
        out = np.empty((len(indices), *self._shape), np.uint8)
        for i, index in enumerate(indices):
            pixels = self._file.get_batch(index).column(0).buffers()[1]
            out[i] = np.frombuffer(pixels, np.uint8, out[i].size).reshape(self._shape)
        return out


def store(video: Video | ImageFolder, short_side: int | None, path: Path) -> None:
    """Decode a whole video into ``path``; for the cache, a name that the caller changes when this has returned.

    Raises:
        DecodeError: the video is too long, or damaged: as every frame is decoded, a damaged end always fails here.
        UserError: the file cannot be written.
    """
    frames = video.all_frames(short_side)
    first = next(frames)
    size = first.size * video.info.frames
    if size > MOST_BYTES:
        reason = f"its decoded frames take {size / 1e9:.0f} GB; leave out data.cache_dir, or cut the video"
        raise DecodeError(video.uri, reason)
    times = b"" if video.info.times is None else video.info.times.tobytes()
    shape = {"height": str(first.shape[0]), "width": str(first.shape[1])}
    meta = shape | {"times": times, "codec": video.info.codec, "uri": video.uri}
    schema = pa.schema([pa.field("pixels", pa.binary(first.size))], metadata=meta)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # not a memory map: a full disk would kill the process there
        with open(path, "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for frame in itertools.chain([first], frames):
                pixels = pa.py_buffer(np.ascontiguousarray(frame))
                column = pa.Array.from_buffers(schema.field(0).type, 1, [None, pixels])
                writer.write_batch(pa.record_batch([column], schema=schema))
        with open(path, "rb") as done:
            os.fsync(done.fileno())  # else a power cut may leave the final name on half a file
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> UserError:
    """Why a file cannot be added to the cache."""
    reason = error.strerror or error
    return UserError(f"{path.parent}: cannot write decoded videos there ({reason}); see data.cache_dir")
