"""Hugging Face's detectors (RT-DETR, DETR, Deformable DETR, Mask2Former...): a pretrained backbone inside.

from transformers import RTDetrConfig, RTDetrForObjectDetection, TimmBackboneConfig
from ssl_pretrain.detectors.hf import load_into
inside = TimmBackboneConfig(backbone="resnet18", out_indices=[2, 3, 4])
detector = RTDetrForObjectDetection(RTDetrConfig(backbone_config=inside, encoder_in_channels=[128, 256, 512]))
load_into(detector, "runs/x/artefact")

Not by `TimmBackboneConfig(backbone="local-dir:...")`, which gives random weights, nor by
`TimmBackbone.from_pretrained`, which sets the statistics of every BatchNorm back to 0 and 1: neither says so
(transformers 5.23). Older versions (5.0) download other weights unless given `use_pretrained_backbone=False`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_pretrain.artefact import TOLERANCE, MapBackbone, apart, load_backbone
from ssl_pretrain.backbones import InputSpec
from ssl_pretrain.errors import DataError, UsageError


@dataclass(frozen=True)
class Loaded:
    """What a detector holds of an artefact, after its maps were compared with the artefact's own."""

    where: str
    """Name of the module that gives the maps: `model.backbone.model._backbone`."""
    strides: tuple[int, ...]
    """Of the maps that the detector takes, in input pixels."""
    apart: float
    """Largest difference of a map, by its largest value."""
    initialised: int
    """Parameters of the detector that came from the artefact; those that it froze into buffers are not counted."""
    parameters: int
    """All of them."""
    input: InputSpec
    """Give `input.mean` and `input.std` to the image processor, with `do_normalize=True`: RT-DETR's has it off."""


def load_into(model: nn.Module, folder: str | Path) -> Loaded:
    """Puts weights and BatchNorm statistics of an artefact or run into the backbone of a detector, and checks its maps.

    The backbone is one of timm's (`TimmBackboneConfig(backbone=...)`) or Hugging Face's own ResNet; BatchNorms that the
    detector has frozen are filled too. Raises `UsageError` where there is no such backbone or it is another network,
    `DataError` where it has the weights and gives other maps, and what `load_backbone` raises.
    """
    source = load_backbone(folder)
    place = _place(model, source)
    weights = source.backbone.weights()
    with torch.no_grad():
        place.network.load_state_dict({theirs: weights[ours] for theirs, ours in place.keys.items()})
    return check(model, folder)


