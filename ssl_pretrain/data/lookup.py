"""Which image of a folder a label file means, and which images belong together.

Names are relative paths with `/`. Label files come from strangers: what they name is only looked up among the images
that were found, never opened as it stands.
"""

from __future__ import annotations

import heapq
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, takewhile
from pathlib import Path

from ssl_pretrain.data.files import SUFFIXES, escape
from ssl_pretrain.data.readers import SPLIT_WORDS, stays_inside

_NOT_IMAGES = frozenset({"mask", "masks", "edge", "edges", "gt", "groundtruth", "labels", "annotations", "overlays"})
_NOT_GROUPS = frozenset({"images", "image", "imgs", "img", "data", "dataset", "default", "jpegimages", "png", "jpg"})
_MIN_GROUPS = 3
_MAX_FOLDERS = 2000
_ENTRIES, _FOLDERS = 400, 12
"""For `peek`."""
MANY = 1 << 20
"""For `first_files`: in fact all."""


class Lookup:
    """The images of a folder by all that label files call them."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        self._by_base: dict[str, list[str]] = defaultdict(list)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for name in names:
            base = name.rpartition("/")[2]
            self._by_base[base].append(name)
            self._by_stem[os.path.splitext(base)[0]].append(name)

    def find(self, wanted: str, near: Sequence[str] = (), split: str | None = None) -> str:
        """The one image that is meant by a name, with or without folders and suffix.

        `near` are folders where it is looked for first; `split` decides between images of the same name.
        Raises `ValueError`, which says why, for a name that leads out of the folder, for none and for several.
        """
        if not stays_inside(wanted):
            raise ValueError(f"its file name {escape(wanted)} leads out of the folder")
        wanted = wanted.replace("\\", "/").removeprefix("./")
        for folder in near:
            if (name := f"{folder}/{wanted}" if folder else wanted) in self._names:
                return name
        return self.find_tail(wanted, split)

    def find_tail(self, wanted: str, split: str | None = None) -> str:
        """As `find`, by as many of the last parts of a path as fit: what leads elsewhere is only compared."""
        folders, _, base = wanted.replace("\\", "/").rpartition("/")
        found = self._by_base.get(base, [])
        if not found and os.path.splitext(base)[1].lower() not in SUFFIXES:
            found = self._by_stem.get(base, [])
        said = split_in(f"{folders}/{base}") or split
        # an image of another split has the same name by chance: labels of val/1.png are not train/1.png's
        found = [name for name in found if None in (said, split_in(name)) or said == split_in(name)]
        most = max((_same_tail(name.rpartition("/")[0], folders) for name in found), default=0)
        found = [name for name in found if _same_tail(name.rpartition("/")[0], folders) == most]
        found = [name for name in found if not _in_masks(name)] or found
        found = [name for name in found if said is not None and split_in(name) == said] or found
        if not found:
            raise ValueError(f"missing image {escape(base)}")
        if len(found) > 1:
            raise ValueError(f"its image could be {escape(found[0])} or {escape(found[1])}")
        return found[0]


def _same_tail(folder: str, other: str) -> int:
    """How many of their last parts are the same."""
    pairs = zip(reversed(folder.split("/")), reversed(other.split("/")), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1] != "", pairs))


def split_word(name: str) -> str | None:
    """The split that a word of a file or folder name says; None for none and for two.

    >>> split_word("instances_train2017.json"), split_word("latest"), split_word("train_test")
    ('train', None, None)
    """
    found = {SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLIT_WORDS}
    return found.pop() if len(found) == 1 else None


def split_in(name: str) -> str | None:
    """The split that the folders of a relative path say.

    >>> split_in("images/valid/a.png")
    'val'
    """
    found = [split for part in name.split("/")[:-1] if (split := split_word(part))]
    return found[0] if found else None


def source_of(name: str) -> str:
    """The image that Roboflow made this one of: its augmented copies differ after `.rf.`.

    >>> source_of("train/a_jpg.rf.0123.jpg")
    'a_jpg'
    """
    base = name.rpartition("/")[2]
    return base.partition(".rf.")[0] if ".rf." in base else name


def folder_groups(names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The group of each image that is not its own one, and a line on why.

    Copies of one source (`source_of`) are a group, and so is a folder, once there are three that are named neither by
    a split nor by what they hold (CCAgT: `images/<slide>/`). Folders of masks do not count.
    """
    names = [name for name in names if not _in_masks(name)]
    sources = Counter(map(source_of, names))
    groups = {name: source_of(name) for name in names if sources[source_of(name)] > 1}
    notes = []
    if groups:
        notes.append(
            f"{len(groups)} images are copies of {len(set(groups.values()))} (`.rf.` in the name): one group each"
        )
    folder_of = {name: _own_folder(name) for name in names}
    folders = set(folder_of.values()) - {""}
    if len(folders) >= _MIN_GROUPS:
        groups |= {name: folder for name, folder in folder_of.items() if folder}
        notes.append(f"the images lie in {len(folders)} folders: each folder is taken as one group (slide, patient)")
    return groups, notes


