"""What the unit tests of pipelines share."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def mlflow_tables(tmp_path_factory):
    """New MLflow stores of this process get their tables from a copy, see ``copied_tables``."""
    from tests.helpers.mlflow_store import copied_tables

    with copied_tables(tmp_path_factory.mktemp("mlflow")):
        yield
