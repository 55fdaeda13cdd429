"""Any augmentation of `kornia.augmentation` that takes one image and keeps its size, as an extra op of a view.

In a recipe an op is named by its class, with the options of its constructor: `RandomJPEG: {jpeg_quality: [50, 95],
p: 0.3}`.

The module draws its parameters with torch's generator, so the plan draws a seed: two whole numbers of 24 bits, which
float32 holds exactly. Torch's CPU generator keeps the low 32 bits of `first * 2^24 + second`. Each view is drawn as a
batch of one, on the CPU: its parameters depend neither on the batch nor on the device.

Legend: N views, 3 channels, S side of a view, P = 2 parameters, U = 2 draws.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Literal

import kornia.augmentation as K
import numpy as np
import torch
from torch import Tensor, nn

from ssl_pretrain.errors import UsageError
from ssl_pretrain.named import nearest
from ssl_pretrain.views.extras import Extra, Floats

WORD = 2**24
"""A seed is two numbers below this one."""
CPU = torch.device("cpu")
TRIAL_PX = 224
"""Side of the view on which `of` tries an op: what Kornia finds wrong with its options only there is said at once."""
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("CenterCrop", "LongestMaxSize", "PadTo", "RandomCrop", "RandomResizedCrop", "Resize", "SmallestMaxSize"),
        "it changes the size of a view; the crop is a view's own (size_px, scale, ratio)",
    ),
    **dict.fromkeys(
        ("Normalize", "Denormalize"), "it leaves [0, 1]; views are normalised after their last op, as the backbone asks"
    ),
    "RandomDissolving": "it fetches a diffusion model, and its draws cannot be replayed",
}
"""2-D augmentations of one image that cannot be ops of a view, and why."""

Params = dict[str, Tensor]
APPLIED: Params = {"batch_prob": torch.ones(1)}
"""The module's gate, open."""


@dataclass(frozen=True)
class KorniaOp(Extra):
    """A module of `kornia.augmentation`; its own `p` is drawn inside it, so this op's `p` is 1.

    The module is copied, so that neither later changes nor a move to another device alter the views; two ops are equal
    if they are one. Kornia does not clamp every op (`RandomGaussianNoise`, `RandomGaussianIllumination`...); here
    results are always clamped to [0, 1], and where the module makes a NaN the pixel stays as it was.

    These ops are slow. The seeds are read from the device (one host read for each op and batch), parameters are drawn
    view by view. On a CPU they are also applied view by view, so that a view has the same bits in any batch; on an
    accelerator all at once where that comes to the same. A view that the module's `p` leaves alone costs the draw only.
    Torch's global CPU generator is seeded meanwhile and restored: do not run two at once in threads of one process.
    """

    p: float = field(default=1.0, init=False)
    module: K.AugmentationBase2D
    """Kept on the CPU: moved to a device, Kornia would draw its parameters there, one waiting read for each."""

    draws: ClassVar[int] = 2
    columns: ClassVar[tuple[str, ...]] = ("seed_0", "seed_1")
    place: ClassVar[Literal["specimen", "optics", "camera"]] = "camera"

    def __post_init__(self) -> None:
        reason = refusal(type(self.module))
        if reason:
            raise UsageError(f"{self.name} cannot be an op of a view: {reason}")
        if self.module.same_on_batch:
            raise UsageError(f"{self.name}: same_on_batch is not possible, as every view draws its own parameters")
        if not 0 <= self.module.p <= 1:
            raise UsageError(f"{self.name}: p is {self.module.p}: it is a probability, 0 to 1")
        if self.module.p_batch != 1:
            raise UsageError(f"{self.name}: p_batch is not possible, as views know no batch; give p")
        object.__setattr__(self, "module", copy.deepcopy(self.module).to("cpu"))

    @property
    def name(self) -> str:
        """The class of the module."""
        return type(self.module).__name__

    def parameters(self, u_NU: Floats, size_px: int) -> Floats:
        """The two words of each view's seed."""
        return np.floor(u_NU * WORD)

    def apply(self, x_NCSS: Tensor, row_NP: Tensor) -> Tensor:
        """The module, each view with the parameters that its seed gives; x is overwritten."""
        seeds = [int(first) * WORD + int(second) for first, second in row_NP.cpu().tolist()]
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            if x_NCSS.device.type != "cpu" and batchable(self.module, x_NCSS.shape[-1]):
                return _together(self.module, x_NCSS, seeds)
            return _one_by_one(self.module, x_NCSS, seeds)

    def trial(self, size_px: int, device: torch.device = CPU) -> None:
        """One gray view of that side: what is wrong with the module's options shows before anything heavy starts."""
        x_1CSS = torch.full((1, 3, size_px, size_px), 0.5, device=device)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            y_1CSS = _told(self.name, lambda: self.module(x_1CSS, params=_drawn(self.module, size_px, 0) | APPLIED))
        if y_1CSS.shape != x_1CSS.shape:
            shape = tuple(y_1CSS.shape[1:])
            raise UsageError(f"{self.name} cannot be an op of a view: it makes {shape} of {tuple(x_1CSS.shape[1:])}")


