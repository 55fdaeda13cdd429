"""Ultralytics' trainer: a pretrained backbone in a YOLO, proven when its training starts.

from ultralytics import YOLO
from ssl_pretrain.detectors.ultralytics import attach
model = attach(YOLO("yolo12n.yaml"), "runs/x/artefact")
model.train(data="cells.yaml")

`.train()` builds the network anew and carries over only what came from a `.pt` file: weights that were put into
`model.model` by `load_state_dict` are lost without a word. `attach` puts them in after that, and compares maps.

On several GPUs Ultralytics starts new processes. Since 8.4.150 or a little before these get the callbacks too, and so
what `attach` does; with older versions `attach` refuses where it sees several GPUs. There, take the file that
`ssl-pretrain export --to ultralytics` writes, which reaches all processes with every version.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import ultralytics
from safetensors.torch import load_file
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.utils import LOGGER, dist

from ssl_pretrain.artefact import TOLERANCE, apart, find, load_backbone
from ssl_pretrain.backbones import Backbone
from ssl_pretrain.backbones.ultralytics import Ultralytics
from ssl_pretrain.detectors._maps import RESNET_DEPTHS
from ssl_pretrain.errors import NotProven, UsageError

RESNET_LEVELS = {8: 1, 16: 2, 32: 3}
"""By stride: the layer that gives a ResNet's map in the detectors that `export/ultralytics.py` makes."""


def attach(model: YOLO, artefact: str | Path) -> YOLO:
    """Lets every training of this model start from the backbone of an artefact or run; returns the model.

    The weights go into the trained network and its moving average, on every rank, after Ultralytics has set both up.
    When the training starts, both must give the artefact's maps, else `NotProven` stops it. A resumed training goes on
    as it was. As each `.train()` begins anew, make a new `YOLO` of the trained file to go on from that.

    Raises `UsageError` for a backbone that is not of the `ultralytics` family or not this model's, and where the
    installed Ultralytics would lose the weights on several GPUs.
    """
    folder = find(Path(artefact))
    backbone = load_backbone(folder).backbone
    if not isinstance(backbone, Ultralytics):
        raise UsageError(
            f"attach takes backbones of Ultralytics, not {backbone.name}: for a ResNet, load the file of "
            f"`ssl-pretrain export {folder} --to ultralytics`"
        )
    _require_fit(model.model, backbone)
    if torch.cuda.device_count() > 1 and not _processes_get_callbacks():
        raise UsageError(
            f"Ultralytics {ultralytics.__version__} drops callbacks when it trains on several GPUs, and the weights "
            "with them: update it, show it one GPU (CUDA_VISIBLE_DEVICES=0), or load the file of "
            f"`ssl-pretrain export {folder} --to ultralytics`"
        )
    start = Start(str(folder.resolve()))
    model.add_callback("on_pretrain_routine_end", start.load)
    model.add_callback("on_train_start", start.prove)
    return model


def check(model: YOLO | nn.Module, artefact: str | Path) -> float:
    """Whether a model (`YOLO`, or a trainer's `model`) holds the backbone of an artefact or run, by its maps.

    Compares what both make of the artefact's own image, on the CPU in FP32, in a copy; returns the largest difference
    as a share of the largest value. Raises `NotProven` where that is more than 1e-4, and `UsageError` where the model
    has another backbone.
    """
    folder = find(Path(artefact))
    backbone = load_backbone(folder).backbone
    network = bare(model.model if isinstance(model, YOLO) else model)
    taken = levels(backbone)
    if isinstance(backbone, Ultralytics):
        _require_fit(network, backbone)
    elif type(network.model[0]).__name__ != "TorchVision":
        raise UsageError(f"this model is not of the file that `ssl-pretrain export {folder} --to ultralytics` writes")
    expected = load_file(folder / "probe.safetensors")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.input.mean, backbone.input.std))
    found = maps(network, taken, expected["input"] * std + mean)
    far, worst = max((apart(found[name], expected[name]), name) for name in taken)
    if far > TOLERANCE:
        raise NotProven(
            f"the model does not hold the weights of {folder}: {worst} is {far:.1e} apart; load them by "
            "attach(YOLO(...), artefact) or from the exported ultralytics.pt, as .train() builds the network anew"
        )
    return far


