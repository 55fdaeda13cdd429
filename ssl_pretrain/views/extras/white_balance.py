"""White balance: the colour of the lamp and its filters, and the gains by which a camera makes up for it, or does not.

Von Kries's model of a change of light: a gain per channel (von Kries, "Die Gesichtsempfindungen", 1905). A gain g of
linear light is a gain g^(1/2.2) of the stored values of most cameras, so it is a gain there too.

Legend: N views, C = 3 channels, S side of a view, U draws, P parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from ssl_pretrain.views.extras import Extra, Floats, between, within


@dataclass(frozen=True)
class WhiteBalance(Extra):
    """Red and blue get gains of their own; green, by which exposure is set, stays."""

    gain: float = 1.15
    """Each gain is drawn log-uniformly between 1 / gain and gain."""

    draws: ClassVar[int] = 2
    columns: ClassVar[tuple[str, ...]] = ("red", "green", "blue")
    place: ClassVar[Literal["specimen", "optics", "camera"]] = "optics"

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, "gain", 1, 4)

    def parameters(self, u_NU: Floats, size_px: int) -> Floats:
        """The three gains; green's is 1."""
        red_blue_N2 = np.exp(between((-math.log(self.gain), math.log(self.gain)), u_NU))
        return np.stack([red_blue_N2[:, 0], np.ones(len(u_NU)), red_blue_N2[:, 1]], axis=1)

    def apply(self, x_NCSS: Tensor, row_NP: Tensor) -> Tensor:
        """Multiplies, and saturates as a sensor does."""
        return (x_NCSS * row_NP[:, :, None, None]).clamp_(0, 1)
