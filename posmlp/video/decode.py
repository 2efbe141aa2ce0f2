"""Frame-exact video decoding: frame ``i`` is the ``i``-th in presentation order, for any file structure.

PyAV reads the packets of the stream once, without decoding (about 2 ms per file). Their presentation times are the list
of frames. A frame is then found by its time: decoding starts at the key frame at or before it. In H.264 streams,
packets that no other frame refers to are skipped unless they are wanted. If the packet times do not identify the frames
(AVI, a few old codecs), the whole stream is decoded and counted.

Frames are returned as a player shows them: upright, and from the video stream that a player chooses.

This module needs neither PyTorch nor the rest of the package: it runs in a child process (``posmlp.video.isolated``).
"""

from __future__ import annotations

import bisect
import io
import itertools
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal, NamedTuple, cast

import av
import av.error
import decord
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from posmlp import storage
from posmlp.errors import UserError
from posmlp.video.orientation import Matrix, Picture, display_matrix, exif_matrix, number_of

Frames = NDArray[np.uint8]  # [T, H, W, 3] RGB, or one frame [H, W, 3]
Decoder = Literal["pyav", "decord"]
Span = tuple[int, int | None]  # numbers of the first and the last frame, both included; None: to the end
Allocate = Callable[[tuple[int, ...]], Frames]  # returns memory for uint8 pixels of a shape

# Codecs and containers with one frame per packet, whose packets have the presentation times of their frames.
TIMED_CODECS = ("h264", "hevc", "vp9", "av1", "libdav1d", "mpeg1video", "mpeg2video", "mpeg4")
TIMED_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpeg", "mpegts", "flv")
SEEKABLE_CONTAINERS = TIMED_CONTAINERS[:2]  # have an index of key frames; in the others a seek is a guess
BROADCAST_CONTAINERS = ("mpeg", "mpegts")  # may change their clock halfway, where recordings were joined
MAX_FORWARD_S, MAX_BACK_S = 10.0, 0.1  # larger steps between two packets are such changes; limits of FFmpeg's tools
DECLARED_CONTAINERS = ("matroska,webm", "avi", "flv")  # have their duration in the header; elsewhere it is estimated
# The only containers that may be opened: a playlist (HLS, DASH, concat) would make FFmpeg read the files it names.
CONTAINERS = (
    *("mov", "matroska", "avi", "flv", "gif", "asf", "mpeg", "mpegts", "mpegvideo", "ogg", "h264", "hevc", "m4v"),
    *("ivf", "nut", "mxf", "rm", "dv", "yuv4mpegpipe", "wav", "mp3"),
)
UNTIMED = -(2**63)  # stands for the time of a packet that has none
SEEK_GAP = 4  # seek if more than this many frames lie between two wanted frames
MPEG4_PICTURE = b"\0\0\1\xb6"  # starts each picture of MPEG-4 Part 2
TOO_LARGE = "it needs more memory than a decoder may use; scale the video down"
MAX_FRAMES = 10**7  # per video, four days at 30 fps; a damaged or hostile file may claim years
KEPT_BYTES = 2**28  # of decoded frames, kept if the whole stream has to be decoded to count its frames
IMAGE_CODECS = {b"\xff\xd8": "mjpeg", b"\x89P": "png", b"BM": "bmp", b"RI": "webp"}  # by a file's first two bytes

# FFmpeg's flags of streams: the default one; cover art; pictures for the seek bar of a player
DEFAULT, ATTACHED_PICTURE, TIMED_THUMBNAILS = 1 << 0, 1 << 10, 1 << 11

# First bytes of video files (MP4, Matroska, AVI, FLV, Ogg, GIF, WMV, MPEG), to tell a damaged video from another file.
VIDEO_HEAD = re.compile(
    rb".{4}(?:ftyp|moov|mdat|wide|free|skip)|\x1aE\xdf\xa3|RIFF|FLV|OggS|GIF8|\x30\x26\xb2\x75|\x00\x00\x01[\xb3\xba]",
    re.DOTALL,
)
HEAD_BYTES = 256
FFMPEG_ERRORS = (av.error.FFmpegError, ValueError, OverflowError, EOFError)
DECORD_ERRORS = (decord.DECORDError, RuntimeError, AssertionError, IndexError, StopIteration, ValueError)

# Tags of a file that are not UTF-8 are no reason to refuse it. PyAV 19 has no such option, and replaces them itself.
TAGS: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}

