"""Which engine makes the views of a run: chosen once, with a reason, by device, work and what is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ssl_pretrain.errors import UsageError
from ssl_pretrain.views import ViewSpec, fused
from ssl_pretrain.views.plan import Plan, plan

Name = Literal["torch", "compiled", "triton"]
WORTH_PX = 1e10
"""Pixels of views (200,000 views of 224 px) above which compiling is sooner done than its time is saved: it saves about
10 ns a pixel and may cost a minute."""
AGREE = 1e-3
"""Largest difference from the torch engine, of full scale, that a first look at the Triton engine may show."""

Flat = tuple[Tensor, npt.NDArray[np.int64]]
"""Uint8 bytes on the device, and the first byte of each image in them."""


@dataclass(frozen=True)
class Engine:
    """How views are made, and why so."""

    name: Name
    reason: str
    kernels: fused.Kernels = fused.EAGER

    def render(
        self,
        drawn: Plan,
        images: Callable[[], Sequence[Tensor]],
        flat: Callable[[], Flat],
        size_B2: npt.NDArray[np.int64],
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        """Spec name -> (V, B, 3, S, S), normalised.

        images    gives uint8 (H, W, 3), one for each of the plan's
        flat      gives the same in one buffer on the device; only the Triton engine asks for it
        """
        if self.name == "triton":
            from ssl_pretrain.views import gpu

            pixels, offset_B = flat()
            return gpu.render(drawn, pixels, offset_B, size_B2, mean, std, dtype)
        return fused.render(drawn, images(), mean, std, device, dtype, self.kernels)


TORCH = Engine("torch", "views: plain torch")
"""What works everywhere at once: for a few views."""


def choose(specs: Sequence[ViewSpec], device: torch.device, images: int, wanted: Name | None = None) -> Engine:
    """The engine for so many images' views on a device; `wanted` forces one, and `UsageError` says why it cannot be.

    On a CPU, loops compiled for the machine where the run is long enough to pay for the compiling; on CUDA the Triton
    kernels, after they were seen to agree with the torch engine on this device; else plain torch.
    """
    _try_extras(specs, device)
    if wanted == "torch":
        return Engine("torch", "views: plain torch, as asked")
    if device.type == "cuda" and wanted != "compiled":
        engine, problem = _triton(specs, device)
    elif device.type == "cpu" and wanted != "triton":
        work_px = float(images) * sum(spec.count * spec.size_px**2 for spec in specs)
        if wanted is None and work_px < WORTH_PX:
            return Engine("torch", "views: plain torch, as the run is too short to pay for compiling")
        engine, problem = _compiled(specs)
    else:
        where = "needs a CUDA device" if wanted == "triton" else "is for CPUs"
        engine, problem = Engine("torch", "views: plain torch"), where
    if problem and wanted is not None:
        raise UsageError(f"views.engine {wanted}: it {problem}; leave the key out and the best that works is taken")
    return engine


def _try_extras(specs: Sequence[ViewSpec], device: torch.device) -> None:
    """Kornia's ops are not all made for every device."""
    for spec in specs if device.type != "cpu" else ():
        for op in spec.extras:
            try:
                op.trial(spec.size_px, device)
            except Exception as error:  # of a foreign module: anything
                raise UsageError(f"{op} does not run on {device}: {' '.join(str(error).split())[:200]}") from error


def _compiled(specs: Sequence[ViewSpec]) -> tuple[Engine, str]:
    try:
        kernels = fused.compiled(specs)
    except Exception as error:  # a compiler can fail in any way; the run does not need it
        problem = " ".join(str(error).split())[:120]
        return Engine("torch", f"views: plain torch, as compiling failed ({problem})"), f"cannot be made: {problem}"
    return Engine("compiled", "views: loops compiled for this CPU", kernels), ""


def _triton(specs: Sequence[ViewSpec], device: torch.device) -> tuple[Engine, str]:
    problem = _disagreement(specs, device)
    if problem:
        return Engine("torch", f"views: plain torch, as the Triton engine {problem}"), problem
    return Engine("triton", "views: Triton kernels, seen to agree with the torch engine on this device"), ""


def _disagreement(specs: Sequence[ViewSpec], device: torch.device) -> str:
    """What is wrong with the Triton engine on this device, in words; nothing if all is well."""
    if importlib.util.find_spec("triton") is None:
        return "is not installed (pip install triton)"
    from ssl_pretrain.views import gpu

    sizes = np.array([(90, 120), (300, 200)])
    random = np.random.default_rng(0)  # torch's own is not to be moved
    images = [torch.from_numpy(random.integers(96, 160, (h, w, 3), np.uint8)) for h, w in sizes.tolist()]
    flat = torch.cat([image.flatten() for image in images]).to(device)
    drawn = plan(specs, np.arange(2), sizes, epoch=0, seed=0)
    plain = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    try:
        ours = gpu.render(drawn, flat, np.array([0, images[0].numel()]), sizes, *plain)
        apart = max(float((ours[key].cpu() - x).abs().mean()) for key, x in fused.render(drawn, images, *plain).items())
    except Exception as error:  # of Triton's compiler, of the driver: whatever it is, there is another way
        return f"does not run here ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    if not apart < AGREE:
        return f"disagrees with the torch engine here (by {apart:.2g} of full scale)"
    return ""
