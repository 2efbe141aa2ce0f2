"""A study: many training runs, chosen by a searcher, scheduled by Ray Tune, laid out in MLflow as they end.

The study's driver proposes members of the space (``pipelines.tuning.search``), keeps the study's records
(``pipelines.tuning.study``) and draws its front (``pipelines.tuning.pareto``). Ray Tune starts a ``TrialRun`` for each
(``pipelines.tuning.trial``). Tune's own records are not used to go on: they are written now and then, and a trial that started
since would be lost.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray.tune
from ray.tune.execution import class_cache
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from pipelines.cluster.capacity import DECODING, wait_for_room
from pipelines.cluster.session import start_ray, stop_on_signal
from pipelines.runs.errors import StoppedError
from pipelines.runs.models import example_input, last_model
from pipelines.runs.record import check_writable, read_json, read_record, run_folder, write_json
from pipelines.tracking.mlflow_client import PARENT, register_model, source_tags
from pipelines.tracking.tracker import Tracker
from pipelines.tracking.uris import journal_path, tracking_uri, without_password
from pipelines.training.preflight import check_data, read_splits
from pipelines.tuning import pareto as fronts
from pipelines.tuning.search import check_space, propose
from pipelines.tuning.study import (
    COSTS,
    FAILED,
    FINISHED,
    OVER,
    RUNNING,
    STOPPED,
    TOP1,
    Study,
    StudyError,
    Trial,
    full,
    read_study,
    read_trials,
    space_of,
    trial_folder,
    write_study,
    write_trial,
)
from pipelines.tuning.trial import TrialRun, latencies, on_worker
from posmlp import storage
from posmlp.config import Config

RULE = "highest val/top1 of fully trained trials, of those with several seeds the mean; of equals the fewest GMACs"
PUBLISHED_FILE = "published.json"  # in a study's folder: milliseconds of published variants, by name
SPEAK_S = 30.0  # between two lines of progress
DRAW_S = 30.0  # between two sets of pictures
CREDENTIALS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}
QUIET = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_WARN_THRESHOLD_S": "60"}


@dataclass
class StudyResult:
    """What a study leaves.

    Attributes:
        trials: all of them.
        best: see ``best``; None if no trial was finished.
        undelivered: what MLflow has not taken yet (``posmlp sync``).
    """

    study: Study
    mlflow_run_id: str
    trials: list[Trial]
    best: Trial | None
    undelivered: int = 0


def tune(study: Study, echo: Callable[[str], None] = print, *, resume: bool = False) -> StudyResult:
    """Train the trials of a study to the end, from the start or from where it stopped.

    Finished trials stay, running ones go on from their checkpoints, and the searcher is told all of them.

    Args:
        study: its settings; of one that goes on, only ``trials``, ``concurrent`` and ``repeats`` may have changed.
        resume: there is a study of this name, to go on with.

    Raises:
        StudyError: it cannot start; the message says what to change.
        UserError: the recipe's data or storage is not as it should be.
        StoppedError: a signal (SIGINT or SIGTERM) asked it to stop; with ``resume`` it goes on.
    """
    if study.space.endswith(".py"):
        study = study.model_copy(update={"space": os.path.abspath(study.space)})
    space = space_of(study)
    found, trials = read_study(study.folder), read_trials(study.folder)
    check_space(study, space, trials)
    if bool(found) != resume:
        raise StudyError(
            f"{study.folder} is a study already: go on with it, posmlp tune --resume {study.name}, or choose another "
            "name, --name"
            if found
            else f"no study {study.folder}; start one with posmlp tune RECIPE --space SPACE"
        )
    train_set, val_set = read_splits(study.recipe)
    study = study.model_copy(update={"recipe": settled(check_data(study.recipe, train_set, val_set))})
    if not trials and propose(study, space, []) is None:
        raise StudyError(f"space {study.space} has no member within the budgets that can be built; raise a budget")
    check_writable(study.folder)
    start_ray()
    wait_for_room(study.recipe.scaling, echo)
    concurrent = study.concurrent or room(study.recipe)
    tags = source_tags() | {"study": study.name, "space": study.space}
    named = study.recipe.model_copy(update={"name": study.name})
    params = {f"study.{key}": value for key, value in study.model_dump(exclude={"recipe"}).items()}
    tracker = Tracker.open(
        named, tags, found[1] if found else None, journal=journal_path(study.folder), params=params, echo=echo
    )
    status, undelivered = "FAILED", 0
    try:
        safe = study.model_copy(update={"recipe": without_password(study.recipe)})
        write_study(safe, tracker.run_id)
        tracker.log_file("study.json", safe.model_dump_json(indent=1).encode())
        controller = StudyController(study, trials, tracker, concurrent, echo)
        controller.greet()
        controller.run()
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        undelivered = tracker.close(status)
        if undelivered:
            echo(f"{undelivered} notes wait for MLflow; `posmlp sync {study.folder}` delivers them")
    return StudyResult(study, tracker.run_id, controller.in_order(), best(controller.in_order()), undelivered)


def settled(recipe: Config) -> Config:
    """The recipe with its paths and its tracking store as they are here: trials run in other folders."""

    def absolute(path: str | None) -> str | None:
        return path and storage.join(".", path)

    splits = {
        name: split.model_copy(update={"path": absolute(split.path), "root": absolute(split.root)})
        for name, split in (("train", recipe.data.train), ("val", recipe.data.val))
    }
    data = recipe.data.model_copy(update={**splits, "classes": absolute(recipe.data.classes)})
    train_ = recipe.train.model_copy(update={"storage": absolute(recipe.train.storage)})
    uri = recipe.tracking.uri or (None if os.environ.get("MLFLOW_TRACKING_URI") else tracking_uri(recipe))
    tracking = recipe.tracking.model_copy(update={"uri": uri})
    return recipe.model_copy(update={"data": data, "train": train_, "tracking": tracking})


def room(recipe: Config) -> int:
    """Trials that the cluster can train at a time and still decode for; there is room for one."""
    have, scaling = ray.cluster_resources(), recipe.scaling
    cpus, gpus = have.get("CPU", 0), have.get("GPU", 0)
    takes = scaling.workers * scaling.cpus_per_worker
    counts = [int((cpus - DECODING + 1e-6) / takes)]
    counts += [int(gpus / scaling.workers)] if scaling.use_gpu else []
    if scaling.threads_per_worker and not scaling.use_gpu:
        counts.append(max(1, int(cpus / (scaling.workers * scaling.threads_per_worker))))
    return max(1, min(counts))


def best(trials: Sequence[Trial]) -> Trial | None:
    """The fully trained trial with the highest top-1, of equals the one with the fewest GMACs.

    Where some were repeated with other seeds it is one of these, by its mean: the highest of many single values is
    mostly luck.
    """
    rated = fronts.rated(trials, "gmacs")
    repeated = {trial.repeats for trial in trials if trial.state == FINISHED}
    chosen = [trial for trial in rated if trial.number in repeated] or rated
    return max(chosen, key=lambda t: (fronts.accuracy(t, trials)[0], -t.metrics[COSTS["gmacs"]]), default=None)


# --- the study's driver ------------------------------------------------------------------------------------------


class StudyController:
    """Hands out trials, and takes down what comes of them.

    Attributes:
        trials: by number.
        published: milliseconds of the published variants that the front marks, once they are measured.
        stopping: set when the user wants to stop.
    """

    def __init__(
        self, study: Study, trials: Sequence[Trial], tracker: Tracker, concurrent: int, echo: Callable[[str], None]
    ):
        self.study, self.tracker, self.concurrent, self.echo = study, tracker, concurrent, echo
        self.space = space_of(study)
        self.trials = {trial.number: trial for trial in trials}
        self.published = read_json(storage.join(study.folder, PUBLISHED_FILE)) or {}
        self.again = [trial for trial in trials if trial.state == RUNNING]  # to go on with
        self.repeating: list[Trial] | None = None  # once the search is over: what is still to be repeated
        self.stopping = threading.Event()
        self.spoken = self.drawn = time.monotonic()
        self.epochs: dict[int, tuple[int, float]] = {}
        self.started: dict[int, float] = {}

    def in_order(self) -> list[Trial]:
        """All trials, by number."""
        return [self.trials[number] for number in sorted(self.trials)]

    def greet(self) -> None:
        study = self.study
        goal = f"top-1 against {study.against}" if study.against else "top-1"
        text = f"{study.name}: space {study.space}, {study.trials} trials, {study.searcher}, {goal}"
        self.echo(f"{text}; {self.concurrent} at a time; {study.folder}")
        if self.trials:
            counts = {state: sum(t.state == state for t in self.trials.values()) for state in (FINISHED, RUNNING)}
            self.echo(f"going on; trials finished: {counts[FINISHED]}, to be continued: {counts[RUNNING]}")
        if not study.recipe.data.cache_dir:
            self.echo("every trial decodes its videos anew; with data.cache_dir=FOLDER each is decoded once for all")

    def run(self) -> None:
        """The search, then the latencies side by side, and last the repeats of the front that this gives.

        Raises:
            StudyError: Tune has failed.
            StoppedError: the user wanted to stop.
        """
        self.fit()
        self.compare_latencies()
        if self.study.repeats > 1:
            self.repeating = self.repeats()
            self.again += self.repeating
            self.fit()
        self.draw()
        self.register()

    def fit(self) -> None:
        """Train what ``next`` hands out, until it hands out nothing more."""
        if self.peek() is None:
            return
        failures: list[BaseException] = []
        with stop_on_signal(self.stopping.set, self.echo) as caught:
            thread = threading.Thread(target=run_tuner, args=(self, failures), daemon=True)
            thread.start()  # in a thread, Tune leaves the signals to us
            while thread.is_alive():
                thread.join(0.2)
        if self.stopping.is_set():
            raise StoppedError(caught[0] if caught else signal.SIGINT)
        if failures:
            raise StudyError(f"the search failed: {failures[0]}; posmlp tune --resume {self.study.name} goes on")

    def peek(self) -> Trial | None:
        """What ``next`` would hand out."""
        if self.again:
            return self.again[0]
        counted = [t for t in self.trials.values() if t.repeats is None and t.state != OVER]
        if self.repeating is not None or len(counted) >= self.study.trials:
            return None
        return propose(self.study, self.space, self.in_order())

    def next(self) -> Trial | None:
        """A trial to start, noted; None when there is none left."""
        trial = None if self.stopping.is_set() else self.peek()
        if trial is None:
            return None
        if self.again:
            self.again.pop(0)
        self.note(trial)
        self.started[trial.number] = time.monotonic()
        again = "" if trial.repeats is None else f" (trial {trial.repeats} with seed {trial.seed})"
        self.echo(f"trial {trial.number}{again}: {fronts.describe_member(trial.member)}")
        return trial

    def may_need_more(self) -> bool:
        """Whether ``next`` may hand out something once a trial has ended."""
        running = any(trial.state == RUNNING for trial in self.trials.values())
        return running and self.study.budget_ms is not None and not self.stopping.is_set()

    def job(self, trial: Trial) -> dict[str, Any]:
        """What a ``TrialRun`` needs, as plain data."""
        config = self.study.trial_recipe(self.space, trial.member, trial.number, trial.seed)
        tags = {PARENT: self.tracker.run_id, "study": self.study.name, "trial": str(trial.number)}
        if trial.repeats is not None:
            tags["trial.repeats"] = str(trial.repeats)
        params = {f"search.{name}": value for name, value in trial.member.items()}
        # The store comes with the environment, as Tune writes this down and its address may hold a password.
        tracking = config.tracking.model_copy(update={"uri": None})
        plain = config.model_copy(update={"tracking": tracking}).model_dump(mode="json")
        return {"config": plain, "tags": tags, "params": params, "budgets": self.study.budgets()}

    def progress(self, number: int, epoch: int, top1: float) -> None:
        """An epoch has ended."""
        self.epochs[number] = (epoch, top1)
        if time.monotonic() - self.spoken > SPEAK_S:
            self.spoken = time.monotonic()
            running = [n for n in sorted(self.epochs) if self.trials[n].state == RUNNING]
            total = self.study.recipe.train.epochs
            parts = [f"trial {n} epoch {self.epochs[n][0]}/{total} top-1 {self.epochs[n][1]:.1%}" for n in running]
            self.echo("  " + "; ".join(parts))

    def ended(self, number: int, state: str, reason: str, metrics: Mapping[str, float]) -> None:
        """A trial has ended, however."""
        trial = replace(self.trials[number], state=state, reason=reason, metrics=dict(metrics))
        record = read_record(trial_folder(self.study, number))
        if record:
            trial = replace(trial, mlflow_run_id=record["mlflow_run_id"])
            tags = {"trial.state": state} | ({"trial.reason": reason} if reason else {})
            self.tracker.log_tags(tags, record["mlflow_run_id"])
            if state == FAILED:  # also where its own driver could not say so any more
                self.tracker.end_run(record["mlflow_run_id"], "FAILED")
        self.note(trial)
        took = time.monotonic() - self.started.get(number, time.monotonic())
        self.echo(f"trial {number}: {describe_outcome(trial)}, {took:.0f} s")
        if time.monotonic() - self.drawn > DRAW_S:
            self.draw()

    def note(self, trial: Trial) -> None:
        self.trials[trial.number] = trial
        write_trial(self.study, trial)

    def repeats(self) -> list[Trial]:
        """The front's trials with further seeds, those left out that are there already."""
        trials = self.in_order()
        costs = [self.study.against] if self.study.against else list(COSTS)
        chosen = {trial.number: trial for name in costs for trial in fronts.front(trials, name)}
        done = {(trial.repeats, trial.seed) for trial in trials}
        number, wanted = max(self.trials) + 1, []
        for first in (chosen[n] for n in sorted(chosen)):
            for seed in range(first.seed + 1, first.seed + self.study.repeats):
                if (first.number, seed) not in done:
                    wanted.append(Trial(number, first.member, seed, repeats=first.number))
                    number += 1
        return wanted

    def compare_latencies(self) -> None:
        """Measure the fully trained trials' models again, in turns in one process: trials beside each other disturb."""
        trials = full(self.trials.values())
        if all(trial.timed for trial in trials):
            return
        recipes = [self.space.recipe(self.study.recipe, trial.member) for trial in trials]
        variants = fronts.near_variants(trials, self.study.recipe)
        recipes += [fronts.published_recipe(self.study.recipe, name) for name in variants]
        try:
            plain = [recipe.model_dump(mode="json") for recipe in recipes]
            measured = ray.get(on_worker(latencies, self.study.recipe).remote(plain))
        except ray.exceptions.RayError as error:
            self.echo(f"latencies are those from before training, as they could not be compared: {error}")
            return
        self.published = dict(zip(variants, measured[len(trials) :], strict=True))
        write_json(storage.join(self.study.folder, PUBLISHED_FILE), self.published)
        self.tracker.log({f"{fronts.PUBLISHED}{name}": ms for name, ms in self.published.items()}, step=len(trials))
        for trial, latency in zip(trials, measured, strict=False):
            values = {COSTS["latency"]: latency}
            self.note(replace(trial, metrics=trial.metrics | values, timed=True))
            if trial.mlflow_run_id:
                self.tracker.log_of(trial.mlflow_run_id, values, step=self.study.recipe.train.epochs)

    def draw(self) -> None:
        """The study's pictures and tables as they are now, into MLflow."""
        self.drawn = time.monotonic()
        trials, against = self.in_order(), self.study.against or "gmacs"
        studies = {self.study.name: trials}
        for path, content in fronts.artifacts(studies, self.study.recipe, against, self.published).items():
            self.tracker.log_file(path, content)
        for number in {t.number for name in COSTS for t in fronts.front(trials, name)}:
            run = trial_folder(self.study, number)
            if (record := read_record(run)) is not None:
                text = fronts.recipe_of(Config.model_validate(record["config"]), self.study, number)
                self.tracker.log_file(f"recipes/trial-{number:03d}.yaml", text.encode())
        volumes = fronts.hypervolumes(trials, against)
        if volumes:
            self.tracker.log({"study/hypervolume": volumes[-1], "study/finished": len(volumes)}, step=len(volumes))
        if winner := best(trials):
            self.tracker.log({"study/best_top1": winner.metrics[TOP1]}, step=len(volumes))

    def register(self) -> None:
        """The best trial's model, as the registry's model of this study's name, with the alias ``best``."""
        winner = best(self.in_order())
        if winner is None or not self.study.recipe.tracking.log_model:
            return
        config = self.study.trial_recipe(self.space, winner.member, winner.number, winner.seed)
        try:
            self.tracker.log_model(last_model(run_folder(config)), example_input(config))
            tags = {"trial": str(winner.number), "trial.run": winner.mlflow_run_id or "", "rule": RULE}
            version = register_model(self.tracker.uri, self.tracker.run_id, self.study.name, tags)
            self.echo(f"model {self.study.name} version {version} (trial {winner.number}) has the alias best")
        except Exception as error:  # of the export, the network or the registry; the study itself is done
            self.echo(f"the best model is not in the registry ({type(error).__name__}: {error})")