decord.logging.set_level(decord.logging.QUIET)  # errors are raised; FFmpeg's own messages would flood the log
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
        super().__init__(uri, reason)  # both arguments, so that the error can be pickled
        self.uri = uri
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.uri}: {self.reason}"


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video, known before a frame is decoded.

    Attributes:
        frames: the number of frames, N.
        codec: FFmpeg's name of the codec.
        times: float64 ``[N]``, seconds from the first frame to each frame; None for a frame folder.
        key_frames: the number of key frames.
        decoder: the decoder of the frames; decord only if it was requested and finds the same frames.
        stream: the number in the file of the stream that is decoded; None if the frames do not come from a video file.
        video_streams: the number of video streams that it was chosen from.
        stream_choice: why it was chosen, e.g. ``"default flag"``; see ``choose_stream``.
    """

    frames: int
    codec: str
    times: NDArray[np.float64] | None
    key_frames: int
    decoder: Decoder
    stream: int | None = None
    video_streams: int = 0
    stream_choice: str = ""

    @property
    def fps(self) -> float | None:
        """Mean frames per second; None if times are unknown or there is only one frame."""
        if self.times is None or len(self.times) < 2 or self.times[-1] <= 0:
            return None
        return float((len(self.times) - 1) / self.times[-1])


class Shown(NamedTuple):
    """How a video is shown.

    Attributes:
        height, width: in pixels, upright.
        orientation: how the frames are stored, a name of ``posmlp.video.orientation.NAMES`` or the display matrix that
            is none of them. Several, in the order of their appearance, if it changes.
    """

    height: int
    width: int
    orientation: str


def open_video(
    uri: str, images: int | None = None, decoder: Decoder = "pyav", span: Span | None = None
) -> Video | VideoPart | ImageFolder:
    """Open a video file, or with ``images`` a folder of that many numbered pictures.

    The uri of a folder is the name template of its pictures. A single image is a folder of 1 picture.

    Args:
        span: the part of the video to open, as if there were nothing else. Frames of a file count from 0. Pictures have
            their own numbers; without a span they count from 1.

    Raises:
        DecodeError: it cannot be read, or has no frames in the span.
    """
    if images is not None:
        return ImageFolder(uri, images, span[0] if span else 1)
    video = Video(uri, decoder)
    return video if span is None else VideoPart(video, span)


def span_of(row: Mapping[str, Any]) -> Span | None:
    """The part of its video that a manifest row is of; None: all of it."""
    first, last = row.get("first_frame"), row.get("last_frame")
    return None if first is None and last is None else (first or 0, last)


class Video:
    """A video file, local or remote (``posmlp.storage``).

    Args:
        uri: a path or URI. Local files are read on demand, remote files as a whole, into memory.
        decoder: decord is used only where it returns the same frames: packet times identify them, decord finds the
            same number in the same stream, and turns them upright.
        content: the file's bytes, if they have been read already.

    Raises:
        DecodeError: the file is missing, not a video, damaged or truncated.
    """

    def __init__(self, uri: str, decoder: Decoder = "pyav", content: bytes | None = None) -> None:
        self.uri = uri
        self.source, self.head = _open_source(uri) if content is None else (content, content[:HEAD_BYTES])
        self.pts: list[int] = []  # presentation time of each frame in the stream's units, increasing
        self.keys: list[int] = []  # frame numbers of the key frames
        self._kept: list[Picture] = []
        try:
            self._container = self.open_container()
            self.info = self._read_packets()
        except FFMPEG_ERRORS as error:
            raise DecodeError(uri, self._why_not_opened()) from error
        except MemoryError as error:
            raise DecodeError(uri, TOO_LARGE) from error
        if decoder == "decord" and self._decord_agrees():
            self.info = replace(self.info, decoder="decord")

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def open_container(self) -> InputContainer:
        """Open the file once more, as a PyAV container."""
        source = io.BytesIO(self.source) if isinstance(self.source, bytes) else f"file:{self.source}"
        options = {"format_whitelist": ",".join(CONTAINERS)}
        return cast(InputContainer, av.open(source, options=options, **TAGS))

    def read(self, indices: Sequence[int], short_side: int | None = None, allocate: Allocate = _allocate) -> Frames:
        """Read frames by number.

        Args:
            indices: frame numbers in ``[0, N)``, strictly increasing.
            short_side: scale the frames to this short side, aspect kept, never upscaled; None keeps their size.
            allocate: returns the memory for the result.

        Returns:
            uint8 ``[len(indices), H, W, 3]`` RGB.

        Raises:
            DecodeError: the video is damaged.
        """
        if self.info.decoder == "decord":
            try:
                return _stack(self._by_decord(indices), len(indices), short_side, allocate)
            except DECORD_ERRORS:
                self.info = replace(self.info, decoder="pyav")
        if not self.timed:
            return self._stack_checked(self._by_order(indices), indices, short_side, allocate)
        try:
            return self._stack_checked(self._by_time(indices), indices, short_side, allocate)
        except DecodeError:  # key frames may be marked wrongly, so try again without seeking and skipping
            return self._stack_checked(self._by_order(indices), indices, short_side, allocate)

    def all_frames(self, short_side: int | None = None) -> Iterator[Frames]:
        """Every frame in order, uint8 ``[H, W, 3]`` each, scaled as by ``read``.

        Raises:
            DecodeError: the video is damaged; raised after the frames before the damage.
        """
        return self.frames(range(self.info.frames), short_side, seek=False)

    def frames(self, indices: Sequence[int], short_side: int | None = None, *, seek: bool = True) -> Iterator[Frames]:
        """Frames by number one after the other, uint8 ``[H, W, 3]`` each; otherwise as ``read``, without decord.

        Args:
            seek: False: decode everything up to the last one, in case key frames are marked wrongly.

        Raises:
            DecodeError: the video is damaged; raised after the frames before the damage.
        """
        height = width = 0
        find = self._by_time if seek and self.timed else self._by_order
        for picture in self._checked(find(indices), indices):
            if not height:
                height, width = scaled_size(*picture.size, short_side)
            yield _to_rgb(picture, height, width)

    def pictures(self, indices: Sequence[int] | None = None) -> Iterator[Picture]:
        """Frames in order as they are stored, with their times.

        Args:
            indices: increasing; None: every frame.

        Raises:
            DecodeError: the video is damaged; raised after the frames before the damage.
        """
        wanted = range(self.info.frames) if indices is None else indices
        return self._checked(self._by_order(wanted), wanted)

    def verify(self) -> tuple[int, int]:
        """Decode every frame. Returns the height and width in pixels, upright.

        Raises:
            DecodeError: the video is damaged.
        """
        return self.inspect()[:2]

    def inspect(self) -> Shown:
        """Decode every frame, as ``verify``. Returns also the orientation."""
        return _inspect(self.pictures())

    # Packets -------------------------------------------------------------------------------------------------------

    def _stream(self, container: InputContainer) -> VideoStream:
        """The stream that is decoded, in a container of this file."""
        stream = cast(VideoStream, container.streams[self._index])
        if not stream.codec_context.is_open:
            stream.thread_type = "NONE"  # many processes decode already: more threads in each would slow them down
        return stream

    def _video_streams(self, container: InputContainer) -> list[VideoStream]:
        """The streams that can be decoded and are no cover art or thumbnails."""
        no_video = ATTACHED_PICTURE | TIMED_THUMBNAILS
        streams = [stream for stream in container.streams.video if not stream.disposition.value & no_video]
        if not streams:
            raise DecodeError(
                self.uri, "no video stream in the file (only sound or other data); remove it from the manifest"
            )
        decodable = [stream for stream in streams if stream.codec_context is not None]
        if not decodable:
            raise DecodeError(self.uri, "its codec is unknown to FFmpeg; convert the video")
        return decodable

    def _read_packets(self) -> VideoInfo:
        """Read all packets, to choose the stream and to find its frame times and key frames."""
        container = self._container
        streams = self._video_streams(container)
        exact = container.format.name == TIMED_CONTAINERS[0]  # its header has the number of packets
        declared = container.duration / av.time_base if container.duration and not exact else 0.0
        frames: dict[int, list[tuple[int, bool]]] = {stream.index: [] for stream in streams}  # time, key frame
        hidden = dict.fromkeys(frames, 0)  # number of packets that are decoded but not shown
        broadcast = container.format.name in BROADCAST_CONTAINERS
        before: dict[int, int] = {}  # decoding time of the packet before in each stream
        joined = set[int]()  # streams whose clock changes
        mpeg4 = {stream.index for stream in streams if stream.codec_context.name == "mpeg4"}
        packed = set[int]()  # streams with several pictures in a packet, the packed B-frames of DivX and Xvid
        end = 0.0
        for packet in container.demux() if declared else container.demux(streams):
            index, pts = packet.stream_index, packet.pts
            if broadcast and packet.dts is not None and packet.time_base:
                if self._clock_changes((packet.dts - before.get(index, packet.dts)) * packet.time_base):
                    joined.add(index)
                before[index] = packet.dts
            if index in mpeg4 and bytes(packet).count(MPEG4_PICTURE) > 1:
                packed.add(index)
            if declared:
                time = packet.dts if pts is None else pts
                if time is not None and packet.time_base:
                    end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
            if index not in frames or not packet.size:
                continue
            shown = frames[index]
            if packet.is_discard:  # before the start of an edit list
                hidden[index] += 1
            else:
                shown.append((UNTIMED if pts is None else pts, packet.is_keyframe))
            if len(shown) + hidden[index] > MAX_FRAMES:
                raise DecodeError(self.uri, f"more than {MAX_FRAMES} frames; cut it into shorter videos")
        self._index, choice = choose_stream(streams, {index: len(times) for index, times in frames.items()})
        stream, found = self._stream(container), frames[self._index]
        if not found:
            raise DecodeError(
                self.uri, "no frames in the video stream; fetch the file again, or remove it from the manifest"
            )
        self._check_length(container, stream, len(found) + hidden[self._index], declared, end)
        found.sort()
        self.pts = [pts for pts, _ in found]
        self.keys = [i for i, (_, key) in enumerate(found) if key]
        codec = stream.codec_context.name
        self.timed = (
            found[0][0] != UNTIMED
            and found[0][1]  # frames before the first key frame may not decode
            and all(a < b for a, b in itertools.pairwise(self.pts))
            and codec in TIMED_CODECS
            and container.format.name in TIMED_CONTAINERS
            and self._index not in packed | joined
        )
        self.seekable = container.format.name in SEEKABLE_CONTAINERS
        self.skips = codec == "h264"  # only here FFmpeg knows for certain which frames no other refers to
        times = np.array(self.pts, np.float64) * float(stream.time_base or 0) if self.timed else self._decode_times()
        info = VideoInfo(len(times), codec, times - times[0], len(self.keys), "pyav")
        return replace(info, stream=self._index, video_streams=len(streams), stream_choice=choice)

    def _clock_changes(self, step: float | Fraction) -> bool:
        """Return whether a step in seconds between two packets or frames is a change of clocks and not of time."""
        broadcast = self._container.format.name in BROADCAST_CONTAINERS
        return broadcast and not -MAX_BACK_S <= step <= MAX_FORWARD_S

    def _check_length(
        self, container: InputContainer, stream: VideoStream, packets: int, declared: float, end: float
    ) -> None:
        """Refuse a truncated file, which holds less than its header declares."""
        index = stream.index_entries if container.format.name == TIMED_CONTAINERS[0] else ()
        # Unlike ``stream.frames``, the index lacks what an edit list leaves out. Empty entries stand for lost frames.
        if packets < len(index) and packets < (promised_packets := sum(entry.size > 0 for entry in index)):
            found, promised = f"{packets} frames", f"{promised_packets}"
        elif (
            container.format.name in DECLARED_CONTAINERS
            and end < declared - max(0.5, 0.05 * declared)
            and not self._has_declared_size()  # else only the duration is wrong
        ):
            found, promised = f"{end:.1f} s", f"{declared:.1f} s"
        else:
            return
        raise DecodeError(
            self.uri, f"cut short: the header promises {promised}, the file holds {found}; fetch it again"
        )

    def _has_declared_size(self) -> bool:
        """Return whether an AVI or Matroska file has the size that its header declares; False if it declares none."""
        segment = self.head.find(b"\x18\x53\x80\x67\x01")  # the segment of Matroska, followed by a size in 7 bytes
        if self.head.startswith(b"RIFF"):
            promised = 8 + int.from_bytes(self.head[4:8], "little")
        elif segment >= 0:
            promised = segment + 12 + int.from_bytes(self.head[segment + 5 : segment + 12], "big")
        else:
            return False
        return promised <= (len(self.source) if isinstance(self.source, bytes) else os.path.getsize(self.source))

    def _decode_times(self) -> NDArray[np.float64]:
        """Decode the whole stream to find the frame times. The frames of small videos are kept for ``read``."""
        times: list[float] = []
        size, shift, step = 0, 0.0, 0.0  # shift: from the file's times to those of one clock
        try:
            with self.open_container() as container:
                stream = self._stream(container)
                rate = float(stream.average_rate or 25)
                matrix = None  # as in _decode_run
                for frame in container.decode(stream):
                    own = display_matrix(frame)
                    if frame.key_frame:
                        matrix = own
                    self._check_frame(frame, len(times))
                    time = (len(times) / rate if frame.time is None else frame.time) + shift
                    if times and self._clock_changes(time - times[-1]):
                        shift, time = shift + times[-1] + step - time, times[-1] + step
                    step = time - times[-1] if times else 0.0
                    times.append(time)
                    size += sum(plane.buffer_size for plane in frame.planes)
                    if size <= KEPT_BYTES:
                        self._kept.append(Picture(frame, own or matrix))
        except FFMPEG_ERRORS as error:
            raise DecodeError(self.uri, self._damage_at(len(times))) from error
        if not times:
            raise DecodeError(self.uri, self._damage_at(0))
        if any(b <= a for a, b in itertools.pairwise(times)):
            times = [i / rate for i in range(len(times))]
        if len(self._kept) < len(times):
            self._kept = []
        return np.array(times)

    # Finding frames --------------------------------------------------------------------------------------------------

    def _by_time(self, indices: Sequence[int]) -> Iterator[Picture]:
        """Find frames by seeking to key frames and skipping packets that are not needed."""
        if not self.seekable:
            yield from self._by_order(indices)
            return
        stream = self._stream(self._container)
        for key, run in self._runs(indices):
            self._container.seek(self.pts[key], stream=stream)
            yield from self._decode_run(stream, [self.pts[i] for i in run])

    def _runs(self, indices: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Group the wanted frames into runs that are decoded without a seek, each with the key frame to start from.

        That is the last key frame *shown* at or before the first frame of the run. Frames that are shown before a key
        frame but decoded after it (an open GOP) may refer to earlier pictures.
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

    def _decode_run(self, stream: VideoStream, wanted: list[int]) -> Iterator[Picture]:
        """Decode the frames with the times ``wanted`` (increasing), from the container's current position."""
        left = set(wanted)  # not delivered yet
        unread = set(wanted)  # not given to the decoder yet
        matrix = None  # of the last key frame: a codec need not repeat it before the next one
        for packet in self._container.demux(stream):
            if self.skips and packet.size:
                stream.codec_context.skip_frame = "DEFAULT" if packet.pts in left else "NONREF"
            unread.discard(cast(int, packet.pts))
            frames = packet.decode()
            if not unread and packet.size:
                # A decoder returns a frame some packets later. Once it has all packets of the run, flush it instead.
                frames += cast(Any, stream.codec_context).decode(None)
            for frame in frames:
                if frame.key_frame:
                    matrix = display_matrix(frame)
                if frame.pts in left:
                    left.remove(frame.pts)
                    yield Picture(frame, display_matrix(frame) or matrix)
                elif frame.is_corrupt and frame.pts is not None and frame.pts > wanted[0]:
                    self._check_frame(frame, bisect.bisect_left(self.pts, frame.pts))  # later frames refer to it
            if not left or not unread:
                return

    def _by_order(self, indices: Sequence[int]) -> Iterator[Picture]:
        """Find frames by decoding everything up to the last wanted frame."""
        wanted = set(indices)
        if self._kept:
            yield from (self._kept[i] for i in sorted(wanted))
            return
        last, matrix = max(wanted), None  # as in _decode_run
        with self.open_container() as container:
            for number, frame in enumerate(container.decode(self._stream(container))):
                if frame.key_frame:
                    matrix = display_matrix(frame)
                if number in wanted:
                    yield Picture(frame, display_matrix(frame) or matrix)
                else:
                    self._check_frame(frame, number)
                if number == last:
                    return

    def _by_decord(self, indices: Sequence[int]) -> Iterator[Frames]:
        """Find frames with decord, by decoding everything up to the last wanted frame.

        decord's seeks, also those of a skip over a key frame, are off by some frames.
        """
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
            # FFmpeg pads each line of pixels. If the padded line is a multiple of the width (8, 16, 96, 144, ...),
            # decord mistakes the padding for channels and returns [H, W, 4] or more: cut it off.
            h, w = frame.shape[:2]
            yield frame.reshape(h, -1)[:, : 3 * w].reshape(h, w, 3)
            here = index + 1

    def _decord_agrees(self) -> bool:
        """Return whether decord returns the same frames, upright."""
        stream, best = self._stream(self._container), self._container.streams.best("video")
        tags = {tag.lower() for tag in stream.metadata}
        if not (self.timed and self.seekable) or best is None or best.index != stream.index:
            return False
        if "rotate" in tags:  # decord obeys it, unlike players
            return False
        if not -(2**31) <= self.pts[0] <= self.pts[-1] < 2**31:  # decord has 32 bits for a time: it hangs or aborts
            return False
        try:
            if len(self._reader()) != self.info.frames:
                return False
            (first,) = self._checked(self._by_time([0]), [0])
            return first.matrix is None or self._decord_turns(first.matrix)
        except (*DECORD_ERRORS, *FFMPEG_ERRORS, DecodeError):
            return False

    def _decord_turns(self, matrix: Matrix) -> bool:
        """Return whether decord turns frames with this display matrix upright.

        decord reduces the matrix of the container to an angle, and does not know that of the codec.
        """
        if matrix.count(0.0) != 2 or number_of(matrix) not in (1, 3, 6, 8):
            return False
        stream = self._stream(self._container)
        codec = cast(Any, av.CodecContext.create(stream.codec_context.name, "r"))  # does not know the container's
        codec.extradata = stream.codec_context.extradata
        self._container.seek(self.pts[0], stream=stream)
        packet = next(packet for packet in self._container.demux(stream) if packet.size)
        frames = cast(list[av.VideoFrame], [*codec.decode(packet), *codec.decode(None)])
        return bool(frames) and display_matrix(frames[0]) is None

    def _reader(self) -> decord.VideoReader:
        source = io.BytesIO(self.source) if isinstance(self.source, bytes) else os.path.abspath(self.source)
        return decord.VideoReader(source, num_threads=1)  # not kept open, because readers that seek leak memory

    # Checking frames ------------------------------------------------------------------------------------------------

    def _stack_checked(
        self, pictures: Iterator[Picture], indices: Sequence[int], short_side: int | None, allocate: Allocate
    ) -> Frames:
        return _stack(self._checked(pictures, indices), len(indices), short_side, allocate)

    def _checked(self, pictures: Iterator[Picture], indices: Sequence[int]) -> Iterator[Picture]:
        """Pass the pictures through; raise DecodeError at one that is damaged or missing."""
        done = 0
        try:
            for picture in pictures:
                self._check_frame(picture.frame, indices[done])
                done += 1
                yield picture
        except FFMPEG_ERRORS as error:
            raise DecodeError(self.uri, self._damage_at(indices[done] if done < len(indices) else 0)) from error
        except MemoryError as error:
            raise DecodeError(self.uri, TOO_LARGE) from error
        if done < len(indices):
            raise DecodeError(self.uri, self._damage_at(indices[done]))

    def _check_frame(self, frame: av.VideoFrame, number: int) -> None:
        if frame.is_corrupt:  # FFmpeg has filled the parts that it could not decode
            raise DecodeError(self.uri, self._damage_at(number))

    def _damage_at(self, number: int) -> str:
        total = f" of {len(self.pts)}" if self.pts else ""
        return f"the video is truncated or corrupt, frame {number}{total} does not decode; fetch it again"

    def _why_not_opened(self) -> str:
        if VIDEO_HEAD.match(self.head):
            return "the video is truncated or corrupt, it cannot be opened; fetch it again"
        return "not a video, or in an unsupported format; convert it, or remove it from the manifest"


