"""Labelled images in the formats that people have. One file a format, found by looking at the folder.

A format's module has `LAYOUT` (a few words on what it looks for), `recognise(root) -> bool` and
`read(root) -> LabelledSet`. What cannot be used is left out and said in `problems`; nothing is repaired in silence,
and `annotated` counts it nevertheless. `data.gathering` has what all of them need.

Shapes: N objects of an image.
"""

from __future__ import annotations

import math
import pkgutil
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ssl_pretrain.data.decode import header_size
from ssl_pretrain.data.files import Rejected, escape, scan
from ssl_pretrain.data.shapes import Shape
from ssl_pretrain.errors import DataError
from ssl_pretrain.named import named, names

__path__ = pkgutil.extend_path(__path__, __name__)

KIND = "data.readers"
FALLBACK = "class_folder"
"""Any tree of images looks like class folders, so that format is asked when no other one answers."""
SPLITS = ("train", "val", "test")
SPLIT_WORDS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""What folders and lists call them."""


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """One image and its objects."""

    path: Path
    size_px: tuple[int, int]
    """Width and height, upright."""
    boxes_N4: NDArray[np.float64]
    """x0, y0, x1, y1 in pixels, inside the image; a point is a box without size."""
    labels: tuple[str, ...]
    """The class of each box."""
    group: str
    """Images of one group are not told apart by a split; an image alone is its own group."""
    split: str | None
    """`train`, `val` or `test` where the data set says so."""
    shapes: tuple[Shape | None, ...] = ()
    """The outline of each box; empty where the format has none."""


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """A labelled data set."""

    format: str
    """The name of the reader."""
    found: str
    """A sentence on what was found."""
    kind: Literal["box", "point", "image"]
    classes: tuple[str, ...]
    """Sorted, numbers by value."""
    images: tuple[LabelledImage, ...]
    problems: tuple[str, ...]
    """One line each, on what was left out or looks wrong."""
    annotated: Mapping[str, int] = field(default_factory=dict)
    """How many objects of each class the label files have, those that were left out too."""


def read(root: Path, format: str | None = None) -> LabelledSet:
    """Reads the labelled images under `root`; the format is recognised unless it is named.

    `root` may also be a label file, for formats that have one for all images: so one of several is chosen.
    Raises `DataError` when no format fits, when two do, and when there are images without labels or labels without
    images; `UsageError` for a format that does not exist.
    """
    if not root.exists():
        raise DataError(f"there is no folder {escape(str(root))}: check the path of the labelled images")
    if format is not None:
        return _checked(root, named(KIND, format).read(root))
    known = names(KIND)
    fitting = [name for name in known if name != FALLBACK and named(KIND, name).recognise(root)]
    if not fitting and FALLBACK in known and named(KIND, FALLBACK).recognise(root):
        fitting = [FALLBACK]
    if not fitting:
        layouts = "; ".join(f"{name}: {named(KIND, name).LAYOUT}" for name in known)
        holds = f", which holds {len(scan([root]).names)} images" if root.is_dir() else ""
        raise DataError(f"no labels found in {escape(str(root))}{holds}; looked for {layouts}")
    if len(fitting) > 1:
        like = " and ".join(fitting)
        raise DataError(
            f"{escape(str(root))} looks like {like}: name the format that is meant (--format), or give the label file"
        )
    return _checked(root, named(KIND, fitting[0]).read(root))


def _checked(root: Path, labelled: LabelledSet) -> LabelledSet:
    """Refuses a set without a single usable object, with the first problem as the likely reason."""
    if any(image.labels for image in labelled.images):
        return labelled
    why = f" (first of {len(labelled.problems)} problems: {labelled.problems[0]})" if labelled.problems else ""
    raise DataError(f"{escape(str(root))}: {labelled.found}, but no labelled object that can be used{why}")


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key that puts `2` before `10` and `stage 9` before `stage 10`.

    >>> sorted(["10", "2", "b", "a10", "a9"], key=natural)
    ['2', '10', 'a9', 'a10', 'b']
    """
    parts = re.split(r"([0-9]+)", name)
    # by length and digits and not as a number, since a class may be called by thousands of digits
    return tuple(
        (0, len(digits := part.lstrip("0")), digits) if i % 2 else (1, 0, part) for i, part in enumerate(parts) if part
    )


def classes_of(images: Sequence[LabelledImage]) -> tuple[str, ...]:
    """All labels, once, sorted, numbers by value."""
    return tuple(sorted({label for image in images for label in image.labels}, key=natural))


def size_or_none(path: Path, problems: list[str], name: str) -> tuple[int, int] | None:
    """(width, height) of the image; None, and a problem, when it cannot be used."""
    try:
        return header_size(path)
    except Rejected as why:
        problems.append(f"{escape(name)}: image left out, {why.reason} ({why.detail})")
        return None


def number(text: str | None) -> float:
    """A finite number; raises `ValueError` for anything else (`nan`, `1_000`, nothing)."""
    if text is None or "_" in text:
        raise ValueError("not a number")
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("not a finite number")
    return value


def stays_inside(name: str) -> bool:
    """Whether a file name that labels give leads nowhere but down from its folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    drive = re.match(r"[A-Za-z]:", name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\0" not in name and drive is None


def split_of(name: str) -> str | None:
    """The split that the first folder of a relative path names, if it does.

    >>> split_of("Valid/a.png"), split_of("images/a.png")
    ('val', None)
    """
    first, _, rest = name.partition("/")
    return SPLIT_WORDS.get(first.lower()) if rest else None
