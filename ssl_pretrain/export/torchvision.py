"""For torchvision's detectors: an artefact is taken as it is, and ResNets also in torchvision's own file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from safetensors.torch import load_file
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from ssl_pretrain.artefact import TOLERANCE, MapBackbone, apart, load_backbone
from ssl_pretrain.detectors._maps import is_usual_resnet
from ssl_pretrain.detectors.torchvision import PyramidBackbone, fpn
from ssl_pretrain.errors import DataError
from ssl_pretrain.export import BOXES, Arrived, Probe, parts, probe, trained
from ssl_pretrain.files import write_durably

OWN_FILE = "torchvision.safetensors"
KINDS = {
    "P2-P6": (FasterRCNN, "", 'RetinaNet and FCOS: levels="P3-P7"'),
    "P3-P7": (RetinaNet, ', levels="P3-P7"', "FCOS alike; it has no map of stride 4, which Faster R-CNN begins with"),
}
"""By the levels of a pyramid: a detector on it, what `fpn` is told, and what else there is."""


def write(folder: Path) -> str:
    """Adds `torchvision.safetensors` for a ResNet; returns the lines that load it.

    Raises `UsageError` for a backbone that no pyramid can be built on.
    """
    backbone = load_backbone(folder)
    levels = _levels(backbone)
    fpn(folder, levels=levels, pretrained=False)
    kind, argument, others = KINDS[levels]
    lines = f"""from torchvision.models.detection import {kind.__name__}
from ssl_pretrain.detectors.torchvision import fpn
backbone = fpn("{folder}"{argument})  # {others}
# num_classes counts the background
detector = {kind.__name__}(backbone, num_classes=2, image_mean=backbone.input.mean, image_std=backbone.input.std)"""
    if not is_usual_resnet(backbone):
        return lines
    write_durably(folder / OWN_FILE, save_safetensors(backbone.backbone.weights(), metadata={"format": "pt"}))
    mean, std = list(backbone.input.mean), list(backbone.input.std)
    return f"""{lines}
# or without this package; torchvision's own default would freeze BatchNorm and the first layers
from safetensors.torch import load_file
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
backbone = resnet_fpn_backbone(
    backbone_name="{backbone.backbone.name}", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
)
backbone.body.load_state_dict(load_file("{folder / OWN_FILE}"))
detector = FasterRCNN(backbone, num_classes=2, image_mean={mean}, image_std={std})"""


def arrive(folder: Path) -> Arrived:
    """The maps in a Faster R-CNN, of an image that its own transform normalised; then it is trained."""
    artefact = load_backbone(folder)
    probed = probe(folder, artefact.input)
    levels = _levels(artefact)
    kind, argument, _ = KINDS[levels]
    detector = _detector(kind, fpn(folder, levels=levels), probed)
    maps = _maps(detector, probed)
    fresh = _maps(_detector(kind, fpn(folder, levels=levels, pretrained=False), probed), probed)
    notes = ["every layer that feeds a map is trainable, BatchNorm included"]
    if is_usual_resnet(artefact) and (folder / OWN_FILE).is_file():
        notes.append(_own_file(folder, artefact, probed))
    initialised, parameters, random = parts(detector, [detector.backbone.body])
    return Arrived(
        consumer=f"torchvision {torchvision.__version__}, {kind.__name__}",
        route=f'{kind.__name__}(fpn("{folder}"{argument}), image_mean=..., image_std=...), before training',
        maps={f"map_{i}": map_BCHW for i, map_BCHW in enumerate(maps)},
        fresh={f"map_{i}": map_BCHW for i, map_BCHW in enumerate(fresh)},
        initialised=initialised,
        parameters=parameters,
        random=random,
        trained=_trained(detector, probed),
        notes=tuple(notes),
    )


def _levels(backbone: MapBackbone) -> Literal["P2-P6", "P3-P7"]:
    """Two-stage detectors begin at stride 4, which some backbones (YOLO's) have no map of."""
    return "P2-P6" if min(backbone.strides) <= 4 or len(set(backbone.strides)) == 1 else "P3-P7"


def _detector(kind: Callable[..., Any], backbone: PyramidBackbone, probed: Probe) -> Any:
    """The user's lines, with sizes at which the probe's image is not resized."""
    side = probed.rgb_BCHW.shape[-1]
    mean, std = backbone.input.mean, backbone.input.std
    return kind(backbone, num_classes=2, image_mean=mean, image_std=std, min_size=side, max_size=side)


def _maps(detector: Any, probed: Probe) -> list[Tensor]:
    """As the detector sees the image, less the border that its transform adds."""
    height, width = probed.rgb_BCHW.shape[-2:]
    detector.eval()
    with torch.inference_mode():
        fed_BCHW = detector.transform(list(probed.rgb_BCHW))[0].tensors[..., :height, :width]
        maps: list[Tensor] = detector.backbone.body(fed_BCHW)
    return maps


def _own_file(folder: Path, artefact: MapBackbone, probed: Probe) -> str:
    """Torchvision's own ResNet with its file, compared; in words. Raises `DataError` where it gives other maps."""
    theirs = resnet_fpn_backbone(
        backbone_name=artefact.backbone.name, weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    theirs.body.load_state_dict(load_file(folder / OWN_FILE))
    with torch.inference_mode():
        found = list(theirs.eval().body(probed.x_BCHW).values())
    expected = list(probed.maps.values())[-len(found) :]
    far = max(apart(a, b) for a, b in zip(found, expected, strict=True))
    if far > TOLERANCE:
        raise DataError(f"{folder / OWN_FILE} gives torchvision other maps ({far:.1e} apart): export again")
    return f"resnet_fpn_backbone with {OWN_FILE}, loaded strictly: maps {far:.1e} apart"


def _trained(detector: Any, probed: Probe) -> str:
    boxes = BOXES * probed.rgb_BCHW.shape[-1]
    targets = [{"boxes": boxes, "labels": torch.ones(2, dtype=torch.long)}]
    detector.train()
    return trained(detector, lambda: sum(detector(list(probed.rgb_BCHW), targets).values(), torch.zeros(())))
