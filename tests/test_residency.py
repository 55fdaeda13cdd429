"""Where the images are kept changes no bit of what a step sees; the choice is by hand-checked figures and is said."""

from __future__ import annotations

import ctypes
import io
import json
import mmap
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small
from rich.console import Console

from ssl_pretrain import pretrain, rng
from ssl_pretrain.backbones import InputSpec
from ssl_pretrain.data.pack import Pack
from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods import Views
from ssl_pretrain.train import residency, setup
from ssl_pretrain.train.checkpoint import Checkpoints
from ssl_pretrain.train.feed import Feed, Lookahead, Share, image
from ssl_pretrain.train.recipe import load
from ssl_pretrain.train.residency import Pinned, Staged, Staging, Store, Whole, choose, open_store, ram_free_bytes

CPU = torch.device("cpu")
FED = InputSpec((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 32)
GB = 10**9


# The choice


@pytest.mark.parametrize(
    ("pack", "device", "wanted", "gpu_free", "ram_free", "ranks", "where", "reason"),
    [
        (5.9, "cuda", "auto", 138.2, 100, 1, "gpu", "in GPU memory (5.9 GB of 138.2 GB free)"),
        # A quarter exactly, and a byte more.
        (10, "cuda", "auto", 40, 100, 1, "gpu", "in GPU memory (10.0 GB of 40.0 GB free)"),
        (10 + 1e-9, "cuda", "auto", 40, 100, 1, "pinned",
         "in pinned RAM (10.0 GB of 100.0 GB free; more than 25 % of 40.0 GB of free GPU memory)"),
        # Half of the RAM exactly, and a byte more.
        (10, "cuda", "auto", 8, 20, 1, "pinned",
         "in pinned RAM (10.0 GB of 20.0 GB free; more than 25 % of 8.0 GB of free GPU memory)"),
        (10 + 1e-9, "cuda", "auto", 8, 20, 1, "mapped",
         "memory-mapped with read-ahead (10.0 GB: more than 25 % of 8.0 GB of free GPU memory, "
         "more than 50 % of 20.0 GB of free RAM)"),
        # Every process of the node has a copy in RAM, and a GPU of its own.
        (10, "cuda", "auto", 8, 160, 8, "pinned",
         "in pinned RAM (8 processes x 10.0 GB of 160.0 GB free; more than 25 % of 8.0 GB of free GPU memory)"),
        (10, "cuda", "auto", 8, 159, 8, "mapped",
         "memory-mapped with read-ahead (8 processes x 10.0 GB: more than 25 % of 8.0 GB of free GPU memory, "
         "more than 50 % of 159.0 GB of free RAM)"),
        (10, "cuda", "auto", 40, 0, 8, "gpu", "in GPU memory (10.0 GB of 40.0 GB free)"),
        (10, "cuda", "auto", 8, None, 1, "mapped",
         "memory-mapped with read-ahead (10.0 GB: more than 25 % of 8.0 GB of free GPU memory; free RAM is unknown)"),
        # What is asked for has to fit, no more.
        (40, "cuda", "gpu", 40, 0, 1, "gpu", "in GPU memory, as train.residency asks (40.0 GB of 40.0 GB free)"),
        (20, "cuda", "pinned", 80, 40, 2, "pinned",
         "in pinned RAM, as train.residency asks (2 processes x 20.0 GB of 40.0 GB free)"),
        (20, "cuda", "pinned", 80, None, 1, "pinned", "in pinned RAM, as train.residency asks (20.0 GB)"),
        (1, "cuda", "mapped", 80, 40, 1, "mapped", "memory-mapped, as train.residency asks (1.0 GB)"),
        # Without CUDA.
        (5.9, "cpu", "auto", 0, 100, 1, "mapped", "memory-mapped (5.9 GB; the CPU reads the page cache itself)"),
        (0.0034, "mps", "auto", 0, 100, 1, "mapped", "memory-mapped (3.4 MB; read through the page cache)"),
        (5.9, "cpu", "pinned", 0, 100, 1, "pinned", "in RAM, as train.residency asks (5.9 GB of 100.0 GB free)"),
        (5.9, "cpu", "mapped", 0, 100, 1, "mapped", "memory-mapped, as train.residency asks (5.9 GB)"),
    ],
)  # fmt: skip
def test_the_choice_and_its_reason(
    pack: float, device: str, wanted: Any, gpu_free: float, ram_free: float | None, ranks: int, where: str, reason: str
) -> None:
    free = None if ram_free is None else round(ram_free * GB)
    found = choose(round(pack * GB), device, wanted, round(gpu_free * GB), free, ranks)
    assert found == (where, f"images: {reason}")


@pytest.mark.parametrize(
    ("device", "wanted", "gpu_free", "ram_free", "ranks", "said"),
    [
        ("cuda", "gpu", 10 * GB - 1, 100 * GB, 1, r"do not fit into GPU memory \(10.0 GB of 10.0 GB free\): use auto"),
        ("cuda", "pinned", 0, 20 * GB - 1, 2, r"do not fit into RAM \(2 processes x 10.0 GB of 20.0 GB free\)"),
        ("cpu", "pinned", 0, 9 * GB, 1, r"do not fit into RAM \(10.0 GB of 9.0 GB free\): use auto"),
        ("cpu", "gpu", 0, 100 * GB, 1, "train.residency is gpu, but this run uses no CUDA GPU"),
        ("mps", "gpu", 0, 100 * GB, 1, "train.residency is gpu, but this run uses no CUDA GPU"),
    ],
)
def test_what_cannot_be_is_refused_with_the_sizes(
    device: str, wanted: Any, gpu_free: int, ram_free: int, ranks: int, said: str
) -> None:
    with pytest.raises(UsageError, match=said) as error:
        choose(10 * GB, device, wanted, gpu_free, ram_free, ranks)
    assert "\n" not in str(error.value)


def machine(root: Path, available_kb: int, group: str = "", **files: str) -> Path:
    """A root with what Linux says; `folder__name="..."` are files under sys/fs/cgroup."""
    (root / "proc" / "self").mkdir(parents=True)
    text = f"MemTotal:       99999999 kB\nMemAvailable:   {available_kb} kB\n"
    (root / "proc" / "meminfo").write_text(text)
    (root / "proc" / "self" / "cgroup").write_text(group)
    for name, content in files.items():
        path = root / "sys" / "fs" / "cgroup" / name.replace("__", "/").replace("DOT", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


STAT = "anon 5000\nfile 900\nactive_file 100\ninactive_file 200\nshmem 600\n"


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("", {}, 1024000),
        ("0::/\n", {}, 1024000),
        ("0::/\n", {"memoryDOTmax": "max\n", "memoryDOTcurrent": "500\n", "memoryDOTstat": STAT}, 1024000),
        # What the group holds for files is given back when asked for.
        ("0::/\n", {"memoryDOTmax": "9000\n", "memoryDOTcurrent": "7000\n", "memoryDOTstat": STAT}, 2300),
        ("0::/\n", {"memoryDOTmax": "9000000\n", "memoryDOTcurrent": "7000\n", "memoryDOTstat": STAT}, 1024000),
        ("0::/\n", {"memoryDOTmax": "9000\n", "memoryDOTcurrent": "9500\n", "memoryDOTstat": STAT}, 0),
        # Of groups within groups the tightest counts.
        ("0::/job/step\n", {
            "job__memoryDOTmax": "9000\n", "job__memoryDOTcurrent": "7000\n", "job__memoryDOTstat": STAT,
            "job__step__memoryDOTmax": "max\n", "job__step__memoryDOTcurrent": "10\n", "job__step__memoryDOTstat": STAT,
        }, 2300),
        # A container that sees its own group at the top, whatever the path says.
        ("0::/docker/1\n", {"memoryDOTmax": "9000\n", "memoryDOTcurrent": "7000\n", "memoryDOTstat": STAT}, 2300),
        # Version 1, whose statistics have a total over the groups within.
        ("9:name=systemd:/\n4:cpu,memory:/job\n", {
            "memory__job__memoryDOTlimit_in_bytes": "9000\n", "memory__job__memoryDOTusage_in_bytes": "7000\n",
            "memory__job__memoryDOTstat": STAT + "total_active_file 500\ntotal_inactive_file 500\n",
        }, 3000),
    ],
)  # fmt: skip
def test_free_ram_is_what_the_machine_and_the_groups_leave(
    group: str, files: dict[str, str], expected: int, tmp_path: Path
) -> None:
    assert ram_free_bytes(machine(tmp_path, 1000, group, **files)) == expected


