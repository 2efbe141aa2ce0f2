"""Every metric of a run reaches MLflow once, although the server, a real one, is killed, hangs or comes back."""

import math
import os
import signal
import time
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient

from pipelines.tracking import delivery
from pipelines.tracking.delivery import sync_journals
from pipelines.tracking.journal import read_entries
from pipelines.tracking.operations import EndRun
from posmlp.errors import UserError
from tests.helpers.mlflow_server import MlflowServer
from tests.helpers.small_runs import active_uri
from tests.helpers.tracker_runs import linear, link, once, rows, start, write_linear
from tests.helpers.waiting import until

pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.fixture(scope="module")
def one_server(tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def server(one_server):
    one_server.start()
    return one_server


def test_a_server_that_stops_during_a_run_gets_every_metric_once_when_it_is_back(server, tmp_path, lines):
    tracker = start(tmp_path, f"tracking.uri={server.uri}")
    tracker.log_metrics({"train/loss": 1.0}, step=1)
    until(lambda: not tracker.journal.pending_count())
    server.kill()
    begun = time.monotonic()
    for step in range(2, 40):
        tracker.log_metrics({"train/loss": 1 / step, "val/top1": step / 100}, step)
    tracker.log_file("loss.png", b"old")
    tracker.log_file("loss.png", b"new")
    assert time.monotonic() - begun < 5  # nothing waits for MLflow
    until(lambda: lines)
    tracker.delivery.failures = 10_000  # as after days
    server.start()
    for step in range(40, 45):
        tracker.log_metrics({"train/loss": 1 / step, "val/top1": step / 100}, step)
    assert tracker.close("FINISHED") == 0
    assert rows(server.database, tracker.run_id) == once(*range(1, 45))
    assert rows(server.database, tracker.run_id, "val/top1") == once(*range(2, 45))
    assert len(lines) == 2
    assert lines[0].startswith(
        f"MLflow at {server.uri} does not answer (connection refused). The run continues; operations wait in {tmp_path}"
    )
    assert lines[1].startswith(f"MLflow at {server.uri} answers again")
    client = MlflowClient(server.uri)
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    local = client.download_artifacts(tracker.run_id, "loss.png", tmp_path)
    assert Path(local).read_bytes() == b"new"


def test_what_a_dead_server_missed_is_synced_later(server, tmp_path, lines):
    tracker = start(tmp_path, f"tracking.uri={server.uri}")
    server.kill()
    for step in range(1, 1201):  # more than fits into one call
        tracker.log_metrics({"train/loss": 1 / step, "val/top1": 0.5}, step)
    begun = time.monotonic()
    tracker.log_model(write_linear, link(tracker.run_id))
    exported = time.monotonic()
    left = tracker.close("FINISHED")
    assert time.monotonic() - exported < delivery.FLUSH_WAIT_WHEN_DOWN + 5
    assert exported - begun < 60
    assert left == tracker.journal.pending_count() >= 1203
    with pytest.raises(UserError, match=rf"MLflow at {server.uri} does not answer .*; {left} operations still wait in"):
        sync_journals(tmp_path)

    server.start()
    lines.clear()
    assert sync_journals(tmp_path) == 0
    assert lines == [f"{tracker.journal.path}: {left} operations delivered to MLflow run {tracker.run_id}, 0 left"]
    assert sync_journals(tracker.journal.path) == 0
    assert ": 0 operations delivered" in lines[1]
    assert rows(server.database, tracker.run_id) == once(*range(1, 1201))
    client = MlflowClient(server.uri)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["train/loss"] == 1 / 1200
    operations = [entry.operation for entry in read_entries(tracker.journal.path)]
    ended = [operation for operation in operations if isinstance(operation, EndRun)]
    assert run.info.end_time == ended[0].time
    (logged,) = client.search_logged_models([run.info.experiment_id], f"source_run_id='{tracker.run_id}'")
    assert (logged.name, str(logged.status)) == ("model", "READY")
    assert [m.model_id for m in run.outputs.model_outputs] == [logged.model_id]
    with active_uri(server.uri):
        loaded = mlflow.pytorch.load_model(f"runs:/{tracker.run_id}/model")
    clip = torch.randn(1, 3)
    torch.testing.assert_close(loaded(clip), linear()(clip))


def test_a_run_can_be_resumed_while_the_server_is_down(server, tmp_path):
    overrides = [f"tracking.uri={server.uri}"]
    first = start(tmp_path, *overrides)
    first.log_metrics({"train/loss": 1.0}, step=1)
    assert first.close("KILLED") == 0
    server.kill()
    second = start(tmp_path, *overrides, run_id=first.run_id)
    assert second.epochs_logged() == 1
    second.log_metrics({"train/loss": 0.5}, step=2)
    assert second.close("KILLED") == 4  # OpenRun, the epoch, system metrics, EndRun
    elsewhere = tmp_path / "elsewhere"  # a third driver, on a machine that has no journal and no MLflow
    third = start(elsewhere, *overrides, run_id=first.run_id)
    assert third.epochs_logged() == 0
    for step in (1, 2, 3):
        third.log_metrics({"train/loss": 1 / step}, step)
    assert third.close("FINISHED") > 0
    server.start()
    assert sync_journals(tmp_path / "journal.jsonl") == 0
    assert rows(server.database, first.run_id) == once(1, 2)
    assert sync_journals(elsewhere) == 0
    assert rows(server.database, first.run_id) == once(1, 2, 3)
    assert MlflowClient(server.uri).get_run(first.run_id).info.status == "FINISHED"


def test_a_server_that_hangs_does_not_delay_the_end_of_a_run(server, tmp_path):
    tracker = start(tmp_path, f"tracking.uri={server.uri}")
    until(lambda: not tracker.journal.pending_count())
    os.killpg(server.process.pid, signal.SIGSTOP)
    try:
        tracker.log_metrics({"train/loss": 1.0}, step=1)
        begun = time.monotonic()
        assert tracker.close("FINISHED", wait_s=1.0) == 3  # the metrics, system metrics, EndRun
        assert time.monotonic() - begun < 4
    finally:
        os.killpg(server.process.pid, signal.SIGCONT)
    tracker.delivery.join(30)  # the call that hung ends, and the journal is unlocked
    assert sync_journals(tmp_path) == 0
    assert rows(server.database, tracker.run_id) == once(1)
    assert MlflowClient(server.uri).get_run(tracker.run_id).info.status == "FINISHED"


def test_a_password_in_the_uri_stays_in_memory(server, tmp_path, lines, monkeypatch, capfd):
    secret = "hushhush"
    uri = server.uri.replace("//", f"//me:{secret}@")
    tracker = start(tmp_path, f"tracking.uri={uri}")
    server.kill()
    tracker.log_metrics({"train/loss": 1.0}, step=1)
    tracker.log_tags({"changed": f"now {uri}"})
    until(lambda: lines)
    assert tracker.close("FINISHED") > 0
    with pytest.raises(UserError) as error:
        sync_journals(tmp_path, uri)
    with pytest.raises(UserError) as other:
        start(tmp_path / "new", f"tracking.uri={uri}")
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert sync_journals(tmp_path) == 0
    assert rows(server.database, tracker.run_id) == once(1)
    assert server.uri in str(error.value)
    assert secret not in "\n".join([*lines, str(error.value), str(other.value), *capfd.readouterr()])
    files = [p for folder in (tmp_path, server.folder) for p in folder.rglob("*") if p.is_file()]
    assert tmp_path / "journal.jsonl" in files
    assert not [p for p in files if secret.encode() in p.read_bytes()]


def test_a_servers_infinite_metrics_and_deleted_experiment(server, tmp_path, lines):
    """The server's store is the same as the local one, with the network's encoding before it."""
    tracker = start(tmp_path, f"tracking.uri={server.uri}", "tracking.experiment=mine")
    tracker.log_metrics({"train/loss": math.inf, "val/loss": -math.inf, "val/top1": math.nan}, step=1)
    until(lambda: not tracker.journal.pending_count())
    client = MlflowClient(server.uri)
    data = client.get_run(tracker.run_id).data
    assert all(math.isnan(data.metrics[name]) for name in ("train/loss", "val/loss", "val/top1"))
    tags = {name: text for name, text in data.tags.items() if name.startswith("infinite.")}
    assert tags == {"infinite.train/loss": "inf at step 1", "infinite.val/loss": "-inf at step 1"}

    number = client.get_experiment_by_name("mine").experiment_id
    client.delete_experiment(number)
    tracker.log_metrics({"train/loss": 1.0}, step=2)
    assert tracker.close("FINISHED") > 0
    command = f"MLFLOW_TRACKING_URI={server.uri} mlflow experiments restore --experiment-id {number}"
    assert len(lines) == 1 and "'mine'" in lines[0] and command in lines[0]
    with pytest.raises(UserError, match=r"'mine' .* is deleted"):
        start(tmp_path / "new", f"tracking.uri={server.uri}", "tracking.experiment=mine")
    client.restore_experiment(number)
    assert sync_journals(tmp_path) == 0
    assert client.get_run(tracker.run_id).data.metrics["train/loss"] == 1.0
