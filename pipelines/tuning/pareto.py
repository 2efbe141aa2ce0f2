"""The speed-accuracy front of a study: which trials no other beats in both, and what the search has learned.

Everything here works on the trials alone, as the study's driver has them or as MLflow tells them (``read_view``).
Only trials of the first seed that were trained to the end count for a front; repeats with other seeds say how sure
their accuracies are.
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
from mlflow.entities import Run
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator

from pipelines.tracking.mlflow_client import PARENT, prepare_mlflow, shorten
from pipelines.tracking.uris import scrub, without_secrets
from pipelines.tuning import pareto_plots as front_figures
from pipelines.tuning.study import COSTS, FAILED, FINISHED, OVER, RUNNING, STOPPED, TOP1, Study, StudyError, Trial, full
from posmlp import create_model
from posmlp.config import Config, ModelSection
from posmlp.model.cost import count_macs, count_params
from posmlp.model.spec import VARIANTS
from tune_spaces import Member, Value

optuna.logging.set_verbosity(optuna.logging.WARNING)

FEWEST = 4  # finished trials from which importance is told
STUDY_ARTIFACT, RECIPE_ARTIFACT = "study.json", "config.yaml"
PUBLISHED = "published.latency_ms/"  # before a variant's name, among the metrics of the study's MLflow run
SEARCHED = "search."  # before a dimension's name, among the params of a trial's MLflow run


@dataclass(frozen=True)
class View:
    """A study as MLflow has it.

    Attributes:
        run_id: the study's run.
        recipes: the full recipe of each trial of a front, by its number, as YAML that ``posmlp train`` takes.
        published: milliseconds of published variants, by name, where they were measured.
    """

    study: Study
    run_id: str
    trials: list[Trial]
    recipes: dict[int, str]
    published: dict[str, float]


# --- numbers -----------------------------------------------------------------------------------------------------


def rated(trials: Sequence[Trial], against: str) -> list[Trial]:
    """The trials that count for a front and have both a finite accuracy and a finite cost."""
    names = (TOP1, COSTS[against])
    return [t for t in full(trials) if all(math.isfinite(t.metrics.get(name, math.nan)) for name in names)]


def front(trials: Sequence[Trial], against: str) -> list[Trial]:
    """The trials that no other beats: none is as accurate and cheaper, or as cheap and more accurate.

    Of several with the same accuracy and cost the first counts.

    Returns:
        them, the cheapest first.
    """
    chosen: list[Trial] = []
    for trial in sorted(rated(trials, against), key=lambda t: (t.metrics[COSTS[against]], -t.metrics[TOP1], t.number)):
        if not chosen or trial.metrics[TOP1] > chosen[-1].metrics[TOP1]:
            chosen.append(trial)
    return chosen


def accuracy(trial: Trial, trials: Sequence[Trial]) -> tuple[float, float | None, int]:
    """Mean, standard deviation (None of one) and number of the top-1 over the seeds that a member was trained with."""
    again = [t.metrics.get(TOP1, math.nan) for t in trials if t.repeats == trial.number and t.state == FINISHED]
    values = [trial.metrics[TOP1], *filter(math.isfinite, again)]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)


def hypervolume(points: Sequence[tuple[float, float]], reference: float) -> float:
    """The area of (accuracy, cost) that some point beats: accuracies from 0, costs up to the reference."""
    area, height = 0.0, 0.0
    for top1, cost in sorted(points, key=lambda point: point[1]):
        if top1 > height and cost < reference:
            area += (top1 - height) * (reference - cost)
            height = top1
    return area


def hypervolumes(trials: Sequence[Trial], against: str, reference: float | None = None) -> list[float]:
    """The hypervolume after each finished trial, as a share of the reference cost: 1 is perfect and free.

    Args:
        reference: the largest cost, above 0; None: of these trials.
    """
    points = [(trial.metrics[TOP1], trial.metrics[COSTS[against]]) for trial in rated(trials, against)]
    reference = reference or dearest(trials, against)
    return [hypervolume(points[:count], reference) / reference for count in range(1, len(points) + 1)]


def dearest(trials: Sequence[Trial], against: str) -> float:
    """The largest cost of the trials that count; 1 if there is none."""
    return max((trial.metrics[COSTS[against]] for trial in rated(trials, against)), default=0.0) or 1.0


def importance(trials: Sequence[Trial], metric: str) -> dict[str, float]:
    """Which share of a metric's variance each dimension explains (functional ANOVA), the largest first.

    Empty while too few trials are finished, or where they do not differ.
    """
    counted = [trial for trial in full(trials) if math.isfinite(trial.metrics.get(metric, math.nan))]
    if len(counted) < FEWEST or len({trial.metrics[metric] for trial in counted}) == 1:
        return {}
    names = [name for name in counted[0].member if all(name in trial.member for trial in counted)]
    distributions = {name: seen([trial.member[name] for trial in counted]) for name in names}
    varied = {name: d for name, d in distributions.items() if not d.single()}
    if not varied:
        return {}
    known = optuna.create_study()
    for trial in counted:
        params = {name: trial.member[name] for name in varied}
        value = trial.metrics[metric]
        known.add_trial(optuna.trial.create_trial(params=params, distributions=varied, value=value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Not normalised: what the dimensions explain together, or what is noise, is no one's share.
        shares = FanovaImportanceEvaluator(seed=0).evaluate(known)
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def seen(values: Sequence[Value]) -> BaseDistribution:
    """A dimension as its values show it: many numbers with a fraction are a range, all else is a choice."""
    different = sorted(set(values), key=str)
    if len(different) > 8 and all(isinstance(value, float) for value in different):
        return FloatDistribution(min(map(float, different)), max(map(float, different)))
    return CategoricalDistribution(different)


def published(recipe: Config, latencies: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The costs of the published variants (and ``tiny``) for a recipe's clips and classes, by name and metric.

    Args:
        latencies: milliseconds, by name, of those that were measured.
    """
    costs = {}
    for name in VARIANTS:
        same = published_recipe(recipe, name).model
        with torch.device("meta"):
            params = count_params(create_model(name, **same.overrides()))
        costs[name] = {COSTS["gmacs"]: count_macs(same.variant()) / 1e9, COSTS["params"]: params / 1e6}
        if name in latencies:
            costs[name][COSTS["latency"]] = latencies[name]
    return costs


