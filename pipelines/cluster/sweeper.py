"""Kill what a process has left in its session, some seconds after its end: ``python sweeper.py PID``.

A Ray that this project has started dies with the command, even if that is killed: the kernel kills raylet and GCS, and
workers notice. But raylet's agents first try for a minute to report its death to the GCS. This needs no package, so
that it starts quickly.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from contextlib import suppress

GRACE_S = 3.0  # for those that end by themselves


def sweep(leader: int) -> None:
    """Wait for the end of a process, the leader of its session, and kill the session's other processes.

    Their session keeps the number of its leader, which no new process can get while they live.
    """
    try:
        end = os.pidfd_open(leader)
    except ProcessLookupError:
        end = None
    if end is not None:
        select.select([end], [], [])
        os.close(end)
    time.sleep(GRACE_S)
    for name in os.listdir("/proc"):
        with suppress(ValueError, OSError):  # it is no process, or has ended
            if os.getsid(int(name)) == leader:
                os.kill(int(name), signal.SIGKILL)


if __name__ == "__main__":
    sweep(int(sys.argv[1]))
