"""What the run's guards watched, the levels at which they speak, and what they said."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ssl_pretrain.errors import DataError
from ssl_pretrain.report import html
from ssl_pretrain.report.folder import series
from ssl_pretrain.report.sections import Section
from ssl_pretrain.report.sections.curves import curve, dress
from ssl_pretrain.report.sheet import DPI, INKS, WRONG
from ssl_pretrain.train.health import (
    ABOVE_CHANCE,
    AT_CHANCE,
    FEATURE_STD,
    FEATURE_STD_SHARE,
    GUARDS,
    ONE_PROTOTYPE,
    RANK_SHARE,
    TARGET_SPREAD,
    UNIFORM,
    Seen,
    advice,
)

if TYPE_CHECKING:
    from ssl_pretrain.report.folder import RunFolder

PLACE = 30
WORDS = (
    "What is watched for a collapse. In a red band, or below a red line (above it, where it says so), a guard counts, "
    "and speaks after a few times in a row; red marks at the foot are the steps at which it spoke."
)
NOT_FINITE = "not_finite"
"""Recorded by the loop itself."""
PANELS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Loss": (("train/loss",), ("loss_at_chance", "loss_above_chance", "loss_impossible", "loss_swings", "loss_spike",
                               NOT_FINITE)),
    "Spread of the features": (("health/feature_std",), ("features_collapsed",)),
    "Rank of the features": (("health/feature_rank",), ("low_rank",)),
    "Teacher: entropy and spread, of ln K": (
        ("train/teacher_entropy", "train/teacher_spread", "train/patch_entropy", "train/patch_spread"),
        ("one_prototype", "uniform_teacher"),
    ),
    "Spread of the targets": (("train/target_spread",), ("targets_collapsed",)),
    "Teacher from student": (("health/teacher_gap",), ("teacher_is_student",)),
    "Label-free: RankMe and LiDAR": (("health/rankme", "health/lidar"), ()),
    "Label-free: alpha-ReQ": (("health/alpha_req",), ()),
    "What is left of the start": (("drift/knn_agreement", "drift/cosine"), ()),
}  # fmt: skip
"""Title, curves, and the guards that look at them."""


def section(run: RunFolder) -> Section:
    """The curves that guards look at, and in words what they said; `DataError` where nothing is measured."""
    lines = run.lines
    if not any("train/loss" in line for line in lines):
        raise DataError("nothing is measured yet (metrics.jsonl has no line with a loss)")
    panels = {title: panel for title, panel in PANELS.items() if any(series(lines, key)[0] for key in panel[0])}
    rows = math.ceil(len(panels) / 3)
    picture = Figure(figsize=(9.6, 0.4 + 2.5 * rows), dpi=DPI, layout="constrained")
    last = max(line["step"] for line in lines)
    grid = picture.subplots(rows, 3, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, (keys, guards)) in zip(grid, panels.items(), strict=False):
        for ink, key in zip(INKS, keys, strict=False):
            if series(lines, key)[0]:
                curve(axes, *series(lines, key), ink, key.rpartition("/")[2].replace("_", " "))
        _levels(axes, title, run)
        for guard in guards:
            steps, _ = series(lines, f"health/{guard}")
            if steps:
                foot = axes.get_xaxis_transform()
                axes.plot(
                    steps, [0.03] * len(steps), "|", transform=foot, color=WRONG, ms=8, label=guard.replace("_", " ")
                )
        dress(axes, title, last)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(frameon=False, fontsize=7, loc="best")
    settings = _settings(run)
    said = [words(name, *series(lines, f"health/{name}"), series(lines, "train/loss")[0][-1], settings)
            for name in diagnosed(lines)]  # fmt: skip
    told = html.items(said) if said else "<p>Nothing was diagnosed.</p>"
    alt = f"Curves of {', '.join(panels).lower()}, with the levels of the guards; {len(said)} diagnoses"
    return Section("Is it healthy?", WORDS, picture, alt, told)


def diagnosed(lines: Sequence[Mapping[str, float]]) -> list[str]:
    """The names of what was diagnosed, in the order in which it first was.

    >>> diagnosed([{"step": 5, "health/feature_std": 0.2}, {"step": 10, "health/low_rank": 1}])
    ['low_rank']
    """
    known = {f"health/{name}": name for name in [*(guard.name for guard in GUARDS), NOT_FINITE]}
    return list(dict.fromkeys(known[key] for line in lines for key in line if key in known))


def words(name: str, steps: Sequence[float], ones: Sequence[float], last: float, settings: Mapping[str, object]) -> str:
    """What was diagnosed, when, and what to turn.

    >>> words("not_finite", [7], [1], 100, {"train.lr": 0.3})
    'not finite at step 7: a loss or gradient was not finite, and the step was skipped. Lower train.lr (0.3).'
    """
    del ones
    when = f"at step {steps[0]:,}" if len(steps) == 1 else f"at {len(steps)} steps from {steps[0]:,} to {steps[-1]:,}"
    end = ", still so at the end" if steps[-1] >= last else ""
    guard = next((guard for guard in GUARDS if guard.name == name), None)
    if guard is None:
        what, knob = (
            "a loss or gradient was not finite, and the step was skipped.",
            advice(("lower train.lr",), settings),
        )
    else:
        what, knob = (guard.check.__doc__ or "").strip().split("\n")[0], advice(guard.knobs, settings)
        what = f"{what[:1].lower()}{what[1:]}"
    knob = f" {knob[:1].upper()}{knob[1:]}." if knob else ""
    return f"{name.replace('_', ' ')} {when}{end}: {what}{knob}"


def least(values_T: NDArray[np.float64], floor: float, share: float) -> NDArray[np.float64]:
    """The level below which a guard counts: a floor, or a share of the largest so far, whatever is not a number aside.

    >>> least(np.array([1.0, 4.0, 2.0]), 0.3, 0.2).round(2).tolist()
    [0.3, 0.8, 0.8]
    """
    level_T: NDArray[np.float64] = np.fmax(floor, share * np.fmax.accumulate(values_T))
    return level_T


def _levels(axes: Axes, title: str, run: RunFolder) -> None:
    """The levels of a panel as red lines, by the guards' own constants."""
    lines = run.lines
    if title == "Loss" and "loss" in run.chance:
        chance, top = run.chance["loss"], max(series(lines, "train/loss")[1])
        near = AT_CHANCE * abs(chance)
        axes.axhspan(chance - near, chance + near, color=WRONG, alpha=0.12, linewidth=0, label="at chance")
        if ABOVE_CHANCE * chance < 1.2 * top:
            axes.axhline(
                ABOVE_CHANCE * chance, color=WRONG, linestyle="--", linewidth=1, label="above: worse than chance"
            )
    for of, key, floor, share in (
        ("Spread of the features", "health/feature_std", FEATURE_STD, FEATURE_STD_SHARE),
        ("Rank of the features", "health/feature_rank", 0.0, RANK_SHARE),
    ):
        if title == of:
            steps, values = series(lines, key)
            axes.plot(steps, least(np.array(values), floor, share), color=WRONG, linestyle="--", linewidth=1,
                      label="level")  # fmt: skip
            axes.set_ylim(bottom=0)
    if title == "Spread of the targets":
        axes.axhline(TARGET_SPREAD, color=WRONG, linestyle="--", linewidth=1, label="level")
    if title.startswith("Teacher: "):
        for level, label in _heads(run):
            axes.axhline(level, color=WRONG, linestyle="--" if level == UNIFORM else ":", linewidth=1, label=label)
        axes.set_ylim(0, 1.05)


def _heads(run: RunFolder) -> Iterator[tuple[float, str]]:
    """Levels of a teacher's entropy and spread; as for one process, if the recipe does not say how many there were."""
    train = run.recipe.train
    yield UNIFORM, "entropy above: uniform"
    crops = 2 * train.batch_size // ((train.devices or 1) * train.accumulate)
    seen = Seen({}, run.chance, crops, {}, deque(), deque())
    yield ONE_PROTOTYPE * seen.ceiling("teacher")[1], "spread below: one prototype"


def _settings(run: RunFolder) -> dict[str, object]:
    """What a diagnosis can advise to turn, with its value."""
    spec = run.recipe.optim(run.method.backbone.family)
    return {**run.recipe.flat(), "train.lr": spec.lr, "train.warmup": spec.warmup}
