"""DenseGeo: a spot of the field is told from spots of other fields, at every level of the pyramid that a detector uses.

It is DenseCL (Wang, Zhang, Shen, Kong, Li. "Dense Contrastive Learning for Self-Supervised Visual Pre-Training", CVPR
2021: its losses, heads, temperature, weights) with three departures, hence the other name:
- which cells of two views show one spot is read off the crops, as in PixPro (Xie, Lin, Zhang, Cao, Lin, Hu. "Propagate
  Yourself", CVPR 2021), and not guessed from the most similar features;
- each of the last three strides is trained (P3 to P5), not the last map alone; a plain ViT has one stride, one level;
- negatives are the batch's, of all ranks, as in SimCLR; there is no queue and no second encoder.
Two views overlap for certain only if each shows over half of the side of what they are cut from: a share of 0.4 does
so in a square, so give the recipe a `views.window_px`. Cells without a counterpart are not in the loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from lightly.models.utils import patchify, unpatchify
from lightly.utils.dist import gather
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain import rng
from ssl_pretrain.backbones import Backbone
from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods import Method, MethodConfig, OptimSpec, Views, ViTDefaults, exact, train_only
from ssl_pretrain.views import ViewSpec

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Config(MethodConfig):
    """DenseGeo with the constants of DenseCL's COCO runs where it has them."""

    size_px: int = 224
    """Side of a view; a multiple of the backbone's coarsest stride."""
    scale: tuple[float, float] = (0.4, 1.0)
    """Share of the area that a view shows (DenseCL: 0.2 to 1); under 0.34 two views of a square may share no spot."""
    color: float = 1.0
    """Strength s of the colour jitter (0.4s, 0.4s, 0.4s, 0.1s)."""
    blur_p: float = 0.5
    """Probability of a Gaussian blur with sigma 0.1 to 2.0."""
    levels: int = 3
    """Levels of the pyramid that are trained, from the coarsest: 3 are P3, P4 and P5."""
    reach: float = 0.5
    """How far, in cells and along each axis, the middle of a cell may lie from its counterpart's; 0.5: anywhere in it,
    more: also beyond the other view's edge."""
    anchors: int = 32
    """Cells per view and level that are looked for in the other view, drawn among those to be found there."""
    negatives: int = 8
    """Cells per view and level that all other images are told from. A level's similarities take
    8 * anchors * negatives * images of this rank * images of all ranks bytes."""
    temperature: float = 0.2
    """Of the softmax over cosine similarities."""
    dense_weight: float = 0.5
    """Lambda of DenseCL's equation 3: share of the dense loss; the rest is the global one."""
    hidden_dim: int = 2048
    """Width of the heads' hidden layer."""
    output_dim: int = 128
    """Width of the projections that are compared."""

    def __post_init__(self) -> None:
        for key in ("temperature", "reach"):
            if vars(self)[key] <= 0:
                raise UsageError(f"method.{key} is {vars(self)[key]}: it must be above 0")
        for key in ("levels", "anchors", "negatives"):
            if vars(self)[key] < 1:
                raise UsageError(f"method.{key} is {vars(self)[key]}: it must be at least 1")
        if not 0 <= self.dense_weight <= 1:
            raise UsageError(f"method.dense_weight is {self.dense_weight}: it is a share between 0 and 1")

    def views(self) -> tuple[ViewSpec, ...]:
        """Two views from one distribution: MoCo v2's augmentations, as DenseCL's."""
        strong = 0.4 * self.color
        return (
            ViewSpec(
                name="view", count=2, size_px=self.size_px, scale=self.scale, blur_p=self.blur_p, jitter_p=0.8,
                brightness=strong, contrast=strong, saturation=strong, hue=0.1 * self.color, gray_p=0.2,
            ),
        )  # fmt: skip

    def optim(self, family: Literal["vit", "convnet"]) -> OptimSpec:
        """DenseCL's SGD for COCO, whose images too hold many objects; AdamW for ViTs (MoCo v3, section 4)."""
        if family == "convnet":
            return OptimSpec("sgd", lr=0.3, weight_decay=1e-4)
        return OptimSpec("adamw", lr=1.5e-4, weight_decay=0.1)

    def vit(self) -> ViTDefaults:
        """The mean patch token: the maps are trained, and not the class token."""
        return ViTDefaults(pool="avg", drop_path=0.0)


