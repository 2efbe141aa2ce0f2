"""Labels and class names: numbers in any form are numbers, names match in any spelling, splits share one class list."""

import csv
import io
import json
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.runs import checkpoints
from pipelines.runs.models import known_classes
from pipelines.training.preflight import check_data, list_fingerprint, read_splits
from posmlp.config import load_recipe
from posmlp.errors import UserError
from posmlp.learn.evaluation import ClassificationMetrics
from posmlp.metrics import VAL_CLASS_MEAN, VAL_TOP1
from posmlp.video.augment import flip_labels
from posmlp.video.classes import ClassIndex, KnownClasses, in_order, list_names, number_or_name, same_name
from posmlp.video.manifest import ManifestError, read_manifest, read_split, training_classes


@pytest.fixture
def write(tmp_path):
    """Write a file below the test's folder, and return its path."""

    def write(name, content=""):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.fixture
def videos(write):
    """Empty files ``0.mp4`` to ``11.mp4``; their names say which label they should get."""
    return [write(f"{i}.mp4") for i in range(12)]


def labels_of(manifest):
    return dict(zip(manifest.rows["sample_id"].to_pylist(), manifest.rows["label"].to_pylist(), strict=True))


def problems(path, where=None, **options):
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, where or {}, **options)
    return [problem.removeprefix(str(path)) for problem in caught.value.problems]


# Number or name -------------------------------------------------------------------------------------------------------

