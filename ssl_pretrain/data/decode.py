"""Bytes to pixels: refuse what is unsafe or broken, decode, resize. Pillow is the only decoder; torch resizes, as its
antialiased filter takes a fraction of the time of Pillow's (`benchmarks/decoding.py`).

What is refused raises `Rejected(reason, detail)`; the reasons here, beside those of `files`, are

    unknown_format                                     not one of JPEG, PNG, WebP, TIFF, BMP, GIF
    too_large, too_small                               by the header, before anything is decoded
    damaged                                            cut short or corrupt; never shown half
    unstated_range                                     32-bit values, of which nobody said what is black and white
    unsupported                                        a TIFF of more than four channels, or of a kind unknown to Pillow

The rules for the rest: the EXIF orientation is applied, the first frame or page is taken, transparency is laid on
white, palettes and CMYK become RGB, ICC profiles are ignored. 16-bit grey is divided by 257, so that 65535 is white: a
camera of 12 bits in 16 comes out nearly black, which the intake report says. Of 16-bit colour Pillow keeps the upper
byte. `Reading` states another range of 16- and 32-bit grey, and another page of a TIFF.
"""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.GifImagePlugin import GifImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ssl_pretrain.data.files import Rejected, escape, read_bytes
from ssl_pretrain.errors import UsageError

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")  # a list, because Pillow would run Ghostscript on an EPS
MAX_PIXELS = 100_000_000
MAX_SIDE_PX = 32_768
MIN_SIDE_PX = 16
MAX_CHANNELS = 4
MAX_PAGES = 1000
"""Counted no further: a hostile file may have millions."""
MAX_STACK_PIXELS = 1_000_000_000
"""Of all pages together, where the sharpest of them is asked for."""
PLANES = ("first", "middle", "sharpest")

_PNG_TAGS = b"eXIf", b"exif", b"xmp", b"XMP"
_ORIENTATION_TAG = 0x0112
_BITS_TAG, _PHOTOMETRIC_TAG, _CHANNELS_TAG = 258, 262, 277
_CMYK = 5  # photometric interpretation
_BITS = {"1": 1, "I": 32, "F": 32}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Reading:
    """How files are read where they leave a choice; raises `UsageError` for a choice that makes no sense."""

    value_range: tuple[float, float] | None = None
    """Which values of 16-bit and 32-bit grey are black and white. Without it 16-bit grey has 0 and 65535, and 32-bit
    grey is rejected; with it 16-bit colour is rejected, because Pillow keeps only its upper byte."""
    plane: str = "first"
    """The page of a TIFF with several: `first`, `middle` (of 4 the third), or `sharpest` (the largest variance of the
    Laplacian, among the pages with the first one's size)."""

    def __post_init__(self) -> None:
        if self.plane not in PLANES:
            raise UsageError(f"the plane is {self.plane!r}: give one of {', '.join(PLANES)}")
        if self.value_range is not None:
            low, high = self.value_range
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise UsageError(f"the range is {low:g} to {high:g}: give the values of black and white, lower first")

    @property
    def words(self) -> str:
        """What differs from the rules above, for keys and fingerprints; nothing if nothing does.

        >>> Reading((0, 4095), "middle").words
        ' range 0.0 4095.0 plane middle'
        """
        low_high = "" if self.value_range is None else " range {!r} {!r}".format(*map(float, self.value_range))
        return low_high + ("" if self.plane == "first" else f" plane {self.plane}")


AS_STATED = Reading()
"""The rules above."""


class Source(NamedTuple):
    """What a file was."""

    format: str
    """Pillow's name."""
    mode: str
    """Pillow's, such as `RGB`, `P`, `I;16`."""
    bits: int
    """A channel."""
    pages: int
    """Of a TIFF, counted up to `MAX_PAGES`; of a moving GIF 2, however many there are; of a WebP its frames."""
    peak: float
    """Largest value of 16-bit or 32-bit grey, in the page that was taken; 0 for others."""


class Decoded(NamedTuple):
    """One image and what it was before it was resized."""

    pixels: NDArray[np.uint8]
    """(H, W, 3) RGB, read-only."""
    original_hw: tuple[int, int]
    """Height and width in the file, upright."""
    source: Source


