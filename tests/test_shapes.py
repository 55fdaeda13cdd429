"""Outlines against pycocotools, whose C code is the format's own; against SciPy for parts that hang together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools import mask as coco
from scipy import ndimage

from ssl_pretrain.data.files import Rejected
from ssl_pretrain.data.label_images import objects_by_number, objects_by_touch
from ssl_pretrain.data.shapes import (
    Mask,
    Polygon,
    box,
    compressed,
    ellipse,
    mask,
    of_pixels,
    of_spans,
    pixels,
    placed,
    polygon,
    row_major,
    text_of,
    turned_box,
)

QUICK = settings(deadline=None, max_examples=100)


@st.composite
def tables(draw: st.DrawFn, most: int = 12, values: int = 1) -> NDArray[np.int64]:
    """Small tables of numbers from 0 to `values`, thin ones, full ones and empty ones among them."""
    size = draw(st.tuples(st.integers(1, most), st.integers(1, most)))
    numbers = draw(st.lists(st.integers(0, values), min_size=size[0] * size[1], max_size=size[0] * size[1]))
    return np.array(numbers, np.int64).reshape(size)


def encoded(inside: NDArray[Any]) -> dict[str, Any]:
    return dict(coco.encode(np.asfortranarray(inside.astype(np.uint8))))


# --- runs -------------------------------------------------------------------------------------------------------------


@QUICK
@given(tables())
def test_runs_are_cocos(table: NDArray[np.int64]) -> None:
    of = of_pixels(table == 1)
    theirs = encoded(table)
    assert text_of(of).encode() == theirs["counts"]
    back = compressed(of.size_hw, theirs["counts"].decode())
    assert back.runs_R.tolist() == of.runs_R.tolist()
    assert (pixels(back, of.size_hw) == (table == 1)).all()
    x, y, width, height = coco.toBbox(theirs).tolist()
    x0, y0, x1, y1 = box(of)
    assert (x0, y0, x1 - x0, y1 - y0) == (x, y, width, height)


@QUICK
@given(tables())
def test_runs_row_by_row(table: NDArray[np.int64]) -> None:
    turned = of_pixels(table.T == 1).runs_R.tolist()  # column by column of the transposed is row by row
    assert row_major((table.shape[0], table.shape[1]), turned).runs_R.tolist() == of_pixels(table == 1).runs_R.tolist()


def test_long_runs_and_falling_ones() -> None:
    runs = [0, 30_000_000, 5, 1, 7, 69_999_987]
    of = mask((10_000, 10_000), runs)
    theirs = coco.frPyObjects({"size": [10_000, 10_000], "counts": runs}, 10_000, 10_000)
    assert text_of(of).encode() == theirs["counts"]
    assert compressed((10_000, 10_000), text_of(of)).runs_R.tolist() == runs


@pytest.mark.parametrize(
    ("runs", "why"),
    [
        ([1, 2], "do not fill"),
        ([5, -1], "do not fill"),
        ([2**62, 2**62, 2**62, 2**62], "do not fill"),
        ([10**30], "not a list of numbers"),
        ([-(10**30), 4], "not a list of numbers"),
        ([1.0, 3.0], "not a list of numbers"),
        ([1.5, 2.5], "not a list of numbers"),
        (["4"], "not a list of numbers"),
        ([None], "not a list of numbers"),
        ([[1], [1, 2]], "inhomogeneous"),
        ([[4]], "not a list of numbers"),
        ([3, True], "truth value"),
        ("4", "not a list of numbers"),
        (4, "not a list of numbers"),
        ({}, "not a list of numbers"),
        ([], "do not fill"),
    ],
)
def test_runs_that_are_none(runs: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        mask((2, 2), runs)


@pytest.mark.parametrize("size", [(0, 4), (-2, -2), (2**40, 2**40), (2.0, 2), (True, 4), ("2", 2), (10**5000, 1)])
def test_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(ValueError, match="a mask"):
        mask(size, [4])


@pytest.mark.parametrize("text", ["", "1", "0o0", "\x00", "ÿ4", "o" * 8 + "0", "1213P", "P", "N4", "\udcff"])
def test_compressed_runs_that_are_none(text: str) -> None:
    with pytest.raises(ValueError):
        compressed((2, 2), text)


@QUICK
@given(st.text(alphabet=[chr(c) for c in range(46, 114)], max_size=20))
def test_any_text_is_runs_or_refused(text: str) -> None:
    try:
        of = compressed((3, 5), text)
    except ValueError:
        return
    assert of.runs_R.min() >= 0 and of.runs_R.sum() == 15


# --- spans and places -------------------------------------------------------------------------------------------------


@QUICK
@given(tables(), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
def test_a_mask_in_a_larger_image(table: NDArray[np.int64], left: int, top: int, right: int, bottom: int) -> None:
    large = np.pad(table == 1, ((top, bottom), (left, right)))
    moved = placed(of_pixels(table == 1), left, top, (large.shape[0], large.shape[1]))
    assert moved.runs_R.tolist() == of_pixels(large).runs_R.tolist()


@pytest.mark.parametrize(("left", "top"), [(-1, 0), (0, -1), (2, 0), (0, 2)])
def test_a_mask_that_sticks_out(left: int, top: int) -> None:
    with pytest.raises(ValueError, match="a mask of 3 x 3 px at"):
        placed(of_pixels(np.ones((3, 3), bool)), left, top, (4, 4))


def test_no_span_is_an_empty_mask() -> None:
    none = np.zeros(0, np.int64)
    assert of_spans((2, 3), none, none).runs_R.tolist() == [6]
    assert box(of_spans((2, 3), none, none)) == (0, 0, 0, 0)
    assert of_spans((2, 3), np.array([0]), np.array([6])).runs_R.tolist() == [0, 6]


# --- parts of label images --------------------------------------------------------------------------------------------


@QUICK
@given(tables(values=3))
def test_parts_hang_together(table: NDArray[np.int64]) -> None:
    found = {(value, tuple(of.runs_R.tolist())) for value, of in objects_by_touch(table)}
    expected = set()
    for value in range(1, 4):
        labels, count = ndimage.label(table == value, np.ones((3, 3)))
        expected |= {(value, tuple(of_pixels(labels == i).runs_R.tolist())) for i in range(1, count + 1)}
    assert found == expected and len(objects_by_touch(table)) == len(expected)


@QUICK
@given(tables(values=3), st.integers(0, 3))
def test_every_pixel_is_in_one_part(table: NDArray[np.int64], background: int) -> None:
    covered = np.zeros(table.shape, np.int64)
    for value, of in objects_by_touch(table, background):
        inside = pixels(of, (table.shape[0], table.shape[1]))
        assert (table[inside] == value).all()
        covered += inside
    assert (covered == (table != background)).all()


@QUICK
@given(tables(values=4))
def test_one_object_a_number(table: NDArray[np.int64]) -> None:
    found = objects_by_number(table)
    assert [value for value, _ in found] == [value for value in np.unique(table).tolist() if value]
    assert all(of.runs_R.tolist() == of_pixels(table == value).runs_R.tolist() for value, of in found)


def test_a_snake_is_one_part() -> None:
    """The worst case of hanging together: every span knows two neighbours only."""
    snake = np.zeros((101, 101), np.int64)
    snake[::2] = 1
    snake[1::4, -1] = 1
    snake[3::4, 0] = 1
    assert len(objects_by_touch(snake)) == 1
    assert len(objects_by_touch(np.ascontiguousarray(snake.T))) == 1


def test_noise_is_not_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    table = np.arange(400).reshape(20, 20)
    monkeypatch.setattr("ssl_pretrain.data.label_images.MAX_OBJECTS", 398)
    with pytest.raises(Rejected, match="399 objects; at most 398"):
        objects_by_number(table)
    monkeypatch.setattr("ssl_pretrain.data.label_images.MAX_SPANS", 399)
    with pytest.raises(Rejected, match="noise"):
        objects_by_touch(table)


# --- polygons ---------------------------------------------------------------------------------------------------------


@QUICK
@given(st.integers(-3, 20), st.integers(-3, 20), st.integers(1, 12), st.integers(1, 12))
def test_a_rectangle_has_its_pixels(x: int, y: int, width: int, height: int) -> None:
    shape = polygon([[x, y, x + width, y, x + width, y + height, x, y + height]])
    expected = np.zeros((26, 24), bool)
    expected[max(y, 0) : max(y + height, 0), max(x, 0) : max(x + width, 0)] = True
    assert (pixels(shape, (26, 24)) == expected).all()
    assert box(shape) == (x, y, x + width, y + height)


@QUICK
@given(st.floats(-5, 70), st.floats(-5, 70), st.floats(0.5, 40), st.floats(0.5, 40), st.floats(-400, 400))
def test_an_ellipse_has_the_pixels_whose_middle_is_inside(
    cx: float, cy: float, rx: float, ry: float, degrees: float
) -> None:
    inside = pixels(ellipse(cx, cy, rx, ry, degrees, corners=512), (48, 64))
    y, x = np.mgrid[:48, :64] + 0.5
    turn = np.deg2rad(degrees)
    across = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
    down = (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
    far = (across / rx) ** 2 + (down / ry) ** 2
    assert inside[far < 0.999].all() and not inside[far > 1.001].any()


@QUICK
@given(st.lists(st.tuples(st.floats(-9, 40), st.floats(-9, 40)), min_size=3, max_size=9))
def test_a_star_has_the_pixels_of_even_and_odd(corners: list[tuple[float, float]]) -> None:
    """Against the crossings to the left of each middle, one by one."""
    inside = pixels(Polygon((np.array(corners),)), (24, 20))
    for row, column in ((0, 0), (3, 7), (11, 11), (23, 19), (12, 0), (0, 12)):
        x, y, crossings = column + 0.5, row + 0.5, 0
        for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
            if (y0 <= y) != (y1 <= y):
                crossings += x0 + (y - y0) / (y1 - y0) * (x1 - x0) <= x
        assert inside[row, column] == crossings % 2


def test_a_triangle_against_pycocotools() -> None:
    """Theirs is drawn at five times the size and rounded: alike but for pixels at the edge."""
    ring = [3.2, 4.1, 55.7, 12.3, 20.5, 44.9]
    theirs = pixels(compressed((48, 64), coco.frPyObjects([ring], 48, 64)[0]["counts"].decode()), (48, 64))
    ours = pixels(polygon([ring]), (48, 64))
    edge = ndimage.binary_dilation(theirs) & ~ndimage.binary_erosion(theirs)
    assert (ours == theirs)[~edge].all() and abs(int(ours.sum()) - int(theirs.sum())) < 0.1 * edge.sum()


def test_turns_go_clockwise() -> None:
    """x to the right, y down: the right end of a lying ellipse goes down."""
    corner = ellipse(0, 0, 10, 1, 30, corners=4).rings[0][0]
    assert corner == pytest.approx([10 * np.cos(np.pi / 6), 10 * np.sin(np.pi / 6)])
    x, y = turned_box(-10, -1, 10, 1, 30).rings[0].T
    assert x[1] > 0 and y[1] > 0 and box(turned_box(0, 0, 4, 2, 180)) == pytest.approx((0, 0, 4, 2))


def test_two_rings_are_one_object() -> None:
    shape = polygon([[0, 0, 4, 0, 4, 4, 0, 4], [10, 10, 14, 10, 14, 14, 10, 14]])
    assert box(shape) == (0, 0, 14, 14)
    inside = pixels(shape, (20, 20))
    assert inside[1, 1] and inside[12, 12] and not inside[7, 7]


def test_a_hole_is_filled_because_rings_are_joined() -> None:
    shape = polygon([[0, 0, 20, 0, 20, 20, 0, 20], [5, 5, 15, 5, 15, 15, 5, 15]])
    assert pixels(shape, (20, 20))[10, 10]


@pytest.mark.parametrize(
    ("rings", "why"),
    [
        ([[0, 0, 1, 1]], "4 numbers"),
        ([[0, 0, 1, 1, 2]], "5 numbers"),
        ([[0, 0, 1, 1, 2, 2, 3]], "7 numbers"),
        ([[0, 0, 1, 1, 2, float("nan")]], "not finite"),
        ([[0, 0, 1, 1, 2, float("inf")]], "not finite"),
        ([[0, 0, 1, 1, 2, 1e7]], "beyond all images"),
        ([[0, 0, 1, 1, 2, 10**400]], "not a list"),
        ([["0", "0", "1", "1", "2", "2"]], "not a list"),
        ([[0, 0, 1, 1, 2, None]], "not a list"),
        ([[0, 0, 1, 1, 2, True]], "truth value"),
        ([[[0, 0], [1, 1], [2, 2]]], "not a list"),
        ([7], "not a list"),
        ([], "without a ring"),
    ],
)
def test_polygons_that_are_none(rings: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        polygon(rings)


def test_a_mask_of_another_size() -> None:
    with pytest.raises(ValueError, match="in an image of"):
        pixels(Mask((2, 2), np.array([4])), (2, 3))
    assert not pixels(Polygon((np.full((3, 2), 900.0),)), (20, 30)).any()
