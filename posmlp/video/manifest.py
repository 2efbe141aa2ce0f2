"""Manifests: checked rows and class names of a split, from a list in any of the common formats.

``posmlp.video.formats`` parses the lines of each format. The checks here are the same for all formats. Lists and videos
may be local or in an object store (``posmlp.storage``).
"""

import contextlib
import difflib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from posmlp import storage
from posmlp.config import DataSection, SplitSection, WeightedSplitSection
from posmlp.errors import UserError
from posmlp.video import formats, micro_expressions
from posmlp.video.classes import ClassIndex, KnownClasses, in_order, list_names, same_name
from posmlp.video.draws import WEIGHT
from posmlp.video.formats import (
    FOLDER,
    SPAN_COLUMNS,
    VIDEO_SUFFIXES,
    Condition,
    Listing,
    ListingRow,
    ManifestSource,
    StopReading,
    class_names,
    path_kind,
    warn_once,
)
from posmlp.video.holdout import choose_held_out
from posmlp.video.image_series import TEMPLATE, choose_series, escape_braces, find_series

__all__ = ["SCHEMA", "VIDEO_SUFFIXES", "Manifest", "ManifestError", "read_manifest", "read_split"]

PARSERS = formats.PARSERS | micro_expressions.PARSERS
MANIFEST_FORMATS = ("auto", *PARSERS)
SCHEMA = pa.schema(
    [("sample_id", pa.string()), ("uri", pa.string()), ("label", pa.int32()), ("frames", pa.int32())],
)
LISTED = "list."  # prefix of a row's columns that are kept from the list
MAX_PROBLEMS_SHOWN = 20  # in a message
MAX_NUMBER = 2**31 - 1  # of a frame
DRIVE = re.compile(r"[A-Za-z]:/")


@dataclass(frozen=True)
class Manifest:
    """One split of a data set.

    Attributes:
        rows: columns ``sample_id: string`` (unique), ``uri: string`` (absolute path or URI), ``label: int32`` and
            ``frames: int32``. For a video file ``frames`` is null. For a frame folder the ``uri`` ends in the template
            of its images' names, such as ``/videos/12345/{:05d}.jpg``, and ``frames`` is the number of images. A single
            image is such a template without a number (a brace in its name is doubled), with 1 frame. Rows that are
            parts of videos have also ``first_frame: int32`` and ``last_frame: int32``, both included: for a frame
            folder the numbers of the first and the last image, for a video file frames counted from 0 (null: its start
            or its end). Without these columns, images count from 1.
        classes: the name of each label, for the whole data set and not only for ``rows``.
        root: the folder that holds all videos.
    """

    rows: pa.Table
    classes: tuple[str, ...]
    root: str = ""


