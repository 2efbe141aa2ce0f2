"""How often an epoch draws each video: balanced classes, lists with weights; and the weights of classes."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.loader import decode_rows, global_order, local_order
from pipelines.training.preflight import check_data, list_fingerprint, read_splits, with_absolute_paths
from posmlp.config import RecipeError, load_recipe
from posmlp.errors import UserError
from posmlp.video.draws import class_weights, epoch_draws, epoch_length
from posmlp.video.manifest import ManifestError, read_manifest, read_split


def recipe(*overrides):
    return load_recipe("demo", ["model.frames=4", "model.image_size=32", "train.global_batch=6", *overrides])


def table(labels, weights=None):
    columns = {"label": pa.array(labels, pa.int32())}
    return pa.table(columns | ({"weight": pa.array(weights, pa.float64())} if weights else {}))


def counts_of(order, rows):
    """How often each row is drawn; checks that the draws of a row are numbered 0, 1, 2, ..."""
    counts = np.bincount(order % rows, minlength=rows)
    assert sorted(order) == sorted(k * rows + i for i in range(rows) for k in range(counts[i]))
    return counts


LABELS = [0] * 50 + [1] * 7 + [3] * 3  # class 2 does not occur


def test_balanced_sampling_draws_every_class_equally_often_and_keeps_the_length():
    draws = epoch_draws(table(LABELS), "sampling")
    assert epoch_length(table(LABELS), "sampling") == 60
    for epoch in range(20):
        counts = counts_of(draws.order(np.random.default_rng([0, epoch])), 60)
        of_class = np.bincount(LABELS, counts)
        assert of_class[[0, 1, 3]] == pytest.approx(20, abs=1) and of_class.sum() == 60
        assert set(counts[:50]) <= {0, 1} and set(counts[50:57]) <= {2, 3} and set(counts[57:]) <= {6, 7}


def test_over_many_epochs_every_video_has_its_share():
    """Of 60 draws, each class has 20, so a video of the classes of 50, 7 and 3 is drawn 0.4, 20/7 and 20/3 times."""
    draws = epoch_draws(table(LABELS), "sampling")
    mean = sum(counts_of(draws.order(np.random.default_rng([1, epoch])), 60) for epoch in range(2000)) / 2000
    assert mean[:50] == pytest.approx(0.4, abs=0.05)
    assert mean[50:57] == pytest.approx(20 / 7, abs=0.05)
    assert mean[57:] == pytest.approx(20 / 3, abs=0.05)


@given(st.lists(st.integers(0, 4), min_size=6, max_size=80), st.integers(0, 9), st.integers(0, 9))
def test_the_order_follows_from_seed_and_epoch_for_any_number_of_workers(labels, seed, epoch):
    draws, config = epoch_draws(table(labels), "sampling"), recipe(f"train.seed={seed}")
    order = global_order(len(labels), config, epoch, train=True, draws=draws)
    assert np.array_equal(order, global_order(len(labels), config, epoch, train=True, draws=draws))
    assert len(order) == len(labels) // 6 * 6
    for world in (1, 2, 3):
        parts = [local_order(order, 6, rank, world) for rank in range(world)]
        assert np.array_equal(np.concatenate(parts, axis=1).reshape(-1), order)
    if len(labels) > 30:
        assert not np.array_equal(order, global_order(len(labels), config, epoch + 1, train=True, draws=draws))


def test_without_balance_and_weights_the_order_is_the_one_of_earlier_versions():
    rows = table(LABELS, [1.0] * 60)
    assert epoch_draws(rows, "none") is epoch_draws(table(LABELS), "weights") is None
    expected = np.random.default_rng([0, 3]).permutation(60)
    assert np.array_equal(global_order(60, recipe(), 3, train=True, draws=None), expected)


def test_the_weight_of_a_list_is_the_expected_draws_of_its_videos():
    """Lists of 40, 20 and 10 videos with weights 0.25, 1 and 2.5: 10 + 20 + 25 draws an epoch."""
    rows = table([0] * 70, [0.25] * 40 + [1.0] * 20 + [2.5] * 10)
    draws = epoch_draws(rows, "none")
    assert epoch_length(rows, "none") == 55
    total = np.zeros(70)
    for epoch in range(1000):
        counts = counts_of(draws.order(np.random.default_rng(epoch)), 70)
        assert [counts[:40].sum(), counts[40:60].sum(), counts[60:].sum()] == pytest.approx([10, 20, 25], abs=1)
        assert (counts[40:60] == 1).all() and set(counts[60:]) <= {2, 3}
        total += counts
    assert total[:40] / 1000 == pytest.approx(0.25, abs=0.06)
    assert total[60:] / 1000 == pytest.approx(2.5, abs=0.06)


def test_balanced_sampling_keeps_the_weights_within_a_class():
    """Two classes of two lists; within a class, the videos of the second list are drawn three times as often."""
    rows = table([0] * 30 + [1] * 6, ([1.0, 3.0] * 18))
    draws = epoch_draws(rows, "sampling")
    assert draws.total == 72
    of_class = [draws.expected[:30], draws.expected[30:]]
    assert [x.sum() for x in of_class] == pytest.approx([36, 36])
    assert all(x[1] == pytest.approx(3 * x[0]) for x in of_class)


def test_class_weights_are_the_inverse_frequencies_with_mean_1():
    """As scikit-learn's ``class_weight="balanced"``: videos / (classes * videos of the class)."""
    weights = class_weights(table(LABELS), 5)
    assert weights == pytest.approx([60 / (3 * 50), 60 / (3 * 7), 1, 60 / (3 * 3), 1])
    assert weights[LABELS].mean() == pytest.approx(1)


