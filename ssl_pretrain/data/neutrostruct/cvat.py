"""CVAT for images 1.1: its shapes, found in the bytes, so that labels can be changed and nothing else.

    <image name="a.tif" width="4096" height="4224">
      <ellipse label="primary" cx="10.5" cy="20" rx="4" ry="3" rotation="30" z_order="0"> ... </ellipse>

also `box` (xtl, ytl, xbr, ybr, rotation), `polygon` (points) and `mask` (rle, left, top, width, height). Angles are in
degrees, about the middle of the shape. https://docs.cvat.ai/docs/other/xml_format
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.parsers import expat

import numpy as np
from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import ParseError, fromstring
from numpy.typing import NDArray

from ssl_pretrain.data.decode import MAX_PIXELS
from ssl_pretrain.data.files import Rejected, escape, read_bytes
from ssl_pretrain.data.neutrostruct.coco import MAX_PX
from ssl_pretrain.data.neutrostruct.naming import shown
from ssl_pretrain.data.readers import number, stays_inside
from ssl_pretrain.data.shapes import ellipse_extent
from ssl_pretrain.errors import DataError

MAX_BYTES = 256 << 20
KINDS = ("ellipse", "box", "polygon", "mask")
"""Shapes with an extent; CVAT also has points, polylines, skeletons, cuboids and tags, which are left alone."""


@dataclass(frozen=True, eq=False)
class Shape:
    """One shape; lengths in pixels."""

    kind: str
    label: str
    image: int
    """Place in `Cvat.images`."""
    span: slice
    """Where it is in the bytes, without its end tag."""
    box_4: tuple[float, float, float, float]
    """x, y, width, height of what it covers; not clipped."""
    ellipse: tuple[float, float, float, float, float] | None
    """cx, cy, rx, ry and degrees; of an ellipse."""
    outline_K2: NDArray[np.float64] | None
    """Corners; of a box or polygon."""
    runs: tuple[int, ...] = ()
    """Of a mask: lengths of outside and inside in turn, row after row of its box."""


@dataclass(frozen=True, eq=False)
class MetaLabel:
    """One entry of the label list in `<meta>`; places in the bytes."""

    name: str
    block: slice
    name_text: slice
    colour_text: slice | None


@dataclass(frozen=True, eq=False)
class Cvat:
    """A file that was read."""

    data: bytes
    images: tuple[str, ...]
    size_I2: NDArray[np.int64]
    """Width and height; 0 where the file does not say."""
    shapes: tuple[Shape, ...]
    meta: tuple[MetaLabel, ...]
    problems: tuple[str, ...]
    """One line each, on shapes without a usable extent; they are not in `shapes`."""

    def tag(self, m: int) -> slice:
        """Where the start tag of a shape is in the bytes."""
        return slice(self.shapes[m].span.start, _tag_end(self.data, self.shapes[m].span.start))

    @property
    def labels(self) -> tuple[str, ...]:
        """Of shapes and of `<meta>`, once each, sorted."""
        return tuple(sorted({shape.label for shape in self.shapes} | {label.name for label in self.meta}))


def read(path: Path) -> Cvat:
    """The file at `path`. Raises `DataError`."""
    try:
        return parsed(read_bytes(path, MAX_BYTES), escape(path.name))
    except Rejected as why:
        raise DataError(f"{escape(str(path))} cannot be read: {why.reason}, {why.detail}") from why


def parsed(data: bytes, name: str = "the CVAT file") -> Cvat:
    """The shapes in the bytes of a file. Raises `DataError` for anything but CVAT for images."""
    tree = _tree(data, name)
    spans = _spans(data, name)
    elements = dict(zip(tree.iter(), spans, strict=True))
    names: list[str] = []
    sizes: list[tuple[int, int]] = []
    shapes: list[Shape] = []
    problems: list[str] = []
    for image in tree.findall("image"):
        title = image.get("name") or ""
        if not stays_inside(title) or not title.isprintable():
            raise DataError(f"{name}: the image name {escape(title)} leads out of its folder or cannot be printed")
        for i, element in enumerate(image):
            try:
                shapes.append(_shape(element, len(names), elements[element]))
            except (ValueError, OverflowError) as error:
                what = f"{escape(title)}: shape {i + 1} ({escape(str(element.tag))}) left alone"
                problems.append(f"{what}, {escape(str(error))[:200]}")
        names.append(title)
        sizes.append((_side(image.get("width")), _side(image.get("height"))))
    if not names:
        raise DataError(f"{name} lists no image; export it as `CVAT for images 1.1`")
    if len(set(names)) < len(names):
        twice = shown(sorted({title for title in names if names.count(title) > 1}))
        raise DataError(f"{name} lists the same image twice: {twice}")
    size_I2 = np.array(sizes, np.int64).reshape(-1, 2)
    return Cvat(data, tuple(names), size_I2, tuple(shapes), tuple(_meta(data, tree, elements)), tuple(problems))


def attributes(data: bytes, tag: slice) -> Iterator[tuple[str, slice]]:
    """The attributes of a start tag, and where their values are in the bytes, without the quotes."""
    # names and quoted values in turn from the start of the tag, so that nothing inside a value is taken for a name
    for found in re.finditer(rb"""([^\s=<>"'/]+)\s*=\s*(?:"([^"]*)"|'([^']*)')""", data[tag]):
        first, last = found.span(2) if found[2] is not None else found.span(3)
        yield found[1].decode(), slice(tag.start + first, tag.start + last)


def _tree(data: bytes, name: str) -> Any:
    """The root element. A DTD is refused, so no bombs; and with it every entity but XML's own five."""
    try:
        data.decode("utf-8")
        tree = fromstring(data, forbid_dtd=True)
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8, which CVAT writes") from error
    except DefusedXmlException as error:
        raise DataError(f"{name}: a document type or entities are not allowed") from error
    except (ParseError, ValueError, LookupError) as error:
        raise DataError(f"{name} is malformed XML ({escape(str(error))})") from error
    if tree.tag != "annotations":
        raise DataError(f"{name}: <{escape(str(tree.tag))}> is not the <annotations> of CVAT")
    if tree.find("track") is not None:
        raise DataError(f"{name} is CVAT for video; export it as `CVAT for images 1.1`")
    return tree


def _spans(data: bytes, name: str) -> list[slice]:
    """Where each element is in the bytes, from < of its start tag to < of its end tag, in document order."""
    starts: list[int] = []
    ends: dict[int, int] = {}
    inside: list[int] = []

    def begin(tag: str, values: dict[str, str]) -> None:
        inside.append(len(starts))
        starts.append(parser.CurrentByteIndex)

    def end(tag: str) -> None:
        ends[inside.pop()] = parser.CurrentByteIndex

    def declared(version: str, encoding: str | None, standalone: int) -> None:
        if encoding is not None and encoding.lower() not in ("utf-8", "utf8", "us-ascii", "ascii"):
            raise DataError(f"{name} says that it is {escape(encoding)}; CVAT writes UTF-8")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler, parser.XmlDeclHandler = begin, end, declared
    parser.Parse(data, True)
    return [slice(start, ends[i]) for i, start in enumerate(starts)]


def _tag_end(data: bytes, start: int) -> int:
    """Just behind the > of the start tag at `start`."""
    found = re.compile(rb"""<(?:[^<>"']|"[^"]*"|'[^']*')*>""").match(data, start)
    if found is None:
        raise ValueError("its tag cannot be found again in the file")
    return found.end()


def _shape(element: Any, image: int, span: slice) -> Shape:
    """A shape with an extent; raises `ValueError`, with the reason, for any other."""
    kind, label = str(element.tag), element.get("label")
    if kind not in KINDS:
        raise ValueError("it is not one of " + ", ".join(KINDS))
    if not label:
        raise ValueError("it has no label")
    ellipse, outline_K2, runs = None, None, tuple[int, ...]()
    if kind == "ellipse":
        cx, cy, rx, ry = _numbers(element, "cx", "cy", "rx", "ry")
        ellipse = cx, cy, rx, ry, number(element.get("rotation", "0"))
        w, h = ellipse_extent(rx, ry, ellipse[4]) if min(rx, ry) > 0 else (0.0, 0.0)
        box = cx - w / 2, cy - h / 2, w, h
    elif kind == "mask":
        box, runs = _mask(element)
    else:
        outline_K2 = _corners(element) if kind == "box" else _points(element.get("points") or "")
        (x0, y0), (x1, y1) = outline_K2.min(0).tolist(), outline_K2.max(0).tolist()
        box = x0, y0, x1 - x0, y1 - y0
    if box[2] <= 0 or box[3] <= 0:
        raise ValueError(f"its extent is {box[2]:g} x {box[3]:g} px")
    if max(map(abs, box)) > MAX_PX:
        raise ValueError("its place is out of all proportion")
    return Shape(kind, label, image, span, box, ellipse, outline_K2, runs)


def _numbers(element: Any, *names: str) -> list[float]:
    return [number(element.get(name)) for name in names]


def _corners(element: Any) -> NDArray[np.float64]:
    """Of a box, which may be turned about its middle: float64 (4, 2)."""
    x0, y0, x1, y1 = _numbers(element, "xtl", "ytl", "xbr", "ybr")
    if x1 <= x0 or y1 <= y0:
        raise ValueError("its corners are swapped, or it has no size")
    turn = math.radians(number(element.get("rotation", "0")))
    c, s = math.cos(turn), math.sin(turn)
    middle = np.array([(x0 + x1) / 2, (y0 + y1) / 2])
    corner_42 = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    return (corner_42 - middle) @ np.array([[c, s], [-s, c]]) + middle if turn else corner_42


def _points(text: str) -> NDArray[np.float64]:
    """`x,y;x,y;x,y` as float64 (K, 2)."""
    pairs = [pair.split(",") for pair in text.split(";")]
    if len(pairs) < 3 or any(len(pair) != 2 for pair in pairs):
        raise ValueError("its points are not three or more pairs")
    return np.array([[number(value) for value in pair] for pair in pairs])


def _mask(element: Any) -> tuple[tuple[float, float, float, float], tuple[int, ...]]:
    left, top, width, height = _numbers(element, "left", "top", "width", "height")
    runs = tuple(int(part) for part in (element.get("rle") or "").split(","))
    if any(value != int(value) for value in (left, top, width, height)) or width * height > MAX_PIXELS:
        raise ValueError(f"its box is not of whole pixels, or of more than {MAX_PIXELS}")
    if min(runs) < 0 or sum(runs) != width * height:
        raise ValueError("its runs do not fill its box")
    return (left, top, width, height), runs


def _meta(data: bytes, tree: Any, elements: dict[Any, slice]) -> Iterator[MetaLabel]:
    for label in tree.iterfind("meta//labels/label"):
        name, colour, span = label.find("name"), label.find("color"), elements[label]
        if name is None or not name.text or len(name):
            continue
        end = data.index(b">", span.stop) + 1
        yield MetaLabel(
            name.text, slice(span.start, end), _text(data, elements[name]), _text_or_none(data, elements, colour)
        )


def _text(data: bytes, span: slice) -> slice:
    return slice(_tag_end(data, span.start), span.stop)


def _text_or_none(data: bytes, elements: dict[Any, slice], element: Any) -> slice | None:
    return None if element is None or not element.text else _text(data, elements[element])


def _side(text: str | None) -> int:
    try:
        value = number(text)
    except ValueError:
        return 0
    return int(value) if 0 < value <= MAX_PX else 0
