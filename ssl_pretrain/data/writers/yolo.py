"""YOLO: `images/<split>/`, `labels/<split>/x.txt` and `data.yaml`; without splits `images/` and `labels/`.

Outlines are written when every object has one that is a single ring and lies in its box; else all objects are boxes,
because trainers drop files that mix the two. An image without objects has an empty file. No split is invented: a set
without one gets a `data.yaml` whose `train` and `val` are for the user to fill in.
Layout: https://docs.ultralytics.com/datasets/detect/
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from ssl_pretrain.data.readers import SPLITS, LabelledImage, LabelledSet
from ssl_pretrain.data.shapes import Polygon, Shape, box
from ssl_pretrain.data.writers import Placed, put

_AGREE_PX = 0.5


def write(labelled: LabelledSet, placed: Sequence[Placed], folder: Path) -> str:
    """One text file an image; says how many objects there are, and which outlines have no place in them."""
    ids = {name: i for i, name in enumerate(labelled.classes)}
    outlines = all(_ring(image, i) is not None for image in labelled.images for i in range(len(image.labels)))
    for item in placed:
        lines = [_line(item.image, i, ids, outlines) for i in range(len(item.image.labels))]
        path = folder / item.folder.replace("images", "labels", 1) / (item.name.rpartition(".")[0] + ".txt")
        put(path, "".join(f"{line}\n" for line in lines).encode())
    splits = [split for split in SPLITS if any(item.image.split == split for item in placed)]
    put(folder / "data.yaml", _yaml(splits, ids).encode())
    count = sum(len(item.image.labels) for item in placed)
    said = f"YOLO, {len(ids)} classes, {count} {'outlines' if outlines else 'boxes'} in {len(placed)} images"
    dropped = 0 if outlines else sum(shape is not None for item in placed for shape in item.image.shapes)
    if dropped:
        said += f"; {dropped} outlines are not written: not every object has one, or one that a line can hold"
    alone = sum(item.image.split is None for item in placed)
    if alone:
        said += f"; {alone} images are in no split: data.yaml needs their folders before training"
    if len({item.image.group for item in placed}) < len(placed):
        said += "; which images belong together (patient, slide) has no place in this format"
    return said


def _yaml(splits: Sequence[str], ids: dict[str, int]) -> str:
    lines = [f"{split}: images/{split}\n" for split in splits]
    if not splits:
        lines = ["# No split is known: part the images and add `train:` and `val:` with their folders.\n"]
    names = {i: name for name, i in ids.items()}
    return "".join(lines) + yaml.safe_dump({"nc": len(names), "names": names}, sort_keys=False, allow_unicode=True)


def _ring(image: LabelledImage, i: int) -> np.ndarray | None:
    """The outline of an object, (P, 2) in pixels inside the image, when it has one ring that fills its box."""
    shape: Shape | None = image.shapes[i] if image.shapes else None
    if not isinstance(shape, Polygon) or len(shape.rings) != 1:
        return None
    ring_P2 = np.clip(shape.rings[0], 0, image.size_px)
    agrees = np.abs(np.array(box(Polygon((ring_P2,)))) - image.boxes_N4[i]).max() <= _AGREE_PX
    return ring_P2 if agrees else None


def _line(image: LabelledImage, i: int, ids: dict[str, int], outlines: bool) -> str:
    ring_P2 = _ring(image, i) if outlines else None
    if ring_P2 is not None:
        values = (ring_P2 / image.size_px).ravel().tolist()
    else:
        x0, y0, x1, y1 = image.boxes_N4[i].tolist()
        width, height = image.size_px
        values = [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]
    return " ".join([str(ids[image.labels[i]]), *(f"{value:.8f}" for value in values)])
