"""What is checked before a run starts or resumes, and the advice that a run gives; without Ray."""

import contextlib
import math

import pyarrow as pa
import pytest

from pipelines.runs.errors import RunError
from pipelines.tracking.uris import recipe_without_password
from pipelines.training.preflight import check_record, list_fingerprint
from pipelines.training.progress import advise
from posmlp.video.manifest import SCHEMA, Manifest, read_manifest
from tests.helpers.small_runs import recipe_for

LISTS = {"train": "32 videos, a", "val": "16 videos, b"}


@pytest.mark.parametrize(
    ("then", "now", "lists", "allowed", "expected"),
    [
        ([], [], {}, False, None),
        (["scaling.workers=2"], ["train.keep_last=5"], {}, False, None),
        (
            ["optim.lr=1e-3"],
            ["optim.lr=2e-3"],
            {},
            False,
            r"--allow-changes, or restore:\n  optim\.lr: was 0\.001, is 0\.002",
        ),
        (["optim.lr=1e-3"], ["optim.lr=2e-3"], {}, True, None),
        (
            ["model.blocks=joint"],
            ["optim.lr=2e-3"],
            {},
            True,
            r"folder, or restore:\n  model\.blocks: was \['joint', .*\], is \['parallel', .*\]$",
        ),
        (["model.blocks=parallel"], ["model.dims=[16,32,48,64]"], {}, False, None),  # tiny has these
        ([], ["model.dims=[16,32,48,128]"], {}, True, r"model\.dims: was \[16, 32, 48, 64\], is \[16, 32, 48, 128\]$"),
        ([], [], {"val": "17 videos, c"}, False, r"list\.val: was '16 videos, b', is '17 videos, c'"),
        ([], [], {"val": "17 videos, c"}, True, None),
        ([], [], {"train": "33 videos, c"}, True, r"or restore:\n  list\.train"),
        (["train.epochs=9"], ["train.epochs=2"], {}, True, r"train\.epochs 2: run 'small' has done 3 epochs already"),
    ],
)
def test_what_a_resumed_run_may_change(motion_set, tmp_path, then, now, lists, allowed, expected):
    record = {
        "config": recipe_for(tmp_path, motion_set, *then).model_dump(mode="json"),
        "lists": LISTS,
        "metrics": None,
    }
    with pytest.raises(RunError, match=expected) if expected else contextlib.nullcontext():
        changes = check_record("runs/small", record, recipe_for(tmp_path, motion_set, *now), LISTS | lists, 3, allowed)
        assert set(changes) <= {"optim.lr", "list.val"}


def test_a_run_whose_architecture_was_stored_as_null_resumes(motion_set, tmp_path):
    """Version 0.1.0 stored the recipe with null for what the model's name stands for."""
    config = recipe_for(tmp_path, motion_set)
    record = {"config": config.model_dump(mode="json"), "lists": LISTS, "metrics": None}
    assert record["config"]["model"]["dims"] is None
    assert check_record("runs/small", record, config.resolved(), LISTS, 3, False) == {}
    record["config"] = config.resolved().model_dump(mode="json")
    assert record["config"]["model"]["dims"] == [16, 32, 48, 64]
    assert check_record("runs/small", record, config, LISTS, 3, False) == {}


def test_a_run_that_is_older_than_the_keys_of_fine_tuning_resumes(motion_set, tmp_path):
    config = recipe_for(tmp_path, motion_set)
    stored = config.model_dump(mode="json")
    newer = {
        "optim": ("freeze", "layer_decay"),
        "train": ("patience", "monitor"),
        "data": ("test", "balance", "group_by"),
    }
    for section, keys in newer.items():
        for key in keys:
            del stored[section][key]
    for key in ("weight", "others"):
        del stored["data"]["train"][key]
    for key in ("share", "seed"):
        del stored["data"]["val"][key]
    record = {"config": stored, "lists": LISTS, "metrics": None}
    assert check_record("runs/small", record, config, LISTS, 3, False) == {}
    changed = recipe_for(tmp_path, motion_set, "data.balance=sampling")
    with pytest.raises(RunError, match=r"data\.balance: was 'none', is 'sampling'"):
        check_record("runs/small", record, changed, LISTS, 3, True)
    tested = recipe_for(tmp_path, motion_set, "data.test.path=test.csv")
    assert check_record("runs/small", record, tested, LISTS, 3, False) == {}, "training does not read it"


def test_the_fingerprint_of_a_list_covers_videos_labels_and_classes(motion_set):
    manifest = read_manifest(motion_set / "val.csv")
    assert list_fingerprint(manifest).startswith("16 videos, ")
    moved = manifest.rows.set_column(1, "uri", pa.array(["elsewhere"] * 16))
    assert list_fingerprint(Manifest(moved, manifest.classes)) == list_fingerprint(manifest)
    for other in (
        Manifest(manifest.rows.take(list(range(15, -1, -1))), manifest.classes),
        Manifest(manifest.rows, manifest.classes[::-1]),
    ):
        assert list_fingerprint(other) != list_fingerprint(manifest)


def test_the_fingerprint_of_a_list_is_the_same_in_every_release():
    """It is stored in ``run.json``: with another fingerprint an unfinished run could not be resumed."""
    columns = {"sample_id": ["a b.mp4", 'ü"/c.mp4'], "uri": ["/x", "/y"], "label": [1, 0], "frames": [None, 3]}
    known = Manifest(pa.table(columns, schema=SCHEMA), ("left", "rechts ü"))
    assert list_fingerprint(known) == "2 videos, bafce80c1a07feab"


def test_a_password_is_not_stored(motion_set, tmp_path):
    config = recipe_for(tmp_path, motion_set, "tracking.uri=https://bob:hunter2@mlflow.example/x")
    assert recipe_without_password(config).tracking.uri == "https://mlflow.example/x"


def metrics_of(epoch=2.0, wait=0.0, spilled=0.0):
    return {"perf/data_wait_frac": wait, "epoch": epoch, "data/spilled_mb": spilled}


def test_a_run_that_waits_for_data_recommends_keys_to_change(motion_set, tmp_path):
    plain = recipe_for(tmp_path, motion_set, "data.cache_dir=null")
    assert advise(metrics_of(wait=0.19), plain) == {}
    for knob in ("43%", "scaling.cpus_per_worker", "data shard", "data.cache_dir", "data.repeats"):
        assert knob in advise(metrics_of(wait=0.43), plain)["wait"]
    cached = recipe_for(tmp_path, motion_set)
    assert "the first epoch fills data.cache_dir" in advise(metrics_of(epoch=1.0, wait=0.43), cached)["cache"]
    alone = recipe_for(tmp_path, motion_set, "scaling.decode_in_worker=true")
    assert "scaling.decode_in_worker=false" in advise(metrics_of(wait=0.43), alone)["wait"]
    assert "data.rows_per_block" in advise(metrics_of(spilled=12.0), plain)["spill"]
    assert advise(metrics_of(spilled=math.nan), plain) == {}
