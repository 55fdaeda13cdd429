"""The weights that a backbone starts from: what fits is loaded, and what arrived is said, not assumed.

A file is searched for the place (`teacher`, `model`...) and the prefix (`module.backbone.`...) under which the most
tensors have a name and a shape of ours. Only two tensors are ever changed, both of a plain ViT: position embeddings are
interpolated to our grid, and the patch embedding is resampled to our patch (FlexiViT), by timm's functions.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

from ssl_pretrain.backbones import Backbone, InputSpec, MaskableBackbone
from ssl_pretrain.errors import DataError, SslPretrainError, UsageError
from ssl_pretrain.train.source import Source, Weights, opened

ENOUGH = 0.95
"""Share of the backbone's tensors, and of the values in them, below which a source is refused."""
POSITIONS, PATCHES = "pos_embed", "patch_embed.proj.weight"
AVERAGES = {"teacher", "ema"}
"""Where a file holds several networks that fit alike, the one under such a name is meant, as the papers evaluate it."""


@dataclass(frozen=True)
class Filled:
    """What a backbone took from a source, and what it did not; `str` is what the user is told."""

    what: str
    model: str
    place: str
    tensors: tuple[int, int]
    """Filled, and there."""
    values: tuple[int, int]
    """Numbers in them."""
    adapted: tuple[str, ...]
    missing: tuple[str, ...]
    mismatched: tuple[str, ...]
    unexpected: tuple[str, ...]
    warning: str
    loaded: Weights = field(repr=False, compare=False)
    """In the backbone's shapes."""

    @property
    def share(self) -> float:
        """Filled, by tensors or by values, whichever is less: norms and biases are many tensors and few values."""
        return min(done / there for done, there in (self.tensors, self.values))

    def __str__(self) -> str:
        lines = [
            f"{self.model} starts from {self.what}{self.place}: {self.tensors[0]:,} of {self.tensors[1]:,} tensors, "
            f"{self.values[0]:,} of {self.values[1]:,} values"
        ]
        for head, names in (
            ("adapted", self.adapted), ("left random, not in the source", self.missing),
            ("left random, of another shape there", self.mismatched), ("in the source, not used", self.unexpected),
        ):  # fmt: skip
            lines += [f"  {head}: {_first(names)}"] if names else []
        return "\n".join([*lines, *([f"  warning: {self.warning}"] if self.warning else [])])