class ManifestError(UserError):
    """A manifest that cannot be used. The message has the number of problems and lists the first ones.

    Attributes:
        problems: all problems, one line each, with file and line number.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        count = len(self.problems)
        lines = [f"{count} problem{'s' * (count > 1)} in the manifest:", *self.problems[:MAX_PROBLEMS_SHOWN]]
        if count > MAX_PROBLEMS_SHOWN:
            lines.append(f"... and {count - MAX_PROBLEMS_SHOWN} more")
        return "\n  ".join(lines)


def read_manifest(
    path: str | Path,
    where: Mapping[str, Any] = {},
    *,
    format: str = "auto",
    root: str | Path | None = None,
    classes: str | Path | None = None,
    template: str = "{:05d}.jpg",
    missing_ok: bool = False,
    known: KnownClasses | None = None,
    columns: Mapping[str, str] = {},
) -> Manifest:
    """Read and check the videos of a split.

    A **csv** file (UTF-8, comma-separated, with header) has the columns ``path`` and ``label``, optionally ``class``,
    ``first_frame`` and ``last_frame``, and any others to filter by. A path is a video file or a folder of numbered
    images. The path as written is the ``sample_id``; if several rows have parts of one video, with its frames, such as
    ``a.mp4#46-120``. Labels are whole numbers from 0 without gaps
    (``3``, also written as ``"3"``, ``+3`` or ``3.0``), or, if no label is a number, class names, which get ids in
    sorted order. ``class`` names the labels. Classes come from the whole file, so splits that are filtered from one
    file agree. Only kept rows are checked for missing videos.

    A **folder** is a tree ``class/**/video``. Class names get ids in sorted order, by number if all are whole numbers;
    the path below the folder is the ``sample_id``. Other files and hidden ones are ignored. Links to folders inside a
    class folder are not followed.

    A **parquet** file, or a folder of them, has one row per video: its ``uri``, or its bytes. **images** reads any of
    these three with images instead of videos; ``auto`` also recognises a tree ``class/image`` without videos.
    **kinetics**, **ssv1**, **ssv2**, **ucf101** and **hmdb51** read the lists that these data sets are published with;
    **casme2**, **samm**, **smic** and **megc** those of micro-expressions (``posmlp.video.micro_expressions``). Each
    format is described by its function in ``PARSERS`` of the two modules.

    Args:
        path: the list's file, or the folder.
        where: keep the rows that meet the condition of each column: a value, a list of values (one of them), or
            ``{"not": a value or a list}`` (none of them).
        format: one of the formats above. ``auto``: a folder, a Parquet file (suffix ``.parquet``), otherwise CSV.
        root: the folder that the paths in the list are relative to. It must hold all videos, because lists may come
            from other people. None: the list's folder.
        classes: a file that names the classes, for any format: one name per line, lines of id and name, or JSON.
            Numeric labels refer to it, named labels get their ids from it.
        template: the names of a frame folder's images, for ssv1. Other formats find them in each folder, and choose
            this one if a folder has several series of images.
        missing_ok: also keep rows whose video does not exist.
        known: the classes that the labels refer to, of the training list or of a checkpoint. They are matched by name,
            or by label if the list has no names. Some may be absent; a kept row of another class is a problem. None:
            the list defines the classes.
        columns: further columns of the list to keep, each with the key or option that names it, for the message if
            the list has no such column; with an empty text such a column is empty. ``folder`` stands for the folder of
            each video. The rows get them as text, with the prefix ``list.``.

    Raises:
        ManifestError: lists all problems.
        StorageError: a URI has a password.
    """
    source = ManifestSource(
        absolute(path),
        {column: Condition.read(written) for column, written in where.items()},
        None if root is None else absolute(root),
        None if classes is None else absolute(classes),
        template,
        format,
        missing_ok,
        known,
        columns,
    )
    try:
        manifest = _build_manifest(source)
        source.stop_if_bad()
    except StopReading:
        raise ManifestError(problem_lines(source)) from None
    return manifest


def absolute(path: str | Path) -> str:
    """Absolute path or URI; refuses a password."""
    uri = str(path)
    storage.refuse_password(uri)
    return uri if storage.is_remote(uri) else storage.local_path(uri)


def problem_lines(source: ManifestSource) -> list[str]:
    """The problems as lines of text: by file in order of first use, then by line, then in the order found."""
    files = {file: i for i, file in enumerate(dict.fromkeys([source.path, *(file for file, _, _ in source.problems)]))}
    ordered = sorted(source.problems, key=lambda problem: (files[problem[0]], -1 if problem[1] is None else problem[1]))
    return [f"{_printable(_file_and_line(file, line))}: {_printable(text)}" for file, line, text in ordered]


def _file_and_line(file: str, line: int | None) -> str:
    return file if line is None else f"{file}{'#' if file.endswith('.parquet') else ':'}{line}"


def _printable(text: str) -> str:
    return text if _is_utf8(text) else text.encode(errors="backslashreplace").decode()


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse(source: ManifestSource) -> Listing:
    listing = PARSERS[_choose_format(source)](source)
    if not listing.rows:
        raise StopReading
    return listing


def _build_manifest(source: ManifestSource) -> Manifest:
    listing = _parse(source)
    if source.root and not storage.is_remote(source.root) and not os.path.isdir(source.root):
        source.stop(
            source.root, None, "no such folder; `root` must be the folder that the list's paths are relative to"
        )
    labels, names = _assign_labels(source, listing)
    kept = _filter_rows(source, listing)
    classes = tuple(names[label] for label in sorted(names))
    if source.known:
        labels, classes = _known_labels(source, source.known, listing, labels, names, kept), source.known.names
    folder = source.root or listing.folder
    _read_backslashes(source, listing, folder)
    _name_parts(listing)
    rows = [listing.rows[i] for i in kept]
    uris = _check_paths(source, listing, folder)
    uris = [uris[i] for i in kept]
    frames: list[int | None] = [None] * len(kept)
    spans = [_read_span(source, listing, row) for row in rows]
    if listing.images:
        uris, frames = _frame_folders(source, rows, uris)
    elif listing.series:
        _read_series(source, listing, rows, uris, frames, spans, range(len(rows)))
    elif not listing.present:
        folders = _image_folders(source, listing, rows, uris)
        _read_series(source, listing, rows, uris, frames, spans, folders)
        uris = _find_videos(source, listing, rows, uris, folder, {*folders})
    if listing.pictures:
        uris, frames = [escape_braces(uri) for uri in uris], [1] * len(uris)
    further = _further_columns(source, listing, rows)
    source.stop_if_bad()
    columns = {
        "sample_id": [row.sample_id or row.path for row in rows],
        "uri": uris,
        "label": [labels[i] for i in kept],
        "frames": frames,
    }
    table = pa.table(columns, schema=SCHEMA)
    if any(span != (None, None) for span in spans):
        for name, numbers in zip(SPAN_COLUMNS, zip(*spans, strict=True), strict=True):
            table = table.append_column(name, pa.array(numbers, pa.int32()))
    for name, values in further.items():
        table = table.append_column(f"{LISTED}{name}", pa.array(values, pa.string()))
    return Manifest(table, classes, folder)


def _further_columns(source: ManifestSource, listing: Listing, rows: list[ListingRow]) -> dict[str, list[str]]:
    """The values of ``columns`` of ``read_manifest`` by name."""
    source.missing_columns(source.path, _first_line(source.path), listing.columns)
    found = {}
    for name in source.columns:
        if name in listing.columns:
            place = listing.columns.index(name)
            found[name] = [row.values[place] for row in rows]
        else:
            found[name] = [os.path.dirname(row.path) if name == FOLDER else "" for row in rows]
    return found


def _choose_format(source: ManifestSource) -> str:
    if source.format not in MANIFEST_FORMATS:
        close = difflib.get_close_matches(source.format, list(MANIFEST_FORMATS), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        source.stop(
            source.path, None, f"unknown format {source.format!r}{hint}; expected one of {', '.join(MANIFEST_FORMATS)}"
        )
    if source.format == "ssv1":
        _check_template(source)
    if source.format != "auto":
        return source.format
    found = path_kind(source, source.path)
    if not found:
        expected = "expected a CSV or Parquet file or a class-per-folder tree of videos"
        source.stop(source.path, None, f"no such file or folder; {expected}")
    name = storage.OPTIONS.split(source.path)[0]
    return "folder" if found == "folder" else "parquet" if name.lower().endswith(".parquet") else "csv"


# Labels ---------------------------------------------------------------------------------------------------------------


def _assign_labels(source: ManifestSource, listing: Listing) -> tuple[list[int], dict[int, str]]:
    """The label of each row in this list, and the name of each label. Meaningless if there are problems."""
    before = len(source.problems)
    for row in listing.rows:
        if row.label == "":
            source.problem(row.file, row.line, "label is empty; expected an integer from 0 or a class name")
        if isinstance(row.label, float):
            text = f"label {row.label!r} is not a whole number; write 0, 1, 2, ..., or a class name"
            source.problem(row.file, row.line, text)
        if row.name == "":
            source.problem(row.file, row.line, "class is empty; name it, or leave out the column")
    if listing.classes is not None:
        return _named_labels(source, listing, listing.classes), dict(enumerate(listing.classes))
    rows, first = listing.rows, listing.first_label
    if any(isinstance(row.label, int) for row in rows):
        labels = [row.label - first if isinstance(row.label, int) else -1 for row in rows]
        for row, label in zip(rows, labels, strict=True):
            if isinstance(row.label, str) and row.label:
                text = f"label {row.label!r} is not an integer, as other labels here are; use one kind"
                source.problem(row.file, row.line, text)
            elif isinstance(row.label, int) and label < 0:
                source.problem(row.file, row.line, _too_small(row, first))
        used = {label for label in labels if label >= 0}
        gaps = list(islice((i for i in range(max(used, default=0)) if i not in used), 11))
        # an unreadable label would look like a gap; a list of known classes may have gaps
        if gaps and len(source.problems) == before and not source.known:
            listed = ", ".join(str(i + first) for i in gaps[:10]) + (", ..." if len(gaps) > 10 else "")
            text = f"no row has label {listed}, yet labels go up to {max(used) + first}"
            hint = f"number them {first}, {first + 1}, {first + 2}, ..., or name all classes in a file (`classes`)"
            source.problem(rows[0].file, _first_line(rows[0].file), f"{text}; {hint}")
    else:
        ids = {name: i for i, name in enumerate(in_order({str(row.label) for row in rows}))}
        labels = [ids[str(row.label)] for row in rows]
    _check_names(source, rows, labels)
    return labels, {label: row.name or str(row.label) for label, row in zip(labels, rows, strict=True)}


def _known_labels(
    source: ManifestSource,
    known: KnownClasses,
    listing: Listing,
    labels: list[int],
    names: Mapping[int, str],
    kept: Sequence[int],
) -> list[int]:
    """The labels of the same classes in ``known``. Kept rows of other classes are one problem."""
    index = ClassIndex(known.names)
    known_label = {label: index.get(name) for label, name in names.items()}
    other = [i for i in kept if labels[i] in names and known_label[labels[i]] < 0]
    if other and not source.problems:
        row = listing.rows[other[0]]
        strange = list(dict.fromkeys(names[labels[i]] for i in other))
        close = difflib.get_close_matches(strange[0], known.names, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        what = f"{len(strange)} class{'es' * (len(strange) > 1)} not in {known.source}: {list_names(strange)}"
        source.problem(row.file, row.line, f"{what}{hint}; {known.advice}")
    return [known_label.get(label, -1) for label in labels]


def _first_line(file: str) -> int | None:
    return None if file.endswith(".parquet") else 1


def _too_small(row: ListingRow, first: int) -> str:
    return f"label {row.label} is {'negative' if not first else 'too small'}; labels count from {first}"


def _named_labels(source: ManifestSource, listing: Listing, classes: tuple[str, ...]) -> list[int]:
    """Labels, if the class names are given."""
    index = ClassIndex(classes)
    first, where = listing.first_label, source.classes or "the file's metadata"
    labels, hints = [], dict[str, str]()
    _check_meaning(source, listing, index, where)
    for row in listing.rows:
        if row.label == "" or isinstance(row.label, float):
            labels.append(-1)
            continue
        label = index.get(row.label) if isinstance(row.label, str) else row.label - first
        labels.append(label)
        if isinstance(row.label, str):
            if label < 0:
                if row.label not in hints and len(hints) < MAX_PROBLEMS_SHOWN:  # comparing with every class is slow
                    close = difflib.get_close_matches(row.label, classes, n=1)
                    hints[row.label] = f" (did you mean {close[0]!r}?)" if close else ""
                text = f"class {row.label!r} is not in {where}{hints.get(row.label, '')}; correct one of the two"
                source.problem(row.file, row.line, text)
        elif label < 0:
            source.problem(row.file, row.line, _too_small(row, first))
        elif label >= len(classes):
            last = first + len(classes) - 1
            text = f"label {row.label} is out of range; {where} names {len(classes)} classes, {first} to {last}"
            source.problem(row.file, row.line, text)
        if 0 <= label < len(classes) and row.name and same_name(row.name) != same_name(classes[label]):
            text = f"label {row.label} is class {row.name!r} here, but {classes[label]!r} in {where}"
            source.problem(row.file, row.line, f"{text}; correct one of the two")
    return labels


def _check_meaning(source: ManifestSource, listing: Listing, index: ClassIndex, where: str) -> None:
    """Refuse labels that are both numbers and names of classes, if the two mean different classes."""
    if listing.labels_typed or not any(name.isdigit() for name in index.exact):
        return
    numbered = [row for row in listing.rows if isinstance(row.label, int)]
    named = [index.exact.get(str(row.label), -1) + listing.first_label for row in numbered]
    if min(named, default=-1) < listing.first_label:  # a label that is no name: all are numbers
        return
    for row, number in zip(numbered, named, strict=True):
        if row.label != number:
            text = f"label {row.label} may be the number, or the class {str(row.label)!r}, which is number {number} in"
            advice = "list the classes in the order of their numbers, or give them other names"
            source.problem(row.file, row.line, f"{text} {where}; {advice}")
            return


def _check_names(source: ManifestSource, rows: Sequence[ListingRow], labels: list[int]) -> None:
    """Check that each label has one name and each name one label."""
    name_of: dict[int, tuple[str, ListingRow]] = {}
    label_of: dict[str, tuple[int, ListingRow]] = {}
    for row, label in zip(rows, labels, strict=True):
        if not row.name or label < 0:
            continue
        known, first = name_of.setdefault(label, (row.name, row))
        if known != row.name and same_name(known) != same_name(row.name):
            text = f"label {row.label} is class {row.name!r} here, but {known!r} in {_describe_line(first, row)}"
            source.problem(row.file, row.line, text)
        other, first = label_of.setdefault(same_name(row.name), (label, row))
        if other != label:
            text = f"class {row.name!r} has label {row.label} here, but another in {_describe_line(first, row)}"
            source.problem(row.file, row.line, text)


def _describe_line(row: ListingRow, seen_from: ListingRow) -> str:
    """``line 3``, or file and line if the row is in another file than ``seen_from``."""
    if row.file != seen_from.file:
        return _file_and_line(row.file, row.line)
    return f"{'row' if row.file.endswith('.parquet') else 'line'} {row.line}"


# Filter ---------------------------------------------------------------------------------------------------------------


def _filter_rows(source: ManifestSource, listing: Listing) -> list[int]:
    """The indices of the rows that match ``where``."""
    where, columns, rows = source.where, listing.columns, listing.rows
    if where and not columns:
        text = f"this list has no columns to filter by, as a CSV file has; remove `where` ({', '.join(where)})"
        source.problem(source.path, None, text)
    elif unknown := [column for column in where if column not in columns]:
        for column in unknown:
            text = f"no column {column!r} to filter by (`where`); columns are {', '.join(columns)}"
            source.problem(source.path, _first_line(source.path), text)
    wanted = [(columns.index(column), condition) for column, condition in where.items() if column in columns]
    kept = [i for i, row in enumerate(rows) if all(condition.holds(row.values[k]) for k, condition in wanted)]
    if where and not kept and len(wanted) == len(where):
        query = " and ".join(condition.describe(column) for column, condition in where.items())
        present = "; ".join(f"{columns[k]} is {_list_values({row.values[k] for row in rows})}" for k, _ in wanted)
        line = None if rows[0].file != source.path else _first_line(source.path)
        source.problem(source.path, line, f"no row has {query} (`where`); in the file {present}")
    elif kept:
        for k, condition in wanted:
            if absent := {*condition.values} - {row.values[k] for row in rows}:
                warn_once(
                    f"{source.path}: no row has {columns[k]} {_list_values(absent)} (`where`), so it has no effect"
                )
    return kept


def _list_values(values: set[str]) -> str:
    """The first ten values."""
    return ", ".join(sorted(values)[:10]) + (", ..." if len(values) > 10 else "")


# Videos ---------------------------------------------------------------------------------------------------------------


def _read_backslashes(source: ManifestSource, listing: Listing, folder: str) -> None:
    """Read backslashes in paths as slashes, unless a file has that name: lists are also written on Windows."""
    rows = [] if listing.present else [(i, row) for i, row in enumerate(listing.rows) if "\\" in row.path]
    found = {i: storage.join(folder, row.path) for i, row in rows}
    found = {i: uri for i, uri in found.items() if storage.is_inside(uri, folder)}  # nothing elsewhere is looked up
    if not found:
        return
    if listing.images and TEMPLATE.fullmatch(source.template):
        found = {i: storage.join(uri, source.template.format(1)) for i, uri in found.items()}
    for i, exists in zip(found, are_files(source, [*found.values()]), strict=True):
        row = listing.rows[i]
        if not exists:
            path = row.path.replace("\\", "/")
            listing.rows[i] = row._replace(path=path, sample_id=row.sample_id or row.path)


def _name_parts(listing: Listing) -> None:
    """Give the parts of a video that is in several rows sample ids with their frames, such as ``a.mp4#46-120``."""
    rows = listing.rows
    if all(row.first is None and row.last is None for row in rows):
        return
    count = Counter(row.path for row in rows)
    for i, row in enumerate(rows):
        if count[row.path] > 1 and not row.sample_id and (row.first, row.last) != (None, None):
            first, last = ("" if number is None else number for number in (row.first, row.last))
            listing.rows[i] = row._replace(sample_id=f"{row.path}#{first}-{last}")


