"""Drawn fields that look like unstained urine sediment under a bright-field microscope, with boxes and class names.

For the quickstart and the tests, where no real image can be shipped; nothing learned here says anything about urine.
The module is long because it is fourteen small drawings; what they share comes before them, the optics after.

An object is a *thickness* (it bends light) and a weak *absorption* (it takes light away). `_transmission` turns the
two into a picture as defocused bright-field optics does: the intensity follows the curvature of the thickness, so a
nearly transparent body gets a dark edge and a bright halo, and the classes differ by shape and texture, not by colour.

`field(seed, index)` is a pure function of its arguments, to the byte. Two rules make it so on every machine: all
random numbers come from the counter-based Philox, keyed by (seed, index); and arrays see only + - * /, sqrt and
comparisons (which IEEE 754 fixes to the last bit), never exp, sin, a float sum or a matrix product. The few cosines
are of single numbers, in float64, and are rounded to the arrays' float32.

Shapes: H height and W width in pixels (of the field, or of the small patch that one object is drawn on), C colours
(red, green, blue), N objects. In the local frame of an object u runs along it and v across it, in pixels.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssl_pretrain.errors import WriteError

VERSION = 1
"""Goes up when the same (seed, index) gives other pixels."""

F32 = NDArray[Any]
"""Float32. (Numpy's stubs take float32 * float for float64, so the type cannot say it; a test does.)"""
MARGIN_PX = 9
TEST_PER_20 = 7


@dataclass(frozen=True)
class Field:
    """One field of view."""

    pixels_HWC: NDArray[np.uint8]
    """Red, green, blue."""
    boxes_N4: NDArray[np.float64]
    """x0, y0, x1, y1 in pixels, x1 and y1 exclusive: clipped to the field, tight around the drawn body."""
    labels: tuple[str, ...]
    """N class names out of `CLASSES`."""


@dataclass(frozen=True)
class _Body:
    """What one object does to the light, on its own patch.

    thickness_HW: optical path, arbitrary unit; a red cell's rim is about 1.
    absorption_HW: share of the light taken away, before the tint.
    cover_HW: 0 to 1, where the object is; its box is drawn around cover > 0.5.
    tint_C: how much of the absorption each colour feels.
    """

    thickness_HW: F32
    absorption_HW: F32
    cover_HW: F32
    tint_C: tuple[float, float, float] = (0.9, 1.0, 1.1)


@dataclass(frozen=True)
class _Look:
    """What one microscope and one exposure share: focus and contrast.

    focus: 0 sharp, 1 visibly soft. contrast: gain of the curvature term. edge: loss of light at steep slopes.
    oblique_xy: relief from skewed light.
    """

    focus: float
    contrast: float
    edge: float
    oblique_xy: tuple[float, float]


class _Pen:
    """The random numbers, and the arithmetic that all drawings are made of."""

    def __init__(self, key: tuple[int, int]) -> None:
        self.rng = np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.rng.random())

    def count(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return low + int((high - low + 1) * float(self.rng.random()))

    def chance(self, share: float) -> bool:
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
        return _soften(seeds * self.between(2.0, 3.0), (1,) * spread) * where_HW


def _soften(a_HW: F32, steps: tuple[int, ...]) -> F32:
    """Blur with [1 2 1] / 4 at these spacings, one after the other: each adds spacing^2 / 2 to the variance (px^2).

    The outermost rows and columns stay as they are: every patch has an empty margin.
    """
    for k in steps:
        b = a_HW.copy()
        b[k:-k] = (a_HW[: -2 * k] + a_HW[2 * k :]) * 0.25 + a_HW[k:-k] * 0.5
        a_HW = b.copy()
        a_HW[:, k:-k] = (b[:, : -2 * k] + b[:, 2 * k :]) * 0.25 + b[:, k:-k] * 0.5
    return a_HW


def _inside(distance_px: F32, soft_px: float = 0.8) -> F32:
    """1 where the signed distance is negative, 0 where it is positive, smooth over 2 x `soft_px`."""
    t = np.clip(0.5 - distance_px / (2 * soft_px), 0, 1)
    return t * t * (3 - 2 * t)


def _ellipse(u: F32, v: F32, a: float, b: float) -> F32:
    """Signed distance to an ellipse, good near its edge."""
    distance_px: F32 = (np.sqrt(u * u / (a * a) + v * v / (b * b)) - 1) * min(a, b)
    return distance_px


def _slab(u: F32, v: F32, a: float, b: float, round_px: float = 0.0) -> F32:
    """Signed distance to a rectangle with half sides a, b and rounded corners."""
    x, y = np.abs(u) - (a - round_px), np.abs(v) - (b - round_px)
    out: F32 = np.sqrt(np.maximum(x, 0) ** 2 + np.maximum(y, 0) ** 2)
    distance_px: F32 = out + np.minimum(np.maximum(x, y), 0) - round_px
    return distance_px


def _dome(distance_px: F32, rise_px: float) -> F32:
    """A lens: 0 at the edge, 1 from `rise_px` inwards."""
    t = 1 - np.clip(-distance_px / rise_px, 0, 1)
    lens: F32 = np.sqrt(1 - t * t)
    return lens


def _line(distance_px: F32, half_px: float) -> F32:
    """A soft line where the distance is zero."""
    return _inside(np.abs(distance_px) - half_px, 0.7)


def _bent(pen: _Pen, u: F32, v: F32, half_u: float, swing_px: float, knots: int) -> F32:
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


# ---- the classes -----------------------------------------------------------------------------------------------


def _red_cell(pen: _Pen) -> _Body:
    """A disc thinner in the middle; some crenated, some ghosts that lost their content, some seen aslant."""
    a = pen.between(9.0, 12.0)
    b = a * pen.between(0.84, 1.0)
    u, v = pen.frame(a + 2, a + 2, wobble_px=0.5, cell_px=7)
    r2 = u * u / (a * a) + v * v / (b * b)
    d = _ellipse(u, v, a, b)
    cover = _inside(d)
    # Evans and Fung's profile of a resting cell.
    rest = np.sqrt(np.maximum(1 - r2, 0)) * (0.207 + 2.003 * r2 - 1.123 * r2 * r2)
    kind = float(pen.rng.random())
    dimple = _inside(_ellipse(u, v, 0.5 * a, 0.5 * b) + 0.5, pen.between(1.5, 2.6)) * pen.between(0.25, 0.8)
    thickness = (0.6 * cover + 1.3 * rest - 0.6 * dimple) * pen.between(0.85, 1.15)
    absorption = 0.04 * cover + pen.between(0.02, 0.07) * (rest - dimple)
    if kind < 0.2:
        spikes, start = pen.count(9, 13), pen.between(0, 6)
        thickness, absorption = 0.55 * cover + 0.4 * _dome(d, 0.8 * b), 0.05 * cover
        for i in range(spikes + 4):
            ring, turn = (1.0, i / spikes) if i < spikes else (0.45, (i - spikes) / 4)
            x, y = a * ring * math.cos(start + 2 * math.pi * turn), b * ring * math.sin(start + 2 * math.pi * turn)
            spike = _inside(_ellipse(u - x, v - y, 1.7, 1.7), 1.0)
            thickness = thickness + 0.6 * spike * (1 - 0.5 * cover)
            cover = np.maximum(cover, spike)
    elif kind < 0.32:
        thickness, absorption = 0.45 * cover + 0.3 * rest, 0.02 * cover
    return _Body(thickness, absorption, cover, (0.7, 1.0, 1.3))


def _white_cell(pen: _Pen) -> _Body:
    """A granular ball with a nucleus of two to four lobes."""
    a = pen.between(12.5, 16.0)
    b = a * pen.between(0.86, 1.0)
    u, v = pen.frame(a + 1, a + 1, wobble_px=1.0, cell_px=10)
    d = _ellipse(u, v, a, b)
    cover = _inside(d)
    lobes, start = pen.count(2, 4), pen.between(0, 6)
    nucleus = np.zeros_like(u)
    for i in range(lobes):
        turn, size = start + pen.between(3.4, 4.4) * i / lobes, a * pen.between(0.27, 0.34)
        x, y = 0.36 * a * math.cos(turn), 0.36 * b * math.sin(turn)
        lobe = _ellipse(u - x, v - y, size, size * pen.between(0.8, 1.1))
        nucleus = np.maximum(nucleus, _inside(lobe, 1.1))
    grains = pen.grains(_inside(d + 1.5), pen.between(0.10, 0.2)) * (1 - 0.7 * nucleus)
    thickness = 0.6 * cover + 0.6 * _dome(d, 0.9 * b) + 0.8 * nucleus + pen.between(0.2, 0.65) * grains
    return _Body(thickness, cover * pen.between(0.02, 0.06) + pen.between(0.06, 0.15) * nucleus, cover)


def _squamous_cell(pen: _Pen) -> _Body:
    """A big thin flake with corners, an edge folded over, and a small nucleus."""
    a = pen.between(36.0, 56.0)
    u, v = pen.frame(1.05 * a, 1.05 * a, wobble_px=pen.between(0.05, 0.11) * a, cell_px=0.4 * a)
    sides, start = pen.count(5, 7), pen.between(0, 6)
    d = np.full_like(u, -1e3)
    folds = np.zeros_like(u)
    for i in range(sides):
        turn = start + 2 * math.pi * (i + pen.between(-0.22, 0.22)) / sides
        away = u * math.cos(turn) + v * math.sin(turn) - (a * pen.between(0.66, 0.95))
        d = np.maximum(d, away)
        if pen.chance(0.4):
            folds = folds + _inside(-(away + (a * pen.between(0.08, 0.3))), 1.2)
    d = np.maximum(d, _ellipse(u, v, 1.04 * a, 1.04 * a))
    cover = _inside(d, 1.0)
    wrinkle = u * pen.between(-1, 1) + v + (a * pen.between(-0.4, 0.4))
    wrinkle = _line(wrinkle + 0.1 * a * pen.noise(u.shape, 0.5 * a), 0.6)
    x, y, size = a * pen.between(-0.15, 0.15), a * pen.between(-0.15, 0.15), pen.between(5.5, 7.5)
    nucleus = _ellipse(u - x, v - y, size, size * pen.between(0.7, 0.95))
    core = _inside(nucleus, 1.0)
    relief = pen.noise(u.shape, 9) * 0.22 + pen.noise(u.shape, 4) * 0.12
    grains = pen.grains(_inside(d + 3), pen.between(0.01, 0.04))
    thickness = cover * (0.65 + relief + 0.5 * np.minimum(folds, 1)) + 0.35 * wrinkle * cover
    thickness = thickness + 0.9 * core + 0.5 * _line(nucleus, 0.6) + 0.45 * grains
    return _Body(thickness, cover * (0.03 + 0.03 * np.minimum(folds, 1)) + 0.08 * core, cover)


def _renal_cell(pen: _Pen) -> _Body:
    """A small round or tailed epithelial cell: one large round nucleus with a rim and a nucleolus, off the centre."""
    a = pen.between(17.0, 23.0)
    b = a * pen.between(0.75, 0.95)
    tail = pen.between(0.0, 0.45)
    u, v = pen.frame(a + 3, a + 3, wobble_px=1.6, cell_px=13)
    d = _ellipse(u, v * (1 + (tail / a) * u), a, b)
    d = np.maximum(d, _slab(u, v, a, b + 3, 5))
    cover = _inside(d)
    size = a * pen.between(0.36, 0.45)
    x, y = -0.22 * a + pen.between(-2, 2), pen.between(-0.15, 0.15) * b
    round_ = _ellipse(u - x, v - y, size, 0.93 * size)
    core = _inside(round_, 0.9)
    dot = _inside(_ellipse(u - (x + 2), v - (y - 1), 2.2, 2.2))
    grains = pen.grains(_inside(d + 2) * (1 - core), pen.between(0.12, 0.2), spread=2)
    thickness = 0.6 * cover + 0.6 * _dome(d, 0.6 * b) + 0.9 * grains - 0.25 * core
    thickness = thickness + 0.75 * _line(round_, 0.7) + 0.9 * dot
    return _Body(thickness, cover * pen.between(0.03, 0.07) + 0.06 * core, cover)


def _cast(pen: _Pen) -> tuple[F32, F32, F32]:
    """The tube that both casts share: distance to its wall, and the bent coordinates."""
    half_u, half_v = pen.between(48.0, 88.0), pen.between(11.0, 16.0)
    swing = pen.between(0.0, 0.12) * half_u
    u, v = pen.frame(half_u, half_v + swing + 2, wobble_px=0.8, cell_px=22)
    v = _bent(pen, u, v, half_u, swing, 3)
    # One end round, the other round, blunt or thinning out.
    wide = 1 - pen.between(-0.05, 0.16) * (u / half_u)
    return _slab(u, v / wide, half_u, half_v, half_v * pen.between(0.5, 0.98)), u, v


def _hyaline_cast(pen: _Pen) -> _Body:
    """A pale glassy tube with parallel walls and next to nothing inside."""
    d, u, _ = _cast(pen)
    cover = _inside(d, 1.2)
    relief = 0.1 * pen.noise(u.shape, 8)
    thickness = cover * (0.5 + relief) + 0.3 * _dome(d, 7) + 0.5 * pen.grains(_inside(d + 3), 0.004)
    return _Body(thickness, cover * pen.between(0.005, 0.03), cover)


def _granular_cast(pen: _Pen) -> _Body:
    """The same tube full of fine or coarse granules."""
    d, u, _ = _cast(pen)
    cover = _inside(d, 1.0)
    patchy = _inside(d + 1) * (0.65 + 0.6 * pen.noise(u.shape, 11))
    grains = pen.between(0.4, 0.8) * pen.grains(patchy, pen.between(0.12, 0.22))
    grains = grains + pen.between(0.3, 1.6) * pen.grains(patchy, pen.between(0.04, 0.12), spread=3)
    lumps = pen.noise(u.shape, 6) * cover
    thickness = 0.5 * cover + 0.25 * _dome(d, 7) + grains + 0.5 * lumps
    return _Body(thickness, cover * pen.between(0.04, 0.1) + 0.04 * grains, cover)


def _calcium_oxalate(pen: _Pen) -> _Body:
    """The dihydrate: an eight-sided double pyramid from above, an envelope with a cross."""
    a = pen.between(7.5, 15.0)
    b = a * pen.between(0.75, 1.0)
    u, v = pen.frame(1.2 * a, 1.2 * b)
    d = _slab(u, v, a, b)
    cover = _inside(d, 0.6)
    cross = _line((np.abs(u) / a - np.abs(v) / b) * (0.7 * b), 0.55) * cover
    peak = 1 - np.maximum(np.abs(u) / a, np.abs(v) / b)
    thickness = cover * (1.1 + 1.0 * peak) + 1.2 * cross
    return _Body(thickness, 0.03 * cross - cover * pen.between(-0.03, 0.09), cover)


def _triple_phosphate(pen: _Pen) -> _Body:
    """A prism with sloping ends, a coffin lid: outline, inner ridge and the lines that join their corners."""
    a = pen.between(22.0, 42.0)
    b = a * pen.between(0.32, 0.5)
    u, v = pen.frame(a + 1, b + 3)
    v = v * (1 + pen.between(0.0, 0.14) * (u / a))
    chop = pen.between(0.75, 1.0)
    d = np.maximum(_slab(u, v, a, b), (np.abs(u) + np.abs(v) - (a + b * 0.45)) * chop)
    bevel = b * pen.between(0.45, 0.75)
    cover = _inside(d, 0.6)
    hips = _line((np.abs(u) - np.abs(v) - (a - b)) * 0.7, 0.5) * _inside(-d - (bevel + 1))
    roof = np.clip(-d / bevel, 0, 1)
    ridge = _line(d + bevel, 0.5)
    thickness = cover * 1.1 + 0.9 * roof + 0.75 * ridge + 0.75 * hips * cover
    return _Body(thickness, cover * 0.015 + 0.02 * ridge, cover)


def _uric_acid(pen: _Pen) -> _Body:
    """A layered plate: rhombus, lemon or barrel; from nearly colourless to yellow-brown."""
    a = pen.between(13.0, 25.0)
    b = a * pen.between(0.5, 0.72)
    u, v = pen.frame(a + 1, b + 1)
    kind = pen.count(0, 2)
    if kind == 0:
        d = (np.abs(u) / a + np.abs(v) / b - 1) * (a * b / math.hypot(a, b))
        d = np.maximum(d, np.abs(u) - (a * pen.between(0.85, 1.0)))
    elif kind == 1:
        radius = (a * a + b * b) / (2 * b)
        d = np.sqrt(u * u + (np.abs(v) + (radius - b)) ** 2) - radius
    else:
        d = np.maximum(np.abs(v) - b * (1 - 0.3 * u * u / (a * a)), np.abs(u) - (0.8 * a))
    cover = _inside(d, 0.7)
    layers = _line(d + (0.3 * b), 0.4) + 0.7 * _line(d + (0.55 * b), 0.4)
    thickness = 1.5 * cover + 0.5 * _dome(d, b) + 0.45 * layers
    return _Body(thickness, cover * pen.between(0.01, 0.16) + 0.03 * layers, cover, (0.35, 0.9, 1.75))


def _yeast(pen: _Pen) -> _Body:
    """Small bright ovals, most with a bud, some in a short row."""
    cells = pen.count(1, 3)
    u, v = pen.frame(9 + 9 * cells, 10 + 7 * cells)
    thickness, cover, glow = np.zeros_like(u), np.zeros_like(u), np.zeros_like(u)
    last = 0.0
    x, y, turn, a = -7.5 * (cells - 1), 0.0, pen.between(-0.3, 0.3), pen.between(5.2, 6.8)
    for i in range(cells + 1):
        if i == cells and pen.chance(0.25):
            break
        size = a * (pen.between(0.85, 1.0) if i < cells else pen.between(0.4, 0.65))
        if i:
            reach = 0.93 * (last + size)
            turn = turn + pen.between(-0.5, 0.5)
            x, y = x + reach * math.cos(turn), y + reach * math.sin(turn)
        c, s = math.cos(turn), math.sin(turn)
        p, q = u - x, v - y
        d = _ellipse(p * c + q * s, q * c - p * s, size, size * pen.between(0.68, 0.82))
        cover = np.maximum(cover, _inside(d))
        dot = _inside(_ellipse(p - 1.3, q - 1, 0.9, 0.9))
        thickness = np.maximum(thickness, 1.3 * _inside(d) + 0.7 * _dome(d, 0.7 * size) + 0.25 * dot)
        # A small strong lens: it gathers the light in its middle.
        glow = np.maximum(glow, _inside(d + 0.42 * size, 1.4))
        last = size
    return _Body(thickness, cover * 0.04 - glow * pen.between(0.12, 0.34), cover)


def _bacteria(pen: _Pen) -> _Body:
    """Thin rods end to end in a chain, or a pair, or one."""
    rods = pen.count(1, 5)
    half = [pen.between(2.8, 4.6) for _ in range(rods)]
    wide = pen.between(1.3, 1.8)
    u, v = pen.frame(sum(half) + 2 * rods, sum(half) + 2 * rods)
    cover = np.zeros_like(u)
    x, y, turn = -(sum(half) + rods) / 1.3, 0.0, pen.between(-0.4, 0.4)
    for h in half:
        c, s = math.cos(turn), math.sin(turn)
        x, y = x + h * c, y + h * s
        p, q = u - x, v - y
        along, across = p * c + q * s, q * c - p * s
        cover = np.maximum(cover, _inside(_slab(along, across, h, wide, wide), 0.7))
        x, y = x + (h + 1.2) * c, y + (h + 1.2) * s
        turn += pen.between(-0.6, 0.6)
    return _Body(1.3 * cover, 0.10 * cover, cover)


def _sperm(pen: _Pen) -> _Body:
    """A small pear-shaped head and a long thin wavy tail."""
    half_u = pen.between(24.0, 34.0)
    swing = pen.between(3.0, 9.0)
    u, v = pen.frame(half_u + 3, swing + 5)
    v = _bent(pen, u, v, half_u, swing, pen.count(3, 5))
    p = u + (half_u - 4)
    head = _ellipse(p, v * (1 + 0.07 * p), 5.0, pen.between(2.7, 3.4))
    core = _inside(head)
    thin = np.clip((half_u - u) / (2 * half_u), 0, 1)
    tail = _inside(_slab(u, v, half_u, 0.75, 0.7), 0.8) * _inside(-p - 3)
    cover = np.maximum(core, tail)
    return _Body(0.9 * core + 0.9 * _dome(head, 3) + tail * (0.55 + 0.5 * thin), 0.05 * core + 0.03 * tail, cover)


def _mucus(pen: _Pen) -> _Body:
    """A long wavy ribbon with lengthwise streaks that thins out at both ends."""
    half_u, half_v = pen.between(60.0, 115.0), pen.between(3.5, 8.0)
    swing = pen.between(8.0, 20.0)
    u, v = pen.frame(half_u, swing + half_v + 2)
    v = _bent(pen, u, v, half_u, swing, pen.count(4, 6))
    t = u / half_u
    lean = pen.between(-0.7, 0.7)
    wide = half_v * np.maximum(1 - t * t, 0) * (1 + lean * t) + 0.5 + 0.8 * pen.noise(u.shape, 14)
    d = np.maximum(np.abs(v) - wide, np.abs(u) - half_u)
    cover = _inside(d, 1.1)
    streaks = np.zeros_like(u)
    for _ in range(pen.count(2, 4)):
        streaks = streaks + _line(v - wide * pen.between(-0.8, 0.8) * (1 + 0.3 * t), 0.4)
    return _Body(cover * 0.35 + 0.4 * np.minimum(streaks, 1) * cover, cover * 0.01, cover)


def _amorphous(pen: _Pen) -> _Body:
    """A loose heap of grains without a shape of their own: urates or phosphates."""
    a = pen.between(13.0, 30.0)
    b = a * pen.between(0.5, 0.95)
    u, v = pen.frame(a + 1, b + 1, wobble_px=5, cell_px=9)
    r = np.sqrt(u * u / (a * a) + v * v / (b * b))
    density = np.clip(1.15 - r, 0, 1) * pen.between(0.16, 0.4)
    seeds = (pen.rng.random(u.shape, dtype=np.float32) < density).astype(np.float32)
    big = seeds * (pen.rng.random(u.shape, dtype=np.float32) * 1.6 + 0.2)
    thickness = _soften(big, (1,)) * 2.8
    heap = _soften(seeds, (1, 2))
    return _Body(thickness, np.clip(heap, 0, 1) * pen.between(0.1, 0.3), np.clip(heap * 14, 0, 1), (0.85, 1.0, 1.15))


@dataclass(frozen=True)
class _Kind:
    """draw: makes one. per_field: mean number in a 512 x 384 field. company: how much the number varies, 0 to 1."""

    draw: Callable[[_Pen], _Body]
    per_field: float
    company: float


# Large and flat first: they lie below. Frequencies are unequal as in a laboratory, but see GUARANTEED_EVERY.
_KINDS: dict[str, _Kind] = {
    "squamous_cell": _Kind(_squamous_cell, 1.3, 0.6),
    "mucus": _Kind(_mucus, 0.5, 0.5),
    "hyaline_cast": _Kind(_hyaline_cast, 0.55, 0.5),
    "granular_cast": _Kind(_granular_cast, 0.5, 0.5),
    "amorphous": _Kind(_amorphous, 0.7, 0.8),
    "renal_cell": _Kind(_renal_cell, 0.8, 0.5),
    "triple_phosphate": _Kind(_triple_phosphate, 0.8, 0.8),
    "uric_acid": _Kind(_uric_acid, 0.9, 0.8),
    "sperm": _Kind(_sperm, 0.7, 0.6),
    "white_cell": _Kind(_white_cell, 5.0, 0.9),
    "calcium_oxalate": _Kind(_calcium_oxalate, 2.2, 0.9),
    "yeast": _Kind(_yeast, 1.6, 0.9),
    "red_cell": _Kind(_red_cell, 12.0, 0.9),
    "bacteria": _Kind(_bacteria, 2.5, 0.9),
}

CLASSES: tuple[str, ...] = tuple(sorted(_KINDS))
"""The drawn classes, in alphabetical order."""

GUARANTEED_EVERY = 3
"""In fields of 512 x 384 or more each class is drawn at least once in every third field: 20 or more in any 60."""

# ---- optics ----------------------------------------------------------------------------------------------------


def _transmission(pen: _Pen, body: _Body, look: _Look) -> F32:
    """The share of the light that passes each pixel of the patch (HWC), with this object's own focus."""
    defocus = look.focus + 0.9 * pen.between(0, 1) * pen.between(0, 1)
    blur = (1,) if defocus < 0.45 else (1, 1) if defocus < 0.75 else (1, 2) if defocus < 1.05 else (1, 1, 2)
    near = _soften(body.thickness_HW, blur)
    far = _soften(near, (1, 2) if defocus < 0.75 else (2, 2))
    sign = -0.8 if pen.chance(0.12) else 1.0
    curvature = (near - far) * (sign * look.contrast)
    slope_x, slope_y = np.zeros_like(near), np.zeros_like(near)
    slope_x[:, 1:-1] = (near[:, 2:] - near[:, :-2]) * 0.5
    slope_y[1:-1] = (near[2:] - near[:-2]) * 0.5
    steep = np.minimum((slope_x * slope_x + slope_y * slope_y) * look.edge, 0.35)
    relief = slope_x * look.oblique_xy[0] + slope_y * look.oblique_xy[1]
    taken = _soften(body.absorption_HW, blur)
    planes = []
    # Blue bends most: the faint colour of real edges.
    for tint, bend in zip(body.tint_C, (0.92, 1.0, 1.1), strict=True):
        planes.append(1 - taken * tint - curvature * bend - steep - relief)
    passed: F32 = np.clip(np.stack(planes, axis=2), 0.12, 1.6)
    return passed


_LAMPS = ((206, 207, 203), (212, 207, 186), (188, 200, 210), (196, 208, 192), (214, 203, 200), (180, 180, 178))


def _background(pen: _Pen, width: int, height: int) -> F32:
    """The empty field, 0 to 255, HWC: lamp colour, vignette, slanted light, faint mottling."""
    lamp = _LAMPS[pen.count(0, len(_LAMPS) - 1)]
    level = pen.between(0.9, 1.1)
    x = (np.arange(width, dtype=np.float32) + 0.5) / width - (0.5 + pen.between(-0.12, 0.12))
    y = (np.arange(height, dtype=np.float32) + 0.5) / height - (0.5 + pen.between(-0.12, 0.12))
    x, y = x[None, :], y[:, None]
    r2 = x * x + y * y
    shade = 1 - pen.between(0.05, 0.45) * r2 - pen.between(0, 0.5) * r2 * r2
    shade = shade + pen.between(-0.1, 0.1) * x + pen.between(-0.1, 0.1) * y
    shade = shade + 0.012 * pen.noise((height, width), 70)
    planes = []
    for value in lamp:
        # The vignette of a phone is not grey: its corners turn warm or cold.
        planes.append(shade * (value * level) + pen.between(-14, 14) * r2 + pen.between(-5, 5))
    return np.stack(planes, axis=2).astype(np.float32)


def _debris(pen: _Pen, light_HWC: F32, look: _Look) -> None:
    """Specks that nobody labels, in place: fine grit everywhere, and dust far out of focus on the glass."""
    height, width = light_HWC.shape[:2]
    share = pen.between(0.02, 0.1) ** 2 / 10
    dice = pen.rng.random((height, width), dtype=np.float32)
    # What is left below the threshold is uniform again: it is the strength of the speck, weak ones the most.
    grit = np.where(dice < share, (dice / share) ** 2, 0) * pen.between(2.0, 6.0)
    near = _soften(grit, (1,) if pen.chance(0.5) else (1, 1, 1))
    light_HWC *= 1 - 0.6 * look.contrast * (near - _soften(near, (1, 2)))[:, :, None]
    for _ in range(pen.count(0, 2)):
        size = pen.between(4, 11)
        u, v = pen.frame(size, size, wobble_px=3, cell_px=8)
        d = _ellipse(u, v, size, size * pen.between(0.4, 1))
        dark = _inside(d + 2, 5.0) * pen.between(0.03, 0.12) + _inside(np.abs(d) - 1, 2.5) * pen.between(-0.03, 0.04)
        _stamp(light_HWC, (1 - dark)[:, :, None], pen.count(0, width - 1), pen.count(0, height - 1))


def _window(shape_HW: tuple[int, ...], x: int, y: int, width: int, height: int) -> tuple[slice, slice, slice, slice]:
    """Rows and columns of the field under a patch centred at (x, y), then the same of the patch."""
    top, left = y - shape_HW[0] // 2, x - shape_HW[1] // 2
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = max(min(top + shape_HW[0], height), y0), max(min(left + shape_HW[1], width), x0)
    return slice(y0, y1), slice(x0, x1), slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)


