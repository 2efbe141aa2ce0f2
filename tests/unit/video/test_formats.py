"""The lists of published data sets: rows read from each format, and each kind of defect reported with its line."""

import json
import os
import re
from functools import partial

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posmlp import storage
from posmlp.video.manifest import ManifestError, read_manifest


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.fixture
def write(tmp_path):
    """Write a file and return its path; videos are next to it."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str | bytes):
            content = json.dumps(content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def problems(path, where=None, **options):
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, where or {}, **options)
    return [problem.removeprefix(f"{path}").removeprefix(":").strip() for problem in caught.value.problems]


def columns(manifest, *names):
    return [manifest.rows[name].to_pylist() for name in names]


# Kinetics -------------------------------------------------------------------------------------------------------------

OFFICIAL = (
    "label,youtube_id,time_start,time_end,split,is_cc\r\n"
    "testifying,---QUuC4vJs,84,94,validate,0\r\n"
    "washing feet,--3ouPhoy2A,20,30,validate,0\r\n"
    '"eating spaghetti",-1PHKwDyoo0,1,11,test,0\r\n'
)


@pytest.mark.parametrize(
    "places",
    [
        ("---QUuC4vJs_000084_000094.mp4", "--3ouPhoy2A_000020_000030.mp4"),
        ("testifying/---QUuC4vJs_000084_000094.mp4", "washing feet/--3ouPhoy2A_000020_000030.mp4"),
        ("testifying/---QUuC4vJs_000084_000094.mkv", "washing_feet/--3ouPhoy2A_000020_000030.webm"),
    ],
)
def test_kinetics_official(write, tmp_path, places):
    root = touch(tmp_path / "videos", *places)
    path = write("validate.csv", OFFICIAL)
    manifest = read_manifest(path, {"split": "validate"}, format="kinetics", root=root)
    assert manifest.classes == ("eating spaghetti", "testifying", "washing feet")
    assert columns(manifest, "sample_id", "uri", "label", "frames") == [
        ["---QUuC4vJs_000084_000094", "--3ouPhoy2A_000020_000030"],
        [str(root / place) for place in places],
        [1, 2],
        [None, None],
    ]


@pytest.mark.parametrize(
    "names",
    [
        "testifying\nwashing feet\neating spaghetti\nzumba\n",
        "id,name\n0,testifying\n1,washing feet\n3,zumba\n2,eating spaghetti\n",
        "testifying,0\nwashing feet,1\neating spaghetti,2\nzumba,3\n",
        '{"\\"testifying\\"": 0, "washing feet": "1", "eating spaghetti": 2, "zumba": 3}',
        '["testifying", "washing feet", "eating spaghetti", "zumba"]',
    ],
)
def test_class_files_give_the_order(write, tmp_path, names):
    touch(tmp_path, "---QUuC4vJs_000084_000094.mp4", "--3ouPhoy2A_000020_000030.mp4", "-1PHKwDyoo0_000001_000011.mp4")
    path, classes = write("val.csv", OFFICIAL), write("classes.txt", names)
    manifest = read_manifest(path, format="kinetics", classes=classes)
    assert manifest.classes == ("testifying", "washing feet", "eating spaghetti", "zumba")
    assert columns(manifest, "label") == [[0, 1, 2]]


@pytest.mark.parametrize(
    "text",
    [
        "a b/c.mp4 1\nd.mp4 0\nsub/e.mp4 1\n",
        "\ufeffa b/c.mp4,1\r\nd.mp4, 0\r\n\r\nsub/e.mp4 ,1",
        '"a b/c.mp4",1\nd.mp4\t0\nsub/e.mp4   1\n',
    ],
)
def test_kinetics_lists(write, tmp_path, text):
    touch(tmp_path, "a b/c.mp4", "d.webm", "sub/e.mp4")
    manifest = read_manifest(write("train.txt", text), format="kinetics")
    assert manifest.classes == ("0", "1")
    assert columns(manifest, "sample_id", "uri", "label") == [
        ["a b/c.mp4", "d.mp4", "sub/e.mp4"],
        [str(tmp_path / name) for name in ("a b/c.mp4", "d.webm", "sub/e.mp4")],
        [1, 0, 1],
    ]


@given(st.lists(st.text("ab ,.-0123456789é", min_size=1, max_size=8), min_size=1, max_size=5), st.sampled_from(" ,"))
def test_any_path_comes_back_from_a_kinetics_list(tmp_path_factory, names, separator):
    paths = list(dict.fromkeys(f"x{name}x.mp4" for name in names))
    root = touch(tmp_path_factory.mktemp("kinetics"), *paths)
    (root / "list").write_text("".join(f"{path}{separator}0\n" for path in paths))
    assert read_manifest(root / "list", format="kinetics").rows["sample_id"].to_pylist() == paths


def test_every_defect_of_a_kinetics_list_has_its_line(write, tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    path = write("l.txt", "a.mp4 0\nb.mp4 2\nc.mp4 -1\nlonely.mp4\n./a.mp4 1\ngone.mp4 1\n")
    found = problems(path, format="kinetics", classes=write("names.txt", "run\nwalk\n"))
    assert [problem.split(":")[0] for problem in found] == ["2", "3", "4", "5", "6"]
    words = ["names 2 classes, 0 to 1", "-1 is negative", "has no label", "in line 1", "gone.mkv"]
    for problem, word in zip(found, words, strict=True):
        assert word in problem


def test_every_defect_of_the_official_kinetics_list(write, tmp_path):
    touch(tmp_path, "---QUuC4vJs_000084_000094.mp4")
    text = OFFICIAL + "testifyin,x,early,94,train,0\ntestifying,---QUuC4vJs,84,94,train,0\n,y,1,2,train,0\nshort,z\n"
    names = write("names.txt", "testifying\nwashing foot\neating spaghetti\n")
    found = problems(write("t.csv", text), {"split": "validate"}, format="kinetics", classes=names)
    assert [problem.split(":")[0] for problem in found] == ["3", "3", "5", "6", "7", "8"]
    words = ["did you mean 'washing foot'", "no video file", "'early'", "in line 2", "label is empty", "2 values"]
    for problem, word in zip(found, words, strict=True):
        assert word in problem


def test_kinetics_without_labels(write):
    (problem,) = problems(write("test.csv", "youtube_id,time_start,time_end,split\nx,0,10,test\n"), format="kinetics")
    assert "1: no column label" in problem


# Something-Something --------------------------------------------------------------------------------------------------


def test_ssv1_lists(write, tmp_path):
    frames = touch(tmp_path / "frames", "1000/00001.jpg", "1000/00003.jpg", "2/00001.jpg", "with blank/00001.jpg")
    path = write("train_videofolder.txt", "1000 3 1\n2 1 0\nwith blank 1 2\n")
    classes = write("category.txt", "Holding something\nPutting something, something and something on the table\nC\n")
    manifest = read_manifest(path, format="ssv1", root=frames, classes=classes)
    assert manifest.classes == ("Holding something", "Putting something, something and something on the table", "C")
    assert manifest.rows.to_pydict() == {
        "sample_id": ["1000", "2", "with blank"],
        "uri": [f"{frames}/{name}/{{:05d}}.jpg" for name in ("1000", "2", "with blank")],
        "label": [1, 0, 2],
        "frames": [3, 1, 1],
    }
    uri, count = manifest.rows["uri"][0].as_py(), manifest.rows["frames"][0].as_py()
    assert os.path.isfile(uri.format(count))


def test_ssv1_official_counts_the_images(write, tmp_path):
    frames = touch(tmp_path / "{frames}", *(f"24413/img_{i}.jpg" for i in range(1, 13)), "7/img_1.jpg", "7/notes.txt")
    path = write("something-something-v1-validation.csv", "24413;Burying something in something\n7;Folding something\n")
    classes = write("labels.csv", "Folding something\nBurying something in something\n")
    read = partial(read_manifest, path, format="ssv1", root=frames, classes=classes)
    manifest = read(template="img_{}.jpg")
    assert columns(manifest, "sample_id", "label", "frames") == [["24413", "7"], [1, 0], [12, 1]]
    assert os.path.isfile(manifest.rows["uri"][0].as_py().format(12))
    touch(frames, "7/img_3.jpg")
    os.unlink(frames / "24413/img_1.jpg")
    with pytest.raises(ManifestError) as caught:
        read(template="img_{}.jpg")
    first, second = caught.value.problems
    assert f"{path}:1: no image img_1.jpg" in first
    assert f"{path}:2: no image img_2.jpg" in second


def test_every_defect_of_an_ssv1_list(write, tmp_path):
    touch(tmp_path, "1/00001.jpg", "1/00002.jpg", "2/00001.jpg")
    found = problems(write("l.txt", "1 2 0\n2 5 0\n3 1 1\n4\n1 2 0\n5 0 0\n6 two 0\n"), format="ssv1")
    assert [problem.split(":")[0] for problem in found] == ["2", "3", "4", "5", "6", "7"]
    words = ["00005.jpg", "3/00001.jpg", "no labels", "in line 1", "0 frames", "malformed"]
    for problem, word in zip(found, words, strict=True):
        assert word in problem


@pytest.mark.parametrize("template", ["{:05d}", "a{:05d}b.png", "{}.jpg", "{0:06d}.jpg"])
def test_templates(write, tmp_path, template):
    touch(tmp_path, f"v/{template.format(1)}")
    assert columns(read_manifest(write("l", "v 1 0"), format="ssv1", template=template), "frames") == [[1]]


@pytest.mark.parametrize("template", ["00001.jpg", "%05d.jpg", "{:05d}_{:05d}.jpg", "{name}.jpg", "{", "{:s}.jpg"])
def test_unknown_templates(write, template):
    assert any(
        "unknown `template`" in problem for problem in problems(write("l", "v 1 0"), format="ssv1", template=template)
    )


SSV2 = (
    '[\n{"id":"78687", "label":"holding potato next to vicks vaporub bottle",'
    ' "template":"Holding [something] next to [something]",'
    ' "placeholders":["potato", "vicks vaporub bottle"]},\n'
    '{"id":42326, "label":"putting a, b and c on the table",'
    ' "template":"Putting [something], [something] and [something] on the table", "placeholders":["a", "b", "c"]}\n]\n'
)
LABELS = {"Putting something, something and something on the table": "1", "Holding something next to something": "0"}


def test_ssv2(write, tmp_path):
    root = touch(tmp_path / "20bn-something-something-v2", "78687.webm", "42326.mp4")
    path, classes = write("something-something-v2-train.json", SSV2), write("labels.json", LABELS)
    manifest = read_manifest(path, format="ssv2", root=root, classes=classes)
    assert manifest.classes == tuple(sorted(LABELS, key=LABELS.get))
    assert columns(manifest, "sample_id", "uri", "label") == [
        ["78687", "42326"],
        [str(root / "78687.webm"), str(root / "42326.mp4")],
        [0, 1],
    ]
    one = read_manifest(path, {"id": 42326}, format="ssv2", root=root, classes=classes)
    assert columns(one, "label") == [[1]]


def test_every_defect_of_an_ssv2_list(write, tmp_path):
    touch(tmp_path, "78687.webm", "42326.webm")
    more = (
        ',\n{"id": "78687", "template": "Holding [something] next to [something]"}'
        ',\n{"id": "1"}'
        ',\n{"template": "x"}, 7'
        ',\n{"id": "42327",\n "template": "Holding [somethin] next to [something]"}\n]'
    )
    found = problems(write("t.json", SSV2[:-3] + more), format="ssv2", classes=write("labels.json", LABELS))
    assert [problem.split(":")[0] for problem in found] == ["4", "5", "6", "6", "7", "7"]
    words = ["in line 2", 'no "template"', "expected an object", "expected an object", "did you mean", "42327.mp4"]
    for problem, word in zip(found, words, strict=True):
        assert word in problem


@pytest.mark.parametrize(
    ("text", "start", "words"),
    [
        ("", "1: ", "empty"),
        ("[]", "1: ", "the list is empty"),
        ('{"a": 1}', "1: ", "expected a JSON list"),
        ('[{"id": "1",}]', "1: ", "malformed JSON in column"),
        ('[\n{"id": "1", "template": "x"}\n{"id": "2"}]', "3: ", "column 1"),
        ('[\n{"id": "1"', "2: ", "malformed JSON"),
        ('[{"id": "1", "template": "x"}] x', "1: ", "Extra data"),
        ('[\n{"id":"1420"},\n{"id":"2780"}\n]', "2: ", "test list has no labels"),
        ("[" * 100000, "1: ", ""),
    ],
)
def test_a_bad_ssv2_list(write, text, start, words):
    (problem,) = problems(write("t.json", text), format="ssv2", classes=write("labels.json", LABELS))
    assert problem.startswith(start)
    assert words in problem


# UCF101 and HMDB51 ----------------------------------------------------------------------------------------------------

TRAINLIST = "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\r\nArchery/v_Archery_g08_c02.avi 2\r\n"


def test_ucf101(write, tmp_path):
    root = touch(
        tmp_path / "UCF-101",
        *(f"ApplyEyeMakeup/v_ApplyEyeMakeup_g0{i}_c01.avi" for i in (1, 8)),
        "Archery/v_Archery_g08_c02.avi",
    )
    train = write("trainlist01.txt", TRAINLIST)
    test = write("testlist01.txt", "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\r\n")
    assert read_manifest(train, format="ucf101", root=root).classes == ("ApplyEyeMakeup", "Archery")
    (problem,) = problems(test, format="ucf101", root=root)
    assert "classInd.txt, from UCF101TrainTestSplits-RecognitionTask.zip" in problem
    write("classInd.txt", "1 ApplyEyeMakeup\r\n2 Archery\r\n3 BabyCrawling\r\n")
    manifest = read_manifest(train, format="ucf101", root=root)
    assert manifest.classes == ("ApplyEyeMakeup", "Archery", "BabyCrawling")
    assert columns(manifest, "uri", "label") == [
        [str(root / line[:-2]) for line in TRAINLIST.split("\r\n")[:2]],
        [0, 1],
    ]
    manifest = read_manifest(test, format="ucf101", root=root)
    assert columns(manifest, "sample_id", "label") == [["ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi"], [0]]


def test_every_defect_of_a_ucf101_list(write, tmp_path):
    touch(tmp_path, "A/a.avi", "A/b.avi", "A/c.avi", "A/d.avi", "Archry/e.avi")
    write("classInd.txt", "1 A\n2 Archery\n")
    path = write("l.txt", "A/a.avi 1\nA/b.avi 3\nA/c.avi 0\nA/d.avi 2\nArchry/e.avi\nf.avi\nA/gone.avi 1\n")
    found = problems(path, format="ucf101")
    assert [problem.split(":")[0] for problem in found] == ["2", "3", "4", "5", "6", "7"]
    words = [
        "1 to 2",
        "count from 1",
        "is class 'A' here",
        "did you mean 'Archery'",
        "neither label nor folder",
        "gone",
    ]
    for problem, word in zip(found, words, strict=True):
        assert word in problem


@pytest.fixture
def hmdb51(write, tmp_path):
    for split in "12":
        for name in ("wave", "brush_hair"):
            text = f"{name}_a.avi {split} \n#20_{name}_b.avi {3 - int(split)} \nc.avi 0 \n"
            write(f"{name}_test_split{split}.txt", text)
            touch(tmp_path, f"{name}/{name}_a.avi", f"{name}/#20_{name}_b.avi")
    return tmp_path


def test_hmdb51(hmdb51):
    manifest = read_manifest(hmdb51, {"split": "1", "subset": "train"}, format="hmdb51")
    assert manifest.classes == ("brush_hair", "wave")
    assert columns(manifest, "sample_id", "label") == [["brush_hair/brush_hair_a.avi", "wave/wave_a.avi"], [0, 1]]
    manifest = read_manifest(hmdb51, {"split": "2", "subset": "train"}, format="hmdb51")
    assert columns(manifest, "uri") == [[f"{hmdb51}/{c}/#20_{c}_b.avi" for c in ("brush_hair", "wave")]]


def test_every_defect_of_hmdb51(hmdb51, write):
    assert len(problems(hmdb51, format="hmdb51")) == 2
    (problem,) = problems(hmdb51, {"split": "4", "subset": "test"}, format="hmdb51")
    assert "one of 1, 2" in problem
    write("wave_test_split1.txt", "gone.avi 1\nbad.avi 3\n#20_wave_b.avi 2\n#20_wave_b.avi 2\n")
    found = problems(hmdb51, {"split": "1", "subset": "train"}, format="hmdb51")
    assert [problem.split(":")[0] for problem in found] == ["/wave_test_split1.txt"] * 3
    for problem, word in zip(found, [":1: no video", ":2: 'bad.avi 3'", ":4: path"], strict=True):
        assert word in problem
    (problem,) = problems(write("empty/readme", "x").parent, {"split": "1"}, format="hmdb51")
    assert "no <class>_test_split<k>.txt" in problem


# Parquet --------------------------------------------------------------------------------------------------------------


def parquet(file, metadata=None, /, **data):
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(data)
    pq.write_table(table.replace_schema_metadata(metadata), file, row_group_size=2)
    return file


def test_parquet_with_paths(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    path = parquet(
        tmp_path / "m.parquet",
        uri=["a.mp4", "b.mp4", "c.mp4"],
        label=[1, 0, 1],
        fold=[1, 1, 2],
        **{"class": list("yxy")},
    )
    manifest = read_manifest(path, {"fold": "1"})
    assert manifest.classes == ("x", "y")
    assert columns(manifest, "sample_id", "uri", "label") == [
        ["a.mp4", "b.mp4"],
        [str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")],
        [1, 0],
    ]
    named = parquet(tmp_path / "named.parquet", path=["a.mp4", "b.mp4"], label=["run", "jump"], sample_id=[7, 8])
    assert columns(read_manifest(named), "sample_id", "label") == [["7", "8"], [1, 0]]


def test_parquet_with_videos_inside(tmp_path, monkeypatch):
    for part, shift in (("00000", 0), ("00001", 3)):
        parquet(
            tmp_path / f"shards/{part}.parquet",
            {b"classes": json.dumps(["x", "y", "unused"]).encode()},
            data=[f"video {i + shift}".encode() for i in range(3)],
            label=[0, 1, 0],
        )
    monkeypatch.setattr(storage, "read_bytes", None)  # nothing may read a video
    manifest = read_manifest(tmp_path / "shards", format="parquet")
    monkeypatch.undo()
    assert manifest.classes == ("x", "y", "unused")
    assert manifest.rows["sample_id"].to_pylist() == [f"0000{i}.parquet#{j}" for i in (0, 1) for j in range(3)]
    assert [storage.read_bytes(uri) for uri in manifest.rows["uri"].to_pylist()] == [
        f"video {i}".encode() for i in range(6)
    ]
    single = read_manifest(tmp_path / "shards/00001.parquet")
    assert storage.read_bytes(single.rows["uri"][2].as_py()) == b"video 5"


def test_lists_may_point_into_parquet_files(write, tmp_path):
    parquet(tmp_path / "shards/00000.parquet", data=[b"a", b"b", b"c"])
    path = write("m.csv", "path,label\nshards/00000.parquet#2,0\nshards/00000.parquet#0,1\n")
    assert storage.read_bytes(read_manifest(path).rows["uri"][0].as_py()) == b"c"
    path = write("m.csv", "path,label\nshards/00000.parquet#3,0\nshards/1.parquet#0,1\n")
    first, second = problems(path)
    assert "2: no row 3" in first
    assert "which has 3" in first
    assert "3: no video file" in second


@pytest.mark.parametrize(
    ("data", "where", "words"),
    [
        ({"label": [0]}, {}, ["no column uri, path or data"]),
        ({"uri": ["a"]}, {}, ["no column label"]),
        ({"data": [b"a"], "label": [0.5]}, {}, ["#0: label 0.5 is not a whole number"]),
        ({"uri": ["a"], "label": [True]}, {}, ["label has type bool"]),
        ({"data": ["a"], "label": [0]}, {}, ["data has type string"]),
        ({"uri": [1], "label": [0]}, {}, ["uri has type int64"]),
        ({"data": [b"a"], "label": [0]}, {"data": "a"}, ["no column 'data' to filter by"]),
        ({"data": [b"a"], "label": [0]}, {"fold": "a"}, ["no column 'fold' to filter by"]),
        ({"data": [b"a", b"b"], "label": [0, None]}, {}, ["#1: label is empty"]),
        ({"data": [b"a", None], "label": [0, 0]}, {}, ["1 rows of row group 0 have no data"]),
        ({"uri": ["a.mp4", None], "label": [0, 0]}, {}, ["#1: path is empty"]),
        (
            {"uri": ["a.mp4", "gone", "./a.mp4"], "label": [0, 0, 2]},
            {},
            ["no row has label 1", "#1: no video", "row 0"],
        ),
        (
            {"data": [b"a", b"b"], "label": [0, 0], "sample_id": ["x", "x"]},
            {},
            ["#1: sample_id 'x' is already in row 0"],
        ),
        ({"data": pa.array([], pa.binary()), "label": pa.array([], pa.int8())}, {}, ["has no rows"]),
    ],
)
def test_a_bad_parquet_file(tmp_path, data, where, words):
    touch(tmp_path, "a.mp4")
    found = problems(parquet(tmp_path / "m.parquet", **data), where)
    assert len(found) == len(words)
    for problem, word in zip(found, words, strict=True):
        assert word in problem


def test_bad_class_names_in_a_parquet_file(tmp_path):
    (problem,) = problems(parquet(tmp_path / "m.parquet", {b"classes": b"x"}, data=[b"a"], label=[0]))
    assert "must be a JSON list" in problem
    (problem,) = problems(parquet(tmp_path / "m.parquet", {b"classes": b'["x"]'}, data=[b"a"], label=[1]))
    assert "#0: label 1 is out of range" in problem
    (problem,) = problems(parquet(tmp_path / "m.pq", data=[b"a"], label=[1]), format="parquet")
    assert "ends in .parquet" in problem


# All formats ----------------------------------------------------------------------------------------------------------

LISTS = ("csv", "kinetics", "ssv1", "ssv2", "ucf101")


@pytest.mark.parametrize("format", LISTS)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ""),
        (b"\x1aE\xdf\xa3\x00\x01\xff", "not UTF-8"),
        (b"a\nb\x00", "2: not UTF-8"),
        (b"\n \n", ""),
        (None, "no such"),
    ],
)
def test_a_file_that_is_no_list(write, tmp_path, format, content, words):
    path = write("list", content) if content is not None else tmp_path / "nowhere"
    (problem,) = problems(path, format=format, classes=write("labels.json", LABELS))
    assert words in problem


@pytest.mark.parametrize("format", [*LISTS, "auto"])
@given(content=st.one_of(st.binary(max_size=60), st.text('01ab ,;.[]{}":\n\r\ufeff', max_size=60).map(str.encode)))
def test_any_bytes_make_a_manifest_error(tmp_path_factory, format, content):
    folder = tmp_path_factory.getbasetemp()
    (folder / "any").write_bytes(content)
    (folder / "any.json").write_text(json.dumps(LABELS))
    for classes in (folder / "any.json", folder / "any"):
        with pytest.raises(ManifestError):
            read_manifest(folder / "any", format=format, classes=classes)


def test_a_parquet_file_that_is_none(write):
    (problem,) = problems(write("m.parquet", "path,label\n"))
    assert "cannot be read" in problem


@pytest.mark.parametrize("format", LISTS)
def test_a_folder_in_place_of_a_file(tmp_path, format):
    (problem,) = problems(tmp_path, format=format)
    assert "is a folder; expected a file" in problem


@pytest.mark.parametrize("format", ["folder", "hmdb51"])
def test_a_file_in_place_of_a_folder(write, format):
    (problem,) = problems(write("l.txt", "x"), format=format)
    assert "is a file; expected a folder" in problem


@pytest.mark.parametrize(("format", "text"), [("ssv1", "1;Folding something"), ("ssv2", SSV2)])
def test_formats_that_need_a_class_file(write, tmp_path, format, text):
    (problem,) = problems(write("list", text), format=format)
    assert f"something-something-v{format[-1]}-labels" in problem
    (problem,) = problems(tmp_path / "list", format=format, classes=tmp_path / "nowhere.txt")
    assert "nowhere.txt: no such file" in problem


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("", ["the file is empty"]),
        ("run\nwalk\nrun\n", ["3: class 'run' is listed twice"]),
        ("0,run\n1,walk\n1,jump\n", ["3: id 1 is class 'jump' here, but 'walk' above"]),
        ("0,run\n2,walk\n", ["no class has id 1"]),
        ("0,run\n1,walk\njump\n2,fly\n", ["3: 'jump' has no id"]),
        ('{"run": 0,\n "walk"}', ["2: malformed JSON in column"]),
        ('{"run": "first"}', ["1: expected a JSON object"]),
        ("[" * 100000, [""]),
        (b"\xff\xfe", ["1: not UTF-8"]),
    ],
)
def test_bad_class_files(write, tmp_path, names, words):
    path = write("names.txt", names)
    touch(tmp_path, "a.mp4")
    with pytest.raises(ManifestError) as caught:
        read_manifest(write("l", "a.mp4 0"), format="kinetics", classes=path)
    found = caught.value.problems
    assert len(found) == len(words)
    for problem, word in zip(found, words, strict=True):
        assert problem.startswith(str(path))
        assert word in problem


def test_class_files_serve_every_format(write, tmp_path):
    touch(tmp_path / "tree", "run/a.mp4", "walk/b.mp4")
    classes = write("names.txt", "walk\nrun\n")
    manifest = read_manifest(tmp_path / "tree", classes=classes)
    assert manifest.classes == ("walk", "run")
    assert columns(manifest, "label") == [[1, 0]]
    path = write("m.csv", "path,label,class\nrun/a.mp4,1,run\nwalk/b.mp4,1,walk\n")
    (problem,) = problems(path, root=tmp_path / "tree", classes=classes)
    assert "3: label 1 is class 'walk' here, but 'run' in" in problem


def test_lists_without_columns_take_no_filter(write, tmp_path):
    touch(tmp_path, "a.mp4")
    (problem,) = problems(write("l", "a.mp4 0"), {"split": "1"}, format="kinetics")
    assert "remove `where`" in problem


def test_unknown_format_and_root(write, tmp_path):
    (problem,) = problems(write("l", "a.mp4 0"), format="kinetic")
    assert "did you mean 'kinetics'" in problem
    with pytest.raises(ManifestError, match="`root` must be the folder"):
        read_manifest(tmp_path / "l", format="kinetics", root=tmp_path / "nowhere")


def test_a_name_that_no_file_can_have(write):
    path = write("t.json", '[\n{"id": "\\ud800", "template": "x"}\n]')
    (problem,) = problems(path, format="ssv2", classes=write("c.json", '["x"]'))
    assert problem.startswith("2: is not valid UTF-8")


# Images ---------------------------------------------------------------------------------------------------------------

IMAGES = ("cat/b.JPEG", "cat/deep/a.webp", "dog/a.png", "dog/notes.txt", "dog/.c.png", ".git/x.png", "README")


def test_a_tree_of_images(tmp_path):
    root = touch(tmp_path / "{root}", *IMAGES)
    manifest = read_manifest(root, format="images")
    assert manifest.classes == ("cat", "dog")
    names = ["cat/b.JPEG", "cat/deep/a.webp", "dog/a.png"]
    escaped = str(root).replace("{root}", "{{root}}")
    assert manifest.rows.to_pydict() == {
        "sample_id": names,
        "uri": [f"{escaped}/{name}" for name in names],
        "label": [0, 0, 1],
        "frames": [1] * 3,
    }
    assert [uri.format(1) for uri in manifest.rows["uri"].to_pylist()] == [f"{root}/{name}" for name in names]


def test_a_tree_of_images_is_found_out_where_it_can_be_nothing_else(tmp_path):
    assert read_manifest(touch(tmp_path / "a", "cat/1.jpg", "dog/1.jpg")).rows["frames"].to_pylist() == [1, 1]
    videos = read_manifest(touch(tmp_path / "b", "cat/1.jpg", "cat/1.mp4", "dog/1.mp4"))
    assert columns(videos, "sample_id", "frames") == [["cat/1.mp4", "dog/1.mp4"], [None, None]]
    for tree in (touch(tmp_path / "c", "cat/video/1.jpg", "dog/1.jpg"), touch(tmp_path / "d", "cat/1.jpg")):
        options = {} if tree.name == "c" else {"format": "folder"}
        for problem in problems(tree, **options):
            assert re.search(r"(cat|dog): holds no videos .* set `format: images`", problem)


def test_a_bad_tree_of_images(tmp_path):
    found = problems(touch(tmp_path, "cat/a.jpg", "empty/v.mp4", "stray.png"), format="images")
    assert len(found) == 2
    assert "stray.png: is not in a class folder; move it to" in found[0]
    assert "empty: holds no images (.bmp .jpeg" in found[1]


def test_lists_of_images(write, tmp_path):
    touch(tmp_path, "a.jpg", "b{0}.png")
    path = write("m.csv", "path,label,part\na.jpg,cat,1\nb{0}.png,dog,2\n")
    manifest = read_manifest(path, {"part": "2"}, format="images")
    assert columns(manifest, "uri", "label", "frames") == [[f"{tmp_path}/b{{{{0}}}}.png"], [1], [1]]
    (problem,) = problems(write("n.csv", "path,label\na.jpg,0\nc.jpg,0\n"), format="images")
    assert problem.startswith("3: no image file")
    parquet(tmp_path / "shards/0.parquet", data=[b"a", b"b"], label=["cat", "dog"])
    for path in (tmp_path / "shards", tmp_path / "shards/0.parquet"):
        manifest = read_manifest(path, format="images")
        assert columns(manifest, "uri", "frames") == [[f"{tmp_path}/shards/0.parquet#{i}" for i in (0, 1)], [1, 1]]
    uris = parquet(tmp_path / "uris.parquet", uri=["a.jpg"], label=[0])
    assert columns(read_manifest(uris, format="images"), "uri", "frames") == [[f"{tmp_path}/a.jpg"], [1]]


# Object stores --------------------------------------------------------------------------------------------------------


@pytest.fixture
def store():
    """A folder of fsspec's in-memory store: its URI, and a function that writes a file into it."""
    system = fsspec.filesystem("memory")

    def put(name, content=b""):
        system.pipe_file(f"/bucket/{name}", content.encode() if isinstance(content, str) else content)
        return f"memory://bucket/{name}"

    put("made")
    yield put
    system.rm("/bucket", recursive=True)


