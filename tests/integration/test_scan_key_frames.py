"""Checking and packing the videos of key frames, by the command line."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.cli import main
from posmlp.config import load_recipe
from posmlp.detection.lists import read_detection_split
from posmlp.detection.scenes import make_scene_set
from posmlp.tasks import task_of

pytestmark = pytest.mark.ray


@pytest.fixture
def lists(tmp_path):
    """A small detection set, and the overrides that put it in place of that of the recipe scenes."""
    folder = make_scene_set(tmp_path / "set", train=3, val=1, seconds=4, size=32)
    names = {"root": "videos", **{kind: "{}_" + kind + ".csv" for kind in ("boxes", "excluded")}}
    sections = [
        f"data.{split}={{path: {folder}/{split}.csv, "
        + ", ".join(f"{key}: {folder}/{name.format(split)}" for key, name in names.items())
        + "}"
        for split in ("train", "val")
    ]
    return folder, [*sections, f"data.classes={folder}/actions.pbtxt", "data.cache_dir=null", "model.image_size=32"]


def plain(manifest, *columns):
    return manifest.rows.select(["sample_id", "boxes", "actions", *columns]).to_pylist()


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_packed_split_is_the_split(local_ray, lists, tmp_path, capsys, split):
    _, overrides = lists
    out = tmp_path / "out"
    command = ["data", "shard", "scenes", *overrides, "--split", split, "--out", str(out), "--rows-per-shard", "5"]
    assert main(command) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    use = f"data.{split}={out}/manifest.parquet"
    assert use in printed and "for clips of 8 frames x stride 2" in printed
    before, after = (load_recipe("scenes", each) for each in (overrides, [*overrides, use]))
    listed, packed = (read_detection_split(each.data, each.detection, split) for each in (before, after))
    assert plain(packed) == plain(listed)
    np.testing.assert_array_equal(*(m.rows["scores"].combine_chunks().flatten().to_numpy() for m in (packed, listed)))
    assert all(f"{out}/shards/" in uri for uri in packed.rows["uri"].to_pylist())
    for key in (b"evaluated", b"groups"):
        assert packed.rows.schema.metadata[key] == listed.rows.schema.metadata[key]
    task = task_of(before)
    for old, new in zip(listed.rows.to_pylist(), packed.rows.to_pylist(), strict=True):
        for train in (True, False):
            a, b = (task.load(row, before, epoch=0, train=train) for row in (old, new))
            assert np.array_equal(a.shown, b.shown)
            assert np.abs(a.clips.astype(int) - b.clips).mean() < 4


def test_a_check_decodes_each_video_once(local_ray, lists, tmp_path, capsys):
    folder, overrides = lists
    video = folder / "videos" / "train_001.mp4"
    video.write_bytes(video.read_bytes()[:2000])
    (folder / "videos" / "train_002.mp4").unlink()
    late = (folder / "train.csv").read_text() + "train_000,0990,0.1,0.1,0.5,0.5,1,0\n"
    (folder / "train.csv").write_text(late)
    out = tmp_path / "out"
    assert main(["data", "check", "scenes", *overrides, "--out", str(out)]) == 1
    text = capsys.readouterr().out
    assert "3 videos of 8 classes: 1 good, 2 bad" in text
    assert "train_000,0990 and 0 more" in text and "ends after 5.0 s" in text
    rows = pq.read_table(out / "report.parquet").to_pylist()
    assert [row["sample_id"] for row in rows] == ["train_000", "train_001", "train_002"]
    assert [row["good"] for row in rows] == [True, False, False]
    assert [row["beyond"] for row in rows] == [["train_000,0990"], [], []]
    assert rows[0]["num_frames"] == 80 and "missing" in rows[2]["reason"]
    section = f"data.train={{path: {out}/good.parquet, root: {folder}/videos}}"
    assert section in text
    config = load_recipe("scenes", [*overrides, section])
    samples = read_detection_split(config.data, config.detection, "train").rows["sample_id"].to_pylist()
    assert samples == [f"train_000,{second}" for second in ("0902", "0903", "0904")]  # the first one is excluded
    assert json.loads(pq.read_schema(out / "good.parquet").metadata[b"boxes"])["train"]
