"""Lists of boxes in the format of AVA: from ground truth, person detections and label map to the rows of a split.

The lists are CSV files without a header. Coordinates are fractions of the frame, from its top left corner; seconds are
whole; actions have ids from 1, which the label map names.

- Ground truth: ``video,second,x1,y1,x2,y2,action,person``, one line for each action of each box. The person may be left
  out and has no meaning here.
- Person boxes: ``video,second,x1,y1,x2,y2,action,score``. The action is empty or -1 if none is known.
- Excluded key frames: ``video,second``.
- Label map: blocks ``item { name: "stand" id: 12 }``, also with ``label_id`` for ``id``, and with ``label_type``.

A list in Parquet, of ``posmlp data shard`` or ``posmlp data check``, has the rows themselves: ``sample_id``, ``uri``,
``time``, ``boxes``, ``actions`` and ``scores`` as ``read_detection_split`` returns them. It takes the place of the
first three lists.

A video is a file ``VIDEO.mp4`` (or another suffix of videos) in the folder of the videos, or a folder ``VIDEO`` of
images ``VIDEO_000001.jpg``. A key frame is a video and a second. Lines whose coordinates are the same text are the same
box.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from posmlp import storage
from posmlp.config import DataSection, DetectionSection, SplitSection
from posmlp.errors import UserError
from posmlp.text import quantity
from posmlp.video.classes import NUMBER, ClassIndex, KnownClasses, list_names, same_name
from posmlp.video.formats import VIDEO_SUFFIXES, ListingRow, ManifestSource, StopReading, read_text, require_kind
from posmlp.video.image_series import escape_braces
from posmlp.video.manifest import (
    SCHEMA,
    Manifest,
    ManifestError,
    Split,
    absolute,
    are_files,
    check_parquet_rows,
    count_images,
    problem_lines,
)

BOX = ("x1", "y1", "x2", "y2")
TRUTH_COLUMNS = ("video", "second", *BOX, "action", "person")
BOXES_COLUMNS = ("video", "second", *BOX, "action", "score")
EXCLUDED_COLUMNS = ("video", "second")
PEOPLE_COLUMNS = {  # by their number
    len(columns): columns
    for columns in (("second", *BOX), ("video", "second", *BOX), ("second", *BOX, "action", "score"), BOXES_COLUMNS)
}
DETECTION_SCHEMA = pa.schema(
    [
        *SCHEMA,
        ("time", pa.float64()),
        ("boxes", pa.list_(pa.float32())),
        ("actions", pa.list_(pa.list_(pa.int32()))),
        ("scores", pa.list_(pa.float32())),
    ]
)
OPTIONAL = ("label", "frames")  # columns that a list in Parquet need not have
MAX_SECOND = 10**6
MAX_CLASSES = 10**4
NO_ACTION = ("", "-1")
GROUPS = {"PERSON_MOVEMENT": "pose", "OBJECT_MANIPULATION": "object", "PERSON_INTERACTION": "person"}
TOKEN = re.compile(r"""\s+|\#[^\n]*|("(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|[\w.+-]+|.)""")
EXPECTED_BLOCKS = 'blocks such as item { name: "stand" id: 12 }'


class LabelMapEntry(NamedTuple):
    """An action of a label map: its name, and its type or ""."""

    name: str
    type: str


@dataclass(frozen=True)
class PersonBoxes:
    """Boxes of people in the order of their list, each once.

    Attributes:
        videos: name of the video of each box; None if the list does not name videos.
        seconds: int64 ``[N]``.
        corners: float32 ``[N, 4]``, x1 y1 x2 y2 as fractions of the frame.
        scores: float64 ``[N]``, 1 where the list has none.
    """

    videos: tuple[str, ...] | None
    seconds: NDArray[np.int64]
    corners: NDArray[np.float32]
    scores: NDArray[np.float64]


