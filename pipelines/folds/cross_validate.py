"""The driver of a study of folds: a training run for each fold and seed, scheduled by Ray Tune as those of a search.

The study's records are in ``pipelines.studies.study``, its trials run as in ``pipelines.tuning``, and its results are
in ``pooled``. Nothing of the held-out videos chooses anything: a run trains all epochs, and the weights of the last
epoch are tested once.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from pipelines.cluster.capacity import choose_device, concurrent_trials, wait_for_room
from pipelines.cluster.session import start_ray
from pipelines.cluster.signals import hold_signals, raise_held
from pipelines.folds.pooled import PooledResults, pool
from pipelines.registry.datasets import TRAINING, describe_list
from pipelines.runs.errors import RunError
from pipelines.runs.lease import Lease, leased
from pipelines.runs.record import check_writable, write_files
from pipelines.studies.report import describe_member
from pipelines.studies.study import (
    STUDY_FILE,
    FoldStudy,
    StudyError,
    Trial,
    TrialState,
    check_unchanged,
    read_study,
    read_trials,
    write_study,
)
from pipelines.tracking.journal import open_journal
from pipelines.tracking.mlflow_client import source_tags
from pipelines.tracking.tracker import Tracker
from pipelines.tracking.uris import NOTE, links_text, recipe_without_password
from pipelines.training.preflight import check_data, find_weights, list_fingerprint, with_absolute_paths
from pipelines.training.progress import describe_overrides
from pipelines.tuning.controller import TrialController
from pipelines.tuning.ray_tune import run_trials
from posmlp.config import Config
from posmlp.metrics import FOLDS_FINISHED
from posmlp.text import quantity
from posmlp.video.classes import in_order
from posmlp.video.manifest import LISTED, Manifest, read_training_videos

DATASET = "dataset"  # column of the lists; figures are also given for each of its values
SHOWN = 10  # values, videos or folds in a message

logger = logging.getLogger(__name__)


@dataclass
class FoldsResult:
    """The result of a study of folds.

    Attributes:
        mlflow_run_id: id of the study's own MLflow run.
        results: the pooled results.
        undelivered: number of operations that MLflow has not received yet (``posmlp sync`` delivers them).
        links: into MLflow's pages, by what they show.
    """

    study: FoldStudy
    mlflow_run_id: str
    results: PooledResults
    undelivered: int = 0
    links: dict[str, str] = field(default_factory=dict)


def cross_validate(study: FoldStudy, *, resume: bool = False) -> FoldsResult:
    """Run a study of folds to its end, from the start or from where it stopped.

    On resume, finished trials are kept, unfinished ones continue from their checkpoints, and so do failed ones.

    Args:
        study: the settings; on resume only ``seeds`` and ``concurrent`` may differ from the first call's.
        resume: resume the study of this name.

    Raises:
        StudyError: the study cannot start (the message says what to change), Ray Tune has failed, or another process
            has taken the study over.
        RunInUse: another process drives the study, on a remote storage.
        UserError: the recipe's data or storage cannot be used.
        StoppedError: a signal (SIGINT or SIGTERM) stopped the study; a call with ``resume`` continues it.
    """
    # Validate. Nothing is started or written before all checks have passed.
    study.check_recipe()
    found, trials = read_study(study.folder, FoldStudy), read_trials(study.folder)
    if found and not resume:
        raise StudyError(
            f"the study {study.folder} exists already: resume it with {study.resume_command}, or choose another --name"
        )
    if resume and not found:
        raise StudyError(f"no study {study.folder}; start one with posmlp folds RECIPE --by COLUMN")
    videos = read_training_videos(study.recipe.data, {study.by: "--by", DATASET: ""})
    fold_of = videos.rows[f"{LISTED}{study.by}"].to_pylist()
    study = with_folds(study, videos, fold_of)
    recipe = check_folds(study, videos, fold_of)
    if not trials:
        find_weights(recipe)
    check_writable(study.folder)

    start_ray()
    recipe = choose_device(recipe)
    study = study.model_copy(update={"recipe": recipe})
    wait_for_room(recipe.scaling)
    concurrent = concurrent_trials(recipe, study.concurrent)
    with leased(study.folder) as lease:
        if lease:
            check_unchanged(study, found, trials)
        with hold_signals() as held:  # it makes MLflow's tables and run
            tracker = open_tracker(study, found[1] if found else None, lease)
        logger.info("MLflow: %s", tracker.place)
        logger.info("%s", links_text(tracker.uri, tracker.links()))
        with tracker.ending(study.folder, lease) as end:
            safe = study.model_copy(update={"recipe": recipe_without_password(recipe)})
            write_study(safe, tracker.run_id)
            tracker.log_file(STUDY_FILE, safe.model_dump_json(indent=1).encode())
            tracker.log_inputs([describe_list(recipe.data.train.path, videos, list_fingerprint(videos), TRAINING)])
            raise_held(held)
            controller = FoldController(study, trials, tracker, concurrent)
            controller.log_start()
            run_trials(controller, lease)
            ids, datasets = (videos.rows[name].to_pylist() for name in ("sample_id", f"{LISTED}{DATASET}"))
            results = pool(study, controller.in_order(), dict(zip(ids, datasets, strict=True)))
            publish(results, tracker)
        return FoldsResult(study, tracker.run_id, results, end.undelivered, tracker.links())


def with_folds(study: FoldStudy, videos: Manifest, fold_of: Sequence[str]) -> FoldStudy:
    """A study with its folds, which are those of its first start.

    Args:
        videos: all training videos.
        fold_of: the fold of each.

    Raises:
        StudyError: there are no two folds, a video has none, or the videos differ from those of the first start.
    """
    path = study.recipe.data.train.path
    if nameless := [id for id, fold in zip(videos.rows["sample_id"].to_pylist(), fold_of, strict=True) if not fold]:
        names = ", ".join(nameless[:SHOWN]) + (", ..." if len(nameless) > SHOWN else "")
        advice = "fill it in, or leave these videos out (data.train.where)"
        if study.by == "folder":
            advice = "move them into one, or group by a column"
        has = "has" if len(nameless) == 1 else "have"
        raise StudyError(
            f"--by {study.by}: {quantity(len(nameless), 'video')} of {path} {has} no {study.by} ({names}); {advice}"
        )
    values = tuple(in_order(set(fold_of)))
    if len(values) < 2:
        raise StudyError(
            f"--by {study.by}: all videos of {path} have the {study.by} {values[0]!r}; folds need at least two values, "
            "so give another column"
        )
    folds = hashlib.sha256(json.dumps(list(fold_of)).encode()).hexdigest()[:16]
    fingerprint = f"{list_fingerprint(videos)}, folds {folds}"
    if study.videos and study.videos != fingerprint:
        new, gone = (sorted(set(a) - set(b)) for a, b in ((values, study.values), (study.values, values)))
        changes = [f"{what}: {', '.join(names[:SHOWN])}" for what, names in (("new", new), ("gone", gone)) if names]
        raise StudyError(
            f"the videos of {path}, their labels or their {study.by} have changed since {study.name} was started "
            f"({'; '.join(changes) or 'the folds have the same names'}); restore the list, or start a study of "
            "another --name"
        )
    return study.model_copy(update={"values": values, "videos": fingerprint})


def check_folds(study: FoldStudy, videos: Manifest, fold_of: Sequence[str]) -> Config:
    """Check that every fold leaves enough to train on. Logs which folds leave no video of a class.

    Returns:
        The recipe with the number of classes, and with absolute paths.

    Raises:
        StudyError: a fold does not; the message names it.
    """
    recipe, labels, missing = study.recipe, videos.rows["label"].to_pylist(), dict[str, list[str]]()
    for fold in study.values:
        held_out = [each == fold for each in fold_of]
        sides = [videos.rows.filter(pa.array([side == each for each in held_out])) for side in (False, True)]
        train_set, val_set = (replace(videos, rows=rows) for rows in sides)
        try:
            recipe = check_data(study.recipe, train_set, val_set)
        except RunError as error:
            raise StudyError(f"fold {fold} ({study.by}): {error}") from error
        learned = {label for label, out in zip(labels, held_out, strict=True) if not out}
        if lost := [name for label, name in enumerate(videos.classes) if label in set(labels) - learned]:
            missing[fold] = lost
    for fold, names in list(missing.items())[:SHOWN]:
        logger.warning("fold %s has all videos of %s: its model cannot know that class", fold, ", ".join(names))
    return with_absolute_paths(recipe)


class FoldController(TrialController):
    """Schedules the folds, and records their results."""

    def __init__(self, study: FoldStudy, trials: Sequence[Trial], tracker: Tracker, concurrent: int):
        super().__init__(study, trials, tracker, concurrent)
        self.study = study
        again = [trial for trial in trials if trial.state != TrialState.FINISHED]  # also those that have failed
        self.pending = [replace(trial, state=TrialState.RUNNING, reason="") for trial in again]
        order = study.recipe.data.frame_order
        self.predicted = (order, "shuffled") if study.shuffled else (order,)

    def log_start(self) -> None:
        """Log what the study does, and what is there already."""
        study, data = self.study, self.study.recipe.data
        logger.info("%s: %s; %d at a time; %s", study.name, study.describe(), self.concurrent, study.folder)
        if data.val.path and not data.val.share:
            logger.info("data.val (%s) is not used: each fold is tested on the videos that it holds out", data.val.path)
        if self.trials:
            finished = sum(trial.state == TrialState.FINISHED for trial in self.trials.values())
            logger.info("resuming; trials finished: %d, trials to resume: %d", finished, len(self.pending))
        if not data.cache_dir:
            logger.info("every trial decodes all videos; with data.cache_dir=FOLDER each is decoded only once")

    def peek_trial(self) -> Trial | None:
        if self.pending:
            return self.pending[0]
        return next((trial for trial in self.study.all_trials() if trial.number not in self.trials), None)

    def trial_recipe(self, trial: Trial) -> Config:
        return self.study.fold_recipe(str(trial.member["fold"]), trial.number, trial.seed)

    def label(self, trial: Trial) -> str:
        return f"trial {trial.number} ({describe_member(trial.member)})"

    def trial_tags(self, trial: Trial) -> dict[str, str]:
        return {"folds": self.study.name}  # the tag of a search is another, so that `posmlp front` leaves folds out

    def trial_ended(self) -> None:
        finished = sum(trial.state == TrialState.FINISHED for trial in self.trials.values())
        self.tracker.log_metrics({FOLDS_FINISHED: finished}, finished)


def open_tracker(study: FoldStudy, run_id: str | None, lease: Lease | None) -> Tracker:
    """Start the study's MLflow run, or resume the run ``run_id``."""
    config = study.recipe.model_copy(update={"name": study.name}).resolved()
    tags = source_tags() | {"folds": study.name, "overrides": describe_overrides(config), NOTE: study.describe()}
    params = {f"folds.{key}": getattr(study, key) for key in ("by", "seeds", "shuffled")}
    return Tracker.open(config, tags, run_id, journal=open_journal(study.folder, lease), params=params)


def publish(results: PooledResults, tracker: Tracker) -> None:
    """Write the results to the study's folder and its MLflow run."""
    files, metrics = results.files(), results.metrics()
    write_files(results.study.folder, files)
    for name, content in files.items():
        tracker.log_file(name, content)
    tracker.log_metrics(metrics, int(metrics[FOLDS_FINISHED]))
    tracker.log_tags({NOTE: results.markdown()})
