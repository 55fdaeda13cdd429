"""The pictures of a run folder: what the method sees, how training went, what the features and the decoder know.

All are drawn from what the run left behind, by the code that trained it: the same views, objects and networks.

Legend: B images, V views of an image, N objects, Q queries, K neighbours, H W pixels.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import matplotlib.style
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from rich.console import Console

from ssl_pretrain import artefact
from ssl_pretrain.errors import DataError, SslPretrainError
from ssl_pretrain.methods import Method
from ssl_pretrain.probe.knn import neighbours as nearest_objects
from ssl_pretrain.probe.objects import Objects, embed
from ssl_pretrain.report import page, recipe, records, series
from ssl_pretrain.report.sheet import (
    BLANK,
    DPI,
    INKS,
    STYLE,
    WRONG,
    Sheet,
    box,
    shown,
    spec_keys,
    tiles,
    views_picture,
    window_keys,
    write,
)
from ssl_pretrain.train import setup
from ssl_pretrain.train.checkpoint import Checkpoints
from ssl_pretrain.train.feed import Feed
from ssl_pretrain.train.online import OnlineProbe
from ssl_pretrain.train.recipe import Recipe

SAME, OTHER = "#1a9641", WRONG
"""Frames of neighbours of the query's class and of another."""
IMAGES, QUERIES, NEIGHBOURS = 4, 8, 8
MOST_ON_CPU = 4000
"""Bank objects that are embedded where there is no GPU: a picture is not worth an hour. Evenly spaced in the bank."""
HEADINGS = {"reconstruction": ("what the encoder saw", "what the decoder drew", "the image")}
"""Of the columns of a method's pictures, by their name."""


def draw(run: Path, console: Console) -> list[Path]:
    """Draws what the run folder has into RUN/pictures and writes RUN/report.html; returns the files written.

    What cannot be drawn (yet) is said on the console and on the page. Raises `UsageError` where there is no run and
    `WriteError` where the folder cannot be written.
    """
    folder = _Run(run, recipe(run), console)
    kinds: dict[str, Callable[[_Run], Figure | None]]
    kinds = {"views": views, "curves": curves, "neighbours": neighbours, "reconstructions": reconstructions}
    written: list[Path] = []
    missing: dict[str, list[str]] = {}
    with matplotlib.style.context(["default", STYLE]):  # a user's own matplotlibrc could break the layout
        for name, kind in kinds.items():
            try:
                figure = kind(folder)
            except SslPretrainError as error:
                missing.setdefault(str(error), []).append(name)
                continue
            if figure is not None:
                written.append(write(run / "pictures" / f"{name}.png", figure))
    lines = [f"no picture of {' and '.join(names)}: {reason}" for reason, names in missing.items()]
    for line in lines:
        console.print(line, highlight=False, markup=False)
    return [*written, page.write(run, written, lines)]


@dataclass(frozen=True)
class _Run:
    """A run folder, and what several pictures need of it."""

    folder: Path
    recipe: Recipe
    console: Console

    @property
    def cache(self) -> Path:
        return self.folder.parent / "cache"

    @property
    def name(self) -> str:
        return f"{self.recipe.method_name} on {self.recipe.backbone.name}"

    @cached_property
    def method(self) -> Method:
        """With random weights."""
        return setup.method(self.recipe).to(setup.dtype(self.recipe)).eval()

    @cached_property
    def feed(self) -> Feed:
        pack = setup.pack(self.recipe, self.cache, self.console)
        return setup.feed(self.recipe, pack, self.method, ranks=1, rank=0, device=torch.device("cpu"))


# Views


def views(run: _Run) -> Figure:
    """Images of the first step with the boxes of their crops, and the views that the method was given."""
    feed, ids_B = run.feed, run.feed.ids(0)[:IMAGES]
    keys = [*window_keys(feed.window_px), *spec_keys(feed.specs, feed.window_px)]
    title = f"{run.name}: where its views come from"
    return views_picture(feed, ids_B, tiles(feed, ids_B), [("black", title)], keys, blank=BLANK)


# Curves


