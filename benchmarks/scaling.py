"""How cost grows: with ranks, with the images of a pack, with the objects of a probe; each in a process of its own.

    python benchmarks/scaling.py [--parts ranks build pack probe] [--json FILE]
    python benchmarks/scaling.py --quick                # a minute; its figures say nothing

ranks   one global batch shared by 1 to N processes under torchrun: gloo on CPUs (2), NCCL where there are GPUs (all)
build   decoding and packing small JPEGs, in one process
pack    opening a pack of N images, its first epoch's order, and the views of a step. The pack is a synthetic one: a
        true index, and pixels in a sparse file, so that 1,000,000 images of 64 px take no room on the disk. Reading
        them is as quick as memory: a real disk is not part of this
probe   k-NN of 512 queries in N objects with random features of width 384; a probe has more queries, and cost grows
        with their number

Memory is the highest that the process ever had; of it `own` is what is not a mapped file. `power` is the slope of log
cost over log size: 1 is linear, 0 does not grow. What takes longer than --limit-s is ended and said to.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import figures
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ssl_pretrain.errors import SslPretrainError
from ssl_pretrain.files import write_durably

SIZES = {"build": (100, 1000), "pack": (10**3, 10**4, 10**5, 10**6), "probe": (10**4, 10**5, 10**6)}
QUICK = {"build": (4, 8), "pack": (100, 1000), "probe": (300, 600)}
PARTS = ("ranks", "build", "pack", "probe")
SIDE_PX, BATCH, WIDTH, QUERIES, CLASSES = 64, 64, 384, 512, 39


# What a process of its own measures


def build(count: int, folder: Path) -> dict[str, Any]:
    """Seconds to pack JPEGs of 160 x 120 px, without other processes."""
    from PIL import Image

    from ssl_pretrain.data.building import build as pack

    random, files = np.random.default_rng(0), folder / "files"
    files.mkdir()
    for i in range(count):
        Image.fromarray(random.integers(0, 255, (120, 160, 3), np.uint8)).save(files / f"{i:07d}.jpg")
    figures.peak_rss_bytes(reset=True)
    began = time.perf_counter()
    pack([files], folder / "pack", processes=0)
    return {"seconds": time.perf_counter() - began}


def pack(count: int, folder: Path) -> dict[str, Any]:
    """Seconds until a pack can be used, and of the views of a step; the network's step knows no number of images."""
    from ssl_pretrain.backbones import InputSpec
    from ssl_pretrain.data.pack import open_pack
    from ssl_pretrain.methods.simclr import Config
    from ssl_pretrain.train.feed import Feed, Share

    written(folder, count)
    figures.peak_rss_bytes(reset=True)
    before, began = figures.own_bytes(), time.perf_counter()
    opened = open_pack(folder)
    open_s = time.perf_counter() - began
    plain = InputSpec((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 32)
    specs = Config(size_px=32).views()
    feed = Feed(opened, specs, min(BATCH, count), 0, None, plain, Share(), torch.device("cpu"))
    began = time.perf_counter()
    feed.part(0, 0)
    first_s = time.perf_counter() - began
    steps = max(2, min(30, feed.steps_per_epoch))
    seconds = []
    for step in range(1, steps):
        began = time.perf_counter()
        feed.part(step % feed.steps_per_epoch, 0)
        seconds.append(time.perf_counter() - began)
    after = figures.own_bytes()
    own = None if before is None or after is None else (after - before) / count
    return {"open_s": open_s, "first_s": first_s, "views_s": float(np.median(seconds)), "own_bytes_per_image": own}


def written(folder: Path, count: int, size_px: tuple[int, int] = (SIDE_PX, SIDE_PX)) -> None:
    """A pack of `count` images: the index that `open_pack` checks, and pixels that take no room."""
    from ssl_pretrain.data.pack import FORMAT, VERSION, fingerprint

    size_N2 = np.tile(np.array(size_px), (count, 1))
    bytes_N = size_N2.prod(1) * 3
    sha256_N32 = np.random.default_rng(0).integers(0, 256, (count, 32), np.uint8)
    with open(folder / "index.npz", "wb") as file:
        np.savez(
            file, size_N2=size_N2, original_N2=size_N2, offset_N=np.cumsum(bytes_N) - bytes_N, sha256_N32=sha256_N32,
            group_N=np.arange(count), flags_N=np.zeros(count, np.uint8),
            paths=np.frombuffer("\n".join(f"{i:09d}.jpg" for i in range(count)).encode(), np.uint8),
        )  # fmt: skip
    with open(folder / "pixels.bin", "wb") as file:
        file.truncate(int(bytes_N.sum()))
    made = {
        "format": FORMAT, "version": VERSION, "fingerprint": fingerprint(sha256_N32, None), "images": count,
        "pixel_bytes": int(bytes_N.sum()), "short_side_px": None, "group_regex": None, "groups": count,
        "duplicates": 0, "key": "",
    }  # fmt: skip
    write_durably(folder / "pack.json", json.dumps(made).encode())


def probe(count: int, folder: Path) -> dict[str, Any]:
    """Seconds of a query in a bank of so many objects, ten of them from each image."""
    from ssl_pretrain.probe.knn import vote

    random = np.random.default_rng(0)
    bank_ND = random.standard_normal((count, WIDTH), np.float32)
    query_QD = random.standard_normal((QUERIES, WIDTH), np.float32)
    for z in (bank_ND, query_QD):
        z /= np.linalg.norm(z, axis=1, keepdims=True)
    label_N, image_N = random.integers(0, CLASSES, count), np.arange(count) // 10
    figures.peak_rss_bytes(reset=True)
    began = time.perf_counter()
    vote(bank_ND, label_N, image_N, query_QD, np.full(QUERIES, -1), [20], 0.07, CLASSES)
    taken = time.perf_counter() - began
    return {"query_s": taken / QUERIES, "features_bytes": bank_ND.nbytes}


def ranks(count: int, folder: Path) -> dict[str, Any]:
    """Seconds of a step on this many ranks; what rank 0 says counts, as all wait for each other."""
    import peers
    from throughput import FULL, SMALL
    from throughput import QUICK as TINY

    quick = (folder / "quick").exists()
    steps = 2 if quick else 20
    work = next(iter((TINY if quick else FULL if torch.cuda.is_available() else SMALL).values()))
    run = peers.prepared(work, folder / "files", folder / "run", ("--views.engine", "torch") if quick else ())
    loop = peers.Ours(run, steps * work.batch)
    loop.epoch(1)
    run.fabric.barrier()
    taken = [work.batch * loop.seconds_per_image() for _ in range(1 if quick else 5)]
    return {"step_s": float(np.median(taken)), "rank": run.fabric.global_rank, "batch": work.batch}


CHILDREN: dict[str, Callable[[int, Path], dict[str, Any]]] = {
    "build": build, "pack": pack, "probe": probe, "ranks": ranks,
}  # fmt: skip


def child(part: str, size: int, folder: Path) -> None:
    """Measures, and writes what it found and the memory that it took; of several ranks the first one writes."""
    torch.set_num_threads(1)
    found = CHILDREN[part](size, folder)
    if found.get("rank", 0) == 0:
        found["peak_bytes"] = figures.peak_rss_bytes()
        write_durably(folder / "found.json", json.dumps(found).encode())


# Asking them


def measured(part: str, size: int, folder: Path, limit_s: float) -> dict[str, Any]:
    """What a new process found; `{"why": ...}` where it came to nothing."""
    words = [str(Path(__file__)), "--child", part, str(size), str(folder)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"] if part == "ranks" else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    try:
        done = subprocess.run(
            [sys.executable, *launcher, *words], env=env, capture_output=True, text=True, check=False, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        return {"why": f"longer than {limit_s:.0f} s"}
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise SslPretrainError(f"{part} {size}: {said[-1] if said else f'ended with {done.returncode}'}")
    found: dict[str, Any] = json.loads((folder / "found.json").read_bytes())
    return found


def grown(part: str, sizes: tuple[int, ...], limit_s: float) -> dict[str, Any]:
    """The part at every size, and how each of its figures grows; what took too long is not asked again larger."""
    rows: dict[int, dict[str, Any]] = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            rows[size] = measured(part, size, Path(folder), limit_s)
        if "why" in rows[size]:
            break
    whole = {size: row for size, row in rows.items() if "why" not in row}
    keys = [key for key in next(iter(whole.values()), {}) if key.endswith("_s") or key in ("seconds", "peak_bytes")]
    power = {
        key: figures.exponent(list(whole), [row[key] for row in whole.values()])
        for key in keys
        if len(whole) > 1 and all(row[key] is not None for row in whole.values())
    }
    return {"rows": {str(size): row for size, row in rows.items()}, "power": power}


def shared(most: int, given: argparse.Namespace) -> dict[str, Any]:
    """The same global batch on 1, 2, 4... ranks."""
    from peers import photographs
    from throughput import FULL, SMALL, packed
    from throughput import QUICK as TINY

    works = TINY if given.quick else FULL if torch.cuda.is_available() else SMALL
    name, work = next(iter(works.items()))
    counts = sorted({*(2**i for i in range(most.bit_length()) if 2**i <= most), most})
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = photographs(given.images, max(work.batch, 8), folder)
        (folder / "files").symlink_to(files, target_is_directory=True)
        if given.quick:
            (folder / "quick").touch()
        packed(work, folder / "files", folder / "cache", ())
        for count in counts:
            rows[str(count)] = measured("ranks", count, folder, given.limit_s)
            (folder / "found.json").unlink(missing_ok=True)
    one = rows["1"].get("step_s")
    for count, row in rows.items():
        if one is not None and "step_s" in row:
            row["efficiency"] = figures.scaling_efficiency(one, row["step_s"], int(count))
    return {"work": name, "backend": "nccl" if torch.cuda.is_available() else "gloo", "rows": rows}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--images", default="synthetic:16", help="for the ranks: folder of images, or synthetic:N")
    parser.add_argument("--ranks", type=int, help="the most (2; with GPUs all of them)")
    parser.add_argument("--largest", type=int, default=10**6, help="leave out sizes above this")
    parser.add_argument("--limit-s", type=float, default=600.0, help="of each process")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    sizes = QUICK if given.quick else SIZES
    console, found = Console(width=150), {}
    for part in given.parts:
        if part == "ranks":
            found[part] = shared(given.ranks or max(2, torch.cuda.device_count()), given)
        else:
            found[part] = grown(part, tuple(n for n in sizes[part] if n <= given.largest), given.limit_s)
        console.print(table(part, found[part]))
    where = figures.machine()
    console.print(figures.in_words(where), highlight=False)
    figures.write(given.json, {"machine": where, "quick": given.quick, "found": found})


def table(part: str, found: dict[str, Any]) -> Table:
    columns: list[str] = []
    for row in found["rows"].values():
        columns += [key for key in row if key not in columns]
    shown = Table("ranks" if part == "ranks" else "N", *columns, title=f"{part} {found.get('work', '')}".strip())
    for size, row in found["rows"].items():
        shown.add_row(f"{int(size):,}", *(written_out(key, row.get(key)) for key in columns))
    if found.get("power"):
        shown.add_row("power", *(figures.cell(found["power"].get(key)) for key in columns))
    return shown


def written_out(key: str, value: Any) -> str:
    """A figure of a table in the unit that its name ends with.

    >>> written_out("query_s", 0.0071), written_out("peak_bytes", 3.07e9), written_out("batch", 64)
    ('7.10 ms', '3.070 GB', '64')
    """
    if value is None or (isinstance(value, str | int) and not key.endswith("_bytes")):
        return "–" if value is None else str(value)
    if key.endswith("_bytes"):
        return f"{value / 1e9:.3f} GB"
    if key.endswith("_s"):
        return f"{1000 * value:,.2f} ms"
    return f"{value:,.3f}"


if __name__ == "__main__":
    try:
        main()
    except SslPretrainError as error:
        raise SystemExit(str(error)) from error
