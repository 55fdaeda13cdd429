"""Pascal VOC: `Annotations/x.xml` beside `JPEGImages/` or another folder of images; `ImageSets/Main/` gives the split.

Corners are taken as they are written, as edges in pixels: what labelImg and its heirs write. (The challenge of 2007
counted pixels from 1 and included the last one, which is up to one pixel off.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import ParseError, fromstring

from ssl_pretrain.data.files import Rejected, escape, read_bytes, scan
from ssl_pretrain.data.readers import (
    SPLITS,
    LabelledImage,
    LabelledSet,
    classes_of,
    number,
    size_or_none,
    stays_inside,
)
from ssl_pretrain.errors import DataError

LAYOUT = "Annotations/*.xml of Pascal VOC beside JPEGImages/"
_MAX_XML_BYTES = 64 << 20


def recognise(root: Path) -> bool:
    """Whether there is a folder `Annotations` with XML files, or one beside `JPEGImages`."""
    return bool(_xml_files(root)) or ((root / "Annotations").is_dir() and (root / "JPEGImages").is_dir())


def read(root: Path) -> LabelledSet:
    """All images that have an XML file, with their boxes."""
    xml_files = _xml_files(root)
    folder = _image_folder(root)
    names = scan([root / folder]).names if folder is not None else []
    if not names or folder is None:
        raise DataError(f"{escape(str(root))} has {len(xml_files)} XML files in Annotations/ but no folder of images")
    if not xml_files:
        raise DataError(f"{escape(str(root))} has {len(names)} images in {folder}/ but no XML file in Annotations/")
    problems: list[str] = []
    images: list[LabelledImage] = []
    splits = _splits(root, {path.stem for path in xml_files}, problems)
    by_stem = {name.rpartition(".")[0]: name for name in reversed(names)}
    known, used = set(names), dict[str, str]()
    clipped = 0
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
        boxes, labels, cut = _objects(tree, path, size_px, problems)
        clipped += cut
        boxes_N4 = np.array(boxes, np.float64).reshape(-1, 4)
        images.append(
            LabelledImage(root / folder / name, size_px, boxes_N4, labels, escape(name), splits.get(path.stem))
        )
    problems += [f"{escape(name)}: left out, missing label file (unlabelled)" for name in names if name not in used]
    if clipped:
        problems.append(f"{clipped} boxes reached over the edge of their image and were clipped")
    return LabelledSet("voc", _found(images), "box", classes_of(images), tuple(images), tuple(problems))


def _found(images: list[LabelledImage]) -> str:
    count = sum(len(image.labels) for image in images)
    sizes = {split: sum(image.split == split for image in images) for split in SPLITS}
    parts = ", ".join(f"{split} {size}" for split, size in sizes.items() if size)
    classes = len(classes_of(images))
    return f"{count} boxes of {classes} classes in {len(images)} images" + (f" ({parts})" if parts else "")


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


def _objects(
    tree: Any, path: Path, size_px: tuple[int, int], problems: list[str]
) -> tuple[list[list[float]], tuple[str, ...], int]:
    """Boxes clipped to the image, their labels, and how many were clipped."""
    boxes: list[list[float]] = []
    labels: list[str] = []
    clipped = 0
    width, height = size_px
    for i, thing in enumerate(tree.findall("object"), 1):
        label = escape((thing.findtext("name") or "").strip())
        where = f"{escape(path.name)}: object {i} ({label or 'without a name'}) left out"
        try:
            x0, y0, x1, y1 = (number(thing.findtext(f"bndbox/{corner}")) for corner in ("xmin", "ymin", "xmax", "ymax"))
        except ValueError:
            problems.append(f"{where}, malformed box")
            continue
        inside = [min(max(x0, 0), width), min(max(y0, 0), height), min(max(x1, 0), width), min(max(y1, 0), height)]
        if not label:
            problems.append(f"{where}, it has no class")
        elif x1 < x0 or y1 < y0:
            problems.append(f"{where}, its corners are swapped")
        elif x1 == x0 or y1 == y0:
            problems.append(f"{where}, zero-size box at ({x0:g}, {y0:g})")
        elif inside[0] >= inside[2] or inside[1] >= inside[3]:
            problems.append(f"{where}, its box is outside the image")
        else:
            clipped += inside != [x0, y0, x1, y1]
            boxes.append(inside)
            labels.append(label)
    return boxes, tuple(labels), clipped