def _check_paths(source: ManifestSource, listing: Listing, folder: str) -> list[str]:
    """The URI of each row's video, empty if the path is unusable.

    A ``sample_id`` may occur only once, and a video only once with the same frames.
    """
    uris: list[str] = []
    videos: dict[tuple[Any, ...], ListingRow] = {}
    samples: dict[str, ListingRow] = {}
    for row in listing.rows:
        uri = storage.join(folder, row.path) if row.path else ""
        sample = row.sample_id or row.path
        if not uri:
            source.problem(row.file, row.line, "path is empty; expected the path of a video")
        elif not (uri.isascii() and sample.isascii()) and not (_is_utf8(uri) and _is_utf8(sample)):
            text = (
                f"the name {os.fsencode(row.path)!r} is not valid UTF-8" if row.line is None else "is not valid UTF-8"
            )
            source.problem(row.file, row.line, f"{text}; rename the video")
            uri = ""
        elif not storage.is_inside(uri, folder):
            text = f"path {storage.without_password(row.path)!r} is outside {folder}, which must hold all listed videos"
            source.problem(row.file, row.line, f"{text}; correct it, or set `root` to a folder that holds them all")
            uri = ""
        elif (first := videos.setdefault((uri, row.first, row.last), row)) is not row:
            text = f"path {row.path!r} is already in {_describe_line(first, row)}; keep one of the two"
            text += "" if (row.first, row.last) == (None, None) else ", or give them other frames"
            source.problem(row.file, row.line, text)
        elif (first := samples.setdefault(sample, row)) is not row:
            text = f"sample_id {sample!r} is already in {_describe_line(first, row)}; give each video its own"
            source.problem(row.file, row.line, text)
        uris.append(uri)
    return uris


