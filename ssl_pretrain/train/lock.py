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
from typing import TextIO

from ssl_pretrain.errors import WriteError

BEAT_S, FRESH_S = 15.0, 60.0
"""Seconds between two beats, and the age at which the last one means nothing any more."""
FILE = ".lock"


class Lock:
    """Held by this process; `check` says whether it still is."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / FILE
        self.handle: TextIO | None = None
        self._take()

    def check(self) -> None:
        """Takes the lock again where the folder was removed or replaced; `WriteError` when another process has it."""
        try:
            status = os.stat(self.path)
            there = self.handle is not None and os.path.samestat(status, os.fstat(self.handle.fileno()))
        except FileNotFoundError:
            there = False
        except OSError:  # a file system that is away for a while
            return
        if not there:
            self.release()
            self._take()

    def beat(self) -> None:
        """Writes who holds the lock, and when."""
        if self.handle is not None:
            with contextlib.suppress(OSError):  # a full disk must not end a run
                content = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()})
                self.handle.seek(0)
                self.handle.write(content)
                self.handle.truncate()
                self.handle.flush()

    def release(self) -> None:
        """Lets another process have it."""
        if self.handle is not None:
            with contextlib.suppress(OSError):
                self.handle.seek(0)
                self.handle.truncate()
            self.handle.close()
            self.handle = None

    def _take(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+")
        except OSError as error:
            raise WriteError(f"cannot write to {self.folder}: {error.strerror}") from error
        host, holder, age_s = _holder(handle.read())
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = host != socket.gethostname() and age_s < FRESH_S  # flock knows of its own machine only
        except OSError:
            taken = True
        if taken:
            handle.close()
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


def _holder(content: str) -> tuple[str, str, float]:
    """Host, words, and the seconds since the last beat."""
    try:
        holder = json.loads(content)
        host, pid, age_s = str(holder["host"]), int(holder["pid"]), time.time() - float(holder["time"])
    except (ValueError, KeyError, TypeError):
        return "", "which one it does not say", float("inf")
    return host, f"pid {pid} on {host}, {age_s:.0f} s ago", abs(age_s)
