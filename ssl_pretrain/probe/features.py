"""Features of objects from a frozen backbone: of their crops, or pooled from the maps of the whole field.

A crop shows one object at the network's own size. A detector never sees it so: its network reads the field once, and a
head reads the object's place out of the maps P3 to P5 (RoIAlign: He et al., "Mask R-CNN", 2017, section 3). `rois`
judges that.

Shapes: N objects, D width, B images or crops at a time, S side of a crop, H W pixels of a field, R objects of B
fields, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from ssl_pretrain.backbones import Backbone
from ssl_pretrain.data.decode import decode
from ssl_pretrain.data.files import Rejected
from ssl_pretrain.data.readers import LabelledImage, LabelledSet
from ssl_pretrain.errors import DataError, SslPretrainError, UsageError

if TYPE_CHECKING:
    from ssl_pretrain.probe.objects import Objects

DETECTOR_STRIDES = (8, 16, 32)
FIELD_SIDE_PX = 640
"""Short side of the fields that `rois` shows to a backbone, unless given."""
ROI_SIDE, ROI_SAMPLES = 7, 2
"""Places of an object along each side of a map, and samples of each along each side, as in torchvision's detectors."""
ROIS_AT_A_TIME = 256


def embed(
    backbone: Backbone,
    crops_NSSC: np.ndarray,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    of: Callable[[Backbone, Tensor], Tensor] = Backbone.__call__,
) -> np.ndarray:
    """Features (N, D), float32, each of length 1, of uint8 RGB crops (N, S, S, 3), without augmentation.

    `of` says which: the backbone's own, or those of its maps (`pooled_maps`).

    The backbone runs in eval mode and in float32 (or its own dtype) also under a caller's autocast, so that the probe
    of a running training and a later one of its artefact agree; then every module gets its mode back, and the
    backbone its device. Raises `SslPretrainError` when a feature is not finite.
    """
    there = torch.device(device) if device is not None else device_of(backbone)
    parts: list[np.ndarray] = []
    with _evaluating(backbone, there):
        for start in range(0, len(crops_NSSC), batch_size):
            x_BSSC = torch.from_numpy(crops_NSSC[start : start + batch_size]).to(there)
            z_BD = of(backbone, _normalised(backbone, x_BSSC.permute(0, 3, 1, 2).float() / 255)).float()
            parts.append(F.normalize(z_BD, dim=1).cpu().numpy())
    z_ND: np.ndarray = np.concatenate(parts) if parts else np.zeros((0, backbone.dim), np.float32)
    return _finite(backbone, z_ND)


def rois(
    backbone: Backbone,
    labelled: LabelledSet,
    objects: Objects,
    short_side_px: int | None = None,
    device: str | torch.device | None = None,
    batch_size: int = 4,
) -> np.ndarray:
    """What a detector sees of each object: features (N, D), float32, each of length 1, in the order of the objects.

    The whole field goes through the backbone: shrunk to a short side of `short_side_px` (640) if it is larger, in one
    antialiased bilinear step, aspect kept to the pixel; padded at the right and bottom, to a multiple of the strides,
    by 0 after normalisation, as torchvision's detectors do. RoIAlign takes each object's square (`Objects.square_N3`)
    out of the maps of `pooled_maps`; the mean over its 7 x 7 places is scaled to length 1 in each map, and these are
    laid side by side and scaled to length 1.

    A square that goes beyond its image ends at the image's edge: there is nothing behind it for a detector to see.
    Fields whose padded sizes are equal run together, up to `batch_size`. Eval mode, dtype, modes and device as in
    `embed`.

    labelled    the set that the objects were cut from

    Raises `UsageError` for a backbone without maps that lie on the image (`pixels`) and for a short side below 32 px,
    `DataError` for an image that can no longer be read, `SslPretrainError` for features that are not finite.
    """
    short_side_px = FIELD_SIDE_PX if short_side_px is None else short_side_px
    if short_side_px < 32 or batch_size < 1:
        raise UsageError("rois: short_side_px is 32 or more, batch_size 1 or more")
    there = torch.device(device) if device is not None else device_of(backbone)
    rows = {int(i): np.flatnonzero(objects.image_N == i) for i in np.unique(objects.image_N)}
    z_ND = np.zeros((len(objects.label_N), sum(backbone.channels[i] for i in _taken(backbone))), np.float32)
    with _evaluating(backbone, there):
        for batch in _batches(labelled, list(rows), short_side_px, math.lcm(*backbone.strides), batch_size):
            x_B = [_field(labelled.images[i], short_side_px).to(there) for i in batch]
            x_BCHW = _padded([_normalised(backbone, x[None])[0] for x in x_B], math.lcm(*backbone.strides))
            places = [
                torch.from_numpy(_boxes(objects.square_N3[rows[i]], labelled.images[i], x.shape[1:])).to(there)
                for i, x in zip(batch, x_B, strict=True)
            ]
            z_RD = _pooled_rois(backbone, x_BCHW, places)
            z_ND[np.concatenate([rows[i] for i in batch])] = z_RD.cpu().numpy()
    return _finite(backbone, z_ND)


def pooled_maps(backbone: Backbone, x_BCHW: Tensor) -> Tensor:
    """What a detector gets to see: the maps of strides 8, 16 and 32 (P3 to P5), or all where there are none of these.

    The mean of each over its places, of length 1, side by side: (B, sum of the C_i).
    """
    maps = backbone.maps(x_BCHW)
    return torch.cat([F.normalize(maps[i].mean(dim=(2, 3)), dim=1) for i in _taken(backbone)], dim=1)


