"""Fronts, against what a second way of counting says; and studies that are read back from MLflow alone."""

import csv
import io
import itertools
import json
import math
import re
import statistics
import warnings
from dataclasses import replace

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from pipelines import figures
from pipelines import front as f
from pipelines.study import COSTS, FAILED, FINISHED, RUNNING, STOPPED, TOP1, Study, Trial
from posmlp import create_model
from posmlp.config import load_recipe
from posmlp.errors import UserError
from tune_spaces import Range, load_space

LATENCY = COSTS["latency"]
BASE = ["model.num_classes=8", "train.storage=somewhere/runs", "tracking.log_model=true"]


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("demo", BASE)


def trial(number, top1, cost, **other):
    return Trial(number, {"block1": "joint"}, state=FINISHED, metrics={TOP1: top1, LATENCY: cost}, **other)


def trials_of(points):
    """Trials from pairs of cost and top-1."""
    return [trial(number, top1, cost) for number, (cost, top1) in enumerate(points)]


def study_of(n, space, seed=0):
    """Trials of a space with all metrics; some failed, one is a repeat of each front's points."""
    rng = np.random.default_rng(seed)
    trials = []
    for number in range(n):
        width = rng.uniform(1, 20)
        metrics = {name: width * rng.uniform(0.8, 1.2) for name in (*COSTS.values(), "cost/peak_mb")}
        metrics |= {TOP1: float(min(0.99, 0.4 + 0.02 * width + rng.normal(0, 0.05))), "epoch": 3.0}
        state = FAILED if number % 7 == 5 else FINISHED
        metrics = metrics if state == FINISHED else {}
        reason = "" if state == FINISHED else 'out of "memory", they said;\nand more'
        trials.append(Trial(number, space.random(rng), state=state, reason=reason, metrics=metrics))
    for first in f.front(trials, "latency"):
        metrics = first.metrics | {TOP1: first.metrics[TOP1] - 0.03}
        trials.append(replace(first, number=len(trials), seed=1, repeats=first.number, metrics=metrics))
    return trials


grids = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), max_size=25)


@given(grids)
def test_the_front_is_what_no_other_trial_beats(points):
    trials = trials_of(points)

    def beaten(one):
        (cost, top1) = points[one]
        equal_before = (cost, top1) in points[:one]
        return equal_before or any(c <= cost and a >= top1 and (c, a) != (cost, top1) for c, a in points)

    expected = sorted((n for n in range(len(points)) if not beaten(n)), key=lambda n: points[n])
    assert [t.number for t in f.front(trials[::-1], "latency")] == expected


@given(grids)
def test_the_hypervolume_is_the_number_of_beaten_cells(points):
    for reference in (5, 12):
        cells = itertools.product(range(reference), range(12))
        count = sum(any(c <= x and a > y for c, a in points) for x, y in cells)
        assert f.hypervolume(points, reference) == count


@given(st.lists(st.tuples(st.integers(1, 12), st.floats(0, 1)), min_size=1, max_size=25))
def test_hypervolumes_grow_to_that_of_all_trials(points):
    values = f.hypervolumes(trials_of(points), "latency")
    reference = max(cost for cost, _ in points)
    assert len(values) == len(points)
    assert values == sorted(values)
    assert values[-1] == pytest.approx(f.hypervolume(points, reference) / reference)
    assert values[0] >= 0 and values[-1] <= 1


def test_hypervolume_of_rectangles():
    assert f.hypervolume([], 10) == 0
    assert f.hypervolume([(4, 0.5)], 10) == 3
    assert f.hypervolume([(4, 0.5), (8, 1.0)], 10) == 4
    assert f.hypervolumes(trials_of([(4, 0.5), (8, 1.0)]), "latency", reference=10) == pytest.approx([0.3, 0.4])


def test_what_has_no_numbers_does_not_count():
    counted = trial(6, 0.5, 2.0)
    trials = [
        trial(0, math.nan, 1.0),
        trial(1, 0.9, math.nan),
        trial(2, 0.9, math.inf),
        replace(trial(3, 0.9, 1.0), state=STOPPED),
        replace(trial(4, 0.9, 1.0), state=RUNNING),
        trial(5, 0.9, 1.0, repeats=6),
        counted,
        Trial(7, {}, state=FINISHED, metrics={TOP1: 0.9}),
    ]
    assert f.front(trials, "latency") == [counted]
    assert f.front(trials, "gmacs") == []
    assert f.hypervolumes(trials, "latency", 4.0) == [0, 0, 0, 0.25, 0.25]  # 0, 1, 2, 6 and 7


