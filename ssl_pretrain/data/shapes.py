"""Outlines of objects: polygons and masks, and the ways in which label files write them.

Compressed runs are decoded here, in numpy, and not by pycocotools: its C code trusts what it is given, and label files
come from strangers. (It is the oracle of the tests.)

Shapes: P corners of a ring, R runs, an image of H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_PIXELS = 100_000_000
"""Of a mask, as of an image (`decode.MAX_PIXELS`)."""
MAX_CORNER_PX = 1e6
"""Of a polygon, to any side: no image is that large."""
_MAX_DIGITS = 7
"""Of a compressed run, five bits each: more than 2^34 pixels in one run."""


@dataclass(frozen=True, eq=False)
class Polygon:
    """One or more rings; what lies in any of them is the object."""

    rings: tuple[NDArray[np.float64], ...]
    """Each (P, 2): x, y in pixels from the image's top left corner, P at least 3."""


@dataclass(frozen=True, eq=False)
class Mask:
    """Pixels of an image as run lengths, column by column from the top left, background first: as COCO does."""

    size_hw: tuple[int, int]
    runs_R: NDArray[np.int64]


Shape = Polygon | Mask


def polygon(rings: Sequence[Sequence[float]]) -> Polygon:
    """Of flat lists x, y, x, y, ...; raises `ValueError` for a ring of less than 3 corners or an odd count.

    >>> polygon([[0, 0, 4, 0, 0, 3]]).rings[0].tolist()
    [[0.0, 0.0], [4.0, 0.0], [0.0, 3.0]]
    """
    made = []
    for ring in rings:
        flat = _numbers(ring, "iuf")
        if len(flat) < 6 or len(flat) % 2:
            raise ValueError(f"a ring of {len(flat)} numbers; at least 3 corners, two numbers each, are needed")
        corners_P2 = flat.astype(np.float64).reshape(-1, 2)
        if not (np.abs(corners_P2) <= MAX_CORNER_PX).all():  # NaN is not either
            raise ValueError("a corner that is not finite, or beyond all images")
        made.append(corners_P2)
    if not made:
        raise ValueError("a polygon without a ring")
    return Polygon(tuple(made))


def ellipse(cx: float, cy: float, rx: float, ry: float, degrees: float = 0.0, corners: int = 64) -> Polygon:
    """The polygon of points on an ellipse, turned clockwise about its centre as CVAT turns (y points down).

    >>> ellipse(5, 5, 4, 2, 90, corners=4).rings[0].round(6).tolist()
    [[5.0, 9.0], [3.0, 5.0], [5.0, 1.0], [7.0, 5.0]]
    """
    t_P, turn = np.arange(corners) * (2 * np.pi / corners), np.deg2rad(degrees)
    x_P, y_P = rx * np.cos(t_P), ry * np.sin(t_P)
    points_P2 = np.column_stack(
        [cx + x_P * np.cos(turn) - y_P * np.sin(turn), cy + x_P * np.sin(turn) + y_P * np.cos(turn)]
    )
    return Polygon((points_P2,))


def ellipse_extent(rx: float, ry: float, degrees: float) -> tuple[float, float]:
    """Width and height of the box around an ellipse with these half axes, turned by this angle.

    w = 2 sqrt(rx^2 cos^2 t + ry^2 sin^2 t), h = 2 sqrt(rx^2 sin^2 t + ry^2 cos^2 t). Turned by 45 degrees, half axes of
    3 and 4 give 2 sqrt(12.5) both ways:

    >>> [round(side, 4) for side in ellipse_extent(3, 4, 45)], 2 * 12.5**0.5
    ([7.0711, 7.0711], 7.0710678118654755)
    """
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return 2 * math.hypot(rx * c, ry * s), 2 * math.hypot(rx * s, ry * c)


def turned_box(x0: float, y0: float, x1: float, y1: float, degrees: float) -> Polygon:
    """A box turned clockwise about its centre (y points down).

    >>> turned_box(0, 0, 4, 2, 90).rings[0].round(6).tolist()
    [[3.0, -1.0], [3.0, 3.0], [1.0, 3.0], [1.0, -1.0]]
    """
    turn, centre = np.deg2rad(degrees), np.array([(x0 + x1) / 2, (y0 + y1) / 2])
    corners_P2 = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float64) - centre
    cos, sin = np.cos(turn), np.sin(turn)
    return Polygon((corners_P2 @ np.array([[cos, sin], [-sin, cos]]) + centre,))


def mask(size_hw: tuple[int, int], runs: Sequence[int] | NDArray[np.int64]) -> Mask:
    """Of COCO's uncompressed runs; raises `ValueError` for what is not whole numbers that fill the image exactly."""
    height, width = _size(size_hw)
    runs_R = _numbers(runs, "iu")
    # a run below 0 or above the whole is refused first, so that the sum cannot overflow
    if ((runs_R < 0) | (runs_R > height * width)).any() or int(runs_R.sum()) != height * width:
        raise ValueError(f"runs that do not fill {width} x {height} px")
    return Mask((height, width), runs_R.astype(np.int64))


