"""What `auto` in a recipe becomes: published constants, bent to the images at hand where evidence says how.

A value is a pure function of the facts: how many images, how large they and their objects are, the kind of backbone,
the batch. At the size of ImageNet each is what the paper has. The number of processes is none of the facts that count:
one process and eight have to compute the same thing. Where a reason names a project, the figure stands in that
project's code or table; all schedules are shares of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods import MethodConfig, OptimSpec

STEPS = 10_000
"""That a run should have: stable-pretraining's DINO needed 7,400 on 9,469 images (k-NN 83.8)."""
EPOCHS = 100, 800
"""At least, as DINO and iBOT on ImageNet; at most, as iBOT's and lightly's longest: after that few images are known."""
PROTOTYPES = (20_000, 1024), (50_000, 2048), (100_000, 4096), (200_000, 16384), (500_000, 32768)
"""lightly-train's table: below so many images, so many; beyond, the paper's."""
RAMP_IMAGES = 20_000, 1_000_000
"""lightly-train's: below the first a set is small, from the second on it is ImageNet; linear between them."""
COLD = 0.04
"""Teacher's temperature on a small set, at most. lightly-train's table has 0.02 there: with it the teachers of DINO and
iBOT gave all crops of 370 fields one prototype by step 20, and then said nothing about any; with 0.04 they did not."""
HORIZON, HORIZON_STEPS = 0.01, 50
"""Share of the run over which the teacher averages at its start, and the fewest steps (a momentum of 0.98): with 10,
which is what the centre averages over, DINO and iBOT swung between one prototype and all of them (370 fields)."""
ADAMW, ADAMW_BATCH, ADAMW_DECAY = 1e-3, 64, 0.05
"""Rate and decay of AdamW for a convolutional network on a small set, and the batch that this rate is for: SimCLR and
DINO (with `head_norm`) learned with it on 370 fields."""
FREEZE_STEPS, FREEZE_MOST = 100, 0.03
"""Steps that the prototypes stand still at least, and the largest share of the run that this may take."""
WARMUP_STEPS, WARMUP_MOST = 500, 0.1
"""The same of the learning rate's rise."""


@dataclass(frozen=True)
class Facts:
    """What a plan is made of."""

    images: int
    batch_size: int
    """Of all processes together."""
    family: Literal["vit", "convnet"]
    image_px: tuple[int, int] = (0, 0)
    """Height and width, median, in the files; zeros where nobody asked."""
    object_px: float | None = None
    """Median side of an object in pixels of the files; None where it is unknown."""
    objects_from: str = ""
    """Where that comes from, in words."""
    window_px: int | None = None
    """The square that views are cut from, in pixels of the files; None is the whole image."""
    accumulate: int = 1
    """Parts of a batch; contrastive losses see one at a time."""
    optimizer: str | None = None
    """What the recipe asks for; None is the method's."""
    epochs: int | None = None
    """What the recipe asks for; None leaves it to the plan."""
    steps: int | None = None
    """The same, and it wins over epochs."""
    ranks: int = 1
    """Processes; only shown."""

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches; 1 where there is not one, which is refused elsewhere."""
        return max(1, self.images // self.batch_size)


@dataclass(frozen=True)
class Choice:
    """A value and why."""

    value: Any
    reason: str


@dataclass
class _Case:
    """A plan in the making."""

    facts: Facts
    published: MethodConfig
    steps: int
    chosen: dict[str, Choice] = field(default_factory=dict)

    def paper(self, key: str) -> Any:
        """What the method's config says: the paper's, as no recipe sets what is auto."""
        return vars(self.published)[key.partition(".")[2]]

    def size(self) -> float:
        """0 for a small set, 1 for one of ImageNet's size."""
        low, high = RAMP_IMAGES
        return min(1.0, max(0.0, (self.facts.images - low) / (high - low)))

    def hurries(self) -> bool:
        """Whether a convolutional network gets AdamW where its paper has SGD or LARS."""
        by_paper = self.published.optim(self.facts.family).optimizer == "adamw"
        return self.facts.family == "convnet" and self.size() == 0 and not by_paper

    def optim(self, key: str) -> OptimSpec:
        """The published settings of the optimizer in use; ours for AdamW on a small set."""
        if "train.optimizer" in self.chosen and self.hurries():
            return OptimSpec(
                "adamw", lr=ADAMW * (256 / ADAMW_BATCH) ** 0.5, lr_scaling="sqrt", weight_decay=ADAMW_DECAY
            )
        spec = self.published.published(self.facts.family, self.facts.optimizer)
        if spec is None:
            raise UsageError(
                f"{key}: auto has no rule for train.optimizer {self.facts.optimizer}, with which this method was never "
                "published: give a number"
            )
        return spec


