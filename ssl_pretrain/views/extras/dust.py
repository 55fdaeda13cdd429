"""Dust: a few dark soft specks on glass near the camera or the lamp, the same in every colour.

Far out of focus a speck is a ring rather than a spot: it shades most where the cone of light is cut at its rim. Not
after a paper; artefact simulations for microscopy draw the like. Profiles are polynomials of the squared distance, so
they cost no root and end smoothly at the radius.

Legend: N views, C = 3 channels, S side of a view, U draws, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.views.extras import Extra, Floats, between, within

MOST = 4
"""Specks that the parameters have room for."""


@dataclass(frozen=True)
class Dust(Extra):
    """Light times 1 - o (1 - t)^2, with t = (distance / radius)^2 below 1; for a ring times 1 - o 27/4 t (1 - t)^2."""

    most: int = 3
    """Number of specks, drawn from 1 to this."""
    radius: tuple[float, float] = (0.01, 0.05)
    """Share of the view's side, where the shade ends."""
    opacity: tuple[float, float] = (0.1, 0.4)
    """Share of the light that is lost where a speck is darkest."""
    rings: float = 0.3
    """Share of the specks that are rings."""

    draws: ClassVar[int] = 1 + 5 * MOST
    columns: ClassVar[tuple[str, ...]] = tuple(
        f"{name}_{k}" for k in range(MOST) for name in ("x", "y", "radius", "opacity", "ring")
    )
    place: ClassVar[Literal["specimen", "optics", "camera"]] = "specimen"

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, "most", 1, MOST)
        within(self, "radius", 0.001, 1)
        within(self, "opacity", 0, 1)
        within(self, "rings", 0, 1)

    def parameters(self, u_NU: Floats, size_px: int) -> Floats:
        """Of each speck x, y and radius as shares of the side, opacity (0: it is not there), and whether it rings."""
        count_N1 = 1 + np.floor(u_NU[:, :1] * self.most)
        x, y, radius, opacity, ring = np.moveaxis(u_NU[:, 1:].reshape(-1, MOST, 5), 2, 0)
        there = np.arange(MOST) < count_N1
        specks = (x, y, between(self.radius, radius), there * between(self.opacity, opacity), ring < self.rings)
        return np.asarray(np.stack(specks, axis=2).reshape(len(u_NU), -1), dtype=np.float64)

    def apply(self, x_NCSS: Tensor, row_NP: Tensor) -> Tensor:
        """The shades of all specks multiplied, then one product with the view."""
        count, _, size, _ = x_NCSS.shape
        at_S = (torch.arange(size, device=x_NCSS.device, dtype=x_NCSS.dtype) + 0.5) / size
        light_NSS = x_NCSS.new_ones(count, size, size)
        for k in range(MOST):
            x_N1, y_N1, radius_N1, opacity_N1, ring_N1 = row_NP[:, 5 * k : 5 * k + 5, None].unbind(1)
            across, down = ((at_S - x_N1) / radius_N1).square(), ((at_S - y_N1) / radius_N1).square()
            t_NSS = (across[:, None, :] + down[:, :, None]).clamp_(max=1)
            bell_NSS = (1 - t_NSS).square_()
            shape_NSS = t_NSS.mul_((6.75 * ring_N1)[..., None]).add_((1 - ring_N1)[..., None])
            light_NSS *= shape_NSS.mul_(bell_NSS).mul_(opacity_N1[..., None]).neg_().add_(1)
        return (x_NCSS * light_NSS[:, None]).clamp_(0, 1)
