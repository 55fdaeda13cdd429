"""Steps whose loss or gradient is not finite: skipped, counted, and at some point too many."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ssl_pretrain.train.health import Diagnosis, not_finite

MANY, WINDOW = 10, 1000
"""Skipped steps in so many that are too many, though never several in a row."""


class Guard:
    """Looks at each step's gradient norm; the optimizer has not moved where it is not finite."""

    def __init__(self, max_skipped: int) -> None:
        self.max_skipped, self.skipped, self.in_a_row = max_skipped, list[int](), 0

    def look(self, step: int, loss: Tensor, norm: float, rate: float) -> Diagnosis | None:
        """What is wrong with a step that was skipped, None for a good one."""
        if math.isfinite(norm):
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        self.skipped = [*(s for s in self.skipped if s > step - WINDOW), step]
        return not_finite(float(loss), norm, self.in_a_row, rate)

    @property
    def exceeded(self) -> bool:
        """Whether that was one too many."""
        return self.in_a_row > self.max_skipped or len(self.skipped) > MANY


class Buffers:
    """A copy of all buffers of a module (BatchNorm moves them in a forward that may turn out to be worth nothing)."""

    def __init__(self, module: nn.Module) -> None:
        mine = list(module.buffers())
        self.kinds = [[b for b in mine if b.dtype == kind] for kind in sorted({b.dtype for b in mine}, key=str)]
        self.copies = [[torch.empty_like(b) for b in some] for some in self.kinds]

    def remember(self) -> None:
        """Copies them, those of one kind in one launch."""
        for copies, some in zip(self.copies, self.kinds, strict=True):
            torch._foreach_copy_(copies, some)

    def put_back(self) -> None:
        """What they were when they were copied."""
        for copies, some in zip(self.copies, self.kinds, strict=True):
            torch._foreach_copy_(some, copies)
