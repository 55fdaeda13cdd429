"""For anything that reads safetensors: `backbone.safetensors`, which says itself how its network is built and fed.

The tensors of the artefact's `model.safetensors` under the same keys, and in the file's metadata what `config.json`
has beside it there: for those who keep one file only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import __version__, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ssl_pretrain.artefact import MapBackbone, load_backbone
from ssl_pretrain.backbones import Backbone
from ssl_pretrain.errors import DataError
from ssl_pretrain.export import Arrived, parts, probe
from ssl_pretrain.files import write_durably
from ssl_pretrain.named import named

FILE = "backbone.safetensors"


def write(folder: Path) -> str:
    """Adds `backbone.safetensors` in FP32; returns the lines that load it, strictly."""
    backbone = load_backbone(folder)
    weights = {name: tensor.detach().contiguous() for name, tensor in backbone.backbone.weights().items()}
    write_durably(folder / FILE, save(weights, metadata=_metadata(backbone)))
    return f"{_built(backbone)}(load_file({str(folder / FILE)!r}))"


def _built(backbone: MapBackbone) -> str:
    """The Python that builds the network with random weights, up to the method that loads others strictly."""
    name = repr(backbone.backbone.name)
    load = "from safetensors.torch import load_file"
    if backbone.card["family"] == "timm":
        args = "".join(f", {key}={value!r}" for key, value in backbone.backbone.config()["model_args"].items())
        return f"import timm\n{load}\nnetwork = timm.create_model({name}, num_classes=0{args})\nnetwork.load_state_dict"
    return f"from ssl_pretrain import backbones\n{load}\nnetwork = backbones.create({name})\nnetwork.load_weights"


def _metadata(backbone: MapBackbone) -> dict[str, str]:
    """Strings, as the format asks for; the lists and mappings are JSON."""
    card = backbone.card
    config = backbone.backbone.config()
    return {
        "format": "pt",
        "family": card["family"],
        "config": json.dumps(config),
        "architecture": config["architecture"],
        "input": json.dumps(card["input"]),
        "levels": json.dumps(card["levels"]),
        "shapes_sha256": card["shapes_sha256"],
        "weights_sha256": card["weights_sha256"],
    }


def arrive(folder: Path) -> Arrived:
    """The network that the file's metadata describes, with the file's tensors; nothing of `config.json` is used."""
    source = load_backbone(folder)
    with safe_open(folder / FILE, framework="pt") as file:
        metadata = file.metadata() or {}
    if metadata != _metadata(source):
        raise DataError(f"{folder / FILE} is not of this artefact: export it again")
    build = _timm if metadata["family"] == "timm" else _family
    config, fed = json.loads(metadata["config"]), json.loads(metadata["input"])
    mean_C11, std_C11 = (torch.tensor(fed[key]).view(3, 1, 1) for key in ("mean", "std"))
    x_BCHW = (probe(folder, source.input).rgb_BCHW - mean_C11) / std_C11
    try:
        loaded, found = build(metadata["family"], config, load_file(folder / FILE), x_BCHW)
    except RuntimeError as error:
        raise DataError(
            f"{folder / FILE} does not fit {config['architecture']}: {' '.join(str(error).split())}"
        ) from error
    _, control = build(metadata["family"], config, None, x_BCHW)
    count = len(source.strides)
    initialised, parameters, random = parts(loaded, [loaded])
    return Arrived(
        consumer=f"safetensors {__version__}, {metadata['family']}'s {type(loaded).__name__}",
        route=f'load_file("{folder / FILE}"), strictly',
        maps={f"map_{i}": map_BCHW for i, map_BCHW in enumerate(found[-count:])},
        fresh={f"map_{i}": map_BCHW for i, map_BCHW in enumerate(control[-count:])},
        initialised=initialised,
        parameters=parameters,
        random=random,
    )


def _timm(
    family: str, config: dict[str, Any], weights: dict[str, Tensor] | None, x_BCHW: Tensor
) -> tuple[nn.Module, list[Tensor]]:
    """timm's network as the lines build it, random without weights, and the maps of all its stages or blocks."""
    import timm

    network = timm.create_model(config["architecture"], pretrained=False, num_classes=0, **config["model_args"])
    if weights is not None:
        network.load_state_dict(weights)
    with torch.inference_mode():
        return network, network.eval().forward_intermediates(x_BCHW, intermediates_only=True)


def _family(
    family: str, config: dict[str, Any], weights: dict[str, Tensor] | None, x_BCHW: Tensor
) -> tuple[nn.Module, list[Tensor]]:
    """The same of another family of this package."""
    backbone: Backbone = named("backbones", family).from_config(config)
    if weights is not None:
        backbone.load_weights(weights)
    with torch.inference_mode():
        return backbone, backbone.eval().maps(x_BCHW)
