"""MATLAB files of two data sets, ISBI 2014 and Cx22, whose images are inside them or have to be cut from others.

A reader writes nothing, so `read` refuses and names the command that does: `extract` writes PNG images with COCO JSON,
which the reader `coco` reads.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from ssl_pretrain.data import cx22, extracting, isbi2014
from ssl_pretrain.data.files import escape
from ssl_pretrain.data.readers import LabelledSet
from ssl_pretrain.errors import DataError

LAYOUT = f"{isbi2014.LAYOUT}; {cx22.LAYOUT}"
_SETS: tuple[ModuleType, ...] = (isbi2014, cx22)


def recognise(root: Path) -> bool:
    """Whether the files of one of the two data sets are there."""
    return _data_set(root) is not None


def read(root: Path) -> LabelledSet:
    """Always raises `DataError`: the images are no files of their own yet."""
    found = _data_set(root)
    name = found.NAME if found else "isbi2014"
    raise DataError(
        f"{escape(str(root))} has its images inside MATLAB files, or cut from others: write them out with "
        f"'ssl-pretrain datasets read {name} ROOT --as coco --out DIR' and read DIR"
    )


def extract(root: Path, out: Path) -> LabelledSet:
    """Writes PNG images and COCO JSON into the new folder `out`, and returns the set with its problems.

    Raises `DataError` for files that cannot be read, `UsageError` without h5py where it is needed, and `WriteError`.
    """
    found = _data_set(root)
    if found is None:
        raise DataError(f"{escape(str(root))} has no {LAYOUT}")
    problems: list[str] = []
    return extracting.extract("matlab", found.fields(root, problems), problems, out)


def _data_set(root: Path) -> ModuleType | None:
    return next((module for module in _SETS if module.recognise(root)), None)
