"""What stands in the way of a run is found before it."""

import dataclasses
from types import SimpleNamespace

import pytest

from pipelines.cli import main
from pipelines.planning import doctor as module
from pipelines.planning.doctor import (
    Finding,
    Node,
    check_job,
    check_mlflow,
    check_nodes,
    check_room,
    check_stores,
    check_upload,
    doctor,
    print_findings,
    versions,
)
from posmlp.config import RecipeError, load_recipe

GIB = 2**30
HEAD = {"object_store_memory": GIB}
REPORT = {"versions": versions(), "storage": "", "video": "", "shm": 4 * GIB, "skew": 0.0}
NODES = [
    Node("a", "10.0.0.1", HEAD, {}, REPORT),
    Node("b", "10.0.0.2 (decode)", HEAD | {"CPU": 8.0}, {"ray.io/node-group": "decode"}, REPORT),
    Node("c", "10.0.0.3 (gpu)", HEAD | {"CPU": 4.0, "GPU": 2.0}, {"ray.io/node-group": "gpu"}, REPORT),
]
GPUS = ["scaling.use_gpu=true", "scaling.workers=2", "scaling.cpus_per_worker=1"]
SIX_CPUS = ["scaling.workers=2", "scaling.cpus_per_worker=6"]
PLACED = ["scaling.train_on={ray.io/node-group: gpu}", "scaling.decode_on={ray.io/node-group: decode}"]


def changed(number, **changes):
    """The nodes, one of them with something else in its report."""
    nodes = list(NODES)
    nodes[number] = dataclasses.replace(nodes[number], report=nodes[number].report | changes)
    return nodes


def lines(findings):
    return [(finding.level, finding.what) for finding in findings]


def test_a_cluster_that_is_as_it_should_be():
    config = load_recipe("demo", [*GPUS, *PLACED])
    found = [*check_nodes(NODES), *check_room(NODES, config), *check_stores(NODES, config)]
    assert {finding.level for finding in found} == {"ok"}
    text = "\n".join(finding.what for finding in found)
    assert "nodes that answer: 3 of 3, 12 CPUs, 2 GPUs" in text
    assert "room for 2 training workers of 0.5 CPU and 1 GPU" not in text
    assert "room for 2 training workers of 1 CPU and 1 GPU" in text and "10 CPUs are left for decoding" in text


@pytest.mark.parametrize(
    ("nodes", "level", "what"),
    [
        (changed(1, versions=versions() | {"av": "13.0.0"}), "fail", "10.0.0.2 (decode) has av 13.0.0 (here "),
        (changed(2, storage="permission denied"), "fail", "10.0.0.3 (gpu): train.storage: permission denied"),
        (changed(1, video="no such file"), "fail", "10.0.0.2 (decode): the first video: no such file"),
        (changed(1, skew=7.2), "warn", "10.0.0.2 (decode): its clock is 7 s off"),
        ([*NODES[:2], dataclasses.replace(NODES[2], report={}, trouble="it is gone")], "fail", "(gpu) does not answer"),
    ],
)
def test_a_node_that_differs_is_named(nodes, level, what):
    found = [finding for finding in check_nodes(nodes) if finding.level != "ok"]
    assert len(found) == 1 and found[0].level == level and what in found[0].what and found[0].advice


@pytest.mark.parametrize(
    ("overrides", "level", "what"),
    [
        (["scaling.use_gpu=true", "scaling.workers=4"], "fail", "room for 2 of 4 training workers"),
        (["scaling.use_gpu=true", "scaling.workers=4", "scaling.min_workers=2"], "warn", "room for 2 of 4 training"),
        (["scaling.use_gpu=true", "scaling.workers=4", "scaling.min_workers=3"], "fail", "room for 2 of 4 training"),
        (["scaling.use_gpu=false", *SIX_CPUS], "fail", "room for 1 of 2 training workers of 6 CPU"),
        (SIX_CPUS, "fail", "room for 0 of 2 training workers of 6 CPU and 1 GPU"),
        (["scaling.train_on={team: video}"], "warn", "no node has the labels {'team': 'video'} of scaling.train_on"),
        (["scaling.decode_on={team: video}"], "warn", "0 nodes have the labels of scaling.decode_on"),
        (["scaling.workers=8", "scaling.cpus_per_worker=1.4"], "fail", "0.8 CPUs are left for decoding"),
    ],
)
def test_what_does_not_fit_is_told(overrides, level, what):
    found = check_room(NODES, load_recipe("demo", overrides))
    assert any(line[0] == level and what in line[1] for line in lines(found))