def _stamp(light_HWC: F32, share_HWC: F32, x: int, y: int) -> None:
    rows, columns, rows_in, columns_in = _window(share_HWC.shape, x, y, light_HWC.shape[1], light_HWC.shape[0])
    light_HWC[rows, columns] *= share_HWC[rows_in, columns_in]


def _place(pen: _Pen, solid_HW: NDArray[np.bool_], taken_HW: NDArray[np.bool_]) -> tuple[int, int] | None:
    """Where an object may lie: most of it in the field, and little of it on others. None: no room found."""
    height, width = taken_HW.shape
    area = int(np.count_nonzero(solid_HW))
    allowed = 0.5 if pen.chance(0.12) else 0.04
    for _ in range(14):
        x, y = pen.count(0, width - 1), pen.count(0, height - 1)
        rows, columns, rows_in, columns_in = _window(solid_HW.shape, x, y, width, height)
        seen = solid_HW[rows_in, columns_in]
        visible = int(np.count_nonzero(seen))
        on_others = int(np.count_nonzero(seen & taken_HW[rows, columns]))
        if visible >= 0.6 * area and on_others <= allowed * area:
            return x, y
    return None


def _specimen(pen: _Pen, index: int, size_px: tuple[int, int]) -> list[str]:
    """The class of each object to draw. One specimen is full of red cells, the next of crystals."""
    area = size_px[0] * size_px[1] / (512 * 384)
    names: list[str] = []
    for order, (name, kind) in enumerate(_KINDS.items()):
        # Cubed, a uniform number has the long tail of real counts; the factor gives it mean 1.
        company = 1 - kind.company + kind.company * 4 * pen.between(0, 1) ** 3
        count = int(kind.per_field * company * area + pen.between(0, 1))
        if (index + order) % GUARANTEED_EVERY == 0 and area >= 1:
            count = max(count, 1)
        names += [name] * count
    return names


