"""Decoding and reducing a JPEG on one core: as packs are built, against other ways with the packages at hand.

    python benchmarks/decoding.py --images chula_rbc12/images [--short-side-px 512] [--rounds 9] [--json FILE]
    python benchmarks/decoding.py --quick                # its figures say nothing

JPEGs of 1600 x 1200 px are made of the images. A way is safe if it refuses every file that was cut short; the fastest
of the safe ones is what the pack is compared with. CPU seconds of this process, medians over interleaved rounds.
torchvision 0.29 says that its decoders will go: the pack has none of them.
"""

from __future__ import annotations

import argparse
import io
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import figures
import numpy as np
import peers
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg

from ssl_pretrain.data.decode import _target, decode_bytes
from ssl_pretrain.data.files import Rejected
from ssl_pretrain.errors import SslPretrainError

PACK = "pack"
Way = Callable[[bytes, int], Any]


def packs(data: bytes, side: int) -> Any:
    return decode_bytes(data, side).pixels


def pillow(kind: Image.Resampling, draft: bool = False) -> Way:
    def way(data: bytes, side: int) -> Any:
        with Image.open(io.BytesIO(data)) as image:
            size = _target(*image.size, side)
            if draft:
                image.draft("RGB", size)
            return np.asarray(image.convert("RGB").resize(size, kind))

    return way


def torchs(data: bytes, side: int) -> Any:
    """torchvision's decoder and torch's antialiased filter, which torchvision's Resize takes too."""
    pixels_CHW = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    width, height = _target(pixels_CHW.shape[2], pixels_CHW.shape[1], side)
    small = interpolate(pixels_CHW[None], (height, width), mode="bicubic", antialias=True)
    return small[0].permute(1, 2, 0).contiguous().numpy()


WAYS: dict[str, Way] = {
    PACK: packs,
    "torchvision, bicubic": torchs,
    "Pillow, Lanczos": pillow(Image.Resampling.LANCZOS),
    "Pillow, bicubic": pillow(Image.Resampling.BICUBIC),
    "Pillow, halved by libjpeg, bicubic": pillow(Image.Resampling.BICUBIC, draft=True),
}


def refuses(way: Way, files: list[bytes], side: int) -> bool:
    """Files cut at a tenth, half and nine tenths, and without their last two bytes."""
    cuts = [data[: len(data) * tenths // 10] for data in files[:4] for tenths in (1, 5, 9)]
    for data in [*cuts, *(data[:-2] for data in files[:4])]:
        try:
            way(data, side)
        except (OSError, RuntimeError, Rejected):
            continue
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", default="synthetic:16", help="folder of images, or synthetic:N")
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--short-side-px", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.quick:
        given.images, given.count, given.rounds = "synthetic:2", 2, 1
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*decoding and encoding capabilities of TorchVision")
    with peers.scratch(None) as cache:
        folder = peers.photographs(given.images, given.count, cache)
        files = [path.read_bytes() for path in sorted(folder.iterdir())]

    def timed(way: Way) -> Callable[[], float]:
        def call() -> float:
            began = time.process_time()
            for data in files:
                way(data, given.short_side_px)
            return (time.process_time() - began) / len(files)

        return call

    taken = figures.rounds({name: timed(way) for name, way in WAYS.items()}, given.rounds)
    safe = {name: refuses(way, files, given.short_side_px) for name, way in WAYS.items()}
    others = {name: float(np.median(seconds)) for name, seconds in taken.items() if name != PACK and safe[name]}
    fastest = min(others, key=lambda name: others[name])
    rows = {
        name: {
            "ms": 1000 * float(np.median(seconds)), "refuses_cut_files": safe[name],
            "vs_fastest": figures.median_ratio(seconds, taken[fastest]),
        }
        for name, seconds in taken.items()
    }  # fmt: skip
    shown = Table("", "ms an image", f"times {fastest}", "refuses cut files")
    for name, row in rows.items():
        shown.add_row(name, f"{row['ms']:.2f}", f"{row['vs_fastest']:.2f}", "yes" if row["refuses_cut_files"] else "no")
    where, console = figures.machine(), Console(width=150)
    console.print(shown)
    console.print(f"{len(files)} JPEGs of {np.mean([len(f) for f in files]) / 1000:.0f} kB to {given.short_side_px} px")
    console.print(figures.in_words(where), highlight=False)
    figures.write(given.json, {"machine": where, "fastest": fastest, PACK: rows[PACK], "ways": rows})


if __name__ == "__main__":
    try:
        main()
    except SslPretrainError as error:
        raise SystemExit(str(error)) from error