class VideoPart:
    """Consecutive frames of a video file, as a video of its own: frame 0 is the first of them, at time 0.

    Args:
        video: the whole video, which is closed with its part.
        span: the frames, counted from 0.

    Raises:
        DecodeError: the video ends before the last frame; it is closed then.
    """

    def __init__(self, video: Video, span: Span) -> None:
        self.uri, self._video = video.uri, video
        count, (first, last) = video.info.frames, span
        last = count - 1 if last is None else last
        if not 0 <= first <= last < count:
            video.close()
            wanted = f"frames {first} to {last} are wanted (first_frame, last_frame)"
            raise DecodeError(video.uri, f"{wanted}, but it has frames 0 to {count - 1}; correct the list")
        self._numbers = range(first, last + 1)

    @property
    def info(self) -> VideoInfo:
        """Properties of the part."""
        whole, numbers = self._video.info, self._numbers
        times = None if whole.times is None else whole.times[numbers.start : numbers.stop] - whole.times[numbers.start]
        keys = sum(key in numbers for key in self._video.keys)
        return replace(whole, frames=len(numbers), times=times, key_frames=keys)

    def close(self) -> None:
        """Close the file."""
        self._video.close()

    def read(self, indices: Sequence[int], short_side: int | None = None, allocate: Allocate = _allocate) -> Frames:
        """Read frames by number; as ``Video.read``."""
        return self._video.read([self._numbers[i] for i in indices], short_side, allocate)

    def all_frames(self, short_side: int | None = None) -> Iterator[Frames]:
        """Every frame in order; as ``Video.all_frames``."""
        return self._video.frames(self._numbers, short_side, seek=False)

    def frames(self, indices: Sequence[int], short_side: int | None = None, *, seek: bool = True) -> Iterator[Frames]:
        """Frames by number one after the other; as ``Video.frames``."""
        return self._video.frames([self._numbers[i] for i in indices], short_side, seek=seek)

    def verify(self) -> tuple[int, int]:
        """Decode every frame; as ``Video.verify``."""
        return self.inspect()[:2]

    def inspect(self) -> Shown:
        """Decode every frame; as ``Video.inspect``."""
        return _inspect(self._video.pictures(self._numbers))


