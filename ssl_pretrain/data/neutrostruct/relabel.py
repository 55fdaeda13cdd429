"""Step 4: the labels of a CVAT file follow the classes of the COCO file with seven.

Shapes and annotations have no common key, so they are matched by their boxes: one to one, the best overlap first,
inside the same image, and only where the shape's class of four is the parent of the annotation's class of seven.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape as xml_escape

import numpy as np
from defusedxml.ElementTree import fromstring
from numpy.typing import NDArray

from ssl_pretrain.data.files import escape
from ssl_pretrain.data.neutrostruct import CHILDREN, PARENT_OF, PARENTS, UNDECIDED, parents, sevens
from ssl_pretrain.data.neutrostruct.coco import Coco
from ssl_pretrain.data.neutrostruct.cvat import Cvat, MetaLabel, attributes
from ssl_pretrain.data.neutrostruct.naming import link, shown
from ssl_pretrain.data.neutrostruct.palette import Palette
from ssl_pretrain.errors import DataError, SslPretrainError, UsageError

MIN_IOU = 0.5
"""Boxes of one object overlap by this much or more: a COCO export may round an ellipse's box to whole pixels."""
_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Relabelled:
    """What was done."""

    after: Mapping[str, int]
    """Shapes by their new label, those that were left alone not counted."""
    matched: int
    shapes_without: tuple[str, ...]
    annotations_without: tuple[str, ...]
    """One line each, on what found no partner."""
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it, for a report."""
        return {
            "matched": self.matched,
            "after": dict(self.after),
            "shapes_without_annotation": list(self.shapes_without),
            "annotations_without_shape": list(self.annotations_without),
            "notes": list(self.notes),
        }


def iou(a_A4: NDArray[np.float64], b_B4: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of boxes (x, y, width, height), float64 (A, B).

    Two squares of 2 px that share a half overlap by 2 of 6:

    >>> iou(np.array([[0.0, 0, 2, 2]]), np.array([[1.0, 0, 2, 2]])).tolist()
    [[0.3333333333333333]]
    """
    a_A14 = a_A4[:, None]
    far = np.minimum(a_A14[..., :2] + a_A14[..., 2:], b_B4[:, :2] + b_B4[:, 2:])
    shared = np.clip(far - np.maximum(a_A14[..., :2], b_B4[:, :2]), 0, None).prod(-1)
    union: NDArray[np.float64] = a_A14[..., 2:].prod(-1) + b_B4[:, 2:].prod(-1) - shared
    overlap: NDArray[np.float64] = shared / union
    return overlap


def match(
    a_A4: NDArray[np.float64],
    b_B4: NDArray[np.float64],
    kind_A: NDArray[np.int64],
    kind_B: NDArray[np.int64],
    min_iou: float = MIN_IOU,
) -> NDArray[np.int64]:
    """Pairs of boxes of the same kind: int64 (P, 2), one to one, the best overlap first.

    The order of the boxes makes no difference: equal overlaps are taken by place and size.

    >>> a, b = np.array([[0.0, 0, 10, 10], [2, 0, 10, 10]]), np.array([[2.0, 0, 10, 10]])
    >>> match(a, b, np.array([0, 0]), np.array([0])).tolist()
    [[1, 0]]
    """
    found: list[NDArray[np.int64]] = []
    overlaps: list[NDArray[np.float64]] = []
    for start in range(0, len(a_A4), _ROWS):  # a block of rows at a time, so that memory stays small
        overlap = iou(a_A4[start : start + _ROWS], b_B4)
        i_P, j_P = np.nonzero((overlap >= min_iou) & (kind_A[start : start + _ROWS, None] == kind_B))
        found.append(np.column_stack([i_P + start, j_P]))
        overlaps.append(overlap[i_P, j_P])
    if not found:
        return np.zeros((0, 2), np.int64)
    pair_P2, overlap_P = np.concatenate(found), np.concatenate(overlaps)
    rank_A, rank_B = _ranks(a_A4), _ranks(b_B4)
    order = np.lexsort((rank_B[pair_P2[:, 1]], rank_A[pair_P2[:, 0]], -overlap_P))
    taken_A, taken_B, kept = np.zeros(len(a_A4), bool), np.zeros(len(b_B4), bool), []
    for i, j in pair_P2[order].tolist():
        if not (taken_A[i] or taken_B[j]):
            taken_A[i] = taken_B[j] = True
            kept.append((i, j))
    return np.array(sorted(kept), np.int64).reshape(-1, 2)


