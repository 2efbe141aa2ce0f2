"""Shared by all tests: hypothesis without surprises, a small motion set, and one local Ray."""

import os

import pytest
import torch
from hypothesis import settings

# Without a GPU, kernels run in Triton's interpreter. Triton asks when it is first imported, which PyTorch may do.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

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

    from pipelines.cluster.session import start_ray

    start_ray(address="local", num_cpus=4)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def finished(local_ray, motion_set, tmp_path_factory):
    """A run of 2 epochs on 2 workers: its recipe, its result, its printed lines, and who listened where meanwhile."""
    from pipelines.training.train import train
    from tests.helpers.small_runs import Ears, recipe_for

    folder, lines = tmp_path_factory.mktemp("finished"), []
    config = recipe_for(folder, motion_set, "scaling.workers=2", "tracking.log_model=true")
    with Ears() as ears:
        result = train(config, lines.append)
    return config, result, lines, ears.found


@pytest.fixture(scope="session")
def done(local_ray, motion_set, tmp_path_factory):
    """A finished study of three trials, its front repeated with a second seed; and the lines that it printed."""
    from pipelines.tuning.tune import tune
    from tests.helpers.small_runs import study_for

    folder, lines = tmp_path_factory.mktemp("study"), []
    study = study_for(folder, motion_set, "tracking.log_model=true", against="gmacs", repeats=2)
    return tune(study, lines.append), lines


@pytest.fixture(scope="module")
def s3():
    """Host and port of a server with an empty bucket ``videos``, which the environment names."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    place = "{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": f"http://{place}",
        }.items():
            patch.setenv(key, value)
        boto3.client("s3", endpoint_url=f"http://{place}", region_name="us-east-1").create_bucket(Bucket="videos")
        stop_child()
        yield place
        stop_child()
    server.stop()


def stop_child():
    """The next child has the environment of now."""
    from posmlp import storage
    from posmlp.video import isolated

    if isolated._child is not None:
        isolated._child.kill()
    storage._remote_system.cache_clear()
