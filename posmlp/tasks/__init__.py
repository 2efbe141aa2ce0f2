"""What a model learns: one module for each task. ``docs/extending.md`` says how another one is added."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posmlp.tasks.base import Task
from posmlp.tasks.detection import Detection
from posmlp.tasks.recognition import Recognition

if TYPE_CHECKING:  # it needs pydantic
    from posmlp.config import Config

TASKS: dict[str, Task] = {"recognition": Recognition(), "detection": Detection()}  # by the recipe's task


def task_of(config: Config) -> Task:
    """The task of a recipe."""
    return TASKS[config.task]
