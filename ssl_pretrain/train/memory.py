"""A batch that does not fit the device's memory: what would."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import replace

import torch

from ssl_pretrain.errors import UsageError
from ssl_pretrain.train.run import Run

LEAST = 2
"""Images of a part: BatchNorm and contrast need company."""


def too_large(
    run: Run, error: torch.OutOfMemoryError, progress: float, attempt: Callable[[int, float], object]
) -> UsageError:
    """What to raise after an `OutOfMemoryError`, with what fits: measured by running the step in smaller parts.

    `attempt(step, progress)` computes the gradients of a step. With several processes nothing is measured: they would
    have to run out of memory together.
    """
    traceback.clear_frames(error.__traceback__)  # they hold what the failed attempt had already computed
    share, batch = run.feed.share, run.recipe.train.batch_size
    mine = batch // share.ranks
    at_once, device = mine // share.parts, run.fabric.device
    said = f"step {run.step + 1}: {at_once} images at once do not fit into the memory of {device}"
    if share.ranks > 1:
        return UsageError(f"{said}: try --train.accumulate {2 * share.parts}, or a smaller --train.batch_size")
    for parts in range(share.parts + 1, mine // LEAST + 1):
        if mine % parts:
            continue
        run.feed.share = replace(share, parts=parts)
        if _fits(run, progress, attempt):
            fewer = mine // parts
            return UsageError(
                f"{said}: --train.accumulate {parts} fits (measured), which shows the method {fewer} at a time, and so "
                f"does --train.batch_size {fewer}"
            )
    return UsageError(f"{said}, nor do {LEAST}: use smaller views or another backbone")


def _fits(run: Run, progress: float, attempt: Callable[[int, float], object]) -> bool:
    """Whether the gradients of the step and the optimizer's two moments find room."""
    _free(run)
    try:
        attempt(run.step, progress)
        moments = [torch.empty_like(p) for p in run.method.parameters() if p.grad is not None for _ in range(2)]
        del moments
    except torch.OutOfMemoryError:
        return False
    finally:
        _free(run)
    return True


def _free(run: Run) -> None:
    run.optimizer.zero_grad()
    gc.collect()
    if run.fabric.device.type == "cuda":
        torch.cuda.empty_cache()
