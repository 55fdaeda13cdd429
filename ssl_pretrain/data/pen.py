"""What every drawing is made of: random numbers of one key, smooth noise, and shapes as signed distances.

Everything here is the same to the byte on every machine, by the two rules of `synthetic`.

Shapes: H height and W width in pixels of the patch that is drawn on. In the local frame of an object u runs along it
and v across it, in pixels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[Any]
"""Float32. (Numpy's stubs take float32 * float for float64, so the type cannot say it; a test does.)"""
MARGIN_PX = 9


class Pen:
    """The random numbers, and the arithmetic that all drawings are made of."""

    def __init__(self, key: tuple[int, int]) -> None:
        self.rng = np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))

    def between(self, low: float, high: float) -> float:
        """A number out of [low, high)."""
        return low + (high - low) * float(self.rng.random())

    def count(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return low + int((high - low + 1) * float(self.rng.random()))

    def chance(self, share: float) -> bool:
        """True in this share of the calls."""
        return float(self.rng.random()) < share

    def noise(self, shape_HW: tuple[int, ...], cell_px: float) -> F32:
        """Smooth noise in [-1, 1] with bumps of about `cell_px`."""
        axes = []
        for length in shape_HW:
            at = np.arange(length, dtype=np.float32) / cell_px
            low = at.astype(np.int64)
            part = at - low.astype(np.float32)
            axes.append((low, part * part * (3 - 2 * part)))
        (y, fy), (x, fx) = axes
        grid = self.rng.random((int(y[-1]) + 2, int(x[-1]) + 2), dtype=np.float32) * 2 - 1
        rows = grid[y] + (grid[y + 1] - grid[y]) * fy[:, None]
        mixed: F32 = rows[:, x] + (rows[:, x + 1] - rows[:, x]) * fx
        return mixed

    def frame(self, half_u: float, half_v: float, wobble_px: float = 0.0, cell_px: float = 12.0) -> tuple[F32, F32]:
        """A patch for an object of these half extents, turned at random: its coordinates (u_HW, v_HW)."""
        angle = self.between(0, 2 * math.pi)
        c, s = math.cos(angle), math.sin(angle)
        reach_x = math.ceil(abs(c) * half_u + abs(s) * half_v) + MARGIN_PX
        reach_y = math.ceil(abs(s) * half_u + abs(c) * half_v) + MARGIN_PX
        shift_x, shift_y = self.between(-0.5, 0.5), self.between(-0.5, 0.5)
        x = np.arange(-reach_x, reach_x + 1, dtype=np.float32) + shift_x
        y = np.arange(-reach_y, reach_y + 1, dtype=np.float32)[:, None] + shift_y
        u, v = x * c + y * s, y * c - x * s
        if wobble_px:
            u = u + wobble_px * self.noise(u.shape, cell_px)
            v = v + wobble_px * self.noise(u.shape, cell_px)
        return u, v

    def grains(self, where_HW: F32, share: float, spread: int = 1) -> F32:
        """Fine dark-and-bright grains inside a cover; `share` of its pixels start one."""
        seeds = (self.rng.random(where_HW.shape, dtype=np.float32) < share).astype(np.float32)
        return soften(seeds * self.between(2.0, 3.0), (1,) * spread) * where_HW


def soften(a_HW: F32, steps: tuple[int, ...]) -> F32:
    """Blur with [1 2 1] / 4 at these spacings, one after the other: each adds spacing^2 / 2 to the variance (px^2).

    The outermost rows and columns stay as they are: every patch has an empty margin.
    """
    for k in steps:
        b = a_HW.copy()
        b[k:-k] = (a_HW[: -2 * k] + a_HW[2 * k :]) * 0.25 + a_HW[k:-k] * 0.5
        a_HW = b.copy()
        a_HW[:, k:-k] = (b[:, : -2 * k] + b[:, 2 * k :]) * 0.25 + b[:, k:-k] * 0.5
    return a_HW


def inside(distance_px: F32, soft_px: float = 0.8) -> F32:
    """1 where the signed distance is negative, 0 where it is positive, smooth over 2 x `soft_px`."""
    t = np.clip(0.5 - distance_px / (2 * soft_px), 0, 1)
    return t * t * (3 - 2 * t)


def ellipse(u: F32, v: F32, a: float, b: float) -> F32:
    """Signed distance to an ellipse, good near its edge."""
    distance_px: F32 = (np.sqrt(u * u / (a * a) + v * v / (b * b)) - 1) * min(a, b)
    return distance_px


def slab(u: F32, v: F32, a: float, b: float, round_px: float = 0.0) -> F32:
    """Signed distance to a rectangle with half sides a, b and rounded corners."""
    x, y = np.abs(u) - (a - round_px), np.abs(v) - (b - round_px)
    out: F32 = np.sqrt(np.maximum(x, 0) ** 2 + np.maximum(y, 0) ** 2)
    distance_px: F32 = out + np.minimum(np.maximum(x, y), 0) - round_px
    return distance_px


def dome(distance_px: F32, rise_px: float) -> F32:
    """A lens: 0 at the edge, 1 from `rise_px` inwards."""
    t = 1 - np.clip(-distance_px / rise_px, 0, 1)
    lens: F32 = np.sqrt(1 - t * t)
    return lens


def line(distance_px: F32, half_px: float) -> F32:
    """A soft line where the distance is zero."""
    return inside(np.abs(distance_px) - half_px, 0.7)


def bent(pen: Pen, u: F32, v: F32, half_u: float, swing_px: float, knots: int) -> F32:
    """v measured from a curve that wanders by +- `swing_px` along u."""
    at = np.clip((u / half_u + 1) * (0.5 * knots), 0, knots - 0.001)
    low = at.astype(np.int64)
    part = at - low.astype(np.float32)
    offset = np.array([pen.between(-swing_px, swing_px) for _ in range(knots + 3)], dtype=np.float32)
    p0, p1, p2, p3 = (offset[low + i] for i in range(4))
    # A uniform cubic B-spline: no kinks, which the curvature term would show as bright stripes.
    q, r = 1 - part, part
    curve = (q * q * q * p0 + (3 * r * r * r - 6 * r * r + 4) * p1) / 6
    return v - curve - ((3 * q * q * q - 6 * q * q + 4) * p2 + r * r * r * p3) / 6
