"""Lists of boxes: rows as in a plain reading of the same files, and every problem reported with file and line."""

import json
import math
import uuid

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posmlp import storage
from posmlp.config import DataSection, DetectionSection
from posmlp.detection.lists import class_groups, label_map_names, read_detection_split, read_label_map
from posmlp.detection.scenes import make_scene_set
from posmlp.errors import UserError
from posmlp.video.classes import KnownClasses
from posmlp.video.manifest import ManifestError

LABEL_MAP = "".join(f'item {{\n  name: "{name}"\n  id: {i}\n}}\n' for i, name in enumerate(["sit", "walk", "talk"], 1))
FILES = {"truth": "truth.csv", "boxes": "boxes.csv", "excluded": "excluded.csv", "evaluated": "evaluated.pbtxt"}


class Folder:
    """Lists in a folder, and the empty files of the videos ``a`` and ``b``."""

    def __init__(self, path):
        self.path = path
        self.videos = path / "videos"
        self.videos.mkdir(parents=True)
        for name in ("a.mp4", "b.mkv"):
            (self.videos / name).touch()

    def read(self, split="train", known=None, classes=LABEL_MAP, evaluated=None, **lists):
        """Read a split; ``lists`` are the texts of the lists by name, or keys of ``detection``."""
        texts = {**{name: lists.pop(name) for name in FILES if name in lists}, "evaluated": evaluated}
        for name, text in texts.items():
            if text is not None:
                (self.path / FILES[name]).write_bytes(text.encode() if isinstance(text, str) else text)
        (self.path / "map.pbtxt").write_text(classes)
        section = {"path": str(self.path / "truth.csv"), "root": str(self.videos)}
        section |= {name: str(self.path / FILES[name]) for name in ("boxes", "excluded") if texts.get(name) is not None}
        sections = {name: section for name in ("train", "val", "test")}
        data = DataSection(format="ava", classes=str(self.path / "map.pbtxt"), **sections)
        chosen = None if evaluated is None else str(self.path / FILES["evaluated"])
        return read_detection_split(data, DetectionSection(evaluated=chosen, **lists), split, known)

    def problems(self, *args, **options):
        """The problems of lists that are refused, without the folder's name."""
        with pytest.raises(ManifestError) as caught:
            self.read(*args, **options)
        assert str(caught.value).startswith(f"{len(caught.value.problems)} problem")
        return [problem.replace(f"{self.path}/", "") for problem in caught.value.problems]


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "set")


def plain(rows):
    """The rows as Python values; coordinates and scores as they were written, with NaN as "NaN"."""
    found = []
    for row in rows.to_pylist():
        row["boxes"] = [round(value, 4) for value in row["boxes"]]
        row["scores"] = ["NaN" if math.isnan(value) else round(value, 4) for value in row["scores"]]
        found.append(row)
    return found


# Rows -----------------------------------------------------------------------------------------------------------------

TRUTH = """\
b,0902,0.1,0.2,0.3,0.4,1,0
a,1000,0.5,0.5,1.0,1.0,2,7
a,0902,0.077,0.151,0.283,0.811,3,1
a,0902,0.1,0.2,0.3,0.4,2,2
a,0902,0.077,0.151,0.283,0.811,1,1
"""
BOXES = """\
a,0902,0.1,0.2,0.3,0.4,,0.9
a,0902,0.6,0.1,0.9,0.8,-1,0.8
a,0902,0.6,0.1,0.9,0.9,2,0.799
b,0903,0.2,0.2,0.4,0.4,2,0.95
b,0903,0.2,0.2,0.4,0.4,3,0.95
"""


