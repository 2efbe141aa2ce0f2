"""Of several video streams, the one is decoded that players choose, wherever frames are decoded."""

import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from posmlp.video.cache import CachedVideo, write_cache_file
from posmlp.video.decode import DecodeError, Video
from posmlp.video.isolated import open_isolated
from posmlp.video.pack import pack
from tests.helpers.videos import numbers, picture

DECODERS = ["pyav", "decord"]
SMALL, MIDDLE, LARGE = (72, 48), (108, 72), (160, 120)
DEFAULT, COVER = Disposition.default, Disposition.attached_pic


def write_streams(path, *streams, sound=None):
    """A file with a video stream for each (size, number of frames, flags). Stream ``k`` shows the numbers from 100 k.

    Args:
        sound: the place of a sound track among the streams.
    """
    with av.open(str(path), "w") as container:
        made = []
        for place, (size, _, flags) in enumerate(streams):
            if place == sound:
                audio = container.add_stream("mp2", rate=48000, layout="mono")
            cover = flags & COVER and Path(path).suffix == ".mp4"
            stream = container.add_stream("mjpeg" if cover else "mpeg4", rate=10, options={"threads": "1"})
            stream.width, stream.height = size
            stream.pix_fmt = "yuvj420p" if cover else "yuv420p"
            stream.disposition = flags
            made.append(stream)
        if sound is not None:
            made.append(audio)
            for i in range(20):
                samples = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.int16), format="s16", layout="mono")
                samples.sample_rate, samples.pts = 48000, 4800 * i
                container.mux(audio.encode(samples))
        for place, (size, count, _) in enumerate(streams):
            for i in range(count):
                frame = av.VideoFrame.from_ndarray(picture(100 * place + i, *size), format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, 10)
                container.mux(made[place].encode(frame))
        for stream, count in zip(made, [count for _, count, _ in streams] + [1], strict=False):
            if count:
                container.mux(stream.encode())
    return str(path)


