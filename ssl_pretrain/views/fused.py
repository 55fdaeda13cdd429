"""The fast engine in plain torch: a plan carried out with the algebra of its ops; the views of `reference` to rounding.

Geometry. Crop, antialiased resize, flips and turns are sums of weighted rows along one axis, then along the other,
with few weights each: `embedding_bag`. Flips reverse the order of the sums, a turn swaps the two axes; both are free.
Blur is two more such sums. A rotation is made from a larger canvas at the view's scale, by bilinear interpolation.

Colour. See `colour`: chains of ops as a few stages, computed before the image is touched.

On a CPU each view is made alone, start to end, in the processor's cache, so its bits do not depend on the batch. With
`compiled()` the pointwise work of a stage is one loop in machine code.

Legend: V views of a spec, B images, N = V * B, C = 3 channels, S side of a view, h w crop, T taps, K stages.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pretrain.views import ViewSpec
from ssl_pretrain.views.colour import GRAY_C, Bools, Floats, Stages, stages, yiq_turn
from ssl_pretrain.views.plan import INDEX, Plan, blur_kernel_px, canvas_px, extra_columns, plan

Ints = npt.NDArray[np.int32]
Step = Callable[[Tensor, slice], Tensor]
"""One op of the chain: the views `some` of the N (which it may overwrite) -> the same views after it."""


class Kernels(NamedTuple):
    """The pointwise loops; each may overwrite x."""

    shift_hue: Callable[[Tensor, Tensor], Tensor]
    mix_gray: Callable[[Tensor, Tensor], Tensor]
    both: Callable[[Tensor, Tensor, Tensor], Tensor]


def render(
    plan: Plan,
    images: Sequence[Tensor],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    kernels: Kernels | None = None,
) -> dict[str, Tensor]:
    """Uint8 images (H_i, W_i, 3), one for each of the plan's -> spec name -> (V, B, 3, S, S), normalised.

    kernels   `EAGER` if not given, or what `compiled` returned
    """
    on = images[0].device if device is None else torch.device(device)
    if len(images) != len(plan.buffer):
        raise ValueError(f"the plan is for {len(plan.buffer)} images, not {len(images)}")
    images = [image.to(on, non_blocking=True) for image in images]
    # x / std - mean / std, shaped for (N, 3, S, S)
    scale_C11 = 1 / torch.tensor(std, dtype=torch.float64).view(3, 1, 1)
    shift_C11 = -torch.tensor(mean, dtype=torch.float64).view(3, 1, 1) * scale_C11
    affine = scale_C11.float().to(on, non_blocking=True), shift_C11.float().to(on, non_blocking=True)
    with torch.no_grad(), _one_thread(on):
        return {
            spec.name: _render_spec(spec, plan.of(i), images, affine, dtype, kernels or EAGER)
            for i, spec in enumerate(plan.specs)
        }


@contextlib.contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU each op is too small for several threads: two take twice as long as one."""
    before = torch.get_num_threads()
    if device.type != "cpu" or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _render_spec(
    spec: ViewSpec,
    rows_BVC: Floats,
    images: Sequence[Tensor],
    affine: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    kernels: Kernels,
) -> Tensor:
    """(V, B, 3, S, S): all views of one spec."""
    device, size_px = affine[0].device, spec.size_px
    rows_NC = rows_BVC.transpose(1, 0, 2).reshape(-1, rows_BVC.shape[-1])
    images_N = list(images) * spec.count
    steps = _chain(spec, rows_NC, kernels)
    out_NCSS = torch.empty((len(rows_NC), 3, size_px, size_px), dtype=dtype, device=device)
    at_once = 1 if device.type == "cpu" else len(rows_NC)
    for start in range(0, len(rows_NC), at_once):
        some = slice(start, start + at_once)
        views = [geometry(spec, row, image) for row, image in zip(rows_NC[some], images_N[some], strict=True)]
        x_NCSS = views[0][None] if len(views) == 1 else torch.stack(views)
        for step in steps:
            x_NCSS = step(x_NCSS, some)
        if dtype == torch.float32:
            torch.addcmul(affine[1], x_NCSS, affine[0], out=out_NCSS[some])
        else:
            out_NCSS[some] = torch.addcmul(affine[1], x_NCSS, affine[0])
    return out_NCSS.view(spec.count, len(images), 3, size_px, size_px)


