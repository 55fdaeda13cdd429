"""Step 6: do the masks hold the classes that the labels list, and do they lie on the structures of the images?

The first is checked, the second is for the eye: outlines and a light tint over the image, with a legend.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ssl_pretrain.data.decode import MAX_PIXELS, decode_bytes, header_size
from ssl_pretrain.data.files import Rejected, escape, read_bytes, scan
from ssl_pretrain.data.neutrostruct import CLASSES
from ssl_pretrain.data.neutrostruct.masks import Drawable, mask_names
from ssl_pretrain.data.neutrostruct.naming import link, shown
from ssl_pretrain.data.neutrostruct.palette import Palette, Rgb
from ssl_pretrain.errors import DataError

TINT = 0.22
"""Share of the class's colour inside an object; its outline has all of it."""
UNKNOWN = 255
"""Id of a pixel whose colour is not in the palette."""
Format = Literal["jpg", "png"]


@dataclass(frozen=True, eq=False)
class Pair:
    """A mask and the image that it belongs to."""

    item: Drawable
    mask: Path
    image: Path


def pair(items: Sequence[Drawable], masks: Path, images: Path) -> list[Pair]:
    """The mask and image of each; only headers are read. Raises `DataError` when any is missing or of another size."""
    names = [item.image for item in items]
    mask_of = dict(zip(names, mask_names(names), strict=True))
    for folder, what in ((masks, "masks"), (images, "images")):
        if not folder.is_dir():
            raise DataError(f"there is no folder {escape(str(folder))}: check the path of the {what}")
    found = scan([masks])  # a CVAT file may spell the images a little differently, and masks made from it too
    linked = link(list(mask_of.values()), found.names)
    lost = [name for name in names if mask_of[name] not in linked]
    if lost:
        raise DataError(f"{len(lost)} of {len(items)} images have no mask in {escape(str(masks))}: {shown(lost)}")
    mask_at = {name: found.root / linked[mask_of[name]] for name in names}
    found = scan([images])
    linked = link(names, found.names)
    lost = [name for name in names if name not in linked]
    if lost:
        raise DataError(
            f"{len(lost)} of {len(items)} images are not in {escape(str(images))}, "
            f"or there under several names: {shown(lost)}"
        )
    pairs = [Pair(item, mask_at[item.image], found.root / linked[item.image]) for item in items]
    for one in pairs:
        for path in (one.mask, one.image):
            try:
                size = header_size(path)
            except Rejected as why:
                raise DataError(f"{escape(str(path))} cannot be read: {why.reason}, {why.detail}") from why
            if size != one.item.size:
                told = " x ".join(map(str, one.item.size))
                raise DataError(f"{escape(str(path))} has {size[0]} x {size[1]} px, the labels say {told}")
    return pairs


def ids_of(rgb_HWC: NDArray[np.uint8], palette: Palette) -> NDArray[np.uint8]:
    """The id of each pixel of a mask by its colour, uint8 (H, W): 0 background, 255 no colour of the palette.

    >>> from ssl_pretrain.data.neutrostruct.palette import DEFAULT
    >>> ids_of(np.array([[[0, 0, 0], [0, 114, 178], [1, 2, 3]]], np.uint8), DEFAULT).tolist()
    [[0, 1, 255]]
    """
    id_of = np.full(1 << 24, UNKNOWN, np.uint8)
    for i, (red, green, blue) in enumerate(((0, 0, 0), *palette.colours, palette.undecided)):
        id_of[red << 16 | green << 8 | blue] = i
    wide = rgb_HWC.astype(np.uint32)
    ids: NDArray[np.uint8] = id_of[wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]]
    return ids


def differences(item: Drawable, id_HW: NDArray[np.uint8]) -> list[str]:
    """What the mask and the labels of an image disagree about; nothing when all is well."""
    counts = np.bincount(id_HW.reshape(-1), minlength=UNKNOWN + 1)
    seen = frozenset(np.nonzero(counts)[0].tolist()) - {0, UNKNOWN}
    name = escape(item.image)
    said = [f"{name}: {counts[UNKNOWN]} pixels have no colour of the palette"] if counts[UNKNOWN] else []
    said += [f"{name}: {_class(i)} is in the mask, but not in the labels" for i in sorted(seen - item.ids)]
    said += [f"{name}: {_class(i)} is in the labels, but not in the mask" for i in sorted(item.ids - seen)]
    return said


