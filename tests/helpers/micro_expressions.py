"""Coding files and frame folders in the published layouts of CASME II, SAMM and SMIC, with drawn content."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import openpyxl

CASME2_HEADER = ("Subject", "Filename", None, "OnsetFrame", "ApexFrame", "OffsetFrame", None, "Action Units")
CASME2_HEADER += ("Estimated Emotion",)
SAMM_HEADER = ("Subject", "Filename", "Inducement Code", "Onset Frame", "Apex Frame", "Offset Frame", "Duration")
SAMM_HEADER += ("Micro", "Action Units", "Estimated Emotion", "Objective Classes", "Notes")
SMIC_HEADER = ("Subject", "Filename", "OnsetF", "OffsetF", "TotalMF1", "Onset2F", "Offset2F", "TotalMF2", "Onset3F")
SMIC_HEADER += ("Offset3F", "TotalMF3", "FirstF", "LastF", "TotalVL", "Emotion")


def write_workbook(path: Path, rows: Iterable[Sequence[Any]], above: int = 0) -> Path:
    """Write the rows to a workbook's first sheet, below ``above`` rows of text."""
    book = openpyxl.Workbook()
    for i in range(above):
        book.active.append([f"line {i} of the notes"] if i % 2 else [])
    for row in rows:
        book.active.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)
    return path


def casme2_row(subject: Any, name: str, onset: Any, offset: Any, emotion: str) -> tuple[Any, ...]:
    return (subject, name, None, onset, "/", offset, None, "4+7", emotion)


def samm_row(subject: Any, name: str, onset: Any, offset: Any, emotion: str) -> tuple[Any, ...]:
    return (subject, name, 1, onset, onset, offset, None, "Micro", "4", emotion, 1, None)


def smic_row(subject: Any, name: str, emotion: str, *spans: Any) -> tuple[Any, ...]:
    filled = [*spans, *[None] * (6 - len(spans))]
    parts = [[*filled[i : i + 2], 1 if filled[i] is not None else None] for i in (0, 2, 4)]
    return (subject, name, *parts[0], *parts[1], *parts[2], 1, 2, 3, emotion)


def touch(folder: Path, names: Iterable[str]) -> Path:
    """Make empty files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder
