"""Tables in and out: csv always, xlsx where openpyxl is installed.

A csv may have a byte order mark and commas, semicolons or tabs. All cells are read as text. What is written has the
same bytes whenever it is written.
"""

from __future__ import annotations

import csv
import io
import math
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ssl_pretrain.data.files import Rejected, escape, read_bytes
from ssl_pretrain.errors import DataError, UsageError

MAX_BYTES = 64 << 20
"""Of a csv, and of all parts of an xlsx together once unpacked."""
INSTALL = "needs openpyxl, which is not installed: pip install 'ssl-pretrain[data]', or use .csv"
IMAGE_COLUMNS = ("image_name", "image", "file_name", "filename", "name")
_EPOCH = (1980, 1, 1, 0, 0, 0)


class Table(NamedTuple):
    """A header and its rows; a row is as long as the header."""

    header: list[str]
    rows: list[list[str]]


def read(path: Path) -> Table:
    """The table in a .csv (.tsv, .txt) or .xlsx; empty rows are skipped. Raises `DataError`, `UsageError`."""
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv", ".txt", ".xlsx"):
        raise UsageError(f"{escape(str(path))}: tables are .csv or .xlsx")
    try:
        data = read_bytes(path, MAX_BYTES)
    except Rejected as why:
        raise DataError(f"{escape(str(path))} cannot be read: {why.reason}, {why.detail}") from why
    name = escape(path.name)
    rows = _xlsx_rows(data, name) if suffix == ".xlsx" else _csv_rows(data, name)
    rows = [[cell.strip() for cell in row] for row in rows]
    rows = [row for row in rows if any(row)]
    if len(rows) < 2:
        raise DataError(f"{name} has no rows below its header")
    width = max(len(row) for row in rows)
    rows = [row + [""] * (width - len(row)) for row in rows]
    return Table(rows[0], rows[1:])


def image_column(table: Table, name: str) -> int:
    """The column of image names. Raises `DataError` when there is none, or more than one."""
    found = [i for i, title in enumerate(table.header) if re.sub(r"[\s-]+", "_", title.lower()) in IMAGE_COLUMNS]
    if len(found) == 1:
        return found[0]
    if not found and not table.header[0]:  # what pandas writes for an index, as the data set's own scripts do
        raise DataError(f"{name}: its first column has no name; if it holds the images, call it image_name")
    listed = ", ".join(escape(title) for title in table.header)
    raise DataError(f"{name} needs one column image_name; it has: {listed}")


def write(header: Sequence[str], rows: Sequence[Sequence[str | float]], suffix: str) -> bytes:
    """The bytes of a .csv or .xlsx; NaN becomes an empty cell. Raises `UsageError` without openpyxl."""
    empty = [["" if isinstance(cell, float) and math.isnan(cell) else cell for cell in row] for row in rows]
    if suffix == ".csv":
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([list(header), *empty])
        return text.getvalue().encode()
    if suffix != ".xlsx":
        raise UsageError(f"tables are written as .csv or .xlsx, not {escape(suffix) or 'without a suffix'}")
    return _xlsx(header, empty)


def _csv_rows(data: bytes, name: str) -> list[list[str]]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8: save it as csv UTF-8") from error
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(",;\t", key=first.count)
    try:
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise DataError(f"{name} is not a csv that can be read: {escape(str(error))}") from error


def _xlsx_rows(data: bytes, name: str) -> list[list[str]]:
    try:
        import openpyxl
    except ModuleNotFoundError as error:
        raise UsageError(f"{name} {INSTALL}") from error
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > MAX_BYTES:
            raise DataError(f"{name} unpacks to {unpacked} bytes; the limit is {MAX_BYTES}")
        book = openpyxl.load_workbook(io.BytesIO(data), data_only=True)
        sheets = [[list(row) for row in sheet.iter_rows(values_only=True)] for sheet in book.worksheets]
    except DataError:
        raise
    except Exception as error:  # on broken files openpyxl raises whatever its parsers happen to hit
        raise DataError(f"{name} is not an xlsx that can be read: {escape(str(error))[:200]}") from error
    filled = [sheet for sheet in sheets if any(cell is not None for row in sheet for cell in row)]
    if len(filled) > 1:
        raise DataError(f"{name} has {len(filled)} sheets with rows: keep the one that is meant")
    return [["" if cell is None else str(cell) for cell in row] for sheet in filled for row in sheet]


def _xlsx(header: Sequence[str], rows: Sequence[Sequence[str | float]]) -> bytes:
    try:
        import openpyxl
    except ModuleNotFoundError as error:
        raise UsageError(f"a .xlsx {INSTALL}") from error
    book = openpyxl.Workbook()
    sheet = book.worksheets[0]
    for i, row in enumerate([list(header), *rows], 1):
        for j, value in enumerate(row, 1):
            cell = sheet.cell(i, j)
            cell.value = None if value == "" else value
            if isinstance(value, str) and value:
                cell.data_type = "s"  # a name that begins with = is no formula
    sheet.freeze_panes = "B2"
    written = io.BytesIO()
    book.save(written)
    return _timeless(written.getvalue())


def _timeless(data: bytes) -> bytes:
    """The archive without the time at which it was made."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            part = old.read(name)
            if name == "docProps/core.xml":
                part = re.sub(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", b"1980-01-01T00:00:00Z", part)
            member = zipfile.ZipInfo(name, _EPOCH)
            member.compress_type = zipfile.ZIP_DEFLATED
            new.writestr(member, part)
    return out.getvalue()
