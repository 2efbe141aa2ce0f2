"""Pareto fronts against brute force and closed forms; a study read back from MLflow."""

import csv
import io
import itertools
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunData, RunInfo, RunTag
from optuna.distributions import CategoricalDistribution, FloatDistribution
from PIL import Image

from pipelines.commands.runs import study_row
from pipelines.studies import costs as costs_of_models
from pipelines.studies import logged_study, pareto, pareto_plots, report
from pipelines.studies.study import (
    Study,
    StudyError,
    Trial,
    TrialState,
    standalone_recipe,
    study_space,
    write_study,
    write_trial,
)
from pipelines.tracking.uris import PARENT
from posmlp import create_model
from posmlp.config import load_recipe
from posmlp.metrics import COSTS, MAIN_METRICS, VAL_TOP1, VAL_VIDEOS
from tests.helpers.tasks import OVERRIDES, TASKS, of_task

BASE = load_recipe("demo")
GMACS = COSTS["gmacs"]
TOP1 = MAIN_METRICS["recognition"]


def trial(number, top1, cost, state=TrialState.FINISHED, repeat_of=None, member=None, seed=0):
    metrics = {VAL_TOP1: top1, COSTS["latency"]: 10 * cost, GMACS: cost, COSTS["params"]: cost / 2, "epoch": 3.0}
    return Trial(
        number, member or {"block1": "joint", "width": 1.5}, seed, repeat_of=repeat_of, state=state, metrics=metrics
    )


points = st.lists(st.tuples(st.integers(0, 8), st.integers(1, 8)), max_size=12)


@given(points)
def test_a_front_is_what_no_other_beats(places):
    trials = [trial(i, top1 / 8, float(cost)) for i, (top1, cost) in enumerate(places)]
    found = [(t.metrics[VAL_TOP1] * 8, t.metrics[GMACS]) for t in pareto.pareto_front(trials, "gmacs")]
    beaten = [(a, c) for a, c in places if any(x >= a and y <= c and (x, y) != (a, c) for x, y in places)]
    assert found == sorted(set(places) - set(beaten), key=lambda place: place[1])


@given(points, st.integers(1, 9))
def test_the_hypervolume_is_the_area_that_some_point_beats(places, reference):
    cells = {(a, c) for a in range(8) for c in range(reference) if any(x > a and y <= c for x, y in places)}
    assert pareto.hypervolume(places, reference) == len(cells)


def test_only_fully_trained_trials_of_the_first_seed_count():
    trials = [trial(0, 0.5, 2.0), trial(1, 0.9, 1.0, state=TrialState.STOPPED), trial(2, 0.9, 1.0, repeat_of=0)]
    trials += [trial(3, math.nan, 1.0), trial(4, 0.5, 2.0), trial(5, 0.9, 1.0, state=TrialState.FAILED)]
    assert [t.number for t in pareto.pareto_front(trials, "gmacs")] == [0]


def test_fresh_seeds_report_without_the_first_seed():
    trials = [trial(0, 0.5, 1.0), trial(1, 0.7, 1.0, repeat_of=0, seed=2), trial(2, 0.9, 1.0, repeat_of=0, seed=1)]
    trials += [trial(3, 0.9, 1.0, repeat_of=0, seed=3, state=TrialState.FAILED), trial(4, 0.99, 2.0)]
    trials += [trial(5, math.nan, 1.0, repeat_of=0), replace(trial(6, 0.5, 1.0, repeat_of=0), metrics={})]
    trials += [trial(7, 0.5, 1.0, repeat_of=9), trial(8, 0.5, 1.0, repeat_of=0, state=TrialState.RUNNING)]
    assert {n: [t.number for t in runs] for n, runs in pareto.fresh_seeds(trials).items()} == {0: [2, 1]}
    assert pareto.reported_values(trials) == {0: pytest.approx(0.8)}
    assert pareto.reported_values([trials[0], trials[4]]) == {0: 0.5, 4: 0.99}  # without any repeat, the first seeds


@pytest.mark.parametrize("task", TASKS)
def test_a_lucky_first_seed_does_not_stay_on_the_front(task):
    """Trial 0 has the highest first seed and a lower fresh mean than the cheaper trial 22."""
    trials = [trial(0, 0.762, 5.09), trial(22, 0.738, 3.74), trial(8, 0.556, 3.5), trial(15, 0.75, 4.73)]
    fresh = {0: (0.40, 0.35), 22: (0.60, 0.79), 8: (0.61, 0.63), 15: (0.45, 0.46)}
    for number, values in fresh.items():
        first = next(t for t in trials if t.number == number)
        for seed, top1 in enumerate(values, 1):
            trials.append(trial(30 + len(trials), top1, first.metrics[GMACS], repeat_of=number, seed=seed))
    trials, main = of_task(trials, task), MAIN_METRICS[task]
    assert [t.number for t in pareto.pareto_front(trials, "gmacs")] == [8, 22]
    assert pareto.best_trial(trials).number == 22
    rows = report.trial_rows(trials)
    assert [row["trial"] for row in rows if row["front_gmacs"]] == [22, 8]
    assert rows[0]["fresh_mean"] == pytest.approx(0.375) and rows[0][main.name] == 0.762
    text = report.describe_study("look", trials, main, "gmacs")
    assert "Trials 8 and 22 cannot be told apart: trial 22 is more accurate in " in text
    key = {"recognition": "val/top1", "detection": "val/map"}[task]
    assert report.describe_best(trials, main) == (
        f"best: {report.trial_name(trials[1])}, {key} 69.5% (mean over 2 fresh seeds)"
    )
    assert pareto.front_hypervolume(trials, "gmacs", 6.0) == pytest.approx((0.62 * 2.5 + 0.075 * 2.26) / 6)


