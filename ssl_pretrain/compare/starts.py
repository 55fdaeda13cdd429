"""What a detector starts from: this backbone, the same network with random or ImageNet weights, other artefacts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import timm

from ssl_pretrain import artefact
from ssl_pretrain.artefact import find, load_backbone
from ssl_pretrain.errors import UsageError
from ssl_pretrain.named import named

RANDOM, IMAGENET = "random", "imagenet"


@dataclass(frozen=True)
class Start:
    """Weights to start from."""

    name: str
    folder: Path
    """An artefact."""
    pretrained: bool
    """False takes the architecture only."""
    identity: str
    """Of the weights, or of the architecture where they are random, and of what the network is fed."""
    architecture: str


def resolve(backbone: Path, against: Sequence[str], folder: Path) -> tuple[list[Start], list[str]]:
    """The starts, that of `backbone` first, and lines on what could not be had.

    `against` has `random`, `imagenet` and the folders of artefacts or runs. ImageNet weights are taken from what timm
    or torch downloaded before, never from the network, and are written as an artefact into `folder`. Raises
    `UsageError` where there is no artefact, and when nothing is left to compare with.
    """
    own = _artefact(backbone)
    starts, lines = [own], []
    for word in dict.fromkeys(against):
        if word == RANDOM:
            starts.append(_start(RANDOM, own.folder, pretrained=False))
        elif word == IMAGENET:
            try:
                starts.append(_imagenet(own, folder))
            except UsageError as error:
                lines.append(str(error))
        else:
            starts.append(_artefact(Path(word)))
    if len(starts) == 1:
        raise UsageError(f"nothing to compare with{f': {lines[0]}' if lines else ''}; give --against random")
    differing = sorted({start.architecture for start in starts} - {own.architecture})
    if differing:
        lines.append(f"other networks than {own.architecture} are compared too: {', '.join(differing)}")
    return _told_apart(starts), lines


def _artefact(path: Path) -> Start:
    folder, name = find(path), path.resolve().name
    if name in ("artefact", "best"):
        run = path.resolve().parent.name
        name = run if name == "artefact" else f"{run}/best"
    return _start(name, folder, pretrained=True)


def _start(name: str, folder: Path, pretrained: bool) -> Start:
    loaded = load_backbone(folder)  # which says so here, not after the first runs, when the artefact is damaged
    weights = loaded.card["weights_sha256" if pretrained else "shapes_sha256"]
    identity = f"{loaded.backbone.name} {weights} {loaded.input.mean} {loaded.input.std}"
    return Start(name, folder, pretrained, identity, loaded.backbone.name)


def _told_apart(starts: list[Start]) -> list[Start]:
    """The same, two of one name numbered."""
    seen: dict[str, int] = {}
    named_apart = []
    for start in starts:
        seen[start.name] = seen.get(start.name, 0) + 1
        name = start.name if seen[start.name] == 1 else f"{start.name} ({seen[start.name]})"
        named_apart.append(replace(start, name=name))
    return named_apart


def _imagenet(own: Start, folder: Path) -> Start:
    """The weights that timm publishes for this architecture, if they are on this machine. Raises `UsageError`."""
    loaded = load_backbone(own.folder)
    if loaded.card["family"] != "timm" or not timm.models.is_model_pretrained(own.architecture):
        raise UsageError(f"no ImageNet weights of {own.architecture} are published with timm: left out")
    family = named("backbones", "timm")
    file = family.at_hand(own.architecture)
    if file is None:
        raise UsageError(
            f"ImageNet weights of {own.architecture} are not on this machine, and nothing is downloaded: left out; "
            "artefact.write(Path(FOLDER), artefact.resolve('timm:NAME'), {}) where they are makes one for --against"
        )
    backbone = family.from_file(loaded.backbone.config(), file)
    artefact.write(folder / IMAGENET, backbone, {"method": IMAGENET, "source": f"timm {own.architecture}"})
    return _start(IMAGENET, folder / IMAGENET, pretrained=True)