RIGHT = {f"{i}.mp4": i for i in range(12)}
FORMS = {  # how labels 0 to 11 are written in a cell
    "integer": str,
    "float": lambda i: f"{float(i)}",
    "point": lambda i: f"{i}.",
    "many zeros": lambda i: f"{i}.000",
    "signed": lambda i: f"+{i}",
    "padded": lambda i: f"{i:04d}",
    "blanks": lambda i: f"  {i}.0 ",
    "exponent": lambda i: f"{i / 10}e1",
    "quoted": lambda i: f'"{i}"',
    "quoted float": lambda i: f'"{i}.0"',
    "single quotes": lambda i: f"'{i}'",
    "mixed": lambda i: f"{i}" if i % 2 else f"{i}.0",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_numbers_in_a_csv_file(write, videos, form, quoting):
    text = io.StringIO()
    table = csv.writer(text, quoting=quoting)
    table.writerows([("path", "label"), *((video.name, FORMS[form](i)) for i, video in enumerate(videos))])
    manifest = read_manifest(write("list.csv", text.getvalue()))
    assert labels_of(manifest) == RIGHT
    assert manifest.classes == tuple(str(i) for i in range(12))
    named = read_manifest(write("list.csv", text.getvalue()), classes=write("names.txt", "\n".join("abcdefghijkl")))
    assert labels_of(named) == RIGHT


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("separator", [" ", ",", ", ", "\t"])
def test_numbers_in_the_lines_of_a_list(write, videos, form, separator):
    lines = [f"{video.name}{separator}{FORMS[form](i)}" for i, video in enumerate(videos)]
    assert labels_of(read_manifest(write("list.txt", "\n".join(lines)), format="kinetics")) == RIGHT
    quoted = [f'"{video.name}"{separator}{FORMS[form](i)}' for i, video in enumerate(videos)]
    assert labels_of(read_manifest(write("list.txt", "\n".join(quoted)), format="kinetics")) == RIGHT


@pytest.mark.parametrize("form", ["integer", "float", "signed", "padded", "quoted"])
def test_numbers_in_the_other_lists(write, form):
    for i in range(3):
        write(f"a/{i}.avi"), write(f"{i}/00001.jpg")
    image_lists = [f"{i} {FORMS[form](1)} {FORMS[form](i)}" for i in range(3)]
    assert labels_of(read_manifest(write("ssv1", "\n".join(image_lists)), format="ssv1")) == {"0": 0, "1": 1, "2": 2}
    ucf = "\n".join(f"a/{i}.avi {FORMS[form](1)}" for i in range(3))
    assert {*labels_of(read_manifest(write("ucf", ucf), format="ucf101")).values()} == {0}
    subsets = "\n".join(f"{i}.avi {FORMS[form](i)}" for i in range(3))
    write("splits/a_test_split1.txt", subsets)
    for subset, name in (("train", "a/1.avi"), ("test", "a/2.avi")):
        where = {"split": "1", "subset": subset}
        assert labels_of(read_manifest(write("splits/x").parent, where, format="hmdb51", root=write("x").parent)) == {
            name: 0
        }


COLUMNS = {
    "int8": pa.array(range(12), pa.int8()),
    "uint64": pa.array(range(12), pa.uint64()),
    "float": pa.array(np.arange(12.0)),
    "half": pa.array(np.arange(12, dtype=np.float16)),
    "decimal": pa.array([Decimal(i) for i in range(12)], pa.decimal128(5, 2)),
    "text": pa.array(map(str, range(12))),
    "float text": pa.array(f"{float(i)}" for i in range(12)),
    "categories": pa.array(map(str, range(12))).dictionary_encode(),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_numbers_in_a_parquet_file(tmp_path, videos, kind):
    table = pa.table({"uri": [video.name for video in videos], "label": COLUMNS[kind]})
    pq.write_table(table, tmp_path / "list.parquet")
    manifest = read_manifest(tmp_path / "list.parquet")
    assert labels_of(manifest) == RIGHT
    assert manifest.classes == tuple(str(i) for i in range(12))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["0", "3.5"], ":3: label 3.5 is not a whole number; write 0, 1, 2, ..., or a class name"),
        (["run", "3.5"], ":3: label 3.5 is not a whole number"),
        (["0", "-1"], ":3: label -1 is negative"),
        (["0", "-1.0"], ":3: label -1 is negative"),
        (["0", "1e30"], ":3: label 1e+30 is not a whole number"),
        (["0", "9" * 400], ":3: label inf is not a whole number"),
        (["0", ""], ":3: label is empty"),
        (["0.0", "run"], ":3: label 'run' is not an integer, as other labels here are"),
        (["run", "1.0"], ":2: label 'run' is not an integer, as other labels here are"),
        (["0", "nan"], ":3: label 'nan' is not an integer"),
        (["0.0", "2.0"], ":1: no row has label 1, yet labels go up to 2"),
        (["0", "1,0"], ":3: label '1,0' is not an integer"),
    ],
)
def test_labels_that_are_refused(write, videos, labels, words):
    text = "path,label\n" + "".join(f'{i}.mp4,"{label}"\n' for i, label in enumerate(labels))
    (problem,) = problems(write("list.csv", text))
    assert problem.startswith(words)


@pytest.mark.parametrize("value", [float("nan"), None])
def test_gaps_in_a_column_of_numbers_have_their_row(tmp_path, videos, value):
    table = pa.table({"uri": ["0.mp4", "1.mp4", "2.mp4"], "label": pa.array([0.0, value, 2.5])})
    pq.write_table(table, tmp_path / "list.parquet")
    empty, fraction = problems(tmp_path / "list.parquet")
    assert empty.startswith("#1: label is empty") and fraction.startswith("#2: label 2.5 is not a whole number")


