"""Cx22, instances of cytoplasm and nucleus in cervical fields: MATLAB files of version 7.3, and images of CCEDD.

    Cx22-{Multi-Train,Multi-Test,Pair}/{cyto,nuc}/{cyto,nuc}_ins.mat, ..._ins_bbox.mat
    Cx22-.../generator/{ImageDataNames,ROIs_x_y,ROIs_W_H}.mat
    CCEDD's png/00477.png, anywhere below the same folder

A field is cut from CCEDD's image at its region, made smaller where a side is longer than 512 px, and laid on 512 x 512
of white, as the set's own generator does (its filter is MATLAB's, ours is Pillow's bicubic one: a shade apart). Several
fields come from one image, which is their group.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssl_pretrain.data.decode import decode
from ssl_pretrain.data.extracting import Field
from ssl_pretrain.data.files import Rejected, escape, scan
from ssl_pretrain.data.lookup import peek
from ssl_pretrain.data.matlab_files import Array, Value, open_mat
from ssl_pretrain.data.shapes import box, of_pixels
from ssl_pretrain.errors import DataError

NAME = "cx22"
LAYOUT = "cyto/cyto_ins.mat, nuc/nuc_ins.mat and generator/ImageDataNames.mat (Cx22) with CCEDD's png/"
SIDE_PX = 512
KINDS = ("cyto", "nuc")
_MARKER = "generator/ImageDataNames.mat"


def recognise(root: Path) -> bool:
    """Whether there are the generator's names and instances, at most four folders down."""
    return bool(_folders(root))


def fields(root: Path, problems: list[str]) -> Iterator[Field]:
    """Every field with its objects. Raises `DataError` for a file that cannot be read, and without CCEDD's images."""
    sources = {Path(name).stem: root / name for name in reversed(scan([root]).names)}
    for folder in _folders(root):
        with open_mat(root / folder / _MARKER) as file:
            names = file.strings("ImageDataNames")
        corners, sizes = (_pairs(root / folder / "generator", what, len(names)) for what in ("ROIs_x_y", "ROIs_W_H"))
        if not any(name in sources for name in names):
            raise DataError(
                f"{escape(str(root))} has none of the {len(set(names))} images that {escape(folder or '.')} is cut "
                "from: put CCEDD's folder png below it"
            )
        yield from _fields(root / folder, folder, names, np.hstack([corners, sizes]), sources, problems)


def cut_out(source: NDArray[np.uint8], x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
    """The field of a region: (512, 512, 3), white where the region ends. Raises `ValueError` outside the image.

    >>> cut_out(np.zeros((20, 20, 3), np.uint8), 2, 3, 4, 5)[:, :, 0].tolist()[4][:6]
    [0, 0, 0, 0, 255, 255]
    """
    if x < 0 or y < 0 or width < 1 or height < 1 or x + width > source.shape[1] or y + height > source.shape[0]:
        raise ValueError("a region outside the image")
    cut = Image.fromarray(source[y : y + height, x : x + width])
    if max(width, height) > SIDE_PX:
        scale = SIDE_PX / max(width, height)
        cut = cut.resize((max(round(width * scale), 1), max(round(height * scale), 1)), Image.Resampling.BICUBIC)
    field = Image.new("RGB", (SIDE_PX, SIDE_PX), "white")
    field.paste(cut, (0, 0))
    return np.array(field)


def _folders(root: Path) -> list[str]:
    """Relative folders that hold the generator's names and instances."""
    found = [name.removesuffix(_MARKER).rstrip("/") for name in peek(root, 4) if f"/{name}".endswith(f"/{_MARKER}")]
    return [folder for folder in found if all((root / folder / kind / f"{kind}_ins.mat").is_file() for kind in KINDS)]


def _split(folder: str) -> str | None:
    name = folder.rpartition("/")[2].lower()
    return "train" if name.endswith("train") else "test" if name.endswith("test") else None


def _pairs(folder: Path, what: str, count: int) -> NDArray[np.int64]:
    """Two whole numbers a field: (count, 2)."""
    with open_mat(folder / f"{what}.mat") as file:
        array = file.array(what)
    if array.shape == (2, count) and count != 2:
        array = array.T
    if array.shape != (count, 2) or not np.isfinite(array.astype(np.float64)).all():
        raise DataError(f"{what}.mat has not two numbers for each of {count} fields")
    return array.astype(np.int64)


def _fields(
    path: Path,
    folder: str,
    names: Sequence[str],
    region_I4: NDArray[np.int64],
    sources: Mapping[str, Path],
    problems: list[str],
) -> Iterator[Field]:
    with contextlib.ExitStack() as stack:
        masks, boxes = dict[str, Sequence[Value]](), dict[str, Sequence[Value]]()
        for kind in KINDS:
            file = stack.enter_context(open_mat(path / kind / f"{kind}_ins.mat"))
            masks[kind] = file.cells(f"{kind}_ins")
            box_path = path / kind / f"{kind}_ins_bbox.mat"
            if box_path.is_file():
                boxes[kind] = stack.enter_context(open_mat(box_path)).cells(f"{kind}_ins_bbox")
        counts = {len(cells) for cells in (*masks.values(), *boxes.values())}
        if counts != {len(names)}:
            raise DataError(f"{escape(folder)}: {len(names)} fields, but instances and boxes of {sorted(counts)}")
        for i, source in enumerate(names):
            name = f"{folder.rpartition('/')[2] or path.name}_{i:04d}_{source}"
            try:
                if source not in sources:
                    raise Rejected("missing", f"no image {escape(source)} of CCEDD")
                pixels_HW3 = cut_out(decode(sources[source]), *region_I4[i].tolist())
            except (Rejected, ValueError) as why:
                problems.append(f"{escape(name)}: left out, {escape(str(why.args[-1]))}")
                continue
            field = Field(name, _split(folder), source, pixels_HW3, [])
            for kind, cells in masks.items():
                _objects(field, kind, cells[i], boxes[kind][i] if kind in boxes else None, problems)
            yield field


def _objects(field: Field, kind: str, value: Value, boxes: Value | None, problems: list[str]) -> None:
    instances: list[Array] = value if isinstance(value, list) else [value] if value.size else []
    found = []
    for mask_HW in instances:
        of = of_pixels(mask_HW != 0) if mask_HW.shape == (SIDE_PX, SIDE_PX) else None
        empty = of is not None and box(of)[2] == 0
        field.objects.append((kind, "its mask is empty" if empty else of or f"not of {SIDE_PX} x {SIDE_PX} px"))
        found.append(box(of) if of else (0.0, 0.0, 0.0, 0.0))
    if boxes is None:
        return
    stated = boxes[0] if isinstance(boxes, list) else boxes
    # rows of y0, x0, y1, x1: what they say must be what the masks show, or one of the two is turned
    if stated.shape != (len(found), 4) or stated[:, [1, 0, 3, 2]].tolist() != [list(edges) for edges in found]:
        problems.append(f"{escape(field.name)}: the boxes of {kind} in the file are not those of its masks")
