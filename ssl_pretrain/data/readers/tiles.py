"""Tiles of slides: `<class>/<slide>/<row>_<column>.jpg` (CSD), also below `train/`, `val/` or `test/`.

Each tile has the class of its slide, and the tiles of a slide are one group.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from ssl_pretrain.data.files import SUFFIXES, escape, scan
from ssl_pretrain.data.gathering import Gathering
from ssl_pretrain.data.lookup import peek
from ssl_pretrain.data.readers import LabelledSet, size_or_none, split_of

LAYOUT = "<class>/<slide>/<row>_<column>.jpg, tiles of slides"
_TILE = re.compile(r"([^/]+)/([^/]+)/[0-9]+_[0-9]+\.[^/.]+")


def recognise(root: Path) -> bool:
    """Whether there are tiles of at least two classes, all images are tiles, and no slide is in two classes."""
    names = [name for name in peek(root, 3) if os.path.splitext(name)[1].lower() in SUFFIXES]
    places = [_place(name) for name in names]
    found = [place for place in places if place is not None]
    return len(found) == len(names) and len({label for label, _ in found}) >= 2 and not _in_two_classes(found)


def read(root: Path) -> LabelledSet:
    """Every tile with the class of its slide; its box is the whole tile."""
    gathering = Gathering("tiles", "image")
    names = scan([root]).names
    places = {name: place for name in names if (place := _place(name)) is not None}
    both = _in_two_classes(places.values())
    gathering.problems += [f"slide {escape(slide)}: in two classes" for slide in sorted(both)]
    slides: set[str] = set()
    for name in names:
        if name not in places:
            gathering.problems.append(f"{escape(name)}: left out, it is not {LAYOUT}")
            continue
        size_px = size_or_none(root / name, gathering.problems, name)
        if size_px is None:
            continue
        label, slide = places[name]
        objects = gathering.objects(size_px)
        objects.whole(label)
        gathering.add(root / name, name, objects, group=slide)
        slides.add(slide)
    classes = len(gathering.annotated)
    return gathering.done(
        f"{len(gathering.images)} tiles of {len(slides)} slides of {classes} classes, grouped by slide"
    )


def _place(name: str) -> tuple[str, str] | None:
    """Class and slide of a tile."""
    match = _TILE.fullmatch(name if split_of(name) is None else name.partition("/")[2])
    if match is None or match[2].lower() == "cropped" or split_of(f"{match[1]}/x") is not None:
        return None  # SIPaKMeD's cut-out cells have such names too; train/<class>/1_2.jpg are no slides
    return match[1], match[2]


def _in_two_classes(places: Iterable[tuple[str, str]]) -> set[str]:
    """Slides that would have two classes: then the folders mean something else."""
    class_of: dict[str, str] = {}
    return {slide for label, slide in places if class_of.setdefault(slide, label) != label}
