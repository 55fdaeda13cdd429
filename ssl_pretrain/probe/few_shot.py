"""Few-shot probe on labelled objects: what features are worth when a class has 1, 5 or 10 labelled examples.

The classifier is the nearest class mean (Snell, Swersky, Zemel, "Prototypical networks for few-shot learning", 2017),
by cosine. Figures are means over draws of the examples, the same draws for every backbone; the intervals are over the
queries' units only.

Shapes: N objects, M of them in the bank, Q queries, D width, C classes, U units, S numbers of shots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ssl_pretrain import rng
from ssl_pretrain.errors import DataError, UsageError
from ssl_pretrain.probe.objects import Objects
from ssl_pretrain.probe.statistics import Judged, Tally, confusion, ratio


def judge(
    objects: Objects, z_ND: np.ndarray, *, shots: Sequence[int] = (1, 5, 10), draws: int = 20, seed: int = 0
) -> Judged:
    """Accuracy and balanced accuracy (`accuracy_1`, `balanced_accuracy_1`...) at each number of examples a class.

    A draw lines up the bank objects of every class, keyed by `seed`: at random, but a second object of a unit comes
    after the first ones of all units. A query's examples are the first n in line that are not of its own unit, so the
    draw is the same for all queries but for those whose own unit stands in front: there the next in line follows. The
    examples of 1 shot are among those of 5. The confusion matrix is that of most shots, a mean over draws.

    Features (N, D) are float32 of length 1. Raises `UsageError` for shots or draws below 1, `DataError` when the whole
    bank is from one query's own unit.
    """
    if min(*shots, draws) < 1 or len(set(shots)) < len(shots):
        raise UsageError("few-shot: shots, all different, and draws are 1 or more")
    bank, query, classes = objects.train_N, objects.query_N, len(objects.classes)
    z_MD, label_M, unit_M = z_ND[bank], objects.label_N[bank], objects.unit_N[bank]
    z_QD, true_Q, unit_Q = z_ND[query], objects.label_N[query], objects.unit_N[query]
    if len(others := np.unique(unit_M)) < 2 and np.isin(others, unit_Q).all():
        raise DataError("a few-shot query has no examples: the bank has nothing of another unit than its own")
    units, at_Q = np.unique(unit_Q, return_inverse=True)
    truth_UC = np.bincount(at_Q * classes + true_Q, minlength=len(units) * classes).reshape(len(units), classes)
    hits_SUC = np.zeros((len(shots), *truth_UC.shape), np.int64)
    confusion_CC = np.zeros((classes, classes), np.int64)
    stream = rng.key(seed, "few-shot draws")
    for draw in range(draws):
        lines = _lines(label_M, unit_M, classes, rng.fold_in(stream, draw))
        for hits_UC, n in zip(hits_SUC, shots, strict=True):
            predicted_Q = _nearest_mean(z_MD, unit_M, lines, n, z_QD, unit_Q)
            hit_Q = predicted_Q == true_Q
            hits_UC += np.bincount(at_Q[hit_Q] * classes + true_Q[hit_Q], minlength=truth_UC.size).reshape(-1, classes)
            if n == max(shots):
                confusion_CC += confusion(true_Q, predicted_Q, classes)
    names = tuple(f"{figure}_{n}" for n in shots for figure in ("accuracy", "balanced_accuracy"))
    sums_UM = np.concatenate([truth_UC.astype(np.float64), *(hits_SUC / draws)], axis=1)
    found = Tally(names, sums_UM, lambda sums_RM: recalls(sums_RM, classes), units)
    settings = {"shots": list(shots), "draws": draws, "confusion_shots": max(shots)}
    return Judged(found, confusion_CC / draws, settings, _notes(objects, max(shots)))


def recalls(sums_RM: np.ndarray, classes: int) -> np.ndarray:
    """Accuracy and balanced accuracy, for each of S shots in turn (R, 2 S), of objects and S times hits by class.

    Of two objects of class 0 half a hit a draw, of one of class 1 one: (0.5 + 1) / 3; (0.25 + 1) / 2.

    >>> recalls(np.array([[2.0, 1.0, 0.5, 1.0]]), classes=2).tolist()
    [[0.5, 0.625]]
    """
    sums_RSC = sums_RM.reshape(len(sums_RM), -1, classes)
    true_RSC, hit_RSC = np.broadcast_to(sums_RSC[:, :1], sums_RSC[:, 1:].shape), sums_RSC[:, 1:]
    accuracy_RS = ratio(hit_RSC.sum(-1), true_RSC.sum(-1))
    balanced_RS = ratio(ratio(hit_RSC, true_RSC).sum(-1), (true_RSC > 0).sum(-1).astype(np.float64))
    return np.stack([accuracy_RS, balanced_RS], axis=-1).reshape(len(sums_RM), -1)


def _lines(label_M: np.ndarray, unit_M: np.ndarray, classes: int, key: rng.Key) -> list[np.ndarray]:
    """Each class's objects (indices into the bank) in the order in which they become examples."""
    mixed_M = rng.permutation(key, len(label_M))
    label, unit = label_M[mixed_M], unit_M[mixed_M]
    together = np.lexsort((unit, label))  # stable: one unit's objects of one class keep their mixed order
    first = np.ones(len(together), bool)
    first[1:] = (np.diff(label[together]) != 0) | (np.diff(unit[together]) != 0)
    start = np.maximum.accumulate(np.where(first, np.arange(len(together)), 0))
    nth = np.empty_like(mixed_M)
    nth[together] = np.arange(len(together)) - start
    order = np.lexsort((nth, label))
    ends = np.cumsum(np.bincount(label_M, minlength=classes))[:-1]
    return np.split(mixed_M[order], ends)