@pytest.mark.parametrize(
    "text",
    [
        "0.0 a b\n1.0 c\n2.0 d",
        "0,a b\n1,c\n2,d",
        "id,name\n0.0,a b\n1.0,c\n2.0,d",
        '"0","a b"\n"1","c"\n"2","d"',
        "name,id\n'a b',0.0\nc,1.0\nd,2.0",
        '"a b","0"\n"c","1"\n"d","2"',
        '{"a b": 0.0, "c": "1.0", "d": "+2"}',
        '{"0": "a b", "1": "c", "2.0": "d"}',
        " a b \n\"c\"\n'd'",
        '["a b", " c ", "\\"d\\""]',
    ],
)
def test_numbers_in_a_class_file(write, videos, text):
    list_ = write("list.csv", "path,label\n0.mp4,0\n1.mp4,2\n")
    assert read_manifest(list_, classes=write("classes", text)).classes == ("a b", "c", "d")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0.5,a\n1,b\n", "1: id 0.5 of class 'a' is not a whole number"),
        ('{"a": true, "b": 1}', "1: expected a JSON object"),
        ('{"a": 0.5}', "id 0.5 of class 'a' is not a whole number"),
        ("-1,a\n0,b\n", "no class has id 1"),
    ],
)
def test_numbers_of_classes_that_are_refused(write, videos, text, words):
    (problem,) = problems(write("list.csv", "path,label\n0.mp4,0\n"), classes=write("classes", text))
    assert words in problem


def test_class_names_may_begin_with_a_bracket(write, videos):
    classes = write("classes", "[Something] falling\nPushing [something]\n")
    list_ = write("list.csv", "path,label\n0.mp4,Something falling\n1.mp4,Pushing something\n")
    assert labels_of(read_manifest(list_, classes=classes)) == {"0.mp4": 0, "1.mp4": 1}


def test_folders_named_by_numbers_are_in_the_order_of_the_numbers(write, tmp_path):
    for i in range(12):
        write(f"tree/{i}/x.mp4")
    manifest = read_manifest(tmp_path / "tree")
    assert labels_of(manifest) == {f"{i}/x.mp4": i for i in range(12)}
    assert manifest.classes == tuple(str(i) for i in range(12))
    write("tree/other/x.mp4")
    assert read_manifest(tmp_path / "tree").classes == (*sorted(str(i) for i in range(12)), "other")
    assert in_order({"007", "10", "9"}) == ["007", "9", "10"]


def test_a_label_that_is_a_number_and_the_name_of_another_class(write, videos, tmp_path):
    names = sorted(str(i) for i in range(12))  # 0, 1, 10, 11, 2, ...
    classes = write("classes", "\n".join(names))
    list_ = write("list.csv", "path,label\n" + "".join(f"{i}.mp4,{i}\n" for i in range(12)))
    (problem,) = problems(list_, classes=classes)
    assert problem.startswith(":4: label 2 may be the number, or the class '2', which is number 4 in")
    assert "list the classes in the order of their numbers" in problem
    ordered = write("classes", "\n".join(str(i) for i in range(12)))
    assert labels_of(read_manifest(list_, classes=ordered)) == RIGHT
    # labels from 0 of classes 1 to 12: label 0 is no name, so all labels are numbers
    shifted = write("classes", "\n".join(str(i + 1) for i in range(12)))
    assert labels_of(read_manifest(list_, classes=shifted)) == RIGHT
    # stored as numbers, they are not names
    table = pa.table({"uri": [video.name for video in videos], "label": range(12)})
    pq.write_table(table.replace_schema_metadata({"classes": json.dumps(names)}), tmp_path / "list.parquet")
    assert labels_of(read_manifest(tmp_path / "list.parquet")) == RIGHT


@pytest.mark.parametrize(
    ("values", "wanted", "kept"),
    [
        ([1.0, 2.0, None], "1", 1),
        ([1.0, 2.0, None], "1.0", 1),
        ([1.5, 2.0, None], "1.5", 1),
        ([1, 1, 2], "1", 2),
        (["01", "1", "1.0"], "1", 1),
        (["01", "1", "1.0"], "01", 1),
        ([True, False, True], "true", 2),
        ([True, False, True], "False", 1),
    ],
)
def test_filters_of_a_parquet_file(tmp_path, videos, values, wanted, kept):
    table = pa.table({"uri": ["0.mp4", "1.mp4", "2.mp4"], "label": [0, 0, 0], "fold": values})
    pq.write_table(table, tmp_path / "list.parquet")
    assert len(read_manifest(tmp_path / "list.parquet", {"fold": wanted}).rows) == kept


