"""Run by `test_gpu.py`, with TRITON_INTERPRET=1: the CUDA engine in the interpreter against the fused engine.

Prints a line of JSON: case -> largest difference.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_pretrain.methods import dino, simclr
from ssl_pretrain.views import ViewSpec, fused, gpu, presets
from ssl_pretrain.views.plan import plan

RICH = dict(jitter_p=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, gray_p=0.2, blur_p=0.6, vflip_p=0.5,
            turn_p=0.6, solarize_p=0.3)  # fmt: skip
CASES = {
    "plain": (ViewSpec("plain", 16, (0.1, 1.0), hflip_p=0.0, count=2),),
    "geometry": (ViewSpec("geometry", 15, (0.1, 1.0), vflip_p=0.5, turn_p=0.75, count=3),),
    "rotated": (ViewSpec("rotated", 16, (0.1, 1.0), vflip_p=0.5, turn_p=0.75, rotate_p=0.7, count=3),),
    "all": (ViewSpec("a", 24, (0.1, 1.0), count=2, **RICH), ViewSpec("b", 13, (0.05, 0.4), count=2, **RICH)),
    "yiq": (ViewSpec("yiq", 16, (0.1, 1.0), count=2, hue_space="yiq", **RICH),),
    "late blur": (ViewSpec("late", 16, (0.1, 1.0), count=2, chain=("gray", "jitter", "solarize", "blur"), **RICH),),
    "nothing": (ViewSpec("nothing", 16, (0.5, 1.0), chain=()),),
}


def main() -> None:
    rng = np.random.default_rng(0)
    sizes = np.array([(60, 80), (31, 7), (1, 40), (200, 130), (8, 8)])
    images = [torch.from_numpy(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]
    for image in images[1:]:
        image[:] = image // 4 + 128  # not all of it noise, so that solarizing has few values on its threshold
    flat = torch.cat([torch.zeros(5, dtype=torch.uint8), *(image.flatten() for image in images)])
    offset = 5 + np.concatenate([[0], np.cumsum(sizes.prod(1) * 3)[:-1]])
    found = {}
    for name, specs in CASES.items():
        drawn = plan(specs, np.arange(5), sizes, epoch=0, seed=3)
        ours = gpu.render(drawn, flat, offset, sizes, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
        want = fused.render(drawn, images, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
        assert list(ours) == list(want)
        difference = torch.cat([(ours[key] - want[key]).abs().flatten() for key in want])
        assert all(ours[key].shape == want[key].shape for key in want)
        found[name] = [float(difference.max()), float(difference.mean())]
    half = gpu.render(drawn, flat, offset, sizes, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), torch.bfloat16)["nothing"]
    found["bf16"] = [float((half.float() - want["nothing"]).abs().max()), 0.0]
    found["counts"] = counts(flat, offset, sizes)
    json.dump(found, sys.stdout)


class Counted:
    """In the place of a kernel: is launched, and does nothing."""

    launches = 0

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._launch

    @staticmethod
    def _launch(*arguments: object) -> None:
        Counted.launches += 1


class Operations(TorchDispatchMode):
    """What torch is asked to do, views of tensors and empty ones aside."""

    FREE = ("view", "slice", "select", "as_strided", "expand", "permute", "alias", "detach", "empty", "unsqueeze")

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.asked[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded_reads() -> Iterator[list[str]]:
    """Names of the ways in which a tensor was read on the host, after the upload, whose buffer is the host's own."""
    reads: list[str] = []
    sending = [False]
    send = gpu._Upload.send

    def sent(upload: gpu._Upload, device: torch.device) -> None:
        sending[0] = True
        send(upload, device)
        sending[0] = False

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(gpu._Upload, "send", sent))
        for name in ("cpu", "tolist", "numpy", "item", "__bool__", "__int__", "__float__"):
            known = getattr(torch.Tensor, name)

            def noted(x: torch.Tensor, *words: object, name: str = name, known: Callable = known) -> object:
                reads.extend([] if sending[0] else [name])
                return known(x, *words)

            stack.enter_context(mock.patch.object(torch.Tensor, name, noted))
        yield reads


def counts(flat: torch.Tensor, offset: np.ndarray, sizes: np.ndarray) -> dict[str, object]:
    """Kernels of a step of SimCLR's and DINO's views, and every op that would wait for the device."""
    for name in ("resample", "blur", "hue", "mix"):
        setattr(gpu, name, Counted())
    found = {}
    stained = tuple(presets.apply("stained", spec) for spec in dino.Config().views())
    works = {"simclr": simclr.Config().views(), "dino": dino.Config().views(), "dino stained": stained}
    for name, specs in works.items():
        rotated = tuple(replace(spec, rotate_p=0.5) for spec in specs)
        drawn = plan(rotated, np.arange(5), sizes, epoch=0, seed=3)
        Counted.launches = 0
        with Operations() as operations, recorded_reads() as reads:
            gpu.render(drawn, flat, offset, sizes, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), torch.bfloat16)
        work = {k: v for k, v in operations.asked.items() if not k.startswith(Operations.FREE)}
        # `index` and `index_put_` with gates, not with the numbers of rows, would ask how many there are.
        waits = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "index", "index_put_")
        reads += [k for k in work if k in waits]
        found[name] = {"specs": len(specs), "triton": Counted.launches, "torch": sum(work.values()), "reads": reads}
    return found


if __name__ == "__main__":
    main()
