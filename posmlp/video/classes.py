"""Labels and class names in lists and recipes: which text is a number, and which names are the same class."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?"
LARGEST_EXACT = 2**53  # from here on, not every whole number is a float
NAMES_SHOWN = 5  # in a message


@lru_cache(maxsize=1 << 16)
def clean_name(text: str) -> str:
    """A name without blanks and one pair of quotes around it."""
    text = text.strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


@lru_cache(maxsize=1 << 16)
def same_name(name: str) -> str:
    """What two spellings of a class name have in common.

    Without quotes, the brackets of Something-Something's templates, repeated blanks, and the difference between an
    accented letter in one and in two characters (file names on macOS).
    """
    name = unicodedata.normalize("NFC", clean_name(name)).replace("[", "").replace("]", "")
    return " ".join(name.split())


@lru_cache(maxsize=1 << 16)
def number_or_name(text: str) -> int | float | str:
    """The number that a text is, otherwise the name without quotes. ``3``, ``"3"``, ``+3``, ``003``, ``3.0`` are 3."""
    text = clean_name(text)
    return whole(float(text)) if re.fullmatch(NUMBER, text) else text


def whole(value: float) -> int | float:
    """A whole number as an integer; a fraction, infinity, or a number too large to be exact, unchanged."""
    return int(value) if abs(value) < LARGEST_EXACT and value == int(value) else value


def in_order(names: Iterable[str]) -> list[str]:
    """Class names in the order of their labels: sorted, by number if all are whole numbers, so that 2 precedes 10."""
    numbers = {name: number_or_name(name) for name in names}
    if all(isinstance(number, int) for number in numbers.values()):
        return sorted(numbers, key=lambda name: (numbers[name], name))
    return sorted(numbers)


class ClassIndex:
    """The label of each class, by any spelling of its name (``same_name``)."""

    def __init__(self, names: Sequence[str]):
        self.exact = {name: label for label, name in enumerate(names)}
        self.similar: dict[str, int] = {}
        for label, name in enumerate(names):  # spellings that stand for two classes stand for none
            self.similar[same_name(name)] = -1 if same_name(name) in self.similar else label

    def get(self, name: str) -> int:
        """The label of a class; -1 if there is no such class."""
        label = self.exact.get(name)
        return self.similar.get(same_name(name), -1) if label is None else label


@dataclass(frozen=True)
class KnownClasses:
    """The classes that the labels of a list refer to.

    Attributes:
        names: the name of each label.
        source: where they are from, for messages, such as ``the training list train.csv``.
        advice: what to do with a list that has other classes.
    """

    names: tuple[str, ...]
    source: str
    advice: str


def list_names(names: Sequence[str]) -> str:
    """The first five names, and the number of the others."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(map(repr, names[:NAMES_SHOWN])) + more