def test_free_ram_of_this_machine_and_of_one_that_does_not_say(tmp_path: Path) -> None:
    assert ram_free_bytes(tmp_path) is None
    free = ram_free_bytes()
    assert free is None or 10**7 < free < 10**14
    assert free is not None or sys.platform != "linux"


# The stores


def stores(pack: Pack) -> dict[str, Store]:
    """Every kind that a CPU can hold; chunks of a few images, a chunk of its own for the larger ones."""
    return {
        "mapped": open_store("mapped", pack, CPU),
        "pinned": open_store("pinned", pack, CPU),
        "uploaded": Whole(pack, residency.upload(residency.as_tensor(pack.pixels), CPU, staging_bytes=1000)),
        "chunks": Pinned(pack, CPU, chunk_bytes=30_000),
        "chunk each": Pinned(pack, CPU, chunk_bytes=1),
        "one chunk": Pinned(pack, CPU),
        "staged": Staged(pack, CPU),
    }


def test_every_store_holds_the_images_of_the_pack(pack: Pack) -> None:
    random = np.random.default_rng(0)
    batches = [random.permutation(len(pack))[:count] for count in (40, 3, 1, 17)]
    batches += [np.array([5, 5, 0]), np.array([len(pack) - 1])]
    for name, store in stores(pack).items():
        for place_B in batches:
            flat, offset_B = store.flat(place_B)
            images = store.images(place_B)
            assert flat.dtype == torch.uint8 and flat.ndim == 1 and offset_B.dtype == np.int64
            assert len(images) == len(offset_B) == len(place_B)
            for place, offset, found in zip(place_B, offset_B, images, strict=True):
                expected = torch.from_numpy(pack.image(int(place)).copy())
                assert torch.equal(found, expected), name
                assert torch.equal(flat[offset : offset + expected.numel()].view(expected.shape), expected), name


