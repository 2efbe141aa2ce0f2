"""What a run logs reaches MLflow once, also if the run is killed, its disk fails, or MLflow refuses something."""

import base64
import json
import subprocess
import sys
import zlib
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST

from pipelines.tracking import delivery
from pipelines.tracking.delivery import DeliveryWorker, sync_journals
from pipelines.tracking.journal import Journal, JournalInUse, JournalState, read_entries
from pipelines.tracking.mlflow_client import create_run, prepare_mlflow, refuse_foreign_server, source_tags
from pipelines.tracking.operations import LogMetrics, SetTags
from pipelines.tracking.tracker import Tracker
from pipelines.tracking.uris import (
    PARENT,
    links_text,
    run_link,
    runs_view,
    scrub,
    study_view,
    tracking_uri,
    view_link,
    view_text,
    without_secrets,
)
from posmlp.errors import UserError
from posmlp.metrics import MAIN_METRICS
from posmlp.text import shorten
from tests.helpers.tasks import OVERRIDES, TASKS
from tests.helpers.tracker_runs import link, once, recipe, rows, start, write_linear
from tests.helpers.waiting import until

pytestmark = pytest.mark.usefixtures("short_pauses")


def test_everything_arrives(tmp_path, lines):
    tracker = start(tmp_path, "tracking.experiment=" + "long" * 20)
    tracker.log_metrics({"train/loss": 2.5, "val/top1": float("nan")}, step=1)
    tracker.log_metrics({"train/loss": 1.5}, step=2)
    tracker.log_tags({"colour": "green", "long": "x" * 9000})
    tracker.log_table([{"id": 1}], "quarantine.json")
    tracker.log_table([{"id": 1}, {"id": 2}], "quarantine.json")
    tracker.log_file("pictures/loss.png", b"picture")
    assert tracker.close("FINISHED") == 0
    assert not lines

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.end_time >= run.info.start_time
    assert run.data.metrics["train/loss"] == 1.5
    assert any(key.startswith("system/cpu") for key in run.data.metrics)
    assert run.data.tags["colour"] == "green"
    assert run.data.tags["a"] == "b"
    folder = run.info.artifact_uri
    assert json.loads(mlflow.artifacts.load_text(f"{folder}/quarantine.json")) == [{"id": 1}, {"id": 2}]
    assert mlflow.artifacts.load_text(f"{folder}/pictures/loss.png") == "picture"
    assert "global_batch" in mlflow.artifacts.load_text(f"{folder}/config.yaml")
    assert rows(tmp_path / "mlflow.db", tracker.run_id) == once(1, 2)
    assert not [p for p in (tmp_path / "journal.files").rglob("*") if p.is_file()]


WRITER = """
import sys
from pathlib import Path
from pipelines.tracking.journal import Journal
from pipelines.tracking.tracker import Tracker
from posmlp.config import load_recipe
folder = Path(sys.argv[1])
config = load_recipe("demo", ["name=small", f"train.storage={folder}"])
tracker = Tracker.open(config, {}, journal=Journal(folder / "journal.jsonl"))
step = 0
while True:
    step += 1
    tracker.log_metrics({"train/loss": 1 / step, "val/top1": 0.5}, step)
"""


def test_a_killed_writer_leaves_every_metric_once(tmp_path):
    journal = tmp_path / "journal.jsonl"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
    try:
        until(lambda: process.poll() is not None or (journal.exists() and len(list(read_entries(journal))) > 300), 60)
        assert process.poll() is None
        with pytest.raises(JournalInUse, match="is in use"):
            sync_journals(tmp_path)
    finally:
        process.kill()
        process.wait()
    state = JournalState.read(journal)
    with open(journal, "a") as file:
        file.write('{"op": "metrics", "ti')  # killed in the middle of a line
    tracker = start(tmp_path, run_id=state.run_id)
    assert tracker.epochs_logged() == state.last_epoch > 300
    tracker.log_metrics({"train/loss": 0.0}, state.last_epoch + 1)
    assert tracker.close("FINISHED") == 0
    assert rows(tmp_path / "mlflow.db", state.run_id) == once(*range(1, state.last_epoch + 2))
    assert rows(tmp_path / "mlflow.db", state.run_id, "val/top1") == once(*range(1, state.last_epoch + 1))

    journal.with_suffix(".done").unlink()  # as if killed after the delivery and before its record
    assert sync_journals(tmp_path) == 0
    assert rows(tmp_path / "mlflow.db", state.run_id) == once(*range(1, state.last_epoch + 2))
    assert rows(tmp_path / "mlflow.db", state.run_id, "val/top1") == once(*range(1, state.last_epoch + 1))


