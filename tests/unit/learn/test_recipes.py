"""The recipes of the paper: each costs what it declares, and trains a step on rows of its data format."""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import posmlp
from pipelines.data.loader import decode_rows
from posmlp.config import RECIPES, load_recipe
from posmlp.learn.learner import Learner
from posmlp.model.cost import count_macs, count_params
from posmlp.tasks import task_of
from posmlp.video.clip import views_per_video
from posmlp.video.draws import class_weights
from posmlp.video.faces import make_face_set
from posmlp.video.manifest import read_split
from tests.helpers.videos import write_video

VIDEO = [f"{data}_{model}" for data in ("k400", "ssv1", "ssv2") for model in ("s16", "s32", "b16", "b32")]
IMAGE = ["in1k_s", "in1k_b"]
COST = re.compile(r"^# cost: ([0-9.]+) M parameters, ([0-9.]+) GMACs per (?:clip|image)$", re.MULTILINE)
OTHERS = ["ava_s16", "demo", "faces", "reference", "scenes", "small_data"]
MICRO = ["megc_s16", "casme2_s16", "samm_s16", "smic_s16"]
TESTS = [f"{data}_published_test" for data in ("k400", "ssv1", "ssv2")]
CPU = ["model.weights=null", "scaling.workers=1", "scaling.use_gpu=false", "scaling.micro_batch=null"]

# From the files in configs/ of github.com/zhouds1918/PosMLP_Video: BASE_LR, WARMUP_EPOCHS, NUM_CLASSES, views of a test
# (README) and DROP_DEPTH_RATE of s16, s32, b16, b32. Two values are not the files': see the comments in the recipes.
PUBLISHED = {
    "k400": (2e-4, 10, 400, (4, 1), (0.1, 0.1, 0.3, 0.3)),
    "ssv1": (4e-4, 5, 174, (1, 3), (0.1, 0.3, 0.5, 0.5)),
    "ssv2": (4e-4, 5, 174, (1, 3), (0.3, 0.3, 0.6, 0.6)),
}


def text_of(name):
    return (RECIPES / f"{name}.yaml").read_text()


def test_there_are_no_others():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*VIDEO, *IMAGE, *TESTS, *MICRO, *OTHERS}


@pytest.mark.parametrize("name", VIDEO + IMAGE)
def test_a_recipe_says_what_it_is(name):
    config, text = load_recipe(name), text_of(name)
    assert config.name == name
    assert f"posmlp train {name}\n" in text
    assert {"# published: ", "# cost: ", "# data: "} <= {line[: line.find(": ") + 2] for line in text.splitlines()}
    assert re.search(r"github\.com/\w+/\w+,\sconfigs?/", text), "where its values come from"


@pytest.mark.parametrize("name", TESTS)
def test_a_published_test(name, workplace, monkeypatch):
    """As the published code tests: its views, pixels and fusion, on the data of the training recipe."""
    monkeypatch.chdir(workplace)
    config, trained, data = load_recipe(name), load_recipe(f"{name[:4]}_s16"), name[:4]
    assert (config.eval.clips, config.eval.crops) == PUBLISHED[data][3]
    assert (config.eval.clip_positions, config.data.normalisation) == ("slowfast", "slowfast")
    assert config.eval.fusion == "logits"
    assert config.eval.short_side == (256 if data == "k400" else 224)
    for key in ("format", "classes", "train", "val", "sampling", "stride", "fps", "modality"):
        assert getattr(config.data, key) == getattr(trained.data, key)
    assert config.model.variant() == trained.model.model_copy(update={"drop_path": 0.0}).variant()
    text = text_of(name)
    assert f"posmlp import FILE {name}\n" in text
    assert re.search(r"github\.com/\w+/\w+ \(configs/", text)
    decoded(read_split(config.data, "val"), 2, config, False)


