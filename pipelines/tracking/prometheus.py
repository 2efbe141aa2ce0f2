"""Prometheus metrics of a live run. Ray exports them from every node.

Ray adds ``ray_`` to the names, and exports a gauge for about 20 seconds after it was last set. So a process must
publish a value again and again while the value holds, and the values of a run that ended or hangs disappear by
themselves. The driver publishes the progress of the run; the first training worker publishes its speed.
``deploy/grafana.json`` draws both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from ray.util.metrics import Counter, Gauge

PREFIX = "posmlp_"
GAUGES = {
    "epoch": "Number of finished epochs",
    "val_top1": "Top-1 accuracy of the last validation, 0 to 1",
    "val_map": "Frame mAP of the last validation, 0 to 1",
    "bad_videos": "Number of distinct videos of the finished epochs that could not be decoded",
    "clips_per_second": "Training clips per second over all workers, in the last seconds",
    "data_wait_fraction": "Share of the last seconds that the first worker waited for clips",
    "train_loss": "Mean training loss of the current epoch so far",
}
COUNTERS = {"decode_errors": "Number of failed attempts to decode a video"}


def publish(run: str, **values: float) -> None:
    """Set gauges of a run, by their names in ``GAUGES``. Ray must be initialised. Costs microseconds."""
    for name, value in values.items():
        gauge(name).set(value, {"run": run})


def increment(run: str, name: str, amount: int = 1) -> None:
    """Add to a counter of a run. Ray exports it until Ray ends on this node."""
    counter(name).inc(amount, {"run": run})


@cache
def gauge(name: str) -> Gauge:
    return Gauge(PREFIX + name, GAUGES[name], ("run",))


@cache
def counter(name: str) -> Counter:
    return Counter(PREFIX + name, COUNTERS[name], ("run",))


@dataclass
class ThroughputGauge:
    """Publishes the throughput and the data wait of a running epoch, each over the time since the last call.

    Attributes:
        run: name of the run.
        clips_per_step: clips per training step, over all workers.
        seconds, steps, waited: totals of the epoch at the last call.
    """

    run: str
    clips_per_step: int
    seconds: float = 0.0
    steps: int = 0
    waited: float = 0.0

    def publish(self, seconds: float, steps: int, waited: float) -> None:
        """Publish the values since the last call.

        Args:
            seconds: since the epoch started.
            steps: training steps in this time.
            waited: seconds of this time that the worker waited for clips.
        """
        passed = seconds - self.seconds
        clips_per_second = (steps - self.steps) * self.clips_per_step / passed
        publish(self.run, clips_per_second=clips_per_second, data_wait_fraction=(waited - self.waited) / passed)
        self.seconds, self.steps, self.waited = seconds, steps, waited
