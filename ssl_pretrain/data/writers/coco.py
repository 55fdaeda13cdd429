"""COCO JSON: `annotations/instances_<split>.json` and `images/<split>/`; without splits `instances.json`, `images/`.

Categories count from 1 in the order of the set's classes, images and annotations from 1 in each file. Outlines are
kept: polygons, or compressed runs. Images that share a group (patient, slide) say so in a key `group` of their own,
which `readers.coco` reads and others overlook. The layout: https://cocodataset.org/#format-data
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_pretrain.data.readers import LabelledSet
from ssl_pretrain.data.shapes import Mask, Polygon, Shape, text_of
from ssl_pretrain.data.writers import Placed, put


def write(labelled: LabelledSet, placed: Sequence[Placed], folder: Path) -> str:
    """One JSON a split; says how many objects and images they hold."""
    ids = {name: i for i, name in enumerate(labelled.classes, 1)}
    members = Counter(item.image.group for item in placed)
    shared = {group for group, count in members.items() if count > 1}
    splits = sorted({item.image.split for item in placed}, key=lambda split: split or "")
    said = []
    for split in splits:
        content = _content([item for item in placed if item.image.split == split], ids, shared)
        rest = "_unsplit" if len(splits) > 1 else ""
        name = f"instances_{split}.json" if split else f"instances{rest}.json"
        put(folder / "annotations" / name, json.dumps(content, separators=(",", ":")).encode())
        said.append(f"{name}: {len(content['annotations'])} objects in {len(content['images'])} images")
    return f"COCO, {len(ids)} classes, " + ", ".join(said)


def _content(placed: Sequence[Placed], ids: dict[str, int], shared: set[str]) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, item in enumerate(placed, 1):
        image, (width, height) = item.image, item.image.size_px
        entry = {"id": i, "file_name": item.name, "width": width, "height": height}
        images.append(entry | ({"group": image.group} if image.group in shared else {}))
        shapes = image.shapes or (None,) * len(image.labels)
        for corners, label, shape in zip(image.boxes_N4.tolist(), image.labels, shapes, strict=True):
            x0, y0, x1, y1 = corners
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": ids[label],
                    "bbox": [_plain(value) for value in (x0, y0, x1 - x0, y1 - y0)],
                    "area": _plain((x1 - x0) * (y1 - y0) if shape is None else area(shape)),
                    "iscrowd": 0,
                    "segmentation": _segmentation(shape, image.size_px),
                }
            )
    categories = [{"id": i, "name": name, "supercategory": ""} for name, i in ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def area(shape: Shape) -> float:
    """In square pixels: of a mask its pixels, of a polygon the sum of its rings'.

    >>> from ssl_pretrain.data.shapes import polygon
    >>> area(polygon([[0, 0, 4, 0, 0, 3]]))
    6.0
    """
    if isinstance(shape, Mask):
        return float(shape.runs_R[1::2].sum())
    total = 0.0
    for ring_P2 in shape.rings:
        x_P, y_P = (ring_P2 - ring_P2[0]).T
        total += abs(float(x_P @ np.roll(y_P, -1) - y_P @ np.roll(x_P, -1))) / 2
    return total


def _segmentation(shape: Shape | None, size_px: tuple[int, int]) -> Any:
    if isinstance(shape, Polygon):
        inside = [np.clip(ring_P2, 0, size_px) for ring_P2 in shape.rings]
        return [[_plain(value) for value in ring_P2.ravel().tolist()] for ring_P2 in inside]
    return [] if shape is None else {"size": list(shape.size_hw), "counts": text_of(shape)}


def _plain(value: float) -> float | int:
    """Whole pixels without a point: half the file."""
    return int(value) if value.is_integer() else value
