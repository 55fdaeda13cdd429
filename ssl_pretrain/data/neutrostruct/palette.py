"""One colour a class. The published colours are not known, so there is a default, and CVAT's `labelmap.txt` is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ssl_pretrain.data.files import Rejected, escape, read_bytes
from ssl_pretrain.data.neutrostruct import CLASSES, UNDECIDED, sevens
from ssl_pretrain.errors import DataError

Rgb = tuple[int, int, int]
BACKGROUND: Rgb = (0, 0, 0)
_MAX_BYTES = 1 << 20
_DEFAULT: tuple[Rgb, ...] = (  # Okabe and Ito's colours, which the colour-blind can tell apart
    (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (240, 228, 66), (86, 180, 233), (230, 159, 0),
)  # fmt: skip


@dataclass(frozen=True)
class Palette:
    """Colours by class; no two alike, none black."""

    colours: tuple[Rgb, ...]
    """Of `CLASSES`, in their order."""
    undecided: Rgb = (160, 160, 160)

    def __post_init__(self) -> None:
        used = [BACKGROUND, *self.colours, self.undecided]
        if len(self.colours) != len(CLASSES) or any(not 0 <= value <= 255 for rgb in used for value in rgb):
            raise DataError(f"a palette has {len(CLASSES)} colours of three numbers from 0 to 255")
        if len(set(used)) < len(used):
            twice = next(rgb for rgb in used if used.count(rgb) > 1)
            raise DataError(f"two classes, or a class and the background, have the colour {twice}: give each its own")

    def of(self, name: str) -> Rgb:
        """The colour of one of the seven classes, or of what is undecided."""
        return self.undecided if name.endswith(UNDECIDED) else self.colours[CLASSES.index(name)]

    def labelmap(self) -> bytes:
        """The palette as CVAT's `labelmap.txt`."""
        lines = [f"{name}:{','.join(map(str, self.of(name)))}::" for name in CLASSES]
        return "\n".join(["# label:color_rgb:parts:actions", "background:0,0,0::", *lines, ""]).encode()


DEFAULT = Palette(_DEFAULT)


def read(path: Path) -> Palette:
    """The palette in a `labelmap.txt`: `name:r,g,b::` a line, all seven classes by name. Raises `DataError`."""
    name = escape(path.name)
    try:
        lines = read_bytes(path, _MAX_BYTES).decode().splitlines()
    except (Rejected, UnicodeDecodeError) as error:
        raise DataError(f"{escape(str(path))} cannot be read: {escape(str(error))}") from error
    found: dict[str, Rgb] = {}
    for i, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        label, colour = _entry(line, f"{name}: line {i}")
        if label in found:
            raise DataError(f"{name}: line {i} gives {escape(label)} a second colour")
        found[label] = colour
    return _by_class(found, name)


def _entry(line: str, where: str) -> tuple[str, Rgb]:
    label, _, rest = line.partition(":")
    parts = rest.partition(":")[0].split(",")
    if len(parts) != 3 or not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise DataError(f"{where} is not name:r,g,b::")
    red, green, blue = (int(part) if len(part.strip()) <= 3 else 256 for part in parts)
    return label.strip(), (red, green, blue)


def _by_class(found: Mapping[str, Rgb], name: str) -> Palette:
    if found.get("background", BACKGROUND) != BACKGROUND:
        raise DataError(f"{name}: the background is {found['background']}; masks have 0,0,0 there")
    by_class = {meant: found[label] for label, meant in sevens(list(found)).items() if meant is not None}
    missing = [cls for cls in CLASSES if cls not in by_class]
    if missing:
        raise DataError(f"{name} has no colour for {', '.join(missing)}")
    try:
        return Palette(tuple(by_class[cls] for cls in CLASSES))
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
