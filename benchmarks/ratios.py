"""Speed ratios that benchmarks keep, to notice when one falls. Times differ between machines, ratios differ less.

``benchmarks/ratios.json`` has the ratios by device and model. A benchmark compares its ratios with them and fails if
one is lower by more than ``TOLERANCE``. With ``--record`` it stores its ratios instead. Not a command.
"""

from __future__ import annotations

import json
from pathlib import Path

RATIOS_FILE = Path(__file__).parent / "ratios.json"
TOLERANCE = 0.1  # with few rounds, or on a busy machine, ratios can differ by more: run again before you believe it


def write_ratios(subject: str, ratios: dict[str, float], path: Path = RATIOS_FILE) -> None:
    """Store a subject's ratios. Stored ratios of other rows stay."""
    stored = read_ratios(path)
    stored[subject] = stored.get(subject, {}) | {row: round(ratio, 2) for row, ratio in ratios.items()}
    path.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")


def describe_regressions(subject: str, ratios: dict[str, float], path: Path = RATIOS_FILE) -> list[str]:
    """Return a line for each ratio that is NaN, or lower than the stored one by more than ``TOLERANCE``."""
    stored = read_ratios(path).get(subject, {})
    return [
        f"{subject}: {row} is {ratios[row]:.2f}, recorded {before:.2f}"
        for row, before in stored.items()
        if row in ratios and not ratios[row] >= (1 - TOLERANCE) * before  # true for NaN, too
    ]


def record_or_compare(subject: str, ratios: dict[str, float], record: bool, path: Path = RATIOS_FILE) -> None:
    """Store the ratios that are not NaN, or compare them with the stored ones.

    Args:
        subject: device and model, a key of the file.
        ratios: ratio by row.
        record: store the ratios instead of comparing them.
        path: the file.

    Raises:
        SystemExit: a ratio fell; the exit status is 1.
    """
    if record:
        write_ratios(subject, {row: ratio for row, ratio in ratios.items() if ratio == ratio}, path)
        print(f"\nrecorded in {path}")
    elif subject not in read_ratios(path):
        print(f"\nnothing recorded for: {subject} (--record stores these ratios)")
    elif lines := describe_regressions(subject, ratios, path):
        raise SystemExit("\n" + "\n".join(lines))
    else:
        print(f"\nno ratio is more than {TOLERANCE:.0%} below the recorded one")


def read_ratios(path: Path) -> dict[str, dict[str, float]]:
    """Return the stored ratios by subject and row; empty if there is no file."""
    stored: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    return stored