def curves(run: _Run) -> Figure:
    """Loss, k-NN, learning rate and speed over the steps."""
    lines = records(run.folder)
    if not any("train/loss" in line for line in lines):
        raise DataError("nothing is measured yet (metrics.jsonl has no line with a loss)")
    figure = Figure(figsize=(9.6, 6.4), dpi=DPI, layout="constrained")
    last = max(line["step"] for line in lines)
    figure.suptitle(f"{run.name}, step {last:,}", fontsize=11)
    (loss, knn), (rate, speed) = figure.subplots(2, 2)
    _curve(loss, *series(lines, "train/loss"), INKS[0], "loss")
    train = run.recipe.train
    # A contrastive loss sees the negatives of one part of the accumulation only.
    chance = run.method.chance(train.batch_size // train.accumulate).get("loss")
    if chance is not None:
        loss.axhline(chance, color="0.35", linestyle="--", label=f"nothing learned: {chance:.3g}")
    _knn(knn, lines, bool(run.recipe.probe.data))
    _curve(rate, *series(lines, "train/lr"), INKS[2], "learning rate")
    _curve(speed, *series(lines, "train/images_per_s"), INKS[4], "images/s")
    titles = {loss: "Loss", knn: "k-NN balanced accuracy", rate: "Learning rate", speed: "Images per second"}
    for axes, title in titles.items():
        axes.set_title(title, fontsize=10, loc="left")
        axes.set(xlabel="step", xlim=(0, 1.02 * last))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if axes in (rate, speed):
            axes.set_ylim(bottom=0)
        elif axes.get_legend_handles_labels()[1]:  # beside the title, where no curve can run
            axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, frameon=False, fontsize=8)
    return figure


