"""The data loader's parts that need no Ray: which rows a step has, and how decoded rows become a batch."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines.data.loader import global_order, local_order, rows_per_block, rows_per_step
from posmlp.config import load_recipe
from posmlp.tasks import task_of


def recipe(*overrides):
    return load_recipe("demo", ["train.global_batch=4", *overrides])


# The order ------------------------------------------------------------------------------------------------------------

# numpy.random.default_rng([seed, epoch]).permutation(10), as printed by NumPy 2
PERMUTATIONS = {
    (0, 0): [4, 6, 2, 7, 3, 5, 9, 0, 8, 1],
    (0, 1): [9, 1, 3, 8, 7, 6, 0, 4, 2, 5],
    (1, 0): [8, 4, 7, 0, 1, 2, 5, 9, 6, 3],
    (5, 2): [2, 4, 0, 9, 5, 8, 6, 3, 1, 7],
}


@pytest.mark.parametrize(("seed", "epoch"), PERMUTATIONS)
def test_the_order_of_an_epoch_follows_from_seed_and_epoch(seed, epoch):
    """Runs that resume under a newer version continue in this order."""
    order = global_order(10, recipe(f"train.seed={seed}"), epoch, train=True)
    assert order.tolist() == PERMUTATIONS[seed, epoch][:8]  # whole batches of 4


def test_validation_is_in_order_and_padded_at_the_end():
    config = recipe("train.seed=3")
    assert global_order(5, config, 2, train=False).tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
    assert global_order(8, config, 2, train=False).tolist() == list(range(8))
    assert global_order(5, recipe("scaling.workers=2"), 0, train=False, world=2).tolist() == [0, 1, 2, 3, 4, -1, -1, -1]


def test_the_order_is_cut_or_padded_to_whole_batches_of_videos():
    """A batch of 6 clips has 3 videos with 2 clips each; two workers of 8 views a video have 2 videos a batch."""
    order = global_order(10, recipe("train.global_batch=6", "data.repeats=2"), 0, train=True)
    assert order.tolist() == PERMUTATIONS[0, 0][:9]
    assert global_order(5, recipe("train.global_batch=5"), 0, train=False).tolist() == [0, 1, 2, 3, 4]
    assert rows_per_step(recipe("train.global_batch=5"), train=False) == 5
    eight_views = recipe("train.global_batch=4", "scaling.workers=2", "eval.clips=8")
    assert global_order(3, eight_views, 0, train=False, world=2).tolist() == [0, 1, 2, -1]


def test_draws_have_their_own_order_of_the_same_random_numbers():
    class Thrice:
        def order(self, rng):
            return rng.permutation(10).repeat(3)

    order = global_order(5, recipe("train.seed=5"), 2, train=True, draws=Thrice())
    assert order.tolist() == np.repeat(PERMUTATIONS[5, 2], 3).tolist()[:28]  # whole batches of 4 out of 30


@pytest.mark.parametrize(
    ("keys", "train", "world", "videos"),
    [
        (["train.global_batch=24"], True, 1, 24),
        (["train.global_batch=24", "data.repeats=3"], True, 1, 8),
        (["train.global_batch=24", "data.repeats=3", "eval.clips=2"], True, 4, 8),
        (["train.global_batch=24"], False, 1, 24),
        (["train.global_batch=24", "data.repeats=3"], False, 1, 24),
        (["train.global_batch=24", "eval.clips=4"], False, 1, 6),
        (["train.global_batch=24", "eval.clips=2", "eval.crops=3"], False, 2, 4),
        (["train.global_batch=24", "eval.clips=5"], False, 2, 4),  # 2 videos of 5 views fit in a worker's 12 clips
        (["train.global_batch=4", "eval.clips=8"], False, 2, 2),  # at least one for each worker
    ],
)
def test_videos_of_a_global_batch(keys, train, world, videos):
    assert rows_per_step(recipe(*keys), train=train, world=world) == videos


def test_videos_of_a_decode_task():
    assert rows_per_block(recipe("data.rows_per_block=7"), True) == 7
    assert rows_per_block(recipe("data.rows_per_block=7", "data.repeats=2", "eval.clips=5"), True) == 3
    assert rows_per_block(recipe("data.rows_per_block=7", "eval.clips=2"), False) == 3
    assert rows_per_block(recipe("data.rows_per_block=2", "eval.clips=4", "eval.crops=3"), False) == 1


def test_the_parts_of_the_workers():
    order = np.arange(12)
    assert local_order(order, 6, 0, 2).tolist() == [[0, 1, 2], [6, 7, 8]]
    assert local_order(order, 6, 1, 2).tolist() == [[3, 4, 5], [9, 10, 11]]
    assert local_order(order, 6, 0, 2, together=2).tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert local_order(order, 6, 1, 2, together=2).tolist() == [[4, 5, -1, -1], [10, 11, -1, -1]]


# Batches --------------------------------------------------------------------------------------------------------------


def columns(reasons, real, views=1):
    """Decoded rows: row i has pixels of value 10 i + view, label i + 3, and seeds 100 i + view."""
    count = len(real)
    values = 10 * np.arange(count)[:, None] + np.arange(views)
    clips = np.broadcast_to(values[:, :, None, None, None, None], (count, views, 2, 4, 5, 3)).astype(np.uint8)
    seeds = np.empty(count, dtype=object)  # as Ray hands it on
    seeds[:] = list(100 * np.arange(count)[:, None] + np.arange(views))
    return {
        "clip": clips,
        "row": np.arange(count),
        "real": np.array(real),
        "reason": np.array(reasons, dtype=object),
        "seeds": seeds,
    }


def collate(columns):
    """The batch of these rows of a table whose labels count from 3."""
    table = pa.table({"label": pa.array(np.arange(3, 3 + len(columns["row"])), pa.int32())})
    return task_of(recipe()).collate(columns, table, recipe(), train=True)


def pixel(batch):
    """The value of each clip; all pixels of a clip have the same."""
    assert (batch.clips == batch.clips[:, :1, :1, :1, :1]).all()
    return batch.clips[:, 0, 0, 0, 0].tolist()


def test_padding_and_bad_videos_have_weight_0_and_the_pixels_of_the_first_good_one():
    """Labels and seeds stay those of the row; with weight 0 they do not matter."""
    batch = collate(columns(["cannot be read", "", "", "cannot be read", ""], [True, True, True, True, False]))
    assert pixel(batch) == [10, 10, 20, 10, 10]
    assert batch.weights.tolist() == [0, 1, 1, 0, 0]
    assert batch.labels.tolist() == [3, 4, 5, 6, 7]
    assert batch.seeds.tolist() == [0, 100, 200, 300, 400]


def test_the_views_of_a_video_are_adjacent():
    batch = collate(columns(["", "", "gone", ""], [True, True, True, False], views=3))
    assert pixel(batch) == [0, 1, 2, 10, 11, 12, 0, 1, 2, 0, 1, 2]
    assert batch.weights.tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert batch.labels.tolist() == [3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6]
    assert batch.seeds.tolist() == [0, 1, 2, 100, 101, 102, 200, 201, 202, 300, 301, 302]


@pytest.mark.parametrize(
    ("reasons", "real", "weight"),
    [(["", ""], [True, True], 1), (["gone", "gone"], [True, True], 0), (["", ""], [False, False], 0)],
)
def test_a_batch_of_good_rows_alone_or_without_any_keeps_its_pixels(reasons, real, weight):
    batch = collate(columns(reasons, real))
    assert pixel(batch) == [0, 10]
    assert batch.weights.tolist() == [weight, weight]


def test_a_batch_has_the_types_that_training_takes_and_its_clips_can_be_written():
    given = columns(["", ""], [True, True])
    given["clip"].flags.writeable = False  # as Ray's object store has it
    batch = collate(given)
    assert (batch.clips.dtype, batch.labels.dtype) == (torch.uint8, torch.int64)
    assert (batch.weights.dtype, batch.seeds.dtype) == (torch.float32, torch.int64)
    assert batch.clips.shape == (2, 2, 4, 5, 3)
    batch.clips.fill_(1)  # augmentation works in place
    assert given["clip"].max() == 10
