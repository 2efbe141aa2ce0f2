"""``where``: equal to a value, one of several, or none of them; against a plain filter."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.commands.data import read_conditions
from posmlp.config import Config, RecipeError, load_recipe
from posmlp.errors import UserError
from posmlp.video.manifest import ManifestError, read_manifest, read_split

SUBJECTS = ("s1", "s2", "s3", "01", "yes", "null", "[a]", "")
VALUE = st.sampled_from(SUBJECTS)
VALUES = VALUE | st.lists(VALUE, min_size=1, max_size=4)
CONDITION = VALUES | st.builds(lambda values: {"not": values}, VALUES)


def plainly(value, condition):
    if isinstance(condition, dict):
        return not plainly(value, condition["not"])
    return value in condition if isinstance(condition, list) else value == condition


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """A list with every pair of a subject and a side."""
    folder = tmp_path_factory.mktemp("where")
    rows = [(f"{i}.mp4", subject, side) for i, (subject, side) in enumerate((a, b) for a in SUBJECTS for b in "lr")]
    for name, _, _ in rows:
        (folder / name).touch()
    path = folder / "list.csv"
    path.write_text("path,label,subject,side\n" + "".join(f"{n},0,{a},{b}\n" for n, a, b in rows))
    return path, rows


@given(CONDITION, st.none() | CONDITION)
def test_rows_are_kept_as_by_a_plain_filter(listed, subject, side):
    path, rows = listed
    where = {"subject": subject} | ({} if side is None else {"side": side})
    kept = [n for n, a, b in rows if plainly(a, subject) and (side is None or plainly(b, side))]
    if kept:
        assert read_manifest(path, where).rows["sample_id"].to_pylist() == kept
    else:
        with pytest.raises(ManifestError, match="no row has subject"):
            read_manifest(path, where)


@given(CONDITION)
def test_a_recipe_keeps_its_conditions(condition):
    lists = {"data": {"train": {"path": "t.csv", "where": {"subject": condition}}, "val": "v.csv"}, "name": "x"}
    config = Config.model_validate(lists)
    again = Config.model_validate(config.model_dump(mode="json"))
    assert again == config
    kept = config.model_dump(mode="json")["data"]["train"]["where"]["subject"]
    assert all(plainly(value, kept) == plainly(value, condition) for value in SUBJECTS)


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("subject=s1", {"subject": "s1"}),
        ("subject=[s1, s2]", {"subject": ("s1", "s2")}),
        ("subject=[01, yes]", {"subject": ("01", "yes")}),
        ("subject='[a]'", {"subject": "[a]"}),
        ("subject.not=casme2/01", {"subject": {"not": "casme2/01"}}),
        ("subject.not=[01, 02]", {"subject": {"not": ("01", "02")}}),
        ("subject={not: 01}", {"subject": {"not": "01"}}),
    ],
)
def test_the_same_on_the_command_line(override, where):
    assert load_recipe("demo", [f"data.train.where.{override}"]).data.train.where == where
    assert read_conditions([override]) == where


@pytest.mark.parametrize(
    "condition", ["[]", "{nor: a}", "{not: {not: a}}", "{not: []}", "[[a]]", "{not: a, also: b}", ""]
)
def test_another_form_is_refused_in_one_line(condition):
    with pytest.raises(RecipeError) as caught:
        load_recipe("demo", [f"data.train.where.subject={condition}"])
    (line,) = str(caught.value).splitlines()[1:]
    assert "data.train.where: column subject: expected a value, a list of values, or {not:" in line
    with pytest.raises(UserError, match="column subject: expected a value"):
        read_conditions([f"subject={condition}"])


def test_a_where_without_a_value_is_refused():
    with pytest.raises(UserError, match="expected COLUMN=VALUE"):
        read_conditions(["subject"])


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (
            {"subject": {"not": list(SUBJECTS)}, "side": "l"},
            "no row has subject none of s1, s2, s3, 01, yes, null, [a], ",
        ),
        ({"subject": ["x", "y"]}, "no row has subject one of x, y (`where`); in the file subject is , 01, [a], null"),
        ({"side": {"not": ["l", "r"]}, "subject": "s1"}, "no row has side none of l, r and subject=s1"),
    ],
)
def test_no_row_is_said_in_words(listed, where, words):
    with pytest.raises(ManifestError) as caught:
        read_manifest(listed[0], where)
    assert words in str(caught.value)


def test_a_value_that_no_row_has_is_warned_of(listed, caplog):
    with caplog.at_level(logging.WARNING):
        read_manifest(listed[0], {"subject": {"not": "s7"}})
        read_manifest(listed[0], {"subject": {"not": "s7"}})
    (record,) = caplog.records
    assert "no row has subject s7" in record.message


def test_held_out_training_videos_may_be_excluded(listed):
    path, rows = listed
    overrides = [f"data.train={path}", "data.val={where: {subject: {not: [s1, s2]}}}"]
    data = load_recipe("demo", overrides).data
    train, val = (read_split(data, name).rows["sample_id"].to_pylist() for name in ("train", "val"))
    assert train == [name for name, subject, _ in rows if subject in ("s1", "s2")]
    assert val == [name for name, subject, _ in rows if subject not in ("s1", "s2")]
