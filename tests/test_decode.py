"""Decoding: the frame asked for is the frame delivered, at every width, cached or not; failures say what is wrong."""

import os
import pickle

import av
import numpy as np
import pytest
import torch

from posmlp.config import DataSection, SplitSection
from posmlp.errors import UserError
from posmlp.video import decode
from posmlp.video.decode import DecodeError, cached_frames, load_clip, read_frames

BITS = 6  # frame numbers below 64


def picture(number, width, height):
    """A frame that says its number: six vertical bars, white for a set bit; the lower half tells top from bottom."""
    frame = np.full((height, width, 3), 40, np.uint8)
    for bit, columns in enumerate(np.array_split(np.arange(width), BITS)):
        frame[:, columns] = 220 if number >> bit & 1 else 30
    frame[height * 3 // 4 :] = (200, 60, 40)
    return frame


def number(frame):
    """The number that a decoded frame says."""
    height, width = frame.shape[:2]
    places = [(2 * bit + 1) * width // (2 * BITS) for bit in range(BITS)]
    return sum(1 << bit for bit, x in enumerate(places) if frame[height // 3, x].mean() > 125)


def write_video(
    path, width=96, height=72, count=40, codec="libx264", options=None, change=lambda frame: frame, muxer=None
):
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=10, options=options or {})
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv420p"
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(change(picture(i, width, height)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def noisy(frame):
    """Noise makes the frames most of the file, so that damage hits them and not the header."""
    return np.where(np.random.default_rng(0).random(frame.shape) < 0.5, frame, frame // 2 + 60).astype(np.uint8)


def by_pyav(path):
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def take(*indices):
    return lambda num_frames: np.array(indices)


def every(num_frames):
    return np.arange(num_frames)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "v.mp4", 160, 120)


def make_data(**options):
    split = SplitSection(path="unused")
    return DataSection(train=split, val=split, **options)


# Frames ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [8, 10, 16, 32, 48, 64, 72, 96, 100, 144, 320])
@pytest.mark.parametrize("height", [64, 130])
def test_native_pixels_are_those_of_another_decoder(tmp_path, width, height):
    path = write_video(tmp_path / "v.mp4", width, height, count=5)
    frames = read_frames(path, take(1, 3), None)
    assert frames.shape == (2, height, width, 3)
    assert frames.dtype == np.uint8
    assert np.abs(frames.astype(int) - by_pyav(path)[[1, 3]]).max() <= 2


# Open GOPs (the second line, and MPEG-4 with B-frames) make seeking inexact.
@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("v.mp4", "libx264", {"g": "12", "bf": "2"}),
        ("v.mp4", "libx264", {"g": "6", "bf": "3", "x264-params": "open-gop=1"}),
        ("v.avi", "mpeg4", {"g": "8"}),
        ("v.mkv", "libx264", {}),
        ("v.webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    ],
)
@pytest.mark.parametrize("indices", [[0, 13, 26, 39], [39], [5, 5, 4, 30, 0], list(range(17, 33))])
def test_the_frame_asked_for_is_the_frame_delivered(tmp_path, name, codec, options, indices):
    path = write_video(tmp_path / name, codec=codec, options=options)
    frames = read_frames(path, take(*indices), 60)
    assert [number(frame) for frame in frames] == indices


def test_choose_is_told_the_number_of_frames(video):
    told = []

    def choose(num_frames):
        told.append(num_frames)
        return np.array([0])

    read_frames(video, choose, 32)
    assert told == [40]


def test_the_short_side_is_met_and_the_aspect_kept(tmp_path):
    for width, height in [(160, 120), (96, 200), (100, 64), (320, 180)]:
        path = write_video(tmp_path / "v.mp4", width, height, count=2)
        h, w = read_frames(path, take(0), 37).shape[1:3]
        assert min(h, w) == 37
        assert abs(max(h, w) - 37 * max(width, height) / min(width, height)) <= 0.5


@pytest.mark.parametrize("short_side", [None, 120, 500])
def test_frames_are_never_upscaled(video, short_side):
    frames = read_frames(video, take(7), short_side)
    assert frames.shape == (1, 120, 160, 3)
    assert number(frames[0]) == 7


def test_scaling_keeps_everything_in_its_place(video):
    small = read_frames(video, take(9), 30)[0].astype(int)
    means = read_frames(video, take(9), None)[0].reshape(30, 4, 40, 4, 3).mean((1, 3))
    assert np.abs(small - means).mean() < 6  # a frame moved by one pixel, or turned over, is far above


def test_scaling_is_antialiased(tmp_path):
    def stripes(frame):
        return np.where(np.arange(160)[None, :, None] % 2, 220, 30).astype(np.uint8).repeat(120, 0).repeat(3, 2)

    path = write_video(tmp_path / "v.mp4", 160, 120, count=2, change=stripes)
    assert read_frames(path, take(0), None).std() > 80
    assert read_frames(path, take(0), 40).std() < 20  # grey; every third pixel would be stripes again


@pytest.mark.parametrize("indices", [[], [40], [-1], [[1, 2]]])
def test_frames_outside_the_video_are_refused(video, tmp_path, indices):
    with pytest.raises(ValueError, match="video of 40"):
        read_frames(video, take(*indices), 30)
    with pytest.raises(ValueError, match="video of 40"):
        cached_frames(video, take(*indices), 30, tmp_path)


def test_a_name_is_never_taken_for_a_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:b.mp4", "-v.mp4", "what? #1 %d & 'so'.mp4"):
        os.rename(write_video(tmp_path / "v.mp4", count=3), name)
        assert number(read_frames(name, take(2), None)[0]) == 2


# Cache ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("short_side", [None, 50])
@pytest.mark.parametrize("width", [96, 160])
def test_the_cache_gives_the_same_pixels(tmp_path, short_side, width):
    path = write_video(tmp_path / "v.mp4", width, 72, options={"g": "6", "bf": "3", "x264-params": "open-gop=1"})
    choose = take(3, 3, 39, 17)
    plain = read_frames(path, choose, short_side)
    for _ in range(2):
        cached = cached_frames(path, choose, short_side, tmp_path / "cache")
        assert type(cached) is np.ndarray
        assert cached.flags.writeable
        np.testing.assert_array_equal(cached, plain)


def test_a_video_is_decoded_once(video, tmp_path, monkeypatch):
    first = cached_frames(video, every, 30, tmp_path)
    monkeypatch.setattr(decode, "_open", lambda uri: pytest.fail("decoded again"))
    np.testing.assert_array_equal(cached_frames(video, every, 30, tmp_path), first)
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]


def test_the_cache_keeps_sizes_apart(video, tmp_path):
    assert cached_frames(video, every, 30, tmp_path).shape[1] == 30
    assert cached_frames(video, every, 20, tmp_path).shape[1] == 20


def test_a_replaced_video_is_decoded_anew(tmp_path):
    path = write_video(tmp_path / "v.mp4")
    old = cached_frames(path, take(5), 30, tmp_path / "cache")
    stat = os.stat(path)
    write_video(path, change=lambda frame: 255 - frame)
    new = cached_frames(path, take(5), 30, tmp_path / "cache")
    np.testing.assert_array_equal(new, read_frames(path, take(5), 30))
    assert (old != new).any()
    # The same bytes at another time: the time alone makes a new key.
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 5))
    cached_frames(path, take(5), 30, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize("left", [0, 60, 5000])
def test_a_cache_file_cut_short_is_written_again(video, tmp_path, left):
    whole = cached_frames(video, every, 30, tmp_path)
    (path,) = tmp_path.iterdir()
    os.truncate(path, left)
    np.testing.assert_array_equal(cached_frames(video, every, 30, tmp_path), whole)
    np.testing.assert_array_equal(np.load(path), whole)


def test_a_failure_leaves_nothing_in_the_cache(tmp_path):
    path = tmp_path / "v.mp4"
    scramble(path)
    with pytest.raises(DecodeError, match="not all of its 40 frames"):
        cached_frames(str(path), every, 30, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_an_unusable_cache_folder_is_told_plainly(video, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: cannot write .* \(File exists\); see data\.cache_dir"):
        cached_frames(video, every, 30, tmp_path / "file")


# Clips ----------------------------------------------------------------------------------------------------------------


def clip(video, data, *, sample_id="s", seed=0, epoch=0, view=0, train=True, frames=8):
    return load_clip(video, sample_id, data, frames=frames, size=32, seed=seed, epoch=epoch, view=view, train=train)


@pytest.mark.parametrize("options", [{}, {"sampling": "dense", "stride": 2}, {"frame_order": "shuffled"}])
@pytest.mark.parametrize("cached", [False, True])
def test_a_training_clip_depends_on_seed_epoch_sample_and_view_alone(video, tmp_path, options, cached):
    data = make_data(**options, cache_dir=str(tmp_path) if cached else None)
    first = clip(video, data)
    assert first.shape == (8, 32, 32, 3)
    assert first.dtype == np.uint8
    assert first.flags.c_contiguous
    others = [
        clip(video, data, **{key: value}) for key, value in [("seed", 1), ("epoch", 1), ("sample_id", "t"), ("view", 1)]
    ]
    for other in others:
        assert (other != first).any()
    np.testing.assert_array_equal(clip(video, data), first)


def test_the_cache_does_not_change_a_clip(video, tmp_path):
    for train in (True, False):
        np.testing.assert_array_equal(
            clip(video, make_data(), train=train), clip(video, make_data(cache_dir=str(tmp_path)), train=train)
        )


def test_a_validation_clip_is_centred_and_always_the_same(video):
    first = clip(video, make_data(), train=False)
    np.testing.assert_array_equal(clip(video, make_data(), train=False, seed=5, epoch=5), first)
    frames = read_frames(video, take(2, 7, 12, 17, 22, 27, 32, 37), 37)  # 37: 8/7 of 32, rounded up
    pixels = torch.from_numpy(frames[:, :, 6:43].copy()).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(pixels, (32, 32), mode="bilinear", antialias=True)
    np.testing.assert_array_equal(first, expected.permute(0, 2, 3, 1).numpy())


def test_dense_clips_take_neighbouring_frames(video):
    data = make_data(sampling="dense", stride=3, short_side=120, crop_scale=(1, 1), crop_ratio=(4 / 3, 4 / 3))
    numbers = [number(frame) for frame in clip(video, data)]
    assert np.diff(numbers).tolist() == [3] * 7


def test_one_box_crops_the_whole_clip(tmp_path):
    path = write_video(tmp_path / "v.mp4", count=8, change=lambda frame: picture(21, 96, 72))
    frames = clip(path, make_data(crop_scale=(0.2, 0.4))).astype(int)
    assert np.abs(frames - frames[0]).mean() < 4  # a still video stays still
    assert np.abs(frames[0] - clip(path, make_data(crop_scale=(0.2, 0.4)), epoch=1)[0]).mean() > 10


@pytest.mark.parametrize("train", [True, False])
def test_shuffled_frames_are_the_ordered_ones_in_another_order(video, train):
    ordered = clip(video, make_data(), train=train, frames=16)
    shuffled = clip(video, make_data(frame_order="shuffled"), train=train, frames=16)
    key = [frame.tobytes() for frame in ordered]
    other = [frame.tobytes() for frame in shuffled]
    assert sorted(key) == sorted(other)
    assert key != other


def test_validation_shuffles_each_sample_in_its_own_fixed_way(video):
    data = make_data(frame_order="shuffled")
    first = clip(video, data, train=False)
    np.testing.assert_array_equal(clip(video, data, train=False, seed=3, epoch=4), first)
    assert (clip(video, data, train=False, sample_id="t") != first).any()


def test_a_video_shorter_than_the_clip(tmp_path):
    path = write_video(tmp_path / "v.mp4", count=3)
    for sampling in ("uniform", "dense"):
        for train in (True, False):
            assert clip(path, make_data(sampling=sampling), train=train, frames=16).shape == (16, 32, 32, 3)


# Failures -------------------------------------------------------------------------------------------------------------


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def truncate(path):
    write_video(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])  # the index stands at the end: lost


def scramble(path):
    """Noise from the middle of the file on; the index stands at the front and stays whole."""
    write_video(path, change=noisy, muxer={"movflags": "faststart"})
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = np.random.default_rng(0).bytes(len(content) - len(content) // 2)
    path.write_bytes(content)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("gone.mp4", lambda path: None, "the file is missing"),
        ("folder.mp4", lambda path: path.mkdir(), "a folder"),
        ("empty.mp4", lambda path: path.touch(), r"empty \(0 bytes\)"),
        ("text.mp4", lambda path: path.write_text("hello\n" * 100), "not a video"),
        ("noise.mp4", lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "not a video"),
        ("sound.m4a", write_sound, "no video stream"),
        ("half.mp4", truncate, "truncated or corrupt"),
        ("noisy.mp4", scramble, "not all of its 40 frames"),
        ("header.mkv", lambda path: path.write_bytes(b"\x1aE\xdf\xa3" + bytes(50)), "truncated or corrupt"),
    ],
)
def test_a_bad_file_is_told_by_name_and_reason(tmp_path, name, make, words, cached):
    path = tmp_path / name
    make(path)
    data = make_data(cache_dir=str(tmp_path / "cache") if cached else None)
    with pytest.raises(DecodeError, match=words) as caught:
        clip(str(path), data, frames=16)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))  # it may cross process borders
    assert (again.uri, again.reason) == (str(path), caught.value.reason)
