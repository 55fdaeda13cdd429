"""A class for each image in a table: `train.csv` with `image_name,class_name,...`, or `B_28,0` without a header.

Known: HiCervix (`{train,val,test}.csv` beside folders of that name; its `class_name` is taken, the levels are not),
FNAC2019 and CSD lists (no header: image, class), AML-Cytomorphology's `annotations.dat` (path, class, second opinions,
parted by spaces), Cervix93's `labels.csv` (`frame,label,set`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ssl_pretrain.data.files import SUFFIXES, Rejected, escape
from ssl_pretrain.data.gathering import Gathering, Objects
from ssl_pretrain.data.readers import LabelledSet
from ssl_pretrain.data.tables import Columns, Row, Table, columns_of, read_all, read_rows, read_table, tables_in
from ssl_pretrain.errors import DataError

LAYOUT = "a table (csv, tsv, dat) of image and class"
_BARE = ("images", "image", "train", "val", "valid", "test", ".")


def recognise(root: Path) -> bool:
    """Whether there is a table with columns of an image and a class, and neither boxes nor points.

    Without a header, the first column must name images that are there, or the table could be anything.
    """
    return bool(tables_in(root, _fits, every=False))


def read(root: Path) -> LabelledSet:
    """Every image that a table has, with its class."""
    paths = tables_in(root, _fits, every=True)
    if not paths:
        raise DataError(f"{escape(str(root))} has no table (csv, tsv, dat) with columns of an image and a class")
    gathering = Gathering("csv_labels", "image")
    return read_all(root, [_table(path, gathering.problems) for path in paths], gathering, _take)


def _fits(path: Path, rows: Sequence[Row]) -> bool:
    return bool(rows) and (_named(columns_of(rows[0].cells)) or _bare(path, rows))


def _named(columns: Columns) -> bool:
    return columns.geometry == "none" and columns.image is not None and columns.label is not None


def _bare(path: Path, rows: Sequence[Row]) -> bool:
    """Whether every one of the first rows starts with an image that is there and goes on with a class."""
    return all(len(row.cells) >= 2 and row.cells[1] and _is_there(path.parent, row.cells[0], path.stem) for row in rows)


def _is_there(folder: Path, name: str, stem: str) -> bool:
    """Looked for by a few names, without listing a folder."""
    suffix = Path(name).suffix.lower()
    endings = [""] if suffix in SUFFIXES else sorted(SUFFIXES | {suffix.upper() for suffix in SUFFIXES})
    try:
        return any((folder / place / (name + end)).is_file() for place in (*_BARE, stem) for end in endings)
    except (OSError, ValueError):  # too long, a NUL
        return False


def _table(path: Path, problems: list[str]) -> Table:
    try:
        rows = read_rows(path)
    except Rejected as why:
        raise DataError(f"{escape(path.name)} cannot be read: {why.detail}") from why
    if rows and _named(columns_of(rows[0].cells)):
        return read_table(path, problems)
    width = max((len(row.cells) for row in rows), default=2)
    if width > 2:
        problems.append(
            f"{escape(path.name)}: no header, so column 2 is taken for the class; {width - 2} more not used"
        )
    columns = Columns(0, 1, None, None, "none", (), ("",) * width)
    return read_table(path, problems, columns)


def _take(table: Table, row: Row, where: str, objects: Objects) -> None:
    label = row.cells[table.columns.label or 0]
    if not label:
        objects.lost(where, label, "it has no class")
    elif objects.labels:
        objects.lost(where, label, f"the image has a class already ({objects.labels[0]})")
    else:
        objects.whole(label)
