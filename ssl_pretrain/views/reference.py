"""The engine to read: a plan carried out with Kornia's own functional ops, one view and one op at a time.

The order of the ops is part of the contract with the other engines: crop and antialiased resize, horizontal flip,
vertical flip, right-angle turn, rotation; then the spec's chain: blur, colour jitter (four ops in the view's own order,
each clamped to [0, 1]), grayscale, solarize and extra ops; normalise.

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
from kornia.geometry.transform import rotate
from torch import Tensor

from ssl_pretrain.views import ViewSpec
from ssl_pretrain.views.colour import yiq_turn
from ssl_pretrain.views.plan import COLOUR_OPS, INDEX, Plan, blur_kernel_px, canvas_px, extra_columns

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
    x_1CSS = geometry(spec, row, image_HWC)
    extras = iter(range(len(spec.extras)))
    for op in spec.chain:
        if not isinstance(op, str):
            columns = row[extra_columns(spec, next(extras))]
            if columns[0]:
                x_1CSS = op.apply(x_1CSS.clone(), torch.from_numpy(columns[None, 1:]).to(x_1CSS.device))
        elif op == "blur" and row[INDEX["blur"]]:
            sigma = float(row[INDEX["sigma"]])
            x_1CSS = gaussian_blur2d(x_1CSS, blur_kernel_px(spec), (sigma, sigma), border_type="reflect")
        elif op == "jitter":
            x_1CSS = colour(spec, row, x_1CSS)
        elif op == "gray" and row[INDEX["gray"]]:
            x_1CSS = rgb_to_grayscale(x_1CSS).expand_as(x_1CSS)
        elif op == "solarize" and row[INDEX["solarize"]]:
            x_1CSS = solarize(x_1CSS, spec.solarize_threshold)
    return x_1CSS


def geometry(spec: ViewSpec, row: Row, image_HWC: Tensor) -> Tensor:
    """Crop, resize, flips, turn and rotation: (1, 3, S, S) in [0, 1]."""
    top, left, height, width = (int(row[INDEX[name]]) for name in ("top", "left", "height", "width"))
    angle = float(row[INDEX["angle"]])
    if angle:
        x_1CSS = canvas(spec, row, image_HWC)
    else:
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
    if angle:
        x_1CSS = rotate(x_1CSS, torch.tensor([math.degrees(angle)], device=x_1CSS.device), align_corners=True)
        margin = (x_1CSS.shape[-1] - spec.size_px) // 2
        x_1CSS = x_1CSS[..., margin : margin + spec.size_px, margin : margin + spec.size_px].contiguous()
    return x_1CSS


def canvas(spec: ViewSpec, row: Row, image_HWC: Tensor) -> Tensor:
    """What a rotation turns: the crop and so much around it that no corner stays empty; (1, 3, T, T) at its scale.

    Antialiased by the definition: each pixel is the mean of the source under a triangle of two output pixels (two
    source pixels, if wider) on either axis. Beyond the image stands its mirror image, without its edge pixels twice.
    """
    top, left, height, width = (float(row[INDEX[name]]) for name in ("top", "left", "height", "width"))
    weights = []
    for start, length, limit in ((top, height, image_HWC.shape[0]), (left, width, image_HWC.shape[1])):
        scale, side = length / spec.size_px, canvas_px(spec)
        centre_T1 = start + length / 2 + (torch.arange(side, dtype=torch.float64)[:, None] + 0.5 - side / 2) * scale
        pixel_U = torch.arange(int(centre_T1[0] - 2 * max(scale, 1)) - 1, int(centre_T1[-1] + 2 * max(scale, 1)) + 2)
        weight_TU = (1 - (pixel_U + 0.5 - centre_T1).abs() / max(scale, 1)).clamp(min=0)
        weight_TU /= weight_TU.sum(1, keepdim=True)
        mirrored_U = (pixel_U % max(2 * limit - 2, 1)).clamp(max=2 * limit - 2)
        mirrored_U = torch.where(mirrored_U < limit, mirrored_U, 2 * limit - 2 - mirrored_U)
        weights.append(torch.zeros(side, limit, dtype=torch.float64).index_add_(1, mirrored_U, weight_TU))
    y_TH, x_TW = (w.to(image_HWC.device) for w in weights)
    x_CHW = image_HWC.permute(2, 0, 1).double() / 255
    return (y_TH @ x_CHW @ x_TW.T)[None].float()


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
        elif spec.hue_space == "yiq":
            x_1CSS = (torch.einsum("dc,bcij->bdij", torch.from_numpy(yiq_turn(amount)).to(x_1CSS), x_1CSS)).clamp(0, 1)
        else:
            x_1CSS = adjust_hue(x_1CSS, 2 * math.pi * amount)
    return x_1CSS
