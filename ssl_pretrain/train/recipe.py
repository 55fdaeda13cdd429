"""The recipe of a run: what the YAML file and the command line may say, and what becomes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ssl_pretrain import backbones, config
from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods import MethodConfig, OptimSpec, ViTDefaults, config_class
from ssl_pretrain.train import planning
from ssl_pretrain.views import ViewSpec, presets
from ssl_pretrain.views.extras import create, placed


@dataclass(frozen=True)
class Top:
    """The keys at the top level."""

    data: str | None = None
    """A pack, a folder of images (searched recursively), or `synthetic:N` for N fields that the package draws."""
    out: str | None = None
    """Folder of the run; starting again with the same folder continues it. Default: runs/<name of the recipe>."""
    seed: int = 0
    """Of everything random in the run."""
    auto: bool = False
    """Every key that has a rule in `train/auto.py`, and that the recipe does not name, is computed from the images and
    shown with its reason. A single key is asked for by itself: `prototypes: auto`."""


@dataclass(frozen=True)
class BackboneSection:
    """What is pretrained. `backbone: resnet18` is short for `backbone: {name: resnet18}`."""

    name: str = "resnet50"
    """A timm model, or family/model."""
    patch_size: int | None = None
    """Plain ViT only: side of a patch in pixels; null keeps the model's own."""
    pool: Literal["token", "avg"] | None = None
    """Plain ViT only: class token or mean patch token as the feature; null leaves it to the method."""
    drop_path: float | None = None
    """Rate of stochastic depth; null leaves it to the method."""
    normalize: bool = True
    """Feeds RGB less the mean and by the deviation that the model's family is fed; false feeds 0..1 as it is, as
    Ultralytics' trainer does."""
    init: str | None = None
    """Weights to start from: timm (the published ones; downloads them) or timm:MODEL.TAG, a run or artefact folder, or
    a file (.safetensors, or .pt and the like, of which only tensors are read). Null or random: drawn from the seed."""
    init_partial: bool = False
    """Start also from weights that fill less than 95 % of the backbone; the rest stays random."""


@dataclass(frozen=True)
class ViewsSection:
    """Changes to the method's views that the images ask for; null keeps what the preset, else the paper, does."""

    preset: str | None = None
    """The kind of images: natural (null, the paper's views), brightfield, stained, tem (see `views/presets.py`)."""

    window_px: int | None = None
    """All views of an image are cut from one random square of this side (in original pixels), so that they show the
    same few objects; null cuts from the whole image."""
    vflip_p: float | None = None
    """Vertical flips: microscopy has no up."""
    turn_p: float | None = None
    """Turns by 90, 180 and 270 degrees: free in microscopy."""
    rotate_p: float | None = None
    """Rotation by any angle, antialiased, without empty corners."""
    brightness: float | None = None
    """Brightness jitter. A bright field is nearly white: a factor of 1.4 or more leaves nothing of it."""
    gray_p: float | None = None
    """Grayscale; stain and crystals' colours may matter."""
    solarize_p: float | None = None
    """Solarize, on the views that the method solarizes."""
    hue: Literal["hsv", "yiq"] | None = None
    """Where hue is turned: exactly, in HSV, or linearly, in YIQ: faster in plain torch, and another
    augmentation."""
    extras: list[dict[str, Any]] | None = None
    """More ops, each `{name: {key: value, ...}}`: a file of `views/extras/`, which replaces the preset's op of that
    name (`{dust: {p: 0}}` switches it off), or a class of `kornia.augmentation`, such as `{RandomJPEG: {jpeg_quality:
    [50, 95], p: 0.3}}`."""
    engine: Literal["torch", "compiled", "triton"] | None = None
    """What makes the views; null takes the fastest that works here and is worth its start."""
    short_side_px: int | None = None
    """Short side of the decoded images; null derives it from the smallest crop, so that no crop is enlarged."""