def test_numbers_that_are_names_elsewhere():
    for text in ("1.2.3", "1_000", "0x10", "1e", "e1", "3 points", "1st", "--1", "+", ".", "", "nan", "inf"):
        assert number_or_name(text) == text
    assert number_or_name(str(2**53 - 1)) == 2**53 - 1
    assert isinstance(number_or_name(str(2**53)), float)


# Names ----------------------------------------------------------------------------------------------------------------

SPELLINGS = [
    "Pushing something",
    "Pushing [something]",
    '"Pushing something"',
    "'Pushing [something]'",
    "  Pushing  something ",
    "Pushing\u00a0something",
]


@pytest.mark.parametrize("in_list", SPELLINGS)
@pytest.mark.parametrize("in_file", SPELLINGS)
def test_spellings_of_a_class_match_between_list_and_class_file(write, in_list, in_file):
    for name in ("1.mp4", "1.webm", "1/00001.jpg"):
        write(name)
    classes = write("classes", ["Folding", in_file])
    text = io.StringIO()
    csv.writer(text).writerows([("path", "label"), ("1.mp4", in_list)])
    quoted = in_list if in_list.startswith(('"', "'")) else f'"{in_list}"'
    lists = {
        "csv": text.getvalue(),
        "kinetics": f"1.mp4,{quoted}\n",
        "ssv1": f"1;{in_list}\n",
        "ssv2": json.dumps([{"id": "1", "template": in_list}]),
    }
    for format, content in lists.items():
        manifest = read_manifest(write("list", content), format=format, classes=classes)
        assert manifest.rows["label"].to_pylist() == [1], format


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_a_class_match_the_known_classes(write, tmp_path, spelling):
    write("1.mp4"), write("tree/Pushing [something]/1.mp4")
    known = KnownClasses(("Folding", spelling), "the checkpoint", "")
    for other in SPELLINGS:
        text = io.StringIO()
        csv.writer(text).writerows([("path", "label"), ("1.mp4", other)])
        manifest = read_manifest(write("list.csv", text.getvalue()), known=known)
        assert (manifest.classes, labels_of(manifest)) == (known.names, {"1.mp4": 1})
        both = io.StringIO()
        csv.writer(both).writerows([("path", "label", "class"), ("1.mp4", 0, other)])
        assert labels_of(read_manifest(write("list.csv", both.getvalue()), known=known)) == {"1.mp4": 1}
        table = pa.table({"uri": ["1.mp4"], "label": [other]})
        pq.write_table(table, tmp_path / "list.parquet")
        assert labels_of(read_manifest(tmp_path / "list.parquet", known=known)) == {"1.mp4": 1}
    assert labels_of(read_manifest(tmp_path / "tree", known=known)) == {"Pushing [something]/1.mp4": 1}
    for other in SPELLINGS:
        assert flip_labels({other: "Folding"}, known.names, 2).tolist() == [1, 0]
        assert flip_labels({"[Folding]": other}, known.names, 3).tolist() == [1, 0, 2]


def test_a_class_in_two_spellings_of_an_accent(write, tmp_path):
    write("tree/Cafe\u0301/1.mp4"), write("1.mp4")
    classes = write("classes", "Bar\nCaf\u00e9\n")
    assert labels_of(read_manifest(tmp_path / "tree", classes=classes)) == {"Cafe\u0301/1.mp4": 1}


def test_names_that_differ_only_in_their_spelling_stay_apart():
    index = ClassIndex(["a b", "a [b]", "c"])
    assert [index.get(name) for name in ("a b", "a [b]", "c", " c ", "[a] b", "d")] == [0, 1, 2, 2, -1, -1]
    assert same_name("A") != same_name("a")
    with pytest.raises(UserError, match="no class '\\[a\\] b'"):
        flip_labels({"[a] b": "c"}, ["a b", "a [b]", "c"], 3)


