"""The seams of a training run: the channel, the messages, and what the driver makes of them."""

import logging
import math
import re
import sys
import threading
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import cloudpickle
import pytest
import ray
import torch

from pipelines.cluster import capacity
from pipelines.cluster.capacity import (
    LongWait,
    concurrent_trials,
    device_for,
    explain_start_wait,
    matches_labels,
    max_concurrent_trials,
    trials_that_fit,
    why_run_cannot_fit,
    worker_resources,
    workers_that_fit,
)
from pipelines.commands.training import format_result
from pipelines.data import object_store
from pipelines.runs.errors import BadVideo, PreemptedError, RunError
from pipelines.runs.record import run_folder, write_record
from pipelines.tracking import prometheus
from pipelines.tracking.journal import open_journal
from pipelines.training import train as train_module
from pipelines.training import worker as worker_module
from pipelines.training.channel import Registration, RunChannel, WorkersState
from pipelines.training.messages import (
    ArtifactFile,
    BadVideosFound,
    CostMeasured,
    EpochMetrics,
    ProgressLine,
    StepMetrics,
    ValidationDetails,
    WorkerJob,
)
from pipelines.training.process_group import ProcessGroupBackend, ProcessGroupConfig
from pipelines.training.progress import (
    EpochMeter,
    RunProgress,
    StepSeries,
    best_so_far,
    describe_epoch,
    describe_overrides,
    describe_result,
    describe_steps,
    early_stop,
)
from pipelines.training.train import RunReporter, RunResult, TrialContext, explain_silence, fit
from pipelines.training.worker import Action, Worker
from posmlp.config import ScalingSection, load_recipe
from posmlp.errors import UserError
from posmlp.learn.evaluation import ClassificationMetrics
from tests.helpers.log_lines import log_lines
from tests.helpers.small_runs import recipe_for
from tests.helpers.waiting import until


def test_the_channel_tells_growth_from_loss():
    channel = RunChannel()
    assert channel.register_workers(2) == Registration(0, 0, False)
    assert channel.register_workers(3) == Registration(2, 0, False)  # the cluster has grown
    assert channel.register_workers(3) == Registration(3, 1, False)
    channel.fail("first")
    channel.fail("second")
    assert channel.register_workers(1) == Registration(3, 2, True)  # it ends before it trains
    assert channel.state().failure == "first"


def test_a_machine_that_is_taken_away_is_no_loss():
    channel = RunChannel()
    channel.register_workers(2, ["a", "b"])
    assert channel.preempt(["c"]) == [] and not channel.stop_requested()
    assert channel.preempt(["c", "b"]) == ["b"] and channel.stop_requested() and channel.state().preempted
    assert channel.preempt(["b"]) == []  # asked before
    assert channel.register_workers(2, ["a", "c"]) == Registration(2, 0, False, preempted=True)
    assert not channel.stop_requested() and not channel.state().preempted
    assert channel.register_workers(2, ["a", "c"]).losses == 1


def test_a_worker_group_that_starts_after_a_stop_request_ends():
    channel = RunChannel()
    assert not channel.register_workers(1).ended
    channel.request_stop()
    assert channel.register_workers(1).ended
    assert channel.stop_requested() and channel.state().failure == ""


def test_the_channel_carries_events_once_and_a_stop_request():
    channel, events = RunChannel(), [ProgressLine("one"), CostMeasured({"cost/gmacs": 1.0})]
    for event in events:
        channel.send(event)
    assert channel.receive() == events
    assert channel.receive() == []
    assert not channel.stop_requested()
    channel.request_stop()
    assert channel.stop_requested()


def test_a_job_reaches_the_worker_as_it_was_sent():
    """Ray Train carries a dict."""
    job = WorkerJob(
        config=load_recipe("demo").model_dump(),
        run="runs/demo",
        weights=None,
        train_rows="train",
        val_rows="val",
        classes=("left", "right"),
        channel="channel",
        profile=False,
        measure_cost=True,
    )
    assert WorkerJob(**cloudpickle.loads(cloudpickle.dumps(dict(vars(job))))) == job


def test_the_backend_survives_pickling_and_runs_rays_own_start():
    """The driver makes it and Ray Train's controller uses it."""
    assert ProcessGroupConfig(backend="gloo").backend_cls is ProcessGroupBackend
    assert type(cloudpickle.loads(cloudpickle.dumps(ProcessGroupBackend()))) is ProcessGroupBackend
    assert ProcessGroupBackend.share_cuda_visible_devices