def run_tuner(controller: StudyController, failures: list[BaseException]) -> None:
    """Ray Tune over what the controller hands out; what it raises goes into the list."""
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial's end is told in a line
    scaling, epochs = controller.study.recipe.scaling, controller.study.recipe.train.epochs
    own = tempfile.mkdtemp(prefix="ray-tune-")  # for Tune's notes, which nothing reads
    # Ray would put its credentials for S3 into the actors' runtime environment, and that into its logs and listings.
    class_cache.ENV_VARS_TO_PROPAGATE -= CREDENTIALS
    env = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_") or name in CREDENTIALS}
    env["MLFLOW_TRACKING_URI"] = tracking_uri(controller.study.recipe)
    trainable = ray.tune.with_parameters(TrialRun, env=env)
    here = {f"node:{ray.util.get_node_ip_address()}": 0.001}  # where its journal is; it takes no CPU to speak of
    adapter = SearcherAdapter(controller)
    try:
        ray.tune.Tuner(
            ray.tune.with_resources(trainable, ray.tune.PlacementGroupFactory([here])),
            tune_config=ray.tune.TuneConfig(
                search_alg=adapter,
                scheduler=halving(epochs) if controller.study.asha and controller.repeating is None else None,
                num_samples=-1,
                max_concurrent_trials=controller.concurrent,
                reuse_actors=True,
                trial_name_creator=lambda trial: trial.trial_id,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=ray.tune.RunConfig(
                name=controller.study.name,
                storage_path=own,
                stop=Stopper(controller),
                failure_config=ray.tune.FailureConfig(max_failures=scaling.max_failures),
                checkpoint_config=ray.tune.CheckpointConfig(checkpoint_at_end=False),  # the run has its own
                callbacks=[Failures(controller, adapter.numbers)],
                verbose=0,
            ),
        ).fit()
    except BaseException as error:  # of a thread, none would be seen
        failures.append(error)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def halving(epochs: int) -> ASHAScheduler:
    """Rungs at a ninth and a third of the epochs; at each, the better third goes on."""
    return ASHAScheduler(
        time_attr="epoch", metric="top1", mode="max", max_t=epochs, grace_period=max(1, epochs // 9), reduction_factor=3
    )


class Stopper(ray.tune.Stopper):
    """Ends all trials when the user wants to stop; they save their state."""

    def __init__(self, controller: StudyController):
        self.controller = controller

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.controller.stopping.is_set()

    def __getstate__(self) -> dict[str, Any]:  # Tune writes itself down, to go on from; this study does not
        return {}


class SearcherAdapter(Searcher):
    """Tune's side of the controller: what it asks of a searcher."""

    def __init__(self, controller: StudyController):
        super().__init__()
        self.controller = controller
        self.numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        trial = self.controller.next()
        if trial is None:  # for good, unless one that runs may turn out to be over the budget
            return None if self.controller.may_need_more() else Searcher.FINISHED
        self.numbers[trial_id] = trial.number
        return {"job": json.dumps(self.controller.job(trial))}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self.controller.progress(self.numbers[trial_id], result["epoch"], result["top1"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if error or not result:  # see Failures
            return
        event = json.loads(result["event"])
        if event["state"] != RUNNING:
            self.controller.ended(self.numbers[trial_id], event["state"], event["reason"], event["metrics"])
        elif not self.controller.stopping.is_set():
            self.controller.ended(self.numbers[trial_id], STOPPED, f"after epoch {result['epoch']}", event["metrics"])

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study's records are enough."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""

    def __getstate__(self) -> dict[str, Any]:  # as above
        return {}


class Failures(ray.tune.Callback):
    """Trials whose own process was lost more often than it is started again."""

    def __init__(self, controller: StudyController, numbers: Mapping[str, int]):
        self.controller, self.numbers = controller, numbers

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        lines = Path(trial.error_file).read_text().split("\n") if trial.error_file else []
        reason = next((line for line in reversed(lines) if line.strip()), "no reason is known")
        self.controller.ended(self.numbers[trial.trial_id], FAILED, f"its process was lost: {reason.strip()}", {})

    def __getstate__(self) -> dict[str, Any]:  # as above
        return {}


# --- words -------------------------------------------------------------------------------------------------------


def describe_outcome(trial: Trial) -> str:
    """How a trial ended, in words."""
    if TOP1 not in trial.metrics or trial.state == FAILED:
        return f"{trial.state}: {trial.reason}"
    shown = [f"top-1 {trial.metrics[TOP1]:.1%}"]
    shown += [f"{trial.metrics[COSTS[name]]:.4g} {unit}" for name, unit in (("latency", "ms"), ("gmacs", "GMACs"))]
    where = f" {trial.reason}" if trial.state == STOPPED else ""
    return f"{trial.state}{where}, {', '.join(shown)}"
