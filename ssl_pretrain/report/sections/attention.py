"""Attention maps of plain ViTs: where the last block looks when it makes the feature.

Shapes: B images, M heads, N tokens (the prefix first), D width, h w patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from ssl_pretrain.backbones import MaskableBackbone
from ssl_pretrain.report.network import fields, given, still
from ssl_pretrain.report.sections import Section
from ssl_pretrain.report.sheet import Sheet, shown

if TYPE_CHECKING:
    from ssl_pretrain.report.folder import RunFolder

PLACE = 80
IMAGES, HEADS = 4, 6
WORDS = (
    "Where the last block looks: {whose} attention to each patch, mean over the heads and head by head; bright is "
    "much, each picture from its least to its most. Under a field stands how much more than the mean its strongest "
    "patches get: near 1 there is nothing to see, however colourful. Attention that rests on objects is a good sign."
)


def section(run: RunFolder) -> Section | None:
    """The attention of some fields; nothing for backbones that are no plain ViT."""
    backbone = run.backbone
    if not isinstance(backbone, MaskableBackbone) or attention_of(backbone) is None:
        return None
    pooled = run.recipe.backbone_options(plain_vit=True)["pool"]
    from_class = backbone.class_token and pooled == "token"
    whose = "the class token's" if from_class else "the patches' mean"
    images = fields(run.pack, IMAGES)
    picture = figure(f"{run.name}: {whose} attention in the last block", backbone, images, from_class)
    alt = f"{len(images)} fields, each beside maps of attention: the mean over heads, then single heads"
    return Section("Where the network looks", WORDS.format(whose=whose), picture, alt)


def figure(title: str, backbone: MaskableBackbone, images: Sequence[NDArray[np.uint8]], from_class: bool) -> Figure:
    """Fields (H, W, 3), each beside the mean of its attention over the heads, and the first heads."""
    rows: list[list[NDArray[np.uint8]]] = []
    peaks: list[float] = []
    with still(backbone) as (device, dtype):
        for image in images:
            x_1Chw = given(image, backbone.input, backbone.patch_px)
            a_Mhw = weights(backbone, x_1Chw.to(device, dtype), from_class)[0].float().cpu().numpy()
            maps = [a_Mhw.mean(0), *a_Mhw[:HEADS]]
            peaks.append(float(np.percentile(maps[0], 99) / max(float(maps[0].mean()), 1e-12)))
            rows.append([*shown(x_1Chw, backbone.input), *(heat(map_hw) for map_hw in maps)])
    headings = ["the field", "mean of the heads", *(f"head {m}" for m in range(1, len(rows[0]) - 1))]
    left, gap, foot, head = 0.15, 0.07, 0.2, 0.65
    wide = min((9.6 - 2 * left) / len(headings) - gap, 2.2)
    tall = wide * max(row[0].shape[0] / row[0].shape[1] for row in rows)
    sheet = Sheet(2 * left + len(headings) * (wide + gap) - gap, head + len(rows) * (tall + foot) + 0.1)
    sheet.text(left, 0.25, title, size=11)
    for b, (row, peak) in enumerate(zip(rows, peaks, strict=True)):
        sheet.text(left, head + b * (tall + foot) + tall + 0.12, f"{peak:.1f} times the mean", size=7, color="0.35")
        for t, tile in enumerate(row):
            if b == 0:
                sheet.text(left + t * (wide + gap), head - 0.07, headings[t])
            sheet.picture(left + t * (wide + gap), head + b * (tall + foot), wide, tall, tile)
    return sheet.figure


def weights(backbone: MaskableBackbone, x_BChw: Tensor, from_class: bool) -> Tensor:
    """Attention of the last block to each patch (B, M, h, w): the class token's, or the mean of all patches'.

    softmax(q k' / sqrt(d)) (Vaswani et al., 2017, equation 1) of the tokens that the block was given: timm's fused
    attention keeps no weights, so queries and keys are computed once more. What goes to prefix tokens is left out, so
    the weights of an image sum to 1 or less.
    """
    attention = attention_of(backbone)
    assert attention is not None  # asked before
    given_to: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        given_to.append(args[0])

    hook = attention.register_forward_pre_hook(keep)
    try:
        backbone(x_BChw)
    finally:
        hook.remove()
    t_BND = given_to[-1]
    batch, tokens, _ = t_BND.shape
    qkv = attention.qkv(t_BND).reshape(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    q_BMNd, k_BMNd = attention.q_norm(qkv[0]), attention.k_norm(qkv[1])
    prefix = backbone.prefix_tokens
    asking = q_BMNd[:, :, :1] if from_class else q_BMNd[:, :, prefix:]
    heads = [  # one by one: all patches' attention of all heads could be gigabytes
        (asking[:, m] @ k_BMNd[:, m].transpose(1, 2) * attention.scale).softmax(-1).mean(1)[:, prefix:]
        for m in range(attention.num_heads)
    ]
    h, w = x_BChw.shape[2] // backbone.patch_px, x_BChw.shape[3] // backbone.patch_px
    return torch.stack(heads, dim=1).reshape(batch, len(heads), h, w)


def attention_of(backbone: MaskableBackbone) -> Any:
    """The last attention of a plain ViT, or None where it is of another kind than timm's own.

    `Any`, as timm's modules have no types.
    """
    found = [module for module in backbone.modules() if isinstance(module, Attention)]
    return found[-1] if found else None


def heat(map_hw: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Numbers as colours (h, w, 3), from the least, dark, to the most; all dark where all are the same.

    >>> heat(np.array([[0.0, 0.5], [0.5, 1.0]], np.float32)).sum(-1).tolist()[0][0] < 5
    True
    """
    unit_hw = (map_hw - map_hw.min()) / max(float(map_hw.max() - map_hw.min()), 1e-12)
    coloured: NDArray[np.uint8] = matplotlib.colormaps["inferno"](unit_hw, bytes=True)[..., :3]
    return coloured