def test_a_flip_of_one_class_in_two_spellings():
    assert flip_labels({"a": "b", "[b]": "'a'"}, ["a", "b", "c"], 3).tolist() == [1, 0, 2]
    with pytest.raises(UserError, match="a flip cannot turn 'a' into 'b' and 'c'"):
        flip_labels({"a": "b", "[a]": "c"}, ["a", "b", "c"], 3)


def test_ucf_folders_match_the_class_file(write):
    write("Jump Rope/1.avi"), write("classInd.txt", "1 Apply\n2 [Jump] Rope\n")
    manifest = read_manifest(write("trainlist01.txt", "Jump Rope/1.avi 2\n"), format="ucf101")
    assert labels_of(manifest) == {"Jump Rope/1.avi": 1}


# Splits with different classes ----------------------------------------------------------------------------------------


def recipe(tmp_path, *overrides):
    keys = [f"data.train.path={tmp_path}/train", f"data.val.path={tmp_path}/val", "train.global_batch=2"]
    return load_recipe("demo", [*keys, *(f"data.{split}.where={{}}" for split in ("train", "val")), *overrides])


def test_a_validation_tree_may_lack_classes(write, tmp_path):
    for name in ("train/a/1.mp4", "train/b/1.mp4", "train/c/1.mp4", "val/a/1.mp4", "val/c/1.mp4"):
        write(name)
    config = recipe(tmp_path)
    train, val = read_splits(config)
    assert train.classes == val.classes == ("a", "b", "c")
    assert labels_of(val) == {"a/1.mp4": 0, "c/1.mp4": 2}
    assert check_data(config, train, val).model.num_classes == 3
    assert list_fingerprint(val) != list_fingerprint(read_split(config.data, "val")), "labels of other classes"
    (tmp_path / "val/b").mkdir()  # a class without videos
    (tmp_path / "val/z").mkdir()  # also one that training does not have
    again = read_splits(config)[1]
    assert labels_of(again) == labels_of(val) and list_fingerprint(again) == list_fingerprint(val)
    classes = write("classes.txt", "c\nb\na\n")
    _, named = read_splits(recipe(tmp_path, f"data.classes={classes}"))
    assert labels_of(named) == {"a/1.mp4": 2, "c/1.mp4": 0}


@pytest.mark.parametrize("lacking", [0, 3, 11])
def test_a_validation_list_of_numbers_may_lack_some(write, videos, tmp_path, lacking):
    write("train", "path,label\n" + "".join(f"{i}.mp4,{i}\n" for i in range(12)))
    write("val", "path,label\n" + "".join(f"{i}.mp4,{i}.0\n" for i in range(12) if i != lacking))
    train, val = read_splits(recipe(tmp_path))
    assert val.classes == train.classes
    assert labels_of(val) == {name: label for name, label in RIGHT.items() if label != lacking}


def test_a_validation_list_with_names_in_another_order_is_numbered_again(write, videos, tmp_path):
    write("train", "path,label,class\n0.mp4,0,run\n1.mp4,1,walk\n2.mp4,2,jump\n")
    write("val", "path,label,class\n3.mp4,0,jump\n4.mp4,1,[run]\n")
    train, val = read_splits(recipe(tmp_path))
    assert (train.classes, labels_of(val)) == (("run", "walk", "jump"), {"3.mp4": 2, "4.mp4": 0})
    write("val", "path,label\n3.mp4,jump\n4.mp4,run\n")
    assert labels_of(read_splits(recipe(tmp_path))[1]) == {"3.mp4": 2, "4.mp4": 0}


def test_ucf_lists_without_a_class_file_count_from_one(write, tmp_path):
    write("x/1.avi"), write("y/2.avi"), write("z/3.avi")
    write("train", "x/1.avi 1\ny/2.avi 2\nz/3.avi 3\n")
    write("val", "x/1.avi 1\nz/3.avi 3\n")
    _, val = read_splits(recipe(tmp_path, "data.format=ucf101"))
    assert labels_of(val) == {"x/1.avi": 0, "z/3.avi": 2}


