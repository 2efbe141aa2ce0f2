"""The list of a split's videos: a CSV file or a class-per-folder tree becomes checked rows and class names."""

import csv
import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pyarrow as pa

from posmlp.errors import UserError

SCHEMA = pa.schema([("sample_id", pa.string()), ("uri", pa.string()), ("label", pa.int32())])
VIDEO_SUFFIXES = (
    *(".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogg"),
    *(".ogv", ".ts", ".webm", ".wmv"),
)
SHOWN = 20  # problems that a message lists


@dataclass(frozen=True)
class Manifest:
    """One split of a data set.

    Attributes:
        rows: columns ``sample_id: string`` (unique), ``uri: string`` (absolute path), ``label: int32``.
        classes: the name of each label, over the whole data set and not only over ``rows``.
    """

    rows: pa.Table
    classes: tuple[str, ...]


class ManifestError(UserError):
    """A manifest that cannot be used. The message counts every problem and lists the first ones.

    Attributes:
        problems: every problem, one line each, with file and line number.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        count = len(self.problems)
        lines = [f"{count} problem{'s' * (count > 1)} in the manifest:", *self.problems[:SHOWN]]
        if count > SHOWN:
            lines.append(f"... and {count - SHOWN} more")
        return "\n  ".join(lines)


def read_manifest(path: str | Path, where: Mapping[str, str] = {}) -> Manifest:
    """Read and check the videos of a split.

    A **CSV file** (UTF-8, comma-separated, with header) has the columns ``path`` and ``label``, optionally ``class``,
    and any others to filter by. Paths are absolute or relative to the file's folder; a path as written is the
    ``sample_id``. Labels are integers from 0 without gaps, or, when no label is an integer, class names, which get ids
    in sorted order. ``class`` names the labels. Classes come from the whole file, so splits filtered from one file
    agree; that a video exists is checked for the rows kept.

    A **folder** is a tree ``class/**/video``; class names are sorted, the path below the folder is the ``sample_id``.
    Other files and hidden ones are ignored; links to folders inside a class folder are not followed.

    Args:
        path: the CSV file or the folder.
        where: keep the rows whose columns have these values; CSV only.

    Raises:
        ManifestError: lists everything that is wrong.
    """
    path = Path(os.path.abspath(path))
    if path.is_dir():
        return _read_folder(path, where)
    if path.is_file():
        return _read_csv(path, where)
    raise ManifestError([f"{path}: no such file or folder; expected a CSV file or a class-per-folder tree of videos"])


def _table(sample_ids: list[str], uris: list[str], labels: list[int]) -> pa.Table:
    return pa.table({"sample_id": sample_ids, "uri": uris, "label": labels}, schema=SCHEMA)


# Folder ---------------------------------------------------------------------------------------------------------------


def _read_folder(root: Path, where: Mapping[str, str]) -> Manifest:
    problems = []
    if where:
        problems.append(f"{root}: `where` needs the columns of a CSV file, but this is a folder; remove `where`")
    entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    problems += [
        f"{entry}: lies in no class folder; move it to {root.name}/<class>/"
        for entry in entries
        if entry.is_file() and _is_video(entry.name)
    ]
    folders = [entry for entry in entries if entry.is_dir()]
    if not folders:
        problems.append(f"{root}: has no class folders; expected {root.name}/<class>/<video>")
    sample_ids, labels = [], []
    for label, folder in enumerate(folders):
        videos = sorted(_videos(folder))
        if not videos:
            problems.append(f"{folder}: holds no videos ({' '.join(VIDEO_SUFFIXES)}); add some or remove it")
        for video in videos:
            sample_id = video.relative_to(root).as_posix()
            if not _is_utf8(sample_id):
                problems.append(f"{os.fsencode(video)!r}: the name is not valid UTF-8; rename it")
            sample_ids.append(sample_id)
            labels.append(label)
    if problems:
        raise ManifestError(problems)
    return Manifest(_table(sample_ids, [str(root / i) for i in sample_ids], labels), tuple(f.name for f in folders))


def _videos(folder: Path) -> Iterable[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if _is_video(name))


def _is_video(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# CSV ------------------------------------------------------------------------------------------------------------------


@dataclass
class _Csv:
    """A CSV file while it is checked: its rows with line numbers, and the problems found so far."""

    path: Path
    header: list[str] = field(default_factory=list)
    rows: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    problems: list[tuple[int, str]] = field(default_factory=list)

    def problem(self, line: int, text: str) -> None:
        self.problems.append((line, text))

    def stop_if_bad(self) -> None:
        if self.problems:
            ordered = sorted(self.problems, key=lambda problem: problem[0])  # a stable sort: file order inside a line
            raise ManifestError([f"{self.path}:{line}: {text}" for line, text in ordered])


def _read_csv(path: Path, where: Mapping[str, str]) -> Manifest:
    file = _Csv(path)
    _parse(file)
    labels, classes = _labels(file)
    kept = [
        (line, row, label)
        for (line, row), label in zip(file.rows, labels, strict=True)
        if all(row[column] == str(value) for column, value in where.items() if column in row)
    ]
    _check_where(file, where, bool(kept))
    uris = _check_paths(file, {line for line, _, _ in kept})
    file.stop_if_bad()
    return Manifest(
        _table([row["path"] for _, row, _ in kept], [uris[line] for line, _, _ in kept], [label for *_, label in kept]),
        classes,
    )


def _parse(file: _Csv) -> None:
    """Fill header and rows. Without a usable header nothing else can be checked, so that raises at once."""
    content = file.path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        file.problem(content.count(b"\n", 0, error.start) + 1, "not UTF-8 text; expected a CSV file, saved as UTF-8")
        file.stop_if_bad()
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for cells in reader:
            row = [cell.strip() for cell in cells]
            if not file.header:
                if not any(row):
                    continue
                file.header = row
                _check_header(file, line)
            elif any(row) and len(row) == len(file.header):
                file.rows.append((line, dict(zip(file.header, row, strict=True))))
            elif any(row):
                file.problem(
                    line, f"{len(row)} values where the header has {len(file.header)}; quote values with commas"
                )
            line = reader.line_num + 1  # where the next row starts: a quoted value may span lines
    except csv.Error as error:
        file.problem(line, f"malformed CSV ({error}); check the quotes")
    if not file.header:
        file.problem(line, "no header; the first line must name the columns, path,label at least")
    elif not file.rows and not file.problems:
        file.problem(line, "no rows; expected one line per video below the header")
    if not file.rows:
        file.stop_if_bad()


def _check_header(file: _Csv, line: int) -> None:
    missing = [name for name in ("path", "label") if name not in file.header]
    if missing:
        found = ",".join(file.header)
        found = found if len(found) <= 80 else found[:80] + "..."
        file.problem(
            line, f"no column {' and no column '.join(missing)}; expected the header path,label, found {found}"
        )
    for name in sorted({name for name in file.header if file.header.count(name) > 1}):
        file.problem(line, f"column {name!r} appears twice; rename or remove one")
    file.stop_if_bad()


def _labels(file: _Csv) -> tuple[list[int], tuple[str, ...]]:
    """The label of each row and the name of each label; meaningless once there are problems."""
    texts = [row["label"] for _, row in file.rows]
    if any(_is_int(text) for text in texts):
        labels = [int(text) if _is_int(text) else -1 for text in texts]
        for (line, _), text in zip(file.rows, texts, strict=True):
            if not _is_int(text):
                file.problem(line, f"label {text!r} is not an integer, as other labels here are; use one kind")
            elif int(text) < 0:
                file.problem(line, f"label {text} is negative; labels count from 0")
        names = [row.get("class", text) for (_, row), text in zip(file.rows, texts, strict=True)]
        used = {label for label in labels if label >= 0}
        gaps = list(islice((i for i in range(max(used, default=0)) if i not in used), 11))
        if gaps and not file.problems:  # a misread label would look like a gap
            listed = ", ".join(map(str, gaps[:10])) + (", ..." if len(gaps) > 10 else "")
            file.problem(1, f"no row has label {listed}, yet labels go up to {max(used)}; number them 0, 1, 2, ...")
    else:
        ids = {name: i for i, name in enumerate(sorted(set(texts)))}
        labels = [ids[text] for text in texts]
        for (line, _), text in zip(file.rows, texts, strict=True):
            if not text:
                file.problem(line, "label is empty; expected an integer from 0 or a class name")
        names = [row.get("class", text) for (_, row), text in zip(file.rows, texts, strict=True)]
    _check_names(file, labels, names)
    named = dict(zip(labels, names, strict=True))
    return labels, tuple(named[label] for label in sorted(named))


def _is_int(text: str) -> bool:
    return text.isascii() and text.removeprefix("-").isdigit()


def _check_names(file: _Csv, labels: list[int], names: list[str]) -> None:
    """One name per label and one label per name."""
    if "class" not in file.header:
        return
    name_of: dict[int, tuple[str, int]] = {}
    label_of: dict[str, tuple[int, int]] = {}
    for (line, row), label, name in zip(file.rows, labels, names, strict=True):
        if not name:
            file.problem(line, "class is empty; name it, or leave out the column")
            continue
        if label < 0:
            continue
        known, first = name_of.setdefault(label, (name, line))
        if known != name:
            file.problem(line, f"label {row['label']} is class {name!r} here, but {known!r} in line {first}")
        other, first = label_of.setdefault(name, (label, line))
        if other != label:
            file.problem(line, f"class {name!r} has label {row['label']} here, but another in line {first}")


def _check_where(file: _Csv, where: Mapping[str, str], found: bool) -> None:
    unknown = [column for column in where if column not in file.header]
    for column in unknown:
        file.problem(1, f"no column {column!r} to filter by (`where`); columns are {', '.join(file.header)}")
    if where and not unknown and not found:
        wanted = " and ".join(f"{column}={value}" for column, value in where.items())
        there = "; ".join(f"{column} is {_some({row[column] for _, row in file.rows})}" for column in where)
        file.problem(1, f"no row has {wanted} (`where`); in the file {there}")


def _some(values: set[str]) -> str:
    return ", ".join(sorted(values)[:10]) + (", ..." if len(values) > 10 else "")


def _check_paths(file: _Csv, kept: set[int]) -> dict[int, str]:
    """The absolute path of each line; one video may stand in one line only, and those in ``kept`` lines must exist."""
    uris: dict[int, str] = {}
    first: dict[str, int] = {}
    for line, row in file.rows:
        if not row["path"]:
            file.problem(line, "path is empty; expected the path of a video")
            continue
        uri = uris[line] = str(file.path.parent / row["path"])
        if first.setdefault(uri, line) != line:
            file.problem(line, f"path {row['path']!r} stands in line {first[uri]} already; keep one of the two")
        elif line in kept and not os.path.isfile(uri):
            file.problem(line, f"no video file {uri}; paths are relative to the manifest's folder")
    return uris
