"""Many files to pixels, in order, in processes that may die: a file that kills its process is rejected as `crashed`."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssl_pretrain.data.decode import AS_STATED, Reading, Source, decode_bytes
from ssl_pretrain.data.files import Listing, Rejected, read_bytes
from ssl_pretrain.data.looks import Measured, measure
from ssl_pretrain.errors import UsageError

_CHUNK_FILES, _CHUNK_FILE_BYTES = 32, 1 << 20  # what one worker is given at a time
_CHUNK_PIXEL_BYTES = 64 << 20  # and what it may hold before it hands back: bounds memory to about two of these a worker


class Outcome(NamedTuple):
    """What became of one file: pixels (H, W, 3) with what they look like and what the file was, or a reason; and the
    SHA-256 of its bytes, if they could be read.
    """

    pixels: NDArray[np.uint8] | None
    original_hw: tuple[int, int]
    sha256: str | None
    reason: str = ""
    detail: str = ""
    measured: Measured | None = None
    source: Source | None = None


def _decode_some(
    root: Path, names: Sequence[str], short_side_px: int | None, reading: Reading = AS_STATED
) -> list[Outcome]:
    """Outcomes of the first names, as many as fit into `_CHUNK_PIXEL_BYTES`, one at least. Runs in a worker."""
    outcomes: list[Outcome] = []
    held = 0
    for name in names:
        sha256 = None
        try:
            data = read_bytes(root / name)
            sha256 = hashlib.sha256(data).hexdigest()
            pixels, original_hw, source = decode_bytes(data, short_side_px, reading)
        except Rejected as why:
            outcomes.append(Outcome(None, (0, 0), sha256, why.reason, why.detail))
            continue
        outcomes.append(Outcome(pixels, original_hw, sha256, measured=measure(pixels), source=source))
        held += pixels.nbytes
        if held >= _CHUNK_PIXEL_BYTES:
            break
    return outcomes


def _start_worker() -> None:
    """Ctrl-C is the parent's to handle; and a worker whose parent was killed would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: there is a worker for each core
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _ready() -> None:
    """The first task of a pool: tells whether processes can be started at all."""


class _Workers:
    """A pool that outlives its workers: what it was doing when one died is done again, one file at a time."""

    def __init__(self, root: Path, short_side_px: int | None, processes: int, reading: Reading) -> None:
        self.root, self.short_side_px, self.processes, self.reading = root, short_side_px, processes, reading
        self.pool = self._new(processes)
        self.lone: ProcessPoolExecutor | None = None
        try:
            self.pool.submit(_ready).result()
        except BrokenProcessPool as error:
            raise UsageError(
                'decoding processes cannot start: a script must call this under `if __name__ == "__main__":`, '
                "or with processes=0"
            ) from error

    @staticmethod
    def _new(processes: int) -> ProcessPoolExecutor:
        # spawn, because a fork of a process with threads (torch, BLAS) may hang
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker)

    def submit(self, names: Sequence[str]) -> Future[list[Outcome]]:
        try:
            return self.pool.submit(_decode_some, self.root, names, self.short_side_px, self.reading)
        except BrokenProcessPool:
            self.pool.shutdown()
            self.pool = self._new(self.processes)
            return self.pool.submit(_decode_some, self.root, names, self.short_side_px, self.reading)

    def carefully(self, names: Sequence[str]) -> list[Outcome]:
        """One file at a time in a process of its own: who dies again is rejected."""
        outcomes: list[Outcome] = []
        for name in names:
            self.lone = self.lone or self._new(1)
            try:
                done = self.lone.submit(_decode_some, self.root, [name], self.short_side_px, self.reading)
                outcomes += done.result()
            except BrokenProcessPool:
                self.lone.shutdown()
                self.lone = None
                detail = "decoding it ended the process, twice (a crash, or too little memory)"
                outcomes.append(Outcome(None, (0, 0), None, "crashed", detail))
        return outcomes

    def close(self) -> None:
        for pool in (self.pool, self.lone):
            if pool is not None:
                pool.shutdown(cancel_futures=True)


def _chunks(bytes_N: NDArray[np.int64], start: int) -> Iterator[tuple[int, int]]:
    """Ranges of neighbouring files for one worker's turn: few large ones or more small ones."""
    while start < len(bytes_N):
        held_C = np.cumsum(bytes_N[start : start + _CHUNK_FILES])
        stop = start + max(1, int(np.searchsorted(held_C, _CHUNK_FILE_BYTES, side="right")))
        yield start, stop
        start = stop


def decode_all(
    listing: Listing, start: int, short_side_px: int | None, processes: int, reading: Reading = AS_STATED
) -> Iterator[list[Outcome]]:
    """Outcomes of the files from number `start` on, in order, a few at a time, whatever happens to the processes.

    With 0 processes this process decodes, and a file that crashes the decoder ends it. Raises `UsageError` when
    processes cannot be started.
    """
    names = listing.names
    chunks = _chunks(listing.bytes_N, start)
    if processes == 0:
        while start < len(names):
            some = _decode_some(listing.root, names[start : start + _CHUNK_FILES], short_side_px, reading)
            start += len(some)
            yield some
        return
    workers = _Workers(listing.root, short_side_px, processes, reading)
    waiting: deque[tuple[int, int, Future[list[Outcome]]]] = deque()
    try:
        while True:
            while len(waiting) < 2 * processes and (chunk := next(chunks, None)) is not None:
                waiting.append((*chunk, workers.submit(names[slice(*chunk)])))
            if not waiting:
                return
            first, stop, future = waiting.popleft()
            try:
                some = future.result()
            except BrokenProcessPool:
                some = workers.carefully(names[first:stop])
            first += len(some)
            if first < stop:  # the worker stopped early to bound its memory
                waiting.appendleft((first, stop, workers.submit(names[first:stop])))
            yield some
    finally:
        workers.close()
