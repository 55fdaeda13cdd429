"""The engine to read: a plan carried out with Kornia's own functional ops, one view and one op at a time.

The order of the ops is part of the contract with `fused`: crop and antialiased resize, horizontal flip, vertical flip,
right-angle turn, blur, colour jitter (four ops in the view's own order, each clamped to [0, 1]), grayscale, solarize,
normalise.

Legend: V views of a spec, B images, C = 3 channels, S the side of the view in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from kornia.color import rgb_to_grayscale
from kornia.enhance import (
    adjust_brightness_accumulative,
    adjust_contrast_with_mean_subtraction,
    adjust_hue,
    adjust_saturation_with_gray_subtraction,
    normalize,
    solarize,
)
from kornia.filters import gaussian_blur2d
from torch import Tensor

from ssl_pretrain.views import ViewSpec
from ssl_pretrain.views.plan import COLOUR_OPS, INDEX, Plan, blur_kernel_px

Row = npt.NDArray[np.float32]
"""(C,): the parameters of one view, in the order of `plan.COLUMNS`."""


def render(
    plan: Plan,
    images: Sequence[Tensor],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Uint8 images (H_i, W_i, 3), one for each of the plan's -> spec name -> (V, B, 3, S, S), normalised."""
    on = images[0].device if device is None else torch.device(device)
    mean_C, std_C = torch.tensor(mean, device=on), torch.tensor(std, device=on)
    views: dict[str, Tensor] = {}
    for i, spec in enumerate(plan.specs):
        rows_BVC = plan.of(i)
        views[spec.name] = torch.stack(
            [
                torch.cat(
                    [
                        normalize(view(spec, row, image.to(on)), mean_C, std_C).to(dtype)
                        for row, image in zip(rows_BVC[:, v], images, strict=True)
                    ]
                )
                for v in range(spec.count)
            ]
        )
    return views


def view(spec: ViewSpec, row: Row, image_HWC: Tensor) -> Tensor:
    """One view (1, 3, S, S) in [0, 1], before it is normalised, of a uint8 image."""
    x_1CSS = colour(spec, row, geometry(spec, row, image_HWC))
    if row[INDEX["gray"]]:
        x_1CSS = rgb_to_grayscale(x_1CSS).expand_as(x_1CSS)
    if row[INDEX["solarize"]]:
        x_1CSS = solarize(x_1CSS, spec.solarize_threshold)
    return x_1CSS


def geometry(spec: ViewSpec, row: Row, image_HWC: Tensor) -> Tensor:
    """Crop, resize, flips, turn and blur: (1, 3, S, S) in [0, 1]."""
    top, left, height, width = (int(row[INDEX[name]]) for name in ("top", "left", "height", "width"))
    crop_HWC = image_HWC[top : top + height, left : left + width].float() / 255
    size = (spec.size_px, spec.size_px)
    x_1CSS = F.interpolate(
        crop_HWC.permute(2, 0, 1)[None], size, mode="bilinear", align_corners=False, antialias=True
    ).contiguous()
    if row[INDEX["hflip"]]:
        x_1CSS = x_1CSS.flip(-1)
    if row[INDEX["vflip"]]:
        x_1CSS = x_1CSS.flip(-2)
    x_1CSS = torch.rot90(x_1CSS, int(row[INDEX["turn"]]), (-2, -1))
    if row[INDEX["blur"]]:
        sigma = float(row[INDEX["sigma"]])
        x_1CSS = gaussian_blur2d(x_1CSS, blur_kernel_px(spec), (sigma, sigma), border_type="reflect")
    return x_1CSS


def colour(spec: ViewSpec, row: Row, x_1CSS: Tensor) -> Tensor:
    """ColorJitter of one view: each op that the spec asks for, in the view's own order."""
    if not row[INDEX["jitter"]]:
        return x_1CSS
    strength = {
        "brightness": spec.brightness,
        "contrast": spec.contrast,
        "saturation": spec.saturation,
        "hue": spec.hue,
    }
    for slot in range(4):
        op = COLOUR_OPS[int(row[INDEX[f"order_{slot}"]])]
        amount = float(row[INDEX[op]])
        if strength[op] == 0:
            continue
        if op == "brightness":
            x_1CSS = adjust_brightness_accumulative(x_1CSS, amount)
        elif op == "contrast":
            x_1CSS = adjust_contrast_with_mean_subtraction(x_1CSS, amount)
        elif op == "saturation":
            x_1CSS = adjust_saturation_with_gray_subtraction(x_1CSS, amount)
        else:
            x_1CSS = adjust_hue(x_1CSS, 2 * math.pi * amount)
    return x_1CSS
