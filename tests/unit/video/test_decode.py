"""Decoding returns the requested frame, in any format and at any size; errors say what is wrong."""

import os
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import decord
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posmlp.video.decode import DecodeError, Video, convert, open_video, scaled_size
from posmlp.video.pack import pack
from tests.helpers.videos import by_pyav, noisy, number, numbers, picture, scramble, write_video

X265 = "log-level=none:pools=1:frame-threads=1"
B_FRAMES = {"g": "12", "bf": "2"}
PATTERNS = [
    [0],
    [39],
    [0, 39],
    [2, 7, 12, 17, 22, 27, 32, 37],  # uniform
    [28, 29, 30, 31, 32, 33, 34, 35],  # dense, late
    list(range(17, 33)),
    [11, 12, 13, 38],  # around a key frame
    list(range(40)),
]


def read(path, indices, short_side=None, decoder="pyav"):
    video = Video(str(path), decoder)
    try:
        return video.read(indices, short_side)
    finally:
        video.close()


def remux(source, target, shift=0, start=0, muxer=None):
    """The same packets from number ``start`` on, with their times shifted by ``shift`` units."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=muxer or {}) as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        for place, packet in enumerate(old.demux(stream)):
            if packet.size and place >= start:
                packet.pts += shift
                packet.dts += shift
                packet.stream = copy
                new.mux(packet)
    return str(target)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "v.mp4", 160, 120, options=B_FRAMES)


# Which frame ----------------------------------------------------------------------------------------------------------

FORMATS = {
    "closed.mp4": ("libx264", B_FRAMES, {}),
    "open.mp4": ("libx264", {"g": "6", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}, {}),
    "open.ts": ("libx264", {"g": "6", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}, {}),
    "pyramid.mp4": ("libx264", {"g": "250", "bf": "7", "x264-params": "b-pyramid=normal:scenecut=0"}, {}),
    "pyramid.mkv": ("libx264", {"g": "12", "bf": "5", "x264-params": "b-pyramid=strict:open-gop=1:scenecut=0"}, {}),
    "intra.mp4": ("libx264", {"g": "1"}, {}),
    "refresh.mp4": ("libx264", {"preset": "fast", "x264-params": "intra-refresh=1:keyint=12"}, {}),  # no IDR pictures
    "fragmented.mp4": ("libx264", B_FRAMES, {"muxer": {"movflags": "frag_keyframe+empty_moov"}}),
    "closed.avi": ("libx264", B_FRAMES, {}),
    "closed.flv": ("libx264", B_FRAMES, {}),
    "closed.h264": ("libx264", B_FRAMES, {}),
    "open_hevc.mp4": ("libx265", {"x265-params": f"keyint=6:bframes=3:open-gop=1:{X265}"}, {}),
    "open_hevc.ts": ("libx265", {"x265-params": f"keyint=6:bframes=3:open-gop=1:{X265}"}, {}),
    "closed_hevc.mkv": ("libx265", {"x265-params": f"keyint=12:bframes=4:b-pyramid=1:open-gop=0:{X265}"}, {}),
    "mpeg2.mpg": ("mpeg2video", B_FRAMES, {"rate": 25}),
    "mpeg2.ts": ("mpeg2video", B_FRAMES, {"rate": 25}),
    "mpeg2.mkv": ("mpeg2video", B_FRAMES, {"rate": 25}),
    "mpeg2.mp4": ("mpeg2video", B_FRAMES, {"rate": 25}),
    "mpeg1.mpg": ("mpeg1video", B_FRAMES, {"rate": 25}),
    "mpeg4.avi": ("mpeg4", {"g": "8", "bf": "2"}, {}),
    "mpeg4.mp4": ("mpeg4", {"g": "8", "bf": "2"}, {}),
    "vp9.webm": ("libvpx-vp9", {"deadline": "good", "cpu-used": "5", "g": "12", "auto-alt-ref": "1"}, {}),
    "vp8.webm": ("libvpx", {"deadline": "good", "cpu-used": "5", "g": "12", "auto-alt-ref": "1"}, {}),
    "av1.mp4": ("libsvtav1", {"preset": "12", "g": "12"}, {}),
    "av1.webm": ("libsvtav1", {"preset": "12", "g": "12"}, {}),
    "sorenson.flv": ("flv", {"g": "12"}, {}),
    "gif.gif": ("gif", {}, {"pix_fmt": "rgb8"}),
    "mjpeg.avi": ("mjpeg", {}, {"pix_fmt": "yuvj420p"}),
    "mjpeg.mov": ("mjpeg", {}, {"pix_fmt": "yuvj420p"}),
    "wmv.wmv": ("wmv2", {}, {}),
    "divx3.avi": ("msmpeg4v3", {}, {}),
    "h263.3gp": ("h263", {}, {"width": 176, "height": 144}),
    "prores.mov": ("prores", {}, {"pix_fmt": "yuv422p10le"}),
    "ffv1.mkv": ("ffv1", {}, {}),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_the_frame_asked_for_is_the_frame_delivered(tmp_path, name, decoder):
    codec, options, more = FORMATS[name]
    try:
        av.codec.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"FFmpeg here has no {codec}")
    path = write_video(tmp_path / name, codec=codec, options=options, **more)
    video = Video(path, decoder)
    assert video.info.frames == 40
    assert video.info.fps == pytest.approx(25 if name.endswith("h264") else more.get("rate", 10))
    for pattern in PATTERNS:
        assert numbers(video.read(pattern, 60)) == pattern
    assert numbers(video.all_frames()) == list(range(40))
    video.close()


@pytest.mark.parametrize("name", ["closed.mp4", "open.mp4", "open.ts", "mpeg2.mpg", "mpeg4.avi", "vp9.webm", "gif.gif"])
@pytest.mark.parametrize("place", ["store", "parquet"])
def test_the_same_frames_come_from_bytes(tmp_path, name, place):
    codec, options, more = FORMATS[name]
    path = write_video(tmp_path / name, codec=codec, options=options, **more)
    content = Path(path).read_bytes()
    if place == "store":
        uri = f"memory://bucket/{name}"
        fsspec.filesystem("memory").pipe(f"/bucket/{name}", content)
    else:
        uri = f"{tmp_path}/videos.parquet#1"
        pq.write_table(pa.table({"data": [b"another", content]}), tmp_path / "videos.parquet")
    for decoder in ("pyav", "decord"):
        video = Video(uri, decoder)
        assert video.info.frames == 40
        for pattern in PATTERNS:
            np.testing.assert_array_equal(video.read(pattern), read(path, pattern))
        assert numbers(video.all_frames(40)) == list(range(40))


@pytest.mark.parametrize(
    ("name", "used"),
    [
        ("closed.mp4", "decord"),
        ("vp9.webm", "decord"),
        ("open.ts", "pyav"),
        ("mpeg2.mpg", "pyav"),
        ("vp8.webm", "pyav"),
    ],
)
def test_decord_decodes_only_where_it_is_right(tmp_path, name, used):
    codec, options, more = FORMATS[name]
    video = Video(write_video(tmp_path / name, codec=codec, options=options, **more), "decord")
    assert video.info.decoder == used
    video.read([3, 30])
    assert video.info.decoder == used


def test_pyav_takes_over_where_decord_fails(video, monkeypatch):
    opened = Video(video, "decord")

    def fail(self):
        raise decord.DECORDError("out of luck")

    monkeypatch.setattr(decord.VideoReader, "next", fail)
    assert numbers(opened.read([5, 25])) == [5, 25]
    assert opened.info.decoder == "pyav"


def test_decord_decodes_only_if_it_finds_as_many_frames(video, monkeypatch):
    """One more or one less, as for videos whose packets it drops or repeats."""
    count = decord.VideoReader.__len__
    assert Video(video, "decord").info.decoder == "decord"
    for difference in (-1, 1):
        monkeypatch.setattr(decord.VideoReader, "__len__", lambda reader, d=difference: count(reader) + d)
        opened = Video(video, "decord")
        assert opened.info.decoder == "pyav"
        assert numbers(opened.read([0, 39])) == [0, 39]


@pytest.mark.parametrize("error", [decord.DECORDError("x"), RuntimeError("x"), StopIteration(), IndexError("x")])
def test_pyav_decodes_what_decord_cannot_open(video, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(decord, "VideoReader", fail)
    opened = Video(video, "decord")
    assert opened.info.decoder == "pyav"
    assert numbers(opened.read([7])) == [7]


def test_decord_decodes_only_if_asked_to(video):
    assert Video(video, "decord").info.decoder == "decord"
    for opened in (Video(video), Video(video, "pyav")):
        assert opened.info.decoder == "pyav"
        opened.read([7])
        assert opened.info.decoder == "pyav"


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize("gop", ["25", "250"])
def test_frames_late_in_a_long_video(tmp_path, gop, decoder):
    options = {"g": gop, "bf": "3", "x264-params": "open-gop=1:scenecut=0"}
    video = Video(write_video(tmp_path / "v.mp4", 72, 48, count=500, options=options), decoder)
    for indices in ([499], list(range(480, 500)), [248, 249, 250, 251], [0, 499], list(range(15, 500, 31))):
        assert numbers(video.read(indices)) == indices


@settings(max_examples=25)
@given(
    gop=st.sampled_from([1, 2, 5, 6, 12, 250]),
    bframes=st.integers(0, 7),
    params=st.sampled_from(["open-gop=1", "open-gop=0", "open-gop=1:b-pyramid=strict", "ref=1:b-pyramid=none"]),
    count=st.integers(1, 70),
    name=st.sampled_from(["v.mp4", "v.mkv", "v.ts"]),
    decoder=st.sampled_from(["pyav", "decord"]),
    data=st.data(),
)
def test_any_frames_of_any_structure(tmp_path_factory, gop, bframes, params, count, name, decoder, data):
    options = {"preset": "veryfast", "g": str(gop), "bf": str(bframes), "x264-params": f"{params}:scenecut=0"}
    path = write_video(tmp_path_factory.getbasetemp() / name, 72, 48, count=count, options=options)
    video = Video(path, decoder)
    assert video.info.frames == count
    for _ in range(4):
        indices = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=12)))
        assert numbers(video.read(indices)) == indices
    video.close()


@pytest.mark.parametrize("params", ["b-pyramid=normal:bframes=7", "b-pyramid=none:bframes=3", "open-gop=1:bframes=5"])
@pytest.mark.parametrize("gop", ["6", "12", "250"])
def test_skipping_unreferenced_frames_changes_no_pixel(tmp_path, params, gop):
    moving = np.random.default_rng(0).integers(0, 256, (72, 400, 3), np.uint8)
    place = iter(range(0, 400, 3))

    def change(frame):
        start = next(place)
        return moving[:, start : start + 108]

    options = {"preset": "medium", "g": gop, "x264-params": params}
    path = write_video(tmp_path / "v.mp4", count=60, options=options, change=change)
    expected = by_pyav(path)
    video = Video(path)
    assert video.skips
    for step in (1, 2, 3, 7, 13, 25):
        for first in range(min(step, 5)):
            indices = list(range(first, 60, step))
            np.testing.assert_array_equal(video.read(indices), expected[indices])
    for i in range(60):
        np.testing.assert_array_equal(video.read([i])[0], expected[i])


def test_a_video_can_be_read_many_times_in_any_order(video):
    opened = Video(video)
    for indices in ([39], [0], [20, 21], [0, 39], [39]):
        assert numbers(opened.read(indices)) == indices


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.webm", "v.ts", "v.flv"])
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_frames_of_a_varying_rate_keep_their_times(tmp_path, name, decoder):
    times = np.cumsum([0, *np.random.default_rng(0).choice([1, 10, 40, 41, 500], 39)]).tolist()
    codec, options = ("libvpx-vp9", {"deadline": "realtime"}) if name == "v.webm" else ("libx264", B_FRAMES)
    video = Video(write_video(tmp_path / name, codec=codec, options=options, rate=30, times=times), decoder)
    np.testing.assert_allclose(video.info.times * 1000, times, atol=0.1)
    for pattern in PATTERNS:
        assert numbers(video.read(pattern)) == pattern


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.avi", "v.ts"])
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_other_streams_do_not_disturb(tmp_path, name, decoder):
    """Sound, longer than the pictures, and a second video stream, smaller than the first."""
    with av.open(str(tmp_path / name), "w") as container:
        sound = container.add_stream("mp2", rate=48000, layout="mono")
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 108, 72, "yuv420p"
        second = container.add_stream("mpeg4", rate=10)
        second.width, second.height, second.pix_fmt = 54, 36, "yuv420p"
        for i in range(60):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.int16), format="s16", layout="mono")
            samples.sample_rate, samples.pts = 48000, 4800 * i
            container.mux(sound.encode(samples))
            if i < 40:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i, 108, 72), format="rgb24")))
                container.mux(second.encode(av.VideoFrame.from_ndarray(picture(0, 54, 36), format="rgb24")))
        for each in (sound, stream, second):
            container.mux(each.encode())
    video = Video(str(tmp_path / name), decoder)
    for pattern in PATTERNS:
        assert numbers(video.read(pattern)) == pattern
    assert video.verify() == (72, 108)
    assert video.info.frames == 40


@pytest.mark.parametrize(("codec", "pix_fmt"), [("mpeg4", "yuv420p"), ("mjpeg", "yuvj420p"), ("libx264", "yuv420p")])
def test_an_avi_file_need_not_have_a_frame_for_every_tick(tmp_path, codec, pix_fmt):
    """Recorders drop frames, but the header still counts them."""
    ticks = np.cumsum([0, *np.random.default_rng(0).choice([1, 1, 3, 5], 39)]).tolist()
    with av.open(str(tmp_path / "v.avi"), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 108, 72, pix_fmt
        stream.codec_context.time_base = Fraction(1, 10)
        for i, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(picture(i, 108, 72), format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(tmp_path / "v.avi")) as container:
        assert container.streams.video[0].frames > 100
    video = Video(str(tmp_path / "v.avi"))
    assert video.info.frames == 40
    assert numbers(video.read(range(40))) == list(range(40))
    if codec != "libx264":  # whose times AVI loses
        np.testing.assert_allclose(video.info.times, np.array(ticks) / 10)


@pytest.mark.parametrize(
    ("name", "shift"),
    [("v.mp4", 51200), ("v.mkv", 51200), ("v.ts", 51200), ("v.flv", 51200), ("v.mp4", 2**40), ("v.mkv", 2**40)],
)
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_a_stream_need_not_start_at_time_0(video, tmp_path, name, shift, decoder):
    """2^40: a camera may count from 1970, beyond 32 bits."""
    late = Video(remux(video, tmp_path / name, shift=shift), decoder)
    np.testing.assert_allclose(late.info.times, np.arange(40) / 10, atol=1e-3)
    for pattern in PATTERNS:
        assert numbers(late.read(pattern)) == pattern


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_an_edit_list_hides_the_frames_before_its_start(tmp_path, decoder):
    path = write_video(tmp_path / "v.mp4", options=B_FRAMES)
    muxer = {"avoid_negative_ts": "disabled", "use_editlist": "1"}
    edited = remux(path, tmp_path / "edited.mp4", shift=-5 * 1024, muxer=muxer)
    with av.open(edited) as container:
        assert sum(packet.is_discard for packet in container.demux(video=0)) == 5
    video = Video(edited, decoder)
    assert video.info.frames == 35
    assert numbers(video.read(range(35))) == list(range(5, 40))
    assert numbers(video.read([0, 6, 7, 34])) == [5, 11, 12, 39]
    assert numbers(video.all_frames()) == list(range(5, 40))


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video", "libx265"])
@pytest.mark.parametrize("name", ["cut.mkv", "cut.mp4"])
@pytest.mark.parametrize("later", [0, 3])  # packets after the key frame where the cut is
def test_a_video_cut_from_another_has_the_frames_that_decode(tmp_path, codec, name, later):
    options = {
        "libx264": {"g": "12", "bf": "2", "x264-params": "open-gop=1:scenecut=0"},
        "libx265": {"x265-params": f"keyint=12:bframes=3:open-gop=1:{X265}"},
        "mpeg2video": B_FRAMES,
    }[codec]
    path = write_video(tmp_path / "v.mp4", codec=codec, options=options, rate=25)
    with av.open(path) as container:
        keys = [i for i, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
    cut = remux(path, tmp_path / name, start=keys[2] + later)
    expected = numbers(by_pyav(cut))
    for decoder in ("pyav", "decord"):
        video = Video(cut, decoder)
        assert video.info.frames == len(expected)
        assert numbers(video.read(range(len(expected)))) == expected
        for i, frame in enumerate(expected):
            assert numbers(video.read([i])) == [frame]


@pytest.mark.parametrize("name", ["v.ts", "v.mpg", "v.h264"])
@pytest.mark.parametrize("size", [(108, 72), (54, 72), (216, 144)])
def test_files_joined_end_to_end_are_one_video(tmp_path, name, size):
    """Times start again, and the size may change: all frames get the size of the first."""
    codec = "mpeg2video" if name == "v.mpg" else "libx264"
    content = b""
    for width, height in ((108, 72), size):
        content += Path(
            write_video(tmp_path / name, width, height, count=20, codec=codec, options=B_FRAMES, rate=25)
        ).read_bytes()
    (tmp_path / name).write_bytes(content)
    video = Video(str(tmp_path / name))
    with av.open(str(tmp_path / name)) as container:
        expected = [number(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert video.info.frames == len(expected) >= 38
    assert numbers(video.read(range(len(expected)))) == expected
    assert numbers(video.read([3, 25, 37])) == [expected[i] for i in (3, 25, 37)]
    assert {frame.shape for frame in video.all_frames()} == {(72, 108, 3)}
    assert (np.diff(video.info.times) > 0).all()


@pytest.mark.parametrize("pix_fmt", ["gray", "gray16le", "yuva444p", "yuv420p10le", "bgr0"])
def test_pixels_of_other_kinds(tmp_path, pix_fmt):
    path = write_video(tmp_path / "v.mkv", count=5, codec="ffv1", pix_fmt=pix_fmt)
    for decoder in ("pyav", "decord"):
        assert numbers(read(path, [1, 4], 36, decoder)) == [1, 4]


@pytest.mark.parametrize(("name", "codec"), [("v.avi", "rawvideo"), ("v.avi", "msrle"), ("v.mov", "rawvideo")])
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_a_palette_outlives_a_seek(tmp_path, name, codec, decoder):
    """FFmpeg's decoders forget the palette of the container when they seek: all frames would be black."""
    pictures = [picture(i, 108, 72) for i in range(12)]
    colours = np.unique(np.concatenate(pictures).reshape(-1, 3), axis=0)
    palette = np.zeros((256, 4), np.uint8)
    palette[: len(colours), 1:] = colours
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 108, 72, "pal8"
        for pixels in pictures:
            places = (pixels[:, :, None] == colours).all(-1).argmax(-1).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray((places, palette), format="pal8")))
        container.mux(stream.encode())
    for indices in ([0, 5, 11], [7], range(12)):
        np.testing.assert_array_equal(read(tmp_path / name, indices, decoder=decoder), [pictures[i] for i in indices])


