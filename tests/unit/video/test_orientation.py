"""All eight orientations of a stored video come out as players show them, wherever frames are decoded."""

import gc
import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from posmlp.video.cache import CachedVideo, write_cache_file
from posmlp.video.decode import Video, open_video
from posmlp.video.pack import pack
from tests.helpers.videos import picture, write_video

# a, b, c, d of the display matrix, by the MP4 specification: the stored pixel (x, y) is shown at
# (a x + c y, b x + d y), with y downwards. Then what that does to an array [H, W, 3], and its name in the report.
EIGHT = {
    (1, 0, 0, 1): (lambda stored: stored, "upright"),
    (-1, 0, 0, 1): (lambda stored: stored[:, ::-1], "mirrored left-right"),
    (-1, 0, 0, -1): (lambda stored: stored[::-1, ::-1], "rotated 180"),
    (1, 0, 0, -1): (lambda stored: stored[::-1], "mirrored top-bottom"),
    (0, 1, 1, 0): (lambda stored: stored.transpose(1, 0, 2), "transposed"),
    (0, 1, -1, 0): (lambda stored: np.rot90(stored, -1), "rotated 90 clockwise"),
    (0, -1, -1, 0): (lambda stored: np.rot90(stored, 2).transpose(1, 0, 2), "transverse"),
    (0, -1, 1, 0): (lambda stored: np.rot90(stored, 1), "rotated 90 counterclockwise"),
}
DECODERS = ["pyav", "decord"]
WIDTH, HEIGHT = 108, 72


def stored(number):
    """A frame that differs from itself in every other orientation."""
    frame = picture(number, WIDTH, HEIGHT)
    frame[: HEIGHT * 2 // 3, : WIDTH // 2] = (30, 60, 220)
    return frame


def fixed(a, b, c, d, x=0, y=0):
    """The nine numbers of a display matrix, in its fixed-point units."""
    return [round(v * 2**16) for v in (a, b)] + [0] + [round(v * 2**16) for v in (c, d)] + [0, x << 16, y << 16, 2**30]


def patch(path, box, offset, matrix):
    """Write a matrix into a box of an MP4 file, as any editor of files would."""
    content = bytearray(Path(path).read_bytes())
    place = content.index(box) + 4 + offset
    assert struct.unpack(">9i", content[place : place + 36]) == tuple(fixed(1, 0, 0, 1))
    content[place : place + 36] = struct.pack(">9i", *matrix)
    Path(path).write_bytes(content)


def write(path, matrix, count=4, **options):
    """A video with a display matrix: in MP4 written into its header by hand, else by FFmpeg."""

    def change(frame):
        return stored(next(frame_numbers))

    def prepare(stream):
        if Path(path).suffix != ".mp4":
            stream.set_display_matrix(fixed(*matrix))

    frame_numbers = iter(range(count))
    options = {"prepare": prepare} | options
    write_video(path, WIDTH, HEIGHT, count=count, change=change, **options)
    if Path(path).suffix == ".mp4":
        patch(path, b"tkhd", 40, fixed(*matrix))
    return str(path)


def assert_same(actual, expected, tolerance=10):
    """Equal but for compression; the parts of a frame that an orientation moves differ by more than 25 on average."""
    actual, expected = np.asarray(actual).astype(int), np.asarray(expected).astype(int)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).mean() < tolerance


def test_the_frames_of_these_tests_tell_the_orientations_apart():
    for number in range(4):
        shown = [turn(stored(number)).astype(int) for turn, _ in EIGHT.values()]
        for i, one in enumerate(shown):
            for other in shown[:i]:
                assert one.shape != other.shape or np.abs(one - other).mean() > 25


@pytest.mark.parametrize("matrix", EIGHT)
def test_the_eight_are_what_their_matrices_say(matrix):
    a, b, c, d = matrix
    turn, _ = EIGHT[matrix]
    place = {(a * x + c * y, b * x + d * y): (x, y) for x in range(WIDTH) for y in range(HEIGHT)}
    left, top = min(x for x, _ in place), min(y for _, y in place)
    shown = turn(stored(1))
    for (x, y), (from_x, from_y) in place.items():
        assert (shown[y - top, x - left] == stored(1)[from_y, from_x]).all()


