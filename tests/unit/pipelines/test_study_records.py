"""Studies on disk: those of earlier versions still open and resume, and jobs and events survive the way as text."""

import json
import math
from dataclasses import replace

import pytest

from pipelines.studies.study import Study, Trial, TrialState, find_study, read_trials, study_space, write_trial
from pipelines.tuning.search import Searcher, check_space
from pipelines.tuning.trial import TrialEvent, TrialJob
from posmlp.config import load_recipe

# A study as an earlier version wrote it, with the old names of two recipe keys.
STUDY = """
{
 "name": "old",
 "recipe": {
  "name": "demo",
  "model": {"name": "tiny", "num_classes": 8, "frames": 8, "image_size": null, "dims": null, "depths": null,
            "groups": null, "windows": null, "blocks": null, "drop_path": 0.0, "dropout": 0.0, "choices": null,
            "weights": null},
  "data": {"format": "auto", "classes": null, "template": "{:05d}.jpg",
           "train": {"path": "/data/motion/train.csv", "root": null, "where": {}},
           "val": {"path": "/data/motion/val.csv", "root": null, "where": {}},
           "modality": "rgb_difference", "sampling": "uniform", "stride": 1, "fps": null, "frame_order": "ordered",
           "short_side": 64, "crop_scale": [0.9, 1.0], "crop_ratio": [0.9, 1.1], "whole": false, "repeats": 1,
           "decoder": "pyav", "decode_timeout_s": 60.0, "cache_dir": "/data/cache", "max_bad_fraction": 0.05,
           "rows_per_block": 16},
  "augment": {"flip": 0.0, "flip_classes": {}, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2,
              "randaug_layers": 0, "randaug_magnitude": 7.0, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0},
  "optim": {"lr": 0.003, "min_lr": 1e-06, "lr_batch": null, "warmup_epochs": 2.0, "weight_decay": 0.05,
            "betas": [0.9, 0.999], "label_smoothing": 0.0, "clip_grad": null, "ema": null},
  "train": {"epochs": 24, "global_batch": 16, "seed": 0, "precision": "fp32", "compile": false, "recompute": false,
            "sync_batch_norm": true, "deterministic": false, "checkpoint_every_steps": null, "keep_last": 2,
            "keep_best": 1, "storage": "STORAGE"},
  "eval": {"every": 1, "clips": 1, "crops": 1},
  "scaling": {"workers": 1, "min_workers": null, "use_gpu": false, "parallel": "ddp", "device_batch": 4,
              "max_failures": 3, "cpus_per_worker": 0.5, "threads_per_worker": 1, "train_on": {}, "wait_s": 0.0,
              "decode_on": {}},
  "tracking": {"uri": null, "experiment": "posmlp", "log_model": true}
 },
 "space": "block_types",
 "trials": 4,
 "searcher": "grid",
 "against": "gmacs",
 "asha": false,
 "seed": 0,
 "concurrent": null,
 "repeats": 2,
 "budget_gmacs": null,
 "budget_ms": null,
 "budget_params": null,
 "mlflow_run_id": "abc"
}
"""
TRIAL = """
{
 "number": 0,
 "member": {"block1": "parallel", "block2": "parallel", "block3": "parallel", "block4": "parallel"},
 "seed": 0,
 "ask": 0,
 "repeats": null,
 "notes": {"NSGAIISampler:generation": 0},
 "state": "finished",
 "reason": "",
 "metrics": {"val/top1": 0.5, "cost/gmacs": 0.01, "cost/latency_ms": 3.0, "epoch": 24.0},
 "mlflow_run_id": "run0",
 "timed": true
}
"""
STOPPED_TRIAL = """
{
 "number": 1,
 "member": {"block1": "parallel", "block2": "parallel", "block3": "parallel", "block4": "cascade_ts"},
 "seed": 0,
 "ask": 2,
 "repeats": null,
 "notes": {},
 "state": "stopped early",
 "reason": "after epoch 2",
 "metrics": {"val/top1": 0.25, "cost/gmacs": 0.01, "epoch": 2.0},
 "mlflow_run_id": null,
 "timed": false
}
"""
REPEAT = """
{
 "number": 2,
 "member": {"block1": "parallel", "block2": "parallel", "block3": "parallel", "block4": "parallel"},
 "seed": 1,
 "ask": -1,
 "repeats": 0,
 "notes": {},
 "state": "running",
 "reason": "",
 "metrics": {},
 "mlflow_run_id": null,
 "timed": false
}
"""


