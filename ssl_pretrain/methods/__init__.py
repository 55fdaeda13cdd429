"""Methods: one paper, one file. A method sees views and `progress`, and knows no epoch, rank or device.

Legend: B images of this rank, V views of a spec, D feature width, K prototypes, N patches, H W pixels.
"""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ssl_pretrain.backbones import Backbone
from ssl_pretrain.named import named
from ssl_pretrain.rng import Key
from ssl_pretrain.views import ViewSpec

__path__ = pkgutil.extend_path(__path__, __name__)


class Views(NamedTuple):
    """What a step shows to a method."""

    crops: dict[str, Tensor]
    """By the name of the spec: (V, B, 3, S, S), normalised."""
    key_B2: Key
    """One key per image and epoch: a method's own random draws (masks) come from it, so they do not depend on the
    batch, the rank or a crash."""
    corners: Mapping[str, npt.NDArray[np.float64]] | None = None
    """By the name of the spec: (B, V, 4, 2), where the corners of each view lie in its image (`views.plan.corners`);
    on the host, as the key is. For methods that compare places; `None` where views come from elsewhere."""


@dataclass(frozen=True)
class OptimSpec:
    """The published optimizer of a method; all schedules are shares of the run, so they fit any length."""

    optimizer: Literal["adamw", "sgd", "lars"]
    lr: float
    """Peak learning rate at a global batch of 256 images."""
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """How it grows with the global batch: `lr * batch / 256`, or `lr * sqrt(batch / 256)`."""
    lr_end: float = 0.0
    """Learning rate at the end of the cosine."""
    warmup: float = 0.1
    """Share of the run in which the learning rate rises linearly from 0."""
    weight_decay: float = 0.0
    """Not applied to biases and other 1-D parameters."""
    weight_decay_end: float | None = None
    """Where a cosine takes it by the end of the run; null keeps it."""
    momentum: float = 0.9
    """SGD and LARS."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW."""
    layer_decay: float | None = None
    """Factor of the learning rate from one layer of the trained backbone to the one before it; null is none."""
    patch_rate: float = 1.0
    """Factor of the learning rate of a plain ViT's patch embedding."""


@dataclass(frozen=True)
class ViTDefaults:
    """What a method wants of a plain ViT unless the recipe says otherwise."""

    pool: Literal["token", "avg"]
    drop_path: float


@dataclass(frozen=True)
class MethodConfig(ABC):
    """The method's section of a recipe; each method file subclasses it as `Config`."""

    masks_patches: ClassVar[bool] = False
    """Whether the backbone must be a `MaskableBackbone` (a plain ViT)."""
    masks_maps: ClassVar[bool] = False
    """Whether the backbone must not be one: it needs maps of several strides, parts of which it can hide."""

    @abstractmethod
    def views(self) -> tuple[ViewSpec, ...]:
        """What the method wants to see of an image."""

    @abstractmethod
    def optim(self, family: Literal["vit", "convnet"]) -> OptimSpec:
        """The published optimizer for this family of backbones."""

    @abstractmethod
    def vit(self) -> ViTDefaults:
        """The published choices for a plain ViT."""

    def published(self, family: Literal["vit", "convnet"], optimizer: str | None) -> OptimSpec | None:
        """The published settings of this optimizer; for AdamW on a ResNet, say, those that the method has for ViTs.

        None for the optimizer is the family's own; None is returned where the method never used it.
        """
        families: tuple[Literal["vit", "convnet"], ...] = (family, "vit", "convnet")
        return next((spec for spec in map(self.optim, families) if optimizer in (None, spec.optimizer)), None)


class Method(nn.Module, ABC):
    """A self-supervised method; every method is final, and is built from its `Config` and a backbone alone."""

    backbone: Backbone
    """What a finished run leaves behind (the teacher's, where there is one)."""

    @abstractmethod
    def loss(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Returns `loss`, the mean over this rank's images, and whatever else is worth a curve (detached scalars)."""

    @abstractmethod
    def before_step(self, progress: float) -> None:
        """Gradient surgery that a paper asks for (clipping, a frozen layer); called with finite gradients only."""

    @abstractmethod
    def after_step(self, progress: float) -> None:
        """EMA of teacher and centre, and nothing else; called only when the optimizer has moved."""

    @abstractmethod
    def chance(self, batch_size: int) -> dict[str, float]:
        """The losses, in closed form, of a model that has learned nothing, at a global batch of `batch_size`."""

    @abstractmethod
    def pictures(self, views: Views) -> dict[str, Tensor]:
        """Images worth looking at, normalised as the views are: name -> (3 n, 3, H, W), rows of three.

        Called in evaluation mode.
        """


def exact(*tensors: Tensor) -> list[Tensor]:
    """At least float32: a softmax over similarities in bf16 would have a gradient that is off by per cents."""
    return [t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors]


def train_only(backbone: Backbone, size_px: int, maps: Callable[[Tensor], Sequence[Tensor]]) -> None:
    """Stops the training of what these maps of a view do not depend on, such as a norm after them.

    No gradient would reach it, and DDP waits for the gradient of every trained parameter.
    """
    trained, training = [p for p in backbone.parameters() if p.requires_grad], backbone.training
    backbone.eval()  # so that no statistic moves
    sums = torch.stack([m.sum() for m in maps(torch.zeros(1, 3, size_px, size_px))])
    backbone.train(training)
    gradients: Sequence[Tensor | None] = torch.autograd.grad(sums.sum(), trained, allow_unused=True)
    for parameter, gradient in zip(trained, gradients, strict=True):
        if gradient is None:
            parameter.requires_grad_(False)


def config_class(name: str) -> type[MethodConfig]:
    """The `Config` of a method: `config_class("dino")`."""
    found: type[MethodConfig] = named("methods", name).Config
    return found


def create(config: MethodConfig, backbone: Backbone) -> Method:
    """The method whose file this `Config` stands in: its one subclass of `Method`.

    Raises `UsageError` where the method cannot train the backbone.
    """
    module = named("methods", type(config).__module__.rpartition(".")[2])
    mine = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    (method,) = [c for c in mine if issubclass(c, Method)]
    built: Method = method(config, backbone)
    return built
