"""PCA maps: what the feature maps of whole fields tell apart, in colours.

Shapes: B images, D channels, N places of all maps together, h w of a map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from ssl_pretrain.backbones import Backbone
from ssl_pretrain.report.network import fields, given, still
from ssl_pretrain.report.sections import Section
from ssl_pretrain.report.sheet import Sheet, shown

if TYPE_CHECKING:
    from ssl_pretrain.report.folder import RunFolder

PLACE = 70
IMAGES = 6
P3 = 8
"""The finest stride that a usual feature pyramid asks a backbone for."""
CLIPPED = 1.0
"""Per cent of places at either end of a component that get the colour of the end: few strong ones would grey the rest.
"""
WORDS = (
    "Whole fields, and what the backbone makes of each place: the first three principal components of its features as "
    "red, green and blue, and the share of their variance that these show. Places of one colour are alike to the "
    "backbone. Objects should stand out from the ground, and kinds of objects from each other; one colour everywhere, "
    "or a pattern that is the same in all images, says that little was learned. The colours themselves mean nothing."
)


def section(run: RunFolder) -> Section:
    """The last maps of some fields, and P3 where there is one, beside the field."""
    images = fields(run.pack, IMAGES)
    picture = figure(run.name, run.backbone, images)
    alt = f"{len(images)} fields, each beside its feature maps in false colours"
    return Section("What the feature maps tell apart", WORDS, picture, alt)


def figure(name: str, backbone: Backbone, images: Sequence[NDArray[np.uint8]]) -> Figure:
    """Fields (H, W, 3) beside their maps; every level has its own components, over these images together."""
    levels = [i for i, stride in enumerate(backbone.strides[:-1]) if stride == P3 < backbone.strides[-1]]
    levels.append(len(backbone.strides) - 1)
    seen, maps = _maps(backbone, images, levels)
    coloured = [colours(of_level) for of_level in maps]
    words = [
        f"stride {backbone.strides[level]} ({100 * share:.0f} %)"
        for level, (_, share) in zip(levels, coloured, strict=True)
    ]
    tiles = [[seen[b], *(pictures[b] for pictures, _ in coloured)] for b in range(len(images))]
    return _sheet(f"{name}: principal components of its feature maps", tiles, ["the field", *words])


def colours(maps_B: Sequence[Tensor]) -> tuple[list[NDArray[np.uint8]], float]:
    """Maps (D, h, w) of several images as pictures (h, w, 3), and the share of the variance that they show.

    The first three principal components of the centred features of all places together, each from its 1st to its 99th
    percentile (Oquab et al., "DINOv2", 2023, figure 1, who also take away the ground). A component's sign is free:
    here its largest weight is positive.

    Two places that differ in one channel differ in one colour; the channels that are the same show nothing.

    >>> (picture,), share = colours([torch.tensor([[[0.0, 1.0]], [[5.0, 5.0]]])])
    >>> picture[0].tolist(), share
    ([[0, 128, 128], [255, 128, 128]], 1.0)
    """
    z_ND = torch.cat([map_Dhw.flatten(1).T for map_Dhw in maps_B]).double()
    z_ND = z_ND - z_ND.mean(0)
    values_D, axes_DD = torch.linalg.eigh(z_ND.T @ z_ND / len(z_ND))  # ascending
    axes_D3 = axes_DD[:, -3:].flip(1)
    axes_D3 = axes_D3 * axes_D3.gather(0, axes_D3.abs().argmax(0, keepdim=True)).sign()
    p_N3 = (z_ND @ axes_D3).numpy()
    low_3, high_3 = np.percentile(p_N3, [CLIPPED, 100 - CLIPPED], axis=0)
    flat_3 = high_3 - low_3 <= 1e-9 * max(float(np.abs(p_N3).max()), 1e-300)
    unit_N3 = np.where(flat_3, 0.5, (p_N3 - low_3) / np.where(flat_3, 1.0, high_3 - low_3)).clip(0, 1)
    if unit_N3.shape[1] < 3:  # fewer channels than colours
        unit_N3 = np.pad(unit_N3, ((0, 0), (0, 3 - unit_N3.shape[1])), constant_values=0.5)
    pixels_N3 = np.round(255 * unit_N3).astype(np.uint8)
    ends = np.cumsum([map_Dhw[0].numel() for map_Dhw in maps_B])[:-1]
    pictures = [
        part.reshape(*map_Dhw.shape[1:], 3) for part, map_Dhw in zip(np.split(pixels_N3, ends), maps_B, strict=True)
    ]
    total = float(values_D.clamp_min(0).sum())
    return pictures, float(values_D[-3:].sum()) / total if total > 0 else 0.0


def _maps(
    backbone: Backbone, images: Sequence[NDArray[np.uint8]], levels: Sequence[int]
) -> tuple[list[NDArray[np.uint8]], list[list[Tensor]]]:
    """The fields as the network saw them, and of each level the maps (D, h, w) of all."""
    seen: list[NDArray[np.uint8]] = []
    maps: list[list[Tensor]] = [[] for _ in levels]
    with still(backbone) as (device, dtype):
        for image in images:  # one by one: they have different sizes
            x_1Chw = given(image, backbone.input, max(backbone.strides))
            seen += shown(x_1Chw, backbone.input)
            found = backbone.maps(x_1Chw.to(device, dtype))
            for of_level, level in zip(maps, levels, strict=True):
                of_level.append(found[level][0].float().cpu())
    return seen, maps


def _sheet(title: str, tiles_BT: Sequence[Sequence[NDArray[np.uint8]]], headings: Sequence[str]) -> Figure:
    """Images in two columns, each with its tiles side by side."""
    many, left, gap, head = len(headings), 0.15, 0.07, 0.65
    columns = 2 if len(tiles_BT) > 1 else 1
    wide = (9.6 - 2 * left - 0.2) / (2 * many) - gap
    tall = wide * max(tile.shape[0] / tile.shape[1] for tiles in tiles_BT for tile in tiles[:1])
    rows = math.ceil(len(tiles_BT) / columns)
    sheet = Sheet(9.6, head + rows * (tall + gap) + 0.1)
    sheet.text(left, 0.25, title, size=11)
    for b, tiles in enumerate(tiles_BT):
        row, column = divmod(b, columns)
        for t, tile in enumerate(tiles):
            x = left + column * (many * (wide + gap) + 0.2) + t * (wide + gap)
            if row == 0:
                sheet.text(x, head - 0.07, headings[t])
            sheet.picture(x, head + row * (tall + gap), wide, tall, tile)
    return sheet.figure
