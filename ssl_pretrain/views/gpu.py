"""The engine for CUDA: a plan carried out by four Triton kernels; the views of `fused` to rounding.

All images of a batch are read from one flat buffer, each with its own size; nothing is brought to a common one. Every
number that the kernels and the extra ops need is computed on the CPU, from the plan, and goes to the device in one
pinned buffer. Nothing is read back, so the host runs ahead of the device; except by a `KorniaOp`, which says so.

A spec costs a few launches, whatever the batch: `resample` (twice, where some views are rotated), `blur` twice, and two
for each colour stage (see `colour`): `hue`, which also leaves sums of gray, then `mix`.

Legend: V views of a spec, B images, N = V * B, C = 3 channels, S side of a view, T of a canvas, K stages, M chosen.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ssl_pretrain.views import ViewSpec
from ssl_pretrain.views.colour import Floats, stages, yiq_turn
from ssl_pretrain.views.fused import solarize
from ssl_pretrain.views.kernels import BLOCK, blur, hue, mix, resample
from ssl_pretrain.views.plan import INDEX, Plan, blur_kernel_px, canvas_px, extra_columns


def render(
    plan: Plan,
    flat: Tensor,
    offset_B: npt.NDArray[np.int64],
    size_B2: npt.NDArray[np.int64],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Views of the images that stand in `flat` -> spec name -> (V, B, 3, S, S) on its device, normalised.

    flat       uint8 (bytes,) on the device: images (H, W, 3), row-major
    offset_B   first byte of each image of the plan in `flat`
    size_B2    their heights and widths
    """
    if not len(plan.buffer) == len(offset_B) == len(size_B2):
        raise ValueError(f"the plan is for {len(plan.buffer)} images, not {len(offset_B)} and {len(size_B2)}")
    upload = _Upload()
    scale_C = 1 / np.asarray(std, np.float64)
    affine = upload.add(np.stack([scale_C, -np.asarray(mean, np.float64) * scale_C]).astype(np.float32))
    works = [_Work(spec, plan.of(i), offset_B, size_B2, upload) for i, spec in enumerate(plan.specs)]
    upload.send(flat.device)
    scale_C11, shift_C11 = upload[affine].view(2, 3, 1, 1)
    views: dict[str, Tensor] = {}
    # Triton launches on the current device, which need not be the images'.
    here = torch.cuda.device(flat.device) if flat.is_cuda else contextlib.nullcontext()
    with torch.no_grad(), here:
        for work in works:
            x_NCSS = work.run(flat, upload)
            out_NCSS = x_NCSS if dtype == x_NCSS.dtype else torch.empty_like(x_NCSS, dtype=dtype)
            torch.addcmul(shift_C11, x_NCSS, scale_C11, out=out_NCSS)
            views[work.spec.name] = out_NCSS.view(work.spec.count, len(offset_B), *out_NCSS.shape[1:])
    return views