@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("name", ["v.mp4", "v.mov"])
def test_a_video_turned_by_its_flag_is_upright(tmp_path, name, degrees):
    """decord itself is the truth: its batches need a width whose padded line is no multiple of it, on any processor."""
    turn = {"prepare": lambda stream: stream.set_display_rotation(degrees)}
    path = write_video(tmp_path / name, 132, 100, count=4, **turn)
    upright = decord.VideoReader(path).get_batch([2]).asnumpy()
    frames = read(path, [2])
    assert frames.shape == upright.shape == ((1, 100, 132, 3) if degrees == 180 else (1, 132, 100, 3))
    assert np.abs(frames.astype(int) - upright).max() <= 2
    assert np.abs(read(path, [2], decoder="decord").astype(int) - upright).max() <= 2
    stored = np.rot90(picture(2, 132, 100), degrees // 90)[None]
    assert np.abs(frames.astype(int) - stored).mean() < 10
    assert Video(path).verify() == upright.shape[1:3]
    assert min(read(path, [2], 36).shape[1:3]) == 36
    np.testing.assert_array_equal(list(Video(path).all_frames(36)), read(path, range(4), 36))


# Sizes and colours ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", range(8, 145, 8))
@pytest.mark.parametrize("height", [64, 130])
def test_pixels_are_those_of_plain_decoding_at_any_width(tmp_path, width, height):
    path = write_video(tmp_path / "v.mp4", width, height, count=5)
    expected = by_pyav(path)[[1, 3]]
    for decoder in ("pyav", "decord"):
        frames = read(path, [1, 3], decoder=decoder)
        assert frames.dtype == np.uint8
        assert frames.shape == (2, height, width, 3)
        assert np.abs(frames.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 64), (63, 65), (101, 7), (300, 2)])
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_odd_sizes(tmp_path, size, decoder):
    width, height = size
    path = write_video(tmp_path / "v.mp4", width, height, count=3, pix_fmt="yuv444p")
    frames = read(path, [0, 2], decoder=decoder)
    assert frames.shape == (2, height, width, 3)
    assert np.abs(frames.astype(int) - by_pyav(path)[[0, 2]]).max() <= 2
    small = read(path, [0, 2], 16, decoder)
    assert small.shape == (2, *scaled_size(height, width, 16), 3)


