"""LabelMe JSON, one a picture: `{imagePath, imageHeight, imageWidth, shapes: [{label, points, shape_type}]}`.

Shapes are polygons unless `shape_type` says otherwise: rectangle, circle (centre and a point on it), rotation, mask
(its box is taken), point. Some sets have less: CCEDD's shapes have only points, so all are called `unnamed`, and its
images are found by the name of the JSON. A set of nothing but points is read as points; among boxes they are left out.
"""

from __future__ import annotations

import math
import posixpath
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ssl_pretrain.data.files import Rejected, escape, scan
from ssl_pretrain.data.gathering import Gathering, Objects
from ssl_pretrain.data.lookup import Lookup, files_under, first_files, split_in, unlabelled
from ssl_pretrain.data.readers import LabelledSet, size_or_none
from ssl_pretrain.data.shapes import Polygon, box, ellipse, polygon
from ssl_pretrain.data.tables import numbers, read_json, whole_number
from ssl_pretrain.errors import DataError

LAYOUT = "JSON files with `shapes` of LabelMe, one an image"
_UNNAMED = "unnamed"
_MAX_BYTES = 256 << 20
_MAX_HEAD_BYTES = 32 << 20
_LINES = ("line", "linestrip")


@dataclass(frozen=True)
class _Record:
    """One JSON without its copy of the image."""

    file: str
    image_path: str | None
    size_px: tuple[int | None, int | None]
    shapes: list[Any]


def recognise(root: Path) -> bool:
    """Whether one of the first few JSON files of the folders has LabelMe's shapes and its image's size or path."""
    if not root.is_dir():
        return False
    for i, name in enumerate(first_files(root, frozenset({".json"}), each=3)):
        if i == 10:
            break
        try:
            if _record(name, read_json(root / name, _MAX_HEAD_BYTES)) is not None:
                return True
        except Rejected:
            continue
    return False


def read(root: Path) -> LabelledSet:
    """All images that a JSON is about, with the boxes and outlines of their shapes."""
    if not root.is_dir():
        raise DataError(f"{escape(str(root))} is a file: give the folder that holds LabelMe's JSON files and images")
    names, problems, records = scan([root]).names, list[str](), list[_Record]()
    for name in files_under(root, frozenset({".json"})):
        try:
            record = _record(name, read_json(root / name, _MAX_BYTES))
        except Rejected as why:
            problems.append(f"{escape(name)}: left out, {why.detail}")
            continue
        if record is None:
            problems.append(f"{escape(name)}: left out, it has no `shapes` of LabelMe")
        else:
            records.append(record)
    if not records or not names:
        raise DataError(f"{escape(str(root))} has {len(names)} images and {len(records)} JSON files of LabelMe")
    kinds = {_kind(shape) for record in records for shape in record.shapes}
    gathering = Gathering("labelme", "point" if kinds == {"point"} else "box")
    gathering.problems += problems
    used = dict[str, str]()
    lookup = Lookup(names)
    for record in records:
        _read_one(root, record, lookup, used, gathering)
    gathering.problems += gathering.group_by_folder() + unlabelled(names, used)
    done = gathering.done()
    unnamed = sum(isinstance(shape, dict) and "label" not in shape for record in records for shape in record.shapes)
    if not unnamed:
        return done
    return replace(done, found=f"{done.found}; {unnamed} have no label and are called {_UNNAMED!r}")


def _record(name: str, data: Any) -> _Record | None:
    if not isinstance(data, dict) or not isinstance(data.get("shapes"), list):
        return None
    path = data.get("imagePath")
    if not isinstance(path, str) and "imageHeight" not in data:
        return None
    size_px = whole_number(data.get("imageWidth")), whole_number(data.get("imageHeight"))
    return _Record(name, path if isinstance(path, str) and path else None, size_px, data["shapes"])


