"""The artefact: a pretrained backbone as a folder in timm's and Hugging Face's layout, that can prove itself.

    config.json        timm's card, and one block `ssl_pretrain`: input contract, levels, hashes, origin, scores
    model.safetensors  the weights in FP32 under timm's keys
    probe.safetensors  a seeded image and the maps it must give
    README.md          the model card

Everything else (files of detection frameworks) is derived from it. Reading it needs torch, timm and safetensors only.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from ssl_pretrain import backbones
from ssl_pretrain.backbones import Backbone, InputSpec, MaskableBackbone
from ssl_pretrain.errors import DataError, UsageError
from ssl_pretrain.files import write_durably
from ssl_pretrain.named import named

SCHEMA = 1
OWN = frozenset({"schema", "family", "input", "levels", "tokens", "shapes_sha256", "weights_sha256"})
"""Keys of the card that `write` finds out itself; the rest is the origin."""
TOLERANCE = 1e-4
"""Largest difference of a map, relative to its largest value, between two machines with the same weights."""
FAR = 1e9
"""Stands for no comparison: JSON knows no infinity."""


class MapBackbone(nn.Module):
    """A backbone as a detector uses it: images in, feature maps out. Call `.train()` to fine-tune it."""

    def __init__(self, backbone: Backbone, card: Mapping[str, Any]) -> None:
        super().__init__()
        self.backbone = backbone
        self.card = card
        """The `ssl_pretrain` block of `config.json`."""
        self.input: InputSpec = backbone.input
        """Feed it RGB values in 0..1, less `input.mean`, divided by `input.std`."""
        self.strides = backbone.strides
        self.channels = backbone.channels

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) -> maps (B, C_i, H / stride_i, W / stride_i), fine to coarse."""
        return self.backbone.maps(x_BCHW)


def write(folder: Path, backbone: Backbone, origin: Mapping[str, Any]) -> Path:
    """Writes the artefact of a backbone; `origin` (recipe, data, scores...) goes into the card. Returns the folder.

    Raises `DataError` when a weight is not finite. Files are replaced one by one, `config.json` last.
    """
    weights = _stored(backbone)
    broken = [name for name, t in weights.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if broken:
        raise DataError(f"the backbone is not exported: {broken[0]} holds values that are not finite")
    content = _file(weights)
    config = backbone.config()
    config["ssl_pretrain"] = {
        "schema": SCHEMA,
        "family": type(backbone).__module__.rpartition(".")[2],
        "input": {key: list(v) if isinstance(v, tuple) else v for key, v in vars(backbone.input).items()},
        "levels": [{"stride": s, "channels": c} for s, c in zip(backbone.strides, backbone.channels, strict=True)],
        "shapes_sha256": _shapes(weights),
        "weights_sha256": hashlib.sha256(content).hexdigest(),
        **origin,
    }
    if isinstance(backbone, MaskableBackbone):
        tokens = {"class": backbone.class_token, "prefix": backbone.prefix_tokens, "patch_px": backbone.patch_px}
        config["ssl_pretrain"]["tokens"] = {**tokens, "grid": list(backbone.grid)}
    clean = _rebuilt(config, weights)
    write_durably(folder / "model.safetensors", content)
    write_durably(folder / "probe.safetensors", save_safetensors(_probe(clean)))
    write_durably(folder / "README.md", _readme(folder.name, config).encode())
    write_durably(folder / "config.json", json.dumps(config, indent=2).encode())
    return folder


def weights_sha256(backbone: Backbone) -> str:
    """SHA-256 of the weights' file, as an artefact would have it: equal to its card's `weights_sha256`."""
    return hashlib.sha256(_file(_stored(backbone))).hexdigest()


def read(folder: Path) -> Backbone:
    """The backbone of an artefact, in evaluation mode, its files checked against their hashes.

    Raises `UsageError` where there is no artefact and `DataError` where it is not what was written.
    """
    config = _config(folder)
    card = config["ssl_pretrain"]
    try:
        content = _bytes(folder / "model.safetensors")
        weights = load_safetensors(content)
    except (OSError, SafetensorError, struct.error) as error:
        raise DataError(f"the weights in {folder} cannot be read: {error}") from error
    if hashlib.sha256(content).hexdigest() != card["weights_sha256"]:
        raise DataError(f"{folder / 'model.safetensors'} is not the file that was exported (its sha-256 differs)")
    if _shapes(weights) != card["shapes_sha256"]:
        raise DataError(f"the tensors in {folder} do not have the names and shapes that config.json states")
    return _rebuilt(config, weights)


def load_backbone(folder: str | Path) -> MapBackbone:
    """A pretrained backbone, ready for a detector: `maps = load_backbone("runs/x/artefact")(images)`.

    Takes an artefact or a run folder. The module has `.strides`, `.channels` and `.input`, is in evaluation mode, and
    has shown that it gives the maps it was exported with. Raises `UsageError` or `DataError` in one line.
    """
    path = find(Path(folder))
    backbone = read(path)
    try:
        expected = load_safetensors(_bytes(path / "probe.safetensors"))
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path / 'probe.safetensors'} cannot be read: {error}") from error
    try:
        found = _probe(backbone)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{path / 'config.json'} states an input that its network cannot take: {error}") from error
    if set(expected) != set(found):
        raise DataError(f"{path / 'probe.safetensors'} has other maps than the backbone gives")
    for name, map_BCHW in expected.items():
        if apart(found[name], map_BCHW) > TOLERANCE:
            far = f"{name} is {apart(found[name], map_BCHW):.1e} apart"
            raise DataError(f"{path} does not give the maps it was exported with: {far}")
    return MapBackbone(backbone, _config(path)["ssl_pretrain"]).eval()


