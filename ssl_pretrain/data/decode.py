"""Bytes to pixels: refuse what is unsafe or broken, decode, resize. Pillow is the only decoder.

What is refused raises `Rejected(reason, detail)`; the reasons here, beside those of `files`, are

    unknown_format                                     not one of JPEG, PNG, WebP, TIFF, BMP, GIF
    too_large, too_small                               by the header, before anything is decoded
    damaged                                            cut short or corrupt; never shown half
    unstated_range                                     32-bit values, of which nobody said what is black and white

The rules for the rest: the EXIF orientation is applied, the first frame is taken, transparency is laid on white,
palettes and CMYK become RGB, 16-bit grey is divided by 257 (so that 65535 is white), ICC profiles are ignored.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ssl_pretrain.data.files import Rejected, escape, read_bytes

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")  # a list, because Pillow would run Ghostscript on an EPS
MAX_PIXELS = 100_000_000
MAX_SIDE_PX = 32_768
MIN_SIDE_PX = 16

_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Decoded(NamedTuple):
    """One image and the size that it had before it was resized."""

    pixels: NDArray[np.uint8]
    """(H, W, 3) RGB, read-only."""
    original_hw: tuple[int, int]
    """Height and width in the file, upright."""


def decode(path: Path, float_range: tuple[float, float] | None = None) -> NDArray[np.uint8]:
    """The image as uint8 (H, W, 3) RGB, upright; raises `Rejected`.

    `float_range` states which values of a 32-bit image are black and white; without it such an image is rejected.
    """
    return decode_bytes(read_bytes(path), None, float_range).pixels.copy()


def decode_bytes(
    data: bytes, short_side_px: int | None = None, float_range: tuple[float, float] | None = None
) -> Decoded:
    """The image in the bytes of a file, resized as `resize_short_side` does when a short side is given.

    A JPEG at least four times as large is first reduced in its own frequency domain to at least twice the size
    (libjpeg's scaled decoding), which is faster and leaves the final filter enough to work on. Raises `Rejected`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata; what matters here is raised
        with _open(data) as image:
            width, height = image.size
            if short_side_px is not None and min(width, height) >= 4 * short_side_px:
                target_width, target_height = _target(width, height, short_side_px)
                image.draft(None, (2 * target_width, 2 * target_height))
            try:
                image.load()
                turn = _orientation(image)
                rgb = _rgb(image, float_range)
            except Rejected:
                raise
            except MemoryError as error:
                raise Rejected("too_large", f"{width} x {height} px do not fit into memory") from error
            except Exception as error:  # on broken files Pillow raises whatever its parsers happen to hit
                raise Rejected("damaged", escape(str(error))[:200] or type(error).__name__) from error
    if turn in _TURNS:
        rgb = rgb.transpose(_TURNS[turn])
    if turn >= 5:
        width, height = height, width
    if short_side_px is not None:
        rgb = rgb.resize(_target(width, height, short_side_px), Image.Resampling.LANCZOS)
    return Decoded(np.asarray(rgb), (height, width))


def header_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels, upright, from the header alone; raises `Rejected`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _open(read_bytes(path)) as image:
            width, height = image.size
            # Pillow gives TIFF sizes upright and turns the pixels itself
            turned = image.format != "TIFF" and _orientation(image) >= 5
    return (height, width) if turned else (width, height)


def resize_short_side(pixels: NDArray[np.uint8], short_side_px: int) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 with a short side of `short_side_px`, aspect kept to the pixel; never enlarges.

    Pillow's Lanczos filter (a = 3), widened by the scale, so it is antialiased.
    """
    height, width = pixels.shape[:2]
    size = _target(width, height, short_side_px)
    if size == (width, height):
        return pixels
    return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def _target(width: int, height: int, short_side_px: int) -> tuple[int, int]:
    short = min(width, height)
    if short <= short_side_px:
        return width, height
    # halves go up, in integers: the same on every machine
    scaled = [(2 * side * short_side_px + short) // (2 * short) for side in (width, height)]
    return scaled[0], scaled[1]


def _open(data: bytes) -> Image.Image:
    """The header, with its size checked; nothing is decoded yet."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Rejected("too_large", f"more than {MAX_PIXELS} pixels") from error
    except UnidentifiedImageError as error:
        raise Rejected("unknown_format", f"not one of {', '.join(FORMATS)}") from error
    except Exception as error:  # as above
        raise Rejected("damaged", escape(str(error))[:200] or type(error).__name__) from error
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE_PX:
        limit = f"{MAX_PIXELS} pixels, {MAX_SIDE_PX} px a side"
        raise Rejected("too_large", f"{width} x {height} px; the limit is {limit}")
    if min(width, height) < MIN_SIDE_PX:
        raise Rejected("too_small", f"{width} x {height} px; at least {MIN_SIDE_PX} px a side are needed")
    return image


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # broken metadata on good pixels: the image is taken as it is stored
        return 1
    return value if isinstance(value, int) else 1


def _rgb(image: Image.Image, float_range: tuple[float, float] | None) -> Image.Image:
    """8-bit RGB, by the rules at the top of this module."""
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        if float_range is None:
            raise Rejected("unstated_range", f"32-bit values (mode {image.mode}) need a stated range")
        low, high = float_range
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise Rejected("damaged", "the image has values that are not finite")
        grey = np.rint((values - low) / (high - low) * 255).clip(0, 255)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer).convert("RGB")
    return image.convert("RGB")
