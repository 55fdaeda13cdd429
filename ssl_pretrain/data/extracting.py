"""Labelled images that lie inside other files, or have to be cut from them, written as PNG with COCO JSON."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssl_pretrain.data.files import escape
from ssl_pretrain.data.gathering import Gathering
from ssl_pretrain.data.matlab_files import Value
from ssl_pretrain.data.readers import LabelledSet
from ssl_pretrain.data.shapes import Mask, box
from ssl_pretrain.data.writers import coco, place, safe_name
from ssl_pretrain.errors import DataError, WriteError
from ssl_pretrain.files import write_durably


@dataclass(frozen=True, eq=False)
class Field:
    """One image with its objects."""

    name: str
    """Of the file, without its suffix."""
    split: str | None
    group: str
    pixels: NDArray[np.uint8]
    """(H, W) grey or (H, W, 3) RGB."""
    objects: list[tuple[str, Mask | str]]
    """Class and mask of each, or why it has none."""


def grey(value: Value) -> NDArray[np.uint8] | None:
    """An array as 8-bit grey, if it is a table of whole numbers from 0 to 255.

    >>> grey(np.array([[0.0, 255.0]])).tolist(), grey(np.array([[0.5]]))
    ([[0, 255]], None)
    """
    if isinstance(value, list) or value.ndim != 2 or value.dtype.kind not in "uif" or not value.size:
        return None
    numbers = value.astype(np.float64)
    whole = bool((numbers >= 0).all() and (numbers <= 255).all() and (numbers == np.rint(numbers)).all())
    return value.astype(np.uint8) if whole else None


def extract(format: str, fields: Iterable[Field], problems: list[str], out: Path) -> LabelledSet:
    """Writes `images/<split>/x.png` and `annotations/*.json` into the new folder `out`: all of it, or nothing.

    `problems` is what `fields` says while it is read. Raises `WriteError`, and `DataError` without a single field.
    """
    if os.path.lexists(out):
        raise WriteError(f"{escape(str(out))} exists: give a folder that does not")
    gathering = Gathering(format, "box")
    staging = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        for field in fields:
            _write(field, staging, gathering)
        if not gathering.images:
            raise DataError(f"not a single image to write{f' (first problem: {problems[0]})' if problems else ''}")
        gathering.problems += problems
        labelled = gathering.done()
        coco.write(labelled, place(labelled.images)[0], staging)
        os.rename(staging, out)
    except OSError as error:
        raise WriteError(f"cannot write {escape(str(out))}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    images = tuple(replace(image, path=out / image.path.relative_to(staging)) for image in labelled.images)
    return replace(labelled, images=images)


def _write(field: Field, staging: Path, gathering: Gathering) -> None:
    content = io.BytesIO()
    Image.fromarray(field.pixels).save(content, "PNG")
    name = f"images/{field.split}/" if field.split else "images/"
    name += safe_name(f"{field.name}.png")
    if (staging / name).exists():
        raise DataError(f"two images are called {escape(field.name)}")
    write_durably(staging / name, content.getvalue())
    objects = gathering.objects((field.pixels.shape[1], field.pixels.shape[0]))
    for i, (label, of) in enumerate(field.objects, 1):
        where = f"{escape(field.name)}: object {i}"
        if isinstance(of, str):
            objects.lost(where, label, of)
        else:
            objects.box(where, label, *box(of), of)
    gathering.add(staging / name, name, objects, group=field.group, split=field.split)