def device_of(backbone: Backbone) -> torch.device:
    """Where its parameters are; the CPU when it has none."""
    return next((p.device for p in backbone.parameters()), torch.device("cpu"))


def _taken(backbone: Backbone) -> list[int]:
    """Which of its maps: P3 to P5, or all where there are none of these."""
    every = list(range(len(backbone.strides)))
    return [i for i in every if backbone.strides[i] in DETECTOR_STRIDES] or every


@contextmanager
def _evaluating(backbone: Backbone, device: torch.device) -> Iterator[None]:
    """Eval mode on a device, without gradients or autocast.

    Afterwards all is as before: a frozen BatchNorm may be in eval inside a training net.
    """
    home = device_of(backbone)
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.to(device).eval()
    try:
        # no_grad, not inference_mode: what a network caches on its first call would be unusable in training afterwards.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        backbone.to(home)
        for module, training in modes:
            module.training = training


def _normalised(backbone: Backbone, x_BCHW: Tensor) -> Tensor:
    """RGB of 0..1 as the backbone is fed it, in the backbone's own dtype."""
    dtype = next((p.dtype for p in backbone.parameters()), torch.float32)
    mean_C11, std_C11 = (x_BCHW.new_tensor(v).view(3, 1, 1) for v in (backbone.input.mean, backbone.input.std))
    return ((x_BCHW - mean_C11) / std_C11).to(dtype)


def _finite(backbone: Backbone, z_ND: np.ndarray) -> np.ndarray:
    broken = int((~np.isfinite(z_ND)).any(axis=1).sum())
    if broken:
        raise SslPretrainError(
            f"{backbone.name} gives features that are not finite for {broken} of {len(z_ND)} objects: "
            "its weights are damaged or the training diverged"
        )
    return z_ND


def _shown(size_px: tuple[int, int], short_side_px: int) -> tuple[int, int]:
    """Width and height of a field as the backbone sees it, never enlarged.

    >>> _shown((1280, 961), 640), _shown((640, 480), 640)
    ((852, 640), (640, 480))
    """
    scale = min(1.0, short_side_px / min(size_px))
    width, height = (round(side * scale) for side in size_px)
    return width, height


def _batches(
    labelled: LabelledSet, images: list[int], short_side_px: int, multiple: int, batch_size: int
) -> Iterator[list[int]]:
    """The images, those together whose padded sizes are equal."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for i in images:
        shown = _shown(labelled.images[i].size_px, short_side_px)
        by_size.setdefault(tuple(-(-side // multiple) for side in shown), []).append(i)
    for alike in by_size.values():
        yield from (alike[start : start + batch_size] for start in range(0, len(alike), batch_size))


def _field(image: LabelledImage, short_side_px: int) -> Tensor:
    """RGB of 0..1, (3, H, W), as large as it is shown."""
    try:
        x_HWC = decode(image.path)
    except Rejected as error:
        raise DataError(f"{image.path.name} can no longer be read: {error.reason}, {error.detail}") from error
    if x_HWC.shape[1::-1] != tuple(image.size_px):
        raise DataError(f"{image.path.name} has changed: its labels are for {image.size_px}")
    width, height = _shown(image.size_px, short_side_px)
    x_BCHW = torch.from_numpy(x_HWC).permute(2, 0, 1)[None].float() / 255
    if (width, height) != tuple(image.size_px):
        x_BCHW = F.interpolate(x_BCHW, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    return x_BCHW[0]


def _padded(x_B: list[Tensor], multiple: int) -> Tensor:
    """Normalised fields as one batch (B, 3, H, W) with sides that are multiples; 0 is the mean colour."""
    height, width = (max(-(-x.shape[d] // multiple) * multiple for x in x_B) for d in (1, 2))
    return torch.stack([F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in x_B])


def _boxes(square_R3: np.ndarray, image: LabelledImage, shown_2: torch.Size) -> np.ndarray:
    """Squares of an image as x0, y0, x1, y1 (R, 4), float32, in pixels of what is shown, inside of it."""
    width, height = image.size_px
    corner_R4 = np.concatenate([square_R3[:, :2], square_R3[:, :2] + square_R3[:, 2:]], axis=1)
    inside_R4 = corner_R4.clip(0, [width, height, width, height])
    scale_2 = np.array([shown_2[1] / width, shown_2[0] / height])
    return np.asarray(inside_R4 * np.tile(scale_2, 2), np.float32)


def _pooled_rois(backbone: Backbone, x_BCHW: Tensor, places_B: list[Tensor]) -> Tensor:
    """Features (R, D) of the objects of a batch of fields, field after field."""
    maps = backbone.maps(x_BCHW)
    height, width = x_BCHW.shape[-2:]
    roi_R5 = torch.cat([F.pad(places_R4, (1, 0), value=float(b)) for b, places_R4 in enumerate(places_B)])
    levels = []
    for i in _taken(backbone):
        stride, p_BCHW = backbone.strides[i], maps[i].float()
        if tuple(p_BCHW.shape[-2:]) != (height // stride, width // stride):
            raise UsageError(
                f"{backbone.name} gives a map of {p_BCHW.shape[-1]} x {p_BCHW.shape[-2]} for a field of {width} x "
                f"{height} px, which is not one in {stride}: objects cannot be found in it, judge it by crops instead"
            )
        pooled = [
            roi_align(p_BCHW, some_R5, (ROI_SIDE, ROI_SIDE), 1 / stride, ROI_SAMPLES, aligned=True).mean(dim=(2, 3))
            for some_R5 in torch.split(roi_R5, ROIS_AT_A_TIME)
        ]
        levels.append(F.normalize(torch.cat(pooled), dim=1))
    return F.normalize(torch.cat(levels, dim=1), dim=1)
