"""The fast engine: a plan carried out with the algebra of its ops; the views of `reference` to rounding.

Geometry. Crop, antialiased resize, flips and turns are sums of weighted rows along one axis, then along the other,
with few weights each: `embedding_bag`. Flips reverse the order of the sums, a turn swaps the two axes; both are free.
Blur is two more such sums.

Colour. With g the gray of a pixel and m the mean gray of the view, brightness, contrast, saturation and grayscale are
all of the form `a x + u g + v m`, and so is any chain of them, as the gray of that is `(a + u) g + v m` and its mean
`(a + u + v) m`. An op with a factor of at most 1 keeps values within [0, 1]; so a chain is broken only at hue, which
is not linear, and after a factor above 1, where clamping can matter. Such a piece is a *stage*: hue, then the three
numbers, then a clamp. They are computed before the image is touched.

On a CPU each view is made alone, start to end, in the processor's cache, so its bits do not depend on the batch.

Legend: V views of a spec, B images, N = V * B, C = 3 channels, S side of a view, h w crop, T taps, K stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pretrain.views import ViewSpec
from ssl_pretrain.views.plan import COLOUR_OPS, INDEX, Plan, blur_kernel_px

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

GRAY_C = (0.299, 0.587, 0.114)
"""ITU-R BT.601, Kornia's and Pillow's (torchvision rounds the first to 0.2989). They sum to 1: white stays white."""
MAX_STAGES = 5
"""Four colour ops and grayscale, if each had a stage of its own."""


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
    if len(images) != len(plan.buffer):
        raise ValueError(f"the plan is for {len(plan.buffer)} images, not {len(images)}")
    images = [image.to(on, non_blocking=True) for image in images]
    # x / std - mean / std, shaped for (N, 3, S, S)
    scale_C11 = 1 / torch.tensor(std, dtype=torch.float64).view(3, 1, 1)
    shift_C11 = -torch.tensor(mean, dtype=torch.float64).view(3, 1, 1) * scale_C11
    affine = scale_C11.float().to(on, non_blocking=True), shift_C11.float().to(on, non_blocking=True)
    with torch.no_grad():
        return {spec.name: _render_spec(spec, plan.of(i), images, affine, dtype) for i, spec in enumerate(plan.specs)}


def _render_spec(
    spec: ViewSpec, rows_BVC: Floats, images: Sequence[Tensor], affine: tuple[Tensor, Tensor], dtype: torch.dtype
) -> Tensor:
    """(V, B, 3, S, S): all views of one spec."""
    device, size_px = affine[0].device, spec.size_px
    rows_NC = rows_BVC.transpose(1, 0, 2).reshape(-1, rows_BVC.shape[-1])
    images_N = list(images) * spec.count
    stages = colour_stages(spec, rows_NC)
    solarized_N = rows_NC[:, INDEX["solarize"]] > 0
    threshold_N = torch.full((len(rows_NC),), spec.solarize_threshold, device=device)
    out_NCSS = torch.empty((len(rows_NC), 3, size_px, size_px), dtype=dtype, device=device)
    at_once = 1 if device.type == "cpu" else len(rows_NC)
    for start in range(0, len(rows_NC), at_once):
        some = slice(start, start + at_once)
        views = [geometry(spec, row, image) for row, image in zip(rows_NC[some], images_N[some], strict=True)]
        x_NCSS = stages.apply(torch.stack(views), some)
        x_NCSS = _where(solarized_N[some], x_NCSS, solarize, threshold_N[some])
        out_NCSS[some] = x_NCSS.mul_(affine[0]).add_(affine[1])
    return out_NCSS.view(spec.count, len(images), 3, size_px, size_px)


# Geometry


def geometry(spec: ViewSpec, row: Floats, image_HWC: Tensor) -> Tensor:
    """Crop, antialiased resize, flips, turn and blur of one view: (3, S, S) in [0, 1], row: its column values (C,)."""
    top, left, height, width, hflip, vflip, turn = (int(value) for value in row[:7])
    crop_hwC = image_HWC[top : top + height, left : left + width].to(torch.float32)
    # Turns as torch.rot90's: of the axes before they are swapped, one quarter mirrors x, two mirror both, three y.
    y_taps = resize_taps(height, spec.size_px, bool(vflip) != (turn in (2, 3)))
    x_taps = resize_taps(width, spec.size_px, bool(hflip) != (turn in (1, 2)))
    y_taps.weight_ST.mul_(1 / 255)  # here it costs nothing
    x_ywC = _sums(y_taps, crop_hwC)
    x_xCy = _sums(x_taps, x_ywC.permute(1, 2, 0))
    if row[INDEX["blur"]]:
        taps = blur_taps(spec.size_px, blur_kernel_px(spec), float(row[INDEX["sigma"]]))
        x_yCx = _sums(taps, _sums(taps, x_xCy).permute(2, 1, 0))
        x_xCy = x_yCx.permute(2, 1, 0)
    return x_xCy.permute(1, 0, 2) if turn % 2 else x_xCy.permute(1, 2, 0)


@dataclass(frozen=True)
class Taps:
    """Output i of S is the sum of `weight_ST[i] * input[index_ST[i]]`."""

    index_ST: Tensor
    weight_ST: Tensor


def resize_taps(length: int, size_px: int, mirrored: bool) -> Taps:
    """Bilinear with antialias, as `F.interpolate`: a triangle over two output pixels, or two input ones if wider."""
    scale = length / size_px
    support = max(scale, 1.0)
    centre_S1 = (np.arange(size_px)[:, None] + 0.5) * scale
    if mirrored:
        centre_S1 = centre_S1[::-1]
    # Input pixel t, whose middle is t + 0.5, counts if it is nearer than `support`: at most ceil(2 * support) do.
    index_ST = np.floor(centre_S1 - support + 0.5).astype(np.int32) + np.arange(math.ceil(2 * support), dtype=np.int32)
    weight_ST = np.maximum(0.0, 1.0 - np.abs(index_ST + (0.5 - centre_S1)) / support)
    inside_ST = index_ST.clip(0, length - 1)
    weight_ST *= inside_ST == index_ST
    weight_ST /= weight_ST.sum(axis=1, keepdims=True)
    return Taps(torch.from_numpy(inside_ST), torch.from_numpy(weight_ST.astype(np.float32)))


def blur_taps(size_px: int, kernel_px: int, sigma: float) -> Taps:
    """A Gaussian of `kernel_px` weights that sum to 1; the border is reflected, without repeating the edge pixel."""
    offset_T = np.arange(kernel_px, dtype=np.int32) - kernel_px // 2
    weight_T = np.exp(-0.5 * (offset_T / sigma) ** 2)
    weight_T /= weight_T.sum()
    index_ST = np.abs(np.arange(size_px, dtype=np.int32)[:, None] + offset_T)
    index_ST = size_px - 1 - np.abs(size_px - 1 - index_ST)
    weight_ST = np.tile(weight_T.astype(np.float32), (size_px, 1))
    return Taps(torch.from_numpy(index_ST), torch.from_numpy(weight_ST))


def _sums(taps: Taps, x: Tensor) -> Tensor:
    """Weighted sums over the first axis of x (h, p, q) -> (S, p, q)."""
    rows = x.reshape(x.shape[0], -1)
    index_ST = taps.index_ST.to(x.device, non_blocking=True)
    weight_ST = taps.weight_ST.to(x.device, non_blocking=True)
    return F.embedding_bag(index_ST, rows, mode="sum", per_sample_weights=weight_ST).view(-1, *x.shape[1:])


# Colour


@dataclass(frozen=True)
class Stages:
    """The colour ops of N views, as at most K stages each: shift the hue, then `a x + u g + v m`, then clamp."""

    hue_NK: Floats
    """Turns of the colour circle."""
    auv_NK3: Floats
    """The three numbers of the linear part; (1, 0, 0) is none."""

    def apply(self, x_NCSS: Tensor, some: slice) -> Tensor:
        """x, the views `some` of the N; it may be overwritten."""
        hue_NK, auv_NK3 = self.hue_NK[some], self.auv_NK3[some]
        hue = torch.from_numpy(hue_NK).to(x_NCSS.device, non_blocking=True)
        auv = torch.from_numpy(auv_NK3).to(x_NCSS.device, non_blocking=True)
        for k in range(hue_NK.shape[1]):
            x_NCSS = _where(hue_NK[:, k] != 0, x_NCSS, shift_hue, hue[:, k])
            linear_N = (auv_NK3[:, k] != (1, 0, 0)).any(axis=1)
            x_NCSS = _where(linear_N, x_NCSS, mix_gray, auv[:, k])
        return x_NCSS


def colour_stages(spec: ViewSpec, rows_NC: Floats) -> Stages:
    """The colour ops of N views (rows of plan columns) as stages."""
    count = len(rows_NC)
    every_N = np.arange(count)
    hue_NK = np.zeros((count, MAX_STAGES))
    auv_NK3 = np.tile(np.array([1.0, 0.0, 0.0]), (count, MAX_STAGES, 1))
    stage_N = np.zeros(count, dtype=np.int64)
    full_N = np.zeros(count, dtype=np.bool_)  # the stage ends with a clamp that can matter
    begun_N = np.zeros(count, dtype=np.bool_)
    jittered_N = rows_NC[:, INDEX["jitter"]] > 0
    for slot in range(4):
        op_N = rows_NC[:, INDEX["order_0"] + slot].astype(np.int64)
        amount_N = rows_NC[every_N, INDEX["brightness"] + op_N].astype(np.float64)
        hue_N = jittered_N & (op_N == COLOUR_OPS.index("hue")) & (amount_N != 0)
        linear_N = jittered_N & (op_N != COLOUR_OPS.index("hue")) & (amount_N != 1)
        stage_N += (hue_N & begun_N) | (linear_N & full_N)
        hue_NK[every_N[hue_N], stage_N[hue_N]] = amount_N[hue_N]
        _compose(auv_NK3, linear_N, stage_N, _linear(op_N, amount_N))
        full_N = np.where(linear_N, amount_N > 1, full_N & ~hue_N)
        begun_N |= hue_N | linear_N
    gray_N = rows_NC[:, INDEX["gray"]] > 0
    stage_N += gray_N & full_N
    _compose(auv_NK3, gray_N, stage_N, np.tile(np.array([0.0, 1.0, 0.0]), (count, 1)))
    used = int(stage_N.max(initial=0)) + 1
    return Stages(hue_NK[:, :used].astype(np.float32), auv_NK3[:, :used].astype(np.float32))


def _linear(op_N: npt.NDArray[np.int64], factor_N: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(N, 3): a, u, v of brightness, contrast (towards the mean gray) or saturation (towards the pixel's gray)."""
    rest_N = 1 - factor_N
    u_N = np.where(op_N == COLOUR_OPS.index("saturation"), rest_N, 0)
    v_N = np.where(op_N == COLOUR_OPS.index("contrast"), rest_N, 0)
    return np.stack([factor_N, u_N, v_N], axis=1)


