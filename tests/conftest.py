"""Shared by all tests: hypothesis without surprises, a small motion set, and one local Ray."""

import pytest
import torch
from hypothesis import settings

# The models here are too small for more, and on a busy machine threads wait for each other.
torch.set_num_threads(1)

# The same examples on every machine, and no example fails for being slow on a busy one.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def motion_set(tmp_path_factory):
    """A folder with train.csv (32 clips) and val.csv (16), 32 pixels wide."""
    from posmlp.video.motion import make_motion_set

    return make_motion_set(tmp_path_factory.mktemp("motion"), train=32, val=16, size=32)


@pytest.fixture(scope="session")
def local_ray():
    """One Ray for all tests (two on a host disturb each other), with more CPUs than the machine may have."""
    import ray

    from pipelines.train import start_ray

    start_ray(num_cpus=4)
    yield ray
    ray.shutdown()