def test_each_draw_of_a_video_has_a_clip_of_its_own(motion_set):
    """The first is that of an epoch that draws the video once; later ones differ in pixels and seeds."""
    config = recipe("data.repeats=2", "data.cache_dir=null", "data.crop_scale=[0.3, 0.9]")
    rows = read_manifest(motion_set / "train.csv").rows.take([4, 4, 4])
    once = decode_rows(rows.slice(0, 1), np.ones(1, bool), config, 5, True)
    drawn = decode_rows(rows, np.ones(3, bool), config, 5, True, np.array([0, 1, 2]))
    assert np.array_equal(drawn["clip"][0], once["clip"][0]) and np.array_equal(drawn["seeds"][:1], once["seeds"])
    assert len(np.unique(drawn["seeds"])) == 6
    clips = drawn["clip"].reshape(6, -1)
    assert len(np.unique(clips, axis=0)) == 6


# --- several lists ----------------------------------------------------------------------------------------------


@pytest.fixture
def two_lists(tmp_path):
    """Lists a.csv and b.csv of the videos in folders a and b; b has some of a's classes, and some of a's file names."""
    for name, rows in (("a", ["1,run", "2,walk", "3,walk", "4,jump"]), ("b", ["1,walk", "5,run"])):
        (tmp_path / name).mkdir()
        for row in rows:
            (tmp_path / name / f"{row[0]}.mp4").touch()
        text = "".join(f"{row[0]}.mp4,{row[2:]}\n" for row in rows)
        (tmp_path / f"{name}.csv").write_text(f"path,label\n{text}")
    return tmp_path


def lists_recipe(folder, train, *overrides):
    keys = [f"data.train={train}", f"data.val.path={folder}/b.csv", f"data.val.root={folder}/b"]
    return load_recipe("demo", [*keys, "train.global_batch=2", *overrides])


def full(folder, name, more=""):
    return f"{{path: {folder}/{name}.csv, root: {folder}/{name}{more}}}"


def test_several_lists_are_one_split(two_lists):
    config = lists_recipe(two_lists, f"[{full(two_lists, 'a')}, {full(two_lists, 'b', ', weight: 2.5')}]")
    manifest = read_split(config.data, "train")
    assert manifest.classes == ("jump", "run", "walk")
    rows = manifest.rows.to_pylist()
    assert [(r["sample_id"], r["label"], r["weight"]) for r in rows] == [
        *[("1.mp4", 1, 1.0), ("2.mp4", 2, 1.0), ("3.mp4", 2, 1.0), ("4.mp4", 0, 1.0)],
        *[("2:1.mp4", 2, 2.5), ("2:5.mp4", 1, 2.5)],
    ]
    assert [r["uri"] for r in rows][4:] == [f"{two_lists}/b/1.mp4", f"{two_lists}/b/5.mp4"]
    assert epoch_length(manifest.rows, "none") == 9
    train_set, val_set = read_splits(config)
    assert check_data(config, train_set, val_set).model.num_classes == 3
    (one, *_) = read_split(lists_recipe(two_lists, full(two_lists, "a")).data, "train").rows.to_pylist()
    assert "weight" not in one
    assert list_fingerprint(train_set) != list_fingerprint(
        read_split(lists_recipe(two_lists, full(two_lists, "a")).data, "train")
    )