def _compose(
    auv_NK3: npt.NDArray[np.float64], chosen_N: Bools, stage_N: npt.NDArray[np.int64], then_N3: npt.NDArray[np.float64]
) -> None:
    """Append `then` to the present stage of the chosen views, in place."""
    rows = np.flatnonzero(chosen_N)
    a, u, v = auv_NK3[rows, stage_N[rows]].T
    a2, u2, v2 = then_N3[rows].T
    auv_NK3[rows, stage_N[rows]] = np.stack([a2 * a, a2 * u + u2 * (a + u), a2 * v + u2 * v + v2 * (a + u + v)], axis=1)


def _where(chosen_N: Bools, x_NCSS: Tensor, change: Callable[[Tensor, Tensor], Tensor], amount_N: Tensor) -> Tensor:
    """`change(x, amount)` for the chosen views, the others as they are. No copy if it is all or none of them."""
    if not chosen_N.any():
        return x_NCSS
    if chosen_N.all():
        return change(x_NCSS, amount_N)
    rows = torch.from_numpy(np.flatnonzero(chosen_N)).to(x_NCSS.device, non_blocking=True)
    return x_NCSS.index_copy_(0, rows, change(x_NCSS.index_select(0, rows), amount_N.index_select(0, rows)))


def mix_gray(x_NCSS: Tensor, auv_N3: Tensor) -> Tensor:
    """`a x + u g + v m`, clamped to [0, 1]; overwrites x."""
    a, u, v = auv_N3.T[..., None, None, None]
    r, g, b = x_NCSS[:, :1], x_NCSS[:, 1:2], x_NCSS[:, 2:]
    gray_N1SS = (r * GRAY_C[0]).add_(g, alpha=GRAY_C[1]).add_(b, alpha=GRAY_C[2])
    mean_N111 = gray_N1SS.mean((-2, -1), keepdim=True)
    return x_NCSS.mul_(a).add_(gray_N1SS.mul_(u).add_(mean_N111 * v)).clamp_(0, 1)


