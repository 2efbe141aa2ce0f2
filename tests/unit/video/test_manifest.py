"""Manifests: rows read from CSV files and folders, and every problem reported with file and line.

The lists of published data sets are in ``test_formats.py``.
"""

import pickle
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posmlp import storage
from posmlp.video.manifest import ManifestError, read_manifest


@pytest.fixture
def write(tmp_path):
    """Write a manifest, and empty files for the videos it may name."""
    for name in ("a.mp4", "b.mp4", "c, d.mp4", "sub/e.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def write(text):
        path = tmp_path / "m.csv"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def problems(path, where=None):
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, where or {})
    assert str(caught.value).startswith(f"{len(caught.value.problems)} problem")
    return [problem.removeprefix(f"{path}:") for problem in caught.value.problems]


def test_a_csv_file(write, tmp_path):
    path = write(
        '\ufeffpath,label,class,group\r\na.mp4,1,jump,A\r\n"c, d.mp4",0,"go, on",B\r\n\r\nsub/e.mp4, 1 ,jump,A\r\n'
    )
    manifest = read_manifest(str(path))
    assert manifest.classes == ("go, on", "jump")
    assert manifest.rows.schema == pa.schema(
        [("sample_id", pa.string()), ("uri", pa.string()), ("label", pa.int32()), ("frames", pa.int32())]
    )
    assert manifest.rows.to_pydict() == {
        "sample_id": ["a.mp4", "c, d.mp4", "sub/e.mp4"],
        "uri": [str(tmp_path / name) for name in ("a.mp4", "c, d.mp4", "sub/e.mp4")],
        "label": [1, 0, 1],
        "frames": [None] * 3,
    }


def test_absolute_paths_and_a_relative_manifest(write, tmp_path, monkeypatch):
    write(f"label,path\n0,{tmp_path}/a.mp4\n1,./b.mp4\n")
    monkeypatch.chdir(tmp_path)
    manifest = read_manifest("m.csv")
    assert manifest.rows["uri"].to_pylist() == [str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")]
    assert manifest.rows["sample_id"].to_pylist() == [f"{tmp_path}/a.mp4", "./b.mp4"]
    assert manifest.classes == ("0", "1")


def test_labels_may_be_names(write):
    manifest = read_manifest(write("path,label\na.mp4,walk\nb.mp4,run\nsub/e.mp4,walk\n"))
    assert manifest.classes == ("run", "walk")
    assert manifest.rows["label"].to_pylist() == [1, 0, 1]


def test_where_filters_rows_but_not_classes(write):
    path = write("path,label,class,group,side\na.mp4,0,x,A,l\nb.mp4,1,y,B,l\nsub/e.mp4,2,z,B,r\nmissing.mp4,2,z,C,r\n")
    manifest = read_manifest(path, {"group": "B", "side": "r"})
    assert manifest.rows["sample_id"].to_pylist() == ["sub/e.mp4"]
    assert manifest.rows["label"].to_pylist() == [2]
    assert manifest.classes == ("x", "y", "z")


def test_named_labels_keep_their_ids_in_a_filtered_split(write):
    path = write("path,label,group\na.mp4,walk,A\nb.mp4,run,B\n")
    assert read_manifest(path, {"group": "A"}).rows["label"].to_pylist() == [1]


def test_all_problems_are_reported_at_once_with_their_lines(write):
    path = write(
        "path,label,class\n"
        "a.mp4,0,x\n"
        "b.mp4,one,y\n"
        "sub/e.mp4,-2,y\n"
        "./a.mp4,0,x\n"
        "nowhere.mp4,1,y\n"
        "too,many,values,here\n"
        ",0,x\n"
    )
    found = problems(path, {"group": "A"})
    assert [problem.split(":")[0] for problem in found] == ["1", "3", "4", "5", "6", "7", "8"]
    for problem, word in zip(
        found, ["'group'", "'one'", "-2", "line 2", "nowhere.mp4", "4 values", "path is empty"], strict=True
    ):
        assert word in problem


def test_a_row_after_a_quoted_line_break_has_the_right_line(write):
    path = write('path,label,note\na.mp4,0,"two\nlines"\nb.mp4,zero,x\n')
    assert [problem.split(":")[0] for problem in problems(path)] == ["4"]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", "1", "no header"),
        ("path,label\n", "2", "no rows"),
        ("file,label\na.mp4,0\n", "1", "no column path"),
        ("a.mp4 0\nb.mp4 1\n", "1", "no column path and no column label"),
        ("path,label,label\na.mp4,0,0\n", "1", "'label' appears twice"),
        ('path,label\na.mp4,0\n"b.mp4,0\n', "3", "malformed CSV"),
        (b"path,label\na.mp4,0\n\xff\xfe,0\n", "3", "not UTF-8"),
        ("path,label\na.mp4,0\nb.mp4,2\nsub/e.mp4,4\n", "1", "no row has label 1, 3, yet labels go up to 4"),
        ("path,label\na.mp4,0\nb.mp4,99999999999\n", "1", "no row has label 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ..."),
        ("path,label\na.mp4,0\nb.mp4,1.5\n", "3", "label 1.5 is not a whole number"),
        ("path,label\na.mp4,walk\nb.mp4,\n", "3", "label is empty"),
        ("path,label\na.mp4,0\na.mp4,0\n", "3", "is already in line 2"),
        ("path,label\na.mp4,0\ngone.mp4,0\n", "3", "no video file"),
        ("path,label\na.mp4,0\nsub,0\n", "3", "no video file"),
        ("path,label,class\na.mp4,0,x\nb.mp4,0,y\n", "3", "label 0 is class 'y' here, but 'x' in line 2"),
        ("path,label,class\na.mp4,0,x\nb.mp4,1,x\n", "3", "class 'x' has label 1 here, but another in line 2"),
        ("path,label,class\na.mp4,0,\n", "2", "class is empty"),
    ],
)
def test_a_bad_csv_file(write, text, line, words):
    (problem,) = problems(write(text))
    assert problem.startswith(f"{line}: ")
    assert words in problem