def read_detection_split(
    data: DataSection,
    detection: DetectionSection,
    split: Split,
    known: KnownClasses | None = None,
    *,
    missing_ok: bool = False,
) -> Manifest:
    """Read and check the key frames of a split.

    Training uses the ground truth, and those boxes of the person list whose score is at least ``detection.min_score``,
    with their actions in that list; boxes without an action are negatives of all classes, or left out if
    ``detection.negatives`` is off. A box that both lists have is one box with the actions of both. For validation and
    test the boxes of the person list are scored and the ground truth is only compared with; without a person list, the
    boxes of the ground truth are scored.

    The rows are sorted by video, then second. Beyond the columns of ``Manifest``, whose ``label`` is null and
    ``sample_id`` is ``VIDEO,0902``, they have

    - ``time: float64``, seconds from the start of the video file to the key frame
    - ``boxes: list<float32>``, x1 y1 x2 y2 of each box, as fractions of the frame: ``[4n]``
    - ``actions: list<list<int32>>``, the classes of each box, sorted; empty if none is known. In validation and test,
      the boxes that have some are the ground truth.
    - ``scores: list<float32>``, the person detector's score of each box; 1 for a box of the ground truth that the model
      gets, NaN for one that is only compared with.

    The schema's metadata has ``evaluated``, the classes of the label map ``detection.evaluated`` or null, and
    ``groups``, the classes of each group of actions (``class_groups``), both as JSON.

    The class of an action is its id - 1, or the class of this name in ``known``. ``Manifest.classes`` has the name of
    each class; an id that the label map leaves out is ``unnamed 2``.

    Args:
        data: ``data.classes`` is the label map; of the split, ``path`` is the ground truth, ``root`` the folder of the
            videos (None: the list's folder), ``boxes`` and ``excluded`` the other lists.
        known: the classes of the model, or of the training list. An action that is not among them is a problem.
        missing_ok: also keep key frames whose video does not exist.

    Raises:
        ManifestError: lists all problems.
        UserError: the recipe has no such split, or no label map.
        StorageError: a URI has a password.
    """
    section: SplitSection | None = getattr(data, split)
    if section is None:
        raise UserError(f"the recipe has no data.{split}; name the list, as in data.{split}.path={split}.csv")
    if data.classes is None:
        raise UserError("the recipe has no label map of the actions; set data.classes to a .pbtxt file")
    path = absolute(section.path)
    root = storage.parent(path) if section.root is None else absolute(section.root)
    source = ManifestSource(path, {}, root, absolute(data.classes), "", data.format, missing_ok, known)
    try:
        manifest = _build_manifest(source, section, root, detection, split == "train")
    except StopReading:
        raise ManifestError(problem_lines(source)) from None
    return manifest


def _build_manifest(
    source: ManifestSource, section: SplitSection, root: str, detection: DetectionSection, train: bool
) -> Manifest:
    assert source.classes is not None
    entries = _parse_label_map(source, source.classes)
    classes = label_map_names(entries)
    evaluated = _evaluated_ids(source, detection.evaluated, entries)
    if is_parquet(source.path):
        _check_lists_of_parquet(source, section)
        rows, label = _read_parquet(source, root, detection, classes, train)
    else:
        boxes, excluded = (None if uri is None else absolute(uri) for uri in (section.boxes, section.excluded))
        rows, label = _read_lists(source, boxes, excluded, root, detection, classes, train)

    def labels_of(ids: Iterable[int]) -> list[int]:
        return sorted({int(label[i - 1]) for i in ids if label[i - 1] >= 0})

    groups = {group: labels_of(i + 1 for i in members) for group, members in class_groups(entries).items()}
    metadata = {b"evaluated": json.dumps(evaluated and labels_of(evaluated)), b"groups": json.dumps(groups)}
    rows = rows.replace_schema_metadata((rows.schema.metadata or {}) | metadata)
    return Manifest(rows, source.known.names if source.known else classes, root)


def _read_lists(
    source: ManifestSource,
    boxes: str | None,
    excluded: str | None,
    root: str,
    detection: DetectionSection,
    classes: tuple[str, ...],
    train: bool,
) -> tuple[pa.Table, NDArray[np.int64]]:
    """The rows of lists in CSV, and the label of each class of the label map."""
    truth = _read_boxes(source, source.path, TRUTH_COLUMNS, len(classes))
    people = None if boxes is None else _read_boxes(source, boxes, BOXES_COLUMNS, len(classes))
    left_out = None if excluded is None else _read_csv(source, excluded, EXCLUDED_COLUMNS)
    seconds_left_out = None if left_out is None else _seconds(source, left_out)
    _check_videos_of(source, truth.table, people.table if people else None, left_out)
    videos = sorted({*truth.table.texts["video"]} - {""})
    number = {name: i for i, name in enumerate(videos)}
    lists = [truth] if people is None else [truth, people.take(people.scores >= detection.min_score)]
    for boxes_of in lists:
        _check_extent(source, boxes_of)
        _check_times(source, boxes_of, detection.first_second)
    uris, frames = _find_videos(source, root, videos, truth.table)
    if not train and people is not None:  # only compared with; not the same boxes as the scored ones
        lists[0] = replace(truth, scores=np.full(len(truth.seconds), np.nan))
        lists[1] = replace(lists[1], actions=np.full(len(lists[1].seconds), -1))
    label = _known_labels(source, classes, np.concatenate([each.actions for each in lists]))
    source.stop_if_bad()

    keys = [_keys(boxes_of.table, boxes_of.seconds, number) for boxes_of in lists]
    if left_out is not None and seconds_left_out is not None:
        gone = _keys(left_out, seconds_left_out, number)
        kept = [~np.isin(key, gone) for key in keys]
        lists = [boxes_of.take(each) for boxes_of, each in zip(lists, kept, strict=True)]
        keys = [key[each] for key, each in zip(keys, kept, strict=True)]
    grouped = _group(lists, keys, label, merge=train)
    if train and not detection.negatives:
        grouped = grouped.take(grouped.labels > 0)
    if not len(grouped.keys):
        source.stop(source.path, None, "no key frame is left with a box; check the excluded key frames and min_score")
    return _rows(grouped, videos, uris, frames, detection.first_second), label


# Label maps -----------------------------------------------------------------------------------------------------------