def shift_hue(x_NCSS: Tensor, turns_N: Tensor) -> Tensor:
    """Turn the hue of HSV, exactly; overwrites x.

    Red is `low + range * clamp(|h - 3| - 1)` with h the hue in sixths of the circle, green `clamp(2 - |h - 2|)`,
    blue `clamp(2 - |h - 4|)`: value and saturation need not be known.
    """
    r, g, b = x_NCSS.unbind(1)
    high = torch.maximum(torch.maximum(r, g), b)
    low = torch.minimum(torch.minimum(r, g), b)
    span = high - low
    hue = torch.where(
        r == high, g - b, torch.where(g == high, torch.add(b - r, span, alpha=2), torch.add(r - g, span, alpha=4))
    )
    hue.div_(torch.where(span == 0, 1.0, span)).add_(6 * turns_N[:, None, None])
    hue.sub_((hue / 6).floor_().mul_(6))
    torch.addcmul(low, span, (hue - 3).abs_().sub_(1).clamp_(0, 1), out=r)
    torch.addcmul(low, span, (hue - 2).abs_().neg_().add_(2).clamp_(0, 1), out=g)
    torch.addcmul(low, span, (hue - 4).abs_().neg_().add_(2).clamp_(0, 1), out=b)
    return x_NCSS


def solarize(x_NCSS: Tensor, threshold_N: Tensor) -> Tensor:
    """Values at or above the threshold are inverted."""
    return torch.where(x_NCSS < threshold_N[:, None, None, None], x_NCSS, 1 - x_NCSS)
