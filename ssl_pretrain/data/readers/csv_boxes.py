"""Boxes in a table, one a row: `filename,class,xmin,ymin,xmax,ymax`, or `x,y,w,h`, by the names of the columns.

Corners are edges in pixels. Where all numbers of a table are at most 1 they are fractions of the image (Open Images).
An image whose rows have no box (RetinaNet's csv leaves them empty) shows no object.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ssl_pretrain.data.files import escape
from ssl_pretrain.data.gathering import Gathering, Objects
from ssl_pretrain.data.readers import LabelledSet, number
from ssl_pretrain.data.tables import Row, Table, columns_of, read_all, read_table, tables_in
from ssl_pretrain.errors import DataError

LAYOUT = "a table (csv, tsv) with columns of an image, a class and a box (xmin..ymax, or x, y, w, h)"


def recognise(root: Path) -> bool:
    """Whether there is a table with columns of an image, a class and a box."""
    return bool(tables_in(root, _fits, every=False))


def read(root: Path) -> LabelledSet:
    """Every image that a table has, with its boxes."""
    paths = tables_in(root, _fits, every=True)
    if not paths:
        raise DataError(f"{escape(str(root))} has no table (csv, tsv) with columns of an image, a class and a box")
    gathering = Gathering("csv_boxes", "box")
    tables = [read_table(path, gathering.problems) for path in paths]
    fractions = {table.path for table in tables if _fractions(table)}
    for path in sorted(fractions):
        gathering.problems.append(f"{escape(path.name)}: no number is above 1: taken for fractions of the image")

    def take(table: Table, row: Row, where: str, objects: Objects) -> None:
        _take(table, row, where, objects, objects.size_px if table.path in fractions else (1, 1))

    return read_all(root, tables, gathering, take)


def _fits(path: Path, rows: Sequence[Row]) -> bool:
    columns = columns_of(rows[0].cells) if rows else None
    return (
        columns is not None
        and columns.geometry in ("corners", "size", "centre")
        and columns.image is not None
        and columns.label is not None
    )


def _cells(table: Table, row: Row) -> list[str]:
    return [row.cells[column] for column in table.columns.numbers]


def _fractions(table: Table) -> bool:
    """No box in pixels fits into the first pixel, so this is sure."""
    highest = 0.0
    for row in table.rows:
        try:
            highest = max([highest, *map(number, _cells(table, row))])
        except ValueError:
            continue
    return 0 < highest <= 1


def _take(table: Table, row: Row, where: str, objects: Objects, scale: tuple[int, int]) -> None:
    label, cells = row.cells[table.columns.label or 0], _cells(table, row)
    if not any(cells) and not label:
        return  # the image is listed, and shows nothing
    try:
        a, b, c, d = map(number, cells)
    except ValueError:
        objects.lost(where, label, "malformed box")
        return
    if table.columns.geometry == "size":
        c, d = a + c, b + d
    elif table.columns.geometry == "centre":
        a, b, c, d = a - c / 2, b - d / 2, a + c / 2, b + d / 2
    objects.box(where, label, a * scale[0], b * scale[1], c * scale[0], d * scale[1])
