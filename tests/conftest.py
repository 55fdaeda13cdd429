"""What several test files share: a few small images, packed once, and recipes that train in seconds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Tiny tensors gain nothing from threads, and threads that spin lose much where another process wants the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ssl_pretrain import backbones
from ssl_pretrain.backbones import Backbone
from ssl_pretrain.data.building import build
from ssl_pretrain.data.pack import Pack
from ssl_pretrain.methods import config_class
from ssl_pretrain.views import ViewSpec
from ssl_pretrain.views.plan import corners, plan


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 small images of unequal size with structure that augmentation does not remove."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(40):
        height, width = random.integers(40, 72, 2)
        y, x = np.mgrid[:height, :width]
        wave = np.sin(x * random.uniform(0.1, 1) + y * random.uniform(0.1, 1))
        colour = random.uniform(0.2, 0.8, 3)
        pixels = (colour + 0.2 * wave[..., None] + random.normal(0, 0.02, (height, width, 3))).clip(0, 1)
        Image.fromarray((255 * pixels).astype(np.uint8)).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="session")
def pack(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return build([images], tmp_path_factory.mktemp("packs") / "pack", processes=0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real labelled microscopy; tests that want it are skipped where it is not."""
    folder = Path(os.environ.get("SSL_PRETRAIN_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the folder of real images is not here (SSL_PRETRAIN_DATA)")
    return folder


METHODS: dict[str, dict[str, Any]] = {
    "simclr": {"size_px": 32, "hidden_dim": 32, "output_dim": 16, "temperature": 0.5},
    "dino": {
        "global_size_px": 48, "local_size_px": 32, "local_count": 2, "prototypes": 64, "hidden_dim": 32,
        "bottleneck_dim": 16, "momentum": 0.9, "freeze_last_layer": 0.2,
    },
    "mae": {"size_px": 32, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2},
    "byol": {"size_px": 32, "hidden_dim": 32, "output_dim": 16, "momentum": 0.9},
    "vicreg": {"size_px": 32, "hidden_dim": 32, "output_dim": 24},
    "densegeo": {"size_px": 64, "hidden_dim": 32, "output_dim": 16, "anchors": 8, "negatives": 4},
    "spark": {"size_px": 64, "decoder_dim": 64},
    "distill": {"size_px": 32, "teacher": "random:test_resnet", "hidden_dim": 32},
    "ibot": {
        "global_size_px": 48, "local_size_px": 32, "local_count": 2, "prototypes": 64, "hidden_dim": 32,
        "bottleneck_dim": 16, "momentum": 0.9, "freeze_last_layer": 0.2,
    },
    "dinov2": {
        "global_size_px": 48, "local_size_px": 32, "local_count": 2, "prototypes": 64, "patch_prototypes": 48,
        "hidden_dim": 32, "bottleneck_dim": 16, "momentum": 0.9, "freeze_last_layer": 0.2,
    },
}  # fmt: skip
VIT = {"name": "test_vit", "patch_size": 8}


def small(method: str, backbone: Any = None, **train: Any) -> dict[str, Any]:
    """A recipe for a run of a few seconds; without a backbone, the smallest that the method takes."""
    backbone = backbone or (VIT if config_class(method).masks_patches else "test_resnet")
    settings = {"batch_size": 8, "steps": 6, "optimizer": "adamw", "lr": 1e-3, "log_every_steps": 2, **train}
    return {"backbone": backbone, "method": {"name": method, **METHODS[method]}, "train": settings}


def corners_of(specs: tuple[ViewSpec, ...], count: int) -> dict[str, np.ndarray]:
    """Where the views of some images of 300 x 300 px lie, for methods that compare places."""
    drawn = plan(specs, np.arange(count), np.full((count, 2), 300), epoch=0, seed=0)
    return {spec.name: corners(drawn, i) for i, spec in enumerate(specs)}


def shaken(name: str = "test_resnet", **options: Any) -> Backbone:
    """Random weights for which default ones cannot pass, and in which nothing can be lost unseen.

    Networks are born with BatchNorm statistics of 0 and 1, residual branches that add nothing, and even attention.
    """
    torch.manual_seed(1)
    backbone = backbones.create(name, **options)
    for parameter in backbone.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1)
        elif parameter.ndim == 2:
            parameter.data.mul_(4)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return backbone.eval()