def of(name: str, options: dict[str, Any]) -> KorniaOp:
    """The class of `kornia.augmentation` with that name, made with these options (as YAML has them: lists, no tuples).

    >>> of("RandomInvert", {"p": 0.3}).module
    RandomInvert(p=0.3, p_batch=1.0, same_on_batch=False, max_val=1.0)
    """
    kinds: dict[str, Any] = {known: vars(K)[known] for known in K.__all__ if inspect.isclass(vars(K).get(known))}
    offered = sorted(known for known, kind in kinds.items() if not refusal(kind))
    if name not in kinds:
        raise UsageError(f"no op is called {name!r}{nearest(name, offered)}; there are: {', '.join(offered)}")
    if name not in offered:
        raise UsageError(f"{name} cannot be an op of a view: {refusal(kinds[name])}")
    known = inspect.signature(kinds[name]).parameters
    for option in options:
        if option not in known:
            raise UsageError(
                f"{name} has no option {option!r}{nearest(option, list(known))}; it has: {', '.join(known)}"
            )
    missing = [k for k, parameter in known.items() if parameter.default is parameter.empty and k not in options]
    if missing:
        raise UsageError(f"{name} needs {', '.join(missing)}")
    given = {option: _for_kornia(value, str(known[option].annotation)) for option, value in options.items()}
    op = KorniaOp(_told(name, lambda: kinds[name](**given)))
    op.trial(TRIAL_PX)
    return op


def refusal(kind: type[nn.Module]) -> str:
    """Why this class cannot be an op of a view; empty if it can."""
    for name, reason in REFUSED.items():
        if issubclass(kind, vars(K)[name]):
            return reason
    if issubclass(kind, K.AugmentationBase3D):
        return "it is for volumes"
    if issubclass(kind, K.MixAugmentationBaseV2):
        return "it mixes images or parts of them, and an op sees one view"
    if not issubclass(kind, K.AugmentationBase2D):
        return "it is not a 2-D augmentation of kornia.augmentation"
    # Kornia's bases, unlike a user's class derived from one, are no ops themselves.
    return "it is a base class" if kind.__name__.endswith("Base2D") else ""


@lru_cache(maxsize=64)
def batchable(module: K.AugmentationBase2D, size_px: int) -> bool:
    """Whether views drawn one by one can be made in one call: found by trying three views of that side both ways.

    Not where a parameter belongs to the batch (the order of `ColorJitter`'s ops, the kernel size of
    `RandomMotionBlur`), counts its views (`RandomChannelDropout`) or has a length of its own (`RandomRain`).
    """
    seeds = [1, 2, 3]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        x_NCSS = torch.rand(len(seeds), 3, size_px, size_px)
        params = [_drawn(module, size_px, seed) | APPLIED for seed in seeds]
        if not _stackable(params):
            return False
        of_two = module.forward_parameters((2, 3, size_px, size_px))
        if any(value.shape[:1] != (2,) for key, value in of_two.items() if key != "forward_input_shape"):
            return False
        together_NCSS = module(x_NCSS, params=_stacked(params))
        alone_NCSS = torch.cat([module(x, params=row) for x, row in zip(x_NCSS[:, None], params, strict=True)])
    return bool(torch.isclose(together_NCSS, alone_NCSS, atol=1e-4, equal_nan=True).all())


