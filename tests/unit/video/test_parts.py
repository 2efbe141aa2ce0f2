"""Rows that are parts of videos: a clip never has a frame outside its first and last, wherever it is decoded."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imsave

from pipelines.data.check import MANIFEST
from pipelines.data.loader import decode_rows
from pipelines.data.scan import with_classes
from pipelines.data.shard import SHARD, ShardSettings, pack_videos
from pipelines.training.preflight import list_fingerprint
from posmlp.config import load_recipe
from posmlp.video.cache import cache_path
from posmlp.video.decode import DecodeError, Video, VideoPart, open_video, span_of
from posmlp.video.manifest import ManifestError, read_manifest, read_split
from tests.helpers.videos import number, numbers, picture, write_video

COUNT = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A video of frames 0 to 59, with several key frames; and a folder with images 90 to 139 of the same numbers."""
    folder = tmp_path_factory.mktemp("parts")
    write_video(folder / "a.mp4", count=COUNT, options={"g": "12"})
    write_video(folder / "b.avi", count=COUNT, codec="mpeg4")  # decoded and counted: no times of packets
    (folder / "face").mkdir()
    for i in range(90, 140):
        imsave(folder / "face" / f"img{i}.png", picture(i, 108, 72))
    return folder


@pytest.fixture
def write(folder):
    def write(text, name="list.csv"):
        (folder / name).write_text(text)
        return folder / name

    return write


def problems(path, **options):
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, **options)
    return [problem.removeprefix(f"{path}:") for problem in caught.value.problems]


@given(name=st.sampled_from(["a.mp4", "b.avi"]), data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_part_is_that_part_of_the_whole(folder, name, data):
    first = data.draw(st.integers(0, COUNT - 1))
    last = data.draw(st.none() | st.integers(first, COUNT - 1))
    end = COUNT - 1 if last is None else last
    part, whole = open_video(str(folder / name), span=(first, last)), Video(str(folder / name))
    count = end - first + 1
    assert part.info.frames == count
    np.testing.assert_allclose(part.info.times, whole.info.times[first : end + 1] - whole.info.times[first])
    assert part.info.key_frames == sum(first <= key <= end for key in whole.keys)
    indices = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=5)))
    np.testing.assert_array_equal(part.read(indices, 36), whole.read([first + i for i in indices], 36))
    assert numbers(part.all_frames()) == [*range(first, end + 1)]
    assert numbers(part.frames(indices)) == [first + i for i in indices]
    assert part.inspect() == whole.inspect()
    part.close()
    whole.close()


@pytest.mark.parametrize("span", [(0, COUNT), (COUNT, None), (5, 4), (-1, 3)])
def test_a_part_beyond_the_video_is_named(folder, span):
    with pytest.raises(DecodeError, match=rf"has frames 0 to {COUNT - 1}"):
        VideoPart(Video(str(folder / "a.mp4")), span)


def test_a_list_with_parts_of_videos_and_folders(write, folder):
    path = write(
        "path,label,first_frame,last_frame,subject\n"
        "a.mp4,0,46,50,s1\na.mp4,1,3,,s1\na.mp4,1,,9,s2\nb.avi,0,,,s2\nface,1,100,103,s3\nface,0,,92,s3\n"
    )
    manifest = read_manifest(path)
    rows = manifest.rows.to_pydict()
    ids = ["a.mp4#46-50", "a.mp4#3-", "a.mp4#-9", "b.avi", "face#100-103", "face#-92"]
    assert rows["sample_id"] == ids
    assert rows["first_frame"] == [46, 3, None, None, 100, 90]
    assert rows["last_frame"] == [50, None, 9, None, 103, 92]
    assert rows["frames"] == [None] * 4 + [4, 3]
    assert rows["uri"][4] == str(folder / "face/img{}.png")
    spans = [span_of(row) for row in manifest.rows.to_pylist()]
    assert spans == [(46, 50), (3, None), (0, 9), None, (100, 103), (90, 92)]
    shown = [
        numbers(open_video(r["uri"], r["frames"], span=s).all_frames())
        for r, s in zip(manifest.rows.to_pylist(), spans, strict=True)
    ]
    wanted = [range(46, 51), range(3, COUNT), range(10), range(COUNT), range(100, 104), range(90, 93)]
    assert shown == [[*each] for each in wanted]


