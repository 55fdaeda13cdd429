"""Points in tables: one for all images (image, x, y, class), Cric's `classifications.json`, or one an image (Cervix93).

- A table with a header: columns of an image, a class, x and y, in pixels.
- Cric: a list of `{image_name, classifications: [{bethesda_system, nucleus_x, nucleus_y}]}`, or the same as csv. Its
  coordinates count from 1, so 1 is taken off wherever the columns are called `nucleus_x` and `nucleus_y`.
- Cervix93: `frame000.csv` beside `frame000.png`, without a header, row before column (y, x). No class is given: all
  are called `point`. A `labels.csv` with `frame` and `set`, beside it or one folder up, gives the split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssl_pretrain.data.files import SUFFIXES, Rejected, escape, scan
from ssl_pretrain.data.gathering import Gathering, Objects
from ssl_pretrain.data.lookup import first_files, unlabelled
from ssl_pretrain.data.readers import LabelledSet, number, size_or_none
from ssl_pretrain.data.tables import (
    HEAD_BYTES,
    TABLES,
    Columns,
    Row,
    Table,
    columns_of,
    head,
    numbers,
    read_all,
    read_json,
    read_rows,
    read_table,
    tables_in,
)  # fmt: skip
from ssl_pretrain.errors import DataError

LAYOUT = "a table (csv, json) of image, x, y, class, or x.csv of lines `row,column` beside x.png"
_CLASS = "point"
_CRIC = ("image_name", "bethesda_system", "nucleus_x", "nucleus_y")


def recognise(root: Path) -> bool:
    """Whether there is a table of points for all images, or the first tables beside images hold two numbers a line."""
    return bool(tables_in(root, _fits, every=False) or _cric_files(root) or _beside(root, every=False))


def read(root: Path) -> LabelledSet:
    """Every image that a table is about, with its points as boxes without size."""
    gathering = Gathering("point_table", "point")
    tables = [read_table(path, gathering.problems) for path in tables_in(root, _fits, every=True)]
    have = {table.path.with_suffix("") for table in tables}
    for path in _cric_files(root):
        if path.with_suffix("") in have:
            gathering.problems.append(f"{escape(path.name)}: not read, {escape(path.stem)}.csv says the same")
        else:
            tables.append(_cric(path, gathering.problems))
    beside = _beside(root, every=True)
    if tables and beside:
        raise DataError(
            f"{escape(tables[0].path.name)} and {escape(beside[0])} both have points: give the one that is meant, "
            "a table or the folder of images with a csv each, instead of the folder"
        )
    if tables:
        return read_all(root, tables, gathering, _take)
    if not beside:
        raise DataError(f"{escape(str(root))} has no table of points: image, x, y and class, or x.csv beside x.png")
    return _read_beside(root, beside, gathering)


def _fits(path: Path, rows: Sequence[Row]) -> bool:
    columns = columns_of(rows[0].cells) if rows else None
    return (
        columns is not None and columns.geometry == "point" and columns.image is not None and columns.label is not None
    )


def _take(table: Table, row: Row, where: str, objects: Objects) -> None:
    label = row.cells[table.columns.label or 0]
    try:
        x, y = (number(row.cells[column]) for column in table.columns.numbers)
    except ValueError:
        objects.lost(where, label, "malformed point")
        return
    from_1 = table.columns.names[table.columns.numbers[0]].lower() == "nucleus_x"
    objects.point(where, label, x - from_1, y - from_1)


# --- Cric -------------------------------------------------------------------------------------------------------------


def _cric_files(root: Path) -> list[Path]:
    paths = [root] if root.is_file() else [root / "classifications.json"]
    return [path for path in paths if path.suffix.lower() == ".json" and path.is_file() and _starts_as_cric(path)]


def _starts_as_cric(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(HEAD_BYTES)
    except OSError:
        return False
    return start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[") and b'"classifications"' in start


def _cric(path: Path, problems: list[str]) -> Table:
    """As the csv would say it. Raises `DataError`."""
    try:
        data = read_json(path)
    except Rejected as why:
        raise DataError(f"{escape(path.name)} cannot be read: {why.detail}") from why
    rows: list[Row] = []
    for i, entry in enumerate(data if isinstance(data, list) else [], 1):
        cells = entry.get("classifications") if isinstance(entry, dict) else None
        if not isinstance(cells, list) or not isinstance(entry.get("image_name"), str):
            problems.append(f"{escape(path.name)}: image {i} left out, it has no image_name or no classifications")
            continue
        rows += [Row(i, [entry["image_name"], *_cric_cell(cell)]) for cell in cells]
    return Table(path, Columns(0, 1, None, None, "point", (2, 3), _CRIC), rows)


def _cric_cell(cell: Any) -> list[str]:
    """Class, x and y; what is malformed becomes text that is no number."""
    if not isinstance(cell, dict):
        return ["", "", ""]
    label = cell.get("bethesda_system")
    try:
        x, y = numbers([cell.get("nucleus_x"), cell.get("nucleus_y")])
    except ValueError:
        return [label if isinstance(label, str) else "", "", ""]
    return [label if isinstance(label, str) else "", repr(x), repr(y)]


# --- Cervix93 ---------------------------------------------------------------------------------------------------------


def _beside(root: Path, every: bool) -> list[str]:
    """Names of images, relative to `root`, that have a table of two numbers a line beside them."""
    if not root.is_dir():
        return []
    if not every:
        return [
            name for name in first_files(root, TABLES, each=5, depth=1) if _image_of(root, name) and _pairs(root, name)
        ]
    return (
        [name for name in scan([root]).names if (root / name).with_suffix(".csv").is_file()]
        if _beside(root, False)
        else []
    )


def _image_of(root: Path, table: str) -> bool:
    path = root / table
    return any(path.with_suffix(end).is_file() for suffix in SUFFIXES for end in (suffix, suffix.upper()))


def _pairs(root: Path, table: str) -> bool:
    try:
        rows = head(root / table)
        return bool(rows) and all(len([number(cell) for cell in row.cells]) == 2 for row in rows)
    except ValueError:
        return False


def _read_beside(root: Path, names: Sequence[str], gathering: Gathering) -> LabelledSet:
    problems = gathering.problems
    splits = _splits(root)
    used: dict[str, str] = {}
    for name in names:
        path = (root / name).with_suffix(".csv")
        if str(path) in used:
            problems.append(f"{escape(name)}: left out, {escape(used[str(path)])} has the same table")
            continue
        used[str(path)] = name
        size_px = size_or_none(root / name, problems, name)
        if size_px is None:
            continue
        try:
            rows = read_rows(path)
        except Rejected as why:
            problems.append(f"{escape(path.name)}: left out with its image, cannot be read ({why.detail})")
            continue
        if not rows:
            problems.append(f"{escape(path.name)}: empty label file (no objects)")
        objects = gathering.objects(size_px)
        for row in rows:
            where = f"{escape(path.name)}: line {row.line}"
            try:
                y, x = map(number, row.cells)
            except ValueError:
                objects.lost(where, _CLASS, "not two numbers, row and column")
                continue
            objects.point(where, _CLASS, x, y)
        gathering.add(root / name, name, objects, split=splits.get(path.stem))
    labelled = [image.path.relative_to(root).as_posix() for image in gathering.images]
    problems += unlabelled(scan([root]).names, {*names, *labelled})
    done = gathering.done()
    return replace(done, found=f"{done.found}; the tables name no class, so all are called {_CLASS!r}")


def _splits(root: Path) -> dict[str, str]:
    """The split of each frame by Cervix93's `labels.csv`: set 0 is for training, 1 for the test."""
    for folder in (root, root.parent):
        path = folder / "labels.csv"
        rows = head(path, rows=100_000) if path.is_file() else []
        columns = columns_of(rows[0].cells) if rows else None
        if columns is not None and columns.image is not None and columns.split is not None:
            width = max(columns.image, columns.split)
            said = {"0": "train", "1": "test"}
            return {
                Path(row.cells[columns.image]).stem: said[row.cells[columns.split]]
                for row in rows[1:]
                if len(row.cells) > width and row.cells[columns.split] in said
            }
    return {}
