"""A video's frames, exactly: frame ``i`` is the ``i``-th in the order of presentation, whatever the file's structure.

PyAV reads the packets of the stream once, without decoding (about 2 ms a file): their presentation times are the list
of frames. A frame is then found by its time: from the key frame at or before it, the packets are decoded, and those of
an H.264 stream that no other frame refers to are skipped where they are not wanted. Where the packets' times do not
tell the frames (AVI, a few old codecs), the whole stream is decoded and counted.

This module needs neither PyTorch nor the rest of the package: it runs in a child process (``posmlp.video.isolated``).
"""

from __future__ import annotations

import bisect
import io
import itertools
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import av
import av.error
import decord
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray

from posmlp import storage
from posmlp.errors import UserError

Frames = NDArray[np.uint8]  # [T, H, W, 3] RGB, or one frame [H, W, 3]
Decoder = Literal["pyav", "decord"]
Allocate = Callable[[tuple[int, ...]], Frames]  # memory for uint8 pixels of a shape

# Codecs and containers whose packets have the presentation times of their frames, one frame a packet.
TIMED_CODECS = ("h264", "hevc", "vp9", "av1", "libdav1d", "mpeg1video", "mpeg2video", "mpeg4")
TIMED_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpeg", "mpegts", "flv")
SEEKABLE_CONTAINERS = TIMED_CONTAINERS[:2]  # with an index of key frames; the others guess by position
DECLARED_CONTAINERS = ("matroska,webm", "avi", "flv")  # with their duration in the header; others' is an estimate
# Containers that may be opened: a playlist (HLS, DASH, concat) would make FFmpeg read whatever files it names.
CONTAINERS = (
    *("mov", "matroska", "avi", "flv", "gif", "asf", "mpeg", "mpegts", "mpegvideo", "ogg", "h264", "hevc", "m4v"),
    *("ivf", "nut", "mxf", "rm", "dv", "yuv4mpegpipe", "wav", "mp3"),
)
SEEK_GAP = 4  # frames between two wanted ones above which a seek pays
TOO_LARGE = "it needs more memory than a decoder may take; scale the video down"
MAX_FRAMES = 10**7  # of a video: four days at 30 a second; a damaged file, or a hostile one, may claim years
KEPT_BYTES = 2**28  # of decoded frames that are kept while a stream is counted
IMAGE_CODECS = {b"\xff\xd8": "mjpeg", b"\x89P": "png", b"BM": "bmp", b"RI": "webp"}  # by a file's first two bytes

# Where EXIF data begin in a JPEG, PNG or WebP file, and what their orientation asks for: mirror the picture from top to
# bottom, then turn it by so many quarters to the left.
EXIF_MARKS = (b"Exif\0\0", b"eXIf", b"EXIF")
EXIF = re.compile(rb"(?:Exif\0\0|eXIf|EXIF.{4})(II\*\0|MM\0\*)", re.DOTALL)
ORIENTATION = 0x0112
UPRIGHT = {2: (True, 2), 3: (False, 2), 4: (True, 0), 5: (True, -1), 6: (False, -1), 7: (True, 1), 8: (False, 1)}

# How video files begin (MP4, Matroska, AVI, FLV, Ogg, GIF, WMV, MPEG): tells a damaged video from something else.
VIDEO_HEAD = re.compile(
    rb".{4}(?:ftyp|moov|mdat|wide|free|skip)|\x1aE\xdf\xa3|RIFF|FLV|OggS|GIF8|\x30\x26\xb2\x75|\x00\x00\x01[\xb3\xba]",
    re.DOTALL,
)
HEAD_BYTES = 256
FFMPEG_ERRORS = (av.error.FFmpegError, ValueError, OverflowError, EOFError)
DECORD_ERRORS = (decord.DECORDError, RuntimeError, AssertionError, IndexError, StopIteration, ValueError)

decord.logging.set_level(decord.logging.QUIET)  # failures are raised; FFmpeg's own lines would only flood the log
av.logging.set_level(av.logging.PANIC)