def row_major(size_hw: tuple[int, int], runs: Sequence[int]) -> Mask:
    """Of runs that go row by row, background first (CISD's).

    >>> row_major((2, 3), [1, 2, 3]).runs_R.tolist()    # 0 1 1 / 0 0 0
    [2, 1, 1, 1, 1]
    """
    return of_pixels(_flat(mask(size_hw, runs)).reshape(size_hw))


def compressed(size_hw: tuple[int, int], text: str) -> Mask:
    """Of COCO's compressed runs: five bits a character from "0" on, the sixth says that more follow, the last one's
    highest bit is the sign; from the third run on it is the difference to the run before the last.

    >>> compressed((3, 3), "1213").runs_R.tolist()    # 1, 2, 1, then 3 + 2
    [1, 2, 1, 5]
    """
    digits_K = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    if ((digits_K < 0) | (digits_K > 63)).any():
        raise ValueError("a character that compressed runs do not have")
    if len(digits_K) and digits_K[-1] & 32:
        raise ValueError("compressed runs that are cut off")
    ends = np.flatnonzero((digits_K & 32) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    length_R = ends - starts + 1
    if (length_R > _MAX_DIGITS).any():
        raise ValueError("a compressed run beyond all images")
    runs: list[int] = []
    for start, length in zip(starts.tolist(), length_R.tolist(), strict=True):
        value = 0
        for k in range(length):
            value |= (int(digits_K[start + k]) & 31) << (5 * k)
        if digits_K[start + length - 1] & 16:
            value -= 1 << (5 * length)
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return mask(size_hw, runs)


def text_of(of: Mask) -> str:
    """The compressed runs: the inverse of `compressed`.

    >>> text_of(mask((3, 3), [1, 2, 1, 5]))
    '1213'
    """
    letters = []
    runs = of.runs_R.tolist()
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        while True:
            digit, value = value & 31, value >> 5
            more = value != (-1 if digit & 16 else 0)
            letters.append(chr(48 + digit + 32 * more))
            if not more:
                break
    return "".join(letters)


def of_pixels(inside_HW: NDArray[np.bool_]) -> Mask:
    """The runs of a mask.

    >>> of_pixels(np.array([[True, False], [True, True]])).runs_R.tolist()
    [0, 2, 1, 1]
    """
    flat = np.asarray(inside_HW, np.bool_).ravel(order="F")
    changes = np.flatnonzero(np.diff(np.concatenate([[False], flat])))
    runs_R = np.diff(np.concatenate([[0], changes, [flat.size]]))
    return Mask((inside_HW.shape[0], inside_HW.shape[1]), runs_R.astype(np.int64))


def of_spans(size_hw: tuple[int, int], start_K: NDArray[np.int64], end_K: NDArray[np.int64]) -> Mask:
    """Of sorted spans of pixels, counted column by column, ends excluded; spans that meet become one run.

    >>> of_spans((2, 2), np.array([1, 2]), np.array([2, 3])).runs_R.tolist()
    [1, 2, 1]
    """
    apart_K = np.ones(len(start_K), np.bool_)
    apart_K[1:] = start_K[1:] != end_K[:-1]
    edges = np.stack([start_K[apart_K], end_K[np.roll(apart_K, -1)]], axis=1).ravel()
    height, width = size_hw
    runs_R = np.diff(np.concatenate([[0], edges, [height * width]])).astype(np.int64)
    return Mask((height, width), runs_R[:-1] if len(runs_R) > 1 and runs_R[-1] == 0 else runs_R)


def placed(of: Mask, left: int, top: int, size_hw: tuple[int, int]) -> Mask:
    """The mask as a part of a larger image, with its top left pixel at (left, top); `ValueError` where it sticks out.

    >>> placed(of_pixels(np.array([[True]])), 1, 0, (2, 2)).runs_R.tolist()
    [2, 1, 1]
    """
    (rows, columns), (height, width) = of.size_hw, _size(size_hw)
    if left < 0 or top < 0 or left + columns > width or top + rows > height:
        raise ValueError(f"a mask of {columns} x {rows} px at ({left}, {top}) of {width} x {height} px")
    end_R = np.cumsum(of.runs_R)
    start_K, end_K = (end_R - of.runs_R)[1::2], end_R[1::2]
    first_K, last_K = start_K // rows, (end_K - 1) // rows
    # a run that goes on in the next column is cut there, for between them lies background now
    pieces_K = np.where(end_K > start_K, last_K - first_K + 1, 0)
    k = np.repeat(np.arange(len(start_K)), pieces_K)
    column = first_K[k] + np.arange(len(k)) - np.repeat(np.cumsum(pieces_K) - pieces_K, pieces_K)
    starts = np.maximum(start_K[k], column * rows) - column * rows
    ends = np.minimum(end_K[k], (column + 1) * rows) - column * rows
    origin = (column + left) * height + top
    return of_spans((height, width), origin + starts, origin + ends)


def pixels(shape: Shape, size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask, bool (H, W): of a polygon the pixels whose middle is inside. `ValueError` for a mask of another size.

    >>> pixels(polygon([[0, 0, 2, 0, 2, 1, 0, 1]]), (2, 3)).astype(int).tolist()
    [[1, 1, 0], [0, 0, 0]]
    """
    if isinstance(shape, Mask):
        if shape.size_hw != size_hw:
            raise ValueError(f"a mask of {shape.size_hw} in an image of {size_hw}, both height and width")
        return _flat(shape).reshape(size_hw[::-1]).T
    drawn_HW = np.zeros(size_hw, np.bool_)
    for ring_P2 in shape.rings:
        _fill(ring_P2, drawn_HW)
    return drawn_HW


def box(shape: Shape) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 of what encloses the shape, edges in pixels; all 0 for a mask without a pixel.

    >>> box(of_pixels(np.array([[False, False], [False, True]])))
    (1.0, 1.0, 2.0, 2.0)
    """
    if isinstance(shape, Polygon):
        corners_P2 = np.concatenate(shape.rings)
        (x0, y0), (x1, y1) = corners_P2.min(0).tolist(), corners_P2.max(0).tolist()
        return x0, y0, x1, y1
    end_R = np.cumsum(shape.runs_R)
    start_K, end_K = (end_R - shape.runs_R)[1::2], end_R[1::2]
    start_K, end_K = start_K[end_K > start_K], end_K[end_K > start_K]
    if not len(start_K):
        return 0.0, 0.0, 0.0, 0.0
    height = shape.size_hw[0]
    whole_K = start_K // height != (end_K - 1) // height  # over the end of a column: all rows, or nearly
    top = 0 if whole_K.any() else int((start_K % height).min())
    bottom = height if whole_K.any() else int(((end_K - 1) % height).max()) + 1
    return float(start_K.min() // height), float(top), float((end_K.max() - 1) // height + 1), float(bottom)


def _fill(ring_P2: NDArray[np.float64], drawn_HW: NDArray[np.bool_]) -> None:
    """Draws what is inside a ring, even-odd. (Pillow's polygons are half a pixel off and a sixth too large.)"""
    height, width = drawn_HW.shape
    (x0_P, y0_P), (x1_P, y1_P) = ring_P2.T, np.roll(ring_P2, -1, axis=0).T
    # an edge crosses the rows whose middle is between its ends; the lower end is the next edge's
    top_P = np.ceil(np.minimum(y0_P, y1_P) - 0.5).clip(0, height).astype(np.int64)
    count_P = np.ceil(np.maximum(y0_P, y1_P) - 0.5).clip(0, height).astype(np.int64) - top_P
    edge = np.repeat(np.arange(len(top_P)), count_P)
    if not len(edge):
        return
    row = top_P[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(count_P) - count_P, count_P)
    part = (row + 0.5 - y0_P[edge]) / (y1_P - y0_P)[edge]
    column = np.ceil(x0_P[edge] + part * (x1_P - x0_P)[edge] - 0.5).clip(0, width).astype(np.int64)
    rows, columns = slice(int(row.min()), int(row.max()) + 1), slice(int(column.min()), int(column.max()))
    flips = np.zeros((rows.stop - rows.start, columns.stop - columns.start + 1), np.bool_)
    np.logical_xor.at(flips, (row - rows.start, column - columns.start), True)
    drawn_HW[rows, columns] |= np.logical_xor.accumulate(flips, axis=1)[:, :-1]


def _size(size_hw: tuple[int, int]) -> tuple[int, int]:
    """The size of a mask, as it may be; raises `ValueError`."""
    height, width = size_hw
    if type(height) is not int or type(width) is not int:
        raise ValueError("a mask whose size is not two whole numbers")
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise ValueError(f"a mask without pixels, or of more than {MAX_PIXELS}")
    return height, width


def _numbers(values: object, kinds: str) -> NDArray[Any]:
    """A flat list of numbers as it comes out of JSON; raises `ValueError` for anything else in it, truth values too."""
    if not isinstance(values, list | tuple | np.ndarray):
        raise ValueError("not a list of numbers")
    array = np.asarray(values)
    if array.ndim != 1 or (array.dtype.kind not in kinds and len(array)):
        raise ValueError("not a list of numbers")
    if not isinstance(values, np.ndarray) and any(isinstance(value, bool) for value in values):
        raise ValueError("a truth value among numbers")
    return array


def _flat(of: Mask) -> NDArray[np.bool_]:
    """In the order of the runs."""
    return np.repeat(np.arange(len(of.runs_R)) % 2 == 1, of.runs_R)