def plan(facts: Facts, published: MethodConfig, keys: Sequence[str]) -> dict[str, Choice]:
    """The values of these keys (dotted names, in any order) for a method whose other keys are as they are."""
    case = _Case(facts, published, steps=facts.steps or (facts.epochs or _epochs(facts)) * facts.steps_per_epoch)
    for key in RULES:  # in the order of the rules: some look at what others chose
        if key in keys:
            case.chosen[key] = RULES[key](case, key)
    return case.chosen


# The rules


def _epochs(facts: Facts) -> int:
    low, high = EPOCHS
    return min(high, max(low, math.ceil(STEPS / facts.steps_per_epoch)))


def epochs(case: _Case, key: str) -> Choice:
    """Enough for `STEPS`, within `EPOCHS`; so a run sees at most the larger of 100 times its images and 10,000 batches.

    370 images in batches of 64 are 5 steps an epoch, which would want 2,000 epochs and gets 800: 4,000 steps.
    """
    facts, (low, high) = case.facts, EPOCHS
    each = f"{facts.steps_per_epoch:,} steps each"
    if facts.steps is not None:
        return Choice(math.ceil(facts.steps / facts.steps_per_epoch), f"train.steps is {facts.steps:,}, at {each}")
    found, total = _epochs(facts), f"{each}: {case.steps:,} steps"
    if found == low:
        return Choice(found, f"{total}; {low} as DINO and iBOT on ImageNet, never fewer")
    if found == high:
        return Choice(found, f"{total}; beyond {high} (iBOT's and lightly's longest) few images are learned by heart")
    return Choice(found, f"{total}; stable-pretraining's DINO needed 7,400 on 9,469 images, 100 epochs are too few")


def optimizer(case: _Case, key: str) -> Choice:
    """AdamW for a convolutional network on a small set, else the paper's."""
    paper = case.published.optim(case.facts.family).optimizer
    if not case.hurries():
        return Choice(paper, "the paper's")
    return Choice("adamw", f"{paper} is for large batches or hundreds of epochs; AdamW learned more in short runs here")


def prototypes(case: _Case, key: str) -> Choice:
    """lightly-train's table, and never more than the paper: 5,640 images give 1,024."""
    images, most = case.facts.images, case.paper(key)
    found = min(most, next((count for below, count in PROTOTYPES if images < below), most))
    if found == most:
        return Choice(most, f"the paper's, {images / most:.2g} images a prototype")
    return Choice(found, f"lightly-train's table; the paper's {most:,} would be {most / images:,.1f} for each image")


def negatives(case: _Case, key: str) -> Choice:
    """SimCLR's 0.1 belongs to 4,096 images at once; 0.2 (256 / images)^(1/4) meets it there, and is 0.2 at 256."""
    together, paper = case.facts.batch_size // case.facts.accumulate, case.paper(key)
    found = min(max(0.2 * (256 / together) ** 0.25, paper), max(0.2, paper))
    if math.isclose(found, paper):
        return Choice(paper, f"the paper's, at {together:,} images told apart at once")
    return Choice(round(found, 3), f"{together:,} images told apart at once: few are hard; 0.1 is for 4,096 (SimCLR)")