def test_a_very_large_video(tmp_path):
    path = write_video(tmp_path / "v.mp4", 7680, 4320, count=2, codec="mpeg4", options={"g": "1"})
    frames = read(path, [1], 64)
    assert frames.shape == (1, 64, 114, 3)
    assert numbers(frames) == [1]


@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(1, 9000) | st.none())
def test_the_short_side_is_met_the_aspect_kept_and_nothing_upscaled(height, width, short_side):
    h, w = scaled_size(height, width, short_side)
    if short_side is None or short_side >= min(height, width):
        assert (h, w) == (height, width)
    else:
        assert min(h, w) == short_side
        assert abs(max(h, w) - short_side * max(height, width) / min(height, width)) <= 0.5001


@pytest.mark.parametrize("short_side", [None, 120, 500])
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_frames_are_never_upscaled(video, short_side, decoder):
    frames = read(video, [7], short_side, decoder)
    assert frames.shape == (1, 120, 160, 3)
    assert numbers(frames) == [7]


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_scaling_keeps_everything_in_its_place(video, decoder):
    small = read(video, [9], 30, decoder)[0].astype(int)
    means = read(video, [9])[0].reshape(30, 4, 40, 4, 3).mean((1, 3))
    assert np.abs(small - means).mean() < 6  # a frame moved by one pixel, or turned over, is far above


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_scaling_is_antialiased(tmp_path, decoder):
    def stripes(frame):
        return np.where(np.arange(160)[None, :, None] % 2, 220, 30).astype(np.uint8).repeat(120, 0).repeat(3, 2)

    path = write_video(tmp_path / "v.mp4", 160, 120, count=2, change=stripes)
    assert read(path, [0]).std() > 80
    assert read(path, [0], 40, decoder).std() < 20  # grey; every third pixel would be stripes again


