"""What k-NN takes for what: the confusion matrix of the labelled objects, and the table of classes.

Shapes: C classes; rows are true classes, columns what was predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ssl_pretrain.report import html
from ssl_pretrain.report.sections import Section
from ssl_pretrain.report.sheet import DPI, short

if TYPE_CHECKING:
    from ssl_pretrain.report.folder import RunFolder

PLACE = 50
LETTERS = 18
"""Of a class's name beside the matrix."""
WORDS = (
    "What the {k} nearest objects of other images take each labelled object for. Rows are true classes, the most "
    "frequent first; the colour is the share of the row, the number counts objects. A good backbone has a "
    "dark diagonal."
)


def section(run: RunFolder) -> Section | None:
    """Matrix and table by the newest artefact; nothing without labels."""
    judged, score = run.judged, run.score
    if judged is None or score is None:
        return None
    names = [row.name for row in score.classes]
    title = f"{run.name}: k-NN balanced accuracy {score.balanced_accuracy.value:.3f}"
    picture = figure(title, score.confusion_CC, names)
    order = np.argsort([-row.queries for row in score.classes], kind="stable")
    rows = []
    for row in (score.classes[c] for c in order):
        shares = ["–" if share is None else f"{share:.2f}" for share in (row.recall, row.precision)]
        rows.append((row.name, f"{row.queries:,}", f"{row.bank:,}", *shares))
    table = html.table(["class", "queries", "in the bank", "recall", "precision"], rows)
    left_out = f" To save time {judged.left_out:,} objects were left out, evenly." if judged.left_out else ""
    words = WORDS.format(k=score.k) + left_out
    alt = f"Confusion matrix of {len(names)} classes; the table below has the same by class"
    return Section("What is taken for what", words, picture, alt, table)


def figure(title: str, confusion_CC: NDArray[np.int64], names: Sequence[str]) -> Figure:
    """Counts by true (row) and predicted class as a picture: classes sorted by count, rows as shares."""
    kept = ordered(confusion_CC)
    count_CC = confusion_CC[np.ix_(kept, kept)]
    total_C = count_CC.sum(1)
    share_CC = count_CC / np.maximum(total_C, 1)[:, None]
    many = len(kept)
    side = min(6.6, max(2.5, 0.55 * many))
    size = min(9.0, 0.42 * 72 * side / many)
    letters = max(len(short(names[c], LETTERS)) for c in kept)
    below, left = 0.55 + 0.65 * letters * size / 72, 0.25 + 0.65 * (letters + 8) * size / 72
    tall = side + below + 0.5
    figure = Figure(figsize=(9.6, tall), dpi=DPI)
    axes = figure.add_axes((left / 9.6, below / tall, side / 9.6, side / tall))
    figure.text(0.15 / 9.6, 1 - 0.27 / tall, title, fontsize=11, parse_math=False)
    axes.imshow(share_CC, cmap="Blues", vmin=0, vmax=1)
    axes.grid(False)
    axes.set_xticks(range(many), [short(names[c], LETTERS) for c in kept], rotation=90, fontsize=size, parse_math=False)
    rows = [f"{short(names[c], LETTERS)} ({total:,})" for c, total in zip(kept, total_C, strict=True)]
    axes.set_yticks(range(many), rows, fontsize=size, parse_math=False)
    axes.tick_params(length=0, pad=2)
    axes.set_xlabel("taken for")
    for row, column in np.argwhere(count_CC):
        ink = "white" if share_CC[row, column] > 0.5 else "black"
        text = f"{count_CC[row, column]}"
        fitting = min(size, 0.85 * 72 * side / many / (0.62 * len(text)))  # a number is no wider than its field
        axes.text(column, row, text, ha="center", va="center", fontsize=fitting, color=ink)
    return figure


def ordered(confusion_CC: NDArray[np.int64]) -> NDArray[np.int64]:
    """The classes that occur or were predicted, the most frequent first.

    >>> ordered(np.array([[1, 1, 0, 0], [0, 5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])).tolist()
    [1, 0]
    """
    order = np.argsort(-confusion_CC.sum(1), kind="stable")
    kept: NDArray[np.int64] = order[(confusion_CC.sum(1) + confusion_CC.sum(0))[order] > 0]
    return kept
