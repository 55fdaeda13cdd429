"""A few numbers and a thumbnail of each image, taken while it is decoded: what the intake report judges it by.

All are of the image as it is packed, in grey (Pillow's "L"), with levels from 0 to 255, averaged over 2 x 2 pixels.
They stand beside the pack's index, in `looks.npz` and `thumbnails.bin`; a pack of an older release has neither, and
`of_pack` measures it then.

Shapes: N images, H W pixels, M numbers; a thumbnail has 64 x 64.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssl_pretrain.data.decode import Source
from ssl_pretrain.data.files import escape
from ssl_pretrain.data.pack import Pack
from ssl_pretrain.errors import DataError

SIDE_PX = 64
"""Of a thumbnail, as in `duplicates`. Images with a shorter side have none, and their sharpness is not judged."""
FILES = ("looks.npz", "thumbnails.bin")
THUMBNAIL_BYTES = SIDE_PX * SIDE_PX
RADIUS_PX = 3
"""Of the surroundings that a pixel of the thumbnail is compared with."""
FINE, COARSE = 2, 8
"""Pixels that are averaged, along each side, at the two scales that sharpness compares."""
EDGES = 0.995
"""The quantile of the Laplacian that stands for the edges: half a percent of the pixels is steeper."""
WHITE = 254
"""From this level on a pixel is clipped."""
BRIGHT = 0.999
"""The quantile of the levels that stands for the brightest that an image shows."""


class Look(NamedTuple):
    """What one image looks like."""

    detail: float
    """Levels: how far the most outstanding spot lies from its surroundings."""
    sharpness: float
    """A logarithm to base 2, of the edges' steepness at the fine scale over that at the coarse one; NaN if small."""
    mean: float
    """Level."""
    white: float
    """Share of the pixels that are clipped."""
    bright: float
    """Level that one pixel in a thousand exceeds."""


class Measured(NamedTuple):
    """One image's numbers and its thumbnail."""

    look: Look
    thumbnail_HW: NDArray[np.uint8] | None
    """uint8 (64, 64), each pixel a mean; None for an image with a side below 64 px."""


@dataclass(frozen=True, eq=False)
class Looks:
    """What the images of a pack look like, and what their files were."""

    numbers_NM: NDArray[np.float64]
    """The fields of `Look`, in their order."""
    thumbnail_NHW: NDArray[np.uint8]
    """uint8 (N, 64, 64), memory-mapped; zeros where `shown_N` is false."""
    shown_N: NDArray[np.bool_]
    """Whether the image is large enough for a thumbnail."""
    sources: tuple[Source, ...] | None
    """What the files were, each kind once; None for a pack of a release that did not keep it."""
    source_N: NDArray[np.int64]
    """Which of them."""
    pages_N: NDArray[np.int64]
    peak_N: NDArray[np.float64]
    """As in `Source`, which for a kind has 0 in their place."""

    def number(self, name: str) -> NDArray[np.float64]:
        """One field of `Look` of all images, float64 (N)."""
        return np.asarray(self.numbers_NM[:, Look._fields.index(name)], np.float64)


