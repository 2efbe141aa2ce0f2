"""A study on disk: its settings, and one record per trial, so that any process can resume it.

A study has a folder, ``train.storage/NAME``, on any storage. ``study.json`` holds its settings. Each trial is a run
like those of ``posmlp train``, in a folder ``trial-000``, ``trial-001``, ..., which also has ``trial.json``: the member
of the search space, and how the trial ended. Nothing else is needed to resume: the searcher is given the trials again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from pipelines.runs.record import read_hits, read_json, write_json
from pipelines.tracking.uris import without_secrets
from posmlp import storage
from posmlp.config import NAME, Config, Positive, Section, ValSplitSection, describe
from posmlp.errors import UserError
from posmlp.metrics import (
    COST_GMACS,
    COST_LATENCY_MS,
    COST_PARAMS_M,
    COSTS,
    MAIN_METRICS,
    MainMetric,
    main_metric,
)
from posmlp.text import quantity
from tune_spaces import Member, Space, Value, load_space

STUDY_FILE, TRIAL_FILE = "study.json", "trial.json"
TRIAL_KEYS = {"suggestion": "ask", "repeat_of": "repeats", "sampler_attrs": "notes"}  # field -> key in trial.json
OPTIONAL_KEYS = {
    "curve",
    "rejected",
    "first_latency_ms",
}  # of trial.json; left out if they are empty, as earlier versions did

BUDGET_OPTIONS = {COST_GMACS: "--budget-gmacs", COST_LATENCY_MS: "--budget-ms", COST_PARAMS_M: "--budget-params"}
OVER_WORDS = {  # metric -> its value, as in the message that it is over a budget
    COST_GMACS: "{:.4g} GMACs are",
    COST_LATENCY_MS: "latency {:.4g} ms is",
    COST_PARAMS_M: "{:.4g} M parameters are",
}

Budget = Annotated[float, Field(gt=0)] | None


class StudyError(UserError):
    """A study cannot start or resume. The message is for the user."""


class StudySettings(Section):
    """What the settings of a search and of a study of folds have in common.

    Attributes:
        name: of the study, and of its folder.
        recipe: the recipe of every trial, except for the keys that its member sets.
        concurrent: number of trials that run at a time; None: as many as the cluster has room for.
    """

    COMMAND: ClassVar[str] = ""  # that runs such a study

    name: Annotated[str, Field(pattern=NAME)]
    recipe: Config
    concurrent: Positive | None = None

    @property
    def folder(self) -> str:
        """The study's folder, an absolute path or a URI."""
        return storage.join(self.recipe.train.storage, self.name)

    @property
    def main(self) -> MainMetric:
        """The main metric of the recipe's task."""
        return MAIN_METRICS[self.recipe.task]

    @property
    def resume_command(self) -> str:
        """The command that resumes it."""
        return f"posmlp {self.COMMAND} --resume {self.folder}"

    def budgets(self) -> dict[str, float]:
        """The largest allowed costs by metric name; costs without a budget are left out."""
        return {}


