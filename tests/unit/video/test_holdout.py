"""A share of the training list for validation: no video or group on both sides, stable, every class learned."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.training.preflight import check_data, read_splits
from posmlp.config import RecipeError, load_recipe
from posmlp.video.holdout import choose_held_out
from posmlp.video.manifest import ManifestError, read_split, training_classes

VIDEOS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4)), min_size=1, max_size=80)


@given(VIDEOS, st.floats(0.05, 0.9), st.integers(0, 5))
def test_groups_stay_together_and_every_class_is_learned(videos, share, seed):
    groups, labels = [str(group) for group, _ in videos], [label for _, label in videos]
    held_out = choose_held_out(groups, labels, share, seed)
    sides = {(group, side) for group, side in zip(groups, held_out, strict=True)}
    assert len(sides) == len(set(groups)), "no group is on both sides"
    learned = {label for label, side in zip(labels, held_out, strict=True) if not side}
    assert learned == set(labels)
    order = np.random.default_rng(0).permutation(len(videos))
    again = choose_held_out([groups[i] for i in order], [labels[i] for i in order], share, seed)
    assert again == [held_out[i] for i in order], "the order of the list has no effect"


@given(st.lists(st.integers(2, 40), min_size=1, max_size=5), st.floats(0.05, 0.9), st.integers(0, 5))
def test_every_class_of_two_videos_is_on_both_sides(sizes, share, seed):
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    held_out = choose_held_out([f"{i}.mp4" for i in range(len(labels))], labels, share, seed)
    for label in range(len(sizes)):
        assert {side for each, side in zip(labels, held_out, strict=True) if each == label} == {True, False}


def test_each_class_gives_about_its_share():
    labels = [0] * 4000 + [1] * 1000
    held_out = np.array(choose_held_out([f"{i}.mp4" for i in range(5000)], labels, 0.2, 0))
    assert held_out[:4000].mean() == pytest.approx(0.2, abs=0.03)
    assert held_out[4000:].mean() == pytest.approx(0.2, abs=0.05)


def test_adding_videos_and_classes_moves_no_other():
    names, labels = [f"{i}.mp4" for i in range(300)], [i % 3 for i in range(300)]
    before = choose_held_out(names, labels, 0.2, 7)
    more = [f"new{i}.mp4" for i in range(100)]
    after = choose_held_out(more + names, [i % 5 for i in range(100)] + labels, 0.2, 7)
    assert after[100:] == before
    assert choose_held_out(names, labels, 0.2, 8) != before


# --- in a recipe ------------------------------------------------------------------------------------------------


@pytest.fixture
def grouped(tmp_path):
    """A list of 60 videos of 3 classes by 12 people, each in all classes."""
    lines = ["path,label,person"]
    for i in range(60):
        (tmp_path / f"{i}.mp4").touch()
        lines.append(f"{i}.mp4,{['run', 'walk', 'jump'][i % 3]},p{i // 5}")
    (tmp_path / "all.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def recipe(folder, *overrides):
    return load_recipe("demo", [f"data.train={folder}/all.csv", "data.val=0.25", "train.global_batch=8", *overrides])


def ids(config, split, known=None):
    return set(read_split(config.data, split, known).rows["sample_id"].to_pylist())


def test_a_share_splits_the_training_list(grouped):
    config = recipe(grouped)
    train, val = ids(config, "train"), ids(config, "val")
    assert train | val == {f"{i}.mp4" for i in range(60)} and not train & val
    assert 5 < len(val) < 25
    train_set, val_set = read_splits(config)
    assert train_set.classes == val_set.classes == ("jump", "run", "walk")
    assert check_data(config, train_set, val_set).model.num_classes == 3
    assert val_set.rows.column_names == ["sample_id", "uri", "label", "frames"]
    assert ids(config, "val", training_classes(config.data)) == val
    assert ids(recipe(grouped, "train.seed=5"), "val") == val, "another seed of training sees the same videos"
    assert ids(recipe(grouped, "data.val.seed=5"), "val") != val


def test_groups_of_a_column_or_of_folders_are_not_parted(grouped):
    person = {f"{i}.mp4": i // 5 for i in range(60)}
    config = recipe(grouped, "data.group_by=person")
    train, val = ({person[each] for each in ids(config, name)} for name in ("train", "val"))
    assert train | val == set(range(12)) and not train & val
    for i in range(12):
        folder = grouped / "tree" / f"class{i % 2}" / f"take{i}"
        folder.mkdir(parents=True)
        for j in range(3):
            (folder / f"{j}.mp4").touch()
    config = load_recipe("demo", [f"data.train={grouped}/tree", "data.val=0.3", "data.group_by=folder"])
    train, val = ({each.rpartition("/")[0] for each in ids(config, name)} for name in ("train", "val"))
    assert len(train | val) == 12 and val and not train & val


def test_the_short_form_is_a_number_and_round_trips(grouped, tmp_path):
    (tmp_path / "short.yaml").write_text(f"name: x\ndata:\n  train: {grouped}/all.csv\n  val: 0.25\n")
    config = load_recipe(tmp_path / "short.yaml")
    assert (config.data.val.share, config.data.val.path) == (0.25, f"{grouped}/all.csv")
    (tmp_path / "long.yaml").write_text(config.to_yaml())
    assert load_recipe(tmp_path / "long.yaml") == config
    own = load_recipe(tmp_path / "short.yaml", ["data.val=other.csv"])
    assert (own.data.val.path, own.data.val.share) == ("other.csv", None)
    assert load_recipe(tmp_path / "short.yaml", ["data.val.seed=3"]).data.val.seed == 3


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (["data.val.path=b.csv"], r"data\.val\.share 0\.25 is of the training list .*data\.val\.share=null"),
        (["data.val.where={a: b}"], r"no list, root or where of its own"),
        (["data.val=1.5"], r"data\.val\.share: .*more than 0 and less than 1, such as 0\.2, not 1\.5"),
        (["data.val=0"], r"data\.val\.share: .*more than 0 and less than 1, such as 0\.2, not 0"),
        (["data.val={}"], r"data\.val: missing; give a list"),
        (["data.val=b.csv", "data.group_by=person"], r"data\.group_by person has an effect only where data\.val is a"),
    ],
)
def test_wrong_shares_are_refused(grouped, keys, problem):
    with pytest.raises(RecipeError, match=problem):
        recipe(grouped, *keys)


def test_an_unknown_column_and_a_list_of_single_videos_are_refused(grouped):
    with pytest.raises(
        ManifestError, match=r"no column 'actor' \(data\.group_by\); columns are path, label, person; `folder` is each"
    ):
        read_split(recipe(grouped, "data.group_by=actor").data, "train")
    (grouped / "all.csv").write_text("path,label\n1.mp4,run\n2.mp4,walk\n")
    with pytest.raises(ManifestError, match=r"leaves no video for validation: no class has two"):
        read_split(recipe(grouped).data, "val")


def held_out(folder, *overrides):
    """A recipe whose validation videos are held out by their columns."""
    return load_recipe("demo", [f"data.train={folder}/all.csv", "train.global_batch=8", "data.val={}", *overrides])


def test_where_without_a_list_holds_out_training_videos(grouped):
    config = held_out(grouped, "data.val.where.person=p3")
    train, val = ids(config, "train"), ids(config, "val")
    assert val == {f"{i}.mp4" for i in range(15, 20)}
    assert train == {f"{i}.mp4" for i in range(60)} - val
    train_set, val_set = read_splits(config)
    assert train_set.classes == val_set.classes == ("jump", "run", "walk")
    assert train_set.rows.column_names == val_set.rows.column_names == ["sample_id", "uri", "label", "frames"]
    both = held_out(grouped, "data.val.where.person=p3", "data.val.where.label=jump")
    assert ids(both, "val") == {"17.mp4"} and len(ids(both, "train")) == 59


def test_held_out_videos_come_from_what_the_training_list_keeps(grouped):
    (grouped / "all.csv").write_text(
        "path,label,person,set\n" + "".join(f"{i}.mp4,{i % 2},p{i // 5},{'ab'[i % 2]}\n" for i in range(60))
    )
    config = held_out(grouped, "data.train.where.set=a", "data.val.where.person=p3")
    assert ids(config, "val") == {"16.mp4", "18.mp4"}
    assert ids(config, "train") == {f"{i}.mp4" for i in range(0, 60, 2)} - {"16.mp4", "18.mp4"}


def test_a_value_is_held_out_of_every_training_list(grouped):
    lines = (grouped / "all.csv").read_text().splitlines()
    for name, part in (("one", lines[1:31]), ("two", lines[31:])):
        (grouped / f"{name}.csv").write_text("\n".join([lines[0], *part]) + "\n")
    lists = f"data.train=[{grouped}/one.csv, {grouped}/two.csv]"
    config = held_out(grouped, lists, "data.val.where.person=p8")
    assert ids(config, "val") == {f"2:{i}.mp4" for i in range(40, 45)}
    assert len(ids(config, "train")) == 55
    assert "weight" not in read_split(config.data, "val").rows.column_names


def test_the_folder_of_a_video_is_a_column(tmp_path):
    for i in range(8):
        folder = tmp_path / f"class{i % 2}" / f"take{i // 4}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.mp4").touch()
    keys = [f"data.train={tmp_path}", "data.val={where: {folder: class1/take0}}", "train.global_batch=2"]
    config = load_recipe("demo", keys)
    assert ids(config, "val") == {"class1/take0/1.mp4", "class1/take0/3.mp4"} and len(ids(config, "train")) == 6


@pytest.mark.parametrize(
    ("value", "values"),
    [("s1", ["s1", "s2", None]), ("7", [7, 8, 9]), ("7", [7.0, 8.5, None]), ("True", [True, False, None])],
)
def test_columns_of_a_parquet_list_hold_out_too(tmp_path, value, values):
    for i in range(6):
        (tmp_path / f"{i}.mp4").touch()
    columns = {"path": [f"{i}.mp4" for i in range(6)], "label": [0, 1] * 3, "subject": values * 2}
    pq.write_table(pa.table(columns), tmp_path / "all.parquet")
    config = load_recipe(
        "demo",
        [f"data.train={tmp_path}/all.parquet", f"data.val={{where: {{subject: {value!r}}}}}", "train.global_batch=2"],
    )
    assert ids(config, "val") == {"0.mp4", "3.mp4"}


def test_held_out_videos_that_do_not_exist_are_refused(grouped):
    with pytest.raises(
        ManifestError, match=r"no training video has person=px \(data\.val\.where\); there person is p0, "
    ):
        read_split(held_out(grouped, "data.val.where.person=px").data, "train")
    with pytest.raises(
        ManifestError, match=r"no column 'subject' \(data\.val\.where\); columns are path, label, person"
    ):
        read_split(held_out(grouped, "data.val.where.subject=p1").data, "train")
    one = held_out(grouped, "data.train.where.person=p1", "data.val.where.person=p1")
    with pytest.raises(ManifestError, match="holds out every video; none is left to train on"):
        read_split(one.data, "train")
    with pytest.raises(RecipeError, match=r"data\.val\.root /x: .* holds out training videos"):
        held_out(grouped, "data.val={root: /x, where: {person: p1}}")


def test_a_recipe_that_holds_out_videos_round_trips(grouped, tmp_path):
    config = held_out(grouped, "data.val.where.person=p3")
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == config
    assert config.data.holds_out and config.data.list_of("val") == f"{grouped}/all.csv"
