"""A build: the images of some folders become a pack, once, and a broken build is continued.

Shapes: N images.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import features

from ssl_pretrain.data import looks
from ssl_pretrain.data.decode import AS_STATED, Reading
from ssl_pretrain.data.files import Listing, Rejected, escape, read_bytes, scan
from ssl_pretrain.data.groups import groups_of
from ssl_pretrain.data.pack import DUPLICATE, FORMAT, VERSION, Pack, fingerprint, is_pack, manifest, open_pack
from ssl_pretrain.data.partial import Busy, Partial, alone, discard, publish, sync
from ssl_pretrain.data.workers import Outcome, decode_all
from ssl_pretrain.errors import DataError, UsageError, WriteError

LEFT_OUT = "left_out"
"""The reason of images that somebody asked to leave out."""
_SYNC_BYTES, _SYNC_SECONDS = 256 << 20, 5.0  # what a power cut may cost

Progress = Callable[[int, int, int], None]
"""Called with (done, total, rejected) images."""


def pack_or_folder(source: Path, cache: Path, short_side_px: int | None, progress: Progress | None = None) -> Pack:
    """What `--data` means: a pack is opened as it is, a folder of images is packed once into `cache` and reused.

    The pack's name carries a key of the folder's path, its file names, sizes and times, and the short side, so a
    changed folder is packed anew. When another process is packing the same, waits for it.
    """
    if is_pack(source):
        return open_pack(source)
    listing = scan([source])
    resolved = source.resolve()
    key = hashlib.sha256(f"{_key(listing, short_side_px)} {escape(str(resolved))}".encode()).hexdigest()[:12]
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
    reading: Reading = AS_STATED,
    left_out: Sequence[str] = (),
) -> Pack:
    """Decodes all images under `sources` into the pack `out`; continues a broken build, reuses a finished one.

    `short_side_px`: larger images are reduced to this short side; None keeps them.
    `group_regex`: its first `(...)` in the relative path names the group; images without a match are groups of one.
    `processes`: decoding processes, as many as there are CPUs unless given. A file that kills its process is rejected.
    0 decodes in this process, where such a file would end it.
    `reading`: how files are read where they leave a choice. `left_out`: names to leave out, relative and escaped as in
    `Pack.paths`; they are listed in `rejected.jsonl`.
    Raises `DataError` (nothing usable), `UsageError` (regex, `out` is something else, an unknown name to leave out),
    `WriteError` (disk, `Busy`).
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
    listing, left = _without(listing, left_out)
    group_N, ungrouped = _groups(listing.names, group_regex)
    key = _key(listing, short_side_px, group_regex, reading, left)
    made: dict[str, Any] = {"key": key, "short_side_px": short_side_px, "group_regex": group_regex}
    made |= {"reading": reading.words, "ungrouped": ungrouped}
    existing = _existing(out, listing, left, made)
    if existing is not None:
        return existing
    try:
        with alone(out) as folder:
            existing = _existing(out, listing, left, made)  # finished by another process in the meantime
            if existing is None and not _finished(folder, key):
                made["sources"] = sorted(escape(Path(os.path.abspath(source)).name) for source in sources)
                partial = Partial(folder, key, len(listing.names))
                _fill(partial, listing, short_side_px, processes, progress, reading)
                if not partial.kept_N.any():
                    discard(folder)
                    raise _all_rejected(sources, partial)
                looks.write_index(folder, partial.numbers_NM[partial.kept_N], partial.sources)
                _write_index(partial, listing, group_N, left, made)
            if existing is None:
                publish(folder, out)
            else:
                discard(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise WriteError(
            f"cannot write the pack {out}: {reason}; what is done is kept, run it again to go on"
        ) from error
    return open_pack(out)


def _named(sources: Sequence[Path]) -> str:
    return ", ".join(escape(str(source)) for source in sources)


def _without(listing: Listing, left_out: Sequence[str]) -> tuple[Listing, list[str]]:
    """The listing without these names, and those names as the file system spells them."""
    if not left_out:
        return listing, []
    at = {escape(name): i for i, name in enumerate(listing.names)}
    unknown = [name for name in left_out if name not in at]
    if unknown:
        raise UsageError(
            f"{len(unknown)} of the {len(left_out)} images to leave out are not among the {len(at)} that were found, "
            f"the first is {escape(unknown[0])!r}: names are relative to {escape(str(listing.root))}"
        )
    kept_N = np.ones(len(at), np.bool_)
    kept_N[[at[name] for name in left_out]] = False
    kept = np.flatnonzero(kept_N).tolist()
    if not kept:
        raise DataError(f"all {len(at)} images are to be left out: nothing is left to pack")
    names, numbers = [listing.names[i] for i in kept], (listing.bytes_N[kept], listing.mtime_ns_N[kept])
    left = [listing.names[i] for i in np.flatnonzero(~kept_N)]
    return Listing(listing.root, names, *numbers, listing.unreadable), left


def _groups(names: Sequence[str], group_regex: str | None) -> tuple[NDArray[np.int64], int]:
    """A group number for each name, and how many names the regex did not match."""
    if group_regex is None:
        return np.arange(len(names)), 0
    found = groups_of(names, group_regex)
    number = {group: i for i, group in enumerate(sorted({group for group in found if group is not None}))}
    group_N = np.array([-1 if group is None else number[group] for group in found])
    alone_N = group_N < 0
    group_N[alone_N] = len(number) + np.arange(alone_N.sum())
    return group_N, int(alone_N.sum())


def _key(
    listing: Listing,
    short_side_px: int | None,
    group_regex: str | None = None,
    reading: Reading = AS_STATED,
    left: Sequence[str] = (),
) -> str:
    """Stands for the files (by name, size and time) and for what is made of them."""
    key = hashlib.sha256(f"{FORMAT} {VERSION} {short_side_px} {group_regex!a}{reading.words}\n".encode())
    for name in listing.names:
        key.update(escape(name).encode() + b"\n")
    key.update(listing.bytes_N.tobytes() + listing.mtime_ns_N.tobytes())
    key.update("".join(f"\nleft out {escape(name)}" for name in left).encode())
    return key.hexdigest()


def _existing(out: Path, listing: Listing, left: Sequence[str], wanted: dict[str, Any]) -> Pack | None:
    """The pack that stands at `out`, if it is the wanted one; None if nothing is there."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return None
    if not is_pack(out):
        raise UsageError(f"{out} exists and is not a pack: move it away or choose another name")
    pack, made = open_pack(out), manifest(out)
    made.setdefault("reading", "")
    same = all(made[name] == wanted[name] for name in ("short_side_px", "group_regex", "reading"))
    if made["key"] == wanted["key"] or (same and _same_files(pack, listing, left)):
        return pack
    raise UsageError(f"{out} is a pack of other images or settings: delete it or choose another name")


def _same_files(pack: Pack, listing: Listing, left: Sequence[str]) -> bool:
    """Whether the files have the names and bytes that the pack was made of, whatever their times say."""
    packed: dict[str, str | None] = dict(zip(pack.paths, (row.tobytes().hex() for row in pack.sha256_N32), strict=True))
    left_out: set[str] = set()
    for line in (pack.folder / "rejected.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["reason"] == LEFT_OUT:
            left_out.add(record["path"])
        else:
            packed[record["path"]] = record["sha256"]
    if left_out != {escape(name) for name in left}:
        return False
    if {escape(name) for name in listing.names} | {escape(name) for name, _ in listing.unreadable} != packed.keys():
        return False
    return all(_file_sha256(listing.root / name) == packed[escape(name)] for name in listing.names)


def _file_sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except Rejected:
        return None


# --- writing ----------------------------------------------------------------------------------------------------------


def _record(outcome: Outcome) -> list[Any]:
    if outcome.pixels is None:
        return [outcome.reason, outcome.detail, outcome.sha256]
    assert outcome.measured is not None and outcome.source is not None  # they come with the pixels
    look = [number if math.isfinite(number) else None for number in outcome.measured.look]
    return [*outcome.pixels.shape[:2], *outcome.original_hw, outcome.sha256, look, list(outcome.source)]


def _fill(
    partial: Partial,
    listing: Listing,
    short_side_px: int | None,
    processes: int | None,
    progress: Progress | None,
    reading: Reading,
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
    with (
        open(partial.folder / "pixels.bin", "ab") as pixels,
        open(partial.folder / looks.FILES[1], "ab") as thumbnails,
        open(partial.folder / "journal.jsonl", "ab") as journal,
    ):
        for some in decode_all(listing, partial.done, short_side_px, processes, reading):
            for outcome in some:
                record = _record(outcome)
                if outcome.pixels is not None:
                    pixels.write(outcome.pixels.data)
                    thumbnails.write(_thumbnail(outcome))
                partial.note(record)
                lines.append(json.dumps(record).encode() + b"\n")
            late = time.monotonic() - synced_at >= _SYNC_SECONDS
            if late or partial.pixel_bytes - synced >= _SYNC_BYTES or partial.done == total:
                sync(pixels)  # the pixels first: a line in the journal promises them
                sync(thumbnails)
                journal.writelines(lines)
                sync(journal)
                lines.clear()
                synced, synced_at = partial.pixel_bytes, time.monotonic()
            tell(partial.done, total, len(partial.rejected))


def _thumbnail(outcome: Outcome) -> bytes:
    """64 x 64 bytes, zeros for an image that has no thumbnail."""
    thumbnail_HW = outcome.measured.thumbnail_HW if outcome.measured is not None else None
    return bytes(looks.THUMBNAIL_BYTES) if thumbnail_HW is None else thumbnail_HW.tobytes()


def _all_rejected(sources: Sequence[Path], partial: Partial) -> DataError:
    counts = Counter(reason for reason, _, _ in partial.rejected.values()).most_common(3)
    reasons = ", ".join(f"{count} x {reason}" for reason, count in counts)
    example = partial.rejected[0][1]
    return DataError(f"all {partial.done} images in {_named(sources)} were rejected: {reasons} (the first: {example})")


def _write_index(
    partial: Partial, listing: Listing, group_N: NDArray[np.int64], left: Sequence[str], made: dict[str, Any]
) -> None:
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
        sync(file)
    refused = [(listing.names[i], *why) for i, why in partial.rejected.items()]
    refused += [(name, "unreadable_folder", why, None) for name, why in listing.unreadable]
    refused += [(name, LEFT_OUT, "by request", None) for name in left]
    with open(partial.folder / "rejected.jsonl", "wb") as file:
        for name, reason, detail, sha256 in refused:
            record = {"path": escape(name), "reason": reason, "detail": detail, "sha256": sha256}
            file.write(json.dumps(record).encode() + b"\n")
        sync(file)
    made = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint(sha256_N32, made["short_side_px"], made["reading"]),
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
        sync(file)


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
        return bool(manifest(folder)["key"] == key)
    except DataError:
        return False
