"""DINO: a student learns to give small crops the prototypes that its own moving average gives large ones.

Caron, Touvron, Misra, Jegou, Mairal, Bojanowski, Joulin. "Emerging Properties in Self-Supervised Vision Transformers",
ICCV 2021. What is easily done wrong, and stands here as in the authors' code: gradients are clipped per parameter
tensor; the prototypes are weight-normed and stand still at first; the centre moves after the loss has used it; crops of
one size go through the network together; drop path is the student's alone.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from lightly.models.modules import DINOProjectionHead
from timm.layers import DropPath
from torch import Tensor, nn

from ssl_pretrain.backbones import Backbone
from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods import Method, MethodConfig, OptimSpec, Views, ViTDefaults, exact
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
    clip: float = 3.0
    """Largest gradient norm of each parameter tensor; 0 switches it off."""
    freeze_last_layer: float = 0.01
    """Share of the run in which the prototypes stand still (the authors' first epoch of 100)."""

    def __post_init__(self) -> None:
        for key in ("freeze_last_layer", "teacher_temperature_warmup", "momentum", "center_momentum"):
            if not 0 <= vars(self)[key] <= 1:
                raise UsageError(f"method.{key} is {vars(self)[key]}: it is a share between 0 and 1, not epochs")
        for key in ("student_temperature", "teacher_temperature", "teacher_temperature_start"):
            if vars(self)[key] <= 0:
                raise UsageError(f"method.{key} is {vars(self)[key]}: it must be above 0")

    def views(self) -> tuple[ViewSpec, ...]:
        """Two global crops, always and seldom blurred, the second sometimes solarized; and the local crops."""

        def crop(name: str, size: int, scale: tuple[float, float], blur: float, solarize: float, n: int) -> ViewSpec:
            strong = 0.4 * self.color
            return ViewSpec(
                name=name, count=n, size_px=size, scale=scale, jitter_p=0.8, brightness=strong, contrast=strong,
                saturation=strong / 2, hue=strong / 4, gray_p=0.2, blur_p=blur, solarize_p=solarize,
            )  # fmt: skip

        large = self.global_size_px, self.global_scale
        local = crop("local", self.local_size_px, self.local_scale, 0.5, 0.0, self.local_count)
        globals_ = crop("global_0", *large, 1.0, 0.0, 1), crop("global_1", *large, 0.1, 0.2, 1)
        return (*globals_, local) if self.local_count else globals_

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
        self.student = backbone
        self.student_head = _head(config, backbone.dim)
        self.backbone = copy.deepcopy(backbone)
        self.teacher_head = _head(config, backbone.dim)
        self.teacher_head.load_state_dict(self.student_head.state_dict())
        for module in self.backbone.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
        self.backbone.requires_grad_(False)
        self.teacher_head.requires_grad_(False)
        self.register_buffer("centre_K", torch.zeros(config.prototypes))
        self._seen: list[Tensor] = []
        self._seen_at = math.nan

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
        self._remember(teacher_GBK, progress)
        temperature = self.teacher_temperature(progress)
        loss = dino_loss(teacher_GBK, student_VBK, self.centre_K, temperature, self.config.student_temperature)
        return {"loss": loss, **_entropies(teacher_GBK, self.centre_K, temperature)}

    def before_step(self, progress: float) -> None:
        """Clips each tensor by itself; holds the prototypes still at first."""
        trained = [*self.student.parameters(), *self.student_head.parameters()]
        if self.config.clip:
            for parameter in trained:
                nn.utils.clip_grad_norm_(parameter, self.config.clip)
        if progress < self.config.freeze_last_layer:
            # None and not zero: weight decay and AdamW's moments must not move them either.
            for parameter in self.student_head.last_layer.parameters():
                parameter.grad = None

    def after_step(self, progress: float) -> None:
        """Teacher and centre follow."""
        momentum = 1 - (1 - self.config.momentum) * (1 + math.cos(math.pi * progress)) / 2
        teacher = [*self.backbone.parameters(), *self.teacher_head.parameters()]
        student = [*self.student.parameters(), *self.student_head.parameters()]
        with torch.no_grad():
            torch._foreach_lerp_(teacher, student, 1 - momentum)
            batch_K = torch.stack(self._seen).mean(0)
            if dist.is_initialized():
                dist.all_reduce(batch_K)
                batch_K /= dist.get_world_size()
            self.centre_K.lerp_(batch_K.to(self.centre_K), 1 - self.config.center_momentum)
        self._seen.clear()

    def chance(self, batch_size: int) -> dict[str, float]:
        """A teacher that spreads evenly, or a student that does: the cross entropy of K equal classes."""
        return {"loss": math.log(self.config.prototypes)}

    def pictures(self, views: Views) -> dict[str, Tensor]:
        """Nothing beyond the views themselves."""
        return {}

    def teacher_temperature(self, progress: float) -> float:
        """Linear from its start to its end within the warm-up."""
        start, end = self.config.teacher_temperature_start, self.config.teacher_temperature
        warmup = self.config.teacher_temperature_warmup
        share = min(progress / warmup, 1.0) if warmup else 1.0
        return start + (end - start) * share

    def _remember(self, teacher_GBK: Tensor, progress: float) -> None:
        """Keeps what the centre will follow; a step that was skipped leaves nothing behind.

        lightly's DINOLoss moves its centre inside the loss: a skipped step would then have moved it, and gradient
        accumulation would move it several times a step.
        """
        if progress != self._seen_at:
            self._seen.clear()
        self._seen_at = progress
        self._seen.append(teacher_GBK.detach().to(self.centre_K).mean((0, 1)))


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
    with torch.autocast(student_VBK.device.type, enabled=False):
        teacher_GBK, student_VBK = exact(teacher_GBK, student_VBK)
        teacher = ((teacher_GBK - centre_K) / teacher_temperature).softmax(-1).detach()
        student = (student_VBK / student_temperature).log_softmax(-1)
        cross_entropy_GV = -torch.einsum("gbk,vbk->gv", teacher, student) / teacher.shape[1]
    same_crop = torch.eye(*cross_entropy_GV.shape, dtype=torch.bool, device=student.device)
    return cross_entropy_GV.masked_fill(same_crop, 0).sum() / (~same_crop).sum()


def _entropies(teacher_GBK: Tensor, centre_K: Tensor, temperature: float) -> dict[str, Tensor]:
    """The teacher's entropy per crop and of its mean over the batch, as shares of the largest possible.

    Per crop near 1: it spreads evenly. Of the mean near 0: it gives all images one prototype. Both are collapse.
    """
    p_NK = ((teacher_GBK - centre_K) / temperature).softmax(-1).flatten(0, 1)
    return {
        "teacher_entropy": torch.special.entr(p_NK).sum(-1).mean() / math.log(p_NK.shape[1]),
        "teacher_spread": torch.special.entr(p_NK.mean(0)).sum() / math.log(p_NK.shape[1]),
    }


def _head(config: Config, dim: int) -> DINOProjectionHead:
    with warnings.catch_warnings():  # lightly builds it with torch's older weight norm
        warnings.simplefilter("ignore", FutureWarning)
        return DINOProjectionHead(
            dim, config.hidden_dim, config.bottleneck_dim, config.prototypes, norm_last_layer=config.norm_last_layer
        )