def test_packed_lists_are_matched_by_the_names_in_their_metadata(tmp_path, videos):
    for name, classes, labels in (("train", ["a", "b", "c"], [0, 1, 2]), ("val", ["c", "a", "unused"], [0, 1, 0])):
        table = pa.table({"uri": [f"{i}.mp4" for i in range(3)], "label": labels})
        pq.write_table(table.replace_schema_metadata({"classes": json.dumps(classes)}), tmp_path / name)
    _, val = read_splits(recipe(tmp_path, "data.format=parquet"))
    assert (val.classes, val.rows["label"].to_pylist()) == (("a", "b", "c"), [2, 0, 2])


@pytest.mark.parametrize("others", [1, 5, 7])
def test_a_validation_list_adds_no_class(write, videos, tmp_path, others):
    write("train", "path,label\n0.mp4,run\n1.mp4,walk\n")
    strange = [f"other{i}" for i in range(others)]
    rows = [*(f"{i}.mp4,{name}\n" for i, name in enumerate(strange)), "11.mp4,run\n"]
    write("val", "path,label\n" + "".join(rows))
    with pytest.raises(ManifestError) as caught:
        read_splits(recipe(tmp_path))
    (problem,) = caught.value.problems
    start = f"{tmp_path}/val:2: {others} class{'es' * (others > 1)} not in the training list {tmp_path}/train: 'other0'"
    assert problem.startswith(start)
    assert [name in problem for name in strange] == [i < 5 for i in range(others)]
    assert ("'other4' and 2 more;" in problem) == (others == 7)
    assert problem.endswith("correct the names, leave these videos out, or name all classes in a file (`data.classes`)")
    assert "'run'" not in problem, "classes that both have are not listed"
    classes = write("classes", "\n".join(["run", "walk", *strange]))
    assert len(read_splits(recipe(tmp_path, f"data.classes={classes}"))[1].rows) == others + 1


def test_a_class_in_rows_that_are_not_used_is_no_addition(write, videos, tmp_path):
    write("train", "path,label\n0.mp4,run\n1.mp4,walk\n")
    write("val", "path,label,split\n2.mp4,walk,val\n3.mp4,other,test\n")
    assert labels_of(read_splits(recipe(tmp_path, "data.val.where={split: val}"))[1]) == {"2.mp4": 1}
    with pytest.raises(ManifestError, match="'other'"):
        read_splits(recipe(tmp_path))


def test_a_misspelt_class_has_a_hint(write, videos, tmp_path):
    write("train", "path,label\n0.mp4,run\n1.mp4,walk\n")
    write("val", "path,label\n2.mp4,wallk\n")
    with pytest.raises(ManifestError, match=r"'wallk' \(did you mean 'walk'\?\);"):
        read_splits(recipe(tmp_path))


def test_numbers_do_not_stand_for_names(write, videos, tmp_path):
    """Names get their ids in sorted order, which the numbers of another list need not follow."""
    write("train", "path,label\n0.mp4,walk\n1.mp4,run\n")
    write("val", "path,label\n2.mp4,0\n3.mp4,1\n")
    with pytest.raises(ManifestError, match=r"2 classes not in the training list .*: '0', '1'.*data\.classes"):
        read_splits(recipe(tmp_path))
    write("val", "path,label\n2.mp4,run\n")
    write("train", "path,label\n0.mp4,0\n1.mp4,1\n")
    with pytest.raises(ManifestError, match=r"1 class not in the training list .*: 'run'"):
        read_splits(recipe(tmp_path))


def test_problems_of_both_lists_are_reported_and_the_classes_only_once(write, videos, tmp_path):
    write("train", "path,label\n0.mp4,run\ngone.mp4,walk\n")
    write("val", "path,label\n2.mp4,other\ngone2.mp4,run\n")
    with pytest.raises(ManifestError) as caught:
        read_splits(recipe(tmp_path))
    assert ["gone" in problem for problem in caught.value.problems] == [True, True], "the classes cannot be compared"