def apart(found: Tensor, expected: Tensor) -> float:
    """Largest difference by the largest expected value; `FAR` for another shape, and where a value is not finite.

    >>> apart(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 5.0]))
    0.2
    """
    if found.shape != expected.shape:
        return FAR
    found, expected = found.detach().double().cpu(), expected.double().cpu()
    ratio = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    return min(ratio, FAR) if math.isfinite(ratio) else FAR


def find(folder: Path) -> Path:
    """The artefact in a folder: itself, or the `artefact` of a run."""
    for candidate in (folder, folder / "artefact"):
        if (candidate / "config.json").is_file():
            return candidate
    what = "is not an artefact or a finished run" if folder.is_dir() else "does not exist"
    raise UsageError(f"{folder} {what}: expected a folder with config.json and model.safetensors")


def resolve(spec: str, size_px: int | None = None) -> Backbone:
    """Any backbone that can be judged: a run or artefact folder, `random:NAME`, `timm:NAME` or `pixels`.

    `size_px` sets the input size that a ViT with random weights is built for.
    """
    kind, _, name = spec.partition(":")
    if spec == "pixels":
        return backbones.create("pixels/16")
    if kind == "random" and name:
        torch.manual_seed(0)
        options: dict[str, Any] = {} if size_px is None else {"img_size": size_px}
        return backbones.create(name, **options).eval()
    if kind == "timm" and name:
        published: Backbone = named("backbones", "timm").pretrained(name)
        return published.eval()
    return read(find(Path(spec)))


def _bytes(path: Path) -> bytes:
    """Of a file; a pipe would be waited for."""
    if path.exists() and not path.is_file():
        raise OSError("not a file")
    return path.read_bytes()


def _stored(backbone: Backbone) -> dict[str, Tensor]:
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.weights().items()}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


def _file(weights: dict[str, Tensor]) -> bytes:
    return save_safetensors(weights, metadata={"format": "pt"})


def _config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        schema = config["ssl_pretrain"]["schema"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{folder} is not an artefact: its config.json has no readable ssl_pretrain block") from error
    if schema != SCHEMA:
        raise UsageError(f"{folder} was written by another version (schema {schema}, this one reads {SCHEMA})")
    card = config["ssl_pretrain"]
    broken = [key for key in ("family", "weights_sha256", "shapes_sha256") if not isinstance(card.get(key), str)]
    if broken or not isinstance(config.get("architecture"), str):
        raise DataError(f"{folder / 'config.json'} is damaged: {broken[0] if broken else 'architecture'} is missing")
    return config


def _rebuilt(config: Mapping[str, Any], weights: dict[str, Tensor]) -> Backbone:
    """The backbone as a consumer builds it: from the card, in FP32, without what only training needs."""
    try:
        backbone: Backbone = named("backbones", config["ssl_pretrain"]["family"]).from_config(config)
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        RuntimeError,
    ) as error:  # whatever a card lacks
        raise DataError(
            f"config.json describes no network that can be built: {type(error).__name__}: {error}"
        ) from error
    try:
        backbone.load_weights(weights)
    except RuntimeError as error:
        raise DataError(f"the weights do not fit {config['architecture']}: {' '.join(str(error).split())}") from error
    return backbone.eval()


def _probe(backbone: Backbone) -> dict[str, Tensor]:
    """A seeded image, and the maps of it."""
    side = 2 * max(backbone.strides) * max(1, round(backbone.input.size_px / (2 * max(backbone.strides))))
    image = torch.rand((1, 3, side, side), generator=torch.Generator().manual_seed(0))
    image = (image - torch.tensor(backbone.input.mean).view(3, 1, 1)) / torch.tensor(backbone.input.std).view(3, 1, 1)
    with torch.inference_mode():
        maps = backbone.maps(image)
    return {"input": image, **{f"map_{i}": m.contiguous().clone() for i, m in enumerate(maps)}}


def _shapes(weights: Mapping[str, Tensor]) -> str:
    """A hash of the names and shapes: what a consumer with another implementation would not have."""
    listed = sorted((name, list(tensor.shape)) for name, tensor in weights.items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _readme(name: str, config: Mapping[str, Any]) -> str:
    card = config["ssl_pretrain"]
    levels = ", ".join(f"stride {level['stride']} x {level['channels']} channels" for level in card["levels"])
    shown = "method", "step", "images", "pack", "scores", "batch_norm", "version"
    origin = {key: card[key] for key in shown if key in card}
    timm = f"""or `timm.create_model("local-dir:{name}", pretrained=True, features_only=True)`.
"""
    return f"""---
library_name: {card["family"]}
tags: [self-supervised, microscopy, backbone]
---
# {config["architecture"]}, pretrained with ssl_pretrain

Feature maps: {levels}. Input: RGB in 0..1, mean {card["input"]["mean"]}, std {card["input"]["std"]}.

```python
from ssl_pretrain import load_backbone
backbone = load_backbone("{name}")      # .strides, .channels, .input
maps = backbone(images)                 # normalised images (B, 3, H, W)
```
{timm if card["family"] == "timm" else ""}
```json
{json.dumps(origin, indent=2)}
```
"""