@dataclass(frozen=True)
class TrainSection:
    """The loop."""

    epochs: int = 100
    """Passes over the images."""
    steps: int | None = None
    """Optimizer steps instead of epochs."""
    batch_size: int = 256
    """Images per step over all ranks."""
    accumulate: int = 1
    """Parts that a rank's share of the batch is cut into. Contrastive losses then see the negatives of a part only."""
    optimizer: Literal["adamw", "sgd", "lars"] | None = None
    """Null takes the method's for this family of backbones."""
    lr: float | None = None
    """Peak learning rate, as it is (not scaled by the batch); null takes the method's, scaled."""
    weight_decay: float | None = None
    """Null takes the method's."""
    weight_decay_end: float | None = None
    """Where a cosine takes it by the end of the run; null takes the method's, or keeps a weight_decay given here."""
    warmup: float | None = None
    """Share of the run with a rising learning rate; null takes the method's."""
    freeze_backbone: float = 0.0
    """Share of the run in which only the heads learn and the backbone stands still, for one that starts from `init`:
    random heads would drag its features away."""
    layer_decay: float | None = None
    """Learning rate of each layer of the backbone over that of the next deeper one (0.65 to 1 is usual); the deepest
    layer and the heads learn at the full rate. Null takes the method's, which is none but for DINOv2."""
    precision: Literal["auto", "32-true", "bf16-mixed", "64-true"] = "auto"
    """Auto: bf16-mixed on GPUs that have it, else 32-true."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Auto: a GPU if there is one."""
    devices: int | None = None
    """Processes on this node; null: every GPU, or one process on a CPU. Under torchrun and SLURM they decide."""
    residency: Literal["auto", "gpu", "pinned", "mapped"] = "auto"
    """Where the decoded images are kept: GPU memory, (pinned) RAM, or the file, mapped. Auto: the first with room."""
    save_every_steps: int | None = None
    """Null saves by the clock alone."""
    save_every_minutes: float = 10.0
    """A crash costs at most this much."""
    log_every_steps: int = 10
    """Steps between two lines of metrics."""
    max_skipped: int = 3
    """Steps in a row with a non-finite loss or gradient that are skipped before the run stops with code 70."""
    on_change: Literal["refuse", "continue"] = "refuse"
    """What follows when the same run is continued with another recipe or other images: it is refused with the
    difference shown, or goes on, and `recipe.yaml` and the artefact's card say since when."""
    requeue: bool = True
    """Under SLURM, put the job back into the queue after SIGUSR1 (`#SBATCH --signal=USR1@120`) and the save."""
    on_collapse: Literal["warn", "stop"] = "warn"
    """What follows when the features, the teacher or the loss show a collapse: a warning, or, after saving, code 70."""


@dataclass(frozen=True)
class ProbeSection:
    """The k-NN probe during training."""

    data: str | None = None
    """A labelled set, or `synthetic:N`; null trains without a probe."""
    format: str | None = None
    """Of the labels, where two would fit: coco, yolo, voc...; null recognises it."""
    group_regex: str | None = None
    """Its first (...) in an image's path names the patient or slide, whose images are never on both sides."""
    every_epochs: int = 10
    """Epochs between two probes; the last step is always probed."""
    every_minutes: float | None = None
    """Minutes between two probes instead; null goes by epochs."""
    max_share: float = 0.03
    """Largest share of the time for probes, a first minute aside; what would take more is put off."""
    score: Literal["balanced_accuracy", "accuracy", "macro_f1"] = "balanced_accuracy"
    """By which `best/` is chosen."""
    patience: int | None = None
    """Probes in a row without a better score that end the run; null trains to the end."""
    size_px: int | None = None
    """Side to which objects are resized; null takes the backbone's input size."""
    point_px: int = 80
    """Side of the square around a labelled point, in pixels of the image."""