def test_on_a_cpu_nothing_is_copied_unless_asked(pack: Pack) -> None:
    place_B = np.array([7, 0, 39])
    start = pack.pixels.ctypes.data
    for where, inside in (("mapped", True), ("pinned", False)):
        for found in open_store(where, pack, CPU).images(place_B):  # type: ignore[arg-type]
            assert (start <= found.data_ptr() < start + pack.pixels.nbytes) is inside
    assert image(pack, 7).data_ptr() == pack.image(7).ctypes.data


@pytest.mark.parametrize(
    ("bytes_N", "chunk", "first_C"),
    [
        ([4, 4, 4], 4, [0, 1, 2]),
        ([4, 4, 4], 8, [0, 2]),
        ([4, 4, 4], 7, [0, 1, 2]),
        ([4, 4, 4], 12, [0]),
        ([4, 4, 4], 1000, [0]),
        ([9, 1, 1, 9], 5, [0, 1, 3]),
        ([3], 1, [0]),
    ],
)
def test_chunks_are_whole_images(bytes_N: list[int], chunk: int, first_C: list[int]) -> None:
    end_N = np.cumsum(bytes_N)
    assert residency.chunks(end_N - bytes_N, int(end_N[-1]), chunk).tolist() == first_C


class Late:
    """A copy that happens as late as a stream may do it: when somebody waits for it."""

    def __init__(self, source: torch.Tensor, to: torch.Tensor) -> None:
        self.source, self.to, self.waited = source, to, False

    def synchronize(self) -> None:
        if not self.waited:
            self.to.copy_(self.source)
        self.waited = True