class Study(StudySettings):
    """The settings of a search. It maximises the main metric of the recipe's task.

    Attributes:
        space: a name in ``tune_spaces``, or a Python file.
        trials: number of trials to train; members over a budget do not count.
        searcher: the search algorithm.
        against: a cost to minimise while the main metric is maximised; None: that is the only objective.
        asha: stop trials early by asynchronous successive halving: those that are behind the other trials at the same
            epoch (ASHA) or, with ``against``, that others beat in both the main metric and the cost
            (MO-ASHA). The default with ``against``, but not for a grid.
        seed: seed of the search; the seed of the trials' training is ``recipe.train.seed``.
        hours: once these have passed since a call's start no trials start, and those that run are finished;
            None: no limit.
        prior: earlier studies from which the searcher learns, by folder or name.
        repeats: the most fresh seeds that a member is trained with after the search. They alone report it.
        budget_gmacs, budget_ms, budget_params: the largest allowed cost of a member: GMACs per clip, milliseconds per
            clip on the training device, millions of parameters.
    """

    COMMAND: ClassVar[str] = "tune"

    space: str
    trials: Positive = 20
    searcher: Literal["grid", "random", "tpe", "nsga2"] = "tpe"
    against: Literal["latency", "gmacs", "params"] | None = None
    asha: bool = Field(default_factory=lambda known: bool(known.get("against")) and known.get("searcher") != "grid")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    hours: Annotated[float, Field(gt=0)] | None = None
    prior: tuple[str, ...] = ()
    repeats: Annotated[int, Field(ge=0)] = 0
    budget_gmacs: Budget = None
    budget_ms: Budget = None
    budget_params: Budget = None

    @model_validator(mode="after")
    def check_together(self) -> Study:
        """Refuse combinations of settings that cannot work together."""
        if self.searcher == "nsga2" and not self.against:
            raise ValueError("nsga2 searches a Pareto front, which needs a cost; add --against gmacs")
        return self

    @property
    def goal(self) -> str:
        """What the study optimises, in words."""
        return self.main.title + (f" against {self.against}" if self.against else "")

    def budgets(self) -> dict[str, float]:
        """The largest allowed costs by metric name; costs without a budget are left out."""
        budgets = {"gmacs": self.budget_gmacs, "latency": self.budget_ms, "params": self.budget_params}
        return {COSTS[name]: budget for name, budget in budgets.items() if budget is not None}

    def trial_recipe(self, space: Space, member: Member, number: int, seed: int) -> Config:
        """The recipe of a trial's run.

        Raises:
            RecipeError: such a model cannot be built.
        """
        config = space.recipe(self.recipe, member)
        train = config.train.model_copy(update={"storage": self.folder, "seed": seed})
        tracking = config.tracking.model_copy(update={"log_model": False})  # the study logs its best model at the end
        return config.model_copy(update={"name": f"trial-{number:03d}", "train": train, "tracking": tracking})


class FoldStudy(StudySettings):
    """The settings of a study of folds: each fold's videos are held out once, with every seed.

    Attributes:
        by: the column of the training lists whose values are the folds, or ``folder``.
        values: the folds; the first start fills them in, as ``videos``.
        videos: fingerprint of the training videos and their folds.
        seeds: number of seeds: ``recipe.train.seed`` and those that follow it.
        shuffled: also test each model on clips whose frames are shuffled.
    """

    COMMAND: ClassVar[str] = "folds"

    by: str
    values: tuple[str, ...] = ()
    videos: str = ""
    seeds: Positive = 1
    shuffled: bool = False

    def describe(self) -> str:
        """The folds and seeds in words."""
        return f"{quantity(len(self.values), 'fold')} by {self.by}, {quantity(self.seeds, 'seed')}"

    def check_recipe(self) -> None:
        """Refuse a recipe whose runs would choose by the held-out videos, or whose task has no pooled scores.

        Raises:
            StudyError: the message says which key to change.
        """
        recipe = self.recipe
        if recipe.task != "recognition":
            raise StudyError(
                f"posmlp folds is for task: recognition, and the recipe {recipe.name} has task: {recipe.task}; train "
                "it with posmlp train"
            )
        if recipe.train.patience is not None:
            raise StudyError(
                f"train.patience {recipe.train.patience} ends a run by its validation videos, which are the held-out "
                "ones here: they would choose the epoch that they are tested at. Set train.patience=null; every fold "
                "trains all of train.epochs"
            )
        if self.shuffled and recipe.data.frame_order == "shuffled":
            raise StudyError("--shuffled compares with ordered frames, but data.frame_order is shuffled; leave one out")

    def fold_recipe(self, fold: str, number: int, seed: int) -> Config:
        """The recipe of the run that holds a fold out: nothing of its videos chooses anything.

        It is tested after the last epoch alone, and no other checkpoint is kept.
        """
        recipe = self.recipe
        data = recipe.data.model_copy(update={"val": ValSplitSection(where={self.by: fold}), "group_by": None})
        train = recipe.train.model_copy(update={"storage": self.folder, "seed": seed, "keep_best": 0})
        once = recipe.eval.model_copy(update={"every": recipe.train.epochs})
        tracking = recipe.tracking.model_copy(update={"log_model": False})
        sections = {"data": data, "train": train, "eval": once, "tracking": tracking}
        return recipe.model_copy(update={"name": f"trial-{number:03d}", **sections})

    def all_trials(self) -> list[Trial]:
        """Every fold with every seed, as trials that have not started. More seeds add trials at the end."""
        first = self.recipe.train.seed
        pairs = [(fold, seed) for seed in range(first, first + self.seeds) for fold in self.values]
        return [Trial(number, {"fold": fold, "seed": seed}, seed) for number, (fold, seed) in enumerate(pairs)]


Settings = TypeVar("Settings", bound=StudySettings)