def published_recipe(recipe: Config, name: str) -> Config:
    """A recipe with a published variant as its model, for the same clips and classes."""
    own = recipe.model.variant()
    model = ModelSection(name=name, frames=own.frames, image_size=own.image_size, num_classes=own.num_classes)
    return recipe.model_copy(update={"model": model})


def near_variants(trials: Sequence[Trial], recipe: Config) -> list[str]:
    """The published variants that a front of GMACs marks: those not far from what was trained."""
    values = [trial.metrics[COSTS["gmacs"]] for trial in rated(trials, "gmacs")]
    return [name for name, _ in front_figures.near(published(recipe, {}), "gmacs", values)]


# --- tables ------------------------------------------------------------------------------------------------------


def rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Every trial as a row: how it ended, its member, its accuracy over the seeds, its costs, and its fronts."""
    fronts = {name: {trial.number for trial in front(trials, name)} for name in COSTS}
    table = []
    for trial in trials:
        row: dict[str, Any] = {"trial": trial.number, "state": trial.state, "reason": trial.reason, "seed": trial.seed}
        row["repeats"] = "" if trial.repeats is None else trial.repeats
        row |= {f"{SEARCHED}{name}": value for name, value in trial.member.items()}
        if TOP1 in trial.metrics:
            mean, deviation, seeds = accuracy(trial, trials)
            row |= {"top1": trial.metrics[TOP1], "top1_mean": mean, "top1_std": deviation, "seeds": seeds}
        row |= {name: value for name, value in trial.metrics.items() if name.startswith("cost/")}
        row |= {f"front_{name}": int(trial.number in numbers) for name, numbers in fronts.items()}
        table.append(row)
    return table


def to_csv(table: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as CSV; a column for every key that any of them has."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in table for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue().encode()


def describe(name: str, trials: Sequence[Trial], against: str, reference: float | None = None) -> str:
    """A study and its front as text; ``reference`` as for ``hypervolumes``."""
    counts = [(state, sum(t.state == state for t in trials)) for state in (FINISHED, STOPPED, FAILED, OVER, RUNNING)]
    volumes = hypervolumes(trials, against, reference)
    head = f"{name}: {', '.join(f'{count} {state}' for state, count in counts if count) or 'no trials'}"
    if not volumes:
        return head
    lines = [f"{head}; hypervolume {volumes[-1]:.3f} (accuracy against {against})", ""]
    lines.append(f"{'trial':>7}{'top-1':>8}{'over seeds':>18}{'ms':>9}{'GMACs':>10}{'M params':>10}  member")
    for trial in front(trials, against):
        mean, deviation, seeds = accuracy(trial, trials)
        spread = "" if deviation is None else f"{mean:.1%} ± {100 * deviation:.1f} ({seeds})"
        costs = [trial.metrics.get(COSTS[key]) for key in ("latency", "gmacs", "params")]
        shown = ["" if cost is None else f"{cost:.4g}" for cost in costs]
        numbers = f"{shown[0]:>9}{shown[1]:>10}{shown[2]:>10}"
        lines.append(
            f"{trial.number:>7}{trial.metrics[TOP1]:>8.1%}{spread:>18}{numbers}  {describe_member(trial.member)}"
        )
    return "\n".join(lines)


def describe_member(member: Member) -> str:
    """``block parallel,joint,joint,joint; width 1.5``: what belongs to stages stands together."""
    groups: dict[str, list[str]] = {}
    for name, value in member.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        groups.setdefault(name.rstrip("0123456789"), []).append(text)
    return "; ".join(f"{name} {','.join(values)}" for name, values in groups.items())


def recipe_of(config: Config, study: Study, number: int) -> str:
    """The recipe of a trial's run as one of its own, as YAML that ``posmlp train`` takes."""
    tree = config.model_dump(mode="json")
    tree["name"] = f"{study.name}-trial-{number:03d}"
    tree["train"]["storage"] = study.recipe.train.storage
    uri = study.recipe.tracking.uri and without_secrets(study.recipe.tracking.uri)
    tree["tracking"] = study.recipe.tracking.model_dump(mode="json") | {"uri": uri}
    return f"# Trial {number} of the study {study.name}.\n" + yaml.safe_dump(tree, sort_keys=False)