def test_ground_truth_alone(folder):
    manifest = folder.read(truth=TRUTH)
    assert manifest.classes == ("sit", "walk", "talk")
    assert manifest.root == str(folder.videos)
    assert manifest.rows.schema.types == [
        *[pa.string(), pa.string(), pa.int32(), pa.int32(), pa.float64()],
        *[pa.list_(pa.float32()), pa.list_(pa.list_(pa.int32())), pa.list_(pa.float32())],
    ]
    one = {"label": None, "frames": None}
    a, b = ({"uri": str(folder.videos / name), **one} for name in ("a.mp4", "b.mkv"))
    people = [0.077, 0.151, 0.283, 0.811, 0.1, 0.2, 0.3, 0.4]
    expected = [
        {"sample_id": "a,0902", **a, "time": 902.0, "boxes": people, "actions": [[0, 2], [1]], "scores": [1, 1]},
        {"sample_id": "a,1000", **a, "time": 1000.0, "boxes": [0.5, 0.5, 1, 1], "actions": [[1]], "scores": [1]},
        {"sample_id": "b,0902", **b, "time": 902.0, "boxes": [0.1, 0.2, 0.3, 0.4], "actions": [[0]], "scores": [1]},
    ]
    assert plain(manifest.rows) == expected
    assert plain(folder.read("val").rows) == expected  # the same boxes are scored
    assert folder.read(truth=TRUTH.replace("\n", "\r\n").replace(",", " , ")).rows == manifest.rows
    assert folder.read(truth=b"\xef\xbb\xbf\n" + TRUTH.replace("\n", "\n\n").encode()).rows == manifest.rows
    no_person = "".join(line.rpartition(",")[0] + "\n" for line in TRUTH.splitlines())
    assert folder.read(truth=no_person).rows == manifest.rows


def of_frame(manifest, sample):
    """Boxes as tuples with their actions and scores."""
    row = next(row for row in plain(manifest.rows) if row["sample_id"] == sample)
    corners = [tuple(row["boxes"][i : i + 4]) for i in range(0, len(row["boxes"]), 4)]
    return list(zip(corners, row["actions"], row["scores"], strict=True))


def test_person_boxes_in_training(folder):
    manifest = folder.read(truth=TRUTH, boxes=BOXES)
    assert manifest.rows["sample_id"].to_pylist() == ["a,0902", "a,1000", "b,0902", "b,0903"]
    assert of_frame(manifest, "a,0902") == [
        ((0.077, 0.151, 0.283, 0.811), [0, 2], 1),
        ((0.1, 0.2, 0.3, 0.4), [1], 1),  # also in the list of persons
        ((0.6, 0.1, 0.9, 0.8), [], 0.8),
    ]
    assert of_frame(manifest, "b,0903") == [((0.2, 0.2, 0.4, 0.4), [1, 2], 0.95)]
    labelled = folder.read(truth=TRUTH, boxes=BOXES, negatives=False)
    assert [len(each) for each in labelled.rows["scores"].to_pylist()] == [2, 1, 1, 1]
    assert of_frame(labelled, "a,0902") == of_frame(manifest, "a,0902")[:2]
    more = folder.read(truth=TRUTH, boxes=BOXES, min_score=0.7)
    assert of_frame(more, "a,0902")[3:] == [((0.6, 0.1, 0.9, 0.9), [1], 0.799)]


@pytest.mark.parametrize("split", ["val", "test"])
def test_person_boxes_in_validation(folder, split):
    manifest = folder.read(split, truth=TRUTH, boxes=BOXES, negatives=False)
    assert of_frame(manifest, "a,0902") == [
        ((0.077, 0.151, 0.283, 0.811), [0, 2], "NaN"),
        ((0.1, 0.2, 0.3, 0.4), [1], "NaN"),
        ((0.1, 0.2, 0.3, 0.4), [], 0.9),
        ((0.6, 0.1, 0.9, 0.8), [], 0.8),
    ]
    assert of_frame(manifest, "a,1000") == [((0.5, 0.5, 1.0, 1.0), [1], "NaN")]
    assert of_frame(manifest, "b,0903") == [((0.2, 0.2, 0.4, 0.4), [], 0.95)]


def test_the_same_coordinates_in_other_words_are_another_box(folder):
    rows = folder.read(truth="a,1,0.1,0.2,0.3,0.4,1,0\na,1,0.10,0.2,0.3,0.4,2,0\n").rows
    assert rows["actions"].to_pylist() == [[[0], [1]]]


def test_two_persons_with_one_box_are_one(folder):
    rows = folder.read(truth="a,1,0.1,0.2,0.3,0.4,1,0\na,1,0.1,0.2,0.3,0.4,1,5\n").rows
    assert rows["actions"].to_pylist() == [[[0]]]


@pytest.mark.parametrize("split", ["train", "val"])
def test_excluded_key_frames(folder, split):
    excluded = "a,902\nc,0902\nb,0903\na,1234\n"
    rows = folder.read(split, truth=TRUTH, boxes=BOXES, excluded=excluded).rows
    assert rows["sample_id"].to_pylist() == ["a,1000", "b,0902"]


