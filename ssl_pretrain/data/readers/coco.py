"""COCO JSON: `annotations/*.json`, a JSON beside the images, or one in each split's folder; or the JSON file itself.

Boxes are `[x, y, width, height]` from the image's top left corner, their end exclusive; outlines are polygons or runs
(`data.shapes`). Classes are the categories' names: ids may have gaps and differ from file to file. An image without an
annotation shows no object; an image without an entry is unlabelled and left out. Regions of many objects (`iscrowd`)
are left out, for they are no object. The layout: https://cocodataset.org/#format-data
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_pretrain.data.files import Rejected, escape, scan
from ssl_pretrain.data.gathering import Gathering, Objects
from ssl_pretrain.data.lookup import MANY, Lookup, first_files, split_in, split_word, unlabelled
from ssl_pretrain.data.readers import LabelledSet, size_or_none
from ssl_pretrain.data.shapes import Mask, Shape, box, compressed, mask, polygon
from ssl_pretrain.data.tables import HEAD_BYTES, numbers, read_json, whole_number
from ssl_pretrain.errors import DataError

LAYOUT = "COCO JSON with images, annotations and categories, in annotations/ or beside the images"
_LISTS = rb'"(?:images|annotations|categories)"\s*:\s*\['
_WORDS = (b'"file_name"', b'"image_id"', b'"category_id"', b'"categories"', b'"supercategory"')
_THIN_PX = 1


@dataclass(frozen=True)
class _File:
    """What is looked up while one JSON is read."""

    path: Path
    base: Path
    """What the names of images are relative to."""
    lookup: Lookup
    near: list[str]
    """Folders where its images are looked for first."""
    split: str | None
    used: dict[str, str]
    """Which JSON each image was in; shared by all files."""
    gathering: Gathering

    @property
    def name(self) -> str:
        return escape(self.path.name)


def recognise(root: Path) -> bool:
    """Whether there is a JSON file that has COCO's lists and fields in its first or last 64 KiB."""
    return bool(_label_files(root, each=20, first=True))


def read(root: Path) -> LabelledSet:
    """All images that have an entry and a file, with their boxes and outlines.

    Raises `DataError` when two files have an entry for the same image: then the file that is meant must be given.
    """
    paths = _label_files(root, each=MANY, first=False)
    if not paths:
        raise DataError(f"{escape(str(root))} has no COCO JSON: one with images, annotations and categories")
    base, names = (root, scan([root]).names) if root.is_dir() else _around(root)
    if not names:
        raise DataError(f"{escape(str(root))} has labels ({escape(paths[0].name)}) but no images")
    gathering = Gathering("coco", "box")
    lookup, used = Lookup(names), dict[str, str]()
    for path in paths:
        folder = path.parent.relative_to(base).as_posix()
        above = "" if "/" not in folder else folder.rpartition("/")[0]
        split = split_word(path.stem) or split_in(path.relative_to(base).as_posix())
        near = [place.strip("/").removeprefix("./") for place in (folder, f"{folder}/images", f"{above}/images", above)]
        near = ["" if place == "." else place for place in near]
        if split is not None:
            near = [f"{place}/{split}".strip("/") for place in near] + near
        _read_file(_File(path, base, lookup, near, split, used, gathering))
    thin = sum(
        int((image.boxes_N4[:, 2:] - image.boxes_N4[:, :2] <= _THIN_PX).any(1).sum()) for image in gathering.images
    )
    if thin:
        gathering.problems.append(f"{thin} boxes are at most {_THIN_PX} px wide or high; they are kept")
    gathering.problems += gathering.group_by_folder() + unlabelled(names, used)
    return gathering.done()


def _label_files(root: Path, each: int, first: bool) -> list[Path]:
    """`root`, or the COCO files in it, in `*/` and in `*/annotations/`."""
    if not root.is_dir():
        return [root] if root.suffix.lower() == ".json" and _is_coco(root) else []
    found = []
    for name in first_files(root, frozenset({".json"}), each):
        if (name.count("/") < 2 or name.split("/")[1].lower() == "annotations") and _is_coco(root / name):
            found.append(root / name)
            if first:
                break
    return found


