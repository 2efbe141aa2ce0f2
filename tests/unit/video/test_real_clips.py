"""Real files of public projects: each gives the frames of plain sequential decoding, or the right error."""

from pathlib import Path

import numpy as np
import pytest

from posmlp.video.decode import DecodeError, Video
from tests.helpers.videos import by_pyav

FOLDER = Path(__file__).parents[4] / "shared" / "clips"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the folder of real clips is not here")

# Frames, height and width as shown, codec, frames a second, and whether decord may decode it.
GOOD = {
    "awesome movie.mov": (123, 480, 640, "h264", 16.762, True),
    "awesome'movie.mov": (123, 480, 640, "h264", 16.762, True),
    "awesome_widescreen.mov": (72, 180, 320, "h264", 10, True),
    "book.mkv": (109, 480, 640, "h264", 30, True),
    "dmlc_decord__flipping_a_pancake.mkv": (310, 240, 426, "h264", 30, True),
    "dmlc_decord__unordered.mov": (4, 50, 50, "h264", 32, True),
    "file+with+data&streams=works?.mp4": (309, 320, 480, "h264", 30, True),
    "help.mkv": (58, 480, 640, "h264", 30, True),
    "hevc_72px_wide.mp4": (7, 128, 72, "hevc", 24, True),
    "ios9.mov": (14, 1280, 720, "h264", 30, True),  # turned by a quarter
    "milk.mkv": (51, 480, 640, "h264", 29.994, True),
    "no.mkv": (66, 480, 640, "h264", 29.995, True),
    "open-mmlab_mmaction2__demo.mp4": (280, 256, 340, "h264", 28, True),
    "open-mmlab_mmaction2__demo_spatiotemporal_det.mp4": (57, 256, 340, "h264", 6, True),
    "open-mmlab_mmaction2__part_0.mp4": (32, 256, 340, "h264", 29.062, True),
    "open-mmlab_mmaction2__test.avi": (164, 240, 320, "mpeg4", 25, False),  # AVI has no times
    "open-mmlab_mmaction2__test.mp4": (300, 256, 340, "h264", 30, True),
    "open-mmlab_mmaction2__test_video_structuralize.mp4": (300, 240, 426, "h264", 29.97, True),
    "pytorch_torchcodec__av1_video.mkv": (125, 360, 640, "libdav1d", 25, True),
    "pytorch_torchcodec__h264_10bits.mp4": (30, 200, 200, "h264", 30, True),
    "pytorch_torchcodec__h265_video.mp4": (10, 128, 128, "hevc", 10, True),
    "pytorch_torchcodec__nasa_13013.mp4": (390, 270, 480, "h264", 29.97, True),  # its larger video stream
    "sideways movie.mov": (25, 640, 480, "h264", 24.04, True),  # turned by a quarter
    "walk.mkv": (89, 480, 640, "h264", 30.003, True),
    "yes.mkv": (65, 480, 640, "h264", 29.991, True),
}

# What the reason says.
BAD = {
    "broken.mp4": "truncated or corrupt, it cannot be opened",
    "dmlc_decord__corrupted.mp4": "truncated or corrupt, frame 28 of 50 does not decode",
    "empty.flv": "truncated or corrupt, it cannot be opened",
    "weird_aspect.small.mpg": "truncated or corrupt, frame 34 of 36 does not decode",  # ends in the middle of a frame
}


def test_every_file_is_in_one_of_the_tables():
    names = {path.name for path in FOLDER.iterdir() if path.suffix not in (".md", ".txt")}
    assert names <= GOOD.keys() | BAD.keys()


@pytest.mark.parametrize("name", GOOD)
def test_all_frames_are_those_of_plain_decoding(name):
    frames, height, width, codec, fps, by_decord = GOOD[name]
    path = str(FOLDER / name)
    truth = by_pyav(path, video=1 if "nasa" in name else 0)
    assert len(truth) == frames
    video = Video(path)
    assert (video.info.frames, video.info.codec) == (frames, codec)
    assert video.info.fps == pytest.approx(fps, abs=1e-2)
    if (height, width) != truth.shape[1:3]:
        truth = np.rot90(truth, -1, axes=(1, 2))  # phones are turned clockwise
    for number, frame in enumerate(video.all_frames()):
        assert np.array_equal(frame, truth[number]), number
    assert number == frames - 1
    uniform = ((np.arange(8) + 0.5) * frames / 8).astype(int)
    for indices in (np.unique(uniform), [frames - 1], range(frames * 3 // 4, min(frames, frames * 3 // 4 + 8)), [0]):
        got = video.read(list(indices))
        assert got.shape[1:] == (height, width, 3)
        np.testing.assert_array_equal(got, truth[list(indices)])
    decord = Video(path, "decord")
    assert decord.info.decoder == ("decord" if by_decord else "pyav")
    indices = sorted({0, frames // 3, frames // 2, frames - 1})
    got = decord.read(indices).astype(int)
    assert got.shape[1:] == (height, width, 3)
    for index, frame in zip(indices, got, strict=True):  # no frame nearby is nearer; decord's colours differ a little
        nearby = range(max(0, index - 2), min(frames, index + 3))
        distance = {other: np.abs(frame - truth[other]).mean() for other in nearby}
        assert distance[index] <= min(distance.values()) + 0.05
        assert distance[index] < 4


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_for_its_reason(name):
    with pytest.raises(DecodeError, match=BAD[name]):
        Video(str(FOLDER / name)).verify()


def test_the_whole_part_of_a_damaged_video_is_read():
    video = Video(str(FOLDER / "dmlc_decord__corrupted.mp4"))
    np.testing.assert_array_equal(video.read([0, 5, 20]), first_frames("dmlc_decord__corrupted.mp4", 21)[[0, 5, 20]])
    video = Video(str(FOLDER / "weird_aspect.small.mpg"))
    np.testing.assert_array_equal(video.read([0, 30, 33]), first_frames("weird_aspect.small.mpg", 34)[[0, 30, 33]])


def first_frames(name, count):
    import av

    with av.open(str(FOLDER / name)) as container:
        frames = container.decode(video=0)
        return np.stack([next(frames).to_ndarray(format="rgb24") for _ in range(count)])
