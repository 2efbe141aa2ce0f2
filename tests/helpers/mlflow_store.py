"""MLflow stores in SQLite files without the second that MLflow takes to make each one's tables."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest


@contextmanager
def copied_tables(folder: Path) -> Iterator[None]:
    """Copy the tables of a new SQLite store from one that MLflow has made, instead of running all its migrations.

    This holds for stores that this process opens. They are as MLflow makes them: tables without rows.

    Args:
        folder: for the store that is copied.
    """
    from mlflow.store.db import utils
    from mlflow.store.model_registry import sqlalchemy_store as registry

    original, template = utils._initialize_tables, folder / "empty.db"

    def initialize(engine) -> None:
        if engine.dialect.name != "sqlite" or not engine.url.database:
            return original(engine)
        if not template.exists():
            original(engine)
            with closing(sqlite3.connect(engine.url.database)) as made, closing(sqlite3.connect(template)) as copy:
                made.backup(copy)
            return None
        with closing(sqlite3.connect(template)) as made, closing(sqlite3.connect(engine.url.database)) as copy:
            made.backup(copy)
        return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_initialize_tables", initialize)
        patch.setattr(registry, "_initialize_tables", initialize)
        yield
