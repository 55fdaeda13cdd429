"""A sheet to draw on, and the picture of views that reports and previews share.

Legend: B images, V views of an image, H W pixels.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from numpy.typing import NDArray
from torch import Tensor

from ssl_pretrain.backbones import InputSpec
from ssl_pretrain.errors import WriteError
from ssl_pretrain.files import write_durably
from ssl_pretrain.views import ViewSpec
from ssl_pretrain.views.plan import boxes, corners, windows

if TYPE_CHECKING:
    from ssl_pretrain.train.feed import Feed

DPI = 130
STYLE = {"font.size": 9.0, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
INKS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's colours, which the colour-blind can tell apart; one a view spec."""
WRONG = "#d7191c"
"""What should not be."""
BLANK = 1.0
"""Standard deviation, of 255, below which a view shows nothing: strong colour ops take a bright field to white."""
TALL, WIDE, GAP, LINE = 2.7, 3.6, 0.12, 0.18
"""Inches: an image in the picture of views, the space between things, a line of small text."""


class Sheet:
    """A figure that is laid out in inches from its top left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=DPI)

    def picture(self, left: float, top: float, width: float, height: float, x: NDArray[np.uint8]) -> Axes:
        """An image, as large as fits."""
        place = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(place)
        axes.imshow(x)
        axes.set_axis_off()
        return axes

    def text(self, left: float, bottom: float, words: str, size: float = 8, color: str = "black") -> None:
        """One line; `bottom` is its baseline. `parse_math` would read two dollar signs as a formula."""
        x, y = left / self.width, 1 - bottom / self.height
        self.figure.text(x, y, words, fontsize=size, color=color, va="baseline", parse_math=False)


def write(path: Path, figure: Figure) -> Path:
    """Writes a PNG, whole or not at all, with the folders above it; raises `WriteError`."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # a name in a script that the font lacks becomes boxes, which is enough
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure.savefig(buffer, format="png", dpi=DPI)  # which is Agg, whatever backend is set
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, buffer.getbuffer())
    except WriteError as error:
        raise WriteError(str(error).replace("cannot write", "cannot write the picture", 1)) from error
    except OSError as error:
        raise WriteError(f"cannot write the picture {path}: {error.strerror or error}") from error
    return path


def box(axes: Axes, box_4: Sequence[float] | NDArray[np.int64], ink: str, width: float = 1.6, line: str = "-") -> None:
    """Top, left, height and width in pixels of the image that is shown there."""
    top, left, height, width_px = (float(v) for v in box_4)
    edge = Rectangle((left - 0.5, top - 0.5), width_px, height, fill=False, ec=ink, lw=width, ls=line)
    axes.add_patch(edge).set_clip_on(False)  # an edge on the image's own would be cut in half


def number(axes: Axes, box_4: Sequence[float] | NDArray[np.int64], number: int, ink: str, corner: int) -> None:
    """A view's number inside a corner of its box (clockwise from the top left)."""
    top, left, height, width = (float(v) for v in box_4)
    right, low = corner in (1, 2), corner in (2, 3)
    axes.text(
        left + right * width - 0.5, top + low * height - 0.5, str(number), color="white", fontsize=7, weight="bold",
        ha="right" if right else "left", va="bottom" if low else "top", bbox={"fc": ink, "ec": "none", "pad": 1.5},
    )  # fmt: skip


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """A figure as TensorBoard's `add_image` takes it with `dataformats="HWC"`: uint8 (H, W, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba(), np.uint8)[..., :3].copy()  # type: ignore[no-untyped-call]


def short(name: str, letters: int) -> str:
    """A class's name in so many letters, in the middle of which something may be left out.

    >>> short("epithelial_cell_squamous", 18)
    'epithelia…squamous'
    """
    name = " ".join(name.replace("_", " ").split())
    left = letters // 2
    return name if len(name) <= letters else f"{name[:left]}…{name[len(name) - (letters - left - 1) :]}"


def shown(x_NCHW: Tensor, fed: InputSpec) -> list[NDArray[np.uint8]]:
    """Normalised images as the eye sees them: uint8 (H, W, 3)."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (fed.mean, fed.std))
    pixels = (x_NCHW.detach().float().cpu() * std + mean).clamp(0, 1).mul(255).round().byte()
    return list(pixels.permute(0, 2, 3, 1).numpy())


# The picture of views


def tiles(feed: Feed, ids_B: NDArray[np.int64]) -> list[list[NDArray[np.uint8]]]:
    """Per image its views in epoch 0, as the method is given them, in the order of the specs."""
    crops = feed.draw(ids_B, epoch=0).crops
    by_view = [shown(x, feed.fed) for spec in feed.specs for x in crops[spec.name]]
    return [list(of_image) for of_image in zip(*by_view, strict=True)]


def is_blank(tile_HWC: NDArray[np.uint8], limit: float = BLANK) -> bool:
    """Whether a view shows nothing."""
    return bool(tile_HWC.std((0, 1)).max() < limit)


def sources(
    feed: Feed, ids_B: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64] | None]]:
    """Per image its pixels, the boxes of its crops (V, 4) and of its window (4) where one is set."""
    place_B = feed.places(ids_B)
    size_B2, scale_B = feed.pack.size_N2[place_B], feed.pack.scale_N[place_B]
    drawn = feed.plan(ids_B, 0)
    box_BV4 = np.concatenate([boxes(drawn, i) for i in range(len(feed.specs))], axis=1)
    window_B4 = windows(ids_B, size_B2, 0, feed.seed, feed.window_px, scale_B)
    for b, place in enumerate(place_B):
        window = window_B4[b] if feed.window_px is not None else None
        yield feed.pack.image(int(place)), box_BV4[b], window


