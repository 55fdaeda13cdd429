"""Where weights are found: timm's published ones, an artefact, a file. They are read here, and matched in `init`."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ssl_pretrain import artefact
from ssl_pretrain.backbones import InputSpec
from ssl_pretrain.errors import DataError, UsageError
from ssl_pretrain.named import named
from ssl_pretrain.train.checkpoint import expanded, pickled_kind

Weights = dict[str, Tensor]
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tar")


@dataclass(frozen=True)
class Source:
    """Weights that were found, not yet matched."""

    what: str
    places: Mapping[str, Weights]
    """State dicts by where they stand in the file; `""` is the file itself."""
    input: InputSpec | None = None
    """What their network was fed, where that is known."""


def asked(init: str | None) -> bool:
    """Whether `backbone.init` names a source."""
    return init not in (None, "random")


def check(init: str) -> None:
    """Raises `UsageError` for a source that is not there: cheap, to be called before images are packed."""
    if init == "timm" or init.startswith("timm:"):
        return
    path = Path(init)
    if path.is_dir():
        artefact.find(path)
    elif not path.is_file():
        raise UsageError(
            f"backbone.init: {init} does not exist; it is random, timm (or timm:MODEL.TAG), a run or artefact folder, "
            f"or a file ({', '.join(SUFFIXES[:4])})"
        )
    elif path.suffix not in SUFFIXES:
        raise UsageError(f"backbone.init: {init} is no checkpoint: expected one of {', '.join(SUFFIXES)}")


def opened(init: str, model: str) -> Source:
    """The weights that `backbone.init` names; `model` is whose published weights `timm` means."""
    check(init)
    if init == "timm" or init.startswith("timm:"):
        name = init.partition(":")[2] or model
        weights, fed = named("backbones", "timm").published(name)
        return Source(f"timm's published {name}", {"": weights}, fed)
    path = Path(init)
    if path.is_dir():
        folder = artefact.find(path)
        found = artefact.read(folder)
        return Source(f"{folder} ({found.name})", {"": found.weights()}, found.input)
    if path.suffix != ".safetensors":
        return Source(init, _places(_unpickled(path)))
    try:
        return Source(init, {"": load_file(path)})
    except (OSError, SafetensorError) as error:
        raise DataError(f"{init} cannot be read: {error}") from error


def _unpickled(path: Path) -> Any:
    """What torch saved, by the loader that runs no code."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            if any(item.compress_type != zipfile.ZIP_STORED for item in packed.infolist()):
                raise DataError(f"{path} is compressed, as no file of torch is: it could be of any size in memory")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO's and MAE's files hold their arguments
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not (kind := pickled_kind(error)):
            raise DataError(f"{path} is no checkpoint that torch can read") from error
        raise UsageError(
            f"{path} holds a pickled {kind}, and loading such objects can run any code: save the weights alone in "
            "the program that made it, torch.save(model.state_dict(), FILE), or as safetensors"
        ) from error
    except Exception as error:  # zip, tar, pickle and storage errors of every kind
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0] if str(error) else error!r}") from error
    if name := expanded(found):
        raise DataError(f"{path}: {name} claims more values than the file holds")
    return found


def _places(found: Any, at: str = "") -> dict[str, Weights]:
    """Every mapping with tensors in it, by its dotted place."""
    if not isinstance(found, Mapping):
        return {}
    tensors = {str(name): value.detach() for name, value in found.items() if isinstance(value, Tensor)}
    places = {at: tensors} if tensors else {}
    for name, value in found.items():
        places |= _places(value, f"{at}.{name}" if at else str(name))
    return places
