"""Where the images of a run are kept: in GPU memory if that has room, else in pinned RAM, else in the mapped file.

Wherever they are, a step sees the same bytes. `choose` decides, `open_store` carries it out. A store is read from any
CUDA stream, but by one thread.

Legend: B images of a step, or of one part of it; N images of the pack; C chunks.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_pretrain.data.pack import Pack
from ssl_pretrain.errors import UsageError

Where = Literal["gpu", "pinned", "mapped"]
Wanted = Literal["auto", "gpu", "pinned", "mapped"]

GPU_PERCENT = 25
"""Of free GPU memory that the images may take: the network, its activations and the views need the rest."""
RAM_PERCENT = 50
"""Of available RAM that the copies of all processes of a node may take."""
CHUNK_BYTES = 1 << 28
"""Of pinned RAM. A power of two, as torch rounds every pinned allocation up to one: one alone of 9 GB would take 17."""
STAGING_BYTES = 1 << 26
"""Of the buffers through which the images go to GPU memory."""


class Choice(NamedTuple):
    """Where the images are kept, and why, in words."""

    where: Where
    reason: str


def choose(
    pack_bytes: int,
    device_type: str,
    wanted: Wanted,
    gpu_free_bytes: int,
    ram_free_bytes: int | None,
    ranks_here: int,
) -> Choice:
    """Where `pack_bytes` of images are kept by each of the `ranks_here` processes of this node.

    `ram_free_bytes` is None where the system does not say; then only a recipe that asks for it gets a copy in RAM.
    What a recipe asks for need not keep to the shares, but it has to fit: else `UsageError`.

    >>> choose(5_900_000_000, "cuda", "auto", 138_200_000_000, None, 1)
    Choice(where='gpu', reason='images: in GPU memory (5.9 GB of 138.2 GB free)')
    """
    cuda = device_type == "cuda"
    pack, asked = size(pack_bytes), "" if wanted == "auto" else ", as train.residency asks"
    of_gpu = f"{pack} of {size(gpu_free_bytes)} free"
    copies = pack if ranks_here == 1 else f"{ranks_here} processes x {pack}"
    of_ram = copies if ram_free_bytes is None else f"{copies} of {size(ram_free_bytes)} free"
    if wanted == "gpu":
        if not cuda:
            raise UsageError("train.residency is gpu, but this run uses no CUDA GPU: use auto, pinned or mapped")
        if pack_bytes > gpu_free_bytes:
            raise UsageError(f"train.residency is gpu, but the images do not fit into GPU memory ({of_gpu}): use auto")
    if wanted == "pinned" and ram_free_bytes is not None and ranks_here * pack_bytes > ram_free_bytes:
        raise UsageError(f"train.residency is pinned, but the images do not fit into RAM ({of_ram}): use auto")
    if wanted == "gpu" or (wanted == "auto" and cuda and 100 * pack_bytes <= GPU_PERCENT * gpu_free_bytes):
        return Choice("gpu", f"images: in GPU memory{asked} ({of_gpu})")
    if wanted == "pinned":
        return Choice("pinned", f"images: in {'pinned ' if cuda else ''}RAM{asked} ({of_ram})")
    if wanted == "mapped":
        return Choice("mapped", f"images: memory-mapped{asked} ({pack})")
    if not cuda:
        how = "the CPU reads the page cache itself" if device_type == "cpu" else "read through the page cache"
        return Choice("mapped", f"images: memory-mapped ({pack}; {how})")
    no_gpu = f"more than {GPU_PERCENT} % of {size(gpu_free_bytes)} of free GPU memory"
    if ram_free_bytes is None:
        return Choice("mapped", f"images: memory-mapped with read-ahead ({copies}: {no_gpu}; free RAM is unknown)")
    if 100 * ranks_here * pack_bytes <= RAM_PERCENT * ram_free_bytes:
        return Choice("pinned", f"images: in pinned RAM ({of_ram}; {no_gpu})")
    no_ram = f"more than {RAM_PERCENT} % of {size(ram_free_bytes)} of free RAM"
    return Choice("mapped", f"images: memory-mapped with read-ahead ({copies}: {no_gpu}, {no_ram})")


def size(count_bytes: int) -> str:
    """Bytes in words.

    >>> size(5_912_000_000), size(3_400_000)
    ('5.9 GB', '3.4 MB')
    """
    return f"{count_bytes / 1e9:.1f} GB" if count_bytes >= 10**8 else f"{count_bytes / 1e6:.1f} MB"


# What is free


def ram_free_bytes(root: Path = Path("/")) -> int | None:
    """RAM that this process can still have: the machine's, or what its control groups leave; None where unknown."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = min(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError):
        return None
    return max(0, min([free, *_left_by_groups(root)]))