def test_seconds_of_the_lists_and_of_the_videos(folder):
    truth = "a,0910,0.1,0.2,0.3,0.4,1,0\na,1798,0.1,0.2,0.3,0.4,1,0\na,12345,0.1,0.2,0.3,0.4,1,0\na,900,0,0,1,1,1,0\n"
    rows = folder.read(truth=truth, first_second=899.5).rows
    assert rows["sample_id"].to_pylist() == ["a,0900", "a,0910", "a,1798", "a,12345"]
    assert rows["time"].to_pylist() == [0.5, 10.5, 898.5, 11445.5]


def test_videos_as_folders_of_images(folder):
    odd = "{c.d"  # a brace is doubled in a template
    (folder.videos / odd).mkdir()
    images = [folder.videos / odd / (odd + f"_{number:06d}.jpg") for number in range(1, 4)]
    for path in (*images, folder.videos / "E.MKV"):
        path.touch()
    rows = folder.read(truth="".join(f"{video},1,0,0,1,1,1,0\n" for video in (odd, "E", "a"))).rows
    names = ["E.MKV", "a.mp4", "{{c.d/{{c.d_{:06d}.jpg"]
    assert rows["uri"].to_pylist() == [str(folder.videos / name) for name in names]
    assert rows["frames"].to_pylist() == [None, None, 3]
    assert rows["uri"][2].as_py().format(2) == str(images[1])
    images[1].unlink()
    (problem,) = folder.problems(truth=f"{odd},1,0,0,1,1,1,0\n")
    assert problem.startswith("truth.csv:1: no image {c.d_000002.jpg in ")


def test_lists_and_videos_in_an_object_store(folder):
    local = folder.read(truth=TRUTH, boxes=BOXES)
    bucket = f"memory://{uuid.uuid4().hex}"
    for name in ("truth.csv", "boxes.csv", "map.pbtxt"):
        storage.write_bytes(f"{bucket}/lists/{name}", (folder.path / name).read_bytes())
    storage.write_bytes(f"{bucket}/videos/a.mp4", b"")
    for number in (1, 2):
        storage.write_bytes(f"{bucket}/videos/b/b_{number:06d}.jpg", b"")
    split = {"path": f"{bucket}/lists/truth.csv", "root": f"{bucket}/videos", "boxes": f"{bucket}/lists/boxes.csv"}
    data = DataSection(format="ava", classes=f"{bucket}/lists/map.pbtxt", train=split, val=split)
    rows = read_detection_split(data, DetectionSection(), "train").rows
    same = [name for name in rows.column_names if name not in ("uri", "frames")]
    assert rows.select(same) == local.rows.select(same)
    places = dict(zip(rows["uri"].to_pylist(), rows["frames"].to_pylist(), strict=True))
    assert places == {f"{bucket}/videos/a.mp4": None, f"{bucket}/videos/b/b_{{:06d}}.jpg": 2}


def test_the_lists_folder_holds_the_videos_by_default(folder):
    folder.read(truth=TRUTH)
    for name in ("a.mp4", "b.mkv"):
        (folder.videos / name).rename(folder.path / name)
    split = {"path": str(folder.path / "truth.csv")}
    data = DataSection(format="ava", classes=str(folder.path / "map.pbtxt"), train=split, val=split)
    manifest = read_detection_split(data, DetectionSection(), "train")
    assert manifest.root == str(folder.path)
    assert manifest.rows["uri"].to_pylist()[-1] == str(folder.path / "b.mkv")


