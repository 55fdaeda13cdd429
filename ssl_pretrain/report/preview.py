"""What a training would see, before it is started: a picture of the views, and an audit of what they show.

Legend: M images that are looked at, N objects of an image, K view specs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.style
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ssl_pretrain.data import files, readers, sources
from ssl_pretrain.data.pack import Pack, is_pack
from ssl_pretrain.data.readers import LabelledSet
from ssl_pretrain.errors import DataError
from ssl_pretrain.named import named, names
from ssl_pretrain.report.sheet import (
    STYLE,
    WRONG,
    is_blank,
    spec_keys,
    tiles,
    views_picture,
    window_keys,
    write,
)
from ssl_pretrain.train import setup
from ssl_pretrain.train.feed import Feed
from ssl_pretrain.train.planning import planned
from ssl_pretrain.train.recipe import Recipe
from ssl_pretrain.views import ViewSpec
from ssl_pretrain.views.audit import Sight, audit, foreground

LABELLED, GUESSED = 200, 100
"""Images whose objects are looked at: labels cost nothing, a guess takes a twentieth of a second."""
PLANS = 1000
"""Images times epochs whose views are planned for the audit."""
RENDERED = 16
"""Images whose views are rendered to see whether anything is left of them."""
SMALL_PX = 8.0
"""Side of an object in a view below which no network makes much of it."""
BLACK, WHITE = 10.0, 245.0
"""Mean of a view, of 255, beyond which colour ops have left nothing of it."""
TITLE_LETTERS, LINE_LETTERS = 78, 108
"""What a line on the narrowest sheet holds, in 11 and in 8 points."""


@dataclass(frozen=True)
class Objects:
    """Where the objects of some images are."""

    boxes: Mapping[int, NDArray[np.float64]]
    """By the image's place in the pack: (N, 4) of x0, y0, x1, y1 in stored pixels."""
    guessed: bool
    """Whether they were found in the pixels, as nobody has labelled them."""
    words: str
    """What they are and where they come from."""
    problems: tuple[str, ...] = ()
    """Why labels that seemed to be there are not used."""


@dataclass(frozen=True)
class Row:
    """What is said of one view spec."""

    spec: ViewSpec
    sight: Sight
    warnings: tuple[str, ...]
    """What to change, one line each."""


def preview(recipe: Recipe, out: Path, images: int, console: Console) -> Path:
    """Draws the views of the first images of a training into the PNG `out`, and prints what they contain."""
    cache = Path(recipe.top.out).parent / "cache" if recipe.top.out else Path("runs/cache")
    pack = setup.pack(recipe, cache, console)
    recipe = planned(recipe, pack, Path(recipe.top.out or cache), 1, cache, console)
    # One batch of all images is in the order in which a training of any batch size meets them first.
    whole = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, batch_size=len(pack), accumulate=1))
    feed = setup.feed(whole, pack, setup.method(recipe), ranks=1, rank=0, device=torch.device("cpu"))
    ids = feed.ids(0)
    objects = find_objects(recipe, pack, feed.places(ids), cache)
    tiles_BV = tiles(feed, ids[: max(images, RENDERED)])
    rows, epochs = look(recipe, feed, ids, objects, tiles_BV)
    _say(console, recipe, rows, objects, epochs, len(pack))
    shown = ids[:images]
    with matplotlib.style.context(["default", STYLE]):
        figure = views_picture(
            feed, shown, tiles_BV[: len(shown)], _head(recipe, rows, objects), window_keys(feed.window_px),
            objects=objects.boxes,
        )  # fmt: skip
        path = write(out, figure)
    console.print(f"picture: {escape(str(path))}", highlight=False)
    return path


# The objects


def find_objects(recipe: Recipe, pack: Pack, place_M: NDArray[np.int64], cache: Path) -> Objects:
    """The labels of the first images (in this order) that have some; a guess from the pixels where none has.

    Labels are looked for beside the images (`data`), then in `probe.data`. A labelled image is one of the pack's when
    it has the same file name and the same bytes.
    """
    problems: list[str] = []
    for folder in _label_folders(recipe, cache, problems):
        try:
            labelled = _labelled(folder)
        except DataError as error:
            problems.append(f"no labels are used from {folder}: {error}")
            continue
        if labelled is None:
            continue
        boxes = _matched(labelled, pack, place_M, recipe.probe.point_px)
        if not boxes:
            problems.append(f"no image of {folder} is one of the images of the training: its labels are not used")
            continue
        count = sum(map(len, boxes.values()))
        kind = "labelled boxes" if labelled.kind == "box" else "labelled points"
        taken = f", taken as squares of {recipe.probe.point_px} px (probe.point_px)" if labelled.kind == "point" else ""
        return Objects(boxes, False, f"{count:,} {kind} in {len(boxes)} images{taken}", tuple(problems))
    boxes = {int(place): foreground(pack.image(int(place))) for place in place_M[:GUESSED]}
    count = sum(map(len, boxes.values()))
    words = f"no labels: {count:,} spots in {len(boxes)} images, guessed from contrast (touching objects count as one)"
    return Objects(boxes, True, words, tuple(problems))