def decode(path: Path, reading: Reading = AS_STATED) -> NDArray[np.uint8]:
    """The image as uint8 (H, W, 3) RGB, upright; raises `Rejected`."""
    return decode_bytes(read_bytes(path), None, reading).pixels.copy()


def decode_bytes(data: bytes, short_side_px: int | None = None, reading: Reading = AS_STATED) -> Decoded:
    """The image in the bytes of a file, resized as `resize_short_side` does when a short side is given.

    A JPEG at least four times as large is first reduced in its own frequency domain to at least twice the size
    (libjpeg's scaled decoding), which is faster and leaves the final filter enough to work on. Raises `Rejected`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata; what matters here is raised
        with _open(data) as image:
            pages = _pages(image, data)
            _turn_to(image, reading.plane, pages)
            width, height = image.size
            source = Source(image.format or "", image.mode, _bits(image), pages, 0.0)
            if short_side_px is not None and min(width, height) >= 4 * short_side_px:
                target_width, target_height = _target(width, height, short_side_px)
                image.draft(None, (2 * target_width, 2 * target_height))
            try:
                image.load()
                turn = _orientation(image)
                rgb, peak = _rgb(image, source, reading.value_range)
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
    pixels = np.asarray(rgb)
    if short_side_px is not None and pixels.shape[1::-1] != (target := _target(width, height, short_side_px)):
        pixels = _resized(pixels, target)
    return Decoded(pixels, (height, width), source._replace(peak=peak))


def _resized(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W, 3) to (width, height), read-only."""
    import torch  # here: whoever reads headers, or keeps images as they are, has no use for it
    from torch.nn.functional import interpolate

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an array that must not be written, and is not
        x_BCHW = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    small_BCHW = interpolate(x_BCHW, (size[1], size[0]), mode="bicubic", antialias=True)
    small: NDArray[np.uint8] = small_BCHW[0].permute(1, 2, 0).contiguous().numpy()
    small.setflags(write=False)
    return small


def header_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels, upright, from the header alone; raises `Rejected`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = read_bytes(path)
        with _open(data) as image:
            width, height = image.size
            # Pillow gives TIFF sizes upright and turns the pixels itself; in a PNG it would decode all to look for what
            # may stand behind the pixels
            asks = image.format != "TIFF" and (image.format != "PNG" or any(tag in data for tag in _PNG_TAGS))
            turned = asks and _orientation(image) >= 5
    return (height, width) if turned else (width, height)


