"""The coding files and folders of CASME II, SAMM and SMIC, and the composite of MEGC2019."""

import logging
import zipfile
from collections import Counter
from itertools import cycle

import openpyxl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posmlp.config import load_recipe
from posmlp.video.manifest import ManifestError, read_manifest, read_training_videos
from tests.helpers.micro_expressions import (
    CASME2_HEADER,
    SAMM_HEADER,
    SMIC_HEADER,
    casme2_row,
    samm_row,
    smic_row,
    touch,
    write_workbook,
)

KEPT = {"subject": "test", "dataset": "test"}
# As published (docs/micro_expressions.md)
CASME2 = {"others": 99, "disgust": 63, "happiness": 32, "repression": 27, "surprise": 25, "sadness": 7, "fear": 2}
SAMM = {"Anger": 57, "Happiness": 26, "Other": 26, "Surprise": 15, "Contempt": 12, "Disgust": 9, "Fear": 8}
SAMM |= {"Sadness": 6}
SMIC = {"negative": 70, "positive": 51, "surprise": 43}


def problems(path, **options):
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, **options)
    return caught.value.problems


def counts(manifest):
    return Counter(manifest.classes[label] for label in manifest.rows["label"].to_pylist())


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The three sets with the published numbers of micro-expressions, subjects and emotions, an image each."""
    folder = tmp_path_factory.mktemp("published")
    rows = [CASME2_HEADER]
    for emotion, count in CASME2.items():
        # two of the 26 subjects have micro-expressions of `others` alone
        subjects = cycle(range(1, 27) if emotion == "others" else range(1, 25))
        for i in range(count):
            subject, name = next(subjects), f"{emotion}_{i}"
            if (emotion, i) in (("disgust", 3), ("repression", 4)):
                name = {4: "EP12_01f", 5: "EP09_05f"}[subject]
            rows.append(casme2_row(f"{subject:02d}", name, 46, 46, emotion))
            touch(folder / f"CASME2/sub{subject:02d}/{name}", ["reg_img46.jpg"])
    write_workbook(folder / "CASME2/CASME2-coding-20140508.xlsx", rows)
    rows = [SAMM_HEADER]
    for emotion, count in SAMM.items():
        subjects = cycle(range(34, 5, -1) if emotion == "Other" else range(6, 34))
        for i in range(count):
            subject = next(subjects)
            rows.append(samm_row(f"{subject:03d}", f"{subject:03d}_{emotion}_{i}", 5562, 5562, emotion))
            touch(folder / f"SAMM/{subject:03d}/{subject:03d}_{emotion}_{i}", [f"{subject:03d}_05562.jpg"])
    write_workbook(folder / "SAMM/SAMM_Micro_FACS_Codes_v2.xlsx", rows, above=13)
    for emotion, count in SMIC.items():
        for i, subject in zip(range(count), cycle(range(1, 17)), strict=False):
            touch(folder / f"SMIC/HS/s{subject}/micro/{emotion}/s{subject}_{emotion[:2]}_{i}", ["image090823.bmp"])
        touch(folder / f"SMIC/HS/s1/non_micro/s1_no_{emotion}", ["image000001.bmp"])
    return folder


def test_the_published_counts_of_five_classes(published, caplog):
    with caplog.at_level(logging.WARNING):
        casme2 = read_manifest(published / "CASME2/CASME2-coding-20140508.xlsx", format="casme2", columns=KEPT)
        samm = read_manifest(published / "SAMM/SAMM_Micro_FACS_Codes_v2.xlsx", format="samm", columns=KEPT)
    smic = read_manifest(published / "SMIC/HS", format="smic", columns=KEPT)
    assert casme2.classes == ("disgust", "happiness", "others", "repression", "surprise")
    assert samm.classes == ("Anger", "Contempt", "Happiness", "Other", "Surprise")
    assert counts(casme2) == {name: CASME2[name] for name in casme2.classes}
    assert counts(samm) == {name: SAMM[name] for name in samm.classes}
    assert counts(smic) == SMIC
    assert [len(each.rows) for each in (casme2, samm, smic)] == [246, 136, 164]
    assert [len(set(each.rows["list.subject"].to_pylist())) for each in (casme2, samm, smic)] == [26, 29, 16]
    first, second = (record.message for record in caplog.records)
    assert "9 of 255 micro-expressions are left out" in first
    assert "sadness 7, fear 2" in first
    assert "23 of 159 micro-expressions are left out" in second


def test_the_composite_of_megc2019(published, caplog):
    lists = [published / "SMIC/HS", *(published / "CASME2").glob("*.xlsx"), *(published / "SAMM").glob("*.xlsx")]
    data = load_recipe(
        "demo",
        ["data.format=megc", f"data.train=[{','.join(map(str, lists))}]", "data.val={where: {subject: samm/006}}"],
    ).data
    with caplog.at_level(logging.WARNING):
        manifest = read_training_videos(data, KEPT)
    assert manifest.classes == ("negative", "positive", "surprise")
    rows = manifest.rows.to_pylist()
    table = {name: Counter() for name in ("smic", "casme2", "samm")}
    for row in rows:
        table[row["list.dataset"]][manifest.classes[row["label"]]] += 1
    assert table["smic"] == {"negative": 70, "positive": 51, "surprise": 43}
    assert table["casme2"] == {"negative": 88, "positive": 32, "surprise": 25}
    assert table["samm"] == {"negative": 92, "positive": 26, "surprise": 15}
    assert counts(manifest) == {"negative": 250, "positive": 109, "surprise": 83}
    subjects = {name: {row["list.subject"] for row in rows if row["list.dataset"] == name} for name in table}
    assert [len(subjects[name]) for name in ("smic", "casme2", "samm")] == [16, 24, 28]
    assert len(set.union(*subjects.values())) == 68
    assert all(subject.startswith(f"{name}/") for name in table for subject in subjects[name])
    told = "\n".join(record.message for record in caplog.records)
    assert "110 of 255 micro-expressions are left out, which the composite of MEGC2019 does not have" in told
    assert "sub04/EP12_01f 1" in told
    assert "sub05/EP09_05f 1" in told


def test_the_frames_of_each_layout(tmp_path):
    write_workbook(
        tmp_path / "c.xlsx",
        [CASME2_HEADER, casme2_row("01", "EP02_01f", 46, 49, "happiness"), casme2_row(2, "EP03_02f", 2, 3, "others")],
    )
    touch(tmp_path / "sub01/EP02_01f", (f"img{i}.jpg" for i in range(1, 200)))
    touch(tmp_path / "sub02/EP03_02f", (f"reg_img{i}.jpg" for i in range(2, 4)))
    manifest = read_manifest(tmp_path / "c.xlsx", format="casme2", columns=KEPT)
    first, second = manifest.rows.to_pylist()
    assert first == {
        "sample_id": "sub01/EP02_01f",
        "uri": str(tmp_path / "sub01/EP02_01f/img{}.jpg"),
        "label": 1,
        "frames": 4,
        "first_frame": 46,
        "last_frame": 49,
        "list.subject": "casme2/01",
        "list.dataset": "casme2",
    }
    assert (second["uri"].rpartition("/")[2], second["frames"], second["list.subject"]) == (
        "reg_img{}.jpg",
        2,
        "casme2/02",
    )
    write_workbook(tmp_path / "s.xlsx", [SAMM_HEADER, samm_row(6, "006_1_2", 5562.0, 5565, "Anger")], above=13)
    touch(tmp_path / "samm/006/006_1_2", (f"006_{i:05d}.jpg" for i in range(5500, 5600)))
    (row,) = read_manifest(tmp_path / "s.xlsx", format="samm", root=tmp_path / "samm").rows.to_pylist()
    assert (row["uri"], row["first_frame"], row["last_frame"]) == (
        str(tmp_path / "samm/006/006_1_2/006_{:05d}.jpg"),
        5562,
        5565,
    )


def test_the_long_form_of_smic(tmp_path):
    rows = [
        smic_row(20, "s20_ne_01", "negative", 17581039, 17581042),
        smic_row(3, "s03_po_02", "positive", 7, 8, 12, 15, 20, 21),
    ]
    write_workbook(tmp_path / "SMIC-HS-E_annotation.xlsx", [SMIC_HEADER, *rows])
    touch(tmp_path / "s20/s20_ne_01", (f"image{i}.jpg" for i in range(17581000, 17581090)))
    touch(tmp_path / "s03/s03_po_02", (f"image{i:08d}.jpg" for i in range(1, 30)))
    for form in ("smic", "megc"):
        rows = read_manifest(tmp_path / "SMIC-HS-E_annotation.xlsx", format=form, columns=KEPT).rows.to_pydict()
        assert rows["label"] == [0, 1, 1, 1]
        assert rows["first_frame"] == [17581039, 7, 12, 20]
        assert rows["last_frame"] == [17581042, 8, 15, 21]
        assert rows["list.subject"] == ["smic/20", "smic/03", "smic/03", "smic/03"]
        assert rows["sample_id"][1:] == ["s03/s03_po_02#7-8", "s03/s03_po_02#12-15", "s03/s03_po_02#20-21"]


def test_where_finds_what_the_coding_file_has(tmp_path):
    rows = [casme2_row(i, "EP01_01", 1, 2, emotion) for i, emotion in enumerate(("disgust", "others", "others"), 1)]
    path = write_workbook(tmp_path / "c.xlsx", [CASME2_HEADER, *rows])
    for i in range(1, 4):
        touch(tmp_path / f"sub{i:02d}/EP01_01", ["img1.jpg", "img2.jpg"])

    def found(**where):
        return read_manifest(path, where, format="casme2").rows["sample_id"].to_pylist()

    assert found(subject="casme2/02") == ["sub02/EP01_01"]
    assert found(subject={"not": "casme2/02"}) == ["sub01/EP01_01", "sub03/EP01_01"]
    assert found(emotion="others", path={"not": ["sub03/EP01_01"]}) == ["sub02/EP01_01"]
    assert found(action_units="4+7", apex="/", dataset="casme2") == [f"sub0{i}/EP01_01" for i in (1, 2, 3)]


def test_a_file_of_classes_chooses_the_emotions(published, tmp_path):
    (tmp_path / "all.txt").write_text("\n".join(sorted(CASME2)))
    manifest = read_manifest(
        published / "CASME2/CASME2-coding-20140508.xlsx", format="casme2", classes=tmp_path / "all.txt"
    )
    assert counts(manifest) == CASME2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (casme2_row("01", "EP01", 10, 2, "others"), "offset 2 is before onset 10"),
        (casme2_row("01", "EP01", "/", 2, "others"), "onset '/' is not a whole number"),
        (casme2_row("01", "EP01", 1, None, "others"), "offset is empty"),
        (casme2_row("01", "EP01", 1.5, 2, "others"), "onset 1.5 is not a whole number"),
        (casme2_row("01", "EP01", 1, 3, "others"), "no image img3.jpg"),
        (casme2_row("01", "EP02", 1, 2, "others"), "no folder"),
        (casme2_row("one", "EP01", 1, 2, "others"), "Subject 'one' is not a number"),
        (casme2_row(None, "EP01", 1, 2, "others"), "Subject '' is not a number"),
        (casme2_row("01", None, 1, 2, "others"), "Filename is empty"),
        (casme2_row("01", "EP01", 1, 2, "hapiness"), "'hapiness' of sub01/EP01; CASME II has disgust, fear, happiness"),
        (casme2_row("01", "../../x", 1, 2, "others"), "is outside"),
        (casme2_row("02", "EP01", 1, 2, "others"), "already in line 2"),
    ],
)
def test_a_bad_row_is_a_problem_with_file_row_and_value(tmp_path, row, words):
    touch(tmp_path / "sub01/EP01", ["img1.jpg", "img2.jpg"])
    touch(tmp_path / "sub02/EP01", ["img1.jpg", "img2.jpg"])
    good = casme2_row("02", "EP01", 1, 2, "others")
    path = write_workbook(tmp_path / "c.xlsx", [CASME2_HEADER, good, [], row])
    (problem,) = problems(path, format="casme2")
    assert problem.startswith(f"{path}:4: ")
    assert words in problem
    if "where" in problem:  # the advice works, without a change of the file
        where = {"path": {"not": f"sub{row[0]}/{row[1]}"}}
        manifest = read_manifest(path, where, format="casme2")
        assert manifest.rows["sample_id"].to_pylist() == ["sub02/EP01"]


def test_missing_images_are_left_to_a_check(tmp_path):
    path = write_workbook(tmp_path / "c.xlsx", [CASME2_HEADER, casme2_row("16", "EP01_08", 73, 110, "repression")])
    touch(tmp_path / "sub16/EP01_08", (f"reg_img{i}.jpg" for i in range(73, 97)))  # as in the cropped images
    (problem,) = problems(path, format="casme2")
    assert "no image reg_img97.jpg" in problem
    assert "the folder has reg_img73.jpg to reg_img96.jpg" in problem
    assert "where: {path: {not: sub16/EP01_08}}" in problem
    (row,) = read_manifest(path, format="casme2", missing_ok=True).rows.to_pylist()
    assert (row["frames"], row["first_frame"], row["last_frame"]) == (38, 73, 110)


def test_a_clip_without_images_is_a_problem(tmp_path):
    touch(tmp_path / "s1/micro/negative/s1_ne_01", ["image000001.bmp"])
    touch(tmp_path / "s1/micro/surprise/s1_sur_03", [])
    (problem,) = problems(tmp_path, format="smic")
    assert problem.startswith(f"{tmp_path}/s1/micro/surprise/s1_sur_03: no numbered images")


def test_the_wrong_workbook_or_folder_is_one_problem(tmp_path):
    samm = write_workbook(tmp_path / "samm.xlsx", [SAMM_HEADER, samm_row(6, "006_1_2", 1, 2, "Anger")], above=13)
    (problem,) = problems(samm, format="casme2")
    assert problem == f"{samm}:14: this is a coding file of SAMM; set `format` to samm"
    header = [name for name in CASME2_HEADER if name != "OffsetFrame"]
    without = write_workbook(tmp_path / "c.xlsx", [header, ["01"] * len(header)])
    (problem,) = problems(without, format="casme2")
    assert problem.startswith(f"{without}: no column OffsetFrame; expected an Excel workbook (.xlsx) with the columns ")
    assert (
        "Subject, Filename, OnsetFrame, OffsetFrame, Estimated Emotion, found Subject, Filename, OnsetFrame" in problem
    )
    (problem,) = problems(without, format="megc")
    assert "or Subject, Filename, OnsetF, OffsetF, Emotion" in problem
    twice = write_workbook(tmp_path / "t.xlsx", [(*CASME2_HEADER, "Subject")])
    assert "'subject' appears twice" in problems(twice, format="casme2")[0]
    only = write_workbook(tmp_path / "o.xlsx", [CASME2_HEADER])
    assert "no row has one of the classes" in problems(only, format="casme2")[0]
    empty = write_workbook(tmp_path / "e.xlsx", [])
    assert "no sheet with cells" in problems(empty, format="casme2")[0]
    (tmp_path / "text.xlsx").write_text("Subject,Filename\n")
    assert "not an Excel workbook, or damaged" in problems(tmp_path / "text.xlsx", format="casme2")[0]
    (tmp_path / "old.xls").write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" * 100)
    assert "save it as .xlsx" in problems(tmp_path / "old.xls", format="samm")[0]
    assert "no such file" in problems(tmp_path / "none.xlsx", format="megc")[0]
    assert "is a folder" in problems(tmp_path, format="casme2")[0]
    (tmp_path / "HS").mkdir()
    assert "has no folders of subjects" in problems(tmp_path, format="smic")[0]
    assert "found HS" in problems(tmp_path, format="megc")[0]


def test_the_header_is_found_in_any_sheet_and_row(tmp_path):
    touch(tmp_path / "sub01/EP01", ["img1.jpg"])
    book = openpyxl.Workbook()
    book.active.append(["Some notes", "Subject"])
    sheet = book.create_sheet("coding")
    for row in ([], ["made in 2014"], ["subject ", "FileName", "onset frame", "Offset_Frame", "estimated emotion"]):
        sheet.append(row)
    sheet.append(["01", "EP01", 1, 1, " Happiness"])
    book.save(tmp_path / "c.xlsx")
    assert counts(read_manifest(tmp_path / "c.xlsx", format="casme2")) == {"happiness": 1}


@pytest.fixture(scope="module")
def workbook(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    rows = [casme2_row(f"{i:02d}", f"EP0{i}", i, i + 9, "others") for i in range(1, 9)]
    return write_workbook(folder / "c.xlsx", [CASME2_HEADER, *rows])


def damage(content, data):
    """Change some bytes, and cut some off."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    return bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_workbook_is_read_or_named(workbook, data):
    damaged = workbook.with_name("damaged.xlsx")
    if data.draw(st.booleans()):
        damaged.write_bytes(damage(workbook.read_bytes(), data))
    else:  # one of the files in it
        with zipfile.ZipFile(workbook) as whole, zipfile.ZipFile(damaged, "w") as copy:
            part = data.draw(st.sampled_from(whole.namelist()))
            for name in whole.namelist():
                content = whole.read(name)
                copy.writestr(name, damage(content, data) if name == part else content)
    try:
        read_manifest(damaged, format="casme2", missing_ok=True)
    except ManifestError as error:
        assert all(str(damaged) in problem for problem in error.problems)
