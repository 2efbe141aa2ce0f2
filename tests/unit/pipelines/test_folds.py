"""Studies of folds without Ray: their settings, what they refuse, which trial is next, and the pooled scores."""

import csv
import io
import json
import statistics
import warnings
from dataclasses import replace
from unittest.mock import MagicMock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, recall_score

from pipelines.cli import main
from pipelines.folds.cross_validate import FoldController, with_folds
from pipelines.folds.pooled import MIN_FOLDS, bootstrap, pool, scores_of
from pipelines.runs.predictions import PREDICTIONS_FILE, read_predictions, write_predictions
from pipelines.studies.study import (
    FoldStudy,
    Study,
    StudyError,
    StudySettings,
    Trial,
    TrialState,
    find_study,
    read_study,
    trial_folder,
    write_study,
)
from posmlp.config import Config, load_recipe
from posmlp.errors import UserError
from posmlp.metrics import ACCURACY, ACCURACY_SHUFFLED, UAR, UF1
from posmlp.video.manifest import Manifest

CLASSES = ("anger", "joy", "surprise")


def counts_of(labels, predicted, classes):
    counts = np.zeros((classes, classes))
    np.add.at(counts, (labels, predicted), 1)
    return counts


# --- scores ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
def test_the_scores_are_those_of_scikit_learn(pairs):
    """Over the classes that have videos; a class that is only predicted counts as wrong, and is no class of its own."""
    labels, predicted = (list(each) for each in zip(*pairs, strict=True))
    found, present = scores_of(counts_of(labels, predicted, 5)), sorted(set(labels))
    macro = {"labels": present, "average": "macro", "zero_division": 0}
    with warnings.catch_warnings(action="ignore"):  # of a class that is only predicted
        assert found[ACCURACY] == pytest.approx(accuracy_score(labels, predicted))
        assert found[UF1] == pytest.approx(f1_score(labels, predicted, **macro))
        assert found[UAR] == pytest.approx(recall_score(labels, predicted, **macro))
        assert found[UAR] == pytest.approx(balanced_accuracy_score(labels, predicted))