def _left_by_groups(root: Path) -> Iterator[int]:
    """Bytes that each control group above this process has left, of version 2 and 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # A container may see its own group at the top, whatever the path says.
        group = top / path.lstrip("/")
        for folder in [group, *group.parents][: len(group.parts) - len(top.parts) + 1]:
            try:
                yield int((folder / limit).read_text()) - int((folder / used).read_text()) + _page_cache(folder)
            except (OSError, ValueError):  # there is none, or it says "max"
                continue


def _page_cache(group: Path) -> int:
    """Bytes that a group uses for files; the kernel gives them back when asked, so they count as free."""
    pairs = [line.split() for line in (group / "memory.stat").read_text().splitlines()]
    stat = {name: int(value) for name, value in pairs}
    return sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in ("active_file", "inactive_file"))


# Stores


class Store(ABC):
    """The images of a pack, for one device."""

    def __init__(self, pack: Pack) -> None:
        self.size_N2, self.offset_N = pack.size_N2, pack.offset_N
        self.bytes_N = 3 * pack.size_N2.prod(1)

    @abstractmethod
    def flat(self, place_B: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
        """A flat uint8 tensor that holds these images of the pack, and the first byte of each in it.

        On a GPU it belongs to the stream that is current at the call.
        """

    def images(self, place_B: NDArray[np.int64]) -> list[Tensor]:
        """These images of the pack, uint8 (H, W, 3): views of `flat`."""
        flat, offset_B = self.flat(place_B)
        shapes = zip(offset_B.tolist(), self.size_N2[place_B].tolist(), strict=True)
        return [flat[start : start + h * w * 3].view(h, w, 3) for start, (h, w) in shapes]

    def _room(self, place_B: NDArray[np.int64], device: torch.device) -> tuple[Tensor, NDArray[np.int64]]:
        """A tensor for these images, one after another, and where each begins in it."""
        end_B = self.bytes_N[place_B].cumsum()
        return torch.empty(int(end_B[-1]), dtype=torch.uint8, device=device), end_B - self.bytes_N[place_B]


class Whole(Store):
    """All images in one tensor: the mapped file itself, or a copy of it."""

    def __init__(self, pack: Pack, flat: Tensor) -> None:
        super().__init__(pack)
        self._flat = flat

    def flat(self, place_B: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
        """The tensor, without a copy."""
        return self._flat, self.offset_N[place_B]


class Pinned(Store):
    """All images in pinned RAM; those of a step are copied to the device, each asynchronously."""

    def __init__(self, pack: Pack, device: torch.device, chunk_bytes: int = CHUNK_BYTES) -> None:
        super().__init__(pack)
        self.device = device
        first_C = chunks(pack.offset_N, len(pack.pixels), chunk_bytes)
        start_C = pack.offset_N[first_C]
        self._chunk_N = np.repeat(np.arange(len(first_C)), np.diff([*first_C, len(pack)]))
        self._start_N = pack.offset_N - start_C[self._chunk_N]
        mapped = as_tensor(pack.pixels)
        self._chunks = [
            pinned_bytes(end - start, device).copy_(mapped[start:end])
            for start, end in pairwise([*start_C.tolist(), len(mapped)])
        ]

    def flat(self, place_B: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
        """These images alone; the chunks are never written again, so nothing has to wait for the copies."""
        flat, offset_B = self._room(place_B, self.device)
        for place, to in zip(place_B.tolist(), offset_B.tolist(), strict=True):
            start, count = int(self._start_N[place]), int(self.bytes_N[place])
            image = self._chunks[self._chunk_N[place]][start : start + count]
            flat[to : to + count].copy_(image, non_blocking=True)
        return flat, offset_B


class Staged(Store):
    """All images in the mapped file; those of a step are gathered in a buffer in pinned RAM and copied at once."""

    def __init__(self, pack: Pack, device: torch.device) -> None:
        super().__init__(pack)
        self.device, self._mapped, self._staging = device, as_tensor(pack.pixels), Staging(device)

    def flat(self, place_B: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
        """These images alone."""
        flat, offset_B = self._room(place_B, self.device)
        starts = zip(self.offset_N[place_B].tolist(), self.bytes_N[place_B].tolist(), strict=True)
        self._staging.send([self._mapped[start : start + count] for start, count in starts], flat)
        return flat, offset_B


class Staging:
    """A buffer in pinned RAM on the way to the device."""

    def __init__(self, device: torch.device, count_bytes: int = 0) -> None:
        self.device, self._buffer = device, pinned_bytes(count_bytes, device)
        self._sent: torch.cuda.Event | None = None

    def send(self, pieces: Sequence[Tensor], to: Tensor) -> None:
        """Copies pieces of flat bytes, one after another, to `to`; on a GPU it returns before they are there."""
        if self._sent is not None:
            self._sent.synchronize()  # the last copy may still be reading the buffer
        if len(to) > len(self._buffer):
            self._buffer = pinned_bytes(len(to), self.device)
        start = 0
        for piece in pieces:
            self._buffer[start : start + len(piece)].copy_(piece)
            start += len(piece)
        self._sent = copy_async(self._buffer[:start], to)


def copy_async(source: Tensor, to: Tensor) -> torch.cuda.Event | None:
    """Copies on the current stream; returns what to wait for before the source is written again (None: nothing)."""
    to.copy_(source, non_blocking=True)
    return torch.cuda.current_stream(to.device).record_event() if to.is_cuda else None


def open_store(where: Where, pack: Pack, device: torch.device) -> Store:
    """The images of a pack where `choose` wants them. On devices other than CUDA they stay on the CPU."""
    if device.type != "cuda":
        mapped = as_tensor(pack.pixels)
        return Whole(pack, mapped if where == "mapped" else mapped.clone())
    if where == "gpu":
        return Whole(pack, upload(as_tensor(pack.pixels), device))
    return Pinned(pack, device) if where == "pinned" else Staged(pack, device)


def upload(mapped: Tensor, device: torch.device, staging_bytes: int = STAGING_BYTES) -> Tensor:
    """Flat bytes on the device; they go through two buffers, one of which is filled while the other is emptied."""
    flat = torch.empty_like(mapped, device=device)
    buffers = [Staging(device, min(staging_bytes, len(mapped))) for _ in range(2)]
    for i, start in enumerate(range(0, len(mapped), staging_bytes)):
        some = slice(start, start + staging_bytes)
        buffers[i % 2].send([mapped[some]], flat[some])
    if flat.is_cuda:
        torch.cuda.synchronize(device)  # once, as any stream may read it from now on
    return flat


def chunks(offset_N: NDArray[np.int64], count_bytes: int, chunk_bytes: int) -> NDArray[np.int64]:
    """The first image of each chunk: as many whole images as fit, and at least one.

    >>> chunks(np.array([0, 4, 8, 20, 24]), 28, 10)
    array([0, 2, 3])
    """
    end_N = np.append(offset_N[1:], count_bytes)
    first, after = [], 0
    while after < len(offset_N):
        first.append(after)
        fits = int(np.searchsorted(end_N, offset_N[after] + chunk_bytes, side="right"))
        after = max(fits, after + 1)
    return np.array(first)


def pinned_bytes(count: int, device: torch.device) -> Tensor:
    """A flat uint8 tensor in RAM, pinned where the device is a CUDA GPU."""
    return torch.empty(count, dtype=torch.uint8, pin_memory=device.type == "cuda")


def as_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """Read-only pixels as a tensor, without a copy."""
    with warnings.catch_warnings():  # torch has no read-only tensors and says so; nobody writes into this one
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(pixels)
