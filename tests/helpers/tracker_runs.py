"""Trackers of small runs, and what of theirs is in a database."""

import sqlite3
from collections import Counter

from pipelines.tracking.tracker import Tracker
from posmlp.config import load_recipe


def recipe(folder, *overrides):
    return load_recipe("demo", ["name=small", f"train.storage={folder}", *overrides])


def start(folder, *overrides, run_id=None):
    return Tracker.open(recipe(folder, *overrides), {"a": "b"}, run_id, journal=folder / "journal.jsonl")


def rows(database, run_id, key="train/loss"):
    """How many times each step of a metric is in the database."""
    with sqlite3.connect(database) as connection:
        found = connection.execute("SELECT step FROM metrics WHERE run_uuid = ? AND key = ?", (run_id, key))
        return Counter(step for (step,) in found)


def once(*steps):
    return Counter(steps)
