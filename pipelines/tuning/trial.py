"""One trial of a study: a Ray Tune actor that drives a run like those of ``posmlp train``.

A run with one worker trains in the actor itself where it can (``trains_here``), without Ray Train and its processes,
and the actor is used again for the next trial. Other runs have Ray Train's workers.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import ray.tune
import torch
from ray.exceptions import RayActorError
from ray.tune import PlacementGroupFactory
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipelines.cluster.capacity import LongWait, explain_task_wait, worker_resources
from pipelines.cluster.session import CUBLAS_ENV, start_ray
from pipelines.runs.errors import PreemptedError, RunError, StoppedError
from pipelines.runs.models import example_input
from pipelines.runs.record import read_record, run_folder
from pipelines.studies.study import TrialState, over_budget
from pipelines.tracking.uris import tracking_uri
from pipelines.training.train import TrialContext, train
from pipelines.training.worker import forget_run
from posmlp import create_model, storage
from posmlp.config import Config, FrameOrder
from posmlp.errors import UserError
from posmlp.metrics import EPOCH, main_metric
from posmlp.model.cost import cost, seconds
from tune_spaces import Value

POLL_S = 0.2
REMOTE_POLL_S = 2.0  # between two looks for a stop file on a remote storage
END_LIMIT_S = 600.0  # for the last step, its checkpoint, and what MLflow has yet to get
S3_CREDENTIALS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}
TIMED_PASSES = 9  # per model, when latencies are compared
WARM_UP_PASSES = 2


@dataclass(frozen=True)
class TrialJob:
    """What a ``TrialRun`` needs to run its trial.

    Attributes:
        config: the recipe of the trial's run.
        tags, params: for the trial's MLflow run, in addition to a run's own.
        budgets: the largest allowed costs of a trial that has not begun to train, by metric name.
        predicted: as of ``TrialContext``.
        costs: of the trial's model, if they are known from before; a second measurement would differ.
    """

    config: Config
    tags: Mapping[str, str]
    params: Mapping[str, Value]
    budgets: Mapping[str, float]
    predicted: tuple[FrameOrder, ...] = ()
    costs: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """The job as text. Ray Tune would flatten nested values in its config."""
        return json.dumps(
            {
                "config": self.config.model_dump(mode="json"),
                "tags": dict(self.tags),
                "params": dict(self.params),
                "budgets": dict(self.budgets),
                "predicted": list(self.predicted),
                "costs": dict(self.costs),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> TrialJob:
        """A job from its text."""
        tree = json.loads(text)
        return cls(**tree | {"config": Config.model_validate(tree["config"]), "predicted": tuple(tree["predicted"])})


@dataclass(frozen=True)
class TrialEvent:
    """What a ``TrialRun`` reports: the end of an epoch, or the end of the trial.

    Attributes:
        state: running after an epoch, otherwise how the trial ended.
        metrics: the metrics of the last epoch, and the trial's costs.
        reason: why it failed, was not trained or ended before its last epoch.
    """

    state: TrialState
    metrics: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    def to_json(self) -> str:
        """The event as text. Ray Tune would flatten nested values in a result."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TrialEvent:
        """An event from its text."""
        tree = json.loads(text)
        return cls(**tree | {"state": TrialState(tree["state"])})


