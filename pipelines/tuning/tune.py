"""The driver of a study: many training runs, chosen by a searcher, scheduled by Ray Tune, logged to MLflow as they end.

The study's records are in ``pipelines.studies.study``, the searchers in ``search``, the scheduling of trials in
``controller``, Ray Tune in ``ray_tune`` and ``trial``, and the Pareto front in ``pareto``.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import ray

from pipelines.cluster.capacity import LongWait, choose_device, concurrent_trials, explain_task_wait, wait_for_room
from pipelines.cluster.session import start_ray
from pipelines.cluster.signals import hold_signals, raise_held
from pipelines.registry.datasets import datasets_of_metrics, describe_splits
from pipelines.registry.logged_models import link_to
from pipelines.registry.model_files import save_model_files
from pipelines.runs import checkpoints
from pipelines.runs.lease import Lease, leased
from pipelines.runs.record import check_writable, run_folder
from pipelines.studies import pareto
from pipelines.studies.costs import published_variant_recipe, variants_to_mark
from pipelines.studies.prior import find_priors, read_priors, write_priors
from pipelines.studies.study import (
    STUDY_FILE,
    Study,
    StudyError,
    Trial,
    check_unchanged,
    fully_trained,
    read_study,
    read_study_hits,
    read_trials,
    study_space,
    write_study,
)
from pipelines.tracking.journal import open_journal
from pipelines.tracking.mlflow_client import register_model, source_tags
from pipelines.tracking.tracker import Tracker
from pipelines.tracking.uris import (
    NOTE,
    links_text,
    recipe_without_password,
    study_view,
    study_view_name,
    view_link,
)
from pipelines.training.preflight import check_data, find_weights, list_fingerprint, read_splits, with_absolute_paths
from pipelines.training.progress import describe_overrides
from pipelines.tuning.controller import StudyController
from pipelines.tuning.ray_tune import run_trials
from pipelines.tuning.results import study_note
from pipelines.tuning.search import Searcher, check_space
from pipelines.tuning.trial import measure_latencies, on_training_worker
from posmlp.metrics import PUBLISHED_LATENCY_MS, MainMetric

# How the best member and the run of its model are chosen, by its main metric, as a tag of the registered model.
FRESH_RULE = "highest mean {} over fresh seeds, ties: fewest GMACs; the model is that of the first fresh seed"
SINGLE_RULE = "highest {} of fully trained trials, one seed each, not repeated; ties: fewest GMACs"

POLL_S = 0.2
LATENCY_LIMIT_S = 3600.0  # for the comparison of latencies, of which the wait for its resources is a part

logger = logging.getLogger(__name__)


@dataclass
class StudyResult:
    """The result of a finished study.

    Attributes:
        mlflow_run_id: id of the study's own MLflow run.
        trials: all trials, ordered by number.
        best: the first trial of the best member (``pareto.best_trial``); None if no trial was finished.
        undelivered: number of operations that MLflow has not received yet (``posmlp sync`` delivers them).
        links: into MLflow's pages, by what they show.
    """

    study: Study
    mlflow_run_id: str
    trials: list[Trial]
    best: Trial | None
    undelivered: int = 0
    links: dict[str, str] = field(default_factory=dict)


def tune(study: Study, *, resume: bool = False) -> StudyResult:
    """Run a study to its end, from the start or from where it stopped.

    On resume, finished trials are kept, unfinished ones continue from their checkpoints, and the searcher is given all
    trials again.

    Args:
        study: the settings; on resume only ``trials``, ``concurrent``, ``repeats`` and ``hours`` may differ from the
            first call's, and ``asha`` may be False: then trials that were stopped early are trained to the end.
        resume: resume the study of this name.

    Raises:
        StudyError: the study cannot start (the message says what to change), Ray Tune has failed, or another process
            has taken the study over.
        RunInUse: another process drives the study, on a remote storage.
        UserError: the recipe's data or storage cannot be used.
        StoppedError: a signal (SIGINT or SIGTERM) stopped the study; a call with ``resume`` continues it.
    """
    # Validate. Nothing is started or written before all checks have passed.
    if study.space.endswith(".py"):
        study = study.model_copy(update={"space": os.path.abspath(study.space)})
    space = study_space(study)
    found, trials = read_study(study.folder, Study), read_trials(study.folder)
    if found and not resume:
        raise StudyError(
            f"the study {study.folder} exists already: resume it with {study.resume_command}, or choose another --name"
        )
    if resume and not found:
        raise StudyError(f"no study {study.folder}; start one with posmlp tune RECIPE --space SPACE")
    check_space(study, space, trials)
    train_set, val_set = read_splits(study.recipe)
    recipe = with_absolute_paths(check_data(study.recipe, train_set, val_set))
    lists = {"train": list_fingerprint(train_set), "val": list_fingerprint(val_set)}
    datasets = describe_splits(recipe.data, train_set, val_set, lists)
    study = study.model_copy(update={"recipe": recipe})
    priors = read_priors(study) if found else find_priors(study, space)
    if not trials:
        searcher = Searcher(study, space, priors)
        first = searcher.propose([])
        if first is None:
            raise StudyError(searcher.why_none)
        member = space.recipe(recipe, first.member)  # a space may choose the weights
        find_weights(recipe if member.model.weights == recipe.model.weights else member)
    check_writable(study.folder)

    start_ray()
    recipe = choose_device(recipe)
    study = study.model_copy(update={"recipe": recipe})
    wait_for_room(recipe.scaling)
    concurrent = concurrent_trials(study.recipe, study.concurrent)
    with leased(study.folder) as lease:
        if lease:
            check_unchanged(study, found, trials)
        with hold_signals() as held:  # it makes MLflow's tables and run
            tracker = open_tracker(study, found[1] if found else None, lease)
        logger.info("MLflow: %s", tracker.place)
        logger.info("%s", links_text(tracker.uri, study_links(tracker)))
        with tracker.ending(study.folder, lease) as end:
            if not found:
                write_priors(study, priors)
            log_settings(study, tracker)
            tracker.log_inputs(datasets)
            tracker.share_view(
                study_view_name(tracker.run_id), study_view(study.name, list(space.dimensions), study.main)
            )
            raise_held(held)
            controller = StudyController(study, space, trials, tracker, concurrent, priors)
            controller.log_start()
            with controller.results as results:
                run_trials(controller, lease)
                controller.check_search()
                compare_latencies(controller)
                if study.repeats:
                    controller.start_repeats()
                    run_trials(controller, lease)
                results.finish(controller.in_order(), controller.variants)
            register_best(controller, datasets)
        trials, links = controller.in_order(), study_links(tracker)
        return StudyResult(study, tracker.run_id, trials, pareto.best_trial(trials), end.undelivered, links)


def open_tracker(study: Study, run_id: str | None, lease: Lease | None) -> Tracker:
    """Start the study's MLflow run, or resume the run ``run_id``."""
    config = study.recipe.model_copy(update={"name": study.name}).resolved()
    tags = source_tags() | {"study": study.name, "space": study.space, "overrides": describe_overrides(config)}
    tags[NOTE] = study_note(study, [])
    params = {f"study.{key}": value for key, value in study.model_dump(exclude={"recipe"}).items()}
    return Tracker.open(config, tags, run_id, journal=open_journal(study.folder, lease), params=params)


