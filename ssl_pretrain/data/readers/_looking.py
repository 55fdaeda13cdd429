"""A first look at a folder, for `recognise`: a few names and the first bytes of a file, whatever is in there."""

from __future__ import annotations

import os
import stat
from itertools import islice
from pathlib import Path

from ssl_pretrain.data.lookup import is_folder

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
                        if not entry.name.startswith(".") and entry.name != "__MACOSX":
                            (folders if is_folder(entry) else names).append(prefix + entry.name)
            except OSError:  # unreadable
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
    if not stat.S_ISREG(os.fstat(handle).st_mode):  # before `fdopen`, which raises for a folder
        os.close(handle)
        return b""
    with os.fdopen(handle, "rb") as file:
        try:
            return file.read(count)
        except OSError:
            return b""
