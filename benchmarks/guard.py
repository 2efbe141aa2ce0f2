"""Ratios of speed, kept from run to run: times differ from machine to machine, what they are to each other does less.

``benchmarks/ratios.json`` has them by device and model. A benchmark compares its own with them and fails where one is
lower by more than ``SLACK``; its flag ``--record`` keeps them in place of those.
"""

from __future__ import annotations

import json
from pathlib import Path

RECORD = Path(__file__).parent / "ratios.json"
SLACK = 0.1  # few rounds, or a busy machine, can differ by more: run again before believing it


def record(subject: str, ratios: dict[str, float], path: Path = RECORD) -> None:
    """Keep a subject's ratios; those of rows that were not run stay."""
    kept = read(path)
    kept[subject] = kept.get(subject, {}) | {row: round(ratio, 2) for row, ratio in ratios.items()}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


def worse(subject: str, ratios: dict[str, float], path: Path = RECORD) -> list[str]:
    """A line for each ratio that is lower than the recorded one by more than ``SLACK``, or has no number any more."""
    kept = read(path).get(subject, {})
    return [
        f"{subject}: {row} is {ratios[row]:.2f}, recorded {was:.2f}"
        for row, was in kept.items()
        if row in ratios and not ratios[row] >= (1 - SLACK) * was  # NaN, too
    ]


def finish(subject: str, ratios: dict[str, float], keep: bool, path: Path = RECORD) -> None:
    """Record, or compare and leave with status 1 where something is worse."""
    if keep:
        record(subject, {row: ratio for row, ratio in ratios.items() if ratio == ratio}, path)
        print(f"\nrecorded in {path}")
    elif subject not in read(path):
        print(f"\nnothing recorded for: {subject} (--record keeps these ratios)")
    elif lines := worse(subject, ratios, path):
        raise SystemExit("\n" + "\n".join(lines))
    else:
        print(f"\nno ratio is worse than recorded by more than {SLACK:.0%}")


def read(path: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    return found
