"""What views see of objects: hand-worked crops, properties, and how good the guess without labels is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_pretrain.data import readers, synthetic
from ssl_pretrain.data.decode import decode
from ssl_pretrain.views import ViewSpec
from ssl_pretrain.views.audit import FOREGROUND_PX, Sight, audit, foreground, visible
from ssl_pretrain.views.plan import COLUMNS, INDEX, Plan, corners, plan, windows

SPEC = ViewSpec("view", 50, (0.2, 1.0))


def by_hand(*crops: tuple[float, float, float, float], spec: ViewSpec = SPEC, **columns: float) -> Plan:
    """A plan of one view an image: top, left, height, width."""
    buffer = np.zeros((len(crops), 1, len(COLUMNS)), np.float32)
    buffer[:, 0, :4] = np.reshape(crops, (-1, 4))
    for name, value in columns.items():
        buffer[..., INDEX[name]] = value
    return Plan((spec,), buffer)


def sight(boxes: Sequence[Sequence[float]], crop: tuple[float, float, float, float], **columns: float) -> Sight:
    return audit(by_hand(crop, **columns), 0, [np.array(boxes, float).reshape(-1, 4)])


# Hand-worked


def test_a_crop_that_holds_one_of_three() -> None:
    """The crop is x 20 to 120 and y 10 to 60; the view halves x and keeps y, so a square of 10 px is 5 by 10."""
    boxes = [(30, 20, 40, 30), (121, 20, 131, 30), (30, 61, 40, 71)]
    found = sight(boxes, (10, 20, 50, 100))
    assert (found.crops, found.share_with_object, found.objects_mean) == (1, 1.0, 1.0)
    assert found.side_px == pytest.approx([math.sqrt(50)] * 3)
    swapped = [(y0, x0, y1, x1) for x0, y0, x1, y1 in boxes]
    assert sight(swapped, (20, 10, 100, 50)) == found
    assert sight([(30, 121, 40, 131)], (10, 20, 50, 100)).share_with_object == 0  # x and y are not one another


def test_half_inside_counts_and_less_does_not() -> None:
    for left, counts in ((95, True), (95.2, False), (5, True), (4.8, False)):
        assert sight([(left, 40, left + 10, 50)], (0, 10, 100, 90)).share_with_object == counts, left
    # A quarter of the object, both halves cut: not contained.
    assert sight([(95, 95, 105, 105)], (0, 0, 100, 100)).objects_mean == 0


def test_an_object_that_fills_the_crop_counts() -> None:
    """Of the large object 1 % is in the crop, which it fills; of the other, 25 % or 24 % of the crop is covered."""
    assert sight([(0, 0, 1000, 1000)], (300, 300, 100, 100)).objects_mean == 1
    assert sight([(375, 0, 1000, 1000)], (300, 300, 100, 100)).objects_mean == 1
    assert sight([(376, 0, 1000, 1000)], (300, 300, 100, 100)).objects_mean == 0
    assert sight([(375, 0, 1000, 1000)], (300, 300, 100, 100)).side_px == pytest.approx(
        [50 * math.sqrt(625 * 1000) / 100] * 3
    )


def test_rotated_by_90_a_square_crop_shows_the_same() -> None:
    boxes = [(10, 20, 20, 25), (90, 90, 110, 95), (0, 60, 12, 70)]
    straight = sight(boxes, (0, 5, 100, 100))
    for angle in (math.pi / 2, -math.pi / 2, math.pi):
        turned = sight(boxes, (0, 5, 100, 100), angle=angle)
        assert turned.objects_mean == straight.objects_mean == 3
        assert turned.side_px == pytest.approx(straight.side_px)


def test_rotated_by_45_the_corners_are_lost_and_the_sides_bulge() -> None:
    """A square of 100 around (50, 50) becomes a diamond with its corners 70.7 px from there."""
    for box, held in [
        ((0, 0, 10, 10), False),  # the crop's own corner: 63.6 px from the middle along the diagonal, the edge is at 50
        ((-15, 45, -5, 55), True),  # outside the crop, inside the diamond's left corner
        ((105, 45, 115, 55), True),
        ((45, 105, 55, 115), True),
        ((-15, 20, -5, 30), False),
        ((45, 45, 55, 55), True),
    ]:
        found = sight([box], (0, 0, 100, 100), angle=math.pi / 4)
        assert found.share_with_object == held, box
        assert not held or found.side_px == pytest.approx([5.0] * 3)


def test_the_rotation_has_the_sign_that_images_have() -> None:
    """By an angle in pixels with y downwards, the corner at 45 degrees comes to lie at 45 degrees and the angle."""
    crop = (0, 0, 100, 100)  # 66 px from its middle there are only the corners
    for angle in (math.pi / 6, -math.pi / 6):
        x, y = (50 + 66 * math.cos(math.pi / 4 + angle), 50 + 66 * math.sin(math.pi / 4 + angle))
        assert sight([(x - 2, y - 2, x + 2, y + 2)], crop, angle=angle).objects_mean == 1
    # Not square, so that the sign shows: the long side is 200, turned by 30 degrees in the view's frame.
    quad = corners(by_hand((0, 0, 100, 200), angle=math.pi / 6), 0)[0, 0]
    middle = quad[:2].mean(0)  # of the view's upper edge
    inside_11, area_11 = visible(quad[None], np.array([[*(middle - 3), *(middle + 3)]]))
    assert inside_11.item() / area_11.item() == pytest.approx(0.5)
    assert middle == pytest.approx((100 + 200 * 0.5 * math.sin(math.pi / 6), 50 - 100 * 0.5 * math.cos(math.pi / 6)))


def test_flips_and_turns_change_nothing() -> None:
    boxes = [(10, 20, 20, 25), (90, 90, 110, 95), (70, 0, 82, 9)]
    straight = sight(boxes, (0, 5, 60, 90))
    for columns in ({"hflip": 1.0}, {"vflip": 1.0}, {"turn": 1.0}, {"turn": 3.0, "hflip": 1.0}):
        flipped = sight(boxes, (0, 5, 60, 90), **columns)
        assert flipped.objects_mean == straight.objects_mean and flipped.side_px == pytest.approx(straight.side_px)


def test_the_visible_area_is_that_of_many_points() -> None:
    random = np.random.default_rng(0)
    made = by_hand(*[(10, 20, 60, 90)] * 40)
    made.buffer[..., INDEX["angle"]] = random.uniform(-3, 3, (40, 1))
    quad_V42 = corners(made, 0)[:, 0]
    low_N2 = random.uniform(0, 90, (7, 2))
    box_N4 = np.concatenate([low_N2, low_N2 + random.uniform(5, 60, (7, 2))], axis=1)
    inside_VN, area_VN = visible(quad_V42, box_N4)
    grid_P2 = np.stack(np.meshgrid(*[(np.arange(200) + 0.5) / 200] * 2), -1).reshape(-1, 2)
    for quad_42, inside_N, area_N in zip(quad_V42, inside_VN, area_VN, strict=True):
        frame_22 = np.stack([quad_42[1] - quad_42[0], quad_42[3] - quad_42[0]], axis=1)
        for box_4, inside, area in zip(box_N4, inside_N, area_N, strict=True):
            points_P2 = box_4[:2] + grid_P2 * (box_4[2:] - box_4[:2])
            view_P2 = np.linalg.solve(frame_22, (points_P2 - quad_42[0]).T).T
            share = ((view_P2 >= 0) & (view_P2 <= 1)).all(1).mean()
            assert inside / area == pytest.approx(share, abs=0.01)


def test_windows_are_where_the_crops_are() -> None:
    """A view of the whole window holds a small object as often as half of the object lies in the window."""
    size_B2 = np.tile((300, 400), (400, 1))
    made = plan([replace(SPEC, scale=(1.0, 1.0), ratio=(1.0, 1.0))], np.arange(400), size_B2, 0, 0, 200)
    top_B, left_B, height_B, width_B = windows(np.arange(400), size_B2, 0, 0, 200).T
    assert (height_B == 200).all() and (width_B == 200).all()
    for x, y, low, high in ((190, 140, 0.95, 1.0), (0, 0, 0.0, 0.05), (60, 20, 0.05, 0.3)):
        inside_x_B = np.minimum(left_B + 200, x + 20) - np.maximum(left_B, x)
        inside_y_B = np.minimum(top_B + 200, y + 10) - np.maximum(top_B, y)
        held = float((inside_x_B.clip(0) * inside_y_B.clip(0) >= 100).mean())
        found = audit(made, 0, [np.array([[x, y, x + 20, y + 10]], float)] * 400)
        assert found.share_with_object == held and low <= held <= high


# Properties


def drawn(spec: ViewSpec, count: int = 30, size: tuple[int, int] = (90, 130)) -> Plan:
    return plan([spec], np.arange(count), np.tile(size, (count, 1)), epoch=0, seed=0)


def some_boxes(count: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    low = [random.uniform(0, 80, (random.integers(0, 6), 2)) for _ in range(count)]
    return [np.concatenate([x, x + random.uniform(2, 40, x.shape)], axis=1) for x in low]


def test_a_view_of_the_whole_image_holds_every_object() -> None:
    boxes = [box.clip(0, [130, 90, 130, 90]) for box in some_boxes(30)]
    found = audit(drawn(replace(SPEC, scale=(1.0, 1.0), ratio=(130 / 90, 130 / 90 + 1e-9))), 0, boxes)
    assert found.share_with_object == pytest.approx(np.mean([len(box) > 0 for box in boxes]))
    assert found.objects_mean == pytest.approx(np.mean([len(box) for box in boxes]))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.0, 1.0), st.floats(0.3, 3.0))
def test_neither_order_nor_scale_matters(seed: int, rotate_p: float, scale: float) -> None:
    made, boxes = drawn(replace(SPEC, count=2, rotate_p=rotate_p, turn_p=0.5)), some_boxes(30, seed)
    order = np.random.default_rng(seed).permutation(30)
    found = audit(made, 0, boxes)
    again = audit(replace(made, buffer=made.buffer[order]), 0, [boxes[i][::-1] for i in order])
    assert (again.share_with_object, again.objects_mean) == (found.share_with_object, found.objects_mean)
    assert again.side_px == pytest.approx(found.side_px)
    larger = made.buffer.copy()
    larger[..., :4] *= 4  # powers of two stay what they are in float32
    assert audit(replace(made, buffer=larger), 0, [box * 4 for box in boxes]).objects_mean == found.objects_mean


def test_nothing_to_see() -> None:
    for boxes in ([], [(5, 5, 5, 9)]):
        assert sight(boxes, (0, 0, 10, 10)) == Sight(1, 0.0, 0.0, None)
    assert audit(by_hand(), 0, []) == Sight(0, 0.0, 0.0, None)
    with pytest.raises(ValueError, match="of 1 images"):
        audit(by_hand((0, 0, 5, 5)), 0, [])


# The guess


def test_the_guess_finds_separate_things_on_an_uneven_ground() -> None:
    random = np.random.default_rng(0)
    y, x = np.mgrid[:300, :400]
    boxes = [(40, 30, 70, 60), (200, 100, 260, 130), (320, 200, 340, 280)]
    for sign in (-1, 1):  # dark on bright, bright on dark
        field = 128 - sign * 60 + 0.05 * x - 0.0003 * (y - 150) ** 2 + random.normal(0, 1.5, (300, 400))
        for x0, y0, x1, y1 in boxes:
            field[y0:y1, x0:x1] += sign * 50
        found = foreground(np.repeat(field.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2))
        assert len(found) == 3
        assert np.abs(found[np.argsort(found[:, 0])] - boxes).max() <= 4
    empty = (200 + random.normal(0, 2, (300, 400, 3))).astype(np.uint8)
    assert len(foreground(empty)) == 0


@pytest.mark.parametrize("size", [(5, 5), (8, 8), (9, 700), (700, 9), (2 * FOREGROUND_PX + 1, 2 * FOREGROUND_PX + 3)])
def test_the_guess_takes_images_of_any_size(size: tuple[int, int]) -> None:
    flat = foreground(np.full((*size, 3), 255, np.uint8))
    assert flat.shape == (0, 4)
    noise = foreground(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    assert (noise[:, 2:] <= size[::-1]).all() and (noise[:, :2] < noise[:, 2:]).all()


def shares(
    images: Sequence[np.ndarray], boxes: list[np.ndarray], spec: ViewSpec, window_px: int
) -> tuple[float, float]:
    """The share of crops with an object, by the labels and by the guess."""
    size_B2 = np.array([image.shape[:2] for image in images])
    made = plan([spec], np.arange(len(images)), size_B2, 0, 0, window_px)
    guessed = [foreground(image) for image in images]
    return audit(made, 0, boxes).share_with_object, audit(made, 0, guessed).share_with_object


def test_the_guess_agrees_with_what_was_drawn() -> None:
    fields = [synthetic.field(3, i) for i in range(12)]
    images, boxes = [one.pixels_HWC for one in fields], [one.boxes_N4 for one in fields]
    true, guessed = shares(images, boxes, replace(SPEC, count=20), 128)
    assert 0.5 < true < 0.95 and abs(true - guessed) < 0.12


def test_the_guess_agrees_with_the_labels_of_real_cells(real_data: Path) -> None:
    labelled = readers.read(real_data / "bccd").images[:300:25]
    images, boxes = [decode(one.path) for one in labelled], [one.boxes_N4 for one in labelled]
    true, guessed = shares(images, boxes, replace(SPEC, count=20), 200)
    assert abs(true - guessed) < 0.15
