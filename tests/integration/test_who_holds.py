"""What a run that waits says of the jobs that hold the cluster."""

import os
import subprocess
import sys

import pytest
import ray
from ray._private import services
from ray.util import placement_group, remove_placement_group
from ray.util.state import list_jobs

from pipelines.cluster.capacity import describe_use, explain_start_wait, find_holders, held_by_jobs
from posmlp.config import ScalingSection
from tests.helpers.ray_nodes import RayNodes
from tests.helpers.waiting import until

pytestmark = pytest.mark.ray
OTHER = """
import sys
import ray
from ray.util import placement_group
from pipelines.cluster.session import start_ray

start_ray(address=sys.argv[1])


@ray.remote(num_cpus=0.5)
class Alone:
    def ready(self):
        return True


groups = [placement_group([{"CPU": 1}] * 2), placement_group([{"CPU": 100}])]  # the second one never starts
ray.get(groups[0].ready())
alone = Alone.remote()
ray.get(alone.ready.remote())
print("holds", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other_job(local_ray):
    """Another job holds 2.5 of the four CPUs, with a placement group and an actor."""
    command = [sys.executable, "-c", OTHER, ray.get_runtime_context().gcs_address]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert process.stdout.readline() == "holds\n"
        yield
    finally:
        process.kill()
        process.wait()


def test_the_jobs_that_hold_the_cluster_are_named(other_job):
    own = placement_group([{"CPU": 1}])
    ray.get(own.ready())
    try:
        held = held_by_jobs()
        assert held.pop("this job")["CPU"] == 1
        (other,) = (job for job, amounts in held.items() if amounts["CPU"])
        assert held[other]["CPU"] == 2.5 and other.startswith("job ") and sys.executable[:20] in other
        until(lambda: ray.available_resources()["CPU"] == 0.5)
        text = explain_start_wait(ScalingSection(cpus_per_worker=2, use_gpu=False), 40)
        assert text.startswith(f"waiting for 40 s to start 1 worker of 2 CPU: 0.5 of 4 CPUs are free; {other} ")
        assert "holds 2.5 CPUs; this job holds 1 CPU; `ray status`" in text
        one = ScalingSection(cpus_per_worker=1, use_gpu=False)
        assert "1 worker of 1 CPU: there is room on the cluster, and the processes start" in explain_start_wait(one, 40)
        pending = placement_group([{"CPU": 100}])  # as of another trial of this job
        until(lambda: "0.5 of 4 CPUs are free" in explain_start_wait(one, 40))
        remove_placement_group(pending)
    finally:
        remove_placement_group(own)


def test_an_idle_cluster_is_held_by_nobody(local_ray):
    until(lambda: ray.available_resources().get("CPU") == 4)
    assert describe_use(find_holders()) == "4 of 4 CPUs are free; `ray status` tells more"


def state_api_sees_two():
    """Whether Ray's state API finds several instances on this machine."""
    services.find_gcs_addresses.cache_clear()  # else it keeps what this process found before, perhaps one instance
    try:
        list_jobs()
    except ConnectionError as error:
        return "multiple active Ray instances" in str(error)
    return False


def test_another_ray_on_the_machine_is_no_hindrance(local_ray, tmp_path_factory):
    """Ray's state API refuses to choose one by itself."""
    other = RayNodes(tmp_path_factory.mktemp("n"), cpus=1)
    try:
        until(state_api_sees_two, 120)  # it looks for raylets, which start after the head answers
        assert find_holders() is not None
    finally:
        other.stop()
