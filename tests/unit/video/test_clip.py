"""Clips: the right frames and one box for all of them, which depend on seed, epoch, sample and view alone."""

import contextlib
import itertools
import os
from dataclasses import replace

import decord
import numpy as np
import pytest
import torch

from posmlp.config import Config
from posmlp.errors import UserError
from posmlp.video import clip
from posmlp.video.clip import load_clips, resize, views_per_video
from posmlp.video.decode import DecodeError, Video, VideoInfo
from posmlp.video.sampling import Box, dense_indices, random_resized_crop, sample_rng, uniform_indices
from tests.helpers.videos import BITS, number, numbers, picture, scramble, write_video


def make_config(frames=8, seed=0, clips=1, crops=1, **data):
    split = {"path": "unused"}
    return Config.model_validate(
        {
            "name": "t",
            "model": {"frames": frames, "image_size": 32},
            "data": {"train": split, "val": split} | data,
            "train": {"seed": seed, "global_batch": 32 * data.get("repeats", 1)},
            "eval": {"clips": clips, "crops": crops},
        }
    )


def views(video, config=None, *, train=True, epoch=0, sample_id="s", images=None):
    clips, decoder = load_clips(str(video), sample_id, config or make_config(), epoch=epoch, train=train, images=images)
    assert decoder in ("pyav", "decord")
    return clips


# A square video, and the whole of it as a clip: then a clip's frames say their numbers.
WHOLE = {"crop_scale": (1, 1), "crop_ratio": (1, 1)}


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "v.mp4", 160, 120, options={"g": "12", "bf": "2"})


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "v.mp4", 144, 144, options={"g": "12", "bf": "2"})


def test_the_helpers_can_read_a_clip_of_32_pixels(square):
    assert BITS == 9
    frames = Video(square).read(range(40), 37)
    assert numbers(resize(frames, 32, 32)) == list(range(40))


# The published code's test --------------------------------------------------------------------------------------------


def bilinear(frame, height, width):
    """A frame ``[H, W, 3]`` scaled by the rule of linear interpolation between pixel centres, one axis at a time."""
    out = frame.astype(float)
    for axis, size in enumerate((height, width)):
        places = np.clip((np.arange(size) + 0.5) * out.shape[axis] / size - 0.5, 0, out.shape[axis] - 1)
        low = np.floor(places).astype(int)
        high = np.minimum(low + 1, out.shape[axis] - 1)
        share = np.expand_dims(places - low, tuple(a for a in range(3) if a != axis))
        out = out.take(low, axis) * (1 - share) + out.take(high, axis) * share
    return out


