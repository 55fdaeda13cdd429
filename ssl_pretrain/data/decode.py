"""Files to pixels: find the images, refuse what is unsafe or broken, resize. Pillow is the only decoder.

What is refused raises `Rejected(reason, detail)`; the reasons are

    missing, no_permission, not_a_file, unreadable     the file cannot be read, or is a pipe, device or folder
    crashed                                            the decoder died on it (`decode_all` only)
    empty, too_many_bytes, unknown_format              not one of JPEG, PNG, WebP, TIFF, BMP, GIF
    too_large, too_small                               by the header, before anything is decoded
    damaged                                            cut short or corrupt; never shown half
    unstated_range                                     32-bit values, of which nobody said what is black and white

The rules for the rest: the EXIF orientation is applied, the first frame is taken, transparency is laid on white,
palettes and CMYK become RGB, 16-bit grey is divided by 257 (so that 65535 is white), ICC profiles are ignored.
"""

from __future__ import annotations

import errno
import hashlib
import io
import multiprocessing
import os
import re
import signal
import stat
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ssl_pretrain.errors import DataError, UsageError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"})
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")  # a list, because Pillow would run Ghostscript on an EPS
MAX_PIXELS = 100_000_000
MAX_SIDE_PX = 32_768
MIN_SIDE_PX = 16
MAX_FILE_BYTES = 1 << 30