def test_an_empty_class_folder_of_the_training_list_has_a_way_out(write, tmp_path):
    write("train/a/1.mp4")
    (tmp_path / "train/b").mkdir()
    (problem,) = problems(tmp_path / "train")
    assert "add some, remove it, or name all classes in a file (`data.classes`)" in problem
    manifest = read_manifest(tmp_path / "train", classes=write("classes", "a\nb\n"))
    assert (manifest.classes, labels_of(manifest)) == (("a", "b"), {"a/1.mp4": 0})
    (tmp_path / "empty/a").mkdir(parents=True)
    (problem,) = problems(tmp_path / "empty", classes=write("classes", "a\nb\n"))
    assert problem.startswith(": holds no videos")


def test_the_training_classes_are_read_without_its_videos(write, tmp_path):
    write("train", "path,label\ngone.mp4,run\ngone2.mp4,walk\n")
    assert training_classes(recipe(tmp_path).data).names == ("run", "walk")


def test_a_checkpoint_defines_the_classes_of_an_evaluation(write, videos, tmp_path):
    info = checkpoints.CheckpointInfo(1, 1, {}, ["walk", "run", "[jump] high"], {})
    write("val", "path,label\n0.mp4,jump high\n1.mp4,run\n")
    manifest = read_split(recipe(tmp_path).data, "val", known_classes(info))
    assert (manifest.classes, labels_of(manifest)) == (("walk", "run", "[jump] high"), {"0.mp4": 2, "1.mp4": 1})
    classes = write("classes", "run\nwalk\njump high\n")
    write("val", "path,label\n0.mp4,0\n1.mp4,1\n")
    manifest = read_split(recipe(tmp_path, f"data.classes={classes}").data, "val", known_classes(info))
    assert labels_of(manifest) == {"0.mp4": 1, "1.mp4": 0}, "the file names the numbers"
    with pytest.raises(
        ManifestError, match=r"2 classes not in the checkpoint: '0', '1'; .*numbers, name them in a file"
    ):
        read_split(recipe(tmp_path).data, "val", known_classes(info))


def test_the_class_mean_is_over_the_classes_that_occur():
    """Class 0: 2 of 2, class 2: 1 of 4; class 1 has no videos, though one is taken for it."""
    counts = ClassificationMetrics.empty(3)
    predicted, truth = torch.tensor([0, 0, 2, 1, 0, 0]), torch.tensor([0, 0, 2, 2, 2, 2])
    counts.add(torch.nn.functional.one_hot(predicted, 3).float().log_softmax(1), truth, torch.ones(6))
    assert counts.metrics()[VAL_CLASS_MEAN] == pytest.approx((1 + 1 / 4) / 2)
    assert counts.metrics()[VAL_TOP1] == pytest.approx(3 / 6)


def test_a_list_of_names_in_a_message():
    assert list_names(["a"]) == "'a'"
    assert list_names(list("abcde")) == "'a', 'b', 'c', 'd', 'e'"
    assert list_names(list("abcdefgh")) == "'a', 'b', 'c', 'd', 'e' and 3 more"


# Paths from Windows and other systems ---------------------------------------------------------------------------------


