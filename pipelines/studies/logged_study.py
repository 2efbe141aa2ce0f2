"""A study as MLflow has it, and its files from there."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from pipelines.runs.record import HITS_FILE
from pipelines.studies import report
from pipelines.studies.costs import published_variant_costs
from pipelines.studies.pareto import hits_needed, largest_cost, on_any_front
from pipelines.studies.study import STUDY_FILE, Study, StudyError, Trial, TrialState, parse_study, standalone_recipe
from pipelines.tracking.mlflow_client import (
    check_schema,
    explain_store_error,
    prepare_mlflow,
    restore_command,
    stored_metrics,
)
from pipelines.tracking.uris import PARENT, SEARCH_PARAM, without_secrets
from posmlp.config import Config
from posmlp.errors import UserError
from posmlp.metrics import PUBLISHED_LATENCY_MS, STUDY, SYSTEM
from posmlp.text import quantity
from tune_spaces import Value

RECIPE_ARTIFACT = "config.yaml"  # of a trial's MLflow run


@dataclass(frozen=True)
class LoggedStudy:
    """A study as MLflow has it.

    Attributes:
        run_id: id of the study's MLflow run.
        recipes: for each trial of a Pareto front, by its number, the full recipe as YAML for ``posmlp train``.
        variant_latencies: latency of published variants in milliseconds, by name, where they were measured.
        hits: content of ``val_hits.txt`` of the runs with fresh seeds, by trial number, where MLflow has it.
    """

    study: Study
    run_id: str
    trials: list[Trial]
    recipes: dict[int, str]
    variant_latencies: dict[str, float]
    hits: dict[int, bytes] = field(default_factory=dict)


def read_study_from_mlflow(name: str, uri: str, option: str = "--uri") -> LoggedStudy:
    """Read a study from MLflow alone; of several with the same name, the newest.

    Args:
        option: how the user of this command names another store, for the message.

    Raises:
        StudyError: MLflow does not answer, or has no such study.
    """
    prepare_mlflow()
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():  # MLflow would create it
        raise StudyError(f"no MLflow store {uri}; give the right one with {option} or MLFLOW_TRACKING_URI")
    try:
        check_schema(uri)
        client = MlflowClient(uri)
        experiments = [e.experiment_id for e in all_pages(lambda token: client.search_experiments(page_token=token))]
        runs = search_runs(client, experiments, "tags.study LIKE '%'")
        parents = [run for run in runs if "trial" not in run.data.tags]
        found = [run for run in parents if run.data.tags["study"] == name]
        if not found:
            known = ", ".join(sorted({run.data.tags["study"] for run in parents})[:10]) or "none"
            deleted = client.search_experiments(ViewType.DELETED_ONLY, max_results=10)
            hint = "".join(f"; restore {e.name!r} with `{restore_command(uri, e.experiment_id)}`" for e in deleted)
            hint = f". Deleted experiments are not searched{hint}" if deleted else ""
            raise StudyError(f"MLflow at {without_secrets(uri)} has no study {name!r}; known: {known}{hint}")
        parent = max(found, key=lambda run: run.info.start_time)
        study = parse_study(json.loads(download_text(client, parent, STUDY_FILE)))
        query = f"tags.`{PARENT}` = '{parent.info.run_id}' AND tags.study = '{name}'"
        newest_first = list(search_runs(client, experiments, query))  # older versions did not follow a renamed one
        children = {int(run.data.tags["trial"]): run for run in reversed(newest_first)}  # of duplicates, the newest
        trials = [trial_from_run(children[number]) for number in sorted(children)]
        recipes = {}
        for trial in on_any_front(trials):
            text = download_text(client, children[trial.number], RECIPE_ARTIFACT)
            config = Config.model_validate(yaml.safe_load(text))
            recipes[trial.number] = standalone_recipe(config, study, trial.number)
        contents = {trial.number: download_hits(client, children[trial.number]) for trial in hits_needed(trials)}
        hits = {number: content for number, content in contents.items() if content is not None}
    except UserError:
        raise
    except Exception as error:  # errors of networks, databases and artifact stores have no common base class
        problem = explain_store_error(error, uri)
        raise StudyError(f"study {name!r} cannot be read from MLflow at {without_secrets(uri)}: {problem}") from error
    metrics, prefix = stored_metrics(parent), PUBLISHED_LATENCY_MS
    latencies = {key.removeprefix(prefix): ms for key, ms in metrics.items() if key.startswith(prefix)}
    return LoggedStudy(study, parent.info.run_id, trials, recipes, latencies, hits)


def search_runs(client: MlflowClient, experiments: Sequence[str], query: str) -> Iterator[Run]:
    """Yield all runs that match MLflow's query, newest first."""
    return all_pages(lambda token: client.search_runs(list(experiments), query, max_results=1000, page_token=token))