def test_metrics_of_steps_reach_mlflow_once_whatever_is_sent_again(tmp_path):
    """A run that resumes repeats the steps since its checkpoint, and a kill may repeat the delivery."""

    def row(step):
        return [1_700_000_000_000 + step, step, 1 / step, 0.1, 50.0]

    first = start(tmp_path)
    first.log_steps([row(2), row(4)])
    first.log_metrics({"train/loss": 1.0}, step=1)
    first.log_steps([row(6)])
    assert first.close("KILLED") == 0
    second = start(tmp_path, run_id=first.run_id)
    second.log_steps([[7, *row(4)[1:]], [8, *row(6)[1:]], row(8)])  # at another time
    assert second.close("FINISHED") == 0
    (tmp_path / "journal.done").unlink()  # as if killed after the delivery and before its record
    assert sync_journals(tmp_path) == 0
    database = tmp_path / "mlflow.db"
    for name in ("by_step/train_loss", "by_step/lr", "by_step/clips_per_s"):
        assert rows(database, first.run_id, name) == once(2, 4, 6, 8)
    assert rows(database, first.run_id) == once(1)  # epochs and steps share no name
    history = MlflowClient(f"sqlite:///{database}").get_metric_history(first.run_id, "by_step/train_loss")
    assert {m.step: (m.value, m.timestamp) for m in history} == {s: (1 / s, row(s)[0]) for s in (2, 4, 6, 8)}

    (tmp_path / "journal.jsonl").rename(tmp_path / "lost.jsonl")  # MLflow alone knows the last step
    third = start(tmp_path, run_id=first.run_id)
    third.log_steps([[9, *row(8)[1:]], row(10)])
    assert third.close("FINISHED") == 0
    assert rows(database, first.run_id, "by_step/lr") == once(2, 4, 6, 8, 10)


def test_steps_that_were_logged_while_mlflow_was_down_arrive_once(tmp_path, monkeypatch):
    first = start(tmp_path)
    first.log_steps([[1, 1, 0.5, 0.1, 9.0]])
    assert first.close("KILLED") == 0
    for name in ("journal.jsonl", "journal.done"):
        (tmp_path / name).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "get_run", lambda *_: 1 / 0)
        offline = start(tmp_path, run_id=first.run_id)
        offline.log_steps([[5, 1, 0.5, 0.1, 9.0], [6, 2, 0.5, 0.1, 9.0]])  # it cannot know that MLflow has step 1
        assert offline.links() == {}
        until(lambda: not offline.journal.pending_count())
    assert offline.close("FINISHED") == 0
    assert rows(tmp_path / "mlflow.db", first.run_id, "by_step/lr") == once(1, 2)


def test_a_param_that_is_measured_again_keeps_its_first_value(tmp_path):
    tracker = start(tmp_path)
    tracker.log_params({"cost/latency_ms": "5", "train.epochs": "ignored"})
    tracker.log_params({"cost/latency_ms": "7", "cost/gmacs": "0.5"})
    assert tracker.close("FINISHED") == 0
    params = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(tracker.run_id).data.params
    assert (params["cost/latency_ms"], params["cost/gmacs"], params["train.epochs"]) == ("5", "0.5", "24")
    assert not tracker.journal.rejected_path.exists()


OLD_JOURNAL = """\
{"op": "open", "uri": "sqlite:///FOLDER/mlflow.db", "run_id": "RUN", "blind": true}
{"op": "metrics", "time": 1700000000001, "step": 1, "values": {"train/loss": 9.0}}
{"op": "metrics", "time": 1700000000002, "step": 2, "values": {"train/loss": 0.5, "val/top1": 0.25}}
{"op": "metrics of", "of": "TRIAL", "time": 1700000000003, "step": 4, "values": {"cost/latency_ms": 7.5}}
{"op": "tags", "tags": {"state": "failed"}, "of": "TRIAL"}
{"op": "tags", "tags": {"colour": "green"}}
{"op": "file", "path": "plots/loss.png", "file": "0a1b2c3d4e5f/loss.png"}
{"op": "fly"}
{"op": "status", "status": "FAILED", "time": 1700000000004, "of": "TRIAL"}
{"op": "status", "status": "KILLED", "time": 1700000000005}
"""