def measure(pixels_HWC: NDArray[np.uint8]) -> Measured:
    """The numbers of an RGB image, uint8 (H, W, 3), and its thumbnail."""
    grey = Image.fromarray(pixels_HWC).convert("L")
    fine = grey.reduce(FINE)  # everything is made of it where it has the pixels, which takes half of the time
    small_HW = np.asarray(
        (fine if min(fine.size) >= SIDE_PX else grey).resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)
    )
    below_V = np.cumsum(count_V := np.array(fine.histogram(), np.int64))
    total = int(below_V[-1])
    mean = float(count_V @ np.arange(256)) / total
    white = float(count_V[WHITE:].sum()) / total
    bright = float(np.searchsorted(below_V, BRIGHT * total))
    if min(grey.size) < SIDE_PX:
        return Measured(Look(outstanding(small_HW), float("nan"), mean, white, bright), None)
    steep, wide = steepness(np.asarray(fine)), steepness(np.asarray(fine.reduce(COARSE // FINE)))
    sharpness = float(np.log2((steep + 1) / (wide + 1)))  # 1: a level of noise must not decide where nothing is
    return Measured(Look(outstanding(small_HW), sharpness, mean, white, bright), small_HW)


def outstanding(grey_HW: NDArray[np.uint8]) -> float:
    """The largest difference between a pixel and the mean of the 7 x 7 around it, in levels.

    Beyond its edges the image is continued with its slope, so that a vignette, which is smooth, stays near 0: one that
    falls by 200 levels towards the corners of 64 x 64 pixels leaves 1. A pixel of 98 on a black field differs from
    the mean of 98 / 49 = 2 by

    >>> field = np.zeros((9, 9), np.uint8)
    >>> field[4, 4] = 98
    >>> outstanding(field)
    96.0
    """
    r = RADIUS_PX
    padded = np.pad(grey_HW.astype(np.float64), r, mode="reflect", reflect_type="odd")
    sums = np.pad(padded.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    side = 2 * r + 1
    around = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    return float(np.abs(grey_HW - around / side**2).max())


def steepness(grey_HW: NDArray[np.uint8]) -> float:
    """How strongly edges bend: the 99.5 % quantile of |Laplacian| (four neighbours), in levels, of 3 x 3 px or more.

    A step of 10 levels bends by 10 on both of its sides, here in 2 of 3 columns.

    >>> steepness(np.repeat([[0, 0, 10, 10, 10]], 3, axis=0).astype(np.uint8))
    10.0
    """
    x = grey_HW.astype(np.int16)
    laplacian = x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:] - 4 * x[1:-1, 1:-1]
    below_V = np.cumsum(np.bincount(np.abs(laplacian).ravel()))
    return float(np.searchsorted(below_V, EDGES * below_V[-1]))


def write_index(folder: Path, numbers_NM: NDArray[np.float64], sources: Sequence[Source]) -> None:
    """Writes `looks.npz`; `sources` has an entry an image."""
    kinds: dict[Source, int] = {}
    source_N = [kinds.setdefault(source._replace(pages=0, peak=0.0), len(kinds)) for source in sources]
    words = json.dumps([list(kind[:3]) for kind in kinds])
    with open(folder / FILES[0], "wb") as file:
        np.savez(
            file,
            numbers_NM=numbers_NM,
            source_N=np.array(source_N, np.int64),
            pages_N=np.array([source.pages for source in sources], np.int64),
            peak_N=np.array([source.peak for source in sources], np.float64),
            kinds=np.frombuffer(words.encode(), np.uint8),
        )
        file.flush()
        os.fsync(file.fileno())  # pack.json, which is written last, promises it


def of_pack(pack: Pack) -> Looks:
    """The looks that were kept with the pack, or measured now where it has none; raises `DataError` if damaged."""
    shown_N = pack.size_N2.min(1) >= SIDE_PX
    if not all((pack.folder / name).is_file() for name in FILES):
        return _measured(pack, shown_N)
    try:
        with open(pack.folder / FILES[0], "rb") as file, np.load(file, allow_pickle=False) as arrays:
            numbers_NM, source_N = arrays["numbers_NM"], arrays["source_N"]
            pages_N, peak_N = arrays["pages_N"], arrays["peak_N"]
            kinds = tuple(
                Source(form, mode, bits, 0, 0.0) for form, mode, bits in json.loads(arrays["kinds"].tobytes())
            )
        thumbnails = np.memmap(pack.folder / FILES[1], np.uint8, mode="r").view(np.ndarray)
        thumbnail_NHW = thumbnails.reshape(len(pack), SIDE_PX, SIDE_PX)
        whole = numbers_NM.shape == (len(pack), len(Look._fields)) and bool((source_N < len(kinds)).all())
        whole = whole and len(source_N) == len(pages_N) == len(peak_N) == len(pack)
    except Exception as error:  # zip, npy and type errors of every kind, as in `open_pack`
        raise DataError(_damaged(pack, escape(str(error)))) from error
    if not whole:
        raise DataError(_damaged(pack, "its parts do not belong together"))
    return Looks(numbers_NM, thumbnail_NHW, shown_N, kinds, source_N, pages_N, peak_N)


def _damaged(pack: Pack, what: str) -> str:
    return f"{pack.folder / FILES[0]} is damaged ({what}): delete the pack and pack the images again"


def _measured(pack: Pack, shown_N: NDArray[np.bool_]) -> Looks:
    """Of a pack that has none: from its pixels, one image at a time."""
    count = len(pack)
    numbers_NM = np.zeros((count, len(Look._fields)))
    thumbnail_NHW = np.zeros((count, SIDE_PX, SIDE_PX), np.uint8)
    for i in range(count):
        look, thumbnail_HW = measure(pack.image(i))
        numbers_NM[i] = look
        if thumbnail_HW is not None:
            thumbnail_NHW[i] = thumbnail_HW
    nothing_N = np.zeros(count, np.int64)
    return Looks(numbers_NM, thumbnail_NHW, shown_N, None, nothing_N, nothing_N, np.zeros(count))
