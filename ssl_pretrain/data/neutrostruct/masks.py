"""Step 5: class-coloured masks, a palette PNG an image, index 0 the background and 1 to 7 the published ids.

A pixel belongs to an object when its centre does; pixel (0, 0) covers 0 to 1, so its centre is at (0.5, 0.5), in COCO
and in CVAT. Large objects are drawn first, so that small ones on top of them stay visible.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssl_pretrain.data import shapes
from ssl_pretrain.data.decode import MAX_PIXELS
from ssl_pretrain.data.files import escape
from ssl_pretrain.data.neutrostruct import CLASSES, class_id, sevens
from ssl_pretrain.data.neutrostruct.coco import Coco
from ssl_pretrain.data.neutrostruct.cvat import Cvat
from ssl_pretrain.data.neutrostruct.naming import shown
from ssl_pretrain.data.neutrostruct.palette import BACKGROUND, Palette
from ssl_pretrain.errors import DataError, SslPretrainError

_RUN_LENGTH = 3
"""zlib's Z_RLE strategy: on flat colours a third faster than the default at level 6, and smaller."""


@dataclass(frozen=True, eq=False)
class Outline:
    """One object to draw: an ellipse, or else polygons, or else whole pixels."""

    id: int
    """Of its class, 1 to 8."""
    box_4: tuple[float, float, float, float]
    """x, y, width, height of what it covers."""
    area_px: float
    ellipse: tuple[float, float, float, float, float] | None = None
    """cx, cy, rx, ry and degrees."""
    polygons: tuple[NDArray[np.float64], ...] = ()
    """Corners, (K, 2) each; what lies in any of them is inside."""
    pixels_HW: NDArray[np.bool_] | None = None
    """From the corner of `box_4` on."""


@dataclass(frozen=True, eq=False)
class Drawable:
    """The objects of one image."""

    image: str
    size: tuple[int, int]
    """Width and height."""
    outlines: tuple[Outline, ...]

    @property
    def ids(self) -> frozenset[int]:
        """Of the classes that it has."""
        return frozenset(outline.id for outline in self.outlines)