def are_files(source: ManifestSource, uris: Sequence[str]) -> list[bool]:
    first = next((uri for uri in uris if storage.is_remote(uri)), source.path)  # named in an error of the store
    with source.reading(first):
        found = storage.are_files(uris)
    return found


def _find_videos(
    source: ManifestSource,
    listing: Listing,
    rows: list[ListingRow],
    uris: list[str],
    folder: str,
    found_already: Set[int],
) -> list[str]:
    """The URI where each video was found. Each missing video is a problem."""
    wanted = [i for i, uri in enumerate(uris) if uri and i not in found_already]
    found = are_files(source, [uris[i] for i in wanted])
    missing = [i for i, exists in zip(wanted, found, strict=True) if not exists]
    uris = list(uris)
    tried = 0
    while missing:
        candidates = {
            i: storage.join(folder, others[tried])
            for i in missing
            if tried < len(others := _other_places(listing, rows[i]))
        }
        if not candidates:
            break
        candidates = {i: uri for i, uri in candidates.items() if storage.is_inside(uri, folder)}
        for (i, uri), exists in zip(candidates.items(), are_files(source, list(candidates.values())), strict=True):
            if exists:
                uris[i] = uri
        missing = [i for i in missing if uris[i] != candidates.get(i)]
        tried += 1
    base = f"the paths are relative to {folder}" if source.root else "paths are relative to the manifest's folder"
    base += "; `posmlp data check` writes a list of the good videos"
    for i in () if source.missing_ok else missing:
        row = rows[i]
        others = listing.others(row) if listing.others else []
        also = f" (nor {others[0]}{', ...' if len(others) > 1 else ''})" if others else ""
        what = "image" if listing.pictures else "video"
        windows = "; a path of a Windows drive: make it relative to `root`" if DRIVE.match(row.path) else ""
        source.problem(row.file, row.line, f"no {what} file {uris[i]}{also}{windows or '; ' + base}")
    absent = set(missing)
    check_parquet_rows(source, rows, ["" if i in absent else uri for i, uri in enumerate(uris)])
    return uris