SIDES = st.integers(2, 40)
PIXELS = st.sampled_from(["yuv420p", "yuvj420p", "yuv444p", "yuv420p10le", "gray", "rgb24", "rgba"])


@given(frames=st.lists(st.tuples(SIDES, SIDES, PIXELS, SIDES, SIDES), min_size=2, max_size=8))
def test_one_scaler_converts_frames_of_all_kinds_as_a_scaler_for_each(frames):
    """In turns and from several threads, as if each frame had a scaler of its own."""
    made = []
    for seed, (height, width, pixels, *_) in enumerate(frames):
        noise = np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)
        made.append(av.VideoFrame.from_ndarray(noise, format="rgb24").reformat(format=pixels, threads=1))
    sizes = [(height, width) for *_, height, width in frames]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda frame, size: convert(frame, *size, "rgb24").to_ndarray(), made, sizes))
    for frame, (height, width), actual in zip(made, sizes, found, strict=True):
        own = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BILINEAR", threads=1)
        assert np.array_equal(actual, own)


def test_all_frames_are_scaled_as_those_read(video):
    np.testing.assert_array_equal(list(Video(video).all_frames(50)), read(video, range(40), 50))


# FFmpeg's numbers of matrix and range, the weights of red and blue in luma, and the scale of luma and of chroma
COLOURS = {"bt709": (1, 0.2126, 0.0722), "bt601": (6, 0.299, 0.114), "bt2020": (9, 0.2627, 0.0593)}


