"""What a run shows of itself while it goes on: Ray exports it from every node, in the form that Prometheus reads.

Ray puts ``ray_`` before the names, and exports a gauge for about 20 seconds after it was last set. So whoever knows a
value sets it again and again while it holds, and what has ended, or hangs, vanishes by itself. The driver shows how far
the run is, its first worker how fast it trains; ``deploy/grafana.json`` draws both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from ray.util.metrics import Counter, Gauge

PREFIX = "posmlp_"
GAUGES = {
    "epoch": "Epochs that have ended",
    "val_top1": "Top-1 of the last validation, 0 to 1",
    "bad_videos": "Different videos that could not be decoded, of the epochs that have ended",
    "clips_per_second": "Training clips a second over all workers, in the last seconds",
    "data_wait_fraction": "Share of the last seconds in which the first worker waited for clips",
    "train_loss": "Mean training loss of the running epoch so far",
}
COUNTERS = {"decode_errors": "Times that a video could not be decoded"}


def show(run: str, **values: float) -> None:
    """Set some of a run's gauges; Ray must be up. It costs microseconds."""
    for name, value in values.items():
        gauge(name).set(value, {"run": run})


def count(run: str, name: str, times: int = 1) -> None:
    """Add to one of a run's counters, which Ray exports until the node's Ray ends."""
    counter(name).inc(times, {"run": run})


@cache
def gauge(name: str) -> Gauge:
    return Gauge(PREFIX + name, GAUGES[name], ("run",))


@cache
def counter(name: str) -> Counter:
    return Counter(PREFIX + name, COUNTERS[name], ("run",))


@dataclass
class Pace:
    """Shows how fast an epoch goes now: over the time since it was last shown.

    Attributes:
        clips: in a step.
        seconds, steps, waited: of the epoch until it was last shown.
    """

    run: str
    clips: int
    seconds: float = 0.0
    steps: int = 0
    waited: float = 0.0

    def show(self, seconds: float, steps: int, waited: float) -> None:
        """As of now in the epoch: its seconds, the steps done in them, and the seconds waited for clips."""
        passed = seconds - self.seconds
        rate, share = (steps - self.steps) * self.clips / passed, (waited - self.waited) / passed
        show(self.run, clips_per_second=rate, data_wait_fraction=share)
        self.seconds, self.steps, self.waited = seconds, steps, waited