class DenseGeo(Method):
    """Backbone, a global projection head, and a dense one for each level."""

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__()
        last = {stride: i for i, stride in enumerate(backbone.strides)}
        self.levels = [last[stride] for stride in sorted(last)][-config.levels :]
        coarsest = backbone.strides[self.levels[-1]]
        if config.size_px % coarsest:
            raise UsageError(f"method.size_px is {config.size_px}: {backbone.name} needs a multiple of {coarsest}")
        self.config, self.backbone = config, backbone
        self.sides = [config.size_px // backbone.strides[i] for i in self.levels]
        channels = [backbone.channels[i] for i in self.levels]
        self.global_head = _head(config, channels[-1])
        self.dense_heads = nn.ModuleList([_head(config, width) for width in channels])
        train_only(backbone, config.size_px, lambda x_BCHW: [backbone.maps(x_BCHW)[i] for i in self.levels])

    def loss(self, views: Views, progress: float) -> dict[str, Tensor]:
        """Equation 3 of DenseCL, each view in turn as the query."""
        maps = self.backbone.maps(views.crops["view"].flatten(0, 1))
        # The whole view as a map of one cell: each is its image's only anchor, positive and negative.
        z_VB1D = torch.stack(self.global_head(maps[self.levels[-1]].mean((2, 3))).unsqueeze(1).chunk(2))
        found_VB1 = torch.ones_like(z_VB1D[..., 0], dtype=torch.bool)
        global_loss = self._both(z_VB1D, z_VB1D.flip(0), z_VB1D.flip(0), found_VB1)
        dense_losses, matched = [], []
        for level, index in enumerate(self.levels):
            # The geometry is done on the host while a GPU computes the maps.
            cells_VBT, found_VBA, share = self.draw(views, level)
            dense_losses.append(self._dense_loss(maps[index], cells_VBT, found_VBA, level))
            matched.append(share)
        dense_loss, weight = torch.stack(dense_losses).mean(), self.config.dense_weight
        return {
            "loss": (1 - weight) * global_loss + weight * dense_loss,
            "loss_global": global_loss.detach(),
            "loss_dense": dense_loss.detach(),
            "matched": torch.tensor(matched, device=dense_loss.device).mean(),
        }

    def _dense_loss(self, map_NCHW: Tensor, cells_VBT: Tensor, found_VBA: Tensor, level: int) -> Tensor:
        """One level's loss; of its 1 x 1 convolutions only the drawn cells are computed, which makes them linear."""
        map_VBCN = map_NCHW.reshape(2, -1, map_NCHW.shape[1], map_NCHW.shape[2] * map_NCHW.shape[3])
        drawn_VBCT = map_VBCN.gather(3, cells_VBT.unsqueeze(2).expand(-1, -1, map_VBCN.shape[2], -1))
        z_VBTD = self.dense_heads[level](drawn_VBCT.transpose(2, 3))
        anchors = found_VBA.shape[2]
        positive_VBAD, negative_VBND = z_VBTD[:, :, anchors : 2 * anchors].flip(0), z_VBTD[:, :, 2 * anchors :].flip(0)
        return self._both(z_VBTD[:, :, :anchors], positive_VBAD, negative_VBND, found_VBA)

    def _both(self, anchor_VBAD: Tensor, positive_VBAD: Tensor, negative_VBND: Tensor, found_VBA: Tensor) -> Tensor:
        """The mean of the two views' losses, each once as the query."""
        queries = zip(anchor_VBAD, positive_VBAD, negative_VBND, found_VBA, strict=True)
        return torch.stack([info_nce(*query, self.config.temperature) for query in queries]).mean()

    def draw(self, views: Views, level: int) -> tuple[Tensor, Tensor, float]:
        """(V, B, T) cells of each view, (V, B, A) which of its anchors have a counterpart, and the share of all cells.

        The T cells are A anchors, the counterparts of the other view's A anchors, and the negatives.
        """
        match_VBN, found_VBN = self._matches(views, level)
        key_VB2 = rng.fold_in(rng.fold_in(views.key_B2, _CELLS), np.array([[2 * level], [2 * level + 1]]))
        noise_VBN = rng.uniform(key_VB2, match_VBN.shape[2])
        negative_VBn = noise_VBN.argsort(axis=2, kind="stable")[..., : self.config.negatives]
        anchor_VBA = (noise_VBN + ~found_VBN).argsort(axis=2, kind="stable")[..., : self.config.anchors]
        partner_VBA = np.take_along_axis(match_VBN, anchor_VBA, axis=2)
        found_VBA = np.take_along_axis(found_VBN, anchor_VBA, axis=2)
        cells_VBT = np.concatenate([anchor_VBA, partner_VBA[::-1], negative_VBn], axis=2)
        device = views.crops["view"].device
        cells, found = (torch.from_numpy(x).to(device, non_blocking=True) for x in (cells_VBT, found_VBA))
        return cells, found, float(found_VBN.mean())

    def _matches(self, views: Views, level: int) -> tuple[Ints, Bools]:
        """(V, B, N): for each cell of a view its counterpart in the other, and whether it has one."""
        if views.corners is None:
            raise ValueError("DenseGeo must know where its views lie: Views(crops, key_B2, corners)")
        corners, side = views.corners["view"], self.sides[level]
        each = [counterparts(corners[:, v], corners[:, 1 - v], side, self.config.reach) for v in (0, 1)]
        return np.stack([match for match, _ in each]), np.stack([found for _, found in each])

    def before_step(self, progress: float) -> None:
        """The papers leave the gradients alone."""

    def after_step(self, progress: float) -> None:
        """There is no teacher."""

    def chance(self, batch_size: int) -> dict[str, float]:
        """All projections equal: one of the candidates is right, the others are the other images' negatives."""
        drawn = [min(self.config.negatives, side**2) for side in self.sides]
        dense = sum(math.log(1 + (batch_size - 1) * count) for count in drawn) / len(drawn)
        weight, alone = self.config.dense_weight, math.log(batch_size)
        return {"loss": (1 - weight) * alone + weight * dense, "loss_global": alone, "loss_dense": dense}

    def pictures(self, views: Views) -> dict[str, Tensor]:
        """Rows of three: a view, the other view's finest cells put where it has their counterparts, the other view."""
        first, second = views.crops["view"][:, :8]
        side, stride = self.sides[0], self.config.size_px // self.sides[0]
        match_VBN, found_VBN = self._matches(views, 0)
        match_BN, found_BN = (torch.from_numpy(x[0, :8]).to(first.device) for x in (match_VBN, found_VBN))
        cells_BNP = patchify(second, stride)
        moved_BNP = cells_BNP.gather(1, match_BN.unsqueeze(-1).expand(-1, -1, cells_BNP.shape[-1]))
        moved = unpatchify(moved_BNP * found_BN.unsqueeze(-1), stride)
        assert moved.shape[-1] == side * stride
        return {"correspondence": torch.stack([first, moved, second], dim=1).flatten(0, 1)}


_CELLS = 2
"""The draw number of cells under an image's key."""


def counterparts(here_B42: Floats, there_B42: Floats, side: int, reach: float) -> tuple[Ints, Bools]:
    """For each of the side x side cells of a view, row by row, the nearest cell of another view of the image.

    Views are given by their corners (clockwise from the top left), between which they are affine. Returns (B, N) the
    index of the nearest cell, by the distance of the middles along each axis of the other view in its cells, and
    (B, N) whether that is at most `reach`.

    Two cells a side; the other view lies half a view further right: its left cells show what the right ones show here.

    >>> square = np.array([[[0.0, 0.0], [8.0, 0.0], [8.0, 8.0], [0.0, 8.0]]])
    >>> match, found = counterparts(square, square + [4.0, 0.0], side=2, reach=0.5)
    >>> match[found].tolist(), found.tolist()
    ([0, 2], [[False, True, False, True]])
    """
    middle_S = (np.arange(side) + 0.5) / side
    down_N, across_N = (x.reshape(-1, 1) for x in np.meshgrid(middle_S, middle_S, indexing="ij"))
    right, below = here_B42[:, 1] - here_B42[:, 0], here_B42[:, 3] - here_B42[:, 0]
    spot_BN2 = here_B42[:, :1] + across_N * right[:, None] + down_N * below[:, None] - there_B42[:, :1]
    right, below = there_B42[:, 1] - there_B42[:, 0], there_B42[:, 3] - there_B42[:, 0]
    area_B = _cross(right, below)
    column_BN = _cross(spot_BN2, below[:, None]) / area_B[:, None] * side
    row_BN = _cross(right[:, None], spot_BN2) / area_B[:, None] * side
    cell_BN2 = np.clip(np.floor(np.stack([row_BN, column_BN], axis=-1)), 0, side - 1)
    apart_BN = np.abs(np.stack([row_BN, column_BN], axis=-1) - cell_BN2 - 0.5).max(axis=-1)
    cell_BN: Ints = (cell_BN2[..., 0] * side + cell_BN2[..., 1]).astype(np.int64)
    return cell_BN, apart_BN <= reach


def info_nce(
    anchor_BAD: Tensor, positive_BAD: Tensor, negative_BND: Tensor, found_BA: Tensor, temperature: float
) -> Tensor:
    """InfoNCE (DenseCL's equations 1 and 2): each anchor's positive against it and the negatives of all other images.

    The mean over the anchors that have a positive; with several ranks, the negatives are all ranks', and this rank's
    part is weighted so that the mean over ranks is the mean over all anchors.

    Two images at right angles to each other, one cell each: the positive has similarity 1, the one negative 0, so the
    loss is -ln(e / (e + 1)) = ln(1 + 1 / e) = 0.3133.

    >>> z = torch.eye(2).unsqueeze(1)
    >>> round(info_nce(z, z, z, torch.ones(2, 1, dtype=torch.bool), temperature=1.0).item(), 4)
    0.3133
    """
    with torch.autocast(anchor_BAD.device.type, enabled=False):
        anchor, positive, negative = (F.normalize(z, dim=-1) for z in exact(anchor_BAD, positive_BAD, negative_BND))
        images, rank, ranks = len(anchor), 0, 1
        total = found_BA.sum()
        if dist.is_initialized():
            rank, ranks = dist.get_rank(), dist.get_world_size()
            negative = torch.cat(gather(negative.contiguous()))
            dist.all_reduce(total)
        anchor = anchor / temperature
        positive_BA = (anchor * positive).sum(-1)
        negative_BAGN = torch.einsum("bad,gnd->bagn", anchor, negative)
        number_B = torch.arange(images, device=anchor.device) + rank * images
        own_BG = number_B.unsqueeze(1) == torch.arange(len(negative), device=anchor.device)
        others_BA = negative_BAGN.masked_fill_(own_BG[:, None, :, None], -math.inf).flatten(2).logsumexp(2)
        loss_BA = torch.logaddexp(positive_BA, others_BA) - positive_BA
        return loss_BA.masked_fill(~found_BA, 0).sum() * ranks / total.clamp(min=1)


def _cross(a: Floats, b: Floats) -> Floats:
    """Of vectors (..., 2): the signed area between them."""
    return np.asarray(a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0])


def _head(config: Config, width: int) -> nn.Sequential:
    """DenseCL's: two layers, no norm."""
    return nn.Sequential(
        nn.Linear(width, config.hidden_dim), nn.ReLU(), nn.Linear(config.hidden_dim, config.output_dim)
    )
