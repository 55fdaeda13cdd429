"""Checkpoints that can be trusted: whole or not there.

A file is written beside its place under a temporary name while its hash is taken, forced to the disk and renamed; a
marker with the hash is written last. What has no marker, or another hash, is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ssl_pretrain.errors import DataError, SslPretrainError
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
            try:
                torch.save(state, hashed)
            except RuntimeError as error:  # torch's writer, as it closes, hides what stopped it
                raise (hashed.error or error) from error
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
        """The state in a checkpoint whose bytes are what its marker says; nothing else is given to torch.

        Raises `DataError` where that is not what a run saves: another type, or one that a safe load refuses.
        """
        try:
            marker = json.loads(path.with_suffix(".json").read_text())
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != marker["sha256"]:
                return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        try:
            state: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # zip, pickle and storage errors of every kind
            what = f"holds a pickled {kind}" if (kind := pickled_kind(error)) else "cannot be loaded"
            raise DataError(f"{path} {what}, which no run saves; choose another --out, or remove it") from error
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise DataError(f"{path} is not the checkpoint of a run; choose another --out")
        if name := expanded(state):
            raise DataError(f"{path}: {name} claims more values than the file holds; choose another --out")
        return state

    def _marked(self) -> list[Path]:
        marked = (p.with_suffix(".pt") for p in self.folder.glob("step_*.json"))
        return sorted((p for p in marked if p.exists()), reverse=True)


def sweep(folder: Path) -> None:
    """Removes what a killed writer left in a run's folder: temporary files, and checkpoints without a marker."""
    unmarked = (path for path in folder.glob("checkpoints/step_*.pt") if not path.with_suffix(".json").exists())
    for path in [*folder.rglob(".*.tmp-*"), *unmarked]:
        path.unlink(missing_ok=True)


def pickled_kind(error: Exception) -> str:
    """The class or function that torch's safe loader refused, or nothing where it failed of something else.

    >>> pickled_kind(ValueError("Trying to load unsupported GLOBAL posix.system whose module posix is blocked."))
    'posix.system'
    """
    found = re.search(r"(?:GLOBAL|global:?|class) ([\w.]+\.\w+)", str(error))
    return found[1] if found else ""


def expanded(state: Any, name: str = "") -> str:
    """The dotted name of a tensor that shows more bytes than its storage has, or nothing.

    A file of 1.5 kB can hold one of 2^40 values by a stride of 0: whatever copies it would need terabytes.

    >>> expanded({"a": torch.zeros(2), "b": {"c": torch.zeros(1).expand(3)}})
    '.b.c'
    """
    if isinstance(state, torch.Tensor):
        held = state.untyped_storage().nbytes() if state.layout == torch.strided else 0
        return (name or "a tensor") if state.numel() * state.element_size() > held else ""
    if isinstance(state, dict | list | tuple):
        parts = state.items() if isinstance(state, dict) else enumerate(state)
        return next((found for key, value in parts if (found := expanded(value, f"{name}.{key}"))), "")
    return ""


class _Hashed:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        self.bytes += len(content)
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _non_finite(state: Any, name: str = "") -> str:
    """The dotted name of a tensor with a NaN or an infinity, or nothing."""
    if isinstance(state, torch.Tensor):
        return "" if not state.is_floating_point() or bool(torch.isfinite(state).all()) else name or "a tensor"
    if isinstance(state, dict | list | tuple):
        parts = state.items() if isinstance(state, dict) else enumerate(state)
        return next((found for key, value in parts if (found := _non_finite(value, f"{name}.{key}"))), "")
    return ""
