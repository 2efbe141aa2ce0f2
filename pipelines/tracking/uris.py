"""The tracking URI, URIs without secrets, names of MLflow's tags, and links into its pages.

This module does not import MLflow, which takes a second.

MLflow 3.17 opens an experiment on pages for language-model agents, unless this browser has chosen "Model training" or
the address says so (``TRAINING``). No setting of the server or tag of the experiment changes that. An address can also
name a shared view: the state of a page of runs (columns, filter, charts), stored as a tag of the experiment.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posmlp.config import Config
from posmlp.errors import UserError
from posmlp.metrics import (
    BY_STEP_CLIPS_PER_S,
    BY_STEP_LR,
    BY_STEP_TRAIN_LOSS,
    COST_GMACS,
    COST_LATENCY_MS,
    COST_PARAMS_M,
    TRAIN_LOSS,
    VAL_BEST_EPOCH,
    VAL_LOSS,
    MainMetric,
)

LOCAL_PAGES = "http://127.0.0.1:5000"  # where `mlflow server` listens
TRAINING = "workflowType=machine_learning"  # in an address: MLflow's pages for training
VIEW_TAG = "mlflow.sharedViewState."  # prefix of an experiment's tags; the view's name follows
RUNS_VIEW = "posmlp-runs"  # the view of all runs of an experiment
RUN_NAME = "mlflow.runName"  # the tag with the run's name
NOTE = "mlflow.note.content"  # the tag with the description, in Markdown
PARENT = "mlflow.parentRunId"  # the tag with the run below which MLflow's pages show this run
NAME_WIDTH = 340  # pixels of the column of runs' names
SEARCH_PARAM = "search."  # prefix; a dimension's name follows: the params of a trial's MLflow run


def tracking_uri(config: Config) -> str:
    """The recipe's ``tracking.uri``, else ``MLFLOW_TRACKING_URI``, else a SQLite file in ``train.storage``.

    Raises:
        UserError: neither is set, and the storage is remote, where SQLite does not work.
    """
    if uri := config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    if "://" in str(config.train.storage):
        raise UserError(
            f"train.storage {config.train.storage} is not on this machine, so it cannot hold MLflow's SQLite file; "
            "set tracking.uri (or MLFLOW_TRACKING_URI) to an MLflow server, or to sqlite:////a/local/path/mlflow.db"
        )
    return f"sqlite:///{Path(config.train.storage).resolve() / 'mlflow.db'}"


def sqlite_path(uri: str) -> Path | None:
    """The absolute path of a SQLite store; None for other stores, and for SQLite's own URIs and stores in memory."""
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    return (
        Path(path).resolve() if uri.startswith("sqlite:///") and path and not path.startswith(("file:", ":")) else None
    )


def without_secrets(uri: str) -> str:
    """A tracking URI without user, password and query, safe to store and print."""
    if uri.startswith(("sqlite:", "file:")):
        return uri.partition("?")[0]
    return re.sub(r"^([\w+.-]+://).*@", r"\1", uri).partition("?")[0]


def scrub(text: str, uri: str) -> str:
    """Remove the secrets of a tracking URI from a text."""
    text = text.replace(uri, without_secrets(uri))
    if (found := re.match(r"^[\w+.-]+://(.*)@", uri)) and not uri.startswith("sqlite:"):
        text = text.replace(f"{found[1]}@", "***@")
        if ":" in found[1]:  # a user name alone may be part of any word
            text = text.replace(found[1], "***")
    return text


def recipe_without_password(config: Config) -> Config:
    """The recipe without the user and password of ``tracking.uri``, safe to store."""
    uri = config.tracking.uri and without_secrets(config.tracking.uri)
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})


# --- links into MLflow's pages ---------------------------------------------------------------------------------------


def pages_address(uri: str) -> str:
    """The address of MLflow's pages: the server, or one that the user starts on this machine for a database."""
    return without_secrets(uri).rstrip("/") if uri.startswith(("http://", "https://")) else LOCAL_PAGES


def run_link(uri: str, experiment: str, run_id: str) -> str:
    """The address of a run's page.

    Args:
        experiment: id of its experiment.
    """
    return f"{pages_address(uri)}/#/experiments/{experiment}/runs/{run_id}?{TRAINING}"


def view_link(uri: str, experiment: str, view: str, *, charts: bool = False) -> str:
    """The address of a page of runs in a shared view (``runs_view``, ``study_view``).

    Args:
        experiment: id of the experiment.
        view: name of the view.
        charts: show the charts next to the list of runs, not the table.
    """
    mode = "&compareRunsMode=CHART" if charts else ""
    return f"{pages_address(uri)}/#/experiments/{experiment}/runs?{TRAINING}&viewStateShareKey={view}{mode}"


def links_text(uri: str, links: Mapping[str, str]) -> str:
    """Describe how to open links: a line with the command, if a database needs a server first, and a line per link."""
    head = "see it in MLflow:"
    if pages_address(uri) == LOCAL_PAGES and not uri.startswith("http"):
        head += f" `{Path(sys.executable).parent / 'mlflow'} server --backend-store-uri {without_secrets(uri)}`, then"
    width = max(map(len, links), default=0)
    lines = [f"    {what:<{width}}  {link}" for what, link in links.items()] or [f"    {pages_address(uri)}"]
    return "\n".join([head, *lines])


