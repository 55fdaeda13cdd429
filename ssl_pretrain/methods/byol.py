"""BYOL: a network predicts, from one view of an image, what its own moving average makes of another view.

Grill, Strub, Altche, Tallec, Richemond, Buchatskaya, Doersch, Avila Pires, Guo, Gheshlaghi Azar, Piot, Kavukcuoglu,
Munos, Valko. "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning", NeurIPS 2020.
There are no negatives: that it does not collapse is the work of the predictor, which the target network lacks, and of
the target's slowness. As in the authors' code, each view goes through the networks by itself, so BatchNorm never mixes
the two distributions of views, and what a finished run leaves behind is the online network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from lightly.models.modules.heads import ProjectionHead
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain.backbones import Backbone
from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods import Method, MethodConfig, OptimSpec, Views, ViTDefaults, exact
from ssl_pretrain.methods._distillation import check, follow, photo_crop, teacher_of
from ssl_pretrain.views import ViewSpec


@dataclass(frozen=True)
class Config(MethodConfig):
    """BYOL with the constants of the authors' run of 1,000 epochs."""

    size_px: int = 224
    """Side of a view."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that a view shows."""
    color: float = 1.0
    """Strength s of the colour jitter (0.4s, 0.4s, 0.2s, 0.1s)."""
    hidden_dim: int = 4096
    """Width of the hidden layer of projector and predictor."""
    output_dim: int = 256
    """Width of the projections, and of what is predicted of them."""
    momentum: float = 0.996
    """Tau of the target's moving average at the start; a cosine takes it to 1. Short runs want less: the authors took
    0.99 for 100 and 300 epochs of ImageNet and 0.97 for 40, that is 0.97 for 12,500 steps."""

    def __post_init__(self) -> None:
        check(self, shares=("momentum",), above_zero=())
        for key in ("hidden_dim", "output_dim"):
            if vars(self)[key] < 1:
                raise UsageError(f"method.{key} is {vars(self)[key]}: it must be at least 1")

    def views(self) -> tuple[ViewSpec, ...]:
        """Two views from two distributions (table 6): the first always blurred, the second seldom, and solarized."""
        size = self.size_px, self.scale, self.color
        return photo_crop("view_0", *size, blur_p=1.0), photo_crop("view_1", *size, blur_p=0.1, solarize_p=0.2)

    def optim(self, family: Literal["vit", "convnet"]) -> OptimSpec:
        """LARS (section 3.3) for BatchNorm networks; AdamW for ViTs (MoCo v3, section 4).

        The authors warm up for 10 epochs: a tenth of a run of 100.
        """
        if family == "convnet":
            return OptimSpec("lars", lr=0.2, weight_decay=1.5e-6)
        return OptimSpec("adamw", lr=1.5e-4, weight_decay=0.1)

    def vit(self) -> ViTDefaults:
        """Class token, no stochastic depth."""
        return ViTDefaults(pool="token", drop_path=0.0)


class BYOL(Method):
    """Online network: encoder f, projector g, predictor q. Target network: f and g, followed by a moving average."""

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.projector = _mlp(backbone.dim, config.hidden_dim, config.output_dim)
        self.predictor = _mlp(config.output_dim, config.hidden_dim, config.output_dim)
        self.target = teacher_of(backbone)
        self.target_projector = teacher_of(self.projector)

    def loss(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Equation 2 of the paper, plus the same with the views exchanged."""
        x_VBCHW = [views.crops["view_0"][0], views.crops["view_1"][0]]
        q0_BD, q1_BD = (self.predictor(self.projector(self.backbone(x_BCHW))) for x_BCHW in x_VBCHW)
        with torch.no_grad():
            z0_BD, z1_BD = (self.target_projector(self.target(x_BCHW)) for x_BCHW in x_VBCHW)
        loss = byol_loss(q0_BD, z1_BD) + byol_loss(q1_BD, z0_BD)
        return {"loss": loss, "target_spread": spread(torch.cat([z0_BD, z1_BD]))}

    def before_step(self, progress: float) -> None:
        """The paper leaves the gradients alone."""

    def after_step(self, progress: float) -> None:
        """Equation 1: the target follows; tau = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2."""
        target, online = (self.target, self.target_projector), (self.backbone, self.projector)
        follow(target, online, self.config.momentum, progress)

    def chance(self, batch_size: int) -> dict[str, float]:
        """Predictions at right angles to the targets: 2 for each view.

        Collapse costs 0, the least possible, so the loss does not show it; `target_spread` does, by going to 0.
        """
        return {"loss": 4.0}

    def pictures(self, views: Views) -> dict[str, Tensor]:
        """Nothing beyond the views themselves."""
        return {}


def byol_loss(q_BD: Tensor, z_BD: Tensor) -> Tensor:
    """Squared distance of prediction and target on the unit sphere, 2 - 2 cos(q, z) (equation 2); z is a constant.

    A prediction (3, 4) of the target (1, 0): the cosine is 3/5, whatever their lengths, so 2 - 6/5 = 0.8.

    >>> round(byol_loss(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])).item(), 4)
    0.8
    """
    with torch.autocast(q_BD.device.type, enabled=False):
        q_BD, z_BD = exact(q_BD, z_BD.detach())
        return 2 - 2 * F.cosine_similarity(q_BD, z_BD, dim=1, eps=1e-12).mean()


def spread(z_ND: Tensor) -> Tensor:
    """How much unit vectors differ within this rank's batch: 1 - |mean|^2, their variance. 0 is collapse.

    Two at right angles have the mean (1/2, 1/2), so 1 - 1/2.

    >>> spread(torch.tensor([[2.0, 0.0], [0.0, 3.0]])).item()
    0.5
    """
    with torch.autocast(z_ND.device.type, enabled=False):
        (z_ND,) = exact(z_ND.detach())
        return 1 - F.normalize(z_ND, dim=1).mean(0).square().sum()


def _mlp(input_dim: int, hidden_dim: int, output_dim: int) -> ProjectionHead:
    """The authors' MLP: its last layer has no bias, as those of lightly's BYOL heads have."""
    hidden = (input_dim, hidden_dim, nn.BatchNorm1d(hidden_dim), nn.ReLU())
    return ProjectionHead([hidden, (hidden_dim, output_dim, None, None, False)])
