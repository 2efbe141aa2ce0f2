"""Train one model for a whole search space, and rank the members of the space with the weights that they inherit.

``posmlp supernet`` trains a supernet: a model that shares its weights among all members of a space
(``posmlp.model.supernet``). The training is a run like any other. Then many members are scored on the validation split,
which is decoded once for all of them. An inherited top-1 is not the top-1 of a member trained alone; it is useful for
ranking. How well the two rankings agree is measured on members that a study has trained alone.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import yaml
from pydantic import ValidationError
from scipy import stats
from torch import Tensor, nn

from pipelines.cluster.capacity import choose_device, wait_for_room
from pipelines.cluster.session import start_ray
from pipelines.inference.scoring import Scorer, score_good_videos
from pipelines.runs import checkpoints
from pipelines.runs.errors import BadVideo
from pipelines.runs.lease import leased
from pipelines.runs.models import known_classes
from pipelines.runs.record import read_record, run_folder
from pipelines.studies import pareto, pareto_plots, report
from pipelines.studies.costs import published_variant_costs, static_costs
from pipelines.studies.study import (
    Study,
    StudyError,
    Trial,
    TrialState,
    explain_error,
    find_study,
    fully_trained,
    read_trials,
    study_space,
)
from pipelines.tracking.journal import open_journal
from pipelines.tracking.tracker import Tracker
from pipelines.tracking.uris import recipe_without_password
from pipelines.training.preflight import changed_keys, check_data, list_fingerprint, read_splits
from pipelines.training.train import train
from pipelines.tuning.search import member_key, space_size
from posmlp import storage
from posmlp.config import Config, RecipeError, ScalingSection, set_value
from posmlp.learn.evaluation import video_scores
from posmlp.metrics import SUPERNET_BEST_TOP1, SUPERNET_KENDALL, SUPERNET_SPEARMAN, VAL_TOP1
from posmlp.model.backbone import PosMLPVideo
from posmlp.model.spec import STAGES, Architecture
from posmlp.model.supernet import Supernet
from posmlp.tasks.recognition import score_views
from posmlp.video.batch import Batch
from posmlp.video.manifest import read_split
from tune_spaces import Member, Range, Space, Value, load_space

CHOICE_KEYS = ("blocks", "groups", "depths")  # keys of the model in which members may differ
RESULTS_FOLDER = "members"  # in the run's folder and among its MLflow artifacts
MAX_DRAWS = 50  # per wanted member: random members may be known, or impossible to build

logger = logging.getLogger(__name__)


class StandaloneTrial(NamedTuple):
    """A member of the supernet that a study has trained alone.

    Attributes:
        trial: the study's trial.
        top1: its top-1, the mean over its fresh seeds if it has some, else that of its first seed.
        recipe: its recipe.
    """

    trial: Trial
    top1: float
    recipe: Config


@dataclass(frozen=True)
class RankAgreement:
    """How the ranking of members with inherited weights agrees with their ranking when trained alone.

    Attributes:
        numbers: numbers of the study's trials.
        inherited: top-1 of each trial's member with inherited weights.
        alone: top-1 of each trial, as in ``StandaloneTrial``.
        spearman, kendall: rank correlations of the two; NaN if one of them does not vary.
    """

    numbers: list[int]
    inherited: list[float]
    alone: list[float]
    spearman: float
    kendall: float

    def __str__(self) -> str:
        lines = [f"{'trial':>7}{'inherited':>11}{'alone':>8}"]
        for number, inherited, alone in zip(self.numbers, self.inherited, self.alone, strict=True):
            lines.append(f"{number:>7}{inherited:>11.1%}{alone:>8.1%}")
        correlations = f"Spearman {self.spearman:.2f}, Kendall {self.kendall:.2f}"
        lines.append(f"rank correlation over {len(self.numbers)} members: {correlations}")
        return "\n".join(lines)


@dataclass(frozen=True)
class SupernetResult:
    """A trained supernet, and how it ranks members of its space.

    Attributes:
        run: the run's folder, a path or a URI.
        mlflow_run_id: id of the run's MLflow run.
        members: the scored members, as finished trials with their inherited top-1 and their costs.
        agreement: with the ranking of a study; None without a study.
        bad: validation videos that could not be decoded.
        links: into MLflow's pages, by what they show.
    """

    run: str
    mlflow_run_id: str
    members: list[Trial]
    agreement: RankAgreement | None
    bad: list[BadVideo]
    links: dict[str, str] = field(default_factory=dict)


def supernet(
    recipe: Config,
    space_name: str,
    name: str | None = None,
    count: int = 100,
    seed: int = 0,
    study: str | None = None,
) -> SupernetResult:
    """Train a space's supernet, unless that is done, and score members of the space with it.

    Args:
        recipe: the recipe of the training, except for the blocks, groups and depths that the space chooses from.
        space_name: a space whose members differ in nothing else.
        name: name of the run; None: RECIPE-SPACE-supernet.
        count: number of members to score, drawn at random; the whole space if it is not larger.
        seed: seed of that draw.
        study: folder or name of a study whose finished trials are members of the supernet. They are scored too, and the
            two rankings are compared.

    Raises:
        StudyError: the recipe is not of recognition, the space has other dimensions, the study's trials are not
            members, or a run of that name was trained with another recipe.
        UserError: as ``pipelines.training.train.train``, or too many validation videos are bad.
        StoppedError: as ``pipelines.training.train.train``.
    """
    space, config, standalone = check_supernet(recipe, space_name, name, study)
    drawn = list(draw_members(space, recipe, count, seed))
    refuse_outsiders(space_name, config, drawn)

    train_unless_finished(config)

    start_ray()
    config = choose_device(config)
    wait_for_room(config.scaling)
    run = run_folder(config)
    recipes = [member_recipe for _, member_recipe in drawn] + [each.recipe for each in standalone]
    top1, bad = score_members(run, config.scaling, [each.model.variant().architecture() for each in recipes])
    members = [
        Trial(number, dict(member), state=TrialState.FINISHED, metrics={VAL_TOP1: top1[number]} | static_costs(recipe))
        for number, (member, recipe) in enumerate(drawn)
    ]
    agreement = compare_rankings(standalone, top1[len(drawn) :]) if standalone else None
    record = read_record(run)
    assert record is not None
    result = SupernetResult(run, record["mlflow_run_id"], members, agreement, bad)
    return replace(result, links=write_results(result, config, drawn))


def check_supernet(
    recipe: Config, space_name: str, name: str | None, study: str | None
) -> tuple[Space, Config, list[StandaloneTrial]]:
    """Check the arguments of ``supernet`` that need no data: the task, the space, and the study to compare with.

    Returns:
        The space, the recipe of its supernet, and the study's finished trials (empty without a study).

    Raises:
        StudyError: as ``supernet``.
    """
    if recipe.task != "recognition":
        raise StudyError(
            f"a supernet is for task: recognition alone, and the recipe {recipe.name} has task: {recipe.task}; search "
            f"the space with posmlp tune RECIPE --space {space_name}"
        )
    space = load_space(space_name, recipe)
    config = supernet_recipe(space, space_name, recipe, name or f"{recipe.name}-{Path(space_name).stem}-supernet")
    return space, config, read_standalone_trials(study, config) if study else []


# --- members -----------------------------------------------------------------------------------------------------


def supernet_recipe(space: Space, space_name: str, recipe: Config, name: str) -> Config:
    """The recipe of a space's supernet.

    Validation during training uses one member: the recipe's own model, or, for each stage's value that is not in the
    space, the last choice.

    Raises:
        StudyError: members differ in more than blocks, groups and depths, none can be built, or the name is not valid.
    """
    first: dict[str, Value] = {}
    for dimension, values in space.dimensions.items():
        if isinstance(values, Range):
            raise StudyError(
                f"space {space_name} has the range {dimension}; members of a supernet may differ in "
                f"{describe_choice_keys()} alone"
            )
        first[dimension] = values[0]
    choices: dict[str, list[dict[Any, None]]] = {key: [{} for _ in range(STAGES)] for key in CHOICE_KEYS}
    for dimension, values in space.dimensions.items():
        for value in cast(tuple[Value, ...], values):
            try:
                member_recipe = space.recipe(recipe, first | {dimension: value})
            except RecipeError:
                continue
            refuse_differences(f"space {space_name}: {dimension} {value!r}", recipe, member_recipe)
            for key, stages in choices.items():
                for stage, chosen in zip(stages, getattr(member_recipe.model.variant(), key), strict=True):
                    stage[chosen] = None
    if not all(choices["blocks"]):
        raise StudyError(f"space {space_name} has no member that can be built")
    own, tree = recipe.model.variant(), recipe.model_dump(mode="json")
    for key, stages in choices.items():
        shown = [
            value if value in stage else list(stage)[-1] for stage, value in zip(stages, getattr(own, key), strict=True)
        ]
        set_value(tree, f"model.{key}", shown)
    set_value(tree, "model.choices", {key: [list(stage) for stage in stages] for key, stages in choices.items()})
    set_value(tree, "tracking.log_model", False)  # a supernet is many models
    try:
        return Config.model_validate(tree | {"name": name})
    except ValidationError as error:
        raise StudyError(f"supernet {name}: {explain_error(error)}") from error


def refuse_differences(what: str, recipe: Config, other: Config) -> None:
    """Refuse a recipe that differs from another in more than members of a supernet may.

    Raises:
        StudyError: names the first such key.
    """
    before, now = recipe.flat(), other.flat()
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key.removeprefix("model.") not in CHOICE_KEYS:
            raise StudyError(
                f"{what} has {key} {now.get(key)!r}, not {before.get(key)!r}; members of a supernet may differ in "
                f"{describe_choice_keys()} alone, as those of the space same_width do"
            )


def refuse_outsiders(space_name: str, config: Config, members: Sequence[tuple[Member, Config]]) -> None:
    """Refuse members that a supernet does not hold, before it is trained.

    ``supernet_recipe`` looks at one dimension at a time, so it misses values that cannot be built together with the
    first value of every other dimension.

    Args:
        config: the recipe of the supernet.
        members: with their recipes.

    Raises:
        StudyError: names one of them.
    """
    choices = config.model.variant().choices
    assert choices is not None
    for member, recipe in members:
        if not choices.contains(recipe.model.variant().architecture()):
            raise StudyError(
                f"space {space_name}: the supernet does not hold the member {report.describe_member(member)}. It looks "
                "for each value in a member that has the first values of all other dimensions; put values first that "
                "go with all others"
            )


def describe_choice_keys() -> str:
    """The recipe keys in which members may differ, as text."""
    return f"model.{', model.'.join(CHOICE_KEYS)}"


def draw_members(space: Space, recipe: Config, count: int, seed: int) -> Iterator[tuple[Member, Config]]:
    """Yield different members of a space that can be built, with their recipes.

    Args:
        count: number of members to draw; if the space is not larger, all of it is yielded.
        seed: seed of the draw.
    """
    rng = np.random.default_rng(seed)
    known: set[tuple[tuple[str, Value], ...]] = set()
    if space_size(space) <= count:
        candidates = space.all_members()
    else:
        candidates = (space.random(rng) for _ in range(MAX_DRAWS * count))
    for member in candidates:
        if len(known) == count:
            return
        if member_key(member) in known:
            continue
        try:
            member_recipe = space.recipe(recipe, member)
        except RecipeError:
            continue
        known.add(member_key(member))
        yield member, member_recipe


def read_standalone_trials(name: str, config: Config) -> list[StandaloneTrial]:
    """Read a study's finished trials.

    Args:
        name: the study's folder or name.
        config: the recipe of the supernet.

    Raises:
        StudyError: it is of another task, there are fewer than two, or one of them is not a member of the supernet.
    """
    study, _ = find_study(name, Study)
    if study.recipe.task != config.task:
        raise StudyError(f"--study {name} is of task: {study.recipe.task}, the supernet of {config.task}; leave it out")
    space, trials = study_space(study), read_trials(study.folder)
    fresh, found = pareto.fresh_seeds(trials), []
    for trial in fully_trained(trials):
        recipe = space.recipe(study.recipe, trial.member)
        ours, theirs = config.model.variant(), recipe.model.variant()
        keys = ("dims", "windows", "frames", "image_size")
        different = ", ".join(
            f"{key} {getattr(theirs, key)}" for key in keys if getattr(ours, key) != getattr(theirs, key)
        )
        assert ours.choices is not None
        if different or not ours.choices.contains(theirs.architecture()):
            what = different or report.describe_member(trial.member)
            raise StudyError(f"trial {trial.number} of the study {study.name} is not a member of {config.name}: {what}")
        runs = fresh.get(trial.number, [trial])
        found.append(StandaloneTrial(trial, statistics.mean(run.value for run in runs), recipe))
    if len(found) < 2:
        raise StudyError(f"the study {study.name} has {len(found)} finished trials; a ranking needs at least 2")
    return found


# --- training and scoring ----------------------------------------------------------------------------------------


def train_unless_finished(config: Config) -> None:
    """Train a run, unless a run of that name and recipe is finished.

    Raises:
        StudyError: the finished run had another recipe.
        UserError, StoppedError: as ``train``.
    """
    run = run_folder(config)
    record = read_record(run)
    if record is None or record["metrics"] is None:
        train(config)
        return
    train_set, val_set = read_splits(config)
    lists = {"train": list_fingerprint(train_set), "val": list_fingerprint(val_set)}
    if changed := changed_keys(record, check_data(config, train_set, val_set), lists):
        raise StudyError(
            f"{run} was trained with another recipe; choose another --name, delete that folder, or restore:"
            + "".join(f"\n  {key}: {change}" for key, change in changed.items())
        )
    logger.info("%s is trained already, %s", config.name, run)


class MemberScorer(Scorer):
    """A ``Scorer`` for all members: ``scores`` are the predicted classes, int64 ``[videos, members]``."""

    def __init__(self, config: dict[str, Any], architectures: Sequence[Architecture]):
        super().__init__(config)
        self.architectures = architectures
        self.members: list[PosMLPVideo] = []

    def prepare(self, model: PosMLPVideo) -> nn.Module:
        """Freeze the members, which share the supernet's weights, one by one."""
        self.members = [cast(Supernet, model).member(architecture).freeze() for architecture in self.architectures]
        return model

    def score_batch(self, model: nn.Module, batch: Batch) -> Tensor:
        predicted = []
        for member in self.members:
            scores = score_views(member, batch.clips, self.config)
            predicted.append(video_scores(scores, self.config.eval.fusion).argmax(1))
            member.freeze()  # drops its merged weights; those of all members would not fit in memory
        return torch.stack(predicted, 1)


