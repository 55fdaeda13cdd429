"""Label files as text: JSON, and tables in the dialects that spreadsheets and scripts leave behind.

A table may have a BOM, be parted by comma, semicolon, tab, bar or white space, have a header or none, and columns that
stay empty at the end. What cannot be read raises `files.Rejected`; the reason here, beside those of `files`, is
`malformed`.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ssl_pretrain.data.files import Rejected, escape, read_bytes, scan
from ssl_pretrain.data.gathering import Gathering, Objects
from ssl_pretrain.data.lookup import MANY, Lookup, first_files, split_word, unlabelled
from ssl_pretrain.data.readers import SPLIT_WORDS, LabelledSet, size_or_none
from ssl_pretrain.errors import DataError

MAX_LABEL_BYTES = 1 << 30
HEAD_BYTES = 1 << 16
TABLES = frozenset({".csv", ".tsv", ".dat"})

IMAGE = (
    "filename", "imagefilename", "imagename", "imagefile", "imgname", "imagepath", "imgpath", "filepath", "file",
    "path", "image", "img", "imageid", "frame",
)  # fmt: skip
LABEL = (
    "classname", "labelname", "categoryname", "label", "class", "category", "bethesdasystem", "diagnosis", "celltype",
    "classid", "labelid", "categoryid",
)  # fmt: skip
SPLIT = ("split", "set", "subset", "partition", "phase")
GROUP = ("group", "patient", "patientid", "slide", "slideid", "case", "caseid")
CORNERS = (
    ("xmin", "ymin", "xmax", "ymax"), ("x0", "y0", "x1", "y1"), ("x1", "y1", "x2", "y2"),
    ("left", "top", "right", "bottom"), ("bboxxmin", "bboxymin", "bboxxmax", "bboxymax"),
)  # fmt: skip
SIZES = (
    ("x", "y", "w", "h"), ("x", "y", "width", "height"), ("xmin", "ymin", "width", "height"),
    ("left", "top", "width", "height"), ("bboxx", "bboxy", "bboxw", "bboxh"),
    ("bboxx", "bboxy", "bboxwidth", "bboxheight"),
)  # fmt: skip
CENTRES = (("cx", "cy", "w", "h"), ("xcenter", "ycenter", "width", "height"), ("xcentre", "ycentre", "width", "height"))
POINTS = (("nucleusx", "nucleusy"), ("x", "y"), ("xcenter", "ycenter"), ("cx", "cy"), ("pointx", "pointy"))

Geometry = Literal["corners", "size", "centre", "point", "none"]


class Row(NamedTuple):
    """One line of a table."""

    line: int
    """From 1; of a record over several lines the last."""
    cells: list[str]


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are, by their names; the numbers count from 0, None where there is none."""

    image: int | None
    label: int | None
    split: int | None
    group: int | None
    geometry: Geometry
    numbers: tuple[int, ...]
    """The columns of the geometry, x first."""
    names: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table and what its columns are."""

    path: Path
    columns: Columns
    rows: list[Row]
    """Without the header."""


def read_json(path: Path, max_bytes: int = MAX_LABEL_BYTES) -> Any:
    """What the file says; NaN and infinity may be in it (`numbers` refuses them). Raises `Rejected`."""
    try:
        return json.loads(read_bytes(path, max_bytes))
    except RecursionError as error:
        raise Rejected("malformed", "JSON that is nested too deep") from error
    except ValueError as error:  # not JSON, not UTF-8, an integer of thousands of digits
        raise Rejected("malformed", f"not JSON ({escape(str(error))[:200]})") from error


def numbers(value: object, count: int | None = None) -> list[float]:
    """A list of finite numbers from JSON, where true is none; raises `ValueError`.

    >>> numbers([1, 2.5], 2)
    [1.0, 2.5]
    """
    if not isinstance(value, list) or (count is not None and len(value) != count):
        raise ValueError("not a list of numbers" if count is None else f"not {count} numbers")
    for item in value:
        # an integer beyond all floats would overflow
        if type(item) not in (int, float) or not -1e300 < item < 1e300:
            raise ValueError("not a finite number")
    return [float(item) for item in value]


def whole_number(value: object) -> int | None:
    """An id from JSON: 3 and 3.0 are 3; None for what is not a whole number."""
    if type(value) is int:
        return value
    return int(value) if isinstance(value, float) and math.isfinite(value) and value.is_integer() else None


def head(path: Path, rows: int = 5) -> list[Row]:
    """The first rows of a table, by its first 64 KiB; none when it is not a table."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            data = file.read(HEAD_BYTES)
        text = _decoded(data[: data.rfind(b"\n") + 1] if len(data) == HEAD_BYTES else data)
        return _rows(text)[:rows]
    except (OSError, ValueError, TypeError, Rejected):  # TypeError: a pipe without a writer gives None
        return []