def test_a_filter_that_matches_no_row_lists_the_values(write):
    path = write("path,label,group\na.mp4,0,A\nb.mp4,0,C\n")
    assert problems(path, {"group": "B"}) == ["1: no row has group=B (`where`); in the file group is A, C"]


def test_many_problems_are_counted_but_not_all_listed(write):
    path = write("path,label\n" + "".join(f"gone{i}.mp4,0\n" for i in range(50)))
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    lines = str(caught.value).splitlines()
    assert "50 problems" in lines[0]
    assert lines[-1].strip() == "... and 30 more"
    assert len(lines) == 22
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_nothing_there(tmp_path):
    (problem,) = problems(tmp_path / "nowhere")
    assert "no such file or folder" in problem


def tree(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_a_folder(tmp_path):
    root = tree(
        tmp_path, "walk/b.MP4", "walk/deep/a.webm", "run/a.mp4", "run/notes.txt", "run/.c.mp4", ".git/x.mp4", "README"
    )
    manifest = read_manifest(root)
    assert manifest.classes == ("run", "walk")
    assert manifest.rows.to_pydict() == {
        "sample_id": ["run/a.mp4", "walk/b.MP4", "walk/deep/a.webm"],
        "uri": [str(root / name) for name in ("run/a.mp4", "walk/b.MP4", "walk/deep/a.webm")],
        "label": [0, 1, 1],
        "frames": [None] * 3,
    }


def test_every_problem_of_a_folder_is_reported(tmp_path):
    root = tree(tmp_path, "walk/a.mp4", "empty/readme.txt", "stray.avi")
    found = problems(root, {"group": "A"})
    assert len(found) == 3
    for problem, words in zip(
        found, ["`where`", "stray.avi: is not in a class folder", "holds no videos"], strict=True
    ):
        assert words in problem


def test_a_folder_without_classes(tmp_path):
    (problem,) = problems(tmp_path)
    assert "no class folders" in problem


# Where videos may lie -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "../m.mp4",
        "sub/../../m.mp4",
        "/etc/hostname",
        "//etc/hostname",
        "file:///etc/hostname",
        "s3://b/x",
        "http://h/x",
    ],
)
def test_a_path_outside_the_root_is_refused(write, tmp_path, path):
    (tmp_path.parent / "m.mp4").touch()
    text = f"path {path!r} is outside {tmp_path}, which must hold all listed videos; correct it, or set `root`"
    assert problems(write(f"path,label\n{path},0\na.mp4,0\n"))[0].startswith(f"2: {text}")