def score_members(
    run: str, scaling: ScalingSection, architectures: Sequence[Architecture]
) -> tuple[list[float], list[BadVideo]]:
    """Score members on the validation split with the weights of a supernet's newest checkpoint.

    Returns:
        The top-1 of each member, and the videos that could not be decoded.

    Raises:
        UserError: there is no whole checkpoint, too many videos are bad, or the workers fail.
    """
    checkpoint, problems = checkpoints.newest(run)
    if checkpoint is None:
        reasons = "; ".join(map(str, problems))
        raise StudyError(f"{run} has no whole checkpoint: {reasons}; delete that folder to train it again")
    info, contents = checkpoints.load(checkpoint, [checkpoints.WEIGHTS])
    config, bad = info.recipe().model_copy(update={"scaling": scaling}), list[BadVideo]()
    manifest = read_split(config.data, "val", known_classes(info))
    logger.info(
        "scoring %d members on %d videos with the weights of %s", len(architectures), len(manifest.rows), checkpoint
    )
    labels = manifest.rows["label"].to_numpy()
    hits, videos = np.zeros(len(architectures)), 0
    blocks = score_good_videos(manifest, config, contents[checkpoints.WEIGHTS], bad, MemberScorer, list(architectures))
    for rows, predicted in blocks:  # [videos], [members] of each
        hits += (np.stack(predicted) == labels[rows][:, None]).sum(0)
        videos += len(rows)
    return (hits / videos).tolist(), bad


