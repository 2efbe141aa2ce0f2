"""The child process: a video that breaks its decoder fails alone, and the next one decodes."""

import contextlib
import mmap
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from posmlp.errors import UserError
from posmlp.video import isolated
from posmlp.video.decode import DecodeError, Video
from posmlp.video.isolated import open_isolated
from tests.helpers.decoder_faults import (
    abort,
    eat_memory,
    fail,
    frames_of,
    leave,
    object_id,
    process_id,
    refuse,
    segfault,
    sequential,
    sleep,
    spin_in_c,
    unsendable,
)
from tests.helpers.videos import by_pyav, noisy, numbers, write_video

ROOT = Path(__file__).parents[3]
B_FRAMES = {"g": "12", "bf": "2"}


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "v.mp4", options=B_FRAMES)


def check_serves(video):
    with open_isolated(video, timeout_s=30) as opened:
        assert numbers(opened.read([3, 17, 39])) == [3, 17, 39]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (abort, r"crashes the decoder \(SIGABRT\)"),
        (segfault, r"crashes the decoder \(SIGSEGV\)"),
        (leave, r"crashes the decoder \(exit code 3\)"),
        (eat_memory, "more memory than a decoder may use"),
        (fail, r"the decoder fails \(RuntimeError: two lines\)"),
        (unsendable, r"crashes the decoder \(exit code 1\)"),
    ],
)
def test_a_decoder_failure_fails_its_video_alone(video, function, words):
    with pytest.raises(DecodeError, match=words) as caught, open_isolated(video, timeout_s=30) as opened:
        opened.run(function)
    assert caught.value.uri == video
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    check_serves(video)


@pytest.mark.parametrize(("function", "args"), [(sleep, [60]), (spin_in_c, [])])
def test_a_decoder_that_hangs_is_stopped(video, function, args):
    check_serves(video)  # so that the start of a process is not counted
    start = time.monotonic()
    with (
        pytest.raises(DecodeError, match=r"not decoded within 0\.5 s; .*data\.decode_timeout_s"),
        open_isolated(video, timeout_s=0.5) as opened,
    ):
        opened.run(function, *args)
    assert time.monotonic() - start < 3
    check_serves(video)


def test_all_that_is_done_to_a_video_shares_one_timeout(video):
    with (
        pytest.raises(DecodeError, match=r"within 0\.6 s"),
        open_isolated(video, timeout_s=0.6) as opened,
    ):
        for _ in range(20):
            opened.run(sleep, 0.1)
    check_serves(video)


def test_an_error_of_the_user_stays_one(video):
    with pytest.raises(UserError, match="the disk is full"), open_isolated(video, timeout_s=30) as opened:
        opened.run(refuse)
    check_serves(video)


def test_an_error_of_the_caller_does_not_kill_the_child(video):
    with open_isolated(video, timeout_s=30) as opened:
        before = opened.run(process_id)
    with pytest.raises(ZeroDivisionError), open_isolated(video, timeout_s=30):
        1 / 0  # noqa: B018
    with open_isolated(video, timeout_s=30) as opened:
        assert opened.run(process_id) == before
        assert before != os.getpid()
        assert opened.run(frames_of) == 40
        assert opened.verify() == (72, 108)


def test_an_argument_that_does_not_pickle_is_the_callers_error(video):
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)), open_isolated(video, timeout_s=30) as opened:
        opened.run(lambda video: None)
    check_serves(video)


def test_a_child_killed_between_two_videos_is_replaced(video):
    check_serves(video)
    isolated.decoding_process().process.kill()
    isolated.decoding_process().process.wait()
    check_serves(video)


def test_a_child_that_dies_with_a_video_open(video):
    with open_isolated(video, timeout_s=30) as opened:
        isolated.decoding_process().process.kill()
        with pytest.raises(DecodeError, match=r"crashes the decoder \(SIGKILL\)"):
            opened.read([0])
        with pytest.raises(DecodeError, match="crashes the decoder"):
            opened.read([0])
    check_serves(video)


def open_files_and_shared_memory():
    with open("/proc/self/maps") as maps:
        return len(os.listdir("/proc/self/fd")), sum("(deleted)" in line for line in maps)


