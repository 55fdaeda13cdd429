"""What health is judged by and losses do not tell: features of fixed views, and how far a teacher is from its student.

It draws no random number, trains nothing and moves no statistic: a run with it ends with the bits of one without.
"""

from __future__ import annotations

import copy
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from ssl_pretrain.methods import Method
from ssl_pretrain.train import spectrum
from ssl_pretrain.train.feed import Feed
from ssl_pretrain.views.engine import TORCH

VIEWS = 64
"""Views of as many images, looked at every few log steps: a 64-image forward, 0.3 % of 50 steps with a batch of 128."""
IMAGES, VIEWS_EACH = 128, 4
"""Looked at beside each probe: a forward of 512 views."""


class Checkup:
    """Looks at a method in the middle of a run; the views are the same at every look, and on every rank."""

    def __init__(self, feed: Feed, method: Method) -> None:
        self.feed, self.method = feed, method

    def often(self) -> dict[str, float]:
        """Spread and rank of the features of 64 images, and the distance of a teacher from its student."""
        z_ND = features(self.method.backbone, self._views_NCHW)
        return {"feature_std": spectrum.spread(z_ND), "feature_rank": spectrum.centred_rank(z_ND), **self._gap()}

    def seldom(self) -> dict[str, float]:
        """Label-free figures of the features of 4 views of 128 images."""
        ids_I = np.arange(min(IMAGES, len(self.feed.pack)))
        parts = np.array_split(ids_I, -(-len(ids_I) // VIEWS))
        z_IQD = torch.stack(
            [
                torch.cat([features(self.method.backbone, self._draw(part, epoch)) for part in parts])
                for epoch in range(VIEWS_EACH)
            ],
            dim=1,
        )
        z_ND = z_IQD.flatten(0, 1)
        return {"rankme": spectrum.rankme(z_ND), "alpha_req": spectrum.alpha_req(z_ND), "lidar": spectrum.lidar(z_IQD)}

    @cached_property
    def _views_NCHW(self) -> Tensor:
        return self._draw(np.arange(min(VIEWS, len(self.feed.pack))), epoch=0)

    def _draw(self, ids_B: np.ndarray, epoch: int) -> Tensor:
        """The first view of the method's first kind, of these images; by plain torch, which compiles nothing for it."""
        self.feed.store  # opened before the copy, so that the images are not kept twice  # noqa: B018
        feed = copy.copy(self.feed)
        feed.specs, feed.engine = feed.specs[:1], TORCH
        return feed.draw(ids_B, epoch).crops[feed.specs[0].name][0]

    def _gap(self) -> dict[str, float]:
        """How far a teacher's weights are from its student's, by the length of those; nothing without a teacher."""
        pairs = _pairs(self.method)
        if not pairs:
            return {}
        theirs, mine = ([t.detach() for t in side] for side in zip(*pairs, strict=True))
        apart = nn.utils.get_total_norm(torch._foreach_sub(theirs, mine))
        return {"teacher_gap": (apart / nn.utils.get_total_norm(mine).clamp_min(1e-12)).item()}


def _pairs(method: Method) -> list[tuple[Tensor, Tensor]]:
    """Parameters that are not trained beside those that are and have the same name in another part of the method."""
    trained: dict[tuple[str, torch.Size], Tensor] = {}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            trained.setdefault((name.partition(".")[2], parameter.shape), parameter)
    still = [(name.partition(".")[2], p) for name, p in method.named_parameters() if not p.requires_grad]
    return [(p, trained[name, p.shape]) for name, p in still if name and (name, p.shape) in trained]


@torch.no_grad()
def features(backbone: nn.Module, x_BCHW: Tensor) -> Tensor:
    """The features in evaluation mode, on the CPU; every part of the backbone is then in the mode it was in."""
    training = [module for module in backbone.modules() if module.training]
    backbone.eval()
    try:
        z_BD: Tensor = backbone(x_BCHW)
    finally:
        for module in training:
            module.training = True
    return z_BD.float().cpu()
