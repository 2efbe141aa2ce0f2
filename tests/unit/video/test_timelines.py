"""Which frames a video has, and when, where packets do not say it: edit lists, joined recordings, packed pictures.

The truth is the number that each frame shows, the edit list that the test writes, and FFmpeg's plain decoding.
"""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from posmlp.video.decode import DecodeError, Video
from posmlp.video.pack import choose_units, pack
from posmlp.video.sampling import fps_indices
from tests.helpers.videos import by_pyav, number, numbers, picture, write_video

B_FRAMES = {"g": "12", "bf": "2"}
DECODERS = ["pyav", "decord"]

# Edit lists -----------------------------------------------------------------------------------------------------------


def replaced(content, path, new):
    """The boxes of an MP4 file with the box at ``path`` replaced, and the sizes of those around it."""
    out, start = b"", 0
    while start < len(content):
        (size,) = struct.unpack_from(">I", content, start)
        box = content[start : start + size]
        if box[4:8] == path[0] and len(path) > 1:
            inside = replaced(box[8:], path[1:], new)
            box = struct.pack(">I", 8 + len(inside)) + box[4:8] + inside
        elif box[4:8] == path[0]:
            box = new
        out += box
        start += size
    return out


def edit_list(entries):
    """A box with an edit list of (thousandths of a second, first frame or None for nothing) for a video of 10 fps."""
    rows = [
        struct.pack(">IiI", length, -1 if first is None else 2048 + 1024 * first, 1 << 16) for length, first in entries
    ]
    body = struct.pack(">II", 0, len(rows)) + b"".join(rows)
    return struct.pack(">I4sI4s", 16 + len(body), b"edts", 8 + len(body), b"elst") + body


EDITS = {
    "start cut off": ([(3500, 5)], range(5, 40)),
    "end cut off": ([(1500, 0)], range(15)),
    "both cut off": ([(1500, 7)], range(7, 22)),
    "middle cut out": ([(1000, 0), (500, 30)], [*range(10), *range(30, 35)]),
    "parts exchanged": ([(1000, 20), (500, 0)], [*range(20, 30), *range(5)]),
    "a part twice": ([(1000, 0), (1000, 0)], [*range(10)] * 2),
    "late": ([(700, None), (4000, 0)], range(40)),
}


@pytest.mark.parametrize("case", EDITS)
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("remote", [False, True])
def test_an_edit_list_says_which_frames_are_shown(tmp_path, case, decoder, remote):
    entries, shown = EDITS[case]
    path = tmp_path / "v.mp4"
    write_video(path, options=B_FRAMES)
    edited = replaced(path.read_bytes(), [b"moov", b"trak", b"edts"], edit_list(entries))
    path.write_bytes(edited)
    video = Video(str(path), decoder, content=edited if remote else None)
    shown = list(shown)
    assert numbers(by_pyav(path)) == shown
    assert video.info.frames == len(shown)
    assert numbers(video.read(range(len(shown)))) == shown
    for indices in ([0], [len(shown) - 1], [1, 6, 12], [3, 4, 5]):
        assert numbers(video.read(indices)) == [shown[i] for i in indices]
    assert numbers(video.all_frames()) == shown


def test_an_edited_file_cut_short_is_refused(tmp_path):
    path = tmp_path / "v.mp4"
    write_video(path, options=B_FRAMES, muxer={"movflags": "faststart"})
    edited = replaced(path.read_bytes(), [b"moov", b"trak", b"edts"], edit_list([(3000, 7)]))
    for part in (0.6, 0.8):
        with pytest.raises(DecodeError, match=r"cut short: the header promises \d+, the file holds \d+ frames"):
            Video(str(path), content=edited[: int(part * len(edited))])


@pytest.mark.parametrize("places", [[40], [20], [5, 6, 7], [40, 40, 40]])
@pytest.mark.parametrize("decoder", DECODERS)
def test_empty_samples_are_no_frames(tmp_path, places, decoder):
    """A recorder that drops frames may write samples of 0 bytes: the header has more frames than can be decoded."""
    path = tmp_path / "v.mp4"
    write_video(path, options={"g": "12", "bf": "0"})
    content = path.read_bytes()
    at = content.find(b"stsz")
    sizes = [*struct.unpack_from(">40I", content, at + 16)]
    for place in reversed(places):
        sizes.insert(place, 0)
    count = len(sizes)
    for kind, numbers_in_it in (
        (b"stsz", [0, 0, count, *sizes]),
        (b"stts", [0, 1, count, 1024]),
        (b"stsc", [0, 1, 1, count, 1]),
    ):
        box = struct.pack(f">I4s{len(numbers_in_it)}I", 8 + 4 * len(numbers_in_it), kind, *numbers_in_it)
        content = replaced(content, [b"moov", b"trak", b"mdia", b"minf", b"stbl", kind], box)
    content = replaced(content, [b"moov", b"trak", b"edts"], edit_list([(100 * count, -2)]))  # from time 0 on
    path.write_bytes(content)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == count
    video = Video(str(path), decoder)
    assert video.info.frames == 40
    assert numbers(video.read(range(40))) == [*range(40)]
    assert numbers(video.read([0, 19, 20, 39])) == [0, 19, 20, 39]


# Joined recordings ----------------------------------------------------------------------------------------------------


