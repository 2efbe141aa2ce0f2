"""A finished study as its users see it: MLflow's own pages, in a real browser."""

import json
from pathlib import Path
from urllib.parse import quote

import pytest
from mlflow import MlflowClient

from pipelines.tracking.uris import tracking_uri
from pipelines.tuning.study import fully_trained
from posmlp.metrics import VAL_TOP1
from tests.helpers.browser import keep, open_browser
from tests.helpers.mlflow_server import MlflowServer

pytestmark = [pytest.mark.ray, pytest.mark.browser]

COLUMNS = [f"metrics.`{VAL_TOP1}`", "metrics.`cost/latency_ms`", "metrics.`cost/gmacs`", "params.`search.block1`"]


@pytest.fixture(scope="module")
def server(finished_study, tmp_path_factory):
    """Address of an MLflow server over what the study has written."""
    result, _ = finished_study
    store = tracking_uri(result.study.recipe).removeprefix("sqlite:///")
    server = MlflowServer(tmp_path_factory.mktemp("server"), store, Path(store).parent / "mlartifacts")
    server.start()
    yield server.uri
    server.kill()


@pytest.fixture(scope="module")
def experiment(finished_study):
    result, _ = finished_study
    return MlflowClient(tracking_uri(result.study.recipe)).get_run(result.mlflow_run_id).info.experiment_id


@pytest.fixture
def page(server, experiment):
    """A page of a user who has chosen some columns and closed the assistant."""
    view = {"selectedColumns": COLUMNS, "runsExpanded": {}, "orderByKey": "attributes.start_time", "orderByAsc": True}
    settings = {
        f'MLflowLocalStorage-1.1-ExperimentPage-["{experiment}"]-ReactComponentState': json.dumps(view),
        "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
        "mlflow.assistant.panelOpen_v1": "false",
    }
    with open_browser() as page:
        page.add_init_script(f"for (const [k, v] of Object.entries({json.dumps(settings)})) localStorage.setItem(k, v)")
        yield page


def choose(page, box, *options):
    """Choose options of one of MLflow's lists, which know them all only by the keyboard."""
    box.click()
    for option in options:
        for _ in range(200):
            active = box.evaluate("e => document.getElementById(e.getAttribute('aria-activedescendant'))?.ariaLabel")
            if active == option:
                break
            page.keyboard.press("ArrowDown")
        assert active == option
        page.keyboard.press("Enter")
    page.keyboard.press("Escape")


def test_the_runs_table_shows_the_study_and_its_trials(finished_study, server, experiment, page, tmp_path):
    result, _ = finished_study
    page.goto(f"{server}/#/experiments/{experiment}/runs")
    study = page.locator(".ag-row").filter(has_text="look").first
    study.get_by_role("button").first.click()  # unfolds it
    for trial in result.trials:
        page.get_by_role("link", name=f"trial-{trial.number:03d}", exact=True).first.wait_for()
    keep(page, tmp_path, "runs")
    shown = page.locator("body").inner_text().split("\n")
    assert {"val/top1", "cost/latency_ms", "cost/gmacs", "search.block1", "look"} <= set(shown)
    for trial in result.trials:
        assert {trial.member["block1"], str(trial.metrics[VAL_TOP1])} <= set(shown)


def test_the_trials_can_be_compared(finished_study, server, experiment, page, tmp_path):
    result, _ = finished_study
    ids = [trial.mlflow_run_id for trial in result.trials]
    runs, experiments = quote(json.dumps(ids)), quote(json.dumps([experiment]))
    page.goto(f"{server}/#/compare-runs?runs={runs}&experiments={experiments}")
    page.get_by_text(f"Comparing {len(ids)} Runs from 1 Experiment").wait_for()
    page.locator(".parcoords").first.wait_for()
    choose(page, page.get_by_role("combobox").nth(1), "cost/latency_ms", "val/top1")
    axes = page.locator(".parcoords .axis-title")
    axes.filter(has_text="val/top1").wait_for()
    assert {"val/top1", "cost/latency_ms"} <= set(axes.all_text_contents())
    keep(page, tmp_path, "compare")
    page.get_by_role("tab", name="Scatter Plot").click()
    for number, metric in enumerate(("cost/latency_ms", "val/top1")):
        page.get_by_role("combobox").nth(number).click()
        page.get_by_role("option", name=metric, exact=True).click()
    page.locator(".xtitle", has_text="cost/latency_ms").wait_for()
    page.locator(".ytitle", has_text="val/top1").wait_for()
    keep(page, tmp_path, "scatter")


def test_the_front_is_a_page_to_point_at(finished_study, server, experiment, page, tmp_path):
    result, _ = finished_study
    page.goto(f"{server}/#/experiments/{experiment}/runs/{result.mlflow_run_id}/artifacts/front.html")
    frame = page.frame_locator("iframe").first
    frame.locator(".gtitle", has_text=f"look: {len(fully_trained(result.trials))} trials").wait_for()
    titles = frame.locator(".xtitle, .x2title, .x3title").all_text_contents()
    assert titles == ["ms per clip", "GMACs", "M parameters"]
    assert frame.locator(".scatterlayer .point").count() == 3 * len(fully_trained(result.trials))
    box = frame.locator(".scatterlayer .point").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    frame.locator(".hoverlayer", has_text="block ").wait_for()
    assert "look, trial" in frame.locator(".hoverlayer").text_content()
    keep(page, tmp_path, "front")
