"""Sensor noise: photons are counted (variance grows with the light), and reading them out adds noise of its own.

Foi, Trimeche, Katkovnik, Egiazarian, "Practical Poissonian-Gaussian noise modeling and fitting for single-image
raw-data", IEEE TIP 2008, equation 2: variance = a x + b, with both parts taken as normal. It is meant for linear light;
a camera's gamma makes the noise of stored values more even, which more `read` and less `shot` stands for.

The normal deviates are a hash of (two words of the view, channel, pixel), in 32-bit integers: the same bits on every
device, and no state. Each is the sum of 8 bytes, which has a normal's variance, no skew, an excess kurtosis of -0.15,
and ends at 4.9 standard deviations.

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

WORD = 2**24
"""Words up to this are exact in float32."""
BYTE_MEAN, BYTE_VARIANCE = 127.5, (256**2 - 1) / 12

# Signed, as torch's int32 wants them; multiplication wraps, as in the unsigned arithmetic they are meant for.
GOLDEN = 0x9E3779B1 - 2**32
SPREAD = 0x85EBCA6B - 2**32
ROUNDS = ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32))
"""Shift and factor: Wellons's lowbias32 ("Prospecting for hash functions", 2018)."""


@dataclass(frozen=True)
class SensorNoise(Extra):
    """Adds sqrt(shot^2 x + read^2) times a normal deviate of the pixel and channel."""

    shot: float = 0.04
    """Standard deviation of the photons' noise where the picture is white, full scale being 1; drawn from 0 up to
    this."""
    read: float = 0.015
    """Standard deviation of the readout noise, which black has too; drawn from 0 up to this."""
    mono: bool = False
    """One deviate for all channels: a camera without colours."""

    draws: ClassVar[int] = 4
    columns: ClassVar[tuple[str, ...]] = ("word_0", "word_1", "shot", "read")
    place: ClassVar[Literal["specimen", "optics", "camera"]] = "camera"

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, "shot", 0, 1)
        within(self, "read", 0, 1)

    def parameters(self, u_NU: Floats, size_px: int) -> Floats:
        """Two words of 24 bits and two standard deviations."""
        return np.concatenate([np.floor(u_NU[:, :2] * WORD), u_NU[:, 2:] * (self.shot, self.read)], axis=1)

    def apply(self, x_NCSS: Tensor, row_NP: Tensor) -> Tensor:
        """Noise of its own on every pixel and channel."""
        _, channels, size, _ = x_NCSS.shape
        planes = 1 if self.mono else channels
        shape = (-1, planes, size, size)
        z_NCSS = deviates(row_NP[:, :2].to(torch.int32), planes * size * size).view(shape).to(x_NCSS.dtype)
        shot_N111, read_N111 = row_NP[:, 2:].square()[:, :, None, None, None].unbind(1)
        sigma_NCSS = (x_NCSS * shot_N111).add_(read_N111).sqrt_()
        return sigma_NCSS.mul_(z_NCSS).add_(x_NCSS).clamp_(0, 1)


def deviates(words_N2: Tensor, count: int) -> Tensor:
    """Int32 (N, 2), 0 to 2^24 - 1 each -> (N, count): nearly normal numbers, the same on every device.

    >>> sums = (deviates(torch.tensor([[1, 2]], dtype=torch.int32), 3) * math.sqrt(8 * BYTE_VARIANCE)).round() + 1020
    >>> sums.int().tolist()
    [[955, 775, 925]]
    """
    hash_NI = torch.arange(count, device=words_N2.device, dtype=torch.int32) * GOLDEN + words_N2[:, :1] * SPREAD
    spare_NI = torch.empty_like(hash_NI)
    for shift, factor in ROUNDS:
        _shift_xor(hash_NI, shift, spare_NI).mul_(factor)
    # The second word goes in between: views whose first words are near would else share a stretch of noise.
    hash_NI.bitwise_xor_(words_N2[:, 1:] * SPREAD)
    for shift, factor in ROUNDS:
        _shift_xor(hash_NI, shift, spare_NI).mul_(factor)
    pairs_NI = _pairs(_shift_xor(hash_NI, 16, spare_NI), spare_NI)
    # Four more bytes for one more round.
    _shift_xor(hash_NI, 15, spare_NI).mul_(GOLDEN)
    pairs_NI += _pairs(_shift_xor(hash_NI, 16, spare_NI), spare_NI)
    torch.bitwise_right_shift(pairs_NI, 16, out=spare_NI)
    sum_NI = pairs_NI.bitwise_and_(0xFFFF).add_(spare_NI)
    return sum_NI.float().sub_(8 * BYTE_MEAN).mul_(1 / math.sqrt(8 * BYTE_VARIANCE))


def _shift_xor(hash_NI: Tensor, shift: int, spare_NI: Tensor) -> Tensor:
    """Hash ^= hash >> shift, in place."""
    torch.bitwise_right_shift(hash_NI, shift, out=spare_NI)
    # The shift copies the sign; a hash wants zeros.
    return hash_NI.bitwise_xor_(spare_NI.bitwise_and_((1 << (32 - shift)) - 1))


def _pairs(hash_NI: Tensor, spare_NI: Tensor) -> Tensor:
    """Bytes 0 and 1 summed in the low half of each word, bytes 2 and 3 in the high one."""
    torch.bitwise_right_shift(hash_NI, 8, out=spare_NI)
    return (hash_NI & 0x00FF00FF).add_(spare_NI.bitwise_and_(0x00FF00FF))