def _read_one(root: Path, record: _Record, lookup: Lookup, used: dict[str, str], gathering: Gathering) -> None:
    problems, file = gathering.problems, escape(record.file)
    try:
        name = _image(record, lookup)
    except ValueError as why:
        problems.append(f"{file}: left out with {len(record.shapes)} objects, {why}")
        _count(record, gathering)
        return
    if name in used:
        if posixpath.dirname(used[name]) != posixpath.dirname(record.file):  # two versions of all labels
            raise DataError(
                f"{escape(used[name])} and {file} are both about {escape(name)}: keep one of the two folders"
            )
        problems.append(f"{file}: left out, {escape(used[name])} is about the same image")
        _count(record, gathering)
        return
    used[name] = record.file
    size_px = size_or_none(root / name, problems, name)
    if size_px is None:
        _count(record, gathering)
        return
    if None not in record.size_px and record.size_px != size_px:
        stated = f"{escape(str(record.size_px[0])[:20])} x {escape(str(record.size_px[1])[:20])}"
        problems.append(f"{file}: says {stated} px, but the image is {size_px[0]} x {size_px[1]}")
    objects = gathering.objects(size_px)
    for i, shape in enumerate(record.shapes, 1):
        _shape(shape, f"{file}: shape {i}", objects)
    gathering.add(root / name, name, objects, split=split_in(name) or split_in(record.file))


def _image(record: _Record, lookup: Lookup) -> str:
    """By the path from the JSON's folder, as LabelMe writes it, or else by the JSON's name. Raises `ValueError`."""
    stem, folder = posixpath.splitext(record.file)[0], posixpath.dirname(record.file)
    split = split_in(record.file)
    if record.image_path is None:
        return lookup.find(posixpath.basename(stem), [], split)
    path = posixpath.normpath(posixpath.join(folder, record.image_path.replace("\\", "/")))
    try:
        return lookup.find(path, [""], split)
    except ValueError as why:
        try:
            return lookup.find(posixpath.basename(stem), [folder], split)
        except ValueError:
            raise why from None


def _count(record: _Record, gathering: Gathering) -> None:
    for shape in record.shapes:
        gathering.annotated[escape(_label(shape).strip())] += 1


def _kind(shape: Any) -> str:
    kind = shape.get("shape_type") if isinstance(shape, dict) else None
    return kind if isinstance(kind, str) else "polygon"


def _label(shape: Any) -> str:
    """The class; nothing where the label is no text."""
    if not isinstance(shape, dict):
        return ""
    label = shape.get("label", _UNNAMED)
    return label if isinstance(label, str) else ""


def _shape(shape: Any, where: str, objects: Objects) -> None:
    label, kind = _label(shape), _kind(shape)
    try:
        points = _points(shape)
        if kind == "point" and objects.gathering.kind == "point":
            if len(points) != 1:
                raise ValueError("malformed point")
            objects.point(where, label, *points[0])
        elif kind in ("rectangle", "mask"):
            objects.box(where, label, *_rectangle(points))
        else:
            outline = _outline(kind, points)
            objects.box(where, label, *box(outline), outline)
    except ValueError as why:
        objects.lost(where, label, str(why))


def _points(shape: Any) -> list[tuple[float, float]]:
    raw = shape.get("points") if isinstance(shape, dict) else None
    if not isinstance(raw, list):
        raise ValueError("it has no points")
    try:
        pairs = [numbers(point, 2) for point in raw]
    except ValueError as error:
        raise ValueError("malformed points") from error
    return [(x, y) for x, y in pairs]


def _rectangle(points: list[tuple[float, float]]) -> tuple[float, float, float, float]:
    """Of two opposite corners in any order, or of all four."""
    if len(points) not in (2, 4):
        raise ValueError(f"a rectangle of {len(points)} points")
    return min(x for x, _ in points), min(y for _, y in points), max(x for x, _ in points), max(y for _, y in points)


def _outline(kind: str, points: list[tuple[float, float]]) -> Polygon:
    if kind == "circle":
        if len(points) != 2:
            raise ValueError(f"a circle of {len(points)} points")
        radius = math.dist(*points)
        return ellipse(*points[0], radius, radius)
    if kind == "point":
        raise ValueError("a point has no size, and the other objects have boxes")
    if kind in _LINES:
        raise ValueError(f"a {kind} has no area")
    if kind not in ("polygon", "rotation"):
        raise ValueError(f"shape_type {escape(kind)} is not known")
    return polygon([[value for point in points for value in point]])
