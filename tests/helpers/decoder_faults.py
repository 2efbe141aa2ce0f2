"""What the tests make the decoding process do. Functions sent to a process must stand in an importable module."""

import os
import re
import signal
import time

import numpy as np

from posmlp.errors import UserError
from posmlp.video import isolated
from tests.helpers.videos import by_pyav


def abort(video):
    os.abort()


def segfault(video):
    os.kill(os.getpid(), signal.SIGSEGV)


def leave(video):
    os._exit(3)


def sleep(video, seconds):
    time.sleep(seconds)


def spin_in_c(video):
    re.match("(a+)+b", "a" * 60)  # never ends, and takes no signal before it does


def eat_memory(video):
    return int(np.ones(isolated.MEMORY_LIMIT, np.uint8).sum())


def fail(video):
    raise RuntimeError("two\nlines")


def refuse(video):
    raise UserError("the disk is full")


def frames_of(video):
    return video.info.frames


def sequential(video):
    return by_pyav(video.uri)


def object_id(video):
    return id(video)


def process_id(video):
    return os.getpid()


def unsendable(video):
    return lambda: None
