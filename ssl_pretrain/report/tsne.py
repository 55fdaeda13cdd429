"""Exact t-SNE for a thousand points (van der Maaten and Hinton, "Visualizing Data using t-SNE", JMLR 9, 2008).

Deterministic: it starts from the first two principal components, which also keeps more of the global layout than a
random start (Kobak and Berens, "The art of using t-SNE for single-cell transcriptomics", 2019).

Shapes: N points, D width.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

PERPLEXITY = 30.0
STEPS, EXAGGERATED = 500, 125
"""Steps of the descent, and the first of them in which the attraction is exaggerated."""
EXAGGERATION = 12.0
LEAST = 1e-12
"""Of a probability, so that its logarithm is finite."""


def tsne(z_ND: NDArray[np.floating], perplexity: float = PERPLEXITY, steps: int = STEPS) -> NDArray[np.float64]:
    """Places (N, 2) in which points that are near in (N, D) are near.

    Gradient descent with momentum and gains (section 3.4) on the divergence; rates as scikit-learn's. The perplexity
    is at most a third of the other points. Points that are all the same stay on one spot. Quadratic in N, in memory
    and in time: for about 1,500 points and fewer.
    """
    p_NN = joint(squared_distances(principal(z_ND, 50)), min(perplexity, (len(z_ND) - 1) / 3))
    y_N2 = principal(z_ND, 2)
    y_N2 = 1e-4 * y_N2 / max(float(y_N2[:, 0].std()), LEAST)
    rate, moved, gain = max(len(y_N2) / EXAGGERATION / 4, 50.0), np.zeros_like(y_N2), np.ones_like(y_N2)
    for step in range(steps):
        early = step < EXAGGERATED
        t_NN = 1 / (1 + squared_distances(y_N2))
        np.fill_diagonal(t_NN, 0)
        pull_NN = ((EXAGGERATION if early else 1.0) * p_NN - t_NN / t_NN.sum()) * t_NN
        slope_N2 = 4 * (pull_NN.sum(1, keepdims=True) * y_N2 - pull_NN @ y_N2)  # equation 5
        gain = np.where(slope_N2 * moved > 0, 0.8 * gain, gain + 0.2).clip(0.01)
        moved = (0.5 if early else 0.8) * moved - rate * gain * slope_N2
        y_N2 = y_N2 + moved
    return y_N2


def divergence(p_NN: NDArray[np.floating], y_N2: NDArray[np.floating]) -> float:
    """KL(P || Q) of places, Q with Student's t of one degree of freedom (equations 2 and 4).

    Of three points at the corners of an equilateral triangle all pairs are the same in P and Q.

    >>> places = np.array([[0, 0], [2, 0], [1, 3**0.5]])
    >>> round(divergence((1 - np.eye(3)) / 6, places), 9) + 0.0
    0.0
    """
    t_NN = 1 / (1 + squared_distances(y_N2))
    np.fill_diagonal(t_NN, 0)
    q_NN = np.maximum(t_NN / t_NN.sum(), LEAST)
    others = ~np.eye(len(q_NN), dtype=bool)
    p_M = np.maximum(p_NN[others], LEAST)
    return float((p_M * np.log(p_M / q_NN[others])).sum())


def joint(distance_NN: NDArray[np.floating], perplexity: float) -> NDArray[np.float64]:
    """Symmetric probabilities (N, N) that sum to 1, from squared distances (equation 1, and p_ij of section 3.1).

    Each point's width is the one at which the distribution over the others has the perplexity: bisection on its
    precision, for all points at once. Of three points that are equally far apart, each pair has 1/6.

    >>> joint(np.ones((3, 3)) - np.eye(3), 1.5).round(3)[0].tolist()
    [0.0, 0.167, 0.167]
    """
    count, aim = len(distance_NN), math.log(perplexity)
    # To the nearest other: the same shares, and no underflow.
    gap_NN = np.asarray(distance_NN, np.float64) + np.diag(np.full(count, np.inf))
    gap_NN = gap_NN - gap_NN.min(1, keepdims=True)
    others_NN = np.where(np.isfinite(gap_NN), gap_NN, 0.0)
    typical = float(others_NN.mean()) or 1.0
    low, high = np.full(count, 1e-6 / typical), np.full(count, 1e6 / typical)
    for _ in range(60):
        precision_N = np.sqrt(low * high)
        share_NN = np.exp(-precision_N[:, None] * gap_NN)
        share_NN /= share_NN.sum(1, keepdims=True)
        # -sum p ln p, by ln p = -precision gap - ln(sum): the largest share has gap 0, so its own gives the sum.
        entropy_N = precision_N * (share_NN * others_NN).sum(1) - np.log(share_NN.max(1))
        wide_N = entropy_N > aim
        low, high = np.where(wide_N, precision_N, low), np.where(wide_N, high, precision_N)
    return np.asarray(np.maximum((share_NN + share_NN.T) / (2 * count), 0.0), np.float64)


def principal(z_ND: NDArray[np.floating], count: int) -> NDArray[np.float64]:
    """The first principal components (N, count) of the centred points, fewer where there are fewer; two at least.

    The largest weight of each is positive, as its sign is free.

    >>> principal(np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]]), 2)[[0, 2]].tolist()
    [[3.0, 0.0], [0.0, 1.0]]
    """
    z_ND = np.asarray(z_ND, np.float64)
    left_NK, values_K, right_KD = np.linalg.svd(z_ND - z_ND.mean(0), full_matrices=False)
    largest_K = np.take_along_axis(right_KD, np.abs(right_KD).argmax(1)[:, None], 1)[:, 0]
    found = (left_NK * values_K * np.where(largest_K < 0, -1.0, 1.0))[:, :count] + 0.0
    return np.pad(found, ((0, 0), (0, max(0, 2 - found.shape[1]))))


def squared_distances(x_ND: NDArray[np.floating]) -> NDArray[np.float64]:
    """Between all points (N, N).

    >>> squared_distances(np.array([[0, 0], [3, 4]])).tolist()
    [[0.0, 25.0], [25.0, 0.0]]
    """
    x_ND = np.asarray(x_ND, np.float64)
    norm_N = (x_ND**2).sum(1)
    found = np.maximum(norm_N[:, None] + norm_N[None] - 2 * x_ND @ x_ND.T, 0.0)
    np.fill_diagonal(found, 0.0)
    return np.asarray(found, np.float64)