def read_rows(path: Path, max_bytes: int = MAX_LABEL_BYTES) -> list[Row]:
    """All rows that say something. Raises `Rejected`; an empty file has no rows."""
    try:
        return _rows(_decoded(read_bytes(path, max_bytes)))
    except Rejected as why:
        if why.reason == "empty":
            return []
        raise


def _decoded(data: bytes) -> str:
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"  # the former is Excel's
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise Rejected("malformed", f"not UTF-8 text (byte {error.start})") from error


def _rows(text: str) -> list[Row]:
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(",;\t|", key=first.count)
    if delimiter not in first:
        split = ((i, line.split()) for i, line in enumerate(text.splitlines(), 1))
        return [Row(i, cells) for i, cells in split if cells]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    rows = []
    try:
        for cells in reader:
            stripped = [cell.strip() for cell in cells]
            if any(stripped):
                rows.append(Row(reader.line_num, stripped))
    except csv.Error as error:
        raise Rejected("malformed", f"line {reader.line_num}: {escape(str(error))}") from error
    return rows


def columns_of(header: Sequence[str]) -> Columns:
    """What the columns are; corners go before width and height, which may be the image's then.

    >>> columns_of(["image_name", "class_name", "x", "y", "w", "h"]).geometry
    'size'
    """
    plain = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in header]

    def first(names: Iterable[str]) -> int | None:
        return next((plain.index(name) for name in names if name in plain), None)

    geometry: Geometry = "none"
    places: tuple[int, ...] = ()
    kinds: tuple[tuple[Geometry, tuple[tuple[str, ...], ...]], ...] = (
        ("corners", CORNERS), ("size", SIZES), ("centre", CENTRES), ("point", POINTS),
    )  # fmt: skip
    for kind, choices in kinds:
        for choice in choices:
            if geometry == "none" and all(name in plain for name in choice):
                geometry, places = kind, tuple(plain.index(name) for name in choice)
    return Columns(first(IMAGE), first(LABEL), first(SPLIT), first(GROUP), geometry, places, tuple(header))


def tables_in(root: Path, fits: Callable[[Path, list[Row]], bool], every: bool) -> list[Path]:
    """The tables in `root` and one folder below (or `root` itself, when it is a file) whose first rows fit.

    Unless `every`, a few of each folder are looked at and the first that fits is enough.
    """
    if root.is_file():
        return [root] if root.suffix.lower() in TABLES and fits(root, head(root)) else []
    found = []
    for name in first_files(root, TABLES, each=MANY if every else 20, depth=1):
        if fits(root / name, head(root / name)):
            found.append(root / name)
            if not every:
                break
    return found


def read_table(path: Path, problems: list[str], columns: Columns | None = None) -> Table:
    """A table with a header, or with the columns that are given. Raises `DataError` when it cannot be read.

    A row with more cells than columns is left out and said; one with fewer is filled up with empty cells.
    """
    try:
        rows = read_rows(path)
    except Rejected as why:
        raise DataError(f"{escape(path.name)} cannot be read: {why.detail}") from why
    if columns is None:
        columns = columns_of(rows[0].cells if rows else [])
        rows = rows[1:]
    width, kept = len(columns.names), []
    for row in rows:
        if any(row.cells[width:]):
            problems.append(f"{escape(path.name)}: line {row.line} left out, {len(row.cells)} cells in {width} columns")
        else:
            kept.append(Row(row.line, row.cells[:width] + [""] * (width - len(row.cells))))
    return Table(path, columns, kept)


