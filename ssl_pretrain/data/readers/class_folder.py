"""Whole images sorted into one folder a class, at any depth: `<class>/x.png`, `train/<class>/x.png`."""

from __future__ import annotations

from pathlib import Path

from ssl_pretrain.data.files import escape, scan
from ssl_pretrain.data.gathering import Gathering
from ssl_pretrain.data.readers import LabelledSet, size_or_none

LAYOUT = "images in at least two folders named by their class"


def recognise(root: Path) -> bool:
    """Whether images lie in at least two folders of different names."""
    return len({_class(name) for name in scan([root]).names} - {""}) >= 2


def read(root: Path) -> LabelledSet:
    """Every image with the name of its folder; its box is the whole image."""
    gathering = Gathering("class_folder", "image")
    for name in scan([root]).names:
        label = _class(name)
        if not label:
            gathering.problems.append(f"{escape(name)}: left out, it lies in no class folder")
            continue
        size_px = size_or_none(root / name, gathering.problems, name)
        if size_px is None:
            continue
        objects = gathering.objects(size_px)
        objects.whole(label)
        gathering.add(root / name, name, objects)
    return gathering.done(f"{len(gathering.images)} images in folders of {len(gathering.annotated)} classes")


def _class(name: str) -> str:
    """The parent folder's name; empty for an image at the top."""
    return name.rpartition("/")[0].rpartition("/")[2]
