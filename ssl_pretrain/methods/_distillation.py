"""What DINO, iBOT and DINOv2 share: a student, a teacher that follows it, and a head of prototypes that both score.

Not a method: each of their files says, in its paper's order, what it does with these.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from lightly.models.modules import DINOProjectionHead
from timm.layers import DropPath
from torch import Tensor, nn

from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods import MethodConfig, exact
from ssl_pretrain.views import ViewSpec

CentreStart = Literal["zero", "batch"]
HeadNorm = Literal["none", "batch"]
Network = TypeVar("Network", bound=nn.Module)


def check(config: MethodConfig, shares: tuple[str, ...], above_zero: tuple[str, ...]) -> None:
    """Raises `UsageError` for a value of these keys that is no share, or not above 0."""
    for key in shares:
        if not 0 <= vars(config)[key] <= 1:
            raise UsageError(f"method.{key} is {vars(config)[key]}: it is a share between 0 and 1, not epochs")
    for key in above_zero:
        if vars(config)[key] <= 0:
            raise UsageError(f"method.{key} is {vars(config)[key]}: it must be above 0")


def multi_crop(
    global_size_px: int,
    global_scale: tuple[float, float],
    local_count: int,
    local_size_px: int,
    local_scale: tuple[float, float],
    color: float,
) -> tuple[ViewSpec, ...]:
    """Two global crops, always and seldom blurred, the second sometimes solarized; and the local crops."""
    large = global_size_px, global_scale, color
    globals_ = photo_crop("global_0", *large, blur_p=1.0), photo_crop("global_1", *large, blur_p=0.1, solarize_p=0.2)
    if not local_count:
        return globals_
    return *globals_, photo_crop("local", local_size_px, local_scale, color, blur_p=0.5, count=local_count)


def photo_crop(
    name: str,
    size_px: int,
    scale: tuple[float, float],
    color: float,
    *,
    blur_p: float,
    solarize_p: float = 0.0,
    count: int = 1,
) -> ViewSpec:
    """BYOL's view (table 6), which DINO, its heirs and VICReg took over: jitter (0.4s, 0.4s, 0.2s, 0.1s)."""
    strong = 0.4 * color
    return ViewSpec(
        name=name, count=count, size_px=size_px, scale=scale, jitter_p=0.8, brightness=strong, contrast=strong,
        saturation=strong / 2, hue=strong / 4, gray_p=0.2, blur_p=blur_p, solarize_p=solarize_p,
    )  # fmt: skip


def heads(
    dim: int, hidden_dim: int, bottleneck_dim: int, prototypes: int, norm_last_layer: bool, norm: HeadNorm = "none"
) -> tuple[DINOProjectionHead, DINOProjectionHead]:
    """The student's projection head and the teacher's, which begins as the same and is not trained."""
    with warnings.catch_warnings():  # lightly builds it with torch's older weight norm, which cannot be deep-copied
        warnings.simplefilter("ignore", FutureWarning)
        student, teacher = (
            DINOProjectionHead(
                dim, hidden_dim, bottleneck_dim, prototypes, norm == "batch", norm_last_layer=norm_last_layer
            )
            for _ in range(2)
        )
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    return student, teacher


def teacher_of(student: Network) -> Network:
    """A copy that is not trained and has no stochastic depth."""
    teacher = copy.deepcopy(student)
    for module in teacher.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    teacher.requires_grad_(False)
    return teacher


@torch.no_grad()
def follow(teacher: Iterable[nn.Module], student: Iterable[nn.Module], start: float, progress: float) -> None:
    """Moving average of the weights; its momentum goes from `start` to 1 on a cosine."""
    momentum = 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2
    mine: list[Tensor] = [p for module in teacher for p in module.parameters()]
    theirs: list[Tensor] = [p for module in student for p in module.parameters()]
    torch._foreach_lerp_(mine, theirs, 1 - momentum)


def warmed(progress: float, start: float, end: float, warmup: float) -> float:
    """A temperature: linear from its start to its end within the warm-up.

    >>> warmed(0.25, 0.04, 0.06, 0.5), warmed(0.9, 0.04, 0.06, 0.5), warmed(0.0, 0.04, 0.06, 0.0)
    (0.05, 0.06, 0.06)
    """
    share = min(progress / warmup, 1.0) if warmup else 1.0
    return start + (end - start) * share