def resize_short_side(pixels: NDArray[np.uint8], short_side_px: int) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 with a short side of `short_side_px`, aspect kept to the pixel; never enlarges.

    A bicubic filter (a = -0.5), widened by the scale, so it is antialiased; in integers, and Pillow's within 1.
    """
    height, width = pixels.shape[:2]
    size = _target(width, height, short_side_px)
    return pixels if size == (width, height) else _resized(pixels, size)


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
        kind = _unknown_tiff(data)
        if kind:
            raise Rejected("unsupported", kind) from error
        raise Rejected("unknown_format", f"not one of {', '.join(FORMATS)}") from error
    except Exception as error:  # as above
        raise Rejected("damaged", escape(str(error))[:200] or type(error).__name__) from error
    _check_size(image)
    if isinstance(image, TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC_TAG) != _CMYK:
        channels = image.tag_v2.get(_CHANNELS_TAG, 1)
        if channels > MAX_CHANNELS:
            raise Rejected(
                "unsupported", f"{channels} channels; grey, RGB and CMYK, with alpha or without, can be used"
            )
    return image


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE_PX:
        limit = f"{MAX_PIXELS} pixels, {MAX_SIDE_PX} px a side"
        raise Rejected("too_large", f"{width} x {height} px; the limit is {limit}")
    if min(width, height) < MIN_SIDE_PX:
        raise Rejected("too_small", f"{width} x {height} px; at least {MIN_SIDE_PX} px a side are needed")


def _unknown_tiff(data: bytes) -> str:
    """What a TIFF holds that Pillow does not open; nothing for bytes that are no TIFF, or none that can be read."""
    if data[:4] not in (b"II*\0", b"MM\0*"):
        return ""
    try:
        first = ImageFileDirectory_v2(data[:8])
        first.load(_at(data, first.next))
        channels, bits = first.get(_CHANNELS_TAG, 1), first.get(_BITS_TAG, (1,))
        return f"a TIFF with channels of {', '.join(str(int(b)) for b in bits)} bits ({int(channels)} channels)"
    except Exception:  # as above
        return ""


def _at(data: bytes, offset: int) -> io.BytesIO:
    file = io.BytesIO(data)
    file.seek(offset)
    return file


def _pages(image: Image.Image, data: bytes) -> int:
    """As `Source.pages`. Pages that cannot be read are not counted: the first one may be good."""
    try:
        if isinstance(image, WebPImageFile):
            return int(image.n_frames)
        if not isinstance(image, TiffImageFile | GifImageFile):
            return 1
        most = MAX_PAGES if isinstance(image, TiffImageFile) else 2
        with Image.open(io.BytesIO(data), formats=(image.format or "",)) as other:  # whose state is then lost
            return _count(other, most)
    except Exception:  # as above
        return 1


def _count(image: Image.Image, most: int) -> int:
    count = 1
    try:
        while count < most:
            image.seek(count)
            count += 1
    except Exception:  # EOFError behind the last one, and anything on a broken one
        pass
    return count


def _turn_to(image: Image.Image, plane: str, pages: int) -> None:
    """Turns to the page that is wanted, of a TIFF."""
    if plane == "first" or pages == 1 or not isinstance(image, TiffImageFile):
        return
    if pages == MAX_PAGES:
        raise Rejected("too_large", f"{MAX_PAGES} pages or more; only the first page of such a stack can be taken")
    try:
        image.seek(pages // 2 if plane == "middle" else _sharpest(image, pages))
    except Rejected:
        raise
    except Exception as error:  # as above
        raise Rejected("damaged", f"a page: {escape(str(error))[:200] or type(error).__name__}") from error
    _check_size(image)


def _sharpest(image: TiffImageFile, pages: int) -> int:
    """The number of the page with the largest variance of its Laplacian; the first of equals."""
    size = image.size
    if pages * size[0] * size[1] > MAX_STACK_PIXELS:
        raise Rejected("too_large", f"{pages} pages of {size[0]} x {size[1]} px are too many to look for the sharpest")
    best, found = -1.0, 0
    for page in range(pages):
        image.seek(page)
        if image.size != size:  # a reduced copy, or a label
            continue
        x = np.asarray(image if image.mode[0] in "IF" else image.convert("L")).astype(np.float32)
        laplacian = x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:] - 4 * x[1:-1, 1:-1]
        if laplacian.var() > best:
            best, found = float(laplacian.var()), page
    return found


def _bits(image: Image.Image) -> int:
    """Bits of a channel in the file: 16 also where Pillow gives 8 of them."""
    tiles = image.tile if isinstance(image, ImageFile.ImageFile) else []
    if ";16" in image.mode or (tiles and ";16" in str(tiles[0].args)):
        return 16
    return _BITS.get(image.mode, 8)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # broken metadata on good pixels: the image is taken as it is stored
        return 1
    return value if isinstance(value, int) else 1


def _rgb(image: Image.Image, source: Source, value_range: tuple[float, float] | None) -> tuple[Image.Image, float]:
    """8-bit RGB, by the rules at the top of this module, and the largest value of deep grey."""
    deep = image.mode.startswith("I;16") or image.mode in ("I", "F")
    if deep:
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise Rejected("damaged", "the image has values that are not finite")
        grey, peak = _grey(values, value_range), float(values.max())
        return Image.fromarray(grey).convert("RGB"), peak
    if source.bits == 16 and value_range is not None:
        raise Rejected("unsupported", "16-bit colour has no range: Pillow keeps its upper byte; save it with 8 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer).convert("RGB"), 0.0
    return image if image.mode == "RGB" else image.convert("RGB"), 0.0  # convert would copy it


def _grey(values_HW: NDArray[np.generic], value_range: tuple[float, float] | None) -> NDArray[np.uint8]:
    """uint8 (H, W) of deep grey."""
    if value_range is not None:
        low, high = value_range
        grey = np.rint((values_HW.astype(np.float64) - low) / (high - low) * 255)
        return grey.clip(0, 255).astype(np.uint8)
    if values_HW.dtype.itemsize > 2:
        found = f"32-bit values from {values_HW.min():g} to {values_HW.max():g}"
        raise Rejected("unstated_range", f"{found} need a stated range (--range LOW HIGH)")
    return ((values_HW.astype(np.uint32) + 128) // 257).astype(np.uint8)