def test_the_last_video_stays_open_for_its_next_row_until_the_file_changes_or_fails(tmp_path, video):
    path, other = tmp_path / "v.mp4", write_video(tmp_path / "other.mp4", count=20)
    path.write_bytes(Path(video).read_bytes())

    def open_again():
        with open_isolated(str(path), timeout_s=30) as opened:
            assert numbers(opened.read([2, 9])) == [2, 9] and numbers(opened.read([5])) == [5]
            return opened.run(object_id), opened.info.frames

    first = open_again()
    assert open_again() == first and first[1] == 40
    with open_isolated(str(path), timeout_s=30, span=(7, 9)) as part:  # of the same open file
        assert part.info.frames == 3 and numbers(part.read([0, 2])) == [7, 9]
    assert open_again() == first
    with open_isolated(str(path), timeout_s=30) as opened, pytest.raises(DecodeError):
        opened.run(fail)
    check_serves(video)
    path.write_bytes(Path(other).read_bytes())
    assert open_again()[1] == 20
    path.unlink()
    with pytest.raises(DecodeError, match="the file is missing"), open_isolated(str(path), timeout_s=30):
        pass


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="only Linux tells")
def test_crashes_leave_nothing_behind(video):
    counts = []
    for _ in range(3):
        with pytest.raises(DecodeError), open_isolated(video, timeout_s=30) as opened:
            opened.read([0])
            opened.run(abort)
        check_serves(video)
        counts.append(open_files_and_shared_memory())
    assert counts[0] == counts[1] == counts[2]


# Pixels ---------------------------------------------------------------------------------------------------------------


def test_shared_memory_grows_with_the_videos(tmp_path):
    sizes = [(32, 24), (108, 72), (64, 48), (640, 480), (16, 16), (1280, 720)]
    for width, height in sizes:
        path = write_video(tmp_path / "v.mp4", width, height, count=4, options=B_FRAMES)
        with open_isolated(path, timeout_s=30) as opened:
            np.testing.assert_array_equal(opened.read([1, 3]), by_pyav(path)[[1, 3]])
            np.testing.assert_array_equal(opened.read(range(4)), by_pyav(path))
            np.testing.assert_array_equal(opened.read([2], 12), Video(path).read([2], 12))


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_the_child_reports_the_decoder_used(tmp_path, video, decoder):
    with open_isolated(video, decoder=decoder, timeout_s=30) as opened:
        assert numbers(opened.read([0, 30])) == [0, 30]
        assert opened.info.decoder == decoder
        assert opened.info.frames == 40
        assert opened.info.codec == "h264"
        np.testing.assert_allclose(opened.info.times, np.arange(40) / 10)


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="pixels go through a file elsewhere")
def test_a_view_of_the_pixels_is_no_copy(video):
    with open_isolated(video, timeout_s=30) as opened:
        base = opened.read([0])
        while isinstance(base.base, np.ndarray):
            base = base.base
        owner = base.base.obj if isinstance(base.base, memoryview) else base.base
        assert isinstance(owner, mmap.mmap)


# Processes ------------------------------------------------------------------------------------------------------------