def pairs(
    cvat: Cvat, coco: Coco, parent_of_label: Mapping[str, str | None], parent_of_class: Mapping[str, str | None],
    min_iou: float = MIN_IOU,
) -> NDArray[np.int64]:  # fmt: skip
    """Places in `cvat.shapes` and `coco.annotations` of what belongs together: int64 (P, 2). Raises `DataError`."""
    place = {parent: i for i, parent in enumerate(PARENTS)}
    box_M4 = np.array([shape.box_4 for shape in cvat.shapes], np.float64).reshape(-1, 4)
    kind_M = np.array([place.get(parent_of_label[shape.label] or "", -1) for shape in cvat.shapes], np.int64)
    kind_C = np.array([place.get(parent_of_class[name] or "", -2) for name in coco.classes], np.int64)
    linked = link(coco.images, cvat.images)
    if not linked:
        raise DataError(
            f"no image of the COCO file ({shown(coco.images, 2)}) is in the CVAT file ({shown(cvat.images, 2)})"
        )
    image_M = np.array([shape.image for shape in cvat.shapes], np.int64)
    by_shape, by_annotation = _places(image_M, len(cvat.images)), _places(coco.image_N, len(coco.images))
    place_of = {name: i for i, name in enumerate(cvat.images)}
    found = [np.zeros((0, 2), np.int64)]
    for i, name in enumerate(coco.images):
        if name in linked:
            m, n = by_shape[place_of[linked[name]]], by_annotation[i]
            pair_P2 = match(box_M4[m], coco.box_N4[n], kind_M[m], kind_C[coco.class_N[n]], min_iou)
            found.append(np.column_stack([m[pair_P2[:, 0]], n[pair_P2[:, 1]]]))
    return np.concatenate(found)


def relabel(
    cvat: Cvat, coco7: Coco, palette: Palette, aliases: Mapping[str, str] | None = None, min_iou: float = MIN_IOU
) -> tuple[bytes, Relabelled]:
    """The bytes of the CVAT file with seven classes, and what was done.

    Of a shape nothing but the value of `label` changes. The label list in `<meta>` gets the new names, with the colours
    of `palette`. A shape without a partner becomes what its class always becomes, or else keeps its label, marked
    undecided. Labels that are none of the four classes stay. Raises `DataError`, `UsageError`.
    """
    if not 0 < min_iou <= 1:
        raise UsageError(f"the least overlap is {min_iou:g}: it lies above 0, up to 1")
    parent_of = parents(cvat.labels, aliases)
    if not any(parent_of[shape.label] for shape in cvat.shapes):
        raise DataError(f"no shape has one of the four classes; the labels are {shown(cvat.labels, 9)}")
    class_of = sevens(coco7.classes)
    parent_of_class = {name: _parent(seven) for name, seven in class_of.items()}
    pair_P2 = pairs(cvat, coco7, parent_of, parent_of_class, min_iou)
    new: dict[int, str] = {}
    for m, n in pair_P2.tolist():
        seven = class_of[coco7.classes[coco7.class_N[n]]] or ""
        new[m] = cvat.shapes[m].label + UNDECIDED if seven.endswith(UNDECIDED) else seven
    lonely = [m for m, shape in enumerate(cvat.shapes) if m not in new and parent_of[shape.label]]
    for m in lonely:
        children = CHILDREN[parent_of[cvat.shapes[m].label] or ""]
        new[m] = children[0] if len(children) == 1 else cvat.shapes[m].label + UNDECIDED
    edits = [(_label_value(cvat, m), label) for m, label in new.items()]
    data = _edited(cvat, edits, parent_of, palette, set(new.values()))
    _prove(cvat.data, data)
    matched = set(pair_P2[:, 1].tolist())
    others = Counter(shape.label for shape in cvat.shapes if not parent_of[shape.label])
    notes = [
        *cvat.problems,
        *(f"{count} shapes of {escape(label)} were left alone" for label, count in sorted(others.items())),
    ]
    return data, Relabelled(
        dict(sorted(Counter(new.values()).items())),
        len(pair_P2),
        tuple(_shape_line(cvat, m, new[m]) for m in lonely),
        tuple(_annotation_line(coco7, n) + ", has no shape" for n in range(len(coco7.annotations)) if n not in matched),
        tuple(notes),
    )