def rgb_of(y, u, v, red, blue, full):
    """Rec. ITU-R BT.601, 709 and 2020, from their definition."""
    y, u, v = (
        (y / 255, (u - 128) / 255, (v - 128) / 255) if full else ((y - 16) / 219, (u - 128) / 224, (v - 128) / 224)
    )
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    g = (y - red * r - blue * b) / (1 - red - blue)
    return np.clip(np.array([r, g, b]) * 255, 0, 255)


@pytest.mark.parametrize("matrix", COLOURS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("yuv", [(81, 90, 200), (145, 60, 50), (60, 200, 110), (120, 128, 128), (200, 100, 150)])
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_colours_are_right(tmp_path, matrix, full, yuv, decoder):
    space, red, blue = COLOURS[matrix]
    path = str(tmp_path / "v.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p" if full else "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_range = space, 2 if full else 1
        frame = av.VideoFrame(64, 64, stream.pix_fmt)
        for plane, value in zip(frame.planes, yuv, strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        frame.colorspace, frame.color_range = space, context.color_range
        for _ in range(2):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    expected = rgb_of(*yuv, red, blue, full)
    for short_side in (None, 20):
        assert np.abs(read(path, [1], short_side, decoder).astype(float) - expected).max() <= 3
    packed = Video("packed.mp4", content=pack(Video(path), 32, 12)["data"])  # without the original's matrix and range
    assert np.abs(packed.read([1]).astype(float) - expected).max() <= 6


# Tags -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v.avi", "v.mp4", "v.mkv"])
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_tags_may_have_any_encoding(tmp_path, name, decoder):
    """Old cameras and editors write them in that of their country; files of HMDB51 have such."""
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "a title in Shift_JIS"
        stream = container.add_stream("libx264", rate=10, options=B_FRAMES)
        stream.width, stream.height, stream.pix_fmt = 108, 72, "yuv420p"
        for i in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i, 108, 72), format="rgb24")))
        container.mux(stream.encode())
    content = path.read_bytes()
    assert b"a title in Shift_JIS" in content
    path.write_bytes(content.replace(b"a title in Shift_JIS", b"\x83e\x83X\x83g\x93\xae\x89\xe6\xff\xfe a title"[:20]))
    video = Video(str(path), decoder)
    assert numbers(video.read([0, 4, 9])) == [0, 4, 9]


