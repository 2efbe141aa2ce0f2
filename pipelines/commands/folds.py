"""``posmlp folds``: cross-validation, such as leave-one-subject-out."""

from __future__ import annotations

import argparse
import re
import time

from pipelines.commands.options import Commands, add_command, add_recipe, draw_data_of, positive
from posmlp.config import load_recipe

SETTINGS = ("by", "seeds", "concurrent", "shuffled")  # of a study of folds, by the names of their options
CHANGEABLE = {"seeds", "concurrent"}  # on resume


def add_commands(commands: Commands) -> None:
    folds = add_command(
        commands,
        "folds",
        run_folds,
        "cross-validate: hold each subject or group out once, and score all predictions together",
        after_interrupt="posmlp folds --resume STUDY resumes it",
        description="Cross-validate. Each value of a column of the training list is held out once, as in "
        "leave-one-subject-out. A model trains on the other videos to its last epoch, and predicts the held-out ones. "
        "The predictions of all folds are scored together: accuracy, UF1 and UAR.",
    )
    add_recipe(folds, "train.epochs=10 (for every fold)", required=False)
    folds.add_argument(
        "--by", metavar="COLUMN", help="column of the training list whose values are the folds, or folder"
    )
    folds.add_argument(
        "--seeds", type=positive, metavar="N", help="train each fold with N seeds, from train.seed on (default: 1)"
    )
    folds.add_argument("--name", help="name of the study (default: RECIPE-by-COLUMN)")
    folds.add_argument(
        "--resume",
        metavar="STUDY",
        help="resume a study, given by its folder or its name below runs/; only --seeds and --concurrent may be given "
        "again. A finished study prints its tables again",
    )
    folds.add_argument(
        "--concurrent", type=positive, help="folds that train at a time (default: as many as the cluster has room for)"
    )
    folds.add_argument(
        "--shuffled",
        action="store_true",
        default=None,
        help="also test each model on clips whose frames are shuffled, a control without motion",
    )


def run_folds(args: argparse.Namespace) -> int:
    """Run a new study of folds, or resume one; then print its tables. Exit code 1: a fold has failed."""
    from pydantic import ValidationError

    from pipelines.folds.cross_validate import cross_validate
    from pipelines.studies.study import FoldStudy, StudyError, explain_error, find_study
    from pipelines.tracking.uris import links_text, tracking_uri

    given = {key: value for key in SETTINGS if (value := getattr(args, key)) is not None}
    if args.resume:
        refused = ["RECIPE"] * bool(args.recipe) + ["--name"] * bool(args.name) + ["overrides"] * bool(args.overrides)
        refused += [f"--{key}" for key in given if key not in CHANGEABLE]
        if refused:
            raise StudyError(
                "--resume continues the study with the settings that it was started with; only --seeds and "
                f"--concurrent may be given, not {', '.join(refused)}"
            )
        study, _ = find_study(args.resume, FoldStudy)
        if given.get("seeds", study.seeds) < study.seeds:
            raise StudyError(f"--seeds {given['seeds']}: {study.name} has {study.seeds} already; give at least as many")
        study = study.model_copy(update=given)
    else:
        if not args.recipe or not args.by:
            raise StudyError("give a recipe and --by COLUMN, or --resume STUDY; see posmlp folds --help")
        recipe = load_recipe(args.recipe, args.overrides)
        name = args.name or re.sub(r"[^A-Za-z0-9._-]", "-", f"{recipe.name}-by-{args.by}")
        try:
            study = FoldStudy(name=name, recipe=recipe, **given)
        except ValidationError as error:
            raise StudyError(f"study {name}: {explain_error(error)}") from error
        study.check_recipe()
        draw_data_of(args.recipe, recipe)
    args.after_interrupt = f"posmlp folds --resume {study.folder} resumes it"
    start = time.perf_counter()
    result = cross_validate(study, resume=bool(args.resume))
    seconds, folder = time.perf_counter() - start, result.study.folder
    print(f"\n{result.results.describe()}\n")
    print(f"  {folder}, {seconds:.0f} s; there and in MLflow run {result.mlflow_run_id}: folds.md, tables, predictions")
    print(f"  {links_text(tracking_uri(result.study.recipe), result.links)}")
    return int(bool(result.results.unfinished))