@pytest.fixture
def reporter(monkeypatch):
    """A reporter whose tracker records calls; MLflow has the first epoch already."""
    monkeypatch.setattr(prometheus, "publish", MagicMock())
    tracker = MagicMock()
    tracker.epochs_logged.return_value = 1
    return RunReporter("demo", tracker, MagicMock())


def test_the_reporter_logs_lines_with_their_levels(reporter):
    with log_lines(logging.WARNING) as lines:
        reporter.handle(ProgressLine("epoch 1/2 100%"))
        reporter.handle(ProgressLine("an old checkpoint cannot be removed", logging.WARNING))
    assert lines == ["an old checkpoint cannot be removed"]


def test_the_reporter_logs_each_epoch_once_also_when_workers_resume(reporter):
    one, two, three = ({"epoch": float(n), "val/top1": n / 10} for n in (1, 2, 3))
    for epochs in ([], [one], [two], [one], [two], [one, two], [three]):
        reporter.handle(EpochMetrics(epochs))
    assert reporter.history == [one, two, three]
    assert [call.kwargs["step"] for call in reporter.tracker.log_metrics.call_args_list] == [2, 3]
    assert [call.args[0]["epoch"] for call in reporter.on_epoch.call_args_list] == [1, 2, 3]  # Tune counts reports
    reporter.publish_progress()
    prometheus.publish.assert_called_once_with("demo", epoch=3.0, bad_videos=0.0, val_top1=0.3)


def test_an_epoch_that_is_trained_again_replaces_the_old_one_and_those_after_it(reporter):
    one, two = {"epoch": 1.0}, {"epoch": 2.0}
    reporter.handle(EpochMetrics([one, two]))
    reporter.handle(EpochMetrics([one]))
    assert reporter.history == [one]


def test_the_reporter_tracks_costs_files_and_bad_videos(reporter):
    """Training and validation lists may have a video of the same sample id."""
    videos = [BadVideo("a", "/train/a.mp4", "truncated"), BadVideo("a", "/val/a.mp4", "empty")]
    reporter.handle(CostMeasured({"cost/gmacs": 1.0}))
    reporter.handle(ArtifactFile("profile/trace.json.gz", b"trace"))
    reporter.handle(BadVideosFound(videos[:1]))
    reporter.handle(BadVideosFound(videos))
    reporter.handle(ValidationDetails(counts(["left"], ["right"])))
    reporter.tracker.log_params.assert_called_once_with({"cost/gmacs": "1"})
    reporter.tracker.log_metrics.assert_not_called()
    reporter.tracker.log_file.assert_called_once_with("profile/trace.json.gz", b"trace")
    rows, path = reporter.tracker.log_table.call_args.args
    assert path == "quarantine.json" and [row["uri"] for row in rows] == ["/train/a.mp4", "/val/a.mp4"]
    assert list(reporter.bad.values()) == videos
    assert reporter.validation.summary.videos == 2


def test_bad_videos_of_two_lists_with_the_same_sample_id_are_both_counted():
    noted = [BadVideo("a", "/train/a.mp4", "truncated"), BadVideo("a", "/val/a.mp4", "empty")]
    worker = SimpleNamespace(bad=noted[:1], decoded_by_pyav=0, world_size=1)
    worker.progress = SimpleNamespace(bad=[], decoded_by_pyav=0)
    Worker.collect_bad_videos(worker)
    worker.bad = [*noted[::-1], *noted]
    Worker.collect_bad_videos(worker)
    assert {video["uri"] for video in worker.progress.bad} == {"/train/a.mp4", "/val/a.mp4"}
    assert len(worker.progress.bad) == 2


@pytest.mark.parametrize("fails", ["record", "removal"])
def test_a_record_that_cannot_be_written_ends_the_run_and_a_removal_that_fails_does_not(monkeypatch, fails):
    """The record of an epoch rates its checkpoint: without it another checkpoint would be the best one."""

    def fail(*args):
        raise OSError("stale file handle")

    monkeypatch.setattr(worker_module, "check_lease", lambda *args: None)
    monkeypatch.setattr(worker_module.checkpoints, "prune", fail if fails == "removal" else lambda *args: None)
    worker = MagicMock(rank=0, run="runs/small")
    Worker.write(worker, fail if fails == "record" else lambda: None)
    action, error = worker.agree.call_args.args
    if fails == "record":
        assert action == Action.FAIL
        assert "runs/small does not answer: stale file handle. Checkpoints before it" in str(error)
    else:
        assert (action, error) == (Action.CONTINUE, None)
        assert "an old checkpoint cannot be removed: stale file handle" in worker.send_line.call_args.args[0]


