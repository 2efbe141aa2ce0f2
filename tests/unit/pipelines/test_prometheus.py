"""The gauges' names, as the dashboard has them, and how the pace is reckoned. That Ray exports them: test_jobs.py."""

import json
import re

import pytest

from pipelines.tracking import prometheus
from tests.helpers.dashboard import dashboard, expressions, metrics_of


def test_the_dashboard_draws_every_gauge_and_no_other():
    defined = {*prometheus.GAUGES, *(f"{name}_total" for name in prometheus.COUNTERS)}
    drawn = {name for name in metrics_of(expressions()) if name.startswith("ray_posmlp_")}
    assert drawn == {f"ray_{prometheus.PREFIX}{name}" for name in defined}


def test_the_dashboard_is_one_that_grafana_can_draw():
    """Panels side by side within 24 columns, ids only once, and no variable or data source that it does not define."""
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


def test_the_pace_is_that_since_it_was_last_shown(monkeypatch):
    shown = []
    monkeypatch.setattr(prometheus, "show", lambda run, **values: shown.append((run, values)))
    pace = prometheus.Pace("run", 8)
    pace.show(10.0, 5, 2.0)
    pace.show(14.0, 6, 5.0)
    assert shown[0] == ("run", {"clips_per_second": 4.0, "data_wait_fraction": pytest.approx(0.2)})
    assert shown[1] == ("run", {"clips_per_second": 2.0, "data_wait_fraction": pytest.approx(0.75)})
