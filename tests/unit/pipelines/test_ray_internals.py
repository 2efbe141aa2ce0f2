"""Private names of Ray: each is where we expect it, and a missing one costs only its feature, with one warning.

A failure of ``test_ray_has_the_name`` after an upgrade names what the new Ray has moved.
"""

import logging
import os
import sys
from unittest.mock import MagicMock

import pytest
import ray
from ray._private import ray_constants, services, utils
from ray._private.authentication import authentication_token_setup
from ray.tune.execution import class_cache

from pipelines.cluster import ray_internals
from pipelines.cluster.ray_internals import WITHOUT, WORKER_NAMES, private_name
from tests.helpers.log_lines import log_lines

STATS = "ray.data._internal.stats.get_or_create_stats_actor"
COORDINATOR = "ray.data._internal.cluster_autoscaler.get_or_create_autoscaling_coordinator"
USAGE_DISABLED = "ray.data._internal.usage.collector.usage_collection_disabled"
USAGE = "ray.data._internal.usage.actor.get_or_create_usage_collection_actor"
RECORDED = "ray._private.utils.read_ray_address"
STATE = "ray._private.state.state"
AVAILABLE = "ray._private.state.available_resources_per_node"
POPEN = "ray._private.services.ConsolePopen"
SIGTERM = "ray._private.utils.set_sigterm_handler"
LOOPBACK = "ray._private.ray_constants.ENABLE_RAY_CLUSTER"
PROPAGATED = "ray.tune.execution.class_cache.ENV_VARS_TO_PROPAGATE"


@pytest.fixture(autouse=True)
def fresh_cache():
    """Names are looked up again, and warnings are given again."""
    private_name.cache_clear()
    yield
    private_name.cache_clear()


@pytest.fixture
def mocked(monkeypatch):
    """All private names as mocks, by their full names."""
    monkeypatch.setattr(ray, "get_runtime_context", MagicMock())
    mocks = {path: MagicMock() for path in WITHOUT}
    mocks[USAGE_DISABLED].return_value = False
    for path, mock in mocks.items():
        monkeypatch.setattr(path, mock)
    return mocks


@pytest.mark.parametrize("path", WITHOUT)
def test_ray_has_the_name(path):
    with log_lines(logging.WARNING) as lines:
        assert private_name(path) is not None, f"Ray {ray.__version__} has moved {path}"
    assert not lines


@pytest.mark.parametrize("path", WITHOUT)
def test_a_missing_name_is_reported_once(monkeypatch, path):
    monkeypatch.delattr(path)
    with log_lines(logging.WARNING) as lines:
        assert private_name(path) is None
        assert private_name(path) is None
    assert lines == [f"Ray {ray.__version__} has no {path}: {WITHOUT[path]}"]


def test_a_missing_module_is_reported_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.data._internal.usage.actor", None)
    with log_lines(logging.WARNING) as lines:
        assert private_name(USAGE) is None
    assert len(lines) == 1


@pytest.mark.parametrize("path", WITHOUT)
def test_a_missing_name_costs_only_its_feature(monkeypatch, mocked, path):
    monkeypatch.delattr(path)
    with log_lines(logging.WARNING) as lines:
        ray_internals.listen_on_loopback()
        ray_internals.place_ray_data_actors()
        ray_internals.withhold_from_tune_actors({"SECRET"})
        with ray_internals.shielded_start():
            assert (getattr(services, "ConsolePopen", None) in (None, mocked[POPEN])) == (path == POPEN)
            assert (getattr(utils, "set_sigterm_handler", None) in (None, mocked[SIGTERM])) == (path == SIGTERM)
        assert (ray_internals.recorded_address() is None) == (path == RECORDED)
        assert (ray_internals.available_resources_per_node() is None) == (path == AVAILABLE)
        assert (ray_internals.draining_nodes() == {}) == (path == STATE)
        assert (ray_internals.object_store_stats() is None) == (path in WORKER_NAMES)
    assert len(lines) == 1 and path in lines[0]
    assert getattr(ray_constants, "ENABLE_RAY_CLUSTER", None) is (None if path == LOOPBACK else False)
    assert mocked[STATS].called == (path != STATS)
    assert mocked[COORDINATOR].called == (path != COORDINATOR)
    assert mocked[USAGE].called == (path not in (USAGE, USAGE_DISABLED))
    assert mocked[PROPAGATED].difference_update.called == (path != PROPAGATED)


def test_the_driver_warns_about_names_that_workers_use(monkeypatch):
    for path in WORKER_NAMES:
        monkeypatch.delattr(path)
    with log_lines(logging.WARNING) as lines:
        ray_internals.warn_about_worker_features()
    assert len(lines) == len(WORKER_NAMES)


def test_tune_does_not_copy_withheld_variables(monkeypatch):
    """``ENV_VARS_TO_PROPAGATE`` is a set that Ray reads when it makes an actor class."""
    monkeypatch.setattr(PROPAGATED, {"AWS_SECRET_ACCESS_KEY", "OTHER"})
    ray_internals.withhold_from_tune_actors({"AWS_SECRET_ACCESS_KEY"})
    assert {"OTHER"} == class_cache.ENV_VARS_TO_PROPAGATE


def test_tune_gives_its_actors_variables_in_the_block_alone(monkeypatch):
    monkeypatch.setattr(PROPAGATED, {"OTHER"})
    monkeypatch.setenv("BEFORE", "old")
    monkeypatch.delenv("NEW", raising=False)
    with ray_internals.give_to_tune_actors({"BEFORE": "1", "NEW": "2", "OTHER": "3"}):
        assert {"BEFORE", "NEW", "OTHER"} == class_cache.ENV_VARS_TO_PROPAGATE
        assert (os.environ["BEFORE"], os.environ["NEW"]) == ("1", "2")
    assert {"OTHER"} == class_cache.ENV_VARS_TO_PROPAGATE
    assert os.environ["BEFORE"] == "old" and not {"NEW", "OTHER"} & set(os.environ)


def test_usage_statistics_that_are_disabled_get_no_actor(mocked):
    mocked[USAGE_DISABLED].return_value = True
    ray_internals.place_ray_data_actors()
    assert mocked[STATS].called and not mocked[USAGE].called


def test_ray_does_not_tell_that_its_token_is_on_but_warns_if_it_is_off():
    ray_internals.silence_start()
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = authentication_token_setup.logger
    logger.addHandler(handler)
    try:
        authentication_token_setup._warn_token_auth_enabled()
        assert not messages
        authentication_token_setup._warn_token_auth_disabled()
        assert len(messages) == 1 and "authentication is disabled" in messages[0]
    finally:
        logger.removeHandler(handler)
