"""A first look at a folder, for `recognise`: a few names and the first bytes of a file, whatever is in there."""

from __future__ import annotations

import os
import stat
from itertools import islice
from pathlib import Path

_ENTRIES = 400
_FOLDERS = 12


def peek(root: Path, depth: int) -> list[str]:
    """Relative names of files down to `depth` folders below the root; of each folder a few, hidden ones never.

    All of them where no folder has more than 400 entries or 12 folders. Never raises.
    """
    names: list[str] = []
    level = [""]
    for _ in range(depth + 1):
        below: list[str] = []
        for prefix in level:
            folders: list[str] = []
            try:
                with os.scandir(root / prefix) as entries:
                    for entry in islice(entries, _ENTRIES):
                        if entry.name.startswith(".") or entry.name == "__MACOSX":
                            continue
                        (folders if entry.is_dir() else names).append(prefix + entry.name)
            except OSError:  # unreadable, or a link that leads to itself
                continue
            below += [f"{folder}/" for folder in sorted(folders)[:_FOLDERS]]
        level = below
    return sorted(names)


def head(path: Path, count: int = 65536) -> bytes:
    """The first bytes of a regular file; none of what cannot be read, and never waits on a pipe."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return b""
    with os.fdopen(handle, "rb") as file:
        try:
            return file.read(count) if stat.S_ISREG(os.fstat(handle).st_mode) else b""
        except OSError:
            return b""
