"""The numbered images of a frame folder: their names, their numbers, and which of them are missing.

Data sets name their frames ``img46.jpg``, ``reg_img46.jpg``, ``006_05562.jpg`` or ``image17581039.jpg``: any text, a
number with or without leading zeros, and a suffix. The numbers start anywhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PICTURE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
TEXT = r"((?:[^{}/]|\{\{|\}\})*)"  # of a template, in which a brace is doubled
TEMPLATE = re.compile(TEXT + r"\{0?(?::0?[0-9]*d?)?\}" + TEXT)  # one number, as in img_{:05d}.jpg
NUMBERED = re.compile(r"(.*?)([0-9]{1,18})([^0-9]*)")  # the last number of a name; of a longer one, its last digits


@dataclass(frozen=True)
class ImageSeries:
    """Images of a folder whose names differ in one number.

    Attributes:
        before, after: the text around the number.
        digits: the number is padded with zeros to this many digits; 0: it is not padded.
        numbers: of the images, increasing.
        strays: names with a number of this series that are written otherwise than the template, such as ``img07.jpg``
            next to ``img7.jpg``.
    """

    before: str
    after: str
    digits: int
    numbers: tuple[int, ...]
    strays: tuple[str, ...] = ()

    @property
    def template(self) -> str:
        """The names of the images, as ``data.template``; a brace in them is doubled."""
        number = f"{{:0{self.digits}d}}" if self.digits else "{}"
        return escape_braces(self.before) + number + escape_braces(self.after)

    def name(self, number: int) -> str:
        """The name of an image."""
        return self.template.format(number)

    def missing(self, first: int, last: int) -> int | None:
        """The first number from ``first`` to ``last`` without an image; None if there is none."""
        present = set(self.numbers)
        return next((number for number in range(first, last + 1) if number not in present), None)


def find_series(names: Iterable[str]) -> list[ImageSeries]:
    """Find the series of images among the names of a folder's files, sorted by the text before the number.

    Hidden files, other files and images without a number are ignored.
    """
    found: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name in names:
        if name.startswith(".") or os.path.splitext(name)[1].lower() not in PICTURE_SUFFIXES:
            continue
        if match := NUMBERED.fullmatch(name):
            found.setdefault((match[1], match[3]), []).append((int(match[2]), match[2]))
    return [_series(before, after, sorted(numbers)) for (before, after), numbers in sorted(found.items())]


def _series(before: str, after: str, numbers: list[tuple[int, str]]) -> ImageSeries:
    padded = [len(text) for _, text in numbers if text.startswith("0") and len(text) > 1]
    digits = max(padded, default=0)
    series = ImageSeries(before, after, digits, ())
    own = [(number, f"{before}{text}{after}") for number, text in numbers]
    good = [number for number, name in own if series.name(number) == name]
    strays = tuple(name for number, name in own if series.name(number) != name)
    return ImageSeries(before, after, digits, tuple(good), strays)


def choose_series(found: Sequence[ImageSeries], template: str) -> ImageSeries | str:
    """The series of a folder's images: the only one, or of several the one whose names are those of ``template``.

    Returns:
        The series, or why there is none, to be followed by the folder's name.
    """
    chosen = list(found)
    if len(found) > 1 and (match := TEMPLATE.fullmatch(template)):
        around = match[1].format(), match[2].format()
        chosen = [each for each in found if (each.before, each.after) == around]
    if len(chosen) == 1:
        return chosen[0]
    if not found:
        return f"no numbered images ({' '.join(PICTURE_SUFFIXES)}), such as img1.jpg, img2.jpg, ...,"
    several = ", ".join(f"{each.template} ({len(each.numbers)})" for each in found[:5]) + ", ..." * (len(found) > 5)
    return f"{len(found)} series of images, {several}, of which `template` names none,"


def escape_braces(name: str) -> str:
    """Double the braces of a name that becomes a part of a template."""
    return name.replace("{", "{{").replace("}", "}}")
