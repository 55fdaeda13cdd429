"""What the speed benchmarks share: interleaved rounds, ratios, efficiency, MFU, host reads, memory, the machine.

Only ratios taken within a round are worth anything: a machine's speed moves by half from one minute to the next.

Legend: R rounds.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ssl_pretrain.errors import SslPretrainError
from ssl_pretrain.files import write_durably

MOST = 1.02
"""Efficiency above which the benchmark is wrong: nothing is faster than its own limit, but by noise."""
PEAK_TFLOPS = {"H200 NVL": 835, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}
"""Dense bf16 TFLOP/s of the makers' data sheets, by a part of the device's name; the first that fits counts."""
PACKAGES = ("ssl-pretrain", "torch", "torchvision", "timm", "lightly", "kornia", "numpy", "pillow", "faiss-cpu")


class WrongBenchmark(SslPretrainError):
    """A figure that cannot be: whatever else was measured beside it is not to be trusted."""


# What computes


def median_ratio(over_R: Sequence[float], under_R: Sequence[float]) -> float:
    """Median over rounds of one number over another of the same round.

    Rounds of 2 / 1, 30 / 10 and 5 / 1: 3, though the ratio of the medians is 5.

    >>> median_ratio([2, 30, 5], [1, 10, 1])
    3.0
    """
    if not over_R or len(over_R) != len(under_R):
        raise ValueError(f"{len(over_R)} and {len(under_R)} rounds cannot be compared")
    return float(np.median(np.asarray(over_R, np.float64) / np.asarray(under_R, np.float64)))


def efficiency(limit_R: Sequence[float], actual_R: Sequence[float]) -> float:
    """Seconds an image of the step alone over those of the whole loop: 1 is a loop that costs nothing.

    >>> efficiency([1.9, 2.0, 1.8], [2.0, 2.0, 2.0])
    0.95
    """
    return median_ratio(limit_R, actual_R)


def trusted(found: Mapping[str, float]) -> None:
    """Raises `WrongBenchmark` where an efficiency is above `MOST`: the limit is none, so nothing beside it counts."""
    for name, value in found.items():
        if not value <= MOST:
            raise WrongBenchmark(
                f"{name}: efficiency {value:.3f} is above {MOST}, so what was taken for the limit is none; "
                "the machine is busy or the benchmark is wrong: run it again with more --rounds"
            )


def mfu(flops_per_image: float, images_per_s: float, peak_tflops: float) -> float:
    """Model FLOPs utilisation (Chowdhery et al., PaLM, 2022, appendix B): FLOPs that the model needs, by the peak.

    114 GFLOP an image at 3,000 images a second are 342 TFLOP/s, of 989 that is 0.346.

    >>> round(mfu(114e9, 3000, 989), 3)
    0.346
    """
    return flops_per_image * images_per_s / (peak_tflops * 1e12)


def peak_tflops(device_name: str) -> float | None:
    """The peak of a GPU by its name; None for one that the table does not know.

    >>> peak_tflops("NVIDIA H200"), peak_tflops("NVIDIA H200 NVL"), peak_tflops("some other")
    (989, 835, None)
    """
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in device_name), None)


def scaling_efficiency(one_s: float, many_s: float, ranks: int) -> float:
    """Of N ranks that share a global batch: seconds of one rank over N times the seconds of all of them.

    A step of 8 s that four ranks do in 2.5 s: 8 / 10.

    >>> scaling_efficiency(8.0, 2.5, 4)
    0.8
    """
    return one_s / (ranks * many_s)


def exponent(size_N: Sequence[float], cost_N: Sequence[float]) -> float:
    """Slope of log cost over log size: 1 is linear, 0 does not grow.

    >>> round(exponent([1e3, 1e4, 1e5], [0.2, 2.0, 20.0]), 3)
    1.0
    """
    return float(np.polyfit(np.log(size_N), np.log(np.maximum(cost_N, 1e-9)), 1)[0])


# How it is measured


def rounds(
    contenders: Mapping[str, Callable[[], float]],
    count: int,
    budget_s: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, list[float]]:
    """Lets every contender run once a round, and returns what each call gave; the first round warms up and is dropped.

    Every second round runs backwards, and every two the order turns by one: nobody always comes after the same, and a
    machine that becomes slower is held against nobody. Ends early where another round would go beyond the budget,
    but not before one round counts.
    """
    began, names = clock(), list(contenders)
    found: dict[str, list[float]] = {name: [] for name in names}
    longest = 0.0
    for turn in range(count + 1):
        at = clock()
        if turn > 1 and at - began + longest > budget_s:
            break
        first = turn // 2 % len(names)
        order = names[first:] + names[:first]
        for name in order[:: -1 if turn % 2 else 1]:
            found[name].append(contenders[name]())
        longest = max(longest, clock() - at) if turn else 0.0  # the first also compiles
    return {name: given[1:] for name, given in found.items()}


def finished(device: torch.device) -> None:
    """Returns when the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Reads(TorchDispatchMode):
    """Counts the operations by which a tensor's value comes to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select")
        return func(*args, **(kwargs or {}))


def host_reads(call: Callable[[], object], device: torch.device) -> int:
    """How often a call waits for a value of a tensor: by torch's own warnings on CUDA.

    On a CPU `.item()`, `bool()` and their like, `tolist`, `cpu` and `numpy` are counted, `.cpu().numpy()` as one.
    That is an upper bound: what is on the host with a GPU too (Adam's counters, Kornia's parameters) counts as well.
    """
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return len([w for w in seen if "synchroniz" in str(w.message)])
    with _copies() as copies, _Reads() as reads:
        call()
    return reads.count + len(copies)


@contextlib.contextmanager
def _copies() -> Iterator[list[str]]:
    """Names of the methods that copy whole tensors to the host; on a CPU they are no operations of their own."""
    seen: list[str] = []
    with contextlib.ExitStack() as stack:
        for name in ("tolist", "cpu", "numpy"):
            known = vars(torch.Tensor).get(name) or vars(torch._C.TensorBase)[name]

            def noted(x: Any, *words: Any, name: str = name, known: Any = known) -> Any:
                # What was copied by `cpu` is on the host: its `numpy` reads nothing.
                seen.extend([] if name == "numpy" and seen and seen[-1] == "cpu" else [name])
                return known(x, *words)

            stack.enter_context(mock.patch.object(torch.Tensor, name, noted))
        yield seen


def flops(call: Callable[[], object]) -> int:
    """Of matrix products, convolutions and attention, forward and backward, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def peak_rss_bytes(reset: bool = False) -> int | None:
    """The most memory that this process ever had, or had since the last `reset`; None where the system does not say.

    Not `getrusage`: its maximum begins with that of the parent, which a child takes over through fork and exec.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        found = next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
    except (OSError, StopIteration):
        return None
    return found


def own_bytes() -> int | None:
    """Memory that this process has now for itself, mapped files aside; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
    except (OSError, StopIteration):
        return None