def test_accuracy_is_over_the_seeds_that_finished():
    first = trial(0, 0.5, 1.0)
    repeats = [trial(1, 0.6, 1.0, repeats=0), trial(2, 0.7, 1.0, repeats=0)]
    others = [trial(3, 0.1, 1.0, repeats=9), replace(trial(4, 0.1, 1.0, repeats=0), state=FAILED)]
    assert f.accuracy(first, [first, *others]) == (0.5, None, 1)
    mean, deviation, count = f.accuracy(first, [first, *repeats, *others])
    assert (mean, deviation, count) == (pytest.approx(0.6), pytest.approx(statistics.stdev([0.5, 0.6, 0.7])), 3)
    nothing = Trial(0, {}, state=FINISHED)
    assert math.isnan(f.accuracy(nothing, [nothing])[0])


@pytest.mark.parametrize("what", ["a", "b", "c"])
def test_importance_finds_the_one_dimension_that_matters(what):
    dimensions = {"a": ("x", "y", "z"), "b": (1, 2, 4, 8), "c": Range(1e-4, 1.0, log=True), "d": Range(0.0, 1.0)}
    effect = {"a": lambda v: "xyz".index(v), "b": lambda v: v, "c": lambda v: math.log10(v)}[what]
    rng = np.random.default_rng(0)
    trials = []
    for number in range(60):
        member = {
            "a": str(rng.choice(["x", "y", "z"])),
            "b": int(rng.choice([1, 2, 4, 8])),
            "c": float(10 ** rng.uniform(-4, 0)),
            "d": float(rng.uniform()),
        }
        trials.append(Trial(number, member, state=FINISHED, metrics={TOP1: float(effect(member[what]))}))
    for known in (dimensions, f.dimensions_of(trials)):
        shares = f.importance(known, trials, TOP1)
        assert set(shares) == set(dimensions)
        assert shares[what] > 0.8 and next(iter(shares)) == what
        assert sum(shares.values()) < 1.01
    assert f.importance(dimensions, trials, TOP1) == f.importance(dimensions, trials, TOP1)


def test_importance_needs_trials_that_differ():
    trials = [Trial(n, {"a": n % 2}, state=FINISHED, metrics={TOP1: 0.1 * n, LATENCY: 1.0}) for n in range(8)]
    assert f.importance({"a": (0, 1)}, trials[:3], TOP1) == {}
    assert f.importance({"a": (0, 1)}, trials, LATENCY) == {}
    assert f.importance({"a": (0, 1)}, trials, "cost/gmacs") == {}
    assert f.importance({"a": (0,)}, trials, TOP1) == {"a": 0.0}
    assert f.importance({"b": (0, 1)}, trials, TOP1) == {}  # none is in that space


def test_dimensions_as_the_trials_show_them():
    trials = [Trial(n, {"lr": 10.0 ** (n / 4), "block": "ab"[n % 2], "groups": 4 + n % 3}) for n in range(12)]
    assert f.dimensions_of(trials) == {"lr": Range(1.0, 10.0**2.75, True), "block": ("a", "b"), "groups": (4, 5, 6)}


def test_published_variants_cost_what_their_models_do(recipe):
    costs = f.published(recipe, {"s": 12.0})
    assert list(costs) == ["tiny", "s", "b", "l"]
    clip = recipe.model.variant()
    model = create_model("tiny", frames=clip.frames, image_size=clip.image_size, num_classes=8)
    assert costs["tiny"]["cost/params_m"] == sum(p.numel() for p in model.parameters()) / 1e6
    assert [LATENCY in values for values in costs.values()] == [False, True, False, False]
    gmacs = [values["cost/gmacs"] for values in costs.values()]
    assert gmacs == sorted(gmacs)


def test_block_types(recipe):
    def block(*names):
        return f.kind(Trial(0, dict(zip(("block1", "block2", "width"), names, strict=False))), "theirs")

    assert block("joint", "joint", 2) == "joint"
    assert block("joint", "parallel", 2) == "mixed"
    assert block() == "theirs"
    assert f.recipe_kind(recipe) == "parallel"
    assert f.recipe_kind(load_recipe("demo", ["model.blocks=[joint,joint,joint,parallel]"])) == "mixed"