@dataclass(frozen=True)
class Start:
    """What happens when a training starts: two callbacks of Ultralytics, which can be sent to other processes."""

    folder: str

    def load(self, trainer: Any) -> None:
        """At `on_pretrain_routine_end`: network, moving average and optimizer are there, nothing is trained yet."""
        if trainer.resume:
            return
        backbone = load_backbone(self.folder).backbone
        for network in _networks(trainer):
            _require_fit(network, backbone)
            network.load_state_dict(backbone.weights(), strict=False)
        LOGGER.info(f"ssl_pretrain: the backbone starts from {self.folder}, {len(backbone.weights())} tensors")

    def prove(self, trainer: Any) -> None:
        """At `on_train_start`: both networks must give the artefact's maps, else `NotProven`."""
        if not trainer.resume:
            far = max(check(network, self.folder) for network in _networks(trainer))
            LOGGER.info(f"ssl_pretrain: its maps are those of the artefact (largest difference {far:.1e})")


def levels(backbone: Backbone) -> dict[str, int]:
    """By the names of the artefact's maps, those that a YOLO takes: the layer of the `DetectionModel` that gives it.

    Raises `UsageError` for a backbone that cannot be in one.
    """
    if isinstance(backbone, Ultralytics):
        return {f"map_{i}": index for i, index in enumerate(backbone.layer_indices)}
    if backbone.name in RESNET_DEPTHS:
        return {f"map_{i}": RESNET_LEVELS[s] for i, s in enumerate(backbone.strides) if s in RESNET_LEVELS}
    raise UsageError(
        f"Ultralytics has no place for {backbone.name}: it takes its own backbones (ultralytics/yolo12n and the like) "
        f"and {', '.join(RESNET_DEPTHS)}; torchvision's detectors take others"
    )


def maps(model: nn.Module, taken: Mapping[str, int], rgb_BCHW: Tensor) -> dict[str, Tensor]:
    """What these layers of a `DetectionModel` make of RGB in 0..1; in a copy on the CPU in FP32, evaluation mode.

    A GPU's convolutions would differ by more than a check allows, and a training must not notice being looked at.
    """
    copied = copy.deepcopy(bare(model)).cpu().float().eval()
    found: dict[str, Tensor] = {}
    for name, index in taken.items():

        def keep(layer: nn.Module, fed: Any, output: Tensor, name: str = name) -> None:
            found[name] = output.clone()

        copied.model[index].register_forward_hook(keep)
    with torch.no_grad():
        copied(rgb_BCHW)
    return found


def bare(model: nn.Module) -> Any:
    """The `DetectionModel` inside of what DDP or `torch.compile` wrapped."""
    children = dict(model.named_children())
    inside = children.get("_orig_mod", children.get("module"))
    return model if inside is None else bare(inside)


def _networks(trainer: Any) -> list[Any]:
    """The trained network and its moving average, which some versions have on the first rank only."""
    return [bare(trainer.model)] + ([] if trainer.ema is None else [bare(trainer.ema.ema)])


def _require_fit(network: nn.Module, backbone: Backbone) -> None:
    """Refuses a network that lacks any tensor of the backbone in its shape."""
    theirs = {name: tensor.shape for name, tensor in network.state_dict().items()}
    odd = [name for name, tensor in backbone.weights().items() if theirs.get(name) != tensor.shape]
    if odd:
        raise UsageError(
            f"this model has another backbone than {backbone.name} ({odd[0]}): build it by "
            f'YOLO("{backbone.name.partition("/")[2]}.yaml")'
        )


def _processes_get_callbacks() -> bool:
    """Whether the processes that this Ultralytics starts for several GPUs get the callbacks of a model."""
    return "callbacks" in inspect.getsource(dist.generate_ddp_file)
