"""Waiting for what other processes do."""

import time


def until(condition, seconds=60):
    """Call ``condition`` until it returns something true, and return that."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)
    return value
