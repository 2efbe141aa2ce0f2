"""The order of the data loader: the same rows for any number of workers, none lost."""

import threading

import numpy as np
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray.data import DataContext

from pipelines.data.loader import chain_segments, configure_ray_data, decoding_options, global_order, local_order
from posmlp.config import load_recipe


def recipe(*overrides):
    return load_recipe("demo", ["model.frames=4", "model.image_size=32", "train.global_batch=6", *overrides])


@given(st.integers(1, 200), st.integers(1, 5), st.integers(1, 6), st.integers(0, 9))
def test_validation_has_every_row_exactly_once(rows, per_worker, world, epoch):
    config = recipe(f"train.global_batch={per_worker * world}", f"scaling.workers={world}")
    order = global_order(rows, config, epoch, train=False, world=world)
    parts = [local_order(order, config.train.global_batch, rank, world) for rank in range(world)]
    assert len({part.shape for part in parts}) == 1
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
    parts = [local_order(order, 6, rank, world) for rank in range(world)]
    assert np.array_equal(np.concatenate(parts, axis=1).reshape(-1), order)


@given(st.integers(1, 12), st.sampled_from([1, 2]), st.integers(1, 5), st.data())
def test_uneven_shares_hold_each_row_once_and_keep_pairs(units, together, batches, data):
    world, size = data.draw(st.integers(1, units)), units * together
    order = np.arange(batches * size)
    parts = [local_order(order, size, rank, world, together) for rank in range(world)]
    (shape,) = {part.shape for part in parts}
    assert shape == (batches, -(-units // world) * together)
    for batch, rows in enumerate(zip(*parts, strict=True)):
        together_again = np.concatenate(rows)
        assert np.array_equal(together_again[together_again >= 0], order[batch * size : (batch + 1) * size])
        for mine in rows:
            pairs = mine.reshape(-1, together)
            assert ((pairs >= 0).all(1) | (pairs < 0).all(1)).all() and (mine >= 0).any()
            assert (pairs[pairs[:, 0] >= 0, -1] - pairs[pairs[:, 0] >= 0, 0] == together - 1).all()


def test_segments_are_started_ahead_and_give_all_their_results():
    started = []

    def segment(name, length):
        started.append(name)
        yield from ((name, i) for i in range(length))

    lengths = [4, 1, 5, 2]
    results = chain_segments((segment(n, length), length) for n, length in enumerate(lengths))
    seen = [next(results), next(results), next(results)]
    assert set(started) <= {0, 1}
    seen += list(results)
    assert seen == [(n, i) for n, length in enumerate(lengths) for i in range(length)]


def test_an_error_in_a_later_segment_is_raised():
    def bad():
        raise ValueError("no clips")
        yield

    with pytest.raises(ValueError, match="no clips"):
        list(chain_segments(iter([(iter([1, 2]), 2), (bad(), 3)])))


def test_a_segment_starts_when_three_quarters_of_the_one_before_are_used():
    """With the 6th of 8, the only one, and the 4th of 5; counted are the results that were seen by then."""
    seen, started = [], []

    def segments():
        for number, length in enumerate([8, 1, 5, 2]):
            started.append(len(seen))
            yield iter([(number, i) for i in range(length)]), length

    for result in chain_segments(segments()):
        seen.append(result)
    assert started == [0, 5, 8, 12]
    assert seen == [(n, i) for n, length in enumerate([8, 1, 5, 2]) for i in range(length)]


def test_decoding_prefers_the_nodes_with_the_labels_and_falls_back_to_any():
    assert decoding_options(recipe().scaling) == {}
    labelled = recipe("scaling.decode_on={ray.io/node-group: cpu, disk: fast}").scaling
    assert decoding_options(labelled) == {
        "label_selector": {"ray.io/node-group": "cpu", "disk": "fast"},
        "fallback_strategy": [{"label_selector": {}}],
    }


@pytest.mark.parametrize(("cpus", "sharing", "world"), [(2, 2, 1), (16, 1, 1), (16, 4, 1), (16, 2, 3)])
def test_trials_that_run_together_share_the_object_store_and_the_decoding_cpus(monkeypatch, cpus, sharing, world):
    """However many, they get the share of a run that is alone. A process keeps nothing of the run before."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus, "object_store_memory": 1e9})
    config, context = recipe("data.rows_per_block=32"), DataContext.get_current().copy()
    DataContext._set_current(context)
    configure_ray_data(recipe(), True, 1)
    alone = context.execution_options.resource_limits.object_store_memory
    configure_ray_data(config, True, world, sharing)
    limits, block = context.execution_options.resource_limits, context.target_max_block_size
    assert limits.object_store_memory * world * sharing == pytest.approx(alone)
    free = cpus - world * sharing * config.scaling.cpus_per_worker
    assert limits.cpu * world * sharing <= max(2 * free, 2 * world * sharing)
    fresh = DataContext()
    DataContext._set_current(fresh)
    configure_ray_data(config, True, world, sharing)
    assert (fresh.execution_options.resource_limits, fresh.target_max_block_size) == (limits, block)
    assert fresh.execution_options.preserve_order and context.execution_options.preserve_order


def test_a_close_does_not_wait_for_a_segment_that_gives_nothing():
    release = threading.Event()

    def silent():
        release.wait()
        yield 3

    results = chain_segments(iter([(iter([1, 2]), 2), (silent(), 1)]))
    assert [next(results), next(results)] == [1, 2]
    closing = threading.Thread(target=results.close, daemon=True)
    closing.start()
    closing.join(30)
    waited = closing.is_alive()
    release.set()
    assert not waited


def test_no_segments_have_no_results():
    assert list(chain_segments(iter([]))) == []
