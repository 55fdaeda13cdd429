"""Whole images sorted into one folder a class, at any depth: `<class>/x.png`, `train/<class>/x.png`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ssl_pretrain.data.files import escape, scan
from ssl_pretrain.data.readers import LabelledImage, LabelledSet, classes_of, size_or_none, split_of

LAYOUT = "images in at least two folders named by their class"


def recognise(root: Path) -> bool:
    """Whether images lie in at least two folders of different names."""
    return len({_class(name) for name in scan([root]).names} - {""}) >= 2


def read(root: Path) -> LabelledSet:
    """Every image with the name of its folder; its box is the whole image."""
    problems: list[str] = []
    images: list[LabelledImage] = []
    for name in scan([root]).names:
        label = _class(name)
        if not label:
            problems.append(f"{escape(name)}: left out, it lies in no class folder")
            continue
        size_px = size_or_none(root / name, problems, name)
        if size_px is None:
            continue
        box_14 = np.array([[0, 0, *size_px]], np.float64)
        images.append(LabelledImage(root / name, size_px, box_14, (label,), escape(name), split_of(name)))
    classes = classes_of(images)
    found = f"{len(images)} images in folders of {len(classes)} classes"
    return LabelledSet("class_folder", found, "image", classes, tuple(images), tuple(problems))


def _class(name: str) -> str:
    """The parent folder's name, printable; empty for an image at the top."""
    return escape(name.rpartition("/")[0].rpartition("/")[2])
