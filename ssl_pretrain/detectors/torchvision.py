"""torchvision's detectors (Faster R-CNN, Mask R-CNN, RetinaNet, FCOS): a pretrained backbone under a feature pyramid.

from torchvision.models.detection import FasterRCNN
from ssl_pretrain.detectors.torchvision import fpn
backbone = fpn("runs/x/artefact")
detector = FasterRCNN(backbone, num_classes, image_mean=backbone.input.mean, image_std=backbone.input.std)
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from ssl_pretrain.artefact import load_backbone
from ssl_pretrain.errors import UsageError

FINEST_STRIDE = 4
"""torchvision's pyramids begin at C2 and leave out the stem's map."""


class PyramidBackbone(nn.Module):
    """Maps of a backbone through a feature pyramid (Lin et al., 2017), as torchvision's detectors ask for it."""

    def __init__(self, folder: str | Path, out_channels: int) -> None:
        super().__init__()
        self.body = load_backbone(folder).train()
        self.input = self.body.input
        """Give `input.mean` and `input.std` to the detector as `image_mean` and `image_std`."""
        if len(set(self.body.strides)) < len(self.body.strides):
            raise UsageError(
                f"all maps of {folder} have stride {self.body.strides[0]}: a plain ViT has no pyramid of maps"
            )
        self.levels = [i for i, stride in enumerate(self.body.strides) if stride >= FINEST_STRIDE]
        channels = [self.body.channels[i] for i in self.levels]
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra_blocks=LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, x_BCHW: Tensor) -> OrderedDict[str, Tensor]:
        """Normalised images -> levels `0`, `1`... from fine to coarse and `pool`, each of `out_channels`."""
        maps = self.body(x_BCHW)
        pyramid: OrderedDict[str, Tensor] = self.fpn(OrderedDict((str(k), maps[i]) for k, i in enumerate(self.levels)))
        return pyramid


def fpn(folder: str | Path, out_channels: int = 256) -> PyramidBackbone:
    """The backbone of an artefact or run under a new pyramid, with every layer trainable.

    Raises `UsageError` for a plain ViT, and what `load_backbone` raises.
    """
    return PyramidBackbone(folder, out_channels)