def test_the_table_comes_back_from_csv(recipe):
    trials = study_of(12, load_space("speed_accuracy", recipe))
    rows = f.table(trials)
    back = list(csv.DictReader(io.StringIO(f.to_csv(rows).decode(), newline="")))
    assert [int(row["number"]) for row in back] == list(range(len(trials)))
    for row, was in zip(back, trials, strict=True):
        assert row["reason"] == was.reason and row["state"] == was.state and int(row["seed"]) == was.seed
        assert {name: f.value_of(row[f"search.{name}"]) for name in was.member} == was.member
        assert row["repeats"] == ("" if was.repeats is None else str(was.repeats))
        for name in (*COSTS.values(), "cost/peak_mb"):
            assert row[name] == (str(was.metrics[name]) if was.metrics else "")
    for against in COSTS:
        numbers = {t.number for t in f.front(trials, against)}
        assert {int(row["number"]) for row in back if row[f"front_{against}"] == "1"} == numbers
    for point in f.front(trials, "latency"):
        row = back[point.number]
        assert float(row["top1_mean"]) == pytest.approx(point.metrics[TOP1] - 0.015) and row["top1_count"] == "2"
    assert f.to_csv([{"study": "x"} | row for row in f.table([])]) == b"\n"


def test_members_in_a_line():
    member = {"block1": "joint", "block2": "parallel", "groups1": 4, "groups2": 8, "width": 1.5, "lr": 0.00123456}
    assert f.compact(member) == "block joint,parallel; groups 4,8; width 1.5; lr 0.001235"
    assert f.compact({"conv2": 3, "7": 1}) == "conv2 3; 7 1"


