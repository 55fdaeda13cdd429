"""One writer per run folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ssl_pretrain.errors import WriteError


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds `folder/.lock`; `WriteError` at once, with host and process, when another process does.

    The lock is the kernel's (flock), so it goes with the process however that ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = open(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600), "r+")
    except OSError as error:
        raise WriteError(f"cannot write to {folder}: {error.strerror}") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise WriteError(
                f"{folder} is written by another process ({_holder(handle.read())}); stop it or choose another --out"
            ) from error
        handle.truncate(0)
        handle.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        handle.flush()
        yield


def _holder(content: str) -> str:
    try:
        holder = json.loads(content)
        return f"pid {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "which one it does not say"
