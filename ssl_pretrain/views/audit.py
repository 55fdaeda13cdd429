"""What views see of the objects in an image, counted on plans alone: no pixel is resized for it.

A crop *contains* an object when at least half of the object's box lies in it, or when the object covers at least a
quarter of it (an object that is larger than the crop, or fills it). Both are measured in the view's own frame, so that
a rotated view is judged by what it shows and not by the upright box around it. An object's mirror image, which a
rotated view may show beyond the border of the image, does not count.

Where nobody has labelled objects, `foreground` guesses where they are; a guess is good enough to tell an empty crop
from a full one, not more: cells that touch are one object to it.

Legend: B images, V views of a spec, N objects of an image, K corners, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ssl_pretrain.views.plan import Plan, corners

Floats = NDArray[np.float64]

INSIDE, COVERS = 0.5, 0.25
"""Share of an object's box in the crop, or of the crop under it, from which on the crop contains the object."""
FOREGROUND_PX = 256
"""Images are reduced to about this short side before objects are looked for: enough for an object of 2 % of it."""
SPECK_PX = 12
"""Spots of fewer pixels than this are dust or noise, after the reduction; fewer, to 4, in images that are smaller."""
FAINT = 6.0
"""Distance from the background, of 255 a colour, below which nothing is an object."""


@dataclass(frozen=True)
class Sight:
    """What the crops of one view spec show."""

    crops: int
    """How many were looked at."""
    share_with_object: float
    """Of the crops, those that contain an object; 0 to 1."""
    objects_mean: float
    """Objects that a crop contains, on average."""
    side_px: tuple[float, float, float] | None
    """10, 50 and 90 % of the contained objects are smaller: side of the square with the area of the object's whole box,
    in pixels of the view. None where no crop contains an object."""


def audit(plan: Plan, spec_index: int, boxes_per_image: Sequence[NDArray[np.floating]]) -> Sight:
    """Which objects the views of one spec contain.

    `boxes_per_image` has, for each image of the plan, its objects (N, 4): x0, y0, x1, y1 in stored pixels. One without
    an area is passed over.
    """
    quad_BV42 = corners(plan, spec_index)
    if len(quad_BV42) != len(boxes_per_image):
        raise ValueError(f"the plan is of {len(quad_BV42)} images, the boxes are of {len(boxes_per_image)}")
    counts, sides = [np.zeros(0)], [np.zeros(0)]
    for quad_V42, box_N4 in zip(quad_BV42, boxes_per_image, strict=True):
        inside_VN, area_VN = visible(quad_V42, np.asarray(box_N4, np.float64).reshape(-1, 4))
        more_VN = inside_VN * (1 + 1e-9)  # exactly a half is a half, whatever the rounding
        contained_VN = ((more_VN >= INSIDE * area_VN) | (more_VN >= COVERS)) & (area_VN > 0)
        counts.append(contained_VN.sum(1))
        sides.append(np.sqrt(area_VN[contained_VN]) * plan.specs[spec_index].size_px)
    count_M, side_M = np.concatenate(counts), np.concatenate(sides)
    low, middle, high = np.percentile(side_M, (10, 50, 90)).tolist() if len(side_M) else (0.0, 0.0, 0.0)
    return Sight(
        crops=len(count_M),
        share_with_object=float((count_M > 0).mean()) if len(count_M) else 0.0,
        objects_mean=float(count_M.mean()) if len(count_M) else 0.0,
        side_px=(low, middle, high) if len(side_M) else None,
    )


def visible(quad_V42: Floats, box_N4: Floats) -> tuple[Floats, Floats]:
    """(V, N) twice: the area of each object that lies in each view, and its whole area, in areas of the view.

    Views are given by their corners in the image (`plan.corners`), objects by x0, y0, x1, y1.

    >>> unturned = np.array([[[0, 0], [4, 0], [4, 4], [0, 4]]], float)
    >>> inside_VN, area_VN = visible(unturned, np.array([[3, 1, 5, 3]], float))
    >>> inside_VN.item(), area_VN.item()
    (0.125, 0.25)
    """
    corner_NK2 = box_N4[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]
    x_V2, y_V2 = quad_V42[:, 1] - quad_V42[:, 0], quad_V42[:, 3] - quad_V42[:, 0]
    from_view_V22 = np.stack([x_V2, y_V2], axis=-1)
    offset_VNK2 = corner_NK2 - quad_V42[:, None, None, 0]
    # In the view's frame the view is the unit square, whatever its rotation, flips and aspect ratio.
    polygon_VNK2 = np.einsum("vij,vnkj->vnki", np.linalg.inv(from_view_V22), offset_VNK2)
    return _area(_clamped(_clamped(polygon_VNK2, 0), 1)), _area(polygon_VNK2)


