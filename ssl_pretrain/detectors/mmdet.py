"""MMDetection: on import, a backbone and a pyramid are in MMEngine's registry, where all of OpenMMLab looks.

custom_imports = dict(imports=["ssl_pretrain.detectors.mmdet"], allow_failed_imports=False)
model = dict(
    data_preprocessor=dict(mean=..., std=..., bgr_to_rgb=True),     # 255 times `input` of the artefact
    backbone=dict(_delete_=True, type="SSLBackbone", path="runs/x/artefact"),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
`ssl-pretrain export --to mmdet` writes these lines with their numbers.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from ssl_pretrain.detectors._maps import STRIDES, SimplePyramid, detector_levels, even_stride, is_plain, last_map, load
from ssl_pretrain.errors import UsageError

FINEST = {"P2-P6": 4, "P3-P7": 8}
"""Stride of the first level, of two-stage detectors and of RetinaNet, FCOS and their kin."""


@MODELS.register_module()
class SSLBackbone(nn.Module):
    """The backbone of an artefact or run: its maps of stride 4, 8, 16 and 32, or the last map of a plain ViT.

    path        the folder; it is needed again wherever the detector is built
    norm_eval   whether BatchNorm keeps the statistics of pretraining while the detector is trained
    pretrained  False leaves random weights: what to compare a pretrained detector with

    Every layer that feeds a map is trainable. Weights are there when it is built; it has no `init_weights`, by which
    MMEngine would draw them again. Raises what `load_backbone` raises.
    """

    def __init__(self, path: str, norm_eval: bool = False, pretrained: bool = True) -> None:
        super().__init__()
        self.body = load(path, pretrained)
        self.norm_eval = norm_eval
        self.plain = is_plain(self.body)
        self.levels = [len(self.body.strides) - 1] if self.plain else detector_levels(self.body)
        """Which maps of the artefact."""
        self.strides = [even_stride(self.body)] if self.plain else [self.body.strides[i] for i in self.levels]
        self.channels = [self.body.channels[i] for i in self.levels]
        """What the neck wants as `in_channels`."""
        self.train()

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Normalised images -> maps, fine to coarse."""
        if self.plain:
            return (last_map(self.body, x_BCHW),)
        maps = self.body(x_BCHW)
        return tuple(maps[i] for i in self.levels)

    def train(self, mode: bool = True) -> SSLBackbone:
        """As for every module, but for BatchNorm, which stays in evaluation with `norm_eval`."""
        super().train(mode)
        for module in self.modules() if self.norm_eval else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


@MODELS.register_module()
class SSLPyramid(nn.Module):
    """A neck for a plain ViT: five levels from its one map (Li et al., ECCV 2022).

    in_channels, stride   of the map: `channels` and `strides` of the backbone
    levels                `P2-P6` for Faster R-CNN and its kin, `P3-P7` for RetinaNet, FCOS...
    """

    def __init__(
        self,
        in_channels: int,
        stride: int,
        out_channels: int = 256,
        levels: Literal["P2-P6", "P3-P7"] = "P2-P6",
    ) -> None:
        super().__init__()
        if levels not in FINEST:
            raise UsageError(f"SSLPyramid(levels={levels!r}): there are {' and '.join(map(repr, FINEST))}")
        strides = [s for s in STRIDES if s >= FINEST[levels]]
        self.pyramid = SimplePyramid(in_channels, stride, out_channels, strides)
        learned = 2 if levels == "P3-P7" else 0
        self.learned = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, 2, 1) for _ in range(learned))

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """(map,) -> five levels, fine to coarse."""
        maps = self.pyramid(inputs[-1])
        if not self.learned:
            return (*maps, F.max_pool2d(maps[-1], kernel_size=1, stride=2))
        for i, conv in enumerate(self.learned):
            maps.append(conv(F.relu(maps[-1]) if i else maps[-1]))
        return tuple(maps)
