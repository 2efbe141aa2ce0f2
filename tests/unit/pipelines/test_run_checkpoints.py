"""Checkpoints are whole or do not count, and the right ones are kept; on a disk and on an object store."""

import hashlib
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.runs import checkpoints
from pipelines.runs.checkpoints import ABOUT, STATE, WEIGHTS, CheckpointInfo, DamagedError, UnwritableError
from posmlp import storage
from posmlp.config import load_recipe
from posmlp.errors import UserError


def about(step, top1=None):
    config = load_recipe("demo").model_dump(mode="json")
    return CheckpointInfo(step, step // 4, {} if top1 is None else {"val/top1": top1}, ["left", "right"], config)


def save(run, step, top1=None):
    """A checkpoint whose tensors tell its step."""
    weights = {"head": torch.full((3, 2), float(step)), "count": torch.tensor(step)}
    return checkpoints.save(str(run), about(step, top1), weights, {"step": step, "moment": torch.arange(5.0) * step})


def steps(run):
    return [found.about.step for found in checkpoints.find(str(run)) if found.about]


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
    assert checkpoints.choose(run) == checkpoints.place(run, 12)  # of equals the newer
    checkpoints.prune(run, keep_last=2, keep_best=1)
    assert steps(run) == [12, 16, 18]
    checkpoints.prune(run, keep_last=1, keep_best=2)
    assert steps(run) == [12, 16, 18]
    checkpoints.prune(run, keep_last=1, keep_best=0)
    assert steps(run) == [18]
    assert checkpoints.choose(run) == checkpoints.place(run, 18)


def test_an_unfinished_checkpoint_does_not_count(run):
    save(run, 4)
    storage.remove(storage.join(save(run, 8), ABOUT))
    assert steps(run) == [4]
    newest, (problem,) = checkpoints.newest(run)
    assert newest == checkpoints.place(run, 4)
    assert "step-0000000008 is unfinished" in str(problem)
    save(run, 12)
    checkpoints.prune(run, 3, 0)
    assert [f.uri for f in checkpoints.find(run)] == [checkpoints.place(run, s) for s in (4, 12)]
    assert checkpoints.newest(run) == (checkpoints.place(run, 12), [])


def test_one_that_was_unfinished_is_written_again(run):
    storage.remove(storage.join(save(run, 8), ABOUT))
    save(run, 8)
    assert checkpoints.newest(run) == (checkpoints.place(run, 8), [])


def test_a_damaged_one_is_neither_the_newest_nor_the_best_that_stays(run):
    """A run that goes on from step 4, as 8 is damaged, keeps what it went on from."""
    save(run, 4, 0.5)
    storage.write_bytes(storage.join(save(run, 8, 0.6), STATE), b"torn")
    assert checkpoints.newest(run)[0] == checkpoints.place(run, 4)
    save(run, 6)
    checkpoints.prune(run, keep_last=1, keep_best=1)
    assert steps(run) == [4, 6]
    save(run, 8, 0.4)
    checkpoints.prune(run, keep_last=1, keep_best=1)
    assert steps(run) == [4, 8]


def test_a_finished_epoch_is_noted_in_place(run):
    save(run, 4)
    written = checkpoints.read_info(checkpoints.place(run, 4))
    checkpoints.rewrite_info(run, replace(written, epoch=1, metrics={"val/top1": 0.5}, progress={"steps": 0}))
    found, contents = checkpoints.load(checkpoints.place(run, 4))
    assert (found.epoch, found.metrics, found.progress) == (1, {"val/top1": 0.5}, {"steps": 0})
    assert contents[STATE]["step"] == 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with two whole checkpoints."""
    run = tmp_path_factory.mktemp("whole")
    save(run, 4), save(run, 8)
    return run


@given(st.sampled_from([WEIGHTS, STATE, ABOUT]), st.floats(0, 1, exclude_max=True), st.integers(1, 255), st.booleans())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_noticed_and_the_one_before_used(whole, name, place, change, cut):
    """One byte changed anywhere, or a file cut short anywhere."""
    path = Path(checkpoints.place(str(whole), 8), name)
    intact = path.read_bytes()
    at = int(place * len(intact))
    try:
        path.write_bytes(intact[:at] if cut else intact[:at] + bytes([intact[at] ^ change]) + intact[at + 1 :])
        with pytest.raises(DamagedError, match=rf"step-0000000008 is damaged: {name}"):
            checkpoints.load(str(path.parent))
        assert [bool(f.problem) for f in checkpoints.find(str(whole), check=True)] == [False, True]
        about = path.with_name(ABOUT).read_bytes()
        newest, problems = checkpoints.newest(str(whole))
        assert (newest, len(problems)) == (checkpoints.place(str(whole), 4), 1)
        assert not path.with_name(ABOUT).exists()
        path.with_name(ABOUT).write_bytes(about)
    finally:
        path.write_bytes(intact)
    assert checkpoints.newest(str(whole))[0] == checkpoints.place(str(whole), 8)


def test_a_missing_file_is_damage(whole, tmp_path):
    path = Path(checkpoints.place(str(whole), 8), STATE)
    path.rename(tmp_path / "away")
    with pytest.raises(DamagedError, match=r"state\.pt is missing"):
        checkpoints.load(str(path.parent))
    (tmp_path / "away").rename(path)


def test_a_run_with_nothing_but_damage_is_not_begun_anew(tmp_path):
    Path(save(tmp_path, 4), WEIGHTS).write_bytes(b"")
    with pytest.raises(DamagedError, match=r"weights\.safetensors has 0 bytes, expected \d+\n.*delete the folder"):
        checkpoints.newest(str(tmp_path))


class Evil:
    def __reduce__(self):
        return os.mkdir, (Evil.path,)


def test_no_code_runs_from_a_checkpoint_of_others(tmp_path):
    """Even with right checksums."""
    Evil.path = str(tmp_path / "harm")
    uri = save(tmp_path, 4)
    content = pickle.dumps(Evil())
    Path(uri, STATE).write_bytes(content)
    written = json.loads(Path(uri, ABOUT).read_text())
    written["files"][STATE] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    written.pop("sha256")
    Path(uri, ABOUT).write_text(json.dumps(written | {"sha256": checkpoints.digest(written)}))
    with pytest.raises(DamagedError, match=r"state\.pt"):
        checkpoints.load(uri)
    assert not Path(Evil.path).exists()


def test_what_cannot_be_written_leaves_the_others_alone(tmp_path, monkeypatch):
    save(tmp_path, 4)
    write = storage.write_bytes

    def full(uri, content):
        if uri.endswith(STATE):
            raise OSError(28, "No space left on device")
        write(uri, content)

    monkeypatch.setattr(storage, "write_bytes", full)
    with pytest.raises(UnwritableError, match=r"step-0000000008 cannot be written: .*No space left"):
        save(tmp_path, 8)
    assert [f.uri for f in checkpoints.find(str(tmp_path), check=True)] == [checkpoints.place(str(tmp_path), 4)]


def test_a_recipe_of_another_version_is_refused_by_key(tmp_path):
    config = load_recipe("demo").model_dump(mode="json") | {"wings": 2}
    written = checkpoints.save(str(tmp_path), CheckpointInfo(1, 0, {}, [], config), {"x": torch.zeros(1)}, {})
    with pytest.raises(UserError, match=r"another version of this project:\n  wings: unknown key"):
        checkpoints.read_info(written).recipe()
