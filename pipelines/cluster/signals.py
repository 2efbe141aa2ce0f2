"""What a command does when a signal asks it to stop: the first one ends it in order, a second one at once."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from pipelines.runs.errors import SignalInterrupt
from posmlp.processes import STOP_SIGNALS

logger = logging.getLogger(__name__)

REPEAT_S = 1.0  # `timeout` signals a command, and then the command's whole process group: that is one stop

last_signal = (-REPEAT_S, signal.SIGINT.value)  # when this process received one, and its number


@contextmanager
def interrupt_on_signal() -> Iterator[None]:
    """Raise ``SignalInterrupt`` on each signal. For a whole command; parts of it wait for a better moment."""

    def interrupt(signum: int) -> None:
        raise SignalInterrupt(signum)

    with handle_signals(interrupt):
        yield


@contextmanager
def hold_signals() -> Iterator[list[int]]:
    """Hold the first signal back while something is done that leaves no good state when it is interrupted.

    Yields:
        the signals received so far, for ``raise_held`` after the block.
    """

    def announce(signum: int) -> None:
        logger.warning("%s: stopping; send it again to exit at once", signal.Signals(signum).name)

    with handle_signals(announce) as received:
        yield received


def raise_held(received: Sequence[int]) -> None:
    """Raise the signal that ``hold_signals`` has held back, if there is one.

    Raises:
        SignalInterrupt: there is one.
    """
    if received:
        raise SignalInterrupt(received[0])


@contextmanager
def stop_on_signal(stop: Callable[[], object]) -> Iterator[list[int]]:
    """Call ``stop`` on the first signal, and raise ``SignalInterrupt`` on the second.

    Yields:
        the signals received so far.
    """

    def announce(signum: int) -> None:
        stop()
        logger.warning("%s: saving and stopping; send it again to exit at once", signal.Signals(signum).name)

    with handle_signals(announce) as received:
        yield received


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """Return 128 and the number of the signal. Ray raises plain ``KeyboardInterrupt`` for a signal during its calls."""
    return 128 + int(getattr(interrupt, "signum", last_signal[1]))


def exit_despite(thread: threading.Thread, interrupt: KeyboardInterrupt) -> None:
    """Exit at once, with the signal's exit code, if this thread is still alive when the process exits.

    A thread that uses Ray after Ray's shutdown would end the process with exit code 1.
    """

    def leave() -> None:
        if thread.is_alive():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(exit_code(interrupt))

    atexit.register(leave)  # runs before Ray's shutdown, which was registered earlier


@contextmanager
def handle_signals(first: Callable[[int], object]) -> Iterator[list[int]]:
    """Call ``first`` with the first of ``STOP_SIGNALS``, and raise ``SignalInterrupt`` on the second.

    A signal within ``REPEAT_S`` of another one is a repetition of it, and ignored. A hang-up is not handled if it is
    ignored, as ``nohup`` sets it. Only the main thread receives signals; in another thread this does nothing.

    Yields:
        the signals received so far.
    """
    received: list[int] = []

    def handle(signum: int, _: object) -> None:
        global last_signal
        now = time.monotonic()
        if now - last_signal[0] < REPEAT_S:
            return
        last_signal = now, signum
        received.append(signum)
        if len(received) > 1:
            raise SignalInterrupt(signum)
        first(signum)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]
    for signum in before:
        signal.signal(signum, handle)
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
