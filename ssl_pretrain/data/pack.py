"""The pack: all images decoded once into one uint8 store, so that training decodes nothing.

A folder with `pixels.bin` (uint8, every image (H, W, 3) row-major, one after the other), `index.npz` (arrays, a row an
image), `rejected.jsonl` (a line for every file that was not used) and `pack.json` (what made it). Images stand in the
order of their relative paths. The fingerprint depends on the bytes of the image files, on the short side, and on a
range or plane if one was given, only. Beside them stand what the intake report needs (`looks`) and makes (`intake`);
a pack can be opened without.

Shapes: N images, H and W in pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_pretrain.data.files import escape, read_bytes
from ssl_pretrain.errors import DataError

FORMAT = "ssl_pretrain pack"
VERSION = 2
DUPLICATE = 1
"""Bit of `flags_N`: an earlier image of the pack has the same file bytes."""
_MAX_SIDE_PX = 1 << 20
_ROWS = {"size_N2": (2,), "original_N2": (2,), "sha256_N32": (32,), "group_N": (), "flags_N": (), "offset_N": ()}
"""Arrays of the index, and the shape of a row."""
READ_AHEAD_BYTES = 1 << 17
"""Asked for at once: of more, Linux reads only the beginning (the disk's read_ahead_kb, by default this much)."""


@dataclass(frozen=True, eq=False)
class Pack:
    """An opened pack; the pixels stay on disk and are mapped into memory."""

    folder: Path
    size_N2: NDArray[np.int64]
    """Stored height and width in pixels."""
    original_N2: NDArray[np.int64]
    """Height and width in the file, upright."""
    group_N: NDArray[np.int64]
    """Images of one patient, slide or the like share a number."""
    sha256_N32: NDArray[np.uint8]
    """Of the bytes of the image file."""
    flags_N: NDArray[np.uint8]
    """Bits: `DUPLICATE`."""
    fingerprint: str
    """64 hexadecimal digits; equal for the same image files at the same short side."""
    short_side_px: int | None
    """What the images were reduced to; None for full size."""
    offset_N: NDArray[np.int64] = field(repr=False)
    """First byte of each image in `pixels`."""
    pixels: NDArray[np.uint8] = field(repr=False)
    """All of `pixels.bin`, read-only."""
    _names: bytes = field(repr=False)

    def __len__(self) -> int:
        return len(self.size_N2)

    def __reduce__(self) -> tuple[Callable[[Path], Pack], tuple[Path]]:
        return open_pack, (self.folder,)  # another process maps the file again instead of copying it

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """Relative paths of the files, printable; `files.unescape` gives the name to open."""
        return tuple(self._names.decode().split("\n"))

    @property
    def scale_N(self) -> NDArray[np.float64]:
        """Stored short side / original short side, at most 1."""
        stored_N, original_N = self.size_N2.min(1).astype(np.float64), self.original_N2.min(1).astype(np.float64)
        return np.asarray(stored_N / original_N, np.float64)

    @cached_property
    def by_content_N(self) -> NDArray[np.int64]:
        """Places of the images in the order of their content, which other file names do not change."""
        return np.lexsort(self.sha256_N32.view(">u8").T[::-1])

    def image(self, i: int) -> NDArray[np.uint8]:
        """Image `i`, uint8 (H, W, 3) RGB: a read-only view on the memory map."""
        height, width = (int(side) for side in self.size_N2[i])
        start = int(self.offset_N[i])
        return self.pixels[start : start + height * width * 3].reshape(height, width, 3)

    def read_ahead(self, place_B: NDArray[np.int64]) -> None:
        """Asks the system to read these images into the page cache, and does not wait; nothing where it cannot."""
        if sys.platform != "linux":
            return
        with contextlib.suppress(OSError), open(self.folder / "pixels.bin", "rb") as file:  # a hint must not end a run
            for place in place_B:
                start, end = int(self.offset_N[place]), int(self.offset_N[place] + 3 * self.size_N2[place].prod())
                for at in range(start, end, READ_AHEAD_BYTES):
                    count = min(READ_AHEAD_BYTES, end - at)
                    os.posix_fadvise(file.fileno(), at, count, os.POSIX_FADV_WILLNEED)


def is_pack(path: Path) -> bool:
    """Whether `path` is the folder of a pack (perhaps a damaged one)."""
    return (path / "pack.json").is_file() and any((path / name).is_file() for name in ("index.npz", "pixels.bin"))


def open_pack(folder: Path) -> Pack:
    """Opens a pack and checks that its files belong together; raises `DataError` when they do not."""
    made = manifest(folder)
    try:
        content = read_bytes(folder / "index.npz", max_bytes=sys.maxsize)  # which never waits on a pipe
        with np.load(io.BytesIO(content), allow_pickle=False) as index:
            arrays = {name: index[name] for name in index.files}
        size_N2, original_N2 = arrays["size_N2"], arrays["original_N2"]
        sha256_N32, names = arrays["sha256_N32"], arrays["paths"].tobytes()
        pixel_bytes = (folder / "pixels.bin").stat().st_size
        count = len(size_N2)
        whole = (
            all(
                arrays[name].shape == (count, *rest) and arrays[name].dtype.kind in "iu" for name, rest in _ROWS.items()
            )
            and (0 < size_N2.min() and size_N2.max() <= _MAX_SIDE_PX)  # first, so that no product overflows
            and (0 < original_N2.min() and original_N2.max() <= _MAX_SIDE_PX)
            and count == made["images"] == names.count(b"\n") + 1
            and names.decode().replace("\n", "").isprintable()
        )
        end_N = np.cumsum(size_N2.prod(1) * 3)
        whole = (
            whole
            and arrays["offset_N"][0] == 0
            and np.array_equal(arrays["offset_N"][1:], end_N[:-1])
            and int(end_N[-1]) == made["pixel_bytes"]
            and fingerprint(sha256_N32, made["short_side_px"], made.get("reading", "")) == made["fingerprint"]
        )
    except Exception as error:  # zip, npy and type errors of every kind: all say that the index is not ours
        raise _damaged(folder, f"index.npz: {escape(str(error))}") from error
    if not whole:
        raise _damaged(folder, "index.npz and pack.json do not belong together")
    if pixel_bytes != made["pixel_bytes"]:
        raise _damaged(folder, f"pixels.bin has {pixel_bytes} bytes, not {made['pixel_bytes']}")
    pixels = np.memmap(folder / "pixels.bin", np.uint8, mode="r").view(np.ndarray)
    return Pack(
        folder, size_N2, original_N2, arrays["group_N"], sha256_N32, arrays["flags_N"],
        made["fingerprint"], made["short_side_px"], arrays["offset_N"], pixels, names,
    )  # fmt: skip


def manifest(folder: Path) -> dict[str, Any]:
    """What `pack.json` says, of a version that can be read."""
    if not (folder / "pack.json").is_file():
        raise DataError(f"{folder} is not a pack: it has no pack.json")
    try:
        made = json.loads((folder / "pack.json").read_bytes())
        known = made["format"] == FORMAT
    except Exception as error:
        raise _damaged(folder, "pack.json cannot be read") from error
    if not known or made.get("version") != VERSION:
        version = f"{made['format']!r}, version {made.get('version')!r}"
        raise DataError(f"{folder} is {version}; this release reads version {VERSION}: pack the images again")
    return dict(made)


def _damaged(folder: Path, what: str) -> DataError:
    return DataError(f"the pack {folder} is damaged ({what}): delete it and pack the images again")


def fingerprint(sha256_N32: NDArray[np.uint8], short_side_px: int | None, reading: str = "") -> str:
    """64 hexadecimal digits for a set of files, in any order, at a short side; `reading` is `decode.Reading.words`."""
    words = np.ascontiguousarray(sha256_N32).view(">u8")
    order = np.lexsort(words.T[::-1])
    head = f"{FORMAT} {VERSION} short side {short_side_px}{reading}\n".encode()
    return hashlib.sha256(head + sha256_N32[order].tobytes()).hexdigest()