def _sensor(pen: _Pen, light_HWC: F32) -> NDArray[np.uint8]:
    """Photon and readout noise, mostly shared by the three colours as after demosaicing; then 8 bits."""
    height, width = light_HWC.shape[:2]
    raw = np.frombuffer(pen.rng.bytes(height * width * 5), dtype=np.uint8).reshape(5, height, width)
    bell = raw[0].astype(np.float32) + raw[1].astype(np.float32) - 255
    strength = pen.between(0.6, 2.4) / 104
    noisy = light_HWC + (bell * strength)[:, :, None]
    for colour in range(3):
        noisy[:, :, colour] += (raw[2 + colour].astype(np.float32) - 127.5) * (strength * 0.7)
    pixels: NDArray[np.uint8] = np.clip(noisy + 0.5, 0, 255).astype(np.uint8)
    return pixels


def field(seed: int, index: int, size_px: tuple[int, int] = (512, 384)) -> Field:
    """Draw field `index` of the series `seed`; the same arguments give the same bytes, on any machine.

    `size_px` is (width, height), 32 or more each. The magnification does not change with it: a larger field shows
    more objects, a smaller one fewer. A field has at least one object.
    """
    width, height = size_px
    if min(size_px) < 32 or seed < 0 or index < 0:
        raise ValueError(f"seed and index must be 0 or more and both sides 32 px or more, got {seed, index, size_px}")
    pen = _Pen((seed, index))
    turn, skew = pen.between(0, 2 * math.pi), pen.between(0, 0.28) ** 2 * 3
    oblique_xy = (skew * math.cos(turn), skew * math.sin(turn))
    look = _Look(pen.between(0.05, 0.7), pen.between(0.55, 0.95), pen.between(0.15, 0.4), oblique_xy)
    light_HWC = _background(pen, width, height)
    _debris(pen, light_HWC, look)
    taken_HW = np.zeros((height, width), dtype=np.bool_)
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[str] = []
    names = _specimen(pen, index, size_px)
    while names or not labels:
        name = names.pop(0) if names else "red_cell"
        body = _KINDS[name].draw(pen)
        solid_HW = body.cover_HW > 0.5
        spot = _place(pen, solid_HW, taken_HW)
        if spot is None:
            continue
        rows, columns, rows_in, columns_in = _window(solid_HW.shape, *spot, width, height)
        seen = solid_HW[rows_in, columns_in]
        ys, xs = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
        x0, y0 = columns.start, rows.start
        _stamp(light_HWC, _transmission(pen, body, look), *spot)
        taken_HW[rows, columns] |= seen
        boxes.append((x0 + int(xs[0]), y0 + int(ys[0]), x0 + int(xs[-1]) + 1, y0 + int(ys[-1]) + 1))
        labels.append(name)
    return Field(_sensor(pen, light_HWC), np.array(boxes, dtype=np.float64).reshape(-1, 4), tuple(labels))