_CHUNK_FILES, _CHUNK_FILE_BYTES = 32, 1 << 20  # what one worker is given at a time
_CHUNK_PIXEL_BYTES = 64 << 20  # and what it may hold before it hands back: bounds memory to about two of these a worker
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Rejected(Exception):
    """A file that is not used: `reason` is one of the codes of this module, `detail` is one line for a reader."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class Decoded(NamedTuple):
    """One image and the size that it had before it was resized."""

    pixels: NDArray[np.uint8]
    """(H, W, 3) RGB, read-only."""
    original_hw: tuple[int, int]
    """Height and width in the file, upright."""


@dataclass(frozen=True)
class Listing:
    """The image files under some sources, sorted by name; nothing was opened."""

    root: Path
    """What the names are relative to: the source, or the folder that all sources share."""
    names: list[str]
    """Relative paths with `/`, as the file system spells them; `escape` makes them printable."""
    bytes_N: NDArray[np.int64]
    mtime_ns_N: NDArray[np.int64]
    unreadable: tuple[tuple[str, str], ...]
    """(relative folder, why) of folders that could not be listed."""


def escape(name: str) -> str:
    r"""One printable line of valid UTF-8 for any file name; usual names stay as they are. `unescape` is the inverse.

    >>> print(escape("a\nb\udcff\\"))
    a\u000ab\xff\\
    """
    if name.isprintable() and "\\" not in name:
        return name
    return "".join(_escaped(c) for c in name)


def _escaped(c: str) -> str:
    if c == "\\":
        return "\\\\"
    if c.isprintable():
        return c
    code = ord(c)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as Python's surrogateescape spells it
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def unescape(text: str) -> str:
    """The file name that `escape` was given."""

    def plain(match: re.Match[str]) -> str:
        code = match[1]
        if code == "\\":
            return code
        return chr(int(code[1:], 16) + (0xDC00 if code[0] == "x" else 0))

    return re.sub(r"\\(\\|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})", plain, text)


def find_images(sources: Iterable[Path]) -> list[Path]:
    """The image files in folders (at any depth) and single files, sorted by relative path; see `scan`."""
    listing = scan(list(sources))
    return [listing.root / name for name in listing.names]


def scan(sources: Sequence[Path]) -> Listing:
    """Lists the images of `sources`; the order of the sources makes no difference.

    Files count by their suffix (`SUFFIXES`, any case), a file given by name always. Hidden files and folders are
    skipped (`._x` of macOS too). Links are followed; every folder is entered once, so loops end.
    Raises `DataError` when a source does not exist.
    """
    tops = sorted({os.path.abspath(source) for source in sources})
    for top in tops:
        if not os.path.lexists(top):
            raise DataError(f"there is no {escape(top)}: check the path of the images")
    if not tops:
        raise DataError("no folder of images was given")
    root = os.path.commonpath([top if os.path.isdir(top) else os.path.dirname(top) for top in tops])
    files: dict[str, tuple[int, int]] = {}
    unreadable: list[tuple[str, str]] = []
    folders, seen = [top for top in reversed(tops) if os.path.isdir(top)], set[tuple[int, int]]()
    linked: list[str] = []  # entered last, so that an image reachable twice keeps its real path
    for top in tops:
        if not os.path.isdir(top):
            files[_relative(top, root)] = _bytes_and_mtime(top)
    while folders or linked:
        folder = folders.pop() if folders else linked.pop(0)
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            unreadable.append((_relative(folder, root), error.strerror or "cannot be listed"))
            continue
        for entry in listed:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                (linked if entry.is_symlink() else folders).append(entry.path)
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                files[_relative(entry.path, root)] = _bytes_and_mtime(entry.path)
    names = sorted(files)
    numbers = np.array([files[name] for name in names], np.int64).reshape(-1, 2)
    return Listing(Path(root), names, numbers[:, 0].copy(), numbers[:, 1].copy(), tuple(sorted(unreadable)))


def _relative(path: str, root: str) -> str:
    return path[len(root) :].lstrip("/") or "."


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _bytes_and_mtime(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:  # a dangling link: listed here, rejected with its reason when it is read
        return 0, 0
    return status.st_size, status.st_mtime_ns


def read_bytes(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a regular file; never waits on a pipe. Raises `Rejected`."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Rejected(_reason(error), error.strerror or "cannot be opened") from error
    except ValueError as error:  # a NUL in the name
        raise Rejected("missing", "not a file name") from error
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise Rejected("not_a_file", "a pipe, device or folder")
    with os.fdopen(handle, "rb") as file:
        if status.st_size > max_bytes:
            raise Rejected("too_many_bytes", f"more than {max_bytes} bytes")
        try:
            data = file.read()
        except OSError as error:
            raise Rejected("unreadable", error.strerror or "cannot be read") from error
    if not data:
        raise Rejected("empty", "the file has no bytes")
    return data


def _reason(error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        return "missing"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "no_permission"
    if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket, a device without a driver
        return "not_a_file"
    return "unreadable"


def decode(path: Path, float_range: tuple[float, float] | None = None) -> NDArray[np.uint8]:
    """The image as uint8 (H, W, 3) RGB, upright; raises `Rejected`.

    `float_range` states which values of a 32-bit image are black and white; without it such an image is rejected.
    """
    return decode_bytes(read_bytes(path), None, float_range).pixels.copy()


def decode_bytes(
    data: bytes, short_side_px: int | None = None, float_range: tuple[float, float] | None = None
) -> Decoded:
    """The image in the bytes of a file, resized as `resize_short_side` does when a short side is given.

    A JPEG at least four times as large is first reduced in its own frequency domain to at least twice the size
    (libjpeg's scaled decoding), which is faster and leaves the final filter enough to work on. Raises `Rejected`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata; what matters here is raised
        with _open(data) as image:
            width, height = image.size
            if short_side_px is not None and min(width, height) >= 4 * short_side_px:
                target_width, target_height = _target(width, height, short_side_px)
                image.draft(None, (2 * target_width, 2 * target_height))
            try:
                image.load()
                turn = _orientation(image)
                rgb = _rgb(image, float_range)
            except Rejected:
                raise
            except MemoryError as error:
                raise Rejected("too_large", f"{width} x {height} px do not fit into memory") from error
            except Exception as error:  # on broken files Pillow raises whatever its parsers happen to hit
                raise Rejected("damaged", escape(str(error))[:200] or type(error).__name__) from error
    if turn in _TURNS:
        rgb = rgb.transpose(_TURNS[turn])
    if turn >= 5:
        width, height = height, width
    if short_side_px is not None:
        rgb = rgb.resize(_target(width, height, short_side_px), Image.Resampling.LANCZOS)
    return Decoded(np.asarray(rgb), (height, width))


def header_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels, upright, from the header alone; raises `Rejected`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _open(read_bytes(path)) as image:
            width, height = image.size
            # Pillow gives TIFF sizes upright and turns the pixels itself
            turned = image.format != "TIFF" and _orientation(image) >= 5
    return (height, width) if turned else (width, height)


def resize_short_side(pixels: NDArray[np.uint8], short_side_px: int) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 with a short side of `short_side_px`, aspect kept to the pixel; never enlarges.

    Pillow's Lanczos filter (a = 3), widened by the scale, so it is antialiased.
    """
    height, width = pixels.shape[:2]
    size = _target(width, height, short_side_px)
    if size == (width, height):
        return pixels
    return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def _target(width: int, height: int, short_side_px: int) -> tuple[int, int]:
    short = min(width, height)
    if short <= short_side_px:
        return width, height
    # halves go up, in integers: the same on every machine
    scaled = [(2 * side * short_side_px + short) // (2 * short) for side in (width, height)]
    return scaled[0], scaled[1]


def _open(data: bytes) -> Image.Image:
    """The header, with its size checked; nothing is decoded yet."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Rejected("too_large", f"more than {MAX_PIXELS} pixels") from error
    except UnidentifiedImageError as error:
        raise Rejected("unknown_format", f"not one of {', '.join(FORMATS)}") from error
    except Exception as error:  # as above
        raise Rejected("damaged", escape(str(error))[:200] or type(error).__name__) from error
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE_PX:
        limit = f"{MAX_PIXELS} pixels, {MAX_SIDE_PX} px a side"
        raise Rejected("too_large", f"{width} x {height} px; the limit is {limit}")
    if min(width, height) < MIN_SIDE_PX:
        raise Rejected("too_small", f"{width} x {height} px; at least {MIN_SIDE_PX} px a side are needed")
    return image


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # broken metadata on good pixels: the image is taken as it is stored
        return 1
    return value if isinstance(value, int) else 1


def _rgb(image: Image.Image, float_range: tuple[float, float] | None) -> Image.Image:
    """8-bit RGB, by the rules at the top of this module."""
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        if float_range is None:
            raise Rejected("unstated_range", f"32-bit values (mode {image.mode}) need a stated range")
        low, high = float_range
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise Rejected("damaged", "the image has values that are not finite")
        grey = np.rint((values - low) / (high - low) * 255).clip(0, 255)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer).convert("RGB")
    return image.convert("RGB")


