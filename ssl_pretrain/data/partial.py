"""The folder of an unfinished pack: for one process at a time, continued after a crash, renamed when it is whole.

A build works in `.<name>.partial` beside its goal. It appends images in order and, each time the pixels and thumbnails
are safely on disk, a line each to a journal; the same call after a crash continues behind the last line. At the end the
folder is renamed, so a pack is either whole or not there.

Shapes: N images, M numbers of a look.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from ssl_pretrain.data import looks
from ssl_pretrain.data.decode import Source
from ssl_pretrain.errors import WriteError

_FILES = ("journal.jsonl", "pixels.bin", *looks.FILES, "index.npz", "rejected.jsonl", "pack.json")


class Busy(WriteError):
    """Another process is making the same pack."""


@contextmanager
def alone(out: Path) -> Iterator[Path]:
    """The folder of the unfinished pack, for this process only. The lock is on the folder, so it leaves no file."""
    folder = out.parent / f".{out.name}.partial"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Busy(f"another process is making the pack {out}: wait for it") from error
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):  # some network file systems
                    raise
            try:
                still_there = os.path.samestat(os.fstat(handle), os.stat(folder))
            except FileNotFoundError:
                still_there = False
            if still_there:  # else its owner has renamed it between our two looks
                yield folder
                return
        finally:
            os.close(handle)


class Partial:
    """An unfinished pack: pixels appended in order, then a journal line an image, which is what makes it done.

    A line is `[height, width, original height, original width, sha256, numbers of the look, source]` or
    `[reason, detail, sha256 or null]`. Images too small for a thumbnail have one of zeros.
    """

    def __init__(self, folder: Path, key: str, total: int) -> None:
        self.folder = folder
        self.done = 0
        self.pixel_bytes = 0
        self.kept_N = np.zeros(total, np.bool_)
        self.size_N4 = np.zeros((total, 4), np.int64)
        self.sha256_N32 = np.zeros((total, 32), np.uint8)
        self.numbers_NM = np.full((total, len(looks.Look._fields)), np.nan)
        self.sources: list[Source] = []
        self._kinds: dict[Source, Source] = {}
        self.rejected: dict[int, tuple[str, str, str | None]] = {}
        self._resume(json.dumps({"key": key, "total": total}).encode() + b"\n")

    def _resume(self, head: bytes) -> None:
        """Takes over what a broken build has finished, and cuts off what it was writing when it ended."""
        journal, pixels = self.folder / "journal.jsonl", self.folder / "pixels.bin"
        thumbnails = self.folder / looks.FILES[1]
        for path in (journal, pixels, thumbnails):
            path.touch()
        room, small = pixels.stat().st_size, thumbnails.stat().st_size // looks.THUMBNAIL_BYTES
        with open(journal, "r+b") as lines:
            good = 0
            if lines.readline() == head:
                good = len(head)
                for line in lines:
                    if not self._take(line, room, small):
                        break
                    good += len(line)
            lines.seek(good)
            lines.truncate()
            if good == 0:  # new, or begun for other files
                lines.write(head)
        os.truncate(pixels, self.pixel_bytes)
        os.truncate(thumbnails, len(self.sources) * looks.THUMBNAIL_BYTES)

    def _take(self, line: bytes, room: int, small: int) -> bool:
        """Notes a journal line, if it is whole, of this release, and its pixels and thumbnail are there."""
        try:
            record = json.loads(line)
        except ValueError:
            return False
        if not line.endswith(b"\n") or len(record) not in (3, 7):
            return False
        if len(record) == 7 and (self.pixel_bytes + record[0] * record[1] * 3 > room or len(self.sources) + 1 > small):
            return False
        self.note(record)
        return True

    def note(self, record: list[Any]) -> None:
        """The next image is done."""
        if len(record) == 7:
            self.kept_N[self.done] = True
            self.size_N4[self.done] = record[:4]
            self.sha256_N32[self.done] = np.frombuffer(bytes.fromhex(record[4]), np.uint8)
            self.pixel_bytes += record[0] * record[1] * 3
            self.numbers_NM[self.done] = [np.nan if number is None else number for number in record[5]]
            source = Source(*record[6])
            self.sources.append(self._kinds.setdefault(source, source))  # most are equal: one object for all of them
        else:
            reason, detail, sha256 = record
            self.rejected[self.done] = (reason, detail, sha256)
        self.done += 1


def sync(file: IO[bytes]) -> None:
    """Returns when what was written to `file` is safely on disk."""
    file.flush()
    os.fsync(file.fileno())


def publish(folder: Path, out: Path) -> None:
    """Renames the finished folder to `out`, safely on disk."""
    (folder / "journal.jsonl").unlink(missing_ok=True)
    _sync_folder(folder)
    os.rename(folder, out)
    _sync_folder(out.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def discard(folder: Path) -> None:
    """Removes the folder and the files that a build leaves in it."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()
