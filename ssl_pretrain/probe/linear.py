"""Linear probe on labelled objects: how well one matrix on top of frozen features tells the classes apart.

Ridge regression on one-hot targets (Hoerl and Kennard, "Ridge regression: biased estimation for nonorthogonal
problems", 1970), every class with the same total weight: it has a closed form, so there is no learning rate, no epoch
and no chance in the figure. How much to regularise is chosen inside the bank. Units stay whole throughout: no model
that predicts an object, or chooses the regularisation for it, has seen its unit.

Shapes: N objects, Q queries, D width, C classes, L regularisations, U units.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ssl_pretrain import rng
from ssl_pretrain.errors import DataError
from ssl_pretrain.probe.objects import Objects
from ssl_pretrain.probe.statistics import Judged, confusion, counts, figures, tally

LAMBDAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Times the number of objects trained on, for features of standard deviation 1."""
UNCHOSEN = LAMBDAS.index(1e-1)
"""Taken where there are too few units to choose."""
FOLDS = 5
FLOOR = 1e-6
"""Smallest standard deviation divided by: below it, float32 features of length 1 differ by rounding only."""
ROWS = 4096


@dataclass(frozen=True, eq=False)
class Ridge:
    """One linear classifier for each regularisation."""

    mean_D: np.ndarray
    w_DLC: np.ndarray
    """For features less `mean_D`, not divided by their standard deviation: it is in the weights already."""
    b_LC: np.ndarray
    label_C: np.ndarray
    """The classes that it was trained on, ascending; no other is ever predicted."""

    def predict(self, z_ND: np.ndarray) -> np.ndarray:
        """Features (N, D) -> labels (L, N)."""
        width, lambdas, classes = self.w_DLC.shape
        w_DM = self.w_DLC.reshape(width, -1)
        parts = [(x_BD - self.mean_D) @ w_DM + self.b_LC.ravel() for x_BD in _blocks(z_ND)]
        best_NL = np.concatenate(parts).reshape(len(z_ND), lambdas, classes).argmax(axis=2)
        label_LN: np.ndarray = self.label_C[best_NL.T]
        return label_LN


def fit(z_ND: np.ndarray, label_N: np.ndarray, lambdas: Sequence[float] = LAMBDAS) -> Ridge:
    """The ridge classifiers of features (N, D) standardised by their mean and standard deviation.

    With weights v_n that give every class the same sum and all together N, W minimises
    sum_n v_n |y_n - b - W x_n|^2 + lambda N |W|^2. The intercept b is not penalised.

    By hand: -3 and 3 become -1 and 1, y is 0 and 1 for class 1: w = (0.5 + 0.5) / (2 + 2 * 1) = 1/4 a standard
    deviation, 1/12 a unit.

    >>> fit(np.array([[-3.0], [3.0]]), np.array([0, 1]), lambdas=[1.0]).w_DLC.round(4).tolist()
    [[[-0.0833, 0.0833]]]
    """
    label_C, class_N, count_C = np.unique(label_N, return_inverse=True, return_counts=True)
    width, classes, total = z_ND.shape[1], len(label_C), len(z_ND)
    weight_C = total / (classes * count_C)
    mean_D = z_ND.mean(axis=0, dtype=np.float64)
    gram_DD, square_D, sum_DC = np.zeros((width, width)), np.zeros(width), np.zeros((width, classes))
    for start, x_BD in zip(range(0, total, ROWS), _blocks(z_ND), strict=True):
        x_BD -= mean_D
        of_B = class_N[start : start + ROWS]
        gram_DD += x_BD.T @ (x_BD * weight_C[of_B, None])
        square_D += np.square(x_BD).sum(axis=0)
        sum_DC += x_BD.T @ (of_B[:, None] == np.arange(classes))
    scale_D = np.maximum(np.sqrt(square_D / total), FLOOR)
    # Every class weighs the same, so the weighted mean is the mean of the class means, and that of the targets 1 / C.
    weighted_D = (sum_DC / count_C).mean(axis=1)
    gram_DD = (gram_DD - total * np.outer(weighted_D, weighted_D)) / np.outer(scale_D, scale_D)
    cross_DC = (sum_DC * weight_C - total * weighted_D[:, None] / classes) / scale_D[:, None]
    w_DLC = np.stack([_solve(gram_DD, each * total, cross_DC) for each in lambdas], axis=1) / scale_D[:, None, None]
    return Ridge(mean_D, w_DLC, 1 / classes - np.einsum("d,dlc->lc", weighted_D, w_DLC), label_C)


