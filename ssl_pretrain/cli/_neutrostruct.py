"""TEM-NeutroStruct, from four classes to seven, in the six steps of its README: scale, statistics, convert and so on.

ssl-pretrain datasets neutrostruct STEP ...   (all does the six in order)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ssl_pretrain.cli._words import new_parser, parsed
from ssl_pretrain.data.files import escape
from ssl_pretrain.errors import DataError, UsageError
from ssl_pretrain.named import nearest

if TYPE_CHECKING:
    from ssl_pretrain.data.neutrostruct.palette import Palette
    from ssl_pretrain.data.neutrostruct.steps import Choices, Done


def run(words: list[str], console: Console) -> None:
    """Runs a step: the first word is its name."""
    if not words or words[0] in ("-h", "--help"):
        console.print(_overview(), highlight=False, markup=False)
        if not words:
            raise UsageError(f"name a step: {', '.join(STEPS)}")
        return
    if words[0] not in STEPS:
        raise UsageError(
            f"there is no step {words[0]!r}{nearest(words[0], list(STEPS))}; there are: {', '.join(STEPS)}"
        )
    STEPS[words[0]](words[1:], console)


def _scale(words: list[str], console: Console) -> None:
    """Reads scales, or scale bars, and writes pixels per micrometre."""
    parser = _parser("scale", _scale)
    parser.add_argument("table", type=Path, help=".csv or .xlsx: image_name, and pixels per um, um per pixel or a bar")
    parser.add_argument("--column", type=str | None, default=None, help="of the scale, where several say it")
    parser.add_argument("--out", type=Path, required=True, help="the .csv or .xlsx to write")
    given = parsed(parser, words)
    from ssl_pretrain.data.neutrostruct import steps

    _say(console, steps.scale(given.table, given.out, given.column), given.out)


def _statistics(words: list[str], console: Console) -> None:
    """Writes mean, median and average diameters of the granules of each image."""
    parser = _parser("statistics", _statistics)
    _add_four(parser)
    parser.add_argument("--average", type=str | None, default=None, help="fills average_diameter_SG_PG: one reading")
    parser.add_argument("--out", type=Path, required=True, help="the .csv or .xlsx to write")
    given = parsed(parser, words)
    from ssl_pretrain.data.neutrostruct import steps

    _say(console, steps.granules(given.coco, given.out, _choices(given)), given.out)


def _convert(words: list[str], console: Console) -> None:
    """Writes the COCO file of seven classes."""
    parser = _parser("convert", _convert)
    _add_four(parser)
    _add_average(parser)
    parser.add_argument("--out", type=Path, required=True, help="the .json to write")
    given = parsed(parser, words)
    from ssl_pretrain.data.neutrostruct import steps

    done = steps.sevens(given.coco, given.out, _choices(given, given.average_column, given.undecided))
    _say(console, done, given.out)


def _cvat(words: list[str], console: Console) -> None:
    """Gives the shapes of a CVAT file the seven classes of a COCO file; nothing but labels changes."""
    parser = _parser("cvat", _cvat)
    parser.add_argument("xml", type=Path, help="CVAT for images 1.1, four classes")
    parser.add_argument("--coco", type=Path, required=True, help="what convert wrote")
    parser.add_argument("--out", type=Path, required=True, help="the .xml to write")
    parser.add_argument("--min-iou", type=float, default=0.5, help="least overlap of a shape's box and an annotation's")
    _add_aliases(parser)
    _add_palette(parser)
    given = parsed(parser, words)
    from ssl_pretrain.data.neutrostruct import steps

    choices = steps.Choices(aliases=_aliases(given.alias), min_iou=given.min_iou)
    _say(console, steps.shapes(given.xml, given.coco, given.out, _palette(given.palette), choices), given.out)


def _masks(words: list[str], console: Console) -> None:
    """Writes a class-coloured PNG for each image."""
    parser = _parser("masks", _masks)
    parser.add_argument("labels", type=Path, help="seven classes: CVAT (.xml, with ellipses) or COCO (.json)")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    _add_palette(parser)
    given = parsed(parser, words)
    from ssl_pretrain.data.neutrostruct import steps

    _say(console, steps.coloured(given.labels, given.out, _palette(given.palette)), given.out)


def _verify(words: list[str], console: Console) -> None:
    """Draws masks over the images, and compares their classes with the labels; exit 65 if they differ."""
    parser = _parser("verify", _verify)
    parser.add_argument("masks", type=Path, help="the folder of masks")
    parser.add_argument("--labels", type=Path, required=True, help="seven classes: COCO (.json) or CVAT (.xml)")
    _add_images(parser)
    parser.add_argument("--format", type=Literal["jpg", "png"], default="jpg", help="of the overlays")
    parser.add_argument("--out", type=Path, required=True, help="the folder of overlays to write")
    _add_palette(parser)
    given = parsed(parser, words)
    if given.images is None:
        raise UsageError("--images is needed: the folder of images that the masks are drawn over")
    from ssl_pretrain.data.neutrostruct import steps

    colours = _palette(given.palette)
    done = steps.checked(given.masks, given.labels, given.images, given.out, colours, given.side_px, given.format)
    _say(console, done, given.out)
    _agree(done)


def _all(words: list[str], console: Console) -> None:
    """Does the six steps in order, into one folder with report.json."""
    parser = _parser("all", _all)
    _add_four(parser)
    _add_average(parser)
    _add_images(parser)
    parser.add_argument("--min-iou", type=float, default=0.5, help="least overlap of a shape's box and an annotation's")
    parser.add_argument("--tables", type=Literal["xlsx", "csv"], default="xlsx", help="csv needs no further package")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    _add_palette(parser)
    given = parsed(parser, words)
    from ssl_pretrain.data.neutrostruct import steps

    choices = _choices(given, given.average_column, given.undecided, given.min_iou)
    colours, suffix = _palette(given.palette), f".{given.tables}"
    done = steps.everything(given.coco, given.scales, given.images, given.out, colours, choices, given.side_px, suffix)
    table = Table("step", "what it did")
    for step, found in done.items():
        table.add_row(step, Text("\n".join(found.said)))
    console.print(table)
    console.print(f"in {escape(str(given.out))}", highlight=False, markup=False)
    _agree(done["verify"])


STEPS: Mapping[str, Callable[[list[str], Console], None]] = {
    "scale": _scale,
    "statistics": _statistics,
    "convert": _convert,
    "cvat": _cvat,
    "masks": _masks,
    "verify": _verify,
    "all": _all,
}


def _overview() -> str:
    lines = ["usage: ssl-pretrain datasets neutrostruct STEP ...   (STEP --help says more)", ""]
    return "\n".join([*lines, *(f"  {name:10} {step.__doc__}" for name, step in STEPS.items())])


def _parser(step: str, function: Callable[[list[str], Console], None]) -> ArgumentParser:
    return new_parser(f"datasets neutrostruct {step}", function.__doc__)


def _add_four(parser: ArgumentParser) -> None:
    parser.add_argument("coco", type=Path, help="the COCO file of four classes")
    parser.add_argument("--scales", type=Path | None, default=None, help="a table of scales; only micrometres need it")
    parser.add_argument("--scale-column", type=str | None, default=None, help="of the scale, where several say it")
    parser.add_argument(
        "--diameter", type=Literal["bbox", "ellipse"], default="bbox", help="ellipse: rx + ry, of --cvat"
    )
    parser.add_argument("--cvat", type=Path | None, default=None, help="the CVAT file of four classes")
    parser.add_argument("--reject", action="store_true", help="leave broken annotations out, and list them")
    _add_aliases(parser)


def _add_average(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--average", type=str, required=True, help="parts empty from vacuoles: pooled_mean, class_means or a table"
    )
    parser.add_argument("--average-column", type=str | None, default=None, help="of that table")
    parser.add_argument(
        "--undecided", type=Literal["error", "keep"], default="error", help="empty structures of images without average"
    )


def _add_aliases(parser: ArgumentParser) -> None:
    parser.add_argument("--alias", type=str, nargs="+", default=[], help="NAME=primary, secondary, empty or emptying")


def _add_palette(parser: ArgumentParser) -> None:
    parser.add_argument("--palette", type=Path | None, default=None, help="CVAT's labelmap.txt; default: our own")


def _add_images(parser: ArgumentParser) -> None:
    parser.add_argument("--images", type=Path | None, default=None, help="the folder of images")
    parser.add_argument("--side-px", type=int, default=2048, help="longer side of the overlays")


def _choices(
    given: Namespace, column: str | None = None, undecided: Literal["error", "keep"] = "error", min_iou: float = 0.5
) -> Choices:
    from ssl_pretrain.data.neutrostruct.steps import Choices

    return Choices(
        average=given.average,
        average_column=column,
        diameter=given.diameter,
        cvat=given.cvat,
        scales=given.scales,
        scale_column=given.scale_column,
        undecided=undecided,
        reject=given.reject,
        aliases=_aliases(given.alias),
        min_iou=min_iou,
    )


def _aliases(words: list[str]) -> dict[str, str]:
    wrong = [word for word in words if "=" not in word]
    if wrong:
        raise UsageError(f"--alias {escape(wrong[0])}: write NAME=primary, secondary, empty or emptying")
    return {name: parent for name, _, parent in (word.rpartition("=") for word in words)}


def _palette(path: Path | None) -> Palette:
    from ssl_pretrain.data.neutrostruct import palette

    return palette.DEFAULT if path is None else palette.read(path)


def _say(console: Console, done: Done, out: Path) -> None:
    for line in done.said:
        console.print(line, highlight=False, markup=False)
    console.print(escape(str(out)), highlight=False, markup=False)


def _agree(done: Done) -> None:
    differences = done.report.get("differences", [])
    if differences:
        raise DataError(f"masks and labels differ in {len(differences)} ways, first: {differences[0]}")
