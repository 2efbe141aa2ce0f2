"""Parsers of the published lists of common data sets. Each turns a list into rows, which are checked afterwards.

There is one function per format, in ``PARSERS``. It interprets the lines and reports malformed ones. The checks that
all formats share (paths, duplicates, labels, filters, missing files) are in ``posmlp.video.manifest``.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, NoReturn

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from posmlp import storage
from posmlp.video.classes import NUMBER, ClassIndex, KnownClasses, clean_name, number_or_name, whole
from posmlp.video.image_series import PICTURE_SUFFIXES

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (
    *(".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogg"),
    *(".ogv", ".ts", ".webm", ".wmv"),
)
QUOTED_NUMBER = rf"""{NUMBER}|"\s*{NUMBER}\s*"|'\s*{NUMBER}\s*'"""
PATH_AND_NUMBER = re.compile(rf"(.+?)(?:\s*,\s*|\s+)({QUOTED_NUMBER})")  # separated by the last blank or comma
NUMBER_AND_NAME = re.compile(rf"({QUOTED_NUMBER})\s*[\s,;]\s*(.+)")
NAME_AND_NUMBER = re.compile(rf"(.+?)\s*[,;\t]\s*({QUOTED_NUMBER})")
JSON = re.compile(r"""\s*(\{|\[\s*(["\[\]{0-9-]|$))""")  # not a name that begins with a bracket
FOLDER = "folder"  # stands for a column with the folder of each video
HMDB_FILE = re.compile(r"(.+)_test_split([0-9]+)\.txt")
HMDB_SUBSETS: dict[int | float | str, str] = {0: "unused", 1: "train", 2: "test"}
SPACE = re.compile(r"[ \t\r\n]*")
SPAN_COLUMNS = FIRST_FRAME, LAST_FRAME = "first_frame", "last_frame"  # of lists whose rows are parts of videos


class ListingRow(NamedTuple):
    """One video as written in a list, before any checks."""

    file: str
    line: int | None  # counted from 1; in a Parquet file the row, counted from 0; None: found in a folder
    path: str  # relative to the root, absolute, or a URI
    label: int | float | str  # a number, or the name of a class; a fraction is refused
    sample_id: str = ""  # empty: the path
    name: str | None = None  # the class, if the list has it in addition to a number
    frames: int | None = None  # images of a frame folder; None: count them
    values: tuple[str, ...] = ()  # one for each of ``Listing.columns``
    first: int | float | str | None = None  # of the frames that the row is of; None: from the start
    last: int | float | str | None = None  # None: to the end


@dataclass
class Listing:
    """The rows of a list and how to interpret them, as a parser returns them.

    Attributes:
        rows: every video, of all subsets in the list.
        folder: the folder that paths are relative to, unless a root is given.
        columns: the names of ``ListingRow.values``, which ``where`` filters by.
        classes: the name of each label; None: derive the classes from the rows.
        first_label: the smallest number that a label may have in this list.
        labels_typed: whether labels are stored as numbers, so that they are certainly not names.
        images: each path is a folder of images, whose names ``template`` gives.
        series: each path is a folder of images with any names and numbers.
        maybe_series: a path without the suffix of a video may be such a folder.
        span_names: what the list calls the first and the last frame.
        pictures: each path is one image.
        present: the videos are known to exist.
        others: returns other paths where a missing video may be, given its row.
    """

    rows: list[ListingRow]
    folder: str
    columns: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    first_label: int = 0
    labels_typed: bool = False
    images: bool = False
    series: bool = False
    maybe_series: bool = False
    span_names: tuple[str, str] = SPAN_COLUMNS
    pictures: bool = False
    present: bool = False
    others: Callable[[ListingRow], list[str]] | None = None


class Condition(NamedTuple):
    """What ``where`` asks of a column: one of some values, or with ``excluded`` none of them."""

    values: tuple[str, ...]
    excluded: bool = False

    @classmethod
    def read(cls, written: Any) -> Condition:
        """Read a condition as a recipe has it: a value, a list of values, or ``{"not": a value or a list}``."""
        excluded = isinstance(written, Mapping)
        values = written["not"] if excluded else written
        return cls(tuple(map(str, values)) if isinstance(values, list | tuple) else (str(values),), excluded)

    def holds(self, value: str) -> bool:
        """Return whether a row with this value is kept."""
        return (value in self.values) != self.excluded

    def describe(self, column: str) -> str:
        """The condition in words, as ``subject not 01``."""
        several = len(self.values) > 1
        relation = (" none of " if several else " not ") if self.excluded else " one of " if several else "="
        return f"{column}{relation}{', '.join(self.values)}"


@cache  # once per process: a list is read several times
def warn_once(text: str) -> None:
    """Log a warning about a list that can be used."""
    logger.warning("%s", text)


class StopReading(Exception):
    """Nothing more can be checked. The problems are in ``ManifestSource.problems``."""


@dataclass
class ManifestSource:
    """The arguments of ``read_manifest``, and the problems found so far as (file, line or None, text)."""

    path: str
    where: Mapping[str, Condition]
    root: str | None
    classes: str | None
    template: str
    format: str
    missing_ok: bool = False
    known: KnownClasses | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    problems: list[tuple[str, int | None, str]] = field(default_factory=list)

    def problem(self, file: str, line: int | None, text: str) -> None:
        """Record a problem and continue."""
        self.problems.append((file, line, text))

    def missing_columns(self, file: str, line: int | None, names: Sequence[str]) -> None:
        """Record the columns to keep that are missing from those of a file."""
        found = f"columns are {', '.join(names)}" if names else "this list has no columns"
        for column, key in self.columns.items():
            if key and column != FOLDER and column not in names:
                self.problem(file, line, f"no column {column!r} ({key}); {found}; `{FOLDER}` is each video's folder")

    def stop(self, file: str, line: int | None, text: str) -> NoReturn:
        """Record a problem and raise StopReading."""
        self.problem(file, line, text)
        raise StopReading

    def stop_if_bad(self) -> None:
        """Raise StopReading if any problem was recorded."""
        if self.problems:
            raise StopReading

    @contextmanager
    def reading(self, uri: str) -> Iterator[None]:
        """Turn errors of a disk or an object store in the block into a problem of ``uri``."""
        try:
            yield
        except (OSError, ValueError, pa.ArrowException) as error:
            self.stop(uri, None, f"cannot be read ({error}); check the name, the permissions and the connection")


# Files ----------------------------------------------------------------------------------------------------------------


def path_kind(source: ManifestSource, uri: str) -> str:
    """Return ``"file"``, ``"folder"``, or ``""`` if there is neither."""
    with source.reading(uri):
        system, path = storage.resolve(uri)
        found = system.get_file_info(path).type
    return {pafs.FileType.File: "file", pafs.FileType.Directory: "folder"}.get(found, "")


def require_kind(source: ManifestSource, uri: str, wanted: str, expected: str) -> None:
    """Stop unless ``uri`` is of the wanted kind, ``"file"`` or ``"folder"``."""
    found = path_kind(source, uri)
    if not found:
        source.stop(uri, None, f"no such {wanted}; expected {expected}")
    if found != wanted:
        source.stop(uri, None, f"is a {found}; expected a {wanted}: {expected}")


def read_text(source: ManifestSource, uri: str, expected: str) -> str:
    """Read a text file, without a byte order mark."""
    require_kind(source, uri, "file", expected)
    with source.reading(uri):
        content = storage.read_bytes(uri)
    try:
        text = content.decode("utf-8-sig")
        bad = content.find(b"\0")
    except UnicodeDecodeError as error:
        bad = error.start
    if bad >= 0:
        line = content.count(b"\n", 0, bad) + 1
        source.stop(uri, line, f"not UTF-8 text; expected {expected}, saved as UTF-8")
    return text


def read_lines(source: ManifestSource, uri: str, expected: str) -> list[tuple[int, str]]:
    """Read the lines that are not blank, with their numbers."""
    text = read_text(source, uri, expected)
    lines = [(number, line) for number, raw in enumerate(text.split("\n"), 1) if (line := raw.strip())]
    if not lines:
        source.stop(uri, 1, f"the file is empty; expected {expected}")
    return lines


def clean_path(text: str) -> str:
    """A path in a line of text, without quotes around it."""
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


def file_names(source: ManifestSource, folder: str) -> list[str]:
    """The sorted names of the files in a folder, without its subfolders."""
    with source.reading(folder):
        if not storage.is_remote(folder):
            return sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
        system, path = storage.resolve(folder)
        infos = system.get_file_info(pafs.FileSelector(path))
    return sorted(info.base_name for info in infos if info.type == pafs.FileType.File)


# Class names ----------------------------------------------------------------------------------------------------------


def class_names(source: ManifestSource, first: int = 0) -> tuple[str, ...] | None:
    """Read the class names in the file ``source.classes``; None if it is not given.

    The file has one name per line, or ``id name`` or ``name,id`` lines (with an optional header), or JSON: a list of
    names, or an object ``{"name": "id"}`` or ``{"id": "name"}``. The ids count from ``first`` without gaps.
    """
    uri = source.classes
    if uri is None:
        return None
    text = read_text(source, uri, "a list of class names")
    numbered = _json_names(source, uri, text) if JSON.match(text) else _line_names(source, uri, text)
    names: dict[int, str] = {}
    seen: set[str] = set()
    for line, given, text in numbered:
        name, number = clean_name(text), first + len(names) if given is None else given
        if isinstance(number, float):
            text = (
                f"id {number:g} of class {name!r} is not a whole number; number the classes {first}, {first + 1}, ..."
            )
            source.problem(uri, line, text)
            continue
        if number in names:
            source.problem(uri, line, f"id {number} is class {name!r} here, but {names[number]!r} above")
        elif name in seen:
            source.problem(uri, line, f"class {name!r} is listed twice; every class needs its own name")
        names.setdefault(number, name)
        seen.add(name)
    source.stop_if_bad()
    if not names:
        source.stop(uri, 1, "the file is empty; expected a list of class names")
    gap = next((i for i in range(first, first + len(names)) if i not in names), None)
    if gap is not None:
        text = f"no class has id {gap}; number the {len(names)} classes {first}, {first + 1}, ..."
        source.problem(uri, None, text)
    source.stop_if_bad()
    return tuple(names[number] for number in sorted(names))


NumberedNames = list[tuple[int | None, int | float | None, str]]  # line, id and name of each class


def _id(text: str) -> int | float:
    """The number in a text that is one."""
    number = number_or_name(text)
    assert not isinstance(number, str)
    return number


def _line_names(source: ManifestSource, uri: str, text: str) -> NumberedNames:
    lines = [(number, line) for number, raw in enumerate(text.split("\n"), 1) if (line := raw.strip())]
    first = [NUMBER_AND_NAME.fullmatch(line) for _, line in lines]
    last = [NAME_AND_NUMBER.fullmatch(line) for _, line in lines]
    id_first = sum(map(bool, first)) >= sum(map(bool, last))
    matches, name, number = (first, 2, 1) if id_first else (last, 1, 2)
    if sum(map(bool, matches)) * 2 < len(lines):
        return [(line, None, written) for line, written in lines]
    found: NumberedNames = []
    for (line_number, written), match in zip(lines, matches, strict=True):
        if match:
            found.append((line_number, _id(match[number]), match[name]))
        elif line_number != lines[0][0] or not re.search("[,;]", written):  # a header
            source.problem(uri, line_number, f"{written!r} has no id, as other classes here have; expected id and name")
    return found


def _json_names(source: ManifestSource, uri: str, text: str) -> NumberedNames:
    data = _parse_json(source, uri, text)
    if isinstance(data, list) and all(isinstance(name, str) for name in data):
        return [(None, None, name) for name in data]
    if isinstance(data, dict):
        for pairs in ([*data.items()], [(name, number) for number, name in data.items()]):
            found: NumberedNames = [
                (None, number, name)
                for name, value in pairs
                if isinstance(name, str) and not isinstance(number := number_or_name(str(value)), str)
            ]
            if len(found) == len(pairs):
                return found
    source.stop(uri, 1, 'expected a JSON object {"class": "id", ...} or a list of class names')


def _parse_json(source: ManifestSource, uri: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        _stop_at_json_error(source, uri, error)
    except RecursionError:
        source.stop(uri, 1, "the JSON is nested too deeply for a list of classes")


def _stop_at_json_error(source: ManifestSource, uri: str, error: json.JSONDecodeError) -> NoReturn:
    source.stop(uri, error.lineno, f"malformed JSON in column {error.colno} ({error.msg}); download the file again")


# csv ------------------------------------------------------------------------------------------------------------------


def _csv(source: ManifestSource) -> Listing:
    """``path,label``, optionally ``class``, ``first_frame`` and ``last_frame``, and any columns to filter by.

    A path may be a folder of numbered images. The first and the last frame are the numbers of images, or frames of a
    video file counted from 0.
    """
    text = read_text(source, source.path, "a CSV file")
    header, lines = _csv_table(source, text, ("path", "label"))
    path, label = header.index("path"), header.index("label")
    name, first, last = (header.index(c) if c in header else None for c in ("class", FIRST_FRAME, LAST_FRAME))
    rows = [
        ListingRow(
            source.path,
            line,
            cells[path],
            number_or_name(cells[label]),
            name=None if name is None else clean_name(cells[name]),
            values=cells,
            first=None if first is None or not cells[first] else number_or_name(cells[first]),
            last=None if last is None or not cells[last] else number_or_name(cells[last]),
        )
        for line, cells in lines
    ]
    return Listing(rows, storage.parent(source.path), header, class_names(source), maybe_series=True)


def _csv_table(
    source: ManifestSource, text: str, needed: tuple[str, ...]
) -> tuple[tuple[str, ...], list[tuple[int, tuple[str, ...]]]]:
    """Header and numbered rows of a CSV file. Stops if the header is unusable, because then no row can be checked."""
    header: tuple[str, ...] = ()
    rows: list[tuple[int, tuple[str, ...]]] = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line, file = 1, source.path
    try:
        for raw in reader:
            cells = tuple(cell.strip() for cell in raw)
            if not any(cells):
                pass
            elif not header:
                header = cells
                _check_header(source, line, header, needed)
            elif len(cells) == len(header):
                rows.append((line, cells))
            else:
                source.problem(
                    file,
                    line,
                    f"{len(cells)} values, but the header has {len(header)}; quote values with commas",
                )
            line = reader.line_num + 1  # where the next row starts: a quoted value may span lines
    except csv.Error as error:
        source.problem(file, line, f"malformed CSV ({error}); check the quotes")
    if not header:
        source.problem(file, line, f"no header; the first line must name the columns, {','.join(needed)} at least")
    elif not rows and not source.problems:
        source.problem(file, line, "no rows; expected one line per video below the header")
    if not rows:
        raise StopReading
    return header, rows


def _check_header(source: ManifestSource, line: int, header: tuple[str, ...], needed: tuple[str, ...]) -> None:
    missing = [name for name in needed if name not in header]
    if missing:
        found = ",".join(header)
        found = found if len(found) <= 80 else found[:80] + "..."
        text = f"no column {' and no column '.join(missing)}; expected the header {','.join(needed)}, found {found}"
        hint = "; for another kind of list set `format`" if source.format == "auto" else ""
        source.problem(source.path, line, text + hint)
    for name in sorted({name for name in header if header.count(name) > 1}):
        source.problem(source.path, line, f"column {name!r} appears twice; rename or remove one")
    source.stop_if_bad()


# folder ---------------------------------------------------------------------------------------------------------------


def _folder(source: ManifestSource) -> Listing:
    """A tree ``class/**/video``, or ``class/**/image`` for format images. Other and hidden files are ignored."""
    root = source.path
    require_kind(source, root, "folder", "a class-per-folder tree of videos")
    with source.reading(root):
        classes, strays = _remote_tree(root) if storage.is_remote(root) else _local_tree(root)
    pictures = source.format == "images" or (source.format == "auto" and _holds_images(classes))
    what, suffixes = ("image", PICTURE_SUFFIXES) if pictures else ("video", VIDEO_SUFFIXES)
    short = root.rstrip("/").rpartition("/")[2]
    for stray in strays:
        if _has_suffix(stray, suffixes):
            source.problem(storage.join(root, stray), None, f"is not in a class folder; move it to {short}/<class>/")
    if not classes:
        parquet = any(_is_parquet(stray) for stray in strays)
        hint = "; for Parquet files set `format: parquet`" if parquet else ""
        source.problem(root, None, f"has no class folders; expected {short}/<class>/<{what}>{hint}")
    rows = []
    for name in sorted(classes):
        files = sorted(path for path in classes[name] if _has_suffix(path, suffixes))
        if not files and not (source.classes or source.known):  # otherwise a class may have no videos
            other = not pictures and any(_has_suffix(path, PICTURE_SUFFIXES) for path in classes[name])
            hint = "; if each picture is a sample, set `format: images`" if other else ""
            text = f"holds no {what}s ({' '.join(suffixes)}); add some, remove it, or name all classes in a file "
            source.problem(storage.join(root, name), None, f"{text}(`data.classes`){hint}")
        rows += [ListingRow(storage.join(root, name), None, path, name) for path in files]
    if classes and not rows and not source.problems:
        source.problem(root, None, f"holds no {what}s ({' '.join(suffixes)}); expected {short}/<class>/<{what}>")
    return Listing(rows, root, classes=class_names(source), present=True, pictures=pictures)


def _holds_images(classes: Mapping[str, list[str]]) -> bool:
    """Return whether a tree certainly holds images: no videos, and no pictures deeper down, which may be frames."""
    files = [path for paths in classes.values() for path in paths]
    found = [path for path in files if _has_suffix(path, PICTURE_SUFFIXES)]
    return bool(found) and all(path.count("/") == 1 for path in found) and not any(map(_is_video, files))


def _local_tree(root: str) -> tuple[dict[str, list[str]], list[str]]:
    """The files below each subfolder, relative to the root, and the files directly in the root; without hidden ones."""
    with os.scandir(root) as entries:
        shown = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    classes: dict[str, list[str]] = {}
    for entry in shown:
        if entry.is_dir():
            classes[entry.name] = list(_files_below(entry.path, entry.name, (os.path.realpath(root),)))
    return classes, [entry.name for entry in shown if entry.is_file()]


def _files_below(folder: str, name: str, around: tuple[str, ...]) -> Iterator[str]:
    """The files in a folder and below it, without hidden folders. Links are followed, except back to where they are.

    Args:
        name: the folder's path relative to the root, which begins each result.
        around: the real paths of the folders around it.
    """
    real = os.path.realpath(folder)
    if real in around:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                yield f"{name}/{entry.name}"
            elif not entry.name.startswith("."):
                yield from _files_below(entry.path, f"{name}/{entry.name}", (*around, real))


def _remote_tree(root: str) -> tuple[dict[str, list[str]], list[str]]:
    system, base = storage.resolve(root)
    classes: dict[str, list[str]] = {}
    strays = []
    for info in system.get_file_info(pafs.FileSelector(base, recursive=True)):
        path = info.path.removeprefix(base).strip("/")
        name, slash, _ = path.partition("/")
        if path.startswith(".") or "/." in path:
            continue
        if info.type == pafs.FileType.Directory:
            classes.setdefault(name, [])
        elif slash:
            classes.setdefault(name, []).append(path)
        else:
            strays.append(path)
    return classes, sorted(strays)


def _has_suffix(path: str, suffixes: tuple[str, ...]) -> bool:
    """Return whether a file has one of the suffixes and is not hidden."""
    name = path.rpartition("/")[2]
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes


def _is_video(path: str) -> bool:
    return _has_suffix(path, VIDEO_SUFFIXES)


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")


# images ---------------------------------------------------------------------------------------------------------------


def _images(source: ManifestSource) -> Listing:
    """Images in place of videos: a tree ``class/**/image`` (ImageNet), Parquet files, or a CSV file."""
    if path_kind(source, source.path) == "folder":
        inline = any(map(_is_parquet, file_names(source, source.path)))
        parser = _parquet if inline else _folder
    else:
        parser = _parquet if _is_parquet(storage.OPTIONS.split(source.path)[0]) else _csv
    listing = parser(source)
    listing.pictures = True
    return listing


# parquet --------------------------------------------------------------------------------------------------------------


def _parquet(source: ManifestSource) -> Listing:
    """A Parquet file, or all Parquet files of a folder.

    Columns: ``uri`` (or ``path``), or the video's bytes in ``data``, which are not read here and take precedence over
    ``uri``; ``label``, a whole number (also in a column of floats) or a name; optionally ``class``, ``sample_id`` and
    others to filter by. Key ``classes`` of the schema's metadata, a JSON list, names the classes and takes precedence
    over column ``class``.
    """
    path, is_folder = source.path, path_kind(source, source.path) == "folder"
    if is_folder:
        files = [storage.join(path, name) for name in file_names(source, path) if _is_parquet(name)]
        if not files:
            source.stop(path, None, "holds no .parquet files; expected a Parquet file or a folder of them")
    else:
        require_kind(source, path, "file", "a Parquet file or a folder of them")
        files = [path]
    rows: list[ListingRow] = []
    columns = tuple(dict.fromkeys([*source.where, *(name for name in source.columns if name != FOLDER)]))
    named: dict[tuple[str, ...], str] = {}
    inline, typed = [], []
    for file in files:
        with source.reading(file):
            system, place = storage.resolve(file)
            with system.open_input_file(place) as handle, pq.ParquetFile(handle) as table:
                schema = table.schema_arrow
                inline.append(storage.BYTES_COLUMN in schema.names)
                if _check_columns(source, file, schema):
                    typed.append(not _is_text(schema.field("label").type))
                    rows += _parquet_rows(source, file, table, columns)
                    for names in _metadata_names(source, file, schema.metadata or {}):
                        named.setdefault(names, file)
    if len(named) > 1:
        first, second = list(named.values())[:2]
        source.problem(second, None, f"names other classes in its metadata than {first} does; use one list of classes")
    if not rows:
        if not source.problems:
            source.problem(path, None, "has no rows; expected one row per video")
        raise StopReading
    classes = class_names(source) or next(iter(named), None)
    if classes and not source.classes:
        rows = [row._replace(name=None) for row in rows] if rows[0].name is not None else rows
    folder = path if is_folder else storage.parent(path)
    return Listing(rows, folder, columns, classes, labels_typed=all(typed), present=all(inline))


def _check_columns(source: ManifestSource, file: str, schema: pa.Schema) -> bool:
    """Check names and types of the columns. Returns whether the rows can be read."""
    before = len(source.problems)
    names = schema.names
    found = ", ".join(names[:20])
    if not {"uri", "path", storage.BYTES_COLUMN} & set(names):
        source.problem(file, None, f"no column uri, path or data; expected one of them, found {found}")
    if "label" not in names:
        source.problem(file, None, f"no column label; expected it, found {found}")
    for name in sorted({name for name in names if names.count(name) > 1}):
        source.problem(file, None, f"column {name!r} appears twice; rename or remove one")
    allowed = {"uri": _is_text, "path": _is_text, "class": _is_text, "sample_id": lambda t: _is_text(t) or _is_int(t)}
    allowed |= {
        FIRST_FRAME: _is_int,
        LAST_FRAME: _is_int,
        "label": lambda type: _is_number(type) or _is_text(type),
        storage.BYTES_COLUMN: _is_bytes,
    }
    for name, test in allowed.items():
        if names.count(name) == 1 and not test(type := schema.field(name).type):
            wanted = {"label": "whole numbers or strings", storage.BYTES_COLUMN: "binary"}.get(name, "strings")
            wanted = "whole numbers" if name in SPAN_COLUMNS else wanted
            source.problem(file, None, f"column {name} has type {type}; expected {wanted}")
    if storage.BYTES_COLUMN in names and not storage.parquet_row(f"{file}#0"):
        text = "inline videos need a file name that ends in .parquet, without options after it; rename the file, or"
        source.problem(file, None, f"{text} give the options in the environment (AWS_ENDPOINT_URL, ...)")
    for column in source.where:
        if column not in names or column == storage.BYTES_COLUMN:
            columns = ", ".join(name for name in names if name != storage.BYTES_COLUMN)
            source.problem(file, None, f"no column {column!r} to filter by (`where`); columns are {columns}")
    source.missing_columns(file, None, [name for name in names if name != storage.BYTES_COLUMN])
    return len(source.problems) == before


def _is_text(type: pa.DataType) -> bool:
    value = type.value_type if pa.types.is_dictionary(type) else type
    return pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)


def _is_int(type: pa.DataType) -> bool:
    return pa.types.is_integer(type)


def _is_number(type: pa.DataType) -> bool:
    return _is_int(type) or pa.types.is_floating(type) or pa.types.is_decimal(type)


def _is_bytes(type: pa.DataType) -> bool:
    return pa.types.is_binary(type) or pa.types.is_large_binary(type) or pa.types.is_binary_view(type)


def _parquet_rows(
    source: ManifestSource, file: str, table: pq.ParquetFile, columns: tuple[str, ...]
) -> Iterator[ListingRow]:
    schema = table.schema_arrow
    inline = storage.BYTES_COLUMN in schema.names
    path = None if inline else "uri" if "uri" in schema.names else "path"
    possible = (path, "label", "class", "sample_id", *SPAN_COLUMNS, *columns)
    needed = dict.fromkeys(name for name in possible if name in schema.names)
    data = table.read(columns=list(needed), use_threads=False)
    count = data.num_rows
    texts = {name: data[name].to_pylist() for name in needed}
    nothing = [None] * count
    wanted = {name: condition.values for name, condition in source.where.items()}
    values = [_texts(texts.get(name, nothing), wanted.get(name)) for name in columns]
    of_rows = list(zip(*values, strict=True)) or [()] * count
    if inline:
        _check_bytes(source, file, table.metadata)
    short = file.rpartition("/")[2]
    for row, (place, label, name, sample_id, value, first, last) in enumerate(
        zip(
            [f"{file}#{row}" for row in range(count)] if path is None else texts[path],
            texts["label"],
            texts.get("class", nothing),
            texts.get("sample_id", [f"{short}#{row}" for row in range(count)] if inline else nothing),
            of_rows,
            texts.get(FIRST_FRAME, nothing),
            texts.get(LAST_FRAME, nothing),
            strict=True,
        )
    ):
        name = "" if name is None and "class" in texts else name and clean_name(name)
        label = _stored_label(label)
        if sample_id is None and "sample_id" in texts:
            source.problem(file, row, "sample_id is null; give it, or leave out the column")
        sample_id = "" if sample_id is None else str(sample_id)
        yield ListingRow(file, row, place or "", label, sample_id, name, None, value, first, last)


def _stored_label(value: Any) -> int | float | str:
    """A label of a Parquet file: empty if it is null or not a number."""
    if isinstance(value, int):
        return value
    if isinstance(value, str):
        return number_or_name(value)
    return "" if value is None or value != value else whole(float(value))


def _texts(values: Sequence[Any], wanted: Sequence[str] | None) -> list[str]:
    """The values of a column as text; a number or a truth value that is a wanted one, as the recipe writes it.

    Args:
        wanted: None: whole numbers have no fraction, and null is empty.
    """
    if wanted is None:
        return ["" if value is None else str(whole(value) if isinstance(value, float) else value) for value in values]
    numbers = {number_or_name(text): text for text in reversed(wanted)}
    truths = {text.lower(): text for text in reversed(wanted)}

    def as_written(value: Any) -> str:
        if isinstance(value, bool):
            return truths.get(str(value).lower(), str(value))
        return numbers.get(value, str(value)) if isinstance(value, float) else str(value)

    return [as_written(value) for value in values]


def _check_bytes(source: ManifestSource, file: str, metadata: Any) -> None:
    """Report rows without a video, if the footer has statistics of nulls."""
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            statistics = column.statistics
            if column.path_in_schema == storage.BYTES_COLUMN and statistics and statistics.has_null_count:
                nulls = statistics.null_count
                if nulls:
                    source.problem(file, None, f"{nulls} rows of row group {group} have no data; leave them out")


def _metadata_names(source: ManifestSource, file: str, metadata: Mapping[bytes, bytes]) -> list[tuple[str, ...]]:
    if b"classes" not in metadata:
        return []
    try:
        names = json.loads(metadata[b"classes"])
    except ValueError:
        names = None
    if not (isinstance(names, list) and names and all(isinstance(name, str) and name for name in names)):
        source.problem(file, None, 'key "classes" of the schema\'s metadata must be a JSON list of names')
        return []
    if len(set(names)) < len(names):
        source.problem(file, None, 'key "classes" of the schema\'s metadata names a class twice')
    return [tuple(names)]


# kinetics -------------------------------------------------------------------------------------------------------------


def _kinetics(source: ManifestSource) -> Listing:
    """Kinetics-400, -600 and -700.

    The official CSV ``label,youtube_id,time_start,time_end,split[,is_cc]`` with header (Kay et al., arXiv:1705.06950;
    the files of the CVDF mirror): videos are ``<youtube_id>_<start:06d>_<end:06d>.mp4`` below the root, flat or in a
    folder with the label's name (blanks may be underscores). Or the lists of SlowFast and MMAction2: ``path label`` or
    ``path,label``, without header, labels from 0. If an .mp4 is missing, .mkv and .webm are tried.
    """
    expected = "a Kinetics list: the official CSV, or lines of path and label"
    lines = read_lines(source, source.path, expected)
    number, first = lines[0]
    folder, classes = storage.parent(source.path), class_names(source)
    if {"youtube_id", "time_start"} & {cell.strip() for cell in first.split(",")}:
        rows, header = _official_kinetics(source)
        return Listing(rows, folder, header, classes, others=_official_places)
    rows = []
    for number, line in lines:
        if match := PATH_AND_NUMBER.fullmatch(line):
            rows.append(ListingRow(source.path, number, clean_path(match[1]), number_or_name(match[2])))
        elif "," in line:
            path, _, name = line.rpartition(",")
            rows.append(ListingRow(source.path, number, clean_path(path), clean_name(name)))
        else:
            text = f"{_shorten(line)!r} has no label; expected `path label` or `path,label`"
            source.problem(source.path, number, text)
    return Listing(rows, folder, classes=classes, others=_other_suffixes)


def _official_kinetics(source: ManifestSource) -> tuple[list[ListingRow], tuple[str, ...]]:
    text = read_text(source, source.path, "a Kinetics list")
    needed = ("label", "youtube_id", "time_start", "time_end")
    header, lines = _csv_table(source, text, needed)
    label, video, start, end = (header.index(name) for name in needed)
    rows = []
    for line, cells in lines:
        try:
            times = int(float(cells[start])), int(float(cells[end]))
        except (ValueError, OverflowError):
            text = f"time_start {cells[start]!r} and time_end {cells[end]!r} must be seconds"
            source.problem(source.path, line, text)
            continue
        clip = f"{cells[video]}_{times[0]:06d}_{times[1]:06d}"
        path = f"{clip}.mp4" if cells[video] else ""
        rows.append(ListingRow(source.path, line, path, number_or_name(cells[label]), clip, values=cells))
    return rows, header


def _official_places(row: ListingRow) -> list[str]:
    name = str(row.label)
    flat = [row.path, f"{name}/{row.path}", f"{name.replace(' ', '_')}/{row.path}"]
    return [*flat[1:], *(path.removesuffix(".mp4") + suffix for suffix in (".mkv", ".webm") for path in flat)]


def _other_suffixes(row: ListingRow) -> list[str]:
    stem, suffix = os.path.splitext(row.path)
    return [stem + other for other in (".mkv", ".webm")] if suffix.lower() == ".mp4" else []


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else text[:80] + "..."


# Something-Something --------------------------------------------------------------------------------------------------


def _ssv1(source: ManifestSource) -> Listing:
    """Something-Something V1 (Goyal et al., arXiv:1706.04261), published as folders of JPEG images.

    The list has lines ``folder frames label``, as TSN and TSM write them, or the official ``id;label text``, whose
    images are counted. ``classes`` is something-something-v1-labels.csv, one name per line (TSM: category.txt). TSM's
    lists of other data sets that were extracted into images, V2 too, have the same format.
    """
    expected = "lines of `folder frames label`, or the official `id;label`"
    lines = read_lines(source, source.path, expected)
    file, rows = source.path, []
    if official := ";" in lines[0][1]:
        if source.classes is None:
            _need_classes(source, "something-something-v1-labels.csv, from the download page of Something-Something V1")
        if re.fullmatch(r"(video_?)?id;(label|template)", lines[0][1].lower()):
            lines = lines[1:]
    for number, line in lines:
        if official:
            folder, separator, text = (part.strip() for part in line.partition(";"))
            if separator and text:
                rows.append(ListingRow(file, number, clean_path(folder), number_or_name(text)))
                continue
        else:
            parts = line.rsplit(maxsplit=2)
            frames, label = map(number_or_name, parts[1:]) if len(parts) == 3 else ("", "")
            if isinstance(frames, int) and not isinstance(label, str):
                rows.append(ListingRow(file, number, clean_path(parts[0]), label, frames=frames))
                if frames < 1:
                    source.problem(file, number, f"{parts[1]} frames; a video has at least one")
                continue
        no_label = isinstance(number_or_name(line), int)
        hint = "; the test list has no labels, use the train or validation list" if no_label else ""
        source.problem(file, number, f"{_shorten(line)!r} is malformed; expected {expected}{hint}")
    return Listing(rows, storage.parent(file), classes=class_names(source), images=True)


def _ssv2(source: ManifestSource) -> Listing:
    """Something-Something V2 (Goyal et al., arXiv:1706.04261; something-something-v2-train.json or labels/train.json).

    A list of objects ``{"id", "label", "template", "placeholders"}``. The class is the template without brackets; its
    number is in ``classes``, something-something-v2-labels.json or labels/labels.json. Videos are ``<id>.webm``.
    """
    file = source.path
    text = read_text(source, file, "a JSON list of videos")
    if not text.strip():
        source.stop(file, 1, "the file is empty; expected a JSON list of videos")
    if source.classes is None:
        _need_classes(
            source,
            "something-something-v2-labels.json (labels.json of the label package), from the download page of "
            "Something-Something V2",
        )
    classes = class_names(source)
    rows, without = [], []
    for line, item in _json_items(source, text):
        sample = item.get("id") if isinstance(item, dict) else None
        sample = whole(sample) if isinstance(sample, float) else sample
        if not isinstance(sample, str | int) or isinstance(sample, bool) or not str(sample).strip():
            source.problem(file, line, 'expected an object with "id" and "template"')
        elif not isinstance(item.get("template"), str):
            without.append(line)
        else:
            sample, template = str(sample).strip(), item["template"]
            name = clean_name(template.replace("[", "").replace("]", ""))
            values = (sample, str(item.get("label", "")), template)
            rows.append(ListingRow(file, line, f"{sample}.webm", name, sample, values=values))
    if without and not rows:
        source.stop(
            file, without[0], "the videos have no template: the test list has no labels, use train or validation"
        )
    for line in without:
        source.problem(file, line, 'the video has no "template", which names its class')
    if not rows and not source.problems:
        source.problem(file, 1, "the list is empty; expected objects with id and template")
    columns = ("id", "label", "template")
    others: Callable[[ListingRow], list[str]] = lambda row: [row.path.removesuffix(".webm") + ".mp4"]  # noqa: E731
    return Listing(rows, storage.parent(file), columns, classes, others=others)


def _json_items(source: ManifestSource, text: str) -> Iterator[tuple[int, Any]]:
    """Yield the items of a JSON list, each with the line where it begins."""

    def skip(position: int) -> int:
        match = SPACE.match(text, position)
        return match.end() if match else position

    decode, position, line, counted = json.JSONDecoder().raw_decode, skip(0), 1, 0
    try:
        if text[position] != "[":
            source.stop(source.path, 1, "expected a JSON list of videos, [{...}, ...]")
        position = skip(position + 1)
        while text[position : position + 1] != "]":
            line, counted = line + text.count("\n", counted, position), position
            item, position = decode(text, position)
            yield line, item
            position = skip(position)
            if text[position : position + 1] == ",":
                position = skip(position + 1)
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        if skip(position + 1) < len(text):
            raise json.JSONDecodeError("Extra data", text, skip(position + 1))
    except json.JSONDecodeError as error:
        _stop_at_json_error(source, source.path, error)
    except RecursionError:
        source.stop(source.path, line, "the JSON is nested too deeply for a list of videos")


def _need_classes(source: ManifestSource, what: str) -> NoReturn:
    source.stop(source.path, None, f"format {source.format} needs the file of class names (`classes`): {what}")


# UCF101 and HMDB51 ----------------------------------------------------------------------------------------------------


def _ucf101(source: ManifestSource) -> Listing:
    """UCF101 (Soomro et al., arXiv:1212.0402; UCF101TrainTestSplits-RecognitionTask.zip).

    ``trainlist01.txt`` has ``class/video.avi label``, labels from 1. ``testlist01.txt`` has the path alone, whose
    folder is the class. ``classes`` is classInd.txt, with lines ``1 ApplyEyeMakeup``; by default the one next to the
    list is used.
    """
    file = source.path
    lines = read_lines(source, file, "lines of `class/video.avi label`")
    if source.classes is None:
        neighbour = storage.join(storage.parent(file), "classInd.txt")
        source.classes = neighbour if path_kind(source, neighbour) == "file" else None
    classes = class_names(source, first=1)
    index = None if classes is None else ClassIndex(classes)
    rows = []
    for number, line in lines:
        match = PATH_AND_NUMBER.fullmatch(line)
        path = clean_path(match[1] if match else line)
        slashed = path if "/" in path else path.replace("\\", "/")
        folder = slashed.rpartition("/")[0].rpartition("/")[2]
        if match:
            name = folder if folder and (index is None or index.get(folder) >= 0) else None
            rows.append(ListingRow(file, number, path, number_or_name(match[2]), name=name))
        elif folder:
            rows.append(ListingRow(file, number, path, folder))
        else:
            source.problem(file, number, f"{_shorten(line)!r} has neither label nor folder; expected class/video.avi")
    if classes is None:
        if any(isinstance(row.label, str) for row in rows):  # ids of classInd.txt do not follow sorted names
            _need_classes(source, "classInd.txt, from UCF101TrainTestSplits-RecognitionTask.zip, next to the list")
        rows = rows if all(row.name for row in rows) else [row._replace(name=None) for row in rows]
    return Listing(rows, storage.parent(file), classes=classes, first_label=1)


def _hmdb51(source: ManifestSource) -> Listing:
    """HMDB51 (Kuehne et al., ICCV 2011; test_train_splits.rar).

    A folder of ``<class>_test_split<k>.txt`` with lines ``video.avi 1``: 1 is for training, 2 for testing, 0 unused.
    ``where`` chooses ``split`` (1, 2, 3) and ``subset`` (train, test). Videos are ``<class>/video.avi``.
    """
    folder = source.path
    require_kind(source, folder, "folder", "HMDB51's test_train_splits, with <class>_test_split<k>.txt")
    files = [(match, name) for name in file_names(source, folder) if (match := HMDB_FILE.fullmatch(name))]
    if not files:
        source.stop(folder, None, "holds no <class>_test_split<k>.txt; expected HMDB51's test_train_splits")
    splits = sorted({match[2] for match, _ in files})
    nothing = Condition(())
    split_wanted, subset_wanted = (source.where.get(column, nothing) for column in ("split", "subset"))
    if split_wanted not in [Condition((split,)) for split in splits]:
        source.problem(folder, None, f"needs `where.split`, one of {', '.join(splits)}")
    if subset_wanted not in (Condition(("train",)), Condition(("test",))):
        source.problem(folder, None, "needs `where.subset`, train or test")
    source.stop_if_bad()
    rows, (split,) = [], split_wanted.values
    for match, name in files:
        if match[2] != split:
            continue
        file = storage.join(folder, name)
        for number, line in read_lines(source, file, "lines of `video.avi 1`"):
            entry = PATH_AND_NUMBER.fullmatch(line)
            subset = HMDB_SUBSETS.get(number_or_name(entry[2])) if entry else None
            if not entry or not subset:
                source.problem(file, number, f"{_shorten(line)!r} is malformed; expected `video.avi 1`, with 0, 1 or 2")
                continue
            path = f"{match[1]}/{clean_path(entry[1])}"
            rows.append(ListingRow(file, number, path, match[1], values=(split, subset)))
    return Listing(rows, folder, ("split", "subset"), class_names(source))


PARSERS: dict[str, Callable[[ManifestSource], Listing]] = {
    "csv": _csv,
    "folder": _folder,
    "images": _images,
    "parquet": _parquet,
    "kinetics": _kinetics,
    "ssv1": _ssv1,
    "ssv2": _ssv2,
    "ucf101": _ucf101,
    "hmdb51": _hmdb51,
}
