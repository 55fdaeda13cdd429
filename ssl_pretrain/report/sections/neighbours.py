"""The nearest neighbours of sample objects, with their classes.

Legend: N objects, Q queries, K neighbours.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ssl_pretrain.probe.knn import neighbours as nearest_objects
from ssl_pretrain.probe.objects import Objects
from ssl_pretrain.report.sections import Section
from ssl_pretrain.report.sheet import WRONG, Sheet, box

if TYPE_CHECKING:
    from ssl_pretrain.report.folder import RunFolder

PLACE = 40
SAME, OTHER = "#1a9641", WRONG
"""Frames of neighbours of the query's class and of another."""
NEIGHBOURS = 8
WORDS = (
    "Labelled objects (left), each with the objects of other images that the backbone holds to be most like it. The "
    "pretraining has seen none of the labels."
)


def section(run: RunFolder) -> Section | None:
    """Objects, and what the backbone holds to be most like them; nothing without labels."""
    judged = run.judged
    if judged is None:
        return None
    near_QK = nearest_objects(judged.objects, judged.z_ND, judged.shown_Q, NEIGHBOURS)
    figure = sheet(run.name, judged.objects, judged.shown_Q, near_QK)
    alt = f"{len(near_QK)} objects, each with its {NEIGHBOURS} nearest, framed green where the class is the same"
    return Section("What the features hold to be alike", WORDS, figure, alt)


def frame_colour(query_label: int, neighbour_label: int) -> str:
    """The frame of a neighbour: green for the query's class, red for another.

    >>> frame_colour(3, 3) == SAME, frame_colour(3, 1) == OTHER
    (True, True)
    """
    return SAME if neighbour_label == query_label else OTHER


def sheet(name: str, some: Objects, query_Q: NDArray[np.int64], near_QK: NDArray[np.int64]) -> Figure:
    """A row a query: itself, a space, and its neighbours (indices of objects, -1 for none), most alike first."""
    side, gap, strip, left, head = 0.98, 0.1, 0.3, 0.15, 0.6
    step, start = side + gap, left + side + gap + 0.25
    sheet = Sheet(start + near_QK.shape[1] * step - gap + left, head + len(query_Q) * (step + strip))
    label_N, found_QK = some.label_N, near_QK >= 0
    right = int((label_N[near_QK] == label_N[query_Q][:, None])[found_QK].sum())
    title = f"{name}: {right} of {found_QK.sum()} nearest neighbours are of the query's class"
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