def test_the_embedded_set(tmp_path):
    folder = make_scene_set(tmp_path / "scenes", train=2, val=1, seconds=3)
    split = {
        name: {"path": f"{folder}/{name}.csv", "root": f"{folder}/videos", "boxes": f"{folder}/{name}_boxes.csv"}
        for name in ("train", "val")
    }
    data = DataSection(format="ava", classes=f"{folder}/actions.pbtxt", **split)
    for name, key_frames in ("train", 6), ("val", 3):
        manifest = read_detection_split(data, DetectionSection(first_second=900), name)
        assert manifest.rows["time"].to_pylist() == [1.0, 2.0, 3.0] * (key_frames // 3)
        assert manifest.classes[0] == "moves left"


# A plain reading ------------------------------------------------------------------------------------------------------

VIDEO = st.sampled_from(["a", "b"])
SECOND = st.sampled_from(["2", "0002", "10", "902"])
INTERVAL = st.sampled_from([("0", "1"), ("0.0", "0.5"), ("0.25", "0.5"), ("0.250", "0.5")])
PLACE = st.builds(lambda x, y: (x[0], y[0], x[1], y[1]), INTERVAL, INTERVAL)
SCORE = st.sampled_from(["0.5", "0.79", "0.8", "1"])


def lines(last, action):
    row = st.builds(lambda v, s, b, a, e: (v, s, *b, a, e), VIDEO, SECOND, PLACE, action, last)
    return st.lists(row, max_size=12, unique=True)


def read_plainly(truth, boxes, excluded, train, negatives):
    """The boxes of each key frame: ``{(video, second): [(corners, actions, score)]}``."""
    frames = {}
    left_out = {(video, int(second)) for video, second in excluded}
    validated = not train and boxes is not None
    for part, rows in enumerate([truth, boxes or []]):
        for video, second, *corners, action, score in rows:
            frame, key = (video, int(second)), (part if not train else 0, *corners)
            if frame in left_out or (part and float(score) < 0.8):
                continue
            found = frames.setdefault(frame, {})
            first = float(score) if part else math.nan if validated else 1.0
            actions, _ = found.setdefault(key, (set(), first))
            if action not in ("", "-1") and not (part and validated):
                actions.add(int(action) - 1)
    result = {}
    for frame in sorted(frames):
        people = [(corners[1:], sorted(a), s) for corners, (a, s) in frames[frame].items()]
        if people := [each for each in people if each[1] or negatives or not train]:
            result[frame] = people
    return result


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines(st.sampled_from(["", "1", "2"]), st.sampled_from(["1", "2", "3"])).filter(bool),
    st.none() | lines(SCORE, st.sampled_from(["", "-1", "1", "2", "3"])),
    st.lists(st.tuples(VIDEO, SECOND), max_size=3),
    st.booleans(),
    st.booleans(),
)
def test_equals_a_plain_reading(folder, truth, boxes, excluded, train, negatives):
    videos = {row[0] for row in truth}
    boxes = [row for row in boxes if row[0] in videos] or None if boxes else None
    excluded = list(dict.fromkeys(row for row in excluded if row[0] in videos))
    expected = read_plainly(truth, boxes, excluded, train, negatives)
    texts = {"truth": truth, "boxes": boxes, "excluded": excluded or None}
    texts = {name: "".join(",".join(row) + "\n" for row in rows) for name, rows in texts.items() if rows is not None}
    split = "train" if train else "val"
    if not expected:
        (problem,) = folder.problems(split, negatives=negatives, **texts)
        assert problem.startswith("truth.csv: no key frame is left with a box")
        return
    rows = folder.read(split, negatives=negatives, **texts).rows.to_pylist()
    assert [row["sample_id"] for row in rows] == [f"{video},{second:04d}" for video, second in expected]
    assert [row["time"] for row in rows] == [second for _, second in expected]
    for row, people in zip(rows, expected.values(), strict=True):
        corners = [[float(text) for text in corner] for corner, _, _ in people]
        np.testing.assert_array_equal(np.reshape(row["boxes"], (-1, 4)), corners)
        assert row["actions"] == [actions for _, actions, _ in people]
        np.testing.assert_array_equal(np.float32(row["scores"]), np.float32([score for _, _, score in people]))


# Classes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        LABEL_MAP,
        LABEL_MAP.replace("id:", "label_id:").replace("item", "label"),
        '# actions\nitem{name:"sit" id:1}item{name:"walk" id:2}item{name:"talk" id:3}',
        "item: { id: 3, name: 'talk' } item { id: 1; name: 'sit' # first\n} item { id: 2 name: 'walk' }",
        LABEL_MAP.replace("\n", "\r\n"),
    ],
)
def test_spellings_of_label_maps(tmp_path, text):
    path = tmp_path / "map.pbtxt"
    path.write_text(text, newline="")
    entries = read_label_map(str(path))
    assert label_map_names(entries) == ("sit", "walk", "talk")
    assert {entry.type for entry in entries.values()} == {""}
    assert class_groups(entries) == {}


