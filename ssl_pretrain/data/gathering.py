"""What every reader does with what it finds in label files: check, count, say.

Shapes: N objects of an image.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from ssl_pretrain.data.files import escape
from ssl_pretrain.data.lookup import folder_groups
from ssl_pretrain.data.readers import SPLITS, LabelledImage, LabelledSet, classes_of, split_of
from ssl_pretrain.data.shapes import Shape

MAX_LINE = 500
"""Characters of a problem: names in label files can be of any length."""
OBJECT = {"box": "boxes", "point": "points", "image": "images"}


class Objects:
    """The objects of one image, as they come out of its label file."""

    def __init__(self, gathering: Gathering, size_px: tuple[int, int]) -> None:
        self.gathering = gathering
        self.size_px = size_px
        self.boxes: list[tuple[float, float, float, float]] = []
        self.labels: list[str] = []
        self.shapes: list[Shape | None] = []

    def box(
        self, where: str, label: str, x0: float, y0: float, x1: float, y1: float, shape: Shape | None = None
    ) -> None:
        """Takes a box, clipped to the image, or says why not. `where` says which object of which file it is."""
        gathering, (width, height) = self.gathering, self.size_px
        label = escape(label.strip())
        gathering.annotated[label] += 1
        left_out = f"{where} ({label or 'without a name'}) left out"
        inside = (min(max(x0, 0), width), min(max(y0, 0), height), min(max(x1, 0), width), min(max(y1, 0), height))
        if not label:
            gathering.problems.append(f"{left_out}, it has no class")
        elif not np.isfinite([x0, y0, x1, y1]).all():
            gathering.problems.append(f"{left_out}, malformed box")
        elif x1 < x0 or y1 < y0:
            gathering.problems.append(f"{left_out}, its corners are swapped")
        elif x1 == x0 or y1 == y0:
            gathering.problems.append(f"{left_out}, zero-size box at ({x0:g}, {y0:g})")
        elif inside[0] >= inside[2] or inside[1] >= inside[3]:
            gathering.problems.append(f"{left_out}, its box is outside the image")
        else:
            gathering.clipped += inside != (x0, y0, x1, y1)
            self._add(inside, label, shape)

    def point(self, where: str, label: str, x: float, y: float) -> None:
        """Takes a point in the image, or says why not."""
        label = escape(label.strip())
        self.gathering.annotated[label] += 1
        left_out = f"{where} ({label or 'without a name'}) left out"
        if not label:
            self.gathering.problems.append(f"{left_out}, it has no class")
        elif not (0 <= x <= self.size_px[0] and 0 <= y <= self.size_px[1]):
            self.gathering.problems.append(f"{left_out}, it is at ({x:g}, {y:g}), outside the image")
        else:
            self._add((x, y, x, y), label, None)

    def whole(self, label: str) -> None:
        """The class of the image itself."""
        label = escape(label.strip())
        self.gathering.annotated[label] += 1
        if label:
            self._add((0, 0, *self.size_px), label, None)
        else:
            self.gathering.problems.append("an image left out, its class has no name")

    def lost(self, where: str, label: str, why: str) -> None:
        """An object that cannot be read; it counts all the same."""
        label = escape(label.strip())
        self.gathering.annotated[label] += 1
        self.gathering.problems.append(f"{where} ({label or 'without a name'}) left out, {why}")

    def _add(self, box: tuple[float, float, float, float], label: str, shape: Shape | None) -> None:
        self.boxes.append(box)
        self.labels.append(label)
        self.shapes.append(shape)


class Gathering:
    """The images of one labelled set while it is read."""

    def __init__(self, format: str, kind: Literal["box", "point", "image"]) -> None:
        self.format = format
        self.kind: Literal["box", "point", "image"] = kind
        self.problems: list[str] = []
        self.annotated: Counter[str] = Counter()
        self.clipped = 0
        self.images: list[LabelledImage] = []
        self._alone = set[str]()
        """Groups of images that are each their own."""

    def objects(self, size_px: tuple[int, int]) -> Objects:
        """What the objects of the next image are told to; `size_px` is its width and height."""
        return Objects(self, size_px)

    def add(
        self, path: Path, name: str, objects: Objects, *, group: str | None = None, split: str | None = None
    ) -> None:
        """The image is done. `name` is its path in the data set, of which group and split come unless given."""
        if group is None:
            self._alone.add(escape(name))
        self.images.append(
            LabelledImage(
                path,
                objects.size_px,
                np.array(objects.boxes, np.float64).reshape(-1, 4),
                tuple(objects.labels),
                escape(name) if group is None else escape(group),
                split or split_of(name),
                tuple(objects.shapes) if any(shape is not None for shape in objects.shapes) else (),
            )
        )

    def group_by_folder(self) -> list[str]:
        """Gives the images that have no group the one that their place or name tells; returns lines on why.

        Of labelled images alone: folders of unlabelled ones beside them say nothing about these.
        """
        groups, notes = folder_groups([image.group for image in self.images if image.group in self._alone])
        self.images = [replace(image, group=groups.get(image.group, image.group)) for image in self.images]
        return notes

    def done(self, found: str | None = None) -> LabelledSet:
        """The labelled set; `found` replaces the usual sentence."""
        if self.clipped:
            self.problems.append(f"{self.clipped} boxes reached over the edge of their image and were clipped")
        self.problems = [line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}..." for line in self.problems]
        classes = classes_of(self.images)
        if found is None:
            found = self._found(len(classes))
        return LabelledSet(
            self.format, found, self.kind, classes, tuple(self.images), tuple(self.problems), dict(+self.annotated)
        )

    def _found(self, classes: int) -> str:
        count, usable = self.annotated.total(), sum(len(image.labels) for image in self.images)
        sizes = {split: sum(image.split == split for image in self.images) for split in SPLITS}
        splits = ", ".join(f"{split} {size}" for split, size in sizes.items() if size)
        left = f", {count - usable} of them left out" if count != usable else ""
        images = f"{len(self.images)} images" + (f" ({splits})" if splits else "")
        return f"{count} {OBJECT[self.kind]} of {classes} classes in {images}{left}"
