"""TEM-NeutroStruct: from four classes to seven, in the six steps of the data set's README.

83 + 10 electron micrographs of neutrophils, 21,143 + 3,150 annotations. `scales`, `statistics`, `convert`, `relabel`,
`masks` and `verify` are the steps, a file each; `steps` reads and writes the files. This module has the words: a class
is known by its *name*, never by its id, because 1 to 4 mean other things among the four classes than among the seven.

The rule (the data set's scripts): a granule, primary or secondary, is small up to the median diameter of both kinds in
its image, an empty structure up to their average diameter. What is just as large as the threshold is small.

Shapes: I images, N annotations of a COCO file, M shapes of a CVAT file, K vertices, P pairs; H W pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ssl_pretrain.data.files import escape
from ssl_pretrain.errors import DataError, UsageError

PARENTS = ("primary", "secondary", "empty", "emptying")
"""The four classes. Their names in the published file are not public, so `ALIASES` has the likely ones."""
CLASSES = (
    "Specific granules",
    "Non-specific primary granules",
    "Non-specific tertiary granules",
    "Non-specific secondary granules",
    "Empty vesicles",
    "Emptying vesicles",
    "Vacuoles",
)
"""The seven classes; the published id is the place here, from 1 (`update_class_ids.py` of the data set)."""
CHILDREN: Mapping[str, tuple[str, ...]] = {
    "primary": (CLASSES[0], CLASSES[1]),
    "secondary": (CLASSES[2], CLASSES[3]),
    "empty": (CLASSES[4], CLASSES[6]),
    "emptying": (CLASSES[5],),
}
"""What each of the four becomes: small, large."""
PARENT_OF: Mapping[str, str] = {child: parent for parent, children in CHILDREN.items() for child in children}
UNDECIDED = " (undecided)"
"""Stands behind the name that an object had when nothing says which of the seven classes it is; its id is 8."""
ALIASES: Mapping[str, str] = {"pg": "primary", "sg": "secondary", **{name: name for name in PARENTS}}
"""Names of the four classes as `plain` spells them."""
_SILENT = {"granule", "vesicle", "structure"}


def plain(name: str) -> str:
    """A class name without case, hyphens, plural, and the words granule, vesicle and structure.

    >>> plain("Nonspecific_Primary Granules"), plain("Empty vesicles"), plain("Vacuoles")
    ('non specific primary', 'empty', 'vacuole')
    """
    parts = re.findall(r"[^\W_]+", name.casefold().replace("nonspecific", "non specific"))
    singular = [part.removesuffix("s") for part in parts]
    return " ".join(part for part in singular if part not in _SILENT)


_SEVEN = {plain(name): name for name in CLASSES}


def parents(names: Sequence[str], aliases: Mapping[str, str] | None = None) -> dict[str, str | None]:
    """Which of the four classes each name means; None for a name that means none of them.

    `aliases` adds names. Raises `DataError` for a file of seven classes and where two names mean the same class.

    >>> parents(["Primary granules", "SG", "nucleus"])
    {'Primary granules': 'primary', 'SG': 'secondary', 'nucleus': None}
    """
    known = dict(ALIASES)
    for alias, parent in (aliases or {}).items():
        if parent not in PARENTS:
            raise UsageError(f"alias {escape(alias)}={escape(parent)}: the four classes are {', '.join(PARENTS)}")
        known[plain(alias)] = parent
    found = {name: known.get(plain(name)) for name in names}
    done = [name for name, parent in found.items() if parent is None and plain(name.removesuffix(UNDECIDED)) in _SEVEN]
    done += [name for name in names if name.endswith(UNDECIDED) and name not in done]
    if done:
        raise DataError(
            f"{escape(done[0])} is one of the seven classes: this file was converted already, give the old one"
        )
    used = [parent for parent in found.values() if parent is not None]
    for parent in PARENTS:
        if used.count(parent) > 1:
            twice = " and ".join(escape(name) for name, meant in found.items() if meant == parent)
            raise DataError(f"{twice} both mean {parent}: join these classes first")
    return found


def sevens(names: Sequence[str]) -> dict[str, str | None]:
    """Which of the seven classes each name means; a name that ends in `UNDECIDED` means itself, others None.

    Raises `DataError` for a file that still has the four classes, and where two names mean the same class.

    >>> sevens(["specific", "Vacuoles", "nucleus", "empty (undecided)"])
    {'specific': 'Specific granules', 'Vacuoles': 'Vacuoles', 'nucleus': None, 'empty (undecided)': 'empty (undecided)'}
    """
    found = {name: name if name.endswith(UNDECIDED) else _SEVEN.get(plain(name)) for name in names}
    old = [name for name, meant in found.items() if meant is None and plain(name) in ALIASES]
    if old:
        raise DataError(f"{escape(old[0])} is one of the four classes: convert this file to seven classes first")
    for name in CLASSES:
        twice = [escape(given) for given, meant in found.items() if meant == name]
        if len(twice) > 1:
            raise DataError(f"{' and '.join(twice)} both mean {name}: join these classes first")
    return found


def class_id(name: str) -> int:
    """The published id of one of the seven classes, and 8 for what is undecided.

    >>> class_id("Vacuoles"), class_id("empty (undecided)")
    (7, 8)
    """
    return len(CLASSES) + 1 if name.endswith(UNDECIDED) else CLASSES.index(name) + 1