def _other_places(listing: Listing, row: ListingRow) -> list[str]:
    """Other paths where a missing video may be: those of the format, and the suffix in small or capital letters."""
    stem, suffix = os.path.splitext(row.path)
    cases = [stem + other for other in (suffix.lower(), suffix.upper()) if other != suffix and suffix[1:].isalnum()]
    return (listing.others(row) if listing.others else []) + cases


def check_parquet_rows(source: ManifestSource, rows: list[ListingRow], uris: list[str]) -> None:
    """Check that the row of ``FILE.parquet#ROW`` exists and that the file holds videos."""
    counts: dict[str, int] = {}
    for row, uri in zip(rows, uris, strict=True):
        if not (inside := ".parquet#" in uri and storage.parquet_row(uri)):
            continue
        file, number = inside
        if file not in counts:
            counts[file] = 0
            with source.reading(file):
                system, place = storage.resolve(file)
                with system.open_input_file(place) as handle, pq.ParquetFile(handle) as table:
                    counts[file] = table.metadata.num_rows
                    inline = storage.BYTES_COLUMN in table.schema_arrow.names
            if not inline:
                source.problem(file, None, f"has no column {storage.BYTES_COLUMN} with videos; correct the list's uris")
        if number >= counts[file]:
            text = f"no row {number} in {file}, which has {counts[file]}; rows count from 0"
            source.problem(row.file, row.line, text)


