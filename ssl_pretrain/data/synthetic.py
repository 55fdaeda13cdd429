"""Drawn fields that look like unstained urine sediment under a bright-field microscope, with boxes and class names.

For the quickstart and the tests, where no real image can be shipped; nothing learned here says anything about urine.

`_transmission` turns the thickness and absorption of an object (`sediment`) into a picture as defocused bright-field
optics does: the intensity follows the curvature of the thickness, so a nearly transparent body gets a dark edge and a
bright halo.

`field(seed, index)` is a pure function of its arguments, to the byte. Two rules make it so on every machine: all
random numbers come from the counter-based Philox, keyed by (seed, index); and arrays see only + - * /, sqrt and
comparisons (which IEEE 754 fixes to the last bit), never exp, sin, a float sum or a matrix product. The few cosines
are of single numbers, in float64, and are rounded to the arrays' float32.

Shapes: H height and W width in pixels (of the field, or of the small patch that one object is drawn on), C colours
(red, green, blue), N objects.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssl_pretrain.data.pen import F32, Pen, ellipse, inside, soften
from ssl_pretrain.data.sediment import KINDS, Body
from ssl_pretrain.errors import WriteError

VERSION = 1
"""Goes up when the same (seed, index) gives other pixels."""

CLASSES: tuple[str, ...] = tuple(sorted(KINDS))
"""The drawn classes, in alphabetical order."""

GUARANTEED_EVERY = 3
"""In fields of 512 x 384 or more each class is drawn at least once in every third field: 20 or more in any 60."""

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
class _Look:
    """What one microscope and one exposure share: focus and contrast.

    focus: 0 sharp, 1 visibly soft. contrast: gain of the curvature term. edge: loss of light at steep slopes.
    oblique_xy: relief from skewed light.
    """

    focus: float
    contrast: float
    edge: float
    oblique_xy: tuple[float, float]


# ---- optics ----------------------------------------------------------------------------------------------------


def _transmission(pen: Pen, body: Body, look: _Look) -> F32:
    """The share of the light that passes each pixel of the patch (HWC), with this object's own focus."""
    defocus = look.focus + 0.9 * pen.between(0, 1) * pen.between(0, 1)
    blur = (1,) if defocus < 0.45 else (1, 1) if defocus < 0.75 else (1, 2) if defocus < 1.05 else (1, 1, 2)
    near = soften(body.thickness_HW, blur)
    far = soften(near, (1, 2) if defocus < 0.75 else (2, 2))
    sign = -0.8 if pen.chance(0.12) else 1.0
    curvature = (near - far) * (sign * look.contrast)
    slope_x, slope_y = np.zeros_like(near), np.zeros_like(near)
    slope_x[:, 1:-1] = (near[:, 2:] - near[:, :-2]) * 0.5
    slope_y[1:-1] = (near[2:] - near[:-2]) * 0.5
    steep = np.minimum((slope_x * slope_x + slope_y * slope_y) * look.edge, 0.35)
    relief = slope_x * look.oblique_xy[0] + slope_y * look.oblique_xy[1]
    taken = soften(body.absorption_HW, blur)
    planes = []
    # Blue bends most: the faint colour of real edges.
    for tint, bend in zip(body.tint_C, (0.92, 1.0, 1.1), strict=True):
        planes.append(1 - taken * tint - curvature * bend - steep - relief)
    passed: F32 = np.clip(np.stack(planes, axis=2), 0.12, 1.6)
    return passed


_LAMPS = ((206, 207, 203), (212, 207, 186), (188, 200, 210), (196, 208, 192), (214, 203, 200), (180, 180, 178))


def _background(pen: Pen, width: int, height: int) -> F32:
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


def _debris(pen: Pen, light_HWC: F32, look: _Look) -> None:
    """Specks that nobody labels, in place: fine grit everywhere, and dust far out of focus on the glass."""
    height, width = light_HWC.shape[:2]
    share = pen.between(0.02, 0.1) ** 2 / 10
    dice = pen.rng.random((height, width), dtype=np.float32)
    # What is left below the threshold is uniform again: it is the strength of the speck, weak ones the most.
    grit = np.where(dice < share, (dice / share) ** 2, 0) * pen.between(2.0, 6.0)
    near = soften(grit, (1,) if pen.chance(0.5) else (1, 1, 1))
    light_HWC *= 1 - 0.6 * look.contrast * (near - soften(near, (1, 2)))[:, :, None]
    for _ in range(pen.count(0, 2)):
        size = pen.between(4, 11)
        u, v = pen.frame(size, size, wobble_px=3, cell_px=8)
        d = ellipse(u, v, size, size * pen.between(0.4, 1))
        dark = inside(d + 2, 5.0) * pen.between(0.03, 0.12) + inside(np.abs(d) - 1, 2.5) * pen.between(-0.03, 0.04)
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


def _place(pen: Pen, solid_HW: NDArray[np.bool_], taken_HW: NDArray[np.bool_]) -> tuple[int, int] | None:
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


def _specimen(pen: Pen, index: int, size_px: tuple[int, int]) -> list[str]:
    """The class of each object to draw. One specimen is full of red cells, the next of crystals."""
    area = size_px[0] * size_px[1] / (512 * 384)
    names: list[str] = []
    for order, (name, kind) in enumerate(KINDS.items()):
        # Cubed, a uniform number has the long tail of real counts; the factor gives it mean 1.
        company = 1 - kind.company + kind.company * 4 * pen.between(0, 1) ** 3
        count = int(kind.per_field * company * area + pen.between(0, 1))
        if (index + order) % GUARANTEED_EVERY == 0 and area >= 1:
            count = max(count, 1)
        names += [name] * count
    return names


def _sensor(pen: Pen, light_HWC: F32) -> NDArray[np.uint8]:
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
    pen = Pen((seed, index))
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
        body = KINDS[name].draw(pen)
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
