"""Ray Tune's side of a study: runs the trials that the controller schedules, each in a ``TrialRun`` actor.

Tune's own experiment state is not used to resume: Tune saves it periodically, so a trial that started after the last
save would be lost. The records of ``pipelines.studies.study`` are used instead.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray.tune
from ray.tune.search import Searcher

from pipelines.cluster.capacity import LongWait, explain_start_wait
from pipelines.cluster.ray_internals import give_to_tune_actors, withhold_from_tune_actors
from pipelines.cluster.session import WORKER_ENV
from pipelines.cluster.signals import exit_despite, stop_on_signal
from pipelines.runs.errors import StoppedError
from pipelines.runs.lease import Lease
from pipelines.studies.study import StudyError, StudySettings, TrialState
from pipelines.tuning.controller import StudyController, TrialController, modes
from pipelines.tuning.mo_asha import MOASHAScheduler
from pipelines.tuning.trial import (
    S3_CREDENTIALS,
    TrialEvent,
    TrialRun,
    actor_environment,
    actor_resources,
    is_file,
    trains_here,
    works_anywhere,
)
from posmlp import storage
from posmlp.metrics import EPOCH

POLL_S = 0.2
QUIET_ENV = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_WARN_THRESHOLD_S": "60"}


def run_trials(controller: TrialController, lease: Lease | None) -> None:
    """Train the trials that the controller schedules, until it has no more.

    Args:
        lease: of the study, on a remote storage.

    Raises:
        StudyError: Ray Tune has failed, or another process has taken the study over.
        StoppedError: SIGINT or SIGTERM asked to stop; running trials have saved their state.
    """
    if controller.peek_trial() is None:
        return
    failures: list[BaseException] = []
    scratch = tempfile.mkdtemp(prefix="ray-tune-")  # for Tune's experiment state, which nothing reads
    study = controller.settings
    # Where trials on any node see it, for those of this driver alone.
    stop_file = storage.join(study.folder if works_anywhere(study.recipe) else scratch, f"stop-{uuid.uuid4().hex}")
    thread = threading.Thread(target=run_tuner, args=(controller, scratch, stop_file, failures), daemon=True)
    try:
        with stop_on_signal(controller.stopping.set) as received:
            thread.start()  # outside the main thread, Tune does not handle signals
            live_at, wait = time.monotonic(), LongWait()
            while thread.is_alive():
                thread.join(POLL_S)
                if lease and lease.lost:
                    controller.stopping.set()
                if controller.stopping.is_set() and not is_file(stop_file):
                    with suppress(OSError):  # the storage may answer next time
                        storage.write_bytes(stop_file, b"")
                live_at = time.monotonic() if controller.live else live_at
                wait.check(time.monotonic() - live_at, partial(explain_pending, study))
    except KeyboardInterrupt as interrupt:  # the second signal
        exit_despite(thread, interrupt)
        raise
    finally:
        with suppress(OSError):
            storage.remove(stop_file)
        shutil.rmtree(scratch, ignore_errors=True)
    if lease and lease.lost:
        raise StudyError(lease.lost)
    if controller.stopping.is_set():
        raise StoppedError(received[0] if received else signal.SIGINT)
    if failures:
        raise StudyError(f"{study.name} failed: {failures[0]}; resume it with {study.resume_command}")


def explain_pending(study: StudySettings, seconds: float) -> str:
    """Say that no trial of a study has a process.

    Args:
        seconds: since one had.
    """
    return f"{study.name}: no trial runs; {explain_start_wait(study.recipe.scaling, seconds)}"


def run_tuner(controller: TrialController, scratch: str, stop_file: str, failures: list[BaseException]) -> None:
    """Run Ray Tune over the controller's trials.

    Args:
        scratch: folder for Tune's own files.
        stop_file: the trials save their state and end when it appears. If Tune ended them itself, it would kill those
            that take longer than 15 s.
        failures: receives an exception.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET_ENV.items()})
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the controller logs how a trial ends
    study = controller.settings
    # Ray would put its credentials for S3 into the actors' runtime environments, which it logs and lists.
    withhold_from_tune_actors(S3_CREDENTIALS)
    recipe = study.recipe
    here = trains_here(recipe, sum(node["Alive"] for node in ray.nodes()))
    trainable = ray.tune.with_parameters(
        TrialRun, env=actor_environment(recipe), stop_file=stop_file, here=here, sharing=controller.concurrent
    )
    adapter, scheduler = SearcherAdapter(controller), None
    if isinstance(controller, StudyController) and controller.halving:
        scheduler = StudyScheduler(controller, adapter.numbers)
    try:
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(trainable, actor_resources(recipe, here)),
            tune_config=ray.tune.TuneConfig(
                search_alg=adapter,
                scheduler=scheduler,
                num_samples=-1,
                max_concurrent_trials=controller.concurrent,
                reuse_actors=True,
                trial_name_creator=lambda trial: trial.trial_id,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=ray.tune.RunConfig(
                name=study.name,
                storage_path=scratch,
                failure_config=ray.tune.FailureConfig(max_failures=study.recipe.scaling.max_failures),
                checkpoint_config=ray.tune.CheckpointConfig(checkpoint_at_end=False),  # the runs write checkpoints
                callbacks=[TrialCallback(adapter)],
                verbose=0,
            ),
        )
        with give_to_tune_actors(WORKER_ENV if here else {}):
            tuner.fit()
    except BaseException as error:  # an exception in a thread would be lost
        failures.append(error)


