"""What features are compared with: the pixels themselves, the same network untrained, and ImageNet's weights.

Shapes: N objects, S side of their crops in pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from ssl_pretrain.artefact import resolve
from ssl_pretrain.backbones import Backbone
from ssl_pretrain.named import named

BATCH, MOST = 64, 1024
"""Crops that statistics are estimated on: how many at once, and at most."""
ALL, NONE = "baselines", "none"


def chosen(spec: str, against: Sequence[str], size_px: int | None = None) -> dict[str, Backbone]:
    """The backbone to be judged, and then those that it is compared with, by the names that tables show.

    `against` lists what `artefact.resolve` takes, or is one word: `baselines` for all of this page that fit, `none`.
    """
    judged = resolve(spec, size_px)
    found = {spec: judged}
    if list(against) == [ALL]:
        if spec != "pixels":
            found["pixels"] = resolve("pixels")
            found[f"untrained {judged.name}"] = untrained(judged)
        published = imagenet(judged) if spec != f"timm:{judged.name}" else None
        if published is not None:
            found[f"timm:{judged.name}"] = published
        return found
    if list(against) == [NONE]:
        return found
    return found | {name: resolve(name, size_px) for name in against}


def untrained(backbone: Backbone, seed: int = 0) -> Backbone:
    """The same architecture with random weights."""
    family = type(backbone).__module__.rpartition(".")[2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh: Backbone = named("backbones", family).from_config(backbone.config())
    fresh.input = backbone.input
    return fresh.eval()


def settled(backbone: Backbone, crops_NSSC: np.ndarray) -> Backbone:
    """A copy of an untrained backbone with the BatchNorm statistics of these crops (uint8 RGB); any other as it is.

    Without them it would be too easily beaten: on 370 real fields a random ResNet-18 has a balanced accuracy of .327 as
    it is born and .398 so, and .40 is all that 100 steps of a method that learned nothing gave too.
    """
    norms = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms or any(norm.running_mean is None or norm.running_mean.any() for norm in norms):
        return backbone
    backbone = copy.deepcopy(backbone)
    kept = crops_NSSC[np.linspace(0, len(crops_NSSC) - 1, min(MOST, len(crops_NSSC))).astype(np.int64)]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.input.mean, backbone.input.std))
    x_NCSS = (torch.from_numpy(kept).permute(0, 3, 1, 2).float() / 255 - mean) / std
    # Even parts: a last batch of one or two would weigh as much as the others.
    update_bn(x_NCSS.tensor_split(-(-len(x_NCSS) // BATCH)), backbone)
    return backbone


def imagenet(backbone: Backbone) -> Backbone | None:
    """The weights that timm publishes for this architecture, where they are on this machine; nothing is fetched.

    None where they do not, or where timm has none.
    """
    timm = named("backbones", "timm")
    if not isinstance(backbone, timm.TimmViT | timm.TimmPyramid):
        return None
    file = timm.at_hand(backbone.name)
    published: Backbone | None = None if file is None else timm.from_file(backbone.config(), file).eval()
    return published
