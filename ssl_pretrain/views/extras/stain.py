"""Stain: how dark and of what hue each dye is, which differs between laboratories and days.

Tellez, Balkenhol, Otte-Höller et al., "Whole-slide mitosis detection in H&E breast histology using PHH3 as a reference
to train distilled stain-invariant convolutional networks", IEEE TMI 2018 (section III-C: H, E and D channels scaled by
1 ± alpha, shifted by ± beta); "HED-light" (0.05) and "HED-strong" (0.2) of Tellez, Litjens, Bándi et al., Medical Image
Analysis 2019. The dyes are told apart by Ruifrok and Johnston, "Quantification of histochemical staining by color
deconvolution", 2001: by Beer and Lambert's law the optical density of a pixel is the sum of its dyes' densities.

Legend: N views, C = 3 channels, S side of a view, U draws, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.views.extras import Extra, Floats, within

DYES = {
    "hed": ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78)),
    "giemsa": ((0.834750233, 0.513556283, 0.196330403), (0.092789, 0.954111, 0.283111), None),
}
"""Share of a dye's optical density in red, green and blue: Ruifrok and Johnston's haematoxylin, eosin and DAB; and
methylene blue and eosin as in ImageJ's Colour Deconvolution (Landini), with what is at right angles to both."""

DARKEST = 1 / 256
"""Light that a black pixel still stands for: below it 8 bits tell no densities apart."""


@dataclass(frozen=True)
class Stain(Extra):
    """The density of each dye is scaled and shifted: od' = od D^-1 diag(a) D + b D, one 3x3 matrix and one vector."""

    alpha: float = 0.2
    """Each dye's density is multiplied by a number between 1 - alpha and 1 + alpha; 0.05 is "light", 0.2 "strong"."""
    beta: float = 0.03
    """And by up to this much, in natural logarithms, more or less of it is everywhere: 0.05 is 5 % of the light."""
    dyes: Literal["hed", "giemsa"] = "hed"
    """Which dyes: haematoxylin, eosin and DAB (tissue), or methylene blue and eosin (blood smears)."""

    draws: ClassVar[int] = 6
    columns: ClassVar[tuple[str, ...]] = (
        *(f"{of}_to_{to}" for to in ("red", "green", "blue") for of in ("red", "green", "blue")),
        *("shift_red", "shift_green", "shift_blue"),
    )
    place: ClassVar[Literal["specimen", "optics", "camera"]] = "specimen"

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, "alpha", 0, 1)
        within(self, "beta", 0, 1)

    def parameters(self, u_NU: Floats, size_px: int) -> Floats:
        """The matrix that acts on optical densities, row by row, and what is added to them."""
        dyes_33 = _dyes(self.dyes)
        scale_N3 = 1 + self.alpha * (2 * u_NU[:, :3] - 1)
        shift_N3 = self.beta * (2 * u_NU[:, 3:] - 1)
        mix_N33 = np.linalg.inv(dyes_33) * scale_N3[:, None, :] @ dyes_33
        return np.concatenate([mix_N33.transpose(0, 2, 1).reshape(-1, 9), shift_N3 @ dyes_33], axis=1)

    def apply(self, x_NCSS: Tensor, row_NP: Tensor) -> Tensor:
        """Logarithm, matrix, exponential; white has density 0."""
        red, green, blue = ((x_NCSS + DARKEST) / (1 + DARKEST)).log_().unbind(1)
        mix_NP11 = row_NP[:, :, None, None]
        out_NCSS = torch.empty_like(x_NCSS, memory_format=torch.contiguous_format)
        for c in range(3):
            # These are minus densities, so the shift is taken away. Sums written out: a matrix product's order of
            # addition may change with N.
            y_NSS = red * mix_NP11[:, 3 * c]
            y_NSS.addcmul_(green, mix_NP11[:, 3 * c + 1]).addcmul_(blue, mix_NP11[:, 3 * c + 2])
            torch.sub(y_NSS, mix_NP11[:, 9 + c], out=out_NCSS[:, c])
        return out_NCSS.exp_().mul_(1 + DARKEST).sub_(DARKEST).clamp_(0, 1)


def _dyes(name: str) -> Floats:
    """(3, 3): one dye per row, of length 1."""
    first, second, third = DYES[name]
    rows = np.array([first, second, np.cross(first, second) if third is None else third], dtype=np.float64)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))