def _chain(spec: ViewSpec, rows_NC: Floats, kernels: Kernels) -> list[Step]:
    """The ops after the geometry, colour ops that stand together as one."""
    steps: list[Step] = []
    extras = itertools.count()
    for is_colour, group in itertools.groupby(spec.chain, key=lambda op: op in ("jitter", "gray")):
        if is_colour:
            steps.append(colour_step(spec, stages(spec, rows_NC, [str(op) for op in group]), kernels))
            continue
        for op in group:
            if not isinstance(op, str):
                columns_NP = np.ascontiguousarray(rows_NC[:, extra_columns(spec, next(extras))])
                steps.append(_gated(columns_NP[:, 0] > 0, op.apply, torch.from_numpy(columns_NP[:, 1:])))
            elif op == "blur":
                steps.append(_blur(spec, rows_NC))
            else:
                threshold_N = torch.full((len(rows_NC),), spec.solarize_threshold)
                steps.append(_gated(rows_NC[:, INDEX["solarize"]] > 0, solarize, threshold_N))
    return steps


def _gated(chosen_N: Bools, change: Callable[[Tensor, Tensor], Tensor], amount_N: Tensor) -> Step:
    """`change(x, amount)` for the chosen views, the others as they are. No copy if it is all or none of them."""
    chosen: list[bool] = chosen_N.tolist()  # for one view, numpy's any would take longer than the view's smaller ops

    def step(x_NCSS: Tensor, some: slice) -> Tensor:
        here = chosen[some]
        if not any(here):
            return x_NCSS
        amount = amount_N[some].to(x_NCSS.device, non_blocking=True)
        if all(here):
            return change(x_NCSS, amount)
        rows = torch.from_numpy(np.flatnonzero(here)).to(x_NCSS.device, non_blocking=True)
        return x_NCSS.index_copy_(0, rows, change(x_NCSS.index_select(0, rows), amount.index_select(0, rows)))

    return step


# Geometry


def geometry(spec: ViewSpec, row: Floats, image_HWC: Tensor) -> Tensor:
    """Crop, antialiased resize, flips, turn and rotation of one view: (3, S, S) in [0, 1]; row: its columns (C,)."""
    top, left, height, width, hflip, vflip, turn = (int(value) for value in row[:7])
    angle = float(row[INDEX["angle"]])
    # Turns as torch.rot90's: of the axes before they are swapped, one quarter mirrors x, two mirror both, three y.
    mirror_y, mirror_x = bool(vflip) != (turn in (2, 3)), bool(hflip) != (turn in (1, 2))
    if angle:
        side = canvas_px(spec)
        y_taps, first_y, last_y = canvas_taps(top, height, image_HWC.shape[0], spec.size_px, side, mirror_y)
        x_taps, first_x, last_x = canvas_taps(left, width, image_HWC.shape[1], spec.size_px, side, mirror_x)
        crop_hwC = image_HWC[first_y : last_y + 1, first_x : last_x + 1].to(torch.float32)
        y_taps.weight_I.mul_(1 / 255)  # here it costs nothing
    else:
        y_taps = resize_taps(height, spec.size_px, mirror_y, 1 / 255)
        x_taps = resize_taps(width, spec.size_px, mirror_x)
        crop_hwC = image_HWC[top : top + height, left : left + width].to(torch.float32)
    x_ywC = _sums(y_taps, crop_hwC)
    x_xCy = _sums(x_taps, x_ywC.permute(1, 2, 0))
    x_CSS = x_xCy.permute(1, 0, 2) if turn % 2 else x_xCy.permute(1, 2, 0)
    return rotate(x_CSS, angle, spec.size_px) if angle else x_CSS


@dataclass(frozen=True)
class Taps:
    """Output s of S is the sum of `weight_ST[s] * input[index_ST[s]]`; flat, as I = S * T of each."""

    index_I: Tensor
    weight_I: Tensor
    first_S: Tensor
    """Where each output's T begin."""


def _taps(index_ST: Ints, weight_ST: Floats) -> Taps:
    first_S = _firsts(*index_ST.shape)
    return Taps(torch.from_numpy(index_ST).view(-1), torch.from_numpy(weight_ST).view(-1), first_S)


@lru_cache(maxsize=2048)
def _firsts(outputs: int, count: int) -> Tensor:
    return torch.arange(0, outputs * count, count, dtype=torch.int32)


@lru_cache(maxsize=2048)  # crops have some hundred lengths, and a run takes them again and again
def resize_taps(length: int, size_px: int, mirrored: bool, scale_by: float = 1.0) -> Taps:
    """Bilinear with antialias, as `F.interpolate`: a triangle over two output pixels, or two input ones if wider."""
    scale = length / size_px
    support = max(scale, 1.0)
    centre_S1 = (np.arange(size_px)[:, None] + 0.5) * scale
    if mirrored:
        centre_S1 = centre_S1[::-1]
    # Input pixel t, whose middle is t + 0.5, counts if it is nearer than `support`: at most ceil(2 * support) do.
    index_ST = np.floor(centre_S1 - support + 0.5).astype(np.int32) + np.arange(math.ceil(2 * support), dtype=np.int32)
    weight_ST = np.maximum(0.0, 1.0 - np.abs(index_ST + (0.5 - centre_S1)) / support)
    inside_ST = np.minimum(np.maximum(index_ST, 0), length - 1)
    weight_ST *= inside_ST == index_ST
    weight_ST /= weight_ST.sum(axis=1, keepdims=True)
    return _taps(inside_ST, weight_ST.astype(np.float32) * np.float32(scale_by))