CHANGES = ("vflip_p", "turn_p", "rotate_p", "brightness", "gray_p")
"""What the views section may change in every view."""


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe."""

    top: Top
    backbone: BackboneSection
    method_name: str
    method: MethodConfig
    views: ViewsSection
    train: TrainSection
    probe: ProbeSection
    origin: Mapping[str, str] = field(compare=False)
    """Where each value came from: `recipe`, `command line`, `default`, or `auto: ` and why."""
    auto: frozenset[str] = frozenset()
    """Dotted keys whose values wait for the images (`planning.planned`); until then they have their defaults."""

    def specs(self) -> tuple[ViewSpec, ...]:
        """The method's views with the preset's changes, then the recipe's own."""
        views = self.views
        changes: dict[str, Any] = {k: vars(views)[k] for k in CHANGES if vars(views)[k] is not None}
        if views.hue is not None:
            changes["hue_space"] = views.hue
        specs = []
        for paper in self.method.views():
            spec = dataclasses.replace(presets.apply(views.preset or "natural", paper), **changes)
            if views.solarize_p is not None and paper.solarize_p:
                spec = dataclasses.replace(spec, solarize_p=views.solarize_p)
            for op in views.extras or ():
                ((name, options),) = op.items()
                made = create(name, options or {})
                # One of our own stands in for the preset's; of Kornia's classes there may be several.
                chain = tuple(o for o in spec.chain if not (name.islower() and type(o) is type(made)))
                spec = dataclasses.replace(spec, chain=placed(chain, made))
            specs.append(spec)
        return tuple(specs)

    def backbone_options(self, plain_vit: bool) -> dict[str, Any]:
        """What `backbones.create` is given: the recipe's choices, then the method's for a plain ViT."""
        chosen = self.backbone
        wants = self.method.vit() if plain_vit else ViTDefaults(pool="token", drop_path=0.0)
        options: dict[str, Any] = {"img_size": self.method.views()[0].size_px, "normalize": chosen.normalize}
        drop_path = wants.drop_path if chosen.drop_path is None else chosen.drop_path
        pool = chosen.pool or (wants.pool if plain_vit else None)
        found = {"patch_size": chosen.patch_size, "pool": pool, "drop_path": drop_path or None}
        return options | {key: value for key, value in found.items() if value is not None}

    def optim(self, family: Literal["vit", "convnet"]) -> OptimSpec:
        """The method's optimizer with the recipe's changes; its `lr` is the peak of this run.

        Raises `UsageError` for an optimizer that the method was never published with, unless its rate is given.
        """
        train = self.train
        spec = self.method.published(family, train.optimizer)
        if spec is None:
            assert train.optimizer is not None  # the family's own is always published
            if train.lr is None:
                raise UsageError(
                    f"{self.method_name} was never published with train.optimizer {train.optimizer}: give train.lr too"
                )
            spec = dataclasses.replace(self.method.optim(family), optimizer=train.optimizer)
        ratio = train.batch_size / 256
        scaled = spec.lr * (ratio if spec.lr_scaling == "linear" else ratio**0.5)
        changes: dict[str, Any] = {"lr": scaled if train.lr is None else train.lr}
        for key in ("weight_decay", "warmup", "layer_decay"):
            if vars(train)[key] is not None:
                changes[key] = vars(train)[key]
        if train.weight_decay is not None or train.weight_decay_end is not None:
            changes["weight_decay_end"] = train.weight_decay_end
        return dataclasses.replace(spec, **changes)

    def flat(self) -> dict[str, Any]:
        """Every value under its dotted key."""
        sections = {"": self.top, "backbone": self.backbone, "method": self.method}
        sections |= {"views": self.views, "train": self.train, "probe": self.probe}
        values = config.flat(sections)
        return {"method.name": self.method_name, **values, **dict.fromkeys(sorted(self.auto), "auto")}

    def settled(self, values: Mapping[str, Any], origin: Mapping[str, str]) -> Recipe:
        """With these values for the keys that were auto, and where each came from, in words."""
        parts = {}
        for name in ("train", "method"):
            mine = {k.partition(".")[2]: v for k, v in values.items() if k.partition(".")[0] == name}
            parts[name] = dataclasses.replace(vars(self)[name], **mine)
        left = self.auto.difference(values)
        found = dataclasses.replace(self, auto=left, origin={**self.origin, **origin}, **parts)
        _check(found)
        return found

    def default(self, key: str) -> Any:
        """What a key has that nobody names."""
        return defaults(self.method_name)[key]

    def yaml(self) -> str:
        """The whole recipe as YAML, each value with where it came from; it can be run again."""
        lines = []
        for key, value in config.nested(self.flat()).items():
            if isinstance(value, dict):
                lines += ["", f"{key}:", *(self._line(f"{key}.{name}", v, 2) for name, v in value.items())]
            else:
                lines.append(self._line(key, value, 0))
        return "\n".join(lines) + "\n"

    def _line(self, key: str, value: Any, indent: int) -> str:
        text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
        return f"{' ' * indent}{key.rpartition('.')[2]}: {text}".ljust(44) + f"  # {self.origin.get(key, 'default')}"


