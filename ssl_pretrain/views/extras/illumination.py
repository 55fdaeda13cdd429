"""Illumination: a lamp that is not centred (a linear gradient) and lenses that pass less at the edge (a vignette).

Both are multiplicative, as flat-field correction assumes; a vignette falls with the square of the distance to first
order (Goldman and Chen, "Vignette and exposure calibration and compensation", ICCV 2005, whose polynomial in r^2 this
cuts after its first term). One centred elsewhere is, to that order, this one and a gradient.

Legend: N views, C = 3 channels, S side of a view, U draws, P parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.views.extras import Extra, Floats, within


@dataclass(frozen=True)
class Illumination(Extra):
    """(1 + a x + b y - |a| - |b|) (1 - v r^2), with x, y from -1 to 1 across the view and r = 1 in its corners.

    It only darkens: exposure is set by the brightest place, and an empty bright field must not be burnt out.
    """

    gradient: float = 0.25
    """Light lost from the brightest corner or side to the one across, at most; the loss is drawn from 0 up to this."""
    vignette: float = 0.25
    """Light lost in the corners, at most; the loss is drawn from 0 up to this."""

    draws: ClassVar[int] = 3
    columns: ClassVar[tuple[str, ...]] = ("slope_x", "slope_y", "vignette")
    place: ClassVar[Literal["specimen", "optics", "camera"]] = "specimen"

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, "gradient", 0, 1)
        within(self, "vignette", 0, 1)

    def parameters(self, u_NU: Floats, size_px: int) -> Floats:
        """The direction is any; |a| + |b| is half of the loss, whatever the direction."""
        angle_N, loss_N = 2 * math.pi * u_NU[:, 0], self.gradient * u_NU[:, 1]
        cos, sin = np.cos(angle_N), np.sin(angle_N)
        half_N = loss_N / 2 / (np.abs(cos) + np.abs(sin))
        return np.stack([half_N * cos, half_N * sin, self.vignette * u_NU[:, 2]], axis=1)

    def apply(self, x_NCSS: Tensor, row_NP: Tensor) -> Tensor:
        """One factor per pixel, for all channels, from terms of a row and of a column."""
        size = x_NCSS.shape[-1]
        at_S = (torch.arange(size, device=x_NCSS.device, dtype=x_NCSS.dtype) * 2 + 1) / size - 1
        a_N1, b_N1, fall_N1 = row_NP[:, :1], row_NP[:, 1:2], row_NP[:, 2:] * 0.5
        slope_NSS = (a_N1 * at_S)[:, None, :] + (b_N1 * at_S + (1 - a_N1.abs() - b_N1.abs()))[:, :, None]
        drop_NS = fall_N1 * at_S.square()
        light_NSS = slope_NSS.mul_((1 - drop_NS)[:, None, :] - drop_NS[:, :, None])
        return (x_NCSS * light_NSS[:, None]).clamp_(0, 1)
