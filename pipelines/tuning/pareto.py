"""The Pareto front of a study (the trials that no other trial beats in both top-1 and a cost), and what a search shows.

Everything here works on trials alone, as the study's driver or as MLflow has them (``read_study_from_mlflow``). Only
trials that were trained to the end with the first seed can be on a front. Repeats with other seeds show how certain
their top-1 is.
"""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator

from pipelines.tracking.mlflow_client import (
    PARENT,
    check_schema,
    explain_store_error,
    prepare_mlflow,
    restore_command,
    shorten,
    stored_metrics,
)
from pipelines.tracking.uris import SEARCH_PARAM, without_secrets
from pipelines.tuning import pareto_plots
from pipelines.tuning.study import STUDY_FILE, Study, StudyError, Trial, TrialState, fully_trained
from posmlp import create_model
from posmlp.config import Config, ModelSection
from posmlp.errors import UserError
from posmlp.metrics import COST, COST_GMACS, COSTS, PUBLISHED_LATENCY_MS, SYSTEM, VAL_TOP1
from posmlp.model.cost import count_macs, count_params
from posmlp.model.spec import VARIANTS
from tune_spaces import Member, Value

optuna.logging.set_verbosity(optuna.logging.WARNING)

MIN_IMPORTANCE_TRIALS = 4  # fewest finished trials for which importance is estimated
# Block types in the names of trials' runs; others are as they are
BLOCK_LETTERS = {"parallel": "P", "cascade_ts": "TS", "cascade_st": "ST", "joint": "J", "spatial": "S"}
MAX_TRIAL_NAME = 120  # characters of the name of a trial's MLflow run
RECIPE_ARTIFACT = "config.yaml"  # of a trial's MLflow run


@dataclass(frozen=True)
class LoggedStudy:
    """A study as MLflow has it.

    Attributes:
        run_id: id of the study's MLflow run.
        recipes: for each trial of a Pareto front, by its number, the full recipe as YAML for ``posmlp train``.
        variant_latencies: latency of published variants in milliseconds, by name, where they were measured.
    """

    study: Study
    run_id: str
    trials: list[Trial]
    recipes: dict[int, str]
    variant_latencies: dict[str, float]


# --- numbers -----------------------------------------------------------------------------------------------------


def comparable_trials(trials: Sequence[Trial], against: str) -> list[Trial]:
    """The fully trained trials whose top-1 and cost are finite.

    Args:
        against: the cost, a name in ``COSTS``.
    """
    names = (VAL_TOP1, COSTS[against])
    return [t for t in fully_trained(trials) if all(math.isfinite(t.metrics.get(name, math.nan)) for name in names)]


def pareto_front(trials: Sequence[Trial], against: str) -> list[Trial]:
    """The trials that no other trial beats: none is as accurate and cheaper, or as cheap and more accurate.

    Of several trials with the same top-1 and cost, only the first is on the front.

    Args:
        against: the cost, a name in ``COSTS``.

    Returns:
        The trials of the front, cheapest first.
    """
    by_cost = sorted(
        comparable_trials(trials, against), key=lambda t: (t.metrics[COSTS[against]], -t.metrics[VAL_TOP1], t.number)
    )
    front: list[Trial] = []
    for trial in by_cost:
        if not front or trial.metrics[VAL_TOP1] > front[-1].metrics[VAL_TOP1]:
            front.append(trial)
    return front