def test_damaged_files_do_not_flood_the_console(tmp_path):
    """FFmpeg and decord print their own lines; a list of bad videos would bury those of a run."""
    paths = [scramble(tmp_path / "noise.mp4"), str(tmp_path / "cut.mkv"), str(tmp_path / "text.mp4")]
    whole = Path(write_video(tmp_path / "whole.mkv", change=noisy)).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("no video")
    code = """
import sys
from posmlp.video.decode import DecodeError, Video
for path in sys.argv[1:]:
    for decoder in ("pyav", "decord"):
        try:
            video = Video(path, decoder)
            video.read(range(video.info.frames))
        except DecodeError:
            print(".", end="")
"""
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert set(done.stdout) == {"."}
    assert done.stderr == ""


# Names and places -----------------------------------------------------------------------------------------------------


def test_a_name_is_never_taken_for_a_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:b.mp4", "-v.mp4", "what? #1 %d & 'so'.mp4", "works?.mp4", "a=b&c=d.mp4", " v .mp4", "é 漢.mp4"):
        os.rename(write_video(tmp_path / "v.mp4", count=3), name)
        for decoder in ("pyav", "decord"):
            assert numbers(read(name, [2], decoder=decoder)) == [2]


@pytest.mark.parametrize("name", ["v.avi", "v.txt", "v", "v.jpg"])
def test_the_format_follows_the_content_and_not_the_name(video, tmp_path, name):
    (tmp_path / name).symlink_to(video)
    for decoder in ("pyav", "decord"):
        assert numbers(read(tmp_path / name, [5, 30], decoder=decoder)) == [5, 30]


# Frame folders --------------------------------------------------------------------------------------------------------


