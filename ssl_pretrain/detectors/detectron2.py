"""Detectron2: on import, any pretrained backbone is in its registry, alone or under a pyramid.

from detectron2 import model_zoo
from detectron2.config import get_cfg
from ssl_pretrain.detectors.detectron2 import add_config
cfg = get_cfg()
add_config(cfg)                                         # the node MODEL.SSL_PRETRAIN
cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml"))
cfg.merge_from_file("runs/x/export/detectron2.yaml")    # which `ssl-pretrain export --to detectron2` writes

MODEL.BACKBONE.NAME is one of
    ssl_pretrain                the maps: `res2`... `res5` by their strides 4... 32, or `last_feat` of a plain ViT
    ssl_pretrain_fpn            levels `p2`... `p6`, for Faster and Mask R-CNN
    ssl_pretrain_retinanet_fpn  levels `p3`... `p7`, for RetinaNet and FCOS
and MODEL.SSL_PRETRAIN.ARTEFACT is the folder of an artefact or run. MODEL.WEIGHTS stays for checkpoints of a whole
detector; it must be empty at the start, as a base config names weights of another network there. FREEZE_AT and
MODEL.RESNETS mean nothing here: every layer that feeds a map is trainable.
"""

from __future__ import annotations

import math
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor

from ssl_pretrain.detectors._maps import STRIDES, SimplePyramid, detector_levels, even_stride, is_plain, last_map, load
from ssl_pretrain.errors import UsageError

LAST = "last_feat"
"""Detectron2's own name of the one map of a plain ViT."""


def add_config(cfg: CfgNode) -> None:
    """Adds the node MODEL.SSL_PRETRAIN to a config, before a file that has it is merged."""
    cfg.MODEL.SSL_PRETRAIN = CfgNode({"ARTEFACT": "", "PRETRAINED": True})


class Maps(Backbone):  # type: ignore[misc]  # detectron2 has no types
    """The maps of an artefact's backbone by Detectron2's names.

    body    the backbone, in training mode, every layer trainable that feeds a map
    plain   whether it has one stride only (plain ViT)
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        if "SSL_PRETRAIN" not in cfg.MODEL or not cfg.MODEL.SSL_PRETRAIN.ARTEFACT:
            raise UsageError("MODEL.SSL_PRETRAIN.ARTEFACT is empty: add_config(cfg), then set it to an artefact")
        self.body = load(cfg.MODEL.SSL_PRETRAIN.ARTEFACT, cfg.MODEL.SSL_PRETRAIN.PRETRAINED)
        self.plain = is_plain(self.body)
        self.levels: dict[str, int] = {}
        """Of a backbone with several strides: index of the map by its name."""
        self._out_feature_strides: dict[str, int] = {LAST: even_stride(self.body)} if self.plain else {}
        if not self.plain:
            self.levels = {_name("res", self.body.strides[i]): i for i in detector_levels(self.body)}
            self._out_feature_strides = {name: self.body.strides[i] for name, i in self.levels.items()}
        self._out_feature_channels = {name: self.body.channels[self.levels.get(name, -1)]
                                      for name in self._out_feature_strides}  # fmt: skip
        self._out_features = list(self._out_feature_strides)

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        """Normalised images -> maps by their names, fine to coarse."""
        if self.plain:
            return {LAST: last_map(self.body, x_BCHW)}
        maps = self.body(x_BCHW)
        return {name: maps[i] for name, i in self.levels.items()}

    @property
    def size_divisibility(self) -> int:
        """To what images are filled up."""
        return STRIDES[-1]


class Pyramid(Backbone):  # type: ignore[misc]  # detectron2 has no types
    """A plain ViT under a simple feature pyramid.

    Not Detectron2's own class, which lets images of any size through unpadded and knows patches of 16 px only.
    """

    def __init__(self, bottom_up: Maps, out_channels: int, finest: int, top: Any) -> None:
        super().__init__()
        self.bottom_up = bottom_up
        strides = [stride for stride in STRIDES if stride >= finest]
        self.pyramid = SimplePyramid(bottom_up.body.channels[-1], even_stride(bottom_up.body), out_channels, strides)
        self.top_block = top
        self._out_features = [_name("p", stride) for stride in strides]
        self._out_features += [f"p{6 + i}" for i in range(top.num_levels)]
        self._out_feature_strides = {name: 2 ** int(name[1:]) for name in self._out_features}
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        """Normalised images, with sides that are multiples of 32 -> levels by their names, fine to coarse."""
        maps = self.pyramid(self.bottom_up(x_BCHW)[LAST])
        return dict(zip(self._out_features, [*maps, *self.top_block(maps[-1])], strict=True))

    @property
    def size_divisibility(self) -> int:
        """To what images are filled up."""
        return STRIDES[-1]


def ssl_pretrain(cfg: CfgNode, input_shape: ShapeSpec) -> Maps:
    """The maps alone."""
    return Maps(cfg)


def ssl_pretrain_fpn(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Levels from stride 4, and one pooled from the coarsest."""
    return _pyramid(cfg, 4, LastLevelMaxPool())


def ssl_pretrain_retinanet_fpn(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Levels from stride 8, and two learned from the coarsest."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return _pyramid(cfg, 8, LastLevelP6P7(channels, channels, "p5"))


def _pyramid(cfg: CfgNode, finest: int, top: Any) -> Backbone:
    maps, fpn = Maps(cfg), cfg.MODEL.FPN
    if maps.plain:
        return Pyramid(maps, fpn.OUT_CHANNELS, finest, top)
    names = [_name("res", maps.body.strides[i]) for i in detector_levels(maps.body, finest)]
    return FPN(maps, names, fpn.OUT_CHANNELS, fpn.NORM, top_block=top, fuse_type=fpn.FUSE_TYPE)


def _name(prefix: str, stride: int) -> str:
    return f"{prefix}{round(math.log2(stride))}"


for _builder in (ssl_pretrain, ssl_pretrain_fpn, ssl_pretrain_retinanet_fpn):
    BACKBONE_REGISTRY.register(_builder)