def test_a_staging_buffer_is_not_written_while_it_may_still_be_read(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of a stream are played by ones that are put off until they are waited for."""
    copies: list[Late] = []

    def late(source: torch.Tensor, to: torch.Tensor) -> Any:
        copies.append(Late(source, to))
        return copies[-1]

    monkeypatch.setattr(residency, "copy_async", late)
    staged = Staged(pack, CPU)
    batches = [np.array([3, 1]), np.array([9]), np.arange(40), np.array([2, 4, 6])]  # the third needs a larger buffer
    flats = [staged.flat(place_B)[0] for place_B in batches]
    copies[-1].synchronize()
    for flat, place_B in zip(flats, batches, strict=True):
        assert torch.equal(flat, torch.cat([image(pack, int(place)).flatten() for place in place_B]))
    copies.clear()
    flat = residency.upload(residency.as_tensor(pack.pixels), CPU, staging_bytes=5000)
    assert len({copy.source.data_ptr() for copy in copies}) == 2
    assert [copy.waited for copy in copies[-2:]] == [False, False]  # two are on their way at a time
    for copy in copies[-2:]:
        copy.synchronize()
    assert torch.equal(flat, residency.as_tensor(pack.pixels))


def test_staging_copies_and_does_not_lend_its_buffer() -> None:
    staging, first, second = Staging(CPU, 4), torch.zeros(4, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)
    staging.send([torch.tensor([1, 2, 3], dtype=torch.uint8), torch.tensor([4], dtype=torch.uint8)], first)
    staging.send([torch.tensor([8, 9], dtype=torch.uint8)], second)
    assert first.tolist() == [1, 2, 3, 4] and second.tolist() == [8, 9]


# Read-ahead


def in_cache(pixels: np.ndarray) -> np.ndarray:
    """Which pages of a map are in the page cache; asking reads none of them."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = (ctypes.c_ubyte * -(-len(pixels) // mmap.PAGESIZE))()
    if libc.mincore(ctypes.c_void_p(pixels.ctypes.data), ctypes.c_size_t(len(pixels)), pages) != 0:
        pytest.skip("mincore does not say what is in the page cache")
    return np.frombuffer(pages, np.uint8) & 1 == 1


def cold(folder: Path, size_N2: np.ndarray) -> Pack:
    """A pack of noise whose pixels are on the disk and not in the page cache."""
    folder.mkdir()
    end_N = np.cumsum(3 * size_N2.prod(1))
    with open(folder / "pixels.bin", "wb") as file:
        file.write(np.random.default_rng(0).integers(0, 256, end_N[-1], dtype=np.uint8))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    pixels = np.memmap(folder / "pixels.bin", np.uint8, mode="r").view(np.ndarray)
    count = len(size_N2)
    none_N, sha_N32 = np.zeros(count, np.int64), np.zeros((count, 32), np.uint8)
    sha_N32[:, -1] = np.arange(count)
    return Pack(folder, size_N2, size_N2, none_N, sha_N32, none_N.astype(np.uint8), "", None,
                end_N - 3 * size_N2.prod(1), pixels, b"")  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="posix_fadvise")
def test_read_ahead_brings_these_images_into_the_page_cache(tmp_path: Path) -> None:
    pack = cold(tmp_path / "pack", np.tile(np.array([600, 700]), (12, 1)))  # 1.3 MB each
    if in_cache(pack.pixels).any():
        pytest.skip("this file system keeps its pages")
    asked = np.array([2, 9, 5])
    began = time.monotonic()
    pack.read_ahead(asked)
    wanted = np.zeros(len(pack.pixels), bool)
    for place in asked:
        wanted[pack.offset_N[place] :][: 600 * 700 * 3] = True
    page_wanted = np.add.reduceat(wanted, np.arange(0, len(wanted), mmap.PAGESIZE)) > 0
    while in_cache(pack.pixels)[page_wanted].mean() < 0.95:  # a hint, of which a busy system may drop a part
        assert time.monotonic() - began < 60, f"{in_cache(pack.pixels)[page_wanted].mean():.1%} after a minute"
        time.sleep(0.01)
    assert in_cache(pack.pixels)[~page_wanted].mean() < 0.5  # some more at the ends is the system's affair


