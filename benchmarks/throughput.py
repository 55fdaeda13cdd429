"""Images a second of whole training loops: this package, lightly's, a stable-pretraining-style one, and the limit.

    python benchmarks/throughput.py --images chula_rbc12/images [--json FILE]     # small networks; on a GPU full ones
    python benchmarks/throughput.py --images chula_rbc12/images --alone         # the efficiency only, without peers
    python benchmarks/throughput.py --quick                # a minute on drawn fields; its figures say nothing

All train the same network with the same batch on the same JPEGs of 1600 x 1200 px, made from the images at hand. In a
round each contender runs whole epochs in turn; worker processes live from the first round to the last. Reported are
medians over rounds: images a second; ratios within rounds; efficiency, which is the time of the limit (the same step on
views that are there already, of several batches in turn) over the contender's; MFU; the peak of GPU memory; and how
often a step waits for a value of the device (on a CPU an upper bound, see `figures.host_reads`). Our pack is built once
before; its time stands apart. Our own efficiency comes from a closer look: this loop and the limit take turns of a few
steps, as between two epochs of a minute a shared machine changes by more than there is to see. An efficiency above 1.02
ends with an error: then the limit is none.

Not the same work: lightly's example uses its own optimizer, a forward for each view and Pillow's box blur; Kornia
resizes without antialias. lightly-train runs as a program of its own, not interleaved, where it is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import figures
import numpy as np
import peers
import torch
from peers import Contender, Work
from rich.console import Console
from rich.table import Table

from ssl_pretrain.errors import SslPretrainError
from ssl_pretrain.train import setup
from ssl_pretrain.train.run import Run

SMALL_CROPS = {"global_size_px": 96, "local_size_px": 48, "prototypes": 4096}
FULL: dict[str, Work] = {
    "SimCLR ResNet-50, 2x224": Work({"backbone": "resnet50", "method": {"name": "simclr"}}, 256, 1024),
    "DINO ViT-S/16, 2x224+8x96": Work({"backbone": "vit_small_patch16_224", "method": {"name": "dino"}}, 128, 1024),
    "MAE ViT-B/16, 224": Work({"backbone": "vit_base_patch16_224", "method": {"name": "mae"}}, 256, 1024),
    "two views ViT-S/16, 2x224": Work({"backbone": "vit_small_patch16_224", "method": {"name": "simclr"}}, 256, 1024),
}
"""On a GPU. The last has the shape of the peers' published table: two views, batch 256."""
SMALL: dict[str, Work] = {
    "SimCLR ResNet-18, 2x96": Work({"backbone": "resnet18", "method": {"name": "simclr", "size_px": 96}}, 16, 1008),
    "DINO ViT-Ti/16, 2x96+8x48": Work(
        {"backbone": "vit_tiny_patch16_224", "method": {"name": "dino", **SMALL_CROPS}}, 16, 1008
    ),
    "MAE ViT-Ti/16, 128": Work(
        {"backbone": "vit_tiny_patch16_224", "method": {"name": "mae", "size_px": 128}}, 16, 1008
    ),
    "two views ViT-Ti/16, 2x96": Work(
        {"backbone": "vit_tiny_patch16_224", "method": {"name": "simclr", "size_px": 96}}, 16, 1008
    ),
}
"""On a CPU."""
TINY_HEAD = {"hidden_dim": 32, "output_dim": 16}
QUICK: dict[str, Work] = {
    "SimCLR, quick": Work({"backbone": "test_resnet", "method": {"name": "simclr", "size_px": 32, **TINY_HEAD}}, 4, 8),
    "DINO, quick": Work(
        {
            "backbone": {"name": "test_vit", "patch_size": 8},
            "method": {
                "name": "dino", "global_size_px": 32, "local_size_px": 16, "local_count": 2, "prototypes": 32,
                "hidden_dim": 32, "bottleneck_dim": 16,
            },
        }, 4, 8,
    ),
    "MAE, quick": Work(
        {
            "backbone": {"name": "test_vit", "patch_size": 8},
            "method": {"name": "mae", "size_px": 32, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2},
        }, 4, 8,
    ),
}  # fmt: skip
OURS, LIMIT = "this package", "limit"
CLOSE_STEPS = 4
"""Of a turn in the closer look at this package and the limit: as many as the limit has batches."""
CLOSE_SHARE = 0.25
"""Of the time that there is, at most, for that look."""
PEERS = ("lightly's example", "stacked Kornia")


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    torch.set_flush_denormal(True)  # for all: a network that has learned its few batches is full of denormals
    warnings.filterwarnings("ignore")
    cuda, console = torch.cuda.is_available(), Console(width=150)
    works = {name: work for name, work in given.all.items() if not given.work or any(w in name for w in given.work)}
    if given.epoch:
        works = {name: dataclasses.replace(work, epoch=given.epoch) for name, work in works.items()}
    if not works:
        raise SystemExit(f"--work {' '.join(given.work)} names none of: {'; '.join(given.all)}")
    where = figures.machine()
    peak = given.peak_tflops or (figures.peak_tflops(where["gpus"][0]) if cuda else None)
    found: dict[str, Any] = {}
    with peers.scratch(given.cache) as cache:
        files = peers.photographs(given.images, given.count, cache)
        jpegs = {"files": given.count, "mean_kB": peers.mean_bytes(files) / 1000, "from": Path(given.images).name}
        began = time.monotonic()
        for i, (name, work) in enumerate(works.items()):
            left_s = 60 * given.budget_minutes - (time.monotonic() - began)
            found[name] = measure(work, files, cache / f"run-{i}", given, left_s / (len(works) - i), peak)
            console.print(table(name, found[name]))
    console.print(figures.in_words(where), highlight=False)
    console.print(f"JPEGs: {jpegs}; {given.workers} workers of the peers; peak {peak or '–'} TFLOP/s", highlight=False)
    settings = {"rounds": given.rounds, "workers": given.workers, "quick": given.quick, "peak_tflops": peak}
    figures.write(given.json, {"machine": where, "settings": settings, "jpegs": jpegs, "works": found})
    if not given.quick:
        for name, one in found.items():
            figures.trusted({f"{name}, {who}": row["efficiency"] for who, row in one["contenders"].items()})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", help="folder of images to make the JPEGs of, or synthetic:N")
    parser.add_argument("--count", type=int, help="JPEGs to make (512; 1,024 with a GPU)")
    parser.add_argument("--work", nargs="+", default=[], metavar="PART", help="only works with this in their name")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epoch", type=int, help="images of an epoch, to try things; figures want 1,000 or more")
    parser.add_argument("--least-s", type=float, default=2.0, help="seconds of a contender's turn, in whole epochs")
    parser.add_argument("--close-rounds", type=int, default=24, help="of turns of a few steps: ours and the limit")
    parser.add_argument("--alone", action="store_true", help="this package and the limit only: the efficiency")
    parser.add_argument(
        "--budget-minutes", type=float, help="for all works; rounds are left out to keep it (9 on a GPU)"
    )
    parser.add_argument("--threads", type=int, help="of torch in the main process (one a core, as torch has it)")
    parser.add_argument("--workers", type=int, help="of the peers' DataLoaders (one a core)")
    parser.add_argument("--cache", type=Path, help="folder for JPEGs and packs, kept; without, they are removed")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of the GPU, where the table has it not")
    parser.add_argument("--small", action="store_true", help="the works of a CPU on a GPU too")
    parser.add_argument("--quick", action="store_true", help="tiny networks, few files: to see that it runs")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    cuda, cores = torch.cuda.is_available(), figures.machine()["cores"]
    given.all = QUICK if given.quick else FULL if cuda and not given.small else SMALL
    if given.quick:
        given.images, given.count, given.rounds, given.least_s = given.images or "synthetic:4", 8, 1, 0.0
        given.close_rounds = 2
    if not given.images:
        raise SystemExit("give --images, or --quick")
    given.count = given.count or (1024 if cuda else 512)
    given.threads = given.threads or cores
    given.workers = cores if given.workers is None else given.workers
    given.budget_minutes = given.budget_minutes or (9.0 if cuda else float("inf"))
    return given


