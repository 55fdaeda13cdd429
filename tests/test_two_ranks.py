"""Loss, gradients and buffers on two gloo ranks are those of one process with the same batch, to 1e-10 in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import METHODS, VIT, corners_of

from ssl_pretrain import backbones, methods, rng
from ssl_pretrain.methods import Method, Views
from ssl_pretrain.train.sync import CpuSyncBatchNorm, synchronised

CASES = (
    "simclr/test_resnet", "simclr/test_vit", "dino/test_resnet", "dino/test_vit", "mae/test_vit",
    "byol/test_resnet", "byol/test_vit",
    "vicreg/test_resnet", "vicreg/test_vit",
    "distill/test_resnet", "distill/test_vit",
    "dino-bn/test_resnet", "ibot/test_vit", "ibot-bn/test_vit", "dinov2/test_vit",
    "densegeo/test_resnet", "densegeo/test_vit", "spark/test_resnet", "spark/test_convnext",
)  # fmt: skip
BATCH = 8


def built(case: str) -> Method:
    """In float64, from the same seed on every rank; `-bn` asks for BatchNorm in the head."""
    name, backbone = case.split("/")
    torch.manual_seed(0)
    name, _, norm = name.partition("-")
    config = methods.config_class(name)(**METHODS[name], **({"head_norm": "batch"} if norm else {}))
    plain = {"img_size": config.views()[0].size_px, "patch_size": VIT["patch_size"], "pool": config.vit().pool}
    made = backbones.create(backbone, **(plain if backbones.maskable(backbone) else {}))
    return methods.create(config, made).double()


def halves(method: Method, ranks: int) -> list[Views]:
    """The same global batch for any number of ranks, each with its part."""
    generator = torch.Generator().manual_seed(1)
    crops = {
        spec.name: torch.randn(
            spec.count, BATCH, 3, spec.size_px, spec.size_px, generator=generator, dtype=torch.float64
        )
        for spec in method.config.views()
    }
    key_B2 = rng.fold_in(rng.key(0, "test"), np.arange(BATCH))
    corners = corners_of(method.config.views(), BATCH)
    parts = [slice(r * BATCH // ranks, (r + 1) * BATCH // ranks) for r in range(ranks)]
    return [
        Views({n: x[:, part] for n, x in crops.items()}, key_B2[part], {n: x[part] for n, x in corners.items()})
        for part in parts
    ]


def test_synchronised_keeps_what_is_trained_and_what_is_not() -> None:
    method, before = built("dino/test_resnet"), built("dino/test_resnet")
    held = dict(method.named_parameters())
    synchronised(method, torch.device("cpu"))
    assert any(isinstance(module, CpuSyncBatchNorm) for module in method.modules())
    assert all(parameter is held[name] for name, parameter in method.named_parameters())
    trained = [name for name, parameter in method.named_parameters() if parameter.requires_grad]
    assert trained == [name for name, parameter in before.named_parameters() if parameter.requires_grad]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    out = tmp_path_factory.mktemp("two") / "found.pt"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    script = Path(__file__).with_name("two_ranks.py")
    done = subprocess.run([*words, str(script), str(out)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, torch.Tensor]] = torch.load(out, weights_only=True)
    return found


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process(case: str, two: dict[str, dict[str, torch.Tensor]]) -> None:
    method = built(case)
    loss = method.loss(halves(method, 1)[0], 0.5)["loss"]
    loss.backward()
    method.after_step(0.5)
    expected = {
        "loss": loss.detach(),
        **{f"gradient {n}": p.grad for n, p in method.named_parameters() if p.grad is not None},
    }
    expected |= {f"buffer {name}": buffer for name, buffer in method.named_buffers()}
    assert set(expected) == set(two[case])
    apart = {key: (value - two[case][key]).abs().max().item() for key, value in expected.items()}
    for key, difference in apart.items():
        # timm interpolates position embeddings (for DINO's local crops) in float32.
        assert difference < (1e-8 if "student.network.pos_embed" in key else 1e-10), key
