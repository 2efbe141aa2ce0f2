"""Time what a study's driver does itself for each trial, without Ray and without training.

    python benchmarks/study_driver.py
    python benchmarks/study_driver.py --trials 200 --space ablation

The trials' results come from a formula. All else is what ``posmlp tune --against gmacs`` does: proposals, records,
a journal, and an MLflow store in SQLite. The table has CPU milliseconds of the driver for each trial, over the
trials since the last row. "publishing" is all other threads of the driver: the delivery to MLflow and the thread that
takes the figures. The process that draws them is not the driver; its CPU time is below the table.
"""

from __future__ import annotations

import argparse
import logging
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from pipelines.runs.record import write_record
from pipelines.studies.costs import static_costs
from pipelines.studies.study import Study, TrialState, trial_folder
from pipelines.tracking.journal import Journal
from pipelines.tracking.tracker import Tracker
from pipelines.tuning.controller import StudyController
from pipelines.tuning.trial import TrialEvent
from posmlp.config import Config, load_recipe
from posmlp.metrics import COST_LATENCY_MS, EPOCH, VAL_TOP1
from tune_spaces import load_space

STEPS = (50, 200, 500, 1000)  # trials after which a row is printed
RUNNING = 4  # trials at a time
EPOCHS = 10


class Clock:
    """CPU seconds of this thread by part of the work, and of the whole process."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start again at 0."""
        self.seconds = {"proposing": 0.0, "recording": 0.0}
        self.simulating = 0.0
        self.start = time.process_time()

    def time_call(self, part: str, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function, and add its time to a part."""
        start = time.thread_time()
        result = function(*args)
        self.seconds[part] += time.thread_time() - start
        return result

    def take(self) -> dict[str, float]:
        """The seconds by part since the last call."""
        total = time.process_time() - self.start - self.simulating
        found = self.seconds | {"publishing": total - sum(self.seconds.values())}
        self.reset()
        return found


def simulated_metrics(config: Config, rng: np.random.Generator) -> list[dict[str, float]]:
    """The metrics of a trial's epochs: accuracy grows with the model's size and time, with noise."""
    costs = static_costs(config)
    costs[COST_LATENCY_MS] = 50 * math.sqrt(max(costs.values()))
    best = 1 / (1 + math.exp(-math.log10(costs["cost/gmacs"] + 1e-3) - 1)) + rng.normal(0, 0.03)
    epochs = range(1, EPOCHS + 1)
    return [costs | {EPOCH: float(e), VAL_TOP1: best * (1 - math.exp(-e / 3))} for e in epochs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=STEPS[-1], help="number of trials (default: %(default)s)")
    parser.add_argument("--space", default="speed_accuracy", help="search space (default: %(default)s)")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe("demo", [f"train.storage={folder}", f"train.epochs={EPOCHS}", "name=driver"])
        settings = {"space": args.space, "trials": args.trials, "against": "gmacs", "asha": False}
        study = Study(name="driver", recipe=recipe, **settings)
        space = load_space(args.space, recipe)
        tracker = Tracker.open(recipe, {}, journal=Journal(Path(folder, "journal.jsonl")))
        controller = StudyController(study, space, [], tracker, RUNNING)
        clock, running, done = Clock(), [], 0
        print("| trials | proposing, ms | recording, ms | publishing, ms |\n|---|---|---|---|")
        with controller.results as results:
            last = 0
            while done < args.trials:
                while len(running) < RUNNING:
                    trial = clock.time_call("proposing", controller.next_trial)
                    if trial is None:
                        break
                    clock.time_call("proposing", controller.trial_job, trial)
                    running.append(trial)
                if not running:
                    break
                trial = running.pop(0)
                start = time.thread_time()  # what a trial's own process does
                config = study.trial_recipe(space, trial.member, trial.number, trial.seed)
                epochs = simulated_metrics(config, rng)
                write_record(trial_folder(study, trial.number), config, {}, tracker.run_id, epochs[-1])
                clock.simulating += time.thread_time() - start
                for metrics in epochs:
                    clock.time_call("recording", controller.record_epoch, trial.number, metrics)
                event = TrialEvent(TrialState.FINISHED, epochs[-1])
                clock.time_call("recording", controller.record_result, trial.number, event)
                done += 1
                if done in STEPS or done == args.trials:
                    parts = clock.take()
                    print(f"| {done} | " + " | ".join(f"{1e3 * s / (done - last):.1f}" for s in parts.values()) + " |")
                    last = done
            drawing = results.process
            start = time.perf_counter()
            results.finish(controller.in_order(), {})
            used = psutil.Process((drawing or results.process).process.pid).cpu_times()
            print(
                f"\nlast drawing: {time.perf_counter() - start:.0f} s; its process: {used.user + used.system:.0f} CPU-s"
            )
        start = time.process_time()
        more = study.model_copy(update={"trials": done + 1})
        StudyController(more, space, controller.in_order(), tracker, RUNNING).peek_trial()
        print(f"first proposal after a resume of {done} trials: {time.process_time() - start:.2f} CPU-s")
        tracker.close("FINISHED")


if __name__ == "__main__":
    main()
