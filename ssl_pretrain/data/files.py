"""Image files before they are decoded: find them, name them in one printable line, read their bytes.

What cannot be read raises `Rejected(reason, detail)`; the reasons here are

    missing, no_permission, not_a_file, unreadable     the file cannot be read, or is a pipe, device or folder
    empty, too_many_bytes                              there is nothing in it, or more than can be meant
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssl_pretrain.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"})
MAX_FILE_BYTES = 1 << 30


class Rejected(Exception):
    """A file that is not used: `reason` is a code of this module or of `decode`, `detail` is one line for a reader."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Listing:
    """The image files under some sources, sorted by name; nothing was opened."""

    root: Path
    """What the names are relative to: the source, or the folder that all sources share."""
    names: list[str]
    """Relative paths with `/`, as the file system spells them; `escape` makes them printable."""
    bytes_N: NDArray[np.int64]
    mtime_ns_N: NDArray[np.int64]
    unreadable: tuple[tuple[str, str], ...]
    """(relative folder, why) of folders that could not be listed."""


def escape(name: str) -> str:
    r"""One printable line of valid UTF-8 for any file name; usual names stay as they are. `unescape` is the inverse.

    >>> print(escape("a\nb\udcff\\"))
    a\u000ab\xff\\
    """
    if name.isprintable() and "\\" not in name:
        return name
    return "".join(_escaped(c) for c in name)


def _escaped(c: str) -> str:
    if c == "\\":
        return "\\\\"
    if c.isprintable():
        return c
    code = ord(c)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as Python's surrogateescape spells it
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def unescape(text: str) -> str:
    """The file name that `escape` was given."""

    def plain(match: re.Match[str]) -> str:
        code = match[1]
        if code == "\\":
            return code
        return chr(int(code[1:], 16) + (0xDC00 if code[0] == "x" else 0))

    return re.sub(r"\\(\\|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})", plain, text)


def find_images(sources: Iterable[Path]) -> list[Path]:
    """The image files in folders (at any depth) and single files, sorted by relative path; see `scan`."""
    listing = scan(list(sources))
    return [listing.root / name for name in listing.names]


def scan(sources: Sequence[Path]) -> Listing:
    """Lists the images of `sources`; the order of the sources makes no difference.

    Files count by their suffix (`SUFFIXES`, any case), a file given by name always. Hidden files and folders are
    skipped (`._x` of macOS too). Links are followed; every folder is entered once, so loops end.
    Raises `DataError` when a source does not exist.
    """
    tops = sorted({os.path.abspath(source) for source in sources})
    for top in tops:
        if not os.path.lexists(top):
            raise DataError(f"there is no {escape(top)}: check the path of the images")
    if not tops:
        raise DataError("no folder of images was given")
    root = os.path.commonpath([top if os.path.isdir(top) else os.path.dirname(top) for top in tops])
    files: dict[str, tuple[int, int]] = {}
    unreadable: list[tuple[str, str]] = []
    folders, seen = [top for top in reversed(tops) if os.path.isdir(top)], set[tuple[int, int]]()
    linked: list[str] = []  # entered last, so that an image reachable twice keeps its real path
    for top in tops:
        if not os.path.isdir(top):
            files[_relative(top, root)] = _bytes_and_mtime(top)
    while folders or linked:
        folder = folders.pop() if folders else linked.pop(0)
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            unreadable.append((_relative(folder, root), error.strerror or "cannot be listed"))
            continue
        for entry in listed:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                (linked if entry.is_symlink() else folders).append(entry.path)
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                files[_relative(entry.path, root)] = _bytes_and_mtime(entry.path)
    names = sorted(files)
    numbers = np.array([files[name] for name in names], np.int64).reshape(-1, 2)
    return Listing(Path(root), names, numbers[:, 0].copy(), numbers[:, 1].copy(), tuple(sorted(unreadable)))


def _relative(path: str, root: str) -> str:
    return path[len(root) :].lstrip("/") or "."


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _bytes_and_mtime(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:  # a dangling link: listed here, rejected with its reason when it is read
        return 0, 0
    return status.st_size, status.st_mtime_ns


def read_bytes(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a regular file; never waits on a pipe. Raises `Rejected`."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Rejected(_reason(error), error.strerror or "cannot be opened") from error
    except ValueError as error:  # a NUL in the name
        raise Rejected("missing", "not a file name") from error
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise Rejected("not_a_file", "a pipe, device or folder")
    with os.fdopen(handle, "rb") as file:
        if status.st_size > max_bytes:
            raise Rejected("too_many_bytes", f"more than {max_bytes} bytes")
        try:
            data = file.read()
        except OSError as error:
            raise Rejected("unreadable", error.strerror or "cannot be read") from error
    if not data:
        raise Rejected("empty", "the file has no bytes")
    return data


def _reason(error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        return "missing"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "no_permission"
    if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket, a device without a driver
        return "not_a_file"
    return "unreadable"