# ---- the folder ------------------------------------------------------------------------------------------------


def is_test(index: int) -> bool:
    """Whether field `index` belongs to the test split: 7 of each 20, spread evenly."""
    return index * 7 % 20 < TEST_PER_20


def _annotation(drawn: Field, file_name: str) -> bytes:
    """The Pascal VOC record of a field. Corners are the edges of the box, as labelImg writes and our reader reads."""
    height, width = drawn.pixels_HWC.shape[:2]
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = file_name
    size = ElementTree.SubElement(root, "size")
    for tag, number in (("width", width), ("height", height), ("depth", 3)):
        ElementTree.SubElement(size, tag).text = str(number)
    for label, (x0, y0, x1, y1) in zip(drawn.labels, drawn.boxes_N4.astype(int).tolist(), strict=True):
        item = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(item, "name").text = label
        ElementTree.SubElement(item, "truncated").text = str(int(x0 == 0 or y0 == 0 or x1 == width or y1 == height))
        ElementTree.SubElement(item, "difficult").text = "0"
        box = ElementTree.SubElement(item, "bndbox")
        for tag, number in (("xmin", x0), ("ymin", y0), ("xmax", x1), ("ymax", y1)):
            ElementTree.SubElement(box, tag).text = str(number)
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root))


def _fill(folder: Path, indices: range, seed: int, size_px: tuple[int, int]) -> None:
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for index in indices:
        drawn = field(seed, index, size_px)
        name = f"field_{index:05d}"
        picture = Image.fromarray(drawn.pixels_HWC)
        picture.save(folder / "JPEGImages" / f"{name}.jpg", quality=95, subsampling=0)
        (folder / "Annotations" / f"{name}.xml").write_bytes(_annotation(drawn, f"{name}.jpg"))
    for split, wanted in (("train", False), ("test", True)):
        names = [f"field_{index:05d}\n" for index in indices if is_test(index) is wanted]
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("".join(names))


