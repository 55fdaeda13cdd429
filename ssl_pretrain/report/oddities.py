"""The oddest images of a pack on one sheet: what the intake report is about, to be judged by eye.

Rows: least detail, most blurred, brightest, darkest, each with the images at that end of the set, whether they were
found odd or not, and a few pairs of near-duplicates and of images that overlap with the labelled ones.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from ssl_pretrain.data import looks
from ssl_pretrain.data.intake import Finding, Intake
from ssl_pretrain.data.looks import Looks
from ssl_pretrain.data.pack import Pack
from ssl_pretrain.report.sheet import GAP, LINE, WRONG, Sheet, write

FILE = "oddest.png"
COLUMNS = 6
SIDE, TALL = 1.55, 1.2
"""Inches of an image's place, width and height."""
SHOWN_PX = 400
HEAD, CAPTION = 0.55, 2.4 * LINE
LETTERS = 27
"""Of a caption, at 6 points."""
ROWS = (
    ("Least detail", "detail", False, "blank", "{:.1f} levels"),
    ("Most blurred of those that show something", "sharpness", False, "blurred", "sharpness {:.2f}"),
    ("Brightest", "mean", True, "over_exposed", "mean {:.0f}"),
    ("Darkest", "mean", False, "under_exposed", "mean {:.0f}"),
)


def draw(pack: Pack, intake: Intake) -> Path:
    """Writes `oddest.png` into the pack's folder; raises `WriteError`."""
    return write(pack.folder / FILE, figure(pack, intake))


def figure(pack: Pack, intake: Intake) -> Figure:
    """The sheet; images that were found odd have their finding in red."""
    seen = looks.of_pack(pack)
    found = {(finding.path, finding.finding) for finding in intake.findings}
    blank = {path for path, kind in found if kind == "blank"}
    rows = []
    for title, field, largest, kind, form in ROWS:
        skipped = blank if kind == "blurred" else set[str]()
        places = extreme(seen, field, largest, [pack.paths[i] not in skipped for i in range(len(pack))])
        value_N = seen.number(field)
        tiles = [(i, form.format(value_N[i]), kind if (pack.paths[i], kind) in found else "") for i in places]
        rows.append((title, tiles))
    place = {path: i for i, path in enumerate(pack.paths)}
    pairs = [finding for finding in intake.findings if finding.finding in ("near_duplicate", "overlap_near")]
    rows.append(("Pairs that show the same, side by side", _pairs(pairs, place)))
    rows = [(title, tiles) for title, tiles in rows if tiles]
    return _sheet(pack, rows)


def extreme(seen: Looks, field: str, largest: bool, allowed_N: list[bool], count: int = COLUMNS) -> list[int]:
    """Places of the images with the smallest or largest number of their look; without those that have none."""
    value_N = seen.number(field)
    known = np.flatnonzero(np.isfinite(value_N) & np.array(allowed_N, np.bool_))
    order = np.argsort(-value_N[known] if largest else value_N[known], kind="stable")
    return [int(i) for i in known[order[:count]]]


def _pairs(pairs: list[Finding], place: dict[str, int]) -> list[tuple[int, str, str]]:
    """Two tiles a pair, evenly spaced among the pairs; of an overlap only the pack's image is at hand."""
    inside = [pair for pair in pairs if pair.finding == "near_duplicate"]
    chosen = [inside[i] for i in np.unique(np.linspace(0, len(inside) - 1, min(COLUMNS // 2, len(inside))).astype(int))]
    tiles = []
    for n, pair in enumerate(chosen, 1):
        tiles += [(place[pair.other], f"pair {n}", ""), (place[pair.path], f"pair {n}", "near_duplicate")]
    return tiles


def _sheet(pack: Pack, rows: list[tuple[str, list[tuple[int, str, str]]]]) -> Figure:
    step = LINE + 0.1 + TALL + CAPTION
    sheet = Sheet(GAP + COLUMNS * (SIDE + GAP), HEAD + len(rows) * step)
    sheet.text(GAP, 0.25, "The oddest images", size=11)
    sheet.text(GAP, 0.44, f"{len(pack)} images; red: found odd (findings.jsonl)", size=7)
    for r, (title, tiles) in enumerate(rows):
        top = HEAD + r * step
        sheet.text(GAP, top + LINE, title, size=9)
        for c, (i, words, finding) in enumerate(tiles):
            left, under = GAP + c * (SIDE + GAP), top + LINE + 0.1 + TALL
            sheet.picture(left, top + LINE + 0.1, SIDE, TALL, _small(pack.image(i)))
            sheet.text(left, under + 0.14, _ending(pack.paths[i]), size=6)
            sheet.text(left, under + 0.27, f"{words}  {finding}", size=6, color=WRONG if finding else "black")
    return sheet.figure


def _ending(path: str) -> str:
    """The end of a path, which tells files apart."""
    return path if len(path) <= LETTERS else "…" + path[1 - LETTERS :]


def _small(pixels_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    image = Image.fromarray(pixels_HWC)
    image.thumbnail((SHOWN_PX, SHOWN_PX))
    return np.asarray(image)