def judge(objects: Objects, z_ND: np.ndarray, *, seed: int = 0) -> Judged:
    """Every query predicted by a ridge classifier of the bank objects of other units.

    The units of the bank are dealt into up to 5 folds, keyed by `seed`. The regularisation of a classifier is the one
    of `LAMBDAS` with the best balanced accuracy in a cross-validation over the folds that it is trained on; the
    largest, of equal ones. Queries of a unit that the bank has too are predicted by a classifier without its fold:
    all of them, where the objects have no split. Raises `DataError` when the bank has nothing of another unit than a
    query's.
    """
    bank, query = objects.train_N, objects.query_N
    fold_N, folds = _folds(objects.unit_N, bank, seed)
    trainer = _Trainer(z_ND[bank], objects.label_N[bank], fold_N[bank], folds, len(objects.classes))
    chosen: list[float] = []
    predicted_N = np.full(len(z_ND), -1, np.int64)
    for fold in np.unique(fold_N[query]):
        asked = np.flatnonzero(query & (fold_N == fold))
        left_out = frozenset({int(fold)} - {-1})
        if len(left_out) == folds:
            raise DataError("the linear probe has nothing to learn from: the whole bank is from the query's own unit")
        best = trainer.choose(left_out)
        chosen.append(LAMBDAS[UNCHOSEN if best is None else best])
        predicted_N[asked] = trainer.without(left_out).predict(z_ND[asked])[UNCHOSEN if best is None else best]
    true_Q, predicted_Q, classes = objects.label_N[query], predicted_N[query], len(objects.classes)
    few = f"the bank has too few units ({folds}) to choose lambda / N of the linear probe: it is {LAMBDAS[UNCHOSEN]:g}"
    return Judged(
        tally(true_Q, predicted_Q, objects.unit_N[query], classes),
        confusion(true_Q, predicted_Q, classes),
        {"lambda_over_n": chosen, "of": list(LAMBDAS), "folds": folds, "models": len(chosen)},
        (few,) if trainer.unchosen else (),
    )


@dataclass(eq=False)
class _Trainer:
    """Classifiers of a bank of M objects without some of its folds, each trained once."""

    z_MD: np.ndarray
    label_M: np.ndarray
    fold_M: np.ndarray
    folds: int
    classes: int
    models: dict[frozenset[int], Ridge] = field(default_factory=dict)
    unchosen: bool = False

    def without(self, left_out: frozenset[int]) -> Ridge:
        """The classifiers of all folds but these."""
        if left_out not in self.models:
            rest = ~np.isin(self.fold_M, list(left_out))
            self.models[left_out] = fit(self.z_MD[rest], self.label_M[rest])
        return self.models[left_out]

    def choose(self, left_out: frozenset[int]) -> int | None:
        """The best regularisation by the folds that are not left out, each predicted by the others; None if one is."""
        inside = [fold for fold in range(self.folds) if fold not in left_out]
        if len(inside) < 2:
            self.unchosen = True
            return None
        counts_L3C = np.zeros((len(LAMBDAS), 3, self.classes), np.int64)
        for fold in inside:
            # The model without two folds serves both: each asks the other one's.
            held = self.fold_M == fold
            predicted_LB = self.without(left_out | {fold}).predict(self.z_MD[held])
            true_B, one_B = self.label_M[held], np.zeros(int(held.sum()), np.int64)
            counts_L3C += np.concatenate([counts(true_B, row_B, one_B, self.classes) for row_B in predicted_LB])
        balanced_L = figures(counts_L3C)[:, 1]
        return int(np.flatnonzero(balanced_L == balanced_L.max())[-1])


def _folds(unit_N: np.ndarray, bank_N: np.ndarray, seed: int) -> tuple[np.ndarray, int]:
    """The fold of each object, -1 where the bank has nothing of its unit; and how many folds there are."""
    units = np.unique(unit_N[bank_N])
    folds = min(FOLDS, len(units))
    fold_U = np.empty(len(units), np.int64)
    fold_U[rng.permutation(rng.key(seed, "linear probe folds"), len(units))] = np.arange(len(units)) % max(folds, 1)
    fold_N, shared_N = np.full(len(unit_N), -1), np.isin(unit_N, units)
    fold_N[shared_N] = fold_U[np.searchsorted(units, unit_N[shared_N])]
    return fold_N, folds


def _blocks(z_ND: np.ndarray) -> Iterator[np.ndarray]:
    """The rows in float64, some thousand at a time: all of them could be gigabytes."""
    for start in range(0, len(z_ND), ROWS):
        yield z_ND[start : start + ROWS].astype(np.float64)


def _solve(gram_DD: np.ndarray, penalty: float, cross_DC: np.ndarray) -> np.ndarray:
    """(G + penalty) W = X'Y by Cholesky: at D = 2,048 several of these cost less than one eigendecomposition."""
    a_DD = torch.from_numpy(gram_DD + penalty * np.eye(len(gram_DD)))
    w_DC: np.ndarray = torch.cholesky_solve(torch.from_numpy(cross_DC), torch.linalg.cholesky(a_DD)).numpy()
    return w_DC
