"""LARS without waiting for the device. lightly's asks for two norms of each tensor, a hundred waits a step on a GPU.

Shapes: N tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

TRUST = 0.001
"""eta of the paper."""
EPSILON = 1e-8


class Lars(Optimizer):
    """SGD with momentum, each tensor's step in proportion to its weights (You, Gitman and Ginsburg, 2017, algorithm 1).

    Groups without weight decay are not scaled. On a GPU all tensors go together. Equals lightly's to rounding (tests).
    """

    def __init__(self, parameters: Iterable[Any], lr: float, momentum: float, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; takes no closure."""
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            singly = weights[0].device.type == "cpu"  # where one tensor after the other stays in the cache
            for part in [[p] for p in weights] if singly else [weights]:
                self._move(part, group)

    def _move(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """The step of some tensors of a group, together."""
        moves: Any = [p.grad for p in weights]
        if (decay := group["weight_decay"]) != 0:
            moves = _scaled(weights, moves, decay)
        for p, move in zip(weights, moves, strict=True):
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(move)
        buffers = [self.state[p]["momentum_buffer"] for p in weights]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, moves)
        torch._foreach_add_(weights, buffers, alpha=-group["lr"])


def _scaled(weights: list[Tensor], gradients: list[Tensor], decay: float) -> Any:
    """Gradients with weight decay, each times its trust ratio; as they are where either norm is zero."""
    w_N, g_N = torch.stack(torch._foreach_norm(weights)), torch.stack(torch._foreach_norm(gradients))
    trust_N = TRUST * w_N / (g_N + w_N * decay + EPSILON)
    scale_N = torch.where(w_N == 0, 1.0, torch.where(g_N == 0, 0.0, trust_N))  # g = 0: no decay either
    moves: Any = torch._foreach_add(gradients, weights, alpha=decay)
    torch._foreach_mul_(moves, list(scale_N.unbind()))
    return moves
