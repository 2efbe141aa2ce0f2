"""Detection as a task: its batches, its loss and its results, against loops and closed forms."""

import json
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.registry.datasets import class_counts
from pipelines.tracking.plots import validation_files
from posmlp import create_model
from posmlp.config import RecipeError, load_recipe
from posmlp.detection.scenes import make_scene_set
from posmlp.learn.learner import Learner
from posmlp.tasks import task_of
from posmlp.tasks.detection import DetectionSummary
from posmlp.video.manifest import Manifest, ManifestError
from tests.helpers.batches import DETECTION, make_box_batch

CONFIG = ("model.frames=4", "model.image_size=32", "model.num_classes=8", "train.global_batch=8", *DETECTION)


def recipe(*overrides):
    return load_recipe("demo", [*CONFIG, *overrides])


def make_learner(*overrides):
    config = recipe(*overrides)
    torch.manual_seed(0)
    return Learner(create_model(config.model.name, **config.model.overrides()), config, 5)


def naive_loss(learner, batch, gamma=0.0):
    """The mean over boxes and classes, one by one, of clips that are scored one by one in eval mode."""
    from posmlp.video.augment import to_input

    total = 0.0
    for i, clip in enumerate(batch.boxes.clip.tolist()):
        x = to_input(batch.clips[clip : clip + 1], learner.config)
        logits = learner.module(x, batch.boxes.corners[i : i + 1], torch.tensor([0])).double()[0]
        for logit, label in zip(logits.tolist(), batch.labels[i].tolist(), strict=True):
            p = 1 / (1 + math.exp(-logit))
            of_truth = p if label else 1 - p
            total -= (1 - of_truth) ** gamma * math.log(of_truth)
    return total / batch.labels.numel()


@pytest.mark.parametrize("gamma", [None, 2.0])
def test_the_loss_is_the_mean_over_boxes_and_classes(gamma):
    learner, batch = make_learner(f"detection.focal_gamma={gamma or 'null'}", "augment.brightness=0"), make_box_batch()
    quiet = learner.config.augment.model_copy(update=dict.fromkeys(("brightness", "contrast", "saturation"), 0.0))
    learner.objective.config = learner.config.model_copy(update={"augment": quiet})
    learner.module.eval()
    with torch.no_grad():
        found = learner.objective(learner.module, batch) / learner.objective.share(batch)
        assert float(found) == pytest.approx(naive_loss(learner, batch, gamma or 0.0), rel=1e-4)