def read_person_boxes(uri: str) -> PersonBoxes:
    """Read boxes of people whose videos and actions need not be known.

    The lines are those of person boxes, with or without action and score, or the same without the video:
    ``second,x1,y1,x2,y2``. The action has no meaning here.

    Raises:
        ManifestError: lists all problems.
    """
    source = ManifestSource(absolute(uri), {}, None, None, "", "ava")
    try:
        first = read_text(source, source.path, f"lines of {','.join(BOXES_COLUMNS)}").lstrip().partition("\n")[0]
        columns = PEOPLE_COLUMNS.get(first.count(",") + 1, BOXES_COLUMNS)
        table = _read_csv(source, source.path, columns)
        seconds, coordinates = _places(source, table)
        boxes = _Boxes(table, seconds, coordinates, np.full(len(seconds), -1), _scores(source, table))
        _check_extent(source, boxes)
        source.stop_if_bad()
    except StopReading:
        raise ManifestError(problem_lines(source)) from None
    names = [column for column in ("video", "second", *BOX) if column in columns]
    rows = np.unique(np.stack([table.codes[name] for name in names]), axis=1, return_index=True)[1]
    boxes = boxes.take(np.isin(np.arange(len(seconds)), rows))  # a box with several actions has several lines
    videos = None
    if "video" in columns:
        videos = tuple(boxes.table.text("video", row) for row in np.arange(len(boxes.seconds)))
    return PersonBoxes(videos, boxes.seconds, boxes.coordinates.astype(np.float32), boxes.scores)


def read_label_map(uri: str) -> dict[int, LabelMapEntry]:
    """Read the actions of a label map, by id.

    Raises:
        ManifestError: lists all problems.
    """
    source = ManifestSource(absolute(uri), {}, None, None, "", "ava")
    try:
        return _parse_label_map(source, source.path)
    except StopReading:
        raise ManifestError(problem_lines(source)) from None


def label_map_names(entries: Mapping[int, LabelMapEntry]) -> tuple[str, ...]:
    """The name of each class: of id 1, 2, and so on to the largest id."""
    return tuple(entries[i].name if i in entries else f"unnamed {i}" for i in range(1, max(entries) + 1))


def class_groups(entries: Mapping[int, LabelMapEntry]) -> dict[str, tuple[int, ...]]:
    """The classes (id - 1) of the groups ``pose``, ``object`` and ``person``, by the types of a label map.

    Groups without a class are left out; there are none if the map has no types.
    """
    groups = {group: tuple(i - 1 for i in sorted(entries) if entries[i].type == kind) for kind, group in GROUPS.items()}
    return {group: classes for group, classes in groups.items() if classes}


def _parse_label_map(source: ManifestSource, uri: str) -> dict[int, LabelMapEntry]:
    text = read_text(source, uri, EXPECTED_BLOCKS)
    entries, names = dict[int, LabelMapEntry](), set[str]()
    for line, fields in _blocks(source, uri, text):
        name, kind = fields.get("name", ""), fields.get("label_type", "")
        number = fields.get("id", fields.get("label_id"))
        if not name or number is None:
            source.problem(uri, line, f"a block without {'id' if name else 'name'}; expected {EXPECTED_BLOCKS}")
        elif not (re.fullmatch("[0-9]{1,9}", number) and 1 <= int(number) <= MAX_CLASSES):
            source.problem(
                uri, line, f"id {number} of {name!r} is not from 1 to {MAX_CLASSES}; number the actions 1, 2, 3, ..."
            )
        elif (found := entries.setdefault(int(number), LabelMapEntry(name, kind))).name != name or name in names:
            other = f"id {number} is {found.name!r} above" if found.name != name else "it is listed above"
            source.problem(uri, line, f"{name!r} has id {number}, but {other}; give each action one id")
        names.add(name)
    source.stop_if_bad()
    if not entries:
        source.stop(uri, 1, f"names no action; expected {EXPECTED_BLOCKS}")
    return entries


