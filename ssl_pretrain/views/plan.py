"""What is to be done to each image: every random parameter of every view, drawn at once, on the CPU, in numpy.

A view is a pure function of (seed, epoch, image, view): each of its numbers is drawn from the key folded with those,
so it is the same in any batch, at any place in it, on any number of ranks. An engine (`fused`, `reference`) carries
the plan out and draws nothing.

Legend: B images, V views of a spec, A views of all specs, N = B * A, T attempts at a crop, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ssl_pretrain import rng
from ssl_pretrain.views import ViewSpec

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

COLUMNS = (
    "top",  # of the crop, in stored pixels; a whole number, as the next three
    "left",
    "height",
    "width",
    "hflip",  # 0 or 1
    "vflip",  # 0 or 1
    "turn",  # right angles, 0 to 3, counter-clockwise as torch.rot90's
    "blur",  # gate: 0 or 1
    "sigma",  # pixels of the view
    "jitter",  # gate of the next eight
    "brightness",  # factor
    "contrast",  # factor
    "saturation",  # factor
    "hue",  # turns of the colour circle
    "order_0",  # which of COLOUR_OPS comes first
    "order_1",
    "order_2",
    "order_3",
    "gray",  # gate
    "solarize",  # gate
    "angle",  # of the rotation, radians, counter-clockwise; 0 is none
)
"""Of every view. The columns of the spec's extra ops follow: for each a gate and its own."""
COLOUR_OPS = ("brightness", "contrast", "saturation", "hue")
INDEX = {name: i for i, name in enumerate(COLUMNS)}

ATTEMPTS = 10
"""RandomResizedCrop's tries before it takes the central crop, as torchvision's."""
DRAWS = 2 * ATTEMPTS + 21
"""Random numbers of one view; which number serves which parameter is fixed, so that no gate shifts the others."""
EXTRAS = 2**20
"""Folded into the key of a view: this and the ones after it give the streams of its extra ops."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The parameters of all views of a batch."""

    specs: tuple[ViewSpec, ...]
    """In the order of their views in `buffer`."""
    buffer: npt.NDArray[np.float32]
    """(B, A, C), contiguous: one copy takes it to a device. float32 holds whole numbers up to 2^24 exactly.

    C is `COLUMNS` and as many more as the spec with the most extra parameters needs.
    """

    def of(self, spec_index: int) -> npt.NDArray[np.float32]:
        """(B, V, C): the views of one spec; no copy."""
        first = sum(spec.count for spec in self.specs[:spec_index])
        return self.buffer[:, first : first + self.specs[spec_index].count]

    def extra(self, spec_index: int, k: int) -> npt.NDArray[np.float32]:
        """(B, V, 1 + P): gate and parameters of the k-th extra op of a spec; no copy."""
        return self.of(spec_index)[..., extra_columns(self.specs[spec_index], k)]

    def column(self, spec_index: int, name: str) -> npt.NDArray[np.float32]:
        """(B, V): one parameter, by its name in `COLUMNS`, of the views of one spec; no copy."""
        return self.of(spec_index)[..., INDEX[name]]


def plan(
    specs: Sequence[ViewSpec],
    ids_B: npt.NDArray[np.integer],
    size_B2: npt.NDArray[np.integer],
    epoch: int,
    seed: int,
    window_px: float | None = None,
    scale_B: npt.NDArray[np.floating] | None = None,
) -> Plan:
    """Draw the views of images `ids_B` (numbers in the pack), stored at `size_B2` (height, width) pixels.

    With `window_px` all views of an image are cut from one random square of that side, in pixels of the original
    image; `scale_B` is stored pixels per original pixel (1 if not given). An image smaller than the window gives
    all it has.
    """
    views = [spec for spec in specs for _ in range(spec.count)]
    size_px_B2: Ints = np.asarray(size_B2, dtype=np.int64)
    if size_px_B2.shape != (len(ids_B), 2) or np.any(size_px_B2 < 1):
        raise ValueError(f"size_B2 holds a height and a width of 1 or more for each of {len(ids_B)} images")
    window_B4 = windows(ids_B, size_px_B2, epoch, seed, window_px, scale_B)
    key_B = rng.fold_in(rng.fold_in(rng.key(seed, "views"), epoch), np.asarray(ids_B))
    key_BA2 = rng.fold_in(key_B[:, None], np.arange(len(views)))
    u_BAD = rng.uniform(key_BA2, DRAWS)
    width = max(sum(1 + len(op.columns) for op in spec.extras) for spec in specs)
    buffer = np.zeros((len(ids_B), len(views), len(COLUMNS) + width), dtype=np.float32)
    for a, spec in enumerate(views):
        crop, rest = u_BAD[:, a, : 2 * ATTEMPTS + 2], u_BAD[:, a, 2 * ATTEMPTS + 2 :]
        buffer[:, a, :4] = _crops(spec, window_B4, crop)
        buffer[:, a, 4 : len(COLUMNS)] = _ops(spec, rest)
        first = len(COLUMNS)
        for k, op in enumerate(spec.extras):
            u_BD = rng.uniform(rng.fold_in(key_BA2[:, a], EXTRAS + k), 1 + op.draws)
            buffer[:, a, first] = u_BD[:, 0] < op.p
            buffer[:, a, first + 1 : first + 1 + len(op.columns)] = op.parameters(u_BD[:, 1:], spec.size_px)
            first += 1 + len(op.columns)
    return Plan(tuple(specs), buffer)


