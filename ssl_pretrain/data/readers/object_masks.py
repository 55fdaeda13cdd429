"""A folder an image, a mask file an object: `<id>/images/<id>.png`, `<id>/masks/*.png` (Data Science Bowl 2018).

Where a folder has no `masks`, a table `ImageId,EncodedPixels` beside the folders (`stage1_train_labels.csv`) is read: a
line an object, pairs of start and length, counted from 1 column by column. The format has no classes: all are `object`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ssl_pretrain.data.files import Rejected, escape, read_bytes, scan
from ssl_pretrain.data.gathering import Gathering, Objects
from ssl_pretrain.data.label_images import NAMELESS, read_labels
from ssl_pretrain.data.lookup import head, peek
from ssl_pretrain.data.readers import LabelledSet, size_or_none
from ssl_pretrain.data.shapes import Mask, box, of_pixels, of_spans
from ssl_pretrain.errors import DataError

LAYOUT = "<id>/images/<id>.png with <id>/masks/*.png, one file an object"
_IMAGE = re.compile(r"((?:.*/)?([^/]+))/images/\2\.[^/.]+")
_MASK = re.compile(r"((?:.*/)?[^/]+)/masks/[^/]+")
_HEADER = re.compile(rb"(?:\xef\xbb\xbf)?ImageId,EncodedPixels(?:,[^\r\n]*)?\r?\n")
_MAX_TABLE_BYTES = 256 << 20
_DEPTH = 3


def recognise(root: Path) -> bool:
    """Whether a folder has an image of its own name in `images/`, and masks in `masks/` or in a table."""
    names = peek(root, _DEPTH)
    images = {match[1] for match in map(_IMAGE.fullmatch, names) if match}
    masks = {match[1] for match in map(_MASK.fullmatch, names) if match}
    return bool(images & masks) or (bool(images) and bool(_tables(root)))


def read(root: Path) -> LabelledSet:
    """All images that have masks, or a folder for them that is empty; the box of an object encloses its pixels."""
    gathering = Gathering("object_masks", "box")
    names = scan([root]).names
    images: dict[str, str] = {}
    masks: dict[str, list[str]] = {}
    for name in names:
        image, mask = _IMAGE.fullmatch(name), _MASK.fullmatch(name)
        if mask:
            masks.setdefault(mask[1], []).append(name)
        elif image and images.setdefault(image[1], name) == name:
            pass
        else:
            gathering.problems.append(f"{escape(name)}: left out, it is not <id>/images/<id>.png")
    if not images:
        raise DataError(f"{escape(str(root))} has no image of the layout {LAYOUT}")
    table = _table(root, gathering.problems)
    for folder, name in images.items():
        _image(root, folder, name, masks.pop(folder, []), table, gathering)
    gathering.problems += [f"{escape(folder)}: {len(lost)} masks without an image" for folder, lost in masks.items()]
    known = {folder.rpartition("/")[2] for folder in images}
    for image_id in sorted(table.keys() - known):
        gathering.annotated[NAMELESS] += sum(bool(runs) for runs in table[image_id])
        gathering.problems.append(f"{escape(image_id)}: in the table, but a missing image")
    count = gathering.annotated.total()
    return gathering.done(
        f"{count} objects in {len(gathering.images)} images, a mask each; "
        f"the format has no classes, so all are {NAMELESS!r}"
    )


def runs_from_one(size_hw: tuple[int, int], text: str) -> Mask:
    """A mask of `start length` pairs, counted from 1, column by column; raises `ValueError`.

    >>> runs_from_one((2, 2), "2 2").runs_R.tolist()    # rows 0 1 / 1 0
    [1, 2, 1]
    """
    words = text.split()
    if len(words) % 2 or not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
        raise ValueError("not pairs of whole numbers")
    pairs_K2 = np.array([int(word) for word in words], np.int64).reshape(-1, 2)
    pairs_K2 = pairs_K2[np.argsort(pairs_K2[:, 0], kind="stable")]
    start_K, end_K = pairs_K2[:, 0] - 1, pairs_K2.sum(1) - 1
    if (start_K < 0).any() or (end_K <= start_K).any() or (end_K > size_hw[0] * size_hw[1]).any():
        raise ValueError("runs outside the image")
    if (start_K[1:] < end_K[:-1]).any():
        raise ValueError("runs that overlap")
    return of_spans(size_hw, start_K, end_K)


def _tables(root: Path) -> list[Path]:
    try:
        files = sorted(path for path in root.glob("*.csv") if not path.name.startswith("."))
    except OSError:
        return []
    return [path for path in files if _HEADER.match(head(path))]


def _table(root: Path, problems: list[str]) -> dict[str, list[str]]:
    """The runs of each image; one empty text says that it has none."""
    table: dict[str, list[str]] = {}
    for path in _tables(root):
        try:
            lines = read_bytes(path, _MAX_TABLE_BYTES).decode("utf-8-sig").splitlines()[1:]
        except (Rejected, UnicodeDecodeError) as error:
            problems.append(f"{escape(path.name)}: left out, cannot be read ({escape(str(error))})")
            continue
        for line in lines:
            image_id, _, rest = line.partition(",")
            if image_id.strip():
                table.setdefault(image_id.strip(), []).append(rest.partition(",")[0].strip().strip('"'))
    return table


def _image(
    root: Path, folder: str, name: str, masks: list[str], table: Mapping[str, Sequence[str]], gathering: Gathering
) -> None:
    image_id = folder.rpartition("/")[2]
    if not masks and not (root / folder / "masks").is_dir() and image_id not in table:
        gathering.problems.append(f"{escape(name)}: left out, missing masks (unlabelled)")
        return
    size_px = size_or_none(root / name, gathering.problems, name)
    if size_px is None:
        gathering.annotated[NAMELESS] += len(masks)
        return
    objects = gathering.objects(size_px)
    for mask in masks:
        _mask(root / mask, escape(mask), objects)
    if not masks and image_id in table:
        for i, text in enumerate((text for text in table[image_id] if text), 1):
            try:
                of = runs_from_one(size_px[::-1], text)
            except ValueError as error:
                objects.lost(f"{escape(image_id)}: line {i} of the table", NAMELESS, str(error))
                continue
            objects.box(f"{escape(image_id)}: line {i} of the table", NAMELESS, *box(of), of)
    gathering.add(root / name, name, objects, group=image_id)


def _mask(path: Path, where: str, objects: Objects) -> None:
    try:
        values_HW = read_labels(path)
    except Rejected as why:
        return objects.lost(where, NAMELESS, f"{why.reason} ({why.detail})")
    if values_HW.shape != objects.size_px[::-1]:
        size = f"{values_HW.shape[1]} x {values_HW.shape[0]} px"
        return objects.lost(
            where, NAMELESS, f"the mask is {size}, the image {objects.size_px[0]} x {objects.size_px[1]}"
        )
    of = of_pixels(values_HW != 0)
    if len(of.runs_R) < 2:
        return objects.lost(where, NAMELESS, "the mask is empty")
    objects.box(where, NAMELESS, *box(of), of)
