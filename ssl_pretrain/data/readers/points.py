"""Points: `images/x.jpg` with `labels/x.txt`, a line `x y class` an object (or `x,y,class`), in pixels.

An empty label file says that the image shows no object; a missing one says nothing, so the image is left out.
"""

from __future__ import annotations

import re
from pathlib import Path

from ssl_pretrain.data.files import Rejected, escape, scan
from ssl_pretrain.data.gathering import Gathering
from ssl_pretrain.data.lookup import files_under
from ssl_pretrain.data.readers import LabelledSet, number, size_or_none
from ssl_pretrain.data.text_labels import first_line, has_names, is_list, lines_of
from ssl_pretrain.errors import DataError

LAYOUT = "images/ with labels/<name>.txt of lines `x y class`"


def recognise(root: Path) -> bool:
    """Whether the first line of a label file is a point; where there is no line, whether nothing says otherwise.

    Then `labels/` holds nothing but empty text files, and no class names are given, which would be YOLO's.
    """
    if not (root / "labels").is_dir():
        return False
    if line := first_line(root):
        try:
            return bool(_point(line))
        except ValueError:
            return False
    others = any(path.suffix.lower() != ".txt" for path in (root / "labels").iterdir() if path.is_file())
    return (root / "images").is_dir() and not others and not has_names(root)


def read(root: Path) -> LabelledSet:
    """All images that have a label file, with their points as boxes without size."""
    label_files = _label_files(root)
    names = scan([root / "images"]).names if (root / "images").is_dir() else []
    if not names:
        raise DataError(f"{escape(str(root))} has {len(label_files)} label files in labels/ but no image in images/")
    if not label_files:
        raise DataError(f"{escape(str(root))} has {len(names)} images in images/ but no label file in labels/")
    gathering = Gathering("points", "point")
    problems = gathering.problems
    used: dict[str, str] = {}
    for name in names:
        label_file = _stem(name) + ".txt"
        if label_file not in label_files:
            problems.append(f"{escape(name)}: left out, missing label file (unlabelled)")
        elif label_file in used:
            problems.append(f"{escape(name)}: left out, {escape(used[label_file])} has the same label file")
        else:
            used[label_file] = name
            _image(root, name, label_file, gathering)
    for label_file in sorted(label_files - used.keys()):
        problems.append(f"{escape(label_file)}: labels without an image (missing image)")
    return gathering.done()


def _label_files(root: Path) -> set[str]:
    """Relative to `labels/`; `classes.txt`, which annotation tools leave there, is none."""
    return {name for name in files_under(root / "labels", frozenset({".txt"})) if not is_list(name)}


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _point(line: str) -> tuple[float, float, str]:
    """x, y and the class; raises `ValueError`."""
    x, y, label = re.split(r"\s*,\s*|\s+", line, maxsplit=2)
    if re.fullmatch(r"[-+.\deE]+([\s,]+[-+.\deE]+)+", label):
        raise ValueError("more than three numbers")
    return number(x), number(y), label


def _image(root: Path, name: str, label_file: str, gathering: Gathering) -> None:
    size_px = size_or_none(root / "images" / name, gathering.problems, name)
    if size_px is None:
        return
    try:
        lines = lines_of(root / "labels" / label_file)
    except (Rejected, UnicodeDecodeError) as error:
        gathering.problems.append(
            f"{escape(label_file)}: left out with its image, cannot be read ({escape(str(error))})"
        )
        return
    if not lines:
        gathering.problems.append(f"{escape(label_file)}: empty label file (no objects)")
    objects = gathering.objects(size_px)
    for i, line in enumerate(lines, 1):
        try:
            x, y, label = _point(line)
        except ValueError:
            gathering.problems.append(f"{escape(label_file)}: malformed line {i}: {escape(line[:80])}")
            continue
        objects.point(f"{escape(label_file)}: point {i}", label, x, y)
    gathering.add(root / "images" / name, name, objects)