def _nearest_mean(
    z_MD: np.ndarray, unit_M: np.ndarray, lines: list[np.ndarray], n: int, z_QD: np.ndarray, unit_Q: np.ndarray
) -> np.ndarray:
    """The class (Q) with the most similar mean of n examples, none of them from the query's own unit."""
    similarity_QC = np.full((len(z_QD), len(lines)), -np.inf, np.float32)
    for c, line in enumerate(lines):
        similarity_QC[:, c] = _similarity(z_QD, z_MD[line[:n]])
        for unit in np.unique(unit_M[line[:n]]):
            own = np.flatnonzero(unit_Q == unit)
            if len(own):
                similarity_QC[own, c] = _similarity(z_QD[own], z_MD[line[unit_M[line] != unit][:n]])
    nearest_Q: np.ndarray = similarity_QC.argmax(axis=1)
    return nearest_Q


def _similarity(z_QD: np.ndarray, z_SD: np.ndarray) -> np.ndarray:
    """Cosine (Q) with the mean of the examples; minus infinity where there is none: the class cannot be predicted."""
    if len(z_SD) == 0:
        return np.full(len(z_QD), -np.inf, np.float32)
    mean_D = z_SD.mean(axis=0)
    similarity_Q: np.ndarray = z_QD @ (mean_D / max(float(np.linalg.norm(mean_D)), 1e-12))
    return similarity_Q


def _notes(objects: Objects, most: int) -> tuple[str, ...]:
    """What a reader should know of the examples."""
    bank_C, query_C = (
        np.bincount(objects.label_N[side], minlength=len(objects.classes))
        for side in (objects.train_N, objects.query_N)
    )
    few = [f"{name} ({bank_C[c]})" for c, name in enumerate(objects.classes) if bank_C[c] < most and query_C[c]]
    notes = [f"fewer than {most} objects in the bank, so all they have are examples: {', '.join(few)}"] if few else []
    if objects.train_N.all():
        notes.append("few-shot examples are drawn from the queries themselves, for each query from other units")
    return tuple(notes)