def test_lists_and_videos_on_an_object_store(store):
    path = store("lists/val.csv", OFFICIAL)
    store("videos/testifying/---QUuC4vJs_000084_000094.mp4")
    store("videos/--3ouPhoy2A_000020_000030.mkv")
    manifest = read_manifest(path, {"split": "validate"}, format="kinetics", root="memory://bucket/videos")
    assert manifest.rows["uri"].to_pylist() == [
        "memory://bucket/videos/testifying/---QUuC4vJs_000084_000094.mp4",
        "memory://bucket/videos/--3ouPhoy2A_000020_000030.mkv",
    ]
    found = problems(path, format="kinetics", root="memory://bucket/videos")
    assert [problem.split(":")[0] for problem in found] == ["4"]


@pytest.mark.parametrize("format", ["folder", "images"])
def test_links_of_a_tree_are_followed(tmp_path, format):
    """To folders and files; a class may be collected from many places. A link to a folder around it ends there."""
    suffix = "mp4" if format == "folder" else "jpg"
    touch(tmp_path, f"tree/a/0.{suffix}", f"tree/b/1.{suffix}", f"other/2.{suffix}", f"other/deep/3.{suffix}")
    tree = tmp_path / "tree"
    (tree / "a" / "more").symlink_to(tmp_path / "other")
    (tree / "b" / "link").symlink_to("../a/more/deep")
    (tree / "c").symlink_to("../other")
    (tree / "b" / f"4.{suffix}").symlink_to(tmp_path / "other" / f"2.{suffix}")
    (tree / "a" / "round").symlink_to("../a")
    (tmp_path / "other" / "up").symlink_to(tree)
    found = read_manifest(str(tree), format=format).rows["uri"].to_pylist()
    paths = ["a/0", "a/more/2", "a/more/deep/3", "b/1", "b/4", "b/link/3", "c/2", "c/deep/3"]
    assert found == [f"{tree}/{path}.{suffix}" for path in paths]


