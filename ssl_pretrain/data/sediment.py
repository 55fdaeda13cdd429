"""The drawings of the classes: what may lie in urine, one function each.

An object is a *thickness* (it bends light) and a weak *absorption* (it takes light away); `synthetic` turns the two
into a picture. The classes differ by shape and texture, not by colour. The shapes of arrays are those of `pen`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ssl_pretrain.data.pen import F32, Pen, bent, dome, ellipse, inside, line, slab, soften


@dataclass(frozen=True)
class Body:
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


def _red_cell(pen: Pen) -> Body:
    """A disc thinner in the middle; some crenated, some ghosts that lost their content, some seen aslant."""
    a = pen.between(9.0, 12.0)
    b = a * pen.between(0.84, 1.0)
    u, v = pen.frame(a + 2, a + 2, wobble_px=0.5, cell_px=7)
    r2 = u * u / (a * a) + v * v / (b * b)
    d = ellipse(u, v, a, b)
    cover = inside(d)
    # Evans and Fung's profile of a resting cell.
    rest = np.sqrt(np.maximum(1 - r2, 0)) * (0.207 + 2.003 * r2 - 1.123 * r2 * r2)
    kind = float(pen.rng.random())
    dimple = inside(ellipse(u, v, 0.5 * a, 0.5 * b) + 0.5, pen.between(1.5, 2.6)) * pen.between(0.25, 0.8)
    thickness = (0.6 * cover + 1.3 * rest - 0.6 * dimple) * pen.between(0.85, 1.15)
    absorption = 0.04 * cover + pen.between(0.02, 0.07) * (rest - dimple)
    if kind < 0.2:
        spikes, start = pen.count(9, 13), pen.between(0, 6)
        thickness, absorption = 0.55 * cover + 0.4 * dome(d, 0.8 * b), 0.05 * cover
        for i in range(spikes + 4):
            ring, turn = (1.0, i / spikes) if i < spikes else (0.45, (i - spikes) / 4)
            x, y = a * ring * math.cos(start + 2 * math.pi * turn), b * ring * math.sin(start + 2 * math.pi * turn)
            spike = inside(ellipse(u - x, v - y, 1.7, 1.7), 1.0)
            thickness = thickness + 0.6 * spike * (1 - 0.5 * cover)
            cover = np.maximum(cover, spike)
    elif kind < 0.32:
        thickness, absorption = 0.45 * cover + 0.3 * rest, 0.02 * cover
    return Body(thickness, absorption, cover, (0.7, 1.0, 1.3))


def _white_cell(pen: Pen) -> Body:
    """A granular ball with a nucleus of two to four lobes."""
    a = pen.between(12.5, 16.0)
    b = a * pen.between(0.86, 1.0)
    u, v = pen.frame(a + 1, a + 1, wobble_px=1.0, cell_px=10)
    d = ellipse(u, v, a, b)
    cover = inside(d)
    lobes, start = pen.count(2, 4), pen.between(0, 6)
    nucleus = np.zeros_like(u)
    for i in range(lobes):
        turn, size = start + pen.between(3.4, 4.4) * i / lobes, a * pen.between(0.27, 0.34)
        x, y = 0.36 * a * math.cos(turn), 0.36 * b * math.sin(turn)
        lobe = ellipse(u - x, v - y, size, size * pen.between(0.8, 1.1))
        nucleus = np.maximum(nucleus, inside(lobe, 1.1))
    grains = pen.grains(inside(d + 1.5), pen.between(0.10, 0.2)) * (1 - 0.7 * nucleus)
    thickness = 0.6 * cover + 0.6 * dome(d, 0.9 * b) + 0.8 * nucleus + pen.between(0.2, 0.65) * grains
    return Body(thickness, cover * pen.between(0.02, 0.06) + pen.between(0.06, 0.15) * nucleus, cover)


def _squamous_cell(pen: Pen) -> Body:
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
            folds = folds + inside(-(away + (a * pen.between(0.08, 0.3))), 1.2)
    d = np.maximum(d, ellipse(u, v, 1.04 * a, 1.04 * a))
    cover = inside(d, 1.0)
    wrinkle = u * pen.between(-1, 1) + v + (a * pen.between(-0.4, 0.4))
    wrinkle = line(wrinkle + 0.1 * a * pen.noise(u.shape, 0.5 * a), 0.6)
    x, y, size = a * pen.between(-0.15, 0.15), a * pen.between(-0.15, 0.15), pen.between(5.5, 7.5)
    nucleus = ellipse(u - x, v - y, size, size * pen.between(0.7, 0.95))
    core = inside(nucleus, 1.0)
    relief = pen.noise(u.shape, 9) * 0.22 + pen.noise(u.shape, 4) * 0.12
    grains = pen.grains(inside(d + 3), pen.between(0.01, 0.04))
    thickness = cover * (0.65 + relief + 0.5 * np.minimum(folds, 1)) + 0.35 * wrinkle * cover
    thickness = thickness + 0.9 * core + 0.5 * line(nucleus, 0.6) + 0.45 * grains
    return Body(thickness, cover * (0.03 + 0.03 * np.minimum(folds, 1)) + 0.08 * core, cover)


def _renal_cell(pen: Pen) -> Body:
    """A small round or tailed epithelial cell: one large round nucleus with a rim and a nucleolus, off the centre."""
    a = pen.between(17.0, 23.0)
    b = a * pen.between(0.75, 0.95)
    tail = pen.between(0.0, 0.45)
    u, v = pen.frame(a + 3, a + 3, wobble_px=1.6, cell_px=13)
    d = ellipse(u, v * (1 + (tail / a) * u), a, b)
    d = np.maximum(d, slab(u, v, a, b + 3, 5))
    cover = inside(d)
    size = a * pen.between(0.36, 0.45)
    x, y = -0.22 * a + pen.between(-2, 2), pen.between(-0.15, 0.15) * b
    round_ = ellipse(u - x, v - y, size, 0.93 * size)
    core = inside(round_, 0.9)
    dot = inside(ellipse(u - (x + 2), v - (y - 1), 2.2, 2.2))
    grains = pen.grains(inside(d + 2) * (1 - core), pen.between(0.12, 0.2), spread=2)
    thickness = 0.6 * cover + 0.6 * dome(d, 0.6 * b) + 0.9 * grains - 0.25 * core
    thickness = thickness + 0.75 * line(round_, 0.7) + 0.9 * dot
    return Body(thickness, cover * pen.between(0.03, 0.07) + 0.06 * core, cover)


def _cast(pen: Pen) -> tuple[F32, F32, F32]:
    """The tube that both casts share: distance to its wall, and the bent coordinates."""
    half_u, half_v = pen.between(48.0, 88.0), pen.between(11.0, 16.0)
    swing = pen.between(0.0, 0.12) * half_u
    u, v = pen.frame(half_u, half_v + swing + 2, wobble_px=0.8, cell_px=22)
    v = bent(pen, u, v, half_u, swing, 3)
    # One end round, the other round, blunt or thinning out.
    wide = 1 - pen.between(-0.05, 0.16) * (u / half_u)
    return slab(u, v / wide, half_u, half_v, half_v * pen.between(0.5, 0.98)), u, v


def _hyaline_cast(pen: Pen) -> Body:
    """A pale glassy tube with parallel walls and next to nothing inside."""
    d, u, _ = _cast(pen)
    cover = inside(d, 1.2)
    relief = 0.1 * pen.noise(u.shape, 8)
    thickness = cover * (0.5 + relief) + 0.3 * dome(d, 7) + 0.5 * pen.grains(inside(d + 3), 0.004)
    return Body(thickness, cover * pen.between(0.005, 0.03), cover)


def _granular_cast(pen: Pen) -> Body:
    """The same tube full of fine or coarse granules."""
    d, u, _ = _cast(pen)
    cover = inside(d, 1.0)
    patchy = inside(d + 1) * (0.65 + 0.6 * pen.noise(u.shape, 11))
    grains = pen.between(0.4, 0.8) * pen.grains(patchy, pen.between(0.12, 0.22))
    grains = grains + pen.between(0.3, 1.6) * pen.grains(patchy, pen.between(0.04, 0.12), spread=3)
    lumps = pen.noise(u.shape, 6) * cover
    thickness = 0.5 * cover + 0.25 * dome(d, 7) + grains + 0.5 * lumps
    return Body(thickness, cover * pen.between(0.04, 0.1) + 0.04 * grains, cover)


def _calcium_oxalate(pen: Pen) -> Body:
    """The dihydrate: an eight-sided double pyramid from above, an envelope with a cross."""
    a = pen.between(7.5, 15.0)
    b = a * pen.between(0.75, 1.0)
    u, v = pen.frame(1.2 * a, 1.2 * b)
    d = slab(u, v, a, b)
    cover = inside(d, 0.6)
    cross = line((np.abs(u) / a - np.abs(v) / b) * (0.7 * b), 0.55) * cover
    peak = 1 - np.maximum(np.abs(u) / a, np.abs(v) / b)
    thickness = cover * (1.1 + 1.0 * peak) + 1.2 * cross
    return Body(thickness, 0.03 * cross - cover * pen.between(-0.03, 0.09), cover)


def _triple_phosphate(pen: Pen) -> Body:
    """A prism with sloping ends, a coffin lid: outline, inner ridge and the lines that join their corners."""
    a = pen.between(22.0, 42.0)
    b = a * pen.between(0.32, 0.5)
    u, v = pen.frame(a + 1, b + 3)
    v = v * (1 + pen.between(0.0, 0.14) * (u / a))
    chop = pen.between(0.75, 1.0)
    d = np.maximum(slab(u, v, a, b), (np.abs(u) + np.abs(v) - (a + b * 0.45)) * chop)
    bevel = b * pen.between(0.45, 0.75)
    cover = inside(d, 0.6)
    hips = line((np.abs(u) - np.abs(v) - (a - b)) * 0.7, 0.5) * inside(-d - (bevel + 1))
    roof = np.clip(-d / bevel, 0, 1)
    ridge = line(d + bevel, 0.5)
    thickness = cover * 1.1 + 0.9 * roof + 0.75 * ridge + 0.75 * hips * cover
    return Body(thickness, cover * 0.015 + 0.02 * ridge, cover)


def _uric_acid(pen: Pen) -> Body:
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
    cover = inside(d, 0.7)
    layers = line(d + (0.3 * b), 0.4) + 0.7 * line(d + (0.55 * b), 0.4)
    thickness = 1.5 * cover + 0.5 * dome(d, b) + 0.45 * layers
    return Body(thickness, cover * pen.between(0.01, 0.16) + 0.03 * layers, cover, (0.35, 0.9, 1.75))


def _yeast(pen: Pen) -> Body:
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
        d = ellipse(p * c + q * s, q * c - p * s, size, size * pen.between(0.68, 0.82))
        cover = np.maximum(cover, inside(d))
        dot = inside(ellipse(p - 1.3, q - 1, 0.9, 0.9))
        thickness = np.maximum(thickness, 1.3 * inside(d) + 0.7 * dome(d, 0.7 * size) + 0.25 * dot)
        # A small strong lens: it gathers the light in its middle.
        glow = np.maximum(glow, inside(d + 0.42 * size, 1.4))
        last = size
    return Body(thickness, cover * 0.04 - glow * pen.between(0.12, 0.34), cover)


def _bacteria(pen: Pen) -> Body:
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
        cover = np.maximum(cover, inside(slab(along, across, h, wide, wide), 0.7))
        x, y = x + (h + 1.2) * c, y + (h + 1.2) * s
        turn += pen.between(-0.6, 0.6)
    return Body(1.3 * cover, 0.10 * cover, cover)


def _sperm(pen: Pen) -> Body:
    """A small pear-shaped head and a long thin wavy tail."""
    half_u = pen.between(24.0, 34.0)
    swing = pen.between(3.0, 9.0)
    u, v = pen.frame(half_u + 3, swing + 5)
    v = bent(pen, u, v, half_u, swing, pen.count(3, 5))
    p = u + (half_u - 4)
    head = ellipse(p, v * (1 + 0.07 * p), 5.0, pen.between(2.7, 3.4))
    core = inside(head)
    thin = np.clip((half_u - u) / (2 * half_u), 0, 1)
    tail = inside(slab(u, v, half_u, 0.75, 0.7), 0.8) * inside(-p - 3)
    cover = np.maximum(core, tail)
    return Body(0.9 * core + 0.9 * dome(head, 3) + tail * (0.55 + 0.5 * thin), 0.05 * core + 0.03 * tail, cover)


def _mucus(pen: Pen) -> Body:
    """A long wavy ribbon with lengthwise streaks that thins out at both ends."""
    half_u, half_v = pen.between(60.0, 115.0), pen.between(3.5, 8.0)
    swing = pen.between(8.0, 20.0)
    u, v = pen.frame(half_u, swing + half_v + 2)
    v = bent(pen, u, v, half_u, swing, pen.count(4, 6))
    t = u / half_u
    lean = pen.between(-0.7, 0.7)
    wide = half_v * np.maximum(1 - t * t, 0) * (1 + lean * t) + 0.5 + 0.8 * pen.noise(u.shape, 14)
    d = np.maximum(np.abs(v) - wide, np.abs(u) - half_u)
    cover = inside(d, 1.1)
    streaks = np.zeros_like(u)
    for _ in range(pen.count(2, 4)):
        streaks = streaks + line(v - wide * pen.between(-0.8, 0.8) * (1 + 0.3 * t), 0.4)
    return Body(cover * 0.35 + 0.4 * np.minimum(streaks, 1) * cover, cover * 0.01, cover)


def _amorphous(pen: Pen) -> Body:
    """A loose heap of grains without a shape of their own: urates or phosphates."""
    a = pen.between(13.0, 30.0)
    b = a * pen.between(0.5, 0.95)
    u, v = pen.frame(a + 1, b + 1, wobble_px=5, cell_px=9)
    r = np.sqrt(u * u / (a * a) + v * v / (b * b))
    density = np.clip(1.15 - r, 0, 1) * pen.between(0.16, 0.4)
    seeds = (pen.rng.random(u.shape, dtype=np.float32) < density).astype(np.float32)
    big = seeds * (pen.rng.random(u.shape, dtype=np.float32) * 1.6 + 0.2)
    thickness = soften(big, (1,)) * 2.8
    heap = soften(seeds, (1, 2))
    return Body(thickness, np.clip(heap, 0, 1) * pen.between(0.1, 0.3), np.clip(heap * 14, 0, 1), (0.85, 1.0, 1.15))


@dataclass(frozen=True)
class Kind:
    """draw: makes one. per_field: mean number in a 512 x 384 field. company: how much the number varies, 0 to 1."""

    draw: Callable[[Pen], Body]
    per_field: float
    company: float


# Large and flat first: they lie below. Frequencies are unequal as in a laboratory; but see synthetic.GUARANTEED_EVERY.
KINDS: dict[str, Kind] = {
    "squamous_cell": Kind(_squamous_cell, 1.3, 0.6),
    "mucus": Kind(_mucus, 0.5, 0.5),
    "hyaline_cast": Kind(_hyaline_cast, 0.55, 0.5),
    "granular_cast": Kind(_granular_cast, 0.5, 0.5),
    "amorphous": Kind(_amorphous, 0.7, 0.8),
    "renal_cell": Kind(_renal_cell, 0.8, 0.5),
    "triple_phosphate": Kind(_triple_phosphate, 0.8, 0.8),
    "uric_acid": Kind(_uric_acid, 0.9, 0.8),
    "sperm": Kind(_sperm, 0.7, 0.6),
    "white_cell": Kind(_white_cell, 5.0, 0.9),
    "calcium_oxalate": Kind(_calcium_oxalate, 2.2, 0.9),
    "yeast": Kind(_yeast, 1.6, 0.9),
    "red_cell": Kind(_red_cell, 12.0, 0.9),
    "bacteria": Kind(_bacteria, 2.5, 0.9),
}
