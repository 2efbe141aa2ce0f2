"""Small runs on the motion set or the scenes, for the tests that need one."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mlflow
import psutil
import ray
from mlflow import MlflowClient

from pipelines.runs import checkpoints
from pipelines.studies.study import Study
from pipelines.tracking.uris import tracking_uri
from posmlp.config import load_recipe


def lists_of(data_set):
    """The overrides that name the lists of the motion set, or of the scenes and their task."""
    lists = [f"data.{split}.path={data_set}/{split}.csv" for split in ("train", "val")]
    if not Path(data_set, "scenes.json").exists():
        return lists
    for split in ("train", "val"):
        lists += [f"data.{split}.{key}={data_set}/{split}_{key}.csv" for key in ("boxes", "excluded")]
        lists.append(f"data.{split}.root={data_set}/videos")
    return [
        "task=detection",
        "data.format=ava",
        f"data.classes={data_set}/actions.pbtxt",
        "detection.first_second=900",
        *lists,
    ]


def recipe_for(folder, data_set, *overrides):
    """A small run; ``data_set`` is the folder of the motion set or of the scenes, which decides about the task."""
    base = [
        "name=small",
        "model.frames=4",
        "model.image_size=32",
        *lists_of(data_set),
        "train.epochs=2",
        "train.global_batch=8",
        "optim.warmup_epochs=1",
        f"train.storage={folder}",
        "tracking.log_model=false",
    ]
    return load_recipe("demo", [*base, *overrides])


QUICK = ["scaling.threads_per_worker=1", "scaling.cpus_per_worker=0.5", "train.checkpoint_every_steps=1"]


def study_for(folder, data_set, *overrides, **settings):
    """A study of small runs, all of them to the end."""
    recipe = recipe_for(folder, data_set, *QUICK, f"data.cache_dir={folder}/cache", *overrides)
    settings = {"name": "look", "space": "block_types", "trials": 3, "searcher": "random", "asha": False} | settings
    return Study(recipe=recipe, **settings)


def with_broken(motion_set, folder, count):
    """A copy of val.csv whose first ``count`` videos are truncated."""
    header, *rows = (motion_set / "val.csv").read_text().splitlines()
    lines = [header]
    for i, row in enumerate(rows):
        path = motion_set / row.split(",")[0]
        if i < count:
            cut = folder / f"cut{i}.mp4"
            cut.write_bytes(path.read_bytes()[:200])
            path = cut
        lines.append(f"{path},{row.split(',', 1)[1]}")
    manifest = folder / "broken.csv"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def run_of(config):
    """The client of a recipe's MLflow store, and the only run there."""
    client = MlflowClient(tracking_uri(config))
    (run,) = client.search_runs([client.get_experiment_by_name("posmlp").experiment_id])
    return client, run


def start_cli(folder, data_set, *overrides, options=()):
    """Start ``posmlp train`` in its own process, on the tests' Ray; returns its recipe and the process."""
    config = recipe_for(folder, data_set, *overrides)
    recipe = folder / "recipe.yaml"
    recipe.write_text(config.to_yaml())
    env = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-m", "pipelines.cli", "train", str(recipe), *options]
    with open(folder / "log.txt", "a") as log:
        return config, subprocess.Popen(command, env=env, stdout=log, stderr=log, text=True)


def log_of(folder):
    """The output of all processes of ``start_cli``."""
    return (folder / "log.txt").read_text()


def wait_for_step(folder, process, step=1, seconds=300, storage=None):
    """Wait for a finished checkpoint of this step or a later one.

    Args:
        folder: has the log, and the run unless ``storage`` is given.
        storage: has the run.
    """
    deadline = time.monotonic() + seconds
    while not any(f.info and f.info.step >= step for f in checkpoints.find(str((storage or folder) / "small"))):
        assert process.poll() is None, log_of(folder)
        assert time.monotonic() < deadline, log_of(folder)
        time.sleep(0.05)


@contextmanager
def active_uri(uri: str) -> Iterator[None]:
    """Set MLflow's global tracking URI in a block. That also sets ``MLFLOW_TRACKING_URI``, which is restored."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def own_processes():
    """This process and those of the Ray that it has started, not those of another Ray that a test has started."""
    session = ray.get_runtime_context().get_session_name()
    yield psutil.Process()
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it has ended
            if any(session in argument for argument in child.cmdline()):
                yield from [child, *child.children(recursive=True)]


class ListeningSockets:
    """Records the sockets on which this process and its Ray listen during a block: address and process name."""

    def __init__(self):
        self.found, self.over = set(), threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def watch(self):
        while not self.over.wait(0.2):
            for process in own_processes():
                with suppress(psutil.Error):  # it has ended
                    for socket in process.net_connections("inet"):
                        if socket.status == psutil.CONN_LISTEN:
                            self.found.add((socket.laddr.ip.removeprefix("::ffff:"), process.name()))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.over.set()
        self.thread.join()