def ellipse_patch(
    cx: float, cy: float, rx: float, ry: float, degrees: float, xs_W: NDArray[np.float64], ys_H: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Which of the points (x, y) lie in the ellipse, its edge included: bool (H, W).

    Half axes of 2 and 1 about the origin hold (1, 0.5), at 0.25 + 0.25, but not (2, 0.5), at 1 + 0.25:

    >>> ellipse_patch(0, 0, 2, 1, 0, np.array([1.0, 2.0]), np.array([0.5])).tolist()
    [[True, False]]
    """
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x_W, y_H1 = xs_W - cx, (ys_H - cy)[:, None]
    inside: NDArray[np.bool_] = ((c * x_W + s * y_H1) / rx) ** 2 + ((c * y_H1 - s * x_W) / ry) ** 2 <= 1
    return inside


def paint(item: Drawable) -> tuple[NDArray[np.uint8], list[Outline]]:
    """The ids of the classes, uint8 (H, W), and the objects of which no pixel is seen."""
    width, height = item.size
    order = sorted(item.outlines, key=lambda outline: (-outline.area_px, outline.id, outline.box_4))
    kind = np.uint16 if len(order) < 1 << 16 else np.uint32
    object_HW = np.zeros((height, width), kind)
    for i, outline in enumerate(order, 1):
        left, top, w, h = outline.box_4
        x0, y0 = max(math.floor(left), 0), max(math.floor(top), 0)
        x1, y1 = min(math.ceil(left + w), width), min(math.ceil(top + h), height)
        if x0 < x1 and y0 < y1:
            object_HW[y0:y1, x0:x1][_patch(outline, x0, y0, x1 - x0, y1 - y0)] = i
    id_of = np.array([0, *(outline.id for outline in order)], np.uint8)
    seen = np.bincount(object_HW[object_HW > 0], minlength=len(order) + 1)
    mask_HW: NDArray[np.uint8] = id_of[object_HW]
    return mask_HW, [outline for i, outline in enumerate(order, 1) if not seen[i]]


def encoded(mask_HW: NDArray[np.uint8], palette: Palette) -> bytes:
    """The mask as a palette PNG, read back and compared. 17 Mpx take about 0.1 s and 100 kB."""
    image = Image.fromarray(mask_HW).convert("P")
    image.putpalette([value for rgb in (BACKGROUND, *palette.colours, palette.undecided) for value in rgb])
    out = io.BytesIO()
    image.save(out, "PNG", compress_type=_RUN_LENGTH)
    data = out.getvalue()
    with Image.open(io.BytesIO(data), formats=("PNG",)) as again:
        if not np.array_equal(np.asarray(again), mask_HW):
            raise SslPretrainError("a mask does not read back as it was written: please report this")
    return data


def from_cvat(cvat: Cvat) -> list[Drawable]:
    """The objects of each image of a CVAT file of seven classes. Raises `DataError`."""
    class_of = sevens(cvat.labels)
    _all_known([shape.label for shape in cvat.shapes], class_of)
    outlines: list[list[Outline]] = [[] for _ in cvat.images]
    for shape in cvat.shapes:
        number = class_id(class_of[shape.label] or "")
        if shape.ellipse is not None:
            made = Outline(number, shape.box_4, math.pi * shape.ellipse[2] * shape.ellipse[3], ellipse=shape.ellipse)
        elif shape.outline_K2 is not None:
            made = _polygon(number, (shape.outline_K2,))
        else:
            inside = np.repeat(np.arange(len(shape.runs)) % 2 == 1, shape.runs)
            pixels_HW = inside.reshape(int(shape.box_4[3]), int(shape.box_4[2]))
            made = Outline(number, shape.box_4, float(pixels_HW.sum()), pixels_HW=pixels_HW)
        outlines[shape.image].append(made)
    return _drawables(cvat.images, cvat.size_I2, outlines)


def from_coco(coco: Coco, boxes_only: bool = False) -> list[Drawable]:
    """The objects of each image of a COCO file of seven classes, by segmentation or else by box.

    Compressed run lengths of 17 Mpx take 0.1 s an object; who wants no more than the classes asks for boxes only.
    Raises `DataError`.
    """
    class_of = sevens(coco.classes)
    _all_known(coco.used, class_of)
    outlines: list[list[Outline]] = [[] for _ in coco.images]
    for annotation, image, cls, box_4 in zip(coco.annotations, coco.image_N, coco.class_N, coco.box_N4, strict=True):
        number = class_id(class_of[coco.classes[cls]] or "")
        outlines[image].append(_from_segmentation({} if boxes_only else annotation, number, box_4))
    return _drawables(coco.images, coco.size_I2, outlines)


def without_pixels(item: Drawable, hidden: Sequence[Outline]) -> str | None:
    """A line on objects of which no pixel is seen; None where all are."""
    if not hidden:
        return None
    names = [CLASSES[outline.id - 1] if outline.id <= len(CLASSES) else "undecided" for outline in hidden]
    counts = ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names)))
    return f"{escape(item.image)}: covered by smaller objects, outside, or without a pixel centre: {counts}"


def mask_names(images: Sequence[str]) -> list[str]:
    """The file of each image's mask: its own name with .png. Raises `DataError` where two images would share one."""
    found = [(name.rpartition(".")[0] or name) + ".png" for name in images]
    if len({name.lower() for name in found}) < len(found):
        twice = [name for name in images if [n.lower() for n in found].count(mask_names([name])[0].lower()) > 1]
        raise DataError(f"images that would share one mask: {shown(twice)}")
    return found


def _drawables(images: Sequence[str], size_I2: NDArray[np.int64], outlines: list[list[Outline]]) -> list[Drawable]:
    sizes = [(int(width), int(height)) for width, height in size_I2]
    for name, (width, height) in zip(images, sizes, strict=True):
        if not width or not height:
            raise DataError(f"the size of {escape(name)} is not in the file: masks need width and height")
        if width * height > MAX_PIXELS:
            raise DataError(f"{escape(name)} has {width} x {height} px; the limit is {MAX_PIXELS} pixels")
    items = zip(images, sizes, outlines, strict=True)
    return [Drawable(name, size, tuple(drawn)) for name, size, drawn in items]


def _all_known(names: Sequence[str], class_of: Mapping[str, str | None]) -> None:
    unknown = sorted({name for name in names if class_of[name] is None})
    if unknown:
        raise DataError(f"{shown(unknown)}: not one of the seven classes, so without a colour")


def _patch(outline: Outline, x0: int, y0: int, width: int, height: int) -> NDArray[np.bool_]:
    if outline.ellipse is not None:
        cx, cy, rx, ry, degrees = outline.ellipse
        return ellipse_patch(cx, cy, rx, ry, degrees, x0 + np.arange(0.5, width), y0 + np.arange(0.5, height))
    if outline.pixels_HW is not None:
        dx, dy = x0 - math.floor(outline.box_4[0]), y0 - math.floor(outline.box_4[1])
        return outline.pixels_HW[dy : dy + height, dx : dx + width]
    rings = tuple(corner_K2 - (x0, y0) for corner_K2 in outline.polygons)
    return shapes.pixels(shapes.Polygon(rings), (height, width))


def _polygon(number: int, polygons: tuple[NDArray[np.float64], ...]) -> Outline:
    corners = np.concatenate(polygons)
    (x0, y0), (x1, y1) = corners.min(0).tolist(), corners.max(0).tolist()
    area = sum(
        abs(float(np.dot(p[:, 0], np.roll(p[:, 1], -1)) - np.dot(p[:, 1], np.roll(p[:, 0], -1)))) / 2 for p in polygons
    )
    return Outline(number, (x0, y0, x1 - x0, y1 - y0), area, polygons=polygons)


def _pixels(number: int, pixels_HW: NDArray[np.bool_]) -> Outline:
    """Cut to what it covers: whole images of many objects would not fit into memory."""
    row_h, column_w = np.nonzero(pixels_HW.any(1))[0], np.nonzero(pixels_HW.any(0))[0]
    if not len(row_h):
        return Outline(number, (0, 0, 0, 0), 0.0)
    x, y = int(column_w[0]), int(row_h[0])
    cut_hw = pixels_HW[y : row_h[-1] + 1, x : column_w[-1] + 1].copy()
    return Outline(number, (x, y, cut_hw.shape[1], cut_hw.shape[0]), float(cut_hw.sum()), pixels_HW=cut_hw)


def _from_segmentation(annotation: Mapping[str, Any], number: int, box_4: NDArray[np.float64]) -> Outline:
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        return _pixels(number, _decoded(segmentation, annotation["id"]))
    if segmentation:
        try:
            polygons = tuple(np.array(part, np.float64).reshape(-1, 2) for part in segmentation)
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(f"annotation {annotation['id']}: its segmentation is not lists of x, y") from error
        if any(len(part) < 3 or not (np.abs(part) <= MAX_PIXELS).all() for part in polygons):
            raise DataError(f"annotation {annotation['id']}: a polygon has three or more corners, all in the image")
        return _polygon(number, polygons)
    x, y, w, h = box_4.tolist()
    return _polygon(number, (np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]]),))


def _decoded(segmentation: Mapping[str, Any], number: int) -> NDArray[np.bool_]:
    """The pixels of COCO's run lengths, which go down the columns, compressed or not: bool (H, W)."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    why = f"annotation {number}: its run lengths cannot be used"
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise DataError(f"{why}, size is not two whole numbers")
    if not isinstance(counts, str | list):
        raise DataError(f"{why}, counts is neither a list nor a string")
    size_hw = size[0], size[1]
    try:
        made = shapes.compressed(size_hw, counts) if isinstance(counts, str) else shapes.mask(size_hw, counts)
    except ValueError as error:
        raise DataError(f"{why}, {error}") from error
    return shapes.pixels(made, size_hw)


def painted(items: Sequence[Drawable], palette: Palette) -> Iterator[tuple[str, bytes, str | None]]:
    """(file name, PNG, a line on hidden objects or None) of each image, one at a time."""
    for item, name in zip(items, mask_names([item.image for item in items]), strict=True):
        mask_HW, hidden = paint(item)
        yield name, encoded(mask_HW, palette), without_pixels(item, hidden)
