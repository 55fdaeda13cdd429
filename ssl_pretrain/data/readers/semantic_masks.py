"""Images and masks of equal name: `images/a.jpg` with `masks/a.png`, where the value of a pixel is its class.

0 is the background. Classes are numbers, unless `labelmap.txt` (CVAT's `name:red,green,blue::` a line) names colours;
`background` there is no class. Each connected part of a class, at corners too, is one object. Images in several folders
below (CCAgT's slides) are grouped by folder. The two folders may lie up to two folders down (`train/img`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ssl_pretrain.data.files import Rejected, escape, read_bytes, scan
from ssl_pretrain.data.gathering import Gathering, Objects
from ssl_pretrain.data.label_images import is_colour, objects_by_touch, read_labels
from ssl_pretrain.data.readers import LabelledSet, size_or_none, split_of
from ssl_pretrain.data.shapes import box
from ssl_pretrain.errors import DataError

LAYOUT = "images/ and masks/ (or GroundTruth/, mult_mask/, SegmentationClass/) with files of equal names"
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "imgbmp", "jpegimages")
MASK_FOLDERS = ("masks", "mask", "groundtruth_mask", "mult_mask", "segmentationclass", "groundtruth", "bin_mask")
"""In the order in which one is taken; the others are named in the problems."""
MAX_CLASSES = 256
_MAX_LABELMAP_BYTES = 1 << 20
_DEPTH = 2
_LOOK_AT = 50
_BACKGROUND = "background"


class _Pair(NamedTuple):
    """A folder of images and the folder of their masks, relative to the root."""

    images: str
    masks: str
    unused: tuple[str, ...]


def recognise(root: Path) -> bool:
    """Whether one of the first images has a mask of its name in the folder beside."""
    for pair in _pairs(root, _LOOK_AT):
        if (root / pair.images).parent.joinpath("Annotations").is_dir():
            continue  # Pascal VOC's, whose masks are extra
        masks = _by_stem(scan([root / pair.masks]).names)
        if any(_stem(name) in masks for name in scan([root / pair.images]).names[:_LOOK_AT]):
            return True
    return False


def read(root: Path) -> LabelledSet:
    """All images that have a mask; the box of an object encloses its pixels."""
    gathering = Gathering("semantic_masks", "box")
    names_of = _labelmap(root)
    pairs = list(_pairs(root))
    if not pairs:
        raise DataError(f"{escape(str(root))} has no folder of masks beside a folder of images: {LAYOUT}")
    for pair in pairs:
        gathering.problems += [f"{escape(folder)}: left out, {escape(pair.masks)} is read" for folder in pair.unused]
        _folder(root, pair, names_of, gathering)
    count, folders = gathering.annotated.total(), ", ".join(escape(pair.masks) for pair in pairs)
    names = "named by labelmap.txt" if names_of else "numbers in the masks"
    return gathering.done(
        f"{count} connected parts of {len(gathering.annotated)} classes ({names}) in {len(gathering.images)} images, "
        f"masks in {folders}; objects of a class that touch are one"
    )


def _pairs(root: Path, most: int | None = None) -> Iterator[_Pair]:
    """Of the root and the folders below it, down to `_DEPTH`; of so many folders at most in each level."""
    folders = [("", root)]
    for _ in range(_DEPTH + 1):
        below: list[tuple[str, Path]] = []
        for name, path in folders:
            inside = _folders(path)
            by_lower = {folder.lower(): folder for folder in reversed(inside)}
            images = [by_lower[folder] for folder in IMAGE_FOLDERS if folder in by_lower]
            masks = [by_lower[folder] for folder in MASK_FOLDERS if folder in by_lower]
            if images and masks:
                yield _Pair(name + images[0], name + masks[0], tuple(name + folder for folder in masks[1:]))
            below += [(f"{name}{folder}/", path / folder) for folder in inside]
        folders = below[:most]


def _folders(path: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _by_stem(names: list[str]) -> dict[str, str]:
    """Masks by the stem of the image they belong to."""
    return {re.sub("_mask$", "", _stem(name)): name for name in names} | {_stem(name): name for name in names}


def _labelmap(root: Path) -> dict[int, str]:
    """Class names by colour, red * 65536 + green * 256 + blue; empty where no file names them."""
    path = root / "labelmap.txt"
    if not path.is_file():
        return {}
    try:
        lines = read_bytes(path, _MAX_LABELMAP_BYTES).decode("utf-8-sig").splitlines()
    except (Rejected, UnicodeDecodeError) as error:
        raise DataError(f"labelmap.txt cannot be read ({escape(str(error))})") from error
    names: dict[int, str] = {}
    for line in (line for line in lines if line.strip() and not line.startswith("#")):
        # from the right, as a name may have colons itself
        match = re.fullmatch(r"(.+?):(\d{1,3}),(\d{1,3}),(\d{1,3}):[^:]*:[^:]*", line.strip())
        if match is None or max(int(match[2]), int(match[3]), int(match[4])) > 255:
            raise DataError(f"labelmap.txt: {escape(line[:80])} is not `name:red,green,blue::`")
        colour = (int(match[2]) << 16) + (int(match[3]) << 8) + int(match[4])
        if names.setdefault(colour, match[1].strip()) != match[1].strip():
            raise DataError(f"labelmap.txt: {escape(match[1])} has the colour of {escape(names[colour])}")
    return names


def _folder(root: Path, pair: _Pair, names_of: Mapping[int, str], gathering: Gathering) -> None:
    names, all_masks = scan([root / pair.images]).names, scan([root / pair.masks]).names
    masks = _by_stem(all_masks)
    used: dict[str, str] = {}
    several = len({name.rpartition("/")[0] for name in names}) > 1
    for name in names:
        full, mask = f"{pair.images}/{name}", masks.get(_stem(name))
        if mask is None:
            gathering.problems.append(f"{escape(full)}: left out, missing mask (unlabelled)")
            continue
        if mask in used:
            gathering.problems.append(f"{escape(full)}: left out, {escape(used[mask])} has the same mask")
            continue
        used[mask] = full
        size_px = size_or_none(root / full, gathering.problems, full)
        if size_px is None:
            continue
        objects = gathering.objects(size_px)
        if not _objects(root / pair.masks / mask, f"{pair.masks}/{mask}", names_of, objects):
            continue
        group = full.rpartition("/")[0] if several and "/" in name else full
        gathering.add(root / full, full, objects, group=group, split=_split(full))
    gathering.problems += [
        f"{escape(pair.masks)}/{escape(mask)}: a mask without an image of its own (missing image)"
        for mask in all_masks
        if mask not in used
    ]


def _split(name: str) -> str | None:
    """The split that any folder of the path names."""
    found = (split_of(f"{part}/x") for part in name.split("/")[:-1])
    return next((split for split in found if split is not None), None)


def _objects(path: Path, name: str, names_of: Mapping[int, str], objects: Objects) -> bool:
    """Whether the mask could be read; its parts are in `objects` then."""
    problems = objects.gathering.problems
    try:
        if not names_of and is_colour(path):
            problems.append(f"{escape(name)}: left out with its image, colours without a labelmap.txt that names them")
            return False
        values_HW = read_labels(path, colours=bool(names_of))
        if values_HW.shape != objects.size_px[::-1]:
            size = f"{values_HW.shape[1]} x {values_HW.shape[0]} px"
            image = f"{objects.size_px[0]} x {objects.size_px[1]}"
            problems.append(f"{escape(name)}: left out with its image, the mask is {size}, the image {image}")
            return False
        background = next((colour for colour, label in names_of.items() if label.lower() == _BACKGROUND), 0)
        parts = objects_by_touch(values_HW, background)
    except Rejected as why:
        problems.append(f"{escape(name)}: left out with its image, {why.reason} ({why.detail})")
        return False
    if len({value for value, _ in parts}) > MAX_CLASSES:
        problems.append(f"{escape(name)}: left out with its image, more than {MAX_CLASSES} values are not classes")
        return False
    unknown: Counter[int] = Counter()
    for i, (value, mask) in enumerate(parts, 1):
        if names_of and value not in names_of:
            unknown[value] += int(mask.runs_R[1::2].sum())
            continue
        label = names_of[value] if names_of else str(value)
        objects.box(f"{escape(name)}: part {i}", label, *box(mask), mask)
    for colour, count in sorted(unknown.items()):
        rgb = f"{colour >> 16},{colour >> 8 & 255},{colour & 255}"
        problems.append(f"{escape(name)}: {count} pixels left out, labelmap.txt has no colour {rgb}")
    return True