def _allocate(shape: tuple[int, ...]) -> Frames:
    return np.empty(shape, np.uint8)


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


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video before a picture of it is decoded.

    Attributes:
        frames: how many it has, N.
        codec: FFmpeg's name of it.
        times: float64 ``[N]``, seconds from the first frame to each; None for a frame folder.
        key_frames: how many frames are key frames.
        decoder: what delivers the pictures; decord only where it was asked for and finds the same frames.
    """

    frames: int
    codec: str
    times: NDArray[np.float64] | None
    key_frames: int
    decoder: Decoder

    @property
    def fps(self) -> float | None:
        """Mean frames a second; None where times are unknown or there is one frame alone."""
        if self.times is None or len(self.times) < 2 or self.times[-1] <= 0:
            return None
        return float((len(self.times) - 1) / self.times[-1])


def open_video(uri: str, images: int | None = None, decoder: Decoder = "pyav") -> Video | ImageFolder:
    """Open a video file, or a folder of ``images`` numbered pictures whose name template is the uri (1: an image).

    Raises:
        DecodeError: it cannot be read.
    """
    return Video(uri, decoder) if images is None else ImageFolder(uri, images)


class Video:
    """A video file, of any place (``posmlp.storage``).

    Args:
        uri: a path or URI. Local files are read as they are needed, others at once, into memory.
        decoder: decord is used if it finds the same number of frames in a stream whose packets tell their times.
        content: the file, where it has been read already.

    Raises:
        DecodeError: the file is missing, not a video, damaged or cut short.
    """

    def __init__(self, uri: str, decoder: Decoder = "pyav", content: bytes | None = None) -> None:
        self.uri = uri
        self.source, self.head = _fetch(uri) if content is None else (content, content[:HEAD_BYTES])
        self.pts: list[int] = []  # time of each frame in the stream's units, rising
        self.keys: list[int] = []  # numbers of the key frames
        self._kept: list[av.VideoFrame] = []
        try:
            self._container = self.open_container()
            self.info = self._index()
        except FFMPEG_ERRORS as error:
            raise DecodeError(uri, self._cannot_open()) from error
        except MemoryError as error:
            raise DecodeError(uri, TOO_LARGE) from error
        if decoder == "decord" and self._decord_agrees():
            self.info = replace(self.info, decoder="decord")

    def close(self) -> None:
        """Give the file back."""
        self._container.close()

    def open_container(self) -> InputContainer:
        """The file as PyAV's container, opened anew."""
        source = io.BytesIO(self.source) if isinstance(self.source, bytes) else f"file:{self.source}"
        options = {"format_whitelist": ",".join(CONTAINERS)}
        return cast(InputContainer, av.open(source, options=options, metadata_errors="replace"))

    def read(self, indices: Sequence[int], short_side: int | None = None, allocate: Allocate = _allocate) -> Frames:
        """Some frames.

        Args:
            indices: their numbers, in ``[0, N)``, rising, none twice.
            short_side: the frames are scaled to it, aspect kept, never upscaled; None keeps their size.
            allocate: makes the memory for the result.

        Returns:
            uint8 ``[len(indices), H, W, 3]`` RGB.

        Raises:
            DecodeError: the video is damaged.
        """
        if self.info.decoder == "decord":
            try:
                return _gather(self._by_decord(indices), len(indices), short_side, allocate)
            except DECORD_ERRORS:
                self.info = replace(self.info, decoder="pyav")
        if not self.timed:
            return self._gather(self._by_order(indices), indices, short_side, allocate)
        try:
            return self._gather(self._by_time(indices), indices, short_side, allocate)
        except DecodeError:  # a stream may not hold what its key frames promise: without seeking and skipping then
            return self._gather(self._by_order(indices), indices, short_side, allocate)

    def all_frames(self, short_side: int | None = None) -> Iterator[Frames]:
        """Every frame in order, uint8 ``[H, W, 3]`` each, scaled as by ``read``.

        Raises:
            DecodeError: the video is damaged; after the frames before the damage.
        """
        height = width = 0
        for frame in self.pictures():
            if not height:
                height, width = scaled(frame.height, frame.width, short_side)
            yield _to_rgb(frame, height, width)

    def pictures(self) -> Iterator[av.VideoFrame]:
        """Every frame in order as PyAV's, with its time, and not turned upright.

        Raises:
            DecodeError: the video is damaged; after the frames before the damage.
        """
        everything = range(self.info.frames)
        return self._watched(self._by_order(everything), everything)

    def verify(self) -> tuple[int, int]:
        """Decode every frame; returns height and width in pixels, as shown.

        Raises:
            DecodeError: the video is damaged.
        """
        sizes = [_shown(frame) for frame in self.pictures()]
        return sizes[0]

    # What the packets say ------------------------------------------------------------------------------------------

    def _stream(self, container: InputContainer) -> VideoStream:
        pictures = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]  # cover art
        if not pictures:
            raise DecodeError(
                self.uri, "no video stream in the file (only sound or other data); remove it from the manifest"
            )
        stream = pictures[0]
        if stream.codec_context is None:
            raise DecodeError(self.uri, "its codec is unknown to FFmpeg; convert the video")
        if not stream.codec_context.is_open:
            stream.thread_type = "NONE"  # many processes decode: more threads each would only get in each other's way
        return stream

    def _index(self) -> VideoInfo:
        """Read all packets: they tell the frames' times and the key frames."""
        container = self._container
        stream = self._stream(container)
        exact = container.format.name == TIMED_CONTAINERS[0]  # tells the number of its packets
        declared = container.duration / av.time_base if container.duration and not exact else 0.0
        found: list[tuple[int, bool]] = []  # time of presentation, key frame
        untimed, packets, end = False, 0, 0.0
        for packet in container.demux() if declared else container.demux(stream):
            time = packet.dts if packet.pts is None else packet.pts
            if time is not None and packet.time_base:
                end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index != stream.index or not packet.size:
                continue
            packets += 1
            if packet.is_discard:  # before the start of an edit list: decoded, not shown
                continue
            untimed |= packet.pts is None
            pts = -1 if packet.pts is None else packet.pts
            found.append((pts, packet.is_keyframe))
            if packets > MAX_FRAMES:
                raise DecodeError(self.uri, f"more than {MAX_FRAMES} frames; cut it into shorter videos")
        if not found:
            raise DecodeError(
                self.uri, "no frames in the video stream; fetch the file again, or remove it from the manifest"
            )
        self._check_length(container, stream, packets, declared, end)
        found.sort()
        self.pts = [pts for pts, _ in found]
        self.keys = [i for i, (_, key) in enumerate(found) if key]
        codec = stream.codec_context.name
        self.timed = (
            not untimed
            and found[0][1]  # what is shown before the first key frame may not decode
            and all(a < b for a, b in itertools.pairwise(self.pts))
            and codec in TIMED_CODECS
            and container.format.name in TIMED_CONTAINERS
        )
        self.seekable = container.format.name in SEEKABLE_CONTAINERS
        self.skips = codec == "h264"  # where FFmpeg knows for certain what nothing refers to
        times = np.array(self.pts, np.float64) * float(stream.time_base or 0) if self.timed else self._count()
        return VideoInfo(len(times), codec, times - times[0], len(self.keys), "pyav")

    def _check_length(
        self, container: InputContainer, stream: VideoStream, packets: int, declared: float, end: float
    ) -> None:
        """Refuse a file that was cut short: it holds less than its header promises, and its end is lost."""
        if container.format.name == TIMED_CONTAINERS[0] and packets < stream.frames:
            found, promised = f"{packets} frames", f"{stream.frames}"
        elif (
            container.format.name in DECLARED_CONTAINERS
            and end < declared - max(0.5, 0.05 * declared)
            and not self._has_all_bytes()  # else only the duration is wrong
        ):
            found, promised = f"{end:.1f} s", f"{declared:.1f} s"
        else:
            return
        raise DecodeError(
            self.uri, f"cut short: the header promises {promised}, the file holds {found}; fetch it again"
        )

    def _has_all_bytes(self) -> bool:
        """Whether an AVI or Matroska file is as long as it says; False where it does not say."""
        segment = self.head.find(b"\x18\x53\x80\x67\x01")  # of Matroska, with a size of 7 bytes
        if self.head.startswith(b"RIFF"):
            promised = 8 + int.from_bytes(self.head[4:8], "little")
        elif segment >= 0:
            promised = segment + 12 + int.from_bytes(self.head[segment + 5 : segment + 12], "big")
        else:
            return False
        return promised <= (len(self.source) if isinstance(self.source, bytes) else os.path.getsize(self.source))

    def _count(self) -> NDArray[np.float64]:
        """Decode the whole stream to learn its frames' times; small videos are kept for ``read``."""
        times: list[float] = []
        size = 0
        try:
            with self.open_container() as container:
                stream = self._stream(container)
                rate = float(stream.average_rate or 25)
                for frame in container.decode(stream):
                    self._check_picture(frame, len(times))
                    times.append(len(times) / rate if frame.time is None else frame.time)
                    size += sum(plane.buffer_size for plane in frame.planes)
                    if size <= KEPT_BYTES:
                        self._kept.append(frame)
        except FFMPEG_ERRORS as error:
            raise DecodeError(self.uri, self._damaged(len(times))) from error
        if not times:
            raise DecodeError(self.uri, self._damaged(0))
        if any(b <= a for a, b in itertools.pairwise(times)):
            times = [i / rate for i in range(len(times))]
        if len(self._kept) < len(times):
            self._kept = []
        return np.array(times)

    # How frames are found --------------------------------------------------------------------------------------------

    def _by_time(self, indices: Sequence[int]) -> Iterator[av.VideoFrame]:
        """By seeking to key frames and skipping what is not needed."""
        if not self.seekable:
            yield from self._by_order(indices)
            return
        stream = self._stream(self._container)
        for key, run in self._runs(indices):
            self._container.seek(self.pts[key], stream=stream)
            yield from self._decode_run(stream, [self.pts[i] for i in run])

    def _runs(self, indices: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """The wanted frames in groups to be decoded without a seek; before each the key frame to start from.

        That is the last one *shown* at or before the first frame of the group: what is shown before a key frame but
        decoded after it (an open GOP) may refer to the pictures before.
        """
        run: list[int] = []
        start = 0
        for index in indices:
            key = self.keys[max(0, bisect.bisect_right(self.keys, index) - 1)] if self.keys else 0
            key = min(key, index)  # a stream may begin before its first key frame
            if run and key - run[-1] > SEEK_GAP:
                yield start, run
                run = []
            if not run:
                start = key
            run.append(index)
        yield start, run

    def _decode_run(self, stream: VideoStream, wanted: list[int]) -> Iterator[av.VideoFrame]:
        """The frames of the times ``wanted``, rising, from where the container stands."""
        left = set(wanted)  # not delivered yet
        unread = set(wanted)  # not given to the decoder yet
        for packet in self._container.demux(stream):
            if self.skips and packet.size:
                stream.codec_context.skip_frame = "DEFAULT" if packet.pts in left else "NONREF"
            unread.discard(cast(int, packet.pts))
            frames = packet.decode()
            if not unread and packet.size:
                # A decoder gives a frame some packets after its own. When it has all of the run, it is emptied instead.
                frames += cast(Any, stream.codec_context).decode(None)
            for frame in frames:
                if frame.pts in left:
                    left.remove(frame.pts)
                    yield frame
                elif frame.is_corrupt and frame.pts is not None and frame.pts > wanted[0]:
                    self._check_picture(frame, bisect.bisect_left(self.pts, frame.pts))  # others are made from it
            if not left or not unread:
                return

    def _by_order(self, indices: Sequence[int]) -> Iterator[av.VideoFrame]:
        """By decoding everything up to the last one."""
        wanted = set(indices)
        if self._kept:
            yield from (self._kept[i] for i in sorted(wanted))
            return
        last = max(wanted)
        with self.open_container() as container:
            for number, frame in enumerate(container.decode(self._stream(container))):
                if number in wanted:
                    yield frame
                else:
                    self._check_picture(frame, number)
                if number == last:
                    return

    def _by_decord(self, indices: Sequence[int]) -> Iterator[Frames]:
        """By decoding all up to the last one: decord's seeks, also those of a skip over a key frame, miss by frames."""
        reader = self._reader()
        keys = [int(key) for key in reader.get_key_indices()]
        here = 0
        for index in indices:
            for key in keys[bisect.bisect_right(keys, here) : bisect.bisect_right(keys, index)]:
                if key > here + 1:
                    reader.skip_frames(key - here - 1)
                reader.next()
                here = key
            if index > here:
                reader.skip_frames(index - here)
            frame: Frames = reader.next().asnumpy()
            # FFmpeg pads each line of pixels. Where the padded line is a multiple of the width (8, 16, 96, 144, ...),
            # decord takes the padding for more channels and gives [H, W, 4] or beyond: cut it off.
            h, w = frame.shape[:2]
            yield frame.reshape(h, -1)[:, : 3 * w].reshape(h, w, 3)
            here = index + 1

    def _decord_agrees(self) -> bool:
        try:
            return self.timed and self.seekable and len(self._reader()) == self.info.frames
        except DECORD_ERRORS:
            return False

    def _reader(self) -> decord.VideoReader:
        source = io.BytesIO(self.source) if isinstance(self.source, bytes) else os.path.abspath(self.source)
        return decord.VideoReader(source, num_threads=1)  # never kept: memory grows in readers that seek

    # What may be wrong with them ------------------------------------------------------------------------------------

    def _gather(
        self, frames: Iterator[av.VideoFrame], indices: Sequence[int], short_side: int | None, allocate: Allocate
    ) -> Frames:
        return _gather(self._watched(frames, indices), len(indices), short_side, allocate)

    def _watched(self, frames: Iterator[av.VideoFrame], indices: Sequence[int]) -> Iterator[av.VideoFrame]:
        """The same frames; raises where one is damaged or missing."""
        done = 0
        try:
            for frame in frames:
                self._check_picture(frame, indices[done])
                done += 1
                yield frame
        except FFMPEG_ERRORS as error:
            raise DecodeError(self.uri, self._damaged(indices[done] if done < len(indices) else 0)) from error
        except MemoryError as error:
            raise DecodeError(self.uri, TOO_LARGE) from error
        if done < len(indices):
            raise DecodeError(self.uri, self._damaged(indices[done]))

    def _check_picture(self, frame: av.VideoFrame, number: int) -> None:
        if frame.is_corrupt:  # FFmpeg has filled what it could not decode
            raise DecodeError(self.uri, self._damaged(number))

    def _damaged(self, number: int) -> str:
        total = f" of {len(self.pts)}" if self.pts else ""
        return f"the video is truncated or corrupt, frame {number}{total} does not decode; fetch it again"

    def _cannot_open(self) -> str:
        if VIDEO_HEAD.match(self.head):
            return "the video is truncated or corrupt, it cannot be opened; fetch it again"
        return "not a video, or of a format that is not read here; convert it, or remove it from the manifest"


class ImageFolder:
    """A video as numbered pictures (JPEG, PNG, WebP, BMP): the uri is ``FOLDER/{:05d}.jpg``, numbers count from 1.

    An image is the folder of one picture whose template has no number. Pictures are upright, as their EXIF says.

    Raises:
        DecodeError: the first picture cannot be read.
    """

    def __init__(self, uri: str, images: int) -> None:
        self.uri = uri
        if images < 1:
            raise DecodeError(uri, "no pictures; check the number of frames in the manifest")
        self._first, codec = self._decode(0)  # kept: of an image it is all that will be read
        self.info = VideoInfo(images, codec, None, images, "pyav")

    def close(self) -> None:
        """As ``Video.close``; nothing stays open."""

    def read(self, indices: Sequence[int], short_side: int | None = None, allocate: Allocate = _allocate) -> Frames:
        """Some pictures; as ``Video.read``."""
        return _gather((self._picture(i) for i in indices), len(indices), short_side, allocate)

    def all_frames(self, short_side: int | None = None) -> Iterator[Frames]:
        """Every picture in order; as ``Video.all_frames``."""
        height, width = scaled(self._first.height, self._first.width, short_side)
        for picture in self.pictures():
            yield _to_rgb(picture, height, width)

    def pictures(self) -> Iterator[av.VideoFrame]:
        """Every picture in order; as ``Video.pictures``, without times."""
        return (self._picture(i) for i in range(self.info.frames))

    def verify(self) -> tuple[int, int]:
        """Decode every picture; as ``Video.verify``."""
        sizes = [_shown(picture) for picture in self.pictures()]
        return sizes[0]

    def _picture(self, index: int) -> av.VideoFrame:
        return self._decode(index)[0] if index else self._first

    def _decode(self, index: int) -> tuple[av.VideoFrame, str]:
        """A picture and the name of its codec."""
        uri = self.uri.format(index + 1)
        source, head = _fetch(uri)
        content = source if isinstance(source, bytes) else storage.read_bytes(source)
        name = IMAGE_CODECS.get(head[:2])
        try:
            if name is None:
                raise ValueError("unknown kind of picture")
            codec = cast(Any, av.CodecContext.create(name, "r"))
            codec.options = {"err_detect": "explode"}  # else a picture cut short is filled with grey
            pictures = [*codec.decode(av.Packet(content)), *codec.decode(None)]
            picture = cast(av.VideoFrame, pictures[0])
            if picture.is_corrupt:
                raise ValueError("damaged")
        except (*FFMPEG_ERRORS, IndexError) as error:
            kinds = "JPEG, PNG, WebP or BMP"
            raise DecodeError(uri, f"the picture is damaged, or not {kinds}; fetch it again") from error
        return upright(picture, orientation(content)), name


def orientation(content: bytes) -> int:
    """The EXIF orientation of a picture file; 1, upright, where it has none or its EXIF data are damaged."""
    places = (content.find(mark) for mark in EXIF_MARKS)  # faster than a search for the expression
    match = next(filter(None, (EXIF.match(content, place) for place in places if place >= 0)), None)
    if not match:
        return 1
    tiff, order = content[match.start(1) :], "<" if match[1].startswith(b"I") else ">"
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(count):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, start + 2 + 12 * entry)
            if tag == ORIENTATION:
                return int(value)
    except struct.error:  # beyond the end of the file
        pass
    return 1


