"""Which clips reach which worker: the same whatever the number of workers, and none lost."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.ingest import Split, global_order, local_order
from posmlp.config import load_recipe
from posmlp.video.decode import load_clip
from posmlp.video.manifest import read_manifest


def recipe(*overrides):
    return load_recipe("demo", ["model.frames=4", "model.image_size=32", "train.global_batch=6", *overrides])


@given(st.integers(1, 200), st.integers(1, 5), st.integers(1, 6), st.integers(0, 9))
def test_validation_has_every_row_exactly_once(rows, per_worker, world, epoch):
    config = recipe(f"train.global_batch={per_worker * world}", f"scaling.workers={world}")
    order = global_order(rows, config, epoch, train=False)
    parts = [local_order(order, config.train.global_batch, rank, world) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    real = np.concatenate(parts)
    assert sorted(real[real >= 0]) == list(range(rows))


@given(st.integers(6, 200), st.integers(0, 9), st.integers(0, 9))
def test_training_permutes_anew_each_epoch_and_drops_less_than_a_batch(rows, seed, epoch):
    config = recipe(f"train.seed={seed}")
    order = global_order(rows, config, epoch, train=True)
    assert len(set(order)) == len(order) == rows // 6 * 6
    assert np.array_equal(order, global_order(rows, config, epoch, train=True))
    if rows > 20:
        assert not np.array_equal(order, global_order(rows, config, epoch + 1, train=True))


@given(st.sampled_from([1, 2, 3, 6]), st.integers(6, 100))
def test_workers_share_each_global_batch(world, rows):
    order = global_order(rows, recipe(), 0, train=True)
    parts = [local_order(order, 6, rank, world).reshape(len(order) // 6, -1) for rank in range(world)]
    assert np.array_equal(np.concatenate(parts, axis=1).reshape(-1), order)


def clip_hash(clip):
    return hashlib.sha256(np.ascontiguousarray(clip).tobytes()).hexdigest()


def epoch_of(rows, config, world, epoch=1, train=True):
    """Global batches as lists of (label, pixels, draws), put together from all workers; and the bad videos."""
    splits = [Split(rows, config, train, rank, world) for rank in range(world)]
    steps = []
    for parts in zip(*(split.batches(epoch) for split in splits), strict=True):
        steps.append(
            [
                (int(label), clip_hash(clip.numpy()), tuple(draws.tolist()), float(weight))
                for b in parts
                for clip, label, draws, weight in zip(b.clips, b.labels, b.draws, b.weights, strict=True)
            ]
        )
    return steps, [video for split in splits for video in split.bad]


@pytest.mark.ray
def test_global_batches_are_the_same_for_1_2_and_3_workers(local_ray, motion_set):
    rows, config = read_manifest(motion_set / "train.csv").rows, recipe("data.rows_per_block=4")
    one, two, three = (epoch_of(rows, config, world)[0] for world in (1, 2, 3))
    assert one == two == three
    assert len(one) == 32 // 6
    assert one != epoch_of(rows, config, 1, epoch=2)[0]


@pytest.mark.ray
def test_clips_are_those_of_load_clip(local_ray, motion_set):
    rows, config = read_manifest(motion_set / "train.csv").rows, recipe()
    order = global_order(len(rows), config, 3, train=True)
    expected = [
        clip_hash(load_clip(r["uri"], r["sample_id"], config.data, frames=4, size=32, seed=0, epoch=3, train=True))
        for r in rows.take(order).to_pylist()
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