def compare_rankings(standalone: Sequence[StandaloneTrial], inherited: Sequence[float]) -> RankAgreement:
    """Compare the ranking of members by inherited top-1 with that by the top-1 of members trained alone.

    Args:
        inherited: top-1 of each trial's member with inherited weights.
    """
    numbers, alone = [each.trial.number for each in standalone], [each.top1 for each in standalone]
    if len(set(alone)) == 1 or len(set(inherited)) == 1:  # there is no ranking
        return RankAgreement(numbers, list(inherited), alone, float("nan"), float("nan"))
    spearman, kendall = (float(test(inherited, alone).statistic) for test in (stats.spearmanr, stats.kendalltau))
    return RankAgreement(numbers, list(inherited), alone, spearman, kendall)


# --- results -----------------------------------------------------------------------------------------------------


def write_results(result: SupernetResult, config: Config, drawn: Sequence[tuple[Member, Config]]) -> dict[str, str]:
    """Write the members' Pareto front, table and recipes into the run's folder and its MLflow run.

    Returns links into MLflow's pages, by what they show.

    Args:
        config: the recipe of the supernet.
        drawn: the scored members with their recipes.

    Raises:
        UserError: they cannot be written.
    """
    members = result.members
    files = report.pareto_files(
        {config.name: members}, config, "gmacs", published_variant_costs(config, {}), inherited=True
    )
    files["members.csv"] = files.pop("trials.csv")
    for number in {trial.number for cost in ("gmacs", "params") for trial in pareto.pareto_front(members, cost)}:
        name = f"{config.name}-{number:03d}"
        tree = recipe_without_password(drawn[number][1]).model_dump(mode="json") | {"name": name}
        head = f"# Member {number} of {config.name}: {members[number].value:.1%} with its weights.\n"
        files[f"recipes/{number:03d}.yaml"] = (head + yaml.safe_dump(tree, sort_keys=False)).encode()
    metrics = {SUPERNET_BEST_TOP1: max(trial.value for trial in members)}
    if agreement := result.agreement:
        files["agreement.png"] = pareto_plots.rank_agreement_image(agreement.inherited, agreement.alone)
        metrics |= {SUPERNET_SPEARMAN: agreement.spearman, SUPERNET_KENDALL: agreement.kendall}
    with leased(result.run) as lease:
        tracker = Tracker.open(config, {}, result.mlflow_run_id, journal=open_journal(result.run, lease))
        try:
            for path, content in files.items():
                storage.write_bytes(storage.join(result.run, f"{RESULTS_FOLDER}/{path}"), content)
                tracker.log_file(f"{RESULTS_FOLDER}/{path}", content)
            tracker.log_metrics(metrics, step=config.train.epochs)
        except OSError as error:
            raise StudyError(f"{result.run} cannot be written: {error}") from error
        finally:
            tracker.close("FINISHED")
    return tracker.links()
