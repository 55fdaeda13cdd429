"""The health of a run: named diagnoses, each with what was seen and the knob to turn.

A state machine that is fed with numbers at log steps: it reads no device and knows no network. Its state is a function
of what `metrics.jsonl` has since the process began, so a run that goes on after a crash may be warned again, no more.

Thresholds are shares (of a chance value, of ln K, of the largest so far). Each was set after seeing 60 steps of every
method on tiny networks with nothing injected ("healthy"), and the faults of `tests/test_health.py`; they are not
validated on long runs, so each also has to fail several times in a row.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

LOOK_EVERY = 5
"""Log steps between two looks at the features: each costs the forward of 64 views."""
WARMUP_STEPS, WARMUP = 20, 0.1
"""Losses are not judged in the first steps, and one that has not moved is no news in the first tenth of a run, while
the learning rate rises. Features are, against those before the first step (which a continued run no longer has)."""
FEATURE_STD, FEATURE_STD_SHARE = 0.01, 0.1
"""Of 1 / sqrt(D), and of the largest so far. Healthy: 0.20, and 0.52 of it; untrained, on real bright fields: 0.02."""
RANK_SHARE = 0.2
"""Of the largest so far. Healthy: 0.49 (MAE, whose rank falls from the start), 0.57 in earlier runs."""
AT_CHANCE, ABOVE_CHANCE = 0.02, 2.0
"""A loss this near its chance value, with all its parts, says nothing; one so far above it is worse than nothing.
Healthy: 1.6 in DINO's worst step; parts cross their chance value slowly, but not all at once."""
FLOOR = 1e-4
"""Of chance. No real images allow it, but for a student that has its teacher's very weights."""
TARGET_SPREAD = 0.02
"""Of BYOL's unit vectors, whose variance is at most 1. Healthy: 0.64 or more."""
ONE_PROTOTYPE = 0.15
"""Of the spread that a batch's crops can have. Healthy: 0.23 in DINO's worst step; without a centre: below 0.001."""
UNIFORM, UNIFORM_INFORMATION = 0.99, 0.01
"""Entropy per crop by ln K, and what the mean's has above it. Healthy: 0.96 at most; without sharpening: 1.0000."""
SPIKE_MADS, SPIKE_SHARE, SPIKE_WINDOW, SPIKE_LEAST = 6.0, 0.5, 50, 10
"""Above the median of the last log steps by so many median absolute deviations, and by so large a share of it."""
SWING, SWINGS, SWING_WINDOW = 3.0, 3, 10
"""From one log step to the next by such a factor, up and down, so often in so many. Seen: DINO and iBOT whose teacher
was as fast as their centre went from one prototype to all of them and back, 0.13 to 6.8; no other guard lasted."""


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong, in one line."""

    name: str
    seen: str
    """The numbers, and what they should be."""
    knob: str
    """What to turn."""

    def __str__(self) -> str:
        return f"{self.name}: {self.seen}; {self.knob}"


@dataclass
class Seen:
    """What a guard judges: the numbers of this step, and what is remembered of earlier ones."""

    values: Mapping[str, float]
    chance: Mapping[str, float]
    crops: int
    """Of which a teacher's mean distribution is made: no more prototypes than these can be in use, were each sharp."""
    best: dict[str, float]
    """The largest value so far of what is compared with it."""
    losses: deque[float]
    """Earlier ones that were no spike."""
    recent: deque[float]
    """The last ones, spikes and this one too."""

    def ceiling(self, name: str) -> tuple[float, float]:
        """ln K of a teacher's head, and the largest spread that its crops can have if each is sharp, by ln K."""
        key = {"teacher": "loss_cls", "patch": "loss_patch"}[name]
        largest = self.chance[key if key in self.chance else "loss"]
        return largest, min(1.0, math.log(max(self.crops, 2)) / largest)


Check = Callable[[Seen], str | None]
"""What is seen where something is wrong, nothing where all is well, `None` where it cannot be told."""


@dataclass(frozen=True)
class Guard:
    """A check, and how long it has to fail."""

    name: str
    check: Check
    times: int
    """Failures in a row, at log steps (or at looks, for what is seen there) after the warm-up."""
    knobs: tuple[str, ...]
    """Keys to turn with the way: those that the recipe has are named."""
    slow: bool = False
    early: bool = False
    """Judged after the learning rate's warm-up only, or from the first step on; else after 20 steps."""
    stops: bool = True
    """Whether `on_collapse: stop` ends the run on it."""


