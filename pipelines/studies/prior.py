"""Earlier studies of the same space, from which the searcher of a new one learns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipelines.runs.record import read_json, write_json
from pipelines.studies.logged_study import read_study_from_mlflow
from pipelines.studies.study import STUDY_FILE, Study, StudyError, Trial, fully_trained, read_study, read_trials
from pipelines.tracking.uris import tracking_uri
from posmlp import storage
from tune_spaces import Range, Space, Value

PRIOR_FILE = "prior.json"  # in the folder of the new study, so that a resume needs the earlier ones no more


@dataclass(frozen=True)
class Prior:
    """What an earlier study knows.

    Attributes:
        name: as the user named it.
        trials: its fully trained trials with the first seed and a finite main metric, ordered by number.
    """

    name: str
    trials: list[Trial]


def find_priors(study: Study, space: Space) -> list[Prior]:
    """Find the earlier studies that a study names: by folder, by name below its own storage or ``runs``, or in MLflow.

    Raises:
        StudyError: there is no such study, it has another task or space, or it has no fully trained trial.
    """
    return [find_prior(name, study, space) for name in dict.fromkeys(study.prior)]


def find_prior(name: str, study: Study, space: Space) -> Prior:
    """Find one earlier study; see ``find_priors``."""
    folders = [storage.join(".", name), storage.join(study.recipe.train.storage, name), storage.join("runs", name)]
    known = {folder: found[0] for folder in folders if (found := read_study(folder, Study))}
    if known:
        folder, earlier = next(iter(known.items()))
        trials = read_trials(folder)
    else:
        try:
            logged = read_study_from_mlflow(name, tracking_uri(study.recipe), "tracking.uri")
        except StudyError as error:
            raise StudyError(
                f"--prior {name}: neither {name} nor {folders[1]} has a {STUDY_FILE}, and {error}"
            ) from error
        earlier, trials = logged.study, logged.trials
    if earlier.recipe.task != study.recipe.task:
        raise StudyError(
            f"--prior {name} is a study of {earlier.recipe.task} and this one of {study.recipe.task}: its "
            f"{earlier.main.title} cannot be compared with {study.main.title}; leave it out"
        )
    trained = [trial for trial in fully_trained(trials) if math.isfinite(trial.value)]
    if not trained:
        raise StudyError(f"--prior {name}: it has no fully trained trial to learn from; leave it out")
    return Prior(name, [replace(trial, member=to_member(trial, name, study.space, space)) for trial in trained])


def to_member(trial: Trial, prior: str, space_name: str, space: Space) -> dict[str, Value]:
    """The member of an earlier trial as one of this space.

    MLflow stores values as text, so a value is also recognised by its text.

    Raises:
        StudyError: it is none; the message names the first difference.
    """
    member = {}
    problem = f"--prior {prior} searched another space than {space_name}"
    for name, values in space.dimensions.items():
        if name not in trial.member:
            raise StudyError(f"{problem}: trial {trial.number} has no dimension {name}; leave it out")
        value = trial.member[name]
        texts = {str(each): each for each in values} if isinstance(values, tuple) else {}
        if not is_value_of(values, value) and str(value) not in texts:
            known = f"{values.low} to {values.high}" if isinstance(values, Range) else ", ".join(map(str, values))
            raise StudyError(
                f"{problem}: trial {trial.number} has {name} {value}, which is none of {known}; leave it out"
            )
        member[name] = texts.get(str(value), value)
    for name in trial.member:
        if name not in space.dimensions:
            raise StudyError(f"{problem}: trial {trial.number} has a dimension {name} more; leave it out")
    return member


def is_value_of(values: tuple[Value, ...] | Range, value: Value) -> bool:
    """Return whether a dimension has a value."""
    if isinstance(values, Range):
        return isinstance(value, int | float) and values.low <= value <= values.high
    return value in values


def write_priors(study: Study, priors: Sequence[Prior]) -> None:
    """Store what earlier studies know in a study's folder.

    Raises:
        UserError: it cannot be written.
    """
    if priors:
        records = {each.name: [trial.to_record() for trial in each.trials] for each in priors}
        write_json(storage.join(study.folder, PRIOR_FILE), records)


def read_priors(study: Study) -> list[Prior]:
    """What the earlier studies of a stored study know.

    Raises:
        StudyError: it is not there.
    """
    if not study.prior:
        return []
    uri = storage.join(study.folder, PRIOR_FILE)
    records = read_json(uri)
    if records is None:
        raise StudyError(
            f"the study has --prior {' '.join(study.prior)}, but no {uri}; restore it, or start a new study"
        )
    return [Prior(name, [Trial.from_record(trial) for trial in trials]) for name, trials in records.items()]
