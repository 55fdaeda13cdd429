"""Label images beside their images, where each number is an object: `000_img.png` with `000_masks.png` (Cellpose).

Also `x.png` with `x_masks.png` or `x_cp_masks.png`, which Cellpose itself writes. The format has no classes: all are
`object`. `_seg.npy` files are pickles and are never opened.
"""

from __future__ import annotations

import re
from pathlib import Path

from ssl_pretrain.data.files import Rejected, escape, scan
from ssl_pretrain.data.gathering import Gathering, Objects
from ssl_pretrain.data.label_images import NAMELESS, objects_by_number, read_labels
from ssl_pretrain.data.lookup import peek
from ssl_pretrain.data.readers import LabelledSet, size_or_none
from ssl_pretrain.data.shapes import box
from ssl_pretrain.errors import DataError

LAYOUT = "<name>_img.png with <name>_masks.png (or <name>.png with <name>_masks.png), numbers as objects"
_MASKS = re.compile(r"(.*?)(?:_cp)?_masks\.(?:png|tif|tiff|bmp|gif)", re.IGNORECASE)


def recognise(root: Path) -> bool:
    """Whether an image lies beside a label image of its name, at most one folder down."""
    names = peek(root, 1)
    stems = {_stem(name) for name in names if _MASKS.fullmatch(name) is None}
    bases = [match[1] for match in map(_MASKS.fullmatch, names) if match]
    return any(f"{base}_img" in stems or base in stems for base in bases)


def read(root: Path) -> LabelledSet:
    """All images that have a label image; the box of an object encloses its pixels."""
    gathering = Gathering("instance_masks", "box")
    names = scan([root]).names
    masks: dict[str, str] = {}
    for name in names:
        match = _MASKS.fullmatch(name)
        if match and masks.setdefault(match[1], name) != name:
            gathering.problems.append(f"{escape(name)}: left out, {escape(masks[match[1]])} has the same image")
    images = [name for name in names if _MASKS.fullmatch(name) is None]
    if not masks or not images:
        raise DataError(f"{escape(str(root))} has {len(images)} images and {len(masks)} label images: {LAYOUT}")
    used: dict[str, str] = {}
    # `x_img` is an image by its own word, so it goes before an `x` of the same label image
    for name in sorted(images, key=lambda name: not _stem(name).endswith("_img")):
        base = re.sub("_img$", "", _stem(name))
        mask = masks.get(base) or masks.get(_stem(name))
        if mask is None:
            gathering.problems.append(f"{escape(name)}: left out, missing label image (unlabelled)")
        elif mask in used:
            gathering.problems.append(f"{escape(name)}: left out, {escape(used[mask])} has the same label image")
        else:
            used[mask] = name
            _image(root, name, mask, gathering)
    gathering.problems += [
        f"{escape(mask)}: a label image without an image (missing image)" for mask in masks.values() if mask not in used
    ]
    gathering.images.sort(key=lambda image: image.path)
    count = gathering.annotated.total()
    return gathering.done(
        f"{count} objects in {len(gathering.images)} images, a number each in label images; "
        f"the format has no classes, so all are {NAMELESS!r}"
    )


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _image(root: Path, name: str, mask: str, gathering: Gathering) -> None:
    size_px = size_or_none(root / name, gathering.problems, name)
    if size_px is None:
        return
    objects = gathering.objects(size_px)
    if _objects(root / mask, mask, objects):
        gathering.add(root / name, name, objects)


def _objects(path: Path, name: str, objects: Objects) -> bool:
    """Whether the label image could be read; its objects are in `objects` then."""
    problems = objects.gathering.problems
    try:
        values_HW = read_labels(path)
        if values_HW.shape != objects.size_px[::-1]:
            size = f"{values_HW.shape[1]} x {values_HW.shape[0]} px"
            image = f"{objects.size_px[0]} x {objects.size_px[1]}"
            problems.append(f"{escape(name)}: left out with its image, the label image is {size}, the image {image}")
            return False
        found = objects_by_number(values_HW)
    except Rejected as why:
        problems.append(f"{escape(name)}: left out with its image, {why.reason} ({why.detail})")
        return False
    for number, mask in found:
        objects.box(f"{escape(name)}: object {number}", NAMELESS, *box(mask), mask)
    return True
