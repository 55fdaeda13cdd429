"""How sure is a figure: sums by unit, intervals over resampled units, paired differences, and the verdict in words.

Objects of one image share stain, focus and neighbours, so units (images, or groups of them) are resampled, not
objects: the bootstrap of Efron, "Bootstrap methods: another look at the jackknife", 1979, by clusters.

Shapes: Q queries, C classes, U units, M sums that are kept of each unit, F figures, R rounds of the bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ssl_pretrain import rng
from ssl_pretrain.errors import UsageError

FIGURES = ("accuracy", "balanced_accuracy", "macro_f1")


@dataclass(frozen=True)
class Interval:
    """A figure and the 95 % interval of its bootstrap."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Tally:
    """What a probe found, by unit: numbers that add up over units, and how figures come of them."""

    names: tuple[str, ...]
    """Of the F figures."""
    sums_UM: np.ndarray
    """float64, one row a unit of the queries, in ascending order of the units' numbers."""
    figures: Callable[[np.ndarray], np.ndarray]
    """Sums (R, M) of some units -> figures (R, F); NaN where these units have nothing to judge."""
    unit_U: np.ndarray | None = None
    """int64: the units' numbers, by which `paired` sees that two tallies are of the same queries."""

    def intervals(self, rounds: int = 1000, seed: int = 0) -> dict[str, Interval]:
        """Every figure with the 2.5 and 97.5 percentiles over resampled units.

        Units are drawn with replacement, as many as there are. Rounds that drew nothing to judge do not count.
        """
        total_F = self.figures(self.sums_UM.sum(axis=0, keepdims=True))[0]
        drawn = [self.figures(times_RU @ self.sums_UM) for times_RU in resamples(len(self.sums_UM), rounds, seed)]
        return _intervals(self.names, total_F, np.concatenate(drawn))


@dataclass(frozen=True, eq=False)
class Judged:
    """What one probe says of one backbone's features."""

    tally: Tally
    confusion_CC: np.ndarray | None
    """Query objects by true (row) and predicted class; None where nothing is predicted."""
    settings: dict[str, Any]
    """Plain JSON values: what the probe was set to, and what it chose."""
    notes: tuple[str, ...]
    """What a reader of the figures should know, one line each."""


def tally(true_Q: np.ndarray, predicted_Q: np.ndarray, unit_Q: np.ndarray, classes: int, weight: float = 1.0) -> Tally:
    """The tally of a probe that predicts classes: accuracy, balanced accuracy and macro F1.

    Each object counts `weight`: 1 / T where the predictions of T draws stand one after the other.

    >>> found = tally(np.array([0, 0, 1]), np.array([0, 1, 1]), np.array([4, 4, 9]), classes=2)
    >>> found.names[0], round(found.intervals(rounds=10)["accuracy"].value, 3)
    ('accuracy', 0.667)
    """
    return _of_counts(counts(true_Q, predicted_Q, unit_Q, classes) * weight, np.unique(unit_Q))


def paired(mine: Tally, other: Tally, rounds: int = 1000, seed: int = 0) -> dict[str, Interval]:
    """The differences mine - other, both from the same draws of units.

    What makes a unit hard makes it hard for both, so the difference is surer than either figure. Of a single unit no
    spread is known: its intervals are all that figures between 0 and 1 can differ by, -1 to 1. Raises `UsageError` for
    tallies of different figures or units.

    One of two is right on both images, the other on one of them.

    >>> true_Q, unit_Q = np.array([0, 1]), np.array([3, 4])
    >>> mine, other = (tally(true_Q, np.array(found), unit_Q, classes=2) for found in ([0, 1], [0, 0]))
    >>> paired(mine, other)["accuracy"]
    Interval(value=0.5, low=0.0, high=1.0)
    """
    units = len(mine.sums_UM)
    if mine.names != other.names:
        raise UsageError(f"these figures cannot be paired: {', '.join(mine.names)} and {', '.join(other.names)}")
    if units != len(other.sums_UM) or not (
        mine.unit_U is None or other.unit_U is None or np.array_equal(mine.unit_U, other.unit_U)
    ):
        raise UsageError("only figures of the same query images can be paired: judge both backbones on one set")
    mine_F, other_F = (each.figures(each.sums_UM.sum(axis=0, keepdims=True))[0] for each in (mine, other))
    value_F = mine_F - other_F
    if units == 1:
        return {name: Interval(float(v), -1.0, 1.0) for name, v in zip(mine.names, value_F, strict=True)}
    drawn = [
        mine.figures(times_RU @ mine.sums_UM) - other.figures(times_RU @ other.sums_UM)
        for times_RU in resamples(units, rounds, seed)
    ]
    return _intervals(mine.names, value_F, np.concatenate(drawn))


def verdict(difference: Interval, mine: str, other: str, figure: str) -> str:
    """One sentence on a paired difference; an interval that touches 0 tells the two not apart.

    >>> verdict(Interval(0.102, 0.071, 0.13), "dino resnet18", "random:resnet18", "balanced_accuracy")
    'dino resnet18 is better than random:resnet18 in balanced accuracy by 10.2 points [7.1, 13.0]'
    """
    what = figure.replace("_", " ")
    value, low, high = (100 * x for x in (difference.value, difference.low, difference.high))
    if (word := side(difference)) == "not distinguishable":
        return (
            f"{mine} is not distinguishable from {other} in {what} with this much data: "
            f"at most {max(0.0, high):.1f} points better, at most {max(0.0, -low):.1f} points worse"
        )
    if word == "worse":
        value, low, high = -value, -high, -low
    # An interval above 0 must not be shown as one that begins at 0.
    digits = max(1, math.ceil(-math.log10(low)))
    shown = f"{value:.{digits}f} points [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{mine} is {word} than {other} in {what} by {shown}"


