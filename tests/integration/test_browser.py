"""What users see in MLflow's own pages, in a real browser whose profile nobody has touched."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.studies import report
from pipelines.studies.study import fully_trained
from pipelines.tracking.mlflow_client import EXPERIMENT_NOTE
from pipelines.tracking.uris import LOCAL_PAGES, TRAINING, run_link, tracking_uri
from tests.helpers.browser import keep, open_browser
from tests.helpers.mlflow_server import MlflowServer

pytestmark = [pytest.mark.ray, pytest.mark.browser]


@pytest.fixture(scope="module")
def server(finished_study, tmp_path_factory):
    """Address of an MLflow server over what the study has written."""
    result, _ = finished_study
    store = tracking_uri(result.study.recipe).removeprefix("sqlite:///")
    server = MlflowServer(tmp_path_factory.mktemp("server"), store, Path(store).parent / "mlartifacts")
    server.start()
    yield server.uri
    server.kill()


@pytest.fixture
def page():
    with open_browser() as page:
        yield page


@pytest.fixture
def link(finished_study, server):
    """A link that the study has printed, to the tests' server."""
    result, lines = finished_study
    text = "\n".join(lines)

    def find(what):
        assert f"{what}  " in text and result.links[what] in text
        return result.links[what].replace(LOCAL_PAGES, server)

    return find


@pytest.fixture
def experiment(finished_study):
    result, _ = finished_study
    return MlflowClient(tracking_uri(result.study.recipe)).get_run(result.mlflow_run_id).info.experiment_id


def close_assistant(page):
    """Close what MLflow lays over a page at the first visit."""
    page.get_by_text("MLflow Assistant").wait_for()
    for button in page.get_by_role("button", name="Close").all():
        button.click()
    page.wait_for_timeout(500)


def test_the_first_click_shows_no_runs_until_model_training_is_chosen(server, page, tmp_path):
    """MLflow 3.17 decides it in the browser, and the experiment's description says what to do.

    Where a later MLflow shows runs at once, this fails: then the description and its mention in the pages can go.
    """
    page.goto(server)
    page.get_by_text(EXPERIMENT_NOTE).wait_for()
    page.wait_for_timeout(1000)
    keep(page, tmp_path, "home")
    page.get_by_role("link", name="posmlp", exact=True).click()
    page.wait_for_url("**/overview/usage?workflowType=genai")
    page.get_by_text("Detect Issues in Your Traces").wait_for()
    keep(page, tmp_path, "first_click")
    page.get_by_role("button", name="Got it").click()
    page.get_by_text("Model training", exact=True).first.click()
    page.get_by_role("link", name="look", exact=True).wait_for()
    page.goto(server)  # the browser remembers
    page.get_by_role("link", name="posmlp", exact=True).click()
    page.get_by_role("link", name="look", exact=True).wait_for()


def test_the_printed_link_shows_all_runs_with_their_results(finished_study, link, page, tmp_path):
    result, _ = finished_study
    page.goto(link("all runs"))
    study = page.locator(".ag-row").filter(has_text="look").first
    close_assistant(page)
    study.get_by_role("button").first.click()  # unfolds it
    for trial in result.trials:
        page.get_by_role("link", name=report.trial_name(trial), exact=True).first.wait_for()
    keep(page, tmp_path, "runs")
    shown = page.locator("body").inner_text().split("\n")
    columns = ["val/best_top1", "val/best_epoch", "val/top1", "train/loss", "model.name", "model.blocks", "cost/gmacs"]
    places = [page.get_by_text(name, exact=True).first.bounding_box()["x"] for name in columns]
    assert places == sorted(places) and places[-1] < 1500
    for trial in result.trials:
        assert str(trial.metrics["val/best_top1"]) in shown


def test_the_printed_link_compares_the_trials(finished_study, link, page, tmp_path):
    result, _ = finished_study
    page.goto(link("compare trials"))
    for axis in ("search.block1", "search.block4", "cost/gmacs", "val/top1"):
        page.locator("svg text", has_text=axis).first.wait_for()
    close_assistant(page)
    for cost in ("cost/latency_ms", "cost/gmacs", "cost/params_m"):
        page.locator(".xtitle", has_text=cost).first.wait_for()
    assert page.locator(".ytitle").all_text_contents()[:3] == ["val/top1"] * 3
    assert page.locator(".scatterlayer").first.locator(".point").count() == len(result.trials)
    page.get_by_role("link", name=report.trial_name(result.trials[0]), exact=True).first.wait_for()
    assert page.get_by_role("link", name="look", exact=True).count() == 0  # the trials alone
    keep(page, tmp_path, "compare")


def test_a_runs_page_says_what_it_is_and_shows_training_first(finished_study, link, server, experiment, page, tmp_path):
    result, _ = finished_study
    best = result.best
    page.goto(link("this study"))
    page.get_by_text(report.describe_best(result.trials, result.study.main)).wait_for()
    page.goto(run_link(server, experiment, best.mlflow_run_id))
    page.get_by_text("Finished after epoch 2 of 2: val/top1").wait_for()
    page.get_by_text("32 videos of 8 classes").wait_for()
    close_assistant(page)
    keep(page, tmp_path, "run")
    page.get_by_role("tab", name="Model metrics").click()
    headers = page.get_by_test_id("experiment-view-compare-runs-section-header")
    headers.first.wait_for()
    assert headers.first.inner_text().split()[:2] == ["by_step", "(3)"]
    page.locator(".scatterlayer").first.wait_for()
    page.wait_for_timeout(1000)
    keep(page, tmp_path, "charts")


def test_the_front_is_a_page_to_point_at(finished_study, server, experiment, page, tmp_path):
    result, _ = finished_study
    page.goto(f"{server}/#/experiments/{experiment}/runs/{result.mlflow_run_id}/artifacts/front.html?{TRAINING}")
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


def test_the_best_model_has_a_page(finished_study, server, page, tmp_path):
    page.goto(f"{server}/#/models/look?{TRAINING}")
    page.get_by_text("Version 1").first.wait_for()
    page.get_by_text("best").first.wait_for()
    close_assistant(page)
    keep(page, tmp_path, "model")