@pytest.mark.parametrize("name", VIDEO)
def test_the_published_values(name):
    config = load_recipe(name)
    data, model = name.split("_")
    lr, warmup, classes, views, drop_path = PUBLISHED[data]
    assert config.model.name == model
    assert config.model.drop_path == drop_path[("s16", "s32", "b16", "b32").index(model)]
    assert config.model.num_classes == classes
    assert config.model.weights == f"runs/in1k_{model[0]}"
    assert config.data.normalisation == load_recipe(f"in1k_{model[0]}").data.normalisation
    assert (config.optim.lr, config.optim.min_lr, config.optim.warmup_epochs) == (lr, 1e-6, warmup)
    videos = 32 if name == "ssv1_s16" else 64  # a step
    assert config.optim.lr_batch == config.train.global_batch == videos * config.data.repeats
    assert (config.optim.weight_decay, config.optim.label_smoothing) == (0.05, 0.1)
    assert (config.train.epochs, config.data.repeats) == (60, 2)
    assert (config.augment.mixup, config.augment.cutmix, config.augment.erasing) == (0.8, 1.0, 0.25)
    assert (config.augment.randaug_layers, config.augment.randaug_magnitude) == (4, 7)
    assert (config.eval.clips, config.eval.crops) == views
    assert config.augment.flip == (0.5 if data == "k400" else 0)
    assert (config.data.sampling, config.data.stride) == (("dense", 4) if data == "k400" else ("uniform", 1))
    assert (config.model.variant().frames, config.model.variant().image_size) == (int(model[1:]), 224)


OWN_BATCH = {"optim.lr_batch", "train.global_batch", "scaling.workers"}  # of ssv1_s16


def differing(one, other):
    one, other = (load_recipe(name).flat() for name in (one, other))
    return {key for key in one | other if one.get(key) != other.get(key)}


@pytest.mark.parametrize("data", PUBLISHED)
def test_recipes_of_a_data_set_differ_in_the_model_alone(data):
    """And in what fits on a GPU. Values that a family shares are then right in all of it, or in none."""
    for other in ("s32", "b16", "b32"):
        model = {"name", "model.name", "model.drop_path", "scaling.micro_batch"}
        model |= OWN_BATCH if data == "ssv1" else set()
        assert differing(f"{data}_s16", f"{data}_{other}") <= model | ({"model.weights"} if other[0] == "b" else set())
    assert differing("in1k_s", "in1k_b") == {"name", "model.name"}


@pytest.mark.parametrize("model", ["s16", "s32", "b16", "b32"])
def test_recipes_of_a_model_differ_in_the_data_and_the_rate(model):
    v1, v2, kinetics = (f"{data}_{model}" for data in ("ssv1", "ssv2", "k400"))
    places = {f"data.{split}.{key}" for split in ("train", "val") for key in ("path", "root")}
    batch = OWN_BATCH if model == "s16" else set()
    assert differing(v1, v2) <= {"name", "model.drop_path", "data.format", "data.classes"} | places | batch
    allowed = {"data.sampling", "data.stride", "data.fps", "augment.flip", "optim.lr", "optim.warmup_epochs"}
    allowed |= {"name", "model.drop_path", "model.num_classes", "data.format", "data.classes"} | places
    assert differing(v2, kinetics) <= allowed | {"eval.clips", "eval.crops"}


@pytest.mark.parametrize("name", VIDEO + IMAGE)
def test_a_recipe_costs_what_it_declares(name):
    """Counted by the closed form and, independently, by PyTorch, on a device without data."""
    model, variant = load_recipe(name).model, load_recipe(name).model.variant()
    params, gmacs = map(float, COST.search(text_of(name)).groups())
    digits = len(COST.search(text_of(name))[2].partition(".")[2])
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        built = posmlp.create_model(model.name, **model.overrides()).eval()
        built(torch.empty(1, 3, variant.frames, variant.image_size, variant.image_size))
    assert round(count_params(built) / 1e6, 1) == params
    assert round(count_macs(variant) / 1e9, digits) == gmacs
    assert counter.get_total_flops() / 2 == count_macs(variant)


def test_the_cost_of_s16_is_the_published_one():
    params, gmacs = map(float, COST.search(text_of("ssv1_s16")).groups())
    assert (params, round(gmacs)) == (13.5, 40)