def upright(picture: av.VideoFrame, orientation: int) -> av.VideoFrame:
    """A picture as it is to be seen. FFmpeg tells only turns, and only since version 8."""
    if orientation not in UPRIGHT:
        return picture
    mirrored, turns = UPRIGHT[orientation]
    rgb = cast(Frames, picture.to_ndarray(format="rgb24"))
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(np.rot90(rgb[::-1] if mirrored else rgb, turns)), "rgb24")


def scaled(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """Height and width with the shorter one at ``short_side``, aspect kept, never upscaled."""
    scale = min(1.0, short_side / min(height, width)) if short_side else 1.0
    return max(1, round(height * scale)), max(1, round(width * scale))


def _gather(frames: Iterable[av.VideoFrame | Frames], count: int, short_side: int | None, allocate: Allocate) -> Frames:
    """Frames as one array; the first one sets the size, as a stream may change it halfway."""
    out: Frames | None = None
    height = width = 0
    for i, frame in enumerate(frames):
        if out is None:
            h, w = frame.shape[:2] if isinstance(frame, np.ndarray) else (frame.height, frame.width)
            height, width = scaled(h, w, short_side)
            first = _to_rgb(frame, height, width)
            out = allocate((count, *first.shape))
            out[0] = first
        else:
            out[i] = _to_rgb(frame, height, width)
    assert out is not None
    return out


def _shown(frame: av.VideoFrame) -> tuple[int, int]:
    """Height and width after rotation."""
    return (frame.width, frame.height) if _turns(frame) % 2 else (frame.height, frame.width)


def _turns(frame: av.VideoFrame) -> int:
    """Quarter turns that make it upright; FFmpeg rounds angles to degrees."""
    return round(frame.rotation / 90)


def _to_rgb(frame: av.VideoFrame | Frames, height: int, width: int) -> Frames:
    """A decoded picture as RGB of the size (before it is turned upright), by one pass of FFmpeg's scaler."""
    if isinstance(frame, np.ndarray):
        if frame.shape[:2] == (height, width):
            return frame
        frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
    # its bilinear filter widens with the reduction, so that nothing aliases
    rgb = cast(Frames, frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BILINEAR"))
    return np.rot90(rgb, _turns(frame))


def _fetch(uri: str) -> tuple[str | bytes, bytes]:
    """What to open, a local path or the content of a remote file; and its first bytes."""
    try:
        if storage.is_remote(uri) or storage.parquet_row(uri):
            source: str | bytes = storage.read_bytes(uri)
            head = cast(bytes, source)[:HEAD_BYTES]
        else:
            source = storage.local_path(uri)
            with open(source, "rb") as file:
                head = file.read(HEAD_BYTES)
    except (OSError, ValueError, UserError) as error:
        raise cannot_open(uri, error) from error
    if not head:
        raise DecodeError(uri, "the file is empty (0 bytes); fetch it again")
    return source, head


def cannot_open(uri: str, error: Exception) -> DecodeError:
    """Why a file or object cannot be read at all."""
    if isinstance(error, FileNotFoundError):
        return DecodeError(uri, "the file is missing; check the path in the manifest")
    if isinstance(error, IsADirectoryError):
        return DecodeError(uri, "this is a folder; expected a video file")
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())
    return DecodeError(uri, f"the file cannot be opened ({reason})")
