"""The table of a comparison, and its picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ssl_pretrain.compare import PROTOCOL
from ssl_pretrain.compare.running import AtFraction, Comparison
from ssl_pretrain.probe.statistics import Interval
from ssl_pretrain.report.sheet import DPI, INKS, STYLE, write

MOST_CURVES = 4
"""Fractions of which a learning curve is drawn, the largest ones."""


def table(comparison: Comparison) -> Group:
    """Figures by fraction and start, then by class, then the verdicts and what a reader should know."""
    figures = Table("labels", "start")
    for heading in ("mAP", "AP50", "AP75", "gain over it"):
        figures.add_column(heading, justify="right")
    for at in comparison.fractions:
        for score in at.scores:
            value = _shown(score.map, ".3f")
            if len(score.map_by_seed) > 1:
                value += f"\nseeds {min(score.map_by_seed):.3f} to {max(score.map_by_seed):.3f}"
            gain = _shown(score.difference, "+.3f") if score.difference is not None else ""
            row = [value, f"{score.ap50:.3f}", f"{score.ap75:.3f}", gain]
            figures.add_row(f"{100 * at.fraction:g} %", Text(score.start), *row)
    lines = [*comparison.verdicts, *(f"note: {line}" for line in comparison.notes), _protocol(comparison)]
    return Group(figures, Text("mAP of each class"), _by_class(comparison), Text("\n".join(lines)))


def draw(comparison: Comparison, path: Path) -> Path:
    """Writes the picture, a PNG: mAP by fraction of the labels, and learning curves. Raises `WriteError`."""
    with matplotlib.style.context(["default", STYLE]):  # a user's own matplotlibrc could break the layout
        return write(path, picture(comparison))


def picture(comparison: Comparison) -> Figure:
    """One panel of mAP by fraction, one line a start, with intervals; then one learning curve for each fraction."""
    shown = sorted(comparison.fractions, key=lambda at: at.fraction)[-MOST_CURVES:]
    figure = Figure(figsize=(3.6 + 2.9 * len(shown), 3.9), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, 1 + len(shown), width_ratios=[1.3] + [1] * len(shown), sharey=True)
    _by_fraction(axes[0], comparison)
    for each, at in zip(axes[1:], shown, strict=True):
        _learning(each, at, comparison)
    axes[0].set_ylim(bottom=0)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 4), frameon=False)
    figure.suptitle(f"Fine-tuned detectors on {comparison.data['test_images']} test images", fontsize=10)
    return figure


def _by_class(comparison: Comparison) -> Table:
    """One row a class, as data sets have many; one column for each fraction and start."""
    classes = Table("class")
    scores = [score for at in comparison.fractions for score in at.scores]
    for at in comparison.fractions:
        for score in at.scores:
            classes.add_column(Text(f"{score.start}\n{100 * at.fraction:g} %"), justify="right")
    for name in scores[0].per_class:
        values = [score.per_class[name] for score in scores]
        # Text, because rich would read a class called "[red]" as markup.
        classes.add_row(Text(name), *("–" if value is None else f"{value:.3f}" for value in values))
    return classes


def _by_fraction(axes: Axes, comparison: Comparison) -> None:
    fractions = sorted(comparison.fractions, key=lambda at: at.fraction)
    for s, name in enumerate(comparison.starts):
        # A little beside each other: intervals on one spot hide each other.
        place = [i + 0.07 * (s - (len(comparison.starts) - 1) / 2) for i in range(len(fractions))]
        maps = [at.scores[s].map for at in fractions]
        reach = [[m.value - m.low for m in maps], [m.high - m.value for m in maps]]
        ink = INKS[s % len(INKS)]
        axes.errorbar(place, [m.value for m in maps], yerr=reach, color=ink, marker="o", ms=4, capsize=3, label=name)
        for x, at in zip(place, fractions, strict=True):
            each = at.scores[s].map_by_seed
            if len(each) > 1:
                axes.plot([x] * len(each), each, ls="", marker="_", color=ink, alpha=0.6)
    axes.set_xticks(range(len(fractions)), [f"{100 * at.fraction:g} %\n{at.images} images" for at in fractions])
    axes.set(xlabel="labels", ylabel="COCO mAP", xlim=(-0.4, len(fractions) - 0.6))
    axes.set_title("with 95 % intervals", fontsize=9)


def _learning(axes: Axes, at: AtFraction, comparison: Comparison) -> None:
    for s, score in enumerate(at.scores):
        steps, values = zip(*score.curve, strict=True)
        axes.plot(steps, values, color=INKS[s % len(INKS)], marker="o", ms=3)
    axes.set(xlabel="steps", xlim=(0, comparison.settings.steps * 1.05))
    axes.set_title(f"learning curve, {100 * at.fraction:g} % of the labels", fontsize=9)


def _shown(interval: Interval, form: str) -> str:
    return f"{interval.value:{form}}\n[{interval.low:{form}}, {interval.high:{form}}]"


def _protocol(comparison: Comparison) -> str:
    given = comparison.settings
    return (
        f"{PROTOCOL}, {given.detector}, {given.steps} steps of {given.batch_size} images, shorter side "
        f"{given.short_side_px} px, AdamW {given.lr:g}, BatchNorm in training mode for all; "
        f"{comparison.data['split']}; data {comparison.data['fingerprint']}"
    )
