"""DINO: a student learns to give small crops the prototypes that its own moving average gives large ones.

Caron, Touvron, Misra, Jegou, Mairal, Bojanowski, Joulin. "Emerging Properties in Self-Supervised Vision Transformers",
ICCV 2021. What is easily done wrong, and stands here as in the authors' code: gradients are clipped per parameter
tensor; the prototypes are weight-normed and stand still at first; the centre moves after the loss has used it; crops of
one size go through the network together; drop path is the student's alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ssl_pretrain.backbones import Backbone
from ssl_pretrain.methods import Method, MethodConfig, OptimSpec, Views, ViTDefaults
from ssl_pretrain.methods._distillation import (
    BatchMean,
    CentreStart,
    HeadNorm,
    centred,
    check,
    clip_each,
    cross_view_loss,
    entropies,
    follow,
    heads,
    hold_still,
    multi_crop,
    teacher_of,
    warmed,
)
from ssl_pretrain.views import ViewSpec


@dataclass(frozen=True)
class Config(MethodConfig):
    """DINO with the constants of the authors' ViT-S/16 run of 100 epochs."""

    global_size_px: int = 224
    """Side of the two global crops."""
    global_scale: tuple[float, float] = (0.4, 1.0)
    """Share of the area that a global crop shows."""
    local_count: int = 8
    """Local crops per image."""
    local_size_px: int = 96
    """Side of a local crop."""
    local_scale: tuple[float, float] = (0.05, 0.4)
    """Share of the area that a local crop shows."""
    color: float = 1.0
    """Strength s of the colour jitter (0.4s, 0.4s, 0.2s, 0.1s)."""
    prototypes: int = 65536
    """K: outputs of the head. 65,536 suits a million images; thousands of images want thousands or fewer."""
    hidden_dim: int = 2048
    """Width of the head's hidden layers."""
    bottleneck_dim: int = 256
    """Width of the L2-normalised layer before the prototypes."""
    norm_last_layer: bool = True
    """Keeps the prototypes at unit length."""
    head_norm: HeadNorm = "none"
    """BatchNorm in the head's hidden layers (the authors' use_bn_in_head), for few images: a young network's features
    are so alike that the teacher would say the same of all."""
    student_temperature: float = 0.1
    """Of the student's softmax."""
    teacher_temperature: float = 0.04
    """Of the teacher's softmax after the warm-up; 0.07 in the authors' longer run."""
    teacher_temperature_start: float = 0.04
    """Where its linear warm-up starts."""
    teacher_temperature_warmup: float = 0.3
    """Share of the run that the warm-up takes."""
    momentum: float = 0.996
    """Of the teacher's moving average at the start; a cosine takes it to 1. Short runs want less (0.99)."""
    center_momentum: float = 0.9
    """Of the centre's moving average."""
    center_start: CentreStart = "zero"
    """What it starts from: zero (the authors), or the first batch's mean, without which a cold teacher gives all the
    same prototype until the centre has come there."""
    clip: float = 3.0
    """Largest gradient norm of each parameter tensor; 0 switches it off."""
    freeze_last_layer: float = 0.01
    """Share of the run in which the prototypes stand still (the authors' first epoch of 100)."""

    def __post_init__(self) -> None:
        shares = "freeze_last_layer", "teacher_temperature_warmup", "momentum", "center_momentum"
        check(self, shares, ("student_temperature", "teacher_temperature", "teacher_temperature_start"))

    def views(self) -> tuple[ViewSpec, ...]:
        """Two global crops, always and seldom blurred, the second sometimes solarized; and the local crops."""
        return multi_crop(
            self.global_size_px, self.global_scale, self.local_count, self.local_size_px, self.local_scale, self.color
        )

    def optim(self, family: Literal["vit", "convnet"]) -> OptimSpec:
        """The authors' AdamW for ViTs; their SGD for ResNet-50."""
        if family == "convnet":
            return OptimSpec("sgd", lr=0.03, lr_end=1e-6, weight_decay=1e-4)
        return OptimSpec("adamw", lr=5e-4, lr_end=1e-6, weight_decay=0.04, weight_decay_end=0.4)

    def vit(self) -> ViTDefaults:
        """Class token; stochastic depth of 0.1 in the student."""
        return ViTDefaults(pool="token", drop_path=0.1)


