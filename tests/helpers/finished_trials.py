"""Finished trials of a study. This module imports no large package, so that a test can see what a process imports."""

from pipelines.studies.study import Trial, TrialState


def trials_of(count):
    """Finished trials; the later, the better and the more expensive, so all are on the front."""
    members = [{"block1": block, "width": width} for block in ("joint", "parallel") for width in (0.5, 1.0, 1.5)]
    return [
        Trial(
            number,
            members[number % len(members)],
            state=TrialState.FINISHED,
            metrics={
                "val/top1": (number + 1) / 100,
                "cost/gmacs": number + 1.0,
                "cost/params_m": number + 2.0,
                "cost/latency_ms": number + 3.0,
            },
        )
        for number in range(count)
    ]