def recording(path, start):
    """20 frames in 2 s, with times from ``start`` seconds on."""
    source = write_video(path.with_name(f"source{path.suffix}"), count=20, options=B_FRAMES, rate=10)
    with av.open(source) as old, av.open(str(path), "w") as new:
        copy = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.pts += round(start / packet.time_base)
                packet.dts += round(start / packet.time_base)
                packet.stream = copy
                new.mux(packet)
    return path.read_bytes()


@pytest.mark.parametrize("starts", [(0, 0), (0, 0.05), (0, 100), (100, 0), (7, 100, 3)])
def test_joined_recordings_follow_each_other(tmp_path, starts):
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(recording(tmp_path / "part.ts", start) for start in starts))
    video, count = Video(str(path)), 20 * len(starts)
    np.testing.assert_allclose(video.info.times, np.arange(count) / 10, atol=1e-3)
    assert numbers(video.read(range(count))) == [*range(20)] * len(starts)
    assert numbers(video.read(fps_indices(video.info.times, 5.0).tolist())) == [*range(0, 20, 2)] * len(starts)


def test_a_pause_in_a_recording_stays(tmp_path):
    """Up to 10 s, as in FFmpeg's tools."""
    path = tmp_path / "pause.ts"
    path.write_bytes(recording(tmp_path / "part.ts", 0) + recording(tmp_path / "part.ts", 9))
    np.testing.assert_allclose(Video(str(path)).info.times[[19, 20, 39]], [1.9, 9.0, 10.9], atol=1e-3)


def test_a_clock_that_starts_over_is_continued(tmp_path):
    path = tmp_path / "wrap.ts"
    recording(path, 2**33 / 90_000 - 2.4)  # the clock of MPEG-TS has 33 bits; the muxer adds 1.4 s
    np.testing.assert_allclose(Video(str(path)).info.times, np.arange(20) / 10, atol=1e-3)


# Several pictures in a packet -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v.avi", "v.mp4", "v.mkv"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_packed_b_frames(tmp_path, name, decoder):
    """DivX and Xvid pack a B-frame into the packet of the frame before, and add an empty picture in its place."""
    start = b"\0\0\1\xb6"
    source = write_video(tmp_path / "source.avi", codec="mpeg4", options={"g": "8", "bf": "1"}, count=20)
    with av.open(source) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    kinds = [packet[packet.find(start) + 4] >> 6 for packet in packets]  # 0: I, 1: P, 2: B
    packed, i = [], 0
    while i < len(packets):
        pair = kinds[i] != 2 and kinds[i + 1 : i + 2] == [2]
        packed += [packets[i] + packets[i + 1], start + b"\x40\0"] if pair else [packets[i]]
        i += 1 + pair
    place = packed[0].find(b"\0\0\1\xb3")
    packed[0] = packed[0][:place] + b"\0\0\1\xb2DivX503b1393p" + packed[0][place:]
    path = str(tmp_path / name)
    with av.open(source) as old, av.open(path, "w") as new:
        copy = new.add_stream_from_template(old.streams.video[0])
        for i, content in enumerate(packed):
            packet = av.Packet(content)
            packet.pts = packet.dts = i
            packet.duration, packet.time_base, packet.stream = 1, Fraction(1, 10), copy
            packet.is_keyframe = content[content.find(start) + 4] >> 6 == 0
            new.mux(packet)
    assert numbers(by_pyav(path)) == [*range(20)]
    video = Video(path, decoder)
    assert video.info.frames == 20
    for indices in ([0], [6], [19], [0, 6, 10, 19], [8, 9, 10], range(20)):
        assert numbers(video.read(indices)) == list(indices)


# Very slow and very fast videos ---------------------------------------------------------------------------------------


def write_timed(path, step, count=8):
    """A video with a frame every ``step`` seconds."""
    unit = min(Fraction(step), Fraction(1))
    with av.open(str(path), "w", options={"movie_timescale": str(unit.denominator)}) as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 108, 72, "yuv420p"
        stream.codec_context.time_base = unit
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(picture(i, 108, 72), format="rgb24")
            frame.pts, frame.time_base = int(i * step / unit), unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


@pytest.mark.parametrize("step", [86_400, 3600, 1, Fraction(1, 1000), Fraction(1, 90_000), Fraction(1, 500_000)])
def test_packing_keeps_times_of_any_rate(tmp_path, step):
    video = Video(write_timed(tmp_path / "v.mkv" if step >= Fraction(1, 1000) else tmp_path / "v.mov", step))
    packed = Video("packed.mp4", content=pack(video, 48, 4)["data"])
    np.testing.assert_allclose(packed.info.times, np.arange(8) * float(step), rtol=1e-6)
    assert [number(frame) for frame in packed.read(range(8))] == [*range(8)]


def test_times_that_fit_no_file_are_refused_in_words():
    assert choose_units("v.mkv", np.zeros(1)) == Fraction(1, 90_000)
    with pytest.raises(DecodeError, match=r"v\.mkv: its frames are 1e-06 to 1e\+09 s apart, .*pack it unchanged"):
        choose_units("v.mkv", np.array([0.0, 1e-6, 1e9]))


@pytest.mark.parametrize("rate", [30, 300, 600, 1000, 5000])
def test_frames_of_a_high_speed_camera_are_not_skipped(rate):
    times = np.round(np.arange(50) / rate, 6)
    assert fps_indices(times, rate).tolist() == [*range(50)]
    assert fps_indices(times, rate / 2).tolist() == [*range(0, 50, 2)]