def test_a_run_that_another_process_has_begun_meanwhile_is_refused(motion_set, tmp_path, monkeypatch):
    """On a local storage, while this process waits for room."""
    config = recipe_for(tmp_path, motion_set)

    def wait(scaling):
        write_record(run_folder(config), config, {}, "other", None)

    for name in ("start_ray", "warn_about_worker_features", "check_writable"):
        monkeypatch.setattr(train_module, name, lambda *args: None)
    monkeypatch.setattr(train_module, "choose_device", lambda config: config)
    monkeypatch.setattr(train_module, "wait_for_room", wait)
    with pytest.raises(RunError, match=r"another process has changed .* while this one waited"):
        train_module.train(config)
    open_journal(run_folder(config)).close()  # it is free


def test_the_next_epoch_starts_with_empty_counts():
    ended = {"training_metrics": {"train/loss": 0.5}, "decoded_by_pyav": 2}
    progress = RunProgress([{"epoch": 1.0}], steps=4, loss=2.0, bad=[{"sample_id": "a"}], **ended)
    assert progress.next_epoch({"epoch": 2.0}) == RunProgress([{"epoch": 1.0}, {"epoch": 2.0}])


def test_a_checkpoint_keeps_the_progress_under_the_keys_of_earlier_versions():
    stored = {"history": [{"epoch": 1.0}], "steps": 4, "loss": 2.0, "grad_norm": 3.0, "norms": 3}
    stored |= {"bad": [{"sample_id": "a"}], "taken_over": 2, "trained": {"train/loss": 0.5}}
    progress = RunProgress.from_record(stored)
    assert (progress.decoded_by_pyav, progress.training_metrics) == (2, {"train/loss": 0.5})
    assert progress.to_record() == stored
    assert RunProgress.from_record({"steps": 4}) == RunProgress(steps=4)


def test_a_gradient_that_overflowed_is_left_out_of_the_mean():
    progress = RunProgress()
    progress.add_step(2.0, 1.0)
    progress.add_step(3.0, math.inf)
    assert (progress.steps, progress.loss, progress.grad_norm, progress.norms) == (2, 5.0, 1.0, 1)


def test_a_line_within_an_epoch(monkeypatch):
    """Resumed at step 10 of 20 in the second of three epochs, and 4 steps done since, in 8 seconds.

    The first of them took 5 seconds, as the decoders started, and the others 1 second each: so do those that are left.
    """
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    meter, progress = EpochMeter(now, 1.0, 0.0), RunProgress(steps=10, loss=10.0)
    with meter.waiting():
        now += 2
    assert not meter.line_is_due()
    for seconds in (3, 1, 1, 1):
        assert (meter.step_s() is None) == (meter.steps < 2)
        now += seconds
        progress.add_step(1.0, 1.0)
        meter.add_step()
    assert meter.line_is_due() and not meter.line_is_due()
    assert (meter.seconds, meter.waited, meter.first_batch_s, meter.lines) == (8, 2, 2, 1)
    assert meter.data_wait() == 0
    with meter.waiting():
        now += 1.5
    meter.end()
    assert meter.data_wait() == pytest.approx(1.5 / 7.5)
    meter.seconds, meter.waited = 8.0, 3.5
    config = load_recipe("demo", ["train.epochs=3", "train.global_batch=8"])
    line = describe_steps(progress, meter, 1, 20, config)
    assert line == "epoch 2/3  step 14/20  loss 1.000  4.0 clips/s  data wait 25%  left 26 s"


def test_points_by_step_are_means_since_the_last_point(monkeypatch):
    """A run of 1000 steps has a point every 2 steps; validation between two epochs is no time of a step."""
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.5)
    series = StepSeries.for_run(1000, global_batch=8)
    for epoch in (range(1, 4), range(4, 7)):  # 3 steps each: the one after the last point counts to no other epoch
        now += 50  # validation
        series.start()
        for step in epoch:
            now += 2
            series.add(step, float(step), step / 100, now)
    times, steps, losses, rates, speeds = zip(*series.rows, strict=True)
    assert (steps, losses, rates, speeds) == ((2, 4, 6), (1.5, 4.0, 5.5), (0.02, 0.04, 0.06), (4.0, 4.0, 4.0))
    assert set(times) == {1_700_000_000_500}
    assert len(series.take(at_once=False)) == 3 and series.take(at_once=True) == []
    series.add(8, 1.0, 0.1, now)
    assert series.take(at_once=False) == []  # three seconds have not passed
    assert len(series.take(at_once=True)) == 1