class TrialRun(ray.tune.Trainable):
    """Ray Tune's actor for one trial, and the driver of its run. A step of Tune is an epoch.

    The run continues in a thread while Tune decides; its events reach Tune through a queue. When Tune ends the trial,
    or the study's driver asks to stop, the run saves its state first, so no process is left behind.
    """

    looked = -math.inf  # when this process last looked for the stop file

    def setup(
        self,
        config: dict[str, Any],
        env: Mapping[str, str] | None = None,
        stop_file: str = "",
        here: bool = False,
        sharing: int = 1,
    ) -> None:
        """Start the run.

        Args:
            config: ``job``, a ``TrialJob`` as text.
            env: variables for this process.
            stop_file: the run ends when this file appears, a path or a URI.
            here, sharing: as in ``TrialContext``.
        """
        self.stop_file, self.here, self.sharing = stop_file, here, sharing
        os.environ.update(env or {})
        log_to_stdout()
        self.events: queue.Queue[dict[str, Any] | BaseException] = queue.Queue()
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self.run_job, args=(config["job"],), daemon=True)
        self.thread.start()

    def step(self) -> dict[str, Any]:
        poll_s = REMOTE_POLL_S if storage.is_remote(self.stop_file) else POLL_S
        while True:
            if time.monotonic() - self.looked >= poll_s:  # also while epochs end more often than that
                self.looked = time.monotonic()
                if is_file(self.stop_file):
                    self.ending.set()
            try:
                event = self.events.get(timeout=poll_s)
            except queue.Empty:
                continue
            if isinstance(event, BaseException):
                raise event
            return event

    def cleanup(self) -> None:
        self.ending.set()
        self.thread.join(END_LIMIT_S)
        if self.thread.is_alive():  # Tune then ends this process, and no other trial gets it
            raise RunError(f"a trial's run has not ended {END_LIMIT_S:g} s after it was asked to; its process ends")

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self.setup(new_config)  # with_parameters has bound the other arguments
        return True

    def send(self, event: TrialEvent, done: bool = True) -> None:
        """Give Tune an event as a result.

        Args:
            done: whether it is the last one.
        """
        epoch = int(event.metrics.get(EPOCH, 0))
        self.events.put({"event": event.to_json(), "done": done, "epoch": epoch})

    def run_job(self, text: str) -> None:
        """Run the trial of a ``TrialJob``, given as text, and send how it ended, whatever happens.

        After an exception that is not known to come again, Tune ends this process, in which CUDA may no longer work,
        and the trial resumes in a new one, ``scaling.max_failures`` times.
        """
        try:
            event = self.run_trial(TrialJob.from_json(text))
        except PreemptedError:
            if not self.ending.is_set():
                # Tune ends this process and resumes the trial on another machine. It counts no failure for this error.
                self.events.put(RayActorError(error_msg="the machine of the trial is taken away", preempted=True))
                return
            event = TrialEvent(TrialState.RUNNING)
        except StoppedError:  # the trial is to be resumed; if Tune has ended it, nothing reads this
            event = TrialEvent(TrialState.RUNNING)
        except UserError as error:
            event = TrialEvent(TrialState.FAILED, reason=str(error))
        except torch.OutOfMemoryError as error:
            event = TrialEvent(TrialState.FAILED, reason=f"the GPU's memory is too small: {error}")
        except BaseException as error:
            self.events.put(error)
            return
        finally:
            forget_run()
        self.send(event)

    def run_trial(self, job: TrialJob) -> TrialEvent:
        """Train, if the run exists already or its costs are within the budgets; returns how the trial ended."""
        start_ray()
        config, recipe = job.config, job.config.model_dump(mode="json")
        costs = dict(job.costs) or (measure_costs(recipe) if self.here else self.measure_costs_elsewhere(config))
        record = read_record(run_folder(config))
        if record is None and (reason := over_budget(job.budgets, costs)):
            return TrialEvent(TrialState.OVER_BUDGET, costs, reason)
        if record is not None and record["metrics"] is not None:  # finished, but the study's driver did not record it
            return TrialEvent(TrialState.FINISHED, costs | record["metrics"])

        def on_epoch(metrics: Mapping[str, float]) -> None:
            if main_metric(metrics) and metrics[EPOCH] < config.train.epochs:
                self.send(TrialEvent(TrialState.RUNNING, costs | dict(metrics)), done=False)

        how = on_epoch, self.ending, self.here, self.sharing, job.predicted
        context = TrialContext(job.tags, job.params, costs, *how)
        result = train(config, trial=context)
        return TrialEvent(TrialState.FINISHED, costs | result.metrics, result.ended_early)

    def measure_costs_elsewhere(self, config: Config) -> dict[str, float]:
        """``measure_costs`` in a task that may have to wait for its resources.

        Raises:
            StoppedError: the study ends.
        """
        task = on_training_worker(measure_costs, config).remote(config.model_dump(mode="json"))
        begun, wait = time.monotonic(), LongWait()
        explain = partial(explain_task_wait, "the costs of the trial's model", config.scaling)
        while not ray.wait([task], timeout=POLL_S)[0]:
            if self.ending.is_set():
                ray.cancel(task)
                raise StoppedError(signal.SIGTERM)
            wait.check(time.monotonic() - begun, explain)
        return ray.get(task)


