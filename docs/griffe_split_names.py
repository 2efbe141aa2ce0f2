"""Extension of Griffe, which reads the docstrings for the API reference: ``a, b: text`` becomes one entry per name.

mkdocs.yml loads it (``extensions``). Without it, a section entry that describes several arguments has no valid name.
"""

import re

import griffe

ENTRY = re.compile(r"^    (\w+(?:, \w+)+): (.*(?:\n {5,}.*)*)", re.MULTILINE)  # an indented entry and its continuation


def split_entry(entry: re.Match[str]) -> str:
    """Return the entry once for each of its names."""
    return "\n".join(f"    {name}: {entry[2]}" for name in entry[1].split(", "))


class SplitNames(griffe.Extension):
    """Splits the entries of every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = ENTRY.sub(split_entry, obj.docstring.value)