def test_the_best_epoch_is_the_newest_of_equals():
    """As for checkpoints."""
    history = [{"epoch": float(n), **({} if top1 is None else {"val/top1": top1})} for n, top1 in enumerate(TOP1, 1)]
    assert best_so_far(history) == {"val/best_top1": 0.75, "val/best_epoch": 4.0}
    assert best_so_far(history[1:2]) == {}
    expected = "Running after epoch 5 of 9: val/top1 70.0%, best 75.0% in epoch 4"
    assert describe_result(history, 9, "RUNNING") == expected
    assert describe_result(history[1:2], 9, "KILLED") == "Stopped after epoch 1 of 9"


TOP1 = (0.75, None, 0.5, 0.75, 0.7)


def test_the_tag_of_overrides_names_what_a_run_does_differently():
    config = load_recipe("demo", ["train.epochs=5", "model.blocks=joint", "train.storage=/elsewhere"])
    text = describe_overrides(config.resolved())
    assert "train.epochs=5, " in text and 'model.blocks=["joint", "joint", "joint", "joint"]' in text
    assert "storage" not in text and "model.dims" not in text and "\n" not in text


def test_the_description_is_kept_current(reporter):
    reporter.about, reporter.epochs = "**demo**: tiny", 2
    reporter.handle(EpochMetrics([{"epoch": 1.0, "val/top1": 0.5}]))  # MLflow has it
    reporter.tracker.log_tags.assert_not_called()
    reporter.handle(EpochMetrics([{"epoch": 2.0, "val/top1": 0.25}]))
    (call,) = reporter.tracker.log_tags.call_args_list
    note = "**demo**: tiny\n\nRunning after epoch 2 of 2: val/top1 25.0%, best 50.0% in epoch 1"
    assert call.args == ({"mlflow.note.content": note},)


def test_plots_are_in_the_runs_folder_too(reporter, tmp_path):
    reporter.folder = str(tmp_path)
    reporter.handle(EpochMetrics([{"epoch": 1.0, "train/loss": 0.5, "val/top1": 0.5}]))
    reporter.handle(ValidationDetails(counts(["left"], ["right"])))
    reporter.log_plots(("left", "right"))
    for name in ("learning_curves.png", "confusion.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_reporter_sends_metrics_of_steps(reporter):
    reporter.handle(StepMetrics([[1, 2, 3.0, 4.0, 5.0]]))
    reporter.tracker.log_steps.assert_called_once_with([[1, 2, 3.0, 4.0, 5.0]])


def test_workers_are_counted_on_nodes_with_the_labels():
    scaling = ScalingSection(workers=4, cpus_per_worker=2, train_on={"group": "train"})
    nodes = [
        ({"CPU": 5.0}, {"group": "train"}),
        ({"CPU": 8.0}, {"group": "decode"}),
        ({"CPU": 1.9}, {"group": "train"}),
    ]
    assert workers_that_fit(nodes, scaling) == 2
    assert workers_that_fit(nodes, scaling, {}) == 6
    assert worker_resources(scaling) == {"CPU": 2.0}
    assert matches_labels({"group": "train", "zone": "a"}, {"group": "train"})
    assert not matches_labels({}, {"group": "train"})


@pytest.mark.parametrize(
    ("scaling", "gpus", "use_gpu", "says"),
    [
        ({}, 0, False, "device: CPU; the cluster has no GPU"),
        ({}, 1, True, "device: GPU, one for each of 1 worker; the cluster has 1 GPU"),
        ({"workers": 2}, 4, True, "The others stay idle: scaling.workers=4 uses them all"),
        ({"workers": 4}, 2, False, "2 GPUs, too few for 4 workers: scaling.workers=2 uses them"),
        ({"workers": 4, "min_workers": 2}, 2, True, "device: GPU"),
        ({"use_gpu": False}, 2, False, "2 GPUs, idle because of scaling.use_gpu=false"),
        ({"use_gpu": False}, 0, False, "device: CPU; the cluster has no GPU"),
        ({"use_gpu": True, "workers": 2}, 0, True, "device: GPU"),  # an autoscaler may start some
        ({"gpus_per_worker": 0.25}, 1, True, "device: GPU, 0.25 of one (scaling.gpus_per_worker) for each of 1 worker"),
        ({"gpus_per_worker": 0.25}, 0, False, "device: CPU; the cluster has no GPU"),
    ],
)
def test_auto_uses_gpus_if_there_are_enough(scaling, gpus, use_gpu, says):
    chosen, line = device_for(ScalingSection(**scaling), gpus)
    assert chosen is use_gpu
    assert says in line


def test_no_event_between_two_threads_is_lost_or_exchanged():
    channel, count = RunChannel(), 20_000
    sender = threading.Thread(target=lambda: [channel.send(StepMetrics([[i]])) for i in range(count)])
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        sender.start()
        found = []
        while sender.is_alive():
            found += channel.receive()
    finally:
        sys.setswitchinterval(before)
    found += channel.receive()
    assert [event.rows[0][0] for event in found] == list(range(count))


def nodes_with(monkeypatch, count=1, leaving=(), **resources):
    """Make Ray report nodes ``n0``, ``n1``, ..., some of which are about to be taken away."""
    nodes = [{"NodeID": f"n{i}", "Alive": True, "Resources": resources, "Labels": {}} for i in range(count)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {kind: count * value for kind, value in resources.items()})
    monkeypatch.setattr(capacity, "draining_nodes", lambda: dict.fromkeys(leaving, 0))


def test_machines_that_are_about_to_be_taken_away_are_no_room(monkeypatch):
    scaling = ScalingSection(workers=3, cpus_per_worker=2, use_gpu=False)
    nodes_with(monkeypatch, 2, CPU=4.0)
    assert why_run_cannot_fit(scaling) == ""
    nodes_with(monkeypatch, 2, ["n1"], CPU=4.0)
    assert re.search(r"leave -2 of 4 CPUs.* 1 machine about to be taken away", why_run_cannot_fit(scaling))
    nodes_with(monkeypatch, 3, ["n1"], CPU=4.0)
    assert why_run_cannot_fit(scaling) == ""


def test_a_long_wait_is_told_now_and_then():
    wait, told = LongWait(), []
    with log_lines() as lines:
        for seconds in range(0, 10_000):
            wait.check(seconds, lambda s: told.append(s) or "waiting")
    assert told == [30, 300, 1800, 7200] and lines == ["waiting"] * 4
    wait.check(0, str)
    wait.check(31, lambda s: told.append(s) or "waiting")
    assert told[-1] == 31


def test_a_wait_says_only_what_is_known(monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 0.5})
    monkeypatch.setattr(ray, "get_runtime_context", MagicMock())
    scaling = ScalingSection(workers=2, cpus_per_worker=2, use_gpu=True)
    for name in ("held_by_jobs", "list_placement_groups"):
        monkeypatch.setattr(capacity, name, MagicMock(side_effect=ConnectionError))
    unknown = explain_start_wait(scaling, 31.4)
    need = "waiting for 31 s to start 2 workers of 2 CPU and 1 GPU each"
    assert unknown.startswith(f"{need}: 0.5 of 8 CPUs and 0 of 1 GPUs are free; `ray status`")
    assert "job" not in unknown and "other runs" not in unknown
    held = {"job 02 (a)": Counter(CPU=1), "this job": Counter(CPU=4, GPU=1), "job 03 (b)": Counter()}
    monkeypatch.setattr(capacity, "held_by_jobs", lambda: held)
    known = explain_start_wait(scaling, 31.4)
    assert "; this job holds 4 CPUs and 1 GPU; job 02 (a) holds 1 CPU; `ray status` shows" in known
    assert "job 03" not in known


