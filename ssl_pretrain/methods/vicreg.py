"""VICReg: two views of an image get equal embeddings, while each variable keeps its variance and they decorrelate.

Bardes, Ponce, LeCun. "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", ICLR 2022.
Where equations and the authors' code differ by constants, the code stands here, as its 25, 25, 1 belong to it: the
invariance is a mean over the variables too, and the variance term is halved. As in that code each view goes through the
network by itself, and variance and covariance are those of the global batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from lightly.loss.vicreg_loss import invariance_loss, variance_loss
from lightly.models.modules.heads import VICRegProjectionHead
from lightly.utils.dist import gather
from torch import Tensor

from ssl_pretrain.backbones import Backbone
from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods import Method, MethodConfig, OptimSpec, Views, ViTDefaults, exact
from ssl_pretrain.methods._distillation import photo_crop
from ssl_pretrain.views import ViewSpec

EPS = 1e-4
"""Added to the variance under its root (equation 2)."""


@dataclass(frozen=True)
class Config(MethodConfig):
    """VICReg with the constants of the paper's ImageNet runs."""

    size_px: int = 224
    """Side of a view."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that a view shows."""
    color: float = 1.0
    """Strength s of the colour jitter (0.4s, 0.4s, 0.2s, 0.1s)."""
    invariance: float = 25.0
    """Lambda: weight of the distance between the two embeddings."""
    variance: float = 25.0
    """Mu: weight of the hinge that keeps each variable's standard deviation at 1 or more. 0 lets all collapse."""
    covariance: float = 1.0
    """Nu: weight of the squared covariances."""
    hidden_dim: int = 8192
    """Width of the expander's hidden layers."""
    output_dim: int = 8192
    """Width of the embeddings. The paper gains up to here; 2,048 in all layers is a twelfth of ResNet-50's expander."""
    head_layers: int = 3
    """Linear layers of the expander."""

    def __post_init__(self) -> None:
        for key in ("invariance", "variance", "covariance"):
            if vars(self)[key] < 0:
                raise UsageError(f"method.{key} is {vars(self)[key]}: a weight is 0 or more")
        for key, least in (("hidden_dim", 1), ("output_dim", 2), ("head_layers", 2)):
            if vars(self)[key] < least:
                raise UsageError(f"method.{key} is {vars(self)[key]}: it must be at least {least}")

    def views(self) -> tuple[ViewSpec, ...]:
        """Two views from one distribution (appendix C): BYOL's two, made symmetric."""
        size = self.size_px, self.scale, self.color
        return (photo_crop("view", *size, blur_p=0.5, solarize_p=0.1, count=2),)

    def optim(self, family: Literal["vit", "convnet"]) -> OptimSpec:
        """LARS (section 4.2) for BatchNorm networks; AdamW for ViTs (MoCo v3, section 4).

        The authors warm up for 10 epochs: a tenth of a run of 100.
        """
        if family == "convnet":
            return OptimSpec("lars", lr=0.2, weight_decay=1e-6)
        return OptimSpec("adamw", lr=1.5e-4, weight_decay=0.1)

    def vit(self) -> ViTDefaults:
        """Class token, no stochastic depth."""
        return ViTDefaults(pool="token", drop_path=0.0)


class VICReg(Method):
    """Encoder f, expander h, and the loss on z = h(f(x))."""

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.head = VICRegProjectionHead(backbone.dim, config.hidden_dim, config.output_dim, config.head_layers)

    def loss(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Equation 6 of the paper; its three terms, before their weights, are worth a curve each."""
        z0_BD, z1_BD = (self.head(self.backbone(x_BCHW)) for x_BCHW in views.crops["view"])
        invariance, variance, covariance = vicreg_terms(z0_BD, z1_BD)
        weights = self.config
        loss = weights.invariance * invariance + weights.variance * variance + weights.covariance * covariance
        terms = {"invariance": invariance, "variance": variance, "covariance": covariance}
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}

    def before_step(self, progress: float) -> None:
        """The paper leaves the gradients alone."""

    def after_step(self, progress: float) -> None:
        """There is no teacher."""

    def chance(self, batch_size: int) -> dict[str, float]:
        """All embeddings equal: no distance, no covariance, and every hinge at 1 - sqrt(eps) = 0.99."""
        hinge = 1 - math.sqrt(EPS)
        return {"loss": self.config.variance * hinge, "variance": hinge}

    def pictures(self, views: Views) -> dict[str, Tensor]:
        """Nothing beyond the views themselves."""
        return {}


def vicreg_terms(z0_BD: Tensor, z1_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Invariance, variance and covariance (equations 5, 1 and 4); the latter two over the images of all ranks.

    Two images, two variables, both views z = (0, 0), (1, 1). No distance: 0. Each variable has the variance 1/2, so the
    hinge is 1 - sqrt(0.5001) = 0.2928, and half of it from each view. The covariance is 1/2 and stands twice in the
    matrix: 2 * (1/4) / 2 variables = 1/4, from each view: 1/2.

    >>> z = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    >>> [round(term.item(), 4) for term in vicreg_terms(z, z)]
    [0.0, 0.2928, 0.5]
    """
    with torch.autocast(z0_BD.device.type, enabled=False):
        z0_BD, z1_BD = exact(z0_BD, z1_BD)
        invariance: Tensor = invariance_loss(z0_BD, z1_BD)
        if dist.is_initialized():
            z0_BD, z1_BD = torch.cat(gather(z0_BD)), torch.cat(gather(z1_BD))
        variance: Tensor = (variance_loss(z0_BD, EPS) + variance_loss(z1_BD, EPS)) / 2
        return invariance, variance, covariance_loss(z0_BD) + covariance_loss(z1_BD)


def covariance_loss(z_BD: Tensor) -> Tensor:
    """The squared covariances off the diagonal, summed, per variable (equations 3 and 4).

    lightly's lists the places off the diagonal: 1 GiB of indices at D = 8192. The squares of the D x D matrix Z'Z sum
    to those of the B x B matrix ZZ', so the smaller of the two is made, and the diagonal's taken off.

    Two variables that are each other's negative, at -1 and 1: their covariance is -2, which stands twice: 8 / 2 = 4.

    >>> covariance_loss(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).item()
    4.0
    """
    count, width = z_BD.shape
    z_BD = z_BD - z_BD.mean(0)
    product = z_BD @ z_BD.T if count < width else z_BD.T @ z_BD
    variance_D = z_BD.square().sum(0)
    return (product.square().sum() - variance_D.square().sum()) / (count - 1) ** 2 / width
