"""The controller of a study: schedules trials and records their results. Nothing here runs on Ray."""

from __future__ import annotations

import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipelines.runs import checkpoints
from pipelines.runs.record import read_json, read_record, write_json
from pipelines.studies import racing, report
from pipelines.studies.costs import published_variant_costs
from pipelines.studies.prior import Prior
from pipelines.studies.study import (
    Study,
    StudyError,
    StudySettings,
    Trial,
    TrialState,
    trial_folder,
    write_trial,
)
from pipelines.tracking.mlflow_client import command_name
from pipelines.tracking.tracker import Tracker
from pipelines.tracking.uris import PARENT, RUN_NAME, SEARCH_PARAM
from pipelines.tuning.mo_asha import SuccessiveHalving
from pipelines.tuning.results import ResultsPublisher
from pipelines.tuning.search import Searcher
from pipelines.tuning.trial import TrialEvent, TrialJob
from posmlp import storage
from posmlp.config import Config, FrameOrder
from posmlp.metrics import COST, COST_GMACS, COST_LATENCY_MS, COSTS, EPOCH, main_metric
from tune_spaces import Space

VARIANT_LATENCIES_FILE = "published.json"  # in a study's folder: latency of published variants in ms, by name
SEARCH_SHARE = 2 / 3  # of the hours, if repeats follow
PROGRESS_INTERVAL_S = 30.0  # between two progress lines

logger = logging.getLogger(__name__)