def side(difference: Interval) -> Literal["better", "worse", "not distinguishable"]:
    """Where the interval of a difference lies; what rounding leaves of 0 is no difference.

    >>> side(Interval(-0.1, -0.2, -0.05)), side(Interval(0.1, 0.0, 0.2))
    ('worse', 'not distinguishable')
    """
    if difference.low > 1e-9:
        return "better"
    return "worse" if difference.high < -1e-9 else "not distinguishable"


def counts(true_Q: np.ndarray, predicted_Q: np.ndarray, unit_Q: np.ndarray, classes: int) -> np.ndarray:
    """Per unit, how many objects of each class there are, were predicted, and were hit: (U, 3, C) int64.

    >>> counts(np.array([0, 0]), np.array([0, 1]), np.array([5, 5]), classes=2).tolist()
    [[[2, 0], [1, 1], [1, 0]]]
    """
    units, at_Q = np.unique(unit_Q, return_inverse=True)
    shape, hit_Q = (len(units), 3, classes), true_Q == predicted_Q
    cells = [(at_Q * 3 + i) * classes + label_Q for i, label_Q in enumerate((true_Q, predicted_Q, true_Q))]
    cells[2] = cells[2][hit_Q]
    return np.bincount(np.concatenate(cells), minlength=math.prod(shape)).reshape(shape)


def confusion(true_Q: np.ndarray, predicted_Q: np.ndarray, classes: int) -> np.ndarray:
    """Objects by true (row) and predicted class: (C, C) int64.

    >>> confusion(np.array([0, 0, 1]), np.array([0, 1, 1]), classes=2).tolist()
    [[1, 1], [0, 1]]
    """
    return np.bincount(true_Q * classes + predicted_Q, minlength=classes**2).reshape(classes, classes)


def figures(counts_R3C: np.ndarray) -> np.ndarray:
    """Accuracy, balanced accuracy and macro F1, along the last axis (..., 3), of counts (..., 3, C).

    Two objects of class 0, one of them hit, and one of class 1, hit: 2/3; (1/2 + 1) / 2; F1 is 2/3 for both.

    >>> figures(np.array([[2, 1], [1, 2], [1, 1]])).round(3)
    array([0.667, 0.75 , 0.667])
    """
    true_RC, predicted_RC, hit_RC = (counts_R3C[..., i, :].astype(np.float64) for i in range(3))
    either_RC = true_RC + predicted_RC
    recall_RC, f1_RC = ratio(hit_RC, true_RC), ratio(2 * hit_RC, either_RC)
    accuracy_R = ratio(hit_RC.sum(-1), true_RC.sum(-1))
    balanced_R = recall_RC.sum(-1) / np.maximum((true_RC > 0).sum(-1), 1)
    return np.stack([accuracy_R, balanced_R, f1_RC.sum(-1) / np.maximum((either_RC > 0).sum(-1), 1)], axis=-1)


def ratio(a: np.ndarray, b: np.ndarray, empty: float = 0.0) -> np.ndarray:
    """The quotient of two float64 arrays of one shape; `empty` where b is 0.

    >>> ratio(np.array([1.0, 1.0]), np.array([2.0, 0.0])).tolist()
    [0.5, 0.0]
    """
    quotient: np.ndarray = np.divide(a, b, out=np.full(a.shape, empty), where=b > 0)
    return quotient


def bootstrap(counts_U3C: np.ndarray, rounds: int, seed: int) -> tuple[Interval, Interval, Interval]:
    """Accuracy, balanced accuracy and macro F1 of `counts`, each with its interval."""
    found = _of_counts(counts_U3C, None).intervals(rounds, seed)
    accuracy, balanced_accuracy, macro_f1 = (found[name] for name in FIGURES)
    return accuracy, balanced_accuracy, macro_f1


def resamples(units: int, rounds: int, seed: int) -> Iterator[np.ndarray]:
    """How often each round draws each unit (R, U), in blocks that stay small however many units there are."""
    stream = rng.key(seed, "bootstrap")
    block = max(1, 4_000_000 // units)
    for start in range(0, rounds, block):
        now = min(block, rounds - start)
        drawn_RU = (rng.uniform(rng.fold_in(stream, start), now * units).reshape(now, units) * units).astype(np.int64)
        cells = (drawn_RU + np.arange(now)[:, None] * units).ravel()
        yield np.bincount(cells, minlength=now * units).reshape(now, units).astype(np.float64)


def _of_counts(counts_U3C: np.ndarray, unit_U: np.ndarray | None) -> Tally:
    units, _, classes = counts_U3C.shape
    sums_UM = counts_U3C.reshape(units, -1).astype(np.float64)
    return Tally(FIGURES, sums_UM, lambda sums_RM: figures(sums_RM.reshape(-1, 3, classes)), unit_U)


def _intervals(names: tuple[str, ...], value_F: np.ndarray, drawn_RF: np.ndarray) -> dict[str, Interval]:
    low_F, high_F = np.nanpercentile(drawn_RF, [2.5, 97.5], axis=0)
    rows = zip(names, value_F, low_F, high_F, strict=True)
    return {name: Interval(float(v), float(low), float(high)) for name, v, low, high in rows}