def canvas_taps(
    start: int, length: int, limit: int, size_px: int, side_px: int, mirrored: bool
) -> tuple[Taps, int, int]:
    """The same for the canvas of a rotation, `side_px` pixels at the scale of the crop around the crop's middle.

    Beyond the image (`limit` pixels) stands its mirror image. Also the first and the last pixel that are needed; the
    indices count from the first.
    """
    scale = length / size_px
    support = max(scale, 1.0)
    centre_T1 = start + length / 2 + (np.arange(side_px)[:, None] + 0.5 - side_px / 2) * scale
    if mirrored:
        centre_T1 = centre_T1[::-1]
    index_ST = np.floor(centre_T1 - support + 0.5).astype(np.int32) + np.arange(math.ceil(2 * support), dtype=np.int32)
    weight_ST = np.maximum(0.0, 1.0 - np.abs(index_ST + (0.5 - centre_T1)) / support)
    weight_ST /= weight_ST.sum(axis=1, keepdims=True)
    period = max(2 * limit - 2, 1)
    index_ST %= period
    index_ST = np.minimum(index_ST, period - index_ST) if limit > 1 else index_ST
    first, last = int(index_ST.min()), int(index_ST.max())
    return _taps(index_ST - first, weight_ST.astype(np.float32)), first, last


