"""What the spectrum of features says without labels: figures that papers propose for the choice of a checkpoint.

None is a promise: each is a curve to be read beside a labelled probe where there is one.

Legend: N features, I images, Q views of an image, D feature width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

FIRST, LAST = 4, 100
"""Ranks of the eigenvalues between which alpha-ReQ's line is fitted, as in the authors' code; the paper names none."""


def rankme(z_ND: Tensor) -> float:
    """The effective rank: exp of the entropy of the singular values, as shares (Garrido et al. 2023, equation 1).

    Singular values 3 and 1 are the shares 3/4 and 1/4: exp(0.5623) = 1.7548.

    >>> round(rankme(torch.tensor([[3.0, 0.0], [0.0, 1.0]])), 4)
    1.7548
    """
    return _effective(torch.linalg.svdvals(z_ND.double()))


def alpha_req(z_ND: Tensor, first: int = FIRST, last: int = LAST) -> float:
    """The slope alpha of the covariance's eigenvalues, lambda_i ~ i ** -alpha (Agrawal et al. 2022, section 3).

    Least squares of ln lambda_i on ln i, weighted by 1 / i, from the `first` eigenvalue to the `last`; 0 where fewer
    than two of them are above 0.
    The variances 1, 1/4 and 1/9 fall as 1 / i^2.

    >>> z = torch.cat([torch.diag(torch.tensor([1.0, 1 / 2, 1 / 3])), -torch.diag(torch.tensor([1.0, 1 / 2, 1 / 3]))])
    >>> round(alpha_req(z, first=1), 4)
    2.0
    """
    z_ND = z_ND.double()
    values = torch.linalg.svdvals(z_ND - z_ND.mean(0)).square()
    values = values[values > 1e-12 * values.max()][:last]
    rank = torch.arange(1, len(values) + 1, dtype=torch.float64)
    x, y = rank[first - 1 :].log(), values[first - 1 :].log()
    if len(x) < 2:
        return 0.0
    weight = 1 / rank[first - 1 :]
    x, y = x - (weight * x).sum() / weight.sum(), y - (weight * y).sum() / weight.sum()
    return -float((weight * x * y).sum() / (weight * x * x).sum())


def lidar(z_IQD: Tensor, delta: float = 1e-4) -> float:
    """The effective rank of what tells images apart, measured by what tells views apart (Thilak et al. 2023).

    Eigenvalues of S_w^-1/2 S_b S_w^-1/2: S_b the covariance of the images' means, S_w that of views about them, plus
    delta on its diagonal (equations 1 to 4). They are those of M S_w^-1 M' / I, which is small, M the centred means.

    Four images at right angles about 0, whose views agree: both directions count the same.

    >>> round(lidar(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]).unsqueeze(1).expand(4, 2, 2)), 4)
    2.0
    """
    z_IQD = z_IQD.double()
    mean_ID = z_IQD.mean(1)
    within_ND = (z_IQD - mean_ID.unsqueeze(1)).flatten(0, 1)
    within_DD = within_ND.T @ within_ND / len(within_ND) + delta * torch.eye(z_IQD.shape[-1], dtype=torch.float64)
    mean_ID = mean_ID - mean_ID.mean(0)
    factor_DD = torch.linalg.cholesky(within_DD)
    whitened_DI = torch.linalg.solve_triangular(factor_DD, mean_ID.T, upper=False)
    return _effective(torch.linalg.svdvals(whitened_DI).square())


def spread(z_ND: Tensor) -> float:
    """The standard deviation of L2-normalised features, mean over dimensions, by 1 / sqrt(D): 1 all over the sphere.

    Two at right angles: 1/2 in both dimensions, and 1 / sqrt(2) is what the sphere has.

    >>> round(spread(torch.tensor([[2.0, 0.0], [0.0, 5.0]])), 4)
    0.7071
    """
    z_ND = F.normalize(z_ND.double(), dim=1)
    return float(z_ND.std(0, correction=0).mean()) * math.sqrt(z_ND.shape[1])


def centred_rank(z_ND: Tensor) -> float:
    """RankMe of the L2-normalised features less their mean, which else hides all other directions; 0 if all are equal.

    Three at right angles span, about their mean, a plane, evenly.

    >>> round(centred_rank(torch.eye(3)), 4)
    2.0
    """
    z_ND = F.normalize(z_ND.double(), dim=1)
    return rankme(z_ND - z_ND.mean(0))


def _effective(values: Tensor) -> float:
    """exp of the entropy of the shares; 0 where there is nothing to share."""
    total = values.sum()
    if not (total > 1e-12 and total.isfinite()):
        return 0.0
    return math.exp(torch.special.entr(values / total).sum())
