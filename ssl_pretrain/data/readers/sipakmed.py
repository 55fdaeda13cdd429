"""SIPaKMeD: fields `im_<Class>/im_<Class>/001.bmp` with `001_cyt01.dat` and `001_nuc01.dat`, a line `x,y` a corner.

The class is the folder's, and a cell is its cytoplasm's outline (the nucleus lies inside it). Where there are no
outlines of fields, the cut-out cells `CROPPED/001_01.bmp` are whole images, grouped by their field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from ssl_pretrain.data.files import Rejected, escape, read_bytes, scan
from ssl_pretrain.data.gathering import Gathering, Objects
from ssl_pretrain.data.lookup import files_under, peek
from ssl_pretrain.data.readers import LabelledSet, number, size_or_none
from ssl_pretrain.data.shapes import box, polygon

LAYOUT = "im_<Class>/ with 001.bmp and 001_cyt01.dat, or with CROPPED/001_01.bmp (SIPaKMeD)"
_CLASS = re.compile(r"(?:.*/)?im_([^/]+)/[^/]+")
_CROPPED = re.compile(r"(?:.*/)?im_[^/]+/CROPPED/[0-9]+_[0-9]+\.[^/.]+", re.IGNORECASE)
_FIELD_OUTLINE = re.compile(r"(.*/im_[^/]+/[0-9]+|im_[^/]+/[0-9]+)_(cyt|nuc)([0-9]+)\.dat", re.IGNORECASE)
_MAX_DAT_BYTES = 16 << 20


def recognise(root: Path) -> bool:
    """Whether folders `im_<Class>` hold outlines of fields, or cut-out cells."""
    return any(_FIELD_OUTLINE.fullmatch(name) or _CROPPED.fullmatch(name) for name in peek(root, 4))


def read(root: Path) -> LabelledSet:
    """Fields with the cells' outlines, or else cut-out cells as whole images."""
    names, outlines = scan([root]).names, _outlines(root)
    crops = [name for name in names if _CROPPED.fullmatch(name)]
    fields = [name for name in names if _CLASS.fullmatch(name) and "/cropped/" not in f"/{name.lower()}"]
    kind: Literal["box", "image"] = "box" if outlines else "image"
    gathering = Gathering("sipakmed", kind)
    gathering.problems += [
        f"{escape(name)}: left out, it lies in no folder im_<Class>" for name in sorted({*names} - {*crops, *fields})
    ]
    if kind == "image":
        gathering.problems += [f"{escape(name)}: left out, a field without outlines" for name in fields]
        _crops(root, crops, gathering)
        count = len(gathering.images)
        return gathering.done(f"{count} cut-out cells of {len(gathering.annotated)} classes, grouped by field")
    for name in fields:
        _field(root, name, outlines.pop(name.rpartition(".")[0], {}), gathering)
    for stem, lost in outlines.items():
        gathering.annotated[escape(_class(f"{stem}.bmp"))] += sum("cyt" in parts for parts in lost.values())
        gathering.problems.append(f"{escape(stem)}: outlines of {len(lost)} cells without an image (missing image)")
    left = f"; {len(crops)} cut-outs of the same cells are not read" if crops else ""
    return gathering.done(
        f"{gathering.annotated.total()} cells of {len(gathering.annotated)} classes, outlined by their cytoplasm, "
        f"in {len(gathering.images)} fields{left}"
    )


def _class(name: str) -> str:
    """The class that the folder names; the nearest folder where they are nested."""
    match = _CLASS.fullmatch(name)
    return match[1] if match else ""


def _outlines(root: Path) -> dict[str, dict[str, dict[str, Path]]]:
    """By field and cell: the files of its `cyt` and its `nuc`."""
    found: dict[str, dict[str, dict[str, Path]]] = {}
    for name in files_under(root, frozenset({".dat"})):
        if match := _FIELD_OUTLINE.fullmatch(name):
            found.setdefault(match[1], {}).setdefault(match[3], {})[match[2].lower()] = root / name
    return found


def _field(root: Path, name: str, cells: Mapping[str, Mapping[str, Path]], gathering: Gathering) -> None:
    if not cells:
        gathering.problems.append(f"{escape(name)}: left out, missing outlines (unlabelled)")
        return
    label = _class(name)
    size_px = size_or_none(root / name, gathering.problems, name)
    if size_px is None:
        gathering.annotated[escape(label)] += len(cells)
        return
    objects = gathering.objects(size_px)
    for cell, files in cells.items():
        where = f"{escape(name)}: cell {cell}"
        if "cyt" in files:
            _cell(files["cyt"], where, label, objects)
        else:
            objects.lost(where, label, "it has a nucleus, but no cytoplasm")
    gathering.add(root / name, name, objects)


def _cell(path: Path, where: str, label: str, objects: Objects) -> None:
    try:
        lines = read_bytes(path, _MAX_DAT_BYTES).decode("utf-8-sig").splitlines()
        ring = [number(word) for line in lines if line.strip() for word in _pair(line)]
        outline = polygon([ring])
    except Rejected as why:
        return objects.lost(where, label, f"{why.reason} ({why.detail})")
    except ValueError as error:  # not UTF-8 either
        return objects.lost(where, label, f"malformed outline ({escape(str(error))})")
    objects.box(where, label, *box(outline), outline)


def _pair(line: str) -> tuple[str, str]:
    x, y = line.split(",")
    return x.strip(), y.strip()


def _crops(root: Path, crops: list[str], gathering: Gathering) -> None:
    for name in crops:
        size_px = size_or_none(root / name, gathering.problems, name)
        if size_px is None:
            continue
        folder, _, own = name.rpartition("/")
        parent = folder.rpartition("/")[0]
        objects = gathering.objects(size_px)
        objects.whole(_class(f"{parent}/x"))
        gathering.add(root / name, name, objects, group=f"{parent}/{own.partition('_')[0]}")
