"""iBOT: DINO, whose student must also say which prototype the teacher gives to each patch that it does not see.

Zhou, Wei, Wang, Shen, Xie, Yuille, Kong. "iBOT: Image BERT Pre-Training with Online Tokenizer", ICLR 2022.
What is easily done wrong, and stands here as in the authors' code: only the student's global crops are masked, and only
half of them; the loss is over masked patches alone, averaged per crop first; class tokens and patches share a head but
not a centre; the patches' centre follows all of the teacher's patches; the mask token is the method's, not the ViT's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ssl_pretrain.backbones import Backbone, MaskableBackbone
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
    """iBOT with the constants of the authors' ViT-S/16; shares of the run are those of their default, 100 epochs."""

    masks_patches: ClassVar[bool] = True

    global_size_px: int = 224
    """Side of the two global crops."""
    global_scale: tuple[float, float] = (0.25, 1.0)
    """Share of the area that a global crop shows."""
    local_count: int = 10
    """Local crops per image."""
    local_size_px: int = 96
    """Side of a local crop."""
    local_scale: tuple[float, float] = (0.05, 0.25)
    """Share of the area that a local crop shows."""
    color: float = 1.0
    """Strength s of the colour jitter (0.4s, 0.4s, 0.2s, 0.1s)."""
    mask_probability: float = 0.5
    """Share of the global crops that are masked at all (the authors' prediction ratio is 0 in the other half)."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Share of the patches that is masked in those, uniform (the authors' 0.3 with a variance of 0.2)."""
    cls_weight: float = 1.0
    """lambda 1: weight of the loss on class tokens."""
    patch_weight: float = 1.0
    """lambda 2: weight of the loss on masked patches."""
    shared_head: bool = True
    """One head for class tokens and patches; false gives the patches a whole head of their own."""
    prototypes: int = 8192
    """K: outputs of each head. Thousands of images want thousands or fewer."""
    hidden_dim: int = 2048
    """Width of a head's hidden layers."""
    bottleneck_dim: int = 256
    """Width of the L2-normalised layer before the prototypes."""
    norm_last_layer: bool = False
    """Keeps the prototypes at unit length. The authors do so for ViT-B only; it is the more stable choice."""
    head_norm: HeadNorm = "none"
    """BatchNorm in the heads' hidden layers, for few images: a young network's features are so alike that the teacher
    would say the same of all. It sees all patches, so the student's head then reads all and not the masked ones only.
    """
    student_temperature: float = 0.1
    """Of the student's softmax, for class tokens and patches."""
    teacher_temperature: float = 0.07
    """Of the teacher's softmax for class tokens after the warm-up; the authors' default is 0.04."""
    teacher_temperature_start: float = 0.04
    """Where its linear warm-up starts."""
    patch_temperature: float = 0.07
    """Of the teacher's softmax for patches after the warm-up."""
    patch_temperature_start: float = 0.04
    """Where its linear warm-up starts."""
    teacher_temperature_warmup: float = 0.3
    """Share of the run that both warm-ups take (the authors' 30 epochs)."""
    momentum: float = 0.996
    """Of the teacher's moving average at the start; a cosine takes it to 1. Short runs want less (0.99)."""
    center_momentum: float = 0.9
    """Of the moving average of both centres."""
    center_start: CentreStart = "zero"
    """What it starts from: zero (the authors), or the first batch's mean, without which a cold teacher gives all the
    same prototype until the centre has come there."""
    clip: float = 3.0
    """Largest gradient norm of each parameter tensor; 0 switches it off."""
    freeze_last_layer: float = 0.01
    """Share of the run in which the prototypes stand still (the authors' first epoch of 100)."""

    def __post_init__(self) -> None:
        shares = "mask_probability", "freeze_last_layer", "teacher_temperature_warmup", "momentum", "center_momentum"
        teacher = "teacher_temperature", "teacher_temperature_start", "patch_temperature", "patch_temperature_start"
        check(self, shares, ("student_temperature", *teacher))
        check_masking(self)

    def views(self) -> tuple[ViewSpec, ...]:
        """DINO's: two global crops, always and seldom blurred, the second sometimes solarized; and the local crops."""
        return multi_crop(
            self.global_size_px, self.global_scale, self.local_count, self.local_size_px, self.local_scale, self.color
        )

    def optim(self, family: Literal["vit", "convnet"]) -> OptimSpec:
        """DINO's AdamW for ViTs."""
        return OptimSpec("adamw", lr=5e-4, lr_end=1e-6, weight_decay=0.04, weight_decay_end=0.4)

    def vit(self) -> ViTDefaults:
        """Class token; stochastic depth of 0.1 in the student."""
        return ViTDefaults(pool="token", drop_path=0.1)


