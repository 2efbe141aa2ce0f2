"""Pareto fronts against brute force and closed forms; a study read back from MLflow."""

import csv
import io
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from PIL import Image

from pipelines.tracking.mlflow_client import PARENT
from pipelines.tuning import pareto
from pipelines.tuning.study import Study, StudyError, Trial, TrialState, study_space
from posmlp import create_model
from posmlp.config import load_recipe
from posmlp.metrics import COSTS, VAL_TOP1

BASE = load_recipe("demo")
GMACS = COSTS["gmacs"]


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


def test_top1_of_a_trial_is_over_its_seeds():
    trials = [
        trial(0, 0.5, 1.0),
        trial(1, 0.7, 1.0, repeat_of=0),
        trial(2, 0.9, 1.0, repeat_of=0, state=TrialState.FAILED),
    ]
    mean, deviation, seeds = pareto.top1_over_seeds(trials[0], trials)
    assert (mean, seeds) == (pytest.approx(0.6), 2)
    assert deviation == pytest.approx(0.2 / math.sqrt(2))
    assert pareto.top1_over_seeds(trial(7, 0.5, 1.0), trials) == (0.5, None, 1)
    strange = [*trials, trial(3, math.nan, 1.0, repeat_of=0), replace(trial(4, 0.5, 1.0, repeat_of=0), metrics={})]
    assert pareto.top1_over_seeds(trials[0], strange) == (mean, deviation, seeds)


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
    costs = pareto.published_variant_costs(load_recipe("ssv1_s16"), {"s": 700.0})
    assert costs["s"][COSTS["latency"]] == 700 and COSTS["latency"] not in costs["b"]
    assert costs["s"][COSTS["params"]] == pytest.approx(13.509537)
    assert costs["s"][GMACS] == pytest.approx(40.17, abs=0.01)
    tiny = create_model("tiny", frames=8, num_classes=8)
    assert pareto.published_variant_costs(load_recipe("demo", ["model.num_classes=8"]), {})["tiny"][
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
    files = pareto.pareto_files({"look": trials}, BASE, "latency")
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
    files = pareto.pareto_files({"look": trials}, BASE, "gmacs")
    page = files["front.html"].decode()
    assert "look: 12 trials" in page and "GMACs" in page and "ms per clip" not in page
    assert Image.open(io.BytesIO(files["front.png"])).width > 1000
    assert "nan" not in pareto.describe_study("look", trials, "gmacs")
    assert pareto.pareto_front(trials, "latency") == []
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning | UserWarning)]


def test_two_studies_share_one_figure():
    files = pareto.pareto_files({"look": many(), "other": many(1)}, BASE, "gmacs")
    assert {"look-trials.csv", "other-trials.csv", "look-progress.png"} <= set(files)
    assert "look: 12 trials; other: 12 trials" in files["front.html"].decode()


def test_the_table_has_every_trial(tmp_path):
    trials = [*many(), trial(12, 0.0, 1.0, state=TrialState.FAILED), trial(13, 0.5, 1.0, repeat_of=0)]
    trials[12] = replace(trials[12], metrics={}, reason="it, exploded")
    rows = list(csv.DictReader(io.StringIO(pareto.to_csv(pareto.trial_rows(trials)).decode())))
    assert [row["state"] for row in rows] == [TrialState.FINISHED] * 12 + [TrialState.FAILED, TrialState.FINISHED]
    assert rows[12]["reason"] == "it, exploded"
    assert rows[13]["repeats"] == "0"
    assert float(rows[3]["top1"]) == trials[3].metrics[VAL_TOP1]
    on_front = {int(row["trial"]) for row in rows if row["front_gmacs"] == "1"}
    assert on_front == {t.number for t in pareto.pareto_front(trials, "gmacs")}


