"""A run folder as the report reads it: recipe, records, and what several sections need and only one should compute.

Legend: N objects, Q queries, D width.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from ssl_pretrain import artefact
from ssl_pretrain.backbones import Backbone
from ssl_pretrain.data.pack import Pack
from ssl_pretrain.errors import DataError, UsageError
from ssl_pretrain.methods import Method
from ssl_pretrain.probe.features import embed
from ssl_pretrain.probe.knn import KnnScore, score
from ssl_pretrain.probe.objects import Objects
from ssl_pretrain.train import setup
from ssl_pretrain.train.feed import Feed
from ssl_pretrain.train.online import OnlineProbe
from ssl_pretrain.train.recipe import Recipe, load

QUERIES = 8
"""Objects whose neighbours are shown."""
BANK_ON_CPU, QUERIES_ON_CPU = 4000, 2000
"""Objects that are embedded where there is no GPU: a picture is not worth an hour. Evenly spaced in their side."""


@dataclass(frozen=True)
class Judged:
    """Labelled objects and what the backbone makes of them."""

    objects: Objects
    """Those that were embedded: first the `shown` queries, then other queries, then the bank."""
    z_ND: NDArray[np.float32]
    """Their features, of length 1."""
    shown_Q: NDArray[np.int64]
    """Queries to show one by one (`choose`), as indices of objects."""
    left_out: int
    """Objects that were not embedded, to save time."""


@dataclass(frozen=True)
class RunFolder:
    """A run folder; what is missing in it is a `DataError` or `UsageError` when it is asked for."""

    folder: Path
    recipe: Recipe
    console: Console

    @property
    def cache(self) -> Path:
        """Where the run's packs are."""
        return self.folder.parent / "cache"

    @property
    def name(self) -> str:
        """Method and backbone."""
        return f"{self.recipe.method_name} on {self.recipe.backbone.name}"

    @cached_property
    def lines(self) -> list[dict[str, float]]:
        """The records of `metrics.jsonl`."""
        return records(self.folder)

    @cached_property
    def method(self) -> Method:
        """With random weights."""
        return setup.method(self.recipe).to(setup.dtype(self.recipe)).eval()

    @cached_property
    def chance(self) -> dict[str, float]:
        """Losses of a model that has learned nothing; a contrastive one sees the negatives of one part only."""
        return self.method.chance(self.recipe.train.batch_size // self.recipe.train.accumulate)

    @cached_property
    def pack(self) -> Pack:
        """The images that the run was trained on."""
        return setup.pack(self.recipe, self.cache, self.console)

    @cached_property
    def feed(self) -> Feed:
        """What draws its views, here on the CPU."""
        return setup.feed(self.recipe, self.pack, self.method, ranks=1, rank=0, device=torch.device("cpu"))

    @cached_property
    def backbone(self) -> Backbone:
        """The newest artefact's."""
        return artefact.read(artefact.find(self.folder)).eval()

    @cached_property
    def judged(self) -> Judged | None:
        """The labelled objects of the recipe's probe, and their features; None where it has no probe."""
        if self.recipe.probe.data is None:
            return None
        backbone = self.backbone
        found: Objects = OnlineProbe(self.recipe, backbone.input, self.cache).objects
        most = (BANK_ON_CPU, QUERIES_ON_CPU) if device() == "cpu" else (len(found.label_N),) * 2
        shown_Q = choose(found, QUERIES)
        some = thinned(found, shown_Q, *most)
        z_ND = embed(backbone, some.crops_NSSC, batch_size=64, device=device())
        return Judged(some, z_ND, np.arange(len(shown_Q)), len(found.label_N) - len(some.label_N))

    @cached_property
    def score(self) -> KnnScore | None:
        """The k-NN score of these objects."""
        if self.judged is None:
            return None
        return score(self.judged.objects, self.judged.z_ND, self.name, device=device(), rounds=1)


def device() -> str:
    """Where networks are run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def opened(run: Path, console: Console) -> RunFolder:
    """A run folder; `UsageError` in one line where it is none."""
    return RunFolder(run, recipe(run), console)


def recipe(run: Path) -> Recipe:
    """The resolved recipe of a run; `UsageError` in one line where the folder is none."""
    if (run / "recipe.yaml").is_file():
        return load(run / "recipe.yaml")
    if not run.is_dir():
        raise UsageError(f"there is no run folder {run}")
    inside = sorted(path.parent.name for path in run.glob("*/recipe.yaml"))
    near = f"; runs in it: {', '.join(inside[:8])}" if inside else ""
    raise UsageError(f"{run} is not the folder of a run: it has no recipe.yaml{near}")


def records(run: Path) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl` in the order they were written; one that a crash cut off is left out."""
    path = run / "metrics.jsonl"
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            found.append(record)
    return found


def series(lines: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one key.

    >>> series([{"step": 1, "train/loss": 2.0}, {"step": 1, "knn/accuracy": 0.5}], "train/loss")
    ([1], [2.0])
    """
    having = [line for line in lines if key in line]
    return [line["step"] for line in having], [line[key] for line in having]


def choose(objects: Objects, count: int) -> NDArray[np.int64]:
    """Queries to show, as indices of objects: of as many classes as can be, common and rare.

    Classes are taken that the bank has too, evenly spaced from the most to the least frequent, and of each its middle
    queries: chosen by place, not by how well they look. Raises `DataError` where there is no such class.
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


def thinned(objects: Objects, first_Q: NDArray[np.int64], bank: int, queries: int) -> Objects:
    """These queries in their order, then other queries and the bank, each thinned out evenly to so many."""
    others = np.setdiff1d(np.flatnonzero(~objects.train_N), first_Q)
    rows_N = np.concatenate([first_Q, _evenly(others, queries), _evenly(np.flatnonzero(objects.train_N), bank)])
    per_object = ("crops_NSSC", "label_N", "image_N", "unit_N", "train_N", "square_N3")
    return dataclasses.replace(objects, **{name: vars(objects)[name][rows_N] for name in per_object})


def _evenly(rows_N: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    return rows_N if len(rows_N) <= most else rows_N[np.linspace(0, len(rows_N) - 1, most).astype(int)]