def on_any_front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials on the front of any cost, ordered by number."""
    found = {trial.number: trial for cost in COSTS for trial in pareto_front(trials, cost)}
    return [found[number] for number in sorted(found)]


def top1_over_seeds(trial: Trial, trials: Sequence[Trial]) -> tuple[float, float | None, int]:
    """Top-1 of a trial and its finished repeats: mean, standard deviation (None for one seed), number of seeds."""
    repeats = [t for t in trials if t.repeat_of == trial.number and t.state == TrialState.FINISHED]
    finite = filter(math.isfinite, (t.metrics.get(VAL_TOP1, math.nan) for t in repeats))
    values = [trial.metrics[VAL_TOP1], *finite]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """The fully trained trial with the highest top-1; ties go to the fewest GMACs. None if there is none.

    Where some trials were repeated with other seeds, it is one of these, chosen by mean top-1: the highest of many
    single values is mostly luck.
    """
    candidates = comparable_trials(trials, "gmacs")
    repeated = {trial.repeat_of for trial in trials if trial.state == TrialState.FINISHED}
    chosen = [trial for trial in candidates if trial.number in repeated] or candidates
    return max(chosen, key=lambda t: (top1_over_seeds(t, trials)[0], -t.metrics[COST_GMACS]), default=None)


def hypervolume(points: Sequence[tuple[float, float]], reference: float) -> float:
    """The area that some point dominates, for top-1 from 0 up and costs up to the reference.

    Args:
        points: top-1 and cost of each trial.
        reference: the reference cost.
    """
    area, height = 0.0, 0.0
    for top1, cost in sorted(points, key=lambda point: point[1]):
        if top1 > height and cost < reference:
            area += (top1 - height) * (reference - cost)
            height = top1
    return area


def hypervolume_curve(trials: Sequence[Trial], against: str, reference: float | None = None) -> list[float]:
    """The hypervolume after each finished trial, as a share of the reference cost: 1 is perfect top-1 at no cost.

    Args:
        against: the cost, a name in ``COSTS``.
        reference: the reference cost, above 0; None: the largest cost of these trials.
    """
    points = [(trial.metrics[VAL_TOP1], trial.metrics[COSTS[against]]) for trial in comparable_trials(trials, against)]
    reference = reference or largest_cost(trials, against)
    return [hypervolume(points[:count], reference) / reference for count in range(1, len(points) + 1)]


def largest_cost(trials: Sequence[Trial], against: str) -> float:
    """The largest cost of the comparable trials; 1 if there is none, or if it is 0."""
    return max((trial.metrics[COSTS[against]] for trial in comparable_trials(trials, against)), default=0.0) or 1.0


def dimension_importance(trials: Sequence[Trial], metric: str) -> dict[str, float]:
    """The share of a metric's variance that each dimension explains (functional ANOVA), largest first.

    Empty if fewer than ``MIN_IMPORTANCE_TRIALS`` are finished, or if they do not differ.
    """
    finite = [trial for trial in fully_trained(trials) if math.isfinite(trial.metrics.get(metric, math.nan))]
    if len(finite) < MIN_IMPORTANCE_TRIALS or len({trial.metrics[metric] for trial in finite}) == 1:
        return {}
    names = [name for name in finite[0].member if all(name in trial.member for trial in finite)]
    distributions = {name: infer_distribution([trial.member[name] for trial in finite]) for name in names}
    varied = {name: d for name, d in distributions.items() if not d.single()}
    if not varied:
        return {}
    optuna_study = optuna.create_study()
    for trial in finite:
        params = {name: trial.member[name] for name in varied}
        value = trial.metrics[metric]
        optuna_study.add_trial(optuna.trial.create_trial(params=params, distributions=varied, value=value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Not normalised: noise, and what dimensions explain only together, belongs to no dimension.
        shares = FanovaImportanceEvaluator(seed=0).evaluate(optuna_study)
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def infer_distribution(values: Sequence[Value]) -> BaseDistribution:
    """A dimension's distribution from its values: more than 8 different floats are a range, all else is a choice."""
    different = sorted(set(values), key=str)
    if len(different) > 8 and all(isinstance(value, float) for value in different):
        return FloatDistribution(min(map(float, different)), max(map(float, different)))
    return CategoricalDistribution(different)