# --- pictures


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were made, each drawn in full all the same."""
    made = []
    monkeypatch.setattr(f, "png", lambda figure: (made.append(figure), figures.png(figure))[1])
    return made


@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("space", ["speed_accuracy", "learning"])
def test_a_study_that_has_just_begun_has_all_its_artifacts(recipe, space, count):
    study, found = Study(name="young", recipe=recipe, space=space), load_space(space, recipe)
    trials = [*study_of(20, found)[:count], Trial(count, {}, state=RUNNING)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = f.artifacts(study, trials, found.dimensions, f.published(recipe))
    assert sorted(files) == ["front.html", "front.png", "progress.png", "trials.csv"]
    assert all(files[name].startswith(b"\x89PNG") for name in ("front.png", "progress.png"))
    assert files["trials.csv"].decode().splitlines()[-1].startswith(f"young,{count},running")


def test_a_cost_that_is_zero_or_missing_leaves_its_panel(drawn):
    trials = [replace(trial(n, 0.1 * n, 0.0), metrics={TOP1: 0.1 * n, LATENCY: 0.0, COSTS["gmacs"]: n}) for n in (1, 9)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f.picture({"a": trials}, {"s": {COSTS["params"]: 1.0}})
        f.interactive({"a": trials}, {})
        f.progress_picture(trials, {}, "latency")
    latency, gmacs, params = drawn[0].axes
    assert (latency.get_xscale(), gmacs.get_xscale()) == ("linear", "log")
    assert [text.get_text() for text in params.texts] == ["no finished trial has this cost yet"]


def test_the_picture_shows_trials_fronts_seeds_and_variants(drawn, recipe):
    trials = study_of(25, load_space("block_types", recipe))
    near = {"s": {LATENCY: 25.0, COSTS["gmacs"]: 1e6}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f.picture({"a": trials}, near)
    for axes, against in zip(drawn[0].axes, COSTS, strict=True):
        points = {tuple(p) for shown in axes.collections for p in getattr(shown, "get_offsets", list)().tolist()}
        counted = f.measured(trials, against)
        assert {(t.metrics[COSTS[against]], 100 * t.metrics[TOP1]) for t in counted} <= points
        best = f.front(trials, against)
        steps = next(line for line in axes.get_lines() if line.get_drawstyle() == "steps-post")
        assert list(steps.get_xdata())[:-1] == [t.metrics[COSTS[against]] for t in best]
        labels = [text.get_text().strip() for text in axes.texts]
        assert ("s" in labels) == (against == "latency")  # a million GMACs are far away
        assert {str(t.number) for t in best} == {label for label in labels if label.isdigit()} or len(best) > f.NUMBERED
    assert "mean ± std of the seeds" in [text.get_text() for text in drawn[0].legends[0].texts]


def test_the_page_is_whole_and_has_every_trial(recipe):
    trials = study_of(12, load_space("block_types", recipe))
    trials[0].member["block1"] = "</script><b>"
    page = f.interactive({"one-study": trials, "another": trials[:6]}, f.published(recipe)).decode()
    assert not re.search(r"<(script|link)[^>]+(src|href)=", page)
    assert page.count("</script><b>") == 0
    title = re.search("<title>(.*?)</title>", page)[1]
    assert title == f"one-study: {f.summary(trials)} | another: {f.summary(trials[:6])}"
    assert "10 trained, 2 failed" in title
    for one in f.full(trials):
        assert f"one-study, trial {one.number}\\u003c" in page or f"one-study, trial {one.number}<" in page
    assert "block2 = " in page and "cost/peak_mb = " in page and "over 2 seeds" in page


# --- MLflow


@pytest.fixture(scope="module")
def store(tmp_path_factory, recipe):
    """MLflow's URI, and the study in it with its trials: beside other studies, experiments and runs."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(uri)
    first, second = (client.create_experiment(name, (folder / name).as_uri()) for name in ("first", "second"))
    study = Study(name="speed", recipe=recipe, space="speed_accuracy", searcher="nsga2", against="latency")
    space = load_space("speed_accuracy", recipe)
    trials = study_of(9, space)
    member = trials[0].member
    trials += [
        Trial(len(trials), member, seed=2**32 - 1, state=RUNNING, metrics={"epoch": 1.0}),
        Trial(len(trials) + 1, member, state=STOPPED, reason="behind the others", metrics={TOP1: math.inf}),
        Trial(len(trials) + 2, member | {"width": 1.0}, state=FAILED, reason="no memory"),
    ]

    def parent(experiment, name, start):
        run = client.create_run(experiment, start_time=start, run_name=name, tags={"study": name})
        client.log_text(run.info.run_id, json.dumps(study.model_dump(mode="json")), "study.json")
        return run.info.run_id

    def child(experiment, parent_id, one):
        tags = {"mlflow.parentRunId": parent_id, "study": "speed", "trial": str(one.number)}
        tags |= {"trial.state": one.state} if one.state != RUNNING else {}
        tags |= {"trial.reason": one.reason} if one.reason else {}
        tags |= {"trial.repeats": str(one.repeats)} if one.repeats is not None else {}
        run_id = client.create_run(experiment, run_name=f"trial-{one.number:03d}", tags=tags).info.run_id
        params = [Param(f"search.{key}", str(value)) for key, value in one.member.items()]
        metrics = [Metric(key, value, 0, 1) for key, value in one.metrics.items()]
        earlier = [Metric(TOP1, 0.01, 0, 0), Metric("system/cpu", 5.0, 0, 0)]
        client.log_batch(
            run_id, earlier + metrics if TOP1 in one.metrics else metrics, [*params, Param("train.seed", str(one.seed))]
        )
        config = study.trial_recipe(space, one.member, one.number, one.seed) if buildable(one) else recipe
        client.log_text(run_id, config.to_yaml(), "config.yaml")
        return replace(one, mlflow_run_id=run_id)

    def buildable(one):
        try:
            return space.recipe(recipe, one.member) is not None
        except UserError:
            return False

    client.create_run(first, run_name="speed")  # an ordinary run
    child(first, parent(first, "speed", 1000), replace(trials[0], number=77))  # an older study of the name
    newest = parent(second, "speed", 2000)
    for other in range(11):
        parent(first, f"other-{other:02d}", 3000)
    child(second, newest, replace(trials[0], state=FAILED, metrics={}))  # started anew below
    return uri, study, [child(second, newest, one) for one in trials]


def test_a_study_comes_back_from_mlflow(store, monkeypatch):
    uri, study, trials = store
    monkeypatch.setattr(f, "PAGE", 5)  # answers of several pages
    view = f.read_front("speed", uri)
    assert (view.name, view.study) == ("speed", study)
    assert view.trials == trials
    assert [type(v) for t in view.trials for v in t.member.values()] == [
        type(v) for t in trials for v in t.member.values()
    ]
    assert yaml.safe_load(view.recipe(3))["name"] in ("trial-003", study.recipe.name)