def read_all(
    root: Path,
    tables: Sequence[Table],
    gathering: Gathering,
    take: Callable[[Table, Row, str, Objects], None],
) -> LabelledSet:
    """Finds the image of every row and lets `take(table, row, where, objects)` tell its object.

    Raises `DataError` when two tables are about the same image: which of them is meant is the user's to say.
    """
    base = root if root.is_dir() else root.parent
    names = scan([base]).names
    if not names and root.is_file():
        base = base.parent
        names = scan([base]).names
    lookup, problems = Lookup(names), gathering.problems
    used: dict[str, Path] = {}
    for table in tables:
        folder = table.path.parent.relative_to(base).as_posix()
        folder = "" if folder == "." else f"{folder}/"
        near = [f"{folder}{table.path.stem}", folder.rstrip("/"), f"{folder}images", "images"]
        for name, rows in _by_image(table, lookup, near, problems, gathering).items():
            if name in used:
                raise DataError(
                    f"{escape(used[name].name)} and {escape(table.path.name)} are both about {escape(name)}: "
                    "give the one that is meant instead of the folder"
                )
            used[name] = table.path
            size_px = size_or_none(base / name, problems, name)
            objects = gathering.objects(size_px or (0, 0))
            for row in rows:
                where = f"{escape(table.path.name)}: line {row.line}"
                if size_px is None:
                    _count(row, table, gathering)
                else:
                    take(table, row, where, objects)
            if size_px is not None:
                group = _cell(rows[0], table.columns.group) or None
                gathering.add(base / name, name, objects, group=group, split=_split(table, rows, name, problems))
    problems += gathering.group_by_folder() + unlabelled(names, used)
    return gathering.done()


def _by_image(
    table: Table, lookup: Lookup, near: list[str], problems: list[str], gathering: Gathering
) -> dict[str, list[Row]]:
    """The rows of each image, in the table's order; a line for each image that is not there, with its rows."""
    found: dict[str, list[Row]] = {}
    answers: dict[str, tuple[str, str]] = {}
    missing: Counter[str] = Counter()
    for row in table.rows:
        wanted = _cell(row, table.columns.image)
        if wanted not in answers:
            try:
                answers[wanted] = lookup.find(wanted, near, split_word(table.path.stem)), ""
            except ValueError as why:
                answers[wanted] = "", str(why)
        name, why_not = answers[wanted]
        if name:
            found.setdefault(name, []).append(row)
        else:
            missing[why_not] += 1
            _count(row, table, gathering)
    for why_not, count in missing.items():
        problems.append(f"{escape(table.path.name)}: {count} rows left out, {why_not}")
    return found


def _count(row: Row, table: Table, gathering: Gathering) -> None:
    if label := _cell(row, table.columns.label):  # a row without one only lists its image
        gathering.annotated[escape(label)] += 1


def _cell(row: Row, column: int | None) -> str:
    return "" if column is None else row.cells[column]


def _split(table: Table, rows: Sequence[Row], name: str, problems: list[str]) -> str | None:
    """By a column, or else by the name of the table, its folder's or the image's."""
    said: Mapping[str, str] = {**SPLIT_WORDS, "0": "train", "1": "test"}  # Cervix93: set 0 train, 1 test
    values = {_cell(row, table.columns.split).lower() for row in rows} - {""}
    if len(values) > 1 or not values <= said.keys():
        problems.append(
            f"{escape(table.path.name)}: no split for {escape(name)}, which has {escape(' '.join(sorted(values)))}"
        )
        return None
    if values:
        return said[values.pop()]
    return split_word(table.path.stem) or split_word(table.path.parent.name)