def test_a_password_in_a_list_is_not_shown(write):
    (problem,) = problems(write("path,label\ns3://me:hushhush@bucket/x.mp4,0\na.mp4,0\n"))
    assert "path 's3://bucket/x.mp4' is outside" in problem


@pytest.mark.parametrize(
    ("format", "text", "value"),
    [
        ("kinetics", "../m.mp4 0\na.mp4 0\n", "../m.mp4"),
        ("kinetics", "label,youtube_id,time_start,time_end,split\nx,../../m,1,2,train\n", "../../m_000001_000002.mp4"),
        ("ssv1", "../m 3 0\n", "../m"),
        ("ssv1", "/etc 3 0\n", "/etc"),
        ("ucf101", "x/../../m.avi 1\n", "x/../../m.avi"),
        ("images", "path,label\n../m.png,0\n", "../m.png"),
    ],
)
def test_a_path_outside_the_root_is_refused_in_every_format(write, format, text, value):
    with pytest.raises(ManifestError) as caught:
        read_manifest(write(text), format=format)
    assert any(f"path {value!r} is outside" in problem for problem in caught.value.problems)


def test_a_label_leads_nowhere_else(tmp_path):
    """Kinetics videos may also be in a folder with the label's name."""
    (tmp_path / "root").mkdir()
    (tmp_path / "x_000001_000002.mp4").touch()
    list_ = tmp_path / "root" / "list.csv"
    list_.write_text("label,youtube_id,time_start,time_end\n..,x,1,2\n")
    with pytest.raises(ManifestError, match="no video file"):
        read_manifest(list_, format="kinetics")


def test_a_wider_root_takes_them(write, tmp_path):
    path = write(f"path,label\n{tmp_path}/a.mp4,0\n{tmp_path}/sub/e.mp4,1\n")
    for root in (tmp_path, tmp_path.parent, "/"):
        manifest = read_manifest(path, root=root)
        assert manifest.rows["uri"].to_pylist() == [f"{tmp_path}/a.mp4", f"{tmp_path}/sub/e.mp4"]
        assert manifest.root == str(root)
    with pytest.raises(ManifestError, match="1 problem"):
        read_manifest(path, root=tmp_path / "sub")


PARTS = st.sampled_from(["..", ".", "", "a", "b", "...", "a..", "~", "%2e%2e", "\\\\..", "root", "rooted"])


@given(st.lists(PARTS, min_size=1, max_size=6).map("/".join), st.booleans())
def test_a_path_outside_the_folder_is_not_inside(path, absolute):
    root = Path("/nowhere/2/3/4/5/6/root")
    written = f"{root}/{path}" if absolute else path
    truth = (root / written).resolve()
    assert storage.is_inside(storage.join(str(root), written), str(root)) == (root in truth.parents)


@given(st.lists(PARTS, min_size=1, max_size=6).map("/".join))
def test_a_uri_outside_the_folder_is_not_inside(path):
    folder = "s3://bucket/root?region=r"
    inside = storage.is_inside(storage.join(folder, path), folder)
    if inside:  # also where the store takes dots as a file system does
        assert Path("/bucket/root") in Path("/bucket/root", path).resolve().parents
    elif path and not path.startswith("/"):
        assert {"..", "."} & {*path.split("/")}


@pytest.mark.parametrize(
    "uri",
    ["s3://other/set/a", "s3://bucket/sets/a", "gs://bucket/set/a", "s3://bucket/set/a?endpoint_override=evil:80"],
)
def test_another_store_is_outside(uri):
    assert not storage.is_inside(storage.join("s3://bucket/set", uri), "s3://bucket/set")
    assert not storage.is_inside(storage.join("/data", uri), "/data")
