"""What all tests share: hypothesis without surprises, a small motion set, an untrained run, an S3 server."""

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
def scene_set(tmp_path_factory):
    """A folder with the lists of a small detection set: 32 key frames of training and 10 of validation."""
    from posmlp.detection.scenes import make_scene_set

    return make_scene_set(tmp_path_factory.mktemp("scenes"), train=3, val=1, seconds=11, size=32)


@pytest.fixture
def lines():
    """The log lines of the test."""
    from tests.helpers.log_lines import log_lines

    with log_lines() as collected:
        yield collected


@pytest.fixture
def short_pauses(monkeypatch):
    """The delivery to MLflow tries again after a second, and no MLflow is in the environment."""
    from pipelines.tracking import delivery

    monkeypatch.setattr(delivery, "LONGEST_PAUSE", 1.0)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def untrained_run(motion_set, tmp_path_factory):
    """A run with a checkpoint of a random model and with a broken video in its val split."""
    from tests.helpers.untrained_run import write_untrained_run

    return write_untrained_run(tmp_path_factory.mktemp("untrained"), motion_set)


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
