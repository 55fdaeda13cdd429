"""A pipeline written for Kornia, compiled into a `ViewSpec`: the same augmentation, drawn from our key, run fused.

What the plan knows (`RandomResizedCrop` or `Resize` to a square, flips, right-angle turns, `ColorJitter`, grayscale,
Gaussian blur, solarize with one threshold, a last `Normalize`) becomes fields of the spec; every other 2-D augmentation
stays in its place of the chain as a slower `KorniaOp`. What cannot keep its meaning is refused in words.

Legend: B images, 3 channels, S side of a view.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import kornia.augmentation as K
import numpy as np
import numpy.typing as npt
import torch
from kornia.constants import DataKey
from torch import Tensor, nn

from ssl_pretrain.errors import UsageError
from ssl_pretrain.views import CHAIN, ViewSpec
from ssl_pretrain.views.engine import Engine, Flat, choose
from ssl_pretrain.views.extras import Extra
from ssl_pretrain.views.extras.kornia_op import KorniaOp, refusal
from ssl_pretrain.views.plan import plan

WHOLE_RATIO = (1e-4, 1e4)
"""With scale (1, 1): hardly any drawn ratio fits, and what is taken then is the whole image, whatever its shape."""

Fields = dict[str, Any]
"""Of a `ViewSpec`."""
Read = tuple[str, Fields] | str
"""What a module is to the plan (a name of `CHAIN`, "hflip", "vflip" or "turn") and its fields; or why it is nothing."""


@dataclass(frozen=True)
class KorniaViews:
    """A compiled pipeline, called on images as the pipeline was on batches."""

    spec: ViewSpec
    """The pipeline as one kind of view."""
    mean: tuple[float, float, float]
    """Of its last `Normalize`; 0 without one."""
    std: tuple[float, float, float]
    """Of its last `Normalize`; 1 without one."""
    slow: tuple[str, ...]
    """The modules that the plan does not know, each with the reason. They run, slower, in their place."""

    def __call__(
        self,
        images: Sequence[Tensor] | Tensor,
        *,
        ids: Sequence[int] | npt.NDArray[np.integer] | None = None,
        epoch: int = 0,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        engine: Engine | None = None,
    ) -> Tensor:
        """Uint8 images (H_i, W_i, 3), or one tensor (B, H, W, 3) -> views (B, 3, S, S), normalised.

        A view depends on its image's id (its place in the batch if `ids` is not given), `epoch` and `seed`, and on
        nothing else: change one of them from batch to batch, or every batch gets the same draws. `engine` is what
        `engine.choose` gave; without one it is the Triton engine on CUDA, if it works there, else plain torch.
        """
        listed = list(images)
        if not listed or any(x.dtype != torch.uint8 or x.ndim != 3 or x.shape[-1] != 3 for x in listed):
            raise UsageError("views are cut from uint8 images (height, width, 3), one or more; floats are not taken")
        ids_B = np.arange(len(listed)) if ids is None else np.asarray(ids)
        size_B2 = np.array([x.shape[:2] for x in listed])
        drawn = plan((self.spec,), ids_B, size_B2, epoch, seed)
        on = listed[0].device if device is None else torch.device(device)

        def flat() -> Flat:
            ends_B = np.cumsum(size_B2.prod(1) * 3)
            return torch.cat([x.to(on, non_blocking=True).reshape(-1) for x in listed]), ends_B - size_B2.prod(1) * 3

        maker = _engine(self.spec, on) if engine is None else engine
        views = maker.render(drawn, lambda: listed, flat, size_B2, self.mean, self.std, on, dtype)
        return views[self.spec.name][0]


@lru_cache(maxsize=32)
def _engine(spec: ViewSpec, device: torch.device) -> Engine:
    return choose((spec,), device, images=0)


def from_kornia(pipeline: nn.Module) -> KorniaViews:
    """Compile an `AugmentationSequential`, `ImageSequential`, `nn.Sequential` or single module of Kornia.

    >>> import kornia.augmentation as K
    >>> views = from_kornia(K.AugmentationSequential(K.RandomResizedCrop((32, 32)), K.RandomGrayscale(p=0.2)))
    >>> views([torch.zeros(40, 60, 3, dtype=torch.uint8)], epoch=3).shape
    torch.Size([1, 3, 32, 32])
    >>> views.spec.chain, views.spec.gray_p, views.slow
    (('gray',), 0.2, ())

    The order of the modules is kept. Flips and right-angle turns are moved to the front where that changes nothing:
    past flips, colour, blur, and a flip past the crop, but not past an extra op.

    What differs from stock Kornia:

    - crops are antialiased, with `align_corners=False` and bilinear, whatever the pipeline's flags say; where none
      of ten attempts at a crop fits, the central one is taken;
    - the order of `ColorJitter`'s ops is drawn for each view, not for each batch, and so is all that Kornia draws once
      for a batch;
    - the numbers come from (seed, epoch, id), not from torch's generator;
    - values are kept in [0, 1] after every op until they are normalised;
    - `Resize((S, S))` shows the whole image (one to two of a thousand views lack a pixel or two of a side).
    """
    modules = _flat(pipeline)
    for module in modules:
        _check_alone(module)
    modules, mean, std = _normalisation(modules)
    fields, modules = _crop(modules)
    size_px: int = fields["size_px"]
    chain: list[str | Extra] = []
    taken: set[str] = set()
    slow: list[str] = []
    for module in modules:
        read = READERS.get(type(module), _unknown)(module)
        reason = read if isinstance(read, str) else _no_room(read[0], taken, chain)
        if isinstance(read, str) or reason:
            op = KorniaOp(module)
            op.trial(size_px)
            chain.append(op)
            slow.append(f"{op.name}: {reason}")
            continue
        taken.add(read[0])
        fields |= read[1]
        chain += [read[0]] if read[0] in CHAIN else []
    kernel_px = fields.get("blur_kernel_px", 1)
    if kernel_px // 2 >= size_px:
        raise UsageError(f"from_kornia: RandomGaussianBlur's kernel of {kernel_px} is too wide for a view of {size_px}")
    if slow:
        logging.getLogger("ssl_pretrain").warning("from_kornia: these run as slower extra ops: %s", "; ".join(slow))
    fields.setdefault("hflip_p", 0.0)  # the spec's own default is a half
    return KorniaViews(ViewSpec(name="view", chain=tuple(chain), **fields), mean, std, tuple(slow))


def _flat(pipeline: Any) -> list[nn.Module]:
    """The modules of a container in order; containers whose meaning a list of modules does not hold are refused."""
    kind = type(pipeline)
    name = kind.__name__
    if kind in (K.AugmentationSequential, K.ImageSequential):
        if pipeline.random_apply:
            raise UsageError(f"from_kornia: random_apply of {name} is not possible; give the modules their own p")
        if kind is K.AugmentationSequential:
            if pipeline.data_keys != [DataKey.INPUT]:
                raise UsageError("from_kornia: views are images: give AugmentationSequential data_keys=['input']")
            if DataKey.INPUT in pipeline.extra_args:
                raise UsageError("from_kornia: extra_args of 'input' are not possible; set them on the modules")
    elif kind is not nn.Sequential:
        if isinstance(pipeline, K.AugmentationBase2D):
            return [pipeline]
        raise UsageError(f"from_kornia: {name} is not possible: {refusal(kind)}")
    # A module that stands twice in a container runs twice in torch's, once in Kornia's.
    children = pipeline if kind is nn.Sequential else pipeline.children()
    return [module for child in children for module in _flat(child)]


def _check_alone(module: Any) -> None:
    """A view is drawn alone: nothing may be shared by a batch."""
    kind = type(module)
    sized = kind in (K.RandomResizedCrop, K.Resize)
    if not sized and kind is not K.Normalize and refusal(kind):
        raise UsageError(f"from_kornia: {kind.__name__} is not possible: {refusal(kind)}")
    # Resize and Normalize set same_on_batch themselves; what they do is the same for all.
    if module.same_on_batch and kind not in (K.Resize, K.Normalize):
        raise UsageError(f"from_kornia: same_on_batch of {kind.__name__} is not possible: every view draws its own")
    if module.p_batch != 1:
        said = "p below 1" if sized else "p_batch"
        raise UsageError(f"from_kornia: {said} of {kind.__name__} is not possible: it would be drawn for a whole batch")


Three = tuple[float, float, float]


def _normalisation(modules: list[nn.Module]) -> tuple[list[nn.Module], Three, Three]:
    """A last `Normalize` taken off: the other modules, mean and standard deviation."""
    if not modules or type(modules[-1]) is not K.Normalize:
        return modules, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    last: Any = modules[-1]
    if last.p != 1:
        raise UsageError("from_kornia: p below 1 of Normalize is not possible: it would be drawn for a whole batch")
    three = []
    for key in ("mean", "std"):
        numbers = _numbers(last.flags[key])
        if len(numbers) not in (1, 3):
            raise UsageError(f"from_kornia: {key} of Normalize has {len(numbers)} numbers: give one for each channel")
        three.append((numbers[0], numbers[-2 % len(numbers)], numbers[-1]))
    if min(three[1]) <= 0:
        raise UsageError("from_kornia: std of Normalize must be above 0")
    return modules[:-1], three[0], three[1]


def _crop(modules: list[nn.Module]) -> tuple[Fields, list[nn.Module]]:
    """Size, scale and ratio from the module that sets the size; and the other modules."""
    kinds = [type(module) for module in modules]
    places = [i for i, kind in enumerate(kinds) if kind in (K.RandomResizedCrop, K.Resize)]
    if not places:
        raise UsageError(
            "from_kornia: the size of a view is not known: begin the pipeline with RandomResizedCrop((S, S)), or with "
            "Resize((S, S)) for the whole image"
        )
    at = places[0]
    crop: Any = modules[at]
    for kind in kinds[:at]:
        # A crop's position is uniform, so that a flip before it and one after it give the same views.
        if kind not in (K.RandomHorizontalFlip, K.RandomVerticalFlip):
            raise UsageError(
                f"from_kornia: {kind.__name__} comes before {kinds[at].__name__}, where it would see the whole image; "
                "put it after"
            )
    size = crop.flags["size"]
    if not isinstance(size, tuple | list) or len(size) != 2 or size[0] != size[1]:
        raise UsageError(f"from_kornia: {kinds[at].__name__} to {size} is not possible: views are square; give (S, S)")
    if crop.flags["resample"].name != "BILINEAR":
        raise UsageError(f"from_kornia: resample of {kinds[at].__name__} is not possible: views are cut bilinearly")
    fields: Fields = {"size_px": int(size[0]), "scale": (1.0, 1.0), "ratio": WHOLE_RATIO}
    if kinds[at] is K.RandomResizedCrop:
        scale, ratio = _numbers(crop._param_generator.scale), _numbers(crop._param_generator.ratio)
        if not 0 < scale[0] <= scale[1] <= 1:
            raise UsageError(
                f"from_kornia: scale of RandomResizedCrop is {tuple(scale)}: it needs 0 < low <= high <= 1"
            )
        fields |= {"scale": tuple(scale), "ratio": tuple(ratio)}
    return fields, modules[:at] + modules[at + 1 :]


def _no_room(slot: str, taken: set[str], chain: Sequence[str | Extra]) -> str:
    """Why the plan cannot do this one more thing; empty if it can."""
    if slot in taken:
        return "the plan has place for one, and this is another"
    extras = [op for op in chain if isinstance(op, KorniaOp)]
    # Flips and right-angle turns commute with all of CHAIN: with what is done to pixels one by one, with the mean gray
    # of contrast, with a blur that is the same in x and y and whose border is mirrored. Past another op, who knows.
    if slot not in CHAIN and extras:
        return f"it comes after {extras[-1].name}, past which it cannot be moved"
    return ""


# Readers: one for each class that the plan knows. Subclasses may do anything, so they are not known.


def _unknown(module: Any) -> Read:
    return "the plan has nothing like it"


def _hflip(module: Any) -> Read:
    return "hflip", {"hflip_p": float(module.p)}


def _vflip(module: Any) -> Read:
    return "vflip", {"vflip_p": float(module.p)}


def _turn(module: Any) -> Read:
    """Kornia draws `times` from an interval and rounds: 1, 2 and 3 right angles (mod 4) must be equally likely."""
    low, high = _bounds(_factor(module, "times"), 0.0, -math.inf)
    share_4 = [0.0] * 4
    for times in range(math.floor(low), math.ceil(high) + 1):
        if low == high:
            share_4[times % 4] = float(times == round(low))
        else:
            share_4[times % 4] += max(0.0, min(high, times + 0.5) - max(low, times - 0.5)) / (high - low)
    if max(share_4[1:]) - min(share_4[1:]) > 1e-6:
        return f"times ({low:g}, {high:g}) makes 90, 180 and 270 degrees unequally likely; (-1.5, 2.5) would not"
    return "turn", {"turn_p": float(module.p) * (1 - share_4[0])}


def _jitter(module: Any) -> Read:
    if vars(module).get("_fixed_order") is not None:
        return "the order of its ops is fixed, the plan's is drawn"
    fields: Fields = {"jitter_p": float(module.p)}
    for name in ("brightness", "contrast", "saturation"):
        low, high = _bounds(vars(module)[name], 1.0, 0.0)
        fields[name] = round(high - 1, 9)
        if fields[name] < 0 or not math.isclose(low, max(0.0, 2 - high), abs_tol=1e-6):
            return f"{name} ({low:g}, {high:g}) is not symmetric around 1"
    low, high = _bounds(module.hue, 0.0, -math.inf)
    if not math.isclose(low, -high, abs_tol=1e-6):
        return f"hue ({low:g}, {high:g}) is not symmetric around 0"
    return "jitter", fields | {"hue": high}


def _gray(module: Any) -> Read:
    if module.rgb_weights is not None:
        return "it has its own rgb_weights"
    return "gray", {"gray_p": float(module.p)}


def _blur(module: Any) -> Read:
    size = module.flags["kernel_size"]
    height, width = (size, size) if isinstance(size, int) else size
    sigma = _numbers(module._param_generator.sigma)
    if height != width or height % 2 == 0:
        return f"its kernel is {height} x {width}, the plan's is square and odd"
    if module.flags["border_type"].name != "REFLECT":
        return f"its border is {module.flags['border_type'].name.lower()}, the plan's reflect"
    if len(sigma) != 2 or sigma[0] <= 0:
        return "its sigma is not a range above 0"
    return "blur", {"blur_p": float(module.p), "blur_sigma": tuple(sigma), "blur_kernel_px": int(height)}


def _solarize(module: Any) -> Read:
    low, high = _bounds(_factor(module, "thresholds"), 0.5, 0.0)
    if low != high:
        return f"its threshold is drawn from ({low:g}, {high:g}), the plan's is fixed"
    if _bounds(_factor(module, "additions"), 0.0, -0.5) != (0.0, 0.0):
        return "it adds before it inverts (additions)"
    return "solarize", {"solarize_p": float(module.p), "solarize_threshold": low}


READERS: dict[type[nn.Module], Callable[[Any], Read]] = {
    K.RandomHorizontalFlip: _hflip,
    K.RandomVerticalFlip: _vflip,
    K.RandomRotation90: _turn,
    K.ColorJitter: _jitter,
    K.RandomGrayscale: _gray,
    K.RandomGaussianBlur: _blur,
    K.RandomSolarize: _solarize,
}


def _factor(module: Any, name: str) -> Any:
    """What the constructor was given for a parameter that a `PlainUniformGenerator` draws."""
    (factor,) = [factor for factor, known, _, _ in module._param_generator.samplers if known == name]
    return factor


def _bounds(value: Any, centre: float, floor: float) -> tuple[float, float]:
    """Kornia's two ways to give a range: both ends, or the distance of both from a centre, cut at a floor."""
    numbers = _numbers(value)
    if len(numbers) == 1:
        return max(floor, centre - numbers[0]), centre + numbers[0]
    return numbers[0], numbers[1]


def _numbers(value: Any) -> list[float]:
    """A number, a sequence or a tensor of them, as a list."""
    plain = value.detach().flatten().tolist() if isinstance(value, Tensor) else value
    return [float(number) for number in plain] if isinstance(plain, list | tuple) else [float(plain)]
