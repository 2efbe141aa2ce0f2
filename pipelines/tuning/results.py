"""What a running study shows: figures, tables, recipes of the Pareto front, and metrics, in its folder and in MLflow.

Figures of many trials take seconds, and the importance of dimensions takes longer. So a process of its own draws them,
with a low priority, one drawing at a time: the study's driver schedules trials meanwhile. This module imports neither
Ray, MLflow nor PyTorch, so that the process starts fast and stays small.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from socket import socketpair
from types import TracebackType
from typing import TYPE_CHECKING

from pipelines.runs.record import read_record, write_files
from pipelines.studies import pareto, report
from pipelines.studies.study import Study, Trial, TrialState, read_study_hits, standalone_recipe, trial_folder
from pipelines.tracking.uris import NOTE
from posmlp.config import Config
from posmlp.metrics import STUDY_BEST, STUDY_FINISHED, STUDY_HYPERVOLUME
from posmlp.processes import shielded_children

if TYPE_CHECKING:  # it imports Ray
    from pipelines.tracking.tracker import Tracker

INTERVAL_S = 30.0  # shortest time between two drawings
MAX_SHARE = 0.1  # of the time, at most, is spent on drawing
DRAWING_LIMIT_S = 600.0  # a drawing that takes longer is given up
STOP_LIMIT_S = 10.0  # likewise, of a study that an error or a signal ends
NICENESS = 10  # priority of the process; 0 is the driver's, 19 the lowest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """The state of a study at one time.

    Attributes:
        trials: ordered by number.
        variants: costs of published variants, by name and metric; figures mark them.
        final: the study is finished, so its importance of dimensions is shown too.
    """

    trials: Sequence[Trial]
    variants: Mapping[str, Mapping[str, float]]
    final: bool = False


@dataclass(frozen=True)
class Results:
    """A part of what a study shows.

    Attributes:
        files: contents by name, for the study's folder and for MLflow.
        recipes: contents by path, for MLflow alone.
        metrics, tags: of the study's MLflow run.
        step: the metrics' step, the number of finished trials.
        member_metrics: metrics by the id of the MLflow run that gets them, the run of a member's first trial.
    """

    files: Mapping[str, bytes]
    recipes: Mapping[str, bytes] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    step: int = 0
    member_metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class DrawingError(Exception):
    """A drawing has failed. The message is one line."""


class ResultsPublisher:
    """Draws the results of a study now and then, and writes them to its folder and its MLflow run.

    Of several states that wait, the newest is drawn. An error of a drawing is logged, and never ends a study. As a
    context manager it ends the process; if the block ends with an exception, it publishes the newest state before,
    without the importance of dimensions, within ``STOP_LIMIT_S``.

    Attributes:
        waiting: the newest state that no drawing has begun with; None if there is none.
    """

    def __init__(self, study: Study, tracker: Tracker, interval_s: float = INTERVAL_S):
        """
        Args:
            tracker: of the study's MLflow run; its methods are called in a thread of the publisher.
            interval_s: shortest time between two drawings, in seconds.
        """
        self.study, self.tracker, self.interval_s = study, tracker, interval_s
        self.waiting: Snapshot | None = None
        self.changed = threading.Condition()  # guards ``waiting`` and ``closed``
        self.publishing = threading.Lock()  # held during a drawing
        self.closed = False
        self.warned = False
        self.process: DrawingProcess | None = None
        self.thread = threading.Thread(target=self.run, daemon=True, name="study-results")
        self.next_start = time.monotonic() + interval_s  # of a drawing

    def update(self, trials: Sequence[Trial], variants: Mapping[str, Mapping[str, float]]) -> None:
        """Take the study's state, and publish it when it is time. Returns at once."""
        with self.changed:
            self.waiting = Snapshot(tuple(trials), dict(variants))
            self.changed.notify_all()
            if not self.thread.is_alive() and not self.closed:
                self.thread.start()

    def finish(self, trials: Sequence[Trial], variants: Mapping[str, Mapping[str, float]]) -> None:
        """Publish the state of a finished study, with the importance of dimensions, and wait until that is done."""
        self.close_thread()
        self.publish_last(Snapshot(tuple(trials), dict(variants), final=True), DRAWING_LIMIT_S)

    def __enter__(self) -> ResultsPublisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close_thread()
        try:
            if error is not None:
                self.publish_last(self.waiting, STOP_LIMIT_S)
        finally:  # also after a second signal
            if self.process:
                self.process.kill()

    def close_thread(self) -> None:
        """Let no new drawing start in the thread."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def publish_last(self, snapshot: Snapshot | None, limit_s: float) -> None:
        """Wait for the drawing that goes on now, and publish a last state, in at most ``limit_s`` seconds for both."""
        deadline = time.monotonic() + limit_s
        if not self.publishing.acquire(timeout=limit_s):
            self.warn("it takes too long")
            return
        try:
            if snapshot:
                self.waiting, self.warned = None, False
                self.publish(snapshot, deadline)
        finally:
            self.publishing.release()

    def warn(self, reason: object) -> None:
        """Log a failure, unless an earlier one was logged."""
        if not self.warned:
            self.warned = True
            logger.warning("the study's results could not be drawn (%s); the study itself is not affected", reason)

    # --- in the thread -------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Publish the newest state whenever there is one and it is time."""
        while True:
            with self.changed:
                while not self.closed and (self.waiting is None or time.monotonic() < self.next_start):
                    self.changed.wait(None if self.waiting is None else self.next_start - time.monotonic())
                if self.closed or self.waiting is None:
                    return
                snapshot, self.waiting = self.waiting, None
                self.publishing.acquire()
            try:
                start = time.monotonic()
                self.publish(snapshot, start + DRAWING_LIMIT_S)
                end = time.monotonic()
                self.next_start = end + max(self.interval_s, (end - start) * (1 / MAX_SHARE - 1))
            finally:
                self.publishing.release()

    def publish(self, snapshot: Snapshot, deadline: float) -> None:
        """Draw a state, and write each part as soon as it is drawn. A failure is logged once."""
        try:
            if self.process is None or not self.process.alive():
                self.process = DrawingProcess(self.study)
            for results in self.process.draw(snapshot, deadline):
                self.write(results)
        except Exception as error:  # whatever it is, the study continues without new figures
            self.warn(error)
            if self.process:  # it may still send parts of this drawing
                self.process.kill()

    def write(self, results: Results) -> None:
        """Write results to the study's folder and to MLflow."""
        write_files(self.study.folder, results.files)
        for path, content in (dict(results.files) | dict(results.recipes)).items():
            self.tracker.log_file(path, content)
        if results.metrics:
            self.tracker.log_metrics(results.metrics, results.step)
        for run_id, metrics in results.member_metrics.items():
            self.tracker.log_metrics(metrics, self.study.recipe.train.epochs, run_id)
        if results.tags:
            self.tracker.log_tags(results.tags)