def test_backslashes_of_a_windows_list_are_slashes(write, tmp_path):
    write("a/1.mp4"), write("a/b/2.mp4"), write("d/00001.jpg"), write("run/3.avi"), write("clap/4.avi")
    manifest = read_manifest(write("l.csv", "path,label\r\na\\1.mp4,0\r\n.\\a\\b\\2.mp4,1\r\n"))
    assert manifest.rows["uri"].to_pylist() == [f"{tmp_path}/a/1.mp4", f"{tmp_path}/a/b/2.mp4"]
    assert manifest.rows["sample_id"].to_pylist() == ["a\\1.mp4", ".\\a\\b\\2.mp4"], "as written"
    manifest = read_manifest(write("l.txt", "a\\1.mp4 0\r\na\\b\\2.mp4 1\r\n"), format="kinetics")
    assert manifest.rows["uri"].to_pylist() == [f"{tmp_path}/a/1.mp4", f"{tmp_path}/a/b/2.mp4"]
    manifest = read_manifest(write("l.txt", "x\\..\\d 1 0\r\n"), format="ssv1")
    assert manifest.rows["uri"].to_pylist() == [f"{tmp_path}/d/{{:05d}}.jpg"]
    write("classInd.txt", "1 jump\r\n2 run\r\n")
    assert labels_of(read_manifest(write("test.txt", "run\\3.avi\r\n"), format="ucf101")) == {"run\\3.avi": 1}
    assert labels_of(read_manifest(write("train.txt", "run\\3.avi 2\r\n"), format="ucf101")) == {"run\\3.avi": 1}
    table = pa.table({"uri": ["a\\1.mp4"], "label": [0]})
    pq.write_table(table, tmp_path / "l.parquet")
    assert read_manifest(tmp_path / "l.parquet").rows["uri"].to_pylist() == [f"{tmp_path}/a/1.mp4"]


def test_a_file_name_with_a_backslash_is_itself(write, tmp_path):
    write("a\\1.mp4"), write("a/1.mp4"), write("a/2.mp4"), write("d\\e/00001.jpg")
    manifest = read_manifest(write("l.csv", "path,label\na\\1.mp4,0\na\\2.mp4,0\n"))
    assert manifest.rows["uri"].to_pylist() == [f"{tmp_path}/a\\1.mp4", f"{tmp_path}/a/2.mp4"]
    manifest = read_manifest(write("l.txt", "d\\e 1 0\n"), format="ssv1")
    assert manifest.rows["uri"].to_pylist() == [f"{tmp_path}/d\\e/{{:05d}}.jpg"]
    write("tree/x\\y/1.mp4")
    assert read_manifest(tmp_path / "tree").classes == ("x\\y",)


def test_backslashes_are_checked_as_slashes_are(write, tmp_path):
    write("a/1.mp4"), write("sub/x")
    twice = "path,label\na\\1.mp4,0\na/1.mp4,0\n"
    assert "path 'a/1.mp4' is already in line 2" in problems(write("l.csv", twice))[0]
    for path in ("..\\m.mp4", "a\\..\\..\\m.mp4", "\\etc\\hostname"):
        (problem,) = problems(write("sub/l.csv", f"path,label\n{path},0\n"))
        assert "is outside" in problem
    for path in ("C:\\data\\1.mp4", "d:\\data\\1.mp4"):
        (problem,) = problems(write("l.csv", f"path,label\n{path},0\n"))
        assert "a path of a Windows drive: make it relative to `root`" in problem
    (problem,) = problems(write("l.csv", "path,label\nhttp://nowhere.example/a\\1.mp4,0\n"))
    assert "is outside" in problem, "and nothing is asked of another server"


def test_the_case_of_a_suffix_does_not_matter(write, tmp_path):
    write("a.AVI"), write("b.mp4"), write("c.webm"), write("x/v_1.AVI")
    manifest = read_manifest(write("l.csv", "path,label\na.avi,0\nb.MP4,1\n"))
    assert manifest.rows["uri"].to_pylist() == [f"{tmp_path}/a.AVI", f"{tmp_path}/b.mp4"]
    assert manifest.rows["sample_id"].to_pylist() == ["a.avi", "b.MP4"]
    assert read_manifest(write("l", "c.MP4 0"), format="kinetics").rows["uri"].to_pylist() == [f"{tmp_path}/c.webm"]
    assert labels_of(read_manifest(write("l", "x/v_1.avi 1"), format="ucf101")) == {"x/v_1.avi": 0}
    pq.write_table(pa.table({"uri": ["b.mp4"], "label": [0]}), tmp_path / "L.PARQUET")
    assert len(read_manifest(tmp_path / "L.PARQUET").rows) == 1
    (problem,) = problems(write("l.csv", "path,label\nb.AVI,0\n"))
    assert f"no video file {tmp_path}/b.AVI" in problem
