"""Retrieval on labelled objects: does a ranking by similarity put the objects of the query's class first?

Average precision (Manning, Raghavan, Schütze, "Introduction to information retrieval", 2008, section 8.4) of each
query over all bank objects of other units. It asks more than k-NN: not only a query's nearest objects count, but every
object of its class.

Shapes: N objects, M of them in the bank, Q queries, B queries of a block, D width, C classes, U units.
"""

from __future__ import annotations

import numpy as np

from ssl_pretrain.errors import DataError
from ssl_pretrain.probe.objects import Objects
from ssl_pretrain.probe.statistics import Judged, Tally, ratio

CELLS = 4_000_000
"""Similarities at a time; a few arrays of 8 bytes each."""
STEP = 2.0**-26
"""Features are rounded to it, less than float32 rounds those of 0.5. Products are then multiples of 2^-52, and all sums
of them below 2 exact in float64: the same whatever the block, the library, or the order of summation."""
LAST = np.iinfo(np.int64).max - 1
"""Code of an object that is not ranked: behind all others, and even, so not relevant."""


def judge(objects: Objects, z_ND: np.ndarray, *, seed: int = 0) -> Judged:
    """Mean average precision: `map` over queries, `map_balanced` over the classes' means.

    Features (N, D) are of length 1. Queries whose class has no bank object in another unit do not count. Nothing is
    drawn, so `seed` makes no difference. `chance_map` and `chance_map_balanced` in the settings are what a random
    ranking expects. Raises `DataError` when no query has anything to find.
    """
    del seed
    query, label_N, classes = objects.query_N, objects.label_N, len(objects.classes)
    precision_Q, chance_Q = precisions(objects, z_ND)
    counted_Q = np.isfinite(precision_Q)
    if not counted_Q.any():
        raise DataError("retrieval: no query has an object of its class among the bank objects of other images")
    units, at_Q = np.unique(objects.unit_N[query], return_inverse=True)
    cell = (at_Q * classes + label_N[query])[counted_Q]
    shape = (len(units), classes)
    sums, chances, number = (
        np.bincount(cell, weights, minlength=len(units) * classes).reshape(shape)
        for weights in (precision_Q[counted_Q], chance_Q[counted_Q], np.ones(len(cell)))
    )
    chance_2 = means(np.concatenate([chances.sum(axis=0), number.sum(axis=0)])[None])[0]
    lost = int((~counted_Q).sum())
    return Judged(
        Tally(("map", "map_balanced"), np.concatenate([sums, number], axis=1), means, units),
        None,
        {
            "chance_map": float(chance_2[0]),
            "chance_map_balanced": float(chance_2[1]),
            "queries": len(cell),
        },
        (f"{lost} queries have no object of their class to find and do not count in retrieval",) if lost else (),
    )


def means(sums_RM: np.ndarray) -> np.ndarray:
    """Mean over queries, and over the classes' means, (R, 2), of sums of a quantity and numbers of queries by class.

    Two queries of class 0 with 0.5 in all, one of class 1 with 1: 1.5 / 3; (0.25 + 1) / 2. NaN without queries.

    >>> means(np.array([[0.5, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])).tolist()
    [[0.5, 0.625], [nan, nan]]
    """
    sum_RC, number_RC = np.split(sums_RM, 2, axis=1)
    classes_R = (number_RC > 0).sum(axis=1).astype(np.float64)
    mean_R = ratio(sum_RC.sum(axis=1), number_RC.sum(axis=1), empty=np.nan)
    return np.stack([mean_R, ratio(ratio(sum_RC, number_RC).sum(axis=1), classes_R, empty=np.nan)], axis=1)


def precisions(objects: Objects, z_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average precision of each query (Q), and what a random ranking expects; NaN where there is nothing to find."""
    bank, query = objects.train_N, objects.query_N
    grid_ND = np.rint(z_ND.astype(np.float64) / STEP) * STEP
    bank_DM, label_M, unit_M = grid_ND[bank].T, objects.label_N[bank], objects.unit_N[bank]
    z_QD, label_Q, unit_Q = grid_ND[query], objects.label_N[query], objects.unit_N[query]
    found, chance = np.full(len(z_QD), np.nan), np.full(len(z_QD), np.nan)
    block = max(1, CELLS // max(len(label_M), 1))
    for start in range(0, len(z_QD), block):
        now = slice(start, start + block)
        other_BM = unit_Q[now, None] != unit_M
        relevant_BM = (label_Q[now, None] == label_M) & other_BM
        found[now] = average_precision(z_QD[now] @ bank_DM, relevant_BM, other_BM)
        chance[now] = by_chance(other_BM.sum(axis=1), relevant_BM.sum(axis=1))
    return found, chance


def average_precision(similarity_BM: np.ndarray, relevant_BM: np.ndarray, ranked_BM: np.ndarray) -> np.ndarray:
    """Average precision (B) of objects ranked by falling similarity; objects not `ranked` take no part.

    Similarities are multiples of 2^-52 below 2 in size. Objects of equal similarity share the rank of the last of
    them, as scikit-learn's `average_precision_score` has it. NaN where nothing is relevant.

    By hand: relevant ones on ranks 1 and 3 have precisions 1 and 2/3, so 5/6. Were ranks 2 and 3 equal: the same.

    >>> yes = np.array([[True, False, True, False]])
    >>> average_precision(np.array([[0.875, 0.75, 0.5, 0.25]]), yes, np.ones_like(yes)).round(3).tolist()
    [0.833]
    """
    if similarity_BM.size == 0:
        return np.full(len(similarity_BM), np.nan)
    # Similarity and relevance in one integer: sorting whole numbers is many times faster than sorting by index.
    code_BM = np.where(ranked_BM, (similarity_BM * -(2.0**53)).astype(np.int64) + relevant_BM, LAST)
    code_BM.sort(axis=1)
    at = np.flatnonzero(code_BM & 1)
    row, rank, code = at // code_BM.shape[1], at % code_BM.shape[1] + 1, code_BM.ravel()[at]
    relevant_B = np.bincount(row, minlength=len(code_BM))
    hits = np.arange(1, len(at) + 1) - (np.cumsum(relevant_B) - relevant_B)[row]
    # Among equals the relevant ones come last, so the last of them has the rank of all.
    last = np.append((np.diff(code) != 0) | (np.diff(row) != 0), True)[: len(at)]
    row, rank, hits = row[last], rank[last], hits[last]
    before = np.where(np.diff(row, prepend=-1) != 0, 0, np.concatenate([[0], hits])[:-1])
    summed_B = np.bincount(row, (hits - before) * hits / rank, minlength=len(code_BM))
    return ratio(summed_B, relevant_B.astype(np.float64), empty=np.nan)


def by_chance(ranked_B: np.ndarray, relevant_B: np.ndarray) -> np.ndarray:
    """Average precision (B) expected of a random order of n objects, p of them relevant; NaN where none is.

    A relevant object on rank i sees i - 1 others, each relevant with probability (p - 1) / (n - 1), so the mean over
    ranks of (1 + (i - 1) (p - 1) / (n - 1)) / i. One of two: half the time 1, half the time 1/2.

    >>> by_chance(np.array([2]), np.array([1])).tolist()
    [0.75]
    """
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, int(ranked_B.max(initial=0)) + 1))])[ranked_B]
    others = (relevant_B - 1) / np.maximum(ranked_B - 1, 1) * (ranked_B - harmonic)
    return np.where(relevant_B > 0, (harmonic + others) / np.maximum(ranked_B, 1), np.nan)
