"""Data sets of micro-expressions: CASME II, SAMM, SMIC-HS, and their composite of MEGC2019.

The first two are folders of frames and an Excel workbook, the coding file, with a row per micro-expression: subject,
folder, numbers of the onset, apex and offset frame, emotion. SMIC-HS is a tree of cut clips; its long form SMIC-E has a
workbook. A row of a manifest is a micro-expression from onset to offset. Sources:

- CASME II: Yan et al., PLOS ONE 9(1), 2014, doi:10.1371/journal.pone.0086041; CASME2-coding-20140508.xlsx
- SAMM: Davison et al., IEEE Transactions on Affective Computing 9(1), 2018; SAMM_Micro_FACS_Codes_v2.xlsx
- SMIC: Li et al., FG 2013, doi:10.1109/FG.2013.6553717; SMIC-HS-E_annotation.xlsx
- MEGC2019: See et al., FG 2019, doi:10.1109/FG.2019.8756611
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import ParseError

import pyarrow.fs as pafs

from posmlp import storage
from posmlp.video.classes import ClassIndex, number_or_name, whole
from posmlp.video.formats import Listing, ListingRow, ManifestSource, class_names, path_kind, require_kind, warn_once

HEADER_ROWS = 60  # in which the header is looked for: SAMM's is row 14
MAX_UNPACKED = 2**28  # bytes of a workbook's content; the published ones have less than 1 MB
OLD_WORKBOOK = b"\xd0\xcf\x11\xe0"  # first bytes of an .xls file
# What openpyxl and zipfile raise for a damaged file, found by changing bytes; NotImplementedError is an unknown
# compression. Each becomes a problem of the file, with the error's text.
UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, ParseError, EOFError, KeyError, IndexError, AttributeError),
    *(ValueError, TypeError, NotImplementedError, RuntimeError),
)
COLUMNS = ("subject", "dataset", "path", "emotion")  # of every list here; a workbook adds those of ``MORE_COLUMNS``
# What a workbook has besides, by the letters and digits of its header
MORE_COLUMNS = {"apexframe": "apex", "actionunits": "action_units", "objectiveclasses": "objective_classes"}


@dataclass(frozen=True)
class FaceSet:
    """A data set of micro-expressions.

    Attributes:
        title: for messages.
        digits: of a subject's number as published.
        folder: of a micro-expression's frames, a template of subject (as published) and file name.
        emotions: those that occur, as published.
        classes: those of its usual protocol.
        spans: names of the columns with onset and offset; several micro-expressions in a row have several.
        emotion: name of the column with the emotion.
        megc: the class of each emotion in the composite; the other emotions are not in it.
        not_in_megc: folders that are not in the composite either.
    """

    title: str
    digits: int
    folder: str
    emotions: tuple[str, ...]
    classes: tuple[str, ...]
    spans: tuple[tuple[str, str], ...]
    emotion: str
    megc: Mapping[str, str]
    not_in_megc: tuple[str, ...] = ()

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns that its workbook must have."""
        return ("Subject", "Filename", *self.spans[0], self.emotion)


MEGC_CLASSES = ("negative", "positive", "surprise")
NEGATIVE = ("anger", "contempt", "disgust", "fear", "sadness")
SETS = {
    "casme2": FaceSet(
        title="CASME II",
        digits=2,
        folder="sub{subject}/{name}",
        emotions=("disgust", "fear", "happiness", "others", "repression", "sadness", "surprise"),
        classes=("disgust", "happiness", "others", "repression", "surprise"),
        spans=(("OnsetFrame", "OffsetFrame"),),
        emotion="Estimated Emotion",
        megc={"happiness": "positive", "surprise": "surprise", "disgust": "negative", "repression": "negative"},
        not_in_megc=("sub04/EP12_01f", "sub05/EP09_05f"),
    ),
    "samm": FaceSet(
        title="SAMM",
        digits=3,
        folder="{subject}/{name}",
        emotions=("Anger", "Contempt", "Disgust", "Fear", "Happiness", "Other", "Sadness", "Surprise"),
        classes=("Anger", "Contempt", "Happiness", "Other", "Surprise"),
        spans=(("Onset Frame", "Offset Frame"),),
        emotion="Estimated Emotion",
        megc={"happiness": "positive", "surprise": "surprise", **dict.fromkeys(NEGATIVE, "negative")},
    ),
    "smic": FaceSet(
        title="SMIC-HS",
        digits=2,
        folder="{prefix}/{name}",
        emotions=MEGC_CLASSES,
        classes=MEGC_CLASSES,
        spans=(("OnsetF", "OffsetF"), ("Onset2F", "Offset2F"), ("Onset3F", "Offset3F")),
        emotion="Emotion",
        megc={name: name for name in MEGC_CLASSES},
    ),
}
SAMM_ONLY = {"duration", "objectiveclasses"}  # tells its header from that of CASME II
SMIC_SUBJECT = re.compile(r"s0*([0-9]+)")  # folder of a subject


