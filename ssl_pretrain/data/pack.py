"""The pack: all images decoded once into one uint8 store, so that training decodes nothing.

A folder with `pixels.bin` (uint8, every image (H, W, 3) row-major, one after the other), `index.npz` (arrays, a row an
image), `rejected.jsonl` (a line for every file that was not used) and `pack.json` (what made it). Images stand in the
order of their relative paths. The fingerprint depends on the bytes of the image files and on the short side only.

A build works in `.<name>.partial` beside its goal. It appends images in order and, each time the pixels are safely on
disk, a line each to a journal; the same call after a crash continues behind the last line. At the end the folder is
renamed, so a pack is either whole or not there.

Shapes: N images, H and W in pixels.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import features

from ssl_pretrain.data.decode import Listing, Outcome, Rejected, decode_all, escape, read_bytes, scan
from ssl_pretrain.errors import DataError, UsageError, WriteError

FORMAT = "ssl_pretrain pack"
VERSION = 1
DUPLICATE = 1
"""Bit of `flags_N`: an earlier image of the pack has the same file bytes."""

_SYNC_BYTES, _SYNC_SECONDS = 256 << 20, 5.0  # what a power cut may cost
_FILES = ("journal.jsonl", "pixels.bin", "index.npz", "rejected.jsonl", "pack.json")

Progress = Callable[[int, int, int], None]
"""Called with (done, total, rejected) images."""


@dataclass(frozen=True, eq=False)
class Pack:
    """An opened pack; the pixels stay on disk and are mapped into memory."""

    folder: Path
    size_N2: NDArray[np.int64]
    """Stored height and width in pixels."""
    original_N2: NDArray[np.int64]
    """Height and width in the file, upright."""
    group_N: NDArray[np.int64]
    """Images of one patient, slide or the like share a number."""
    sha256_N32: NDArray[np.uint8]
    """Of the bytes of the image file."""
    flags_N: NDArray[np.uint8]
    """Bits: `DUPLICATE`."""
    fingerprint: str
    """64 hexadecimal digits; equal for the same image files at the same short side."""
    short_side_px: int | None
    """What the images were reduced to; None for full size."""
    offset_N: NDArray[np.int64] = field(repr=False)
    """First byte of each image in `pixels`."""
    pixels: NDArray[np.uint8] = field(repr=False)
    """All of `pixels.bin`, read-only."""
    _names: bytes = field(repr=False)

    def __len__(self) -> int:
        return len(self.size_N2)

    def __reduce__(self) -> tuple[Callable[[Path], Pack], tuple[Path]]:
        return open_pack, (self.folder,)  # another process maps the file again instead of copying it

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """Relative paths of the files, printable; `decode.unescape` gives the name to open."""
        return tuple(self._names.decode().split("\n"))

    @property
    def scale_N(self) -> NDArray[np.float64]:
        """Stored short side / original short side, at most 1."""
        stored_N, original_N = self.size_N2.min(1).astype(np.float64), self.original_N2.min(1).astype(np.float64)
        return np.asarray(stored_N / original_N, np.float64)

    def image(self, i: int) -> NDArray[np.uint8]:
        """Image `i`, uint8 (H, W, 3) RGB: a read-only view on the memory map."""
        height, width = (int(side) for side in self.size_N2[i])
        start = int(self.offset_N[i])
        return self.pixels[start : start + height * width * 3].reshape(height, width, 3)


def is_pack(path: Path) -> bool:
    """Whether `path` is the folder of a pack (perhaps a damaged one)."""
    return (path / "pack.json").is_file() and any((path / name).is_file() for name in ("index.npz", "pixels.bin"))


def open_pack(folder: Path) -> Pack:
    """Opens a pack and checks that its files belong together; raises `DataError` when they do not."""
    made = _made(folder)
    try:
        with open(folder / "index.npz", "rb") as file, np.load(file, allow_pickle=False) as index:
            arrays = {name: index[name] for name in index.files}
        size_N2, original_N2 = arrays["size_N2"], arrays["original_N2"]
        sha256_N32, names = arrays["sha256_N32"], arrays["paths"].tobytes()
        pixel_bytes = (folder / "pixels.bin").stat().st_size
        end_N = np.cumsum(size_N2.prod(1) * 3)
        count = len(size_N2)
        whole = (
            (size_N2 > 0).all()
            and count == made["images"] == len(original_N2) == len(sha256_N32) == names.count(b"\n") + 1
            and len(arrays["group_N"]) == len(arrays["flags_N"]) == count
            and np.array_equal(arrays["offset_N"][1:], end_N[:-1])
            and int(end_N[-1]) == made["pixel_bytes"]
            and fingerprint(sha256_N32, made["short_side_px"]) == made["fingerprint"]
        )
    except Exception as error:  # zip, npy and type errors of every kind: all say that the index is not ours
        raise _damaged(folder, f"index.npz: {escape(str(error))}") from error
    if not whole:
        raise _damaged(folder, "index.npz and pack.json do not belong together")
    if pixel_bytes != made["pixel_bytes"]:
        raise _damaged(folder, f"pixels.bin has {pixel_bytes} bytes, not {made['pixel_bytes']}")
    pixels = np.memmap(folder / "pixels.bin", np.uint8, mode="r").view(np.ndarray)
    return Pack(
        folder, size_N2, original_N2, arrays["group_N"], sha256_N32, arrays["flags_N"],
        made["fingerprint"], made["short_side_px"], arrays["offset_N"], pixels, names,
    )  # fmt: skip


def _made(folder: Path) -> dict[str, Any]:
    """What `pack.json` says, of a version that can be read."""
    if not (folder / "pack.json").is_file():
        raise DataError(f"{folder} is not a pack: it has no pack.json")
    try:
        made = json.loads((folder / "pack.json").read_bytes())
        known = made["format"] == FORMAT
    except Exception as error:
        raise _damaged(folder, "pack.json cannot be read") from error
    if not known or made.get("version") != VERSION:
        version = f"{made['format']!r}, version {made.get('version')!r}"
        raise DataError(f"{folder} is {version}; this release reads version {VERSION}: pack the images again")
    return dict(made)


def _damaged(folder: Path, what: str) -> DataError:
    return DataError(f"the pack {folder} is damaged ({what}): delete it and pack the images again")


def fingerprint(sha256_N32: NDArray[np.uint8], short_side_px: int | None) -> str:
    """64 hexadecimal digits for a set of files, in any order, at a short side."""
    words = np.ascontiguousarray(sha256_N32).view(">u8")
    order = np.lexsort(words.T[::-1])
    head = f"{FORMAT} {VERSION} short side {short_side_px}\n".encode()
    return hashlib.sha256(head + sha256_N32[order].tobytes()).hexdigest()


def pack_or_folder(source: Path, cache: Path, short_side_px: int | None, progress: Progress | None = None) -> Pack:
    """What `--data` means: a pack is opened as it is, a folder of images is packed once into `cache` and reused.

    The pack's name carries a key of the folder's path, its file names, sizes and times, and the short side, so a
    changed folder is packed anew. When another process is packing the same, waits for it.
    """
    if is_pack(source):
        return open_pack(source)
    listing = scan([source])
    resolved = source.resolve()
    key = hashlib.sha256(f"{_key(listing, short_side_px, None)} {escape(str(resolved))}".encode()).hexdigest()[:12]
    out = cache / f"{resolved.name or 'images'}-{key}"
    while not is_pack(out):
        try:
            return build([source], out, short_side_px, progress=progress)
        except Busy:
            time.sleep(0.5)
    return open_pack(out)


def build(
    sources: Sequence[Path],
    out: Path,
    short_side_px: int | None = None,
    group_regex: str | None = None,
    processes: int | None = None,
    progress: Progress | None = None,
) -> Pack:
    """Decodes all images under `sources` into the pack `out`; continues a broken build, reuses a finished one.

    `short_side_px`: larger images are reduced to this short side; None keeps them.
    `group_regex`: its first `(...)` in the relative path names the group; images without a match are groups of one.
    `processes`: decoding processes, as many as there are CPUs unless given. A file that kills its process is rejected.
    0 decodes in this process, where such a file would end it.
    Raises `DataError` (nothing usable), `UsageError` (regex, `out` is something else), `WriteError` (disk, `Busy`).
    """
    if short_side_px is not None and short_side_px < 1:
        raise UsageError(f"the short side must be at least 1 px, not {short_side_px}")
    if processes is not None and processes < 0:
        raise UsageError(f"the number of processes must be 0 or more, not {processes}")
    listing = scan(sources)
    if not listing.names:
        raise DataError(
            f"no images in {_named(sources)}: looked at any depth for jpg, png, tif, webp, bmp and gif files"
        )
    group_N, ungrouped = _groups(listing.names, group_regex)
    key = _key(listing, short_side_px, group_regex)
    made: dict[str, Any] = {"key": key, "short_side_px": short_side_px, "group_regex": group_regex}
    made["ungrouped"] = ungrouped
    existing = _existing(out, listing, made)
    if existing is not None:
        return existing
    try:
        with _alone(out) as folder:
            existing = _existing(out, listing, made)  # finished by another process in the meantime
            if existing is None and not _finished(folder, key):
                made["sources"] = sorted(escape(Path(os.path.abspath(source)).name) for source in sources)
                partial = _Partial(folder, key, len(listing.names))
                _fill(partial, listing, short_side_px, processes, progress)
                if not partial.kept_N.any():
                    _discard(folder)
                    raise _all_rejected(sources, partial)
                _write_index(partial, listing, group_N, made)
            if existing is None:
                _publish(folder, out)
            else:
                _discard(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise WriteError(
            f"cannot write the pack {out}: {reason}; what is done is kept, run it again to go on"
        ) from error
    return open_pack(out)


def _named(sources: Sequence[Path]) -> str:
    return ", ".join(escape(str(source)) for source in sources)


def _groups(names: Sequence[str], group_regex: str | None) -> tuple[NDArray[np.int64], int]:
    """A group number for each name, and how many names the regex did not match."""
    if group_regex is None:
        return np.arange(len(names)), 0
    try:
        pattern = re.compile(group_regex)
    except re.error as error:
        raise UsageError(f"the group regex {group_regex!r} is not a regular expression: {error}") from error
    if pattern.groups == 0:
        raise UsageError(f"the group regex {group_regex!r} needs a (...) around what names the group")
    found = [match[1] if (match := pattern.search(name)) else None for name in names]
    number = {group: i for i, group in enumerate(sorted({group for group in found if group is not None}))}
    if not number:
        raise UsageError(f"the group regex {group_regex!r} matches no path, for example not {escape(names[0])!r}")
    group_N = np.array([-1 if group is None else number[group] for group in found])
    alone_N = group_N < 0
    group_N[alone_N] = len(number) + np.arange(alone_N.sum())
    return group_N, int(alone_N.sum())


def _key(listing: Listing, short_side_px: int | None, group_regex: str | None) -> str:
    """Stands for the files (by name, size and time) and for what is made of them."""
    key = hashlib.sha256(f"{FORMAT} {VERSION} {short_side_px} {group_regex!a}\n".encode())
    for name in listing.names:
        key.update(escape(name).encode() + b"\n")
    key.update(listing.bytes_N.tobytes() + listing.mtime_ns_N.tobytes())
    return key.hexdigest()


def _existing(out: Path, listing: Listing, wanted: dict[str, Any]) -> Pack | None:
    """The pack that stands at `out`, if it is the wanted one; None if nothing is there."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return None
    if not is_pack(out):
        raise UsageError(f"{out} exists and is not a pack: move it away or choose another name")
    pack, made = open_pack(out), _made(out)
    same = all(made[name] == wanted[name] for name in ("short_side_px", "group_regex"))
    if made["key"] == wanted["key"] or (same and _same_files(pack, listing)):
        return pack
    raise UsageError(f"{out} is a pack of other images or settings: delete it or choose another name")