# --- artifacts ---------------------------------------------------------------------------------------------------


def artifacts(
    studies: Mapping[str, Sequence[Trial]], base: Config, against: str, latencies: Mapping[str, float] | None = None
) -> dict[str, bytes]:
    """The pictures and tables of some studies, laid over each other, by file name.

    Args:
        latencies: as for ``published``.
    """
    marks, blocks = published(base, latencies or {}), base.model.blocks or "parallel"
    layers = {name: [point(t, trials, blocks) for t in rated(trials, "gmacs")] for name, trials in studies.items()}
    steps = {
        name: {cost: [t.number for t in front(trials, cost)] for cost in COSTS} for name, trials in studies.items()
    }
    files = {
        "front.html": front_figures.page(layers, steps, marks),
        "front.png": front_figures.picture(layers, steps, marks),
    }
    for name, trials in studies.items():
        prefix = f"{name}-" if len(studies) > 1 else ""
        files[f"{prefix}trials.csv"] = to_csv(rows(trials))
        shares = {"top-1": importance(trials, TOP1), against: importance(trials, COSTS[against])}
        files[f"{prefix}progress.png"] = front_figures.progress(hypervolumes(trials, against), shares, against)
    return files


def point(trial: Trial, trials: Sequence[Trial], blocks: str | Sequence[str]) -> front_figures.Point:
    """A trial as it is drawn."""
    searched = tuple(str(v) for k, v in sorted(trial.member.items()) if re.fullmatch(r"block\d*", k))
    mean, deviation, seeds = accuracy(trial, trials)
    return front_figures.Point(
        number=trial.number,
        top1=trial.metrics[TOP1],
        mean=mean,
        deviation=deviation,
        seeds=seeds,
        costs={name: trial.metrics.get(metric, math.nan) for name, metric in COSTS.items()},
        blocks=searched or ((blocks,) if isinstance(blocks, str) else tuple(blocks)),
        label=describe_member(trial.member),
    )


