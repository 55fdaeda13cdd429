"""The Triton kernels of the CUDA engine. One program makes BLOCK pixels of one view; all sums are in one order.

A grid is (views, blocks of a view): only the first side of a grid may pass 65,535.

`resample` is crop, antialiased resize, flips and turns at once: each output pixel sums its own taps, from the uint8
source. Views are float32 (N, 3, S, S), contiguous; a plane is S * S.
"""

from __future__ import annotations

import warnings

import triton
import triton.language as tl

from ssl_pretrain.views.colour import GRAY_C

# Triton 3.9 tells every user that its next release may round otherwise; both are right here.
warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION", category=UserWarning)

BLOCK = 512
"""Pixels that one program makes."""
GRAY_R, GRAY_G, GRAY_B = (tl.constexpr(share) for share in GRAY_C)


@triton.jit
def resample(
    flat: tl.tensor, place: tl.tensor, rows: tl.tensor, out: tl.tensor, side: tl.tensor, size: tl.tensor,
    mirrored: tl.constexpr, scatter: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Crop, antialiased resize, flips, turn: output pixel = the source under a triangle on either axis.

    mirrored   a canvas: beyond the image stands its mirror image; else only the crop counts
    scatter    output m goes to `out[rows[m]]`, else to `out[m]`
    """
    m = tl.program_id(0)
    n = tl.load(rows + m)
    view = place + n * 10
    image = flat + tl.load(view)
    image_h, image_w = tl.load(view + 1).to(tl.int32), tl.load(view + 2).to(tl.int32)
    top, left = tl.load(view + 3).to(tl.int32), tl.load(view + 4).to(tl.int32)
    height, width = tl.load(view + 5).to(tl.int32), tl.load(view + 6).to(tl.int32)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i, j = pixel // side, pixel % side
    swap = tl.load(view + 9) != 0
    y, x = tl.where(swap, j, i), tl.where(swap, i, j)
    y = tl.where(tl.load(view + 7) != 0, side - 1 - y, y)
    x = tl.where(tl.load(view + 8) != 0, side - 1 - x, x)
    # Middles in double precision: in single a field of 4,000 px would cost the fourth digit of the weights.
    scale_y, scale_x = height.to(tl.float64) / size, width.to(tl.float64) / size
    reach_y, reach_x = tl.maximum(scale_y, 1.0), tl.maximum(scale_x, 1.0)
    middle_y = top + height * 0.5 + (y.to(tl.float64) + (0.5 - side * 0.5)) * scale_y
    middle_x = left + width * 0.5 + (x.to(tl.float64) + (0.5 - side * 0.5)) * scale_x
    first_y, first_x = tl.floor(middle_y - reach_y + 0.5).to(tl.int32), tl.floor(middle_x - reach_x + 0.5).to(tl.int32)
    from_y, from_x = (first_y + 0.5 - middle_y).to(tl.float32), (first_x + 0.5 - middle_x).to(tl.float32)
    per_y, per_x = (1.0 / reach_y).to(tl.float32), (1.0 / reach_x).to(tl.float32)
    red, green, blue = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    used = pixel < side * side
    for t_y in range(tl.ceil(2 * reach_y).to(tl.int32)):
        weight_y = tl.maximum(0.0, 1.0 - tl.abs(from_y + t_y) * per_y)
        source_y = first_y + t_y
        if mirrored:
            source_y = _mirror(source_y, image_h)
        else:
            weight_y = tl.where((source_y >= top) & (source_y < top + height), weight_y, 0.0)
        for t_x in range(tl.ceil(2 * reach_x).to(tl.int32)):
            weight = weight_y * tl.maximum(0.0, 1.0 - tl.abs(from_x + t_x) * per_x)
            source_x = first_x + t_x
            if mirrored:
                source_x = _mirror(source_x, image_w)
            else:
                weight = tl.where((source_x >= left) & (source_x < left + width), weight, 0.0)
            at = image + (source_y.to(tl.int64) * image_w + source_x) * 3
            mask = used & (weight > 0)
            red += weight * tl.load(at, mask=mask, other=0).to(tl.float32)
            green += weight * tl.load(at + 1, mask=mask, other=0).to(tl.float32)
            blue += weight * tl.load(at + 2, mask=mask, other=0).to(tl.float32)
            total += weight
    share = 1.0 / (255.0 * tl.where(total > 0, total, 1.0))
    to = out + tl.where(scatter, n, m).to(tl.int64) * 3 * side * side + pixel
    tl.store(to, red * share, mask=used)
    tl.store(to + side * side, green * share, mask=used)
    tl.store(to + 2 * side * side, blue * share, mask=used)


@triton.jit
def _mirror(t: tl.tensor, limit: tl.tensor) -> tl.tensor:
    """Index in the mirror image, whose edge pixels are not there twice."""
    period = tl.maximum(2 * limit - 2, 1)
    t = t % period
    t = tl.where(t < 0, t + period, t)
    return tl.minimum(t, period - t) * tl.where(limit > 1, 1, 0)


@triton.jit
def blur(
    x: tl.tensor, out: tl.tensor, rows: tl.tensor, weight: tl.tensor, side: tl.tensor, widest: tl.tensor,
    along_x: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Weighted sums along an axis, reflected at the border; along x from `x[rows[m]]` to `out[m]`, along y back."""
    m, channel = tl.program_id(0), tl.program_id(2)
    n = tl.load(rows + m)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    used = pixel < side * side
    i, j = pixel // side, pixel % side
    plane = side * side
    if along_x:
        source, to = x + (n * 3 + channel) * plane, out + (m.to(tl.int64) * 3 + channel) * plane
    else:
        source, to = x + (m.to(tl.int64) * 3 + channel) * plane, out + (n * 3 + channel) * plane
    place = tl.where(along_x, j, i)
    line = tl.where(along_x, i * side, j)
    step = tl.where(along_x, 1, side)
    weights = weight + m * (widest + 1)
    total = tl.load(weights) * tl.load(source + line + place * step, mask=used, other=0.0)
    for r in range(1, widest + 1):
        before, after = tl.abs(place - r), side - 1 - tl.abs(side - 1 - (place + r))
        low = tl.load(source + line + before * step, mask=used, other=0.0)
        high = tl.load(source + line + after * step, mask=used, other=0.0)
        total += tl.load(weights + r) * (low + high)
    tl.store(to + pixel, total, mask=used)


@triton.jit
def hue(
    x: tl.tensor, table: tl.tensor, sums: tl.tensor, plane: tl.tensor, stages: tl.tensor, k: tl.tensor,
    yiq: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Turns the hue of the views that ask for it, and leaves the sum of gray of each block."""
    n = tl.program_id(0)
    stage = table + (n * stages + k) * 15
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    hued = pixel < tl.where(tl.load(stage + 13) > 0, plane, 0)
    used = pixel < tl.where(tl.load(stage + 13) + tl.load(stage + 14) > 0, plane, 0)
    at = x + n.to(tl.int64) * 3 * plane + pixel
    r, g, b = (tl.load(at, mask=used, other=0.0), tl.load(at + plane, mask=used, other=0.0),
               tl.load(at + 2 * plane, mask=used, other=0.0))  # fmt: skip
    if yiq:
        turn = stage + 4
        r2 = tl.load(turn) * r + tl.load(turn + 1) * g + tl.load(turn + 2) * b
        g2 = tl.load(turn + 3) * r + tl.load(turn + 4) * g + tl.load(turn + 5) * b
        b2 = tl.load(turn + 6) * r + tl.load(turn + 7) * g + tl.load(turn + 8) * b
        r2, g2, b2 = _unit(r2), _unit(g2), _unit(b2)
    else:
        high, low = tl.maximum(tl.maximum(r, g), b), tl.minimum(tl.minimum(r, g), b)
        span = high - low
        sixths = tl.where(r == high, g - b, tl.where(g == high, (b - r) + 2 * span, (r - g) + 4 * span))
        sixths = sixths / tl.where(span == 0, 1.0, span) + 6 * tl.load(stage)
        sixths = sixths - 6 * tl.floor(sixths / 6)
        r2 = low + span * _unit(tl.abs(sixths - 3) - 1)
        g2 = low + span * _unit(2 - tl.abs(sixths - 2))
        b2 = low + span * _unit(2 - tl.abs(sixths - 4))
    r, g, b = tl.where(hued, r2, r), tl.where(hued, g2, g), tl.where(hued, b2, b)
    tl.store(at, r, mask=hued)
    tl.store(at + plane, g, mask=hued)
    tl.store(at + 2 * plane, b, mask=hued)
    gray = tl.where(used, GRAY_R * r + GRAY_G * g + GRAY_B * b, 0.0)
    tl.store(sums + n * tl.num_programs(1) + tl.program_id(1), tl.sum(gray, axis=0))


@triton.jit
def mix(
    x: tl.tensor, table: tl.tensor, sums: tl.tensor, plane: tl.tensor, stages: tl.tensor, k: tl.tensor,
    tiles: tl.tensor,
    TILES: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """`a x + u g + v m`, clamped, for the views that ask for it."""
    n = tl.program_id(0)
    stage = table + (n * stages + k) * 15
    tile = tl.arange(0, TILES)
    mean = tl.sum(tl.load(sums + n * tiles + tile, mask=tile < tiles, other=0.0), axis=0) / plane
    a, u, v = tl.load(stage + 1), tl.load(stage + 2), tl.load(stage + 3)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    used = pixel < tl.where(tl.load(stage + 14) > 0, plane, 0)
    at = x + n.to(tl.int64) * 3 * plane + pixel
    r, g, b = (tl.load(at, mask=used, other=0.0), tl.load(at + plane, mask=used, other=0.0),
               tl.load(at + 2 * plane, mask=used, other=0.0))  # fmt: skip
    rest = u * (GRAY_R * r + GRAY_G * g + GRAY_B * b) + v * mean
    tl.store(at, _unit(a * r + rest), mask=used)
    tl.store(at + plane, _unit(a * g + rest), mask=used)
    tl.store(at + 2 * plane, _unit(a * b + rest), mask=used)


@triton.jit
def _unit(value: tl.tensor) -> tl.tensor:
    return tl.minimum(tl.maximum(value, 0.0), 1.0)
