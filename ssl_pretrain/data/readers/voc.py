"""Pascal VOC: `Annotations/x.xml` beside `JPEGImages/` or another folder of images; `ImageSets/Main/` gives the split.

Corners are taken as they are written, as edges in pixels: what labelImg and its heirs write. (The challenge of 2007
counted pixels from 1 and included the last one, which is up to one pixel off.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import ParseError, fromstring

from ssl_pretrain.data.files import Rejected, escape, read_bytes, scan
from ssl_pretrain.data.gathering import Gathering, Objects
from ssl_pretrain.data.lookup import first_files
from ssl_pretrain.data.readers import SPLITS, LabelledSet, number, size_or_none, stays_inside
from ssl_pretrain.errors import DataError

LAYOUT = "Annotations/*.xml of Pascal VOC beside JPEGImages/"
_MAX_XML_BYTES = 64 << 20
_XML = frozenset({".xml"})


def recognise(root: Path) -> bool:
    """Whether `Annotations` has XML files that are not all another tool's, or none but `JPEGImages` is beside it."""
    heads = [_head(root / "Annotations" / name) for name in first_files(root / "Annotations", _XML, each=5, depth=0)]
    if not heads:
        return (root / "Annotations").is_dir() and (root / "JPEGImages").is_dir()
    return any(b"<annotations" not in start for start in heads)  # with an s it is CVAT's


def read(root: Path) -> LabelledSet:
    """All images that have an XML file, with their boxes."""
    xml_files = _xml_files(root)
    folder = _image_folder(root)
    names = scan([root / folder]).names if folder is not None else []
    if not names or folder is None:
        raise DataError(f"{escape(str(root))} has {len(xml_files)} XML files in Annotations/ but no folder of images")
    if not xml_files:
        raise DataError(f"{escape(str(root))} has {len(names)} images in {folder}/ but no XML file in Annotations/")
    gathering = Gathering("voc", "box")
    problems = gathering.problems
    splits = _splits(root, {path.stem for path in xml_files}, problems)
    by_stem = {name.rpartition(".")[0]: name for name in reversed(names)}
    known, used = set(names), dict[str, str]()
    for path in xml_files:
        tree = _parse(path, problems)
        if tree is None:
            continue
        name = _image_name(tree, path, known, by_stem, problems)
        if name is None:
            continue
        if name in used:
            problems.append(f"{escape(path.name)}: left out, {escape(used[name])} is about the same image")
            continue
        used[name] = path.name
        size_px = size_or_none(root / folder / name, problems, name)
        if size_px is None:
            continue
        _compare_size(tree, path, size_px, problems)
        objects = gathering.objects(size_px)
        _objects(tree, path, objects)
        gathering.add(root / folder / name, name, objects, split=splits.get(path.stem))
    problems += [f"{escape(name)}: left out, missing label file (unlabelled)" for name in names if name not in used]
    return gathering.done()


def _head(path: Path) -> bytes:
    try:
        return read_bytes(path, _MAX_XML_BYTES)[:1000]
    except Rejected:
        return b""


def _xml_files(root: Path) -> list[Path]:
    return sorted(path for path in (root / "Annotations").glob("*.xml") if not path.name.startswith("."))


def _image_folder(root: Path) -> str | None:
    """`JPEGImages`, or else the folder beside `Annotations` that holds the most images."""
    counts = {path.name: len(scan([path]).names) for path in sorted(root.iterdir()) if path.is_dir()}
    counts = {name: count for name, count in counts.items() if count and not name.startswith(".")}
    if "JPEGImages" in counts:
        return "JPEGImages"
    return max(counts, key=lambda name: counts[name], default=None)


def _splits(root: Path, stems: set[str], problems: list[str]) -> dict[str, str]:
    """The split of each image; `trainval.txt` says nothing new and is not read."""
    splits: dict[str, str] = {}
    for split in SPLITS:
        path = root / "ImageSets" / "Main" / f"{split}.txt"
        if not path.is_file():
            continue
        try:
            lines = read_bytes(path, _MAX_XML_BYTES).decode().splitlines()
        except (Rejected, UnicodeDecodeError) as error:
            problems.append(f"{path.name}: split list left out, cannot be read ({escape(str(error))})")
            continue
        for stem in (line.strip() for line in lines if line.strip()):
            if stem not in stems:
                problems.append(f"{path.name}: lists {escape(stem)}, which has no XML file")
            elif stem in splits:
                problems.append(f"{path.name}: lists {escape(stem)}, which {splits[stem]}.txt lists already")
            else:
                splits[stem] = split
    return splits


def _parse(path: Path, problems: list[str]) -> Any:
    """The root element; None, and a problem, for what is not a Pascal VOC file. A DTD is refused, so no bombs."""
    try:
        tree = fromstring(read_bytes(path, _MAX_XML_BYTES), forbid_dtd=True)
    except Rejected as why:
        why_not = "empty label file" if why.reason == "empty" else f"{why.reason}, {why.detail}"
    except DefusedXmlException:
        why_not = "a document type or entities are not allowed"
    except (ParseError, ValueError, LookupError) as error:  # the latter for encodings
        why_not = f"malformed XML ({escape(str(error))})"
    else:
        if tree.tag == "annotation":
            return tree
        why_not = f"<{escape(str(tree.tag))}> is not the <annotation> of Pascal VOC"
    problems.append(f"{escape(path.name)}: left out, {why_not}")
    return None


def _image_name(tree: Any, path: Path, known: set[str], by_stem: dict[str, str], problems: list[str]) -> str | None:
    """The image that the file is about, relative to the folder of images: by `<filename>`, or else by its own name."""
    name = (tree.findtext("filename") or "").strip()
    if name and not stays_inside(name):
        problems.append(f"{escape(path.name)}: left out, its file name {escape(name)} leads out of the folder")
        return None
    if name in known:
        return name
    if path.stem not in by_stem:
        problems.append(f"{escape(path.name)}: left out, missing image {escape(name or path.stem)}")
        return None
    found = by_stem[path.stem]
    if name and name.rpartition(".")[0] != path.stem and name != path.stem:
        problems.append(f"{escape(path.name)}: names the missing image {escape(name)}; taken for {escape(found)}")
    return found


def _compare_size(tree: Any, path: Path, size_px: tuple[int, int], problems: list[str]) -> None:
    """Another size in the XML means that the boxes may be meant for another image."""
    try:
        stated = (number(tree.findtext("size/width")), number(tree.findtext("size/height")))
    except ValueError:
        return  # not stated
    if stated not in ((0, 0), size_px):  # some tools write 0
        stated_size = f"{stated[0]:g} x {stated[1]:g}"
        problems.append(f"{escape(path.name)}: says {stated_size} px, but the image is {size_px[0]} x {size_px[1]}")


def _objects(tree: Any, path: Path, objects: Objects) -> None:
    for i, thing in enumerate(tree.findall("object"), 1):
        label, where = thing.findtext("name") or "", f"{escape(path.name)}: object {i}"
        try:
            x0, y0, x1, y1 = (number(thing.findtext(f"bndbox/{corner}")) for corner in ("xmin", "ymin", "xmax", "ymax"))
        except ValueError:
            objects.lost(where, label, "malformed box")
            continue
        objects.box(where, label, x0, y0, x1, y1)