def test_types_and_gaps_of_label_maps(tmp_path):
    path = tmp_path / "map.pbtxt"
    kinds = {5: "PERSON_INTERACTION", 2: "PERSON_MOVEMENT", 4: "PERSON_MOVEMENT", 1: "OTHER"}
    blocks = [f'label {{ name: "a \\"{i}\\" {{x}}" label_id: {i} label_type: {kind} }}' for i, kind in kinds.items()]
    path.write_text("\n".join(blocks))
    entries = read_label_map(str(path))
    assert label_map_names(entries) == ('a "1" {x}', 'a "2" {x}', "unnamed 3", 'a "4" {x}', 'a "5" {x}')
    assert class_groups(entries) == {"pose": (1, 3), "person": (4,)}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "1: names no action"),
        ("# none\n", "1: names no action"),
        ('item { name: "sit" id: 1\n', "2: the end of the file is not expected here"),
        ('item { name: "sit id: 1 }', "1: '\"' is not expected here"),
        ('\n"sit" 1', "2: '\"sit\"' is not expected here"),
        ('item { name: "sit" id: 1 item { } }', "1: '{' is not expected here"),
        ('\nitem { name: "sit" }', "2: a block without id"),
        ("item { id: 4 }", "1: a block without name"),
        ('item { name: "sit" id: 0 }', "1: id 0 of 'sit' is not from 1 to 10000; number"),
        ('item { name: "sit" id: 1.5 }', "1: id 1.5 of 'sit' is not"),
        ('item { name: "sit" id: 99999999999 }', "1: id 99999999999 of 'sit' is not"),
        ('item { name: "a" id: 1 }\nitem { name: "b" id: 1 }', "2: 'b' has id 1, but id 1 is 'a' above"),
        ('item { name: "a" id: 1 }\nitem { name: "a" id: 2 }', "2: 'a' has id 2, but it is listed above"),
    ],
)
def test_label_maps_that_are_refused(folder, text, problem):
    (found,) = folder.problems(truth=TRUTH, classes=text)
    assert found.startswith(f"map.pbtxt:{problem}")
    assert "; " in found


def test_classes_of_a_model(folder):
    known = KnownClasses(("talk", "stand", "walk", "sit"), "the checkpoint", "use its label map")
    manifest = folder.read(truth=TRUTH, known=known)
    assert manifest.classes == known.names
    assert manifest.rows["actions"].to_pylist() == [[[0, 3], [2]], [[2]], [[3]]]
    known = KnownClasses(("talk", "walk"), "the checkpoint", "use its label map")
    assert folder.problems(truth=TRUTH, known=known) == [
        "map.pbtxt: 1 class not in the checkpoint: 'sit'; use its label map"
    ]
    others = "a,1,0,0,1,1,2,0\n"  # sits do not occur here
    assert folder.read(truth=others, known=known).rows["actions"].to_pylist() == [[[1]]]


def test_classes_that_the_metric_counts(folder):
    counted = 'item { name: "walk" id: 2 } item { name: "talk" id: 3 }'
    kinds = LABEL_MAP.replace("id: 1", "id: 1 label_type: PERSON_MOVEMENT")
    kinds = kinds.replace("id: 3", "id: 3 label_type: PERSON_INTERACTION")

    def metadata(**options):
        found = folder.read(truth=TRUTH, **options).rows.schema.metadata
        return {name.decode(): json.loads(value) for name, value in found.items()}

    assert metadata() == {"evaluated": None, "groups": {}}
    assert metadata(classes=kinds, evaluated=counted) == {"evaluated": [1, 2], "groups": {"pose": [0], "person": [2]}}
    known = KnownClasses(("talk", "walk", "sit"), "the checkpoint", "use its label map")
    found = metadata(classes=kinds, evaluated=counted, known=known)
    assert found == {"evaluated": [0, 1], "groups": {"pose": [2], "person": [0]}}
    other = counted.replace("talk", "run") + 'item { name: "fly" id: 4 }'
    assert [problem.partition(";")[0] for problem in folder.problems(truth=TRUTH, evaluated=other)] == [
        "evaluated.pbtxt: 'run' has id 3, which is 'talk' in map.pbtxt",
        "evaluated.pbtxt: 'fly' has id 4, which is not in map.pbtxt",
    ]


# Problems -------------------------------------------------------------------------------------------------------------