class DINO(Method):
    """Student and teacher share an architecture; only the student is trained, the teacher follows it."""

    centre_K: Tensor

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        c = config
        student_head, teacher_head = heads(
            backbone.dim, c.hidden_dim, c.bottleneck_dim, c.prototypes, c.norm_last_layer, c.head_norm
        )
        self.student, self.student_head = backbone, student_head
        self.backbone, self.teacher_head = teacher_of(backbone), teacher_head
        self.register_buffer("centre_K", torch.zeros(config.prototypes))
        self.batch_mean = BatchMean()

    def loss(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Algorithm 1 of the paper with multi-crop."""
        global_BCHW = torch.cat([views.crops["global_0"], views.crops["global_1"]]).flatten(0, 1)
        with torch.no_grad():
            teacher_GBK = self.teacher_head(self.backbone(global_BCHW)).unflatten(0, (2, -1))
        student_VBK = self.student_head(self.student(global_BCHW)).unflatten(0, (2, -1))
        if "local" in views.crops:
            local_VBCHW = views.crops["local"]
            local_VBK = self.student_head(self.student(local_VBCHW.flatten(0, 1))).unflatten(0, local_VBCHW.shape[:2])
            student_VBK = torch.cat([student_VBK, local_VBK])
        self.batch_mean.remember(teacher_GBK.detach().to(self.centre_K).mean((0, 1)), progress)
        temperature = self.teacher_temperature(progress)
        p_GBK = centred(teacher_GBK, self.centre_K, temperature)
        loss = cross_view_loss(p_GBK, student_VBK, self.config.student_temperature)
        return {"loss": loss, **entropies("teacher", p_GBK.flatten(0, 1))}

    def before_step(self, progress: float) -> None:
        """Clips each tensor by itself; holds the prototypes still at first."""
        if self.config.clip:
            clip_each([*self.student.parameters(), *self.student_head.parameters()], self.config.clip)
        if progress < self.config.freeze_last_layer:
            hold_still(self.student_head)

    def after_step(self, progress: float) -> None:
        """Teacher and centre follow."""
        teacher, student = (self.backbone, self.teacher_head), (self.student, self.student_head)
        follow(teacher, student, self.config.momentum, progress)
        self.batch_mean.move(self.centre_K, self.config.center_momentum, self.config.center_start)

    def chance(self, batch_size: int) -> dict[str, float]:
        """A teacher that spreads evenly, or a student that does: the cross entropy of K equal classes."""
        return {"loss": math.log(self.config.prototypes)}

    def pictures(self, views: Views) -> dict[str, Tensor]:
        """Nothing beyond the views themselves."""
        return {}

    def teacher_temperature(self, progress: float) -> float:
        """Linear from its start to its end within the warm-up."""
        c = self.config
        return warmed(progress, c.teacher_temperature_start, c.teacher_temperature, c.teacher_temperature_warmup)


def dino_loss(
    teacher_GBK: Tensor, student_VBK: Tensor, centre_K: Tensor, teacher_temperature: float, student_temperature: float
) -> Tensor:
    """Cross entropy of each student view against each global view of the teacher but itself (equations 1 to 3).

    One image, K = 2, one teacher view with logits (ln 3, 0) at temperature 1: it says (3/4, 1/4). The student's view 0
    is the same crop and does not count; its view 1 says (1/2, 1/2), whatever it is compared with: ln 2 = 0.6931.

    >>> teacher = torch.tensor([[[math.log(3), 0.0]]])
    >>> student = torch.tensor([[[5.0, 0.0]], [[0.0, 0.0]]])
    >>> round(dino_loss(teacher, student, torch.zeros(2), 1.0, 1.0).item(), 4)
    0.6931
    """
    return cross_view_loss(centred(teacher_GBK, centre_K, teacher_temperature), student_VBK, student_temperature)