def overlay(
    picture_hwC: NDArray[np.uint8], id_HW: NDArray[np.uint8], palette: Palette, counts: Mapping[int, int]
) -> Image.Image:
    """A picture, which may be smaller than its mask, with outlines, tints, and a legend of `counts` by id."""
    height, width = picture_hwC.shape[:2]
    small_hw = np.asarray(Image.fromarray(id_HW).resize((width, height), Image.Resampling.NEAREST))
    ink_83 = np.full((UNKNOWN + 1, 3), 255, np.float32)
    ink_83[1 : len(palette.colours) + 2] = (*palette.colours, palette.undecided)
    drawn_hwC = picture_hwC.copy()
    inside_hw = small_hw > 0
    drawn_hwC[inside_hw] = np.rint((1 - TINT) * picture_hwC[inside_hw] + TINT * ink_83[small_hw[inside_hw]])
    edge_hw = edges(small_hw, max(1, round(max(width, height) / 1200)))
    drawn_hwC[edge_hw] = ink_83[small_hw[edge_hw]]
    return _with_legend(Image.fromarray(drawn_hwC), palette, counts)


def edges(id_HW: NDArray[np.uint8], thick_px: int = 1) -> NDArray[np.bool_]:
    """The pixels of objects within `thick_px` of another class or of the background, along rows and columns.

    >>> edges(np.array([[0, 1, 1, 1, 0]], np.uint8)).tolist()
    [[False, True, False, True, False]]
    """
    edge_HW = np.zeros(id_HW.shape, bool)
    for k in range(1, thick_px + 1):
        down, across = id_HW[k:] != id_HW[:-k], id_HW[:, k:] != id_HW[:, :-k]
        edge_HW[k:] |= down
        edge_HW[:-k] |= down
        edge_HW[:, k:] |= across
        edge_HW[:, :-k] |= across
    return edge_HW & (id_HW > 0)


def verified(found: Pair, palette: Palette, side_px: int, format: Format = "jpg") -> tuple[bytes, list[str]]:
    """The overlay of an image, its longer side at most `side_px`, as the bytes of a file; and what disagrees.

    Raises `DataError` for a file that is broken.
    """
    short_px = max(round(min(found.item.size) * min(1.0, side_px / max(found.item.size))), 1)
    try:
        id_HW = read_ids(read_bytes(found.mask), palette)
        picture_hwC = decode_bytes(read_bytes(found.image), short_px).pixels
    except Rejected as why:
        raise DataError(
            f"{escape(found.item.image)}: image or mask cannot be read: {why.reason}, {why.detail}"
        ) from why
    ids = [outline.id for outline in found.item.outlines]
    picture = overlay(picture_hwC, id_HW, palette, {i: ids.count(i) for i in sorted(set(ids))})
    out = io.BytesIO()
    if format == "png":
        picture.save(out, "PNG", compress_level=6)
    else:
        picture.save(out, "JPEG", quality=88)
    return out.getvalue(), differences(found.item, id_HW)


def read_ids(data: bytes, palette: Palette) -> NDArray[np.uint8]:
    """The id of each pixel of a mask file, as `ids_of` gives it. Raises `Rejected`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                entries = image.getpalette("RGB") if image.mode == "P" and not image.has_transparency_data else None
                if (
                    entries is not None and image.width * image.height <= MAX_PIXELS
                ):  # by 256 colours, not by each pixel
                    rgb_1KC = np.array(entries, np.uint8).reshape(1, -1, 3)
                    id_K = np.full(256, UNKNOWN, np.uint8)
                    id_K[: rgb_1KC.shape[1]] = ids_of(rgb_1KC, palette)[0]
                    ids: NDArray[np.uint8] = id_K[np.asarray(image)]
                    return ids
        except Exception:  # on broken files Pillow raises whatever its parsers happen to hit; `decode` says it in words
            pass
    return ids_of(decode_bytes(data).pixels, palette)


def _class(i: int) -> str:
    return CLASSES[i - 1] if i <= len(CLASSES) else "undecided"


def _with_legend(picture: Image.Image, palette: Palette, counts: Mapping[int, int]) -> Image.Image:
    """The picture with a white strip below: a swatch, name and count of each class that it has."""
    font_px = max(11, round(picture.width / 75))
    font, row_px = ImageFont.load_default(font_px), round(1.8 * font_px)
    entries: list[tuple[Rgb, str, int]] = []
    for i, count in counts.items():
        text = f"{_class(i)}: {count}"
        entries.append(((*palette.colours, palette.undecided)[i - 1], text, round(font.getlength(text)) + 3 * font_px))
    rows: list[list[tuple[Rgb, str, int]]] = [[]]
    for entry in entries:
        if rows[-1] and sum(wide for _, _, wide in rows[-1]) + entry[2] > picture.width:
            rows.append([])
        rows[-1].append(entry)
    sheet = Image.new("RGB", (picture.width, picture.height + row_px * len(rows)), "white")
    sheet.paste(picture)
    pen = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        x, y = font_px // 2, picture.height + row_px * i + row_px // 2
        for colour, text, wide in row:
            pen.rectangle([x, y - font_px // 2, x + font_px, y + font_px // 2], fill=colour)
            pen.text((x + round(1.5 * font_px), y), text, fill="black", font=font, anchor="lm")
            x += wide
    return sheet
