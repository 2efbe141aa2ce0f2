"""Time a study of short trials, and the same number of separate ``posmlp train`` runs of the same recipes.

    python benchmarks/search.py
    python benchmarks/search.py --trials 8 train.epochs=2

Both start with an empty clip cache and an empty MLflow store. The times include the start and the end of Ray.
CPU-seconds are those of the command and of all processes that it starts; one that lives for less than half a second may
be missed. "Memory of a trial" is the peak over time of the resident memory of all processes that serve one trial,
without those that decode: a page that n processes share counts as 1/n, the object store does not count. It contains the
model, whose own part (parameters, gradients, optimizer, activations) a process of its own measures for each trial: what
training steps add to the resident memory of a process that has trained before.
Runs on Linux.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch
from mlflow import MlflowClient

from pipelines.studies.study import Study, find_study, read_trials, study_space
from posmlp import create_model
from posmlp.config import Config, load_recipe
from posmlp.learn.learner import Learner
from posmlp.learn.parallel import parallelise
from posmlp.metrics import PERF_EPOCH_S
from posmlp.model.cost import reset_resident_peak, resident_peak, trim_heap
from posmlp.video.batch import Batch
from posmlp.video.motion import make_motion_set

POSMLP = [sys.executable, "-m", "pipelines.cli"]
SAMPLE_S = 0.5
MODEL_STEPS = 10  # of which the memory is measured
# Actors that serve one trial, as Ray names their processes: our own, and those of Ray Train.
TRIAL_ACTORS = ("TrialRun", "ResourceTrainable", "RayTrainWorker", "TrainController", "PlacementGroupCleaner")
TRIAL_ACTORS += ("DatasetManager", "SynchronizationActor", "RunChannel")


@dataclass
class Usage:
    """What a command uses.

    Attributes:
        seconds: wall-clock time.
        cpu: CPU-seconds by kind of process, as Ray names it.
        trial_mb: the largest sum of the memory of actors that serve trials at one time, MB.
        started: number of processes by kind.
    """

    seconds: float = 0.0
    cpu: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    trial_mb: float = 0.0
    started: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, other: Usage) -> None:
        """Add another command's use; of the memory, take the larger."""
        self.seconds += other.seconds
        self.trial_mb = max(self.trial_mb, other.trial_mb)
        for mine, theirs in ((self.cpu, other.cpu), (self.started, other.started)):
            for kind, amount in theirs.items():
                mine[kind] += amount  # type: ignore[assignment]


def kind_of(command: list[str]) -> str:
    """The kind of a process, from its command line: a task or actor by its name, else the program."""
    if found := re.match(r"ray::(\w+)", command[0] if command else ""):
        return found[1]
    words = [Path(word).name for word in command[:3] if not word.startswith("-")]
    return "posmlp" if "pipelines.cli" in command else words[-1] if words else "?"


def resident_mb(process: psutil.Process) -> float:
    """Memory of a process without the object store, shared pages in proportion, MB."""
    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    kilobytes = re.findall(r"^Pss_(?:Anon|File):\s+(\d+) kB", text, re.MULTILINE)
    return sum(map(int, kilobytes)) * 1024 / 1e6


def watch(pid: int, usage: Usage, over: threading.Event) -> None:
    """Sample a command's processes until it has ended."""
    latest: dict[psutil.Process, tuple[str, float]] = {}
    while not over.wait(SAMPLE_S):
        with suppress(psutil.Error):
            trials = 0.0
            for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
                with suppress(psutil.Error, OSError):  # it has ended
                    kind, times = kind_of(process.cmdline()), process.cpu_times()
                    if kind == "IDLE" and process in latest:  # keep the name of what it did before
                        kind = latest[process][0]
                    latest[process] = (kind, times.user + times.system)
                    if kind in TRIAL_ACTORS:
                        trials += resident_mb(process)
            usage.trial_mb = max(usage.trial_mb, trials)
    for kind, seconds in latest.values():
        usage.cpu[kind] += seconds
        usage.started[kind] += 1


def run(command: list[str], folder: Path) -> Usage:
    """Run a command that starts its own Ray; returns what it used."""
    usage, over, start = Usage(), threading.Event(), time.perf_counter()
    with open(folder / "log.txt", "a") as log:
        process = subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": "local"}, stdout=log, stderr=log)
    watcher = threading.Thread(target=watch, args=(process.pid, usage, over))
    watcher.start()
    code = process.wait()
    usage.seconds = time.perf_counter() - start
    over.set()
    watcher.join()
    if code:
        raise SystemExit(f"{' '.join(command)} ended with code {code}:\n{(folder / 'log.txt').read_text()[-3000:]}")
    return usage


