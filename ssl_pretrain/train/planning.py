"""Where a recipe says `auto`: taken out before its values are typed, and put in when the images are known.

The rules are in `auto.py`; here is what they are asked for, and what they are told.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ssl_pretrain import backbones, config
from ssl_pretrain.data import sources
from ssl_pretrain.data.pack import Pack
from ssl_pretrain.errors import UsageError
from ssl_pretrain.train.auto import RULES, SCALES, Choice, Facts, plan
from ssl_pretrain.views.audit import foreground

if TYPE_CHECKING:
    from ssl_pretrain.train.recipe import Recipe

WORD = "auto"
GUESSED = 32
"""Images in which objects are looked for where nobody has labelled any; a twentieth of a second each."""


def split(
    given: Mapping[str, Any], words: Sequence[str], sections: Mapping[str, type]
) -> tuple[dict[str, Any], list[str], frozenset[str]]:
    """A recipe's mapping and words (options and values apart) without what is auto in them, and those keys.

    With `auto: true` these are also all keys with a rule that nobody names. Raises `UsageError` for `auto` where no
    rule is.
    """
    said = {f"{s}.{k}": v for s, inner in given.items() if isinstance(inner, dict) for k, v in inner.items()}
    said |= {key: value for key, value in given.items() if not isinstance(value, dict)}
    said |= {
        option[2:]: value for option, value in pairwise(words) if option.startswith("--") and not value.startswith("--")
    }
    hints = {
        f"{section}.{key}" if section else key: hint
        for section, kind in sections.items()
        for key, hint in typing.get_type_hints(kind).items()
    }
    ruled = [key for key in RULES if key in hints]
    asked = {key for key, value in said.items() if value == WORD and key in hints and not _is_value(hints[key])}
    for key in asked.difference(RULES):
        raise UsageError(f"{key}: auto has no rule for it; it is for {', '.join(ruled)}")
    if yaml.safe_load(str(said.get("auto", False))) is True:
        asked |= set(ruled).difference(said)
        if said.get("train.steps") not in (None, "null"):
            asked -= {"train.epochs"}.difference(key for key, value in said.items() if value == WORD)
        if "train.weight_decay" in said and "train.weight_decay_end" not in said:
            asked -= {"train.weight_decay_end"}

    def stays(key: str, value: Any) -> bool:  # a recipe's auto goes also where a word names the value
        return key not in asked and not (value == WORD and key in ruled)

    rest = {
        s: {k: v for k, v in inner.items() if stays(f"{s}.{k}", v)} if isinstance(inner, dict) else inner
        for s, inner in given.items()
    }
    return rest, _without(words, asked), frozenset(asked)


def _is_value(hint: Any) -> bool:
    """Whether `auto` is a value of this type: a text, or one of those listed."""
    return hint in (str, WORD) or any(_is_value(part) for part in typing.get_args(hint))


def _without(words: Sequence[str], keys: set[str]) -> list[str]:
    left, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word.startswith("--") and word[2:] in keys:
            skip = True
        else:
            left.append(word)
    return left


def planned(recipe: Recipe, pack: Pack, folder: Path, ranks: int, cache: Path, console: Console) -> Recipe:
    """The recipe with a number for each `auto`: those of the run in this folder, else of a new plan, which is shown."""
    if not recipe.auto:
        return recipe
    before = _of_run(folder, recipe)
    if before is not None:
        console.print(f"auto: {len(before)} values are those of the run in {escape(str(folder))}", highlight=False)
        return recipe.settled(before, {key: said for key, said in _reasons(folder).items() if key in before})
    facts = gather(recipe, pack, ranks, cache)
    choices = plan(facts, recipe.method, sorted(recipe.auto))
    console.print(table(facts, choices, recipe))
    values = {key: choice.value for key, choice in choices.items()}
    return recipe.settled(values, {key: f"{WORD}: {choice.reason}" for key, choice in choices.items()})


def _reasons(folder: Path) -> dict[str, str]:
    """Where the run in this folder says that its auto values came from; its images may be others by now."""
    from ssl_pretrain.train.recipe import written  # which imports this module

    lines = written((folder / "recipe.yaml").read_text(encoding="utf-8"))
    return {key: origin for key, _, origin in lines if origin.partition(":")[0] == WORD}


def _of_run(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """What the run in this folder has for the keys, None where there is nothing to be continued."""
    if not (folder / "recipe.yaml").exists() or not any((folder / "checkpoints").glob("step_*.json")):
        return None
    run, values = config.read_yaml(folder / "recipe.yaml"), {}
    for key in recipe.auto:
        section, _, name = key.partition(".")
        inner = run.get(section, {})
        # A key that is younger than the run had no other value than its default.
        value = inner[name] if name in inner else recipe.default(key)
        values[key] = tuple(value) if isinstance(value, list) else value
    return values


def gather(recipe: Recipe, pack: Pack, ranks: int, cache: Path) -> Facts:
    """What is known of images, recipe and processes; objects are looked for only where a rule asks for them."""
    train = recipe.train
    height, width = (int(side) for side in np.median(pack.original_N2, axis=0))
    object_px, source = _objects(recipe, pack, cache) if recipe.auto & SCALES else (None, "")
    return Facts(
        images=len(pack), batch_size=train.batch_size, family=family(recipe), image_px=(height, width),
        object_px=object_px, objects_from=source, window_px=recipe.views.window_px, accumulate=train.accumulate,
        optimizer=train.optimizer, epochs=None if "train.epochs" in recipe.auto else train.epochs, steps=train.steps,
        ranks=ranks,
    )  # fmt: skip


def family(recipe: Recipe) -> Literal["vit", "convnet"]:
    """Of the recipe's backbone."""
    name = recipe.backbone.name
    return backbones.create(name, **recipe.backbone_options(backbones.maskable(name))).family