def _same_files(pack: Pack, listing: Listing) -> bool:
    """Whether the files have the names and bytes that the pack was made of, whatever their times say."""
    packed: dict[str, str | None] = dict(zip(pack.paths, (row.tobytes().hex() for row in pack.sha256_N32), strict=True))
    for line in (pack.folder / "rejected.jsonl").read_text().splitlines():
        packed[json.loads(line)["path"]] = json.loads(line)["sha256"]
    if {escape(name) for name in listing.names} | {escape(name) for name, _ in listing.unreadable} != packed.keys():
        return False
    return all(_file_sha256(listing.root / name) == packed[escape(name)] for name in listing.names)


def _file_sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except Rejected:
        return None


# --- writing ----------------------------------------------------------------------------------------------------------


class Busy(WriteError):
    """Another process is making the same pack."""


@contextmanager
def _alone(out: Path) -> Iterator[Path]:
    """The folder of the unfinished pack, for this process only. The lock is on the folder, so it leaves no file."""
    folder = out.parent / f".{out.name}.partial"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Busy(f"another process is making the pack {out}: wait for it") from error
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):  # some network file systems
                    raise
            try:
                still_there = os.path.samestat(os.fstat(handle), os.stat(folder))
            except FileNotFoundError:
                still_there = False
            if still_there:  # else its owner has renamed it between our two looks
                yield folder
                return
        finally:
            os.close(handle)


