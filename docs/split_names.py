"""Griffe extension of the documentation site: reads ``a, b: text`` in a docstring section as an entry per name."""

import re

import griffe

ENTRY = re.compile(r"^    (\w+(?:, \w+)+): (.*(?:\n {5,}.*)*)", re.MULTILINE)  # an indented line, and what continues it


def split(entry: re.Match[str]) -> str:
    return "\n".join(f"    {name}: {entry[2]}" for name in entry[1].split(", "))


class SplitNames(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = ENTRY.sub(split, obj.docstring.value)