def temperature(case: _Case, key: str) -> Choice:
    """At most 0.04 on a small set, the paper's on a million images."""
    paper, size = case.paper(key), case.size()
    low = min(COLD, paper)
    if size == 1:
        return Choice(paper, "the paper's: a set as large as ImageNet")
    if low == paper:
        return Choice(paper, "the paper's; colder ones gave all crops of a small set one prototype (370 fields)")
    words = "DINO's, which a small set can follow; the paper's higher one is for long runs"
    return Choice(round(low + size * (paper - low), 4), words if size == 0 else f"between {low:g} and the paper's")


def temperature_start(case: _Case, key: str) -> Choice:
    """As `temperature`, and not above where the warm-up ends."""
    end = key.removesuffix("_start")
    found, last = temperature(case, key), case.chosen[end].value if end in case.chosen else case.paper(end)
    return found if found.value <= last else Choice(last, "where it ends")


def temperature_warmup(case: _Case, key: str) -> Choice:
    """The paper's share."""
    share = case.paper(key)
    reason = "the paper's share; as a fixed 37,500 steps (lightly-train) the warm-up would not end in a short run"
    return Choice(share, f"{reason} of {case.steps:,}" if case.steps < 37_500 else "the paper's share of the run")


def momentum(case: _Case, key: str) -> Choice:
    """1 / (1 - m) = share * steps, at least 50 and at most the paper's: 10,000 steps give 100 steps, which is 0.99."""
    paper = case.paper(key)
    longest = 1 / max(1 - paper, 1e-9)
    horizon = min(longest, max(HORIZON_STEPS, HORIZON * case.steps))
    if horizon == longest:
        return Choice(paper, f"the paper's, which looks back over {longest:.0f} steps of {case.steps:,}")
    looks = f"looks back over {horizon:.0f} steps of {case.steps:,}"
    why = f"{HORIZON:.0%} of the run" if horizon > HORIZON_STEPS else "the fewest that a teacher gets"
    return Choice(round(1 - 1 / horizon, 4), f"{looks}, {why}; the paper's {paper:g} would lag ({longest:.0f} steps)")


def freeze(case: _Case, key: str) -> Choice:
    """The paper's share, but 100 steps, but not over 3 %: 5,000 steps give 2 %."""
    paper = case.paper(key)
    share = max(paper, min(FREEZE_MOST, FREEZE_STEPS / case.steps))
    steps = f"{share * case.steps:.0f} of {case.steps:,} steps"
    if share == paper:
        return Choice(paper, f"{steps}, the paper's share (1 epoch of 100)")
    return Choice(round(share, 4), f"{steps}; lightly-train's fixed 1,250 are 28 % of 4,400")


def centre(case: _Case, key: str) -> Choice:
    """From the first batch on a small set: a cold teacher would give all the same prototype until it has come there."""
    paper = case.paper(key)
    if case.size() == 1:
        return Choice(paper, "the paper's")
    return Choice(
        "batch", "from zero, a cold teacher says one prototype for its first 20 steps: a tenth of a short run"
    )


def head_norm(case: _Case, key: str) -> Choice:
    """BatchNorm on a small set."""
    paper = case.paper(key)
    if case.size() > 0:
        return Choice(paper, "the paper's")
    return Choice("batch", "a young network's features are so alike that without it the teacher says the same of all")


def rate(case: _Case, key: str) -> Choice:
    """As published; AdamW below a batch of 256 by the square root: 5e-4 at 256 is 2.5e-4 at 64.

    A ResNet's AdamW on a small set has 1e-3 at 64.
    """
    spec, batch = case.optim(key), case.facts.batch_size
    ratio = batch / 256
    root = spec.lr_scaling == "sqrt" or (spec.optimizer == "adamw" and ratio < 1)
    found = float(f"{spec.lr * (ratio**0.5 if root else ratio):.3g}")
    words = f"{spec.optimizer} {spec.lr:.3g} at 256 images, by the {'square root of the batch' if root else 'batch'}"
    if root and spec.lr_scaling == "linear":
        words += "; linear (the paper's) starves small batches: stable-pretraining's DINO took 5e-4 at 128"
    return Choice(found, words)


