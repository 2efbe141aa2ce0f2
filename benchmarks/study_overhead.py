"""Time a study of short trials, and the same number of separate ``posmlp train`` runs of the same recipes.

    python benchmarks/study_overhead.py
    python benchmarks/study_overhead.py --trials 8 train.epochs=2

Both start with an empty clip cache and an empty MLflow store. The times include the start and the end of Ray.
"training" is the time of the epochs' steps, including the wait for clips (decoding). "everything else" is start-up,
validation, checkpoints and the end. Trials of a study run concurrently, so their parts can add up to more than the
wall-clock time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mlflow import MlflowClient

from pipelines.studies.study import find_study, read_trials, study_space
from posmlp.config import load_recipe
from posmlp.metrics import PERF_DATA_WAIT_FRAC, PERF_EPOCH_S, PERF_FIRST_BATCH_S
from posmlp.video.motion import make_motion_set

POSMLP = [sys.executable, "-m", "pipelines.cli"]


def run_timed(command: list[str], folder: Path) -> float:
    """Run a command that starts its own Ray; returns the seconds that it takes."""
    env = os.environ | {"RAY_ADDRESS": "local"}
    start = time.perf_counter()
    with open(folder / "log.txt", "a") as log:
        subprocess.run(command, check=True, env=env, stdout=log, stderr=log)
    return time.perf_counter() - start


def training_times(folder: Path) -> tuple[float, float]:
    """Seconds of all training epochs in a folder's MLflow store, and the seconds of these that waited for clips."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    training = waiting = 0.0
    for run in client.search_runs([experiment.experiment_id for experiment in client.search_experiments()]):
        if PERF_EPOCH_S not in run.data.metrics:
            continue  # the study's own run
        names = (PERF_EPOCH_S, PERF_DATA_WAIT_FRAC, PERF_FIRST_BATCH_S)
        histories = [client.get_metric_history(run.info.run_id, name) for name in names]
        for seconds, share, first in zip(*histories, strict=True):
            training += seconds.value
            waiting += first.value + (seconds.value - first.value) * share.value
    return training, waiting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe demo")
    parser.add_argument("--trials", type=int, default=8, help="number of trials (default: %(default)s)")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as work:
        data = make_motion_set(Path(work, "motion"))
        study_folder, runs_folder = Path(work, "study"), Path(work, "separate")
        study_folder.mkdir()
        runs_folder.mkdir()

        def settings(folder: Path) -> list[str]:
            lists = [f"data.{split}.path={data}/{split}.csv" for split in ("train", "val")]
            own = [f"train.storage={folder}", f"data.cache_dir={folder}/cache", "tracking.log_model=false"]
            return ["train.epochs=2", *lists, *own, *args.overrides]

        search = ["--space", "block_types", "--searcher", "random", "--name", "s", "--trials", str(args.trials)]
        study_s = run_timed([*POSMLP, "tune", "demo", *search, *settings(study_folder)], study_folder)
        study, _ = find_study(str(study_folder / "s"))
        runs_s = 0.0
        for trial in read_trials(study.folder):
            config = study_space(study).recipe(load_recipe("demo", settings(runs_folder)), trial.member)
            recipe = runs_folder / f"{trial.number}.yaml"
            recipe.write_text(config.to_yaml())
            runs_s += run_timed([*POSMLP, "train", str(recipe), f"name=run-{trial.number}"], runs_folder)
        print("| | wall-clock, s | training, s | of it waiting for clips, s | everything else, s |")
        print("|---|---|---|---|---|")
        for name, seconds, folder in (
            ("separate runs", runs_s, runs_folder),
            ("trials of a study", study_s, study_folder),
        ):
            training, waiting = training_times(folder)
            rest = f"{seconds - training:.0f}" if name == "separate runs" else "overlaps with training"
            print(f"| {args.trials} {name} | {seconds:.0f} | {training:.0f} | {waiting:.0f} | {rest} |")
        print(f"\nseparate / study: {runs_s / study_s:.2f}")


if __name__ == "__main__":
    main()