def test_what_is_written_of_studies(store, tmp_path):
    uri, study, trials = store
    view = f.read_front("speed", uri)
    text = f.write_front([view], "latency", tmp_path / "one")
    best = f.front(trials, "latency")
    head, titles, *rows = text.splitlines()
    area = f.hypervolumes(trials, "latency")[-1]
    assert head.startswith(f"speed: {f.summary(trials)}; hypervolume {area:.3f} up to ")
    assert titles.split() == ["trial", "top-1", "ms", "GMACs", "M", "params", "dimensions"]
    assert [int(row.split()[0]) for row in rows] == [t.number for t in best]
    assert all(f"{100 * t.metrics[TOP1]:.2f} %" in row for t, row in zip(best, rows, strict=True))
    assert all("2 seeds)" in row and f.compact(t.member) in row for t, row in zip(best, rows, strict=True))
    files = {str(path.relative_to(tmp_path / "one")) for path in (tmp_path / "one").rglob("*") if path.is_file()}
    numbers = {t.number for against in COSTS for t in f.front(trials, against)}
    recipes = {f"recipes/trial-{number:03d}.yaml" for number in numbers}
    assert files == {"front.html", "front.png", "progress.png", "trials.csv", *recipes}
    for number in numbers:
        config = load_recipe(tmp_path / "one" / f"recipes/trial-{number:03d}.yaml")
        assert config.name == f"speed-trial-{number:03d}"
        assert (config.train.storage, config.tracking.log_model) == ("somewhere/runs", True)

    other = replace(view, name="other")
    text = f.write_front([view, other], "gmacs", tmp_path / "two")
    assert "speed: " in text and "\n\nother: " in text
    assert (tmp_path / "two" / f"recipes/other-trial-{best[0].number:03d}.yaml").exists()
    assert not (tmp_path / "two" / "progress.png").exists()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "two" / "trials.csv").read_text(), newline="")))
    assert {row["study"] for row in rows} == {"speed", "other"} and len(rows) == 2 * len(trials)
    with pytest.raises(UserError, match=r"unknown cost 'latancy' \(did you mean 'latency'\?\); known: latency, gmacs"):
        f.write_front([view], "latancy", tmp_path)


def test_a_point_of_the_front_is_trained_alone(recipe, tmp_path):
    study = Study(name="s", recipe=recipe, space="block_types")
    member = {f"block{stage}": "joint" for stage in range(1, 5)}
    config = study.trial_recipe(load_space("block_types", recipe), member, 7, 3)
    path = tmp_path / "trial-007.yaml"
    path.write_text(f.recipe_of(config.to_yaml(), "s", 7, "somewhere/runs", True))
    expected = config.model_copy(
        update={
            "name": "s-trial-007",
            "train": config.train.model_copy(update={"storage": "somewhere/runs"}),
            "tracking": config.tracking.model_copy(update={"log_model": True}),
        }
    )
    assert load_recipe(path) == expected
    with pytest.raises(UserError, match="recipe of trial 7 of study s cannot be run.*modle"):
        f.recipe_of(config.to_yaml().replace("model:", "modle:", 1), "s", 7, "runs")


def test_a_study_that_is_not_there(store, tmp_path):
    uri, *_ = store
    with pytest.raises(UserError) as caught:
        f.read_front("sped", uri)
    text = str(caught.value)
    assert "has no study 'sped' (did you mean 'speed'?); it has: other-00, other-01," in text
    assert "other-09, ..." in text and "other-10" not in text and "\n" not in text
    with pytest.raises(UserError, match="has no study"):
        f.read_front("spe'ed", uri)
    missing = tmp_path / "mlflow.db"
    with pytest.raises(UserError, match=f"no study 'speed': there is no {missing}"):
        f.read_front("speed", f"sqlite:///{missing}")
    assert not missing.exists()


def test_an_mlflow_that_is_away_is_told_in_a_line(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError) as caught:
        f.read_front("speed", "http://me:secret@127.0.0.1:9")
    text = str(caught.value)
    assert text == "MLflow at http://127.0.0.1:9 does not answer (connection refused); see MLFLOW_TRACKING_URI"
