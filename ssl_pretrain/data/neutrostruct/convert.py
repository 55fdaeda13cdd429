"""Step 3: a COCO file of four classes becomes one of seven.

Every comparison is between diameters of one image, so the scale cancels; it is needed only where averages come from
outside, in micrometres. The data set's scripts fall short of their rule: ids that collide, a second formula that moves
granules over their own median, a file that is lost. This follows the rule, by name, and proves that nothing is lost.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_pretrain.data.files import escape
from ssl_pretrain.data.neutrostruct import CHILDREN, CLASSES, PARENTS, UNDECIDED, class_id, parents, tables
from ssl_pretrain.data.neutrostruct.coco import Coco, bbox_diameters
from ssl_pretrain.data.neutrostruct.naming import link, shown
from ssl_pretrain.data.neutrostruct.statistics import AVERAGE, Reading, statistics
from ssl_pretrain.data.readers import number
from ssl_pretrain.errors import DataError, SslPretrainError, UsageError

SUPERCATEGORY = "granule/vesicle"
"""As published."""
AVERAGE_COLUMNS = (AVERAGE, "average_diameter_um", "average_diameter_px")
_ULPS = 1 + 1e-12
"""Micrometres turned back into pixels may be a rounding too low, and a tie would then go to the large class."""


@dataclass(frozen=True, eq=False)
class Conversion:
    """What was done."""

    images: tuple[str, ...]
    before_I4: NDArray[np.int64]
    """Annotations of each image, by `PARENTS`."""
    after_I8: NDArray[np.int64]
    """By `CLASSES`, and last those left undecided."""
    median_px_I: NDArray[np.float64]
    average_px_I: NDArray[np.float64]
    """The two thresholds."""
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Counts before and after, in total and of each image, with the thresholds."""
        after = (*CLASSES, "undecided")
        images = {
            name: {
                "before": dict(zip(PARENTS, self.before_I4[i].tolist(), strict=True)),
                "after": dict(zip(after, self.after_I8[i].tolist(), strict=True)),
                "median_diameter_px": _or_none(self.median_px_I[i]),
                "average_diameter_px": _or_none(self.average_px_I[i]),
            }
            for i, name in enumerate(self.images)
        }
        return {
            "before": dict(zip(PARENTS, self.before_I4.sum(0).tolist(), strict=True)),
            "after": dict(zip(after, self.after_I8.sum(0).tolist(), strict=True)),
            "notes": list(self.notes),
            "images": images,
        }