def _clamped(polygon_VNK2: Floats, axis: int) -> Floats:
    """The polygons cut to 0 <= x <= 1 (or y): (V, N, 3K, 2), with points that may repeat but enclose the same area.

    What runs outside is pushed onto the border, where it encloses nothing, once each edge is split where it crosses.
    """
    step_VNK2 = np.roll(polygon_VNK2, -1, axis=2) - polygon_VNK2
    start_VNK1, length_VNK1 = polygon_VNK2[..., axis, None], step_VNK2[..., axis, None]
    # An edge along the border crosses nowhere: this sends its crossings to its ends.
    length_VNK1 = np.where(length_VNK1 == 0, 1e-300, length_VNK1)
    with np.errstate(over="ignore"):
        crossings = [((border - start_VNK1) / length_VNK1).clip(0, 1) for border in (0.0, 1.0)]
    points = [polygon_VNK2 + step_VNK2 * t for t in (0.0, np.minimum(*crossings), np.maximum(*crossings))]
    views, objects, points_before, _ = polygon_VNK2.shape
    split = np.stack(points, axis=3).reshape(views, objects, 3 * points_before, 2)
    split[..., axis] = split[..., axis].clip(0, 1)
    return np.asarray(split)


def _area(polygon_VNK2: Floats) -> Floats:
    """Gauss's shoelace formula."""
    x, y = polygon_VNK2[..., 0], polygon_VNK2[..., 1]
    return np.asarray(abs((x * np.roll(y, -1, axis=2) - y * np.roll(x, -1, axis=2)).sum(2)) / 2)


# Where nobody has labelled