def write(out: Path, count: int, seed: int = 0, size_px: tuple[int, int] = (512, 384), first: int = 0) -> Path:
    """Write the fields `first` to `first + count - 1` of a series as a Pascal VOC folder; give the folder back.

    `out/JPEGImages/field_00000.jpg` (quality 95), `out/Annotations/field_00000.xml`, and the names of the fields of
    either split in `out/ImageSets/Main/train.txt` and `test.txt` (`is_test`). The folder appears whole or not at
    all. If it is there already and `out/synthetic.json` says that the same arguments made it, nothing is done.
    """
    out = Path(out)
    arguments = {"version": VERSION, "seed": seed, "first": first, "count": count, "size_px": list(size_px)}
    made_by = (json.dumps(arguments) + "\n").encode()
    if _is_made_by(out, made_by):
        return out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            _fill(draft, range(first, first + count), seed, size_px)
            (draft / "synthetic.json").write_bytes(made_by)
            draft.chmod(0o755)
            os.rename(draft, out)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    except OSError as error:
        # Another process may have finished the same folder in the meantime.
        if _is_made_by(out, made_by):
            return out
        raise WriteError(f"cannot write the drawn fields to {out}: {error.strerror or error}") from error
    return out


def _is_made_by(out: Path, made_by: bytes) -> bool:
    """Whether `out` holds what these arguments make. Anything else that is there must not be overwritten."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    record = out / "synthetic.json"
    if record.is_file() and record.read_bytes() == made_by:
        return True
    raise WriteError(f"{out} exists and was not made with these arguments; remove it or name another folder")