# What is said of it


def machine() -> dict[str, Any]:
    """Where and when it was measured, and with what."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """Of the checkout that this file stands in, `+` where it was changed since; empty where there is none."""
    git = ["git", "-C", str(Path(__file__).parent)]
    done = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return done.stdout.strip() + ("+" if changed.stdout.strip() else "") if done.returncode == 0 else ""


def in_words(where: Mapping[str, Any]) -> str:
    """The machine in one line.

    >>> in_words({"cpu": "X", "cores": 2, "threads": 1, "load": 0.5, "gpus": [], "versions": {"torch": "2.15"},
    ...           "commit": "abc", "date": "2026-11-22T01:00:00+00:00"})
    'X, 2 cores, 1 thread, load 0.5; no GPU; torch 2.15; commit abc; 2026-11-22'
    """
    gpus = " + ".join(where["gpus"]) or "no GPU"
    threads = f"{where['threads']} thread{'s' if where['threads'] > 1 else ''}"
    cpu = f"{where['cpu']}, {where['cores']} cores, {threads}, load {where['load']}"
    torch_ = where["versions"].get("torch", "?")
    return f"{cpu}; {gpus}; torch {torch_}; commit {where['commit'] or '?'}; {where['date'][:10]}"


def write(path: Path | None, found: Mapping[str, Any]) -> None:
    """As JSON, where a file is asked for; a NaN, which JSON does not know, raises `ValueError`."""
    if path is not None:
        write_durably(path.absolute(), (json.dumps(found, indent=2, allow_nan=False) + "\n").encode())


def cell(value: float | None, form: str = ".2f") -> str:
    """A number of a table; a dash for none.

    >>> cell(0.954), cell(None), cell(12345.6, ",.0f")
    ('0.95', '–', '12,346')
    """
    return "–" if value is None else format(value, form)