class DrawingProcess:
    """A process that draws a study, and a channel to it. It ends with this process, however that ends."""

    def __init__(self, study: Study):
        ours, theirs = socketpair()
        code = f"from pipelines.tuning.results import serve; serve({theirs.fileno()})"
        path = os.pathsep.join(path or os.getcwd() for path in sys.path)
        one_thread = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with shielded_children():  # the driver of the study ends it
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=os.environ | one_thread | {"PYTHONPATH": path},
            )
        theirs.close()
        self.channel = Connection(ours.detach())
        self.channel.send(study)

    def alive(self) -> bool:
        """Return whether the process still runs."""
        return self.process.poll() is None

    def draw(self, snapshot: Snapshot, deadline: float) -> Iterator[Results]:
        """Draw a state of the study, and yield the results part by part.

        Args:
            deadline: time (``time.monotonic``) at which the drawing is given up.

        Raises:
            DrawingError: it takes too long, it fails, or the process is killed.
        """
        try:
            self.channel.send(snapshot)
            while True:
                if not self.channel.poll(max(0.0, deadline - time.monotonic())):
                    self.kill()
                    raise DrawingError("it takes too long")
                answer = self.channel.recv()
                if isinstance(answer, str):
                    raise DrawingError(answer)
                if answer is None:
                    return
                yield answer
        except (EOFError, OSError) as error:
            self.kill()
            raise DrawingError(f"the process that draws has died, exit code {self.process.returncode}") from error

    def kill(self) -> None:
        """Kill the process."""
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that waits for a dead disk cannot be killed
            self.process.wait(5)