class ImageFolder:
    """A video as numbered pictures (JPEG, PNG, WebP, BMP). The uri is the template of their names.

    A single image is a folder of one picture, whose template has no number. Pictures are rotated by their EXIF
    orientation.

    Args:
        uri: such as ``FOLDER/{:05d}.jpg``.
        images: the number of pictures.
        first: the number of the first one; the others follow without gaps.

    Raises:
        DecodeError: the first picture cannot be read.
    """

    def __init__(self, uri: str, images: int, first: int = 1) -> None:
        self.uri, self._start, self._single = uri, first, images == 1
        if images < 1:
            raise DecodeError(uri, "no pictures; check the number of frames in the manifest")
        self._first, codec = self._decode(0)  # kept, because for a single image it is the only picture
        self.info = VideoInfo(images, codec, None, images, "pyav")

    def close(self) -> None:
        """Do nothing: no file stays open. As ``Video.close``."""

    def read(self, indices: Sequence[int], short_side: int | None = None, allocate: Allocate = _allocate) -> Frames:
        """Read pictures by number; as ``Video.read``."""
        return _stack((self._picture(i) for i in indices), len(indices), short_side, allocate)

    def all_frames(self, short_side: int | None = None) -> Iterator[Frames]:
        """Every picture in order; as ``Video.all_frames``."""
        return self.frames(range(self.info.frames), short_side)

    def frames(self, indices: Sequence[int], short_side: int | None = None, *, seek: bool = True) -> Iterator[Frames]:
        """Pictures by number one after the other; as ``Video.frames``."""
        height, width = scaled_size(*self._first.size, short_side)
        return (_to_rgb(self._picture(i), height, width) for i in indices)

    def pictures(self) -> Iterator[Picture]:
        """Every picture in order; as ``Video.pictures``, without times."""
        return (self._picture(i) for i in range(self.info.frames))

    def verify(self) -> tuple[int, int]:
        """Decode every picture; as ``Video.verify``."""
        return self.inspect()[:2]

    def inspect(self) -> Shown:
        """Decode every picture; as ``Video.inspect``."""
        return _inspect(self.pictures())

    def _picture(self, index: int) -> Picture:
        return self._decode(index)[0] if index else self._first

    def _decode(self, index: int) -> tuple[Picture, str]:
        """A picture and the name of its codec. An error names the picture."""
        uri = self.uri.format(self._start + index)
        try:
            return self._decode_picture(uri)
        except DecodeError as error:
            if self._single:
                raise
            raise DecodeError(self.uri, f"{storage.base_name(uri)}: {error.reason}") from error

    def _decode_picture(self, uri: str) -> tuple[Picture, str]:
        source, head = _open_source(uri)
        content = source if isinstance(source, bytes) else storage.read_bytes(source)
        name = IMAGE_CODECS.get(head[:2])
        try:
            if name is None:
                raise ValueError("unknown kind of picture")
            codec = cast(Any, av.CodecContext.create(name, "r"))
            codec.options = {"err_detect": "explode"}  # else a truncated picture is filled with grey
            frame = cast(av.VideoFrame, [*codec.decode(av.Packet(content)), *codec.decode(None)][0])
            if frame.is_corrupt:
                raise ValueError("damaged")
        except (*FFMPEG_ERRORS, IndexError) as error:
            kinds = "JPEG, PNG, WebP or BMP"
            raise DecodeError(uri, f"the picture is damaged, or not {kinds}; fetch it again") from error
        return Picture(frame, exif_matrix(content) or display_matrix(frame)), name