class _Partial:
    """An unfinished pack: pixels appended in order, then a journal line an image, which is what makes it done.

    A line is `[height, width, original height, original width, sha256]` or `[reason, detail, sha256 or null]`.
    """

    def __init__(self, folder: Path, key: str, total: int) -> None:
        self.folder = folder
        self.done = 0
        self.pixel_bytes = 0
        self.kept_N = np.zeros(total, np.bool_)
        self.size_N4 = np.zeros((total, 4), np.int64)
        self.sha256_N32 = np.zeros((total, 32), np.uint8)
        self.rejected: dict[int, tuple[str, str, str | None]] = {}
        self._resume(json.dumps({"key": key, "total": total}).encode() + b"\n")

    def _resume(self, head: bytes) -> None:
        """Takes over what a broken build has finished, and cuts off what it was writing when it ended."""
        journal, pixels = self.folder / "journal.jsonl", self.folder / "pixels.bin"
        journal.touch()
        pixels.touch()
        room = pixels.stat().st_size
        with open(journal, "r+b") as lines:
            good = 0
            if lines.readline() == head:
                good = len(head)
                for line in lines:
                    if not self._take(line, room):
                        break
                    good += len(line)
            lines.seek(good)
            lines.truncate()
            if good == 0:  # new, or begun for other files
                lines.write(head)
        os.truncate(pixels, self.pixel_bytes)

    def _take(self, line: bytes, room: int) -> bool:
        """Notes a journal line, if it is whole and its pixels are there."""
        try:
            record = json.loads(line)
        except ValueError:
            return False
        if not line.endswith(b"\n") or (len(record) == 5 and self.pixel_bytes + record[0] * record[1] * 3 > room):
            return False
        self.note(record)
        return True

    def note(self, record: list[Any]) -> None:
        """The next image is done."""
        if len(record) == 5:
            self.kept_N[self.done] = True
            self.size_N4[self.done] = record[:4]
            self.sha256_N32[self.done] = np.frombuffer(bytes.fromhex(record[4]), np.uint8)
            self.pixel_bytes += record[0] * record[1] * 3
        else:
            reason, detail, sha256 = record
            self.rejected[self.done] = (reason, detail, sha256)
        self.done += 1