class TrialController(ABC):
    """Schedules the trials of a study and records their results. What is next depends on the kind of study.

    Attributes:
        trials: all trials, by number.
        pending: those that were recorded before and are resumed first.
        stopping: set when the user has asked to stop.
        halving: the rungs at which trials are stopped early, with what earlier trials reached; None: none is.
        saving: numbers of trials that were stopped early and whose runs still save their state.
        live: numbers of trials that have a process; one that runs without it waits for its resources.
        predicted: as of ``TrialContext``, for every trial.
    """

    predicted: tuple[FrameOrder, ...] = ()

    def __init__(self, study: StudySettings, trials: Sequence[Trial], tracker: Tracker, concurrent: int):
        """
        Args:
            trials: those that were recorded before; those that were running are resumed first.
            concurrent: number of trials that run at a time.
        """
        self.settings, self.tracker, self.concurrent = study, tracker, concurrent
        self.trials = {trial.number: trial for trial in trials}
        self.pending = [trial for trial in trials if trial.state == TrialState.RUNNING]
        self.stopping = threading.Event()
        self.halving: SuccessiveHalving | None = None
        self.saving: set[int] = set()
        self.live: set[int] = set()
        self.started: dict[int, float] = {}
        self.last_progress = time.monotonic()

    def in_order(self) -> list[Trial]:
        """All trials, ordered by number."""
        return [self.trials[number] for number in sorted(self.trials)]

    # --- what depends on the kind of study ----------------------------------------------------------------------------

    @abstractmethod
    def peek_trial(self) -> Trial | None:
        """The trial that ``next_trial`` returns next unless the study is stopping; does not record it."""

    @abstractmethod
    def trial_recipe(self, trial: Trial) -> Config:
        """The recipe of a trial's run."""

    @abstractmethod
    def trial_ended(self) -> None:
        """Show the results, after a trial has ended."""

    def may_have_more(self) -> bool:
        """Return whether ``next_trial`` may return another trial later."""
        return False

    def label(self, trial: Trial) -> str:
        """What a trial is called when it has ended."""
        return f"trial {trial.number}"

    def describe_start(self, trial: Trial) -> str:
        """What is said of a trial that starts or resumes, after its number."""
        return ""

    def trial_tags(self, trial: Trial) -> dict[str, str]:
        """Tags of a trial's MLflow run besides those of every trial."""
        return {"study": self.settings.name}

    # --- scheduling ----------------------------------------------------------------------------------------------

    def next_trial(self) -> Trial | None:
        """Record and return the next trial to start; None if there is none."""
        trial = None if self.stopping.is_set() else self.peek_trial()
        if trial is None:
            return None
        if self.pending:
            self.pending.pop(0)
        what = self.describe_start(trial)
        known = self.trials.get(trial.number)
        if known and known.state != trial.state and known.mlflow_run_id:
            tags = {"trial.state": str(trial.state), "trial.reason": trial.reason}
            self.tracker.log_tags(tags, known.mlflow_run_id)
        self.save_trial(trial)
        self.started[trial.number] = time.monotonic()
        logger.info("trial %d%s: %s", trial.number, what, report.describe_member(trial.member))
        return trial

    def trial_job(self, trial: Trial) -> TrialJob:
        """What a ``TrialRun`` needs to run a trial."""
        config = self.trial_recipe(trial)
        tags = {PARENT: self.tracker.run_id, "trial": str(trial.number), **self.trial_tags(trial)}
        tags |= {RUN_NAME: report.trial_name(trial), "mlflow.source.name": command_name()}
        params = {f"{SEARCH_PARAM}{name}": value for name, value in trial.member.items()}
        # The store's address may hold a password, and Tune writes the job to disk: the environment carries it instead.
        tracking = config.tracking.model_copy(update={"uri": None})
        config = config.model_copy(update={"tracking": tracking})
        # A budget is for members; a repeat of one that was within it is trained whatever its own measurement says.
        budgets = self.settings.budgets() if trial.repeat_of is None else {}
        costs = {key: value for key, value in trial.search_metrics.items() if key.startswith(COST)}
        return TrialJob(config, tags, params, budgets, self.predicted, costs)

    # --- results -------------------------------------------------------------------------------------------------

    def record_epoch(self, number: int, metrics: Mapping[str, float]) -> None:
        """Record that a trial has validated an epoch; now and then, log how far all running trials are.

        The record is written when the trial reaches a rung: that is what a resumed study needs to know.

        Args:
            metrics: of the epoch, and the trial's costs.
        """
        known = self.trials[number]
        trial = replace(known, metrics={**known.metrics, **metrics}, curve=extend_curve(known.curve, metrics))
        self.trials[number] = trial
        if self.halving and trial.repeat_of is None:
            before, now = (self.halving.rung_at(max(curve, default=0)) for curve in (known.curve, trial.curve))
            if now not in (None, before):
                self.save_trial(trial)
        if time.monotonic() - self.last_progress > PROGRESS_INTERVAL_S:
            self.last_progress = time.monotonic()
            total, title = self.settings.recipe.train.epochs, self.settings.main.title
            last = {t.number: max(t.curve) for t in self.in_order() if t.state == TrialState.RUNNING and t.curve}
            parts = [f"trial {n} epoch {e}/{total} {title} {self.trials[n].curve[e]:.1%}" for n, e in last.items()]
            logger.info("  %s", "; ".join(parts))

    def record_result(self, number: int, result: TrialEvent) -> None:
        """Record how a trial has ended, on disk and in MLflow."""
        state, reason = result.state, result.reason
        known = self.trials[number]
        metrics, curve = {**known.metrics, **result.metrics}, extend_curve(known.curve, result.metrics)
        trial = replace(known, state=state, reason=reason, metrics=metrics, curve=curve)
        record = read_record(trial_folder(self.settings, number))
        if record:
            trial = replace(trial, mlflow_run_id=record["mlflow_run_id"])
            tags = {"trial.state": str(state)} | ({"trial.reason": reason} if reason else {})
            self.tracker.log_tags(tags, record["mlflow_run_id"])
            if state == TrialState.FAILED:  # the trial's own driver may have died before it could end its run
                self.tracker.end_run(record["mlflow_run_id"], "FAILED")
        self.save_trial(trial)
        seconds = time.monotonic() - self.started.get(number, time.monotonic())
        logger.info("%s: %s, %.0f s", self.label(trial), describe_outcome(trial), seconds)
        self.trial_ended()

    def save_trial(self, trial: Trial) -> None:
        """Record a trial, in memory and on disk."""
        self.trials[trial.number] = trial
        write_trial(self.settings, trial)


