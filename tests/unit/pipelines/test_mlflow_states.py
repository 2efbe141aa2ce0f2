"""States of MLflow that stop a run: one line names the experiment, the store and the way out, and nothing is lost."""

import http.server
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from pipelines.cli import main
from pipelines.planning.doctor import check_mlflow
from pipelines.studies.logged_study import read_study_from_mlflow
from pipelines.tracking.delivery import sync_journals
from pipelines.tracking.journal import Journal
from pipelines.tracking.mlflow_client import (
    PARENT,
    as_metrics,
    explain_store_error,
    infinite_tags,
    stored_metrics,
)
from pipelines.tracking.tracker import Tracker
from posmlp.config import load_recipe
from posmlp.errors import UserError
from tests.helpers.waiting import until

pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.fixture
def uri(tmp_path):
    return f"sqlite:///{tmp_path}/mlflow.db"


def start(folder, *overrides, run_id=None, tags=()):
    config = load_recipe("demo", ["name=small", f"train.storage={folder}", *overrides])
    journal = folder / f"{overrides[0] if tags else 'journal'}".replace("=", "-") / "journal.jsonl"
    return Tracker.open(config, dict(tags), run_id, journal=Journal(journal))


def refusal(folder, *overrides, **arguments):
    """The message with which a run is refused: one line."""
    with pytest.raises(UserError) as refused:
        start(folder, *overrides, **arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- deleted and renamed -----------------------------------------------------------------------------------------


def test_a_deleted_experiment_is_named_with_the_ways_out(tmp_path, uri):
    client = MlflowClient(uri)
    number = client.create_experiment("gone")
    client.delete_experiment(number)
    text = refusal(tmp_path, "tracking.experiment=gone")
    command = f"MLFLOW_TRACKING_URI={uri} mlflow experiments restore --experiment-id {number}"
    for part in (f"MLflow at {uri}", "'gone'", f"`{command}`", "tracking.experiment=NAME"):
        assert part in text
    (finding,) = check_mlflow(load_recipe("demo", [f"tracking.uri={uri}", "tracking.experiment=gone"]))
    assert finding.level == "fail" and command in finding.what

    variable, program, *arguments = command.split()
    environment = os.environ | dict([variable.split("=", 1)])
    subprocess.run([Path(sys.executable).parent / program, *arguments], env=environment, check=True, timeout=120)
    assert start(tmp_path, "tracking.experiment=gone").close("FINISHED") == 0


def test_a_run_waits_while_its_experiment_is_deleted(tmp_path, uri, lines):
    """MLflow calls everything for a deleted run an invalid parameter; the operations are not rejected for that."""
    tracker = start(tmp_path, "tracking.experiment=mine")
    until(lambda: not tracker.journal.pending_count())
    client = MlflowClient(uri)
    number = client.get_experiment_by_name("mine").experiment_id
    client.delete_experiment(number)
    tracker.log_metrics({"train/loss": 1.0, "val/top1": 0.5}, step=1)
    tracker.log_tags({"colour": "green"})
    assert tracker.close("FINISHED") >= 3
    assert len(lines) == 1
    for part in (f"MLflow at {uri} does not accept", "'mine'", f"restore --experiment-id {number}`", "operations wait"):
        assert part in lines[0]
    with pytest.raises(
        UserError, match=rf"'mine' \(id {number}\).* is deleted; restore it .* operations still wait in"
    ):
        sync_journals(tmp_path / "journal")
    text = refusal(tmp_path, "tracking.experiment=mine", run_id=tracker.run_id)
    assert "'mine'" in text and f"restore --experiment-id {number}`" in text and "name=..." in text

    client.restore_experiment(number)
    assert sync_journals(tmp_path / "journal") == 0
    run = client.get_run(tracker.run_id)
    assert (run.data.metrics["val/top1"], run.data.tags["colour"], run.info.status) == (0.5, "green", "FINISHED")
    assert not tracker.journal.rejected_path.exists()


def test_a_deleted_run_waits_and_a_deleted_trial_does_not_delay_its_study(tmp_path, uri):
    study = start(tmp_path)
    client = MlflowClient(uri)
    trials = [client.create_run(client.get_run(study.run_id).info.experiment_id).info.run_id for _ in range(2)]
    client.delete_run(trials[0])
    for trial in (*trials, "0" * 32):  # deleted, as it should be, and gone for good
        study.log_metrics({"cost/latency_ms": 5.0}, step=1, run_id=trial)
    study.log_metrics({"train/loss": 1.0}, step=1)
    assert study.close("FINISHED") == 0
    assert client.get_run(study.run_id).data.metrics["train/loss"] == 1.0
    assert client.get_run(trials[1]).data.metrics["cost/latency_ms"] == 5.0
    assert len(study.journal.rejected_path.read_text().splitlines()) == 2
    client.delete_run(study.run_id)
    text = refusal(tmp_path, run_id=study.run_id)
    assert f"`MLFLOW_TRACKING_URI={uri} mlflow runs restore --run-id {study.run_id}`" in text


def test_a_run_of_a_renamed_experiment_stays_in_it(tmp_path, uri):
    first = start(tmp_path, "tracking.experiment=before")
    assert first.close("KILLED") == 0
    client = MlflowClient(uri)
    experiment = client.get_run(first.run_id).info.experiment_id
    client.rename_experiment(experiment, "after")
    study = start(tmp_path, "tracking.experiment=before", run_id=first.run_id)
    assert study.place == f"experiment 'after' at {uri}, run {first.run_id}"
    trial = start(tmp_path, "tracking.experiment=before", tags={PARENT: first.run_id, "trial": "0"})
    assert client.get_run(trial.run_id).info.experiment_id == experiment
    assert client.get_experiment_by_name("before") is None
    client.delete_experiment(experiment)
    text = refusal(tmp_path, "tracking.experiment=other", tags={PARENT: first.run_id, "trial": "1"})
    assert "'after'" in text and f"restore --experiment-id {experiment}" in text
    client.restore_experiment(experiment)
    assert study.close("FINISHED") == trial.close("FINISHED") == 0


def test_a_run_that_the_store_does_not_have_names_both_ways_out(tmp_path, uri):
    start(tmp_path).close("FINISHED")
    text = refusal(tmp_path, run_id="0" * 32)
    for part in (f"MLflow at {uri}", "0" * 32, "another store", "name=..."):
        assert part in text


# --- copied and moved ----------------------------------------------------------------------------------------------


def test_a_copied_project_says_where_its_files_would_go_and_the_command_helps(tmp_path, lines, capsys):
    """MLflow stores absolute paths: without the command, a run in the copy writes into the original."""
    original, copy = tmp_path / "original", tmp_path / "copy"
    first = start(original)
    first.log_file("plots/a.png", b"first")
    assert first.close("FINISHED") == 0
    assert not lines
    model = MlflowClient(f"sqlite:///{original}/mlflow.db").create_logged_model(first.experiment_id, "model")
    shutil.copytree(original, copy)

    second = start(copy, "name=second")
    second.log_file("b.png", b"second")
    assert second.close("FINISHED") == 0
    assert list(original.rglob("b.png"))  # in silence before
    (warning,) = lines
    assert warning.startswith(f"{copy}/mlflow.db was copied or moved: ") and f"{original}/mlartifacts" in warning
    command = f"`posmlp relocate {copy}/mlflow.db`"
    assert command in warning and "tracking.experiment=NAME" in warning and warning.count("\n") == 1

    assert main(command.strip("`").split()[1:]) == 0
    assert f"{original}/mlartifacts is now the folder next to" in capsys.readouterr().out
    shutil.rmtree(original)
    client = MlflowClient(f"sqlite:///{copy}/mlflow.db")
    assert Path(client.download_artifacts(first.run_id, "plots/a.png")).read_bytes() == b"first"
    assert client.get_logged_model(model.model_id).artifact_location.startswith(f"file://{copy}/mlartifacts/")
    third = start(copy, "name=third")
    third.log_file("c.png", b"third")
    assert third.close("FINISHED") == 0
    assert len(lines) == 1
    assert [path.read_bytes() for path in copy.rglob("c.png")] == [b"third"] and not original.exists()
    assert main(["relocate", f"{copy}/mlflow.db"]) == 0
    assert "nothing to change" in capsys.readouterr().out
    assert main(["relocate", f"{copy}/no.db"]) == 1
    assert "no MLflow database" in capsys.readouterr().err


def test_a_users_own_place_of_artifacts_is_no_copy(tmp_path, uri, lines):
    MlflowClient(uri).create_experiment("mine", artifact_location=(tmp_path / "elsewhere").as_uri())
    assert start(tmp_path, "tracking.experiment=mine").close("FINISHED") == 0
    assert not lines


# --- stores that cannot be written ---------------------------------------------------------------------------------


@contextmanager
def no_special_rights():
    """Without root's right to write everything, if the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that any user can enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_store_without_write_permission(open_folder, what):
    uri, database = f"sqlite:///{open_folder}/store/mlflow.db", open_folder / "store" / "mlflow.db"
    start(open_folder, f"tracking.uri={uri}").close("FINISHED")
    read_only = database if what == "file" else database.parent
    database.parent.chmod(0o777)
    database.chmod(0o666)
    read_only.chmod(0o555 if what == "folder" else 0o444)
    with no_special_rights():
        text = refusal(Path(tempfile.gettempdir()) / "none", f"tracking.uri={uri}")
    assert text.startswith(f"MLflow at {uri} cannot be written: {read_only}: Permission denied; make it writable")
    assert "tracking.uri" in text


@pytest.mark.parametrize("where", ["file/mlflow.db", "folder", "file/deep/mlflow.db"])
def test_a_store_where_no_file_can_be(tmp_path, where):
    """MLflow would try for 100 seconds to open it."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    text = refusal(tmp_path, f"tracking.uri=sqlite:///{tmp_path}/{where}")
    assert f"{tmp_path}/{where} cannot be written: {tmp_path}/f" in text


def test_a_store_that_becomes_read_only_loses_nothing(tmp_path, uri, lines):
    tracker = start(tmp_path)
    until(lambda: not tracker.journal.pending_count())
    tracker.delivery.connection = MlflowClient(f"sqlite:///file:{tmp_path}/mlflow.db?mode=ro&uri=true")
    tracker.log_metrics({"train/loss": 1.0}, step=1)
    assert tracker.close("FINISHED") > 0
    assert "its file or folder cannot be written; make it writable" in lines[0]
    assert sync_journals(tmp_path / "journal") == 0
    assert MlflowClient(uri).get_run(tracker.run_id).data.metrics["train/loss"] == 1.0


def make_old_store(path, revision):
    """Make a store as an older MLflow did: alembic upgrades the first tables up to a revision."""
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config, create_sqlalchemy_engine
    from mlflow.store.tracking.dbmodels.initial_models import Base

    engine = create_sqlalchemy_engine(f"sqlite:///{path}")
    Base.metadata.create_all(engine)
    config = _get_alembic_config(f"sqlite:///{path}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()


@pytest.mark.parametrize("revision", ["0c779009ac13", "bd07f7e963c5"])  # of 2022 and 2021
def test_a_store_of_an_older_mlflow_is_left_as_it_is(tmp_path, uri, revision):
    """MLflow itself would upgrade it in silence, and the older MLflow could not read it any more."""
    make_old_store(tmp_path / "mlflow.db", revision)
    before = (tmp_path / "mlflow.db").read_bytes()
    for text in (refusal(tmp_path), refusal(tmp_path, run_id="0" * 32)):
        for part in (
            f"MLflow at {uri}",
            f"older MLflow (schema {revision})",
            f"`mlflow db upgrade {uri}`",
            "back it up",
        ):
            assert part in text
    (finding,) = check_mlflow(load_recipe("demo", [f"tracking.uri={uri}"]))
    assert finding.level == "fail" and "older MLflow" in finding.what
    with pytest.raises(UserError, match="older MLflow"):
        read_study_from_mlflow("look", uri)
    assert (tmp_path / "mlflow.db").read_bytes() == before

    command = [Path(sys.executable).parent / "mlflow", "db", "upgrade", uri]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    assert start(tmp_path).close("FINISHED") == 0


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("UPDATE alembic_version SET version_num = 'feedfacecafe'", ["newer MLflow than", "feedfacecafe"]),
        ("DROP TABLE experiments", ["tables are of another program"]),
    ],
)
def test_a_store_of_a_newer_mlflow_or_of_another_program(tmp_path, uri, change, parts):
    start(tmp_path).close("FINISHED")
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute(change)
        connection.execute("UPDATE alembic_version SET version_num = 'feedfacecafe'")
        connection.commit()
    text = refusal(tmp_path)
    assert "db upgrade" not in text and "tracking.uri" in text
    for part in (f"MLflow at {uri}", *parts):
        assert part in text