def training_seconds(folder: Path) -> float:
    """Seconds of all training epochs in a folder's MLflow store."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    runs = [run for run in runs if PERF_EPOCH_S in run.data.metrics]  # not the study's own
    return sum(m.value for run in runs for m in client.get_metric_history(run.info.run_id, PERF_EPOCH_S))


def model_mb(config: Config) -> float:
    """The peak memory of training steps of a recipe's model in this process, which must be a new one, MB."""
    torch.set_num_threads(config.scaling.threads_per_worker or 1)
    first = config.train.model_copy(update={"global_batch": 2})
    train_steps(config.model_copy(update={"train": first}))  # loads what PyTorch loads late
    gc.collect()
    trim_heap()
    reset_resident_peak()
    before = resident_peak()
    train_steps(config)
    return (resident_peak() - before) / 1e6


def train_steps(config: Config) -> None:
    """Take some training steps on random clips."""
    model, batch = create_model(config.model.name, **config.model.overrides()), config.train.global_batch
    variant = config.model.variant()
    classes = tuple(map(str, range(variant.num_classes)))
    learner = Learner(parallelise(model, config, torch.device("cpu")), config, MODEL_STEPS, classes)
    shape = (batch, variant.frames, variant.image_size, variant.image_size, 3)
    for _ in range(MODEL_STEPS):
        clips = torch.randint(0, 256, shape, dtype=torch.uint8)
        learner.train_step(Batch(clips, torch.arange(batch) % len(classes), torch.ones(batch), torch.arange(batch)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe demo")
    parser.add_argument("--trials", type=int, default=8, help="number of trials (default: %(default)s)")
    parser.add_argument("--concurrent", type=int, default=2, help="trials at a time (default: %(default)s)")
    parser.add_argument("--study-only", action="store_true", help="leave the separate runs out")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as work:
        data = make_motion_set(Path(work, "motion"))
        study_folder, runs_folder = Path(work, "study"), Path(work, "separate")
        study_folder.mkdir()
        runs_folder.mkdir()

        def settings(folder: Path) -> list[str]:
            lists = [f"data.{split}.path={data}/{split}.csv" for split in ("train", "val")]
            own = [f"train.storage={folder}", f"data.cache_dir={folder}/cache", "tracking.log_model=false"]
            return ["train.epochs=2", "optim.warmup_epochs=1", *lists, *own, *args.overrides]

        search = ["--space", "block_types", "--searcher", "random", "--name", "s", "--trials", str(args.trials)]
        search += ["--concurrent", str(args.concurrent), "--no-asha"]
        found = {"study": run([*POSMLP, "tune", "demo", *search, *settings(study_folder)], study_folder)}
        study, _ = find_study(str(study_folder / "s"), Study)
        base = load_recipe("demo", settings(runs_folder))
        recipes = [study_space(study).recipe(base, trial.member) for trial in read_trials(study.folder)]
        if not args.study_only:
            found["separate runs"] = Usage()
            for number, config in enumerate(recipes):
                recipe = runs_folder / f"{number}.yaml"
                recipe.write_text(config.to_yaml())
                found["separate runs"].add(run([*POSMLP, "train", str(recipe), f"name=run-{number}"], runs_folder))
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
            models = sorted(pool.map(model_mb, recipes))
        print(f"{args.trials} trials, {args.concurrent} at a time\n")
        print("| | wall-clock, s | training epochs, s | CPU-seconds | memory of a trial, MB |\n|---|---|---|---|---|")
        for name, usage in found.items():
            folder, at_a_time = (study_folder, args.concurrent) if name == "study" else (runs_folder, 1)
            cpu, memory = sum(usage.cpu.values()), usage.trial_mb / at_a_time
            print(f"| {name} | {usage.seconds:.0f} | {training_seconds(folder):.0f} | {cpu:.0f} | {memory:.0f} |")
        print(f"\nof the memory, the model's own part: {models[0]:.0f} to {models[-1]:.0f} MB")
        if not args.study_only:
            runs, study_usage = found["separate runs"], found["study"]
            cpu_ratio = sum(runs.cpu.values()) / sum(study_usage.cpu.values())
            print(f"\nseparate runs / study: wall-clock {runs.seconds / study_usage.seconds:.2f}, CPU {cpu_ratio:.2f}")
        for name, usage in found.items():
            print(f"\nCPU-seconds of {name} by process (number of processes):")
            for kind in sorted(usage.cpu, key=lambda kind: -usage.cpu[kind])[:14]:
                print(f"  {kind}: {usage.cpu[kind]:.1f} ({usage.started[kind]})")


if __name__ == "__main__":
    main()