class StudyController(TrialController):
    """Schedules the trials of a search and records their results.

    Attributes:
        variants: costs of the published variants by name and metric; figures mark those near the trials.
        searching: false once the search is over and the Pareto front is repeated with other seeds.
        prior: earlier studies from which the searcher learns.
        searcher: proposes the members.
        results: draws and logs the study's results.
    """

    def __init__(
        self,
        study: Study,
        space: Space,
        trials: Sequence[Trial],
        tracker: Tracker,
        concurrent: int,
        prior: Sequence[Prior] = (),
    ):
        """
        Args:
            trials: those that were recorded before; those that were running are resumed first.
            concurrent: number of trials that run at a time.
            prior: earlier studies from which the searcher learns.
        """
        super().__init__(study, trials, tracker, concurrent)
        self.study, self.space = study, space
        latencies = read_json(storage.join(study.folder, VARIANT_LATENCIES_FILE)) or {}
        self.variants = published_variant_costs(study.recipe, latencies)
        self.searching = True
        self.settled: tuple[int, int] | None = None  # numbers of all and of running trials when no repeat was needed
        self.prior, self.searcher = prior, Searcher(study, space, prior)
        self.began = time.monotonic()
        self.late: set[bool] = set()  # values of ``searching`` for which the end of the time is logged
        self.own_epochs: dict[int, int] = {}  # of trials, by number
        self.halving: SuccessiveHalving | None = None
        if study.asha:
            self.halving = successive_halving(study, [trial for trial in trials if self.has_rungs(trial)])
        self.without_checkpoint: set[int] = set()  # stopped trials that cannot be promoted
        self.results = ResultsPublisher(study, tracker)

    def log_start(self) -> None:
        """Log what the study does, and what is there already."""
        study = self.study
        settings = f"space {study.space}, {study.trials} trials, {study.searcher}, {study.goal}"
        logger.info("%s: %s; %d at a time; %s", study.name, settings, self.concurrent, study.folder)
        if self.trials:
            finished = sum(trial.state == TrialState.FINISHED for trial in self.trials.values())
            logger.info("resuming; trials finished: %d, trials to resume: %d", finished, len(self.pending))
        if self.halving:
            epochs, every, warmup = study.recipe.train.epochs, study.recipe.eval.every, study.recipe.optim.warmup_epochs
            if stops := stop_epochs(self.halving, epochs, every):
                text = "trials may be stopped after %s; --no-asha trains all of them to the end"
                logger.info(text, " and ".join(f"epoch {epoch}" for epoch in stops))
            elif epochs > 1:
                text = (
                    "no trial is stopped early: of %d epochs none in the first half is validated after the warm-up "
                    "(eval.every=%d, optim.warmup_epochs=%g)"
                )
                logger.warning(text, epochs, every, warmup)
        self.log_priors()
        if not study.recipe.data.cache_dir:
            logger.info("every trial decodes all videos; with data.cache_dir=FOLDER each is decoded only once")

    def log_priors(self) -> None:
        """Log what the searcher learns from earlier studies."""
        for prior in self.prior:
            if self.searcher.learns:
                told, trained = len(self.searcher.prior[prior.name]), len(prior.trials)
                logger.info(
                    "--prior %s: the searcher learns from %d of %d fully trained trials", prior.name, told, trained
                )
            else:
                text = "--prior %s is not used: searcher %s does not learn from trials"
                logger.warning(text, prior.name, self.study.searcher)

    # --- scheduling ----------------------------------------------------------------------------------------------

    def peek_trial(self) -> Trial | None:
        if self.pending:
            return self.pending[0]
        if self.time_is_up():
            return None
        if promoted := self.promotable_trial():
            return promoted
        if not self.searching:
            return self.next_repeat()
        return self.searcher.propose(self.in_order()) if self.count_trials() < self.study.trials else None

    def count_trials(self) -> int:
        """Number of trials that count: repeats and those over a budget do not."""
        return sum(t.repeat_of is None and t.state != TrialState.OVER_BUDGET for t in self.trials.values())

    def time_is_up(self) -> bool:
        """Return whether ``hours`` are over, so that no more trials start. If repeats follow, the search has a part."""
        hours, share = self.study.hours, SEARCH_SHARE if self.searching and self.study.repeats else 1.0
        if hours is None or time.monotonic() - self.began < hours * share * 3600:
            return False
        if self.searching not in self.late:
            self.late.add(self.searching)
            what = "the search's two thirds of " * (share < 1)
            logger.info("%s%g hours are over: no more trials start, those that run are finished", what, hours)
        return True

    def check_search(self) -> None:
        """Say why the search has ended before its number of trials.

        Raises:
            StudyError: no member is within the budgets.
        """
        if self.searcher.found_none:
            raise StudyError(self.searcher.why_none)
        if self.searcher.why_none and self.count_trials() < self.study.trials:
            logger.warning("%s", self.searcher.why_none)

    def promotable_trial(self) -> Trial | None:
        """The best trial that was stopped early and may continue by now, as a running trial; None if there is none.

        Without early stopping, as after ``--resume STUDY --no-asha``, all of them may. It needs a checkpoint, because
        it is not trained again from the start.
        """
        if not self.searching:
            return None
        unavailable = self.saving | self.without_checkpoint
        stopped = {n for n, trial in self.trials.items() if trial.state == TrialState.STOPPED} - unavailable
        for number in self.halving.promotable(stopped) if self.halving else sorted(stopped):
            if any(entry.info for entry in checkpoints.find(trial_folder(self.study, number))):
                return replace(self.trials[number], state=TrialState.RUNNING, reason="")
            self.without_checkpoint.add(number)
        return None

    def has_rungs(self, trial: Trial) -> bool:
        """Return whether a trial is compared with others at the rungs.

        Repeats are not, nor trials whose member has epochs of its own: their learning rates fall at another time.
        """
        if trial.repeat_of is not None:
            return False
        if trial.number not in self.own_epochs:
            self.own_epochs[trial.number] = self.trial_recipe(trial).train.epochs
        return self.own_epochs[trial.number] == self.study.recipe.train.epochs

    def may_have_more(self) -> bool:
        """As of ``TrialController``.

        It may once a running trial turns out to be over a budget, or has reached a rung, where it may help a stopped
        one to be promoted.
        """
        if self.stopping.is_set() or self.time_is_up():
            return False
        running = [trial for trial in self.trials.values() if trial.state == TrialState.RUNNING]
        if not self.searching and running:  # its value may open the place of another member
            return True
        return bool(running and self.study.budget_ms is not None) or self.may_promote(running)

    def may_promote(self, running: Sequence[Trial]) -> bool:
        """Return whether these running trials, or the end of one that saves its state, may let one be promoted."""
        if self.halving is None or not self.searching:
            return False
        last = max(self.halving.rungs, default=None)
        climbing = [t for t in running if t.repeat_of is None and self.halving.rung_of(t.number) != last]
        return bool(climbing or self.saving)

    def start_repeats(self) -> None:
        """End the search. From now on members get fresh seeds, as ``racing.next_repeat`` chooses them."""
        self.searching = False

    def next_repeat(self) -> Trial | None:
        """The next trial with a fresh seed; None if no member needs one, as far as the finished trials show."""
        running = sum(trial.state == TrialState.RUNNING for trial in self.trials.values())
        if self.settled == (len(self.trials), running):  # Tune asks often
            return None
        costs = [self.study.against] if self.study.against else list(COSTS)
        chosen = racing.next_repeat(self.in_order(), costs, self.study.repeats)
        if chosen is None:
            self.settled = (len(self.trials), running)
            return None
        first, number = chosen.first, max(self.trials) + 1
        return Trial(number, first.member, chosen.seed, repeat_of=first.number, reason=chosen.reason)

    def trial_recipe(self, trial: Trial) -> Config:
        return self.study.trial_recipe(self.space, trial.member, trial.number, trial.seed)

    def describe_start(self, trial: Trial) -> str:
        known = self.trials.get(trial.number)
        if known and known.state == TrialState.STOPPED:
            return f" is promoted, it was stopped {known.reason}"
        if trial.repeat_of is None:
            return ""
        why = f"{trial.reason}; " if trial.reason else ""
        return f" (trial {trial.repeat_of}: {why}seed {trial.seed})"

    def trial_tags(self, trial: Trial) -> dict[str, str]:
        repeats = {} if trial.repeat_of is None else {"trial.repeats": str(trial.repeat_of)}
        return super().trial_tags(trial) | repeats

    # --- results -------------------------------------------------------------------------------------------------

    def trial_ended(self) -> None:
        self.results.update(self.in_order(), self.variants)

    def save_variant_latencies(self, latencies: Mapping[str, float]) -> None:
        """Record the latency in ms of published variants, by name, in memory and on disk."""
        self.variants = published_variant_costs(self.study.recipe, latencies)
        write_json(storage.join(self.study.folder, VARIANT_LATENCIES_FILE), dict(latencies))

    def record_latency(self, trial: Trial, latency: float) -> None:
        """Record the latency in ms of a trial's model that was measured after the search, on disk and in MLflow."""
        first = trial.first_latency_ms if trial.timed else trial.metrics.get(COST_LATENCY_MS)
        measured = {COST_LATENCY_MS: latency}
        self.save_trial(replace(trial, metrics=trial.metrics | measured, timed=True, first_latency_ms=first))
        if trial.mlflow_run_id:
            self.tracker.log_metrics(measured, self.study.recipe.train.epochs, trial.mlflow_run_id)