@pytest.fixture
def old_study(tmp_path):
    """The folder of a study of an earlier version, with three trials."""
    folder = tmp_path / "old"
    for number, record in enumerate((TRIAL, STOPPED_TRIAL, REPEAT)):
        (folder / f"trial-{number:03d}").mkdir(parents=True)
        (folder / f"trial-{number:03d}" / "trial.json").write_text(record)
    (folder / "study.json").write_text(STUDY.replace("STORAGE", str(tmp_path)))
    return folder


def test_an_old_study_opens(old_study):
    study, run_id = find_study(str(old_study), Study)
    assert run_id == "abc"
    assert study.repeats == 1  # fresh seeds; earlier versions counted the first seed as well
    assert study.recipe.scaling.micro_batch == 4 and study.recipe.data.full_frame is False
    assert study.folder == str(old_study)
    finished, stopped, repeat = read_trials(study.folder)
    assert finished == Trial(
        0,
        {f"block{stage}": "parallel" for stage in (1, 2, 3, 4)},
        seed=0,
        suggestion=0,
        repeat_of=None,
        sampler_attrs={"NSGAIISampler:generation": 0},
        state=TrialState.FINISHED,
        metrics={"val/top1": 0.5, "cost/gmacs": 0.01, "cost/latency_ms": 3.0, "epoch": 24.0},
        mlflow_run_id="run0",
        timed=True,
    )
    assert (stopped.state, stopped.reason, stopped.suggestion) == (TrialState.STOPPED, "after epoch 2", 2)
    assert (repeat.state, repeat.repeat_of, repeat.seed, repeat.suggestion) == (TrialState.RUNNING, 0, 1, -1)


def test_an_old_study_resumes(old_study):
    """The next trial has the number after the last one, and the suggestion after the last one."""
    study, _ = find_study(str(old_study), Study)
    space, trials = study_space(study), read_trials(study.folder)
    check_space(study, space, trials)
    following = Searcher(study, space).propose(trials)
    assert (following.number, following.suggestion, following.state) == (3, 3, TrialState.RUNNING)
    assert list(following.member.values()) == ["parallel", "parallel", "parallel", "joint"]


def test_a_trial_is_written_as_it_was(old_study):
    """A record that is read and written again has the same keys in the same order, and the same values."""
    study, _ = find_study(str(old_study), Study)
    for trial, text in zip(read_trials(study.folder), (TRIAL, STOPPED_TRIAL, REPEAT), strict=True):
        write_trial(study, trial)
        written = (old_study / f"trial-{trial.number:03d}" / "trial.json").read_text()
        assert list(json.loads(written).items()) == list(json.loads(text).items())
        assert read_trials(study.folder)[trial.number] == trial


def test_states_are_the_words_that_are_stored():
    assert list(TrialState) == ["running", "finished", "stopped early", "failed", "over budget"]
    assert json.dumps(TrialState.STOPPED) == '"stopped early"' and f"{TrialState.STOPPED}" == "stopped early"
    trial = Trial(0, {})
    assert replace(trial, state="running") == trial


def test_jobs_and_events_pass_as_text():
    study = Study(name="s", recipe=load_recipe("demo"), space="learning", budget_ms=5)
    space = study_space(study)
    member = {"lr": 1e-3, "weight_decay": 0.05, "warmup_epochs": 1.2, "label_smoothing": 0.1, "drop_path": 0.0}
    config = study.trial_recipe(space, member, 3, 0)
    job = TrialJob(config, {"study": "s", "trial": "3"}, {"search.lr": 1e-3, "search.block": "joint"}, study.budgets())
    assert TrialJob.from_json(job.to_json()) == job
    event = TrialEvent(TrialState.OVER_BUDGET, {"cost/latency_ms": 7.5}, "latency 7.5 ms is over --budget-ms 5")
    assert TrialEvent.from_json(event.to_json()) == event
    exploded = TrialEvent.from_json(TrialEvent(TrialState.RUNNING, {"train/loss": math.nan}).to_json())
    assert math.isnan(exploded.metrics["train/loss"]) and exploded.state is TrialState.RUNNING