def test_a_run_whose_workers_start_is_not_said_to_wait_for_others(monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.5})
    monkeypatch.setattr(capacity, "held_by_jobs", lambda: {"this job": Counter(CPU=0.5)})
    monkeypatch.setattr(
        ray, "get_runtime_context", lambda: SimpleNamespace(get_job_id=lambda: "02", gcs_address="here")
    )
    group = SimpleNamespace(creator_job_id="02", state="CREATED", bundles=[{"unit_resources": {"CPU": 0.5}}])
    groups = [group]
    monkeypatch.setattr(capacity, "list_placement_groups", lambda address, **_: groups)
    scaling = ScalingSection(cpus_per_worker=0.5, use_gpu=False)
    starting = "waiting for 31 s to start 1 worker of 0.5 CPU: there is room on the cluster, and the processes start"
    assert explain_start_wait(scaling, 31).startswith(starting)
    waits = "1.5 of 2 CPUs are free; this job holds 0.5 CPU"
    groups.append(SimpleNamespace(creator_job_id="02", state="PENDING", bundles=[]))  # the other is another trial's
    assert waits in explain_start_wait(scaling, 31)
    groups[:] = [SimpleNamespace(**vars(group) | {"creator_job_id": "01"})]  # the job's resources are an actor's
    assert waits in explain_start_wait(scaling, 31)


def test_a_driver_says_that_no_worker_answers(motion_set, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "explain_start_wait", lambda scaling, seconds: "WHY")
    config = recipe_for(tmp_path, motion_set)
    state = WorkersState("", preempted=False, losses=0, started=False, silent_s=40)
    assert explain_silence(config, state, 40) == "small: WHY"
    lost = explain_silence(config, replace(state, started=True), 40)
    assert lost.startswith("small: the first worker has not answered for 40 s")
    assert explain_silence(config, replace(state, started=True, preempted=True), 40) == "small: WHY"