def _drawn(module: K.AugmentationBase2D, size_px: int, seed: int) -> Params:
    """The module's parameters of one view; to be called within a fork of the generator, which it leaves seeded."""
    # Not torch.manual_seed, which would also seed the generators of every accelerator.
    torch.default_generator.manual_seed(seed)
    drawn: Params = module.forward_parameters((1, 3, size_px, size_px))
    return drawn


def _one_by_one(module: K.AugmentationBase2D, x_NCSS: Tensor, seeds: Sequence[int]) -> Tensor:
    """What the module should draw while it is applied comes from the seed too."""
    for x_1CSS, seed in zip(x_NCSS[:, None], seeds, strict=True):
        params = _drawn(module, x_NCSS.shape[-1], seed)
        if not _skips(module, params):
            x_1CSS.copy_(_in_range(module(x_1CSS, params=params), x_1CSS))
    return x_NCSS


def _together(module: K.AugmentationBase2D, x_NCSS: Tensor, seeds: Sequence[int]) -> Tensor:
    """The same in one call of the module; one by one after all where the parameters differ in shape."""
    drawn = [_drawn(module, x_NCSS.shape[-1], seed) for seed in seeds]
    chosen = [n for n, params in enumerate(drawn) if not _skips(module, params)]
    if not chosen:
        return x_NCSS
    params = [drawn[n] for n in chosen]
    if not _stackable(params):
        return _one_by_one(module, x_NCSS, seeds)
    rows = torch.tensor(chosen).to(x_NCSS.device, non_blocking=True)
    x_MCSS = x_NCSS.index_select(0, rows)
    return x_NCSS.index_copy_(0, rows, _in_range(module(x_MCSS, params=_stacked(params)), x_MCSS))


def _skips(module: K.AugmentationBase2D, params: Params) -> bool:
    """Whether the module's own `p` leaves this view as it is; Kornia would compute the op and throw it away."""
    leaves = type(module).apply_non_transform is K.AugmentationBase2D.apply_non_transform
    return module.p < 1 and leaves and not bool(params["batch_prob"].any())


def _stackable(params: Sequence[Params]) -> bool:
    """Whether the parameters of single views can be those of a batch: tensors (1, ...) of one shape."""
    first = params[0]
    return all(
        isinstance(row[key], Tensor) and row[key].shape == first[key].shape and row[key].shape[:1] == (1,)
        for row in params
        for key in row
        if key != "forward_input_shape"
    )


def _stacked(params: Sequence[Params]) -> Params:
    """The parameters of single views as those of a batch."""
    stacked = {key: torch.cat([row[key] for row in params]) for key in params[0] if key != "forward_input_shape"}
    shape = params[0]["forward_input_shape"].clone()
    shape[0] = len(params)
    return stacked | {"forward_input_shape": shape}


def _in_range(y_NCSS: Tensor, x_NCSS: Tensor) -> Tensor:
    """Y within [0, 1]; x where y is not a number."""
    return torch.where(y_NCSS.isnan(), x_NCSS, y_NCSS).clamp_(0, 1)


def _for_kornia(value: Any, annotation: str = "") -> Any:
    """YAML has lists where Kornia wants tuples, or tensors where its constructor names nothing else."""
    if not isinstance(value, list):
        return value
    if "Tensor" in annotation and "uple" not in annotation:
        return torch.tensor(value, dtype=torch.float32)
    return tuple(_for_kornia(item) for item in value)


def _told(name: str, call: Callable[[], Any]) -> Any:
    """The call's result; whatever Kornia finds wrong (it raises anything) as one line."""
    try:
        return call()
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{name}: {text}") from error
