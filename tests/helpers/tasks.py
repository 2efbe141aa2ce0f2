"""The same study for each task: a recipe, and trials with the same values under the name of the task's main metric."""

from dataclasses import replace

from posmlp.metrics import MAIN_METRICS
from tests.helpers.batches import DETECTION

TASKS = tuple(MAIN_METRICS)
OVERRIDES = {"recognition": (), "detection": DETECTION}  # of a recipe, by task


def of_task(trials, task):
    """Trials of recognition as those of a task."""
    before, after = MAIN_METRICS["recognition"], MAIN_METRICS[task]
    names = {before.key: after.key, before.samples: after.samples}
    return [replace(t, metrics={names.get(name, name): value for name, value in t.metrics.items()}) for t in trials]
