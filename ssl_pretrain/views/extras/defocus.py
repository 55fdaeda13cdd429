"""Defocus: out of focus a point becomes a disc, which keeps edges that a Gaussian blur of the same width would lose.

Geometrical optics: the lens's round aperture seen from behind the focal plane; the kernel of Hendrycks and Dietterich's
"defocus blur" (ImageNet-C, ICLR 2019), here with the share of each pixel that the disc covers, so a radius between
whole numbers lies between.

Legend: N views, C = 3 channels, S side of a view, U draws, P parameters, K side of the kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pretrain.views.extras import Extra, Floats, between, within

FINE = 8
"""Points per pixel and axis at which the disc is looked at."""


@dataclass(frozen=True)
class Defocus(Extra):
    """The view is averaged over a disc; beyond its border lies its mirror image."""

    radius_px: tuple[float, float] = (0.5, 2.5)
    """Radius of the disc, drawn between these, in pixels of the view. Up to 0.5 it lies within one pixel: no blur."""

    draws: ClassVar[int] = 1
    columns: ClassVar[tuple[str, ...]] = ("radius",)
    place: ClassVar[Literal["specimen", "optics", "camera"]] = "optics"

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, "radius_px", 0, 32)

    def parameters(self, u_NU: Floats, size_px: int) -> Floats:
        """The radius; half a pixel, which blurs nothing, where it is less."""
        return np.maximum(between(self.radius_px, u_NU), 0.5)

    def apply(self, x_NCSS: Tensor, row_NP: Tensor) -> Tensor:
        """One kernel per view, the same for its channels."""
        count, channels, size = x_NCSS.shape[:3]
        reach = max(0, math.ceil(self.radius_px[1] - 0.5))
        kernel_NKK = discs(row_NP[:, 0], reach)
        inside_NCSS = _mirrored(x_NCSS, reach)
        wide = size + 2 * reach
        # Every channel of every view is a group, so that each meets its own kernel.
        weight_GKK = kernel_NKK.repeat_interleave(channels, 0)[:, None]
        out_1GSS = F.conv2d(inside_NCSS.reshape(1, count * channels, wide, wide), weight_GKK, groups=count * channels)
        return out_1GSS.view(x_NCSS.shape).clamp_(0, 1)


def discs(radius_N: Tensor, reach: int) -> Tensor:
    """(N, K, K), K = 2 reach + 1: the share of each pixel that a disc about the middle one covers; the sum is 1.

    A disc of radius 1/2 lies within one pixel.

    >>> discs(torch.tensor([0.5]), 1)[0].tolist()
    [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    side = 2 * reach + 1
    at = (torch.arange(side * FINE, device=radius_N.device, dtype=radius_N.dtype) + 0.5) / FINE - side / 2
    distance = (at.square()[:, None] + at.square()).sqrt()
    # A point counts in full half a step inside the rim, not at all half a step outside: smooth in the radius.
    covered = ((radius_N[:, None, None] - distance) * FINE + 0.5).clamp_(0, 1)
    share_NKK = F.avg_pool2d(covered[:, None], FINE)[:, 0]
    return share_NKK / share_NKK.sum((1, 2), keepdim=True)


def _mirrored(x_NCSS: Tensor, reach: int) -> Tensor:
    """Continued by its mirror image on all sides, again and again where the view is smaller than that."""
    size = x_NCSS.shape[-1]
    if reach < size:
        return F.pad(x_NCSS, (reach,) * 4, mode="reflect")
    period = max(1, 2 * (size - 1))
    at = torch.arange(-reach, size + reach, device=x_NCSS.device) % period
    at = torch.minimum(at, period - at) if size > 1 else at
    return x_NCSS.index_select(2, at).index_select(3, at)