@pytest.mark.parametrize("task", TASKS)
def test_a_search_that_is_not_repeated_says_so(task):
    trials, main, base = of_task(many(), task), MAIN_METRICS[task], load_recipe("demo", OVERRIDES[task])
    text = report.describe_study("look", trials, main, "gmacs")
    assert "One seed each, not repeated" in text
    assert report.describe_best(trials, main).endswith(" (one seed, not repeated)")
    page = report.pareto_files({"look": trials}, base, "gmacs")["front.html"].decode()
    assert "look: 12 trials, one seed each, not repeated" in page
    axis, hover = r"validation (top-1|mAP), %", r"(top-1|mAP) [0-9.]+%, first seed"
    assert set(re.findall(axis, page)) == set(re.findall(hover, page)) == {main.title}
    assert {name for name in ("top-1", "mAP") if f" {name} " in text} == {main.title}
    assert report.member_metrics(pareto.assess(trials), main, "gmacs") == {}
    inherited = report.pareto_files({"look": trials}, base, "gmacs", inherited=True)["front.html"].decode()
    assert "not repeated" not in inherited
    assert "not repeated" not in report.describe_study("look", trials, main, "gmacs", inherited=True)


@given(points, st.lists(st.tuples(st.integers(0, 11), st.integers(0, 8)), min_size=1, max_size=12))
def test_a_front_of_fresh_seeds_is_what_no_other_mean_beats(places, fresh):
    trials = [trial(i, 0.99, float(cost)) for i, (_, cost) in enumerate(places)]
    values: dict[int, list[float]] = {}
    for number, top1 in fresh:
        if number < len(places):
            values.setdefault(number, []).append(top1 / 8)
            trials.append(trial(100 + len(trials), top1 / 8, 1.0, repeat_of=number, seed=len(values[number])))
    means = {number: sum(each) / len(each) for number, each in values.items()}
    found = {t.number for t in pareto.pareto_front(trials, "gmacs")}
    if not means:
        assert found == ({min(range(len(places)), key=lambda i: (places[i][1], i))} if places else set())
        return
    for number, mean in means.items():
        cost = places[number][1]
        others = [(means[n], places[n][1]) for n in means if n != number]
        beaten = any(m >= mean and c <= cost and (m, c) != (mean, cost) for m, c in others)
        first_of_equals = all(
            (m, c) != (mean, cost) or n > number
            for n, (m, c) in zip([n for n in means if n != number], others, strict=True)
        )
        assert (number in found) == (not beaten and first_of_equals)
    assert found <= set(means)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), min_size=1, max_size=30))
def test_the_hypervolume_after_each_trial_is_that_of_the_trials_so_far(points):
    trials = [trial(i, top1 / 5, float(cost)) for i, (top1, cost) in enumerate(points)]
    so_far = [[(t.metrics[VAL_TOP1], t.metrics[GMACS]) for t in trials[: i + 1]] for i in range(len(trials))]
    expected = [pareto.hypervolume(part, 8.0) / 8 for part in so_far]
    assert pareto.hypervolume_curve(trials, "gmacs", 8.0) == pytest.approx(expected, abs=1e-12)


def test_the_hypervolume_never_shrinks_and_ends_with_that_of_all_trials():
    dice = random.Random(0)
    trials = [trial(i, dice.random(), dice.uniform(1, 9)) for i in range(20)]
    volumes = pareto.hypervolume_curve(trials, "gmacs")
    assert volumes == sorted(volumes)
    assert len(volumes) == 20
    worst = max(t.metrics[GMACS] for t in trials)
    assert volumes[-1] == pytest.approx(
        pareto.hypervolume([(t.metrics[VAL_TOP1], t.metrics[GMACS]) for t in trials], worst) / worst
    )


def test_importance_is_of_the_dimension_that_matters():
    dice = random.Random(1)
    trials = []
    for i in range(60):
        member = {"a": dice.choice([1, 2, 4]), "b": dice.choice("xyz"), "lr": dice.random()}
        trials.append(trial(i, member["a"] / 8 + dice.gauss(0, 0.01), member["lr"], member=member))
    assert pareto.dimension_importance(trials, VAL_TOP1)["a"] > 0.8
    assert pareto.dimension_importance(trials, GMACS)["lr"] > 0.8
    noise = [replace(t, metrics={VAL_TOP1: dice.random()}) for t in trials]
    assert sum(pareto.dimension_importance(noise, VAL_TOP1).values()) < 0.8
    assert set(pareto.dimension_importance([*trials, trial(60, 0.5, 1.0, member={"a": 1})], VAL_TOP1)) == {"a"}
    assert pareto.dimension_importance(trials[:3], VAL_TOP1) == {}
    assert pareto.dimension_importance([trial(i, 0.5, 1.0, member={"a": i}) for i in range(9)], VAL_TOP1) == {}


def test_published_variants_cost_what_their_models_cost():
    costs = costs_of_models.published_variant_costs(load_recipe("ssv1_s16"), {"s": 700.0})
    assert costs["s"][COSTS["latency"]] == 700 and COSTS["latency"] not in costs["b"]
    assert costs["s"][COSTS["params"]] == pytest.approx(13.509537)
    assert costs["s"][GMACS] == pytest.approx(40.17, abs=0.01)
    tiny = create_model("tiny", frames=8, num_classes=8)
    assert costs_of_models.published_variant_costs(load_recipe("demo", ["model.num_classes=8"]), {})["tiny"][
        COSTS["params"]
    ] == pytest.approx(sum(p.numel() for p in tiny.parameters()) / 1e6)


def many(seed=0):
    study = Study(name="look", recipe=BASE, space="speed_accuracy")
    space, dice = study_space(study), random.Random(seed)
    members = [{name: dice.choice(values) for name, values in space.dimensions.items()} for _ in range(12)]
    return [trial(i, dice.random(), dice.uniform(1, 90), member=member) for i, member in enumerate(members)]


@pytest.mark.parametrize("count", [0, 1, 2, 12])
def test_figures_and_tables_of_any_number_of_trials(count, recwarn):
    trials = many()[:count]
    trials += [trial(12 + i, 0.5, t.metrics[GMACS], repeat_of=t.number) for i, t in enumerate(trials[:1])]
    files = report.pareto_files({"look": trials}, BASE, "latency")
    assert set(files) == {"front.html", "front.png", "trials.csv", "progress.png"}
    for name in ("front.png", "progress.png"):
        image = Image.open(io.BytesIO(files[name]))
        assert image.width > 1000
    page = files["front.html"].decode()
    assert f"look: {count} trials" in page
    assert not re.search(r'<(script|link)[^>]+(src|href)="https?:', page)  # it works without a network
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning | UserWarning)]