class IBOT(Method):
    """Student and teacher share an architecture; only the student is trained, and only the student is masked."""

    backbone: MaskableBackbone
    centre_K: Tensor
    patch_centre_K: Tensor

    def __init__(self, config: Config, backbone: Backbone) -> None:
        vit, c = plain_vit("iBOT", backbone), config
        super().__init__()
        self.config = config
        sizes = vit.dim, c.hidden_dim, c.bottleneck_dim, c.prototypes, c.norm_last_layer, c.head_norm
        pairs = [heads(*sizes) for _ in range(1 if c.shared_head else 2)]
        # The first is for class tokens and the last for patches: one and the same where it is shared.
        self.student, self.student_heads = vit, nn.ModuleList(student for student, _ in pairs)
        self.backbone, self.teacher_heads = teacher_of(vit), nn.ModuleList(teacher for _, teacher in pairs)
        self.mask_token = nn.Parameter(torch.zeros(1, vit.dim))  # two dimensions: the authors let it decay
        self.register_buffer("centre_K", torch.zeros(c.prototypes))
        self.register_buffer("patch_centre_K", torch.zeros(c.prototypes))
        self.batch_mean, self.patch_batch_mean = BatchMean(), BatchMean()

    def loss(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Class tokens across views (equation 2, with multi-crop) and masked patches within a view (equation 3)."""
        c, prefix = self.config, self.backbone.prefix_tokens
        global_CCHW = torch.cat([views.crops["global_0"], views.crops["global_1"]]).flatten(0, 1)
        with torch.no_grad():
            seen_CTD = all_tokens(self.backbone, global_CCHW)
            teacher_GBK = self.teacher_heads[0](seen_CTD[:, 0]).unflatten(0, (2, -1))
            patches_CND = seen_CTD[:, prefix:]
            teacher_CNK = self.teacher_heads[-1](patches_CND.flatten(0, 1)).unflatten(0, patches_CND.shape[:2])
        masks = Masks.draw(views.key_B2, global_CCHW, self.backbone.patch_px, c.mask_probability, c.mask_ratio)
        seen_CTD = self.student.masked(global_CCHW, masks.mask_CN, self.mask_token[0])
        student_MK = self._of_masked(seen_CTD[:, prefix:], masks)
        student_VBK = self.student_heads[0](seen_CTD[:, 0]).unflatten(0, (2, -1))
        if "local" in views.crops:
            local_VBCHW = views.crops["local"]
            seen_LTD = all_tokens(self.student, local_VBCHW.flatten(0, 1))
            local_VBK = self.student_heads[0](seen_LTD[:, 0]).unflatten(0, local_VBCHW.shape[:2])
            student_VBK = torch.cat([student_VBK, local_VBK])
        self.batch_mean.remember(teacher_GBK.mean((0, 1), dtype=self.centre_K.dtype), progress)
        self.patch_batch_mean.remember(teacher_CNK.mean((0, 1), dtype=self.centre_K.dtype), progress)
        temperature, patch_temperature = self.teacher_temperatures(progress)
        teacher_GBK = centred(teacher_GBK, self.centre_K, temperature)
        teacher_MK = centred(masks.of(teacher_CNK), self.patch_centre_K, patch_temperature)
        loss_cls = cross_view_loss(teacher_GBK, student_VBK, c.student_temperature)
        loss_patch = masked_patch_loss(teacher_MK, student_MK, masks.weight_M, c.student_temperature)
        return {
            "loss": c.cls_weight * loss_cls + c.patch_weight * loss_patch,
            "loss_cls": loss_cls.detach(),
            "loss_patch": per_masked_crop(loss_patch, masks.weight_M),
            **entropies("teacher", teacher_GBK.flatten(0, 1)),
            **entropies("patch", teacher_MK),
        }

    def _of_masked(self, patches_CND: Tensor, masks: Masks) -> Tensor:
        """The student's scores (M, K) of masked patches."""
        head = self.student_heads[-1]
        if self.config.head_norm == "none":
            scores_MK: Tensor = head(masks.of(patches_CND))
            return scores_MK
        # BatchNorm over all, as the teacher's is: masked ones may be none, and their number differs between ranks.
        return masks.of(head(patches_CND.flatten(0, 1)).unflatten(0, patches_CND.shape[:2]))

    def before_step(self, progress: float) -> None:
        """Clips each tensor by itself; holds the prototypes still at first."""
        if self.config.clip:
            clip_each([*self.student.parameters(), *self.student_heads.parameters(), self.mask_token], self.config.clip)
        if progress < self.config.freeze_last_layer:
            for head in self.student_heads:
                hold_still(head)

    def after_step(self, progress: float) -> None:
        """Teacher and both centres follow."""
        teacher, student = (self.backbone, self.teacher_heads), (self.student, self.student_heads)
        follow(teacher, student, self.config.momentum, progress)
        self.batch_mean.move(self.centre_K, self.config.center_momentum, self.config.center_start)
        self.patch_batch_mean.move(self.patch_centre_K, self.config.center_momentum, self.config.center_start)

    def chance(self, batch_size: int) -> dict[str, float]:
        """The cross entropy of K equal classes; as crops without a mask cost nothing, `loss` is an expectation."""
        c, even = self.config, math.log(self.config.prototypes)
        share = c.mask_probability * (c.mask_ratio[1] > 0)
        return {"loss": (c.cls_weight + c.patch_weight * share) * even, "loss_cls": even, "loss_patch": even}

    def pictures(self, views: Views) -> dict[str, Tensor]:
        """Nothing beyond the views themselves."""
        return {}

    def teacher_temperatures(self, progress: float) -> tuple[float, float]:
        """For class tokens and for patches."""
        c, warmup = self.config, self.config.teacher_temperature_warmup
        return (
            warmed(progress, c.teacher_temperature_start, c.teacher_temperature, warmup),
            warmed(progress, c.patch_temperature_start, c.patch_temperature, warmup),
        )