class StudyScheduler(MOASHAScheduler):
    """Stops a study's trials early. Their numbers are their keys, so that a trial that resumes is the same one.

    Args:
        numbers: number of each trial, by Tune's trial id.
    """

    def __init__(self, controller: StudyController, numbers: Mapping[str, int]):
        super().__init__(modes(controller.study), time_attr=EPOCH, halving=controller.halving)
        self.controller, self.numbers = controller, numbers

    def key(self, trial: Any) -> int | None:
        number = self.numbers[trial.trial_id]
        return number if self.controller.has_rungs(self.controller.trials[number]) else None

    def metrics(self, result: Mapping[str, Any]) -> Mapping[str, float]:
        return TrialEvent.from_json(result["event"]).metrics

    def __getstate__(self) -> dict[str, Any]:  # Tune pickles it for a resume of its own, which is not used
        return {}


class SearcherAdapter(Searcher):
    """Gives Ray Tune the controller's trials, and the controller their results.

    Attributes:
        numbers: number of each trial, by Tune's trial id.
        saving: for trials that were stopped early, what is ready once their runs have saved their state.
    """

    def __init__(self, controller: TrialController):
        super().__init__()
        self.controller = controller
        self.numbers: dict[str, int] = {}
        self.saving: dict[int, ray.ObjectRef] = {}

    def suggest(self, trial_id: str) -> Any:
        self.forget_saved()
        trial = self.controller.next_trial()
        if trial is None:  # None: ask again later
            return None if self.controller.may_have_more() else Searcher.FINISHED
        self.numbers[trial_id] = trial.number
        return {"job": self.controller.trial_job(trial).to_json()}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self.controller.record_epoch(self.numbers[trial_id], TrialEvent.from_json(result["event"]).metrics)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if error or not result:  # see TrialCallback
            return
        event = TrialEvent.from_json(result["event"])
        if event.state != TrialState.RUNNING:
            self.controller.record_result(self.numbers[trial_id], event)
        elif not self.controller.stopping.is_set():
            stopped = TrialEvent(TrialState.STOPPED, event.metrics, f"after epoch {result['epoch']}")
            self.controller.record_result(self.numbers[trial_id], stopped)

    def stop_run(self, number: int, actor: ray.actor.ActorHandle) -> None:
        """Make a trial that was stopped early save its state. Tune may keep its actor for the next trial meanwhile."""
        self.saving[number] = actor.cleanup.remote()
        self.controller.saving.add(number)

    def forget_saved(self) -> None:
        """Tell the controller which stopped trials have saved their state, or have lost their process."""
        for number, saved in list(self.saving.items()):
            if ray.wait([saved], timeout=0)[0]:
                del self.saving[number]
                self.controller.saving.discard(number)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the study's records are enough."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the study's records are enough."""

    def __getstate__(self) -> dict[str, Any]:  # Tune pickles it for a resume of its own, which is not used
        return {}


class TrialCallback(ray.tune.Callback):
    """Notes which trials have a process, ends the runs of those that are stopped early, and records lost ones.

    A process may be lost as often as ``scaling.max_failures`` says.
    """

    def __init__(self, adapter: SearcherAdapter):
        self.adapter, self.controller, self.numbers = adapter, adapter.controller, adapter.numbers

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.controller.live.add(self.numbers[trial.trial_id])

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.controller.live.discard(self.numbers[trial.trial_id])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number, actor = self.numbers[trial.trial_id], trial.temporary_state.ray_actor
        self.controller.live.discard(number)
        if actor is not None and self.controller.trials[number].state == TrialState.STOPPED:
            self.adapter.stop_run(number, actor)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.controller.live.discard(self.numbers[trial.trial_id])
        lines = Path(trial.error_file).read_text().split("\n") if trial.error_file else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no reason is known")
        lost = TrialEvent(TrialState.FAILED, reason=f"its process was lost, or failed unexpectedly: {last}")
        self.controller.record_result(self.numbers[trial.trial_id], lost)

    def __getstate__(self) -> dict[str, Any]:  # as for SearcherAdapter
        return {}
