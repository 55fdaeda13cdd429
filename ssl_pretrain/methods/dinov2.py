"""DINOv2: iBOT with a head for class tokens and one for patches, targets by Sinkhorn-Knopp, and features pushed apart.

Oquab, Darcet, Moutakanni et al. "DINOv2: Learning Robust Visual Features without Supervision", TMLR 2024 (2023).
Section 4 of the paper, with the constants of the authors' ViT-L/16 on ImageNet-1k. What is easily done wrong: Sinkhorn-
Knopp and KoLeo see the batch of all ranks; Sinkhorn-Knopp of the patches sees masked patches alone; KoLeo is over the
backbone's class tokens, one global crop at a time, as two crops of one image should be near each other.

LayerScale, SwiGLU and register tokens come with the backbone's name (`vit_small_patch14_reg4_dinov2`). Not here: the
last epochs at a higher resolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from lightly.utils.dist import gather
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain.backbones import Backbone, MaskableBackbone
from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods import Method, MethodConfig, OptimSpec, Views, ViTDefaults, exact
from ssl_pretrain.methods._distillation import (
    check,
    cross_view_loss,
    entropies,
    follow,
    heads,
    hold_still,
    multi_crop,
    teacher_of,
    warmed,
)
from ssl_pretrain.methods._masking import (
    Masks,
    all_tokens,
    check_masking,
    masked_patch_loss,
    per_masked_crop,
    plain_vit,
)
from ssl_pretrain.views import ViewSpec


@dataclass(frozen=True)
class Config(MethodConfig):
    """DINOv2 with the constants of the authors' ViT-L/16 run of 100 epochs on ImageNet-1k, made for 1e6 images."""

    masks_patches: ClassVar[bool] = True

    global_size_px: int = 224
    """Side of the two global crops."""
    global_scale: tuple[float, float] = (0.32, 1.0)
    """Share of the area that a global crop shows."""
    local_count: int = 8
    """Local crops per image."""
    local_size_px: int = 96
    """Side of a local crop."""
    local_scale: tuple[float, float] = (0.05, 0.32)
    """Share of the area that a local crop shows."""
    color: float = 1.0
    """Strength s of the colour jitter (0.4s, 0.4s, 0.2s, 0.1s)."""
    mask_probability: float = 0.5
    """Share of the global crops that are masked at all."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Share of the patches that is masked in those, uniform."""
    mask_smallest: int = 4
    """Patches of the smallest block of a mask."""
    cls_weight: float = 1.0
    """Weight of the loss on class tokens."""
    patch_weight: float = 1.0
    """Weight of the loss on masked patches."""
    koleo_weight: float = 0.1
    """Weight of the KoLeo regulariser of each global crop; 0 switches it off."""
    koleo_floor: float = 1e-4
    """Features nearer than this are taken for one image twice, which KoLeo cannot push apart: they give no gradient."""
    prototypes: int = 65536
    """K: outputs of the class tokens' head. Thousands of images want thousands or fewer."""
    patch_prototypes: int = 65536
    """Outputs of the patches' head."""
    hidden_dim: int = 2048
    """Width of a head's hidden layers."""
    bottleneck_dim: int = 256
    """Width of the L2-normalised layer before the prototypes."""
    norm_last_layer: bool = False
    """Keeps the prototypes at unit length: the more stable choice."""
    sinkhorn_iterations: int = 3
    """Of Sinkhorn-Knopp."""
    student_temperature: float = 0.1
    """Of the student's softmax, for class tokens and patches."""
    teacher_temperature: float = 0.07
    """Of the teacher's, for class tokens and patches, after the warm-up."""
    teacher_temperature_start: float = 0.04
    """Where its linear warm-up starts."""
    teacher_temperature_warmup: float = 0.3
    """Share of the run that the warm-up takes."""
    momentum: float = 0.992
    """Of the teacher's moving average at the start; a cosine takes it to 1."""
    clip: float = 3.0
    """Largest gradient norm of the backbone, and of each head; 0 switches it off."""
    freeze_last_layer: float = 0.01
    """Share of the run in which the prototypes stand still."""

    def __post_init__(self) -> None:
        shares = "mask_probability", "freeze_last_layer", "teacher_temperature_warmup", "momentum"
        above_zero = "student_temperature", "teacher_temperature", "teacher_temperature_start", "koleo_floor"
        check(self, shares, (*above_zero, "mask_smallest"))
        check_masking(self)
        if self.sinkhorn_iterations < 1:
            raise UsageError(f"method.sinkhorn_iterations is {self.sinkhorn_iterations}: it must be 1 or more")

    def views(self) -> tuple[ViewSpec, ...]:
        """DINO's: two global crops, always and seldom blurred, the second sometimes solarized; and the local crops."""
        return multi_crop(
            self.global_size_px, self.global_scale, self.local_count, self.local_size_px, self.local_scale, self.color
        )

    def optim(self, family: Literal["vit", "convnet"]) -> OptimSpec:
        """The authors' AdamW: 4e-3 sqrt(batch / 1024), which is 2e-3 sqrt(batch / 256).

        It falls by 0.9 from block to block, and to a fifth for the patch embedding. The last block has the full rate
        (the authors': 0.9 of it, the final norm's being full).
        """
        return OptimSpec(
            "adamw", lr=2e-3, lr_scaling="sqrt", lr_end=1e-6, weight_decay=0.04, weight_decay_end=0.4, layer_decay=0.9,
            patch_rate=0.2,
        )  # fmt: skip

    def vit(self) -> ViTDefaults:
        """Class token; stochastic depth of 0.1, right for small ViTs (the authors give ViT-L 0.3 to 0.4)."""
        return ViTDefaults(pool="token", drop_path=0.1)