def boxes(plan: Plan, spec_index: int) -> Ints:
    """(B, V, 4): top, left, height, width of each view's crop in stored pixels."""
    return plan.of(spec_index)[..., :4].astype(np.int64)


def extra_columns(spec: ViewSpec, k: int) -> slice:
    """Where the gate and the parameters of the k-th extra op of a spec stand in a row of its plan."""
    first = len(COLUMNS) + sum(1 + len(op.columns) for op in spec.extras[:k])
    return slice(first, first + 1 + len(spec.extras[k].columns))


def canvas_px(spec: ViewSpec) -> int:
    """Side of what is rotated: no corner of the view, turned by any angle that the spec allows, lies outside.

    Even or odd as the view's side, so that the view's pixels are the canvas's in the middle.
    """
    angle = math.radians(min(spec.rotate_degrees, 45.0))
    return spec.size_px + 2 * (math.ceil(spec.size_px * (math.cos(angle) + math.sin(angle) - 1) / 2) + 1)


def corners(plan: Plan, spec_index: int) -> Floats:
    """(B, V, 4, 2): x, y in stored pixels of where each view's corners lie (clockwise from its top left).

    A quadrilateral with right angles only where the crop is square or the rotation none; it may reach beyond the image.
    """
    rows_BVC = plan.of(spec_index).astype(np.float64)
    top, left, height, width = (rows_BVC[..., i] for i in range(4))
    flip_BV2 = 1 - 2 * np.stack([rows_BVC[..., INDEX["hflip"]], rows_BVC[..., INDEX["vflip"]]], axis=-1)
    angle_BV = rows_BVC[..., INDEX["turn"]] * (math.pi / 2) + rows_BVC[..., INDEX["angle"]]
    cos, sin = np.cos(angle_BV)[..., None], np.sin(angle_BV)[..., None]
    x_4, y_4 = np.array([-0.5, 0.5, 0.5, -0.5]), np.array([-0.5, -0.5, 0.5, 0.5])
    unit_BV42 = np.stack([x_4 * cos - y_4 * sin, x_4 * sin + y_4 * cos], axis=-1) * flip_BV2[..., None, :]
    centre_BV2 = np.stack([left + width / 2, top + height / 2], axis=-1)
    return np.asarray(centre_BV2[..., None, :] + unit_BV42 * np.stack([width, height], axis=-1)[..., None, :])


def blur_kernel_px(spec: ViewSpec) -> int:
    """Side of the Gaussian kernel: the spec's, else 3 standard deviations of the widest blur on each side.

    Less where the view is too small to be reflected that far.
    """
    radius = math.ceil(3 * spec.blur_sigma[1]) if spec.blur_kernel_px is None else spec.blur_kernel_px // 2
    return 2 * min(radius, spec.size_px - 1) + 1


def windows(
    ids_B: npt.NDArray[np.integer],
    size_B2: Ints,
    epoch: int,
    seed: int,
    window_px: float | None = None,
    scale_B: npt.NDArray[np.floating] | None = None,
) -> Ints:
    """(B, 4): top, left, height, width of the part of each image that its views are cut from; see `plan`."""
    if window_px is None:
        return np.concatenate([np.zeros_like(size_B2), size_B2], axis=1)
    side_B = np.rint(window_px * (np.ones(len(ids_B)) if scale_B is None else np.asarray(scale_B)))
    window_B2 = np.clip(side_B.astype(np.int64)[:, None], 1, size_B2)
    key_B = rng.fold_in(rng.fold_in(rng.key(seed, "window"), epoch), np.asarray(ids_B))
    return np.concatenate([_position(rng.uniform(key_B, 2), size_B2 - window_B2), window_B2], axis=1)