def _record(outcome: Outcome) -> list[Any]:
    if outcome.pixels is None:
        return [outcome.reason, outcome.detail, outcome.sha256]
    return [*outcome.pixels.shape[:2], *outcome.original_hw, outcome.sha256]


def _fill(
    partial: _Partial, listing: Listing, short_side_px: int | None, processes: int | None, progress: Progress | None
) -> None:
    """Decodes what is not done yet."""
    total = len(listing.names)
    if processes is None:
        processes = len(os.sched_getaffinity(0))
    processes = min(processes, total - partial.done)
    tell = progress or (lambda done, total, rejected: None)
    tell(partial.done, total, len(partial.rejected))
    if partial.done == total:
        return
    lines: list[bytes] = []
    synced, synced_at = partial.pixel_bytes, time.monotonic()
    with open(partial.folder / "pixels.bin", "ab") as pixels, open(partial.folder / "journal.jsonl", "ab") as journal:
        for some in decode_all(listing, partial.done, short_side_px, processes):
            for outcome in some:
                record = _record(outcome)
                if outcome.pixels is not None:
                    pixels.write(outcome.pixels.data)
                partial.note(record)
                lines.append(json.dumps(record).encode() + b"\n")
            late = time.monotonic() - synced_at >= _SYNC_SECONDS
            if late or partial.pixel_bytes - synced >= _SYNC_BYTES or partial.done == total:
                _sync(pixels)  # the pixels first: a line in the journal promises them
                journal.writelines(lines)
                _sync(journal)
                lines.clear()
                synced, synced_at = partial.pixel_bytes, time.monotonic()
            tell(partial.done, total, len(partial.rejected))


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _all_rejected(sources: Sequence[Path], partial: _Partial) -> DataError:
    counts = Counter(reason for reason, _, _ in partial.rejected.values()).most_common(3)
    reasons = ", ".join(f"{count} x {reason}" for reason, count in counts)
    example = partial.rejected[0][1]
    return DataError(f"all {partial.done} images in {_named(sources)} were rejected: {reasons} (the first: {example})")