def study_view_name(run_id: str) -> str:
    """The name of a study's view; ``run_id`` is its MLflow run."""
    return f"study-{run_id}"


def view_text(view: Mapping[str, Any]) -> str:
    """A view as MLflow's pages store it: compressed, as a tag of an experiment has at most 5000 characters."""
    return f"deflate;{base64.b64encode(zlib.compress(json.dumps(view).encode(), 9)).decode()}"


def runs_view(main: MainMetric) -> dict[str, Any]:
    """The view of all runs: the columns that compare them, and charts with validation and training first.

    Args:
        main: of the newest run; of an experiment with several tasks the view is that of one of them.
    """
    metrics = (main.best, VAL_BEST_EPOCH, main.key, TRAIN_LOSS)
    params = ("model.name", "model.blocks", COST_GMACS, "train.epochs")
    columns = [column("metrics", name) for name in metrics] + [column("params", name) for name in params]
    columns += [column("tags", "overrides"), column("attributes", "Dataset"), column("attributes", "Models")]
    order = {"orderByKey": "attributes.start_time", "orderByAsc": False}
    return order | columns_state(columns) | charts_state(curves(main))


def study_view(study: str, dimensions: Sequence[str], main: MainMetric) -> dict[str, Any]:
    """The view of a study's trials, the best first: parallel coordinates, main metric against each cost, and curves.

    Args:
        dimensions: names of the space's dimensions.
        main: of the study.
    """
    costs, params = (COST_LATENCY_MS, COST_GMACS, COST_PARAMS_M), [f"{SEARCH_PARAM}{name}" for name in dimensions]
    columns = [column("metrics", name) for name in (main.key, *costs)] + [column("params", name) for name in params]
    columns.append(column("tags", "trial.state"))  # some trials are stopped early, and their values are of fewer epochs
    parallel = {"selectedParams": params, "selectedMetrics": [COST_GMACS, main.key], "showAllRuns": False}
    charts = [chart("PARALLEL", "study", "members", parallel)]
    for cost in costs:
        axes = {"xaxis": {"key": cost, "type": "METRIC"}, "yaxis": {"key": main.key, "type": "METRIC"}}
        charts.append(chart("SCATTER", "study", cost, axes))
    filters = {"searchFilter": f"tags.study = '{study}' AND tags.trial LIKE '%'", "runsHiddenMode": "SHOW_ALL"}
    order = {"orderByKey": column("metrics", main.key), "orderByAsc": False}
    return filters | order | columns_state(columns) | charts_state([*charts, *curves(main)])


def column(kind: str, name: str) -> str:
    """The key of a column of the table of runs. ``kind`` is ``metrics``, ``params``, ``tags`` or ``attributes``."""
    return f"{kind}.`{name}`"


def columns_state(columns: Sequence[str]) -> dict[str, Any]:
    """The columns of the table, in this order, as MLflow's pages store them; names of trials fit."""
    name = column("attributes", "Run Name")
    return {"selectedColumns": list(columns), "columnOrder": [name, *columns], "columnWidths": {name: NAME_WIDTH}}


def curves(main: MainMetric) -> list[dict[str, Any]]:
    """The line charts of a view. MLflow adds those of all other metrics, each group of names after these groups."""
    groups = {
        "val": (main.key, main.best, VAL_LOSS),
        "by_step": (BY_STEP_TRAIN_LOSS, BY_STEP_LR, BY_STEP_CLIPS_PER_S),
        "train": (TRAIN_LOSS,),
    }
    return [line_chart(group, name) for group, names in groups.items() for name in names]


def line_chart(group: str, metric: str) -> dict[str, Any]:
    return chart("LINE", group, metric, {"metricKey": metric, "xAxisKey": "step"} | LINE_DEFAULTS)


LINE_DEFAULTS = {
    **{"lineSmoothness": 0, "xAxisScaleType": "linear", "scaleType": "linear", "range": {}, "yAxisKey": "metric"},
    **{"yAxisExpressions": [], "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True},
}


def chart(kind: str, group: str, name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """A chart as MLflow's pages store it, in the section of this group."""
    limit = 10 if kind == "LINE" else 100  # runs that it shows
    identity = {"uuid": f"{group}-{name}", "metricSectionId": group, "type": kind, "runsCountToCompare": limit}
    return identity | {"deleted": False, "isGenerated": kind == "LINE"} | dict(state)


def charts_state(charts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The charts and their sections, in this order, as MLflow's pages store them."""
    groups = dict.fromkeys(str(each["metricSectionId"]) for each in charts)
    sections = [{"uuid": group, "name": group, "display": True, "isReordered": False} for group in groups]
    return {"compareRunCharts": list(charts), "compareRunSections": sections, "isAccordionReordered": True}