def study_links(tracker: Tracker) -> dict[str, str]:
    """Links into MLflow's pages, by what they show: the trials side by side, and those of any run."""
    if tracker.experiment_id is None:
        return {}
    trials = view_link(tracker.uri, tracker.experiment_id, study_view_name(tracker.run_id), charts=True)
    links = tracker.links()
    return {"compare trials": trials, "this study": links["this run"], "all runs": links["all runs"]}


def log_settings(study: Study, tracker: Tracker) -> None:
    """Write the study's settings to its folder and to MLflow, without a password."""
    safe = study.model_copy(update={"recipe": recipe_without_password(study.recipe)})
    write_study(safe, tracker.run_id)
    tracker.log_file(STUDY_FILE, safe.model_dump_json(indent=1).encode())


def compare_latencies(controller: StudyController) -> None:
    """Measure the latency of all fully trained trials again, in turns in one process.

    Before training, latency is measured while other trials run and disturb it. Published variants of a similar size are
    measured too. A failure, or a wait of more than ``LATENCY_LIMIT_S``, is logged, and the first measurements stay.
    """
    study, tracker = controller.study, controller.tracker
    trials = fully_trained(controller.trials.values())
    if all(trial.timed for trial in trials):
        return
    variants = variants_to_mark(trials, study.recipe)
    recipes = [controller.space.recipe(study.recipe, trial.member) for trial in trials]
    recipes += [published_variant_recipe(study.recipe, name) for name in variants]
    task = on_training_worker(measure_latencies, study.recipe).remote([r.model_dump(mode="json") for r in recipes])
    begun, wait = time.monotonic(), LongWait()
    try:
        while not ray.wait([task], timeout=POLL_S)[0] and time.monotonic() - begun < LATENCY_LIMIT_S:
            explain = partial(explain_task_wait, f"the latencies of {len(recipes)} models", study.recipe.scaling)
            wait.check(time.monotonic() - begun, explain)
        latencies = ray.get(task, timeout=0)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(task)
        text = "latencies could not be compared within %g s, so those from before training are kept"
        logger.warning(text, LATENCY_LIMIT_S)
        return
    except ray.exceptions.RayError as error:
        logger.warning("latencies could not be compared, so those from before training are kept: %s", error)
        return
    published = dict(zip(variants, latencies[len(trials) :], strict=True))
    controller.save_variant_latencies(published)
    metrics = {f"{PUBLISHED_LATENCY_MS}{name}": ms for name, ms in published.items()}
    tracker.log_metrics(metrics, step=len(trials))
    for trial, latency in zip(trials, latencies, strict=False):
        controller.record_latency(trial, latency)


