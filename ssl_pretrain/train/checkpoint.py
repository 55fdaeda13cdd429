"""Checkpoints that can be trusted: whole or not there.

A file is written beside its place under a temporary name while its hash is taken, forced to the disk and renamed; a
marker with the hash is written last. What has no marker, or another hash, is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ssl_pretrain.errors import SslPretrainError
from ssl_pretrain.files import durably, write_durably

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
        first = not self._marked()
        with durably(path) as file:
            hashed: Any = _Hashed(file)  # all that torch asks of a file
            torch.save(state, hashed)
        marker = {"step": step, "bytes": hashed.bytes, "sha256": hashed.sha256.hexdigest()}
        write_durably(path.with_suffix(".json"), json.dumps(marker).encode())
        if first:  # one value of a type that a safe load refuses would otherwise show only after the crash
            self.newest()
        for old in self._marked()[KEEP:]:
            old.with_suffix(".json").unlink(missing_ok=True)
            old.unlink(missing_ok=True)
        return path

    def newest(self) -> dict[str, Any] | None:
        """The state of the newest checkpoint whose bytes are what was written, or None."""
        states = (self.read(path) for path in self._marked())
        return next((state for state in states if state is not None), None)

    def steps(self) -> list[int]:
        """Of the checkpoints that have a marker, the newest first."""
        return [int(path.stem.removeprefix("step_")) for path in self._marked()]

    def at(self, step: int) -> dict[str, Any] | None:
        """The state of a step; None where it is not there, or not what was written."""
        return self.read(self.folder / f"step_{step:09d}.pt")

    def read(self, path: Path) -> dict[str, Any] | None:
        """The state in a checkpoint whose bytes are what its marker says; nothing else is given to torch."""
        try:
            marker = json.loads(path.with_suffix(".json").read_text())
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != marker["sha256"]:
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return state

    def _marked(self) -> list[Path]:
        marked = (p.with_suffix(".pt") for p in self.folder.glob("step_*.json"))
        return sorted((p for p in marked if p.exists()), reverse=True)


def sweep(folder: Path) -> None:
    """Removes what a killed writer left in a run's folder: temporary files, and checkpoints without a marker."""
    unmarked = (path for path in folder.glob("checkpoints/step_*.pt") if not path.with_suffix(".json").exists())
    for path in [*folder.rglob(".*.tmp-*"), *unmarked]:
        path.unlink(missing_ok=True)


class _Hashed:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        self.bytes += len(content)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()


def _non_finite(state: Any, name: str = "") -> str:
    """The dotted name of a tensor with a NaN or an infinity, or nothing."""
    if isinstance(state, torch.Tensor):
        return "" if not state.is_floating_point() or bool(torch.isfinite(state).all()) else name or "a tensor"
    if isinstance(state, dict):
        return next((found for key, value in state.items() if (found := _non_finite(value, f"{name}.{key}"))), "")
    return ""