def log_study(client, study, trials, artifacts):
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
    newest = log_study(client, study, trials, place)
    logged = pareto.read_study_from_mlflow("look", uri)
    assert (logged.study, logged.run_id) == (study, newest)
    assert [replace(t, mlflow_run_id=None) for t in logged.trials] == trials
    assert set(logged.recipes) == {t.number for cost in COSTS for t in pareto.pareto_front(trials, cost)}
    text = pareto.write_studies([logged], "gmacs", tmp_path / "out")
    assert text == pareto.describe_study("look", trials, "gmacs")
    for number in logged.recipes:
        config = load_recipe(tmp_path / "out" / "recipes" / f"look-trial-{number:03d}.yaml")
        assert config.name == f"look-trial-{number:03d}"
        assert config.train.storage == str(tmp_path)
        assert config.model == study.trial_recipe(study_space(study), trials[number].member, 0, 0).model
    with pytest.raises(StudyError, match=r"mlflow\.db has no study 'lok'; known: look"):
        pareto.read_study_from_mlflow("lok", uri)
    with pytest.raises(StudyError, match=r"no MLflow store sqlite:///nowhere\.db; give the right one"):
        pareto.read_study_from_mlflow("look", "sqlite:///nowhere.db")
    assert not Path("nowhere.db").exists()


def test_an_infinite_metric_in_mlflow_is_no_number(tmp_path):
    """Earlier versions sent it as it is, and MLflow stored it as 1.8e308."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    study = Study(name="look", recipe=load_recipe("demo"), space="speed_accuracy", against="gmacs")
    trials = [trial(0, 0.5, 1.0), trial(1, math.inf, 0.5), trial(2, 0.9, math.inf), trial(3, 0.9, -math.inf)]
    trials = [replace(t, member=each.member) for t, each in zip(trials, many(), strict=False)]
    log_study(MlflowClient(uri), study, trials, (tmp_path / "artifacts").as_uri())
    logged = pareto.read_study_from_mlflow("look", uri)
    assert [replace(t, mlflow_run_id=None) for t in logged.trials] == trials
    assert [t.number for t in pareto.pareto_front(logged.trials, "gmacs")] == [0]
    assert "e+308" not in pareto.write_studies([logged], "gmacs", tmp_path / "out")
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
    assert [t.number for t in pareto.read_study_from_mlflow("look", uri).trials] == [0, 1]
    client.delete_experiment(renamed)
    command = f"`MLFLOW_TRACKING_URI={uri} mlflow experiments restore --experiment-id {renamed}`"
    with pytest.raises(StudyError, match=re.escape(f"restore 'after' with {command}")):
        pareto.read_study_from_mlflow("look", uri)


def test_an_mlflow_that_is_down_is_reported_in_one_line():
    with pytest.raises(StudyError, match=r"study 'look' cannot be read from MLflow at http://127\.0\.0\.1:9") as error:
        pareto.read_study_from_mlflow("look", "http://someone:secret@127.0.0.1:9")
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


def test_the_best_is_by_the_mean_of_those_with_several_seeds():
    lucky, sound, alone = trial(0, 0.9, 1.0), trial(1, 0.8, 2.0), trial(2, 0.95, 3.0)
    again = [trial(3, 0.1, 1.0, repeat_of=0), trial(4, 0.8, 2.0, repeat_of=1)]
    assert pareto.best_trial([lucky, sound, alone]) is alone
    assert pareto.best_trial([lucky, sound, alone, *again]) is sound
    assert pareto.best_trial([trial(0, 0.5, 2.0), trial(1, 0.5, 1.0)]).number == 1
    assert pareto.best_trial([trial(0, 0.5, 2.0, state=TrialState.FAILED)]) is None


def test_a_trials_recipe_has_no_password():
    tracking = BASE.tracking.model_copy(update={"uri": "http://me:hushhush@mlflow.example"})
    study = Study(name="s", recipe=BASE.model_copy(update={"tracking": tracking}), space="block_types")
    text = pareto.standalone_recipe(BASE, study, 3)
    assert "uri: http://mlflow.example\n" in text and "hushhush" not in text
