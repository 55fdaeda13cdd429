"""Export: an artefact in the form that a consumer loads, and the proof that its weights arrive there.

One file a consumer, with two functions:

    write(folder) -> str         adds the consumer's files to an artefact; gives the lines that load them
    arrive(folder) -> Arrived    builds the real consumer by these lines and reads what it then holds

`arrive` runs in a process of its own (`_verify.py`), as it imports the consumer. Both raise `UsageError` in one line
where the consumer cannot take such a backbone, or is not installed.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ssl_pretrain.artefact import TOLERANCE
from ssl_pretrain.backbones import InputSpec
from ssl_pretrain.errors import DataError

__path__ = pkgutil.extend_path(__path__, __name__)


STEPS = 2
"""That a detector is trained for."""
BOXES = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.5, 0.4, 0.9, 0.9]])
"""Two objects to find meanwhile: left, top, right, bottom as shares of the image."""


@dataclass(frozen=True)
class Arrived:
    """What a consumer holds that loaded an export."""

    consumer: str
    """Package, version and class: `torchvision 0.29.2, FasterRCNN`."""
    route: str
    """How it was loaded, and when it was looked at: `YOLO("x.pt").train(), at on_train_start`."""
    maps: Mapping[str, Tensor]
    """By their names in `probe.safetensors` (`map_0`...), those that the consumer takes, of the probe's image."""
    fresh: Mapping[str, Tensor]
    """The same of a consumer that was built the same way and loaded nothing: these must differ."""
    initialised: int
    """Parameters of the detector that came from the artefact."""
    parameters: int
    """All of them."""
    random: tuple[str, ...] = ()
    """Its parts that stayed random."""
    trained: str = ""
    """What was trained, in words: `2 steps, loss 2.00 -> 1.93`; nothing where the consumer is no detector."""
    tolerance: float = TOLERANCE
    notes: tuple[str, ...] = ()
    """What its user should know: what is not compared, which layers the consumer freezes."""


@dataclass(frozen=True)
class Probe:
    """The seeded image that an artefact proves itself by."""

    x_BCHW: Tensor
    """Normalised, as the backbone is fed."""
    rgb_BCHW: Tensor
    """The same in 0..1, as a consumer with a normalisation of its own is fed."""
    maps: Mapping[str, Tensor]
    """`map_0`... fine to coarse: what the backbone makes of it."""


def probe(folder: Path, fed: InputSpec) -> Probe:
    """What `probe.safetensors` has, for a backbone that is fed so."""
    tensors = load_file(folder / "probe.safetensors")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (fed.mean, fed.std))
    x_BCHW = tensors.pop("input")
    return Probe(x_BCHW, x_BCHW * std + mean, tensors)


def trained(detector: nn.Module, loss: Callable[[], Tensor], rate: float = 1e-3) -> str:
    """Trains a detector for `STEPS` steps of SGD; in words.

    loss   the detector's own, of one image with the objects of `BOXES`

    Raises `DataError` where a loss is not finite.
    """
    optimizer = torch.optim.SGD(detector.parameters(), lr=rate)
    losses: list[float] = []
    for _ in range(STEPS):
        found = loss()
        losses.append(float(found.detach()))
        if not math.isfinite(losses[-1]):
            raise DataError(f"the detector's loss is {losses[-1]} at step {len(losses) - 1}")
        optimizer.zero_grad()
        found.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return f"{STEPS} steps, loss {losses[0]:.2f} -> {losses[-1]:.2f}"


def parts(network: nn.Module, inside: Iterable[nn.Module]) -> tuple[int, int, tuple[str, ...]]:
    """Parameters of the modules inside, of the whole network, and the names of its children that hold none of these.

    A child that holds some of them and more is gone into.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> parts(net, [net[0]])
    (4, 6, ('1',))
    """
    arrived = {id(p) for module in inside for p in module.parameters()}
    every = {id(p): p.numel() for p in network.parameters()}

    def others(module: nn.Module, name: str) -> list[str]:
        mine = {id(p) for p in module.parameters()}
        if mine and not mine & arrived:
            return [name]
        if mine <= arrived:
            return []
        return [found for child, sub in module.named_children() for found in others(sub, f"{name}.{child}".strip("."))]

    count = sum(numel for key, numel in every.items() if key in arrived)
    return count, sum(every.values()), tuple(others(network, ""))
