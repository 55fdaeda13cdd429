"""For timm and Hugging Face: the artefact itself, checked and copied."""

from __future__ import annotations

from pathlib import Path

from ssl_pretrain.artefact import load_backbone
from ssl_pretrain.files import write_durably

FILES = ("model.safetensors", "probe.safetensors", "README.md", "config.json")


def write(artefact: Path, out: Path) -> str:
    """Copies a whole artefact into `out`; returns the line that loads it. Raises `WriteError`, `DataError`."""
    load_backbone(artefact)  # refuses one that is damaged
    for name in FILES:
        write_durably(out / name, (artefact / name).read_bytes())
    return f'timm.create_model("local-dir:{out}", pretrained=True, features_only=True)'