@pytest.mark.parametrize("name", MICRO)
def test_a_recipe_of_micro_expressions(name):
    """It claims no settings of the paper, weighs rare classes, holds out subjects, and keeps slight movements."""
    config, text = load_recipe(name), text_of(name)
    assert config.name == name and f"posmlp folds {name} --by subject" in text
    assert "Its settings for them are not known here" in text and "this project's" in text
    assert (config.model.name, config.model.variant().frames, config.data.sampling) == ("s16", 16, "uniform")
    assert config.model.weights == "runs/k400_s16" and config.data.balance == "weights"
    assert config.data.group_by == "subject" and config.data.val.share == 0.2
    assert (config.augment.flip, config.augment.randaug_layers, config.augment.mixup) == (0.5, 0, 0)
    assert config.data.format == name.removesuffix("_s16")
    places = {f"data.{split}.{key}" for split in ("train", "val") for key in ("path", "root")}
    assert differing("megc_s16", name) <= {"name", "data.format", "data.train.others", *places}
    others = [each.path for each in config.data.train.others]
    assert others == [load_recipe(each).data.train.path for each in MICRO[2:]] * (name == "megc_s16")
    (costs,) = COST.findall(text)
    for classes in (3, 5):
        with torch.device("meta"):
            assert round(count_params(posmlp.create_model("s16", num_classes=classes)) / 1e6, 1) == float(costs[0])
        assert round(count_macs(load_recipe(name, [f"model.num_classes={classes}"]).model.variant()) / 1e9, 1) == float(
            costs[1]
        )