def rotate(x_CTT: Tensor, angle: float, size_px: int) -> Tensor:
    """The middle (3, S, S) of a canvas turned by `angle` radians, counter-clockwise."""
    side = x_CTT.shape[-1]
    # In grid_sample's coordinates the canvas reaches from -1 to 1.
    share = size_px / side
    cos, sin = share * math.cos(angle), share * math.sin(angle)
    theta = torch.tensor([[[cos, -sin, 0.0], [sin, cos, 0.0]]], dtype=torch.float32).to(x_CTT.device, non_blocking=True)
    grid = F.affine_grid(theta, [1, 3, size_px, size_px], align_corners=False)
    return F.grid_sample(x_CTT[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]


def _sums(taps: Taps, x: Tensor) -> Tensor:
    """Weighted sums over the first axis of x (h, p, q) -> (S, p, q)."""
    rows = x.reshape(x.shape[0], -1)
    index_I, weight_I, first_S = (
        t.to(x.device, non_blocking=True) for t in (taps.index_I, taps.weight_I, taps.first_S)
    )
    # F.embedding_bag without its checks, which for a small view take as long as the sums.
    return torch.embedding_bag(rows, index_I, first_S, False, 0, False, weight_I)[0].view(-1, *x.shape[1:])


# Blur


def _blur(spec: ViewSpec, rows_NC: Floats) -> Step:
    def step(x_NCSS: Tensor, some: slice) -> Tensor:
        rows = rows_NC[some]
        if len(rows) == 1:
            return blur(x_NCSS[0], taps(rows[0]))[None] if rows[0, INDEX["blur"]] else x_NCSS
        for n in np.flatnonzero(rows[:, INDEX["blur"]]):
            x_NCSS[n] = blur(x_NCSS[n], taps(rows[n]))
        return x_NCSS

    def taps(row: Floats) -> Taps:
        return blur_taps(spec.size_px, blur_kernel_px(spec), float(row[INDEX["sigma"]]))

    return step


def blur(x_CSS: Tensor, taps: Taps) -> Tensor:
    """Weighted sums along x, then along y."""
    x_xCy = _sums(taps, x_CSS.permute(2, 0, 1))
    return _sums(taps, x_xCy.permute(2, 1, 0)).permute(1, 0, 2)


def blur_taps(size_px: int, kernel_px: int, sigma: float) -> Taps:
    """A Gaussian of `kernel_px` weights that sum to 1; the border is reflected, without repeating the edge pixel."""
    radius = min(kernel_px // 2, math.ceil(6 * sigma))  # what lies farther weighs less than 1e-8
    offset_T = np.arange(-radius, radius + 1, dtype=np.int32)
    weight_T = np.exp(-0.5 * (offset_T / sigma) ** 2)
    weight_T /= weight_T.sum()
    weight_ST = np.tile(weight_T.astype(np.float32), (size_px, 1))
    return _taps(_reflected(size_px, radius), weight_ST)


@lru_cache(maxsize=256)
def _reflected(size_px: int, radius: int) -> Ints:
    """(S, 2 * radius + 1): the pixels around each."""
    offset_T = np.arange(-radius, radius + 1, dtype=np.int32)
    index_ST = np.abs(np.arange(size_px, dtype=np.int32)[:, None] + offset_T)
    return np.asarray(size_px - 1 - np.abs(size_px - 1 - index_ST))


# Colour


def colour_step(spec: ViewSpec, ops: Stages, kernels: Kernels) -> Step:
    """The stages, each as one of three loops over the views that need it."""
    linear_NK, hued_NK, yiq = ops.linear_NK, ops.hue_NK != 0, spec.hue_space == "yiq"
    auv_NK3, hue_NK = torch.from_numpy(ops.auv_NK3), torch.from_numpy(ops.hue_NK)
    turn_NK33 = torch.from_numpy(yiq_turn(ops.hue_NK)) if yiq else None
    steps: list[Step] = []
    for k in range(hued_NK.shape[1]):
        if turn_NK33 is not None:
            steps.append(_gated(hued_NK[:, k], mix_channels, turn_NK33[:, k]))
            steps.append(_gated(linear_NK[:, k], kernels.mix_gray, auv_NK3[:, k]))
            continue
        together_N = hued_NK[:, k] & linear_NK[:, k]
        amounts_N4 = torch.cat([hue_NK[:, k, None], auv_NK3[:, k]], dim=1)
        steps.append(_gated(together_N, lambda x, a: kernels.both(x, a[:, 0], a[:, 1:]), amounts_N4))
        steps.append(_gated(hued_NK[:, k] & ~together_N, kernels.shift_hue, hue_NK[:, k]))
        steps.append(_gated(linear_NK[:, k] & ~together_N, kernels.mix_gray, auv_NK3[:, k]))

    def step(x_NCSS: Tensor, some: slice) -> Tensor:
        for stage in steps:
            x_NCSS = stage(x_NCSS, some)
        return x_NCSS

    return step


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


def mix_channels(x_NCSS: Tensor, mix_N33: Tensor) -> Tensor:
    """A 3 x 3 matrix on the colours, clamped to [0, 1]."""
    mixed: Tensor = (mix_N33 @ x_NCSS.flatten(2)).clamp_(0, 1)
    return mixed.view_as(x_NCSS)


def solarize(x_NCSS: Tensor, threshold_N: Tensor) -> Tensor:
    """Values at or above the threshold are inverted."""
    return torch.where(x_NCSS < threshold_N[:, None, None, None], x_NCSS, 1 - x_NCSS)


EAGER = Kernels(shift_hue, mix_gray, lambda x, turns, auv: mix_gray(shift_hue(x, turns), auv))
"""One torch op after the other."""


# Compiled loops. The same formulas, written without overwriting, so that the compiler sees one expression.


def _hue(x_NCSS: Tensor, turns_N: Tensor) -> Tensor:
    r, g, b = x_NCSS.unbind(1)
    high, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    span = high - low
    hue = torch.where(r == high, g - b, torch.where(g == high, (b - r) + 2 * span, (r - g) + 4 * span))
    hue = hue / torch.where(span == 0, 1.0, span) + 6 * turns_N[:, None, None]
    hue = hue - 6 * torch.floor(hue / 6)
    red = low + span * ((hue - 3).abs() - 1).clamp(0, 1)
    green = low + span * (2 - (hue - 2).abs()).clamp(0, 1)
    return torch.stack([red, green, low + span * (2 - (hue - 4).abs()).clamp(0, 1)], dim=1)


def _mix(x_NCSS: Tensor, auv_N3: Tensor) -> Tensor:
    a, u, v = auv_N3.T[..., None, None, None]
    r, g, b = x_NCSS.unbind(1)
    gray_N1SS = (r * GRAY_C[0] + g * GRAY_C[1] + b * GRAY_C[2])[:, None]
    mixed: Tensor = x_NCSS * a + (gray_N1SS * u + gray_N1SS.mean((-2, -1), keepdim=True) * v)
    return mixed.clamp(0, 1)


def _hue_and_mix(x_NCSS: Tensor, turns_N: Tensor, auv_N3: Tensor) -> Tensor:
    return _mix(_hue(x_NCSS, turns_N), auv_N3)


def compiled(specs: Sequence[ViewSpec]) -> Kernels:
    """The loops compiled for a CPU and for views of these sizes, by torch's compiler and the machine's (`CXX` or g++).

    The first time on a machine this takes a minute, later seconds (the compiler keeps what it made). Raises
    `RuntimeError` where there is no compiler or it fails.
    """
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise RuntimeError("there is no C++ compiler")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses a CUDA that nobody asked for
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    made = Kernels(*(torch.compile(loop, dynamic=False) for loop in (_hue, _mix, _hue_and_mix)))
    count, side = 16, 32
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))
    drawn = plan(specs, np.arange(count), np.full((count, 2), side), epoch=0, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        render(drawn, [image] * count, (0, 0, 0), (1, 1, 1), kernels=made)  # the layouts that the ops leave behind
    return made
