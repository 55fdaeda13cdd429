"""YOLO text labels: `labels/x.txt` for `images/x.jpg`, or `x.txt` beside `x.jpg`; one line an object.

A line is `class x y width height` (the box's centre and size), or `class x1 y1 x2 y2 x3 y3 ...` (a polygon; an oriented
box is one of four corners), all but the class as fractions of the image's sides. Both may be in one file. Class names
come from `data.yaml`, `classes.txt` or `obj.names`; without them the numbers are the names. An empty label file says
that the image shows no object; a missing one says nothing, so the image is left out.
Layouts: https://docs.ultralytics.com/datasets/detect/ and Darknet's lists (`train.txt`).
"""

from __future__ import annotations

from pathlib import Path

from ssl_pretrain.data.files import Rejected, escape, scan
from ssl_pretrain.data.gathering import Gathering, Objects
from ssl_pretrain.data.lookup import files_under, split_in, unlabelled
from ssl_pretrain.data.readers import LabelledSet, number, size_or_none
from ssl_pretrain.data.shapes import box, polygon
from ssl_pretrain.data.text_labels import Config, first_line, has_names, is_list, lines_of, read_config
from ssl_pretrain.errors import DataError

LAYOUT = "labels/<name>.txt, or <name>.txt beside the image, of lines `class x y width height` (YOLO)"
_OUTSIDE = 1e-3
"""By so much a fraction may be below 0 or above 1; it is clipped then."""
_ROUNDING = 1e-5
"""Of fractions with six digits: an edge this near the image's is the image's."""


def recognise(root: Path) -> bool:
    """Whether the first line of a label file is one of YOLO's; where all are empty, whether class names are given."""
    line = first_line(root)
    if not line:
        return line is not None and has_names(root)
    try:
        return len(_numbers(line)) >= 5
    except ValueError:
        return False


def read(root: Path) -> LabelledSet:
    """All images that have a label file, with their boxes and polygons."""
    if not root.is_dir():
        raise DataError(f"{escape(str(root))} is a file: give the folder of a YOLO data set")
    names = scan([root]).names
    label_files = {name for name in files_under(root, frozenset({".txt"})) if not is_list(name)}
    gathering = Gathering("yolo", "box")
    problems = gathering.problems
    config = read_config(root, names, problems)
    label_file_of = {name: label for name in names if (label := _label_file(name, label_files))}
    if not label_file_of:
        raise DataError(
            f"{escape(str(root))} has {len(names)} images and {len(label_files)} text files, none for an image"
        )
    used: dict[str, str] = {}
    for name, label_file in label_file_of.items():
        if label_file in used:
            problems.append(f"{escape(name)}: left out, {escape(used[label_file])} has the same label file")
            continue
        used[label_file] = name
        size_px = size_or_none(root / name, problems, name)
        if size_px is None:
            continue
        objects = _objects(root, label_file, gathering.objects(size_px), config)
        if objects is not None:
            split = config.splits.get(name) or split_in(name)
            gathering.add(root / name, name, objects, split=split)
    folders = {name.rpartition("/")[0] for name in used}
    problems += [
        f"{escape(name)}: labels without an image (missing image)"
        for name in sorted(label_files - used.keys())
        if name.rpartition("/")[0] in folders or "labels" in name.lower().split("/")[:-1]
    ]
    problems += gathering.group_by_folder() + unlabelled(names, label_file_of)
    return gathering.done()


def _label_file(name: str, label_files: set[str]) -> str | None:
    """By the last folder `images` of the path, which is `labels` there, or else beside the image."""
    stem, folders = name.rpartition(".")[0] + ".txt", name.split("/")[:-1]
    for i in reversed(range(len(folders))):
        if folders[i].lower() == "images":
            swapped = "/".join([*folders[:i], "labels", *folders[i + 1 :], stem.rpartition("/")[2]])
            if swapped in label_files:
                return swapped
            break
    return stem if stem in label_files else None


def _objects(root: Path, label_file: str, objects: Objects, config: Config) -> Objects | None:
    """The objects of one label file; None, and a problem, when it cannot be read."""
    problems, shown = objects.gathering.problems, escape(label_file)
    try:
        lines = lines_of(root / label_file)
    except (Rejected, UnicodeDecodeError) as error:
        problems.append(f"{shown}: left out with its image, cannot be read ({escape(str(error))})")
        return None
    if not lines:
        problems.append(f"{shown}: empty label file (no objects)")
    scores = 0
    for i, line in enumerate(lines, 1):
        try:
            index, *values = _numbers(line)
        except ValueError:
            problems.append(f"{shown}: malformed line {i}: {escape(line[:80])}")
            continue
        label, where = config.label(int(index)), f"{shown}: line {i}"
        if label is None:
            objects.lost(where, f"class {int(index)}", f"there are only {len(config.names)} class names")
            continue
        if config.keypoints:
            values = values[:4]
        scores += len(values) == 5
        _object(values[:4] if len(values) == 5 else values, where, label, objects)
    if scores:
        problems.append(f"{shown}: {scores} lines have a sixth number (a score?), which is not used")
    if repeated := len(lines) - len(set(lines)):
        problems.append(f"{shown}: {repeated} lines repeat another one; they are kept")
    return objects


def _numbers(line: str) -> list[float]:
    """The class's number and 4, 5 or an even count of at least 6 values. Raises `ValueError`."""
    found = [number(word) for word in line.split()]
    values = len(found) - 1
    if values not in (4, 5) and (values < 6 or values % 2):
        raise ValueError("not as many numbers as a line of YOLO has")
    if not found[0].is_integer() or not 0 <= found[0] < 1e6:
        raise ValueError("the class is not a whole number")
    return found


def _object(values: list[float], where: str, label: str, objects: Objects) -> None:
    width, height = objects.size_px
    if not all(-_OUTSIDE <= value <= 1 + _OUTSIDE for value in values):
        objects.lost(where, label, "a value is not within 0 and 1 (pixels instead of fractions?)")
    elif len(values) == 4:
        x, y, w, h = values
        x0, x1, y0, y1 = (_to_edge(edge) for edge in (x - w / 2, x + w / 2, y - h / 2, y + h / 2))
        objects.box(where, label, x0 * width, y0 * height, x1 * width, y1 * height)
    else:
        inside = [min(max(value, 0.0), 1.0) for value in values]
        objects.gathering.clipped += any(abs(a - b) > _ROUNDING for a, b in zip(inside, values, strict=True))
        shape = polygon(
            [[value * side for value, side in zip(inside, (width, height) * (len(values) // 2), strict=True)]]
        )
        objects.box(where, label, *box(shape), shape)


def _to_edge(fraction: float) -> float:
    nearest = min(max(fraction, 0.0), 1.0)
    return nearest if abs(fraction - nearest) <= _ROUNDING else fraction
