"""What an evaluation of any task has found."""

from __future__ import annotations

from dataclasses import dataclass, field

from posmlp.learn.evaluation import ClassResult
from posmlp.tasks.detection import DetectionSummary


@dataclass(frozen=True)
class Findings:
    """What an evaluation has found.

    Attributes:
        metrics: values by name, without the prefix of the split.
        classes: the figures of each class, by label.
        table: names and values of what the user sees.
        worst: a line for each of the worst classes.
        scores: name of the file of all scores, which is in the folder of the results already.
        files: content of the other files, by name.
    """

    metrics: dict[str, float]
    classes: list[ClassResult] | DetectionSummary
    table: list[tuple[str, str]] = field(default_factory=list)
    worst: list[str] = field(default_factory=list)
    scores: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