def _in_masks(name: str) -> bool:
    return not _NOT_IMAGES.isdisjoint(part.lower() for part in name.split("/")[:-1])


def _own_folder(name: str) -> str:
    parts = name.split("/")[:-1]
    return "/".join(part for part in parts if part.lower() not in _NOT_GROUPS and split_word(part) is None)


def unlabelled(names: Iterable[str], used: Iterable[str]) -> list[str]:
    """A line for each image that no label file has; one a folder where none of its images is labelled."""
    used = set(used)
    folders = {name.rpartition("/")[0] for name in used}
    lines, others = [], Counter[str]()
    for name in names:
        folder = name.rpartition("/")[0]
        if name in used:
            continue
        if folder in folders:
            lines.append(f"{escape(name)}: left out, no label file has it (unlabelled)")
        else:
            others[folder] += 1
    return lines + [
        f"{escape(folder) or '.'}/: {count} images left out, no label file has any of them (unlabelled)"
        for folder, count in sorted(others.items())
    ]


def files_under(root: Path, suffixes: frozenset[str]) -> list[str]:
    """Relative names of all files with one of the suffixes (lower case), sorted; hidden ones are skipped.

    Links are followed, every folder is entered once. An empty list where there is no folder.
    """
    found, folders, seen = [], [""], set[tuple[int, int]]()
    while folders:
        folder = folders.pop()
        for entry, status in _entries(root / folder, seen):
            name = f"{folder}/{entry.name}" if folder else entry.name
            if status:
                folders.append(name)
            elif os.path.splitext(entry.name)[1].lower() in suffixes:
                found.append(name)
    return sorted(found)


def first_files(root: Path, suffixes: frozenset[str], each: int, depth: int = 2) -> Iterator[str]:
    """The first names of each folder, folders that are higher first: enough to see what a folder is.

    At most `each` files of a folder and 2000 folders; memory stays bounded in a folder of a million files.
    """
    level, seen = [""], set[tuple[int, int]]()
    for remaining in range(depth, -1, -1):
        below: list[str] = []
        for folder in level:
            files: list[str] = []
            for entry, is_folder in _entries(root / folder, seen):
                name = f"{folder}/{entry.name}" if folder else entry.name
                if is_folder:
                    below.append(name)
                elif os.path.splitext(entry.name)[1].lower() in suffixes:
                    files.append(name)
                    if len(files) > 2 * each + 1000:
                        files = heapq.nsmallest(each, files)
            yield from heapq.nsmallest(each, files)
        level = sorted(below)[:_MAX_FOLDERS] if remaining else []


def _entries(folder: Path, seen: set[tuple[int, int]]) -> Iterator[tuple[os.DirEntry[str], bool]]:
    """What is in the folder and whether it is a folder itself; nothing for one that was seen or cannot be listed."""
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    yield entry, is_folder(entry)
    except OSError:
        return


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder; a link that leads to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def peek(root: Path, depth: int) -> list[str]:
    """Relative names of files down to `depth` folders below the root; of each folder a few, hidden ones never.

    All of them where no folder has more than 400 entries or 12 folders. Never raises.
    """
    names: list[str] = []
    level = [""]
    for _ in range(depth + 1):
        below: list[str] = []
        for prefix in level:
            folders: list[str] = []
            try:
                with os.scandir(root / prefix) as entries:
                    for entry in islice(entries, _ENTRIES):
                        if not entry.name.startswith(".") and entry.name != "__MACOSX":
                            (folders if is_folder(entry) else names).append(prefix + entry.name)
            except OSError:  # unreadable
                continue
            below += [f"{folder}/" for folder in sorted(folders)[:_FOLDERS]]
        level = below
    return sorted(names)


def head(path: Path, count: int = 65536) -> bytes:
    """The first bytes of a regular file; none of what cannot be read, and never waits on a pipe."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return b""
    if not stat.S_ISREG(os.fstat(handle).st_mode):  # before `fdopen`, which raises for a folder
        os.close(handle)
        return b""
    with os.fdopen(handle, "rb") as file:
        try:
            return file.read(count)
        except OSError:
            return b""
