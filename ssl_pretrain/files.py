"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ssl_pretrain.errors import WriteError


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """Whole or not at all, also when the power goes; see `durably`."""
    with durably(path) as file:
        file.write(content)


@contextlib.contextmanager
def durably(path: Path) -> Iterator[BinaryIO]:
    """A file to write: a temporary one beside `path`, which takes its place when the block is done.

    Forced to the disk before it is renamed, and the folder after that. Makes the folder where there is none. Raises
    `WriteError`; what stood at `path` then still stands.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise WriteError(f"cannot write {path}: {error.strerror or error}") from error
        raise
