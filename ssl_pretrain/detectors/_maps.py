"""What the adapters of several frameworks share: a backbone to fine-tune, and a pyramid for a plain ViT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_pretrain.artefact import MapBackbone, load_backbone
from ssl_pretrain.backbones import Backbone
from ssl_pretrain.errors import UsageError
from ssl_pretrain.named import named

STRIDES = (4, 8, 16, 32)
"""Of the levels P2 to P5 that detectors begin with."""
RESNET_DEPTHS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101, "resnet152": 152}
"""Networks that are the same, tensor by tensor, in timm, torchvision, Detectron2 and MMDetection."""


def load(folder: str | Path, pretrained: bool = True) -> MapBackbone:
    """The backbone of an artefact or run in training mode, every layer trainable that feeds a map.

    Without `pretrained` its weights are random: what to compare a pretrained detector with. Raises what
    `load_backbone` raises.
    """
    loaded = load_backbone(folder)
    if not pretrained:
        fresh: Backbone = named("backbones", loaded.card["family"]).from_config(loaded.backbone.config())
        loaded = MapBackbone(fresh, loaded.card)
    if not torch.is_inference_mode_enabled():  # what is built there can never be trained
        _freeze_idle(loaded.eval())
    return loaded.train()


def _freeze_idle(body: MapBackbone) -> None:
    """The final norm of a ViT or ConvNeXt feeds no map, and DistributedDataParallel fails on what gets no gradient."""
    side, weights = 2 * max(body.strides), list(body.parameters())
    with torch.enable_grad():
        summed = torch.stack([map_BCHW.sum() for map_BCHW in body(torch.zeros(1, 3, side, side))]).sum()
        gradients = torch.autograd.grad(summed, weights, allow_unused=True)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.requires_grad_(gradient is not None)


def is_plain(body: MapBackbone) -> bool:
    """Whether all its maps have one stride, as those of a plain ViT: it has no pyramid of its own."""
    return len(set(body.strides)) == 1


def is_usual_resnet(body: MapBackbone) -> bool:
    """Whether detection frameworks have this network themselves (`RESNET_DEPTHS`)."""
    return body.card["family"] == "timm" and body.backbone.name in RESNET_DEPTHS


def detector_levels(body: MapBackbone, finest: int | None = None) -> list[int]:
    """Which maps of a pyramid detectors take, fine to coarse: from stride 4; the stem's map is left out.

    Raises `UsageError` where their strides do not double, as detectors place objects by that, and where those from
    `finest` to 32 are not all there.
    """
    levels = [i for i, stride in enumerate(body.strides) if stride >= (finest or STRIDES[0])]
    strides = [body.strides[i] for i in levels]
    if not strides or any(coarse != 2 * fine for fine, coarse in pairwise(strides)):
        raise UsageError(
            f"the maps of {body.backbone.name} have strides {list(body.strides)}: a detector's double from 4 on"
        )
    wanted = [stride for stride in STRIDES if stride >= (finest or 0)]
    if finest is not None and strides != wanted:
        raise UsageError(f"the maps of {body.backbone.name} have strides {strides}: this pyramid is built on {wanted}")
    return levels


def even_stride(body: MapBackbone) -> int:
    """The power of two next to the stride of a plain ViT: 16 for patches of 14 and 16 pixels.

    Raises `UsageError` below 4 and above 32.
    """
    stride = 2 ** round(math.log2(body.strides[-1]))
    if not STRIDES[0] <= stride <= STRIDES[-1]:
        raise UsageError(f"{body.backbone.name} has patches of {body.strides[-1]} px: a detector's have 4 to 32")
    return int(stride)


def last_map(body: MapBackbone, x_BCHW: Tensor) -> Tensor:
    """The last map of a plain ViT at `even_stride`, for images of any size (B, C, H / stride, W / stride).

    Right and below, images are filled up with zeros (their mean, as they are normalised): to multiples of 32, as
    detectors do, and of the patch. Patches of 14 px give a map that is resampled to stride 16, as anchors know whole
    strides that double, and would drift from the objects otherwise.
    """
    patch, stride = body.strides[-1], even_stride(body)
    x_BCHW = _filled_up(x_BCHW, STRIDES[-1])
    height, width = (side // stride for side in x_BCHW.shape[-2:])
    map_BCHW: Tensor = body(_filled_up(x_BCHW, patch))[-1]
    if stride != patch:
        map_BCHW = F.interpolate(map_BCHW, scale_factor=patch / stride, mode="bilinear", align_corners=False)
    return map_BCHW[..., :height, :width]


def _filled_up(x_BCHW: Tensor, multiple: int) -> Tensor:
    below, right = (-side % multiple for side in x_BCHW.shape[-2:])
    return F.pad(x_BCHW, (0, right, 0, below)) if below or right else x_BCHW


class SimplePyramid(nn.Module):
    """A pyramid from one map (Li, Mao, Girshick and He, ECCV 2022, section 3), for plain ViTs.

    A finer level is a transposed convolution away from the map for each factor 2, which halves the width; a coarser
    one is pooled. Each then has a 1 x 1 and a 3 x 3 convolution, with layer norm.
    """

    def __init__(self, channels: int, stride: int, out_channels: int, strides: Sequence[int] = STRIDES) -> None:
        """
        channels, stride   of the map; the stride is a power of two
        strides            of the levels, powers of two
        """
        super().__init__()
        self.strides = tuple(strides)
        self.levels = nn.ModuleList(_level(channels, round(math.log2(stride / s)), out_channels) for s in strides)

    def forward(self, map_BCHW: Tensor) -> list[Tensor]:
        """One map -> the levels, each (B, out_channels, H_i, W_i)."""
        return [level(map_BCHW) for level in self.levels]


def _level(width: int, doublings: int, out_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.MaxPool2d(2**-doublings)] if doublings < 0 else []
    for left in range(doublings, 0, -1):
        layers.append(nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2))
        width //= 2
        if left > 1:
            layers += [_ChannelNorm(width), nn.GELU()]
    layers += [nn.Conv2d(width, out_channels, kernel_size=1, bias=False), _ChannelNorm(out_channels)]
    layers += [nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False), _ChannelNorm(out_channels)]
    return nn.Sequential(*layers)


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each place."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return super().forward(x_BCHW.movedim(1, -1)).movedim(-1, 1)