@pytest.mark.parametrize("hanging", [False, True])
def test_the_object_stores_use_is_asked_for_in_the_background(monkeypatch, hanging):
    """A node that does not answer holds no training step up."""
    answer, asked = threading.Event(), []

    def ask():
        asked.append(threading.current_thread())
        if hanging:
            answer.wait(60)
        return (5.0, 1.0)

    monkeypatch.setattr(object_store, "object_store_usage", ask)
    monkeypatch.setattr(object_store, "FIRST_LIMIT_S", 0.1 if hanging else 60)
    monkeypatch.setattr(object_store, "SAMPLE_S", 0.01)
    monitor = object_store.StoreMonitor(enabled=True)
    if hanging:
        assert all(map(math.isnan, monitor.usage))
        answer.set()
    until(lambda: monitor.usage == (5.0, 1.0) and len(asked) > 2)
    monitor.close()
    until(lambda: not asked[0].is_alive())
    assert threading.current_thread() not in asked


def test_workers_reserve_a_fraction_of_a_gpu(monkeypatch):
    shared = ScalingSection(use_gpu=True, gpus_per_worker=0.25)
    assert worker_resources(shared) == {"CPU": 1.0, "GPU": 0.25}
    assert worker_resources(ScalingSection(use_gpu=True)) == {"CPU": 1.0, "GPU": 1.0}
    assert workers_that_fit([({"CPU": 8.0, "GPU": 1.0}, {})], shared) == 4
    nodes_with(monkeypatch, CPU=4.0, GPU=0.5)
    assert why_run_cannot_fit(shared) == ""
    assert "need 0.75 of a GPU each" in why_run_cannot_fit(shared.model_copy(update={"gpus_per_worker": 0.75}))


@pytest.mark.parametrize(
    ("resources", "scaling", "fitting", "at_a_time"),
    [
        ({"CPU": 16, "GPU": 2}, ["scaling.use_gpu=true"], 2, 2),
        ({"CPU": 16, "GPU": 2}, ["scaling.use_gpu=true", "scaling.gpus_per_worker=0.25"], 8, 8),
        (
            {"CPU": 16, "GPU": 2},
            ["scaling.use_gpu=true", "scaling.gpus_per_worker=0.4"],
            4,
            4,
        ),  # none has a part of two
        ({"CPU": 4, "GPU": 2}, ["scaling.use_gpu=true", "scaling.gpus_per_worker=0.25"], 6, 6),  # 0.5 CPUs each
        ({"CPU": 2}, ["scaling.use_gpu=false"], 2, 2),
        ({"CPU": 8}, ["scaling.use_gpu=false", "scaling.threads_per_worker=2"], 14, 4),
        ({"CPU": 1}, ["scaling.use_gpu=false"], 1, 1),
    ],
)
def test_concurrent_trials_leave_a_cpu_for_decoding_and_share_gpus(monkeypatch, resources, scaling, fitting, at_a_time):
    nodes_with(monkeypatch, **resources)
    recipe = load_recipe("demo", scaling)
    assert (trials_that_fit(recipe), max_concurrent_trials(recipe)) == (fitting, at_a_time)


@pytest.mark.parametrize(("asked", "wait_s", "number"), [(None, 0, 2), (1, 0, 1), (4, 0, 2), (4, 60, 4)], ids=str)
def test_a_user_cannot_take_the_cpus_of_the_decoders(monkeypatch, asked, wait_s, number):
    nodes_with(monkeypatch, CPU=2)
    recipe = load_recipe("demo", ["scaling.use_gpu=false", f"scaling.wait_s={wait_s}"])
    assert concurrent_trials(recipe, asked) == number


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, 2])
def test_a_share_of_a_gpu_is_above_0_and_at_most_1(fraction):
    with pytest.raises(UserError, match=r"scaling\.gpus_per_worker"):
        load_recipe("demo", [f"scaling.gpus_per_worker={fraction}"])


def test_workers_of_one_run_do_not_share_a_gpu():
    with pytest.raises(UserError, match=r"2 workers .* on one GPU, which NCCL refuses"):
        load_recipe("demo", ["scaling.gpus_per_worker=0.5", "scaling.workers=2"])


# --- early stopping ---------------------------------------------------------------------------------------------


def history_of(values, monitor="val/top1"):
    """Metrics of epochs 1, 2, ...; None: not validated."""
    return [{"epoch": float(i)} | ({} if x is None else {monitor: x}) for i, x in enumerate(values, 1)]


