"""The bytes of a video in a shard: its file unchanged, or re-encoded for fast random access."""

from __future__ import annotations

import io
from collections.abc import Iterable
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray

from posmlp import storage
from posmlp.video.decode import DecodeError, Frames, ImageFolder, Video, VideoInfo, VideoPart, convert

FOLDER_FPS = 12  # for frame folders, which have no frame rate; that of Something-Something
UNITS = (90_000, 10_000_000, 1000, 1)  # of the times in a packed file, per second: the first that fits the video
MAX_STEP = 2**28  # units between two frames: MP4 has 31 bits for several, as B-frames are shown later than decoded
KEYFRAME_INTERVAL = 12  # frames, if only the size is given
PRESET, CRF = "veryfast", 20  # of x264; this rate factor costs a network no accuracy (18 is visually lossless)


def pack(
    video: Video | VideoPart | ImageFolder, short_side: int | None, keyframe_interval: int | None
) -> dict[str, object]:
    """The bytes and properties of a video that decodes without errors. Runs in the decoding process.

    Args:
        short_side: re-encode the video at this short side (never upscaled); None keeps its size.
        keyframe_interval: re-encode it with a key frame every N frames. If both are None, the file stays unchanged,
            except that a frame folder and a part of a video always become a video.

    Returns:
        ``data: bytes``, ``num_frames, height, width`` (as shown) ``: int``, ``fps: float | None``, ``codec: str``,
        ``key_frames: int``.

    Raises:
        DecodeError: the video is damaged.
    """
    if short_side is None and keyframe_interval is None and isinstance(video, Video):
        height, width = video.verify()
        data = video.source if isinstance(video.source, bytes) else storage.read_bytes(video.source)
        info = video.info
    else:
        times = video.info.times
        if times is None:
            times = np.arange(video.info.frames) / FOLDER_FPS
        frames, fps = video.all_frames(short_side), video.info.fps or FOLDER_FPS
        data, height, width = encode(video.uri, frames, times, fps, keyframe_interval or KEYFRAME_INTERVAL)
        info = read_info(video.uri, data)
    return properties(data, info, height, width)


def properties(data: bytes, info: VideoInfo, height: int, width: int) -> dict[str, object]:
    """What a shard has of a video."""
    return {
        "data": data,
        "num_frames": info.frames,
        "height": height,
        "width": width,
        "fps": info.fps,
        "codec": info.codec,
        "key_frames": info.key_frames,
    }


def read_info(uri: str, data: bytes) -> VideoInfo:
    """The properties of an encoded video."""
    packed = Video(uri, content=data)
    info = packed.info
    packed.close()
    return info


def encode(
    uri: str, frames: Iterable[Frames], times: NDArray[np.float64], fps: float, keyframe_interval: int
) -> tuple[bytes, int, int]:
    """Encode as H.264 in MP4, without sound; every frame keeps its time. Returns the file, height and width.

    Key frames come at a fixed interval and no frame refers to one across them. Sides are rounded down to even numbers,
    as H.264's 4:2:0 needs. The same input gives the same bytes, because x264 runs one thread and writes no dates.

    Args:
        uri: the video that an error names.
        frames: upright, uint8 ``[H, W, 3]`` each.
        times: of the frames, float64 ``[N]`` in seconds.
        fps: nominal frame rate, for x264.
    """
    units = choose_units(uri, times)
    # Otherwise an edit list in milliseconds may hide the frames of a very short video, and times have other units.
    scales = dict.fromkeys(("movie_timescale", "video_track_timescale"), str(units.denominator))
    file = io.BytesIO()
    height = width = 0
    with av.open(file, "w", format="mp4", options={"fflags": "bitexact"} | scales) as container:
        # without mbtree: its vector code reads uninitialised memory, so the bytes would differ between runs
        x264 = f"keyint={keyframe_interval}:min-keyint={keyframe_interval}:scenecut=0:open-gop=0:threads=1:mbtree=0"
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.options = {"preset": PRESET, "crf": str(CRF), "x264-params": x264}
        stream.pix_fmt = "yuv420p"
        for number, frame in enumerate(frames):
            if not height:
                height, width = (max(2, side - side % 2) for side in frame.shape[:2])
                stream.height, stream.width = height, width
                stream.codec_context.time_base = units
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = convert(picture, height, width, "yuv420p")
            picture.pts, picture.time_base = round(times[number] / units), units
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return file.getvalue(), height, width


def choose_units(uri: str, times: NDArray[np.float64]) -> Fraction:
    """The unit of a packed video's times, in seconds: every frame needs a time of its own.

    Args:
        times: of the frames, float64 ``[N]`` in seconds.

    Raises:
        DecodeError: no unit of ``UNITS`` fits.
    """
    for rate in UNITS:
        steps = np.diff(np.round(times * rate))
        if ((steps >= 1) & (steps <= MAX_STEP)).all():
            return Fraction(1, rate)
    steps = np.diff(times)
    raise DecodeError(
        uri,
        f"its frames are {steps.min():.3g} to {steps.max():.3g} s apart, which no MP4 file can say; pack it unchanged, "
        "without --short-side and --keyframe-interval, or remove it",
    )