def trains_here(recipe: Config, nodes: int) -> bool:
    """Return whether a study's trials train in their own actors, rather than in workers of Ray Train.

    Such an actor writes to MLflow, whose SQLite file does not bear writers on several nodes. On a cluster of several
    nodes without an MLflow server the actors stay on the node of the study's driver, and the workers, which write
    checkpoints alone, use all nodes.

    Args:
        nodes: number of nodes of the cluster.
    """
    return recipe.scaling.workers == 1 and (nodes == 1 or works_anywhere(recipe))


def works_anywhere(recipe: Config) -> bool:
    """Return whether the driver of a run can run on any node: MLflow is behind a server or in a database server."""
    return not tracking_uri(recipe).startswith(("sqlite:", "file:"))


def is_file(uri: str) -> bool:
    """Return whether a file exists; False if its storage does not answer."""
    with suppress(OSError):
        return storage.are_files([uri])[0]
    return False


def actor_resources(recipe: Config, here: bool) -> PlacementGroupFactory:
    """What a trial's actor reserves: the resources of the worker that trains in it, else next to nothing."""
    this_node = {f"node:{ray.util.get_node_ip_address()}": 0.001}
    if not here:
        return PlacementGroupFactory([this_node])
    bundle = worker_resources(recipe.scaling) | ({} if works_anywhere(recipe) else this_node)
    return PlacementGroupFactory([bundle], bundle_label_selector=[dict(recipe.scaling.train_on)])


def actor_environment(recipe: Config) -> dict[str, str]:
    """Variables for a trial's actor: for MLflow, with its place, for S3, and for PyTorch."""
    env = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_") or name in S3_CREDENTIALS}
    return env | {"MLFLOW_TRACKING_URI": tracking_uri(recipe)} | (CUBLAS_ENV if recipe.train.deterministic else {})


def log_to_stdout() -> None:
    """Print this process's progress lines; Ray writes them to the actor's log file."""
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    for name in ("pipelines", "posmlp"):
        logging.getLogger(name).setLevel(logging.INFO)


def on_training_worker(function: Callable[..., Any], recipe: Config) -> Any:
    """A Ray task with the resources of a training worker, outside the trial's own placement group."""
    scaling, resources = recipe.scaling, worker_resources(recipe.scaling)
    labels = {"label_selector": scaling.train_on} if scaling.train_on else {}
    return ray.remote(function).options(
        **labels,
        num_cpus=resources["CPU"],
        num_gpus=resources.get("GPU", 0),
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=None),  # type: ignore[arg-type]
    )


def measure_costs(recipe: dict[str, Any]) -> dict[str, float]:
    """Ray task on the training device: the ``cost/*`` metrics of a recipe's model (``posmlp.metrics``)."""
    config = Config.model_validate(recipe)
    set_threads(config)
    scaling = config.scaling
    local = config.train.global_batch // scaling.workers
    batch = min(local, scaling.micro_batch or local)
    return cost(config.model.name, batch=batch, **config.model.overrides()).metrics()


def measure_latencies(recipes: list[dict[str, Any]]) -> list[float]:
    """Ray task on the training device: the latency of each recipe's model for one clip, in milliseconds.

    The clip has the size of the model's own clips. The models take turns, so that a disturbance meets all of them. Each
    latency is the median of ``TIMED_PASSES``.
    """
    configs = [Config.model_validate(recipe) for recipe in recipes]
    set_threads(configs[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = [create_model(c.model.name, **c.model.overrides()).eval().to(device) for c in configs]
    clips = [example_input(c).to(device) for c in configs]
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in range(WARM_UP_PASSES + TIMED_PASSES):
            for model, clip, taken in zip(models, clips, times, strict=True):
                taken.append(seconds(partial(model, clip), device))
    return [1e3 * statistics.median(taken[WARM_UP_PASSES:]) for taken in times]


def set_threads(config: Config) -> None:
    """Use as many PyTorch threads as a training worker."""
    torch.set_num_threads(config.scaling.threads_per_worker or os.cpu_count() or 1)
