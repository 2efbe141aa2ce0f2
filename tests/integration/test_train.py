"""Complete runs with real Ray and MLflow: what they log and save, and what they refuse."""

import gzip
import json
import os
import threading
import time

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.cluster import capacity
from pipelines.runs import checkpoints
from pipelines.runs.errors import RunError
from pipelines.runs.models import load_trained_model
from pipelines.runs.record import read_hits
from pipelines.tracking.uris import tracking_uri
from pipelines.training.preflight import read_splits
from pipelines.training.train import train
from posmlp.errors import UserError
from posmlp.video.augment import to_input
from posmlp.video.clip import load_clips
from posmlp.video.motion import MOTION_CLASSES
from tests.helpers.log_lines import log_lines
from tests.helpers.small_runs import QUICK, active_uri, recipe_for, run_of, with_broken

pytestmark = pytest.mark.ray


def test_a_run_reports_every_epoch_and_counts_every_video_once(finished_run):
    config, result, lines, _ = finished_run
    where = f"experiment {config.tracking.experiment!r} at {tracking_uri(config)}, run {result.mlflow_run_id}"
    assert f"MLflow: {where}" in lines[:2]
    assert result.metrics["epoch"] == 2
    assert result.metrics["val/clips"] == 16
    assert 0 <= result.metrics["val/top1"] <= result.metrics["val/top5"] <= 1
    assert not result.bad
    text = "\n".join(lines)
    assert "epoch 1/2" in text
    assert "epoch 2/2" in text
    assert "2 workers" in text


def test_mlflow_has_config_metrics_tags_and_artifacts(finished_run):
    config, result, *_ = finished_run
    client, run = run_of(config)
    assert run.info.run_id == result.mlflow_run_id
    assert run.info.status == "FINISHED"
    assert run.data.params["train.global_batch"] == "8"
    assert run.data.params["model.num_classes"] == "8"
    assert set(config.flat()) <= set(run.data.params)
    history = client.get_metric_history(run.info.run_id, "val/top1")
    assert [m.step for m in history] == [1, 2]
    assert history[-1].value == result.metrics["val/top1"]
    names = {"train/loss", "val/loss", "val/top5", "perf/clips_per_s", "perf/data_wait_frac", "data/bad"}
    names |= {"data/object_store_mb", "data/spilled_mb", "train/grad_norm", "val/class_mean"}
    names |= {"perf/steps_per_s", "perf/tflops", "perf/memory_mb"}
    assert names <= set(run.data.metrics)
    assert not any(name.startswith("cost/") for name in run.data.metrics)  # they are constants
    assert {"cost/gmacs", "cost/params_m", "cost/latency_ms"} <= set(run.data.params)
    assert run.data.params["model.dims"] == "[16, 32, 48, 64]"  # of tiny
    for name in ("by_step/train_loss", "by_step/lr", "by_step/clips_per_s"):
        assert [m.step for m in client.get_metric_history(run.info.run_id, name)] == list(range(1, 9))  # 2 x 4 steps
    losses = [m.value for m in client.get_metric_history(run.info.run_id, "by_step/train_loss")]
    assert sum(losses[4:]) / 4 == pytest.approx(result.metrics["train/loss"], rel=1e-5)
    top1 = [m.value for m in history]
    assert run.data.metrics["val/best_top1"] == max(top1)
    assert top1[int(run.data.metrics["val/best_epoch"]) - 1] == max(top1)
    note, about = run.data.tags["mlflow.note.content"], "on 32 videos of 8 classes"
    assert about in note and f"Finished after epoch 2 of 2: val/top1 {top1[-1]:.1%}" in note
    assert "train.epochs=2" in run.data.tags["overrides"] and run.data.tags["mlflow.user"]
    assert any(name.startswith("system/") for name in run.data.metrics)
    assert {"torch", "ray", "mlflow", "mlflow.source.git.commit"} <= set(run.data.tags) | {"mlflow.source.git.commit"}
    text = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/config.yaml")
    assert "global_batch: 8" in text


