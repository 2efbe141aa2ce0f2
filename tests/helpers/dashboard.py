"""What the Grafana dashboard asks Prometheus for."""

import json
import re
from pathlib import Path

HERE = Path(__file__).parents[2]


def dashboard():
    return json.loads((HERE / "deploy" / "grafana.json").read_text())


def expressions():
    """All that the dashboard's panels ask Prometheus."""
    return [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]


def metrics_of(expressions):
    """The names of Ray's metrics in them."""
    return {*re.findall(r"\bray_\w+", " ".join(expressions))}