def write_pictures(folder, suffix, count=5, mode="RGB"):
    from PIL import Image

    folder.mkdir()
    for i in range(count):
        Image.fromarray(picture(i, 108, 72)).convert(mode).save(folder / f"{i + 1:05d}{suffix}", quality=95)
    return f"{folder}/{{:05d}}{suffix}"


@pytest.mark.parametrize(("suffix", "tolerance"), [(".jpg", 40), (".png", 0), (".bmp", 0)])
def test_a_folder_of_pictures_is_a_video(tmp_path, suffix, tolerance):
    video = open_video(write_pictures(tmp_path / "v", suffix), 5)
    assert (video.info.frames, video.info.times, video.info.fps) == (5, None, None)
    frames = video.read([0, 2, 4])
    assert np.abs(frames - np.stack([picture(i, 108, 72) for i in (0, 2, 4)]).astype(int)).max() <= tolerance
    assert numbers(video.read([1, 3], 40)) == [1, 3]
    assert numbers(video.all_frames()) == list(range(5))
    assert video.verify() == (72, 108)


@pytest.mark.parametrize(("suffix", "mode"), [(".jpg", "L"), (".png", "L"), (".png", "P"), (".png", "RGBA")])
def test_pictures_of_other_modes(tmp_path, suffix, mode):
    frames = open_video(write_pictures(tmp_path / "v", suffix, mode=mode), 5).read([1, 3])
    assert frames.shape == (2, 72, 108, 3)
    assert numbers(frames) == [1, 3]


def test_a_folder_is_as_long_as_the_manifest_says(tmp_path):
    template = write_pictures(tmp_path / "v", ".jpg")
    assert open_video(template, 3).info.frames == 3
    with pytest.raises(DecodeError, match=r"00006\.jpg: the file is missing"):
        open_video(template, 6).read([5])
    with pytest.raises(DecodeError, match=r"00006\.jpg: the file is missing"):
        open_video(template, 6).verify()
    with pytest.raises(DecodeError, match="no pictures"):
        open_video(template, 0)