# A step on rows of the recipe's own format, at the places that it names -----------------------------------------------


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def write_images(folder, names, size=(72, 54)):
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        pixels = np.random.default_rng(i).integers(0, 256, (size[1] // 6, size[0] // 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size).save(folder / name)


def kinetics(root):
    for split in ("train", "val"):
        (root / split).mkdir()
        lines = [f"{action},{split}{i:08d}xyz,{i},{i + 10},{split}" for i, action in enumerate(("waving", "zumba"))]
        write(root / f"{split}.csv", "\n".join(["label,youtube_id,time_start,time_end,split", *lines]))
        for i in range(2):
            write_video(root / split / f"{split}{i:08d}xyz_{i:06d}_{i + 10:06d}.mp4", rate=25, count=60)


def something_v1(root):
    prefix = "something-something-v1"
    write(root / f"{prefix}-labels.csv", "Holding something\nTurning something\n")
    for split, first in (("train", 100), ("validation", 200)):
        lines = [f"{first};Holding something", f"{first + 1};Turning something"]
        write(root / f"{prefix}-{split}.csv", "\n".join(lines))
        for i in range(2):
            write_images(root / f"20bn-{prefix}" / str(first + i), [f"{n:05d}.jpg" for n in range(1, 20 + i)])


def something_v2(root):
    write(root / "labels/labels.json", json.dumps({"Holding something": "0", "Turning something": "1"}))
    (root / "20bn-something-something-v2").mkdir()
    for split, first in (("train", 100), ("validation", 200)):
        templates = ("Holding [something]", "Turning [something]")
        items = [{"id": str(first + i), "label": "x", "template": text} for i, text in enumerate(templates)]
        write(root / f"labels/{split}.json", json.dumps(items))
        for i in range(2):
            write_video(root / "20bn-something-something-v2" / f"{first + i}.webm", form="matroska")


def imagenet(root):
    for split in ("train", "val"):
        for i, name in enumerate(("n01440764", "n01443537")):
            write_images(root / split / name, [f"{name}_{n}.JPEG" for n in range(2)], (72 + 30 * i, 54))


FAKE = {"k400": kinetics, "ssv1": something_v1, "ssv2": something_v2, "imagenet": imagenet}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which each recipe finds a tiny data set of its format."""
    folder = tmp_path_factory.mktemp("recipes")
    for name, make in FAKE.items():
        (folder / "data" / name).mkdir(parents=True)
        make(folder / "data" / name)
    return folder


def decoded(manifest, count, config, train):
    """The first rows of a split as a run decodes them."""
    columns = decode_rows(manifest.rows.slice(0, count), np.ones(count, bool), config, 0, train)
    assert [*columns["reason"], *columns["fatal"]] == [""] * 2 * count
    variant = config.model.variant()
    size = (variant.frames, variant.image_size, variant.image_size, 3)
    assert columns["clip"].shape == (count, views_per_video(config, train), *size)
    return task_of(config).collate(columns, manifest.rows, config, train=train)


def step_of(config):
    """A training step on rows of the recipe's data set; the loss."""
    train, val = (read_split(config.data, split) for split in ("train", "val"))
    assert train.classes == val.classes
    decoded(val, 1, config, False)
    batch = decoded(train, config.train.global_batch // config.data.repeats, config, True)
    torch.manual_seed(0)
    model = posmlp.create_model(config.model.name, **config.model.overrides())
    before = model.head.weight.clone()
    learner = Learner(model, config, steps_per_epoch=1, class_names=train.classes)
    learner.step = config.train.epochs // 2  # at step 0 the rate is 0
    loss = learner.train_step(batch).loss
    assert not torch.equal(model.head.weight, before)
    return loss


# With ssv2_s16 below, each model and each data set. The tests above compare the recipes of a model and of a data set.
@pytest.mark.parametrize("name", ["k400_s32", "ssv1_b16", "ssv2_b32", *IMAGE])
def test_a_recipe_takes_a_step(name, workplace, monkeypatch):
    """Everything but the place of the run is the recipe's, with pictures of 64 pixels to keep it short."""
    monkeypatch.chdir(workplace)
    config = load_recipe(name, [*CPU, "train.global_batch=4", "model.image_size=64"])
    assert abs(step_of(config) - math.log(config.model.num_classes)) < 1.5


def test_a_recipe_takes_a_step_at_its_full_size(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    config = load_recipe("ssv2_s16", [*CPU, "train.global_batch=2", "data.repeats=1"])
    assert abs(step_of(config) - math.log(174)) < 1.5


def learned(config):
    """Train as the recipe says, in this process; the predictions of the validation split, and its labels."""
    train, val = (read_split(config.data, split) for split in ("train", "val"))
    model = config.model.model_copy(update={"num_classes": len(train.classes)})
    config = config.model_copy(update={"model": model})
    torch.manual_seed(config.train.seed)
    model = posmlp.create_model(config.model.name, **config.model.overrides())
    size, count = config.train.global_batch, len(train.rows)
    weights = class_weights(train.rows, len(train.classes))
    learner = Learner(model, config, count // size, train.classes, weights)
    for epoch in range(config.train.epochs):
        rows = train.rows.take(np.random.default_rng(epoch).permutation(count))
        columns = decode_rows(rows, np.ones(count, bool), config, epoch, True)
        batch = task_of(config).collate(columns, rows, config, train=True)
        for start in range(0, count - size + 1, size):
            learner.train_step(batch.slice(start, start + size))
    columns = decode_rows(val.rows, np.ones(len(val.rows), bool), config, 0, False)
    batch = task_of(config).collate(columns, val.rows, config, train=False)
    scores = task_of(config).score(model.eval(), batch, config)
    return scores[:, 0].argmax(1).numpy(), batch.labels.numpy()


@pytest.mark.slow
@pytest.mark.parametrize(("order", "low", "high"), [("ordered", 0.9, 1), ("shuffled", 0, 0.65)])
def test_the_faces_of_unseen_subjects_are_told_by_the_order_of_frames_alone(tmp_path, monkeypatch, order, low, high):
    """A subject of each part is held out. Half of the clips are negative, which is what a guess can have."""
    monkeypatch.chdir(tmp_path)
    make_face_set("data/faces")
    predicted, labels = learned(load_recipe("faces", [f"data.frame_order={order}"]))
    assert len(labels) == 72
    assert low <= np.mean(predicted == labels) <= high
