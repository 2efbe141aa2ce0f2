"""``posmlp init``: what it says of the videos is true, and its recipe passes every check of a run."""

import csv
import re
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from benchmarks.mixed_videos import draw_folder
from pipelines.cli import main
from pipelines.planning import starter
from pipelines.planning.starter import Lists, Look, comments, propose, recipe_text
from pipelines.training.preflight import check_data, read_splits
from posmlp.config import load_recipe
from posmlp.video.manifest import SCHEMA, Manifest

CLASSES = 8
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of 7 classes of 3 videos and one of 2; the first video of ``left`` is cut off."""
    folder = tmp_path_factory.mktemp("videos") / "clips"
    assert draw_folder(folder, 3) == 23
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(starter, "measure_step_s", lambda config, device: 0.5)
    return tmp_path


def test_init_writes_a_recipe_that_a_run_accepts(clips, here, capsys):
    assert main(["init", str(clips)]) == 0
    text = capsys.readouterr().out
    config = load_recipe(here / "clips.yaml")
    train_set, val_set = read_splits(config)
    assert check_data(config, train_set, val_set).model.num_classes == CLASSES
    train, val = (set(each.rows["uri"].to_pylist()) for each in (train_set, val_set))
    assert len(train | val) == 23 and not train & val
    assert f"split: {len(train)} videos for training, {len(val)} for validation" in text
    assert text.endswith("clips.yaml is written. Next:\n  posmlp train clips.yaml\n")
    recipe = (here / "clips.yaml").read_text().splitlines()
    assert len(recipe) <= 18 and recipe[0].startswith("# Made by `posmlp init ")
    assert sum(" # " in line for line in recipe[1:]) >= 8


def test_init_says_what_is_there(clips, here, capsys):
    main(["init", str(clips), "--out", "mine.yaml"])
    text = capsys.readouterr().out
    assert f"{clips}: 23 videos of 8 classes, 2 to 3 of a class" in text
    assert "approach 3, clockwise 3, counterclockwise 2, down 3," in text
    assert re.search(rf"looked at all: 1 bad\n    {clips}/left/000\.mp4: the video is truncated or corrupt", text)
    low, high = re.search(r"([\d.]+)-([\d.]+) frames/s", text).groups()
    assert (float(low), float(high)) == (10, 30)
    assert "96-176 x 96-128 pixels" in text
    assert "h264 22" in text
    steps = len(read_splits(load_recipe("mine.yaml"))[0].rows) // load_recipe("mine.yaml").train.global_batch
    minutes = steps * 0.5 * 40 / 60  # the made-up step of half a second
    assert float(re.search(r"take about ([\d.]+) min", text)[1]) == pytest.approx(minutes, abs=0.2)


def test_init_overwrites_nothing(clips, here, capsys):
    (here / "clips.yaml").write_text("mine")
    assert main(["init", str(clips)]) == 1
    assert "clips.yaml exists; choose another file with --out, or remove it" in capsys.readouterr().err
    assert (here / "clips.yaml").read_text() == "mine"


def test_init_keeps_groups_of_a_list_together(clips, here, capsys):
    paths = sorted(path.relative_to(clips.parent) for path in clips.rglob("*.mp4"))
    lines = [f"{clips.parent}/{path},{path.parts[1]},p{i % 6}" for i, path in enumerate(paths)]
    (clips.parent / "list.csv").write_text("path,label,person\n" + "\n".join(lines) + "\n")
    assert main(["init", str(clips.parent / "list.csv"), "--group-by", "person"]) == 0
    config = load_recipe("list.yaml")
    with open(clips.parent / "list.csv") as file:
        person = {row["path"]: row["person"] for row in csv.DictReader(file)}
    train, val = ({person[each] for each in split.rows["uri"].to_pylist()} for split in read_splits(config))
    assert train and val and not train & val
    assert main(["init", str(clips.parent / "list.csv"), "--group-by", "actor", "--out", "other.yaml"]) == 1
    assert "no column 'actor' (data.group_by); columns are" in capsys.readouterr().err
    assert not (here / "other.yaml").exists(), "a recipe that cannot run is not left behind"


def test_init_takes_the_folders_of_a_data_set_that_is_split(clips, here, capsys):
    for name in ("train", "val", "test"):
        (here / "set" / name).mkdir(parents=True)
        for label in ("left", "right"):
            (here / "set" / name / label).symlink_to(clips / label)
    assert main(["init", "set"]) == 0
    data = load_recipe("set.yaml").data
    assert (data.train.path, data.val.path, data.val.share, data.test.path) == (
        "set/train",
        "set/val",
        None,
        "set/test",
    )
    assert main(["init", "set", "--group-by", "folder", "--out", "x.yaml"]) == 1
    assert "set is split already" in capsys.readouterr().err


def test_init_refuses_what_a_recipe_for_videos_does_not_fit(clips, here, capsys):
    (here / "one").mkdir()
    (here / "one" / "left").symlink_to(clips / "left")
    (here / "broken" / "a").mkdir(parents=True)
    (here / "broken" / "b").mkdir()
    for name in "ab":
        (here / "broken" / name / "1.mp4").write_bytes(b"no video")
        (here / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(here / "images" / name / "1.png")
    (here / "clip.MP4").symlink_to(next((clips / "left").iterdir()))
    for folder, text in (
        ("clip.MP4", "clip.MP4 is one video; give a folder with a folder of videos for each class, or a list"),
        ("one", "one has one class, 'left'; sort the videos"),
        ("images", "images has images; init is for videos"),
        ("broken", "none of the 2 videos of broken can be read"),
        ("nowhere", "no such file or folder"),
    ):
        assert main(["init", folder]) == 1
        assert text in capsys.readouterr().err
        assert not (here / f"{folder}.yaml").exists()


def manifest_of(*counts):
    """A manifest of videos that do not exist, so many of each class."""
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    ids = [f"{i}.mp4" for i in range(len(labels))]
    columns = {"sample_id": ids, "uri": ids, "label": labels, "frames": [None] * len(ids)}
    return Manifest(pa.table(columns, schema=SCHEMA), tuple(f"c{i}" for i in range(len(counts))))


def look_of(manifest, seconds=2.0, rate=25.0):
    count = len(manifest.rows)
    frames = [round(seconds * rate)] * count
    return Look(count, count, [(320, 240)] * count, frames, [seconds] * count, [rate] * count, Counter(h264=count))


@pytest.mark.parametrize(
    ("counts", "seconds", "expected"),
    [
        ((50, 50), 2.0, {"sampling": None, "balance": None, "batch": 4, "frames": 16}),
        ((90, 30), 2.0, {"balance": "sampling", "batch": 4}),
        ((90, 31), 2.0, {"balance": None}),
        ((200, 300), 8.5, {"sampling": "dense", "fps": 4.0, "batch": 16}),
        ((20, 20), 0.5, {"frames": 8, "batch": 4}),
        ((80, 80), 2.0, {"batch": 8}),
        ((5, 4), 2.0, {"batch": 2}),
    ],
)
def test_the_proposal_follows_from_the_data(counts, seconds, expected, monkeypatch):
    monkeypatch.setattr(starter.torch.cuda, "is_available", lambda: False)
    manifest = manifest_of(*counts)
    tree = propose("x", Lists("x", 0.2), manifest, look_of(manifest, seconds))
    found = {**tree["data"], "batch": tree["train"]["global_batch"], "frames": tree["model"]["frames"]}
    assert {key: found.get(key) for key in expected} == expected
    text = recipe_text(tree, comments(tree, Lists("x", 0.2), manifest, look_of(manifest, seconds)), "posmlp init x")
    assert "None" not in text


def test_a_large_set_with_a_gpu_gets_a_published_size(monkeypatch, tmp_path):
    monkeypatch.setattr(starter.torch.cuda, "is_available", lambda: True)
    manifest = manifest_of(3000, 3000)
    tree = propose("x", Lists("x", 0.2), manifest, look_of(manifest, 10.0))
    (tmp_path / "x.yaml").write_text(recipe_text(tree, {}, "posmlp init x"))
    config = load_recipe(tmp_path / "x.yaml")
    assert (config.model.name, config.train.precision, config.data.cache_dir) == ("s16", "bf16", None)
    assert config.data.modality == "rgb"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("my videos/", "my-videos"),
        ("/v/kinetics.2", "kinetics-2"),
        ("list.csv", "list"),
        (".", "mine"),
        ("mes été #1", "mes-ete-1"),
        ("動画", "mine"),
        ("b.yaml", "b"),
    ],
)
def test_the_recipe_is_named_after_the_folder_or_list(here, path, name):
    (here / "list.csv").touch()
    assert starter.recipe_name(path) == name


def test_the_time_of_a_step_is_measured():
    small, large = (
        starter.measure_step_s(load_recipe("demo", ["model.num_classes=8", f"train.global_batch={count}"]), CPU)
        for count in (2, 32)
    )
    assert 0 < small < large


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.csv", "-5KQ66BBWC4,0902,0.077,0.151,0.283,0.811,80,1\n"),
        ("people.csv", "a,902,0,0.1,1,1.0,,0.99\n"),
        ("map.pbtxt", 'item { name: "sit" id: 1 }'),
    ],
)
def test_boxes_are_not_for_init(here, capsys, name, content):
    (here / name).write_text(content)
    assert main(["init", name]) == 1
    assert f"{name} has boxes of action detection; init is for recognition" in capsys.readouterr().err
    assert not [*here.glob("*.yaml")]


def test_a_parquet_list_of_boxes_is_not_for_init(here, capsys):
    pq.write_table(pa.table({"uri": ["a.mp4"], "boxes": [[0.0]], "actions": [[0]]}), here / "list.parquet")
    assert main(["init", "list.parquet"]) == 1
    assert "init is for recognition" in capsys.readouterr().err