# The streams of a file, the number of the one that is to be decoded, and why.
CASES = {
    "first is not default": ([(SMALL, 2, 0), (LARGE, 20, DEFAULT)], 1, "default flag"),
    "default is smaller": ([(LARGE, 20, 0), (SMALL, 20, DEFAULT)], 1, "default flag"),
    "several default": ([(SMALL, 20, DEFAULT), (LARGE, 20, DEFAULT), (MIDDLE, 20, 0)], 1, "largest"),
    "none default": ([(SMALL, 20, 0), (MIDDLE, 20, 0), (LARGE, 10, 0)], 2, "largest"),
    "several angles": ([(MIDDLE, 20, 0), (MIDDLE, 20, 0), (MIDDLE, 20, 0)], 0, "first"),
    "several angles, one default": ([(MIDDLE, 20, 0), (MIDDLE, 20, 0), (MIDDLE, 20, DEFAULT)], 2, "default flag"),
    "default without frames": ([(LARGE, 0, DEFAULT), (SMALL, 20, 0)], 1, "only one with frames"),
    "a still picture": ([(LARGE, 1, 0), (SMALL, 20, 0)], 1, "only one that moves"),
    "still pictures": ([(SMALL, 1, 0), (LARGE, 1, 0)], 1, "largest"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("sound", [None, 0, 1])
def test_the_stream_of_players_is_decoded(tmp_path, case, decoder, sound):
    streams, index, reason = CASES[case]
    path = write_streams(tmp_path / "v.mkv", *streams, sound=sound)
    (width, height), count, _ = streams[index]
    expected = [100 * index + i for i in range(count)]
    for video in (Video(path, decoder), Video("bytes", decoder, Path(path).read_bytes())):
        assert video.info.frames == count
        assert video.info.stream == index + (sound is not None and sound <= index)
        assert (video.info.video_streams, video.info.stream_choice) == (len(streams), reason)
        assert video.verify() == (height, width)
        assert numbers(video.read(range(count))) == expected
        assert numbers(video.read([count - 1])) == expected[-1:]
        assert numbers(video.all_frames()) == expected
        video.close()


@pytest.mark.parametrize("case", ["first is not default", "default is smaller", "several angles, one default"])
def test_ffmpeg_chooses_the_default_stream_too(tmp_path, case):
    streams, index, _ = CASES[case]
    with av.open(write_streams(tmp_path / "v.mkv", *streams)) as container:
        assert container.streams.best("video").index == index


@pytest.mark.parametrize("name", ["v.mp4", "v.mov", "v.avi", "v.ts", "v.mpg"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_containers_without_flags_go_by_size(tmp_path, name, decoder):
    """MP4 and QuickTime enable all tracks here. MPEG and AVI have no flags."""
    streams = [(SMALL, 20, DEFAULT), (LARGE, 20, DEFAULT), (MIDDLE, 20, DEFAULT)]
    if name in ("v.ts", "v.mpg"):
        path = write_mpeg(tmp_path / name, streams)
    else:
        path = write_streams(tmp_path / name, *streams, sound=0)
    video = Video(path, decoder)
    assert (video.info.stream_choice, video.info.video_streams) == ("largest", 3)
    assert video.verify() == LARGE[::-1]
    assert numbers(video.read([0, 7, 19])) == [100, 107, 119]


def write_mpeg(path, streams):
    with av.open(str(path), "w") as container:
        made = []
        for size, _, _ in streams:
            stream = container.add_stream("mpeg2video", rate=25, options={"threads": "1"})
            stream.width, stream.height = size
            stream.pix_fmt = "yuv420p"
            made.append(stream)
        for i in range(20):
            for place, (stream, (size, _, _)) in enumerate(zip(made, streams, strict=True)):
                frame = av.VideoFrame.from_ndarray(picture(100 * place + i, *size), format="rgb24")
                container.mux(stream.encode(frame))
        for stream in made:
            container.mux(stream.encode())
    return str(path)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("cover_first", [False, True])
def test_cover_art_is_no_video(tmp_path, decoder, cover_first):
    streams = [(SMALL, 20, 0), (LARGE, 1, COVER)]
    path = write_streams(tmp_path / "v.mp4", *(streams[::-1] if cover_first else streams))
    with av.open(path) as container:
        assert sum(bool(stream.disposition & COVER) for stream in container.streams.video) == 1
    video = Video(path, decoder)
    assert (video.info.stream_choice, video.info.video_streams) == ("only one", 1)
    assert numbers(video.read([0, 19])) == [100 * cover_first, 100 * cover_first + 19]


def box(kind, *content):
    content = b"".join(content)
    return struct.pack(">I4s", 8 + len(content), kind) + content


def grow(content, place, size):
    struct.pack_into(">I", content, place, struct.unpack_from(">I", content, place)[0] + size)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_track_of_chapter_thumbnails_is_no_video(tmp_path, decoder):
    """QuickTime: the video track names the track of its thumbnails in ``tref/chap``."""
    path = write_streams(tmp_path / "v.mp4", (SMALL, 20, DEFAULT), (LARGE, 5, DEFAULT))
    content = bytearray(Path(path).read_bytes())
    moov, trak = content.index(b"moov") - 4, content.index(b"trak") - 4
    assert content.index(b"mdat") < moov  # so that the places of the frames stay
    reference = box(b"tref", box(b"chap", struct.pack(">I", 2)))
    end = trak + struct.unpack_from(">I", content, trak)[0]
    content[end:end] = reference
    grow(content, trak, len(reference))
    grow(content, moov, len(reference))
    Path(path).write_bytes(content)
    with av.open(path) as container:
        assert container.streams.video[1].disposition & Disposition.timed_thumbnails
    video = Video(path, decoder)
    assert (video.info.stream, video.info.stream_choice) == (0, "only one")
    assert numbers(video.read([0, 19])) == [0, 19]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_thumbnail_track_without_a_flag_is_passed_over(tmp_path, decoder):
    """One JPEG picture, larger than the video, as some cameras write it."""
    path, data = tmp_path / "v.mov", io.BytesIO()
    Image.fromarray(picture(400, *LARGE)).save(data, "JPEG")
    with av.open(str(path), "w") as container:
        still = container.add_stream("mjpeg", rate=10)
        still.width, still.height, still.pix_fmt = *LARGE, "yuvj420p"
        video = container.add_stream("libx264", rate=10, options={"threads": "1", "preset": "ultrafast"})
        video.width, video.height, video.pix_fmt = *SMALL, "yuv420p"
        still.disposition = video.disposition = DEFAULT
        packet = av.Packet(data.getvalue())
        packet.stream, packet.pts, packet.dts, packet.time_base = still, 0, 0, Fraction(1, 10)
        container.mux(packet)
        for i in range(12):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture(i, *SMALL), format="rgb24")))
        container.mux(video.encode())
    opened = Video(str(path), decoder)
    assert opened.info.stream == 1
    assert numbers(opened.read([0, 11])) == [0, 11]


def test_streams_without_frames_are_no_video(tmp_path):
    path = write_streams(tmp_path / "v.mkv", (LARGE, 0, DEFAULT), (SMALL, 0, 0), sound=0)
    with pytest.raises(DecodeError, match="no frames in the video stream"):
        Video(path)


def test_a_stream_of_an_unknown_codec_is_passed_over(tmp_path):
    path = write_streams(tmp_path / "v.avi", (LARGE, 20, 0), (SMALL, 20, 0))
    content = bytearray(Path(path).read_bytes())
    for _ in range(2):  # in the headers of the first stream
        place = content.index(b"FMP4")
        content[place : place + 4] = b"xyz1"
    Path(path).write_bytes(content)
    with av.open(path) as container:
        assert [stream.codec_context is None for stream in container.streams.video] == [True, False]
    video = Video(path)
    assert (video.info.stream, video.info.stream_choice) == (1, "only one")
    assert numbers(video.read([0, 19])) == [100, 119]


@pytest.mark.parametrize("case", CASES)
def test_the_decoding_process_the_cache_and_shards_use_the_same_stream(tmp_path, case):
    streams, index, reason = CASES[case]
    path = write_streams(tmp_path / "v.mkv", *streams, sound=0)
    count = streams[index][1]
    expected = [100 * index + i for i in range(count)]
    with open_isolated(path, decoder="decord", timeout_s=60) as isolated:
        assert isolated.info.stream_choice == reason
        assert numbers(isolated.read(range(count))) == expected
    video = Video(path)
    write_cache_file(video, None, tmp_path / "v.arrow")
    assert numbers(CachedVideo(tmp_path / "v.arrow").read(range(count))) == expected
    for options in ((None, None), (48, None), (None, 3)):
        packed = pack(video, *options)
        assert packed["num_frames"] == count
        for decoder in DECODERS:
            assert numbers(Video("packed", decoder, packed["data"]).read(range(count))) == expected


def test_a_video_alone_and_pictures_have_a_choice_too(tmp_path):
    info = Video(write_streams(tmp_path / "v.mkv", (SMALL, 3, 0), sound=0)).info
    assert (info.stream, info.video_streams, info.stream_choice) == (1, 1, "only one")
