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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from pipelines.cluster.ray_internals import withhold_from_tune_actors
from pipelines.cluster.signals import exit_despite, stop_on_signal
from pipelines.runs.errors import StoppedError
from pipelines.studies.study import StudyError, TrialState
from pipelines.tracking.uris import tracking_uri
from pipelines.tuning.controller import StudyController
from pipelines.tuning.trial import TrialEvent, TrialRun

POLL_S = 0.2
S3_CREDENTIALS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}
QUIET_ENV = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_WARN_THRESHOLD_S": "60"}


def run_trials(controller: StudyController) -> None:
    """Train the trials that the controller schedules, until it has no more.

    Raises:
        StudyError: Ray Tune has failed.
        StoppedError: SIGINT or SIGTERM asked to stop; running trials have saved their state.
    """
    if controller.peek_trial() is None:
        return
    failures: list[BaseException] = []
    scratch = tempfile.mkdtemp(prefix="ray-tune-")  # for Tune's experiment state, which nothing reads
    stop_file = Path(scratch, "stop")
    thread = threading.Thread(target=run_tuner, args=(controller, scratch, stop_file, failures), daemon=True)
    try:
        with stop_on_signal(controller.stopping.set) as received:
            thread.start()  # outside the main thread, Tune does not handle signals
            while thread.is_alive():
                thread.join(POLL_S)
                if controller.stopping.is_set():
                    stop_file.touch()
    except KeyboardInterrupt as interrupt:  # the second signal
        exit_despite(thread, interrupt)
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if controller.stopping.is_set():
        raise StoppedError(received[0] if received else signal.SIGINT)
    if failures:
        name = controller.study.name
        raise StudyError(f"the search failed: {failures[0]}; resume it with posmlp tune --resume {name}")


def run_tuner(controller: StudyController, scratch: str, stop_file: Path, failures: list[BaseException]) -> None:
    """Run Ray Tune over the controller's trials.

    Args:
        scratch: folder for Tune's own files.
        stop_file: the trials save their state and end when it appears. If Tune ended them itself, it would kill those
            that take longer than 15 s.
        failures: receives an exception.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET_ENV.items()})
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the controller logs how a trial ends
    study = controller.study
    # Ray would put its credentials for S3 into the actors' runtime environments, which it logs and lists.
    withhold_from_tune_actors(S3_CREDENTIALS)
    env = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_") or name in S3_CREDENTIALS}
    env["MLFLOW_TRACKING_URI"] = tracking_uri(study.recipe)
    trainable = ray.tune.with_parameters(TrialRun, env=env, stop_file=str(stop_file))
    # On the driver's node, where the journal is; an actor uses next to no CPU.
    this_node = {f"node:{ray.util.get_node_ip_address()}": 0.001}
    adapter = SearcherAdapter(controller)
    try:
        ray.tune.Tuner(
            ray.tune.with_resources(trainable, ray.tune.PlacementGroupFactory([this_node])),
            tune_config=ray.tune.TuneConfig(
                search_alg=adapter,
                scheduler=asha_scheduler(study.recipe.train.epochs) if study.asha and controller.searching else None,
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
                callbacks=[LostTrialCallback(controller, adapter.numbers)],
                verbose=0,
            ),
        ).fit()
    except BaseException as error:  # an exception in a thread would be lost
        failures.append(error)


def asha_scheduler(epochs: int) -> ASHAScheduler:
    """Asynchronous successive halving with rungs at a ninth and a third of the epochs; the better third continues."""
    return ASHAScheduler(
        time_attr="epoch", metric="top1", mode="max", max_t=epochs, grace_period=max(1, epochs // 9), reduction_factor=3
    )


class SearcherAdapter(Searcher):
    """Gives Ray Tune the controller's trials, and the controller their results.

    Attributes:
        numbers: number of each trial, by Tune's trial id.
    """

    def __init__(self, controller: StudyController):
        super().__init__()
        self.controller = controller
        self.numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        trial = self.controller.next_trial()
        if trial is None:  # None: ask again later
            return None if self.controller.may_have_more() else Searcher.FINISHED
        self.numbers[trial_id] = trial.number
        return {"job": self.controller.trial_job(trial).to_json()}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self.controller.record_epoch(self.numbers[trial_id], result["epoch"], result["top1"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if error or not result:  # see LostTrialCallback
            return
        event = TrialEvent.from_json(result["event"])
        if event.state != TrialState.RUNNING:
            self.controller.record_result(self.numbers[trial_id], event)
        elif not self.controller.stopping.is_set():
            stopped = TrialEvent(TrialState.STOPPED, event.metrics, f"after epoch {result['epoch']}")
            self.controller.record_result(self.numbers[trial_id], stopped)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the study's records are enough."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the study's records are enough."""

    def __getstate__(self) -> dict[str, Any]:  # Tune pickles it for a resume of its own, which is not used
        return {}


class LostTrialCallback(ray.tune.Callback):
    """Records trials whose process was lost more often than ``scaling.max_failures`` allows.

    Args:
        numbers: number of each trial, by Tune's trial id.
    """

    def __init__(self, controller: StudyController, numbers: Mapping[str, int]):
        self.controller, self.numbers = controller, numbers

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        lines = Path(trial.error_file).read_text().split("\n") if trial.error_file else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no reason is known")
        lost = TrialEvent(TrialState.FAILED, reason=f"its process was lost: {last}")
        self.controller.record_result(self.numbers[trial.trial_id], lost)

    def __getstate__(self) -> dict[str, Any]:  # as for SearcherAdapter
        return {}
