"""Another normalisation of the input, moved into the first convolution, where that is exact.

A backbone is fed (x - mean) / std of RGB in 0..1. A consumer that feeds something else can be given first weights that
undo the difference. A scale per channel and another order of the channels are always exact. A shift is not where the
convolution pads with zeros: these then stand for another colour than in pretraining. In a ResNet that error starts at
the border, in a YOLO attention carries it everywhere (cosine 0.72 to 0.92 with the true maps): it is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_pretrain.backbones import InputSpec
from ssl_pretrain.errors import UsageError

EXACT = 1e-6
"""Largest shift, in standard deviations, that counts as none: consumers round 255 * mean."""


def fold(
    weight_OIHW: Tensor,
    bias_O: Tensor | None,
    padded: bool,
    *,
    of: InputSpec,
    to: InputSpec,
    high: float = 1.0,
    bgr: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """First weights and bias for a consumer that feeds `to` what the backbone got as `of`.

    padded   whether the convolution pads with zeros
    high     what white is in the consumer's images, 1 or 255; `to`'s mean and std are in these units, in RGB order
    bgr      whether the consumer's channels are blue, green, red

    Raises `UsageError` where it cannot be exact.

    The backbone was fed x / 0.5 and the consumer feeds u = 255 x: x / 0.5 is u / 127.5.

    >>> unit, halves = (InputSpec((0.0,) * 3, (std,) * 3, 64) for std in (1.0, 0.5))
    >>> weight, bias = fold(torch.ones(1, 3, 1, 1), None, True, of=halves, to=unit, high=255.0)
    >>> round(1 / weight[0, 0, 0, 0].item(), 4), bias
    (127.5, None)
    """
    mean_3, std_3, their_mean_3, their_std_3 = (
        torch.tensor(values, dtype=torch.float64) for values in (of.mean, of.std, to.mean, to.std)
    )
    scale_3 = their_std_3 / (high * std_3)
    shift_3 = (their_mean_3 / high - mean_3) / std_3
    shifted = bool((shift_3.abs() > EXACT).any())
    if shifted and padded:
        raise UsageError(
            f"the backbone was fed mean {_short(of.mean)} and its first convolution pads with zeros: it cannot be fed "
            f"mean {_short(to.mean)} exactly: pretrain it with backbone.normalize false (0..1, no mean), or let the "
            "consumer normalise"
        )
    bias = bias_O
    if shifted:
        moved_O = torch.einsum("oihw,i->o", weight_OIHW.double(), shift_3)
        bias = (moved_O if bias_O is None else bias_O.double() + moved_O).to(weight_OIHW.dtype)
    weight = (weight_OIHW.double() * scale_3.view(1, 3, 1, 1)).to(weight_OIHW.dtype)
    return weight.flip(1) if bgr else weight, bias


def _short(values: tuple[float, float, float]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"
