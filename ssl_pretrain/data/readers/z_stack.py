"""Fields of several focal planes, one label a stack: a TIFF of several pages, or a folder with an image a plane.

    <class>/<stack>.tif                     pages are planes; the first is shown
    <class>/<stack>/z00.png                 (or plane, slice, layer, focus with a number); the middle one is shown
    <stack>/00.png with labels.csv          `stack,label[,set]`: a line a stack, by the name of its folder

A stack is one image of the set, and its own group: its planes never lie on both sides of a split.
"""

from __future__ import annotations

import csv
import io
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from ssl_pretrain.data.files import SUFFIXES, Rejected, escape, read_bytes, scan
from ssl_pretrain.data.gathering import Gathering
from ssl_pretrain.data.lookup import peek
from ssl_pretrain.data.readers import LabelledSet, natural, size_or_none, split_of
from ssl_pretrain.errors import DataError

LAYOUT = "<class>/<stack>.tif of several pages, <class>/<stack>/z00.png, or <stack>/00.png with labels.csv"
_NAMED_PLANE = re.compile(r"(?:.*[_-])?(?:z|plane|slice|layer|focus)[_-]?[0-9]+", re.IGNORECASE)
_NUMBERED_PLANE = re.compile(r"[^0-9]*[0-9]+")
_TIFFS = (".tif", ".tiff")
_MAX_CSV_BYTES = 64 << 20
_LOOK_AT = 5

Labels = Mapping[str, tuple[str, str | None]]


def recognise(root: Path) -> bool:
    """Whether there are stacks with labels: in at least two class folders, or named in `labels.csv`."""
    names = peek(root, 3)
    try:
        labels = _labels(root)
    except DataError:
        labels = {}
    if any(stack.rpartition("/")[2] in labels for stack in _stacks(names, _NUMBERED_PLANE)):
        return True
    stacks = list(_stacks(names, _NAMED_PLANE))
    images = [name for name in names if _is_image(name)]
    if len(_classes(stacks)) >= 2:
        return all(name.rpartition("/")[0] in stacks for name in images)
    tiffs = [name for name in images if name.lower().endswith(_TIFFS)]
    if len(_classes(tiffs)) < 2 or len(tiffs) < len(images):
        return False
    return all(_has_pages(root / name) for name in tiffs[:_LOOK_AT])


def read(root: Path) -> LabelledSet:
    """One image a stack, with the stack's class."""
    gathering = Gathering("z_stack", "image")
    names, labels = scan([root]).names, _labels(root)
    listed = {stack: planes for stack, planes in _stacks(names, _NUMBERED_PLANE).items() if _own(stack) in labels}
    in_stacks = {plane for planes in listed.values() for plane in planes}
    rest = [name for name in names if name not in in_stacks]
    if listed:
        for stack, planes in listed.items():
            label, split = labels[_own(stack)]
            _stack(root, stack, planes[len(planes) // 2], label, split, gathering)
        missing = sorted(labels.keys() - {_own(stack) for stack in listed})
        for own in missing:
            gathering.annotated[escape(labels[own][0])] += 1
            gathering.problems.append(f"labels.csv: {escape(own)} has no folder of planes (missing image)")
        gathering.problems += [f"{escape(name)}: left out, not in a stack of labels.csv" for name in rest]
        return gathering.done(_found(gathering, len(in_stacks), "the middle plane shown, labels from labels.csv"))
    stacks = _stacks(names, _NAMED_PLANE)
    for stack, planes in stacks.items():
        _stack(root, stack, planes[len(planes) // 2], _class(stack), None, gathering)
    count = sum(map(len, stacks.values()))
    for name in (name for name in rest if name.rpartition("/")[0] not in stacks):
        if name.lower().endswith(_TIFFS) and _has_pages(root / name):
            _stack(root, name, name, _class(name), None, gathering)
        else:
            gathering.problems.append(f"{escape(name)}: left out, neither a plane of a folder nor a TIFF with pages")
    shown = "the middle plane of a folder shown, or the first page of a TIFF"
    return gathering.done(_found(gathering, count, f"{shown}, classes from folders"))


def _found(gathering: Gathering, planes: int, how: str) -> str:
    single = f" of {planes} planes in files of their own" if planes else ""
    return f"{len(gathering.images)} stacks{single}, {len(gathering.annotated)} classes; {how}"


def _stacks(names: Sequence[str], pattern: re.Pattern[str]) -> dict[str, list[str]]:
    """Folders that hold at least two planes and no other image; the planes in their order."""
    folders: dict[str, list[str]] = {}
    for name in names:
        if _is_image(name):
            folders.setdefault(name.rpartition("/")[0], []).append(name)
    return {
        folder: sorted(planes, key=natural)
        for folder, planes in sorted(folders.items())
        if folder and len(planes) > 1 and all(pattern.fullmatch(_own(plane).rpartition(".")[0]) for plane in planes)
    }


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _own(name: str) -> str:
    return name.rpartition("/")[2]


def _class(stack: str) -> str:
    """The folder that a stack lies in."""
    return _own(stack.rpartition("/")[0])


def _classes(stacks: Sequence[str]) -> set[str]:
    return {_class(stack) for stack in stacks} - {""}


def _has_pages(path: Path) -> bool:
    """Whether a TIFF has a second page."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(read_bytes(path)), formats=("TIFF",)) as image:
                image.seek(1)
        except Exception:  # on broken files Pillow raises whatever its parsers happen to hit
            return False
    return True


def _stack(root: Path, stack: str, shown: str, label: str, split: str | None, gathering: Gathering) -> None:
    size_px = size_or_none(root / shown, gathering.problems, shown)
    if not label:
        gathering.problems.append(f"{escape(stack)}: left out, it lies in no class folder")
    elif size_px is None:
        gathering.annotated[escape(label)] += 1
    else:
        objects = gathering.objects(size_px)
        objects.whole(label)
        gathering.add(root / shown, shown, objects, group=stack, split=split)


def _labels(root: Path) -> dict[str, tuple[str, str | None]]:
    """Class and split of each stack in `labels.csv`; nothing where its first column is another. Raises `DataError`."""
    path = root / "labels.csv"
    if not path.is_file():
        return {}
    try:
        lines = read_bytes(path, _MAX_CSV_BYTES).decode("utf-8-sig").splitlines()
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines) if row]
    except (Rejected, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"labels.csv cannot be read ({escape(str(error))})") from error
    header = [cell.lower() for cell in rows[0]] if rows else []
    if header[:1] != ["stack"] or "label" not in header:
        return {}  # a table of images, which other formats read
    labels: dict[str, tuple[str, str | None]] = {}
    at, set_at = header.index("label"), header.index("set") if "set" in header else None
    for number, row in enumerate(rows[1:], 2):
        if len(row) <= at or not row[0] or not row[at]:
            raise DataError(f"labels.csv: row {number} has no stack or no label")
        if labels.get(row[0], (row[at],))[0] != row[at]:
            raise DataError(f"labels.csv: row {number} gives {escape(row[0])} another label than a row before")
        said = row[set_at] if set_at is not None and set_at < len(row) else ""
        labels[row[0]] = (row[at], split_of(f"{said}/x"))
    return labels