def test_a_batch_larger_than_the_drawn_epoch_is_refused(two_lists):
    config = lists_recipe(two_lists, full(two_lists, "a", ", weight: 0.25"))
    with pytest.raises(UserError, match="global_batch 2 is more than the 1 training clips of an epoch"):
        check_data(config, *read_splits(config))


def test_lists_are_paths_sections_or_both(tmp_path):
    short, long = tmp_path / "short.yaml", tmp_path / "long.yaml"
    rest = "data:\n  val: b.csv\n  test: c.csv\n  train: "
    short.write_text(f"name: x\n{rest}[a.csv, {{path: 001, weight: 2}}, '3']\n")
    config = load_recipe(short)
    assert [each.path for each in config.data.train.lists] == ["a.csv", "001", "3"]
    assert [each.weight for each in config.data.train.lists] == [1.0, 2.0, 1.0]
    assert (config.data.val.path, config.data.test.path) == ("b.csv", "c.csv")
    long.write_text(config.to_yaml())
    assert load_recipe(long) == config
    same = load_recipe("demo", ["name=x", "data.train=[a.csv, {path: 001, weight: 2}, '3']"])
    assert same.data.train == config.data.train
    assert load_recipe(short, ["data.train.root=/v", "data.test=null"]).data.train.lists[0].root == "/v"
    assert load_recipe(short, ["data.test=null"]).data.test is None
    assert load_recipe(short, ["data.train=d.csv"]).data.train.lists[0].path == "d.csv"
    split = {"path": "d.csv", "boxes": "boxes.csv", "excluded": "excluded.csv"}
    data = config.data.model_copy(update={"val": config.data.val.model_copy(update=split)})
    detection = config.detection.model_copy(update={"evaluated": "some.pbtxt"})
    everywhere = with_absolute_paths(config.model_copy(update={"data": data, "detection": detection}))
    moved = everywhere.data
    assert {key: getattr(moved.val, key) for key in split} == {
        key: f"{tmp_path.cwd()}/{name}" for key, name in split.items()
    }
    assert everywhere.detection.evaluated == f"{tmp_path.cwd()}/some.pbtxt"
    assert [each.path for each in moved.train.lists] == [str(tmp_path.cwd() / name) for name in ("a.csv", "001", "3")]
    assert moved.test.path == str(tmp_path.cwd() / "c.csv")


@pytest.mark.parametrize(
    ("train", "problem"),
    [
        ("[a.csv, {path: b.csv, wieght: 2}]", r"data\.train\.others\.wieght: unknown key \(did you mean 'weight'"),
        ("[a.csv, {path: b.csv, weight: 0}]", r"data\.train\.others\.weight: .*greater than 0, not 0"),
        ("[a.csv, {root: b}]", r"data\.train\.others\.path: missing"),
        ("[]", r"data\.train: .*not \[\]"),
        ("[a.csv, {path: 's3://me:secret@b/c.csv'}]", r"data\.train\.others\.0\.path .*leave user and password out"),
    ],
)
def test_wrong_lists_are_refused(train, problem):
    with pytest.raises(RecipeError, match=problem):
        load_recipe("demo", [f"data.train={train}"])


def test_a_video_of_two_lists_and_an_unknown_class_are_refused(two_lists):
    twice = f"[{full(two_lists, 'a')}, {full(two_lists, 'a')}]"
    with pytest.raises(ManifestError, match=r"4 problems(.|\n)*a\.csv: video .*1\.mp4 is also in .*a\.csv; keep one"):
        read_split(lists_recipe(two_lists, twice).data, "train")
    (two_lists / "b.csv").write_text("path,label\n1.mp4,swim\n")
    with pytest.raises(ManifestError, match=r"1 class not in the training list .*a\.csv: 'swim'"):
        read_split(lists_recipe(two_lists, f"[{full(two_lists, 'a')}, {full(two_lists, 'b')}]").data, "train")