def _objects(recipe: Recipe, pack: Pack, cache: Path) -> tuple[float | None, str]:
    """The median side of the objects in pixels of the files, and where it comes from."""
    if recipe.probe.data is not None:
        labelled = sources.labelled(recipe.probe.data, cache, recipe.probe.format)
        if labelled.kind == "point":
            return float(recipe.probe.point_px), "probe.point_px, for labelled points"
        if labelled.kind == "box":
            box_N4 = np.concatenate([image.boxes_N4 for image in labelled.images])
            return _side_px(box_N4), "labels of probe.data"
    boxes = [foreground(pack.image(int(place))) / pack.scale_N[place] for place in pack.by_content_N[:GUESSED]]
    return _side_px(np.concatenate(boxes)), "guessed from contrast"


def _side_px(box_N4: np.ndarray) -> float | None:
    """Median side of the squares with the boxes' areas; None without boxes."""
    sides_N = np.sqrt((box_N4[:, 2] - box_N4[:, 0]) * (box_N4[:, 3] - box_N4[:, 1]))
    return float(np.median(sides_N)) if len(sides_N) else None


def table(facts: Facts, choices: Mapping[str, Choice], recipe: Recipe) -> Table:
    """Each value beside the one that the recipe would have without it, and why."""
    height, width = facts.image_px
    each = f" ({facts.batch_size // facts.ranks} on each of {facts.ranks} processes)" if facts.ranks > 1 else ""
    head = f"auto: {facts.images:,} images of {width} x {height} px, {recipe.backbone.name} ({facts.family}), "
    head += f"batch {facts.batch_size}{each}"
    found = Table("key", "auto", "without", "why", title=head, title_justify="left", title_style="bold")
    optim = vars(recipe.optim(facts.family))
    for key, choice in choices.items():
        section, _, name = key.partition(".")
        without = optim[name] if section == "train" and name in optim else recipe.default(key)
        found.add_row(key, _text(choice.value), _text(without), escape(choice.reason))
    return found


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return ", ".join(f"{v:g}" for v in value) if isinstance(value, tuple | list) else f"{value:g}"
