"""A whole space from one training: a supernet, and the accuracy of its members with the weights that they inherit.

``posmlp supernet`` trains a model that shares its weights among all members of a space (``posmlp.model.supernet``), as
a run like any other, and then scores many members on the validation split, which is decoded once for all. Inherited
accuracies are not those of members trained alone; of use is their order, and how far that holds is measured where a
study has trained some of them alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from scipy import stats
from torch import Tensor, nn

from pipelines.cluster.capacity import wait_for_room
from pipelines.cluster.session import start_ray
from pipelines.inference.scoring import Scorer, good_scores
from pipelines.runs import checkpoints
from pipelines.runs.errors import BadVideo
from pipelines.runs.record import read_record, run_folder
from pipelines.tracking.tracker import Tracker
from pipelines.tracking.uris import journal_path, without_password
from pipelines.training.preflight import changes, check_data, fingerprint, read_splits
from pipelines.training.train import train
from pipelines.tuning import pareto as fronts
from pipelines.tuning import pareto_plots as front_figures
from pipelines.tuning.search import identity, size, static_costs
from pipelines.tuning.study import FINISHED, TOP1, StudyError, Trial, find_study, full, read_trials, space_of
from posmlp import storage
from posmlp.config import Config, RecipeError, set_value
from posmlp.learn.evaluation import video_scores
from posmlp.learn.learner import score_views
from posmlp.model.backbone import PosMLPVideo
from posmlp.model.spec import Architecture
from posmlp.model.supernet import Supernet
from posmlp.video.manifest import read_split
from tune_spaces import Member, Range, Space, Value, load_space

SHARED = ("blocks", "groups", "depths")  # keys of the model in which members may differ
FOLDER = "members"  # of the results, in the run's folder and among its MLflow artifacts
TRIES = 50  # random members that are known or cannot be built, for each that is wanted


@dataclass(frozen=True)
class Agreement:
    """Members that were also trained alone.

    Attributes:
        numbers: of the study's trials.
        inherited, alone: top-1 with inherited weights, and trained alone (the mean over its seeds).
        spearman, kendall: rank correlations of the two; NaN where one of them does not vary.
    """

    numbers: list[int]
    inherited: list[float]
    alone: list[float]
    spearman: float
    kendall: float

    def __str__(self) -> str:
        lines = [f"{'trial':>7}{'inherited':>11}{'alone':>8}"]
        for row in zip(self.numbers, self.inherited, self.alone, strict=True):
            lines.append(f"{row[0]:>7}{row[1]:>11.1%}{row[2]:>8.1%}")
        lines.append(f"rank correlation over {len(self.numbers)} members: Spearman {self.spearman:.2f}, ")
        lines[-1] += f"Kendall {self.kendall:.2f}"
        return "\n".join(lines)


@dataclass(frozen=True)
class Members:
    """What a supernet says of a space.

    Attributes:
        run: its folder, a path or a URI.
        members: with their inherited accuracy and their costs, as finished trials.
        agreement: with a study, if there is one.
        bad: validation videos that could not be decoded.
    """

    run: str
    mlflow_run_id: str
    members: list[Trial]
    agreement: Agreement | None
    bad: list[BadVideo]


def supernet(
    recipe: Config,
    space_name: str,
    name: str | None = None,
    count: int = 100,
    seed: int = 0,
    study: str | None = None,
    echo: Callable[[str], None] = print,
) -> Members:
    """Train a space's supernet, unless that is done, and score members of the space with it.

    Args:
        recipe: of the training, but for the blocks, groups and depths that the space chooses from.
        space_name: a space whose members differ in nothing else.
        name: of the run; None: RECIPE-SPACE-supernet.
        count: members to score: the whole space if it is no larger, else so many at random.
        seed: of that choice.
        study: one whose finished trials are members of the supernet; they are scored too, and compared.

    Raises:
        StudyError: the space has other dimensions, the study's trials are no members, or a run of that name was trained
            with another recipe.
        UserError: as ``pipelines.training.train.train``, or too many validation videos are bad.
        StoppedError: as ``pipelines.training.train.train``.
    """
    space = load_space(space_name, recipe)
    config = supernet_recipe(space, space_name, recipe, name or f"{recipe.name}-{Path(space_name).stem}-supernet")
    chosen = list(draw_members(space, recipe, count, seed))
    trained = trained_alone(study, config) if study else []
    train_once(config, echo)
    start_ray()
    wait_for_room(config.scaling, echo)
    run = run_folder(config)
    everyone = [of for _, of in chosen] + [of for _, _, of in trained]
    top1, bad = score_members(run, [of.model.variant().architecture() for of in everyone], echo)
    members = [
        Trial(number, dict(member), state=FINISHED, metrics={TOP1: top1[number]} | static_costs(of))
        for number, (member, of) in enumerate(chosen)
    ]
    agreement = agree(trained, top1[len(chosen) :]) if trained else None
    record = read_record(run)
    assert record is not None
    found = Members(run, record["mlflow_run_id"], members, agreement, bad)
    keep(found, config, chosen, echo)
    return found


# --- what it holds -----------------------------------------------------------------------------------------------


def supernet_recipe(space: Space, space_name: str, recipe: Config, name: str) -> Config:
    """The recipe of a space's supernet. Validation while it trains is of one member: the recipe's own model, or where
    that is not in the space the last of each choice.

    Raises:
        StudyError: members differ in more than blocks, groups and depths, or none can be built.
    """
    first: dict[str, Value] = {}
    for dimension, values in space.dimensions.items():
        if isinstance(values, Range):
            raise StudyError(f"space {space_name} has the range {dimension}; members of a supernet differ in {SHARED}")
        first[dimension] = values[0]
    choices: dict[str, list[dict[Any, None]]] = {key: [{} for _ in range(4)] for key in SHARED}
    for dimension, values in space.dimensions.items():
        for value in cast(tuple[Value, ...], values):
            try:
                of = space.recipe(recipe, first | {dimension: value})
            except RecipeError:
                continue
            refuse_differences(f"space {space_name}: {dimension} {value!r}", recipe, of)
            for key, stages in choices.items():
                for stage, chosen in zip(stages, getattr(of.model.variant(), key), strict=True):
                    stage[chosen] = None
    if not all(choices["blocks"]):
        raise StudyError(f"space {space_name} has no member that can be built")
    own, tree = recipe.model.variant(), recipe.model_dump(mode="json")
    for key, stages in choices.items():
        values = [
            value if value in stage else list(stage)[-1] for stage, value in zip(stages, getattr(own, key), strict=True)
        ]
        set_value(tree, f"model.{key}", values)
    set_value(tree, "model.choices", {key: [list(stage) for stage in stages] for key, stages in choices.items()})
    set_value(tree, "tracking.log_model", False)  # it is many
    return Config.model_validate(tree | {"name": name})


def refuse_differences(what: str, recipe: Config, other: Config) -> None:
    """Refuse what differs in more than members of a supernet can.

    Raises:
        StudyError: names the first such key.
    """
    before, now = recipe.flat(), other.flat()
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key.removeprefix("model.") not in SHARED:
            raise StudyError(
                f"{what} has {key} {now.get(key)!r}, not {before.get(key)!r}; members of a supernet may differ in "
                f"model.{', model.'.join(SHARED)} alone, as those of the space same_width do"
            )


def draw_members(space: Space, recipe: Config, count: int, seed: int) -> Iterator[tuple[Member, Config]]:
    """Members of a space that can be built, each once, with their recipes: all if there are no more than ``count``."""
    rng, known = np.random.default_rng(seed), set()
    if size(space) <= count:
        grid = itertools.product(*(cast(tuple[Value, ...], values) for values in space.dimensions.values()))
        candidates = (dict(zip(space.dimensions, values, strict=True)) for values in grid)
    else:
        candidates = (space.random(rng) for _ in range(TRIES * count))
    for member in candidates:
        if len(known) == count:
            return
        if identity(member) in known:
            continue
        try:
            of = space.recipe(recipe, member)
        except RecipeError:
            continue
        known.add(identity(member))
        yield member, of


def trained_alone(name: str, config: Config) -> list[tuple[Trial, float, Config]]:
    """A study's finished trials, with their mean accuracy over seeds and their recipes.

    Args:
        config: of the supernet.

    Raises:
        StudyError: there are not two, or one is no member of the supernet.
    """
    study, _ = find_study(name)
    space, trials = space_of(study), read_trials(study.folder)
    found = []
    for trial in full(trials):
        of = space.recipe(study.recipe, trial.member)
        mine, theirs = config.model.variant(), of.model.variant()
        keys = ("dims", "windows", "frames", "image_size")
        different = ", ".join(
            f"{key} {getattr(theirs, key)}" for key in keys if getattr(mine, key) != getattr(theirs, key)
        )
        assert mine.choices is not None
        if different or not mine.choices.contains(theirs.architecture()):
            what = different or fronts.describe_member(trial.member)
            raise StudyError(f"trial {trial.number} of the study {study.name} is no member of {config.name}: {what}")
        found.append((trial, fronts.accuracy(trial, trials)[0], of))
    if len(found) < 2:
        raise StudyError(f"the study {study.name} has {len(found)} finished trials; an order needs at least 2")
    return found


# --- training and scoring ----------------------------------------------------------------------------------------


def train_once(config: Config, echo: Callable[[str], None]) -> None:
    """Train, unless a run of that name and recipe is finished.

    Raises:
        StudyError: the finished run had another recipe.
        UserError, StoppedError: as ``train``.
    """
    run = run_folder(config)
    record = read_record(run)
    if record is None or record["metrics"] is None:
        train(config, echo)
        return
    train_set, val_set = read_splits(config)
    lists = {"train": fingerprint(train_set), "val": fingerprint(val_set)}
    if changed := changes(record, check_data(config, train_set, val_set), lists):
        raise StudyError(
            f"{run} was trained with another recipe; choose another --name, delete that folder, or restore:"
            + "".join(f"\n  {key}: {change}" for key, change in changed.items())
        )
    echo(f"{config.name} is trained already, {run}")


class MemberScorer(Scorer):
    """A ``Scorer`` of all members: ``scores`` are the classes that they see, int64 ``[videos, members]``."""

    def __init__(self, config: dict[str, Any], architectures: Sequence[Architecture]):
        super().__init__(config)
        self.architectures = architectures
        self.members: list[PosMLPVideo] = []

    def score_clips(self, model: nn.Module, clips: Tensor) -> Tensor:
        if not self.members:
            self.members = [cast(Supernet, model).member(architecture) for architecture in self.architectures]
        seen = [video_scores(score_views(member, clips, self.config)).argmax(1) for member in self.members]
        return torch.stack(seen, 1)


def score_members(
    run: str, architectures: Sequence[Architecture], echo: Callable[[str], None]
) -> tuple[list[float], list[BadVideo]]:
    """The top-1 of each member on the validation split with the supernet's newest weights; and the bad videos.

    Raises:
        UserError: there is no whole checkpoint, too many videos are bad, or the workers fail.
    """
    checkpoint, problems = checkpoints.newest(run)
    if checkpoint is None:
        raise StudyError(f"{run} has no whole checkpoint: {'; '.join(problems)}; delete that folder to train it again")
    about, contents = checkpoints.load(checkpoint, [checkpoints.WEIGHTS])
    config, bad = about.recipe(), list[BadVideo]()
    manifest = read_split(config.data, "val")
    echo(f"{len(architectures)} members on {len(manifest.rows)} videos, each with the weights of {checkpoint}")
    labels = manifest.rows["label"].to_numpy()
    hits, videos = np.zeros(len(architectures)), 0
    blocks = good_scores(manifest, config, contents[checkpoints.WEIGHTS], bad, echo, MemberScorer, list(architectures))
    for places, seen in blocks:
        hits += (seen == labels[places][:, None]).sum(0)
        videos += len(places)
    return (hits / videos).tolist(), bad


def agree(trained: Sequence[tuple[Trial, float, Config]], inherited: Sequence[float]) -> Agreement:
    """How inherited accuracies and those of members trained alone order the members."""
    alone = [accuracy for _, accuracy, _ in trained]
    numbers = [trial.number for trial, _, _ in trained]
    if len(set(alone)) == 1 or len(set(inherited)) == 1:  # there is no order
        return Agreement(numbers, list(inherited), alone, float("nan"), float("nan"))
    ranks = (float(measure(inherited, alone).statistic) for measure in (stats.spearmanr, stats.kendalltau))
    return Agreement(numbers, list(inherited), alone, *ranks)


# --- what it leaves ----------------------------------------------------------------------------------------------


def keep(found: Members, config: Config, chosen: Sequence[tuple[Member, Config]], echo: Callable[[str], None]) -> None:
    """Write the members' front, table and recipes into the run's folder and its MLflow run.

    Raises:
        UserError: they cannot be written.
    """
    files = fronts.artifacts({config.name: found.members}, config, "gmacs")
    files["members.csv"] = files.pop("trials.csv")
    for number in {trial.number for cost in ("gmacs", "params") for trial in fronts.front(found.members, cost)}:
        name = f"{config.name}-{number:03d}"
        tree = without_password(chosen[number][1]).model_dump(mode="json") | {"name": name}
        head = f"# Member {number} of {config.name}: {found.members[number].metrics[TOP1]:.1%} with its weights.\n"
        files[f"recipes/{number:03d}.yaml"] = (head + yaml.safe_dump(tree, sort_keys=False)).encode()
    metrics = {"supernet/best_top1": max(trial.metrics[TOP1] for trial in found.members)}
    if found.agreement:
        files["agreement.png"] = front_figures.agreement(found.agreement.inherited, found.agreement.alone)
        metrics["supernet/spearman"] = found.agreement.spearman
        metrics["supernet/kendall"] = found.agreement.kendall
    tracker = Tracker.open(config, {}, found.mlflow_run_id, journal=journal_path(found.run), echo=echo)
    try:
        for path, content in files.items():
            storage.write_bytes(storage.join(found.run, f"{FOLDER}/{path}"), content)
            tracker.log_file(f"{FOLDER}/{path}", content)
        tracker.log(metrics, step=config.train.epochs)
    except OSError as error:
        raise StudyError(f"{found.run} cannot be written: {error}") from error
    finally:
        tracker.close("FINISHED")