def test_an_interval_covers_other_choices_of_folds():
    rng = np.random.default_rng(5)
    right = rng.binomial(20, rng.beta(8, 4, 60))  # of 20 videos of each of 60 subjects
    counts = np.array([[[[r, 20 - r], [0, 0]] for r in right]] * 2, dtype=float)
    low, high = bootstrap(counts)[ACCURACY]
    error = statistics.stdev(right / 20) / 60**0.5  # of a mean of independent subjects
    assert (low + high) / 2 == pytest.approx(statistics.mean(right / 20), abs=error / 4)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
    equal = np.broadcast_to(counts[:, :1], counts.shape)
    assert bootstrap(equal)[ACCURACY] == pytest.approx((right[0] / 20,) * 2)
    assert bootstrap(counts[:, : MIN_FOLDS - 1]) == {}


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.fixture
def faces(tmp_path):
    """A list of 36 videos of 6 subjects in 2 data sets, which exist but cannot be decoded."""
    lines = ["path,label,subject,dataset"]
    for i in range(36):
        (tmp_path / f"{i}.mp4").touch()
        subject = i // 6
        lines.append(f"{i}.mp4,{CLASSES[i % 3]},s{subject + 5},{'casme' if subject < 4 else 'smic'}")
    (tmp_path / "faces.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def recipe_of(faces, *overrides):
    keys = [f"data.train.path={faces}/faces.csv", "data.val=0.2", f"train.storage={faces}/runs", "train.seed=3"]
    return load_recipe("demo", [*keys, "model.num_classes=3", "train.epochs=4", "train.global_batch=8", *overrides])


def study_of(faces, *overrides, **settings):
    settings = {"by": "subject", "values": tuple(f"s{i}" for i in range(5, 11)), "name": "loso"} | settings
    return FoldStudy(recipe=recipe_of(faces, *overrides), **settings)


def test_a_fold_trains_every_epoch_on_the_other_videos_and_is_tested_once(faces):
    study = study_of(faces, "data.group_by=subject")
    config = study.fold_recipe("s7", 2, 3)
    assert Config.model_validate(config.model_dump(mode="json")) == config
    assert config.data.val.where == {"subject": "s7"} and config.data.holds_out
    assert (config.eval.every, config.train.epochs, config.train.keep_best, config.train.patience) == (4, 4, 0, None)
    assert (config.train.seed, config.name, config.train.storage) == (3, "trial-002", study.folder)
    assert not config.tracking.log_model


def test_more_seeds_add_trials_at_the_end(faces):
    few, more = study_of(faces, seeds=1).all_trials(), study_of(faces, seeds=2).all_trials()
    assert more[:6] == few and [trial.number for trial in more] == list(range(12))
    assert [trial.member["fold"] for trial in more] == [f"s{i}" for i in range(5, 11)] * 2
    assert [trial.seed for trial in more] == [3] * 6 + [4] * 6


def test_a_study_is_read_back_as_what_it_is(faces):
    study = study_of(faces, videos="x", shuffled=True)
    write_study(study, "run")
    assert read_study(study.folder, FoldStudy) == (study, "run")
    assert read_study(study.folder, StudySettings) == (study, "run")
    with pytest.raises(
        StudyError, match=r"loso is a study of posmlp folds, not of posmlp tune: resume it with posmlp fo"
    ):
        read_study(study.folder, Study)
    search = Study(recipe=study.recipe, name="search", space="widths")
    write_study(search, "run")
    with pytest.raises(
        StudyError,
        match=rf"posmlp tune, not of posmlp folds: resume it with posmlp tune --resume {search.folder}, or name",
    ):
        find_study(search.folder, FoldStudy)


def test_runs_lists_a_study_of_folds(faces, capsys):
    study = study_of(faces, values=("s5",))
    write_study(study, "run")
    assert main(["runs", f"{faces}/runs"]) == 0
    assert "loso  folds, trials: none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a recipe and --by COLUMN, or --resume STUDY"),
        (["demo"], "give a recipe and --by COLUMN, or --resume STUDY"),
        (["--resume", "nowhere"], "no study nowhere"),
        (
            ["--resume", "x", "--by", "subject", "--name", "y"],
            "only --seeds and --concurrent may be given, not --name, --by",
        ),
        (["demo", "--by", "actor"], "no column 'actor' (--by); columns are path, label, subject, dataset; `folder` is"),
        (
            ["demo", "--by", "dataset", "data.train.where.dataset=smic"],
            "have the dataset 'smic'; folds need at least two",
        ),
        (["demo", "--by", "folder"], "--by folder: 36 videos of "),
        (
            ["demo", "--by", "subject", "train.patience=3"],
            "Set train.patience=null; every fold trains all of train.epochs",
        ),
        (["demo", "--by", "subject", "--shuffled", "data.frame_order=shuffled"], "but data.frame_order is shuffled"),
        (
            ["demo", "--by", "dataset", "train.global_batch=16"],
            "fold casme (dataset): train.global_batch 16 is more than",
        ),
        (["demo", "--by", "subject", "--name", "a/b"], "study a/b: name: use letters, digits"),
        (
            ["scenes", "--by", "subject"],
            "posmlp folds is for task: recognition, and the recipe scenes has task: detection",
        ),
    ],
)
def test_what_cannot_be_cross_validated_is_refused_before_ray_starts(faces, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(faces)
    drawn = []
    monkeypatch.setattr("pipelines.commands.folds.draw_data_of", lambda name, recipe: drawn.append(name))
    own = [f"data.train.path={faces}/faces.csv", "train.global_batch=8"] if "demo" in arguments else []
    own = [each for each in own if each.split("=")[0] not in str(arguments)]
    assert main(["folds", *arguments, *own]) == 1
    assert message in capsys.readouterr().err
    assert not (faces / "runs").exists() and "scenes" not in drawn


def test_a_video_without_a_fold_is_named(faces):
    text = (faces / "faces.csv").read_text().replace("7.mp4,joy,s6", "7.mp4,joy,")
    (faces / "faces.csv").write_text(text)
    with pytest.raises(StudyError, match=r"1 video of .*faces.csv has no subject \(7.mp4\); fill it in"):
        rows = pa.table({"sample_id": ["6.mp4", "7.mp4"], "label": [0, 1]})
        with_folds(study_of(faces), Manifest(rows, CLASSES), ["s6", ""])


def test_a_list_that_has_changed_is_refused_on_resume(faces):
    rows = pa.table({"sample_id": ["1", "2", "3"], "label": [0, 1, 0]})
    study = with_folds(study_of(faces), Manifest(rows, CLASSES), ["s10", "s9", "s10"])
    assert study.values == ("s10", "s9") or study.values == ("s9", "s10")
    assert with_folds(study, Manifest(rows, CLASSES), ["s10", "s9", "s10"]) == study
    with pytest.raises(
        StudyError, match=r"have changed since loso was started \(new: s8; gone: s9\); restore the list"
    ):
        with_folds(study, Manifest(rows, CLASSES), ["s10", "s8", "s10"])
    with pytest.raises(StudyError, match="the folds have the same names"):
        with_folds(study, Manifest(rows, CLASSES), ["s10", "s9", "s9"])


def test_unfinished_and_failed_folds_come_first_on_resume(faces):
    study = study_of(faces, values=("s5", "s6", "s7", "s8"))
    every = study.all_trials()
    states = (TrialState.FINISHED, TrialState.FAILED, TrialState.RUNNING)
    known = [replace(trial, state=state, reason="x") for trial, state in zip(every, states, strict=False)]
    controller = FoldController(study, known, MagicMock(run_id="run"), concurrent=2)
    started = list(iter(controller.next_trial, None))
    assert [trial.number for trial in started] == [1, 2, 3]
    assert {trial.state for trial in started} == {TrialState.RUNNING} and started[0].reason == ""
    assert not controller.may_have_more()
    job = controller.trial_job(started[0])
    assert job.config.data.val.where == {"subject": "s6"}
    assert (job.params, job.predicted) == ({"search.fold": "s6", "search.seed": 3}, ("ordered",))
    assert type(job).from_json(job.to_json()) == job


# --- pooled predictions ----------------------------------------------------------------------------------------------


def fill(study, rng, bad=(), without=()):
    """Write the predictions of a study's trials, at random; returns the trials, and all that was predicted.

    Args:
        bad: numbers of videos that could not be decoded.
        without: numbers of trials that have failed.
    """
    trials, rows = [], []
    for trial in study.all_trials():
        if trial.number in without:
            trials.append(replace(trial, state=TrialState.FAILED, reason="no video could be decoded"))
            continue
        first = 6 * study.values.index(trial.member["fold"])
        labels = [i % 3 for i in range(first, first + 6)]
        scores = rng.normal(size=(2, 6, 3)).astype(np.float32)
        scores[0, range(6), labels] += 1
        for i in set(bad) & set(range(first, first + 6)):
            scores[:, i - first] = np.nan
        table = pa.table({"sample_id": [f"{i}.mp4" for i in range(first, first + 6)], "label": labels})
        both = dict(zip(("ordered", "shuffled"), scores, strict=True))
        write_predictions(trial_folder(study, trial.number), table, both, CLASSES)
        trials.append(replace(trial, state=TrialState.FINISHED, metrics={}))
        for i in range(6):
            if first + i not in bad:
                predicted = scores[:, i].argmax(1)
                rows.append((trial.seed, trial.member["fold"], labels[i], *predicted, first // 24))
    return trials, np.array([(seed, int(fold[1:]), *rest) for seed, fold, *rest in rows])


DATASET_OF = {f"{i}.mp4": "casme" if i < 24 else "smic" for i in range(36)}


def test_predictions_are_pooled_over_folds_and_scored_once_for_each_seed(faces):
    study = study_of(faces, seeds=3, shuffled=True)
    trials, rows = fill(study, np.random.default_rng(0), bad=[8])
    found = pool(study, trials, DATASET_OF)
    assert found.seeds == [3, 4, 5] and found.datasets == ["casme", "smic"] and found.not_scored == ["8.mp4"]
    for scope, chosen in (("all", rows[:, 5] >= 0), ("casme", rows[:, 5] == 0), ("smic", rows[:, 5] == 1)):
        for i, seed in enumerate((3, 4, 5)):
            _, _, labels, ordered, shuffled, _ = rows[chosen & (rows[:, 0] == seed)].T
            figures = {name: figure.values[i] for name, figure in found.pooled[scope].items()}
            assert figures == pytest.approx(
                {
                    ACCURACY: accuracy_score(labels, ordered),
                    UF1: f1_score(labels, ordered, average="macro"),
                    UAR: balanced_accuracy_score(labels, ordered),
                    ACCURACY_SHUFFLED: accuracy_score(labels, shuffled),
                }
            )
    of_folds = [f1_score(*rows[(rows[:, 0] == 3) & (rows[:, 1] == k)].T[2:4], average="macro") for k in range(5, 11)]
    assert found.pooled["all"][UF1].values[0] != pytest.approx(statistics.mean(of_folds), abs=1e-3)
    assert (found.videos(), found.videos("s6"), found.videos("s7"), found.videos(scope="smic")) == (35, 5, 6, 12)


def test_folds_have_their_accuracy_and_its_mean_with_the_spread_over_seeds(faces):
    study = study_of(faces, seeds=2)
    trials, rows = fill(study, np.random.default_rng(1))
    found = pool(study, trials, DATASET_OF)
    of = lambda fold, seed: [float(r[2] == r[3]) for r in rows if (r[0], r[1]) == (seed, fold)]  # noqa: E731
    for fold in range(5, 11):
        values = [statistics.mean(of(fold, seed)) for seed in (3, 4)]
        assert found.folds[f"s{fold}"][ACCURACY].values == pytest.approx(values)
        assert found.folds[f"s{fold}"][ACCURACY].deviation == pytest.approx(statistics.stdev(values))
    means = [statistics.mean(statistics.mean(of(fold, seed)) for fold in range(5, 11)) for seed in (3, 4)]
    assert found.mean_of_folds[ACCURACY].values == pytest.approx(means)
    shown = found.mean_of_folds[ACCURACY]
    assert str(shown) == f"{100 * statistics.mean(means):.1f} ± {100 * statistics.stdev(means):.1f}"
    metrics = found.metrics()
    assert metrics["folds/mean_accuracy"] == pytest.approx(statistics.mean(means))
    assert metrics["folds/uf1_deviation"] == pytest.approx(statistics.stdev(found.pooled["all"][UF1].values))
    assert metrics["folds/smic/uar"] == pytest.approx(statistics.mean(found.pooled["smic"][UAR].values))


def test_a_seed_that_lacks_a_fold_is_not_pooled_and_the_fold_is_named(faces):
    study = study_of(faces, seeds=2)
    trials, rows = fill(study, np.random.default_rng(2), without=[8])
    found = pool(study, trials, DATASET_OF)
    assert found.seeds == [3] and found.pooled["all"][UF1].deviation is None
    _, _, labels, ordered, *_ = rows[rows[:, 0] == 3].T
    assert found.pooled["all"][UF1].values == pytest.approx([f1_score(labels, ordered, average="macro")])
    text = found.describe()
    assert "Not finished: fold s7, seed 4 (failed): no video could be decoded" in text
    assert "Figures over all folds leave out 1 seed of 2. `posmlp folds --resume " in text
    assert found.videos() == 36
    others, _ = fill(study, np.random.default_rng(2), without=[2])  # of the first seed
    found = pool(study, others, DATASET_OF)
    assert found.seeds == [4] and found.videos() == 36 and found.videos("s7") == 6
    none, _ = fill(study, np.random.default_rng(2), without=range(12))
    empty = pool(study, none, DATASET_OF)
    assert empty.pooled == empty.folds == {} and empty.describe() and "folds.csv" in empty.files()


def test_the_files_have_the_same_figures(faces):
    study = study_of(faces, seeds=2, shuffled=True, name="a|b".replace("|", "-"))
    trials, _ = fill(study, np.random.default_rng(3))
    found = pool(study, trials, DATASET_OF)
    files = found.files()
    assert {"folds.md", "folds.csv", "pooled.csv", "folds.json", "confusion.png", "per_class.csv"} < set(files)
    tree = json.loads(files["folds.json"])
    assert tree["pooled"]["all"][UF1]["mean"] == found.pooled["all"][UF1].mean
    pooled = list(csv.DictReader(io.StringIO(files["pooled.csv"].decode())))
    assert [(row["videos_of"], row["seed"]) for row in pooled] == [
        (scope, seed) for scope in ("all", "casme", "smic") for seed in ("3", "4")
    ]
    assert float(pooled[1][UAR]) == found.pooled["all"][UAR].values[1]
    of_folds = list(csv.DictReader(io.StringIO(files["folds.csv"].decode())))
    assert len(of_folds) == 12 and float(of_folds[7][ACCURACY]) == found.folds["s6"][ACCURACY].values[1]
    per_class = list(csv.DictReader(io.StringIO(files["per_class.csv"].decode())))
    assert [(row["class"], row["videos"]) for row in per_class] == [(name, "24") for name in CLASSES]
    (faces / PREDICTIONS_FILE).write_bytes(files[PREDICTIONS_FILE])
    table = read_predictions(str(faces))
    assert table.num_rows == 72 and {"fold", "seed", "dataset", "label", "scores", "scores_shuffled"} < set(
        table.column_names
    )
    row = f"| all | 36 | {' | '.join(str(each) for each in found.pooled['all'].values())} |"
    assert row in files["folds.md"].decode()


def test_missing_predictions_say_how_to_get_them(faces):
    study = study_of(faces)
    with pytest.raises(UserError, match=r"trial-000/predictions.parquet is missing; delete .*trial-000, and resume"):
        pool(study, [Trial(0, {"fold": "s5"}, state=TrialState.FINISHED)], DATASET_OF)