def first_end(values, monitor="val/top1", patience=2):
    """The epoch after which the run ends, as the worker asks: before each epoch; None: it goes on."""
    config = load_recipe("demo", [f"train.patience={patience}", f"train.monitor={monitor}"])
    history = history_of(values, monitor)
    return next((i for i in range(len(history) + 1) if early_stop(history[:i], config)), None)


@pytest.mark.parametrize(
    ("values", "monitor", "patience", "end"),
    [
        ([0.1, 0.3, 0.2, 0.3, 0.9], "val/top1", 2, 4),  # an equal value is no improvement
        ([0.1, 0.3, 0.2, 0.4, 0.3, 0.2], "val/top1", 2, 6),
        ([0.1, 0.2, 0.3, 0.4], "val/top1", 1, None),
        ([3.0, 2.0, 2.5, 2.5, 1.0], "val/loss", 2, 4),  # a loss gets better as it falls
        ([3.0, 2.0, 1.0], "val/loss", 1, None),
        ([None, 0.3, None, 0.2, None, 0.1], "val/class_mean", 2, 4),  # every second epoch is validated
        ([None, 0.3, None, 0.2, None, 0.1], "val/class_mean", 3, 6),  # it ends after a validation
        ([0.3], "val/top1", 1, None),
        ([math.nan, 2.0, 2.0, 2.0], "val/loss", 2, 4),
        ([1.0, math.nan, math.nan], "val/loss", 2, 3),
    ],
)
def test_a_run_ends_when_its_metric_is_not_better_for_so_many_epochs(values, monitor, patience, end):
    assert first_end(values, monitor, patience) == end


def test_without_patience_a_run_ends_with_its_last_epoch():
    assert early_stop(history_of([0.5, 0.4, 0.3, 0.2]), load_recipe("demo")) == ""


def test_the_reason_names_metric_value_epoch_and_key():
    config = load_recipe("demo", ["train.patience=2"])
    reason = early_stop(history_of([0.25, 0.5, 0.5, 0.25]), config)
    assert reason == "val/top1 is not better than 0.5 of epoch 2 for 2 epochs (train.patience)"


def test_the_line_of_an_epoch_says_the_loss_and_the_best():
    config = load_recipe("demo", ["train.epochs=3"])
    metrics = {"epoch": 2.0, "train/loss": 1.5, "val/loss": 1.25, "val/top1": 0.5, "val/best_top1": 0.75}
    metrics |= {"val/best_epoch": 1.0, "perf/clips_per_s": 8.0, "perf/data_wait_frac": 0.25}
    metrics |= {"data/object_store_mb": 3.0, "data/spilled_mb": 0.0, "data/bad": 0.0}
    rest = "8.0 clips/s  data wait 25%  object store 3 MiB"
    line = describe_epoch(metrics, config)
    assert line == f"epoch 2/3  loss 1.500  val loss 1.250  val top-1 50.0% (best 75.0%, epoch 1)  {rest}"
    line = describe_epoch(metrics | {"val/best_epoch": 2.0, "val/best_top1": 0.5}, config)
    assert line == f"epoch 2/3  loss 1.500  val loss 1.250  val top-1 50.0% (best)  {rest}"
    unvalidated = {key: value for key, value in metrics.items() if not key.startswith("val/")}
    assert describe_epoch(unvalidated, config) == f"epoch 2/3  loss 1.500  {rest}"


# --- the result that the command prints -------------------------------------------------------------------------


NAMES = ("run", "walk", "jump", "swim")


def counts(*predicted):
    """The counts of videos with these predicted classes, for each true class; other names are those of true classes."""
    confusion = torch.zeros(len(predicted), len(predicted), dtype=torch.float64)
    for label, found in enumerate(predicted):
        for name in found:
            confusion[label, NAMES.index(name) if name in NAMES else label] += 1
    return ClassificationMetrics(confusion, torch.zeros((), dtype=torch.float64), confusion.sum(1))


def test_the_result_names_the_best_and_the_worst_classes_and_why_the_run_ended():
    summary = counts(["run"] * 10, ["walk"] * 6 + ["run"] * 2, ["jump"] + ["walk"] * 3, ["walk"] * 2)
    metrics = {"val/top1": 0.75, "val/top5": 1.0, "val/class_mean": 0.5, "val/clips": 24.0, "perf/clips_per_s": 3.0}
    result = RunResult("x", "runs/x", "id", metrics, classes=NAMES, summary=summary, ended_early="no better")
    rows = dict(re.match(r"  (.{18})(.*)", line).groups() for line in format_result(result, 9).splitlines())
    rows = {name.strip(): text for name, text in rows.items()}
    assert rows["best classes"] == "run 100% of 10, walk 75% of 8"
    assert rows["worst classes"] == "swim 0% of 2 (2 as walk), jump 25% of 4 (3 as walk)"
    assert rows["ended early"] == "no better"
    plain = format_result(RunResult("x", "runs/x", "id", metrics), 9)
    assert "classes  " not in plain.replace("mean over classes", "") and "ended early" not in plain


