"""The CUDA engine without a GPU: its kernels in Triton's interpreter against the fused engine, and compiled."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_pretrain.errors import UsageError
from ssl_pretrain.methods import dino, simclr
from ssl_pretrain.views import ViewSpec, engine, fused
from ssl_pretrain.views.plan import plan

HERE = Path(__file__).parent
triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def said(script: str, interpret: str) -> dict[str, list[float]]:
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    ran = subprocess.run([sys.executable, HERE / script], capture_output=True, text=True, timeout=400,
                         env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": interpret})  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


@triton
def test_kernels_are_the_fused_engine_and_read_nothing_back():
    found = said("gpu_by_interpreter.py", interpret="1")
    counts = found.pop("counts")
    assert len(found) == 8
    assert found.pop("bf16")[0] < 0.02
    for name, (largest, mean) in found.items():
        assert largest < 1e-4 and mean < 2e-6, name
    for name, count in counts.items():
        assert count["reads"] == [], name
        if "stained" not in name:  # extra ops are torch ops, some twenty launches each
            assert count["triton"] + count["torch"] <= 60 * count["specs"], name


@triton
def test_kernels_compile_for_a_device_that_is_not_there():
    found = said("gpu_compiles.py", interpret="0")
    assert len(found) == 7 and min(found.values()) > 1000


SPECS = [(simclr.Config().views()), (dino.Config(local_count=2).views())]


@cuda
@pytest.mark.parametrize("specs", SPECS, ids=["simclr", "dino"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(specs, dtype):
    from ssl_pretrain.views import gpu

    rng = np.random.default_rng(0)
    sizes = np.array([(480, 640), (1200, 1600), (31, 7), (1, 40)])
    images = [torch.from_numpy(rng.integers(96, 160, (h, w, 3), dtype=np.uint8)) for h, w in sizes]
    flat = torch.cat([image.flatten() for image in images]).cuda()
    offset = np.concatenate([[0], np.cumsum(sizes.prod(1) * 3)[:-1]])
    drawn = plan(specs, np.arange(4), sizes, 0, 0)
    gpu.render(drawn, flat, offset, sizes, (0, 0, 0), (1, 1, 1), dtype)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = gpu.render(drawn, flat, offset, sizes, (0, 0, 0), (1, 1, 1), dtype)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = fused.render(drawn, images, (0, 0, 0), (1, 1, 1))
    for name, x in want.items():
        assert ours[name].dtype == dtype
        assert (ours[name].float().cpu() - x).abs().mean() < (1e-4 if dtype == torch.float32 else 2e-3)
    again = gpu.render(drawn, flat, offset, sizes, (0, 0, 0), (1, 1, 1), dtype)
    assert all(torch.equal(ours[name], again[name]) for name in ours)


# The choice

SMALL = (ViewSpec("view", 16, (0.2, 1.0), jitter_p=1.0, hue=0.1, contrast=0.3),)


def test_short_runs_are_not_compiled():
    chosen = engine.choose(SMALL, torch.device("cpu"), images=1000)
    assert chosen.name == "torch" and "too short" in chosen.reason


def test_long_runs_are_compiled_where_it_works(monkeypatch):
    monkeypatch.setattr(fused, "compiled", lambda specs: fused.EAGER)
    chosen = engine.choose(SMALL, torch.device("cpu"), images=10**9)
    assert chosen.name == "compiled"

    def broken(specs):
        raise RuntimeError("there is no\nC++ compiler")

    monkeypatch.setattr(fused, "compiled", broken)
    chosen = engine.choose(SMALL, torch.device("cpu"), images=10**9)
    assert chosen.name == "torch" and "there is no C++ compiler" in chosen.reason and "\n" not in chosen.reason
    with pytest.raises(UsageError, match=r"views.engine compiled: it cannot be made: there is no C"):
        engine.choose(SMALL, torch.device("cpu"), images=1, wanted="compiled")


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match=r"views.engine triton: it needs a CUDA device"):
        engine.choose(SMALL, torch.device("cpu"), images=1, wanted="triton")
    with pytest.raises(UsageError, match=r"views.engine compiled: it is for CPUs"):
        engine.choose(SMALL, torch.device("cuda"), images=1, wanted="compiled")
    assert engine.choose(SMALL, torch.device("cuda"), images=10**9, wanted="torch").name == "torch"


@pytest.mark.slow
def test_compiled_loops_are_the_eager_ones():
    specs = (
        ViewSpec("a", 32, (0.2, 1.0), count=3, turn_p=0.5, rotate_p=0.3, blur_p=0.5, jitter_p=0.9, brightness=0.8,
                 contrast=0.8, saturation=0.8, hue=0.2, gray_p=0.2, solarize_p=0.2),
        ViewSpec("b", 17, (0.2, 1.0), count=3, jitter_p=0.9, brightness=0.8, saturation=0.8, hue=0.2),
    )  # fmt: skip
    chosen = engine.choose(specs, torch.device("cpu"), images=1, wanted="compiled")
    rng = np.random.default_rng(0)
    images = [torch.from_numpy(rng.integers(96, 160, (40 + i, 90, 3), dtype=np.uint8)) for i in range(8)]
    images[0][:] = 255
    images[1][:] = 0
    sizes = np.array([image.shape[:2] for image in images])
    for epoch in range(4):
        drawn = plan(specs, np.arange(8), sizes, epoch, 0)
        got = chosen.render(drawn, lambda: images, lambda: None, sizes, (0, 0, 0), (1, 1, 1), torch.device("cpu"),
                            torch.float32)  # fmt: skip
        want = fused.render(drawn, images, (0, 0, 0), (1, 1, 1))
        for name, x in want.items():
            assert (got[name] - x).abs().mean() < 1e-6