# --- in the process ------------------------------------------------------------------------------------------------


def serve(channel_fd: int) -> None:
    """Draw the states that the driver sends, until the driver is gone."""
    os.nice(NICENESS)
    channel = Connection(channel_fd)
    study: Study = channel.recv()
    snapshots: queue.SimpleQueue[Snapshot] = queue.SimpleQueue()
    threading.Thread(target=receive, args=(channel, snapshots), daemon=True).start()
    while True:
        snapshot = snapshots.get()
        try:
            for results in draw_results(study, snapshot):
                channel.send(results)
            channel.send(None)
        except Exception as error:  # of any library that draws; the driver logs it
            channel.send(" ".join(f"{type(error).__name__}: {error}".split()))


def receive(channel: Connection, snapshots: queue.SimpleQueue[Snapshot]) -> None:
    """Receive states from the driver. End this process as soon as the driver is gone, also during a drawing."""
    while True:
        try:
            snapshots.put(channel.recv())
        except (EOFError, OSError):
            os._exit(0)


def draw_results(study: Study, snapshot: Snapshot) -> Iterator[Results]:
    """Draw a state of a study: first tables, recipes, metrics and text, which take no time, and then figures."""
    trials, against = snapshot.trials, study.against or "gmacs"
    recipes = {}
    for trial in pareto.on_any_front(trials):
        if (record := read_record(trial_folder(study, trial.number))) is not None:
            text = standalone_recipe(Config.model_validate(record["config"]), study, trial.number)
            recipes[f"recipes/trial-{trial.number:03d}.yaml"] = text.encode()
    metrics: dict[str, float] = {}
    volumes = pareto.hypervolume_curve(trials, against)
    volume, best = pareto.front_hypervolume(trials, against), f"{STUDY_BEST}{study.main.name}"
    if volume is not None:
        values = pareto.reported_values(trials).values()
        metrics |= {STUDY_HYPERVOLUME: volume, STUDY_FINISHED: len(volumes), best: max(values)}
    hits = read_study_hits(study, trials)
    assessment = pareto.assess(trials, hits)
    table = {"trials.csv": report.to_csv(report.trial_rows(trials, assessment))}
    members: dict[str, dict[str, float]] = {}
    if snapshot.final:
        runs = {trial.number: trial.mlflow_run_id for trial in trials}
        found = report.member_metrics(assessment, study.main, against)
        members = {run_id: values for number, values in found.items() if (run_id := runs[number])}
    yield Results(table, recipes, metrics, {NOTE: study_note(study, trials)}, len(volumes), members)
    files = report.pareto_files(
        {study.name: trials},
        study.recipe,
        against,
        snapshot.variants,
        importance=snapshot.final,
        hits={study.name: hits},
    )
    yield Results(files)


def study_note(study: Study, trials: Sequence[Trial]) -> str:
    """The description of a study's MLflow run in two lines: what it searches, and what it has found."""
    epochs = f"{'up to ' * study.asha}{study.recipe.train.epochs} epochs"
    recipe = f"{study.recipe.model.name}, {epochs} each on {study.recipe.data.train.path}"
    how = f"search of {study.space} for {study.goal} ({study.searcher}), {study.trials} trials of {recipe}"
    states = [trial.state for trial in trials if trial.repeat_of is None]
    text = ", ".join(f"{states.count(state)} {state}" for state in TrialState if state in states) or "no trials yet"
    if best := report.describe_best(trials, study.main):
        text += f"; {best}"
    return f"**{study.name}**: {how}\n\n{text}"
