"""Clusters that change during a run: nodes join and are lost, an autoscaler starts and removes them."""

import json
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager

import pytest

from pipelines.runs import checkpoints
from pipelines.studies.study import TrialState, read_trials
from posmlp.video.motion import make_motion_set
from tests.helpers.metadata_service import SCRIPT, MetadataService
from tests.helpers.mlflow_server import MlflowServer
from tests.helpers.ray_nodes import RAY, RayNodes
from tests.helpers.small_runs import QUICK, recipe_for, study_for
from tests.helpers.waiting import until

pytestmark = [pytest.mark.ray, pytest.mark.slow]
GROW_SOON = """
import sys

from pipelines.cli import main
from pipelines.training import train

train.GROW_S = 2.0
sys.exit(main())
"""


@contextmanager
def running(nodes, folder, motion_set, *overrides):
    """``posmlp train`` on the cluster; yields its process, its log and its run's folder."""
    recipe = recipe_for(folder, motion_set, *QUICK, *overrides)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    log = folder / "log.txt"
    env = nodes.env | {"RAY_ADDRESS": nodes.address, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", GROW_SOON, "train", str(folder / "recipe.yaml")]
    with open(log, "w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out)
    try:
        yield process, log, f"{folder}/{recipe.name}"
    finally:
        process.kill()
        process.wait()


def wait_for(condition, process, log, seconds=300):
    """Wait until a condition holds, while the process lives."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.3)


def history(run):
    """Metrics of the epochs in the run's newest checkpoint."""
    whole = [found.info for found in checkpoints.find(run) if found.info]
    return whole[-1].progress["history"] if whole else []


def holding(cluster):
    """What keeps an autoscaler from removing nodes: actors and placement groups, with their nodes."""
    actors = [(row["class_name"], row["node_id"]) for row in cluster.listing("actors") if row["state"] == "ALIVE"]
    groups = [row for row in cluster.listing("placement_groups") if row["state"] != "REMOVED"]
    return f"{actors}\n{groups}"


@pytest.fixture
def nodes(tmp_path_factory):
    started = []

    def start(**options):
        started.append(RayNodes(tmp_path_factory.mktemp("n"), **options))  # short: sockets lie in it
        return started[0]

    yield start
    for cluster in started:
        cluster.stop()


def test_a_run_grows_with_the_cluster_and_resumes_when_a_node_is_lost(nodes, motion_set, tmp_path):
    """At most three workers share a batch of eight clips in pairs: two share it evenly, three do not."""
    cluster = nodes()
    cluster.add("decode", "--num-cpus=1")
    for name in ("a", "b"):
        cluster.add(name, "--num-cpus=2", group="train")
    cluster.wait()
    overrides = ["scaling.workers=4", "scaling.min_workers=1", "scaling.cpus_per_worker=2", "augment.mixup=0.2"]
    overrides += ["scaling.train_on={group: train}", "train.epochs=500", "scaling.decode_on={group: decode}"]
    with running(cluster, tmp_path, motion_set, *overrides) as (process, log, run):

        def trained_by(workers, epochs=2):
            return sum(metrics["train/workers"] == workers for metrics in history(run)) >= epochs

        wait_for(lambda: trained_by(2), process, log)
        cluster.add("c", "--num-cpus=2", group="train")
        wait_for(lambda: trained_by(3), process, log)
        cluster.kill("a")
        before = len(history(run))
        wait_for(lambda: len(history(run)) > before and history(run)[-1]["train/workers"] == 2, process, log)
        process.terminate()
        assert process.wait(timeout=60) == 128 + 15
    found = history(run)
    assert [metrics["epoch"] for metrics in found] == list(range(1, len(found) + 1))
    assert all(metrics["data/bad"] == 0 for metrics in found)
    lines = log.read_text()
    assert "the cluster has room for 3 workers instead of 2; resuming after epoch" in lines
    assert "workers were lost (1 of 3 times); resuming after epoch" in lines
    assert Counter(re.findall(r"^epoch (\d+)/500  loss", lines, re.M)).most_common(1)[0][1] == 1, lines


def drain(cluster, node):
    """Announce that a node is about to be taken away, as on a spot machine."""
    command = [RAY, "drain-node", "--address", cluster.address, "--node-id", node]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    subprocess.run([*command, "--deadline-remaining-seconds", "60"], env=cluster.env, check=True)


TRIAL_ACTOR = "with_resources.<locals>.ResourceTrainable"  # Tune's class around ``TrialRun``


def nodes_of(cluster, actor_class):
    """Ids of the nodes of the live actors of this class."""
    rows = [row for row in cluster.listing("actors") if row["state"] == "ALIVE"]
    return {row["node_id"] for row in rows if row["class_name"] == actor_class}


MOVES = ["scaling.cpus_per_worker=2", "scaling.max_failures=0", "train.epochs=500"]
MOVES += ["scaling.train_on={group: train}", "scaling.decode_on={group: decode}", "train.checkpoint_every_steps=100000"]


def test_a_run_moves_from_a_machine_that_is_taken_away(nodes, motion_set, tmp_path):
    """Ray announces it, as on spot machines. The run saves at once, in the middle of an epoch, and loses no worker."""
    cluster = nodes()
    cluster.add("decode", "--num-cpus=1")
    for name in ("a", "b"):
        cluster.add(name, "--num-cpus=2", group="train")
    cluster.wait()
    with running(cluster, tmp_path, motion_set, *MOVES, "train.global_batch=2") as (process, log, run):
        wait_for(lambda: len(history(run)) >= 1, process, log)
        (used,), before = nodes_of(cluster, "RayTrainWorker"), len(history(run))
        name = cluster.names()[used]
        drain(cluster, used)
        wait_for(lambda: "a machine was taken away; resuming" in log.read_text(), process, log)
        cluster.kill(name)
        wait_for(lambda: len(history(run)) >= before + 2, process, log)
        process.terminate()
        assert process.wait(timeout=60) == 128 + 15
    found, lines = history(run), log.read_text()
    assert [metrics["epoch"] for metrics in found] == list(range(1, len(found) + 1))
    assert re.search(r"the machine \S+ is taken away in \d+ s; the workers save a checkpoint and end", lines), lines
    assert re.search(r"a machine was taken away; resuming after epoch \d+", lines), lines
    assert "workers were lost" not in lines
    assert Counter(re.findall(r"^epoch (\d+)/500  loss", lines, re.M)).most_common(1)[0][1] == 1, lines


def test_a_machine_that_ends_before_its_worker_has_saved_does_not_end_the_run(nodes, motion_set, tmp_path):
    """Two workers on two machines, one of which goes right after the notice. No loss is allowed, none is counted."""
    cluster = nodes()
    cluster.add("decode", "--num-cpus=1")
    for name in ("a", "b", "c"):
        cluster.add(name, "--num-cpus=2", group="train")
    cluster.wait()
    with running(cluster, tmp_path, motion_set, *MOVES, "scaling.workers=2") as (process, log, run):
        wait_for(lambda: len(history(run)) >= 1, process, log)
        gone = min(nodes_of(cluster, "RayTrainWorker"))
        name = cluster.names()[gone]
        drain(cluster, gone)
        wait_for(lambda: "the workers save a checkpoint and end" in log.read_text(), process, log)
        cluster.kill(name)
        wait_for(lambda: "a machine was taken away; resuming after epoch" in log.read_text(), process, log)
        before = len(history(run))  # now: the first group goes on until it has heard of the notice
        wait_for(lambda: len(history(run)) >= before + 2, process, log)
        process.terminate()
        assert process.wait(timeout=60) == 128 + 15
    found, lines = history(run), log.read_text()
    assert [metrics["epoch"] for metrics in found] == list(range(1, len(found) + 1))
    assert "workers were lost" not in lines


def test_a_run_whose_only_machine_is_lost_says_so_and_resumes_on_a_new_one(nodes, motion_set, tmp_path):
    cluster = nodes()
    cluster.add("decode", "--num-cpus=1")
    cluster.add("a", "--num-cpus=2", group="train")
    cluster.wait()
    with running(cluster, tmp_path, motion_set, *MOVES, "scaling.max_failures=3") as (process, log, run):
        wait_for(lambda: len(history(run)) >= 1, process, log)
        cluster.kill("a")
        before = len(history(run))
        wait_for(lambda: "the first worker has not answered for 3" in log.read_text(), process, log)
        cluster.add("b", "--num-cpus=2", group="train")
        wait_for(lambda: len(history(run)) > before, process, log)
        process.terminate()
        assert process.wait(timeout=60) == 128 + 15
    assert re.search(r"waiting for 3\d s to start 1 worker of 2 CPU: [01] of 1 CPUs are free", log.read_text()), (
        log.read_text()
    )


STUDY = """
import logging
import sys

from pipelines.studies.study import Study
from pipelines.tuning.tune import tune

logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
tune(Study.model_validate_json(open(sys.argv[1]).read()))
"""


def test_a_trial_moves_at_once_from_a_machine_that_is_taken_away(nodes, motion_set, tmp_path):
    """It trains in Tune's actor. It resumes before the announced end of the machine, and Tune counts no failure."""
    cluster, server = nodes(), MlflowServer(tmp_path)
    server.start()
    cluster.add("decode", "--num-cpus=1")
    for name in ("a", "b"):
        cluster.add(name, "--num-cpus=1", group="train")
    cluster.wait()
    overrides = ["scaling.train_on={group: train}", "scaling.decode_on={group: decode}", f"tracking.uri={server.uri}"]
    overrides += ["scaling.cpus_per_worker=1", "scaling.max_failures=0", "train.epochs=40"]
    study = study_for(tmp_path, motion_set, *overrides, trials=1, concurrent=1)
    (tmp_path / "study.json").write_text(study.model_dump_json())
    log, run = tmp_path / "study.log", f"{study.folder}/trial-000"
    env = cluster.env | {"RAY_ADDRESS": cluster.address, "PYTHONUNBUFFERED": "1"}
    with open(log, "w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", STUDY, str(tmp_path / "study.json")], env=env, stdout=out, stderr=out
        )
    try:
        wait_for(lambda: len(history(run)) >= 1, process, log)
        (used,) = nodes_of(cluster, TRIAL_ACTOR)
        name = cluster.names()[used]
        drain(cluster, used)
        wait_for(lambda: nodes_of(cluster, TRIAL_ACTOR) - {used}, process, log, seconds=50)
        cluster.kill(name)  # Ray itself ends a drained node that does nothing any more
        assert process.wait(timeout=300) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
        server.kill()
    (trial,) = read_trials(study.folder)
    assert trial.state == TrialState.FINISHED
    assert [metrics["epoch"] for metrics in history(run)] == list(range(1, 41))


DRAINING = """
import json
import sys
import time

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.cluster.ray_internals import draining_nodes

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")


@ray.remote(num_cpus=0)
class Busy:
    def ready(self):
        return True


# Ray ends a drained node that does nothing.
places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes()]
busy = [Busy.options(scheduling_strategy=place).remote() for place in places]
ray.get([each.ready.remote() for each in busy])
print("ready", flush=True)
while not (found := draining_nodes()):
    time.sleep(0.2)
print(json.dumps([deadline / 1e3 - time.time() for deadline in found.values()]), flush=True)
sys.stdin.read()
"""


def test_the_notice_of_a_cloud_reaches_ray(nodes):
    """AWS's metadata service is a stand-in. The cluster requires its token, and the node is that of the machine."""
    cluster = nodes()
    cluster.add("spot", "--num-cpus=1")
    cluster.wait()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": cluster.env}
    watch = subprocess.Popen([sys.executable, "-c", DRAINING, cluster.address], **pipes)
    with MetadataService() as service:
        command = [sys.executable, str(SCRIPT), "aws", cluster.address, "--service", service.url]
        script = subprocess.Popen(command, **pipes)
        try:
            assert watch.stdout.readline() == "ready\n"
            until(lambda: service.asked)
            service.give_notice(120)
            out, _ = script.communicate(timeout=120)
            assert script.returncode == 0, out
            (left,) = json.loads(watch.stdout.readline())
            assert 0 < left <= 120
        finally:
            for process in (script, watch):
                process.kill()
                process.wait()


def test_an_autoscaler_starts_nodes_and_removes_them(nodes, tmp_path):
    """The training node comes from the autoscaler. So the run waits for it, and an actor left there would keep it.

    Decoding takes longer than training: clips are small compared with their videos, one per task, and never cached.
    """
    videos = make_motion_set(tmp_path / "videos", train=32, val=16, size=160)
    labels = {"ray.io/node-group": "worker"}
    kind = {"resources": {"CPU": 1, "object_store_memory": 2**28}, "labels": labels, "node_config": {}}
    cluster = nodes(cpus=1, node_types={"worker": kind | {"min_workers": 0, "max_workers": 2}})

    def others():
        return sum(row["state"] == "ALIVE" for row in cluster.listing("nodes")) - 1

    overrides = ["scaling.cpus_per_worker=1", "scaling.train_on={ray.io/node-group: worker}", "scaling.wait_s=100"]
    overrides += [
        "scaling.decode_on={ray.io/node-group: worker}",
        "train.epochs=200",
        "data.rows_per_block=1",
        "data.cache_dir=null",
    ]
    with running(cluster, tmp_path, videos, *overrides) as (process, log, run):
        wait_for(lambda: "Waiting for nodes" in log.read_text(), process, log)
        wait_for(lambda: others() == 2, process, log)
        wait_for(lambda: history(run), process, log)
        process.terminate()
        assert process.wait(timeout=60) == 128 + 15
    deadline = time.monotonic() + 240
    while others():
        assert time.monotonic() < deadline, holding(cluster)
        time.sleep(1)
