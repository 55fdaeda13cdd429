"""A pack that is larger than memory: what its ranks hold, read and reach, against the same run with room for all of it.

    python benchmarks/larger.py [--images 3000] [--limit-GB 2.0] [--ranks 1 2] [--rounds 3] [--folder DIR] [--json FILE]
    python benchmarks/larger.py --quick                  # its figures say nothing

A pack of 683 x 512 px images (1 MB each, random pixels, on the disk that DIR is on) is trained on by a network so small
that reading is most of the work: the worst case. The processes run in a control group that may have LIMIT of memory,
page cache included, and then in one without a limit after the whole pack was read once. Reported are images a second,
what the group's processes had for themselves (`own`) and as page cache at most, and what they read from the disk, as a
share of what they needed. Linux, and root, as control groups are only made by it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import figures
import numpy as np
import yaml
from reading import BYTES, SIZE_PX, drop, write
from rich.console import Console
from rich.table import Table
from scaling import written

from ssl_pretrain.errors import SslPretrainError

BATCH = 32
RECIPE: dict[str, Any] = {
    "backbone": "test_resnet",
    "method": {"name": "simclr", "size_px": 64, "hidden_dim": 32, "output_dim": 16},
    "train": {"batch_size": BATCH, "log_every_steps": 10, "save_every_minutes": 60},
    "views": {"engine": "torch"},
}


@dataclass
class Group:
    """A memory control group, of version 2 or 1."""

    folder: Path
    second: bool

    @classmethod
    def made(cls) -> Group:
        """A new one; `SslPretrainError` where that is not allowed."""
        top = Path("/sys/fs/cgroup")
        second = (top / "cgroup.controllers").exists()
        folder = (top if second else top / "memory") / f"ssl_pretrain_{os.getpid()}"
        try:
            if second:
                (top / "cgroup.subtree_control").write_text("+memory")
            folder.mkdir()
        except OSError as error:
            raise SslPretrainError(
                f"no memory control group can be made here ({error.strerror}): run as root"
            ) from error
        return cls(folder, second)

    def limit(self, wanted_bytes: int | None) -> None:
        """Of memory with page cache; None for none."""
        none = "max" if self.second else "-1"
        name = "memory.max" if self.second else "memory.limit_in_bytes"
        (self.folder / name).write_text(none if wanted_bytes is None else str(wanted_bytes))

    def has(self) -> tuple[int, int]:
        """Bytes that its processes have for themselves, and of page cache."""
        rows = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        own, cache = ("anon", "file") if self.second else ("total_rss", "total_cache")
        return int(rows[own]), int(rows[cache])

    def removed(self) -> None:
        """When the last process has left it."""
        for _ in range(50):
            try:
                self.folder.rmdir()
            except OSError:
                time.sleep(0.1)
            else:
                return


def filled(folder: Path, count: int) -> int:
    """A pack of random pixels; returns their bytes."""
    written(folder, count, SIZE_PX)
    write(folder, count)
    return count * BYTES


def trained(ranks: int, pack: Path, folder: Path, group: Group, steps: int) -> dict[str, Any]:
    """A run in the group."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "train": {**RECIPE["train"], "steps": steps}}))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    out = Path(tempfile.mkdtemp(dir=folder))
    words = [
        "-m",
        "ssl_pretrain.cli",
        "pretrain",
        str(folder / "recipe.yaml"),
        "--data",
        str(pack),
        "--out",
        str(out / "run"),
    ]
    within = f'echo $$ > "{group.folder}/cgroup.procs" && exec "$@"'
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = ["sh", "-c", within, "sh", sys.executable, *launcher, *words]
    before = read_bytes(pack)
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    most = [0, 0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            most[:] = map(max, most, group.has())

    watching = threading.Thread(target=watch)
    watching.start()
    said, _ = child.communicate()
    done.set()
    watching.join()
    if child.returncode:
        raise SslPretrainError(f"{ranks} ranks: {said.strip().splitlines()[-1]}")
    lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    rate = [line["train/images_per_s"] for line in lines if "train/images_per_s" in line][1:]
    needed = steps * BATCH * BYTES
    return {
        "images_per_s": float(np.median(rate)), "own_bytes": most[0], "cache_bytes": most[1],
        "read_share": (read_bytes(pack) - before) / needed,
    }  # fmt: skip


def read_bytes(folder: Path) -> int:
    """That the disk under a folder has read since the machine began, in sectors of 512 bytes."""
    device = os.stat(folder).st_dev
    numbers = f"{os.major(device)} {os.minor(device)}".split()
    lines = [line.split() for line in Path("/proc/diskstats").read_text().splitlines()]
    return next((512 * int(line[5]) for line in lines if line[:2] == numbers), 0)


def warmed(pack: Path) -> None:
    """All of it in the page cache."""
    with open(pack / "pixels.bin", "rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--limit-GB", type=float, default=2.0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.quick:
        given.images, given.limit_GB, given.ranks, given.steps, given.rounds = 64, 1.0, [1], 20, 1
    group, console = Group.made(), Console(width=150)
    rows: dict[str, list[dict[str, Any]]] = {}
    try:
        with tempfile.TemporaryDirectory(dir=given.folder) as name:
            folder, pack = Path(name), Path(name) / "pack"
            pack.mkdir()
            total = filled(pack, given.images)
            for _ in range(given.rounds):
                for ranks in given.ranks:
                    for limited in (True, False):
                        if limited:
                            drop(pack)
                        else:
                            warmed(pack)
                        group.limit(int(given.limit_GB * 1e9) if limited else None)
                        found = trained(ranks, pack, folder, group, given.steps)
                        rows.setdefault(f"{ranks} {'limited' if limited else 'room'}", []).append(found)
    finally:
        group.removed()
    shown = Table("", "images/s", "own GB", "page cache GB", "read from the disk")
    medians = {what: {key: float(np.median([r[key] for r in each])) for key in each[0]} for what, each in rows.items()}
    for what, row in medians.items():
        shown.add_row(
            what, f"{row['images_per_s']:,.0f}", f"{row['own_bytes'] / 1e9:.2f}", f"{row['cache_bytes'] / 1e9:.2f}",
            f"{100 * row['read_share']:.0f} %",
        )  # fmt: skip
    ratios = {
        str(n): figures.median_ratio(*([r["images_per_s"] for r in rows[f"{n} {how}"]] for how in ("limited", "room")))
        for n in given.ranks
    }
    console.print(shown, f"a pack of {total / 1e9:.2f} GB, limit {given.limit_GB} GB; limited / room: {ratios}")
    where = figures.machine()
    console.print(figures.in_words(where), highlight=False)
    settings = {"pack_bytes": total, "limit_bytes": given.limit_GB * 1e9, "steps": given.steps, "batch": BATCH}
    figures.write(
        given.json, {"machine": where, "settings": settings, "medians": medians, "ratios": ratios, "rows": rows}
    )


if __name__ == "__main__":
    try:
        main()
    except SslPretrainError as error:
        raise SystemExit(str(error)) from error