def load(source: Path | Mapping[str, Any], words: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file or mapping, with command-line words over it; `UsageError` says what is wrong in one line."""
    given = _long_form(config.read_yaml(source) if isinstance(source, Path) else source)
    words = _long_words(words)
    if words and words[-1] == "--method.name":
        raise UsageError("--method: expected one argument")
    method = given.get("method", {})
    if not isinstance(method, dict) or not {"name"} & (set(method) | ({"name"} if "--method.name" in words else set())):
        raise UsageError("the recipe names no method: it needs `method: {name: simclr}` (or dino, mae...)")
    name = words[words.index("--method.name") + 1] if "--method.name" in words else method["name"]
    given = {**given, "method": {key: value for key, value in method.items() if key != "name"}}
    words = _without(words, "--method.name")
    given, words, auto = planning.split(given, words, sections(str(name)))
    built = config.build(given, words, sections(str(name)))
    origin = {f"{s}.{k}": "recipe" for s, v in given.items() if isinstance(v, dict) for k in v}
    origin |= {k: "recipe" for k, v in given.items() if not isinstance(v, dict)} | {"method.name": "recipe"}
    origin |= {word[2:].partition("=")[0]: "command line" for word in words if word.startswith("--")}
    parts = {key: built[key] for key in ("backbone", "method", "views", "train", "probe")}
    origin |= dict.fromkeys(auto, "auto")
    recipe = Recipe(top=built[""], method_name=str(name), origin=origin, auto=auto, **parts)
    _check(recipe)
    return recipe


def written(text: str) -> list[tuple[str, str, str]]:
    r"""Dotted key, value and origin of each line of a `recipe.yaml`, all as they are written there.

    YAML itself drops the comments in which the origins stand. A section's own line has no value; `UsageError` for a
    text that is no mapping.

    >>> written("seed: 3\ntrain:\n  lr: 0.1  # auto: why")
    [('seed', '3', ''), ('train', '', ''), ('train.lr', '0.1', 'auto: why')]
    """
    lines, found = text.splitlines(), []

    def walk(node: yaml.Node | None, prefix: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            raise UsageError("a recipe is a mapping of keys and values, such as `seed: 0`")
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if isinstance(value, yaml.MappingNode) and not value.flow_style:
                found.append((name, "", ""))
                walk(value, f"{name}.")
                continue
            # What stands in several lines is shown in one, without comments.
            start, end = value.start_mark, value.end_mark
            rest = lines[end.line][end.column :].strip() if end.line < len(lines) else ""
            words = " ".join(text[start.index : end.index].split())
            found.append((name, words, rest[1:].strip() if rest.startswith("#") else ""))

    try:
        walk(yaml.compose(text, Loader=yaml.SafeLoader), "")
    except yaml.YAMLError as error:
        raise UsageError(f"the recipe is no YAML: {str(error).splitlines()[0]}") from error
    return found


def defaults(method: str) -> dict[str, Any]:
    """What a recipe of this method says of the keys that it need not name, by their dotted names."""
    found = {}
    for section, kind in sections(method).items():
        for item in dataclasses.fields(kind):
            if item.default is not dataclasses.MISSING:
                value = list(item.default) if isinstance(item.default, tuple) else item.default
                found[f"{section}.{item.name}" if section else item.name] = value
    return found


def sections(method: str) -> dict[str, type]:
    """The sections of a recipe for this method."""
    general = {"": Top, "backbone": BackboneSection, "method": config_class(method)}
    return general | {"views": ViewsSection, "train": TrainSection, "probe": ProbeSection}


def _long_form(given: Mapping[str, Any]) -> dict[str, Any]:
    short = {
        key: {"name": value} for key, value in given.items() if key in ("backbone", "method") and isinstance(value, str)
    }
    return {**given, **short}


def _long_words(words: Sequence[str]) -> list[str]:
    """`--backbone X` for `--backbone.name X`, and `--key=value` as two words."""
    split = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    short = {"--backbone": "--backbone.name", "--method": "--method.name"}
    return [short.get(word, word) for word in split]


def _without(words: list[str], option: str) -> list[str]:
    if option not in words:
        return words
    place = words.index(option)
    return words[:place] + words[place + 2 :]


def _check_views(views: ViewsSection) -> None:
    for op in views.extras or ():
        ((name, options),) = op.items() if len(op) == 1 else ((None, None),)
        if not isinstance(name, str) or not isinstance(options, dict | None):
            raise UsageError(
                f"views.extras: {op} is no op: write {{name: {{key: value}}}}, each name an item of its own"
            )
        if name.islower() and sum(name in other for other in views.extras or ()) > 1:
            raise UsageError(f"views.extras: {name} stands there twice")
    for key in ("window_px", "short_side_px"):
        value = vars(views)[key]
        if value is not None and value < 1:
            raise UsageError(f"views.{key} is {value}: it must be at least 1")


def _check_probe(probe: ProbeSection) -> None:
    if probe.every_epochs < 1:
        raise UsageError(f"probe.every_epochs is {probe.every_epochs}: it must be at least 1")
    if probe.every_minutes is not None and probe.every_minutes <= 0:
        raise UsageError(f"probe.every_minutes is {probe.every_minutes:g}: it must be above 0")
    if not 0 < probe.max_share <= 1:
        raise UsageError(f"probe.max_share is {probe.max_share:g}: it is a share above 0, at most 1")
    if probe.patience is not None and (probe.patience < 1 or probe.data is None):
        raise UsageError("probe.patience counts probes: it must be at least 1, and probe.data must be given")


def _check(recipe: Recipe) -> None:
    """What can be seen to be impossible before any image is read."""
    train = recipe.train
    for key in ("epochs", "steps", "batch_size", "accumulate", "save_every_steps", "log_every_steps", "devices"):
        value = vars(train)[key]
        if value is not None and value < 1:
            raise UsageError(f"train.{key} is {value}: it must be at least 1")
    if train.warmup is not None and not 0 <= train.warmup < 1:
        raise UsageError(f"train.warmup is {train.warmup}: it is a share of the run (0 to 1), not epochs")
    if not 0 <= train.freeze_backbone < 1:
        raise UsageError(
            f"train.freeze_backbone is {train.freeze_backbone}: it is a share of the run, from 0 to below 1"
        )
    if train.layer_decay is not None and not 0 < train.layer_decay <= 1:
        raise UsageError(f"train.layer_decay is {train.layer_decay}: it is above 0, and at most 1")
    if recipe.top.seed < 0:
        raise UsageError(f"seed is {recipe.top.seed}: it must be 0 or more")
    _check_probe(recipe.probe)
    if train.optimizer == "lars" and train.weight_decay == 0:
        raise UsageError("train.weight_decay 0 would switch off the scaling of LARS; use 1e-6 or sgd")
    if train.residency == "gpu" and train.accelerator == "cpu":
        raise UsageError("train.residency is gpu, but train.accelerator is cpu: use --train.residency auto")
    _check_views(recipe.views)
    maskable = backbones.maskable(recipe.backbone.name)
    if recipe.method.masks_patches and not maskable:
        raise UsageError(
            f"{recipe.method_name} hides patches from the network, which {recipe.backbone.name} cannot do: it takes "
            "plain ViTs such as vit_small_patch16_224; for a convolutional backbone use simclr or dino"
        )
    if recipe.method.masks_maps and maskable:
        raise UsageError(
            f"{recipe.method_name} needs feature maps of several strides, which the plain ViT {recipe.backbone.name} "
            "has not: use mae, or a convolutional backbone"
        )
    for spec in recipe.specs():
        low, high = spec.scale
        if not 0 < low <= high <= 1:
            raise UsageError(f"the scale of {spec.name} is ({low}, {high}): it needs 0 < low <= high <= 1")