def published_variant_costs(recipe: Config, latencies: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The costs of the published variants (and ``tiny``) for a recipe's clips and classes, by name and metric.

    Args:
        latencies: milliseconds, by name, of the variants that were measured.
    """
    costs = {}
    for name in VARIANTS:
        model = published_variant_recipe(recipe, name).model
        with torch.device("meta"):
            params = count_params(create_model(name, **model.overrides()))
        costs[name] = {COST_GMACS: count_macs(model.variant()) / 1e9, COSTS["params"]: params / 1e6}
        if name in latencies:
            costs[name][COSTS["latency"]] = latencies[name]
    return costs


def published_variant_recipe(recipe: Config, name: str) -> Config:
    """A recipe with a published variant as its model, for the same clips and classes."""
    own = recipe.model.variant()
    model = ModelSection(name=name, frames=own.frames, image_size=own.image_size, num_classes=own.num_classes)
    return recipe.model_copy(update={"model": model})


def variants_to_mark(trials: Sequence[Trial], recipe: Config) -> list[str]:
    """The published variants whose GMACs are near those of the trials, so that figures mark them."""
    values = [trial.metrics[COST_GMACS] for trial in comparable_trials(trials, "gmacs")]
    return [name for name, _ in pareto_plots.variants_in_range(published_variant_costs(recipe, {}), "gmacs", values)]


# --- tables ------------------------------------------------------------------------------------------------------


def trial_rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """One row per trial: how it ended, its member, its top-1 over the seeds, its costs, and the fronts it is on."""
    fronts = {name: {trial.number for trial in pareto_front(trials, name)} for name in COSTS}
    rows = []
    for trial in trials:
        row: dict[str, Any] = {"trial": trial.number, "state": trial.state, "reason": trial.reason, "seed": trial.seed}
        row["repeats"] = "" if trial.repeat_of is None else trial.repeat_of
        row |= {f"{SEARCH_PARAM}{name}": value for name, value in trial.member.items()}
        if VAL_TOP1 in trial.metrics:
            mean, deviation, seeds = top1_over_seeds(trial, trials)
            row |= {"top1": trial.metrics[VAL_TOP1], "top1_mean": mean, "top1_std": deviation, "seeds": seeds}
        row |= {name: value for name, value in trial.metrics.items() if name.startswith(COST)}
        row |= {f"front_{name}": int(trial.number in numbers) for name, numbers in fronts.items()}
        rows.append(row)
    return rows


def to_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as CSV, with a column for every key that any row has."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def describe_study(name: str, trials: Sequence[Trial], against: str, reference: float | None = None) -> str:
    """Describe a study and its Pareto front as text.

    Args:
        against: the cost, a name in ``COSTS``.
        reference: the reference cost of the hypervolume, see ``hypervolume_curve``.
    """
    order = (TrialState.FINISHED, TrialState.STOPPED, TrialState.FAILED, TrialState.OVER_BUDGET, TrialState.RUNNING)
    counts = [(state, sum(t.state == state for t in trials)) for state in order]
    volumes = hypervolume_curve(trials, against, reference)
    head = f"{name}: {', '.join(f'{count} {state}' for state, count in counts if count) or 'no trials'}"
    if not volumes:
        return head
    lines = [f"{head}; hypervolume {volumes[-1]:.3f} (top-1 against {against})", ""]
    lines.append(f"{'trial':>7}{'top-1':>8}{'over seeds':>18}{'ms':>9}{'GMACs':>10}{'M params':>10}  member")
    for trial in pareto_front(trials, against):
        mean, deviation, seeds = top1_over_seeds(trial, trials)
        spread = "" if deviation is None else f"{mean:.1%} ± {100 * deviation:.1f} ({seeds})"
        costs = [trial.metrics.get(COSTS[key]) for key in ("latency", "gmacs", "params")]
        shown = ["" if cost is None else f"{cost:.4g}" for cost in costs]
        numbers = f"{shown[0]:>9}{shown[1]:>10}{shown[2]:>10}"
        lines.append(
            f"{trial.number:>7}{trial.metrics[VAL_TOP1]:>8.1%}{spread:>18}{numbers}  {describe_member(trial.member)}"
        )
    return "\n".join(lines)


def describe_member(member: Member) -> str:
    """A member in words, the values of all stages together: ``block parallel,joint,joint,joint; width 1.5``."""
    groups: dict[str, list[str]] = {}
    for name, value in member.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        groups.setdefault(name.rstrip("0123456789"), []).append(text)
    return "; ".join(f"{name} {','.join(values)}" for name, values in groups.items())


def trial_name(trial: Trial) -> str:
    """The name of a trial's MLflow run, with its member in short: ``trial-007 joint; width 1.5``.

    A value that all stages have is once; block types that differ are abbreviated (``BLOCK_LETTERS``).
    """
    parts = []
    for part in describe_member(trial.member).split("; "):
        name, _, text = part.partition(" ")
        values = text.split(",")
        if len(set(values)) == 1:
            text = values[0]
        elif name == "block":
            text = ",".join(BLOCK_LETTERS.get(value, value) for value in values)
        parts.append(text if name == "block" else f"{name} {text}")
    if trial.repeat_of is not None:
        parts.append(f"seed {trial.seed}")
    return shorten(f"trial-{trial.number:03d} {'; '.join(parts)}", MAX_TRIAL_NAME)


def standalone_recipe(config: Config, study: Study, number: int) -> str:
    """A trial's recipe as YAML that ``posmlp train`` accepts, for a run outside the study.

    Args:
        config: the recipe of the trial's run.
    """
    tree = config.model_dump(mode="json")
    tree["name"] = f"{study.name}-trial-{number:03d}"
    tree["train"]["storage"] = study.recipe.train.storage
    uri = study.recipe.tracking.uri and without_secrets(study.recipe.tracking.uri)
    tree["tracking"] = study.recipe.tracking.model_dump(mode="json") | {"uri": uri}
    return f"# Trial {number} of the study {study.name}.\n" + yaml.safe_dump(tree, sort_keys=False)


# --- files -------------------------------------------------------------------------------------------------------


def pareto_files(
    studies: Mapping[str, Sequence[Trial]], base: Config, against: str, latencies: Mapping[str, float] | None = None
) -> dict[str, bytes]:
    """The figures and tables of studies by file name; all studies are in the same figure.

    Args:
        base: recipe of the studies, for the published variants and the block types that are not searched.
        against: the cost, a name in ``COSTS``.
        latencies: as for ``published_variant_costs``.
    """
    variants, blocks = published_variant_costs(base, latencies or {}), base.model.blocks or "parallel"
    points = {
        name: [trial_point(t, trials, blocks) for t in comparable_trials(trials, "gmacs")]
        for name, trials in studies.items()
    }
    fronts = {
        name: {cost: [t.number for t in pareto_front(trials, cost)] for cost in COSTS}
        for name, trials in studies.items()
    }
    files = {
        "front.html": pareto_plots.interactive_page(points, fronts, variants),
        "front.png": pareto_plots.front_image(points, fronts, variants),
    }
    for name, trials in studies.items():
        prefix = f"{name}-" if len(studies) > 1 else ""
        files[f"{prefix}trials.csv"] = to_csv(trial_rows(trials))
        shares = {
            "top-1": dimension_importance(trials, VAL_TOP1),
            against: dimension_importance(trials, COSTS[against]),
        }
        volumes = hypervolume_curve(trials, against)
        files[f"{prefix}progress.png"] = pareto_plots.search_progress(volumes, shares, against)
    return files


def trial_point(trial: Trial, trials: Sequence[Trial], blocks: str | Sequence[str]) -> pareto_plots.TrialPoint:
    """A trial as it is drawn.

    Args:
        blocks: the block types if the study does not search them.
    """
    searched = tuple(str(v) for k, v in sorted(trial.member.items()) if re.fullmatch(r"block\d*", k))
    mean, deviation, seeds = top1_over_seeds(trial, trials)
    return pareto_plots.TrialPoint(
        number=trial.number,
        top1=trial.metrics[VAL_TOP1],
        mean=mean,
        deviation=deviation,
        seeds=seeds,
        costs={name: trial.metrics.get(metric, math.nan) for name, metric in COSTS.items()},
        blocks=searched or ((blocks,) if isinstance(blocks, str) else tuple(blocks)),
        label=describe_member(trial.member),
    )


def write_studies(studies: Sequence[LoggedStudy], against: str, out: Path) -> str:
    """Write the figures, tables and recipes of studies into a folder; returns a description of the studies."""
    out.mkdir(parents=True, exist_ok=True)
    trials_by_study = {logged.study.name: logged.trials for logged in studies}
    first = studies[0]
    files = pareto_files(trials_by_study, first.study.recipe, against, first.variant_latencies)
    for name, content in files.items():
        (out / name).write_bytes(content)
    for logged in studies:
        folder = out / "recipes"
        folder.mkdir(exist_ok=True)
        for number, text in logged.recipes.items():
            (folder / f"{logged.study.name}-trial-{number:03d}.yaml").write_text(text)
    # One reference for all studies, so that their hypervolumes can be compared.
    reference = max(largest_cost(trials, against) for trials in trials_by_study.values())
    return "\n\n".join(describe_study(name, trials, against, reference) for name, trials in trials_by_study.items())


# --- from MLflow -------------------------------------------------------------------------------------------------


def read_study_from_mlflow(name: str, uri: str) -> LoggedStudy:
    """Read a study from MLflow alone; of several with the same name, the newest.

    Raises:
        StudyError: MLflow does not answer, or has no such study.
    """
    prepare_mlflow()
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():  # MLflow would create it
        raise StudyError(f"no MLflow store {uri}; give the right one with --uri or MLFLOW_TRACKING_URI")
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
        study = Study.model_validate_json(download_text(client, parent, STUDY_FILE))
        query = f"tags.`{PARENT}` = '{parent.info.run_id}' AND tags.study = '{name}'"
        newest_first = list(search_runs(client, experiments, query))  # older versions did not follow a renamed one
        children = {int(run.data.tags["trial"]): run for run in reversed(newest_first)}  # of duplicates, the newest
        trials = [trial_from_run(children[number]) for number in sorted(children)]
        recipes = {}
        for trial in on_any_front(trials):
            text = download_text(client, children[trial.number], RECIPE_ARTIFACT)
            config = Config.model_validate(yaml.safe_load(text))
            recipes[trial.number] = standalone_recipe(config, study, trial.number)
    except UserError:
        raise
    except Exception as error:  # errors of networks, databases and artifact stores have no common base class
        problem = explain_store_error(error, uri)
        raise StudyError(f"study {name!r} cannot be read from MLflow at {without_secrets(uri)}: {problem}") from error
    metrics, prefix = stored_metrics(parent), PUBLISHED_LATENCY_MS
    latencies = {key.removeprefix(prefix): ms for key, ms in metrics.items() if key.startswith(prefix)}
    return LoggedStudy(study, parent.info.run_id, trials, recipes, latencies)


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


def trial_from_run(run: Run) -> Trial:
    """A trial from its MLflow run. ``suggestion``, ``sampler_attrs`` and ``timed`` are not there."""
    tags, params = run.data.tags, run.data.params
    return Trial(
        number=int(tags["trial"]),
        member={k.removeprefix(SEARCH_PARAM): parse_value(v) for k, v in params.items() if k.startswith(SEARCH_PARAM)},
        seed=int(params.get("train.seed", 0)),
        repeat_of=int(tags["trial.repeats"]) if "trial.repeats" in tags else None,
        state=TrialState(tags.get("trial.state", TrialState.RUNNING)),
        reason=tags.get("trial.reason", ""),
        metrics={k: v for k, v in stored_metrics(run).items() if not k.startswith(SYSTEM)},
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