def test_a_list_without_parts_is_read_as_ever(write):
    path = write("path,label,subject\na.mp4,0,s1\nb.avi,1,s2\n")
    assert read_manifest(path).rows.column_names == ["sample_id", "uri", "label", "frames"]
    empty = write("path,label,first_frame,last_frame\na.mp4,0,,\nb.avi,1,,\n", "empty.csv")
    assert read_manifest(empty).rows.equals(read_manifest(path).rows)
    assert list_fingerprint(read_manifest(empty)) == list_fingerprint(read_manifest(path))


def test_other_frames_are_another_list(write):
    first, second = (write(f"path,label,last_frame\na.mp4,0,{n}\n", f"{n}.csv") for n in (8, 9))
    assert list_fingerprint(read_manifest(first)) != list_fingerprint(read_manifest(second))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("a.mp4,0,x,9", "first_frame 'x' is not a whole number"),
        ("a.mp4,0,1.5,9", "first_frame 1.5 is not a whole number"),
        ("a.mp4,0,-1,9", "first_frame -1 is not a whole number"),
        ("a.mp4,0,1,99999999999", "last_frame 99999999999 is not a whole number"),
        ("a.mp4,0,9,3", "last_frame 3 is before first_frame 9"),
        ("face,0,89,92", "no image img89.png"),
        ("face,0,138,140", "no image img140.png"),
        ("face,0,200,", "no image img200.png"),
        ("face,0,,50", "no image img90.png"),
        ("gone,0,1,2", "no video file"),
    ],
)
def test_bad_frames_are_problems_with_their_line(write, row, words):
    (problem,) = problems(write(f"path,label,first_frame,last_frame\nb.avi,0,,\n{row}\n"))
    assert problem.startswith("3: ")
    assert words in problem


def test_the_same_part_twice_is_a_problem(write):
    (problem,) = problems(write("path,label,first_frame,last_frame\na.mp4,0,1,2\na.mp4,0,2,3\na.mp4,0,1,2\n"))
    assert problem.startswith("4: path 'a.mp4' is already in line 2")


def test_gaps_and_several_series_are_named(write, folder):
    for name, files in {"gap": ("f1.png", "f2.png", "f4.png"), "two": ("f1.png", "g1.png", "g2.png")}.items():
        (folder / name).mkdir(exist_ok=True)
        for file in files:
            (folder / name / file).touch()
    gap, two = problems(write("path,label\ngap,0\ntwo,0\n"))
    assert "2: no image f3.png" in gap
    assert "where: {path: {not: gap}}" in gap
    assert "2 series of images, f{}.png (1), g{}.png (2)" in two
    rows = read_manifest(write("path,label,last_frame\ngap,0,2\ntwo,0,\n"), template="g{}.png").rows.to_pydict()
    assert rows["frames"] == [2, 2]


def test_a_row_that_is_left_out_needs_no_images(write):
    path = write("path,label,first_frame,last_frame\na.mp4,0,1,2\nface,0,1,2\n")
    assert len(problems(path)) == 1
    assert read_manifest(path, {"path": {"not": "face"}}).rows["sample_id"].to_pylist() == ["a.mp4"]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("sampling", ["uniform", "dense"])
