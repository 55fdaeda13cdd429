"""For timm: an artefact is what timm reads, so nothing is added to it."""

from __future__ import annotations

from pathlib import Path

import torch

from ssl_pretrain.artefact import load_backbone
from ssl_pretrain.errors import UsageError
from ssl_pretrain.export import Arrived, parts, probe


def write(folder: Path) -> str:
    """Adds nothing; returns the line that loads it. Raises `UsageError` for a network that is not timm's."""
    backbone = load_backbone(folder)
    if backbone.card["family"] != "timm":
        raise UsageError(
            f"timm has no network {backbone.backbone.name}: it is of the family {backbone.card['family']}; "
            "export it --to onnx or --to safetensors"
        )
    return f'timm.create_model("local-dir:{folder}", pretrained=True, features_only=True)'


def arrive(folder: Path) -> Arrived:
    """The maps of `features_only=True`, of an image normalised by the mean and std that timm read.

    Not by `checkpoint_path=`: that way fails for ConvNeXt and ViT, and loses mean and std.
    """
    import timm

    source = f"local-dir:{folder}"
    loaded = timm.create_model(source, pretrained=True, features_only=True).eval()
    fresh = timm.create_model(source, pretrained=False, features_only=True).eval()
    card = loaded.pretrained_cfg
    probed = probe(folder, load_backbone(folder).input)
    mean_C11, std_C11 = (torch.tensor(card[key]).view(3, 1, 1) for key in ("mean", "std"))
    x_BCHW = (probed.rgb_BCHW - mean_C11) / std_C11
    with torch.inference_mode():
        maps, control = loaded(x_BCHW), fresh(x_BCHW)
    initialised, parameters, random = parts(loaded, [loaded])
    return Arrived(
        consumer=f"timm {timm.__version__}, {type(loaded).__name__}",
        route=f'timm.create_model("{source}", pretrained=True, features_only=True)',
        maps={f"map_{i}": map_BCHW for i, map_BCHW in enumerate(maps)},
        fresh={f"map_{i}": map_BCHW for i, map_BCHW in enumerate(control)},
        initialised=initialised,
        parameters=parameters,
        random=random,
        notes=("with num_classes= of your own timm loads loosely: a file that lacks tensors would pass unnoticed",),
    )