# Measuring


def measure(
    work: Work, files: Path, folder: Path, given: argparse.Namespace, budget_s: float, peak: float | None
) -> dict[str, Any]:
    """All contenders at one work."""
    engine = ("--views.engine", "torch") if given.quick else ("--views.engine", "compiled")
    words = () if torch.cuda.is_available() else engine  # on a GPU what works best is taken without asking
    began = time.perf_counter()
    pack_s = packed(work, files, folder.parent / "cache", words)
    with ExitStack() as stack:
        made = {
            name: stack.enter_context(Sized(make))
            for name, make in contenders(work, files, folder, given.workers, words).items()
            if not (given.alone and name in PEERS)
        }
        limit = made[LIMIT].contender
        assert isinstance(limit, peers.Ready)
        flops = figures.flops(lambda: limit.epoch(1)) / work.batch
        reads = {name: reads_per_step(one.contender) for name, one in made.items()}
        left_s = budget_s - (time.perf_counter() - began)
        short_turns = {name: turn_of(made[name], given.least_s / 4, CLOSE_STEPS) for name in (OURS, LIMIT)}
        close = figures.rounds(short_turns, given.close_rounds, CLOSE_SHARE * left_s)
        left_s = budget_s - (time.perf_counter() - began)
        turns = {name: turn_of(one, given.least_s) for name, one in made.items()}
        taken = close if given.alone else figures.rounds(turns, given.rounds, left_s)
        peaks = {name: one.peak_bytes for name, one in made.items()}
        reason = limit.run.feed.engine.reason
        recipe = limit.run.recipe
    looked = dict.fromkeys(made, taken) | {OURS: close}
    rows = {
        name: {
            "images_per_s": float(1 / np.median(seconds_R)),
            **{f"vs_{short(peer)}": figures.median_ratio(taken[peer], seconds_R) for peer in PEERS if peer in taken},
            "efficiency": figures.efficiency(looked[name][LIMIT], looked[name][name]),
            "mfu": figures.mfu(flops, float(1 / np.median(seconds_R)), peak) if peak else None,
            "peak_bytes": peaks[name],
            "host_reads_per_step": reads[name],
            "seconds_per_image": seconds_R,
        }
        for name, seconds_R in taken.items()
    }
    train_s, why = None, "not asked"
    if not given.quick and not given.alone:
        train_s, why = peers.lightly_train(recipe, files, work, given.workers, epochs=2)
    return {
        "contenders": rows, "batch": work.batch, "images_per_epoch": work.epoch, "gflop_per_image": flops / 1e9,
        "close": close, "pack_s": pack_s, "views": reason, "precision": recipe.train.precision,
        "lightly_train": {"images_per_s": 1 / train_s if train_s else None, "why": why},
    }  # fmt: skip