def _label_folders(recipe: Recipe, cache: Path, problems: list[str]) -> list[Path]:
    """Where labels of the images may be."""
    assert recipe.top.data is not None  # the pack was made of it
    found = [sources.folder(recipe.top.data, cache)]
    other = recipe.probe.data
    if other is not None and other != recipe.top.data and not other.startswith(sources.PREFIX):
        try:
            found.append(sources.folder(other, cache))
        except DataError as error:
            problems.append(f"probe.data: {error}")
    return [folder for folder in found if folder.is_dir() and not is_pack(folder)]


def _labelled(folder: Path) -> LabelledSet | None:
    """The labelled set in a folder, None where it has none. Class folders say nothing of where an object is."""
    formats = [name for name in names(readers.KIND) if name != readers.FALLBACK]
    if not any(named(readers.KIND, name).recognise(folder) for name in formats):
        return None
    labelled = readers.read(folder)
    return labelled if labelled.kind != "image" else None


def _matched(
    labelled: LabelledSet, pack: Pack, place_M: NDArray[np.int64], point_px: int
) -> dict[int, NDArray[np.float64]]:
    """By place in the pack, the objects of the first `LABELLED` images that are labelled."""
    by_name = defaultdict(list)
    for image in labelled.images:
        by_name[image.path.name].append(image)
    found: dict[int, NDArray[np.float64]] = {}
    for place in map(int, place_M):
        digest = pack.sha256_N32[place].tobytes()
        height, width = (int(side) for side in pack.original_N2[place])
        for image in by_name.get(files.unescape(pack.paths[place]).rpartition("/")[2], ()):
            if image.size_px != (width, height) or _sha256(image.path) != digest:
                continue
            box_N4 = np.asarray(image.boxes_N4, np.float64).reshape(-1, 4)
            if labelled.kind == "point":
                box_N4 = box_N4 + np.array([-0.5, -0.5, 0.5, 0.5]) * point_px
            box_N4 = box_N4.clip(0, (width, height) * 2)
            found[place] = box_N4 * np.tile(pack.size_N2[place, ::-1] / (width, height), 2)
            break
        if len(found) == LABELLED:
            break
    return found


def _sha256(path: Path) -> bytes:
    """Of a file's bytes; empty where it cannot be read."""
    try:
        return hashlib.sha256(files.read_bytes(path)).digest()
    except files.Rejected:
        return b""


# The audit


def look(
    recipe: Recipe,
    feed: Feed,
    ids: NDArray[np.int64],
    objects: Objects,
    tiles_BV: Sequence[Sequence[NDArray[np.uint8]]],
) -> tuple[list[Row], int]:
    """What each view spec shows of the objects, over so many epochs."""
    places = feed.places(ids)
    known = np.array([int(place) in objects.boxes for place in places])
    ids_M, box_MN4 = ids[known], [objects.boxes[int(place)] for place in places[known]]
    anything = any(map(len, box_MN4))
    epochs = math.ceil(PLANS / max(len(ids_M), 1))
    plans = [feed.plan(ids_M, epoch) for epoch in range(epochs)]
    together = dataclasses.replace(plans[0], buffer=np.concatenate([one.buffer for one in plans]))
    rows, first = [], 0
    for i, spec in enumerate(feed.specs):
        sight = audit(together, i, box_MN4 * epochs)
        mine = [tile for of_image in tiles_BV for tile in of_image[first : first + spec.count]]
        first += spec.count
        blank = [float(tile.mean()) for tile in mine if is_blank(tile)]
        words = warnings_of(recipe, spec, sight if anything else None, blank, len(mine), objects.guessed)
        rows.append(Row(spec, sight, words))
    return rows, epochs


