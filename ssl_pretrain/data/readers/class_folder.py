"""Whole images by class: in one folder a class, at any depth, or in one folder with the class before their numbers.

<class>/x.png, train/<class>/x.png      the class is the folder
<class>/0001-1000/x.png                 a folder of a block of numbers is none, so the class is the one above
B_1.png, B_2.png, M_1.png, M_2.png      the class is what stands before the first `_` or digit
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from ssl_pretrain.data.files import escape, scan
from ssl_pretrain.data.gathering import Gathering
from ssl_pretrain.data.readers import LabelledSet, size_or_none, split_of

LAYOUT = "images in at least two folders named by their class, or in one folder as <class>_<number>"
MAX_PREFIXES = 50
WORDS = frozenset(
    "img image images dsc dscn dscf pic picture photo scan frame field slide sample cell crop tile patch patient case "
    "id plane stack train val valid test".split()
)
"""What cameras and people write before a number, and what is no class."""
_BLOCK = re.compile(r"[0-9]+-[0-9]+")
_PREFIX = re.compile(r"([A-Za-z]+)[ -]?\(?[_0-9].*")


def recognise(root: Path) -> bool:
    """Whether images lie in at least two folders of different names, or all have a class before their number."""
    names = scan([root]).names
    return _in_folders(names) or _have_prefixes(names)


def read(root: Path) -> LabelledSet:
    """Every image with its class; its box is the whole image."""
    gathering = Gathering("class_folder", "image")
    names = scan([root]).names
    by_prefix = not _in_folders(names) and _have_prefixes(names)
    class_of: Callable[[str], str] = _prefix if by_prefix else _class
    for name in names:
        label = class_of(name)
        if not label:
            gathering.problems.append(f"{escape(name)}: left out, it lies in no class folder")
            continue
        size_px = size_or_none(root / name, gathering.problems, name)
        if size_px is None:
            continue
        objects = gathering.objects(size_px)
        objects.whole(label)
        gathering.add(root / name, name, objects)
    count, classes = len(gathering.images), len(gathering.annotated)
    if by_prefix:
        shown = ", ".join(sorted(gathering.annotated))
        return gathering.done(f"{count} images of {classes} classes, taken from the start of their names: {shown}")
    return gathering.done(f"{count} images in folders of {classes} classes")


def _in_folders(names: Sequence[str]) -> bool:
    return len({_class(name) for name in names} - {""}) >= 2


def _class(name: str) -> str:
    """The nearest folder's name that is no block of numbers; empty for an image at the top, or in a split's folder."""
    folders = name.split("/")[:-1]
    if split_of(name) is not None:
        folders = folders[1:]
    while folders and _BLOCK.fullmatch(folders[-1]):
        folders.pop()
    return folders[-1] if folders else ""


def _have_prefixes(names: Sequence[str]) -> bool:
    """Whether all images lie at the top, or in folders of splits, and each class has at least two of them."""
    counts = Counter(_prefix(name) for name in names)
    flat = all("/" not in (name if split_of(name) is None else name.partition("/")[2]) for name in names)
    return (
        flat
        and 2 <= len(counts) <= MAX_PREFIXES
        and min(counts.values()) >= 2
        and not {prefix.lower() for prefix in counts} & (WORDS | {""})
    )


def _prefix(name: str) -> str:
    """What stands before the first `_` or digit of a file name; empty where that is not letters alone."""
    match = _PREFIX.fullmatch(name.rpartition("/")[2].rpartition(".")[0])
    return match[1] if match else ""