def all_pages(fetch: Callable[[str | None], Any]) -> Iterator[Any]:
    """Yield the items of all pages of an MLflow search.

    Args:
        fetch: returns the page with a given token.
    """
    token = None
    while True:
        page = fetch(token)
        yield from page
        token = page.token
        if not token:
            return


def download_text(client: MlflowClient, run: Run, path: str) -> str:
    """The content of a text artifact."""
    with tempfile.TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run.info.run_id, path, folder)).read_text()


def download_hits(client: MlflowClient, run: Run) -> bytes | None:
    """The per-video results of a run's last validation; None if MLflow lacks them, as of runs of earlier versions."""
    if not any(item.path == HITS_FILE for item in client.list_artifacts(run.info.run_id)):
        return None
    return download_text(client, run, HITS_FILE).encode()


def trial_from_run(run: Run) -> Trial:
    """A trial from its MLflow run, which has nothing of what only a resume of the study needs."""
    tags, params = run.data.tags, run.data.params
    return Trial(
        number=int(tags["trial"]),
        member={k.removeprefix(SEARCH_PARAM): parse_value(v) for k, v in params.items() if k.startswith(SEARCH_PARAM)},
        seed=int(params.get("train.seed", 0)),
        repeat_of=int(tags["trial.repeats"]) if "trial.repeats" in tags else None,
        state=TrialState(tags.get("trial.state", TrialState.RUNNING)),
        reason=tags.get("trial.reason", ""),
        metrics={k: v for k, v in stored_metrics(run).items() if not k.startswith((SYSTEM, STUDY))},
        mlflow_run_id=run.info.run_id,
    )


def parse_value(text: str) -> Value:
    """An MLflow param as the int, float or str that was logged."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def write_studies(studies: Sequence[LoggedStudy], against: str, out: Path) -> str:
    """Write the figures, tables and recipes of studies into a folder; describe the studies and what was written.

    Raises:
        StudyError: the studies have different tasks.
    """
    by_task = {logged.study.recipe.task: logged.study for logged in studies}
    if len(by_task) > 1:
        texts = [f"{study.name} is of {task} ({study.main.title})" for task, study in by_task.items()]
        raise StudyError(f"{', '.join(texts)}: their values cannot be compared; give studies of one task")
    out.mkdir(parents=True, exist_ok=True)
    trials_by_study = {logged.study.name: logged.trials for logged in studies}
    first = studies[0]
    hits = {logged.study.name: logged.hits for logged in studies}
    variants = published_variant_costs(first.study.recipe, first.variant_latencies)
    files = report.pareto_files(trials_by_study, first.study.recipe, against, variants, hits=hits)
    for name, content in files.items():
        (out / name).write_bytes(content)
    for logged in studies:
        folder = out / "recipes"
        if logged.recipes:
            folder.mkdir(exist_ok=True)
        for number, text in logged.recipes.items():
            (folder / f"{logged.study.name}-trial-{number:03d}.yaml").write_text(text)
    # One reference for all studies, so that their hypervolumes can be compared.
    reference = max(largest_cost(trials, against) for trials in trials_by_study.values())
    texts = [
        report.describe_study(s.study.name, s.trials, s.study.main, against, reference, s.hits, study=s.study)
        for s in studies
    ]
    recipes = sum(len(logged.recipes) for logged in studies)
    written = ", ".join(files) + f" and {quantity(recipes, 'recipe')} of the fronts" * bool(recipes)
    return "\n\n".join([*texts, f"{out} has {written}"])