class Groups:
    """Stands in for Ray Train's worker groups of a run: what each does instead of ``fit``, one after another."""

    def __init__(self, monkeypatch, *groups, notices):
        self.groups, self.started = iter(groups), 0
        monkeypatch.setattr(train_module, "worker_group", lambda *_: self)
        watch = MagicMock(own="driver", poll=lambda: {node: f"{node} is taken away" for node in notices})
        monkeypatch.setattr(train_module, "PreemptionWatch", lambda: watch)
        monkeypatch.setattr(train_module, "POLL_S", 0.01)

    def fit(self):
        self.started += 1
        next(self.groups)()


def fit_with(groups, channel, config, reporter):
    fit(MagicMock(channel=channel), config, reporter, TrialContext(), None)
    return groups.started


def epochs(count):
    return EpochMetrics([{"epoch": float(n + 1), "val/top1": 0.5} for n in range(count)])


def test_a_worker_that_ends_with_its_machine_does_not_end_the_run(monkeypatch, reporter):
    """It dies after the notice and before all workers have saved, which is no failure of the run."""
    channel, config = RunChannel(), load_recipe("demo", ["train.epochs=2", "scaling.max_failures=0"])

    def dying():
        channel.register_workers(2, ["a", "b"])
        until(channel.stop_requested)
        raise RuntimeError("a worker has died")

    def finishing():
        assert channel.register_workers(1, ["a"]) == Registration(2, 0, ended=False, preempted=True)
        channel.send(epochs(2))

    with log_lines() as lines:
        assert fit_with(Groups(monkeypatch, dying, finishing, notices=["b"]), channel, config, reporter) == 2
    assert any("a worker has died" in line for line in lines)


def test_workers_that_fail_without_losing_a_machine_end_the_run(monkeypatch, reporter):
    channel, config = RunChannel(), load_recipe("demo", ["train.epochs=2"])

    def failing():
        channel.register_workers(2, ["a", "b"])
        raise RuntimeError("a worker has died")

    with pytest.raises(RunError, match="training failed: a worker has died"):
        fit_with(Groups(monkeypatch, failing, notices=["c"]), channel, config, reporter)


def test_workers_that_cannot_start_after_a_loss_end_the_run(monkeypatch, reporter):
    """They would fail again and again."""
    channel, config = RunChannel(), load_recipe("demo", ["train.epochs=2"])

    def saving():
        channel.register_workers(2, ["a", "b"])
        until(channel.stop_requested)

    def failing():
        raise RuntimeError("no environment")

    with pytest.raises(RunError, match="no environment"):
        fit_with(Groups(monkeypatch, saving, failing, notices=["b"]), channel, config, reporter)


@pytest.mark.parametrize(("count", "finished"), [(1, False), (3, True), (5, True)], ids=["one", "early stop", "all"])
def test_a_driver_whose_machine_is_taken_away_ends_unless_the_run_is_complete(monkeypatch, reporter, count, finished):
    channel, config = RunChannel(), load_recipe("demo", ["train.epochs=5", "train.patience=2"])

    def saving():
        channel.register_workers(1, ["a"])
        until(channel.stop_requested)
        channel.send(epochs(count))

    groups = Groups(monkeypatch, saving, notices=["driver"])
    with nullcontext() if finished else pytest.raises(PreemptedError):
        fit_with(groups, channel, config, reporter)


@pytest.mark.parametrize(("own", "hint"), [(False, "decoding tasks have CPUs"), (True, "data.cache_dir answers")])
def test_a_worker_that_gets_no_clips_says_where_to_look(own, hint):
    worker, lines = object.__new__(Worker), []
    worker.config = load_recipe("demo", [f"scaling.decode_in_worker={str(own).lower()}"])
    worker.send_line = lambda text, level: lines.append(text)
    worker.explain_wait(59)
    assert not lines
    worker.explain_wait(60.2)
    assert "no batch of decoded clips for 60 s" in lines[0] and hint in lines[0]
    with pytest.raises(RunError, match=f"{hint}.*resumes the run"):
        worker.explain_wait(1800)
