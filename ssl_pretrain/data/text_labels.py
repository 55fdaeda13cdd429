"""Label files of text lines, one an image: the first line, by which formats that share `labels/` are told apart.

And what lies around YOLO's: class names and splits in `data.yaml`, `classes.txt`, `obj.names`, Darknet's lists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ssl_pretrain.data.files import Rejected, escape, read_bytes
from ssl_pretrain.data.lookup import Lookup, files_under, first_files
from ssl_pretrain.data.readers import SPLIT_WORDS

_LISTS = frozenset({"classes.txt", "labels.txt", "train.txt", "val.txt", "valid.txt", "test.txt", "trainval.txt"})
YAMLS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
NAME_LISTS = ("classes.txt", "obj.names", "labels/classes.txt", "obj_train_data/classes.txt", "_darknet.labels")
_MAX_BYTES = 64 << 20
_MAX_YAML_BYTES = 1 << 20
_MAX_CLASSES = 100_000
_MAX_DEPTH = 20


@dataclass(frozen=True)
class Config:
    """Class names, the splits of images, and whether lines end in keypoints."""

    names: dict[int, str] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    keypoints: bool = False

    def label(self, index: int) -> str | None:
        """The name of a class, which is its number where no names are given; None for one beyond the names."""
        return self.names.get(index) if self.names else str(index)


def lines_of(path: Path) -> list[str]:
    """The lines that say something. Raises `Rejected` or `UnicodeDecodeError`."""
    try:
        text = read_bytes(path, _MAX_BYTES).decode("utf-8-sig")
    except Rejected as why:
        if why.reason == "empty":
            return []
        raise
    return [line.strip() for line in text.splitlines() if line.strip()]


def first_line(root: Path) -> str | None:
    """The first line of the first label file that has one; a few files of each folder are looked at.

    Empty when they have none, None when there is no label file: one in a folder `labels`, or else one with the name of
    an image beside it.
    """
    if not root.is_dir():
        return None
    names = [name for name in first_files(root, frozenset({".txt"}), each=50, depth=3) if not is_list(name)]
    in_labels = [name for name in names if "labels" in name.lower().split("/")[:-1]]
    label_files = in_labels or [name for name in names if _has_image(root / name)]
    for name in label_files:
        try:
            lines = lines_of(root / name)
        except (Rejected, UnicodeDecodeError):
            continue
        if lines:
            return lines[0]
    return "" if label_files else None


def is_list(name: str) -> bool:
    """Whether a text file is one that lies beside labels and is none."""
    base = name.rpartition("/")[2].lower()
    return base in _LISTS or base.startswith("readme")


def _has_image(path: Path) -> bool:
    suffixes = (".jpg", ".png", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
    return any(path.with_suffix(end).is_file() for suffix in suffixes for end in (suffix, suffix.upper()))


def has_names(root: Path) -> bool:
    """Whether a file gives class names for YOLO."""
    if any((root / name).is_file() for name in NAME_LISTS[:2]):
        return True
    return any("names" in _yaml(root / name, []) for name in YAMLS if (root / name).is_file())


def read_config(root: Path, images: Sequence[str], problems: list[str]) -> Config:
    """What the files around the labels say; `images` are relative to `root`."""
    found = [name for name in YAMLS if (root / name).is_file()]
    problems += [f"{name}: not read, {found[0]} is" for name in found[1:]]
    said = _yaml(root / found[0], problems) if found else {}
    names = _yaml_names(said, found[0], problems) if found else {}
    for name in NAME_LISTS:
        if not (root / name).is_file():
            continue
        try:
            listed = dict(enumerate(lines_of(root / name)))
        except (Rejected, UnicodeDecodeError) as error:
            problems.append(f"{name}: not used, cannot be read ({escape(str(error))})")
            continue
        if names and listed != names:
            problems.append(f"{name}: its class names are not those of the file before it, which are used")
        names = names or listed
    repeated = sorted(name for name, count in Counter(names.values()).items() if count > 1)
    problems += [f"class name {escape(name)} is given to two numbers: taken as one class" for name in repeated]
    return Config(names, _splits(root, said, images, problems), "kpt_shape" in said)


def _yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    """The mapping in the file, all scalars as the text that they are; empty, and a problem, for anything else."""
    try:
        content = read_bytes(path, _MAX_YAML_BYTES)
        if _depth(content) > _MAX_DEPTH:
            raise ValueError("brackets that are nested too deep")
        # BaseLoader builds no more than safe_load, and does not make False of a class called `no`
        data = yaml.load(content, Loader=yaml.BaseLoader)
    except (Rejected, yaml.YAMLError, ValueError, RecursionError) as error:
        problems.append(f"{escape(path.name)}: not used, cannot be read ({escape(str(error))[:200]})")
        return {}
    if not isinstance(data, dict):
        problems.append(f"{escape(path.name)}: not used, it holds no keys")
        return {}
    return data


def _depth(content: bytes) -> int:
    """How deep brackets are nested: the parser takes seconds over a thousand that are open."""
    depth = deepest = 0
    for c in content:
        depth = max(depth + (c in b"[{") - (c in b"]}"), 0)
        deepest = max(deepest, depth)
    return deepest


def _yaml_names(said: dict[str, Any], file: str, problems: list[str]) -> dict[int, str]:
    raw = said.get("names")
    pairs = list(enumerate(raw)) if isinstance(raw, list) else list(raw.items()) if isinstance(raw, dict) else []
    names: dict[int, str] = {}
    for index, name in pairs[:_MAX_CLASSES]:
        digits = str(index) if isinstance(index, (int, str)) else ""
        if not (digits.isdecimal() and len(digits) < 7 and isinstance(name, str) and name.strip()):
            problems.append(f"{file}: a class name is not used, it is no text or its number is none")
        else:
            names[int(digits)] = name.strip()
    count = said.get("nc")
    if isinstance(count, str) and count != str(len(names)):
        problems.append(f"{file}: nc is {escape(count[:20])}, but there are {len(names)} class names")
    return names


def _splits(root: Path, said: dict[str, Any], images: Sequence[str], problems: list[str]) -> dict[str, str]:
    """The split of each image by the lists and folders that the YAML gives, or by Darknet's lists at the top."""
    texts = files_under(root, frozenset({".txt"}))
    places = [(key, place) for key in ("train", "val", "valid", "test") for place in _places(said.get(key))]
    if not places:
        places = [(name.partition(".")[0], name) for name in texts if name in _LISTS and name[:-4] in SPLIT_WORDS]
    lookup, splits, twice = Lookup(images), dict[str, str](), 0
    for key, place in places:
        members = _members(root, place, texts, images, lookup)
        if not members:
            problems.append(f"split {key}: nothing is found for {escape(place[:200])}")
        for name in members:
            twice += splits.setdefault(name, SPLIT_WORDS[key]) != SPLIT_WORDS[key]
    if twice:
        problems.append(f"{twice} images are in two splits; the first of train, val and test is taken")
    return splits


def _places(value: object) -> list[str]:
    items = value if isinstance(value, list) else [value]
    return [item.strip() for item in items if isinstance(item, str) and item.strip()]


def _members(root: Path, place: str, texts: Sequence[str], images: Sequence[str], lookup: Lookup) -> list[str]:
    """The images of a folder or of a list. The place is compared with what was found, never opened as it stands."""
    parts = [part for part in place.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    for k in range(len(parts)):
        tail = "/".join(parts[k:])
        if tail in texts:
            return _listed(root / tail, lookup)
        if found := [name for name in images if name.startswith(f"{tail}/")]:
            return found
    return [] if parts else list(images)


def _listed(path: Path, lookup: Lookup) -> list[str]:
    try:
        lines = lines_of(path)
    except (Rejected, UnicodeDecodeError):
        return []
    found = []
    for line in lines:
        try:
            found.append(lookup.find_tail(line))
        except ValueError:
            continue  # an image that is not here has no split to know
    return found