def _blocks(source: ManifestSource, uri: str, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the line and the fields of each block of a text-format protocol buffer."""
    tokens, line = list[tuple[int, str]](), 1
    for match in TOKEN.finditer(text):
        if match[1]:
            tokens.append((line, match[1]))
        line += match[0].count("\n")
    tokens.append((line, ""))  # the end
    place = 0

    def take(pattern: str) -> str | None:
        nonlocal place
        if not re.fullmatch(pattern, tokens[place][1]):
            return None
        place += 1
        return tokens[place - 1][1]

    def need(pattern: str) -> str:
        if (found := take(pattern)) is None:
            what = repr(tokens[place][1]) if tokens[place][1] else "the end of the file"
            source.stop(uri, tokens[place][0], f"{what} is not expected here; expected {EXPECTED_BLOCKS}")
        return found

    while tokens[place][1]:
        first, fields = tokens[place][0], dict[str, str]()
        need(r"\w+")
        take(":")
        need("{")
        while take("}") is None:
            key = need(r"\w+")
            need(":")
            value = need(r"""(["']).*\1|[\w.+-]+""")
            fields[key] = re.sub(r"\\(.)", r"\1", value[1:-1]).strip() if value[0] in "\"'" else value
            take("[,;]")
        yield first, fields


# CSV ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """The columns of a list. A column's texts are stored once, and each row has a number of its text.

    Attributes:
        lines: int64 ``[rows]``, line of each row in the file, from 1.
        codes: int32 ``[rows]`` of each column, index into ``texts``.
        texts: the different texts of each column, without blanks around them.
    """

    file: str
    lines: NDArray[np.int64]
    codes: dict[str, NDArray[np.int32]]
    texts: dict[str, list[str]]

    def take(self, rows: NDArray) -> _Table:
        """The table of some rows, given by index or by a mask."""
        codes = {column: code[rows] for column, code in self.codes.items()}
        return _Table(self.file, self.lines[rows], codes, self.texts)

    def text(self, column: str, row: np.signedinteger) -> str:
        """The text of a cell."""
        return self.texts[column][self.codes[column][row]]


def _read_csv(source: ManifestSource, uri: str, columns: tuple[str, ...]) -> _Table:
    """Read a list whose lines have these columns; the column ``person`` may be left out. Skips blank lines."""
    expected = f"lines of {','.join(columns)}"
    text = read_text(source, uri, expected)
    if not text.strip():
        source.stop(uri, 1, f"the file is empty; expected {expected}")
    if columns[-1] == "person" and text.lstrip().partition("\n")[0].count(",") == len(columns) - 2:
        columns = columns[:-1]
    skipped: list[int] = []

    def skip(row: pa.csv.InvalidRow) -> str:
        skipped.append(row.number)
        if row.text.strip():
            found = quantity(row.actual_columns, "column")
            source.problem(uri, row.number, f"has {found}, not {len(columns)}; expected {expected}")
        return "skip"

    texts_as_numbers = pa.dictionary(pa.int32(), pa.string())
    with source.reading(uri):
        table = pa.csv.read_csv(
            io.BytesIO(text.encode()),
            pa.csv.ReadOptions(column_names=columns, use_threads=False),  # rows have numbers only in one thread
            pa.csv.ParseOptions(quote_char=False, ignore_empty_lines=False, invalid_row_handler=skip),
            pa.csv.ConvertOptions(column_types=dict.fromkeys(columns, texts_as_numbers)),
        )
    codes, texts = dict[str, NDArray[np.int32]](), dict[str, list[str]]()
    for column in columns:
        whole = table[column].unify_dictionaries().combine_chunks()
        stripped: dict[str, int] = {}
        number = [stripped.setdefault(each.strip(), len(stripped)) for each in whole.dictionary.to_pylist()]
        codes[column], texts[column] = np.array(number, np.int32)[whole.indices.to_numpy()], [*stripped]
    lines = np.delete(np.arange(1, len(table) + len(skipped) + 1), np.array(skipped, np.int64) - 1)
    blank = np.logical_and.reduce([np.array([not each for each in texts[c]], bool)[codes[c]] for c in columns])
    return _Table(uri, lines, codes, texts).take(~blank)


def _numbers(texts: Sequence[str]) -> NDArray[np.float64]:
    """The numbers that texts are; NaN for other texts."""
    is_number = re.compile(NUMBER).fullmatch
    return np.array([float(text) if is_number(text) else np.nan for text in texts], np.float64)


def _refuse(source: ManifestSource, table: _Table, rows: NDArray, column: str, expected: str) -> None:
    """Report the cells of a column in some rows, given as a mask."""
    for row in np.flatnonzero(rows):
        source.problem(table.file, int(table.lines[row]), f"{column} {table.text(column, row)!r} {expected}")


# Checks ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Boxes:
    """The checked rows of a list of boxes.

    Attributes:
        seconds: int64 ``[rows]``.
        coordinates: float64 ``[rows, 4]``.
        actions: int64 ``[rows]``, id - 1; -1: none.
        scores: float64 ``[rows]``, 1 for the ground truth.
    """

    table: _Table
    seconds: NDArray[np.int64]
    coordinates: NDArray[np.float64]
    actions: NDArray[np.int64]
    scores: NDArray[np.float64]

    def take(self, rows: NDArray) -> _Boxes:
        """Some of the rows, given by a mask."""
        columns = (self.seconds, self.coordinates, self.actions, self.scores)
        return _Boxes(self.table.take(rows), *(column[rows] for column in columns))


def _read_boxes(source: ManifestSource, uri: str, columns: tuple[str, ...], classes: int) -> _Boxes:
    """Read a list of boxes and check each row by itself. Values of rows with problems have no meaning."""
    table = _read_csv(source, uri, columns)
    seconds, coordinates = _places(source, table)
    scored = "score" in columns
    ids = _numbers(table.texts["action"])
    missing = np.array([scored and text in NO_ACTION for text in table.texts["action"]], bool)
    known = (ids >= 1) & (ids <= classes) & (ids == np.floor(ids))
    also = ", or -1 for none" if scored else ""
    expected = f"is not an id of {source.classes}; expected 1 to {classes}{also}"
    _refuse(source, table, ~(known | missing)[table.codes["action"]], "action", expected)
    actions = np.where(known, ids, 0).astype(np.int64)[table.codes["action"]] - 1
    scores = _scores(source, table)
    _check_duplicates(source, table)
    return _Boxes(table, seconds, coordinates, actions, scores)


def _places(source: ManifestSource, table: _Table) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Check the columns of the key frame and the coordinates; returns the seconds and the coordinates."""
    seconds = _seconds(source, table)
    coordinates, bad = np.empty((len(table.lines), 4)), np.zeros(len(table.lines), bool)
    for i, column in enumerate(BOX):
        values = _numbers(table.texts[column])[table.codes[column]]
        coordinates[:, i] = values
        wrong = ~((values >= 0) & (values <= 1))
        _refuse(source, table, wrong & ~bad, column, "is not a fraction of the frame, 0 to 1")
        bad |= wrong
    coordinates[bad] = np.nan
    return seconds, coordinates


def _scores(source: ManifestSource, table: _Table) -> NDArray[np.float64]:
    """Check the scores; without a column of them they are 1."""
    if "score" not in table.texts:
        return np.ones(len(table.lines))
    scores = _numbers(table.texts["score"])[table.codes["score"]]
    _refuse(source, table, ~((scores >= 0) & (scores <= 1)), "score", "is not a number from 0 to 1")
    return scores


def _seconds(source: ManifestSource, table: _Table) -> NDArray[np.int64]:
    """Check the columns of the key frame; returns the seconds, -1 where there is a problem."""
    if "video" in table.texts:
        empty = np.array([not name for name in table.texts["video"]])
        _refuse(source, table, empty[table.codes["video"]], "video", "is empty")
    values = _numbers(table.texts["second"])
    good = (values >= 0) & (values < MAX_SECOND) & (values == np.floor(values))
    _refuse(source, table, ~good[table.codes["second"]], "second", f"is not a whole number from 0 to {MAX_SECOND - 1}")
    return np.where(good, values, -1).astype(np.int64)[table.codes["second"]]


def _check_duplicates(source: ManifestSource, table: _Table) -> None:
    """Report lines that repeat another one."""
    mixed = np.zeros(len(table.lines), np.uint64)
    for code in table.codes.values():
        mixed = (mixed + code.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # modulo 2^64
        mixed ^= mixed >> np.uint64(29)
    order = np.argsort(mixed, kind="stable")
    same = np.diff(mixed[order]) == 0
    repeated = np.zeros(len(mixed), bool)
    repeated[order[1:]] |= same
    repeated[order[:-1]] |= same
    seen: dict[tuple[int, ...], int] = {}
    for row in np.flatnonzero(repeated).tolist():
        cells = tuple(int(code[row]) for code in table.codes.values())
        if (first := seen.setdefault(cells, row)) != row:
            text = f"is the same as line {table.lines[first]}; keep one of the two"
            source.problem(table.file, int(table.lines[row]), text)


def _check_extent(source: ManifestSource, boxes: _Boxes) -> None:
    """Report boxes without an area."""
    for low, high in (0, 2), (1, 3):
        for row in np.flatnonzero(boxes.coordinates[:, high] <= boxes.coordinates[:, low]):
            text = f"{BOX[high]} {boxes.table.text(BOX[high], row)} is not more than {BOX[low]} "
            text += f"{boxes.table.text(BOX[low], row)}; expected the left, top, right and bottom edge of a box"
            source.problem(boxes.table.file, int(boxes.table.lines[row]), text)


def _check_times(source: ManifestSource, boxes: _Boxes, first_second: float) -> None:
    """Report key frames before the start of the videos."""
    early = np.flatnonzero((boxes.seconds >= 0) & (boxes.seconds < first_second))
    if len(early):
        what = f"second {boxes.seconds[early[0]]} is before the start of the video, detection.first_second"
        text = f"{what} {first_second:g}, as in {len(early)} of {len(boxes.seconds)} lines; correct one of the two"
        source.problem(boxes.table.file, int(boxes.table.lines[early[0]]), text)


def _first_rows(table: _Table) -> dict[str, int]:
    """The first row of each video."""
    codes, rows = np.unique(table.codes["video"], return_index=True)
    return {table.texts["video"][code]: int(row) for code, row in zip(codes, rows, strict=True)}


def _check_videos_of(source: ManifestSource, truth: _Table, people: _Table | None, excluded: _Table | None) -> None:
    """Report videos of the other lists that the ground truth does not have."""
    videos = _first_rows(truth)
    if people:
        for name, row in _first_rows(people).items():
            if name and name not in videos:
                text = f"video {name!r} is not in {truth.file}; give the person boxes of the same videos"
                source.problem(people.file, int(people.lines[row]), text)
    if excluded and not videos.keys() & _first_rows(excluded).keys():
        text = f"has no video of {truth.file}; give the excluded key frames of the same videos"
        source.problem(excluded.file, None, text)


def _known_labels(source: ManifestSource, classes: tuple[str, ...], actions: NDArray) -> NDArray[np.int64]:
    """The label of each class of the label map: its place in ``source.known``, if given. Actions below 0 are none."""
    if source.known is None:
        return np.arange(len(classes))
    index = ClassIndex(source.known.names)
    label = np.array([index.get(name) for name in classes])
    used = np.unique(actions)
    strange = [classes[i] for i in used[used >= 0] if label[i] < 0]
    if strange:
        what = f"{len(strange)} class{'es' * (len(strange) > 1)} not in {source.known.source}: {list_names(strange)}"
        source.problem(source.classes or "", None, f"{what}; {source.known.advice}")
    return label


def _evaluated_ids(source: ManifestSource, uri: str | None, entries: Mapping[int, LabelMapEntry]) -> list[int] | None:
    """The ids of the label map of the evaluated classes, which must be those of the same names; None: all."""
    if uri is None:
        return None
    evaluated = _parse_label_map(source, absolute(uri))
    for number, (name, _) in evaluated.items():
        known = entries.get(number)
        if known is None or same_name(known.name) != same_name(name):
            what = f"which is {known.name!r}" if known else "which is not"
            text = f"{name!r} has id {number}, {what} in {source.classes}; give both maps the same ids"
            source.problem(absolute(uri), None, text)
    return [*evaluated]


# Videos ---------------------------------------------------------------------------------------------------------------


def _find_videos(
    source: ManifestSource, root: str, videos: Sequence[str], truth: _Table
) -> tuple[list[str], list[int | None]]:
    """URI of each video, or template of its images, and number of images; see ``Manifest``. Reports missing ones."""
    with source.reading(root):
        try:
            system, path = storage.resolve(root)
            entries = system.get_file_info(pafs.FileSelector(path))
        except (FileNotFoundError, NotADirectoryError):
            source.stop(root, None, "no such folder; `root` must be the folder that holds the videos")
    folders = {entry.base_name for entry in entries if entry.type == pafs.FileType.Directory}
    files: dict[str, str] = {}
    for name in sorted(entry.base_name for entry in entries if entry.type == pafs.FileType.File):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in VIDEO_SUFFIXES:
            files.setdefault(stem, name)
    first = _first_rows(truth)
    uris, frames = [], list[int | None]()
    for video in videos:
        line, images = int(truth.lines[first[video]]), None
        if video in files:
            uris.append(storage.join(root, files[video]))
        elif video in folders:
            template, folder = escape_braces(video) + "_{:06d}.jpg", storage.join(root, video)
            row = ListingRow(truth.file, line, video, "")
            images = count_images(replace(source, template=template), row, folder)
            uris.append(storage.join(escape_braces(folder), template))
        elif source.missing_ok:
            uris.append(storage.join(root, f"{video}.mp4"))  # reading it fails later
        else:
            text = f"no video {video} in {root}: neither {video}.mp4 (or .mkv, .webm, ...) nor a folder of images"
            source.problem(truth.file, line, f"{text} {video}_000001.jpg; get it, or remove its lines from the lists")
            uris.append("")
        frames.append(images)
    return uris, frames


# Rows -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Grouped:
    """Boxes in the order of key frames.

    Attributes:
        keys: int64 ``[boxes]``, see ``_keys``.
        coordinates: float64 ``[boxes, 4]``.
        scores: float64 ``[boxes]``.
        labels: int64 ``[boxes]``, number of labels.
        label: int64, the labels of all boxes one after the other.
    """

    keys: NDArray[np.int64]
    coordinates: NDArray[np.float64]
    scores: NDArray[np.float64]
    labels: NDArray[np.int64]
    label: NDArray[np.int64]

    def take(self, boxes: NDArray[np.bool_]) -> _Grouped:
        """Some of the boxes, given by a mask."""
        label = self.label[np.repeat(boxes, self.labels)]
        return _Grouped(self.keys[boxes], self.coordinates[boxes], self.scores[boxes], self.labels[boxes], label)


def _keys(table: _Table, seconds: NDArray[np.int64], number: Mapping[str, int]) -> NDArray[np.int64]:
    """A number for each row's key frame, in the order of rows; negative if the video has no number."""
    videos = np.array([number.get(name, -1) for name in table.texts["video"]], np.int64)
    return videos[table.codes["video"]] * MAX_SECOND + seconds


def _group(
    lists: Sequence[_Boxes], keys: Sequence[NDArray[np.int64]], label: NDArray[np.int64], *, merge: bool
) -> _Grouped:
    """Join the rows of each box. ``merge``: boxes of different lists may be the same."""
    texts: dict[str, int] = {}
    corners = []
    for boxes in lists:
        shared = {c: np.array([texts.setdefault(t, len(texts)) for t in boxes.table.texts[c]], np.int64) for c in BOX}
        corners.append([shared[c][boxes.table.codes[c]] for c in BOX])
    x1, y1, x2, y2 = (np.concatenate(column) for column in zip(*corners, strict=True))
    key = np.concatenate(keys)
    part = 0 if merge else np.repeat(np.arange(len(lists)), [len(each) for each in keys])
    columns = (key * len(lists) + part, x1 * len(texts) + y1, x2 * len(texts) + y2)  # alike for rows of the same box

    order = np.lexsort(columns)  # stable: the first row of a box stays its first
    new = np.logical_or.reduce([np.diff(column[order], prepend=-1) != 0 for column in columns])
    first = order[new]
    order_of_boxes = np.lexsort((first, key[first]))
    rank = np.empty(len(first), np.int64)
    rank[order_of_boxes] = np.arange(len(first))
    box = np.empty(len(key), np.int64)  # of each row
    box[order] = rank[np.cumsum(new) - 1]
    first = first[order_of_boxes]

    action = np.concatenate([boxes.actions for boxes in lists])
    labelled = action >= 0
    width = label.max() + 1
    pairs = np.sort(box[labelled] * width + label[action[labelled]])
    pairs = pairs[np.diff(pairs, prepend=-1) != 0]
    labels = np.bincount(pairs // width, minlength=len(first))
    coordinates = np.concatenate([boxes.coordinates for boxes in lists])[first]
    scores = np.concatenate([boxes.scores for boxes in lists])[first]
    return _Grouped(key[first], coordinates, scores, labels, pairs % width)


def _rows(
    boxes: _Grouped, videos: Sequence[str], uris: Sequence[str], frames: Sequence[int | None], first_second: float
) -> pa.Table:
    """The table of the key frames."""
    keys, counts = np.unique(boxes.keys, return_counts=True)
    video, second = keys // MAX_SECOND, keys % MAX_SECOND
    ends = _offsets(counts)
    columns = {
        "sample_id": [f"{videos[v]},{s:04d}" for v, s in zip(video.tolist(), second.tolist(), strict=True)],
        "uri": pa.array(uris, pa.string()).take(pa.array(video)),
        "label": pa.nulls(len(keys), pa.int32()),
        "frames": pa.array(frames, pa.int32()).take(pa.array(video)),
        "time": second - first_second,
        "boxes": pa.ListArray.from_arrays(_offsets(counts * 4), boxes.coordinates.astype(np.float32).reshape(-1)),
        "actions": pa.ListArray.from_arrays(
            ends, pa.ListArray.from_arrays(_offsets(boxes.labels), boxes.label.astype(np.int32))
        ),
        "scores": pa.ListArray.from_arrays(ends, boxes.scores.astype(np.float32)),
    }
    return pa.table(columns, schema=DETECTION_SCHEMA)


def _offsets(counts: NDArray[np.int64]) -> pa.Array:
    """Where each list of a column starts, and the end."""
    return pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())


# Parquet --------------------------------------------------------------------------------------------------------------


def is_parquet(path: str) -> bool:
    """Whether a list is one of ``posmlp data shard`` or ``posmlp data check``, by its name."""
    return path.partition("?")[0].endswith(".parquet")


def list_metadata(
    classes: Sequence[str], section: SplitSection, detection: DetectionSection, split: Split
) -> dict[bytes, str]:
    """The metadata of rows that are written to Parquet: how their boxes were chosen, for ``read_detection_split``."""
    chosen = {"min_score": detection.min_score} | ({"negatives": detection.negatives} if split == "train" else {})
    told = {"train": split == "train", "chosen": chosen if section.boxes else {}}
    return {b"classes": json.dumps(classes), b"boxes": json.dumps(told)}


def _check_lists_of_parquet(source: ManifestSource, section: SplitSection) -> None:
    """Report lists that a list in Parquet has used already."""
    for key in ("boxes", "excluded"):
        if getattr(section, key) is not None:
            text = f"the key frames and boxes of a Parquet list are chosen already; leave `{key}` out of its section"
            source.problem(source.path, None, f"{text}, as in data.train={source.path}")


def _read_parquet(
    source: ManifestSource, root: str, detection: DetectionSection, classes: tuple[str, ...], train: bool
) -> tuple[pa.Table, NDArray[np.int64]]:
    """The rows of a list in Parquet, and the label of each class of the label map."""
    require_kind(source, source.path, "file", "a list of `posmlp data shard`")
    with source.reading(source.path):
        system, place = storage.resolve(source.path)
        with system.open_input_file(place) as file:
            table = pq.read_table(file)
    _check_list_metadata(source, table.schema.metadata or {}, detection, classes, train)
    table = _checked_columns(source, table)
    _check_rows(source, table, len(classes))
    uris = [storage.join(root, uri) for uri in table["uri"].to_pylist()]
    rows = [ListingRow(source.path, i, uri, "") for i, uri in enumerate(uris)]
    inside = [storage.is_inside(uri, root) for uri in uris]
    _refuse_rows(
        source, table, ~np.array(inside, bool), f"has a uri outside {root}; set `root` to a folder of all videos"
    )
    source.stop_if_bad()
    found = [True] * len(uris) if source.missing_ok else are_files(source, uris)
    advice = f"has a uri without a file in {root}; `root` is the list's folder for a list of `posmlp data shard`"
    _refuse_rows(source, table, ~np.array(found, bool), advice)
    source.stop_if_bad()
    if not source.missing_ok:
        check_parquet_rows(source, rows, uris)
    actions = table["actions"].combine_chunks()
    of_boxes = actions.flatten()
    flat = of_boxes.flatten().to_numpy(zero_copy_only=False)
    label = _known_labels(source, classes, flat)
    source.stop_if_bad()

    ends, inner = actions.offsets, of_boxes.offsets
    mapped = pa.ListArray.from_arrays(ends, pa.ListArray.from_arrays(inner, pa.array(label[flat], pa.int32())))
    columns = {name: table[name] for name in DETECTION_SCHEMA.names} | {"uri": uris, "actions": mapped}
    kept = {key: value for key, value in (table.schema.metadata or {}).items() if key not in (b"classes", b"boxes")}
    return pa.table(columns, schema=DETECTION_SCHEMA.with_metadata(kept)), label


def _check_list_metadata(
    source: ManifestSource,
    metadata: Mapping[bytes, bytes],
    detection: DetectionSection,
    classes: tuple[str, ...],
    train: bool,
) -> None:
    """Check that a list has the classes of the label map, and boxes that were chosen as the recipe chooses them."""
    if not {b"classes", b"boxes"} <= metadata.keys():
        source.stop(source.path, None, "is no list of key frames; `posmlp data shard RECIPE` writes one")
    names, told = json.loads(metadata[b"classes"]), json.loads(metadata[b"boxes"])
    if tuple(names) != classes:
        differ = [f"{a!r} and {b!r}" for a, b in zip(names, classes, strict=False) if a != b]
        what = f"class {differ[0]}" if differ else f"{len(names)} and {len(classes)} classes"
        source.problem(
            source.path, None, f"differs from {source.classes}: {what}; use the label map it was written with"
        )
    if told["train"] != train:
        has, needs = ("training", "validation or test") if told["train"] else ("validation or test", "training")
        source.problem(
            source.path, None, f"has the boxes of {has}, not of {needs}; give it to the split it was made for"
        )
        return
    for key, value in told["chosen"].items():
        if (now := getattr(detection, key)) != value:
            text = f"its boxes were chosen with detection.{key}={value}, not {now}; set this, or write the list again"
            source.problem(source.path, None, text)


def _checked_columns(source: ManifestSource, table: pa.Table) -> pa.Table:
    """The columns of ``DETECTION_SCHEMA``, without gaps; a list without ``frames`` has video files."""
    missing = [name for name in DETECTION_SCHEMA.names if name not in table.column_names and name not in OPTIONAL]
    if missing:
        source.stop(source.path, None, f"has no column {', '.join(missing)}; `posmlp data shard RECIPE` writes them")
    for name in OPTIONAL:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table), pa.int32()))
    try:
        table = table.select(DETECTION_SCHEMA.names).cast(DETECTION_SCHEMA.with_metadata(table.schema.metadata))
    except (pa.ArrowException, ValueError) as error:
        source.stop(source.path, None, f"has columns of other types ({error}); expected those of `posmlp data shard`")
    if not len(table):
        source.stop(source.path, None, "has no key frames")
    for name in DETECTION_SCHEMA.names:
        if name not in OPTIONAL:
            _refuse_rows(source, table, table[name].is_null().to_numpy(), f"has no {name}")
    source.stop_if_bad()
    return table.combine_chunks()