def ellipse_diameters(cvat: Cvat, coco4: Coco, aliases: Mapping[str, str] | None = None) -> NDArray[np.float64]:
    """rx + ry of the ellipse of each annotation, in pixels: float64 (N,); NaN of an emptying vesicle without one.

    Never above (w + h) / 2 of the box, and below it for an ellipse that is turned. Raises `DataError` where a granule
    or an empty structure has no ellipse.
    """
    parent_of = parents(coco4.classes, aliases)
    pair_P2 = pairs(cvat, coco4, parents(cvat.labels, aliases), parent_of)
    diameter_N = np.full(len(coco4.annotations), np.nan)
    for m, n in pair_P2.tolist():
        ellipse = cvat.shapes[m].ellipse
        if ellipse is not None:
            diameter_N[n] = ellipse[2] + ellipse[3]
    divided = np.array([parent_of[name] != "emptying" for name in coco4.classes] or [False])[coco4.class_N]
    missing = np.nonzero(divided & np.isnan(diameter_N))[0]
    if len(missing):
        first = _annotation_line(coco4, int(missing[0]))
        raise DataError(
            f"{len(missing)} annotations have no ellipse in the CVAT file (first: {first}): use bbox diameters"
        )
    return diameter_N


def _parent(seven: str | None) -> str | None:
    if seven is not None and seven.endswith(UNDECIDED):
        return "empty"  # granules always have a median
    return PARENT_OF.get(seven or "")


def _ranks(box_A4: NDArray[np.float64]) -> NDArray[np.int64]:
    """The place of each box when they are sorted by their numbers."""
    rank_A = np.empty(len(box_A4), np.int64)
    rank_A[np.lexsort(box_A4.T)] = np.arange(len(box_A4))
    return rank_A


def _places(image_N: NDArray[np.int64], count: int) -> list[NDArray[np.int64]]:
    """The places of each image's objects."""
    order = np.argsort(image_N, kind="stable")
    return np.split(order, np.cumsum(np.bincount(image_N, minlength=count))[:-1])


def _label_value(cvat: Cvat, m: int) -> slice:
    return next(value for name, value in attributes(cvat.data, cvat.tag(m)) if name == "label")


def _edited(
    cvat: Cvat,
    edits: Sequence[tuple[slice, str]],
    parent_of: Mapping[str, str | None],
    palette: Palette,
    used: set[str],
) -> bytes:
    """The bytes with these values replaced, and with the labels of `<meta>` that the four classes become."""
    parts = [(place, xml_escape(text, {'"': "&quot;", "'": "&apos;"}).encode()) for place, text in edits]
    for label in cvat.meta:
        parent = parent_of[label.name]
        if parent is not None:
            undecided = [name for name in (label.name + UNDECIDED,) if name in used]
            parts.append((label.block, _block(cvat.data, label, [*CHILDREN[parent], *undecided], palette)))
    out, last = [], 0
    for place, text in sorted(parts, key=lambda part: part[0].start):
        out += [cvat.data[last : place.start], text]
        last = place.stop
    return b"".join([*out, cvat.data[last:]])


def _block(data: bytes, label: MetaLabel, names: Sequence[str], palette: Palette) -> bytes:
    """The entry of a label, once for each name, with its name and colour."""
    start = label.block.start
    before = data[data.rfind(b">", 0, start) + 1 : start]
    blocks = []
    for name in names:
        edits = [(label.name_text, xml_escape(name).encode())]
        if label.colour_text is not None:
            edits.append((label.colour_text, "#{:02x}{:02x}{:02x}".format(*palette.of(name)).encode()))
        block, last = b"", start
        for place, text in sorted(edits, key=lambda edit: edit[0].start):
            block += data[last : place.start] + text
            last = place.stop
        blocks.append(block + data[last : label.block.stop])
    return before.join(blocks)


def _prove(old: bytes, new: bytes) -> None:
    """That both files say the same but for labels."""
    before, after = (fromstring(data, forbid_dtd=True) for data in (old, new))
    for tree in (before, after):
        for labels in tree.iterfind("meta//labels"):
            labels[:] = []
        for shape in tree.iterfind("image/*"):
            shape.attrib.pop("label", None)
    elements = zip(before.iter(), after.iter(), strict=True)
    if any((a.tag, a.attrib, a.text, a.tail) != (b.tag, b.attrib, b.text, b.tail) for a, b in elements):
        raise SslPretrainError("more than labels would change in the CVAT file: please report this")


def _shape_line(cvat: Cvat, m: int, label: str) -> str:
    shape = cvat.shapes[m]
    x, y, w, h = shape.box_4
    where = f"{escape(cvat.images[shape.image])}: {shape.kind} {escape(shape.label)}"
    return f"{where} at ({x:.1f}, {y:.1f}), {w:.1f} x {h:.1f} px, has no annotation; it is now {escape(label)}"


def _annotation_line(coco: Coco, n: int) -> str:
    x, y, w, h = coco.box_N4[n]
    what = f"{escape(coco.classes[coco.class_N[n]])} (annotation {coco.annotations[n]['id']})"
    return f"{escape(coco.images[coco.image_N[n]])}: {what} at ({x:.1f}, {y:.1f}), {w:.1f} x {h:.1f} px"