def foreground(image_HWC: NDArray[np.uint8]) -> Floats:
    """A guess at the objects of a field, (N, 4): x0, y0, x1, y1 of what stands out from the background's colour.

    Made for fields of separate things on an even ground, bright or dark. Things that touch come as one; of things
    that hardly differ from the ground, parts are missed.
    """
    if min(image_HWC.shape[:2]) < 8:
        return np.zeros((0, 4))
    step = -(-min(image_HWC.shape[:2]) // FOREGROUND_PX)
    height, width = (side // step for side in image_HWC.shape[:2])
    blocks = image_HWC[: height * step, : width * step].reshape(height, step, width, step, 3)
    x_HWC = blocks.mean((1, 3), dtype=np.float32)
    ground_HWC, noise = _background(x_HWC)
    distance_HW = _blurred(np.sqrt(np.square(x_HWC - ground_HWC).sum(2)), 1)
    brightest = np.percentile(distance_HW, 99.5)  # a few black specks would draw Otsu's threshold up to themselves
    threshold = max(_otsu(np.minimum(distance_HW, brightest)), FAINT, 2 * noise)
    return _spots(distance_HW > threshold) * float(step)


def _background(x_HWC: NDArray[np.floating]) -> tuple[Floats, float]:
    """The colour of the ground as a surface of second order, as lamps and vignettes make it, and its noise.

    The ground is what is smooth and has the commonest colour; the surface is fitted to what lies near it, four times.
    In a crowded field the median, or any blur, would be of the objects.
    """
    height, width = x_HWC.shape[:2]
    y_HW, x_HW = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    terms_HWP = np.stack([np.ones_like(x_HW), x_HW, y_HW, x_HW**2, x_HW * y_HW, y_HW**2], axis=-1)
    gray_HW = x_HWC.mean(2)
    rough_N = (_blurred(gray_HW**2, 2) - _blurred(gray_HW, 2) ** 2).ravel()
    smooth_N = np.flatnonzero(rough_N <= np.median(rough_N))[::3]
    colour_NC, terms_NP = x_HWC.reshape(-1, 3)[smooth_N], terms_HWP.reshape(-1, 6)[smooth_N]
    shade_NC = (colour_NC // 12).astype(np.int64)
    shades, counts = np.unique(shade_NC @ (1024, 32, 1), return_counts=True)
    commonest = int(shades[counts.argmax()])
    mode_C = np.array([commonest // 1024, commonest // 32 % 32, commonest % 32]) * 12 + 6.0
    coefficients_PC = np.concatenate([mode_C[None], np.zeros((5, 3))])
    distance_N, within, noise = abs(colour_NC - mode_C).max(1), 30.0, 0.0
    for _ in range(4):
        near_N = distance_N < within
        if near_N.sum() < 50:
            break
        coefficients_PC = np.linalg.lstsq(terms_NP[near_N], colour_NC[near_N].astype(np.float64), rcond=None)[0]
        distance_N = abs(colour_NC - terms_NP @ coefficients_PC).max(1)
        noise = float(np.median(distance_N[near_N]))
        within = min(max(FAINT, 4.5 * noise), 20.0)  # wider, and a crowd of cells would become the ground
    return np.asarray(terms_HWP @ coefficients_PC), noise


def _blurred(x_HW: NDArray[np.floating], radius: int) -> Floats:
    """The mean of a square of 2 * radius + 1, edges repeated."""
    side, result = 2 * radius + 1, np.asarray(x_HW, np.float64)
    for _ in range(2):
        padded = np.pad(result, [(radius + 1, radius), (0, 0)], mode="edge").cumsum(0)
        result = ((padded[side:] - padded[:-side]) / side).T
    return result


def _otsu(x_HW: Floats) -> float:
    """The threshold with the widest gap between the means of its two sides (Otsu 1979)."""
    count, edge = np.histogram(x_HW, 256)
    middle = (edge[:-1] + edge[1:]) / 2
    below, sum_below = count.cumsum(), (count * middle).cumsum()
    apart = below * (below[-1] - below)
    gap = np.divide((sum_below[-1] * below - below[-1] * sum_below) ** 2, apart, out=np.zeros(256), where=apart > 0)
    return float(edge[1:][gap.argmax()])


def _spots(mask_HW: NDArray[np.bool_]) -> Floats:
    """The boxes of connected parts (eight neighbours), (N, 4): x0, y0, x1, y1; specks are left out.

    >>> mask = np.zeros((12, 20), bool)
    >>> mask[2:4, 3:6] = mask[4, 6] = mask[9, 9:12] = True
    >>> _spots(mask).tolist()
    [[3.0, 2.0, 7.0, 5.0]]
    """
    speck_px = max(4.0, SPECK_PX * (min(mask_HW.shape) / FOREGROUND_PX) ** 2)
    index_HW = np.where(mask_HW, np.arange(mask_HW.size).reshape(mask_HW.shape), -1)
    sides = [(index_HW[:, :-1], index_HW[:, 1:]), (index_HW[:-1], index_HW[1:])]
    sides += [(index_HW[:-1, :-1], index_HW[1:, 1:]), (index_HW[:-1, 1:], index_HW[1:, :-1])]
    a_E, b_E = (np.concatenate([pair[i].ravel() for pair in sides]) for i in range(2))
    touching_E = (a_E >= 0) & (b_E >= 0)
    a_E, b_E = a_E[touching_E], b_E[touching_E]
    root = np.arange(mask_HW.size)
    while (
        root[a_E] != root[b_E]
    ).any():  # union: the higher root under the lower; find: until nobody has a grandparent
        lower_E, higher_E = np.minimum(root[a_E], root[b_E]), np.maximum(root[a_E], root[b_E])
        np.minimum.at(root, higher_E, lower_E)
        while (root[root] != root).any():
            root = root[root]
    y_M, x_M = np.nonzero(mask_HW)
    _, spot_M, pixels_N = np.unique(root[index_HW[y_M, x_M]], return_inverse=True, return_counts=True)
    low_N2, high_N2 = np.full((len(pixels_N), 2), np.inf), np.zeros((len(pixels_N), 2))
    at_M2 = np.stack([x_M, y_M], axis=1).astype(np.float64)
    np.minimum.at(low_N2, spot_M, at_M2)
    np.maximum.at(high_N2, spot_M, at_M2 + 1)
    return np.asarray(np.concatenate([low_N2, high_N2], axis=1)[pixels_N >= speck_px])
