"""Optimizers: the three that the methods' papers use, with the published exclusions."""

from __future__ import annotations

from lightly.utils.lars import LARS
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from ssl_pretrain.methods import OptimSpec
from ssl_pretrain.train.schedule import learning_rate, weight_decay


def create(module: nn.Module, spec: OptimSpec) -> Optimizer:
    """An optimizer over the trained parameters in two groups: with weight decay, and without (biases and norms).

    LARS leaves the second group unscaled too (SimCLR, B.1).
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": spec.weight_decay, "decays": True},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0, "decays": False},
    ]
    if spec.optimizer == "adamw":
        return AdamW(groups, lr=spec.lr, betas=spec.betas, fused=True)
    if spec.optimizer == "sgd":
        return SGD(groups, lr=spec.lr, momentum=spec.momentum)
    lars: Optimizer = LARS(groups, lr=spec.lr, momentum=spec.momentum)
    return lars


def set_rates(optimizer: Optimizer, spec: OptimSpec, progress: float) -> float:
    """Writes learning rate and weight decay of this moment into the optimizer; returns the learning rate."""
    rate = learning_rate(progress, spec)
    for group in optimizer.param_groups:
        group["lr"] = rate
        if group["decays"]:
            group["weight_decay"] = weight_decay(progress, spec)
    return rate