# Frame folders --------------------------------------------------------------------------------------------------------


def _check_template(source: ManifestSource) -> None:
    if not TEMPLATE.fullmatch(source.template):
        text = f"unknown `template` {source.template!r}; expected a file name with one number, such as {{:05d}}.jpg"
        source.problem(source.path, None, f"{text} or img_{{:05d}}.jpg")


def _frame_folders(
    source: ManifestSource, rows: list[ListingRow], folders: list[str]
) -> tuple[list[str], list[int | None]]:
    """URIs with the template, and the number of images: as listed (the first and last must exist), or counted."""
    if not TEMPLATE.fullmatch(source.template):
        return folders, [None] * len(rows)
    frames = [row.frames for row in rows]
    wanted = []
    for i, (row, folder) in enumerate(zip(rows, folders, strict=True)):
        if folder and row.frames is None:
            frames[i] = count_images(source, row, folder)
        elif folder and row.frames and row.frames > 0:
            wanted += [(row, storage.join(folder, source.template.format(n))) for n in {1: 0, row.frames: 0}]
    found = are_files(source, [uri for _, uri in wanted])
    for (row, uri), exists in zip(wanted, found, strict=True):
        if not exists and not source.missing_ok:
            text = f"no image {uri}, but the list has {row.frames} frames, named {source.template}"
            source.problem(row.file, row.line, f"{text}; check `root` and `template`")
    return [storage.join(escape_braces(folder), source.template) if folder else "" for folder in folders], frames


def _list_names(folder: str) -> set[str]:
    """The names in a folder.

    Raises:
        OSError: it cannot be read.
    """
    if not storage.is_remote(folder):
        return set(os.listdir(folder))
    system, path = storage.resolve(folder)
    return {info.base_name for info in system.get_file_info(pafs.FileSelector(path))}


def names_in(source: ManifestSource, row: ListingRow, folder: str) -> set[str] | None:
    """The names in a row's folder. None if it is missing or cannot be read, which is a problem of the row."""
    try:
        return _list_names(folder)
    except (FileNotFoundError, NotADirectoryError):
        if not source.missing_ok:
            source.problem(row.file, row.line, f"no folder {folder}; check `root`")
    except OSError as error:
        source.problem(row.file, row.line, f"{folder} cannot be read ({error})")
    return None


def count_images(source: ManifestSource, row: ListingRow, folder: str) -> int | None:
    """Count the images of a folder that match the template. Their numbers must start at 1, without gaps."""
    names = names_in(source, row, folder)
    if names is None:
        return 1 if source.missing_ok else None  # reading this image fails later
    count = 0
    while source.template.format(count + 1) in names:
        count += 1
    match = TEMPLATE.fullmatch(source.template)
    pattern = re.compile(f"{re.escape(match[1].format())}[0-9]+{re.escape(match[2].format())}" if match else "")
    matching = sum(1 for name in names if pattern.fullmatch(name))
    if not count or matching > count:
        text = f"no image {source.template.format(count + 1)} in {folder}, which has {matching} with such names"
        source.problem(row.file, row.line, f"{text}; they must count from 1 without gaps")
    return count


# Parts of videos, and folders of images with any numbers --------------------------------------------------------------

Numbers = tuple[int | None, int | None]  # first and last frame of a row; None: not given


def _read_span(source: ManifestSource, listing: Listing, row: ListingRow) -> Numbers:
    """The first and the last frame of a row; both are checked."""
    numbers: list[int | None] = []
    for name, value in zip(listing.span_names, (row.first, row.last), strict=True):
        good = isinstance(value, int) and 0 <= value <= MAX_NUMBER
        numbers.append(value if isinstance(value, int) and good else None)
        if value is not None and not good:
            written = "is empty" if value == "" else f"{value!r} is not a whole number from 0 to {MAX_NUMBER}"
            source.problem(row.file, row.line, f"{name} {written}; {_leave_out(listing, row)}")
    first, last = numbers
    if first is not None and last is not None and first > last:
        (name, end), hint = listing.span_names, _leave_out(listing, row)
        source.problem(row.file, row.line, f"{end} {last} is before {name} {first}; {hint}")
    return first, last


def _leave_out(listing: Listing, row: ListingRow) -> str:
    """How to go without a row, for messages."""
    if "path" not in listing.columns:
        return "correct it"
    return f"correct it, or leave the row out with `where: {{path: {{not: {row.path}}}}}`"


