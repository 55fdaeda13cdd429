"""Checkpoints that can be trusted: whole or not there.

A file is written beside its place under a temporary name while its hash is taken, forced to the disk and renamed; a
marker with the hash is written last. What has no marker, or another hash, is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import torch

from ssl_pretrain.errors import SslPretrainError
from ssl_pretrain.files import write_durably

KEEP = 2


class Checkpoints:
    """The checkpoints of a run, in one folder; the newest `KEEP` are kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Writes `step_<n>.pt` and then its marker; older ones beyond `KEEP` go. Raises `WriteError`."""
        broken = _non_finite(state)
        if broken:
            raise SslPretrainError(f"{broken} is not finite at step {step}: no checkpoint is written of that")
        path = self.folder / f"step_{step:09d}.pt"
        buffer = io.BytesIO()
        torch.save(state, buffer)
        first = not self._marked()
        write_durably(path, buffer.getbuffer())
        marker = {"step": step, "sha256": hashlib.sha256(buffer.getbuffer()).hexdigest()}
        write_durably(path.with_suffix(".json"), json.dumps(marker).encode())
        if first:  # one value of a type that a safe load refuses would otherwise show only after the crash
            self.newest()
        for old in self._marked()[KEEP:]:
            old.with_suffix(".json").unlink(missing_ok=True)
            old.unlink(missing_ok=True)
        return path

    def newest(self) -> dict[str, Any] | None:
        """The state of the newest checkpoint whose bytes are what was written, or None."""
        for path in self._marked():
            try:
                content = path.read_bytes()
                marker = json.loads(path.with_suffix(".json").read_text())
            except (OSError, ValueError):
                continue
            if hashlib.sha256(content).hexdigest() == marker["sha256"]:
                state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
                return state
        return None

    def sweep(self) -> None:
        """Removes what a killed writer left behind."""
        unmarked = (path for path in self.folder.glob("step_*.pt") if not path.with_suffix(".json").exists())
        for path in [*self.folder.glob(".*.tmp-*"), *unmarked]:
            path.unlink(missing_ok=True)

    def _marked(self) -> list[Path]:
        marked = (p.with_suffix(".pt") for p in self.folder.glob("step_*.json"))
        return sorted((p for p in marked if p.exists()), reverse=True)


def _non_finite(state: Any, name: str = "") -> str:
    """The dotted name of a tensor with a NaN or an infinity, or nothing."""
    if isinstance(state, torch.Tensor):
        return "" if not state.is_floating_point() or bool(torch.isfinite(state).all()) else name or "a tensor"
    if isinstance(state, dict):
        return next((found for key, value in state.items() if (found := _non_finite(value, f"{name}.{key}"))), "")
    return ""