def warmup(case: _Case, key: str) -> Choice:
    """The paper's share, but 500 steps, but not over 10 %."""
    paper = case.optim(key).warmup
    share = max(paper, min(WARMUP_MOST, WARMUP_STEPS / case.steps))
    steps = f"{share * case.steps:.0f} of {case.steps:,} steps"
    if share == paper:
        return Choice(paper, f"{steps}, the paper's share; fixed steps or epochs do not carry over")
    return Choice(round(share, 4), f"{steps}; the paper's {paper:g} would be {paper * case.steps:.0f}")


def decay(case: _Case, key: str) -> Choice:
    """As published; what goes by the set is where it ends."""
    spec = case.optim(key)
    whose = "usual" if "train.optimizer" in case.chosen and case.hurries() else "the paper's"
    return Choice(spec.weight_decay, f"{whose} with {spec.optimizer}")


def decay_end(case: _Case, key: str) -> Choice:
    """Kept on small sets, raised as the paper does on ImageNet; null keeps it."""
    spec, size = case.optim(key), case.size()
    if spec.weight_decay_end is None:
        return Choice(None, "the paper keeps it")
    if size == 0:
        words = f"kept: stable-pretraining's DINO at a constant 0.05; {spec.weight_decay_end:g} is for a million images"
        return Choice(None, words)
    end = spec.weight_decay + size * (spec.weight_decay_end - spec.weight_decay)
    return Choice(round(end, 4), "the paper's" if size == 1 else "between constant and the paper's")


def scale(case: _Case, key: str) -> Choice:
    """The smallest crop is as wide as an object, within the paper's lower bound and half its upper one.

    Never below the paper's: images are packed at the resolution that the paper's smallest crop wants. An object of
    100 px in a window of 250 px makes DINO's local crops (0.16, 0.4) instead of (0.05, 0.4).
    """
    facts, (low, high) = case.facts, case.paper(key)
    cut_px = facts.window_px or math.sqrt(math.prod(facts.image_px))
    if facts.object_px is None or not cut_px:
        return Choice((low, high), "the paper's: the size of the objects is not known")
    ratio = facts.object_px / cut_px
    square = "the window" if facts.window_px else "the image"
    words = f"objects of {facts.object_px:.0f} px ({facts.objects_from}) are {ratio:.0%} of {square} wide"
    found = max(low, round(min(ratio**2, high / 2), 3))
    if found == low:
        small = "; views.window_px would show them larger" if facts.window_px is None and ratio < 0.1 else ""
        return Choice((low, high), f"the paper's: {words}{small}")
    bound = "a crop should hold one" if ratio**2 <= high / 2 else "half of the upper bound, else all crops are one"
    return Choice((found, high), f"{words}: {bound} (small things are lost in small crops: UNI#9)")


RULES: dict[str, Callable[[_Case, str], Choice]] = {
    "train.epochs": epochs,
    "train.optimizer": optimizer,
    "train.lr": rate,
    "train.warmup": warmup,
    "train.weight_decay": decay,
    "train.weight_decay_end": decay_end,
    "method.prototypes": prototypes,
    "method.patch_prototypes": prototypes,
    "method.temperature": negatives,
    "method.teacher_temperature": temperature,
    "method.teacher_temperature_start": temperature_start,
    "method.patch_temperature": temperature,
    "method.patch_temperature_start": temperature_start,
    "method.teacher_temperature_warmup": temperature_warmup,
    "method.momentum": momentum,
    "method.freeze_last_layer": freeze,
    "method.center_start": centre,
    "method.head_norm": head_norm,
    "method.scale": scale,
    "method.global_scale": scale,
    "method.local_scale": scale,
}
"""The keys that may be auto, and what finds their values."""
SCALES = frozenset(key for key, rule in RULES.items() if rule is scale)
"""Those for which the objects are looked at."""