def _check_rows(source: ManifestSource, table: pa.Table, classes: int) -> None:
    """Report rows whose values cannot be those of key frames."""
    samples, times = table["sample_id"].to_pylist(), table["time"].to_numpy()
    first: dict[str, int] = {}
    again = np.array([first.setdefault(sample, i) != i for i, sample in enumerate(samples)])
    _refuse_rows(source, table, again, "is there twice; keep one of the two")
    odd = np.array([re.fullmatch(r".+,[0-9]{4,6}", sample, re.DOTALL) is None for sample in samples])
    _refuse_rows(source, table, odd, "has another sample_id than VIDEO,SECOND")
    _refuse_rows(source, table, ~(np.isfinite(times) & (times >= 0)), "has a time that is no number from 0")
    boxes, scores, actions = (table[name].combine_chunks() for name in ("boxes", "scores", "actions"))
    counts, of_actions, of_boxes = (pa.compute.list_value_length(each).to_numpy() for each in (scores, actions, boxes))
    uneven = (counts < 1) | (of_actions != counts) | (of_boxes != 4 * counts)
    _refuse_rows(source, table, uneven, "needs four coordinates, a score and a list of actions for each box")
    if uneven.any():
        return
    row = np.repeat(np.arange(len(table)), counts)
    corners, score = boxes.flatten().to_numpy(zero_copy_only=False).reshape(-1, 4), scores.flatten().to_numpy()
    good = (corners >= 0).all(1) & (corners <= 1).all(1) & (corners[:, 2:] > corners[:, :2]).all(1)
    _refuse_rows(
        source, table, np.isin(np.arange(len(table)), row[~good]), "has a box that is not x1 < x2, y1 < y2 in 0..1"
    )
    good = np.isnan(score) | ((score >= 0) & (score <= 1))
    _refuse_rows(source, table, np.isin(np.arange(len(table)), row[~good]), "has a score that is not from 0 to 1")
    of_actions = actions.flatten()
    numbers = of_actions.flatten().to_numpy(zero_copy_only=False)
    of_number = np.repeat(row, pa.compute.list_value_length(of_actions).to_numpy())
    strange = np.isin(np.arange(len(table)), of_number[(numbers < 0) | (numbers >= classes)])
    _refuse_rows(source, table, strange, f"has an action that is not a class, 0 to {classes - 1}")


def _refuse_rows(source: ManifestSource, table: pa.Table, bad: NDArray[np.bool_], what: str) -> None:
    """Report some rows, given as a mask."""
    for i in np.flatnonzero(bad):
        source.problem(source.path, None, f"row {i}, {table['sample_id'][int(i)].as_py()}, {what}")
