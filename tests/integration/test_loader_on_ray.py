"""Which clips reach which worker: the same whatever the number of workers, and none lost."""

import hashlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from ray.data import DataContext

from pipelines.cluster.capacity import live_runs
from pipelines.data import loader as ingest
from pipelines.data.loader import SplitLoader, global_order, rows_per_step
from pipelines.data.object_store import object_store_usage
from pipelines.training.channel import open_channel
from posmlp.config import load_recipe
from posmlp.tasks import task_of
from posmlp.video.clip import load_clips
from posmlp.video.manifest import read_manifest
from tests.helpers.small_runs import lists_of


def recipe(*overrides):
    return load_recipe("demo", ["model.frames=4", "model.image_size=32", "train.global_batch=6", *overrides])


def clip_hash(clip):
    return hashlib.sha256(np.ascontiguousarray(clip).tobytes()).hexdigest()


@pytest.fixture(params=["recognition", "detection"])
def split(request):
    """The rows of a training split of a task, and overrides of the recipe."""
    if request.param == "recognition":
        return read_manifest(request.getfixturevalue("motion_set") / "train.csv").rows, []
    overrides = lists_of(request.getfixturevalue("scene_set"))
    config = recipe(*overrides)
    return task_of(config).read_split(config, "train").rows, overrides


def epoch_of(rows, config, world, epoch=1, train=True, step=0, until=None):
    """Global batches as lists of (label, pixels, seed, weight), put together from all workers; and the bad videos."""
    splits = [SplitLoader(rows, config, train, rank, world) for rank in range(world)]
    steps, bad = [], []
    for parts in zip(*(split.batches(epoch, step, until) for split in splits), strict=True):
        steps.append(
            [
                (*label, clip_hash(clip.numpy()), int(seed), float(weight))
                for b in parts
                for clip, label, seed, weight in zip(b.clips, labels_of(b), b.seeds, b.weights, strict=True)
            ]
        )
        bad += [video for part in parts for video in part.bad]
    return steps, bad


def labels_of(batch):
    """What each clip is labelled with: its label, or its boxes and their labels."""
    if batch.boxes is None:
        return [(label,) for label in batch.labels.tolist()]
    boxes = torch.cat([batch.boxes.corners, batch.labels], 1).split(batch.boxes.counts.tolist())
    return [(str(each.tolist()),) for each in boxes]


@pytest.mark.ray
def test_global_batches_are_the_same_for_1_2_and_3_workers(local_ray, split):
    rows, config = split[0], recipe("data.rows_per_block=4", *split[1])
    one, two, three = (epoch_of(rows, config, world)[0] for world in (1, 2, 3))
    assert one == two == three
    assert len(one) == 32 // 6
    assert one != epoch_of(rows, config, 1, epoch=2)[0]


@pytest.mark.ray
@pytest.mark.parametrize("train", [True, False])
def test_a_worker_that_decodes_itself_has_the_batches_of_the_tasks(local_ray, split, tmp_path, train):
    rows = split[0].to_pylist()
    rows[3]["uri"] = str(tmp_path / "gone.mp4")
    table = pa.Table.from_pylist(rows, schema=split[0].schema)
    tasks, here = (
        epoch_of(table, recipe(f"scaling.decode_in_worker={own}", *split[1]), 2, train=train, step=1, until=4)
        for own in ("false", "true")
    )
    assert here == tasks
    assert {video.sample_id for video in here[1]} == {rows[3]["sample_id"]}


@pytest.mark.ray
def test_threads_that_decode_in_one_process_do_not_mix_their_videos(local_ray, motion_set):
    """Validation begins while the next training batches are decoded, in the same child process."""
    rows, config = read_manifest(motion_set / "train.csv").rows, recipe("scaling.decode_in_worker=true")
    alone = [epoch_of(rows, config, 1, train=train) for train in (True, False)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda train: epoch_of(rows, config, 1, train=train), (True, False)))
    assert together == alone and not alone[0][1]


