"""The operations of a tracking journal: what a run asks MLflow to do, one dataclass per kind.

Each operation is one line of JSON in the journal. ``to_json`` and ``from_json`` are the only code that knows the keys
of these lines. Journals outlive the process that wrote them, so the keys must not change.

An operation without ``run_id`` is for the journal's own MLflow run; with one it is for another run, such as a trial of
a study.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from pipelines.registry.logged_models import CheckpointLink


@dataclass(frozen=True)
class OpenRun:
    """Set the run's status to RUNNING. Every driver appends one when it opens the journal.

    Attributes:
        uri: the MLflow tracking URI, without secrets.
        run_id: the MLflow run of this journal.
        offline: MLflow did not answer, so the driver could not ask which epochs MLflow already has.
    """

    uri: str
    run_id: str
    offline: bool


@dataclass(frozen=True)
class LogMetrics:
    """Log one set of metrics.

    Attributes:
        time: milliseconds since 1970.
        step: MLflow's step, such as the number of finished epochs.
        values: a value per metric name.
    """

    time: int
    step: int
    values: Mapping[str, float]
    run_id: str | None = None


@dataclass(frozen=True)
class LogSeries:
    """Log several points of metrics in one operation.

    Attributes:
        names: of the metrics.
        rows: for each point, milliseconds since 1970, MLflow's step, and a value per name.
    """

    names: Sequence[str]
    rows: Sequence[Sequence[float]]


@dataclass(frozen=True)
class LogParams:
    """Log params. MLflow's params cannot change: a param that the run already has keeps its value."""

    params: Mapping[str, str]


@dataclass(frozen=True)
class SetTags:
    """Set tags of a run."""

    tags: Mapping[str, str]
    run_id: str | None = None


@dataclass(frozen=True)
class EndRun:
    """Set the final status and the end time of a run.

    Attributes:
        status: FINISHED, FAILED or KILLED.
        time: milliseconds since 1970.
    """

    status: str
    time: int
    run_id: str | None = None


@dataclass(frozen=True)
class LogFile:
    """Store a file as an artifact of the run.

    Attributes:
        path: path of the artifact in the run, such as ``recipes/trial-003.yaml``.
        file: path of the content below the journal's ``files_folder``; the journal sets it.
    """

    path: str
    file: str = ""


@dataclass(frozen=True)
class LogModel:
    """Store a folder with MLflow's files of a model (``pipelines.registry.model_files``) as the run's logged model.

    Attributes:
        time: milliseconds since 1970.
        file: path of the folder below the journal's ``files_folder``; the journal sets it.
        checkpoint: whose model it is; None in journals of earlier versions.
    """

    time: int
    file: str = ""
    checkpoint: CheckpointLink | None = None


@dataclass(frozen=True)
class LinkCheckpoints:
    """Make the run's logged models those of these checkpoints (``pipelines.registry.logged_models``).

    Attributes:
        links: the checkpoints.
        finished: whether the run is finished.
    """

    links: Sequence[CheckpointLink]
    finished: bool


@dataclass(frozen=True)
class LogInputs:
    """Log the run's lists of videos as MLflow's data sets.

    Attributes:
        datasets: each as ``pipelines.registry.datasets.describe_list`` describes it.
    """

    datasets: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Unreadable:
    """A line of the journal that is not an operation, for example after a power cut. It is rejected, not delivered."""

    line: str


Operation = (
    OpenRun
    | LogMetrics
    | LogSeries
    | LogParams
    | SetTags
    | EndRun
    | LogFile
    | LogModel
    | LinkCheckpoints
    | LogInputs
    | Unreadable
)


def to_json(operation: Operation) -> dict[str, Any]:
    """Return the operation as plain data, with the keys of a journal line in their order."""
    match operation:
        case OpenRun(uri, run_id, offline):
            return {"op": "open", "uri": uri, "run_id": run_id, "blind": offline}
        case LogMetrics(time, step, values, None):
            return {"op": "metrics", "time": time, "step": step, "values": dict(values)}
        case LogMetrics(time, step, values, run_id):
            return {"op": "metrics of", "of": run_id, "time": time, "step": step, "values": dict(values)}
        case LogSeries(names, rows):
            return {"op": "series", "names": list(names), "rows": [list(row) for row in rows]}
        case LogParams(params):
            return {"op": "params", "params": dict(params)}
        case SetTags(tags, run_id):
            return {"op": "tags", "tags": dict(tags)} | _other_run(run_id)
        case EndRun(status, time, run_id):
            return {"op": "status", "status": status, "time": time} | _other_run(run_id)
        case LogFile(path, file):
            return {"op": "file", "path": path, "file": file}
        case LogModel(time, file, checkpoint):
            return {"op": "model", "time": time, "file": file} | (
                {"checkpoint": asdict(checkpoint)} if checkpoint else {}
            )
        case LinkCheckpoints(links, finished):
            return {"op": "checkpoints", "links": [asdict(link) for link in links], "finished": finished}
        case LogInputs(datasets):
            return {"op": "inputs", "datasets": [dict(each) for each in datasets]}
        case Unreadable(line):
            return {"op": "unreadable", "line": line}


def from_json(tree: Any) -> Operation | None:
    """Return the operation of a parsed journal line, or None if it is not one.

    Raises:
        ValueError: a part of it is not as expected.
    """
    match tree:
        case {"op": "open", "uri": str(uri), "run_id": str(run_id), "blind": bool(offline)}:
            return OpenRun(uri, run_id, offline)
        case {"op": "metrics", "time": int(time), "step": int(step), "values": dict(values)}:
            return LogMetrics(time, step, values)
        case {"op": "metrics of", "of": str(run_id), "time": int(time), "step": int(step), "values": dict(values)}:
            return LogMetrics(time, step, values, run_id)
        case {"op": "series", "names": [*names], "rows": [*rows]}:
            return LogSeries(names, rows)
        case {"op": "params", "params": dict(params)}:
            return LogParams(params)
        case {"op": "tags", "tags": dict(tags)}:
            return SetTags(tags, tree.get("of"))
        case {"op": "status", "status": str(status), "time": int(time)}:
            return EndRun(status, time, tree.get("of"))
        case {"op": "file", "path": str(path), "file": str(file)}:
            return LogFile(path, file)
        case {"op": "model", "time": int(time), "file": str(file)}:
            return LogModel(time, file, _read_link(tree["checkpoint"]) if "checkpoint" in tree else None)
        case {"op": "checkpoints", "links": [*links], "finished": bool(finished)}:
            return LinkCheckpoints([_read_link(link) for link in links], finished)
        case {"op": "inputs", "datasets": [*datasets]}:
            return LogInputs(datasets)
        case {"op": "unreadable", "line": str(line)}:
            return Unreadable(line)
    return None


def _read_link(tree: Any) -> CheckpointLink:
    """Return the link that ``dataclasses.asdict`` wrote.

    Raises:
        ValueError: it is none.
    """
    match tree:
        case {"uri": str(), "step": int(), "epoch": int(), "metrics": dict(), "run_id": str(), "datasets": dict()}:
            return CheckpointLink(**{each.name: tree[each.name] for each in fields(CheckpointLink)})
    raise ValueError("not a link to a checkpoint")


def _other_run(run_id: str | None) -> dict[str, str]:
    return {} if run_id is None else {"of": run_id}