def test_a_flip_moves_boxes_and_exchanges_classes():
    """The loss of a clip that training flips is that of the flipped clip, with its boxes and classes."""
    overrides = [
        "augment.brightness=0",
        "augment.contrast=0",
        "augment.saturation=0",
        "augment.flip_classes={'2': '5'}",
    ]
    batch = make_box_batch()
    left, top, right, bottom = batch.boxes.corners.unbind(1)
    labels = batch.labels.clone()
    labels[:, [2, 5]] = labels[:, [5, 2]]
    boxes = replace(batch.boxes, corners=torch.stack([1 - right, top, 1 - left, bottom], 1))
    flipped = replace(batch, clips=batch.clips.flip(3), labels=labels, boxes=boxes)
    losses = []
    for flip, given_batch in (("1", batch), ("0", flipped)):
        learner = make_learner(f"augment.flip={flip}", *overrides)
        learner.module.eval()
        losses.append(learner.objective(learner.module, given_batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_clips_without_boxes_are_steps_like_others():
    """They have no loss. A whole batch without boxes leaves the weights to the optimizer's decay."""
    learner, batch = make_learner(), make_box_batch()
    nothing = replace(batch.boxes, counts=torch.zeros(8, dtype=torch.int64))
    cut = {name: getattr(nothing, name)[:0] for name in ("corners", "clip", "number")}
    result = learner.train_step(replace(batch, labels=batch.labels[:0], boxes=replace(nothing, **cut)))
    assert (result.loss, result.grad_norm) == (0.0, 0.0)
    assert math.isfinite(learner.train_step(batch).loss)


def test_it_learns_the_boxes_of_one_batch():
    """The boxes of a clip have the same classes: the last map of such small clips is a single cell."""
    learner, batch = make_learner("optim.lr=3e-3", "optim.warmup_epochs=0", "train.epochs=100"), make_box_batch()
    batch = replace(batch, labels=make_box_batch(seed=1).labels[batch.boxes.clip])
    losses = [learner.train_step(batch).loss for _ in range(60)]
    assert losses[0] == pytest.approx(math.log(2), rel=0.05)
    assert losses[-1] < 0.35 * losses[0]


# --- batches ----------------------------------------------------------------------------------------------------


def table(boxes, actions, scores, **metadata):
    columns = {
        "boxes": pa.array(boxes, pa.list_(pa.float32())),
        "actions": pa.array(actions, pa.list_(pa.list_(pa.int32()))),
    }
    columns |= {"scores": pa.array(scores, pa.list_(pa.float32()))}
    return pa.table(columns).replace_schema_metadata({key: json.dumps(value) for key, value in metadata.items()})


def test_a_batch_has_the_boxes_that_its_clips_show():
    """The second row shows the left half: one box is there whole, one by a third, one by a tenth, one not at all."""
    left = [0.0, 0.0, 0.25, 1.0, 0.4, 0.2, 0.7, 0.4, 0.49, 0.0, 0.59, 1.0, 0.6, 0.6, 0.8, 0.8]
    rows = table([[0.1, 0.2, 0.3, 0.4], left], [[[1]], [[0], [2, 3], [4], []]], [[1.0], [1.0] * 4])
    columns = {
        "row": np.array([1, 0, 0]),
        "real": np.array([True, True, True]),
        "reason": np.array(["", "gone", ""], dtype=object),
        "clip": np.zeros((3, 1, 2, 4, 4, 3), np.uint8),
        "shown": np.array([[[0, 0, 0.5, 1]], [[0, 0, 0, 0]], [[0, 0, 1, 1]]], np.float32),
        "seeds": np.zeros((3, 1), np.int64),
    }
    batch = task_of(recipe()).collate(columns, rows, recipe("detection.box_share=0.3"), train=True)
    assert batch.boxes.counts.tolist() == [2, 0, 1] and batch.boxes.clip.tolist() == [0, 0, 2]
    assert batch.boxes.number.tolist() == [0, 1, 0] and batch.rows.tolist() == [1, 0, 0]
    expected = [[0, 0, 0.5, 1], [0.8, 0.2, 1, 0.4], [0.1, 0.2, 0.3, 0.4]]
    assert batch.boxes.corners.numpy() == pytest.approx(np.array(expected), abs=1e-6)
    assert [row.nonzero().flatten().tolist() for row in batch.labels] == [[0], [2, 3], [1]]
    assert batch.weights.tolist() == [1, 0, 1]


@given(st.integers(0, 2**31), st.integers(1, 9))
def test_micro_batches_are_the_batch_in_parts(seed, size):
    whole = make_box_batch(seed=seed)
    parts = list(whole.micro_batches(size))
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    assert torch.equal(torch.cat([part.boxes.corners for part in parts]), whole.boxes.corners)
    clips = [part.boxes.clip + size * i for i, part in enumerate(parts)]
    assert torch.equal(torch.cat(clips), whole.boxes.clip)
    assert all(torch.equal(part.boxes.counts, part.boxes.clip.bincount(minlength=len(part.clips))) for part in parts)


# --- results ----------------------------------------------------------------------------------------------------


def test_the_results_are_of_scored_boxes_against_the_truth():
    """Two key frames. A detector's box on the person is scored, one off it is a false positive; the truth is not."""
    person, near, off = [0.1, 0.1, 0.5, 0.9], [0.12, 0.1, 0.5, 0.9], [0.6, 0.1, 0.9, 0.9]
    rows = table(
        [[*person, *near, *off], person],
        [[[0, 1], [], []], [[1]]],
        [[math.nan, 0.9, 0.95], [1.0]],
        groups={"pose": [0], "object": [1, 2]},
    )
    config = recipe()
    results = task_of(config).results(config, rows)
    logits = torch.full((4, 8), -9.0)
    logits[:, 0] = torch.tensor([9.0, 1.0, 2.0, -3.0])  # class 0: the false positive is first
    logits[:, 1] = torch.tensor([9.0, 3.0, 0.0, 2.0])  # class 1: both true ones are first
    batch = make_box_batch(2)
    boxes = replace(batch.boxes, number=torch.tensor([0, 1, 2, 0]), counts=torch.tensor([3, 1]))
    batch = replace(batch, boxes=boxes, rows=torch.tensor([0, 1]))
    results.add(batch, [logits, torch.ones(2)])
    results.gather()
    metrics, summary = results.metrics(), results.summary()
    assert metrics["val/map"] == pytest.approx((0.5 + 1.0) / 2)
    assert metrics["val/map_pose"] == 0.5 and metrics["val/map_object"] == 1.0
    assert (metrics["val/key_frames"], metrics["val/boxes"], results.samples) == (2, 3, 2)
    assert summary.boxes.tolist()[:3] == [1, 2, 0] and np.isnan(summary.average_precision[2])
    hot = torch.zeros(2, 8)
    hot[0, [0, 1]] = hot[1, 1] = 1
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[[0, 3]], hot)
    assert metrics["val/loss"] == pytest.approx(float(expected), rel=1e-6)
    assert results.hits() is None


def test_classes_that_are_not_evaluated_do_not_count():
    rows = table([[0.1, 0.1, 0.5, 0.9]], [[[0, 1]]], [[1.0]], evaluated=[0])
    results = task_of(recipe()).results(recipe(), rows)
    boxes = replace(make_box_batch(1).boxes, number=torch.tensor([0]), counts=torch.tensor([1]))
    batch = replace(make_box_batch(1), boxes=boxes, rows=torch.tensor([0]))
    results.add(batch, [torch.zeros(1, 8), torch.ones(1)])
    results.gather()
    assert results.metrics()["val/map"] == 1.0 and np.isnan(results.summary().average_precision[1])


def test_the_table_of_classes():
    summary = DetectionSummary(np.array([0.25, math.nan, 0.75]), np.array([4, 0, 2]))
    assert summary.csv(["a", "b, c", "d"]).decode().splitlines() == [
        "label,class,boxes,average_precision",
        "0,a,4,0.25",
        '1,"b, c",0,',
        "2,d,2,0.75",
    ]
    assert summary.best_and_worst(["a", "b", "d"]) == (["d 75% of 2"], ["a 25% of 4"])


# --- recipes ----------------------------------------------------------------------------------------------------


def test_outputs_without_a_class_are_named_by_their_label():
    """A model may have more outputs than the label map has classes."""
    summary = DetectionSummary(np.array([0.25, math.nan, math.nan]), np.array([4, 0, 0]))
    files = validation_files(summary, ["stand"])
    rows = files["per_class.csv"].decode().splitlines()
    assert rows == ["label,class,boxes,average_precision", "0,stand,4,0.25", "1,1,0,", "2,2,0,"]
    assert files["average_precision.png"].startswith(b"\x89PNG")


def test_a_validation_that_has_no_key_frame_is_refused(tmp_path, monkeypatch):
    make_scene_set(tmp_path / "data" / "scenes", train=1, val=1, seconds=2, size=32)
    monkeypatch.chdir(tmp_path)
    config = load_recipe("scenes")
    samples = task_of(config).read_split(config, "val").rows["sample_id"].to_pylist()
    every = 1 + max(int(each.rpartition(",")[2]) for each in samples)
    config = config.model_copy(update={"detection": config.detection.model_copy(update={"val_every": every})})
    with pytest.raises(ManifestError, match=rf"val\.csv: no second is divisible by {every}; set detection\.val_every"):
        task_of(config).read_split(config, "val")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("augment.mixup=0.8", "augment.mixup and augment.cutmix blend clips"),
        ("augment.randaug_layers=2", "moves pixels away from their boxes"),
        ("optim.label_smoothing=0.1", "optim.label_smoothing"),
        ("eval.crops=3", "a key frame has one view"),
        ("data.pace=0.5", "data.clip_share and data.pace are for recognition"),
        ("data.val.share=0.2", "a validation list of its own"),
        ("data.format=csv", "set data.format to ava"),
        ("data.classes=null", "the label map"),
        ("train.monitor=val/top1", "use val/map or val/loss"),
        ("detection.scale=[1.5, 1.2]", "the smaller one first"),
    ],
)
def test_what_does_not_go_together_is_refused(override, message):
    with pytest.raises(RecipeError, match=message):
        recipe(override)


@pytest.mark.parametrize("override", ["detection.min_score=0.5", "data.format=ava", "data.val.boxes=x.csv"])
def test_keys_of_detection_are_refused_for_recognition(override):
    with pytest.raises(RecipeError, match="task: detection"):
        load_recipe("demo", [override])


def test_the_boxes_of_each_action_are_counted():
    rows = table([[0.1] * 8, []], [[[0, 2], [2]], []], [[1.0, 1.0], []])
    assert class_counts(Manifest(rows, ("a", "b", "c"))) == {"a": 1, "b": 0, "c": 2}


def test_a_recipe_tells_what_differs_from_the_defaults():
    found = recipe("detection.min_score=0.5", "data.val.boxes=b.csv").non_defaults()
    assert found["task"] == "detection" and found["detection.min_score"] == 0.5
    assert "data.val.boxes" not in found  # lists have no default