class _Upload:
    """Arrays that go to the device together, in one copy."""

    def __init__(self) -> None:
        self._arrays: list[npt.NDArray[np.generic]] = []
        self._sent: list[Tensor] = []

    def add(self, array: npt.NDArray[np.generic]) -> int:
        """Its number."""
        self._arrays.append(np.ascontiguousarray(array))
        return len(self._arrays) - 1

    def send(self, device: torch.device) -> None:
        starts = [0]
        for array in self._arrays:
            starts.append(starts[-1] + -(-array.nbytes // 16) * 16)  # Triton likes 16 bytes
        host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
        for start, array in zip(starts, self._arrays, strict=False):
            host.numpy()[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        sent = host.to(device, non_blocking=True)
        for start, array in zip(starts, self._arrays, strict=False):
            kind = torch.from_numpy(array[:0]).dtype
            self._sent.append(sent[start : start + array.nbytes].view(kind).view(array.shape))

    def __getitem__(self, number: int) -> Tensor:
        return self._sent[number]


class _Work:
    """What is to be done for one spec, in steps; made before the upload, run after it."""

    def __init__(
        self,
        spec: ViewSpec,
        rows_BVC: Floats,
        offset_B: npt.NDArray[np.int64],
        size_B2: npt.NDArray[np.int64],
        upload: _Upload,
    ) -> None:
        self.spec, self.upload = spec, upload
        rows_NC = np.ascontiguousarray(rows_BVC.transpose(1, 0, 2).reshape(-1, rows_BVC.shape[-1]))
        self.rows_NC, self.count = rows_NC, len(rows_NC)
        angle_N = rows_NC[:, INDEX["angle"]].astype(np.float64)
        self.place = upload.add(self._places(np.tile(offset_B, spec.count), np.tile(size_B2, (spec.count, 1))))
        self.plain, self.plain_count = self._chosen(angle_N == 0)
        self.turned, self.turned_count = self._chosen(angle_N != 0)
        share = spec.size_px / canvas_px(spec)
        cos, sin = share * np.cos(angle_N), share * np.sin(angle_N)
        theta_N23 = np.stack([np.stack([cos, -sin, 0 * cos], -1), np.stack([sin, cos, 0 * cos], -1)], -2)
        self.theta = upload.add(theta_N23[angle_N != 0].astype(np.float32))
        self.steps = self._chain()

    def _chosen(self, chosen_N: npt.NDArray[np.bool_]) -> tuple[int, int]:
        """The numbers of the chosen views, to be uploaded, and how many they are."""
        return self.upload.add(np.flatnonzero(chosen_N)), int(chosen_N.sum())

    def _places(self, offset_N: npt.NDArray[np.int64], size_N2: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(N, 10): what `resample` asks for, in its order."""
        rows = self.rows_NC[:, :7].astype(np.int64)
        top, left, height, width, hflip, vflip, turn = rows.T
        # Turns as torch.rot90's, as in `fused.geometry`.
        mirror_y, mirror_x = vflip ^ np.isin(turn, (2, 3)), hflip ^ np.isin(turn, (1, 2))
        columns = [offset_N, *size_N2.T, top, left, height, width, mirror_y, mirror_x, turn % 2]
        return np.stack(columns, axis=1).astype(np.int64)

    def _chain(self) -> list[_Blur | _Colour | _Gated]:
        steps: list[_Blur | _Colour | _Gated] = []
        extras = itertools.count()
        for is_colour, group in itertools.groupby(self.spec.chain, key=lambda op: op in ("jitter", "gray")):
            if is_colour:
                steps.append(_Colour(self.spec, self.rows_NC, [str(op) for op in group], self.upload))
                continue
            for op in group:
                if not isinstance(op, str):
                    columns = self.rows_NC[:, extra_columns(self.spec, next(extras))]
                    steps.append(_Gated(columns[:, 0] > 0, op.apply, columns[:, 1:], self.upload))
                elif op == "blur":
                    steps.append(_Blur(self.spec, self.rows_NC, self.upload))
                else:
                    threshold_N = np.full(self.count, self.spec.solarize_threshold, np.float32)
                    gate_N = self.rows_NC[:, INDEX["solarize"]] > 0
                    steps.append(_Gated(gate_N, solarize, threshold_N, self.upload))
        return steps

    def run(self, flat: Tensor, upload: _Upload) -> Tensor:
        """(N, 3, S, S) float32 in [0, 1]."""
        side, place_NP = self.spec.size_px, upload[self.place]
        x_NCSS = torch.empty((self.count, 3, side, side), dtype=torch.float32, device=flat.device)
        if self.plain_count:
            grid = (self.plain_count, triton.cdiv(side * side, BLOCK))
            resample[grid](flat, place_NP, upload[self.plain], x_NCSS, side, side, False, True, BLOCK)
        if self.turned_count:
            canvas = canvas_px(self.spec)
            x_MCTT = torch.empty((self.turned_count, 3, canvas, canvas), dtype=torch.float32, device=flat.device)
            grid = (self.turned_count, triton.cdiv(canvas * canvas, BLOCK))
            resample[grid](flat, place_NP, upload[self.turned], x_MCTT, canvas, side, True, False, BLOCK)
            where = F.affine_grid(upload[self.theta], [self.turned_count, 3, side, side], align_corners=False)
            rotated = F.grid_sample(x_MCTT, where, mode="bilinear", padding_mode="border", align_corners=False)
            x_NCSS.index_copy_(0, upload[self.turned], rotated)
        for step in self.steps:
            x_NCSS = step.run(x_NCSS, upload)
        return x_NCSS


class _Gated:
    """A torch op on the views that drew it."""

    def __init__(
        self,
        gate_N: npt.NDArray[np.bool_],
        change: Callable[[Tensor, Tensor], Tensor],
        amount_N: Floats,
        upload: _Upload,
    ) -> None:
        self.change, self.count, self.all = change, int(gate_N.sum()), bool(gate_N.all())
        self.rows, self.amount = upload.add(np.flatnonzero(gate_N)), upload.add(amount_N[gate_N])

    def run(self, x_NCSS: Tensor, upload: _Upload) -> Tensor:
        if not self.count:
            return x_NCSS
        if self.all:
            changed: Tensor = self.change(x_NCSS, upload[self.amount])
            return changed.contiguous()
        rows = upload[self.rows]
        return x_NCSS.index_copy_(0, rows, self.change(x_NCSS.index_select(0, rows), upload[self.amount]))


class _Blur:
    """Gaussian blur of the views that drew it."""

    def __init__(self, spec: ViewSpec, rows_NC: Floats, upload: _Upload) -> None:
        gate_N = rows_NC[:, INDEX["blur"]] > 0
        sigma_M = rows_NC[gate_N, INDEX["sigma"]].astype(np.float64)
        radius_M = np.minimum(blur_kernel_px(spec) // 2, np.ceil(6 * sigma_M)).astype(np.int64)
        widest = int(radius_M.max(initial=0))
        offset_R = np.arange(widest + 1)
        weight_MR = np.exp(-0.5 * (offset_R / sigma_M[:, None]) ** 2) * (offset_R <= radius_M[:, None])
        weight_MR /= 2 * weight_MR.sum(1, keepdims=True) - weight_MR[:, :1]
        self.count, self.widest = len(sigma_M), widest
        self.rows, self.weight = upload.add(np.flatnonzero(gate_N)), upload.add(weight_MR.astype(np.float32))

    def run(self, x_NCSS: Tensor, upload: _Upload) -> Tensor:
        if not self.count:
            return x_NCSS
        side, rows_M, weight_MR = x_NCSS.shape[-1], upload[self.rows], upload[self.weight]
        half_MCSS = torch.empty((self.count, *x_NCSS.shape[1:]), dtype=x_NCSS.dtype, device=x_NCSS.device)
        grid = (self.count, triton.cdiv(side * side, BLOCK), 3)
        blur[grid](x_NCSS, half_MCSS, rows_M, weight_MR, side, self.widest, True, BLOCK)
        blur[grid](half_MCSS, x_NCSS, rows_M, weight_MR, side, self.widest, False, BLOCK)
        return x_NCSS


class _Colour:
    """A run of colour ops as stages."""

    def __init__(self, spec: ViewSpec, rows_NC: Floats, ops: Sequence[str], upload: _Upload) -> None:
        found = stages(spec, rows_NC, ops)
        self.stages, self.yiq = found.hue_NK.shape[1], spec.hue_space == "yiq"
        self.used = [(bool((found.hue_NK[:, k] != 0).any()), bool(found.linear_NK[:, k].any()))
                     for k in range(self.stages)]  # fmt: skip
        turn_NK9 = yiq_turn(found.hue_NK).reshape(*found.hue_NK.shape, 9)
        active_NK2 = np.stack([found.hue_NK != 0, found.linear_NK], axis=-1)
        columns = [found.hue_NK[..., None], found.auv_NK3, turn_NK9, active_NK2]
        self.table = upload.add(np.concatenate(columns, axis=-1).astype(np.float32))  # (N, K, 15)

    def run(self, x_NCSS: Tensor, upload: _Upload) -> Tensor:
        table_NKP, side = upload[self.table], x_NCSS.shape[-1]
        tiles = triton.cdiv(side * side, BLOCK)
        grid = (x_NCSS.shape[0], tiles)
        sums_NT = torch.empty((x_NCSS.shape[0], tiles), dtype=torch.float32, device=x_NCSS.device)
        for k, (hue_used, mix_used) in enumerate(self.used):
            if hue_used or mix_used:
                hue[grid](x_NCSS, table_NKP, sums_NT, side * side, self.stages, k, self.yiq, BLOCK)
            if mix_used:
                mix[grid](x_NCSS, table_NKP, sums_NT, side * side, self.stages, k, tiles, triton.next_power_of_2(tiles),
                          BLOCK)  # fmt: skip
        return x_NCSS