@pytest.mark.skipif(sys.platform != "linux", reason="posix_fadvise")
def test_read_ahead_asks_for_little_at_once_and_for_all_bytes(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux reads only the beginning of what is asked for at once if that is more than the disk's read_ahead_kb."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr("ssl_pretrain.data.pack.READ_AHEAD_BYTES", 1000)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, count, advice: asked.append((at, count)))
    pack.read_ahead(np.array([3, 1]))
    assert max(count for _, count in asked) == 1000 and min(count for _, count in asked) > 0
    bytes_found = [byte for at, count in asked for byte in range(at, at + count)]
    expected = [
        byte
        for place in (3, 1)
        for byte in range(pack.offset_N[place], pack.offset_N[place] + 3 * int(pack.size_N2[place].prod()))
    ]
    assert bytes_found == expected


def test_read_ahead_of_a_file_that_has_gone_is_no_error(tmp_path: Path) -> None:
    pack = cold(tmp_path / "pack", np.array([[8, 8]]))
    (tmp_path / "pack" / "pixels.bin").unlink()
    pack.read_ahead(np.array([0]))
    assert pack.image(0).shape == (8, 8, 3)


@pytest.mark.parametrize("ahead", [False, True])
def test_the_feed_reads_the_next_step_ahead_when_mapped(
    ahead: bool, pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    monkeypatch.setattr(Pack, "read_ahead", lambda self, place_B: asked.append(place_B.tolist()))
    made = feed(pack, Share(1, 2, parts=2), ahead=ahead)
    made.steps = 3
    for step in range(3):
        list(made.views(step))
    mine = [np.split(made.places(made.ids(step)), 2)[1].tolist() for step in range(3)]
    assert asked == mine[1:]  # this rank's share, once a step, nothing beyond the end
    asked.clear()
    copied = feed(pack, ahead=ahead, where="pinned")
    list(copied.views(0))
    assert not asked


# Looking ahead


def feed(pack: Pack, share: Share | None = None, ahead: bool = False, where: Any = "mapped") -> Feed:
    specs = load(small("dino")).specs()
    made = Feed(pack, specs, 8, 0, None, FED, share or Share(), CPU, where=where)
    made.looks_ahead = ahead
    return made


def same_views(a: Views, b: Views) -> bool:
    return (
        list(a.crops) == list(b.crops)
        and all(torch.equal(a.crops[name], b.crops[name]) for name in a.crops)
        and np.array_equal(a.key_B2, b.key_B2)
    )


@pytest.mark.parametrize("share", [Share(), Share(parts=4), Share(1, 2, parts=2)])
@pytest.mark.parametrize("where", ["mapped", "pinned"])
def test_looking_ahead_gives_the_same_bits(share: Share, where: str, pack: Pack) -> None:
    """Over the end of an epoch (of 5 steps), after a jump forwards, backwards, and a step that was left half-way."""
    plain, ahead = feed(pack, share), feed(pack, share, ahead=True, where=where)
    for step in (0, 1, 4, 5, 6, 3, 3, 11, 12):
        pairs = list(zip(plain.views(step), ahead.views(step), strict=True))
        assert len(pairs) == share.parts and all(same_views(a, b) for a, b in pairs), step
    next(ahead.views(13))
    ids_B = plain.ids(0)[:3]
    assert same_views(plain.draw(ids_B, 0), ahead.draw(ids_B, 0))
    assert all(same_views(a, b) for a, b in zip(plain.views(13), ahead.views(13), strict=True))


def test_the_views_are_the_same_from_every_store(pack: Pack) -> None:
    """Those of a GPU too, as far as a CPU can hold them: a staging buffer is reused from part to part."""
    share = Share(parts=2)
    plain = feed(pack, share)
    expected = [plain.draw(ids_B, 1) for ids_B in np.split(plain.ids(9), 2)]  # the last step of epoch 1
    for name, store in stores(pack).items():
        made = feed(pack, share, ahead=True)
        made.store = store
        list(made.views(8))
        assert all(same_views(a, b) for a, b in zip(expected, made.views(9), strict=True)), name


def test_what_is_drawn_when(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next part when this one has been worked on; nothing twice, nothing beyond the end."""
    log: list[Any] = []
    drawn = Feed.part

    def logged(self: Feed, step: int, part: int) -> Views:
        log.append((step, part))
        return drawn(self, step, part)

    monkeypatch.setattr(Feed, "part", logged)

    def work(ahead: bool) -> list[Any]:
        log.clear()
        made = feed(pack, Share(parts=2), ahead)
        made.steps = 3
        for step in range(3):
            for part, _ in enumerate(made.views(step)):
                log.append(f"work {step} {part}")
        return list(log)

    assert work(ahead=False) == [
        (0, 0), "work 0 0", (0, 1), "work 0 1", (1, 0), "work 1 0", (1, 1), "work 1 1",
        (2, 0), "work 2 0", (2, 1), "work 2 1",
    ]  # fmt: skip
    # Without threads the order of the calls is the same; what differs is who asks, as the next test shows.
    assert work(ahead=True) == work(ahead=False)


def test_the_next_step_is_drawn_before_the_step_is_left(pack: Pack) -> None:
    made = feed(pack, ahead=True)
    asked: list[tuple[int, int]] = []

    def part(step: int, part: int) -> Views:
        asked.append((step, part))
        return made.part(step, part)

    made.lookahead = Lookahead(part)
    views = made.views(0)
    next(views)
    assert asked == [(0, 0)]  # while the first part is worked on nothing else is drawn
    assert next(views, None) is None
    assert asked == [(0, 0), (1, 0)]
    next(made.views(1))
    assert asked == [(0, 0), (1, 0)]  # it was there
    next(made.views(7))
    assert asked == [(0, 0), (1, 0), (7, 0)]


def test_only_what_was_asked_for_is_taken_and_an_error_in_drawing_ahead_is_raised() -> None:
    broken, log = {(1, 0)}, []

    def draw(step: int, part: int) -> Views:
        log.append((step, part))
        if (step, part) in broken:
            raise OSError("the disk is gone")
        return Views({"view": torch.tensor([step, part])}, rng.key(0, "test"))

    lookahead = Lookahead(draw)
    lookahead.prepare(0, 1)
    assert lookahead.take(0, 0).crops["view"].tolist() == [0, 0]  # the other part of the step
    lookahead.prepare(0, 0)
    with pytest.raises(OSError, match="the disk is gone"):
        lookahead.prepare(1, 0)
    with pytest.raises(OSError, match="the disk is gone"):
        lookahead.take(1, 0)
    broken.clear()
    log.clear()
    lookahead.prepare(0, 0)
    broken.add((1, 0))
    with pytest.raises(OSError, match="the disk is gone"):
        lookahead.prepare(1, 0)
    assert lookahead.take(0, 0).crops["view"].tolist() == [0, 0]
    assert log == [(0, 0), (1, 0), (0, 0)]  # memory never holds two that were drawn ahead


class FakeStream:
    """Writes down what is asked of a stream; stands in for CUDA's calls only, it runs nothing beside anything."""

    device = CPU

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def __enter__(self) -> None:
        self.log.append(f"into {self.name}")

    def __exit__(self, *_: object) -> None:
        self.log.append(f"out of {self.name}")

    def record_event(self) -> str:
        self.log.append(f"event on {self.name}")
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


class FakeTensor:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def record_stream(self, stream: FakeStream) -> None:
        self.log.append(f"{self.name} is used on {stream.name}")


def test_the_calls_to_cuda_and_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the streams then do what they are told is for a GPU to show."""
    log: list[str] = []
    side, main = FakeStream("side", log), FakeStream("main", log)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)

    def draw(step: int, part: int) -> Any:
        log.append(f"draw {step} {part}")
        return Views({name: FakeTensor(name, log) for name in ("a", "b")}, rng.key(0, "test"))  # type: ignore[misc]

    lookahead = Lookahead(draw, side)  # type: ignore[arg-type]
    lookahead.prepare(1, 0)
    assert log == ["into side", "draw 1 0", "out of side", "event on side"]
    log.clear()
    lookahead.take(1, 0)
    assert log == ["main waits for event of side", "a is used on main", "b is used on main"]
    log.clear()
    lookahead.prepare(2, 0)
    lookahead.take(5, 0)  # another step is drawn where the work runs
    assert log[-1] == "draw 5 0" and not any(line.startswith("main") for line in log)


# Recipes and runs


def test_the_key_of_the_recipe() -> None:
    assert load(small("simclr")).train.residency == "auto"
    assert load(small("simclr"), ("--train.residency", "mapped")).train.residency == "mapped"
    with pytest.raises(UsageError, match="residency") as error:
        load(small("simclr", residency="disk"))
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"residency is gpu, but train.accelerator is cpu"):
        load(small("simclr", residency="gpu", accelerator="cpu"))


def test_a_forced_gpu_without_one_is_refused_before_anything_is_packed(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="torch sees no CUDA GPU") as error:
        pretrain(small("simclr"), data=images, out=tmp_path / "runs" / "a", words=("--train.residency", "gpu"))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_processes_of_this_node_are_counted(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load(small("simclr", residency="pinned"))
    free = 3 * pack.pixels.nbytes
    monkeypatch.setattr(setup, "ram_free_bytes", lambda: free)
    assert setup.residence(recipe, pack, ranks=3, device=CPU).where == "pinned"
    with pytest.raises(UsageError, match="4 processes x"):
        setup.residence(recipe, pack, ranks=4, device=CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "2 processes x" in setup.residence(recipe, pack, ranks=4, device=CPU).reason


def test_a_run_ends_with_the_same_weights_wherever_the_images_are(
    pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, said, stores_opened = [], [], []

    def opened(where: Any, pack: Pack, device: torch.device) -> Store:
        stores_opened.append(where)
        return open_store(where, pack, device)

    monkeypatch.setattr("ssl_pretrain.train.feed.open_store", opened)
    for where in ("auto", "mapped", "pinned"):
        console = Console(file=io.StringIO(), width=200)
        words = ("--train.residency", where, "--train.accelerator", "cpu")
        recipe = small("simclr", steps=2, accumulate=2)
        pretrain(recipe, data=pack.folder, out=tmp_path / where, words=words, console=console)
        state = Checkpoints(tmp_path / where / "checkpoints").newest()
        assert state is not None
        states.append(state["method"])
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        said += [line.strip() for line in lines if "images: " in line]
    for other in states[1:]:
        assert all(torch.equal(states[0][key], other[key]) for key in states[0])
    assert len(said) == 3 and stores_opened == ["mapped", "mapped", "pinned"]
    assert "memory-mapped (0." in said[0] and "page cache" in said[0]
    assert "memory-mapped, as train.residency asks" in said[1] and "in RAM, as train.residency asks" in said[2]


def test_a_run_may_go_on_elsewhere_and_from_before_there_was_a_choice(pack: Pack, tmp_path: Path) -> None:
    recipe = small("simclr", steps=2, save_every_steps=1)
    out = tmp_path / "a"
    pretrain(recipe, data=pack.folder, out=out)
    last = out / "checkpoints" / "step_000000002.pt"
    for path in last.parent.glob("step_000000002*"):
        path.unlink()
    older = Checkpoints(out / "checkpoints")
    state = older.newest()
    assert state is not None and state["step"] == 1
    kept = json.loads(state["recipe"])
    for key in [key for key in kept if key == "train.residency" or key.startswith("views.")]:
        del kept[key]  # younger than the checkpoint
    older.save(1, {**state, "recipe": json.dumps(kept)})
    assert pretrain(recipe, data=pack.folder, out=out, words=("--train.residency", "pinned")).step == 2
