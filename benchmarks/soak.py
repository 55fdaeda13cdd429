"""Whether a run survives what comes: a random fault every few seconds, and at the end the calm run's weights.

    python benchmarks/soak.py [--minutes 30 | --steps N] [--every-s 30] [--method simclr] [--seed 0] [--json FILE]
    python benchmarks/soak.py --quick

A small run is started again whenever it ends before its last step. Drawn from the seed, in turn:

    kill      SIGKILL
    term      SIGTERM, which must end in code 75
    usr1      SIGUSR1, likewise
    full      no call can write under the run's folder for some seconds (ENOSPC by an injector in the process)
    artefact  the artefact is removed
    torn      killed, and the newest checkpoint cut short
    second    another run is started in the same folder, which must be refused with code 74

How many steps fit MINUTES is measured first. While a process lives, its resident memory and open descriptors are read,
and those of the calm run, which goes beside it as one process. Their slopes per hour are of one least-squares line
through the samples of all processes, each about its own mean and without its first 15 s. Returns 1 unless the weights
and the optimizer's state are bit for bit those of a calm run.
`--quick` takes 1 minute and a fault every 6 s. Linux only; it uses the forking server of `tests/faults.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from conftest import small
from faults import Child, Forks, forks

from ssl_pretrain import rng
from ssl_pretrain.data.building import build
from ssl_pretrain.train.checkpoint import Checkpoints

KINDS = "kill", "term", "usr1", "full", "artefact", "torn", "second"
FULL_S = 3.0
SETTLED_S = 15.0
"""After its start a process no longer touches pages for the first time."""
LEAST_SAMPLES = 8
"""Of a process whose slope is told."""


@dataclass
class Watch:
    """Resident memory and descriptors of the processes, one list a process."""

    samples: list[list[tuple[float, int, int]]] = field(default_factory=list)
    """Seconds, bytes, descriptors."""

    def look(self, pid: int) -> None:
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            count = len(os.listdir(f"/proc/{pid}/fd"))
        except (OSError, IndexError, ValueError):  # it has just ended
            return
        self.samples[-1].append((time.monotonic(), pages * os.sysconf("SC_PAGE_SIZE"), count))

    def slopes(self) -> tuple[float, float]:
        """MiB and descriptors per hour, over all processes that lived long enough."""
        rises, below = np.zeros(2), 0.0
        for samples in self.samples:
            settled = np.array([row for row in samples if row[0] > samples[0][0] + SETTLED_S], np.float64)
            if len(settled) < LEAST_SAMPLES:
                continue
            centred = settled - settled.mean(0)
            rises += centred[:, 0] @ centred[:, 1:]
            below += centred[:, 0] @ centred[:, 0]
        return (0.0, 0.0) if not below else (rises[0] / below * 3600 / 2**20, rises[1] / below * 3600)

    def most(self) -> tuple[float, int]:
        """MiB and descriptors at most."""
        every = [row for samples in self.samples for row in samples]
        return max((row[1] for row in every), default=0) / 2**20, max((row[2] for row in every), default=0)


@dataclass
class Soak:
    """A run under fire."""

    pool: Forks
    recipe: dict[str, Any]
    data: Path
    folder: Path
    calm: Child
    """The same run, undisturbed: one process from the first step to the last."""
    watch: Watch = field(default_factory=Watch)
    calm_watch: Watch = field(default_factory=lambda: Watch([[]]))
    done: Counter[str] = field(default_factory=Counter)
    ends: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.folder / "run"

    def start(self) -> Child:
        self.watch.samples.append([])
        how = {"sites": [str(self.out), "once", None], "full": str(self.folder / "full")}
        return self.pool.start(self.recipe, self.data, self.out, **how)

    def until_it_is_done(self, every_s: float, moments: rng.Key, console: Console) -> None:
        """Starts it and lets a fault come every so often, until it has done its steps."""
        child, number, next_s = self.start(), 0, time.monotonic() + every_s
        while True:
            code = child.poll()
            if code is not None:
                self.ends[code] += 1
                if code == 0:
                    return
                if code not in (75, 74, -signal.SIGKILL):
                    self.wrong.append(f"ended with {code}: {child.text()[-500:]}")
                child = self.start()
            self.watch.look(child.pid)
            if self.calm.poll() is None:
                self.calm_watch.look(self.calm.pid)
            if time.monotonic() > next_s:
                kind = KINDS[int(len(KINDS) * rng.uniform(rng.fold_in(moments, number), 1)[0])]
                console.print(f"step {max(self.steps(), default=0)}: {kind}", highlight=False)
                self.done[kind] += 1
                self.fault(kind, child)
                number, next_s = number + 1, time.monotonic() + every_s
            time.sleep(0.25)

    def steps(self) -> list[int]:
        return Checkpoints(self.out / "checkpoints").steps()

    def fault(self, kind: str, child: Child) -> None:
        if kind in ("kill", "torn"):
            child.kill()
        if kind == "torn" and len(self.steps()) > 1:
            path = self.out / "checkpoints" / f"step_{self.steps()[0]:09d}.pt"
            path.write_bytes(path.read_bytes()[:-1000])
        elif kind in ("term", "usr1"):
            child.send(signal.SIGTERM if kind == "term" else signal.SIGUSR1)
            if (code := child.wait()) not in (75, 0, -signal.SIGTERM, -signal.SIGUSR1):
                self.wrong.append(f"{kind} ended it with {code}")  # negative: it had not begun its first step
            elif code < 0:
                child.code = -signal.SIGKILL
        elif kind == "full":
            (self.folder / "full").touch()
            time.sleep(FULL_S)
            (self.folder / "full").unlink()
        elif kind == "artefact":
            shutil.rmtree(self.out / "artefact", ignore_errors=True)
        elif kind == "second" and (self.out / ".lock").exists() and (self.out / ".lock").read_text():
            code = self.pool.run(self.recipe, self.data, self.out)
            if code != 74 and child.poll() is None:
                self.wrong.append(f"a second run ended with {code}")


def same(a: Any, b: Any) -> bool:
    """Bit for bit, whatever the nesting."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def images(folder: Path, count: int = 40) -> Path:
    """Small ones, so that steps are quick."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        y, x = np.mgrid[:48, :56]
        wave = np.sin(x * random.uniform(0.1, 1) + y * random.uniform(0.1, 1))
        pixels = 128 + 80 * wave[..., None] * random.uniform(0.2, 1, 3) + random.normal(0, 5, (48, 56, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:02d}.png")
    return folder


def last(out: Path) -> dict[str, Any]:
    found = Checkpoints(out / "checkpoints").newest()
    assert found is not None
    return {key: found[key] for key in ("step", "method", "optimizer")}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--steps", type=int, help="instead of as many as fit MINUTES")
    parser.add_argument("--every-s", type=float, default=30.0)
    parser.add_argument("--method", default="simclr")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    words = parser.parse_args()
    minutes, every_s = (1.0, 6.0) if words.quick else (words.minutes, words.every_s)
    console = Console(soft_wrap=True)
    with tempfile.TemporaryDirectory() as name:
        folder, pool = Path(name), forks()
        data = build([images(folder / "images")], folder / "pack", processes=0).folder

        def recipe(steps: int) -> dict[str, Any]:
            return small(words.method, steps=steps, save_every_minutes=min(1.0, every_s / 120), log_every_steps=50)

        def seconds(steps: int) -> float:
            began = time.monotonic()
            assert pool.run(recipe(steps), data, folder / f"pilot_{steps}") == 0
            return time.monotonic() - began

        steps = words.steps
        if not steps:
            step_s = max(1e-4, (seconds(120) - seconds(20)) / 100)
            steps = max(100, int(0.8 * 60 * minutes / step_s))
        console.print(f"{steps} steps; the calm run goes beside it", highlight=False)
        calm = pool.start(recipe(steps), data, folder / "calm")
        soak = Soak(pool, recipe(steps), data, folder, calm)
        began = time.monotonic()
        soak.until_it_is_done(every_s, rng.key(words.seed, "soak"), console)
        assert calm.wait(120 * 60 * minutes) == 0
        equal = same(last(folder / "calm"), last(soak.out))
        left = [str(p) for p in soak.out.rglob(".*.tmp-*")]
        (rss, descriptors), (calm_rss, calm_descriptors) = soak.watch.slopes(), soak.calm_watch.slopes()
        found = {
            "method": words.method, "steps": steps, "minutes": (time.monotonic() - began) / 60, "equal": equal,
            "faults": dict(soak.done), "ends": {str(code): count for code, count in soak.ends.items()},
            "starts": len(soak.watch.samples), "rss_slope_mib_per_h": rss, "descriptors_slope_per_h": descriptors,
            "rss_most_mib": soak.watch.most()[0], "descriptors_most": soak.watch.most()[1],
            "calm_rss_slope_mib_per_h": calm_rss, "calm_descriptors_slope_per_h": calm_descriptors,
            "calm_rss_most_mib": soak.calm_watch.most()[0], "left_over": left, "wrong": soak.wrong,
        }  # fmt: skip
    for key, value in found.items():
        console.print(f"{key:24} {value}", highlight=False, markup=False)
    if words.json:
        words.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if equal and not left and not soak.wrong else 1


if __name__ == "__main__":
    sys.exit(main())