@pytest.mark.parametrize("content", [b"", b"text", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_the_error_of_a_bad_picture_has_its_own_name(tmp_path, content):
    video = open_video(write_pictures(tmp_path / "v", ".jpg"), 5)
    (tmp_path / "v" / "00003.jpg").write_bytes(content)
    with pytest.raises(DecodeError, match=r"00003\.jpg: the (picture|file) is (damaged|empty)"):
        video.read([0, 2, 4])
    assert numbers(video.read([0, 4])) == [0, 4]


def test_a_picture_cut_short_is_refused(tmp_path):
    from PIL import Image

    template = write_pictures(tmp_path / "v", ".jpg")
    Image.fromarray(noisy(picture(0, 108, 72))).save(tmp_path / "v" / "00002.jpg")
    content = (tmp_path / "v" / "00002.jpg").read_bytes()
    (tmp_path / "v" / "00002.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(DecodeError, match=r"00002\.jpg: the picture is damaged"):
        open_video(template, 5).read([1])


# Damage ---------------------------------------------------------------------------------------------------------------

DAMAGED = {
    "v.mp4": ("libx264", B_FRAMES, {}),
    "front.mp4": ("libx264", B_FRAMES, {"muxer": {"movflags": "faststart"}}),
    "fragmented.mp4": ("libx264", B_FRAMES, {"muxer": {"movflags": "frag_keyframe+empty_moov"}}),
    "v.mkv": ("libx264", B_FRAMES, {}),
    "v.avi": ("mpeg4", {"g": "8", "bf": "2"}, {}),
    "v.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}, {}),
    "v.flv": ("libx264", B_FRAMES, {}),
    "v.ts": ("libx264", B_FRAMES, {}),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Each video of ``DAMAGED``, before the damage."""
    folder = tmp_path_factory.mktemp("whole")
    return {
        name: open(write_video(folder / name, codec=codec, options=options, change=noisy, rate=2, **more), "rb").read()
        for name, (codec, options, more) in DAMAGED.items()
    }


def check_reason(error):
    """The error is one line that a person understands."""
    text = str(error)
    assert text.startswith(f"{error.uri}: ")
    assert "\n" not in text
    assert not re.search(r"[Ee]rrno|0x[0-9a-f]{4}|\b1094995529\b|avcodec|AVERROR|Traceback|ffmpeg", error.reason), text
    again = pickle.loads(pickle.dumps(error))  # it crosses process borders
    assert (again.uri, again.reason) == (error.uri, error.reason)


def check_right_or_refused(path, truth):
    """All frames equal those before the damage, or an error has a reason. Returns whether the video was refused."""
    try:
        video = Video(str(path))
        frames = video.read(range(video.info.frames))
    except DecodeError as error:
        check_reason(error)
        return True
    if str(path).endswith(".ts"):  # which says neither how long it is nor where its last frame ends
        frames = frames[:-1]
    assert len(frames) <= len(truth)
    assert (frames == truth[: len(frames)]).all()
    return False


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_cut_short_is_refused_or_right(tmp_path, whole, name):
    path = tmp_path / name
    path.write_bytes(whole[name])
    truth = by_pyav(path)
    for tenth in range(1, 10):
        path.write_bytes(whole[name][: len(whole[name]) * tenth // 10])
        refused = check_right_or_refused(path, truth)
        assert refused or name == "v.ts", tenth


@pytest.mark.parametrize("name", ["v.mp4", "front.mp4"])
def test_only_frames_before_the_damage_are_given(tmp_path, whole, name):
    path = tmp_path / name
    content = bytearray(whole[name])
    middle = len(content) // 2
    content[middle : middle + len(content) // 8] = bytes(len(content) // 8)
    path.write_bytes(whole[name])
    truth = by_pyav(path)
    path.write_bytes(content)
    np.testing.assert_array_equal(read(path, range(8)), truth[:8])
    for everything in (lambda: read(path, range(40)), lambda: Video(str(path)).verify()):
        with pytest.raises(DecodeError, match=r"truncated or corrupt, frame \d+ of 40 does not decode") as caught:
            everything()
        check_reason(caught.value)
    given = []
    with pytest.raises(DecodeError):
        given.extend(Video(str(path)).all_frames())
    np.testing.assert_array_equal(given, truth[: len(given)])


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_cover(path):
    """Sound with a cover picture, which FFmpeg presents as a video stream."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=44100, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(picture(1, 64, 64), format="rgb24")))
        container.mux(cover.encode())
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(sound.encode(frame))
        container.mux(sound.encode())


def write_ten_hours(path):
    """A file whose header says 10 h."""
    write_video(path, codec="mpeg4" if path.suffix == ".avi" else "libx264")
    content = bytearray(path.read_bytes())
    if path.suffix == ".avi":
        place = content.index(b"avih") + 8 + 16  # the number of frames, which is also in the stream's header
        content[place : place + 4] = (360000).to_bytes(4, "little")
        place = content.index(b"strh") + 8 + 32
        content[place : place + 4] = (360000).to_bytes(4, "little")
    else:
        place = content.index(b"\x44\x89\x88") + 3  # the element Duration, a float of 8 bytes, in milliseconds
        content[place : place + 8] = np.array(36e6, ">f8").tobytes()
    path.write_bytes(content)


def write_half_of_ten_hours(path):
    write_ten_hours(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["long.mkv", "long.avi"])
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_a_whole_video_whose_header_lies_about_its_length_decodes(tmp_path, name, decoder):
    path = tmp_path / name
    write_ten_hours(path)
    with av.open(str(path)) as container:
        assert container.duration == 36_000_000_000
    video = Video(str(path), decoder)
    assert video.info.frames == 40
    assert numbers(video.read([3, 17, 39])) == [3, 17, 39]


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("gone.mp4", lambda path: None, "the file is missing"),
        ("folder.mp4", lambda path: path.mkdir(), "a folder"),
        ("empty.mp4", lambda path: path.touch(), r"empty \(0 bytes\)"),
        ("text.mp4", lambda path: path.write_text("hello\n" * 100), "not a video"),
        ("noise.mp4", lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "not a video"),
        ("zeros.mp4", lambda path: path.write_bytes(bytes(5000)), "not a video"),
        ("sound.m4a", write_sound, "no video stream"),
        ("cover.mp4", write_cover, "no video stream"),
        ("header.mkv", lambda path: path.write_bytes(b"\x1aE\xdf\xa3" + bytes(50)), "truncated or corrupt"),
        ("long.mkv", write_half_of_ten_hours, r"the header promises 36000\.0 s, the file holds \d\.\d s"),
    ],
)
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_the_error_of_a_bad_file_has_its_name_and_the_reason(tmp_path, name, make, words, decoder):
    path = tmp_path / name
    make(path)
    with pytest.raises(DecodeError, match=words) as caught:
        Video(str(path), decoder)
    assert caught.value.uri == str(path)
    check_reason(caught.value)


@pytest.fixture
def no_root():
    """Run without root's rights, because root may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


def test_a_file_without_permission(tmp_path, no_root):
    path = tmp_path / "v.mp4"
    if os.getuid() != 0:
        path.write_bytes(b"ftyp")
        path.chmod(0)
    with pytest.raises(DecodeError, match=r"the file cannot be opened \(Permission denied\)") as caught:
        Video(str(path))
    check_reason(caught.value)


@pytest.mark.parametrize("uri", ["memory://bucket/gone.mp4", "nothing://bucket/v.mp4", "v.parquet#1", "\0.mp4"])
def test_a_remote_file_that_cannot_be_read(uri):
    with pytest.raises(DecodeError, match=r"cannot be opened|is missing") as caught:
        Video(uri)
    check_reason(caught.value)
