"""The cache of decoded videos: the same pixels, decoded once, and never an incomplete file."""

import os
import subprocess
import sys

import numpy as np
import pytest

from posmlp.config import DataSection, SplitSection
from posmlp.errors import UserError
from posmlp.video import clip
from posmlp.video.cache import CachedVideo, cache_path, write_cache_file
from posmlp.video.clip import open_frames
from posmlp.video.decode import DecodeError, Video, open_video
from tests.helpers.videos import numbers, picture, write_video


def cached(uri, short_side, folder, images=None):
    """All frames, read through the cache."""
    path = cache_path(str(uri), images, short_side, str(folder))
    try:
        video = CachedVideo(path)
    except OSError:
        write_cache_file(open_video(str(uri), images), short_side, path)
        video = CachedVideo(path)
    return video.read(range(video.info.frames))


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "v.mp4", 160, 120, options={"g": "12", "bf": "2"})


@pytest.mark.parametrize("short_side", [None, 50, 500])
@pytest.mark.parametrize("width", [96, 160])
@pytest.mark.parametrize("degrees", [0, 90])
def test_the_cache_gives_the_same_pixels(tmp_path, short_side, width, degrees):
    def turn(stream):
        if degrees:
            stream.set_display_rotation(degrees)

    options = {"g": "6", "bf": "3", "x264-params": "open-gop=1"}
    path = write_video(tmp_path / "v.mp4", width, 72, options=options, prepare=turn)
    file = cache_path(path, None, short_side, str(tmp_path / "cache"))
    write_cache_file(Video(path), short_side, file)
    for indices in ([3, 17, 39], [39], [5, 5, 4], range(40)):
        frames = CachedVideo(file).read(indices)
        assert type(frames) is np.ndarray
        assert frames.flags.writeable
        wanted, back = np.unique(indices, return_inverse=True)
        np.testing.assert_array_equal(frames, Video(path).read(wanted.tolist(), short_side)[back])


def test_the_properties_of_a_video_are_kept(tmp_path):
    times = [0, 10, 50, 51, 400]
    path = write_video(tmp_path / "v.mkv", count=5, options={"bf": "2"}, times=times, rate=30)
    write_cache_file(Video(path), 30, tmp_path / "v.arrow")
    info = CachedVideo(tmp_path / "v.arrow").info
    np.testing.assert_array_equal(info.times, Video(path).info.times)
    assert (info.frames, info.codec, info.fps) == (5, "h264", pytest.approx(10))


def test_a_folder_of_pictures_is_cached_too(tmp_path):
    from PIL import Image

    for i in range(4):
        Image.fromarray(picture(i, 108, 72)).save(tmp_path / f"{i + 1:05d}.png")
    frames = cached(f"{tmp_path}/{{:05d}}.png", 36, tmp_path / "cache", images=4)
    assert numbers(frames) == [0, 1, 2, 3]
    (path,) = (tmp_path / "cache").iterdir()
    assert CachedVideo(path).info.times is None


def test_each_short_side_has_its_own_file(video, tmp_path):
    assert cached(video, 30, tmp_path).shape[1:3] == (30, 40)
    assert cached(video, 20, tmp_path).shape[1:3] == (20, 27)
    assert cached(video, None, tmp_path).shape[1:3] == (120, 160)
    assert [path.suffix for path in tmp_path.iterdir()] == [".arrow"] * 3


def test_a_replaced_video_is_decoded_again(tmp_path):
    path = write_video(tmp_path / "v.mp4")
    old = cached(path, 30, tmp_path / "cache")
    stat = os.stat(path)
    write_video(path, change=lambda frame: 255 - frame)
    new = cached(path, 30, tmp_path / "cache")
    np.testing.assert_array_equal(new, Video(path).read(range(40), 30))
    assert (old != new).any()
    # The same bytes at another time: the time alone makes a new key.
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 5))
    cached(path, 30, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize("left", [0, 4, 60, 5000, -1, -8, -300])
def test_a_cache_file_cut_short_is_written_again(video, tmp_path, left):
    whole = cached(video, 30, tmp_path)
    (path,) = tmp_path.iterdir()
    os.truncate(path, left % path.stat().st_size)
    with pytest.raises(OSError):
        CachedVideo(path)
    np.testing.assert_array_equal(cached(video, 30, tmp_path), whole)
    np.testing.assert_array_equal(CachedVideo(path).read(range(40)), whole)


def test_two_that_write_the_same_file_do_no_harm(video, tmp_path):
    path = cache_path(video, None, 30, str(tmp_path))
    write_cache_file(Video(video), 30, path)
    before = CachedVideo(path)
    write_cache_file(Video(video), 30, path)
    np.testing.assert_array_equal(before.read(range(40)), CachedVideo(path).read(range(40)))
    assert list(tmp_path.iterdir()) == [path]


def test_an_unusable_cache_folder_is_an_error_that_names_the_key(video, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: cannot write .* \(File exists\); see data\.cache_dir"):
        cached(video, 30, tmp_path / "file")


@pytest.mark.parametrize(("uri", "words"), [("gone.mp4", "is missing"), ("memory://b/gone.mp4", "is missing")])
def test_a_missing_video_gives_the_same_error_as_without_the_cache(tmp_path, uri, words):
    with pytest.raises(DecodeError, match=words):
        cached(uri, 30, tmp_path)


def make_data(**options):
    split = SplitSection(path="unused")
    return DataSection(train=split, val=split, **options)


def test_a_video_is_decoded_once(video, tmp_path, monkeypatch):
    data = make_data(cache_dir=str(tmp_path))
    with open_frames(video, None, data, 30) as (opened, read):
        first = read(list(range(40)))
        assert opened.info.frames == 40
    monkeypatch.setattr(clip, "open_isolated", lambda *args, **options: pytest.fail("decoded again"))
    with open_frames(video, None, data, 30) as (_, read):
        np.testing.assert_array_equal(read(list(range(40))), first)


TOGETHER = """
import sys, time
from posmlp.config import DataSection, SplitSection
from posmlp.video import clip

decode = clip.decode_to_cache

def slow(*args):
    print("decoded", flush=True)
    time.sleep(3)
    return decode(*args)

clip.decode_to_cache = slow
split = SplitSection(path="unused")
print("ready", flush=True)
sys.stdin.readline()
with clip.open_frames(sys.argv[1], None, DataSection(train=split, val=split, cache_dir=sys.argv[2]), 30) as (video, _):
    assert video.info.frames == 40
"""


def test_processes_that_want_the_same_video_decode_it_once(video, tmp_path):
    command = [sys.executable, "-c", TOGETHER, video, str(tmp_path)]
    pipe = subprocess.PIPE
    both = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:  # both at once, and each is slow enough for the other to come meanwhile
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(said) == ["", "decoded\n"]
    assert [path.suffix for path in tmp_path.iterdir()] == [".arrow"]


def test_the_error_of_an_unusable_folder_passes_through_the_decoding_process(video, tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"cannot write .* see data\.cache_dir"),
        open_frames(video, None, make_data(cache_dir=str(tmp_path / "file")), 30),
    ):
        pass
