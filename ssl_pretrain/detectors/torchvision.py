"""torchvision's detectors (Faster R-CNN, Mask R-CNN, RetinaNet, FCOS): a pretrained backbone under a feature pyramid.

from torchvision.models.detection import FasterRCNN, RetinaNet
from ssl_pretrain.detectors.torchvision import fpn
backbone = fpn("runs/x/artefact")
detector = FasterRCNN(backbone, num_classes, image_mean=backbone.input.mean, image_std=backbone.input.std)
backbone = fpn("runs/x/artefact", levels="P3-P7")
detector = RetinaNet(backbone, num_classes, image_mean=backbone.input.mean, image_std=backbone.input.std)
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Literal

from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from ssl_pretrain.artefact import MapBackbone
from ssl_pretrain.detectors._maps import STRIDES, SimplePyramid, detector_levels, even_stride, is_plain, last_map, load
from ssl_pretrain.errors import UsageError

FINEST = {"P2-P6": 4, "P3-P7": 8}
"""Stride of the first level: of torchvision's two-stage detectors, and of its one-stage detectors."""


class PyramidBackbone(nn.Module):
    """Maps of a backbone through a feature pyramid, as torchvision's detectors ask for it.

    Lin et al., 2017, for backbones with maps of several strides; `SimplePyramid` for plain ViTs.
    """

    def __init__(self, body: MapBackbone, out_channels: int, finest: int) -> None:
        super().__init__()
        self.body = body
        self.input = body.input
        """Give `input.mean` and `input.std` to the detector as `image_mean` and `image_std`."""
        self.out_channels = out_channels
        self.plain = is_plain(body)
        # Both of torchvision's kinds of pyramid have five levels: a pooled one on P5, or two learned ones.
        self.extra = LastLevelMaxPool() if finest == STRIDES[0] else LastLevelP6P7(out_channels, out_channels)
        if self.plain:
            strides = tuple(stride for stride in STRIDES if stride >= finest)
            self.fpn = SimplePyramid(body.channels[-1], even_stride(body), out_channels, strides)
        else:
            self.levels = detector_levels(body, finest)
            self.fpn = FeaturePyramidNetwork([body.channels[i] for i in self.levels], out_channels)

    def forward(self, x_BCHW: Tensor) -> OrderedDict[str, Tensor]:
        """Normalised images -> levels `0`, `1`... from fine to coarse, then `pool` or `p6`, `p7`; of `out_channels`.

        torchvision's detectors make sides multiples of 32; with other sides, levels end where their images end.
        """
        if self.plain:
            maps = self._levels_of_plain(x_BCHW)
        else:
            found = self.body(x_BCHW)
            maps = list(self.fpn(OrderedDict((str(k), found[i]) for k, i in enumerate(self.levels))).values())
        maps, names = self.extra(maps, maps, [str(k) for k in range(len(maps))])
        return OrderedDict(zip(names, maps, strict=True))

    def _levels_of_plain(self, x_BCHW: Tensor) -> list[Tensor]:
        maps = self.fpn(last_map(self.body, x_BCHW))
        height, width = x_BCHW.shape[-2:]
        return [m[..., : -(-height // s), : -(-width // s)] for m, s in zip(maps, self.fpn.strides, strict=True)]


def fpn(
    folder: str | Path,
    out_channels: int = 256,
    *,
    levels: Literal["P2-P6", "P3-P7"] = "P2-P6",
    pretrained: bool = True,
) -> PyramidBackbone:
    """The backbone of an artefact or run under a new pyramid, with every layer trainable that feeds a map.

    levels      `P2-P6` for Faster and Mask R-CNN, `P3-P7` for RetinaNet and FCOS, as torchvision builds them
    pretrained  False leaves random weights: what to compare a pretrained detector with
    Raises `UsageError` for maps that no pyramid can be built on, and what `load_backbone` raises.
    """
    if levels not in FINEST:
        raise UsageError(f"fpn(levels={levels!r}): there are {' and '.join(map(repr, FINEST))}")
    return PyramidBackbone(load(folder, pretrained), out_channels, FINEST[levels])
