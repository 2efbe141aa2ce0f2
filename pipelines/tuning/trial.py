"""One trial of a study: an actor of Ray Tune's that is the driver of a run as ``posmlp train`` makes it."""

from __future__ import annotations

import json
import os
import queue
import statistics
import threading
from collections.abc import Callable, Mapping
from typing import Any

import ray.tune
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipelines.cluster.session import start_ray
from pipelines.runs.errors import StoppedError
from pipelines.runs.models import example_input
from pipelines.runs.record import read_record, run_folder
from pipelines.training.train import TrialHooks, train
from pipelines.tuning.study import FAILED, FINISHED, OVER, RUNNING, TOP1, over_budget
from posmlp import create_model
from posmlp.config import Config
from posmlp.errors import UserError
from posmlp.model.cost import cost, seconds

ROUNDS = 9  # interleaved passes of all models when latencies are compared


class TrialRun(ray.tune.Trainable):
    """The driver of one trial's run, as an actor of Tune's; a step is an epoch.

    The run goes on while Tune decides: what it tells comes through a queue. When Tune wants it to end it saves its
    state first, so nothing is left behind that still works.
    """

    def setup(self, config: dict[str, Any], env: dict[str, str]) -> None:
        os.environ.update(env)
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self.work, args=(json.loads(config["job"]),), daemon=True)
        self.thread.start()

    def step(self) -> dict[str, Any]:
        return self.events.get()

    def cleanup(self) -> None:
        self.ending.set()
        self.thread.join()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self.setup(new_config)  # the env is bound already
        return True

    def tell(self, state: str, metrics: Mapping[str, float], reason: str = "") -> None:
        """An event for Tune, which flattens what is nested: hence the text."""
        event = {"state": state, "reason": reason, "metrics": dict(metrics)}
        seen = {"epoch": int(metrics.get("epoch", 0)), "top1": metrics.get(TOP1, 0.0), "done": state != RUNNING}
        self.events.put({"event": json.dumps(event), **seen})

    def work(self, job: dict[str, Any]) -> None:
        """The run, from its costs to its end; whatever happens is told."""
        try:
            state, metrics, reason = self.outcome(Config.model_validate(job["config"]), job)
        except StoppedError:  # Tune has ended it, and asks for no more
            return
        except UserError as error:
            state, metrics, reason = FAILED, {}, str(error)
        except BaseException as error:  # one trial's failure is not the study's
            state, metrics, reason = FAILED, {}, f"{type(error).__name__}: {error}"
        self.tell(state, metrics, reason)

    def outcome(self, config: Config, job: dict[str, Any]) -> tuple[str, dict[str, float], str]:
        """Measure, train if the costs are within the budgets; returns the state, the metrics and the reason."""
        start_ray()
        costs = ray.get(on_worker(costs_of, config).remote(config.model_dump(mode="json")))
        if reason := over_budget(job["budgets"], costs):
            return OVER, costs, reason
        record = read_record(run_folder(config))
        if record is not None and record["metrics"] is not None:  # finished, but the study's driver did not hear of it
            return FINISHED, costs | record["metrics"], ""

        def on_epoch(metrics: Mapping[str, float]) -> None:
            if TOP1 in metrics and metrics["epoch"] < config.train.epochs:
                self.tell(RUNNING, costs | dict(metrics))

        part = TrialHooks(job["tags"], job["params"], costs, on_epoch, self.ending)
        return FINISHED, costs | train(config, part=part).metrics, ""


def on_worker(function: Callable[..., Any], recipe: Config) -> Any:
    """A Ray task with the resources of a training worker, outside of the trial's own placement group."""
    scaling = recipe.scaling
    labels = {"label_selector": scaling.train_on} if scaling.train_on else {}
    return ray.remote(function).options(
        **labels,
        num_cpus=scaling.cpus_per_worker,
        num_gpus=int(scaling.use_gpu),
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=None),
    )


def costs_of(recipe: dict[str, Any]) -> dict[str, float]:
    """On the training device: parameters, MACs, latency, throughput and memory of a recipe's model."""
    config = Config.model_validate(recipe)
    threads_of(config)
    scaling = config.scaling
    local = config.train.global_batch // scaling.workers
    batch = min(local, scaling.micro_batch or local)
    return cost(config.model.name, batch=batch, **config.model.overrides()).metrics()


def latencies(recipes: list[dict[str, Any]]) -> list[float]:
    """On the training device: milliseconds of a clip for each recipe's model, the median of interleaved passes."""
    configs = [Config.model_validate(recipe) for recipe in recipes]
    threads_of(configs[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = [create_model(c.model.name, **c.model.overrides()).eval().to(device) for c in configs]
    clip = example_input(configs[0]).to(device)
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in range(ROUNDS + 2):
            for model, taken in zip(models, times, strict=True):
                taken.append(seconds(lambda model=model: model(clip), device))
    return [1e3 * statistics.median(taken[2:]) for taken in times]


def threads_of(config: Config) -> None:
    """As many threads as a training worker has."""
    torch.set_num_threads(config.scaling.threads_per_worker or os.cpu_count() or 1)