def test_a_folder_on_an_object_store(store):
    for name in ("walk/b.MP4", "walk/deep/a.webm", "run/a.mp4", "run/notes.txt", "run/.c.mp4", ".git/x.mp4"):
        store(f"tree/{name}")
    manifest = read_manifest("memory://bucket/tree")
    assert manifest.classes == ("run", "walk")
    assert columns(manifest, "sample_id", "uri") == [
        names := ["run/a.mp4", "walk/b.MP4", "walk/deep/a.webm"],
        [f"memory://bucket/tree/{name}" for name in names],
    ]


def test_images_on_an_object_store(store):
    for name in ("cat/b.JPEG", "dog/a.png", "dog/notes.txt"):
        store(f"images/{name}")
    for format in ("images", "auto"):
        manifest = read_manifest("memory://bucket/images", format=format)
        names = [f"memory://bucket/images/{name}" for name in ("cat/b.JPEG", "dog/a.png")]
        assert columns(manifest, "uri", "frames") == [names, [1, 1]]


def test_frame_folders_on_an_object_store(store):
    for i in (1, 2):
        store(f"frames/7/{i:05d}.jpg")
    options = {
        "format": "ssv1",
        "root": "memory://bucket/frames",
        "classes": store("labels.csv", "Folding something\n"),
    }
    for path in (store("list.txt", "7 2 0\n"), store("official.csv", "7;Folding something\n")):
        manifest = read_manifest(path, **options)
        assert columns(manifest, "uri", "frames") == [["memory://bucket/frames/7/{:05d}.jpg"], [2]]