def features_collapsed(seen: Seen) -> str | None:
    """Every image gets nearly the same feature."""
    std = seen.values.get("feature_std")
    if std is None:
        return None
    least = max(FEATURE_STD, FEATURE_STD_SHARE * seen.best["feature_std"])
    return f"feature std {std:.4f} of the sphere's 1/sqrt(D), below {least:.4f}" if std < least else ""


def low_rank(seen: Seen) -> str | None:
    """Features lie on few directions, of the many that they had."""
    rank, best = seen.values.get("feature_rank"), seen.best["feature_rank"]
    if rank is None:
        return None
    return f"feature rank {rank:.1f} of {best:.1f} before" if rank < RANK_SHARE * best else ""


def loss_at_chance(seen: Seen) -> str | None:
    """The loss of a model that has learned nothing, in every part that has a chance value."""
    parts = {name: value for name, value in seen.chance.items() if name != "loss"} or seen.chance
    values = {name: seen.values[name] for name in parts if name in seen.values}
    if not values:
        return None
    if any(abs(value - parts[name]) > AT_CHANCE * abs(parts[name]) for name, value in values.items()):
        return ""
    return " and ".join(f"{name} {v:.4f} stays at its chance value {parts[name]:.4f}" for name, v in values.items())


def loss_above_chance(seen: Seen) -> str | None:
    """Worse than knowing nothing."""
    value, chance = seen.values.get("loss"), seen.chance.get("loss")
    if value is None or chance is None:
        return None
    return f"loss {value:.4g} stays above its chance value {chance:.4g}" if value > ABOVE_CHANCE * chance else ""


def loss_impossible(seen: Seen) -> str | None:
    """Lower than any real data allow."""
    value, chance = seen.values.get("loss"), seen.chance.get("loss")
    if value is None or chance is None:
        return None
    return f"loss {value:.2g} is next to nothing (chance is {chance:.4g})" if value < FLOOR * chance else ""


def targets_collapsed(seen: Seen) -> str | None:
    """All targets alike, which a loss without negatives rewards."""
    spread = seen.values.get("target_spread")
    if spread is None:
        return None
    return f"target_spread {spread:.4f}, below {TARGET_SPREAD}: all targets are alike" if spread < TARGET_SPREAD else ""


def _heads(seen: Seen) -> Iterator[tuple[str, float, float]]:
    """Name, entropy and spread of each teacher head that had something to look at."""
    for name in ("teacher", "patch"):
        if f"{name}_spread" in seen.values and seen.values.get(f"loss_{name}") != 0:
            yield name, seen.values[f"{name}_entropy"], seen.values[f"{name}_spread"]


def one_prototype(seen: Seen) -> str | None:
    """The teacher gives (nearly) all the same prototype: nothing centres it."""
    for name, _, spread in _heads(seen):
        _, ceiling = seen.ceiling(name)
        if spread < ONE_PROTOTYPE * ceiling:
            return f"{name}_spread {spread:.3f} of ln K, below {ONE_PROTOTYPE * ceiling:.3f}: few prototypes are used"
    return ""


def uniform_teacher(seen: Seen) -> str | None:
    """The teacher says nothing about any image: nothing sharpens it."""
    for name, entropy, spread in _heads(seen):
        if entropy > UNIFORM and spread - entropy < UNIFORM_INFORMATION:
            return f"{name}_entropy {entropy:.4f} of ln K: it spreads evenly over the prototypes"
    return ""


def teacher_is_student(seen: Seen) -> str | None:
    """No moving average."""
    gap = seen.values.get("teacher_gap")
    return None if gap is None else "the teacher's weights equal the student's" if gap == 0 else ""


def loss_spike(seen: Seen) -> str | None:
    """Far above what it was."""
    value = seen.values.get("loss", math.nan)
    if len(seen.losses) < SPIKE_LEAST:
        return None
    middle = statistics.median(seen.losses)
    mad = statistics.median(abs(loss - middle) for loss in seen.losses)
    most = middle + max(SPIKE_MADS * mad, SPIKE_SHARE * abs(middle))
    return f"loss {value:.4g}, above {most:.4g}: its median is {middle:.4g}" if value > most else ""


def loss_swings(seen: Seen) -> str | None:
    """Up and down by large factors."""
    steps = list(pairwise(seen.recent))
    up = sum(later > SWING * earlier for earlier, later in steps)
    down = sum(later * SWING < earlier for earlier, later in steps)
    if not up or not down or up + down < SWINGS:
        return ""
    return f"loss went between {min(seen.recent):.3g} and {max(seen.recent):.3g} in {len(seen.recent)} log steps"


