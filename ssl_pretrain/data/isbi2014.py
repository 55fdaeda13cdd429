"""ISBI 2014, overlapping cervical cells: synthetic fields and their masks, both inside MATLAB files.

    isbi_train.mat {ISBI_Train}, isbi_train_GT.mat {train_Cytoplasm, train_Nuclei}        45 fields, version 5
    isbi_test90.mat {ISBI_Test90}, isbi_test90_GT.mat {test_Cytoplasm, test_Nuclei}       90 fields, version 5
    Dataset/Synthetic/trainset.mat {trainset}, testset.mat {testset}, ..._GT.mat          45 and 900, version 7.3

The larger files hold the smaller ones' fields, so where both are there the larger ones are read. Cytoplasms are masks
of their own, as they overlap; the nuclei of a field share one mask, of which each connected part is a nucleus. The 16
real fields (`Dataset/EDF`) are images without masks in the layout that is known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssl_pretrain.data.extracting import Field, grey
from ssl_pretrain.data.files import escape
from ssl_pretrain.data.label_images import objects_by_touch
from ssl_pretrain.data.lookup import peek
from ssl_pretrain.data.matlab_files import Array, MatFile, Value, open_mat
from ssl_pretrain.data.shapes import box, of_pixels
from ssl_pretrain.errors import DataError

NAME = "isbi2014"
LAYOUT = "isbi_train.mat with isbi_train_GT.mat, or testset.mat with testset_GT.mat (ISBI 2014)"
_FILE = re.compile(r"(?:.*/)?(isbi_train|isbi_test90|trainset|testset)\.mat", re.IGNORECASE)
_LARGER = {"isbi_train": "trainset", "isbi_test90": "testset"}
_VARIABLES = {"isbi_train": "ISBI_Train", "isbi_test90": "ISBI_Test90", "trainset": "trainset", "testset": "testset"}


class _Part(NamedTuple):
    """A file of fields and the file of their masks."""

    fields: Path
    masks: Path
    own: str

    @property
    def split(self) -> str:
        return "train" if "train" in self.own else "test"


def recognise(root: Path) -> bool:
    """Whether there is a file of fields with its file of masks, at most three folders down."""
    return bool(_parts(root))


def fields(root: Path, problems: list[str]) -> Iterator[Field]:
    """Every field with its objects. Raises `DataError` for a file that cannot be read."""
    parts = _parts(root)
    there = {part.own for part in parts}
    for part in parts:
        if _LARGER.get(part.own) in there:
            larger = f"{_LARGER[part.own]}.mat"
            problems.append(f"{escape(part.fields.name)}: left out, its fields are in {larger} too")
            continue
        with open_mat(part.fields) as images, open_mat(part.masks) as masks:
            yield from _fields(part, images, masks, problems)


def _parts(root: Path) -> list[_Part]:
    found = []
    for name in peek(root, 3):
        match = _FILE.fullmatch(name)
        path = root / name
        masks = path.with_name(f"{path.stem}_GT{path.suffix}")
        if match and masks.is_file():
            found.append(_Part(path, masks, match[1].lower()))
    return found


def _fields(part: _Part, images: MatFile, masks: MatFile, problems: list[str]) -> Iterator[Field]:
    cells = images.cells(_VARIABLES[part.own])
    cytoplasm, nuclei = masks.cells(f"{part.split}_Cytoplasm"), masks.cells(f"{part.split}_Nuclei")
    if not len(cells) == len(cytoplasm) == len(nuclei):
        counts = f"{len(cells)} fields, but masks of {len(cytoplasm)} and {len(nuclei)}"
        raise DataError(f"{escape(part.masks.name)} does not belong to {escape(part.fields.name)}: {counts}")
    for i in range(len(cells)):
        name = f"{part.own}_{i:03d}"
        pixels_HW = grey(cells[i])
        if pixels_HW is None:
            problems.append(f"{name}: left out, it is not an image of values from 0 to 255")
            continue
        field = Field(name, part.split, name, pixels_HW, [])
        size = "its mask is not of the image's size"
        for mask in _list(cytoplasm[i]):
            of = of_pixels(mask != 0) if mask.shape == pixels_HW.shape else None
            empty = of is not None and box(of)[2] == 0
            field.objects.append(("Cytoplasm", "its mask is empty" if empty else of or size))
        nuclei_HW = nuclei[i]
        if isinstance(nuclei_HW, list) or nuclei_HW.shape != pixels_HW.shape:
            field.objects.append(("Nuclei", size))
        else:
            parts = objects_by_touch((nuclei_HW != 0).astype(np.int64))
            field.objects.extend(("Nuclei", of) for _, of in parts)
        yield field


def _list(value: Value) -> list[Array]:
    return value if isinstance(value, list) else [value] if value.size else []