def test_trials_whose_latency_is_not_known_are_drawn_by_their_other_costs(recwarn):
    trials = [replace(t, metrics={k: v for k, v in t.metrics.items() if k != COSTS["latency"]}) for t in many()]
    files = report.pareto_files({"look": trials}, BASE, "gmacs")
    page = files["front.html"].decode()
    assert "look: 12 trials" in page and "GMACs" in page and "ms per clip" not in page
    assert Image.open(io.BytesIO(files["front.png"])).width > 1000
    assert "nan" not in report.describe_study("look", trials, TOP1, "gmacs")
    assert pareto.pareto_front(trials, "latency") == []
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning | UserWarning)]


@pytest.mark.parametrize("seed", range(4))
def test_the_numbers_in_a_figure_neither_overlap_nor_leave_their_panel(seed, monkeypatch):
    """Also where the members of a front are close to each other. The interactive page has those that are left out."""
    figures = []
    monkeypatch.setattr(pareto_plots, "to_png", lambda figure: figures.append(figure) or b"drawn")
    dice = random.Random(seed)
    trials = [trial(i, 0.5 + i / 400, 20.0 + i / dice.choice([1, 10])) for i in range(12)]
    trials += [trial(20 + i, t.metrics[VAL_TOP1], 1.0, repeat_of=t.number, seed=1) for i, t in enumerate(trials)]
    report.pareto_files({"look": trials}, BASE, "gmacs", importance=False)
    figure = figures[0]
    figure.draw_without_rendering()
    count = 0
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        count += len(boxes)
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
        assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in boxes)
        assert all(axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1 for box in boxes)
    assert count >= 12


def test_a_single_seed_on_unknown_videos_has_no_interval():
    """Nothing is known of its noise; an interval without width would claim that there is none."""
    trials = study_of_three()[:3]
    bare = [replace(t, metrics={k: v for k, v in t.metrics.items() if k != VAL_VIDEOS}, repeat_of=None) for t in trials]
    known = [replace(t, metrics=t.metrics | {VAL_VIDEOS: 40.0}) for t in bare]
    assert pareto.assess(bare).low == pareto.assess(bare).high == {}
    assert pareto.assess(known).low.keys() == pareto.assess(known).high.keys() != set()
    assert " to " in report.describe_study("look", known, TOP1, "gmacs", inherited=True)
    assert " to " not in report.describe_study("look", bare, TOP1, "gmacs", inherited=True)
    found = pareto.assess(bare)
    assert all(report.trial_point(t, found, "parallel").interval is None for t in bare)


def test_two_studies_share_one_figure():
    files = report.pareto_files({"look": many(), "other": many(1)}, BASE, "gmacs")
    assert {"look-trials.csv", "other-trials.csv", "look-progress.png"} <= set(files)
    single = "12 trials, one seed each, not repeated"
    assert f"look: {single}; other: {single}" in files["front.html"].decode()


def test_the_table_has_every_trial(tmp_path):
    trials = [*many(), trial(12, 0.0, 1.0, state=TrialState.FAILED), trial(13, 0.5, 1.0, repeat_of=0)]
    trials[12] = replace(trials[12], metrics={}, reason="it, exploded")
    rows = list(csv.DictReader(io.StringIO(report.to_csv(report.trial_rows(trials)).decode())))
    assert [row["state"] for row in rows] == [TrialState.FINISHED] * 12 + [TrialState.FAILED, TrialState.FINISHED]
    assert rows[12]["reason"] == "it, exploded"
    assert rows[13]["repeats"] == "0"
    assert float(rows[3]["top1"]) == trials[3].metrics[VAL_TOP1]
    on_front = {int(row["trial"]) for row in rows if row["front_gmacs"] == "1"}
    assert on_front == {t.number for t in pareto.pareto_front(trials, "gmacs")}


def log_study(client, study, trials, artifacts, hits=None):
    """Log a study to MLflow as its driver and its trials do; returns the id of the study's run."""
    experiment = client.get_experiment_by_name("posmlp")
    place = experiment.experiment_id if experiment else client.create_experiment("posmlp", artifacts)
    parent = client.create_run(place, run_name=study.name, tags={"study": study.name}).info.run_id
    client.log_text(parent, study.model_dump_json(), "study.json")
    for t in trials:
        tags = {PARENT: parent, "study": study.name, "trial": str(t.number)}
        tags |= {"trial.state": str(t.state)} if t.state != TrialState.RUNNING else {}
        tags |= {"trial.reason": t.reason} if t.reason else {}
        tags |= {"trial.repeats": str(t.repeat_of)} if t.repeat_of is not None else {}
        run = client.create_run(place, run_name=f"trial-{t.number:03d}", tags=tags).info.run_id
        for name, value in ({f"search.{k}": v for k, v in t.member.items()} | {"train.seed": t.seed}).items():
            client.log_param(run, name, value)
        for name, value in t.metrics.items():
            client.log_metric(run, name, value / 2, step=0)  # not the last
            client.log_metric(run, name, value, step=1)
        client.log_metric(run, "system/cpu", 1.0)
        if t.state == TrialState.FINISHED:
            config = study.trial_recipe(study_space(study), t.member, t.number, t.seed)
            client.log_text(run, config.to_yaml(), "config.yaml")
            if t.number in (hits or {}):
                client.log_text(run, hits[t.number].decode(), "val_hits.txt")
    return parent


