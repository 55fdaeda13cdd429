"""CISD's own JSON: `{assets: [{file_name, set, annotations: [{data: [{mask: {size, counts}}]}]}]}`.

Runs go row by row, background first: COCO's go column by column, so a reader of COCO would shear every mask. Of several
annotations of an image the first is taken, as the data set's own code does. Images are in `center_slice/` or `edf/`;
the first part of a name, up to `_`, is taken for the slide, and so for the group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_pretrain.data.files import Rejected, escape, read_bytes, scan
from ssl_pretrain.data.gathering import Gathering, Objects
from ssl_pretrain.data.label_images import NAMELESS
from ssl_pretrain.data.lookup import head
from ssl_pretrain.data.readers import LabelledSet, size_or_none, split_of, stays_inside
from ssl_pretrain.data.shapes import box, row_major
from ssl_pretrain.errors import DataError

LAYOUT = "CISD.json (assets with masks as runs, row by row) beside center_slice/ or edf/"
FOLDERS = ("center_slice", "edf", "")
"""Where images are looked for; the first with any is taken."""
_MAX_JSON_BYTES = 512 << 20
_CLASS_KEYS = ("category", "category_name", "class", "class_name", "label")


def recognise(root: Path) -> bool:
    """Whether there is a `CISD.json`, or another JSON file that starts with `assets`."""
    return _json_file(root) is not None


def read(root: Path) -> LabelledSet:
    """All images that the file lists; the box of an object encloses its pixels. Raises `DataError`."""
    path = _json_file(root)
    if path is None:
        raise DataError(f"{escape(str(root))} has no {LAYOUT}")
    document = _load(path)
    folder = next((name for name in FOLDERS if name == "" or _images(root / name)), "")
    names = _images(root / folder)
    gathering = Gathering("rle_json", "box")
    known, used = _categories(document), set[str]()
    for i, asset in enumerate(document["assets"], 1):
        if not isinstance(asset, dict) or not isinstance(asset.get("file_name"), str):
            gathering.problems.append(f"{escape(path.name)}: asset {i} left out, it has no file_name")
            continue
        _asset(root / folder, asset, names, known, used, gathering)
    gathering.problems += [
        f"{escape(name)}: left out, not in {escape(path.name)} (unlabelled)" for name in names if name not in used
    ]
    unused = [name for name in FOLDERS if name not in ("", folder) and _images(root / name)]
    gathering.problems += [f"{name}/: left out, the same fields as in {folder}/" for name in unused]
    nameless = f"; without a class in the file, so {NAMELESS!r}" if NAMELESS in gathering.annotated else ""
    return gathering.done(
        f"{gathering.annotated.total()} masks in {len(gathering.images)} images of {folder or 'the folder'}, "
        f"grouped by the first part of their names{nameless}"
    )


def _json_file(root: Path) -> Path | None:
    try:
        files = sorted(path for path in root.glob("*.json") if not path.name.startswith("."))
    except OSError:
        return None
    for path in files:
        start = b"".join(head(path).split())
        if b'"assets":[' in start and b'"images":[' not in start:
            return path
    return None


def _images(folder: Path) -> list[str]:
    """Of the folder alone, not of `stack/` below the root."""
    return [name for name in scan([folder]).names if "/" not in name] if folder.is_dir() else []


def _load(path: Path) -> dict[str, Any]:
    where = escape(path.name)
    try:
        document = json.loads(read_bytes(path, _MAX_JSON_BYTES))
    except Rejected as why:
        raise DataError(f"{where} cannot be read: {why.reason}, {why.detail}") from why
    except (ValueError, RecursionError) as error:  # also not UTF-8, numbers of thousands of digits, deep nesting
        raise DataError(f"{where} is malformed JSON ({escape(str(error))[:200]})") from error
    if not isinstance(document, dict) or not isinstance(document.get("assets"), list):
        raise DataError(f"{where} has no list `assets`")
    return document


def _categories(document: Mapping[str, Any]) -> dict[int, str]:
    """Class names by id, where the file has a list of them as COCO does."""
    listed = document.get("categories")
    known: dict[int, str] = {}
    for entry in listed if isinstance(listed, list) else []:
        if isinstance(entry, dict) and type(entry.get("id")) is int and isinstance(entry.get("name"), str):
            known[entry["id"]] = entry["name"]
    return known


def _asset(
    folder: Path,
    asset: Mapping[str, Any],
    names: Sequence[str],
    known: Mapping[int, str],
    used: set[str],
    gathering: Gathering,
) -> None:
    file_name, things = asset["file_name"], _things(asset, gathering.problems)
    where, own = escape(file_name), file_name.rpartition("/")[2]
    why = ""
    if not stays_inside(file_name):
        why = "its name leads out of the folder"
    elif own not in names:
        why = "missing image"
    elif own in used:
        why = "an asset before is about the same image"
    size_px = None if why else size_or_none(folder / own, gathering.problems, own)
    if why:
        gathering.problems.append(f"{where}: left out, {why} ({len(things)} objects)")
    if size_px is None:
        gathering.annotated.update(escape(_label(thing, known)) for thing in things)
        return
    used.add(own)
    objects = gathering.objects(size_px)
    for i, thing in enumerate(things, 1):
        _object(thing, f"{where}: object {i}", _label(thing, known), objects)
    split = split_of(f"{asset['set']}/x") if isinstance(asset.get("set"), str) else None
    gathering.add(folder / own, own, objects, group=own.partition("_")[0], split=split)


def _things(asset: Mapping[str, Any], problems: list[str]) -> list[Any]:
    """The objects of the first annotation."""
    annotations, where = asset.get("annotations"), escape(asset["file_name"])
    if not isinstance(annotations, list) or not all(isinstance(entry, dict) for entry in annotations):
        problems.append(f"{where}: malformed annotations")
        return []
    if len(annotations) > 1:
        problems.append(f"{where}: {len(annotations)} annotations, of which the first is taken")
    things = annotations[0].get("data", []) if annotations else []
    if not isinstance(things, list):
        problems.append(f"{where}: malformed annotations")
        return []
    return things


def _label(thing: Any, known: Mapping[int, str]) -> str:
    """The class, by whatever key says it: which one the file has is not documented."""
    if not isinstance(thing, dict):
        return NAMELESS
    said = [thing[key] for key in _CLASS_KEYS if isinstance(thing.get(key), str) and thing[key].strip()]
    number = thing.get("category_id")
    if said:
        return str(said[0]).strip()
    return known.get(number, str(number)) if type(number) is int else NAMELESS


def _object(thing: Any, where: str, label: str, objects: Objects) -> None:
    mask = thing.get("mask") if isinstance(thing, dict) else None
    size = mask.get("size") if isinstance(mask, dict) else None
    if not isinstance(mask, dict) or not isinstance(size, list) or len(size) != 2:
        return objects.lost(where, label, "malformed mask")
    if size != [objects.size_px[1], objects.size_px[0]]:
        image = f"{objects.size_px[0]} x {objects.size_px[1]} px"
        return objects.lost(where, label, f"its mask is not of the image's {image}")
    try:
        of = row_major((objects.size_px[1], objects.size_px[0]), mask.get("counts", []))
    except ValueError as error:
        return objects.lost(where, label, f"malformed mask ({error})")
    if len(of.runs_R) < 2:
        return objects.lost(where, label, "the mask is empty")
    objects.box(where, label, *box(of), of)
