"""Backbones: what a detector takes over. One file a family; `create("resnet18")` asks the default family, timm.

Shapes: B batch, N tokens, K kept tokens, D width, C channels.
"""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from ssl_pretrain.errors import UsageError
from ssl_pretrain.named import named

__path__ = pkgutil.extend_path(__path__, __name__)


@dataclass(frozen=True)
class InputSpec:
    """What the network is fed, during pretraining and later in the detector."""

    mean: tuple[float, float, float]
    """Subtracted from RGB values in 0..1."""
    std: tuple[float, float, float]
    """Divided by, after the mean."""
    size_px: int
    """Side of the square images that the network was made for or pretrained on; other sizes work too."""
    color: Literal["RGB"] = "RGB"
    range: Literal["0..1"] = "0..1"


class Backbone(nn.Module, ABC):
    """A network that gives one vector per image for pretraining and feature maps for detectors."""

    name: str
    """What `create` was given, to make it again."""
    family: Literal["vit", "convnet"]
    """`convnet`: normalises over the batch (ResNet...); `vit`: by layer (ViT, Swin, ConvNeXt): published optimizer
    settings go with that."""
    dim: int
    """Width D of `forward`."""
    input: InputSpec
    strides: tuple[int, ...]
    """Of each map of `maps`, in input pixels."""
    channels: tuple[int, ...]
    """Of each map of `maps`."""

    @abstractmethod
    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> one feature vector each (B, D)."""

    @abstractmethod
    def maps(self, x_BCHW: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) -> feature maps (B, C_i, H / stride_i, W / stride_i), fine to coarse."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What the artefact's `config.json` says of the architecture, enough for `from_config`."""

    def layers(self) -> dict[str, int]:
        """Depth of each parameter by its name in this module, from 0 at the input, for rates that fall with it."""
        raise UsageError(f"the backbone {self.name} states no order of its layers: leave train.layer_decay out")

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The state that consumers load, under the keys that they know."""

    @abstractmethod
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """The reverse of `weights`; a missing, unknown or wrongly shaped tensor raises `RuntimeError`."""


class MaskableBackbone(Backbone):
    """A plain ViT, whose encoder can be run on a part of the patches (MAE) or with some masked (iBOT)."""

    grid: tuple[int, int]
    """Patches along height and width at the size of `input`."""
    patch_px: int
    prefix_tokens: int
    """Class and register tokens before the patches."""
    class_token: bool
    """Whether the first of these is a class token."""

    @property
    @abstractmethod
    def patch_embedding(self) -> nn.Module:
        """What turns a patch into a token."""

    @property
    @abstractmethod
    def position_embedding(self) -> nn.Parameter:
        """(1, prefix + N, D), or (1, N, D) where prefix tokens have no position."""

    @abstractmethod
    def tokens(self, x_BCHW: Tensor, keep_BK: Tensor) -> Tensor:
        """Encodes only the patches `keep_BK` (row-major indices): (B, prefix + K, D), after the final norm."""

    @abstractmethod
    def masked(self, x_BCHW: Tensor, mask_BN: Tensor, token_D: Tensor) -> Tensor:
        """Encodes all patches, those where `mask_BN` is true replaced by `token_D`, which keeps their positions.

        Gives (B, prefix + N, D), after the final norm.
        """


def create(name: str, normalize: bool = True, **options: Any) -> Backbone:
    """A backbone with random weights: `create("resnet18")`, `create("vit_tiny_patch16_224", img_size=64)`.

    A name with a family in front (`pixels/16`) asks that file of this folder; without one, timm. Without `normalize`
    it is fed 0..1 as it is, mean 0 and std 1. Raises `UsageError` for a name or an option that its family does not
    know.
    """
    family, _, model = name.rpartition("/")
    backbone: Backbone = named("backbones", family or "timm").create(model, **options)
    if not normalize:
        backbone.input = replace(backbone.input, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return backbone


def maskable(name: str) -> bool:
    """Whether `create(name)` gives a `MaskableBackbone`, without building it; `UsageError` for an unknown name."""
    family, _, model = name.rpartition("/")
    return bool(named("backbones", family or "timm").maskable(model))