def test_a_study_is_read_from_mlflow_alone(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    place = (tmp_path / "artifacts").as_uri()
    client.create_experiment("another", place)
    recipe = load_recipe("demo", [f"train.storage={tmp_path}", "tracking.experiment=posmlp"])
    study = Study(name="look", recipe=recipe, space="speed_accuracy", against="gmacs", budget_gmacs=3)
    trials = many()[:3]
    trials += [
        replace(trial(3, 0.0, 1.0, state=TrialState.FAILED), member=trials[0].member, reason="it exploded", metrics={})
    ]
    trials += [replace(trial(4, 0.4, 1.0, state=TrialState.RUNNING), member=trials[1].member)]
    trials += [replace(trial(5, 0.4, 1.0, repeat_of=1, seed=1), member=trials[1].member)]
    log_study(client, study, trials[:2], place)  # an older one of the same name
    hits = {0: b"1111111111", 5: b"1010-10010"}
    newest = log_study(client, study, trials, place, hits)
    client.log_metric(newest, "published.latency_ms/s", 700.0)
    client.log_metric(newest, "study/finished", 3.0)
    logged = logged_study.read_study_from_mlflow("look", uri)
    assert (logged.study, logged.run_id, logged.variant_latencies) == (study, newest, {"s": 700.0})
    assert [replace(t, mlflow_run_id=None) for t in logged.trials] == trials
    assert logged.hits == {5: hits[5]}  # those of fresh seeds alone are read
    assert set(logged.recipes) == {t.number for cost in COSTS for t in pareto.pareto_front(trials, cost)}
    text = logged_study.write_studies([logged], "gmacs", tmp_path / "out")
    assert text.startswith(report.describe_study("look", trials, TOP1, "gmacs", hits=hits))
    written = "front.html, front.png, trials.csv, progress.png and 1 recipe of the fronts"
    assert text.endswith(f"\n\n{tmp_path / 'out'} has {written}")
    for number in logged.recipes:
        config = load_recipe(tmp_path / "out" / "recipes" / f"look-trial-{number:03d}.yaml")
        assert config.name == f"look-trial-{number:03d}"
        assert config.train.storage == str(tmp_path)
        assert config.model == study.trial_recipe(study_space(study), trials[number].member, 0, 0).model
    with pytest.raises(StudyError, match=r"mlflow\.db has no study 'lok'; known: look"):
        logged_study.read_study_from_mlflow("lok", uri)
    with pytest.raises(StudyError, match=r"no MLflow store sqlite:///nowhere\.db; give the right one"):
        logged_study.read_study_from_mlflow("look", "sqlite:///nowhere.db")
    assert not Path("nowhere.db").exists()


def test_an_infinite_metric_in_mlflow_is_no_number(tmp_path):
    """Earlier versions sent it as it is, and MLflow stored it as 1.8e308."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    study = Study(name="look", recipe=load_recipe("demo"), space="speed_accuracy", against="gmacs")
    trials = [trial(0, 0.5, 1.0), trial(1, math.inf, 0.5), trial(2, 0.9, math.inf), trial(3, 0.9, -math.inf)]
    trials = [replace(t, member=each.member) for t, each in zip(trials, many(), strict=False)]
    log_study(MlflowClient(uri), study, trials, (tmp_path / "artifacts").as_uri())
    logged = logged_study.read_study_from_mlflow("look", uri)
    assert [replace(t, mlflow_run_id=None) for t in logged.trials] == trials
    assert [t.number for t in pareto.pareto_front(logged.trials, "gmacs")] == [0]
    assert "e+308" not in logged_study.write_studies([logged], "gmacs", tmp_path / "out")
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file() and b"e+308" in p.read_bytes()]


def test_trials_of_a_renamed_experiment_and_a_deleted_one(tmp_path):
    """Earlier versions put the trials of a study whose experiment was renamed into a new one of the old name."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    study = Study(name="look", recipe=load_recipe("demo"), space="speed_accuracy", against="gmacs")
    parent = log_study(client, study, many()[:1], (tmp_path / "artifacts").as_uri())
    renamed = client.get_run(parent).info.experiment_id
    client.rename_experiment(renamed, "after")
    place = client.create_experiment("posmlp", (tmp_path / "artifacts").as_uri())
    client.create_run(place, tags={PARENT: parent, "study": "look", "trial": "1"})
    assert [t.number for t in logged_study.read_study_from_mlflow("look", uri).trials] == [0, 1]
    client.delete_experiment(renamed)
    command = f"`MLFLOW_TRACKING_URI={uri} mlflow experiments restore --experiment-id {renamed}`"
    with pytest.raises(StudyError, match=re.escape(f"restore 'after' with {command}")):
        logged_study.read_study_from_mlflow("look", uri)


def test_an_mlflow_that_is_down_is_reported_in_one_line():
    with pytest.raises(StudyError, match=r"study 'look' cannot be read from MLflow at http://127\.0\.0\.1:9") as error:
        logged_study.read_study_from_mlflow("look", "http://someone:secret@127.0.0.1:9")
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


def test_the_best_is_by_the_mean_of_fresh_seeds():
    lucky, sound, alone = trial(0, 0.9, 1.0), trial(1, 0.3, 2.0), trial(2, 0.95, 3.0)
    again = [trial(3, 0.1, 1.0, repeat_of=0), trial(4, 0.8, 2.0, repeat_of=1)]
    assert pareto.best_trial([lucky, sound, alone]) is alone
    assert pareto.best_trial([lucky, sound, alone, *again]) is sound
    assert pareto.best_trial([trial(0, 0.5, 2.0), trial(1, 0.5, 1.0)]).number == 1
    assert pareto.best_trial([trial(0, 0.5, 2.0, state=TrialState.FAILED)]) is None


def test_a_trials_recipe_has_no_password():
    tracking = BASE.tracking.model_copy(update={"uri": "http://me:hushhush@mlflow.example"})
    study = Study(name="s", recipe=BASE.model_copy(update={"tracking": tracking}), space="block_types")
    text = standalone_recipe(BASE, study, 3)
    assert "uri: http://mlflow.example\n" in text and "hushhush" not in text


# Tables and texts, as literals ----------------------------------------------------------------------------------------


def study_of_three():
    """Two finished trials, the first with a repeat; one without latency; one that failed and one that runs."""
    members = [
        {"block1": "parallel", "block2": "joint", "width": 1.5},
        {"block1": "joint", "block2": "joint", "width": 0.123456},
        {"block1": "spatial", "block2": "joint", "width": 2},
    ]
    trials = [trial(0, 0.5, 2.0, member=members[0]), trial(1, 0.25, 1.0, member=members[1])]
    trials += [trial(2, 0.7, 2.0, repeat_of=0, seed=1, member=members[0])]
    trials += [replace(trial(3, 0.0, 4.0, TrialState.FAILED, member=members[2]), metrics={}, reason="out of memory")]
    trials += [replace(trial(4, 0.0, 4.0, TrialState.RUNNING, member=members[2]), metrics={GMACS: 4.0})]
    costs = {k: v for k, v in trials[1].metrics.items() if k != COSTS["latency"]}
    return [trials[0], replace(trials[1], metrics=costs), *trials[2:]]


@pytest.mark.parametrize("task", TASKS)
def test_a_study_in_words(task):
    """Only trial 0 has a fresh seed. The hypervolume is that of (0.7, 2) up to the reference cost, by hand."""
    title = {"recognition": "top-1", "detection": "mAP"}[task]
    lines = report.describe_study("look", of_task(study_of_three(), task), MAIN_METRICS[task], "gmacs", 4.0).split("\n")
    assert lines[0] == f"look: 3 finished, 1 failed, 1 running; hypervolume 0.350 ({title} against gmacs)"
    assert lines[2].split() == [
        *("trial", title, "95", "%", "interval", "seeds", "on", "front", "ms", "GMACs", "M", "params", "member")
    ]
    number, top1, _, _, _, seeds, share, *costs = lines[3].split()[:10]
    assert (number, top1, seeds, share, costs) == ("0", "70.0%", "1", "-", ["20", "2", "1"])
    assert lines[3].endswith("  block parallel,joint; width 1.5")
    assert lines[5] == f"Each {title} is the mean over fresh seeds; the seed that selected a member is not among them."
    assert lines[6] == "1 of 2 members has fresh seeds; the others are not compared."
    source = "from 1 difference between seeds, selecting seeds included"  # of 0.5 and 0.7
    assert lines[7].startswith(f"The standard deviation of one seed is 14.1 points ({source})")
    assert lines[8].startswith(
        "Per-video results are missing" if task == "recognition" else "Intervals and shares are over"
    )
    assert ("over seeds alone. mAP is no mean over key frames" in lines[8]) == (task == "detection")
    assert len(lines) == 9
    assert report.describe_study("look", [], TOP1, "gmacs") == "look: no trials"
    waiting = [trial(0, 0.5, 1.0, TrialState.OVER_BUDGET), trial(1, 0.5, 1.0, TrialState.STOPPED)]
    assert report.describe_study("look", waiting, TOP1, "gmacs") == "look: 1 stopped early, 1 over budget"


@pytest.mark.parametrize("finished", [0, 1])
def test_a_study_says_how_trials_that_were_stopped_can_be_compared(finished, tmp_path):
    recipe = BASE.model_copy(update={"train": BASE.train.model_copy(update={"storage": str(tmp_path)})})
    study = Study(name="look", recipe=recipe, space="speed_accuracy", against="gmacs")
    ends = [trial(i, 0.5, 1.0 + i, TrialState.STOPPED) for i in (1, 2)]
    ends += [trial(0, 0.5, 1.0)] * finished
    command = f"`posmlp tune --resume {tmp_path}/look --no-asha`"
    for count, words in ((2, "The 2 trials that were"), (1, "The trial that was")):
        text = report.describe_study("look", ends[2 - count :], TOP1, "gmacs", study=study)
        assert text.endswith(f"\n\n{words} stopped early cannot be compared; {command} trains all to the end.")
    assert "stopped" not in report.describe_study("look", ends[2:], TOP1, "gmacs", study=study)


def test_sentences_name_no_more_pairs_than_are_read():
    trials = [trial(i, 0.5 + i / 1000, 1.0 + i) for i in range(9)]
    trials += [
        trial(20 + 2 * i + s, t.metrics[VAL_TOP1] + 0.05 * s, t.metrics[GMACS], repeat_of=i, seed=1 + s)
        for i, t in enumerate(trials)
        for s in (0, 1)
    ]
    text = report.describe_study("look", trials, TOP1, "gmacs")
    assert text.count("cannot be told apart") == 5 and "Nor can 3 other pairs" in text
    assert "(from 9 differences between seeds); it is" in text and "are not compared" not in text
    clear = [trial(i, i / 10, 1.0 + i) for i in range(4)]
    clear += [
        trial(20 + 2 * i + s, i / 10 + s / 1e3, 1.0 + i, repeat_of=i, seed=1 + s) for i in range(4) for s in (0, 1)
    ]
    text = report.describe_study("look", clear, TOP1, "gmacs")
    assert "Each member is more accurate than the next cheaper one in at least 95% of resamples." in text
    assert "told apart" not in text


@given(st.integers(0, 1899))
def test_a_share_below_the_rule_is_below_it_as_printed(draws):
    share = draws / 2000
    printed = report.below_sure(share)
    assert float(printed.rstrip("%")) < 95 and float(printed.rstrip("%")) / 100 == pytest.approx(share, abs=0.005001)


def test_a_share_that_would_round_to_the_rule_has_a_decimal():
    assert [report.below_sure(share) for share in (0.944, 0.946, 0.9495)] == ["94%", "94.6%", "94.9%"]


def test_repeats_that_were_asked_for_and_not_trained_are_named():
    study = Study(name="look", recipe=BASE, space="speed_accuracy", repeats=2, hours=1)
    text = report.describe_study("look", many(), TOP1, "gmacs", study=study)
    assert text.endswith(
        "No repeat was trained, although the study has --repeats 2: "
        f"`posmlp tune --resume {study.folder} --hours H` trains them."
    )
    unlimited = report.describe_study("look", many(), TOP1, "gmacs", study=study.model_copy(update={"hours": None}))
    assert f"`posmlp tune --resume {study.folder}`" in unlimited
    plain = report.describe_study("look", many(), TOP1, "gmacs", study=study.model_copy(update={"repeats": 0}))
    assert plain.endswith("--repeats N trains the members of the front with fresh seeds.")


@pytest.mark.parametrize("task", TASKS)
def test_the_list_of_studies_shows_the_reported_value_of_the_best(tmp_path, task):
    recipe = load_recipe("demo", [f"train.storage={tmp_path}", *OVERRIDES[task]])
    study = Study(name="look", recipe=recipe, space="speed_accuracy", repeats=2)
    write_study(study, "parent")
    fresh = [trial(3, 0.1, 1.0, repeat_of=1, seed=1), trial(4, 0.15, 1.0, repeat_of=1, seed=2)]
    for each in of_task([trial(0, 0.1, 1.0), trial(1, 0.175, 1.0), trial(2, 0.16, 2.0), *fresh], task):
        write_trial(study, each)
    assert study_row(study.folder) == (
        "look",
        "study, trials: 5 finished",
        f"12.5% {MAIN_METRICS[task].title}, trial 1",
    )


def test_a_trials_run_is_named_after_its_member():
    same = {f"block{stage}": "joint" for stage in (1, 2, 3, 4)} | {"width": 1.5}
    assert report.trial_name(Trial(7, same)) == "trial-007 joint; width 1.5"
    mixed = same | {"block4": "parallel"}
    name = "trial-012 J,J,J,P; width 1.5; seed 3"
    assert report.trial_name(Trial(12, mixed, seed=3, repeat_of=7)) == name
    assert len(report.trial_name(Trial(1, {f"dimension{n}x": "long" * 5 for n in range(9)}))) == 120


@pytest.mark.parametrize("task", TASKS)
def test_the_rows_of_a_table(task):
    column = {"recognition": "top1", "detection": "map"}[task]
    rows = report.trial_rows(of_task(study_of_three(), task))
    latency, params = COSTS["latency"], COSTS["params"]
    first = {"trial": 0, "state": "finished", "reason": "", "seed": 0, "repeats": ""}
    first |= {"search.block1": "parallel", "search.block2": "joint", "search.width": 1.5}
    first |= {column: 0.5, "fresh_mean": 0.7, "fresh_seeds": 1}
    first |= {latency: 20.0, GMACS: 2.0, params: 1.0, "front_latency": 1, "front_gmacs": 1, "front_params": 1}
    first |= {"probability_latency": 1.0, "probability_gmacs": 1.0, "probability_params": 1.0}
    assert rows[0].pop("fresh_low") < 0.7 < rows[0].pop("fresh_high")
    assert rows[0] == first
    assert list(rows[0]) == list(first)
    assert "fresh_mean" not in rows[1]
    assert (rows[1]["front_latency"], rows[1]["front_gmacs"], rows[1]["front_params"]) == (0, 0, 0)
    assert (rows[2]["repeats"], rows[2]["seed"], rows[2]["front_gmacs"]) == (0, 1, 0)
    assert rows[3] == {
        **{"trial": 3, "state": "failed", "reason": "out of memory", "seed": 0, "repeats": ""},
        **{"search.block1": "spatial", "search.block2": "joint", "search.width": 2},
        **{"front_latency": 0, "front_gmacs": 0, "front_params": 0},
    }
    assert rows[4][GMACS] == 4.0 and column not in rows[4]


def test_rows_as_csv():
    rows = [{"trial": 0, "why": "a, b"}, {"trial": 1, "top1": 0.5}, {}]
    assert report.to_csv(rows) == b'trial,why,top1\n0,"a, b",\n1,,0.5\n,,\n'


def test_a_trial_as_it_is_drawn():
    trials = study_of_three()
    found = pareto.assess(trials)
    point = report.trial_point(trials[0], found, "spatial")
    assert (point.number, point.first, point.fresh, point.value, point.seeds) == (0, 0.5, 0.7, 0.7, 1)
    assert point.interval == (found.low[0], found.high[0]) and not point.minor
    assert point.probability == {"latency": 1.0, "gmacs": 1.0, "params": 1.0} and point.opacity("gmacs") == 1
    assert point.costs == {"latency": 20.0, "gmacs": 2.0, "params": 1.0}
    assert (point.blocks, point.label) == (("parallel", "joint"), "block parallel,joint; width 1.5")
    point = report.trial_point(trials[1], found, "spatial")
    assert math.isnan(point.costs["latency"]) and (point.costs["gmacs"], point.interval) == (1.0, None)
    assert point.minor and (point.value, point.fresh, point.seeds) == (0.25, None, 0)
    alone = pareto.assess([])
    shallow = trial(7, 0.5, 1.0, member={"depth1": 2, "block2": "joint", "block": "spatial", "blocks": "no"})
    assert report.trial_point(shallow, alone, "parallel").blocks == ("spatial", "joint")
    shallow = trial(7, 0.5, 1.0, member={"depth1": 2})
    assert report.trial_point(shallow, alone, "parallel").blocks == ("parallel",)
    assert report.trial_point(shallow, alone, ["joint", "spatial"]).blocks == ("joint", "spatial")
    assert not report.trial_point(shallow, alone, "parallel").minor


def test_the_distribution_of_a_dimension():
    """Nine or more different floats are a range; fewer, or anything else, a choice."""
    floats = [0.5, 0.25, 3.0, 2.0, 1.0, 4.0, 7.0, 6.0, 5.0]
    assert pareto.infer_distribution(floats) == FloatDistribution(0.25, 7.0)
    assert pareto.infer_distribution(floats[:8] * 2) == CategoricalDistribution(sorted(floats[:8], key=str))
    assert pareto.infer_distribution(list(range(9))) == CategoricalDistribution(range(9))
    assert pareto.infer_distribution([*floats, "x"]) == CategoricalDistribution(sorted([*floats, "x"], key=str))


def test_importance_starts_with_four_trials_and_is_sorted():
    trials = [trial(i, top1, 1.0, member={"b": i % 2, "a": i}) for i, top1 in enumerate([0.1, 0.9, 0.1, 0.9])]
    found = pareto.dimension_importance(trials, VAL_TOP1)
    assert set(found) == {"a", "b"} and list(found.values()) == sorted(found.values(), reverse=True)
    assert pareto.dimension_importance(trials[:3], VAL_TOP1) == {}
    trials[1] = replace(trials[1], metrics={VAL_TOP1: math.inf})
    assert pareto.dimension_importance(trials, VAL_TOP1) == {}
    assert pareto.dimension_importance([trial(i, i / 9, 1.0, member={"a": 1}) for i in range(9)], VAL_TOP1) == {}


def test_the_largest_cost_is_above_0():
    assert pareto.largest_cost([trial(0, 0.5, 2.0), trial(1, 0.5, 9.0, TrialState.STOPPED)], "latency") == 20.0
    assert pareto.largest_cost([], "gmacs") == 1.0
    assert pareto.largest_cost([trial(0, 0.5, 0.0)], "gmacs") == 1.0


def test_the_curve_of_the_hypervolume_by_hand():
    trials = [trial(0, 0.5, 2.0), trial(1, 0.25, 1.0), trial(2, 1.0, 4.0)]
    assert pareto.hypervolume_curve(trials, "gmacs") == [0.5 * 2 / 4, (0.25 * 3 + 0.25 * 2) / 4, (0.25 * 3 + 0.5) / 4]
    assert pareto.hypervolume_curve(trials, "gmacs", 8.0)[-1] == (0.25 * 7 + 0.25 * 6 + 0.5 * 4) / 8
    assert pareto.hypervolume_curve(trials, "latency", 20.0)[:2] == [0.0, 0.25 * 10 / 20]
    assert pareto.hypervolume_curve([], "gmacs") == []


def test_published_variants_have_the_clips_and_classes_of_the_recipe():
    """Parameters of s: 13,509,537 - here with 5 classes - are those of a model that is built, not counted."""
    overrides = ["model.num_classes=5", "model.frames=6", "model.image_size=96", "model.stage4_stride=16"]
    recipe = load_recipe("demo", overrides)
    made = costs_of_models.published_variant_recipe(recipe, "s")
    assert made.model.model_dump(exclude_none=True) == {
        **{"name": "s", "num_classes": 5, "frames": 6, "image_size": 96, "drop_path": 0.0, "dropout": 0.0},
        "stage4_stride": 16,
    }
    assert made.data == recipe.data and made.train == recipe.train
    costs = costs_of_models.published_variant_costs(recipe, {"tiny": 4.5, "unknown": 1.0})
    assert list(costs) == ["tiny", "s", "b", "l"]
    assert costs["tiny"][COSTS["latency"]] == 4.5 and set(costs["s"]) == {GMACS, COSTS["params"]}
    built = create_model("s", frames=6, image_size=96, num_classes=5)
    assert costs["s"][COSTS["params"]] == sum(p.numel() for p in built.parameters()) / 1e6


def test_variants_are_marked_where_their_cost_is_near(monkeypatch):
    costs = {"tiny": {GMACS: 2.0}, "s": {GMACS: 4.0}}
    asked = []
    monkeypatch.setattr(costs_of_models, "published_variant_costs", lambda recipe, latencies: costs)
    monkeypatch.setattr(
        costs_of_models, "variants_in_range", lambda *given: asked.append(given) or [("s", 4.0), ("tiny", 2.0)]
    )
    assert costs_of_models.variants_to_mark([*study_of_three(), trial(9, math.nan, 1.0)], BASE) == ["s", "tiny"]
    assert asked == [(costs, "gmacs", [2.0, 1.0])]


def test_the_files_of_studies_are_drawn_from_their_trials(monkeypatch):
    """The figures themselves have tests of their own; here is what they get."""
    drawn = []
    for name in ("interactive_page", "front_image", "search_progress"):
        monkeypatch.setattr(
            pareto_plots, name, lambda *given, _name=name: drawn.append((_name, given)) or _name.encode()
        )
    monkeypatch.setattr(report, "dimension_importance", lambda trials, metric: (len(trials), metric))
    marked = {"s": {GMACS: 7.0}}
    trials, base = study_of_three(), load_recipe("demo", ["model.blocks=spatial"])
    plain = [replace(t, member={"width": 1.0}) for t in trials]
    files = report.pareto_files({"one": trials, "two": plain[:2]}, base, "latency", marked)
    assert {name: content for name, content in files.items() if not name.endswith("csv")} == {
        **{"front.html": b"interactive_page", "front.png": b"front_image"},
        **{"one-progress.png": b"search_progress", "two-progress.png": b"search_progress"},
    }
    assert files["one-trials.csv"] == report.to_csv(report.trial_rows(trials))
    assert files["two-trials.csv"] == report.to_csv(report.trial_rows(plain[:2]))
    points, fronts, variants, title, main = drawn[0][1]
    assert drawn[1] == ("front_image", drawn[0][1]) and drawn[0][0] == "interactive_page"
    assert {name: [point.number for point in found] for name, found in points.items()} == {"one": [0, 1], "two": [0, 1]}
    assert points["one"][0].seeds == 1 and points["two"][0].blocks == ("spatial",)
    every = {cost: [0] for cost in COSTS}  # the only member with a fresh seed
    assert fronts == {"one": every, "two": {"latency": [0], "gmacs": [1, 0], "params": [1, 0]}}
    assert title == "one: 2 trials; two: 2 trials, one seed each, not repeated"
    assert variants == marked and main == TOP1
    shares = {"top-1": (5, VAL_TOP1), "latency": (5, COSTS["latency"])}
    assert drawn[2] == ("search_progress", ([0.0], shares, TOP1, "latency"))
    drawn.clear()
    files = report.pareto_files({"one": trials}, BASE, "gmacs")
    assert set(files) == {"front.html", "front.png", "trials.csv", "progress.png"}
    assert drawn[0][1][2:] == ({}, "one: 2 trials", TOP1)
    unset = load_recipe("demo", ["model.blocks=null"])
    report.pareto_files({"one": plain}, unset, "gmacs")
    assert drawn[-3][1][0]["one"][0].blocks == ("parallel",)


def test_studies_are_written_with_one_reference_cost(tmp_path, monkeypatch):
    """Of both studies the largest cost, 90; a folder that exists is used."""
    drawn = []
    for name in ("interactive_page", "front_image", "search_progress"):
        monkeypatch.setattr(pareto_plots, name, lambda *given: drawn.append(given) or b"drawn")
    study = Study(name="look", recipe=BASE, space="speed_accuracy", against="gmacs")
    cheap = [trial(0, 0.5, 9.0), trial(1, 0.75, 45.0)]
    other = study.model_copy(update={"name": "other"})
    logged = [
        logged_study.LoggedStudy(study, "run", cheap, {1: "name: a\n"}, {"tiny": 3.0}),
        logged_study.LoggedStudy(other, "run", [trial(0, 1.0, 90.0)], {0: "b"}, {}),
    ]
    out = tmp_path / "deep" / "out"
    for _ in range(2):
        text = logged_study.write_studies(logged, "gmacs", out)
    text, _, written = text.rpartition("\n\n")
    files = "front.html, front.png, look-trials.csv, look-progress.png, other-trials.csv, other-progress.png"
    assert written == f"{out} has {files} and 2 recipes of the fronts"
    one, two = text.split("\n\nother: ")
    volume = (0.5 * 81 + 0.25 * 45) / 90
    assert one.startswith(f"look: 2 finished; hypervolume {volume:.3f} (top-1 against gmacs)\n\n  trial ")
    assert two.startswith("1 finished; hypervolume 0.000 ")
    latencies = {name: costs.get(COSTS["latency"]) for name, costs in drawn[0][2].items()}
    assert latencies == {"tiny": 3.0, "s": None, "b": None, "l": None}  # those of the first study
    assert {p.name for p in out.iterdir()} == {
        *("front.html", "front.png", "recipes", "look-trials.csv", "other-trials.csv"),
        *("look-progress.png", "other-progress.png"),
    }
    assert {p.name: p.read_text() for p in (out / "recipes").iterdir()} == {
        "look-trial-001.yaml": "name: a\n",
        "other-trial-000.yaml": "b",
    }
    assert (out / "other-trials.csv").read_bytes() == report.to_csv(report.trial_rows(logged[1].trials))


def test_studies_of_two_tasks_are_not_drawn_together(tmp_path):
    studies = [Study(name=task, recipe=load_recipe("demo", OVERRIDES[task]), space="widths") for task in TASKS]
    logged = [logged_study.LoggedStudy(s, "run", of_task(many(), s.recipe.task), {}, {}) for s in studies]
    with pytest.raises(StudyError, match=r"recognition \(top-1\), detection is of detection \(mAP\): .* one task"):
        logged_study.write_studies(logged, "gmacs", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    text = logged_study.write_studies(logged[1:], "gmacs", tmp_path / "out")
    assert "(mAP against gmacs)" in text and "top-1" not in text
    head, row = (tmp_path / "out" / "trials.csv").read_text().splitlines()[:2]
    assert dict(zip(head.split(","), row.split(","), strict=True))["map"] == str(many()[0].metrics[VAL_TOP1])


def test_a_study_without_a_front_has_no_recipes_and_no_entry_in_a_legend(tmp_path):
    study = Study(name="look", recipe=BASE, space="speed_accuracy")
    over = [trial(0, 0.5, 1.0, TrialState.OVER_BUDGET)]
    none = logged_study.LoggedStudy(study.model_copy(update={"name": "waits"}), "run", over, {}, {})
    text = logged_study.write_studies([none], "gmacs", tmp_path / "alone")
    assert text.endswith("alone has front.html, front.png, trials.csv, progress.png")
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert names == {"front.html", "front.png", "trials.csv", "progress.png"}
    some = logged_study.LoggedStudy(study, "run", many(), {}, {})
    logged_study.write_studies([some, none], "gmacs", tmp_path / "both")
    html = (tmp_path / "both" / "front.html").read_text()
    traces = json.JSONDecoder().raw_decode(html, html.rindex("[{", 0, html.rindex('"Pareto front of look"')))[0]
    shown = [trace["name"] for trace in traces if trace["showlegend"] and trace["name"].startswith("Pareto")]
    assert shown == ["Pareto front of look"]


def test_a_trials_recipe_is_one_to_run_alone():
    study = Study(
        name="look",
        recipe=load_recipe("demo", ["train.storage=there", "tracking.experiment=all", "tracking.uri=http://a"]),
        space="block_types",
    )
    run = load_recipe("demo", ["train.storage=there/look/trials", "train.seed=4", "model.frames=6"])
    first, *rest = standalone_recipe(run, study, 7).splitlines()
    assert first == "# Trial 7 of the study look."
    tree = yaml.safe_load("\n".join(rest))
    assert (tree["name"], tree["train"]["storage"], tree["train"]["seed"]) == ("look-trial-007", "there", 4)
    assert tree["tracking"] == {"uri": "http://a", "experiment": "all", "log_model": study.recipe.tracking.log_model}
    assert tree["model"]["frames"] == 6
    assert list(tree)[:3] == ["name", "task", "model"]  # the order of a recipe, not of the alphabet


# What is read from MLflow ---------------------------------------------------------------------------------------------


def test_all_pages_are_read():
    class Page(list):
        token = None

    pages = {None: Page([1, 2]), "b": Page([3]), "c": Page()}
    pages[None].token, pages["b"].token = "b", "c"
    asked = []
    assert list(logged_study.all_pages(lambda token: asked.append(token) or pages[token])) == [1, 2, 3]
    assert asked == [None, "b", "c"]


def test_params_are_the_numbers_that_were_logged():
    assert [logged_study.parse_value(text) for text in ("8", "-1", "1.5", "1e-3", "joint", "8 a")] == [
        *(8, -1, 1.5, 0.001, "joint", "8 a")
    ]
    assert isinstance(logged_study.parse_value("8"), int)


def run_of(tags, params=(), metrics=()):
    """A run of MLflow, as its client returns it."""
    data = RunData(
        metrics=[Metric(name, value, 0, 0) for name, value in metrics],
        params=[Param(name, value) for name, value in params],
        tags=[RunTag(name, value) for name, value in tags],
    )
    info = RunInfo("abc", "0", "me", "FINISHED", 0, 1, "active")
    return Run(info, data)


def test_a_trial_from_its_mlflow_run():
    tags = [("trial", "12"), ("trial.repeats", "3"), ("trial.state", "stopped early"), ("trial.reason", "too slow")]
    params = [("search.block1", "joint"), ("search.width", "1.5"), ("train.seed", "7"), ("model.name", "tiny")]
    metrics = [(VAL_TOP1, 0.5), ("system/cpu", 3.0), (GMACS, 2.0)]
    assert logged_study.trial_from_run(run_of(tags, params, metrics)) == Trial(
        12,
        {"block1": "joint", "width": 1.5},
        seed=7,
        repeat_of=3,
        state=TrialState.STOPPED,
        reason="too slow",
        metrics={VAL_TOP1: 0.5, GMACS: 2.0},
        mlflow_run_id="abc",
    )
    assert logged_study.trial_from_run(run_of([("trial", "0")])) == Trial(0, {}, mlflow_run_id="abc")
