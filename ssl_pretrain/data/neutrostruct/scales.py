"""Step 1: how many pixels a micrometre has, for each image, from a table made by hand (ImageJ) or from scale bars.

The README asks for micrometres per pixel, and the data set's own table has pixels per micrometre, in a column
`Pixles per microm`. So the direction is read from the name of the column, and checked against what microscopes can do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ssl_pretrain.data.files import escape
from ssl_pretrain.data.neutrostruct import tables
from ssl_pretrain.data.neutrostruct.naming import shown
from ssl_pretrain.data.readers import number
from ssl_pretrain.errors import DataError

PLAUSIBLE = 1.0, 1_000_000.0
"""Pixels per micrometre: no micrograph has pixels wider than a micrometre or narrower than a picometre."""
Kind = Literal["px/um", "um/px", "nm/px", "bar px", "bar um", "bar nm"]

_PX = r"(?:px|pixels?|pixles?)"
_UM = r"(?:um|microm|microns?|micrometers?|micrometres?)"
_NM = r"(?:nm|nanometers?|nanometres?)"
_PATTERNS: tuple[tuple[Kind, str], ...] = (
    ("px/um", rf"\b{_PX} ?(?:per|/) ?{_UM}\b"),
    ("um/px", rf"\b{_UM} ?(?:per|/) ?{_PX}\b|\bpixel size {_UM}\b"),
    ("nm/px", rf"\b{_NM} ?(?:per|/) ?{_PX}\b|\bpixel size {_NM}\b"),
    ("bar px", rf"^(?:scale ?)?(?:bar )?(?:length )?(?:in )?{_PX}$"),
    ("bar um", rf"^(?:scale ?)?(?:bar )?(?:length )?(?:in )?{_UM}$"),
    ("bar nm", rf"^(?:scale ?)?(?:bar )?(?:length )?(?:in )?{_NM}$"),
)
_ACCEPTED = "pixels_per_um, um_per_pixel, or bar_px with bar_um (or nm)"


@dataclass(frozen=True)
class Scales:
    """Pixels per micrometre, by image name as the table spells it."""

    pixels_per_um: dict[str, float]
    said: str
    """A sentence on what was read, and in which direction."""
    problems: tuple[str, ...]
    """One line each, on rows that were left out."""


def kind_of(title: str) -> Kind | None:
    """What a column holds, by its name; None for a name that does not say.

    >>> [kind_of(title) for title in ("Pixles per microm", "µm/px", "bar_px", "scale bar (nm)", "scale", "px_um")]
    ['px/um', 'um/px', 'bar px', 'bar nm', None, None]
    """
    words = re.sub(r"[\s_()\[\]-]+", " ", title.casefold().replace("μ", "u").replace("µ", "u")).strip()
    return next((kind for kind, pattern in _PATTERNS if re.search(pattern, words)), None)


def pixels_per_um(kind: Kind, value: float, bar_px: float = 0.0) -> float:
    """Pixels per micrometre from a cell; for a bar, `value` is its length in um or nm, and `bar_px` that in pixels.

    A bar of 500 nm that is 186 px long:

    >>> pixels_per_um("bar nm", 500, bar_px=186)
    372.0
    """
    if kind == "px/um":
        return value
    if kind in ("um/px", "nm/px"):
        return (1 if kind == "um/px" else 1000) / value
    return bar_px / value * (1 if kind == "bar um" else 1000)


def read(path: Path, column: str | None = None) -> Scales:
    """The scales in a .csv or .xlsx; `column` picks one where several say it.

    Raises `DataError` where no column, or more than one, says the scale, and where the values fit the other direction.
    """
    name = escape(path.name)
    table = tables.read(path)
    image_at = tables.image_column(table, name)
    kind, value_at, bar_at = _columns(table.header, name, column)
    values: dict[str, list[float]] = {}
    problems: list[str] = []
    odd: list[float] = []
    for i, row in enumerate(table.rows, 2):
        image = row[image_at]
        try:
            if not image:
                raise ValueError
            value, bar_px = number(row[value_at]), number(row[bar_at]) if bar_at is not None else 1.0
            if value <= 0 or bar_px <= 0:
                raise ValueError
        except ValueError:
            problems.append(f"{name}: row {i} left out, it has no image name or no positive number")
            continue
        scale = pixels_per_um(kind, value, bar_px)
        if PLAUSIBLE[0] <= scale <= PLAUSIBLE[1]:
            values.setdefault(image, []).append(scale)
        else:
            odd.append(value)
            problems.append(f"{name}: row {i} ({escape(image)}) left out, {scale:g} px a micrometre cannot be")
    title = escape(table.header[value_at])
    if len(odd) > len(values):
        raise DataError(
            f"{name}: {title!r} was read as {_said(kind)}, but {odd[0]:g} cannot be that: "
            "name the column by what it holds"
        )
    twice = sorted(image for image, found in values.items() if len(set(found)) > 1)
    if twice:
        problems.append(f"{name}: left out, images with two scales: {shown(twice, len(twice))}")
    kept = {image: found[0] for image, found in values.items() if image not in twice}
    if not kept:
        raise DataError(f"{name} has no scale that can be used (first of {len(problems)} problems: {problems[0]})")
    return Scales(kept, f"{len(kept)} scales, column {title!r} read as {_said(kind)}", tuple(problems))


def _said(kind: Kind) -> str:
    words: dict[Kind, str] = {"px/um": "pixels per micrometre", "um/px": "micrometres per pixel"}
    return words.get(kind, "nanometres per pixel" if kind == "nm/px" else "length of a scale bar")


def _columns(header: list[str], name: str, column: str | None) -> tuple[Kind, int, int | None]:
    """(kind, column of the value, column of the bar's pixels if it is a bar)."""
    kinds = {i: kind for i, title in enumerate(header) if (kind := kind_of(title)) is not None}
    if column is not None:
        if header.count(column) != 1:
            raise DataError(f"{name} has no single column {escape(column)}")
        kinds = {i: kind for i, kind in kinds.items() if header[i] == column or kind == "bar px"}
        if "bar" not in kinds.get(header.index(column), ""):
            kinds = {i: kind for i, kind in kinds.items() if kind != "bar px"}
    ratios = [i for i, kind in kinds.items() if "/" in kind]
    bars = [i for i, kind in kinds.items() if kind in ("bar um", "bar nm")]
    bar_px = [i for i, kind in kinds.items() if kind == "bar px"]
    if len(ratios) == 1 and not (bars and bar_px):
        return kinds[ratios[0]], ratios[0], None
    if not ratios and len(bars) == len(bar_px) == 1:
        return kinds[bars[0]], bars[0], bar_px[0]
    listed = ", ".join(escape(title) or "(no name)" for title in header)
    why = (
        "more than one column says the scale"
        if ratios or (bars and bar_px)
        else "no column says which way the scale goes"
    )
    raise DataError(f"{name}: {why}; it has {listed}; name one {_ACCEPTED}")
