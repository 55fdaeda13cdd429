"""CVAT for images 1.1: `annotations.xml` with `<image name width height>` and boxes, polygons, ellipses, masks in it.

Coordinates are edges in pixels. Boxes are upright: of a turned box or ellipse it is the tightest one. Images are looked
for in `images/` (and its subset's folder) and beside the XML file, then anywhere below by their own name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import ParseError, fromstring

from ssl_pretrain.data.files import Rejected, escape, read_bytes, scan
from ssl_pretrain.data.gathering import Gathering, Objects
from ssl_pretrain.data.lookup import Lookup, head
from ssl_pretrain.data.readers import LabelledSet, number, size_or_none, split_of, stays_inside
from ssl_pretrain.data.shapes import (
    MAX_CORNER_PX,
    Shape,
    box,
    ellipse,
    ellipse_extent,
    placed,
    polygon,
    row_major,
    turned_box,
)
from ssl_pretrain.errors import DataError

LAYOUT = "annotations.xml of CVAT for images 1.1"
_MAX_XML_BYTES = 256 << 20
_HEAD_BYTES = 4096
_FOLDERS = ("", "annotations", "Annotations")

Found = tuple[tuple[float, float, float, float], Shape | None]


def recognise(root: Path) -> bool:
    """Whether an XML file at the top, or in `annotations/`, starts with `<annotations>`."""
    return bool(_xml_files(root))


def read(root: Path) -> LabelledSet:
    """All images that an XML file lists, those without shapes too. Raises `DataError` for the tracks of a video."""
    names = scan([root]).names
    trees = [(path, _parse(path)) for path in _xml_files(root)]
    if not names:
        raise DataError(f"{escape(str(root))} has {len(trees)} files of CVAT but no image: put the images beside them")
    gathering = Gathering("cvat", _kind([tree for _, tree in trees]))
    lookup, used = Lookup(names), dict[str, str]()
    for path, tree in trees:
        for image in tree.iter("image"):
            _image(root, path, image, lookup, used, gathering)
    missing = "not in the XML file (unlabelled)"
    gathering.problems += [f"{escape(name)}: left out, {missing}" for name in names if name not in used]
    return gathering.done()


def ellipse_box(cx: float, cy: float, rx: float, ry: float, degrees: float = 0.0) -> tuple[float, float, float, float]:
    """The tightest upright box x0, y0, x1, y1 of an ellipse that is turned about its centre.

    >>> [round(edge, 3) for edge in ellipse_box(10, 10, 5, 2, 90)]
    [8.0, 5.0, 12.0, 15.0]
    """
    width, height = ellipse_extent(rx, ry, degrees)
    return cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2


def _xml_files(root: Path) -> list[Path]:
    found = []
    for folder in _FOLDERS:
        try:
            files = sorted(path for path in (root / folder).glob("*.xml") if not path.name.startswith("."))
        except OSError:
            continue
        found += files if folder == "" else files[:1]  # where VOC has thousands, one tells
    return [path for path in found if _is_cvat(path)]


def _is_cvat(path: Path) -> bool:
    start = head(path, _HEAD_BYTES)
    return b"<annotations>" in start or b"<annotations " in start


def _parse(path: Path) -> Any:
    """The root element. Raises `DataError`; a document type is refused, so no bombs."""
    where = escape(path.name)
    try:
        tree = fromstring(read_bytes(path, _MAX_XML_BYTES), forbid_dtd=True)
    except Rejected as why:
        raise DataError(f"{where} cannot be read: {why.reason}, {why.detail}") from why
    except DefusedXmlException as error:
        raise DataError(f"{where} has a document type or entities, which are not allowed") from error
    except (ParseError, ValueError, LookupError) as error:  # the latter for encodings
        raise DataError(f"{where} is malformed XML ({escape(str(error))}): export it again") from error
    if tree.tag != "annotations":
        raise DataError(f"{where}: <{escape(str(tree.tag))}> is not the <annotations> of CVAT")
    if tree.find("track") is not None:
        raise DataError(f"{where} has the tracks of a video: export it as 'CVAT for images 1.1'")
    return tree


def _kind(trees: list[Any]) -> Literal["box", "point", "image"]:
    """Of the set: boxes where there is any outline, or else points, or else tags."""
    tags = {shape.tag for tree in trees for image in tree.iter("image") for shape in image}
    if tags & _OUTLINES.keys() or not tags & {"points", "tag"}:
        return "box"
    return "point" if "points" in tags else "image"


def _image(root: Path, path: Path, image: Any, lookup: Lookup, used: dict[str, str], gathering: Gathering) -> None:
    name, subset = image.get("name") or "", image.get("subset") or ""
    where = f"{escape(path.name)}: {escape(name) or 'an image without a name'}"
    if not stays_inside(name) or (subset and not stays_inside(subset)):
        return _left_out(image, f"{where}: left out, its name leads out of the folder", gathering)
    near = (f"images/{subset}", "images", subset, "") if subset else ("images", "")
    try:
        found = lookup.find(name, near, split_of(f"{subset}/x"))
    except ValueError as why:
        return _left_out(image, f"{where}: left out, {why}", gathering)
    if found in used:
        return _left_out(image, f"{where}: left out, {used[found]} is about the same image", gathering)
    used[found] = f"image {escape(image.get('id') or '')} of {escape(path.name)}"
    size_px = size_or_none(root / found, gathering.problems, found)
    if size_px is None:
        return _left_out(image, None, gathering)
    _compare_size(image, where, size_px, gathering)
    objects = gathering.objects(size_px)
    for i, shape in enumerate(image, 1):
        _shape(shape, f"{where}: {escape(str(shape.tag))} {i}", objects)
    gathering.add(root / found, found, objects, split=split_of(f"{subset}/x") if subset else None)


def _left_out(image: Any, problem: str | None, gathering: Gathering) -> None:
    """Counts the shapes of an image that cannot be used."""
    lost = Counter(escape((shape.get("label") or "").strip()) for shape in image)
    gathering.annotated.update(lost)
    if problem is not None:
        gathering.problems.append(f"{problem} ({lost.total()} objects)")


def _compare_size(image: Any, where: str, size_px: tuple[int, int], gathering: Gathering) -> None:
    """Another size in the XML means that the shapes may be meant for another image."""
    try:
        stated = (number(image.get("width")), number(image.get("height")))
    except ValueError:
        return  # not stated
    if stated != size_px:
        gathering.problems.append(
            f"{where}: says {stated[0]:g} x {stated[1]:g} px, but the image is {size_px[0]} x {size_px[1]}"
        )


def _shape(shape: Any, where: str, objects: Objects) -> None:
    label, kind = shape.get("label") or "", objects.gathering.kind
    if kind == "image":
        objects.whole(label) if label.strip() else objects.lost(where, label, "it has no class")
    elif kind == "point" and shape.tag == "points":
        try:
            points = _pairs(shape)
        except ValueError:
            return objects.lost(where, label, "malformed points")
        for x, y in points:
            objects.point(where, label, x, y)
    elif shape.tag in _OUTLINES and kind == "box":
        try:
            (x0, y0, x1, y1), outline = _OUTLINES[shape.tag](shape, objects.size_px)
        except ValueError as error:
            return objects.lost(where, label, f"malformed {shape.tag} ({escape(str(error))})")
        objects.box(where, label, x0, y0, x1, y1, outline)
    else:
        objects.lost(where, label, f"it is not one of {', '.join(_OUTLINES) if kind == 'box' else 'points'}")


def _box(shape: Any, size_px: tuple[int, int]) -> Found:
    x0, y0, x1, y1 = (_px(shape.get(edge)) for edge in ("xtl", "ytl", "xbr", "ybr"))
    turned = number(shape.get("rotation") or "0")
    if turned == 0 or x1 <= x0 or y1 <= y0:
        return (x0, y0, x1, y1), None
    outline = turned_box(x0, y0, x1, y1, turned)
    return box(outline), outline


def _polygon(shape: Any, size_px: tuple[int, int]) -> Found:
    outline = polygon([[value for pair in _pairs(shape) for value in pair]])
    return box(outline), outline


def _ellipse(shape: Any, size_px: tuple[int, int]) -> Found:
    cx, cy, rx, ry = (_px(shape.get(name)) for name in ("cx", "cy", "rx", "ry"))
    turned = number(shape.get("rotation") or "0")
    if rx < 0 or ry < 0:
        raise ValueError("a radius below 0")
    return ellipse_box(cx, cy, rx, ry, turned), ellipse(cx, cy, rx, ry, turned)


def _mask(shape: Any, size_px: tuple[int, int]) -> Found:
    """Runs row by row inside the mask's own rectangle."""
    left, top, width, height = (_whole(shape.get(name)) for name in ("left", "top", "width", "height"))
    if width > size_px[0] or height > size_px[1]:  # before anything of that size is made
        raise ValueError("larger than the image")
    runs = [_whole(run) for run in (shape.get("rle") or "").split(",")]
    outline = placed(row_major((height, width), runs), left, top, size_px[::-1])
    return box(outline), outline


_OUTLINES: dict[str, Callable[[Any, tuple[int, int]], Found]] = {
    "box": _box,
    "polygon": _polygon,
    "ellipse": _ellipse,
    "mask": _mask,
}


def _px(text: str | None) -> float:
    value = number(text)
    if abs(value) > MAX_CORNER_PX:
        raise ValueError("beyond all images")
    return value


def _whole(text: str | None) -> int:
    value = number(text)
    if not value.is_integer() or abs(value) > 1e9:
        raise ValueError("not a whole number")
    return int(value)


def _pairs(shape: Any) -> list[tuple[float, float]]:
    """Of `x,y;x,y`."""
    pairs = []
    for pair in (shape.get("points") or "").split(";"):
        x, y = pair.split(",")
        pairs.append((number(x), number(y)))
    return pairs