def views_picture(
    feed: Feed,
    ids_B: NDArray[np.int64],
    tiles_BV: Sequence[Sequence[NDArray[np.uint8]]],
    head: Sequence[tuple[str, str]],
    keys: Sequence[tuple[str, str]],
    objects: Mapping[int, NDArray[np.float64]] | None = None,
    blank: float = BLANK,
) -> Figure:
    """Images with the outlines of their crops, and beside each its views (`tiles`).

    `head` has lines of text with their colour, the first one the title; `keys` are two to a line. `objects` outlines
    boxes (N, 4) of x0, y0, x1, y1 in stored pixels, by their image's place in the pack.
    """
    inks = [INKS[i % len(INKS)] for i, spec in enumerate(feed.specs) for _ in range(spec.count)]
    rows = 1 if len(inks) <= 3 else 2 if len(inks) <= 12 else 3
    columns, side = math.ceil(len(inks) / rows), (TALL - (rows - 1) * GAP) / rows
    start = 0.29 + LINE * (len(head) + math.ceil(len(keys) / 2))
    sheet = Sheet(2 * GAP + WIDE + columns * (side + GAP), start + len(ids_B) * (TALL + 2 * GAP))
    _head(sheet, head, keys)
    drawn = feed.plan(ids_B, 0)
    quad_BV42 = np.concatenate([corners(drawn, i) for i in range(len(feed.specs))], axis=1)
    for b, (pixels, box_V4, window_4) in enumerate(sources(feed, ids_B)):
        top = start + b * (TALL + 2 * GAP)
        axes = sheet.picture(GAP, top, WIDE, TALL, pixels)
        _outline_objects(axes, pixels, (objects or {}).get(int(feed.places(ids_B)[b])))
        if window_4 is not None:
            box(axes, window_4, "white", 2.2)  # so that the dashes show on a dark field too
            box(axes, window_4, "black", line="--")
        _outline_crops(axes, quad_BV42[b], box_V4, inks)
        for v, (tile, ink) in enumerate(zip(tiles_BV[b], inks, strict=True)):
            left = 2 * GAP + WIDE + v % columns * (side + GAP)
            view = sheet.picture(left, top + v // columns * (side + GAP), side, side, tile)
            box(view, (0, 0, *tile.shape[:2]), ink, 2.2)
            number(view, (0, 0, *tile.shape[:2]), v + 1, ink, corner=0)
            if is_blank(tile, blank):
                view.text(0.5, 0.5, "nothing left", transform=view.transAxes, ha="center", fontsize=8, color=WRONG)
    return sheet.figure


def spec_keys(specs: Sequence[ViewSpec], window_px: int | None) -> list[tuple[str, str]]:
    """What each colour is: colour and words."""
    keys = []
    for i, spec in enumerate(specs):
        low, high = (f"{100 * share:.3g}" for share in spec.scale)
        count = f"{spec.count} × " if spec.count > 1 else ""
        of = "image" if window_px is None else "window"
        keys.append((INKS[i % len(INKS)], f"■ {count}{spec.name}, {spec.size_px} px, {low} to {high} % of the {of}"))
    return keys


def window_keys(window_px: int | None) -> list[tuple[str, str]]:
    """The line on the dashed window, where there is one."""
    return [("black", f"- - window, {window_px} px")] if window_px is not None else []


def _head(sheet: Sheet, head: Sequence[tuple[str, str]], keys: Sequence[tuple[str, str]]) -> None:
    for i, (ink, words) in enumerate(head):
        sheet.text(GAP, 0.25 + i * LINE + (0.07 if i else 0), words, size=8 if i else 11, color=ink)
    for i, (ink, words) in enumerate(keys):
        sheet.text(GAP + i % 2 * 3.3, 0.32 + (len(head) + i // 2) * LINE, words, color=ink)


def _outline_objects(axes: Axes, pixels_HWC: NDArray[np.uint8], box_N4: NDArray[np.float64] | None) -> None:
    """Thin, and dark on a bright field."""
    if box_N4 is None or not len(box_N4):
        return
    ink = "#202020" if pixels_HWC[::8, ::8].mean() > 110 else "#f4f4f4"
    outlines = list(box_N4[:, [[0, 1], [2, 1], [2, 3], [0, 3]]] - 0.5)
    axes.add_collection(PolyCollection(outlines, fc="none", ec=ink, lw=0.6), autolim=False)


def _outline_crops(axes: Axes, quad_V42: NDArray[np.float64], box_V4: NDArray[np.int64], inks: Sequence[str]) -> None:
    """Where each view comes from: a rectangle, or a quadrilateral for which the axes grow beyond the image."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    low_2, high_2 = quad_V42.min((0, 1)) - 0.5, quad_V42.max((0, 1)) - 0.5
    axes.set(xlim=(min(left, low_2[0]), max(right, high_2[0])), ylim=(max(bottom, high_2[1]), min(top, low_2[1])))
    for v, (quad_42, box_4, ink) in enumerate(zip(quad_V42, box_V4, inks, strict=True)):
        upright = np.abs(quad_42[1] - quad_42[0]).min() < 1e-3  # a turn by right angles leaves the box as it is
        if upright:
            box(axes, box_4, ink)
            number(axes, box_4, v + 1, ink, corner=v % 4)
        else:
            axes.add_patch(Polygon(quad_42 - 0.5, fill=False, ec=ink, lw=1.6)).set_clip_on(False)
            number(axes, (quad_42[0, 1], quad_42[0, 0], 0, 0), v + 1, ink, corner=0)