# --- decoding, in worker processes ------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What became of one file: pixels (H, W, 3), or a reason; and the SHA-256 of its bytes, if they could be read."""

    pixels: NDArray[np.uint8] | None
    original_hw: tuple[int, int]
    sha256: str | None
    reason: str = ""
    detail: str = ""


def _decode_some(root: Path, names: Sequence[str], short_side_px: int | None) -> list[Outcome]:
    """Outcomes of the first names, as many as fit into `_CHUNK_PIXEL_BYTES`, one at least. Runs in a worker."""
    outcomes: list[Outcome] = []
    held = 0
    for name in names:
        sha256 = None
        try:
            data = read_bytes(root / name)
            sha256 = hashlib.sha256(data).hexdigest()
            pixels, original_hw = decode_bytes(data, short_side_px)
        except Rejected as why:
            outcomes.append(Outcome(None, (0, 0), sha256, why.reason, why.detail))
            continue
        outcomes.append(Outcome(pixels, original_hw, sha256))
        held += pixels.nbytes
        if held >= _CHUNK_PIXEL_BYTES:
            break
    return outcomes


def _start_worker() -> None:
    """Ctrl-C is the parent's to handle; and a worker whose parent was killed would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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

    def __init__(self, root: Path, short_side_px: int | None, processes: int) -> None:
        self.root, self.short_side_px, self.processes = root, short_side_px, processes
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
            return self.pool.submit(_decode_some, self.root, names, self.short_side_px)
        except BrokenProcessPool:
            self.pool.shutdown()
            self.pool = self._new(self.processes)
            return self.pool.submit(_decode_some, self.root, names, self.short_side_px)

    def carefully(self, names: Sequence[str]) -> list[Outcome]:
        """One file at a time in a process of its own: who dies again is rejected."""
        outcomes: list[Outcome] = []
        for name in names:
            self.lone = self.lone or self._new(1)
            try:
                outcomes += self.lone.submit(_decode_some, self.root, [name], self.short_side_px).result()
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


def decode_all(listing: Listing, start: int, short_side_px: int | None, processes: int) -> Iterator[list[Outcome]]:
    """Outcomes of the files from number `start` on, in order, a few at a time, whatever happens to the processes.

    With 0 processes this process decodes, and a file that crashes the decoder ends it. Raises `UsageError` when
    processes cannot be started.
    """
    names = listing.names
    chunks = _chunks(listing.bytes_N, start)
    if processes == 0:
        while start < len(names):
            some = _decode_some(listing.root, names[start : start + _CHUNK_FILES], short_side_px)
            start += len(some)
            yield some
        return
    workers = _Workers(listing.root, short_side_px, processes)
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
