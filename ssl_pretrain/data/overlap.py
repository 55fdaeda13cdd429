"""Images that show the same: within a pack, and between a pack and the labelled images that test what is trained on it.

The rule is that of `duplicates`. Thumbnails are read from the mapped file a few at a time, so memory is 8 bytes of hash
an image, 16 a candidate pair, of which an image has 32 at most, and `HELD`.

Shapes: N images, M of them, P pairs, Q queries, B of a block; thumbnails are 64 x 64.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssl_pretrain.data import duplicates, readers
from ssl_pretrain.data.decode import Reading
from ssl_pretrain.data.files import Listing, escape, scan
from ssl_pretrain.data.looks import Looks
from ssl_pretrain.data.pack import DUPLICATE, Pack, manifest
from ssl_pretrain.data.workers import decode_all
from ssl_pretrain.errors import DataError


class HeldOut(NamedTuple):
    """The images of a labelled set that nothing is to be trained on."""

    folder: str
    """Its last name."""
    how: str
    """A sentence on what was taken."""
    names: tuple[str, ...]
    """Relative, escaped."""
    sha256: tuple[str, ...]
    thumbnails: tuple[NDArray[np.uint8] | None, ...]
    unusable: tuple[str, ...]
    """One line for each image that could not be compared."""


def read(root: Path, pack: Pack, processes: int | None = None) -> HeldOut:
    """The images under `root` that the pack is compared with, at the pack's size; raises `DataError` if there are none.

    A folder that is no labelled set of a known format counts as a whole: rather too much than too little.
    """
    try:
        labelled = readers.read(root)
    except DataError as error:
        if not root.is_dir():
            raise
        names = [root / name for name in scan([root]).names]
        how = f"all images, as the folder was not read as a labelled set: {error}"
    else:
        test = [image.path for image in labelled.images if image.split == "test"]
        names = test or [image.path for image in labelled.images]
        how = f"{'the test split' if test else 'all images, as it names no test split,'} of {labelled.found}"
    if not names:
        raise DataError(f"there are no images in {escape(str(root))}: check the path of the labelled images")
    top = os.path.commonpath([os.path.dirname(path) for path in names])
    relative = sorted({os.path.relpath(path, top) for path in names})
    sizes_N = np.array([_bytes(Path(top, name)) for name in relative], np.int64)
    listing = Listing(Path(top), relative, sizes_N, np.zeros_like(sizes_N), ())
    return _decoded(root, how, listing, pack, processes)


def _decoded(root: Path, how: str, listing: Listing, pack: Pack, processes: int | None) -> HeldOut:
    count = len(os.sched_getaffinity(0)) if processes is None else processes
    reading = reading_of(pack)
    shown, digests, thumbnails, unusable = [], [], [], []
    outcomes = decode_all(listing, 0, pack.short_side_px, min(count, len(listing.names)), reading)
    for name, outcome in zip(listing.names, (outcome for some in outcomes for outcome in some), strict=True):
        if outcome.measured is None:
            unusable.append(f"{escape(name)}: {outcome.reason}, {outcome.detail}")
        if outcome.sha256 is not None:
            shown.append(escape(name))
            digests.append(outcome.sha256)
            thumbnails.append(None if outcome.measured is None else outcome.measured.thumbnail_HW)
    folder = escape(root.resolve().name)
    return HeldOut(folder, how, tuple(shown), tuple(digests), tuple(thumbnails), tuple(unusable))


def reading_of(pack: Pack) -> Reading:
    """How the pack's files were read."""
    words = str(manifest(pack.folder).get("reading", "")).split()
    at = words.index("range") if "range" in words else -1
    value_range = (float(words[at + 1]), float(words[at + 2])) if at >= 0 else None
    return Reading(value_range, words[words.index("plane") + 1] if "plane" in words else "first")


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # rejected with its reason when it is read
        return 0


def overlaps(pack: Pack, seen: Looks, held: HeldOut) -> list[tuple[int, int, str]]:
    """Every pair of an image of the pack and one held out that are the same: (place in the pack, in `held`, kind).

    The kind is `overlap_bytes` or `overlap_near`; first come those of the same bytes, then by place.
    """
    near_P2 = _near(pack, seen, held)
    wanted = {*held.sha256, *(_digest(pack, place) for _, place in near_P2)}
    holders: dict[str, list[int]] = {digest: [] for digest in wanted}
    for i in range(len(pack)):
        if (digest := _digest(pack, i)) in holders:
            holders[digest].append(i)
    pairs = {(i, t): "overlap_bytes" for t, digest in enumerate(held.sha256) for i in holders[digest]}
    for t, place in near_P2:
        for i in holders[_digest(pack, place)]:  # its copies overlap as it does
            pairs.setdefault((i, t), "overlap_near")
    return sorted(((i, t, kind) for (i, t), kind in pairs.items()), key=lambda pair: (pair[2], pair[:2]))


def _near(pack: Pack, seen: Looks, held: HeldOut) -> list[tuple[int, int]]:
    """(place in `held`, place in the pack); of files with the same bytes only the first is compared."""
    place_Q = [t for t, thumbnail in enumerate(held.thumbnails) if thumbnail is not None]
    shown = [thumbnail for thumbnail in held.thumbnails if thumbnail is not None]
    if not shown:
        return []
    place_M = np.flatnonzero(seen.shown_N & (pack.flags_N & DUPLICATE == 0))
    return [(place_Q[q], i) for q, i in duplicates.near_across(np.stack(shown), seen.thumbnail_NHW, place_M).tolist()]


def _digest(pack: Pack, place: int) -> str:
    return bytes(pack.sha256_N32[place]).hex()
