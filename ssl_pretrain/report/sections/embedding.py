"""A map of the labelled objects: those that are alike to the backbone lie near each other.

Shapes: N objects, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ssl_pretrain.errors import DataError
from ssl_pretrain.report.sections import Section
from ssl_pretrain.report.sheet import DPI, INKS, short
from ssl_pretrain.report.tsne import PERPLEXITY, tsne

if TYPE_CHECKING:
    from ssl_pretrain.report.folder import RunFolder

PLACE = 60
POINTS, EACH = 1000, 150
"""Objects on the map, and of one class: else the commonest would hide the others."""
SHAPES = "o^"
COLOURED = len(INKS) * len(SHAPES)
"""Classes with a mark of their own: six colours that the colour-blind can tell apart, in two shapes."""
WORDS = (
    "Labelled objects, laid out by t-SNE so that those that are alike to the backbone lie near each other. Islands of "
    "one mark are classes that the features tell apart without having seen a label. Distances between islands, and "
    "their sizes, mean little."
)


def section(run: RunFolder) -> Section | None:
    """The map of the probe's objects; nothing without labels, `DataError` where there are too few of them."""
    judged = run.judged
    if judged is None:
        return None
    some_N = sample(judged.objects.label_N, POINTS, EACH)
    if len(some_N) < 8:
        raise DataError(f"a map needs 8 labelled objects or more, and there are {len(some_N)}")
    y_N2 = tsne(judged.z_ND[some_N])
    title = f"{run.name}: {len(some_N):,} objects, at most {EACH} of a class, perplexity {PERPLEXITY:g}"
    picture = figure(title, y_N2, judged.objects.label_N[some_N], judged.objects.classes)
    alt = f"Map of {len(some_N):,} labelled objects, marked by class"
    return Section("A map of the objects", WORDS, picture, alt)


def figure(title: str, y_N2: NDArray[np.float64], label_N: NDArray[np.int64], names: Sequence[str]) -> Figure:
    """Places (N, 2) with the marks of their classes; the most frequent have their own, the others are grey."""
    figure = Figure(figsize=(9.6, 6.9), dpi=DPI)
    axes = figure.add_axes((0.15 / 9.6, 0.15 / 6.9, 6.3 / 9.6, 6.3 / 6.9))
    figure.text(0.15 / 9.6, 1 - 0.27 / 6.9, title, fontsize=11, parse_math=False)
    count_C = np.bincount(label_N, minlength=len(names))
    order = [int(c) for c in np.argsort(-count_C, kind="stable") if count_C[c]]
    rest_N = np.isin(label_N, order[COLOURED:])
    if rest_N.any():
        others = len(order) - COLOURED
        words = f"{others} other class{'es' if others > 1 else ''} ({rest_N.sum():,})"
        axes.scatter(y_N2[rest_N, 0], y_N2[rest_N, 1], s=9, color="0.72", linewidth=0, label=words)
    for i, c in enumerate(order[:COLOURED]):
        mine_N = label_N == c
        axes.scatter(
            y_N2[mine_N, 0], y_N2[mine_N, 1], s=16, marker=SHAPES[i // len(INKS)], color=INKS[i % len(INKS)],
            alpha=0.85, linewidth=0, label=f"{short(names[c], 30)} ({count_C[c]:,})",
        )  # fmt: skip
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid(False)
    axes.set_frame_on(False)
    axes.set(xticks=[], yticks=[])
    handles, labels = axes.get_legend_handles_labels()
    if rest_N.any():  # drawn first, told last
        handles, labels = [*handles[1:], handles[0]], [*labels[1:], labels[0]]
    found = figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(6.6 / 9.6, 1 - 0.45 / 6.9), frameon=False)
    for text in found.get_texts():
        text.set_parse_math(False)
    return figure


def sample(label_N: NDArray[np.int64], most: int, each: int) -> NDArray[np.int64]:
    """Indices of at most so many objects, at most `each` of a class, evenly spaced in their order.

    >>> sample(np.array([0, 0, 0, 0, 1]), 10, 2).tolist()
    [0, 3, 4]
    """
    kept = [_evenly(np.flatnonzero(label_N == c), each) for c in np.unique(label_N)]
    return _evenly(np.sort(np.concatenate([np.zeros(0, np.int64), *kept])), most)


def _evenly(rows_N: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    return rows_N if len(rows_N) <= most else rows_N[np.linspace(0, len(rows_N) - 1, most).round().astype(int)]