def _curve(axes: Axes, steps: list[float], values: list[float], ink: str, label: str) -> None:
    """The values; where there are many, faint under their running mean."""
    width = len(values) // 40
    many = width >= 5
    axes.plot(steps, values, color=ink, alpha=0.3 if many else 1.0, linewidth=1.4, label=None if many else label,
              marker="." if len(values) < 40 else "")  # fmt: skip
    if many:
        mean = np.convolve(values, np.full(width, 1 / width), mode="valid")
        axes.plot(steps[width // 2 :][: len(mean)], mean, color=ink, linewidth=1.6, label=f"{label}, mean of {width}")


def _knn(axes: Axes, lines: list[dict[str, float]], asked: bool) -> None:
    key = "knn/balanced_accuracy"
    steps, values = series(lines, key)
    if not values:
        words = "not probed yet" if asked else "no probe: the recipe has no probe.data"
        axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", color="0.35")
        axes.set_yticks([])
        return
    low, high = (series(lines, f"{key}_{end}")[1] for end in ("low", "high"))
    axes.fill_between(steps, low, high, color=INKS[1], alpha=0.18, linewidth=0, label="95 % interval")
    axes.vlines(steps, low, high, color=INKS[1], alpha=0.5, linewidth=1.0)  # one probe alone has no band
    axes.plot(steps, values, color=INKS[1], marker="o", markersize=4, label=f"last {values[-1]:.3f}")
    axes.set_ylim(0, min(1.0, max(0.05, 1.15 * max(high))))


# Neighbours


def neighbours(run: _Run) -> Figure | None:
    """Objects that the training never saw labels of, and what the backbone holds to be most like them."""
    if run.recipe.probe.data is None:
        return None
    backbone = artefact.read(artefact.find(run.folder))
    objects: Objects = OnlineProbe(run.recipe, backbone.input, run.cache).objects
    device = "cuda" if torch.cuda.is_available() else "cpu"
    most = len(objects.label_N) if device == "cuda" else MOST_ON_CPU
    some = _some(objects, choose(objects, QUERIES), most)
    z_ND = embed(backbone, some.crops_NSSC, batch_size=64, device=device)
    query_Q = np.flatnonzero(~some.train_N)
    return _neighbour_sheet(run, some, query_Q, nearest_objects(some, z_ND, query_Q, NEIGHBOURS))


def choose(objects: Objects, count: int) -> NDArray[np.int64]:
    """Queries to show, as indices of objects: of as many classes as can be, common and rare.

    Classes are taken that the bank has too, evenly spaced from the most to the least frequent, and of each its middle
    queries: chosen by place, not by how well they look.
    """
    of_class = [np.flatnonzero((objects.label_N == c) & ~objects.train_N) for c in range(len(objects.classes))]
    banked = set(objects.label_N[objects.train_N].tolist())
    ranked = sorted((c for c in banked if len(of_class[c])), key=lambda c: (-len(of_class[c]), c))
    if not ranked:
        raise DataError("no class has objects both in the bank and among the queries")
    spread = np.unique(np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int))
    each = math.ceil(count / len(spread))
    found: list[int] = []
    for place in spread:
        mine = of_class[ranked[place]]
        middles = ((np.arange(each) + 0.5) / each * len(mine)).astype(int)
        found += [int(mine[i]) for i in np.unique(middles)]
    return np.array(found[:count], np.int64)


def _some(objects: Objects, query_Q: NDArray[np.int64], most: int) -> Objects:
    """These queries in their order, then the bank, thinned out evenly to `most`."""
    bank_N = np.flatnonzero(objects.train_N)
    if len(bank_N) > most:
        bank_N = bank_N[np.linspace(0, len(bank_N) - 1, most).astype(int)]
    rows_N = np.concatenate([query_Q, bank_N])
    per_object = ("crops_NSSC", "label_N", "image_N", "unit_N", "train_N", "square_N3")
    return dataclasses.replace(objects, **{name: vars(objects)[name][rows_N] for name in per_object})


def frame_colour(query_label: int, neighbour_label: int) -> str:
    """The frame of a neighbour: green for the query's class, red for another.

    >>> frame_colour(3, 3) == SAME, frame_colour(3, 1) == OTHER
    (True, True)
    """
    return SAME if neighbour_label == query_label else OTHER


def _neighbour_sheet(run: _Run, some: Objects, query_Q: NDArray[np.int64], near_QK: NDArray[np.int64]) -> Figure:
    """A row a query: itself, a space, and its neighbours, most alike first."""
    side, gap, strip, left, head = 0.98, 0.1, 0.3, 0.15, 0.6
    step, start = side + gap, left + side + gap + 0.25
    sheet = Sheet(start + near_QK.shape[1] * step - gap + left, head + len(query_Q) * (step + strip))
    label_N, found_QK = some.label_N, near_QK >= 0
    right = int((label_N[near_QK] == label_N[query_Q][:, None])[found_QK].sum())
    title = f"{run.name}: {right} of {found_QK.sum()} nearest neighbours are of the query's class"
    sheet.text(left, 0.25, title, size=11)
    sheet.text(left, 0.5, "query")
    sheet.text(start, 0.5, f"nearest of {int(some.train_N.sum()):,} objects of other images, most alike first")
    sheet.text(start + 5 * step, 0.5, "■ the same class", color=SAME)
    sheet.text(start + 6.2 * step, 0.5, "■ another class", color=OTHER)
    for q, query in enumerate(query_Q):
        _object(sheet, left, head + q * (step + strip) + strip, side, some, int(query), "black")
        for k, near in enumerate(near_QK[q]):
            if near >= 0:
                ink = frame_colour(int(label_N[query]), int(label_N[near]))
                _object(sheet, start + k * step, head + q * (step + strip) + strip, side, some, int(near), ink)
    return sheet.figure


def _object(sheet: Sheet, left: float, top: float, side: float, some: Objects, n: int, ink: str) -> None:
    """An object in a frame, with the name of its class above."""
    box(sheet.picture(left, top, side, side, some.crops_NSSC[n]), (0, 0, some.size_px, some.size_px), ink, 2.2)
    name = some.classes[some.label_N[n]].replace("_", " ")
    for i, line in enumerate(reversed(textwrap.wrap(name, 16, max_lines=2, placeholder="…"))):
        sheet.text(left, top - 0.05 - 0.115 * i, line, size=7, color=ink)


# Reconstructions


@torch.no_grad()
def reconstructions(run: _Run) -> Figure | None:
    """What the method itself has to show, by the newest checkpoint."""
    looked_at = run.feed.draw(run.feed.ids(0)[:8], epoch=0)
    if not run.method.pictures(looked_at):  # most have nothing, and their checkpoint need not be read
        return None
    state = Checkpoints(run.folder / "checkpoints").newest()
    if state is None:
        raise DataError("there is no checkpoint yet")
    try:
        run.method.load_state_dict(state["method"])
    except RuntimeError as error:
        raise DataError("the newest checkpoint is not of this recipe") from error
    (name, x_NCHW), *_ = run.method.pictures(looked_at).items()
    tiles, headings = shown(x_NCHW, run.feed.fed), HEADINGS.get(name, ("", "", ""))
    side, left, head = 1.35, 0.15, 0.65
    step, rows = side + 0.07, math.ceil(len(tiles) / 6)
    sheet = Sheet(6 * step + 0.2 + 2 * left, head + rows * step + 0.1)
    sheet.text(left, 0.25, f"{run.name}: {name} at step {state['step']:,}", size=11)
    for i, tile in enumerate(tiles):
        (half, row), column = divmod(i // 3, rows), i % 3
        x = left + half * (3 * step + 0.2) + column * step
        if row == 0:
            sheet.text(x, head - 0.07, headings[column])
        sheet.picture(x, head + row * step, side, side, tile)
    return sheet.figure
