"""Signals: what a command does with the first and the second, and that children are not reached by them."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pipelines.cli import main
from pipelines.cluster import ray_internals, signals, sweeper
from pipelines.cluster.signals import exit_code, hold_signals, interrupt_on_signal, raise_held, stop_on_signal
from pipelines.commands import runs
from pipelines.runs.errors import SignalInterrupt
from posmlp.processes import shielded_children
from tests.helpers.log_lines import log_lines
from tests.helpers.waiting import until


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A clock that the test sets; no signal has come for long."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(signals, "time", clock)
    monkeypatch.setattr(signals, "last_signal", (0.0, 2))
    return clock


@pytest.fixture(autouse=True)
def handlers():
    """Every test leaves the handlers as they were."""
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_requests_a_stop_and_the_second_interrupts(clock, signum):
    stops = []
    with log_lines(logging.WARNING) as lines, stop_on_signal(lambda: stops.append(1)) as received:
        signal.raise_signal(signum)
        assert stops == [1] and received == [signum]
        assert lines == [f"{signum.name}: saving and stopping; send it again to exit at once"]
        clock.now += 1.5
        with pytest.raises(SignalInterrupt) as interrupt:
            signal.raise_signal(signal.SIGINT)
    assert interrupt.value.signum == 2
    assert stops == [1]


def test_a_signal_that_comes_twice_at_once_is_one_stop(clock):
    """``timeout`` signals its command, and then the whole process group with the command in it."""
    stops = []
    with stop_on_signal(lambda: stops.append(1)) as received:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
            clock.now += 0.3
        assert stops == [1] and received == [signal.SIGTERM]
        clock.now += 0.3  # someone who keeps pressing Ctrl-C is heard
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_repetition_does_not_disturb_what_the_first_one_started():
    with interrupt_on_signal():
        with pytest.raises(SignalInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # in a clause that cleans up
        with stop_on_signal(pytest.fail) as received:
            signal.raise_signal(signal.SIGTERM)
        assert not received


def test_a_held_signal_comes_after_the_block():
    done = []
    with interrupt_on_signal():
        with log_lines(logging.WARNING) as lines, hold_signals() as held:
            signal.raise_signal(signal.SIGTERM)
            done.append("block")
        assert done and lines == ["SIGTERM: stopping; send it again to exit at once"]
        with pytest.raises(SignalInterrupt) as interrupt:
            raise_held(held)
    assert exit_code(interrupt.value) == 143
    with hold_signals() as held:
        pass
    raise_held(held)


def test_a_second_signal_does_not_wait_for_the_block(clock):
    with hold_signals():
        signal.raise_signal(signal.SIGTERM)
        clock.now += 2
        with pytest.raises(SignalInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signal(pytest.fail):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_threads_leave_the_handlers_alone():
    seen = []

    def work():
        with stop_on_signal(pytest.fail), hold_signals(), interrupt_on_signal():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("plain", [False, True], ids=["ours", "as-ray-raises-it"])
def test_a_command_ends_with_the_code_of_its_signal(monkeypatch, capsys, signum, code, plain):
    """In calls of Ray, whose own code looks for signals, the type of the exception is lost."""

    def run(args):
        try:
            signal.raise_signal(signum)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt if plain else error from None

    monkeypatch.setattr(runs, "run_sync", run)
    assert main(["sync", "runs/none"]) == code
    out = capsys.readouterr()
    assert out.err == "\ninterrupted; the same command delivers the rest\n" and not out.out


# Children -------------------------------------------------------------------------------------------------------------


def survives(process):
    """Whether a process lives on after each of the signals that ask to stop."""
    for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        process.send_signal(signum)
    time.sleep(0.2)
    return process.poll() is None


def test_a_child_started_in_the_block_is_not_reached_and_another_is():
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with shielded_children():
        shielded = subprocess.Popen(["sleep", "60"])
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    other = subprocess.Popen(["sleep", "60"])
    try:
        assert survives(shielded)
        assert not survives(other)
    finally:
        shielded.kill()
        shielded.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="Ray's processes are shielded on Linux")
def test_ray_starts_its_processes_in_sessions_of_their_own():
    from ray._private import services, utils

    before = services.ConsolePopen, utils.set_sigterm_handler, signal.getsignal(signal.SIGTERM)
    with ray_internals.shielded_start():
        process = services.ConsolePopen(["sleep", "60"], stdin=subprocess.DEVNULL)
        utils.set_sigterm_handler(pytest.fail)
    assert (services.ConsolePopen, utils.set_sigterm_handler, signal.getsignal(signal.SIGTERM)) == before
    try:
        assert os.getsid(process.pid) == process.pid
        assert survives(process)
        process.terminate()  # as Ray ends its processes
        assert process.wait(5) == -signal.SIGKILL
    finally:
        process.kill()


def test_what_a_leader_leaves_in_its_session_is_killed_after_some_seconds(monkeypatch):
    """A grandchild that has its own process group, as a worker of Ray has, is in the session too."""
    code = "import subprocess, sys; sys.stdin.read(1); print(subprocess.Popen(['sleep', '60'], process_group=0).pid)"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    leader = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **pipes)
    stranger = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(sweeper, "GRACE_S", 0.2)
    thread = threading.Thread(target=sweeper.sweep, args=(leader.pid,))
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive()  # it waits for the leader
    leader.stdin.write(b"x")
    leader.stdin.flush()
    left = int(leader.stdout.readline())
    leader.wait(30)
    thread.join(10)
    assert not thread.is_alive()
    until(lambda: not running(left), 5)
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def running(pid):
    """Whether a process runs; one that has ended and was not collected does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