def test_clips_have_frames_of_their_part_only(write, tmp_path, train, cache, sampling):
    path = write("path,label,first_frame,last_frame\na.mp4,0,46,50\na.mp4,0,20,41\nface,1,100,122\nb.avi,1,,7\n")
    overrides = [f"data.train={path}", f"data.val={path}", f"data.sampling={sampling}", "data.repeats=3"]
    overrides += ["model.frames=4", "model.image_size=64", "train.global_batch=6", "data.short_side=72"]
    overrides += ["data.full_frame=true", "data.crop_scale=[1,1]", "data.crop_ratio=[1.5,1.5]"]
    config = load_recipe("demo", [*overrides, f"data.cache_dir={tmp_path / 'cache' if cache else 'null'}"])
    table = read_split(config.data, "train").rows
    columns = decode_rows(table, np.ones(4, bool), config, 0, train)
    assert columns["reason"].tolist() == [""] * 4
    for clips, part in zip(columns["clip"], (range(46, 51), range(20, 42), range(100, 123), range(8)), strict=True):
        shown = {number(frame) for clip in clips for frame in clip}
        assert shown <= set(part)
        assert len(shown) > 1


def test_a_part_has_a_cache_file_of_its_own(folder):
    video = str(folder / "a.mp4")
    paths = {cache_path(video, None, 72, "c", span) for span in (None, (0, None), (0, 4), (1, 4))}
    assert len(paths) == 4
    assert cache_path(str(folder / "face/img{}.png"), 3, 72, "c", (100, 102))  # there is no image 1


def test_packed_parts_hold_nothing_else(write, tmp_path):
    path = write("path,label,first_frame,last_frame\na.mp4,0,46,50\na.mp4,0,10,22\nface,1,100,103\na.mp4,1,59,60\n")
    rows = read_manifest(path).rows.to_pylist()
    packed = [content for _, content in pack_videos(rows, ShardSettings())]
    for content, part in zip(packed, (range(46, 51), range(10, 23), range(100, 104)), strict=False):
        (tmp_path / "packed.mp4").write_bytes(content["data"])
        video = Video(str(tmp_path / "packed.mp4"))
        assert numbers(video.all_frames()) == [*part]
        assert content["num_frames"] == len(part) == video.info.frames
    assert "frames 59 to 60 are wanted" in packed[3]
    assert SHARD.names[:2] == ["sample_id", "label"]


def test_a_parquet_list_keeps_parts(write, tmp_path):
    """The list of good videos that a check writes has the same parts."""
    manifest = read_manifest(write("path,label,first_frame,last_frame\na.mp4,0,46,50\na.mp4,0,10,22\nb.avi,1,,\n"))
    names = [name for name in manifest.rows.column_names if name in MANIFEST.names or name.endswith("_frame")]
    pq.write_table(with_classes(manifest.rows.select(names), manifest.classes), tmp_path / "good.parquet")
    assert read_manifest(tmp_path / "good.parquet", root="/").rows.equals(manifest.rows)


def test_several_lists_may_have_parts_of_one_video(write):
    first = write("path,label,first_frame,last_frame\na.mp4,0,1,5\nb.avi,1,,\n", "first.csv")
    second = write("path,label,first_frame,last_frame\na.mp4,0,6,9\nface,1,,\n", "second.csv")
    config = load_recipe("demo", [f"data.train=[{first}, {second}]", f"data.val={first}"])
    rows = read_split(config.data, "train").rows.to_pydict()
    assert rows["first_frame"] == [1, None, 6, 90]
    third = write("path,label,first_frame,last_frame\na.mp4,0,1,5\n", "third.csv")
    config = load_recipe("demo", [f"data.train=[{first}, {third}]", f"data.val={first}"])
    with pytest.raises(ManifestError, match=r"third.csv: video .*a.mp4 is also in"):
        read_split(config.data, "train")


def test_a_plain_list_after_one_with_parts(write):
    first = write("path,label,last_frame\na.mp4,0,5\n", "first.csv")
    second = write("path,label\nb.avi,0\n", "second.csv")
    config = load_recipe("demo", [f"data.train=[{first}, {second}]", f"data.val={first}"])
    rows = read_split(config.data, "train").rows.to_pydict()
    assert rows["last_frame"] == [5, None]
