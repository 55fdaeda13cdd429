"""Loss, k-NN, learning rate and speed over the steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ssl_pretrain.errors import DataError
from ssl_pretrain.report.folder import series
from ssl_pretrain.report.sections import Section
from ssl_pretrain.report.sheet import DPI, INKS

if TYPE_CHECKING:
    from ssl_pretrain.report.folder import RunFolder

PLACE = 20
WORDS = (
    "A loss that stays at the dashed line says that nothing is learned. The k-NN is the figure to trust: it asks the "
    "features themselves, on labelled objects; its band is the 95 % interval."
)


def section(run: RunFolder) -> Section:
    """The four curves; `DataError` where nothing is measured."""
    lines = run.lines
    if not any("train/loss" in line for line in lines):
        raise DataError("nothing is measured yet (metrics.jsonl has no line with a loss)")
    figure = Figure(figsize=(9.6, 6.4), dpi=DPI, layout="constrained")
    last = max(line["step"] for line in lines)
    figure.suptitle(f"{run.name}, step {last:,}", fontsize=11)
    (loss, knn), (rate, speed) = figure.subplots(2, 2)
    curve(loss, *series(lines, "train/loss"), INKS[0], "loss")
    chance = run.chance.get("loss")
    if chance is not None:
        loss.axhline(chance, color="0.35", linestyle="--", label=f"nothing learned: {chance:.3g}")
    _knn(knn, lines, bool(run.recipe.probe.data))
    curve(rate, *series(lines, "train/lr"), INKS[2], "learning rate")
    curve(speed, *series(lines, "train/images_per_s"), INKS[4], "images/s")
    titles = {loss: "Loss", knn: "k-NN balanced accuracy", rate: "Learning rate", speed: "Images per second"}
    for axes, title in titles.items():
        dress(axes, title, last)
        if axes in (rate, speed):
            axes.set_ylim(bottom=0)
            continue
        legend(axes)
    final = series(lines, "train/loss")[1][-1]
    alt = f"Curves up to step {last:,}: loss (last {final:.4g}), k-NN, learning rate, images per second"
    return Section("How training went", WORDS, figure, alt)


def curve(axes: Axes, steps: list[float], values: list[float], ink: str, label: str) -> None:
    """The values; where there are many, faint under their running mean."""
    width = len(values) // 40
    many = width >= 5
    axes.plot(steps, values, color=ink, alpha=0.3 if many else 1.0, linewidth=1.4, label=None if many else label,
              marker="." if len(values) < 40 else "")  # fmt: skip
    if many:
        mean = np.convolve(values, np.full(width, 1 / width), mode="valid")
        axes.plot(steps[width // 2 :][: len(mean)], mean, color=ink, linewidth=1.6, label=f"{label}, mean of {width}")


def dress(axes: Axes, title: str, last: float) -> None:
    """Title and steps."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set(xlabel="step", xlim=(0, 1.02 * last))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def legend(axes: Axes) -> None:
    """Beside the title, where no curve can run."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, frameon=False, fontsize=8)


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