# What a row becomes ---------------------------------------------------------------------------------------------------


class Selection:
    """Which micro-expressions of a data set are used, and as which class; counts the others.

    Args:
        key: of ``SETS``.
    """

    def __init__(self, source: ManifestSource, key: str):
        self.source, self.set, self.key = source, SETS[key], key
        composite = source.format == "megc"
        own = {emotion.lower(): emotion for emotion in self.set.emotions}
        self.meaning = self.set.megc if composite else own  # class of an emotion
        self.classes = class_names(source) or (MEGC_CLASSES if composite else self.set.classes)
        self.left_out = self.set.not_in_megc if composite else ()
        self.index, self.rows, self.dropped = ClassIndex(self.classes), 0, Counter[str]()

    def class_of(self, file: str, line: int | None, emotion: str, path: str) -> str | None:
        """The class of a micro-expression; None if it is left out. An unknown emotion is a problem.

        Args:
            path: of its folder.
        """
        self.rows += 1
        lower = emotion.lower()
        lower = "other" if (self.key, lower) == ("samm", "others") else lower
        if lower not in (known.lower() for known in self.set.emotions):
            expected = ", ".join(self.set.emotions)
            self.source.problem(
                file, line, f"{self.set.emotion} {emotion!r} of {path}; {self.set.title} has {expected}"
            )
            return None
        name = self.meaning.get(lower)
        if name is None or self.index.get(name) < 0:
            self.dropped[emotion] += 1
        elif path in self.left_out:
            self.dropped[path] += 1
        else:
            return name
        return None

    def listing(self, rows: list[ListingRow], folder: str, columns: Sequence[str]) -> Listing:
        """The listing of the used rows. What is left out is said in a warning."""
        if not rows and not self.source.problems:
            self.source.problem(self.source.path, None, f"no row has one of the classes {', '.join(self.classes)}")
        if self.dropped:
            counts = ", ".join(f"{name} {count}" for name, count in self.dropped.most_common())
            whole = "the composite of MEGC2019" if self.source.format == "megc" else ", ".join(self.classes)
            left = f"{self.dropped.total()} of {self.rows} micro-expressions are left out, which {whole} does not have"
            warn_once(f"{self.source.path}: {left}: {counts}")
        return Listing(rows, folder, tuple(columns), self.classes, series=True, span_names=("onset", "offset"))


def subject_number(face_set: FaceSet, cell: Any) -> str | None:
    """The subject as published, such as ``006``, of a number or a text with one; None if it is neither."""
    match = re.fullmatch(r"(?:sub|s)?0*([0-9]{1,9})(?:\.0)?", str(cell).strip().lower())
    return f"{int(match[1]):0{face_set.digits}d}" if match else None


# Parsers --------------------------------------------------------------------------------------------------------------


def _casme2(source: ManifestSource) -> Listing:
    """CASME II: path is CASME2-coding-20140508.xlsx, root has ``sub01/EP02_01f/img46.jpg`` (raw) or
    ``.../reg_img46.jpg`` (cropped). Classes: disgust, happiness, others, repression, surprise."""
    return _coded(source, ("casme2",))


def _samm(source: ManifestSource) -> Listing:
    """SAMM: path is SAMM_Micro_FACS_Codes_v2.xlsx, root has ``006/006_1_2/006_05562.jpg``. Classes: Anger, Contempt,
    Happiness, Other, Surprise."""
    return _coded(source, ("samm",))


def _smic(source: ManifestSource) -> Listing:
    """SMIC-HS: path is the folder ``HS`` with ``s1/micro/negative/s1_ne_01/*.bmp``, whose clips are cut from onset to
    offset; or SMIC-HS-E_annotation.xlsx, and root has ``s20/s20_ne_01/image17581039.jpg``. A row of the workbook with
    several onsets gives several rows."""
    return _cut_smic(source) if path_kind(source, source.path) == "folder" else _coded(source, ("smic",))


