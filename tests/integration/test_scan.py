"""Checking and packing whole data sets: every video is in the report, and shards are the same however they came."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from matplotlib.image import imsave

from pipelines.data.check import check, format_summary
from pipelines.data.scan import ScanError
from pipelines.data.shard import ShardSettings, rows_digest, shard
from posmlp import storage
from posmlp.video.decode import Video
from posmlp.video.manifest import Manifest, read_manifest
from tests.helpers.log_lines import log_lines
from tests.helpers.videos import numbers, picture, write_video

pytestmark = pytest.mark.ray


@pytest.fixture
def mixed(motion_set, tmp_path):
    """A list of good videos with a damaged one, one that is text and one that is gone among them."""
    good = read_manifest(motion_set / "val.csv").rows["uri"].to_pylist()[:6]
    content = Path(good[0]).read_bytes()
    (tmp_path / "half.mp4").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.mp4").write_text("not a video at all\n" * 20)
    half, gone, text = (f"{tmp_path}/{name}.mp4" for name in ("half", "gone", "text"))
    names = [*good[:3], half, gone, *good[3:], text]
    path = tmp_path / "list.csv"
    path.write_text("path,label,class\n" + "".join(f"{n},{i % 2},{'ab'[i % 2]}\n" for i, n in enumerate(names)))
    return path


def test_a_check_has_a_row_for_every_video(local_ray, mixed, tmp_path):
    manifest = read_manifest(mixed, root="/", missing_ok=True)
    result = check(manifest, str(tmp_path / "out"), 60)
    report = pq.read_table(tmp_path / "out" / "report.parquet")
    assert report.equals(result.report)
    assert report["sample_id"].to_pylist() == manifest.rows["sample_id"].to_pylist()
    bad = {Path(row["uri"]).name: row["reason"] for row in report.to_pylist() if not row["good"]}
    assert set(bad) == {"half.mp4", "gone.mp4", "text.mp4"}
    assert "fetch it again" in bad["half.mp4"]
    assert "missing" in bad["gone.mp4"]
    assert "not a video" in bad["text.mp4"]
    for row in report.to_pylist():
        if row["good"]:
            with av.open(row["uri"]) as container:
                frames = [*container.decode(video=0)]
            assert (row["num_frames"], row["height"], row["width"]) == (len(frames), 32, 32)
            assert row["fps"] == pytest.approx(12)
            assert row["codec"] == "h264"
            assert row["key_frames"] == sum(frame.key_frame for frame in frames)
            assert row["decord_agrees"]
            assert row["orientation"] == "upright"
            assert (row["stream"], row["video_streams"], row["stream_choice"]) == (0, 1, "only one")
        else:
            assert row["orientation"] is row["stream"] is row["stream_choice"] is None
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert summary == result.summary
    assert "9 videos of 2 classes: 6 good, 3 bad" in summary
    assert all(name in summary for name in bad)
    assert "orientation" not in summary
    assert "several video streams" not in summary


def test_parts_of_videos_are_checked_and_packed_as_videos(local_ray, tmp_path):
    write_video(tmp_path / "a.mp4", count=60, options={"g": "12"})
    (tmp_path / "face").mkdir()
    for i in (*range(90, 110), *range(120, 125)):
        imsave(tmp_path / "face" / f"img{i}.png", picture(i, 108, 72))
    listed = "path,label,first_frame,last_frame\na.mp4,0,46,50\na.mp4,1,5,20\na.mp4,1,50,60\n"
    (tmp_path / "list.csv").write_text(listed)
    result = check(read_manifest(tmp_path / "list.csv", missing_ok=True), str(tmp_path / "out"), 60)
    assert result.report["num_frames"].to_pylist() == [5, 16, None]
    assert "frames 50 to 60 are wanted (first_frame, last_frame), but it has frames 0 to 59" in result.summary
    good = read_manifest(tmp_path / "out/good.parquet", root=tmp_path)
    assert good.rows["first_frame"].to_pylist() == [46, 5]
    (tmp_path / "list.csv").write_text(f"{listed}face,0,100,104\nface,1,100,122\n")
    result = check(read_manifest(tmp_path / "list.csv", missing_ok=True), str(tmp_path / "out"), 60)
    assert result.report["good"].to_pylist() == [True, True, False, True, False]
    assert "img110.png: the file is missing" in result.summary
    manifest = read_manifest(tmp_path / "list.csv", {"last_frame": {"not": "122"}})
    packed = shard(manifest, str(tmp_path / "shards"), ShardSettings())
    assert (packed.videos, packed.bad) == (3, 1)
    rows = read_manifest(packed.manifest).rows
    shown = []
    for uri in rows["uri"].to_pylist():
        video = Video(uri)
        shown.append(numbers(video.all_frames()))
        video.close()
    assert shown == [[*range(46, 51)], [*range(5, 21)], [*range(100, 105)]]


def matrix(a, b, c, d):
    """Make a display matrix, in its fixed-point units."""
    return [round(value * 2**16) for value in (a, b, 0, c, d, 0, 0, 0, 2**14)]


@pytest.fixture
def odd(tmp_path):
    """A list of a mirrored video, one that is turned on its side, one that is sheared, and one with two streams."""
    matrices = {"mirrored": (-1, 0, 0, 1), "turned": (0, 1, -1, 0), "sheared": (1, 0.5, 0, 1)}
    for name, values in matrices.items():
        path = tmp_path / f"{name}.mp4"
        write_video(path, count=4, prepare=lambda stream, values=values: stream.set_display_matrix(matrix(*values)))
    with av.open(str(tmp_path / "angles.mkv"), "w") as container:
        streams = [container.add_stream("mpeg4", rate=10, options={"threads": "1"}) for _ in range(2)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 108, 72, "yuv420p"
        streams[0].disposition, streams[1].disposition = 0, av.stream.Disposition.default
        for first, stream in zip((200, 0), streams, strict=True):
            for i in range(4):
                frame = av.VideoFrame.from_ndarray(picture(first + i, 108, 72), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    names = [*(f"{name}.mp4" for name in matrices), "angles.mkv"]
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"{name},0\n" for name in names))
    return tmp_path / "list.csv"


def test_a_report_names_the_orientation_and_the_stream(local_ray, odd, tmp_path):
    result = check(read_manifest(odd), str(tmp_path / "out"), 60)
    rows = {Path(row["uri"]).stem: row for row in result.report.to_pylist()}
    assert all(row["good"] for row in rows.values())
    sheared = "other matrix (1 0.5; 0 1), shown as stored"
    orientations = ["mirrored left-right", "rotated 90 clockwise", sheared, "upright"]
    assert [row["orientation"] for row in rows.values()] == orientations
    assert [(row["height"], row["width"]) for row in rows.values()] == [(72, 108), (108, 72), (72, 108), (72, 108)]
    assert (rows["angles"]["stream"], rows["angles"]["video_streams"]) == (1, 2)
    assert [row["stream_choice"] for row in rows.values()] == ["only one"] * 3 + ["default flag"]
    counts = ", ".join(f"{name} 1" for name in orientations[:3])
    assert f"stored otherwise than upright: {counts}\n" in result.summary
    assert "1 with several video streams, decoded by: default flag 1" in result.summary
    assert "data.decoder=decord leaves 2 of them to PyAV" in result.summary
    assert pq.read_table(tmp_path / "out" / "report.parquet").equals(result.report)


@pytest.mark.parametrize("settings", [{}, {"keyframe_interval": 2}])
def test_shards_are_upright_and_of_the_right_stream(local_ray, odd, tmp_path, settings):
    result = shard(read_manifest(odd), str(tmp_path / "out"), ShardSettings(**settings))
    stored = picture(2, 108, 72)
    expected = [stored[:, ::-1], np.rot90(stored, -1), stored, stored]
    rows = pq.read_table(result.manifest).to_pylist()
    uris = read_manifest(result.manifest).rows["uri"].to_pylist()
    for uri, row, frame in zip(uris, rows, expected, strict=True):
        assert (row["height"], row["width"]) == frame.shape[:2]
        for decoder in ("pyav", "decord"):
            shown = Video(uri, decoder).read([2])[0].astype(int)
            assert shown.shape == frame.shape
            assert np.abs(shown - frame).mean() < 12


def test_the_good_ones_are_a_list_to_train_on(local_ray, mixed, tmp_path):
    manifest = read_manifest(mixed, root="/", missing_ok=True)
    result = check(manifest, str(tmp_path / "out"), 60)
    good = read_manifest(tmp_path / "out" / "good.parquet", root=manifest.root)
    assert good.classes == ("a", "b")
    expected = result.report.filter(result.report["good"])
    assert good.rows["uri"].to_pylist() == expected["uri"].to_pylist()
    assert good.rows["label"].to_pylist() == expected["label"].to_pylist()


def test_a_summary_of_nothing_good_names_the_classes(local_ray, tmp_path):
    (tmp_path / "list.csv").write_text("path,label\ngone.mp4,walk\n")
    result = check(read_manifest(tmp_path / "list.csv", missing_ok=True), str(tmp_path / "out"), 60)
    assert result.bad == 1
    assert "0 good, 1 bad" in result.summary
    assert "classes without a good video: walk" in format_summary(result.report, ("walk",), 1.0)


def contents(out):
    return {path.relative_to(out): path.read_bytes() for path in sorted(Path(out).rglob("*")) if path.is_file()}


@pytest.mark.parametrize("settings", [{}, {"short_side": 16, "keyframe_interval": 4}])
def test_shards_hold_the_videos(local_ray, motion_set, tmp_path, settings):
    manifest = read_manifest(motion_set / "val.csv")
    result = shard(manifest, str(tmp_path / "out"), ShardSettings(rows_per_shard=6, **settings))
    assert (result.videos, result.bad, result.shards) == (16, 0, 3)
    packed = read_manifest(result.manifest)
    assert packed.classes == manifest.classes
    assert packed.rows["sample_id"].equals(manifest.rows["sample_id"])
    assert packed.rows["label"].equals(manifest.rows["label"])
    facts = pq.read_table(result.manifest).to_pylist()
    for before, after, fact in zip(manifest.rows.to_pylist(), packed.rows.to_pylist(), facts, strict=True):
        old, new = Video(before["uri"]), Video(after["uri"])
        assert new.info.frames == old.info.frames == fact["num_frames"]
        assert np.allclose(new.info.times, old.info.times, atol=1e-4)
        everything = range(old.info.frames)
        if not settings:
            assert storage.read_bytes(after["uri"]) == Path(before["uri"]).read_bytes()
        else:
            assert new.info.key_frames == -(-old.info.frames // 4)
            a, b = old.read(everything, 16).astype(int), new.read(everything).astype(int)
            assert b.shape[1:] == (16, 16, 3) == (fact["height"], fact["width"], 3)
            assert np.abs(a - b).mean() < 9  # colours are at half the resolution
        old.close()
        new.close()


def test_the_same_list_gives_the_same_shards(local_ray, motion_set, tmp_path):
    manifest = read_manifest(motion_set / "val.csv")
    settings = ShardSettings(rows_per_shard=5, short_side=24)
    for name in ("one", "two"):
        shard(manifest, str(tmp_path / name), settings)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_video_is_read_without_its_neighbours(local_ray, motion_set, tmp_path):
    result = shard(read_manifest(motion_set / "val.csv"), str(tmp_path / "out"), ShardSettings())
    file = pq.ParquetFile(tmp_path / "out" / "shards" / "00000.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [1] * 16
    assert result.bytes == (tmp_path / "out" / "shards" / "00000.parquet").stat().st_size


def test_bad_videos_are_reported_and_not_packed(local_ray, mixed, tmp_path):
    manifest = read_manifest(mixed, root="/", missing_ok=True)
    result = shard(manifest, str(tmp_path / "out"), ShardSettings(rows_per_shard=4))
    assert (result.videos, result.bad) == (6, 3)
    bad = pq.read_table(tmp_path / "out" / "bad.parquet").to_pylist()
    assert [Path(row["uri"]).name for row in bad] == ["half.mp4", "gone.mp4", "text.mp4"]
    assert all(row["reason"] for row in bad)
    assert len(read_manifest(result.manifest).rows) == 6


def test_another_list_or_setting_is_refused(local_ray, motion_set, tmp_path):
    manifest = read_manifest(motion_set / "val.csv")
    out = str(tmp_path / "out")
    shard(manifest, out, ShardSettings())
    before = contents(out)
    with pytest.raises(ScanError, match=r"short_side: None in the folder, 16 now"):
        shard(manifest, out, ShardSettings(short_side=16))
    other = Manifest(manifest.rows.slice(1), manifest.classes)
    with pytest.raises(ScanError, match="choose another --out"):
        shard(other, out, ShardSettings())
    assert rows_digest(other) != rows_digest(manifest)
    shard(manifest, out, ShardSettings())
    assert contents(out) == before


@pytest.mark.slow
def test_a_killed_call_goes_on_to_the_same_shards(local_ray, motion_set, tmp_path):
    """Killed with its workers in mid-shard: what is there is whole, and the next call makes the rest."""
    options = ["--rows-per-shard", "2", "--short-side", "24"]
    command = [sys.executable, "-m", "pipelines.cli", "data", "shard", str(motion_set / "train.csv"), *options]
    env = os.environ | {"RAY_ADDRESS": local_ray.get_runtime_context().gcs_address}
    process = subprocess.Popen([*command, "--out", str(tmp_path / "killed")], env=env, stderr=subprocess.DEVNULL)
    folder = tmp_path / "killed" / "shards"
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*.parquet"))) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(20):  # tasks that still run may end
        for path in folder.glob("*.parquet"):
            assert pq.ParquetFile(path).num_row_groups == 2
        time.sleep(0.05)
    there = {path: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert not (tmp_path / "killed" / "manifest.parquet").exists()

    manifest = read_manifest(motion_set / "train.csv")
    settings = ShardSettings(rows_per_shard=2, short_side=24)
    with log_lines() as lines:
        shard(manifest, str(tmp_path / "killed"), settings)
    assert any("shards exist already" in line for line in lines)
    assert {path: path.stat().st_mtime_ns for path in there} == there  # not made again
    shard(manifest, str(tmp_path / "straight"), settings)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


def test_frame_folders_become_videos(local_ray, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    for number in range(1, 6):
        folder = tmp_path / "17"
        folder.mkdir(exist_ok=True)
        codec = av.CodecContext.create("mjpeg", "w")
        codec.width, codec.height, codec.pix_fmt, codec.time_base = 48, 48, "yuvj420p", 1
        frame = av.VideoFrame.from_ndarray(np.roll(pixels, number * 16, 1), format="rgb24").reformat(format="yuvj420p")
        (packet,) = [*codec.encode(frame), *codec.encode(None)]
        (folder / f"{number:05d}.jpg").write_bytes(bytes(packet))
    (tmp_path / "list.txt").write_text("17 5 0\n")
    manifest = read_manifest(tmp_path / "list.txt", format="ssv1")
    result = shard(manifest, str(tmp_path / "out"), ShardSettings(keyframe_interval=2))
    packed = read_manifest(result.manifest).rows.to_pylist()
    assert packed[0]["frames"] is None
    video = Video(packed[0]["uri"])
    assert (video.info.frames, video.info.key_frames) == (5, 3)
    assert video.info.fps == pytest.approx(12)
    for number, frame in enumerate(video.read(range(5)), start=1):
        assert np.abs(frame.astype(int) - np.roll(pixels, number * 16, 1)).mean() < 12


def test_an_out_that_cannot_be_written_is_told_plainly(local_ray, motion_set, tmp_path):
    (tmp_path / "file").write_text("")
    manifest = read_manifest(motion_set / "val.csv")
    with pytest.raises(ScanError, match=r"file/shards\.json cannot be (read|written)"):
        shard(manifest, str(tmp_path / "file"), ShardSettings())
    with pytest.raises(ScanError, match="cannot be written"):
        check(manifest, str(tmp_path / "file"), 60)