def is_large(diameter: NDArray[np.float64], threshold: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each is of the large class; just as large as the threshold is small.

    >>> is_large(np.array([9.0, 10.0, 11.0]), np.array([10.0, 10.0, 10.0])).tolist()
    [False, False, True]
    """
    large: NDArray[np.bool_] = diameter > threshold
    return large


def convert(
    coco: Coco,
    average: Reading | Mapping[str, float],
    diameter_N: NDArray[np.float64] | None = None,
    aliases: Mapping[str, str] | None = None,
    keep_undecided: bool = False,
) -> tuple[dict[str, Any], Conversion]:
    """The document with seven classes, annotations in their order, and what was done; `coco` stays as it is.

    `average` is the diameter that parts empty vesicles from vacuoles: one of the two readings of the granules of the
    same image, or pixels by image name. `diameter_N` in pixels, by default of the boxes. An image with empty structures
    and no such diameter is an error, or else these keep their name, marked undecided. Raises `DataError`, `UsageError`.
    """
    parent_of = parents(coco.classes, aliases)
    _all_known(coco, parent_of)
    diameter_N = bbox_diameters(coco) if diameter_N is None else diameter_N
    found = statistics(coco, parent_of, diameter_N, {})
    average_I = _averages(coco, average) if isinstance(average, Mapping) else found.average_px_I[average]
    parent_C = np.array([PARENTS.index(parent) if parent else -1 for name, parent in parent_of.items()], np.int64)
    parent_N = parent_C[coco.class_N]
    is_empty_N = parent_N == PARENTS.index("empty")
    threshold_N = np.where(is_empty_N, average_I[coco.image_N], found.median_px_I[coco.image_N])
    open_N = is_empty_N & np.isnan(threshold_N)
    if open_N.any() and not keep_undecided:
        lost = [coco.images[i] for i in np.unique(coco.image_N[open_N])]
        raise DataError(
            f"{len(lost)} images have empty structures but no average diameter to judge them by ({shown(lost)}): "
            "choose another average, or keep these undecided"
        )
    # one row a parent: the ids of its small and of its large class
    id_42 = np.array([[class_id(CHILDREN[parent][0]), class_id(CHILDREN[parent][-1])] for parent in PARENTS])
    id_N = np.where(open_N, len(CLASSES) + 1, id_42[parent_N, is_large(diameter_N, threshold_N).astype(np.int64)])
    before_I4, after_I8 = _count(coco, parent_N, 4), _count(coco, id_N - 1, len(CLASSES) + 1)
    if not conserved(before_I4, after_I8, _count(coco, np.where(open_N, parent_N, 4), 5)[:, :4]):
        raise SslPretrainError("the conversion lost annotations: please report this")
    document = _document(coco, id_N, [name for name, parent in parent_of.items() if parent == "empty"])
    notes = [*coco.rejected, *_unused(parent_of)]
    if open_N.any():
        notes.append(f"{int(open_N.sum())} empty structures without an average diameter stay undecided")
    return document, Conversion(coco.images, before_I4, after_I8, found.median_px_I, average_I, tuple(notes))


def conserved(
    before_I4: NDArray[np.int64], after_I8: NDArray[np.int64], open_I4: NDArray[np.int64] | None = None
) -> bool:
    """Whether every image has as many annotations of each parent as of its children; `open_I4` are undecided.

    >>> before, after = np.array([[3, 1, 2, 1]]), np.array([[2, 1, 0, 1, 1, 1, 1, 0]])
    >>> conserved(before, after), conserved(before, after[:, ::-1])
    (True, False)
    """
    if open_I4 is None:
        open_I4 = np.zeros_like(before_I4)
    columns = [[CLASSES.index(name) for name in CHILDREN[parent]] for parent in PARENTS]
    children_I4 = np.stack([after_I8[:, place].sum(1) for place in columns], 1)
    same = np.array_equal(before_I4, children_I4 + open_I4)
    return same and np.array_equal(after_I8[:, len(CLASSES)], open_I4.sum(1))


def averages_px(path: Path, scales: Mapping[str, float], column: str | None = None) -> dict[str, float]:
    """Average diameters in pixels, by image name, from a table; micrometres need the scale of the image.

    The column is `average_diameter_SG_PG` or `average_diameter_um` (micrometres), `average_diameter_px`, or the one
    that is named; a name that ends in `_px` is in pixels. Raises `DataError`.
    """
    name = escape(path.name)
    table = tables.read(path)
    image_at = tables.image_column(table, name)
    found = [title for title in table.header if title in ((column,) if column else AVERAGE_COLUMNS)]
    if len(found) != 1:
        listed = ", ".join(escape(title) for title in table.header)
        wanted = escape(column) if column else f"one of {', '.join(AVERAGE_COLUMNS)}"
        raise DataError(f"{name} must have {wanted} once, to say which averages are meant; it has: {listed}")
    at, in_px = table.header.index(found[0]), found[0].endswith("_px")
    linked = link([row[image_at] for row in table.rows], scales)
    px: dict[str, float] = {}
    for i, row in enumerate(table.rows, 2):
        image = row[image_at]
        if not row[at]:
            continue  # no granules, no average: an error later if the image has empty structures
        if image in px:
            raise DataError(f"{name}: row {i} gives {escape(image)} a second average")
        if not in_px and image not in linked:
            raise DataError(
                f"{name}: {escape(found[0])} is in micrometres, and {escape(image)} has no scale: give the scales"
            )
        try:
            px[image] = number(row[at]) * (1.0 if in_px else scales[linked[image]] * _ULPS)
        except ValueError as error:
            raise DataError(f"{name}: row {i}: {escape(row[at])} is not a number") from error
    if not px or min(px.values()) <= 0:
        raise DataError(f"{name} has no average diameters, or some that are not positive")
    return px


def encoded(document: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON file: the same for the same document."""
    return json.dumps(document, allow_nan=False).encode() + b"\n"


def _averages(coco: Coco, average: Mapping[str, float]) -> NDArray[np.float64]:
    linked = link(coco.images, average)
    return np.array([average[linked[name]] if name in linked else math.nan for name in coco.images])


def _all_known(coco: Coco, parent_of: Mapping[str, str | None]) -> None:
    unknown = [name for name in coco.used if parent_of[name] is None]
    if unknown:
        raise UsageError(
            f"{shown(unknown)}: not known as one of {', '.join(PARENTS)}; say which it is, as an alias NAME=primary"
        )
    if not coco.annotations:
        raise DataError("there is no annotation to convert")


def _unused(parent_of: Mapping[str, str | None]) -> list[str]:
    """Classes that the new file lists no more; none of them has an annotation."""
    return [
        f"category {escape(name)} had no annotation and is gone" for name, parent in parent_of.items() if not parent
    ]


def _count(coco: Coco, column_N: NDArray[np.int64], columns: int) -> NDArray[np.int64]:
    """How many annotations each image has in each column: int64 (I, columns)."""
    flat = np.bincount(coco.image_N * columns + column_N, minlength=len(coco.images) * columns)
    return flat.reshape(len(coco.images), columns)


def _document(coco: Coco, id_N: NDArray[np.int64], empty: list[str]) -> dict[str, Any]:
    categories = [{"id": i, "name": name, "supercategory": SUPERCATEGORY} for i, name in enumerate(CLASSES, 1)]
    if (id_N > len(CLASSES)).any():
        name = empty[0] + UNDECIDED
        categories.append({"id": class_id(name), "name": name, "supercategory": SUPERCATEGORY})
    ids = id_N.tolist()
    annotations = [{**old, "category_id": new} for old, new in zip(coco.annotations, ids, strict=True)]
    return {**coco.document, "categories": categories, "annotations": annotations}


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