@pytest.mark.ray
def test_balanced_batches_are_the_same_for_1_and_2_workers_and_resume_at_a_step(local_ray, motion_set):
    rows = read_manifest(motion_set / "train.csv").rows
    few = rows.take([i for i, label in enumerate(rows["label"].to_pylist()) if label < 2 or i < 10])
    config = recipe("data.rows_per_block=4", "data.balance=sampling", "train.global_batch=4")
    one, two = (epoch_of(few, config, world)[0] for world in (1, 2))
    assert one == two and len(one) == len(few) // 4
    assert epoch_of(few, config, 1, step=1)[0] == one[1:]
    clips = [clip for step in one for clip in step]
    labels = few["label"].to_pylist()
    most = {label: 1 + len(few) // len(set(labels)) for label in set(labels)}
    assert all([label for label, *_ in clips].count(label) <= most[label] for label in most)
    assert len({pixels for _, pixels, _, _ in clips}) == len(clips), "a video that is drawn twice has two clips"


@pytest.mark.ray
def test_clips_are_those_of_load_clip(local_ray, motion_set):
    rows, config = read_manifest(motion_set / "train.csv").rows, recipe("data.repeats=2")
    order = global_order(len(rows), config, 3, train=True)
    expected = [
        clip_hash(view)
        for r in rows.take(order).to_pylist()
        for view in load_clips(r["uri"], r["sample_id"], config, epoch=3, train=True)[0]
    ]
    steps, _ = epoch_of(rows, config, 1, epoch=3)
    assert [pixels for step in steps for _, pixels, _, _ in step] == expected


@pytest.mark.ray
def test_bad_videos_are_named_and_cost_no_other_row(local_ray, motion_set, tmp_path):
    rows = read_manifest(motion_set / "val.csv").rows.to_pylist()
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(Path(rows[3]["uri"]).read_bytes()[:300])
    rows[3]["uri"], rows[7]["uri"] = str(broken), str(tmp_path / "gone.mp4")
    table = pa.Table.from_pylist(rows, schema=read_manifest(motion_set / "val.csv").rows.schema)
    for world in (1, 2):
        steps, bad = epoch_of(table, recipe(), world, train=False)
        assert {v.sample_id for v in bad} == {rows[3]["sample_id"], rows[7]["sample_id"]}
        assert all("fetch it again" in v.reason or "missing" in v.reason for v in bad)
        flat = [clip for step in steps for clip in step]
        assert len(flat) == 18  # 16 rows, filled up to whole global batches
        good = [clip for clip in flat if clip[3] == 1]
        assert [clip[0] for clip in good] == [r["label"] for i, r in enumerate(rows) if i not in (3, 7)]
        if world == 1:  # a place without a picture shows another's of its batch, at weight 0
            assert {clip[1] for clip in flat} == {clip[1] for clip in good}


@pytest.mark.ray
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_starts_in_the_middle_of_an_epoch(local_ray, split, monkeypatch, world):
    monkeypatch.setattr(ingest, "SEGMENT_BLOCKS", 2)  # several plans an epoch
    rows, config = split[0], recipe("data.rows_per_block=4", *split[1])
    whole = epoch_of(rows, config, world, epoch=1, until=3)[0]
    assert len(whole) == 2 * (32 // 6)
    assert whole == epoch_of(rows, config, world, epoch=1)[0] + epoch_of(rows, config, world, epoch=2)[0]
    assert epoch_of(rows, config, world, epoch=1, step=3, until=3)[0] == whole[3:]
    assert epoch_of(rows, config, world, epoch=1, step=5, until=3)[0] == whole[5:]


@pytest.mark.ray
def test_what_lies_before_the_start_is_not_decoded(local_ray, motion_set, tmp_path):
    rows, config = read_manifest(motion_set / "train.csv").rows, recipe()
    early = set(global_order(len(rows), config, 0, train=True)[:18].tolist())
    gone = [r | ({"uri": str(tmp_path / "gone.mp4")} if i in early else {}) for i, r in enumerate(rows.to_pylist())]
    steps, bad = epoch_of(pa.Table.from_pylist(gone, schema=rows.schema), config, 1, epoch=0, step=3)
    assert len(steps) == 2
    assert not bad


@pytest.mark.ray
def test_repeats_of_a_video_are_adjacent_and_differ(local_ray, motion_set):
    rows, config = read_manifest(motion_set / "train.csv").rows, recipe("data.repeats=3")
    assert rows_per_step(config, train=True) == 2
    (step, *_) = epoch_of(rows, config, 1)[0]
    assert len(step) == 6
    labels = [label for label, *_ in step]
    order = global_order(len(rows), config, 1, train=True)
    assert labels == [rows["label"][int(i)].as_py() for i in order[:2] for _ in range(3)]
    assert len({pixels for _, pixels, *_ in step}) == len({seed for _, _, seed, _ in step}) == 6


@pytest.mark.ray
def test_validation_has_every_view_of_every_video(local_ray, motion_set):
    rows, config = read_manifest(motion_set / "val.csv").rows, recipe("eval.clips=2", "eval.crops=3")
    split = SplitLoader(rows, config, False)
    batches = list(split.batches(0))
    assert len(batches) == split.steps == 16
    for batch, row in zip(batches, rows.to_pylist(), strict=True):
        assert batch.labels.tolist() == [row["label"]] * 6
        views, _ = load_clips(row["uri"], row["sample_id"], config, epoch=0, train=False)
        assert np.array_equal(batch.clips.numpy(), views)


@pytest.mark.ray
@pytest.mark.slow
def test_a_large_manifest_costs_little_memory(local_ray, motion_set):
    """A hundred thousand rows: a worker holds the table in shared memory and an epoch's order, and starts as soon."""
    few = read_manifest(motion_set / "train.csv").rows
    many = pa.concat_tables([few] * 3125).combine_chunks()
    assert len(many) == 100_000
    process, config = psutil.Process(), recipe("data.rows_per_block=4")
    list(SplitLoader(few, config, True).batches(0))  # what Ray Data itself takes comes once
    before, clips = process.memory_info().rss, 0
    split = SplitLoader(many, config, True)
    for batch in split.batches(0, step=split.steps - 700):  # several segments
        clips += len(batch.labels)
        grown = process.memory_info().rss - before
        assert grown < 300 * 2**20
        if clips > 1500:
            break
    assert object_store_usage()[0] < 600


@pytest.mark.slow
@pytest.mark.ray
def test_spilling_is_seen():
    """In a small store of its own: five arrays of 30 MB do not fit into 80."""
    code = """if True:
        import numpy as np, ray
        from pipelines.data.object_store import object_store_usage
        ray.init("local", num_cpus=1, object_store_memory=80 * 2**20, log_to_driver=False)
        assert object_store_usage() == (0, 0), object_store_usage()
        held = [ray.put(np.zeros(30 * 2**20, np.uint8)) for _ in range(5)]
        used, spilled = object_store_usage()
        assert 20 < used <= 80 and spilled >= 60, (used, spilled)
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.ray
def test_a_video_that_hangs_costs_itself_alone(local_ray, motion_set, tmp_path):
    os.mkfifo(tmp_path / "endless.mp4")  # nobody ever writes into it
    source = read_manifest(motion_set / "val.csv").rows
    rows = source.to_pylist()
    rows[5]["uri"] = str(tmp_path / "endless.mp4")
    table = pa.Table.from_pylist(rows, schema=source.schema)
    steps, bad = epoch_of(table, recipe("data.decode_timeout_s=2"), 1, train=False)
    assert [(v.uri, "not decoded within 2 s" in v.reason) for v in bad] == [(rows[5]["uri"], True)]
    good = [clip for step in steps for clip in step if clip[3] == 1]
    assert [label for label, *_ in good] == [r["label"] for i, r in enumerate(rows) if i != 5]


@pytest.mark.ray
def test_runs_on_a_cluster_share_it(local_ray, motion_set):
    """Each run that trains has a channel. A segment that begins gets its part of the store and of the CPUs."""
    rows, config = read_manifest(motion_set / "train.csv").rows, recipe("data.rows_per_block=4")
    split = SplitLoader(rows, config, True, sharing=lambda: max(1, live_runs()))
    limits = []

    def limit():
        next(split.batches(0))
        options = DataContext.get_current().execution_options.resource_limits
        limits.append(options.object_store_memory)

    limit()
    channels = [open_channel() for _ in range(3)]
    limit()
    for channel in channels[1:]:
        channel.close()
    deadline = time.monotonic() + 30
    while live_runs() > 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    limit()
    channels[0].close()
    assert limits == [limits[0], pytest.approx(limits[0] / 3), limits[0]]