def write_views(views: Sequence[View], against: str, out: Path) -> str:
    """Draw the fronts of studies into a folder, with their tables and recipes; returns them as text."""
    out.mkdir(parents=True, exist_ok=True)
    studies = {view.study.name: view.trials for view in views}
    first = views[0]
    for name, content in artifacts(studies, first.study.recipe, against, first.published).items():
        (out / name).write_bytes(content)
    for view in views:
        folder = out / "recipes"
        folder.mkdir(exist_ok=True)
        for number, text in view.recipes.items():
            (folder / f"{view.study.name}-trial-{number:03d}.yaml").write_text(text)
    reference = max(dearest(trials, against) for trials in studies.values())  # so that hypervolumes can be compared
    return "\n\n".join(describe(name, trials, against, reference) for name, trials in studies.items())


# --- from MLflow -------------------------------------------------------------------------------------------------


def read_view(name: str, uri: str) -> View:
    """A study from MLflow alone; of several with the name, the newest.

    Raises:
        StudyError: MLflow does not answer, or has no such study.
    """
    prepare_mlflow()
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():  # it would be made
        raise StudyError(f"no MLflow store {uri}; give the right one with --uri or MLFLOW_TRACKING_URI")
    try:
        client = MlflowClient(uri)
        experiments = [e.experiment_id for e in pages(lambda token: client.search_experiments(page_token=token))]
        parents = [run for run in search(client, experiments, "tags.study LIKE '%'") if "trial" not in run.data.tags]
        found = [run for run in parents if run.data.tags["study"] == name]
        if not found:
            known = ", ".join(sorted({run.data.tags["study"] for run in parents})[:10]) or "none"
            raise StudyError(f"MLflow at {without_secrets(uri)} has no study {name!r}; known: {known}")
        parent = max(found, key=lambda run: run.info.start_time)
        study = Study.model_validate_json(text_of(client, parent, STUDY_ARTIFACT))
        place = [parent.info.experiment_id]
        runs = search(client, place, f"tags.`{PARENT}` = '{parent.info.run_id}' AND tags.study = '{name}'")
        children = {int(run.data.tags["trial"]): run for run in reversed(list(runs))}  # of doubles the newest counts
        trials = [trial_of(children[number]) for number in sorted(children)]
        recipes = {}
        for number in sorted({trial.number for cost in COSTS for trial in front(trials, cost)}):
            text = text_of(client, children[number], RECIPE_ARTIFACT)
            recipes[number] = recipe_of(Config.model_validate(yaml.safe_load(text)), study, number)
    except StudyError:
        raise
    except Exception as error:  # of a network, a database or an artifact store, in their many kinds
        reason = scrub(shorten(" ".join(str(error).split()), 300), uri)
        raise StudyError(f"study {name!r} cannot be read from MLflow at {without_secrets(uri)}: {reason}") from error
    metrics = parent.data.metrics
    measured = {key.removeprefix(PUBLISHED): ms for key, ms in metrics.items() if key.startswith(PUBLISHED)}
    return View(study, parent.info.run_id, trials, recipes, measured)


def search(client: MlflowClient, experiments: Sequence[str], wanted: str) -> Iterator[Run]:
    """All runs that match, the newest first."""
    return pages(lambda token: client.search_runs(list(experiments), wanted, max_results=1000, page_token=token))


def pages(fetch: Callable[[str | None], Any]) -> Iterator[Any]:
    """What MLflow gives a page at a time."""
    token = None
    while True:
        page = fetch(token)
        yield from page
        token = page.token
        if not token:
            return


def text_of(client: MlflowClient, run: Run, path: str) -> str:
    """A text artifact."""
    with tempfile.TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run.info.run_id, path, folder)).read_text()


def trial_of(run: Run) -> Trial:
    """A trial as its MLflow run tells it."""
    tags, params = run.data.tags, run.data.params
    return Trial(
        number=int(tags["trial"]),
        member={k.removeprefix(SEARCHED): value_of(v) for k, v in params.items() if k.startswith(SEARCHED)},
        seed=int(params.get("train.seed", 0)),
        repeats=int(tags["trial.repeats"]) if "trial.repeats" in tags else None,
        state=tags.get("trial.state", RUNNING),
        reason=tags.get("trial.reason", ""),
        metrics={k: v for k, v in run.data.metrics.items() if not k.startswith("system/")},
        mlflow_run_id=run.info.run_id,
    )


def value_of(text: str) -> Value:
    """A param as the number or word that it was."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
