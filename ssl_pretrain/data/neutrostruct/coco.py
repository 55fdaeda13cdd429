"""The COCO file: read and checked once, then held as columns.

What cannot be used (a box without size, a class or image that the file does not list) stops the reading, or is left out
and listed when the caller asks for that: a median over broken boxes would reclassify whole images.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_pretrain.data.files import Rejected, escape, read_bytes
from ssl_pretrain.data.neutrostruct.naming import shown
from ssl_pretrain.data.readers import stays_inside
from ssl_pretrain.errors import DataError

MAX_BYTES = 1 << 30
MAX_PX = 1_000_000
"""No coordinate is beyond; the largest image that is decoded has 32,768 px a side."""


@dataclass(frozen=True, eq=False)
class Coco:
    """A COCO file of boxes."""

    document: dict[str, Any]
    """As it stands in the file."""
    images: tuple[str, ...]
    """File names, unique, in the order of the file."""
    size_I2: NDArray[np.int64]
    """Width and height; 0 where the file does not say."""
    classes: tuple[str, ...]
    """Category names, unique, in the order of the file."""
    annotations: tuple[dict[str, Any], ...]
    """Those that can be used, as they stand in the file."""
    image_N: NDArray[np.int64]
    class_N: NDArray[np.int64]
    """Places in `images` and `classes`."""
    box_N4: NDArray[np.float64]
    """x, y, width, height in pixels, not clipped."""
    rejected: tuple[str, ...]
    """One line each, on annotations that were left out."""

    @property
    def used(self) -> tuple[str, ...]:
        """The classes that have an annotation."""
        return tuple(self.classes[i] for i in np.unique(self.class_N))


def read(path: Path, reject: bool = False) -> Coco:
    """The COCO file at `path`. Raises `DataError` for a broken one; with `reject`, broken annotations are left out."""
    return checked(_json(path), escape(path.name), reject)


def checked(document: Any, name: str = "the COCO file", reject: bool = False) -> Coco:
    """The columns of a COCO document that was read already; `name` is for messages. Raises `DataError`."""
    images, size_I2, place_of_image = _images(document, name)
    classes, place_of_class = _categories(document, name)
    kept: list[dict[str, Any]] = []
    rows: list[tuple[int, int]] = []
    boxes: list[list[float]] = []
    rejected: list[str] = []
    seen: set[int] = set()
    for i, annotation in enumerate(_list(document, "annotations", name)):
        why = _why_not(annotation, place_of_image, place_of_class, seen, size_I2)
        if why is not None:
            rejected.append(f"annotation {i + 1}: {why}")
            continue
        seen.add(annotation["id"])
        kept.append(annotation)
        rows.append((place_of_image[annotation["image_id"]], place_of_class[annotation["category_id"]]))
        boxes.append(annotation["bbox"])
    if rejected and not reject:
        raise DataError(
            f"{name}: {len(rejected)} annotations cannot be used ({rejected[0]}): mend them, or leave them out"
        )
    row_N2 = np.array(rows, np.int64).reshape(-1, 2)
    box_N4 = np.array(boxes, np.float64).reshape(-1, 4)
    return Coco(
        document,
        images,
        size_I2,
        classes,
        tuple(kept),
        row_N2[:, 0].copy(),
        row_N2[:, 1].copy(),
        box_N4,
        tuple(rejected),
    )


def bbox_diameters(coco: Coco) -> NDArray[np.float64]:
    """(w + h) / 2 of each box, in pixels: float64 (N,). The one place where this is computed, so that no rounding of a
    second formula moves a granule over its own median.

    >>> bbox = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 30, 41]}
    >>> names = {"images": [{"id": 1, "file_name": "a"}], "categories": [{"id": 1, "name": "PG"}]}
    >>> bbox_diameters(checked({**names, "annotations": [bbox]})).tolist()
    [35.5]
    """
    diameter_N: NDArray[np.float64] = (coco.box_N4[:, 2] + coco.box_N4[:, 3]) / 2
    return diameter_N


def _json(path: Path) -> Any:
    where = escape(str(path))
    try:
        return json.loads(read_bytes(path, MAX_BYTES), parse_constant=_refuse)
    except Rejected as why:
        raise DataError(f"{where} cannot be read: {why.reason}, {why.detail}") from why
    except RecursionError as error:
        raise DataError(f"{where} is nested too deeply to be a COCO file") from error
    except ValueError as error:  # malformed, not UTF-8, NaN, a number of thousands of digits
        raise DataError(f"{where} is not JSON that can be read: {escape(str(error))[:200]}") from error


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is not a number of JSON")


def _list(document: Any, key: str, name: str) -> list[Any]:
    if not isinstance(document, dict) or not isinstance(document.get(key), list):
        raise DataError(f"{name} is not a COCO file of objects: it has no list {key!r}")
    values: list[Any] = document[key]
    return values


def _images(document: Any, name: str) -> tuple[tuple[str, ...], NDArray[np.int64], dict[int, int]]:
    names: list[str] = []
    sizes: list[tuple[int, int]] = []
    place: dict[int, int] = {}
    for image in _list(document, "images", name):
        if not isinstance(image, dict) or not _is_id(image.get("id")) or not isinstance(image.get("file_name"), str):
            raise DataError(f"{name}: image {len(names) + 1} has no whole number as id, or no file_name")
        file_name = image["file_name"]
        if not stays_inside(file_name) or not file_name.isprintable():
            raise DataError(f"{name}: the image name {escape(file_name)} leads out of its folder or cannot be printed")
        if image["id"] in place:
            raise DataError(f"{name}: two images have the id {image['id']}")
        place[image["id"]] = len(names)
        names.append(file_name)
        sizes.append((_side(image.get("width")), _side(image.get("height"))))
    if not names:
        raise DataError(f"{name} lists no image")
    if len(set(names)) < len(names):
        twice = shown(sorted({file_name for file_name in names if names.count(file_name) > 1}))
        raise DataError(f"{name} lists the same image twice: {twice}")
    return tuple(names), np.array(sizes, np.int64).reshape(-1, 2), place


def _categories(document: Any, name: str) -> tuple[tuple[str, ...], dict[int, int]]:
    names: list[str] = []
    place: dict[int, int] = {}
    for category in _list(document, "categories", name):
        if (
            not isinstance(category, dict)
            or not _is_id(category.get("id"))
            or not isinstance(category.get("name"), str)
        ):
            raise DataError(f"{name}: category {len(names) + 1} has no whole number as id, or no name")
        if category["id"] in place or category["name"] in names:
            raise DataError(
                f"{name}: two categories have the id {category['id']} or the name {escape(category['name'])}"
            )
        place[category["id"]] = len(names)
        names.append(category["name"])
    return tuple(names), place


def _why_not(
    annotation: Any, images: dict[int, int], classes: dict[int, int], seen: set[int], size_I2: NDArray[np.int64]
) -> str | None:
    """Why an annotation cannot be used; None for one that can."""
    if not isinstance(annotation, dict) or not _is_id(annotation.get("id")):
        return "it has no whole number as id"
    if annotation["id"] in seen:
        return f"its id {annotation['id']} is taken"
    image, category, box = (annotation.get(key) for key in ("image_id", "category_id", "bbox"))
    if not _is_id(image) or image not in images:
        return "its image is not listed"
    if not _is_id(category) or category not in classes:  # the published scripts leave such ids behind
        return "its category is not listed"
    if not isinstance(box, list) or len(box) != 4 or not all(_is_coordinate(value) for value in box):
        return "its bbox is not four numbers"
    x, y, w, h = box
    if w <= 0 or h <= 0:
        return f"its bbox has no size ({w:g} x {h:g} px)"
    if annotation.get("iscrowd") not in (None, 0):
        return "it is a crowd, which has no diameter"
    width, height = size_I2[images[image]]
    if x + w <= 0 or y + h <= 0 or (width and x >= width) or (height and y >= height):
        return "its bbox is outside the image"
    return None


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def _is_coordinate(value: Any) -> bool:
    """A finite number that is not out of all proportion (NaN fails every comparison)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_PX


def _side(value: Any) -> int:
    return value if _is_id(value) and 0 < value <= MAX_PX else 0