# --- servers that refuse, and what answers in place of one ----------------------------------------------------------

PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>" + b"please " * 500 + b"</body></html>"


@pytest.fixture
def server():
    """A server whose answer to everything is ``answer``: a status, a media type and a body."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, media, body = self.server.answer
            self.send_response(status)
            self.send_header("Content-Type", media)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        ((401, "text/plain", b"You are not authenticated."), ["wrong or expired (401)", "MLFLOW_TRACKING_TOKEN"]),
        (
            (401, "application/json", b'{"error_code": "UNAUTHENTICATED", "message": "token expired"}'),
            ["wrong or expired (401)", "MLFLOW_TRACKING_PASSWORD"],
        ),
        ((403, "text/plain", b"Permission denied"), ["may not do that (403)", "EDIT", "tracking.experiment=NAME"]),
        (
            (403, "application/json", b'{"error_code": "PERMISSION_DENIED", "message": "no"}'),
            ["may not do that (403)", "tracking.experiment=NAME"],
        ),
        ((200, "text/html", PAGE), ["a web page answers instead of MLflow", "NO_PROXY"]),
        ((404, "text/html", PAGE), ["a web page (404) answers instead of MLflow", "address"]),
        ((407, "text/html", PAGE), ["a proxy asks for a login (407)", "NO_PROXY"]),
        ((502, "text/html", PAGE), ["error 502 of the server, or of a proxy"]),
        ((503, "text/plain", b"busy"), ["error 503"]),
    ],
)
def test_a_server_that_refuses(server, tmp_path, monkeypatch, answer, parts):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server.answer, port = answer, server.server_port
    text = refusal(tmp_path, f"tracking.uri=http://me:hushhush@127.0.0.1:{port}", "tracking.experiment=mine")
    assert "hushhush" not in text and "please" not in text
    for part in (f"MLflow at http://127.0.0.1:{port} cannot be written", *parts):
        assert part in text
    assert "'mine'" in text or answer[0] > 500


def test_a_token_that_expires_during_a_run_loses_nothing(server, tmp_path, uri, lines):
    tracker = start(tmp_path)
    until(lambda: not tracker.journal.pending_count())
    local = tracker.delivery.connection
    server.answer = (401, "text/plain", b"expired")
    tracker.delivery.connection = MlflowClient(f"http://127.0.0.1:{server.server_port}")
    tracker.log_metrics({"train/loss": 1.0}, step=1)
    until(lambda: lines)
    assert "does not accept the run's metrics and files (it refuses the user, password or token" in lines[0]
    tracker.delivery.connection = local  # as with a new token
    assert tracker.close("FINISHED") == 0
    assert MlflowClient(uri).get_run(tracker.run_id).data.metrics["train/loss"] == 1.0
    assert "answers again" in lines[1] and not tracker.journal.rejected_path.exists()


@pytest.mark.parametrize(
    ("error", "uri", "parts"),
    [
        (
            ModuleNotFoundError("No module named 'pymysql'", name="pymysql"),
            "mysql+pymysql://a",
            ["pip install pymysql"],
        ),
        (
            Exception("(sqlite3.OperationalError) database is locked\n[SQL: SELECT 1]"),
            "sqlite:///a",
            ["locks its file"],
        ),
        (Exception("(sqlite3.DatabaseError) file is not a database\n[SQL: x]"), "sqlite:///a", ["no SQLite database"]),
        (Exception("odd\n[SQL: SELECT secret]\n(Background on this error at: x)"), "sqlite:///a", ["odd"]),
        (Exception("Caused by SSLError: CERTIFICATE_VERIFY_FAILED"), "https://a", ["MLFLOW_TRACKING_SERVER_CERT_PATH"]),
        (Exception("SSLError(WRONG_VERSION_NUMBER)"), "https://a", ["http://"]),
        (Exception("for me:hushhush at http://me:hushhush@a"), "http://me:hushhush@a", ["for *** at http://a"]),
        (ValueError(), "http://a", ["ValueError"]),
    ],
)
def test_other_errors_are_one_line_without_secrets(error, uri, parts):
    text = str(explain_store_error(error, uri))
    assert "\n" not in text and "SELECT" not in text and "hushhush" not in text
    for part in parts:
        assert part in text


def test_a_folder_is_no_store(tmp_path):
    for wrong in (f"{tmp_path}/mlruns", "127.0.0.1:5000"):
        text = refusal(tmp_path, f"tracking.uri={wrong}")
        assert "sqlite:////PATH/mlflow.db" in text and "http://HOST:PORT" in text and "migrate" not in text


# --- infinite metrics ------------------------------------------------------------------------------------------------


def test_infinite_metrics_are_nan_with_a_tag(tmp_path, uri):
    """MLflow stores an infinite value as 1.8e308, which a reader takes for a number."""
    study = start(tmp_path)
    trial = start(tmp_path, "train.epochs=3", tags={"a": "b"})
    study.log_metrics({"train/loss": math.inf, "train/grad_norm": -math.inf, "val/top1": 0.5}, step=1)
    study.log_metrics({"train/loss": 2.0, "val/loss": math.nan}, step=2)
    study.log_metrics({"cost/latency_ms": math.inf}, step=3, run_id=trial.run_id)
    assert trial.close("FINISHED") == study.close("FINISHED") == 0
    client = MlflowClient(uri)
    losses = [m.value for m in client.get_metric_history(study.run_id, "train/loss")]
    assert math.isnan(losses[0]) and losses[1:] == [2.0]
    data = client.get_run(study.run_id).data
    assert math.isnan(data.metrics["train/grad_norm"]) and math.isnan(data.metrics["val/loss"])
    assert data.metrics["val/top1"] == 0.5
    tags = {name: text for name, text in data.tags.items() if name.startswith("infinite.")}
    assert tags == {"infinite.train/loss": "inf at step 1", "infinite.train/grad_norm": "-inf at step 1"}
    data = client.get_run(trial.run_id).data
    assert math.isnan(data.metrics["cost/latency_ms"]) and data.tags["infinite.cost/latency_ms"] == "inf at step 3"
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        for table in ("metrics", "latest_metrics"):
            assert connection.execute(f"SELECT max(abs(value)) FROM {table}").fetchone()[0] < 1e15


def test_what_earlier_versions_stored_for_an_infinite_metric_is_infinite_again(tmp_path, uri):
    client = MlflowClient(uri)
    run = client.create_run("0").info.run_id
    for name, value in {"up": math.inf, "down": -math.inf, "nan": math.nan, "large": 1e300, "plain": 2.0}.items():
        client.log_metric(run, name, value)
    found = client.get_run(run)
    assert found.data.metrics["up"] == 1.7976931348623157e308  # what this is about
    values = stored_metrics(found)
    assert math.isnan(values.pop("nan"))
    assert values == {"up": math.inf, "down": -math.inf, "large": 1e300, "plain": 2.0}


def test_metrics_of_one_call():
    (finite, infinite) = as_metrics({"a": 1.5, "b": math.inf}, 7, 3)
    assert (finite.key, finite.value, finite.timestamp, finite.step) == ("a", 1.5, 7, 3)
    assert infinite.key == "b" and math.isnan(infinite.value)
    (tag,) = infinite_tags({"a": 1.5, "b": -math.inf, "c": math.nan}, 3)
    assert (tag.key, tag.value) == ("infinite.b", "-inf at step 3")


def test_an_invalid_metric_of_an_active_run_is_still_refused(tmp_path):
    tracker = start(tmp_path)
    assert tracker.delivery.is_refusal(MlflowException("bad name", error_code=INVALID_PARAMETER_VALUE))
    assert tracker.close("FINISHED") == 0
