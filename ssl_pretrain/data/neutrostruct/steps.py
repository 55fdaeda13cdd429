"""The six steps on files: each reads, computes, writes what is not there yet, and says what it did."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ssl_pretrain.data.files import escape
from ssl_pretrain.data.neutrostruct import (
    coco,
    convert,
    cvat,
    masks,
    palette,
    parents,
    relabel,
    scales,
    statistics,
    tables,
    verify,
)
from ssl_pretrain.data.neutrostruct.naming import link, shown, write_new
from ssl_pretrain.errors import DataError, UsageError

LISTED = 20
"""Lines of one kind that are shown; the report has all."""


@dataclass(frozen=True)
class Choices:
    """What the README leaves open."""

    average: str | None = None
    """`pooled_mean`, `class_means`, or a table of averages; needed to convert."""
    average_column: str | None = None
    """Of that table."""
    diameter: Literal["bbox", "ellipse"] = "bbox"
    """(w + h) / 2 of the box, as published, or rx + ry of the ellipse in `cvat`."""
    cvat: Path | None = None
    """The CVAT file of four classes."""
    scales: Path | None = None
    """A table of scales; only micrometres need it."""
    scale_column: str | None = None
    undecided: Literal["error", "keep"] = "error"
    """What to do with empty structures of an image without an average diameter."""
    reject: bool = False
    """Leave broken annotations out and list them."""
    aliases: Mapping[str, str] | None = None
    """Names of the four classes, beside the known ones."""
    min_iou: float = relabel.MIN_IOU
    """Least overlap of the boxes of a shape and an annotation."""


@dataclass(frozen=True)
class Done:
    """One step."""

    said: tuple[str, ...]
    """For people, a line each."""
    report: Mapping[str, Any]
    """All of it."""


def scale(table: Path, out: Path, column: str | None = None) -> Done:
    """Step 1: `out` gets image_name and pixels_per_um."""
    found = scales.read(table, column)
    rows: list[list[str | float]] = [[name, value] for name, value in sorted(found.pixels_per_um.items())]
    write_new(out, tables.write(["image_name", "pixels_per_um"], rows, out.suffix.lower()), [table])
    return Done((found.said, *_some(found.problems)), {"said": found.said, "problems": list(found.problems)})


def granules(path: Path, out: Path, choices: Choices) -> Done:
    """Step 2: `out` gets the statistics of each image."""
    four = coco.read(path, choices.reject)
    read = scales.read(choices.scales, choices.scale_column) if choices.scales is not None else None
    known = read.pixels_per_um if read is not None else {}
    parent_of = parents(four.classes, choices.aliases)
    diameter_N = _diameters(four, choices)
    found = statistics.statistics(four, parent_of, diameter_N, known)
    reading = next((name for name in statistics.READINGS if name == choices.average), None)
    if choices.average is not None and reading is None:
        raise UsageError(
            f"the average of statistics is {' or '.join(statistics.READINGS)}, not {escape(choices.average)}"
        )
    write_new(out, tables.write(*statistics.table(found, reading), out.suffix.lower()), _inputs(path, choices))
    bare = [name for name, scale in zip(found.images, found.pixels_per_um_I, strict=True) if np.isnan(scale)]
    none = [name for name, count in zip(found.images, found.count_I2.sum(1), strict=True) if not count]
    primary, secondary = found.count_I2.sum(0).tolist()
    said = [f"{primary} primary and {secondary} secondary granules in {len(found.images)} images"]
    if bare:
        said.append(f"{len(bare)} images have no scale, so no micrometres: {shown(bare)}")
    if none:
        said.append(f"{len(none)} images have no granules, so no diameters: {shown(none)}")
    problems = [*four.rejected, *(read.problems if read is not None else ())]
    report = {"images": len(found.images), "without_scale": bare, "without_granules": none, "problems": problems}
    return Done((*said, *_some(problems)), {"primary": primary, "secondary": secondary, **report})


def sevens(path: Path, out: Path, choices: Choices) -> Done:
    """Step 3: `out` gets the COCO file of seven classes."""
    if choices.average is None:
        raise UsageError(
            "say which average diameter parts empty vesicles from vacuoles: pooled_mean, class_means or a table"
        )
    four = coco.read(path, choices.reject)
    reading = next((name for name in statistics.READINGS if name == choices.average), None)
    average: statistics.Reading | Mapping[str, float]
    average = reading if reading is not None else _from_table(four, Path(choices.average), choices)
    diameter_N = _diameters(four, choices)
    document, done = convert.convert(four, average, diameter_N, choices.aliases, choices.undecided == "keep")
    write_new(out, convert.encoded(document), _inputs(path, choices))
    report = done.to_json()
    counts = ", ".join(f"{count} {name}" for name, count in report["after"].items() if count)
    said = (f"{len(four.annotations)} annotations in {len(four.images)} images: {counts}", *_some(done.notes))
    return Done(said, report)


def shapes(path: Path, seven: Path, out: Path, colours: palette.Palette, choices: Choices) -> Done:
    """Step 4: `out` gets the CVAT file with the labels of seven classes."""
    old = cvat.read(path)
    data, done = relabel.relabel(old, coco.read(seven), colours, choices.aliases, choices.min_iou)
    write_new(out, data, [path, seven])
    lonely = f"{len(done.shapes_without)} shapes and {len(done.annotations_without)} annotations found no partner"
    lines = [*_some(done.shapes_without), *_some(done.annotations_without), *_some(done.notes)]
    return Done((f"{done.matched} shapes matched; {lonely}", *lines), done.to_json())


def coloured(labels: Path, out: Path, colours: palette.Palette) -> Done:
    """Step 5: the folder `out` gets a mask an image, and the palette as labelmap.txt."""
    items = drawables(labels)
    hidden: list[str] = []
    for name, data, line in masks.painted(items, colours):
        write_new(out / name, data, [labels])
        hidden += [line] if line is not None else []
    write_new(out / "labelmap.txt", colours.labelmap())
    objects = sum(len(item.outlines) for item in items)
    said = f"{len(items)} masks of {objects} objects"
    return Done((said, *_some(hidden)), {"masks": len(items), "objects": objects, "without_pixels": hidden})


def checked(
    folder: Path, labels: Path, images: Path, out: Path, colours: palette.Palette, side_px: int,
    format: verify.Format = "jpg",
) -> Done:  # fmt: skip
    """Step 6: the folder `out` gets an overlay an image; what masks and labels disagree about is in the report."""
    if side_px < 64:
        raise UsageError(f"overlays of {side_px} px show nothing: 64 or more")
    said: list[str] = []
    pairs = verify.pair(drawables(labels, boxes_only=True), folder, images)
    names = masks.mask_names([found.item.image for found in pairs])
    for found, name in zip(pairs, names, strict=True):
        data, differs = verify.verified(found, colours, side_px, format)
        write_new((out / name).with_suffix(f".{format}"), data, [found.image, found.mask])
        said += differs
    lines = (f"{len(pairs)} overlays; {len(said)} differences between masks and labels", *_some(said))
    return Done(lines, {"overlays": len(pairs), "differences": said})


def everything(
    four: Path, scale_table: Path | None, images: Path | None, out: Path, colours: palette.Palette, choices: Choices,
    side_px: int, suffix: str = ".xlsx",
) -> dict[str, Done]:  # fmt: skip
    """The six steps into the folder `out`; those without input are left out and say so. `report.json` has it all.

    Masks are made of the CVAT file where there is one, because it has the ellipses.
    """
    done: dict[str, Done] = {}
    if scale_table is not None:
        made = out / f"scales{suffix}"
        done["scale"] = scale(scale_table, made, choices.scale_column)
        choices = replace(choices, scales=made, scale_column=None)
    else:
        done["scale"] = _skipped("no table of scales was given, so there are no micrometres")
    reading = choices.average if choices.average in statistics.READINGS else None
    done["statistics"] = granules(four, out / f"statistics{suffix}", replace(choices, average=reading))
    seven = out / "annotations_7classes.json"
    done["convert"] = sevens(four, seven, choices)
    drawn = seven
    if choices.cvat is not None:
        drawn = out / "annotations_7classes.xml"
        done["cvat"] = shapes(choices.cvat, seven, drawn, colours, choices)
    else:
        done["cvat"] = _skipped("no CVAT file was given")
    done["masks"] = coloured(drawn, out / "masks", colours)
    if images is not None:
        done["verify"] = checked(out / "masks", seven, images, out / "overlays", colours, side_px)
    else:
        done["verify"] = _skipped("no folder of images was given")
    report = {step: dict(found.report) for step, found in done.items()}
    write_new(out / "report.json", json.dumps(report, indent=2, allow_nan=False).encode() + b"\n")
    return done


def drawables(labels: Path, boxes_only: bool = False) -> list[masks.Drawable]:
    """The objects of a COCO (.json) or CVAT (.xml) file of seven classes; of COCO, as `masks.from_coco` says."""
    suffix = labels.suffix.lower()
    if suffix == ".json":
        return masks.from_coco(coco.read(labels), boxes_only)
    if suffix == ".xml":
        return masks.from_cvat(cvat.read(labels))
    raise UsageError(f"{escape(str(labels))}: labels are COCO (.json) or CVAT (.xml)")


def _diameters(four: coco.Coco, choices: Choices) -> NDArray[np.float64]:
    if choices.diameter == "bbox":
        return coco.bbox_diameters(four)
    if choices.cvat is None:
        raise UsageError("diameters of ellipses are in the CVAT file: name it too")
    return relabel.ellipse_diameters(cvat.read(choices.cvat), four, choices.aliases)


def _from_table(four: coco.Coco, path: Path, choices: Choices) -> dict[str, float]:
    if not path.is_file():
        raise UsageError(
            f"the average is pooled_mean, class_means or a table, and there is no file {escape(str(path))}"
        )
    known = scales.read(choices.scales, choices.scale_column).pixels_per_um if choices.scales is not None else {}
    found = convert.averages_px(path, known, choices.average_column)
    if not link(four.images, found):
        raise DataError(f"{escape(path.name)} names no image of the COCO file ({shown(four.images)})")
    return found


def _inputs(path: Path, choices: Choices) -> list[Path]:
    return [path, *(given for given in (choices.cvat, choices.scales) if given is not None)]


def _skipped(why: str) -> Done:
    return Done((f"left out: {why}",), {"left_out": why})


def _some(lines: Sequence[str]) -> list[str]:
    more = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return [*lines[:LISTED], *more]