def _is_coco(path: Path) -> bool:
    """By its first and last 64 KiB: files of results, captions and other tools have not all of it."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            start = file.read(HEAD_BYTES)
            file.seek(max(path.stat().st_size - HEAD_BYTES, 0))
            text = start + file.read(HEAD_BYTES)
    except OSError:
        return False
    is_object = start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
    others = re.search(rb'"assets"\s*:|"shapes"\s*:|"caption"\s*:', text)
    return is_object and not others and bool(re.search(_LISTS, text)) and sum(word in text for word in _WORDS) >= 2


def _around(path: Path) -> tuple[Path, list[str]]:
    """The nearest folder above the file that has images, at most three up, and their names."""
    for base in list(path.absolute().parents)[:3]:
        names = scan([base]).names
        if names:
            return base, names
    return path.absolute().parent, []


# --- one file ---------------------------------------------------------------------------------------------------------


def _read_file(file: _File) -> None:
    problems, gathering = file.gathering.problems, file.gathering
    data = _parsed(file.path)
    names = _categories(data["categories"], file.name, problems)
    by_image: dict[object, list[tuple[str, dict[str, Any]]]] = {}
    nowhere = gathering.objects((0, 0))
    for i, annotation in enumerate(data["annotations"], 1):
        where = f"{file.name}: annotation no. {i}"
        if not isinstance(annotation, dict):
            nowhere.lost(where, "", "it is not an object")
            continue
        if (number := whole_number(annotation.get("id"))) is not None:
            where = f"{file.name}: annotation {number}"
        by_image.setdefault(_key(annotation.get("image_id")), []).append((where, annotation))
    data["annotations"].clear()  # so that each is gone after its image
    empty = 0
    for key, name, entry, why_not in _entries(data["images"], file):
        annotations = by_image.pop(key, [])
        size_px = size_or_none(file.base / name, problems, name) if name else None
        if size_px is None:
            _count(annotations, names, gathering)
            if why_not:
                problems.append(f"{file.name}: {why_not} ({len(annotations)} objects)")
            continue
        _compare_size(entry, file.name, name, size_px, problems)
        objects = gathering.objects(size_px)
        for where, annotation in annotations:
            _annotation(annotation, where, names, objects)
        empty += not annotations
        group = entry.get("group")  # ours: `writers.coco` keeps patients and slides by it
        group = group if isinstance(group, str) and group else None
        gathering.add(file.base / name, name, objects, group=group, split=file.split or split_in(name))
    for annotations in by_image.values():
        for where, annotation in annotations:
            label, _ = _label(annotation, names)
            nowhere.lost(
                where, label, f"its image id {_shown(annotation.get('image_id'))} is not in the list of images"
            )
    if empty:
        problems.append(f"{file.name}: {empty} images without an annotation, taken as images without objects")


def _parsed(path: Path) -> dict[str, list[Any]]:
    """The three lists. Raises `DataError`."""
    try:
        data = read_json(path)
    except Rejected as why:
        raise DataError(f"{escape(path.name)} cannot be read: {why.detail}") from why
    lists = {key: data.get(key) for key in ("images", "annotations", "categories")} if isinstance(data, dict) else {}
    for key in ("images", "annotations", "categories"):
        if not isinstance(lists.get(key), list):
            raise DataError(f"{escape(path.name)} has no list of {key}: it is not COCO JSON")
    return {key: value for key, value in lists.items() if isinstance(value, list)}


def _key(value: object) -> object:
    """An id to look up: a whole number or a text; None for all else."""
    return value if isinstance(value, str) else whole_number(value)


def _shown(value: object) -> str:
    return escape(repr(value)[:40])


def _categories(entries: list[Any], file: str, problems: list[str]) -> dict[object, str]:
    """The name of each id; an id with two names has none."""
    names: dict[object, str] = {}
    twice = set[object]()
    for i, entry in enumerate(entries, 1):
        key = _key(entry.get("id")) if isinstance(entry, dict) else None
        name = entry.get("name") if isinstance(entry, dict) else None
        if key is None or not isinstance(name, str) or not name.strip():
            problems.append(f"{file}: category no. {i} left out, it has no id or no name")
        elif names.setdefault(key, name) != name:
            problems.append(
                f"{file}: category id {_shown(key)} is both {escape(names[key])} and {escape(name)}: not used"
            )
            twice.add(key)
    for name, count in Counter(names.values()).items():
        if count > 1:
            problems.append(f"{file}: {count} category ids have the name {escape(name)}: taken as one class")
    return {key: name for key, name in names.items() if key not in twice}


def _entries(entries: list[Any], file: _File) -> list[tuple[object, str, dict[str, Any], str]]:
    """Of each image: its id, its name, its entry, and, where there is no name, why not."""
    count = Counter(_key(entry.get("id")) for entry in entries if isinstance(entry, dict))
    found: list[tuple[object, str, dict[str, Any], str]] = []
    for i, entry in enumerate(entries, 1):
        key = _key(entry.get("id")) if isinstance(entry, dict) else None
        wanted = entry.get("file_name") if isinstance(entry, dict) else None
        if key is None or not isinstance(wanted, str):
            found.append((object(), "", {}, f"image no. {i} left out, it has no id or no file name"))
        elif count[key] > 1:
            found.append((key, "", entry, f"{escape(wanted)} left out, its image id {_shown(key)} is given twice"))
        else:
            try:
                name = file.lookup.find(wanted, file.near, file.split)
            except ValueError as why:
                found.append((key, "", entry, f"{escape(wanted)} left out, {why}"))
                continue
            if file.used.get(name, str(file.path)) != str(file.path):
                raise DataError(
                    f"{escape(file.used[name])} and {escape(str(file.path))} both have {escape(name)}: "
                    "give the file that is meant instead of the folder"
                )
            if name in file.used:
                found.append((key, "", entry, f"image id {_shown(key)} left out, {escape(name)} has an entry already"))
            else:
                file.used[name] = str(file.path)
                found.append((key, name, entry, ""))
    return found


def _compare_size(entry: dict[str, Any], file: str, name: str, size_px: tuple[int, int], problems: list[str]) -> None:
    """Another size in the JSON means that the boxes may be meant for another image."""
    stated = (whole_number(entry.get("width")), whole_number(entry.get("height")))
    if None not in stated and stated not in ((0, 0), size_px):
        stated_size = f"{_shown(stated[0])} x {_shown(stated[1])}"
        problems.append(f"{escape(name)}: {file} says {stated_size} px, but the image is {size_px[0]} x {size_px[1]}")


# --- one object -------------------------------------------------------------------------------------------------------


def _label(annotation: dict[str, Any], names: dict[object, str]) -> tuple[str, str]:
    """The class, and why there is none."""
    key = _key(annotation.get("category_id"))
    if key in names:
        return names[key], ""
    shown = _shown(annotation.get("category_id"))
    return f"category {shown}", f"its category id {shown} is not in the list of categories"


def _count(annotations: list[tuple[str, dict[str, Any]]], names: dict[object, str], gathering: Gathering) -> None:
    for _, annotation in annotations:
        gathering.annotated[escape(_label(annotation, names)[0].strip())] += 1


def _annotation(annotation: dict[str, Any], where: str, names: dict[object, str], objects: Objects) -> None:
    label, why_not = _label(annotation, names)
    if annotation.get("iscrowd") in (1, True):
        why_not = why_not or "it marks a crowd (iscrowd), not an object"
    if why_not:
        objects.lost(where, label, why_not)
        return
    shape: Shape | None = None
    try:
        shape = _shape(annotation.get("segmentation"), objects.size_px)
    except (ValueError, OverflowError) as why:
        objects.gathering.problems.append(f"{where} ({escape(label)}): outline left out, {escape(str(why))}")
    try:
        x0, y0, x1, y1 = _corners(annotation.get("bbox"), shape)
    except ValueError as why:
        objects.lost(where, label, str(why))
        return
    objects.box(where, label, x0, y0, x1, y1, shape)


def _corners(bbox: object, shape: Shape | None) -> tuple[float, float, float, float]:
    """Of the box as it is written, or else of what encloses the outline. Raises `ValueError`."""
    if bbox is None or bbox == []:
        if shape is None:
            raise ValueError("it has neither box nor outline")
        return box(shape)
    try:
        x, y, width, height = numbers(bbox, 4)
    except ValueError as error:
        raise ValueError("malformed box") from error
    return x, y, x + width, y + height


def _shape(segmentation: object, size_px: tuple[int, int]) -> Shape | None:
    """Polygons or runs; None where there is no outline. Raises `ValueError`."""
    if segmentation is None or segmentation == []:
        return None
    if isinstance(segmentation, list):
        return polygon(segmentation)
    if not isinstance(segmentation, dict):
        raise ValueError("neither polygons nor runs")
    height, width = (whole_number(side) for side in numbers(segmentation.get("size"), 2))
    if (width, height) != size_px:
        raise ValueError(f"its runs are for an image of {width} x {height} px")
    return _runs((size_px[1], size_px[0]), segmentation.get("counts"))


def _runs(size_hw: tuple[int, int], counts: object) -> Mask:
    if isinstance(counts, str):
        return compressed(size_hw, counts)
    runs = [whole_number(run) for run in counts] if isinstance(counts, list) else [None]
    if None in runs:
        raise ValueError("runs that are neither whole numbers nor text")
    return mask(size_hw, [run for run in runs if run is not None])
