"""Child processes that a signal to the whole process group does not end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


@contextmanager
def shielded_children() -> Iterator[None]:
    """Shield the processes that this thread starts in the block, and their children, from ``STOP_SIGNALS``.

    ``timeout``, Slurm, systemd and terminals send a signal to all processes of a command. It is meant for the command,
    which decides when its children end. A blocked signal is inherited, so no moment of a child's start is unprotected.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
