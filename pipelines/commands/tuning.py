"""``posmlp tune``, ``posmlp supernet`` and ``posmlp front``: architecture search."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from pipelines.commands.options import (
    RESUME_HINT,
    Commands,
    add_command,
    add_recipe,
    draw_data_of,
    not_negative,
    positive,
    positive_float,
)
from posmlp.config import load_recipe
from posmlp.metrics import COSTS, MAIN_METRICS
from tune_spaces import list_spaces

# The settings of a study that the command line can set, by the names of their options.
SETTINGS = (
    *("space", "trials", "searcher", "against", "asha", "seed", "concurrent", "repeats", "hours", "prior"),
    *("budget_gmacs", "budget_ms", "budget_params"),
)
CHANGEABLE = {"trials", "concurrent", "repeats", "hours"}  # on resume; also --no-asha


def add_commands(commands: Commands) -> None:
    add_tune(commands)
    add_supernet(commands)
    add_front(commands)


def add_tune(commands: Commands) -> None:
    tune = add_command(
        commands,
        "tune",
        run_tune,
        "search a space: train members of it and draw the Pareto front",
        after_interrupt="posmlp tune --resume STUDY resumes it",
        description="Search a space: train members (a member is one model of the space) and draw their Pareto front.",
    )
    add_recipe(tune, "train.epochs=10 (for every trial)", required=False)
    tune.add_argument("--space", help=f"search space: {', '.join(list_spaces())}, or a Python file")
    tune.add_argument("--name", help="name of the study (default: RECIPE-SPACE)")
    tune.add_argument(
        "--resume",
        metavar="STUDY",
        help="resume a study, given by its folder or its name below runs/; only --trials, --concurrent, "
        "--repeats, --hours and --no-asha may be given; --no-asha also trains the trials that were stopped to the end",
    )
    tune.add_argument("--trials", type=positive, help="number of trials to train (default: 20)")
    tune.add_argument(
        "--searcher",
        choices=("grid", "random", "tpe", "nsga2"),
        help="how members are chosen; nsga2 needs --against (default: tpe)",
    )
    tune.add_argument(
        "--against",
        choices=COSTS,
        help="cost to minimise next to the accuracy (default: none)",
    )
    tune.add_argument(
        "--asha",
        action=argparse.BooleanOptionalAction,
        help="stop weak trials early by successive halving (ASHA); with --against, only those that others beat in both "
        "accuracy and cost (MO-ASHA) (default: --asha with --against, but not with --searcher grid)",
    )
    tune.add_argument("--seed", type=not_negative, help="seed of the search (default: 0)")
    tune.add_argument(
        "--concurrent", type=positive, help="trials that run at a time (default: as many as the cluster has room for)"
    )
    tune.add_argument(
        "--repeats",
        type=not_negative,
        metavar="N",
        help="after the search, train members whose place on the front is open with up to N fresh seeds each; these "
        "alone report a member (default: 0)",
    )
    tune.add_argument(
        "--hours",
        type=positive_float,
        metavar="H",
        help="start no trials after H hours, and finish those that run; if --repeats are wanted, the search has two "
        "thirds of H (default: no limit)",
    )
    tune.add_argument(
        "--prior",
        nargs="+",
        metavar="STUDY",
        help="earlier studies of the same space, from which the searcher learns: folders, names below runs/, or names "
        "in MLflow",
    )
    tune.add_argument("--budget-gmacs", type=positive_float, metavar="X", help="reject models above X GMACs per clip")
    tune.add_argument(
        "--budget-ms", type=positive_float, metavar="X", help="reject models above X milliseconds per clip, as measured"
    )
    tune.add_argument(
        "--budget-params", type=positive_float, metavar="X", help="reject models above X million parameters"
    )


def run_tune(args: argparse.Namespace) -> None:
    """Run a new study, or resume one; then print its Pareto front."""
    from pydantic import ValidationError

    from pipelines.studies.study import Study, StudyError, explain_error, find_study, read_study_hits, study_space

    given = {key: value for key in SETTINGS if (value := getattr(args, key)) is not None}
    if args.resume:
        refused = ["RECIPE"] * bool(args.recipe) + ["--name"] * bool(args.name)
        changeable = CHANGEABLE | ({"asha"} if given.get("asha") is False else set())
        refused += [f"--{key.replace('_', '-')}" for key in sorted(given.keys() - changeable)]
        if refused or args.overrides:
            raise StudyError(
                "--resume continues the study with the settings that it was started with; only --trials, --concurrent, "
                f"--repeats, --hours and --no-asha may be given, not {', '.join(refused) or 'overrides'}"
            )
        study, _ = find_study(args.resume, Study)
        study = study.model_copy(update=given)
    else:
        if not args.recipe or not args.space:
            raise StudyError("give a recipe and --space, or --resume STUDY; see posmlp tune --help")
        recipe = load_recipe(args.recipe, args.overrides)
        name = args.name or f"{recipe.name}-{Path(args.space).stem}"
        try:
            study = Study(name=name, recipe=recipe, **given)
        except ValidationError as error:
            raise StudyError(f"study {name}: {explain_error(error)}") from error
        study_space(study)  # what is wrong with it is said before data is drawn
        draw_data_of(args.recipe, recipe)
    from pipelines.studies import report
    from pipelines.tracking.uris import links_text, tracking_uri
    from pipelines.tuning.tune import tune

    args.after_interrupt = f"posmlp tune --resume {study.folder} resumes it"
    start = time.perf_counter()
    result = tune(study, resume=bool(args.resume))
    seconds = time.perf_counter() - start
    study, against = result.study, result.study.against or "gmacs"
    hits = read_study_hits(study, result.trials)
    text = report.describe_study(study.name, result.trials, study.main, against, hits=hits, study=study)
    print(f"\n{text}\n")
    print(f"  {study.folder}, {seconds:.0f} s; MLflow run {result.mlflow_run_id} has front.html, tables, recipes")
    print(f"  {links_text(tracking_uri(study.recipe), result.links)}")


def add_supernet(commands: Commands) -> None:
    supernet = add_command(
        commands,
        "supernet",
        run_supernet,
        "experimental: train a whole space at once with shared weights, and rank its members",
        after_interrupt=RESUME_HINT,
    )
    add_recipe(supernet, "train.epochs=100")
    supernet.add_argument(
        "--space",
        required=True,
        help="search space of block types, groups and depths: same_width, block_types, group_counts, depths, or a "
        "Python file",
    )
    supernet.add_argument("--name", help="name of the run (default: RECIPE-SPACE-supernet)")
    supernet.add_argument("--members", type=positive, default=100, help="most members to score (default: %(default)s)")
    supernet.add_argument(
        "--seed", type=not_negative, default=0, help="seed of the choice of members (default: %(default)s)"
    )
    supernet.add_argument(
        "--study", help="compare with the trials of this study, given by its folder or its name below runs/"
    )


def run_supernet(args: argparse.Namespace) -> None:
    from pipelines.studies import report
    from pipelines.tracking.uris import links_text, tracking_uri
    from pipelines.tuning.supernet import check_supernet, supernet

    recipe = load_recipe(args.recipe, args.overrides)
    check_supernet(recipe, args.space, args.name, args.study)  # what is wrong is said before data is drawn
    draw_data_of(args.recipe, recipe)
    result = supernet(recipe, args.space, name=args.name, count=args.members, seed=args.seed, study=args.study)
    main = MAIN_METRICS[recipe.task]
    print(f"\n{report.describe_study(Path(result.run).name, result.members, main, 'gmacs', inherited=True)}")
    if result.agreement:
        print(f"\n{result.agreement}")
    for video in result.bad:
        print(f"  not scored: {video.uri}: {video.reason}")
    print(f"\n  {result.run}/members has front.html, members.csv and the front's recipes; so has MLflow")
    print(f"  {links_text(tracking_uri(recipe), result.links)}")


def add_front(commands: Commands) -> None:
    front = add_command(commands, "front", run_front, "draw the Pareto front of studies, from MLflow alone")
    front.add_argument("studies", nargs="+", metavar="STUDY", help="names of studies; several are drawn in one figure")
    front.add_argument(
        "--against", choices=COSTS, default="gmacs", help="cost on the other axis (default: %(default)s)"
    )
    front.add_argument(
        "--out", type=Path, default=Path("front"), help="folder for figures and tables (default: %(default)s)"
    )
    front.add_argument("--uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else runs/mlflow.db)")


def run_front(args: argparse.Namespace) -> None:
    from pipelines.studies.logged_study import read_study_from_mlflow, write_studies

    uri = args.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('runs/mlflow.db').resolve()}"
    studies = [read_study_from_mlflow(name, uri) for name in args.studies]
    print(write_studies(studies, args.against, args.out))
