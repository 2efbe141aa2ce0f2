"""What the integration tests share: one local Ray, a trained run, and a study."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def mlflow_tables(tmp_path_factory):
    """New MLflow stores of this process get their tables from a copy, see ``copied_tables``."""
    from tests.helpers.mlflow_store import copied_tables

    with copied_tables(tmp_path_factory.mktemp("mlflow")):
        yield


@pytest.fixture(scope="session")
def local_ray():
    """One Ray for all tests (two on a host disturb each other), with more CPUs than the machine may have."""
    import ray

    from pipelines.cluster.session import start_ray

    start_ray(address="local", num_cpus=4)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def finished_run(local_ray, motion_set, tmp_path_factory):
    """A run of 2 epochs on 2 workers: its recipe, its result, its log lines, and who listened where meanwhile."""
    from pipelines.training.train import train
    from tests.helpers.log_lines import log_lines
    from tests.helpers.small_runs import ListeningSockets, recipe_for

    folder = tmp_path_factory.mktemp("finished")
    config = recipe_for(folder, motion_set, "scaling.workers=2", "tracking.log_model=true")
    with ListeningSockets() as sockets, log_lines() as lines:
        result = train(config)
    return config, result, lines, sockets.found


@pytest.fixture(scope="session")
def finished_study(local_ray, motion_set, tmp_path_factory):
    """A finished study of three trials, its front repeated with a fresh seed; and its log lines."""
    from pipelines.tuning.tune import tune
    from tests.helpers.log_lines import log_lines
    from tests.helpers.small_runs import study_for

    folder = tmp_path_factory.mktemp("study")
    study = study_for(folder, motion_set, "tracking.log_model=true", against="gmacs", repeats=1)
    with log_lines() as lines:
        return tune(study), lines
