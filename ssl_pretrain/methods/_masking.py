"""What iBOT and DINOv2 share: block-wise masks that belong to the image, and the loss on the patches they hide.

C global crops (one after another, each over the batch), L local crops, T tokens (class, registers, patches), M masked
patches of all crops together.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ssl_pretrain import rng
from ssl_pretrain.backbones import Backbone, MaskableBackbone
from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods import MethodConfig, exact

ASPECT = 0.3
"""The flattest block: height over width from this to its inverse, evenly on a log scale (BEiT)."""
TRIES, ATTEMPTS = 10, 64
"""Failed attempts in a row after which a crop gets no further block (the authors'), and attempts in all."""
_MASK = 1
"""The draw number of the first global crop's mask under an image's key."""


class Masks(NamedTuple):
    """What the student does not see of a batch's global crops."""

    mask_CN: Tensor
    """True where a patch is masked."""
    index_M: Tensor
    """Where the masked patches stand among all C N patches."""
    weight_M: Tensor
    """1 / (C * masked patches of the same crop): each masked crop counts the same, whatever its ratio."""

    @classmethod
    def draw(
        cls, key_B2: rng.Key, like_CCHW: Tensor, patch_px: int, probability: float, ratio: tuple[float, float],
        smallest: int | None = None,
    ) -> Masks:  # fmt: skip
        """Masks for two global crops; made on the CPU, so that nothing waits for the device to count patches.

        smallest    patches of the smallest block; None for iBOT's rule, (short side of the grid // 3)^2
        """
        grid = (like_CCHW.shape[-2] // patch_px, like_CCHW.shape[-1] // patch_px)
        smallest = (min(grid) // 3) ** 2 if smallest is None else smallest
        keys = np.concatenate([rng.fold_in(key_B2, _MASK + crop) for crop in range(2)])
        mask_CN = block_masks(keys, grid, probability, ratio, smallest).reshape(len(keys), -1)
        crop_M = mask_CN.nonzero()[0]
        weight_M = 1 / (len(mask_CN) * mask_CN.sum(1)[crop_M])

        def there(array: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(like_CCHW.device, non_blocking=True)

        weights = weight_M.astype(np.float64 if like_CCHW.dtype == torch.float64 else np.float32)
        return cls(there(mask_CN), there(np.flatnonzero(mask_CN)), there(weights))

    def of(self, patches_CNX: Tensor) -> Tensor:
        """The masked ones of all crops' patches: (C, N, X) -> (M, X)."""
        return patches_CNX.flatten(0, 1).index_select(0, self.index_M)


def block_masks(
    key_C2: rng.Key, grid: tuple[int, int], probability: float, ratio: tuple[float, float], smallest: int
) -> npt.NDArray[np.bool_]:
    """Block-wise masks (C, *grid), each from its own key: BEiT's algorithm 1, for all crops in lockstep.

    A crop is masked at all with `probability`, and then a share of its patches that is uniform in `ratio`, or a little
    less: blocks of random area and aspect are laid until that many patches are covered or no block fits any more.
    """
    height, width = grid
    draw_C2 = rng.uniform(key_C2, 2)
    share_C = np.where(draw_C2[:, 0] < probability, ratio[0] + (ratio[1] - ratio[0]) * draw_C2[:, 1], 0)
    room_C = np.floor(share_C * height * width).astype(int)
    mask_CHW, failed_C = np.zeros((len(key_C2), height, width), bool), np.zeros(len(key_C2), int)
    u_CA4 = np.zeros((len(key_C2), ATTEMPTS, 4))
    u_CA4[room_C > 0] = rng.uniform(rng.fold_in(key_C2[room_C > 0], 0), 4 * ATTEMPTS).reshape(-1, ATTEMPTS, 4)
    rows, columns = np.arange(height)[:, None], np.arange(width)
    for attempt in range(ATTEMPTS):
        going = np.flatnonzero((room_C > 0) & (failed_C < TRIES))
        if not len(going):
            break
        u_4A = u_CA4[going, attempt].T
        area = smallest + (room_C[going] - smallest) * u_4A[0]
        aspect = np.exp(math.log(ASPECT) * (1 - 2 * u_4A[1]))
        h, w = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        top, left = np.floor(u_4A[2] * (height - h + 1)), np.floor(u_4A[3] * (width - w + 1))
        down, right = top + h, left + w
        top, left, down, right = (side[:, None, None] for side in (top, left, down, right))
        block = (rows >= top) & (rows < down) & (columns >= left) & (columns < right)
        new = (block & ~mask_CHW[going]).sum((1, 2))
        fits = (h < height) & (w < width) & (0 < new) & (new <= room_C[going])
        mask_CHW[going[fits]] |= block[fits]
        room_C[going] -= np.where(fits, new, 0)
        failed_C[going] = np.where(fits, 0, failed_C[going] + 1)
    return mask_CHW


def masked_patch_loss(teacher_MK: Tensor, student_MK: Tensor, weight_M: Tensor, student_temperature: float) -> Tensor:
    """Cross entropy on masked patches, averaged per crop and then over all crops (iBOT, equation 3).

    A crop without a mask counts as zero, as in the authors' code. Two crops: the first has two masked patches, K = 2,
    where the student says (1/2, 1/2), ln 2 each, whatever the teacher says; the second has none: (ln 2 + 0) / 2.

    >>> teacher, weight = torch.tensor([[1.0, 0.0], [0.25, 0.75]]), torch.tensor([1 / (2 * 2), 1 / (2 * 2)])
    >>> round(masked_patch_loss(teacher, torch.zeros(2, 2), weight, 0.1).item(), 4)
    0.3466
    """
    with torch.autocast(student_MK.device.type, enabled=False):
        (student_MK,) = exact(student_MK)
        student = (student_MK / student_temperature).log_softmax(-1)
        return -torch.einsum("mk,mk,m->", teacher_MK.detach(), student, weight_M.to(student))


def per_masked_crop(loss: Tensor, weight_M: Tensor) -> Tensor:
    """For a curve that does not jump with the number of masked crops: `masked_patch_loss` over masked crops alone."""
    total = weight_M.sum()
    return loss.detach() / torch.where(total > 0, total, torch.ones_like(total))


def check_masking(config: MethodConfig) -> None:
    """Raises `UsageError` for a `mask_ratio` that is no range of shares."""
    low, high = vars(config)["mask_ratio"]
    if not 0 <= low <= high <= 1:
        raise UsageError(f"method.mask_ratio is ({low}, {high}): it is a range of shares between 0 and 1")


def plain_vit(method: str, backbone: Backbone) -> MaskableBackbone:
    """The backbone, if it is a ViT with a class token; else `UsageError`."""
    if not isinstance(backbone, MaskableBackbone):
        raise UsageError(f"{method} needs a plain ViT, and {backbone.name} is none")
    if not backbone.prefix_tokens:
        raise UsageError(f"{method} needs a plain ViT with a class token, and {backbone.name} has none")
    return backbone


def all_tokens(backbone: MaskableBackbone, x_BCHW: Tensor) -> Tensor:
    """The tokens of images with nothing masked: (B, prefix + N, D)."""
    patches = (x_BCHW.shape[-2] // backbone.patch_px) * (x_BCHW.shape[-1] // backbone.patch_px)
    return backbone.tokens(x_BCHW, torch.arange(patches, device=x_BCHW.device).expand(len(x_BCHW), -1))
