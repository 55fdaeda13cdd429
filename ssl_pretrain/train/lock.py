"""One writer per run folder.

The lock is the kernel's (flock), so it goes with the process however that ends. Some network file systems do not carry
it to other machines: the holder also writes its name and the time into the file, again and again, and one whose last
beat is recent is believed on any machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ssl_pretrain.errors import WriteError

BEAT_S, FRESH_S = 15.0, 60.0
"""Seconds between two beats, and the age at which the last one means nothing any more."""
FILE = ".lock"
MAX_BYTES = 4096
"""That are read of it; a beat has about a hundred."""


class Lock:
    """Held by this process; `check` says whether it still is."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / FILE
        self.handle: int | None = None
        self._busy = threading.RLock()
        """The heart beats in a thread of its own."""
        self._take()

    def check(self) -> None:
        """Takes the lock again where the folder was removed or replaced; `WriteError` when another process has it."""
        try:
            status = os.stat(self.path)
            there = self.handle is not None and os.path.samestat(status, os.fstat(self.handle))
        except FileNotFoundError:
            there = False
        except OSError:  # a file system that is away for a while
            return
        if not there:
            with self._busy:
                self.release()
                self._take()

    def beat(self) -> None:
        """Writes who holds the lock, and when."""
        content = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}).encode()
        with self._busy, contextlib.suppress(OSError):  # a full disk must not end a run
            if self.handle is not None:
                os.pwrite(self.handle, content, 0)
                os.ftruncate(self.handle, len(content))

    def release(self) -> None:
        """Lets another process have it."""
        with self._busy, contextlib.suppress(OSError):
            handle, self.handle = self.handle, None
            if handle is not None:
                try:
                    os.ftruncate(handle, 0)
                finally:
                    os.close(handle)

    def _take(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise WriteError(f"cannot write to {self.folder}: {error.strerror}") from error
        host, holder, age_s = _holder(os.pread(handle, MAX_BYTES, 0))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = host != socket.gethostname() and age_s < FRESH_S  # flock knows of its own machine only
        except OSError:
            taken = True
        if taken:
            os.close(handle)
            raise WriteError(f"{self.folder} is written by another process ({holder}); stop it or choose another --out")
        self.handle = handle
        self.beat()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Lock]:
    """Holds `folder/.lock`; `WriteError` at once, with host and process, when another process does."""
    lock, over = Lock(folder), threading.Event()

    def beats() -> None:
        while not over.wait(BEAT_S):
            lock.beat()

    thread = threading.Thread(target=beats, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        over.set()
        thread.join()
        lock.release()


def _holder(content: bytes) -> tuple[str, str, float]:
    """Host, words, and the seconds since the last beat."""
    try:
        holder = json.loads(content)
        host, pid, age_s = str(holder["host"]), int(holder["pid"]), time.time() - float(holder["time"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return "", "which one it does not say", float("inf")
    return host, f"pid {pid} on {host}, {age_s:.0f} s ago", abs(age_s)
