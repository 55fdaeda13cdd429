"""SimCLR: two views of an image are told from all other images of the batch.

Chen, Kornblith, Norouzi, Hinton. "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020;
three-layer head from "Big Self-Supervised Models are Strong Semi-Supervised Learners", NeurIPS 2020.
Both views go through the network as one batch, as in the authors' code, so BatchNorm sees 2B images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from torch import Tensor

from ssl_pretrain.backbones import Backbone
from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods import Method, MethodConfig, OptimSpec, Views, ViTDefaults, exact
from ssl_pretrain.views import ViewSpec


@dataclass(frozen=True)
class Config(MethodConfig):
    """SimCLR with the constants of the paper's ImageNet runs."""

    size_px: int = 224
    """Side of a view."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that a view shows."""
    color: float = 1.0
    """Strength s of the colour jitter (0.8s, 0.8s, 0.8s, 0.2s)."""
    blur_p: float = 0.5
    """Probability of a Gaussian blur with sigma 0.1 to 2.0."""
    temperature: float = 0.1
    """Of the softmax over cosine similarities."""
    hidden_dim: int = 2048
    """Width of the projection head's hidden layers."""
    output_dim: int = 128
    """Width of the projections that are compared."""
    head_layers: int = 3
    """Linear layers of the projection head (2 in the first paper)."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UsageError(f"method.temperature is {self.temperature}: it must be above 0")

    def views(self) -> tuple[ViewSpec, ...]:
        """Two views from one distribution."""
        strong = 0.8 * self.color
        return (
            ViewSpec(
                name="view", count=2, size_px=self.size_px, scale=self.scale, blur_p=self.blur_p, jitter_p=0.8,
                brightness=strong, contrast=strong, saturation=strong, hue=0.2 * self.color, gray_p=0.2,
            ),
        )  # fmt: skip

    def optim(self, family: Literal["vit", "convnet"]) -> OptimSpec:
        """LARS with square-root scaling (paper, B.1) for BatchNorm networks; AdamW for ViTs (MoCo v3, section 4)."""
        if family == "convnet":
            return OptimSpec("lars", lr=0.075 * math.sqrt(256), lr_scaling="sqrt", weight_decay=1e-6)
        return OptimSpec("adamw", lr=1.5e-4, weight_decay=0.1)

    def vit(self) -> ViTDefaults:
        """Class token, no stochastic depth."""
        return ViTDefaults(pool="token", drop_path=0.0)


class SimCLR(Method):
    """Backbone f, projection head g, and the NT-Xent loss on z = g(f(x))."""

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.head = SimCLRProjectionHead(backbone.dim, config.hidden_dim, config.output_dim, config.head_layers)

    def loss(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Equation 1 of the paper, averaged over both views as the anchor."""
        z0_BD, z1_BD = self.head(self.backbone(views.crops["view"].flatten(0, 1))).chunk(2)
        return {"loss": nt_xent(z0_BD, z1_BD, self.config.temperature)}

    def before_step(self, progress: float) -> None:
        """The paper leaves the gradients alone."""

    def after_step(self, progress: float) -> None:
        """There is no teacher."""

    def chance(self, batch_size: int) -> dict[str, float]:
        """All projections equal: one of 2B - 1 candidates is right."""
        return {"loss": math.log(2 * batch_size - 1)}

    def pictures(self, views: Views) -> dict[str, Tensor]:
        """Nothing beyond the views themselves."""
        return {}


def nt_xent(z0_BD: Tensor, z1_BD: Tensor, temperature: float) -> Tensor:
    """The normalised temperature-scaled cross entropy, with the negatives of all ranks.

    Two images whose two views agree and which are at right angles to each other: each of the four anchors has its
    positive at similarity 1 and two negatives at 0, so the loss is -ln(e / (e + 2)) = ln(1 + 2 / e) = 0.5514.

    >>> z = torch.eye(2)
    >>> round(nt_xent(z, z, temperature=1.0).item(), 4)
    0.5514
    """
    with torch.autocast(z0_BD.device.type, enabled=False):
        loss: Tensor = NTXentLoss(temperature, gather_distributed=dist.is_initialized())(*exact(z0_BD, z1_BD))
    return loss
