"""Batches ahead of their use: order, errors at their place, how far ahead, and the end of the thread."""

import subprocess
import sys
import threading

import pytest
import torch

from posmlp.errors import BadVideo
from posmlp.video.batch import Batch
from posmlp.video.prefetch import prefetch
from tests.helpers.batches import make_batch

CPU = torch.device("cpu")
PATIENCE_S = 30.0  # of waits that normally take milliseconds


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_batches_pass_unchanged_and_in_order():
    given = [make_batch(seed=seed) for seed in range(20)]
    taken = list(prefetch(iter(given), CPU))
    assert [batch.seeds.tolist() for batch in taken] == [batch.seeds.tolist() for batch in given]
    assert not threads()


def test_what_was_bad_travels_with_its_batch():
    bad = BadVideo("a", "/a.mp4", "truncated")
    clean, other = make_batch(seed=0), make_batch(seed=1)
    given = [clean, Batch(**other.tensors(), bad=(bad,), decoded_by_pyav=2)]
    taken = list(prefetch(iter(given), CPU))
    assert [(batch.bad, batch.decoded_by_pyav) for batch in taken] == [((), 0), ((bad,), 2)]


def test_an_error_comes_in_place_of_its_batch_and_the_iterator_is_closed_on_its_thread():
    closed_on = []

    def batches():
        try:
            yield make_batch()
            yield make_batch()
            raise ValueError("no clips")
        finally:
            closed_on.append(threading.current_thread().name)

    found = prefetch(batches(), CPU)
    assert next(found) is not None and next(found) is not None
    with pytest.raises(ValueError, match="no clips"):
        next(found)
    assert closed_on == ["prefetch"]


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_as_many_batches_as_asked_are_ahead_and_no_more(ahead):
    made, full = [], threading.Event()

    def batches():
        for number in range(20):
            made.append(number)
            if len(made) == 1 + ahead:
                full.set()
            yield make_batch()

    found = prefetch(batches(), CPU, ahead)
    next(found)
    assert full.wait(PATIENCE_S)
    found.close()
    assert len(made) == 1 + ahead
    assert not threads()


def test_a_close_does_not_wait_for_an_iterator_that_gives_nothing():
    inside, release = threading.Event(), threading.Event()

    def batches():
        yield make_batch()
        inside.set()
        release.wait()
        yield make_batch()

    found = prefetch(batches(), CPU)
    next(found)
    assert inside.wait(PATIENCE_S)
    found.close()
    (thread,) = threads()
    release.set()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_a_process_ends_while_the_thread_waits():
    script = (
        "import threading, torch; from posmlp.video.prefetch import prefetch; from tests.helpers.batches import *\n"
        "def batches():\n    yield make_batch()\n    threading.Event().wait()\n"
        "found = prefetch(batches(), torch.device('cpu')); next(found); print('done')"
    )
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120, text=True).stdout == "done\n"
    )


def test_who_waits_is_asked_and_can_end_the_wait():
    release = threading.Event()

    def batches():
        release.wait()
        yield make_batch()

    def waiting(seconds):
        raise TimeoutError(f"{seconds > 0}")

    with pytest.raises(TimeoutError, match="True"):
        next(prefetch(batches(), CPU, waiting=waiting))
    release.set()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_are_complete_on_a_gpu_while_the_host_runs_ahead():
    device, given = torch.device("cuda", 0), [make_batch(seed=seed) for seed in range(50)]
    sums = [batch.clips.long().sum() for batch in prefetch(iter(given), device) if batch.clips.is_cuda]
    assert [int(value) for value in sums] == [int(batch.clips.long().sum()) for batch in given]
