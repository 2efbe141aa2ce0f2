"""Segments around key frames: a clip of a segment is the clip of the whole video; lists of them are checked."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.data.shard import ShardSettings, pack_key_frames
from posmlp.config import load_recipe
from posmlp.detection.clips import load_key_clip
from posmlp.detection.segments import SegmentClip, clip_metadata, pack_segments, refuse_longer_clips
from posmlp.errors import UserError
from posmlp.tasks import task_of
from posmlp.video.decode import DecodeError, Video
from posmlp.video.manifest import ManifestError
from tests.helpers.key_frames import detection_recipe
from tests.helpers.videos import numbers, picture, write_video

UNEVEN = np.cumsum([0, *([100, 60, 140, 100] * 25)])[:100].tolist()  # thousandths of a second


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """10 s of frames that say their numbers: as evenly and unevenly timed videos, and as a folder of pictures."""
    path = tmp_path_factory.mktemp("videos")
    folder = path / "folder"
    folder.mkdir()
    for i in range(100):
        Image.fromarray(picture(i, 144, 144)).save(folder / f"{i + 1:05d}.png")
    options = {"options": {"g": "50", "bf": "3"}, "count": 100}
    return {
        "even": (write_video(path / "even.mp4", 144, 144, **options), None),
        "uneven": (write_video(path / "uneven.mkv", 144, 144, times=UNEVEN, **options), None),
        "folder": (f"{folder}/{{:05d}}.png", 100),
    }


def make_config(frames, stride, fps, **eval):
    """Clips of the whole frame, which can say its number."""
    data = {"stride": stride, "fps": fps, "short_side": 144}
    model = {"frames": frames, "image_size": 144}
    return detection_recipe(model=model, data=data, detection={"scale": (1, 1)}, eval=eval)


def pack(uri, images, times, config, **settings):
    rows = [{"sample_id": f"v,{i:04d}", "uri": uri, "frames": images, "time": t} for i, t in enumerate(times)]
    options = ShardSettings(clip=SegmentClip.of_recipe(config), timeout_s=60, **settings)
    return [packed for _, packed in pack_key_frames(rows, options)]


@pytest.mark.parametrize(("frames", "stride"), [(8, 2), (3, 5), (1, 4)])
@pytest.mark.parametrize(
    ("name", "fps"), [("even", None), ("even", 7), ("uneven", None), ("uneven", 25), ("folder", 10)]
)
def test_a_clip_of_a_segment_is_that_of_the_video(videos, tmp_path, name, fps, frames, stride):
    uri, images = videos[name]
    config, times = make_config(frames, stride, fps), [0.0, 0.3, 1.0, 2.0, 4.95, 5.0, 9.0, 9.9]
    for i, (time, packed) in enumerate(zip(times, pack(uri, images, times, config), strict=True)):
        path = tmp_path / f"{i}.mp4"
        path.write_bytes(packed["data"])
        expected = load_key_clip(uri, "v,0001", time, config, epoch=0, train=False, images=images)
        found = load_key_clip(str(path), "v,0001", packed["time"], config, epoch=0, train=False)
        assert numbers(found.clips[0]) == numbers(expected.clips[0])
        difference = np.abs(found.clips.astype(int) - expected.clips)
        assert difference.mean() < 3  # the codec's
        assert np.array_equal(found.shown, expected.shown)
        before, after = SegmentClip.of_recipe(config).reach
        assert packed["num_frames"] <= before + 1 + after  # no more than the clip needs


def test_a_crop_of_training_is_the_same(videos, tmp_path):
    uri, _ = videos["even"]
    config = detection_recipe(data={"stride": 2})
    (packed,) = pack(uri, None, [4.0], config)
    (tmp_path / "s.mp4").write_bytes(packed["data"])
    both = [
        load_key_clip(where, "v,0004", time, config, epoch=3, train=True)
        for where, time in ((uri, 4.0), (str(tmp_path / "s.mp4"), packed["time"]))
    ]
    assert np.array_equal(both[0].shown, both[1].shown)
    assert np.abs(both[0].clips.astype(int) - both[1].clips).mean() < 3


def test_segments_may_be_smaller_and_have_key_frames(videos):
    config = make_config(8, 2, None)
    (packed,) = pack(*videos["even"], [5.0], config, short_side=72, keyframe_interval=5)
    assert (packed["height"], packed["width"]) == (72, 72)
    assert (packed["num_frames"], packed["key_frames"]) == (15, 3)
    assert Video("v", content=packed["data"]).info.frames == 15


def test_a_key_frame_beyond_the_end_does_not_cost_the_others(videos):
    config = make_config(8, 2, None)
    good, bad, also = pack(*videos["even"], [1.0, 12.0, 3.0], config)
    assert "12 s is not in the video" in bad and good["time"] == also["time"] == pytest.approx(0.8)


def test_damage_costs_the_segments_that_have_it(videos, tmp_path):
    """The decoder fails at one frame: the segments without it are packed."""

    class Damaged(Video):
        def frames(self, indices, short_side=None, *, seek=True):
            for i, frame in zip(indices, super().frames(indices, short_side, seek=seek), strict=True):
                if i == 42:
                    raise DecodeError(self.uri, "frame 42 does not decode")
                yield frame

    packed = pack_segments(Damaged(videos["even"][0]), [1.0, 4.0, 7.0], SegmentClip(8, 2, None), None, None)
    assert [isinstance(each, dict) for each in packed] == [True, False, True]
    assert packed[1] == "frame 42 does not decode"


# Lists ----------------------------------------------------------------------------------------------------------------

MAP = 'item { name: "sit" id: 1 } item { name: "walk" id: 2 } item { name: "talk" id: 3 }'
ROWS = [
    {"sample_id": "a,0001", "uri": "a.mp4", "time": 0.5, "boxes": [0, 0, 0.5, 1], "actions": [[0, 2]], "scores": [1]},
    {
        **{"sample_id": "a,0002", "uri": "b.mp4", "time": 0.5},
        **{"boxes": [0, 0, 0.5, 1, 0.2, 0.2, 1, 1], "actions": [[], [1]], "scores": [0.9, 1]},
    },
]
TYPES = pa.schema(
    [
        *(("sample_id", pa.string()), ("uri", pa.string()), ("time", pa.float64()), ("boxes", pa.list_(pa.float32()))),
        *(("actions", pa.list_(pa.list_(pa.int32()))), ("scores", pa.list_(pa.float32()))),
    ]
)


@pytest.fixture
def read(tmp_path):
    """Write a list and read it with the recipe."""
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "map.pbtxt").write_text(MAP)

    def read(rows=ROWS, split="train", overrides=(), columns=TYPES.names, **metadata):
        told = {"classes": ["sit", "walk", "talk"], "boxes": {"train": True, "chosen": {"min_score": 0.8}}} | metadata
        table = pa.Table.from_pylist(rows, schema=TYPES).select(columns)
        table = table.replace_schema_metadata({key: json.dumps(value) for key, value in told.items() if value})
        pq.write_table(table, tmp_path / "list.parquet")
        lists = [f"data.{name}={tmp_path}/list.parquet" for name in ("train", "val")]
        config = load_recipe(
            "scenes", [*lists, f"data.classes={tmp_path}/map.pbtxt", "model.num_classes=3", *overrides]
        )

        return task_of(config).read_split(config, split)

    return read


def test_a_list_is_read_back(read, tmp_path):
    manifest = read()
    found = manifest.rows.to_pylist()
    assert [row["uri"] for row in found] == [str(tmp_path / name) for name in ("a.mp4", "b.mp4")]
    for name in ("sample_id", "time", "boxes", "actions"):
        assert [row[name] for row in found] == [
            pytest.approx(row[name]) if name == "boxes" else row[name] for row in ROWS
        ]
    assert manifest.classes == ("sit", "walk", "talk")
    assert json.loads(manifest.rows.schema.metadata[b"evaluated"]) is None


def changed(number, **columns):
    return [row | columns if i == number else row for i, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": changed(1, sample_id="a,0001")}, "row 1, a,0001, is there twice"),
        ({"rows": changed(0, sample_id="a")}, "row 0, a, has another sample_id than VIDEO,SECOND"),
        ({"rows": changed(0, time=-1.0)}, "row 0, a,0001, has a time"),
        ({"rows": changed(0, time=None)}, "row 0, a,0001, has no time"),
        ({"rows": changed(0, boxes=[0, 0, 1])}, "needs four coordinates"),
        ({"rows": changed(1, boxes=[0, 0, 0.5, 1, 0.2, 0.2, 1, 1.1])}, "row 1, a,0002, has a box"),
        ({"rows": changed(0, boxes=[0.5, 0, 0.5, 1])}, "row 0, a,0001, has a box"),
        ({"rows": changed(0, scores=[2])}, "has a score"),
        ({"rows": changed(0, actions=[[3]])}, "has an action that is not a class, 0 to 2"),
        ({"rows": changed(0, uri="c.mp4")}, "without a file"),
        ({"rows": changed(0, uri="../c.mp4")}, "outside"),
        ({"rows": []}, "has no key frames"),
        ({"columns": ["sample_id", "uri"]}, "has no column time, boxes, actions, scores"),
        ({"classes": None}, "is no list of key frames"),
        ({"classes": ["sit", "run", "talk"]}, "'run' and 'walk'"),
        ({"classes": ["sit", "walk"]}, "2 and 3 classes"),
        ({"split": "val"}, "has the boxes of training, not of validation or test"),
        ({"overrides": ["detection.min_score=0.9"]}, "chosen with detection.min_score=0.8, not 0.9"),
        ({"overrides": ["data.train.boxes=people.csv"]}, "leave `boxes` out"),
    ],
)
def test_a_wrong_list_is_one_problem(read, options, words):
    with pytest.raises(ManifestError) as caught:
        read(**options)
    assert len(caught.value.problems) == 1
    assert words in caught.value.problems[0]
    assert "list.parquet" in caught.value.problems[0]


def test_clips_that_are_longer_than_the_segments_are_refused(read):
    clip = {"frames": 8, "stride": 2, "fps": None}
    assert len(read(clip=clip).rows) == 2
    assert len(read(clip=clip, overrides=["data.stride=1"]).rows) == 2
    for override in ("data.stride=3", "model.frames=16", "data.fps=10"):
        with pytest.raises(UserError, match=r"list\.parquet has videos that are cut for clips of 8 frames"):
            read(clip=clip, overrides=[override])


def test_the_metadata_of_a_clip_is_read_back():
    config = make_config(8, 2, None)
    table = pa.table({"a": [1]}).replace_schema_metadata(clip_metadata(SegmentClip.of_recipe(config)))
    refuse_longer_clips(table, "list", config)
    with pytest.raises(UserError, match="list"):
        refuse_longer_clips(table, str(Path("list")), make_config(8, 4, None))