def test_the_logged_model_is_that_of_the_best_checkpoint_and_takes_any_batch(finished_run):
    config, result, *_ = finished_run
    clips = torch.randint(256, (7, 4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with active_uri(tracking_uri(config)):
        logged = mlflow.pytorch.load_model(f"runs:/{result.mlflow_run_id}/model")
    best, _ = load_trained_model(result.path)
    with torch.no_grad():
        for batch in (1, 7):
            expected = best(to_input(clips[:batch], config))
            torch.testing.assert_close(logged(clips[:batch]), expected, rtol=1e-4, atol=1e-5)


def test_each_kept_checkpoint_is_a_logged_model_and_the_lists_are_data_sets(finished_run, motion_set):
    config, result, *_ = finished_run
    client, run = run_of(config)
    kept = {entry.uri: entry.info for entry in checkpoints.find(result.path)}
    models = {m.tags["checkpoint"]: m for m in client.search_logged_models(["1"])}
    assert {*models} == {*kept} and len(kept) == 2
    assert [uri for uri, model in models.items() if model.name == "model"] == [checkpoints.choose(result.path)]
    for uri, model in models.items():
        assert {m.key: m.value for m in model.metrics} == dict(kept[uri].metrics)
        assert {m.step for m in model.metrics} == {kept[uri].epoch}
        (top1,) = (m for m in model.metrics if m.key == "val/top1")
        assert top1.dataset_name == f"{motion_set.name}/val.csv"
    for key in run.data.metrics:
        steps = [m.step for m in client.get_metric_history(run.info.run_id, key)]
        assert len(steps) == len({*steps}), key  # linking doubles no point
    assert {each.model_id for each in run.outputs.model_outputs} == {m.model_id for m in models.values()}
    inputs = {each.tags[0].value: each.dataset for each in run.inputs.dataset_inputs}
    assert {context: data.name for context, data in inputs.items()} == {
        "training": f"{motion_set.name}/train.csv",
        "validation": f"{motion_set.name}/val.csv",
    }
    assert top1.dataset_digest == inputs["validation"].digest


def test_a_finished_name_is_refused(finished_run):
    config, *_ = finished_run
    with pytest.raises(RunError, match=r"'small' is finished .*name=") as error:
        train(config)
    assert isinstance(error.value, UserError)


def test_plots_are_logged(finished_run):
    config, *_ = finished_run
    client, run = run_of(config)
    assert {"learning_curves.png", "confusion.png"} <= {f.path for f in client.list_artifacts(run.info.run_id)}
    assert {"learning_curves.png", "confusion.png"} <= set(os.listdir(finished_run[1].path))
    with active_uri(tracking_uri(config)):
        png = mlflow.artifacts.download_artifacts(f"{run.info.artifact_uri}/confusion.png")
    with open(png, "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_the_best_and_the_newest_checkpoints_are_kept(finished_run):
    _, result, *_ = finished_run
    found = checkpoints.find(result.path, check=True)
    assert [f.info.epoch for f in found] == [1, 2]
    assert found[-1].info.metrics == result.metrics
    assert list(found[-1].info.classes) == list(MOTION_CLASSES)
    _, about = load_trained_model(result.path)
    assert about.metrics["val/top1"] == max(f.info.metrics["val/top1"] for f in found)


def test_problems_of_both_lists_are_reported_at_once(local_ray, motion_set, tmp_path):
    with pytest.raises(UserError, match=r"(?s)2 problems.*no-train\.csv.*no-val\.csv"):
        train(recipe_for(tmp_path, motion_set, "data.train.path=no-train.csv", "data.val.path=no-val.csv"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["scaling.workers=4", "scaling.cpus_per_worker=1"], r"4 workers x 1 CPUs leave 0 of 4 CPUs for decoding"),
        (["scaling.use_gpu=true"], "the cluster has 0"),
        (["train.global_batch=40"], "global_batch 40 is more than the 32 training clips"),
        (["model.num_classes=3"], "num_classes 3 is less than the data set's 8"),
        (["data.train.path=nowhere.csv"], "nowhere.csv"),
        (["augment.flip_classes={left: rihgt}"], r"augment\.flip_classes: .* no class 'rihgt'.*'right'"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(local_ray, motion_set, tmp_path, overrides, expected):
    with pytest.raises(UserError, match=expected):
        train(recipe_for(tmp_path, motion_set, *overrides))
    assert not (tmp_path / "small").exists()
    assert not (tmp_path / "mlflow.db").exists()


def test_an_unreachable_mlflow_is_refused(local_ray, motion_set, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"MLflow at http://127\.0\.0\.1:9 cannot be written, see tracking\.uri"):
        train(recipe_for(tmp_path, motion_set, "tracking.uri=http://127.0.0.1:9"))


@pytest.fixture(scope="module")
def crowded(local_ray, motion_set, tmp_path_factory):
    """A run of one epoch with many features: two broken videos, several views and repeats, all augmentations,
    deterministic algorithms and a trace. Its recipe, its result, and the folder of its list."""
    folder = tmp_path_factory.mktemp("crowded")
    overrides = [f"data.val.path={with_broken(motion_set, folder, 2)}", "data.val.root=/", "data.cache_dir=null"]
    overrides += ["data.repeats=2", "data.fps=6", "data.decoder=decord", "data.modality=rgb", "eval.clips=2"]
    overrides += ["eval.crops=3", "augment.mixup=0.8", "augment.cutmix=1", "augment.erasing=0.5", "augment.flip=0.5"]
    overrides += ["augment.randaug_layers=2", "augment.flip_classes={left: right}"]
    config = recipe_for(folder, motion_set, *overrides, "train.epochs=1", "train.deterministic=true")
    return config, train(config, profile=True), folder


def test_bad_videos_are_quarantined_and_the_run_continues(crowded):
    config, result, folder = crowded
    assert sorted(v.uri for v in result.bad) == [str(folder / f"cut{i}.mp4") for i in range(2)]
    assert result.metrics["val/clips"] == 14
    assert result.metrics["data/bad"] == 2
    _, run = run_of(config)
    listed = json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/quarantine.json"))
    assert {v["uri"] for v in listed} == {v.uri for v in result.bad}
    assert all(v["reason"] for v in listed)


def test_views_repeats_and_augmentation_train(crowded):
    _, result, _ = crowded
    assert result.metrics["data/decoded_by_pyav"] == 0
    assert 1 < result.metrics["train/loss"] < 4


def test_a_profile_is_an_artifact_of_the_run(crowded):
    config, _, _ = crowded
    _, run = run_of(config)
    with active_uri(tracking_uri(config)):
        path = mlflow.artifacts.download_artifacts(f"{run.info.artifact_uri}/profile/trace.json.gz")
    with gzip.open(path) as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    assert any("Convolution" in name for name in names)
    assert any("AdamW" in name for name in names)


def check_hits(config, result, characters):
    """The results of the validation videos, in the run's folder and in MLflow, are those that ``val/top1`` counts."""
    text = read_hits(result.path)
    _, run = run_of(config)
    assert mlflow.artifacts.load_text(f"{run.info.artifact_uri}/val_hits.txt").encode() == text
    assert len(text) == 16 and set(text.decode()) <= set(characters)
    hits, misses = text.count(b"1"), text.count(b"0")
    assert hits + misses == result.metrics["val/clips"]
    assert hits / (hits + misses) == pytest.approx(result.metrics["val/top1"])
    return text


def test_each_validation_videos_result_is_written_in_the_order_of_the_list(finished_run):
    """Of 2 workers. The trained model scores each video once more, alone."""
    config, result, *_ = finished_run
    text = check_hits(config, result, "01")
    model, info = load_trained_model(checkpoints.find(result.path)[-1].uri)
    rows = read_splits(config)[1].rows.to_pylist()
    expected = ""
    with torch.no_grad():
        for row in rows:
            clips, _ = load_clips(row["uri"], row["sample_id"], config, epoch=0, train=False, images=row["frames"])
            expected += str(int(model(to_input(torch.from_numpy(clips), config)).argmax().item() == row["label"]))
    assert text.decode() == expected and info.epoch == 2


def test_results_of_videos_with_several_views_and_of_bad_ones(crowded):
    """Of 1 worker; 6 views of each video, and the first two of the list are broken."""
    config, result, _ = crowded
    assert check_hits(config, result, "01-")[:2] == b"--"


def test_too_many_bad_videos_end_the_run_and_are_named(local_ray, motion_set, tmp_path):
    manifest = with_broken(motion_set, tmp_path, 5)
    config = recipe_for(tmp_path, motion_set, f"data.val.path={manifest}", "data.val.root=/")
    with pytest.raises(RunError, match=r"5 of 48 videos .*max_bad_fraction") as error:
        train(config)
    assert "cut0.mp4" in str(error.value)
    assert "Traceback" not in str(error.value)
    assert run_of(config)[1].info.status == "FAILED"


@pytest.mark.slow
def test_an_unusable_cache_folder_ends_the_run_without_a_traceback(local_ray, motion_set, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file: cannot write .*; see data\.cache_dir") as error:
        train(recipe_for(tmp_path, motion_set, f"data.cache_dir={tmp_path}/file"))
    assert "Traceback" not in str(error.value)


@pytest.mark.slow
def test_a_run_on_videos_starts_from_the_weights_of_an_image_model(local_ray, motion_set, tmp_path):
    """One key is enough: ``model.weights`` is the folder of the image run."""
    numbers = np.random.default_rng(0)
    for i in range(24):
        folder = tmp_path / ("val" if i % 3 == 0 else "train") / ("dark" if i % 2 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = numbers.integers(0, 128, (40, 32, 3)) + (0 if i % 2 else 128)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.jpg")
    images = [
        "name=images",
        "train.epochs=1",
        "data.format=images",
        "data.modality=rgb",
        "model.frames=1",
        "model.blocks=spatial",
    ]
    images += [f"data.{split}.path={tmp_path}/{split}" for split in ("train", "val")]
    pretrained = train(recipe_for(tmp_path, motion_set, *images))
    assert pretrained.metrics["val/clips"] == 8
    with log_lines() as lines:
        train(recipe_for(tmp_path, motion_set, "train.epochs=1", f"model.weights={pretrained.path}"))
    text = "\n".join(lines)
    assert f"start from {pretrained.path}/checkpoints/step-" in text
    assert "temporal" in text
    assert "head: fresh, as the checkpoint has 2 classes and the model 8" in text


def test_missing_weights_are_refused(local_ray, motion_set, tmp_path):
    with pytest.raises(UserError, match=r"model\.weights is neither .*runs/in1k_s holds no .*model\.weights=null"):
        train(recipe_for(tmp_path, motion_set, "model.weights=runs/in1k_s"))


def test_checkpoints_by_time_change_nothing_else(local_ray, motion_set, tmp_path):
    """A checkpoint as often as the clock allows: the weights are those of a run with one per epoch."""
    weights = {}
    for minutes in ("null", "1e-9"):
        keys = [*QUICK[:-1], f"train.checkpoint_every_minutes={minutes}", "train.keep_last=100"]
        run = train(recipe_for(tmp_path / minutes, motion_set, *keys)).path
        steps = [found.info.step for found in checkpoints.find(run)]
        assert (steps == [4, 8]) == (minutes == "null") and {4, 8} <= set(steps)
        _, contents = checkpoints.load(checkpoints.find(run)[-1].uri)
        weights[minutes] = contents[checkpoints.WEIGHTS]
    assert all(torch.equal(weights["null"][name], tensor) for name, tensor in weights["1e-9"].items())


def test_a_run_says_that_a_busy_cluster_keeps_it_waiting(local_ray, motion_set, tmp_path, monkeypatch):
    """Another job holds all CPUs but one half, and ends once the run has said that it waits."""
    monkeypatch.setattr(capacity, "WARN_AFTER_S", (1,))

    @local_ray.remote(num_cpus=3.5)
    class Other:
        pass

    other = Other.remote()
    local_ray.get(other.__ray_ready__.remote())
    with log_lines() as lines:
        threading.Thread(target=lambda: (wait_for_line(lines, "waiting for 1 s"), local_ray.kill(other))).start()
        train(recipe_for(tmp_path, motion_set, *QUICK, "train.epochs=1", "scaling.cpus_per_worker=2"))
    (line,) = (line for line in lines if "waiting for 1 s" in line)
    assert "to start 1 worker of 2 CPU: 0.5 of 4 CPUs are free; this job holds 3.5 CPUs; " in line


def wait_for_line(lines, text):
    deadline = time.monotonic() + 120
    while not any(text in line for line in lines) and time.monotonic() < deadline:
        time.sleep(0.1)
