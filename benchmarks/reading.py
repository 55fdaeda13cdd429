"""How long a step waits for its images when they are mapped and not in the page cache: with and without read-ahead.

    python benchmarks/reading.py [--folder DIR] [--images 400] [--batch 32] [--work-ms 300] [--rounds 5]

A pack of 683 x 512 px (1 MB an image) is written and dropped from the page cache; then one epoch runs in which every
step copies its images, as staging for a GPU would, and does WORK-MS of something else, during which the disk can read
what `Pack.read_ahead` asked for. Reported: milliseconds per step in the copy, without and with read-ahead, and from a
warm cache, and what the asking itself costs; medians over rounds in which all take turns. Linux only. DIR should be on
the disk that is meant.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from ssl_pretrain.data.pack import Pack

SIZE_PX = (683, 512)
BYTES = 3 * SIZE_PX[0] * SIZE_PX[1]


def write(folder: Path, count: int) -> None:
    random = np.random.default_rng(0)
    with open(folder / "pixels.bin", "wb") as file:
        for _ in range(count):
            file.write(random.bytes(BYTES))
        file.flush()
        os.fsync(file.fileno())


def drop(folder: Path) -> None:
    """Only pages that no process has mapped are dropped."""
    with open(folder / "pixels.bin", "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def opened(folder: Path, count: int) -> Pack:
    size_N2, none_N = np.tile(np.array(SIZE_PX), (count, 1)), np.zeros(count, np.int64)
    pixels = np.memmap(folder / "pixels.bin", np.uint8, mode="r").view(np.ndarray)
    sha_N32, flags_N = np.zeros((count, 32), np.uint8), none_N.astype(np.uint8)
    return Pack(folder, size_N2, size_N2, none_N, sha_N32, flags_N, "", None, BYTES * np.arange(count), pixels, b"")


def epoch(pack: Pack, batch: int, work_ms: float, ahead: bool) -> tuple[float, float]:
    """Milliseconds per step of copying and of asking; the first step, which nothing can have asked for, is left out."""
    order = np.random.default_rng(1).permutation(len(pack))
    steps = np.split(order[: len(pack) // batch * batch], len(pack) // batch)
    buffer = np.empty(batch * BYTES, np.uint8)
    copying, asking = [], []
    for step, place_B in enumerate(steps):
        began = time.perf_counter()
        for i, place in enumerate(place_B):
            buffer[i * BYTES : (i + 1) * BYTES] = pack.image(int(place)).reshape(-1)
        copied = time.perf_counter()
        if ahead and step + 1 < len(steps):
            pack.read_ahead(steps[step + 1])
        asked = time.perf_counter()
        time.sleep(work_ms / 1000)
        copying.append(1000 * (copied - began))
        asking.append(1000 * (asked - copied))
    return float(np.mean(copying[1:])), float(np.mean(asking[1:-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--work-ms", type=float, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        write(folder, given.images)
        found: dict[tuple[str, bool], list[tuple[float, float]]] = {}
        for _ in range(given.rounds):
            for state, ahead in (("cold", False), ("cold", True), ("warm", False), ("warm", True)):
                if state == "cold":
                    drop(folder)
                pack = opened(folder, given.images)
                found.setdefault((state, ahead), []).append(epoch(pack, given.batch, given.work_ms, ahead))
                del pack  # unmapped, so that it can be dropped
    for (state, ahead), times in found.items():
        (copy_ms, ask_ms), spread = np.median(times, axis=0), np.ptp([copy for copy, _ in times])
        asked = f", and {ask_ms:.1f} ms asking" if ahead else ""
        line = f"{state}{', read ahead' if ahead else '':<12} {copy_ms:7.1f} ms (over the rounds +- {spread / 2:.1f})"
        Console(soft_wrap=True).print(f"{line} for {given.batch} images{asked}", highlight=False)


if __name__ == "__main__":
    main()