def test_what_a_job_has_uploaded_is_counted(tmp_path):
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_12"
    (folder / "data").mkdir(parents=True)
    (folder / "run.py").write_bytes(bytes(2**20))
    assert list(check_upload(tmp_path)) == []
    assert lines(check_upload(folder)) == [("ok", "the job's working directory: 1 files, 1.0 MiB")]
    with open(folder / "data" / "big.mp4", "wb") as big:
        big.truncate(60 * 2**20)
    (found,) = check_upload(folder)
    assert found.level == "warn" and "2 files, 61.0 MiB" in found.what and "data/big.mp4" in found.advice


def test_a_job_is_told_that_its_id_is_used_up():
    assert list(check_job("")) == []
    (found,) = check_job("my-run")
    assert found.level == "ok" and "my-run" in found.what and "another --submission-id" in found.what


def test_a_store_on_disk_and_one_that_is_too_small_are_told():
    config = load_recipe("k400_s16", ["data.train.path=a.csv", "data.val.path=b.csv"])
    assert any("/dev/shm has 64 MiB" in what for _, what in lines(check_stores(changed(0, shm=64 * 2**20), config)))
    small = [dataclasses.replace(node, resources={"object_store_memory": 0.1 * GIB}) for node in NODES]
    (finding,) = check_stores(small, config)
    assert finding.level == "warn" and "blocks of 37 MiB" in finding.what  # 16 clips of 16 x 224 x 224 x 3 bytes
    assert "lower data.rows_per_block to" in finding.advice


@pytest.mark.parametrize(
    ("uri", "level", "what"),
    [
        ("sqlite:////nowhere/mlflow.db", "ok", "will be created"),
        ("http://ann:secret@127.0.0.1:9", "fail", "MLflow at http://127.0.0.1:9: "),
    ],
)
def test_mlflow_is_tried(uri, level, what):
    (finding,) = check_mlflow(load_recipe("demo", [f"tracking.uri={uri}"]))
    assert finding.level == level and what in finding.what and "secret" not in str(finding)


@pytest.mark.parametrize("labels", ["{a b: c}", "{a: 'in(b, c)'}", "{a: ''}", "{/x: y}"])
def test_labels_that_no_node_can_have_are_refused(labels):
    with pytest.raises(RecipeError, match=r"scaling\.decode_on"):
        load_recipe("demo", [f"scaling.decode_on={labels}"])


def test_an_override_without_a_recipe_is_told(capsys):
    assert main(["doctor", "scaling.workers=2"]) == 1
    assert "override 'scaling.workers=2' without a recipe" in capsys.readouterr().err


def test_what_a_probe_cannot_do_is_its_report(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PACKAGES", ("numpy", "no-such-package"))
    assert module.probe(None, None, None)["versions"]["no-such-package"] == "none"
    assert "nowhere" in module.probe(str(tmp_path / "nowhere"), None, None)["storage"]


def test_a_probe_leaves_the_options_of_a_storage_and_the_marker_as_they_are(monkeypatch):
    written = []
    monkeypatch.setattr(module.storage, "read_bytes", lambda uri: b"")
    monkeypatch.setattr(module.storage, "write_bytes", lambda uri, content: written.append(uri))
    monkeypatch.setattr(module.storage, "remove", lambda uri: written.append(uri))
    monkeypatch.setattr(module.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "abc"))
    assert module.probe("s3://b/runs/marker?region=us-east-1", None, None)["storage"] == ""
    assert written == ["s3://b/runs/marker-abc?region=us-east-1"] * 2


def test_a_cluster_that_does_not_answer_is_told_at_once():
    ((level, what),) = lines(doctor(None, "127.0.0.1:1"))
    assert level == "fail" and "127.0.0.1:1: nothing answers there" in what


@pytest.mark.parametrize(
    ("levels", "verdict", "passed"),
    [
        (["ok", "warn", "fail", "ok"], "a run would not work: 1 fail, 1 warn, 2 ok", False),
        (["ok", "warn"], "ready, with warnings: 0 fail, 1 warn, 1 ok", True),
        (["ok"], "ready: 0 fail, 0 warn, 1 ok", True),
    ],
)
def test_the_verdict_comes_first_and_then_the_worst(capsys, levels, verdict, passed):
    assert print_findings(iter([Finding(level, f"{level} {i}") for i, level in enumerate(levels)])) is passed
    first, _, *rest = capsys.readouterr().out.splitlines()
    assert first == verdict
    assert [line.split()[0] for line in rest] == sorted(levels, key=["fail", "warn", "ok"].index)