class TrialState(StrEnum):
    """How far a trial is. The values are those in ``trial.json`` and in MLflow's tag ``trial.state``."""

    RUNNING = "running"
    FINISHED = "finished"  # trained to the last epoch
    STOPPED = "stopped early"  # by successive halving, which may resume it later
    FAILED = "failed"
    OVER_BUDGET = "over budget"  # not trained, because its cost is over a budget


@dataclass(frozen=True)
class Trial:
    """One member of the search space, trained once.

    Attributes:
        number: the trial's number in the study, from 0.
        member: the value of each dimension.
        seed: seed of its training.
        suggestion: number of the searcher's suggestion, from 0; those that were not trained count too. -1 for a repeat.
        repeat_of: number of the trial that this one repeats with another seed; None if it is no repeat.
        sampler_attrs: what the searcher stored with its suggestion; a resumed study gives it back to the searcher.
        state: how far it is.
        reason: why it failed, was stopped, or was not trained.
        metrics: the metrics of its last epoch, and its costs.
        timed: its latency was measured in turns with the other trials' models, after the search.
        first_latency_ms: of a timed trial, the latency that was measured before its training.
        curve: the main metric after each validated epoch, as far as it was recorded.
        rejected: what the searcher suggested before it and a budget refused without a measurement: for each, ``member``
            and ``sampler_attrs``. The searcher learns from these.
    """

    number: int
    member: dict[str, Value]
    seed: int = 0
    suggestion: int = -1
    repeat_of: int | None = None
    sampler_attrs: dict[str, Any] = field(default_factory=dict)
    state: TrialState = TrialState.RUNNING
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    mlflow_run_id: str | None = None
    timed: bool = False
    curve: dict[int, float] = field(default_factory=dict)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    first_latency_ms: float | None = None

    @property
    def value(self) -> float:
        """The main metric of the trial's task, 0 to 1; NaN: not known."""
        main = main_metric(self.metrics)
        return self.metrics[main.key] if main else math.nan

    @property
    def search_metrics(self) -> dict[str, float]:
        """The metrics by which a search compares trials: with the latency before training, the only one that all have.

        After a search only fully trained trials are timed again. A study with more trials would compare the two kinds.
        """
        first = {} if self.first_latency_ms is None else {COST_LATENCY_MS: self.first_latency_ms}
        return self.metrics | first

    def to_record(self) -> dict[str, Any]:
        """The trial as it is in ``trial.json``; JSON makes text of a curve's epochs."""
        record = {TRIAL_KEYS.get(each.name, each.name): getattr(self, each.name) for each in fields(self)}
        return {key: value for key, value in record.items() if value or key not in OPTIONAL_KEYS}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Trial:
        """A trial from its ``trial.json``; keys that are missing have their defaults."""
        names = {TRIAL_KEYS.get(each.name, each.name): each.name for each in fields(cls)}
        values = {names[key]: value for key, value in record.items()}
        curve = {int(epoch): value for epoch, value in values.get("curve", {}).items()}
        return cls(**values | {"state": TrialState(record["state"]), "curve": curve})


def find_study(text: str, kind: type[Settings]) -> tuple[Settings, str]:
    """Find a study by its folder or, below ``runs``, by its name.

    Args:
        kind: as of ``read_study``.

    Returns:
        The study, and the id of its MLflow run.

    Raises:
        UserError: there is no such study, it cannot be read, or its folder was moved.
    """
    for folder in (storage.join(".", text), storage.join("runs", text)):
        if found := read_study(folder, kind):
            home = found[0].folder
            if read_json(storage.join(home, STUDY_FILE)) is None:
                raise StudyError(
                    f"{folder} was moved from {home}; move it back, or correct recipe.train.storage in its {STUDY_FILE}"
                )
            return found
    raise StudyError(f"no study {text}: neither {text} nor runs/{text} has a {STUDY_FILE}; give its folder")


def write_study(study: StudySettings, mlflow_run_id: str) -> None:
    """Write ``study.json``: a study's settings, and the id of its MLflow run.

    Raises:
        UserError: it cannot be written.
    """
    write_json(storage.join(study.folder, STUDY_FILE), study.model_dump(mode="json") | {"mlflow_run_id": mlflow_run_id})