def warnings_of(
    recipe: Recipe,
    spec: ViewSpec,
    sight: Sight | None,
    blank: Sequence[float] = (),
    rendered: int = 0,
    guessed: bool = False,
) -> tuple[str, ...]:
    """What is wrong with the views of one spec and which keys of the recipe change it, one line each.

    `sight` is None where no image has an object, which says nothing of the views. `blank` has the mean, of 255, of
    those of the rendered views that show nothing.
    """
    window_px, scale, lines = recipe.views.window_px, _key(recipe, spec, "scale"), []
    larger = f"raise the lower bound of {scale} ({spec.scale[0]:g})"
    larger += f" or views.window_px ({window_px})" if window_px is not None else ""
    if sight is not None and sight.share_with_object < 0.5:
        seem = "seem to hold" if guessed else "hold"
        lines.append(f"{spec.name}: {_percent(1 - sight.share_with_object)} of the crops {seem} no object; {larger}")
    if sight is not None and sight.side_px is not None and sight.side_px[1] < SMALL_PX:
        window = "set views.window_px" if window_px is None else f"lower views.window_px ({window_px})"
        sharper = f"{window} or raise {_key(recipe, spec, 'size_px')} ({spec.size_px})"
        lines.append(f"{spec.name}: objects are {sight.side_px[1]:.1f} px wide in the view (median); {sharper}")
    if blank:
        burnt = sum(not BLACK < mean < WHITE for mean in blank)
        cause = f"too bright or too dark; lower views.brightness ({spec.brightness:g})"
        cause = cause if 2 * burnt > len(blank) else f"crops of empty ground; {larger}"
        lines.append(f"{spec.name}: {len(blank)} of {rendered} views show nothing at all: {cause}")
    return tuple(lines)


def _key(recipe: Recipe, spec: ViewSpec, of: str) -> str:
    """The key of the method's section that sets the `scale` or the `size_px` of a spec."""
    config = vars(recipe.method)
    own = f"{spec.name.rpartition('_')[0] or spec.name}_{of}"
    return next((f"method.{key}" for key in (own, of) if key in config), f"the {of} of {spec.name}")


# The words


def _say(console: Console, recipe: Recipe, rows: Sequence[Row], objects: Objects, epochs: int, images: int) -> None:
    """The table and what is wrong."""
    guessed = " (a guess)" if objects.guessed else ""
    table = Table(title=f"What the crops show{guessed}: {len(objects.boxes)} of {images:,} images, {epochs} epochs")
    for heading in ("crops", "hold an object", "objects", "their side in the view"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.columns[0].justify = "left"
    for row in rows:
        count = f"{row.spec.count} × " if row.spec.count > 1 else ""
        style = "yellow" if row.warnings else ""
        cells = (_percent(row.sight.share_with_object), f"{row.sight.objects_mean:.1f}", _side(row.sight))
        table.add_row(f"{count}{escape(row.spec.name)}, {row.spec.size_px} px", *cells, style=style)
    console.print(table)
    console.print(f"objects: {escape(objects.words)}", highlight=False)
    lines = list(objects.problems)
    if not any(map(len, objects.boxes.values())):
        lines.append("no object was found in any image, so nothing can be said of the crops: look at the picture")
    lines += [line for row in rows for line in row.warnings]
    if recipe.train.batch_size > images:
        lines.append(f"train.batch_size is {recipe.train.batch_size}, but there are only {images} images")
    for line in lines:
        console.print(f"[yellow]{escape(line)}[/]", highlight=False)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _side(sight: Sight) -> str:
    """Median and the middle 80 %."""
    if sight.side_px is None:
        return "–"
    low, middle, high = (f"{side:.0f}" for side in sight.side_px)
    return f"{middle} px ({low} to {high})"


def _head(recipe: Recipe, rows: Sequence[Row], objects: Objects) -> list[tuple[str, str]]:
    """Title, and per view spec what it is and what it shows."""
    data = "/".join(Path(recipe.top.data or "").parts[-2:])
    title = f"{recipe.method_name} on {recipe.backbone.name}: what it will see of {data}"
    lines = [("black", textwrap.shorten(title, TITLE_LETTERS, placeholder=" …"))]
    for row, (ink, words) in zip(rows, spec_keys([row.spec for row in rows], recipe.views.window_px), strict=True):
        lines.append((ink, words))
        held = _percent(row.sight.share_with_object)
        shows = f"{held} of the crops hold an object, {row.sight.objects_mean:.1f} on average"
        side = f", each {_side(row.sight)} wide in the view" if row.sight.side_px else ""
        lines.append(("0.35", f"    {shows}{side}"))
        lines += [(WRONG, f"    {part}") for line in row.warnings for part in textwrap.wrap(line, LINE_LETTERS - 4)]
    return [*lines, *(("0.35", part) for part in textwrap.wrap(f"thin outlines: {objects.words}", LINE_LETTERS))]