def decode_many(video, queue):
    for _ in range(5):
        with open_isolated(video, timeout_s=30) as opened:
            queue.put((numbers(opened.read([3, 17, 39])), opened.run(process_id)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_have_a_child_each(video, method):
    check_serves(video)
    ours = isolated.decoding_process().process.pid
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    processes = [context.Process(target=decode_many, args=(video, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=60) for _ in range(10)]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert all(found == [3, 17, 39] for found, _ in answers)
    children = {pid for _, pid in answers}
    assert len(children) == 2
    assert ours not in children
    # A forked process that ends leaves its parent's child alive.
    assert isolated.decoding_process().process.pid == ours
    check_serves(video)
    assert wait_until_gone(children, 5)


def wait_until_gone(pids, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(map(runs, pids)):
            return True
        time.sleep(0.05)
    return False


def runs(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


PARENT = """
import sys, time
from tests.helpers import decoder_faults
from posmlp.video.isolated import open_isolated
with open_isolated(sys.argv[1], timeout_s=float(sys.argv[2])) as video:
    print(video.run(decoder_faults.process_id), flush=True)
    if sys.argv[3] == "hang":
        video.run(decoder_faults.sleep, 600)
    elif sys.argv[3] == "spin":
        video.run(decoder_faults.spin_in_c)
    elif sys.argv[3] == "idle":
        time.sleep(600)
"""


def start_parent(*args):
    command = [sys.executable, "-c", PARENT, *args]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True)
    return parent, int(parent.stdout.readline())


def test_no_child_outlives_its_killed_parent_for_long(video):
    children = []
    for work in ("hang", "spin", "idle"):
        parent, child = start_parent(video, "2", work)  # which would kill its child after 2 s
        time.sleep(0.2)
        assert runs(child)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        children.append(child)
    assert wait_until_gone(children[2:], 2)  # it notices immediately
    assert wait_until_gone(children, 2 + 6)


def test_a_signal_to_the_process_group_leaves_the_child_to_its_parent(video):
    """``timeout``, Slurm and terminals signal the whole group; the parent may still need the child to end in order."""
    with open_isolated(video, timeout_s=60) as opened:
        child = opened.run(process_id)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(child, signum)
        assert opened.run(process_id) == child
    isolated._child.kill()
    with open_isolated(video, timeout_s=60) as opened:  # and the next one starts as ever
        assert opened.run(process_id) != child


def test_a_process_that_ends_ends_its_child(video):
    parent, child = start_parent(video, "30", "nothing")
    assert parent.wait(30) == 0
    assert wait_until_gone([child], 2)


# Damage ---------------------------------------------------------------------------------------------------------------

CODECS = {
    "v.mp4": ("libx264", {"g": "12", "bf": "2", "x264-params": "open-gop=1"}, {}),
    "front.mp4": ("libx264", B_FRAMES, {"muxer": {"movflags": "faststart"}}),
    "v.mkv": ("libx264", B_FRAMES, {}),
    "v.avi": ("mpeg4", {"g": "8", "bf": "2"}, {}),
    "v.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}, {}),
    "v.ts": ("libx264", B_FRAMES, {}),
    "v.mpg": ("mpeg2video", B_FRAMES, {"rate": 25}),
}


def damage(content, rng):
    """Flipped bits, a block of zeros or of noise, a piece cut out, doubled or moved, or the end cut off."""
    data = bytearray(content)
    start = int(rng.integers(len(data)))
    length = int(rng.integers(1, 1 + min(2000, len(data) - start)))
    kind = rng.integers(7)
    if kind == 0:
        for place in rng.integers(len(data), size=rng.integers(1, 30)):
            data[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        data[start : start + length] = bytes(length)
    elif kind == 2:
        data[start : start + length] = rng.bytes(length)
    elif kind == 3:
        del data[start : start + length]
    elif kind == 4:
        data[start:start] = data[start : start + length]
    elif kind == 5:
        for place in rng.integers(min(600, len(data)), size=8):  # the header
            data[place] = rng.integers(256)
    else:
        del data[start:]
    return bytes(data)


@pytest.mark.parametrize("name", CODECS)
def test_damage_is_refused_and_harms_nothing_else(tmp_path, video, name):
    codec, options, more = CODECS[name]
    path = tmp_path / name
    write_video(path, codec=codec, options=options, change=noisy, **more)
    content = path.read_bytes()
    rng = np.random.default_rng(5)
    refused = 0
    for _ in range(10):
        path.write_bytes(damage(content, rng))
        start = time.monotonic()
        try:
            with open_isolated(str(path), timeout_s=10) as opened:
                count = opened.info.frames
                frames = opened.read(range(count)).copy()
                np.testing.assert_array_equal(frames, opened.run(sequential))
        except DecodeError as error:
            refused += 1
            assert "\n" not in str(error)
            assert not re.search(r"Errno|avcodec|AVERROR|Traceback|\d{7}", error.reason), error
        assert time.monotonic() - start < 10
        check_serves(video)
    assert refused >= 3
