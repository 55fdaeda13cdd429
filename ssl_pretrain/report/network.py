"""Whole fields through a backbone that may be in the middle of a training.

Shapes: H W pixels of a field, h w of it as the network is given it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_pretrain.backbones import Backbone, InputSpec
from ssl_pretrain.data.pack import Pack
from ssl_pretrain.probe.features import device_of

LONG_SIDE_PX = 448
"""Of a field as the network is given it: 28 x 21 patches of 16 px, 56 x 42 places of P3."""


def fields(pack: Pack, count: int) -> list[NDArray[np.uint8]]:
    """So many images (H, W, 3), evenly spaced in the order of content, so that other file names change nothing."""
    some = np.unique(np.linspace(0, len(pack) - 1, min(count, len(pack))).round().astype(int))
    return [pack.image(int(place)) for place in pack.by_content_N[some]]


def fit(height: int, width: int, multiple: int, long_side_px: int = LONG_SIDE_PX) -> tuple[int, int]:
    """Height and width with the long side at most `long_side_px` and both multiples of what the network needs.

    480 x 640 becomes 336 x 448, which strides of 32 take to 320 x 448 (336 / 32 is 10.5, and ties go to even).

    >>> fit(480, 640, 16), fit(480, 640, 32), fit(9, 900, 32)
    ((336, 448), (320, 448), (32, 448))
    """
    ratio = long_side_px / max(height, width)
    h, w = (max(multiple, round(side * ratio / multiple) * multiple) for side in (height, width))
    return h, w


def given(field_HWC: NDArray[np.uint8], spec: InputSpec, multiple: int) -> Tensor:
    """A field (H, W, 3) as the network is given it: normalised float32 (1, 3, h, w)."""
    x_1CHW = torch.from_numpy(field_HWC.copy()).permute(2, 0, 1)[None].float() / 255
    size = fit(field_HWC.shape[0], field_HWC.shape[1], multiple)
    x_1Chw = torch.nn.functional.interpolate(x_1CHW, size, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    return (x_1Chw - mean) / std


@contextmanager
def still(backbone: Backbone) -> Iterator[tuple[torch.device, torch.dtype]]:
    """Evaluation mode, no gradients and full precision; afterwards every module is in the mode it was in.

    Gives where its inputs should be, and of what type.
    """
    training = [module for module in backbone.modules() if module.training]
    backbone.eval()
    there = device_of(backbone)
    dtype = next((parameter.dtype for parameter in backbone.parameters()), torch.float32)
    try:
        with torch.no_grad(), torch.autocast(there.type, enabled=False):
            yield there, dtype
    finally:
        for module in training:
            module.training = True