RATE = "lower train.lr"
GUARDS = (
    Guard("features_collapsed", features_collapsed, 2, (RATE, "raise method.variance", "raise method.momentum"),
          early=True),
    Guard("low_rank", low_rank, 2, (RATE, "raise method.covariance", "raise method.momentum"),
          early=True),
    Guard(
        "loss_at_chance", loss_at_chance, 10,
        ("lower method.temperature", "lower method.teacher_temperature", "try another train.lr"), slow=True,
    ),
    Guard("loss_above_chance", loss_above_chance, 10, ("raise method.temperature", RATE), slow=True),
    Guard("loss_impossible", loss_impossible, 5, ("lower method.temperature", RATE, "see what the views show")),
    Guard("targets_collapsed", targets_collapsed, 3, ("raise method.momentum", RATE)),
    Guard("one_prototype", one_prototype, 5,
          ("lower method.center_momentum", "raise method.teacher_temperature", RATE)),
    Guard("uniform_teacher", uniform_teacher, 10, ("lower method.teacher_temperature", "lower method.prototypes"),
          slow=True),
    Guard("teacher_is_student", teacher_is_student, 2, ("raise method.momentum",)),
    Guard("loss_swings", loss_swings, 1, ("raise method.momentum", "raise method.teacher_temperature", RATE)),
    Guard("loss_spike", loss_spike, 3, (RATE, "raise train.warmup"), stops=False),
)  # fmt: skip


class Health:
    """Judges a run by its numbers; `look` gives what is wrong now."""

    def __init__(self, steps: int, chance: Mapping[str, float], settings: Mapping[str, object], crops: int) -> None:
        self.steps, self.chance, self.settings, self.crops = steps, chance, settings, crops
        self.failures = dict.fromkeys((guard.name for guard in GUARDS), 0)
        self.best = {"feature_std": 0.0, "feature_rank": 0.0}
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.recent: deque[float] = deque(maxlen=SWING_WINDOW)
        self.current: dict[str, Diagnosis] = {}
        self.told: set[str] = set()

    def look(self, step: int, values: Mapping[str, float]) -> list[Diagnosis]:
        """What is wrong after this step; numbers that are not finite are no evidence (see `not_finite`)."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if "loss" in finite:
            self.recent.append(finite["loss"])
        seen = Seen(finite, self.chance, self.crops, self.best, self.losses, self.recent)
        for name, best in self.best.items():
            self.best[name] = max(best, finite.get(name, 0.0))
        for guard in GUARDS:
            if step > (0 if guard.early else max(WARMUP_STEPS, WARMUP * self.steps if guard.slow else 0)):
                self._judge(guard, seen)
        if "loss" in finite and not self.failures["loss_spike"]:
            self.losses.append(finite["loss"])
        return list(self.current.values())

    def news(self, found: list[Diagnosis]) -> list[Diagnosis]:
        """Those that were not there before: each is told once until it clears."""
        fresh = [diagnosis for diagnosis in found if diagnosis.name not in self.told]
        self.told = {diagnosis.name for diagnosis in found}
        return fresh

    def fatal(self, found: list[Diagnosis]) -> Diagnosis | None:
        """The first of them on which `on_collapse: stop` ends a run."""
        stops = {guard.name for guard in GUARDS if guard.stops}
        return next((diagnosis for diagnosis in found if diagnosis.name in stops), None)

    def _judge(self, guard: Guard, seen: Seen) -> None:
        """Counts failures in a row; a check that cannot tell changes nothing."""
        what = guard.check(seen)
        if what is None:
            return
        self.failures[guard.name] = self.failures[guard.name] + 1 if what else 0
        self.current.pop(guard.name, None)
        if self.failures[guard.name] >= guard.times:
            self.current[guard.name] = Diagnosis(guard.name, what, advice(guard.knobs, self.settings))


def not_finite(loss: float, norm: float, skipped: int, rate: float) -> Diagnosis:
    """Of a step that was skipped, before the optimizer moved."""
    seen = f"loss {loss:.4g}, gradient norm {norm:.4g}: the gradient is not finite; the step is skipped"
    knob = f"lower train.lr ({rate:.2g} now)" if skipped > 1 or math.isfinite(loss) else "see the images of this step"
    return Diagnosis("not_finite", seen, knob)


def advice(knobs: tuple[str, ...], settings: Mapping[str, object]) -> str:
    """Those of these wishes whose key the recipe has, with its value.

    >>> advice(("lower train.lr", "raise method.variance"), {"method.momentum": 0.9, "train.lr": 0.3})
    'lower train.lr (0.3)'
    """
    named = []
    for wish in knobs:
        key = wish.rpartition(" ")[2]
        if "." not in key:
            named.append(wish)
        elif key in settings:
            value = settings[key]
            named.append(f"{wish} ({value:.3g})" if isinstance(value, float) else f"{wish} ({value})")
    return " or ".join(named)