def _image_folders(
    source: ManifestSource, listing: Listing, rows: list[ListingRow], uris: list[str]
) -> dict[int, set[str]]:
    """The paths that are folders, by their row, with the names in them.

    Only paths without the suffix of a video are looked at, so that a long list of videos costs nothing.
    """
    if not listing.maybe_series or listing.pictures:
        return {}
    possible = [i for i, uri in enumerate(uris) if uri and not uri.lower().endswith(VIDEO_SUFFIXES)]
    files = are_files(source, [uris[i] for i in possible])
    found = {}
    for i, is_file in zip(possible, files, strict=True):
        if not is_file and not storage.parquet_row(uris[i]):
            with contextlib.suppress(OSError):  # a missing video is reported with the others
                if find_series(names := _list_names(uris[i])):
                    found[i] = names
    return found


def _read_series(
    source: ManifestSource,
    listing: Listing,
    rows: list[ListingRow],
    uris: list[str],
    frames: list[int | None],
    spans: list[Numbers],
    folders: Iterable[int] | Mapping[int, set[str]],
) -> None:
    """Find the images of some rows' folders. Sets their URIs, frames and spans, in place."""
    listed: dict[str, set[str] | None] = {}  # several rows may be parts of one folder
    for i in folders:
        if not (folder := uris[i]):
            continue
        if folder not in listed:
            listed[folder] = folders[i] if isinstance(folders, Mapping) else names_in(source, rows[i], folder)
        found = _find_images(source, listing, rows[i], folder, listed[folder], spans[i])
        if found:
            template, spans[i] = found
            uris[i] = storage.join(escape_braces(folder), template)
            first, last = spans[i]
            frames[i] = (last or 0) - (first or 0) + 1


def _find_images(
    source: ManifestSource, listing: Listing, row: ListingRow, folder: str, names: set[str] | None, span: Numbers
) -> tuple[str, Numbers] | None:
    """The names of a folder's images, and the numbers of those that the row is of. None if there is a problem."""
    first, last = span
    if first is not None and last is not None and first > last:
        return None  # reported already
    found = find_series(names or ())
    if source.missing_ok and not found:  # reading the folder fails later
        first = 1 if first is None else first
        return source.template, (first, first if last is None else last)
    if names is None:
        return None
    series = choose_series(found, source.template)
    if isinstance(series, str):
        source.problem(row.file, row.line, f"{series} in {folder}; {_leave_out(listing, row)}")
        return None
    has = f"the folder has {series.name(series.numbers[0])} to {series.name(series.numbers[-1])}"
    first = series.numbers[0] if first is None else first
    last = series.numbers[-1] if last is None else last
    gap = first if first > last else series.missing(first, last)
    if gap is not None and not source.missing_ok:
        text = f"no image {series.name(gap)} in {folder}; the row is of images {first} to {last}, and {has}"
        strays = f"; {series.strays[0]} is numbered otherwise" if series.strays else ""
        source.problem(row.file, row.line, f"{text}{strays}; {_leave_out(listing, row)}")
        return None
    return series.template, (first, max(first, last))


Split = Literal["train", "val", "test"]


def read_split(data: DataSection, name: Split, known: KnownClasses | None = None) -> Manifest:
    """Read a split of a recipe; raises the errors of ``read_manifest``.

    Validation videos without a list of their own are held out of the training lists (``DataSection.holds_out``): a
    share (``posmlp.video.holdout``), or those whose columns have the values of ``data.val.where``. Several training
    lists become one manifest. The labels of the later ones refer to the classes of the first, and the
    sample ids of list n (from 2) begin with ``n:``. If lists have weights, the rows have a further column, ``weight``
    (``posmlp.video.draws``).

    Args:
        known: the classes that the labels shall refer to; give ``training_classes`` for the validation split.
    """
    if not data.holds_out or name == "test":
        return _read(data, name, known=known)
    columns = {data.group_by: "data.group_by"} if data.group_by else dict.fromkeys(data.val.where, "data.val.where")
    manifest = _read(data, "train", known=known, columns=columns)
    held_out = _shared_out(data, manifest.rows) if data.val.share else _matching_rows(data, manifest.rows)
    rows = manifest.rows.filter(pa.array([each == (name == "val") for each in held_out]))
    if not len(rows):
        raise ManifestError([f"{data.train.path}: data.val.where holds out every video; none is left to train on"])
    dropped = [column for column in rows.column_names if column.startswith(LISTED) or (name, column) == ("val", WEIGHT)]
    return replace(manifest, rows=rows.drop_columns(dropped).combine_chunks())


def _shared_out(data: DataSection, rows: pa.Table) -> list[bool]:
    """Whether each training row is in the share for validation. A video without a group is a group of its own."""
    ids, share = rows["sample_id"].to_pylist(), data.val.share or 0.0
    groups = ids
    if data.group_by:  # no value of a column has a zero character
        groups = [own or f"{id}\0" for own, id in zip(rows[f"{LISTED}{data.group_by}"].to_pylist(), ids, strict=True)]
    held_out = choose_held_out(groups, rows["label"].to_pylist(), share, data.val.seed)
    if not any(held_out):
        text = f"data.val.share {share:g} leaves no video for validation: no class has two videos or groups"
        raise ManifestError([f"{data.train.path}: {text}; add videos, or give a list of its own (data.val.path)"])
    return held_out


