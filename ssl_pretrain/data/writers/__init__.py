"""Labelled images in the formats that detectors are trained from. One file a format.

A format's module has `write(labelled, placed, folder) -> str`: it writes the label files into `folder` and says what
they hold. Where the images lie, how they are called, and that all of it is whole or not there, is seen to here.

What the formats have no place for (points, the classes of whole images) is refused, never guessed.
"""

from __future__ import annotations

import os
import pkgutil
import shutil
import unicodedata
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from ssl_pretrain.data.files import SUFFIXES, Rejected, escape, read_bytes
from ssl_pretrain.data.readers import LabelledImage, LabelledSet
from ssl_pretrain.errors import DataError, UsageError, WriteError
from ssl_pretrain.named import named

__path__ = pkgutil.extend_path(__path__, __name__)

KIND = "data.writers"
_MAX_NAME_BYTES = 200
_FORBIDDEN = frozenset('\\/:*?"<>|')


@dataclass(frozen=True, eq=False)
class Placed:
    """An image of the set and where it goes."""

    image: LabelledImage
    name: str
    """A file name that no other image of the set has, not even with another suffix or other capitals."""

    @property
    def folder(self) -> str:
        """Relative to the output: `images`, or the folder of the split in it."""
        return f"images/{self.image.split}" if self.image.split else "images"


def write(
    labelled: LabelledSet,
    out: Path,
    *,
    format: str,
    images: Literal["link", "copy", "none"] = "link",
    point_px: int | None = None,
) -> str:
    """Writes the set into the new folder `out` and says in a sentence what was written.

    `images` says whether image files are linked (symbolically), copied or not there. `point_px` makes a square of that
    side of each point. Raises `WriteError` when `out` exists or cannot be written, `DataError` when an image cannot be
    copied, `UsageError` for a format that does not exist, for a set without boxes and for an `out` among the images.
    """
    writer = named(KIND, format)
    labelled = boxes_of(labelled, point_px)
    if os.path.lexists(out):
        raise WriteError(f"{escape(str(out))} exists: give a folder that does not")
    if out.resolve().is_relative_to(_common(labelled.images).resolve()):
        raise UsageError(f"{escape(str(out))} lies among the images of the data set: give a folder outside of it")
    placed, renamed = place(labelled.images)
    staging = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        said: str = writer.write(labelled, placed, staging)
        if images != "none":
            for item in placed:
                _put(item, staging, images)
        _settle(staging)
        os.rename(staging, out)
    except OSError as error:
        raise WriteError(f"cannot write {escape(str(out))}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    sentences = [said]
    if images == "none":
        sentences.append("no image files, as asked for")
    if renamed:
        sentences.append(f"{renamed} images have another name, so that each has its own and a safe one")
    return "; ".join(sentences)


def put(path: Path, content: bytes) -> None:
    """A file of the output, which is made safe as a whole in the end; makes its folder. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def boxes_of(labelled: LabelledSet, point_px: int | None) -> LabelledSet:
    """The set with a square for each point, cut off at the edge of the image. Raises `UsageError`."""
    if labelled.kind == "image":
        raise UsageError("the set gives a class to whole images, which have no boxes to write")
    if labelled.kind == "box":
        if point_px is not None:
            raise UsageError("the set has boxes, so a side for the squares of points (--point-px) makes no sense")
        return labelled
    if point_px is None:
        raise UsageError("the set has points, which have no size: --point-px 80 makes a square of 80 px of each")
    if point_px < 1:
        raise UsageError(f"squares of {point_px} px: --point-px is at least 1")
    images = []
    for image in labelled.images:
        half = np.array([-1, -1, 1, 1]) * (point_px / 2)
        boxes_N4 = np.clip(image.boxes_N4 + half, 0, np.tile(image.size_px, 2))
        images.append(replace(image, boxes_N4=boxes_N4, shapes=()))
    return replace(labelled, kind="box", images=tuple(images))


def place(images: Sequence[LabelledImage]) -> tuple[list[Placed], int]:
    """A name for each image, and how many are not the image's own; folders tell images of one name apart."""
    common = _common(images)
    own = [safe_name(image.path.name) for image in images]
    shared = Counter(map(_stem, own))
    taken = {stem for stem, count in shared.items() if count == 1}
    placed, renamed = list[Placed](), 0
    for image, name in zip(images, own, strict=True):
        if shared[_stem(name)] > 1:
            parts = Path(os.path.abspath(image.path)).relative_to(common).parts
            stem, suffix = os.path.splitext(safe_name("_".join(parts)))
            name, k = stem + suffix, 1
            while _stem(name) in taken:
                name, k = f"{stem}-{k + 1}{suffix}", k + 1
            taken.add(_stem(name))
        renamed += name != image.path.name
        placed.append(Placed(image, name))
    return placed, renamed


def safe_name(name: str) -> str:
    """A file name that every system takes, of at most 200 bytes; the suffix stays.

    >>> safe_name("a:b?.png"), safe_name(".hidden.JPG")
    ('a_b_.png', '_hidden.JPG')
    """
    stem, suffix = os.path.splitext(name)
    if suffix.lower() not in SUFFIXES:
        stem, suffix = name, ""
    stem = "".join("_" if c in _FORBIDDEN or not c.isprintable() else c for c in stem)
    stem = stem.encode()[: _MAX_NAME_BYTES - len(suffix)].decode(errors="ignore").rstrip(" .")
    if stem.startswith("."):
        stem = "_" + stem[1:]
    return (stem or "_") + suffix


def _stem(name: str) -> str:
    """What must differ: label files have the stem of their image, and some file systems no capitals."""
    return unicodedata.normalize("NFC", os.path.splitext(name)[0]).casefold()


def _common(images: Sequence[LabelledImage]) -> Path:
    """The folder that holds all images."""
    if not images:
        raise DataError("the set has no images, so there is nothing to write")
    return Path(os.path.commonpath([os.path.dirname(os.path.abspath(image.path)) for image in images]))


def _settle(folder: Path) -> None:
    """Sees to it that all files are on the disk: an empty label file that should not be one would say `no objects`.

    Many at a time: one after the other, `files.write_durably` takes minutes for some ten thousand.
    """
    paths = [os.path.join(top, name) for top, _, files in os.walk(folder) for name in files]
    folders = [top for top, _, _ in os.walk(folder)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(_sync, [path for path in paths if not os.path.islink(path)] + folders))


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(item: Placed, folder: Path, how: Literal["link", "copy", "none"]) -> None:
    path, target = item.image.path, folder / item.folder / item.name
    if how == "link":
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(os.path.abspath(path))
        return
    try:
        put(target, read_bytes(path))
    except Rejected as why:
        raise DataError(f"{escape(str(path))} cannot be copied: {why.detail}") from why
