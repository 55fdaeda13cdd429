"""A run in progress, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor
from torch.optim import Optimizer

from ssl_pretrain.data.pack import Pack
from ssl_pretrain.methods import Method, OptimSpec
from ssl_pretrain.train.checkup import Checkup
from ssl_pretrain.train.drift import Drift
from ssl_pretrain.train.feed import Feed
from ssl_pretrain.train.guard import Buffers, Guard
from ssl_pretrain.train.health import Health
from ssl_pretrain.train.online import OnlineProbe
from ssl_pretrain.train.recipe import Recipe


@dataclass(frozen=True)
class Result:
    """What a run left behind."""

    folder: Path
    artefact: Path
    step: int
    scores: Mapping[str, float]
    """The last k-NN scores; empty without a probe."""


@dataclass
class Run:
    """A run in progress."""

    recipe: Recipe
    folder: Path
    fabric: Fabric
    pack: Pack
    method: Method
    wrapped: Any
    """The method as Fabric runs it (precision, DDP)."""
    optimizer: Optimizer
    optim: OptimSpec
    feed: Feed
    checkup: Checkup
    health: Health
    probe: OnlineProbe | None
    steps: int
    guard: Guard
    buffers: Buffers
    drift: Drift | None = None
    """Of a run that starts from given weights, on rank 0."""
    step: int = 0
    best: float = -1.0
    stale: int = 0
    """Probes since the best one."""
    scores: Mapping[str, float] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)
    """What was changed on purpose when it was continued: `{"step": ..., "what": ...}`."""


def over_ranks(fabric: Fabric, value: Tensor) -> float:
    """The mean of a number over all processes."""
    value = value.detach().clone()
    if fabric.world_size > 1:
        dist.all_reduce(value)
    return value.item() / fabric.world_size
