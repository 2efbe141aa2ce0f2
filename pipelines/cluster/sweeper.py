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
    """Wait for the end of a process, the leader of its session, and kill what it leaves in the session.

    A process is named by a descriptor of the kernel's, since its number may soon be another's.
    """
    with suppress(ProcessLookupError):  # it has ended already
        end = os.pidfd_open(leader)
        select.select([end], [], [])
    left = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it has ended
            process = os.pidfd_open(int(name))
            if os.getsid(int(name)) == leader:
                left.append(process)
            else:
                os.close(process)
    time.sleep(GRACE_S)
    for process in left:
        with suppress(OSError):  # it has ended
            signal.pidfd_send_signal(process, signal.SIGKILL)


if __name__ == "__main__":
    sweep(int(sys.argv[1]))