def _matching_rows(data: DataSection, rows: pa.Table) -> list[bool]:
    """Whether each training row meets the conditions of ``data.val.where``."""
    where = {name: Condition.read(written) for name, written in data.val.where.items()}
    columns = {name: rows[f"{LISTED}{name}"].to_pylist() for name in where}
    held_out = [all(where[name].holds(columns[name][i]) for name in where) for i in range(len(rows))]
    if not any(held_out):
        query = " and ".join(condition.describe(name) for name, condition in where.items())
        present = "; ".join(f"{name} is {_list_values(set(values))}" for name, values in columns.items())
        raise ManifestError([f"{data.train.path}: no training video has {query} (data.val.where); there {present}"])
    return held_out


def read_training_videos(data: DataSection, columns: Mapping[str, str]) -> Manifest:
    """Read all videos of a recipe's training lists, also those that validation holds out.

    Args:
        columns: as of ``read_manifest``.

    Raises:
        ManifestError: a list is wrong.
    """
    return _read(data, "train", columns=columns)


def training_classes(data: DataSection, manifest: Manifest | None = None) -> KnownClasses:
    """The classes of a recipe's training list, which the labels of its validation list refer to.

    Args:
        manifest: the training split, if it is read already.

    Raises:
        ManifestError: the training list is wrong. Missing videos are ignored.
    """
    if manifest is None:
        manifest = _read(data, "train", missing_ok=True)
    return _first_lists_classes(data, manifest)


def read_class_names(data: DataSection) -> tuple[tuple[str, ...], str]:
    """The classes of a recipe whose videos need not be there.

    Returns:
        The name of each label, and the file or list that has them: ``data.classes``, otherwise the training list.
        Both are empty if there is neither.

    Raises:
        ManifestError: the file or the list is wrong.
    """
    path = absolute(data.classes or data.train.path)
    source = ManifestSource(path, {}, None, data.classes and path, data.template, data.format)
    try:
        if names := class_names(source, first=1 if data.format == "ucf101" else 0):
            return names, path
        exists = bool(path_kind(source, path))
    except StopReading:
        raise ManifestError(problem_lines(source)) from None
    return (training_classes(data).names, path) if exists else ((), "")


def _first_lists_classes(data: DataSection, manifest: Manifest) -> KnownClasses:
    advice = "correct the names, leave these videos out, or name all classes in a file (`data.classes`)"
    return KnownClasses(manifest.classes, f"the training list {data.train.path}", advice)


def _read(
    data: DataSection,
    name: Split,
    *,
    known: KnownClasses | None = None,
    missing_ok: bool = False,
    columns: Mapping[str, str] = {},
) -> Manifest:
    split: SplitSection | None = getattr(data, name)
    if split is None:
        raise UserError(f"the recipe has no data.{name}; name the list, as in data.{name}.path={name}.csv")
    manifests: list[Manifest] = []
    for each in split.lists:
        files = {"root": each.root, "classes": data.classes, "template": data.template}
        options: dict[str, Any] = {"known": known, "missing_ok": missing_ok, "columns": columns, **files}
        manifests.append(read_manifest(each.path, each.where, format=data.format, **options))
        known = known or _first_lists_classes(data, manifests[0])
    weights = [each.weight for each in split.lists if isinstance(each, WeightedSplitSection)]
    if len(manifests) == 1 and weights in ([], [1.0]):
        return manifests[0]
    return _join([each.path for each in split.lists], manifests, weights)


def _join(paths: Sequence[str], manifests: Sequence[Manifest], weights: Sequence[float]) -> Manifest:
    """One manifest of the rows of several lists, with the column ``weight``.

    Raises:
        ManifestError: two lists have the same video.
    """
    tables, seen, problems = [], dict[tuple[Any, ...], int](), []
    for number, (path, manifest, weight) in enumerate(zip(paths, manifests, weights, strict=True), 1):
        parts = [name for name in ("uri", *SPAN_COLUMNS) if name in manifest.rows.column_names]
        for part in zip(*(manifest.rows[name].to_pylist() for name in parts), strict=True):
            if (first := seen.setdefault(part, number)) != number:
                text = f"{path}: video {part[0]} is also in {paths[first - 1]}; keep one of the two"
                problems.append(f"{text} (`weight` draws the videos of a list more often)")
        ids = [each if number == 1 else f"{number}:{each}" for each in manifest.rows["sample_id"].to_pylist()]
        table = manifest.rows.set_column(0, SCHEMA.field("sample_id"), pa.array(ids, pa.string()))
        tables.append(table.append_column(WEIGHT, pa.array([float(weight)] * len(ids), pa.float64())))
    if problems:
        raise ManifestError(problems)
    joined = pa.concat_tables(tables, promote_options="default")  # not every list has parts of videos
    return Manifest(joined.combine_chunks(), manifests[0].classes, manifests[0].root)