def register_best(controller: StudyController, datasets: Sequence[Mapping[str, str]]) -> None:
    """Register the model of the best member under the study's name, with the alias ``best``.

    With fresh seeds it is the model of the first of them: the luckiest one would be a choice by luck. A failure is only
    logged.
    """
    study, tracker, trials = controller.study, controller.tracker, controller.in_order()
    best = pareto.best_trial(trials)
    if best is None or not study.recipe.tracking.log_model:
        return
    found = pareto.assess(trials, read_study_hits(study, trials))
    run = found.runs[best.number][0]
    config = study.trial_recipe(controller.space, run.member, run.number, run.seed)
    try:
        checkpoint = checkpoints.choose(run_folder(config))
        measured_by = run.mlflow_run_id or tracker.run_id
        link = link_to(checkpoint, checkpoints.read_info(checkpoint), measured_by, datasets_of_metrics(datasets))
        tracker.log_model(partial(save_model_files, checkpoint), link)
        tags = {"trial": str(run.number), "trial.run": run.mlflow_run_id or "", "member": str(best.number)}
        version = register_model(
            tracker.uri, tracker.run_id, study.name, tags | certainty_tags(found, best.number, study.main)
        )
        logger.info("model %s version %s (trial %d) has the alias best", study.name, version, run.number)
    except Exception as error:  # of the export, the network or the registry; the study itself is finished
        logger.warning("the best model could not be registered (%s: %s)", type(error).__name__, error)


def certainty_tags(found: pareto.Assessment, number: int, main: MainMetric) -> dict[str, str]:
    """What is known of the best member's main metric, as tags of the registered model.

    Args:
        number: of the member's first trial.
        main: of the study.
    """
    name = main.name
    tags = {name: f"{found.values[number]:.4f}", "seeds": str(len(found.runs[number]))}
    if number in found.low:
        tags[f"{name}.interval_95"] = f"{found.low[number]:.4f} to {found.high[number]:.4f}"
        sources = ["seeds"] * found.repeated + [f"validation {main.unit}"] * main.is_mean
        tags[f"{name}.interval_of"] = " and ".join(sources) + " alone" * (len(sources) == 1)
    if not found.repeated:
        return tags | {"rule": SINGLE_RULE.format(main.key)}
    return tags | {f"{name}.luck": f"{found.luck_of_the_best():.4f}", "rule": FRESH_RULE.format(main.key)}
