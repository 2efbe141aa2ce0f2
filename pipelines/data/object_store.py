"""The use of the cluster's object store, in which decoded clips wait."""

from __future__ import annotations

import math
import threading

from pipelines.cluster.ray_internals import object_store_stats

SAMPLE_S = 5.0  # between two samples
FIRST_LIMIT_S = 5.0  # for the first one, which takes milliseconds


def object_store_usage() -> tuple[float, float]:
    """Return the MiB in the cluster's object store now, and those spilled to disk since it started; NaN if unknown."""
    try:
        stats = object_store_stats()
    except Exception:  # a private interface that asks every node; whatever it raises must not end a run
        return math.nan, math.nan
    if stats is None:
        return math.nan, math.nan
    return stats.object_store_bytes_used / 2**20, stats.spilled_bytes_total / 2**20


class StoreMonitor:
    """Samples the use of the object store in a thread, because the call asks every node: training never waits for it.

    Attributes:
        usage: the last sample, as ``object_store_usage``.
    """

    def __init__(self, enabled: bool) -> None:
        """Start the thread, and wait for the first sample, at most ``FIRST_LIMIT_S``.

        Args:
            enabled: otherwise nothing is sampled, and the usage stays NaN.
        """
        self.usage = (math.nan, math.nan)
        self.sampled, self.closed = threading.Event(), threading.Event()
        if not enabled:
            return
        threading.Thread(target=self.watch, name="object store", daemon=True).start()
        self.sampled.wait(FIRST_LIMIT_S)

    def watch(self) -> None:
        """Sample until the monitor is closed."""
        while not self.closed.is_set():
            self.usage = object_store_usage()
            self.sampled.set()
            self.closed.wait(SAMPLE_S)

    def close(self) -> None:
        """End the thread; does not wait for it."""
        self.closed.set()