class DINOv2(Method):
    """Student and teacher share an architecture; only the student is trained, and only the student is masked."""

    backbone: MaskableBackbone

    def __init__(self, config: Config, backbone: Backbone) -> None:
        vit, c = plain_vit("DINOv2", backbone), config
        super().__init__()
        self.config = config
        pairs = [
            heads(vit.dim, c.hidden_dim, c.bottleneck_dim, prototypes, c.norm_last_layer)
            for prototypes in (c.prototypes, c.patch_prototypes)
        ]
        self.student, self.backbone = vit, teacher_of(vit)
        self.mask_token = nn.Parameter(torch.zeros(1, vit.dim))  # two dimensions: the authors let it decay
        (self.student_head, self.teacher_head), (self.student_patch_head, self.teacher_patch_head) = pairs

    def loss(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Image-level, patch-level and KoLeo terms (section 4)."""
        c, prefix = self.config, self.backbone.prefix_tokens
        global_CCHW = torch.cat([views.crops["global_0"], views.crops["global_1"]]).flatten(0, 1)
        with torch.no_grad():
            seen_CTD = all_tokens(self.backbone, global_CCHW)
            masks = Masks.draw(
                views.key_B2, global_CCHW, self.backbone.patch_px, c.mask_probability, c.mask_ratio, c.mask_smallest
            )
            temperature = self.teacher_temperature(progress)
            teacher_CK = sinkhorn_knopp(self.teacher_head(seen_CTD[:, 0]), temperature, c.sinkhorn_iterations)
            logits_MK = self.teacher_patch_head(masks.of(seen_CTD[:, prefix:]))
            teacher_MK = sinkhorn_knopp(logits_MK, temperature, c.sinkhorn_iterations)
        seen_CTD = self.student.masked(global_CCHW, masks.mask_CN, self.mask_token[0])
        student_MK = self.student_patch_head(masks.of(seen_CTD[:, prefix:]))
        class_GBD = torch.unflatten(seen_CTD[:, 0], 0, (2, -1))
        student_VBK = self.student_head(class_GBD)
        if "local" in views.crops:
            local_VBCHW = views.crops["local"]
            seen_LTD = all_tokens(self.student, local_VBCHW.flatten(0, 1))
            local_VBK = self.student_head(seen_LTD[:, 0]).unflatten(0, local_VBCHW.shape[:2])
            student_VBK = torch.cat([student_VBK, local_VBK])
        loss_cls = cross_view_loss(torch.unflatten(teacher_CK, 0, (2, -1)), student_VBK, c.student_temperature)
        loss_patch = masked_patch_loss(teacher_MK, student_MK, masks.weight_M, c.student_temperature)
        koleo = sum((koleo_loss(z_BD, c.koleo_floor) for z_BD in class_GBD), torch.zeros_like(loss_cls))
        return {
            "loss": c.cls_weight * loss_cls + c.patch_weight * loss_patch + c.koleo_weight * koleo,
            "loss_cls": loss_cls.detach(),
            "loss_patch": per_masked_crop(loss_patch, masks.weight_M),
            "koleo": koleo.detach() / 2,
            **entropies("teacher", teacher_CK),
            **entropies("patch", teacher_MK),
        }

    def before_step(self, progress: float) -> None:
        """Clips the backbone and each head by the norm of its whole gradient; holds the prototypes still at first."""
        if self.config.clip:
            vit = [*self.student.parameters(), self.mask_token]
            for part in (vit, self.student_head.parameters(), self.student_patch_head.parameters()):
                nn.utils.clip_grad_norm_(part, self.config.clip)
        if progress < self.config.freeze_last_layer:
            hold_still(self.student_head)
            hold_still(self.student_patch_head)

    def after_step(self, progress: float) -> None:
        """The teacher follows."""
        teacher = self.backbone, self.teacher_head, self.teacher_patch_head
        follow(teacher, (self.student, self.student_head, self.student_patch_head), self.config.momentum, progress)

    def chance(self, batch_size: int) -> dict[str, float]:
        """The cross entropy of K equal classes; KoLeo, and so the whole, has no such value."""
        return {"loss_cls": math.log(self.config.prototypes), "loss_patch": math.log(self.config.patch_prototypes)}

    def pictures(self, views: Views) -> dict[str, Tensor]:
        """Nothing beyond the views themselves."""
        return {}

    def teacher_temperature(self, progress: float) -> float:
        """Linear from its start to its end within the warm-up."""
        c = self.config
        return warmed(progress, c.teacher_temperature_start, c.teacher_temperature, c.teacher_temperature_warmup)


@torch.no_grad()
def sinkhorn_knopp(logits_NK: Tensor, temperature: float, iterations: int) -> Tensor:
    """Soft assignments in which each sample weighs 1 and, over the batch of all ranks, each prototype weighs the same.

    The algorithm of SwAV (Caron et al. 2020, section 3.1) on logarithms, where nothing overflows or vanishes; ranks may
    have different numbers of samples, or none.

    Two samples, K = 2, exp(logits) = (3, 1) and (1, 1); one iteration. The prototypes weigh 4 and 2, which makes
    (3/4, 1/2) and (1/4, 1/2); divided by the samples' sums, 5/4 and 3/4: (3/5, 2/5) and (1/3, 2/3).

    >>> q = sinkhorn_knopp(torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]), 1.0, 1)
    >>> [round(value, 4) for value in q.flatten().tolist()]
    [0.6, 0.4, 0.3333, 0.6667]
    """
    with torch.autocast(logits_NK.device.type, enabled=False):
        log_NK = exact(logits_NK)[0] / temperature
        for _ in range(iterations):
            log_NK -= _log_weight_over_ranks(log_NK)
            log_NK -= log_NK.logsumexp(1, keepdim=True)
        return log_NK.exp_()


def _log_weight_over_ranks(log_NK: Tensor) -> Tensor:
    """Per prototype, the logarithm of its weight summed over the samples of all ranks."""
    largest_K = log_NK.amax(0) if len(log_NK) else log_NK.new_full(log_NK.shape[1:], -math.inf)
    if dist.is_initialized():
        dist.all_reduce(largest_K, dist.ReduceOp.MAX)
    weight_K = (log_NK - largest_K).exp().sum(0)
    if dist.is_initialized():
        dist.all_reduce(weight_K)
    return largest_K + weight_K.log()


def koleo_loss(z_BD: Tensor, floor: float) -> Tensor:
    """The mean of -ln d, d from each L2-normalised feature to the nearest of any other image of all ranks (section 4).

    Three features at (1, 0), (0, 1) and (-1, 0): the nearest is sqrt(2) away, and -ln sqrt(2) = -0.3466.

    >>> round(koleo_loss(torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), 1e-4).item(), 4)
    -0.3466
    """
    with torch.autocast(z_BD.device.type, enabled=False):
        z_BD = F.normalize(exact(z_BD)[0], dim=-1, eps=1e-8)
        first, others = 0, z_BD
        if dist.is_initialized():
            first, others = dist.get_rank() * len(z_BD), torch.cat(gather(z_BD))
        with torch.no_grad():
            near_BA = z_BD @ others.T
            near_BA.diagonal(first).fill_(-2)
            nearest_B = near_BA.argmax(1)
        distance_B = F.pairwise_distance(z_BD, others[nearest_B], eps=1e-8)
        return -(distance_B.clamp_min(floor) + 1e-8).log().mean()
