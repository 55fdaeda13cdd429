"""Self-supervised pretraining of detector backbones on microscopy images."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssl_pretrain.artefact import load_backbone
    from ssl_pretrain.probe.knn import knn_probe
    from ssl_pretrain.train.loop import pretrain

__all__ = ["knn_probe", "load_backbone", "pretrain"]
__version__ = "0.1.0"
# Folders with a project's own methods/, backbones/, data/readers/ or export/ files: `export SSL_PRETRAIN_PATH=mine`.
__path__ += [folder for folder in os.environ.get("SSL_PRETRAIN_PATH", "").split(os.pathsep) if folder]

_WHERE = {"knn_probe": "probe.knn", "load_backbone": "artefact", "pretrain": "train.loop"}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for (PEP 562), so that `import ssl_pretrain` stays light."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