def _megc(source: ManifestSource) -> Listing:
    """A part of the composite of MEGC2019: path is that of ``casme2``, ``samm`` or ``smic``, told by what it is.

    Classes: negative, positive, surprise.
    """
    return _cut_smic(source) if path_kind(source, source.path) == "folder" else _coded(source, tuple(SETS))


def _coded(source: ManifestSource, keys: tuple[str, ...]) -> Listing:
    """The micro-expressions of a coding file of one of the data sets."""
    file = source.path
    sheet = find_sheet(source, file, keys)
    selection = Selection(source, sheet.key)
    face_set = selection.set
    more = [name for name in MORE_COLUMNS if name in sheet.columns]
    spans = [span for span in face_set.spans if {simplify(name) for name in span} <= {*sheet.columns}]
    rows = []
    for line, cells in sheet.rows:
        first = {name: _text(cells.get(simplify(name))) for name in ("Subject", "Filename", face_set.emotion)}
        if not any(first.values()):
            continue
        subject, name = subject_number(face_set, first["Subject"]), first["Filename"]
        if subject is None or not name:
            what = "Filename is empty" if subject else f"Subject {first['Subject']!r} is not a number"
            source.problem(file, line, f"{what}; expected a row with Subject, Filename and {face_set.emotion}")
            continue
        path = face_set.folder.format(subject=subject, name=name, prefix=name.partition("_")[0])
        emotion = first[face_set.emotion]
        label = selection.class_of(file, line, emotion, path)
        if label is None:
            continue
        values = (f"{sheet.key}/{subject}", sheet.key, path, emotion, *(_text(cells.get(each)) for each in more))
        for number, (onset, offset) in enumerate(spans):
            span = _frame(cells.get(simplify(onset))), _frame(cells.get(simplify(offset)))
            if number and span == ("", ""):
                continue
            rows.append(ListingRow(file, line, path, label, values=values, first=span[0], last=span[1]))
    columns = (*COLUMNS, *(MORE_COLUMNS[name] for name in more))
    return selection.listing(rows, storage.parent(file), columns)


def _cut_smic(source: ManifestSource) -> Listing:
    """The cut clips of SMIC-HS."""
    root = source.path
    expected = "SMIC's folder HS with s1/micro/negative/s1_ne_01, s2/micro/..., ..."
    require_kind(source, root, "folder", expected)
    subjects = [(name, match[1]) for name in _subfolders(source, root) if (match := SMIC_SUBJECT.fullmatch(name))]
    if not subjects:
        found = ", ".join(_subfolders(source, root)[:10]) or "no folders"
        source.stop(root, None, f"has no folders of subjects; expected {expected}, found {found}")
    selection, rows = Selection(source, "smic"), []
    for folder, number in subjects:
        micro = f"{folder}/micro"
        for emotion in _subfolders(source, storage.join(root, micro)):
            for clip in _subfolders(source, storage.join(root, f"{micro}/{emotion}")):
                path = f"{micro}/{emotion}/{clip}"
                label = selection.class_of(storage.join(root, f"{micro}/{emotion}"), None, emotion, path)
                if label is not None:
                    values = (f"smic/{int(number):02d}", "smic", path, emotion)
                    rows.append(ListingRow(storage.join(root, path), None, path, label, values=values))
    return selection.listing(rows, root, COLUMNS)


def _subfolders(source: ManifestSource, uri: str) -> list[str]:
    """The sorted names of the folders in a folder, without hidden ones."""
    with source.reading(uri):
        system, path = storage.resolve(uri)
        infos = system.get_file_info(pafs.FileSelector(path))
    names = [info.base_name for info in infos if info.type == pafs.FileType.Directory]
    return sorted(name for name in names if not name.startswith("."))


# Workbooks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sheet:
    """The table of a coding file.

    Attributes:
        key: of ``SETS``.
        columns: names of the columns (``simplify``).
        rows: the number of each row below the header, counted from 1, and its cells by column.
    """

    key: str
    columns: tuple[str, ...]
    rows: list[tuple[int, dict[str, Any]]]