PACK = """
import sys, time
from pathlib import Path
from ssl_pretrain.data.building import pack_or_folder
files, cache, side = sys.argv[1:]
began = time.perf_counter()
pack_or_folder(Path(files), Path(cache), int(side))
print(time.perf_counter() - began)
"""


def packed(work: Work, files: Path, cache: Path, words: tuple[str, ...]) -> float:
    """Seconds to build the pack; of one that is there already, to find that out.

    In a process of its own: decoding processes import the script that asked for them, and this one imports much.
    """
    recipe = work.resolved(files, words)
    side = recipe.views.short_side_px or setup.short_side_px(recipe.specs(), recipe.views.window_px)
    given = [sys.executable, "-c", PACK, str(files), str(cache), str(side)]
    done = subprocess.run(given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SslPretrainError(f"the pack could not be built: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout)


def contenders(
    work: Work, files: Path, folder: Path, workers: int, words: tuple[str, ...]
) -> Mapping[str, Callable[[], Contender]]:
    """How each is made; every one trains weights of its own."""

    def run(name: str) -> Run:
        return peers.prepared(work, files, folder.with_name(f"{folder.name}-{name}"), words)

    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    return {
        OURS: lambda: peers.Ours(run("ours"), work.epoch),
        PEERS[0]: lambda: peers.Lightly(work.resolved(files, words), files, work, workers, device),
        PEERS[1]: lambda: peers.Stacked(run("stacked"), files, work, workers),
        LIMIT: lambda: peers.Ready(run("limit"), work.epoch),
    }


class Sized:
    """A contender and the GPU memory that it takes beside the others'."""

    def __init__(self, make: Callable[[], Contender]) -> None:
        before = allocated()
        self.contender = make()
        self.own_bytes = allocated() - before
        self.peak_bytes: int | None = None

    def __enter__(self) -> Sized:
        return self

    def __exit__(self, *error: object) -> None:
        self.contender.close()

    def turn(self, least_s: float, steps: int | None) -> float:
        """Seconds an image, and beside it the highest that memory came."""
        if not torch.cuda.is_available():
            return self.contender.seconds_per_image(least_s, steps)
        before = allocated()
        torch.cuda.reset_peak_memory_stats()
        taken = self.contender.seconds_per_image(least_s, steps)
        self.peak_bytes = self.own_bytes + torch.cuda.max_memory_allocated() - before
        self.own_bytes += allocated() - before  # the optimizer's moments come with the first step
        return taken


def allocated() -> int:
    """Bytes of GPU memory in use; 0 without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def turn_of(one: Sized, least_s: float, steps: int | None = None) -> Callable[[], float]:
    """A turn of whole epochs, or of so many steps at a time."""
    return lambda: one.turn(least_s, steps)


def reads_per_step(contender: Contender, steps: int = 10) -> float:
    """Over as many steps as lie between two lines of our log, after one that warms up."""
    contender.epoch(1)
    steps = min(steps, contender.steps)
    return figures.host_reads(lambda: contender.epoch(steps), contender.device) / steps


# Showing


def short(name: str) -> str:
    """lightly's example -> lightly; stacked Kornia -> stacked.

    >>> short("lightly's example"), short("stacked Kornia")
    ('lightly', 'stacked')
    """
    return name.split()[0].removesuffix("'s")


def table(name: str, one: Mapping[str, Any]) -> Table:
    ratios = [f"times {peer}" for peer in PEERS]
    said = f"{name}; batch {one['batch']}, {one['gflop_per_image']:.1f} GFLOP/image, pack {one['pack_s']:.1f} s before"
    shown = Table("", "images/s", *ratios, "efficiency", "MFU", "peak GB", "host reads/step", title=said)
    for who, row in one["contenders"].items():
        peak = None if row["peak_bytes"] is None else row["peak_bytes"] / 1e9
        cells = (
            row["images_per_s"],
            *(row.get(f"vs_{short(peer)}") for peer in PEERS),
            row["efficiency"],
            row["mfu"],
            peak,
        )
        forms = (",.1f", ".2f", ".2f", ".3f", ".3f", ".1f")
        shown.add_row(who, *map(figures.cell, cells, forms), figures.cell(row["host_reads_per_step"], ".1f"))
    train = one["lightly_train"]
    shown.add_row("lightly-train", figures.cell(train["images_per_s"], ",.1f"))
    shown.caption = f"lightly-train: {train['why']}" if train["why"] else None
    return shown


if __name__ == "__main__":
    try:
        main()
    except SslPretrainError as error:
        raise SystemExit(str(error)) from error
