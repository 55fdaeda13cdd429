"""Images whose pixels are not light but numbers: a class, or an object each.

What cannot be one raises `Rejected`: the reasons of `files` and `decode`, and

    lossy            a JPEG does not keep numbers
    not_labels       floating point values, CMYK, or more objects than can be meant

Shapes: an image of H x W pixels, K spans of equal pixels down a column.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ssl_pretrain.data.decode import FORMATS, header_size
from ssl_pretrain.data.files import Rejected, escape, read_bytes
from ssl_pretrain.data.shapes import Mask, of_spans

NAMELESS = "object"
"""The one class of formats that tell objects apart and do not name them."""
MAX_OBJECTS = 100_000
"""In one image. The fullest fields at hand have a few hundred."""
MAX_SPANS = 20_000_000


def read_labels(path: Path, colours: bool = False) -> NDArray[np.int64]:
    """The numbers (H, W) of a label image, upright: grey values, the indices of a palette, one of three equal channels.

    Of unequal channels, and of every image where `colours` is set, red * 65536 + green * 256 + blue; `is_colour` tells.
    Transparency is ignored. Raises `Rejected`.
    """
    header_size(path)  # refuses what is too large or too small before anything is decoded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(read_bytes(path)), formats=FORMATS) as image:
                if image.format == "JPEG":
                    raise Rejected("lossy", "a JPEG does not keep the numbers of a label image")
                upright = ImageOps.exif_transpose(image)
                return _colours(upright) if colours else _numbers(upright)
        except Rejected:
            raise
        except MemoryError as error:
            raise Rejected("too_large", "does not fit into memory") from error
        except Exception as error:  # on broken files Pillow raises whatever its parsers happen to hit
            raise Rejected("damaged", escape(str(error))[:200] or type(error).__name__) from error


def is_colour(path: Path) -> bool:
    """Whether an image has channels that differ, so that its pixels are colours; raises `Rejected`."""
    header_size(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(read_bytes(path)), formats=FORMATS) as image:
                return image.mode in ("RGB", "RGBA") and not _equal_channels(np.asarray(image))
        except MemoryError as error:
            raise Rejected("too_large", "does not fit into memory") from error
        except Exception as error:  # as above
            raise Rejected("damaged", escape(str(error))[:200] or type(error).__name__) from error


def objects_by_number(values_HW: NDArray[np.int64]) -> list[tuple[int, Mask]]:
    """One mask for each number but 0, by number; raises `Rejected`.

    >>> [(number, of.runs_R.tolist()) for number, of in objects_by_number(np.array([[7, 0], [0, 7]]))]
    [(7, [0, 1, 2, 1])]
    """
    value_K, start_K, end_K = _spans(values_HW, 0)
    return _masks(values_HW.shape[0], values_HW.shape[1], value_K, value_K, start_K, end_K)


def objects_by_touch(values_HW: NDArray[np.int64], background: int = 0) -> list[tuple[int, Mask]]:
    """One (number, mask) for each connected part of equal pixels, at corners too, but the background's.

    From left to right by their first pixel; raises `Rejected`.

    >>> [number for number, _ in objects_by_touch(np.array([[7, 0, 7], [0, 7, 0], [5, 5, 0]]))]
    [7, 5]
    """
    height, width = values_HW.shape
    value_K, start_K, end_K = _spans(values_HW, background)
    # one more row below, so that the end of a column and the start of the next are apart
    column_K = start_K // height
    start, end = start_K + column_K, end_K + column_K
    low_K = np.searchsorted(end, start + height + 1, side="left")
    high_K = np.searchsorted(start, end + height + 1, side="right")
    touching_K = np.maximum(high_K - low_K, 0)
    left = np.repeat(np.arange(len(start)), touching_K)
    right = np.arange(len(left)) - np.repeat(np.cumsum(touching_K) - touching_K, touching_K) + low_K[left]
    equal = value_K[left] == value_K[right]
    return _masks(height, width, _roots(len(start), left[equal], right[equal]), value_K, start_K, end_K)


def _numbers(image: Image.Image) -> NDArray[np.int64]:
    if image.mode in ("F", "CMYK", "LAB", "HSV", "YCbCr"):
        raise Rejected("not_labels", f"pixels of mode {image.mode} are not the numbers of a label image")
    pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
    if image.mode in ("LA", "PA", "La"):
        return pixels[..., 0].astype(np.int64)
    if pixels.ndim == 3:
        return pixels[..., 0].astype(np.int64) if _equal_channels(pixels) else _colours(image)
    return pixels.astype(np.int64)


def _colours(image: Image.Image) -> NDArray[np.int64]:
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        raise Rejected("not_labels", f"pixels of mode {image.mode} are not colours")
    rgb_HW3 = np.asarray(image.convert("RGB")).astype(np.int64)
    codes_HW: NDArray[np.int64] = (rgb_HW3[..., 0] << 16) + (rgb_HW3[..., 1] << 8) + rgb_HW3[..., 2]
    return codes_HW


def _equal_channels(pixels_HWC: NDArray[np.uint8]) -> bool:
    return bool((pixels_HWC[..., :1] == pixels_HWC[..., 1:3]).all())


def _spans(
    values_HW: NDArray[np.int64], background: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Number, start and end of what is equal down a column; pixels are counted column by column."""
    flat = values_HW.ravel(order="F")
    changes = flat[1:] != flat[:-1]
    changes[values_HW.shape[0] - 1 :: values_HW.shape[0]] = True  # a column ends
    start_K = np.concatenate([[0], np.flatnonzero(changes) + 1])
    if len(start_K) > MAX_SPANS:
        raise Rejected("not_labels", f"{len(start_K)} changes from pixel to pixel: noise, not objects")
    end_K, value_K = np.append(start_K[1:], flat.size), flat[start_K]
    kept_K = value_K != background
    return value_K[kept_K], start_K[kept_K], end_K[kept_K]


def _roots(count: int, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
    """The lowest span that each span hangs together with: its neighbour's, until no neighbours differ."""
    root_K = np.arange(count)
    while True:
        low, high = np.minimum(root_K[left], root_K[right]), np.maximum(root_K[left], root_K[right])
        if (low == high).all():
            return root_K
        np.minimum.at(root_K, high, low)
        while (root_K[root_K] != root_K).any():
            root_K = root_K[root_K]


def _masks(
    height: int,
    width: int,
    key_K: NDArray[np.int64],
    value_K: NDArray[np.int64],
    start_K: NDArray[np.int64],
    end_K: NDArray[np.int64],
) -> list[tuple[int, Mask]]:
    """The spans of equal key, together, in the order of the keys."""
    if not len(key_K):
        return []
    order = np.argsort(key_K, kind="stable")
    edges = [0, *(np.flatnonzero(np.diff(key_K[order])) + 1).tolist()]
    if len(edges) > MAX_OBJECTS:
        raise Rejected("not_labels", f"{len(edges)} objects; at most {MAX_OBJECTS} are read from one image")
    groups = [order[a:b] for a, b in zip(edges, [*edges[1:], len(order)], strict=True)]
    return [(int(value_K[k[0]]), of_spans((height, width), start_K[k], end_K[k])) for k in groups]
