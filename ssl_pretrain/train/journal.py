"""What a run tells: `metrics.jsonl`, TensorBoard, and one live line (plain lines where there is no terminal)."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from ssl_pretrain.backbones import InputSpec
from ssl_pretrain.files import write_durably

PLAIN_EVERY_S = 15.0
"""Seconds between two lines where no terminal can show a live one."""


class Journal:
    """Writes the records of a run from `start` on; those of later steps, left by a crash, are taken out."""

    def __init__(
        self, folder: Path, start: int, steps: int, batch_size: int, console: Console, writes: bool = True
    ) -> None:
        self.path, self.start, self.steps, self.batch_size = folder / "metrics.jsonl", start, steps, batch_size
        self.writes = writes
        """Only one of several processes does."""
        self._pending: list[bytes] = []
        """Lines that a full disk did not take."""
        self._board: SummaryWriter | None = None
        if writes:
            _keep_until(self.path, start)
        self.console = console
        self.live = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(compact=True), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.live.add_task("pretrain", total=steps, completed=start, text="")
        self.began = self.spoke = time.monotonic()
        self.counted = start, self.began
        """Since when the images of `images_per_s` are counted; probes and saves do not count."""
        self.probe_text = ""
        self._hook = threading.excepthook

    def __enter__(self) -> Journal:
        self.live.start()
        self._hook, threading.excepthook = threading.excepthook, self._of_threads
        self._board = self._open(self.start) if self.writes else None  # not before: it starts a thread
        return self

    def _of_threads(self, args: threading.ExceptHookArgs) -> None:
        """TensorBoard's own would print a traceback on a full disk; `_on_board` says it in a line."""
        if not (type(args.thread).__module__.startswith("tensorboard.") and issubclass(args.exc_type, OSError)):
            self._hook(args)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.live.stop()
        with contextlib.suppress(OSError):
            _append(self.path, b"".join(self._pending))  # what a full disk did not take, if it has room by now
        with contextlib.suppress(OSError):
            if self._board is not None:
                self._board.close()
        threading.excepthook = self._hook

    def rewind(self, step: int) -> None:
        """Forgets what came after a step."""
        if not self.writes:
            return
        _keep_until(self.path, step)
        with contextlib.suppress(OSError):
            if self._board is not None:
                self._board.close()
        self._board = self._open(step)
        self.counted = step, time.monotonic()

    def say(self, text: str) -> None:
        """A line above the live one."""
        self.live.console.print(text, highlight=False)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """The curves at a step, and the live line."""
        now = time.monotonic()
        rate = (step - self.counted[0]) * self.batch_size / max(now - self.counted[1], 1e-9)
        self.counted = step, now
        self.record(step, {**values, "images_per_s": rate})
        text = f"loss {values['loss']:.4f} · {rate:.0f} images/s{self.probe_text}"
        self.live.update(self.task, completed=step, text=f"step {step}/{self.steps} · {text}")
        if not self.console.is_terminal and (now - self.spoke > PLAIN_EVERY_S or step == self.steps):
            self.spoke = now
            left = (now - self.began) / max(step - self.start, 1) * (self.steps - step)
            self.say(f"step {step}/{self.steps} · {text} · {left / 60:.1f} min left")

    def record(self, step: int, values: Mapping[str, float], group: str = "train") -> None:
        """One line of `metrics.jsonl` and as many TensorBoard scalars."""
        if not self.writes:
            return
        line = json.dumps({"step": step, **{f"{group}/{k}": v for k, v in values.items()}}) + "\n"
        fell_behind = bool(self._pending)
        self._pending.append(line.encode())
        try:
            _append(self.path, b"".join(self._pending))
            self._pending.clear()
        except OSError as error:
            if not fell_behind:
                self.say(f"{self.path} cannot be written ({error.strerror}): its lines are kept until it can")

        def curves(board: SummaryWriter) -> None:
            for name, value in values.items():
                board.add_scalar(f"{group}/{name}", value, step)

        self._on_board(step, curves)

    def _open(self, step: int) -> SummaryWriter | None:
        try:
            return SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=step + 1)
        except OSError:
            return None

    def _on_board(self, step: int, write: Callable[[SummaryWriter], object]) -> None:
        """TensorBoard is a convenience: where it cannot be written the run goes on, and it is opened anew."""
        self._board = self._board or self._open(step - 1)
        try:
            if self._board is not None:
                write(self._board)
        except OSError as error:
            self.say(f"TensorBoard's file cannot be written ({error.strerror or error}): a part of its curves is lost")
            self._board = None

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Around what is not training, a probe or a save: its time does not count in `images_per_s`."""
        began = time.monotonic()
        yield
        self.counted = self.counted[0], self.counted[1] + time.monotonic() - began

    def probe(self, step: int, scores: Mapping[str, float]) -> None:
        """The k-NN scores of a step; the live line shows the balanced accuracy from now on."""
        self.record(step, scores, "knn")
        self.probe_text = f" · k-NN {scores['balanced_accuracy']:.3f}"
        self.say(
            f"step {step}: k-NN balanced accuracy {scores['balanced_accuracy']:.3f} "
            f"({scores['balanced_accuracy_low']:.3f} to {scores['balanced_accuracy_high']:.3f}), "
            f"accuracy {scores['accuracy']:.3f}"
        )

    def figure(self, step: int, name: str, pixels_HWC: NDArray[np.uint8]) -> None:
        """A drawn figure."""
        if self.writes:
            self._on_board(step, lambda board: board.add_image(name, pixels_HWC, step, dataformats="HWC"))

    def pictures(self, step: int, name: str, x_NCHW: Tensor, fed: InputSpec, columns: int) -> None:
        """A grid of normalised images."""
        if not self.writes:
            return
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (fed.mean, fed.std))
        images = (x_NCHW.detach().float().cpu() * std + mean).clamp(0, 1)
        grid = make_grid(images, nrow=columns)
        self._on_board(step, lambda board: board.add_image(name, grid, step))


def _append(path: Path, content: bytes) -> None:
    """All of it or, when the disk is full, nothing. Makes the folder again where it was removed."""
    if not content:
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        before = os.fstat(handle).st_size
        try:
            while content:
                content = content[os.write(handle, content) :]
        except OSError:
            os.ftruncate(handle, before)  # half a line would spoil the next one
            raise
    finally:
        os.close(handle)


def _keep_until(path: Path, step: int) -> None:
    """Drops the lines after a step, and a line that a crash cut off; raises `WriteError`."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_durably(path, b"".join(kept))