def read_study(folder: str, kind: type[Settings]) -> tuple[Settings, str] | None:
    """Read a study's ``study.json``.

    Args:
        kind: what it must be; ``StudySettings``: any kind.

    Returns:
        The study, and the id of its MLflow run; None if the folder holds no study.

    Raises:
        UserError: it cannot be read, or is of another kind.
    """
    uri = storage.join(folder, STUDY_FILE)
    tree = read_json(uri)
    if tree is None:
        return None
    try:
        run_id = str(tree.pop("mlflow_run_id"))
        study = FoldStudy.model_validate(tree) if "by" in tree else parse_study(tree)
    except (KeyError, ValidationError) as error:
        raise StudyError(f"{uri} is not a study: {explain_error(error)}") from error
    if not isinstance(study, kind):
        raise StudyError(
            f"{folder} is a study of posmlp {study.COMMAND}, not of posmlp {kind.COMMAND}: resume it with "
            f"{study.resume_command}, or name another study"
        )
    return study, run_id


def parse_study(tree: Mapping[str, Any]) -> Study:
    """A study from its settings as plain data.

    Earlier versions, whose studies have no ``hours``, counted the first seed among the repeats.

    Raises:
        ValidationError: they are wrong.
    """
    old = {"repeats": max(0, tree["repeats"] - 1)} if "hours" not in tree and "repeats" in tree else {}
    return Study.model_validate({**tree, **old})


def write_trial(study: StudySettings, trial: Trial) -> None:
    """Write a trial's ``trial.json``, atomically.

    Raises:
        UserError: it cannot be written.
    """
    write_json(storage.join(trial_folder(study, trial.number), TRIAL_FILE), trial.to_record())


def check_unchanged(study: StudySettings, found: Any, trials: list[Trial]) -> None:
    """Check that a study's records are still as they were read.

    Args:
        found: of ``read_study``.
        trials: of ``read_trials``.

    Raises:
        StudyError: another process has changed them.
    """
    now = read_study(study.folder, type(study)), read_trials(study.folder)
    if repr(now) != repr((found, trials)):  # as text, because a metric that is not a number does not equal itself
        raise StudyError(
            f"another process has changed {study.folder} while this one waited; resume it with {study.resume_command}"
        )


def read_trials(folder: str) -> list[Trial]:
    """Read all trials of a study's folder, ordered by number.

    Raises:
        UserError: one of them cannot be read.
    """
    trials = []
    for uri in storage.list_folders(folder):
        if uri.rpartition("/")[2].startswith("trial-") and (record := read_json(storage.join(uri, TRIAL_FILE))):
            try:
                trials.append(Trial.from_record(record))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise StudyError(
                    f"{storage.join(uri, TRIAL_FILE)} is not a trial of this version ({reason}); use the version that "
                    "wrote it, or remove the trial's folder"
                ) from error
    return sorted(trials, key=lambda trial: trial.number)


def read_study_hits(study: Study, trials: Iterable[Trial]) -> dict[int, bytes]:
    """The per-video results of the repeats with fresh seeds (``HITS_FILE``) by trial number, where their runs have one.

    Runs of detection have none.

    Raises:
        UserError: one of them cannot be read.
    """
    repeats = [t.number for t in trials if t.repeat_of is not None and t.state == TrialState.FINISHED]
    found = ((number, read_hits(trial_folder(study, number))) for number in repeats)
    return {number: hits for number, hits in found if hits is not None}


def trial_folder(study: StudySettings, number: int) -> str:
    """The folder of a trial's run."""
    return storage.join(study.folder, f"trial-{number:03d}")


def study_space(study: Study) -> Space:
    """The search space of a study.

    Raises:
        UserError: there is no such space, or it is wrong.
    """
    return load_space(study.space, study.recipe)


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


def fully_trained(trials: Iterable[Trial]) -> list[Trial]:
    """The trials that were trained to the end, without the repeats with other seeds."""
    return [trial for trial in trials if trial.state == TrialState.FINISHED and trial.repeat_of is None]


def over_budget(budgets: Mapping[str, float], costs: Mapping[str, float]) -> str:
    """Which budget a model is over, in words; empty if it is within all of them.

    Args:
        budgets: the largest allowed costs, by metric name.
        costs: the model's costs, by metric name; a budget is not checked if its cost is not here.
    """
    for name, budget in budgets.items():
        if costs.get(name, 0) > budget:
            return f"{OVER_WORDS[name].format(costs[name])} over {BUDGET_OPTIONS[name]} {budget:g}"
    return ""


def explain_error(error: Exception) -> str:
    """Describe why settings are not valid, in one line."""
    return "; ".join(map(describe, error.errors())) if isinstance(error, ValidationError) else repr(error)