def test_a_journal_of_an_earlier_version_is_delivered(tmp_path, lines):
    run, trial = (start(tmp_path / name, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db") for name in ("run", "trial"))
    run.log_metrics({"train/loss": 1.0}, step=1)  # MLflow has this epoch already
    assert run.close("FINISHED") == trial.close("FINISHED") == 0
    journal = tmp_path / "old" / "journal.jsonl"
    (tmp_path / "old" / "journal.files" / "0a1b2c3d4e5f").mkdir(parents=True)
    (tmp_path / "old" / "journal.files" / "0a1b2c3d4e5f" / "loss.png").write_bytes(b"picture")
    text = OLD_JOURNAL.replace("FOLDER", str(tmp_path)).replace("RUN", run.run_id).replace("TRIAL", trial.run_id)
    journal.write_text(text)
    assert sync_journals(journal) == 0
    assert f"{journal}: 10 operations delivered to MLflow run {run.run_id}, 0 left" in lines
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    found = client.get_run(run.run_id)
    losses = client.get_metric_history(run.run_id, "train/loss")
    assert {(m.step, m.value, m.timestamp == 1700000000002) for m in losses} == {(1, 1.0, False), (2, 0.5, True)}
    assert (found.data.metrics["val/top1"], found.data.tags["colour"]) == (0.25, "green")
    assert (found.info.status, found.info.end_time) == ("KILLED", 1700000000005)
    assert mlflow.artifacts.load_text(f"{found.info.artifact_uri}/plots/loss.png") == "picture"
    other = client.get_run(trial.run_id)
    assert (other.data.metrics["cost/latency_ms"], other.data.tags["state"]) == (7.5, "failed")
    assert (other.info.status, other.info.end_time) == ("FAILED", 1700000000004)
    (rejected,) = (tmp_path / "old" / "journal.rejected").read_text().splitlines()
    assert json.loads(rejected)["line"] == '{"op": "fly"}\n'


def test_refused_operations_are_kept_apart_and_delay_nothing(tmp_path, lines):
    tracker = start(tmp_path)
    tracker.log_metrics({"train/loss": 1.0, "bad*name": 2.0, "val/top1": 3.0}, step=1)
    tracker.log_metrics({"train/loss": 0.5}, step=2)
    tracker.log_tags({"bad*tag": "x"})
    with tracker.journal.changed:
        tracker.log_file("lost.png", b"gone")
        (tracker.journal.files_folder / tracker.journal.queue[-1].operation.file).unlink()
    assert tracker.close("FINISHED") == 0
    assert rows(tmp_path / "mlflow.db", tracker.run_id) == once(1, 2)
    assert rows(tmp_path / "mlflow.db", tracker.run_id, "val/top1") == once(1)
    kept = [json.loads(line) for line in (tmp_path / "journal.rejected").read_text().splitlines()]
    assert [k["op"] for k in kept] == ["metrics", "tags", "file"]
    assert kept[0]["values"] == {"bad*name": 2.0}
    assert len(lines) == 1
    assert "MLflow refuses an operation" in lines[0]


def test_a_broken_artifact_store_delays_no_metrics(tmp_path, lines):
    tracker = start(tmp_path)
    until(lambda: not tracker.journal.pending_count())
    folder = tmp_path / "mlartifacts"
    folder.rename(tmp_path / "away")
    folder.touch()
    tracker.log_file("a.png", b"a")
    tracker.log_metrics({"train/loss": 1.0}, step=1)
    assert tracker.close("FINISHED") == 1
    assert rows(tmp_path / "mlflow.db", tracker.run_id) == once(1)
    assert len(lines) == 1
    assert "MLflow does not store a.png" in lines[0]
    assert sync_journals(tmp_path) == 1
    folder.unlink()
    (tmp_path / "away").rename(folder)
    assert sync_journals(tmp_path) == 0
    assert [p.read_bytes() for p in folder.rglob("a.png")] == [b"a"]


def test_a_model_whose_upload_was_interrupted_becomes_one_model(tmp_path, monkeypatch):
    tracker = start(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "finalize_logged_model", lambda *_: 1 / 0)
        tracker.log_model(write_linear, link(tracker.run_id))
        assert tracker.close("FINISHED") == 1
    assert sync_journals(tmp_path) == 0
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run = client.get_run(tracker.run_id)
    (logged,) = client.search_logged_models([run.info.experiment_id])
    assert str(logged.status) == "READY"
    assert [m.model_id for m in run.outputs.model_outputs] == [logged.model_id]
    assert not (tmp_path / "journal.files" / "model").exists()


def test_a_bad_request_is_a_refusal_only_if_it_repeats(tmp_path):
    tracker = start(tmp_path)
    client = tracker.delivery.client()
    calls = []

    class Cut:
        def __getattr__(self, name):
            return getattr(client, name)

        def log_batch(self, *args, **kwargs):
            calls.append(kwargs)
            if len(calls) in (1, 2):
                raise MlflowException("connection cut", error_code=BAD_REQUEST)
            return client.log_batch(*args, **kwargs)

    tracker.delivery.connection = Cut()
    tracker.log_metrics({"train/loss": 1.0}, step=1)
    until(lambda: not tracker.journal.pending_count())
    assert tracker.close("FINISHED") == 0
    assert rows(tmp_path / "mlflow.db", tracker.run_id) == once(1)
    assert not tracker.journal.rejected_path.exists()


def test_sync_rejects_what_mlflow_never_accepts_and_delivers_the_rest(tmp_path, monkeypatch):
    """The run has ended before it tried often enough."""
    monkeypatch.setattr(delivery, "FIRST_PAUSE", 0.01)
    tracker, log_batch = start(tmp_path), MlflowClient.log_batch
    assert tracker.close("FINISHED") == 0
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(LogMetrics(0, 1, {"odd": 1.0}))
    journal.append(LogMetrics(0, 1, {"train/loss": 1.0}, run_id=tracker.run_id))
    journal.append(SetTags({"after": "1"}))
    journal.close()

    def refuse(self, run_id, metrics=(), **others):
        if any(metric.key == "odd" for metric in metrics):
            raise MlflowException("invalid byte sequence", error_code=BAD_REQUEST)
        return log_batch(self, run_id, metrics, **others)

    monkeypatch.setattr(MlflowClient, "log_batch", refuse)
    assert sync_journals(tmp_path) == 0
    assert "invalid byte sequence" in Journal(tmp_path / "journal.jsonl").rejected_path.read_text()
    assert MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(tracker.run_id).data.tags["after"] == "1"
    assert rows(tmp_path / "mlflow.db", tracker.run_id) == once(1)


def test_a_journal_that_cannot_be_written_stops_nothing(tmp_path, lines):
    (tmp_path / "file").touch()
    tracker = Tracker.open(recipe(tmp_path), {}, journal=Journal(tmp_path / "file" / "journal.jsonl"))
    tracker.log_metrics({"train/loss": 1.0}, step=1)
    tracker.log_file("a.png", b"a")
    assert tracker.close("FINISHED") == 0
    assert rows(tmp_path / "mlflow.db", tracker.run_id) == once(1)
    assert len(lines) == 1
    assert "file/journal.jsonl cannot be written (File exists)" in lines[0]


def test_an_active_run_locks_its_journal(tmp_path):
    tracker = start(tmp_path)
    with pytest.raises(JournalInUse, match=r"journal\.jsonl is in use: either its run is still active"):
        start(tmp_path, run_id=tracker.run_id)
    assert tracker.close("FINISHED") == 0
    assert sync_journals(tmp_path) == 0


def test_another_run_of_the_same_name_has_a_journal_of_its_own(tmp_path):
    first = start(tmp_path)
    assert first.close("FINISHED") == 0
    second = start(tmp_path)
    assert second.epochs_logged() == 0
    assert second.close("FINISHED") == 0
    assert second.run_id != first.run_id
    assert JournalState.read(tmp_path / "journal.jsonl").run_id == second.run_id
    assert JournalState.read(tmp_path / f"journal.{first.run_id}.jsonl").run_id == first.run_id
    assert sync_journals(tmp_path) == 0


def test_a_new_run_needs_an_mlflow_that_answers(tmp_path):
    with pytest.raises(UserError, match=r"MLflow at http://127\.0\.0\.1:9 cannot be written, see tracking\.uri"):
        start(tmp_path, "tracking.uri=http://127.0.0.1:9")
    assert not (tmp_path / "journal.jsonl").exists()


def test_a_run_that_mlflow_does_not_know_cannot_be_resumed(tmp_path):
    with pytest.raises(UserError, match=r"(?s)cannot be written, see tracking\.uri.*no-such-run"):
        start(tmp_path, run_id="no-such-run")


def test_a_long_parameter_is_cut(tmp_path):
    tracker = start(tmp_path, f"data.train.path=/{'x' * 7000}")
    assert tracker.close("FINISHED") == 0
    param = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(tracker.run_id).data.params["data.train.path"]
    assert (len(param), param[-3:]) == (6000, "...")
    assert shorten("abcdef", 5) == "ab..."


def test_remote_storage_needs_a_tracking_uri(tmp_path):
    config = recipe(tmp_path)
    remote = config.model_copy(update={"train": config.train.model_copy(update={"storage": "s3://bucket/runs"})})
    with pytest.raises(UserError, match=r"s3://bucket/runs is not on this machine.*set tracking\.uri"):
        tracking_uri(remote)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("http://me:pass@host:5000/x", "http://host:5000/x"),
        ("postgresql+psycopg2://me:p@ss/w@host/db?password=x", "postgresql+psycopg2://host/db"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("https://host", "https://host"),
        ("databricks", "databricks"),
    ],
)
def test_secrets_are_removed_from_a_uri(uri, expected):
    assert without_secrets(uri) == expected


@pytest.mark.parametrize(
    ("text", "uri", "expected"),
    [
        ("annotations/train.csv at http://ann@mlflow", "http://ann@mlflow", "annotations/train.csv at http://mlflow"),
        ("ann@mlflow:5000 refuses", "http://ann@mlflow", "***@mlflow:5000 refuses"),
        ("me:hush at http://me:hush@a/x", "http://me:hush@a", "*** at http://a/x"),
    ],
)
def test_secrets_are_removed_from_a_text_and_words_stay(text, uri, expected):
    assert scrub(text, uri) == expected


@pytest.mark.parametrize(
    ("uri", "page"),
    [
        ("http://me:pass@host:5000/x/", "http://host:5000/x/#/"),
        ("sqlite:////runs/mlflow.db", "http://127.0.0.1:5000/#/"),
        ("postgresql://me:pass@host/db", "http://127.0.0.1:5000/#/"),
    ],
)
def test_links_lead_to_the_pages_for_training(uri, page):
    run = run_link(uri, "7", "abc")
    assert run == f"{page}experiments/7/runs/abc?workflowType=machine_learning"
    view = view_link(uri, "7", "some", charts=True)
    query = "workflowType=machine_learning&viewStateShareKey=some&compareRunsMode=CHART"
    assert view == f"{page}experiments/7/runs?{query}"
    text = links_text(uri, {"this run": run, "all": view})
    assert text.endswith(f"\n    this run  {run}\n    all       {view}") and "pass" not in text
    assert ("mlflow server --backend-store-uri" in text) == (page != "http://host:5000/x/#/")


@pytest.mark.parametrize("task", TASKS)
def test_views_fit_into_an_experiments_tag_and_are_stored_once(tmp_path, task):
    """A tag of an experiment has at most 5000 characters."""
    main = MAIN_METRICS[task]
    study = study_view("n" * 60, [f"dimension{number}" for number in range(20)], main)
    assert len(view_text(study)) <= 2500  # also for longer names
    tracker = start(tmp_path, *OVERRIDES[task])
    tracker.share_view("study-1", study)
    assert tracker.close("FINISHED") == 0
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    tags = client.get_experiment(tracker.experiment_id).tags
    for name, view in (("study-1", study), ("posmlp-runs", runs_view(main))):
        kind, _, packed = tags[f"mlflow.sharedViewState.{name}"].partition(";")
        assert kind == "deflate" and json.loads(zlib.decompress(base64.b64decode(packed))) == view
        shown = {
            key for key in ("val/top1", "val/best_top1", "val/map", "val/best_map") if f'"{key}"' in json.dumps(view)
        }
        assert shown == {main.key, main.best}
    assert "Model training" in tags["mlflow.note.content"]
    assert tracker.links()["all runs"].endswith("&viewStateShareKey=posmlp-runs")
    assert f"/experiments/{tracker.experiment_id}/runs/{tracker.run_id}?" in tracker.links()["this run"]


def test_a_run_says_who_started_it_with_what(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/posmlp", "--quiet", "train", "demo"])
    tags = source_tags()
    assert (tags["mlflow.user"], tags["mlflow.source.name"], tags["mlflow.source.type"]) == (
        "ann",
        "posmlp train",
        "LOCAL",
    )
    monkeypatch.setattr(sys, "argv", [""])
    assert source_tags()["mlflow.source.name"] == "python"


def test_a_folder_without_a_journal_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no tracking journal"):
        sync_journals(tmp_path)
    (tmp_path / "journal.jsonl").write_text('{"op"')
    with pytest.raises(UserError, match="names no MLflow run"):
        sync_journals(tmp_path)


def test_a_checkpoints_recipe_does_not_choose_who_gets_the_password(tmp_path, monkeypatch):
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)  # MLflow looks there for a file with credentials
    theirs, local = recipe(tmp_path, "tracking.uri=http://mlflow.example:5000"), recipe(tmp_path)
    refuse_foreign_server(theirs)
    for name in ("PASSWORD", "TOKEN"):
        with monkeypatch.context() as patch:
            patch.setenv(f"MLFLOW_TRACKING_{name}", "hushhush")
            refuse_foreign_server(local)
            for own in ("", "http://mlflow.example", "http://me:hushhush@other.example:5000"):
                patch.setenv("MLFLOW_TRACKING_URI", own)
                with pytest.raises(UserError, match=r"logs to http://mlflow\.example:5000, .* tracking\.uri=null"):
                    refuse_foreign_server(theirs)
            patch.setenv("MLFLOW_TRACKING_URI", "http://me:hushhush@mlflow.example:5000/")
            refuse_foreign_server(theirs)


def test_metrics_sent_again_after_a_kill_are_stored_once(tmp_path):
    """Those that are not a number too, which older versions of MLflow did not recognise (mlflow#24612)."""
    prepare_mlflow()
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    run_id = client.create_run(client.create_experiment("again")).info.run_id
    journal = Journal(tmp_path / "journal.jsonl")
    for step in range(1, 5):
        values = {"train/loss": 1.0 / step, "data/object_store_mb": float("nan") if step % 2 else 3.0}
        journal.append(LogMetrics(1000 * step, step, values))
    delivery = DeliveryWorker(journal, uri, run_id, check_stored_epochs=False)
    delivery.deliver(delivery.next_entries())  # and the process is killed before it writes how far it got
    journal.append(LogMetrics(9000, 9, {"train/loss": 0.1, "data/object_store_mb": float("nan")}))
    delivery.deliver_all()
    journal.close()
    for key in ("train/loss", "data/object_store_mb"):
        assert rows(tmp_path / "mlflow.db", run_id, key) == once(1, 2, 3, 4, 9)
    assert not (tmp_path / "journal.rejected").exists()


def test_the_run_of_a_trial_that_was_killed_at_its_start_is_used_with_other_settings(tmp_path):
    """MLflow refuses to change a param: the run keeps those that it started with."""
    prepare_mlflow()
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    config = recipe(tmp_path)
    tags = {PARENT: create_run(client, config, {"study": "s"}), "trial": "3"}
    first = create_run(client, config, tags, {"search.width": 8})
    changed = recipe(tmp_path, "scaling.workers=2", "scaling.max_failures=9")
    assert create_run(client, changed, tags, {"search.width": 8, "search.depth": 2}) == first
    params = client.get_run(first).data.params
    assert (params["scaling.workers"], params["scaling.max_failures"]) == ("1", "3")
    assert (params["search.width"], params["search.depth"]) == ("8", "2")
