"""A study on disk: what it searches, and one record a trial, so that any process can go on with it.

A study has a folder, ``train.storage/NAME``, on any storage. ``study.json`` holds its settings; each trial is a run as
``posmlp train`` makes it, ``trial-000``, ``trial-001``, ..., whose folder also has ``trial.json``: the member of the
space, and how it ended. Nothing else is needed to resume: the searcher is told anew what the records say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from pipelines.runs.record import read_json, write_json
from posmlp import storage
from posmlp.config import Config, Positive, Section, describe
from posmlp.errors import UserError
from tune_spaces import Member, Space, Value, load_space

STUDY_FILE, TRIAL_FILE = "study.json", "trial.json"
RUNNING, FINISHED, STOPPED, FAILED, OVER = "running", "finished", "stopped early", "failed", "over budget"
TOP1 = "val/top1"
COSTS = {"latency": "cost/latency_ms", "gmacs": "cost/gmacs", "params": "cost/params_m"}  # metrics that trade off
UNITS = {"latency": "ms", "gmacs": "GMACs", "params": "M parameters"}

Budget = Annotated[float, Field(gt=0)] | None


class StudyError(UserError):
    """A study that cannot start or go on; the message is for the user."""


class Study(Section):
    """The settings of a study.

    Attributes:
        recipe: of every trial, but for what its member of the space says.
        space: a name in ``tune_spaces``, or a Python file.
        trials: to be trained; members over a budget do not count.
        against: a cost that is to be low, beside the accuracy that is to be high; None: accuracy alone.
        asha: stop trials early that are behind the others at the same epoch (asynchronous successive halving).
        seed: of the search; a trial's own is ``recipe.train.seed``.
        concurrent: trials at a time; None: as many as the cluster has room for.
        repeats: seeds with which each trial of the front is trained in the end.
        budget_gmacs, budget_ms, budget_params: the most that a member may cost: GMACs of a clip, milliseconds of a
            clip on the training device, millions of parameters.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    recipe: Config
    space: str
    trials: Positive = 20
    searcher: Literal["grid", "random", "tpe", "nsga2"] = "tpe"
    against: Literal["latency", "gmacs", "params"] | None = None
    asha: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    concurrent: Positive | None = None
    repeats: Positive = 1
    budget_gmacs: Budget = None
    budget_ms: Budget = None
    budget_params: Budget = None

    @model_validator(mode="after")
    def check_together(self) -> Study:
        """Refuse what no single setting shows to be impossible."""
        if self.asha and self.against:
            raise ValueError(
                f"asha stops trials by their accuracy alone, against {self.against} needs all trained to the end; "
                "leave one of them out"
            )
        if self.searcher == "nsga2" and not self.against:
            raise ValueError("nsga2 searches for a front, so it needs a cost to go against; add --against gmacs")
        return self

    @property
    def folder(self) -> str:
        """Where it lies, an absolute path or a URI."""
        return storage.join(self.recipe.train.storage, self.name)

    def budgets(self) -> dict[str, float]:
        """The most that a member may cost, by metric, of the costs that have a budget."""
        budgets = {"gmacs": self.budget_gmacs, "latency": self.budget_ms, "params": self.budget_params}
        return {COSTS[name]: budget for name, budget in budgets.items() if budget is not None}

    def trial_recipe(self, space: Space, member: Member, number: int, seed: int) -> Config:
        """The recipe of a trial's run.

        Raises:
            RecipeError: such a model cannot be built.
        """
        config = space.recipe(self.recipe, member)
        train = config.train.model_copy(update={"storage": self.folder, "seed": seed})
        tracking = config.tracking.model_copy(update={"log_model": False})  # of the best one, at the end
        return config.model_copy(update={"name": f"trial-{number:03d}", "train": train, "tracking": tracking})


@dataclass(frozen=True)
class Trial:
    """One member of the space, and what came of it.

    Attributes:
        number: its place in the study, from 0.
        seed: of its training.
        ask: how many members the searcher had been asked for before it, those left out included; -1 if it was not.
        repeats: the number of the trial that has the same member with the first seed, if this is not it.
        notes: what the searcher wants to know of it when the study goes on.
        state: ``running``, ``finished``, ``stopped early``, ``failed`` or ``over budget``.
        reason: why it failed, or was not trained.
        metrics: of its last epoch, and its costs.
        timed: its latency was measured beside those of the others.
    """

    number: int
    member: dict[str, Value]
    seed: int = 0
    ask: int = -1
    repeats: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    state: str = RUNNING
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    mlflow_run_id: str | None = None
    timed: bool = False


def find_study(text: str) -> tuple[Study, str]:
    """A study that is given by its folder or, below ``runs``, by its name; and its MLflow run.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    for folder in (storage.join(".", text), storage.join("runs", text)):
        if found := read_study(folder):
            return found
    raise StudyError(f"no study {text}: neither {text} nor runs/{text} has a {STUDY_FILE}; give its folder")


def write_study(study: Study, mlflow_run_id: str) -> None:
    """Note a study's settings, and the MLflow run that stands for it.

    Raises:
        UserError: they cannot be written.
    """
    write_json(storage.join(study.folder, STUDY_FILE), study.model_dump(mode="json") | {"mlflow_run_id": mlflow_run_id})


def read_study(folder: str) -> tuple[Study, str] | None:
    """The settings in a study's folder, and its MLflow run; None if there is no study.

    Raises:
        UserError: they cannot be read.
    """
    uri = storage.join(folder, STUDY_FILE)
    tree = read_json(uri)
    if tree is None:
        return None
    try:
        run_id = str(tree.pop("mlflow_run_id"))
        return Study.model_validate(tree), run_id
    except (KeyError, ValidationError) as error:
        raise StudyError(f"{uri} is not a study: {explain(error)}") from error


def write_trial(study: Study, trial: Trial) -> None:
    """Note a trial; atomically.

    Raises:
        UserError: it cannot be written.
    """
    write_json(storage.join(trial_folder(study, trial.number), TRIAL_FILE), asdict(trial))


def read_trials(folder: str) -> list[Trial]:
    """All trials of a study, by number.

    Raises:
        UserError: one cannot be read.
    """
    trials = []
    for uri in storage.list_folders(folder):
        if uri.rpartition("/")[2].startswith("trial-") and (tree := read_json(storage.join(uri, TRIAL_FILE))):
            trials.append(Trial(**tree))
    return sorted(trials, key=lambda trial: trial.number)


def trial_folder(study: Study, number: int) -> str:
    """The folder of a trial's run."""
    return storage.join(study.folder, f"trial-{number:03d}")


def explain(error: Exception) -> str:
    """A validation error in a line."""
    return "; ".join(map(describe, error.errors())) if isinstance(error, ValidationError) else repr(error)


def full(trials: Iterable[Trial]) -> list[Trial]:
    """The trials that count for the front: trained to the end, of the first seed."""
    return [trial for trial in trials if trial.state == FINISHED and trial.repeats is None]


def over_budget(budgets: Mapping[str, float], costs: Mapping[str, float]) -> str:
    """Which budget a model is over, in words; empty if it keeps to those whose cost is given.

    Args:
        budgets, costs: by metric.
    """
    for name, budget in budgets.items():
        if costs.get(name, 0) > budget:
            return f"{name} {costs[name]:.4g} is over the budget of {budget:g}"
    return ""


def space_of(study: Study) -> Space:
    """The space that a study searches."""
    return load_space(study.space, study.recipe)