LEFT = "a,1,0.1,0.2,0.3,0.4"
GOOD = LEFT + ",1,0"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("a,1,0.1,0.2,0.3,0.4", "has 6 columns, not 8; expected lines of video,second,x1,y1,x2,y2,action,person"),
        (GOOD + ",9", "has 9 columns, not 8"),
        ("nonsense", "has 1 column, not 8"),
        (GOOD.replace("0.1", "left"), "x1 'left' is not a fraction of the frame, 0 to 1"),
        (GOOD.replace("0.2", ""), "y1 '' is not a fraction"),
        (GOOD.replace("0.3", "77"), "x2 '77' is not a fraction"),
        (GOOD.replace("0.4", "-0.4"), "y2 '-0.4' is not a fraction"),
        (GOOD.replace("0.4", "nan"), "y2 'nan' is not a fraction"),
        (GOOD.replace("0.4", "1e400"), "y2 '1e400' is not a fraction"),
        (GOOD.replace("0.4", '"0.4"'), "y2 '\"0.4\"' is not a fraction"),
        (GOOD.replace("0.3", "0.1"), "x2 0.1 is not more than x1 0.1; expected the left, top, right and bottom edge"),
        (GOOD.replace("0.4", "0.15"), "y2 0.15 is not more than y1 0.2"),
        (LEFT + ",4,0", "action '4' is not an id of map.pbtxt; expected 1 to 3"),
        (LEFT + ",0,0", "action '0' is not an id"),
        (LEFT + ",,0", "action '' is not an id"),
        (LEFT + ",-1,0", "action '-1' is not an id"),
        (LEFT + ",1.5,0", "action '1.5' is not an id"),
        (LEFT + ",sit,0", "action 'sit' is not an id"),
        (GOOD.replace("a,1", "a,902.5"), "second '902.5' is not a whole number from 0 to 999999"),
        (GOOD.replace("a,1", "a,-1"), "second '-1' is not"),
        (GOOD.replace("a,1", "a,"), "second '' is not"),
        (GOOD.replace("a,1", "a,1000000"), "second '1000000' is not"),
        (GOOD.replace("a,", ","), "video '' is empty"),
        (GOOD.replace("a,", "gone,"), "no video gone in videos: neither gone.mp4 (or .mkv, .webm, ...) nor a folder"),
        (GOOD.replace("a,", "../videos/a,"), "no video ../videos/a in videos"),
        (GOOD.replace("a,1", "a,5"), "is the same as line 1; keep one of the two"),
    ],
)
def test_lines_that_are_refused(folder, line, problem):
    first = "a,5,0.1,0.2,0.3,0.4,1,0\n"
    (found,) = folder.problems(truth=f"{first}\n{line}\n")
    assert found.startswith(f"truth.csv:3: {problem}")
    assert folder.problems(truth=f"\r\n{first.strip()}\r\n{line}\r\n")[0].startswith("truth.csv:3: ")
    assert folder.problems(truth=f"  \n{first}{line}")[0].startswith("truth.csv:3: ")


def test_all_problems_of_all_lists_at_once(folder):
    truth = "a,1,0.1,0.2,0.3,0.4,9,0\nb,x,0.1,2,3,4,1,0\ngone,1,0.5,0.1,0.4,0.9,1,0\ngone,2,0,0,1,1,1,0\nb\n"
    boxes = "a,1,0,0,1,1,-1,1.5\na,1,0,0,1,1,7,\nb,1,0,0.5,1,0.5,1,0.9\nc,1,0,0,1,1,,0.5\nc,2,0,0,1,1,,0.5\n"
    boxes += "b,2,0.1,0.1,0.1,0.1,,0.3\n"  # not used, so it needs no area
    excluded = "a,902\n\na,1.5\na\n"
    found = folder.problems(truth=truth, boxes=boxes, excluded=excluded)
    assert [problem.partition(";")[0] for problem in found] == [
        "truth.csv:1: action '9' is not an id of map.pbtxt",
        "truth.csv:2: second 'x' is not a whole number from 0 to 999999",
        "truth.csv:2: y1 '2' is not a fraction of the frame, 0 to 1",
        "truth.csv:3: x2 0.4 is not more than x1 0.5",
        "truth.csv:3: no video gone in videos: neither gone.mp4 (or .mkv, .webm, ...) nor a folder of images"
        " gone_000001.jpg",
        "truth.csv:5: has 1 column, not 8",
        "boxes.csv:1: score '1.5' is not a number from 0 to 1",
        "boxes.csv:2: action '7' is not an id of map.pbtxt",
        "boxes.csv:2: score '' is not a number from 0 to 1",
        "boxes.csv:3: y2 0.5 is not more than y1 0.5",
        "boxes.csv:4: video 'c' is not in truth.csv",
        "excluded.csv:3: second '1.5' is not a whole number from 0 to 999999",
        "excluded.csv:4: has 1 column, not 2",
    ]