def choose_stream(streams: Sequence[VideoStream], frames: Mapping[int, int]) -> tuple[int, str]:
    """Choose the video stream that players choose.

    The first of these that tells two streams apart decides: frames at all; the default flag; more than one frame; the
    larger picture; the first in the file.

    Args:
        streams: the streams to choose from, at least one.
        frames: their numbers of frames, by the number of the stream.

    Returns:
        The number of the stream, and what decided against the second best.
    """
    reasons = ("only one with frames", "default flag", "only one that moves", "largest", "first")

    def rank(stream: VideoStream) -> tuple[int, ...]:
        default = bool(stream.disposition.value & DEFAULT)
        area = stream.codec_context.width * stream.codec_context.height
        return frames[stream.index] > 0, default, frames[stream.index] > 1, area, -stream.index

    ranked = sorted(streams, key=rank, reverse=True)
    if len(ranked) == 1:
        return ranked[0].index, "only one"
    pairs = zip(reasons, rank(ranked[0]), rank(ranked[1]), strict=True)
    return ranked[0].index, next(reason for reason, best, second in pairs if best != second)


def scaled_size(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """Height and width with the shorter side at ``short_side``, aspect kept, never upscaled."""
    scale = min(1.0, short_side / min(height, width)) if short_side else 1.0
    return max(1, round(height * scale)), max(1, round(width * scale))


def _stack(frames: Iterable[Picture | Frames], count: int, short_side: int | None, allocate: Allocate) -> Frames:
    """Stack frames into one array. The first frame sets the size, because a stream may change it halfway, or turn."""
    out: Frames | None = None
    height = width = 0
    for i, frame in enumerate(frames):
        if out is None:
            h, w = frame.shape[:2] if isinstance(frame, np.ndarray) else frame.size
            height, width = scaled_size(h, w, short_side)
            first = _to_rgb(frame, height, width)
            out = allocate((count, *first.shape))
            out[0] = first
        else:
            out[i] = _to_rgb(frame, height, width)
    assert out is not None
    return out


def _inspect(pictures: Iterable[Picture]) -> Shown:
    """Decode all pictures of a video. The first sets the size."""
    found = [(picture.size, picture.orientation) for picture in pictures]
    (height, width), _ = found[0]
    return Shown(height, width, ", ".join(dict.fromkeys(orientation for _, orientation in found)))


def _to_rgb(frame: Picture | Frames, height: int, width: int) -> Frames:
    """A decoded frame as upright RGB, scaled to the size ``height, width`` by one pass of FFmpeg's scaler."""
    if isinstance(frame, np.ndarray):
        if frame.shape[:2] == (height, width):
            return frame
        frame = Picture(av.VideoFrame.from_ndarray(frame, format="rgb24"), None)
    if frame.on_its_side:
        height, width = width, height
    return frame.turn(cast(Frames, convert(frame.frame, height, width, "rgb24").to_ndarray()))


class _Scaler(threading.local):
    """FFmpeg's scaler of a thread.

    PyAV sets up a scaler for each frame otherwise, by default with a thread for each CPU. That takes several times as
    long as to scale a frame of a video clip (https://github.com/PyAV-Org/PyAV/issues/2200), and every frame keeps the
    memory of its scaler (https://github.com/PyAV-Org/PyAV/issues/2320).
    """

    def __init__(self) -> None:
        self.reformatter = VideoReformatter()


_scaler = _Scaler()


def convert(frame: av.VideoFrame, height: int, width: int, pixels: str) -> av.VideoFrame:
    """Convert a frame to another size and pixel format in one pass.

    The bilinear filter widens when it shrinks a frame, which prevents aliasing.
    """
    return _scaler.reformatter.reformat(frame, width, height, pixels, interpolation="BILINEAR", threads=1)


def _open_source(uri: str) -> tuple[str | bytes, bytes]:
    """The local path of a file, or the content of a remote one; and its first bytes."""
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
    """The error to raise when a file or object cannot be read at all."""
    if isinstance(error, FileNotFoundError):
        return DecodeError(uri, "the file is missing; check the path in the manifest")
    if isinstance(error, IsADirectoryError):
        return DecodeError(uri, "this is a folder; expected a video file")
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())
    return DecodeError(uri, f"the file cannot be opened ({reason})")
