"""Numbers and text for people."""

from __future__ import annotations


def quantity(number: float, noun: str) -> str:
    """Format a number with its noun, as ``1 GPU``, ``4 GPUs`` or ``no GPU``."""
    return f"no {noun}" if number == 0 else f"{number:g} {noun}{'' if number == 1 else 's'}"


def shorten(text: str, length: int) -> str:
    """Cut a text to at most ``length`` characters, the last three of which are "..." if it was longer."""
    text = str(text)
    return text if len(text) <= length else text[: length - 3] + "..."