def successive_halving(study: Study, trials: Sequence[Trial]) -> SuccessiveHalving:
    """The rungs of a study that stops trials early, with what these trials have reached."""
    goals, recipe = modes(study), study.recipe
    halving = SuccessiveHalving([*goals.values()], recipe.train.epochs, warmup=recipe.optim.warmup_epochs)
    for trial in trials:
        for epoch, value in sorted(trial.curve.items()):
            metrics = trial.search_metrics | {study.main.key: value}
            halving.add(trial.number, epoch, [metrics.get(name, math.nan) for name in goals])
    return halving


def stop_epochs(halving: SuccessiveHalving, epochs: int, every: int) -> list[int]:
    """The epochs after which a trial may be stopped: for each rung the first validated epoch that counts for it.

    Args:
        every: a trial is validated after each of these epochs.
    """
    rungs: dict[int, int] = {}  # first epoch by rung
    for epoch in range(every, epochs, every):
        if (rung := halving.rung_at(epoch)) is not None:
            rungs.setdefault(rung, epoch)
    return list(rungs.values())


def modes(study: Study) -> dict[str, str]:
    """The metrics that decide whether a trial is stopped early, each with ``"max"`` or ``"min"``."""
    return {study.main.key: "max"} | ({COSTS[study.against]: "min"} if study.against else {})


def extend_curve(curve: Mapping[int, float], metrics: Mapping[str, float]) -> dict[int, float]:
    """A trial's curve with the metrics of one more epoch; one that is known keeps its value, as at a rung."""
    main = main_metric(metrics)
    if EPOCH not in metrics or main is None:
        return dict(curve)
    return {int(metrics[EPOCH]): metrics[main.key], **curve}


def describe_outcome(trial: Trial) -> str:
    """How a trial ended, in words."""
    main = main_metric(trial.metrics)
    if main is None or trial.state == TrialState.FAILED:
        return f"{trial.state}: {trial.reason}"
    shown = [f"{main.title} {trial.value:.1%}"]
    shown += [f"{trial.metrics[COST_LATENCY_MS]:.4g} ms", f"{trial.metrics[COST_GMACS]:.4g} GMACs"]
    stopped_after = f" {trial.reason}" if trial.state == TrialState.STOPPED else ""
    return f"{trial.state}{stopped_after}, {', '.join(shown)}"
