"""``posmlp checkpoints`` and ``posmlp sync``: what finished and interrupted runs have left."""

from __future__ import annotations

import argparse

from pipelines.commands.options import Commands, add_command
from posmlp import metrics as names


def add_commands(commands: Commands) -> None:
    add_checkpoints(commands)
    add_sync(commands)


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
    print(f"{'step':>10}{'epoch':>7}{'val top-1':>11}{'MB':>8}  {'written':<27}")
    for entry in entries:
        if entry.info is None:
            print(f"  {entry.problem}")
            continue
        marks = ["newest"] * (entry is whole[-1]) + ["best"] * (entry.uri in best)
        top1 = entry.info.metrics.get(names.VAL_TOP1)
        columns = f"{entry.info.step:>10}{entry.info.epoch:>7}{'' if top1 is None else f'{top1:.1%}':>11}"
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
    from pipelines.tracking.delivery import sync_journals
    from pipelines.tracking.uris import journal_path
    from pipelines.tuning.study import StudyError, find_study, read_trials, trial_folder

    left = 0
    for name in args.run_folders:
        try:
            study, _ = find_study(name)
            trials = [trial_folder(study, trial.number) for trial in read_trials(study.folder)]
            journals = [path for run in (study.folder, *trials) if (path := journal_path(run)).exists()]
        except StudyError:  # it is a run
            journals = [journal_path(find_run(name))]
        left += sum(sync_journals(journal.parent) for journal in journals)
    return int(left > 0)