def simplify(name: Any) -> str:
    """The letters and digits of a column's name, in small letters: ``onsetframe`` of ``Onset Frame``."""
    return re.sub(r"[^a-z0-9]", "", str(name).lower()) if name is not None else ""


def find_sheet(source: ManifestSource, uri: str, keys: Sequence[str]) -> Sheet:
    """Find the table of one of some data sets in a workbook, by the names of its columns.

    Stops if there is none, or if the file is not a workbook.
    """
    wanted = ", or ".join(", ".join(SETS[key].needed) for key in keys)
    expected = f"an Excel workbook (.xlsx) with the columns {wanted}"
    closest: list[str] = []
    for rows in read_workbook(source, uri, expected):
        for number, row in enumerate(rows[:HEADER_ROWS]):
            names = [simplify(cell) for cell in row]
            fitting = [key for key in SETS if {simplify(name) for name in SETS[key].needed} <= {*names}]
            if not fitting:
                told = [str(cell) for cell in row if cell is not None]
                closest = max(closest, told, key=lambda cells: len({simplify(c) for c in cells} & ALL_NEEDED))
                continue
            key = fitting[0] if len(fitting) == 1 else "samm" if SAMM_ONLY & {*names} else "casme2"
            if key not in keys:
                text = f"this is a coding file of {SETS[key].title}; set `format` to {key}"
                source.stop(uri, number + 1, text)
            twice = {simplify(name) for name in SETS[key].needed if names.count(simplify(name)) > 1}
            if twice:
                source.stop(uri, number + 1, f"column {min(twice)!r} appears twice; rename or remove one")
            columns = {name: i for i, name in reversed([*enumerate(names)]) if name}
            cells = [{name: row[i] for name, i in columns.items() if i < len(row)} for row in rows]
            numbered = [*enumerate(cells, 1)][number + 1 :]
            return Sheet(key, tuple(columns), numbered)
    found = {simplify(cell) for cell in closest}
    lacking = [[name for name in SETS[key].needed if simplify(name) not in found] for key in keys]
    missing = ", ".join(sorted(lacking, key=len)[0])
    what = f"no column {missing}" if found & ALL_NEEDED else "no row names the columns"
    source.stop(uri, None, f"{what}; expected {expected}, found {_shorten(', '.join(closest) or 'nothing')}")


ALL_NEEDED = {simplify(name) for each in SETS.values() for name in each.needed}


def read_workbook(source: ManifestSource, uri: str, expected: str) -> list[list[tuple[Any, ...]]]:
    """Read the rows of the sheets of a workbook. Stops if it cannot be read, or has no sheet."""
    import openpyxl  # not imported by runs that need no workbook
    from openpyxl.utils.exceptions import InvalidFileException

    require_kind(source, uri, "file", expected)
    with source.reading(uri):
        content = storage.read_bytes(uri)
    if content.startswith(OLD_WORKBOOK):
        source.stop(uri, None, "an old or encrypted Excel workbook; save it as .xlsx, without a password")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            size = sum(part.file_size for part in packed.infolist())
        if size > MAX_UNPACKED:
            source.stop(
                uri, None, f"its content has {size / 1e6:.0f} MB, too much for a coding file; expected {expected}"
            )
        workbook = openpyxl.load_workbook(io.BytesIO(content), read_only=True, data_only=True)
        sheets = []
        for sheet in workbook.worksheets:
            sheet.reset_dimensions()  # they may be written wrongly
            sheets.append([tuple(row) for row in sheet.iter_rows(values_only=True)])
    except (*UNREADABLE, InvalidFileException) as error:
        reason = " ".join(str(error).split())
        source.stop(uri, None, f"not an Excel workbook, or damaged ({reason}); expected {expected}")
    if not any(sheets):
        source.stop(uri, None, f"the workbook has no sheet with cells; expected {expected}")
    return sheets


def _text(cell: Any) -> str:
    """A cell as text; a whole number without a point."""
    return "" if cell is None else str(whole(cell) if isinstance(cell, float) else cell).strip()


def _frame(cell: Any) -> int | float | str:
    """The number in a cell, otherwise its text."""
    return number_or_name(_text(cell))


def _shorten(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."


PARSERS: dict[str, Callable[[ManifestSource], Listing]] = {
    "casme2": _casme2,
    "samm": _samm,
    "smic": _smic,
    "megc": _megc,
}