def _position(u: Floats, room: Ints) -> Ints:
    """Uniform whole numbers from 0 to `room`, both included."""
    return np.floor(u * (room + 1)).astype(np.int64)


def _crops(spec: ViewSpec, window_B4: Ints, u_BD: Floats) -> Ints:
    """RandomResizedCrop, in distribution torchvision's: (B, 4) top, left, height, width.

    Draws 0..T-1 are the attempts' areas, T..2T-1 their ratios, then the position. All attempts are drawn at once
    and the first that fits is taken, which is what drawing one after another does.
    """
    height_B1, width_B1 = window_B4[:, 2:3], window_B4[:, 3:4]
    area_BT = height_B1 * width_B1 * _between(spec.scale, u_BD[:, :ATTEMPTS])
    low, high = math.log(spec.ratio[0]), math.log(spec.ratio[1])
    ratio_BT = np.exp(_between((low, high), u_BD[:, ATTEMPTS : 2 * ATTEMPTS]))
    h_BT = np.rint(np.sqrt(area_BT / ratio_BT)).astype(np.int64)
    w_BT = np.rint(np.sqrt(area_BT * ratio_BT)).astype(np.int64)
    fits_BT: npt.NDArray[np.bool_] = (h_BT > 0) & (h_BT <= height_B1) & (w_BT > 0) & (w_BT <= width_B1)
    first_B1 = fits_BT.argmax(axis=1, keepdims=True)
    drawn_B2 = np.concatenate([np.take_along_axis(x, first_B1, axis=1) for x in (h_BT, w_BT)], axis=1)
    any_B1 = fits_BT.any(axis=1, keepdims=True)
    size_B2 = np.where(any_B1, drawn_B2, _central(spec.ratio, window_B4[:, 2:]))
    room_B2 = window_B4[:, 2:] - size_B2
    corner_B2 = np.where(any_B1, _position(u_BD[:, 2 * ATTEMPTS :], room_B2), room_B2 // 2)
    return np.concatenate([window_B4[:, :2] + corner_B2, size_B2], axis=1)


def _central(ratio: tuple[float, float], size_B2: Ints) -> Ints:
    """The crop (height, width) that is taken when no attempt fits: all of it, cut to the nearest allowed ratio."""
    height_B, width_B = size_B2[:, 0], size_B2[:, 1]
    cut_height_B = np.where(width_B < ratio[0] * height_B, np.rint(width_B / ratio[0]), height_B)
    cut_width_B = np.where(width_B > ratio[1] * height_B, np.rint(height_B * ratio[1]), width_B)
    # The clip is for ratios that lie wholly on one side of 1, which can round to nothing.
    return np.clip(np.stack([cut_height_B, cut_width_B], axis=1).astype(np.int64), 1, size_B2)


def _ops(spec: ViewSpec, u_BD: Floats) -> Floats:
    """(B, C - 4): everything but the crop, in the order of `COLUMNS`, from the 19 draws that follow the crop's."""
    turned_B = u_BD[:, 2] < spec.turn_p
    angle = math.radians(spec.rotate_degrees)
    factors_B3 = [
        _between((max(0.0, 1.0 - strength), 1.0 + strength), u_BD[:, 7 + i])
        for i, strength in enumerate((spec.brightness, spec.contrast, spec.saturation))
    ]
    columns = [
        u_BD[:, 0] < spec.hflip_p,
        u_BD[:, 1] < spec.vflip_p,
        np.where(turned_B, 1 + np.floor(3 * u_BD[:, 3]), 0),
        u_BD[:, 4] < spec.blur_p,
        _between(spec.blur_sigma, u_BD[:, 5]),
        u_BD[:, 6] < spec.jitter_p,
        *factors_B3,
        _between((-spec.hue, spec.hue), u_BD[:, 10]),
        *np.argsort(u_BD[:, 11:15], axis=1, kind="stable").T,
        u_BD[:, 15] < spec.gray_p,
        u_BD[:, 16] < spec.solarize_p,
        np.where(u_BD[:, 17] < spec.rotate_p, _between((-angle, angle), u_BD[:, 18]), 0),
    ]
    return np.stack(columns, axis=1).astype(np.float64)


def _between(bounds: tuple[float, float], u: Floats) -> Floats:
    """Uniform numbers in [0, 1) -> uniform numbers between the bounds."""
    return bounds[0] + (bounds[1] - bounds[0]) * u
