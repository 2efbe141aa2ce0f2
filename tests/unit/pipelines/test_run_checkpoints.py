"""Checkpoints are complete or ignored, and the right ones are kept; on a disk and on an object store."""

import hashlib
import json
import os
import pickle
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.runs import checkpoints
from pipelines.runs.checkpoints import INFO, STATE, WEIGHTS, CheckpointInfo, DamagedError, UnwritableError
from posmlp import storage
from posmlp.config import load_recipe
from posmlp.errors import UserError


def info_of(step, top1=None):
    config = load_recipe("demo").model_dump(mode="json")
    return CheckpointInfo(step, step // 4, {} if top1 is None else {"val/top1": top1}, ["left", "right"], config)


def save(run, step, top1=None):
    """Write a checkpoint whose tensors hold its step."""
    weights = {"head": torch.full((3, 2), float(step)), "count": torch.tensor(step)}
    return checkpoints.save(str(run), info_of(step, top1), weights, {"step": step, "moment": torch.arange(5.0) * step})


def steps(run):
    return [entry.info.step for entry in checkpoints.find(str(run)) if entry.info]


@pytest.fixture(params=["disk", "store"])
def run(request, tmp_path):
    """A run's folder on a disk, or in a bucket of an S3 server."""
    if request.param == "disk":
        return str(tmp_path / "run")
    request.getfixturevalue("s3")
    return f"s3://videos/{tmp_path.name}/run"


def test_what_is_saved_is_loaded(run):
    uri = save(run, 12, 0.25)
    found, contents = checkpoints.load(uri)
    assert (found.step, found.epoch, found.metrics, list(found.classes)) == (
        12,
        3,
        {"val/top1": 0.25},
        ["left", "right"],
    )
    assert torch.equal(contents[WEIGHTS]["head"], torch.full((3, 2), 12.0))
    assert torch.equal(contents[STATE]["moment"], torch.arange(5.0) * 12)
    assert found.recipe() == load_recipe("demo")
    assert checkpoints.newest(run) == (uri, [])


def test_no_checkpoint_is_no_error(run):
    assert checkpoints.find(run) == []
    assert checkpoints.newest(run) == (None, [])
    with pytest.raises(UserError, match="holds no checkpoint; expected the folder of a run"):
        checkpoints.choose(run)


def test_the_newest_and_the_best_are_kept(run):
    for step, top1 in [(4, 0.5), (8, 0.9), (10, None), (12, 0.9), (16, 0.3), (18, None)]:
        save(run, step, top1)
    assert checkpoints.choose(run) == checkpoints.checkpoint_uri(run, 12)  # of two equals the newer
    checkpoints.prune(run, keep_last=2, keep_best=1)
    assert steps(run) == [12, 16, 18]
    checkpoints.prune(run, keep_last=1, keep_best=2)
    assert steps(run) == [12, 16, 18]
    checkpoints.prune(run, keep_last=1, keep_best=0)
    assert steps(run) == [18]
    assert checkpoints.choose(run) == checkpoints.checkpoint_uri(run, 18)


def test_the_best_is_kept_where_few_epochs_are_validated(tmp_path):
    """Each epoch is saved before its validation, and rated afterwards if it has one (here every third epoch)."""
    run, rates = str(tmp_path / "run"), {3: 0.4, 6: 0.7, 9: 0.6}
    for epoch in range(1, 12):
        save(run, 4 * epoch)
        checkpoints.prune(run, keep_last=1, keep_best=1)
        if epoch in rates:
            written = checkpoints.read_info(checkpoints.checkpoint_uri(run, 4 * epoch))
            checkpoints.rewrite_info(run, replace(written, metrics={"val/top1": rates[epoch]}))
            checkpoints.prune(run, keep_last=1, keep_best=1)
        best = max((e for e in rates if e <= epoch), key=rates.__getitem__, default=epoch)
        assert steps(run) == sorted({4 * best, 4 * epoch})
        assert checkpoints.choose(run) == checkpoints.checkpoint_uri(run, 4 * best)


def test_an_incomplete_checkpoint_is_ignored(run):
    save(run, 4)
    storage.remove(storage.join(save(run, 8), INFO))
    assert steps(run) == [4]
    newest, (problem,) = checkpoints.newest(run)
    assert newest == checkpoints.checkpoint_uri(run, 4)
    assert "step-0000000008 is incomplete" in str(problem)
    save(run, 12)
    checkpoints.prune(run, 3, 0)
    assert [f.uri for f in checkpoints.find(run)] == [checkpoints.checkpoint_uri(run, s) for s in (4, 12)]
    assert checkpoints.newest(run) == (checkpoints.checkpoint_uri(run, 12), [])


def test_an_incomplete_checkpoint_can_be_written_again(run):
    storage.remove(storage.join(save(run, 8), INFO))
    save(run, 8)
    assert checkpoints.newest(run) == (checkpoints.checkpoint_uri(run, 8), [])


def test_a_damaged_checkpoint_is_neither_kept_as_the_newest_nor_as_the_best(run):
    """A run that resumes from step 4, because 8 is damaged, keeps the checkpoint of step 4."""
    save(run, 4, 0.5)
    storage.write_bytes(storage.join(save(run, 8, 0.6), STATE), b"torn")
    assert checkpoints.newest(run)[0] == checkpoints.checkpoint_uri(run, 4)
    save(run, 6)
    checkpoints.prune(run, keep_last=1, keep_best=1)
    assert steps(run) == [4, 6]
    save(run, 8, 0.4)
    checkpoints.prune(run, keep_last=1, keep_best=1)
    assert steps(run) == [4, 8]


def test_the_info_of_a_finished_epoch_is_rewritten_in_place(run):
    save(run, 4)
    written = checkpoints.read_info(checkpoints.checkpoint_uri(run, 4))
    checkpoints.rewrite_info(run, replace(written, epoch=1, metrics={"val/top1": 0.5}, progress={"steps": 0}))
    found, contents = checkpoints.load(checkpoints.checkpoint_uri(run, 4))
    assert (found.epoch, found.metrics, found.progress) == (1, {"val/top1": 0.5}, {"steps": 0})
    assert contents[STATE]["step"] == 4


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A run with two intact checkpoints."""
    run = tmp_path_factory.mktemp("intact")
    save(run, 4), save(run, 8)
    return run


@given(st.sampled_from([WEIGHTS, STATE, INFO]), st.floats(0, 1, exclude_max=True), st.integers(1, 255), st.booleans())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_noticed_and_the_checkpoint_before_is_used(intact, name, where, change, cut):
    """One byte changed anywhere, or a file cut short anywhere."""
    path = Path(checkpoints.checkpoint_uri(str(intact), 8), name)
    original = path.read_bytes()
    at = int(where * len(original))
    try:
        path.write_bytes(original[:at] if cut else original[:at] + bytes([original[at] ^ change]) + original[at + 1 :])
        with pytest.raises(DamagedError, match=rf"step-0000000008 is damaged: {name}"):
            checkpoints.load(str(path.parent))
        assert [bool(f.problem) for f in checkpoints.find(str(intact), check=True)] == [False, True]
        info = path.with_name(INFO).read_bytes()
        newest, problems = checkpoints.newest(str(intact))
        assert (newest, len(problems)) == (checkpoints.checkpoint_uri(str(intact), 4), 1)
        assert not path.with_name(INFO).exists()
        path.with_name(INFO).write_bytes(info)
    finally:
        path.write_bytes(original)
    assert checkpoints.newest(str(intact))[0] == checkpoints.checkpoint_uri(str(intact), 8)


def test_a_missing_file_is_damage(intact, tmp_path):
    path = Path(checkpoints.checkpoint_uri(str(intact), 8), STATE)
    path.rename(tmp_path / "away")
    with pytest.raises(DamagedError, match=r"state\.pt is missing"):
        checkpoints.load(str(path.parent))
    (tmp_path / "away").rename(path)


def test_a_run_with_only_damaged_checkpoints_does_not_start_again(tmp_path):
    Path(save(tmp_path, 4), WEIGHTS).write_bytes(b"")
    with pytest.raises(DamagedError, match=r"weights\.safetensors has 0 bytes, expected \d+\n.*delete the folder"):
        checkpoints.newest(str(tmp_path))


class Evil:
    def __reduce__(self):
        return os.mkdir, (Evil.path,)


def test_a_checkpoint_of_someone_else_runs_no_code(tmp_path):
    """Even if its checksums are right."""
    Evil.path = str(tmp_path / "harm")
    uri = save(tmp_path, 4)
    content = pickle.dumps(Evil())
    Path(uri, STATE).write_bytes(content)
    written = json.loads(Path(uri, INFO).read_text())
    written["files"][STATE] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    written.pop("sha256")
    Path(uri, INFO).write_text(json.dumps(written | {"sha256": checkpoints.info_checksum(written)}))
    with pytest.raises(DamagedError, match=r"state\.pt"):
        checkpoints.load(uri)
    assert not Path(Evil.path).exists()


def test_a_failed_write_leaves_the_other_checkpoints_alone(tmp_path, monkeypatch):
    save(tmp_path, 4)
    write = storage.write_bytes

    def full(uri, content):
        if uri.endswith(STATE):
            raise OSError(28, "No space left on device")
        write(uri, content)

    monkeypatch.setattr(storage, "write_bytes", full)
    with pytest.raises(UnwritableError, match=r"step-0000000008 cannot be written: .*No space left"):
        save(tmp_path, 8)
    assert [f.uri for f in checkpoints.find(str(tmp_path), check=True)] == [
        checkpoints.checkpoint_uri(str(tmp_path), 4)
    ]


def test_a_recipe_of_another_version_is_refused_by_key(tmp_path):
    config = load_recipe("demo").model_dump(mode="json") | {"wings": 2}
    written = checkpoints.save(str(tmp_path), CheckpointInfo(1, 0, {}, [], config), {"x": torch.zeros(1)}, {})
    with pytest.raises(UserError, match=r"another version of this project:\n  wings: unknown key"):
        checkpoints.read_info(written).recipe()
    two = replace(checkpoints.read_info(written), config=config | {"tail": 1})
    with pytest.raises(UserError) as error:
        two.recipe()
    assert str(error.value).splitlines() == [
        "the checkpoint's recipe is of another version of this project:",
        "  wings: unknown key",
        "  tail: unknown key (did you mean 'train'?)",
    ]


# The file format and the messages, as literals ------------------------------------------------------------------------


def test_checkpoint_json_as_it_lies_on_disk(tmp_path):
    """Read by older versions and by people; the checksum does not depend on the order of the keys."""
    start = datetime.now(UTC).replace(microsecond=0)
    info = CheckpointInfo(5, 1, {"val/top1": 0.5}, ["left", "right"], {"name": "a"}, {"steps": 0})
    uri = checkpoints.save(str(tmp_path), info, {"x": torch.zeros(2)}, {"y": 1})
    assert uri == f"{tmp_path}/checkpoints/step-0000000005"
    text = Path(uri, "checkpoint.json").read_text()
    assert text.startswith(
        '{\n "step": 5,\n "epoch": 1,\n "metrics": {\n  "val/top1": 0.5\n },\n "classes": [\n  "left",'
    )
    tree = json.loads(text)
    assert list(tree) == ["step", "epoch", "metrics", "classes", "config", "progress", "time", "files", "sha256"]
    assert start <= datetime.fromisoformat(tree["time"]) <= datetime.now(UTC)
    assert len(tree["time"]) == len("2026-01-31T12:00:00+00:00")
    assert list(tree["files"]) == ["weights.safetensors", "state.pt"]
    for name, file in tree["files"].items():
        content = Path(uri, name).read_bytes()
        assert file == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert checkpoints.read_info(uri).bytes == sum(Path(uri, name).stat().st_size for name in tree["files"])
    checksum = tree.pop("sha256")
    assert checksum == hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    turned = dict(reversed(tree.items())) | {"sha256": checksum}
    Path(uri, "checkpoint.json").write_text(json.dumps(turned))
    assert checkpoints.read_info(uri).step == 5


def test_the_checksum_of_an_info_by_hand():
    """SHA-256 of the text {"a": 1, "b": [2]}, as sha256sum prints it."""
    expected = "ae8a9a50524642753023cd4de34447191a8651989979c60bbcc5b0eeebb6e1dc"
    assert checkpoints.info_checksum({"b": [2], "a": 1}) == expected


def test_tensors_come_to_the_cpu_and_nothing_else_is_unpickled(tmp_path, monkeypatch):
    uri, given_options = save(tmp_path, 4), []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda file, **options: given_options.append(options) or load(file, **options))
    assert checkpoints.load(uri)[1][STATE]["step"] == 4
    assert given_options == [{"map_location": "cpu", "weights_only": True}]
    assert list(checkpoints.load(uri, [WEIGHTS])[1]) == [WEIGHTS]


def test_only_a_check_reads_the_files_and_says_what_is_wrong(tmp_path):
    save(tmp_path, 4)
    Path(save(tmp_path, 8), STATE).write_bytes(b"torn")
    broken = checkpoints.checkpoint_uri(str(tmp_path), 8)
    assert [entry.problem for entry in checkpoints.find(str(tmp_path))] == ["", ""]
    intact, damaged = checkpoints.find(str(tmp_path), check=True)
    assert (intact.info.step, intact.problem) == (4, "")
    size = checkpoints.read_info(broken).files[STATE]["bytes"]
    assert (damaged.uri, damaged.info) == (broken, None)
    assert damaged.problem == f"{broken} is damaged: state.pt has 4 bytes, expected {size}"


def test_every_damaged_checkpoint_after_the_newest_intact_one_is_marked(tmp_path):
    for step in (4, 8, 12, 16):
        uri = save(tmp_path, step)
        if step > 4:
            Path(uri, WEIGHTS).write_bytes(b"")
    storage.remove(storage.join(checkpoints.checkpoint_uri(str(tmp_path), 12), INFO))
    newest, problems = checkpoints.newest(str(tmp_path))
    assert newest == checkpoints.checkpoint_uri(str(tmp_path), 4)
    assert [re.search(r"(\d+) is (\w+)", str(problem)).groups() for problem in problems] == [
        ("0000000016", "damaged"),
        ("0000000012", "incomplete"),
        ("0000000008", "damaged"),
    ]
    assert [Path(checkpoints.checkpoint_uri(str(tmp_path), step), INFO).exists() for step in (4, 8, 12, 16)] == [
        *(True, False, False, False)
    ]


def test_all_problems_of_a_run_without_an_intact_checkpoint_are_listed(tmp_path):
    uris = [save(tmp_path, step) for step in (4, 8)]
    for uri in uris:
        info = json.loads(Path(uri, INFO).read_text())
        Path(uri, INFO).write_text(json.dumps(info | {"epoch": 99}))
    with pytest.raises(DamagedError) as error:
        checkpoints.newest(str(tmp_path))
    problem = "is damaged: checkpoint.json: the content does not match its checksum"
    assert str(error.value).splitlines() == [
        f"{uris[1]} {problem}",
        f"{uris[0]} {problem}",
        f"no checkpoint of {tmp_path} is intact; delete the folder to start again",
    ]


@pytest.mark.parametrize(("broken", "named"), [(STATE, ""), (INFO, "/checkpoint.json")])
def test_an_unwritable_storage_is_named(broken, named, tmp_path, monkeypatch):
    """Whether the data or the info fails; and then also the removal of what is half written."""

    def full(uri, content):
        if uri.endswith(broken):
            raise OSError(28, "No space left on device")

    def refuse(uri):
        if not uri.endswith(INFO):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(storage, "write_bytes", full)
    monkeypatch.setattr(storage, "remove", refuse)
    with pytest.raises(UnwritableError) as error:
        save(tmp_path, 8)
    uri = f"{tmp_path}/checkpoints/step-0000000008{named}"
    assert str(error.value) == f"{uri} cannot be written: [Errno 28] No space left on device"


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def unreachable(uri):
        raise OSError(113, "No route to host")

    monkeypatch.setattr(storage, "list_folders", unreachable)
    with pytest.raises(UserError) as error:
        checkpoints.choose(str(tmp_path))
    assert str(error.value) == f"{tmp_path} cannot be read: [Errno 113] No route to host"


def test_a_checkpoint_stands_for_itself(tmp_path):
    save(tmp_path, 4, 0.9)
    later = save(tmp_path, 8, 0.1)
    assert checkpoints.choose(later) == later


def test_the_best_are_by_top1_and_then_the_newest(tmp_path):
    for step, top1 in [(4, 0.5), (8, None), (12, 0.75), (16, 0.5)]:
        save(tmp_path, step, top1)
    entries = checkpoints.find(str(tmp_path))
    assert [entry.info.step for entry in checkpoints.best(entries, 9)] == [12, 16, 4]
    assert [entry.info.step for entry in checkpoints.best(entries, 2)] == [12, 16]
    assert checkpoints.best(entries, 0) == []
