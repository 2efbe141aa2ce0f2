"""The names of the Prometheus metrics match the dashboard, and throughput is computed right.

test_jobs.py tests that Ray exports the metrics.
"""

import json
import re

import pytest

from pipelines.tracking import prometheus
from tests.helpers.dashboard import dashboard, expressions, metrics_of


def test_the_dashboard_draws_every_gauge_and_no_other():
    defined = {*prometheus.GAUGES, *(f"{name}_total" for name in prometheus.COUNTERS)}
    drawn = {name for name in metrics_of(expressions()) if name.startswith("ray_posmlp_")}
    assert drawn == {f"ray_{prometheus.PREFIX}{name}" for name in defined}


def test_grafana_can_draw_the_dashboard():
    """Panels do not overlap and fit into 24 columns, ids are unique, and every variable and data source is defined."""
    board = dashboard()
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert {name: v["type"] for name, v in variables.items()} == {"datasource": "datasource", "run": "query"}
    assert metrics_of([variables["run"]["query"]["query"]]) == {"ray_posmlp_epoch"}
    text = json.dumps(board)
    assert {*re.findall(r"\$\{?(\w+)", text)} <= {*variables, "__all"}
    sources = re.findall(r'"datasource": (\{[^}]*\}[^}]*\})', text)
    assert len(sources) > 12 and {*sources} == {'{"type": "prometheus", "uid": "${datasource}"}'}
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for place in (panel["gridPos"] for panel in panels):
        cells = {(x + place["x"], y + place["y"]) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and all(0 <= x < 24 for x, _ in cells)
        taken |= cells


def test_throughput_is_that_since_the_last_call(monkeypatch):
    published = []
    monkeypatch.setattr(prometheus, "publish", lambda run, **values: published.append((run, values)))
    throughput = prometheus.ThroughputGauge("run", 8)
    throughput.publish(10.0, 5, 2.0)
    throughput.publish(14.0, 6, 5.0)
    assert published[0] == ("run", {"clips_per_second": 4.0, "data_wait_fraction": pytest.approx(0.2)})
    assert published[1] == ("run", {"clips_per_second": 2.0, "data_wait_fraction": pytest.approx(0.75)})
