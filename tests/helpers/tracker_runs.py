"""Trackers of small runs, and what of theirs is in a database."""

import sqlite3
from collections import Counter

import mlflow
import torch

from pipelines.registry.logged_models import CheckpointLink
from pipelines.tracking.journal import Journal
from pipelines.tracking.tracker import Tracker
from posmlp.config import load_recipe


def recipe(folder, *overrides):
    return load_recipe("demo", ["name=small", f"train.storage={folder}", *overrides])


def start(folder, *overrides, run_id=None):
    return Tracker.open(recipe(folder, *overrides), {"a": "b"}, run_id, journal=Journal(folder / "journal.jsonl"))


def rows(database, run_id, key="train/loss"):
    """How many times each step of a metric is in the database."""
    with sqlite3.connect(database) as connection:
        found = connection.execute("SELECT step FROM metrics WHERE run_uuid = ? AND key = ?", (run_id, key))
        return Counter(step for (step,) in found)


def once(*steps):
    return Counter(steps)


def link(run_id, step=12, epoch=1, **metrics):
    """A checkpoint of a run, whose metrics are ``val/top1`` for ``val_top1=...``."""
    named = {key.replace("_", "/", 1): value for key, value in metrics.items()}
    return CheckpointLink(f"/runs/small/checkpoints/step-{step:010d}", step, epoch, named, run_id)


def linear():
    """A small model, always the same."""
    model = torch.nn.Linear(3, 2)
    model.load_state_dict({"weight": torch.arange(6.0).view(2, 3), "bias": torch.zeros(2)})
    return model


def write_linear(folder):
    """MLflow's files of the small model, for batches of any size."""
    example = torch.zeros(2, 3).numpy()
    mlflow.pytorch.save_model(linear(), str(folder), input_example=example, pip_requirements=["torch"])