@torch.no_grad()
def clip_each(parameters: Iterable[nn.Parameter], largest: float) -> None:
    """Clips the gradient of each parameter tensor by its own norm, as DINO and iBOT do; all tensors together."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        norm_N = torch.stack(torch._foreach_norm(gradients))
        torch._foreach_mul_(gradients, list((largest / (norm_N + 1e-6)).clamp(max=1.0).unbind()))


def hold_still(head: DINOProjectionHead) -> None:
    """Keeps the prototypes where they are in this step."""
    # None and not zero: weight decay and AdamW's moments must not move them either.
    for parameter in head.last_layer.parameters():
        parameter.grad = None


class BatchMean:
    """The mean that a centre will follow, over the parts of a step and over all ranks.

    lightly's losses move their centre inside the loss: a skipped step would then have moved it, and gradient
    accumulation would move it several times a step.
    """

    def __init__(self) -> None:
        self._seen: list[Tensor] = []
        self._seen_at = math.nan

    def remember(self, mean_K: Tensor, progress: float) -> None:
        """Keeps a part's mean; a step that was skipped leaves nothing behind."""
        if progress != self._seen_at:
            self._seen.clear()
        self._seen_at = progress
        self._seen.append(mean_K)

    @torch.no_grad()
    def move(self, centre_K: Tensor, momentum: float, start: CentreStart) -> None:
        """Moves the centre towards what was remembered, in place; a centre of zeros has not begun yet."""
        batch_K = torch.stack(self._seen).mean(0)
        if dist.is_initialized():
            dist.all_reduce(batch_K)
            batch_K /= dist.get_world_size()
        moved_K = centre_K.lerp(batch_K.to(centre_K), 1 - momentum)
        begun = centre_K.any() if start == "batch" else torch.ones_like(centre_K, dtype=torch.bool)
        centre_K.copy_(moved_K.where(begun, batch_K.to(centre_K)))  # by `where`, as nothing is read from the device
        self._seen.clear()


def centred(logits_K: Tensor, centre_K: Tensor, temperature: float) -> Tensor:
    """The teacher's distribution over prototypes: a softmax of its centred, sharpened logits."""
    with torch.autocast(logits_K.device.type, enabled=False):
        (logits_K,) = exact(logits_K)
        return ((logits_K - centre_K) / temperature).softmax(-1).detach()


def cross_view_loss(teacher_GBK: Tensor, student_VBK: Tensor, student_temperature: float) -> Tensor:
    """Cross entropy of the teacher's distribution for each global view with the student's for each other view.

    One image, K = 2: the teacher's one view says (3/4, 1/4). The student's view 0 is the same crop and does not count;
    its view 1 has equal logits and says (1/2, 1/2), whatever it is compared with: ln 2 = 0.6931.

    >>> student = torch.tensor([[[5.0, 0.0]], [[0.0, 0.0]]])
    >>> round(cross_view_loss(torch.tensor([[[0.75, 0.25]]]), student, 1.0).item(), 4)
    0.6931
    """
    with torch.autocast(student_VBK.device.type, enabled=False):
        (student_VBK,) = exact(student_VBK)
        student = (student_VBK / student_temperature).log_softmax(-1)
        cross_entropy_GV = -torch.einsum("gbk,vbk->gv", teacher_GBK.detach(), student) / teacher_GBK.shape[1]
    same_crop = torch.eye(*cross_entropy_GV.shape, dtype=torch.bool, device=student.device)
    return cross_entropy_GV.masked_fill(same_crop, 0).sum() / (~same_crop).sum()


@torch.no_grad()
def entropies(name: str, p_NK: Tensor) -> dict[str, Tensor]:
    """The teacher's entropy per crop (or patch) and of its mean over all, as shares of the largest possible.

    Per crop near 1: it spreads evenly. Of the mean near 0: it gives all the same prototype. Both are collapse.
    Nothing to look at counts as evenly spread: the curves of all ranks must have the same names and be finite.
    """
    largest = math.log(p_NK.shape[1])
    p_NK = p_NK if len(p_NK) else p_NK.new_full((1, p_NK.shape[1]), 1 / p_NK.shape[1])
    return {
        f"{name}_entropy": torch.special.entr(p_NK).sum(-1).mean() / largest,
        f"{name}_spread": torch.special.entr(p_NK.mean(0)).sum() / largest,
    }