def _write_index(partial: _Partial, listing: Listing, group_N: NDArray[np.int64], made: dict[str, Any]) -> None:
    """Everything beside the pixels; `pack.json` last, because it says that the rest is there."""
    kept = np.flatnonzero(partial.kept_N)
    size_N2, original_N2 = partial.size_N4[kept, :2], partial.size_N4[kept, 2:]
    sha256_N32 = partial.sha256_N32[kept]
    bytes_N = size_N2.prod(1) * 3
    flags_N = _repeats(sha256_N32).astype(np.uint8) * DUPLICATE
    names = "\n".join(escape(listing.names[i]) for i in kept)
    with open(partial.folder / "index.npz", "wb") as file:
        np.savez(
            file,
            size_N2=size_N2,
            original_N2=original_N2,
            offset_N=np.cumsum(bytes_N) - bytes_N,
            sha256_N32=sha256_N32,
            group_N=np.unique(group_N[kept], return_inverse=True)[1],
            flags_N=flags_N,
            paths=np.frombuffer(names.encode(), np.uint8),
        )
        _sync(file)
    refused = [(listing.names[i], *why) for i, why in partial.rejected.items()]
    refused += [(name, "unreadable_folder", why, None) for name, why in listing.unreadable]
    with open(partial.folder / "rejected.jsonl", "wb") as file:
        for name, reason, detail, sha256 in refused:
            record = {"path": escape(name), "reason": reason, "detail": detail, "sha256": sha256}
            file.write(json.dumps(record).encode() + b"\n")
        _sync(file)
    made = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint(sha256_N32, made["short_side_px"]),
        "images": len(kept),
        "pixel_bytes": partial.pixel_bytes,
        "groups": len(np.unique(group_N[kept])),
        "duplicates": int((flags_N & DUPLICATE > 0).sum()),
        "rejected": dict(Counter(reason for _, reason, _, _ in refused)),
        **made,
        "libraries": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "libjpeg_turbo": features.version_feature("libjpeg_turbo"),
        },
    }
    with open(partial.folder / "pack.json", "wb") as file:
        file.write(json.dumps(made, indent=2).encode() + b"\n")
        _sync(file)


def _repeats(sha256_N32: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether an earlier row is the same."""
    words = np.ascontiguousarray(sha256_N32).view(np.uint64)
    order = np.lexsort(words.T)  # stable: of equal rows the first comes first
    repeats_N = np.zeros(len(words), np.bool_)
    repeats_N[order[1:]] = (words[order[1:]] == words[order[:-1]]).all(1)
    return repeats_N


def _finished(folder: Path, key: str) -> bool:
    """Whether an earlier build came to the end of everything but the renaming."""
    try:
        open_pack(folder)
        return bool(_made(folder)["key"] == key)
    except DataError:
        return False


def _publish(folder: Path, out: Path) -> None:
    (folder / "journal.jsonl").unlink(missing_ok=True)
    _sync_folder(folder)
    os.rename(folder, out)
    _sync_folder(out.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _discard(folder: Path) -> None:
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()
