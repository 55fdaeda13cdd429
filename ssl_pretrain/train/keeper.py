"""When a run is saved, and what happens when it cannot be.

A save copies the state to the host and leaves the writing to a thread, so training waits for the copy only. A disk that
is full ends nothing at once: the run goes on and tries again an interval later.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ssl_pretrain.errors import WriteError
from ssl_pretrain.train.checkpoint import Checkpoints
from ssl_pretrain.train.lock import Lock
from ssl_pretrain.train.recipe import TrainSection

MAX_SHARE = 0.02
"""Of the time, for saves: a slow disk stretches the interval."""
FAILURES = 3
"""Saves in a row that fail before the run stops with code 74."""
RETRY_S = 2.0
"""Between attempts of the last save, after which there is no other."""


class Keeper:
    """The saves of a run. As a context it waits for what is being written when the block ends."""

    def __init__(
        self,
        folder: Path,
        train: TrainSection,
        say: Callable[[str], None],
        lock: Lock | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.checkpoints, self.train, self.say, self.clock = Checkpoints(folder / "checkpoints"), train, say, clock
        self.lock = lock
        self.saved_at, self.cost, self.failed = clock(), 0.0, 0
        """When the last save was begun, the seconds that training waited for it, and failures in a row."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._beside: WriteError | None = None

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._thread is not None and kind is not KeyboardInterrupt:  # who interrupts twice is not kept waiting
            self._thread.join()
            if kind is None:
                self._settle()

    def due(self, step: int) -> bool:
        """Whether to save after this step. Raises what went wrong with the last save, when it should end the run."""
        if self._thread is not None and not self._thread.is_alive():
            self._settle()
        every = self.train.save_every_steps
        late = self.clock() - self.saved_at > max(60 * self.train.save_every_minutes, self.cost / MAX_SHARE)
        return late or (every is not None and step % every == 0)

    def save(self, step: int, state: dict[str, Any], beside: Callable[[], object]) -> None:
        """Begins a save; `beside` writes what belongs to it (the artefact) at once."""
        began = self.clock()
        self.wait()
        if self.lock is not None:
            self.lock.check()
        copy = _on_host(state)
        self._thread = threading.Thread(target=self._write, args=(step, copy), name="checkpoint", daemon=True)
        self._thread.start()
        try:
            beside()
        except WriteError as error:
            self._beside = error
        self.saved_at = self.clock()
        self.cost = self.saved_at - began

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()
            self._settle()

    def save_last(self, step: int, state: dict[str, Any], beside: Callable[[], object]) -> None:
        """Saves, and returns when it is done. Raises `WriteError` after `FAILURES` attempts."""
        if self._thread is not None:
            self._thread.join()
        if self.lock is not None:
            self.lock.check()
        for attempt in range(1, FAILURES + 1):
            try:
                self.checkpoints.save(step, state)
                beside()
                break
            except WriteError as error:
                if attempt == FAILURES:
                    raise WriteError(f"step {step} is not saved: {error}; {self._last_good()}") from error
                self.say(f"step {step}: {error}; trying again in {RETRY_S:.0f} s")
                time.sleep(RETRY_S)
        self._thread, self._error, self._beside, self.failed = None, None, None, 0
        self.saved_at = self.clock()

    def _write(self, step: int, state: dict[str, Any]) -> None:
        try:
            self.checkpoints.save(step, state)
        except BaseException as error:  # raised where the training can hear it
            self._error = error

    def _settle(self) -> None:
        """Looks at what came of the save: a full disk that took neither checkpoint nor artefact failed once."""
        error = self._error or self._beside
        self._thread, self._error, self._beside = None, None, None
        if error is None:
            self.failed = 0
        elif isinstance(error, WriteError):
            self._count(error)
        else:
            raise error

    def _count(self, error: WriteError) -> None:
        self.failed += 1
        if self.failed >= FAILURES:
            raise WriteError(f"{FAILURES} saves in a row failed: {error}; {self._last_good()}") from error
        self.say(f"not saved: {error}; training goes on and tries again ({self.failed} of {FAILURES} failures)")

    def _last_good(self) -> str:
        steps = self.checkpoints.steps()
        return f"the checkpoint of step {steps[0]} is whole" if steps else "there is no checkpoint yet"


def _on_host(state: Any) -> Any:
    """A copy that training does not change any more."""
    if isinstance(state, torch.Tensor):
        return state.detach().cpu().clone() if state.device.type == "cpu" else state.detach().cpu()
    if isinstance(state, dict):
        return {key: _on_host(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_on_host(value) for value in state]
    return state