def test_the_other_formats_on_an_object_store(store, tmp_path):
    store("ucf/classInd.txt", "1 A\n2 B\n")
    store("ucf/B/v.avi")
    assert columns(read_manifest(store("ucf/list.txt", "B/v.avi\n"), format="ucf101"), "label") == [[1]]
    store("hmdb/wave_test_split1.txt", "a.avi 1\n")
    store("hmdb/wave/a.avi")
    manifest = read_manifest("memory://bucket/hmdb", {"split": "1", "subset": "train"}, format="hmdb51")
    assert manifest.rows["uri"].to_pylist() == ["memory://bucket/hmdb/wave/a.avi"]
    content = parquet(tmp_path / "x.parquet", data=[b"a", b"b"], label=[0, 0]).read_bytes()
    store("shards/0.parquet", content)
    for path in ("memory://bucket/shards", "memory://bucket/shards/0.parquet"):
        manifest = read_manifest(path, format="parquet")
        assert storage.read_bytes(manifest.rows["uri"][1].as_py()) == b"b"


def test_an_object_store_that_does_not_answer(store, write, monkeypatch):
    for uri in ("nosuchscheme://bucket/list.csv", "memory://bucket/nowhere.csv"):
        (problem,) = problems(uri)
        assert "no such" in problem or "no file system" in problem
    path = write("l", "a.mp4 0")
    (problem,) = problems(path, format="kinetics", root="nosuchscheme://bucket")
    assert problem.startswith("nosuchscheme://bucket/a.mp4: cannot be read")

    def fail(uris):
        raise OSError("connection refused")

    monkeypatch.setattr(storage, "are_files", fail)
    (problem,) = problems(path, format="kinetics", root="memory://bucket")
    assert "memory://bucket/a.mp4: cannot be read (connection refused)" in problem