def fill(backbone: Backbone, init: str, partial: bool = False) -> Filled:
    """Loads the weights that `backbone.init` names into the backbone, and says what arrived.

    Draws nothing from torch's random numbers. Raises `UsageError` where the source is not there, cannot be had, is
    ambiguous, or (unless `partial`) fills less than `ENOUGH` of the backbone; `DataError` for a damaged file.
    """
    with torch.random.fork_rng(devices=[]):  # building the source's network draws weights; a head's must not change
        source = opened(init, backbone.name)
    every = backbone.weights()
    mine = {name: tensor for name, tensor in every.items() if tensor.is_floating_point()}
    place, prefix, also = _best(source, mine, backbone)
    found = _under(source.places[place], prefix)
    theirs = {name: t for name, t in found.items() if t.is_floating_point()}
    counters = {n: t for n, t in found.items() if n in every and n not in mine and t.shape == every[n].shape}
    fitting = _fitting(theirs, mine, backbone)
    where = " / ".join(part for part in (place, prefix.removesuffix(".")) if part)
    filled = Filled(
        what=source.what,
        model=backbone.name,
        place=(f", under {where}" if where else "") + (f" (not {also})" if also else ""),
        tensors=(len(fitting), len(mine)),
        values=(sum(mine[name].numel() for name in fitting), sum(tensor.numel() for tensor in mine.values())),
        adapted=tuple(
            f"{n} {tuple(t.shape)} to {tuple(mine[n].shape)}" for n, t in fitting.items() if t.shape != mine[n].shape
        ),
        missing=tuple(name for name in mine if name not in theirs),
        mismatched=tuple(
            f"{n} {tuple(theirs[n].shape)} for {tuple(mine[n].shape)}" for n in mine if n in theirs and n not in fitting
        ),
        unexpected=tuple(name for name in theirs if name not in mine),
        warning=_input_warning(source.input, backbone.input),
        loaded=counters | {n: _adapted(n, tensor, mine[n], backbone) for n, tensor in fitting.items()},
    )
    if not fitting or (filled.share < ENOUGH and not partial):
        raise UsageError(_refusal(filled))
    broken = [name for name, tensor in fitting.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise DataError(f"{source.what}: {broken[0]} holds values that are not finite")
    _load(backbone, filled.loaded)
    return filled


def restore(trunk: Backbone, backbones: Iterable[Backbone], filled: Filled) -> None:
    """After a method was built around the trunk: its given weights again, in it and in its copies.

    Some methods begin with the initialisation of their paper (MAE), which would silently be all that is left.
    """
    now = {name: tensor.clone() for name, tensor in trunk.weights().items()}
    for backbone in backbones:
        theirs = backbone.weights()
        if theirs.keys() == now.keys() and all(torch.equal(now[name], tensor) for name, tensor in theirs.items()):
            _load(backbone, filled.loaded)


def _best(source: Source, mine: Weights, backbone: Backbone) -> tuple[str, str, str]:
    """The place and prefix under which the most tensors fit, and another that fits alike but was not meant."""
    counts: Counter[tuple[str, str]] = Counter()
    for place, weights in source.places.items():
        for name in weights:
            parts = name.split(".")
            for i in range(len(parts)):
                ending, prefix = ".".join(parts[i:]), "".join(f"{part}." for part in parts[:i])
                if ending in mine and _fits(ending, weights[name], mine[ending], backbone):
                    counts[place, prefix] += 1
    if not counts:
        raise UsageError(f"{source.what} holds no tensor that fits {backbone.name} (0 %): another architecture")
    most = max(counts.values())
    alike = sorted((spot for spot, count in counts.items() if count == most), key=lambda spot: len(spot[0] + spot[1]))
    first, *others = [_fitting(_under(source.places[place], prefix), mine, backbone) for place, prefix in alike]
    if all(other.keys() == first.keys() and all(torch.equal(first[n], other[n]) for n in first) for other in others):
        return *alike[0], ""
    names = [f"{place}.{prefix}".strip(".") for place, prefix in alike]
    meant = [i for i, name in enumerate(names) if AVERAGES & set(re.split(r"[._]", name))]
    if len(meant) != 1:
        raise UsageError(
            f"{source.what} holds {len(alike)} networks that fit {backbone.name} alike ({', '.join(names)}): "
            "save the one you mean in a file of its own"
        )
    return *alike[meant[0]], ", ".join(name for i, name in enumerate(names) if i != meant[0])


def _under(weights: Weights, prefix: str) -> Weights:
    """What stands under a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _fitting(theirs: Weights, mine: Weights, backbone: Backbone) -> Weights:
    """What can be taken: tensors as they are, or by one of the two rules."""
    return {n: theirs[n] for n, wanted in mine.items() if n in theirs and _fits(n, theirs[n], wanted, backbone)}


def _fits(name: str, tensor: Tensor, wanted: Tensor, backbone: Backbone) -> bool:
    """Whether a tensor of this name can be taken."""
    if not tensor.is_floating_point():
        return False
    if tensor.shape == wanted.shape:
        return True
    if not isinstance(backbone, MaskableBackbone) or tensor.ndim != wanted.ndim:
        return False
    if name == POSITIONS and tensor.ndim == 3:
        patches = tensor.shape[1] - _prefix_positions(wanted, backbone)
        square = patches > 0 and math.isqrt(patches) ** 2 == patches
        return square and (tensor.shape[0], tensor.shape[2]) == (wanted.shape[0], wanted.shape[2])
    square = tensor.ndim == 4 and tensor.shape[2] == tensor.shape[3]
    return name == PATCHES and square and tensor.shape[:2] == wanted.shape[:2]


def _prefix_positions(positions_1ND: Tensor, backbone: MaskableBackbone) -> int:
    """How many of the positions belong to class and register tokens: all of these, or none in some ViTs."""
    return positions_1ND.shape[1] - backbone.grid[0] * backbone.grid[1]


def _adapted(name: str, tensor: Tensor, wanted: Tensor, backbone: Backbone) -> Tensor:
    """The tensor in our shape and type."""
    tensor = tensor.to(wanted.dtype)
    if tensor.shape == wanted.shape:
        return tensor
    assert isinstance(backbone, MaskableBackbone)
    changed: Tensor
    if name == POSITIONS:
        prefix = _prefix_positions(wanted, backbone)
        changed = resample_abs_pos_embed(tensor, new_size=list(backbone.grid), num_prefix_tokens=prefix)
    else:
        changed = resample_patch_embed(tensor, new_size=list(wanted.shape[2:]))
    return changed.to(wanted)


def _load(backbone: Backbone, found: Weights) -> None:
    """Loads them beside what the backbone has of its own, and sees that they arrived."""
    backbone.load_weights({**backbone.weights(), **found})
    after = backbone.weights()
    lost = [name for name, tensor in found.items() if not torch.equal(after[name].cpu(), tensor)]
    if lost:
        raise SslPretrainError(
            f"{lost[0]} was loaded into {backbone.name} and is not there: its loader changes weights"
        )


def _input_warning(theirs: InputSpec | None, ours: InputSpec) -> str:
    """That the source's network was fed other values than ours will be."""
    if theirs is None or all(
        math.isclose(a, b, abs_tol=1e-3) for a, b in zip(theirs.mean + theirs.std, ours.mean + ours.std, strict=True)
    ):
        return ""
    return (
        f"its network was fed mean {theirs.mean}, std {theirs.std}, and this one will be fed mean {ours.mean}, "
        f"std {ours.std}: the first steps have to make up for that"
    )


def _refusal(filled: Filled) -> str:
    """In one line, why it is not taken."""
    lacks = [f"missing {_first(filled.missing)}"] if filled.missing else []
    lacks += [f"of another shape {_first(filled.mismatched)}"] if filled.mismatched else []
    return (
        f"{filled.what}{filled.place} fills only {filled.share:.0%} of {filled.model} at best "
        f"({filled.tensors[0]:,} of {filled.tensors[1]:,} tensors, {filled.values[0]:,} of {filled.values[1]:,} "
        f"values; {'; '.join(lacks)}): give weights of this architecture, or --backbone.init_partial true to train "
        "with the rest random"
    )


def _first(names: tuple[str, ...], count: int = 4) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - count:,} more" if len(names) > count else ""
    return f"{len(names):,} ({', '.join(names[:count])}{more})"