@pytest.mark.parametrize("matrix", EIGHT)
@pytest.mark.parametrize("name", ["v.mp4", "v.mov", "v.mkv", "v.webm"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_are_upright(tmp_path, matrix, name, decoder):
    options = {"codec": "libvpx-vp9", "options": {"deadline": "realtime"}} if name == "v.webm" else {}
    video = Video(write(tmp_path / name, matrix, **options), decoder)
    turn, orientation = EIGHT[matrix]
    expected = [turn(stored(i)) for i in range(4)]
    mirrored = matrix[0] * matrix[3] - matrix[1] * matrix[2] < 0  # the determinant
    assert video.info.decoder == ("pyav" if mirrored else decoder)
    assert_same(video.read([0, 1, 2, 3]), expected)
    assert_same(video.read([2]), expected[2:3])
    assert_same(list(video.all_frames()), expected)
    assert video.verify() == expected[0].shape[:2]
    assert video.inspect() == (*expected[0].shape[:2], orientation)
    small = video.read([1, 3], 36)
    assert min(small.shape[1:3]) == 36
    assert_same(small, [frame[::2, ::2] for frame in expected[1::2]], 20)
    np.testing.assert_array_equal([*video.all_frames(36)][1::2], Video(video.uri).read([1, 3], 36))


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4", "mjpeg", "prores", "ffv1", "libvpx", "libsvtav1"])
def test_the_codec_does_not_matter(tmp_path, codec):
    pix_fmt = {"mjpeg": "yuvj420p", "prores": "yuv422p10le"}.get(codec, "yuv420p")
    options = {"libx265": {"x265-params": "log-level=none"}, "libsvtav1": {"preset": "12"}}.get(codec)
    try:
        av.codec.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"FFmpeg here has no {codec}")
    name = "v.mov" if codec in ("prores", "mjpeg") else "v.mkv"
    path = write(tmp_path / name, (0, -1, -1, 0), codec=codec, pix_fmt=pix_fmt, rate=25, options=options)
    for decoder in DECODERS:
        assert_same(Video(path, decoder).read([2]), [EIGHT[0, -1, -1, 0][0](stored(2))])


@pytest.mark.parametrize("matrix", EIGHT)
def test_a_matrix_of_the_whole_movie_counts_too(tmp_path, matrix):
    """The track's is applied first, then that of the movie, which mirrors top and bottom."""
    path = write(tmp_path / "v.mp4", matrix)
    patch(path, b"mvhd", 36, fixed(1, 0, 0, -1))
    for decoder in DECODERS:
        assert_same(Video(path, decoder).read([1]), [EIGHT[matrix][0](stored(1))[::-1]])


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("flip", ["", "horizontal", "vertical"])
@pytest.mark.parametrize("name", ["v.ts", "v.mp4"])
def test_an_orientation_in_the_stream_counts_too(tmp_path, degrees, flip, name):
    """H.264's display orientation: flipped first, then turned counterclockwise (ITU-T H.264, D.2.27)."""
    path = write_oriented(tmp_path / name, degrees, flip)
    flipped = {"": stored(2), "horizontal": stored(2)[:, ::-1], "vertical": stored(2)[::-1]}[flip]
    for decoder in DECODERS:
        video = Video(path, decoder)
        if degrees or flip:  # which decord does not know
            assert video.info.decoder == "pyav"
        assert_same(video.read([2]), [np.rot90(flipped, degrees // 90)])
        assert_same([*video.all_frames()][2], np.rot90(flipped, degrees // 90))


def write_oriented(path, degrees, flip):
    plain, stream_file = path.with_name("plain.ts"), path.with_name("turned.ts")
    write(plain, (1, 0, 0, 1))
    arguments = f"display_orientation=insert:rotate={degrees}" + (f":flip={flip}" if flip else "")
    with av.open(str(plain)) as old, av.open(str(stream_file), "w") as new:
        template = old.streams.video[0]
        stream = new.add_stream_from_template(template)
        bits = av.bitstream.BitStreamFilterContext(f"h264_metadata={arguments}", template)
        for packet in [packet for packet in old.demux(template) if packet.size]:
            for changed in bits.filter(packet):
                changed.stream = stream
                new.mux(changed)
    with av.open(str(stream_file)) as old, av.open(str(path), "w") as new:
        template = old.streams.video[0]
        stream = new.add_stream_from_template(template)
        for packet in [packet for packet in old.demux(template) if packet.size]:
            packet.stream = stream
            new.mux(packet)
    return str(path)


def test_a_video_may_turn_halfway(tmp_path):
    """Its frames get the size of the first."""
    content = b"".join(
        Path(write_oriented(tmp_path / f"{degrees}.ts", degrees, flip)).read_bytes()
        for degrees, flip in ((0, ""), (90, "horizontal"))
    )
    (tmp_path / "v.ts").write_bytes(content)
    video = Video(str(tmp_path / "v.ts"))
    assert video.info.frames == 8
    turned = stored(1)[:, ::-1]
    turned = Image.fromarray(np.rot90(turned, 1)).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
    for frames in (video.read([1, 5]), [*video.all_frames()][1::4]):
        assert_same(frames, [stored(1), np.asarray(turned)], 20)
    assert video.inspect() == (HEIGHT, WIDTH, "upright, transposed")


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        ((0.7071, 0.7071, -0.7071, 0.7071), "other matrix (0.707 0.707; -0.707 0.707), shown as stored"),  # 45 degrees
        ((0.5, 0.866, -0.866, 0.5), "other matrix (0.5 0.866; -0.866 0.5), shown as stored"),  # 60 degrees
        ((1, 0, 0.5, 1), "other matrix (1 0; 0.5 1), shown as stored"),  # a shear
        ((1, 0.5, 0, 1), "other matrix (1 0.5; 0 1), shown as stored"),
        ((0, 0, 0, 0), "other matrix (0 0; 0 0), shown as stored"),
        ((1, 1, 1, 1), "other matrix (1 1; 1 1), shown as stored"),
        ((1, 0, 0, 0), "other matrix (1 0; 0 0), shown as stored"),
    ],
)
@pytest.mark.parametrize("decoder", DECODERS)
def test_any_other_matrix_is_named_and_not_applied(tmp_path, matrix, words, decoder):
    video = Video(write(tmp_path / "v.mp4", matrix), decoder)
    assert_same(video.read([0, 2]), [stored(0), stored(2)])
    assert video.inspect() == (HEIGHT, WIDTH, words)


@pytest.mark.parametrize(
    ("matrix", "like"),
    [
        ((0.99996, 0.0087, -0.0087, 0.99996), (1, 0, 0, 1)),  # half a degree
        ((0.0087, -0.99996, 0.99996, 0.0087), (0, -1, 1, 0)),
        ((2, 0, 0, 2), (1, 0, 0, 1)),
        ((-0.5, 0, 0, 0.5), (-1, 0, 0, 1)),
        ((0, 2, 1, 0), (0, 1, 1, 0)),
    ],
)
def test_scale_and_small_angles_do_not_count(tmp_path, matrix, like):
    turn, orientation = EIGHT[like]
    for decoder in DECODERS:
        video = Video(write(tmp_path / "v.mp4", matrix), decoder)
        assert_same(video.read([3]), [turn(stored(3))])
        assert video.inspect().orientation == orientation


def test_the_place_where_the_matrix_puts_the_picture_does_not_count(tmp_path):
    path = write(tmp_path / "v.mp4", (1, 0, 0, 1))
    patch(path, b"tkhd", 40, fixed(-1, 0, 0, 1, WIDTH, -7))
    assert_same(Video(path).read([3]), [stored(3)[:, ::-1]])


@pytest.mark.parametrize("degrees", [0, 90, 180])
def test_a_rotate_tag_is_no_orientation(tmp_path, degrees):
    """Players ignore it; decord does not."""
    path = tmp_path / "v.mkv"
    write(path, (1, 0, 0, 1), prepare=lambda stream: stream.metadata.update(rotate=str(degrees)))
    for decoder in DECODERS:
        assert_same(Video(str(path), decoder).read([3]), [stored(3)])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".avi", ".mov", ".mkv"])
def test_jpeg_frames_in_a_video_have_the_orientation_of_their_exif_data(tmp_path, orientation, suffix):
    path = str(tmp_path / f"v{suffix}")
    image, data = Image.fromarray(stored(1)), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(data, "JPEG", exif=exif.tobytes(), quality=95)
    with av.open(path, "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        for i in range(3):
            packet = av.Packet(data.getvalue())
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 10), True
            packet.pts = packet.dts = i
            container.mux(packet)
    with av.open(path) as container:
        if orientation == 3 and next(container.decode(video=0)).rotation == 0:
            pytest.skip("FFmpeg reads them since version 8")
    expected = np.asarray(ImageOps.exif_transpose(Image.open(data)))
    assert_same(Video(path).read([1]), [expected])
    assert Video(path).inspect().orientation == [name for _, name in EIGHT.values()][orientation - 1]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_pictures_has_the_same_names(tmp_path, orientation):
    for number in (1, 2):
        image = Image.fromarray(stored(number))
        exif = image.getexif()
        if number == 2:
            exif[0x0112] = orientation
        image.save(tmp_path / f"{number:05d}.jpg", exif=exif.tobytes())
    turn, name = [*EIGHT.values()][orientation - 1]
    video = open_video(f"{tmp_path}/{{:05d}}.jpg", 2)
    assert video.inspect() == (HEIGHT, WIDTH, name if orientation == 1 else f"upright, {name}")
    single = open_video(f"{tmp_path}/00002.jpg", 1)
    assert single.inspect() == (*turn(stored(2)).shape[:2], name)
    assert_same(single.read([0]), [turn(stored(2))])


@pytest.mark.parametrize("matrix", EIGHT)
@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
@pytest.mark.parametrize("short_side", [None, 36])
@pytest.mark.parametrize("interval", [None, 2])
def test_a_packed_video_is_upright(tmp_path, matrix, name, short_side, interval):
    turn, _ = EIGHT[matrix]
    video = Video(write(tmp_path / name, matrix))
    packed = pack(video, short_side, interval)
    expected = [turn(stored(i)) if short_side is None else turn(stored(i))[::2, ::2] for i in range(4)]
    assert (packed["height"], packed["width"]) == expected[0].shape[:2]
    for decoder in DECODERS:
        again = Video("packed", decoder, packed["data"])
        assert_same(again.read(range(4)), expected, 20)
        if short_side is None and interval is None:
            np.testing.assert_array_equal(again.read(range(4)), Video(video.uri, decoder).read(range(4)))
        else:
            assert again.inspect().orientation == "upright"


@pytest.mark.parametrize("matrix", EIGHT)
def test_a_cached_video_is_upright(tmp_path, matrix):
    video = Video(write(tmp_path / "v.mp4", matrix))
    write_cache_file(video, 36, tmp_path / "v.arrow")
    frames = CachedVideo(tmp_path / "v.arrow").read(range(4))
    np.testing.assert_array_equal(frames, video.read(range(4), 36))
    assert_same(frames, [EIGHT[matrix][0](stored(i))[::2, ::2] for i in range(4)], 20)


@pytest.mark.parametrize("matrix", [(1, 0, 0, 1), (-1, 0, 0, 1)])
def test_decoded_frames_do_not_stay_in_memory(tmp_path, matrix):
    """Asking PyAV for the side data of a frame makes a cycle, which only the garbage collector frees."""
    path = write(tmp_path / "v.mp4", matrix, count=30)

    def frames() -> int:
        return sum(type(thing) is av.VideoFrame for thing in gc.get_objects())

    gc.collect()
    before = frames()  # of other tests
    gc.disable()
    try:
        video = Video(path)
        video.read(range(30))
        video.inspect()
        assert frames() <= before + 1  # the last one
    finally:
        gc.enable()