def check(model: nn.Module, folder: str | Path) -> Loaded:
    """Compares the maps that a detector's backbone gives of a seeded image with those of an artefact or run.

    To be called again after `from_pretrained`, or in a trainer's callback. Leaves the detector as it was. Raises
    `DataError` where they differ, `UsageError` where the backbone is not found.
    """
    source = load_backbone(folder)
    place = _place(model, source)
    side = 2 * max(source.strides)
    first = next(place.network.parameters())
    x_BCHW = torch.randn((1, 3, side, side), generator=torch.Generator().manual_seed(0))
    expected: Any = source.backbone.get_submodule("network")
    training = [module for module in place.network.modules() if module.training]
    place.network.eval()
    with torch.inference_mode():
        every = expected.forward_intermediates(x_BCHW, intermediates_only=True)
        maps = _maps(place.network(x_BCHW.to(first)))
    for module in training:
        module.training = True
    far = max(_nearest(map_BCHW.float().cpu(), every) for map_BCHW in maps)
    if far > TOLERANCE:
        raise DataError(
            f"{type(model).__name__} does not give the maps of {folder}: at {place.name} they are {far:.1e} "
            "apart; load_into puts the weights in, after anything that builds or initialises the detector"
        )
    return Loaded(
        where=place.name,
        strides=tuple(side // map_BCHW.shape[-1] for map_BCHW in maps),
        apart=far,
        initialised=sum(p.numel() for p in place.network.parameters()),
        parameters=sum(p.numel() for p in model.parameters()),
        input=source.input,
    )


@dataclass(frozen=True)
class _Place:
    name: str
    network: nn.Module
    keys: Mapping[str, str]
    """Its own key of each of its tensors -> the artefact's."""


def _place(model: nn.Module, source: MapBackbone) -> _Place:
    """The module of a detector whose tensors have the names and shapes of the artefact's."""
    if source.card["family"] != "timm":
        raise UsageError(f"Hugging Face's detectors take networks of timm, and not {source.backbone.name}")
    weights = source.backbone.weights()
    spelt = {_spelling(key): key for key in weights}
    reason = "it has none of timm's and no ResNetBackbone"
    for name, module in model.named_modules():
        timms = KINDS.get(type(module).__name__)
        if timms is None:
            continue
        state = module.state_dict()
        keys = {theirs: spelt.get(_spelling(timms(theirs)), "") for theirs in state}
        wrong = [theirs for theirs, ours in keys.items() if not ours or weights[ours].shape != state[theirs].shape]
        if not wrong:
            return _Place(name, module, keys)
        reason = f"that at {name} has another {wrong[0]} {tuple(state[wrong[0]].shape)}"
    size = f", img_size {source.input.size_px}" if len(set(source.strides)) == 1 else ""
    raise UsageError(
        f"{type(model).__name__} has no backbone {source.backbone.name}{size}: {reason}; build it with "
        f"backbone_config=TimmBackboneConfig(backbone={source.backbone.name!r}, out_indices=[...])"
    )


def _spelling(key: str) -> str:
    """timm's `features_only` turns `stages.0.` into `stages_0.`."""
    return key.replace(".", "_")


def _resnet(key: str) -> str:
    """timm's name of a tensor of Hugging Face's ResNetBackbone: the usual one (v1.5)."""
    return _residual(
        key.replace("embedder.embedder.convolution", "conv1").replace("embedder.embedder.normalization", "bn1"), 0
    )


def _resnet_d(key: str) -> str:
    """The same of RTDetrResNetBackbone, which is timm's `resnet50d`: three convolutions first, pooled shortcuts."""
    stem = {"0.convolution": "conv1.0", "0.normalization": "conv1.1", "1.convolution": "conv1.3",
            "1.normalization": "conv1.4", "2.convolution": "conv1.6", "2.normalization": "bn1"}  # fmt: skip
    found = re.fullmatch(r"embedder\.embedder\.(\d\.\w+)(\.\w+)", key)
    return stem[found[1]] + found[2] if found else _residual(key, 1)


def _residual(key: str, shortcut: int) -> str:
    found = re.fullmatch(
        r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(?:layer\.(\d+)|shortcut(?:\.1)?)\.(convolution|normalization)(\.\w+)",
        key,
    )
    if not found:
        return key
    stage, block, index, what, rest = found.groups()
    if index is None:
        inside = f"downsample.{shortcut + (what == 'normalization')}"
    else:
        inside = f"{'conv' if what == 'convolution' else 'bn'}{int(index) + 1}"
    return f"layer{int(stage) + 1}.{block}.{inside}{rest}"


KINDS: Mapping[str, Callable[[str], str]] = {
    "FeatureListNet": str,
    "FeatureDictNet": str,
    "FeatureHookNet": str,
    "FeatureGetterNet": lambda key: key.removeprefix("model."),
    "ResNetBackbone": _resnet,
    "RTDetrResNetBackbone": _resnet_d,
}
"""Classes that give maps, and timm's name of a tensor by theirs. Known by name: importing them would import it all."""


def _maps(given: Any) -> list[Tensor]:
    """Of timm's networks, which give lists, and Hugging Face's, which give a dictionary."""
    if isinstance(given, dict):
        return list(given.get("feature_maps", given.values()))
    return list(given)


def _nearest(map_BCHW: Tensor, every: list[Tensor]) -> float:
    """Difference from the nearest of all maps that the network has."""
    return min(apart(map_BCHW, own_BCHW) for own_BCHW in every)