@pytest.mark.parametrize(
    ("width", "height", "short_side", "scaled"),
    [(160, 120, 48, (48, 64)), (120, 162, 32, (43, 32)), (160, 120, 140, (140, 186))],
)
def test_short_side_scales_once_and_crops_the_image_size(tmp_path, width, height, short_side, scaled):
    """As the published code: the short side scaled, the long one rounded down, then squares of the model's size."""
    path = write_video(tmp_path / "v.mp4", width, height)
    config = make_config(clips=2, crops=3, short_side=4096)
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"short_side": short_side})})
    found = views(path, config, train=False).astype(int)
    frames = Video(path).read(range(Video(path).info.frames))
    for view, (part, crop) in zip(found, itertools.product(range(2), range(3)), strict=True):
        top, left = ((side - 32 + 1) // 2 for side in scaled)
        if crop != 1:
            top, left = (top, (scaled[1] - 32) * crop // 2) if width > height else ((scaled[0] - 32) * crop // 2, left)
        for i, index in enumerate(uniform_indices(len(frames), 8, None, part, 2)):
            expected = bilinear(frames[index], *scaled)[top : top + 32, left : left + 32]
            assert np.abs(view[i] - expected).max() <= 0.501  # a byte, rounded


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampling": "dense", "stride": 2},
        {"frame_order": "shuffled"},
        {"fps": 5.0},
        {"repeats": 2},
        {"clip_share": (0.5, 1.2), "pace": 0.8},
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_a_training_clip_depends_on_seed_epoch_sample_and_view_alone(video, tmp_path, options, cached):
    options = options | {"cache_dir": str(tmp_path) if cached else None}
    config = make_config(**options)
    first = views(video, config)
    assert first.shape == (views_per_video(config, True), 8, 32, 32, 3)
    assert first.dtype == np.uint8
    assert first.flags.c_contiguous
    others = [
        views(video, make_config(seed=1, **options)),
        views(video, config, epoch=1),
        views(video, config, sample_id="t"),
    ]
    for other in others:
        assert (other[0] != first[0]).any()
    np.testing.assert_array_equal(views(video, config), first)


def test_repeats_are_different_clips_and_the_first_is_the_one_without_repeats(video):
    four = views(video, make_config(repeats=4))
    assert four.shape == (4, 8, 32, 32, 3)
    assert len({one.tobytes() for one in four}) == 4
    np.testing.assert_array_equal(four[:1], views(video))
    np.testing.assert_array_equal(four[:2], views(video, make_config(repeats=2)))


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("short_side", [None, 36, 200])
def test_the_cache_does_not_change_a_clip(video, tmp_path, train, short_side, decoder):
    for options in ({"repeats": 2}, {"sampling": "dense", "stride": 3}, {"fps": 4.0}):
        options = options | {"short_side": short_side}
        plain = views(video, make_config(clips=2, crops=3, decoder=decoder, **options), train=train)
        config = make_config(clips=2, crops=3, cache_dir=str(tmp_path), **options)
        for _ in range(2):
            cached = views(video, config, train=train)
            if decoder == "pyav":
                np.testing.assert_array_equal(cached, plain)
            else:  # decord's conversion to RGB rounds in its own way
                assert np.abs(cached.astype(int) - plain).max() <= 4


def test_uniform_takes_a_frame_of_each_segment(square):
    seen = set()
    for epoch in range(12):
        found = numbers(views(square, make_config(**WHOLE), epoch=epoch)[0])
        assert [n // 5 for n in found] == list(range(8))
        seen |= set(found)
    assert len(seen) > 30


def test_a_clip_share_and_a_pace_change_training_clips_alone(square):
    config = make_config(clip_share=(0.3, 0.4), pace=0.5, **WHOLE)
    found = [numbers(views(square, config, epoch=epoch)[0]) for epoch in range(12)]
    assert max(clip[-1] - clip[0] for clip in found) < 0.4 * 40
    assert max(clip[-1] for clip in found) > 30
    validation = [views(square, one, train=False) for one in (config, make_config(**WHOLE))]
    np.testing.assert_array_equal(*validation)


def test_dense_clips_take_neighbouring_frames(square):
    starts = set()
    for epoch in range(12):
        found = numbers(views(square, make_config(sampling="dense", stride=3, **WHOLE), epoch=epoch)[0])
        assert np.diff(found).tolist() == [3] * 7
        starts.add(found[0])
    assert len(starts) > 4


def test_one_box_crops_the_whole_clip(tmp_path):
    path = write_video(tmp_path / "v.mp4", count=8, change=lambda frame: picture(171, 108, 72))
    config = make_config(crop_scale=(0.2, 0.4), repeats=2)
    one, two = views(path, config).astype(int)
    assert np.abs(one - one[0]).mean() < 4  # a still video stays still
    assert np.abs(two - two[0]).mean() < 4
    assert np.abs(one[0] - two[0]).mean() > 10  # another view has another box
    assert np.abs(one[0] - views(path, config, epoch=1)[0, 0]).mean() > 10


@pytest.mark.parametrize("train", [True, False])
def test_shuffled_frames_are_the_ordered_ones_in_another_order(square, train):
    ordered = views(square, make_config(16, repeats=2, clips=2), train=train)
    shuffled = views(square, make_config(16, repeats=2, clips=2, frame_order="shuffled"), train=train)
    assert len(ordered) == 2
    for one, other in zip(ordered, shuffled, strict=True):
        frames, others = [frame.tobytes() for frame in one], [frame.tobytes() for frame in other]
        assert sorted(frames) == sorted(others)
        assert frames != others


# Validation -----------------------------------------------------------------------------------------------------------


def test_a_validation_clip_is_centred_and_always_the_same(video):
    first = views(video, train=False)
    np.testing.assert_array_equal(views(video, make_config(seed=5), train=False, epoch=5, sample_id="t"), first)
    frames = Video(video).read([2, 7, 12, 17, 22, 27, 32, 37], 37)  # 37: 8/7 of 32, rounded up
    assert frames.shape[1:3] == (37, 49)
    pixels = torch.from_numpy(frames[:, :, 6:43].copy()).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(pixels, (32, 32), mode="bilinear", antialias=True)
    np.testing.assert_array_equal(first[0], expected.permute(0, 2, 3, 1).numpy())


def test_validation_clips_are_spread_over_the_time(square):
    found = [numbers(one) for one in views(square, make_config(4, clips=2), train=False)]
    assert found == [[2, 12, 22, 32], [7, 17, 27, 37]]  # the centres of the two halves of four segments
    dense = views(square, make_config(4, clips=3, sampling="dense", stride=2), train=False)
    assert [numbers(one) for one in dense] == [[0, 2, 4, 6], [17, 19, 21, 23], [33, 35, 37, 39]]
    (middle,) = views(square, make_config(4, sampling="dense", stride=2), train=False)
    assert numbers(middle) == [16, 18, 20, 22]


@pytest.mark.parametrize(("width", "height"), [(200, 64), (64, 200)])
def test_three_crops_cover_the_longer_side_from_end_to_end(tmp_path, width, height):
    ramp = np.arange(200).astype(np.uint8)[:, None] + 20
    frame = np.broadcast_to(ramp, (200, 64))
    frame = np.repeat((frame if height == 200 else frame.T)[..., None], 3, axis=2)
    path = write_video(tmp_path / "v.mp4", width, height, count=8, options={"crf": "5"}, change=lambda _: frame)
    crops = views(path, make_config(crops=3, short_side=64), train=False).astype(float)
    along = crops[:, 0].mean(axis=(2, 3)) if height == 200 else crops[:, 0].mean(axis=(1, 3))
    for shown, start in zip(along, [0, 68, 136], strict=True):
        expected = start + 20 + (np.arange(32) + 0.5) * 2 - 0.5  # the ramp, two pixels to one
        assert np.abs(shown - expected)[1:-1].max() < 3


def test_a_whole_frame_reaches_from_end_to_end(tmp_path):
    frame = np.broadcast_to(np.arange(160, dtype=np.uint8)[None, :, None] + 20, (64, 160, 3))
    path = write_video(tmp_path / "v.mp4", 160, 64, count=8, options={"crf": "5"}, change=lambda _: frame)
    whole = make_config(whole=True, short_side=64)
    along = views(path, whole, train=False).astype(float)[0, 0].mean(axis=(0, 2))
    assert np.abs(along - (20 + (np.arange(32) + 0.5) * 5 - 0.5))[1:-1].max() < 3  # the ramp, five pixels to one
    cut = make_config(short_side=64)
    np.testing.assert_array_equal(views(path, whole), views(path, cut))  # training clips are cut at random all the same


def test_clips_and_crops_are_numbered_crop_first(square, video):
    both = views(video, make_config(clips=2, crops=3), train=False)
    assert len(both) == views_per_video(make_config(clips=2, crops=3), False) == 6
    np.testing.assert_array_equal(both[[1, 4]], views(video, make_config(clips=2), train=False))
    assert len({one.tobytes() for one in both}) == 6
    alike = views(square, make_config(clips=2, crops=3), train=False)  # a square has one crop
    np.testing.assert_array_equal(alike[0], alike[2])


def test_validation_shuffles_each_sample_and_view_in_its_own_fixed_way(square):
    config = make_config(frame_order="shuffled", clips=2)
    first = views(square, config, train=False)
    again = views(square, make_config(seed=3, frame_order="shuffled", clips=2), train=False, epoch=4)
    np.testing.assert_array_equal(again, first)
    assert (views(square, config, train=False, sample_id="t") != first).any()
    orders = [np.argsort(numbers(one)).tolist() for one in first]
    assert orders[0] != orders[1]


# Frame rates ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_rate(tmp_path_factory):
    """The same 4 s at three frame rates."""
    folder = tmp_path_factory.mktemp("rates")
    return {
        fps: write_video(folder / f"{fps}.mp4", 144, 144, count=4 * fps, rate=fps, options={"g": "12", "bf": "2"})
        for fps in (10, 20, 30)
    }


@pytest.mark.parametrize("name", ["v.mkv", "v.mp4", "v.flv"])
def test_times_in_milliseconds_do_not_move_frames(tmp_path, name):
    path = write_video(tmp_path / name, 144, 144, count=90, rate=30, options={"g": "12", "bf": "2"})
    (only,) = views(path, make_config(45, sampling="dense", fps=15.0), train=False)
    assert numbers(only) == list(range(0, 90, 2))


@pytest.mark.parametrize("rate", [10, 20, 30])
def test_clips_of_one_rate_show_the_same_moments_of_videos_of_any(of_rate, rate):
    config = make_config(4, sampling="dense", stride=2, fps=5.0)
    (only,) = views(of_rate[rate], config, train=False)
    # 20 moments, 0.2 s apart; a window of 7 of them in the middle starts at (20 - 7) // 2 = 6, at 1.2 s
    assert numbers(only) == [rate * 12 // 10, rate * 16 // 10, rate * 20 // 10, rate * 24 // 10]


def test_the_videos_own_rate_changes_nothing(of_rate):
    for rate, path in of_rate.items():
        for train in (True, False):
            plain = views(path, make_config(clips=2), train=train)
            np.testing.assert_array_equal(views(path, make_config(clips=2, fps=float(rate)), train=train), plain)


def test_a_higher_rate_repeats_frames(of_rate):
    (only,) = views(of_rate[10], make_config(4, sampling="dense", fps=20.0), train=False)
    # 80 moments, 0.05 s apart; the window of 4 starts at (80 - 4) // 2 = 38
    assert numbers(only) == [19, 19, 20, 20]


def test_a_varying_rate_is_made_even(tmp_path):
    times = [0, 100, 200, 300, 1300, 2300, 3300, 3400, 3500, 3600]  # 10 a second, then one, then 10
    path = write_video(tmp_path / "v.mkv", 144, 144, count=10, times=times, rate=30)
    (only,) = views(path, make_config(4, fps=1.0), train=False)
    # 3.6 s of 9 gaps and one more such gap are 4.0 s: moments 0, 1, 2, 3 s, at which frames 0, 3, 4 and 5 are shown
    assert numbers(only) == [0, 3, 4, 5]


def test_a_frame_folder_has_no_rate(tmp_path):
    from PIL import Image

    for i in range(4):
        Image.fromarray(picture(i, 144, 144)).save(tmp_path / f"{i + 1:05d}.png")
    uri = f"{tmp_path}/{{:05d}}.png"
    (only,) = views(uri, make_config(4), train=False, images=4)
    assert numbers(only) == [0, 1, 2, 3]
    for cache_dir in (None, str(tmp_path / "cache")):
        with pytest.raises(DecodeError, match=r"data\.fps needs frame times"):
            views(uri, make_config(4, fps=5.0, cache_dir=cache_dir), train=False, images=4)


# Decoders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "used"), [("v.mp4", "decord"), ("v.avi", "pyav")])
def test_the_decoder_used_is_returned(tmp_path, name, used):
    path = write_video(tmp_path / name)
    assert load_clips(path, "s", make_config(decoder="decord"), epoch=0, train=True)[1] == used
    assert load_clips(path, "s", make_config(decoder="pyav"), epoch=0, train=True)[1] == "pyav"


def test_a_decoder_that_fails_halfway_is_not_returned(video, monkeypatch):
    @contextlib.contextmanager
    def open_here(uri, images, decoder, timeout_s, span):
        opened = Video(uri, decoder)
        assert opened.info.decoder == "decord"
        yield opened

    def fail(self):
        raise decord.DECORDError("out of luck")

    expected = views(video)
    monkeypatch.setattr(clip, "open_isolated", open_here)
    monkeypatch.setattr(decord.VideoReader, "next", fail)
    clips, decoder = load_clips(video, "s", make_config(decoder="decord"), epoch=0, train=True)
    assert decoder == "pyav"
    np.testing.assert_array_equal(clips, expected)


# Short and bad videos -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("options", [{"sampling": "uniform"}, {"sampling": "dense", "stride": 4}, {"fps": 1.0}])
def test_a_video_shorter_than_the_clip(tmp_path, count, options):
    path = write_video(tmp_path / "v.mp4", 144, 144, count=count)
    for train in (True, False):
        clips = views(path, make_config(16, repeats=2, clips=2, crops=3, **WHOLE, **options), train=train)
        assert clips.shape == (2 if train else 6, 16, 32, 32, 3)
        found = [number(frame) for frame in clips[0]]
        assert found == sorted(found)
        assert set(found) <= set(range(count))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("gone.mp4", lambda path: None, "the file is missing"),
        ("folder.mp4", lambda path: path.mkdir(), "a folder"),
        ("empty.mp4", lambda path: path.touch(), r"empty \(0 bytes\)"),
        ("text.mp4", lambda path: path.write_text("hello\n" * 100), "not a video"),
    ],
)
def test_the_error_of_a_bad_file_has_its_name_and_the_reason(tmp_path, name, make, words, cached):
    path = tmp_path / name
    make(path)
    with pytest.raises(DecodeError, match=words) as caught:
        views(path, make_config(cache_dir=str(tmp_path / "cache") if cached else None))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_failure_leaves_nothing_in_the_cache(tmp_path):
    path = scramble(tmp_path / "v.mp4")
    with pytest.raises(DecodeError, match=r"frame \d+ of 40 does not decode"):
        views(path, make_config(cache_dir=str(tmp_path / "cache")))
    assert not list(tmp_path.glob("cache/*"))


def write_half_and_die(video, short_side, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half a video")
    os.abort()


def test_a_decoder_that_dies_leaves_nothing_in_the_cache(video, tmp_path, monkeypatch):
    monkeypatch.setattr(clip, "write_cache_file", write_half_and_die)
    with pytest.raises(DecodeError, match="crashes the decoder"):
        views(video, make_config(cache_dir=str(tmp_path / "cache")))
    assert not list(tmp_path.glob("cache/*"))


def test_implausible_times_are_refused(video, monkeypatch):
    """A damaged time may claim that a video lasts for years; its frame numbers would not fit in memory."""
    info = Video(video).info
    times = np.append(info.times[:-1], 1e12)
    config = make_config(fps=30)
    with pytest.raises(DecodeError, match="which is implausible"):
        list(clip.choose_views(video, replace(info, times=times), 8, "s", config, 0, True))
    assert len(list(clip.choose_views(video, info, 8, "s", config, 0, True))) == 1


# Views before decoding: which frames, which random numbers, which box -------------------------------------------------


def info_of(frames, rate=None):
    times = None if rate is None else np.arange(frames) / rate
    return VideoInfo(frames=frames, codec="h264", times=times, key_frames=1, decoder="pyav")


def chosen(config, *, frames=20, rate=None, train=True, epoch=3, first_view=0):
    return list(clip.choose_views("v.mp4", info_of(frames, rate), 4, "some/id", config, epoch, train, first_view))


@pytest.mark.parametrize("options", [{}, {"sampling": "dense", "stride": 3}])
def test_a_training_view_has_the_generator_of_its_number(options):
    found = chosen(make_config(seed=7, repeats=3, **options), first_view=2)
    for number_of_view, view in zip((2, 3, 4), found, strict=True):
        rng = sample_rng(7, 3, "some/id", number_of_view)
        indices = dense_indices(20, 4, 3, rng) if options else uniform_indices(20, 4, rng)
        assert view.indices.tolist() == indices.tolist()
        assert view.rng.random() == rng.random()  # the box and the order of the frames are drawn next
        assert (view.crop, view.crops) == (0, 1)
    first = chosen(make_config(seed=7), first_view=0)
    assert [view.indices.tolist() for view in first] == [
        uniform_indices(20, 4, sample_rng(7, 3, "some/id", 0)).tolist()
    ]


def test_the_frames_of_validation_views_by_hand():
    """Of 16 frames: 4 segments of 4, their centres, or the centres of their halves; dense from end to end."""
    assert [view.indices.tolist() for view in chosen(make_config(), frames=16, train=False)] == [[2, 6, 10, 14]]
    two = chosen(make_config(clips=2, crops=3), frames=16, train=False)
    assert [view.indices.tolist() for view in two] == [[1, 5, 9, 13]] * 3 + [[3, 7, 11, 15]] * 3
    assert [(view.crop, view.crops, view.rng) for view in two] == [(crop, 3, None) for crop in (0, 1, 2)] * 2
    dense = chosen(make_config(clips=2, sampling="dense", stride=2), frames=16, train=False)
    assert [view.indices.tolist() for view in dense] == [[0, 2, 4, 6], [9, 11, 13, 15]]


def test_views_of_a_rate_by_hand():
    """20 frames at 20 per second, seen as 10 at 10 per second: every second frame; then the centres of 4 segments."""
    found = chosen(make_config(fps=10), rate=20, train=False)
    assert [view.indices.tolist() for view in found] == [[2, 6, 12, 16]]
    assert chosen(make_config(), rate=20, train=False)[0].indices.tolist() == [2, 7, 12, 17]


def test_more_frames_than_the_limit_are_refused_after_resampling(monkeypatch):
    monkeypatch.setattr(clip, "MAX_FRAMES", 38)  # the last of 20 frames is at 0.95 s
    assert chosen(make_config(fps=40), rate=20, train=False)
    with pytest.raises(DecodeError) as error:
        chosen(make_config(fps=40.1), rate=20, train=False)
    assert str(error.value) == "v.mp4: its frame times span 1 s, which is implausible; repair or remove it"
    with pytest.raises(DecodeError, match="its frame times span 10 s,"):
        chosen(make_config(fps=4), frames=101, rate=10, train=False)


def test_the_box_of_a_view():
    config, view = make_config(crop_scale=(0.3, 0.5), crop_ratio=(0.5, 2)), chosen(make_config(), train=False)[0]
    assert clip.choose_box(30, 50, view, config) == Box(0, 10, 30, 30)
    assert [clip.choose_box(30, 50, replace(view, crop=crop, crops=3), config).left for crop in range(3)] == [0, 10, 20]
    assert clip.choose_box(30, 50, view, make_config(full_frame=True)) == Box(0, 0, 30, 50)
    boxes = [
        clip.choose_box(30, 50, replace(view, rng=np.random.default_rng(5)), settings)
        for settings in (config, make_config(crop_scale=(0.3, 0.5), crop_ratio=(0.5, 2), full_frame=True))
    ]
    assert boxes == [random_resized_crop(30, 50, (0.3, 0.5), (0.5, 2), np.random.default_rng(5))] * 2


def test_the_number_of_views():
    config = make_config(clips=5, crops=3, repeats=2)
    assert (views_per_video(config, True), views_per_video(config, False)) == (2, 15)


def test_frames_of_the_right_size_are_not_touched_and_others_are_averaged():
    frames = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3)).astype(np.uint8)
    assert resize(frames, 6, 6) is frames
    stripes = np.zeros((1, 8, 4, 3), np.uint8)
    stripes[:, ::2] = 200
    small = resize(stripes, 2, 2)
    assert (small.shape, small.dtype) == ((1, 2, 2, 3), np.uint8)
    assert np.abs(small.astype(int) - 100).max() <= 20  # without antialiasing it would be 0 or 200
    wide = np.zeros((1, 4, 8, 3), np.uint8)
    wide[:, :, 4:] = (10, 20, 30)
    # The triangle of 4 pixels to each side of column 6 has 3 of its 3.5 parts in the right half.
    assert resize(wide, 2, 2)[0, 0, 1].tolist() == [round(6 / 7 * value) for value in (10, 20, 30)]


def test_a_full_disk_is_named_with_the_cache_file(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(clip, "open_isolated", full)
    with pytest.raises(UserError, match=r"cache: cannot write decoded videos there \(No space left on device\)"):
        clip.decode_to_cache(tmp_path / "cache" / "v.frames", "v.mp4", None, 32, 60.0)
    assert not list(tmp_path.iterdir())


def test_later_views_of_a_video_are_those_of_its_repeats(square):
    """An epoch that draws a video again goes on with the views after the first."""
    three = views(square, make_config(repeats=3))
    for number_of_view in range(3):
        again, _ = load_clips(str(square), "s", make_config(), epoch=0, train=True, first_view=number_of_view)
        assert np.array_equal(again[0], three[number_of_view])


def test_the_order_of_shuffled_validation_views_stays_the_same(square):
    """Seed 0 and epoch 0, the sample and the number of the view."""
    config = make_config(clips=2, frame_order="shuffled", full_frame=True)
    ordered = views(square, make_config(clips=2, full_frame=True), train=False, epoch=5)
    for number_of_view, clip_of_view in enumerate(views(square, config, train=False, epoch=5)):
        order = sample_rng(0, 0, "s", number_of_view).permutation(8)
        assert numbers(clip_of_view) == [numbers(ordered[number_of_view])[i] for i in order]
