"""Optimizers: the three that the methods' papers use, with the published exclusions; and what of the backbone learns.

Trunk: the backbone that the optimizer moves. All else that is trained (projections, prototypes, decoders) is a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from ssl_pretrain.backbones import Backbone, MaskableBackbone
from ssl_pretrain.methods import Method, OptimSpec
from ssl_pretrain.train.lars import Lars
from ssl_pretrain.train.schedule import learning_rate, weight_decay


def create(method: Method, spec: OptimSpec) -> Optimizer:
    """An optimizer over the trained parameters in two groups: with weight decay, and without (biases and norms).

    LARS leaves the second group unscaled too (SimCLR, B.1). With `layer_decay` or `patch_rate` there are two groups for
    each layer of the trunk that learn at `scale` times the rate (Bao et al., BEiT, 2022), the fastest first.
    """
    trained = [p for p in method.parameters() if p.requires_grad]
    scale = scales(trunk(method), spec)
    groups: list[dict[str, Any]] = []
    for share in sorted({scale.get(p, 1.0) for p in trained}, reverse=True):
        there = [p for p in trained if scale.get(p, 1.0) == share]
        pair: list[dict[str, Any]] = [
            {"params": [p for p in there if p.ndim > 1], "weight_decay": spec.weight_decay, "decays": True},
            {"params": [p for p in there if p.ndim <= 1], "weight_decay": 0.0, "decays": False},
        ]
        groups += [{**group, "scale": share} for group in pair if group["params"]] if scale else pair
    if spec.optimizer == "adamw":
        return AdamW(groups, lr=spec.lr, betas=spec.betas, fused=True)
    if spec.optimizer == "sgd":
        # not fused: torch 2.15 fails there once a held parameter (DINO's last layer) begins to move
        return SGD(groups, lr=spec.lr, momentum=spec.momentum, foreach=True)
    return Lars(groups, lr=spec.lr, momentum=spec.momentum)


def set_rates(optimizer: Optimizer, spec: OptimSpec, progress: float) -> float:
    """Writes learning rate and weight decay of this moment into the optimizer; returns the (full) learning rate."""
    rate = learning_rate(progress, spec)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)  # groups without layer decay have no such key, as ever
        if group["decays"]:
            group["weight_decay"] = weight_decay(progress, spec)
    return rate


def trunk(method: Method) -> Backbone:
    """The backbone that is trained: the method's own, or the student that its own follows."""
    backbones = (module for module in method.modules() if isinstance(module, Backbone))
    (found,) = [b for b in backbones if any(p.requires_grad for p in b.parameters())]
    return found


def scales(backbone: Backbone, spec: OptimSpec) -> dict[Tensor, float]:
    """Of each trained parameter: its learning rate as a share of the full one, `layer_decay ** (deepest - depth)`.

    Those of the patch embedding are multiplied by `patch_rate`. Empty where all learn at the full rate.
    """
    if spec.layer_decay is None and spec.patch_rate == 1:
        return {}
    trained = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    depth = dict.fromkeys(trained, 0) if spec.layer_decay is None else backbone.layers()
    deepest, decay = max(depth.values()), spec.layer_decay or 1.0
    scale: dict[Tensor, float] = {p: decay ** (deepest - depth[name]) for name, p in trained.items()}
    if isinstance(backbone, MaskableBackbone):
        for parameter in backbone.patch_embedding.parameters():
            scale[parameter] *= spec.patch_rate
    return scale


@contextlib.contextmanager
def held(method: Method, holds: bool) -> Iterator[None]:
    """Around a step's gradients; while it `holds`, the trunk keeps its bits, and so does a teacher of it.

    Afterwards the trunk has no gradients (None and not zero, so that neither weight decay nor a moment moves it), and
    the running statistics of all backbones are what they were.
    """
    if not holds:
        yield
        return
    buffers = [b for module in method.modules() if isinstance(module, Backbone) for b in module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    yield
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)
    for parameter in trunk(method).parameters():
        parameter.grad = None
