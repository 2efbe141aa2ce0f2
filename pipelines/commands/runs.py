"""``posmlp runs``, ``checkpoints``, ``sync`` and ``relocate``: what finished and interrupted runs have left."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from pipelines.commands.options import Commands, add_command
from posmlp import metrics as names


def add_commands(commands: Commands) -> None:
    add_runs(commands)
    add_checkpoints(commands)
    add_sync(commands)
    add_relocate(commands)


def add_runs(commands: Commands) -> None:
    listing = add_command(commands, "runs", run_runs, "list runs and studies with their state and result")
    listing.add_argument(
        "folder",
        nargs="?",
        default="runs",
        help="folder that holds them, train.storage of their recipes (default: runs)",
    )


def run_runs(args: argparse.Namespace) -> None:
    """Print one line for each run and study of a folder."""
    from posmlp import storage
    from posmlp.errors import UserError

    folder = storage.join(".", args.folder)
    try:
        rows = [row for each in storage.list_folders(folder) if (row := run_row(each) or study_row(each))]
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error}") from error
    if not rows:
        raise UserError(
            f"{folder} holds no run and no study; `posmlp train` and `posmlp tune` make them (train.storage)"
        )
    table = [("name", "state", "best validation"), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(2)]
    for name, state, value in table:
        print(f"{name:<{widths[0]}}  {state:<{widths[1]}}  {value}".rstrip())


def run_row(run: str) -> tuple[str, str, str] | None:
    """Return the name, state and best validation of a run as text; None if the folder is no run."""
    from pipelines.runs import checkpoints
    from pipelines.runs.record import read_record

    record = read_record(run)
    if record is None:
        return None
    entries, epochs = checkpoints.find(run), record["config"]["train"]["epochs"]
    done = max((entry.info.epoch for entry in entries if entry.info), default=0)
    if record["metrics"] == {}:
        state = "imported"
    elif record["metrics"] is not None:
        last_epoch = int(record["metrics"].get(names.EPOCH, epochs))
        state = (
            f"finished, {epochs} epochs" if last_epoch == epochs else f"ended early, {last_epoch} of {epochs} epochs"
        )
    else:
        state = f"{'running' if is_running(run) else 'not finished'}, {done} of {epochs} epochs"
    validated = [record["metrics"] or {}, *(entry.info.metrics for entry in checkpoints.best(entries, 1) if entry.info)]
    found = [(metrics[main.key], main.title) for metrics in validated if (main := names.main_metric(metrics))]
    return record["config"]["name"], state, "{:.1%} {}".format(*max(found)) if found else ""


def study_row(folder: str) -> tuple[str, str, str] | None:
    """Return the name, the number of trials by state, and the best trial of a study; None if the folder is no study."""
    from pipelines.studies.pareto import best_trial, reported_values
    from pipelines.studies.study import Study, StudySettings, TrialState, read_study, read_trials

    found = read_study(folder, StudySettings)
    if found is None:
        return None
    running, trials = is_running(folder), read_trials(folder)
    counts = Counter(
        "not finished" if trial.state == TrialState.RUNNING and not running else trial.state.value for trial in trials
    )
    states = ", ".join(f"{number} {state}" for state, number in counts.items())
    study, result = found[0], ""
    if isinstance(study, Study) and (best := best_trial(trials)):  # no fold is the best one
        result = f"{reported_values(trials)[best.number]:.1%} {study.main.title}, trial {best.number}"
    what = "study" if isinstance(study, Study) else "folds"
    return study.name, f"{'running ' * running}{what}, trials: {states or 'none'}", result


def is_running(run: str) -> bool:
    """Return whether a process drives the run or study; on a local storage, a process of this machine."""
    from pipelines.tracking.journal import is_held

    return is_held(run)


def add_checkpoints(commands: Commands) -> None:
    listing = add_command(commands, "checkpoints", run_checkpoints, "list a run's checkpoints and verify each")
    listing.add_argument("run_folder", metavar="RUN", help="folder of a run, or its name below runs/")


def run_checkpoints(args: argparse.Namespace) -> int:
    """Return exit code 1 if a checkpoint is damaged."""
    from pipelines.runs import checkpoints
    from pipelines.runs.record import find_run

    run = find_run(args.run_folder)
    entries = checkpoints.find(run, check=True)
    whole = [entry for entry in entries if entry.info]
    best = {entry.uri for entry in checkpoints.best(entries, 1)}
    found = [main for entry in whole if entry.info and (main := names.main_metric(entry.info.metrics))]
    title = found[0].title if found else names.MAIN_METRICS["recognition"].title
    print(f"{'step':>10}{'epoch':>7}{f'val {title}':>11}{'MB':>8}  {'written':<27}")
    for entry in entries:
        if entry.info is None:
            print(f"  {entry.problem}")
            continue
        marks = ["newest"] * (entry is whole[-1]) + ["best"] * (entry.uri in best)
        main = names.main_metric(entry.info.metrics)
        value = f"{entry.info.metrics[main.key]:.1%}" if main else ""
        columns = f"{entry.info.step:>10}{entry.info.epoch:>7}{value:>11}"
        print(f"{columns}{entry.info.bytes / 1e6:>8.1f}  {entry.info.time:<27}{', '.join(marks)}".rstrip())
    damaged = len(entries) - len(whole)
    print(f"{len(whole)} whole checkpoints in {run}" + (f", {damaged} damaged" if damaged else ""))
    return int(damaged > 0)


def add_sync(commands: Commands) -> None:
    sync = add_command(
        commands,
        "sync",
        run_sync,
        "deliver to MLflow what runs could not deliver while it was unreachable",
        after_interrupt="the same command delivers the rest",
    )
    sync.add_argument(
        "run_folders", nargs="+", metavar="RUN", help="folder of a run or a study, or its name below runs/"
    )


def run_sync(args: argparse.Namespace) -> int:
    """Return exit code 1 if something is still undelivered."""
    from pipelines.runs.record import find_run
    from pipelines.studies.study import StudyError, StudySettings, find_study, read_trials, trial_folder
    from pipelines.tracking.delivery import sync_journals
    from pipelines.tracking.journal import find_journals
    from posmlp import storage

    left = 0
    for name in args.run_folders:
        try:
            study, _ = find_study(name, StudySettings)
            folders = [study.folder, *(trial_folder(study, trial.number) for trial in read_trials(study.folder))]
            folders = [each for each in folders if find_journals(each)]
        except StudyError:  # it is a run, or the working copy of a run's journal
            folder = storage.join(".", name)
            folders = [folder if find_journals(folder) else find_run(name)]
        left += sum(map(sync_journals, folders))
    return int(left > 0)


def add_relocate(commands: Commands) -> None:
    relocate = add_command(
        commands, "relocate", run_relocate, "make a copied or moved MLflow database name the files next to it"
    )
    relocate.add_argument("database", type=Path, help="the SQLite file, for example runs/mlflow.db")


def run_relocate(args: argparse.Namespace) -> None:
    from pipelines.tracking.mlflow_client import relocate

    former = relocate(args.database)
    print("\n".join(f"{folder} is now the folder next to {args.database}" for folder in former) or "nothing to change")
