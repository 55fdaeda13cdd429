"""Schedules: functions of progress in [0, 1], so nothing of them is ever saved."""

from __future__ import annotations

import math

from ssl_pretrain.methods import OptimSpec


def cosine(progress: float, start: float, end: float) -> float:
    """Half a cosine wave from `start` at 0 to `end` at 1.

    >>> [round(cosine(p, 1.0, 0.0), 4) for p in (0.0, 0.25, 0.5, 1.0)]
    [1.0, 0.8536, 0.5, 0.0]
    """
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate(progress: float, optim: OptimSpec) -> float:
    """Linear from 0 within the warm-up, then a cosine to the end (Loshchilov & Hutter, 2017).

    >>> from ssl_pretrain.methods import OptimSpec
    >>> [round(learning_rate(p, OptimSpec("adamw", lr=1.0, warmup=0.2)), 4) for p in (0.1, 0.2, 0.6)]
    [0.5, 1.0, 0.5]
    """
    if progress < optim.warmup:
        return optim.lr * progress / optim.warmup
    return cosine((progress - optim.warmup) / (1 - optim.warmup), optim.lr, optim.lr_end)


def weight_decay(progress: float, optim: OptimSpec) -> float:
    """Constant, or a cosine from start to end (DINO: 0.04 to 0.4)."""
    end = optim.weight_decay if optim.weight_decay_end is None else optim.weight_decay_end
    return cosine(progress, optim.weight_decay, end)