def test_lists_of_other_videos(folder):
    assert folder.problems(truth=TRUTH, excluded="c,902\nd,902\n") == [
        "excluded.csv: has no video of truth.csv; give the excluded key frames of the same videos"
    ]
    (problem,) = folder.problems(truth=TRUTH, excluded="a,902\na,1000\nb,902\n")
    assert problem.startswith("truth.csv: no key frame is left with a box")


def test_key_frames_before_the_video(folder):
    (problem,) = folder.problems(truth=TRUTH, first_second=950)
    assert problem.startswith("truth.csv:1: second 902 is before the start of the video, detection.first_second 950")
    assert "in 4 of 5 lines" in problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "truth.csv:1: the file is empty; expected lines of video,second,x1"),
        ("\n \n", "truth.csv:1: the file is empty"),
        (",,,,,,,\n", "truth.csv: no key frame is left with a box"),
        (b"a,1,0,0,1,1,1,0\n\xff\xfe", "truth.csv:2: not UTF-8 text"),
        (b"a,1,0,0,1,1,1,0\n\0", "truth.csv:2: not UTF-8 text"),
    ],
)
def test_files_that_are_no_lists(folder, text, problem):
    (found,) = folder.problems(truth=text)
    assert found.startswith(problem)


def test_files_that_are_missing(folder):
    folder.read(truth=TRUTH, boxes=BOXES)
    for name in ("boxes.csv", "truth.csv", "map.pbtxt"):
        (folder.path / name).unlink()
        data = {"path": str(folder.path / "truth.csv"), "boxes": str(folder.path / "boxes.csv"), "root": "nowhere"}
        data = DataSection(format="ava", classes=str(folder.path / "map.pbtxt"), train=data, val=data)
        with pytest.raises(ManifestError, match=f"{name}: no such file; expected "):
            read_detection_split(data, DetectionSection(), "train")
    folder.read(truth=TRUTH)
    folder.videos.rename(folder.path / "moved")
    assert folder.problems(truth=TRUTH) == ["videos: no such folder; `root` must be the folder that holds the videos"]


def test_recipes_without_a_list_or_label_map(folder):
    data = DataSection(format="ava", classes="map.pbtxt", train="t.csv", val="v.csv")
    with pytest.raises(UserError, match=r"the recipe has no data\.test;"):
        read_detection_split(data, DetectionSection(), "test")
    with pytest.raises(UserError, match=r"set data\.classes"):
        read_detection_split(data.model_copy(update={"classes": None}), DetectionSection(), "train")
    with pytest.raises(UserError, match="leave user and password out"):
        read_detection_split(data.model_copy(update={"classes": "s3://me:secret@b/m"}), DetectionSection(), "train")


BYTES = st.sampled_from(
    [b",", b"\n", b"\r", b'"', b" ", b"0.5", b"a", b"-", b"1", b"\xc3\xa9", b"\xff", b"nan", b"{", b"}"]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["truth", "boxes", "excluded", "classes"]), st.integers(0, 200), st.integers(0, 9), BYTES)
def test_damaged_files_are_read_or_refused(folder, name, place, length, put):
    texts = {"truth": TRUTH, "boxes": BOXES, "excluded": "a,902\nb,5\n", "classes": LABEL_MAP}
    damaged = texts[name].encode()
    damaged = damaged[:place] + put + damaged[place + length :]
    texts[name] = damaged if name != "classes" else damaged.decode(errors="replace")
    try:
        rows = folder.read(**texts).rows
    except ManifestError as error:
        assert all(problem.startswith(str(folder.path)) for problem in error.problems)
        return
    assert len(rows) and len({*rows["sample_id"].to_pylist()}) == len(rows)
    for row in rows.to_pylist():
        corners = np.reshape(row["boxes"], (-1, 4))
        assert len(corners) == len(row["actions"]) == len(row["scores"]) > 0
        assert ((corners[:, :2] < corners[:, 2:]) & (corners[:, :2] >= 0) & (corners[:, 2:] <= 1)).all()
